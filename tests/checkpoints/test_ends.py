"""Tokens that end a text: from every file that names one, and only the model's."""

import json
import pathlib

import pytest
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints import CheckpointWarning, ends

from . import tiny

NOWHERE = pathlib.Path("m.gguf")


@pytest.fixture
def folder(tmp_path):
    """A folder whose config.json names no end; tokens 1, 2, 3 are one, two, three."""
    tensors = tiny.torch_tensors(random_params(TINY), "huggingface")
    return tiny.write_folder(
        tmp_path / "m",
        TINY,
        tensors,
        tokenizer=tiny.tiny_tokenizer(),
        eos_token_id=None,
    )


class TestFolder:
    def test_every_file_is_asked_and_the_configuration_comes_first(self, folder):
        assert checkpoints.load(folder).eos_ids == ()
        (folder / "special_tokens_map.json").write_text('{"eos_token": "one"}')
        assert checkpoints.load(folder).eos_ids == (1,)
        token = {"content": "two", "lstrip": False}
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert checkpoints.load(folder).eos_ids == (2, 1)
        (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
        assert checkpoints.load(folder).eos_ids == (7, 2, 1)
        raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 9}
        (folder / "config.json").write_text(json.dumps(raw))
        assert checkpoints.load(folder).eos_ids == (9, 7, 2, 1)

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize(
        "value, kept",
        [
            *((-1, ()), (48, ()), (2**32 - 1, ()), ("2", ()), (True, ()), (2.0, ())),
            *(({"id": 2}, ()), ([3, -1, 5, 49], (3, 5)), ([[2], None], ())),
        ],
        ids=str,
    )
    def test_ids_that_the_vocabulary_lacks_are_left_out(
        self, folder, file, value, kept
    ):
        path = folder / file
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | {"eos_token_id": value}))
        message = rf"{file}: eos_token_id is .* outside of the vocabulary, 0 to 47"
        with pytest.warns(CheckpointWarning, match=message):
            found = checkpoints.load(folder)
        assert found.eos_ids == kept

    @pytest.mark.parametrize("value, kept", [({"id": 2}, ()), ([3, -1, [5]], (3,))])
    def test_an_export_names_those_that_are_left(self, folder, value, kept):
        path = folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": value}))
        with pytest.warns(CheckpointWarning):
            found = checkpoints.load(folder)
        out = folder.with_name("out")
        checkpoints.save(random_params(TINY), TINY, out, like=found)
        assert checkpoints.load(out).eos_ids == kept, "and says nothing of others"

    def test_tokens_that_the_tokenizer_lacks_end_nothing(self, folder):
        (folder / "special_tokens_map.json").write_text('{"eos_token": "nowhere"}')
        assert checkpoints.load(folder).eos_ids == ()

    @pytest.mark.parametrize("value", ["\ud800", {"content": "a\udfff"}], ids=str)
    @pytest.mark.parametrize("name", ["special_tokens_map", "tokenizer_config"])
    def test_half_a_character_is_no_token(self, folder, name, value):
        """JSON can write one; a tokenizer cannot be asked for it."""
        (folder / f"{name}.json").write_text(json.dumps({"eos_token": value}))
        assert checkpoints.load(folder).eos_ids == ()


def metadata(*tokens, **ids):
    named = {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()}
    return named | {"tokenizer.ggml.tokens": list(tokens)}


class TestGguf:
    @pytest.mark.parametrize("turn", sorted(ends.TEXTS))
    def test_ends_of_turns_are_known_by_their_text(self, turn):
        found = ends.read_metadata(metadata("a", "end", turn, eos=1), 3, NOWHERE)
        assert found == (1, 2)

    def test_named_ones_come_first_and_none_comes_twice(self):
        given = metadata("</s>", "<|im_end|>", "b", "c", eos=3, eot=1, eom=2)
        assert ends.read_metadata(given, 4, NOWHERE) == (3, 1, 2, 0)

    @pytest.mark.parametrize(
        "others, ended",
        [
            (("<|return|>", "<|call|>"), (1, 2)),
            (("<|return|>",), (0, 1)),
            (("<|calls|>", "<|flush|>"), (1, 2)),
        ],
    )
    def test_what_ends_a_part_of_an_answer_ends_no_text(self, others, ended):
        found = ends.read_metadata(metadata("<|end|>", *others), 3, NOWHERE)
        assert found == ended

    @pytest.mark.parametrize("number", [-1, 2**32 - 1, 2])
    def test_numbers_that_the_vocabulary_lacks_are_left_out(self, number):
        message = r"m\.gguf: tokenizer\.ggml\.eos_token_id is .*, 0 to 1, end no"
        with pytest.warns(CheckpointWarning, match=message):
            found = ends.read_metadata(metadata("a", "</s>", eos=number), 2, NOWHERE)
        assert found == (1,)

    def test_tokens_without_a_row_end_nothing(self):
        assert ends.read_metadata(metadata("a", "b", "</s>"), 2, NOWHERE) == ()
