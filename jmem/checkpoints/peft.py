"""LoRA adapters in and out of the folders that Hugging Face's PEFT reads and writes.

    found = jmem.checkpoints.load_adapter("my-lora", checkpoint.config)
    lora = Lora(**found.settings)               # rank, alpha, maps, rslora, dropout
    state = lora.init(model, params, key, found.adapters)
    jmem.checkpoints.save_adapter(state["lora"], config, "out", alpha=lora.alpha)

Format   adapter_config.json, and adapter_model.safetensors with two tensors for each
         adapted map of each layer: `lora_A.weight` [r, in], `lora_B.weight` [out, r],
         below the map's own name with `base_model.model.` before it.
Checks   What PEFT would compute otherwise than y = x W + scale * x A B on whole stacks
         of layers is refused by name: DoRA and other variants, biases, trained
         embeddings, a rank or alpha of some layers' own, initialisations that changed
         the base. A field unknown here is refused unless it is empty or false.
Differs  PEFT fills what a file lacks with fresh adapters, and warns; here it is an
         error. Maps chosen by a regular expression are those the file holds: a pattern
         of somebody else's is not run.
Source   huggingface/peft 0.20: utils/save_and_load.py, tuners/lora/{config,layer}.py,
         tuners/tuners_utils.py (what a target names).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmem.checkpoints import fields, layout, safetensors
from jmem.checkpoints.fields import unsupported
from jmem.checkpoints.files import (
    CheckpointError,
    LazyTensor,
    must_be_free,
    parse_json,
    read_whole,
    staged,
    write_text,
)
from jmem.checkpoints.names import leaves
from jmem.models.decoder import DecoderConfig
from jmem.program import by_key

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_CONFIG_LIMIT = 1 << 24
"""Longest adapter_config.json, in bytes."""
_PREFIX = "base_model.model."
"""PEFT's two wrappers around a model."""
_DTYPES = ", ".join(map(str, layout.WEIGHT_DTYPES))

_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "base_model_name_or_path"),
)
_HARMLESS = (
    *("auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"),
    # They matter beside a field that is refused, or to tensors that are.
    *("layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
"""Fields that change no value of an adapter that passes all other checks."""
_NEUTRAL: Mapping[str, tuple] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    # The other kinds of start were subtracted from the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Fields that must be absent or hold one of these values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a PEFT folder holds."""

    settings: dict[str, Any]
    """rank, alpha, maps, rslora, dropout: the fields of `jmem.finetune.lora.Lora`."""
    adapters: dict = dataclasses.field(repr=False)
    """{"attention": {"q": {"lora_a", "lora_b"}}, ...}: lora_a [L, in, rank] and lora_b
    [L, rank, out], JAX arrays, as stored (float32 if stored in several dtypes)."""
    base: str | None
    """The model it was trained on, as the file says."""


@dataclasses.dataclass(frozen=True)
class _Map:
    """A linear map of the blocks, [in, out], and its names."""

    path: str
    """In the tree of a block: "attention/q"."""
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    """Hugging Face's, layer by layer: "model.layers.0.self_attn.q_proj"."""
    transposed: bool
    """Stored [out, in], as a torch Linear is; GPT-2's Conv1D is stored [in, out]."""

    def halves(self, rank: int) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
        """(path of our leaf, PEFT's shape, PEFT's names by layer) of A and of B."""
        inputs, outputs = self.shape
        for half, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
            names = [_tensor(module, half) for module in self.modules]
            yield f"{self.path}/lora_{half}", shape, names


def _tensor(module: str, half: str) -> str:
    return f"{_PREFIX}{module}.lora_{half.upper()}.weight"


def _maps(config: DecoderConfig) -> tuple[_Map, ...]:
    """The linear maps of the decoder's blocks that are a module of their own.

    GPT-2's q, k and v are not: an adapter of theirs has one A for all three.
    """
    suffix = "/kernel"
    return tuple(
        _Map(
            leaf.path.removeprefix("blocks/").removesuffix(suffix),
            leaf.shape,
            tuple(
                name.removesuffix(".weight")
                for name in leaf.names("huggingface", config.layers)
            ),
            leaf.transposed,
        )
        for leaf in leaves(config)
        if leaf.stacked and leaf.path.endswith(suffix) and leaf.part is None
    )


def load_adapter(folder: str | os.PathLike[str], config: DecoderConfig) -> Adapter:
    """Reads a PEFT folder of LoRA or rank-stabilised LoRA for the decoder `config`.

    Raises:
      CheckpointError: a file is missing or damaged; the adapter computes something
        else (names the field), or belongs to another base (names tensor and shapes).
    """
    folder = Path(folder)
    where = folder / CONFIG
    raw = parse_json(read_whole(where, _CONFIG_LIMIT), str(where))
    _check_kind(raw, _maps(config)[0].transposed, str(where))
    rank = fields.size(raw, "r", str(where))
    settings = {
        "rank": rank,
        "alpha": fields.number(raw, "lora_alpha", str(where)),
        "rslora": fields.flag(raw, "use_rslora", str(where)),
        "dropout": _dropout(raw, str(where)),
    }
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise unsupported(str(where), "base_model_name_or_path", base, "a name")

    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder}: holds adapter_model.bin, a pickle, which is never opened; save "
            "the adapter again with PEFT, as safetensors."
        )
    tensors = safetensors.read_file(folder / WEIGHTS)
    adapted = _adapted(raw, config, tensors, str(where))
    found = _match(adapted, rank, tensors, str(folder / WEIGHTS), base)
    settings["maps"] = tuple(one.path.rpartition("/")[2] for one in adapted)
    return Adapter(settings=settings, adapters=_assemble(found), base=base)


