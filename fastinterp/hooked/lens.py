"""The logit lens of one cache: the residual stream of every layer, read as the last layer's is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import OptionError, SiteRangeError, TokenRangeError, check_choice
from fastinterp.hooked.contributions import SliceInput, model_of, take
from fastinterp.hooked.text import Text
from fastinterp.model.model import Model
from fastinterp.model.norms import normalize
from fastinterp.model.products import affine

Targets = str | int | Sequence[str | int] | Tensor | None


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """What :func:`logit_lens` returns. The first axis of everything is the entry of the stream, as in ``labels``.

    ``values`` has the vocabulary as its last axis, or the tokens of ``top_ids``, ``vocab_ids`` or ``target_ids``.
    ``entropy`` (of the softmax over the whole vocabulary, in nats) and ``target_ranks`` (how many tokens have a larger
    logit) do not depend on what was asked for.
    """

    values: Float[Tensor, "entry *rows token"]
    labels: list[str]
    return_type: str
    entropy: Float[Tensor, "entry *rows"]
    top_ids: Int[Tensor, "entry *rows k"] | None = None
    vocab_ids: Int[Tensor, " token"] | None = None
    target_ids: Tensor | None = None
    target_ranks: Int[Tensor, "entry *rows token"] | None = None

    @property
    def readout(self) -> "LogitLens":
        """Itself: TransformerLens keeps ``top_ids`` and the like one step further down."""
        return self


def logit_lens(
    cache: Any,
    *,
    layers: Sequence[int] | None = None,
    incl_mid: bool = False,
    positions: SliceInput = -1,
    batch_slice: SliceInput = None,
    vocab: Sequence[int] | Tensor | None = None,
    targets: Targets = None,
    return_type: Literal["logits", "log_probs", "probs"] = "logits",
    top_k: int | None = None,
    apply_ln: bool = True,
) -> LogitLens:
    """Returns what the model would say if every layer's residual stream were the last; see ``ActivationCache``."""
    check_choice("return_type", return_type, ("logits", "log_probs", "probs"))
    if sum(option is not None for option in (vocab, targets, top_k)) > 1:
        raise OptionError("vocab=, targets= and top_k= each say which tokens are returned: give one of them")
    model = model_of(cache.model)
    stack, labels = cache.accumulated_resid(incl_mid=incl_mid, pos_slice=positions, return_labels=True)
    chosen = range(len(labels)) if layers is None else [_entry(layer, labels) for layer in layers]
    d_vocab = model.spec.d_vocab
    if top_k is not None and not 1 <= top_k <= d_vocab:
        raise OptionError(f"top_k={top_k} is out of range: 1 to {d_vocab}")
    vocab_ids = None if vocab is None else _ids(model, torch.as_tensor(vocab))
    target_ids = None if targets is None else _targets(model, targets)
    entries = []
    for number in chosen:
        resid = stack[number]
        resid = take(resid, batch_slice, 0, "prompt") if cache.has_batch_dim else resid
        entries.append(_read(model, resid, apply_ln, return_type, top_k, vocab_ids, target_ids, targets))
    values, entropy, top_ids, ranks = (
        None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*entries, strict=True)
    )
    assert values is not None
    assert entropy is not None
    return LogitLens(
        values=values,
        labels=[labels[number] for number in chosen],
        return_type=return_type,
        entropy=entropy,
        top_ids=top_ids,
        vocab_ids=vocab_ids,
        target_ids=target_ids,
        target_ranks=ranks,
    )


def _read(
    model: Model,
    resid: Float[Tensor, "*rows d_model"],
    apply_ln: bool,
    return_type: str,
    top_k: int | None,
    vocab_ids: Tensor | None,
    target_ids: Tensor | None,
    targets: Targets,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Values, entropy, ids of the largest, and ranks of the targets of one entry: one set of logits at a time."""
    spec, weights = model.spec, model.weights
    resid = resid.to(device=model.device, dtype=model.dtype)
    x = normalize(spec.norm, resid, weights.ln_final) if apply_ln else resid
    logits = affine(x, weights.W_U, weights.b_U)
    if spec.final_softcap is not None:
        logits = spec.final_softcap * torch.tanh(logits / spec.final_softcap)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    probs = log_probs.exp()
    # A probability of zero adds nothing, whatever its logarithm.
    entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)
    wanted = {"logits": logits, "log_probs": log_probs, "probs": probs}[return_type]
    if top_k is not None:
        ids = logits.topk(top_k, dim=-1).indices
        return wanted.gather(-1, ids), entropy, ids, None
    if vocab_ids is not None:
        return wanted[..., vocab_ids], entropy, None, None
    if target_ids is None:
        return wanted, entropy, None, None
    rows = target_ids
    if isinstance(targets, Tensor):
        if target_ids.shape != logits.shape[:-1]:
            raise OptionError(
                f"a tensor of targets has one for each row, {tuple(logits.shape[:-1])}, not {tuple(target_ids.shape)}: "
                "give a list for targets that all rows share"
            )
        rows = target_ids.unsqueeze(-1)
    rows = rows.expand(*logits.shape[:-1], rows.shape[-1])
    of_targets = logits.gather(-1, rows)
    ranks = torch.stack([(logits > of_targets[..., at, None]).sum(-1) for at in range(rows.shape[-1])], dim=-1)
    return wanted.gather(-1, rows), entropy, None, ranks


def _entry(layer: int, labels: list[str]) -> int:
    if not -len(labels) <= layer < len(labels):
        raise SiteRangeError(f"entry {layer} is out of range: there are {len(labels)}, {labels[0]} to {labels[-1]}")
    return layer % len(labels)


def _targets(model: Model, targets: Any) -> Tensor:
    if isinstance(targets, Tensor):
        return _ids(model, targets)
    given: Iterable[Any] = [targets] if isinstance(targets, str | int) else targets
    return _ids(model, torch.tensor([_one(model, target) for target in given]))


def _one(model: Model, target: str | int) -> int:
    return Text(model, False).to_single_token(target) if isinstance(target, str) else int(target)


def _ids(model: Model, ids: Tensor) -> Tensor:
    if ids.is_floating_point() or bool(((ids < 0) | (ids >= model.spec.d_vocab)).any()):
        raise TokenRangeError(f"tokens {ids.tolist()} are not all ids from 0 to {model.spec.d_vocab - 1}")
    return ids.long().to(model.device)
