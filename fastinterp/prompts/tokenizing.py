"""From a prompt set to token ids, with every check that keeps bad input from becoming a number."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastinterp.errors import (
    AnswerSpaceWarning,
    AnswerTokenError,
    EmptyPromptError,
    OptionError,
    PromptError,
    PromptPairError,
    PromptTooLongError,
    TokenRangeError,
    check_choice,
)
from fastinterp.model.model import Model
from fastinterp.prompts.columns import Answer, Prompt
from fastinterp.prompts.prompt_set import PromptSet, RequiredColumn
from fastinterp.prompts.tokenized import Rejection, TokenizedPrompts

AnswerToken = Literal["single", "first"]
_SHOWN = 10
_BEFORE_A_SPACE = (",", ";", ":", "?", "!", "%")

# What to type, in Python and on the command line.
REJECT = 'bad_prompts="reject" (--bad-prompts reject)'


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """The token ids of every row before any check; ``words`` has those of every answer given as text."""

    prompts: PromptSet
    model: Model
    answer_token: AnswerToken
    require: frozenset[str]
    prepend_bos: bool
    clean: list[list[int]]
    corrupt: list[list[int]] | None
    words: dict[str, list[int]]


def tokenize_prompts(
    prompts: PromptSet,
    model: Model,
    *,
    prepend_bos: bool | None,
    answer_token: AnswerToken,
    bad_prompts: Literal["error", "reject"],
    require: Collection[RequiredColumn],
) -> TokenizedPrompts:
    """Does the work of :meth:`fastinterp.prompts.PromptSet.tokenize`."""
    check_choice("answer_token", answer_token, ("single", "first"))
    check_choice("bad_prompts", bad_prompts, ("error", "reject"))
    for name in require:
        check_choice("require", name, ("answer", "wrong", "corrupt"))
        if getattr(prompts, name) is None:
            raise (PromptPairError if name == "corrupt" else AnswerTokenError)(prompts.missing_column(name))
    bos = _resolve_bos(prompts, model, prepend_bos)
    encoded = _Encoded(
        prompts=prompts,
        model=model,
        answer_token=answer_token,
        require=frozenset(require),
        prepend_bos=bos,
        clean=_encode_column(model, prompts.prompts, bos),
        corrupt=None if prompts.corrupt is None else _encode_column(model, prompts.corrupt, bos),
        words=_encode_words(model, prompts),
    )
    problems = {row: problem for row in range(len(prompts)) if (problem := next(_problems(encoded, row), None))}
    if problems and bad_prompts == "error":
        raise _combined(list(problems.values()), len(prompts))
    kept = [row not in problems for row in range(len(prompts))]
    _warn_of_spaces(encoded, kept)
    tokens = _arrays(encoded.clean, kept)
    return TokenizedPrompts(
        tokens=tokens,
        n_tokens=np.array([len(row) for row in tokens], dtype=np.int64),
        answer=_answer_array(encoded, prompts.answer, kept),
        wrong=_answer_array(encoded, prompts.wrong, kept),
        corrupt=None if encoded.corrupt is None else _arrays(encoded.corrupt, kept),
        rejected=tuple(
            Rejection(index=row, id=prompts.ids[row], reason=str(problem)) for row, problem in problems.items()
        ),
        texts=tuple(_text(model, prompt, keep) for prompt, keep in zip(prompts.prompts, kept, strict=True)),
        ids=prompts.ids,
        prepend_bos=bos,
        tokenizer_hash=model.tokenizer_hash,
    )


# Text to tokens ------------------------------------------------------------------------------------------


def _resolve_bos(prompts: PromptSet, model: Model, prepend_bos: bool | None) -> bool:
    has_text = any(isinstance(prompt, str) for prompt in prompts.prompts)
    if prepend_bos and has_text and model.tokenizer is not None and model.bos_token_id is None:
        raise OptionError("prepend_bos=True, but the model's tokenizer has no BOS token: use prepend_bos=False")
    wanted = model.spec.default_prepend_bos if prepend_bos is None else prepend_bos
    return wanted and has_text and model.bos_token_id is not None


def _encode_column(model: Model, column: Sequence[Prompt | None], bos: bool) -> list[list[int]]:
    """Token ids of every prompt; an empty list where there is none."""
    texts = [prompt for prompt in column if isinstance(prompt, str)]
    encoded = iter(_encode(model, texts, bos))
    return [next(encoded) if isinstance(prompt, str) else list(prompt or ()) for prompt in column]


def _encode_words(model: Model, prompts: PromptSet) -> dict[str, list[int]]:
    values = [value for column in (prompts.answer, prompts.wrong) for value in column or ()]
    words = list(dict.fromkeys(word for value in values for word in _alternatives(value) if isinstance(word, str)))
    return dict(zip(words, _encode(model, words, False), strict=True))


def _encode(model: Model, texts: list[str], bos: bool) -> list[list[int]]:
    # A set without text must not ask a model without a tokenizer for anything.
    return model.encode(texts, prepend_bos=bos) if texts else []


def _alternatives(value: Answer | None) -> tuple[str | int, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _answer_ids(encoded: _Encoded, value: Answer | None) -> list[int]:
    """The token that each alternative is scored by, each once. Every word must have passed its check."""
    tokens = [encoded.words[word][0] if isinstance(word, str) else word for word in _alternatives(value)]
    return list(dict.fromkeys(tokens))


def _answer_array(encoded: _Encoded, column: Sequence[Answer | None] | None, kept: list[bool]) -> np.ndarray | None:
    if column is None:
        return None
    ids = [_answer_ids(encoded, value) if keep else [] for value, keep in zip(column, kept, strict=True)]
    padded = np.full((len(ids), max(1, *map(len, ids))), -1, dtype=np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    return padded


def _arrays(token_lists: list[list[int]], kept: list[bool]) -> tuple[np.ndarray, ...]:
    return tuple(
        np.array(tokens if keep else [], dtype=np.int32) for tokens, keep in zip(token_lists, kept, strict=True)
    )


def _text(model: Model, prompt: Prompt, keep: bool) -> str:
    if isinstance(prompt, str):
        return prompt
    if keep and model.tokenizer is not None:
        # Decoded as a whole: a character may be spread over several tokens.
        return str(model.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))
    return "".join(f"<{token}>" for token in prompt)


# Checks --------------------------------------------------------------------------------------------------


def _problems(encoded: _Encoded, row: int) -> Iterator[PromptError]:
    """Yields what is wrong with a row, the most basic first."""
    prompts, spec = encoded.prompts, encoded.model.spec
    name = f"prompt {row} (id {prompts.ids[row]!r})"
    clean = encoded.clean[row]
    if len(clean) == _bos_tokens(encoded, prompts.prompts[row]):
        yield EmptyPromptError(f"{name} is empty: a prompt needs at least one token of its own besides BOS")
    if len(clean) > spec.n_ctx:
        yield PromptTooLongError(
            f"{name} has {len(clean)} tokens, the model's context (n_ctx) is {spec.n_ctx}: shorten it"
        )
    yield from _out_of_range(clean, spec.d_vocab, name)
    yield from _corrupt_problems(encoded, row, name)
    for column in ("answer", "wrong"):
        values = getattr(prompts, column)
        value = None if values is None else values[row]
        if value is None and column in encoded.require:
            yield AnswerTokenError(f"{name} has no {column}: give one, or leave the prompt out with {REJECT}")
        for word in _alternatives(value):
            yield from _word_problems(encoded, word, column, name)
    if prompts.answer is not None and prompts.wrong is not None:
        answer, wrong = (_answer_ids(encoded, column[row]) for column in (prompts.answer, prompts.wrong))
        if answer and set(answer) == set(wrong):
            shown = ", ".join(map(repr, encoded.model.token_strings(answer)))
            yield AnswerTokenError(
                f"answer and wrong of {name} are the same token ({shown}): their logit difference would "
                "always be 0. Give answers that differ in their first token"
            )


def _bos_tokens(encoded: _Encoded, prompt: Prompt) -> int:
    return int(encoded.prepend_bos and isinstance(prompt, str))


def _out_of_range(tokens: Sequence[int], d_vocab: int, name: str) -> Iterator[PromptError]:
    if tokens and not (min(tokens) >= 0 and max(tokens) < d_vocab):
        position = next(position for position, token in enumerate(tokens) if not 0 <= token < d_vocab)
        yield TokenRangeError(
            f"token id {tokens[position]} at position {position} of {name} is out of range: "
            f"the model's vocabulary has {d_vocab} ids (0 to {d_vocab - 1})"
        )


def _corrupt_problems(encoded: _Encoded, row: int, name: str) -> Iterator[PromptError]:
    if encoded.corrupt is None or encoded.prompts.corrupt is None:
        return
    if encoded.prompts.corrupt[row] is None:
        yield PromptPairError(f"{name} has no corrupt prompt, others have: give one to every prompt or to none")
    clean, corrupt = encoded.clean[row], encoded.corrupt[row]
    if len(clean) != len(corrupt):
        yield PromptPairError(
            f"the corrupt prompt of {name} has {len(corrupt)} tokens, the clean one {len(clean)}: every "
            "position needs its counterpart (swap words for words of as many tokens)"
        )
    yield from _out_of_range(corrupt, encoded.model.spec.d_vocab, f"the corrupt prompt of {name}")


def _word_problems(encoded: _Encoded, word: str | int, column: str, name: str) -> Iterator[PromptError]:
    d_vocab = encoded.model.spec.d_vocab
    if isinstance(word, int):
        if not 0 <= word < d_vocab:
            yield TokenRangeError(
                f"{column} {word} of {name} is out of range: the model's vocabulary has {d_vocab} ids "
                f"(0 to {d_vocab - 1}); text goes in quotes"
            )
        return
    tokens = encoded.words[word]
    if not tokens:
        yield AnswerTokenError(
            f"{column} {word!r} of {name} has no token: give the text of one token, or None for none"
        )
    if len(tokens) > 1 and encoded.answer_token == "single":
        pieces = ", ".join(map(repr, encoded.model.token_strings(tokens)))
        yield AnswerTokenError(
            f"{column} {word!r} of {name} is {len(tokens)} tokens ({pieces}): "
            f"give a one-token answer{_space_hint(encoded, word)}, "
            'or answer_token="first" (--answer-token first) to score its first token'
        )
    yield from _out_of_range(tokens[:1], d_vocab, f"{column} {word!r} of {name}")


def _space_hint(encoded: _Encoded, word: str) -> str:
    """Most tokenizers keep the space with the word: giving it without is the usual mistake."""
    other, how = (word[1:], "without its") if word.startswith(" ") else (" " + word, "with a")
    if other and len(encoded.model.encode([other], prepend_bos=False)[0]) == 1:
        return f" ({other!r}, {how} leading space, is one)"
    return ""


def _warn_of_spaces(encoded: _Encoded, kept: Sequence[bool]) -> None:
    """Warns of words that continue a prompt without the space that this tokenizer keeps with a word."""
    words = [word for word in encoded.words if word[:1].isalpha()]
    spaced = dict(zip(words, _encode(encoded.model, [" " + word for word in words], False), strict=True))
    meant = {
        word
        for word, tokens in spaced.items()
        # Where the word with its space is no single token, the one without may be what is wanted.
        if len(tokens) == 1 and tokens[0] != encoded.words[word][0] and len(encoded.words[word]) == 1
    }
    found = [
        (row, column, word)
        for column in ("answer", "wrong")
        for row, value in enumerate(getattr(encoded.prompts, column) or ())
        for word in _alternatives(value)
        if kept[row] and word in meant and _ends_in_a_word(encoded.prompts.prompts[row])
    ]
    if not found:
        return
    row, column, word = found[0]
    more = "" if len(found) == 1 else f", and {len(found) - 1} more"
    warnings.warn(
        f"{column} {word!r} of prompt {row} (id {encoded.prompts.ids[row]!r}) is another token than {' ' + word!r}, "
        f"which is what follows a prompt that ends without a space{more}: type {' ' + word!r}, or the token id "
        f"{encoded.words[word][0]} if the word shall be joined on",
        AnswerSpaceWarning,
        stacklevel=4,
    )


def _ends_in_a_word(prompt: Prompt) -> bool:
    """Whether a space is what comes next in text; not after a quote, a bracket or the marks of a chat."""
    return isinstance(prompt, str) and (prompt[-1:].isalnum() or prompt[-1:] in _BEFORE_A_SPACE)


def _combined(problems: list[PromptError], size: int) -> PromptError:
    """One error for all rows, of the class of the first."""
    if len(problems) == 1:
        return problems[0]
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return type(problems[0])(
        f"{len(problems)} of {size} prompts cannot be used:{shown}{more}\nMend them, or leave them out with {REJECT}"
    )
