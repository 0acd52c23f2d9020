"""``fastinterp scan`` from a prompt file to a store."""

import csv
import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import fastinterp
from fastinterp.prompts import PromptSet

# Of float32, whose rounding depends on what a prompt is batched with.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def test_a_scan_from_file_to_store(cli, zoo, prompt_file, out):
    directory = zoo.directory("gpt2")
    result = cli("scan", "--model", directory, "--prompts", prompt_file, "--analysis", "dla,ablation", "--out", out)
    assert result.code == 0
    assert result.err == ""
    assert f"{out}: 22 prompts in " in result.out
    assert "(4 of 4 blocks computed)" in result.out
    assert "arrays: direct_effect, logit_diff_clean, logit_diff_zero_total" in result.out
    dataset, model, prompts = xr.open_zarr(out), zoo.model("gpt2"), PromptSet.read(prompt_file)
    effects = fastinterp.ablate(model, prompts)
    expected = {
        "direct_effect": fastinterp.direct_logit_attribution(model, prompts),
        "logit_diff_zero_total": effects.logit_diff_zero_total,
        "logit_diff_clean": effects.logit_diff_clean,
    }
    for name, array in expected.items():
        np.testing.assert_allclose(dataset[name].values, array.values, **CLOSE)
    assert dataset.prompt_text.values.tolist() == list(prompts.prompts)
    assert dataset.answer.values.tolist() == list(prompts.answer)
    assert dataset.status.values.tolist() == [1] * 22
    assert dataset.tokens.values[1].tolist()[:4] == [*model.encode(["Mary and"])[0], -1][:4]


def test_one_block_is_the_same_to_a_millionth(cli, zoo, prompt_file, out):
    """The batches of one block are those of the functions."""
    arguments = ["--analysis", "dla,ablation,lens", "--limit", 12, "--out", out]
    assert cli("scan", "--model", zoo.directory("llama-gqa"), "--prompts", prompt_file, *arguments).code == 0
    dataset, model, prompts = xr.open_zarr(out), zoo.model("llama-gqa"), PromptSet.read(prompt_file).head(12)
    effects = fastinterp.ablate(model, prompts)
    for array in (
        fastinterp.direct_logit_attribution(model, prompts),
        fastinterp.logit_lens(model, prompts),
        effects.logit_diff_zero_total,
        effects.logit_diff_clean,
    ):
        np.testing.assert_allclose(dataset[array.name].values, array.values, rtol=1e-6, atol=1e-6)


def test_the_command_and_the_function_make_the_same_store(cli, zoo, prompt_file, tmp_path, files):
    arguments = ["--analysis", "dla,ablation", "--ablation-limit", 9, "--limit", 20, "--batch-tokens", 64]
    common = ["--model", zoo.directory("gpt2"), "--prompts", prompt_file]
    assert cli("scan", *common, *arguments, "--out", tmp_path / "cli.zarr").code == 0
    fastinterp.scan(
        zoo.model("gpt2"),
        prompt_file,
        tmp_path / "function.zarr",
        analysis=["dla", "ablation"],
        ablation_limit=9,
        limit=20,
        batch_tokens=64,
    )
    assert files(tmp_path / "cli.zarr") == files(tmp_path / "function.zarr")


def test_loss_with_positions(cli, zoo, prompt_file, out):
    common = ["--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", out]
    assert cli("scan", *common, "--analysis", "ablation,lens", "--metric", "loss").code == 0
    dataset, texts = xr.open_zarr(out), PromptSet.read(prompt_file)
    assert dataset.loss_zero_total.dims == ("prompt", "pos", "layer", "head")
    assert dataset.loss_lens.dims == ("prompt", "pos", "site")
    expected = fastinterp.ablate(zoo.model("gpt2"), texts, metric="loss")
    np.testing.assert_allclose(dataset.loss_zero_total.values, expected.loss_zero_total.values, **CLOSE)
    np.testing.assert_allclose(dataset.loss_clean.values, expected.loss_clean.values, **CLOSE)


