"""Options of ablations in scans: the same as ``ablate``, kept with the store, refused where they do not fit."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastinterp
from fastinterp.engine.run import compute_block
from fastinterp.errors import InputTypeError, MetricError, OptionError, PromptError, SiteRangeError, StoreMismatchError
from fastinterp.prompts import PromptSet
from fastinterp.store import describe_store
from tests.engine.test_engine_copy_suppression import HEADS, JOB, N_PROMPTS, N_TOKENS, NAMES, drawn


def paired(n=18):
    """Prompts of 3 to 8 tokens with answers and corrupt prompts."""
    lengths = (5, 3, 8)
    columns = {name: [[3 * i + at] for i in range(n)] for at, name in enumerate(("answer", "wrong"))}
    return PromptSet.of(drawn(n, lengths), corrupt=drawn(n, lengths, seed=8), **columns)


METRICS = ("loss", "logit_diff", "kl", "top1")
MODES = ("zero", "mean", "resample")
REFERENCE = PromptSet.of(drawn(5, (8, 9), seed=9))
COLUMN = [i % 3 for i in range(18)]
# What is typed, and what ablate is called with.
CASES = {
    "every metric": (dict(metric="loss, logit_diff,kl,top1", effect="both"), dict(metric=METRICS, effect="both")),
    "metrics as a list": (dict(metric=["logit_diff", "loss"]), dict(metric=["logit_diff", "loss"])),
    "every mode": (dict(mode="zero,mean,resample", effect="both"), dict(mode=MODES, effect="both")),
    "mlps": (dict(units="mlps", effect="both", mode="mean"), dict(units="mlps", effect="both", mode="mean")),
    "attns": (dict(units="attns", metric="loss"), dict(units="attns", metric="loss")),
    "layers": (dict(units="layers", metric="kl,loss"), dict(units="layers", metric=("kl", "loss"))),
    "neurons": (dict(units="neurons", ablate_pos=-1), dict(units="neurons", pos=-1)),
    "labels": (
        dict(units="L0H1,MLP2,ATTN1,L1N7,L0H0+L2H3", effect="both"),
        dict(units=[(0, 1), "MLP2", "ATTN1", "L1N7", [(0, 0), (2, 3)]], effect="both"),
    ),
    "last": (dict(ablate_pos="last", metric="loss,logit_diff"), dict(pos=-1, metric=("loss", "logit_diff"))),
    "each": (
        dict(ablate_pos="each", units="mlps", metric="loss,kl"),
        dict(pos="each", units="mlps", metric=("loss", "kl")),
    ),
    "position": (dict(ablate_pos="1"), dict(pos=1)),
    "from the end": (dict(ablate_pos="-2"), dict(pos=-2)),
    "slice": (dict(ablate_pos="1:", effect="both"), dict(pos=slice(1, None), effect="both")),
    "slice to the end": (dict(ablate_pos="-3:-1"), dict(pos=slice(-3, -1))),
    "column": (dict(ablate_pos=COLUMN, metric="loss"), dict(pos=COLUMN, metric="loss")),
    "mean by position": (dict(mode="mean", mean_over="pos"), dict(mode="mean", mean_over="pos")),
    "reference": (
        dict(mode="mean", mean_over="pos", reference=REFERENCE, effect="both"),
        dict(mode="mean", mean_over="pos", reference=REFERENCE, effect="both"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_scan_holds_what_ablate_returns(zoo, out, name, case):
    asked, called = CASES[case]
    model, given = zoo.model(name, dtype=torch.float64), paired()
    dataset = fastinterp.scan(model, given, out, analysis="ablation", batch_tokens=24, **asked)
    expected = fastinterp.ablate(model, given, **called)
    assert describe_store(out).n_blocks == 4
    assert {name for name, array in dataset.data_vars.items() if "metric" in array.attrs} == set(expected.data_vars)
    for name, array in expected.data_vars.items():
        assert dataset[name].dims == array.dims
        np.testing.assert_allclose(dataset[name].values, array.values, rtol=1e-6, atol=1e-6)
        for key in ("units", "metric", "sign", "long_name", "ablated_pos", "mean_over", "final_norm_scale"):
            assert dataset[name].attrs.get(key) == array.attrs.get(key)
    for name in {*expected.coords} - {"prompt", "prompt_text", "prompt_id"}:
        assert dataset[name].values.tolist() == expected[name].values.tolist()


def test_another_seed_takes_other_partners(zoo, tmp_path):
    model, given = zoo.model("gpt2", dtype=torch.float64), PromptSet.of(drawn())
    found = {}
    for seed in (0, 5):
        found[seed] = fastinterp.scan(
            model, given, tmp_path / f"{seed}.zarr", analysis="ablation_resample", metric="loss", seed=seed
        )["loss_resample_total"].values
        expected = fastinterp.ablate(model, given, mode="resample", metric="loss", seed=seed)["loss_resample_total"]
        np.testing.assert_allclose(found[seed], expected.values, rtol=1e-6, atol=1e-6)
    assert np.nanmax(np.abs(found[0] - found[5])) > 0.01


def test_a_reference_can_be_a_file_and_counts_by_its_content(zoo, tmp_path):
    model, given = zoo.model("gpt2"), PromptSet.of(drawn())
    REFERENCE.write(tmp_path / "reference.jsonl")
    job = JOB | {"units": HEADS}
    first = fastinterp.scan(model, given, tmp_path / "run.zarr", reference=tmp_path / "reference.jsonl", **job)
    expected = fastinterp.ablate(model, given, units=HEADS, mode="mean", metric="loss", reference=REFERENCE)
    np.testing.assert_allclose(first["loss_mean_total"].values, expected["loss_mean_total"].values, atol=1e-5)
    # The answers that a reference file may have are not looked at, and neither are its ids.
    fastinterp.scan(model, given, tmp_path / "run.zarr", reference=REFERENCE, **job)
    with pytest.raises(StoreMismatchError, match=r"options\.analyses\.ablation\.reference: store has"):
        fastinterp.scan(model, given, tmp_path / "run.zarr", **job)


def test_options_apply_to_the_analyses_that_take_them(zoo, out):
    model, given = zoo.model("gpt2", dtype=torch.float64), paired()
    dataset = fastinterp.scan(
        model, given, out, analysis="dla,lens,ablation,ablation_mean", effect="both", units="L1H2,MLP0", mean_over="pos"
    )
    assert dataset.direct_effect.dims == ("prompt", "layer", "head")
    expected = fastinterp.ablate(
        model, given, units=["L1H2", "MLP0"], mode=("zero", "mean"), mean_over="pos", effect="both"
    )
    for name, array in expected.data_vars.items():
        np.testing.assert_allclose(dataset[name].values, array.values, rtol=1e-6, atol=1e-6)


def test_options_are_kept_and_must_be_the_same_to_resume(zoo, out, files):
    model, given = zoo.model("gpt2"), paired()
    job = dict(
        analysis="ablation",
        metric="loss,logit_diff",
        mode="zero,mean,resample",
        effect="both",
        units="L0H1,L1H2+L2H0",
        ablate_pos="1:",
    )
    fastinterp.scan(model, given, out, **job)
    options = json.loads(json.dumps(describe_store(out).attrs["options"]))
    assert options["metric"] == ["loss", "logit_diff"]
    assert options["analyses"]["ablation"] == {
        "prompts": 18,
        "mode": ["zero", "mean", "resample"],
        "effect": "both",
        "units": ["L0H1", "L1H2+L2H0"],
        "ablate_pos": "1:",
        "mean_over": "tokens",
        "reference": "the prompts",
        "seed": 0,
    }
    before = files(out)
    # The same, said in another way.
    same = dict(
        metric=["loss", "logit_diff"],
        mode=("zero", "mean", "resample"),
        units=[(0, 1), ["L1H2", (2, 0)]],
        ablate_pos=slice(1, None),
    )
    fastinterp.scan(model, given, out, **job | same)
    others = {
        "mode": "zero,resample,mean",
        "effect": "total",
        "units": "L0H1,L1H2,L2H0",
        "ablate_pos": "2:",
        "mean_over": "pos",
        "seed": 1,
    }
    for name, value in others.items():
        with pytest.raises(
            StoreMismatchError, match=rf"options\.analyses\.ablation\.{name}: store has .*, this run has"
        ):
            fastinterp.scan(model, given, out, **job | {name: value})
    with pytest.raises(
        StoreMismatchError, match=r'options\.metric: store has \["loss", "logit_diff"\], this run has "los'
    ):
        fastinterp.scan(model, given, out, **job | {"metric": "loss"})
    assert files(out) == before


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(analysis="dla", mode="mean"), OptionError, r"mode does not fit the analyses chosen \(dla\).* ablation$"),
        (dict(analysis="dla,lens", units="mlps"), OptionError, "units does not fit .*choose from ablation, "),
        (dict(analysis="ablation_mean", mode="zero"), OptionError, "mode does not fit .* choose from ablation$"),
        (dict(analysis="direct", effect="both"), OptionError, "effect does not fit .* ablation, ablation_mean, "),
        (dict(analysis="dla,ablation", metric="logit,kl"), OptionError, "'dla' takes one metric, not 2 .logit, kl"),
        (dict(metric="loss,loss"), OptionError, "several different ones"),
        (dict(metric="loss,los"), MetricError, "no metric 'los'.*did you mean 'loss'"),
        (dict(metric=[]), OptionError, "no metric was given"),
        (dict(mode="zero,men"), OptionError, "mode.*'men'.*mean"),
        (dict(mode="zero,zero"), OptionError, "several different ones"),
        (dict(effect="indirect"), OptionError, "effect.*'indirect'.*total"),
        (dict(units="head"), OptionError, "units.*'head'.*heads"),
        (dict(units="L0H1,H2"), OptionError, "units has 'H2': give heads, mlps, .*L10H7, MLP3"),
        (dict(units=""), OptionError, "units"),
        (dict(units=[]), OptionError, "units is empty"),
        (dict(units="L0H1,L9H0"), SiteRangeError, "layer 9"),
        (dict(units="L0H4"), SiteRangeError, "head 4"),
        (dict(units="L0N99999"), SiteRangeError, "neuron 99999"),
        (dict(ablate_pos="first"), OptionError, "ablate_pos='first': give all, last, each"),
        (dict(ablate_pos="2"), SiteRangeError, "pos=2 is out of range for prompt 1"),
        (dict(ablate_pos=[0, 1]), OptionError, "pos has 2 positions for 12 prompts"),
        (dict(mean_over="pos"), OptionError, "mean_over is for mode 'mean', which is not chosen"),
        (dict(mode="mean", mean_over="prompts"), OptionError, "mean_over.*'prompts'.*tokens"),
        (dict(reference=REFERENCE), OptionError, "reference is for mode 'mean'"),
        (dict(mode="mean", reference=[[1, 2]], mean_over="pos"), OptionError, "no token at position 2"),
        (dict(seed=3), OptionError, "seed is for mode 'resample', which is not chosen"),
        (dict(mode="resample", seed=-1), OptionError, "seed=-1: give an integer from 0 on"),
        (dict(mode="resample"), PromptError, "no other prompt has 2 tokens"),
        (dict(analysis="ablation,ablation_mean", mode="zero,mean"), OptionError, "both give loss_mean_total"),
        (dict(analysis="ablation,direct", effect="both"), OptionError, "both give loss_zero_direct"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(zoo, tmp_path, options, error, message):
    prompts = PromptSet.of([drawn()[0], [5, 6], *drawn()[2:]])
    with pytest.raises(error, match=message):
        fastinterp.scan(
            zoo.model("gpt2"), prompts, tmp_path / "run.zarr", **{"analysis": "ablation", "metric": "loss"} | options
        )
    assert list(tmp_path.iterdir()) == []


def test_a_reference_is_no_tokens_of_some_model(zoo, tmp_path, without_shape_checks):
    model, prompts = zoo.model("gpt2"), PromptSet.of(drawn())
    with pytest.raises(InputTypeError, match="reference is a TokenizedPrompts: give a PromptSet or the path"):
        fastinterp.scan(
            model,
            prompts,
            tmp_path / "run.zarr",
            analysis="ablation_mean",
            metric="loss",
            reference=prompts.tokenize(model),
        )
    assert list(tmp_path.iterdir()) == []


# Plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_shows_the_arrays_and_the_options(zoo):
    planned = fastinterp.plan(zoo.model("gpt2"), PromptSet.of(drawn()), units=HEADS, estimate=True, **JOB).to_dict()
    shapes = {array["name"]: array["shape"] for array in planned["arrays"]}
    for name in NAMES.values():
        assert shapes[name] == [N_PROMPTS, N_TOKENS, 3]
    assert planned["options"]["analyses"]["ablation"]["units"] == ["L0H1", "L2H3", "L1H0"]
    assert planned["estimated_seconds"] > 0
    assert json.loads(json.dumps(planned)) == planned


@pytest.mark.parametrize("options", [{"mean_over": "pos"}, {"reference": REFERENCE, "mean_over": "pos"}, {}])
def test_time_is_estimated_for_prompts_of_mixed_lengths(zoo, options):
    planned = fastinterp.plan(zoo.model("gpt2"), paired(), analysis="ablation", mode="mean", estimate=True, **options)
    assert planned.seconds > 0


def work(model, prompts, **options):
    return fastinterp.plan(model, prompts, analysis="ablation", **options).flops


def test_work_is_the_sum_of_its_parts(zoo):
    model, prompts = zoo.model("llama-gqa"), PromptSet.of(drawn())
    spec, n, scored = model.spec, N_PROMPTS * N_TOKENS, N_PROMPTS * (N_TOKENS - 1)
    block, mlp = spec.flops_per_token_block(), 6 * spec.d_model * spec.mlp.d_mlp
    unembedding = 2 * spec.d_model * spec.d_vocab

    def extra(head, **options):
        """What one head costs besides the clean run."""
        twice, once = (work(model, prompts, units=[head] * times, **options) for times in (2, 1))
        return twice - once

    clean = work(model, prompts, metric="loss", units="L0H0") - extra((0, 0), metric="loss")
    assert clean == pytest.approx(n * spec.n_layers * block + scored * unembedding)
    # The lowest layer is run through most of the model again, the highest through its MLP and the unembedding.
    assert extra((0, 0), metric="loss") == pytest.approx(n * ((spec.n_layers - 1) * block + mlp) + scored * unembedding)
    assert extra((spec.n_layers - 1, 0), metric="loss") == pytest.approx(n * mlp + scored * unembedding)
    heads = [(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads)]
    total = clean + sum(extra(head, metric="loss") for head in heads)
    assert work(model, prompts, metric="loss", units="heads") == pytest.approx(total)
    # Behind the first ablated position only; every position by itself is all of these.
    by_pos = [extra((0, 0), metric="kl", ablate_pos=pos) for pos in range(N_TOKENS)]
    assert by_pos[-1] == pytest.approx(N_PROMPTS * ((spec.n_layers - 1) * block + mlp + unembedding))
    assert extra((0, 0), metric="kl", ablate_pos="last") == pytest.approx(by_pos[-1])
    assert extra((0, 0), metric="kl", ablate_pos=[8] * N_PROMPTS) == pytest.approx(by_pos[-1])
    assert extra((0, 0), metric="kl", ablate_pos="each") == pytest.approx(sum(by_pos))
    # Direct effects: a pass over the vocabulary for all heads, d_head of it for each.
    direct = extra((0, 0), metric="loss", effect="direct")
    assert direct == pytest.approx(scored * 2 * spec.d_vocab * spec.attention.d_head)
    # Means: one forward more, of each analysis's prompts.
    mean, zero = (work(model, prompts, metric="loss", mode=mode) for mode in ("mean", "zero"))
    assert mean - zero == pytest.approx(n * spec.n_layers * block)


@pytest.mark.parametrize(
    "options", [{}, {"units": "layers"}, {"units": "mlps", "effect": "direct"}, {"effect": "both"}]
)
def test_work_is_near_what_is_counted(zoo, options):
    model, prompts = zoo.model("gpt2"), PromptSet.of(drawn(lengths=(24,)))
    planned = fastinterp.plan(model, prompts, analysis="ablation", metric="loss", **options)

    def add_product(total, a, b, **shapes):
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: add_product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        for block in range(planned.store.n_blocks):
            compute_block(model, planned, block, lambda done: None)
    assert counter.get_total_flops() == pytest.approx(planned.flops, rel=0.15)
