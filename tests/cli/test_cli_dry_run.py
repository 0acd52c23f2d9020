"""``fastinterp scan --dry-run``: everything is checked and shown, nothing is written."""

import json

import pytest


@pytest.fixture
def dry_run(cli, zoo, rows, write, tmp_path):
    """Shows the plan of a scan of 22 prompts, two of which cannot be used."""
    folder = tmp_path / "empty"
    folder.mkdir()
    rows[2]["prompt"] = ""
    rows[7]["answer"] = " elephants"
    path = write(tmp_path / "p.jsonl", rows)

    def call(*arguments):
        result = cli(
            *("scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", folder / "run.zarr"),
            *("--analysis", "dla,ablation", "--ablation-limit", 6, "--dry-run", *arguments),
        )
        assert list(folder.iterdir()) == []
        return result

    return call


def test_the_plan_as_json(dry_run):
    result = dry_run("--format", "json", "--bad-prompts", "reject")
    assert (result.code, result.err) == (0, "")
    planned = json.loads(result.out)
    assert (planned["prompts"], planned["kept"], planned["blocks"]) == (22, 20, 4)
    assert [(r["index"], r["id"]) for r in planned["rejected"]] == [(2, "row-2"), (7, "row-7")]
    assert "is empty" in planned["rejected"][0]["reason"]
    assert "' elephants'" in planned["rejected"][1]["reason"]
    assert planned["estimated_seconds"] > 0
    assert planned["flops"] > 0
    shapes = {array["name"]: (array["shape"], array["dtype"], array["bytes"]) for array in planned["arrays"]}
    assert shapes["direct_effect"] == ([22, 3, 4], "float32", 1056)
    assert shapes["logit_diff_zero_total"] == ([22, 3, 4], "float32", 1056)
    assert shapes["logit_diff_clean"] == ([22], "float32", 88)
    assert shapes["tokens"] == ([22, planned["longest_prompt_tokens"]], "int32", 88 * planned["longest_prompt_tokens"])
    assert planned["analyses"]["dla"]["prompts"] == 22
    assert planned["analyses"]["ablation"]["prompts"] == 6


def test_the_plan_as_text(dry_run):
    result = dry_run("--bad-prompts", "reject")
    assert (result.code, result.err) == (0, "")
    assert "20 of 22 prompts, longest " in result.out
    assert "rejected: 2 prompts" in result.out
    assert "row-7" in result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("logit_diff_zero_total")]
    assert line.split() == [
        "logit_diff_zero_total",
        "prompt,",
        "layer,",
        "head",
        "[22,",
        "3,",
        "4]",
        "float32",
        "1.1",
        "kB",
    ]
    (estimate,) = [line for line in result.out.splitlines() if line.startswith("estimated time: ")]
    assert float(estimate.split()[2]) >= 0
    assert any(line.startswith("store: ") and "TFLOP" in line for line in result.out.splitlines())


def test_bad_prompts_are_refused_as_by_the_scan(dry_run):
    result = dry_run()
    assert (result.code, result.out) == (1, "")
    assert "2 of 22 prompts cannot be used" in result.err


def test_a_store_that_is_there_is_left_alone(cli, zoo, prompt_file, out, files):
    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", out]
    assert cli(*common).code == 0
    before = files(out), sorted(path.name for path in out.with_name("run.zarr.d").iterdir())
    assert cli(*common, "--dry-run").code == 0
    assert (files(out), sorted(path.name for path in out.with_name("run.zarr.d").iterdir())) == before
