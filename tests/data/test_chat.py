"""Chats: the text is the template's, the loss lies on the assistant's turns only."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jmem.data import chat
from jmem.data.chat import ChatTemplate, read_chats, read_template
from jmem.data.document import DataError
from jmem.data.tokens import tokenise
from jmem.data.windows import pack

CHATML = """\
{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TEMPLATE = ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1? <b>"},
    {"role": "assistant", "content": "Two. é"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n1+1? <b><|im_end|>\n"
    "<|im_start|>assistant\nTwo. é<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n"
)
ANSWERS = ["Two. é<|im_end|>\n", "Yes.<|im_end|>\n"]


def covered(document) -> list[str]:
    return [document["text"][start:end] for start, end in document["loss_spans"]]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    """A token a byte, four special ones, and a begin token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


class TestRender:
    def test_turns_and_spans(self):
        document = TEMPLATE.render(MESSAGES, "a.jsonl:1")
        assert document["text"] == RENDERED
        assert document["source"] == "a.jsonl:1"
        assert covered(document) == ANSWERS

    def test_header_counts_if_the_template_asks_for_no_answer(self):
        source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        document = ChatTemplate(source).render(MESSAGES[1:3])
        assert document["text"] == "user:1+1? <b>;assistant:Two. é;"
        assert covered(document) == ["assistant:Two. é;"]

    def test_json_is_not_escaped_and_tools_are_none(self):
        source = "{% for m in messages %}{{ [m.content] | tojson }}{% endfor %}"
        text = ChatTemplate("{{ tools }}" + source).render(MESSAGES[1:3])["text"]
        assert text == 'None["1+1? <b>"]["Two. é"]'

    def test_generation_blocks_and_loop_controls(self):
        source = (
            "{% for m in messages %}"
            "{% if m.role == 'system' %}{% continue %}{% endif %}"
            "{% generation %}{{ m.content }}|{% endgeneration %}{% endfor %}"
        )
        assert ChatTemplate(source).render(MESSAGES[:3])["text"] == "1+1? <b>|Two. é|"

    def test_template_may_refuse(self):
        messages = [*MESSAGES, {"role": "wizard", "content": "Abracadabra."}]
        with pytest.raises(DataError, match=r"^c:4: .*TemplateError: unknown role wiz"):
            TEMPLATE.render(messages, "c:4")

    def test_rewritten_history_is_refused(self):
        source = "{% for m in messages[-2:] %}{{ m.content }}\n{% endfor %}"
        template = ChatTemplate(source)
        assert covered(template.render(MESSAGES[1:3])) == ["Two. é\n"]
        with pytest.raises(
            DataError, match=r"^c:1: this template rewrites .* message 2"
        ):
            template.render(MESSAGES, "c:1")

    @pytest.mark.parametrize(
        "source, message",
        [
            ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
            ("{{ ''['__class__'].__base__ }}", "SecurityError"),
            ("{{ raise_exception.__globals__ }}{{ x.y }}", "UndefinedError"),
            ("{{ raise_exception.__globals__.json }}", "SecurityError"),
            ("{{ messages.append(1) }}", "SecurityError"),
            ("{% include '/etc/hostname' %}", "TypeError: no loader"),
            ("{% for i in range(1000000) %}{% endfor %}", "OverflowError: Range too"),
            ("{{ 1 / messages[9:] | length }}", "ZeroDivisionError"),
            (
                "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}"
                "{% endfor %}{% endfor %}",
                f"writes more than {chat.RENDERED_LIMIT} characters",
            ),
            ("{{ '' }}", "is blank"),
        ],
    )
    def test_programs_of_strangers_are_kept_in(self, source, message):
        with pytest.raises(DataError, match=f"^c:1: .*{re.escape(message)}"):
            ChatTemplate(source).render(MESSAGES, "c:1")

    @pytest.mark.parametrize(
        "source, message",
        [
            ("{% for %}", r"not Jinja .*TemplateSyntaxError.* Repair it"),
            ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "RecursionError"),
            (
                "é" * (chat.TEMPLATE_LIMIT // 2 + 1),
                "has 262146 bytes; .* at most 262144",
            ),
        ],
        ids=["syntax", "depth", "size"],
    )
    def test_unusable_templates_are_refused_at_once(self, source, message):
        with pytest.raises(DataError, match=message):
            ChatTemplate(source)


class TestReadTemplate:
    def test_from_the_configuration(self, tmp_path):
        config = {"chat_template": CHATML, "add_bos_token": False, "bos_token": None}
        config["eos_token"] = {"content": "<|im_end|>", "special": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert read_template(tmp_path) == TEMPLATE

    def test_default_of_several(self, tmp_path):
        several = [("tools", "no"), ("default", CHATML)]
        config = {"chat_template": [{"name": n, "template": t} for n, t in several]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert read_template(tmp_path).source == CHATML

    def test_own_file_goes_first(self, tmp_path):
        config = {"chat_template": "no", "eos_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        assert read_template(tmp_path) == TEMPLATE

    def test_none_names_both_files(self, tmp_path):
        with pytest.raises(DataError, match=r"chat_template\.jinja.*tokenizer_config"):
            read_template(tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("tokenizer_config.json", "{", r"config\.json: not valid JSON"),
            (
                "tokenizer_config.json",
                '{"chat_template": 7}',
                r"json: .* neither a str",
            ),
            ("tokenizer_config.json", '{"chat_template": []}', r"one named 'default'"),
            (
                "tokenizer_config.json",
                '{"chat_template": "", "eos_token": 7}',
                r"config\.json: eos_token=7 is not a token",
            ),
            ("chat_template.jinja", "{% if %}", r"\.jinja: .* not Jinja"),
            ("chat_template.jinja", "a\n\udcff", r"\.jinja:2: byte 0xff is not UTF-8"),
            ("chat_template.jinja", "a" * 262145, r"262145 bytes; .* at most 262144"),
        ],
        ids=["json", "type", "list", "token", "syntax", "utf8", "size"],
    )
    def test_damage_names_the_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=message):
            read_template(tmp_path)


class TestReadChats:
    def test_json_lines_and_parquet_agree(self, tmp_path):
        chats = [MESSAGES, MESSAGES[:3]]
        lines = jsonl(tmp_path / "a.jsonl", *({"messages": c, "n": 1} for c in chats))
        table = tmp_path / "a.parquet"
        pq.write_table(pa.table({"messages": chats, "n": [1, 2]}), table)
        data = read_chats(lines, table, template=TEMPLATE)
        assert data["source"][:] == [f"{p}:{i}" for p in (lines, table) for i in (1, 2)]
        assert data["text"][0] == data["text"][2] == RENDERED
        assert [covered(row) for row in data] == [ANSWERS, ANSWERS[:1]] * 2

    def test_weights_are_one_on_the_assistants_tokens(self, tmp_path, byte_tokenizer):
        path = jsonl(tmp_path / "a.jsonl", {"chat": MESSAGES[:3]}, {"chat": MESSAGES})
        data = read_chats(path, template=TEMPLATE, column="chat")
        sequences = tokenise(data, byte_tokenizer, add_special_tokens=False)
        batch = pack(sequences, seq_len=1000)
        targets, weights = batch.targets[0], batch.weights[0]
        assert set(weights.tolist()) == {0.0, 1.0}

        def decode(ids):
            return byte_tokenizer.decode(ids.tolist(), skip_special_tokens=False)

        end = "<|endoftext|>"
        counted = [ANSWERS[0], end, *ANSWERS, end]
        assert decode(targets[weights == 1]) == "".join(counted)
        shortened = RENDERED[: RENDERED.index("<|im_start|>user\nSure")]
        whole = "".join(decode(np.ma.getdata(ids)) for ids in sequences)
        assert whole == shortened + end + RENDERED + end, "no begin token was added"

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"message": []}, "no column 'messages' among .'message'.; did you mean"),
            ([], "no column 'messages' among"),
            ({"messages": "hi"}, "a list of messages, not str"),
            ({"messages": []}, "no message has the role 'assistant'"),
            ({"messages": MESSAGES[:2]}, "no message has the role 'assistant'"),
            ({"messages": [*MESSAGES, "hi"]}, "message 5 is 'hi', which"),
            ({"messages": [{"role": "user"}]}, "message 0 is .* lacks a role"),
            ({"messages": [{"role": " ", "content": "a"}]}, "message 0 is"),
            ({"messages": [{"role": "user", "content": 7}]}, "message 0 is"),
            (
                {"messages": [{"role": "assistant", "content": "\ud83d"}]},
                "the lone surrogate",
            ),
        ],
    )
    def test_bad_rows_are_named(self, tmp_path, row, message):
        path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES}, row)
        with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
            read_chats(path, template=TEMPLATE)

    def test_bad_files_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r"read_chats: no path given; .*\.parquet"):
            read_chats(template=TEMPLATE)
        (tmp_path / "a.csv").write_text("messages\nhi\n")
        with pytest.raises(
            DataError, match=r"a\.csv: is not \.jsonl, \.json or \.parquet"
        ):
            read_chats(tmp_path / "a.csv", template=TEMPLATE)
        table = tmp_path / "a.parquet"
        pq.write_table(pa.table({"messages": ["hi"]}), table)
        with pytest.raises(DataError, match=r"a\.parquet:1: a chat is a list"):
            read_chats(table, template=TEMPLATE)
