"""What a TransformerLens user writes, as literally as a notebook would.

Every function takes a ``TransformerBridge`` in compatibility mode (float32) and runs without gradients. Where
a careful user would do better than the usual notebook, both are here, and fastinterp is compared with the
faster of them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def logit_diff_directions(
    bridge: Any, answer: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    """Directions in the final residual whose product is ``logit[answer] - logit[wrong]``."""
    return (bridge.W_U[:, answer] - bridge.W_U[:, wrong]).T.contiguous()


@torch.no_grad()
def head_attribution_full_cache(
    bridge: Any, tokens: Int[Tensor, "batch pos"], directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch layer head"]:
    """The notebook way: cache everything, stack all heads, apply the final norm's scale, take the product."""
    _, cache = bridge.run_with_cache(tokens)
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    stack = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return _by_layer(bridge, torch.einsum("cbd,bd->bc", stack, directions))


@torch.no_grad()
def head_attribution_filtered_cache(
    bridge: Any, tokens: Int[Tensor, "batch pos"], directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch layer head"]:
    """The careful way: cache ``hook_z`` and the final scale at the last position alone, no logits elsewhere.

    ``logits_to_keep`` goes through to Hugging Face; ``return_type=None`` and ``stop_at_layer=n_layers`` do
    not save the unembedding.
    """
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(
        tokens, names_filter=[*names, "ln_final.hook_scale"], pos_slice=-1, logits_to_keep=1
    )
    stack = cache.apply_ln_to_stack(cache.stack_head_results(layer=-1), layer=-1)
    # The sliced position stays as an axis of length one.
    return _by_layer(bridge, torch.einsum("cbpd,bd->bc", stack, directions))


@torch.no_grad()
def head_attribution_tool(
    bridge: Any, tokens: Int[Tensor, "batch pos"], answer: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]
) -> Float[Tensor, "batch layer head"]:
    """TransformerLens's own ``tools.analysis.direct_logit_attribution``."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    found = direct_logit_attribution(bridge, tokens, answer, wrong, unit="head", pos=-1)
    # The last component is what is not a head.
    return _by_layer(bridge, found.attribution[:-1].reshape(-1, len(tokens)).T)


def _by_layer(bridge: Any, components: Float[Tensor, "batch component"]) -> Float[Tensor, "batch layer head"]:
    return components.unflatten(1, (bridge.cfg.n_layers, bridge.cfg.n_heads))


@torch.no_grad()
def logit_diff(
    bridge: Any, tokens: Int[Tensor, "batch pos"], answer: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """``logit[answer] - logit[wrong]`` at the last position of the clean run."""
    return difference(bridge(tokens, return_type="logits"), answer, wrong)


@torch.no_grad()
def ablated_logit_diff(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    answer: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
    layer: int,
    head: int,
    **forward_options: Any,
) -> Float[Tensor, " batch"]:
    """The logit difference with the ``z`` of one head set to zero, by a hook: one run per head.

    ``logits_to_keep=1`` among the options saves the logits that are not looked at.
    """

    def zero_head(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = 0.0
        return z

    logits = bridge.run_with_hooks(
        tokens,
        fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_head)],
        return_type="logits",
        **forward_options,
    )
    return difference(logits, answer, wrong)


@torch.no_grad()
def ablated_logit_diff_of_layer(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    answer: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
    layer: int,
) -> Float[Tensor, "batch head"]:
    """The same for all heads of a layer in one run: the batch repeated once per head, last logits only."""
    n_heads = bridge.cfg.n_heads

    def zero_one_head_per_copy(z: Tensor, hook: Any) -> Tensor:
        copies = z.unflatten(0, (n_heads, len(tokens)))
        for head in range(n_heads):
            copies[head, :, :, head] = 0.0
        return z

    logits = bridge.run_with_hooks(
        tokens.repeat(n_heads, 1),
        fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_one_head_per_copy)],
        return_type="logits",
        logits_to_keep=1,
    )
    both = difference(logits, answer.repeat(n_heads), wrong.repeat(n_heads))
    return both.unflatten(0, (n_heads, len(tokens))).T


def difference(
    logits: Float[Tensor, "batch pos d_vocab"], answer: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """``logit[answer] - logit[wrong]`` at the last position of the logits given."""
    last = logits[:, -1]
    return (last.gather(1, answer[:, None]) - last.gather(1, wrong[:, None])).squeeze(1)


@torch.no_grad()
def full_cache(model: Any, tokens: Int[Tensor, "batch pos"]) -> tuple[Float[Tensor, "batch pos d_vocab"], Any]:
    """Logits, and a cache of everything that is cached by default."""
    return model.run_with_cache(tokens)


@torch.no_grad()
def bare_forward(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position, and nothing else."""
    return model(tokens, return_type="logits")


@torch.no_grad()
def greedy_rereading(bridge: Any, tokens: Int[Tensor, "batch pos"], n_new: int) -> Int[Tensor, "batch new"]:
    """New tokens as a notebook's own loop chooses them: for each, all tokens are read and the last logits looked at."""
    n_pos = tokens.shape[1]
    for _ in range(n_new):
        chosen = bridge(tokens, return_type="logits").argmax(-1)[:, -1]
        tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
    return tokens[:, n_pos:]


@torch.no_grad()
def greedy_cached(bridge: Any, tokens: Int[Tensor, "batch pos"], n_new: int) -> Int[Tensor, "batch new"]:
    """New tokens by TransformerLens's own ``generate``, which keeps keys and values."""
    whole = bridge.generate(
        tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
    )
    return whole[:, tokens.shape[1] :]
