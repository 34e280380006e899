"""A saved folder speaks as what it came from: template, special tokens, ends."""

import json

import pytest
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.data.chat import read_template
from jmem.data.document import DataError

from . import tiny

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} é: {{ m.content }}{{ eos_token }}{% endfor %}"
)
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "eos_token": {"content": "three", "__type": "AddedToken"},
    "bos_token": "one",
    "chat_template": TEMPLATE,
    "added_tokens_decoder": {"3": {"content": "three"}},
}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def folder(tmp_path):
    """A chat model's folder; two tokens end its texts."""
    params = tiny.torch_tensors(random_params(TINY), "huggingface")
    made = tiny.write_folder(
        tmp_path / "chat", TINY, params, tokenizer=tiny.tiny_tokenizer(), eos_token_id=3
    )
    (made / "tokenizer_config.json").write_text(json.dumps(CONFIG, ensure_ascii=False))
    (made / "special_tokens_map.json").write_text('{"eos_token":  "three"}')
    more = {"eos_token_id": [4, 3], "temperature": 0.6}
    (made / "generation_config.json").write_text(json.dumps(more))
    return made


def saved_like(source, path, **more):
    found = checkpoints.load(source)
    checkpoints.save(found.params(), found.config, path, like=found, **more)
    return path


def spelled(checkpoint):
    assert checkpoint.tokenizer is not None
    return checkpoint.tokenizer.to_str()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestRoundTrip:
    def test_a_folder_goes_out_as_it_came_in(self, folder, tmp_path):
        saved = saved_like(folder, tmp_path / "saved")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert (saved / name).read_bytes() == (folder / name).read_bytes()
        assert read_template(saved) == read_template(folder)
        text = read_template(saved).render(MESSAGES)["text"]
        assert text == "user é: hithreeassistant é: yothree"
        found, original = checkpoints.load(saved), checkpoints.load(folder)
        assert found.eos_ids == original.eos_ids == (3, 4)  # config.json's comes first
        assert spelled(found) == spelled(original)
        assert found.tokenizer_files == original.tokenizer_files
        assert contents(saved_like(saved, tmp_path / "again")) == contents(saved)

    def test_a_template_of_its_own_file_stays_the_one_that_counts(
        self, folder, tmp_path
    ):
        (folder / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\r\n!")
        saved = saved_like(folder, tmp_path / "saved")
        name = "chat_template.jinja"
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
        assert read_template(saved) == read_template(folder)
        assert read_template(saved).source != TEMPLATE

    def test_gguf_metadata_become_files(self, tmp_path):
        ids = tiny.tiny_tokenizer().get_vocab()
        path = tiny.write_gguf(
            tmp_path / "m.gguf",
            TINY,
            random_params(TINY),
            metadata={
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "of another",
                "tokenizer.ggml.tokens": sorted(ids, key=ids.__getitem__),
                "tokenizer.ggml.eos_token_id": 3,
                "tokenizer.ggml.eot_token_id": 4,
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.unknown_token_id": 0,
                "tokenizer.ggml.padding_token_id": 2**32 - 1,
                "tokenizer.chat_template": TEMPLATE,
            },
        )
        tiny.tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
        saved = saved_like(path, tmp_path / "saved")
        template = read_template(saved)
        assert template.source == TEMPLATE
        assert template.tokens == {
            "bos_token": "one",
            "eos_token": "three",
            "unk_token": "<unk>",
        }
        raw = json.loads((saved / "tokenizer_config.json").read_text())
        assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert raw["model_max_length"] == TINY.max_positions
        assert checkpoints.load(saved).eos_ids == (3, 4)
        assert contents(saved_like(saved, tmp_path / "again")) == contents(saved)


class TestWithoutAnOriginal:
    def test_transformers_is_told_class_and_end(self, tmp_path):
        checkpoints.save(
            random_params(TINY),
            TINY,
            tmp_path / "m",
            tiny.tiny_tokenizer(),
            eos_ids=(2, 4),
        )
        raw = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
        assert raw == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": TINY.max_positions,
            "clean_up_tokenization_spaces": False,
            "eos_token": "two",
        }
        with pytest.raises(DataError, match="no chat template"):
            read_template(tmp_path / "m")

    def test_what_is_given_goes_before_what_the_original_has(self, folder, tmp_path):
        larger = tiny.tiny_tokenizer(40)
        saved = saved_like(folder, tmp_path / "a", tokenizer=larger, eos_ids=())
        found = checkpoints.load(saved)
        assert found.eos_ids == (3,)  # the tokenizer's own, by its files
        assert spelled(found) == larger.to_str()
        assert read_template(saved) == read_template(folder)

    @pytest.mark.parametrize("ids", [(48,), (2, -1)])
    def test_ends_beyond_the_vocabulary(self, tmp_path, ids):
        with pytest.raises(ValueError, match=r"eos_ids=.* below vocab_size=48"):
            checkpoints.save(random_params(TINY), TINY, tmp_path / "m", eos_ids=ids)
        assert not (tmp_path / "m").exists()


DAMAGE = {
    "no JSON": ("tokenizer_config.json", b'{"a": ', "not valid JSON"),
    "a list": ("special_tokens_map.json", b"[]", "holds a JSON list"),
    "no UTF-8": ("chat_template.jinja", b"a\xff", "not UTF-8"),
}


@pytest.mark.parametrize("name, content, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_names_the_file(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load(folder)
    assert str(error.value).startswith(str(folder / name))


def test_a_gguf_template_that_is_no_text(tmp_path):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": 7}
    metadata |= {"tokenizer.ggml.pre": "of another"}
    path = tiny.write_gguf(
        tmp_path / "m.gguf", TINY, random_params(TINY), metadata=metadata
    )
    tiny.tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"m.gguf: tokenizer.chat_template is no"):
        checkpoints.load(path)
