"""WindowKV's experiment end to end at a tiny size; what it recommends; presets."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
from tiny_decoder import TINY

from experiments import windowkv
from experiments.harness import cli
from experiments.harness.run import Run
from jmem.data import recall
from jmem.data.recall import Recall
from jmem.evaluate.contenders import find_share_of_full
from jmem.evaluate.recall import draw_questions
from jmem.kvcache import task
from jmem.kvcache.windowkv import WindowKV
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.targets import resolve

PRESETS = (
    *("llama31_8b_128k", "llama3_8b", "llama3_8b_batch32", "qwen25_15b"),
    "smollm2_135m",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model small enough to compile in a moment, by the name "tiny"."""
    config = dataclasses.replace(TINY, layers=4, max_positions=128)
    monkeypatch.setitem(zoo.MODELS, "tiny", config)


CONFIG = windowkv.Config(
    recall=Recall(text=64, keys=8, values=24),
    small=windowkv.Small(hidden=16, head_dim=8, questions=2, effort=0.001),
    shares=(0.5,),
    tested=8,
    batch_size=4,
    classifier_prompts=2,
    compiled=windowkv.Compiled(
        model="tiny",
        prompt=96,
        capacities=(16,),
        windowkv=WindowKV(window=8, best=4, observation=8, group=2, divisor=4),
    ),
)


def run(config, tmp_path, **more):
    target = resolve(config.gpu)
    with Run("windowkv", config, target=target, runs=tmp_path, **more) as started:
        windowkv.main(config, started)
    return started.folder, json.loads((started.folder / "report.json").read_text())


def test_learns_compares_and_classifies(tmp_path, monkeypatch, capsys):
    """With few lessons and policies, as each is a program to compile."""
    every = windowkv.make_policies
    quick = functools.partial(task.train, steps=3, batch_size=4)
    monkeypatch.setattr(task, "train", quick)
    monkeypatch.setattr(
        task, "measure_accuracy", functools.partial(task.measure_accuracy, count=2)
    )
    monkeypatch.setattr(recall, "CURRICULUM", recall.CURRICULUM[:1])
    monkeypatch.setattr(
        windowkv,
        "make_policies",
        lambda *given: {
            name: policy for name, policy in every(*given).items() if "window" in name
        },
    )
    monkeypatch.setattr(windowkv, "report_memory", lambda config, run: None)
    folder, report = run(CONFIG, tmp_path)
    assert report["status"] == "complete"
    assert (folder / "lesson-1" / "metrics.jsonl").read_text()
    rows = report["tables"]["Answered rightly"]
    assert list(rows) == [
        "full",
        "windowkv official_code 50 %",
        "windowkv paper 50 %",
        "windowkv grid 50 %",
    ]
    for name, row in rows.items():
        assert row["of the prompt's"] <= 0.501 or name == "full"
        for kind in windowkv.TASK:
            assert row[f"{kind} from"] <= row[kind] <= row[f"{kind} to"]
    assert any("NOT LEARNT" in note for note in report["notes"])
    assert any("Recommended:" in note for note in report["notes"])
    scores = report["tables"]["How WindowKV scores a window"]
    assert scores["find"]["official_code"] == scores["majority"]["paper"] == "2 of 4"
    classified = report["tables"]["Classifier of tasks"]["byte n-grams"]
    assert 0 <= classified["held-out templates"] <= 1
    assert (folder / "recall.png").stat().st_size > 10_000
    assert "find: 2 of 4" in capsys.readouterr().out
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4  # which a stopped run would not ask again


@pytest.mark.usefixtures("one_compilation")
def test_measuring_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(windowkv, "learn", None)
    folder, report = run(CONFIG, tmp_path, measure_only=True)
    memory = report["tables"]["Memory on h200"]
    assert memory["windowkv-16"]["cache"] < 0.5 * memory["full"]["cache"]
    assert report["memory"].keys() == {
        f"{cache}-{part}"
        for cache in ("full", "windowkv-16")
        for part in ("prefill", "decode")
    }
    assert (folder / "memory.png").stat().st_size > 10_000


def found(code: list[list[int]], paper: list[list[int]]) -> dict[str, Any]:
    """Hits of one budget, by kind: find, then majority."""
    return {
        kind: {
            "windowkv official_code 50 %": np.array(ours, bool),
            "windowkv paper 50 %": np.array(theirs, bool),
        }
        for kind, ours, theirs in zip(windowkv.TASK, code, paper, strict=True)
    }


