"""Tuned models in the forms of other programs: what those compute, names, refusals."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem.checkpoints
from jmem.checkpoints import CheckpointError, safetensors
from jmem.finetune import tuned
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.models.next_token import token_positions
from jmem.nn.stack import run_stack

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tuned"
METHODS = {  # as the committed run had them (tests/golden/README.md)
    "lisa": Lisa(active_layers=1, period=2),
    "lora": Lora(rank=4),
    "mixlora": MixLora(mixtures=(Mixture(rank=2, alpha=4.0, experts=4),), dropout=0.0),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "logits.npz") as file:
        return {key: file[key] for key in file.files}


def compute_logits(model, params, tokens):
    @jax.jit
    def run(params, tokens):
        positions = token_positions(tokens)
        x = model.embed(params, tokens, positions)
        x, _, _ = run_stack(model.block, params["blocks"], x, positions, model.ops)
        return model.head(params, x, model.ops)

    return np.asarray(run(params, jnp.asarray(tokens)))


def list_tensors(folder):
    """Names, shapes and dtypes of all files of tensors in a folder, and its files."""
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.read_file(file)
    found = {name: (own.shape, own.dtype) for name, own in tensors.items()}
    return found, {path.name for path in folder.iterdir()} - {"jmem.json"}


@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_the_programs_that_the_form_is_of(golden, name):
    """transformers, with PEFT and with the plug-in mixlora, computed the same folder.

    In float32: logits are up to 1.5, and two layers of sums are rounded in between.
    """
    model, params, checkpoint = tuned.load(GOLDEN / name, base=GOLDEN / "base")
    found = compute_logits(model, params, golden["tokens"])
    np.testing.assert_allclose(found, golden[name], rtol=0, atol=2e-5)
    assert np.abs(golden[name] - golden["base"]).max() > 0.1  # it was tuned
    assert checkpoint.require_tokenizer().decode([1, 2])


@pytest.mark.parametrize("name", METHODS)
def test_names_and_shapes_are_those_that_the_programs_opened(tmp_path, name):
    checkpoint = jmem.checkpoints.load(GOLDEN / "base")
    model, finetuner = Decoder(checkpoint.config), METHODS[name]
    params = checkpoint.params()
    state = finetuner.init(model, params, {}, jax.random.key(0))
    told = tuned.count_bytes(finetuner, model, checkpoint)
    saved = tmp_path / "tuned"
    assert tuned.save(finetuner, state, checkpoint, saved) == told
    assert list_tensors(saved) == list_tensors(GOLDEN / name)
    size = sum(path.stat().st_size for path in saved.iterdir())
    assert 0 <= size - told < 2**14  # safetensors' header
    if name == "lisa":
        return
    raw, wanted = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (saved, GOLDEN / name)
    )
    assert raw.pop("base_model_name_or_path") == str(GOLDEN / "base")
    assert wanted.pop("base_model_name_or_path")
    assert raw == wanted


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint in bfloat16 with defaults of generation, loaded as float32."""
    folder = tmp_path_factory.mktemp("own") / "model"
    tokenizer = jmem.checkpoints.load(GOLDEN / "base").require_tokenizer()
    config = dataclasses.replace(TINY, vocab_size=264)
    params = random_params(config, ml_dtypes.bfloat16)
    jmem.checkpoints.save(params, config, folder, tokenizer, eos_ids=(0,))
    more = {"eos_token_id": [0, 7], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(more))
    return jmem.checkpoints.load(folder, np.float32)


