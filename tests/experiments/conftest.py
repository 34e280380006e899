"""A checkpoint of one's own, as the experiments that train take it."""

import dataclasses

import pytest
from tiny_decoder import TINY, random_params

import jmem.checkpoints


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token a byte, and the end token: 257 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, byte_tokenizer):
    """A Hugging Face folder of a random tiny Llama with a byte-level tokenizer."""
    config = dataclasses.replace(TINY, vocab_size=264)
    folder = tmp_path_factory.mktemp("own") / "model"
    params = random_params(config, scale=0.02)
    jmem.checkpoints.save(params, config, folder, byte_tokenizer)
    return folder
