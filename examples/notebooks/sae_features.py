"""What the latents of a sparse autoencoder do: activations, ablations, attribution, and where they come from.

    python examples/notebooks/sae_features.py

A tiny random GPT-2 and a random autoencoder of its MLP activations stand in for trained ones: the figures mean nothing,
the way to them is that of real ones. In the notebook style, prompt by prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import einops
import torch
import torch.nn.functional as F

from fastinterp import HookedTransformer, utils


@dataclass(frozen=True, kw_only=True)
class AutoEncoder:
    """``latents = relu((x - b_dec) W_enc + b_enc)``, and ``latents W_dec + b_dec`` is close to ``x``."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the latents' activations."""
        return F.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the reconstruction."""
        return latents @ self.W_dec + self.b_dec


def random_autoencoder(d_mlp: int, n_latents: int = 64, seed: int = 0) -> AutoEncoder:
    """Returns an autoencoder with decoder rows of length one and the encoder as their transpose."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = F.normalize(torch.randn(n_latents, d_mlp, generator=generator), dim=-1)
    b_dec = 0.05 * torch.randn(d_mlp, generator=generator)
    return AutoEncoder(W_enc=W_dec.T.contiguous(), b_enc=torch.full((n_latents,), -0.1), W_dec=W_dec, b_dec=b_dec)


def random_prompts(d_vocab: int, n_prompts: int = 6, n_tokens: int = 10, seed: int = 1) -> list[torch.Tensor]:
    """Returns prompts as tokens, ``[1, pos]`` each; the last token is the answer that the others are to predict."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, d_vocab, (1, n_tokens), generator=generator) for _ in range(n_prompts)]


def last_loss(model: HookedTransformer, tokens: torch.Tensor) -> float:
    """Returns the loss of the last token, in nats."""
    return model(tokens, return_type="loss", loss_per_token=True)[0, -1].item()


# The model itself ---------------------------------------------------------------------------------------------------


def model_attribution(model: HookedTransformer, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
    """Returns what every head, MLP, embedding and the biases add to the answer's logit, averaged over the prompts."""
    rows = []
    for prompt in prompts:
        direction = model.tokens_to_residual_directions(prompt[:, 1:])[0, -1]
        _, cache = model.run_with_cache(prompt[:, :-1])
        stack, labels = cache.get_full_resid_decomposition(
            layer=-1, pos_slice=-1, return_labels=True, expand_neurons=False
        )
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1).squeeze(1)
        rows.append(einops.einsum(scaled, direction, "component d_model, d_model -> component"))
    return torch.stack(rows).mean(0), labels


# Latents ------------------------------------------------------------------------------------------------------------


def latents_of(model: HookedTransformer, sae: AutoEncoder, layer: int, prompt: torch.Tensor) -> torch.Tensor:
    """Returns the latents at every position, ``[pos, latent]``."""
    name = utils.get_act_name("post", layer)
    _, cache = model.run_with_cache(prompt, names_filter=name)
    return sae.encode(cache[name][0])


def largest_activations(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor]
) -> torch.Tensor:
    """Returns each latent's largest activation in each prompt, ``[prompt, latent]``."""
    return torch.stack([latents_of(model, sae, layer, prompt).max(0).values for prompt in prompts])


def ablate_latents_hook(sae: AutoEncoder, latents: list[int], pos: int) -> Callable:
    """Returns a hook that takes some latents out of the activation at one position, and leaves the rest of it."""

    def hook_fn(value, hook):
        active = sae.encode(value[:, pos])[:, latents]
        value[:, pos] -= active @ sae.W_dec[latents]
        return value

    return hook_fn


def write(value, hook, pos, new):
    """Puts a fixed vector at one position."""
    value[:, pos] = new
    return value


def reconstruct(value, hook, pos, sae):
    """Puts the autoencoder's reconstruction at one position."""
    value[:, pos] = sae.decode(sae.encode(value[:, pos]))
    return value


