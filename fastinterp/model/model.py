"""A loaded model: its architecture, its parameters, its tokenizer and where they came from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from fastinterp.errors import TokenizerMissingError
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import Weights

Processing = Literal["transformer_lens", "none"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, as it is written into every result."""

    source: str
    revision: str | None = None
    processing: Processing = "transformer_lens"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What :func:`fastinterp.load` returns.

    ``tokenizer`` is a Hugging Face fast tokenizer, or ``None`` (then prompts must be token ids).
    """

    spec: ModelSpec
    weights: Weights
    tokenizer: Any | None
    origin: Origin

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.weights.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weights.W_E.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Model":
        """Returns the model on another device or in another dtype; raises :class:`NonFiniteError` if it overflows."""
        weights = self.weights.to(device=device, dtype=dtype)
        weights.check_finite()
        return dataclasses.replace(self, weights=weights)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the (processed) parameters; identifies the model in a store."""
        return self.weights.sha256()

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """Hash of the vocabulary and of the tokenizer's special tokens, or ``None``."""
        if self.tokenizer is None:
            return None
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr((vocabulary, self.bos_token_id)).encode()).hexdigest()

    # Text <-> tokens ----------------------------------------------------------------------------------------------

    @property
    def bos_token_id(self) -> int | None:
        """The id that is prepended to a prompt, or ``None`` if the tokenizer has no such token.

        GPT-2-like tokenizers without a BOS token of their own use their end-of-text token, as TransformerLens does.
        """
        if self.tokenizer is None:
            return None
        bos: int | None = self.tokenizer.bos_token_id
        end: int | None = self.tokenizer.eos_token_id
        return end if bos is None else bos

    def encode(self, texts: Sequence[str], *, prepend_bos: bool | None = None) -> list[list[int]]:
        """Returns the token ids of every text, BOS first where asked.

        ``prepend_bos=None`` takes the family's default (``spec.default_prepend_bos``), as TransformerLens does. A text
        that spells out the BOS token gets a second one, also as there. An empty text gives an empty list without BOS.
        """
        if self.tokenizer is None:
            raise TokenizerMissingError(
                "this model has no tokenizer: give prompts and answers as token ids, or load the model with one "
                "(fastinterp.load(hf_model, tokenizer=...))"
            )
        if not texts:
            return []
        if prepend_bos is None:
            prepend_bos = self.spec.default_prepend_bos
        plain = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.bos_token_id if prepend_bos else None
        if bos is None:
            return [list(ids) for ids in plain]
        return [[bos, *ids] for ids in plain]

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of each token id (``<id>`` without a tokenizer)."""
        if self.tokenizer is None:
            return [f"<{token}>" for token in token_ids]
        return [self.tokenizer.decode([token]) for token in token_ids]
