"""Statistics over prompts and the tables made of them, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import xarray as xr

from fastinterp.errors import OptionError
from fastinterp.report import statistics, top_heads
from fastinterp.report.statistics import over_prompts
from fastinterp.report.tables import driving_prompts, format_number, prompt_table, status_counts

NAN = float("nan")
HEADS = ("prompt", "layer", "head")


def test_top_heads_by_hand():
    # prompts x (L0H0, L0H1, L1H0, L1H1)
    values = np.array([[1.0, -2.0, 0.5, NAN], [3.0, NAN, 0.5, NAN], [5.0, -4.0, 0.5, NAN]])
    top = top_heads(xr.DataArray(values.reshape(3, 2, 2), dims=HEADS))
    assert list(top.positive.columns) == ["head", "mean", "standard_error", "n_prompts"]
    assert top.positive["head"].tolist() == ["L0H0", "L1H0"]
    assert top.positive["mean"].tolist() == [3.0, 0.5]
    # Sample deviation of 1, 3, 5 is 2; over the root of three prompts.
    assert top.positive["standard_error"].tolist() == pytest.approx([2 / math.sqrt(3), 0.0], abs=1e-15)
    assert top.positive["n_prompts"].tolist() == [3, 3]
    # -2 and -4: mean -3, deviation sqrt(2), two prompts.
    assert top.negative.to_dict("records") == [
        {"head": "L0H1", "mean": -3.0, "standard_error": pytest.approx(1.0), "n_prompts": 2}
    ]


def test_top_heads_are_ordered_by_strength_and_cut_at_k():
    means = np.array([0.1, 0.4, -0.2, 0.3, -0.9, 0.0, -0.5, 0.2])
    array = xr.DataArray(np.stack([means - 1, means + 1]).reshape(2, 2, 4), dims=HEADS)
    top = top_heads(array, k=2)
    assert top.positive["head"].tolist() == ["L0H1", "L0H3"]
    assert top.negative["head"].tolist() == ["L1H0", "L1H2"]
    everything = top_heads(array, k=8)
    assert "L1H1" not in {*everything.positive["head"], *everything.negative["head"]}, "a mean of zero"


def test_top_heads_take_labels_from_coordinates(make_scan):
    dataset = make_scan(n_layers=4, n_heads=2)
    some = dataset["direct_effect"].isel(layer=[3, 0])
    assert top_heads(some, k=1).positive["head"].tolist() == ["L3H1"]
    assert top_heads(some.drop_vars("head_label"), k=1).positive["head"].tolist() == ["L3H1"]
    assert top_heads(some.transpose("head", "prompt", "layer"), k=1).negative["head"].tolist() == ["L0H0"]


def test_one_prompt_has_no_standard_error():
    top = top_heads(xr.DataArray([[[2.0]]], dims=HEADS))
    assert top.positive["mean"].tolist() == [2.0]
    assert math.isnan(top.positive["standard_error"][0])
    assert top.negative.empty


def test_top_heads_refuses_other_dims_and_k():
    with pytest.raises(OptionError, match=r"prompt, layer, head, not prompt, layer"):
        top_heads(xr.DataArray([[1.0]], dims=("prompt", "layer")))
    with pytest.raises(OptionError, match="k=0"):
        top_heads(xr.DataArray([[[1.0]]], dims=HEADS), k=0)


@pytest.mark.parametrize("block_values", [1, 4, 9, 1000])
def test_statistics_do_not_depend_on_the_block_size(monkeypatch, block_values):
    rng = np.random.default_rng(1)
    # A large offset: sums of squares would lose the spread.
    values = 1e6 + rng.normal(size=(23, 2, 2))
    values[rng.random(values.shape) < 0.3] = NAN
    values[:9, 0, 1] = NAN
    values[:, 1, 1] = NAN
    values[4] = NAN
    monkeypatch.setattr(statistics, "_BLOCK_VALUES", block_values)
    found = over_prompts(xr.DataArray(values, dims=HEADS).chunk(prompt=5))
    assert found.count.tolist() == (~np.isnan(values)).sum(0).tolist()
    assert found.n_prompts == 23
    assert found.n_with_values == int((~np.isnan(values)).any(axis=(1, 2)).sum())
    for index in [(0, 0), (0, 1), (1, 0)]:
        column = values[:, *index]
        column = column[~np.isnan(column)]
        assert found.mean[index] == pytest.approx(column.mean(), rel=1e-14)
        assert found.standard_error[index] == pytest.approx(column.std(ddof=1) / math.sqrt(len(column)), rel=1e-9)
    assert math.isnan(found.mean[1, 1])
    assert math.isnan(found.standard_error[1, 1])


def test_an_infinite_effect_is_not_hidden():
    values = np.array([[[1.0, 1.0]], [[np.inf, 1.0]]])
    assert top_heads(xr.DataArray(values, dims=HEADS), k=1).positive["mean"].tolist() == [np.inf]


def test_driving_prompts_are_the_largest_each_way():
    effects = np.array([0.5, NAN, -3.0, 2.0, 0.0, 7.0, -1.0, 1.0, 4.0, 3.0, 123456.0])
    found = driving_prompts(xr.DataArray(effects.reshape(-1, 1, 1), dims=HEADS), max_prompts=10)
    assert found == [[(5, 7.0), (8, 4.0), (9, 3.0), (3, 2.0), (7, 1.0), (6, -1.0), (2, -3.0)]]
    assert driving_prompts(xr.DataArray(effects.reshape(-1, 1, 1), dims=HEADS), max_prompts=0) == [[]]


def test_prompt_table_columns_and_missing_values(make_scan):
    dataset = make_scan(n_layers=2, n_heads=1, n_prompts=4)
    dataset["logit_diff_clean"][1] = NAN
    dataset["status"][:] = [1, 2, 3, 0]
    dataset["answer"] = ("prompt", np.array([" Mary", " John", "", " Tom"], dtype=object))
    dataset["wrong"] = (("prompt", "alternative"), np.array([[5, -1], [6, 7], [-1, -1], [8, -1]]))
    table = prompt_table(dataset, max_prompts=3)
    assert table.columns == ["#", "id", "prompt", "answer", "wrong", "logit_diff_clean (logits)", "status"]
    assert table.numeric == {"logit_diff_clean (logits)"}
    assert table.n_prompts == 4
    assert table.is_capped
    texts = [[cell.text for cell in row] for row in table.rows]
    assert texts == [
        ["0", "row-0", "Prompt number 0 goes to", " Mary", "5", "0.000", "ok"],
        ["1", "row-1", "Prompt number 1 goes to", " John", "6 | 7", "\u2013", "failed"],
        ["2", "row-2", "Prompt number 2 goes to", "\u2013", "\u2013", "0.250", "rejected"],
    ]
    assert status_counts(dataset) == {"ok": 1, "failed": 1, "rejected": 1, "pending": 1}
    assert list(status_counts(dataset)) == ["ok", "failed", "rejected", "pending"]


def test_prompt_table_without_text_shows_token_ids(make_scan):
    dataset = make_scan(n_layers=1, n_heads=1, n_prompts=2).drop_vars(["prompt_text", "prompt_id"])
    dataset["tokens"][1, 2:] = -1
    texts = [row[1].text for row in prompt_table(dataset, max_prompts=9).rows]
    assert texts == ["[7, 7, 7, 7]", "[7, 7]"]


def test_long_texts_are_cut_and_say_so(make_scan):
    dataset = make_scan(n_layers=1, n_heads=1, n_prompts=1, texts=["x" * 2345])
    (row,) = prompt_table(dataset, max_prompts=9).rows
    assert row[2].text == "x" * 2000 + "… (345 more characters)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (1.23456, "1.235"),
        (-0.0012, "-0.001"),
        (0.00012, "1.20e-04"),
        (123456.0, "1.23e+05"),
        (NAN, "\u2013"),
        (np.inf, "inf"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text
