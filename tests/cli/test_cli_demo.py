"""``fastinterp demo`` on SmolLM2-135M: the heads that are known come out on top."""

import pytest
import xarray as xr

from fastinterp.store import describe_store


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_finds_the_heads_that_move_the_name(cli, tmp_path):
    folder = tmp_path / "demo"
    result = cli("demo", "--out", folder, "-n", 12, "--ablation-limit", 2)
    assert result.code == 0, result.err
    assert {path.name for path in folder.iterdir()} == {"prompts.jsonl", "ioi.zarr", "ioi.zarr.d", "ioi.html"}
    assert describe_store(folder / "ioi.zarr").complete
    assert (folder / "ioi.html").stat().st_size > 10_000
    assert str(folder / "ioi.zarr") in result.out

    dataset = xr.open_zarr(folder / "ioi.zarr")
    mean = dataset.direct_effect.mean("prompt").stack(unit=("layer", "head"))
    strongest = [f"L{layer}H{head}" for layer, head in mean.sortby(mean, ascending=False).unit.values[:3]]
    assert strongest[0] == "L23H3"
    assert "L29H1" in strongest
    lines = [line.split() for line in result.out.splitlines()]
    first = next(n for n, line in enumerate(lines) if "L23H3" in line)
    assert "most positive" in " ".join(lines[first - 2] + lines[first - 1])
    assert int(dataset.logit_diff_zero_total.notnull().all(("layer", "head")).sum()) == 2
    assert float(dataset.logit_diff_clean[:2].mean()) > 1
