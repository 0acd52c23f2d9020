"""The results on disk, and the table in the README that is generated from them."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.harness import Row

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
EMPTY = "No results yet: `python -m benchmarks` measures them on your machine."

_HEADER = (
    "case", "workload", "instead of fastinterp", "seconds", "memory", "fastinterp: seconds", "memory",
    "tokens/s", "ratio", "of the floor",
)  # fmt: skip
_NUMERIC_FROM = 3

_LEGEND = (
    "Medians of interleaved repeats on the same inputs in float32, after a parity check. Bold: against the "
    "fastest alternative. Memory is the increase during the run. The floor is the operations that the "
    "definition needs, at the rate that matrix products reached on the same machine in the same run."
)


def default_path(device: str, *, folder: Path = RESULTS) -> Path:
    """Returns ``<device>-<date>.json`` in the folder of the results."""
    return folder / f"{device}-{datetime.now(UTC).date().isoformat()}.json"


def write_rows(path: Path, rows: Iterable[Row], environment: dict[str, Any]) -> None:
    """Writes rows; those of the same case and model that are in the file are replaced, all others stay."""
    new = [_plain(dataclasses.asdict(row) | {"environment": environment}) for row in rows]
    measured = {(row["case"], row["model"]) for row in new}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if (row["case"], row["model"]) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": environment["device"], "rows": kept + new}, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def newest_files(folder: Path = RESULTS) -> list[Path]:
    """Returns the newest file of every device, by the date in its name, devices in alphabetical order."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*-????-??-??.json")):
        newest[path.stem[: -len("-2000-01-01")]] = path
    return [newest[device] for device in sorted(newest)]


def render(files: Sequence[Path]) -> str:
    """Returns the Markdown that stands between the markers."""
    sections = [_section(json.loads(path.read_text())) for path in files]
    return "\n\n".join([*sections, _LEGEND]) if sections else EMPTY


def _section(results: dict[str, Any]) -> str:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(_where_measured(row), []).append(row)
    return "\n\n".join(f"{_title(rows[0])}\n\n{_table(rows)}" for rows in groups.values())


def _where_measured(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], json.dumps(row["environment"], sort_keys=True), row["measured_at"][:10]


def _title(row: dict[str, Any]) -> str:
    environment = row["environment"]
    versions = environment["versions"]
    parts = [f"**{row['model']}**", f"{environment['device']} ({environment['processor']})"]
    if environment["device"].startswith("cpu"):
        parts.append(f"{environment['threads']} threads")
    parts += [
        f"torch {versions.get('torch', '?')}",
        f"TransformerLens {versions.get('transformer-lens', '?')}",
        f"commit {environment['commit']}",
        row["measured_at"][:10],
    ]
    return ", ".join(parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    rule = ["---" if column < _NUMERIC_FROM else "---:" for column in range(len(_HEADER))]
    lines = [_HEADER, rule]
    for row in rows:
        lines += _ok_lines(row) if row["status"] == "ok" else [_failed_line(row)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _failed_line(row: dict[str, Any]) -> list[str]:
    message = " ".join(f"{row['status']}: {row['error']}".split())
    return [f"`{row['case']}`", row["workload"], message, *[""] * (len(_HEADER) - _NUMERIC_FROM)]


def _ok_lines(row: dict[str, Any]) -> list[list[str]]:
    fast = row["fast"]
    lines = []
    for baseline in sorted(row["baselines"], key=lambda baseline: baseline["wall_seconds"]):
        headline = baseline["name"] == row["fastest_baseline"]
        seconds = number(baseline["wall_seconds"])
        if baseline["timed_iterations"] < baseline["iterations"]:
            seconds += f" (scaled up from {baseline['timed_iterations']} of {baseline['iterations']} iterations)"
        ratio = f"{number(baseline['ratio'])}x"
        first = [f"`{row['case']}`" + (" (quick)" if row["quick"] else ""), row["workload"]]
        shared = [
            number(fast["wall_seconds"]),
            size(fast["peak_memory_bytes"]),
            number(fast["tokens_per_second"]),
        ]
        lines.append(
            [
                *(first if headline else ["", ""]),
                f"{baseline['name']}: {baseline['how']}",
                seconds,
                size(baseline["peak_memory_bytes"]),
                *(shared if headline else ["", "", ""]),
                f"**{ratio}**" if headline else ratio,
                f"{100 * fast['fraction_of_floor']:.0f} %" if headline else "",
            ]
        )
    return lines


def number(value: float) -> str:
    """Returns three significant digits, never in scientific notation."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"


def size(n_bytes: int) -> str:
    """Returns megabytes or gigabytes."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def between_markers(text: str) -> str:
    """Returns what stands between the markers; raises ``ValueError`` where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README needs one line {BEGIN} and below it one line {END}")
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip()


def update_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Writes the table of the newest results between the markers of the README."""
    text = readme.read_text()
    between_markers(text)
    before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n{render(newest_files(folder))}\n{END}{after}")
