"""Weight processing that leaves every logit difference and probability as it is, and makes components readable.

The steps and their order are those of TransformerLens's compatibility mode; the arithmetic is float64.

1. Fold norms: the norm's weight and bias go into the matrices that read its output. For layer norm these matrices are
   also centred over ``d_model``, since a layer norm's output never has a mean.
2. Centre writing weights (layer norm only): everything written to the residual loses its mean, which no reader sees.
3. Centre the unembedding over the vocabulary: softmax does not see a constant. A softcap would, so not under one.
4. Fold value biases: attention rows sum to 1, so ``b_V`` adds the constant ``b_V W_O`` to the output.
"""

import dataclasses
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights, NormWeights, Weights

FOLDED = NormWeights()


@dataclass(frozen=True, kw_only=True)
class Folding:
    """Which steps are done, under the names that TransformerLens gives them."""

    fold_ln: bool = True
    center_writing_weights: bool = True
    center_unembed: bool = True
    fold_value_biases: bool = True

    @property
    def everything(self) -> bool:
        """Whether all steps are done."""
        return all(dataclasses.astuple(self))

    @property
    def nothing(self) -> bool:
        """Whether no step is done."""
        return not any(dataclasses.astuple(self))


EVERYTHING = Folding()


def process_weights(spec: ModelSpec, weights: Weights, folding: Folding = EVERYTHING) -> Weights:
    """Returns the processed weights, in the dtype of the given ones.

    Memory: one block at a time is held in float64, and the unembedding.
    """
    dtype = weights.W_E.dtype
    layer_norm = spec.norm.kind == "layer"

    def written(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not (layer_norm and folding.center_writing_weights):
            return tensor
        return centered(tensor.double()).to(dtype)

    ln_final, W_U, b_U = weights.ln_final, weights.W_U.double(), _double(weights.b_U)
    if folding.fold_ln:
        W_U, b_U = _fold_norm(ln_final, W_U, b_U, center=layer_norm)
        ln_final = FOLDED
    if folding.center_unembed and spec.final_softcap is None:
        W_U, b_U = centered(W_U), None if b_U is None else centered(b_U)
    W_E = written(weights.W_E)
    assert W_E is not None
    return Weights(
        W_E=W_E,
        W_pos=written(weights.W_pos),
        blocks=tuple(_process_block(spec, block, folding) for block in weights.blocks),
        ln_final=ln_final,
        W_U=W_U.to(dtype),
        b_U=None if b_U is None else b_U.to(dtype),
    )


def _process_block(spec: ModelSpec, block: BlockWeights, folding: Folding) -> BlockWeights:
    dtype = block.W_QKV.dtype
    layer_norm = spec.norm.kind == "layer"
    ln1, W_QKV, b_QKV = block.ln1, block.W_QKV.double(), _double(block.b_QKV)
    ln2, W_gate_in, b_gate_in = block.ln2, block.W_gate_in.double(), _double(block.b_gate_in)
    W_O, b_O = block.W_O.double(), _double(block.b_O)
    W_out, b_out = block.W_out.double(), _double(block.b_out)
    if folding.fold_ln:
        W_QKV, b_QKV = _fold_norm(ln1, W_QKV, b_QKV, center=layer_norm)
        W_gate_in, b_gate_in = _fold_norm(ln2, W_gate_in, b_gate_in, center=layer_norm)
        ln1 = ln2 = FOLDED
    if layer_norm and folding.center_writing_weights:
        W_O, W_out = centered(W_O), centered(W_out)
        b_O = None if b_O is None else centered(b_O)
        b_out = None if b_out is None else centered(b_out)
    if b_QKV is not None and folding.fold_value_biases:
        attention = spec.attention
        values = attention.n_kv_heads * attention.d_head
        b_V = b_QKV[-values:].view(attention.n_kv_heads, attention.d_head)
        if bool((b_V != 0).any()):
            constant = b_V.repeat_interleave(attention.group, 0).flatten() @ W_O.flatten(0, 1)
            b_O = constant if b_O is None else b_O + constant
        b_QKV = b_QKV.clone()
        b_QKV[-values:] = 0
    return dataclasses.replace(
        block,
        ln1=ln1,
        W_QKV=W_QKV.to(dtype),
        b_QKV=None if b_QKV is None else b_QKV.to(dtype),
        W_O=W_O.to(dtype),
        b_O=None if b_O is None else b_O.to(dtype),
        ln2=ln2,
        W_gate_in=W_gate_in.to(dtype),
        b_gate_in=None if b_gate_in is None else b_gate_in.to(dtype),
        W_out=W_out.to(dtype),
        b_out=None if b_out is None else b_out.to(dtype),
    )


def _fold_norm(
    norm: NormWeights, W: Float[Tensor, "d_model n_out"], b: Float[Tensor, " n_out"] | None, *, center: bool
) -> tuple[Float[Tensor, "d_model n_out"], Float[Tensor, " n_out"] | None]:
    """Returns float64 ``W'``, ``b'`` with ``norm_without_affine(x) W' + b' = norm(x) W + b``."""
    if norm.b is not None:
        shift = norm.b.double() @ W
        b = shift if b is None else b + shift
    if norm.w is not None:
        W = norm.w.double()[:, None] * W
    return (W - W.mean(0, keepdim=True) if center else W), b


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def centered(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Subtracts the mean over the last axis."""
    return x - x.mean(-1, keepdim=True)
