"""The small tools of ``fastinterp.hooked.utils``, against TransformerLens's and against the definitions."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastinterp import HookedTransformer
from fastinterp.errors import EmptyPromptError, OptionError
from fastinterp.hooked import utils
from fastinterp.model import final_logits, forward
from fastinterp.names import ACTIVATIONS

NAMES = [
    "embed",
    "pos_embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "attn",
    "attn_scores",
    "attn_logits",
    "pattern",
    "q",
    "k",
    "v",
    "query",
    "key",
    "value",
    "z",
    "result",
    "rot_q",
    "rot_k",
    "q_input",
    "attn_in",
    "mlp_in",
    "pre",
    "post",
    "mid",
    "pre_linear",
    "mlp_pre",
    "mlp_post",
    "mlp_mid",
    "scale",
    "normalized",
    "ln",
    "k6",
    "pre5",
    "scale4ln1",
    "normalized27ln2",
    "scale3",
    "attn2",
    "mlp_post3",
    "resid_pre5",
    "q3a",
    "post1m",
    "blocks.3.attn.hook_z",
    "hook_embed",
    "ln_final.hook_scale",
    "anything",
]
LAYERS = [None, 0, 7, "5"]
TYPES = [None, "", "a", "m", "b", "attn", "mlp", "attention", "block", "blocks", "ln1", "ln2", "ln1_post"]


def test_names_are_those_of_transformer_lens():
    from transformer_lens.utilities import get_act_name

    grid = list(itertools.product(NAMES, LAYERS, TYPES))
    assert len(grid) > 2000
    for arguments in grid:
        assert utils.get_act_name(*arguments) == get_act_name(*arguments), arguments


def test_names_lead_to_hook_points():
    for name, site in ACTIVATIONS.items():
        if "scale" in name or "normalized" in name or name.endswith("_raw"):
            continue
        layer = 4 if site.per_layer else None
        assert utils.get_act_name(name, layer) == site.hook.format(layer=layer)
    assert utils.get_act_name("scale") == "ln_final.hook_scale"
    assert utils.get_act_name("normalized", 2, "ln1_post") == ACTIVATIONS["ln1_post_normalized"].hook.format(layer=2)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).view(2, 3),
        torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        np.arange(4),
        np.float32(2.5),
        [1, 2, 3],
        (1.5, 2.5),
        7,
        2.5,
        True,
        "text",
    ],
    ids=str,
)
def test_to_numpy_equals_transformer_lens(value):
    from transformer_lens.utilities import to_numpy

    ours = utils.to_numpy(value)
    assert isinstance(ours, np.ndarray)
    if isinstance(value, np.generic):
        assert ours.dtype == value.dtype
        assert ours == value
        return
    theirs = to_numpy(value)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def test_to_numpy_refuses_what_is_no_array():
    for value in ({"a": 1}, object(), None):
        with pytest.raises(OptionError, match="cannot be made a numpy array"):
            utils.to_numpy(value)


def test_the_device_is_the_one_models_are_loaded_to():
    assert utils.get_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.zeros(1, device=utils.get_device()).device.type == utils.get_device()


@pytest.fixture
def logits():
    return 3 * torch.randn(4, 9, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    """Right and left padding, a hole, and everything."""
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[0, 6:] = mask[1, :3] = mask[2, 4] = 0
    return mask


def test_the_loss_is_the_mean_over_next_tokens(logits, tokens):
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, 8)
    per_token = utils.lm_cross_entropy_loss(logits, tokens, per_token=True)
    assert per_token.shape == (4, 8)
    assert torch.allclose(per_token, expected, atol=1e-12)
    assert abs(float(utils.lm_cross_entropy_loss(logits, tokens)) - float(expected.mean())) < 1e-12


@pytest.mark.parametrize("as_bool", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_masked_losses_equal_transformer_lens(logits, tokens, mask, as_bool, per_token):
    from transformer_lens.utilities import lm_cross_entropy_loss

    given = mask.bool() if as_bool else mask
    ours = utils.lm_cross_entropy_loss(logits, tokens, given, per_token)
    theirs = lm_cross_entropy_loss(logits, tokens, given, per_token)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-12)
    # What is masked out does not matter.
    logits[0, 6:] = 100.0
    tokens[0, 6:] = 3
    assert torch.allclose(utils.lm_cross_entropy_loss(logits, tokens, given, per_token), ours, atol=1e-12)


def test_a_loss_of_nothing_is_refused(logits, tokens):
    with pytest.raises(OptionError, match="no token"):
        utils.lm_cross_entropy_loss(logits[:, :1], tokens[:, :1])
    with pytest.raises(OptionError, match="no token"):
        utils.lm_cross_entropy_loss(logits, tokens, torch.zeros(4, 9, dtype=torch.bool))


def test_the_loss_of_bfloat16_is_in_float32(logits, tokens):
    narrow = logits.bfloat16()
    loss = utils.lm_cross_entropy_loss(narrow, tokens)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(utils.lm_cross_entropy_loss(narrow.double(), tokens))) < 1e-5


def test_the_accuracy_equals_transformer_lens(logits, tokens):
    from transformer_lens.utilities import lm_accuracy

    tokens[:, 1:5] = logits[:, :4].argmax(-1)
    ours = utils.lm_accuracy(logits, tokens, per_token=True)
    assert torch.equal(ours, lm_accuracy(logits, tokens, per_token=True))
    assert ours[:, :4].all()
    assert utils.lm_accuracy(logits, tokens) == lm_accuracy(logits, tokens) == ours.float().mean()
    assert 0.5 <= float(utils.lm_accuracy(logits, tokens)) < 0.7


# test_prompt ----------------------------------------------------------------------------------------------------------

NUMBERS = re.compile(r"(?:Rank|Logit|Prob): *(-?[\d.]+)")


def lines(text):
    """What both print, up to TransformerLens's wrapping of long lines."""
    return [line.rstrip() for line in text.splitlines() if line.startswith(("Top ", "Rank: "))]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("answer", ["Mary", [" Mary", "John", "the"]], ids=["one", "several"])