def test_limits_and_batches(cli, zoo, prompt_file, tmp_path):
    def scan(name, *arguments):
        common = ["--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--analysis", "dla,ablation"]
        assert cli("scan", *common, *arguments, "--out", tmp_path / name).code == 0
        return xr.open_zarr(tmp_path / name)

    whole = scan("whole.zarr")
    small = scan("small.zarr", "--batch-tokens", 40)
    part = scan("part.zarr", "--ablation-limit", 5)
    short = scan("short.zarr", "--limit", 9)
    for name in ("direct_effect", "logit_diff_zero_total", "logit_diff_clean"):
        np.testing.assert_allclose(small[name].values, whole[name].values, **CLOSE)
        np.testing.assert_allclose(short[name].values, whole[name].values[:9], **CLOSE)
        np.testing.assert_allclose(part[name].values[:5], whole[name].values[:5], **CLOSE)
        assert np.isnan(part[name].values[5:]).all() == (name != "direct_effect")
    assert short.sizes["prompt"] == 9


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_columns_can_have_other_names(cli, zoo, rows, prompt_file, tmp_path, files, suffix):
    names = {"prompt": "text", "answer": "target", "wrong": "foil", "id": "key"}
    frame = pd.DataFrame(rows).rename(columns=names).assign(extra="x")
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    columns = [f"--column={ours}={theirs}" for ours, theirs in names.items()]
    common = ["scan", "--model", zoo.directory("gpt2")]
    assert cli(*common, "--prompts", path, *columns, "--out", tmp_path / "renamed.zarr").code == 0
    assert cli(*common, "--prompts", prompt_file, "--out", tmp_path / "plain.zarr").code == 0
    assert files(tmp_path / "renamed.zarr") == files(tmp_path / "plain.zarr")


def test_one_column_can_be_renamed(cli, zoo, rows, write, tmp_path, out):
    path = write(tmp_path / "p.jsonl", [{"text": row.pop("prompt"), **row} for row in rows])
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", path]
    assert cli(*common, "--column", "prompt=text", "--out", out).code == 0
    assert xr.open_zarr(out).prompt_text.values[1] == "Mary and"


def test_text_files_need_no_answers_for_the_loss(cli, zoo, rows, tmp_path, out):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(row["prompt"] for row in rows) + "\n")
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", out]
    assert cli(*common, "--analysis", "lens", "--metric", "loss").code == 0
    dataset = xr.open_zarr(out)
    assert dataset.prompt_id.values.tolist() == [str(i) for i in range(22)]
    assert float(dataset.loss_lens.mean()) > 0


def test_bos_can_be_left_out_and_asked_for(cli, zoo, prompt_file, tmp_path, files):
    stores = {}
    for name, option in {"default": [], "bos": ["--bos"], "no": ["--no-bos"]}.items():
        common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", tmp_path / name]
        assert cli(*common, *option).code == 0
        stores[name] = xr.open_zarr(tmp_path / name)
    assert files(tmp_path / "default") == files(tmp_path / "bos")
    assert (stores["bos"].tokens.values[:, 0] == 0).all()
    assert (stores["no"].tokens.values != 0).all()
    assert np.array_equal(stores["no"].n_tokens.values + 1, stores["bos"].n_tokens.values)
    model, prompts = zoo.model("gpt2"), PromptSet.read(prompt_file)
    without = prompts.tokenize(model, prepend_bos=False)
    expected = fastinterp.direct_logit_attribution(model, without).values
    np.testing.assert_allclose(stores["no"].direct_effect.values, expected, **CLOSE)


