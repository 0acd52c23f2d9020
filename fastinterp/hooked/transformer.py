"""``HookedTransformer``: the surface that notebooks speak, over fastinterp's forward."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import OptionError, check_choice
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.hooked.activations import Activations, Recipe, derivable, recipe
from fastinterp.hooked.generate import generate
from fastinterp.hooked.hooks import Direction, HookFunction, HookPoint, NameFilter
from fastinterp.hooked.inputs import Inputs, check_empty, lengths_of
from fastinterp.hooked.pretrained import load_pretrained
from fastinterp.metrics import evaluate_loss
from fastinterp.model.attention import make_frame
from fastinterp.model.forward import embed, final_logits, run_blocks
from fastinterp.model.intervene import Key, Taps
from fastinterp.model.norms import tapped_norm
from fastinterp.names import check_index

ReturnType = Literal["logits", "loss", "both"] | None
Hooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]


class Output(NamedTuple):
    """Both things that ``return_type="both"`` asks for."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor


class HookedTransformer(Inputs):
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
        attention_mask: Tensor | None = None,
        padding_side: str | None = None,
        **nothing: Any,
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
            attention_mask: of prompts padded on the right, ones and then zeros: what is behind a prompt has no loss.
            padding_side: ``"right"`` (or whatever, if nothing is padded).
            nothing: ``past_kv_cache`` and the like, which must be ``None``.

        Raises:
            PromptTooLongError, TokenRangeError: tokens that the model cannot take.
            OptionError: a return type that there is not, a loss without tokens, or padding on the left.
        """
        return self._run(
            input,
            return_type,
            self.points.taps,
            loss_per_token=loss_per_token,
            prepend_bos=prepend_bos,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            tokens=tokens,
            attention_mask=attention_mask,
            padding_side=padding_side,
            **nothing,
        )

    def _run(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: ReturnType,
        make_taps: Callable[..., Taps],
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str | None = None,
        **nothing: Any,
    ) -> Any:
        check_empty(nothing)
        if return_type is not None:
            check_choice("return_type", return_type, ("logits", "loss", "both"))
        spec, weights = self.model.spec, self.model.weights
        start = 0 if start_at_layer is None else _layer(start_at_layer, spec.n_layers)
        stop = None if stop_at_layer is None else _layer(stop_at_layer, spec.n_layers)
        lengths = None
        taps = make_taps(root=start_at_layer is None)
        if start_at_layer is None:
            tokens, lengths = self.as_tokens(
                input, prepend_bos, attention_mask=attention_mask, padding_side=padding_side
            )
            resid = embed(weights, tokens, taps)
        else:
            resid = self.as_residual(input)
            if attention_mask is not None:
                lengths = lengths_of(attention_mask, tuple(resid.shape[:2]))
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
        if tokens is not None and start_at_layer is not None:
            tokens, _ = self.as_tokens(tokens)
        if tokens is None:
            raise OptionError("the loss of a residual stream needs tokens=: the tokens that it comes from")
        _check_pairing(resid, tokens)
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

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        per_token: bool = False,
    ) -> Tensor:
        """Returns the cross-entropy of the next tokens in nats: the mean, or ``[batch, pos - 1]``."""
        _check_pairing(logits, tokens)
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
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
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
            reset_hooks_end, clear_contexts: accepted; nothing that this call adds stays behind.
            options: as for :meth:`forward`.

        Memory: what is asked for, less what follows from the rest of it (see :class:`ActivationCache`), about half of
        a full cache. With ``incl_bwd`` everything is kept.
        """
        points = self.points.matching(names_filter, self.flags)
        derived = set() if incl_bwd else self._derivable(points, **options)
        gradients: dict[str, Tensor] = {}
        kept: list[Taps] = []

        def make_taps(*, root: bool) -> Taps:
            captured = [point for point in points if point.key not in derived]
            kept.append(self.points.taps(captured, gradients if incl_bwd else None, root=root))
            return kept[-1]

        if incl_bwd and torch.is_inference_mode_enabled():
            raise OptionError("incl_bwd=True records gradients, which torch.inference_mode() forbids: leave it first")
        if incl_bwd:
            with torch.enable_grad():
                result = self._run(input, return_type, make_taps, **options)
                if not isinstance(result, Tensor) or result.numel() != 1:
                    raise OptionError('incl_bwd=True needs one number to start from: give return_type="loss"')
                result.backward()
        else:
            result = self._run(input, return_type, make_taps, **options)
        values = kept[0].values
        entries: dict[str, Tensor | Recipe] = {}
        for point in points:
            if point.key in derived:
                entries[point.name] = recipe(self.model.spec, self.model.weights, *point.key)
            elif point.key in values:
                entries[point.name] = values[point.key].detach()
        entries |= {f"{name}_grad": gradients[name] for name in reversed(entries) if name in gradients}
        cache = ActivationCache(Activations(entries), self)
        if pos_slice is not None:
            cache = cache.at_positions(pos_slice)
        if device is not None:
            cache = cache.to(device)
        if remove_batch_dim:
            cache = cache.remove_batch_dim()
        return result, (cache if return_cache_object else dict(cache.cache_dict))

    def _derivable(
        self,
        points: Sequence[HookPoint],
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        **_: Any,
    ) -> set[Key]:
        n_layers = self.model.spec.n_layers
        first = _layer(start_at_layer or 0, n_layers)
        end = n_layers if stop_at_layer is None else _layer(stop_at_layer, n_layers)
        hooked = {point.key for point in self.points.hooked()}
        return derivable(self.model.spec, [point.key for point in points], hooked, first, end)

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
        check_choice("direction", direction, ("fwd", "bwd", "both"))
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
        level = next(self._levels)
        try:
            for name, function in fwd_hooks:
                self.add_hook(name, function, level=level)
            for name, function in bwd_hooks:
                self.add_hook(name, function, dir="bwd", level=level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts=clear_contexts, level=level)

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
        """Runs the model with these functions, which are removed behind it; arguments as for :meth:`forward`.

        Backward functions are removed too, before anything could run backward: use :meth:`hooks` for those.
        """
        if bwd_hooks and reset_hooks_end:
            warnings.warn(
                "run_with_hooks removes its bwd_hooks before backward() can run: put `with model.hooks(bwd_hooks=...)` "
                "around both, or type reset_hooks_end=False",
                stacklevel=2,
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(input, *args, **options)

    def taps(self) -> Taps:
        """Returns what the registered hooks read and replace, as the forward takes it."""
        return self.points.taps()

    # Generation ---------------------------------------------------------------------------------------------------

    def generate(self, input: str | Sequence[str] | Tensor, max_new_tokens: int = 10, **options: Any) -> Any:
        """Continues prompts; see :func:`fastinterp.hooked.generate.generate` for the options."""
        return generate(self, input, max_new_tokens=max_new_tokens, **options)


def _layer(layer: int, n_layers: int) -> int:
    """Returns a layer counted from the first; ``n_layers`` itself is the end."""
    return layer if layer == n_layers else check_index("layer", layer, n_layers)


def _check_pairing(rows: Tensor, tokens: Tensor) -> None:
    """Raises :class:`OptionError` unless there is one row per token: broadcasting would give a number all the same."""
    if rows.shape[:2] != tokens.shape:
        raise OptionError(
            f"{tuple(rows.shape[:2])} batch and positions do not go with tokens of shape {tuple(tokens.shape)}"
        )
