"""Models, runs and a comparison for the tests of caches."""

import torch

from fastinterp.model import Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS

DERIVED = {"result", "attn_in", "q_input", "k_input", "v_input", "mlp_in"}
TOKENS = torch.randint(1, 379, (3, 7), generator=torch.Generator().manual_seed(2))
# Layer norm with biases; grouped queries; biases everywhere; parallel blocks; post-norms; a norm before q and k.
MODELS = [
    "gpt2",
    "llama-gqa",
    "llama-biases-mqa-head-dim",
    "gpt-neox",
    "gptj",
    "gemma2-softcaps",
    "gemma3-mha-biases-final-softcap-untied",
    "opt",
]
ORACLES = [(name, processing) for name in ("gpt2", "llama-gqa") for processing in ("transformer_lens", "none")]


def run(model, tokens=TOKENS, also=()):
    """The logits and a dictionary of everything that is not derived."""
    names = [name for name in ACTIVATIONS if missing_because(model.spec, name) is None]
    names = [name for name in names if name not in DERIVED or name in also]
    taps = Taps.of(model.spec.n_layers, capture=names)
    logits = final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens, taps=taps), taps=taps)
    return logits, {ACTIVATIONS[name].hook.format(layer=layer): value for (name, layer), value in taps.values.items()}


def close(ours, theirs, atol=1e-9):
    assert ours.shape == theirs.shape
    assert ours.numel() == 0 or float((ours - theirs).abs().max()) <= atol
