"""The comparison at equal bytes, end to end on a tiny checkpoint; refusals; presets."""

# pyright: reportAttributeAccessIssue=false

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
import jmem.checkpoints
import jmem.data
from experiments import kvcache
from experiments.harness import cli, comparison, needles
from experiments.harness import config as configs
from experiments.harness.journal import Journal
from experiments.harness.run import Run
from experiments.harness.settings import Compiled
from jmem.evaluate import compare
from jmem.evaluate.continuation import Continuations
from jmem.evaluate.programs import plan_caches
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV
from jmem.targets import resolve

PRESETS = ("llama31_8b_128k", "llama31_8b_8k", "llama3_8b", "long", "qwen25_15b")
MODEL = dataclasses.replace(TINY, vocab_size=264, layers=4, max_positions=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, byte_tokenizer):
    """A Hugging Face folder of a random tiny Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("own") / "model"
    params = random_params(MODEL, scale=0.1)
    jmem.checkpoints.save(params, MODEL, folder, byte_tokenizer)
    return folder


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """As much of Python's documentation as a tiny model needs, read once."""
    texts = jmem.data.python_reference()
    little = jmem.data.Corpus(texts.training[:3], texts.held_out[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jmem.data, "python_reference", lambda: little)
        yield


@pytest.fixture(scope="module")
def config(checkpoint):
    return kvcache.Config(
        model=str(checkpoint),
        snapkv=SnapKV(window=4, kernel=3),
        pyramidkv=PyramidKV(window=4, kernel=3),
        windowkv=WindowKV(group=2, observation=4, pyramid="flat"),
        gemfilter=GemFilter(layer=1),
        shares=(0.25, 0.5),
        lengths=(120, 160),
        depths=(0.0, 1.0),
        seeds=(0,),
        passages=3,
        passage=60,
        continuation=4,
        longbench_tokens=100,
        batch_size=2,
        read_rows=1,
        compiled=Compiled(prompt=96, new_tokens=8),
    )


def run(config, tmp_path, **more):
    target = resolve(config.gpu)
    with Run("kvcache", config, target=target, runs=tmp_path, **more) as started:
        kvcache.main(config, started)
    return started.folder


def report_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "report.json").read_text())


