"""What several experiments are asked alike, and what is refused."""

import dataclasses

import pytest
from toy_experiment import Config

from experiments.harness.settings import Card, Compiled, Here, Weights, need
from jmem.sharding import Layout
from jmem.targets import resolve


class TestNeed:
    """One helper refuses what is out of range."""

    @pytest.mark.parametrize(
        ("field", "value", "rules", "words"),
        [
            ("chunk", 0, {"least": 1}, "chunk=0; need >= 1."),
            ("chunk", 2, {"above": 0, "below": 2}, "chunk=2; need > 0 and < 2."),
            ("chunk", 9, {"most": 8, "why": "so"}, "chunk=9; need <= 8; so."),
            ("only", (), {"some": True}, r"only=(); need one or more."),
            (
                *("shape", (0, 1), {"above": 0, "once": True}),
                "shape=(0, 1); need each > 0, none twice.",
            ),
            ("shape", (1, 1), {"once": True}, "shape=(1, 1); need none twice."),
        ],
    )
    def test_it_says_which_field_and_what_it_needs(self, field, value, rules, words):
        with pytest.raises(ValueError) as caught:
            need(dataclasses.replace(Config(), **{field: value}), field, **rules)
        assert str(caught.value) == f"toy_experiment: {words}"

    def test_what_is_within_or_nothing_passes(self):
        need(Config(chunk=None), "chunk", least=1)
        need(Config(), "shape", least=1, most=2, some=True, once=True)
        need(Config(), "only", least=1, once=True)

    def test_a_table_speaks_for_itself(self):
        with pytest.raises(ValueError, match=r"^Compiled: batch_size=0; need >= 1\.$"):
            Compiled(batch_size=0)


class TestSettings:
    def test_a_sequence_must_fit_the_positions(self):
        weights = Weights(model="gpt2")
        assert weights.dimensions(prompt=1000, new_tokens=24).layers == 12
        with pytest.raises(ValueError) as caught:
            weights.dimensions(prompt=1000, new_tokens=25)
        assert str(caught.value) == (
            "Weights: prompt=1000 + new_tokens=25 exceed the 1,024 positions of gpt2."
        )

    def test_compiled_and_run_are_two_models(self):
        card, here = Card(dtype="mixed"), Here()
        dims = Weights().dimensions()
        model = card.build(resolve("h200"), dims, remat="dots")
        assert (str(model.dtype), str(model.stored_dtype)) == ("bfloat16", "float32")
        assert (model.attention, model.remat, model.chunk) == ("cudnn", "dots", None)
        own = here.build_here(dims, chunk=8)
        assert (own.attention, own.remat, own.chunk) == ("xla", "none", 8)

    def test_a_mesh_and_its_target_are_of_one_size(self):
        dims = Weights().dimensions()
        with pytest.raises(ValueError, match=r"gpu='h200x4' is 4 devices, and mesh"):
            Card().build(resolve("h200x4"), dims, layout=Layout(fsdp=2))

    def test_a_checkpoint_without_a_tokenizer_is_refused(self, checkpoint):
        weights = Weights(model=str(checkpoint))
        model = Here().build_here(weights.dimensions())
        opened, tokenizer = weights.open(model)
        assert opened.dtype == "float32"
        assert tokenizer.get_vocab_size() == 257
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (checkpoint / name).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"put the model.s tokenizer\.json beside"):
            weights.open(model)
