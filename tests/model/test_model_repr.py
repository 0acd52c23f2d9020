"""What a model and a run print as: a line, not their weights."""

import torch

import fastinterp


def test_a_model_and_a_run_print_a_line(zoo):
    model = zoo.model("llama-gqa")
    for shown in (repr(model), repr(fastinterp.HookedTransformer(model)), repr(model.run(torch.tensor([[1, 2, 3]])))):
        assert len(shown) < 400
        assert "tensor" not in shown
    assert "3 layers" in repr(model)
    assert "captured: z" in repr(model.run(torch.tensor([[1, 2, 3]]), capture=["z"]))
