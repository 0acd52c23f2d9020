"""Analyses by name."""

import pytest

from fastinterp.engine import CATALOGUE, choose_analyses
from fastinterp.errors import MetricError, OptionError


def test_names_as_text_or_list_give_the_same_analyses_in_order():
    chosen = choose_analyses(" ablation, dla", "logit")
    assert list(chosen) == ["ablation", "dla"]
    assert chosen == choose_analyses(["ablation", "dla"], "logit")
    assert {analysis.metric.name for analysis in chosen.values()} == {"logit"}


def test_every_analysis_describes_the_arrays_that_it_makes(zoo):
    spec = zoo.model("gpt2").spec
    for name, entry in CATALOGUE.items():
        for field in entry.make("logit_diff").fields(spec, 7):
            described = entry.description.replace("<metric>", "logit_diff")
            assert field.name in described, name
            assert ", ".join(("prompt", *field.dims)) in described, name
            assert {"units", "long_name", "metric", "sign"} <= set(field.attrs)


def test_only_total_effects_are_sweeps():
    sweeps = [name for name, entry in CATALOGUE.items() if entry.sweep]
    assert sweeps == ["ablation", "ablation_mean", "ablation_resample"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("dal", "there is no analysis 'dal'.*did you mean 'dla'"),
        ("dla,ablatoin", "there is no analysis 'ablatoin'.*did you mean 'ablation'"),
        ("dla,", "there is no analysis ''"),
        ("", "there is no analysis ''"),
        ("dla,lens,dla", "'dla' is given twice"),
        ([], "no analysis was given: choose from dla"),
    ],
)
def test_names_that_there_are_not_are_refused(names, message):
    with pytest.raises(OptionError, match=message):
        choose_analyses(names, "logit_diff")


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("dla", "logit_dif", "no metric 'logit_dif'.*did you mean 'logit_diff'"),
        ("ablation", "los", "no metric 'los'.*did you mean 'loss'"),
        ("dla_neuron", "logprob", "linear in the residual stream.*not 'logprob'"),
        ("lens,dla", "loss", "linear in the residual stream.*not 'loss'"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(name, metric, message):
    with pytest.raises(MetricError, match=message):
        choose_analyses(name, metric)
