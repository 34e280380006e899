"""Text as batches of one static shape: read, tokenise, pack or pad, shuffle, resume.

    documents = jmem.data.read("train.jsonl", column="text")    # a datasets.Dataset
    # or .json, .csv, .parquet, .txt, a folder or Dataset of `datasets`
    # prompt="question", completion="answer" trains on answers
    # chats: read_chats("chats.jsonl", template=read_template("checkpoint"))
    sequences = jmem.data.tokenise(documents, tokenizer)        # ids, each with its end
    loader = jmem.data.Loader(jmem.data.pack(sequences, seq_len=512), batch_size=8)
    # of which none sees another; documents="joined" makes one stream of them
    loader.batch(step)                                          # any step, no state

All of that at once, held-out text apart, from a file or without one:

    source = jmem.data.TextSource(data="train.jsonl", chat="messages")
    loader, held_out = source.batches(checkpoint, batch_size=8, ...)

Text without a file: `training, held_out = jmem.data.python_reference()`, and four tasks
with prompts: `jmem.data.python_tasks()`. Rows of several loaders in each batch, for as
many adapters or one model: `jmem.data.Joint((loader, other))`. Evaluation:
`for batch in jmem.data.in_order(jmem.data.pack(held_out_sequences, 512), 8)`. Data that
cannot be used raise `DataError`, a ValueError, before any training.
"""

from jmem.data.batch import Batch
from jmem.data.builtin import Corpus, python_reference
from jmem.data.chat import ChatTemplate, read_chats, read_template
from jmem.data.document import DataError, DataWarning, Document
from jmem.data.loader import Joint, Loader, balance, in_order
from jmem.data.source import TextSource
from jmem.data.tasks import python_tasks
from jmem.data.text import read
from jmem.data.tokens import tokenise
from jmem.data.windows import keep_trainable, pack, pad

__all__ = [
    "Batch",
    "ChatTemplate",
    "Corpus",
    "DataError",
    "DataWarning",
    "Document",
    "Joint",
    "Loader",
    "TextSource",
    "balance",
    "in_order",
    "keep_trainable",
    "pack",
    "pad",
    "python_reference",
    "python_tasks",
    "read",
    "read_chats",
    "read_template",
    "tokenise",
]
