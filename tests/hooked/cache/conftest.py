"""Caches of everything that a forward forms, for models of several families."""

import pytest
import torch

from fastinterp.hooked.activation_cache import ActivationCache
from tests.hooked.cache.cache_runs import MODELS, run


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def model(zoo, request):
    return zoo.model(request.param, dtype=torch.float64)


@pytest.fixture(params=MODELS)
def raw(zoo, request):
    return zoo.model(request.param, dtype=torch.float64, processing="none")


@pytest.fixture
def gpt2(zoo):
    return zoo.model("gpt2", dtype=torch.float64)


@pytest.fixture
def cache(model):
    return ActivationCache(run(model)[1], model)
