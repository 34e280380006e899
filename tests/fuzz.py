"""Damaged files of every format that is read, each by a seeded mutator of its own.

    uv run python -m tests.fuzz                          3,500 inputs, 100 a format
    uv run python -m tests.fuzz --inputs 10000 --seed 7
    uv run python -m tests.fuzz --only gguf --case 31    this one again

An input is read as what it still says, or refused by an error of ours that names the
file. Anything else is printed with its seed, and ends with status 1: another exception,
over 20 s, over 4 GiB, a file that was touched, or a part of one that was left.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

sys.path.append(str(pathlib.Path(__file__).parent))  # as pytest's `pythonpath`

import jax
import jax.numpy as jnp
import numpy as np
from mutations import damage_bytes, damage_json, damage_text
from tiny_decoder import TINY, random_params

from experiments import lisa
from experiments.harness import check, claim, exports, record, sweep
from experiments.harness import config as configs
from experiments.harness.journal import Journal
from experiments.harness.report import Column, gib
from experiments.harness.run import Run
from jmem import checkpoints, confined, disk, measure, targets
from jmem.data import text as texts
from jmem.data.chat import ChatTemplate, read_chats, read_template
from jmem.data.document import DataError
from jmem.finetune.mixlora import MixLora
from jmem.memory import cache, page, protocol
from jmem.memory.report import MemoryReport
from jmem.models.decoder import Decoder
from jmem.train import checkpoint, metrics
from jmem.train.loop import DivergedError
from tests.checkpoints import tiny

Random = np.random.Generator
SECONDS, BYTES = 20, 4 << 30
CONFIGS = pathlib.Path(lisa.__file__).parents[1] / "configs" / "lisa"
JINJA = (
    *("{% for i in range(10**9) %}", "{% endfor %}", "{{ messages * 10**7 }}", "{{"),
    *("{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{% endif %}"),
    *("{{ m.content.a.b }}", "{{ '%0999999999d' % 1 }}", "{{ none + 1 }}", "{#", "|a"),
)
TOML = (
    *("nan", "-1", "0", "1e999", "true", '""', '"None"', "[]", "[[1]]", "{a = 1}"),
    *("1979-05-27", "9" * 40, '"\\u001b[2J"', '"a\\nb"', "[1, 'a']", "0.5", '"h200"'),
)


class Format(NamedTuple):
    """A file of one format beside what it needs, how it is damaged and who reads it."""

    path: pathlib.Path
    damage: Callable[[bytes, Random], bytes]
    read: Callable[[], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    rewrites: bool = False
    """Whether its reader mends or removes what is damaged."""


# Mutators -----------------------------------------------------------------------------


def damage_either(raw: bytes, random: Random) -> bytes:
    return (damage_text if random.random() < 0.5 else damage_bytes)(raw, random)


def damage_document(raw: bytes, random: Random) -> bytes:
    """A JSON text: three in four stay JSON."""
    if random.random() < 0.25:
        return damage_either(raw, random)
    return json.dumps(damage_json(json.loads(raw), random)).encode()


def damage_lines(raw: bytes, random: Random) -> bytes:
    """JSON lines: one is damaged, or stands twice, or is gone."""
    lines = raw.splitlines()
    at = int(random.integers(len(lines)))
    lines[at : at + 1] = [damage_document(lines[at], random)] * random.integers(3)
    return b"\n".join(lines) + b"\n"


def damage_toml(raw: bytes, random: Random) -> bytes:
    """A TOML text: half of them by another value of one key."""
    if random.random() < 0.5:
        return damage_either(raw, random)
    keys = [*re.finditer(rb"(?m)^[\w.]+ *= *(.+)$", raw)]
    start, end = keys[random.integers(len(keys))].span(1)
    return raw[:start] + TOML[random.integers(len(TOML))].encode() + raw[end:]


def damage_template(raw: bytes, random: Random) -> bytes:
    if random.random() < 0.4:
        return damage_either(raw, random)
    at = int(random.integers(len(raw)))
    return raw[:at] + JINJA[random.integers(len(JINJA))].encode() + raw[at:]


def damage_safetensors(raw: bytes, random: Random) -> bytes:
    if random.random() < 0.4:
        return damage_bytes(raw, random)
    (length,) = struct.unpack("<Q", raw[:8])
    text = damage_document(raw[8 : 8 + length], random)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def damage_parquet(raw: bytes, random: Random) -> bytes:
    """Its bytes, or the rows as another table's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if random.random() < 0.6:
        return damage_bytes(raw, random)
    rows = damage_json(pq.read_table(io.BytesIO(raw)).to_pylist(), random)
    try:
        pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    except Exception:  # no table holds such rows
        return damage_bytes(raw, random)
    return file.getvalue()


