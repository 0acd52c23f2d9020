"""The residual stream taken apart: into what was written to it, or as it stood after each sublayer."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.errors import AnswerTokenError, TokenRangeError, check_choice
from fastinterp.hooked.contributions import (
    Contributions,
    Readout,
    SliceInput,
    Stack,
    is_integer,
    model_of,
    on_device,
    stacked,
    take,
    with_remainder,
)
from fastinterp.model.norms import center, normalize
from fastinterp.model.weights import NormWeights
from fastinterp.names import check_index, head_label

Labelled = Stack | tuple[Stack, list[str]]


class ResidualDecomposition(Contributions):
    """The part of :class:`~fastinterp.hooked.activation_cache.ActivationCache` that takes the residual stream apart.

    ``layer`` is the layer whose input is looked at: everything that was written before it counts. ``n_layers``, ``-1``
    and ``None`` are the final residual. ``mlp_input`` looks at the input of that layer's MLP instead of its attention.
    ``pos_slice`` and friends are :data:`SliceInput`. ``apply_ln`` divides by the scale that the norm in front of that
    layer had (the last norm's for the final residual), centres if the norm does, and multiplies by the norm's weight
    where that is not folded into the next matrix; its bias is left out. Attention and MLP outputs that go through a
    post-norm are divided up at the scale that it had.
    """

    # The stream as a whole -----------------------------------------------------------------------------------------

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """Returns the residual stream in front of every layer up to ``layer``, ``[component, batch, pos, d_model]``.

        Labels are ``0_pre, (0_mid,) 1_pre, ..., final_post``. With ``apply_ln`` at the final residual, the last norm
        is computed anew for each (the logit lens), its bias included.

        Raises:
            UnknownActivationError: ``incl_mid`` or ``mlp_input`` in a model of parallel blocks, which has no
                ``resid_mid``.
        """
        layer = self._layer(layer, mlp_input)
        n = self.spec.n_layers
        sites: list[tuple[str, Tensor]] = []
        for number in range(layer + 1):
            name = "final_post" if number == n else f"{number}_pre"
            sites.append((name, self._input(number, False)))
            if (incl_mid and number < layer) or (mlp_input and number == layer):
                sites.append((f"{number}_mid", self["resid_mid", number]))
        stack = stacked((take(site, pos_slice, -2)[None] for _, site in sites), len(sites))
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim, recompute_ln=layer == n
            )
        return (stack, [label for label, _ in sites]) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "*stack d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "*stack_out d_model"]:
        """Returns the stack as the norm in front of ``layer`` sees it, at the scale that the norm had in the run.

        The stack has been cut by ``pos_slice`` already, ``batch_slice`` is applied to its axis 1 if ``has_batch_dim``.
        ``recompute_ln`` computes each entry's own norm instead, bias included.
        """
        layer = self._layer(layer, mlp_input)
        if has_batch_dim:
            residual_stack = take(residual_stack, batch_slice, 1, "prompt")
        if recompute_ln:
            weights = self._norm(layer, mlp_input)
            own = NormWeights(w=on_device(weights.w, residual_stack), b=on_device(weights.b, residual_stack))
            return normalize(self.spec.norm, residual_stack, own)
        return self._readout(layer, mlp_input, pos_slice, True, batch_slice=batch_slice)(residual_stack)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "*stack d_model"],
        tokens: str | int | list[int] | Tensor,
        incorrect_tokens: str | int | list[int] | Tensor | None = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "*stack_out"]:
        """Returns what each entry of the stack adds to the logit of ``tokens`` (minus ``incorrect_tokens``), in logits.

        Equal to ``(apply_ln_to_stack(stack, -1) * W_U[:, tokens]).sum(-1)`` without copies of the stack. ``tokens`` is
        one token, one for each prompt (``[batch]``), for each position, or ``[batch, pos]``. The entries of a full
        decomposition sum to the logit (before a softcap) less ``b_U`` and the last norm's bias times ``W_U``.

        Raises:
            AnswerTokenError: a text that is not one token, or tokens and incorrect tokens of different shapes.
            TokenRangeError: a token id that the vocabulary does not have.
        """
        stack = take(residual_stack, batch_slice, 1, "prompt") if has_batch_dim else residual_stack
        ids = self._token_ids(tokens)
        u = self._unembedding(ids)
        if incorrect_tokens is not None:
            wrong = self._token_ids(incorrect_tokens)
            if wrong.shape != ids.shape:
                raise AnswerTokenError(
                    f"tokens have shape {tuple(ids.shape)}, incorrect_tokens {tuple(wrong.shape)}: give one for each"
                )
            u = u - self._unembedding(wrong)
        u = u.to(stack.device)
        if (
            has_batch_dim
            and not is_integer(batch_slice)
            and stack.ndim == 4
            and u.ndim == 2
            and len(u) == stack.shape[1]
        ):
            u = u.unsqueeze(-2)  # a direction for each prompt, not for each position
        norm, weights = self.spec.norm, model_of(self.model).weights.ln_final
        u = center(norm, u if weights.w is None else u * weights.w.to(u.device))
        wide = torch.promote_types(torch.promote_types(stack.dtype, u.dtype), torch.float32)
        scale = self._scale(self.spec.n_layers, False, pos_slice, batch_slice).squeeze(-1)
        return torch.einsum("...d,...d->...", stack.to(wide), u.to(wide)) / scale

    def _token_ids(self, tokens: str | int | list[int] | Tensor) -> Tensor:
        model = model_of(self.model)
        if isinstance(tokens, str):
            (found,) = model.encode([tokens], prepend_bos=False)
            if len(found) != 1:
                raise AnswerTokenError(f"{tokens!r} is not one token but {model.token_strings(found)}")
            return torch.tensor(found[0])
        ids = torch.as_tensor(tokens)
        if ids.is_floating_point() or bool(((ids < 0) | (ids >= model.spec.d_vocab)).any()):
            raise TokenRangeError(f"tokens {tokens!r} are not all ids from 0 to {model.spec.d_vocab - 1}")
        return ids.squeeze() if ids.numel() == 1 else ids

    def _unembedding(self, ids: Tensor) -> Float[Tensor, "*ids d_model"]:
        W_U = model_of(self.model).weights.W_U
        return W_U[:, ids.to(W_U.device)].movedim(0, -1)

    # Its components ------------------------------------------------------------------------------------------------

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """Returns what embeddings and sublayers wrote before ``layer``, ``[component, batch, pos, d_model]``.

        Labels are ``embed, (pos_embed,) 0_attn_out, 0_mlp_out, ...``. With ``mode="all"`` the sum is the residual.
        ``incl_embeds=False`` leaves the embeddings out; otherwise they must be in the cache.
        """
        check_choice("mode", mode, ("all", "mlp", "attn"))
        layer = self._layer(layer, mlp_input)
        sites = self._embeds() if incl_embeds else []
        for number in range(self._n_attn(layer, mlp_input)):
            if mode != "mlp":
                sites.append((f"{number}_attn_out", self["attn_out", number]))
            if mode != "attn" and number < layer:
                sites.append((f"{number}_mlp_out", self["mlp_out", number]))
        readout = self._readout(layer, mlp_input, pos_slice, apply_ln)
        labels = [label for label, _ in sites]
        stack = self._stack((readout(take(site, pos_slice, -2)[None]) for _, site in sites), labels, layer, pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Labelled:
        """Returns what every head of the layers before ``layer`` wrote, ``[layer * head, batch, pos, d_model]``.

        Labels are ``L0H0, L0H1, ...``. Only the positions of ``pos_slice`` are projected through ``W_O``. The heads of
        a layer and ``b_O`` sum to ``attn_out``. ``incl_remainder`` adds the rest of the residual in front of ``layer``.
        """
        layer = self._layer(layer)
        readout = self._readout(layer, False, pos_slice, apply_ln)
        parts: Iterable[Tensor] = (self._heads(number, pos_slice, readout) for number in range(layer))
        labels = self._head_labels(layer)
        if incl_remainder:
            parts = with_remainder(parts, readout(take(self._input(layer, False), pos_slice, -2)))
            labels.append("remainder")
        stack = self._stack(parts, labels, layer, pos_slice)
        return (stack, labels) if return_labels else stack

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: Float[Tensor, "d_model *n_out"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Returns what every neuron of ``layer`` wrote, ``[batch, pos, neuron, d_model]``, or its projection.

        ``project_output_onto``: one direction ``[d_model]`` (its axis is dropped) or several, ``[d_model, n_out]``.
        """
        project, single = _directions(project_output_onto)
        layer = check_index("layer", layer, self.spec.n_layers)
        neurons = self._neurons(layer, pos_slice, _as_list(neuron_slice), Readout(norm=self.spec.norm, project=project))
        neurons = neurons.squeeze(-1) if single else neurons
        return neurons[0] if is_integer(neuron_slice) else neurons.movedim(0, -1 if single else -2)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model *n_out"] | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """Returns what every neuron of the layers before ``layer`` wrote, ``[layer * neuron, batch, pos, d_model]``.

        Labels are ``L0N0, L0N1, ...``. Memory: ``d_model`` (or ``n_out``) per neuron and position.
        """
        layer = self._layer(layer, mlp_input)
        project, single = _directions(project_output_onto)
        readout = self._readout(layer, mlp_input, pos_slice, apply_ln, project)
        neuron_slice = _as_list(neuron_slice)
        labels = self._neuron_labels(layer, neuron_slice)
        parts: Iterable[Tensor] = (self._neurons(number, pos_slice, neuron_slice, readout) for number in range(layer))
        if incl_remainder:
            parts = with_remainder(parts, readout(take(self._input(layer, mlp_input), pos_slice, -2)))
            labels.append("remainder")
        stack = self._stack(parts, labels, layer, pos_slice, project)
        stack = stack.squeeze(-1) if single else stack
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model *n_out"] | None = None,
    ) -> Any:
        """Returns everything that was written before ``layer``: heads, neurons (or MLPs), embeddings, summed biases.

        Labels are ``L0H0, ..., L0N0, ...`` (or ``0_mlp_out, ...``), ``embed, (pos_embed,) bias``. The sum is the
        residual stream, or its norm less the norm's bias. With ``project_output_onto`` (``[d_model]`` or ``[d_model,
        n_out]``) the last axis is the projection, and neither heads nor neurons are formed.
        """
        layer = self._layer(layer, mlp_input)
        project, single = _directions(project_output_onto)
        readout = self._readout(layer, mlp_input, pos_slice, apply_ln, project)
        n_attn, embeds = self._n_attn(layer, mlp_input), self._embeds()
        labels = self._head_labels(n_attn)
        labels += self._neuron_labels(layer, None) if expand_neurons else [f"{i}_mlp_out" for i in range(layer)]
        labels += [*(label for label, _ in embeds), "bias"]

        def parts() -> Iterator[Tensor]:
            for number in range(n_attn):
                yield self._heads(number, pos_slice, readout)
            for number in range(layer):
                if expand_neurons:
                    yield self._neurons(number, pos_slice, None, readout)
                else:
                    yield readout(take(self["mlp_out", number], pos_slice, -2)[None])
            for _, site in embeds:
                yield readout(take(site, pos_slice, -2)[None])
            yield readout(self._biases(n_attn, layer if expand_neurons else 0, pos_slice)[None])

        stack = stacked(parts(), len(labels))
        stack = stack.squeeze(-1) if single else stack
        return (stack, labels) if return_labels else stack

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Returns an activation of every layer before ``layer``, ``[layer, batch, ...]``."""
        return torch.stack([self[activation_name, number, sublayer_type] for number in range(self._layer(layer))])

    def _stack(
        self,
        parts: Iterable[Tensor],
        labels: list[str],
        layer: int,
        pos_slice: SliceInput,
        project: Float[Tensor, "d_model n_out"] | None = None,
    ) -> Stack:
        if labels:
            return stacked(parts, len(labels))
        like = take(self._input(layer, False), pos_slice, -2)
        return like.new_empty((0, *like.shape[:-1], like.shape[-1] if project is None else project.shape[-1]))

    def _head_labels(self, layer: int) -> list[str]:
        return [head_label(number, head) for number in range(layer) for head in range(self.spec.n_heads)]

    def _neuron_labels(self, layer: int, neuron_slice: SliceInput) -> list[str]:
        neurons = take(torch.arange(self.spec.mlp.d_mlp), neuron_slice, 0, "neuron").tolist()
        return [f"L{number}N{neuron}" for number in range(layer) for neuron in neurons]


def _as_list(index: SliceInput) -> SliceInput:
    """Makes one integer a list of one, so that its axis stays."""
    return torch.as_tensor(index).reshape(1) if is_integer(index) else index


def _directions(
    project: Float[Tensor, "d_model *n_out"] | None,
) -> tuple[Float[Tensor, "d_model n_out"] | None, bool]:
    """Returns directions as a matrix, and whether there was one only."""
    if project is None or project.ndim == 2:
        return project, False
    return project[:, None], True