def test_what_is_printed_equals_transformer_lens(zoo, name, answer, capsys, monkeypatch):
    from transformer_lens.utilities import test_prompt as theirs

    monkeypatch.setenv("COLUMNS", "500")
    prompt = "When John and Mary went to the shops, John gave the bag to"
    for options in (dict(), dict(top_k=4, prepend_bos=False), dict(prepend_space_to_answer=False, prepend_bos=True)):
        with torch.no_grad():
            theirs(prompt, answer, zoo.bridge(name), **options)
        expected = capsys.readouterr().out
        utils.test_prompt(prompt, answer, HookedTransformer(zoo.model(name)), **options)
        printed = capsys.readouterr().out
        assert len(lines(printed)) == len(lines(expected)) >= 5
        for ours, wanted in zip(lines(printed), lines(expected), strict=True):
            assert NUMBERS.sub("", ours) == NUMBERS.sub("", wanted)
            found = [[float(number) for number in NUMBERS.findall(line)] for line in (ours, wanted)]
            assert np.allclose(*found, atol=0.011), (ours, wanted)  # two decimals
        assert printed.splitlines()[0] == expected.splitlines()[0]
        last = printed.splitlines()[-1]
        assert last.startswith("Ranks of the answer tokens:")
        assert last == expected.splitlines()[-1]


def test_ranks_and_probabilities_by_the_definition(zoo, capsys):
    model = zoo.model("gpt2", dtype=torch.float64)
    prompt, answers = "Then Alice and Bob had", [" Bob", " Alice"]
    utils.test_prompt(prompt, answers, model)
    printed = lines(capsys.readouterr().out)
    ids = model.encode([prompt])[0]
    with torch.no_grad():
        row = final_logits(model.spec, model.weights, forward(model.spec, model.weights, torch.tensor([ids])))[0, -1]
    for line, answer in zip(printed, answers, strict=False):
        token = model.encode([answer], prepend_bos=False)[0][0]
        rank = row.argsort(descending=True).tolist().index(token)
        percent = 100 * math.exp(row[token]) / math.fsum(row.exp().tolist())
        rank_shown, logit_shown, percent_shown = (float(number) for number in NUMBERS.findall(line))
        assert rank_shown == rank
        assert abs(logit_shown - float(row[token])) <= 0.0051
        assert abs(percent_shown - percent) <= 0.0051


def test_only_ranks_are_printed_without_details(zoo, capsys):
    utils.test_prompt("Then Alice", [" Bob", " Alice"], zoo.model("gpt2"), print_details=False)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"Ranks of the answer tokens: \[\[\('.*', \d+\), \('.*', \d+\)\]\]\n", printed)


def test_hooks_act_on_a_tested_prompt(zoo, capsys):
    model = HookedTransformer(zoo.model("gpt2"))

    def ablate(value, hook):
        value[:] = 0.0

    utils.test_prompt("Then Alice", " Bob", model)
    before = capsys.readouterr().out
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", ablate)]):
        utils.test_prompt("Then Alice", " Bob", model)
    assert capsys.readouterr().out != before
    utils.test_prompt("Then Alice", " Bob", model)
    assert capsys.readouterr().out == before


def test_prompts_without_tokens_are_refused(zoo):
    model = zoo.model("gpt2")
    with pytest.raises(EmptyPromptError):
        utils.test_prompt("", " Bob", model, prepend_bos=False)
    for answer in ("", []):
        with pytest.raises(EmptyPromptError):
            utils.test_prompt("Then", answer, model, prepend_space_to_answer=False)
