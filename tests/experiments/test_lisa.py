"""The LISA experiment end to end on a tiny checkpoint of one's own; refusals."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import pytest
from mutations import count, outcomes, toml_mutants
from tiny_decoder import TINY

import jmem.checkpoints
from experiments import lisa
from experiments.harness import cli
from experiments.harness import config as configs
from experiments.harness.run import Run, name_device
from jmem.data.source import keep_back
from jmem.data.text import read
from jmem.finetune import tuned
from jmem.finetune.adamw import AdamW
from jmem.finetune.lisa import Lisa
from jmem.targets import resolve
from jmem.train import metrics

PRESETS = (
    "gpt2_small",
    "tinyllama",
    "phi2",
    "mistral_7b",
    "llama2_7b",
    "llama3_8b",
    "llama2_70b",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSON Lines file of Python's own words about itself."""
    training, _ = jmem.data.python_reference()
    path = tmp_path_factory.mktemp("own") / "data.jsonl"
    rows = [{"body": row["text"][:600]} for row, _ in zip(training, range(20))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(checkpoint, data):
    adamw = AdamW(learning_rate=3e-3)
    return lisa.Config(
        model=str(checkpoint),
        data=str(data),
        column="body",
        only=("lora", "lisa"),
        lisa=Lisa(active_layers=1, period=2, adamw=adamw),
        steps=6,
        seq_len=64,
        held_out_tokens=256,
    )


def run(config, tmp_path, **more):
    target = resolve(config.gpu)
    with Run("lisa", config, target=target, runs=tmp_path, **more) as started:
        lisa.main(config, started)
    return started.folder


@pytest.mark.usefixtures("compiled_anew", "one_compilation")
def test_trains_a_checkpoint_of_ones_own_and_measures_it(config, tmp_path):
    folder = run(config, tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "complete"
    held_out = []
    for method in config.methods:
        rows = metrics.read(folder / method / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
        plan = json.loads((folder / method / "plan.json").read_text())
        assert plan["bytes"] > 4 * TINY.parameters
        held_out += [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    before, *after = held_out  # before once, as all start from the same weights
    assert len(after) == len(config.methods)
    assert max(after) < before
    active = [row["active"] for row in rows if "active" in row]
    assert active[0] == active[1]
    assert (folder / "memory.png").stat().st_size > 10_000
    assert (folder / "loss.png").stat().st_size > 10_000
    assert report["memory"].keys() == {"lora", "lisa"}
    noted = report["programs"]
    assert noted.keys() == {"lora", "lisa", "here/lora", "here/lisa"}
    assert len(set(noted.values())) == 4
    moved = {
        method: tuned.load(folder / "tuned" / method).params
        for method in config.methods
    }
    assert len({float(jax.tree.leaves(own)[0].sum()) for own in moved.values()}) == 2


@pytest.mark.usefixtures("one_compilation")
def test_compares_at_the_best_rate_and_leaves_losses_only(config, tmp_path):
    config = dataclasses.replace(
        config, only=("lora",), factors=(1.0, 3.0), seeds=(0, 1), steps=2
    )
    folder = run(config, tmp_path)
    report = json.loads((folder / "report.json").read_text())
    row = report["tables"]["Loss against bytes"]["lora"]
    assert row["seeds"] == 2
    assert row["least"] <= row["loss"] <= row["most"]
    assert row["device"] == report["memory"]["lora"]["device_bytes"]
    tried = {
        p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/done.json")
    }
    assert len(tried) == 3  # both rates, and the better one's other seed
    places = {(one["device"], one["jax"]) for one in tried.values()}
    assert places == {(name_device(), jax.__version__)}
    assert f"Trained on {name_device()} with JAX" in (folder / "report.md").read_text()
    best = min(("lora-x1-seed0", "lora-x3-seed0"), key=lambda n: tried[n]["choose"])
    assert best.replace("seed0", "seed1") in tried
    assert not list(folder.rglob("checkpoints"))
    assert [path.name for path in (folder / "tuned").iterdir()] == ["lora"]
    about = json.loads((folder / "tuned" / "lora" / "jmem.json").read_text())
    factor = 3 if best.startswith("lora-x3") else 1
    assert about["learning_rate"] == factor * config.lora.adamw.learning_rate
    assert about["seed"] == 0
    assert (folder / "compare.png").stat().st_size > 10_000


def test_measuring_loads_no_weights(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jmem.checkpoints.Checkpoint, "params", None)
    config = dataclasses.replace(config, only=("lisa",), gpu="rtx4090")
    folder = run(config, tmp_path, measure_only=True)
    memory = json.loads((folder / "report.json").read_text())["memory"]["lisa"]
    assert memory["device_bytes"] == sum(memory["by_kind"].values())
    assert memory["target"] == "rtx4090"
    assert memory["interval"][0] <= memory["device_bytes"] <= memory["interval"][1]


def test_documents_kept_back_are_whole_and_not_trained_on(config, checkpoint):
    opened = jmem.checkpoints.load(checkpoint)
    sequences = list(
        jmem.data.tokenise(
            read(config.data, column="body", unit="paragraph"), opened.tokenizer
        )
    )
    training, held_out = keep_back(sequences, config.held_out_tokens, "a")
    assert len(training) + len(held_out) == len(sequences)
    assert sum(map(len, held_out)) > config.held_out_tokens
    assert sum(map(len, held_out[1:])) <= config.held_out_tokens


TEMPLATE = """
{%- for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


@pytest.mark.parametrize(
    "columns", [{"prompt": "q", "completion": "a"}, {"chat": "turns"}], ids=str
)
def test_of_prompts_and_chats_the_answers_are_learnt(
    config, checkpoint, tmp_path, columns
):
    """Questions are in small letters, answers in capital ones."""
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    row = {"q": "what is it? ", "a": "IT IS A TEST"}
    row["turns"] = [
        {"role": "user", "content": row["q"]},
        {"role": "assistant", "content": row["a"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 50)
    config = dataclasses.replace(
        config, data=str(path), held_out_tokens=100, seq_len=32, **columns
    )
    opened = jmem.checkpoints.load(checkpoint)
    loader, held_out = lisa.make_batches(config, opened)
    batches = [loader.batch(step) for step in range(4)]
    for batch in (*batches, *held_out):
        learnt = opened.tokenizer.decode(
            batch.targets[batch.weights > 0], skip_special_tokens=True
        )
        assert learnt
        assert set(learnt) <= set(row["a"] + "|")
    counted = [batch.weights.sum() for batch in held_out]
    assert sum(counted[:-1]) < 100 <= sum(counted)


@pytest.mark.parametrize(
    ("known", "ids", "columns", "end"),
    [
        (("<|endoftext|>", "</s>"), (1,), {"prompt": "q", "completion": "a"}, "</s>"),
        (("<|endoftext|>", "</s>"), (1,), {}, "<|endoftext|>"),
        (("<|endoftext|>", "</s>"), (1,), {"chat": "turns"}, "<|endoftext|>"),
        (("<s>", "</s>"), (7, 1, 0), {}, "</s>"),  # 7 is a row of padding
        (("<s>", "</s>"), (1, 0), {"chat": "turns"}, "</s>"),
    ],
    ids=str,
)
def test_a_completion_ends_where_generation_stops(config, known, ids, columns, end):
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(sorted(known, reverse=True))}
    words = {word: int(word == "</s>") for word in words}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    opened = types.SimpleNamespace(require_tokenizer=lambda: tokenizer, eos_ids=ids)
    config = dataclasses.replace(config, **columns)
    assert config.find_end_token(opened) == end


def test_a_saved_checkpoint_keeps_its_template_and_its_end(
    config, checkpoint, tmp_path
):
    """Trained, saved `like` what it was, and given to the experiment again."""
    folder = tmp_path / "first"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 40}
    (folder / "config.json").write_text(json.dumps(raw))
    first = jmem.checkpoints.load(folder)
    saved = tmp_path / "saved"
    jmem.checkpoints.save(first.params(), first.config, saved, like=first)

    row = {"q": "what? ", "a": "THIS", "turns": [{"role": "user", "content": "hm"}]}
    row["turns"].append({"role": "assistant", "content": "THIS"})
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 30)
    config = dataclasses.replace(config, data=str(data), held_out_tokens=20, seq_len=32)
    for columns in ({"prompt": "q", "completion": "a"}, {"chat": "turns"}):
        asked = dataclasses.replace(config, **columns)
        loaders = [
            lisa.make_batches(asked, jmem.checkpoints.load(path))[0]
            for path in (folder, saved)
        ]
        first_batch, saved_batch = (loader.batch(0) for loader in loaders)
        assert first_batch.targets.tolist() == saved_batch.targets.tolist()
        ends = (saved_batch.targets == (40 if "prompt" in columns else 0)).sum()
        assert ends >= 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_setting(name):
    _, config = cli.parse(lisa.Config, "lisa", ["--preset", name])
    assert (config.seq_len, config.batch_size, config.dtype) == (1024, 1, "bfloat16")
    assert (config.lora.rank, config.lisa.active_layers) == (128, 2)
    adamws = [getattr(config, m).adamw for m in config.methods]
    assert {adamw.moment_dtype for adamw in adamws} == {"float32"}


REFUSED = {
    "unknown model": ({"model": "llama2-7"}, "did you mean 'llama2-7b'"),
    "no such checkpoint": ({"model": "./nowhere"}, "nowhere"),
    "no weights": ({"model": "llama2-7b"}, "llama2-7b"),
    "too long": ({"seq_len": 4096}, "seq_len=4096 exceeds the 128"),
    "too many layers": ({"lisa": Lisa(active_layers=9)}, "active_layers=9"),
    "no such file": ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    "missing column": ({"column": "txt"}, "'txt'"),
    "little text": ({"held_out_tokens": 10**6}, "lower --held-out-tokens"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses_before_anything_is_trained_or_written(
    config, tmp_path, changes, message
):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("field", ["steps", "batch_size", "seq_len", "held_out_tokens"])
def test_refuses_sizes_of_zero(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        lisa.Config(**{field: 0})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"data": "a.jsonl", "chat": "x", "prompt": "y"}, "two kinds of rows"),
        ({"chat": "x"}, "give --data"),
    ],
)
def test_refuses_columns_that_do_not_go_together(columns, message):
    with pytest.raises(ValueError, match=message):
        lisa.Config(**columns)


def test_a_preset_says_what_is_trained_how_fast_and_in_what(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'run_dtype = "mixed"\n[full]\ntrain = ["blocks/attention"]\n'
        '[full.adamw]\nrates = [["*/o", 0.5]]\nlayer_decay = 0.9\n'
    )
    flags = ["--lora.adamw.rates", "*/lora_b", "16"]
    _, config = cli.parse(lisa.Config, "lisa", ["--preset", str(path), *flags])
    assert config.full.train == ("blocks/attention",)
    assert config.full.adamw.rates == (("*/o", 0.5),)
    assert config.lora.adamw.rates == (("*/lora_b", 16.0),)
    saved = tmp_path / "saved.toml"
    saved.write_text(configs.write(config))
    assert configs.read(saved, lisa.Config()) == config
    model = lisa.build_here(config)
    assert (model.dtype, model.stored_dtype) == ("bfloat16", "float32")


def test_every_preset_is_listed():
    folder = pathlib.Path(lisa.__file__).parents[1] / "configs" / "lisa"
    names = {path.stem for path in folder.glob("*.toml")} - {"claims"}
    assert names == {*PRESETS, "llama2_70b_fsdp8", "compare", "compare_long"}


def test_the_long_comparison_is_compare_with_more_steps():
    short, long = (
        cli.parse(lisa.Config, "lisa", ["--preset", name])[1]
        for name in ("compare", "compare_long")
    )
    for method in long.methods:
        own, other = getattr(short, method), getattr(long, method)
        assert own.adamw.learning_rate == other.adamw.learning_rate
    same = "only", "factors", "seeds", "held_out_tokens"
    assert all(getattr(short, name) == getattr(long, name) for name in same)
    assert long.steps >= 30 * long.badam.period  # SmolLM2's blocks, each once


def test_mutated_presets_are_read_or_refused_by_name(tmp_path):
    folder = pathlib.Path(lisa.__file__).parents[1] / "configs" / "lisa"
    original = (folder / "tinyllama.toml").read_bytes()
    found = outcomes(
        toml_mutants(original, count(60), 9),
        tmp_path / "preset.toml",
        lambda path: configs.read(path, lisa.Config()),
        configs.ConfigError,
    )
    assert sum(found.values()) == count(60)
    assert min(found.values()) > 0, found
