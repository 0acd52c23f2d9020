"""HookedTransformer: inputs, return conventions, parts of the model, text, against TransformerLens and identities."""

import sys

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import AnswerTokenError, FastinterpError, OptionError, PromptTooLongError, TokenRangeError

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
NAMES = ["gpt2", "llama-gqa"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(zoo, name):
    return HookedTransformer(zoo.model(name, dtype=torch.float64))


@pytest.fixture
def bridge(zoo, name):
    return zoo.bridge(name)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_logits_and_losses_equal_transformer_lens(model, bridge):
    expected = bridge(TOKENS, return_type="logits")
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    assert abs(float(model(TOKENS, return_type="loss")) - float(bridge(TOKENS, return_type="loss"))) < 1e-5
    logits, loss = model(TOKENS, return_type="both", loss_per_token=True)
    per_token = bridge(TOKENS, return_type="loss", loss_per_token=True)
    assert loss.shape == (2, 4)
    assert torch.allclose(loss, per_token, atol=1e-5)
    assert torch.allclose(model.loss_fn(logits, TOKENS, per_token=True), per_token, atol=1e-5)
    assert torch.allclose(model(TOKENS, return_type="loss", loss_per_token=True), loss, atol=1e-10)
    assert model(TOKENS, return_type=None) is None


def test_a_full_cache_equals_transformer_lens(model, bridge):
    _, cache = model.run_with_cache(TOKENS)
    _, theirs = bridge.run_with_cache(TOKENS)
    common = [key for key in cache if key in theirs]
    sites = {key.split(".", 2)[-1] for key in common}
    needed = {"hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_post"}
    assert needed | {"mlp.hook_post", "hook_mlp_out", "ln1.hook_scale"} <= sites
    for key in common:
        assert cache[key].shape == theirs[key].shape, key
        difference = (cache[key] - theirs[key].double()).nan_to_num(0.0, 0.0, 0.0)
        mask = torch.isfinite(cache[key])
        if "attn_scores" in key:  # what is masked is minus infinity here, a large negative number there
            mask &= theirs[key] > -1e30
        assert float(difference[mask].abs().max()) < 1e-5, key


def test_texts_are_padded_and_padding_has_no_loss(model):
    texts = ["The cat sat on the mat", "Hello"]
    tokens = model.to_tokens(texts)
    lengths = [len(model.to_str_tokens(text)) for text in texts]
    assert tokens.shape == (2, max(lengths))
    together = model(texts, return_type="loss", loss_per_token=True)
    alone = [model(text, return_type="loss", loss_per_token=True)[0] for text in texts]
    for row, expected in zip(together, alone, strict=True):
        assert torch.allclose(row[: len(expected)], expected, atol=1e-10)
        assert bool(row[len(expected) :].isnan().all())
    mean = float(torch.cat(alone).mean())
    assert abs(float(model(texts, return_type="loss")) - mean) < 1e-10
    assert abs(float(model(texts, return_type="both").loss) - mean) < 1e-10


def test_bos_is_prepended_where_asked(model):
    with_bos, without = model.to_tokens("Hello there"), model.to_tokens("Hello there", prepend_bos=False)
    assert with_bos[0, 0] == model.tokenizer.bos_token_id
    assert torch.equal(with_bos[:, 1:], without)
    assert torch.equal(model("Hello there", prepend_bos=False), model(without))
    never = HookedTransformer(model.model, default_prepend_bos=False)
    assert torch.equal(never.to_tokens("Hello there"), without)
    assert not never.cfg.default_prepend_bos


def test_text_and_tokens(model, bridge):
    text = "John gave the bag to"
    tokens = model.to_tokens(text)
    assert model.to_str_tokens(text) == bridge.to_str_tokens(text)
    assert model.to_str_tokens(tokens) == model.to_str_tokens(tokens[0]) == model.to_str_tokens(text)
    assert model.to_str_tokens(["John", text])[1] == model.to_str_tokens(text)
    assert model.to_string(tokens[0]) == bridge.to_string(tokens[0])
    assert model.to_string(tokens) == bridge.to_string(tokens)
    single = model.to_str_tokens(text, prepend_bos=False)[0]
    token = model.to_single_token(single)
    assert model.to_single_str_token(token) == single == model.to_string(token)
    with pytest.raises(AnswerTokenError, match="not one token"):
        model.to_single_token(text)
    with pytest.raises(OptionError, match="one prompt"):
        model.to_str_tokens(torch.zeros(2, 3).long())
    long = "a b c d e " * 30
    assert model.to_tokens(long).shape == (1, 64)
    assert model.to_tokens(long, truncate=False).shape[1] > 64


def test_residual_directions(model):
    ids = torch.tensor([[3, 4], [5, 6], [7, 8]])
    directions = model.tokens_to_residual_directions(ids)
    assert directions.shape == (3, 2, model.cfg.d_model)
    assert torch.equal(directions[1, 0], model.W_U[:, 5])
    for single in (9, torch.tensor(9), torch.tensor([9]), torch.tensor([[9]])):
        assert torch.equal(model.tokens_to_residual_directions(single), model.W_U[:, 9])


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1])
def test_stopping_and_starting_split_a_run(model, layer):
    stopped = model(TOKENS, stop_at_layer=layer)
    assert stopped.shape == (2, 5, model.cfg.d_model)
    if layer < 3:
        _, cache = model.run_with_cache(TOKENS)
        assert torch.allclose(stopped, cache["resid_pre", layer], atol=1e-12)
    assert torch.allclose(model(stopped, start_at_layer=layer), model(TOKENS), atol=1e-12)
    loss = model(stopped, start_at_layer=layer, return_type="loss", tokens=TOKENS)
    assert abs(float(loss) - float(model(TOKENS, return_type="loss"))) < 1e-12


