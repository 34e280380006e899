"""LongBench's tasks: files by path, prompts, lengths of answers, scores.

Source  Bai et al., LongBench, 2023, arXiv:2308.14508: the fields of its files, which
        metric and how many new tokens belong to which data set, which prompts it wraps
        as a chat, and that long prompts lose their middle.
Differs The instructions say the same in words of our own, so scores lie near published
        ones without being comparable to the last point; `Task.template` is a field.
        Only the 14 English and the 2 code sets: the 5 Chinese ones need a segmenter.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jmem.data import answers, rows
from jmem.data.document import DataError, read_text, suggest_nearest
from jmem.data.text import check_files, read_all
from jmem.data.tokens import encode_start

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Family = Literal["document", "documents", "summary", "few-shot", "synthetic", "code"]
Metric = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What LongBench does with one of its data sets."""

    family: Family
    """Questions on one or several documents, summaries, and so on."""
    metric: Metric | Literal["classification"]
    """A function of `jmem.data.answers`; "classification" also needs the classes."""
    new_tokens: int
    """Most tokens that an answer may have."""
    template: str
    """With `{context}`, and `{input}` unless the row's input is always empty."""

    @property
    def chat(self) -> bool:
        """Whether the prompt goes to a chat model as a user's message.

        Text to be continued (examples, code) does not.
        """
        return self.family not in ("few-shot", "code")

    @property
    def first_line(self) -> bool:
        """Whether an answer ends with its first line: more examples often follow."""
        return self.family == "few-shot"


_BRIEFLY = "Answer in a few words and explain nothing."
_PASSAGES = (
    f"Use the passages to answer the question that follows them. {_BRIEFLY}\n\n"
    f"{{context}}\n\nUse the passages above. {_BRIEFLY}\n\n"
    "Question: {input}\nAnswer:"
)
_ARTICLE = (
    "Say 'unanswerable' if the article does not tell, and yes or no if that is asked. "
    + _BRIEFLY
)
_NEXT_LINE = "Write the line of code that comes next.\n{context}%sThe next line:\n"

_document = functools.partial(Task, family="document", metric=answers.f1)
_summary = functools.partial(
    Task, family="summary", metric=answers.rouge_l, new_tokens=512
)
_code = functools.partial(
    Task, family="code", metric=answers.edit_similarity, new_tokens=64
)

