"""Scans whose sweeps multiply in reduced precision: as ``ablate`` does, kept with the store, refused where unfit."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import OptionError, StoreMismatchError
from tests.engine.test_engine_ablation_options import paired


@pytest.fixture(scope="module")
def model(zoo):
    return zoo.model("gpt2")


@pytest.mark.parametrize("precision", ["exact", "delta", "bf16"])
def test_a_scan_multiplies_as_ablate_does(model, tmp_path, precision):
    found = fastinterp.scan(
        model, paired(), tmp_path / "run.zarr", analysis="ablation", precision=precision, batch_tokens=64
    )
    expected = fastinterp.ablate(model, paired(), precision=precision)
    rounding = {"exact": 1e-5, "delta": 1e-4, "bf16": 2e-2}[precision]
    np.testing.assert_allclose(found["logit_diff_zero_total"], expected["logit_diff_zero_total"], rtol=0, atol=rounding)
    assert found["logit_diff_zero_total"].attrs["precision"] == precision
    exact = fastinterp.ablate(model, paired())["logit_diff_zero_total"]
    difference = float(abs(found["logit_diff_zero_total"] - exact).max())
    assert difference < 1e-5 if precision == "exact" else difference > 1e-5


def test_a_scan_goes_on_in_its_own_precision_only(model, tmp_path):
    fastinterp.scan(model, paired(), tmp_path / "run.zarr", analysis="ablation", precision="delta")
    for other in ("tf32", "exact"):
        with pytest.raises(StoreMismatchError, match="precision"):
            fastinterp.scan(model, paired(), tmp_path / "run.zarr", analysis="ablation", precision=other)
    fastinterp.scan(model, paired(), tmp_path / "run.zarr", analysis="ablation", precision="delta")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("precision='fp8' is not known: choose from 'exact', 'delta'", {"precision": "fp8"}),
        ("precision does not fit the analyses chosen", {"precision": "delta", "analysis": "dla"}),
        ("precision is for total effects", {"precision": "delta", "effect": "direct"}),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, tmp_path, message, options):
    with pytest.raises(OptionError, match=message):
        fastinterp.scan(model, paired(), tmp_path / "run.zarr", **{"analysis": "ablation"} | options)
    assert not list(tmp_path.iterdir())


def test_float64_models_have_no_reduced_precision(model, tmp_path):
    with pytest.raises(OptionError, match="is for float32 models, this one computes in float64"):
        fastinterp.scan(
            model.to(dtype=torch.float64), paired(), tmp_path / "run.zarr", analysis="ablation", precision="delta"
        )
    assert not list(tmp_path.iterdir())
