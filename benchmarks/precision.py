"""``python -m benchmarks.precision``: how far effects in reduced precision are from float64, and how long they take.

Every head of the model is ablated, by zero and by the corrupt prompt's value, in every precision of the sweep and in
float64. Written as JSON: medians over prompts and heads of the effect's size and of its error.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastinterp
from benchmarks.environment import environment
from benchmarks.models import DEFAULT_MODEL, checkpoint
from fastinterp.prompts import PromptSet, ioi
from fastinterp.sweep import PRECISIONS

MODES = ("zero", "resample")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for python -m benchmarks (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="how many IOI prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    hf_model, tokenizer = checkpoint(options.model)
    model = fastinterp.load(hf_model, tokenizer=tokenizer).to(device)
    prompts = ioi(options.prompts, seed=0, model=model) if tokenizer is not None else _random(model, options.prompts)
    found = compare(model, prompts)
    for row in found:
        print(line(row), flush=True)
    if options.json is not None:
        text = json.dumps({"environment": environment(device), "model": options.model, "precisions": found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def compare(model: fastinterp.Model, prompts: PromptSet) -> list[dict[str, Any]]:
    """Returns one row per precision and mode: medians of the effect (float64) and of its error, in logits."""
    # The weights of the model as it is, so that only the arithmetic differs.
    exact, _ = _effects(model.to(dtype=torch.float64), prompts, "exact")
    rows = []
    for precision in PRECISIONS:
        effects, seconds = _effects(model, prompts, precision)
        for mode in MODES:
            errors = np.abs(effects[mode].astype(np.float64) - exact[mode])
            rows.append(
                {
                    "precision": precision,
                    "mode": mode,
                    "effects": int(errors.size),
                    "median_abs_effect": float(np.median(np.abs(exact[mode]))),
                    "median_error": float(np.median(errors)),
                    "largest_error": float(errors.max()),
                    "wall_seconds": seconds,
                }
            )
    return rows


def _effects(model: fastinterp.Model, prompts: PromptSet, precision: Any) -> tuple[dict[str, np.ndarray], float]:
    """Effects of both modes, and the seconds of both together (the second run's on a GPU)."""
    seconds = 0.0
    for _ in range(2 if model.device.type == "cuda" else 1):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        data = fastinterp.ablate(model, prompts, mode=MODES, precision=precision)
        seconds = time.perf_counter() - begun
    return {mode: data[f"logit_diff_{mode}_total"].values for mode in MODES}, seconds


def _random(model: fastinterp.Model, n_prompts: int, n_pos: int = 15) -> PromptSet:
    generator = torch.Generator().manual_seed(0)
    tokens, corrupt = (torch.randint(model.spec.d_vocab, (n_prompts, n_pos), generator=generator) for _ in range(2))
    answers = torch.randint(model.spec.d_vocab, (2, n_prompts), generator=generator).tolist()
    return PromptSet.of(tokens.tolist(), corrupt=corrupt.tolist(), answer=answers[0], wrong=answers[1])


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    share = row["median_error"] / row["median_abs_effect"]
    return (
        f"{row['precision']:>6} {row['mode']:>9}: median |effect| {row['median_abs_effect']:.4f}, median error "
        f"{row['median_error']:.2e} ({100 * share:.3f} %), largest {row['largest_error']:.2e}; "
        f"{row['wall_seconds']:.1f} s for both modes"
    )


if __name__ == "__main__":
    sys.exit(main())
