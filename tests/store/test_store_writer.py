import errno
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import xarray as xr
import zarr

from fastinterp.errors import PlanError, StoreError, StoreLockedError
from fastinterp.store import StoreWriter, describe_store
from fastinterp.store.byte_queue import ByteQueue
from fastinterp.store.chunks import ChunkWriter, RecordingStore
from fastinterp.store.journal import Journal
from fastinterp.store.paths import StorePaths


def change(block, name, value):
    return {**block, name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "direct_effect",
            np.zeros((4, 3, 2), np.float32),
            r"shape \(4, 3, 2\): expected \(4, 2, 3\) for dims",
        ),
        ("direct_effect", np.zeros((2, 2, 3), np.float32), r"shape \(2, 2, 3\): expected \(4, 2, 3\)"),
        ("direct_effect", np.zeros((4, 2, 3)), r"dtype float64: expected float32 \(array.astype"),
        ("tokens", np.zeros((4, 5), np.int64), "dtype int64: expected int32"),
        ("tokens", [[0] * 5] * 4, "is a list: expected numpy"),
        (
            "prompt_text",
            np.array(["a", None, "b", "c"], dtype=object),
            r"holds None \(NoneType\): expected str",
        ),
        ("prompt_text", np.array(["a", "\ud800", "b", "c"], dtype=object), "not valid Unicode"),
        ("resid_post", np.full((4, 5, 7), 1e5, np.float32), "values up to 100000, float16 ends at 65504"),
        ("status", np.zeros(4, np.uint8), r"status has values \[0\]: a written prompt is 1 ok"),
        ("status", np.full(4, 4, np.uint8), r"status has values \[4\]"),
    ],
)
def test_wrong_arrays_are_refused_and_nothing_is_lost(sample, run, name, value, message):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        with pytest.raises(StoreError, match=message):
            writer.write(0, change(sample.make_block(spec, 0), name, value))
        writer.write(0, sample.make_block(spec, 0))
    assert describe_store(run).committed == {0}


def test_wrong_names_and_blocks_are_refused(sample, run):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        block = sample.make_block(spec, 0)
        del block["tokens"]
        with pytest.raises(StoreError, match=r"missing \['tokens'\], not in it \['token'\]"):
            writer.write(0, {**block, "token": np.zeros(1)})
        with pytest.raises(StoreError, match="block 5 is out of range"):
            writer.write(5, sample.make_block(spec, 0))
        with pytest.raises(StoreError, match=r"shape \(4, 2, 3\): expected \(2, 2, 3\)"):
            writer.write(4, sample.make_block(spec, 0))
        writer.write(0, sample.make_block(spec, 0))
        with pytest.raises(StoreError, match="block 0 was written already"):
            writer.write(0, sample.make_block(spec, 0))
    with pytest.raises(StoreError, match="is closed"):
        writer.write(1, sample.make_block(spec, 1))


def test_float16_takes_float32_that_fits(sample, run):
    spec = sample.make_spec()
    values = np.linspace(-60000, 60000, 140, dtype=np.float32).reshape(4, 5, 7)
    values[0, 0, 0] = np.inf
    with StoreWriter.open(run, spec) as writer:
        writer.write(0, change(sample.make_block(spec, 0), "resid_post", values))
    stored = xr.open_zarr(run).resid_post.values[:4]
    assert stored.tobytes() == values.astype(np.float16).tobytes()


def test_handed_over_arrays_may_be_reused(sample, run, monkeypatch):
    spec = sample.make_spec()
    go = threading.Event()
    write = ChunkWriter.write

    def late(self, block, arrays):
        assert go.wait(20)
        return write(self, block, arrays)

    monkeypatch.setattr(ChunkWriter, "write", late)
    block = sample.make_block(spec, 0)
    with StoreWriter.open(run, spec) as writer:
        writer.write(0, block)
        for array in block.values():
            array[:] = array[::-1].copy()
        go.set()
    expected = sample.make_block(spec, 0)
    stored = xr.open_zarr(run).isel(prompt=slice(0, 4))
    assert stored.direct_effect.values.tobytes() == expected["direct_effect"].tobytes()
    assert stored.prompt_id.values.tolist() == expected["prompt_id"].tolist()


def test_status_is_written_last_and_the_journal_after_it(sample, run, monkeypatch):
    order = []
    put, commit = RecordingStore.set, Journal.commit

    async def recorded(self, key, value):
        await put(self, key, value)
        order.append(key.split("/c/")[0])

    def committed(self, block, rows):
        order.append("commit")
        commit(self, block, rows)

    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        monkeypatch.setattr(RecordingStore, "set", recorded)
        monkeypatch.setattr(Journal, "commit", committed)
        writer.write(0, sample.make_block(spec, 0))
    assert order[-2:] == ["status", "commit"]
    assert sorted(order[:-1]) == sorted(array.name for array in spec.arrays)


