"""What identifies a scan with a reference, what clean values are, and which prompts are ablated."""

import numpy as np
import pytest

import fastinterp
from fastinterp.analyses import Ablation
from fastinterp.cli import scan as command
from fastinterp.engine import run as engine_run
from fastinterp.engine.options import described
from fastinterp.errors import EmptyPromptError, OptionError, PromptError, StoreMismatchError
from fastinterp.prompts import PromptSet

TEXTS = ["When John and Mary went to", "Then Alice and Bob had"]
REFERENCE = PromptSet.of(TEXTS)
UNITS = dict(units=[(0, 1), (1, 2)])


def drawn(n=20, length=6):
    rng = np.random.default_rng(3)
    ids = [rng.integers(1, 379, length).tolist() for _ in range(n)]
    return PromptSet.of(ids, answer=[[5]] * n, wrong=[[6]] * n)


@pytest.fixture(scope="module")
def model(zoo):
    return zoo.model("gpt2")


class Stopped(Exception):
    """Stands for an interruption."""


def interrupted(monkeypatch, model, prompts, out, **job):
    """A store of which two blocks are there."""
    compute, done = engine_run.compute_block, []

    def some(*args):
        if len(done) == 2:
            raise Stopped
        done.append(args)
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine_run, "compute_block", some)
        with pytest.raises(Stopped):
            fastinterp.scan(model, prompts, out, **job)


# BOS of the reference -----------------------------------------------------------------------------------------------


def test_a_scan_is_not_resumed_with_another_bos_of_the_reference(model, out, monkeypatch):
    """Of prompts that are token ids, nothing else in the store says how the reference was read."""
    job = dict(analysis="ablation_mean", reference=REFERENCE, **UNITS)
    plans = {bos: fastinterp.plan(model, drawn(), prepend_bos=bos, **job) for bos in (True, False)}
    tokens = {bos: each.tasks["ablation_mean"].reference.tokens[0].tolist() for bos, each in plans.items()}
    assert tokens[True] == [model.bos_token_id, *tokens[False]]
    options = {bos: each.store.identity["options"] for bos, each in plans.items()}
    assert options[True]["prepend_bos"] == options[False]["prepend_bos"]
    for bos in (True, False):
        assert options[bos]["analyses"]["ablation_mean"]["reference_prepend_bos"] is bos

    interrupted(monkeypatch, model, drawn(), out, prepend_bos=True, **job)
    with pytest.raises(StoreMismatchError, match="reference_prepend_bos: store has true, this run has false"):
        fastinterp.scan(model, drawn(), out, prepend_bos=False, **job)
    whole = fastinterp.scan(model, drawn(), out, prepend_bos=True, **job)
    expected = fastinterp.ablate(
        model, drawn(), mode="mean", reference=REFERENCE.tokenize(model, prepend_bos=True), **UNITS
    )
    np.testing.assert_allclose(
        whole["logit_diff_mean_total"].values, expected["logit_diff_mean_total"].values, atol=1e-5
    )


@pytest.mark.parametrize("begins", [True, False])
def test_text_begins_with_bos_where_the_prompts_do(model, begins):
    prompts = drawn(4)
    if begins:
        ids = [[model.bos_token_id, *prompt] for prompt in prompts.prompts]
        prompts = PromptSet.of(ids, answer=prompts.answer, wrong=prompts.wrong)
    planned = fastinterp.plan(model, prompts, analysis="ablation_mean", reference=REFERENCE, **UNITS)
    known = planned.tasks["ablation_mean"].reference
    assert known.prepend_bos is begins
    assert [len(row) for row in known.tokens] == [len(ids) + begins for ids in model.encode(TEXTS, prepend_bos=False)]


def test_without_a_reference_nothing_is_said_of_its_bos(model):
    analysis = Ablation(modes=("mean",))
    assert "reference_prepend_bos" not in described(analysis, model.spec, None, None)


# Answers of the reference -------------------------------------------------------------------------------------------

# An answer of many tokens, one that is the wrong answer too, and corrupt prompts of other lengths.
ANSWERED = PromptSet.of(
    TEXTS, answer=[" supercalifragilistic", " Mary"], wrong=[" John", " Mary"], corrupt=["When", TEXTS[1]]
)


@pytest.mark.parametrize("bad_prompts", ["error", "reject"])
def test_answers_of_the_reference_do_not_matter(model, tmp_path, bad_prompts):
    job = dict(analysis="ablation_mean", bad_prompts=bad_prompts, **UNITS)
    first = fastinterp.scan(model, drawn(), tmp_path / "run.zarr", reference=ANSWERED, **job)
    expected = fastinterp.ablate(model, drawn(), mode="mean", reference=REFERENCE, **UNITS)
    np.testing.assert_allclose(
        first["logit_diff_mean_total"].values, expected["logit_diff_mean_total"].values, atol=1e-5
    )
    # They do not tell one store from another either; the prompts do.
    fastinterp.scan(model, drawn(), tmp_path / "run.zarr", reference=REFERENCE, **job)
    with pytest.raises(StoreMismatchError, match=r"ablation_mean\.reference: store has"):
        fastinterp.scan(model, drawn(), tmp_path / "run.zarr", reference=PromptSet.of(TEXTS[::-1]), **job)