def save_adapter(
    adapters: Mapping,
    config: DecoderConfig,
    folder: str | os.PathLike[str],
    *,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    base: str | None = None,
) -> None:
    """Writes a folder that PEFT opens (`PeftModel.from_pretrained(model, folder)`).

    Rank and maps are those of `adapters`, whose values keep their dtype. The folder
    appears whole or not at all.

    Args:
      adapters: the tree of `jmem.finetune.lora.Lora`, JAX or NumPy arrays.
      config: the decoder they belong to.
      folder: one that is absent or empty.
      alpha: the product is scaled by alpha / rank ...
      rslora: ... or by alpha / sqrt(rank).
      dropout: what they were trained with; PEFT goes on with it.
      base: name or folder of the base model. PEFT reads it where no model is given.

    Raises:
      CheckpointError: `adapters` does not fit `config`, the folder exists and is not
        empty, or it cannot be written.
    """
    folder = Path(folder)
    rank, maps, tensors = _disassemble(adapters, config)
    others = [one for one in _maps(config) if one not in maps]
    raw = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": not maps[0].transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({_target(one, others) for one in maps}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }
    fields.number(raw, "lora_alpha", "save_adapter")
    _dropout(raw, "save_adapter")
    must_be_free(folder)
    with staged(folder, layout.total_bytes(tensors)) as stage:
        stage.mkdir()
        write_text(stage / CONFIG, json.dumps(raw, indent=2, sort_keys=True) + "\n")
        safetensors.write(stage / WEIGHTS, tensors)


def _check_kind(raw: Mapping[str, Any], transposed: bool, where: str) -> None:
    """Refuses every adapter that is not plain LoRA on maps stored that way."""
    if raw.get("peft_type") != "LORA":
        raise unsupported(where, "peft_type", raw.get("peft_type"), "LORA")
    fields.neutral(raw, _NEUTRAL, where)
    known = {*_READ, *_HARMLESS, *_NEUTRAL}
    if not transposed:
        known.add("fan_in_fan_out")  # PEFT sets it by itself
    for field in sorted(raw.keys() - known):
        value = raw[field]
        # Not `not value`: layers_to_transform=0 is a layer.
        if value is not None and value is not False and value not in ([], {}, ""):
            raise unsupported(
                where,
                field,
                value,
                "null or false, as the adapter would compute something else. Merge it "
                "into its base with PEFT (merge_and_unload) and load the result",
            )


def _dropout(raw: Mapping[str, Any], where: str) -> float:
    value = raw.get("lora_dropout") or 0.0
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise unsupported(where, "lora_dropout", value, "a probability below 1")
    return float(value)


def _adapted(
    raw: Mapping[str, Any],
    config: DecoderConfig,
    tensors: Mapping[str, LazyTensor],
    where: str,
) -> tuple[_Map, ...]:
    """The maps that target_modules chooses, or the file holds if it is a pattern."""
    targets = _names(raw, "target_modules", where)
    excluded = _names(raw, "exclude_modules", where)
    maps, chosen = _maps(config), []

    def hit(module: str) -> bool:
        if isinstance(targets, str) or isinstance(excluded, str) or not targets:
            return any(_tensor(module, half) in tensors for half in "ab")
        names = _suffixes(module)
        return not names.isdisjoint(targets) and names.isdisjoint(excluded)

    for one in maps:
        hits = [hit(module) for module in one.modules]
        if any(hits) and not all(hits):
            module = one.modules[hits.index(False)]
            raise CheckpointError(
                f"{where}: leaves {module} without an adapter that other layers have; "
                "an adapted map is adapted in all layers. Merge it into its base with "
                "PEFT (merge_and_unload) and load the result."
            )
        if all(hits):
            chosen.append(one)
    if not chosen:
        raise unsupported(
            where,
            "target_modules",
            raw.get("target_modules"),
            "linear maps of this decoder's blocks, such as "
            + ", ".join(one.modules[0].rpartition(".")[2] for one in maps),
        )
    return tuple(chosen)


