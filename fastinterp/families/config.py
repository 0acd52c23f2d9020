"""Reads a model's config strictly: every key is used, known to be harmless, or refused by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastinterp.errors import UnsupportedConfigError

# Keys of any Hugging Face config that do not change what the forward computes.
HARMLESS = frozenset(
    {
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "dropout",
        "dtype",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "layerdrop",
        "mlp_dropout",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "unk_token_id",
        "use_bidirectional_attention_mask",
        "use_cache",
    }
)


class Config:
    """A config whose reads are recorded, so that what nobody read can be refused."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of ``key``, or ``default`` where it is missing or null."""
        self._used.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """Returns the value of ``key``; raises :class:`UnsupportedConfigError` if it is missing."""
        value = self.get(key)
        if value is None:
            raise UnsupportedConfigError(f"the config lacks {key!r}")
        return value

    def expect(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """Returns the value of ``key``, which must be one of ``allowed``."""
        value = self.get(key, default)
        allowed = tuple(allowed)
        if value not in allowed:
            listed = " or ".join(repr(item) for item in allowed)
            raise UnsupportedConfigError(f"config {key}={value!r} is not supported: only {listed}")
        return value

    def convert(self, key: str, table: Mapping[Any, Any], default: Any = None) -> Any:
        """Returns what ``table`` holds for the value of ``key``."""
        return table[self.expect(key, table, default)]

    def refuse_unread(self, is_default: Callable[[str, Any], bool]) -> None:
        """Raises for the first key that nobody read and that is not harmless, null, or at the library's default."""
        for key, value in self._values.items():
            # Keys that begin with an underscore are bookkeeping of the library.
            if key.startswith("_") or key in self._used or key in HARMLESS or value is None or is_default(key, value):
                continue
            raise UnsupportedConfigError(
                f"config {key}={value!r} is not supported (fastinterp does not know what it changes)"
            )