def test_what_is_wrong_with_the_reference_is_said_of_the_reference(model):
    job = dict(analysis="ablation_mean", **UNITS)
    with pytest.raises(EmptyPromptError, match=r"^reference: .*prompt 1"):
        fastinterp.plan(model, drawn(), reference=PromptSet.of([TEXTS[0], ""]), prepend_bos=False, **job)
    with pytest.raises(PromptError, match=r"^reference has no prompt that can be used"):
        fastinterp.plan(model, drawn(), reference=PromptSet.of([""]), prepend_bos=False, bad_prompts="reject", **job)


# Clean values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("analysis", ["direct,ablation_resample", "ablation_resample,direct"])
def test_clean_values_of_two_precisions_are_not_shared(model, tmp_path, analysis, precision):
    with pytest.raises(
        OptionError, match=r"logit_diff_clean of analysis .* precision .*: give them stores of their own"
    ):
        fastinterp.scan(model, drawn(), tmp_path / "run.zarr", analysis=analysis, precision=precision, **UNITS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["exact", "delta"])
def test_exact_clean_values_are_shared(model, out, precision):
    options = {} if precision == "exact" else {"precision": precision}
    found = fastinterp.scan(
        model, drawn(), out, analysis="direct,ablation_resample", ablation_limit=3, **options, **UNITS
    )["logit_diff_clean"]
    exact = fastinterp.ablate(model, drawn(), **UNITS)["logit_diff_clean"]
    np.testing.assert_allclose(found.values, exact.values, atol=1e-5)
    assert found.attrs["precision"] == "exact"


def test_the_precision_of_clean_values_is_kept(model, out):
    found = fastinterp.scan(model, drawn(), out, analysis="ablation", effect="both", precision="bf16", **UNITS)
    rounded, exact = (
        fastinterp.ablate(model, drawn(), precision=precision, **UNITS)["logit_diff_clean"]
        for precision in ("bf16", "exact")
    )
    assert found["logit_diff_clean"].attrs["precision"] == rounded.attrs["precision"] == "bf16"
    assert exact.attrs["precision"] == "exact"
    np.testing.assert_allclose(found["logit_diff_clean"].values, rounded.values, atol=1e-5)
    assert float(np.abs(rounded - exact).max()) > 1e-4


# The limit of ablations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analysis", ["direct", "dla", "dla,lens", "head_logits"])
def test_a_limit_that_limits_nothing_is_refused(model, analysis):
    with pytest.raises(OptionError, match=rf"ablation_limit=2 is for ablation, .*\({analysis.replace(',', ', ')}\)"):
        fastinterp.plan(model, drawn(), analysis=analysis, ablation_limit=2)


def test_the_limit_is_of_sweeps_alone(model):
    planned = fastinterp.plan(model, drawn(), analysis="dla,direct,ablation_resample", ablation_limit=4)
    assert {name: task.n_prompts for name, task in planned.tasks.items()} == {
        "dla": 20,
        "direct": 20,
        "ablation_resample": 4,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(precision="delta", dtype="bfloat16"), "precision='delta' is for float32 models.* bfloat16"),
        (dict(analysis="direct", ablation_limit=2), "ablation_limit=2 is for ablation, "),
    ],
)
def test_the_command_refuses_what_does_not_fit_before_a_model_is_loaded(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(fastinterp, "load", lambda *args, **kwargs: pytest.fail("it loaded a model"))
    job = dict(model="gpt2", prompts=tmp_path / "no.jsonl", out=tmp_path / "run.zarr", analysis="ablation")
    with pytest.raises(OptionError, match=message):
        command.scan(**job | options)


# Seeds and positions ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_shape_checks")
def test_numpy_integers_are_integers_in_scans_too(model, tmp_path):
    column = [i % 3 for i in range(20)]
    plain = dict(analysis="ablation_resample", seed=3, ablate_pos=column, units=[(0, 1), (1, 2)])
    arrays = dict(seed=np.int64(3), ablate_pos=np.array(column), units=np.array([[0, 1], [1, 2]]))
    first = fastinterp.scan(model, drawn(), tmp_path / "run.zarr", **plain).load()
    identities = [fastinterp.plan(model, drawn(), **options).store.identity for options in (plain, plain | arrays)]
    assert identities[0] == identities[1]
    second = fastinterp.scan(model, drawn(), tmp_path / "other.zarr", **plain | arrays)
    assert second["logit_diff_resample_total"].identical(first["logit_diff_resample_total"])
