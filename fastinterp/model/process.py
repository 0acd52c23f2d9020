"""Weight processing that leaves every logit difference and probability as it is, and makes components readable.

The steps and their order are those of TransformerLens's compatibility mode; the arithmetic is float64.

1. Fold norms: the norm's weight and bias go into the matrices that read its output. For layer norm these matrices are
   also centred over ``d_model``, since a layer norm's output never has a mean.
2. Centre writing weights (layer norm only): everything written to the residual loses its mean, which no reader sees.
3. Centre the unembedding over the vocabulary: softmax does not see a constant.
4. Fold value biases: attention rows sum to 1, so ``b_V`` adds the constant ``b_V W_O`` to the output.
"""

from jaxtyping import Float
from torch import Tensor

from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights, NormWeights, Weights

FOLDED = NormWeights()


def process_weights(spec: ModelSpec, weights: Weights) -> Weights:
    """Returns the processed weights, in the dtype of the given ones.

    Memory: one block at a time is held in float64, and the unembedding.
    """
    dtype = weights.W_E.dtype
    layer_norm = spec.norm.kind == "layer"

    def stored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def written(tensor: Tensor | None) -> Tensor | None:
        return stored(_centered(tensor)) if layer_norm else tensor

    W_U, b_U = _fold_norm(weights.ln_final, weights.W_U, weights.b_U, center=layer_norm)
    W_E = written(weights.W_E)
    processed_W_U = stored(_centered(W_U))
    assert W_E is not None
    assert processed_W_U is not None
    return Weights(
        W_E=W_E,
        W_pos=written(weights.W_pos),
        blocks=tuple(_process_block(spec, block) for block in weights.blocks),
        ln_final=FOLDED,
        W_U=processed_W_U,
        b_U=stored(_centered(b_U)),
    )


def _process_block(spec: ModelSpec, block: BlockWeights) -> BlockWeights:
    dtype = block.W_QKV.dtype
    layer_norm = spec.norm.kind == "layer"
    W_QKV, b_QKV = _fold_norm(block.ln1, block.W_QKV, block.b_QKV, center=layer_norm)
    W_gate_in, b_gate_in = _fold_norm(block.ln2, block.W_gate_in, block.b_gate_in, center=layer_norm)
    W_O, b_O = block.W_O.double(), block.b_O
    W_out, b_out = block.W_out.double(), block.b_out
    if layer_norm:
        W_O, W_out, b_O, b_out = (
            W_O - W_O.mean(-1, keepdim=True),
            _writer(W_out),
            _centered(b_O),
            _centered(b_out),
        )
    if b_QKV is not None:
        values = spec.attention.n_kv_heads * spec.d_head
        b_V = b_QKV[-values:].view(spec.attention.n_kv_heads, spec.d_head).repeat_interleave(spec.attention.group, 0)
        constant = (b_V.flatten() @ W_O.flatten(0, 1)).to(dtype)
        if bool((b_V != 0).any()):
            b_O = constant if b_O is None else b_O.double() + constant
            b_O = _centered(b_O) if layer_norm else b_O
        b_QKV = b_QKV.clone()
        b_QKV[-values:] = 0
    return BlockWeights(
        ln1=FOLDED,
        W_QKV=W_QKV.to(dtype),
        b_QKV=None if b_QKV is None else b_QKV.to(dtype),
        W_O=W_O.to(dtype),
        b_O=None if b_O is None else b_O.to(dtype),
        ln2=FOLDED,
        W_gate_in=W_gate_in.to(dtype),
        b_gate_in=None if b_gate_in is None else b_gate_in.to(dtype),
        W_out=W_out.to(dtype),
        b_out=None if b_out is None else b_out.to(dtype),
    )


def _fold_norm(
    norm: NormWeights, W: Float[Tensor, "d_model n_out"], b: Float[Tensor, " n_out"] | None, *, center: bool
) -> tuple[Float[Tensor, "d_model n_out"], Float[Tensor, " n_out"] | None]:
    """Returns float64 ``W'``, ``b'`` with ``norm_without_affine(x) W' + b' = norm(x) W + b``."""
    W = W.double()
    b = None if b is None else b.double()
    if norm.b is not None:
        shift = norm.b.double() @ W
        b = shift if b is None else b + shift
    if norm.w is not None:
        W = norm.w.double()[:, None] * W
    return (W - W.mean(0, keepdim=True) if center else W), b


def _writer(W: Float[Tensor, "n_in d_model"]) -> Float[Tensor, "n_in d_model"]:
    return W - W.mean(-1, keepdim=True)


def _centered(x: Tensor | None) -> Tensor | None:
    """Subtracts, in float64, the mean over the last axis."""
    if x is None:
        return None
    x = x.double()
    return x - x.mean(-1, keepdim=True)
