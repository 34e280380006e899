"""MixLoRA adapters in and out of the folders of MoE-PEFT and of the plug-in mixlora.

    found = jmem.checkpoints.load_mixlora("my-mixture", checkpoint.config)
    found.adapters["mlp"]["router"]["kernel"]   # [L, M, E], beside gate, up and down
    found.settings                              # rank, experts, router, top_k, ...
    jmem.checkpoints.save_mixlora(found.adapters, config, "out", alpha=32, balance=1e-2)

Format   adapter_config.json, and adapter_model.safetensors with, below
         `mixlora.layers.0.`, the router `mlp.moe_gate.weight` [E, M], for each expert
         of an adapted map of the MLP `mlp.gate_proj.experts.0.lora_A.weight` [r, in]
         and `lora_B.weight` [out, r], and for each adapted map of attention
         `self_attn.q_proj.lora_A.weight` and `lora_B.weight`.
Checks   What the programs would compute otherwise than top-k or top-p routing among
         experts of one rank and scale is refused by name: switch routing, DoRA, experts
         with settings of their own, a temperature, another activation than the base's,
         a classifier. A field unknown here is refused unless it is empty or false.
Differs  Both programs read and write adapter_model.bin, a pickle; the tensors are the
         same, and two lines of torch turn one file into the other. They fill what a
         file lacks with fresh experts (MoE-PEFT) or stop (mixlora); here it is an
         error. MoE-PEFT writes neither the balance loss's coefficient nor the jitter,
         so that its adapters come back with its defaults, 0.001 and 0; here both are
         written, and MoE-PEFT reads them. They stop at an alpha that is no integer,
         which is written as it is, and at a dropout of 0, which goes out as 1e-8 and
         comes back as 0.
DoRA     MoE-PEFT does not save the magnitudes it trains: such an adapter is not whole.
Source   TUDB-Labs/MoE-PEFT 40f8cb7: adapters/mixlora/{config,model}.py,
         common/config.py, model.py (tensor names), trainer.py (files).
         TUDB-Labs/MixLoRA d59d09b: mixlora/{config,model}.py.
"""

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmem.checkpoints import adapter_files, layout, lowrank
from jmem.checkpoints.fields import Fields, is_empty
from jmem.checkpoints.files import CheckpointError
from jmem.checkpoints.huggingface import ACTIVATIONS
from jmem.checkpoints.modules import Module, Stack, describe_targets, find_modules
from jmem.checkpoints.names import find_family
from jmem.models.config import DecoderConfig
from jmem.nn.maps import insert
from jmem.program import by_key

_ROUTER = "mlp/router/kernel"
_STRATEGIES = {"mixlora": "top_k", "mixlora-dynamic": "top_p"}
"""Our `router` for each `routing_strategy` that MoE-PEFT and mixlora write."""
_TOP_K, _TOP_P, _BALANCE, _JITTER = 2, 0.8, 0.001, 0.0
"""The defaults of MoE-PEFT and mixlora where a field is absent."""
_NO_DROPOUT = 1e-8
"""What stands for a dropout of 0, at which both programs stop."""
_FAMILIES = ("llama", "phi")
"""Architectures whose modules MoE-PEFT and mixlora know, Mistral and Qwen2 as Llama."""
_CONVERT = (
    "convert it with torch, tensors = torch.load(path, weights_only=True) and "
    "safetensors.torch.save_file(tensors, 'adapter_model.safetensors')"
)
_NO_PLACE = "classifiers, biases, trained magnitudes and further layers have none."

_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("routing_strategy", "num_experts", "top_k", "top_p", "act_fn", "expert_lora"),
    *("router_loss", "router_aux_loss_coef", "jitter_noise"),
    "base_model_name_or_path",
)
_HARMLESS = (
    *("name", "task_name", "lora_init", "router_init_range"),
    # Of switch routing, which is refused.
    *("router_z_loss_coef", "expert_capacity", "ffn_dropout", "sparse_step"),
)
"""Fields that change no value of an adapter that passes all other checks."""
_NEUTRAL: Mapping[str, tuple] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", "QUESTION_ANS", None),
    "use_dora": (False, None),
    "temperature": (0.0, 1.0, None),
}
"""Fields that must be absent or hold one of these values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a folder of MixLoRA holds."""

    settings: dict[str, Any]
    """rank, alpha, rslora, dropout, maps, experts, router ("top_k" or "top_p"), top_k,
    top_p, balance (the auxiliary loss's coefficient), jitter and dora (False). Of top_k
    and top_p, the one that `router` does not name is the programs' default."""
    adapters: dict = dataclasses.field(repr=False)
    """{"attention": {"q": {"lora_a", "lora_b"}, ...}, "mlp": {"router": {"kernel"},
    "gate": {"lora_a", "lora_b"}, ...}}, JAX arrays. Of attention, lora_a [L, in, r] and
    lora_b [L, r, out]; of the MLP, lora_a [L, in, E r] and lora_b [L, E r, out], where
    expert e owns columns e r to (e + 1) r of A, and the same rows of B. As stored
    (float32 if in several dtypes); the router is float32 [L, M, E]."""
    base: str | None
    """The model it was trained on, as the file says."""


