"""The cases themselves on a tiny random model, fastinterp against TransformerLens."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measure, models, naive
from benchmarks.cases import CASES, MODULES, ablate, attribution, cache_full, direct_logit_attribution, generate
from benchmarks.harness import QUICK, run_case
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position
from fastinterp.prompts import PromptSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fixtures() -> models.Fixtures:
    hf_model = models.random_gpt2(n_layer=3, n_head=2, n_embd=32, vocab_size=211)
    return models.fixtures_from(hf_model, models.stand_in_tokenizer(), name="tiny", device=CPU, random_tokens=True)


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "N_NEW", 6)
    monkeypatch.setattr(attribution, "N_PAIRS", (3, 9))
    monkeypatch.setattr(attribution, "N_INTEGRALS", (2, 5))
    monkeypatch.setattr(attribution, "STEPS", 3)
    # It takes a second where a process holds as much as a test run does.
    monkeypatch.setattr(measure, "_release_memory", lambda device: None)


@pytest.mark.parametrize("name", sorted(CASES))
def test_case_passes_its_parity_check(name: str, fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_shapes", lambda spec, device: [(64, 64, 64)])
    row = run_case(CASES[name], fixtures, QUICK)
    assert row.status == "ok", row.error
    assert row.case == name
    assert len(row.baselines) > 1


@pytest.mark.parametrize("name", sorted(CASES))
def test_baselines_agree_and_together_cover_the_layout(name: str, fixtures: models.Fixtures) -> None:
    prepared = CASES[name].setup(fixtures)
    results = [baseline.run(range(baseline.n_iterations)) for baseline in prepared.baselines]
    for baseline, found in zip(prepared.baselines, results):
        computed = baseline.computed(range(baseline.n_iterations))
        assert computed.any()
        assert computed.all() or not baseline.alternative, baseline.name
        assert np.isfinite(found[computed]).all(), baseline.name
        assert np.abs(found[computed]).mean() > 0.05, baseline.name
        np.testing.assert_allclose(found[computed], results[0][computed], atol=CASES[name].tolerance, rtol=0)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_head_that_is_wrong_fails_the_case(
    name: str, fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case_module,) = [module for module in MODULES if CASES[name] in module.CASES]
    honest = case_module._fast

    def mistaken(*arguments: Any) -> Any:
        found = honest(*arguments).copy()
        # One head of all prompts, or the last of what there is.
        found[(slice(None), -1, 0) if found.ndim == 3 else -1] += 2 * CASES[name].tolerance
        return found

    monkeypatch.setattr(case_module, "_fast", mistaken)
    assert run_case(CASES[name], fixtures, QUICK).status == "parity failed"


def test_random_workload_is_the_same_for_both_sides(fixtures: models.Fixtures) -> None:
    work = fixtures.workload(5)
    assert work.tokens.shape == (5, models.IOI_TOKENS)
    assert work.n_tokens == 5 * models.IOI_TOKENS
    assert str(work) == "5 prompts x 15 tokens"
    assert [list(prompt) for prompt in work.prompts.prompts] == work.tokens.tolist()
    assert work.prompts.answer == tuple(work.answer.tolist())
    assert work.prompts.wrong == tuple(work.wrong.tolist())
    assert (work.answer != work.wrong).all()
    assert torch.equal(fixtures.workload(5).tokens, work.tokens)


def test_ioi_workload_has_prompts_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that splits at spaces and knows the words it has seen."""
    drawn = PromptSet.of([" ".join(["word"] * n) for n in (14, 3, 14, 14, 3)], answer=[*"abcde"], wrong=[*"fghij"])
    monkeypatch.setattr(models, "ioi", lambda n, *, seed, model: drawn)

    class Words:
        def encode(self, texts: Any) -> list[list[int]]:
            return [[0, *range(len(text.split()))] for text in texts]

        def to_tokens(self, texts: Any) -> torch.Tensor:
            return torch.tensor(self.encode(texts))

        def to_single_token(self, text: str) -> int:
            return ord(text)

    words = Words()
    made = models.Fixtures(name="words", model=words, bridge=words, device=CPU)
    work = made.workload(2)
    assert work.tokens.shape == (2, 15)
    assert work.prompts.answer == ("a", "c")
    assert work.answer.tolist() == [ord("a"), ord("c")]
    assert work.wrong.tolist() == [ord("f"), ord("h")]
    with pytest.raises(ValueError, match="only 3 of 5 IOI prompts have 15 tokens"):
        made.workload(4)


def toy_spec(n_layers: int) -> ModelSpec:
    return ModelSpec(
        family="toy",
        n_layers=n_layers,
        d_model=6,
        d_vocab=11,
        n_ctx=9,
        norm=Norm(kind="rms", eps=1e-5),
        position=Position(kind="learned"),
        attention=Attention(n_heads=2, n_kv_heads=1, d_head=3, scale=1.0, window=(None,) * n_layers),
        mlp=Mlp(kind="gated", d_mlp=5, activation="silu"),
    )


# Two prompts of three tokens that share the first: five distinct beginnings, two of them last.
PROMPTS = torch.tensor([[1, 2, 3], [1, 4, 5]])
MLP, KV = 2 * 3 * 6 * 5, 2 * 6 * (1 + 1) * 3
BLOCK = MLP + KV + 2 * (6 * 2 * 3 + 2 * 3 * 6)


