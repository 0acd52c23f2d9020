"""What stands in place of an ablated activation: zero, its mean over a reference set, or another prompt's values."""

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastinterp.analyses.base import tokenized
from fastinterp.analyses.units import Part
from fastinterp.errors import OptionError, PromptError
from fastinterp.metrics import get_metric
from fastinterp.model.attention import make_frame
from fastinterp.model.forward import check_taps, embed, run_blocks
from fastinterp.model.intervene import SOURCE, Capture, Edit, Taps
from fastinterp.model.model import Model
from fastinterp.prompts import PromptSet, TokenizedPrompts
from fastinterp.sweep.resident import give_back

Mode = Literal["zero", "mean", "resample"]
MeanOver = Literal["tokens", "pos"]
Means = Mapping[tuple[str, int], Float[Tensor, "*pos_and_rest"]]

MODES: tuple[Mode, ...] = ("zero", "mean", "resample")


def usual_mean_tokens(device_type: str) -> int:
    """Tokens of a batch of a pass for means: enough rows for a matrix product."""
    return 512 if device_type == "cpu" else 4096


@torch.no_grad()
def mean_activations(
    model: Model,
    prompts: TokenizedPrompts,
    sites: Mapping[str, set[int]],
    over: MeanOver = "tokens",
    batch_tokens: int | None = None,
) -> Means:
    """Returns the mean of activations over all real tokens, or over those at each position, of a reference set.

    ``{(site, layer): [..]}`` without the axes ``batch`` and ``pos``, or ``[pos, ..]``; NaN where no prompt of the set
    has that position. In at least float32. Batches are combined by Welford's update in float64, so that the mean keeps
    its precision over any number of tokens. Memory: the activations of one batch of ``batch_tokens`` (512,
    on a GPU 4096).
    """
    spec = model.spec
    captures = [Capture(name=site, layers=tuple(sorted(layers))) for site, layers in sorted(sites.items())]
    stop = 1 + max(max(layers) for layers in sites.values())  # what is above is not run
    means: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], Tensor] = {}
    for batch in prompts.batches(batch_tokens or usual_mean_tokens(model.device.type)):
        batch = batch.to(model.device)
        taps = Taps.of(spec.n_layers, capture=captures)
        check_taps(spec, taps)
        resid = embed(model.weights, batch.tokens)
        frame = make_frame(spec, batch.tokens.shape[1], device=resid.device, dtype=resid.dtype)
        run_blocks(spec, model.weights, resid, frame, taps, stop=stop)
        mask = batch.mask
        n_new = mask.sum(0) if over == "pos" else mask.sum()[None]
        for (site, layer), value in taps.values.items():
            assert layer is not None
            wide = value.double().masked_fill(~mask.view(*mask.shape, *[1] * (value.ndim - 2)), 0.0)
            total = wide.sum(0) if over == "pos" else wide.sum((0, 1))[None]
            n_pos = prompts.max_len if over == "pos" else 1
            key = (site, layer)
            if key not in means:
                means[key] = total.new_zeros(n_pos, *total.shape[1:])
                counts[key] = n_new.new_zeros(n_pos)
            mean, count = means[key][: len(total)], counts[key][: len(total)]
            count += n_new
            share = [1] * (total.ndim - 1)
            present = n_new.view(-1, *share).double()
            mean += (total - present * mean) / count.clamp(min=1).view(-1, *share)
        # Not while the next batch goes through the model.
        del taps, resid, frame, value, wide, total
    give_back(model.device)
    wide_dtype = torch.promote_types(model.dtype, torch.float32)
    found = {}
    for key, mean in means.items():
        absent = (counts[key] == 0).view(-1, *[1] * (mean.ndim - 1))
        mean = mean.masked_fill(absent, torch.nan).to(wide_dtype)
        found[key] = mean if over == "pos" else mean[0]
    return found


def reference_tokens(
    model: Model,
    reference: PromptSet | TokenizedPrompts,
    prompts: TokenizedPrompts,
    *,
    prepend_bos: bool | None = None,
    bad_prompts: Literal["error", "reject"] = "error",
) -> TokenizedPrompts:
    """Returns the prompts of a mean as token ids; their answers and corrupt prompts do not matter.

    ``prepend_bos=None``: text begins with BOS where the ``prompts`` that are ablated do, so that equal prompts have
    equal tokens. What is tokenised already is taken as it is.

    Raises:
        PromptError: a prompt that cannot be used, unless ``bad_prompts="reject"``, or none that can.
    """
    if isinstance(reference, PromptSet):
        bos = _begin_with_bos(model, prompts) if prepend_bos is None else prepend_bos
        bare = dataclasses.replace(reference, answer=None, wrong=None, corrupt=None)
        try:
            reference = bare.tokenize(model, prepend_bos=bos, bad_prompts=bad_prompts)
        except PromptError as error:
            raise type(error)(f"reference: {error}") from error
    if len(reference.accepted) == 0:
        raise PromptError("reference has no prompt that can be used: every one was rejected")
    return tokenized(model, reference, get_metric("loss"))


