"""What the commands say where something is there already, is something else, or is likely meant otherwise."""

import pytest

from fastinterp.cli.demo import find_smollm2
from fastinterp.prompts import PromptSet


def test_tasks_replaces_a_file_only_if_asked(cli, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("mine\n")
    result = cli("tasks", "ioi", "-n", 5, "--out", path)
    assert (result.code, result.out) == (1, "")
    assert "is there already: give another name, or --overwrite" in result.err
    assert path.read_text() == "mine\n"
    assert cli("tasks", "ioi", "-n", 5, "--out", path, "--overwrite").code == 0
    assert len(PromptSet.read(path)) == 5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("prompts.jsonl", "fastinterp scan --model MODEL --prompts"),
        ("model.gguf", "fastinterp scan --model"),
        ("notes.md", "give the path of a store"),
    ],
)
@pytest.mark.parametrize("command", [["info"], ["report", "--html", "page.html"]])
def test_a_file_in_place_of_a_store(cli, tmp_path, name, hint, command):
    path = tmp_path / name
    path.write_text("{}")
    result = cli(*command, path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"fastinterp: {path} is not a fastinterp store but a file: ")
    assert hint in result.err
    assert "NotADirectoryError" not in result.err


def test_the_cause_stands_first_when_a_store_cannot_be_resumed(cli, zoo, rows, write, tmp_path, out):
    scan = ["scan", "--model", zoo.directory("gpt2"), "--out", out, "--prompts"]
    assert cli(*scan, write(tmp_path / "prompts.jsonl", rows)).code == 0
    result = cli(*scan, write(tmp_path / "other.jsonl", rows[:9]), "--dtype", "float64")
    assert result.code == 1
    said = result.err.splitlines()
    assert said[1].startswith("input_hash: store has ")
    assert said[1].endswith("(the prompts, answers or ids are not the same)")
    names = [line.split(":")[0] for line in said[2:-1]]
    assert names.index("dtype") < names.index("n_prompts") < names.index("arrays.direct_effect.shape")


@pytest.mark.filterwarnings("default")
def test_an_answer_without_its_space_is_one_line(cli, zoo, rows, write, tmp_path, out):
    rows[2]["answer"] = "a"
    result = cli("scan", "--model", zoo.directory("gpt2"), "--out", out, "--prompts", write(tmp_path / "p.jsonl", rows))
    assert result.code == 0
    (line,) = [line for line in result.err.splitlines() if "answer" in line]
    assert line.startswith("fastinterp: answer 'a' of prompt 2 (id 'row-2') is another token than ' a'")


@pytest.mark.real
def test_the_path_of_the_demos_model(smollm2_gguf):
    assert find_smollm2() == smollm2_gguf