def test_stopping_and_starting_skip_the_other_layers(model, monkeypatch):
    module = sys.modules["fastinterp.model.forward"]
    ran = []
    block = module.block
    monkeypatch.setattr(module, "block", lambda *args: (ran.append(args[2]), block(*args))[1])
    resid = model(TOKENS, stop_at_layer=1)
    model(resid, start_at_layer=1, stop_at_layer=2)
    assert ran == [0, 1]


def test_parameters_have_transformer_lens_shapes_and_values(model, bridge):
    cfg = model.cfg
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    shapes = {
        "W_E": (cfg.d_vocab, cfg.d_model),
        "W_U": (cfg.d_model, cfg.d_vocab),
        "b_U": (cfg.d_vocab,),
        "W_Q": (3, cfg.n_heads, cfg.d_model, cfg.d_head),
        "W_K": (3, n_kv, cfg.d_model, cfg.d_head),
        "W_V": (3, n_kv, cfg.d_model, cfg.d_head),
        "W_O": (3, cfg.n_heads, cfg.d_head, cfg.d_model),
        "b_Q": (3, cfg.n_heads, cfg.d_head),
        "b_K": (3, n_kv, cfg.d_head),
        "b_O": (3, cfg.d_model),
        "W_in": (3, cfg.d_model, cfg.d_mlp),
        "W_out": (3, cfg.d_mlp, cfg.d_model),
        "b_in": (3, cfg.d_mlp),
        "b_out": (3, cfg.d_model),
    }
    for key, shape in shapes.items():
        assert getattr(model, key).shape == shape, key
    for key in ("W_E", "W_U", "W_Q", "W_O", "W_in", "W_out"):
        assert torch.allclose(getattr(model, key), getattr(bridge, key).double(), atol=1e-5), key
    assert torch.equal(model.blocks[1].attn.W_O, model.W_O[1])
    assert torch.equal(model.blocks[2].mlp.W_in, model.W_in[2])
    assert torch.equal(model.unembed.W_U, model.W_U)
    assert model.embed.W_E is model.W_E
    assert model.blocks[1].attn.hook_z is model.hook_dict["blocks.1.attn.hook_z"]
    resid = model(TOKENS, stop_at_layer=3)
    assert torch.allclose(model.unembed(model.ln_final(resid)), model(TOKENS), atol=1e-12)
    for missing in ("W_gate", "W_pos"):
        if (missing == "W_gate") == (not cfg.gated_mlp) or (missing == "W_pos" and cfg.gated_mlp):
            with pytest.raises(AttributeError, match=missing):
                getattr(model, missing)
    with pytest.raises(AttributeError, match="W_X"):
        _ = model.W_X