class TestWeights:
    def test_they_are_written_as_the_checkpoint_has_them(self, own, tmp_path):
        params = own.params()
        state = {"params": jax.tree.map(lambda w: w * 1.001, params), "stats": {}}
        model = Decoder(own.config)
        told = tuned.count_bytes(Full(), model, own)
        assert tuned.save(Full(), state, own, tmp_path / "a") == told
        found = tuned.load(tmp_path / "a")
        assert found.checkpoint.dtype == ml_dtypes.bfloat16
        for ours, given in zip(*map(jax.tree.leaves, (found.params, state["params"]))):
            np.testing.assert_array_equal(ours, given.astype(ml_dtypes.bfloat16))
        raw = json.loads((tmp_path / "a" / "generation_config.json").read_text())
        assert raw == {"eos_token_id": [0, 7], "temperature": 0.6}
        assert found.checkpoint.eos_ids == (0, 7)

    def test_or_in_another_dtype(self, own, tmp_path):
        state = {"params": own.params(), "stats": {}}
        tuned.save(Full(), state, own, tmp_path / "a", dtype="float32")
        assert tuned.load(tmp_path / "a").checkpoint.dtype == np.float32
        state["params"]["final_norm"]["scale"] *= 1e6
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds"):
            tuned.save(Full(), state, own, tmp_path / "b", dtype="float16")
        assert not list(tmp_path.glob("*b*"))  # nor a part of it
        with pytest.raises(ValueError, match="dtype=int8 is not one of float32"):
            tuned.save(Full(), state, own, tmp_path / "b", dtype="int8")

    def test_a_folder_that_holds_something_is_left_alone(self, own, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        state = {"params": own.params(), "stats": {}}
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            tuned.save(Full(), state, own, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestAdapters:
    def test_one_over_a_quantised_base_names_it(self, own, tmp_path):
        lora = Lora(rank=2, maps=("q",))
        shapes = tuned.describe_state(lora, Decoder(own.config))["lora"]
        lora = dataclasses.replace(lora, base="nf4")
        trained = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes)
        tuned.save(lora, {"lora": trained}, own, tmp_path / "a")
        found = jmem.checkpoints.load_adapter(tmp_path / "a", own.config)
        assert found.base == str(own.path)
        assert found.settings["maps"] == ("q",)
        jax.tree.map(np.testing.assert_array_equal, found.adapters, trained)
        file = tmp_path / "a" / "adapter_config.json"
        for name, words in ((None, "names no"), ("me/mine", "belongs to 'me/mine', w")):
            raw = json.loads(file.read_text()) | {"base_model_name_or_path": name}
            file.write_text(json.dumps(raw))
            with pytest.raises(CheckpointError, match=rf"{words}.*load\(folder, base="):
                tuned.load(tmp_path / "a")

    def test_one_that_keeps_zeros_is_written_as_weights(self, own, tmp_path):
        """PEFT would add its product to the zeros."""
        lora = Lora(rank=2, maps=("q",), keep_zeros=True)
        params = own.params()
        leaf = params["blocks"]["attention"]["q"]
        leaf["kernel"] = leaf["kernel"].at[:, ::2].set(0)
        shapes = tuned.describe_state(lora, Decoder(own.config))["lora"]
        trained = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes)
        state = {"params": params, "lora": trained, "stats": {}}
        told = tuned.count_bytes(lora, Decoder(own.config), own)
        assert tuned.save(lora, state, own, tmp_path / "a", dtype="float32") > told
        found = tuned.load(tmp_path / "a").params["blocks"]["attention"]["q"]["kernel"]
        expected = leaf["kernel"].at[:, 1::2].add(lora.scale * 2 * 0.5 * 0.5)
        np.testing.assert_array_equal(found, expected)

    def test_one_that_is_not_finite_is_not_written(self, own, tmp_path):
        lora = Lora(rank=2, maps=("q",))
        shapes = tuned.describe_state(lora, Decoder(own.config))["lora"]
        trained = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes)
        trained["attention"]["q"]["lora_b"][1, 0, 3] = np.nan
        words = r"layers\.1\.self_attn\.q_proj\.lora_B\.weight' holds .* not finite"
        with pytest.raises(CheckpointError, match=words):
            tuned.save(lora, {"lora": trained}, own, tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_gpt2s_q_k_and_v_are_counted_as_the_one_they_become(self, own, tmp_path):
        biased = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
        kind = {"norm": "layer", "positions": "learned", "activation": "gelu_new"}
        config = dataclasses.replace(
            own.config, **biased, **kind, kv_heads=own.config.heads, gated=False
        )
        gpt2, model = dataclasses.replace(own, config=config), Decoder(config)
        lora = Lora(rank=2, maps=("q", "k", "v"))
        state = lora.init(model, random_params(config), {}, jax.random.key(0))
        told = tuned.count_bytes(lora, model, gpt2)
        assert tuned.save(lora, state, gpt2, tmp_path / "a") == told
        raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert raw["rank_pattern"] == {"c_attn": 6}

    def test_of_several_mixtures_one_is_asked_for(self, own, tmp_path):
        both = MixLora(mixtures=(Mixture(rank=2), Mixture(rank=1, experts=2)))
        shapes = tuned.describe_state(both, Decoder(own.config))
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        with pytest.raises(ValueError, match="number=None, but 2 mixtures"):
            tuned.save(both, state, own, tmp_path / "a")
        tuned.save(both, state, own, tmp_path / "a", number=1)
        found = jmem.checkpoints.load_mixlora(tmp_path / "a", own.config)
        assert (found.settings["rank"], found.settings["experts"]) == (1, 2)
        assert found.settings["dropout"] == both.dropout

    def test_a_base_without_names_for_it_is_refused_before_training(self, own):
        config = zoo.get("gpt2")
        gpt2 = dataclasses.replace(own, config=config)
        mixlora = MixLora(mixtures=(Mixture(rank=2, experts=2),))
        with pytest.raises(CheckpointError, match="no names for the maps of a base"):
            tuned.count_bytes(mixlora, Decoder(config), gpt2)
