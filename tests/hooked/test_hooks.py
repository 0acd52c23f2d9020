"""Hooks: when they run, in which order, what they may do, and that none stays behind."""

import itertools

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import FastinterpError, UnknownActivationError

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.fixture
def model(zoo):
    return HookedTransformer(zoo.model("llama-gqa", dtype=torch.float64))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def n_hooks(model):
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())


def zero(value, hook):
    value[:] = 0.0


def zeros(value, hook):
    return torch.zeros_like(value)


# What an edit does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_z", "attn.hook_v", "attn.hook_pattern", "mlp.hook_post"])
def test_in_place_and_returned_edits_are_the_same(model, site):
    name = f"blocks.1.{site}"
    clean = model(TOKENS)
    in_place = model.run_with_hooks(TOKENS, fwd_hooks=[(name, zero)])
    returned = model.run_with_hooks(TOKENS, fwd_hooks=[(name, zeros)])
    assert torch.equal(in_place, returned)
    assert not torch.allclose(clean, returned)
    assert torch.equal(model(TOKENS), clean)


def test_an_edit_reaches_what_comes_after_and_nothing_before(model):
    _, clean = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", zero)]):
        _, edited = model.run_with_cache(TOKENS)
    # resid_post of block 0 is the same tensor as resid_pre of block 1, until the latter is edited.
    assert torch.equal(edited["resid_post", 0], clean["resid_post", 0])
    assert float(edited["resid_pre", 1].abs().max()) == 0.0
    assert not torch.allclose(edited["resid_post", 1], clean["resid_post", 1])


def test_an_edit_of_q_leaves_k_and_v_alone(model):
    _, clean = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", zero)]):
        _, edited = model.run_with_cache(TOKENS)
    assert torch.equal(edited["k", 0], clean["k", 0])
    assert torch.equal(edited["v", 0], clean["v", 0])
    # A query of zeros attends to everything alike.
    assert torch.allclose(edited["pattern", 0][0, 0, 3, :4], torch.full((4,), 0.25).double())


def test_hooks_run_in_the_order_in_which_they_were_added(model):
    name = "blocks.0.hook_resid_mid"
    for first, second, expected in (("add", "double", 8.0), ("double", "add", 7.0)):
        steps = {"add": lambda value, hook: value + 1.0, "double": lambda value, hook: value * 2.0}
        start = [(name, lambda value, hook: torch.full_like(value, 3.0))]
        with model.hooks(fwd_hooks=[*start, (name, steps[first]), (name, steps[second])]):
            _, cache = model.run_with_cache(TOKENS, names_filter=name)
        assert float(cache[name].max()) == expected == float(cache[name].min())


def test_prepended_hooks_run_first(model):
    seen = []
    model.add_hook("hook_embed", lambda value, hook: seen.append("later"))
    model.add_hook("hook_embed", lambda value, hook: seen.append("first"), prepend=True)
    model(TOKENS)
    assert seen == ["first", "later"]


def test_a_hook_knows_its_name_and_layer(model):
    seen = []
    model.add_hook(lambda name: name.endswith("hook_z"), lambda value, hook: seen.append((hook.name, hook.layer())))
    model(TOKENS)
    assert seen == [(f"blocks.{layer}.attn.hook_z", layer) for layer in range(3)]
    with pytest.raises(FastinterpError, match="no layer"):
        model.hook_dict["hook_embed"].layer()


def test_ctx_is_kept_until_it_is_cleared(model):
    model.hook_dict["hook_embed"].ctx["a"] = 1
    model.reset_hooks(clear_contexts=False)
    assert model.hook_dict["hook_embed"].ctx == {"a": 1}
    model.reset_hooks()
    assert model.hook_dict["hook_embed"].ctx == {}


def test_a_wrong_shape_is_refused(model):
    with pytest.raises(FastinterpError, match=r"hook_z returned \(5,\)"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: torch.zeros(5))])
    assert n_hooks(model) == 0


