import math

import numpy as np
import pytest

from fastinterp.errors import OptionError, StoreError
from fastinterp.store import ArraySpec, CoordSpec, StoreSpec, choose_block_size, status_array

MB = 1 << 20


def array(name="effect", dims=("prompt", "layer"), shape=(10, 3), dtype="float32", attrs=None, kind="result"):
    return ArraySpec(name=name, dims=dims, shape=shape, dtype=dtype, attrs=attrs or {}, kind=kind)


def store(arrays, coords=(), n_prompts=10, block_size=4, **fields):
    return StoreSpec(
        n_prompts=n_prompts,
        block_size=block_size,
        arrays=arrays,
        coords=coords,
        **{"attrs": {}, "identity": {}, **fields},
    )


def test_blocks_cover_the_prompts_once():
    spec = store([array()])
    assert spec.n_blocks == 3
    assert [i for block in range(3) for i in spec.prompts_of(block)] == list(range(10))
    with pytest.raises(StoreError, match=r"block 3 is out of range: the store has 3 \(0 to 2\)"):
        spec.prompts_of(3)


@pytest.mark.parametrize("name", ["resid_post.5", "", "5x", "a/b", "größe", "__x", "a b"])
def test_names_that_are_refused(name):
    with pytest.raises(StoreError, match="is not allowed"):
        array(name=name)
    with pytest.raises(StoreError, match="is not allowed"):
        CoordSpec(name=name, dims=("layer",), values=[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": ("layer", "prompt")}, "first must be 'prompt'"),
        ({"dims": ("prompt", "prompt")}, "only once|each only once"),
        ({"shape": (10,)}, "expected 2 sizes"),
        ({"shape": (10, 0)}, "at least 1"),
        ({"attrs": {"coordinates": "x"}}, "reserved"),
        ({"attrs": {"units": "seconds"}}, "time deltas"),
        ({"attrs": {"n": np.float32(1)}}, "JSON"),
    ],
)
def test_arrays_that_are_refused(change, message):
    with pytest.raises(StoreError, match=message):
        array(**change)


def test_unknown_modes_are_refused():
    with pytest.raises(OptionError, match="did you mean 'float32'"):
        _unchecked(ArraySpec, dtype="float3")
    with pytest.raises(OptionError, match="choose from 'none', 'zstd'"):
        _unchecked(StoreSpec, compress="gzip")


def _unchecked(kind, **bad):
    """Runs the validation of a dataclass on a wrong literal, which the type checker would refuse before."""
    made = object.__new__(kind)
    good = array() if kind is ArraySpec else store([array()])
    for name, value in {**vars(good), **bad}.items():
        object.__setattr__(made, name, value)
    kind.__post_init__(made)


@pytest.mark.parametrize(
    ("values", "dims"),
    [
        ([1.5], ("layer",)),
        ([1, 2], ("layer", "head")),
        ([], ("layer",)),
        ([1], ()),
        ([1], ("prompt",)),
        ([True], ("x",)),
    ],
)
def test_coordinates_that_are_refused(values, dims):
    with pytest.raises(StoreError, match="coordinate 'layer'"):
        CoordSpec(name="layer", dims=dims, values=values)


def test_stores_that_are_refused():
    with pytest.raises(StoreError, match="more than once in the store: effect"):
        store([array(), array()])
    with pytest.raises(StoreError, match="more than once in the store: prompt"):
        store([array(name="prompt")])
    with pytest.raises(StoreError, match="'effect' has 9 along 'prompt', elsewhere it is 10"):
        store([array(shape=(9, 3))])
    with pytest.raises(StoreError, match="'layer' has 2 along 'layer', elsewhere it is 3"):
        store([array()], [CoordSpec(name="layer", dims=("layer",), values=[0, 1])])
    with pytest.raises(StoreError, match="'layer' is the name of a dimension"):
        store([array(), array(name="layer", dims=("prompt",), shape=(10,))])
    with pytest.raises(StoreError, match="block_size=11 for 10 prompts"):
        store([array()], block_size=11)
    with pytest.raises(StoreError, match="block_size=0"):
        store([array()], block_size=0)
    with pytest.raises(StoreError, match="written by the store itself"):
        store([array()], attrs={"spec_hash": "x"})
    with pytest.raises(StoreError, match="identity cannot be written as JSON"):
        store([array()], identity={"x": math.nan})
    with pytest.raises(StoreError, match="at least one array"):
        store([])


