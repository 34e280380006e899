"""The harness: config in and out, command line, run folder, report, pictures."""

import ast
import dataclasses
import importlib.machinery
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Annotation

from experiments import __main__ as listing
from experiments.harness import cli, config, memory, plots, report
from experiments.harness.config import ConfigError
from experiments.harness.run import Run
from experiments.harness.settings import Card, Compiled, Here, Weights, need
from experiments.harness.sweep import say_where, search
from jmem.sharding import Layout
from jmem.targets import resolve
from jmem.train.folder import FolderError
from jmem.train.loop import DivergedError

ROOT = pathlib.Path(__file__).parents[2]

type Schedule = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa:
    active_layers: int = 2
    """Blocks trained at a time."""
    weights: tuple[float, ...] = ()
    adam: Adam = Adam()

    def __post_init__(self):
        if self.active_layers < 0:
            raise ValueError(
                f"Lisa: active_layers={self.active_layers} must not be negative."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    lisa: Lisa = Lisa(active_layers=3)
    only: tuple[str, ...] = ()
    shape: tuple[int, int] = (1, 2)
    shuffle: bool = True
    data: pathlib.Path = pathlib.Path("data")
    note: str = ""
    chunk: int | None = 64
    schedule: Schedule | None = None
    gpu: str = "h200"


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """A checkout with `configs/toy/` to write presets in."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    folder = tmp_path / "configs" / "toy"
    folder.mkdir(parents=True)
    (folder / "small.toml").write_text("[lisa]\nactive_layers = 1\n")
    (folder / "claims.toml").write_text("")
    return folder


def parse(*arguments):
    return cli.parse(Config, "toy", arguments)[1]


texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.floats(allow_nan=False)
configs = st.builds(
    Config,
    lisa=st.builds(
        Lisa,
        active_layers=st.integers(0, 2**70),
        weights=st.lists(floats).map(tuple),
        adam=st.builds(
            Adam,
            learning_rate=floats,
            schedule=st.sampled_from(["constant", "cosine"]),
        ),
    ),
    only=st.lists(texts).map(tuple),
    shape=st.tuples(st.integers(), st.integers()),
    shuffle=st.booleans(),
    data=st.text("abc/. é", min_size=1).map(pathlib.Path),
    note=texts,
    chunk=st.none() | st.integers(),
    schedule=st.none() | st.sampled_from(["constant", "cosine"]),
    gpu=texts,
)


class TestToml:
    @given(configs)
    @settings(deadline=None)
    def test_what_is_written_is_read_back_equal(self, tmp_path_factory, value):
        path = tmp_path_factory.mktemp("config") / "config.toml"
        path.write_bytes(config.write(value).encode())
        assert config.read(path, Config()) == value

    def test_a_nested_table_keeps_the_defaults_its_parent_gives(self, tmp_path):
        path = tmp_path / "p.toml"
        path.write_text("[lisa.adam]\nlearning_rate = 1\n")
        read = config.read(path, Config())
        assert read == Config(lisa=Lisa(active_layers=3, adam=Adam(learning_rate=1.0)))
        assert type(read.lisa.adam.learning_rate) is float

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (
                "\n# paper, table 1\n[lisa]\nactive_layer_num = 2\n",
                ":4: unknown key 'active_layer_num'; did you mean 'active_layers'?",
            ),
            ("gpus = 'h100'\n", ":1: unknown key 'gpus'; did you mean 'gpu'?"),
            (
                "note = '''\nx\n'''\nlearning_rate = 1.0\n",
                ":4: unknown key 'learning_rate'; "
                "did you mean 'lisa.adam.learning_rate'?",
            ),
            ("zzzz = 1", ":1: unknown key 'zzzz'; known: lisa, only, shape"),
            ("[lisa]\n\nactive_layers = 2.0", ":3: active_layers=2.0 must be an int"),
            ("shuffle = 1", ":1: shuffle=1 must be true or false."),
            ("gpu = 1", ":1: gpu=1 must be a string."),
            ("\nchunk = 'none'", ":2: chunk='none' must be an integer."),
            ("schedule = 'cosin'", ":1: schedule='cosin' is none of ('constant', "),
            ("only = 'full'", ":1: only='full' must be an array, each a string."),
            ("only = ['a', 2]", ":1: only[1]=2 must be a string."),
            ("shape = [1, 2, 3]", ":1: shape=[1, 2, 3] must be an array of 2 entries"),
            (
                "lisa.adam.schedule = 'cosin'",
                ":1: schedule='cosin' is none of ('constant', 'cosine'); "
                "did you mean 'cosine'?",
            ),
            ("lisa = 3", ":1: lisa=3 must be a table: write lisa.KEY = ..."),
            (
                "[lisa]\nweights = [1]\nactive_layers = -1",
                ":3: Lisa: active_layers=-1 must not be negative.",
            ),
            ("gpu = 'h200'\nnote = ", ":2: not TOML: Invalid value."),
            ("gpu = 'a'\ngpu = 'b'", ":2: not TOML: Cannot overwrite a value."),
        ],
    )
    def test_refusals_name_file_line_and_rule(self, tmp_path, text, words):
        path = tmp_path / "p.toml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            config.read(path, Config())
        assert str(caught.value).startswith(f"{path}{words}")

    def test_a_file_that_is_no_text(self, tmp_path):
        path = tmp_path / "p.toml"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="cannot be read"):
            config.read(path, Config())

    def test_lines_of_keys(self):
        text = 'a = [\n 1,\n]\n\n# why\nb.c = """\n[d]\n"""\n[e]\nf = 1\n'
        lines = config.locate(text)
        assert lines == {("a",): 1, ("b",): 6, ("b", "c"): 6, ("e",): 9, ("e", "f"): 10}

    @pytest.mark.parametrize(
        "hint", [int | str, int | str | None, dict | None, list[int], tuple[Adam, ...]]
    )
    def test_a_field_of_another_type_cannot_be_in_a_config(self, hint):
        bad = dataclasses.make_dataclass("Bad", [("field", hint, None)], frozen=True)
        with pytest.raises(TypeError, match=r"Bad\.field: .* is no type of a config's"):
            config.check(bad)

    def test_a_config_must_be_frozen(self):
        bad = dataclasses.make_dataclass("Bad", [("field", int, 0)])
        with pytest.raises(TypeError, match="must be a frozen dataclass"):
            config.check(bad)


class TestCommandLine:
    def test_flags_come_after_the_preset(self, presets):
        assert parse() == Config()
        assert parse("--preset", "small").lisa == Lisa(active_layers=1)
        chosen = parse(
            "--lisa.active-layers", "7", "--preset=small", "--only", "a", "b"
        )
        assert chosen == Config(lisa=Lisa(active_layers=7), only=("a", "b"))
        assert parse("--lisa.adam.learning-rate", "1e-5", "--no-shuffle") == Config(
            lisa=Lisa(active_layers=3, adam=Adam(learning_rate=1e-5)), shuffle=False
        )

    def test_nothing_is_a_word(self, presets):
        (presets / "none.toml").write_text('chunk = "None"\nschedule = "cosine"\n')
        read = parse("--preset", "none", "--schedule", "None")
        assert (read.chunk, read.schedule) == (None, None)
        assert parse("--preset", "none", "--chunk", "8").chunk == 8

    def test_preset_may_be_a_path(self, presets):
        path = presets / "small.toml"
        assert parse("--preset", str(path)).lisa.active_layers == 1

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("smal", "no configs/toy/smal.toml; did you mean 'small'?"),
            ("claims", "no configs/toy/claims.toml; "),
            ("other/small.toml", "--preset other/small.toml: no such file."),
        ],
    )
    def test_missing_preset(self, presets, name, words):
        with pytest.raises(ConfigError) as caught:
            parse("--preset", name)
        assert words in str(caught.value)

    def test_unknown_flag_ends_with_the_nearest(self, presets, capsys):
        with pytest.raises(SystemExit) as caught:
            parse("--lisa.active-layer", "2")
        assert caught.value.code == 2
        assert "--lisa.active-layers" in capsys.readouterr().err

    def test_help_shows_fields_and_flags(self, presets, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.parse(Config, "toy", ["--help"], "What it answers.")
        shown = capsys.readouterr().out
        assert caught.value.code == 0
        for words in (
            "What it answers.",
            "--measure-only",
            "Blocks trained at a time.",
        ):
            assert words in shown

    def test_a_field_may_not_hide_a_flag(self, presets):
        bad = dataclasses.make_dataclass("Bad", [("trace", int, 0)], frozen=True)
        with pytest.raises(TypeError, match=r"Bad\.trace is a flag of every"):
            cli.parse(bad, "toy", [])

    def test_resume_takes_the_saved_config_and_refuses_another(self, presets, tmp_path):
        saved = Config(lisa=Lisa(active_layers=5), note="mine")
        (tmp_path / "config.toml").write_text(config.write(saved))
        folder = str(tmp_path)
        assert parse("--resume", folder) == saved
        assert parse("--resume", folder, "--lisa.active-layers", "5") == saved
        with pytest.raises(ConfigError) as caught:
            parse("--resume", folder, "--lisa.active-layers", "4")
        assert str(caught.value).startswith(
            f"--resume {folder}: lisa.active_layers=4 differs from the saved run's 5."
        )
        with pytest.raises(ConfigError, match=r"lisa.active_layers=1 differs"):
            parse("--resume", folder, "--preset", "small")

    def test_a_run_may_go_on_on_another_gpu(self, presets, tmp_path):
        (tmp_path / "config.toml").write_text(config.write(Config(gpu="h200x8")))
        moved = parse("--resume", str(tmp_path), "--gpu", "h200")
        assert moved == Config(gpu="h200")

    def test_resume_of_nothing(self, presets, tmp_path):
        with pytest.raises(ConfigError, match="no run was saved there"):
            parse("--resume", str(tmp_path / "gone"))
        (tmp_path / "config.toml").write_text("")
        with pytest.raises(ConfigError, match="there is nothing to resume"):
            parse("--resume", str(tmp_path), "--measure-only")


EXPERIMENT = '''
"""Toy: what it answers.

More.
"""
import dataclasses
from experiments.harness import cli

@dataclasses.dataclass(frozen=True)
class Config:
    gpu: str = "h200"
    fail: str = ""

def main(config, run):
    if config.fail == "refused":
        raise ValueError("Toy: fail='refused' is refused.\\nUse another.")
    if config.fail == "bug":
        1 / 0
    run.note(f"compiled for {run.target.name}")
    if config.fail == "stopped":
        raise KeyboardInterrupt("toy: stopped after update 3")

if __name__ == "__main__":
    cli.run(main, Config)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    """Runs `python -m experiments.toy` in this process: (exit status, out, err)."""
    module = types.ModuleType("experiments.toy")
    module.__spec__ = importlib.machinery.ModuleSpec("experiments.toy", None)
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    monkeypatch.chdir(tmp_path)
    exec(EXPERIMENT, vars(module))

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
        try:
            cli.run(module.main, module.Config)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return start


class TestProcess:
    """From the command line to the exit status."""

    def test_run_leaves_config_and_report(self, toy, tmp_path):
        status, out, err = toy("--gpu", "rtx4090")
        assert (status, err) == (0, "")
        assert "compiled for rtx4090" in out
        [folder] = (tmp_path / "runs" / "toy").iterdir()
        saved = json.loads((folder / "report.json").read_text())
        assert saved["command"] == "python -m experiments.toy --gpu rtx4090"
        assert (saved["status"], saved["target"]) == ("complete", "rtx4090")
        assert saved["config"] == {"gpu": "rtx4090", "fail": ""}
        assert 'gpu = "rtx4090"' in (folder / "config.toml").read_text()

    def test_refusal_is_one_message_and_leaves_nothing(
        self, toy, tmp_path, monkeypatch
    ):
        assert toy("--fail", "refused") == (
            2,
            "",
            "ValueError: Toy: fail='refused' is refused.\n            Use another.\n",
        )
        assert not list((tmp_path / "runs" / "toy").iterdir())
        monkeypatch.setenv("JMEM_DEBUG", "1")
        with pytest.raises(ValueError, match="is refused"):
            toy("--fail", "refused")

    def test_a_bug_keeps_its_traceback(self, toy):
        with pytest.raises(ZeroDivisionError):
            toy("--fail", "bug")

    def test_unknown_gpu_is_refused_before_any_work(self, toy, tmp_path):
        status, _, err = toy("--gpu", "h20")
        assert status == 2
        assert err.startswith("ValueError: target='h20' is no known GPU; did you mean")
        assert not (tmp_path / "runs").exists()

    def test_folder_that_cannot_be_written(self, toy, tmp_path):
        (tmp_path / "file").touch()
        status, _, err = toy("--runs", "file/runs")
        assert status == 2
        assert err.startswith("FolderError: folder='file/runs/toy' cannot be written")

    def test_interruption_leaves_a_report_and_says_how_to_go_on(self, toy, tmp_path):
        status, out, err = toy("--fail", "stopped")
        [folder] = (tmp_path / "runs" / "toy").iterdir()
        assert (status, err) == (130, "")
        assert "toy: stopped after update 3" in out
        assert f"experiments.toy --resume runs/toy/{folder.name}" in out
        saved = json.loads((folder / "report.json").read_text())
        assert saved["status"] == "interrupted"
        status, _, err = toy("--resume", str(folder), "--fail", "")
        assert status == 2
        assert "fail='' differs from the saved run's 'stopped'" in err

    def test_as_a_module(self, tmp_path):
        (tmp_path / "toy.py").write_text(EXPERIMENT)
        done = subprocess.run(
            [sys.executable, "-m", "toy", "--fail", "refused"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("ValueError: Toy: fail='refused'")
        assert (tmp_path / "runs" / "toy").is_dir()  # named by the module, not __main__


@pytest.mark.parametrize(
    ("error", "refusal"),
    [("raise ConfigError('x')", True), ("int('x')", False), ("1 / 0", False)],
)
def test_what_jax_or_python_raises_is_no_refusal(error, refusal):
    source = "from experiments.harness.config import ConfigError\n" + error
    with pytest.raises(Exception) as caught:
        exec(source, {"__name__": "somewhere.else"})
    assert cli.is_refusal(caught.value) is refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    check: bool = False
    """Whether it is only looked at."""
    only: tuple[Schedule, ...] = ()
    out: pathlib.Path | None = None


class TestScript:
    """A command line without presets and runs."""

    def start(self, arguments, main=lambda command: None):
        with pytest.raises(SystemExit) as stop:
            cli.script(main, Command, arguments)
        return stop.value.code

    def test_fields_are_flags_and_the_status_is_what_main_returns(self):
        seen = []
        flags = ["--check", "--only", "cosine", "--out", "a.json"]
        assert self.start(flags, lambda command: seen.append(command) or 3) == 3
        assert seen == [
            Command(check=True, only=("cosine",), out=pathlib.Path("a.json"))
        ]
        assert self.start([]) == 0

    def test_help_is_the_module_and_the_fields(self, capsys):
        assert self.start(["--help"]) == 0
        shown = capsys.readouterr().out
        assert "python -m experiments.test_harness" in shown
        assert "The harness: config in and out" in shown
        assert "Whether it is only looked at." in shown
        assert "--no-check" not in shown

    def test_refusals_bugs_and_interruptions(self, capsys):
        def main(command):
            if command.check:
                raise KeyboardInterrupt
            raise ConfigError("out=None is needed.") if command.only else KeyError

        assert self.start(["--check"], main) == 130
        assert self.start(["--only", "cosine"], main) == 2
        assert capsys.readouterr().err == "ConfigError: out=None is needed.\n"
        with pytest.raises(KeyError):
            cli.script(main, Command, [])
        assert self.start(["--chek"]) == 2
        assert "--check" in capsys.readouterr().err

    def test_parsing_starts_no_jax(self):
        code = "import sys, experiments.harness.cli; print('jax' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.strip() == "False", done.stderr


class TestNeed:
    """One helper refuses what is out of range."""

    @pytest.mark.parametrize(
        ("field", "value", "rules", "words"),
        [
            ("chunk", 0, {"least": 1}, "chunk=0; need >= 1."),
            ("chunk", 2, {"above": 0, "below": 2}, "chunk=2; need > 0 and < 2."),
            ("chunk", 9, {"most": 8, "why": "so"}, "chunk=9; need <= 8; so."),
            ("only", (), {"some": True}, r"only=(); need one or more."),
            (
                *("shape", (0, 1), {"above": 0, "once": True}),
                "shape=(0, 1); need each > 0, none twice.",
            ),
            ("shape", (1, 1), {"once": True}, "shape=(1, 1); need none twice."),
        ],
    )
    def test_it_says_which_field_and_what_it_needs(self, field, value, rules, words):
        with pytest.raises(ValueError) as caught:
            need(dataclasses.replace(Config(), **{field: value}), field, **rules)
        assert str(caught.value) == f"test_harness: {words}"

    def test_what_is_within_or_nothing_passes(self):
        need(Config(chunk=None), "chunk", least=1)
        need(Config(), "shape", least=1, most=2, some=True, once=True)
        need(Config(), "only", least=1, once=True)

    def test_a_table_speaks_for_itself(self):
        with pytest.raises(ValueError, match=r"^Compiled: batch_size=0; need >= 1\.$"):
            Compiled(batch_size=0)


class TestSettings:
    def test_a_sequence_must_fit_the_positions(self):
        weights = Weights(model="gpt2")
        assert weights.dimensions(prompt=1000, new_tokens=24).layers == 12
        with pytest.raises(ValueError) as caught:
            weights.dimensions(prompt=1000, new_tokens=25)
        assert str(caught.value) == (
            "Weights: prompt=1000 + new_tokens=25 exceed the 1,024 positions of gpt2."
        )

    def test_compiled_and_run_are_two_models(self):
        card, here = Card(dtype="mixed"), Here()
        dims = Weights().dimensions()
        model = card.build(resolve("h200"), dims, remat="dots")
        assert (str(model.dtype), str(model.stored_dtype)) == ("bfloat16", "float32")
        assert (model.attention, model.remat, model.chunk) == ("cudnn", "dots", None)
        own = here.build_here(dims, chunk=8)
        assert (own.attention, own.remat, own.chunk) == ("xla", "none", 8)

    def test_a_mesh_and_its_target_are_of_one_size(self):
        dims = Weights().dimensions()
        with pytest.raises(ValueError, match=r"gpu='h200x4' is 4 devices, and mesh"):
            Card().build(resolve("h200x4"), dims, layout=Layout(fsdp=2))

    def test_a_checkpoint_without_a_tokenizer_is_refused(self, checkpoint):
        weights = Weights(model=str(checkpoint))
        model = Here().build_here(weights.dimensions())
        opened, tokenizer = weights.open(model)
        assert opened.dtype == "float32"
        assert tokenizer.get_vocab_size() == 257
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (checkpoint / name).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"put the model.s tokenizer\.json beside"):
            weights.open(model)


@dataclasses.dataclass
class Memory:
    """What a run and the pictures ask of a `jmem.MemoryReport`."""

    by_kind: dict
    usable_bytes: int = 20 * 2**30
    target: str = "toy"
    devices: int = 1
    host_bytes: int = 0
    compile_seconds: float = 1.5
    stablehlo_hash: str = "0123"

    @property
    def device_bytes(self):
        return sum(self.by_kind.values())

    def fits(self, reserve=2**30):
        return self.device_bytes <= self.usable_bytes - reserve

    def to_json(self):
        fields = ("interval", "argument_bytes", "by_label")
        more = {"device_bytes": self.device_bytes} | dict.fromkeys(fields)
        return json.dumps(dataclasses.asdict(self) | more)


def memories():
    gib = 2**30
    small = {"parameters": 4 * gib, "optimizer": 8 * gib, "batch": 1000}
    return {"lora": Memory(small), "full": Memory(small | {"gradients": 12 * gib})}


class TestRun:
    def start(self, tmp_path, **options):
        return Run("toy", Config(), target=resolve("l4"), runs=tmp_path, **options)

    def test_report_holds_what_was_said(self, tmp_path, capsys):
        with self.start(tmp_path) as run:
            run.note("Not a ranking.")
            run.table(
                "Held-out loss",
                ["method", report.Column("loss", report.loss), "steps"],
                [["full", 2.34567, 1600], ["lora [r8]", None, 16]],
            )
            for name, own in memories().items():
                run.record(own, name)
            memory.tabulate_kinds(run)
            run.plot("memory", lambda: plots.draw_memory(run.memory))
        shown = capsys.readouterr().out
        for words in ("lora [r8]", "2.3457", "1,600", "24.00 GiB", "does not fit"):
            assert words in shown

        [folder] = (tmp_path / "toy").iterdir()
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")}
        assert files == {
            *("config.toml", "report.json", "report.md", "memory.png"),
            *("memory/full.json", "memory/lora.json"),
        }
        saved = json.loads((folder / "report.json").read_text())
        losses = saved["tables"]["Held-out loss"]
        assert losses["full"] == {"loss": 2.34567, "steps": 1600}
        kinds = saved["tables"]["Memory at the peak on toy, GiB"]
        total = kinds.pop("total")
        assert total == {"lora": 12 * 2**30 + 1000, "full": 24 * 2**30 + 1000}
        assert {n: sum(row[n] for row in kinds.values()) for n in total} == total
        assert kinds["other"] == {"lora": 1000, "full": 1000}
        assert saved["memory"]["full"]["fits"] is False
        assert saved["notes"] == ["Not a ranking."]
        page = (folder / "report.md").read_text()
        assert "| full | 2.3457 | 1,600 |" in page
        assert "![memory](memory.png)" in page

    def test_folder_is_made_when_something_is_written(self, tmp_path):
        run = self.start(tmp_path)
        assert not list((tmp_path / "toy").iterdir())
        methods = run.folder_of("lisa")
        assert methods.is_dir()
        assert config.read(run.folder / "config.toml", Config()) == Config()
        assert run.folder_of("lisa") == methods

    def test_two_runs_of_one_second_do_not_share_a_folder(self, tmp_path):
        first, second = self.start(tmp_path), self.start(tmp_path)
        second._folder = first._folder
        assert first.folder != second.folder

    def test_failure_keeps_what_was_said(self, tmp_path):
        with pytest.raises(RuntimeError), self.start(tmp_path) as run:
            run.folder_of("full")
            run.note("so far")
            raise RuntimeError("the machine burns")
        saved = json.loads((run.folder / "report.json").read_text())
        assert (saved["status"], saved["error"]) == ("failed", "the machine burns")
        assert saved["notes"] == ["so far"]

    def test_resumed_run_writes_where_it_was(self, tmp_path):
        with self.start(tmp_path) as run:
            run.note("first")
        with self.start(tmp_path, resume=run.folder) as again:
            again.note("second")
        assert (again.folder, again.resume, run.resume) == (run.folder, True, False)
        assert json.loads((run.folder / "report.json").read_text())["notes"] == [
            "second"
        ]

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(FolderError, match=r"cannot be written: No space left"):
            self.start(tmp_path)

    def test_a_table_needs_whole_rows_of_different_names(self, tmp_path):
        run = self.start(tmp_path)
        with pytest.raises(ValueError, match=r"row \['a'\]|row \('a',\) has 1 values"):
            run.table("T", ["x", "y"], [["a"]])
        with pytest.raises(ValueError, match="two rows are named 'a'"):
            run.table("T", ["x"], [["a"], ["a"]])

    def test_report_says_null_for_what_is_not_finite(self, tmp_path):
        with self.start(tmp_path) as run:
            run.table("T", ["x", "y"], [["a", float("nan")]])
        saved = json.loads((run.folder / "report.json").read_text())
        assert saved["tables"]["T"]["a"]["y"] is None


class TestSweep:
    def sweep(self, tmp_path, diverges, factors=(1.0, 3.0)):
        def train(trial, folder):
            if diverges(trial):
                raise DivergedError("update 3: loss=nan is not finite.")
            return {"choose": 2 / trial.factor, "loss": 1.0 + trial.seed}

        run = Run("toy", Config(), runs=tmp_path)
        return run, search(run, ["one"], factors, (0, 1), train)

    def test_a_rate_that_diverges_is_not_chosen(self, tmp_path):
        run, found = self.sweep(tmp_path, lambda trial: trial.factor == 3)
        assert found["one"].factor == 1
        assert found["one"].losses == (1, 2)
        told = json.loads((run.folder / "one-x3-seed0" / "done.json").read_text())
        assert told["diverged"].startswith("update 3")

    @pytest.mark.parametrize(
        "diverges, words",
        [
            (lambda trial: True, "one, at every rate: update 3"),
            (lambda trial: trial.seed == 1, "one, seed 1: update 3"),
        ],
    )
    def test_nothing_left_to_compare_is_said(self, tmp_path, diverges, words):
        with pytest.raises(DivergedError, match=words):
            self.sweep(tmp_path, diverges)

    def test_trials_of_another_machine_keep_its_name(self, tmp_path):
        run = Run("toy", Config(), runs=tmp_path)
        done = {"choose": 0.5, "loss": 1.0}
        places = {"device": "NVIDIA H200", "jax": "0.11.2"}
        for factor, more in ((1, places), (3, {})):
            folder = run.folder_of(f"one-x{factor}-seed0")
            (folder / "done.json").write_text(json.dumps(done | more))
        found = search(run, ["one"], (1.0, 3.0), (0,), lambda *trial: {})
        assert say_where(found.values()) == (
            "Trained on NVIDIA H200 with JAX 0.11.2 and a device that was not noted."
        )


class TestPictures:
    def texts(self, figure):
        figure.draw_without_rendering()
        [axes] = figure.axes
        return [text.get_text() for text in axes.texts]

    def test_memory_names_size_verdict_and_limit(self):
        figure = plots.draw_memory(memories(), title="x")
        assert self.texts(figure) == [
            "12.00 GiB",
            "24.00 GiB  does not fit",
            " toy: 20.0 GiB usable",
        ]
        [axes] = figure.axes
        ends = axes.dataLim.get_points()[:, 0].tolist()
        assert ends == pytest.approx([0, 24], abs=1e-3)

    def test_memory_says_when_the_limit_is_out_of_sight(self):
        reports = {"small": Memory({"parameters": 2**30})}
        assert "beyond the right edge" in self.texts(plots.draw_memory(reports))[-1]

    def test_losses_name_each_curve_once_and_apart(self):
        rows = {
            name: [{"step": s, "loss": 2.0 + 1 / s} for s in range(1, 9)]
            + [{"step": s, "held_out_loss": 2.5} for s in (0, 8)]
            for name in ("full", "lora", "lisa")
        }
        figure = plots.draw_losses(rows)
        assert self.texts(figure)[:3] == ["full", "lisa", "lora"]
        texts = figure.axes[0].texts
        places = [text.xy[1] for text in texts if isinstance(text, Annotation)]
        assert len(places) == 3
        assert places == sorted(set(places))

    def test_names_that_would_leave_the_top_stay_apart_below_it(self):
        rows = {name: [{"step": s, "loss": 2.0} for s in (1, 2)] for name in "abcdef"}
        rows["low"] = [{"step": s, "loss": 1.0} for s in (1, 2)]
        figure = plots.draw_losses(rows)
        figure.draw_without_rendering()
        [axes] = figure.axes
        places = [text.xy[1] for text in axes.texts if isinstance(text, Annotation)]
        low, high = axes.get_ylim()
        assert all(low <= place <= high for place in places)
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert min(gaps) > 0.05 * (high - low)

    def test_quality_has_a_curve_a_policy_and_the_full_cache(self):
        curves = {
            name: [(share, share + up, share, 1.0) for share in (0.1, 0.2, 0.4)]
            for name, up in (("snapkv", 0.1), ("windowkv", 0.5))
        }
        panels = [
            plots.Panel(
                title="needles",
                label="kept",
                curves=curves,
                reference=1.0,
                percent=percent,
            )
            for percent in (True, False)
        ]
        figure = plots.draw_quality(panels, (0.1, 0.2, 0.4), title="at equal bytes")
        figure.draw_without_rendering()
        first, second = figure.axes
        for axes in (first, second):
            words = [text.get_text() for text in axes.texts]
            assert words == ["full cache", "snapkv", "windowkv"]
            shown = [label.get_text() for label in axes.get_xticklabels()]
            assert shown == ["10 %", "20 %", "40 %"]
            assert len(axes.containers) == 2
        drawn = [np.asarray(line.get_ydata()).tolist() for line in first.lines]
        assert [point[1] for point in curves["snapkv"]] in drawn
        assert first.get_yticklabels()[-1].get_text().endswith("%")
        assert not second.get_yticklabels()[-1].get_text().endswith("%")

    def test_a_curve_for_each_share_and_the_layer_that_is_used(self):
        curves = {"12.5 % kept": [0.1, 0.6, 1.0], "50 % kept": [0.5, 1.0, 1.0]}
        figure = plots.draw_by_index(
            *(curves, 2), mark="layer 2 is used", index_label="layer", label="recall"
        )
        assert self.texts(figure) == [" layer 2 is used"]
        [axes] = figure.axes
        drawn = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
        assert drawn[1:] == list(curves.values())
        styles = {(line.get_color(), line.get_marker()) for line in axes.lines[1:]}
        assert len(styles) == 2
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == list(curves)

    def test_cells_say_their_numbers_and_a_panel_its_sum(self):
        panels = {
            "full": [[(4, 4), (3, 4)], [(2, 4), (0, 0)]],
            "snapkv": [[(4, 4), (0, 3)], [(1, 2), (0, 0)]],
        }
        figure = plots.draw_cells(
            panels, rows=["0 %", "100 %"], columns=["512", "1,024"]
        )
        figure.draw_without_rendering()
        full, snapkv = figure.axes
        assert full.get_title(loc="left") == "full  9/12"
        words = [text.get_text() for text in snapkv.texts]
        assert words == ["4/4", "0/3", "1/2", ""]
        [mesh] = snapkv.collections
        colours = np.asarray(mesh.get_facecolor())
        light = colours[:, :3].sum(axis=1)
        assert light[0] < light[2] < light[1]  # all kept is dark
        assert colours[3, 3] == 0  # nothing drawn above the hatches
        assert snapkv.patch.get_hatch()
        assert [tick.get_text() for tick in full.get_yticklabels()] == ["0 %", "100 %"]

    def test_a_last_row_of_panels_may_be_short(self):
        figure = plots.draw_cells(
            {name: [[(1, 2)]] for name in "abcde"}, rows=["0 %"], columns=["512"]
        )
        assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]


def test_listing_reads_every_experiment_without_importing(capsys):
    listing.main()
    shown = capsys.readouterr().out.splitlines()
    files = sorted(p.stem for p in (ROOT / "experiments").glob("[!_]*.py"))
    assert [line.split()[2] for line in shown] == [f"experiments.{n}" for n in files]
    for name, line in listing.list_experiments().items():
        tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
        assert line
        assert (ast.get_docstring(tree) or "").startswith(line)


def test_harness_leaves_matplotlib_and_tyro_alone():
    code = textwrap.dedent(
        """
        import sys
        import experiments.harness.cli, experiments.harness.plots
        print({"matplotlib", "tyro", "orbax", "datasets", "flax"} & set(sys.modules))
        """
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
