"""What is measured at the end of the model, computed from the normalised final residual without its logits.

| metric | value | units | needs |
|---|---|---|---|
| ``logit`` | logit of the answer (mean over several answers) | logits | answer |
| ``logit_diff`` | logit of the answer minus logit of the wrong answer (means over several) | logits | answer, wrong |
| ``logprob`` | log-probability of the answer (of any of several answers) | nats | answer |
| ``prob`` | probability of the answer (of any of several answers) | 1 | answer |
| ``rank`` | number of tokens with a larger logit than the answer (the best of several), 0 is best | tokens | answer |
| ``top1`` | 1 if no token has a larger logit than the answer (than the best of several), else 0 | 1 | answer |
| ``kl`` | KL divergence of the distribution from the clean run's: ``KL(clean || this)`` | nats | - |
| ``loss`` | minus log-probability of the prompt's own next token, at every position that has one | nats | - |

With ``x`` the normalised final residual,
``logit_diff = x . (W_U[:, answer] - W_U[:, wrong]) + b_U[answer] - b_U[wrong]``:
``logit`` and ``logit_diff`` are linear in ``x``, which is what direct logit attribution needs. Under a final softcap
the metrics are those of the bounded logits, which are what the model gives; direct logit attribution divides up the
logits in front of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import MetricError, nearest
from fastinterp_kernels.linear_cross_entropy import linear_cross_entropy

MetricName = Literal["logit_diff", "logit", "logprob", "prob", "rank", "top1", "kl", "loss", "none"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric's description: which columns of the prompts it needs, and whether it has a value per token.

    ``relative`` metrics compare with the clean run.
    """

    name: MetricName
    units: Literal["logits", "nats", "tokens", "1"]
    long_name: str
    needs: tuple[Literal["answer", "wrong"], ...]
    linear: bool
    per_token: bool = False
    relative: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(
                name="logit_diff",
                units="logits",
                long_name="logit of the answer minus logit of the wrong answer",
                needs=("answer", "wrong"),
                linear=True,
            ),
            Metric(name="logit", units="logits", long_name="logit of the answer", needs=("answer",), linear=True),
            Metric(
                name="logprob",
                units="nats",
                long_name="log-probability of the answer",
                needs=("answer",),
                linear=False,
            ),
            Metric(name="prob", units="1", long_name="probability of the answer", needs=("answer",), linear=False),
            Metric(
                name="rank",
                units="tokens",
                long_name="number of tokens with a larger logit than the answer",
                needs=("answer",),
                linear=False,
            ),
            Metric(
                name="top1",
                units="1",
                long_name="whether no token has a larger logit than the answer",
                needs=("answer",),
                linear=False,
            ),
            Metric(
                name="kl",
                units="nats",
                long_name="KL divergence from the clean run's distribution",
                needs=(),
                linear=False,
                relative=True,
            ),
            Metric(
                name="loss",
                units="nats",
                long_name="minus log-probability of the prompt's next token",
                needs=(),
                linear=False,
                per_token=True,
            ),
        )
    }
)


RANKED = frozenset({"rank", "top1"})
"""Metrics that count the tokens with a larger logit."""

NO_METRIC = Metric(name="none", units="logits", long_name="nothing is measured", needs=(), linear=True)
"""For analyses that look at no answer."""


def get_metric(name: str) -> Metric:
    """Returns the metric called ``name``; raises :class:`MetricError` with the known names."""
    if name not in METRICS:
        raise MetricError(f"there is no metric {name!r}: choose from {', '.join(METRICS)}{nearest(name, METRICS)}")
    return METRICS[name]


