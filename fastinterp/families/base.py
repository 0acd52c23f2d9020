"""What a family file consists of: data that ``build_weights`` reads, and one function from config to spec."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastinterp.families.config import Config
from fastinterp.model.spec import ModelSpec

Layout = Literal["as_is", "transposed", "per_head_qkv"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Checkpoint keys whose tensors, joined along the output axis, make one stored parameter.

    ``layout`` of a matrix: ``transposed`` for ``nn.Linear`` (``[out, in]``), ``as_is`` for ``[in, out]``;
    ``per_head_qkv`` for an ``nn.Linear`` (or its bias) whose outputs are q, k, v of the first head, then of the next.
    A key ending in ``?`` may be missing. One ending in ``?flag`` must be there if the config's ``flag`` is true, and
    must not otherwise. ``plus`` is added to what is stored, ``times`` multiplies it, and the first ``skip`` rows are
    left out.
    """

    keys: tuple[str, ...]
    layout: Layout = "as_is"
    plus: float = 0.0
    times: Callable[[ModelSpec], float] | None = None
    skip: int = 0


def linear(prefix: str, *names: str) -> Source:
    """The weights of ``nn.Linear`` layers that read the same input."""
    return Source(keys=tuple(f"{prefix}{name}.weight" for name in names), layout="transposed")


def biases(prefix: str, *names: str, flag: str | None = None) -> Source:
    """Their biases; with a ``flag``, there if the config's flag is true."""
    return Source(keys=tuple(f"{prefix}{name}.bias" + (f"?{flag}" if flag else "") for name in names))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One line of models: the ``model_type`` values it reads and where each parameter lies in a checkpoint.

    ``model`` and ``block`` map stored parameters (``W_E``, ``ln1.w``, ``W_QKV``, ...) to their source; block keys hold
    ``{layer}``. ``ignored`` are regular expressions of buffers that carry no parameter. ``prefix`` is what a checkpoint
    with a language-model head puts in front of the body's keys, and bare checkpoints leave out.
    """

    name: str
    model_types: tuple[str, ...]
    to_spec: Callable[[Config], ModelSpec]
    model: Mapping[str, Source]
    block: Mapping[str, Source]
    prefix: str
    ignored: tuple[str, ...] = ()
