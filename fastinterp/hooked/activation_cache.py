"""``ActivationCache``: the activations of one run by TransformerLens's names, and what can be computed from them."""

import re
from collections import Counter
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastinterp.errors import OptionError, UnknownActivationError, nearest
from fastinterp.hooked.activations import Activations
from fastinterp.hooked.contributions import SliceInput, is_integer, model_of, take
from fastinterp.hooked.decomposition import ResidualDecomposition
from fastinterp.hooked.lens import LogitLens, logit_lens
from fastinterp.hooked.utils import get_act_name, to_numpy
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS, Activation, check_index

BY_HOOK = {activation.hook: activation for activation in ACTIVATIONS.values()}
GRADIENT = "_grad"
# What is had without being stored, and from which stored activations.
SOURCES = {
    "result": ("z",),
    "attn_in": ("resid_pre",),
    "q_input": ("resid_pre",),
    "k_input": ("resid_pre",),
    "v_input": ("resid_pre",),
    "mlp_in": ("resid_mid", "resid_pre"),
}


class ActivationCache(ResidualDecomposition):
    """The activations of one run, by hook name; a plain dictionary of them will do.

    ``cache["blocks.3.attn.hook_z"]``, ``cache["z", 3]``, ``cache["z", -1]``, ``cache["scale", 3, "ln1"]`` and
    ``cache["ln1_scale", 3]`` all work. ``result``, ``attn_in``, ``q_input``, ``k_input``, ``v_input`` and ``mlp_in``
    need not be stored: they are computed from ``z``, or are views of the residual stream, when they are asked for.
    That holds for activations; of gradients in a cache, read only what was stored. ``in``, ``len``, iteration and
    ``keys()`` are about what was asked for, under its full name.

    About half of a full cache is not held but computed at every reading, from the rest of it:
    normalised residuals, rotated queries and keys, scores and patterns, ``post``, and the residual stream between
    every eighth layer. To change one of these in the cache, assign it: ``cache.cache_dict[name] = changed``.

    ``model`` is a ``HookedTransformer`` or a :class:`~fastinterp.model.model.Model`; without one (``None``) only
    look-ups work, and negative layers do not. ``has_batch_dim=False`` says that the batch axis was left out.

    Example:
        >>> logits, cache = model.run_with_cache("When John and Mary went")                     # doctest: +SKIP
        >>> heads, labels = cache.stack_head_results(pos_slice=-1, return_labels=True)          # doctest: +SKIP
        >>> cache.logit_attrs(heads, " Mary", " John", pos_slice=-1)                            # doctest: +SKIP
    """

    def __init__(
        self, cache_dict: "Mapping[str, Tensor] | ActivationCache", model: Any = None, has_batch_dim: bool = True
    ) -> None:
        """Takes over a dictionary from hook names to tensors (or another cache), without copies of the tensors."""
        entries: Mapping[str, Tensor] = cache_dict.cache_dict if isinstance(cache_dict, ActivationCache) else cache_dict
        self.cache_dict: Activations = entries.copy() if isinstance(entries, Activations) else Activations(entries)
        self.model = model
        self.has_batch_dim = has_batch_dim and bool(getattr(cache_dict, "has_batch_dim", True))

    # Looking things up ----------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        """Returns an activation by hook name, short name, or ``(name, layer)`` or ``(name, layer, layer_type)``.

        Raises:
            UnknownActivationError: it is not stored and cannot be computed from what is; with the nearest names.
            SiteRangeError: a layer that the model does not have.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        name = self._full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        activation, layer = _parse(name)
        if activation is not None and layer is not None:
            derived = self._derive(activation.name, layer)
            if derived is not None:
                return derived
        raise UnknownActivationError(self._why_not(key, name, activation, layer))

    def stored(self, name: str, layer: int | None = None) -> Tensor | None:
        """Returns an activation by its name in ``fastinterp.names``, or ``None`` if it is not stored."""
        return self.cache_dict.get(ACTIVATIONS[name].hook.format(layer=layer))

    def _full_name(self, key: Any) -> str:
        name, layer, layer_type, *more = (key, None, None) if isinstance(key, str) else (*key, None, None)
        if not isinstance(name, str) or any(part is not None for part in more):
            raise UnknownActivationError(
                f"{key!r} names no activation: give 'name', (name, layer) or ('scale', 3, 'ln1')"
            )
        if isinstance(layer, int | np.integer) and (layer < 0 or self.model is not None):
            layer = check_index("layer", int(layer), self.spec.n_layers)
        base = name.removesuffix(GRADIENT)
        known = ACTIVATIONS.get(base)
        if known is not None and known.per_layer == (layer is not None):
            base, suffix = known.hook.format(layer=layer), name[len(base) :]
            return base + suffix
        return get_act_name(base, layer, layer_type) + name[len(base) :]

    def _derive(self, name: str, layer: int) -> Tensor | None:
        """What follows from stored activations, or ``None``; views where it can be."""
        if name not in SOURCES or self.model is None or layer >= self.spec.n_layers:
            return None
        if name == "mlp_in":
            return self.stored("resid_pre" if self.spec.parallel else "resid_mid", layer)
        if name == "result":
            z = self.stored("z", layer)
            if z is None:
                return None
            wide = torch.promote_types(z.dtype, model_of(self.model).dtype)
            W_O = self._weights(layer).W_O.to(device=z.device, dtype=wide)
            return torch.einsum("...he,hed->...hd", z.to(wide), W_O)
        resid = self.stored("resid_pre", layer)
        if resid is None:
            return None
        attention = self.spec.attention
        copies = attention.n_kv_heads if name in ("k_input", "v_input") else attention.n_heads
        return resid.unsqueeze(-2).expand(*resid.shape[:-1], copies, resid.shape[-1])

    def _why_not(self, key: Any, name: str, activation: Activation | None, layer: int | None) -> str:
        asked = f"{key!r}" if key == name else f"{key!r} ({name})"
        if activation is not None and self.model is not None:
            reason = missing_because(self.spec, activation.name)
            if reason:
                return f"there is no {asked} in a {self.spec.family} model: {reason}"
        message = f"this cache has no {asked}"
        if activation is not None:
            wanted = SOURCES.get(activation.name)
            if wanted:
                hooks = " or ".join(ACTIVATIONS[source].hook.format(layer=layer) for source in wanted)
                return f"{message}, nor {hooks}, which it could be computed from: run_with_cache must keep one of them"
            return f"{message}: run_with_cache must keep it (names_filter), the cache has {len(self)} activations"
        bare = key if isinstance(key, str) else key[0]
        known = ACTIVATIONS.get(bare)
        if known is not None and known.per_layer:
            return f"{message}: say of which layer, such as cache[{bare!r}, 0]"
        return message + (nearest(name, self.cache_dict) or nearest(bare, ACTIVATIONS))

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def keys(self) -> KeysView[str]:
        """Returns the full names of all activations."""
        return self.cache_dict.keys()

    def values(self) -> Any:
        """Returns the tensors."""
        return self.cache_dict.values()

    def items(self) -> Any:
        """Returns the pairs of full name and tensor."""
        return self.cache_dict.items()

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    @property
    def has_embed(self) -> bool:
        """Whether the token embedding is stored."""
        return self.stored("embed") is not None

    @property
    def has_pos_embed(self) -> bool:
        """Whether the position embedding is stored."""
        return self.stored("pos_embed") is not None

    def logit_lens(self, **options: Any) -> LogitLens:
        """Returns the logits that every layer's residual stream would have, if it were the last.

        Equal to ``accumulated_resid(apply_ln=True) @ W_U + b_U``, softcap included: the last entry has the model's own
        logits. Only one entry's logits are held beside what is returned, so with ``top_k`` little memory is needed.

        Args:
            options: ``layers`` (entries, ``None`` is all), ``incl_mid``, ``positions=-1`` and ``batch_slice`` (as
                ``pos_slice`` elsewhere), ``return_type="logits"`` (or ``"log_probs"``, ``"probs"``),
                ``apply_ln=True``, and one of ``top_k``, ``vocab`` (ids) and ``targets`` (one or several strings or
                ids for all rows, or a tensor with an id for each) for fewer tokens than all.

        Returns:
            ``values [entry, batch, (pos,) token]``, ``labels``, ``entropy``, ``top_ids``, ``target_ranks`` and so on.

        Example:
            >>> cache.logit_lens(targets=[" Mary"]).target_ranks[:, 0, 0]                       # doctest: +SKIP
        """
        return logit_lens(self, **options)

    # Changing all of it ---------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str, move_model: bool = False) -> "ActivationCache":
        """Moves everything to ``device`` and returns the cache itself; ``move_model`` moves the model too."""
        self.cache_dict = self.cache_dict.to(device)
        if move_model:
            self.model = self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Calls ``torch.set_grad_enabled(mode)``, which acts on everything; ``with torch.no_grad():`` is better."""
        torch.set_grad_enabled(mode)

    def compute_head_results(self) -> None:
        """Stores ``result`` of every layer. Nothing needs it: ``cache["result", layer]`` works without."""
        for layer in range(self.spec.n_layers):
            if self._result(layer) is None:
                hook = ACTIVATIONS["result"].hook.format(layer=layer)
                self.cache_dict.pop(hook, None)
                self.cache_dict[hook] = self["result", layer]

    def remove_batch_dim(self) -> "ActivationCache":
        """Drops the batch axis of everything, which must be one prompt, and returns the cache itself."""
        if self.has_batch_dim:
            if self._size(0) not in (1, None):
                raise OptionError(
                    f"the cache has {self._size(0)} prompts: take one first, with apply_slice_to_batch_dim([0])"
                )
            self.cache_dict = self.cache_dict.mapped(
                lambda _, value: value[0] if value.ndim and len(value) == 1 else value
            )
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> "ActivationCache":
        """Returns a cache of some prompts (views where it can be); one integer drops the batch axis.

        Raises:
            OptionError: the batch axis was dropped before.
            SiteRangeError: a prompt that is not there.
        """
        if not self.has_batch_dim:
            raise OptionError("this cache has no batch axis: it was removed, or one prompt was taken already")
        n = self._size(0)
        # What has another size is the same for all prompts.
        some = self.cache_dict.mapped(
            lambda _, value: take(value, batch_slice, 0, "prompt") if value.ndim and len(value) == n else value
        )
        return ActivationCache(some, self.model, has_batch_dim=not is_integer(batch_slice))

    def at_positions(self, pos_slice: SliceInput) -> "ActivationCache":
        """Returns a cache of some positions, as copies, so that the others can be freed.

        Of patterns and scores these are the query positions; keys stay as they are. The axis stays, also for one
        integer. Raises :class:`SiteRangeError` for a position that is not there.
        """
        if is_integer(pos_slice):
            pos_slice = torch.as_tensor(pos_slice).reshape(1)
        some = {}
        for name, value in self.cache_dict.items():
            dims = self._dims(name, value)
            axes = [axis for axis, dim in enumerate(dims) if dim in ("pos", "query_pos")]
            if not axes:
                raise OptionError(
                    f"{name!r} has shape {tuple(value.shape)}, and it is not known which axis is the position: leave "
                    "it out (del cache.cache_dict[name])"
                )
            part = take(value, pos_slice, axes[0])
            shared = part.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            some[name] = part.clone() if shared else part
        return ActivationCache(some, self.model, has_batch_dim=self.has_batch_dim)

    def _size(self, axis: int) -> int | None:
        """The size that most activations have along one of the first two axes, leaving out axes of heads."""
        sizes = Counter(
            value.shape[axis]
            for name, value in self.cache_dict.held().items()
            if value.ndim > axis and (axis < self.has_batch_dim or "query_pos" not in _axes(name))
        )
        return sizes.most_common(1)[0][0] if sizes else None

    def _dims(self, name: str, value: Tensor) -> tuple[str, ...]:
        """The names of an activation's axes; of one that is not known, batch and pos by their size."""
        dims = _axes(name)
        dims = dims if self.has_batch_dim else dims[1:]
        if dims and len(dims) == value.ndim:
            return dims
        guesses = (["batch"] if self.has_batch_dim else []) + ["pos"]
        found = [f"{name}.axis_{axis}" for axis in range(value.ndim)]
        for axis, guess in enumerate(guesses[: value.ndim]):
            if value.shape[axis] == self._size(axis):
                found[axis] = guess
        return tuple(found)

    # On disk --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes everything that is stored as one zarr group, an array per hook name, one after the other.

        ``xarray.open_zarr(path)`` reads it, with named axes. bfloat16 is written as float32 and comes back as it was.
        A path that exists is replaced only with ``overwrite=True``, once the new one is complete.

        Raises:
            StoreError: something is there, or the folder cannot be written.
        """
        from fastinterp.store.activations import StoredActivation, write_activations

        arrays = (
            StoredActivation(
                name=name,
                dims=self._dims(name, value),
                values=to_numpy(value),
                torch_dtype=str(value.dtype).removeprefix("torch."),
            )
            for name, value in self.cache_dict.items()
        )
        attrs: dict[str, Any] = {"has_batch_dim": self.has_batch_dim}
        if self.model is not None:
            origin = model_of(self.model).origin
            attrs |= {"family": self.spec.family, "model": origin.source, "processing": origin.processing}
        write_activations(path, arrays, attrs, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "ActivationCache":
        """Returns what :meth:`save` wrote, on the CPU; ``model`` is the one that it came from.

        Raises:
            StoreError: nothing is there, or something else.
        """
        from fastinterp.store.activations import read_activations

        attrs, arrays = read_activations(path)
        values = {array.name: torch.from_numpy(array.values).to(getattr(torch, array.torch_dtype)) for array in arrays}
        return cls(values, model, has_batch_dim=bool(attrs["has_batch_dim"]))


def _parse(name: str) -> tuple[Activation | None, int | None]:
    """Returns the activation and layer of a full hook name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return BY_HOOK.get(name), None
    return BY_HOOK.get(f"blocks.{{layer}}.{match[2]}"), int(match[1])


def _axes(name: str) -> tuple[str, ...]:
    activation, _ = _parse(name.removesuffix(GRADIENT))
    return () if activation is None else activation.dims
