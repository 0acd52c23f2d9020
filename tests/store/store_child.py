"""A sample store, and the processes that tests kill or are locked out by (``store_child.py MODE ...``)."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.store import ArraySpec, CoordSpec, StoreSpec, StoreWriter, journal, status_array

N_PROMPTS = 18
BLOCK_SIZE = 4
N_LAYERS, N_HEADS, N_POS, D_MODEL = 2, 3, 5, 7


def make_spec(**changes: Any) -> StoreSpec:
    """A store with every kind of array, a ragged last block and integer and string coordinates."""
    n = N_PROMPTS
    by_head = ("prompt", "layer", "head")
    fields: dict[str, Any] = {
        "n_prompts": n,
        "block_size": BLOCK_SIZE,
        "arrays": (
            ArraySpec(
                name="direct_effect",
                dims=by_head,
                shape=(n, N_LAYERS, N_HEADS),
                dtype="float32",
                attrs={"units": "logits", "long_name": "direct effect on the logit difference"},
                kind="result",
            ),
            ArraySpec(
                name="resid_post",
                dims=("prompt", "pos", "d_model"),
                shape=(n, N_POS, D_MODEL),
                dtype="float16",
                attrs={},
                kind="activation",
            ),
            ArraySpec(
                name="tokens",
                dims=("prompt", "pos"),
                shape=(n, N_POS),
                dtype="int32",
                attrs={},
                kind="prompt",
            ),
            ArraySpec(name="prompt_text", dims=("prompt",), shape=(n,), dtype="str", attrs={}, kind="prompt"),
            ArraySpec(name="prompt_id", dims=("prompt",), shape=(n,), dtype="str", attrs={}, kind="prompt"),
            status_array(n),
        ),
        "coords": (
            CoordSpec(name="layer", dims=("layer",), values=list(range(N_LAYERS))),
            CoordSpec(name="head", dims=("head",), values=np.arange(N_HEADS)),
            CoordSpec(
                name="head_label",
                dims=("layer", "head"),
                values=[[f"L{layer}H{head}" for head in range(N_HEADS)] for layer in range(N_LAYERS)],
            ),
        ),
        "attrs": {"model": "tiny", "created": "2025-01-01"},
        "identity": {"model": {"name": "tiny", "weights_sha256": "abc"}, "analyses": ["direct_effect"]},
    }
    return StoreSpec(**{**fields, **changes})


def make_block(spec: StoreSpec, block: int) -> dict[str, np.ndarray]:
    """The same numbers for the same block every time; block 1 is all NaN, block 2 all zero."""
    rng = np.random.default_rng(block)
    n = len(spec.prompts_of(block))
    effect = rng.standard_normal((n, N_LAYERS, N_HEADS), dtype=np.float32)
    tokens = rng.integers(0, 1000, (n, N_POS), dtype=np.int32)
    if block == 1:
        effect[:] = np.nan
        tokens[:] = -1
    if block == 2:
        effect[:] = 0
        tokens[:] = 0
    return {
        "direct_effect": effect,
        "resid_post": rng.standard_normal((n, N_POS, D_MODEL)).astype(np.float16),
        "tokens": tokens,
        "prompt_text": np.array([f"prompt {i} + größer" if block != 1 else "" for i in range(n)], dtype=object),
        "prompt_id": np.array([f"{block}-{i}" for i in range(n)], dtype=object),
        "status": np.full(n, 1 + block % 3, dtype=np.uint8),
    }


def fill(path: Path, **options: Any) -> None:
    """Runs or resumes the sample store to its end."""
    spec = make_spec()
    with StoreWriter.open(path, spec, **options) as writer:
        for block in writer.missing:
            writer.write(block, make_block(spec, block))


def watch(folder: Path, event: Callable[[str], None]) -> None:
    """Calls ``event`` at every file operation below ``folder`` and at every SQL statement."""
    kinds = {"open", "os.rename", "os.mkdir", "os.remove"}

    def hook(kind: str, args: tuple[Any, ...]) -> None:
        if kind in kinds and str(args[0]).startswith(str(folder)):
            event(f"{kind} {args[1] if kind == 'os.rename' else args[0]}")

    connect = journal._connect

    def traced(*args: Any) -> Any:
        connection = connect(*args)
        connection.set_trace_callback(event)
        return connection

    journal._connect = traced
    sys.addaudithook(hook)


def forked(work: Callable[[], None]) -> int:
    """Runs ``work`` in a fork and returns how it ended; zarr must not have started a thread before."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def record(folder: Path) -> list[str]:
    """Returns the operations of an undisturbed run."""
    folder.mkdir()
    events: list[str] = []

    def work() -> None:
        watch(folder, events.append)
        fill(folder / "run.zarr")
        (folder / "events.json").write_text(json.dumps(events[:]))

    assert forked(work) == 0
    return json.loads((folder / "events.json").read_text())


def kill(folder: Path, moment: int) -> None:
    """A process writes ``folder/<moment>/run.zarr`` and is killed right before operation ``moment``."""
    target = folder / str(moment)
    target.mkdir()
    count = 0

    def event(_: str) -> None:
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def work() -> None:
        watch(target, event)
        fill(target / "run.zarr")

    assert os.WTERMSIG(forked(work)) == signal.SIGKILL, f"the process ended before moment {moment}"


def choose_moments(events: list[str]) -> list[int]:
    """Seeded moments within creation and within the blocks, and those around its end and around a commit."""
    created = end_of_creation(events)
    commits = [i for i, event in enumerate(events) if event == "COMMIT" and i > created]
    rng = np.random.default_rng(20)
    moments = {created, created + 1, commits[1], commits[1] + 1}
    moments |= {int(i) for i in rng.choice(created, 3, replace=False)}
    moments |= {int(i) for i in rng.choice(np.arange(created, commits[-1]), 4, replace=False)}
    return sorted(moments)


def end_of_creation(events: list[str]) -> int:
    """The rename after which the store exists."""
    return next(i for i, event in enumerate(events) if event.startswith("os.rename") and event.endswith("run.zarr"))


def hold(path: Path) -> None:
    """Opens the store for writing and keeps it open until standard input ends."""
    with StoreWriter.open(path, make_spec()):
        print(os.getpid(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    if mode == "kill":
        recorded = record(where / "record")
        chosen = choose_moments(recorded)
        for each in chosen:
            kill(where, each)
        print(json.dumps({"events": recorded, "moments": chosen}))
    else:
        hold(where)
