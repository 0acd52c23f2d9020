"""Activations on disk: what comes back, what xarray sees, and what is never lost or overwritten by mistake."""

import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp.store.activations as stored
from fastinterp.errors import StoreError
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.model import Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS
from fastinterp.store.activations import StoredActivation, read_activations, write_activations

TOKENS = torch.randint(1, 379, (3, 7), generator=torch.Generator().manual_seed(2))


def cache_of(model, also=("result",), tokens=TOKENS):
    names = [name for name in ACTIVATIONS if missing_because(model.spec, name) is None]
    names = [name for name in names if not name.endswith(("_in", "_input", "result")) or name in also]
    taps = Taps.of(model.spec.n_layers, capture=names)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens, taps=taps)
        final_logits(model.spec, model.weights, resid, taps=taps)
    values = {ACTIVATIONS[name].hook.format(layer=layer): value for (name, layer), value in taps.values.items()}
    return ActivationCache(values, model)


@pytest.fixture
def model(zoo):
    return zoo.model("llama-gqa")


@pytest.fixture
def cache(model):
    return cache_of(model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.zarr"


def assert_same(back, cache):
    assert list(back) == list(cache)
    for name, value in cache.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_was_saved_comes_back(zoo, path, dtype):
    model = zoo.model("llama-gqa", dtype=dtype)
    cache = cache_of(model)
    cache.save(path)
    back = ActivationCache.load(path, model)
    assert_same(back, cache)
    assert back.has_batch_dim
    assert torch.equal(back.stack_head_results(apply_ln=True), cache.stack_head_results(apply_ln=True))
    assert_same(ActivationCache.load(str(path)), cache)


def test_what_was_saved_without_batch_axis_or_at_some_positions(model, path, tmp_path):
    single = cache_of(model, tokens=TOKENS[:1]).remove_batch_dim()
    single.save(path)
    back = ActivationCache.load(path, model)
    assert_same(back, single)
    assert not back.has_batch_dim
    assert torch.equal(back.decompose_resid(), single.decompose_resid())
    some = cache_of(model).at_positions((2, 4))
    some.save(tmp_path / "some.zarr")
    assert_same(ActivationCache.load(tmp_path / "some.zarr"), some)
    with xr.open_zarr(tmp_path / "some.zarr") as data:
        assert dict(data["blocks.0.attn.hook_pattern"].sizes) == {"batch": 3, "head": 6, "query_pos": 2, "key_pos": 7}


def test_any_dtype_and_gradients(cache, model, path):
    extra = {
        "blocks.1.attn.hook_z_grad": -cache["z", 1],
        "mask": torch.ones(3, 7, dtype=torch.bool),
        "tokens": TOKENS,
        "constant": torch.tensor(2.5),
        "empty": torch.ones(3, 0),
        "needs_grad": torch.ones(2, requires_grad=True),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "odd.blocks.0": torch.full((4, 5), torch.nan),
    }
    both = ActivationCache(dict(cache.items()) | extra, model)
    both.save(path)
    back = ActivationCache.load(path, model)
    assert list(back) == list(both)
    for name in extra:
        assert back[name].dtype == both[name].dtype
        assert torch.equal(back[name].nan_to_num(7.0), both[name].detach().nan_to_num(7.0)), name
    assert torch.equal(back["z_grad", 1], -cache["z", 1])


@pytest.mark.parametrize("consolidated", [None, False])
def test_xarray_opens_it_with_named_axes_and_no_warning(cache, model, path, consolidated):
    cache.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(path, consolidated=consolidated) as data:
            assert set(data.data_vars) == set(cache)
            sizes = dict(batch=3, pos=7, head=6, kv_head=2, d_head=8, d_model=48, d_mlp=112, one=1)
            assert dict(data.sizes) == sizes | dict(query_pos=7, key_pos=7)
            for name, value in cache.items():
                assert np.array_equal(data[name].values, value.numpy()), name
            assert data["blocks.1.attn.hook_k"].dims == ("batch", "pos", "kv_head", "d_head")
            assert data["blocks.1.attn.hook_result"].dims == ("batch", "pos", "head", "d_model")
            assert data["ln_final.hook_scale"].dims == ("batch", "pos", "one")
            assert data["blocks.0.mlp.hook_post"].dims == ("batch", "pos", "d_mlp")
            assert data.attrs["family"] == "llama"
            assert data.attrs["processing"] == "transformer_lens"
            assert data.attrs["has_batch_dim"]
            mean = data["blocks.1.attn.hook_pattern"].mean(("batch", "query_pos"))
    assert np.allclose(mean.values, cache["pattern", 1].mean((0, 2)).numpy(), atol=1e-6)


def test_bfloat16_is_float32_to_others(zoo, path):
    model = zoo.model("gpt2", dtype=torch.bfloat16)
    cache = cache_of(model)
    cache.save(path)
    with xr.open_zarr(path) as data:
        array = data["blocks.0.attn.hook_z"]
        assert array.dtype == np.float32
        assert array.attrs["torch_dtype"] == "bfloat16"
        assert np.array_equal(array.values, cache["z", 0].float().numpy())


def test_axes_of_other_sizes_get_names_of_their_own(cache, path):
    shared = dict(cache.items()) | {"hook_pos_embed": torch.zeros(1, 7, 48), "latents": torch.zeros(3, 7, 99)}
    ActivationCache(shared, cache.model).save(path)
    with xr.open_zarr(path) as data:
        assert data["hook_pos_embed"].dims == ("hook_pos_embed.axis_0", "pos", "d_model")
        assert data["latents"].dims == ("batch", "pos", "latents.axis_2")


def test_nothing_is_overwritten_unless_asked(cache, model, path, tmp_path):
    cache.save(path)
    other = ActivationCache({"hook_embed": torch.ones(1, 2, 48)}, model)
    with pytest.raises(StoreError, match="overwrite=True"):
        other.save(path)
    assert_same(ActivationCache.load(path), cache)
    other.save(path, overwrite=True)
    assert_same(ActivationCache.load(path), other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.zarr"]
    other.save(tmp_path / "new.zarr", overwrite=True)
    assert_same(ActivationCache.load(tmp_path / "new.zarr"), other)


def test_only_activations_are_replaced(cache, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("important")
    scan = tmp_path / "scan.zarr"
    xr.Dataset({"effect": ("prompt", np.ones(3))}).to_zarr(scan, zarr_format=3, consolidated=False)
    file = tmp_path / "file"
    file.write_text("important")
    for target in (thesis, scan, file):
        with pytest.raises(StoreError, match="holds no activations"):
            cache.save(target, overwrite=True)
    assert (thesis / "chapter.txt").read_text() == file.read_text() == "important"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "scan.zarr", "thesis"]


def test_a_write_that_fails_leaves_what_was_there(cache, path, tmp_path):
    cache.save(path)

    def arrays():
        yield StoredActivation(name="hook_embed", dims=("pos",), values=np.ones(3), torch_dtype="float64")
        assert len(list(tmp_path.iterdir())) == 2  # the new one has another name until it is complete
        raise KeyboardInterrupt

    for target in (path, tmp_path / "new.zarr"):
        with pytest.raises(KeyboardInterrupt):
            write_activations(target, arrays(), {}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.zarr"]
    assert_same(ActivationCache.load(path), cache)


def test_a_rename_that_fails_brings_back_what_was_there(cache, path, tmp_path, monkeypatch):
    cache.save(path)
    rename = stored.Path.rename

    def fails(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no more space")
        return rename(self, target)

    monkeypatch.setattr(stored.Path, "rename", fails)
    with pytest.raises(OSError, match="no more space"):
        cache.save(path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.zarr"]
    assert_same(ActivationCache.load(path), cache)


def test_tensors_are_taken_one_after_the_other(path):
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def arrays():
        nonlocal alive, most
        for index in range(5):
            values = np.ones((4, 8), dtype=np.float32).view(Counted)
            alive += 1
            most = max(most, alive)
            array = StoredActivation(name=f"a{index}", dims=("pos", "d"), values=values, torch_dtype="float32")
            del values
            yield array
            del array

    write_activations(path, arrays(), {})
    assert most <= 2
    assert len(list(read_activations(path)[1])) == 5


def test_large_arrays_are_in_chunks(path, monkeypatch):
    monkeypatch.setattr(stored, "MAX_ACTIVATION_CHUNK", 4 * 40)
    values = np.arange(70, dtype=np.float32).reshape(7, 10)
    one = StoredActivation(name="a", dims=("batch", "d"), values=values, torch_dtype="float32")
    write_activations(path, [one], {})
    with xr.open_zarr(path) as data:
        assert data["a"].chunks == ((4, 3), (10,))
    assert np.array_equal(next(read_activations(path)[1]).values, values)


@pytest.mark.parametrize("name", ["", "a/b", "..", "__group"])
def test_names_that_zarr_cannot_have(name, path, tmp_path):
    bad = StoredActivation(name=name, dims=("pos",), values=np.ones(3), torch_dtype="float64")
    with pytest.raises(StoreError, match="cannot be written"):
        write_activations(path, [bad], {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read(cache, path, tmp_path):
    with pytest.raises(StoreError, match="there are no activations"):
        ActivationCache.load(path)
    with pytest.raises(StoreError, match="is no folder"):
        cache.save(tmp_path / "missing" / "cache.zarr")
    path.mkdir()
    with pytest.raises(StoreError, match="holds no activations"):
        ActivationCache.load(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="holds no activations"):
        ActivationCache.load(path)
    newer = tmp_path / "newer.zarr"
    cache.save(newer)
    metadata = newer / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"fastinterp_activations": 1', '"fastinterp_activations": 99'))
    with pytest.raises(StoreError, match="upgrade"):
        ActivationCache.load(newer)
