"""Scans that are killed or interrupted at a given moment: ``scan_child.py JOBS`` forks a process for each job.

A job has ``argv``, the ``signals`` that the process sends itself, and the ``moment`` when: ``loading`` the model, or in
block ``block`` after it is ``computed``, after the ``first_file`` or the ``last_file``, ``before_commit``,
``after_commit``; ``stuck`` is ``computed`` with a disk that never answers. Printed is the list of wait statuses;
standard output and error of job ``n`` go to ``JOBS.n.out`` and ``JOBS.n.err``.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastinterp.engine.run
import fastinterp.load
import fastinterp.store.blocks
import fastinterp.store.chunks
import fastinterp.store.journal
from fastinterp.cli import main

BLOCK_SIZE = 3


def strike(names: list[str]) -> None:
    """Sends the signals to this process: the first now, a second half a second later."""
    for delay, name in reversed(list(enumerate(names))):
        number = signal.Signals[name]
        if delay:
            timer = threading.Timer(0.5 * delay, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            os.kill(os.getpid(), number)


def arm(moment: str, block: int, strike: Callable[[], None]) -> None:
    """Puts the strike in its place; from then on it is a scan like any other."""
    chunks, journal, run = fastinterp.store.chunks, fastinterp.store.journal, fastinterp.engine.run
    compute, write, commit = run.compute_block, chunks.ChunkWriter.write, journal.Journal.commit
    put = chunks.RecordingStore.set

    def compute_block(model: Any, planned: Any, number: int, advance: Any) -> Any:
        arrays = compute(model, planned, number, advance)
        if moment == "computed" and number == block:
            strike()
        return arrays

    def write_chunks(self: Any, number: int, arrays: Any) -> Any:
        async def put_file(store: Any, key: str, value: Any) -> None:
            await put(store, key, value)
            if number == block and key.startswith("status/" if moment == "last_file" else "direct_effect/"):
                strike()

        if moment == "stuck":
            threading.Event().wait(30)
        if moment in ("first_file", "last_file"):
            chunks.RecordingStore.set = put_file
        return write(self, number, arrays)

    def commit_block(self: Any, row: Any, rows: Any) -> None:
        if moment == "before_commit" and row.block == block:
            strike()
        commit(self, row, rows)
        if moment == "after_commit" and row.block == block:
            strike()

    def load(*args: Any, **options: Any) -> None:
        strike()
        raise AssertionError("the signal did not stop the process")

    run.compute_block = compute_block
    chunks.ChunkWriter.write = write_chunks
    journal.Journal.commit = commit_block
    if moment == "loading":
        fastinterp.load = load
    if moment == "stuck":
        # The writer hangs; what comes from the main thread must still end the process.
        run.compute_block = lambda *args: (compute(*args), strike())[0] if args[2] == block else compute(*args)


def forked(job: dict[str, Any], out: Path, err: Path) -> int:
    """Runs a job in a process of its own and returns its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["fastinterp", *job["argv"]]
        arm(job["moment"], job["block"], lambda: strike(job["signals"]))
        main()
        os._exit(0)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
    finally:
        os._exit(99)


if __name__ == "__main__":
    fastinterp.store.blocks.MAX_PROMPTS_SWEEP = BLOCK_SIZE
    jobs = Path(sys.argv[1])
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Imports what loading needs once, for all forks. No thread may be running by then.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    fastinterp.load(sys.argv[2])
    assert threading.active_count() == 1
    statuses = [
        forked(job, Path(f"{jobs}.{n}.out"), Path(f"{jobs}.{n}.err"))
        for n, job in enumerate(json.loads(jobs.read_text()))
    ]
    print(json.dumps(statuses))
