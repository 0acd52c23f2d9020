"""The example of ablations in scans: its figures are those of ``ablate``, and a second run computes nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastinterp

PATH = Path(__file__).resolve().parents[2] / "examples" / "copy_suppression.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_copy_suppression_scans", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
def test_the_default_model_is_smollm2(example, smollm2_gguf):
    assert example.smollm2() == str(smollm2_gguf)


def test_the_figures(example, zoo, tmp_path, capsys, monkeypatch):
    model, heads = zoo.model("gpt2"), [(1, 2), (2, 0)]
    figures = example.main(model, tmp_path, heads)
    prompts = fastinterp.PromptSet.of([list(ids)[: example.N_TOKENS] for ids in model.encode(example.TEXTS)])
    options = dict(metric="loss", mode=("zero", "mean"), effect="both", reference=prompts)
    chosen = fastinterp.ablate(model, prompts, units=heads, **options)
    everything = fastinterp.ablate(model, prompts.head(2), **options)
    for kind in example.KINDS:
        np.testing.assert_allclose(figures["chosen"][kind].values, chosen[kind].values, atol=1e-5)
        np.testing.assert_allclose(figures["all"][kind].values, everything[kind].values, atol=1e-5)
        mean = everything[kind].mean("pos").mean("prompt")
        top = figures[f"top {kind}"].positive
        assert top["mean"][0] == pytest.approx(float(mean.max()), abs=1e-5)
    effect = chosen["loss_mean_direct"].sel(unit="L1H2").values
    value, before, token = figures["L1H2 useful"][0]
    assert value == pytest.approx(float(np.nanmax(effect)), abs=1e-5)
    prompt, pos = np.unravel_index(np.nanargmax(effect), effect.shape)
    strings = model.token_strings(prompts.prompts[prompt])
    assert token == strings[pos + 1]
    assert before == "".join(strings[max(0, pos - 7) : pos + 1])
    printed = capsys.readouterr().out
    assert "L1H2: loss increase without it: zero, total " in printed
    assert figures["page"].read_text().count("data-array=") == 4
    # A second run finds everything.
    monkeypatch.setattr("fastinterp.engine.run.compute_block", None)
    example.main(model, tmp_path, heads)
    assert capsys.readouterr().out == printed
