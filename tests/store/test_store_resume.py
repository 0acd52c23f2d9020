import json
import shutil
import sqlite3
import subprocess
import sys

import pytest

from fastinterp.errors import StoreError, StoreMismatchError
from fastinterp.store import CoordSpec, StoreWriter, describe_store
from fastinterp.store.journal import Journal
from fastinterp.store.paths import StorePaths


def journal_keys(path):
    """Chunk files that the journal names, one entry for each row."""
    with sqlite3.connect(StorePaths.of(path).journal) as connection:
        rows = connection.execute("SELECT array || '/' || chunk_key FROM chunks").fetchall()
    connection.close()
    return sorted(key for (key,) in rows)


def chunk_keys(spec):
    return sorted(f"{a.name}/{key}" for a in spec.arrays for b in range(spec.n_blocks) for key in spec.chunk_keys(a, b))


def test_a_killed_run_resumes_to_the_same_bytes(sample, tmp_path, tree, reference):
    """kill -9 before a file operation or SQL statement: in creation, within a block, around a commit."""
    command = [sys.executable, sample.__file__, "kill", str(tmp_path)]
    output = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    events, moments = output["events"], output["moments"]
    created = sample.end_of_creation(events)
    commits = [i for i, event in enumerate(events) if event == "COMMIT" and i > created]
    assert len(commits) == 5
    spec = sample.make_spec()
    left = set()
    for moment in moments:
        path = tmp_path / str(moment) / "run.zarr"
        assert path.exists() == (moment > created), events[moment]
        done = sum(commit < moment for commit in commits)
        if path.exists():
            assert describe_store(path).committed == set(range(done))
        with StoreWriter.open(path, spec) as writer:
            assert writer.resumed == (moment > created)
            assert writer.damaged == {}
            assert writer.missing == list(range(done, 5)), events[moment]
            left.add(len(writer.missing))
            for block in writer.missing:
                writer.write(block, sample.make_block(spec, block))
        assert tree(path) == reference, events[moment]
        assert journal_keys(path) == chunk_keys(spec)
        assert not list(path.parent.rglob("*.partial*"))
        assert {entry.name for entry in path.parent.iterdir()} == {"run.zarr", "run.zarr.d"}
    assert len(left) >= 3


def truncate(run):
    file = run / "tokens/c/1/0"
    file.write_bytes(file.read_bytes()[:-1])


def delete(run):
    (run / "prompt_text/c/1").unlink()


def flip(run):
    file = run / "direct_effect/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)


def flip_checksum(run):
    file = run / "direct_effect/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)


def replace(run):
    """Another chunk in its place, intact in itself: only the journal can tell."""
    shutil.copy(run / "resid_post/c/0/0/0", run / "resid_post/c/1/0/0")


def lose_a_row(run):
    connection = sqlite3.connect(StorePaths.of(run).journal)
    with connection:
        connection.execute("DELETE FROM chunks WHERE block = 1 AND array = 'status'")
    connection.close()


@pytest.mark.parametrize("damage", [truncate, delete, flip, flip_checksum, replace, lose_a_row])
def test_a_damaged_block_is_found_and_written_again(sample, run, tree, reference, damage):
    sample.fill(run)
    damage(run)
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        assert writer.missing == [1]
        assert set(writer.damaged) == {1}
        # What remains of it is gone, so that nobody takes it for a result.
        assert not (run / "tokens/c/1/0").exists()
        assert describe_store(run).status["pending"] == 4
        writer.write(1, sample.make_block(spec, 1))
    assert tree(run) == reference
    assert journal_keys(run) == chunk_keys(spec)
    with StoreWriter.open(run, spec) as writer:
        assert writer.missing == []


def test_only_the_last_commits_are_read_again(sample, run, monkeypatch):
    sample.fill(run)
    flip(run)
    monkeypatch.setattr("fastinterp.store.begin.RECENT_BLOCKS", 3)
    with StoreWriter.open(run, sample.make_spec()) as writer:
        assert writer.missing == []
    monkeypatch.setattr("fastinterp.store.begin.RECENT_BLOCKS", 4)
    with StoreWriter.open(run, sample.make_spec()) as writer:
        assert writer.missing == [1]


@pytest.mark.parametrize("key", ["head_label/c/0/0", "tokens/zarr.json", "prompt/c/0"])
def test_damage_to_what_creation_wrote_is_refused(sample, run, key):
    sample.fill(run)
    data = bytearray((run / key).read_bytes())
    data[3] ^= 1
    (run / key).write_bytes(data)
    with pytest.raises(StoreError, match=f"{key} has damaged content"):
        StoreWriter.open(run, sample.make_spec())


