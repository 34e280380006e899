"""What a training run leaves its user: `tuned/<method>/`, ready for other programs.

methods = {"lora": config.lora, "lisa": config.lisa}
exports = Exports("lisa", folder / "tuned", methods, model, checkpoint, "stored")
exports.plan(room=runs)                                     # before any training
exports.write("lora", config.lora, state, steps=16, seed=0)
exports.tell()                                              # how each is loaded

A folder is written under another name and then renamed, and holds `jmem.json`, which
says what it is of; one without that file is somebody else's, and is never overwritten.
"""

import dataclasses
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jmem.checkpoints import Checkpoint, CheckpointError, adapter_files
from jmem.disk import DamagedError, open_sealed, seal, sync_folder, write_atomically
from jmem.finetune import tuned
from jmem.memory.report import format_size
from jmem.models.decoder import Decoder
from jmem.train.folder import require_free

Dtype = Literal["stored", "float32", "bfloat16", "float16"]
ABOUT = "jmem.json"
"""The file that says which state of which method a folder is."""


@dataclasses.dataclass(frozen=True)
class Exports:
    """The tuned models of a run, one folder a method."""

    experiment: str
    folder: pathlib.Path
    """`tuned/`, made when there is something to put in it."""
    finetuners: Mapping[Any, Any]
    """By method."""
    model: Decoder
    checkpoint: Checkpoint
    """What all methods began with."""
    dtype: Dtype
    """Of a model's own weights; "stored" is what the checkpoint has on disk."""

    @property
    def written_dtype(self) -> str:
        """The dtype that weights are written in."""
        stored = self.checkpoint.stored_dtype.name
        return stored if self.dtype == "stored" else self.dtype

    def plan(self, *, room: pathlib.Path, trials: int = 1, way_out: str = "") -> str:
        """Checks what is going to be written, and says how large it will be.

        Args:
          room: a folder on the disk that it goes to.
          trials: folders that a method needs before the best of them is known.
          way_out: the end of the message of a full disk.

        Raises:
          CheckpointError: a method has no such form, or its place is taken.
          FolderError: the disk has no room for all of it.
        """
        sizes = {
            method: tuned.count_bytes(
                finetuner, self.model, self.checkpoint, dtype=self.written_dtype
            )
            for method, finetuner in self.finetuners.items()
        }
        there = {name for name in sizes if self._check_place(name) is not None}
        for left in self.folder.glob(".*.partial"):  # of a process that was killed
            shutil.rmtree(left)
        most, total = max(sizes.values(), default=0), sum(sizes.values())
        words = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items())
        # What is there stays, or goes when another has been written beside it.
        spare = max(trials - 1, min(len(there), 1)) * most
        needed = total - sum(sizes[name] for name in there) + spare
        require_free(room, needed, f"tuned/ ({words}{way_out})")
        return f"tuned/ will take {format_size(total)}: {words}"

    def write(
        self,
        name: str,
        finetuner: Any,
        state: Any,
        *,
        steps: int,
        seed: int | None,
        kept: str = "last",
    ) -> pathlib.Path:
        """The folder of a method's state after so many updates, or of a trial's.

        One that holds the same already stays; one of another state is replaced. `kept`
        says why this state: it is the last one, or the best.

        Raises:
          CheckpointError: its place is taken, or it cannot be written.
        """
        own = getattr(finetuner, "mixtures", (finetuner,))[0].adamw
        about = {
            "experiment": self.experiment,
            "method": name,
            "learning_rate": float(own.learning_rate),
            "seed": seed,
            "updates": steps,
            "kept": kept,
        }
        if not tuned.is_adapter(finetuner):
            about["dtype"] = self.written_dtype
            about["trained_in"] = self.model.stored_dtype.name
        place = self.folder / name
        if found := self._check_place(name):
            files = found.pop("files", {})
            if found == about and files.items() <= _list_files(place).items():
                return place
        self.folder.mkdir(exist_ok=True)
        stage = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
        try:
            tuned.save(
                finetuner, state, self.checkpoint, stage, dtype=self.written_dtype
            )
            whole = about | {"files": _list_files(stage)}
            write_atomically(stage / ABOUT, seal(whole, indent=1) + "\n")
            _replace(stage, place)
        except CheckpointError as error:
            words = str(error).replace(str(stage), str(place))
            raise CheckpointError(words) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return place

    def choose(self, method: str, trial: str, trials: Iterable[str]) -> None:
        """Makes the folder of one trial the method's, and removes the others'."""
        if (chosen := self.folder / trial).exists():
            self._check_place(method)
            about = _read_about(chosen) | {"method": method}
            write_atomically(chosen / ABOUT, seal(about, indent=1) + "\n")
            _replace(chosen, self.folder / method)
        for name in trials:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _check_place(self, name: str) -> dict[str, Any] | None:
        """What the folder of this name holds; None if there is none.

        Raises:
          CheckpointError: something that no run of ours has put there.
        """
        place = self.folder / name
        if not place.exists():
            return None
        try:
            about = _read_about(place)
        except (OSError, DamagedError):
            about = {}
        if about.get("experiment") != self.experiment:
            raise CheckpointError(
                f"{place}: exists, and its {ABOUT} does not say that a run of "
                f"{self.experiment} wrote it. Move it away."
            )
        return about

    def tell(self) -> str:
        """What lies where, and the lines that load it."""
        return "\n".join(describe(self.folder / method) for method in self.finetuners)


