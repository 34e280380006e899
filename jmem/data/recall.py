"""Made-up tokens to recall: a record by its key, or what the whole text amounts to.

Idea    One kind of text, and the question at its end decides what of it matters. "find"
        names a key, and the answer is the record that stands somewhere behind it
        (localization: a few tokens in a row matter, and all of them). "majority" asks
        for the commonest symbol and "count" for the number of markers (aggregation:
        every token matters a little). A small decoder learns both, so every answer that
        a smaller cache gets wrong is the cache's fault.
Learnt  Two blocks of width 128 answer all of 64 questions, "find" and "majority", after
        under 400 steps of 64 x `Recall(text=64, value=3)`, 150 of 32 x `text=128` and
        150 of 32 x the default, AdamW at 1e-3, 12 questions a text: 10 minutes on two
        shared cores. The order matters: of `text=120` alone "find" is not learnt in
        1,200 steps. The three have one vocabulary. "count" was not tried.
Layout  A text of symbols, with markers among them and records [key, value ...] between
        them, then questions [kind, key or 0] with their answers [value ...]; an answer
        of one token is padded with 0 to the length of a value.
Tokens  0 padding; 1, 2, 3 the three questions; 4 the marker; then symbols, numbers,
        keys and values, each its own range. Keys and values never repeat in a text, so
        one token of context is enough to go on copying.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32

from jmem.data.batch import Batch
from jmem.data.document import DataError

Kind = Literal["find", "majority", "count"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MARKER = len(KINDS) + 1
_SYMBOLS = _MARKER + 1


class Rows(NamedTuple):
    """Texts with their questions and answers; T = text + Q * (2 + value) tokens."""

    tokens: Int32[np.ndarray, "B T"]
    answered: Bool[np.ndarray, "B T"]
    """Whether a token belongs to an answer; padding of an answer does not."""
    kinds: Int32[np.ndarray, "B Q"]
    """The kind of each question, as its index in `KINDS`."""
    places: Int32[np.ndarray, "B Q"]
    """Where the value that is asked for starts in the text; -1 for other kinds."""

    @property
    def batch(self) -> Batch:
        """The rows as a batch to train on, in whose loss only answers count."""
        tokens, answered = self.tokens, self.answered[:, 1:].astype(np.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], answered)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Made-up texts and questions of certain sizes (`sample` draws them); hashable.

    Raises:
      DataError: sizes that leave no text between the records, no value for each of
        them, or no majority.
    """

    text: int = 240
    """Tokens before the first question."""
    records: int = 4
    """Records in each text."""
    value: int = 6
    """Tokens of a record's value."""
    keys: int = 16
    """How many different keys there are; likewise numbers of values and symbols."""
    values: int = 64
    symbols: int = 8
    most: int = 9
    """Most markers in a text; 0 is possible too."""
    lead: float = 0.25
    """Share of the symbols that are the commonest one; the others share evenly."""

    def __post_init__(self):
        for name in ("text", "records", "value", "keys", "values", "most"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"Recall: {name}={getattr(self, name)} must be at least 1."
                )
        if self.records > self.keys or self.records * self.value > self.values:
            raise DataError(
                f"Recall: records={self.records} of value={self.value} need as many "
                f"keys and {self.records * self.value} values, all different; "
                f"keys={self.keys} and values={self.values} are fewer. Raise them."
            )
        least = self._filler - self.most
        if self.symbols < 2 or not all(
            map(self._leads, range(least, self._filler + 1))
        ):
            raise DataError(
                f"Recall: text={self.text} with {self.records} records leaves {least} "
                f"tokens for symbols={self.symbols}, of which lead={self.lead} makes "
                "none the commonest. Raise text or lead."
            )

    def _leads(self, rest: int) -> bool:
        """Whether one symbol is the commonest if a text has `rest` symbols."""
        leading = math.floor(self.lead * rest)
        others = max(rest, 0) - leading
        return 0 < leading <= rest and leading > -(-others // (self.symbols - 1))

    @property
    def _filler(self) -> int:
        """Tokens of the text besides the records."""
        return self.text - self.records * (1 + self.value)

    @property
    def _ranges(self) -> tuple[int, int, int, int]:
        """The first ids of symbols, numbers, keys and values."""
        numbers = _SYMBOLS + self.symbols
        keys = numbers + self.most + 1
        return _SYMBOLS, numbers, keys, keys + self.keys

    @property
    def vocab_size(self) -> int:
        return self._ranges[-1] + self.values

    @property
    def prompt(self) -> int:
        """How many tokens of a row come before its first answer."""
        return self.text + 2

    def sample(
        self,
        batch_size: int,
        *,
        seed: int | Sequence[int],
        kinds: Sequence[Kind] = ("find", "majority"),
        questions: int = 1,
    ) -> Rows:
        """Rows with questions of `kinds`, each as likely; the seed draws everything.

        More questions on a text teach as much as more texts, and cost less. A seed of
        several numbers may be a purpose and a step.

        Raises:
          DataError: no rows or questions, or a kind that is none.
        """
        if batch_size < 1 or questions < 1:
            raise DataError(
                f"Recall: batch_size={batch_size} and questions={questions} must be at "
                "least 1."
            )
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise DataError(f"Recall: kinds={tuple(kinds)} are not of {KINDS}.")
        random = np.random.default_rng(seed)
        rows = np.arange(batch_size)[:, None]
        symbol, number, key, value = self._ranges

        filler, majority, markers = self._fill(random, batch_size)
        keys = key + _draw_distinct(random, batch_size, self.keys, self.records)
        values = _draw_distinct(
            random, batch_size, self.values, self.records * self.value
        )
        values = value + values.reshape(batch_size, self.records, self.value)
        # Records go to random places of the filler, which closes up behind them.
        starts = random.integers(0, self._filler + 1, (batch_size, self.records))
        starts = np.sort(starts) + np.arange(self.records) * (1 + self.value)
        within = starts[..., None] + np.arange(1 + self.value)
        text = np.zeros((batch_size, self.text), np.int64)
        free = np.ones(text.shape, bool)
        free[rows, within.reshape(batch_size, -1)] = False
        text[free] = filler.ravel()
        records = np.concatenate([keys[..., None], values], axis=-1)
        text[rows, within.reshape(batch_size, -1)] = records.reshape(batch_size, -1)

        shape = (batch_size, questions)
        asked = random.choice([KINDS.index(kind) for kind in kinds], shape)
        record = random.integers(0, self.records, shape)
        find = asked == KINDS.index("find")
        one = np.where(asked == KINDS.index("majority"), symbol + majority, 0)
        one = np.where(asked == KINDS.index("count"), number + markers, one)
        answers = np.zeros((*shape, 2 + self.value), np.int64)
        answers[..., 0] = 1 + asked
        answers[..., 1] = np.where(find, keys[rows, record], 0)
        answers[..., 2] = one
        answers[..., 2:] = np.where(
            find[..., None], values[rows, record], answers[..., 2:]
        )
        counted = np.zeros(answers.shape, bool)
        counted[..., 2:] = answers[..., 2:] > 0
        return Rows(
            tokens=_join(text, answers).astype(np.int32),
            answered=_join(np.zeros(text.shape, bool), counted),
            kinds=asked.astype(np.int32),
            places=np.where(find, starts[rows, record] + 1, -1).astype(np.int32),
        )

    def _fill(self, random: np.random.Generator, batch_size: int):
        """Filler [B, F], its majority symbol [B, 1] and number of markers [B, 1]."""
        markers = random.integers(0, self.most + 1, (batch_size, 1))
        majority = random.integers(0, self.symbols, (batch_size, 1))
        rest = self._filler - markers
        leading = np.floor(self.lead * rest)
        # The others in turn, from a random one: their numbers differ by 1 at most.
        index = np.arange(self._filler)[None]
        first = random.integers(0, self.symbols - 1, (batch_size, 1))
        others = majority + 1 + (first + index) % (self.symbols - 1)
        ordered = np.where(index < leading, majority, others % self.symbols)
        ordered = np.where(index < rest, _SYMBOLS + ordered, _MARKER)
        return random.permuted(ordered, axis=1), majority, markers

    def correct(
        self, rows: Rows, produced: Int32[np.ndarray, "B N"]
    ) -> Bool[np.ndarray, " B"]:
        """Whether what follows the first question is its answer, every token of it.

        `produced` holds at least `value` new tokens a row; those behind an answer are
        ignored.

        Raises:
          DataError: fewer.
        """
        if produced.shape != (len(rows.tokens), max(produced.shape[-1], self.value)):
            raise DataError(
                f"Recall: produced has the shape {produced.shape}; need "
                f"{len(rows.tokens)} rows of value={self.value} tokens or more."
            )
        slot = slice(self.prompt, self.prompt + self.value)
        same = rows.tokens[:, slot] == produced[:, : self.value]
        return np.all(same | ~rows.answered[:, slot], axis=1)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Batches of texts by number, to train on: `jmem.train.loop.Data`."""

    recall: Recall
    rows: int
    """Texts of a batch."""
    questions: int
    """On each of them."""
    seed: tuple[int, ...]
    kinds: tuple[Kind, ...] = ("find", "majority")

    @property
    def digest(self) -> str:
        return str(self)

    def batch(self, step: int) -> Batch:
        rows = self.recall.sample(
            self.rows,
            seed=(*self.seed, step),
            kinds=self.kinds,
            questions=self.questions,
        )
        return rows.batch


class Step(NamedTuple):
    """A part of `CURRICULUM`: what is asked in the end, made easier."""

    changes: Mapping[str, int]
    """Fields of `Recall` that differ from what is asked in the end."""
    rows: int
    """Texts of a batch."""
    updates: int


CURRICULUM = (
    Step({"text": 64, "value": 3}, 64, 350),
    Step({"text": 128}, 16, 150),
    Step({}, 16, 150),
)
"""From easy to hard: of long texts alone, to find is not learnt in 1,200 updates."""


def make_lessons(recall: Recall, *, questions: int, seed: int) -> list[Lesson]:
    """A `Lesson` for each step of `CURRICULUM`, with `questions` on each text."""
    return [
        Lesson(
            dataclasses.replace(recall, **step.changes),
            *(step.rows, questions, (seed, number)),
        )
        for number, step in enumerate(CURRICULUM)
    ]


def _draw_distinct(
    random: np.random.Generator, rows: int, size: int, count: int
) -> np.ndarray:
    """[rows, count] numbers below `size`, no two alike in a row."""
    order = np.broadcast_to(np.arange(size), (rows, size))
    return random.permuted(order, axis=1)[:, :count]


def _join(text: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return np.concatenate([text, answers.reshape(len(text), -1)], axis=1)
