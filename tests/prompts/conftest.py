"""A tiny model with a byte-level tokenizer; its weights are never used."""

import dataclasses

import pytest
import tokenizers
import torch
import transformers

from fastinterp.model.model import Model, Origin
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position
from fastinterp.model.weights import BlockWeights, NormWeights, Weights

CORPUS = ["When Mary and John went to the store, John gave the ring to Mary. Tom and James met them."] * 4


@pytest.fixture(scope="session")
def bpe():
    """Knows the words of ``CORPUS`` as one token each, with their space; other words in pieces."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<bos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@pytest.fixture(scope="session")
def text_model(bpe):
    """Context 16, BOS prepended by default."""
    d_model, d_vocab, n_ctx = 4, len(bpe), 16
    spec = ModelSpec(
        family="test",
        n_layers=1,
        d_model=d_model,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        norm=Norm(kind="layer", eps=1e-5),
        position=Position(kind="learned"),
        attention=Attention(n_heads=2, n_kv_heads=2, d_head=2, scale=1.0, window=(None,)),
        mlp=Mlp(kind="plain", d_mlp=4, activation="gelu"),
    )
    block = BlockWeights(
        ln1=NormWeights(),
        W_QKV=torch.zeros(d_model, 12),
        b_QKV=None,
        W_O=torch.zeros(2, 2, d_model),
        b_O=None,
        ln2=NormWeights(),
        W_gate_in=torch.zeros(d_model, 4),
        b_gate_in=None,
        W_out=torch.zeros(4, d_model),
        b_out=None,
    )
    weights = Weights(
        W_E=torch.zeros(d_vocab, d_model),
        W_pos=torch.zeros(n_ctx, d_model),
        blocks=(block,),
        ln_final=NormWeights(),
        W_U=torch.zeros(d_model, d_vocab),
        b_U=None,
    )
    return Model(spec=spec, weights=weights, tokenizer=bpe, origin=Origin(source="test"))


@pytest.fixture(scope="session")
def id_model(text_model):
    """The same model without a tokenizer."""
    return dataclasses.replace(text_model, tokenizer=None)
