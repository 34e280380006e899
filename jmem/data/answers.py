"""How good an answer is: LongBench's metrics, each from 0 to 1.

Source  Bai et al., LongBench, 2023, arXiv:2308.14508; the official evaluation, which
        takes ROUGE-L from the package `rouge` and edit similarity from `fuzzywuzzy`
        without its optional speed-up, that is from `difflib`.
Parity  Each gives the official number, quirks included, where its docstring does not
        say otherwise (tests/data/test_answers.py holds numbers of those packages).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from jmem.data.document import DataError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def f1(produced: str, answer: str) -> float:
    """F1 of the words in common, in any order: harmonic mean of precision and recall.

    Case, ASCII punctuation, articles and the width of blanks do not count. Punctuation
    goes without leaving a blank: "well-known" is the word "wellknown".

    >>> round(f1("The cat, a black one.", "black cat"), 3)
    0.8
    """
    ours, theirs = _split_words(produced), _split_words(answer)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(produced: str, answer: str) -> float:
    """ROUGE-L of summaries: words that keep their order within sentences, as F1.

    For each sentence of the answer: the words of a longest common subsequence with
    each sentence produced, united over those. Words count once a text, so this is the
    package's `exclusive` variant and not the original of Lin (2004). A full stop ends
    a sentence; case and other signs count; 0 if either text is empty.

    >>> round(rouge_l("a cat sat. it slept", "a cat slept"), 3)
    0.75
    """
    ours, theirs = _split_sentences(produced), _split_sentences(answer)
    if not ours or not theirs:
        return 0.0
    common = {
        word
        for sentence in theirs
        for candidate in ours
        for word in _find_longest_common(sentence, candidate)
    }
    words = len(set().union(*ours)) + len(set().union(*theirs))
    return 2 * len(common) / words


def edit_similarity(produced: str, answer: str) -> float:
    r"""`difflib`'s similarity of the first line of code produced, in whole percent.

    Lines with a backquote or a comment sign (# or //) anywhere are passed over.

    >>> edit_similarity("```python\nx = foo(1)\n```", "x = foo(2)")
    0.9
    """
    lines = produced.lstrip("\n").split("\n")
    code = (ln for ln in lines if not any(sign in ln for sign in ("`", "#", "//")))
    line = next(code, "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def classification(produced: str, answer: str, classes: Sequence[str]) -> float:
    """1 / the number of classes named, if the answer is among them.

    A class whose name is a part of the answer's ("City" in "City name") is not counted
    as named: it stands there in any case. The official code looks at only the first of
    two neighbours in its list of which that is true.

    Raises:
      DataError: the answer is none of the classes.

    >>> classification("Food, or an animal", "animal", ("food", "animal", "plant"))
    1.0
    """
    if answer not in classes:
        raise DataError(
            f"classification: answer={answer!r} is none of the {len(classes)} classes; "
            "give them all, as all_classes does in LongBench's files."
        )
    named = [name for name in classes if name in produced]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def count(produced: str, answer: str) -> float:
    """Share of the numbers produced that are the answer; 0 if there are none.

    >>> count("There are 7, no, 8 of them.", "8")
    0.5
    """
    numbers = re.findall(r"\d+", produced)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(produced: str, answer: str) -> float:
    """As `count`, for an answer like "Paragraph 12".

    Raises:
      DataError: the answer names no paragraph.

    >>> retrieval("It is from paragraph 12.", "Paragraph 12")
    1.0
    """
    named = re.search(r"Paragraph (\d+)", answer)
    if named is None:
        raise DataError(
            f'retrieval: answer={answer!r} must name a paragraph: "Paragraph 12".'
        )
    return count(produced, named[1])


def _split_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _split_sentences(text: str) -> list[list[str]]:
    """Each sentence's words; one of blanks only is an empty word, as in `rouge`."""
    return [piece.split() or [""] for piece in text.split(".") if piece]


def _find_longest_common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest common subsequence; of several, the one the package finds."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for j, other in enumerate(second):
            longer = above[j] + 1 if word == other else max(above[j + 1], row[j])
            row.append(longer)
        lengths.append(row)
    found, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
