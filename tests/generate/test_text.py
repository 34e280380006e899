"""Text in, text out, and where it ends."""

import jax
import jax.numpy as jnp
import pytest
from tiny_decoder import TINY, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jmem.generate.decode import generate
from jmem.generate.text import complete
from jmem.kvcache.snapkv import SnapKV
from jmem.models.decoder import Decoder


@pytest.fixture(scope="module")
def parts():
    """A decoder, weights, and a tokenizer whose tokens are words after a space."""
    vocabulary = {f"▁w{n}": n for n in range(TINY.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.3))
    return Decoder(TINY), params, tokenizer


def completed(parts, **more):
    model, params, tokenizer = parts
    prompts = ["w5 w9 w1", "w7"]
    return complete(model, params, tokenizer, prompts, max_new_tokens=8, **more)


def test_it_is_what_generate_gives_without_the_prompt(parts):
    model, params, tokenizer = parts
    found = completed(parts)
    rows = generate(model, params, [[5, 9, 1], [7]], max_new_tokens=8)
    assert found == [" " + tokenizer.decode(row) for row in rows]


def test_a_stop_string_may_lie_across_tokens(parts):
    whole, _ = completed(parts)
    words = whole.split(" ")
    across = f"{words[2][-1]} {words[3]}"
    cut, _ = completed(parts, stop=["nowhere", across])
    assert cut == whole[: whole.find(across)]
    assert len(cut) < len(whole)


def test_it_takes_the_options_of_generate(parts):
    model, params, tokenizer = parts
    options = {
        "policy": SnapKV(window=4, kernel=3),
        "cache_bytes": 40_000,
        "prompt_chunk": 2,
        "stop_tokens": [9],
    }
    rows = generate(model, params, [[5, 9, 1], [7]], max_new_tokens=8, **options)
    found = completed(parts, **options)
    assert found == [" " + tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize("stop", ["ab", ["a", ""]])
def test_refuses_what_is_no_list_of_strings(parts, stop):
    with pytest.raises(ValueError, match="stop="):
        completed(parts, stop=stop)


def test_a_prompt_begins_as_training_and_transformers_begin_a_text(parts):
    model, params, tokenizer = parts
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["▁w11", "▁w12"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="▁w11 $A ▁w12", special_tokens=[("▁w11", 11), ("▁w12", 12)]
    )
    with_begin = generate(model, params, [[11, 5, 9, 1], [11, 7]], max_new_tokens=8)
    without = completed(parts)
    given = (model, params, tokenizer)
    assert completed(given) == [" " + tokenizer.decode(row) for row in with_begin]
    assert completed(given) != without
    assert completed(given, add_special_tokens=False) == without