def test_leftovers_are_swept_and_strangers_kept(sample, run, tree, reference):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        writer.write(0, sample.make_block(spec, 0))
    leftover = run / "tokens/c/1/0.abc.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    (run / "tokens/c/1/0").write_bytes(b"torn chunk of a block that was not committed")
    (run / "notes.txt").write_text("mine")
    with StoreWriter.open(run, spec) as writer:
        assert not leftover.exists()
        assert not (run / "tokens/c/1/0").exists()
        for block in writer.missing:
            writer.write(block, sample.make_block(spec, block))
    assert (run / "notes.txt").read_text() == "mine"
    (run / "notes.txt").unlink()
    assert tree(run) == reference


def test_another_specification_is_refused_field_by_field(sample, run, tree):
    sample.fill(run)
    before = tree(run)
    spec = sample.make_spec(
        identity={
            "model": {"name": "tiny", "weights_sha256": "xyz"},
            "analyses": ["direct_effect"],
            "seed": 3,
        },
        block_size=6,
        coords=(CoordSpec(name="layer", dims=("layer",), values=[0, 5]), *sample.make_spec().coords[1:]),
    )
    with pytest.raises(StoreMismatchError) as caught:
        StoreWriter.open(run, spec)
    assert str(caught.value).splitlines()[1:-1] == [
        'model.weights_sha256: store has "abc", this run has "xyz"',
        "seed: store has no such field, this run has 3",
        "block_size: store has 4, this run has 6",
        "coords.layer.values: store has [0, 1], this run has [0, 5]",
    ]
    assert tree(run) == before
    # Attributes may differ; those of the first run stay. The refusal gave the lock back.
    with StoreWriter.open(run, sample.make_spec(attrs={"created": "later"})) as writer:
        assert writer.resumed
        assert writer.missing == []
    assert describe_store(run).attrs["created"] == "2025-01-01"


def test_long_values_that_begin_alike_are_shown_to_differ(sample, run):
    StoreWriter.open(run, sample.make_spec(identity={"ids": [0] * 500 + [1]})).close()
    with pytest.raises(StoreMismatchError) as caught:
        StoreWriter.open(run, sample.make_spec(identity={"ids": [0] * 500 + [2]}))
    (line,) = str(caught.value).splitlines()[1:-1]
    assert len(line) < 400
    store, this_run = line.removeprefix("ids: store has ").split(", this run has ")
    assert store != this_run


def test_blocks_may_come_in_any_order(sample, run, tree, reference):
    spec = sample.make_spec()
    for blocks in ([4, 2], [0, 3], [1]):
        with StoreWriter.open(run, spec) as writer:
            for block in blocks:
                writer.write(block, sample.make_block(spec, block))
    assert tree(run) == reference


@pytest.mark.parametrize("part", ["side", "journal", "run_json"])
def test_a_zarr_that_lost_its_side_folder_is_refused(sample, run, part):
    sample.fill(run)
    lost = getattr(StorePaths.of(run), part)
    lost.rename(run.parent / "elsewhere")
    with pytest.raises(StoreError, match=rf"has no {lost.relative_to(run.parent)}, so nobody .*move run.zarr.d back"):
        StoreWriter.open(run, sample.make_spec())
    assert StorePaths.of(run).side.exists() == (part != "side")
    with pytest.raises(StoreError, match="nobody can tell which"):
        describe_store(run)


def test_a_side_folder_that_lost_its_zarr_is_refused(sample, run):
    sample.fill(run)
    run.rename(run.parent / "moved.zarr")
    with pytest.raises(StoreError, match=r"records 5 committed blocks, but .*run.zarr is gone"):
        StoreWriter.open(run, sample.make_spec())
    (run.parent / "moved.zarr").rename(run)
    with StoreWriter.open(run, sample.make_spec()) as writer:
        assert writer.missing == []


@pytest.mark.parametrize("part", ["journal", "run_json"])
def test_a_damaged_part_of_the_side_folder_is_named(sample, run, part):
    sample.fill(run)
    damaged = getattr(StorePaths.of(run), part)
    damaged.write_bytes(b"garbage" * 200)
    with pytest.raises(StoreError, match=damaged.name):
        StoreWriter.open(run, sample.make_spec())
    with pytest.raises(StoreError, match=damaged.name):
        describe_store(run)


def test_a_commit_is_all_or_nothing(sample, run):
    sample.fill(run)
    journal = Journal.open(StorePaths.of(run).journal)
    before = journal.chunks()
    journal.forget([3])
    rows = [row for row in before if row.block == 3]
    block = journal.blocks()[0]
    with pytest.raises(StoreError, match="UNIQUE constraint"):
        # The block row of a block that is committed: the chunk rows before it must not stay.
        journal.commit(block, rows)
    assert journal.chunks() == [row for row in before if row.block != 3]
    journal.close()
