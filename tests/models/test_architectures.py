"""GPT-2, OPT and Phi-2 from Hugging Face's files to logits, and back to the files.

The oracle reads the files' own tensors, by their published names and layouts, and
computes the published equations in float64: nothing of ours lies between.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import copy
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoder import random_params

from jmem import checkpoints
from jmem.checkpoints import names
from jmem.checkpoints.files import CheckpointError
from jmem.finetune.adapters import attach
from jmem.finetune.lora import Lora, lora_linear
from jmem.generate.decode import generate
from jmem.models import zoo
from jmem.models.decoder import Decoder, DecoderConfig
from jmem.models.next_token import token_positions
from jmem.nn.stack import run_stack

VOCAB, LAYERS, WIDTH, INNER, HEADS, POSITIONS = 48, 3, 32, 72, 4, 24


def linear(name, outputs, inputs, bias=True):
    """Shapes of torch's Linear."""
    shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def conv1d(name, outputs, inputs):
    """Shapes of GPT-2's Conv1D."""
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def gpt2_shapes(raw):
    del raw
    shapes = {"transformer.wte.weight": (VOCAB, WIDTH)}
    shapes |= {"transformer.wpe.weight": (POSITIONS, WIDTH)}
    for i in range(LAYERS):
        at = f"transformer.h.{i}"
        shapes |= norm(f"{at}.ln_1") | norm(f"{at}.ln_2")
        shapes |= conv1d(f"{at}.attn.c_attn", 3 * WIDTH, WIDTH)
        shapes |= conv1d(f"{at}.attn.c_proj", WIDTH, WIDTH)
        shapes |= conv1d(f"{at}.mlp.c_fc", INNER, WIDTH)
        shapes |= conv1d(f"{at}.mlp.c_proj", WIDTH, INNER)
    return shapes | norm("transformer.ln_f")


def opt_shapes(raw):
    bias = raw.get("enable_bias", True)
    shapes = {"model.decoder.embed_tokens.weight": (VOCAB, WIDTH)}
    shapes |= {"model.decoder.embed_positions.weight": (POSITIONS + 2, WIDTH)}
    for i in range(LAYERS):
        at = f"model.decoder.layers.{i}"
        shapes |= norm(f"{at}.self_attn_layer_norm") | norm(f"{at}.final_layer_norm")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{at}.self_attn.{name}", WIDTH, WIDTH, bias)
        shapes |= linear(f"{at}.fc1", INNER, WIDTH, bias)
        shapes |= linear(f"{at}.fc2", WIDTH, INNER, bias)
    return shapes | norm("model.decoder.final_layer_norm")


def phi_shapes(raw):
    keys = WIDTH * raw.get("num_key_value_heads", HEADS) // HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= norm(f"{at}.input_layernorm")
        shapes |= linear(f"{at}.self_attn.q_proj", WIDTH, WIDTH)
        shapes |= linear(f"{at}.self_attn.k_proj", keys, WIDTH)
        shapes |= linear(f"{at}.self_attn.v_proj", keys, WIDTH)
        shapes |= linear(f"{at}.self_attn.dense", WIDTH, WIDTH)
        shapes |= linear(f"{at}.mlp.fc1", INNER, WIDTH)
        shapes |= linear(f"{at}.mlp.fc2", WIDTH, INNER)
    shapes |= norm("model.final_layernorm")
    return shapes | linear("lm_head", VOCAB, WIDTH)