def _begin_with_bos(model: Model, prompts: TokenizedPrompts) -> bool:
    if prompts.prepend_bos:
        return True
    bos = model.bos_token_id
    return bos is not None and all(int(prompts.tokens[row][0]) == bos for row in prompts.accepted)


def check_seed(seed: Any) -> int:
    """Returns the seed; raises :class:`OptionError` for what is no integer from 0 on."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise OptionError(f"seed={seed!r}: give an integer from 0 on")
    return int(seed)


def with_source(prompts: TokenizedPrompts, seed: int) -> TokenizedPrompts:
    """Returns the prompts with a ``corrupt`` one for each: its own, or else another of the same length.

    Without a corrupt column every prompt is given a different one of the set, drawn by ``seed``: a cyclic shift of a
    random order of the prompts of its length, equal ones counted once (they get the same one), so that the tokens of a
    prompt and of the one it is given always differ.

    Raises:
        PromptError: a prompt without a corrupt one, of another length than it, or of a length that no different prompt
            has.
    """
    lengths = prompts.n_tokens
    if prompts.corrupt is not None:
        for row in prompts.accepted:
            given, wanted = len(prompts.corrupt[row]), int(lengths[row])
            if given != wanted:
                raise PromptError(
                    f"the corrupt prompt of prompt {row} (id {prompts.ids[row]!r}) has {given} tokens, the prompt has "
                    f"{wanted}: values are taken position by position, so give one of the same length"
                )
        return prompts
    rng = np.random.default_rng(seed)
    corrupt = list(prompts.tokens)
    for length in np.unique(lengths[prompts.accepted]):
        equal: dict[bytes, list[int]] = {}
        for row in prompts.accepted[lengths[prompts.accepted] == length].tolist():
            equal.setdefault(prompts.tokens[row].tobytes(), []).append(row)
        groups = list(equal.values())
        if len(groups) == 1:
            raise PromptError(_no_partner(prompts, groups[0], int(length)))
        order = rng.permutation(len(groups))
        for group, other in zip(order, np.roll(order, 1), strict=True):
            for row in groups[group]:
                corrupt[row] = prompts.tokens[groups[other][0]]
    return dataclasses.replace(prompts, corrupt=tuple(corrupt))


def _no_partner(prompts: TokenizedPrompts, rows: list[int], length: int) -> str:
    first = f"prompt {rows[0]} (id {prompts.ids[rows[0]]!r})"
    found = f"no other prompt has {length} tokens like {first}"
    if len(rows) > 1:
        found = f"all {len(rows)} prompts of {length} tokens are equal to {first}"
    return (
        f"{found}, so that there is none to resample from: give corrupt= prompts of the same length, or different "
        "prompts of equal lengths"
    )


def check_reference(reference: TokenizedPrompts | None, prompts: TokenizedPrompts) -> None:
    """Raises :class:`OptionError` for means by position that there are not, or that would ablate nothing.

    There are none beyond the longest prompt of the reference; and a single prompt that is its own is its own mean.
    """
    n_pos = prompts.max_len
    if reference is None and len(prompts.accepted) == 1:
        raise OptionError(
            "a single prompt is its own mean by position, so that nothing would be ablated: give other prompts as "
            "reference=PromptSet.of(...), or mean_over='tokens'"
        )
    if reference is not None and reference.max_len < n_pos:
        raise OptionError(
            f"the reference prompts have no token at position {reference.max_len}, and a prompt has {n_pos} tokens: "
            "there is no mean by position there. Give longer reference prompts, or mean_over='tokens'"
        )


def edit_of(
    part: Part,
    mode: Mode,
    means: Means | None,
    mean_over: MeanOver,
    n_pos: int,
    where: Bool[Tensor, "batch pos"] | None = None,
) -> Edit:
    """Returns the edit that ablates one part, in prompts of ``n_pos`` tokens."""
    replacement: Any = {"zero": 0.0, "resample": SOURCE}.get(mode)
    if mode == "mean":
        assert means is not None
        replacement = part.of(means[part.site, part.layer])
        if mean_over == "pos":
            replacement = replacement[None, :n_pos]
    return Edit(
        site=part.site,
        layer=part.layer,
        head=part.head,
        neuron=part.neuron,
        positions=where,
        replacement=replacement,
    )
