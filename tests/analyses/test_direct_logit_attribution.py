"""Direct logit attribution against TransformerLens, against its literal definition, and by what has to add up."""

import numpy as np
import pytest
import torch

from fastinterp.analyses import direct_logit_attribution
from fastinterp.model import Taps, forward
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
MODELS = [
    "gpt2",
    "gpt2-one-head-one-layer",
    "llama-gqa",
    "llama-biases-mqa-head-dim",
    "llama-one-head-one-layer",
    "mistral-window",
]

# Several alternatives, of different number: prompts with fewer are padded.
SEVERAL = {
    "answer": [[5, 6], 7, [8], [9, 10, 11], 12, [13, 14], 15],
    "wrong": [16, [17, 18], 19, 20, [21, 22], 23, [24, 25, 26]],
}


def heads_of(result):
    """Without TransformerLens's remainder, as [prompt, layer x head]."""
    n = len([label for label in result.labels if label.startswith("L")])
    return result.attribution[:n].T


@pytest.fixture
def directions():
    """The literal direction and constant of each prompt: means over alternatives, taken column by column."""

    def directions(weights, columns, metric):
        u, constants = [], []
        W_U = weights.W_U.double()
        b_U = torch.zeros(W_U.shape[1]) if weights.b_U is None else weights.b_U
        for answer, wrong in zip(columns["answer"], columns["wrong"], strict=True):
            right = [answer] if isinstance(answer, int) else answer
            other = [wrong] if isinstance(wrong, int) else wrong
            direction = sum(W_U[:, token] for token in right) / len(right)
            constant = sum(float(b_U[token]) for token in right) / len(right)
            if metric == "logit_diff":
                direction = direction - sum(W_U[:, token] for token in other) / len(other)
                constant -= sum(float(b_U[token]) for token in other) / len(other)
            u.append(direction)
            constants.append(constant)
        return torch.stack(u), torch.tensor(constants, dtype=torch.float64)

    return directions


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_heads_equal_the_tool_of_transformer_lens(zoo, tiny_name, token_prompts, answers, prompt_set, metric):
    from transformer_lens.tools.analysis import direct_logit_attribution as tool

    got = direct_logit_attribution(zoo.model(tiny_name), prompt_set, metric=metric)
    for row, prompt in enumerate(token_prompts):
        wrong = answers["wrong"][row] if metric == "logit_diff" else None
        with torch.no_grad():
            result = tool(
                zoo.bridge(tiny_name),
                torch.tensor([prompt]),
                answer_tokens=answers["answer"][row],
                incorrect_tokens=wrong,
                unit="head",
            )
        expected = heads_of(result).reshape(got.shape[1:]).numpy()
        assert np.abs(got[row].values - expected).max() < TOLERANCE
    assert float(np.abs(got).mean()) > 0.1


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa"], indirect=True)
def test_every_position_and_alternative_answers_equal_stacked_head_results(zoo, tiny_name, token_prompts, directions):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    got = direct_logit_attribution(model, PromptSet.of(token_prompts, **SEVERAL), pos="all")
    u, _ = directions(model.weights, SEVERAL, "logit_diff")
    assert got.dims == ("prompt", "pos", "layer", "head")
    for row, prompt in enumerate(token_prompts):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([prompt]))
            stack = cache.apply_ln_to_stack(cache.stack_head_results(layer=-1), layer=-1)
        expected = (stack[:, 0] @ u[row]).T.reshape(len(prompt), *got.shape[2:]).numpy()
        assert np.abs(got[row, : len(prompt)].values - expected).max() < TOLERANCE
        assert np.isnan(got[row, len(prompt) :].values).all()


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
def test_components_equal_the_tool_of_transformer_lens(zoo, tiny_name, token_prompts, answers, prompt_set):
    from transformer_lens.tools.analysis import direct_logit_attribution as tool

    got = direct_logit_attribution(zoo.model(tiny_name), prompt_set, unit="component")
    for row, prompt in enumerate(token_prompts):
        with torch.no_grad():
            result = tool(
                zoo.bridge(tiny_name),
                torch.tensor([prompt]),
                answer_tokens=answers["answer"][row],
                incorrect_tokens=answers["wrong"][row],
                unit="component",
            )
        assert [*result.labels, "bias"] == list(got.component.values)
        expected = result.attribution.squeeze().numpy()
        assert np.abs(got[row, :-1].values - expected).max() < TOLERANCE


