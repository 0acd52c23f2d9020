"""Turns a checkpoint into ``Weights`` by a family's table; every key of the checkpoint must find its place."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastinterp.errors import CheckpointKeyError, nearest
from fastinterp.families.base import Family, Source
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights, NormWeights, Weights, check_shapes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMS = ("ln1", "ln1_post", "ln2", "ln2_post", "ln_final")


def build_weights(
    family: Family,
    spec: ModelSpec,
    checkpoint: Mapping[str, Tensor],
    flags: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Weights:
    """Returns the weights in ``dtype`` on ``device``; ``flags`` is the config, which says which biases there are.

    Raises :class:`CheckpointKeyError` for keys that the table does not know, for keys that it needs and the checkpoint
    lacks, and for wrong shapes. Nothing is dropped silently.
    """
    reader = _Reader(family, spec, checkpoint, flags, dtype=dtype, device=device)
    try:
        top = {name: reader.take(source) for name, source in family.model.items()}
        if top.get("W_U") is None:
            # Tied to the embedding as it is stored: a scaled embedding is scaled on the way in alone.
            W_E = reader.take(dataclasses.replace(family.model["W_E"], times=None))
            assert W_E is not None
            top["W_U"] = W_E.t().contiguous()
        blocks = []
        for layer in range(spec.n_layers):
            part = {name: reader.take(source, layer) for name, source in family.block.items()}
            W_O = part.pop("W_O")
            assert W_O is not None
            if W_O.shape[0] != spec.n_heads * spec.d_head:
                raise CheckpointKeyError(
                    f"the attention output matrix of layer {layer} has {W_O.shape[0]} inputs, the config asks for "
                    f"{spec.n_heads} heads x {spec.d_head}"
                )
            W_O = W_O.view(spec.n_heads, spec.d_head, -1)
            blocks.append(BlockWeights(W_O=W_O, **_grouped(part)))  # type: ignore[arg-type]
    finally:
        reader.release()
    reader.refuse_unread()
    weights = Weights(blocks=tuple(blocks), **({"W_pos": None, "b_U": None} | _grouped(top)))  # type: ignore[arg-type]
    check_shapes(spec, weights)
    weights.check_finite()
    return weights


class _Reader:
    """Takes tensors out of a checkpoint and remembers which."""

    def __init__(
        self,
        family: Family,
        spec: ModelSpec,
        checkpoint: Mapping[str, Tensor],
        flags: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.family, self.spec, self.checkpoint, self.flags = family, spec, checkpoint, flags
        self.dtype, self.device = dtype, device
        # A bare checkpoint leaves out the prefix of the body; heads (lm_head) never have it.
        self.keys: dict[str, str] = {}
        for key in checkpoint:
            bare = key.removeprefix(family.prefix)
            if bare in self.keys:
                raise CheckpointKeyError(
                    f"the checkpoint has both {key!r} and {self.keys[bare]!r}: which one is meant?"
                )
            self.keys[bare] = key
        self.unread = set(self.keys)

    def take(self, source: Source, layer: int | None = None) -> Tensor | None:
        parts = []
        for template in source.keys:
            name, optional, flag = template.partition("?")
            if flag and not self.flags.get(flag):
                continue
            key = name.format(layer=layer)
            if key in self.keys:
                stored = self.checkpoint[self.keys[key]].detach()
                if stored.dtype not in DTYPES:
                    raise CheckpointKeyError(
                        f"{key!r} has dtype {stored.dtype}: quantised and complex checkpoints are not supported, load "
                        "an unquantised one"
                    )
                parts.append(self._arranged(source, key, stored.to(device=self.device, dtype=self.dtype)))
                self.unread.discard(key)
            elif flag or not optional:
                numbers = re.findall(r"\d+", key)
                alike = [other for other in self.unread if re.findall(r"\d+", other) == numbers]
                raise CheckpointKeyError(f"the checkpoint lacks {key!r}{nearest(key, alike)}")
        if not parts:
            return None
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0].contiguous().clone()

    def _arranged(self, source: Source, key: str, tensor: Tensor) -> Tensor:
        """Brings a stored tensor into the layout of ``Weights``."""
        if source.layout == "per_head_qkv":
            heads = self.spec.n_heads
            if tensor.shape[0] != 3 * heads * self.spec.d_head:
                raise CheckpointKeyError(
                    f"{key!r} has {tensor.shape[0]} rows, the config asks for 3 x {heads} heads x {self.spec.d_head}"
                )
            tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if source.layout != "as_is":
            tensor = tensor.t() if tensor.ndim == 2 else tensor
        if source.skip:
            tensor = tensor[source.skip :]
        if source.times is not None:
            tensor = tensor * source.times(self.spec)
        return tensor + source.plus if source.plus else tensor

    def release(self) -> None:
        """Drops the checkpoint, so that its memory can go."""
        self.checkpoint = {}

    def refuse_unread(self) -> None:
        ignored = [re.compile(pattern) for pattern in self.family.ignored]
        unknown = sorted(key for key in self.unread if not any(pattern.fullmatch(key) for pattern in ignored))
        if unknown:
            raise CheckpointKeyError(
                f"the checkpoint has {len(unknown)} keys that the {self.family.name} family does not know: "
                + ", ".join(repr(key) for key in unknown[:8])
            )


def _grouped(parts: Mapping[str, Tensor | None]) -> dict[str, Tensor | NormWeights | None]:
    """Gathers ``ln1.w`` and ``ln1.b`` into one ``ln1``."""
    grouped: dict[str, Tensor | NormWeights | None] = {k: v for k, v in parts.items() if "." not in k}
    for norm in NORMS:
        if f"{norm}.w" in parts:
            grouped[norm] = NormWeights(w=parts[f"{norm}.w"], b=parts.get(f"{norm}.b"))
    return grouped
