"""LongBench files: rows arrive whole or one clear error does; prompts fit; scores."""

import json
import random
import re
import string

import pytest
from mutations import count, outcomes

from jmem.data.document import DataError
from jmem.data.longbench import (
    TASKS,
    cut_middle,
    encode_prompt,
    read_longbench,
)

ROW = {
    "input": "Who sat?",
    "context": "the cat sat on a mat",
    "answers": ["The cat.", "a cat"],
    "length": 9,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0f3",
}
TREC = ROW | {
    "dataset": "trec_e",
    "answers": ["City"],
    "all_classes": ["City", "Food"],
}


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def example(write):
    """`example(dataset="trec", ...)`: a row that differs from ROW in these fields."""

    def make(**fields):
        return read_longbench(write("a.jsonl", jsonl(ROW | fields)))[0]

    return make


class TestReading:
    def test_rows_arrive_whole_and_in_order(self, write):
        one = write("1.jsonl", jsonl(ROW, TREC))
        two = write("2.jsonl", "\n" + jsonl(ROW | {"input": "", "context": "{x}"}))
        first, second, third = read_longbench(one, two)
        assert (first.input, first.context) == ("Who sat?", "the cat sat on a mat")
        assert (first.answers, first.length) == (("The cat.", "a cat"), 9)
        assert (first.dataset, first.language, first.id) == ("hotpotqa", "en", "0f3")
        assert (first.all_classes, first.source) == ((), f"{one}:1")
        assert (second.dataset, second.all_classes) == ("trec", ("City", "Food"))
        assert (third.input, third.source) == ("", f"{two}:2")

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"context": " "}, ":2: column 'context' is blank"),
            ({"input": None}, ":2: column 'input' holds NoneType"),
            ({"_id": 7}, ":2: column '_id' holds int"),
            ({"dataset": "hotpot"}, ":2: dataset 'hotpot' .*did you mean 'hotpotqa'"),
            ({"dataset": "vcsum"}, ":2: dataset 'vcsum' is not scored here.*: narrat"),
            ({"answers": "a cat"}, ":2: answers='a cat' is not a list of strings"),
            ({"answers": ["a", 1]}, r":2: answers=\['a', 1\] is not a list of strings"),
            ({"answers": []}, ":2: answers is empty"),
            ({"length": "9"}, ":2: length='9' is not a whole number"),
            ({"length": True}, ":2: length=True is not a whole number"),
            ({"length": -1}, ":2: length=-1 is not a whole number"),
            ({"all_classes": "City"}, ":2: all_classes='City' is not .*or null"),
            ({"dataset": "trec"}, ":2: classification: answer='The cat.' is none of"),
            ({"dataset": "passage_retrieval_en"}, ":2: retrieval: answer='The cat.'"),
        ],
    )
    def test_bad_row_is_named(self, write, fields, message):
        path = write("a.jsonl", jsonl(ROW, ROW | fields, ROW))
        with pytest.raises(DataError, match=message) as caught:
            read_longbench(path)
        assert str(caught.value).startswith(f"{path}:2: ")

    @pytest.mark.parametrize("field", sorted(ROW.keys() - {"all_classes"}))
    def test_missing_field_is_named(self, write, field):
        row = {key: value for key, value in ROW.items() if key != field}
        with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{field}"):
            read_longbench(write("a.jsonl", jsonl(row)))

    def test_bad_files(self, write, tmp_path):
        with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
            read_longbench(write("a.jsonl", "[\n" + jsonl(ROW)))
        with pytest.raises(DataError, match="blank lines only"):
            read_longbench(write("a.jsonl", "\n\n"))
        with pytest.raises(DataError, match="no such file"):
            read_longbench(tmp_path / "gone.jsonl")
        with pytest.raises(DataError, match=r"is not \.jsonl or \.json"):
            read_longbench(write("a.txt", jsonl(ROW)))

    def test_mutated_files_are_read_or_refused(self, tmp_path):
        draw = random.Random(3)
        original = jsonl(ROW, TREC, ROW | {"context": "é🐍"}).encode()

        def mutant() -> bytes:
            content = bytearray(original)
            place, kind = draw.randrange(len(content)), draw.randrange(4)
            if kind == 0:
                content[place] = draw.choice([*b'abcdefgh1 {["', 0, 0xE9])
            elif kind == 1:
                del content[place : place + draw.randint(1, 9)]
            elif kind == 2:
                content[place:place] = draw.choice([b"\n", b'"', b"\\ud800", b"}"])
            else:
                content = content[: place + 1]
            return bytes(content)

        def read_and_score(path):
            for example in read_longbench(path):
                assert 0 <= example.score("the City 8") <= 1
                assert example.context in example.prompt()

        mutants = (mutant() for _ in range(count(300)))
        path = tmp_path / "m.jsonl"
        found = outcomes(mutants, path, read_and_score, DataError)
        assert sum(found.values()) == count(300)
        assert min(found.values()) > 20, found


