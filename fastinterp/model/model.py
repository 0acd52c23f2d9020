"""A loaded model: its architecture, its parameters, its tokenizer and where they came from."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import (
    OptionError,
    PromptTooLongError,
    TokenizerMissingError,
    TokenRangeError,
    UnknownActivationError,
)
from fastinterp.model.forward import final_logits, forward
from fastinterp.model.intervene import Capture, Edit, Taps
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import Weights
from fastinterp.names import check_index

# "custom" is some other choice of steps, which HookedTransformer.from_pretrained can make.
Processing = Literal["transformer_lens", "none", "custom"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, as it is written into every result."""

    source: str
    revision: str | None = None
    processing: Processing = "transformer_lens"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one forward gave: the final residual stream and the captured activations, by name and layer."""

    model: "Model"
    resid: Float[Tensor, "batch pos d_model"]
    values: Mapping[tuple[str, int | None], Tensor]

    def __repr__(self) -> str:
        """Says which activations were captured."""
        captured = ", ".join(sorted({name for name, _ in self.values})) or "nothing"
        return f"Run({self.resid.shape[0]} sequences of {self.resid.shape[1]} tokens, captured: {captured})"

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        """Returns ``run["z", 9]``, or ``run["embed"]`` for activations outside of the blocks; negative layers count."""
        name, layer = (key, None) if isinstance(key, str) else key
        if layer is not None:
            layer = check_index("layer", layer, self.model.spec.n_layers)
        if (name, layer) not in self.values:
            captured = ", ".join(sorted({captured for captured, _ in self.values})) or "nothing"
            if layer is None and any(name == other for other, _ in self.values):
                raise UnknownActivationError(f"{name!r} was captured layer by layer: type run[{name!r}, 0]")
            where = repr(name) if layer is None else f"{name!r} of layer {layer}"
            raise UnknownActivationError(f"{where} was not captured (captured: {captured}): type capture=[{name!r}]")
        return self.values[name, layer]

    def stacked(self, name: str) -> Float[Tensor, "layer ..."]:
        """Returns an activation of all layers as one tensor."""
        return torch.stack([self[name, layer] for layer in range(self.model.spec.n_layers)])

    def logits(self, pos: slice | int = slice(None)) -> Tensor:
        """Returns the logits at all positions or some: ``logits(-1)`` is ``[batch, d_vocab]``."""
        return final_logits(self.model.spec, self.model.weights, self.resid[:, pos])


@dataclass(frozen=True, kw_only=True)
class Model:
    """What :func:`fastinterp.load` returns.

    ``tokenizer`` is a Hugging Face fast tokenizer, or ``None`` (then prompts must be token ids).
    """

    spec: ModelSpec
    weights: Weights
    tokenizer: Any | None
    origin: Origin

    def __repr__(self) -> str:
        """Says what it is; the weights would fill pages."""
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        return (
            f"Model({spec.family}, {spec.n_layers} layers, {spec.n_heads} heads, d_model {spec.d_model}, d_vocab "
            f"{spec.d_vocab}, {dtype} on {self.device}, from {self.origin.source!r})"
        )

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

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        capture: Iterable[Capture | str] = (),
        edits: Iterable[Edit] = (),
    ) -> Run:
        """Runs tokens (padded on the right) through the model and returns what was captured: hooks as data.

        A name captures an activation at all layers, ``Capture(name="z", layers=(3, -1))`` at some;
        ``Edit(site="z", layer=9, head=6, replacement=0.0)`` replaces one. Names are those of ``fastinterp.names``.
        Gradients are recorded as everywhere in torch: put the call under ``torch.no_grad()`` where none are wanted, and
        make an activation their beginning with ``requires_grad_()`` on a replacement.

        Raises :class:`UnknownActivationError` and :class:`SiteRangeError` for what the model does not have,
        :class:`PromptTooLongError` and :class:`TokenRangeError` for tokens that it cannot take. Memory:
        what is captured, and a few ``[batch, pos, d_mlp]`` tensors; logits only once ``.logits()`` is called.

        Example:
            >>> run = model.run(tokens, capture=["z", "pattern"])                  # doctest: +SKIP
            >>> run["z", 9].shape                                                  # doctest: +SKIP
            torch.Size([8, 16, 12, 64])
        """
        check_tokens(self.spec, tokens)
        taps = Taps.of(self.spec.n_layers, capture=capture, edits=edits)
        resid = forward(self.spec, self.weights, tokens.to(self.device), taps=taps)
        return Run(model=self, resid=resid, values=taps.values)

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


def check_tokens(spec: ModelSpec, tokens: Int[Tensor, "batch pos"]) -> None:
    """Raises for tokens that the model cannot take: none, too many, or outside of the vocabulary."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] == 0:
        raise OptionError(
            f"the input has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected tokens [batch, pos], at "
            "least one of them"
        )
    if tokens.shape[1] > spec.n_ctx:
        raise PromptTooLongError(f"the input has {tokens.shape[1]} tokens, the model takes {spec.n_ctx} at most")
    if bool(((tokens < 0) | (tokens >= spec.d_vocab)).any()):
        raise TokenRangeError(
            f"token ids lie between {int(tokens.min())} and {int(tokens.max())}, the vocabulary has {spec.d_vocab}"
        )