def ablation_table(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor], latents: list[int]
) -> list[dict[str, float]]:
    """Returns, for each latent alone, how much worse the answer is predicted without it, and how active it is."""
    name = utils.get_act_name("post", layer)
    active = torch.stack([latents_of(model, sae, layer, prompt)[-2] for prompt in prompts])
    clean = torch.tensor([last_loss(model, prompt) for prompt in prompts])
    table = []
    for latent in latents:
        with model.hooks(fwd_hooks=[(name, ablate_latents_hook(sae, [latent], -2))]):
            ablated = torch.tensor([last_loss(model, prompt) for prompt in prompts])
        table.append(
            {
                "latent": latent,
                "loss increase": float((ablated - clean).mean()),
                "mean activation": float(active[:, latent].mean()),
                "share active": float((active[:, latent] > 0).float().mean()),
            }
        )
    return sorted(table, key=lambda row: -row["loss increase"])


def mean_activation(model: HookedTransformer, layer: int, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Returns the MLP activation averaged over all tokens."""
    name = utils.get_act_name("post", layer)
    return torch.stack([model.run_with_cache(prompt)[1][name][0].mean(0) for prompt in prompts]).mean(0)


def losses(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor], latents: list[int]
) -> dict[str, float]:
    """Returns the mean loss of the answer: clean, and with the MLP activation in front of it replaced in four ways."""
    name = utils.get_act_name("post", layer)
    ways = {
        "clean": [],
        "mean ablation": [(name, partial(write, pos=-2, new=mean_activation(model, layer, prompts)))],
        "zero ablation": [(name, partial(write, pos=-2, new=0.0))],
        "without top latents": [(name, ablate_latents_hook(sae, latents, -2))],
        "reconstruction": [(name, partial(reconstruct, pos=-2, sae=sae))],
    }
    found = {}
    for way, hooks in ways.items():
        with model.hooks(fwd_hooks=hooks):
            found[way] = sum(last_loss(model, prompt) for prompt in prompts) / len(prompts)
    return found


def loss_recovered(found: dict[str, float]) -> float:
    """Returns which share of what the zero ablation destroys is there in the reconstruction."""
    return (found["zero ablation"] - found["reconstruction"]) / (found["zero ablation"] - found["clean"])


# What latents write -------------------------------------------------------------------------------------------------


def mlp_remainder(model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Returns what the MLP, its reconstruction, and the difference add to the answer's logit (biases left out)."""
    name = utils.get_act_name("post", layer)
    rows = []
    for prompt in prompts:
        _, cache = model.run_with_cache(prompt)
        activation = cache[name][0, -2]
        written = torch.stack([activation, sae.decode(sae.encode(activation))]) @ model.W_out[layer]
        parts = torch.stack([written[0], written[1], written[0] - written[1]])
        scaled = cache.apply_ln_to_stack(parts[:, None], pos_slice=-2)[:, 0]
        rows.append(scaled @ model.W_U[:, prompt[0, -1]])
    return torch.stack(rows).mean(0)


def token_boosts(model: HookedTransformer, sae: AutoEncoder, layer: int, latent: int) -> torch.Tensor:
    """Returns how much a latent raises every token's logit, by its weights, ``[d_vocab]``."""
    return sae.W_dec[latent] @ model.W_out[layer] @ model.unembed.W_U


def logprob_boosts(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor], latent: int
) -> torch.Tensor:
    """Returns how much a latent at the last but one position raises every log-probability there, on average."""
    hooks = [(utils.get_act_name("post", layer), ablate_latents_hook(sae, [latent], -2))]
    with_it, without = [], []
    for prompt in prompts:
        with_it.append(model(prompt, return_type="logits")[0, -2].log_softmax(dim=-1))
        with model.hooks(hooks):
            without.append(model(prompt, return_type="logits")[0, -2].log_softmax(dim=-1))
    return torch.stack(with_it).mean(0) - torch.stack(without).mean(0)


