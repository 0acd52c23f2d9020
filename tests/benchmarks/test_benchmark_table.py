"""The results on disk and the README's table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.harness import BaselineRow, FastRow, Row

ENVIRONMENT = {
    "device": "cpu-2cores",
    "processor": "Some CPU",
    "threads": 2,
    "commit": "0123456789ab",
    "versions": {"torch": "2.13.0", "transformer-lens": "4.3.0"},
}


def baseline(name: str, seconds: float, **changes: Any) -> BaselineRow:
    values: dict[str, Any] = {
        "name": name,
        "how": f"how {name} works",
        "wall_seconds": seconds,
        "wall_seconds_repeats": [seconds],
        "timed_iterations": 270,
        "iterations": 270,
        "peak_memory_bytes": 1_500_000_000,
        "tokens_per_second": 240 / seconds,
        "ratio": seconds / 20,
    }
    return BaselineRow(**(values | changes))


def ok_row(case: str = "ablate_last", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "case": case,
        "model": "SmolLM2-135M",
        "status": "ok",
        "what": "zero ablation",
        "workload": "16 prompts x 15 tokens, 270 heads",
        "measured_at": "2026-01-02T03:04:05+00:00",
        "tolerance": 1e-4,
        "max_abs_difference": 1e-5,
        "baselines": (baseline("notebook", 100.0, timed_iterations=40), baseline("last logits", 90.0)),
        "fast": FastRow(
            wall_seconds=20.0,
            wall_seconds_repeats=[20.0],
            peak_memory_bytes=123_000_000,
            tokens_per_second=12.0,
            flops=7e12,
            matmul_flops_per_second=3e11,
            fraction_of_floor=0.712,
        ),
        "fastest_baseline": "last logits",
        "ratio": 4.5,
    }
    return Row(**(values | changes))


def test_rendered_table(tmp_path: Path) -> None:
    path = tmp_path / "cpu-2cores-2026-01-02.json"
    table.write_rows(path, [ok_row()], ENVIRONMENT)
    title, _, *lines = table.render([path]).splitlines()
    assert title == (
        "**SmolLM2-135M**, cpu-2cores (Some CPU), 2 threads, torch 2.13.0, TransformerLens 4.3.0, "
        "commit 0123456789ab, 2026-01-02"
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert len({len(row) for row in cells}) == 1
    assert cells[2] == [
        "`ablate_last`", "16 prompts x 15 tokens, 270 heads", "last logits: how last logits works", "90",
        "1.5 GB", "20", "123 MB", "12", "**4.5x**", "71 %",
    ]  # fmt: skip
    assert cells[3] == [
        "", "", "notebook: how notebook works", "100 (scaled up from 40 of 270 iterations)",
        "1.5 GB", "", "", "", "5x", "",
    ]  # fmt: skip


def test_a_failed_case_shows_no_ratio(tmp_path: Path) -> None:
    path = tmp_path / "cpu-2cores-2026-01-02.json"
    failed = Row(case="dla_loop", model="m", status="parity failed", what="w", workload="x", error="differ by 1 | 2")
    table.write_rows(path, [failed], ENVIRONMENT)
    text = table.render([path])
    assert "| `dla_loop` | x | parity failed: differ by 1 \\| 2 |" in text
    assert "1x" not in text


def test_quick_rows_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "cpu-2cores-2026-01-02.json"
    table.write_rows(path, [ok_row(quick=True)], ENVIRONMENT)
    assert "`ablate_last` (quick)" in table.render([path])


def test_cases_add_up_in_a_file_and_replace_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    table.write_rows(path, [ok_row("one"), ok_row("two")], ENVIRONMENT)
    table.write_rows(path, [ok_row("two", ratio=9.0), ok_row("two", model="other")], ENVIRONMENT)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["model"], row["ratio"]) for row in rows] == [
        ("one", "SmolLM2-135M", 4.5),
        ("two", "SmolLM2-135M", 9.0),
        ("two", "other", 4.5),
    ]


def test_the_newest_file_of_every_device_counts(tmp_path: Path) -> None:
    for name in ("h100-2026-01-02", "cpu-2cores-2025-12-31", "cpu-2cores-2026-01-01", "notes"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in table.newest_files(tmp_path)] == [
        "cpu-2cores-2026-01-01",
        "h100-2026-01-02",
    ]


def test_default_path_is_found_again(tmp_path: Path) -> None:
    path = table.default_path("cpu-2cores", folder=tmp_path)
    table.write_rows(path, [ok_row()], ENVIRONMENT)
    assert table.newest_files(tmp_path) == [path]


def test_update_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nThe rest.\n")
    folder = tmp_path / "results"
    table.update_readme(readme, folder)
    assert table.between_markers(readme.read_text()) == table.EMPTY
    path = folder / "cpu-2cores-2026-01-02.json"
    table.write_rows(path, [ok_row()], ENVIRONMENT)
    table.update_readme(readme, folder)
    text = readme.read_text()
    assert table.between_markers(text) == table.render([path])
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe rest.\n")


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END}\n{table.BEGIN}", f"{table.BEGIN}{table.END}" * 2])
def test_missing_or_misplaced_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the README needs one line"):
        table.between_markers(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345.6, "12,346"),
        (100.4, "100"),
        (33.06, "33.1"),
        (4.0, "4"),
        (0.0123, "0.0123"),
        (0.00012, "0.000120"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert table.number(value) == shown


def test_the_readme_shows_the_newest_results() -> None:
    shown = table.between_markers(table.README.read_text())
    assert shown == table.render(table.newest_files()), "run: python -m benchmarks --table"