# Formats ------------------------------------------------------------------------------


TEMPLATE = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content | trim }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = [
    {"role": "user", "content": "wx?"},
    {"role": "assistant", "content": "21 é", "weight": 1},
]
ROWS = [
    {"messages": CHAT},
    {"messages": [*CHAT, {"role": "user", "content": [{"type": "text", "text": "b"}]}]},
]


def write_model(folder: pathlib.Path, shards: int = 0) -> pathlib.Path:
    config = dataclasses.replace(tiny.VARIANTS["scaled"], layers=1)
    tensors = tiny.torch_tensors(random_params(config), "huggingface")
    tokenizer = tiny.tiny_tokenizer()
    tiny.write_folder(folder, config, tensors, shards=shards, tokenizer=tokenizer)
    more = {
        "tokenizer_config": {"eos_token": "three", "chat_template": TEMPLATE},
        "special_tokens_map": {"eos_token": {"content": "."}, "bos_token": "one"},
        "generation_config": {"eos_token_id": [3, 4], "temperature": 0.5},
    }
    for name, values in more.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def load(source: pathlib.Path) -> None:
    """Weights have the shapes of the config, and end tokens are tokens."""
    found = checkpoints.load(source)
    like = Decoder(found.config).abstract()
    shapes = jax.tree.map(lambda leaf: leaf.shape, (found.params(), like))
    assert shapes[0] == shapes[1]
    assert all(0 <= token < found.config.vocab_size for token in found.eos_ids)
    if found.tokenizer is not None:
        found.tokenizer.decode(found.tokenizer.encode("one two é").ids)


def of_model(name: str, damage: Callable[[bytes, Random], bytes] = damage_document):
    """A file of a Hugging Face folder."""

    def make(folder: pathlib.Path) -> Format:
        path = write_model(folder, shards=2 * name.endswith("index.json")) / name
        return Format(path, damage, lambda: load(folder), checkpoints.CheckpointError)

    return make


def make_config(folder: pathlib.Path) -> Format:
    path = folder / "config.json"
    path.write_text(json.dumps(tiny.hf_config(tiny.VARIANTS["scaled"])))

    def read():
        Decoder(checkpoints.read_config(folder)).abstract()

    return Format(path, damage_document, read, checkpoints.CheckpointError)


def make_gguf(folder: pathlib.Path) -> Format:
    config = dataclasses.replace(TINY, layers=1)
    path = tiny.write_gguf(folder / "m.gguf", config, random_params(config))
    return Format(path, damage_bytes, lambda: load(path), checkpoints.CheckpointError)


def of_adapter(name: str, damage: Callable[[bytes, Random], bytes]):
    """A file of PEFT's folder."""

    def make(folder: pathlib.Path) -> Format:
        pair = {
            "lora_a": np.ones((TINY.layers, TINY.hidden, 2), np.float32),
            "lora_b": np.ones((TINY.layers, 2, TINY.hidden), np.float32),
        }
        given = {"attention": {"q": pair, "o": pair}}
        checkpoints.save_adapter(given, TINY, folder, alpha=8)

        def read():
            found = checkpoints.load_adapter(folder, TINY).adapters
            for held in jax.tree.leaves(found):
                assert held.shape[0] == TINY.layers

        return Format(folder / name, damage, read, checkpoints.CheckpointError)

    return make


def of_mixture(name: str, damage: Callable[[bytes, Random], bytes]):
    """A file of MoE-PEFT's folder."""

    def make(folder: pathlib.Path) -> Format:
        def pair(inputs, outputs, width):
            shapes = {"lora_a": (inputs, width), "lora_b": (width, outputs)}
            return {k: np.ones((TINY.layers, *s), "f") for k, s in shapes.items()}

        router = np.ones((TINY.layers, TINY.hidden, 3), np.float32)
        up = pair(TINY.hidden, TINY.intermediate, 3 * 2)
        given = {
            "attention": {"q": pair(TINY.hidden, TINY.hidden, 2)},
            "mlp": {"router": {"kernel": router}, "up": up},
        }
        checkpoints.save_mixlora(given, TINY, folder, alpha=8, balance=0.01)

        def read():
            found = checkpoints.load_mixlora(folder, TINY)
            MixLora.of(found.settings)
            for held in jax.tree.leaves(found.adapters):
                assert held.shape[0] == TINY.layers

        return Format(folder / name, damage, read, checkpoints.CheckpointError)

    return make