def test_power_durability_syncs_every_chunk_and_folder_before_the_journal_row(sample, run, monkeypatch):
    order = []
    fsync, commit = os.fsync, Journal.commit

    def recorded(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def committed(self, block, rows):
        order.append([str(run / row.key) for row in rows])
        commit(self, block, rows)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Journal, "commit", committed)
    spec = sample.make_spec()
    with StoreWriter.open(run, spec, durability="power") as writer:
        assert str(run.parent) in order
        assert str(StorePaths.of(run).side / "run.json") in order
        order.clear()
        writer.write(0, sample.make_block(spec, 0))
    (files,) = [entry for entry in order if isinstance(entry, list)]
    before = order[: order.index(files)]
    folders = {str(run), str(run / "tokens"), str(run / "tokens/c"), str(run / "tokens/c/0")}
    assert set(files) | folders <= set(before)


def test_process_durability_syncs_nothing(sample, run, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("fsync"))
    sample.fill(run)
    assert describe_store(run).complete


@pytest.mark.parametrize("failing", ["tokens/c/2/0", "status/c/2"])
def test_an_error_in_the_writer_thread_is_raised_and_leaves_a_readable_prefix(
    sample, run, monkeypatch, tree, reference, failing
):
    put = RecordingStore.set

    async def full(self, key, value):
        if key == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        await put(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(RecordingStore, "set", full)
        with pytest.raises(StoreError, match=r"block 2 failed .*No space left.*2 of 5 blocks are") as caught:
            # A queue of one block, so that the failure meets a write() that waits.
            sample.fill(run, queue_bytes=1)
        assert isinstance(caught.value.__cause__, OSError)
        assert "run the same command again" in str(caught.value)
    assert describe_store(run).committed == {0, 1}
    prefix = xr.open_zarr(run).isel(prompt=slice(0, 8)).load()
    assert prefix.status.values.tolist() == [1] * 4 + [2] * 4
    sample.fill(run)
    assert tree(run) == reference


def test_an_error_wakes_a_write_that_waits_for_room(sample, run, monkeypatch):
    spec = sample.make_spec()
    go = threading.Event()

    def broken(self, block, arrays):
        assert go.wait(20)
        raise ValueError("broken")

    monkeypatch.setattr(ChunkWriter, "write", broken)
    writer = StoreWriter.open(run, spec, queue_bytes=5000)
    for block in (0, 1):
        writer.write(block, sample.make_block(spec, block))
    # Too large to fit beside block 1, which nobody takes out any more.
    large = change(sample.make_block(spec, 2), "prompt_text", np.array(["x" * 5000] * 4, dtype=object))
    raised = []

    def wait():
        try:
            writer.write(2, large)
        except StoreError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    go.set()
    waiting.join(20)
    assert "writing block 0 failed" in raised[0]
    writer.close()


def test_an_error_after_the_last_write_is_raised_by_close_once(sample, run, monkeypatch):
    spec = sample.make_spec()
    go = threading.Event()

    def broken(self, block, arrays):
        assert go.wait(20)
        raise ValueError("broken")

    monkeypatch.setattr(ChunkWriter, "write", broken)
    writer = StoreWriter.open(run, spec)
    writer.write(0, sample.make_block(spec, 0))
    go.set()
    with pytest.raises(StoreError, match=r"writing block 0 failed \(ValueError: broken\)"):
        writer.close()
    writer.close()
    with pytest.raises(StoreError, match="writing block 0 failed"):
        writer.write(1, sample.make_block(spec, 1))
    assert writer.missing == [0, 1, 2, 3, 4]
    # The lock is free again.
    StoreWriter.open(run, spec).close()


def test_an_error_in_the_with_block_is_kept_beside_that_of_the_writer(sample, run, monkeypatch):
    def broken(self, block, arrays):
        raise ValueError("broken")

    monkeypatch.setattr(ChunkWriter, "write", broken)
    spec = sample.make_spec()

    def scan():
        with StoreWriter.open(run, spec) as writer:
            writer.write(0, sample.make_block(spec, 0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        scan()
    assert "writing block 0 failed" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_leaving_with_an_error_commits_what_was_handed_over(sample, run, monkeypatch, error):
    spec = sample.make_spec()
    write = ChunkWriter.write

    def slow(self, block, arrays):
        time.sleep(0.05)
        return write(self, block, arrays)

    monkeypatch.setattr(ChunkWriter, "write", slow)
    writer = StoreWriter.open(run, spec)

    def scan():
        with writer:
            for block in range(3):
                writer.write(block, sample.make_block(spec, block))
            raise error

    with pytest.raises(error):
        scan()
    assert describe_store(run).committed == {0, 1, 2}
    assert writer.committed == {0, 1, 2}


def test_an_interrupted_close_finishes_the_block_at_hand_and_frees_the_lock(sample, run, monkeypatch):
    spec = sample.make_spec()
    started, go = threading.Event(), threading.Event()
    write = ChunkWriter.write

    def slow(self, block, arrays):
        started.set()
        assert go.wait(20)
        return write(self, block, arrays)

    monkeypatch.setattr(ChunkWriter, "write", slow)
    writer = StoreWriter.open(run, spec)
    for block in range(3):
        writer.write(block, sample.make_block(spec, block))
    assert started.wait(20)
    join = writer._thread.join

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    with pytest.raises(StoreLockedError):
        StoreWriter.open(run, spec)
    go.set()
    join()
    with StoreWriter.open(run, spec) as again:
        assert again.missing == [1, 2, 3, 4]


def test_the_queue_is_bounded_in_bytes(sample, run, monkeypatch):
    spec = sample.make_spec(block_size=1)
    held = []
    write = ChunkWriter.write

    def slow(self, block, arrays):
        time.sleep(0.02)
        held.append(writer.queued_bytes)
        return write(self, block, arrays)

    monkeypatch.setattr(ChunkWriter, "write", slow)
    with StoreWriter.open(run, spec, queue_bytes=1000) as writer:
        for block in writer.missing:
            writer.write(block, sample.make_block(spec, block))
            held.append(writer.queued_bytes)
    one_block = min(size for size in held if size)
    assert 200 < one_block < 500
    # More than one block was queued, and all 18 would have been more than the bound.
    assert one_block < max(held) <= 1000 < 18 * one_block
    assert writer.queued_bytes == 0
    assert describe_store(run).complete


def test_an_item_larger_than_the_queue_passes_alone():
    queue = ByteQueue(10)
    assert queue.put("large", 50)
    assert queue.held == 50
    order = []

    def consume():
        while (item := queue.get()) is not None:
            order.append(item[0])
            queue.done(item[1])

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert queue.put("small", 5)
    queue.close()
    consumer.join(20)
    assert order == ["large", "small"]
    assert queue.held == 0
    assert not queue.put("late", 1)


def test_abandoning_wakes_a_waiting_producer():
    queue = ByteQueue(10)
    assert queue.put("first", 10)
    threading.Timer(0.05, queue.abandon).start()
    assert not queue.put("second", 10)
    assert queue.get() is None
    assert queue.held == 0


def test_a_second_writer_is_refused_at_once_and_told_the_pid(sample, run):
    command = [sys.executable, sample.__file__, "hold", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            pid = int(holder.stdout.readline())
            assert pid == holder.pid
            with pytest.raises(StoreLockedError) as caught:
                StoreWriter.open(run, sample.make_spec())
            message = str(caught.value)
            assert f"process {pid} on host {os.uname().nodename}" in message
            assert str(run) in message
            assert f"kill {pid}" in message
        finally:
            holder.kill()
    # The kernel gave the lock of the killed process back.
    StoreWriter.open(run, sample.make_spec()).close()


def test_two_writers_in_one_process_are_refused(sample, run):
    with StoreWriter.open(run, sample.make_spec()):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()} "):
            StoreWriter.open(run, sample.make_spec())


def test_places_where_no_store_can_be_made(sample, tmp_path, monkeypatch):
    spec = sample.make_spec()
    with pytest.raises(StoreError, match=r"no folder: make it first \(mkdir -p "):
        StoreWriter.open(tmp_path / "missing" / "run.zarr", spec)
    empty = tmp_path / "empty.zarr"
    empty.mkdir()
    with pytest.raises(StoreError, match="is not a fastinterp store"):
        StoreWriter.open(empty, spec)
    file = tmp_path / "file.zarr"
    file.write_text("x")
    with pytest.raises(StoreError, match="is not a fastinterp store"):
        StoreWriter.open(file, spec)
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    with pytest.raises(StoreError, match="is not a fastinterp store"):
        StoreWriter.open(other, spec)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["empty.zarr", "file.zarr", "other.zarr"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StoreError, match="cannot be written: change its permissions"):
        StoreWriter.open(tmp_path / "run.zarr", spec)


def test_too_small_a_disk_is_refused_with_numbers(sample, run, monkeypatch):
    spec = sample.make_spec()
    needed = spec.nbytes()
    usage = type("usage", (), {"free": needed - 1})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(PlanError, match=rf"{needed} bytes.*{needed - 1} bytes"):
            StoreWriter.open(run, spec)
        assert list(run.parent.iterdir()) == []
        usage.free = needed
        with StoreWriter.open(run, spec) as writer:
            for block in range(4):
                writer.write(block, sample.make_block(spec, block))
        # To resume, only the missing fifth is needed.
        usage.free = needed // 5
        StoreWriter.open(run, spec).close()
        usage.free = needed // 5 - 1
        with pytest.raises(PlanError, match="make room"):
            StoreWriter.open(run, spec)
    # The refusal gave the lock back.
    StoreWriter.open(run, spec).close()