class Weights:
    """The tensors of one file in float64, applied as torch's modules apply them."""

    def __init__(self, tensors, eps):
        self.tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
        self.eps = eps

    def __getitem__(self, name):
        return self.tensors[f"{name}.weight"]

    def bias(self, name):
        return self.tensors.get(f"{name}.bias", 0.0)

    def linear(self, name, x):
        return x @ self[name].T + self.bias(name)

    def conv1d(self, name, x):
        return x @ self[name] + self.bias(name)

    def norm(self, name, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normal = (x - mean) / np.sqrt(variance + self.eps)
        return normal * self[name] + self.bias(name)


def attention(q, k, v, turn=lambda x: x):
    """Causal, one head at a time; each key head serves as many query heads."""
    length, dim = len(q), WIDTH // HEADS
    q, k, v = (x.reshape(length, -1, dim) for x in (q, k, v))
    heads = []
    for head in range(HEADS):
        group = head * k.shape[1] // HEADS
        scores = turn(q[:, head]) @ turn(k[:, group]).T / math.sqrt(dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
    return np.concatenate(heads, axis=1)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * np.vectorize(lambda v: (1 + math.erf(v / 2**0.5)) / 2)(x),
    "gelu_new": lambda x: (
        x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


def gpt2_logits(tensors, raw, ids):
    w = Weights(tensors, raw["layer_norm_epsilon"])
    activate = ACTIVATIONS[raw["activation_function"]]
    x = w["transformer.wte"][ids] + w["transformer.wpe"][: len(ids)]
    for i in range(LAYERS):
        at = f"transformer.h.{i}"
        fused = w.conv1d(f"{at}.attn.c_attn", w.norm(f"{at}.ln_1", x))
        q, k, v = fused[:, :WIDTH], fused[:, WIDTH : 2 * WIDTH], fused[:, 2 * WIDTH :]
        x = x + w.conv1d(f"{at}.attn.c_proj", attention(q, k, v))
        inner = activate(w.conv1d(f"{at}.mlp.c_fc", w.norm(f"{at}.ln_2", x)))
        x = x + w.conv1d(f"{at}.mlp.c_proj", inner)
    head = "transformer.wte" if raw.get("tie_word_embeddings", True) else "lm_head"
    return w.norm("transformer.ln_f", x) @ w[head].T


def opt_logits(tensors, raw, ids):
    w = Weights(tensors, 1e-5)  # torch's default: the configuration has no field
    table = w["model.decoder.embed_positions"]
    x = w["model.decoder.embed_tokens"][ids] + table[np.arange(len(ids)) + 2]
    for i in range(LAYERS):
        at = f"model.decoder.layers.{i}"
        h = w.norm(f"{at}.self_attn_layer_norm", x)
        q, k, v = (w.linear(f"{at}.self_attn.{n}_proj", h) for n in "qkv")
        x = x + w.linear(f"{at}.self_attn.out_proj", attention(q, k, v))
        h = w.norm(f"{at}.final_layer_norm", x)
        x = x + w.linear(f"{at}.fc2", np.maximum(w.linear(f"{at}.fc1", h), 0))
    x = w.norm("model.decoder.final_layer_norm", x)
    return x @ w["model.decoder.embed_tokens"].T


def phi_logits(tensors, raw, ids):
    w = Weights(tensors, raw["layer_norm_eps"])
    activate = ACTIVATIONS[raw["hidden_act"]]
    dim = int(WIDTH // HEADS * raw["partial_rotary_factor"])
    half = dim // 2
    angles = np.arange(len(ids))[:, None] / raw["rope_theta"] ** (
        np.arange(0, dim, 2) / dim
    )

    def turn(x):
        a, b, rest = x[:, :half], x[:, half:dim], x[:, dim:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=1)

    x = w["model.embed_tokens"][ids]
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        h = w.norm(f"{at}.input_layernorm", x)
        q, k, v = (w.linear(f"{at}.self_attn.{n}_proj", h) for n in "qkv")
        attended = w.linear(f"{at}.self_attn.dense", attention(q, k, v, turn))
        inner = activate(w.linear(f"{at}.mlp.fc1", h))
        x = attended + w.linear(f"{at}.mlp.fc2", inner) + x
    return w.linear("lm_head", w.norm("model.final_layernorm", x))


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "eos_token_id": 47,
    "layer_norm_epsilon": 1e-5,
    "n_ctx": POSITIONS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_positions": POSITIONS,
    "vocab_size": VOCAB,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": INNER,
    "hidden_size": WIDTH,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": WIDTH,
}
PHI = {
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "hidden_act": "gelu_new",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}

MODELS = {
    "gpt2": (GPT2, gpt2_shapes, gpt2_logits),
    "gpt2, exact gelu": (
        GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        gpt2_shapes,
        gpt2_logits,
    ),
    "gpt2, untied": (
        GPT2 | {"tie_word_embeddings": False},
        lambda raw: gpt2_shapes(raw) | linear("lm_head", VOCAB, WIDTH, bias=False),
        gpt2_logits,
    ),
    "opt": (OPT, opt_shapes, opt_logits),
    "opt, no biases": (OPT | {"enable_bias": False}, opt_shapes, opt_logits),
    "phi": (PHI, phi_shapes, phi_logits),
    "phi, grouped": (
        PHI
        | {"num_key_value_heads": 2, "partial_rotary_factor": 0.8, "hidden_act": "gelu"}
        | {"rope_theta": 500.0, "layer_norm_eps": 1e-3},
        phi_shapes,
        phi_logits,
    ),
}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))


def random_tensors(shapes, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return {
        name: (0.5 * random.standard_normal(shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def write(folder, raw, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def forward(model, params, tokens, ops=None):
    ops = ops or model.ops
    positions = token_positions(tokens)
    x = model.embed(params, tokens, positions)
    x, _, _ = run_stack(model.block, params["blocks"], x, positions, ops)
    return model.head(params, x, ops)


@EVERY_MODEL
def test_logits_are_those_of_the_files(tmp_path, model, strict_dtypes):
    raw, shapes, reference = model
    tensors = random_tensors(shapes(raw))
    checkpoint = checkpoints.load(write(tmp_path / "m", raw, tensors))
    decoder = Decoder(checkpoint.config)
    params = checkpoint.params()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, POSITIONS))
    expected = np.stack([reference(tensors, raw, ids) for ids in tokens])
    found = jax.jit(lambda p, t: forward(decoder, p, t))(params, jnp.asarray(tokens))
    # float32 through three blocks: rounding grows with the logits' size.
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance)


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_what_is_saved_is_what_was_read(tmp_path, model, dtype):
    raw, shapes, _ = model
    tensors = random_tensors(shapes(raw), dtype)
    checkpoint = checkpoints.load(write(tmp_path / "m", raw, tensors))
    params = checkpoint.params()
    abstract = Decoder(checkpoint.config, dtype=dtype).abstract()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    checkpoints.save(params, checkpoint.config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        if name.endswith("embed_positions.weight"):
            value[:2] = 0  # no position reads them
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    again = checkpoints.load(tmp_path / "out", expect=checkpoint.config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert again.config == checkpoint.config
    assert written["architectures"] == raw["architectures"]


def test_files_of_the_bare_model_and_buffers_are_understood(tmp_path):
    """The published gpt2 has no prefix, and stores its causal mask."""
    raw, shapes, _ = MODELS["gpt2"]
    tensors = random_tensors(shapes(raw))
    expected = checkpoints.load(write(tmp_path / "m", raw, tensors)).params()
    bare = {name.removeprefix("transformer."): v for name, v in tensors.items()}
    mask = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.uint8))
    for i in range(LAYERS):
        bare[f"h.{i}.attn.bias"] = mask
        bare[f"h.{i}.attn.masked_bias"] = np.float32(-1e4).reshape(1)
    found = checkpoints.load(write(tmp_path / "bare", raw, bare)).params()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_fused_tensor_of_another_width_is_named(tmp_path):
    raw, shapes, _ = MODELS["gpt2"]
    tensors = random_tensors(shapes(raw))
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = tensors[name][:, :-1].copy()
    folder = write(tmp_path / "m", raw, tensors)
    with pytest.raises(CheckpointError, match=r"c_attn.weight' has shape \(32, 95\)"):
        checkpoints.load(folder)


def test_parts_of_a_fused_tensor_share_their_dtype(tmp_path):
    raw, shapes, _ = MODELS["gpt2"]
    checkpoint = checkpoints.load(
        write(tmp_path / "m", raw, random_tensors(shapes(raw)))
    )
    params = checkpoint.params()
    q = params["blocks"]["attention"]["q"]
    q["kernel"] = q["kernel"].astype(jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"attention/q/kernel.*one tensor"):
        checkpoints.save(params, checkpoint.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def config_of(name: str, **changes) -> DecoderConfig:
    sizes = {"vocab_size": VOCAB, "layers": 2, "hidden": 32, "intermediate": 48}
    sizes |= {"heads": 4, "kv_heads": 4, "head_dim": 8, "max_positions": 32}
    if zoo.get(name).rotary_dim:
        sizes["rotary_dim"] = 4
    return dataclasses.replace(zoo.get(name), **(sizes | changes))


TINY = {name: config_of(name) for name in ("gpt2", "opt-125m", "phi-2")} | {
    "mistral": config_of("mistral-7b", kv_heads=2, sliding_window=4)
}


@pytest.mark.parametrize("config", TINY.values(), ids=list(TINY))
def test_cached_decoding_equals_recomputing_everything(config):
    model = Decoder(config)
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.8))
    prompts = [[5, 9, 1, 30, 7, 22], [7], [2, 2, 40]]
    found = generate(model, params, prompts, max_new_tokens=10)
    logits = jax.jit(lambda tokens: forward(model, params, tokens))
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt) + 10] = prompt + answer
        likeliest = np.asarray(logits(jnp.asarray(tokens)))[0].argmax(-1)
        first = len(prompt) - 1
        assert answer == likeliest[first : first + 10].tolist()
    assert len({token for row in found for token in row}) > 3  # not one repeated