ALL, NONE, HALF = [1] * 8, [0] * 8, [1, 0] * 4


@pytest.mark.parametrize(
    ("code", "paper", "words"),
    [
        ([ALL, HALF], [NONE, HALF], "Recommended: by='official_code'"),
        ([HALF, NONE], [HALF, ALL], "Recommended: by='paper'"),
        ([ALL, NONE], [NONE, ALL], "localization by='official_code', aggregation by='"),
        ([HALF, HALF], [HALF[::-1], HALF], "Recommended: the default"),
    ],
)
def test_what_is_recommended_follows_the_numbers(code, paper, words):
    assert words in windowkv.recommend(CONFIG, found(code, paper))


def test_a_difference_must_be_more_than_chance():
    assert windowkv.find_better(8, 0) == "official_code"
    assert windowkv.find_better(0, 8) == "paper"
    assert windowkv.find_better(5, 3) is None
    assert windowkv.find_better(0, 0) is None


def test_code_and_paper_differ_in_which_tokens_count_and_in_nothing_else():
    for kind, by_code in (("find", 2), ("majority", 0)):
        own = windowkv.make_policies(CONFIG, kind)
        code, paper = own["windowkv official_code"], own["windowkv paper"]
        assert code.best == by_code != paper.best
        assert dataclasses.replace(code, best=paper.best) == paper


def test_every_budget_is_in_bytes_of_the_prompt():
    """And room for the answer is there besides, for all alike."""
    model = Decoder(CONFIG.small.config(CONFIG.recall))
    config = dataclasses.replace(CONFIG, shares=(0.25, 0.5))
    own = windowkv.contend(config, model, "find").contenders
    whole = own["full"].plan
    answer = whole.bytes() * CONFIG.recall.value // (whole.prompt + whole.new_tokens)
    names = ("streaming_llm", "snapkv", "snapkv unpooled", "pyramidkv")
    names += ("windowkv official_code", "windowkv paper", "windowkv grid")
    assert list(own)[1:] == [f"{n} {share} %" for n in names for share in (25, 50)]
    for name, contender in own.items():
        if name != "full":
            room = contender.share * (whole.bytes() - answer) + answer
            assert 0.8 * room < contender.plan.bytes() <= room + 8
            assert find_share_of_full(own, name) <= contender.share


def test_no_question_is_drawn_twice():
    sizes: Any = {"count": 8, "batch_size": 4, "seed": 0}
    asked = draw_questions(CONFIG.recall, "find", **sizes)
    assert len({tuple(row) for row in asked.rows}) == 8
    again = draw_questions(CONFIG.recall, "find", **sizes)
    np.testing.assert_array_equal(asked.asked.tokens, again.asked.tokens)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_its_programs(name):
    assert set(cli.list_presets("windowkv")) == set(PRESETS)
    _, config = cli.parse(windowkv.Config, "windowkv", ["--preset", name])
    assert config != windowkv.Config()
    built = windowkv.programs(config, resolve(config.gpu))
    assert len(built) == 2 * (1 + len(config.compiled.capacities))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tested": 0}, "tested=0; need >= 1"),
        ({"tested": 10}, "tested=10 is no multiple of batch_size=4"),
        ({"shares": ()}, r"shares=\(\); need one or more"),
        ({"shares": (0.5, 0.5)}, "none twice"),
        ({"shares": (1.0,)}, r"shares=\(1\.0,\); need each > 0 and < 1"),
        ({"small": windowkv.Small(effort=0.0)}, "Small: effort=0.0; need > 0"),
    ],
)
def test_refusals(given, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **given)


def test_a_budget_below_what_a_policy_observes_is_refused_before_training(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(windowkv, "learn", None)
    config = dataclasses.replace(CONFIG, shares=(0.02,))
    with pytest.raises(ValueError, match=r"shares=0\.02 .* too little for snapkv"):
        run(config, tmp_path)


def test_a_prompt_beyond_the_model_is_refused():
    compiled = dataclasses.replace(CONFIG.compiled, prompt=129)
    config = dataclasses.replace(CONFIG, compiled=compiled)
    with pytest.raises(ValueError, match="exceed the 128 positions of tiny"):
        windowkv.programs(config, resolve("h200"))
