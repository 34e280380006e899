"""LoRA adapters in and out of the folders that Hugging Face's PEFT reads and writes.

    found = jmem.checkpoints.load_adapter("my-lora", checkpoint.config)
    lora = Lora(**found.settings)         # rank, alpha, maps, rslora, dora, dropout
    state = lora.init(model, params, {}, key, found.adapters)
    jmem.checkpoints.save_adapter(state["lora"], config, "out", alpha=lora.alpha)

Format   adapter_config.json, and adapter_model.safetensors with two tensors for each
         adapted map of each layer: `lora_A.weight` [r, in], `lora_B.weight` [out, r],
         below the map's own name with `base_model.model.` before it. DoRA (`use_dora`)
         has a third, `lora_magnitude_vector` [out].
Checks   What PEFT would compute otherwise than y = x W + scale * x A B on whole stacks
         of layers, or DoRA of that, is refused by name: other variants, biases, trained
         embeddings, a rank or alpha of some layers' own, initialisations that changed
         the base. A field unknown here is refused unless it is empty or false.
GPT-2    Its q, k and v are one module, c_attn. Its adapter gives the three the same A
         and a third of B each; trained here, they part. Back, A's equal bit for bit are
         one again; others make an adapter of three times the rank, with A stacked
         and B block-diagonal, zeros where one of the three has none, at the same scale:
         rank_pattern and alpha_pattern say so. That one gives the three back or, once
         PEFT has trained it and B is full, gives all maps its rank.
         A magnitude goes with its columns, so DoRA needs all three adapted.
Differs  PEFT fills what a file lacks with fresh adapters, and warns; here it is an
         error. Maps chosen by a regular expression are those the file holds: a pattern
         of somebody else's is not run. Dropout is drawn anew for each of GPT-2's q, k
         and v, which PEFT gives the same.
Source   huggingface/peft 0.20: utils/save_and_load.py, tuners/lora/{config,layer,
         model,dora}.py, tuners/tuners_utils.py (what a target names).
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jmem.checkpoints import adapter_files, lowrank
from jmem.checkpoints.fields import Fields, is_empty
from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.checkpoints.modules import (
    Module,
    choose_target,
    describe_targets,
    find_modules,
    holds,
    list_suffixes,
)
from jmem.models.config import DecoderConfig
from jmem.program import by_key

_FUSED, _PARTS = "c_attn", 3
"""GPT-2's module of q, k and v."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields that give modules a rank and an alpha of their own."""
_ELSE = (
    "as the adapter would compute something else. Merge it into its base with PEFT "
    "(merge_and_unload) and load the result"
)

_NO_PLACE = (
    "trained embeddings, biases, heads and further layers are not supported. Merge the "
    "adapter into its base with PEFT (merge_and_unload) and load the result."
)

_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
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
    """rank, alpha, maps, rslora, dora, dropout: the fields of
    `jmem.finetune.lora.Lora`."""
    adapters: dict = dataclasses.field(repr=False)
    """{"attention": {"q": {"lora_a", "lora_b"}}, ...}: lora_a [L, in, rank] and lora_b
    [L, rank, out], JAX arrays, as stored (float32 if stored in several dtypes). DoRA's
    also "magnitude" [L, out]."""
    base: str | None
    """The model it was trained on, as the file says."""


def load_adapter(folder: str | os.PathLike[str], config: DecoderConfig) -> Adapter:
    """Reads a PEFT folder of LoRA, rank-stabilised or not, or DoRA for `config`.

    Raises:
      CheckpointError: a file is missing or damaged; the adapter computes something
        else (names the field), or belongs to another base (names tensor and shapes).
    """
    folder = Path(folder)
    given, known = adapter_files.read_config(folder), find_modules(config)
    _check_kind(given, known)
    settings = adapter_files.read_settings(given)
    rank, alpha, rslora = (settings[name] for name in ("rank", "alpha", "rslora"))
    dora = given.flag("use_dora")
    is_wide = _is_wide(given, rank, alpha, rslora)
    base = adapter_files.read_base(given)

    tensors = adapter_files.read_weights(
        folder, "save the adapter again with PEFT, as safetensors"
    )
    adapted = _find_adapted(given, known, tensors)
    ranks = {one: rank * (len(one.paths) if is_wide else 1) for one in adapted}
    stacks = [
        stack for one, own in ranks.items() for stack in one.list_stacks(own, dora)
    ]
    lowrank.check(stacks, tensors, str(folder / adapter_files.WEIGHTS), base, _NO_PLACE)
    tree, common = lowrank.assemble(ranks, tensors, rank, dora)
    settings |= {
        "rank": common,
        "alpha": alpha if common == rank else _widen(alpha, rslora),
        "dora": dora,
        "maps": tuple(name for part in tree.values() for name in part),
    }
    return Adapter(settings=settings, adapters=tree, base=base)