ROW = {
    "input": "Who sat?",
    "context": "the cat sat on a mat. " * 9,
    "answers": ["The cat."],
    "length": 60,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0f3",
}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A config with little to do of everything, and the folder of its run."""
    folder = tmp_path_factory.mktemp("finished")
    file = folder / "rows.jsonl"
    rows = [ROW, ROW | {"context": "a cat."}, ROW]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config,
        only=("snapkv", "gemfilter"),
        shares=(0.5,),
        lengths=(120,),
        longbench=(file,),
    )
    return config, run(config, folder)


def test_every_policy_is_compared(finished):
    _, folder = finished
    report = report_of(folder)
    assert report["status"] == "complete"
    names = ["full", "snapkv 50 %", "gemfilter 50 %"]
    for title in ("Needles kept", "Loss of a continuation", "LongBench"):
        assert list(report["tables"][title]) == names
    for row in report["tables"]["Loss of a continuation"].values():
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
    scores = report["tables"]["LongBench"]["full"]
    assert scores.keys() == {"hotpotqa (3)", "mean"}
    needles = report["tables"]["Needles kept"]
    assert needles["full"]["of full"] == 1
    assert 0.4 < needles["gemfilter 50 %"]["of full"] <= 0.5
    for picture in report["plots"]:
        assert (folder / picture).stat().st_size > 10_000
    assert "TOO FEW" in " ".join(report["notes"])  # it has learnt nothing


def test_a_finished_run_is_not_run_again(finished, tmp_path, monkeypatch):
    config, folder = finished
    again = shutil.copytree(folder, tmp_path / "again")
    monkeypatch.setattr(compare, "read_all", None)
    resumed = report_of(run(config, tmp_path, resume=again))
    assert resumed["tables"] == report_of(folder)["tables"]


def test_a_stopped_run_tells_what_it_has_and_goes_on(finished, tmp_path, monkeypatch):
    """It stops before the passages: only needles are known, and only those told."""
    config, folder = finished
    stopped = shutil.copytree(folder, tmp_path / "stopped")
    path = stopped / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[0])[0] == "needles 120 0"
    path.write_text(lines[0])

    def stop(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Continuations, "produce", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, resume=stopped)
    report = report_of(stopped)
    assert report["status"] == "interrupted"
    assert (
        report["tables"]["Needles kept"] == report_of(folder)["tables"]["Needles kept"]
    )
    assert path.read_text() == lines[0]


def test_of_a_task_that_was_stopped_the_first_cases_are_told(config, tmp_path):
    bench = kvcache.open_bench(dataclasses.replace(config, only=("snapkv",)))
    task = bench.needles[0].task
    asked = []

    def read_all(model, params, plans, *given, **more):
        return ((name, None) for name in plans)

    def produce(model, params, context, prompts):
        if asked:
            raise KeyboardInterrupt
        asked.append(prompts.places)
        return np.zeros((len(prompts.tokens), task.steps), np.int32)

    told = []

    def report(outcomes):
        told.extend(outcomes)
        return []

    with (
        pytest.MonkeyPatch.context() as patch,
        Run("kvcache", config, runs=tmp_path) as started,
    ):
        patch.setattr(compare, "read_all", read_all)
        patch.setattr(task, "produce", produce)
        trial = comparison.prepare(task, bench.model, {}, (), batch_size=1)
        with pytest.raises(KeyboardInterrupt):
            comparison.examine(started, bench.model, {}, [trial], report)
    [outcome] = told
    assert outcome.places == [0]
    assert outcome.scores["full"].tolist() == [False]


def test_a_torn_result_is_made_again(tmp_path):
    first = Journal(tmp_path)
    first("a", lambda: {"x": np.array([1.5])})
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '["b", {"x": [2')
    again = Journal(tmp_path)
    assert again("a", lambda: {}) == {"x": [1.5]}
    assert again("b", lambda: {"x": np.array([3])}) == {"x": [3]}
    assert [json.loads(line)[0] for line in path.read_text().splitlines()] == ["a", "b"]


def fabricate(config):
    """Outcomes of needles as if a model had answered."""
    hits = {
        # At 120 tokens depths 0 and 1, then at 160.
        "full": [True, True, True, False],
        "snapkv 25 %": [True, False, False, True],
        "snapkv 50 %": [True, True, True, False],
    }
    return [
        comparison.Outcome(
            *(task, contenders, [0, 1]),
            {
                name: np.array(rows[2 * number : 2 * number + 2])
                for name, rows in hits.items()
            },
        )
        for number, (task, contenders) in enumerate(kvcache.open_bench(config).needles)
    ]


def test_shares_are_of_what_the_full_cache_finds(config, tmp_path):
    config = dataclasses.replace(config, only=("snapkv",))
    outcomes = fabricate(config)
    with Run("kvcache", config, runs=tmp_path) as started:
        [panel] = needles.report_kept(started, outcomes, note="Here.")
    report = report_of(started.folder)
    table = report["tables"]["Needles kept"]
    assert (table["full"]["hits"], table["full"]["of"]) == (3, 3)
    quarter = table["snapkv 25 %"]
    assert (quarter["hits"], quarter["of"], quarter["kept"]) == (1, 3, 1 / 3)
    assert (quarter["120"], quarter["160"]) == (0.5, 0.0)
    assert quarter["from"] < 1 / 3 < quarter["to"]
    assert table["snapkv 50 %"]["kept"] == 1
    count, lost = report["notes"]
    assert count.startswith("3 of 4 cells count")
    assert "TOO FEW" not in count
    assert lost.splitlines()[1] == (
        "snapkv 25 % lost 2 of 3: 120 tokens at depth 100 % (1); "
        "160 tokens at depth 0 % (1)"
    )
    points = panel.curves["snapkv"]
    assert [point[1] for point in points] == [1 / 3, 1]
    assert panel.reference == 1


@pytest.mark.usefixtures("one_compilation")
def test_measuring_loads_no_weights_and_finds_the_planned_bytes(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(jmem.checkpoints.Checkpoint, "params", None)
    config = dataclasses.replace(
        config, only=("gemfilter",), gemfilter=GemFilter(layer=1, tokens=32)
    )
    folder = run(config, tmp_path, measure_only=True)
    report = report_of(folder)
    assert list(report["memory"]) == [
        *("full-prefill", "full-decode"),
        *("gemfilter-filter", "gemfilter-prefill", "gemfilter-decode"),
    ]
    rows = report["tables"]["Memory on h200"]
    for row in rows.values():
        assert row["cache, planned"] == row["cache, compiled"]
    assert rows["gemfilter"]["cache, planned"] < 0.45 * rows["full"]["cache, planned"]
    assert rows["full"]["filter"] is None
    weights = report["memory"]["gemfilter-filter"]["by_label"]["weights"]
    assert weights < 0.6 * report["memory"]["full-prefill"]["by_label"]["weights"]


REFUSED = {
    "unknown model": ({"model": "smollm2-135"}, "did you mean 'smollm2-135m'"),
    "no weights": ({"model": "llama3-8b"}, "llama3-8b"),
    "no room for a needle": ({"lengths": (120, 40)}, "length=40 must lie in"),
    "beyond the positions": ({"lengths": (120, 510)}, "needles 510 of 510 tokens"),
    "small budget": (
        {"shares": (0.5, 0.05)},
        r"shares=0\.05 of the full cache for 120 \+ \d+ tokens is too little for "
        r"snapkv(.|\n)*takes [\d,]+ bytes",
    ),
    "small budget for a gem": (
        {"shares": (0.05,), "only": ("gemfilter",), "lengths": (), "passages": 1},
        "too little for gemfilter",
    ),
    "layer": ({"gemfilter": GemFilter(layer=4)}, r"layer=4 is not below"),
    "group": ({"windowkv": WindowKV(group=3)}, "group=3 does not divide"),
    "passages": ({"passages": 10**6}, "passages=1000000, but the text has only"),
    "no file": ({"longbench": (pathlib.Path("nowhere.jsonl"),)}, "nowhere.jsonl"),
    "nothing": ({"lengths": (), "passages": 0}, "no work"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses_before_any_work(config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(jmem.checkpoints.Checkpoint, "params", None)
    config = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path)
    assert not list(tmp_path.rglob("*.json*"))


def test_refuses_a_malformed_file(config, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW | {"answers": "The cat."}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: answers='The cat\.'"):
        run(dataclasses.replace(config, longbench=(file,)), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shares": (0.5, 1.0)}, r"shares=\(0\.5, 1\.0\); need each > 0 and < 1"),
        ({"shares": ()}, r"shares=\(\); need one or more"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\); need .*none twice"),
        ({"batch_size": 0}, "batch_size=0; need >= 1"),
        ({"continuation": 1}, "continuation=1; need >= 2"),
        ({"passages": -1}, "passages=-1; need >= 0"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        kvcache.Config(**changes)


def test_refuses_compiled_sizes():
    config = kvcache.Config(compiled=Compiled(prompt=8192))
    with pytest.raises(ValueError, match=r"prompt=8192 .* exceed the 8,192 positions"):
        kvcache.programs(config, resolve("h200"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_and_their_plans_made(name, tmp_path):
    _, config = cli.parse(kvcache.Config, "kvcache", ["--preset", name])
    saved = tmp_path / "saved.toml"
    saved.write_text(configs.write(config))
    assert configs.read(saved, kvcache.Config()) == config
    target = resolve(config.gpu)
    asked, methods = config.compiled, {"full": config.full} | config.methods
    model = asked.build(target, config)
    plans = plan_caches(model, methods, **asked.sizes, target=target)
    full = plans.pop("full").bytes()
    assert all(plan.bytes() < full for plan in plans.values())


def test_every_preset_is_listed():
    folder = pathlib.Path(kvcache.__file__).parents[1] / "configs" / "kvcache"
    names = {path.stem for path in folder.glob("*.toml")} - {"claims"}
    assert names == set(PRESETS)