def _names(raw: Mapping[str, Any], field: str, where: str) -> frozenset[str] | str:
    """The module names of a field (none if it is absent or null), or its pattern."""
    value = raw.get(field)
    if value is None or isinstance(value, str):
        return value or frozenset()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise unsupported(where, field, value, "a list of names, or a pattern")
    return frozenset(value)


def _target(one: _Map, others: Iterable[_Map]) -> str:
    """The shortest name of a map that names none of `others`."""
    taken = set().union(*(_suffixes(other.modules[0]) for other in others))
    return min(_suffixes(one.modules[0]) - taken, key=len)


def _suffixes(module: str) -> set[str]:
    """The names by which PEFT knows a module: whole, or from any dot on."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _match(
    adapted: Iterable[_Map],
    rank: int,
    tensors: Mapping[str, LazyTensor],
    where: str,
    base: str | None,
) -> dict[str, list[LazyTensor]]:
    """The tensors of each leaf, layer by layer; nothing may be left over."""
    trained_on = f" It was trained on {base!r:.200}." if base else ""
    found: dict[str, list[LazyTensor]] = {}
    used = set()
    for path, shape, names in (half for one in adapted for half in one.halves(rank)):
        for name in names:
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                given = "is missing" if tensor is None else f"has shape {tensor.shape}"
                raise CheckpointError(
                    f"{where}: tensor {name!r} {given}; r={rank} and this base need "
                    f"shape {shape}. It is not whole, or the adapter of another base."
                    + trained_on
                )
            if tensor.dtype not in layout.WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{where}: tensor {name!r} has dtype {tensor.dtype}; adapters are "
                    f"{_DTYPES}."
                )
        found[path] = [tensors[name] for name in names]
        used.update(names)
    for name in tensors:
        if name not in used:
            raise CheckpointError(
                f"{where}: tensor {name!r} has no place among the adapted maps of this "
                "base: trained embeddings, biases, heads and further layers are not "
                "supported. Merge the adapter into its base with PEFT "
                f"(merge_and_unload) and load the result.{trained_on}"
            )
    return found


def _assemble(found: Mapping[str, list[LazyTensor]]) -> dict:
    dtype = layout.widest(t for members in found.values() for t in members)
    adapters: dict = {}
    for path, members in found.items():
        rows = [tensor.read().T.astype(dtype) for tensor in members]
        layout.insert(adapters, path, jnp.asarray(np.stack(rows)))
    return adapters


def _disassemble(
    adapters: Mapping, config: DecoderConfig
) -> tuple[int, list[_Map], list[LazyTensor]]:
    """Rank, adapted maps, and PEFT's tensors, each copied to the host when read."""
    given = by_key(adapters)
    rank = next((v.shape[-1] for k, v in given.items() if k.endswith("/lora_a")), None)
    maps, tensors = [], []
    for one in _maps(config):
        halves = tuple(one.halves(rank or 0))
        if given.keys().isdisjoint(path for path, _, _ in halves):
            continue
        maps.append(one)
        for path, shape, names in halves:
            value, needed = given.pop(path, None), (config.layers, *shape[::-1])
            if value is None or value.shape != needed:
                raise CheckpointError(
                    f"save_adapter: {path} "
                    + ("is missing" if value is None else f"has shape {value.shape}")
                    + f"; config, and one rank for all maps, need {needed}."
                )
            if value.dtype not in layout.WEIGHT_DTYPES:
                raise CheckpointError(
                    f"save_adapter: {path} has dtype {value.dtype}; adapters are "
                    f"{_DTYPES}."
                )
            for layer, name in enumerate(names):
                read = functools.partial(_row, value, layer)
                dtype = np.dtype(value.dtype)
                tensors.append(LazyTensor(name, shape, dtype, read, "adapters"))
    if given or rank is None:
        raise CheckpointError(
            f"save_adapter: {next(iter(given), 'adapters')!r} is no adapter of a "
            "linear map of config's blocks that is stored by itself (not as GPT-2's "
            "q, k and v are); give the tree that Lora trains (state['lora'])."
        )
    return rank, maps, tensors


def _row(stacked: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    """One layer as torch has it; the stack is fetched once, and kept by JAX."""
    return np.asarray(stacked)[layer].T
