"""Parts of a HookedTransformer by name: what they compute when called, their parameters, and what is not there."""

import subprocess
import sys

import pytest
import torch

import fastinterp
from fastinterp import HookedTransformer, HookPoint
from fastinterp.errors import AnswerTokenError, OptionError, SiteRangeError, TokenRangeError, UnsupportedConfigError

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 8, 7, 6, 5, 2]])
NAMES = ["gpt2", "llama-gqa", "gpt-neo", "gpt-neox", "gptj", "qwen3-gqa", "gemma2-softcaps", "phi"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["transformer_lens", "none"])
def processing(request):
    return request.param


@pytest.fixture(params=NAMES)
def model(zoo, request, processing):
    return HookedTransformer(zoo.model(request.param, processing=processing, dtype=torch.float64))


def test_parts_compute_what_they_compute_in_a_run(model):
    logits, cache = model.run_with_cache(TOKENS)
    resid = model.embed(TOKENS)
    assert torch.equal(resid, cache["embed"])
    if model.cfg.positional_embedding_type == "standard":
        assert torch.equal(model.pos_embed(TOKENS), cache["pos_embed"])
        resid = resid + model.pos_embed(TOKENS)
    for layer, block in enumerate(model.blocks):
        attn_out = block.attn(block.ln1(resid))
        attn_out = block.ln1_post(attn_out) if model.model.spec.post_norms else attn_out
        assert torch.allclose(attn_out, cache["attn_out", layer], atol=1e-10)
        mid = resid if model.cfg.parallel_attn_mlp else resid + attn_out
        mlp_out = block.mlp(block.ln2(mid))
        mlp_out = block.ln2_post(mlp_out) if model.model.spec.post_norms else mlp_out
        assert torch.allclose(mlp_out, cache["mlp_out", layer], atol=1e-10)
        assert torch.allclose(block(resid), resid + attn_out + mlp_out, atol=1e-10)
        resid = resid + attn_out + mlp_out
    final = model.unembed(model.ln_final(resid))
    cap = model.model.spec.final_softcap
    assert torch.allclose(final if cap is None else cap * torch.tanh(final / cap), logits, atol=1e-10)


def test_hooks_inside_of_a_part_run_when_it_is_called(model):
    seen = []
    x = torch.randn(2, 5, model.cfg.d_model, dtype=torch.float64)
    names = ["attn.hook_z", "mlp.hook_post", "ln1.hook_scale"]
    for name in names:
        model.add_hook(f"blocks.1.{name}", lambda value, hook: seen.append(hook.name))
    model.blocks[1].ln1(x), model.blocks[1].attn(x), model.blocks[1].mlp(x), model.blocks[0].mlp(x)
    assert seen == [f"blocks.1.{name}" for name in ("ln1.hook_scale", "attn.hook_z", "mlp.hook_post")]
    model.reset_hooks()
    plain = model.blocks[1].attn(x)
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: torch.zeros_like(z))]):
        ablated = model.blocks[1].attn(x)
    assert torch.allclose(ablated, model.b_O[1].expand_as(ablated))
    assert not torch.allclose(ablated, plain)


