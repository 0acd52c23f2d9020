"""Bad input gives a message and an exit status, and nothing is written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xarray as xr

import fastinterp
from fastinterp.store import describe_store

LOCKER = """
import fcntl, json, os, sys
with open(sys.argv[1], "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps({"pid": os.getpid(), "host": "somewhere"}))
    file.flush()
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def refused(cli, zoo, rows, write, tmp_path):
    """Runs a scan that must be refused; returns what it says."""
    folder = tmp_path / "results"
    folder.mkdir()

    def call(*arguments, rows=rows, code=1, **replaced):
        options = {
            "--model": zoo.directory("gpt2"),
            "--prompts": write(tmp_path / "prompts.jsonl", rows),
            "--out": folder / "run.zarr",
        }
        options |= {f"--{name}": value for name, value in replaced.items()}
        before = sorted(folder.rglob("*"))
        result = cli("scan", *[item for pair in options.items() for item in pair], *arguments)
        assert result.code == code, result
        assert result.out == ""
        assert "Traceback" not in result.err
        assert code == 2 or result.err.startswith("fastinterp: ")
        assert sorted(folder.rglob("*")) == before
        return result.err

    return call


# Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt 3 (id 'row-3') is empty"),
        ({"prompt": "the" * 70}, "prompt 3 (id 'row-3') has 141 tokens, the model's context (n_ctx) is 64"),
        ({"answer": " bagend"}, "answer ' bagend' of prompt 3 (id 'row-3') is 2 tokens (' bag', 'end')"),
        ({"wrong": " bagend"}, "wrong ' bagend' of prompt 3 (id 'row-3') is 2 tokens (' bag', 'end')"),
        ({"answer": "Mary"}, "(' Mary', with a leading space, is one)"),
        ({"answer": None}, "prompt 3 (id 'row-3') has no answer"),
        ({"wrong": None}, "prompt 3 (id 'row-3') has no wrong"),
        ({"answer": " Tom", "wrong": " Tom"}, "answer and wrong of prompt 3 (id 'row-3') are the same token (' Tom')"),
        ({"answer": 400}, "answer 400 of prompt 3 (id 'row-3') is out of range: the model's vocabulary has 400 ids"),
        ({"prompt": [5, 400, 7]}, "token id 400 at position 1 of prompt 3 (id 'row-3') is out of range"),
        ({"prompt": [5, -1]}, "token id -1 at position 1 of prompt 3 (id 'row-3') is out of range"),
        ({"prompt": None}, "row 3 has no prompt"),
        ({"prompt": 7}, "prompts of row 3 must be text or a list of token ids, got 7"),
        ({"id": "row-2"}, "ids stand more than once: 'row-2'"),
    ],
)
def test_a_bad_row_is_named(refused, rows, change, message):
    rows[3] |= change
    assert message in refused(rows=rows)


def test_bad_rows_are_listed_together(refused, rows):
    for index in range(2, 15):
        rows[index]["prompt"] = ""
    message = refused(rows=rows)
    assert "13 of 22 prompts cannot be used:" in message
    assert "prompt 2 (id 'row-2') is empty" in message
    assert "prompt 11 (id 'row-11') is empty" in message
    assert "and 3 more" in message


def test_clean_and_corrupt_must_be_of_one_length(refused, rows):
    for row in rows:
        row["corrupt"] = row["prompt"]
    rows[5]["corrupt"] += " the"
    message = refused(rows=rows)
    assert "the corrupt prompt of prompt 5 (id 'row-5') has 5 tokens, the clean one 4" in message
    rows[5]["corrupt"] = None
    assert "prompt 5 (id 'row-5') has no corrupt prompt, others have" in refused(rows=rows)


def test_missing_columns_are_named(refused, rows):
    without = [{name: row[name] for name in ("prompt", "wrong")} for row in rows]
    assert "no prompt has a value in the column 'answer'" in refused(rows=without)
    renamed = [{"answers": row["answer"], **kept} for row, kept in zip(rows, without, strict=True)]
    assert "the file has other columns; did you mean 'answers'?" in refused(rows=renamed)
    texts = [{"text": row["prompt"], **row} for row in without]
    for row in texts:
        del row["prompt"]
    assert "has no column 'prompt', only 'text', 'wrong'" in refused(rows=texts)
    assert "has no column 'txt', only 'text', 'wrong'; did you mean 'text'" in refused(
        "--column", "prompt=txt", rows=texts
    )


