"""What a ``HookedTransformer`` is given: texts, tokens or a residual stream, checked."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import NonFiniteError, OptionError, PromptTooLongError
from fastinterp.hooked.surface import Surface
from fastinterp.model.forward import embed
from fastinterp.model.model import check_tokens

# Arguments of TransformerLens for which there is nothing to do, as long as they say nothing.
ONLY_NONE = {
    "past_kv_cache": "generate() keeps a cache of its own; give all tokens here",
    "past_left_attention_mask": "give all tokens here",
    "shortformer_pos_embed": "no supported model has one",
    "position_ids": "positions count from the first token",
}


class Inputs(Surface):
    """The part of :class:`~fastinterp.hooked.transformer.HookedTransformer` that reads its input."""

    def as_tokens(
        self,
        input: str | Sequence[str] | Tensor,
        prepend_bos: bool | None = None,
        *,
        attention_mask: Any = None,
        padding_side: str | None = None,
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"] | None]:
        """Returns checked tokens, and the prompts' lengths where they are known: of several texts, or from a mask.

        ``attention_mask`` is ones, or ones and then zeros where a row is padded on the right; of texts it must be the
        padding that they get. Tokens behind a row's length count neither for the loss nor for anything real.
        """
        lengths = None
        if isinstance(input, str) or (isinstance(input, Sequence) and input and isinstance(input[0], str)):
            texts = [input] if isinstance(input, str) else [str(text) for text in input]
            ids = self.text.ids(texts, prepend_bos, truncate=True)
            tokens, lengths = self.text.padded(ids), torch.tensor([len(row) for row in ids])
        else:
            tokens = torch.as_tensor(input, device=self.model.device)
            if tokens.is_floating_point() or tokens.ndim not in (1, 2):
                raise OptionError(
                    f"the input has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected tokens [batch, pos] "
                    "(a residual stream needs start_at_layer=)"
                )
            tokens = tokens.long()[None] if tokens.ndim == 1 else tokens.long()
        if tokens.shape[1] == 0:
            raise OptionError("the input has no tokens: give a text that is not empty, or prepend_bos=True")
        check_tokens(self.model.spec, tokens)
        if lengths is not None and bool((lengths < tokens.shape[1]).any()):
            self.text.check_padding_side(padding_side)
        if attention_mask is not None:
            lengths = lengths_of(attention_mask, tuple(tokens.shape), lengths)
        return tokens, lengths

    def input_to_embed(
        self,
        input: str | Sequence[str] | Tensor,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], None, Tensor | None]:
        """Returns the residual stream in front of the first block, the tokens, ``None``, and the mask that was given.

        Hooks on the embeddings run. ``model(residual, start_at_layer=0, tokens=tokens)`` goes on from there.
        """
        tokens, _ = self.as_tokens(input, prepend_bos, attention_mask=attention_mask, padding_side=padding_side)
        return embed(self.model.weights, tokens, self.points.taps()), tokens, None, attention_mask

    def as_residual(self, input: Any) -> Float[Tensor, "batch pos d_model"]:
        """Returns a checked copy of a residual stream, as the beginning of what gradients are recorded of."""
        d_model = self.model.spec.d_model
        if not isinstance(input, Tensor) or input.ndim != 3 or input.shape[-1] != d_model:
            shape = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise OptionError(f"start_at_layer needs a residual stream [batch, pos, {d_model}], not {shape}")
        if not bool(torch.isfinite(input).all()):
            raise NonFiniteError("the residual stream holds NaN or infinity")
        if input.shape[1] > self.model.spec.n_ctx:
            raise PromptTooLongError(
                f"the residual stream has {input.shape[1]} positions, the model takes {self.model.spec.n_ctx} at most"
            )
        # A copy, so that what is cached of it is not the caller's own.
        resid = input.to(device=self.model.device, dtype=self.model.dtype, copy=True)
        if torch.is_grad_enabled() and not resid.requires_grad:
            resid = resid.detach().requires_grad_()
        return resid


def check_empty(options: dict[str, Any]) -> None:
    """Raises unless these are arguments that TransformerLens has and that say nothing."""
    for name, value in options.items():
        if name not in ONLY_NONE:
            raise TypeError(f"HookedTransformer got an unexpected keyword argument {name!r}")
        if value is not None:
            raise OptionError(f"{name} must be None: {ONLY_NONE[name]}")


def lengths_of(mask: Any, shape: tuple[int, ...], lengths: Tensor | None = None) -> Int[Tensor, " batch"]:
    """Returns how many tokens each prompt has by its mask; raises :class:`OptionError` for another than that."""
    mask = torch.as_tensor(mask)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != shape:
        raise OptionError(f"attention_mask has shape {tuple(mask.shape)}, the tokens have {shape}")
    given: Tensor = (mask != 0).sum(1).cpu()
    behind = torch.arange(mask.shape[1]) >= given[:, None]
    if bool(((mask.cpu() != 0) == behind).any()) or bool((given == 0).any()):
        raise OptionError(
            "attention_mask is not that of prompts padded on the right (ones, then zeros): positions count from the "
            "first token, and every token sees those before it. Give texts, or move the padding behind the prompts"
        )
    if lengths is not None and not torch.equal(given, lengths):
        raise OptionError(
            f"attention_mask says that the prompts have {given.tolist()} tokens, but they have {lengths.tolist()}: "
            "leave it out, texts are padded by the model"
        )
    return given
