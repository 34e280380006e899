"""What a run leaves in tuned/: by itself, from a run that was stopped, or nothing."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmem.checkpoints
from experiments import export, lisa, mixlora
from experiments.harness import cli, exports, training
from experiments.harness.config import ConfigError
from experiments.harness.run import Run
from experiments.harness.sweep import Trial, parse_trial, search
from jmem.checkpoints import CheckpointError
from jmem.disk import DamagedError, open_sealed
from jmem.finetune import tuned
from jmem.train.checkpoint import Checkpoints
from jmem.train.folder import FolderError
from jmem.train.loop import DivergedError


@pytest.fixture
def config(checkpoint):
    return lisa.Config(
        model=str(checkpoint), only=("full", "lora"), steps=4, seq_len=64
    )


@dataclasses.dataclass
class Trained:
    """A run of `config` as `learn` sees it, and states that no step has made."""

    run: Run
    config: lisa.Config

    def __post_init__(self):
        self.model = lisa.build_here(self.config)
        self.checkpoint, _ = self.config.open(self.model)
        self.methods = lisa.make_finetuners(self.config)

    def plan(self):
        given = self.run, self.model, self.checkpoint, self.methods
        self.config.plan_exports(*given)
        return self.run.exports

    def make_state(self, method, value):
        described = tuned.describe_state(self.methods[method], self.model)
        return jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), described)

    def keep(self, method, step, value, where="checkpoints"):
        place = self.run.folder_of(method) / where
        Checkpoints(place).save(step, self.make_state(method, value), data="any")

    def learn(self, method):
        own, params = self.methods[method], self.checkpoint.params()
        given: Any = self.run, own, self.model, params, ()
        folder = self.run.folder_of(method)
        return training.learn(*given, folder=folder, steps=4, seed=0)


@pytest.fixture
def trained(config, tmp_path, monkeypatch):
    """It trains nothing: what would be trained is 0.25 everywhere."""
    made = Trained(Run("lisa", config, runs=tmp_path / "runs"), config)

    def train(finetuner, model, state, data, **more):
        return made.make_state(more["folder"].name, 0.25)

    monkeypatch.setattr(training, "train", train)
    return made


def about(place):
    path = place / exports.ABOUT
    return open_sealed(path.read_bytes(), str(path))


class TestByItself:
    def test_a_run_ends_with_what_it_tuned_and_how_to_load_it(self, trained, capsys):
        with trained.run as run:
            trained.plan()
            for method in trained.methods:
                trained.learn(method)
        printed = capsys.readouterr().out
        assert "tuned/ will take" in printed
        place = run.folder / "tuned"
        whole, adapter = place / "full", place / "lora"
        for words in (
            "4 updates at rate 5e-05, seed 0, weights in float32",
            f'transformers.AutoModelForCausalLM.from_pretrained("{whole}")',
            f'from_pretrained("{trained.config.model}"), "{adapter}")',
            f'from jmem.finetune import tuned; tuned.load("{adapter}")',
        ):
            assert words in printed
            assert words in (run.folder / "report.md").read_text()
        model, params, checkpoint = tuned.load(whole)
        assert {float(leaf.min()) for leaf in jax.tree.leaves(params)} == {0.25}
        assert checkpoint.tokenizer is not None
        found = jmem.checkpoints.load_adapter(adapter, model.config)
        assert found.base == trained.config.model
        assert {float(leaf.max()) for leaf in jax.tree.leaves(found.adapters)} == {0.25}

    def test_or_with_nothing(self, trained):
        trained.config = dataclasses.replace(trained.config, export="none")
        assert trained.plan() is None

    def test_its_bytes_are_told_and_checked_before(self, trained, monkeypatch, capsys):
        free = shutil.disk_usage("/")._replace(free=200_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        words = r"tuned/ \(full .* KiB, lora .* KiB; --export none leaves it out\)"
        with pytest.raises(FolderError, match=words):
            trained.plan()
        assert not trained.run.place.exists()
        monkeypatch.undo()
        told = {
            method: tuned.count_bytes(own, trained.model, trained.checkpoint)
            for method, own in trained.methods.items()
        }
        made = trained.plan()
        assert f"full {exports.format_size(told['full'])}" in capsys.readouterr().out
        for method, size in told.items():
            state = trained.make_state(method, 0)
            place = made.write(method, trained.methods[method], state, steps=4, seed=0)
            found = sum(file.stat().st_size for file in place.iterdir())
            assert 0 <= found - size < 16_000  # jmem.json, and safetensors' header

    def test_a_folder_of_somebody_else_is_never_overwritten(self, trained):
        mine = trained.run.folder / "tuned" / "lora" / "notes.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        with pytest.raises(CheckpointError, match="does not say that a run of lisa"):
            trained.plan()
        assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]

    def test_a_later_state_takes_the_place_of_an_earlier_one(self, trained):
        made = trained.plan()

        def write(steps, value):
            given = "lora", trained.methods["lora"], trained.make_state("lora", value)
            return made.write(*given, steps=steps, seed=0)

        place = write(4, 1.0)
        before = (place / "adapter_model.safetensors").stat().st_mtime_ns
        write(4, 1.0)  # the same once more, as in a run that is resumed
        assert (place / "adapter_model.safetensors").stat().st_mtime_ns == before
        write(8, 2.0)
        assert about(place)["updates"] == 8
        found = jmem.checkpoints.load_adapter(place, trained.checkpoint.config)
        assert {float(leaf.max()) for leaf in jax.tree.leaves(found.adapters)} == {2.0}
        assert [path.name for path in place.parent.iterdir()] == ["lora"]

    def test_one_that_lost_something_is_written_again(self, trained):
        made = trained.plan()
        given = "lora", trained.methods["lora"], trained.make_state("lora", 1.0)
        place = made.write(*given, steps=4, seed=0)
        (place / "adapter_model.bin").write_text("the user's, by the line that is told")
        assert made.write(*given, steps=4, seed=0) == place
        assert (place / "adapter_model.bin").exists()
        (place / "adapter_model.safetensors").write_text("cut")
        made.write(*given, steps=4, seed=0)
        jmem.checkpoints.load_adapter(place, trained.checkpoint.config)
        for content in (b"{}", b'{"experiment": "lisa"}', b"\xff", b"[" * 9**5):
            (place / exports.ABOUT).write_bytes(content)
            with pytest.raises(CheckpointError, match="does not say that a run of"):
                made.write(*given, steps=4, seed=0)
            with pytest.raises(DamagedError):
                made.tell()

    def test_a_write_that_fails_leaves_what_was_there(self, trained, monkeypatch):
        made = trained.plan()
        state = trained.make_state("lora", 1.0)
        given = "lora", trained.methods["lora"], state
        place = made.write(*given, steps=4, seed=0)
        free = shutil.disk_usage("/")._replace(free=5)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(CheckpointError, match=r"tuned/lora: needs .* has 5 free"):
            made.write(*given, steps=8, seed=0)
        assert about(place)["updates"] == 4
        assert [path.name for path in place.parent.iterdir()] == ["lora"]
        words = r"full: needs .*\n.* is in .*full/checkpoints, and --resume .*/lisa/"
        with pytest.raises(CheckpointError, match=words):
            trained.learn("full")

    def test_what_a_killed_process_left_is_removed(self, trained):
        left = trained.run.folder / "tuned" / ".lora.0123abcd.partial"
        left.mkdir(parents=True)
        (left / "adapter_model.safetensors").write_text("half")
        trained.plan()
        assert not left.exists()


class TestComparison:
    def compare(self, trained, diverges=()):
        made = trained.plan()

        def train(trial, folder):
            if trial.factor in diverges:
                raise DivergedError("update 3: loss=nan is not finite.")
            if trial.seed == 0:
                made.write(
                    folder.name,
                    trained.methods["lora"],
                    trained.make_state("lora", trial.factor),
                    steps=4,
                    seed=trial.seed,
                )
            return {"choose": 1 / trial.factor, "loss": 1.0}

        search(trained.run, ["lora"], (0.5, 1.0, 2.0), (0, 1), train)
        return made.folder

    @pytest.mark.parametrize(("diverges", "best"), [((), 2.0), ((2.0,), 1.0)])
    def test_it_leaves_the_first_seed_at_the_best_rate(self, trained, diverges, best):
        place = self.compare(trained, diverges)
        again = self.compare(trained, diverges)  # as one that is resumed at its end
        assert [path.name for path in again.iterdir()] == ["lora"]
        found = jmem.checkpoints.load_adapter(place / "lora", trained.checkpoint.config)
        (value,) = {float(leaf.max()) for leaf in jax.tree.leaves(found.adapters)}
        assert value == best
        assert about(place / "lora")["method"] == "lora"

    def test_one_that_kept_nothing_says_so(self, trained):
        for factor in (0.5, 1.0, 2.0):
            folder = trained.run.folder_of(Trial("lora", factor, 0).name)
            (folder / "done.json").write_text('{"choose": 1, "loss": 1}')
        trained.methods = {"lora": trained.methods["lora"]}
        self.compare(trained)
        told = trained.run.exports.tell()
        assert told.endswith("none, as its trials ended in a run that kept no state")

    def test_names_of_trials_are_read_back(self):
        for trial in (Trial("lora_wide", 1e-05, 3), Trial("full", 0.25, 0)):
            assert parse_trial(trial.name) == trial
        assert parse_trial("lora") is None


class TestFromARun:
    """`python -m experiments.export RUN`."""

    def command(self, run, **more):
        return export.Command(run=run.folder, **more)

    def test_states_of_a_run_that_was_stopped(self, trained, capsys):
        trained.keep("full", 2, 0.5)
        trained.keep("lora", 3, 0.5)
        trained.keep("lora", 1, 0.75, "best")
        run = trained.run
        whole, adapter = export.export(self.command(run, dtype="bfloat16"))
        assert whole == run.folder / "tuned" / "full"
        assert about(whole)["updates"] == 2
        assert about(whole)["dtype"] == "bfloat16"
        assert about(adapter)["updates"] == 3
        (best,) = export.export(self.command(run, state="best"))
        assert best.name == "lora-best"
        assert about(best)["updates"] == 1
        params = tuned.load(whole).params
        assert {float(leaf.min()) for leaf in jax.tree.leaves(params)} == {0.5}
        export.main(self.command(run, only=("lora",)))  # again: nothing is written
        assert f"{adapter}  " in capsys.readouterr().out

    def test_a_trial_of_a_comparison_that_was_stopped(self, trained):
        trained.run.folder_of("lora-x3-seed1")
        trained.methods["lora-x3-seed1"] = trained.methods["lora"]
        trained.keep("lora-x3-seed1", 2, 0.5)
        (place,) = export.export(self.command(trained.run))
        assert place.name == "lora-x3-seed1"
        assert about(place)["learning_rate"] == pytest.approx(3 * 5e-4)
        assert about(place)["seed"] == 1

    def test_mixtures_too(self, checkpoint, tmp_path):
        config = mixlora.Config(model=str(checkpoint), only=("mixlora",))
        run = Run("mixlora", config, runs=tmp_path)
        own = mixlora.make_finetuners(config)["mixlora"]
        model = config.build_here(config.dimensions())
        described = tuned.describe_state(own, model)
        state = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), described)
        place = run.folder_of("mixlora-x2-seed0") / "checkpoints"
        Checkpoints(place).save(7, jax.tree.map(jnp.asarray, state), data="any")
        (place,) = export.export(self.command(run))
        found = jmem.checkpoints.load_mixlora(place, model.config)
        assert found.settings["alpha"] == config.mixture.alpha
        assert about(place)["learning_rate"] == pytest.approx(2e-3)
        told = exports.describe(place)
        assert f'moe_peft.LLMModel.from_pretrained("{checkpoint}", device=' in told
        assert f'\n  model.load_adapter("{place}")\n' in told

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"only": ("lisa",)}, "--only lisa: .* keeps a last state of full"),
            ({"state": "best"}, r"no best state of any method.\n.*--evaluate-every"),
        ],
    )
    def test_what_a_run_did_not_keep_is_named(self, trained, given, words):
        trained.keep("full", 2, 0.5)
        with pytest.raises(ConfigError, match=words):
            export.export(self.command(trained.run, **given))
        assert not (trained.run.folder / "tuned").exists()

    def test_a_model_that_is_not_there(self, trained):
        trained.keep("full", 2, 0.5)
        path = trained.run.folder / "config.toml"
        text = path.read_text().replace(trained.config.model, "base")
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"model='base' is not here.\n.* started"):
            export.export(self.command(trained.run))

    def test_a_run_without_any_state(self, trained):
        (trained.run.folder / "tuned" / "full").mkdir(parents=True)
        words = r"keeps no last state of any method\.\n.*\nIts tuned/ has full\."
        with pytest.raises(ConfigError, match=words):
            export.export(self.command(trained.run))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "no run was saved there"),
            ("# Config of a run of kvcache; --preset ...\n", "no experiment that tun"),
            ("# Config of a run of nothing; --preset ...\n", "no experiment that tun"),
            ("steps = 3\n", "names no experiment that tunes a model"),
            ("# Config of a run of lisa;\n\xff", "config.toml: cannot be read"),
        ],
    )
    def test_what_is_no_such_run(self, tmp_path, content, words):
        if content is not None:
            (tmp_path / "config.toml").write_text(content, "latin-1")
        with pytest.raises(ConfigError, match=words):
            export.export(export.Command(run=tmp_path))

    def test_its_folder_is_an_argument_without_a_name(self, capsys):
        seen = []

        def main(command):
            seen.append(command)

        with pytest.raises(SystemExit):
            cli.script(main, export.Command, ["runs/a", "--only", "lora"])
        assert seen == [export.Command(run=pathlib.Path("runs/a"), only=("lora",))]
        with pytest.raises(SystemExit):
            cli.script(main, export.Command, [])
        assert "required: RUN" in capsys.readouterr().err
