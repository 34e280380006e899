"""Chats: the text is the template's, the loss lies on the assistant's turns only."""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import tiny
from tiny_decoder import TINY, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jmem import checkpoints
from jmem.data import chat
from jmem.data.chat import ChatTemplate, read_chats, read_template
from jmem.data.document import DataError, DataWarning
from jmem.data.messages import make_chat
from jmem.data.source import TextSource
from jmem.data.tokens import encode_start, tokenise
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


EXPECTED = json.loads(
    (pathlib.Path(__file__).parent / "transformers_chats.json").read_text()
)
"""What transformers made of chats and texts; the file says how."""


@pytest.fixture(scope="module")
def worded():
    """The tokenizer of EXPECTED: bytes, four special tokens, `<s>` before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


class TestAsTransformers:
    """`apply_chat_template` and `tokenizer(text)`, text by text and id by id."""

    @pytest.mark.parametrize("case", EXPECTED["chats"], ids=lambda case: case["name"])
    def test_chats(self, case, worded):
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        template = ChatTemplate(case["template"], tokens)
        chat = make_chat(case["messages"], "here", case["tools"])
        text, *_ = template._write(chat, "here", whole=True)
        assert text == case["text"]
        row = {"text": text, "add_special_tokens": False}
        (ids,) = tokenise([row], worded, end="<|im_end|>")
        assert ids[:-1].tolist() == case["ids"]

    @pytest.mark.parametrize("case", EXPECTED["texts"], ids=lambda case: case["text"])
    def test_texts(self, case, worded):
        text = case["text"]
        bare = encode_start(worded, text, add_special_tokens=False)
        assert bare == case["bare"]
        twice = pytest.warns(DataWarning, match="spells out '<s>', and the tokenizer")
        told = twice if text.startswith("<s>") else contextlib.nullcontext()
        with told:
            assert encode_start(worded, text) == case["ids"]
        if text:
            with told:
                (ids,) = tokenise([{"text": text}] * 2, worded, end="<|im_end|>")[:1]
            assert ids[:-1].tolist() == case["ids"]


def test_a_template_is_told_the_day():
    source = "{{ strftime_now('%d %b %Y') }}:"
    source += "{% for m in messages %}{{ m.content }}{% endfor %}"
    fixed = ChatTemplate(source, today="2024-07-26").render(MESSAGES[1:3])
    assert fixed["text"].partition(":")[0] == "26 Jul 2024"
    before = datetime.date.today()
    day, _, _ = ChatTemplate(source).render(MESSAGES[1:3])["text"].partition(":")
    assert day in {f"{one:%d %b %Y}" for one in (before, datetime.date.today())}
    with pytest.raises(DataError, match=r"today='26 July' is no day .*--chat-date"):
        ChatTemplate(source, today="26 July")


DROPS_THOUGHTS = ChatTemplate(
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.thinking and loop.last %}({{ m.thinking }}){% endif %}{{ m.content }};"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
THOUGHTS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "thinking": "1"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "thinking": "2"},
]


class TestSplit:
    """A template that drops the reasoning of earlier turns."""

    def test_is_refused_unless_split(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", {"messages": THOUGHTS})
        message = r"a\.jsonl:1: .* message 1 .*\(--split-chats"
        with pytest.raises(DataError, match=message):
            read_chats(path, template=DROPS_THOUGHTS)
        data = read_chats(path, template=DROPS_THOUGHTS, split=True)
        assert data["text"][:] == [
            "user:a;assistant:(1)b;",
            "user:a;assistant:b;user:c;assistant:(2)d;",
        ]
        assert [covered(row) for row in data] == [["(1)b;"], ["(2)d;"]]

    def test_answers_of_weight_0_are_context_alone(self):
        thoughts = [THOUGHTS[0], THOUGHTS[1] | {"weight": 0}, *THOUGHTS[2:]]
        (found,) = DROPS_THOUGHTS.render_each(thoughts)
        assert covered(found) == ["(2)d;"]
        assert covered(DROPS_THOUGHTS.render(thoughts)) == ["(2)d;"]

    def test_a_prompt_that_no_answer_begins_with_is_refused(self):
        source = "{% for m in messages %}{{ m.content }}{% endfor %}"
        source += "{% if add_generation_prompt %}<think>{% endif %}"
        with pytest.raises(DataError, match=r"^here: .* writes an answer otherwise"):
            ChatTemplate(source).render_each(MESSAGES[1:3], "here")


def write_answers(answer: str, prompt: str = "<A>") -> ChatTemplate:
    """A template with so much of an answer, and such a prompt for one."""
    return ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>"
        + answer
        + "<E>{% else %}<U>{{ m.content }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )


LAST_PART = "{{ m.content.split('</think>')[-1] }}"
WITHOUT = write_answers(LAST_PART)  # as DeepSeek-R1's first one
OPENED = write_answers(LAST_PART, "<A><think>\n")  # as that of its distilled models
TRIMMED = write_answers(LAST_PART.replace("]", "].lstrip('\\n')"), "<A><think>\n")
WHOLE = write_answers("{{ m.content }}", "<A><think>\n")
KEPT = write_answers(
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip() }}",
    "<A><think>\n",
)


def answer(*contents):
    asked = {"role": "user", "content": "1+1?"}
    return [m for c in contents for m in (asked, {"role": "assistant", "content": c})]


class TestThoughts:
    """Answers that bring their reasoning, behind prompts that begin it or do not."""

    @pytest.mark.parametrize(
        ("template", "content", "learnt"),
        [
            (WITHOUT, "<think>\nx\n</think>\n\n2", "<think>\nx\n</think>\n\n2<E>"),
            *(
                (template, start + "x\n</think>\n\n2\n", "x\n</think>\n\n2" + end)
                for template, end in (
                    *((OPENED, "\n<E>"), (TRIMMED, "\n<E>"), (WHOLE, "\n<E>")),
                    (KEPT, "\n<E>"),
                )
                for start in ("<think>\n", "<think>", "")
            ),
            (OPENED, "<think>e</think>e", "e</think>e<E>"),
            (OPENED, "<think>x</think>", "x</think><E>"),
        ],
    )
    def test_an_answer_goes_on_from_its_prompt(self, template, content, learnt):
        (split,) = template.render_each(answer(content))
        for found in (template.render(answer(content)), split):
            prompt = "<U>1+1?<A>" + "<think>\n" * (template is not WITHOUT)
            assert found["text"] == prompt + learnt
            assert covered(found) == [learnt]

    def test_earlier_ones_are_as_the_template_has_them(self):
        talk = answer("<think>\nx\n</think>2", "<think>\ny\n</think>3")
        for template in (WITHOUT, OPENED):
            with pytest.raises(DataError, match=r"^c: .* message 1 .*--split-chats"):
                template.render(talk, "c")
        first, second = OPENED.render_each(talk)
        assert covered(first) == ["x\n</think>2<E>"]
        assert second["text"] == "<U>1+1?<A>2<E><U>1+1?<A><think>\ny\n</think>3<E>"
        talk[1] |= {"weight": 0}
        assert OPENED.render(talk) == second | {"source": "messages"}

    @pytest.mark.parametrize("more", [{}, {"reasoning_content": "x"}])
    def test_one_without_is_refused_with_a_way_out(self, more):
        (asked, told) = answer("2")
        for render in (OPENED.render, OPENED.render_each):
            with pytest.raises(
                DataError, match=r"^c: message 1: .*<think>, .*<think>\.\.\.</think>"
            ):
                render([asked, told | more], "c")


class TestLeftOut:
    """What a template does not write can't be learnt, and is refused by its name."""

    CALL = {"name": "wx", "arguments": {"city": "Rome"}}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("answer", "message", "words"),
        [
            (
                "{{ m.content[:9] }}",
                {"content": "one, two, three"},
                "'three' of its con",
            ),
            (
                "{{ m.content }}",
                {"thinking": "easy"},
                "'easy' of its reasoning_content",
            ),
            ("{{ m.content }}", {"tool_calls": [CALL]}, "'wx' of its tool_calls"),
            (
                "{{ m.tool_calls[0].function.name }}",
                {"content": "", "tool_calls": [{"function": CALL}]},
                "'city' of its tool_calls",
            ),
            ("{{ m.content }}", {"function_call": CALL}, "'wx' of its function_call"),
            (
                "{{ m.tool_calls }}",  # as llama 3.1 does
                {"content": "Let me see.", "tool_calls": [CALL]},
                "'Let' of its content",
            ),
        ],
    )
    def test_of_an_answer(self, answer, message, words):
        asked, told = {"role": "user", "content": "?"}, {"role": "assistant"}
        talk = [asked, told | {"content": "b"} | message]
        template = write_answers(answer)
        for render in (template.render, template.render_each):
            with pytest.raises(DataError, match=rf"^c: .* leaves out .* 1 .*({words})"):
                render(talk, "c")

    @pytest.mark.parametrize("filter", ["", "| tojson", "| tojson(ensure_ascii=True)"])
    def test_nothing_is_where_it_is_only_written_otherwise(self, filter):
        template = write_answers(
            f"{{{{ m.content {filter} }}}}{{{{ m.tool_calls | tojson }}}}"
        )
        told = {"content": 'é "b"\n  日本', "tool_calls": [self.CALL]}
        talk = [MESSAGES[1], {"role": "assistant"} | told]
        assert covered(template.render(talk))[0].endswith("<E>")

    @pytest.mark.parametrize("tool", [{"name": "wx"}, {"function": {"name": "wx"}}])
    def test_of_the_tools(self, tool):
        with pytest.raises(
            DataError, match=r"^c: .* nothing of the tool 'wx'.*'tools'"
        ):
            TEMPLATE.render(MESSAGES, "c", [tool])
        template = ChatTemplate("{{ tools | tojson }}" + CHATML, TEMPLATE.tokens)
        assert template.render(MESSAGES, "c", [tool])["text"].startswith('[{"')