def test_caches_can_be_filtered_and_shaped(model):
    _, one = model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_pattern")
    assert list(one.keys()) == ["blocks.0.attn.hook_pattern"]
    names = ["blocks.1.hook_resid_post", "hook_embed"]
    _, several = model.run_with_cache(TOKENS, names_filter=names, return_cache_object=False)
    assert sorted(several) == sorted(names)
    assert isinstance(several, dict)
    _, plain = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert plain["pattern", 0].shape == (model.cfg.n_heads, 5, 5)
    _, sliced = model.run_with_cache(TOKENS, pos_slice=slice(-2, None))
    assert sliced["resid_pre", 0].shape == (2, 2, model.cfg.d_model)
    assert sliced["pattern", 0].shape == (2, model.cfg.n_heads, 2, 5)
    resid, partial = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert not any(key.startswith(("blocks.1.", "ln_final")) for key in partial)
    assert torch.equal(resid, partial["resid_post", 0])


def test_what_is_cached_is_not_copied(model):
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])
    _, stream = model.run_with_cache(TOKENS, names_filter=lambda name: "resid_p" in name)
    assert stream["resid_post", 0].data_ptr() == stream["resid_pre", 1].data_ptr()
    storages = {cache[site, 0].untyped_storage().data_ptr() for site in ("q", "k", "v")}
    assert len(storages) == 1
    # One of them alone does not hold on to the others.
    _, alone = model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_k")
    k = alone["k", 0]
    assert k.untyped_storage().nbytes() == k.numel() * k.element_size()
    assert torch.allclose(k, cache["k", 0], atol=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_refused(model):
    with pytest.raises(TokenRangeError, match="400"):
        model(torch.tensor([[1, 400]]))
    with pytest.raises(PromptTooLongError, match="64"):
        model(torch.ones(1, 65).long())
    with pytest.raises(OptionError, match="start_at_layer"):
        model(torch.zeros(1, 3, 48))
    with pytest.raises(OptionError, match="return_type"):
        model(TOKENS, return_type="logit")
    with pytest.raises(OptionError, match="return_type"):
        model(TOKENS, return_type="None")
    with pytest.raises(OptionError, match="do not go with tokens"):
        model(model(TOKENS, stop_at_layer=1), start_at_layer=1, return_type="loss", tokens=TOKENS[:1])
    with pytest.raises(OptionError, match="do not go with tokens"):
        model.loss_fn(model(TOKENS), TOKENS[:1])
    with pytest.raises(PromptTooLongError, match="64"):
        model(torch.zeros(1, 65, model.cfg.d_model), start_at_layer=1)
    with pytest.raises(TokenRangeError, match="outside"):
        model.tokens_to_residual_directions(torch.tensor([3, 400]))
    with pytest.raises(OptionError, match="from_pretrained"):
        HookedTransformer("gpt2")
    with pytest.raises(OptionError, match="no tokens"):
        model("", prepend_bos=False)
    with pytest.raises(FastinterpError, match="residual stream"):
        model(TOKENS, start_at_layer=1)
    with pytest.raises(OptionError, match="tokens="):
        model(model(TOKENS, stop_at_layer=1), start_at_layer=1, return_type="loss")


def test_moving_keeps_hooks(model):
    model.add_hook("hook_embed", lambda value, hook: value * 0.0)
    before = model(TOKENS)
    assert model.to(torch.float32).cfg.dtype == torch.float32
    assert model.eval() is model
    assert torch.allclose(model.cpu()(TOKENS).double(), before, atol=1e-4)


# Loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "off", [[], ["fold_ln"], ["center_writing_weights"], ["center_unembed"], ["fold_value_biases"]]
)
def test_every_choice_of_processing_gives_the_same_probabilities(zoo, name, off):
    path = str(zoo.directory(name))
    raw = HookedTransformer.from_pretrained_no_processing(path, dtype=torch.float64)
    model = HookedTransformer.from_pretrained(path, torch_dtype=torch.float64, n_devices=1, **dict.fromkeys(off, False))
    assert torch.allclose(model(TOKENS).log_softmax(-1), raw(TOKENS).log_softmax(-1), atol=1e-8)
    assert raw.model.origin.processing == "none"
    assert model.model.origin.processing == ("custom" if off else "transformer_lens")
    assert model.cfg.normalization_type.endswith("Pre") == ("fold_ln" not in off)


