"""The tokens that every head promotes and suppresses: its direct contribution to all logits, reduced."""

from dataclasses import dataclass

import torch
import xarray as xr
from torch import Tensor

from fastinterp.analyses.base import Field, Pos, check_pos, collect, tokenized
from fastinterp.analyses.heads import Heads, choose_heads, heads_dims
from fastinterp.analyses.written import heads_write
from fastinterp.errors import OptionError
from fastinterp.metrics import NO_METRIC, Metric
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp_kernels.head_logits import head_logits as head_logits_kernel


def head_logits(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    heads: Heads = "all",
    k: int = 10,
    pos: Pos = -1,
) -> xr.Dataset:
    """Returns the tokens whose logits each head raises and lowers most, directly.

    A head's contribution to the logits is ``(z_h / s) @ W_O[h] @ W_U``, with ``s`` the final norm's scale in the clean
    run (frozen; a post-norm likewise). Equivalent to ``stack_head_results`` + ``apply_ln_to_stack`` + ``@ W_U`` +
    ``topk`` in TransformerLens, without the ``[.., head, d_vocab]`` tensor. Biases and a final softcap are left out.

    Args:
        heads: ``"all"`` gives dims ``layer, head``; a list of ``(layer, head)`` a dim ``unit`` in that order.
        k: how many tokens each way, exactly the ``k`` largest and the ``k`` smallest, strongest first.
        pos: position (negatives count from the prompt's own end) or ``"all"``, which adds a dim ``pos`` after prompt.

    Returns:
        ``head_top_token`` and ``head_bottom_token`` (prompt, (pos), layer, head, k), token ids, and ``head_top_logit``
        and ``head_bottom_logit``, contributions in logits: positive raises the token.
        ``model.token_strings(ids)`` gives the strings.

    Raises:
        OptionError: ``k`` below 1 or above the vocabulary, or heads that are no pairs.
        SiteRangeError: a head that the model does not have, or ``pos`` outside of a prompt.

    Memory: ``z`` at ``pos``, the result, 64 MB at most, and before that the activations of one layer for a batch (4,096
    tokens on a CPU; 512 for ``pos="all"``).
    Source: McDougall et al. 2023, https://arxiv.org/abs/2310.04625.

    Example:
        >>> found = fastinterp.head_logits(model, prompts, heads=[(10, 7)], k=5)               # doctest: +SKIP
        >>> model.token_strings(found["head_bottom_token"][0, 0].values)                       # doctest: +SKIP
    """
    analysis = HeadLogits(heads=heads, k=k, pos=pos)
    analysis.fields(model.spec, 1)
    return collect(analysis, model, tokenized(model, prompts, analysis.metric))


@dataclass(frozen=True, kw_only=True)
class HeadLogits:
    """The analysis behind :func:`head_logits`, for one batch."""

    heads: Heads = "all"
    k: int = 10
    pos: Pos = -1

    def __post_init__(self) -> None:
        """Refuses positions and numbers of tokens that there are not."""
        check_pos(self.pos)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise OptionError(f"k={self.k!r}: give the number of tokens each way, such as 10")

    @property
    def metric(self) -> Metric:
        """Nothing is measured against an answer."""
        return NO_METRIC

    def tokens_per_batch(self, model: Model) -> int:
        """Heads' weights are multiplied with the unembedding once per batch, so batches are large."""
        return 1 << 12 if model.device.type == "cpu" else 1 << 14

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """One forward, and the vocabulary once per head where every position is wanted."""
        n_heads = spec.n_layers * spec.n_heads
        rows = n_tokens if self.pos == "all" else n_tokens / 16
        return float(
            n_tokens * spec.n_layers * spec.flops_per_token_block()
            + rows * 2 * n_heads * spec.attention.d_head * spec.d_vocab
        )

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """Token ids and contributions, at both ends."""
        if self.k > spec.d_vocab:
            raise OptionError(f"k={self.k}: the model's vocabulary has {spec.d_vocab} tokens")
        dims, shape, coords = heads_dims(spec, self.heads)
        dims, shape = (*dims, "k"), (*shape, self.k)
        coords["k"] = (("k",), list(range(self.k)))
        if self.pos == "all":
            dims, shape = ("pos", *dims), (n_pos, *shape)
        described = []
        for end, verb in (("top", "raises"), ("bottom", "lowers")):
            attrs = {"pos": str(self.pos), "metric": "logits", "final_norm_scale": "frozen at the clean run"}
            described += [
                Field(
                    name=f"head_{end}_token",
                    dims=dims,
                    shape=shape,
                    dtype="int32",
                    attrs=attrs
                    | {
                        "units": "token id",
                        "long_name": f"tokens whose logit each head {verb} most, strongest first",
                        "sign": "no number: an id, -1 where there is no token",
                    },
                    coords=coords,
                ),
                Field(
                    name=f"head_{end}_logit",
                    dims=dims,
                    shape=shape,
                    attrs=attrs
                    | {
                        "units": "logits",
                        "long_name": f"direct contribution of each head to the tokens that it {verb} most",
                        "sign": "positive raises the token",
                    },
                    coords=coords,
                ),
            ]
        return tuple(described)

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{name: [batch, (pos), layer, head, k]}``, or ``[batch, (pos), unit, k]`` for chosen heads."""
        chosen = choose_heads(model.spec, self.heads)
        written = heads_write(model, batch, self.pos, chosen.layers)
        z, W_O = chosen.of(written.z, axis=1), chosen.of(written.W_O, axis=0)
        found = head_logits_kernel(z, W_O, model.weights.W_U, k=self.k)
        values: dict[str, Tensor] = {}
        for end, ids, logits in (
            ("top", found.top_ids, found.top_values),
            ("bottom", found.bottom_ids, found.bottom_values),
        ):
            assert ids is not None
            assert logits is not None
            for kind, value in (("token", ids.int()), ("logit", logits)):
                spread = written.spread(value, batch, every_position=self.pos == "all")
                values[f"head_{end}_{kind}"] = chosen.shaped(spread, axis=-2)
        return values
