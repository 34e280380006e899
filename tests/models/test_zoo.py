"""The zoo's dimensions give the parameter counts that the model cards state."""

import jax
import pytest

from jmem.models import zoo
from jmem.models.decoder import Decoder

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # Less the two rows of OPT's table of positions that no position reads.
    "opt-125m": 125_239_296 - 2 * 768,
    "opt-1.3b": 1_315_758_080 - 2 * 2048,
    "opt-6.7b": 6_658_473_984 - 2 * 4096,
    "opt-13b": 12_853_473_280 - 2 * 5120,
    "opt-30b": 29_974_540_288 - 2 * 7168,
    "opt-66b": 65_719_701_504 - 2 * 9216,
    "opt-175b": 174_604_468_224 - 2 * 12_288,
    "phi-2": 2_779_683_840,
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_parameters_are_those_of_the_model_card(name):
    config = zoo.get(name)
    leaves = jax.tree.leaves(Decoder(config).abstract())
    assert sum(leaf.size for leaf in leaves) == config.parameters == PUBLISHED[name]


def test_an_unknown_model_offers_the_nearest_name():
    with pytest.raises(ValueError, match=r"'llama2-7'.*did you mean 'llama2-7b'"):
        zoo.get("llama2-7")
