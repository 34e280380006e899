"""Tokenizers rebuilt from GGUF metadata cut as the originals; misfits are refused."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from jmem.checkpoints.files import CheckpointError, CheckpointWarning
from jmem.checkpoints.tokenizer import from_gguf, from_json
from jmem.data.document import DataError
from jmem.data.tokens import tokenise

from . import tiny

HERE = pathlib.Path("model.gguf")
TEXT = "It's 1998: naïve café, 12345 stars...\n\n  {'a': [1, 22]}\tDON'T\r\n 你好 🙂"


def built(metadata: dict, vocab_size: int, path=HERE) -> Tokenizer:
    tokenizer = from_gguf(metadata, vocab_size, path)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def byte_level() -> dict:
    """GGUF metadata of a byte-level BPE trained on a page of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    page = pathlib.Path(__file__).read_text()
    tokenizer.train_from_iterator([page, TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


class TestByteLevel:
    @pytest.mark.parametrize(
        "pre, pieces",
        {
            "gpt-2": ["It", "'s", "Ġ12345", "Ġstars", "...", "ĊĠĠ", "Ġx"],
            "smollm": ["It", "'s", "Ġ", *"12345", "Ġstars", "...", "ĊĠĠ", "Ġx"],
            "llama-bpe": ["It", "'s", "Ġ", "123", "45", "Ġstars", "...Ċ", "ĠĠ", "Ġx"],
            "qwen2": ["It", "'s", "Ġ", *"12345", "Ġstars", "...Ċ", "ĠĠ", "Ġx"],
        }.items(),
        ids=lambda item: item if isinstance(item, str) else "",
    )
    def test_text_is_cut_as_each_model_cuts_it(self, byte_level, pre, pieces):
        tokenizer = built(byte_level | {"tokenizer.ggml.pre": pre}, 400)
        assert tokenizer.pre_tokenizer is not None
        cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 stars...\n   x")
        assert [piece for piece, _ in cut] == pieces

    @pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
    def test_any_text_comes_back(self, byte_level, pre):
        tokenizer = built(byte_level | {"tokenizer.ggml.pre": pre}, 400)
        assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT

    def test_qwen2_composes_characters(self, byte_level):
        tokenizer = built(byte_level | {"tokenizer.ggml.pre": "qwen2"}, 400, HERE)
        assert tokenizer.encode("cafe\u0301").ids == tokenizer.encode("caf\u00e9").ids

    def test_special_tokens_are_whole_and_left_out_of_text(self, byte_level):
        tokenizer = built(byte_level, 400, HERE)
        ids = tokenizer.encode("one<|end|>two").ids
        assert 1 in ids
        assert tokenizer.decode(ids) == "onetwo"

    @pytest.mark.parametrize("pre, starts", [("smollm", False), ("llama-bpe", True)])
    def test_a_text_starts_with_bos_where_the_model_was_trained_so(
        self, byte_level, pre, starts
    ):
        metadata = byte_level | {"tokenizer.ggml.pre": pre}
        tokenizer = built(metadata, 400, HERE)
        plain = tokenizer.encode("one", add_special_tokens=False)
        assert tokenizer.encode("one").ids == [0] * starts + plain.ids
        for flag in (True, False):  # the file may say otherwise
            told = metadata | {"tokenizer.ggml.add_bos_token": flag}
            told |= {"tokenizer.ggml.add_eos_token": flag}
            ids = built(told, 400, HERE).encode("one").ids
            assert ids == [0] * flag + plain.ids + [1] * flag


def sentencepiece_metadata(seed=0) -> dict:
    """A vocabulary as llama.cpp writes one: bytes, characters, ever longer pieces."""
    random = np.random.default_rng(seed)
    pieces = list("▁abcd")
    while len(pieces) < 60:
        left, right = random.choice(pieces, 2)
        if left + right not in pieces and len(left + right) < 8:
            pieces.append(left + right)
    scores = [0.0] * len(pieces)
    scores[5:] = -random.permutation(len(pieces) - 5).astype(float)
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + pieces,
        "tokenizer.ggml.scores": [0.0] * len(special) + scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentencepiece(metadata: dict, text: str) -> list[int]:
    """The definition: join the neighbours whose union scores best, until none does."""
    tokens = metadata["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, metadata["tokenizer.ggml.scores"]))
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in score
        ]
        if not joins:
            break
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        if piece in score:
            ids.append(tokens.index(piece))
        else:
            ids += [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
    return [1, *ids]


class TestSentencePiece:
    @pytest.mark.parametrize("seed", range(5))
    def test_pieces_follow_the_scores(self, seed):
        metadata = sentencepiece_metadata(seed)
        tokenizer = built(metadata, 319, HERE)
        random = np.random.default_rng(seed)
        for length in (1, 3, 10, 40, 40, 40):
            text = "".join(random.choice(list("aabbcd é"), length))
            ids = tokenizer.encode(text).ids
            assert ids == sentencepiece(metadata, text)
            assert tokenizer.decode(ids) == text

    def test_scores_are_needed(self):
        metadata = sentencepiece_metadata() | {"tokenizer.ggml.scores": [0.0]}
        with pytest.raises(CheckpointError, match=r"scores does not have 319 items"):
            from_gguf(metadata, 319, HERE)

    def test_endless_tokens_are_refused(self):
        metadata = sentencepiece_metadata()
        metadata["tokenizer.ggml.tokens"][-1] = "a" * 300
        with pytest.raises(CheckpointError, match=r"a token of 300 characters"):
            from_gguf(metadata, 319, HERE)
        tokens = [f"{number:0250}" for number in range(17_000)]  # cut everywhere
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
        }
        with pytest.raises(CheckpointError, match=r"holds 4250000 characters; such"):
            from_gguf(metadata, len(tokens), HERE)


class TestMisfits:
    def test_none_where_the_file_has_none(self):
        assert from_gguf({}, 400, HERE) is None

    @pytest.mark.parametrize(
        "more, message",
        [
            ({"tokens": None}, "tokens is not a list of strings"),
            ({"tokens": [1, 2]}, "tokens is not a list of strings"),
            ({"merges": ["a a a"]}, "merges holds 'a a a', which does not join"),
            ({"token_type": [1]}, "token_type does not have 400 items"),
        ],
    )
    def test_metadata_that_contradict_themselves(self, byte_level, more, message):
        changed = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
        with pytest.raises(CheckpointError, match=message):
            from_gguf(byte_level | changed, 400, HERE)

    @pytest.mark.parametrize("name", ["bos", "eos"])
    @pytest.mark.parametrize("number", [400, -1, None])
    def test_a_begin_or_an_end_that_is_no_token_is_left_out(
        self, byte_level, name, number
    ):
        more = {f"add_{name}_token": True, f"{name}_token_id": number}
        changed = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
        message = rf"ggml\.{name}_token_id {number} is not one of 400 tokens"
        with pytest.warns(CheckpointWarning, match=message):
            tokenizer = built(byte_level | changed, 400, HERE)
        bare = tokenizer.encode("one", add_special_tokens=False).ids
        assert tokenizer.encode("one").ids == bare

    def test_a_token_twice(self, byte_level):
        tokens = list(byte_level["tokenizer.ggml.tokens"])
        tokens[-1] = tokens[-2]
        with pytest.raises(CheckpointError, match=r"holds a token twice"):
            from_gguf(byte_level | {"tokenizer.ggml.tokens": tokens}, 400, HERE)

    @pytest.mark.parametrize("size", [199, 801])
    def test_a_vocabulary_that_is_not_the_models(self, byte_level, size):
        """One of twice or half the size is another model's."""
        with pytest.raises(
            CheckpointError, match=rf"400 tokens .* 0 to {size - 1}\. It"
        ):
            from_gguf(byte_level, size, HERE)
        assert from_gguf(byte_level, 800, HERE) is not None  # padded tables are usual
        with pytest.warns(CheckpointWarning, match=r"1 token\(s\) .*: ids from 399, "):
            assert from_gguf(byte_level, 399, HERE) is not None

    def test_an_unknown_kind_asks_for_tokenizer_json(self, byte_level, tmp_path):
        metadata = byte_level | {"tokenizer.ggml.pre": "dbrx"}
        with pytest.raises(CheckpointError, match=r"pre 'dbrx'.*tokenizer.json beside"):
            from_gguf(metadata, 48, tmp_path / "a.gguf")
        tiny.tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
        tokenizer = built(metadata, 48, tmp_path / "a.gguf")
        assert tokenizer.encode("two").ids == [2]


class TestJson:
    def test_truncation_and_padding_are_the_callers_business(self, tmp_path):
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=5)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        ids = from_json(tmp_path / "tokenizer.json", 48).encode("one two three .").ids
        assert ids == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"{}",
            b"\xff\xfe",
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
            # The package's core panics here, which is no Exception.
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}',
        ],
    )
    def test_what_is_no_tokenizer(self, tmp_path, raw, capfd):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
            from_json(tmp_path / "tokenizer.json", 48)

    def test_ids_that_only_a_template_adds_are_checked_too(self, tmp_path):
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 99)]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.warns(CheckpointWarning, match=r"ids from 99, but .* 0 to 47\."):
            found = from_json(tmp_path / "tokenizer.json", 48)
        with pytest.raises(DataError, match=r"token id 99 .* vocab_size=48"):
            tokenise([{"text": "one"}], found, end="two", vocab_size=48)
