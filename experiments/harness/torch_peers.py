"""What torch, transformers, PEFT and kvpress take where `experiments.peers` compares.

Each contender runs in a process of its own, on an attached GPU, with random weights of
the published sizes in bfloat16. The packages are no dependencies: they are imported
where they are used. Written against the sources of torch 2.15, transformers 5.24, PEFT
0.21 and kvpress 0.5.5, which needs transformers 4.56 to 5.2; names that differ between
those are chosen by what is there. With the first three, steps and decoding were tried
in small on a CPU; kvpress and everything on a GPU were not.
"""

import importlib.metadata
import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from jmem.checkpoints.huggingface import render_config
from jmem.memory.card import NoGPUError
from jmem.models import zoo

WARM_UP = 4
"""Runs before those that are timed; torch compiles in the first."""


def find_missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that cannot be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def measure(row: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`ms` of a step, a token or a call, `peak_bytes` of torch's allocator and
    `card_bytes`, all that the driver then counts as used; of a cache `cache_bytes`.

    Raises:
      NoGPUError: torch has none.
    """
    torch = import_module("torch")

    if not torch.cuda.is_available():
        raise NoGPUError(f"torch {torch.__version__} sees no CUDA GPU.")
    part, _, how = row.partition("-")
    found = MEASURES[part](torch, how, config)
    names = ("torch", "transformers", "peft", "kvpress")
    there = [name for name in names if not find_missing([name])]
    versions = {name: importlib.metadata.version(name) for name in there}
    return found | {"packages": versions}


def time_runs(torch: Any, run: Callable[[], Any], runs: int) -> dict[str, Any]:
    """The median of the runs after `WARM_UP`, and their memory."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    free, total = torch.cuda.mem_get_info()
    return {
        "ms": 1e3 * statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "card_bytes": total - free,
    }


def build_model(torch: Any, name: str) -> Any:
    """A model of jmem.models.zoo as transformers', on the GPU."""
    transformers = import_module("transformers")

    raw = render_config(zoo.get(name), np.dtype("float32"))
    kind = raw.pop("model_type")
    given = {key: raw[key] for key in raw.keys() - {"architectures", "torch_dtype"}}
    config = transformers.AutoConfig.for_model(kind, **given)
    torch.manual_seed(0)
    how = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, **how)


# Training -----------------------------------------------------------------------------


def train(torch: Any, how: str, config: Mapping, adapt: Callable) -> dict[str, Any]:
    """A step of `adapt(model)`'s parameters, blocks computed again going backward.

    torch's AdamW, fused, has moments in the dtype of what it trains.
    """
    model = build_model(torch, config["model"])
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model = adapt(model).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    shape = (config["batch_size"], config["seq_len"])
    tokens = torch.randint(model.config.vocab_size, shape, device="cuda")
    run = torch.compile(model) if how.endswith("compiled") else model

    def step():
        run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_runs(torch, step, config["runs"])


def train_full(torch: Any, how: str, config: Mapping) -> dict[str, Any]:
    """AdamW of every weight, its moments in bfloat16 as the weights."""
    return train(torch, how, config, lambda model: model)


