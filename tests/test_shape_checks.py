"""Of the calls in one test, which ones are checked; the run that this file is part of is one with checks."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from fastinterp.model.norms import center
from tests.shape_checks import EVERY, FIRST


@jaxtyping.jaxtyped(typechecker=beartype)
def same(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> int:
    return len(x)


def refused(*lengths: int) -> bool:
    try:
        same(*(torch.zeros(n) for n in lengths))
    except jaxtyping.TypeCheckError:
        return True
    return False


@pytest.mark.parametrize("again", [False, True])
def test_the_first_calls_of_every_test_and_some_of_the_others(again):
    found = [refused(2, 3) for _ in range(FIRST + 3 * EVERY)]
    assert found == [True] * FIRST + ([False] * (EVERY - 1) + [True]) * 3
    assert not refused(2, 2)


def test_functions_of_the_package_are_checked(zoo):
    with pytest.raises(jaxtyping.TypeCheckError, match="center"):
        center(zoo.model("gpt2").spec.norm, torch.zeros(1, 3, dtype=torch.int64))
