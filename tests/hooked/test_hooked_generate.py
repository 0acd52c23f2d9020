"""HookedTransformer.generate: what goes in, what comes out, and hooks on the way."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import (
    OptionError,
    TokenizerMissingError,
)
from fastinterp.hooked.generate import generate
from fastinterp.hooked.generation import generate_tokens
from fastinterp.model import Edit, Taps
from tests.hooked.generation_loops import EOS, argmax_loop, until, whole_text_logits


@dataclasses.dataclass
class Hooked:
    """As much of a HookedTransformer as generation asks for."""

    model: Any
    edits: tuple[Edit, ...] = ()

    @property
    def cfg(self):
        return SimpleNamespace(default_prepend_bos=self.model.spec.default_prepend_bos)

    def taps(self):
        return Taps.of(self.model.spec.n_layers, edits=self.edits)

    def to_single_token(self, string):
        (token,) = self.model.encode([string], prepend_bos=False)[0]
        return token


TEXTS = ["When John and Mary went", "The quick brown fox", "Tom"]
GREEDY = {"do_sample": False, "stop_at_eos": False, "max_new_tokens": 9}


@pytest.fixture
def hooked(zoo):
    return Hooked(zoo.model("llama-gqa"))


@pytest.mark.parametrize("bos", [None, True, False])
def test_string_in_string_out(hooked, bos):
    tokenizer = hooked.model.tokenizer
    for text in TEXTS:
        (prompt,) = hooked.model.encode([text], prepend_bos=bos)
        (new,) = generate_tokens(hooked.model, [prompt], max_new_tokens=9)
        found = generate(hooked, text, prepend_bos=bos, **GREEDY)
        assert found == tokenizer.decode(prompt + new, skip_special_tokens=True)
        assert found.startswith(text)
        tokens = generate(hooked, text, prepend_bos=bos, return_type="tokens", **GREEDY)
        assert tokens.tolist() == [prompt + new]


def test_strings_of_any_lengths_in_a_list_out(hooked):
    found = generate(hooked, TEXTS, **GREEDY)
    assert found == [generate(hooked, text, **GREEDY) for text in TEXTS]
    assert generate(hooked, TEXTS[:1], **GREEDY) == found[:1]


def test_tokens_in_tokens_out(hooked, token_prompts):
    tokens = torch.tensor([token_prompts[0], token_prompts[0][::-1]])
    new = generate_tokens(hooked.model, tokens.tolist(), max_new_tokens=9)
    found = generate(hooked, tokens, **GREEDY)
    assert torch.equal(found, torch.cat([tokens, torch.tensor(new)], dim=1))
    assert torch.equal(generate(hooked, tokens[0], **GREEDY), found[:1])
    texts = generate(hooked, tokens, return_type="str", **GREEDY)
    assert texts == [hooked.model.tokenizer.decode(row, skip_special_tokens=True) for row in found]


def test_rows_that_stopped_are_padded_with_the_end_token(hooked, token_prompts):
    tokens = torch.tensor([token_prompts[0], token_prompts[0][::-1]])
    free = generate_tokens(hooked.model, tokens.tolist(), max_new_tokens=9)
    stop = next(token for token in free[0] if token not in free[1])
    expected = until(free[0], [stop])
    assert len(expected) < 9
    for options in ({"stop_tokens": [stop]}, {"stop_tokens": hooked.model.token_strings([stop])}):
        found = generate(hooked, tokens, **GREEDY | options)[:, tokens.shape[1] :]
        assert found[1].tolist() == free[1]
        assert found[0].tolist() == expected + [EOS] * (9 - len(expected))
    found = generate(hooked, tokens, **GREEDY | {"stop_at_eos": True, "eos_token_id": stop})[:, tokens.shape[1] :]
    assert found[0].tolist() == expected + [stop] * (9 - len(expected))


def test_the_end_token_stops(zoo, token_prompts):
    """The last logits are turned so that the tokenizer's end token comes out after some steps."""
    model = zoo.model("llama-gqa")
    free = generate_tokens(model, token_prompts, max_new_tokens=9)
    order = torch.arange(model.spec.d_vocab)
    order[[EOS, free[0][3]]] = order[[free[0][3], EOS]]
    weights = dataclasses.replace(model.weights, W_U=model.weights.W_U[:, order])
    hooked = Hooked(dataclasses.replace(model, weights=weights))
    tokens = torch.tensor([token_prompts[0]])
    options = {"do_sample": False, "max_new_tokens": 9}
    found = generate(hooked, tokens, **options)[0, tokens.shape[1] :].tolist()
    endless = generate(hooked, tokens, stop_at_eos=False, **options)[0, tokens.shape[1] :].tolist()
    assert found == until(endless, [EOS])
    assert found[-1] == EOS
    assert len(found) < len(endless) == 9


