"""Generated tokens against Hugging Face and against loops that read the whole text for every token."""

import pytest
import torch

from fastinterp.errors import (
    EmptyPromptError,
    NonFiniteError,
    OptionError,
    PromptTooLongError,
    TokenRangeError,
)
from fastinterp.hooked.generation import generate_tokens
from fastinterp.model import Edit, Taps, final_logits, forward
from tests.hooked.generation_loops import EOS, N_NEW, argmax_loop, until, whole_text_logits

MODELS = ["gpt2", "llama-gqa", "mistral-window"]

# Greedy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_mixed_lengths_in_one_batch_equal_hugging_face_one_by_one(zoo, tiny_name, token_prompts, hf_logits, processing):
    hf_model = zoo.hf(tiny_name)
    expected = [argmax_loop(lambda tokens: hf_logits(hf_model, tokens)[-1], prompt) for prompt in token_prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert max(len(set(tokens)) for tokens in expected) > 5
    model = zoo.model(tiny_name, processing=processing)
    assert generate_tokens(model, token_prompts, max_new_tokens=N_NEW) == expected


OTHERS = ["gemma2-softcaps", "gemma3-mixed-rope", "gpt-neo", "gpt-neox", "gptj", "opt", "qwen3-gqa"]


@pytest.mark.parametrize("tiny_name", OTHERS, indirect=True)
def test_other_families_equal_hugging_face(zoo, tiny_name, token_prompts, hf_logits):
    """Capped scores, alternating windows with ropes of their own, parallel blocks, norms of queries and keys."""
    hf_model = zoo.hf(tiny_name)
    expected = [argmax_loop(lambda tokens: hf_logits(hf_model, tokens)[-1], prompt) for prompt in token_prompts[:4]]
    assert generate_tokens(zoo.model(tiny_name), token_prompts[:4], max_new_tokens=N_NEW) == expected


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_equals_generate_of_hugging_face(zoo, tiny_name, token_prompts):
    hf_model, model = zoo.hf(tiny_name), zoo.model(tiny_name, processing="none")
    for prompt in token_prompts[:4]:
        tokens = torch.tensor([prompt])
        theirs = hf_model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=N_NEW,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        (ours,) = generate_tokens(model, [prompt], max_new_tokens=N_NEW, stop_tokens=[EOS])
        assert prompt + ours == theirs[0].tolist()


@pytest.mark.parametrize("past", ["kept", "recomputed"])
@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_a_prompt_by_itself_gets_what_it_gets_in_a_batch(zoo, tiny_name, token_prompts, past):
    model = zoo.model(tiny_name)
    batch = generate_tokens(model, token_prompts, max_new_tokens=N_NEW, past=past)
    alone = [generate_tokens(model, [prompt], max_new_tokens=N_NEW)[0] for prompt in token_prompts]
    assert batch == alone


def test_the_whole_context_can_be_used(zoo):
    model = zoo.model("gpt2")
    prompt = list(range(1, 61))
    expected = argmax_loop(whole_text_logits(model), prompt, 4)
    assert generate_tokens(model, [prompt, [5]], max_new_tokens=4)[0] == expected


def test_nothing_to_do(zoo, token_prompts):
    model = zoo.model("gpt2")
    assert generate_tokens(model, []) == []
    assert generate_tokens(model, token_prompts[:2], max_new_tokens=0) == [[], []]


# Stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", ["kept", "recomputed"])
@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_a_row_ends_with_its_stop_token_and_the_others_go_on(zoo, tiny_name, token_prompts, past):
    model = zoo.model(tiny_name)
    free = generate_tokens(model, token_prompts, max_new_tokens=N_NEW)
    # One prompt stops at its first token, the longest one early.
    stop = {free[0][0], free[2][4]}
    found = generate_tokens(model, token_prompts, max_new_tokens=N_NEW, stop_tokens=stop, past=past)
    assert found == [until(tokens, stop) for tokens in free]
    assert len({len(tokens) for tokens in found}) > 2


@pytest.mark.parametrize("past", ["kept", "recomputed"])
def test_ends_when_all_have_stopped(zoo, token_prompts, past):
    model, steps = zoo.model("gpt2"), []
    free = generate_tokens(model, token_prompts[:3], max_new_tokens=N_NEW)
    stop = [tokens[at] for tokens, at in zip(free, (3, 0, 5), strict=True)]

    def taps():
        steps.append(1)
        return Taps()

    found = generate_tokens(model, token_prompts[:3], max_new_tokens=N_NEW, stop_tokens=stop, taps=taps, past=past)
    assert found == [until(tokens, stop) for tokens in free]
    assert len(steps) == max(map(len, found)) < N_NEW


# Taps --------------------------------------------------------------------------------------------------------------


class Halve:
    def apply(self, value):
        return 0.5 * value


class DropFirstKey:
    """Of one head's pattern, without renormalising; the key axis counts from the first token at every step."""

    def apply(self, value):
        value = value.clone()
        value[:, 1, :, 0] = 0.0
        return value


EDITS = {
    "z of a head": [(("z", 1), Edit(site="z", layer=1, head=2))],
    "residual": [(("resid_pre", 1), Halve()), (("mlp_out", 0), Halve())],
    "pattern": [(("pattern", 0), DropFirstKey()), (("pattern", 2), DropFirstKey())],
    "keys and values": [(("k", 2), Halve()), (("v", 1), Halve())],
    "final norm": [(("ln_final_normalized", None), Halve()), (("resid_post", 1), Halve())],
}


@pytest.mark.parametrize("past", ["kept", "recomputed"])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_an_edit_acts_as_if_the_whole_text_were_read_with_it(zoo, tiny_name, token_prompts, edits, past):
    model, prompts = zoo.model(tiny_name), token_prompts[:4]

    def taps():
        fresh = Taps()
        for site, edit in edits:
            fresh.edits.setdefault(site, []).append(edit)
        return fresh

    expected = [argmax_loop(whole_text_logits(model, edits), prompt, 6) for prompt in prompts]
    found = generate_tokens(model, prompts, max_new_tokens=6, taps=taps, past=past)
    assert found == expected
    assert found != generate_tokens(model, prompts, max_new_tokens=6)


def test_taps_see_the_tokens_of_their_step(zoo, token_prompts):
    model, made = zoo.model("llama-gqa"), []
    names = ["resid_pre", "k", "pattern", "ln_final_scale"]

    def taps():
        made.append(Taps.of(model.spec.n_layers, capture=names))
        return made[-1]

    prompts, longest = token_prompts[:3], max(map(len, token_prompts[:3]))
    new = generate_tokens(model, prompts, max_new_tokens=4, taps=taps)
    assert len(made) == 4
    for step, used in enumerate(made):
        n_read, n_keys = (1, longest + step) if step else (longest, longest)
        assert used.values["resid_pre", 0].shape == (3, n_read, 48)
        assert used.values["k", 1].shape == (3, n_read, 2, 8)
        assert used.values["pattern", 2].shape == (3, 6, n_read, n_keys)
        assert used.values["ln_final_scale", None].shape == (3, 1, 1)
    # Row by row, what is seen are the activations of the whole text.
    for row, prompt in enumerate(prompts):
        whole = Taps.of(model.spec.n_layers, capture=names)
        with torch.no_grad():
            forward(model.spec, model.weights, torch.tensor([prompt + new[row][:-1]]), taps=whole)
        for step, used in enumerate(made[1:], start=1):
            at = len(prompt) + step - 1
            for name, layer in (("resid_pre", 2), ("k", 1)):
                difference = used.values[name, layer][row, 0] - whole.values[name, layer][0, at]
                assert float(difference.abs().max()) < 1e-4
            pattern = used.values["pattern", 2][row, :, 0]
            assert float((pattern[:, : at + 1] - whole.values["pattern", 2][0, :, at, : at + 1]).abs().max()) < 1e-5
            assert not pattern[:, at + 1 :].any()


# Sampling ----------------------------------------------------------------------------------------------------------

N_DRAWS = 2000


def drawn_shares(model, prompt, **options):
    """How often each token was drawn after the prompt."""
    drawn = generate_tokens(model, [prompt] * N_DRAWS, max_new_tokens=1, do_sample=True, seed=3, **options)
    return torch.bincount(torch.tensor(drawn).flatten(), minlength=model.spec.d_vocab).double() / N_DRAWS


def assert_drawn_from(shares, probabilities):
    """Within five standard deviations everywhere, and nothing where there is no probability."""
    spread = (probabilities * (1 - probabilities) / N_DRAWS).sqrt()
    assert bool(((shares - probabilities).abs() <= 5 * spread + 3 / N_DRAWS).all())
    assert float(shares[probabilities == 0].sum()) == 0.0


def most_likely(probabilities, enough):
    """Renormalised over the fewest most likely tokens for which ``enough(how many, their sum)``."""
    kept = torch.zeros_like(probabilities)
    for n, token in enumerate(probabilities.argsort(descending=True).tolist(), start=1):
        kept[token] = probabilities[token]
        if enough(n, float(kept.sum())):
            return kept / kept.sum()
    raise AssertionError


@pytest.fixture
def next_token(zoo, token_prompts):
    """A model, a prompt, and the logits of the token after it."""
    model = zoo.model("llama-gqa")
    logits = whole_text_logits(model)(token_prompts[4]).double()
    assert 0.03 < float(logits.softmax(0).max()) < 0.9
    return model, token_prompts[4], logits


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_probabilities(next_token, temperature):
    model, prompt, logits = next_token
    shares = drawn_shares(model, prompt, temperature=temperature)
    assert_drawn_from(shares, (logits / temperature).softmax(0))


def test_top_k_draws_from_the_k_most_likely(next_token):
    model, prompt, logits = next_token
    expected = most_likely(logits.softmax(0), lambda n, total: n == 5)
    shares = drawn_shares(model, prompt, top_k=5)
    assert_drawn_from(shares, expected)
    assert int((shares > 0).sum()) == 5
    assert_drawn_from(drawn_shares(model, prompt, top_k=10**6), logits.softmax(0))


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_top_p_draws_from_the_fewest_that_add_up(next_token, top_p):
    model, prompt, logits = next_token
    probabilities = logits.softmax(0)
    expected = probabilities if top_p == 1.0 else most_likely(probabilities, lambda n, total: total >= top_p)
    assert top_p == 1.0 or 1 < int((expected > 0).sum()) < 300
    assert_drawn_from(drawn_shares(model, prompt, top_p=top_p), expected)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"temperature": 0.7}, {"freq_penalty": 1.5}])
