"""Total effects of ablation, every mode and unit, against loops of hooks; what must change nothing; what is refused."""

import pytest
import torch

from fastinterp.analyses import ablate
from fastinterp.model import products
from fastinterp.prompts import PromptSet
from tests.analyses.literal_ablation import METRICS, Hooked, Loop, Tapped, assert_equal, units_of

MODES = ("zero", "mean", "resample")
KINDS = ("heads", "mlps", "attns", "layers", "some neurons", "list")
LENGTHS = (5, 2, 9, 6)
# Some lengths of the reference set are beyond those of the prompts, and it begins with other tokens.
REFERENCE_LENGTHS = (11, 3, 9, 4, 9)
LIST = [(0, 0), ["MLP0", "L0H0"], "ATTN0", ["L0N5", (0, 0), "L0N7"], "L0N3"]
LIST_PARTS = [
    [("z", 0, 0)],
    [("mlp_out", 0, None), ("z", 0, 0)],
    [("attn_out", 0, None)],
    [("post", 0, 5), ("z", 0, 0), ("post", 0, 7)],
    [("post", 0, 3)],
]


def ids(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 379, (n,), generator=generator).tolist() for n in lengths]


PROMPTS, CORRUPT, REFERENCE = ids(LENGTHS, 21), ids(LENGTHS, 22), ids(REFERENCE_LENGTHS, 23)
ANSWER = [[5], [7, 300], [8], [9, 10, 11]]
WRONG = [[16], [17], [19, 20], [21]]
SET = PromptSet.of(PROMPTS, answer=ANSWER, wrong=WRONG, corrupt=CORRUPT)
REFERENCE_SET = PromptSet.of(REFERENCE)
POSITIONS = ("all", -1, 1, slice(1, None), slice(-2, None), (3, -1, 0, 2), "each")


def loop_of(run, spec, *, reference=False):
    return Loop(run, spec, PROMPTS, ANSWER, WRONG, corrupt=CORRUPT, reference=REFERENCE if reference else None)