def load_mixlora(folder: str | os.PathLike[str], config: DecoderConfig) -> Mixture:
    """Reads a folder of MixLoRA, of either program, for the decoder `config`.

    Raises:
      CheckpointError: a file is missing or damaged; the adapter computes something
        else (names the field), or belongs to another base (names tensor and shapes).
    """
    folder = Path(folder)
    given = adapter_files.read_config(folder)
    _check_family(config, given.where)
    settings = _read_settings(given, config)
    base = adapter_files.read_base(given)
    chosen = _choose_modules(given, config)
    tensors = adapter_files.read_weights(folder, _CONVERT)

    rank, experts = settings["rank"], settings["experts"]
    router = _describe_router(config, experts)
    # The router comes first: it bounds how many names the experts may have.
    adapted = (
        s for one in chosen for s in _name_tensors(one, experts).list_stacks(rank)
    )
    stacks = itertools.chain([router], adapted)
    file = str(folder / adapter_files.WEIGHTS)
    lowrank.check(stacks, tensors, file, base, _NO_PLACE)
    ranks = {_name_tensors(one, experts): rank for one in chosen}
    tree, _ = lowrank.assemble(ranks, tensors, rank)
    kernel = lowrank.stack_tensors(router, tensors, np.dtype(np.float32))
    insert(tree, _ROUTER, jnp.array(kernel))
    maps = tuple(one.paths[0].rpartition("/")[2] for one in chosen)
    return Mixture(settings=settings | {"maps": maps}, adapters=tree, base=base)


def save_mixlora(
    adapters: Mapping,
    config: DecoderConfig,
    folder: str | os.PathLike[str] | None,
    *,
    alpha: float,
    balance: float,
    router: str = "top_k",
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    rslora: bool = False,
    dropout: float = 0.0,
    jitter: float = _JITTER,
    base: str | None = None,
) -> int:
    """Writes a folder that, its weights made a pickle, MoE-PEFT and mixlora open.

    Rank, experts and maps are those of `adapters`, whose values keep their dtype. The
    folder appears whole or not at all. For the programs,
    torch.save(safetensors.torch.load_file("adapter_model.safetensors"),
    "adapter_model.bin") goes beside it. Returns the bytes that the folder takes, but
    for a header.

    Args:
      adapters: the tree of `Mixture`, JAX or NumPy arrays.
      config: the decoder they belong to.
      folder: one that is absent or empty. None: all is checked, nothing is written.
      alpha: products are scaled by alpha / rank; the programs need an integer ...
      balance: coefficient of the loss that balances the experts.
      router: "top_k" or "top_p": a token goes to so many experts, or to the first
        that reach such a share. Only the one that it names is written, and the plug-in
        opens "top_k" only.
      top_k: experts a token.
      top_p: share of the router's probability that the experts of a token reach.
      rslora: ... or scaled by alpha / sqrt(rank).
      dropout: what they were trained with.
      jitter: noise on the router's input in training. The plug-in adds it in use too.
      base: name or folder of the base model, which the plug-in opens.

    Raises:
      CheckpointError: `adapters` does not fit `config`, a setting is none of the
        programs', the folder exists and is not empty, or it cannot be written.
    """
    who = "save_mixlora"
    _check_family(config, who)
    strategies = {ours: theirs for theirs, ours in _STRATEGIES.items()}
    if router not in strategies:
        raise CheckpointError(
            f"{who}: router={router!r} is not one of {', '.join(strategies)}."
        )
    given = by_key(adapters)
    kernel = given.pop(_ROUTER, None)
    experts = _count_experts(kernel, config, who)
    known = [_name_tensors(one, experts) for one in find_modules(config)]
    rank, ranks, tensors = lowrank.disassemble(given, known, config.layers, who)
    tensors += lowrank.cut_stack(_describe_router(config, experts), kernel)
    adapted = {one.paths for one in ranks}
    raw = {
        "act_fn": config.activation,  # without it the plug-in has none
        "base_model_name_or_path": base,
        "bias": "none",
        "jitter_noise": float(jitter),
        "lora_alpha": adapter_files.shorten(alpha),
        "lora_dropout": float(dropout) or _NO_DROPOUT,
        "num_experts": experts,
        "peft_type": "MIXLORA",
        "r": rank,
        "router_aux_loss_coef": float(balance),
        "routing_strategy": strategies[router],
        "target_modules": sorted(
            one.short_name for one in find_modules(config) if one.paths in adapted
        ),
        "task_type": "CAUSAL_LM",
        "use_rslora": rslora,
        **(
            {"top_k": top_k}
            if router == "top_k"
            else {"top_p": float(top_p), "temperature": 0.0}
        ),
    }
    _read_settings(Fields(raw, who), config)  # refuses what is none
    return adapter_files.write(folder, raw, tensors)