def test_what_is_drawn_from_equals_transformer_lens(zoo, token_prompts, padded, monkeypatch, options):
    """Both are stopped where they draw, and give away their probabilities."""
    from transformer_lens.utilities.logits_utils import sample_logits

    model, theirs, ours = zoo.model("llama-gqa"), [], []

    class Categorical:
        def __init__(self, logits):
            theirs.append(logits.softmax(-1))

        def sample(self):
            return theirs[-1].argmax(-1)

    def multinomial(probabilities, n, generator):
        ours.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch.distributions.categorical, "Categorical", Categorical)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    # Of one length, with repeated tokens, so that a penalty per occurrence shows.
    prompts = [[*prompt[:4], prompt[0], prompt[0]] for prompt in token_prompts if len(prompt) >= 4]
    new = generate_tokens(model, prompts, max_new_tokens=6, do_sample=True, **options)
    for step in range(6):
        tokens = torch.tensor([prompt + added[:step] for prompt, added in zip(prompts, new, strict=True)])
        with torch.no_grad():
            logits = final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens))[:, -1]
        sample_logits(logits, tokens=tokens, **options)
        assert float((ours[step] - theirs[step]).abs().max()) < 1e-5
        assert float((ours[step] - logits.softmax(-1)).abs().max()) > 1e-3