def save_adapter(
    adapters: Mapping,
    config: DecoderConfig,
    folder: str | os.PathLike[str] | None,
    *,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    base: str | None = None,
) -> int:
    """Writes a folder that PEFT opens (`PeftModel.from_pretrained(model, folder)`).

    Rank, maps and whether it is DoRA are those of `adapters`, whose values keep their
    dtype; GPT-2's q, k and v are joined, as said above. The folder appears whole or not
    at all. Returns the bytes that it takes, but for a header.

    Args:
      adapters: the tree of `jmem.finetune.lora.Lora`, JAX or NumPy arrays.
      config: the decoder they belong to.
      folder: one that is absent or empty. None: all is checked, nothing is written.
      alpha: the product is scaled by alpha / rank ...
      rslora: ... or by alpha / sqrt(rank).
      dropout: what they were trained with; PEFT goes on with it.
      base: name or folder of the base model. PEFT reads it where no model is given.

    Raises:
      CheckpointError: `adapters` does not fit `config`, the folder exists and is not
        empty, or it cannot be written.
    """
    known = find_modules(config)
    dora = any(path.endswith("/magnitude") for path in by_key(adapters))
    rank, ranks, tensors = lowrank.disassemble(
        adapters, known, config.layers, "save_adapter", dora
    )
    others = [one for one in known if one not in ranks]
    is_wide = any(own != rank for own in ranks.values())
    raw = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": not known[0].transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter_files.shorten(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({choose_target(one, others) for one in ranks}),
        "task_type": "CAUSAL_LM",
        "use_dora": dora,
        "use_rslora": rslora,
        **(_make_patterns(rank, alpha, rslora) if is_wide else {}),
    }
    adapter_files.read_settings(Fields(raw, "save_adapter"))  # refuses what is none
    return adapter_files.write(folder, raw, tensors)


def _check_kind(given: Fields, known: Iterable[Module]) -> None:
    """Refuses every adapter that is not LoRA or DoRA on such modules."""
    if given.get("peft_type") != "LORA":
        raise given.make_error("peft_type", given.get("peft_type"), "LORA")
    given.check_neutral(_NEUTRAL)
    understood = {*_READ, *_HARMLESS, *_NEUTRAL}
    if any(not one.transposed for one in known):
        understood.add("fan_in_fan_out")  # PEFT sets it by itself
    if any(len(one.paths) > 1 for one in known):
        understood.update(_PATTERNS)
    given.check_no_more(understood, f"null or false, {_ELSE}")


def _is_wide(given: Fields, rank: int, alpha: float, rslora: bool) -> bool:
    """Whether c_attn has three times the rank at the same scale.

    Refuses every other pattern of ranks or alphas.
    """
    if all(is_empty(given.get(field)) for field in _PATTERNS):
        return False
    for field, wide in _make_patterns(rank, alpha, rslora).items():
        if (value := given.get(field)) != wide:
            raise given.make_error(field, value, f"null or {wide}, {_ELSE}")
    return True


def _make_patterns(rank: int, alpha: float, rslora: bool) -> dict[str, dict]:
    """PEFT's fields of a c_attn that holds three adapters of `rank`."""
    values = _PARTS * rank, adapter_files.shorten(_widen(alpha, rslora))
    return {field: {_FUSED: value} for field, value in zip(_PATTERNS, values)}


def _widen(alpha: float, rslora: bool) -> float:
    """The alpha at which an adapter of three times the rank keeps its scale."""
    return float(alpha) * (math.sqrt(_PARTS) if rslora else _PARTS)


def _find_adapted(
    given: Fields, known: Iterable[Module], tensors: Mapping[str, LazyTensor]
) -> list[Module]:
    """The modules that target_modules chooses, or the file holds if it is a pattern."""
    targets = _read_names(given, "target_modules")
    excluded = _read_names(given, "exclude_modules")
    chosen = []

    def hit(name: str) -> bool:
        if isinstance(targets, str) or isinstance(excluded, str) or not targets:
            return holds(tensors, name)
        names = list_suffixes(name)
        return not names.isdisjoint(targets) and names.isdisjoint(excluded)

    for one in known:
        hits = [hit(name) for name in one.names]
        if any(hits) and not all(hits):
            name = one.names[hits.index(False)]
            raise CheckpointError(
                f"{given.where}: leaves {name} without an adapter that other layers "
                "have; an adapted map is adapted in all layers. Merge it into its base "
                "with PEFT (merge_and_unload) and load the result."
            )
        if all(hits):
            chosen.append(one)
    if not chosen:
        raise given.make_error(
            "target_modules", given.get("target_modules"), describe_targets(known)
        )
    return chosen


def _read_names(given: Fields, field: str) -> frozenset[str] | str:
    """The module names of a field (none if it is absent or null), or its pattern."""
    value = given.get(field)
    if value is None or isinstance(value, str):
        return value or frozenset()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise given.make_error(field, value, "a list of names, or a pattern")
    return frozenset(value)
