"""Where the numbers of a report come from: the attributes of its dataset, put in order."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

# How the attributes of a store are headed, in the order of the page; others follow under their own name.
_PROVENANCE = {
    "model": "Model",
    "model_revision": "Model revision",
    "weights_sha256": "Weights (SHA-256)",
    "tokenizer_hash": "Tokenizer (SHA-256)",
    "processing": "Weight processing",
    "dtype": "Compute dtype",
    "device": "Device",
    "fastinterp_version": "fastinterp",
    "torch_version": "torch",
    "created": "Created",
    "input_hash": "Prompts (hash)",
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the provenance; ``block`` is for what is too long for a line."""

    heading: str
    text: str
    block: bool


def default_title(dataset: xr.Dataset) -> str:
    """Returns the title of a page that was not given one: the model's short name, where it is recorded."""
    model = _attributes(dataset).get("model")
    if not isinstance(model, str) or not model:
        return "Head effects"
    return f"Head effects of {model.rstrip('/').rsplit('/', 1)[-1]}"


def facts(dataset: xr.Dataset) -> list[Fact]:
    """Returns the dataset's attributes, the ones that identify the model first and long ones last."""
    attributes = _attributes(dataset)
    known = [key for key in _PROVENANCE if key in attributes]
    others = [key for key in attributes if key not in _PROVENANCE]
    found = [_fact(_PROVENANCE.get(key, key.replace("_", " ")), attributes[key]) for key in [*known, *others]]
    # Lines first: a block in between would tear the list apart.
    return sorted((fact for fact in found if fact is not None), key=lambda fact: fact.block)


def _attributes(dataset: xr.Dataset) -> dict[str, Any]:
    # What must be equal for a run to be resumed is in the store's specification; to a reader it is one list.
    attributes = {str(key): _parsed(value) for key, value in dataset.attrs.items()}
    spec = attributes.get("spec")
    identity = spec.get("identity") if isinstance(spec, Mapping) else None
    return {**identity, **attributes} if isinstance(identity, Mapping) else attributes


def _parsed(value: Any) -> Any:
    # Stores keep nested attributes as JSON text.
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _fact(heading: str, value: Any) -> Fact | None:
    if value is None or value == "":
        return None
    if isinstance(value, Mapping) and all(isinstance(item, str | int | float) for item in value.values()):
        text = ", ".join(f"{key} {item}" for key, item in value.items())
        if len(text) <= 120:
            return Fact(heading=heading, text=text, block=False)
    if isinstance(value, Mapping | list | tuple):
        return Fact(heading=heading, text=json.dumps(value, indent=2, ensure_ascii=False, default=str), block=True)
    return Fact(heading=heading, text=str(value), block=len(str(value)) > 200)
