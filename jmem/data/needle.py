"""A needle in a haystack: one made-up fact inside real text, and a question for it.

Idea     The fact stands at a chosen depth of a prompt of a chosen length, which ends
         where the answer has to follow. A model that attends to the whole prompt
         copies the answer; one whose cache lost the needle cannot guess it.
Source   Kamradt, Needle in a Haystack, 2023; numbers as needles as in RULER,
         arXiv:2404.06654.
Differs  Both score by a judge or by words in common. Here the answer is a number that
         the haystack does not hold, and must be the first thing produced.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from jmem.data.document import DataError
from jmem.data.tokens import encode_start

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = (
    *("Paris", "London", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Madrid"),
    *("Berlin", "Vienna", "Lisbon", "Athens", "Dublin", "Prague", "Warsaw", "Delhi"),
)
DIGITS = 5

_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])")
_NUMBER = re.compile(rf"(?=(\d{{{DIGITS}}}))")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wording:
    """What is hidden and what is asked: `{name}` is a city, `{number}` the answer."""

    needle: str = " The secret number of {name} is {number}."
    """Begins with the blank that parts it from the sentence before."""
    question: str = "\n\nThe secret number of {name} is"
    """The end of the prompt; the answer follows it as it does in the needle."""
    header: str = ""
    """Text before the haystack: the start of a chat template, say."""

    def __post_init__(self):
        if self.needle.count("{number}") != 1 or "{number}" in self.question:
            raise DataError(
                f"Wording: needle={self.needle!r} must say {{number}} once, and "
                f"question={self.question!r} must not give it away."
            )


@dataclasses.dataclass(frozen=True)
class NeedleCase:
    """A prompt and the answer that is in it."""

    tokens: list[int] = dataclasses.field(repr=False)
    """The whole prompt, question included: `length` of them."""
    answer: str
    answer_tokens: list[int]
    """The answer as it stands in the needle, with the blank before it."""
    span: tuple[int, int]
    """The needle is `tokens[start:end]`."""
    length: int
    depth: float
    """The depth asked for; `span` tells the nearest place between two sentences."""
    seed: int


class Haystack:
    """Text and its tokens, encoded once for any number of prompts.

    Raises:
      DataError: the text has no two sentences.
    """

    def __init__(self, tokenizer: "Tokenizer", text: str):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        self.tokenizer = tokenizer
        self.text = text
        self.numbers = set(_NUMBER.findall(text))
        self.tokens: Int32[np.ndarray, " N"] = np.array(encoding.ids, np.int32)
        # A sentence starts with the first token behind the full stop before it.
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        first = [start for start, _ in encoding.offsets]
        starts = np.unique([0, *np.searchsorted(first, ends)])
        self.starts: Int32[np.ndarray, " S"] = starts.astype(np.int32)
        if not ends:
            raise DataError(
                "Haystack: the text has no full stop with another sentence behind it, "
                "so a needle has no place. Give prose of at least two sentences."
            )


def make_needle_prompt(
    haystack: Haystack,
    *,
    length: int,
    depth: float,
    seed: int,
    wording: Wording | None = None,
) -> NeedleCase:
    """A prompt of exactly `length` tokens with a needle at `depth`.

    The seed draws where the text starts (at a sentence), the name and the number: cases
    of one seed and length differ in depth alone. Depth 0 is the front of the text and 1
    its end; the needle stands between the two sentences that are nearest. Tokens that
    the tokenizer puts before every text (a begin token) come first, and count.

    The default wording is one that SmolLM2-135M-Instruct can follow. Greedy, with the
    full cache, 5 depths x 4 seeds in `jmem.data.python_reference().training`, it
    answers 19, 20 and 19 of 20 at 512, 1,024 and 2,048 tokens: 58 of 60.
    Other ends of the prompt at 512 tokens: "Question: ... Answer: The secret number of
    {name} is" 20 of 20, and as many in SmolLM2's chat with the answer begun like that;
    "Question: ... Answer:" 15; a chat without the beginning none, as the number is then
    not what the answer starts with.

    Raises:
      DataError: a depth outside [0, 1]; a length that leaves no room for text, or is
        longer than the haystack; a negative seed; a haystack that holds every number.
    """
    wording = wording or Wording()
    if seed < 0:
        raise DataError(f"make_needle_prompt: seed={seed} is negative; need 0 or more.")
    if not 0 <= depth <= 1:
        raise DataError(
            f"make_needle_prompt: depth={depth} must lie in [0, 1], from front to end."
        )
    random = np.random.default_rng(seed)
    name = NAMES[random.integers(len(NAMES))]
    number = _draw_number(haystack.numbers, random)
    encode = haystack.tokenizer.encode
    front = encode_start(haystack.tokenizer, wording.header)
    needle, answer_tokens = _encode_needle(
        haystack.tokenizer, wording.needle, name, number
    )
    question = wording.question.replace("{name}", name)
    question = encode(question, add_special_tokens=False).ids
    room = length - len(front) - len(needle) - len(question)
    size = haystack.tokens.size
    if not 1 <= room <= size:
        rest = length - room
        raise DataError(
            f"make_needle_prompt: length={length} must lie in [{rest + 1}, "
            f"{rest + size}]: needle and question take {rest} tokens, and the "
            f"haystack has {size}."
        )
    start = random.choice(haystack.starts[haystack.starts + room <= size])
    text = haystack.tokens[start : start + room].tolist()
    inside = haystack.starts - start
    inside = inside[(inside >= 0) & (inside <= room)]
    at = int(inside[np.argmin(np.abs(inside - depth * room))])
    tokens = [*front, *text[:at], *needle, *text[at:], *question]
    first = len(front) + at
    return NeedleCase(
        tokens=tokens,
        answer=number,
        answer_tokens=answer_tokens,
        span=(first, first + len(needle)),
        length=length,
        depth=depth,
        seed=seed,
    )


def is_hit(answer: str, produced: str) -> bool:
    r"""Whether the answer is the first word produced, whole.

    >>> [is_hit("48213", said) for said in (" 48213.\n\nThe", " 482135", " 4821")]
    [True, False, False]
    """
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", produced) is not None


def _draw_number(known: set[str], random: np.random.Generator) -> str:
    """A number that the haystack does not hold, not even inside a longer number."""
    least = 10 ** (DIGITS - 1)
    drawn = map(str, random.permutation(9 * least) + least)
    number = next((number for number in drawn if number not in known), None)
    if number is None:
        raise DataError(
            f"make_needle_prompt: the haystack holds every number of {DIGITS} digits, "
            "so no answer would be new. Give text with fewer numbers."
        )
    return number


def _encode_needle(
    tokenizer: "Tokenizer", text: str, name: str, number: str
) -> tuple[list[int], list[int]]:
    """Tokens of the needle, and those of its number with the blank before it."""
    before, after = text.replace("{name}", name).split("{number}")
    encoding = tokenizer.encode(before + number + after, add_special_tokens=False)
    start, end = len(before.rstrip()), len(before + number)
    answer = [
        token
        for token, (_, last) in zip(encoding.ids, encoding.offsets)
        if start < last <= end
    ]
    return encoding.ids, answer
