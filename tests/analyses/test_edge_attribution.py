"""Edge attribution against TransformerLens, a copy of the residual for every reader, real patches and identities."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.analyses import Analysis
from fastinterp.analyses.edge_attribution import EdgeAttribution, edge_attribution
from fastinterp.analyses.edge_tables import edges_to_circuit, top_edges
from fastinterp.errors import MetricError, OptionError, PromptPairError
from fastinterp.gradients import edges
from fastinterp.gradients.edges_nodes import destinations, edges_exist, sources
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.model.model import Model, Origin
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position
from fastinterp.model.weights import BlockWeights, NormWeights, Weights
from fastinterp.prompts import PromptSet

EXACT = 1e-9


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


def one(pairs, row):
    columns = {name: getattr(pairs, name)[row : row + 1] for name in ("answer", "wrong", "corrupt")}
    return PromptSet.of(pairs.prompts[row : row + 1], **columns)


def ids(pairs, row, direction):
    clean, corrupt = torch.tensor([pairs.prompts[row]]), torch.tensor([pairs.corrupt[row]])
    return (corrupt, clean) if direction == "denoise" else (clean, corrupt)


def words(pairs, row):
    return [w[0] if isinstance(w, list | tuple) else w for w in (pairs.answer[row], pairs.wrong[row])]


# The definition ---------------------------------------------------------------------------------------------------

READS = ("q_input", "k_input", "v_input", "mlp_in")


def written_by_source(model, tokens):
    """What every source adds to the residual ``[source, pos, d_model]``, each head's output written out."""
    spec = model.spec
    taps = Taps.of(spec.n_layers, capture=["resid_pre", "result", "mlp_out", "attn_raw"])
    with torch.no_grad():
        forward(spec, model.weights, tokens, taps=taps)
    found = [taps.values["resid_pre", 0][0]]
    for layer, w in enumerate(model.weights.blocks):
        for head in range(spec.n_heads):
            result = taps.values["result", layer][0, :, head]
            if w.ln1_post is not None:
                assert spec.norm.kind == "rms"
                raw = taps.values["attn_raw", layer][0]
                result = result / (raw.square().mean(-1, keepdim=True) + spec.norm.eps).sqrt()
                result = result if w.ln1_post.w is None else result * w.ln1_post.w
            found.append(result)
        found.append(taps.values["mlp_out", layer][0])
    return torch.stack(found)


def metric_of(name, resid, model, base_tokens, answer, wrong, reference=None):
    logits = final_logits(model.spec, model.weights, resid)[0]
    logprobs = logits.log_softmax(-1)
    if name == "loss":
        return -logprobs[:-1].gather(1, base_tokens[0, 1:, None]).mean()
    if name == "kl":
        before = final_logits(model.spec, model.weights, reference)[0, -1].log_softmax(-1)
        return (before.exp() * (before - logprobs[-1])).sum()
    return {"logit_diff": logits[-1, answer] - logits[-1, wrong], "logprob": logprobs[-1, answer]}[name]


def literal(model, base, source, measure, points):
    """Scores ``[source, destination]``, edge by edge: autograd at a copy of the residual that each reader has."""
    spec = model.spec
    difference = written_by_source(model, source) - written_by_source(model, base)
    embedded = [written_by_source(model, tokens)[0] for tokens in (base, source)]
    exist = edges_exist(spec)
    scores = torch.zeros(exist.shape, dtype=torch.float64)
    for alpha, weight in points:
        start = ((1 - alpha) * embedded[0] + alpha * embedded[1])[None].requires_grad_()
        taps = Taps.of(
            spec.n_layers,
            capture=READS,
            edits=[Edit(site="resid_pre", layer=0, replacement=start)],
        )
        with torch.enable_grad():
            resid = forward(spec, model.weights, base, taps=taps)
            keys = [(name, layer) for layer in range(spec.n_layers) for name in READS]
            found = torch.autograd.grad(measure(resid), [*(taps.values[key] for key in keys), resid])
        gradients = dict(zip(keys, found[:-1], strict=True))
        for column, destination in enumerate(destinations(spec)):
            if destination.kind == "logits":
                gradient = found[-1][0]
            elif destination.kind == "mlp":
                gradient = gradients["mlp_in", destination.layer][0]
            else:
                gradient = gradients[f"{destination.kind}_input", destination.layer][0, :, destination.head]
            for row in np.flatnonzero(exist[:, column]):
                scores[row, column] += weight * float((difference[row] * gradient).sum())
    return np.where(exist, scores.numpy(), np.nan)


