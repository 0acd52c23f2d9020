"""Names, errors and metrics: the vocabulary that everything else speaks."""

import inspect

import pytest
import torch

from fastinterp import errors, names
from fastinterp.metrics import METRICS, answer_direction, evaluate, evaluate_loss, get_metric

# Names ------------------------------------------------------------------------------------------------------------


def test_every_activation_knows_its_dims_and_hook():
    axes = {"batch", "pos", "query_pos", "key_pos", "head", "kv_head", "d_model", "d_head", "d_mlp", "one"}
    for name, activation in names.ACTIVATIONS.items():
        assert activation.name == name
        assert activation.dims[0] == "batch"
        assert set(activation.dims) <= axes
        assert activation.per_layer == activation.hook.startswith("blocks.{layer}.")
    hooks = [activation.hook for activation in names.ACTIVATIONS.values()]
    assert len(set(hooks)) == len(hooks)


# What a bridge has under another name, or only for other families; tests/families compares their values.
OTHERWISE = {"pos_embed", "ln1_post_scale", "ln1_post_normalized", "ln2_post_scale", "ln2_post_normalized"}
# Hook points of HookedTransformer that a bridge has only behind its flags.
INPUTS = {"attn_in", "q_input", "k_input", "v_input", "mlp_in"}


def test_hooks_are_those_of_transformer_lens(zoo):
    bridge = zoo.bridge("llama-gqa")
    bridge.set_use_attn_result(True)
    try:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.arange(4)[None])
    finally:
        bridge.set_use_attn_result(False)
    known = {*bridge.hook_dict, *cache.keys()}
    absent = {name for name, activation in names.ACTIVATIONS.items() if activation.hook.format(layer=0) not in known}
    assert absent <= OTHERWISE | INPUTS
    assert names.ACTIVATIONS["pos_embed"].hook in zoo.bridge("gpt2").run_with_cache(torch.arange(4)[None])[1]


@pytest.mark.parametrize(("given", "suggested"), [("resid_pst", "resid_post"), ("mlp_ot", "mlp_out")])
def test_unknown_activations_get_suggestions(given, suggested):
    with pytest.raises(errors.UnknownActivationError, match=f"'{given}'.*did you mean '{suggested}'"):
        names.activation(given)


def test_unknown_activations_get_the_whole_list():
    with pytest.raises(errors.UnknownActivationError, match=r"'42' \(all: embed, .*ln_final_normalized\)"):
        names.activation("42")


@pytest.mark.parametrize(("index", "expected"), [(0, 0), (11, 11), (-1, 11), (-12, 0)])
def test_indices_count_from_both_ends(index, expected):
    assert names.check_index("layer", index, 12) == expected


@pytest.mark.parametrize("index", [12, -13, 1000])
@pytest.mark.parametrize("what", ["layer", "head", "kv_head", "neuron"])
def test_indices_out_of_range_are_refused(what, index):
    with pytest.raises(errors.SiteRangeError, match=rf"{what} {index} is out of range.*12 \(0 to 11\)"):
        names.check_index(what, index, 12)


def test_labels_are_those_of_transformer_lens(zoo):
    bridge = zoo.bridge("gpt2")
    _, cache = bridge.run_with_cache(torch.arange(4)[None])
    assert names.accumulated_labels(3, has_mid=True) == cache.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert names.residual_labels(3, has_pos_embed=True) == cache.decompose_resid(return_labels=True)[1]
    heads = [names.head_label(layer, head) for layer in range(3) for head in range(4)]
    assert heads == cache.stack_head_results(return_labels=True)[1]
    assert names.accumulated_labels(2, has_mid=False) == ["0_pre", "1_pre", "final_post"]
    assert names.residual_labels(1, has_pos_embed=False) == ["embed", "0_attn_out", "0_mlp_out"]


# Errors -----------------------------------------------------------------------------------------------------------


def test_every_error_is_also_the_builtin_that_fits():
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    raised = [cls for cls in classes if issubclass(cls, errors.FastinterpError)]
    assert len(raised) > 15
    for cls in raised:
        assert cls.__doc__
        if cls is not errors.FastinterpError:
            assert issubclass(cls, ValueError | TypeError | ArithmeticError | IndexError | RuntimeError), cls


def test_nearest_suggests_or_stays_silent():
    assert errors.nearest("logit_dif", ["loss", "logit_diff", "logit"]).startswith("; did you mean 'logit_diff'")
    assert errors.nearest("zzz", ["loss", "logit_diff"]) == ""
    assert errors.nearest(None, ["loss"]) == ""


def test_choices_are_listed():
    errors.check_choice("mode", "zero", ["zero", "mean"])
    with pytest.raises(errors.OptionError, match=r"mode='zeros' is not known: choose from 'zero', 'mean'; did you"):
        errors.check_choice("mode", "zeros", ["zero", "mean"])


