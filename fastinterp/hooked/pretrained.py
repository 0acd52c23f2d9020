"""Loading with the options that TransformerLens has for its weight processing."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from fastinterp.errors import OptionError, UnsupportedConfigError, nearest
from fastinterp.load import load
from fastinterp.model.model import Model, Processing
from fastinterp.model.process import Folding, process_weights
from fastinterp.model.weights import BlockWeights

# What notebooks call models, where it is not the hub's name.
ALIASES = {
    "gpt2-small": "gpt2",
    "gpt-neo-125M": "EleutherAI/gpt-neo-125M",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "tiny-stories-2L-33M": "roneneldan/TinyStories-2Layers-33M",
    "gemma-2b": "google/gemma-2b",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-3-1b-pt": "google/gemma-3-1b-pt",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "phi-2": "microsoft/phi-2",
}
IGNORED = ("n_devices", "move_to_device", "default_padding_side", "local_files_only")


def load_pretrained(
    model_name: Any,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    tokenizer: Any | None = None,
    revision: str | None = None,
    hf_model: Any | None = None,
    **others: Any,
) -> Model:
    """Loads a model and processes its weights as asked; see ``HookedTransformer.from_pretrained``."""
    _check_others(others)
    chosen = torch_dtype if dtype is None else dtype
    chosen = torch.float32 if chosen is None else chosen
    if isinstance(chosen, str):
        named = getattr(torch, chosen.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise OptionError(f"dtype={chosen!r} is not a dtype: give 'float32', 'bfloat16', 'float16' or 'float64'")
        chosen = named
    source = hf_model if hf_model is not None else model_name
    if isinstance(source, str):
        source = ALIASES.get(source, source)
    exact = torch.float64 if chosen == torch.float64 else torch.float32
    model = load(source, tokenizer=tokenizer, device=device, dtype=exact, processing="none", revision=revision)
    folding = Folding(
        fold_ln=fold_ln,
        center_writing_weights=center_writing_weights,
        center_unembed=center_unembed,
        fold_value_biases=fold_value_biases,
    )
    with torch.no_grad():
        weights = process_weights(model.spec, model.weights, folding)
        if refactor_factored_attn_matrices:
            weights = dataclasses.replace(weights, blocks=tuple(_factored(model, block) for block in weights.blocks))
    processing: Processing = "none" if folding.nothing else "transformer_lens" if folding.everything else "custom"
    if refactor_factored_attn_matrices:
        processing = "custom"
    origin = dataclasses.replace(model.origin, processing=processing)
    return dataclasses.replace(model, weights=weights, origin=origin).to(dtype=chosen)


def _check_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in IGNORED:
            known = list(inspect.signature(load_pretrained).parameters)
            raise OptionError(f"from_pretrained has no option {name!r}{nearest(name, known)}")
        if name == "n_devices" and value != 1:
            raise OptionError("n_devices=1 is what there is: a model lives on one device")
        if name == "default_padding_side" and value != "right":
            raise OptionError('padding is on the right: leave out default_padding_side, or give "right"')


def _factored(model: Model, block: BlockWeights) -> BlockWeights:
    """Rotates every head's queries and keys, and values and outputs, into the singular vectors of their product.

    Scores, ``result`` and everything behind them stay what they are; ``q``, ``k``, ``v`` and ``z`` are given in
    coordinates ordered by how much they matter.
    """
    attention = model.spec.attention
    if model.spec.position.kind == "rotary" or attention.qk_norm or attention.group > 1:
        raise UnsupportedConfigError(
            "refactor_factored_attn_matrices works for models without rotary positions, query norms and shared KV "
            "heads: leave it out (the logits are the same)"
        )
    queries = _with_bias(block.W_Q, block.b_Q)
    keys = _with_bias(block.W_K, block.b_K)
    values = _with_bias(block.W_V, block.b_V)
    U, S, Vh = _svd_of_product(queries, keys.transpose(1, 2))
    root = S.sqrt()[:, None, :]
    queries, keys = U * root, Vh.transpose(1, 2) * root
    outer, S, Vh = _svd_of_product(values, block.W_O.double())
    values, W_O = outer, S[:, :, None] * Vh
    joined = torch.cat([part.transpose(0, 1).flatten(1) for part in (queries, keys, values)], dim=-1)
    dtype = block.W_QKV.dtype
    return dataclasses.replace(
        block, W_QKV=joined[:-1].to(dtype), b_QKV=joined[-1].to(dtype), W_O=W_O.to(dtype).contiguous()
    )


def _with_bias(W: Tensor, b: Tensor | None) -> Tensor:
    """Returns ``[head, d_model + 1, d_head]``: the bias as the weight of one more input, which is 1."""
    row = W.new_zeros(len(W), W.shape[-1]) if b is None else b
    return torch.cat([W, row[:, None, :]], dim=1).double()


def _svd_of_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the singular value decomposition of ``A @ B``, which has rank ``d_head``, without forming it."""
    Q_A, R_A = torch.linalg.qr(A)
    Q_B, R_B = torch.linalg.qr(B.transpose(1, 2))
    U, S, Vh = torch.linalg.svd(R_A @ R_B.transpose(1, 2), full_matrices=False)
    return Q_A @ U, S, Vh @ Q_B.transpose(1, 2)