def test_nothing_is_left_if_every_prompt_is_rejected(refused, rows):
    for row in rows:
        row["answer"] = " elephants"
    assert "every one was rejected" in refused("--bad-prompts", "reject", rows=rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "holds no prompts"),
        ("p.jsonl", b"\n\n", "holds no prompts"),
        ("p.txt", b"", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt,answer\n", "holds no prompts"),
        ("p.csv", b"prompt,answer\na,b,c\n", "line 2: 3 cells, the header has 2"),
        ("p.tsv", b"prompt\nx\n", "'.tsv' files are not read, only .txt, .jsonl, .csv, .parquet"),
        ("p", b"x\n", "'' files are not read"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", b'["x"]\n', "line 1: expected"),
        ("p.txt", b"one\n\ntwo\n", "has a blank line where a prompt should be: line 2"),
        ("p.txt", b"caf\xe9\n", "is not UTF-8 text"),
        ("p.parquet", b"no parquet", "cannot be read as parquet"),
    ],
)
def test_bad_prompt_files_are_refused_before_the_model_is_loaded(
    refused, tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(fastinterp, "load", None)
    path = tmp_path / name
    path.write_bytes(content)
    said = refused(prompts=path)
    assert str(path) in said
    assert message in said


def test_missing_prompt_files_are_refused(refused, tmp_path):
    assert f"there is no prompt file {tmp_path}/none.jsonl" in refused(prompts=tmp_path / "none.jsonl")
    assert "is a folder: give one prompt file" in refused(prompts=tmp_path)


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--analysis", "dal"], "there is no analysis 'dal': choose from dla, "),
        (["--analysis", "dal"], "did you mean 'dla'"),
        (["--analysis", "dla,ablate"], "did you mean 'ablation'"),
        (["--analysis", "dla,dla"], "'dla' is given twice"),
        (["--analysis", ""], "there is no analysis ''"),
        (["--metric", "logit_dif"], "there is no metric 'logit_dif': choose from logit_diff"),
        (["--metric", "logit_dif"], "did you mean 'logit_diff'"),
        (["--metric", "loss"], "needs a metric that is linear in the residual stream"),
        (["--limit", "0"], "limit=0: give a positive integer"),
        (["--limit", "-4"], "limit=-4: give a positive integer"),
        (["--ablation-limit", "0"], "ablation_limit=0: give a positive integer"),
        (["--batch-tokens", "abc"], "batch_tokens='abc': give a positive integer or 'auto'"),
        (["--batch-tokens", "0"], "batch_tokens=0: give a positive integer or 'auto'"),
        (["--batch-tokens", "1.5"], "batch_tokens='1.5': give a positive integer or 'auto'"),
        (["--analysis", "ablation", "--memory-bytes", "2 cups"], "memory_bytes='2 cups': give a number of bytes,"),
        (["--analysis", "ablation", "--memory-bytes", "0GB"], "memory_bytes=0: give a positive number of bytes"),
        (["--memory-bytes", "2GB"], "memory_bytes does not fit the analyses chosen (dla)"),
        (["--memory-bytes", "2GB", "--batch-tokens", "64"], "leave out batch_tokens, or memory_bytes"),
        (["--dtype", "float23"], "dtype='float23' is not known: choose from float32, float64"),
        (["--column", "prompt"], "--column 'prompt': write it as prompt=text"),
        (["--column", "prompt="], "--column 'prompt=': write it as prompt=text"),
        (["--column", "promt=text"], "did you mean 'prompt'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(refused, monkeypatch, arguments, message):
    monkeypatch.setattr(fastinterp, "load", None)
    assert message in refused(*arguments)


@pytest.mark.parametrize("device", ["cdua", "cuda:99"])
def test_devices_that_there_are_not_are_refused(refused, monkeypatch, device):
    monkeypatch.setattr(fastinterp, "load", None)
    message = refused("--device", device)
    assert f"device={device!r} cannot be used here" in message
    assert "(--device cpu)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--analysi", "dla"], "--analysis"),
        (["--limit", "abc"], "Invalid value for '--limit'"),
        (["--bad-prompts", "rejcet"], "'error', 'reject'"),
        (["--processing", "raw"], "'transformer_lens', 'none'"),
        (["--answer-token", "last"], "'single', 'first'"),
        (["--format", "yaml"], "'text', 'json'"),
    ],
)
def test_wrong_usage_is_explained(refused, monkeypatch, arguments, message):
    monkeypatch.setattr(fastinterp, "load", None)
    assert message in refused(*arguments, code=2)


