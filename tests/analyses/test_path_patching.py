"""Direct path patching against TransformerLens's own tools, and against one forward with one edit for each path."""

import itertools

import numpy as np
import pytest
import torch
import transformer_lens.patching as tl

import fastinterp
from fastinterp.analyses import Analysis, PathPatch, path_patch, path_patching
from fastinterp.errors import MetricError, OptionError, PromptPairError, SiteRangeError
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
EXACT = 1e-9
METRICS = ("logit_diff", "logprob", "prob", "kl", "rank")


@pytest.fixture
def pairs(token_prompts, answers):
    rows = [row for row, prompt in enumerate(token_prompts) if 1 < len(prompt) < 8][:3]
    prompts = [token_prompts[row] for row in rows]
    generator = torch.Generator().manual_seed(3)
    corrupt = [torch.randint(1, 379, (len(prompt),), generator=generator).tolist() for prompt in prompts]
    # Of one pair only the end differs.
    corrupt[0][:-1] = prompts[0][:-1]
    columns = {name: [column[row] for row in rows] for name, column in answers.items()}
    return PromptSet.of(prompts, corrupt=corrupt, **columns)


def of_transformer_lens(bridge, pairs, row, tool, *where, component):
    """The metric of every patched run, of the base and of the other run."""
    clean, corrupt = torch.tensor([pairs.prompts[row]]), torch.tensor([pairs.corrupt[row]])

    def metric(logits):
        return (logits[0, -1, pairs.answer[row]] - logits[0, -1, pairs.wrong[row]]).squeeze()

    with torch.no_grad():
        _, clean_cache = bridge.run_with_cache(clean)
        _, corrupt_cache = bridge.run_with_cache(corrupt)
        patched = tool(bridge, corrupt, clean_cache, corrupt_cache, metric, *where, component=component, verbose=False)
        return patched.numpy(), float(metric(bridge(corrupt))), float(metric(bridge(clean)))


@pytest.mark.parametrize(
    ("name", "component"),
    [*itertools.product(["gpt2", "llama-mha-tied"], "qkv"), ("llama-gqa", "q")],
)
def test_direct_paths_of_transformer_lens(zoo, pairs, name, component):
    model, bridge = zoo.model(name), zoo.bridge(name)
    sources = [(1, 2), (0, 1)]
    found = path_patch(model, pairs, sources, component)
    got = found[f"logit_diff_path_{component}"]
    got = got.rename(kv_head="head") if "kv_head" in got.dims else got
    for row, (index, source) in itertools.product(range(2), enumerate(sources)):
        expected, base, other = of_transformer_lens(
            bridge, pairs, row, tl.get_act_patch_direct_path, *source, component=component
        )
        above = source[0] + 1
        values = got[row, index].transpose("layer", "head").values
        assert np.abs(values[above:] + base - expected[above:]).max() < TOLERANCE
        assert np.abs(values[above:]).max() > 1e-3
        assert np.isnan(values[:above]).all()
        assert (expected[:above] == 0).all()
        assert abs(float(found["logit_diff_base"][row]) - base) < TOLERANCE
        assert abs(float(found["logit_diff_source"][row]) - other) < TOLERANCE


def test_all_sources_of_transformer_lens(zoo, pairs):
    model, bridge = zoo.model("gpt2"), zoo.bridge("gpt2")
    spec = model.spec
    got = path_patch(model, pairs, "all", "v")["logit_diff_path_v"]
    expected, base, _ = of_transformer_lens(bridge, pairs, 1, tl.get_act_patch_direct_path_all_sources, component="v")
    assert got.dims == ("prompt", "source", "layer", "kv_head")
    values = got[1].values.reshape(expected.shape)
    layers = np.arange(spec.n_layers)
    above = (layers[None] > layers[:, None])[:, None, :, None] & np.ones(expected.shape, dtype=bool)
    assert np.abs(values + base - expected)[above].max() < TOLERANCE
    assert np.isnan(values[~above]).all()
    assert (expected[~above] == 0).all()


def run(model, prompt, **taps):
    taps = Taps.of(model.spec.n_layers, **taps)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
        return final_logits(model.spec, model.weights, resid)[0, -1], taps.values


def literal(model, base, z_base, z_other, source, site, layer, head):
    """Logits of the last token with one path patched: the definition."""
    at, which = source
    W_O = model.weights.blocks[at].W_O[which]
    delta = z_other["z", at][:, :, which] @ W_O - z_base["z", at][:, :, which] @ W_O
    return run(model, base, edits=[Edit(site=site, layer=layer, head=head, replacement=delta, how="add")])[0]


