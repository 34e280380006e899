"""Tokens that end a text or a turn, from every file that names some.

Hugging Face folders name them by number (config.json, generation_config.json) and by
text (tokenizer_config.json, special_tokens_map.json). GGUF metadata name one or two by
number; the one that ends a turn is often told by its text alone, and is looked for as
llama.cpp does. An id that the vocabulary lacks is left out with a warning: -1 and ids
of another vocabulary stand for "none" in published files.

Source   llama.cpp, src/llama-vocab.cpp: the texts, and which exclude each other.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmem.checkpoints.files import CheckpointWarning

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("</s>", "<eos>", "<turn|>", "<|tool_response>", "<end_of_utterance>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    }
)
"""Tokens that end generation wherever a GGUF vocabulary has them."""
_EXCLUDED = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
"""A text that ends nothing beside all of those."""


def read_folder(
    named: Iterable[tuple[Path, Mapping[str, Any]]],
    beside: Mapping[str, str],
    tokenizer: "Tokenizer | None",
    vocab_size: int,
) -> tuple[int, ...]:
    """Ids that end a text by the files of a Hugging Face folder; may be empty.

    Args:
      named: files that name ids under `eos_token_id`, the first one's come first.
      beside: the contents of files that name a token by its text, by file name.
      tokenizer: knows such texts; without one they are passed over.
      vocab_size: rows of the model's table.
    """
    ids: list[int] = []
    for path, raw in named:
        ids += keep_known(raw.get("eos_token_id"), vocab_size, f"{path}: eos_token_id")
    for name, text in beside.items():
        if not name.endswith(".json") or tokenizer is None:
            continue
        token = read_token(json.loads(text).get("eos_token"))
        number = None if token is None else tokenizer.token_to_id(token)
        ids += keep_known(number, vocab_size, f"{name}: eos_token {token!r}")
    return tuple(dict.fromkeys(ids))


def read_metadata(
    metadata: Mapping[str, Any], vocab_size: int, where: Path
) -> tuple[int, ...]:
    """Ids that end a text or a turn by GGUF metadata; may be empty."""
    ids: list[int] = []
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        ids += keep_known(metadata.get(key), vocab_size, f"{where}: {key}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        known = tokens[:vocab_size]
        found = TEXTS.intersection(t for t in known if isinstance(t, str))
        found -= {text for text, others in _EXCLUDED if others <= found}
        ids += [number for number, token in enumerate(known) if token in found]
    return tuple(dict.fromkeys(ids))


def keep_known(value: Any, vocab_size: int, where: str) -> list[int]:
    """Of one id, a list of them or None, those that the vocabulary has.

    >>> keep_known([3, 1], 4, "config.json: eos_token_id")
    [3, 1]
    """
    given = value if isinstance(value, list) else [] if value is None else [value]
    known = [i for i in given if type(i) is int and 0 <= i < vocab_size]
    if len(known) < len(given):
        warnings.warn(
            f"{where} is {value!r:.200}; ids outside of the vocabulary, 0 to "
            f"{vocab_size - 1}, end no text and are left out.",
            CheckpointWarning,
            stacklevel=2,
        )
    return known


def read_token(value: Any) -> str | None:
    """A special token's text: a string, or an object that holds it; None otherwise.

    A string with a lone surrogate, which JSON can write, is no text.
    """
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str) or re.search("[\ud800-\udfff]", content):
        return None
    return content