def test_hash_changes_with_identity_and_layout_but_not_with_attributes():
    spec = store([array()], identity={"a": 1})
    assert spec.spec_hash == store([array()], identity={"a": 1}, attrs={"host": "x"}).spec_hash
    others = [
        store([array()], identity={"a": 2}),
        store([array()], identity={"a": 1}, block_size=5),
        store([array()], identity={"a": 1}, compress="zstd"),
        store([array(dtype="float16")], identity={"a": 1}),
        store([array(attrs={"units": "nats"})], identity={"a": 1}),
        store([array()], [CoordSpec(name="layer", dims=("layer",), values=[0, 1, 3])], identity={"a": 1}),
    ]
    assert len({spec.spec_hash, *(other.spec_hash for other in others)}) == 7


def test_json_round_trip(sample):
    spec = sample.make_spec()
    again = StoreSpec.from_json(spec.to_json(), spec.attrs)
    assert again.spec_hash == spec.spec_hash
    assert again.arrays == list(spec.arrays)


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((64, 12, 1024, 768), 64),
        ((8, 1024, 4096), 8),
        ((1, 32, 2048, 2304), 1),
        ((64, 100, 7000), 64),
        ((3, 5, 9), 3),
    ],
)
def test_activation_chunks_are_between_4_and_16_megabytes(shape, block_size):
    acts = array(dims=("prompt", "layer", "pos", "d_model")[: len(shape)], shape=shape, kind="activation")
    spec = store([acts], n_prompts=shape[0], block_size=block_size)
    chunk = spec.chunk_shape(acts)
    nbytes = math.prod(chunk) * 4
    assert nbytes <= 16 * MB
    assert nbytes >= 4 * MB or chunk == shape
    assert chunk[0] == block_size
    counts = math.prod(-(-size // step) for size, step in zip(shape[1:], chunk[1:], strict=True))
    assert len(set(spec.chunk_keys(acts, 0))) == counts


def test_result_chunks_have_whole_axes():
    wide = array(shape=(10, 5_000_000))
    assert store([wide]).chunk_shape(wide) == (4, 5_000_000)
    assert list(store([wide]).chunk_keys(wide, 2)) == ["c/2/0"]


def test_planned_bytes_equal_the_chunks_on_disk():
    spec = store([array(), status_array(10)])
    # 3 blocks of 4 x 3 floats and of 4 bytes, a checksum each; 10 prompt numbers.
    assert spec.nbytes() == 3 * (4 * 3 * 4 + 4) + 3 * (4 + 4) + 80


def test_block_size_rule():
    assert choose_block_size(10_000, 12 * 12 * 4, sweep=False) == 512
    assert choose_block_size(10_000, 12 * 12 * 4, sweep=True) == 64
    assert choose_block_size(10_000, 1 * MB, sweep=False) == 4
    assert choose_block_size(10_000, 100 * MB, sweep=False) == 1
    assert choose_block_size(7, 4, sweep=False) == 7
    for n_prompts in range(16, 300):
        for sweep in (False, True):
            size = choose_block_size(n_prompts, 600, sweep=sweep)
            assert 1 <= size <= (64 if sweep else 512)
            assert -(-n_prompts // size) >= 4
    with pytest.raises(StoreError, match="n_prompts=0"):
        choose_block_size(0, 4, sweep=False)
