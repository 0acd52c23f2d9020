"""What gradients are taken of: a metric as a differentiable function of the final residual, one value per prompt."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.errors import MetricError
from fastinterp.gradients.ends import Ends
from fastinterp.metrics import METRICS, RANKED, Metric, evaluate, evaluate_loss, get_metric
from fastinterp.model.forward import final_logits
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide, norm_scale
from fastinterp.prompts import Batch, TokenizedPrompts

MetricFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``f(logits [batch, pos, d_vocab], tokens [batch, pos], n_tokens [batch]) -> [batch]``."""

DIFFERENTIABLE = tuple(name for name in METRICS if name not in RANKED)


def differentiable(name: str) -> Metric:
    """Returns the metric called ``name``; raises :class:`MetricError` for one that counts, and has no gradient."""
    metric = get_metric(name)
    if name in RANKED:
        raise MetricError(
            f"metric {name!r} counts tokens and has no gradient: choose from {', '.join(DIFFERENTIABLE)}, or give a "
            "function of the logits"
        )
    return metric


def check_function(function: MetricFunction, model: Model, prompts: TokenizedPrompts) -> None:
    """Raises :class:`MetricError` unless ``function`` gives one differentiable value per prompt.

    It is called once, before the model runs, with logits of 0 for two copies of the shortest prompt.
    """
    lengths = prompts.n_tokens[prompts.accepted]
    shortest = int(prompts.accepted[int(lengths.argmin())])
    tokens = torch.from_numpy(np.stack([prompts.tokens[shortest]] * 2)).to(model.device)
    n_tokens = torch.full((2,), tokens.shape[1], device=model.device)
    with torch.inference_mode(False), torch.enable_grad():
        zero = torch.zeros((), dtype=model.dtype, device=model.device, requires_grad=True)
        # Not a view: functions may write to their logits.
        logits = zero.expand(2, tokens.shape[1], model.spec.d_vocab).clone()
        value = function(logits, tokens.clone(), n_tokens)
    expected = "give f(logits [batch, pos, d_vocab], tokens [batch, pos], n_tokens [batch]) -> [batch]"
    if not isinstance(value, Tensor):
        raise MetricError(f"the metric returns a {type(value).__name__}, not a tensor: {expected}")
    if value.shape != (2,):
        raise MetricError(
            f"the metric returns shape {tuple(value.shape)} for logits of 2 prompts, not one value for each, (2,): "
            f"{expected}"
        )
    if not value.requires_grad:
        raise MetricError(
            "the metric has no gradient: its values do not depend on the logits, or by way of integers, detach() or "
            f"no_grad() alone; {expected}, of differentiable operations"
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric of the final residuals ``[row, pos, d_model]`` of a batch of prompts (and of copies of it).

    ``batch`` says where the metric is read: the last token, the answers; ``loss`` is the mean over the batch's own next
    tokens, whatever tokens the residuals are of. ``reference`` is the normalised final residual at the last token that
    ``kl`` compares with. With a ``function`` it is that instead of the metric, of all logits. With ``ends`` residuals
    are those of the prompts' ends.

    Memory: of a metric, a few ``[row, d_model]`` tensors (``loss``: ``[row, pos, d_model]``) and tiles of the
    vocabulary; a function's logits ``[row, pos, d_vocab]``, with their gradient and what the function makes of them.
    """

    model: Model
    batch: Batch
    metric: Metric | None
    function: MetricFunction | None = None
    reference: Float[Tensor, "row d_model"] | None = None
    ends: Ends | None = None

    def __call__(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """Returns the metric of every row."""
        if self.ends is not None:
            resid = self.ends.whole(resid)
        if self.function is not None:
            return self._of_logits(resid)
        assert self.metric is not None
        if self.metric.per_token:
            return self._loss(resid)
        batch, weights = self.batch, self.model.weights
        last = self._last(resid)
        # One product per row and answer: in float64 it costs nothing, and adds no rounding to differences.
        x = self._normalized(last.double() if self.metric.linear else last)
        answer = batch.answer if batch.answer is not None else batch.tokens[:, :0]
        values = evaluate(
            self.metric, x[None], weights.W_U, weights.b_U, answer, batch.wrong,
            softcap=self.model.spec.final_softcap, clean=self.reference,
        )  # fmt: skip
        return values[0]

    def normalized(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row d_model"]:
        """Returns the normalised final residual at the last tokens."""
        if self.ends is not None:
            resid = self.ends.whole(resid)
        return self._normalized(self._last(resid))

    def repeated(self, n: int) -> "Objective":
        """Returns the metric of ``n`` copies of the batch, one behind the other."""
        if n == 1:
            return self
        reference = None if self.reference is None else self.reference.repeat(n, 1)
        ends = None if self.ends is None else self.ends.repeated(n)
        return dataclasses.replace(self, batch=_repeated(self.batch, n), reference=reference, ends=ends)

    def _last(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row d_model"]:
        return resid[torch.arange(len(resid), device=resid.device), self.batch.last]

    def _normalized(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        norm = self.model.spec.norm
        x = divide(center(norm, resid), norm_scale(norm, resid))
        return apply_affine(x, self.model.weights.ln_final)

    def _loss(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """The mean over the positions that have a next token."""
        batch, weights = self.batch, self.model.weights
        x = self._normalized(resid)
        loss = evaluate_loss(
            x[None], weights.W_U, weights.b_U, batch.tokens, batch.n_tokens, softcap=self.model.spec.final_softcap
        )[0]
        scored = torch.arange(loss.shape[1], device=loss.device) < batch.last[:, None]
        return torch.where(scored, loss, 0.0).sum(-1) / batch.last

    def _of_logits(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """The user's function, refused where it looks at padding."""
        assert self.function is not None
        batch = self.batch
        if resid.requires_grad:
            real = batch.mask

            def refuse(gradient: Tensor) -> None:
                if bool((gradient[~real] != 0).any()):
                    raise MetricError(
                        "the metric looks at logits behind a prompt's last token: prompts are padded on the right, use "
                        "n_tokens, such as logits[torch.arange(len(logits)), n_tokens - 1]"
                    )

            resid = resid.view_as(resid)
            resid.register_hook(refuse)
        logits = final_logits(self.model.spec, self.model.weights, resid)
        values = self.function(logits, batch.tokens, batch.n_tokens)
        if values.shape != batch.n_tokens.shape:
            raise MetricError(f"the metric returns shape {tuple(values.shape)} for logits of {len(batch)} prompts")
        return values


def _repeated(batch: Batch, n: int) -> Batch:
    """Copies of a batch, one behind the other."""

    def tiled(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(n, *[1] * (tensor.ndim - 1))

    return Batch(
        indices=np.tile(batch.indices, n),
        ids=batch.ids * n,
        tokens=batch.tokens.repeat(n, 1),
        n_tokens=batch.n_tokens.repeat(n),
        answer=tiled(batch.answer),
        wrong=tiled(batch.wrong),
        corrupt=tiled(batch.corrupt),
    )
