import json
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from fastinterp.errors import StoreError
from fastinterp.store import ArraySpec, CoordSpec, StoreWriter, describe_store, open_store
from fastinterp.store.paths import StorePaths


def test_xarray_opens_the_store_without_a_warning(sample, run):
    sample.fill(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dataset in (xr.open_zarr(run), open_store(run), open_store(str(run) + "/")):
            spec = sample.make_spec()
            assert dataset.direct_effect.dims == ("prompt", "layer", "head")
            assert set(dataset.data_vars) == {"direct_effect", "resid_post", "tokens", "status"}
            assert set(dataset.coords) == {
                "prompt",
                "layer",
                "head",
                "head_label",
                "prompt_text",
                "prompt_id",
            }
            assert set(dataset.indexes) == {"prompt", "layer", "head"}
            assert dataset.head_label.values.tolist() == spec.coords[2].values
            assert str(dataset.direct_effect.sel(layer=1, head=2).head_label.values) == "L1H2"
            assert set(dataset.direct_effect.coords) == set(dataset.coords)
            assert set(dataset.tokens.coords) == {"prompt", "prompt_text", "prompt_id"}
            assert dataset.attrs["model"] == "tiny"
            assert dataset.attrs["spec_hash"] == spec.spec_hash
            assert json.loads(dataset.attrs["spec"]) == spec.to_json()
            assert dataset.direct_effect.attrs["units"] == "logits"
            assert "coordinates" not in dataset.attrs
            assert "coordinates" not in dataset.direct_effect.attrs
            assert dataset.direct_effect.chunks == ((4, 4, 4, 4, 2), (2,), (3,))
            assert dataset.status.chunks == ((4, 4, 4, 4, 2),)
            for name in ("direct_effect", "resid_post", "tokens", "prompt_text", "prompt_id", "status"):
                written = [sample.make_block(spec, block)[name] for block in range(spec.n_blocks)]
                expected = np.concatenate(written)
                if expected.dtype == object:
                    assert dataset[name].values.tolist() == expected.tolist()
                else:
                    assert dataset[name].dtype == expected.dtype
                    assert dataset[name].values.tobytes() == expected.tobytes()
            table = dataset[["direct_effect", "status"]].to_dataframe()
            assert isinstance(table, pd.DataFrame)
            assert len(table) == 18 * 2 * 3
            assert table.loc[(17, 1, 2), "head_label"] == "L1H2"
            assert table.loc[(17, 1, 2), "prompt_text"] == "prompt 1 + größer"


def test_every_file_in_the_zarr_is_metadata_or_a_chunk(sample, run):
    sample.fill(run)
    spec = sample.make_spec()
    expected = {f"{a.name}/{key}" for a in spec.arrays for b in range(5) for key in spec.chunk_keys(a, b)}
    expected |= {"zarr.json", "prompt/c/0", "layer/c/0", "head/c/0", "head_label/c/0/0"}
    expected |= {f"{name}/zarr.json" for name in ("prompt", "layer", "head", "head_label")}
    expected |= {f"{a.name}/zarr.json" for a in spec.arrays}
    assert {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()} == expected
    assert {entry.name for entry in run.parent.iterdir()} == {"run.zarr", "run.zarr.d"}
    side = {entry.name for entry in StorePaths.of(run).side.iterdir()}
    assert side == {"LOCK", "journal.sqlite", "run.json", "logs"}


def test_blocks_of_nothing_but_fill_are_files(sample, run):
    """Block 1 is all NaN, -1 and empty text, which zarr leaves out unless told; block 2 is all zero."""
    sample.fill(run)
    for block in (1, 2):
        assert (run / f"direct_effect/c/{block}/0/0").stat().st_size == 4 * 2 * 3 * 4 + 4
        assert (run / f"tokens/c/{block}/0").stat().st_size == 4 * 5 * 4 + 4
    assert (run / "prompt_text/c/1").is_file()


def test_layout_of_the_metadata(sample, run):
    sample.fill(run)
    group = zarr.open_group(run, mode="r")
    assert group.metadata.consolidated_metadata is not None
    for name, array in group.arrays():
        assert array.metadata.dimension_names[0] in {"prompt", "layer", "head"}, name
        assert array.metadata.codecs[-1].to_dict() == {"name": "crc32c"}
        assert len(array.metadata.codecs) == 2
    fills = {"direct_effect": "NaN", "resid_post": "NaN", "tokens": -1, "status": 0, "prompt_text": ""}
    for name, fill in fills.items():
        metadata = json.loads((run / name / "zarr.json").read_text())
        assert metadata["fill_value"] == fill
    assert json.loads((run / "prompt_text/zarr.json").read_text())["data_type"] == "string"
    assert json.loads((run / "head_label/zarr.json").read_text())["data_type"] == "string"
    attributes = json.loads((run / "direct_effect/zarr.json").read_text())["attributes"]
    assert attributes["coordinates"].split() == ["prompt_text", "prompt_id", "head_label"]


def test_a_coordinate_of_no_array_is_still_a_coordinate(sample, run):
    spec = sample.make_spec()
    sites = CoordSpec(name="site_label", dims=("site",), values=["early", "late"])
    spec = sample.make_spec(coords=(*spec.coords, sites))
    StoreWriter.open(run, spec).close()
    assert xr.open_zarr(run).coords["site_label"].values.tolist() == ["early", "late"]


def test_what_is_not_computed_reads_as_fill(sample, run):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        writer.write(3, sample.make_block(spec, 3))
    dataset = xr.open_zarr(run)
    rest = dataset.isel(prompt=[*range(12), 16, 17])
    assert np.isnan(rest.direct_effect.values).all()
    assert (rest.tokens.values == -1).all()
    assert (rest.status.values == 0).all()
    assert set(rest.prompt_text.values.tolist()) == {""}
    assert np.isfinite(dataset.direct_effect.isel(prompt=slice(12, 16)).values).all()


def test_description(sample, run):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec) as writer:
        for block in (0, 1, 4):
            writer.write(block, sample.make_block(spec, block))
    info = describe_store(run)
    assert (info.n_prompts, info.n_blocks, info.block_size) == (18, 5, 4)
    assert info.committed == {0, 1, 4}
    assert not info.complete
    # Blocks 0, 1 and 4 are ok, failed and failed; the last one has two prompts.
    assert info.status == {"pending": 8, "ok": 4, "failed": 6, "rejected": 0}
    by_name = {array.name: array for array in info.arrays}
    assert by_name["direct_effect"].dims == ("prompt", "layer", "head")
    for array in info.arrays:
        files = (run / array.name / "c").rglob("*")
        assert array.nbytes == sum(file.stat().st_size for file in files if file.is_file()) > 0
    assert info.identity == spec.identity
    assert info.attrs == spec.attrs
    sample.fill(run)
    assert describe_store(run).complete
    assert describe_store(run).status == {"pending": 0, "ok": 8, "failed": 6, "rejected": 4}


