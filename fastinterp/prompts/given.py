"""What analyses are given as model and prompts: taken where it is clear what is meant, else an error that says so."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastinterp.errors import InputTypeError
from fastinterp.model.model import Model
from fastinterp.prompts.prompt_set import PromptSet
from fastinterp.prompts.tokenized import TokenizedPrompts

P = ParamSpec("P")
R = TypeVar("R")


def accepting(function: Callable[P, R], *, paths: bool = False) -> Callable[P, R]:
    """Returns the function with ``model``, ``prompts`` and ``reference`` made what it works on, before it is called.

    A ``HookedTransformer`` without hooks stands for its model, a list of prompts for ``PromptSet.of(list)``; with
    ``paths`` text is the path of a prompt file. Raises :class:`InputTypeError` for anything else.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name == "model":
                given[name] = as_model(value)
            elif name == "prompts" or (name == "reference" and value is not None):
                given[name] = as_prompts(value, name, paths=paths)
        call: Any = function
        result: R = call(**given)
        return result

    return wrapped


def as_model(given: Any) -> Model:
    """Returns the :class:`Model` that is meant; raises :class:`InputTypeError`."""
    if isinstance(given, Model):
        return given
    plain = getattr(given, "plain_model", None)
    if plain is not None and isinstance(getattr(given, "model", None), Model):
        model: Model = plain()
        return model
    if isinstance(given, str | Path):
        hint = f"fastinterp.load({str(given)!r})"
    elif hasattr(given, "config") or hasattr(given, "original_model"):
        hint = "fastinterp.load(model)"
    else:
        hint = "what fastinterp.load(...) returns, or a HookedTransformer"
    raise InputTypeError(f"model is a {type(given).__name__}, not a fastinterp model: give {hint}")


def as_prompts(given: Any, name: str = "prompts", *, paths: bool = False) -> Any:
    """Returns the prompts that are meant; raises :class:`InputTypeError`."""
    if isinstance(given, PromptSet | TokenizedPrompts) or (paths and isinstance(given, str | Path)):
        return given
    if isinstance(given, list | tuple) and given:
        if all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in given):
            return PromptSet.of(given)
        if all(isinstance(row, dict) for row in given):
            raise InputTypeError(
                f"{name} is a list of dictionaries: give PromptSet.of([row['prompt'] for row in rows], "
                "answer=[row['answer'] for row in rows])"
            )
    if isinstance(given, str | Path):
        hint = f"PromptSet.of([...]) for prompts, or PromptSet.read({str(given)!r}) for a file of them"
    elif hasattr(given, "tolist"):
        hint = f"PromptSet.of({name}.tolist()), without padding"
    else:
        hint = "PromptSet.of([...], answer=[...]) or PromptSet.read(path)"
    raise InputTypeError(f"{name} is a {type(given).__name__}, not prompts: give {hint}")


def _is_tokens(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and bool(prompt)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    )
