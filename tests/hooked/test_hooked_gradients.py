"""Gradients: backward hooks and gradient caches against autograd through Hugging Face."""

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import FastinterpError

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 17, 23, 40], [9, 8, 7, 6, 5, 300, 2, 77]])

# The matrix behind z, and the one behind the MLP's hidden activations, in every family's names.
OUTPUTS = {"z": ("o_proj", "out_proj", "dense", "attn.c_proj"), "post": ("down_proj", "mlp.c_proj", "fc2", "fc_out")}


def gradients_by_hugging_face(hf, tokens):
    """Gradients of the mean loss with respect to the residual stream, z and the MLP's hidden activations."""
    inputs = {"z": {}, "post": {}}
    handles = []
    for name, module in hf.named_modules():
        layers = [part for part in name.split(".") if part.isdigit()]
        for site, endings in OUTPUTS.items():
            ends = name.endswith(endings) or (site == "post" and name.endswith("dense_4h_to_h"))
            if not layers or not ends or (site == "z" and "mlp" in name):
                continue

            def keep(module, args, site=site, layer=int(layers[0])):
                args[0].retain_grad()
                inputs[site][layer] = args[0]

            handles.append(module.register_forward_pre_hook(keep))
    embeds = hf.get_input_embeddings()(tokens).detach().requires_grad_()
    output = hf(inputs_embeds=embeds, output_hidden_states=True)
    hidden = output.hidden_states[:-1]
    for state in hidden:
        state.retain_grad()
    logits = output.logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for handle in handles:
        handle.remove()
    return float(loss.detach()), [state.grad for state in hidden], inputs


def test_the_gradient_cache_equals_autograd_through_hugging_face(zoo, gradient_name):
    hf = zoo.hf(gradient_name)
    model = HookedTransformer.from_pretrained_no_processing(hf)
    loss, resid_pre, inputs = gradients_by_hugging_face(hf, TOKENS)
    got, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert abs(float(got.detach()) - loss) < 1e-5
    n_layers = model.cfg.n_layers
    assert len(resid_pre) == len(inputs["z"]) == len(inputs["post"]) == n_layers
    for layer in range(n_layers):
        expected = {
            # Layer 0: some families multiply or add to the embedding in front of the first hidden state.
            "hook_resid_pre": resid_pre[layer],
            "attn.hook_z": inputs["z"][layer].grad.view_as(cache["z", layer]),
            "mlp.hook_post": inputs["post"][layer].grad.view_as(cache["post", layer]),
        }
        for site, gradient in expected.items():
            found = cache[f"blocks.{layer}.{site}_grad"]
            assert float(gradient.abs().max()) > 1e-6
            assert float((found - gradient).abs().max()) < 1e-4 * float(gradient.abs().max()), (layer, site)


@pytest.fixture
def model(zoo):
    return HookedTransformer(zoo.model("llama-gqa", dtype=torch.float64))


@pytest.mark.parametrize("split", [False, True])
def test_every_activation_has_its_gradient(model, split):
    """Against a finite difference along a random direction, for every name of a full cache."""
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(split)
    model.set_use_hook_mlp_in(True)
    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    names = [name for name in cache if not name.endswith("_grad")]
    # Where every head has an input of its own, the norm of the common one leads nowhere.
    unused = {name for name in names if ".ln1." in name} if split else set()
    assert {f"{name}_grad" for name in names if name not in unused} | set(names) == set(cache)
    assert len(names) > 60
    generator = torch.Generator().manual_seed(0)

    def shifted(name, change):
        hooks = [(name, lambda value, hook: torch.where(change != 0, value + change, value))]
        with torch.no_grad():
            return float(model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks))

    for name in names:
        if name in unused:
            continue
        direction = torch.randn(cache[name].shape, generator=generator, dtype=torch.float64)
        if name.endswith("attn_scores"):
            direction = direction.tril()
        step = 1e-6
        expected = (shifted(name, step * direction) - shifted(name, -step * direction)) / (2 * step)
        found = float((cache[f"{name}_grad"].where(direction != 0, 0.0) * direction).sum())
        assert abs(found - expected) < 1e-6 * max(1.0, abs(expected)), name


