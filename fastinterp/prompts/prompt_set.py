"""Prompts with their answers, as they come from a file or from Python lists."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastinterp.errors import OptionError, PromptError, PromptFileError, nearest
from fastinterp.model.model import Model
from fastinterp.prompts.columns import Answer, Prompt, answer_column, id_column, prompt_column
from fastinterp.prompts.readers import read_table
from fastinterp.prompts.tokenized import TokenizedPrompts

RequiredColumn = Literal["answer", "wrong", "corrupt"]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts, each with an id and, where there is one, its answer, a wrong answer and a corrupt prompt.

    Make one with :meth:`read` or :meth:`of`. ``answer``, ``wrong`` and ``corrupt`` are ``None`` if no prompt
    has one, else they have one value per prompt, ``None`` where it is missing. ``other_columns`` names what
    the file held besides.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[str, ...]
    answer: tuple[Answer | None, ...] | None = None
    wrong: tuple[Answer | None, ...] | None = None
    corrupt: tuple[Prompt | None, ...] | None = None
    other_columns: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Raises :class:`~fastinterp.errors.PromptError` if column lengths differ or an id stands twice."""
        if not self.prompts:
            raise PromptError("a prompt set needs at least one prompt, got none")
        for name in ("ids", "answer", "wrong", "corrupt"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.prompts):
                raise PromptError(
                    f"{name} has {len(column)} values for {len(self.prompts)} prompts: give one per prompt "
                    "(several alternative answers of one prompt as a list inside the list)"
                )
        counts: dict[str, int] = {}
        for id in self.ids:
            counts[id] = counts.get(id, 0) + 1
        twice = [id for id, count in counts.items() if count > 1]
        if twice:
            shown = ", ".join(map(repr, twice[:5])) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
            raise PromptError(f"ids stand more than once: {shown}. Make them unique, or leave them out")

    @classmethod
    def of(
        cls,
        prompts: Iterable[Any],
        *,
        answer: Iterable[Any] | None = None,
        wrong: Iterable[Any] | None = None,
        corrupt: Iterable[Any] | None = None,
        ids: Iterable[Any] | None = None,
    ) -> "PromptSet":
        """Makes a prompt set from Python lists.

        A prompt (or corrupt prompt) is a string or a list of token ids. An answer is a string, a token id, or
        a list of these: several alternatives, whose logits the metrics average. ``None`` stands for a missing
        value; ids default to ``"0"``, ``"1"``, ... Raises :class:`~fastinterp.errors.PromptError` for values
        of another kind, columns of different length and ids that stand twice.

        >>> PromptSet.of(["When John and Mary met, John waved to"], answer=[" Mary"], wrong=[" John"]).ids
        ('0',)
        """
        given = prompt_column("prompts", prompts)
        present = tuple(prompt for prompt in given if prompt is not None)
        if len(present) < len(given):
            raise PromptError(f"row {given.index(None)} has no prompt: every row needs one")
        return cls(
            prompts=present,
            ids=id_column(ids, len(given)),
            answer=None if answer is None else _or_none(answer_column("answer", answer), len(given)),
            wrong=None if wrong is None else _or_none(answer_column("wrong", wrong), len(given)),
            corrupt=None if corrupt is None else _or_none(prompt_column("corrupt", corrupt), len(given)),
        )

    @classmethod
    def read(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> "PromptSet":
        """Reads a prompt file: ``.txt`` (one prompt per line), ``.jsonl``, ``.csv`` or ``.parquet``.

        The columns are ``prompt`` and, optionally, ``answer``, ``wrong``, ``corrupt`` and ``id``; ``columns``
        says what the file calls them where that differs. Further columns are allowed and not used. Text is
        kept as it stands, spaces included. CSV cells are always text (an empty one is a missing value); token
        ids and alternative answers need ``.jsonl`` or ``.parquet``.

        Raises :class:`~fastinterp.errors.PromptFileError` for a file that is missing, empty, damaged, of an
        unknown kind or without the column, and :class:`~fastinterp.errors.PromptError` for a value of the
        wrong kind.

        >>> PromptSet.read("ioi.csv", columns={"prompt": "text", "answer": "target"})  # doctest: +SKIP
        """
        path = Path(path)
        table = read_table(path, columns)
        values = table.values
        try:
            prompts = cls.of(
                values["prompt"],
                answer=values.get("answer"),
                wrong=values.get("wrong"),
                corrupt=values.get("corrupt"),
                ids=values.get("id"),
            )
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from error
        return replace(prompts, other_columns=table.other_columns)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def head(self, n: int) -> "PromptSet":
        """Returns the first ``n`` prompts (or all, if fewer); raises ``OptionError`` for ``n`` below 1."""
        if n < 1:
            raise OptionError(f"n={n} is not positive: say how many prompts to keep")
        return replace(
            self,
            prompts=self.prompts[:n],
            ids=self.ids[:n],
            answer=self.answer and self.answer[:n],
            wrong=self.wrong and self.wrong[:n],
            corrupt=self.corrupt and self.corrupt[:n],
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields every prompt as a dict of ``id``, ``prompt`` and those other columns that the set has."""
        columns: dict[str, tuple[Any, ...]] = {"id": self.ids, "prompt": self.prompts}
        for name in ("answer", "wrong", "corrupt"):
            column = getattr(self, name)
            if column is not None:
                columns[name] = column
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    def write(self, path: str | Path) -> None:
        """Writes the prompts as ``.jsonl``, so that :meth:`read` gives an equal set.

        Raises :class:`~fastinterp.errors.PromptFileError` for another suffix.
        """
        path = Path(path)
        if path.suffix.lower() != ".jsonl":
            raise PromptFileError(f"{path}: prompts are written as .jsonl: choose {path.with_suffix('.jsonl')}")
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row in self.rows():
                file.write(json.dumps(row) + "\n")

    def content_hash(self) -> str:
        """Returns the SHA-256 of ids, prompts, answers and corrupt prompts; identifies the set in a store."""
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def tokenize(
        self,
        model: Model,
        *,
        prepend_bos: bool | None = None,
        answer_token: Literal["single", "first"] = "single",
        bad_prompts: Literal["error", "reject"] = "error",
        require: Collection[RequiredColumn] = (),
    ) -> TokenizedPrompts:
        """Returns the token ids of every prompt and answer, checked against the model.

        ``prepend_bos=None`` does as TransformerLens does for the model's family. Prompts given as token ids
        are taken as they are: no BOS is added to them, and they need no tokenizer. Answers are tokenised
        without BOS and must be one token each; ``answer_token="first"`` takes the first token of longer ones.
        Alternatives that come to the same token count once. A row without an answer gets -1, unless
        ``require`` names the columns that no row may lack.

        Raises, naming the first ten rows at fault (the class is that of the first one):

        - :class:`~fastinterp.errors.EmptyPromptError`: no token of its own besides BOS;
        - :class:`~fastinterp.errors.PromptTooLongError`: more tokens than ``model.spec.n_ctx``;
        - :class:`~fastinterp.errors.TokenRangeError`: a token id that the model does not have;
        - :class:`~fastinterp.errors.AnswerTokenError`: an answer that is not one token, is missing though
          required, or is the same token as the wrong one;
        - :class:`~fastinterp.errors.PromptPairError`: a corrupt prompt that is missing in this row only, or
          differs from the clean one in token count.

        ``bad_prompts="reject"`` lists such rows in ``rejected`` instead and leaves them out of batches. A text
        prompt without a tokenizer raises :class:`~fastinterp.errors.TokenizerMissingError`, an unknown option
        :class:`~fastinterp.errors.OptionError`, both in any case. An answer such as ``"Mary"`` behind a prompt that
        ends in a word, where ``" Mary"`` is a token too, warns (:class:`~fastinterp.errors.AnswerSpaceWarning`).

        >>> tokenized = prompts.tokenize(model, bad_prompts="reject")  # doctest: +SKIP
        >>> [rejection.reason for rejection in tokenized.rejected]  # doctest: +SKIP
        ["answer ' Alessandra' of prompt 17 (id '17') is 3 tokens (' Aless', 'and', 'ra'): ..."]
        """
        # Imported here: tokenizing.py needs this class.
        from fastinterp.prompts.tokenizing import tokenize_prompts

        return tokenize_prompts(
            self, model, prepend_bos=prepend_bos, answer_token=answer_token, bad_prompts=bad_prompts, require=require
        )

    def missing_column(self, name: RequiredColumn) -> str:
        """Returns the message for a set in which no prompt has the column ``name``."""
        hint = nearest(name, self.other_columns)
        if hint:
            hint = f" (the file has other columns{hint})"
        return (
            f"no prompt has a value in the column {name!r}{hint}: give it in PromptSet.of({name}=[...]), "
            f'or say which column of the file holds it: columns={{"{name}": "<its name in the file>"}} '
            f"(--column {name}=<its name in the file>)"
        )


def _or_none(column: tuple[Any, ...], size: int) -> tuple[Any, ...] | None:
    """A column of the right length without any value is the same as no column."""
    return None if len(column) == size and all(value is None for value in column) else column
