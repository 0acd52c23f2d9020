"""``HookedTransformer.generate``: its arguments and results, around ``generate_tokens``."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from fastinterp.errors import OptionError, TokenizerMissingError, check_choice
from fastinterp.hooked.generation import generate_tokens
from fastinterp.model.intervene import Taps
from fastinterp.model.model import Model


@runtime_checkable
class Hooked(Protocol):
    """What :func:`generate` asks of a ``HookedTransformer``."""

    @property
    def model(self) -> Model:
        """The loaded model."""
        ...

    @property
    def cfg(self) -> Any:
        """Its ``default_prepend_bos`` is looked at."""
        ...

    def taps(self) -> Taps:
        """Returns fresh taps that run the registered hooks."""
        ...

    def to_single_token(self, string: str) -> int:
        """Returns the id of a string that is one token."""
        ...


def generate(
    hooked: Hooked,
    input: str | Sequence[str] | Tensor = "",
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    return_type: Literal["input", "str", "tokens"] = "input",
    verbose: bool = True,
    *,
    padding_side: str | None = None,
    stop_tokens: Collection[int | str] | Tensor | int | str | None = None,
    seed: int | None = None,
) -> str | list[str] | Int[Tensor, "batch pos"]:
    """Returns the input with what the model adds to it: a string for a string, a list for a list, tokens for tokens.

    The work is done by :func:`generate_tokens`, whose cost and memory apply; the registered hooks run at every step, on
    the tokens of that step. Strings are decoded without special tokens. Tokens are padded on the right with the
    end-of-sequence id (else the tokenizer's padding id, else 0). Every token of a tensor counts as real: give texts of
    different lengths as strings.

    Args:
        hooked: the model with its hooks.
        input: a string, strings of any lengths, or token ids ``[batch, pos]`` or ``[pos]``.
        max_new_tokens: how many tokens are added at most.
        stop_at_eos: stop after the end-of-sequence token.
        eos_token_id: one or more ids that count as end of sequence; ``None`` is the tokenizer's.
        do_sample: ``False`` takes the most likely token; ``top_k``, ``top_p``, ``temperature``, ``freq_penalty`` and
            ``seed`` then have no effect.
        top_k: see :func:`generate_tokens`, as for ``top_p``, ``temperature``, ``freq_penalty`` and ``seed``.
        use_past_kv_cache: ``False`` reads the whole text at every step: as slow as it sounds, but hooks see all of it.
        prepend_bos: put BOS in front of strings; ``None`` does what the model does by default.
        return_type: ``"input"`` returns what was given; ``"str"`` or ``"tokens"`` that.
        verbose: accepted for compatibility; nothing is printed.
        padding_side: ``"right"``; of texts that are returned as texts, whatever.
        stop_tokens: further tokens to stop after, as ids or as strings of one token each.

    Raises:
        TokenizerMissingError: strings were given or asked for, but the model has no tokenizer.
        OptionError: as in :func:`generate_tokens`, and for ``stop_at_eos`` without a known end-of-sequence id.
        EmptyPromptError, PromptTooLongError, TokenRangeError: see :func:`generate_tokens`.

    Example:
        >>> model.generate("The capital of France is", max_new_tokens=5, do_sample=False)   # doctest: +SKIP
        'The capital of France is Paris.'
    """
    check_choice("return_type", return_type, ("input", "str", "tokens"))
    model = hooked.model
    prompts = _prompts_of(hooked, input, prepend_bos)
    as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
    if as_text and model.tokenizer is None:
        raise TokenizerMissingError('this model has no tokenizer to decode with: ask for return_type="tokens"')
    if padding_side not in (None, "right") and not as_text:
        raise OptionError(f"padding_side={padding_side!r}, but tokens are padded on the right: leave it out")
    eos = _end_tokens(model, eos_token_id)
    if stop_at_eos and not eos:
        raise OptionError(
            "stop_at_eos=True, but the model's tokenizer has no end-of-sequence token: give eos_token_id=, or "
            "stop_at_eos=False"
        )
    if isinstance(stop_tokens, str | int):
        stop_tokens = [stop_tokens]
    given = stop_tokens.reshape(-1).tolist() if isinstance(stop_tokens, Tensor) else list(stop_tokens or ())
    stop = {hooked.to_single_token(token) if isinstance(token, str) else int(token) for token in given}
    new = generate_tokens(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop | set(eos) if stop_at_eos else stop,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        freq_penalty=freq_penalty,
        seed=seed,
        taps=hooked.taps,
        past="kept" if use_past_kv_cache else "recomputed",
    )
    whole = [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]
    if not as_text:
        return _padded(whole, _padding(model, eos), model.device)
    assert model.tokenizer is not None
    texts = [str(model.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in whole]
    return texts[0] if isinstance(input, str) else texts


def _prompts_of(hooked: Hooked, input: str | Sequence[str] | Tensor, prepend_bos: bool | None) -> list[list[int]]:
    if isinstance(input, Tensor):
        if input.is_floating_point() or input.ndim > 2:
            raise OptionError(
                f"the input has shape {tuple(input.shape)} and dtype {input.dtype}, expected token ids [batch, pos]"
            )
        tokens: list[list[int]] = torch.atleast_2d(input).tolist()
        return tokens
    if not isinstance(input, str) and any(not isinstance(text, str) for text in input):
        raise OptionError("the input is neither a string, nor strings, nor a tensor: type torch.tensor(token_ids)")
    texts = [input] if isinstance(input, str) else list(input)
    bos = hooked.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    return hooked.model.encode(texts, prepend_bos=bos)


def _end_tokens(model: Model, eos_token_id: int | Sequence[int] | Tensor | None) -> list[int]:
    if eos_token_id is None:
        eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
    if eos_token_id is None:
        return []
    # Whatever holds one number or several: an int, a list, a tensor, a number of numpy's.
    ends: list[int] = torch.as_tensor(eos_token_id).reshape(-1).tolist()
    return ends


def _padding(model: Model, eos: Sequence[int]) -> int:
    if eos:
        return eos[0]
    padding = None if model.tokenizer is None else model.tokenizer.pad_token_id
    return 0 if padding is None else int(padding)


def _padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Int[Tensor, "batch pos"]:
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens.to(device)