def test_unknown_commands_are_refused(cli):
    result = cli("scna")
    assert result.code == 2
    assert "scna" in result.err


# Models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed_model(zoo, tmp_path):
    """A copy of the tiny GPT-2 with other config values or tensors."""

    def make(config=None, change=lambda tensors: None):
        path = tmp_path / "changed"
        shutil.copytree(zoo.directory("gpt2"), path)
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(values | (config or {})))
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(refused, changed_model, value):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
        tensors[name][3, 5] = value

    message = refused(model=changed_model(change=change))
    assert "NaN" in message or "finite" in message


@pytest.mark.parametrize("model_type", ["bloom", "alien"])
def test_unknown_families_are_refused(refused, changed_model, model_type):
    message = refused(model=changed_model({"model_type": model_type, "architectures": ["X"]}))
    assert f"model_type {model_type!r} is not supported: known are gpt2, llama" in message


def test_unsupported_configs_are_refused_by_key(refused, changed_model):
    message = refused(model=changed_model({"activation_function": "swish7"}))
    assert "activation_function='swish7'" in message


def test_damaged_checkpoints_are_refused(refused, changed_model):
    path = changed_model(change=lambda tensors: tensors.pop(next(name for name in tensors if "ln_f" in name)))
    assert "the checkpoint lacks 'ln_f" in refused(model=path)
    (path / "model.safetensors").unlink()
    assert "has no weight files (model.safetensors or pytorch_model.bin)" in refused(model=path)
    (path / "config.json").write_text("{")
    assert str(path) in refused(model=path)
    (path / "config.json").unlink()
    assert "has no config.json" in refused(model=path)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"version https://git-lfs.github.com/spec/v1\n"])
def test_weight_files_that_are_none_are_refused(refused, changed_model, content):
    path = changed_model()
    (path / "model.safetensors").write_bytes(content)
    assert str(path) in refused(model=path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "model.gguf"])
def test_models_that_are_not_there_are_refused(refused, name):
    assert f"{name!r}" in refused(model=name)