def test_a_penalty_keeps_tokens_from_coming_back(zoo, token_prompts):
    model = zoo.model("gpt2")
    found = generate_tokens(
        model, token_prompts, max_new_tokens=N_NEW, do_sample=True, temperature=0.3, freq_penalty=1e4, seed=0
    )
    for prompt, new in zip(token_prompts, found, strict=True):
        assert len(set(new)) == len(new) == N_NEW
        assert not set(prompt) & set(new)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 0.0}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_sampling_that_leaves_one_token_is_greedy(zoo, token_prompts, options):
    model = zoo.model("mistral-window")
    greedy = generate_tokens(model, token_prompts, max_new_tokens=10)
    assert generate_tokens(model, token_prompts, max_new_tokens=10, do_sample=True, **options) == greedy


def test_a_seed_makes_draws_reproducible(zoo, token_prompts):
    model = zoo.model("gpt2")

    def draw(seed, past="kept"):
        return generate_tokens(model, token_prompts, max_new_tokens=12, do_sample=True, top_p=0.9, seed=seed, past=past)

    torch.manual_seed(0)
    first = draw(5)
    state = torch.get_rng_state()
    assert draw(5) == first == draw(5, past="recomputed")
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(6) != first
    torch.manual_seed(9)
    unseeded = draw(None)
    assert draw(None) != unseeded
    torch.manual_seed(9)
    assert draw(None) == unseeded


