"""`experiments.memory`: every program it can be asked about, and its presets."""

import json
import re
import sys
from typing import Literal

import jax
import numpy as np
import pytest
from tiny_decoder import TINY

from experiments import memory
from experiments.harness import cli
from jmem.checkpoints import CheckpointError
from jmem.checkpoints.huggingface import render_config
from jmem.memory.report import MemoryReport
from jmem.models import zoo
from jmem.targets import resolve


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model small enough to compile in a moment, by the name "tiny"."""
    monkeypatch.setitem(zoo.MODELS, "tiny", TINY)


CASES = [("train", "full"), ("train", "lora"), ("train", "lisa")]


@pytest.mark.parametrize(
    ("program", "method"), [*CASES, ("forward", "full"), ("decode", "full")]
)
def test_every_program_is_built_with_labels(program, method):
    config = memory.Config(model="tiny", seq_len=64, program=program, method=method)
    [(name, built)] = memory.programs(config, resolve(config.gpu)).items()
    assert name == (f"train-{method}" if program == "train" else program)
    assert None not in built.label_leaves() or program == "train"  # step and key
    assert jax.eval_shape(built.fn, *built.args) is not None


@pytest.mark.parametrize("name", cli.list_presets("memory"))
def test_every_preset_is_a_config_for_a_known_gpu(name):
    _, config = cli.parse(memory.Config, "memory", ["--preset", name])
    assert config != memory.Config()
    assert resolve(config.gpu)
    assert memory.programs(config, resolve(config.gpu))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "llama2-7", "unknown model 'llama2-7'; did you mean 'llama2-7b'"),
        ("seq_len", 4097, "seq_len=4097 exceeds the 4,096 positions of llama2-7b"),
        ("batch_size", 0, "batch_size=0; need >= 1"),
        ("seq_len", 0, "seq_len=0; need >= 1"),
        ("reserve", -1.0, "reserve=-1.0; need >= 0 and < 1,024"),
        ("weights", "host", "weights='host' is for weights that nothing changes"),
    ],
)
def test_refusals(field, value, words):
    with pytest.raises(ValueError, match=words):
        memory.Config(**{field: value})


def test_a_run_prints_explains_and_draws(tmp_path, monkeypatch, capsys):
    arguments = ["--model=tiny", "--program=decode", "--seq-len=128", "--gpu=rtx4090"]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments, f"--runs={tmp_path}"])
    cli.run(memory.main, memory.Config)
    shown = capsys.readouterr().out
    assert "tiny, decode: batch 1, 128 tokens, bfloat16, compiled for" in shown
    assert "fits rtx4090" in shown
    [folder] = (tmp_path / "memory").iterdir()
    saved = json.loads((folder / "report.json").read_text())
    report = MemoryReport.from_json(folder / "memory" / "decode.json")
    assert saved["memory"]["decode"]["device_bytes"] == report.device_bytes
    assert sum(report.by_kind.values()) == report.device_bytes
    assert saved["device"] is None  # nothing ran
    assert (folder / "timeline.png").stat().st_size > 10_000
    assert "what fills the peak" in (folder / "report.md").read_text()


def test_what_does_not_fit_is_a_verdict_that_is_no(tmp_path, monkeypatch, capsys):
    arguments = ["--model=tiny", "--program=decode", "--seq-len=128", "--gpu=rtx4090"]
    arguments += ["--reserve=23.9", f"--runs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(memory.main, memory.Config)
    assert stop.value.code == 1
    assert "does not fit rtx4090" in capsys.readouterr().out
    [folder] = (tmp_path / "memory").iterdir()
    assert json.loads((folder / "report.json").read_text())["status"] == "complete"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder of which only config.json was downloaded."""
    config = render_config(TINY, np.dtype("float32"), ())
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "config.json").write_text(json.dumps(config))
    return tmp_path / "only"


@pytest.mark.parametrize("form", ["{}", "{}/config.json"])
def test_a_model_is_its_config_where_there_are_no_weights(folder, form):
    config = memory.Config(model=form.format(folder), seq_len=64, program="decode")
    assert config.dimensions() == TINY
    with pytest.raises(ValueError, match="seq_len=100000 exceeds"):
        memory.Config(model=str(folder), seq_len=100_000)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"model_type": "llama"}'])
def test_a_config_that_is_none_is_refused_by_its_path(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"only/config\.json"):
        memory.Config(model=str(folder))


def test_what_does_not_fit_names_what_would(tmp_path, folder, monkeypatch, capsys):
    """On a card of a toy's size; with the folder's name as hostile as it may be."""
    toy = 'like = "t4"\ncompiler_bytes = 1073741824\nusable_bytes = 1_000_000\n'
    (tmp_path / "toy.toml").write_text(toy)
    model = folder.rename(tmp_path / "[bold]\x1b[2J<script>")
    arguments = [f"--model={model}", "--program=decode", "--seq-len=128"]
    arguments += ["--batch-size=64", "--reserve=0"]
    arguments += [f"--gpu={tmp_path}/toy.toml", f"--runs={tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    with pytest.raises(SystemExit):
        cli.run(memory.main, memory.Config)
    shown = capsys.readouterr().out
    assert "decode: does not fit toy" in shown
    assert "decode would fit rtx3060 (9.6 GiB usable), t4 (" in shown
    assert "\x1b" not in shown
    assert "[bold]" in shown
    [made] = (tmp_path / "runs" / "memory").iterdir()
    saved = json.loads((made / "report.json").read_text())
    table = saved["tables"]["What would fit toy"]
    assert list(table) == ["--weights host"]
    assert table["--weights host"]["host"] > 0
    written = (made / "report.md").read_text()
    outside = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`", "", written)
    assert "<script>" not in outside
    assert "\x1b" not in written


def test_what_is_tried_in_place_of_a_step_that_does_not_fit():
    full = memory.Config(model="tiny", seq_len=64, remat="none")
    assert list(memory.list_alternatives(full)) == [
        *("--method lisa --remat block", "--method lora --remat block"),
        "--method lora --remat block --weights host",
    ]
    least = memory.Config(model="tiny", seq_len=64, method="lora", weights="host")
    assert "--weights host" not in memory.list_alternatives(least)


def test_saved_activations_are_measured_under_every_remat(
    tmp_path, monkeypatch, capsys
):
    arguments = ["--model=tiny", "--method=lora", "--batch-size=64", "--seq-len=128"]
    arguments += ["--remat=none", "--weights=host", f"--runs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    monkeypatch.setattr(memory, "Remat", Literal["none", "offload"])  # the two ends
    cli.run(memory.main, memory.Config)
    capsys.readouterr()
    [folder] = (tmp_path / "memory").iterdir()
    saved = json.loads((folder / "report.json").read_text())
    table = saved["tables"]["What the backward pass keeps"]
    rows = {remat: tuple(row.values()) for remat, row in table.items()}
    assert list(rows) == ["none", "offload"]
    report = MemoryReport.from_json(folder / "memory" / "train-lora.json")
    assert rows["none"] == (report.device_bytes, report.host_bytes, 0)
    assert rows["offload"][0] < rows["none"][0]
    assert rows["offload"][1] > rows["none"][1] > 0  # saved inputs; the blocks
