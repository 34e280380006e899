"""What was tuned, as a folder that other programs open, and back from it.

    checkpoint = jmem.checkpoints.load("my-checkpoint")
    state = train(finetuner, model, ...)
    tuned.save(finetuner, state, checkpoint, "tuned")
    model, params, checkpoint = tuned.load("tuned")      # for generate, complete, ...

Lora     a PEFT adapter, which names its base (`jmem.checkpoints.peft`); with
         `keep_zeros`, which PEFT does not know, the weights that it moved
MixLora  an adapter of MoE-PEFT, one a mixture (`jmem.checkpoints.mixlora`)
others   the weights that moved: a Hugging Face folder with tokenizer, chat template and
         defaults of generation, in the dtype that the checkpoint has on disk

See      experiments/export.py, tests/finetune/test_tuned.py
"""

import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

import jmem.checkpoints
from jmem.checkpoints import Checkpoint, adapter_files, smollm2
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora
from jmem.models.decoder import Decoder
from jmem.offload import describe_results


def save(
    finetuner: Any,
    state: Any,
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    number: int | None = None,
) -> int:
    """Writes what was trained; returns its bytes, but for a header.

    The folder appears whole or not at all.

    Args:
      finetuner: the method, with the settings that it trained by.
      state: of that method.
      checkpoint: what it began with.
      folder: one that is absent or empty.
      dtype: of a model's own weights: float32, bfloat16 or float16; None: that of the
        checkpoint on disk, which may round what was trained. Adapters keep theirs.
      number: of the mixture, where several were trained.

    Raises:
      CheckpointError: the folder is not empty or cannot be written, a value overflows
        `dtype`, or the format has no place for the adapter.
      ValueError: several mixtures and no number, or what cannot be merged.
    """
    trained = _take(finetuner, state, number)
    return _write(finetuner, trained, checkpoint, folder, dtype, number)


def count_bytes(
    finetuner: Any,
    model: Any,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    number: int | None = None,
) -> int:
    """What `save` is going to write, in bytes, and refuse: known before any training.

    Arguments and errors are those of `save`; nothing is allocated.
    """
    shapes = jax.eval_shape(
        lambda state: _take(finetuner, state, number), describe_state(finetuner, model)
    )
    values = itertools.count()  # unlike, so that no two adapters are taken for one

    def fill(leaf):
        return np.broadcast_to(np.asarray(next(values), leaf.dtype), leaf.shape)

    trained = jax.tree.map(fill, shapes)
    return _write(finetuner, trained, checkpoint, None, dtype, number)


def describe_state(finetuner: Any, model: Any) -> Any:
    """Shapes and dtypes of a method's state; nothing is allocated."""

    def init(key):
        return finetuner.init(model, model.init(key), model.stats(), key)

    return describe_results(init, jax.random.key(0))


def is_adapter(finetuner: Any) -> bool:
    """Whether what it trained is saved beside its base, not as weights."""
    if isinstance(finetuner, Lora):
        return not finetuner.keep_zeros
    return isinstance(finetuner, MixLora)


def _take(finetuner: Any, state: Any, number: int | None) -> Any:
    """The tree that goes into the file."""
    if isinstance(finetuner, Lora) and is_adapter(finetuner):
        return state["lora"]
    if isinstance(finetuner, MixLora):
        return finetuner.mixture(state, _choose(finetuner, number))
    return finetuner.merged(state)[0]


def _choose(finetuner: MixLora, number: int | None) -> int:
    if number is None and (count := len(finetuner.mixtures)) > 1:
        raise ValueError(
            f"tuned: number=None, but {count} mixtures were trained; save each to a "
            f"folder of its own, number=0 to {count - 1}."
        )
    return number or 0


def _write(finetuner, trained, checkpoint, folder, dtype, number) -> int:
    config, base = checkpoint.config, str(checkpoint.path.resolve())
    given: dict[str, Any]
    if isinstance(finetuner, Lora) and is_adapter(finetuner):
        names = "alpha", "rslora", "dropout"
        given = {name: getattr(finetuner, name) for name in names} | {"base": base}
        return jmem.checkpoints.save_adapter(trained, config, folder, **given)
    if isinstance(finetuner, MixLora):
        own = finetuner.mixtures[_choose(finetuner, number)]
        names = "alpha", "balance", "top_k", "top_p", "rslora"
        given = {name: getattr(own, name) for name in names} | {"base": base}
        given |= {n: getattr(finetuner, n) for n in ("router", "dropout", "jitter")}
        return jmem.checkpoints.save_mixlora(trained, config, folder, **given)
    return jmem.checkpoints.save(
        trained, config, folder, like=checkpoint, dtype=dtype or checkpoint.stored_dtype
    )


class Tuned(NamedTuple):
    """A folder's model, as `generate` and `complete` take it."""

    model: Decoder
    params: dict
    checkpoint: Checkpoint
    """The folder's; of an adapter, its base's. It has the tokenizer."""


def load(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
) -> Tuned:
    """Opens a folder that `save` wrote, or PEFT or MoE-PEFT.

    LoRA is merged into its base; the experts of MixLoRA are computed beside theirs.

    Args:
      folder: of a model or an adapter.
      base: of an adapter; None: the checkpoint that it names.
      dtype: of weights and activations; None: as stored.

    Raises:
      CheckpointError: anything wrong with the files, or an adapter whose base is not
        given, and not named or not there.
    """
    folder = Path(folder)
    is_adapter = (folder / adapter_files.CONFIG).exists()
    given = adapter_files.read_config(folder) if is_adapter else None
    source = folder if given is None else base or adapter_files.read_base(given)
    if source is None:
        raise jmem.checkpoints.CheckpointError(
            f"{folder}: names no base_model_name_or_path. Say what the adapter belongs "
            "to: load(folder, base='my-checkpoint')."
        )
    here = source == smollm2.NAME or os.path.exists(source)
    if given is not None and base is None and not here:
        raise jmem.checkpoints.CheckpointError(
            f"{folder}: belongs to {str(source)!r:.200}, which is not here. Say where: "
            "load(folder, base='my-checkpoint')."
        )
    checkpoint = jmem.checkpoints.load(source, dtype)
    params = checkpoint.params()
    model = Decoder(checkpoint.config, dtype=checkpoint.dtype)
    if given is None:
        return Tuned(model, params, checkpoint)
    key = jax.random.key(0)  # of fresh adapters, which the folder's replace
    if given.get("peft_type") == "MIXLORA":
        mixture = jmem.checkpoints.load_mixlora(folder, checkpoint.config)
        mixlora = MixLora.of(mixture.settings)
        state = mixlora.init(model, params, {}, key)
        state = mixlora.replaced(state, 0, mixture.adapters)
        return Tuned(*mixlora.serving(model, state), checkpoint)
    adapter = jmem.checkpoints.load_adapter(folder, checkpoint.config)
    lora = Lora(**adapter.settings)
    state = lora.init(model, params, {}, key, adapter.adapters)
    return Tuned(model, lora.merged(state)[0], checkpoint)
