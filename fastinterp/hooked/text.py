"""Text to tokens and back, with the return conventions of TransformerLens."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastinterp.errors import AnswerTokenError, OptionError, TokenizerMissingError
from fastinterp.model.model import Model


class Text:
    """The tokenisation of one model. ``default_prepend_bos`` is what ``prepend_bos=None`` means."""

    def __init__(self, model: Model, default_prepend_bos: bool) -> None:
        self.model, self.default_prepend_bos = model, default_prepend_bos

    @property
    def pad_token_id(self) -> int:
        """What stands behind the shorter ones of several prompts; any token would do, as nothing looks at it."""
        tokenizer = self.model.tokenizer
        candidates = (
            () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        )
        return next((int(token) for token in candidates if token is not None), 0)

    def ids(self, texts: Sequence[str], prepend_bos: bool | None, truncate: bool) -> list[list[int]]:
        """Returns the token ids of every text, at most a context of them if they may be truncated."""
        if prepend_bos is None:
            prepend_bos = self.default_prepend_bos
        encoded = self.model.encode(texts, prepend_bos=prepend_bos)
        limit = self.model.spec.n_ctx
        return [ids[:limit] for ids in encoded] if truncate else encoded

    def padded(self, prompts: Sequence[Sequence[int]]) -> Int[Tensor, "batch pos"]:
        """Returns prompts as one tensor on the model's device, padded on the right."""
        longest = max((len(ids) for ids in prompts), default=0)
        rows = [[*ids, *[self.pad_token_id] * (longest - len(ids))] for ids in prompts]
        return torch.tensor(rows, dtype=torch.int64, device=self.model.device).view(len(prompts), longest)

    def to_tokens(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        truncate: bool = True,
        padding_side: str | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Returns the tokens of one text (``batch`` is 1) or of several, padded on the right."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = self.ids(texts, prepend_bos, truncate)
        if len({len(row) for row in ids}) > 1:
            self.check_padding_side(padding_side)
        return self.padded(ids)

    def check_padding_side(self, side: str | None) -> None:
        """Raises :class:`OptionError` for prompts that shall be padded elsewhere than on the right."""
        if side not in (None, "right"):
            raise OptionError(
                f"padding_side={side!r}, but prompts of different lengths are padded on the right: leave it out, and "
                "read each prompt at its own last token"
            )

    def to_string(self, tokens: Any) -> str | list[str]:
        """Returns the text of a token or of a row of tokens, or the texts of a batch."""
        if self.model.tokenizer is None:
            raise TokenizerMissingError("this model has no tokenizer: load it with load(..., tokenizer=...)")
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [str(self.model.tokenizer.decode(row.tolist())) for row in ids]
        if ids.ndim > 2:
            raise OptionError(f"to_string takes a token, a row of tokens or a batch, not a shape of {tuple(ids.shape)}")
        return str(self.model.tokenizer.decode(ids.reshape(-1).tolist()))

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """Returns the strings of the tokens of a text or of a row of tokens; of a list of texts, a list for each."""
        if isinstance(text, str):
            (ids,) = self.ids([text], prepend_bos, truncate=False)
        elif isinstance(text, Sequence) and text and all(isinstance(item, str) for item in text):
            return [self.model.token_strings(ids) for ids in self.ids(list(text), prepend_bos, truncate=False)]
        else:
            tokens = torch.as_tensor(text)
            if tokens.ndim == 2 and len(tokens) == 1:
                tokens = tokens[0]
            if tokens.ndim > 1:
                raise OptionError(
                    f"to_str_tokens takes one prompt, not a batch of {tuple(tokens.shape)}: type "
                    "[model.to_str_tokens(row) for row in tokens]"
                )
            ids = tokens.reshape(-1).tolist()
        return self.model.token_strings(ids)

    def to_single_token(self, string: str) -> int:
        """Returns the one token of a string; raises :class:`AnswerTokenError` with its tokens if it is not one."""
        (ids,) = self.model.encode([string], prepend_bos=False)
        if len(ids) != 1:
            raise AnswerTokenError(f"{string!r} is not one token but {len(ids)}: {self.model.token_strings(ids)}")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """Returns the string of one token."""
        return self.model.token_strings([int(token)])[0]
