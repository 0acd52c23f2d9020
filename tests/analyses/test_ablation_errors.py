"""What ablation refuses, all of it before the model runs."""

import numpy as np
import pytest

import fastinterp
from fastinterp.analyses import ablate, circuit
from fastinterp.errors import AnswerTokenError, MetricError, OptionError, PromptError, PromptPairError, SiteRangeError
from fastinterp.prompts import PromptSet

PROMPTS = PromptSet.of([[3, 5, 7], [4, 6, 8, 9], [3, 6, 7]], answer=[[1], [2], [3]], wrong=[[4], [5], [6]])
SHORT = PromptSet.of([[3, 5, 7]])

REFUSED = [
    (SiteRangeError, "head 4", {"units": [(0, 4)]}),
    (SiteRangeError, "layer 3", {"units": [(3, 0)]}),
    (SiteRangeError, "layer 7", {"units": ["MLP7"]}),
    (SiteRangeError, "layer 3", {"units": [["MLP0", "ATTN3"]]}),
    (SiteRangeError, "neuron 192", {"units": ["L0N192"]}),
    (OptionError, "units", {"units": "head"}),
    (OptionError, "units", {"units": []}),
    (OptionError, "units", {"units": (0, 1)}),
    (OptionError, "units", {"units": [[]]}),
    (OptionError, "units", {"units": ["L0"]}),
    (OptionError, "units has 'L0': give heads, mlps, .* separated by commas", {"units": "L0H1, L0"}),
    (SiteRangeError, "head 4", {"units": "L0H1+L0H4"}),
    (OptionError, r"units has \('L0H1', 'L0H1'\)", {"units": ["L0H1+L0H1"]}),
    (OptionError, "units", {"units": [["L0H1", (0, 1)]]}),
    (OptionError, "units", {"units": [(0, 1.5)]}),
    (OptionError, "mode", {"mode": "zeros"}),
    (OptionError, "mode", {"mode": ()}),
    (OptionError, "mode", {"mode": ("mean", "mean")}),
    (MetricError, "did you mean 'loss'", {"metric": "los"}),
    (MetricError, "no metric", {"metric": ("loss", "none")}),
    (OptionError, "metric", {"metric": ()}),
    (OptionError, "metric", {"metric": ("loss", "loss")}),
    (OptionError, "effect", {"effect": "indirect"}),
    (OptionError, "mean_over", {"mode": "mean", "mean_over": "prompt"}),
    (OptionError, "pos", {"pos": "last"}),
    (OptionError, "pos", {"pos": slice(None, None, 2)}),
    (OptionError, "pos", {"pos": True}),
    (OptionError, "pos", {"pos": 1.0}),
    (OptionError, "pos", {"pos": [[0], [1], [2]]}),
    (OptionError, "2 positions for 3 prompts", {"pos": [0, 1]}),
    (OptionError, "4 positions for 3 prompts", {"pos": np.array([0, 1, 0, 0])}),
    (SiteRangeError, "pos=3 is out of range for prompt [02] .* 3 tokens", {"pos": 3}),
    (SiteRangeError, "pos=-4 is out of range for prompt [02]", {"pos": -4}),
    (SiteRangeError, "pos=3 is out of range for prompt 2", {"pos": [0, 3, 3]}),
    (SiteRangeError, "pos=9 is out of range", {"pos": np.int64(9)}),
    (SiteRangeError, "out of range for prompt [02]", {"pos": slice(3, None)}),
    (OptionError, "no token at position 3, and .* has 4", {"mode": "mean", "mean_over": "pos", "reference": SHORT}),
    (PromptError, "no other prompt has 4 tokens like prompt 1", {"mode": "resample"}),
    (PromptError, "no other prompt has 4 tokens like prompt 1", {"mode": ("mean", "resample")}),
]  # fmt: skip


@pytest.fixture
def idle(zoo, monkeypatch):
    """A model that may not run."""

    def run(*args, **kwargs):
        raise AssertionError("the model ran")

    for where in ("replacements.run_blocks", "measuring.forward", "measuring.forward_at", "written.forward"):
        monkeypatch.setattr(f"fastinterp.analyses.{where}", run)
    monkeypatch.setattr("fastinterp.analyses.measuring.sweep", run)
    return zoo.model("gpt2")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("error", "message", "options"), REFUSED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("effect", ["total", "direct"])
def test_options_that_cannot_be(idle, error, message, options, effect):
    with pytest.raises(error, match=message):
        ablate(idle, PROMPTS, **{"effect": effect} | options)


def test_a_single_prompt_is_no_mean_by_position(idle, zoo):
    one = PromptSet.of([[3, 5, 7]], answer=[[1]], wrong=[[4]])
    for options in ({"units": "heads"}, {"units": "mlps", "effect": "direct"}):
        with pytest.raises(OptionError, match=r"its own mean by position.* reference=.* mean_over='tokens'"):
            ablate(idle, one, mode="mean", mean_over="pos", **options)
    with pytest.raises(OptionError, match="its own mean by position"):
        circuit(idle, one, [(0, 1)], mode="mean", mean_over="pos")
    with pytest.raises(OptionError, match="its own mean by position"):
        fastinterp.plan(idle, one, analysis="ablation", mode="mean", mean_over="pos")


@pytest.mark.usefixtures("without_shape_checks")
def test_the_model_would_run_otherwise(idle):
    for options in ({}, {"effect": "direct"}, {"mode": "mean"}, {"pos": np.int64(1)}, {"pos": [0, 3, -1]}):
        with pytest.raises(AssertionError, match="the model ran"):
            ablate(idle, PROMPTS, **options)


def test_prompts_without_what_is_needed(idle):
    bare = PromptSet.of(PROMPTS.prompts)
    for metric in ("logit_diff", ("loss", "prob"), ("kl", "loss", "top1")):
        with pytest.raises(AnswerTokenError, match="answer"):
            ablate(idle, bare, metric=metric)
        with pytest.raises(MetricError, match="answer"):
            ablate(idle, bare.tokenize(idle), metric=metric)
    half = PromptSet.of(PROMPTS.prompts, answer=PROMPTS.answer)
    with pytest.raises(AnswerTokenError, match="wrong"):
        ablate(idle, half, metric=("logit", "logit_diff"))
    with pytest.raises(PromptPairError, match="corrupt"):
        ablate(idle, PromptSet.of([[1, 2], [3, 4]], corrupt=[[1, 2], [3]]), metric="kl", mode="resample")


@pytest.mark.usefixtures("without_shape_checks")
def test_a_position_as_a_numpy_integer_is_a_position(zoo):
    model = zoo.model("gpt2")
    one, other = (ablate(model, PROMPTS, pos=pos) for pos in (1, np.int64(1)))
    assert one.identical(other)
    assert one["logit_diff_zero_total"].attrs["ablated_pos"] == "1"
