"""Analyses and scans given a HookedTransformer, plain lists, or what they cannot take."""

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp import HookedTransformer, PromptSet
from fastinterp.errors import AnswerTokenError, InputTypeError, OptionError, PromptError

PROMPTS = ["John gave the bag to", "Then Alice and Bob had a long argument"]


@pytest.fixture
def hooked(zoo):
    return HookedTransformer(zoo.model("gpt2"))


@pytest.fixture
def answered():
    return PromptSet.of(PROMPTS, answer=[" Mary", " Alice"], wrong=[" John", " Bob"])


ANALYSES = [
    fastinterp.ablate,
    fastinterp.direct_effect,
    fastinterp.direct_logit_attribution,
    fastinterp.head_logits,
    fastinterp.logit_lens,
]


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis.__name__)
def test_a_hooked_transformer_stands_for_its_model(hooked, answered, analysis):
    xr.testing.assert_identical(analysis(hooked, answered), analysis(hooked.model, prompts=answered))


def test_weights_of_a_hooked_transformer(hooked):
    ours = fastinterp.weight_logits(hooked, "ov", 3, heads=[(1, 2)], tokens=[5])
    xr.testing.assert_identical(
        ours, fastinterp.weight_logits(model=hooked.model, source="ov", k=3, heads=[(1, 2)], tokens=[5])
    )


def test_its_default_for_bos_counts(hooked):
    never = HookedTransformer(hooked.model, default_prepend_bos=False)
    with_bos, without = (fastinterp.ablate(model, PROMPTS, metric="loss")["loss_clean"] for model in (hooked, never))
    assert with_bos.sizes["pos"] == without.sizes["pos"] + 1
    assert hooked.model.spec.default_prepend_bos
    with torch.no_grad():
        loss = float(never(PROMPTS[0], return_type="loss"))
    assert float(np.nanmean(without[0])) == pytest.approx(loss, abs=1e-5)


def test_hooks_are_not_passed_over(hooked, answered):
    with (
        hooked.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 0)]),
        pytest.raises(OptionError, match=r"blocks\.1\.attn\.hook_z.*model\.reset_hooks\(\), or give model\.model"),
    ):
        fastinterp.ablate(hooked, answered)
    fastinterp.ablate(hooked, answered)


def test_lists_of_prompts(hooked):
    expected = fastinterp.ablate(hooked, PromptSet.of(PROMPTS), metric="loss")
    xr.testing.assert_identical(fastinterp.ablate(hooked, PROMPTS, metric="loss"), expected)
    xr.testing.assert_identical(fastinterp.ablate(hooked, tuple(PROMPTS), metric="loss"), expected)
    ids = [[5, 6, 7], [8, 9]]
    expected = fastinterp.direct_effect(hooked, PromptSet.of(ids), mode="mean", reference=PromptSet.of(PROMPTS))
    xr.testing.assert_identical(fastinterp.direct_effect(hooked, ids, mode="mean", reference=PROMPTS), expected)
    with pytest.raises(AnswerTokenError, match=r"PromptSet\.of\(answer="):
        fastinterp.ablate(hooked, PROMPTS)


def test_scans(hooked, tmp_path):
    stored = fastinterp.scan(hooked, PROMPTS, tmp_path / "run.zarr", analysis="ablation", metric="loss", progress=False)
    direct = fastinterp.ablate(hooked, PROMPTS, metric="loss")["loss_zero_total"]
    np.testing.assert_allclose(stored["loss_zero_total"].values, direct.values, atol=1e-5)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    assert fastinterp.plan(hooked, str(path), metric="loss", analysis="ablation").store.n_prompts == 2


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("gpt2", r"fastinterp\.load\('gpt2'\)"),
        (torch.nn.Linear(2, 2), r"a HookedTransformer"),
        (None, r"fastinterp\.load"),
    ],
)
def test_other_models(answered, given, hint):
    for analysis in (*ANALYSES, fastinterp.plan):
        with pytest.raises(InputTypeError, match=f"model is a {type(given).__name__}.*{hint}"):
            analysis(given, answered)
    with pytest.raises(TypeError, match=hint):
        fastinterp.weight_logits(given, "ov")


def test_a_hugging_face_model(zoo, answered):
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel.*give fastinterp\.load\(model\)"):
        fastinterp.ablate(zoo.hf("gpt2"), answered)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("John gave the bag to", r"PromptSet\.of\(\[\.\.\.\]\).*PromptSet\.read\('John gave"),
        (torch.tensor([[1, 2]]), r"PromptSet\.of\(prompts\.tolist\(\)\)"),
        ([{"prompt": "a", "answer": "b"}], r"PromptSet\.of\(\[row\['prompt'\]"),
        ([], r"PromptSet\.read"),
        ([1, 2], r"PromptSet\.of"),
        (None, r"PromptSet\.of"),
    ],
)
def test_other_prompts(hooked, given, hint):
    with pytest.raises(InputTypeError, match=f"prompts is a .*{hint}"):
        fastinterp.ablate(hooked, given)


def test_calls_that_lack_an_argument(hooked):
    with pytest.raises(TypeError, match="'prompts'"):
        fastinterp.ablate(hooked)
    with pytest.raises(PromptError, match="no prompt file"):
        fastinterp.plan(hooked, "nowhere.jsonl")
