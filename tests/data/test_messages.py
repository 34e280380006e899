"""Conversations in the forms that people keep them in, as one: role and content."""

import json

import datasets
import pytest

from jmem.data.document import DataError
from jmem.data.messages import make_chat, read_chat

ASKED = {"role": "user", "content": "1+1?"}
TOLD = {"role": "assistant", "content": "2"}
CALL = {"role": "assistant", "tool_calls": [{"name": "wx", "arguments": {"x": None}}]}


def messages_of(row, column=None):
    return read_chat(row, column, "a.jsonl:1").messages


class TestForms:
    @pytest.mark.parametrize("column", [None, "conversations"])
    def test_share_gpt(self, column):
        turns = [("system", "Be brief."), ("human", "1+1?"), ("gpt", "2")]
        turns += [("observation", "ok"), ("model", "3")]
        row = {"conversations": [{"from": f, "value": v} for f, v in turns]}
        found = messages_of(row, column)
        roles = ["system", "user", "assistant", "tool", "assistant"]
        assert [m["role"] for m in found] == roles
        assert [m["content"] for m in found] == [text for _, text in turns]

    @pytest.mark.parametrize("speaker", ["function_call", "Human", 7, ["gpt"]])
    def test_a_speaker_that_is_not_known_is_named(self, speaker):
        row = {"conversations": [{"from": speaker, "value": "x"}]}
        with pytest.raises(DataError, match=r"^a\.jsonl:1: message 0 is from .*known"):
            messages_of(row)

    @pytest.mark.parametrize("column", [None, "instruction"])
    @pytest.mark.parametrize(
        "given, asked",
        [
            ({"input": "1, 2"}, "Add.\n1, 2"),
            *(({"input": ""}, "Add."), ({"input": None}, "Add."), ({}, "Add.")),
        ],
    )
    def test_alpaca(self, column, given, asked):
        found = messages_of({"instruction": "Add.", "output": "3"} | given, column)
        assert found == [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "3"},
        ]

    def test_alpacas_history_comes_before(self):
        row = {"instruction": "And 2?", "output": "3", "history": [["1+1?", "2"]]}
        row["system"] = "Be brief."
        contents = ["Be brief.", "1+1?", "2", "And 2?", "3"]
        assert [m["content"] for m in messages_of(row)] == contents

    @pytest.mark.parametrize(
        "more, message",
        [
            ({"input": 7}, "input=7 is a string"),
            ({"history": [["a"]]}, "history=.* a list of pairs"),
            ({"output": 7}, "message 1 is .* lacks a role or a content"),
        ],
    )
    def test_a_bad_row_of_alpaca_is_refused(self, more, message):
        row = {"instruction": "Add.", "output": "3"} | more
        with pytest.raises(DataError, match=rf"^a\.jsonl:1: .*{message}"):
            messages_of(row)

    def test_a_system_prompt_beside_the_messages_is_the_first_of_them(self):
        row = {"messages": [ASKED, TOLD], "system": "Be brief."}
        assert messages_of(row)[0] == {"role": "system", "content": "Be brief."}
        own = {"role": "system", "content": "Be long."}
        assert messages_of(row | {"messages": [own, ASKED, TOLD]})[0] == own
        assert messages_of(row | {"system": None}) == [ASKED, TOLD]
        with pytest.raises(DataError, match="system=7 is not a string"):
            messages_of(row | {"system": 7})

    def test_a_column_that_is_null_is_not_the_one(self):
        row = {"messages": None, "conversations": [ASKED, TOLD]}
        assert messages_of(row) == [ASKED, TOLD]

    def test_a_column_that_is_named_is_the_one(self):
        row = {"messages": [ASKED, TOLD], "chat": [ASKED, CALL]}
        assert messages_of(row, "chat")[1]["content"] == ""
        with pytest.raises(
            DataError, match=r"no column 'turns' among .*--chat messages"
        ):
            messages_of(row, "turns")