def test_a_hub_name_that_cannot_be_fetched_is_refused(refused, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refused(model="gtp2")
    assert "'gtp2' is neither a file nor a directory here, and no hub model of this name could be fetched" in message


def test_text_needs_a_tokenizer(refused, zoo, tmp_path):
    zoo.hf("gpt2").save_pretrained(tmp_path / "bare")
    assert "this model has no tokenizer" in refused(model=tmp_path / "bare")


# Stores -----------------------------------------------------------------------------------------------------------


def test_the_folder_of_the_store_must_exist(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(fastinterp, "load", None)
    folder = tmp_path / "none" / "here"
    assert f"{folder} is no folder: make it first (mkdir -p {folder})" in refused(out=folder / "run.zarr")


@pytest.mark.parametrize("kind", ["file", "folder", "zarr"])
def test_something_else_is_never_overwritten(refused, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fastinterp, "load", None)
    path = tmp_path / "results" / "mine"
    match kind:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
            (path / "notes.txt").write_text("mine")
        case "zarr":
            xr.Dataset({"x": ("t", [1.0, 2.0])}).to_zarr(path, consolidated=False)
    assert f"{path} is not a fastinterp store" in refused(out=path)


@pytest.fixture
def store(cli, zoo, prompt_file, tmp_path):
    path = tmp_path / "there.zarr"
    assert cli("scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", path).code == 0
    return path


def test_a_store_that_somebody_writes_is_refused(refused, store, files, monkeypatch):
    before = files(store)
    lock = store.with_name("there.zarr.d") / "LOCK"
    command = [sys.executable, "-c", LOCKER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        monkeypatch.setattr(fastinterp, "load", None)
        message = refused(out=store)
        holder.communicate()
    assert f"{store} is being written by process {holder.pid} on host somewhere" in message
    assert f"kill {holder.pid}" in message
    assert files(store) == before


def test_a_store_without_its_journal_is_refused(refused, store, monkeypatch):
    monkeypatch.setattr(fastinterp, "load", None)
    shutil.rmtree(store.with_name("there.zarr.d"))
    assert "has no there.zarr.d, so nobody can tell which of its blocks are complete" in refused(out=store)


# Overflow ---------------------------------------------------------------------------------------------------------


def test_an_overflow_names_the_prompt_and_keeps_the_blocks_before(cli, changed_model, zoo, prompt_file, rows, out):
    """Only the token " over" is too large, which stands in the prompts 3, 7, 11, ... and not in the first block."""
    (token,) = zoo.model("gpt2").encode([" over"], prepend_bos=False)[0]
    assert token not in zoo.model("gpt2").encode([rows[0]["prompt"]])[0]

    def change(tensors):
        name = next(name for name in tensors if name.endswith("wte.weight"))
        tensors[name][token] *= 1e37

    common = ["scan", "--model", changed_model(change=change), "--out", out]
    rows = [row for row in rows if " over" not in row["prompt"]]
    rows.insert(9, {"id": "too large", "prompt": "The fox jumps over it", "answer": " Tom", "wrong": " Bob"})
    path = prompt_file.with_name("overflow.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(*common, "--prompts", path, "--analysis", "dla,ablation")
    assert result.code == 1
    assert "is not finite for prompt 9 (id 'too large')" in result.err
    assert "Traceback" not in result.err
    stored = describe_store(out)
    assert stored.block_size == 5
    assert stored.committed == {0}
    assert xr.open_zarr(out).status.values.tolist()[:6] == [1] * 5 + [0]


def test_a_full_disk_is_a_message(cli, zoo, prompt_file, out, monkeypatch):
    def full(self, block, arrays):
        raise OSError(28, "No space left on device")

    common = ["scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr("fastinterp.store.chunks.ChunkWriter.write", full)
        result = cli(*common)
    assert result.code == 1
    assert "No space left on device" in result.err
    assert "run the same command again to resume" in result.err
    assert cli(*common).code == 0
    assert describe_store(out).complete


# Other commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks", "ioii", "--out", "p.jsonl"], "there is no task 'ioii'; did you mean 'ioi'"),
        (["tasks", "ioi", "--out", "p.csv"], "give a file that ends in .jsonl"),
        (["tasks", "ioi", "-n", "0", "--out", "p.jsonl"], "n=0 is not positive"),
        (["tasks", "ioi", "--out", "none/p.jsonl"], "none/p.jsonl"),
        (["tasks", "ioi", "--model", "./nowhere", "--out", "p.jsonl"], "'./nowhere'"),
        (["info", "none.zarr"], "there is no store at "),
        (["report", "none.zarr", "--html", "p.html"], "there is no store at "),
        (["demo", "-n", "0"], "n=0 is not positive"),
        (["demo", "--ablation-limit", "0"], "ablation_limit=0: give a positive integer"),
    ],
)
def test_other_commands_refuse_in_the_same_way(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "demo":
        monkeypatch.setattr(fastinterp, "load", lambda path: None)
    result = cli(*arguments)
    assert result.code == 1
    assert result.err.startswith("fastinterp: ")
    assert message in result.err
    assert "Traceback" not in result.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_installed_command_ends_with_a_message_and_a_status(tmp_path):
    command = [Path(sys.executable).with_name("fastinterp"), "info", tmp_path / "none.zarr"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"fastinterp: there is no store at {tmp_path}/none.zarr")
    assert len(ended.stderr.splitlines()) == 1