@pytest.mark.parametrize(
    ("name", "direction", "metric", "method"),
    [
        ("gpt2", "denoise", "logit_diff", "eap"),
        ("llama-gqa", "noise", "logprob", "eap"),
        ("gemma2-softcaps", "denoise", "kl", "eap"),
        ("gpt-neox", "noise", "loss", "eap"),
        ("gpt2-one-head-one-layer", "noise", "logit_diff", "eap"),
        ("llama-gqa", "denoise", "logit_diff", "eap-ig"),
        ("mistral-window", "noise", "kl", "eap-ig"),
        ("qwen3-gqa", "denoise", "loss", "eap-ig"),
    ],
)
def test_equal_to_a_copy_of_the_residual_for_every_reader(zoo, pairs, name, direction, metric, method):
    model = zoo.model(name, dtype=torch.float64, processing="none" if name == "gpt2" else "transformer_lens")
    found = edge_attribution(model, pairs, method, direction, metric, steps=2, rule="trapezoid")
    points = [(0.0, 1.0)] if method == "eap" else [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]
    got = found[f"{metric}_edge"]
    assert got.dims == ("prompt", "source", "destination")
    for row in range(len(pairs.prompts)):
        base, source = ids(pairs, row, direction)
        clean = source if direction == "denoise" else base
        with torch.no_grad():
            of_clean, of_source, of_base = (forward(model.spec, model.weights, t) for t in (clean, source, base))

        def measure(resid, base=base, row=row, reference=of_clean):
            return metric_of(metric, resid, model, base, *words(pairs, row), reference)

        expected = literal(model, base, source, measure, points)
        np.testing.assert_allclose(got[row].values, expected, atol=EXACT, rtol=0)
        # The loss of a prompt does not depend on its last token.
        assert np.nanmax(np.abs(expected)) > 1e-2 or (metric == "loss" and row == 0)
        assert abs(float(found[f"{metric}_base"][row]) - float(measure(of_base))) < EXACT
        assert abs(float(found[f"{metric}_source"][row]) - float(measure(of_source))) < EXACT


def test_equal_to_transformer_lens(zoo, pairs):
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    model, bridge = zoo.model("gpt2", dtype=torch.float64), zoo.bridge("gpt2")
    found = edge_attribution(model, pairs)["logit_diff_edge"]
    row = 1
    answer, wrong = words(pairs, row)
    theirs = attribution_patch(
        bridge,
        torch.tensor([pairs.prompts[row]]),
        torch.tensor([pairs.corrupt[row]]),
        lambda logits: (logits[0, -1, answer] - logits[0, -1, wrong]).squeeze(),
        config=EdgeAttributionConfig(granularity="edge"),
    )
    suffix = {"q_input": "H{}.q", "k_input": "KV{}.k", "v_input": "KV{}.v"}
    expected = np.full(found.shape[1:], np.nan)
    labels = [found[dim].values.tolist() for dim in ("source", "destination")]
    # Theirs are edges at one position; a residual stream has no others.
    for (writer, reader), score in theirs.edge_scores.items():
        source = {"embed": "embed", "attn_head_out": f"L{writer.layer}H{writer.head}"}.get(
            writer.kind, f"MLP{writer.layer}"
        )
        destination = {"mlp_in": f"MLP{reader.layer}", "logits": "logits"}.get(reader.kind)
        if destination is None:
            destination = f"L{reader.layer}" + suffix[reader.kind].format(reader.head)
        at = labels[0].index(source), labels[1].index(destination)
        expected[at] = np.nan_to_num(expected[at]) + score
    np.testing.assert_allclose(found[row].values, expected, atol=1e-6, rtol=0)
    assert np.nanmax(np.abs(expected)) > 0.1


# Numbers by hand --------------------------------------------------------------------------------------------------


