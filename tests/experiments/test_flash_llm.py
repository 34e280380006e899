"""The Flash-LLM experiment: programs at full scale, and a run on a tiny checkpoint."""

import dataclasses
import json
import shutil

import jax
import pytest
from tiny_decoder import TINY, random_params

import jmem.checkpoints
from experiments import flash_llm
from experiments.harness import cli
from experiments.harness.run import Run
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.targets import resolve


@pytest.fixture(scope="module")
def config(tmp_path_factory, byte_tokenizer):
    dims = dataclasses.replace(TINY, vocab_size=264, layers=2, hidden=64, head_dim=16)
    folder = tmp_path_factory.mktemp("own") / "model"
    params = random_params(dims, scale=0.1)
    jmem.checkpoints.save(params, dims, folder, byte_tokenizer)
    return flash_llm.Config(
        model=str(folder),
        criteria=("wanda", "magnitude"),
        sparsities=(0.75,),
        integers=("int4",),
        dense=("Q8_0",),
        recover_sparsity=0.5,
        recover_steps=2,
        recover=Full(adamw=AdamW(learning_rate=1e-3), keep_zeros=True),
        calibration_tokens=256,
        held_out_tokens=128,
        seq_len=32,
        batch_size=4,
        question="ab",
    )


def run(config, folder, **more):
    target = resolve(config.gpu)
    with (
        pytest.MonkeyPatch.context() as patch,
        Run("flash_llm", config, target=target, runs=folder, **more) as started,
    ):
        patch.setattr(flash_llm, "report_memory", lambda *parts: None)
        flash_llm.main(config, started)
    return started.folder


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("finished"))


def tables(folder):
    return json.loads((folder / "report.json").read_text())["tables"]


def test_loss_and_bytes_of_every_kind_of_weights(config, finished):
    rows = tables(finished)["Loss against bytes"]
    assert list(rows) == [
        *("16 bits", "Q8_0"),
        *("wanda 75 %", "wanda, int4 75 %", "magnitude 75 %"),
    ]
    plain, rounded = rows["16 bits"], rows["Q8_0"]
    assert plain["maps"] == 2 * 2 * (3 * 64 * 64 + 64 * (64 + 32 + 32 + 64))
    flags = 7 * 2  # which type, a byte a map and layer
    assert rounded["maps"] == plain["maps"] * 34 / 64 + flags
    assert plain["lost"] == 0
    assert abs(rounded["lost"]) < abs(rows["magnitude 75 %"]["lost"])
    assert rows["wanda, int4 75 %"]["maps"] < rows["wanda 75 %"]["maps"]
    assert (finished / "loss_by_bytes.png").stat().st_size > 10_000


def test_zeros_stay_zeros_while_the_loss_falls(finished):
    tuned = tables(finished)["Fine-tuned, zeros kept"]
    assert tuned["wanda 50 %"]["zeros after"] == 0.5
    assert tuned["16 bits"]["zeros after"] == 0
    for row in tuned.values():
        assert row["after"] < row["before"]


def test_a_finished_run_prunes_nothing_twice(config, finished, tmp_path, monkeypatch):
    again = shutil.copytree(finished, tmp_path / "again")
    monkeypatch.setattr(flash_llm, "prune", None)
    assert run(config, tmp_path, resume=again) == again
    assert tables(again) == tables(finished)


def test_a_preset_describes_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr(jmem.checkpoints, "load", None)
    _, config = cli.parse(flash_llm.Config, "flash_llm", ["--preset", "opt_175b"])
    built = flash_llm.programs(config, resolve(config.gpu))
    assert list(built) == ["dense", "FragBitmap-80", "TiledCSL-80"]
    held = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(p.args))
        for name, p in built.items()
    }
    assert held["FragBitmap-80"] < 126e9 < held["TiledCSL-80"] < held["dense"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"sparsities": (1.0,)}, r"sparsities=\(1.0,\); need each >= 0 and < 1"),
        ({"criteria": ()}, r"criteria=\(\); need one or more"),
        ({"recover_sparsity": -0.1}, "recover_sparsity=-0.1; need >= 0 and < 1"),
        ({"seq_len": 1}, "seq_len=1; need >= 2"),
    ],
)
def test_refuses(given, words):
    with pytest.raises(ValueError, match=words):
        flash_llm.Config(**given)