@pytest.mark.parametrize(
    "prompt", ["{{ messages[0].role }}<A>", "{% if not messages %}?{% endif %}<A>"]
)
def test_a_chat_that_begins_with_an_answer_says_how_it_may(prompt):
    template, talk = write_answers("{{ m.content }}", prompt), answer("a", "b")[1:]
    for render in (template.render, template.render_each):
        with pytest.raises(DataError, match=r'Message 0 is .* nobody .*"weight": 0'):
            render(talk)


def test_a_rows_own_values_for_the_template(tmp_path):
    template = write_answers("{{ m.content }}{% if not mood %}!{% endif %}")
    rows = [
        {"messages": MESSAGES[1:3], "chat_template_kwargs": own}
        for own in (None, {"mood": True})
    ]
    lines = jsonl(tmp_path / "a.jsonl", *rows)
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    for path in (lines, table):
        texts = read_chats(path, template=template)["text"]
        assert [text.count("!") for text in texts] == [1, 0]
    bad = jsonl(tmp_path / "b.jsonl", rows[0] | {"chat_template_kwargs": [1]})
    with pytest.raises(DataError, match=r"b\.jsonl:1: chat_template_kwargs=\[1\] is"):
        read_chats(bad, template=template)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_table_without_a_column_of_chats_says_which_it_has(kind, tmp_path):
    place = tmp_path / f"a.{kind}"
    rows = datasets.Dataset.from_list([{"dialog": MESSAGES, "id": 1}])
    if kind == "folder":
        rows.save_to_disk(place)
    else:
        pq.write_table(rows.data.table, place)
    with pytest.raises(DataError, match=r":1: no column 'messages' among \['dialog'"):
        read_chats(place, template=TEMPLATE)


