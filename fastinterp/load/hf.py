"""Hugging Face models: an object in memory, a local directory, or a hub name."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastinterp.errors import CheckpointKeyError, ModelSourceError, UnsupportedConfigError
from fastinterp.families import build_weights, family_of, read_spec
from fastinterp.model.model import Model, Origin, Processing
from fastinterp.model.process import process_weights

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
OTHER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def load_hf_model(
    hf_model: Any, *, tokenizer: Any | None, device: torch.device, dtype: torch.dtype, processing: Processing
) -> Model:
    """Copies the parameters of a Hugging Face causal language model that is in memory."""
    if getattr(hf_model, "hf_device_map", None):
        raise ModelSourceError("the model is spread over devices: load it without device_map")
    source = getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__
    return assemble(
        hf_model.config,
        hf_model.state_dict(),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        origin=Origin(source=source, processing=processing),
    )


def load_directory(
    path: Path,
    *,
    tokenizer: Any | None,
    device: torch.device,
    dtype: torch.dtype,
    processing: Processing,
    source: str,
    revision: str | None = None,
) -> Model:
    """Loads ``config.json``, the weight files and, if there is one, the tokenizer of a directory."""
    from transformers import AutoConfig, AutoTokenizer

    if not (path / "config.json").is_file():
        found = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else []
        raise ModelSourceError(
            f"{source!r} has no config.json (it has: {', '.join(found) or 'nothing'}): give a directory as "
            "save_pretrained writes it, or a .gguf file"
        )
    # Asked first, because transformers does not know every model_type either.
    family_of(str(read_json(path / "config.json").get("model_type")))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers validates with exceptions of its own
        raise UnsupportedConfigError(
            f"transformers cannot read {str(path / 'config.json')!r}: {type(error).__name__}: {error}"
        ) from error
    if tokenizer is None and any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # whatever the tokenizer's own parser raises
            raise ModelSourceError(
                f"the tokenizer of {str(path)!r} cannot be read ({type(error).__name__}: {error}): give another one "
                "with load(..., tokenizer=...)"
            ) from error
    return assemble(
        config,
        read_checkpoint(path),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        origin=Origin(source=source, revision=revision, processing=processing),
    )


def load_hub(
    name: str,
    *,
    tokenizer: Any | None,
    device: torch.device,
    dtype: torch.dtype,
    processing: Processing,
    revision: str | None,
) -> Model:
    """Fetches (or finds in the local cache) the files of a hub name and loads their directory."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [*OTHER_FILES, WEIGHT_FILES[0]]
        path = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
        if not list(path.glob(WEIGHT_FILES[0])):
            files = [*OTHER_FILES, WEIGHT_FILES[1]]
            path = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelSourceError(
            f"{name!r} is neither a file nor a directory here, and no hub model of this name could be fetched "
            f"({type(error).__name__}): check the spelling and the network, or give the path of a model"
        ) from error
    return load_directory(
        path,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        processing=processing,
        source=name,
        revision=revision or path.name,
    )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the weight files of a directory: safetensors, else ``.bin`` (tensors only, no code is run)."""
    import safetensors.torch
    from safetensors import SafetensorError

    checkpoint: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            if file.suffix == ".safetensors":
                checkpoint |= safetensors.torch.load_file(file)
            else:
                checkpoint |= torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelSourceError(
                f"{str(file)!r} cannot be read ({str(error).splitlines()[0]}): fetch it again (a git-lfs pointer is not"
                " the file itself)"
            ) from error
    return checkpoint


def weight_files(path: Path) -> list[Path]:
    """Returns the weight files in the order in which Hugging Face looks: one file, else those that an index names."""
    absent: list[str] = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (path / single).is_file():
            return [path / single]
        index = path / f"{single}.index.json"
        if index.is_file():
            files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if files and not missing:
                return files
            absent += missing
    if absent:
        raise ModelSourceError(f"{str(path)!r} lacks {', '.join(absent)}, which its index names")
    raise ModelSourceError(f"{str(path)!r} has no weight files (model.safetensors or pytorch_model.bin)")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises :class:`ModelSourceError` if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelSourceError(f"{str(path)!r} is not a JSON object")
    return values


def assemble(
    hf_config: Any,
    checkpoint: Mapping[str, Tensor],
    *,
    tokenizer: Any | None,
    device: torch.device,
    dtype: torch.dtype,
    origin: Origin,
) -> Model:
    """Builds the model from a config object and a checkpoint in Hugging Face's names."""
    values = hf_config.to_dict()
    quantization = values.get("quantization_config") or {}
    if quantization and dict(quantization).get("quant_method") != "gguf":
        raise UnsupportedConfigError(
            f"config quantization_config={dict(quantization).get('quant_method')!r} is not supported: load the "
            "unquantised checkpoint, or a .gguf file"
        )
    family, spec = read_spec(values, type(hf_config)().to_dict())
    heads = [key.removesuffix("?") for key in family.model["W_U"].keys]
    if not values.get("tie_word_embeddings", True) and not any(head in checkpoint for head in heads):
        raise CheckpointKeyError(
            f"the checkpoint lacks {' or '.join(map(repr, heads))}, and the config does not tie it to the embedding"
        )
    # Folding wants at least float32, whatever the compute dtype.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        weights = build_weights(family, spec, checkpoint, values, dtype=exact, device=device)
        if origin.processing == "transformer_lens":
            weights = process_weights(spec, weights)
        weights = weights.to(dtype=dtype)
        weights.check_finite()
    return Model(spec=spec, weights=weights, tokenizer=tokenizer, origin=origin)