def metric_at(logits, columns, row, metric):
    """The metric read off full logits ``[pos, d_vocab]``."""
    value = logits[:, columns["answer"][row]].reshape(len(logits), -1).mean(-1)
    if metric == "logit_diff":
        value = value - logits[:, columns["wrong"][row]].reshape(len(logits), -1).mean(-1)
    return value.numpy()


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_components_and_bias_sum_to_the_metric(zoo, tiny_name, token_prompts, padded, logits_of, processing, metric):
    model = zoo.model(tiny_name, processing=processing)
    prompts = PromptSet.of(token_prompts, **SEVERAL)
    everywhere = direct_logit_attribution(model, prompts, unit="component", pos="all", metric=metric)
    last = direct_logit_attribution(model, prompts, unit="component", metric=metric)
    first = direct_logit_attribution(model, prompts, unit="component", pos=0, metric=metric)
    logits = logits_of(model, padded(token_prompts))
    for row, prompt in enumerate(token_prompts):
        n = len(prompt)
        expected = metric_at(logits[row, :n], SEVERAL, row, metric)
        total = everywhere[row].sum("component", skipna=False).values
        assert np.abs(total[:n] - expected).max() < TOLERANCE
        assert np.isnan(total[n:]).all()
        assert abs(float(last[row].sum()) - expected[-1]) < TOLERANCE
        assert abs(float(first[row].sum()) - expected[0]) < TOLERANCE


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("pos", [-1, 0, "all"])
def test_parts_sum_to_their_component(zoo, tiny_name, token_prompts, padded, directions, processing, pos):
    """heads + b_O = attn_out; neurons + b_out = mlp_out; attn_out + mlp_out = layer."""
    model = zoo.model(tiny_name, processing=processing, dtype=torch.float64)
    prompts = PromptSet.of(token_prompts, **SEVERAL)
    component, head, neuron, layer = (
        direct_logit_attribution(model, prompts, unit=unit, pos=pos)
        for unit in ("component", "head", "neuron", "layer")
    )
    # What the biases contribute, by the definition: centred, scaled by the norm's weight, over the clean scale.
    u, _ = directions(model.weights, SEVERAL, "logit_diff")
    norm = model.weights.ln_final
    if norm.w is not None:
        u = u * norm.w
    if model.spec.norm.kind == "layer":
        u = u - u.mean(-1, keepdim=True)
    tokens = padded(token_prompts)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens)
    if model.spec.norm.kind == "layer":
        resid = resid - resid.mean(-1, keepdim=True)
    scale = (resid.pow(2).mean(-1) + model.spec.norm.eps).sqrt()
    lengths = torch.tensor([len(prompt) for prompt in token_prompts])
    if pos != "all":
        at = lengths - 1 if pos == -1 else torch.full_like(lengths, pos)
        scale = scale[torch.arange(len(at)), at]
    for index, w in enumerate(model.weights.blocks):
        attn_out = component.sel(component=f"{index}_attn_out")
        mlp_out = component.sel(component=f"{index}_mlp_out")
        for parts, whole, bias in (
            (head.sel(layer=index).sum("head", skipna=False), attn_out, w.b_O),
            (neuron.sel(layer=index).sum("neuron", skipna=False), mlp_out, w.b_out),
        ):
            constant = 0 if bias is None else (u @ bias).view(-1, *[1] * (scale.ndim - 1)) / scale
            difference = np.abs(parts.values + np.asarray(constant) - whole.values)
            assert np.nanmax(difference) < 1e-10
        difference = np.abs(attn_out.values + mlp_out.values - layer.sel(layer=index).values)
        assert np.nanmax(difference) < 1e-10
    counted = {int(n) for n in lengths} if pos == "all" else set()
    assert not counted or set(np.isfinite(head.values).all((2, 3)).sum(1).tolist()) == counted


def test_neurons_equal_their_definition(zoo, token_prompts, answers, prompt_set):
    model = zoo.model("llama-gqa")
    got = direct_logit_attribution(model, prompt_set, unit="neuron")
    assert got.dims == ("prompt", "layer", "neuron")
    assert got.shape[1:] == (3, 112)
    for row, prompt in enumerate(token_prompts):
        with torch.no_grad():
            _, cache = zoo.bridge("llama-gqa").run_with_cache(torch.tensor([prompt]))
        W_U = model.weights.W_U.double()
        u = W_U[:, answers["answer"][row]] - W_U[:, answers["wrong"][row]]
        scale = cache["ln_final.hook_scale"][0, -1]
        for layer, w in enumerate(model.weights.blocks):
            expected = cache["post", layer][0, -1] * (w.W_out.double() @ u) / scale
            assert np.abs(got[row, layer].values - expected.numpy()).max() < TOLERANCE


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
@pytest.mark.parametrize("unit", ["head", "component", "layer", "neuron"])
def test_batch_companions_change_nothing(zoo, tiny_name, token_prompts, answers, prompt_set, unit):
    model = zoo.model(tiny_name)
    together = direct_logit_attribution(model, prompt_set, unit=unit)
    for row, prompt in enumerate(token_prompts):
        one = PromptSet.of([prompt], answer=answers["answer"][row : row + 1], wrong=answers["wrong"][row : row + 1])
        alone = direct_logit_attribution(model, one, unit=unit)
        assert np.abs(together[row].values - alone[0].values).max() < 1e-5


