"""What a ``HookedTransformer`` says about its model: settings, parameters, text to tokens and back, where it is."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import OptionError, TokenRangeError
from fastinterp.hooked.hooks import HookPoint, HookPoints
from fastinterp.hooked.parameters import FinalNorm, HookedConfig, Part, Table, Unembed, config_of, parameter, stacked
from fastinterp.hooked.text import Text
from fastinterp.load import choose_device
from fastinterp.model.model import Model

Own = TypeVar("Own", bound="Surface")
STACKED = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out")


class Surface:
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

    # Settings and parameters --------------------------------------------------------------------------------------

    @property
    def cfg(self) -> HookedConfig:
        """The settings, as they are now."""
        return config_of(self.model, self.flags, self.text.default_prepend_bos)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or ``None``."""
        return self.model.tokenizer

    @property
    def unembed(self) -> Unembed:
        """The unembedding."""
        return Unembed(self.model)

    @property
    def ln_final(self) -> FinalNorm:
        """The final norm."""
        return FinalNorm(self.model, self.points)

    @property
    def blocks(self) -> list[Part]:
        """The blocks: ``model.blocks[3].attn.W_O``, ``model.blocks[3].attn.hook_z``."""
        model = self.model

        def of(layer: int) -> Callable[[str], Tensor]:
            return lambda name: parameter(model, model.weights.blocks[layer], name)

        return [Part(f"blocks.{layer}", self.points, of(layer)) for layer in range(model.spec.n_layers)]

    @property
    def embed(self) -> Table:
        """The embedding: ``model.embed.W_E``."""
        return Table(self.model, "W_E")

    @property
    def pos_embed(self) -> Table:
        """The position embedding: ``model.pos_embed.W_pos``."""
        return Table(self.model, "W_pos")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.model.weights.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The position embedding; raises :class:`AttributeError` for models without one."""
        if self.model.weights.W_pos is None:
            raise AttributeError("this model has no W_pos: its positions are rotary")
        return self.model.weights.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix."""
        return self.model.weights.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The bias of the unembedding, zero if there is none."""
        return self.unembed.b_U

    def __getattr__(self, name: str) -> Any:
        if name in STACKED:
            return stacked(self.model, name)
        points = self.__dict__.get("points")
        if points is not None and name in points.by_name:
            return points.by_name[name]
        raise AttributeError(f"HookedTransformer has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STACKED:
            raise AttributeError(
                f"{name} cannot be set: it is a copy of the parameters of all blocks. Replace activations with hooks, "
                "or change one block's own tensor in place (model.model.weights.blocks[0])"
            )
        super().__setattr__(name, value)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name."""
        return self.points.by_name

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
        self, input: str | Sequence[str], prepend_bos: bool | None = None, truncate: bool = True
    ) -> Int[Tensor, "batch pos"]:
        """Returns the tokens of a text or of several, padded on the right; ``truncate`` keeps ``n_ctx`` at most."""
        return self.text.to_tokens(input, prepend_bos, truncate)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Returns the text of a token or of a row of tokens, or the texts of a batch."""
        return self.text.to_string(tokens)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """Returns the strings of the tokens of a text or of a row of tokens; of a list of texts, a list for each."""
        return self.text.to_str_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """Returns the one token of a string; raises :class:`AnswerTokenError` if it is several."""
        return self.text.to_single_token(string)

    def to_single_str_token(self, int_token: int) -> str:
        """Returns the string of one token."""
        return self.text.to_single_str_token(int_token)

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
