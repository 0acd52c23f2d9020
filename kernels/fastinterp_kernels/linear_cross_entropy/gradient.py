"""The gradient of ``linear_cross_entropy`` with respect to ``x``, by recomputation of the logits tile by tile.

With ``q`` the softmax of the logits, ``p`` that of ``kl_from`` and ``g`` the gradients of the results,

    d loss / d logits[t, v] = (g_logsumexp[t] + g_kl[t]) q[t, v] - g_kl[t] p[t, v] + sum_k g_target[t, k] [v = target_k]

which is ``G`` below, times ``1 - (logits / softcap)^2`` with a softcap; ``d loss / dx = G @ W_U.T``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinterp_kernels.common import IGNORED, Precision, compute_dtype, target_columns, target_logits
from fastinterp_kernels.linear_cross_entropy.reference import LinearCrossEntropy


class Problem(NamedTuple):
    """The arguments of one call, checked and resolved. ``targets`` are int64."""

    x: Tensor
    W_U: Tensor
    targets: Tensor
    b_U: Tensor | None
    kl_from: Tensor | None
    softcap: float | None
    rank: bool
    top1: bool
    precision: Precision


class Slopes(NamedTuple):
    """What a backend needs to form ``G``: factors of q and p per row, and of each target's one-hot row.

    ``q`` None: no term but those of the targets. ``target`` is 0 for ignored targets. ``logsumexp`` and
    ``kl_logsumexp`` are the normalisers of q and p.
    """

    q: Tensor | None
    p: Tensor | None
    target: Tensor | None
    logsumexp: Tensor
    kl_logsumexp: Tensor | None


def rows_of_problem(problem: Problem, rows: slice) -> Problem:
    kl_from = None if problem.kl_from is None else problem.kl_from[rows]
    return problem._replace(x=problem.x[rows], targets=problem.targets[rows], kl_from=kl_from)


def rows_of_slopes(slopes: Slopes, rows: slice) -> Slopes:
    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows].contiguous()

    logsumexp = slopes.logsumexp[rows].contiguous()
    return Slopes(part(slopes.q), part(slopes.p), part(slopes.target), logsumexp, part(slopes.kl_logsumexp))


Forward = Callable[[Problem], tuple[LinearCrossEntropy, Tensor | None]]
"""The results, and the logsumexp of the logits of ``kl_from`` where there is one."""

Backward = Callable[[Problem, Slopes], Tensor]
"""The gradient with respect to x, in its dtype, for slopes whose ``q`` is not None."""


def with_gradient(problem: Problem, forward: Forward, backward: Backward) -> LinearCrossEntropy:
    """``forward(problem)``, whose gradient with respect to x is ``backward`` of the same problem."""
    if not (problem.x.requires_grad and torch.is_grad_enabled()):
        return forward(problem)[0]
    return LinearCrossEntropy(*_LinearCrossEntropy.apply(problem.x, problem, forward, backward))


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the inputs and one or two floats per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, problem: Problem, forward: Forward, backward: Backward
    ) -> tuple[Tensor | None, ...]:
        out, kl_logsumexp = forward(problem._replace(x=x))
        ctx.save_for_backward(
            x, problem.W_U, problem.targets, problem.b_U, problem.kl_from, out.logsumexp, kl_logsumexp
        )  # fmt: skip
        ctx.options, ctx.run = problem[5:], backward
        ctx.mark_non_differentiable(*(ids for ids in (out.rank, out.top1) if ids is not None))
        ctx.set_materialize_grads(False)  # no pass over the vocabulary for results that were not used
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: silence would be a second derivative of zero
            raise RuntimeError(
                "linear_cross_entropy can be differentiated once and was asked for a graph of its gradient. Drop "
                "create_graph=True, or type backend='reference' for second derivatives of small inputs."
            )
        target, logsumexp, _, _, kl = gradients
        *inputs, q_logsumexp, kl_logsumexp = ctx.saved_tensors
        problem = Problem(*inputs, *ctx.options)
        if target is not None:
            target = target.masked_fill(problem.targets == IGNORED, 0.0)
        q = logsumexp if kl is None else kl if logsumexp is None else logsumexp + kl
        slopes = Slopes(q, kl, target, q_logsumexp, kl_logsumexp)
        if q is not None:
            return ctx.run(problem, slopes), None, None, None
        return None if target is None else _target_gradient(problem, target), None, None, None


def _target_gradient(problem: Problem, slope: Tensor) -> Tensor:
    """The gradient through target logits alone: a weighted sum of the targets' columns of ``W_U``."""
    x, W_U, targets, b_U, _, softcap, *_ = problem
    if softcap is not None:
        logits = target_logits(x, W_U, targets, b_U, softcap).masked_fill(targets == IGNORED, 0.0)
        slope = slope * (1.0 - (logits / softcap) ** 2)
    dx = torch.zeros_like(x)
    for rows, columns in target_columns(W_U, targets, compute_dtype(x, W_U)):
        dx[rows] = columns.mul_(slope[rows]).sum(2).T
    return dx