def test_needed_operations_of_an_ablation_counted_one_by_one() -> None:
    total = 0
    for node in ("1", "12", "123", "14", "145"):
        read = len(node) == 3
        total += 2 * BLOCK + (BLOCK if read else KV)
        for layer, _head in itertools.product(range(3), range(2)):
            total += MLP if layer < 2 or read else 0
            total += sum(BLOCK if above < 2 or read else KV for above in range(3) if above > layer)
    assert toy_spec(3).flops_per_token_block() == BLOCK
    assert ablate.needed_flops(toy_spec(3), PROMPTS) == total


def test_needed_operations_of_an_attribution_counted_one_by_one() -> None:
    directions = sum(2 * 3 * 6 + 2 * 3 for _layer, _head in itertools.product(range(2), range(2)))
    expected = 5 * BLOCK + 3 * KV + 2 * BLOCK + 2 * directions
    assert direct_logit_attribution.needed_flops(toy_spec(2), PROMPTS) == expected


def test_needed_operations_of_a_cache_and_of_generation_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unembed = 2 * 6 * 11
    assert cache_full.needed_flops(toy_spec(2), PROMPTS) == sum(2 * BLOCK + unembed for _ in range(2 * 3))
    monkeypatch.setattr(generate, "N_NEW", 4)
    # The three tokens of the prompt, then every new one but the last; four times logits of one position.
    assert generate.needed_flops(toy_spec(2), PROMPTS) == 2 * ((3 + 3) * 2 * BLOCK + 4 * unembed)


def test_needed_operations_of_attributions_counted_one_by_one() -> None:
    """One pair of two prompts of three tokens; queries, output projection and MLP of the last layer once."""
    last, out = 3 * KV + BLOCK - KV, 2 * 6 * 6
    assert attribution.atp_flops(toy_spec(2), 1, 3) == sum(3 * BLOCK + last for _ in ("clean", "corrupt", "gradients"))
    through = {
        ("resid_pre", 0): 3 * BLOCK + last,
        ("resid_pre", 1): last,
        ("z", 0): 3 * (out + MLP) + last,
        ("z", 1): out + MLP,
        ("mlp_out", 0): last,
        ("mlp_out", 1): 0,
    }
    # Both runs; then, for each of four points, forward and backward.
    expected = 2 * (3 * BLOCK + last) + 4 * 2 * sum(through.values())
    assert attribution.integral_flops(toy_spec(2), 1, 3, ("z", "resid_pre", "mlp_out"), 4) == expected


def test_pairs_of_prompts_differ_from_the_first_tokens_on(fixtures: models.Fixtures) -> None:
    pairs = attribution.make_pairs(fixtures, 4, 20)
    assert [list(prompt) for prompt in pairs.prompts.prompts] == pairs.clean.tolist()
    assert [list(prompt) for prompt in pairs.prompts.corrupt or ()] == pairs.corrupt.tolist()
    assert (pairs.clean != pairs.corrupt)[:, :4].any(1).all()


def test_the_tool_that_knows_two_sites_is_not_what_attribution_patching_is_as_fast_as(
    fixtures: models.Fixtures,
) -> None:
    prepared = CASES["atp"].setup(fixtures)
    assert [baseline.name for baseline in prepared.baselines if not baseline.alternative] == ["TransformerLens tool"]


def test_the_bare_forwards_are_not_what_a_cache_is_as_fast_as(fixtures: models.Fixtures) -> None:
    prepared = CASES["cache_full"].setup(fixtures)
    assert {baseline.name: baseline.alternative for baseline in prepared.baselines} == {
        "notebook": True,
        "bare bridge": False,
        "bare fastinterp": False,
    }


def test_the_digest_of_a_cache_looks_at_every_layer_and_kind(fixtures: models.Fixtures) -> None:
    work = fixtures.workload(3)
    logits, cache = naive.full_cache(fixtures.bridge, work.tokens)
    n_layers = fixtures.model.spec.n_layers
    whole = cache_full.digest(logits, cache, n_layers)
    start = logits[:, -1].numel()
    for layer in range(n_layers):
        for site in cache_full.SITES:
            changed = dict(cache.items())
            changed[f"blocks.{layer}.{site}"] = changed[f"blocks.{layer}.{site}"] + 1.0
            differs = (cache_full.digest(logits, changed, n_layers) != whole).nonzero().flatten()
            assert len(differs) == cache_full.N_ENTRIES
            assert int(differs[0]) == start
            start += cache_full.N_ENTRIES
    assert start == len(whole)


@pytest.mark.gpu
def test_cases_on_a_gpu() -> None:
    hf_model = models.random_gpt2(n_layer=2, n_head=2, n_embd=64, vocab_size=211)
    fixtures = models.fixtures_from(
        hf_model, models.stand_in_tokenizer(), name="tiny", device=torch.device("cuda"), random_tokens=True
    )
    for case in CASES.values():
        row = run_case(case, fixtures, QUICK)
        assert row.status == "ok", row.error
        assert row.fast is not None
        assert row.fast.peak_memory_bytes > 0
