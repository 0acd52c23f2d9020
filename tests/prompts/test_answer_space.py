"""An answer without the space that belongs to it is another token: warned of, but only where a space comes next."""

import re
import warnings

import pytest

from fastinterp import PromptSet
from fastinterp.errors import AnswerSpaceWarning


@pytest.fixture
def model(zoo):
    """Has the tokens ``"a"`` and ``" a"``, ``"t"`` and ``" t"``; ``" q"`` is two."""
    model = zoo.model("gpt2")
    assert [len(ids) for ids in model.encode(["a", " a", "t", " t", "q", " q"], prepend_bos=False)] == [1] * 5 + [2]
    return model


def quietly(model, prompts, **columns):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PromptSet.of(prompts, **columns).tokenize(model)


def test_it_is_named_with_what_to_type(model):
    prompts = PromptSet.of(["John gave the", "Mary had", "He went"], answer=["a", " a", "a"], wrong=[" t", "t", " t"])
    with pytest.warns(AnswerSpaceWarning) as caught:
        tokenized = prompts.tokenize(model)
    (warning,) = caught
    assert re.search(r"answer 'a' of prompt 0 .*another token than ' a'.*, and 2 more: type ' a'", str(warning.message))
    # What was given is what is measured.
    assert tokenized.answer[0, 0] == model.encode(["a"], prepend_bos=False)[0][0]


def test_wrong_answers_and_alternatives_too(model):
    with pytest.warns(AnswerSpaceWarning, match="wrong 't' of prompt 0"):
        PromptSet.of(["John gave the"], answer=[" a"], wrong=[[" t", "t"]]).tokenize(model)


@pytest.mark.parametrize("end", [":", ",", "?", "7", "%"])
def test_behind_marks_that_a_space_follows(model, end):
    with pytest.warns(AnswerSpaceWarning, match="' a'"):
        PromptSet.of([f"The answer{end}"], answer=["a"]).tokenize(model)


@pytest.mark.parametrize("end", [" ", "\n", "(", '"', "'", "<|assistant|>", "[/INST]", "_", "/", "-", "=", "`", "."])
def test_not_where_a_word_can_follow_at_once(model, end):
    quietly(model, [f"The answer{end}"], answer=["a"])


@pytest.mark.parametrize("answer", [" a", "7", ".", ",", "?", "(", "q", 5])
def test_not_of_answers_that_are_right_as_they_are(model, answer):
    quietly(model, ["The answer"], answer=[answer])


def test_not_of_prompts_of_token_ids(model):
    quietly(model, [[5, 6, 7]], answer=["a"])


@pytest.mark.real
def test_a_name_of_a_real_model(smollm2, real_prompts):
    with pytest.warns(AnswerSpaceWarning, match="answer 'Mary' of prompt 0 .*type ' Mary'"):
        PromptSet.of([real_prompts[0]], answer=["Mary"]).tokenize(smollm2)
    quietly(smollm2, [real_prompts[0], "2 + 2 ="], answer=[" Mary", "4"])