def written_out(metric, logits, base_logits, answer, wrong):
    logprobs, before = logits.log_softmax(-1), base_logits.log_softmax(-1)
    return float(
        {
            "logit_diff": lambda: logits[answer] - logits[wrong],
            "logprob": lambda: logprobs[answer],
            "prob": lambda: logprobs[answer].exp(),
            "kl": lambda: (before.exp() * (before - logprobs)).sum(),
            "rank": lambda: (logits > logits[answer]).sum(),
        }[metric]()
    )


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *itertools.product(["llama-gqa", "gpt-neox"], ["denoise", "noise"]),
        *(("gpt2", "noise"), ("mistral-window", "denoise"), ("qwen3-gqa", "noise"), ("opt", "denoise")),
    ],
)
def test_every_family_component_and_direction(zoo, name, pairs, direction):
    model = zoo.model(name, dtype=torch.float64)
    spec, components = model.spec, ("q", "k", "v")
    sources = [(1, spec.n_heads - 1), (0, 1)]
    found = path_patch(model, pairs, sources, components, direction, metric=METRICS)
    generator = torch.Generator().manual_seed(0)
    for row in range(len(pairs.prompts)):
        clean, corrupt = pairs.prompts[row], pairs.corrupt[row]
        base, other = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        (before, z_base), (_, z_other) = run(model, base, capture=["z"]), run(model, other, capture=["z"])
        words = [w[0] if isinstance(w, list | tuple) else w for w in (pairs.answer[row], pairs.wrong[row])]
        for component, (index, source) in itertools.product(components, enumerate(sources)):
            head_dim, n_heads = ("head", spec.n_heads) if component == "q" else ("kv_head", spec.attention.n_kv_heads)
            layer = int(torch.randint(source[0] + 1, spec.n_layers, (), generator=generator))
            head = int(torch.randint(n_heads, (), generator=generator))
            patched = literal(model, base, z_base, z_other, source, f"{component}_input", layer, head)
            for metric in METRICS:
                expected = written_out(metric, patched, before, *words) - written_out(metric, before, before, *words)
                data = found[f"{metric}_path_{component}"]
                assert data.dims == ("prompt", "source", "layer", head_dim)
                assert data.sizes[head_dim] == n_heads
                got = float(data.isel({"prompt": row, "source": index, "layer": layer, head_dim: head}))
                assert abs(got - expected) < EXACT, (component, metric, source, layer, head)
    for component in components:
        assert float(np.abs(found[f"logit_diff_path_{component}"]).max()) > 1e-3


def test_order_and_steps_change_nothing(zoo, pairs, monkeypatch):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    sources = [(1, 4), (0, 2), (2, 0), (0, 5)]
    names = ("logit_diff_path_q", "logit_diff_path_k")
    together = path_patch(model, pairs, sources, ["q", "k"])
    assert together["source"].values.tolist() == ["L1H4", "L0H2", "L2H0", "L0H5"]
    assert together["source_layer"].values.tolist() == [1, 0, 2, 0]
    assert together["source_head"].values.tolist() == [4, 2, 0, 5]
    everything = path_patch(model, pairs, "all", "q")
    monkeypatch.setattr(path_patching, "_WRITTEN_BYTES", 1)
    one_by_one = path_patch(model, pairs, sources, ["q", "k"])
    for name in names:
        np.testing.assert_allclose(one_by_one[name], together[name], atol=EXACT, rtol=0)
    some = everything["logit_diff_path_q"].sel(source=together["source"].values)
    np.testing.assert_allclose(some, together["logit_diff_path_q"], atol=EXACT, rtol=0)
    for index, source in enumerate([(1, 4), (-3, 2)]):
        single = path_patch(model, pairs, source, "k")["logit_diff_path_k"]
        np.testing.assert_allclose(single[:, 0], together[names[1]][:, index], atol=EXACT, rtol=0)


def test_company_of_other_lengths_changes_nothing(zoo, pairs):
    model = zoo.model("mistral-window", dtype=torch.float64)
    assert len({len(prompt) for prompt in pairs.prompts}) > 1
    together = path_patch(model, pairs, (0, 2), ["q", "v"])
    for row in range(len(pairs.prompts)):
        columns = {name: getattr(pairs, name)[row : row + 1] for name in ("answer", "wrong", "corrupt")}
        alone = path_patch(model, PromptSet.of(pairs.prompts[row : row + 1], **columns), (0, 2), ["q", "v"])
        for name in ("logit_diff_path_q", "logit_diff_path_v", "logit_diff_base", "logit_diff_source"):
            np.testing.assert_allclose(alone[name][0], together[name][row], atol=EXACT, rtol=0)


def test_layers_that_are_not_above_the_source_are_missing(zoo, pairs):
    for component, dim in (("q", "head"), ("v", "kv_head")):
        found = path_patch(zoo.model("llama-gqa"), pairs, "all", component)[f"logit_diff_path_{component}"]
        above = (found["layer"] > found["source_layer"]).broadcast_like(found).transpose(*found.dims)
        assert np.array_equal(np.isfinite(found), above)
        assert found.dims == ("prompt", "source", "layer", dim)


def test_a_prompt_that_is_its_own_pair_has_no_effects(zoo, pairs):
    same = PromptSet.of(pairs.prompts, corrupt=pairs.prompts, answer=pairs.answer, wrong=pairs.wrong)
    found = path_patch(zoo.model("gpt2", dtype=torch.float64), same, (0, 0), ["q", "k", "v"])
    for component in "qkv":
        assert float(np.abs(found[f"logit_diff_path_{component}"]).max()) < EXACT


