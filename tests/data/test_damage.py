"""Damaged tokenizers, templates and chats: read, or refused by name; nothing else.

`JMEM_MUTATIONS=2000 uv run pytest -k "mutated or damaged"` takes as many of each kind.
"""

import json
import warnings

import numpy as np
import pytest
from mutations import count, damage_bytes, damage_json, damage_text, outcomes
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jmem import confined
from jmem.checkpoints import CheckpointError, CheckpointWarning
from jmem.checkpoints.tokenizer import from_json
from jmem.data.chat import ChatTemplate, read_chats, read_template
from jmem.data.document import DataError

TEMPLATE = """\
{%- set state = namespace(first=true) -%}
{{- tools | tojson if tools else '' -}}
{%- for m in messages -%}
    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{ raise_exception('unknown role ' + m.role) }}
    {%- endif -%}
<|im_start|>{{ m.role }}
{{ m.thinking or '' }}{{ m.content | trim }}
{%- for c in m.tool_calls or [] %}{{ c | tojson(indent=2) }}{% endfor %}
{{ eos_token * 2 }}{{ strftime_now('%Y') }}{% set state.first = false %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ROWS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "wx?"}]},
            {"role": "assistant", "tool_calls": [{"name": "wx"}], "weight": 0},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "21 é", "reasoning": "easy"},
        ],
        "tools": [{"name": "wx", "parameters": {"type": "object"}}],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
]


def draw(case: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([case, seed])


@pytest.fixture(autouse=True)
def few_seconds(monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 2.0)


def test_mutated_tokenizers(tmp_path, capfd):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("aa", "a"), normalizers.Prepend("b")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(alphabet))]
    )
    raw = tokenizer.to_str().encode()

    def mutants():
        for case in range(count(60)):
            random = draw(case, 1)
            if case % 3:
                yield json.dumps(damage_json(json.loads(raw), random)).encode()
            else:
                yield damage_bytes(raw, random)

    path = tmp_path / "tokenizer.json"

    def read(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            from_json(path, 260).encode("a b")

    found = outcomes(mutants(), path, read, CheckpointError)
    assert min(found.values()) > 0, found


def test_mutated_templates(tmp_path):
    def mutants():
        for case in range(count(80)):
            damage = damage_text if case % 4 else damage_bytes
            yield damage(TEMPLATE.encode(), draw(case, 2))

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')

    def read(path):
        template = read_template(path.parent)
        for row in ROWS[:1]:
            template.render(row["messages"], str(path))

    found = outcomes(mutants(), tmp_path / "chat_template.jinja", read, DataError)
    assert min(found.values()) > 0, found


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_mutated_chats(tmp_path, suffix):
    template = ChatTemplate(TEMPLATE, {"eos_token": "</s>"})

    def mutants():
        for case in range(count(60)):
            random = draw(case, 3)
            rows = [json.loads(json.dumps(row)) for row in ROWS]
            if case % 4:
                rows = [damage_json(row, random) for row in rows]
            lines = "\n".join(map(json.dumps, rows))
            text = lines if suffix == "jsonl" else f"[{lines.replace(chr(10), ',')}]"
            yield text.encode() if case % 4 else damage_text(text.encode(), random)

    def read(path):
        read_chats(path, template=template, split=True)

    found = outcomes(mutants(), tmp_path / f"a.{suffix}", read, DataError)
    assert min(found.values()) > 0, found