def by_hand():
    """Two layers of one head and one MLP, two numbers wide, an RMS norm and nothing else."""
    spec = ModelSpec(
        family="by hand",
        n_layers=2,
        d_model=2,
        d_vocab=4,
        n_ctx=1,
        norm=Norm(kind="rms", eps=0.0),
        position=Position(kind="learned"),
        attention=Attention(n_heads=1, n_kv_heads=1, d_head=1, scale=1.0, window=(None, None)),
        mlp=Mlp(kind="plain", d_mlp=1, activation="relu"),
    )

    def block(W_V, W_O, W_in, W_out):
        columns = [[1.0, 0.0], [0.0, 1.0], W_V]
        return BlockWeights(
            ln1=NormWeights(),
            W_QKV=torch.tensor(columns, dtype=torch.float64).T.contiguous(),
            b_QKV=None,
            W_O=torch.tensor([[W_O]], dtype=torch.float64),
            b_O=None,
            ln2=NormWeights(),
            W_gate_in=torch.tensor([[x] for x in W_in], dtype=torch.float64),
            b_gate_in=None,
            W_out=torch.tensor([W_out], dtype=torch.float64),
            b_out=None,
        )

    weights = Weights(
        W_E=torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        W_pos=torch.zeros(1, 2, dtype=torch.float64),
        blocks=(
            block([1.0, 0.0], [0.0, 6.0], [0.0, 0.0], [0.0, 0.0]),
            block([1.0, 0.0], [30.0, 0.0], [1.0, 0.0], [-6.0, 0.0]),
        ),
        ln_final=NormWeights(),
        W_U=torch.tensor([[0.0, 0.0, 10.0, 0.0], [0.0] * 4], dtype=torch.float64),
        b_U=None,
    )
    return Model(spec=spec, weights=weights, tokenizer=None, origin=Origin(source="by hand"))


def test_numbers_by_hand():
    # A single token: every pattern is 1, so nothing depends on queries and keys.
    #
    # base, token 1:    r = (1, 1)    norm (1, 1)      L0H0 = 6 * (0, 1)     MLP0 = 0
    #                   r = (1, 7)    norm (0.2, 1.4)  L1H0 = 0.2 * (30, 0)  r = (7, 7)    norm (1, 1)
    #                   MLP1 = relu(1) * (-6, 0)       r = (1, 7)            logit = 10 * 0.2
    # source, token 0:  r = (-1, -1)  L0H0 = (0, -6)   r = (-1, -7)          L1H0 = -0.2 * (30, 0)
    #                   r = (-7, -7)  MLP1 = relu(-1) * .. = 0               logit = 10 * -1
    #
    # Backwards, with the norm's (y - n (n . y) / 2) / scale:
    #   logits   y = (10, 0)                      n = (0.2, 1.4)  scale 5   g = (9.8, -1.4) / 5 = (1.96, -0.28)
    #   MLP1     y = -6 * 1.96 (1, 0)             n = (1, 1)      scale 7   g = (-5.88, 5.88) / 7 = (-0.84, 0.84)
    #   L1 v     y = 30 * (1.96 - 0.84) (1, 0)    n = (0.2, 1.4)  scale 5   g = (32.928, -4.704) / 5
    #   MLP0     its weights are 0
    #   L0 v     y = 6 * (-0.28 + 0.84 - 0.9408) (1, 0)   n = (1, 1)  scale 1   g = (-1.1424, 1.1424)
    differences = {"embed": (-2, -2), "L0H0": (0, -12), "MLP0": (0, 0), "L1H0": (-12, 0), "MLP1": (6, 0)}
    expected = {
        ("embed", "L0KV0.v"): -2 * -1.1424 + -2 * 1.1424,
        ("embed", "L1KV0.v"): -2 * 6.5856 + -2 * -0.9408,
        ("embed", "MLP1"): -2 * -0.84 + -2 * 0.84,
        ("embed", "logits"): -2 * 1.96 + -2 * -0.28,
        ("L0H0", "L1KV0.v"): -12 * -0.9408,
        ("L0H0", "MLP1"): -12 * 0.84,
        ("L0H0", "logits"): -12 * -0.28,
        ("L1H0", "MLP1"): -12 * -0.84,
        ("L1H0", "logits"): -12 * 1.96,
        ("MLP1", "logits"): 6 * 1.96,
    }
    prompts = PromptSet.of([[0]], corrupt=[[1]], answer=[2], wrong=[3])
    found = edge_attribution(by_hand(), prompts)
    assert float(found["logit_diff_base"][0]) == pytest.approx(2)
    assert float(found["logit_diff_source"][0]) == pytest.approx(-10)
    for source, destination in itertools.product(differences, found["destination"].values):
        got = float(found["logit_diff_edge"][0].sel(source=source, destination=destination))
        exists = {
            "embed": True,
            "L0H0": not destination.startswith("L0"),
            "MLP0": destination == "logits" or destination[1:2] == "1" or destination == "MLP1",
            "L1H0": destination in ("MLP1", "logits"),
            "MLP1": destination == "logits",
        }[source]
        if not exists:
            assert np.isnan(got), (source, destination)
        else:
            assert got == pytest.approx(expected.get((source, destination), 0.0), abs=1e-12), (source, destination)


