"""Arguments that TransformerLens has: accepted where they change nothing, else refused by name; model.cfg."""

import dataclasses

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import OptionError

TEXTS = ["The cat sat on the mat", "Hello"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(zoo):
    return HookedTransformer(zoo.model("gpt2", dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"past_kv_cache": None},
        {"shortformer_pos_embed": None, "position_ids": None},
        {"padding_side": "right"},
        {"attention_mask": None},
    ],
)
def test_what_says_nothing_changes_nothing(model, options):
    expected = model(TEXTS)
    assert torch.equal(model(TEXTS, **options), expected)
    assert torch.equal(model.run_with_cache(TEXTS, **options)[0], model.run_with_cache(TEXTS)[0])
    assert torch.equal(model.run_with_hooks(TEXTS, fwd_hooks=[], **options), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_mask_of_what_is_there_is_accepted(model, dtype):
    tokens = model.to_tokens(TEXTS)
    lengths = torch.tensor([len(model.to_str_tokens(text)) for text in TEXTS])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(dtype)
    assert torch.equal(model(TEXTS, attention_mask=mask), model(TEXTS))
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))
    assert torch.equal(model(tokens[0], attention_mask=torch.ones(tokens.shape[1])), model(tokens[0]))
    # Of tokens, only the mask can say what is padding; it has no loss, just as with texts.
    assert not torch.allclose(model(tokens, return_type="loss"), model(TEXTS, return_type="loss"))
    assert torch.allclose(model(tokens, return_type="loss", attention_mask=mask), model(TEXTS, return_type="loss"))
    resid = model(tokens, stop_at_layer=1)
    loss = model(resid, return_type="loss", start_at_layer=1, tokens=tokens, attention_mask=mask)
    assert torch.allclose(loss, model(TEXTS, return_type="loss"))


def test_the_masked_loss_equals_transformer_lens(model, zoo):
    tokens = model.to_tokens(TEXTS)
    lengths = torch.tensor([len(model.to_str_tokens(text)) for text in TEXTS])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    expected = zoo.bridge("gpt2")(tokens, return_type="loss", attention_mask=mask)
    assert abs(float(model(tokens, return_type="loss", attention_mask=mask)) - float(expected)) < 1e-5


def test_other_masks_are_refused(model):
    tokens = model.to_tokens(TEXTS)
    left, hole = torch.ones_like(tokens), torch.ones_like(tokens)
    left[1, :2] = 0
    hole[0, 2] = 0
    for mask in (left, hole, torch.zeros_like(tokens)):
        with pytest.raises(OptionError, match="padded on the right"):
            model(tokens, attention_mask=mask)
        with pytest.raises(OptionError, match="padded on the right"):
            model(model(tokens, stop_at_layer=1), start_at_layer=1, attention_mask=mask)
    with pytest.raises(OptionError, match=r"attention_mask has shape \(2, 1\)"):
        model(tokens, attention_mask=left[:, :1])
    with pytest.raises(OptionError, match="leave it out"):
        model(TEXTS, attention_mask=torch.ones_like(tokens))


def test_what_would_change_something_is_refused(model):
    with pytest.raises(OptionError, match=r"past_kv_cache must be None: generate\(\)"):
        model(TEXTS, past_kv_cache=object())
    with pytest.raises(TypeError, match="unexpected keyword argument 'prepend_boss'"):
        model(TEXTS, prepend_boss=False)
    with pytest.raises(OptionError, match="padding_side='left'"):
        model(TEXTS, padding_side="left")
    with pytest.raises(OptionError, match="padding_side='left'"):
        model.to_tokens(TEXTS, padding_side="left")
    assert torch.equal(model("Hello", padding_side="left"), model("Hello"))


def test_text_takes_the_arguments_of_transformer_lens(model, zoo):
    bridge = zoo.bridge("gpt2")
    options = {"prepend_bos": True, "padding_side": "right", "move_to_device": True, "truncate": True}
    assert torch.equal(model.to_tokens(TEXTS, **options), bridge.to_tokens(TEXTS, **options))
    assert torch.equal(model.to_tokens(TEXTS, True, "right"), bridge.to_tokens(TEXTS, True, "right"))
    assert model.to_tokens("Hello", move_to_device=False).device.type == "cpu"
    assert model.to_str_tokens("Hello", padding_side="left") == model.to_str_tokens("Hello")
    assert model.get_token_position(0, "Hello", padding_side="left") == 0
    texts = model.generate(TEXTS, max_new_tokens=2, do_sample=False, padding_side="left", stop_at_eos=False)
    assert texts == model.generate(TEXTS, max_new_tokens=2, do_sample=False, stop_at_eos=False)
    with pytest.raises(OptionError, match="padding_side='left'"):
        model.generate(TEXTS, max_new_tokens=2, padding_side="left", return_type="tokens")


def test_input_to_embed(model, zoo):
    residual, tokens, nothing, mask = model.input_to_embed(TEXTS)
    theirs, their_tokens, _, _ = zoo.bridge("gpt2").input_to_embed(TEXTS, padding_side="right")
    assert torch.equal(tokens, their_tokens)
    assert torch.allclose(residual, theirs.double(), atol=1e-5)
    assert nothing is None
    assert mask is None
    assert torch.allclose(model(residual, start_at_layer=0), model(TEXTS), atol=1e-10)
    with model.hooks([("hook_embed", lambda embed, hook: embed * 0)]):
        assert torch.allclose(model.input_to_embed(TEXTS)[0], model.pos_embed(tokens))


NAMES = ["gpt2", "llama-gqa", "gemma2-softcaps", "gpt-neo", "gptj"]
SAME = ["n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx"]
SAME += ["eps", "gated_mlp", "final_rms", "attn_only", "parallel_attn_mlp", "positional_embedding_type"]
SAME += ["attention_dir", "default_prepend_bos", "n_devices", "attn_scores_soft_cap", "output_logits_soft_cap"]
SAME += ["use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_equal_transformer_lens(zoo, name):
    ours, theirs = HookedTransformer(zoo.model(name)).cfg, zoo.bridge(name).cfg
    for key in SAME:
        assert (getattr(ours, key) or None) == (getattr(theirs, key) or None), key
    for key in ("window_size", "rotary_dim"):
        if getattr(theirs, key, None) is not None:
            assert getattr(ours, key) == getattr(theirs, key), key
    values = ours.to_dict()
    assert {field.name for field in dataclasses.fields(ours)} - {"rotary"} <= values.keys()
    assert ("rotary_dim" in values) == (ours.positional_embedding_type == "rotary")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_transformer_lens_does(zoo, name):
    model = HookedTransformer(zoo.model(name))
    blocks = [value for key, value in model.state_dict().items() if key.startswith("blocks") and ".W_" in key]
    assert model.cfg.n_params == sum(value.numel() for value in blocks)


def test_settings_that_there_are_not(zoo):
    cfg = HookedTransformer(zoo.model("gpt2")).cfg
    for name, hint in (
        ("n_layer", "did you mean 'n_layers'"),
        ("rotary_dim", "not rotary"),
        ("checkpoint_index", "revision"),
        ("num_experts", "no supported model"),
    ):
        with pytest.raises(AttributeError, match=f"model.cfg has no {name!r}.*{hint}"):
            getattr(cfg, name)
    assert getattr(cfg, "seed_of_nothing", 3) == 3