def test_a_template_that_leaves_out_what_is_said_is_refused():
    """One for contents in parts finds none in a text."""
    source = "{% for m in messages %}{{ m.role }}:"
    source += "{% for part in m.content if part.type == 'text' %}{{ part.text }}"
    template = ChatTemplate(source + "{% endfor %};{% endfor %}")
    for render in (template.render, template.render_each):
        with pytest.raises(DataError, match=r"^here: .* leaves out what message 1 "):
            render(MESSAGES[1:3], "here")


def write_gguf(path, template: str | None = CHATML):
    """A GGUF of a byte-level tokenizer, with the metadata that chats need."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<|im_start|>", "<|im_end|>"]
    config = dataclasses.replace(TINY, vocab_size=len(tokens))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(alphabet) + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": template,
    }
    tokens.insert(len(alphabet), "ab")
    metadata["tokenizer.ggml.token_type"].insert(0, 1)
    metadata["tokenizer.ggml.eos_token_id"] += 1
    config = dataclasses.replace(config, vocab_size=len(tokens))
    return tiny.write_gguf(path, config, random_params(config), metadata=metadata)


class TestGguf:
    def test_its_own_template_serves_and_is_exported(self, tmp_path):
        path = write_gguf(tmp_path / "m.gguf")
        assert read_template(path) == TEMPLATE
        checkpoint = checkpoints.load(path)
        assert read_template(checkpoint, "2024-07-26").today == "2024-07-26"
        rows = jsonl(tmp_path / "a.jsonl", *[{"messages": MESSAGES}] * 3)
        source = TextSource(data=str(rows), chat="messages")
        training, held_out = source.sequences(checkpoint, 10)
        assert len(training) == 2
        assert len(held_out) == 1
        decode = checkpoint.require_tokenizer().decode
        found = decode(np.ma.getdata(training[0]).tolist(), skip_special_tokens=False)
        assert found == RENDERED, "closed by its last <|im_end|>, and by no second one"
        masked = np.ma.asarray(training[0])
        learnt = decode(masked.compressed().tolist(), skip_special_tokens=False)
        assert learnt == "".join(ANSWERS)

    def test_files_beside_one_without_serve_too(self, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", template=None)
        with pytest.raises(DataError, match=r"m\.gguf: no chat template"):
            read_template(path)
        config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert read_template(path) == TEMPLATE

    def test_the_default_models_own(self, tmp_path, smollm2):
        rows = jsonl(tmp_path / "a.jsonl", *[{"messages": MESSAGES}] * 3)
        source = TextSource(data=str(rows), chat="messages")
        training, _ = source.sequences(smollm2, 10)
        ids = np.ma.getdata(training[0]).tolist()
        text = smollm2.tokenizer.decode(ids, skip_special_tokens=False)
        assert text == RENDERED + "<|endoftext|>"


class TestSources:
    """Every place that a conversation may come from gives the same documents."""

    @pytest.fixture
    def talks(self):
        return [{"messages": MESSAGES, "tools": None}, {"messages": MESSAGES[:3]}]

    @pytest.mark.parametrize(
        "kind", ["jsonl", "json", "parquet", "folder", "dataset", "share gpt"]
    )
    def test_they_agree(self, kind, talks, tmp_path):
        place = tmp_path / f"a.{kind}"
        given = place
        match kind:
            case "jsonl":
                jsonl(place, *talks)
            case "json":
                place.write_text(json.dumps(talks, indent=1))
            case "parquet":
                pq.write_table(pa.Table.from_pylist(talks), place)
            case "folder":
                datasets.Dataset.from_list(talks).save_to_disk(place)
            case "dataset":
                given = datasets.Dataset.from_list(talks)
            case "share gpt":
                names = {"system": "system", "user": "human", "assistant": "gpt"}
                given = datasets.Dataset.from_list(
                    [
                        {
                            "conversations": [
                                {"from": names[m["role"]], "value": m["content"]}
                                for m in talk["messages"]
                            ]
                        }
                        for talk in talks
                    ]
                )
        data = read_chats(given, template=TEMPLATE)
        expected = [TEMPLATE.render(talk["messages"]) for talk in talks]
        assert data["text"][:] == [one["text"] for one in expected]
        assert [covered(row) for row in data] == [covered(one) for one in expected]
        assert not any(data["add_special_tokens"])

    def test_a_begin_token_is_not_put_before_a_chat(self, byte_tokenizer, tmp_path):
        data = read_chats(
            jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES}), template=TEMPLATE
        )
        (ids,) = tokenise(data, byte_tokenizer)
        assert byte_tokenizer.token_to_id("<s>") not in ids.tolist()

    def test_bad_rows_are_left_out_and_counted(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES})
        with open(path, "a") as file:
            file.write('{"messages": [}\n{"messages": []}\n')
            file.write(json.dumps({"messages": MESSAGES[:3]}) + "\n")
        with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
            read_chats(path, template=TEMPLATE)
        message = r"^2 of 4 rows left out\. The first: .*a\.jsonl:2: not JSON"
        with pytest.warns(DataWarning, match=message):
            data = read_chats(path, template=TEMPLATE, skip_bad_rows=True)
        assert data["source"][:] == [f"{path}:1", f"{path}:4"]
        bad = jsonl(tmp_path / "b.jsonl", {"messages": []}, {"messages": 7})
        with pytest.raises(DataError, match=r"b\.jsonl:1: no message has the role"):
            read_chats(bad, template=TEMPLATE, skip_bad_rows=True)
