import itertools

import numpy as np
import pytest
import torch

from fastinterp.errors import OptionError, PromptError
from fastinterp.prompts import PromptSet


@pytest.fixture
def tokenized(id_model):
    """Sixty prompts of 1 to 16 tokens; row ``i`` is made of the token ``i + 1``, prompt 7 is rejected."""
    lengths = np.random.default_rng(0).integers(1, 17, size=60)
    rows = [[row + 1] * length for row, length in enumerate(lengths.tolist())]
    rows[7] = []
    return PromptSet.of(
        rows,
        answer=[[row + 1, row + 2] if row % 2 else row + 1 for row in range(60)],
        wrong=[row + 5 for row in range(60)],
        corrupt=[[row + 100 for row in tokens] for tokens in rows],
        ids=[f"p{row}" for row in range(60)],
    ).tokenize(id_model, bad_prompts="reject")


def test_batches_hold_every_accepted_prompt_once_within_the_budget(tokenized):
    batches = tokenized.batches(64)
    assert sorted(index for batch in batches for index in batch.indices.tolist()) == tokenized.accepted.tolist()
    assert 7 not in tokenized.accepted
    for batch in batches:
        assert batch.tokens.numel() <= 64
        assert batch.tokens.shape == (len(batch), int(batch.n_tokens.max()))


def test_the_share_of_distinct_beginnings(id_model, tokenized):
    def share(rows):
        return PromptSet.of(rows).tokenize(id_model, bad_prompts="reject").distinct_share()

    assert share([[1, 2, 3], [1, 2, 4], [1, 2]]) == 4 / 8
    assert share([[1, 2, 3], [2, 3, 1], [3, 1, 2]]) == 1.0
    assert share([[], [1, 2]]) == share([[]]) == 1.0
    assert tokenized.distinct_share() == 1.0
    # The same prompt many times: once among neighbours. Prompts of another length share nothing, and decide.
    assert share([[1, 2, 3]] * 100) == 1 / 16
    assert share([[1, 2, 3]] * 100 + [[n, 5, 6, 7] for n in range(20)]) == 1.0
    assert share([[n, 5] for n in range(20)] + [[1, 2, 3]] * 100) == 1.0


def test_batches_are_sorted_by_length_and_filled(tokenized):
    batches = tokenized.batches(64)
    order = [(int(tokenized.n_tokens[index]), index) for batch in batches for index in batch.indices.tolist()]
    assert order == sorted(order)
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * int(following.n_tokens[0]) > 64


def test_rows_are_padded_on_the_right_and_belong_together(tokenized):
    for batch in tokenized.batches(64):
        for row, index in enumerate(batch.indices.tolist()):
            length = int(batch.n_tokens[row])
            padding = [0] * (batch.tokens.shape[1] - length)
            assert length == tokenized.n_tokens[index]
            assert batch.tokens[row].tolist() == [index + 1] * length + padding
            assert batch.corrupt[row].tolist() == [index + 101] * length + padding
            assert batch.answer[row].tolist() == [index + 1, index + 2 if index % 2 else -1]
            assert batch.wrong[row].tolist() == [index + 5]
            assert batch.ids[row] == f"p{index}"
            assert int(batch.last[row]) == length - 1
            assert batch.mask[row].tolist() == [True] * length + [False] * len(padding)
        assert batch.tokens.dtype == batch.n_tokens.dtype == batch.answer.dtype == torch.int64


def test_a_prompt_over_the_budget_gets_a_batch_of_its_own(id_model):
    tokenized = PromptSet.of([[1] * 9, [1] * 2, [1] * 10, [1] * 2]).tokenize(id_model)
    assert [batch.indices.tolist() for batch in tokenized.batches(4)] == [[1, 3], [0], [2]]
    assert [batch.indices.tolist() for batch in tokenized.batches(3)] == [[1], [3], [0], [2]]


def test_indices_limit_the_rows_in_any_order(tokenized):
    (batch,) = tokenized.batches(10**6, indices=[9, 3, 7])
    assert sorted(batch.indices.tolist()) == [3, 9]
    (again,) = tokenized.batches(10**6, indices=np.array([3, 9]))
    assert again.indices.tolist() == batch.indices.tolist()
    assert tokenized.batches(100, indices=[]) == []


def test_columns_that_are_not_there_are_none(id_model):
    (batch,) = PromptSet.of([[1]]).tokenize(id_model).batches(8)
    assert (batch.answer, batch.wrong, batch.corrupt) == (None, None, None)


def test_to_moves_every_tensor(tokenized):
    batch = tokenized.batches(64)[0].to("meta")
    tensors = [batch.tokens, batch.n_tokens, batch.answer, batch.wrong, batch.corrupt, batch.last, batch.mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(batch.indices, np.ndarray)


def test_bad_arguments(tokenized):
    with pytest.raises(OptionError, match="token_budget=0"):
        tokenized.batches(0)
    with pytest.raises(PromptError, match="no prompt 60: the set has 60"):
        tokenized.batches(8, indices=[60])
    with pytest.raises(PromptError, match="no prompt -1"):
        tokenized.batches(8, indices=[-1])
    with pytest.raises(PromptError, match="prompt 3 is asked for twice"):
        tokenized.batches(8, indices=[3, 4, 3])
