"""What the analyses never make: logits of every row, a copy of the unembedding, or per-head results."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastinterp
from fastinterp.analyses import Ablation, DirectLogitAttribution, LogitLens
from fastinterp.model import final_logits, forward
from fastinterp.prompts import PromptSet

# Sizes that keep apart what may and what may not be made, in numbers (4 bytes each).
N_PROMPTS, N_POS, N_LAYERS, N_HEADS, D_MODEL, D_MLP, D_VOCAB = 16, 8, 2, 8, 64, 16, 6000
TOKENS = N_PROMPTS * N_POS
RESID = TOKENS * D_MODEL  # 8192
RESULT = RESID * N_HEADS  # 65536, of one layer
LAST_LOGITS = N_PROMPTS * D_VOCAB  # 96000
ALL_LOGITS = TOKENS * D_VOCAB  # 768000
UNEMBED = D_MODEL * D_VOCAB  # 384000
TILE = (1 << 20) // 4  # 262144: the one tile of logits through which log-probabilities go
VARIANTS = N_LAYERS * N_HEADS * RESID  # 131072: the residual streams of all variants, which ablation may hold


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest tensor that an operation made; views of what was there before do not count."""

    def __init__(self):
        super().__init__()
        self.numbers, self.operation = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = set()
        torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: given.add(tensor.untyped_storage().data_ptr()), (args, kwargs or {})
        )
        result = function(*args, **(kwargs or {}))

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes() // tensor.element_size() > self.numbers:
                self.numbers = storage.nbytes() // tensor.element_size()
                self.operation = f"{function}: {tuple(tensor.shape)}"

        torch.utils._pytree.tree_map_only(torch.Tensor, note, result)
        return result


@pytest.fixture(scope="module")
def model(tiny_builders):
    hf_model = tiny_builders["llama"](
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=2,
        vocab_size=D_VOCAB,
    )
    return fastinterp.load(hf_model, device="cpu")


@pytest.fixture(scope="module")
def batch(model):
    tokens = torch.randint(0, D_VOCAB, (N_PROMPTS, N_POS), generator=torch.Generator().manual_seed(0))
    prompts = PromptSet.of(tokens.tolist(), answer=list(range(N_PROMPTS)), wrong=list(range(50, 50 + N_PROMPTS)))
    (batch,) = prompts.tokenize(model).batches(1 << 20)
    return batch


def largest(analysis, model, batch):
    with LargestAllocation() as seen:
        analysis.compute(model, batch)
    return seen


def test_the_instrument_sees_logits_and_results(model, batch):
    with LargestAllocation() as seen:
        resid = forward(model.spec, model.weights, batch.tokens)
    assert RESID <= seen.numbers < 2 * RESID, seen.operation
    with LargestAllocation() as seen:
        final_logits(model.spec, model.weights, resid)
    assert seen.numbers == ALL_LOGITS
    with LargestAllocation() as seen:
        torch.einsum("bphe,hed->bphd", torch.ones(N_PROMPTS, N_POS, N_HEADS, 2), model.weights.blocks[0].W_O)
    assert seen.numbers == RESULT
    with LargestAllocation() as seen:
        model.weights.W_U.t()[:50].unsqueeze(0)
    assert seen.numbers == 0


@pytest.mark.parametrize("unit", ["head", "component", "layer", "neuron"])
@pytest.mark.parametrize("pos", [-1, "all"])
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_attribution_makes_neither_results_nor_logits(model, batch, unit, pos, metric):
    # Stacking the parts of all layers is what the result consists of; 3 residual streams leave room for it.
    seen = largest(DirectLogitAttribution(unit=unit, pos=pos, metric_name=metric), model, batch)
    assert seen.numbers <= 3 * RESID < min(RESULT, LAST_LOGITS, UNEMBED), seen.operation


@pytest.mark.parametrize("pos", [-1, "all"])
@pytest.mark.parametrize("scale", ["own", "frozen"])
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_the_lens_of_a_logit_makes_no_logits(model, batch, pos, scale, metric):
    seen = largest(LogitLens(metric_name=metric, pos=pos, scale=scale), model, batch)
    assert seen.numbers <= 3 * RESID < min(LAST_LOGITS, UNEMBED), seen.operation


@pytest.mark.parametrize(("metric", "pos"), [("logprob", "all"), ("loss", -1)])
def test_the_lens_of_a_probability_goes_through_tiles(model, batch, metric, pos):
    seen = largest(LogitLens(metric_name=metric, pos=pos), model, batch)
    assert seen.numbers <= TILE < min(ALL_LOGITS, UNEMBED), seen.operation


@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_ablation_holds_residual_streams_and_no_logits(model, batch, metric):
    seen = largest(Ablation(metric_names=(metric,)), model, batch)
    assert seen.numbers <= VARIANTS < min(UNEMBED, N_LAYERS * N_HEADS * LAST_LOGITS), seen.operation


@pytest.mark.parametrize("metric", ["logprob", "loss"])
def test_ablation_of_a_probability_goes_through_tiles(model, batch, metric):
    seen = largest(Ablation(metric_names=(metric,)), model, batch)
    assert seen.numbers <= TILE < min(ALL_LOGITS, UNEMBED), seen.operation
