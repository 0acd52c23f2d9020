"""What a ``HookedTransformer`` says about its model: settings, parameters, text to tokens and back, where it is."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import AnswerTokenError, OptionError, TokenRangeError, check_choice
from fastinterp.hooked.config import HookedConfig, config_of
from fastinterp.hooked.hooks import HookPoints
from fastinterp.hooked.parameter_surface import ParameterSurface
from fastinterp.hooked.text import Text
from fastinterp.load import choose_device
from fastinterp.model.model import Model

Own = TypeVar("Own", bound="Surface")


class Surface(ParameterSurface):
    """The attributes and small methods of :class:`~fastinterp.hooked.transformer.HookedTransformer`."""

    def __init__(self, model: Model, default_prepend_bos: bool | None = None) -> None:
        """Wraps what :func:`fastinterp.load` returned."""
        if not isinstance(model, Model):
            raise OptionError(
                f"HookedTransformer wraps what fastinterp.load returned, not {type(model).__name__}: type "
                "HookedTransformer.from_pretrained(...)"
            )
        self.model = model
        self.flags: set[str] = set()
        self.points = HookPoints(model.spec)
        # Contexts count downwards, so that they never meet a level that somebody gave.
        self._levels = itertools.count(-1, -1)
        bos = model.spec.default_prepend_bos if default_prepend_bos is None else default_prepend_bos
        self.text = Text(model, bos)

    def plain_model(self) -> Model:
        """Returns the model for analyses, which run no hooks, with this one's default for BOS.

        Raises:
            OptionError: functions at hook points, which would be passed over.
        """
        hooked = [point.name for point in self.points.hooked()]
        if hooked:
            raise OptionError(
                f"the HookedTransformer has hooks ({', '.join(hooked[:3])}{', ...' if len(hooked) > 3 else ''}), which "
                "analyses do not run: type model.reset_hooks(), or give model.model to do without them"
            )
        spec, bos = self.model.spec, self.text.default_prepend_bos
        if spec.default_prepend_bos == bos:
            return self.model
        return dataclasses.replace(self.model, spec=dataclasses.replace(spec, default_prepend_bos=bos))

    # Settings ----------------------------------------------------------------------------------------------------

    @property
    def cfg(self) -> HookedConfig:
        """The settings, as they are now."""
        return config_of(self.model, self.flags, self.text.default_prepend_bos)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or ``None``."""
        return self.model.tokenizer

    def set_use_attn_result(self, use: bool) -> None:
        """Whether full caches and predicates include ``hook_result``; by name it is always there."""
        self._set("use_attn_result", use)

    def set_use_attn_in(self, use: bool) -> None:
        """Whether full caches and predicates include ``hook_attn_in``; by name it is always there."""
        self._set("use_attn_in", use)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Whether full caches and predicates include ``hook_q_input`` and its like; by name they are always there."""
        self._set("use_split_qkv_input", use)

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Whether full caches and predicates include ``hook_mlp_in``; by name it is always there."""
        self._set("use_hook_mlp_in", use)

    def _set(self, flag: str, use: bool) -> None:
        self.flags = self.flags | {flag} if use else self.flags - {flag}

    def eval(self: Own) -> Own:
        """Returns the model: it has no dropout, and nothing to switch."""
        return self

    def to(self: Own, target: torch.device | str | torch.dtype) -> Own:
        """Moves the model to a device or into a dtype, in place, and returns it; hooks stay."""
        device, dtype = (None, target) if isinstance(target, torch.dtype) else (choose_device(target), None)
        self.model = self.model.to(device=device, dtype=dtype)
        self.text = Text(self.model, self.text.default_prepend_bos)
        return self

    def cuda(self: Own) -> Own:
        """Moves the model to the first CUDA device."""
        return self.to("cuda")

    def cpu(self: Own) -> Own:
        """Moves the model to the CPU."""
        return self.to("cpu")

    def __repr__(self) -> str:
        """Says which model it wraps."""
        return f"HookedTransformer({self.model!r})"

    # Text ---------------------------------------------------------------------------------------------------------

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Returns the tokens of a text or of several, padded on the right; ``truncate`` keeps ``n_ctx`` at most.

        ``move_to_device=False`` returns them on the CPU. ``padding_side`` other than ``"right"`` raises
        :class:`OptionError` where something is padded.
        """
        tokens = self.text.to_tokens(input, prepend_bos, truncate, padding_side)
        return tokens if move_to_device else tokens.cpu()

    def to_string(self, tokens: Any) -> str | list[str]:
        """Returns the text of a token or of a row of tokens, or the texts of a batch."""
        return self.text.to_string(tokens)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Returns the strings of the tokens of a text or of a row of tokens; of a list of texts, a list for each.

        Nothing is padded, so ``padding_side`` changes nothing.
        """
        return self.text.to_str_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """Returns the one token of a string; raises :class:`AnswerTokenError` if it is several."""
        return self.text.to_single_token(string)

    def to_single_str_token(self, int_token: int) -> str:
        """Returns the string of one token."""
        return self.text.to_single_str_token(int_token)

    def get_token_position(
        self,
        single_token: str | int | Int[Tensor, ""],
        input: str | Int[Tensor, "..."],
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Returns where a token stands in a text, or in tokens ``[pos]`` or ``[1, pos]``: first or last.

        One prompt is not padded, so ``padding_side`` changes nothing.

        Raises:
            AnswerTokenError: a string that is not one token, or a token that does not occur.
        """
        check_choice("mode", mode, ("first", "last"))
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else torch.as_tensor(input)
        if tokens.ndim == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise OptionError(f"get_token_position takes one prompt, not a batch of {tuple(tokens.shape)}")
        found = (tokens == token).nonzero()[:, 0].tolist()
        if not found:
            shown = repr(single_token if self.tokenizer is None else self.to_single_str_token(token))
            raise AnswerTokenError(f"the token {shown} does not occur in the prompt: {self._shown(tokens)}")
        return int(found[0 if mode == "first" else -1])

    def _shown(self, tokens: Tensor) -> Any:
        return tokens.tolist() if self.tokenizer is None else self.to_str_tokens(tokens)

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Returns the columns of ``W_U`` of tokens: along them the residual stream raises their logits.

        Of several tokens as many rows in their shape, of a single one just ``[d_model]``.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.model.device)
        d_vocab = self.model.spec.d_vocab
        if bool(((ids < 0) | (ids >= d_vocab)).any()):
            raise TokenRangeError(f"token ids lie outside of the vocabulary, which has {d_vocab}: {ids.tolist()}")
        directions = self.W_U[:, ids.reshape(-1)].t()
        # A single token has one direction, in whatever shape it came.
        return directions[0] if ids.numel() == 1 else directions.reshape(*ids.shape, -1)
