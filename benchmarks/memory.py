"""``python -m benchmarks.memory``: peak memory of ablations where a hook loop holds the logits of many long prompts.

For each case one iteration of the loop is measured, then fastinterp with no limit, and with ``memory_bytes`` a
twentieth of what the loop's iteration took (the fewest that the plan allows where that is more). Values are compared.

Measured is resident memory. That is more than what is allocated: the C library keeps freed blocks. With
``MALLOC_MMAP_THRESHOLD_=262144`` in the environment glibc gives large ones back at once. The first calls of a process
hold some 20 MB more, for code that the libraries make once: with ``--repeats`` everything is called that often, the
last calls count, and all are filed.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastinterp
from benchmarks import naive, naive_heads, naive_sweeps
from benchmarks.environment import environment
from benchmarks.harness import Array
from benchmarks.measure import Measurement, measure
from benchmarks.models import DEFAULT_MODEL, Fixtures, Workload, load_fixtures
from fastinterp.errors import OptionError
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
SHARE = 20
CASES = ("last", "here", "loss", "direct")
# Takes as many runs as there are heads and positions, whatever heads are asked for: for a few short prompts.
ALL_CASES = (*CASES, "patch")


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """The loop's iteration for one head, ``[...]``, and all chosen heads at once, ``[head, ...]``.

    ``reference`` is the iteration in float64, where the loop's own float32 rounds off more than the tolerance.
    """

    name: str
    what: str
    loop: Callable[[int, int], torch.Tensor]
    fast: Callable[[Sequence[tuple[int, int]], int | None], Array]
    reference: Callable[[int, int], torch.Tensor] | None = None


def cases(fixtures: Fixtures, work: Workload) -> list[MemoryCase]:
    """The last token's logit difference, the same with its position ablated alone, and losses of every token."""
    bridge, model = fixtures.bridge, fixtures.model
    arguments = (bridge, work.tokens, work.answer, work.wrong)
    losses = functools.cache(lambda: naive_sweeps.losses(bridge, work.tokens))
    clean = functools.cache(lambda: naive.logit_diff(*arguments))
    run = functools.cache(lambda: naive_heads.cached_run(bridge, work.tokens))
    values = functools.cache(lambda: naive_sweeps.cached_z(bridge, work.tokens))
    swapped = (bridge, work.tokens.roll(1, dims=0), work.answer, work.wrong)
    unpatched = functools.cache(lambda: naive.logit_diff(*swapped))
    middle = work.tokens.shape[1] // 2

    def fast(*names: str, **options: Any) -> Callable[[Sequence[tuple[int, int]], int | None], Array]:
        def run(heads: Sequence[tuple[int, int]], memory_bytes: int | None) -> Array:
            found = fastinterp.ablate(model, work.prompts, units=list(heads), memory_bytes=memory_bytes, **options)
            values = [np.moveaxis(found[name].values, -1, 0) for name in names]
            values = [
                each[..., :-1] if "pos" in found[name].dims else each for name, each in zip(names, values, strict=True)
            ]
            return values[0] if len(values) == 1 else np.stack(values, axis=1)

        return run

    def direct(layer: int, head: int, dtype: torch.dtype) -> torch.Tensor:
        return naive_heads.direct_losses(bridge, run(), work.tokens, layer, head, twice=True, dtype=dtype)

    def patch(layer: int, head: int) -> torch.Tensor:
        return naive_sweeps.patched_logit_diff(*swapped, values()[layer], layer, head, middle) - unpatched()

    def fast_patch(heads: Sequence[tuple[int, int]], memory_bytes: int | None) -> Array:
        pairs = PromptSet.of(
            work.tokens.tolist(),
            corrupt=work.tokens.roll(1, dims=0).tolist(),
            answer=work.answer.tolist(),
            wrong=work.wrong.tolist(),
        )
        found = fastinterp.activation_patch(model, pairs, "z", by="head_position", memory_bytes=memory_bytes)
        effects = found["logit_diff_patch_z"].transpose("layer", "head", "edit_pos", "prompt").values
        return np.stack([effects[layer, head, middle] for layer, head in heads])

    return [
        MemoryCase(
            name="last",
            what="logit difference",
            loop=lambda layer, head: naive.ablated_logit_diff(*arguments, layer, head) - clean(),
            fast=fast("logit_diff_zero_total"),
        ),
        MemoryCase(
            name="here",
            what="logit difference, last position ablated",
            loop=lambda layer, head: naive_sweeps.ablated_here_logit_diff(*arguments, layer, head) - clean(),
            fast=fast("logit_diff_zero_total", pos=-1),
        ),
        MemoryCase(
            name="loss",
            what="loss of every token",
            loop=lambda layer, head: naive_sweeps.ablated_losses(bridge, work.tokens, layer, head) - losses(),
            fast=fast("loss_zero_total", metric="loss"),
            reference=lambda layer, head: _exact_losses(bridge, work.tokens, layer, head),
        ),
        MemoryCase(
            name="direct",
            what="loss of every token, direct effect, zero and mean",
            loop=lambda layer, head: direct(layer, head, torch.float32),
            fast=fast("loss_zero_direct", "loss_mean_direct", metric="loss", mode=("zero", "mean"), effect="direct"),
            reference=lambda layer, head: direct(layer, head, torch.float64),
        ),
        MemoryCase(
            name="patch",
            what="logit difference, every head patched at every position",
            loop=patch,
            fast=fast_patch,
        ),
    ]