class TestTasks:
    def test_the_facts(self):
        """Of the official configuration, by number of new tokens and by metric."""
        by_tokens: dict[int, set[str]] = {}
        by_metric: dict[str, set[str]] = {}
        for name, task in TASKS.items():
            metric = (
                task.metric if isinstance(task.metric, str) else task.metric.__name__
            )
            by_tokens.setdefault(task.new_tokens, set()).add(name)
            by_metric.setdefault(metric, set()).add(name)
        passages, summaries, code = (
            {"hotpotqa", "2wikimqa", "musique"},
            {"gov_report", "qmsum", "multi_news"},
            {"lcc", "repobench-p"},
        )
        numbers = {"passage_count", "passage_retrieval_en"}
        articles = {"narrativeqa", "qasper"}
        assert by_tokens == {
            32: passages | numbers | {"triviaqa"},
            64: code | {"multifieldqa_en", "trec"},
            128: articles | {"samsum"},
            512: summaries,
        }
        assert by_metric == {
            "f1": passages | articles | {"multifieldqa_en", "triviaqa"},
            "rouge_l": summaries | {"samsum"},
            "classification": {"trec"},
            "count": {"passage_count"},
            "retrieval": {"passage_retrieval_en"},
            "edit_similarity": code,
        }
        few_shot = {"trec", "triviaqa", "samsum"}
        assert {n for n, task in TASKS.items() if task.first_line} == few_shot
        assert {n for n, task in TASKS.items() if not task.chat} == few_shot | code

    @pytest.mark.parametrize("name", TASKS)
    def test_templates_place_what_the_rows_hold(self, name):
        fields = [field for _, field, _, _ in string.Formatter().parse(template(name))]
        assert fields.count("context") == 1
        without_input = {"gov_report", "multi_news", "passage_count", "lcc"}
        assert fields.count("input") == (name not in without_input)
        assert set(fields) <= {"context", "input", None}

    def test_prompt(self, example):
        prompt = example(context="{a} {input}", input="{}?").prompt()
        assert "\n\n{a} {input}\n\n" in prompt  # braces of a text are no fields
        assert prompt.endswith("Question: {}?\nAnswer:")
        assert (
            example().prompt("{input} of {context}").startswith("Who sat? of the cat")
        )

    def test_the_best_answer_counts(self, example):
        assert example().score("A CAT") == 1
        assert example().score("the cat sat") == pytest.approx(2 / 3)

    def test_only_few_shot_answers_end_with_their_line(self, example):
        fields = {"answers": ["City"], "all_classes": ["City", "Food"]}
        trec = example(dataset="trec", **fields)
        assert trec.score("\n\nCity\nType: Food") == 1
        assert example(answers=["a b"]).score("a\nb") == 1
        code = example(dataset="lcc", answers=["x = 1"])
        assert code.score("```\nx = 1\ny") == 1


def template(name: str) -> str:
    return TASKS[name].template


class TestLength:
    @pytest.mark.parametrize("limit", range(8))
    def test_both_ends_stay(self, limit):
        kept = cut_middle([*range(6)], limit)
        first, last = -(-limit // 2), limit // 2
        expected = [0, 1, 2, 3, 4, 5]
        if limit < 6:
            expected = expected[:first] + expected[6 - last :]
        assert kept == expected

    def test_prompt_fits_and_keeps_the_chat(self, example, word_tokenizer):
        encode = word_tokenizer.encode
        row = example(context="mat " * 50)
        whole = encode(row.prompt()).ids
        assert len(whole) > 70
        chat = ("sat on", "the cat")
        cut = encode_prompt(row, word_tokenizer, limit=30, chat=chat)
        assert len(cut) == 30
        assert cut == [3, 4, *cut_middle(whole, 26), 1, 2]
        assert encode_prompt(row, word_tokenizer, limit=99) == whole

    def test_text_to_be_continued_gets_no_chat(self, example, word_tokenizer):
        row = example(dataset="lcc")
        tokens = encode_prompt(row, word_tokenizer, limit=99, chat=("sat", "sat"))
        assert tokens == word_tokenizer.encode(row.prompt()).ids

    def test_no_room(self, example, word_tokenizer):
        message = re.escape("limit=4 leaves no room for a message between the 3 and 1")
        with pytest.raises(DataError, match=message):
            encode_prompt(
                example(), word_tokenizer, limit=4, chat=("the cat sat", "on")
            )