def test_the_first_token_of_a_long_answer(cli, zoo, rows, write, tmp_path, out):
    for row in rows:
        row["answer"] = " elephants"
    path = write(tmp_path / "p.jsonl", rows)
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", out]
    assert cli(*common, "--answer-token", "first").code == 0
    dataset, model = xr.open_zarr(out), zoo.model("gpt2")
    first = model.token_strings(model.encode([" elephants"], prepend_bos=False)[0])[0]
    assert set(dataset.answer.values.tolist()) == {first}
    expected = fastinterp.direct_logit_attribution(
        model, PromptSet.read(path).tokenize(model, answer_token="first")
    ).values
    np.testing.assert_allclose(dataset.direct_effect.values, expected, **CLOSE)


def test_rejected_prompts_are_left_out_and_listed(cli, zoo, rows, write, tmp_path, out):
    rows[2]["prompt"] = ""
    rows[7]["answer"] = " elephants"
    path = write(tmp_path / "p.jsonl", rows)
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", out]
    result = cli(*common, "--bad-prompts", "reject", "--analysis", "dla,ablation")
    assert result.code == 0
    assert "rejected: 2 prompts" in result.out
    assert "row-2" in result.out
    assert "' elephants'" in result.out
    assert f"{out}: 20 prompts in " in result.out
    dataset = xr.open_zarr(out)
    assert np.flatnonzero(dataset.status.values == 3).tolist() == [2, 7]
    for name in ("direct_effect", "logit_diff_zero_total", "logit_diff_clean"):
        missing = np.isnan(dataset[name].values.reshape(22, -1))
        assert np.flatnonzero(missing.any(1)).tolist() == [2, 7]
        assert missing[[2, 7]].all()


def test_json_is_one_document_and_nothing_else(cli, zoo, rows, write, tmp_path, out):
    rows[2]["prompt"] = ""
    path = write(tmp_path / "p.jsonl", rows)
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", out]
    result = cli(*common, "--bad-prompts", "reject", "--format", "json")
    assert result.code == 0
    assert result.err == ""
    summary = json.loads(result.out)
    assert summary.pop("wall_seconds") > 0
    assert summary == {
        "store": str(out),
        "prompts": 22,
        "status": {"pending": 0, "ok": 21, "failed": 0, "rejected": 1},
        "blocks": 4,
        "blocks_computed": 4,
    }
    again = cli(*common, "--bad-prompts", "reject", "--format", "json")
    assert json.loads(again.out)["blocks_computed"] == 0


def test_processing_and_dtype_are_passed_on(cli, zoo, prompt_file, tmp_path):
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--analysis", "dla"]
    assert cli(*common, "--processing", "none", "--out", tmp_path / "raw.zarr").code == 0
    raw = xr.open_zarr(tmp_path / "raw.zarr")
    expected = fastinterp.direct_logit_attribution(zoo.model("gpt2", processing="none"), PromptSet.read(prompt_file))
    np.testing.assert_allclose(raw.direct_effect.values, expected.values, **CLOSE)
    assert raw.attrs["processing"] == "none"
    arguments = ["--dtype", "float64", "--device", "cpu", "--compress", "zstd", "--durability", "power"]
    assert cli(*common, *arguments, "--out", tmp_path / "double.zarr").code == 0
    double = xr.open_zarr(tmp_path / "double.zarr")
    assert double.attrs["dtype"] == "float64"
    np.testing.assert_allclose(
        double.direct_effect.values,
        fastinterp.direct_logit_attribution(zoo.model("gpt2"), PromptSet.read(prompt_file)).values,
        **CLOSE,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_bar(cli, zoo, prompt_file, out, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    result = cli("scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", out)
    assert result.code == 0
    last = terminal.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("100%")
    assert "| 22/22 prompts" in last


def test_the_version(cli):
    result = cli("--version")
    assert (result.code, result.out, result.err) == (0, f"fastinterp {fastinterp.__version__}\n", "")


def test_help_names_every_command_and_analysis(cli):
    assert all(name in cli("--help").out for name in ("scan", "info", "report", "tasks", "demo"))
    described = " ".join(cli("scan", "--help").out.split())
    assert all(name in described for name in ("dla_neuron", "--ablation-limit", "--bad-prompts", "--dry-run"))
