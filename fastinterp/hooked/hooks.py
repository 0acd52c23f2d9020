"""Hook points: where functions of the user read and change activations, forward and backward.

A hook point has TransformerLens's name. Its functions are called as ``fn(activation, hook=point)``; they may change the
activation in place, or return a replacement. What they get is a copy, so that an edit in place never reaches an
activation that was kept earlier.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastinterp.errors import OptionError, UnknownActivationError, check_choice, nearest
from fastinterp.model.forward import missing_because
from fastinterp.model.intervene import Key, Replaces, Taps
from fastinterp.model.spec import ModelSpec
from fastinterp.names import ACTIVATIONS

HookFunction = Callable[..., Any]
NameFilter = str | Callable[[str], bool] | Sequence[str] | None
Direction = Literal["fwd", "bwd"]

# Formed only if a flag is set or somebody asks for them by name, as they are large.
GATED = {
    "result": "use_attn_result",
    "attn_in": "use_attn_in",
    "q_input": "use_split_qkv_input",
    "k_input": "use_split_qkv_input",
    "v_input": "use_split_qkv_input",
    "mlp_in": "use_hook_mlp_in",
}


@dataclass(eq=False)
class Hook:
    """A function at a hook point. ``level`` counts the contexts (``model.hooks``) in which it was added."""

    fn: HookFunction
    is_permanent: bool = False
    level: int | None = None


@dataclass(eq=False)
class HookPoint:
    """One place of the forward; ``name`` is TransformerLens's, ``ctx`` is free for hook functions to keep things in."""

    name: str
    key: Key
    fwd_hooks: list[Hook] = field(default_factory=list)
    bwd_hooks: list[Hook] = field(default_factory=list)
    ctx: dict[str, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """Returns the layer; raises :class:`OptionError` for hook points outside of the blocks."""
        match = re.match(r"blocks\.(\d+)\.", self.name)
        if match is None:
            raise OptionError(f"hook point {self.name!r} belongs to no layer")
        return int(match.group(1))

    def hooks(self, direction: Direction) -> list[Hook]:
        """The functions that are called in one direction, in order."""
        return self.fwd_hooks if direction == "fwd" else self.bwd_hooks

    def add_hook(
        self,
        fn: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a function behind those that are there, or in front of them."""
        check_choice("dir", dir, ("fwd", "bwd"))
        hook = Hook(fn=fn, is_permanent=is_permanent, level=level)
        hooks = self.hooks(dir)
        hooks.insert(0 if prepend else len(hooks), hook)

    def add_perma_hook(self, fn: HookFunction, dir: Direction = "fwd") -> None:
        """Adds a permanent function."""
        self.add_hook(fn, dir=dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes functions; permanent ones only if asked, with ``level`` only those of that context."""
        check_choice("direction", dir, ("fwd", "bwd", "both"))
        for direction in ("fwd", "bwd"):
            if dir not in (direction, "both"):
                continue
            hooks = self.hooks(direction)
            hooks[:] = [
                hook
                for hook in hooks
                if (hook.is_permanent and not including_permanent) or (level is not None and hook.level != level)
            ]

    def clear_context(self) -> None:
        """Empties ``ctx``."""
        self.ctx = {}

    @property
    def changes(self) -> bool:
        """Whether what goes on may differ from what came: not if only gradients are looked at."""
        return bool(self.fwd_hooks)

    def apply(self, value: Tensor) -> Tensor:
        """Calls the forward functions, and lets the backward ones wait for the gradient."""
        for number, hook in enumerate(tuple(self.fwd_hooks)):
            passed = value if number else value.clone()
            result = hook.fn(passed, hook=self)
            if result is not None and result is not passed:
                self._check(result, value)
                # What a function returns stays its own: the next one, or a cache, gets a copy.
                passed = result.clone()
            value = passed
        if self.fwd_hooks and torch.is_grad_enabled() and not value.requires_grad:
            # Behind a constant that was patched in, gradients begin anew.
            value = value.detach().requires_grad_()
        if self.bwd_hooks and value.requires_grad:
            # A tensor of its own: two hook points can stand at the same one, and the later one's gradient comes first.
            value = value.view_as(value)
            value.register_hook(partial(self._backward, tuple(self.bwd_hooks)))
        return value

    def _check(self, result: Any, value: Tensor) -> None:
        expected = f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
        if not isinstance(result, Tensor):
            what = type(result).__name__
        elif result.shape != value.shape:
            what = str(tuple(result.shape))
        elif result.dtype != value.dtype:
            what = f"{result.dtype} (type .to(activation.dtype))"
        else:
            return
        raise OptionError(
            f"a hook on {self.name} returned {what}, expected {expected}, or nothing if it changed the activation in "
            "place"
        )

    def _backward(self, hooks: tuple[Hook, ...], gradient: Tensor) -> Tensor | None:
        still = [hook for hook in hooks if any(hook is other for other in self.bwd_hooks)]
        if not still:  # removed between the forward and the backward pass
            return None
        changed = gradient.clone()
        for hook in still:
            result = hook.fn(changed, hook=self)
            if isinstance(result, tuple):
                (result, *_) = result or (None,)
            changed = changed if result is None else result
        return changed


class Root:
    """Makes an activation the beginning of what gradients are recorded of."""

    changes = False

    def apply(self, value: Tensor) -> Tensor:
        """Returns the value with ``requires_grad``, where gradients are recorded at all."""
        if not torch.is_grad_enabled() or value.requires_grad:
            return value
        return value.detach().requires_grad_()


@dataclass
class KeepGradient:
    """Keeps the gradient that reaches an activation."""

    name: str
    gradients: dict[str, Tensor]
    changes: ClassVar[bool] = False

    def apply(self, value: Tensor) -> Tensor:
        """Returns the value; its gradient will be kept."""
        if value.requires_grad:
            value = value.view_as(value)
            value.register_hook(self._keep)
        return value

    def _keep(self, gradient: Tensor) -> None:
        self.gradients[self.name] = gradient.detach()


class HookPoints:
    """All hook points of a model, by name."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.by_name: dict[str, HookPoint] = {}
        before = [a for a in ACTIVATIONS.values() if not a.per_layer and not a.name.startswith("ln_final")]
        after = [a for a in ACTIVATIONS.values() if not a.per_layer and a.name.startswith("ln_final")]
        inside = [a for a in ACTIVATIONS.values() if a.per_layer]
        for activation in before:
            self._add(activation.name, None, activation.hook)
        for layer in range(spec.n_layers):
            for activation in inside:
                self._add(activation.name, layer, activation.hook.format(layer=layer))
        for activation in after:
            self._add(activation.name, None, activation.hook)

    def _add(self, name: str, layer: int | None, hook: str) -> None:
        # attn.hook_out and mlp.hook_out say something of their own only in front of a post-norm.
        if missing_because(self.spec, name) is None:
            self.by_name[hook] = HookPoint(name=hook, key=(name, layer))

    def __iter__(self) -> Iterator[HookPoint]:
        return iter(self.by_name.values())

    def __getitem__(self, name: str) -> HookPoint:
        """Returns a hook point; raises :class:`UnknownActivationError` with the nearest names."""
        if name not in self.by_name:
            for activation in ACTIVATIONS.values():
                pattern = re.escape(activation.hook).replace(r"\{layer\}", r"\d+")
                reason = missing_because(self.spec, activation.name)
                if reason and re.fullmatch(pattern, name):
                    raise UnknownActivationError(f"there is no hook point {name!r} in this model: {reason}")
            raise UnknownActivationError(f"there is no hook point {name!r}{nearest(name, self.by_name)}")
        return self.by_name[name]

    def matching(self, names: NameFilter, flags: set[str]) -> list[HookPoint]:
        """Returns the hook points of a filter, in the order of the forward.

        A name, or a list of names, gets what it says. A predicate (or ``None``: everything) gets the large ones of
        ``GATED`` if their flag is set, if it matches nothing else, or if it means them: if it no longer matches once
        something is appended to the name, as with ``name in wanted`` or ``name.endswith("hook_result")``.
        """
        if isinstance(names, str):
            return [self[names]]
        if names is not None and not callable(names):
            wanted = {self[name].name for name in names}
            return [point for point in self if point.name in wanted]
        if names is None:
            return [point for point in self if self._is_usual(point, flags)]
        matched = [point for point in self if names(point.name)]
        meant = [point for point in matched if self._is_usual(point, flags) or not names(point.name + "?")]
        return meant or matched

    def _is_usual(self, point: HookPoint, flags: set[str]) -> bool:
        site = point.key[0]
        if site in ("attn_raw", "mlp_raw"):
            return self.spec.post_norms
        if site == "attn_in" and self.spec.attention.group > 1:
            return False  # query heads that share keys cannot have it replaced
        return site not in GATED or GATED[site] in flags

    def hooked(self) -> list[HookPoint]:
        """Those that have functions."""
        return [point for point in self if point.fwd_hooks or point.bwd_hooks]

    def taps(
        self, capture: Iterable[HookPoint] = (), gradients: dict[str, Tensor] | None = None, *, root: bool = True
    ) -> Taps:
        """Builds the taps of one forward: the hooks, and what shall be kept.

        With ``gradients`` the gradients of what is kept will be put there. ``root=False`` leaves out the beginning of
        the recording of gradients.
        """
        edits: dict[Key, list[Replaces]] = {}
        if root and torch.is_grad_enabled():
            edits = {("embed", None): [Root()], ("pos_embed", None): [Root()]}
            if self.spec.position.kind != "learned":
                del edits["pos_embed", None]
        for point in self.hooked():
            edits.setdefault(point.key, []).append(point)
        capture = list(capture)
        if gradients is not None:
            for point in capture:
                edits.setdefault(point.key, []).append(KeepGradient(point.name, gradients))
        return Taps(wanted=frozenset(point.key for point in capture), edits=edits)
