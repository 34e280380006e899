"""Prompts of LongBench's kinds around real text, in many wordings.

What    For each data set of `jmem.data.longbench`: a context in the form the data set
        has (a document, numbered passages, a meeting, solved examples, code), its
        input, and instructions before and after it. Nothing is answered: they serve to
        tell kinds of prompts apart.
Text    Python's reference (`jmem.data.builtin`) and the sources of its library, with
        the same documents held out.
Honest  Questions and dialogues are words of those documents in fixed forms: they look
        like what they stand for and mean nothing.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jmem.data.builtin import HELD_OUT_MODULES, python_reference, read_source
from jmem.data.document import DataError, Document
from jmem.data.longbench import TASKS

_CODE_MODULES = (
    *("argparse", "calendar", "configparser", "difflib", "shutil", "statistics"),
    *("tarfile", "threading", "typing", "weakref"),
)

_QUESTION = (
    "Question: {input}\nAnswer:",
    "Q: {input}\nA:",
    "{input}",
    "Now tell me: {input}",
    "Given the above, {input} Reply with a short phrase.\nAnswer:",
    "Answer the following question using the information above.\n\n{input}\n\nAnswer:",
)
_BEFORE: Mapping[str, tuple[str, ...]] = {
    "narrativeqa": (
        "Below is a novel or a film script. A question follows it.\n\n",
        "I will show you a tale and ask you something about it.\n\nTale:\n",
        "You will read a book. Reply to the question with a short phrase.\n\n",
        "",
    ),
    "qasper": (
        "Here is a research paper. Reply to a question about it, as briefly as "
        "possible, or say that it cannot be answered.\n\nPaper: ",
        "Consider this scientific text and respond to the query below it.\n\n",
        "Paper:\n",
        "",
    ),
    "multifieldqa_en": (
        "Please read this and respond shortly.\n\n",
        "Document:\n",
        "Use the document to answer the question at the end.\n\n",
        "",
    ),
    "passages": (
        "Several passages are given. Find what the question asks for.\n\n",
        "These documents were retrieved for a question. Give the answer only.\n\n",
        "Write a high-quality answer to the question with the search results.\n\n",
        "",
    ),
    "gov_report": (
        "You get a report of an agency. Sum it up.\n\nReport:\n",
        "Write an executive summary of the following document.\n\n",
        "Condense this text into a few paragraphs.\n\n",
        "",
    ),
    "qmsum": (
        "Here are a meeting's minutes. You will be asked to sum up a part.\n\n",
        "Meeting transcript:\n",
        "The following people met and talked. Respond to the query about it.\n\n",
        "",
    ),
    "multi_news": (
        "Several articles report on one event. Sum them up together.\n\n",
        "Read all the news below and write a digest.\n\n",
        "Articles:\n",
        "",
    ),
    "trec": (
        "Classify the question at the end. Examples come first.\n\n",
        "Label each question with its category.\n\n",
        "What kind of question is it? Follow these demonstrations.\n\n",
        "",
    ),
    "triviaqa": (
        "Here are examples of passages with questions and answers. Complete the "
        "last one.\n\n",
        "Follow the pattern of the examples.\n\n",
        "Continue the list of solved exercises.\n\n",
        "",
    ),
    "samsum": (
        "Examples of conversations with their summaries. Complete the last.\n\n",
        "Sum up each chat in a sentence or two, like these examples.\n\n",
        "Conversations and what was said in them:\n\n",
        "",
    ),
    "passage_count": (
        "Some of these paragraphs are duplicates. Tell how many remain without "
        "them.\n\n",
        "How many unique paragraphs are in this list?\n\n",
        "Count distinct passages.\n\n",
    ),
    "passage_retrieval_en": (
        "You see paragraphs and an abstract. Which one does it describe?\n\n",
        "Match the abstract to its source among these paragraphs.\n\n",
        "Paragraphs with numbers:\n\n",
    ),
    "code": (
        "Complete this code.\n",
        "Continue the program below.\n",
        "You are a code completion engine. Predict what follows.\n\n",
        "",
    ),
}
_AFTER: Mapping[str, tuple[str, ...]] = {
    "narrativeqa": _QUESTION,
    "qasper": (
        *_QUESTION,
        "If the paper does not say, reply so.\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_en": (
        *_QUESTION,
        "Only the answer, nothing else. Question: {input}\nAnswer:",
    ),
    "passages": (*_QUESTION, "Combine the documents to answer: {input}\nAnswer:"),
    "gov_report": (
        "Write the summary now.\n\nSummary:",
        "TL;DR:",
        "Give an overview of the main points of the report above.",
        "Summarize the text above in about 400 words.",
    ),
    "qmsum": (
        "Query: {input}\nSummary:",
        "Given the meeting above, respond in some sentences: {input}",
        "Sum up what was said. Query: {input}\nAnswer:",
        "From the discussion: {input}",
    ),
    "multi_news": (
        "Write one summary of all articles.\n\nSummary:",
        "Digest of the news above:",
        "What is the gist of these articles? Write a page.",
        "Summarize the articles above.",
    ),
    "trec": ("{input}",),
    "triviaqa": ("{input}",),
    "samsum": ("{input}",),
    "passage_count": (
        "Count the unique paragraphs. Write only a number.\n\nCount: ",
        "After removing repeated paragraphs, how many are left? The total is: ",
        "Number of distinct paragraphs:",
    ),
    "passage_retrieval_en": (
        "Abstract: {input}\n\nGive the number of the paragraph it was made from: ",
        "The abstract below comes from one of them.\n\n{input}\n\nWhich number? ",
        "{input}\n\nThis abstract belongs to paragraph number ",
    ),
    "code": ("{input}", "{input}Next line:\n", "{input}# continue here\n"),
}
INSTRUCTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    name: (before, _AFTER[name]) for name, before in _BEFORE.items()
}
"""By data set: instructions before a text, and instructions behind it, in any pairs.

