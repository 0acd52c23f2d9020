"""The comparison of peak memory on a tiny random model."""

import re

import pytest
import torch

from benchmarks import measure, memory, models, naive
from fastinterp.sweep import resident


@pytest.fixture(scope="module")
def fixtures() -> models.Fixtures:
    hf_model = models.random_gpt2(n_layer=3, n_head=2, n_embd=32, vocab_size=211)
    cpu = torch.device("cpu")
    return models.fixtures_from(hf_model, models.stand_in_tokenizer(), name="tiny", device=cpu, random_tokens=True)


@pytest.fixture
def nothing_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long where a process holds as much as a test run does, and no figure is looked at."""
    monkeypatch.setattr(measure, "_release_memory", lambda device: None)
    monkeypatch.setattr(resident, "_trim", lambda: None)


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


@pytest.mark.usefixtures("nothing_given_back")
def test_the_last_of_several_calls_counts(fixtures: models.Fixtures) -> None:
    (row,) = memory.compare(fixtures, 3, 7, 1, ["last"], repeats=3)
    for name, each in row["every_call"].items():
        assert len(each) == 3
        assert row[f"{name}_bytes"] == each[-1]


def test_numbers_that_differ_give_no_figures(fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = naive.ablated_logit_diff
    monkeypatch.setattr(naive, "ablated_logit_diff", lambda *a, **kw: honest(*a, **kw) + 0.01)
    with pytest.raises(SystemExit, match="differ by"):
        memory.compare(fixtures, 4, 12, 1, ["last"])