def test_adapters_fit_a_plain_mlp():
    """LoRA finds the maps that are there: six, without a gate."""
    config = TINY["phi-2"]
    model = Decoder(config)
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.3))
    lora = Lora(rank=2)
    adapters = lora.adapters(params["blocks"], jax.random.key(0))
    assert {*adapters["attention"], *adapters["mlp"]} == {*"qkvo", "up", "down"}
    ops = model.ops._replace(linear=lora_linear(lora.scale))
    tokens = jnp.arange(8, dtype=jnp.int32)[None]

    def loss(adapters):
        blocks = attach(params["blocks"], adapters)
        return forward(model, params | {"blocks": blocks}, tokens, ops).sum()

    grads = jax.jit(jax.grad(loss))(adapters)
    for part in ("attention", "mlp"):
        for leaf in grads[part].values():
            assert (np.abs(np.asarray(leaf["lora_b"])).max(axis=(1, 2)) > 0).all()


def test_positions_beyond_the_table_are_refused():
    config = TINY["gpt2"]
    model = Decoder(config)
    with pytest.raises(ValueError, match=r"33 tokens a row exceed max_positions=32"):
        jax.eval_shape(
            model.embed, model.abstract(), jax.ShapeDtypeStruct((1, 33), jnp.int32)
        )