def answer_direction(
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    answer: Int[Tensor, "batch k"],
    wrong: Int[Tensor, "batch k2"] | None,
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """Returns ``u`` and ``c`` with ``metric = x . u + c`` for a linear metric; -1 pads several answers."""
    u, c = _mean_column(W_U, b_U, answer)
    if wrong is not None:
        u_wrong, c_wrong = _mean_column(W_U, b_U, wrong)
        u, c = u - u_wrong, c - c_wrong
    return u, c


def _mean_column(
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    tokens: Int[Tensor, "batch k"],
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    # At least float32: the difference of two logits is smaller than they are.
    present = (tokens >= 0).to(torch.promote_types(W_U.dtype, torch.float32))
    share = present / present.sum(-1, keepdim=True)
    columns = W_U[:, tokens.clamp(min=0).flatten()].view(W_U.shape[0], *tokens.shape)
    u = torch.einsum("dbk,bk->bd", columns.to(share.dtype), share)
    c = u.new_zeros(len(tokens)) if b_U is None else (b_U[tokens.clamp(min=0)] * share).sum(-1)
    return u, c


def _mean_logit(
    x: Float[Tensor, "variant batch d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    tokens: Int[Tensor, "batch k"],
    softcap: float,
) -> Float[Tensor, "variant batch"]:
    """The mean of the bounded logits of several tokens; -1 pads them."""
    wide = torch.promote_types(x.dtype, torch.promote_types(W_U.dtype, torch.float32))
    columns = W_U[:, tokens.clamp(min=0).flatten()].view(W_U.shape[0], *tokens.shape).to(wide)
    logits = torch.einsum("vbd,dbk->vbk", x.to(wide), columns)
    if b_U is not None:
        logits = logits + b_U[tokens.clamp(min=0)]
    present = tokens >= 0
    bounded = softcap * torch.tanh(logits / softcap) * present
    return bounded.sum(-1) / present.sum(-1)


def evaluate(
    metric: Metric,
    x: Float[Tensor, "variant batch d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    answer: Int[Tensor, "batch k"],
    wrong: Int[Tensor, "batch k2"] | None,
    *,
    softcap: float | None = None,
    clean: Float[Tensor, "batch d_model"] | None = None,
) -> Float[Tensor, "variant batch"]:
    """Returns a metric that has one value per prompt, for rows of normalised final residuals.

    ``clean`` is the clean run's residual, which ``relative`` metrics compare with. Memory: nothing of size ``d_vocab``
    per row; all but linear metrics go through vocabulary tiles.
    """
    return evaluate_all((metric,), x, W_U, b_U, answer, wrong, softcap=softcap, clean=clean)[metric.name]


def evaluate_all(
    metrics: Sequence[Metric],
    x: Float[Tensor, "variant batch d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    answer: Int[Tensor, "batch k"],
    wrong: Int[Tensor, "batch k2"] | None,
    *,
    softcap: float | None = None,
    clean: Float[Tensor, "batch d_model"] | None = None,
) -> dict[str, Float[Tensor, "variant batch"]]:
    """Returns several metrics as :func:`evaluate` does, with one pass over the vocabulary for all that need one."""
    values = {m.name: _linear(m, x, W_U, b_U, answer, wrong, softcap) for m in metrics if m.linear}
    full = [metric for metric in metrics if not metric.linear]
    if full:
        n_variants = x.shape[0]
        targets = answer if any("answer" in metric.needs for metric in full) else answer[:, :0]
        relative = any(metric.relative for metric in full)
        scored = linear_cross_entropy(
            x.flatten(0, 1),
            W_U,
            targets.repeat(n_variants, 1),
            b_U,
            softcap=softcap,
            rank=any(metric.name in RANKED for metric in full),
            kl_from=clean.repeat(n_variants, 1) if relative and clean is not None else None,
        )
        for metric in full:
            value = from_target_logits(
                metric,
                scored.target_logit,
                targets.shape[1],
                logsumexp=scored.logsumexp,
                rank=scored.rank,
                kl=scored.kl,
            )
            values[metric.name] = value.view(x.shape[:2])
    return {metric.name: values[metric.name] for metric in metrics}


def _linear(
    metric: Metric,
    x: Float[Tensor, "variant batch d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    answer: Int[Tensor, "batch k"],
    wrong: Int[Tensor, "batch k2"] | None,
    softcap: float | None,
) -> Float[Tensor, "variant batch"]:
    """A metric of single logits, from their columns of ``W_U`` alone."""
    if softcap is not None:
        value = _mean_logit(x, W_U, b_U, answer, softcap)
        if wrong is not None and "wrong" in metric.needs:
            value = value - _mean_logit(x, W_U, b_U, wrong, softcap)
        return value
    u, c = answer_direction(W_U, b_U, answer, wrong if "wrong" in metric.needs else None)
    wide = torch.promote_types(x.dtype, u.dtype)
    return torch.einsum("vbd,bd->vb", x.to(wide), u.to(wide)) + c


def from_target_logits(
    metric: Metric,
    target_logit: Float[Tensor, "*rows k"],
    n_answers: int,
    *,
    logsumexp: Float[Tensor, "*rows"] | None = None,
    rank: Int[Tensor, "*rows k"] | None = None,
    kl: Float[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Returns a metric, given the logits of the answers (the first ``n_answers``) and of the wrong answers behind them.

    NaN stands where there are fewer; ``logsumexp``, ``rank`` and ``kl`` are for the metrics that need them.
    """
    if metric.name == "kl":
        assert kl is not None
        return kl
    if metric.name in RANKED:
        assert rank is not None
        # -1 pads several answers: the best of them counts. Logits that are not numbers have no rank: NaN tells.
        best = rank.masked_fill(rank < 0, torch.iinfo(rank.dtype).max).amin(-1)
        value = (best == 0 if metric.name == "top1" else best).to(target_logit.dtype)
        return value.masked_fill((rank < 0).all(-1), torch.nan)
    answers = target_logit[..., :n_answers]
    if metric.linear:
        value = answers.nanmean(-1)
        return value - target_logit[..., n_answers:].nanmean(-1) if "wrong" in metric.needs else value
    assert logsumexp is not None
    if metric.per_token:
        return logsumexp - answers[..., 0]
    logprob = torch.logsumexp(answers.nan_to_num(nan=-torch.inf), dim=-1) - logsumexp
    return logprob.exp() if metric.name == "prob" else logprob


def evaluate_loss(
    x: Float[Tensor, "variant batch pos d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"] | None,
    tokens: Int[Tensor, "batch pos"],
    n_tokens: Int[Tensor, " batch"],
    *,
    softcap: float | None = None,
) -> Float[Tensor, "variant batch pos"]:
    """Returns the loss at every position: entry ``p`` is for predicting token ``p + 1``; NaN where there is none."""
    n_pos = tokens.shape[1]
    positions = torch.arange(n_pos, device=tokens.device)
    scored = positions[None, :] < (n_tokens - 1)[:, None]
    loss = x.new_full(x.shape[:3], torch.nan, dtype=torch.promote_types(x.dtype, torch.float32))
    target = tokens.roll(-1, dims=1)[scored]
    rows = x[:, scored]
    result = linear_cross_entropy(rows.flatten(0, 1), W_U, target.repeat(x.shape[0])[:, None], b_U, softcap=softcap)
    loss[:, scored] = (result.logsumexp - result.target_logit[:, 0]).view(x.shape[0], -1)
    return loss
