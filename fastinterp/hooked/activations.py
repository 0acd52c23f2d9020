"""The dictionary of a cache, in which what follows from other activations is computed when it is read.

A run makes more activations than it has information in: the normalised residual is the residual over its scale, the
pattern is the softmax of what queries and keys say, ``post`` is the activation function of ``pre``, and the residual
stream is a sum of what was written to it. Half of a full cache need not be held. Everything here repeats the forward's
own operations; all but scores and patterns, which fused attention does not form, come out bit for bit as it had them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinterp.model.attention import attention_scores, make_frame, ready
from fastinterp.model.intervene import Key
from fastinterp.model.mlp import activate
from fastinterp.model.norms import center, divide
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import Weights
from fastinterp.names import ACTIVATIONS

# The residual stream is held in front of every eighth layer; between those it is summed up.
CHECKPOINT_LAYERS = 8

Recipe = Callable[["Recording"], Tensor]
Read = Callable[..., Tensor]


class Recording:
    """The dictionary as a recipe gets it: derives what it is asked for, and notes which tensors that came from."""

    def __init__(self, entries: Mapping[str, Tensor | Recipe], sources: list[Tensor]) -> None:
        """Reads ``entries``, and appends to ``sources``."""
        self._entries, self.sources = entries, sources

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor; raises ``KeyError``."""
        entry = self._entries[name]
        if not isinstance(entry, Tensor):
            return entry(self)
        self.sources.append(entry)
        return entry


class Memo(NamedTuple):
    """What was derived last, if it was read more than once: a copy, and copies of what it came from."""

    name: str
    value: Tensor | None = None
    sources: tuple[tuple[Tensor, Tensor], ...] = ()

    def read(self, name: str) -> Tensor | None:
        """Returns a copy of the value, if it has this name and its sources are what they were."""
        if self.name != name or self.value is None:
            return None
        same = all(torch.equal(now, then) for now, then in self.sources)
        return self.value.clone() if same else None


class Activations(MutableMapping[str, Tensor]):
    """A dictionary of tensors by hook name, some of which are computed anew at every reading.

    A derived tensor belongs to whoever read it: to change it in the cache, assign it. Assigning or deleting anything
    that is held first computes all that might follow from it, so that nothing else changes with it.

    Of a pattern or scores that are read several times in a row, a copy is kept until something else is read: reading
    head by head costs a copy each time, not the attention. Once what it came from is edited, it is computed anew.
    """

    def __init__(self, entries: Mapping[str, Tensor | Recipe]) -> None:
        """Takes over tensors, and recipes that get this dictionary and return a tensor."""
        self._entries: dict[str, Tensor | Recipe] = dict(entries)
        self._memo: Memo | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor; raises ``KeyError``."""
        entry = self._entries[name]
        if isinstance(entry, Tensor):
            return entry
        memo = self._memo
        found = None if memo is None else memo.read(name)
        if found is not None:
            return found
        recording = Recording(self._entries, [])
        value = entry(recording)
        again = memo is not None and memo.name == name
        # Worth it where there is more in the result than in what it came from: patterns and scores of long prompts.
        large = value.numel() > sum(source.numel() for source in recording.sources)
        if again and large and not value.requires_grad:
            sources = tuple((source, source.clone()) for source in recording.sources)
            self._memo = Memo(name, value.clone(), sources)
        else:
            self._memo = Memo(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Holds a tensor under this name."""
        if isinstance(self._entries.get(name), Tensor):
            self._hold_all()
        self._entries[name] = value
        self._memo = None

    def __delitem__(self, name: str) -> None:
        """Forgets this name; raises ``KeyError``."""
        if isinstance(self._entries[name], Tensor):
            self._hold_all()
        del self._entries[name]
        self._memo = None

    def __repr__(self) -> str:
        return f"Activations({list(self)})"

    def __reduce__(self) -> Any:
        """Copied deeply, or written by ``torch.save``, it is a plain dictionary."""
        return dict, (dict(self),)

    def _hold_all(self) -> None:
        self._entries = dict(self)

    def held(self) -> dict[str, Tensor]:
        """Returns what is not derived."""
        return {name: entry for name, entry in self._entries.items() if isinstance(entry, Tensor)}

    def copy(self) -> "Activations":
        """Returns another dictionary of the same tensors."""
        return Activations(self._entries)

    def to(self, device: torch.device | str) -> "Activations":
        """Returns it with what is held on ``device``, where the rest will then be derived."""
        return Activations(
            {name: entry.to(device) if isinstance(entry, Tensor) else entry for name, entry in self._entries.items()}
        )

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Activations":
        """Returns it with ``change(name, tensor)`` for each tensor: now of what is held, later of what is derived."""

        def later(name: str, reading: Recording) -> Tensor:
            return change(name, Recording(self._entries, reading.sources)[name])

        return Activations(
            {
                name: change(name, entry) if isinstance(entry, Tensor) else partial(later, name)
                for name, entry in self._entries.items()
            }
        )


