"""A dataset as a scan's store opens, with numbers that are known."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr


def scan(
    n_layers: int = 30,
    n_heads: int = 9,
    n_prompts: int = 12,
    metric: str = "logit_diff",
    units: str = "logits",
    texts: list[str] | None = None,
) -> xr.Dataset:
    """Returns random effects, except that L23H3 (or the last head) leads upwards and L0H0 downwards."""
    rng = np.random.default_rng(0)
    shape = (n_prompts, n_layers, n_heads)
    effect = rng.normal(0, 0.01, shape).astype("f4")
    effect[:, 0, 0] -= 2
    if shape[1:] != (1, 1):
        effect[:, min(23, n_layers - 1), min(3, n_heads - 1)] += 3

    def of(dims: tuple[str, ...], values: Any, long_name: str, sign: str) -> tuple[Any, ...]:
        return dims, values, {"units": units, "long_name": long_name, "metric": metric, "sign": sign}

    heads = ("prompt", "layer", "head")
    labels = [[f"L{layer}H{head}" for head in range(n_heads)] for layer in range(n_layers)]
    texts = texts or [f"Prompt number {i} goes to" for i in range(n_prompts)]
    return xr.Dataset(
        {
            "direct_effect": of(heads, effect, "direct effect", "positive: the head helps"),
            f"{metric}_clean": of(("prompt",), np.arange(n_prompts, dtype="f4") / 8, "clean run", "clean"),
            f"{metric}_zero_total": of(heads, -effect, "zero ablation", "ablated - clean"),
            "tokens": (("prompt", "pos"), np.full((n_prompts, 4), 7, dtype="i4")),
            "status": (("prompt",), np.ones(n_prompts, dtype="u1")),
        },
        coords={
            "prompt": np.arange(n_prompts),
            "layer": np.arange(n_layers),
            "head": np.arange(n_heads),
            "head_label": (("layer", "head"), np.array(labels, dtype=object)),
            "prompt_text": ("prompt", np.array(texts, dtype=object)),
            "prompt_id": ("prompt", np.array([f"row-{i}" for i in range(n_prompts)], dtype=object)),
        },
        attrs={
            "model": "hub/tiny-model",
            "weights_sha256": "0123456789abcdef" * 4,
            "processing": "transformer_lens",
            "dtype": "float32",
            "torch_version": "2.13.0",
            "options": json.dumps({"mode": "zero", "pos": -1}),
            "spec": json.dumps({"identity": {"tokenizer_hash": "feedbeef" * 8}, "n_prompts": n_prompts}),
        },
    )


@pytest.fixture
def make_scan() -> Callable[..., xr.Dataset]:
    return scan