# Metrics ----------------------------------------------------------------------------------------------------------

D_MODEL, D_VOCAB, BATCH, VARIANTS = 12, 50, 4, 3


@pytest.fixture
def made():
    """Residuals, unembedding and answers of different numbers of alternatives, with their literal logits."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, W_U, b_U = randn(VARIANTS, BATCH, D_MODEL), randn(D_MODEL, D_VOCAB), randn(D_VOCAB)
    answer = torch.tensor([[3, 7, 9], [4, -1, -1], [0, 49, -1], [8, 2, 5]])
    wrong = torch.tensor([[1, -1], [2, 5], [11, -1], [0, 9]])
    return x, W_U, b_U, answer, wrong


def literal(name, logits, answer, wrong):
    """The metrics as one would write them down, prompt by prompt."""
    columns = []
    for row in range(BATCH):
        right = [token for token in answer[row].tolist() if token >= 0]
        other = [token for token in wrong[row].tolist() if token >= 0]
        values = logits[:, row]
        match name:
            case "logit":
                columns.append(values[:, right].mean(-1))
            case "logit_diff":
                columns.append(values[:, right].mean(-1) - values[:, other].mean(-1))
            case "logprob":
                columns.append(values.softmax(-1)[:, right].sum(-1).log())
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["logit", "logit_diff", "logprob"])
def test_metrics_equal_their_definition(made, name, bias):
    x, W_U, b_U, answer, wrong = made
    b = b_U if bias else None
    logits = x @ W_U + (b_U if bias else 0)
    value = evaluate(METRICS[name], x, W_U, b, answer, wrong)
    torch.testing.assert_close(value, literal(name, logits, answer, wrong), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["logit", "logprob"])
def test_metrics_that_need_no_wrong_answer_ignore_it(made, name):
    x, W_U, b_U, answer, wrong = made
    value = evaluate(METRICS[name], x, W_U, b_U, answer, None)
    assert torch.equal(value, evaluate(METRICS[name], x, W_U, b_U, answer, wrong))


def test_direction_and_constant_give_the_logit_diff(made):
    x, W_U, b_U, answer, wrong = made
    u, c = answer_direction(W_U, b_U, answer, wrong)
    expected = literal("logit_diff", x @ W_U + b_U, answer, wrong)
    torch.testing.assert_close(torch.einsum("vbd,bd->vb", x, u) + c, expected, rtol=0, atol=1e-12)


def test_loss_is_minus_the_logprob_of_the_next_token(made):
    _, W_U, b_U, _, _ = made
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(VARIANTS, BATCH, 6, D_MODEL, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, D_VOCAB, (BATCH, 6), generator=generator)
    n_tokens = torch.tensor([6, 1, 4, 2])
    loss = evaluate_loss(x, W_U, b_U, tokens, n_tokens)
    logprobs = (x @ W_U + b_U).log_softmax(-1)
    for row, n in enumerate(n_tokens.tolist()):
        assert bool(torch.isnan(loss[:, row, n - 1 :]).all())
        for pos in range(n - 1):
            expected = -logprobs[:, row, pos, tokens[row, pos + 1]]
            torch.testing.assert_close(loss[:, row, pos], expected, rtol=0, atol=1e-12)


def test_loss_of_prompts_of_one_token_is_nan_everywhere(made):
    _, W_U, b_U, _, _ = made
    x = torch.ones(1, 2, 1, D_MODEL, dtype=torch.float64)
    loss = evaluate_loss(x, W_U, b_U, torch.tensor([[1], [2]]), torch.tensor([1, 1]))
    assert loss.shape == (1, 2, 1)
    assert bool(torch.isnan(loss).all())


def test_metrics_describe_themselves():
    assert list(METRICS) == ["logit_diff", "logit", "logprob", "prob", "rank", "top1", "kl", "loss"]
    units = {"logit_diff": "logits", "logit": "logits", "prob": "1", "rank": "tokens", "top1": "1"}
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.units == units.get(name, "nats")
        assert metric.linear == name.startswith("logit")
        assert metric.per_token == (name == "loss")
        assert metric.relative == (name == "kl")
    assert METRICS["logit_diff"].needs == ("answer", "wrong")
    assert METRICS["loss"].needs == ()


def test_the_table_of_metrics_cannot_be_changed():
    with pytest.raises(TypeError):
        METRICS["mine"] = METRICS["loss"]


def test_unknown_metrics_are_refused():
    with pytest.raises(
        errors.MetricError, match=r"'logitdiff'.*logit_diff, logit, logprob, prob, rank, top1, kl, loss; did you mean"
    ):
        get_metric("logitdiff")