TASKS: Mapping[str, Task] = {
    "narrativeqa": _document(
        new_tokens=128,
        template=f"Read the story, then answer the question on it. {_BRIEFLY}\n\n"
        f"Story: {{context}}\n\nAnswer this question on the story. {_BRIEFLY}\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "qasper": _document(
        new_tokens=128,
        template=f"Read the article, then answer the question on it. {_ARTICLE}\n\n"
        f"Article: {{context}}\n\nAnswer this question on the article. {_ARTICLE}\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": _document(
        new_tokens=64,
        template="Here is a text, and after it a question.\n\n{context}\n\n"
        f"Answer the question from the text above. {_BRIEFLY}\n\n"
        "Question: {input}\nAnswer:",
    ),
    **dict.fromkeys(
        ("hotpotqa", "2wikimqa", "musique"),
        Task(family="documents", metric=answers.f1, new_tokens=32, template=_PASSAGES),
    ),
    "gov_report": _summary(
        template="Summarise this government report on one page.\n\nReport:\n{context}"
        "\n\nNow summarise the report on one page.\n\nSummary:",
    ),
    "qmsum": _summary(
        template="Read the transcript of a meeting, then answer the request about it "
        "in a sentence or a few.\n\nTranscript:\n{context}\n\n"
        "Answer this request about the meeting in a sentence or a few.\n\n"
        "Request: {input}\nAnswer:",
    ),
    "multi_news": _summary(
        template="Summarise these news articles together on one page.\n\n"
        "News:\n{context}\n\nNow summarise all of the news on one page.\n\nSummary:",
    ),
    "trec": Task(
        family="few-shot",
        metric="classification",
        new_tokens=64,
        template="Name the type of the last question, as in the examples."
        "\n\n{context}\n{input}",
    ),
    "triviaqa": Task(
        family="few-shot",
        metric=answers.f1,
        new_tokens=32,
        template="Answer the last question from its passage, as in the examples. "
        f"{_BRIEFLY}\n\n{{context}}\n\n{{input}}",
    ),
    "samsum": Task(
        family="few-shot",
        metric=answers.rouge_l,
        new_tokens=128,
        template="Summarise the last dialogue briefly, as in the examples."
        "\n\n{context}\n\n{input}",
    ),
    "passage_count": Task(
        family="synthetic",
        metric=answers.count,
        new_tokens=32,
        template="Some of the paragraphs below are there more than once. Count the "
        "different ones.\n\n{context}\n\nHow many different paragraphs are there, each "
        "counted once? Give the number only.\n\nThe number is: ",
    ),
    "passage_retrieval_en": Task(
        family="synthetic",
        metric=answers.retrieval,
        new_tokens=32,
        template="Below are 30 numbered paragraphs and the summary of one of them. "
        "Find which.\n\n{context}\n\nSummary:\n\n{input}\n\nOf which paragraph is that "
        "the summary? Answer in the form 'Paragraph 1'.\n\nThe answer is: ",
    ),
    "lcc": _code(template=_NEXT_LINE % ""),
    "repobench-p": _code(template=_NEXT_LINE % "{input}"),
}
"""The 16 data sets by the name in a row's `dataset`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a file."""

    input: str
    """The question, if there is one."""
    context: str = dataclasses.field(repr=False)
    answers: tuple[str, ...]
    """Any of them is right."""
    length: int
    """Words of input, context and answers, as the file states."""
    dataset: str
    """A name in `TASKS`."""
    language: str
    all_classes: tuple[str, ...]
    """Names of the classes of a classification; empty otherwise."""
    id: str
    source: str
    """`path:line`."""

    @property
    def task(self) -> Task:
        return TASKS[self.dataset]

    def prompt(self, template: str | None = None) -> str:
        """The task's template, or another, with input and context put in."""
        template = template or self.task.template
        return template.format(context=self.context, input=self.input)

    def score(self, produced: str) -> float:
        """From 0 to 1: the task's metric for the answer that fits best."""
        if self.task.first_line:
            produced = produced.lstrip("\n").split("\n")[0]
        return max(self._score(produced, answer) for answer in self.answers)

    def _score(self, produced: str, answer: str) -> float:
        if self.task.metric == "classification":
            return answers.classification(produced, answer, self.all_classes)
        return self.task.metric(produced, answer)


def read_longbench(*paths: str | os.PathLike[str]) -> list[Example]:
    """All rows of files in LongBench's format, one JSON object a line, in order.

    A row is an object with the strings `context`, `input` (may be empty), `dataset`,
    `language` and `_id`, the list of strings `answers`, the number `length`, and
    `all_classes`, a list of strings or null. Of the sets of even lengths, LongBench-E,
    "qasper_e" is read as "qasper".

    Raises:
      DataError: a file that is missing, empty, of another kind or not UTF-8; a line
        that is not such a row, is of a data set that is not scored here, or whose
        answers do not fit its metric. The message starts with `path:line`.
    """

    def examples(path: Path) -> Iterator[Example]:
        return (_parse_example(row, place) for place, row in rows.read_json_lines(path))

    files = check_files("read_longbench", paths, (".jsonl", ".json"))
    return read_all(files, examples, "blank lines only")


def cut_middle(tokens: list[int], limit: int) -> list[int]:
    """At most `limit` tokens: the first half of them and the last, without the middle.

    Instructions stand at both ends of a prompt, and its middle is missed least.

    >>> cut_middle([1, 2, 3, 4, 5, 6], 4), cut_middle([1, 2, 3], 4)
    ([1, 2, 5, 6], [1, 2, 3])
    """
    if limit < 0:
        raise DataError(f"cut_middle: limit={limit} must be 0 or more.")
    if len(tokens) <= limit:
        return tokens
    last = limit // 2
    return tokens[: limit - last] + tokens[len(tokens) - last :]


def encode_prompt(
    example: Example,
    tokenizer: "Tokenizer",
    *,
    limit: int,
    chat: tuple[str, str] = ("", ""),
) -> list[int]:
    """The prompt of an example as at most `limit` tokens, all told.

    `chat` is what a chat model's template writes before and after a user's message; it
    is left out where the task is text to be continued, and never cut. (The official
    code cuts the message to its limit and adds the template after that.)

    Raises:
      DataError: the limit leaves no room for a message.
    """
    before, after = chat if example.task.chat else ("", "")
    front = encode_start(tokenizer, before)
    back = tokenizer.encode(after, add_special_tokens=False).ids
    message = tokenizer.encode(example.prompt(), add_special_tokens=False).ids
    room = limit - len(front) - len(back)
    if room < 1:
        raise DataError(
            f"encode_prompt: limit={limit} leaves no room for a message between the "
            f"{len(front)} and {len(back)} tokens of chat={chat!r}. Raise limit."
        )
    return front + cut_middle(message, room) + back


def _parse_example(row: Any, place: str) -> Example:
    names = ("context", "input", "dataset", "language", "_id")
    texts = {
        name: read_text(row, name, place, blank=name in ("input", "language"))
        for name in names
    }
    dataset = texts["dataset"].removesuffix("_e")
    if dataset not in TASKS:
        raise DataError(
            f"{place}: dataset {texts['dataset']!r} is not scored here"
            f"{suggest_nearest(dataset, TASKS)}. Those that are: {', '.join(TASKS)}."
        )
    length = row.get("length")
    if type(length) is not int or length < 0:
        raise DataError(
            f"{place}: length={length!r:.80} is not a whole number from 0 on. It tells "
            "the words of the row."
        )
    identifier = texts.pop("_id")
    example = Example(
        **(texts | {"dataset": dataset, "id": identifier}),
        answers=_parse_strings(row, "answers", place),
        length=length,
        all_classes=_parse_strings(row, "all_classes", place, null=True),
        source=place,
    )
    if not example.answers:
        raise DataError(f"{place}: answers is empty, so nothing can be scored.")
    try:
        example.score("")
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    return example


def _parse_strings(
    row: Mapping[str, Any], name: str, place: str, *, null: bool = False
) -> tuple[str, ...]:
    values = row.get(name)
    if values is None and null:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(
            f"{place}: {name}={values!r:.80} is not a list of strings"
            f"{' (or null)' if null else ''}."
        )
    return tuple(values)
