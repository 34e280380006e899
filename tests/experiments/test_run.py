"""The run's folder: what was said stays, whatever happens."""

import json
import math
import re

import pytest
from toy_experiment import Config, memories

from experiments.harness import config, memory, plots, record, report
from experiments.harness.claim import ClaimsError
from experiments.harness.run import Run
from experiments.harness.sweep import say_where, search
from jmem.disk import DamagedError
from jmem.targets import resolve
from jmem.train.folder import FolderError
from jmem.train.loop import DivergedError


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

    def test_a_report_that_was_changed_since_answers_no_claim(self, tmp_path):
        with self.start(tmp_path) as run:
            run.table("T", ["x", "y"], [["a", 1.5]])
        assert record.read_report(run.folder)["tables"]["T"]["a"]["y"] == 1.5
        path = run.folder / "report.json"
        path.write_text(path.read_text().replace("1.5", "2.5"))
        with pytest.raises(ClaimsError, match=r"report\.json: its values are not"):
            record.read_report(run.folder)

    @pytest.mark.parametrize(
        ("plan", "words"),
        [
            ("{", "not JSON"),
            ('{"bytes": "much"}', "bytes is 'much'"),
            ('{"bytes": 1, "program": ["a"]}', "program is ['a']"),
        ],
    )
    def test_a_plan_that_is_damaged_costs_no_report(self, tmp_path, plan, words):
        with self.start(tmp_path) as run:
            (run.folder_of("lisa") / "plan.json").write_text(plan)
        saved = json.loads((run.folder / "report.json").read_text())
        assert f"plan.json: {words}" in saved["notes"][0]

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

    def test_names_of_others_are_shown_and_never_obeyed(self, tmp_path, capsys):
        hostile = "[red]<script>\x1b[2J\r\n| ``` $\\frac$ ![x](javascript:y)"
        with self.start(tmp_path) as run:
            run.table(hostile, [hostile, f"{hostile}2"], [[hostile, hostile]])
            run.note(hostile)
            run.note(f"a\n{hostile}")
            rows = [{"step": n, "loss": 1.0} for n in (1, 2)]
            run.plot(
                "losses", lambda: plots.draw_losses({hostile: rows}, title=hostile)
            )
        shown = capsys.readouterr().out
        assert "[red]<script>" in shown  # as text, and the colour is not set
        written = (run.folder / "report.md").read_text()
        assert "&lt;script&gt;" in written
        outside = re.sub(r"(?ms)^(`{3,})text$.*?^\1$|`[^`\n]*`", "", written)
        assert "<script>" not in outside
        assert not re.search(r"(?<!\\)!\[x\]", outside)
        for text in (shown, written):
            assert all(line.isprintable() for line in text.split("\n"))
        saved = json.loads((run.folder / "report.json").read_text())
        assert saved["tables"][hostile][hostile] == {f"{hostile}2": hostile}

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

    def test_a_loss_that_is_no_number_is_not_chosen(self, tmp_path):
        def train(trial, folder):
            return {"choose": math.nan if trial.factor == 3 else 2.0, "loss": 1.0}

        run = Run("toy", Config(), runs=tmp_path)
        assert search(run, ["one"], (1.0, 3.0), (0,), train)["one"].factor == 1

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text.replace('"loss": 1.0', '"loss": 0.0'),
            lambda text: '{"choose": 1.0, "loss": "low"}',
            lambda text: '{"choose": 1.0, "loss": NaN}',
            lambda text: text[:20],
        ],
    )
    def test_a_trial_that_was_changed_since_is_refused(self, tmp_path, damage):
        run, _ = self.sweep(tmp_path, lambda trial: False)
        path = run.folder / "one-x3-seed0" / "done.json"
        path.write_text(damage(path.read_text()))
        with pytest.raises(DamagedError, match=rf"^{re.escape(str(path))}: "):
            search(run, ["one"], (1.0, 3.0), (0,), lambda *trial: {})

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
