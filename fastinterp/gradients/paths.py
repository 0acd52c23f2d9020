"""Gradients averaged along a straight path between two runs: integrated gradients.

    average = sum_i w_i * gradient at (base + alpha_i * (source - base)),   alpha_i in [0, 1],   sum_i w_i = 1

By the fundamental theorem the average, times ``source - base``, tends to ``metric(source) - metric(base)``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastinterp.errors import OptionError, check_choice
from fastinterp.gradients.objective import Objective
from fastinterp.gradients.runs import Key, Start, gradients
from fastinterp.model.model import Model

Rule = Literal["midpoint", "trapezoid", "left", "right", "gauss"]

RULES: tuple[Rule, ...] = ("midpoint", "trapezoid", "left", "right", "gauss")

Point = tuple[float, float]
"""Where on the path a gradient is taken, and its weight."""


def quadrature(rule: Rule, steps: int) -> list[Point]:
    """Returns ``(alpha, weight)`` of a rule with ``steps`` equal steps between 0 and 1; the weights sum to 1.

    ``midpoint``: the middle of every step (error ~ 1/steps^2); ``left``, ``right``: its ends (~ 1/steps);
    ``trapezoid``: both, so ``steps + 1`` gradients (~ 1/steps^2, twice the error of ``midpoint``); ``gauss``:
    Gauss-Legendre with ``steps`` points, exact for polynomials up to degree ``2 * steps - 1``, and for what is smooth
    far better than the others. Raises :class:`~fastinterp.errors.OptionError` for other rules and fewer steps than 1.

    >>> quadrature("midpoint", 2)
    [(0.25, 0.5), (0.75, 0.5)]
    """
    check_choice("rule", rule, RULES)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r}: give a positive number of steps, such as 8")
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return [(float((1 + x) / 2), float(w / 2)) for x, w in zip(nodes, weights, strict=True)]
    if rule == "trapezoid":
        return [(i / steps, (0.5 if i in (0, steps) else 1.0) / steps) for i in range(steps + 1)]
    shift = {"midpoint": 0.5, "left": 0.0, "right": 1.0}[rule]
    return [((i + shift) / steps, 1 / steps) for i in range(steps)]


def interpolated(base: Tensor, source: Tensor, alphas: Sequence[float]) -> Tensor:
    """Returns ``base + alpha * (source - base)``, one alpha's rows behind the other's: ``[alpha * row, ...]``."""
    wide = torch.promote_types(base.dtype, torch.float32)
    alpha = torch.tensor(alphas, dtype=wide, device=base.device).view(-1, *[1] * base.ndim)
    mixed: Tensor = base + alpha * (source.to(wide) - base)
    return mixed.flatten(0, 1).to(base.dtype)


def averaged_gradients(
    model: Model,
    keys: Sequence[Key],
    path: Callable[[Sequence[float]], tuple[Start, dict[Key, Tensor]]],
    objective: Objective,
    points: Sequence[Point],
    *,
    at_once: int,
) -> dict[Key, Tensor]:
    """Returns the weighted average of the gradients ``{key: [row, ...]}`` over the points of a path.

    Args:
        path: for some alphas, the start of their runs (of ``alpha * row`` rows) and what is replaced in them.
        objective: the metric of the rows at one alpha.
        at_once: as many alphas go through the model together.

    Memory: as :func:`gradients` of ``at_once`` times the rows, and the averages.
    """
    averages: dict[Key, Tensor] = {}
    for some in _groups(points, at_once):
        start, replaced = path([alpha for alpha, _ in some])
        found = gradients(model, start, keys, objective.repeated(len(some)), replaced=replaced).gradients
        for key, gradient in found.items():
            apart = gradient.unflatten(0, (len(some), -1))
            if key not in averages:
                averages[key] = torch.zeros_like(apart[0], dtype=torch.promote_types(gradient.dtype, torch.float32))
            # One after the other: no copy of all of them.
            for (_, weight), one in zip(some, apart, strict=True):
                averages[key].add_(one, alpha=weight)
    return averages


def _groups(points: Sequence[Point], at_once: int) -> Iterator[Sequence[Point]]:
    for first in range(0, len(points), at_once):
        yield points[first : first + at_once]
