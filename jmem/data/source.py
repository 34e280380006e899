"""Training and held-out batches of a user's file, or of Python's documentation.

source = TextSource(data="mine.jsonl", prompt="question", completion="answer")
training, held_out = source.batches(
    jmem.checkpoints.load("my-checkpoint"),
    batch_size=1,
    seq_len=512,
    held_out_tokens=4096,
)
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from jmem.data.batch import Batch
from jmem.data.builtin import python_reference
from jmem.data.chat import read_chats, read_template
from jmem.data.document import DataError
from jmem.data.loader import Loader, in_order
from jmem.data.text import read
from jmem.data.tokens import tokenise
from jmem.data.windows import Documents, pack

if TYPE_CHECKING:
    from jmem.checkpoints import Checkpoint

SEPARATOR = "<|endoftext|>"
"""What stood between the documents that many models were pretrained on."""

Sequences = list[np.ndarray]
"""Token ids of documents, as `jmem.data.tokenise` makes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Which text is learnt from, and which is held out.

    Raises:
      DataError: columns of two kinds of rows, or of no file.
    """

    data: str = ""
    """A .jsonl, .json, .csv, .parquet or .txt file, or a folder that `datasets` saved,
    to train on; empty for Python's own documentation."""
    held_out: str = ""
    """A file never trained on; empty to keep back whole documents of `data`."""
    column: str = "text"
    """The column that holds the text."""
    prompt: str = ""
    """The column of prompts, in place of `column`; with `completion`."""
    completion: str = ""
    """The column of what is to be learnt after each prompt, and alone is."""
    chat: str = ""
    """The column of chats: messages, conversations (ShareGPT), or instruction (with
    Alpaca's input and output). The checkpoint's template writes them out, and only what
    the assistant says is learnt."""
    split_chats: bool = False
    """A document of each answer with all before it, for templates that write earlier
    turns otherwise once later ones follow (without their reasoning)."""
    chat_date: str = ""
    """The day that a template is told, as 2026-12-31; empty: when the run starts."""
    special_tokens: bool = True
    """Whether a text begins with the begin token, if the tokenizer has one for every
    text; of chats the template says."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them, instead of refusing."""
    documents: Documents = "apart"
    """Apart: those that share a row don't see each other. Joined: a row is a piece of
    one stream, as of a book whose paragraphs are documents here."""

    def __post_init__(self):
        if self.chat and not self.chat_date:  # a resumed run reads it from its config
            today = datetime.date.today().isoformat()
            object.__setattr__(self, "chat_date", today)
        kinds = {name: getattr(self, name) for name in ("prompt", "completion", "chat")}
        if self.chat and (self.prompt or self.completion):
            raise DataError(f"data: {kinds} are two kinds of rows; give one of them.")
        if any(kinds.values()) and not self.data:
            raise DataError(f"data: {kinds} name columns of a file; give --data.")

    def batches(
        self,
        checkpoint: "Checkpoint",
        *,
        batch_size: int,
        seq_len: int,
        held_out_tokens: int,
        seed: int = 0,
    ) -> tuple[Loader, tuple[Batch, ...]]:
        """Shuffled training batches, and held-out ones in order, of one static length.

        Args:
          checkpoint: its tokenizer reads the text, and its chat template writes it.
          batch_size: sequences a batch.
          seq_len: tokens a sequence.
          held_out_tokens: those that are learnt, in the held-out batches together.
          seed: of the order of the training batches.

        Raises:
          DataError: text that cannot be used, or too little of it.
        """
        sequences, kept = self.sequences(checkpoint, held_out_tokens)
        rows = functools.partial(pack, seq_len=seq_len, documents=self.documents)
        loader = Loader(rows(sequences), batch_size, seed)
        test, found = [], 0
        for batch in in_order(rows(kept), batch_size):
            test.append(batch)
            found += int(batch.weights.sum())
            if found >= held_out_tokens:
                return loader, tuple(test)
        raise DataError(
            f"held_out_tokens={held_out_tokens}, but the held-out text has only "
            f"{found}; lower it, or give a longer --held-out."
        )

    def sequences(
        self, checkpoint: "Checkpoint", held_out_tokens: int
    ) -> tuple[Sequences, Sequences]:
        """Tokens of every document that is trained on, and of every held-out one."""
        if not self.data:
            training, held_out = python_reference()
        else:
            read_file = self._choose_reader(checkpoint)
            training = read_file(self.data)
            held_out = read_file(self.held_out) if self.held_out else None
        encode = functools.partial(
            tokenise,
            tokenizer=checkpoint.require_tokenizer(),
            end=self.find_end_token(checkpoint),
            vocab_size=checkpoint.config.vocab_size,
            # Of a chat, its document says.
            add_special_tokens=None if self.chat else self.special_tokens,
            skip_bad_rows=self.skip_bad_rows,
        )
        sequences = encode(training)
        if held_out is None:
            return keep_back(sequences, held_out_tokens, self.data)
        return sequences, encode(held_out)

    def _choose_reader(self, checkpoint: "Checkpoint") -> Callable[[str], Iterable]:
        """How a file is read: as text, prompts with their completions, or chats."""
        if self.chat:
            return functools.partial(
                read_chats,
                template=read_template(checkpoint, self.chat_date),
                column=self.chat,
                split=self.split_chats,
                skip_bad_rows=self.skip_bad_rows,
            )
        return functools.partial(
            read,
            skip_bad_rows=self.skip_bad_rows,
            column=self.column,
            prompt=self.prompt or None,
            completion=self.completion or None,
            unit="file" if self.held_out else "paragraph",
        )

    def find_end_token(self, checkpoint: "Checkpoint") -> str:
        """The token that closes a document.

        A completion ends where generation stops, at the first of the checkpoint's
        `eos_ids`. A text or a chat, whose template ends each turn, ends in SEPARATOR
        where the tokenizer knows it, and else as a completion does.
        """
        tokenizer = checkpoint.require_tokenizer()
        known = [end for end in map(tokenizer.id_to_token, checkpoint.eos_ids) if end]
        if not self.completion and tokenizer.token_to_id(SEPARATOR) is not None:
            return SEPARATOR
        return known[0] if known else SEPARATOR


def keep_back(
    sequences: Sequences, tokens: int, name: str = ""
) -> tuple[Sequences, Sequences]:
    """The last whole documents that make up `tokens`, apart from the rest.

    Raises:
      DataError: there are not so many tokens beside a document to train on; `name` is
        the text's.
    """
    wanted, first = tokens, len(sequences)
    while first and wanted > 0:
        first -= 1
        wanted -= np.ma.count(sequences[first][1:])  # the first token is no target
    if wanted > 0 or first == 0:
        raise DataError(
            f"--data {name} has no {tokens} tokens to keep back beside some to train "
            "on; lower --held-out-tokens, or give --held-out."
        )
    return sequences[:first], sequences[first:]
