"""Edge attribution in use: batches and pieces, memory, means over prompts, tables, circuits and errors."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.analyses import Analysis
from fastinterp.analyses.edge_attribution import EdgeAttribution, edge_attribution
from fastinterp.analyses.edge_tables import edges_to_circuit, top_edges
from fastinterp.errors import MetricError, OptionError, PromptPairError
from fastinterp.gradients import edges
from fastinterp.gradients.edges_nodes import destinations, edges_exist, sources
from fastinterp.gradients.memory import kept_bytes
from fastinterp.prompts import PromptSet
from tests.analyses.literal_edges import EXACT, one, pairs_of
from tests.analyses.test_memory_budget import SIZES, Allocated, prompts_of

# The package may have a function of the same name.
module = sys.modules[EdgeAttribution.__module__]


@pytest.fixture
def pairs(token_prompts, answers):
    return pairs_of(token_prompts, answers)


# Invariants -------------------------------------------------------------------------------------------------------


def test_company_and_pieces_change_nothing(zoo, pairs, monkeypatch):
    model = zoo.model("mistral-window", dtype=torch.float64)
    assert len({len(prompt) for prompt in pairs.prompts}) > 1
    together = edge_attribution(model, pairs, "eap-ig", steps=2)
    names = list(together.data_vars)
    assert names == [f"logit_diff_{name}" for name in ("base", "source", "completeness", "edge")]
    for row in range(len(pairs.prompts)):
        alone = edge_attribution(model, one(pairs, row), "eap-ig", steps=2)
        for name in names:
            np.testing.assert_allclose(alone[name][0], together[name][row], atol=EXACT, rtol=0)
    monkeypatch.setattr(edges, "_GROUP", 1)
    whole = edges.add_scores
    monkeypatch.setattr(
        module,
        "add_scores",
        lambda *args, **kwargs: whole(*args, **kwargs, chunk_bytes=3 * 40 * 48 * 8),
    )
    in_pieces = edge_attribution(model, pairs, "eap-ig", steps=2)
    np.testing.assert_allclose(in_pieces["logit_diff_edge"], together["logit_diff_edge"], atol=EXACT, rtol=0)


def test_pieces_cover_every_token_that_differs_once():
    spans = [(1, 4), (0, 0), (2, 6), (5, 6), (0, 0)]
    for n_tokens in (1, 2, 5, 100):
        seen = np.zeros((5, 6), dtype=int)
        for rows, where in edges._chunks(spans, n_tokens):
            seen[rows, where] += 1
            assert (rows.stop - rows.start) * (where.stop - where.start) <= max(n_tokens, 1)
        assert seen.max() == 1
        for row, (first, end) in enumerate(spans):
            assert seen[row, first:end].all()


def test_heads_of_all_layers_are_never_held_together(zoo, pairs, monkeypatch):
    """Sources and gradients of residual width are made for a few tokens at a time, however large the batch."""
    sizes = []
    stacked = edges._stacked
    monkeypatch.setattr(edges, "_stacked", lambda *args: sizes.append(stacked(*args)) or sizes[-1])
    model = zoo.model("gpt2")
    whole = edges.add_scores
    each = (len(sources(model.spec)) + 2 * edges._GROUP) * model.spec.d_model * 4
    monkeypatch.setattr(
        module,
        "add_scores",
        lambda *args, **kwargs: whole(*args, **kwargs, chunk_bytes=4 * each),
    )
    edge_attribution(model, pairs)
    assert len(sizes) > 3
    assert max(size.shape[1] * size.shape[2] for size in sizes) <= 4


@pytest.mark.parametrize(("name", "method"), [("gpt2", "eap"), ("gemma2", "eap-ig")])
def test_memory(tiny_builders, name, method, monkeypatch):
    """What is allocated stays under what batches are made by, and the pieces of the scores."""
    model = fastinterp.load(tiny_builders[name](**SIZES[name]), device="cpu")
    tokens = prompts_of([40] * 8).tokenize(model)
    n_tokens, budgets, whole = 320, [], edges.add_scores
    monkeypatch.setattr(module, "run_bytes", lambda device: 1 << 60)
    monkeypatch.setattr(module, "kept_bytes", lambda *args: budgets.append(kept_bytes(*args)) or budgets[-1])
    monkeypatch.setattr(
        module,
        "add_scores",
        lambda *args, **kwargs: whole(*args, **kwargs, chunk_bytes=1 << 18),
    )
    with Allocated(model) as seen:
        edge_attribution(model, tokens, method, steps=3)
    assert 0.3 * n_tokens * budgets[-1] < seen.peak < n_tokens * budgets[-1]


def test_a_prompt_that_is_its_own_pair_has_no_edges(zoo, pairs):
    model = zoo.model("llama-gqa")
    same = PromptSet.of(pairs.prompts, corrupt=pairs.prompts, answer=pairs.answer, wrong=pairs.wrong)
    found = edge_attribution(model, same)["logit_diff_edge"]
    assert np.array_equal(np.isnan(found.values).all(0), ~edges_exist(model.spec))
    assert float(np.abs(found).max()) == 0
    assert top_edges(found.to_dataset(name="logit_diff_edge")) == []


def test_one_head_in_one_layer(zoo, pairs):
    model = zoo.model("llama-one-head-one-layer", dtype=torch.float64)
    found = edge_attribution(model, pairs)["logit_diff_edge"]
    assert found["source"].values.tolist() == ["embed", "L0H0", "MLP0"]
    assert found["destination"].values.tolist() == ["L0H0.q", "L0KV0.k", "L0KV0.v", "MLP0", "logits"]
    exist = [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert np.array_equal(np.isfinite(found.values), np.broadcast_to(np.array(exist, dtype=bool), found.shape))
    assert found["source_layer"].values.tolist() == [-1, 0, 0]
    assert found["source_head"].values.tolist() == [-1, 0, -1]
    assert found["source_kind"].values.tolist() == ["embed", "head", "mlp"]
    assert found["destination_kind"].values.tolist() == ["q", "k", "v", "mlp", "logits"]
    assert found["destination_layer"].values.tolist() == [0, 0, 0, 0, 1]
    assert found.attrs["sign"] == "estimate of patched - base"
    assert found.attrs["method"] == "eap"
    assert found.attrs["direction"] == "denoise"


def test_edges_in_parallel_blocks(zoo):
    spec = zoo.model("gpt-neox").spec
    assert spec.parallel
    labels = [node.label for node in sources(spec)], [node.label for node in destinations(spec)]
    exist = edges_exist(spec)
    for source, destination, exists in (
        ("L1H0", "MLP1", False),
        ("MLP0", "MLP1", True),
        ("L0H3", "MLP1", True),
        ("MLP1", "L1H2.q", False),
        ("L1H0", "L2KV2.k", True),
        ("MLP2", "logits", True),
    ):
        assert exist[labels[0].index(source), labels[1].index(destination)] == exists, (source, destination)


def test_a_function_of_the_logits(zoo, pairs):
    model = zoo.model("llama-gqa", dtype=torch.float64)

    def first_answer(logits, tokens, n_tokens):
        last = logits[torch.arange(len(logits)), n_tokens - 1]
        return last[:, 7] - last[:, 9]

    found = edge_attribution(model, pairs, metric=first_answer)
    same = PromptSet.of(pairs.prompts, corrupt=pairs.corrupt, answer=[7] * 3, wrong=[9] * 3)
    expected = edge_attribution(model, same)
    for name in ("edge", "base", "source"):
        np.testing.assert_allclose(found[f"first_answer_{name}"], expected[f"logit_diff_{name}"], atol=EXACT, rtol=0)


def test_inside_inference_mode(zoo, pairs):
    model = zoo.model("llama-gqa")
    expected = edge_attribution(model, pairs, metric="logprob")
    with torch.inference_mode():
        found = edge_attribution(model, pairs, metric="logprob")
    np.testing.assert_array_equal(found["logprob_edge"], expected["logprob_edge"])


# Reading the results ----------------------------------------------------------------------------------------------


def test_means_over_prompts(zoo, pairs, monkeypatch):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    each = edge_attribution(model, pairs)
    monkeypatch.setattr(EdgeAttribution, "tokens_per_batch", lambda self, model: 6)
    mean = edge_attribution(model, pairs, aggregate="mean")
    scores = each["logit_diff_edge"].values
    name = "logit_diff_edge"
    assert mean[name].dims == mean[f"{name}_standard_error"].dims == ("source", "destination")
    np.testing.assert_allclose(mean[name], scores.mean(0), atol=EXACT, rtol=0)
    error = scores.std(0, ddof=1) / 3**0.5
    np.testing.assert_allclose(mean[f"{name}_standard_error"], error, atol=EXACT, rtol=0)
    np.testing.assert_allclose(mean["logit_diff_base"], each["logit_diff_base"], atol=EXACT)
    assert mean[name].attrs["n_prompts"] == 3
    assert top_edges(mean, k=5)[3].source == top_edges(each, k=5)[3].source
    for found in (mean, each):
        first = top_edges(found, k=1)[0]
        flat = np.nan_to_num(np.abs(scores.mean(0)))
        s, d = np.unravel_index(flat.argmax(), flat.shape)
        assert (first.source, first.destination) == (str(each["source"][s].values), str(each["destination"][d].values))
        assert first.score == pytest.approx(scores.mean(0)[s, d])
        assert first.standard_error == pytest.approx(error[s, d])
        assert first.n_prompts == 3
    single = edge_attribution(model, one(pairs, 0), aggregate="mean")
    np.testing.assert_allclose(single[name], each[name][0], atol=EXACT)
    assert np.isnan(single[f"{name}_standard_error"]).all()


@pytest.fixture
def hand_scores(zoo):
    """Two prompts, 6 query heads on 2 KV heads, all scores 0 but a few."""
    model = zoo.model("llama-gqa")
    described = EdgeAttribution().fields(model.spec, 4)[-1]
    values = np.zeros((2, *described.shape), dtype=np.float32)
    values[:, described.absent] = np.nan
    labels = [list(described.coords[dim][1]) for dim in ("source", "destination")]
    for source, destination, score in (
        ("embed", "L0H1.q", 3.0),
        ("L0H1", "L1KV1.k", -5.0),
        ("L1H4", "logits", 4.0),
        ("L0H2", "MLP2", -2.0),
        ("MLP0", "MLP1", 1.0),
    ):
        at = labels[0].index(source), labels[1].index(destination)
        values[:, at[0], at[1]] = score + 0.5, score - 0.5
    array = xr.DataArray(values, dims=("prompt", *described.dims))
    coords = {name: (list(dims), np.array(given)) for name, (dims, given) in described.coords.items()}
    return xr.Dataset({"logit_diff_edge": array.assign_coords(coords)})


def test_top_edges(hand_scores):
    rows = top_edges(hand_scores, k=2)
    assert [(row.source, row.destination, row.score) for row in rows] == [
        ("L0H1", "L1KV1.k", -5.0),
        ("L1H4", "logits", 4.0),
    ]
    assert rows[0].standard_error == pytest.approx(0.5)
    assert rows[0].n_prompts == 2
    assert [row.score for row in top_edges(hand_scores, by="positive")] == [4.0, 3.0, 1.0]
    assert [row.score for row in top_edges(hand_scores, k=1, by="negative")] == [-5.0]
    assert len(top_edges(hand_scores, k=10**6)) == 5
    with pytest.raises(OptionError, match="k=0 edges cannot be listed"):
        top_edges(hand_scores, k=0)
    with pytest.raises(OptionError, match="the results have no edges"):
        top_edges(hand_scores.drop_vars("logit_diff_edge"))
    twice = hand_scores.assign(kl_edge=hand_scores["logit_diff_edge"])
    with pytest.raises(OptionError, match="logit_diff_edge and kl_edge: give"):
        edges_to_circuit(twice)


def test_edges_to_circuit(zoo, pairs, hand_scores):
    # KV head 1 is read by query heads 3, 4 and 5.
    assert edges_to_circuit(hand_scores, k=3) == [(0, 1), (1, 3), (1, 4), (1, 5)]
    assert edges_to_circuit(hand_scores, k=5) == [
        *((0, 1), (0, 2), "MLP0"),
        *((1, 3), (1, 4), (1, 5), "MLP1"),
        "MLP2",
    ]
    assert edges_to_circuit(hand_scores, k=5, nodes="connected") == [(0, 1), (1, 4)]
    assert edges_to_circuit(hand_scores, k=2, nodes="connected") == []
    model = zoo.model("llama-gqa")
    kept = edges_to_circuit(edge_attribution(model, pairs), k=60)
    found = fastinterp.circuit(model, pairs, keep=kept)
    assert found.sizes["circuit"] == 1
    assert len(found["circuit"].values[0].split("+")) == len(kept)


def test_it_is_an_analysis_like_the_others(zoo, pairs):
    model = zoo.model("llama-gqa")
    analysis = EdgeAttribution(method="eap-ig", metric_name="logprob", steps=2)
    assert isinstance(analysis, Analysis)
    assert analysis.metric.name == "logprob"
    assert analysis.tokens_per_batch(model) >= 128
    assert analysis.cost(model.spec, 20) == 2 * analysis.cost(model.spec, 10)
    assert analysis.cost(model.spec, 10) > EdgeAttribution().cost(model.spec, 10)
    prepared, tokens = analysis.prepared(model, pairs.tokenize(model))
    batch = next(iter(tokens.batches(1 << 12)))
    values = prepared.compute(model, batch)
    fields = prepared.fields(model.spec, batch.tokens.shape[1])
    assert set(values) == {described.name for described in fields}
    for described in fields:
        assert values[described.name].shape == (len(batch), *described.shape)
        assert values[described.name].dtype == torch.float32
        if described.absent is not None:
            assert np.array_equal(np.isnan(values[described.name].numpy()).all(0), described.absent)


def test_bfloat16_scores_are_float32(zoo, pairs):
    model = dataclasses.replace(zoo.model("gpt2"), weights=zoo.model("gpt2").weights.to(dtype=torch.bfloat16))
    exact = edge_attribution(zoo.model("gpt2"), pairs)["logit_diff_edge"]
    found = edge_attribution(model, pairs)["logit_diff_edge"]
    assert found.dtype == np.float32
    assert float(np.abs(found - exact).max()) < 0.1 * float(np.abs(exact).max())


@pytest.fixture
def nothing_runs(monkeypatch):
    for name in ("embed", "run_written", "run_gradients"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("it ran"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "acdc"}, OptionError, "method='acdc' is not known"),
        ({"direction": "up"}, OptionError, "direction='up' is not known"),
        ({"steps": 0}, OptionError, "steps=0: give a positive number"),
        ({"rule": "simpson"}, OptionError, "rule='simpson' is not known"),
        ({"aggregate": "sum"}, OptionError, "aggregate='sum' is not known"),
        ({"metric": "rank"}, MetricError, "'rank' counts tokens and has no gradient"),
        ({"metric": "top1"}, MetricError, "'top1' counts tokens and has no gradient"),
        ({"metric": "logit_dif"}, MetricError, "did you mean 'logit_diff'"),
        ({"metric": "kl", "direction": "noise"}, MetricError, "choose method='eap-ig', direction='denoise'"),
        ({"metric": lambda logits, tokens, n_tokens: logits.sum()}, MetricError, "one value for each"),
    ],
)
def test_what_there_is_not_is_refused(zoo, pairs, without_shape_checks, nothing_runs, options, error, message):
    with pytest.raises(error, match=message):
        edge_attribution(zoo.model("gpt2"), pairs, **options)


def test_ways_to_read_that_there_are_not(hand_scores, without_shape_checks):
    with pytest.raises(OptionError, match="by='largest' is not known"):
        top_edges(hand_scores, by="largest")
    with pytest.raises(OptionError, match="nodes='all' is not known"):
        edges_to_circuit(hand_scores, nodes="all")


def test_pairs_and_next_tokens_are_needed(zoo, prompt_set, nothing_runs):
    with pytest.raises(PromptPairError, match="corrupt="):
        edge_attribution(zoo.model("gpt2"), prompt_set)
    single = PromptSet.of([[3, 4], [5]], corrupt=[[4, 3], [6]])
    with pytest.raises(MetricError, match="1 prompts have none, first prompt 1"):
        edge_attribution(zoo.model("gpt2"), single, metric="loss")
