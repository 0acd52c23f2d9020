"""What each head adds to the logits: its largest tokens, logsumexp, targets and ranks, without holding its logits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import (
    IGNORED,
    Backend,
    Precision,
    as_layers,
    check_float,
    check_same_device,
    check_unembedding,
    choose_backend,
    choose_precision,
    compute_dtype,
    target_logits,
)
from fastinterp_kernels.head_logits.gather import per_row_directions, shared_directions
from fastinterp_kernels.head_logits.plan import Engine, tiled_head_logits, tiled_vector_logits
from fastinterp_kernels.head_logits.reference import (
    HeadLogits,
    Wanted,
    check_inputs,
    check_no_grad,
    check_wanted,
    head_logits_reference,
    reduce_logits,
)

__all__ = ["Backend", "HeadLogits", "Precision", "head_gather", "head_logits", "head_logits_mean", "vector_logits"]


def head_logits(
    z: Float[Tensor, "row head d_head"] | Sequence[Float[Tensor, "row head d_head"]],
    W_O: Float[Tensor, "head d_head d_model"] | Sequence[Float[Tensor, "head d_head d_model"]],
    W_U: Float[Tensor, "d_model d_vocab"],
    *,
    k: int = 0,
    bottom: bool = True,
    targets: Int[Tensor, "row m"] | None = None,
    rank: bool = False,
    logsumexp: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> HeadLogits:
    """Reductions of every head's direct contribution to the logits, without a ``[row, head, d_vocab]`` tensor.

    The same as, but in tiles::

        result = torch.einsum("rhi,hid->rhd", z, W_O)
        logits = result @ W_U                                       # [row, head, d_vocab]
        top, low = logits.topk(k), logits.topk(k, largest=False)    # k > 0; low with bottom=True
        logits.logsumexp(-1)                                        # logsumexp=True
        logits.gather(2, targets)                                   # targets given
        (logits > target_logit).sum(-1)                             # rank=True: 0 is best

    In logits, and nats for ``logsumexp``; a positive value raises the token. ``z`` is the mixed value divided by
    the frozen scale of the final norm, ``W_O`` is centred where the model centres, ``W_U`` has the final norm
    folded in: then the contributions of all components add up to the logits. Biases are NOT included. For several
    layers pass lists, which are not stacked: heads are numbered through. ``targets`` of -1 are ignored:
    ``target_logit`` NaN, ``rank`` -1. Which of several equal logits is in the top k is not defined. Forward only.

    Any float dtypes; ``W_U`` may be a transposed ``[d_vocab, d_model]`` weight. The results are float64 if an
    operand is (``reference``: always), otherwise float32, and int64. Memory beyond inputs and results: under 64 MB.

    ``backend``: ``"blocked"`` is plain torch over cache-sized tiles, ``"triton"`` a CUDA kernel for d_head up to
    256, ``"reference"`` the literal float64 computation, which holds the logits. ``precision`` says how ``z`` and
    ``W_O[h] @ W_U`` are multiplied (see ``fastinterp_kernels.common.Precision``); None is ``"exact"`` on the CPU and
    ``"bf16x3"`` on CUDA. ``target_logit`` and the product of the weights are float32 in every mode.

    Raises ``ValueError`` for shapes that do not fit, ids outside the vocabulary, nothing to compute, inputs on
    different devices or that ask for a gradient, and a backend or precision that is unknown or cannot run here;
    ``TypeError`` for dtypes that are not float (``targets``: not integer).

    Example::

        >>> import torch
        >>> z, W_O, W_U = torch.randn(4, 2, 8), torch.randn(2, 8, 16), torch.randn(16, 100)
        >>> head_logits(z, W_O, W_U, k=3).top_ids.shape
        torch.Size([4, 2, 3])
    """
    layers = as_layers(z, W_O)
    wanted = Wanted(k=k, bottom=bottom, targets=targets, rank=rank, logsumexp=logsumexp)
    check_inputs(layers, W_U, wanted)
    operands = [tensor for layer in layers for tensor in layer] + [W_U]
    check_no_grad("head_logits", *operands)
    chosen = choose_backend(backend, *operands)
    if chosen == "reference":
        return head_logits_reference(layers, W_U, wanted)
    return tiled_head_logits(layers, W_U, wanted, _engine(chosen, operands, wanted, precision))


def head_logits_mean(
    z: Float[Tensor, "row head d_head"] | Sequence[Float[Tensor, "row head d_head"]],
    W_O: Float[Tensor, "head d_head d_model"] | Sequence[Float[Tensor, "head d_head d_model"]],
    W_U: Float[Tensor, "d_model d_vocab"],
    groups: Int[Tensor, " row"],
    *,
    k: int = 0,
    bottom: bool = True,
    targets: Int[Tensor, "group m"] | None = None,
    rank: bool = False,
    logsumexp: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> HeadLogits:
    """``head_logits`` of the mean contribution over groups of rows, ``[group, head, ..]`` for ``[row, head, ..]``.

    ``groups`` numbers the group of each row from 0, -1 for a row to leave out (padding). A contribution is linear
    in ``z``, so that its mean is that of the mean ``z``: one row for each group and nothing for each token. Note
    that it is the mean of logits, and ``logsumexp`` the logsumexp of that mean.

    Raises what ``head_logits`` does, and ``ValueError`` for a number that no row has.

    Example, the mean over the positions of each prompt, for ``z`` [batch, pos, head, d_head]::

        >>> import torch
        >>> z, W_O, W_U = torch.randn(2, 5, 3, 8), torch.randn(3, 8, 16), torch.randn(16, 100)
        >>> prompt = torch.arange(2).repeat_interleave(5)
        >>> head_logits_mean(z.flatten(0, 1), W_O, W_U, prompt, k=4).top_values.shape
        torch.Size([2, 3, 4])
    """
    layers = as_layers(z, W_O)
    check_same_device(z=layers[0][0], groups=groups)
    count = _group_sizes(groups, layers[0][0].shape[0])
    check_no_grad("head_logits_mean", *(tensor for layer in layers for tensor in layer), W_U)
    means = [_group_means(z, groups.long(), count) for z, _ in layers]
    return head_logits(
        means, [W_O for _, W_O in layers], W_U, k=k, bottom=bottom, targets=targets, rank=rank,
        logsumexp=logsumexp, backend=backend, precision=precision,
    )  # fmt: skip


def head_gather(
    z: Float[Tensor, "row head d_head"] | Sequence[Float[Tensor, "row head d_head"]],
    W_O: Float[Tensor, "head d_head d_model"] | Sequence[Float[Tensor, "head d_head d_model"]],
    directions: Float[Tensor, "row d_model"] | Float[Tensor, "d_model m"],
    *,
    per_row: bool | None = None,
) -> Float[Tensor, "row head"] | Float[Tensor, "row head m"]:
    """Every head's contribution along directions of the residual stream, with no term in d_vocab.

    ``(result * directions[:, None]).sum(-1)``, ``[row, head]``, for one direction a row, ``[row, d_model]``, and
    ``result @ directions``, ``[row, head, m]``, for directions that all rows share, ``[d_model, m]``, where
    ``result = einsum("rhi,hid->rhd", z, W_O)`` is not formed. A direction is a column of ``W_U``, or the difference of
    two for a logit difference. ``z``, ``W_O`` and memory as for ``head_logits``; the same code on every device.

    ``per_row`` says which form ``directions`` has where both fit. Raises ``ValueError`` where it is missing then,
    for shapes that do not fit, devices that differ and inputs that ask for a gradient.

    Example::

        >>> import torch
        >>> z, W_O, W_U = torch.randn(4, 2, 8), torch.randn(2, 8, 16), torch.randn(16, 100)
        >>> head_gather(z, W_O, W_U[:, [5]] - W_U[:, [7]]).shape      # logit of token 5 minus that of token 7
        torch.Size([4, 2, 1])
    """
    layers = as_layers(z, W_O)
    n_rows, d_model = layers[0][0].shape[0], layers[0][1].shape[2]
    check_float(directions=directions)
    operands = {f"{name}[{i}]": tensor for i, pair in enumerate(layers) for name, tensor in zip(("z", "W_O"), pair)}
    check_same_device(**operands, directions=directions)
    check_no_grad("head_gather", *operands.values(), directions)
    fits_rows = directions.shape == (n_rows, d_model) and per_row is not False
    fits_shared = directions.ndim == 2 and directions.shape[0] == d_model and per_row is not True
    if fits_rows == fits_shared:
        raise ValueError(
            f"directions has shape {tuple(directions.shape)}"
            + (", which fits one for each row and some for all. Type per_row=True or per_row=False." if fits_rows else
               f"; expected [row, d_model] = {(n_rows, d_model)}, or [d_model, m] = ({d_model}, any) for all rows.")
        )  # fmt: skip
    dtype = compute_dtype(*operands.values(), directions)
    if fits_rows:
        return per_row_directions(layers, directions, dtype)
    return shared_directions(layers, directions, dtype)


def vector_logits(
    vectors: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    *,
    k: int = 0,
    bottom: bool = True,
    targets: Int[Tensor, "row m"] | None = None,
    rank: bool = False,
    logsumexp: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> HeadLogits:
    """Reductions of ``vectors @ W_U``, for directions of weights alone: neurons, latents, singular vectors.

    The fields of ``head_logits`` without the head axis: ``top_ids`` is ``[row, k]`` and ``logsumexp`` ``[row]``.
    The rest as there.

    Example, the tokens that each neuron of a layer raises most::

        >>> import torch
        >>> W_out, W_U = torch.randn(32, 16), torch.randn(16, 100)
        >>> vector_logits(W_out, W_U, k=5).top_ids.shape
        torch.Size([32, 5])
    """
    if vectors.ndim != 2:
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}; expected [row, d_model]. Type vectors.flatten(0, -2)."
        )
    wanted = Wanted(k=k, bottom=bottom, targets=targets, rank=rank, logsumexp=logsumexp)
    check_unembedding(vectors.shape[1], W_U, None)
    check_float(vectors=vectors, W_U=W_U)
    check_same_device(vectors=vectors, W_U=W_U, targets=targets)
    check_wanted(wanted, vectors.shape[0], W_U.shape[1])
    check_no_grad("vector_logits", vectors, W_U)
    chosen = choose_backend(backend, vectors, W_U)
    if chosen == "reference":
        out = reduce_logits((vectors.double() @ W_U.double())[:, None], wanted)
    else:
        found = None if targets is None else target_logits(vectors, W_U, targets)[:, None]
        engine = _engine(chosen, [vectors, W_U], wanted, precision)
        out = tiled_vector_logits(vectors, W_U, wanted, engine, found)
    return HeadLogits(*(None if field is None else field[:, 0] for field in out))


def _engine(backend: str, operands: list[Tensor], wanted: Wanted, precision: Precision | None) -> Engine:
    chosen = choose_precision(precision, *operands)
    if backend == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.head_logits.triton_engine import TritonEngine

        return TritonEngine(wanted, operands, chosen)
    from fastinterp_kernels.head_logits.blocked import BlockedEngine

    return BlockedEngine(wanted, compute_dtype(*operands), operands[0].device, chosen)


def _group_sizes(groups: Int[Tensor, " row"], n_rows: int) -> Int[Tensor, " group"]:
    if groups.shape != (n_rows,):
        raise ValueError(
            f"groups has shape {tuple(groups.shape)}; expected [row] = [{n_rows}], one number for each row."
        )
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups has dtype {groups.dtype}; expected integers. Type groups.long().")
    if bool((groups < IGNORED).any()):
        raise ValueError(f"groups has {int(groups.min())}; expected numbers from 0, or {IGNORED} to leave a row out.")
    count = torch.bincount(groups[groups != IGNORED].long())
    if bool((count == 0).any()):
        raise ValueError(
            f"no row has the group {int((count == 0).nonzero()[0])}, whose mean is not defined; number the groups "
            "without gaps: groups = torch.unique(groups, return_inverse=True)[1]."
        )
    return count


def _group_means(
    z: Float[Tensor, "row head d_head"], groups: Int[Tensor, " row"], count: Int[Tensor, " group"]
) -> Float[Tensor, "group head d_head"]:
    dtype = compute_dtype(z)
    total = torch.zeros((len(count), *z.shape[1:]), dtype=dtype, device=z.device)
    step = max(1, 4 * 2**20 // max(1, z.shape[1] * z.shape[2] * dtype.itemsize))
    for first in range(0, z.shape[0], step):
        some, rows = z[first : first + step].to(dtype), groups[first : first + step]
        total.index_add_(0, rows.clamp_min(0), some * (rows != IGNORED)[:, None, None])
    return total / count[:, None, None]