def test_what_a_part_cannot_be_called_with(zoo):
    model = HookedTransformer(zoo.model("gpt2"))
    x = torch.randn(1, 4, model.cfg.d_model)
    attn = model.blocks[0].attn
    assert torch.equal(attn(query_input=x, key_input=x, value_input=x), attn(x))
    for call in (lambda: attn(x[0]), lambda: attn(x[..., 1:]), lambda: model.blocks[0](x[0]), lambda: attn("text")):
        with pytest.raises(OptionError, match=r"is called with \[batch, pos, 48\]"):
            call()
    with pytest.raises(OptionError, match="hook_k_input"):
        attn(x, x + 1, x)
    with pytest.raises(OptionError, match="past_kv_cache_entry"):
        attn(x, past_kv_cache_entry=object())
    with pytest.raises(TokenRangeError):
        model.embed(torch.tensor([[400]]))
    with pytest.raises(AttributeError, match=r"blocks\.0\.attn has no 'hook_zz'; did you mean 'hook_z'"):
        attn.hook_zz  # noqa: B018
    with pytest.raises(AttributeError, match="folded into the next matrix"):
        model.ln_final.w  # noqa: B018


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_parameters_are_those_of_transformer_lens(zoo, name):
    model, bridge = HookedTransformer(zoo.model(name, dtype=torch.float64)), zoo.bridge(name)
    theirs, ours = bridge.tl_parameters(), model.state_dict()
    group = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    compared = set()
    for key, value in ours.items():
        expected = theirs[key].detach().double() if key in theirs else None
        if expected is None:
            assert not bool(value.any()), key  # a bias that there is not
            continue
        if expected.shape[0] == value.shape[0] * group and "attn" in key:
            expected = expected[::group]
        assert torch.allclose(value, expected.view_as(value), atol=1e-5), key
        compared.add(key)
    left = {key for key in theirs if key not in compared and ".ln" not in key and not key.startswith("ln_final")}
    assert not [key for key in left if bool(theirs[key].any())]
    assert {"embed.W_E", "unembed.W_U", "blocks.1.attn.W_O", "blocks.1.mlp.W_out"} <= compared


def test_parameters_are_views_and_are_counted_once(model):
    given = dict(model.named_parameters())
    sizes = {tensor.data_ptr(): tensor.numel() for _, tensor in model.model.weights.named()}
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(sizes.values())
    assert given.keys() <= model.state_dict().keys()
    before = model(TOKENS)
    value = given["blocks.1.attn.W_V"][0].clone()
    given["blocks.1.attn.W_V"][0] = 0
    assert not torch.allclose(model(TOKENS), before)
    given["blocks.1.attn.W_V"][0] = value
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_circuits_equal_transformer_lens(zoo, name):
    model, bridge = HookedTransformer(zoo.model(name, dtype=torch.float64)), zoo.bridge(name)
    for circuit in ("OV", "QK"):
        ours, theirs = getattr(model, circuit), getattr(bridge, circuit)
        assert ours.shape == theirs.shape == (3, model.cfg.n_heads, 48, 48)
        assert torch.allclose(ours.AB, theirs.AB.detach().double(), atol=1e-5)
        assert torch.allclose(ours.norm(), theirs.norm().detach().double(), atol=1e-4)
        assert torch.allclose(ours[1, 2].S, theirs[1, 2].S.detach().double()[..., : ours.mdim], atol=1e-4)
    full = model.W_E[:20] @ model.OV[1, 2] @ model.W_U[:, :20]
    expected = model.W_E[:20] @ model.W_V.repeat_interleave(model.model.spec.attention.group, 1)[1, 2]
    assert torch.allclose(full.AB, expected @ model.W_O[1, 2] @ model.W_U[:, :20])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_labels_and_biases_equal_transformer_lens(zoo, name):
    model, bridge = HookedTransformer(zoo.model(name, dtype=torch.float64)), zoo.bridge(name)
    assert model.all_head_labels == model.all_head_labels() == bridge.all_head_labels
    for layer, options in [(0, {}), (2, {}), (3, {}), (1, {"mlp_input": True}), (3, {"include_mlp_biases": False})]:
        expected = bridge.accumulated_bias(layer, **options).detach().double()
        assert torch.allclose(model.accumulated_bias(layer, **options), expected, atol=1e-5)
    for layer, mlp_input in ((4, False), (3, True), (-1, False)):
        with pytest.raises(SiteRangeError, match="out of range"):
            model.accumulated_bias(layer, mlp_input)


