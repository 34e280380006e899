"""Needle prompts: exact lengths, sentences kept whole, the text as it was."""

import itertools
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jmem.data.builtin import python_reference
from jmem.data.document import DataError
from jmem.data.needle import NAMES, Haystack, Wording, is_hit, make_needle_prompt

END = re.compile(r"[.!?](?=\s+[A-Z])")


def byte_tokenizer(*merges: tuple[str, str]) -> tokenizers.Tokenizer:
    """One token a byte, apart from the merges (in the alphabet of ByteLevel)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [*merges])
    )
    # Characters on their own are encoded fast; a merge needs them together.
    apart = (
        []
        if merges
        else [pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")]
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*apart, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    text = "\n".join(document["text"] for document in python_reference().held_out)
    return Haystack(byte_tokenizer(), text)


def pieces(haystack: Haystack, case) -> tuple[str, str, str]:
    """Text before the needle, the needle, and all behind it."""
    decode = haystack.tokenizer.decode
    start, end = case.span
    tokens = case.tokens
    return decode(tokens[:start]), decode(tokens[start:end]), decode(tokens[end:])


DEPTHS = (0, 0.1, 0.5, 0.9, 1)


@pytest.mark.parametrize("length", [150, 1000, 9000])
class TestPrompt:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_is_the_text_with_a_needle_and_a_question(self, haystack, length, depth):
        case = make_needle_prompt(haystack, length=length, depth=depth, seed=3)
        before, needle, after = pieces(haystack, case)
        assert len(case.tokens) == case.length == length
        name = next(name for name in NAMES if f" of {name} is" in needle)
        assert needle == f" The secret number of {name} is {case.answer}."
        question = f"\n\nThe secret number of {name} is"
        assert after.endswith(question)
        text = before + after.removesuffix(question)
        assert text in haystack.text
        assert haystack.tokenizer.decode(case.answer_tokens) == f" {case.answer}"
        assert case.answer not in haystack.text

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_it_stands_at_the_nearest_end_of_a_sentence(self, haystack, length, depth):
        case = make_needle_prompt(haystack, length=length, depth=depth, seed=4)
        before, _, after = pieces(haystack, case)
        text = (before + after).rpartition("\n\n")[0]
        ends = [0, *(match.end() for match in END.finditer(text))]
        distance = [abs(end - depth * len(text)) for end in ends]
        assert ends[distance.index(min(distance))] == len(before)

    def test_a_seed_fixes_all_but_the_depth(self, haystack, length):
        cases = [
            make_needle_prompt(haystack, length=length, depth=depth, seed=5)
            for depth in DEPTHS
        ]
        assert cases[2] == make_needle_prompt(
            haystack, length=length, depth=0.5, seed=5
        )
        parts = [pieces(haystack, case) for case in cases]
        assert len({before + after for before, _, after in parts}) == 1
        assert len({needle for _, needle, _ in parts}) == 1
        starts = [case.span[0] for case in cases]
        assert starts == sorted(starts)
        assert starts[0] == 0

    def test_seeds_differ(self, haystack, length):
        cases = [
            make_needle_prompt(haystack, length=length, depth=0.5, seed=seed)
            for seed in range(4)
        ]
        assert len({case.answer for case in cases}) == 4
        assert len({tuple(case.tokens[:40]) for case in cases}) == 4


class TestTokenizers:
    def test_full_stops_within_a_token(self):
        """Llama 3's tokens for a full stop hold the line ends behind it."""
        tokenizer = byte_tokenizer((".", "Ċ"), ("Ġ", "T"))
        haystack = Haystack(tokenizer, "One ends.\nTwo is here. Three. " * 20)
        case = make_needle_prompt(haystack, length=200, depth=0, seed=0)
        before, needle, after = pieces(haystack, case)
        assert before == ""
        assert needle.endswith(f"{case.answer}.")
        assert after.startswith(("Two is", " Three.", " One ends"))

    def test_begin_tokens_and_a_header_come_first(self):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens(["<s>"])
        begin = tokenizer.encode("<s>").ids[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", begin)]
        )
        haystack = Haystack(tokenizer, "One is. Two is. " * 30)
        wording = Wording(header="user: ")
        case = make_needle_prompt(
            haystack, length=150, depth=0, seed=0, wording=wording
        )
        assert len(case.tokens) == 150
        assert case.tokens[0] == begin
        assert case.tokens.count(begin) == 1
        assert haystack.tokenizer.decode(case.tokens[1:7]) == "user: "
        assert case.span[0] == 7

    def test_answers_are_numbers_that_the_text_lacks(self):
        numbers = [str(number) for number in range(10_000, 100_000)]
        text = "One. Two. " + " ".join(n for n in numbers if n != "48213")
        haystack = Haystack(byte_tokenizer(), text)
        case = make_needle_prompt(haystack, length=90, depth=0, seed=0)
        assert case.answer == "48213"
        haystack = Haystack(byte_tokenizer(), text + " 48213")
        with pytest.raises(DataError, match="holds every number of 5 digits"):
            make_needle_prompt(haystack, length=90, depth=1, seed=0)


class TestRefusals:
    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"depth": 1.01}, r"depth=1\.01 must lie in \[0, 1\]"),
            ({"depth": float("nan")}, r"depth=nan must lie in"),
            ({"seed": -1}, "seed=-1 is negative"),
            ({"length": 40}, r"length=40 must lie in \[\d+, \d+\]"),
            ({"length": 10**6}, r"length=1000000 must lie in"),
        ],
    )
    def test_arguments(self, haystack, changed, message):
        with pytest.raises(DataError, match=message):
            make_needle_prompt(
                haystack, **({"length": 500, "depth": 0, "seed": 0} | changed)
            )

    def test_the_bounds_it_names_are_possible(self, haystack):
        def attempt(length):
            return make_needle_prompt(haystack, length=length, depth=0.5, seed=0)

        with pytest.raises(DataError) as caught:
            attempt(1)
        least, longest = map(int, re.findall(r"\[(\d+), (\d+)\]", str(caught.value))[0])
        assert len(attempt(least).tokens) == least
        assert len(attempt(longest).tokens) == longest
        for length in (least - 1, longest + 1):
            with pytest.raises(DataError, match="must lie in"):
                attempt(length)

    def test_text_without_sentences(self):
        with pytest.raises(DataError, match="no full stop with another sentence"):
            Haystack(byte_tokenizer(), "only one sentence. and no other")

    @pytest.mark.parametrize(
        "wording",
        [
            {"needle": " It is."},
            {"needle": "{number} {number}"},
            {"question": "{number}"},
        ],
    )
    def test_wording(self, wording):
        with pytest.raises(DataError, match=r"must say \{number\} once"):
            Wording(**wording)


@pytest.mark.parametrize(
    "produced, expected",
    [
        (" 48213.", True),
        ("48213", True),
        ("\n48213\n", True),
        (" 482135", False),
        (" 4821", False),
        (" is 48213", False),
        ("48213a", False),
        ("", False),
    ],
)
def test_hit(produced, expected):
    assert is_hit("48213", produced) is expected


def test_every_name_is_one_word_of_its_own():
    assert len(set(NAMES)) == len(NAMES)
    for one, other in itertools.permutations(NAMES, 2):
        assert one not in other
