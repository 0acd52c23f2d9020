"""The small tools that TransformerLens keeps in ``utils``, as far as notebooks use them."""

# ruff: noqa: PT028 - test_prompt is no test, its name is TransformerLens's

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fastinterp.errors import EmptyPromptError, OptionError
from fastinterp.hooked.contributions import model_of
from fastinterp.model.forward import final_logits, forward

OTHER_NAMES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
OTHER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
PART_OF = dict.fromkeys(("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores"), "attn")
PART_OF |= dict.fromkeys(("pre", "pre_linear", "mid", "post"), "mlp")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Returns the full hook name of a short one; a full name is returned as it is.

    ``layer_type`` is needed where a block has several of a name (``"ln1"``, ``"ln2"``). ``"k6"`` and ``"scale4ln1"``
    spell layer and type out. Names are not checked: any ``name`` becomes ``hook_{name}``.

    Example:
        >>> get_act_name("k", 6), get_act_name("scale", 4, "ln1"), get_act_name("pre5"), get_act_name("embed")
        ('blocks.6.attn.hook_k', 'blocks.4.ln1.hook_scale', 'blocks.5.mlp.hook_pre', 'hook_embed')
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    spelled_out = re.match(r"([a-z]+)(\d+)(.*)", name)
    if spelled_out:
        name, layer, layer_type = spelled_out.groups()
    name = OTHER_NAMES.get(name, name)
    layer_type = PART_OF.get(name) or OTHER_TYPES.get(layer_type or "", layer_type)
    parts = [] if layer is None else [f"blocks.{layer}"]
    if layer_type:
        parts.append(layer_type)
    if layer is None and name in ("scale", "normalized"):
        parts.insert(0, "ln_final")
    return ".".join([*parts, f"hook_{name}"])


def to_numpy(tensor: Any) -> NDArray[Any]:
    """Returns a tensor, number, list or array as a numpy array; bfloat16, which numpy lacks, as float32.

    Raises :class:`OptionError` for anything else.
    """
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array
    if isinstance(tensor, np.ndarray | np.generic | list | tuple | int | float | bool | str):
        return np.asarray(tensor)
    raise OptionError(f"a {type(tensor).__name__} cannot be made a numpy array: give a tensor, array, list or number")


def remove_batch_dim(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns the tensor without its first axis if that has size 1, else as it is."""
    return tensor[0] if tensor.ndim and len(tensor) == 1 else tensor


def get_corner(tensor: Any, n: int = 3) -> Any:
    """Returns the first ``n`` of every axis of a tensor, or of a ``FactoredMatrix``."""
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def transpose(tensor: Float[Tensor, "... a b"]) -> Float[Tensor, "... b a"]:
    """Returns the tensor with its last two axes exchanged, a view."""
    return tensor.transpose(-1, -2)


def get_device() -> str:
    """Returns ``"cuda"`` where there is one, else ``"cpu"``, as :func:`fastinterp.load` chooses."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]:
    """Returns minus the log-probability of every next token, in nats: the mean, or ``[batch, pos - 1]``.

    A token counts if it and the one before it are not masked out; the others are 0 with ``per_token``. In float32 at
    least. Raises :class:`OptionError` if no token counts.
    """
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    loss = wide.logsumexp(-1) - wide.gather(-1, tokens[:, 1:, None].to(wide.device)).squeeze(-1)
    count = torch.ones_like(loss, dtype=torch.bool)
    if attention_mask is not None:
        mask = attention_mask.to(loss.device).bool()
        count = mask[:, :-1] & mask[:, 1:]
        loss = loss.masked_fill(~count, 0.0)
    if per_token:
        return loss
    if not bool(count.any()):
        raise OptionError("no token is left to predict: give at least two that are not masked out")
    return loss.sum() / count.sum()


def lm_accuracy(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], per_token: bool = False
) -> Float[Tensor, ""] | Bool[Tensor, "batch pos_minus_1"]:
    """Returns how often the largest logit is the next token's, as a share, or ``[batch, pos - 1]`` of booleans."""
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:].to(logits.device)
    if per_token:
        return right
    return right.float().mean()


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Prints how well the model continues ``prompt`` with ``answer``: rank, logit, probability, and the best tokens.

    An answer of several tokens is gone through token by token, each after the right ones. Of several answers the first
    tokens are compared. ``prepend_space_to_answer`` adds a space where the answer has none. ``model`` is a
    ``HookedTransformer``, whose hooks act, or a :class:`~fastinterp.model.model.Model`. Ranks count from 0; logits come
    from one forward.

    Raises:
        EmptyPromptError: prompt or answer without a token.
    """
    plain = model_of(model)
    given = [answer] if isinstance(answer, str) else list(answer)
    answers = [" " + text if prepend_space_to_answer and not text.startswith(" ") else text for text in given]
    if prepend_bos is None:
        cfg = getattr(model, "cfg", None)
        prepend_bos = plain.spec.default_prepend_bos if cfg is None else bool(cfg.default_prepend_bos)
    (prompt_ids,) = plain.encode([prompt], prepend_bos=prepend_bos)
    answer_ids = plain.encode(answers, prepend_bos=False)
    if not prompt_ids or not answer_ids or not all(answer_ids):
        raise EmptyPromptError("prompt and answers must have at least one token each")
    steps = [[token] for token in answer_ids[0]] if len(answers) == 1 else [[ids[0] for ids in answer_ids]]
    if print_details:
        print("Tokenized prompt:", plain.token_strings(prompt_ids))
        shown = [plain.token_strings(ids) for ids in answer_ids]
        print(
            "Tokenized answers:" if len(answers) > 1 else "Tokenized answer:", shown if len(answers) > 1 else shown[0]
        )
    # The last token of the answer predicts nothing that is asked for.
    tokens = torch.tensor([prompt_ids + [step[0] for step in steps[:-1]]], device=plain.device)
    with torch.no_grad():
        logits = _logits(model, tokens)[0, len(prompt_ids) - 1 :].float().cpu()
    ranks = []
    for row, step in zip(logits, steps, strict=True):
        probs = row.softmax(-1)
        names = plain.token_strings(step)
        of_step = [(name, int((row > row[token]).sum())) for name, token in zip(names, step, strict=True)]
        ranks.append(of_step)
        if not print_details:
            continue
        print(f"Performance on answer token{'s' if len(step) > 1 else ''}:")
        for (name, rank), token in zip(of_step, step, strict=True):
            print(f"Rank: {rank: <8} Logit: {row[token]:5.2f} Prob: {probs[token]:6.2%} Token: |{name}|")
        best = row.topk(min(top_k, len(row))).indices.tolist()
        for place, (token, name) in enumerate(zip(best, plain.token_strings(best), strict=True)):
            print(f"Top {place}th token. Logit: {row[token]:5.2f} Prob: {probs[token]:6.2%} Token: |{name}|")
    print("Ranks of the answer tokens:", ranks if len(answers) > 1 else [of_step[0] for of_step in ranks])


# pytest would take it for a test in every file that imports it.
test_prompt.__test__ = False  # type: ignore[attr-defined]


def _logits(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    if callable(model):
        logits: Tensor = model(tokens)
        return logits
    return final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens))