def test_accumulated_biases_are_those_of_the_cache(model):
    _, cache = model.run_with_cache(TOKENS)
    spec = model.model.spec
    parts, labels = cache.get_full_resid_decomposition(return_labels=True)
    if spec.post_norms and bool(parts[labels.index("bias")].any()):
        with pytest.raises(UnsupportedConfigError, match="get_full_resid_decomposition"):
            model.accumulated_bias(spec.n_layers)
        return
    assert torch.allclose(parts[labels.index("bias")], model.accumulated_bias(spec.n_layers).expand_as(parts[0]))


def test_parts_and_hook_points_by_name(zoo):
    model = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))
    parts = model.mod_dict
    for name in (
        "embed",
        "pos_embed",
        "unembed",
        "ln_final",
        "blocks.1",
        "blocks.1.attn",
        "blocks.1.mlp",
        "blocks.2.ln1",
    ):
        assert name in parts, name
    assert isinstance(parts["blocks.1.attn.hook_z"], HookPoint)
    assert parts["blocks.1.attn.hook_z"] is model.hook_dict["blocks.1.attn.hook_z"]
    x = torch.randn(1, 3, 48, dtype=torch.float64)
    assert torch.equal(parts["blocks.1.mlp"](x), model.blocks[1].mlp(x))


def test_where_a_token_stands(zoo):
    model, bridge = HookedTransformer(zoo.model("gpt2")), zoo.bridge("gpt2")
    text = "John gave the bag to the dog"
    for mode in ("first", "last"):
        for bos in (None, True, False):
            expected = bridge.get_token_position(" the", text, mode=mode, prepend_bos=bos)
            assert model.get_token_position(" the", text, mode=mode, prepend_bos=bos) == expected
    tokens = model.to_tokens(text)
    the = model.to_single_token(" the")
    for given in (tokens, tokens[0]):
        assert model.get_token_position(the, given) == model.get_token_position(torch.tensor(the), given) == 4
    with pytest.raises(AnswerTokenError, match="' and' does not occur in the prompt"):
        model.get_token_position(" and", text)
    with pytest.raises(OptionError, match="one prompt"):
        model.get_token_position(the, tokens.repeat(2, 1))
    with pytest.raises(OptionError, match="'first', 'last'"):
        model.get_token_position(the, tokens, mode="middle")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("load_state_dict", "from_pretrained"),
        ("original_model", "model.model"),
        ("all_composition_scores", r"model\.OV"),
        ("to_token", "to_tokens"),
        ("W_OO", "W_O"),
    ],
)
def test_what_is_not_there_says_what_to_type(zoo, name, hint):
    model = HookedTransformer(zoo.model("gpt2"))
    with pytest.raises(AttributeError, match=f"has no {name!r}.*{hint}"):
        getattr(model, name)


def test_rotary_models_say_why_there_is_no_position_embedding(zoo):
    model = HookedTransformer(zoo.model("llama-gqa"))
    for name in ("W_pos", "W_E_pos"):
        with pytest.raises(AttributeError, match="rotary"):
            getattr(model, name)
    gpt2 = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))
    assert torch.allclose(gpt2.W_E_pos, zoo.bridge("gpt2").W_E_pos.double(), atol=1e-5)


def test_imports_of_a_notebook():
    code = (
        "from fastinterp.utils import get_act_name, to_numpy, remove_batch_dim, test_prompt\n"
        "import fastinterp, fastinterp.utils as utils\n"
        "from fastinterp import HookPoint, FactoredMatrix, ActivationCache, HookedTransformer\n"
        "assert fastinterp.utils.get_act_name is get_act_name is utils.get_act_name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    x = torch.randn(1, 5, 6)
    assert torch.equal(fastinterp.utils.remove_batch_dim(x), x[0])
    assert fastinterp.utils.remove_batch_dim(x[0]).shape == (5, 6)
    assert torch.equal(fastinterp.utils.get_corner(x, 2), x[:2, :2, :2])
    assert torch.equal(fastinterp.utils.transpose(x), x.mT)