def describe(place: pathlib.Path) -> str:
    """A folder of `Exports` in words: its size, what it is of, and how it is loaded."""
    if not place.exists():
        return f"{place}: none, as its trials ended in a run that kept no state"
    about = _read_about(place)
    size = sum(file.stat().st_size for file in place.iterdir())
    words = [f"{about['updates']} updates at rate {about['learning_rate']:g}"]
    if about["seed"] is not None:
        words.append(f"seed {about['seed']}")
    if about["kept"] != "last":
        words.append(f"its {about['kept']} state")
    if written := about.get("dtype"):
        trained = about["trained_in"]
        other = f" (trained in {trained})" if trained != written else ""
        words.append(f"weights in {written}{other}")
    folder = json.dumps(str(place))
    lines = [
        f"{place}  {format_size(size)}, {', '.join(words)}",
        *_write_loading(place, folder),
        f"  from jmem.finetune import tuned; tuned.load({folder})",
    ]
    return "\n".join(lines)


def _list_files(place: pathlib.Path) -> dict[str, int]:
    """Bytes of each file of a folder, but for what says what it is."""
    files = (file for file in place.iterdir() if file.name != ABOUT)
    return {file.name: file.stat().st_size for file in files}


def _read_about(place: pathlib.Path) -> dict[str, Any]:
    path = place / ABOUT
    return open_sealed(path.read_bytes(), str(path), bare=False)


def _write_loading(place: pathlib.Path, folder: str) -> list[str]:
    """The lines of Python by which other programs open a folder."""
    if not (place / adapter_files.CONFIG).exists():
        return [f"  transformers.AutoModelForCausalLM.from_pretrained({folder})"]
    raw = adapter_files.read_config(place)
    base = pathlib.Path(adapter_files.read_base(raw) or "base")
    given = json.dumps(str(base))
    if raw.get("peft_type") == "MIXLORA":
        lines, names = [], ("adapter_model.safetensors", "adapter_model.bin")
        if base.suffix == ".gguf":  # which MoE-PEFT does not open
            lines = [
                f"  c = jmem.checkpoints.load({given})",
                '  jmem.checkpoints.save(c.params(), c.config, "base", like=c)',
            ]
            given = '"base"'
        stored, wanted = (json.dumps(str(place / name)) for name in names)
        return [
            *lines,
            f"  torch.save(safetensors.torch.load_file({stored}), {wanted})",
            f'  model = moe_peft.LLMModel.from_pretrained({given}, device="cuda")',
            f"  model.load_adapter({folder})",
        ]
    if base.suffix == ".gguf":
        given = f"{json.dumps(str(base.parent))}, gguf_file={json.dumps(base.name)}"
    opened = f"transformers.AutoModelForCausalLM.from_pretrained({given})"
    return [f"  peft.PeftModel.from_pretrained({opened}, {folder})"]


def _replace(stage: pathlib.Path, place: pathlib.Path) -> None:
    """Renames a whole folder to `place`; what was there goes first, and is removed."""
    old = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    if place.exists():
        place.rename(old)
    stage.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