def of_template(name: str, damage: Callable[[bytes, Random], bytes]):
    def make(folder: pathlib.Path) -> Format:
        words = {"eos_token": "</s>", "chat_template": TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        if name.endswith("jinja"):
            (folder / name).write_text(TEMPLATE)

        def read():
            read_template(folder).render(CHAT, str(folder / name))

        return Format(folder / name, damage, read, DataError)

    return make


def of_rows(name: str, rows: list[Any], damage: Callable[[bytes, Random], bytes]):
    """A table of conversations, or of texts."""

    def make(folder: pathlib.Path) -> Format:
        path = folder / name
        if name.endswith("jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith("json"):
            path.write_text(json.dumps(rows))
        elif name.endswith("csv"):
            path.write_text("id,text\n" + "".join(f"1,{json.dumps(r)}\n" for r in rows))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)

        def read():
            if name.startswith("texts"):
                return texts.read(path)["text"]
            template = ChatTemplate(TEMPLATE, {"eos_token": "</s>"})
            found = read_chats(path, template=template)
            for text, spans in zip(found["text"], found["loss_spans"]):
                ends = [0, *(end for span in spans for end in span), len(text)]
                assert ends == sorted(ends)
            return None

        return Format(path, damage, read, DataError)

    return make


def make_preset(folder: pathlib.Path) -> Format:
    path = folder / "preset.toml"
    path.write_bytes((CONFIGS / "compare.toml").read_bytes())

    def read():
        found = configs.read(path, lisa.Config())
        path.with_suffix(".twin").write_text(configs.write(found))
        again = configs.read(path.with_suffix(".twin"), lisa.Config())
        path.with_suffix(".twin").unlink()
        assert not [*configs.find_differences(found, again)]

    return Format(path, damage_toml, read, configs.ConfigError)


def make_target(folder: pathlib.Path) -> Format:
    path = folder / "card.toml"
    path.write_text('like = "rtx4090"\nmemory_gib = 32\ncores = 144\nclock_ghz = 2.4\n')

    def read():
        card = targets.resolve(str(path))
        assert 0 < card.usable_bytes <= card.compiler_bytes

    return Format(path, damage_toml, read, ValueError)


def make_claims(folder: pathlib.Path) -> Format:
    path = folder / "claims.toml"
    whole = (CONFIGS / "claims.toml").read_text()
    first = "\n[[claim]]".join(whole.split("\n[[claim]]")[:3])
    path.write_text(
        re.sub(r"(?ms)^relations = \[.*?\]$", 'relations = ["ours <= ours"]', first)
    )
    return Format(path, damage_toml, lambda: claim.read(path), claim.ClaimsError)


def make_records(folder: pathlib.Path) -> Format:
    path = folder / "records.json"
    known = json.loads((CONFIGS / "records.json").read_text())
    path.write_text(json.dumps({name: known[name] for name in [*known][:3]}))

    def read():
        for found in record.load(path).values():
            assert isinstance(found.value, int | float)
            assert found.date + found.device + found.commit + found.versions["jax"]

    return Format(path, damage_document, read, claim.ClaimsError)


def make_manifest(folder: pathlib.Path) -> Format:
    with checkpoint.Checkpoints(folder) as saved:
        for step in (1, 2):
            saved.save(step, {"w": jnp.full(3, float(step))}, data="walk")

    def read():
        like = checkpoint.abstract({"w": jnp.zeros(3)})
        with checkpoint.Checkpoints(folder) as found:
            step, state = found.restore(like, data="walk")
        assert state["w"].tolist() == [step] * 3

    path = folder / "2" / "manifest.json"
    return Format(path, damage_document, read, checkpoint.CheckpointError, True)


def make_journal(folder: pathlib.Path) -> Format:
    values = {f"n{n}": {"a": [n, 0.5]} for n in range(3)}
    journal = Journal(folder)
    for name, value in values.items():
        journal(name, lambda value=value: {"a": np.array(value["a"])})

    def read():
        found = Journal(folder)
        assert all(found(name, dict) in ({}, values[name]) for name in values)

    path = folder / "results.jsonl"
    return Format(path, damage_lines, read, disk.DamagedError, True)


def make_metrics(folder: pathlib.Path) -> Format:
    row = {"step": 1, "loss": 2.5, "active": [1, 2], "held_out_loss": None}
    path = folder / metrics.NAME
    path.write_text("".join(json.dumps(row | {"step": n}) + "\n" for n in range(9)))

    def read():
        file = metrics.MetricsFile(folder, step=5)
        file.close()
        assert all(row["step"] <= 5 for row in metrics.read(folder))

    return Format(path, damage_lines, read, metrics.MetricsError, True)


def measure_small() -> MemoryReport:
    x = jax.ShapeDtypeStruct((64, 64), "float32")
    return measure(lambda x: x @ x, x, bounds=False, cache=False)


def make_memory_report(folder: pathlib.Path) -> Format:
    measure_small().to_json(path := folder / "report.json")

    def read():
        report = MemoryReport.from_json(path)
        assert str(report)
        assert page.write_markdown(report)
        assert "<script" not in page.write_html(report)
        assert str(report.fits())

    return Format(path, damage_document, read, ValueError)


def make_kept_report(folder: pathlib.Path) -> Format:
    whole, there = measure_small(), {"JMEM_CACHE_DIR": str(folder)}
    with mock.patch.dict(os.environ, there):
        cache.store("kept", whole)

    def read():
        with mock.patch.dict(os.environ, there):
            found = cache.load("kept")
        assert found in (None, dataclasses.replace(whole, cached=True))

    return Format(folder / "kept.json", damage_document, read, ValueError)


def make_run_report(folder: pathlib.Path) -> Format:
    path = folder / "report.json"
    values = {"status": "complete", "tables": [{"title": "a", "rows": [[1, "b"]]}]}
    path.write_text(disk.seal(values))

    def read():
        found = record.read_report(folder)
        assert found == values or disk.DIGEST not in json.loads(path.read_bytes())

    return Format(path, damage_document, read, claim.ClaimsError)


@contextlib.contextmanager
def go_on(folder: pathlib.Path) -> Iterator[Run]:
    """A run that is resumed and says nothing aloud."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = lisa.Config(gpu="h200")
        with Run("lisa", config, resume=folder, target=targets.resolve("h200")) as run:
            yield run


def make_plan(folder: pathlib.Path) -> Format:
    (folder / "lora").mkdir()
    path = folder / "lora" / "plan.json"
    # As older versions wrote it, without a digest; so below.
    path.write_text(json.dumps({"bytes": 1 << 30, "program": "ab12"}))

    def read():
        with go_on(folder) as run:
            plan = run.read_plan("lora")
            columns = "method", Column("memory", gib)
            run.table("Memory", columns, [("lora", plan.get("bytes"))])
        assert all(isinstance(p, str) for p in run.report.programs.values())

    return Format(path, damage_document, read, disk.DamagedError, True)


def make_trial(folder: pathlib.Path) -> Format:
    (folder / "lora-x1-seed0").mkdir()
    path = folder / "lora-x1-seed0" / "done.json"
    found = {"choose": 2.5, "loss": 2.25, "device": "cpu", "jax": "0.12.0"}
    path.write_text(json.dumps(found))

    def train(*_):
        raise AssertionError("a trial that is done is not trained again")

    def read():
        with go_on(folder) as run:
            outcomes = sweep.search(run, ["lora"], (1.0,), (0,), train)
            sweep.tabulate(run, "Losses", outcomes, (), lambda *_: (), before=3.0)
        assert np.isfinite(outcomes["lora"].mean)

    return Format(path, damage_document, read, (disk.DamagedError, DivergedError), True)


def make_tuned(folder: pathlib.Path) -> Format:
    (folder / "lora").mkdir()
    path = folder / "lora" / exports.ABOUT
    about = {
        **{"experiment": "lisa", "method": "lora", "learning_rate": 1e-4, "seed": 0},
        **{"updates": 8, "kept": "best", "files": {"model.safetensors": 9}},
        **{"dtype": "bfloat16", "trained_in": "float32"},
    }
    path.write_text(disk.seal(about))

    def read():
        assert str(path.parent) in exports.describe(path.parent)

    return Format(path, damage_document, read, disk.DamagedError)


def make_check(folder: pathlib.Path) -> Format:
    path, rows = folder / "check.json", {"one": {"ms": 1.5, "programs": {"one": "ab"}}}
    probed = {"device": "NVIDIA H200", "versions": {"jax": "0.12.0"}}
    check.write(path, "toy", probed, {}, True, rows=rows)

    def read():
        hashes = {row: found["programs"] for row, found in rows.items()}
        answers = {"probe": lambda: probed, "call": lambda *_, **how: hashes}
        flags = check.Flags(out=path, minutes=9)
        with (
            mock.patch.multiple(protocol, **answers),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            called = check.Check("toy", flags, {}, ["one"])
            again = called.measure("rows", lambda row: {"ms": 1.5}, "{1[ms]}".format)
        assert again == rows

    return Format(path, damage_document, read, ValueError, True)


TEXTS = [{"text": "a é"}, {"text": "b\nc"}, {"text": "d"}]
FORMATS: dict[str, Callable[[pathlib.Path], Format]] = {
    "config": make_config,
    "config-of-weights": of_model("config.json"),
    "tokenizer": of_model("tokenizer.json"),
    "tokenizer-config": of_model("tokenizer_config.json"),
    "special-tokens": of_model("special_tokens_map.json"),
    "generation-config": of_model("generation_config.json"),
    "safetensors": of_model("model.safetensors", damage_safetensors),
    "shards": of_model("model.safetensors.index.json"),
    "gguf": make_gguf,
    "adapter-config": of_adapter("adapter_config.json", damage_document),
    "adapter": of_adapter("adapter_model.safetensors", damage_safetensors),
    "mixture-config": of_mixture("adapter_config.json", damage_document),
    "mixture": of_mixture("adapter_model.safetensors", damage_safetensors),
    "template": of_template("chat_template.jinja", damage_template),
    "template-in-config": of_template("tokenizer_config.json", damage_document),
    "chats-jsonl": of_rows("chats.jsonl", ROWS, damage_lines),
    "chats-json": of_rows("chats.json", ROWS, damage_document),
    "chats-parquet": of_rows("chats.parquet", ROWS[:1], damage_parquet),
    "texts-jsonl": of_rows("texts.jsonl", TEXTS, damage_lines),
    "texts-parquet": of_rows("texts.parquet", TEXTS, damage_parquet),
    "texts-csv": of_rows("texts.csv", ["a é", "b, c"], damage_either),
    "preset": make_preset,
    "target": make_target,
    "claims": make_claims,
    "records": make_records,
    "manifest": make_manifest,
    "journal": make_journal,
    "metrics": make_metrics,
    "memory-report": make_memory_report,
    "kept-report": make_kept_report,
    "run-report": make_run_report,
    "plan": make_plan,
    "trial": make_trial,
    "tuned": make_tuned,
    "check": make_check,
}


# Running ------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no handler of the code under test can take it."""


def digest(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def attack(
    name: str, root: pathlib.Path, cases: range, seed: int
) -> Iterator[tuple[int, str]]:
    """(case, "read", "refused" or what is wrong) of each damaged input of a format."""

    def stop(*_):
        raise Hang(f"over {SECONDS} s")

    folder, whole = root / name, root / f"{name}.whole"
    folder.mkdir()
    made = FORMATS[name](folder)
    made.read()  # what is whole is read; also compiles
    shutil.copytree(folder, whole)
    raw, before = made.path.read_bytes(), digest(folder)
    handler = signal.signal(signal.SIGALRM, stop)
    for case in cases:
        random = np.random.default_rng([seed, case, zlib.crc32(name.encode())])
        made.path.write_bytes(mutant := made.damage(raw, random))
        before[str(made.path.relative_to(folder))] = hashlib.sha256(mutant).hexdigest()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", checkpoints.CheckpointWarning)
                made.read()
            found = "read"
        except made.error as error:
            named = str(folder) in str(error) or made.path.name in str(error)
            found = "refused" if named else f"names no file: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = repr(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if grown * 1024 > BYTES:
            found = f"{grown >> 20} GiB more"
        after = digest(folder)
        if any("partial" in path or path.endswith("twin") for path in after):
            found = f"left a part: {sorted(after.keys() - before.keys())}"
        if not made.rewrites and after != before:
            found = f"changed files: {sorted(after.items() ^ before.items())}"
        yield case, found
        if made.rewrites or found not in ("read", "refused"):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
    signal.signal(signal.SIGALRM, handler)


def limit_memory() -> None:
    """So much more than is held now, and no more: beyond, it is a MemoryError."""
    status = pathlib.Path("/proc/self/status").read_text()
    (held,) = re.findall(r"(?m)^VmData:\s+(\d+) kB$", status)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + BYTES, hard))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100 * len(FORMATS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FORMATS, nargs="+", default=[*FORMATS])
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    each = -(-given.inputs // len(given.only))
    cases = range(each) if given.case is None else range(given.case, given.case + 1)
    total, wrong = 0, 0
    with tempfile.TemporaryDirectory() as root:
        for name in given.only:
            counts = {"read": 0, "refused": 0}
            for case, found in attack(name, pathlib.Path(root), cases, given.seed):
                if found in counts:
                    counts[found] += 1
                else:
                    wrong += 1
                    print(f"  --only {name} --seed {given.seed} --case {case}: {found}")
            total += len(cases)
            print(f"{name:20} {len(cases):5} inputs  {counts}", flush=True)
    print(f"{total} inputs, {wrong} violations")
    return bool(wrong)


if __name__ == "__main__":
    limit_memory()
    confined.SECONDS = 2.0
    sys.exit(main())
