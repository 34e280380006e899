"""A checkpoint of one's own, as the experiments that train take it."""

import dataclasses

import byte_tokenizer as byte_tokens
import jax
import pytest
from tiny_decoder import TINY, random_params

import jmem
import jmem.checkpoints
from jmem.memory import protocol


@pytest.fixture
def attached(monkeypatch):
    """A stand-in for an H200 beside which rows are measured; no program is lowered."""

    def call(function, name, rows, *given, environment):
        assert environment["JAX_PLATFORMS"] == "cpu"  # the GPU belongs to the rows
        return {row: {row: f"hash of {row}"} for row in rows}

    probed = {"device": "NVIDIA H200", "versions": {"jax": jax.__version__}}
    monkeypatch.setattr(protocol, "probe", lambda: probed)
    monkeypatch.setattr(protocol, "call", call)
    return probed


@pytest.fixture
def one_compilation(monkeypatch):
    """Reports of programs compiled once: for tests that tell nothing of intervals.

    `test_lisa.test_measuring_loads_no_weights` has one with its bounds.
    """
    measure = jmem.measure

    def once(program, *, target, bounds=True):
        return measure(program, target=target, bounds=False)

    monkeypatch.setattr(jmem, "measure", once)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token a byte, and the end token: 257 in all."""
    return byte_tokens.byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, byte_tokenizer):
    """A Hugging Face folder of a random tiny Llama with a byte-level tokenizer."""
    config = dataclasses.replace(TINY, vocab_size=264)
    folder = tmp_path_factory.mktemp("own") / "model"
    params = random_params(config, scale=0.02)
    jmem.checkpoints.save(params, config, folder, byte_tokenizer)
    return folder