def test_refactored_heads_give_the_same_outputs(zoo):
    path = str(zoo.directory("gpt2"))
    options = dict(torch_dtype=torch.float64, refactor_factored_attn_matrices=True)
    model = HookedTransformer.from_pretrained(path, **options)
    plain = HookedTransformer.from_pretrained(path, torch_dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS)
    _, expected = plain.run_with_cache(TOKENS)
    for site in ("pattern", "result", "resid_post"):
        assert torch.allclose(cache[site, 2], expected[site, 2], atol=1e-8), site
    # Rows of W_O are orthogonal, in the order of their size.
    gram = model.W_O[0, 0] @ model.W_O[0, 0].T
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-9
    assert bool((gram.diagonal().diff() <= 1e-12).all())
    with pytest.raises(FastinterpError, match="rotary"):
        HookedTransformer.from_pretrained(str(zoo.directory("llama-gqa")), refactor_factored_attn_matrices=True)


def test_unknown_options_are_refused(zoo):
    with pytest.raises(OptionError, match="center_unembed"):
        HookedTransformer.from_pretrained(str(zoo.directory("gpt2")), centre_unembed=True)
    with pytest.raises(OptionError, match="n_devices"):
        HookedTransformer.from_pretrained(str(zoo.directory("gpt2")), n_devices=2)


# The typed way ------------------------------------------------------------------------------------------------------


def test_run_captures_and_edits(zoo, model):
    from fastinterp.model import Capture, Edit

    run = model.model.run(TOKENS, capture=["z", Capture(name="pattern", layers=(-1,)), "embed"])
    _, cache = model.run_with_cache(TOKENS)
    assert torch.allclose(run["z", 1], cache["z", 1], atol=1e-12)
    assert torch.allclose(run["pattern", -1], cache["pattern", 2], atol=1e-12)
    assert torch.equal(run["embed"], cache["hook_embed"])
    assert run.stacked("z").shape[0] == 3
    assert torch.allclose(run.logits(), model(TOKENS), atol=1e-12)
    assert torch.allclose(run.logits(-1), model(TOKENS)[:, -1], atol=1e-12)
    with pytest.raises(FastinterpError, match="was not captured"):
        run["pattern", 0]
    with pytest.raises(FastinterpError, match=r"run\['z', 0\]"):
        run["z"]
    for bad, error in ((torch.ones(1, 65).long(), PromptTooLongError), (torch.tensor([[400]]), TokenRangeError)):
        with pytest.raises(error):
            model.model.run(bad)
    edited = model.model.run(TOKENS, edits=[Edit(site="z", layer=1, head=2)])

    def zero_head(value, hook):
        value[:, :, 2] = 0.0

    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", zero_head)])
    assert torch.allclose(edited.logits(), expected, atol=1e-12)