def test_an_unknown_name_is_refused_with_a_near_one(model):
    with pytest.raises(UnknownActivationError, match="hook_resid_pre"):
        model.add_hook("blocks.0.hook_resid_per", zero)
    with pytest.raises(UnknownActivationError, match="no position embedding"):
        model.add_hook("hook_pos_embed", zero)


# Nothing stays behind -----------------------------------------------------------------------------------------------


def test_hooks_are_gone_after_a_run_and_after_an_error(model):
    clean = model(TOKENS)

    def fail(value, hook):
        raise KeyError("from the hook")

    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zero)])
    assert n_hooks(model) == 0
    with pytest.raises(KeyError, match="from the hook"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zero), ("blocks.1.attn.hook_z", fail)])
    assert n_hooks(model) == 0
    assert torch.equal(model(TOKENS), clean)


def test_an_unknown_name_among_known_ones_leaves_nothing(model):
    with pytest.raises(UnknownActivationError):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zero), ("hook_embeds", zero)])
    assert n_hooks(model) == 0


def test_contexts_nest(model):
    clean = model(TOKENS)
    half = [("blocks.0.hook_attn_out", lambda value, hook: value * 0.5)]
    none = [("blocks.1.hook_mlp_out", zero)]
    only_half, only_none = (model.run_with_hooks(TOKENS, fwd_hooks=hooks) for hooks in (half, none))
    with model.hooks(fwd_hooks=half):
        assert torch.equal(model(TOKENS), only_half)
        with model.hooks(fwd_hooks=none):
            both = model(TOKENS)
        assert not torch.equal(both, only_half)
        assert not torch.equal(both, only_none)
        with pytest.raises(RuntimeError, match="inside"), model.hooks(fwd_hooks=none):
            raise RuntimeError("inside")
        assert torch.equal(model(TOKENS), only_half)
        # A run of its own inside of a context takes its hooks away, and the context's stay.
        model.run_with_hooks(TOKENS, fwd_hooks=none)
        assert torch.equal(model(TOKENS), only_half)
    assert torch.equal(model(TOKENS), clean)


def test_permanent_hooks_survive_all_but_being_named(model):
    clean = model(TOKENS)
    model.add_perma_hook("blocks.0.attn.hook_z", zeros)
    model.add_hook("blocks.1.attn.hook_z", zeros)
    model.reset_hooks()
    once = model(TOKENS)
    assert not torch.equal(once, clean)
    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", zeros)])
    assert torch.equal(model(TOKENS), once)
    assert n_hooks(model) == 1
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(TOKENS), clean)


def test_reset_takes_one_direction(model):
    model.add_hook("hook_embed", zero)
    model.add_hook("hook_embed", lambda value, hook: None, dir="bwd")
    model.reset_hooks(direction="bwd")
    assert [len(h) for h in (model.hook_dict["hook_embed"].fwd_hooks, model.hook_dict["hook_embed"].bwd_hooks)] == [
        1,
        0,
    ]


def test_hooks_can_be_left_on_purpose(model):
    clean = model(TOKENS)
    edited = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", zeros)], reset_hooks_end=False)
    assert torch.equal(model(TOKENS), edited)
    model.reset_hooks()
    assert torch.equal(model(TOKENS), clean)


def test_any_sequence_of_operations_leaves_what_a_list_of_hooks_says(model):
    """Against a registry that is a list of (name, permanent), which every operation changes in the obvious way."""
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.2.hook_resid_post"]
    expected: list[tuple[str, bool]] = []
    generator = torch.Generator().manual_seed(3)
    for step in range(200):
        name = names[int(torch.randint(3, (), generator=generator))]
        match int(torch.randint(6, (), generator=generator)):
            case 0 | 1:
                model.add_hook(name, zeros)
                expected.append((name, False))
            case 2:
                model.add_perma_hook(name, zeros)
                expected.append((name, True))
            case 3:
                model.reset_hooks(including_permanent=step % 5 == 0)
                expected = [] if step % 5 == 0 else [entry for entry in expected if entry[1]]
            case 4:
                model.run_with_hooks(TOKENS[:1, :2], fwd_hooks=[(name, zeros)], return_type=None)
            case 5:
                with model.hooks(fwd_hooks=[(name, zeros), (names[0], zero)]), model.hooks(fwd_hooks=[(name, zero)]):
                    model.add_hook(names[1], zeros)
                expected.append((names[1], False))
        found = [(point.name, hook.is_permanent) for point in model.points for hook in point.fwd_hooks]
        assert sorted(found) == sorted(expected)


