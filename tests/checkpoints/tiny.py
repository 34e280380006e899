"""A tiny model in every guise, written by hand and not by the code under test."""

import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
from tiny_decoder import TINY

from jmem.models.config import DecoderConfig
from jmem.nn.rope import Llama3Scaling

VARIANTS = {
    "untied": TINY,
    "tied": dataclasses.replace(TINY, tied=True),
    "biased": dataclasses.replace(TINY, qkv_bias=True, rms_eps=1e-6),
    "biased-tied": dataclasses.replace(TINY, qkv_bias=True, tied=True),
    "scaled": dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=Llama3Scaling()),
    "wide-heads": dataclasses.replace(TINY, head_dim=16),
}

HF_LINEAR = {
    "attention": {n: f"self_attn.{n}_proj" for n in "qkvo"},
    "mlp": {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
HF_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
GGUF_LINEAR = {
    "attention": {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    "mlp": {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}
GGUF_NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}


def torch_tensors(params: dict, naming: str) -> dict[str, np.ndarray]:
    """The tree as a torch state dict would have it, under either naming."""
    linear, norms, layer_name, top = {
        "huggingface": (
            HF_LINEAR,
            HF_NORMS,
            "model.layers.{}.{}",
            ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        ),
        "gguf": (
            GGUF_LINEAR,
            GGUF_NORMS,
            "blk.{}.{}",
            ("token_embd.weight", "output_norm.weight", "output.weight"),
        ),
    }[naming]
    tensors = {
        top[0]: params["embed"]["embedding"],
        top[1]: params["final_norm"]["scale"],
    }
    if "head" in params:
        tensors[top[2]] = params["head"]["kernel"].T
    blocks = params["blocks"]
    for i in range(len(blocks["mlp_norm"]["scale"])):
        for ours, theirs in norms.items():
            name = layer_name.format(i, theirs) + ".weight"
            tensors[name] = blocks[ours]["scale"][i]
        for part, names in linear.items():
            for ours, theirs in names.items():
                name = layer_name.format(i, theirs)
                leaf = blocks[part][ours]
                tensors[name + ".weight"] = leaf["kernel"][i].T
                if "bias" in leaf:
                    tensors[name + ".bias"] = leaf["bias"][i]
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def hf_config(config: DecoderConfig, **more) -> dict:
    """A `config.json` in Hugging Face's words."""
    raw = {
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "architectures": [
            "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"
        ],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "eos_token_id": 2,
    }
    if isinstance(scaling := config.rope_scaling, Llama3Scaling):
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return raw | more


_ST_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int8): "I8",
}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The format, from its description."""
    header, end = {}, 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": _ST_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    data = (value.tobytes() for value in tensors.values())
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def tiny_tokenizer(size: int = TINY.vocab_size):
    """A word-level tokenizer of `size` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "one", "two", "three", "."]
    words += [f"w{i}" for i in range(size - len(words))]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_folder(folder, config, tensors, *, shards=0, tokenizer=None, **more):
    """A Hugging Face folder; with `shards`, as many files and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, **more)))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    if not shards:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        part = {n: v for n, v in tensors.items() if weight_map[n] == shard}
        (folder / shard).write_bytes(safetensors_bytes(part))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llamacpp_permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from rotary halves to neighbouring pairs, as llama.cpp's converter does."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llamacpp_divisors(config: DecoderConfig) -> np.ndarray:
    """Frequency divisors as llama.cpp's converter writes them (the published rule)."""
    scaling, divisors = config.rope_scaling, []
    assert isinstance(scaling, Llama3Scaling)
    for i in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * i / config.head_dim)
        turns = scaling.original_max_positions / wavelength
        if turns > scaling.high_freq_factor:
            divisors.append(1.0)
        elif turns < scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = turns - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)


def gguf_metadata(config: DecoderConfig) -> dict:
    arch = "qwen2" if config.qkv_bias else "llama"
    return {
        f"{arch}.block_count": config.layers,
        f"{arch}.context_length": config.max_positions,
        f"{arch}.embedding_length": config.hidden,
        f"{arch}.feed_forward_length": config.intermediate,
        f"{arch}.attention.head_count": config.heads,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_eps,
    }


def write_gguf(
    path, config, params, *, quantise=None, metadata=(), extra=(), arch=None
):
    """A GGUF file by the package's own writer; `quantise(name) -> type` or None."""
    import gguf

    arch = arch or ("qwen2" if config.qkv_bias else "llama")
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (gguf_metadata(config) | dict(metadata)).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    tensors = torch_tensors(params, "gguf")
    if config.rope_scaling is not None:
        tensors["rope_freqs.weight"] = llamacpp_divisors(config)
    for name, value in {**tensors, **dict(extra)}.items():
        if arch == "llama" and ".attn_q." in name:
            value = llamacpp_permuted(value, config.heads)
        if arch == "llama" and ".attn_k." in name:
            value = llamacpp_permuted(value, config.kv_heads)
        kind = quantise(name) if quantise and value.ndim == 2 else None
        if kind is None:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bytes(fields=(), infos=(), data=b"", *, version=3, counts=None, alignment=32):
    """A GGUF file from its description, as wrong as wanted.

    fields: (key, type number, payload bytes); infos: (name, sizes innermost first, type
    number, offset).
    """

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    n_tensors, n_fields = counts or (len(infos), len(fields))
    raw = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)
    for key, kind, payload in fields:
        raw += text(key) + struct.pack("<I", kind) + payload
    for name, sizes, kind, offset in infos:
        raw += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        raw += struct.pack("<IQ", kind, offset)
    return raw + b"\0" * (-len(raw) % alignment) + data