def test_options_of_sampling_do_nothing_without_it(zoo, token_prompts):
    model = zoo.model("gpt2")
    greedy = generate_tokens(model, token_prompts, max_new_tokens=8)
    found = generate_tokens(model, token_prompts, max_new_tokens=8, temperature=3.0, top_p=0.5, freq_penalty=2.0)
    assert found == greedy


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1], []], {}, EmptyPromptError, "prompt 1 has no token"),
        ([[1], [400]], {}, TokenRangeError, "token id 400 of prompt 1"),
        ([[-1]], {}, TokenRangeError, "token id -1 of prompt 0"),
        ([[1], [1] * 60], {"max_new_tokens": 5}, PromptTooLongError, "give max_new_tokens=4 or less"),
        ([[1] * 64], {"max_new_tokens": 1}, PromptTooLongError, "n_ctx=64.*shorten it"),
        ([[1]], {"stop_tokens": [400]}, TokenRangeError, "stop token 400"),
        ([[1]], {"max_new_tokens": -1}, OptionError, "max_new_tokens=-1"),
        ([[1]], {"temperature": -1.0, "do_sample": True}, OptionError, "temperature=-1.0"),
        ([[1]], {"top_k": 0}, OptionError, "top_k=0"),
        ([[1]], {"top_p": 0.0}, OptionError, "top_p=0.0"),
        ([[1]], {"top_p": 1.5}, OptionError, "top_p=1.5"),
        ([[1]], {"top_p": 0.5, "top_k": 3}, OptionError, "exclude each other"),
        ([[1]], {"freq_penalty": -0.5}, OptionError, "freq_penalty=-0.5"),
    ],
)
def test_bad_input_is_refused_before_any_work(zoo, prompts, options, error, message):
    def taps():
        raise AssertionError

    with pytest.raises(error, match=message):
        generate_tokens(zoo.model("gpt2"), prompts, taps=taps, **{"max_new_tokens": 2} | options)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_mode_is_refused(zoo):
    with pytest.raises(OptionError, match=r"past='keep' is not known.*did you mean 'kept'"):
        generate_tokens(zoo.model("gpt2"), [[1]], past="keep")


def test_nan_is_not_continued(zoo):
    edit = Edit(site="resid_post", layer=2, replacement=float("nan"))
    with pytest.raises(NonFiniteError, match="look at what the hooks write"):
        generate_tokens(zoo.model("gpt2"), [[1, 2]], max_new_tokens=2, taps=lambda: Taps.of(3, edits=[edit]))