# Large activations --------------------------------------------------------------------------------------------------


def test_large_activations_are_there_by_name_and_by_flag(model):
    everything = set(model.run_with_cache(TOKENS)[1].keys())
    gated = ["attn.hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"]
    for name in gated:
        assert f"blocks.1.{name}" not in everything
        _, cache = model.run_with_cache(TOKENS, names_filter=f"blocks.1.{name}")
        assert list(cache.keys()) == [f"blocks.1.{name}"]
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda full, name=name: full.endswith(name))
        assert list(cache.keys()) == [f"blocks.{layer}.{name}" for layer in range(3)]
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    keys = set(model.run_with_cache(TOKENS)[1].keys())
    added = {"attn.hook_result", "hook_q_input", "hook_k_input", "hook_v_input"}
    assert keys - everything == {f"blocks.{layer}.{name}" for layer in range(3) for name in added}
    assert model.cfg.use_attn_result
    assert not model.cfg.use_attn_in


@pytest.mark.parametrize("site", ["hook_q_input", "hook_k_input", "hook_v_input"])
def test_the_inputs_of_single_heads_can_be_edited(model, site):
    """A head whose input is replaced by zeros has the q, k or v of a residual of zeros; all other heads keep theirs."""
    letter = site[5]
    n = model.cfg.n_heads if letter == "q" else model.cfg.n_key_value_heads

    def zero_last(value, hook):
        assert value.shape == (2, 5, n, model.cfg.d_model)
        value[:, :, n - 1] = 0.0

    _, clean = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[(f"blocks.1.{site}", zero_last)]):
        _, edited = model.run_with_cache(TOKENS)
    assert float(edited[letter, 1][:, :, n - 1].abs().max()) == 0.0
    assert torch.allclose(edited[letter, 1][:, :, : n - 1], clean[letter, 1][:, :, : n - 1], atol=1e-12)
    for other in {"q", "k", "v"} - {letter}:
        assert torch.equal(edited[other, 1], clean[other, 1])


