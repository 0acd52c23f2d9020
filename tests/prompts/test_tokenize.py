import dataclasses

import numpy as np
import pytest

from fastinterp.errors import (
    AnswerTokenError,
    EmptyPromptError,
    OptionError,
    PromptPairError,
    PromptTooLongError,
    TokenizerMissingError,
    TokenRangeError,
)
from fastinterp.prompts import PromptSet, Rejection


def token(model, text):
    (ids,) = model.encode([text], prepend_bos=False)
    assert len(ids) == 1
    return ids[0]


def test_text_gets_bos_as_asked(text_model):
    prompts = PromptSet.of(["When Mary and John", "John gave the ring"])
    plain = text_model.encode(prompts.prompts, prepend_bos=False)
    bos = text_model.bos_token_id
    for asked, expected in [(None, True), (True, True), (False, False)]:
        tokenized = prompts.tokenize(text_model, prepend_bos=asked)
        assert tokenized.prepend_bos is expected
        assert [row.tolist() for row in tokenized.tokens] == [[bos] * expected + ids for ids in plain]
        assert tokenized.n_tokens.tolist() == [len(ids) + expected for ids in plain]
        assert all(row.dtype == np.int32 for row in tokenized.tokens)
    without = dataclasses.replace(text_model, spec=dataclasses.replace(text_model.spec, default_prepend_bos=False))
    assert prompts.tokenize(without).prepend_bos is False


def test_bos_is_refused_where_there_is_none(text_model):
    class Nothing:
        bos_token_id = None
        eos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[1] for _ in texts]}

        def get_vocab(self):
            return {"a": 1}

    model = dataclasses.replace(text_model, tokenizer=Nothing())
    assert PromptSet.of(["a"]).tokenize(model).prepend_bos is False
    with pytest.raises(OptionError, match="no BOS token"):
        PromptSet.of(["a"]).tokenize(model, prepend_bos=True)


def test_ids_are_taken_as_they_are(text_model, id_model):
    ids = text_model.encode(["John gave é"], prepend_bos=False)[0]
    prompts = PromptSet.of([ids, [3]], answer=[5, [6, 7]], corrupt=[ids[::-1], [4]])
    for model in (text_model, id_model):
        tokenized = prompts.tokenize(model, prepend_bos=True)
        assert [row.tolist() for row in tokenized.tokens] == [ids, [3]]
        assert [row.tolist() for row in tokenized.corrupt] == [ids[::-1], [4]]
        assert tokenized.answer.tolist() == [[5, -1], [6, 7]]
        assert tokenized.prepend_bos is False
    assert prompts.tokenize(text_model).texts[0] == "John gave é"
    assert prompts.tokenize(id_model).texts[1] == "<3>"


@pytest.mark.parametrize("columns", [{"prompts": ["John"]}, {"prompts": [[3]], "answer": [" Mary"]}])
def test_text_needs_a_tokenizer(id_model, columns):
    with pytest.raises(TokenizerMissingError):
        PromptSet.of(**columns).tokenize(id_model)


def test_answers_become_single_tokens_without_bos(text_model):
    mary, john, tom = (token(text_model, name) for name in (" Mary", " John", " Tom"))
    prompts = PromptSet.of(["a", "b", "c"], answer=[" Mary", [" John", tom], None], wrong=[john, " Mary", " Tom"])
    tokenized = prompts.tokenize(text_model)
    assert tokenized.answer.tolist() == [[mary, -1], [john, tom], [-1, -1]]
    assert tokenized.wrong.tolist() == [[john], [mary], [tom]]
    assert tokenized.answer.dtype == np.int64


def test_a_longer_answer_shows_its_tokenisation(text_model):
    prompts = PromptSet.of(["a"] * 18, answer=[" Mary"] * 17 + [" Maryn"])
    pieces = text_model.token_strings(text_model.encode([" Maryn"], prepend_bos=False)[0])
    assert pieces == [" Mary", "n"]
    with pytest.raises(AnswerTokenError) as caught:
        prompts.tokenize(text_model)
    assert str(caught.value) == (
        "answer ' Maryn' of prompt 17 (id '17') is 2 tokens (' Mary', 'n'): give a one-token answer, "
        'or answer_token="first" (--answer-token first) to score its first token'
    )
    first = prompts.tokenize(text_model, answer_token="first")
    assert first.answer[17].tolist() == [token(text_model, " Mary")]


def test_the_forgotten_space_is_pointed_out(text_model):
    assert len(text_model.encode(["Mary"], prepend_bos=False)[0]) > 1
    with pytest.raises(AnswerTokenError, match=r"\(' Mary', with a leading space, is one\)"):
        PromptSet.of(["a"], wrong=["Mary"]).tokenize(text_model)


def test_alternatives_that_come_to_one_token_count_once(text_model):
    tokenized = PromptSet.of(["a"], answer=[[" Mary", " Maryn", " John"]]).tokenize(text_model, answer_token="first")
    assert tokenized.answer.tolist() == [[token(text_model, " Mary"), token(text_model, " John")]]


