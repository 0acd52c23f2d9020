"""What weights say about tokens, without a prompt: the logits of OV circuits, neurons and given directions."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from fastinterp.analyses.base import provenance
from fastinterp.analyses.heads import Heads, choose_heads, heads_dims
from fastinterp.analyses.written import towards_logits
from fastinterp.errors import OptionError, TokenRangeError
from fastinterp.model.model import Model
from fastinterp.model.norms import normalize
from fastinterp.names import check_index
from fastinterp_kernels.head_logits import HeadLogits, vector_logits

Source = Literal["ov", "neurons"] | Float[Tensor, "*rows d_model"]


@torch.no_grad()
def weight_logits(
    model: Model,
    source: Source,
    k: int = 10,
    *,
    heads: Heads = "all",
    tokens: Sequence[int | str] | None = None,
    layers: Sequence[int] | None = None,
) -> xr.Dataset:
    """Returns the tokens whose logits weights raise and lower most, exactly the ``k`` at either end.

    Args:
        source: ``"ov"``: what every head writes if it attends to one of ``tokens``:
            ``norm(W_E[token]) @ W_V[h] @ W_O[h] @ W_U``, with the norm in front of its layer; ``heads`` as in
            :func:`head_logits`. ``"neurons"``: ``W_out[neuron] @ W_U`` of every neuron of ``layers`` (default: all).
            Or directions of the residual stream ``[.., d_model]``, such as latents of a sparse autoencoder.
        k: how many tokens each way, strongest first.
        tokens: for ``"ov"``: ids, or strings that are one token each.

    Returns:
        ``top_token`` and ``bottom_token`` (ids) and ``top_logit`` and ``bottom_logit``, with dims ``layer, head, token,
        k`` (or ``unit, token, k``), ``layer, neuron, k``, or ``dim_0, .., k``. Logits are per unit of the final norm's
        scale: divide by a token's scale to get its logits. Biases and a softcap are left out; a post-norm counts by
        its weight alone.

    Raises:
        OptionError: another source, ``k`` out of range, no ``tokens`` for ``"ov"``, directions of another width.
        SiteRangeError, TokenRangeError: a layer, head or token that there is not.

    Memory: one layer's directions, the result, and 64 MB at most; no ``[.., d_vocab]`` tensor.
    Source: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Example:
        >>> fastinterp.weight_logits(model, "ov", heads=[(10, 7)], tokens=[" Mary"], k=5)      # doctest: +SKIP
        >>> fastinterp.weight_logits(model, "neurons", layers=[-1])["top_token"]               # doctest: +SKIP
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= model.spec.d_vocab:
        raise OptionError(f"k={k!r}: give the number of tokens each way, 1 to {model.spec.d_vocab}")
    if isinstance(source, Tensor):
        return _of_vectors(model, source, k)
    if source == "ov":
        return _of_heads(model, heads, tokens, k)
    if source == "neurons":
        return _of_neurons(model, layers, k)
    raise OptionError(f"source={source!r}: give 'ov', 'neurons', or directions as a tensor [.., d_model]")


def _wide(model: Model) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


def _of_vectors(model: Model, vectors: Float[Tensor, "*rows d_model"], k: int) -> xr.Dataset:
    if not vectors.ndim or vectors.shape[-1] != model.spec.d_model:
        raise OptionError(f"directions have shape {tuple(vectors.shape)}: expected [.., {model.spec.d_model}]")
    rows = towards_logits(model, vectors.to(model.device, _wide(model)).reshape(-1, model.spec.d_model))
    dims = tuple(f"dim_{axis}" for axis in range(vectors.ndim - 1))
    return _labelled(model, [vector_logits(rows, model.weights.W_U, k=k)], dims, tuple(vectors.shape[:-1]), {}, k)


def _of_neurons(model: Model, layers: Sequence[int] | None, k: int) -> xr.Dataset:
    n_layers = model.spec.n_layers
    chosen = list(range(n_layers)) if layers is None else [check_index("layer", at, n_layers) for at in layers]
    if not chosen:
        raise OptionError("layers is empty: leave it out for all layers, or give some, such as [0, -1]")
    found = []
    for layer in chosen:
        w = model.weights.blocks[layer]
        found.append(vector_logits(towards_logits(model, w.W_out.to(_wide(model)), w.ln2_post), model.weights.W_U, k=k))
    return _labelled(
        model, found, ("layer", "neuron"), (len(chosen), model.spec.mlp.d_mlp), {"layer": (("layer",), chosen)}, k
    )


def _of_heads(model: Model, heads: Heads, tokens: Sequence[int | str] | None, k: int) -> xr.Dataset:
    spec, weights = model.spec, model.weights
    chosen = choose_heads(spec, heads)
    ids = _token_ids(model, tokens)
    embedding = weights.W_E[ids]
    written = {}
    for layer in chosen.layers:
        w = weights.blocks[layer]
        x = normalize(spec.norm, embedding, w.ln1).to(_wide(model))
        W_V = w.W_V.to(_wide(model)).repeat_interleave(spec.attention.group, 0)
        by_heads = torch.einsum("td,hde,hef->htf", x, W_V, w.W_O.to(_wide(model)))
        written[layer] = towards_logits(model, by_heads, w.ln1_post)
    found = [vector_logits(part.flatten(0, 1), weights.W_U, k=k) for part in chosen.of(written, axis=0)]
    dims, shape, coords = heads_dims(spec, heads)
    coords |= {
        "token": (("token",), ids.tolist()),
        "token_text": (("token",), [str(text) for text in model.token_strings(ids.tolist())]),
    }

    def in_order(values: Tensor) -> Tensor:
        return chosen.shaped(values.unflatten(0, (-1, len(ids))), axis=0)

    return _labelled(model, found, (*dims, "token"), (*shape, len(ids)), coords, k, in_order)


def _token_ids(model: Model, tokens: Sequence[int | str] | None) -> Tensor:
    if tokens is None or isinstance(tokens, str) or not len(tokens):
        raise OptionError("source='ov' needs tokens=: ids or strings of one token each, such as [' Mary', ' John']")
    ids = []
    for token in tokens:
        found = model.encode([token], prepend_bos=False)[0] if isinstance(token, str) else [int(token)]
        if len(found) != 1:
            raise OptionError(f"{token!r} is {len(found)} tokens: give strings of one token each, or ids")
        if not 0 <= int(found[0]) < model.spec.d_vocab:
            raise TokenRangeError(f"token id {int(found[0])} is out of range: there are {model.spec.d_vocab}")
        ids.append(int(found[0]))
    return torch.tensor(ids, device=model.device)


def _labelled(
    model: Model,
    found: list[HeadLogits],
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    coords: dict[str, Any],
    k: int,
    in_order: Any = lambda values: values,
) -> xr.Dataset:
    data: dict[str, Any] = {}
    for end in ("top", "bottom"):
        ids = torch.cat([torch.as_tensor(getattr(part, f"{end}_ids")) for part in found])
        logits = torch.cat([torch.as_tensor(getattr(part, f"{end}_values")) for part in found])
        data[f"{end}_token"] = ((*dims, "k"), in_order(ids.int()).view(*shape, k).cpu().numpy(), {})
        attrs = {"units": "logits", "sign": "positive raises the token", "final_norm_scale": "left out"}
        data[f"{end}_logit"] = ((*dims, "k"), in_order(logits).view(*shape, k).cpu().numpy(), attrs)
    labels = {name: (list(over), values) for name, (over, values) in coords.items()}
    return xr.Dataset(data, coords=labels | {"k": list(range(k))}, attrs=provenance(model))