def sources(spec: ModelSpec, name: str, layer: int | None, first_layer: int) -> tuple[Key, ...]:
    """Returns which activations this one follows from; none if it has to be held."""
    before = "resid_pre" if spec.parallel else "resid_mid"
    match name:
        case "ln1_normalized":
            keys: tuple[Key, ...] = (("resid_pre", layer), ("ln1_scale", layer))
        case "ln2_normalized":
            keys = ((before, layer), ("ln2_scale", layer))
        case "ln1_post_normalized":
            keys = (("attn_raw", layer), ("ln1_post_scale", layer))
        case "ln2_post_normalized":
            keys = (("mlp_raw", layer), ("ln2_post_scale", layer))
        case "ln_final_normalized":
            keys = (("resid_post", spec.n_layers - 1), ("ln_final_scale", None))
        case "rot_q":
            keys = (("q", layer),)
        case "rot_k":
            keys = (("k", layer),)
        case "attn_scores" | "pattern":
            keys = (("q", layer), ("k", layer))
        case "post":
            keys = (("pre", layer),) if spec.mlp.kind == "plain" else (("pre", layer), ("pre_linear", layer))
        case "resid_mid":
            keys = (("resid_pre", layer), ("attn_out", layer))
        case "resid_post":
            keys = ((before, layer), ("mlp_out", layer))
            keys += (("attn_out", layer),) if spec.parallel else ()
        case "resid_pre" if layer is not None and layer > first_layer and layer % CHECKPOINT_LAYERS:
            keys = (("resid_post", layer - 1),)
        case _:
            keys = ()
    return keys


# What stands between an activation and its sources, and must not have been replaced.
BETWEEN = {
    "attn_scores": ("rot_q", "rot_k"),
    "pattern": ("rot_q", "rot_k", "attn_scores"),
    "ln2_normalized": ("mlp_in",),
}


def derivable(
    spec: ModelSpec, wanted: Iterable[Key], hooked: Collection[Key], first_layer: int, end_layer: int
) -> set[Key]:
    """Returns which of the wanted activations need not be kept, as they follow from others among them.

    Of a run of the layers from ``first_layer`` to before ``end_layer``, in which the ``hooked`` ones may be replaced.
    """
    reached = {key for key in wanted if key[1] is None or first_layer <= key[1] < end_layer}
    found: set[Key] = set()
    for name, layer in reached:
        needed = sources(spec, name, layer, first_layer)
        replaced = any((site, layer) in hooked for site in (name, *BETWEEN.get(name, ())))
        if needed and reached.issuperset(needed) and not replaced:
            found.add((name, layer))
    return found


def recipe(spec: ModelSpec, weights: Weights, name: str, layer: int | None) -> Recipe:
    """Returns how to compute a derivable activation from the others of its cache."""

    def compute(activations: Recording) -> Tensor:
        def read(source: str, at: int | None = layer) -> Tensor:
            return activations[ACTIVATIONS[source].hook.format(layer=at)]

        if name == "ln_final_normalized":
            return divide(center(spec.norm, read("resid_post", spec.n_layers - 1)), read("ln_final_scale"))
        assert layer is not None
        return _compute(spec, weights, name, layer, read)

    return compute


def _compute(spec: ModelSpec, weights: Weights, name: str, layer: int, read: Read) -> Tensor:
    before = "resid_pre" if spec.parallel else "resid_mid"
    match name:
        case "resid_pre":
            return read("resid_post", layer - 1)
        case "resid_mid":
            return read("resid_pre") + read("attn_out")
        case "resid_post" if spec.parallel:
            return read("resid_pre") + read("attn_out") + read("mlp_out")
        case "resid_post":
            return read("resid_mid") + read("mlp_out")
        case "post":
            gate = activate(spec.mlp.activation, read("pre"))
            return gate if spec.mlp.kind == "plain" else gate * read("pre_linear")
        case "rot_q" | "rot_k" | "attn_scores" | "pattern":
            return _attention(spec, weights, name, layer, read)
    normed = {"ln1": "resid_pre", "ln2": before, "ln1_post": "attn_raw", "ln2_post": "mlp_raw"}
    norm = name.removesuffix("_normalized")
    return divide(center(spec.norm, read(normed[norm])), read(f"{norm}_scale"))


def _attention(spec: ModelSpec, weights: Weights, name: str, layer: int, read: Read) -> Tensor:
    block = weights.blocks[layer]

    def placed(site: str, norm_weights: Tensor | None) -> Tensor:
        x = read(site)
        frame = make_frame(spec, x.shape[1], device=x.device, dtype=x.dtype)
        return ready(spec, layer, x, None if norm_weights is None else norm_weights.to(x.device), frame)

    if name == "rot_k":
        return placed("k", block.k_norm)
    q = placed("q", block.q_norm)
    if name == "rot_q":
        return q
    mask = make_frame(spec, q.shape[1], device=q.device, dtype=q.dtype).mask(spec.attention.window[layer])
    scores = attention_scores(spec, q.transpose(1, 2), placed("k", block.k_norm).transpose(1, 2), mask)
    return scores if name == "attn_scores" else scores.softmax(-1)
