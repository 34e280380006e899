"""The loop: one compilation, donation, rows, refusals, stopping and resuming."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest
from orbax import checkpoint as ocp

from jmem.data import Loader
from jmem.train import checkpoint, loop, metrics, progress
from jmem.train.folder import FolderError

from . import tiny


@dataclasses.dataclass(frozen=True)
class Altered(tiny.Tiny):
    """`Tiny` whose step gives back another state."""

    change: str = ""

    def step(self, model, state, batch):
        state, metrics = super().step(model, state, batch)
        if self.change == "dtype":
            state["rate"] = state["rate"].astype(jnp.bfloat16)
        if self.change == "leaf":
            state["more"] = jnp.zeros(3)
        if self.change == "metrics":
            del metrics["loss"]
        if self.change == "nan":
            metrics["loss"] = jnp.where(state["step"] == 9, jnp.nan, metrics["loss"])
        if self.change in ("params", "average", "optimizer"):  # and no metric tells
            broken = jax.tree.map(lambda a: a + (a * jnp.inf), state[self.change])
            state[self.change] = jax.tree.map(
                lambda a, b: jnp.where(state["step"] == 9, b, a) if a.ndim else a,
                *(state[self.change], broken),
            )
        return state, metrics


@dataclasses.dataclass(frozen=True)
class Interrupting(tiny.Walk):
    """Data that presses Ctrl-C while it makes the batch of update `at`."""

    at: int = -1
    signals: tuple[int, ...] = (signal.SIGINT,)

    def batch(self, step):
        if step == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().batch(step)


@dataclasses.dataclass(frozen=True)
class Ordered(tiny.Walk):
    """The same data, as its digest says, whose order has a seed."""

    shuffle: int = 0
    order: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def digest(self):
        return "walk"

    def batch(self, step):
        return super().batch(step + 100 * self.shuffle)


class TestRun:
    def test_row_a_step_and_an_evaluation(self, tmp_path):
        held_out = [tiny.Walk(seed=9).batch(n) for n in range(3)]
        tiny.run(tmp_path, steps=6, held_out=held_out, evaluate_every=4)
        rows = metrics.read(tmp_path)
        steps = [r["step"] for r in rows if "loss" in r]
        evaluated = [r["step"] for r in rows if "held_out_loss" in r]
        assert (steps, evaluated) == ([1, 2, 3, 4, 5, 6], [0, 4, 6])
        columns = ["step", "loss", "lr", "grad_norm", "active"]
        assert list(rows[1]) == [*columns, "seconds", "tokens_per_second"]
        assert rows[1]["tokens_per_second"] == pytest.approx(64 / rows[1]["seconds"])
        assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]

    def test_loss_is_that_of_a_plain_loop(self, tmp_path):
        finetuner, model, data = tiny.Tiny(), tiny.Bigram(), tiny.Walk()
        state = finetuner.init(
            model, model.init(jax.random.key(1)), {}, jax.random.key(2)
        )
        step = jax.jit(lambda s, b: finetuner.step(model, s, b))
        losses = []
        for n in range(12):
            state, values = step(state, data.batch(n))
            losses.append(float(values["loss"]))
        trained = tiny.run(tmp_path)
        assert [r["loss"] for r in metrics.read(tmp_path)] == losses
        chex.assert_trees_all_equal(trained["params"], state["params"])

    def test_held_out_loss_counts_tokens_not_batches(self, tmp_path):
        walk = tiny.Walk(seed=9)
        batches = [walk.batch(0), walk.batch(1)]
        few = np.zeros(walk.shape, np.float32)
        few[0, :3] = 1
        batches[1] = batches[1]._replace(weights=few)
        tiny.run(tmp_path, steps=1, held_out=batches)
        model = tiny.Bigram()
        params = model.init(jax.random.key(1))
        losses = [float(model.loss(params, batch)) for batch in batches]
        expected = (64 * losses[0] + 3 * losses[1]) / 67
        row = metrics.read(tmp_path)[0]
        assert row["held_out_loss"] == pytest.approx(expected, rel=1e-6)

    def test_step_is_compiled_once_and_state_donated(self, tmp_path, monkeypatch):
        compilations = []
        lower = jax.stages.Lowered.compile
        monkeypatch.setattr(
            jax.stages.Lowered,
            "compile",
            lambda self, **how: compilations.append(self) or lower(self, **how),
        )
        finetuner, model = tiny.Tiny(), tiny.Bigram()
        state = finetuner.init(
            model, model.init(jax.random.key(1)), {}, jax.random.key(2)
        )
        loop.train(
            finetuner,
            model,
            state,
            tiny.Walk(),
            steps=30,  # `active` is drawn five times
            folder=tmp_path,
            progress=False,
        )
        assert len(compilations) == 1
        drawn = {tuple(row["active"]) for row in metrics.read(tmp_path)}
        assert len(drawn) > 2
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
        assert all(leaf.is_deleted() for leaf in leaves)

    def test_trace_holds_annotated_steps(self, tmp_path):
        tiny.run(tmp_path, steps=6, trace_steps=2)
        [trace] = (tmp_path / "trace").rglob("*.xplane.pb")
        events = jax.profiler.ProfileData.from_file(str(trace))
        names = [e.name for p in events.planes for line in p.lines for e in line.events]
        assert names.count("train") == 2
        assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))


class TestResume:
    def test_in_the_middle_is_bit_equal(self, tmp_path):
        whole = tiny.run(tmp_path / "whole", steps=12)
        tiny.run(tmp_path / "parts", steps=5)
        parts = tiny.run(tmp_path / "parts", steps=12, resume=True)
        chex.assert_trees_all_equal(whole, parts)
        chex.assert_trees_all_equal_dtypes(whole, parts)
        whole, parts = (metrics.read(tmp_path / n) for n in ("whole", "parts"))
        for row in whole + parts:
            del row["seconds"], row["tokens_per_second"]
        assert whole == parts

    def test_rows_after_the_checkpoint_are_cut(self, tmp_path):
        tiny.run(tmp_path, steps=5)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "loss": 1.0}\n{"step": 6, "held_out_l')
        tiny.run(tmp_path, steps=7, resume=True)
        assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]

    def test_before_the_first_checkpoint_starts_over(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
        tiny.run(tmp_path, steps=2, resume=True)
        assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
        assert metrics.read(tmp_path)[0]["loss"] != 9.0

    def test_finished_run_returns_its_state_at_once(self, tmp_path):
        first = tiny.run(tmp_path)
        rows = (tmp_path / "metrics.jsonl").read_bytes()
        chex.assert_trees_all_equal(first, tiny.run(tmp_path, resume=True))
        assert (tmp_path / "metrics.jsonl").read_bytes() == rows

    def test_restored_leaves_keep_their_memory(self, tmp_path):
        host = jax.sharding.SingleDeviceSharding(
            jax.devices()[0], memory_kind="pinned_host"
        )
        state = {"slow": jax.device_put(jnp.arange(4.0), host), "fast": jnp.ones(2)}
        checkpoints = checkpoint.Checkpoints(tmp_path)
        checkpoints.save(3, state, data="d")
        step, restored = checkpoints.restore(checkpoint.abstract(state), data="d")
        assert step == 3
        assert restored["slow"].sharding.memory_kind == "pinned_host"
        assert restored["fast"].sharding == state["fast"].sharding
        chex.assert_trees_all_equal(state, restored)

    def test_ctrl_c_leaves_a_run_that_resumes(self, tmp_path, capsys):
        whole = tiny.run(tmp_path / "whole")
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(loop.Interrupted, match="after update 6 of 12"):
            tiny.run(tmp_path / "stopped", data=Interrupting(at=5), progress=True)
        assert "stopping after this step" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGINT) is handler
        resumed = tiny.run(tmp_path / "stopped", resume=True)
        chex.assert_trees_all_equal(whole, resumed)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_terminal_that_closes_leaves_a_run_that_resumes(self, tmp_path, number):
        """It may send several SIGHUP, where a second SIGTERM would stop at once."""
        signals = (number,) * (3 if number == signal.SIGHUP else 1)
        before = signal.signal(number, signal.SIG_DFL)  # a parent may ignore it
        try:
            with pytest.raises(loop.Interrupted, match="after update 6 of 12"):
                tiny.run(tmp_path, data=Interrupting(at=5, signals=signals))
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)
        assert checkpoint.Checkpoints(tmp_path / "checkpoints").list_steps() == (6,)

    def test_what_nohup_ignores_stays_ignored(self, tmp_path):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            tiny.run(tmp_path, data=Interrupting(at=5, signals=(signal.SIGHUP,)))
        finally:
            signal.signal(signal.SIGHUP, before)
        assert checkpoint.Checkpoints(tmp_path / "checkpoints").list_steps() == (12,)

    def test_only_the_last_checkpoints_stay(self, tmp_path):
        tiny.run(tmp_path, checkpoint_every=3, keep=2)
        names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert names == ["12", "9"]


class TestDamage:
    """A damaged checkpoint is passed over for the one before it."""

    def damage_last(self, folder, how):
        last = folder / "checkpoints" / "10"
        files = [f for f in last.rglob("*") if f.is_file() and "/d/" in f.as_posix()]
        array = max(files, key=lambda file: file.stat().st_size)
        if how == "flipped":  # Orbax alone reads this back without a word
            content = bytearray(array.read_bytes())
            content[len(content) // 2] ^= 1
            array.write_bytes(content)
        if how == "missing":
            array.unlink()
        if how == "manifest":
            (last / "manifest.json").write_text("{")

    @pytest.mark.parametrize("how", ["flipped", "missing", "manifest"])
    def test_previous_is_used(self, tmp_path, capsys, how):
        whole = tiny.run(tmp_path / "whole", steps=12)
        tiny.run(tmp_path / "bad", steps=10, checkpoint_every=5)
        self.damage_last(tmp_path / "bad", how)
        resumed = tiny.run(tmp_path / "bad", steps=12, resume=True)
        assert "checkpoint 10 is damaged" in capsys.readouterr().out
        chex.assert_trees_all_equal(whole, resumed)
        assert [r["step"] for r in metrics.read(tmp_path / "bad")] == [*range(1, 13)]

    def test_no_other_is_an_error(self, tmp_path):
        tiny.run(tmp_path, steps=10)
        self.damage_last(tmp_path, "flipped")
        with pytest.raises(
            checkpoint.CheckpointError,
            match=r"no checkpoint is intact: step 10: state/",
        ):
            tiny.run(tmp_path, resume=True)

    CHANGES: Mapping[str, Any] = {
        "a bit of data": lambda manifest: manifest | {"data": "walk-1"},
        "files a number": lambda manifest: manifest | {"files": 5},
        "no leaves": lambda manifest: dict(list(manifest.items())[:3]),
        "another format": lambda manifest: manifest | {"format": 0},
        "a list": lambda manifest: [manifest],
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_manifest_that_was_changed_is_damaged(self, saved_twice, capsys, name):
        path = saved_twice.folder / "2" / "manifest.json"
        path.write_text(json.dumps(self.CHANGES[name](json.loads(path.read_text()))))
        step, state = saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")
        assert (step, state["w"].tolist()) == (1, [1, 1, 1])
        assert "checkpoint 2 is damaged (manifest.json: " in capsys.readouterr().out
        assert saved_twice.list_steps() == (1,)

    def test_mutated_manifests(self, saved_twice):
        """Nothing but the older checkpoint, or the same one, comes of it."""
        path = saved_twice.folder / "2" / "manifest.json"
        whole = path.read_bytes()
        for case in range(mutations.count(12)):
            random = np.random.default_rng([case, 15])
            damage = (mutations.damage_text, mutations.damage_bytes)[case % 2]
            shutil.copytree(path.parent, kept := saved_twice.folder / "kept")
            path.write_bytes(damage(whole, random))
            step, state = saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")
            assert state["w"].tolist() == [step] * 3
            shutil.rmtree(path.parent, ignore_errors=True)
            kept.rename(path.parent)

    def test_a_manifest_without_a_digest_is_read_as_before(self, saved_twice):
        path = saved_twice.folder / "2" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"], manifest["order"]
        path.write_text(json.dumps(manifest))
        assert saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")[0] == 2

    def test_a_folder_is_of_the_step_that_is_in_it(self, saved_twice, capsys):
        (saved_twice.folder / "2").rename(saved_twice.folder / "7")
        step, state = saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")
        assert (step, state["w"].tolist()) == (2, [2, 2, 2])
        assert saved_twice.list_steps() == (1, 2)
        assert "checkpoint 7 is of step 2" in capsys.readouterr().out

    def test_a_copy_under_another_step_is_none(self, saved_twice):
        shutil.copytree(saved_twice.folder / "1", saved_twice.folder / "9")
        assert saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")[0] == 2
        assert saved_twice.list_steps() == (1, 2)

    def test_a_state_of_an_older_version_that_is_not_finite(self, saved_twice):
        """It could be saved then; now the one before it is used."""
        array = saved_twice.folder / "2" / "state"
        saved_twice.save(3, STATE, data="walk-0")
        bad = {"w": jnp.array([1.0, jnp.nan, 1.0])}
        shutil.rmtree(array)
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(array, bad)
        manifest = array.with_name("manifest.json")
        values = json.loads(manifest.read_text())
        del values["sha256"]
        values["files"] = {
            path.relative_to(array).as_posix(): [
                path.stat().st_size,
                zlib.crc32(path.read_bytes()),
            ]
            for path in array.rglob("*")
            if path.is_file()
        }
        manifest.write_text(json.dumps(values))
        saved_twice.remove(3)
        assert saved_twice.restore(checkpoint.abstract(STATE), data="walk-0")[0] == 1


STATE = {"w": jnp.ones(3)}


@pytest.fixture
def saved_twice(tmp_path):
    """Checkpoints of steps 1 and 2 of a vector of as many."""
    kept = checkpoint.Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        kept.save(step, {"w": jnp.full(3, float(step))}, data="walk-0")
    return kept


class TestOrder:
    """A run goes on with the rows that would have come, or not at all."""

    @pytest.mark.parametrize(
        ("before", "now", "words"),
        [
            ({}, {"shuffle": 1}, "had another batch at the last update than"),
            ({"order": {"seed": 0}}, {"order": {"seed": 1}}, "had seed=0, and this"),
            (
                {"order": {"seed": 0, "size": 4}},
                {"order": {"seed": 1, "size": 2}},
                "had seed=0, size=4, and this run has seed=1, size=2",
            ),
        ],
    )
    def test_another_one_is_refused(self, tmp_path, before, now, words):
        tiny.run(tmp_path, steps=2, data=Ordered(**before))
        with pytest.raises(checkpoint.CheckpointError, match=words):
            tiny.run(tmp_path, steps=4, data=Ordered(**now), resume=True)
        tiny.run(tmp_path, steps=4, data=Ordered(**before), resume=True)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"seed": 7}, "had seed=0, and this run has seed=7"),
            ({"batch_size": 2}, "had batch_size=4, and this run has batch_size=2"),
        ],
    )
    def test_of_a_loader(self, tmp_path, change, words):
        first = tiny.Walk().batch(0)
        rows = jax.tree.map(lambda leaf: np.concatenate([leaf] * 4), first)
        data = Loader(rows, 4)
        tiny.run(tmp_path, steps=2, data=data)
        other = dataclasses.replace(data, **change)
        with pytest.raises(checkpoint.CheckpointError, match=words):
            tiny.run(tmp_path, steps=4, data=other, resume=True)

    def test_of_a_run_that_did_not_note_it(self, tmp_path):
        tiny.run(tmp_path, steps=2, data=Ordered())
        path = tmp_path / "checkpoints" / "2" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"], manifest["order"]
        path.write_text(json.dumps(manifest))
        tiny.run(tmp_path, steps=3, data=Ordered(shuffle=1), resume=True)


class TestRefuses:
    def test_checkpoint_of_another_model(self, tmp_path, monkeypatch):
        tiny.run(tmp_path, steps=2)
        monkeypatch.setattr(tiny, "WIDTH", 9)
        with pytest.raises(
            checkpoint.CheckpointError,
            match=r"'average/embed' is bfloat16\[23,8\].*bfloat16\[23,9\]",
        ):
            tiny.run(tmp_path, steps=4, resume=True)
        assert (tmp_path / "checkpoints" / "2").is_dir()

    def test_checkpoint_of_other_data(self, tmp_path):
        tiny.run(tmp_path, steps=2)
        with pytest.raises(
            checkpoint.CheckpointError, match=r"walk-0.*and this run's is 'walk-5"
        ):
            tiny.run(tmp_path, data=tiny.Walk(seed=5), resume=True)

    def test_a_folder_that_holds_a_run(self, tmp_path):
        tiny.run(tmp_path, steps=2)
        with pytest.raises(loop.TrainingError, match="resume=True continues it"):
            tiny.run(tmp_path)

    def test_fewer_steps_than_done(self, tmp_path):
        tiny.run(tmp_path, steps=3)
        with pytest.raises(loop.TrainingError, match=r"steps=2 .* at update 3"):
            tiny.run(tmp_path, steps=2, resume=True)

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FolderError, match=r"file/run.* cannot be written"):
            tiny.run(tmp_path / "file" / "run")

    def test_a_full_disk(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
        with pytest.raises(FolderError, match=r"0\.00 GiB free, and 1 more checkpoint"):
            tiny.run(tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_loss_that_is_not_finite(self, tmp_path):
        with pytest.raises(loop.DivergedError, match=r"update 9: loss=nan") as caught:
            tiny.run(tmp_path, finetuner=Altered(change="nan"), checkpoint_every=4)
        assert "checkpoint of step 8 is kept" in str(caught.value)
        assert checkpoint.Checkpoints(tmp_path / "checkpoints").list_steps() == (4, 8)
        assert [r["step"] for r in metrics.read(tmp_path)] == [*range(1, 9)]

    @pytest.mark.parametrize(
        ("change", "steps"), [("params", 9), ("average", 12), ("optimizer", 12)]
    )
    def test_a_state_that_is_not_finite(self, tmp_path, change, steps):
        """The loss of a step is that before its update: it does not tell."""
        settings = {"checkpoint_every": 1, "keep": 1, "steps": steps}
        with pytest.raises(loop.DivergedError, match=f"update 9: leaf '{change}/.*not"):
            tiny.run(tmp_path, finetuner=Altered(change=change), **settings)
        assert checkpoint.Checkpoints(tmp_path / "checkpoints").list_steps() == (8,)

    def test_weights_that_are_not_finite(self, tmp_path):
        class Broken(tiny.Tiny):
            def init(self, model, params, stats, key):
                params["head"] = params["head"].at[3, 5].set(jnp.nan)
                return super().init(model, params, stats, key)

        with pytest.raises(loop.TrainingError, match=r"leaf '.*head' .* before the fi"):
            tiny.run(tmp_path, finetuner=Broken())
        assert not (tmp_path / "metrics.jsonl").exists()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                "dtype",
                r"'rate' of the state is float32\[\] and comes back bfloat16\[\]",
            ),
            ("leaf", r"'more' of the state is absent and comes back float32\[3\]"),
            ("metrics", r"metrics=.* lack 'loss'"),
        ],
    )
    def test_a_step_that_changes_its_state(self, tmp_path, change, words):
        with pytest.raises(loop.TrainingError, match=words):
            tiny.run(tmp_path, finetuner=Altered(change=change))

    def test_batches_of_two_shapes(self, tmp_path):
        class Growing(tiny.Walk):
            def batch(self, step):
                return tiny.Walk(shape=(4, 16 + step // 5)).batch(step)

        with pytest.raises(loop.TrainingError, match=r"of batch 5 is int32\[4,17\]"):
            tiny.run(tmp_path, data=Growing())

    @pytest.mark.parametrize("name", ["steps", "keep", "evaluate_every"])
    def test_arguments_out_of_range(self, tmp_path, name):
        with pytest.raises(loop.TrainingError, match=rf"{name}=-1 must be at least"):
            tiny.run(tmp_path, **{name: -1})

    def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
        self, tmp_path, monkeypatch
    ):
        rename = os.rename

        def full(source, target):
            if os.path.basename(target) == "8":
                raise OSError(28, "No space left on device")
            rename(source, target)

        monkeypatch.setattr(os, "rename", full)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            tiny.run(tmp_path, checkpoint_every=4)
        assert "No space left on device" in str(caught.value)
        assert "The last complete one is of step 4." in str(caught.value)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


class TestMetrics:
    def test_a_full_disk_stops_with_words(self, tmp_path):
        file = metrics.MetricsFile(tmp_path)
        file.close()
        with open("/dev/full", "ab", buffering=0) as full:
            file._file = full
            with pytest.raises(FolderError, match=r"row of step 3 .* written: No"):
                file.write({"step": 3, "loss": 1.0})

    def test_error_names_file_and_line(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": nope}\n')
        with pytest.raises(metrics.MetricsError, match=r"metrics\.jsonl:2: not JSON"):
            metrics.read(tmp_path)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ('{"loss": 1}', "integer 'step'"),
            ('{"step": true}', "integer 'step'"),
            ('{"step": 1}', "step=1 follows step=2"),
            ('{"step": 3, "held_out_loss": "1.5"}', "held_out_loss='1.5' is no number"),
            ("[" * 100_000, "not JSON"),
        ],
    )
    def test_a_line_that_is_no_row_is_refused_at_its_place(self, tmp_path, line, words):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2}}\n{line}\n')
        with pytest.raises(metrics.MetricsError, match=rf"metrics\.jsonl:2: .*{words}"):
            metrics.read(tmp_path)

    def test_mutated_rows(self, tmp_path):
        row = {"step": 1, "loss": 2.5, "active": [1, 2], "held_out_loss": None}
        raw = "".join(json.dumps(row | {"step": n}) + "\n" for n in range(9)).encode()
        damages = (mutations.damage_text, mutations.damage_bytes)
        mutants = (
            damages[case % 2](raw, np.random.default_rng([case, 16]))
            for case in range(mutations.count(200))
        )
        error = metrics.MetricsError
        found = mutations.outcomes(
            mutants, tmp_path / "metrics.jsonl", metrics.read, error
        )
        assert all(found.values())


class TestProgress:
    @pytest.mark.parametrize("terminal", [False, True])
    def test_a_run_goes_on_where_nobody_reads_it(self, tmp_path, monkeypatch, terminal):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stream:
            monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
            monkeypatch.setattr(sys, "stdout", stream)
            tiny.run(tmp_path, progress=True, held_out=[HELD_OUT])
            monkeypatch.undo()
        assert metrics.read(tmp_path)[-1]["step"] == 12

    def test_lines_come_first_last_and_in_between_by_time(self):
        stream, clock = io.StringIO(), iter(range(0, 1000, 4))
        lines = progress.Lines(
            "lora", 10, unit="tokens", stream=stream, now=lambda: next(clock)
        )
        for step in range(1, 11):
            lines.update(step, 2.0 / step, 1234.5)
        text = stream.getvalue().splitlines()
        assert text[0].startswith("lora  step 1/10  loss 2.0000  1,234 tokens/s")
        assert text[-1].startswith("lora  step 10/10  loss 0.2000")
        assert 3 < len(text) < 10

    def test_bar_shows_loss_rate_and_time_left(self):
        stream = io.StringIO()
        stream.isatty = lambda: True
        bar = progress.choose("lora", 10, unit="tokens", stream=stream)
        bar.update(5, 1.25, 1234.5)
        bar.note("held-out loss 1.0")
        bar.close()
        assert isinstance(bar, progress.Bar)
        assert "lora" in stream.getvalue()
        assert "loss 1.2500  1,234 tokens/s" in stream.getvalue()

    def test_output_that_is_not_a_terminal_gets_lines(self):
        lines = progress.choose("x", 3, unit="tokens", stream=io.StringIO())
        assert isinstance(lines, progress.Lines)


def test_importing_the_loop_leaves_orbax_alone():
    code = (
        "import sys; before = set(sys.modules); import jmem.train.loop; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        " & {'orbax', 'matplotlib', 'datasets'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


class Repeating(tiny.Walk):
    """One batch again and again: learnt by heart, whatever else is forgotten."""

    def batch(self, step):
        return super().batch(0)


HELD_OUT = tiny.Walk(seed=9).batch(0)
REPEATED = Repeating(shape=(1, 4))


class TestBest:
    """Early stop and the best state, on data whose held-out loss turns around."""

    settings: Mapping[str, Any] = {
        "finetuner": tiny.Tiny(lr=0.1),
        "data": REPEATED,
        "steps": 40,
        "held_out": [HELD_OUT],
        "evaluate_every": 4,
        "checkpoint_every": 8,
    }

    def losses(self, folder):
        rows = metrics.read(folder)
        return {r["step"]: r["held_out_loss"] for r in rows if "held_out_loss" in r}

    def test_stops_after_evaluations_that_are_no_better(self, tmp_path):
        tiny.run(tmp_path / "whole", **self.settings)
        whole = self.losses(tmp_path / "whole")
        best = min(whole, key=lambda step: whole[step])
        assert best <= 24  # the promise is tested
        tiny.run(tmp_path / "early", patience=2, **self.settings)
        early = self.losses(tmp_path / "early")
        assert max(early) < 40
        assert early == {step: whole[step] for step in early}
        steps = checkpoint.Checkpoints(tmp_path / "early" / "checkpoints").list_steps()
        assert steps[-1] == max(early)

    def test_a_stopped_run_stays_stopped(self, tmp_path):
        settings = {**self.settings, "patience": 2}
        first = tiny.run(tmp_path, **settings)
        again = tiny.run(tmp_path, resume=True, **settings)
        chex.assert_trees_all_equal(again["params"], first["params"])

    def test_the_best_state_is_kept_and_can_be_read(self, tmp_path):
        settings = {**self.settings, "keep_best": True}
        last = tiny.run(tmp_path, **settings)
        losses = self.losses(tmp_path)
        like = checkpoint.abstract(last)
        kept = checkpoint.Checkpoints(tmp_path / "best")
        step, state = kept.restore(like, data=REPEATED.digest)
        assert step == min(losses, key=lambda step: losses[step])
        loss = tiny.Bigram().loss(state["params"], HELD_OUT)
        np.testing.assert_allclose(loss, losses[step], rtol=1e-6)

    def test_nothing_is_kept_unless_asked_for(self, tmp_path):
        tiny.run(tmp_path, **self.settings)
        assert not (tmp_path / "best").exists()

    @pytest.mark.parametrize("more", [{"patience": 2}, {"keep_best": True}])
    def test_needs_held_out_batches(self, tmp_path, more):
        with pytest.raises(loop.TrainingError, match="give held_out batches"):
            tiny.run(tmp_path, **more)