class TestMessages:
    @pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
    def test_a_call_needs_no_content(self, content):
        (_, found) = make_chat([ASKED, CALL | content], "here").messages
        assert found["content"] == ""
        assert found["tool_calls"] == CALL["tool_calls"], "JSON's null is kept"

    def test_a_null_is_absent_but_in_what_a_call_says(self):
        call = {"id": None, "name": "wx", "arguments": {"x": None}}
        chat = [ASKED, {"role": "assistant", "tool_calls": [call], "name": None}]
        (_, found) = make_chat(chat, "here").messages
        assert found.keys() == {"role", "content", "tool_calls"}
        assert found["tool_calls"] == [{"name": "wx", "arguments": {"x": None}}]

    def test_calls_may_be_json(self):
        for calls in (CALL["tool_calls"], json.dumps(CALL["tool_calls"])):
            (_, found) = make_chat([ASKED, CALL | {"tool_calls": calls}], "c").messages
            assert found["tool_calls"] == CALL["tool_calls"]

    @pytest.mark.parametrize("content", [None, "2"])
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("tool_calls", own) for own in ("wx", {"name": "wx"}, ["wx"], 7)),
            *(("function_call", own) for own in ("wx()", [CALL], 7)),
        ],
    )
    def test_what_is_no_call_is_refused(self, key, value, content):
        bad = {"role": "assistant", "content": content, key: value}
        with pytest.raises(DataError, match=rf"^c: message 1: {key}=.* is not a"):
            make_chat([ASKED, bad], "c")

    def test_depth_has_an_end(self):
        deep: list = []
        for _ in range(20_000):
            deep = [deep]
        with pytest.raises(DataError, match="message 1 is nested too deeply"):
            make_chat([ASKED, TOLD | {"x": deep}], "here")

    @pytest.mark.parametrize("calls", [None, []])
    def test_an_answer_without_a_call_needs_content(self, calls):
        bad = {"role": "assistant", "content": None, "tool_calls": calls}
        with pytest.raises(DataError, match=r"here: message 1 is .* lacks a role or a"):
            make_chat([ASKED, bad], "here")

    def test_parts_of_text_are_one_text(self):
        parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
        found = make_chat([ASKED | {"content": parts}, TOLD], "here").messages
        assert found == [ASKED, TOLD]

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "x"}},
            {"type": "text", "text": 7},
            {"text": "a"},
            "a",
        ],
    )
    def test_other_parts_are_refused_by_name(self, part):
        parts = [{"type": "text", "text": "a"}, part]
        with pytest.raises(
            DataError, match=r"message 0: a part of its content is '?\w"
        ):
            make_chat([ASKED | {"content": parts}, TOLD], "here")

    @pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
    def test_reasoning_has_every_name_that_templates_ask_for(self, name):
        (_, found) = make_chat([ASKED, TOLD | {name: "easy"}], "here").messages
        assert (found["thinking"], found["reasoning_content"]) == ("easy", "easy")

    @pytest.mark.parametrize(
        "weights, learnt",
        [
            *(
                ((None, 0, 1), [False, False, True]),
                ((0, 1, None), [False, True, True]),
            ),
            ((None, 0.0, 1.0), [False, False, True]),
        ],
    )
    def test_an_answer_of_weight_0_is_not_learnt(self, weights, learnt):
        given = [m | {"weight": w} for m, w in zip((ASKED, TOLD, TOLD), weights)]
        assert make_chat(given, "here").learnt == learnt

    @pytest.mark.parametrize("weight", [0.5, -1, 2, "1", [0], float("nan")])
    def test_other_weights_are_refused_by_name(self, weight):
        with pytest.raises(DataError, match=r"message 1, by 'assistant', has weight="):
            make_chat([ASKED, TOLD | {"weight": weight}], "here")

    def test_what_others_say_cannot_be_learnt(self):
        with pytest.raises(DataError, match=r"message 0, by 'user', has weight=1"):
            make_chat([ASKED | {"weight": 1}, TOLD], "here")

    def test_a_chat_without_anything_to_learn_is_refused(self):
        with pytest.raises(DataError, match="every answer has weight 0"):
            make_chat([ASKED, TOLD | {"weight": 0}], "here")


class TestTools:
    @pytest.mark.parametrize(
        "value, tools",
        [
            *((None, None), ("", None), ([], []), ("[]", [])),
            ([{"name": "wx"}], [{"name": "wx"}]),
            ('[{"name": "wx"}]', [{"name": "wx"}]),
        ],
    )
    def test_they_are_passed_on(self, value, tools):
        row = {"messages": [ASKED, TOLD], "tools": value}
        assert read_chat(row, None, "here").tools == tools

    @pytest.mark.parametrize("value", [7, {"name": "wx"}, ["wx"], "wx", "[" * 9999])
    def test_what_are_no_tools_is_refused(self, value):
        with pytest.raises(
            DataError, match=r"^here: tools=.* is not a list of objects"
        ):
            read_chat({"messages": [ASKED, TOLD], "tools": value}, None, "here")

    def test_columns_of_arrow_give_what_the_rows_gave(self):
        """Every object there has every key that any of them has."""
        from jmem.data import rows

        talks = [
            [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [{"a": {"x": 1}}]},
            ],
            [ASKED, TOLD | {"weight": 0}, {**TOLD, "tool_calls": [{"a": {"y": 2}}]}],
        ]
        table = datasets.Dataset.from_list([{"messages": talk} for talk in talks])
        found = rows.read_rows(table, ("messages",), strings=False)
        assert found is not None
        for (place, row), talk in zip(found, talks, strict=True):
            assert read_chat(row, None, place)[:2] == make_chat(talk, "here")[:2]