@pytest.mark.parametrize("unit", ["head", "component", "layer", "neuron"])
def test_positions_agree_with_all_positions(zoo, token_prompts, answers, unit):
    model = zoo.model("mistral-window")
    long = [row for row, prompt in enumerate(token_prompts) if len(prompt) >= 4]
    prompts = PromptSet.of(
        [token_prompts[row] for row in long], **{key: [column[row] for row in long] for key, column in answers.items()}
    )
    everywhere = direct_logit_attribution(model, prompts, unit=unit, pos="all")
    for pos in (0, 3, -2, -4):
        got = direct_logit_attribution(model, prompts, unit=unit, pos=pos)
        for index, row in enumerate(long):
            expected = everywhere[index, pos % len(token_prompts[row])]
            assert np.abs(got[index].values - expected.values).max() < 1e-5


def test_labels_and_attributes(zoo, prompt_set):
    model = zoo.model("gpt2")
    got = direct_logit_attribution(model, prompt_set)
    assert got.name == "direct_effect"
    assert got.dims == ("prompt", "layer", "head")
    assert got.dtype == np.float32
    assert got.head_label.values[1, 2] == "L1H2"
    assert got.layer.values.tolist() == [0, 1, 2]
    assert got["head"].values.tolist() == [0, 1, 2, 3]
    assert got.prompt.values.tolist() == list(range(7))
    assert got.prompt_id.values.tolist() == list("0123456")
    assert got.attrs["units"] == "logits"
    assert got.attrs["metric"] == "logit_diff"
    assert got.attrs["sign"] == "positive raises the answer"
    assert got.attrs["processing"] == "transformer_lens"
    assert {"long_name", "pos", "final_norm_scale", "model", "dtype"} <= set(got.attrs)
    components = direct_logit_attribution(model, prompt_set, unit="component")
    sites = ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out", "2_attn_out", "2_mlp_out"]
    assert components.component.values.tolist() == [*sites, "bias"]
    rotary = direct_logit_attribution(zoo.model("llama-gqa"), prompt_set, unit="component")
    assert "pos_embed" not in rotary.component.values
    assert direct_logit_attribution(model, prompt_set, pos="all").pos.values.tolist() == list(range(12))


def test_float64_models_give_float64_results(zoo, prompt_set):
    assert direct_logit_attribution(zoo.model("gpt2", dtype=torch.float64), prompt_set).dtype == np.float64


def test_text_prompts_take_the_bos_of_the_tokenizer(zoo, tiny_tokenizer):
    texts = ["When John and Mary went to the", "Tom gave it to"]
    model = zoo.model("gpt2")
    ids = [[tiny_tokenizer.bos_token_id, *tiny_tokenizer(text)["input_ids"]] for text in texts]
    by_text = direct_logit_attribution(model, PromptSet.of(texts, answer=[" Mary", 30], wrong=[" John", 31]))
    mary, john = (tiny_tokenizer(word)["input_ids"][0] for word in (" Mary", " John"))
    by_ids = direct_logit_attribution(model, PromptSet.of(ids, answer=[mary, 30], wrong=[john, 31]))
    assert np.array_equal(by_text.values, by_ids.values)
    assert by_text.prompt_text.values.tolist() == texts


def test_rejected_prompts_are_nan(zoo, token_prompts, answers):
    model = zoo.model("gpt2")
    prompts = PromptSet.of([token_prompts[0], [399, 400, 401], token_prompts[2]], answer=[1, 2, 3], wrong=[4, 5, 6])
    tokenized = prompts.tokenize(model, bad_prompts="reject")
    got = direct_logit_attribution(model, tokenized)
    assert np.isnan(got[1].values).all()
    kept = PromptSet.of([token_prompts[0], token_prompts[2]], answer=[1, 3], wrong=[4, 6])
    expected = direct_logit_attribution(model, kept)
    assert np.abs(got[[0, 2]].values - expected.values).max() < 1e-5


def test_the_model_is_left_as_it_was(zoo, prompt_set, padded, token_prompts):
    model = zoo.model("gpt2")
    taps = Taps.of(3, capture=["z"])
    clean = forward(model.spec, model.weights, padded(token_prompts), taps=taps)
    for unit in ("head", "layer", "component", "neuron"):
        direct_logit_attribution(model, prompt_set, unit=unit, pos="all")
    assert torch.equal(forward(model.spec, model.weights, padded(token_prompts)), clean)
    assert model.weights.sha256() == model.weights_sha256