TOO_LONG = "a " * 17


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"prompts": [""]}, EmptyPromptError, "prompt 0 .* is empty"),
        ({"prompts": [[]]}, EmptyPromptError, "prompt 0 .* is empty"),
        ({"prompts": [TOO_LONG]}, PromptTooLongError, r"has \d+ tokens, the model's context \(n_ctx\) is 16"),
        ({"prompts": [[1] * 17]}, PromptTooLongError, "has 17 tokens"),
        ({"prompts": [[1, -1]]}, TokenRangeError, "token id -1 at position 1"),
        ({"prompts": [[1, 10**12]]}, TokenRangeError, f"token id {10**12} at position 1"),
        ({"prompts": [[1]], "corrupt": [[100000]]}, TokenRangeError, "position 0 of the corrupt prompt"),
        ({"prompts": ["a"], "answer": [100000]}, TokenRangeError, "answer 100000 of prompt 0"),
        ({"prompts": ["a"], "wrong": [[-1, 3]]}, TokenRangeError, "wrong -1 of prompt 0"),
        ({"prompts": ["a"], "answer": [""]}, AnswerTokenError, "answer '' of prompt 0 .* has no token"),
        (
            {"prompts": ["a"], "answer": [" Mary"], "wrong": [" Mary"]},
            AnswerTokenError,
            r"same token \(' Mary'\)",
        ),
        ({"prompts": [" Mary"], "corrupt": [" Mary John"]}, PromptPairError, "has 3 tokens, the clean one 2"),
        (
            {"prompts": ["a", "a"], "corrupt": ["b", None]},
            PromptPairError,
            "prompt 1 .* has no corrupt prompt",
        ),
    ],
)
def test_bad_rows_raise_and_can_be_rejected(text_model, columns, error, message):
    prompts = PromptSet.of(**columns)
    with pytest.raises(error, match=message) as caught:
        prompts.tokenize(text_model)
    tokenized = prompts.tokenize(text_model, bad_prompts="reject")
    (rejection,) = tokenized.rejected
    bad = len(prompts) - 1
    assert rejection == Rejection(index=bad, id=str(bad), reason=str(caught.value))
    assert tokenized.accepted.tolist() == list(range(bad))
    assert len(tokenized.tokens[bad]) == 0
    assert [batch.indices.tolist() for batch in tokenized.batches(100)] == ([[0]] if bad else [])


def test_the_context_is_the_limit_itself(id_model):
    assert PromptSet.of([[1] * 16]).tokenize(id_model).max_len == 16


def test_ids_of_text_beyond_the_embedding_are_refused(text_model):
    small = dataclasses.replace(text_model, spec=dataclasses.replace(text_model.spec, d_vocab=5))
    with pytest.raises(TokenRangeError, match="vocabulary has 5 ids"):
        PromptSet.of([" Mary"]).tokenize(small, prepend_bos=False)
    with pytest.raises(TokenRangeError, match="answer ' Mary'"):
        PromptSet.of([[1]], answer=[" Mary"]).tokenize(small)


def test_all_bad_rows_are_counted_and_ten_are_shown(text_model):
    prompts = PromptSet.of(["", *["a"] * 5, *["b"] * 12], answer=[None, *[" Mary"] * 5, *["Mary"] * 12])
    with pytest.raises(EmptyPromptError, match="13 of 18 prompts") as caught:
        prompts.tokenize(text_model)
    message = str(caught.value)
    assert "prompt 14 (id '14')" in message
    assert "prompt 15 (id '15')" not in message
    assert "and 3 more" in message
    assert 'bad_prompts="reject"' in message
    assert len(prompts.tokenize(text_model, bad_prompts="reject").rejected) == 13


def test_rejected_rows_keep_the_others_in_place(text_model):
    prompts = PromptSet.of(["a", "", "b"], answer=[" Mary", " Tom", " John"], corrupt=["b", "a", "a"])
    tokenized = prompts.tokenize(text_model, bad_prompts="reject")
    alone = prompts.head(1).tokenize(text_model)
    assert tokenized.accepted.tolist() == [0, 2]
    assert tokenized.n_tokens.tolist() == [2, 0, 2]
    assert tokenized.tokens[0].tolist() == alone.tokens[0].tolist()
    assert tokenized.answer.tolist() == [[token(text_model, " Mary")], [-1], [token(text_model, " John")]]
    assert [len(row) for row in tokenized.corrupt] == [2, 0, 2]
    assert tokenized.texts == ("a", "", "b")


def test_required_columns(text_model, tmp_path):
    prompts = PromptSet.of(["a", "b"], answer=[" Mary", None], wrong=[" John", " Tom"])
    with pytest.raises(AnswerTokenError, match=r"prompt 1 \(id '1'\) has no answer"):
        prompts.tokenize(text_model, require=["answer", "wrong"])
    assert prompts.tokenize(text_model, require=["answer"], bad_prompts="reject").accepted.tolist() == [0]
    with pytest.raises(PromptPairError, match="column 'corrupt'"):
        prompts.tokenize(text_model, require=["corrupt"], bad_prompts="reject")
    (tmp_path / "p.csv").write_text("prompt,anwser\na, Mary\n")
    with pytest.raises(AnswerTokenError, match="did you mean 'anwser'"):
        PromptSet.read(tmp_path / "p.csv").tokenize(text_model, require=["answer"])


@pytest.mark.parametrize("option", [{"answer_token": "last"}, {"bad_prompts": "skip"}, {"require": ["anser"]}])
def test_unknown_options(text_model, option):
    with pytest.raises(Exception, match=next(iter(option))):
        PromptSet.of(["a"]).tokenize(text_model, **option)