@pytest.mark.parametrize("cached", [True, False])
def test_hooks_run_at_every_step(zoo, token_prompts, cached):
    model = zoo.model("gpt2")
    edit = Edit(site="z", layer=1, head=2)
    tokens = torch.tensor([token_prompts[2]])
    expected = argmax_loop(whole_text_logits(model, [(("z", 1), edit)]), token_prompts[2], 9)
    assert expected != generate_tokens(model, [token_prompts[2]], max_new_tokens=9)[0]
    found = generate(Hooked(model, edits=(edit,)), tokens, use_past_kv_cache=cached, **GREEDY)
    assert found[0, tokens.shape[1] :].tolist() == expected


@pytest.mark.parametrize("in_place", [True, False])
def test_with_the_hooks_of_a_hooked_transformer(zoo, token_prompts, in_place):
    model, prompt, calls = zoo.model("llama-gqa"), token_prompts[2], []

    def hook(z, hook):
        calls.append((hook.name, tuple(z.shape)))
        if not in_place:
            z = z.clone()
        z[:, :, 2] = 0.0
        return None if in_place else z

    hooked = HookedTransformer(model)
    edited = whole_text_logits(model, [(("z", 1), Edit(site="z", layer=1, head=2))])
    with hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_z", hook)]):
        found = hooked.generate(torch.tensor([prompt]), **GREEDY)
    assert found[0].tolist() == prompt + argmax_loop(edited, prompt, 9)
    assert calls == [("blocks.1.attn.hook_z", (1, n_pos, 6, 8)) for n_pos in (len(prompt), *[1] * 8)]
    clean = hooked.generate(torch.tensor([prompt]), **GREEDY)
    assert clean[0].tolist() == prompt + argmax_loop(whole_text_logits(model), prompt, 9)
    assert not torch.equal(clean, found)


def test_sampling_is_the_default_and_has_a_seed(hooked):
    first = generate(hooked, TEXTS, seed=1, max_new_tokens=6, stop_at_eos=False)
    assert first == generate(hooked, TEXTS, seed=1, max_new_tokens=6, stop_at_eos=False)
    assert first != generate(hooked, TEXTS, seed=2, max_new_tokens=6, stop_at_eos=False)


def test_without_a_tokenizer(zoo, token_prompts):
    hooked = Hooked(dataclasses.replace(zoo.model("gpt2"), tokenizer=None))
    tokens = torch.tensor([token_prompts[0]])
    with pytest.raises(OptionError, match="give eos_token_id=, or stop_at_eos=False"):
        generate(hooked, tokens, do_sample=False)
    (new,) = generate_tokens(hooked.model, [token_prompts[0]], max_new_tokens=9)
    assert generate(hooked, tokens, **GREEDY)[0].tolist() == token_prompts[0] + new
    with pytest.raises(TokenizerMissingError):
        generate(hooked, "text", **GREEDY)
    with pytest.raises(TokenizerMissingError, match='return_type="tokens"'):
        generate(hooked, tokens, return_type="str", **GREEDY)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_return_type_is_refused(hooked):
    with pytest.raises(OptionError, match="return_type='string' is not known"):
        generate(hooked, "text", return_type="string")


def test_stop_tokens_come_in_any_form(zoo):
    from fastinterp import HookedTransformer

    hooked = HookedTransformer(zoo.model("gpt2"))
    tokens = torch.tensor([[5, 6, 7]])
    options = dict(max_new_tokens=8, do_sample=False, stop_at_eos=False)
    whole = hooked.generate(tokens, **options)
    stop = int(whole[0, 5])
    text = hooked.to_string(stop)
    expected = hooked.generate(tokens, stop_tokens=[stop], **options)
    assert expected.shape[1] < whole.shape[1]
    forms = [torch.tensor([stop]), torch.tensor(stop), {stop}, stop]
    if hooked.to_tokens(text, prepend_bos=False).shape[1] == 1:
        forms += [text, [text]]
    for form in forms:
        assert torch.equal(hooked.generate(tokens, stop_tokens=form, **options), expected), form
    eos = dict(options, stop_at_eos=True)
    for form in (stop, [stop], torch.tensor([stop])):
        assert torch.equal(hooked.generate(tokens, eos_token_id=form, **eos), expected), form


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_inputs_of_generate_are_refused(zoo):
    from fastinterp import HookedTransformer

    hooked = HookedTransformer(zoo.model("gpt2"))
    with pytest.raises(OptionError, match=r"torch\.tensor"):
        hooked.generate([5, 6], max_new_tokens=2)
    with pytest.raises(OptionError, match="token ids"):
        hooked.generate(torch.tensor([1.5, 2.0]), max_new_tokens=2)
