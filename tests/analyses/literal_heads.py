"""Heads' contributions to the logits written out in float64: every tensor that the package avoids."""

import torch

from fastinterp.model import Taps, final_logits, forward
from fastinterp.model.norms import center, norm_scale

# Layer norm with biases, unprocessed; grouped queries; softcaps and post-norms; parallel blocks; one head, one layer.
MODELS = [
    "gpt2",
    "llama-gqa",
    "gpt2-one-head-one-layer",
    "gemma2-softcaps",
    "gemma3-mixed-rope",
    "gpt-neox",
    "qwen2-gqa-tied",
]


def literal(model, prompt):
    """``raw`` logits [pos, d_vocab] in front of the softcap, contributions [pos, layer, head, d_vocab], and ``z``."""
    spec, weights = model.spec, model.weights
    names = ["z", "ln1_post_scale"] if spec.post_norms else ["z"]
    taps = Taps.of(spec.n_layers, capture=names)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        resid = forward(spec, weights, tokens, taps=taps)
        logits = final_logits(spec, weights, resid)[0].double()
    if spec.final_softcap is not None:
        logits = spec.final_softcap * torch.atanh(logits / spec.final_softcap)
    scale = norm_scale(spec.norm, resid)[0]
    z = torch.stack([taps.values["z", layer][0] for layer in range(spec.n_layers)], 1)
    return logits, torch.stack([through(model, taps, scale, z, layer) for layer in range(spec.n_layers)], 1), z


def through(model, taps, scale, z, layer):
    """What the heads of a layer, given all layers' ``z``, add to the logits: [pos, head, d_vocab]."""
    spec, weights = model.spec, model.weights
    w = weights.blocks[layer]
    result = torch.einsum("phe,hed->phd", z[:, layer].double(), w.W_O.double())
    if w.ln1_post is not None:
        result = center(spec.norm, result) / taps.values["ln1_post_scale", layer][0][:, None].double()
        result = result if w.ln1_post.w is None else result * w.ln1_post.w
    result = center(spec.norm, result) / scale[:, None].double()
    result = result if weights.ln_final.w is None else result * weights.ln_final.w
    return result @ weights.W_U.double()


def capped(model, logits):
    cap = model.spec.final_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