def test_the_attention_input_can_be_edited_where_heads_do_not_share_keys(zoo, model):
    full = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))

    def zero_first(value, hook):
        value[:, :, 0] = 0.0

    _, clean = full.run_with_cache(TOKENS)
    with full.hooks(fwd_hooks=[("blocks.1.hook_attn_in", zero_first)]):
        _, edited = full.run_with_cache(TOKENS)
    block = full.model.weights.blocks[1]
    for letter, bias in (("q", block.b_Q), ("k", block.b_K), ("v", block.b_V)):
        assert torch.allclose(edited[letter, 1][:, :, 0], bias[0].expand(2, 5, -1), atol=1e-12)
        assert torch.allclose(edited[letter, 1][:, :, 1:], clean[letter, 1][:, :, 1:], atol=1e-12)
    with pytest.raises(FastinterpError, match="q_input"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_attn_in", zero_first)])


def test_the_mlp_input_can_be_edited_without_the_residual(model):
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", zero)]):
        _, edited = model.run_with_cache(TOKENS)
    _, clean = model.run_with_cache(TOKENS)
    assert torch.equal(edited["resid_mid", 1], clean["resid_mid", 1])
    assert float(edited["mlp_out", 1].abs().max()) == 0.0
    assert torch.equal(edited["resid_post", 1], clean["resid_mid", 1])


def test_hooks_on_result_change_the_output_of_one_head(model):
    def without_head_2(value, hook):
        value[:, :, 2] = 0.0

    def z_without_head_2(value, hook):
        value[:, :, 2] = 0.0

    by_result = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_result", without_head_2)])
    by_z = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", z_without_head_2)])
    assert torch.allclose(by_result, by_z, atol=1e-10)


def test_all_pairs_of_sites_can_be_hooked_together(model):
    attention = ["attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_result"]
    clean = model(TOKENS)
    seen = []
    for pair in itertools.combinations(["hook_resid_pre", "hook_q_input", *attention, "ln2.hook_scale"], 2):
        seen.clear()
        hooks = [(f"blocks.1.{site}", lambda value, hook: seen.append(hook.name)) for site in pair]
        assert torch.allclose(model.run_with_hooks(TOKENS, fwd_hooks=hooks), clean, atol=1e-10)
        assert seen == [f"blocks.1.{site}" for site in pair]


# Copies -------------------------------------------------------------------------------------------------------------


def test_what_a_hook_returns_stays_as_it_is(model):
    """Patching from another run's cache, with an ablation in place behind it, must not reach that cache."""
    name = "blocks.1.attn.hook_z"
    _, clean = model.run_with_cache(TOKENS)
    kept = clean[name].clone()
    with model.hooks(fwd_hooks=[(name, lambda value, hook: clean[name]), (name, zero)]):
        _, edited = model.run_with_cache(TOKENS)
    assert torch.equal(clean[name], kept)
    assert float(edited[name].abs().max()) == 0.0
    own = torch.ones_like(kept)
    with model.hooks(fwd_hooks=[(name, lambda value, hook: own)]):
        _, patched = model.run_with_cache(TOKENS)
    own += 5.0
    assert float(patched[name].max()) == 1.0
    resid = model(TOKENS, stop_at_layer=1)
    _, later = model.run_with_cache(resid, start_at_layer=1)
    resid += 5.0
    assert torch.equal(later["resid_pre", 1], model(TOKENS, stop_at_layer=1))


def test_a_hook_that_was_left_is_not_taken_away_by_the_next_run(model):
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zeros)], reset_hooks_end=False)
    model.add_hook("hook_embed", zeros, level=1)
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zeros)])
    assert n_hooks(model) == 2
    model.reset_hooks(level=1)
    assert n_hooks(model) == 1


def test_contexts_may_end_in_any_order(model):
    first, second = model.hooks(fwd_hooks=[("hook_embed", zeros)]), model.hooks(fwd_hooks=[("hook_embed", zero)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [hook.fn for hook in model.hook_dict["hook_embed"].fwd_hooks] == [zero]
    second.__exit__(None, None, None)
    assert n_hooks(model) == 0


def test_a_predicate_that_means_a_large_activation_gets_it(model):
    wanted = {"blocks.0.attn.hook_z", "blocks.0.hook_q_input", "blocks.1.attn.hook_result"}
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name in wanted)
    assert set(cache) == wanted
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith(("hook_z", "hook_result")))
    assert len(cache) == 6
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "attn" in name)
    assert not any("result" in name or "hook_attn_in" in name for name in cache)


def test_edits_of_a_norm_are_not_lost_where_heads_have_inputs_of_their_own(model):
    double = [("blocks.1.ln1.hook_normalized", lambda value, hook: value * 2)]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=double)
    with model.hooks(fwd_hooks=double):
        _, read = model.run_with_cache(TOKENS, names_filter="blocks.1.hook_q_input")
        logits, _ = model.run_with_cache(TOKENS, names_filter="blocks.1.hook_q_input")
        assert list(read) == ["blocks.1.hook_q_input"]
        assert torch.allclose(logits, expected, atol=1e-12)
        with pytest.raises(FastinterpError, match="one or the other"):
            model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_q_input", zeros)])


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_arguments_of_hooks_are_refused(model):
    with pytest.raises(FastinterpError, match="direction"):
        model.reset_hooks(direction="forward")
    with pytest.raises(FastinterpError, match="dir"):
        model.add_hook("hook_embed", zero, dir="backward")
    with pytest.raises(FastinterpError, match=r"float32.*\.to\(activation.dtype\)"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda value, hook: value.float())])
    with pytest.raises(AttributeError, match="cannot be set"):
        model.W_O = model.W_O * 0
    with pytest.raises(AttributeError, match="cannot be set"):
        model.blocks[0].attn.W_O = model.W_O[0]
    assert n_hooks(model) == 0