def given(kind, spec):
    """What ``ablate`` is given, and the same as parts."""
    if kind == "some neurons":
        parts = units_of(spec, "neurons")[:: spec.mlp.d_mlp // 2 + 1]
        return [f"L{layer}N{n}" for [(_, layer, n)] in parts], parts
    return (LIST, LIST_PARTS) if kind == "list" else (kind, units_of(spec, kind))


def spread(units):
    """Of many units the first, the last, and some in between."""
    return units if len(units) <= 6 else units[:: len(units) // 5] + units[-1:]


def sample(kind, pos):
    """Which units to compare. Where every position is edited by itself, every other one: of a list, also the sets."""
    if pos != "each":
        return spread
    return lambda units: spread(units)[kind == "list" :: 2]


TAPPED = [
    "gpt2",
    "llama-gqa",
    "mistral-window",
    "gemma2-softcaps",
    "gemma3-mixed-rope",
    "gpt-neo",
    "gpt-neox",
    "gptj",
    "phi",
    "qwen3-gqa",
    "opt",
    "stablelm-gqa",
    "gemma2-one-head-one-layer-no-softcaps",
    "gpt-neox-one-head-one-layer-tied",
]
# Every kind of unit with every choice of positions; means and processing take turns.
CASES = [
    (
        TAPPED[i % len(TAPPED)],
        kind,
        pos,
        ("tokens", "pos")[(i // 2) % 2],
        bool(i % 2),
        ("transformer_lens", "none")[(i // 3) % 2],
    )
    for i, (kind, pos) in enumerate((kind, pos) for pos in POSITIONS for kind in KINDS)
]


@pytest.mark.parametrize(("name", "kind", "pos", "mean_over", "other", "processing"), CASES, ids=str)
def test_every_mode_and_metric_equals_single_runs_in_float64(zoo, name, kind, pos, mean_over, other, processing):
    model = zoo.model(name, dtype=torch.float64, processing=processing)
    units, parts = given(kind, model.spec)
    reference = REFERENCE_SET if other else None
    data = ablate(
        model, SET, units=units, mode=MODES, metric=METRICS, pos=pos, mean_over=mean_over, reference=reference
    )
    loop = loop_of(Tapped(model), model.spec, reference=other)
    largest = assert_equal(
        data,
        loop,
        parts,
        modes=MODES,
        pos=pos,
        effects=["total"],
        tolerance=1e-9,
        mean_over=mean_over,
        pick=sample(kind, pos),
    )
    assert largest["logit_diff"] > 0.05
    # The last token's loss is that of no token of the prompt.
    assert largest["loss"] == 0 if pos == -1 else largest["loss"] > 0.05
    assert largest["kl"] > 1e-4


HOOKED = [
    ("gpt2", "heads", "all", "tokens"),
    ("gpt2-one-head-one-layer", "neurons", -1, "pos"),
    ("gpt2-one-head-one-layer", "list", "each", "tokens"),
    ("llama-gqa", "some neurons", "all", "pos"),
    ("llama-gqa", "layers", "each", "tokens"),
    ("llama-gqa", "heads", (3, -1, 0, 2), "pos"),
    ("llama-one-head-one-layer", "heads", "each", "pos"),
    ("mistral-window", "attns", slice(1, None), "pos"),
    ("gemma2-softcaps", "mlps", "all", "pos"),
    ("gpt-neo", "layers", 1, "tokens"),
    ("gpt-neox", "attns", "all", "tokens"),
    ("gptj", "list", slice(-2, None), "pos"),
    ("phi", "layers", -1, "tokens"),
    ("qwen3-gqa", "list", "all", "tokens"),
]
HOOKED_EITHER_WAY = [(*case, False) for case in HOOKED] + [(*case, True) for case in HOOKED[:2] + HOOKED[3::2]]


@pytest.mark.parametrize(("name", "kind", "pos", "mean_over", "small"), HOOKED_EITHER_WAY, ids=str)
def test_every_mode_and_metric_equals_hooks_of_transformer_lens(zoo, monkeypatch, name, kind, pos, mean_over, small):
    if small:
        # Otherwise large matrices alone go through oneDNN, which these models have not.
        monkeypatch.setattr(products, "_ONEDNN_NUMBERS", 1)
    model = zoo.model(name)
    units, parts = given(kind, model.spec)
    data = ablate(
        model, SET, units=units, mode=MODES, metric=METRICS, pos=pos, mean_over=mean_over, reference=REFERENCE_SET
    )
    loop = loop_of(Hooked(zoo.bridge(name)), model.spec, reference=True)
    largest = assert_equal(
        data,
        loop,
        parts,
        modes=MODES,
        pos=pos,
        effects=["total"],
        tolerance=1e-4,
        mean_over=mean_over,
        pick=spread,
    )
    assert largest["logit_diff"] > 0.05


@pytest.mark.parametrize("bos", [True, False])
def test_texts_with_and_without_bos_equal_hooks(zoo, bos):
    texts = ["When John and Mary went to the shops", "The fox", "Tom gave it to Sarah, and then Tom"]
    corrupt = ["When Tom and Mary went to the shops", "The dog", "Bob gave it to Sarah, and then Bob"]
    model = zoo.model("gpt2")
    columns = {"answer": [" Mary", " John", " Tom"], "wrong": [" John", " Mary", " Bob"], "corrupt": corrupt}
    tokens = PromptSet.of(texts, **columns).tokenize(model, prepend_bos=bos)
    data = ablate(model, tokens, mode=MODES, metric=METRICS)
    prompts, other = ([ids.tolist() for ids in rows] for rows in (tokens.tokens, tokens.corrupt))
    assert all((prompt[0] == model.tokenizer.bos_token_id) == bos for prompt in prompts)
    answer, wrong = ([[int(i) for i in row if i >= 0] for row in rows] for rows in (tokens.answer, tokens.wrong))
    loop = Loop(Hooked(zoo.bridge("gpt2")), model.spec, prompts, answer, wrong, corrupt=other)
    assert_equal(
        data,
        loop,
        units_of(model.spec, "heads"),
        modes=MODES,
        pos="all",
        effects=["total"],
        tolerance=1e-4,
        pick=lambda units: units[::4],
    )
