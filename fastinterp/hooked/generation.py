"""Generating text: every prompt is read once, then one token per step is added to all of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import (
    EmptyPromptError,
    NonFiniteError,
    OptionError,
    PromptTooLongError,
    TokenRangeError,
    check_choice,
)
from fastinterp.model.decode import KeyValueCache
from fastinterp.model.forward import extend, final_logits, forward
from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec

Past = Literal["kept", "recomputed"]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How the next token is chosen from its logits. ``temperature=0`` takes the largest."""

    temperature: float
    top_k: int | None
    top_p: float | None
    freq_penalty: float
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise OptionError(f"temperature={self.temperature} is negative: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise OptionError(f"top_k={self.top_k} leaves no token to choose: give 1 or more, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={self.top_p} is not a share: give a number above 0 and up to 1, or None for all")
        if self.top_k is not None and self.top_p is not None:
            raise OptionError(f"top_k={self.top_k} and top_p={self.top_p} exclude each other: give one of them")
        if not self.freq_penalty >= 0:
            raise OptionError(f"freq_penalty={self.freq_penalty} is negative: give 0 (none) or more")

    @property
    def counts_tokens(self) -> bool:
        """Whether :meth:`pick` needs to know how often each token has occurred."""
        return self.temperature > 0 and self.freq_penalty > 0

    def pick(
        self, logits: Float[Tensor, "batch d_vocab"], counts: Int[Tensor, "batch d_vocab"] | None
    ) -> Int[Tensor, " batch"]:
        """Returns one token per row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if counts is not None:
            logits = logits - self.freq_penalty * counts
        if self.top_k is not None:
            logits = _only_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = _only_top_p(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)


def _only_top_k(logits: Float[Tensor, "batch d_vocab"], k: int) -> Float[Tensor, "batch d_vocab"]:
    """Drops everything below the ``k``-th largest logit; ties with it stay."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def _only_top_p(logits: Float[Tensor, "batch d_vocab"], p: float) -> Float[Tensor, "batch d_vocab"]:
    """Keeps the fewest most likely tokens whose probabilities add up to at least ``p``."""
    in_order, order = logits.sort(dim=-1, descending=True)
    probabilities = in_order.softmax(-1)
    # What is more likely than a token decides whether it is still needed; the most likely one always is.
    needed = probabilities.cumsum(-1) - probabilities < p
    needed[:, 0] = True
    return logits.masked_fill(~torch.empty_like(needed).scatter_(-1, order, needed), -torch.inf)


@torch.no_grad()
def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stop_tokens: Collection[int] = (),
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    freq_penalty: float = 0.0,
    seed: int | None = None,
    taps: Callable[[], Taps] | None = None,
    past: Past = "kept",
) -> list[list[int]]:
    """Returns the new tokens of every prompt, without the prompt, in the order of the prompts.

    The same tokens as this loop, prompt by prompt::

        while len(new) < max_new_tokens and not (new and new[-1] in stop_tokens):
            logits = final_logits(spec, weights, forward(spec, weights, torch.tensor([prompt + new])))
            new.append(int(logits[0, -1].argmax()))

    Cost: the prompts are read once, padded on the right to the longest; then every step reads one token per prompt, and
    unembeds one position. A prompt that has stopped costs as much as the others until all have stopped. Memory:
    ``2 * n_layers * batch * (longest + max_new_tokens) * n_kv_heads * d_head`` elements for keys and values, and
    ``batch * d_vocab`` logits.

    Args:
        model: a loaded model.
        prompts: token ids, of different lengths if need be; BOS is not added.
        max_new_tokens: how many tokens a prompt grows by at most.
        stop_tokens: ids after which a prompt grows no further; the stop token itself is kept.
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature: the logits are divided by it; 0 is greedy. This and all that follows up to ``seed`` matters only
            with ``do_sample=True``.
        top_k: draw from the ``top_k`` most likely tokens.
        top_p: draw from the fewest most likely tokens whose probabilities add up to ``top_p`` at least.
        freq_penalty: subtracted from a token's logit, after the temperature, for every time it has occurred, in the
            prompt or since.
        seed: makes the draws reproducible, for the same prompts in the same order; ``None`` draws from torch's global
            generator.
        taps: called before every step for the taps of that step. They act on that step's tokens: the padded prompts
            (``[batch, longest, ...]``) at the first step, one token per prompt (``[batch, 1, ...]``) after it. Those
            of the final norm act on the last position of every prompt only.
        past: ``"kept"`` keeps keys and values; ``"recomputed"`` reads the whole text anew at every step, so that the
            taps see all of it at every step.

    Raises:
        EmptyPromptError, PromptTooLongError, TokenRangeError: a prompt that cannot be continued for
            ``max_new_tokens`` within the model's context; nothing has been computed then.
        OptionError: an option out of range, or ``top_k`` together with ``top_p``.
        NonFiniteError: the logits of a step are NaN.

    Example:
        >>> new = generate_tokens(model, model.encode(["The capital of France is"]))        # doctest: +SKIP
        >>> model.tokenizer.decode(new[0])                                                  # doctest: +SKIP
    """
    check_choice("past", past, ("kept", "recomputed"))
    choice = _Choice(
        temperature=temperature if do_sample else 0.0,
        top_k=top_k,
        top_p=top_p,
        freq_penalty=freq_penalty,
        generator=None if seed is None else torch.Generator(model.device).manual_seed(seed),
    )
    _check_prompts(model.spec, prompts, max_new_tokens, stop_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return new
    stop = frozenset(stop_tokens)
    counts = _counts(model, prompts) if choice.counts_tokens else None
    text = _Text(model, prompts, max_new_tokens, past)
    growing = [True] * len(prompts)
    while True:
        chosen = choice.pick(text.next_logits(NO_TAPS if taps is None else taps()), counts)
        for row, token in enumerate(chosen.tolist()):
            if growing[row]:
                new[row].append(token)
                growing[row] = token not in stop
        if not any(growing) or max(map(len, new)) == max_new_tokens:
            return new
        if counts is not None:
            counts.scatter_add_(1, chosen[:, None], torch.ones_like(chosen[:, None]))
        text.add(chosen, growing)


class _Text:
    """The prompts and what has been added to them, as the forward reads them."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, past: Past) -> None:
        self.model = model
        n_tokens = [len(prompt) for prompt in prompts]
        self._unread = torch.zeros(len(prompts), max(n_tokens), dtype=torch.int64)
        for row, prompt in zip(self._unread, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._unread = self._unread.to(model.device)
        self._n_unread = torch.tensor(n_tokens, device=model.device)
        self._rows = torch.arange(len(prompts), device=model.device)
        self._past: KeyValueCache | None = None
        if past == "kept":
            # The last new token is never read.
            capacity = max(n_tokens) + max_new_tokens - 1
            self._past = KeyValueCache(model.spec, len(prompts), capacity, device=model.device, dtype=model.dtype)

    def next_logits(self, taps: Taps) -> Float[Tensor, "batch d_vocab"]:
        """Reads what has not been read yet and returns the logits of the token after it."""
        spec, weights = self.model.spec, self.model.weights
        if self._past is None:
            resid = forward(spec, weights, self._unread, taps=taps)
        else:
            resid = extend(spec, weights, self._unread, self._n_unread, self._past, taps=taps)
        # A row that has stopped has nothing unread; what is chosen for it is not looked at.
        last = resid[self._rows, (self._n_unread - 1).clamp_min(0)]
        logits = final_logits(spec, weights, last[:, None], taps=taps)[:, 0]
        if bool(logits.isnan().any()):
            raise NonFiniteError(
                "the logits of the next token are NaN: look at what the hooks write, or load the model with "
                "dtype=torch.float32"
            )
        return logits

    def add(self, chosen: Int[Tensor, " batch"], growing: Sequence[bool]) -> None:
        """Appends a token to every row that still grows."""
        grows = torch.tensor(growing, device=chosen.device)
        if self._past is not None:
            self._unread, self._n_unread = chosen[:, None], grows.long()
            return
        n_pos = int(self._n_unread.max()) + 1
        tokens = torch.nn.functional.pad(self._unread, (0, max(0, n_pos - self._unread.shape[1])))
        # Behind a row that has stopped this is padding, which nothing looks at.
        tokens[self._rows, self._n_unread] = chosen
        self._unread, self._n_unread = tokens, self._n_unread + grows


def _counts(model: Model, prompts: Sequence[Sequence[int]]) -> Int[Tensor, "batch d_vocab"]:
    """How often each token occurs in each prompt."""
    counted = [torch.bincount(torch.tensor(prompt), minlength=model.spec.d_vocab) for prompt in prompts]
    return torch.stack(counted).to(model.device)


def _check_prompts(
    spec: ModelSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: Collection[int]
) -> None:
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens={max_new_tokens} is negative: give how many tokens to add")
    for token in stop_tokens:
        if not 0 <= token < spec.d_vocab:
            raise TokenRangeError(
                f"stop token {token} is out of range: the model's vocabulary has {spec.d_vocab} ids "
                f"(0 to {spec.d_vocab - 1})"
            )
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise EmptyPromptError(f"prompt {row} has no token: give at least one (BOS will do)")
        if len(prompt) + max_new_tokens > spec.n_ctx:
            room = spec.n_ctx - len(prompt)
            advice = f"give max_new_tokens={room} or less" if room > 0 else "shorten it"
            raise PromptTooLongError(
                f"prompt {row} has {len(prompt)} tokens; with {max_new_tokens} more it would be longer than the "
                f"model's context (n_ctx={spec.n_ctx}): {advice}"
            )
        if not (min(prompt) >= 0 and max(prompt) < spec.d_vocab):
            token = next(token for token in prompt if not 0 <= token < spec.d_vocab)
            raise TokenRangeError(
                f"token id {token} of prompt {row} is out of range: the model's vocabulary has {spec.d_vocab} ids "
                f"(0 to {spec.d_vocab - 1})"
            )
