"""``python -m benchmarks``: run cases, file the results, generate the README's table."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.cases import CASES
from benchmarks.environment import environment
from benchmarks.harness import QUICK, Row, Settings, run_case
from benchmarks.models import DEFAULT_MODEL, load_fixtures


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only if every case ran and passed its parity check."""
    options = _parse(arguments)
    if options.table:
        table.update_readme()
        return 0
    device = torch.device(options.device)
    fixtures = load_fixtures(options.model, device)
    settings = QUICK if options.quick else Settings()
    path = options.json
    where = environment(device)
    if path is None and not options.quick:
        path = table.default_path(where["device"])
    failed = 0
    for name in options.case:
        print(f"{name}: {CASES[name].naive_way} ...", flush=True)
        row = run_case(CASES[name], fixtures, settings)
        print(_line(row), flush=True)
        failed += row.status != "ok"
        if path is not None:
            # After every case: what was measured is kept if a later one is interrupted.
            table.write_rows(path, [row], where)
    if path is not None:
        print(f"results in {path}")
    return 1 if failed else 0


def _line(row: Row) -> str:
    if row.fast is None:
        return f"{row.case}: {row.status}: {row.error}"
    fast = row.fast
    lines = [
        f"{row.case} ({row.workload}): fastinterp {table.number(fast.wall_seconds)} s, "
        f"{table.size(fast.peak_memory_bytes)}, {100 * fast.fraction_of_floor:.0f} % of the floor at "
        f"{fast.matmul_flops_per_second / 1e9:.0f} GFLOP/s, largest difference {row.max_abs_difference:.1e}"
    ]
    for baseline in row.baselines:
        sample = f" (scaled up from {baseline.timed_iterations} of {baseline.iterations} iterations)"
        lines.append(
            f"  {table.number(baseline.ratio)}x as fast as {baseline.name}: "
            f"{table.number(baseline.wall_seconds)} s"
            f"{sample if baseline.timed_iterations < baseline.iterations else ''}, "
            f"{table.size(baseline.peak_memory_bytes)}"
        )
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--case",
        type=_cases,
        default=list(CASES),
        help=f"one or more, with commas: {', '.join(CASES)} (default: all)",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="smollm2, gpt2-random, tiny-random, a folder, a .gguf file or a hub name (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repeat on small samples; printed, and filed only with --json",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="default: benchmarks/results/<device>-<date>.json; cases add up",
    )
    parser.add_argument("--table", action="store_true", help="generate the README's table from the results, then stop")
    return parser.parse_args(arguments)


def _cases(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}: choose from {', '.join(CASES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