def test_description_while_it_is_written(sample, run):
    spec = sample.make_spec()
    with StoreWriter.open(run, spec):
        assert describe_store(run).status == {"pending": 18, "ok": 0, "failed": 0, "rejected": 0}


def test_zstd_stores_the_same_numbers_in_fewer_bytes(sample, tmp_path):
    n = 8
    array = ArraySpec(name="x", dims=("prompt", "pos"), shape=(n, 5000), dtype="float32", attrs={}, kind="result")
    values = np.repeat(np.arange(n, dtype=np.float32)[:, None], 5000, axis=1)
    sizes = {}
    for compress in ("none", "zstd"):
        path = tmp_path / f"{compress}.zarr"
        spec = sample.make_spec(n_prompts=n, arrays=(array,), coords=(), compress=compress)
        with StoreWriter.open(path, spec) as writer:
            for block in writer.missing:
                rows = spec.prompts_of(block)
                writer.write(block, {"x": values[rows.start : rows.stop]})
        assert xr.open_zarr(path).x.values.tobytes() == values.tobytes()
        sizes[compress] = describe_store(path).arrays[0].nbytes
        with StoreWriter.open(path, spec) as writer:
            assert writer.missing == []
    assert sizes["none"] == values.nbytes + 2 * 4
    assert sizes["zstd"] < sizes["none"] / 10


def test_split_activations_round_trip(sample, run, monkeypatch):
    """A small chunk limit stands for activations of many megabytes: the later axes are split unevenly."""
    monkeypatch.setattr("fastinterp.store.schema.MAX_ACTIVATION_CHUNK", 60)
    sample.fill(run)
    spec = sample.make_spec()
    acts = spec.arrays[1]
    assert spec.chunk_shape(acts) == (4, 1, 7)
    written = np.concatenate([sample.make_block(spec, block)["resid_post"] for block in range(5)])
    assert xr.open_zarr(run).resid_post.values.tobytes() == written.tobytes()
    with StoreWriter.open(run, spec) as writer:
        assert writer.missing == []


@pytest.mark.parametrize("reader", [open_store, describe_store])
def test_paths_that_are_no_store(reader, sample, run, tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*run.zarr.*give the path"):
        reader(run)
    run.mkdir()
    with pytest.raises(StoreError, match=r"is not a fastinterp store \(it has no zarr.json\)"):
        reader(run)
    other = tmp_path / "other.zarr"
    zarr.create_group(other, attributes={"title": "somebody else's"})
    with pytest.raises(StoreError, match="no fastinterp attributes"):
        reader(other)
    later = tmp_path / "later.zarr"
    zarr.create_group(later, attributes={"format_version": 99, "spec_hash": "x"})
    with pytest.raises(StoreError, match="has format 99, this fastinterp reads up to 1: upgrade"):
        reader(later)


def test_a_cut_off_creation_is_named(run):
    StorePaths.of(run).side.mkdir()
    with pytest.raises(StoreError, match="creation was cut off"):
        open_store(run)