No sentence is of `jmem.data.longbench`'s templates, which are there to judge by; the
layout "Question: ... Answer:" is everybody's."""

_SHARED = {
    "passages": ("hotpotqa", "2wikimqa", "musique"),
    "code": ("lcc", "repobench-p"),
}
_GROUP = {name: name for name in TASKS} | {
    name: group for group, names in _SHARED.items() for name in names
}
_ANY_TEXT = ("document", "documents", "summary")
_CHATS = (
    ("", ""),
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("[INST] ", " [/INST]"),
)


class _Material:
    """Random contexts and questions made of Python's documentation and source code."""

    def __init__(
        self, documents: Iterable[Document], modules: Iterable[str], seed: int
    ):
        self.texts = [document["text"] for document in documents]
        self.code = [*map(read_source, modules)]
        self.random = np.random.default_rng(seed)

    def pick[T](self, choices: Sequence[T]) -> T:
        return choices[int(self.random.integers(len(choices)))]

    def slice(self, texts: Sequence[str], least: int, most: int) -> str:
        text = self.pick(texts)
        size = int(self.random.integers(least, most))
        start = int(self.random.integers(max(len(text) - size, 1)))
        return text[start : start + size].strip() or "..."

    def passage(self) -> str:
        return " ".join(self.slice(self.texts, 200, 900).split())

    def sentence(self) -> str:
        words = self.slice(self.texts, 300, 400).split()
        return " ".join(words[1 : int(self.random.integers(6, 18))])

    def word(self) -> str:
        words = re.findall(r"[A-Za-z_]{4,}", self.slice(self.texts, 300, 400))
        return self.pick(words) if words else "it"

    def fill(self, forms: Sequence[str]) -> str:
        """One of some sentences, random words in its gaps."""
        return self.pick(forms).format(self.word(), self.word())

    def question(self) -> str:
        return self.fill(
            (
                "What is {}?",
                "Who wrote about {} and {}?",
                "When is {} {}?",
                "Which {} comes with {}?",
                "How many {} are there in {}?",
                "Where does {} find {}?",
                "Why is {} not {}?",
                "Is {} the same as {}?",
                "What does the author say of {}?",
                "What is the name of the {} that {} belongs to?",
                "The {} of {} is",
                "In the text, {} is said to be",
            )
        )

    def query(self) -> str:
        return self.fill(
            (
                "Summarize the discussion of {}.",
                "What did the group decide about {} and {}?",
                "What was said about {}?",
                "Summarize the opinions on {} and {}.",
                "Why did they disagree about {}?",
                "Summarize the whole meeting.",
            )
        )

    def listed(self, form: str) -> str:
        """Passages, each after a numbered heading."""
        many = range(1, int(self.random.integers(3, 8)))
        return "\n\n".join(form.format(i) + self.passage() for i in many)

    def talk(self, lines: int) -> str:
        names = ("Ann", "Bob", "Cleo", "Dan")
        return "\n".join(f"{self.pick(names)}: {self.sentence()}" for _ in range(lines))

    def examples(self, one: Callable[[], tuple[str, str]]) -> tuple[str, str]:
        """(context, input): solved examples, and one whose solution is missing."""
        many = [one() for _ in range(int(self.random.integers(3, 8)))]
        return "\n\n".join(map("".join, many)), one()[0]

    def fields(self, dataset: str) -> tuple[str, str]:
        """Context and input, in the form of the data set."""
        match dataset:
            case "hotpotqa" | "2wikimqa" | "musique":
                return self.listed("Passage {}:\n"), self.question()
            case "qmsum":
                return self.talk(int(self.random.integers(15, 60))), self.query()
            case "gov_report":
                return self.slice(self.texts, 1500, 6000), ""
            case "multi_news":
                return self.listed("Passage {}:\n"), ""
            case "trec":
                return self.examples(
                    lambda: (f"Question: {self.question()}\nType: ", self.word())
                )
            case "triviaqa":
                return self.examples(
                    lambda: (
                        f"Passage:\n{self.passage()}\nQuestion:\n{self.question()}\n"
                        "Answer:\n",
                        self.word(),
                    )
                )
            case "samsum":
                return self.examples(
                    lambda: (f"Dialogue: {self.talk(6)}\nSummary: ", self.sentence())
                )
            case "passage_count":
                return self.listed("Paragraph {}: "), ""
            case "passage_retrieval_en":
                return self.listed("Paragraph {}: "), self.passage()
            case "lcc":
                return self.slice(self.code, 1000, 4000) + "\n", ""
            case "repobench-p":
                own = self.slice(self.code, 500, 2000) + "\n"
                return self.slice(self.code, 1000, 4000) + "\n\n", own
        return self.slice(self.texts, 1500, 6000), self.question()

    def context(self) -> str:
        """A context in one of the forms that a question or a summary may be about."""
        forms = ("narrativeqa", "hotpotqa", "qmsum", "passage_count", "lcc")
        return self.fields(self.pick(forms))[0]

    def prompt(self, dataset: str, template: str | None = None) -> str:
        """One prompt; without a template, between two instructions at random."""
        context, question = self.fields(dataset)
        if template is None:
            group = _GROUP[dataset]
            before, after = map(self.pick, INSTRUCTIONS[group])
            template = before + "{context}\n\n" + after
            # The form of the text shall not tell what is asked about it.
            if TASKS[dataset].family in _ANY_TEXT and self.random.random() < 0.5:
                context = self.context()
        text = template.format(context=context, input=question)
        return text.join(self.pick(_CHATS))


_corpus = functools.cache(python_reference)


def make_prompts(
    count: int,
    *,
    seed: int,
    held_out: bool = False,
    templates: Mapping[str, str] | None = None,
    datasets: Sequence[str] = tuple(TASKS),
) -> list[tuple[str, str]]:
    """(data set, prompt), `count` of each data set; the seed draws everything.

    Texts are the documents kept for training, or those held out. Instructions are
    drawn from `INSTRUCTIONS`, or given by `templates` (data set: template). One prompt
    in three is a user's message in the chat of SmolLM2, one in three in Llama 2's.

    Raises:
      DataError: no prompt asked for, a data set that is unknown, or a Python without
        its sources.
    """
    unknown = [name for name in datasets if name not in TASKS]
    if count < 1 or unknown or not datasets:
        raise DataError(
            f"make_prompts: count={count} must be at least 1, and datasets={datasets} "
            f"names of {tuple(TASKS)}."
        )
    corpus = _corpus()
    material = _Material(
        corpus.held_out if held_out else corpus.training,
        HELD_OUT_MODULES if held_out else _CODE_MODULES,
        seed,
    )
    chosen = templates or {}
    return [
        (name, material.prompt(name, chosen.get(name)))
        for _ in range(count)
        for name in datasets
    ]