# Where latents come from ----------------------------------------------------------------------------------------------


def latent_attribution(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor], latent: int
) -> tuple[torch.Tensor, list[str]]:
    """Returns what every part of the MLP's input adds to a latent through the neurons that are active.

    An active neuron is taken as linear, one that is not as zero.
    """
    rows = []
    for prompt in prompts:
        _, cache = model.run_with_cache(prompt)
        parts, labels = cache.get_full_resid_decomposition(
            layer, mlp_input=True, apply_ln=True, return_labels=True, expand_neurons=False, pos_slice=-2
        )
        neurons = einops.einsum(
            parts.squeeze(1), model.W_in[layer], "component d_model, d_model d_mlp -> component d_mlp"
        )
        neurons[:, cache["post", layer][0, -2] <= 0] = 0
        rows.append(neurons @ sae.W_enc[:, latent])
    return torch.stack(rows).mean(0), labels


def latents_without_first_mlp(
    model: HookedTransformer, sae: AutoEncoder, layer: int, prompts: list[torch.Tensor]
) -> torch.Tensor:
    """Returns the latents at the last but one position with the first layer's MLP activation set to zero there."""
    hooks = [(utils.get_act_name("post", 0), partial(write, pos=-2, new=0.0))]
    with model.hooks(hooks):
        return torch.stack([latents_of(model, sae, layer, prompt)[-2] for prompt in prompts]).mean(0)


def tiny_model() -> HookedTransformer:
    """Returns a random GPT-2 of two layers, without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        vocab_size=500,
        n_positions=64,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    return HookedTransformer.from_pretrained("tiny", hf_model=GPT2LMHeadModel(config).eval(), device="cpu")


@torch.no_grad()
def main(model: str | HookedTransformer | None = None) -> dict[str, object]:
    """Prints the figures and returns them."""
    if model is None:
        model = tiny_model()
    elif isinstance(model, str):
        model = HookedTransformer.from_pretrained(model, center_unembed=True, center_writing_weights=True, fold_ln=True)
    model.set_use_attn_result(True)
    layer = model.cfg.n_layers - 1
    sae = random_autoencoder(model.cfg.d_mlp)
    prompts = random_prompts(model.cfg.d_vocab)

    attribution, labels = model_attribution(model, prompts)
    strongest = attribution.abs().topk(5).indices.tolist()
    print("attribution: " + ", ".join(f"{labels[index]} {attribution[index]:+.2f}" for index in strongest))
    active = largest_activations(model, sae, layer, prompts)
    candidates = active.mean(0).topk(5).indices.tolist()
    table = ablation_table(model, sae, layer, prompts, candidates)
    for row in table:
        print(", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    top = [int(row["latent"]) for row in table[:2]]
    compared = losses(model, sae, layer, prompts, top)
    print(
        ", ".join(f"{way} {loss:.3f}" for way, loss in compared.items()), f"({loss_recovered(compared):.1%} recovered)"
    )
    boosts = token_boosts(model, sae, layer, top[0])
    print(f"latent {top[0]} raises {model.to_str_tokens(boosts.topk(5).indices)}")
    origin, origin_labels = latent_attribution(model, sae, layer, prompts, top[0])
    print(f"latent {top[0]} comes mostly from {origin_labels[int(origin.argmax())]}")
    return {
        "attribution": (attribution, labels),
        "largest activations": active,
        "table": table,
        "losses": compared,
        "recovered": loss_recovered(compared),
        "remainder": mlp_remainder(model, sae, layer, prompts),
        "boosts": boosts,
        "logprob boosts": logprob_boosts(model, sae, layer, prompts, top[0]),
        "origin": (origin, origin_labels),
        "latents without first MLP": latents_without_first_mlp(model, sae, layer, prompts),
        "top": top,
    }


if __name__ == "__main__":
    main()
