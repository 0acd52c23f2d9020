"""GGUF files: metadata and tokenizer by ``transformers``, tensors by ``gguf`` (dequantised), names by both."""

import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastinterp.errors import CheckpointKeyError, ModelSourceError, UnknownFamilyError, UnsupportedConfigError
from fastinterp.families import read_spec
from fastinterp.load.hf import assemble
from fastinterp.model.model import Model, Origin, Processing
from fastinterp.model.spec import ModelSpec

# Metadata that says nothing about the computation, or what the tensors say again.
HARMLESS_FIELDS = frozenset({"vocab_size", "attention.causal"})
NEUTRAL_VALUES = {"rope.scaling.type": ("none", ""), "rope.scaling.factor": (0.0, 1.0), "expert_count": (0,)}


def load_gguf(
    path: Path, *, tokenizer: Any | None, device: torch.device, dtype: torch.dtype, processing: Processing
) -> Model:
    """Loads a ``.gguf`` file; quantised tensors are expanded to float, so the numbers are those of the file."""
    from transformers import AutoConfig, AutoTokenizer

    from fastinterp.load.gguf_reader import read_once

    # transformers warns that it expands quantised tensors, which is what is wanted here.
    quiet = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with read_once(path) as reader:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise ModelSourceError(f"{str(path)!r} cannot be read as a GGUF model: {error}") from error
    finally:
        quiet.setLevel(level)
    return assemble(
        config,
        read_tensors(reader, config),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        origin=Origin(source=path.name, processing=processing),
    )


def read_tensors(reader: Any, config: Any) -> dict[str, Tensor]:
    """Returns the tensors under their Hugging Face names; a tensor without one is an error."""
    import gguf
    from transformers import AutoModelForCausalLM
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = next((k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == config.model_type), None)
    if architecture is None:
        raise UnknownFamilyError(f"GGUF has no architecture {config.model_type!r}")
    with torch.device("meta"):
        keys = AutoModelForCausalLM.from_config(config).state_dict()
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for key in keys:
        stem, _, suffix = key.rpartition(".")
        name = table.get_name(stem)
        if name is not None:
            names[f"{name}.{suffix}"] = key
    # llama.cpp stores some matrices permuted; the processors of transformers know which.
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    refuse_unknown_fields(
        {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1},
        config.model_type,
        known={field for field, key in GGUF_CONFIG_MAPPING.get(config.model_type, {}).items() if key is not None},
        stated=stated_by(read_spec(config.to_dict(), type(config)().to_dict())[1]),
    )
    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        result = processor.process(
            weights=gguf.dequantize(stored.data, stored.tensor_type),
            name=stored.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": tensors},
        )
        if result.name is None:
            continue
        if result.name == "rope_freqs.weight":
            raise CheckpointKeyError(
                "the GGUF file rescales its rotary frequencies (tensor 'rope_freqs.weight'), which is not supported: "
                "load the Hugging Face checkpoint instead"
            )
        if result.name not in names:
            raise CheckpointKeyError(f"the GGUF file has a tensor {stored.name!r} that the model does not know")
        tensors[names[result.name]] = torch.from_numpy(np.array(result.weights))
    return tensors


def stated_by(spec: ModelSpec) -> dict[str, int]:
    """Returns the values of metadata that ``transformers`` takes from elsewhere, or assumes."""
    values = {"attention.key_length": spec.d_head, "attention.value_length": spec.d_head}
    if spec.position.rope:
        values["rope.dimension_count"] = spec.position.rope[0].dims
    return values


def refuse_unknown_fields(
    fields: Mapping[str, Any], architecture: str, *, known: set[str], stated: Mapping[str, Any]
) -> None:
    """Raises :class:`UnsupportedConfigError` for metadata of the model that nobody reads, such as a rope scaling.

    ``known`` are the names that ``transformers`` turns into the config, which is checked by itself; what is in
    ``stated`` must have the value that it has there.
    """
    for name, value in fields.items():
        prefix, _, field = name.partition(".")
        if prefix != architecture or field in known or field in HARMLESS_FIELDS:
            continue
        if value in NEUTRAL_VALUES.get(field, ()) or (field in stated and value == stated[field]):
            continue
        raise UnsupportedConfigError(
            f"GGUF metadata {name}={value!r} is not supported (fastinterp does not know what it changes): load the "
            "Hugging Face checkpoint instead"
        )