def test_backward_hooks_see_and_replace_gradients(model):
    seen = {}

    def keep(gradient, hook):
        seen[hook.name] = gradient.clone()

    def drop(gradient, hook):
        return torch.zeros_like(gradient)

    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre"]
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model(TOKENS, return_type="loss").backward()
    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    for name in names:
        assert torch.allclose(seen[name], cache[f"{name}_grad"], atol=1e-14)
    # Where the gradient of the residual is dropped, nothing in front of it gets any.
    seen.clear()
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", drop), *[(name, keep) for name in names]]):
        model(TOKENS, return_type="loss").backward()
    assert float(seen["blocks.0.attn.hook_z"].abs().max()) == 0.0


def test_backward_hooks_of_one_tensor_run_from_the_later_name_to_the_earlier(model):
    """resid_post of a block and resid_pre of the next are one tensor; a gradient passes them one after the other."""
    order = []

    def drop(gradient, hook):
        order.append(hook.name)
        return gradient * 0.0

    def note(gradient, hook):
        order.append(hook.name)
        assert float(gradient.abs().max()) == 0.0

    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    with model.hooks(bwd_hooks=[(names[0], note), (names[1], drop)]):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=names)
    assert order == names[::-1]
    assert float(cache[f"{names[0]}_grad"].abs().max()) == 0.0


def test_the_input_of_one_head_has_its_gradient_beside_that_of_all(zoo):
    full = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))
    name, both = "blocks.1.hook_q_input", ["blocks.1.hook_q_input", "blocks.1.hook_attn_in"]
    _, alone = full.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=name)
    _, beside = full.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=both)
    assert torch.allclose(alone[f"{name}_grad"], beside[f"{name}_grad"], atol=1e-14)
    assert not torch.allclose(alone[f"{name}_grad"], beside[f"{both[1]}_grad"], atol=1e-6)


@pytest.mark.parametrize("site", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.2.attn.hook_pattern"])
def test_gradients_begin_anew_behind_a_constant(model, site):
    with torch.no_grad():
        _, clean = model.run_with_cache(TOKENS)
    _, expected = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    with model.hooks(fwd_hooks=[(site, lambda value, hook: clean[site])]):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    for name in (site, "blocks.2.hook_resid_post"):
        assert torch.allclose(cache[f"{name}_grad"], expected[f"{name}_grad"], atol=1e-12), name


def test_removed_backward_hooks_do_not_run(model):
    seen = []
    hooks = [("hook_embed", lambda gradient, hook: seen.append(hook.name))]
    with pytest.warns(UserWarning, match=r"with model\.hooks"):
        loss = model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=hooks)
    # Nor do those of another context run on this graph.
    with model.hooks(bwd_hooks=hooks):
        loss.backward()
    assert seen == []


def test_edits_take_part_in_the_gradient(model):
    """The gradient with respect to what a hook puts in, which a hook in place and one that returns both allow."""
    name = "blocks.1.attn.hook_z"
    _, cache = model.run_with_cache(TOKENS, names_filter=name)
    own = cache[name].clone().requires_grad_()
    model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(name, lambda value, hook: own)]).backward()

    def set_head(value, hook):
        value[:, :, 1] = own_head

    own_head = cache[name][:, :, 1].clone().requires_grad_()
    model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(name, set_head)]).backward()
    _, expected = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=name)
    assert torch.allclose(own.grad, expected[f"{name}_grad"], atol=1e-14)
    assert torch.allclose(own_head.grad, expected[f"{name}_grad"][:, :, 1], atol=1e-14)


def test_gradients_need_one_number(model):
    with pytest.raises(FastinterpError, match="return_type"):
        model.run_with_cache(TOKENS, incl_bwd=True)

    with torch.inference_mode(), pytest.raises(FastinterpError, match="inference_mode"):
        model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)


def test_no_gradients_are_recorded_under_no_grad(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    assert not logits.requires_grad
    assert not any(value.requires_grad for value in cache.values())
