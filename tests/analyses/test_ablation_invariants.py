"""What must not change an ablation: batches, company, order, other metrics, a part named twice."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
import torch

from fastinterp.analyses import ablate, ablation, measuring, replacements, written
from fastinterp.prompts import PromptSet
from tests.analyses.literal_ablation import METRICS
from tests.analyses.test_ablation_modes import (
    ANSWER,
    CORRUPT,
    LENGTHS,
    LIST,
    MODES,
    PROMPTS,
    REFERENCE,
    REFERENCE_SET,
    SET,
    WRONG,
    given,
    ids,
)


def values(data):
    return {name: array.values for name, array in data.data_vars.items()}


def assert_close(one, other, tolerance):
    assert set(one) == set(other)
    for name in one:
        assert np.array_equal(np.isnan(one[name]), np.isnan(other[name])), name
        assert np.abs(np.nan_to_num(one[name] - other[name])).max(initial=0.0) <= tolerance, name


EVERYTHING = dict(mode=MODES, metric=tuple(m for m in METRICS if m not in ("rank", "top1")), effect="both")


@pytest.mark.parametrize("kind", ["heads", "layers", "list"])
@pytest.mark.parametrize("pos", ["all", -1, "each"])
def test_batches_and_chunks_change_nothing(zoo, monkeypatch, kind, pos):
    model = zoo.model("gemma2-softcaps")
    options = EVERYTHING | dict(units=given(kind, model.spec)[0], pos=pos, reference=REFERENCE_SET, mean_over="pos")
    whole = values(ablate(model, SET, **options))
    monkeypatch.setattr(measuring, "SLICE_VARIANTS", 2)
    monkeypatch.setattr(replacements, "usual_mean_tokens", lambda device_type: 5)
    monkeypatch.setattr(written, "prompts_at_once", lambda *sizes, every_position: 1)
    monkeypatch.setattr("fastinterp.analyses.direct_units._RESIDUAL_BYTES", 1)
    monkeypatch.setattr(ablation.Ablation, "tokens_per_batch", lambda self, model: 12)
    monkeypatch.setattr(measuring, "sweep", functools.partial(measuring.sweep, residual_bytes=1 << 14))
    assert_close(values(ablate(model, SET, **options)), whole, 1e-5)


def test_how_many_prompts_go_through_the_model_together():
    assert written.prompts_at_once("cpu", 100, 50, every_position=True) == 10
    assert written.prompts_at_once("cpu", 4, 50, every_position=True) == 4
    assert written.prompts_at_once("cpu", 4, 5000, every_position=True) == 1
    assert written.prompts_at_once("cuda", 100, 1000, every_position=True) == 16
    assert written.prompts_at_once("cpu", 100, 50, every_position=False) == 100


@pytest.mark.parametrize("name", ["gemma2-softcaps", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("units", ["heads", [(1, 1), (0, 0)], [(1, 0), (1, 1)]], ids=["all", "two layers", "one layer"])
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_prompts_whose_heads_are_kept_in_parts(zoo, monkeypatch, name, units, n_prompts):
    model = zoo.model(name)
    options = EVERYTHING | dict(units=units, effect="direct", reference=REFERENCE_SET)
    whole = values(ablate(model, SET, **options))
    parts = []

    def counted(run):
        def counting(spec, weights, tokens, *rest, **others):
            parts.append(len(tokens))
            return run(spec, weights, tokens, *rest, **others)

        return counting

    monkeypatch.setattr(written, "prompts_at_once", lambda *sizes, every_position: n_prompts)
    monkeypatch.setattr(written, "forward", counted(written.forward))
    monkeypatch.setattr(written, "forward_at", counted(written.forward_at))
    found = values(ablate(model, SET, **options))
    # Losses of every token and the last position, each with the prompt's own values and the source's.
    assert parts == [*[n_prompts] * (len(PROMPTS) // n_prompts), *[len(PROMPTS) % n_prompts] * (n_prompts > 1)] * 4
    assert_close(found, whole, 1e-5)


def test_a_header_that_all_prompts_have_counts_once(zoo):
    model = zoo.model("gpt2")
    header = list(range(3, 12))

    def batch_tokens(prompts, **options):
        analysis = ablation.Ablation(units=((0, 1),), **options)
        planned = analysis.planned(model, PromptSet.of(prompts).tokenize(model))
        return planned.tokens_per_batch(model)

    alike = [[*header, token] for token in range(70, 370)]
    apart = [[token, *header] for token in range(70, 370)]
    assert batch_tokens(apart) == batch_tokens(apart[:3]) == 2048
    assert batch_tokens([alike[0]] * 2) == 4096
    assert batch_tokens(alike) == batch_tokens(alike, modes=("zero", "mean")) == 8192
    # What differs between prompts or positions, is computed for each.
    for options in (dict(modes=("resample",)), dict(modes=("mean",), mean_over="pos"), dict(pos=slice(1, 3))):
        assert batch_tokens(alike, **options) == 2048
    found, planned = (
        ablate(model, PromptSet.of(alike, answer=[5] * 300, wrong=[6] * 300), units=[(0, 1)], **options)
        for options in ({}, {"memory_bytes": 4 << 20})
    )
    assert json.loads(found.attrs["sweep_plan"])["batch_tokens"] == 8192
    assert_close(values(found), values(planned), 1e-5)


@pytest.mark.parametrize("units", ["heads", "mlps"])
def test_the_rounding_of_another_clean_run_is_not_in_direct_effects(zoo, monkeypatch, units):
    model, clean_run = zoo.model("gpt2"), ablation.clean_run
    options = dict(units=units, effect="direct", metric=("loss", "logit_diff", "kl"))
    expected = values(ablate(model, SET, **options))

    def rounded(*given):
        clean = clean_run(*given)
        return dataclasses.replace(clean, values={name: value + 1.0 for name, value in clean.values.items()})

    monkeypatch.setattr(ablation, "clean_run", rounded)
    found = values(ablate(model, SET, **options))
    assert set(found) == {f"{name}_{what}" for name in options["metric"] for what in ("clean", "zero_direct")}
    for name, array in found.items():
        shift = 1.0 if name.endswith("_clean") else 0.0
        np.testing.assert_allclose(array, expected[name] + shift, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pos", ["all", 1, "each"])
def test_order_and_company_change_nothing(zoo, pos):
    model = zoo.model("llama-gqa")
    options = EVERYTHING | dict(units=LIST, pos=pos, reference=REFERENCE_SET)
    whole = values(ablate(model, SET, **options))
    order = [2, 0, 3, 1]

    def some(rows):
        columns = {"answer": ANSWER, "wrong": WRONG, "corrupt": CORRUPT}
        return PromptSet.of(
            [PROMPTS[row] for row in rows], **{key: [column[row] for row in rows] for key, column in columns.items()}
        )

    turned = values(ablate(model, some(order), **options))
    assert_close(turned, {name: array[order] for name, array in whole.items()}, 1e-5)
    for row, prompt in enumerate(PROMPTS):
        alone = values(ablate(model, some([row]), **options))
        n = len(prompt)
        expected = {}
        for name, array in whole.items():
            axes = name.startswith("loss") + (pos == "each" and "clean" not in name)
            expected[name] = array[(slice(row, row + 1), *[slice(n)] * axes)]
        assert_close(alone, expected, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2-softcaps"])
def test_several_metrics_and_modes_equal_each_by_itself(zoo, name):
    model = zoo.model(name, dtype=torch.float64)
    together = values(ablate(model, SET, units="heads", mode=MODES, metric=METRICS, effect="both"))
    # Every metric with every mode, and with both effects; the other halves are those of other models.
    for turn, (metric, mode) in enumerate(itertools.product(METRICS, MODES), start=len(name)):
        effect = ("total", "direct")[turn % 2]
        data = ablate(model, SET, mode=mode, metric=metric, effect=effect)
        assert set(data) == {f"{metric}_clean", f"{metric}_{mode}_{effect}"}
        assert_close(values(data), {key: together[key] for key in data}, 1e-11)


EACH = [
    (kind, effect, ("tokens", "pos")[(i + j) % 2])
    for i, kind in enumerate(("heads", "mlps", "attns", "layers", "list"))
    for j, effect in enumerate(("total", "direct"))
]


@pytest.mark.parametrize(("kind", "effect", "mean_over"), EACH)
def test_each_equals_every_position_by_itself(zoo, kind, effect, mean_over):
    model = zoo.model("qwen3-gqa", dtype=torch.float64)
    metrics = ("logit_diff", "loss")
    options = dict(units=given(kind, model.spec)[0], mode=MODES, metric=metrics, effect=effect, mean_over=mean_over)
    each = ablate(model, SET, pos="each", **options)
    assert each["edit_pos"].values.tolist() == list(range(9))
    # The first position, the last one of every prompt, and with them some in between.
    for p in (0, 1, 4, 5, 8):
        column = [min(p, n - 1) for n in LENGTHS]
        single = ablate(model, SET, pos=column, **options)
        for mode in MODES:
            for metric in metrics:
                name = f"{metric}_{mode}_{effect}"
                got, expected = each[name].isel(edit_pos=p), single[name]
                assert got.dims == expected.dims
                for row, n in enumerate(LENGTHS):
                    if p >= n:
                        assert np.isnan(got[row]).all()
                        continue
                    assert np.array_equal(np.isnan(got[row]), np.isnan(expected[row]))
                    assert np.abs(np.nan_to_num(got[row].values - expected[row].values)).max() < 1e-11


@pytest.mark.parametrize("kind", ["heads", "layers", "list"])
def test_nothing_in_front_of_the_ablated_position_changes(zoo, kind):
    model = zoo.model("gpt2", dtype=torch.float64)
    data = ablate(model, SET, units=given(kind, model.spec)[0], mode=MODES, metric="loss", pos="each", effect="both")
    for mode in MODES:
        for effect in ("total", "direct"):
            found = data[f"loss_{mode}_{effect}"]
            for row, n in enumerate(LENGTHS):
                for edited in range(n):
                    at = found.isel(prompt=row, edit_pos=edited).values
                    assert np.abs(at[: min(edited, n - 1)]).max(initial=0.0) < 1e-11
                    assert edited == n - 1 or np.abs(at[edited]).max() > 1e-3
                    if effect == "direct":
                        assert (at[edited + 1 : n - 1] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps", "gpt-neox"])
@pytest.mark.parametrize("pos", ["all", 1, "each"])
def test_resampling_from_itself_changes_nothing(zoo, name, pos):
    model = zoo.model(name)
    same = PromptSet.of(PROMPTS, answer=ANSWER, wrong=WRONG, corrupt=PROMPTS)
    for units in ("heads", "layers", LIST):
        data = ablate(model, same, units=units, mode="resample", metric=METRICS, pos=pos, effect="both")
        for effect in ("total", "direct"):
            for metric in METRICS:
                found = data[f"{metric}_resample_{effect}"].values
                limit = 0.0 if metric in ("rank", "top1") else 2e-5
                assert np.abs(np.nan_to_num(found)).max() <= limit, (metric, effect)


def test_the_mean_of_one_token_is_that_token(zoo):
    model = zoo.model("llama-gqa")
    one = PromptSet.of([[7]], answer=[[5]], wrong=[[6]])
    for mean_over in ("tokens", "pos"):
        data = ablate(
            model, one, mode="mean", metric=("logit_diff", "kl"), effect="both", mean_over=mean_over, reference=one
        )
        for name, array in data.data_vars.items():
            assert name.endswith("clean") or np.abs(array.values).max() < 1e-5


@pytest.mark.parametrize("effect", ["total", "direct"])
def test_a_part_that_is_given_twice_counts_once(zoo, effect):
    model = zoo.model("gpt2", dtype=torch.float64)
    units = [(1, 2), (1, 2), "ATTN1", ["ATTN1", (1, 2)], [(1, 2), "ATTN1"], "MLP1", ["L1N3", "MLP1"], ["MLP1", "L1N3"]]
    for mode in MODES:
        data = ablate(model, SET, units=units, mode=mode, metric=("logit_diff", "loss"), effect=effect)
        for metric in ("logit_diff", "loss"):
            found = np.nan_to_num(data[f"{metric}_{mode}_{effect}"].values)
            for same in ([0, 1], [2, 3, 4], [5, 6, 7]):
                for unit in same[1:]:
                    assert np.abs(found[..., same[0]] - found[..., unit]).max() < 1e-10, (mode, units[unit])


def test_partners_are_other_prompts_of_the_same_length_drawn_by_seed(zoo):
    model = zoo.model("gpt2", dtype=torch.float64)
    prompts = ids((4, 6, 4, 6, 4, 6, 6), 31)
    columns = {"answer": [[i + 1] for i in range(7)], "wrong": [[i + 20] for i in range(7)]}
    tokens = PromptSet.of(prompts, **columns).tokenize(model)
    drawn = []
    for seed in range(6):
        source = replacements.with_source(tokens, seed)
        partners = [[row.tolist() for row in tokens.tokens].index(ids.tolist()) for ids in source.corrupt]
        assert sorted(partners) == list(range(7))
        assert all(a != b and len(prompts[a]) == len(prompts[b]) for a, b in enumerate(partners))
        drawn.append(tuple(partners))
        named = PromptSet.of(prompts, corrupt=[prompts[p] for p in partners], **columns)
        got = ablate(model, tokens, mode="resample", effect="both", seed=seed)
        assert_close(values(got), values(ablate(model, named, mode="resample", effect="both")), 0.0)
    assert len(set(drawn)) > 1


def test_the_reference_may_be_rejected_in_parts_and_has_no_answers(zoo):
    model = zoo.model("gpt2", dtype=torch.float64)
    bad = PromptSet.of([*REFERENCE, [399, 400]]).tokenize(model, bad_prompts="reject")
    for mean_over in ("tokens", "pos"):
        got = ablate(model, SET, mode="mean", reference=bad, mean_over=mean_over)
        wanted = ablate(model, SET, mode="mean", reference=REFERENCE_SET, mean_over=mean_over)
        assert_close(values(got), values(wanted), 1e-12)
    own = ablate(model, SET, mode="mean")
    assert np.abs(own["logit_diff_mean_total"].values - wanted["logit_diff_mean_total"].values).max() > 0.05
    explicit = ablate(model, SET, mode="mean", reference=PromptSet.of(PROMPTS))
    assert_close(values(own), values(explicit), 1e-12)