def test_it_is_an_analysis_like_the_others(zoo, pairs):
    model = zoo.model("llama-gqa")
    analysis = PathPatch(sources=((0, 1), (1, 0)), components=("q", "v"), metric_names=("logit_diff", "logprob"))
    assert isinstance(analysis, Analysis)
    assert analysis.metric.name == "logit_diff"
    assert analysis.tokens_per_batch(model) >= 256
    assert analysis.cost(model.spec, 20) == 2 * analysis.cost(model.spec, 10)
    assert PathPatch().cost(model.spec, 10) > analysis.cost(model.spec, 10)
    prepared, tokens = analysis.prepared(model, pairs.tokenize(model))
    batch = next(iter(tokens.batches(1 << 12)))
    values = prepared.compute(model, batch)
    fields = prepared.fields(model.spec, batch.tokens.shape[1])
    assert set(values) == {described.name for described in fields}
    for described in fields:
        assert values[described.name].shape == (len(batch), *described.shape)
        if described.absent is not None:
            assert np.array_equal(np.isnan(values[described.name].numpy()).all(0), described.absent)
    assert fastinterp.path_patch is path_patch


def test_an_overflow_is_still_an_error(zoo, pairs):
    from fastinterp.analyses.base import check_finite
    from fastinterp.errors import NonFiniteError

    model = zoo.model("llama-gqa")
    analysis = PathPatch(sources=((0, 1),))
    batch = next(iter(pairs.tokenize(model).batches(1 << 12)))
    described = next(f for f in analysis.fields(model.spec, 8) if f.name == "logit_diff_path_q")
    values = torch.zeros(len(batch), *described.shape)
    values[:, :, 0] = torch.nan
    check_finite(described, analysis.metric, values, batch)
    values[1, 0, 2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="logit_diff_path_q is not finite"):
        check_finite(described, analysis.metric, values, batch)


@pytest.fixture
def nothing_runs(monkeypatch):
    from fastinterp.analyses import measuring

    for module, name in ((measuring, "forward_at"), (measuring, "sweep"), (path_patching, "embed")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("it ran"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sources": "some"}, OptionError, r"sources='some': give a pair of layer and head such as \(9, 6\)"),
        ({"sources": ()}, OptionError, "give a pair of layer and head"),
        ({"sources": 3}, OptionError, "give a pair of layer and head"),
        ({"sources": ["L0H1"]}, OptionError, "sources has 'L0H1': give a pair"),
        ({"sources": [(0, 1, 2)]}, OptionError, r"sources has \(0, 1, 2\)"),
        ({"sources": (0, 1, 2)}, OptionError, r"sources has \(0, 1, 2\)"),
        ({"sources": [(0, 1), (-3, 1)]}, OptionError, "sources has L0H1 twice"),
        ({"sources": (3, 0)}, SiteRangeError, "layer 3 is out of range"),
        ({"sources": (0, 4)}, SiteRangeError, "head 4 is out of range"),
        ({"sources": [(2, 0), (2, 1)]}, OptionError, "no head reads what L2H0 writes"),
        ({"component": "z"}, OptionError, "component='z' is not known"),
        ({"component": ()}, OptionError, "give one of q, k and v"),
        ({"component": ("q", "q")}, OptionError, "different ones"),
        ({"direction": "up"}, OptionError, "direction='up' is not known"),
        ({"metric": "loss"}, MetricError, "such as 'logprob'"),
        ({"metric": ()}, OptionError, "give one metric"),
    ],
)
def test_what_there_is_not_is_refused(zoo, pairs, without_shape_checks, nothing_runs, options, error, message):
    with pytest.raises(error, match=message):
        path_patch(zoo.model("gpt2"), pairs, **({"sources": (0, 0)} | options))


def test_pairs_and_paths_are_needed(zoo, prompt_set, pairs, nothing_runs):
    with pytest.raises(PromptPairError, match="corrupt="):
        path_patch(zoo.model("gpt2"), prompt_set, (0, 0))
    with pytest.raises(OptionError, match="no head reads what L0H0 writes"):
        path_patch(zoo.model("llama-one-head-one-layer"), pairs, "all")
    with pytest.raises(OptionError, match="path_patch is not defined there"):
        path_patch(zoo.model("gemma2-softcaps"), pairs, (0, 0))


@pytest.mark.parametrize("precision", ["exact", "delta", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_rounding_is_no_effect(zoo, name, precision):
    """A pair of equal prompts has none, in any precision."""
    rng = np.random.default_rng(5)
    same = [rng.integers(1, 370, 8).tolist() for _ in range(3)]
    other = [[*ids[:-1], 5] for ids in same]
    model, targets = zoo.model(name), {"answer": [5, 6, 7], "wrong": [6, 7, 8]}
    none, some = (
        fastinterp.path_patch(
            model, PromptSet.of(same, corrupt=corrupt, **targets), "all", ("q", "k", "v"), precision=precision
        )
        for corrupt in (same, other)
    )
    for component in "qkv":
        assert float(abs(some[f"logit_diff_path_{component}"]).max()) > 1e-3
        assert float(abs(none[f"logit_diff_path_{component}"]).max()) < 1e-5
