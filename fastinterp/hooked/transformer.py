"""``HookedTransformer``: the surface that notebooks speak, over fastinterp's forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import NonFiniteError, OptionError, PromptTooLongError, TokenRangeError, check_choice
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.hooked.hooks import Direction, HookFunction, HookPoint, HookPoints, NameFilter
from fastinterp.hooked.parameters import FinalNorm, HookedConfig, Part, Unembed, config_of, parameter, stacked
from fastinterp.hooked.pretrained import load_pretrained
from fastinterp.hooked.text import Text
from fastinterp.metrics import evaluate_loss
from fastinterp.model.attention import make_frame
from fastinterp.model.forward import embed, final_logits, run_blocks
from fastinterp.model.intervene import Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import tapped_norm
from fastinterp.names import check_index

ReturnType = Literal["logits", "loss", "both"] | None
Hooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]
STACKED = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out")


class Output(NamedTuple):
    """Both things that ``return_type="both"`` asks for."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor


class HookedTransformer:
    """A model with TransformerLens's names, shapes and return conventions.

    Runs on the same forward as everything else here: an activation that no hook and no cache asks for costs nothing,
    and what TransformerLens keeps behind flags (``result``, ``q_input``, ``attn_in``, ``mlp_in``) is there when asked
    for by name. Parameters take no part in the gradient; activations do, wherever gradients are recorded.

    Example:
        >>> model = fastinterp.HookedTransformer.from_pretrained("gpt2-small")                  # doctest: +SKIP
        >>> logits, cache = model.run_with_cache("Hello World", remove_batch_dim=True)          # doctest: +SKIP
        >>> cache["pattern", 0].shape                                                           # doctest: +SKIP
        torch.Size([12, 3, 3])
    """

    def __init__(self, model: Model, default_prepend_bos: bool | None = None) -> None:
        """Wraps what :func:`fastinterp.load` returned."""
        self.model = model
        self.flags: set[str] = set()
        self.points = HookPoints(model.spec)
        self._contexts = 0
        bos = model.spec.default_prepend_bos if default_prepend_bos is None else default_prepend_bos
        self.text = Text(model, bos)

    @classmethod
    def from_pretrained(cls, model_name: Any, **options: Any) -> "HookedTransformer":
        """Loads a model by name, directory, ``.gguf`` file or Hugging Face object.

        Options, with TransformerLens's names and defaults: ``fold_ln=True``, ``center_writing_weights=True``,
        ``center_unembed=True``, ``fold_value_biases=True``, ``refactor_factored_attn_matrices=False``, ``device=None``,
        ``dtype=torch.float32`` (or ``torch_dtype``), ``tokenizer=None``, ``default_prepend_bos=None``, ``n_devices=1``.
        Raises :class:`OptionError` for any other, and what :func:`fastinterp.load` raises.
        """
        default_prepend_bos = options.pop("default_prepend_bos", None)
        return cls(load_pretrained(model_name, **options), default_prepend_bos)

    @classmethod
    def from_pretrained_no_processing(cls, model_name: Any, **options: Any) -> "HookedTransformer":
        """Loads a model with its checkpoint's own weights."""
        off = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        return cls.from_pretrained(model_name, **(dict.fromkeys(off, False) | options))

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

    def eval(self) -> "HookedTransformer":
        """Returns the model: it has no dropout, and nothing to switch."""
        return self

    def to(self, target: torch.device | str | torch.dtype) -> "HookedTransformer":
        """Moves the model to a device or into a dtype, in place, and returns it; hooks stay."""
        device, dtype = (None, target) if isinstance(target, torch.dtype) else (target, None)
        self.model = self.model.to(device=device, dtype=dtype)
        self.text = Text(self.model, self.text.default_prepend_bos)
        return self

    def cuda(self) -> "HookedTransformer":
        """Moves the model to the first CUDA device."""
        return self.to("cuda")

    def cpu(self) -> "HookedTransformer":
        """Moves the model to the CPU."""
        return self.to("cpu")

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

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d_model"]:
        """Returns the columns of ``W_U`` of tokens: along them the residual stream raises their logits."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.model.device)
        return self.W_U[:, ids.reshape(-1)].t().reshape(*ids.shape, -1)

    # Running ------------------------------------------------------------------------------------------------------

    def __call__(self, input: Any, return_type: ReturnType = "logits", **options: Any) -> Any:
        """Runs the model; see :meth:`forward`."""
        return self.forward(input, return_type, **options)

    def forward(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: ReturnType = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Runs the model, hooks included.

        Args:
            input: a text, several (padded on the right), tokens ``[batch, pos]`` or ``[pos]``; with ``start_at_layer``
                the residual stream ``[batch, pos, d_model]`` in front of that layer.
            return_type: ``"logits"``, ``"loss"``, ``"both"``, or ``None`` for nothing.
            loss_per_token: ``[batch, pos - 1]`` instead of the mean over all tokens that are not padding.
            prepend_bos: for texts; ``None`` is the model's default.
            start_at_layer: run this layer and those behind it only; negative layers count from the end.
            stop_at_layer: run the layers in front of this one only and return the residual stream there.
            tokens: what the loss is of, beside a residual stream as input.

        Raises:
            PromptTooLongError, TokenRangeError: tokens that the model cannot take.
            OptionError: a return type that there is not, or a loss without tokens.
        """
        return self._run(
            input, return_type, self.points.taps, loss_per_token, prepend_bos, start_at_layer, stop_at_layer, tokens
        )

    def _run(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: ReturnType,
        make_taps: Callable[..., Taps],
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        check_choice("return_type", str(return_type), ("logits", "loss", "both", "None"))
        spec, weights = self.model.spec, self.model.weights
        start = 0 if start_at_layer is None else _layer(start_at_layer, spec.n_layers)
        stop = None if stop_at_layer is None else _layer(stop_at_layer, spec.n_layers)
        lengths = None
        taps = make_taps(root=start_at_layer is None)
        if start_at_layer is None:
            tokens, lengths = self.as_tokens(input, prepend_bos)
            resid = embed(weights, tokens, taps)
        else:
            resid = self._as_residual(input)
        frame = make_frame(spec, resid.shape[1], device=resid.device, dtype=resid.dtype)
        resid = run_blocks(spec, weights, resid, frame, taps, start=start, stop=stop)
        if stop is not None:
            return resid
        if return_type is None:
            if taps.wants_any(("ln_final_scale", "ln_final_normalized"), None):
                tapped_norm(spec, "ln_final", None, resid, weights.ln_final, taps)
            return None
        if return_type == "logits":
            return final_logits(spec, weights, resid, taps=taps)
        if tokens is None:
            raise OptionError("the loss of a residual stream needs tokens=: the tokens that it comes from")
        if return_type == "loss" and not resid.requires_grad and not taps.wants("ln_final_normalized", None):
            # Nothing asks for the logits themselves, so they are never held.
            n = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
            x = tapped_norm(spec, "ln_final", None, resid, weights.ln_final, taps)
            per_token = evaluate_loss(
                x[None], weights.W_U, weights.b_U, tokens, n.to(tokens.device), softcap=spec.final_softcap
            )[0, :, :-1]
            return per_token if loss_per_token else per_token.nanmean()
        logits = final_logits(spec, weights, resid, taps=taps)
        loss = self._loss(logits, tokens, lengths, loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def as_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"] | None]:
        """Returns checked tokens, and the prompts' lengths where they are known (from several texts)."""
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
        spec = self.model.spec
        if tokens.shape[1] == 0:
            raise OptionError("the input has no tokens: give a text that is not empty, or prepend_bos=True")
        if tokens.shape[1] > spec.n_ctx:
            raise PromptTooLongError(f"the input has {tokens.shape[1]} tokens, the model takes {spec.n_ctx} at most")
        if bool(((tokens < 0) | (tokens >= spec.d_vocab)).any()):
            raise TokenRangeError(
                f"token ids lie between {int(tokens.min())} and {int(tokens.max())}, the vocabulary has {spec.d_vocab}"
            )
        return tokens, lengths

    def _as_residual(self, input: Any) -> Float[Tensor, "batch pos d_model"]:
        d_model = self.model.spec.d_model
        if not isinstance(input, Tensor) or input.ndim != 3 or input.shape[-1] != d_model:
            shape = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise OptionError(f"start_at_layer needs a residual stream [batch, pos, {d_model}], not {shape}")
        if not bool(torch.isfinite(input).all()):
            raise NonFiniteError("the residual stream holds NaN or infinity")
        resid = input.to(device=self.model.device, dtype=self.model.dtype)
        if torch.is_grad_enabled() and not resid.requires_grad:
            resid = resid.detach().requires_grad_()
        return resid

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        per_token: bool = False,
    ) -> Tensor:
        """Returns the cross-entropy of the next tokens in nats: the mean, or ``[batch, pos - 1]``."""
        return self._loss(logits, tokens, None, per_token)

    def _loss(self, logits: Tensor, tokens: Tensor, lengths: Tensor | None, per_token: bool) -> Tensor:
        wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        target = tokens.to(logits.device)[:, 1:, None]
        loss = wide.logsumexp(-1) - wide.gather(-1, target).squeeze(-1)
        if lengths is not None:
            padding = torch.arange(1, tokens.shape[1], device=loss.device) >= lengths.to(loss.device)[:, None]
            loss = loss.masked_fill(padding, torch.nan)
        if per_token:
            return loss
        return loss.nanmean() if lengths is not None else loss.mean()

    # Caches -------------------------------------------------------------------------------------------------------

    def run_with_cache(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: ReturnType = "logits",
        *,
        names_filter: NameFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        return_cache_object: bool = True,
        pos_slice: slice | int | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Runs the model and returns ``(what forward returns, cache)``.

        Args:
            names_filter: a name, several, or a predicate of names; ``None`` keeps what TransformerLens would.
            device: where the cache is kept.
            remove_batch_dim: for one prompt, leave out the batch axis.
            incl_bwd: run backward from the result, which must be one number (``return_type="loss"``), and keep the
                gradients too, as ``{name}_grad``.
            return_cache_object: ``False`` gives a plain dictionary.
            pos_slice: keep these positions only (query positions of patterns).
            options: as for :meth:`forward`.

        Memory: what is kept, and nothing else; keys and values, and the residual stream between blocks, share memory.
        """
        points = self.points.matching(names_filter, self.flags)
        gradients: dict[str, Tensor] = {}
        kept: list[Taps] = []

        def make_taps(*, root: bool) -> Taps:
            kept.append(self.points.taps(points, gradients if incl_bwd else None, root=root))
            return kept[-1]

        if incl_bwd:
            with torch.enable_grad():
                result = self._run(input, return_type, make_taps, **options)
                if not isinstance(result, Tensor) or result.numel() != 1:
                    raise OptionError('incl_bwd=True needs one number to start from: give return_type="loss"')
                result.backward()
        else:
            result = self._run(input, return_type, make_taps, **options)
        values = kept[0].values
        stored = {point.name: values[point.key].detach() for point in points if point.key in values}
        stored |= {f"{name}_grad": gradients[name] for name in reversed(stored) if name in gradients}
        cache = ActivationCache(stored, self)
        if pos_slice is not None:
            cache = cache.at_positions(pos_slice)
        if device is not None:
            cache = cache.to(device)
        if remove_batch_dim:
            cache = cache.remove_batch_dim()
        return result, (cache if return_cache_object else cache.cache_dict)

    # Hooks --------------------------------------------------------------------------------------------------------

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a function to a hook point, or to all whose name a predicate matches.

        It stays until :meth:`reset_hooks`; permanent ones until ``reset_hooks(including_permanent=True)``.
        """
        for point in self.points.matching(name, self.flags):
            point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: Direction = "fwd") -> None:
        """Adds a permanent function."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes all functions that are not permanent, in one direction or both, of one context or all."""
        for point in self.points:
            point.remove_hooks(direction, including_permanent, level)
            if clear_contexts:
                point.clear_context()

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedTransformer"]:
        """Within it these functions are there; behind it, also after an error, exactly they are gone."""
        self._contexts += 1
        level = self._contexts
        try:
            for name, function in fwd_hooks:
                self.add_hook(name, function, level=level)
            for name, function in bwd_hooks:
                self.add_hook(name, function, dir="bwd", level=level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts=clear_contexts, level=level)
            self._contexts -= 1

    def run_with_hooks(
        self,
        input: str | Sequence[str] | Tensor,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> Any:
        """Runs the model with these functions, which are removed behind it; arguments as for :meth:`forward`."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(input, *args, **options)

    def taps(self) -> Taps:
        """Returns what the registered hooks read and replace, as the forward takes it."""
        return self.points.taps()

    # Generation ---------------------------------------------------------------------------------------------------

    def generate(self, input: str | Sequence[str] | Tensor, max_new_tokens: int = 10, **options: Any) -> Any:
        """Continues prompts; see :func:`fastinterp.hooked.generation.generate` for the options."""
        from fastinterp.hooked.generation import generate

        return generate(self, input, max_new_tokens=max_new_tokens, **options)


def _layer(layer: int, n_layers: int) -> int:
    """Returns a layer counted from the first; ``n_layers`` itself is the end."""
    return layer if layer == n_layers else check_index("layer", layer, n_layers)