def test_learned_positions_count_from_zero_if_not_given():
    model = Decoder(TINY["gpt2"])
    params = jax.tree.map(jnp.asarray, random_params(TINY["gpt2"]))
    tokens = jnp.asarray([[3, 3, 9], [1, 3, 3]], jnp.int32)
    embed = jax.jit(model.embed)
    np.testing.assert_array_equal(
        embed(params, tokens), embed(params, tokens, token_positions(tokens))
    )


REFUSED = {
    "positions": ({"positions": "learnt"}, "positions='learnt' is not one of rotary"),
    "norm": ({"norm": "batch"}, "norm='batch' is not one of rms, layer"),
    "activation": ({"activation": "tanh"}, "activation='tanh' is not one of silu, ge"),
    "window": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    "rotary_dim odd": ({"rotary_dim": 3}, "rotary_dim=3 must be even"),
    "rotary_dim wide": ({"rotary_dim": 10}, "rotary_dim=10 must be even, from 2 to he"),
    "rotary_dim 0": ({"rotary_dim": 0}, "rotary_dim=0 must be even, from 2"),
    "tied bias": ({"tied": True}, "head_bias=True needs a head of its own, but tied"),
    "learned turn": ({"positions": "learned"}, "rotary_dim=4 and rope_scaling=None me"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=list(REFUSED))
def test_a_decoder_that_means_nothing_is_refused(changes, message):
    config = copy.copy(TINY["phi-2"])
    for name, value in changes.items():  # the tests' type check would be first
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


NAMELESS = {
    "a gated GPT-2": ("gpt2", {"gated": True}),
    "half the biases": ("gpt2", {"o_bias": False}),
    "a Phi-2 in sequence": ("phi-2", {"parallel": False}),
    "Phi-2 with a window": ("phi-2", {"sliding_window": 8}),
    "an OPT of another eps": ("opt-125m", {"rms_eps": 1e-6}),
    "GPT-2 of grouped keys": ("gpt2", {"kv_heads": 2}),
    "Mistral with gelu": ("mistral", {"activation": "gelu"}),
}


@pytest.mark.parametrize("name, changes", NAMELESS.values(), ids=list(NAMELESS))
def test_what_nobody_published_has_no_names(tmp_path, name, changes):
    """It computes, but a file of it could be read by nobody."""
    config = dataclasses.replace(TINY[name], **changes)
    with pytest.raises(CheckpointError, match=r"no published architecture is a deco"):
        checkpoints.save(random_params(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_of_the_zoo_has_names(name):
    config = zoo.get(name)
    table = {
        leaf.path: (config.layers, *leaf.shape) if leaf.stacked else leaf.shape
        for leaf in names.list_leaves(config)
    }
    tree = jax.tree.leaves_with_path(Decoder(config).abstract())
    assert table == {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in tree
    }
    assert all(leaf.huggingface[0] != "." for leaf in names.list_leaves(config))