# Real patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "direction"), [("llama-gqa", "denoise"), ("gpt-neox", "noise")])
def test_the_beginning_of_real_path_patches(zoo, pairs, name, direction):
    model = zoo.model(name, dtype=torch.float64)
    spec, row = model.spec, 2
    base, source = ids(pairs, row, direction)
    found = edge_attribution(model, pairs, direction=direction)["logit_diff_edge"][row]
    difference = written_by_source(model, source) - written_by_source(model, base)
    labels = [node.label for node in sources(spec)]

    def measured(site, layer, head, change):
        edit = Edit(site=site, layer=layer, head=head, replacement=change[None], how="add")
        with torch.no_grad():
            resid = forward(spec, model.weights, base, taps=Taps.of(spec.n_layers, edits=[edit]))
            return float(metric_of("logit_diff", resid, model, base, *words(pairs, row)))

    step, sizes = 1e-5, []
    for writer, reader in itertools.product(("L0H1", "L1H2", "MLP0", "embed"), destinations(spec)):
        if reader.layer != 2 or reader.kind == "logits" or (reader.head or 0) > 1:
            continue
        site = "mlp_in" if reader.kind == "mlp" else f"{reader.kind}_input"
        change = step * difference[labels.index(writer)]
        slope = [measured(site, 2, reader.head, sign * change) for sign in (1, -1)]
        score = float(found.sel(source=writer, destination=reader.label))
        assert score == pytest.approx((slope[0] - slope[1]) / (2 * step), abs=1e-6), (writer, reader.label)
        sizes.append(abs(score))
    assert np.median(sizes) > 1e-3


# Identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps"])
def test_scores_into_a_destination_sum_to_its_whole_input(zoo, pairs, name):
    model = zoo.model(name, dtype=torch.float64)
    spec, row = model.spec, 2
    base, source = ids(pairs, row, "denoise")
    found = edge_attribution(model, pairs)["logit_diff_edge"][row]
    taps = Taps.of(spec.n_layers, capture=["mlp_in", "v_input"])
    start = written_by_source(model, base)[:1].requires_grad_()
    taps.edits["resid_pre", 0] = [Edit(site="resid_pre", layer=0, replacement=start)]
    resid = forward(spec, model.weights, base, taps=taps)
    there = Taps.of(spec.n_layers, capture=["mlp_in", "v_input"])
    with torch.no_grad():
        end = forward(spec, model.weights, source, taps=there)
    keys = [("mlp_in", 1), ("v_input", 2)]
    value = metric_of("logit_diff", resid, model, base, *words(pairs, row))
    gradients = torch.autograd.grad(value, [*(taps.values[key] for key in keys), resid])
    resid, here = resid.detach(), {key: taps.values[key].detach() for key in keys}
    # b_O and the biases of MLPs are the same in both runs.
    into = found.sum("source")
    whole = (there.values["mlp_in", 1] - here["mlp_in", 1]) * gradients[0]
    assert float(into.sel(destination="MLP1")) == pytest.approx(float(whole.sum()), abs=EXACT)
    whole = ((there.values["v_input", 2] - here["v_input", 2]) * gradients[1])[0, :, 1]
    assert float(into.sel(destination="L2KV1.v")) == pytest.approx(float(whole.sum()), abs=EXACT)
    whole = (end - resid) * gradients[2]
    assert float(into.sel(destination="logits")) == pytest.approx(float(whole.sum()), abs=EXACT)
    assert abs(float(whole.sum())) > 1e-2


@pytest.mark.parametrize("metric", ["logit_diff", "prob"])
def test_integrated_scores_of_the_embedding_are_complete(zoo, pairs, metric):
    model = zoo.model("gpt2", dtype=torch.float64)
    found = edge_attribution(model, pairs, "eap-ig", metric=metric, steps=48, rule="gauss")
    total = found[f"{metric}_edge"].sel(source="embed").sum("destination")
    change = found[f"{metric}_source"] - found[f"{metric}_base"]
    np.testing.assert_allclose(total, change, atol=1e-6 * float(np.abs(change).max()), rtol=0)
    np.testing.assert_allclose(found[f"{metric}_completeness"], total - change, atol=EXACT)
    coarse = edge_attribution(model, pairs, "eap-ig", metric=metric, steps=2)[f"{metric}_completeness"]
    assert float(np.abs(coarse).max()) > 1e-3 * float(np.abs(change).max())


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
        "fastinterp.analyses.edge_attribution.add_scores",
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
        "fastinterp.analyses.edge_attribution.add_scores",
        lambda *args, **kwargs: whole(*args, **kwargs, chunk_bytes=4 * each),
    )
    edge_attribution(model, pairs)
    assert len(sizes) > 3
    assert max(size.shape[1] * size.shape[2] for size in sizes) <= 4


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
    import xarray as xr

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
    from fastinterp.analyses import edge_attribution as module

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
