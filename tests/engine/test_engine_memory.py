"""``memory_bytes`` of scans: it limits what is allocated, and changes neither numbers nor what a store is."""

import json
import re

import numpy as np
import pytest

import fastinterp
from fastinterp.engine.options import AblationOptions
from fastinterp.errors import OptionError
from tests.analyses.test_memory_budget import Allocated
from tests.engine.test_engine_ablation_options import REFERENCE, paired

OPTIONS = {
    "mean": dict(analysis="ablation_mean", metric="loss,logit_diff", effect="both", reference=REFERENCE),
    "resample": dict(analysis="ablation_resample", units="layers"),
}


def least(model, prompts, options):
    with pytest.raises(OptionError, match="memory_bytes=1 is not enough for one prompt of") as refused:
        fastinterp.plan(model, prompts, memory_bytes=1, **options)
    return int(re.search(r"it needs about (\d+)", str(refused.value))[1])


@pytest.mark.parametrize("case", OPTIONS)
def test_a_scan_stays_under_its_memory_and_gives_the_same_numbers(zoo, tmp_path, case):
    model, prompts, options = zoo.model("llama-gqa"), paired(), OPTIONS[case]
    expected = fastinterp.scan(model, prompts, tmp_path / "free.zarr", **options)
    fewest = least(model, prompts, options)
    planned = fastinterp.plan(model, prompts, memory_bytes=2 * fewest, **options).to_dict()
    estimates = [each["peak_bytes"] for each in planned["analyses"].values()]
    with Allocated(model) as seen:
        found = fastinterp.scan(model, prompts, tmp_path / "run.zarr", memory_bytes=2 * fewest, **options)
    assert seen.peak <= max(estimates) <= 2 * fewest
    assert set(found.data_vars) == set(expected.data_vars)
    for name, array in expected.data_vars.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name].values, array.values, rtol=1e-5, atol=1e-5)


def test_a_plan_without_a_limit_shows_no_estimate(zoo):
    planned = fastinterp.plan(zoo.model("gpt2"), paired(), analysis="ablation").to_dict()
    assert set(planned["analyses"]["ablation"]) == {"prompts", "batch_tokens"}


def test_the_limit_of_a_run_is_not_part_of_its_store(zoo, out):
    model, prompts = zoo.model("gpt2"), paired()
    fastinterp.scan(model, prompts, out, analysis="ablation", memory_bytes="4MB")
    found = fastinterp.scan(model, prompts, out, analysis="ablation", memory_bytes="1GiB")
    assert "memory_bytes" not in json.dumps(found.attrs["options"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("512b", 512),
        ("2GB", 2 * 10**9),
        ("2 GiB", 2 * 2**30),
        ("1.5k", 1500),
        ("64MiB", 64 * 2**20),
        ("3m", 3_000_000),
        ("1TB", 10**12),
        (12345, 12345),
    ],
)
def test_bytes_as_text(text, expected):
    found = AblationOptions(memory_bytes=text).arguments(frozenset({"memory_bytes"}))
    assert found == {"memory_bytes": expected}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("given", ["", "GB", "-2GB", "2XB", "2e9", "0", 0, -1, 1.5, True])
def test_what_is_no_number_of_bytes(zoo, given):
    with pytest.raises(OptionError, match=r"memory_bytes=.*: give a (positive )?number of bytes, such as"):
        fastinterp.plan(zoo.model("gpt2"), paired(), analysis="ablation", memory_bytes=given)
