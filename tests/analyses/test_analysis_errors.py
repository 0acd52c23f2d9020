"""Bad input to an analysis: refused, with the culprit and the remedy in the message; never a number."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from fastinterp.analyses import (
    Ablation,
    DirectLogitAttribution,
    LogitLens,
    ablate,
    direct_logit_attribution,
    logit_lens,
)
from fastinterp.analyses.base import check_finite
from fastinterp.errors import (
    AnswerTokenError,
    MetricError,
    NonFiniteError,
    OptionError,
    PromptError,
    PromptTooLongError,
    SiteRangeError,
    TokenRangeError,
)
from fastinterp.prompts import Batch, PromptSet

pytestmark = pytest.mark.usefixtures("without_shape_checks")

ANALYSES = [direct_logit_attribution, logit_lens, ablate]


@pytest.fixture
def model(zoo):
    return zoo.model("gpt2")


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize(("metric", "suggestion"), [("logit_dif", "'logit_diff'"), ("log_prob", "'logprob'")])
def test_unknown_metrics(model, prompt_set, analysis, metric, suggestion):
    known = "logit_diff, logit, logprob, prob, rank, top1, kl, loss"
    expected = f"there is no metric '{metric}': choose from {known}; did you mean .*{suggestion}"
    with pytest.raises(MetricError, match=expected):
        analysis(model, prompt_set, metric=metric)


@pytest.mark.parametrize("metric", ["logprob", "loss"])
def test_attribution_of_a_metric_that_is_not_linear(model, prompt_set, metric):
    with pytest.raises(MetricError, match=f"linear.*'logit_diff' or 'logit', not '{metric}'"):
        direct_logit_attribution(model, prompt_set, metric=metric)


@pytest.mark.parametrize(
    ("unit", "message"), [("heads", "did you mean 'head'"), ("mlp", "choose from 'head'"), (None, "'head'")]
)
def test_unknown_units_of_attribution(model, prompt_set, unit, message):
    with pytest.raises(OptionError, match=f"unit={unit!r} is not known.*{message}"):
        direct_logit_attribution(model, prompt_set, unit=unit)


def test_unknown_units_and_modes_of_ablation(model, prompt_set):
    with pytest.raises(OptionError, match=r"units='head' is not known: choose from 'heads'"):
        ablate(model, prompt_set, units="head")
    with pytest.raises(OptionError, match=r"mode='zeros' is not known: choose from 'zero'.*did you mean 'zero'"):
        ablate(model, prompt_set, mode="zeros")


def test_unknown_scales_of_the_lens(model, prompt_set):
    with pytest.raises(OptionError, match=r"scale='clean' is not known: choose from 'own', 'frozen'"):
        logit_lens(model, prompt_set, scale="clean")


@pytest.mark.parametrize("analysis", [direct_logit_attribution, logit_lens])
@pytest.mark.parametrize("pos", ["last", 1.0, True, None, [0]], ids=repr)
def test_positions_that_are_none(model, prompt_set, analysis, pos):
    with pytest.raises(OptionError, match=r"is not a position: give an integer \(-1 is the last token\) or 'all'"):
        analysis(model, prompt_set, pos=pos)


def test_the_lens_of_the_loss_takes_no_position(model, prompt_set):
    with pytest.raises(MetricError, match=r"'loss' has a value at every position: leave out pos=2"):
        logit_lens(model, prompt_set, metric="loss", pos=2)


@pytest.mark.parametrize("analysis", [direct_logit_attribution, logit_lens])
@pytest.mark.parametrize("pos", [1, 12, -2, -13, 1000])
def test_positions_that_a_prompt_does_not_have(model, prompt_set, analysis, pos):
    # The prompt of one token, row 1, has none of these.
    with pytest.raises(
        SiteRangeError, match=rf"pos={pos} is out of range for prompt \d+ \(id '\d+'\), which has \d+ tok"
    ):
        analysis(model, prompt_set, pos=pos)


@pytest.mark.parametrize("analysis", [direct_logit_attribution, logit_lens])
def test_the_prompt_that_lacks_a_position_is_named(model, analysis):
    prompts = PromptSet.of([[1, 2, 3], [4, 5], [6, 7, 8]], answer=[1, 1, 1], wrong=[2, 2, 2], ids=["a", "b", "c"])
    with pytest.raises(SiteRangeError, match=r"pos=2 is out of range for prompt 1 \(id 'b'\), which has 2 tokens"):
        analysis(model, prompts, pos=2)


# Answers ----------------------------------------------------------------------------------------------------------


LACKING = pytest.mark.parametrize(
    ("columns", "metric", "lacking"),
    [
        ({}, "logit_diff", "answer"),
        ({}, "logit", "answer"),
        ({"wrong": 3}, "logit", "answer"),
        ({"answer": 3}, "logit_diff", "wrong"),
    ],
    ids=str,
)


@pytest.mark.parametrize("analysis", ANALYSES)
@LACKING
def test_columns_that_are_missing(model, token_prompts, analysis, columns, metric, lacking):
    prompts = PromptSet.of(token_prompts, **{name: [token] * 7 for name, token in columns.items()})
    with pytest.raises(AnswerTokenError, match=rf"column '{lacking}'.*PromptSet.of\({lacking}=\[\.\.\.\]\)"):
        analysis(model, prompts, metric=metric)


@pytest.mark.parametrize("analysis", ANALYSES)
@LACKING
def test_columns_that_are_missing_after_tokenising(model, token_prompts, analysis, columns, metric, lacking):
    prompts = PromptSet.of(token_prompts, **{name: [token] * 7 for name, token in columns.items()})
    with pytest.raises(
        MetricError, match=rf"'{metric}' needs the column '{lacking}'.*PromptSet.of\(.*{lacking}=\.\.\."
    ):
        analysis(model, prompts.tokenize(model), metric=metric)


@pytest.mark.parametrize("analysis", [logit_lens, ablate])
def test_a_log_probability_needs_an_answer(model, token_prompts, analysis):
    with pytest.raises(AnswerTokenError, match="column 'answer'"):
        analysis(model, PromptSet.of(token_prompts), metric="logprob")


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("column", ["answer", "wrong"])
def test_single_answers_that_are_missing(model, analysis, column):
    columns = {"answer": [1, 2, 3], "wrong": [4, 5, 6]}
    columns[column][1] = None
    prompts = PromptSet.of([[1], [2], [3]], ids=["a", "b", "c"], **columns)
    with pytest.raises(AnswerTokenError, match=rf"prompt 1 \(id 'b'\) has no {column}: give one"):
        analysis(model, prompts)
    with pytest.raises(MetricError, match=rf"'{column}' for every prompt.*missing for 1, first prompt 1 \(id 'b'\)"):
        analysis(model, prompts.tokenize(model))


def test_a_metric_that_does_not_need_the_missing_answer(model):
    prompts = PromptSet.of([[1, 9], [2, 9]], answer=[1, 2], wrong=[3, None])
    assert np.isfinite(direct_logit_attribution(model, prompts, metric="logit")).all()


@pytest.mark.parametrize("analysis", ANALYSES)
def test_no_prompt_is_left(model, analysis):
    tokenized = PromptSet.of([[1, 400]], answer=[1], wrong=[2]).tokenize(model, bad_prompts="reject")
    with pytest.raises(MetricError, match="no prompt is left to analyse"):
        analysis(model, tokenized)


# Overflow ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflowing(zoo):
    """Finite weights whose logits are not: products with the unembedding exceed float32."""
    model = zoo.model("llama-gqa")
    W_U = model.weights.W_U * 1e38
    assert bool(torch.isfinite(W_U).all())
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, W_U=W_U))


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("metric", ["logit_diff", "logit", "logprob", "loss"])
def test_results_that_overflow_are_refused(overflowing, prompt_set, analysis, metric):
    if analysis is direct_logit_attribution and metric in ("logprob", "loss"):
        metric = "logit"
    with pytest.raises(NonFiniteError, match=r"not finite for prompt \d+ \(id '\d+'\).*dtype=torch.float32"):
        analysis(overflowing, prompt_set, metric=metric)


def batch_of(n_tokens):
    n_tokens = torch.tensor(n_tokens)
    return Batch(
        indices=np.arange(len(n_tokens)),
        ids=tuple("abcdefg"[: len(n_tokens)]),
        tokens=torch.zeros(len(n_tokens), int(n_tokens.max()), dtype=torch.int64),
        n_tokens=n_tokens,
        answer=None,
        wrong=None,
        corrupt=None,
    )


def refuse_non_finite(model, analysis, name, values, batch):
    """Checks values as if the analysis had given them for this batch."""
    (field,) = [field for field in analysis.fields(model.spec, batch.tokens.shape[1]) if field.name == name]
    assert values.shape == (len(batch), *field.shape)
    check_finite(field, analysis.metric, values, batch)


def test_nan_at_a_layer_is_not_taken_for_padding(model):
    # Three layers and prompts of at most three tokens: the axes are equally long.
    values = torch.zeros(2, 3, 4)
    refuse_non_finite(model, DirectLogitAttribution(), "direct_effect", values, batch_of([3, 2]))
    values[1, 2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"prompt 1 \(id 'b'\)"):
        refuse_non_finite(model, DirectLogitAttribution(), "direct_effect", values, batch_of([3, 2]))


def test_nan_at_padding_is_no_overflow(model):
    values = torch.zeros(2, 3, 7)
    values[1, 2] = torch.nan
    lens = LogitLens(pos="all")
    refuse_non_finite(model, lens, "logit_diff_lens", values, batch_of([3, 2]))
    values[1, 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"prompt 1 \(id 'b'\)"):
        refuse_non_finite(model, lens, "logit_diff_lens", values, batch_of([3, 2]))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["loss_clean", "loss_zero_total", "loss_lens"])
def test_losses_that_are_not_finite_are_refused(model, name, value):
    # Entry 1 of the first prompt predicts its last token, so it has to be a number; there is none at last tokens.
    losses = torch.tensor([[0.0, value, torch.nan], [0.0, torch.nan, torch.nan]])
    analysis = LogitLens(metric_name="loss") if name == "loss_lens" else Ablation(metric_names=("loss",))
    (field,) = [field for field in analysis.fields(model.spec, 3) if field.name == name]
    values = losses.view(2, 3, *[1] * (len(field.shape) - 1)).repeat(1, 1, *field.shape[1:])
    if value == 0.0:
        refuse_non_finite(model, analysis, name, values, batch_of([3, 2]))
        return
    with pytest.raises(NonFiniteError, match=r"prompt 0 \(id 'a'\)"):
        refuse_non_finite(model, analysis, name, values, batch_of([3, 2]))


def test_residuals_that_overflow_are_refused(zoo, prompt_set):
    # The square of the residual exceeds float32 although the residual does not: its scale would be infinite, and
    # everything divided by it zero.
    model = zoo.model("llama-gqa")
    weights = dataclasses.replace(model.weights, W_E=model.weights.W_E * 1e25)
    huge = dataclasses.replace(model, weights=weights)
    for analysis in ANALYSES:
        with pytest.raises(NonFiniteError, match=r"not finite for prompt \d+ \(id '\d+'\)"):
            analysis(huge, prompt_set)


# Prompts of another model -----------------------------------------------------------------------------------------


def other_model(model, **changes):
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, **changes))


@pytest.mark.parametrize("analysis", ANALYSES)
def test_prompts_that_were_tokenised_for_another_model(model, prompt_set, analysis):
    tokens = prompt_set.tokenize(model)
    with pytest.raises(PromptTooLongError, match=r"up to 12 tokens.*context is 11.*prompts.tokenize\(model\)"):
        analysis(other_model(model, n_ctx=11), tokens)
    with pytest.raises(TokenRangeError, match=r"vocabulary has 100.*prompts.tokenize\(model\)"):
        analysis(other_model(model, d_vocab=100), tokens)
    with pytest.raises(PromptError, match=r"another tokenizer.*prompts.tokenize\(model\)"):
        analysis(dataclasses.replace(model, tokenizer=None), tokens)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_an_autocast_around_the_call_changes_nothing(model, prompt_set, analysis):
    plain = analysis(model, prompt_set)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped = analysis(model, prompt_set)
    xr.testing.assert_equal(plain, wrapped)


def test_positions_may_be_numpy_integers(model, prompt_set):
    expected = direct_logit_attribution(model, prompt_set, pos=0)
    assert np.array_equal(direct_logit_attribution(model, prompt_set, pos=np.int64(0)).values, expected.values)