def train_lora(torch: Any, how: str, config: Mapping) -> dict[str, Any]:
    """PEFT's LoRA on every map of the blocks; adapters in float32, as it does."""
    peft = import_module("peft")

    lora = peft.LoraConfig(
        r=config["rank"],
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return train(torch, how, config, lambda model: peft.get_peft_model(model, lora))


# Decoding -----------------------------------------------------------------------------


def decode(torch: Any, how: str, config: Mapping) -> dict[str, Any]:
    """A token of every row from a static cache that holds the prompt."""
    transformers = import_module("transformers")

    model = build_model(torch, config["decoder"]).eval()
    prompt, steps = config["prompt"], WARM_UP + config["steps"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + steps)
    with torch.no_grad():
        extend(torch, model, cache, config, at=0)()  # allocates it, and not compiled
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            count: Any = getattr(layer, "cumulative_length", None)
            if torch.is_tensor(count):
                count.fill_(prompt)
        run = model.forward
        if how.endswith("compiled"):
            run = torch.compile(run, mode="reduce-overhead", fullgraph=True)
        step = extend(torch, model, cache, config, at=prompt, run=run)
        found = time_runs(torch, step, config["steps"])
    return found | {"cache_bytes": count_bytes(cache)}


def decode_snapkv(torch: Any, how: str, config: Mapping) -> dict[str, Any]:
    """A token of every row from what kvpress' SnapKV leaves of the prompt."""
    kvpress = import_module("kvpress")
    transformers = import_module("transformers")

    del how
    model = build_model(torch, config["decoder"]).eval()
    prompt = config["prompt"]
    share = max(0.0, 1 - config["capacity"] / prompt)
    press = kvpress.SnapKVPress(compression_ratio=share)
    cache = transformers.DynamicCache()
    shape = (config["rows"], prompt)
    tokens = torch.randint(model.config.vocab_size, shape, device="cuda")
    with torch.no_grad():
        with press(model):  # it reads the cache by this name
            model.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        kept = count_bytes(cache)
        step = extend(torch, model, cache, config, at=prompt, grows=True)
        found = time_runs(torch, step, config["steps"])
    return found | {"cache_bytes": kept}


def extend(
    torch: Any,
    model: Any,
    cache: Any,
    config: Mapping,
    *,
    at: int,
    run: Callable | None = None,
    grows: bool = False,
) -> Callable[[], None]:
    """What decodes a token greedily at position `at`, then at the next one.

    `grows`: the cache counts its own tokens, which are fewer than the positions.
    """
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    tokens = torch.zeros((config["rows"], 1), dtype=torch.long, device="cuda")
    position = torch.full((1,), at, device="cuda")
    given: dict[str, Any] = {name: cache, "use_cache": True}
    if "cache_position" in known and not grows:
        given["cache_position"] = position

    def step():
        where = position[None].expand(config["rows"], 1)
        out = (run or model)(input_ids=tokens, position_ids=where, **given)
        tokens.copy_(out.logits[:, -1:].argmax(-1))
        position.add_(1)

    return step


def count_bytes(cache: Any) -> int:
    """Bytes of a cache's keys and values."""
    return sum(one.nbytes for own in cache.layers for one in (own.keys, own.values))


# Attention ----------------------------------------------------------------------------


def attend(torch: Any, how: str, config: Mapping) -> dict[str, Any]:
    """A call of one layer's decoding attention, over caches the GPU cannot keep near.

    As `jmem.kernels.windowed_attention.bench` times ours: each output is the next
    query. "sdpa" lets torch choose, "cudnn" asks for cuDNN.
    """
    attention = import_module("torch.nn.attention")
    functional = torch.nn.functional

    own, rows = zoo.get(config["decoder"]), config["rows"]
    shape = (rows, own.kv_heads, config["prompt"], own.head_dim)
    how_made = {"device": "cuda", "dtype": torch.bfloat16}
    caches = [
        (torch.randn(shape, **how_made), torch.randn(shape, **how_made))
        for _ in range(config["regions"])
    ]
    query = torch.randn((rows, own.heads, 1, own.head_dim), **how_made)
    kinds = attention.SDPBackend
    some = [kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.CUDNN_ATTENTION]
    backends = [kinds.CUDNN_ATTENTION] if how == "cudnn" else some

    def run():
        out = query
        for keys, values in caches:
            call = functional.scaled_dot_product_attention
            out = call(out, keys, values, enable_gqa=own.heads != own.kv_heads)

    with torch.no_grad(), attention.sdpa_kernel(backends):
        found = time_runs(torch, run, config["steps"])
    size = sum(one.nbytes for one in caches[0])
    return found | {"ms": found["ms"] / len(caches), "cache_bytes": size}


MEASURES = {
    "lora": train_lora,
    "full": train_full,
    "decode": decode,
    "snapkv": decode_snapkv,
    "attention": attend,
}
"""By the first word of a row; the others say how."""
