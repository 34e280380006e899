"""Tokenizers of checkpoints: `tokenizer.json`, or rebuilt from GGUF metadata.

A GGUF file names its way of splitting text instead of spelling it out. Rebuilt here,
each as the model's own `tokenizer.json` has it (`tokenizer.ggml.model` / `.pre`):

    gpt2 / gpt-2       byte-level BPE, GPT-2's pattern
    gpt2 / smollm      every digit on its own, then GPT-2's pattern; no BOS (SmolLM2)
    gpt2 / llama-bpe   Llama 3's pattern, digits in groups of three; BOS
    gpt2 / qwen2       NFC, then Llama 3's pattern with single digits; no BOS
    llama              SentencePiece BPE with byte fallback (Llama 1 and 2, TinyLlama,
                       Mistral); BOS. Its merges follow from the scores.

The files beside `tokenizer.json` change no token: they tell transformers which class
to make and which tokens are special, and hold the chat template.
"""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmem import confined
from jmem.checkpoints import ends
from jmem.checkpoints.fields import Fields
from jmem.checkpoints.files import (
    CheckpointError,
    CheckpointWarning,
    parse_json,
    read_whole,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_JSON_LIMIT = 1 << 28
"""Longest tokenizer.json, in bytes; the largest published ones take 35 MB."""
_CONFIG = "tokenizer_config.json"
_FILES = (
    *(_CONFIG, "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
"""What transformers reads beside tokenizer.json, and to generate."""
_FILE_LIMIT = 1 << 26
"""Longest of them, in bytes (the first may list every added token)."""
_LEAST_COVER = 0.5
"""Share of the model's ids that its tokenizer must know, and of the tokenizer's that
the model must. Published models pad their tables by under 3 %, and a few have tokens
without rows; a tokenizer of half or twice the size belongs to another model."""
_PIECE_LIMIT = 256
"""Longest SentencePiece token, in characters: each is cut everywhere to find merges.
Published vocabularies have up to 48."""
_PIECES_LIMIT = 1 << 22
"""Most characters of all of them; 262,144 published ones have 2 million."""
_GROWTH_LIMIT = 1000
"""Most times that a text may get longer before it is cut; in published ones 1 to 3."""
_PROBE = "".join(map(chr, range(32, 127))) + "\r\n\tOne 12 three: é, 你好 🙂.\n"
"""Encoded once when a tokenizer is made, so that a broken one is found then."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"gpt-2": False, "smollm": False, "llama-bpe": True, "qwen2": False}
"""Byte-level pre-tokenizers; whether a text starts with BOS unless the file says."""
_SPECIAL = {"unknown": "unk", "padding": "pad", "seperator": "sep"} | {
    name: name for name in ("bos", "eos", "cls", "mask")
}
"""GGUF's names of special tokens (the spelling is its own), and Hugging Face's."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""GGUF token types; the last two are matched whole, before the text is split."""


def from_json(path: Path, vocab_size: int) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json`, without its truncation and padding.

    Tried in a process with limits first, as a few lines of one may ask for any time and
    memory.

    Raises:
      CheckpointError: not readable as one, or not this model's.
    """
    from tokenizers import Tokenizer

    raw = read_whole(path, _JSON_LIMIT)
    status = os.stat(path)
    _try(path, status.st_size, status.st_mtime_ns, status.st_ino)
    with _name_errors(path):
        tokenizer = Tokenizer.from_buffer(raw)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_growth(tokenizer, path)
        return _check(tokenizer, vocab_size, path)


def _check_growth(tokenizer: "Tokenizer", path: Path) -> None:
    """Refuses one that may make a text longer by more than `_GROWTH_LIMIT`."""
    for part in (tokenizer.normalizer, tokenizer.decoder, tokenizer.post_processor):
        state = {} if part is None else json.loads(part.__getstate__())
        if (growth := _count_growth(state)) > _GROWTH_LIMIT:
            raise CheckpointError(
                f"{path}: its {type(part).__name__} may make a text {growth:.3g} times "
                f"as long; published ones stay below {_GROWTH_LIMIT}. Take the model's "
                "own tokenizer.json."
            )


def _count_growth(state: Any) -> float:
    """How many times as long a text may get, by the replacements and copies in it."""
    if isinstance(state, list):
        copies = sum(isinstance(part, dict) and "Sequence" in part for part in state)
        return math.prod(map(_count_growth, state)) * max(1, copies)
    if not isinstance(state, dict):
        return 1.0
    growth = math.prod(map(_count_growth, state.values()))
    if isinstance(content := state.get("content"), str) and "pattern" in state:
        found = state["pattern"]
        pattern = found.get("String", "") if isinstance(found, dict) else ""
        growth *= max(1.0, len(content) / max(1, len(pattern)))
    return growth


@functools.lru_cache(maxsize=64)
def _try(path: Path, *stamp: int) -> None:
    del stamp  # a changed file is another call
    try:
        confined.ask("tokenizer", path=os.path.abspath(path), probe=_PROBE)
    except confined.ConfinedError as error:
        raise CheckpointError(
            f"{path}: not a tokenizer that can be used ({error}). Copy it again, or "
            "take the model's own."
        ) from error


def read_files(folder: Path) -> dict[str, str]:
    """The files of a Hugging Face folder that go with its tokenizer, as they are.

    Raises:
      CheckpointError: one that is too long, not UTF-8 or, if it should be, not JSON.
    """
    found = {}
    for path in (folder / name for name in _FILES):
        if not path.exists():
            continue
        raw = read_whole(path, _FILE_LIMIT)
        if path.suffix == ".json":
            parse_json(raw, str(path))
        try:
            found[path.name] = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 ({error}).") from error
    return found


def make_files(
    metadata: Mapping[str, Any], max_positions: int, path: Path
) -> dict[str, str]:
    """Files like those, made of GGUF metadata: special tokens and chat template.

    Raises:
      CheckpointError: a chat template that is not a string.
    """
    if "tokenizer.ggml.model" not in metadata:
        return {}
    tokens, special = metadata.get("tokenizer.ggml.tokens"), {}
    known = dict(enumerate(tokens)) if isinstance(tokens, list) else {}
    for theirs, ours in _SPECIAL.items():
        # Writers put -1 for none; llama.cpp passes over an id without a token, too.
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(number) is int and isinstance(token := known.get(number), str):
            special[f"{ours}_token"] = token
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{path}: tokenizer.chat_template is not a string.")
    return add_config({}, max_positions, special, template)


def add_config(
    files: Mapping[str, str],
    max_positions: int,
    special: Mapping[str, str],
    template: str | None = None,
) -> dict[str, str]:
    """The files, and a `tokenizer_config.json` if there is none.

    `special` names special tokens: {"eos_token": "</s>"}.
    """
    config = {
        # Takes tokenizer.json as it is; by model_type, a class would change it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        **special,
        **({} if template is None else {"chat_template": template}),
    }
    return {_CONFIG: json.dumps(config, indent=2) + "\n"} | dict(files)


def from_gguf(metadata: Mapping[str, Any], vocab_size: int, path: Path):
    """The tokenizer that GGUF metadata describe; None if the file carries none.

    One that is not rebuilt here is read from a `tokenizer.json` in the same folder.

    Raises:
      CheckpointError: unknown and no such file, inconsistent, or not this model's.
    """
    given = Fields(metadata, str(path), "tokenizer.ggml.")
    model, pre = given.get("model"), given.get("pre")
    if model is None:
        return None
    # SentencePiece names no pre-tokenizer, and its texts start with BOS.
    bos = True if model == "llama" else _BYTE_LEVEL.get(str(pre))
    if bos is None or model not in ("llama", "gpt2"):
        beside = path.with_name("tokenizer.json")
        if beside.exists():
            return from_json(beside, vocab_size)
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {model!r} with pre {pre!r} is not rebuilt; "
            f"supported are llama, and gpt2 with pre {', '.join(_BYTE_LEVEL)}. Put the "
            f"model's tokenizer.json beside the file."
        )
    with _name_errors(path):
        tokens = _read_strings(given, "tokens")
        types = _read_items(given, "token_type", len(tokens), [1] * len(tokens))
        # As llama.cpp does: some writers call what ends a turn a normal token.
        types = [_CONTROL if t in ends.TEXTS else k for t, k in zip(tokens, types)]
        if len(set(tokens)) < len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds a token twice.")
        if model == "llama":
            tokenizer = _make_sentencepiece(given, tokens, types)
        else:
            tokenizer = _make_byte_level(given, tokens)
        _add_special(tokenizer, tokens, types)
        _add_ends(tokenizer, given, tokens, bos)
        return _check(tokenizer, vocab_size, path)


def _make_byte_level(given: Fields, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in _read_strings(given, "merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise CheckpointError(
                f"{given.where}: tokenizer.ggml.merges holds {merge!r}, which does not "
                "join two tokens to a third."
            )
        merges.append((left, right))
    kind = given.get("pre")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
    if kind in ("gpt-2", "smollm"):
        split = pre.ByteLevel(add_prefix_space=False)
        digits = [pre.Digits(individual_digits=True)] if kind == "smollm" else []
        tokenizer.pre_tokenizer = pre.Sequence([*digits, split])
    else:
        pattern = Regex(_LLAMA3 % ("1,3" if kind == "llama-bpe" else "1"))
        tokenizer.pre_tokenizer = pre.Sequence(
            [
                pre.Split(pattern, "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(given: Fields, tokens: list[str], types: list) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _read_items(given, "scores", len(tokens))
    if (longest := max(map(len, tokens), default=0)) > _PIECE_LIMIT:
        raise CheckpointError(
            f"{given.where}: tokenizer.ggml.tokens holds a token of {longest} "
            f"characters; such tokens have at most {_PIECE_LIMIT}."
        )
    if (total := sum(map(len, tokens))) > _PIECES_LIMIT:
        raise CheckpointError(
            f"{given.where}: tokenizer.ggml.tokens holds {total} characters; such "
            f"vocabularies have at most {_PIECES_LIMIT}."
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece merges the pair whose union scores best. Ranked pairs do the same.
    pairs = [
        (-score, vocab[token[:cut]], vocab[token[cut:]])
        for token, score in zip(tokens, scores)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]
    unknown = next((t for t, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = given.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * bool(prefix) + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * bool(prefix)
    )
    return tokenizer


def _add_special(tokenizer, tokens, types) -> None:
    from tokenizers import AddedToken

    def whole(wanted: int) -> list[AddedToken]:
        chosen = (t for t, kind in zip(tokens, types) if kind == wanted and t)
        return [AddedToken(token, normalized=False) for token in chosen]

    tokenizer.add_special_tokens(whole(_CONTROL))
    tokenizer.add_tokens(whole(_USER_DEFINED))


def _add_ends(tokenizer, given: Fields, tokens, bos_by_default: bool) -> None:
    """Makes encoded texts start with BOS and end with EOS where the file says so.

    Warns of one that it says is added and is none of the tokens.
    """
    from tokenizers import processors

    text, used = ["$A"], {}
    for name, default in (("bos", bos_by_default), ("eos", False)):
        if given.get(f"add_{name}_token", default):
            number = given.get(f"{name}_token_id")
            if type(number) is not int or not 0 <= number < len(tokens):
                warnings.warn(
                    f"{given.where}: tokenizer.ggml.{name}_token_id {number!r} is not "
                    f"one of {len(tokens)} tokens, so that no text gets one.",
                    CheckpointWarning,
                    stacklevel=3,
                )
                continue
            used[tokens[number]] = number
            text.insert(0 if name == "bos" else len(text), tokens[number])
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=text,
            pair=[*text, *(piece.replace("$A", "$B") for piece in text)],
            special_tokens=list(used.items()),
        )


def _read_strings(given: Fields, key: str) -> list[str]:
    value = given.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        where = f"{given.where}: tokenizer.ggml.{key}"
        raise CheckpointError(f"{where} is not a list of strings.")
    return value


def _read_items(
    given: Fields, key: str, count: int, default: list | None = None
) -> list:
    value = given.get(key, default)
    if not isinstance(value, list) or len(value) != count:
        where = f"{given.where}: tokenizer.ggml.{key}"
        raise CheckpointError(f"{where} does not have {count} items.")
    return value


def _check(tokenizer: "Tokenizer", vocab_size: int, path: Path) -> "Tokenizer":
    """The tokenizer, if it knows most of the model's ids and the model most of its.

    Warns of tokens that the model has no row for.
    """
    ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
    ids |= set(tokenizer.encode(_PROBE).ids)
    beyond = sorted(number for number in ids if number >= vocab_size)
    shared = len(ids) - len(beyond)
    if shared < _LEAST_COVER * max(vocab_size, len(ids)):
        raise CheckpointError(
            f"{path}: the tokenizer has {len(ids)} tokens with ids up to "
            f"{max(ids, default=-1)}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}. It belongs to another model; put this model's "
            "tokenizer in its place."
        )
    if beyond:
        warnings.warn(
            f"{path}: the tokenizer has {len(beyond)} token(s) that the model has no "
            f"row for, {tokenizer.id_to_token(beyond[0])!r} the first: ids from "
            f"{beyond[0]}, but the vocabulary is 0 to {vocab_size - 1}. A text that "
            "uses one is refused.",
            CheckpointWarning,
            stacklevel=2,
        )
    return tokenizer


@contextlib.contextmanager
def _name_errors(path: Path) -> Iterator[None]:
    """Turns the package's errors, and panics of its Rust core, into ours."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not confined.is_failure(error):
            raise
        raise CheckpointError(f"{path}: not a tokenizer ({error}).") from error
