"""A refusal that a flag caused names the flag, whoever refuses."""

import importlib
import sys

import pytest

from experiments import lisa, memory
from experiments.harness import cli
from experiments.harness.naming import name_flags

MEASURED = "--measure-only"
REFUSED = [
    ("lisa --steps 0", "lisa: steps=0; need >= 1.", "--steps 0"),
    ("lisa --seeds", "seeds=(); need one or more", "--seeds"),
    ("lisa --lora.rank 0", "Lora: rank=0 must be", "--lora.rank 0"),
    ("lisa --lora-wide.alpha inf", "alpha=inf must", "--lora-wide.alpha inf"),
    ("lisa --full.adamw.b2 1", "b2=1.0", "--full.adamw.b2 1"),
    ("lisa --lisa.adamw.learning-rate nan", "rate=nan", "adamw.learning-rate nan"),
    ("lisa --lora.maps query", "'query'", "--lora.maps query"),
    ("lisa --lisa.master", "master=True", "--lisa.adamw.max-grad-norm"),
    ("lisa --only lisa --lisa.weights 1 2", "(1.0, 2.0)", "--lisa.weights 1 2"),
    ("lisa --lomo.clip-value -1", "clip_value=-1.0", "--lomo.clip-value -1"),
    ("lisa --gpu h20", "target='h20' is no known", "--gpu h20"),
    ("lisa --mesh.fsdp 0", "fsdp=0 must be", "--mesh.fsdp 0"),
    ("lisa --mesh.fsdp 2", "is 1 devices", "--mesh.fsdp 2, --mesh.tensor"),
    ("lisa --seq-len 99999", "seq_len=99999 exceeds", "--seq-len 99999"),
    ("lisa --model no-model", "'no-model'", "--model no-model"),
    ("lisa --only lisa --lisa.active-layers 99", "=99", "--lisa.active-layers 99"),
    ("lisa --only full --full.train blok", "'blok'", "--full.train blok"),
    ("lisa --lisa.update fused", "update='fused'", "--lisa.update fused"),
    (
        "lisa --only lora --lora.adamw.schedule cosine --steps 4",
        "steps=4: schedule='cosine' is to fall",
        "--steps 4, --lora.adamw.schedule cosine, --lora.adamw.warmup-steps",
    ),
    ("memory --weights host", "weights='host'", "--weights host"),
    ("memory --model /nope/config.json", "load: '/nope/", "--model /nope/config.json"),
    ("memory --reserve=-1", "reserve=-1.0", "--reserve -1"),
    ("mixlora --mixture.top-k 9", "top_k=9 exceeds", "--mixture.top-k 9"),
    ("mixlora --mixture.maps q", "maps=('q',)", "--mixture.maps q"),
    ("kvcache --windowkv.best 9", "best=9 must", "--windowkv.best 9"),
    (
        "kvcache --model llama2-7b --only windowkv_grid",  # by default
        "group=5 does not divide",
        "--windowkv-grid.group.",
    ),
    ("kvcache --compiled.chunk 0", "chunk=0", "--compiled.chunk 0"),
    ("kvcache --depths 2", "depths=(2.0,)", "--depths 2"),
    ("kvcache --shares 0.5 2", "shares=(0.5, 2.0)", "--shares 0.5 2"),
    ("gemfilter --gemfilter.layer 99", "layer=99", "--gemfilter.layer 99"),
    ("windowkv --tested 9 --batch-size 2", "tested=9", "--tested 9, --batch-size 2"),
]


@pytest.mark.parametrize(("command", "message", "flags"), REFUSED)
def test_a_refusal_names_the_flag(
    command, message, flags, monkeypatch, capsys, tmp_path
):
    slug, *arguments = command.split()
    module = importlib.import_module(f"experiments.{slug}")
    monkeypatch.setattr(sys, "argv", [slug, *arguments, MEASURED])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main, module.Config)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in told
    last = told.splitlines()[-1]
    assert last.startswith(" " * 12 + "Flags: ")
    assert flags in last


@pytest.mark.parametrize(
    ("message", "arguments", "words"),
    [
        # Of two flags of one name, the one that has the value.
        ("Lora: rank=0 must", "--lora.rank 8 --lora-wide.rank 0", "--lora-wide.rank 0"),
        ("AdamW: learning_rate=0.001", "--lisa.adamw.learning-rate=1e-3", "-rate 1e-3"),
        ("lisa: factors=(0.5, 2.0) x", "--factors 0.5 2", "--factors 0.5 2"),
        ("takes seq_len=8,192 tokens", "--seq-len 8192", "--seq-len 8192"),
        ("Lora: dora=True is", "--lora.dora", "--lora.dora"),
        ("of 9,000 tokens exceed", "--seq-len 9000", "--seq-len 9000"),
        ("folder='/no/lisa' cannot", "--runs /no", "--runs /no"),
        # What the message says itself, or no flag caused, is not said.
        ("--resume a: steps", "--resume a", ""),
        ("Lora: rank=0 must", "--lora.rank 8", ""),
        ("a tensor is damaged", "--only lora --steps 1", ""),
    ],
)
def test_names_and_values(message, arguments, words):
    found = name_flags(message, (lisa.Config, cli.Flags), arguments.split())
    assert words in found
    assert bool(words) == bool(found)


def test_a_flag_that_no_experiment_takes_is_left_to_the_parser(monkeypatch, capsys):
    for arguments in (["--program=x"], ["--top=x"], ["--topp=1"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse(memory.Config, "memory", arguments)
        assert stop.value.code == 2
        assert arguments[0].partition("=")[0] in capsys.readouterr().err