def _exact_losses(bridge: Any, tokens: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    wide = naive_sweeps.in_float64(bridge)
    each = (tokens[i : i + 1] for i in range(len(tokens)))
    return torch.cat(
        [naive_sweeps.ablated_losses(wide, one, layer, head) - naive_sweeps.losses(wide, one) for one in each]
    )


def compare(
    fixtures: Fixtures, n_prompts: int, n_pos: int, n_heads: int, names: Sequence[str] = CASES, repeats: int = 1
) -> list[dict[str, Any]]:
    """Returns one row per case: bytes and seconds of the loop's iteration, of fastinterp, and of it with a limit.

    Each is called ``repeats`` times, at least once; the row has the last, and the bytes of all.
    """
    work = fixtures.text(n_prompts, min(n_pos, fixtures.model.spec.n_ctx))
    n_layers, heads_per_layer = fixtures.shape
    if n_heads < n_layers:
        heads = [(i * n_layers // n_heads, i % heads_per_layer) for i in range(n_heads)]
    else:
        heads = [divmod(i, heads_per_layer) for i in range(min(n_heads, n_layers * heads_per_layer))]
    rows = []
    for case in (case for case in cases(fixtures, work) if case.name in names):
        case.loop(*heads[0])  # What it needs of the clean run is not counted.

        def repeated(call: Callable[[], Any]) -> tuple[Any, list[Measurement]]:
            runs = [measure(call, fixtures.device) for _ in range(repeats)]
            return runs[-1][0], [run for _, run in runs]

        expected, loop = repeated(lambda case=case: case.loop(*heads[0]))
        free, unlimited = repeated(lambda case=case: case.fast(heads, None))
        wanted = max(1, loop[-1].peak_memory_bytes // SHARE)
        try:
            held, limited = repeated(lambda case=case, wanted=wanted: case.fast(heads, wanted))
        except OptionError as refused:
            needed = re.search(r"it needs about (\d+)", str(refused))
            if needed is None:
                raise
            wanted = int(needed[1])
            held, limited = repeated(lambda case=case, wanted=wanted: case.fast(heads, wanted))
        if case.reference is not None:
            expected = case.reference(*heads[0])
        difference = max(float(np.abs(each[0] - expected.cpu().numpy()).max()) for each in (free, held))
        if not difference <= TOLERANCE:
            raise SystemExit(f"{case.name}: fastinterp and the loop differ by {difference:.1e}")
        rows.append(
            {
                "case": case.name,
                "what": case.what,
                "workload": f"{work}, {len(heads)} heads",
                "largest_difference": difference,
                "loop_bytes": loop[-1].peak_memory_bytes,
                "loop_seconds_per_head": loop[-1].wall_seconds,
                "unlimited_bytes": unlimited[-1].peak_memory_bytes,
                "unlimited_seconds": unlimited[-1].wall_seconds,
                "memory_bytes": wanted,
                "limited_bytes": limited[-1].peak_memory_bytes,
                "limited_seconds": limited[-1].wall_seconds,
                "every_call": {
                    name: [run.peak_memory_bytes for run in runs]
                    for name, runs in (("loop", loop), ("unlimited", unlimited), ("limited", limited))
                },
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    mb = {
        key: f"{value / 1e6:,.{0 if value >= 100e6 else 1 if value >= 10e6 else 2}f} MB"
        for key, value in row.items()
        if key.endswith("bytes")
    }
    return (
        f"{row['what']} ({row['workload']}): the loop holds {mb['loop_bytes']} ({row['loop_seconds_per_head']:.1f} s a "
        f"head); fastinterp {mb['unlimited_bytes']} in {row['unlimited_seconds']:.1f} s, with memory_bytes="
        f"{mb['memory_bytes']} {mb['limited_bytes']} in {row['limited_seconds']:.1f} s; largest difference "
        f"{row['largest_difference']:.1e}"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of calls: give 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for python -m benchmarks (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="how many prompts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=6, help="heads that fastinterp ablates (default: %(default)s)")
    parser.add_argument(
        "--cases", nargs="+", choices=ALL_CASES, default=CASES, help="which cases (default: all but patch)"
    )
    parser.add_argument(
        "--repeats", type=_positive, default=1, help="calls of each, of which the last counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    fixtures = load_fixtures(options.model, device)
    rows = compare(fixtures, options.prompts, options.tokens, options.heads, options.cases, options.repeats)
    if options.json is not None:
        text = json.dumps({"environment": environment(device), "model": options.model, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
