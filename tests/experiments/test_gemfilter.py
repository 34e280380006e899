"""The GemFilter experiment end to end on a tiny checkpoint of one's own; refusals."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem.checkpoints
from experiments import gemfilter
from experiments.harness import cli
from experiments.harness.run import Run
from experiments.harness.settings import dimensions
from jmem.data.needle import Haystack
from jmem.evaluate import compare, needle
from jmem.kvcache.gemfilter import (
    GemFilter,
    calibrate_filter_layer,
    split,
)
from jmem.kvcache.gemfilter.study import choose_layer
from jmem.kvcache.snapkv import SnapKV
from jmem.models.decoder import Decoder
from jmem.targets import resolve

PRESETS = {
    "llama31_8b_128k": (131_072, 32, 13),
    "llama31_8b_8k": (8192, 32, 13),
    "mistral_nemo_12b": (65_536, 40, 19),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, byte_tokenizer):
    """A Hugging Face folder of a random tiny Llama that reads bytes."""
    dims = dataclasses.replace(TINY, vocab_size=264, layers=3, max_positions=256)
    folder = tmp_path_factory.mktemp("own") / "model"
    params = random_params(dims, scale=0.1)
    jmem.checkpoints.save(params, dims, folder, byte_tokenizer)
    return folder


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """As much of Python's documentation as a tiny model needs, read once."""
    found = jmem.data.python_reference()
    little = found._replace(training=found.training[-2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jmem.data, "python_reference", lambda: little)
        yield


@pytest.fixture(scope="module")
def config(checkpoint):
    return gemfilter.Config(
        model=str(checkpoint),
        gemfilter=GemFilter(layer=1, tokens=32),
        snapkv=SnapKV(window=4),
        shares=(0.5,),
        keep_last=8,
        window=4,
        lengths=(160,),
        depths=(0.0, 1.0),
        seeds=(3,),
        calibration_lengths=(120,),
        batch_size=3,
        prompt_tokens=160,
        new_tokens=4,
    )


def run(config, tmp_path, **more):
    target = resolve(config.gpu)
    with Run("gemfilter", config, target=target, runs=tmp_path, **more) as started:
        gemfilter.main(config, started)
    return started.folder


def tables(folder):
    return json.loads((folder / "report.json").read_text())["tables"]


def cases(config, lengths, seeds):
    texts = jmem.data.python_reference().training
    text = "\n\n".join(document["text"] for document in texts)
    tokenizer = jmem.checkpoints.load(config.model).tokenizer
    assert tokenizer is not None
    haystack = Haystack(tokenizer, text)
    return needle.make_grid(
        haystack, lengths=lengths, depths=config.depths, seeds=seeds
    )


def run_without_the_rest(config, tmp_path, **more):
    """All but memory, time, and the answer from staged weights."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report_memory", "report_phases"):
            patch.setattr(gemfilter, name, lambda *parts: None)
        return run(config, tmp_path, **more)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run of one's own checkpoint."""
    return run_without_the_rest(config, tmp_path_factory.mktemp("finished"))


def test_a_run_of_ones_own_checkpoint(config, finished):
    found = tables(finished)
    checkpoint = jmem.checkpoints.load(config.model)
    model, params = Decoder(checkpoint.config), checkpoint.params()

    asked = cases(config, config.calibration_lengths, config.calibration_seeds)
    prompts, spans = [c.tokens for c in asked], [c.span for c in asked]
    gem = GemFilter(tokens=60)
    recall = calibrate_filter_layer(model, params, gem, prompts, spans)
    rows = found["Recall of the needle by layer"].values()
    np.testing.assert_allclose([row["50 % kept"] for row in rows], recall, rtol=1e-6)
    layer = choose_layer(recall)

    rows = found["Needles answered"]
    kinds = ("snapkv", *gemfilter.make_variants(config, layer=0, tokens=16))
    assert set(rows) == {"full", *(f"{kind} 50 %" for kind in kinds)}
    assert {row["of"] for row in rows.values()} == {2}
    asked = cases(config, config.lengths, config.seeds)
    tokens = jnp.asarray([case.tokens for case in asked], jnp.int32)
    gem = GemFilter(layer=layer, tokens=80)
    kept = gem.shorten(model, params, tokens, jnp.array([160, 160])).positions
    inside = [np.isin(np.arange(*c.span), row).mean() for c, row in zip(asked, kept)]
    plain = rows["as given 50 %"]
    assert plain["needle kept"] == pytest.approx(np.mean(inside))
    assert plain["last token kept"] == (np.asarray(kept) == 159).sum() / 2
    assert rows["ends 50 %"]["last token kept"] == 1.0
    assert rows["full"]["needle kept"] is None
    for picture in ("recall", "needles"):
        assert (finished / f"{picture}.png").stat().st_size > 10_000


def test_a_finished_run_asks_nothing_twice(config, finished, tmp_path, monkeypatch):
    again = shutil.copytree(finished, tmp_path / "again")
    monkeypatch.setattr(gemfilter, "measure_layer_recall", None)
    monkeypatch.setattr(compare, "read_all", None)
    assert run_without_the_rest(config, tmp_path, resume=again) == again
    assert tables(again) == tables(finished)


def test_every_contender_has_the_tokens_or_the_bytes_of_a_share(config):
    """In whole windows, so that all filters keep as many."""
    config = dataclasses.replace(config, shares=(0.44,), lengths=(150,))
    bench = gemfilter.open_bench(config)
    _, contenders = gemfilter.contend(config, bench, bench.tasks[0], layer=1)
    most = contenders["as given 44 %"].plan.bytes()
    for name, contender in contenders.items():
        if contender.filter is not None:
            assert contender.filter.tokens == 64
        elif name != "full":
            assert 0.97 * most < contender.plan.bytes() <= most


def test_an_answer_from_staged_weights_and_the_time_to_it(config, tmp_path):
    bench = gemfilter.open_bench(config)
    params = bench.checkpoint.params()
    with Run("gemfilter", config, runs=tmp_path) as started:
        gemfilter.report_phases(config, started, bench, params, 1)
    found = tables(started.folder)
    (times,) = found["Seconds to the first token on cpu"].values()
    assert all(value > 0 for value in times.values())
    weights = found["Weights of that answer, of which the late part waits on the host"]
    first, answer, again = (row["on the device"] for row in weights.values())
    assert first == again < answer
    text = (started.folder / "report.md").read_text()
    assert "the same as those with all weights on the device" in text
    assert "80 of 160 tokens, in " in text


def test_memory_of_the_phases(config, tmp_path, monkeypatch):
    """No weights are read; the peak is that of the phase that needs most."""
    monkeypatch.setattr(jmem.checkpoints.Checkpoint, "params", None)
    config = dataclasses.replace(config, gpu="rtx4090")
    built = gemfilter.programs(config, resolve(config.gpu))
    assert len(built) == 8
    real = jmem.measure(built["gemfilter-filter"], target="rtx4090", bounds=False)
    numbers = iter(range(100, 900, 100))

    def measure(program, **options):  # that of one program, with another size
        size = next(numbers)
        weights = sum(leaf.size for leaf in jax.tree.leaves(program.args[0])) * 2
        return dataclasses.replace(
            real, device_bytes=size, by_label={"weights": weights}
        )

    monkeypatch.setattr(jmem, "measure", measure)
    folder = run(config, tmp_path, measure_only=True)
    rows = tables(folder)["Memory of an answer on rtx4090"]
    names = ("filter pass", "prefill", "decode", "peak")
    assert {name: [row[n] for n in names] for name, row in rows.items()} == {
        "standard": [None, 300, 400, 400],
        "snapkv": [None, 500, 600, 600],
        "gemfilter": [100, 700, 800, 800],
        "gemfilter, all resident": [200, 700, 800, 800],
    }
    model = Decoder(dimensions(config.model))
    _, late = jax.eval_shape(lambda params: split(params, 1), model.abstract())
    size = sum(leaf.size for leaf in jax.tree.leaves(late))
    assert rows["gemfilter"]["on the host"] == 2 * size
    assert real.by_label["weights"] == 2 * (model.config.parameters - size)


def test_the_layer_is_the_first_that_finds_or_else_the_best():
    assert choose_layer(np.array([0.2, 0.96, 0.94, 1.0])) == 1
    assert choose_layer(np.array([0.2, 0.5, 0.9, 0.9])) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_models(name):
    _, config = cli.parse(gemfilter.Config, "gemfilter", ["--preset", name])
    dims = dimensions(config.model)
    gem = config.gemfilter
    assert PRESETS[name] == (config.prompt_tokens, dims.layers, gem.layer)
    assert (gem.tokens, gem.kernel, gem.score, gem.window) == (1024, 5, "raw", 1)
    assert (gem.keep_first, gem.keep_last, config.dtype) == (0, 0, "bfloat16")


def test_every_preset_is_listed():
    folder = pathlib.Path(gemfilter.__file__).parents[1] / "configs" / "gemfilter"
    assert {path.stem for path in folder.glob("*.toml")} - {"claims"} == set(PRESETS)


REFUSED = {
    "unknown model": ({"model": "llama3.1-8"}, "did you mean 'llama3.1-8b'"),
    "no such checkpoint": ({"model": "./nowhere"}, "nowhere"),
    "no weights": ({"model": "llama3.1-8b"}, "llama3.1-8b"),
    "too long": ({"lengths": (250,)}, r"250 tokens with \d+ to follow exceed the 256"),
    "too short": ({"lengths": (40,)}, "length=40 must lie in"),
    "no room for ends": (
        {"keep_last": 90},
        r"shares=0\.5 of the full cache for 160 \+ \d+ tokens is too little for ends"
        r"(.|\n)*keep_last=90",
    ),
    "no room for SnapKV": (
        {"snapkv": SnapKV(window=100, capacity=200)},
        r"shares=0\.5 .* is too little for snapkv(.|\n)* too small for SnapKV",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses_before_weights_are_read(
    config, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(jmem.checkpoints.Checkpoint, "params", None)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, **changes), tmp_path)
    assert not list(tmp_path.rglob("results.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0; need >= 1"),
        ({"chunk": -1}, "chunk=-1; need >= 0"),
        ({"shares": ()}, r"shares=\(\); need one or more"),
        ({"depths": (0.5, 0.5)}, "none twice"),
        ({"shares": (1.0,)}, r"shares=\(1\.0,\); need .*each > 0 and < 1"),
        ({"calibration_seeds": (1,)}, r"share \{1\} with seeds"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        gemfilter.Config(**changes)
