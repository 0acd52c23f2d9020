"""What a plan says, checks and estimates before anything is written."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastinterp
from fastinterp.engine.run import compute_block
from fastinterp.errors import AnswerTokenError, MetricError, OptionError, PromptFileError
from fastinterp.prompts import PromptSet


def test_a_plan_describes_itself(zoo, prompts):
    model = zoo.model("gpt2")
    planned = fastinterp.plan(model, prompts, analysis="dla,ablation", ablation_limit=5, batch_tokens=64)
    described = planned.to_dict()
    assert json.loads(json.dumps(described)) == described
    assert described["prompts"] == described["kept"] == 22
    assert described["rejected"] == []
    assert (
        described["blocks"] * described["block_prompts"] >= 22 > (described["blocks"] - 1) * described["block_prompts"]
    )
    assert described["longest_prompt_tokens"] == max(map(len, model.encode(list(prompts.prompts))))
    assert described["analyses"] == {
        "dla": {"prompts": 22, "batch_tokens": 64},
        "ablation": {"prompts": 5, "batch_tokens": 64},
    }
    arrays = {array["name"]: array for array in described["arrays"]}
    assert arrays["direct_effect"] == {
        "name": "direct_effect",
        "dims": ["prompt", "layer", "head"],
        "shape": [22, 3, 4],
        "dtype": "float32",
        "bytes": 22 * 3 * 4 * 4,
    }
    assert list(arrays) == [
        *(
            "direct_effect",
            "logit_diff_clean",
            "logit_diff_zero_total",
            "tokens",
            "n_tokens",
            "prompt_text",
            "prompt_id",
        ),
        *("answer", "wrong", "status"),
    ]
    assert described["bytes"] >= sum(array["bytes"] for array in described["arrays"] if array["dtype"] != "str")
    assert described["flops"] > 0
    assert described["estimated_seconds"] is None


def test_a_plan_lists_what_it_rejects(zoo, prompts):
    answers = list(prompts.answer)
    answers[3] = " elephants"
    mixed = PromptSet.of(prompts.prompts, answer=answers, wrong=prompts.wrong)
    with pytest.raises(AnswerTokenError, match=r"' elephants' of prompt 3 .* tokens \("):
        fastinterp.plan(zoo.model("gpt2"), mixed)
    described = fastinterp.plan(zoo.model("gpt2"), mixed, bad_prompts="reject").to_dict()
    assert described["kept"] == 21
    ((rejected,),) = (described["rejected"],)
    assert (rejected["index"], rejected["id"]) == (3, "3")
    assert "' elephants'" in rejected["reason"]


def test_work_grows_with_prompts_and_heads(zoo, prompts):
    model = zoo.model("gpt2")
    attribution, sweep, part = (
        fastinterp.plan(model, prompts, analysis=analysis, ablation_limit=limit).flops
        for analysis, limit in (("dla", None), ("ablation", None), ("ablation", 3))
    )
    assert sweep > 5 * attribution
    assert part < 0.5 * sweep
    both = fastinterp.plan(model, prompts, analysis="dla,ablation").flops
    assert both == pytest.approx(attribution + sweep)


def test_blocks_depend_on_prompts_and_arrays_alone(zoo, make_sentences):
    model = zoo.model("gpt2")
    sizes = {
        fastinterp.plan(model, make_sentences(30), analysis="dla,ablation", batch_tokens=tokens).store.block_size
        for tokens in ("auto", 1, 100_000)
    }
    assert sizes == {8}


@pytest.mark.parametrize("analysis", ["dla", "ablation,dla", "lens"])
def test_progress_adds_up_to_the_prompts(zoo, prompts, analysis):
    answers = list(prompts.answer)
    answers[:7] = [" elephants"] * 7
    mixed = PromptSet.of(prompts.prompts, answer=answers, wrong=prompts.wrong)
    model = zoo.model("gpt2")
    limit = {"ablation_limit": 15} if "ablation" in analysis else {}
    planned = fastinterp.plan(model, mixed, analysis=analysis, bad_prompts="reject", batch_tokens=40, **limit)
    total = 0.0
    for block in range(planned.store.n_blocks):
        shares = []
        compute_block(model, planned, block, shares.append)
        assert min(shares) > -1e-9
        assert math.fsum(shares) == pytest.approx(len(planned.store.prompts_of(block)))
        total += math.fsum(shares)
        if block == 3:
            assert len([share for share in shares if share > 0.01]) > 1, "the bar moves within a block"
    assert total == pytest.approx(22)


def test_the_bar_ends_at_the_number_of_prompts(zoo, prompts, out, capsys):
    fastinterp.scan(zoo.model("gpt2"), prompts, out, analysis="dla,ablation", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("100%")
    assert "| 22/22 prompts" in last
    fastinterp.scan(zoo.model("gpt2"), prompts, out, analysis="dla,ablation", progress=True)
    assert "| 22/22 prompts" in capsys.readouterr().err


@pytest.mark.parametrize("progress", [None, False])
def test_no_bar_where_there_is_no_terminal(zoo, prompts, out, capsys, progress):
    fastinterp.scan(zoo.model("gpt2"), prompts, out, progress=progress)
    assert capsys.readouterr() == ("", "")


class Clock:
    """Time that passes with the tokens that are computed, and not otherwise."""

    def __init__(self, monkeypatch, seconds_per_token):
        self.now = 0.0
        self.seconds_per_token = seconds_per_token
        # By name the package has the function plan, which hides the module.
        module = sys.modules["fastinterp.engine.plan"]
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "compute_checked", self.compute)

    def compute(self, analysis, model, batch):
        self.now += int(batch.n_tokens.sum()) * self.seconds_per_token


@pytest.mark.parametrize("seconds_per_token", [1e-4, 0.01, 0.05, 0.3, 10.0])
@pytest.mark.parametrize("batch_tokens", ["auto", 40])
def test_the_estimate_is_the_rate_times_all_tokens(zoo, prompts, monkeypatch, seconds_per_token, batch_tokens):
    model = zoo.model("gpt2")
    Clock(monkeypatch, seconds_per_token)
    planned = fastinterp.plan(
        model, prompts, analysis="dla,ablation", ablation_limit=9, batch_tokens=batch_tokens, estimate=True
    )
    n_tokens = planned.prompts.n_tokens
    assert planned.seconds == pytest.approx(seconds_per_token * (n_tokens.sum() + n_tokens[:9].sum()))


def test_the_estimate_leaves_out_what_is_rejected(zoo, prompts, monkeypatch):
    Clock(monkeypatch, 0.01)
    answers = [" elephants"] * 6 + list(prompts.answer[6:])
    mixed = PromptSet.of(prompts.prompts, answer=answers, wrong=prompts.wrong)
    planned = fastinterp.plan(
        zoo.model("gpt2"), mixed, analysis="dla,ablation", ablation_limit=4, bad_prompts="reject", estimate=True
    )
    assert planned.seconds == pytest.approx(0.01 * planned.prompts.n_tokens.sum())


def test_an_estimate_is_measured(zoo, prompts):
    seconds = fastinterp.plan(zoo.model("gpt2"), prompts, estimate=True).seconds
    assert seconds is not None
    assert 0 < seconds < math.inf


@pytest.mark.parametrize(
    ("option", "value"),
    [("limit", 0), ("limit", -2), ("ablation_limit", 0), ("batch_tokens", 0), ("batch_tokens", -1)],
)
def test_counts_that_are_not_positive_are_refused(zoo, prompts, option, value):
    with pytest.raises(OptionError, match=f"{option}={value}: give a positive integer"):
        fastinterp.plan(zoo.model("gpt2"), prompts, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_tokens", "abc"), ("limit", True), ("limit", 2.5), ("ablation_limit", "3")],
)
def test_counts_of_another_kind_are_refused(zoo, prompts, without_shape_checks, option, value):
    with pytest.raises(OptionError, match=f"{option}={value!r}: give a positive integer"):
        fastinterp.plan(zoo.model("gpt2"), prompts, **{option: value})


def test_prompts_without_answers_are_refused(zoo, prompts):
    model, texts = zoo.model("gpt2"), PromptSet.of(prompts.prompts)
    with pytest.raises(AnswerTokenError, match="no prompt has a value in the column 'answer'"):
        fastinterp.plan(model, texts)
    only_answers = dataclasses.replace(prompts, wrong=None)
    with pytest.raises(AnswerTokenError, match="no prompt has a value in the column 'wrong'"):
        fastinterp.plan(model, only_answers)
    assert fastinterp.plan(model, only_answers, metric="logit").store.n_prompts == 22
    some = dataclasses.replace(prompts, answer=(None, *prompts.answer[1:]))
    with pytest.raises(AnswerTokenError, match=r"prompt 0 \(id 'row-0'\) has no answer"):
        fastinterp.plan(model, some)
    assert [r.index for r in fastinterp.plan(model, some, bad_prompts="reject").prompts.rejected] == [0]


def test_nothing_left_is_refused(zoo, prompts):
    bad = dataclasses.replace(prompts, answer=(" elephants",) * 22)
    with pytest.raises(MetricError, match="every one was rejected"):
        fastinterp.plan(zoo.model("gpt2"), bad, bad_prompts="reject")


def test_a_missing_file_is_refused(zoo, tmp_path):
    with pytest.raises(PromptFileError, match="there is no prompt file"):
        fastinterp.plan(zoo.model("gpt2"), tmp_path / "none.jsonl")


def test_answers_of_several_tokens_can_be_scored_by_their_first(zoo, prompts):
    model = zoo.model("gpt2")
    long = dataclasses.replace(prompts, answer=(" elephants",) * 22)
    planned = fastinterp.plan(model, long, answer_token="first")
    first = model.encode([" elephants"], prepend_bos=False)[0][0]
    assert np.unique(planned.prompts.answer).tolist() == [first]
    assert planned.store.identity["options"]["answer_token"] == "first"