def _check_family(config: DecoderConfig, where: str) -> None:
    if (kind := find_family(config)) not in _FAMILIES:
        raise CheckpointError(
            f"{where}: MixLoRA's programs have no names for the maps of a base like "
            f"{kind}; supported are Llama, Mistral, Qwen2 and Phi."
        )


def _read_settings(given: Fields, config: DecoderConfig) -> dict[str, Any]:
    """`Mixture.settings` without maps; refuses by name what it cannot express."""
    if given.get("peft_type") != "MIXLORA":
        raise given.make_error("peft_type", given.get("peft_type"), "MIXLORA")
    strategy = given.get("routing_strategy")
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        old = " (older folders: MixLoRA's misc/legacy_weights_convertor.py)"
        rule = " or ".join(_STRATEGIES) + (old if strategy == "mixtral" else "")
        raise given.make_error("routing_strategy", strategy, rule)
    given.check_neutral(_NEUTRAL)
    given.check_no_more(
        {*_READ, *_HARMLESS, *_NEUTRAL},
        "null or false, as the adapter would compute something else",
    )
    _check_activation(given, config)
    _check_experts(given)
    router, experts = _STRATEGIES[strategy], given.size("num_experts")
    top_k, top_p = min(_TOP_K, experts), _TOP_P
    if router == "top_k":
        top_k = given.size("top_k", _TOP_K)
        if top_k > experts:
            rule = f"an integer of 1 to num_experts={experts}"
            raise given.make_error("top_k", top_k, rule)
    else:
        top_p = given.number("top_p", _TOP_P)
        if top_p > 1:
            raise given.make_error("top_p", top_p, "a number above 0 and up to 1")
    jitter = given.number("jitter_noise", _JITTER, or_zero=True)
    if jitter >= 1:
        raise given.make_error("jitter_noise", jitter, "0 or more, and below 1")
    balance = given.number("router_aux_loss_coef", _BALANCE, or_zero=True)
    settings = adapter_files.read_settings(given)
    if settings["dropout"] <= _NO_DROPOUT:
        settings["dropout"] = 0.0
    return settings | {
        "experts": experts,
        "router": router,
        "top_k": top_k,
        "top_p": top_p,
        "balance": balance * given.flag("router_loss", True),
        "jitter": jitter,
        "dora": False,
    }


def _check_activation(given: Fields, config: DecoderConfig) -> None:
    name = given.get("act_fn")
    is_own = isinstance(name, str) and ACTIVATIONS.get(name) == config.activation
    if name is not None and not is_own:
        raise given.make_error("act_fn", name, f"{config.activation!r}, the base's")


def _check_experts(given: Fields) -> None:
    own = given.get("expert_lora")
    if is_empty(own):
        return
    if not isinstance(own, dict) or any(
        (value or None) != (given.get(field) or None) for field, value in own.items()
    ):
        rule = "null, or what the adapter says itself: all have one rank and scale"
        raise given.make_error("expert_lora", own, rule)


def _choose_modules(given: Fields, config: DecoderConfig) -> tuple[Module, ...]:
    """The modules of this decoder that target_modules names."""
    value = given.get("target_modules")
    if isinstance(value, dict):
        if not all(isinstance(wanted, bool) for wanted in value.values()):
            rule = "names to true or false"
            raise given.make_error("target_modules", value, rule)
        value = [name for name, wanted in value.items() if wanted]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise given.make_error("target_modules", value, "a list of names")
    known = find_modules(config)
    chosen = tuple(one for one in known if one.short_name in value)
    if not chosen:
        raise given.make_error("target_modules", value, describe_targets(known))
    return chosen


def _name_tensors(one: Module, experts: int) -> Module:
    """The module with MoE-PEFT's and mixlora's tensor names; in MLPs, its experts'."""
    names = [name.removeprefix("model.") for name in one.names]
    if not one.paths[0].startswith("mlp/"):
        return dataclasses.replace(one, prefix="mixlora.", names=tuple(names))
    each = (f"{name}.experts.{expert}" for name in names for expert in range(experts))
    return dataclasses.replace(
        one, prefix="mixlora.", names=tuple(each), experts=experts
    )


def _describe_router(config: DecoderConfig, experts: int) -> Stack:
    names = (f"mixlora.layers.{i}.mlp.moe_gate.weight" for i in range(config.layers))
    shape = (experts, config.hidden)
    return Stack("kernel", shape, tuple(names), f"num_experts={experts}")


def _count_experts(
    kernel: jax.Array | np.ndarray | None, config: DecoderConfig, who: str
) -> int:
    """How many experts the router's stacked kernel chooses among."""
    needed = f"config needs ({config.layers}, {config.hidden}, experts)"
    if kernel is None:
        raise CheckpointError(f"{who}: {_ROUTER} is missing; {needed}.")
    if kernel.shape[:-1] != (config.layers, config.hidden) or not kernel.shape[-1]:
        raise CheckpointError(f"{who}: {_ROUTER} has shape {kernel.shape}; {needed}.")
    layout.check_dtype(f"{who}: {_ROUTER}", kernel.dtype)
    return kernel.shape[-1]
