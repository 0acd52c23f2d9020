"""The comparison of peak memory on a tiny random model."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch

from benchmarks import measure, memory, models, naive


@pytest.fixture(scope="module")
def fixtures() -> models.Fixtures:
    hf_model = models.random_gpt2(n_layer=3, n_head=2, n_embd=32, vocab_size=211)
    cpu = torch.device("cpu")
    return models.fixtures_from(hf_model, models.stand_in_tokenizer(), name="tiny", device=cpu, random_tokens=True)


@pytest.fixture
def nothing_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long where a process holds as much as a test run does, and no figure is looked at."""
    monkeypatch.setattr(measure, "_release_memory", lambda device: None)


@pytest.mark.usefixtures("nothing_given_back")
@pytest.mark.parametrize("n_heads", [1, 99])
def test_every_case_is_compared_with_its_loop(fixtures: models.Fixtures, n_heads: int) -> None:
    rows = memory.compare(fixtures, 3, 7, n_heads, memory.ALL_CASES)
    assert [row["case"] for row in rows] == list(memory.ALL_CASES)
    for row in rows:
        assert row["workload"].endswith(f" {min(n_heads, 6)} heads")
        assert 0 <= row["largest_difference"] < 1e-4
        assert row["memory_bytes"] > 0
        assert row["every_call"] == {name: [row[f"{name}_bytes"]] for name in ("loop", "unlimited", "limited")}
        assert re.search(r"the loop holds [\d,.]+ MB", memory.line(row))


def test_the_last_of_several_calls_counts(fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)

    def counted(call: Callable[[], object], device: torch.device) -> tuple[object, measure.Measurement]:
        number = next(calls)
        return call(), measure.Measurement(wall_seconds=number / 2, peak_memory_bytes=number)

    monkeypatch.setattr(memory, "measure", counted)
    (row,) = memory.compare(fixtures, 3, 7, 1, ["last"], repeats=3)
    assert row["every_call"]["loop"] == [1, 2, 3]
    assert row["every_call"]["unlimited"] == [4, 5, 6]
    *_, limited = row["every_call"]["limited"]
    assert (row["loop_bytes"], row["unlimited_bytes"], row["limited_bytes"]) == (3, 6, limited)
    assert (row["loop_seconds_per_head"], row["unlimited_seconds"]) == (1.5, 3.0)
    assert row["limited_seconds"] == limited / 2


@pytest.mark.parametrize("repeats", ["0", "-1", "two"])
def test_a_number_of_calls_is_positive(repeats: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--repeats", repeats])
    assert f"{repeats} is not a number of calls: give 1 or more" in capsys.readouterr().err


def test_numbers_that_differ_give_no_figures(fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = naive.ablated_logit_diff
    monkeypatch.setattr(naive, "ablated_logit_diff", lambda *a, **kw: honest(*a, **kw) + 0.01)
    with pytest.raises(SystemExit, match="differ by"):
        memory.compare(fixtures, 4, 12, 1, ["last"])
