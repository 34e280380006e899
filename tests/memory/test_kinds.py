"""Labels and their kinds, in the words their users have."""

import pytest

from jmem.memory import kinds


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("params", kinds.PARAMETERS),
        ("weights", kinds.PARAMETERS),
        ("lora", kinds.PARAMETERS),
        ("state.params", kinds.PARAMETERS),
        ("opt_state", kinds.OPTIMIZER),
        ("optimizer", kinds.OPTIMIZER),
        ("Adam m", kinds.OPTIMIZER),
        ("adam v", kinds.OPTIMIZER),
        ("lora optimizer", kinds.OPTIMIZER),
        ("kv cache", kinds.KV_CACHE),
        ("cache", kinds.KV_CACHE),
        ("batch", kinds.BATCH),
        ("x", kinds.BATCH),
        ("codebook", kinds.OTHER_ARGUMENTS),
        ("", kinds.OTHER_ARGUMENTS),
        (None, kinds.OTHER_ARGUMENTS),
    ],
)
def test_a_label_has_the_kind_its_words_say(label, kind):
    assert kinds.of_label(label) == kind


def test_every_kind_is_explained_and_drawn():
    from jmem.memory.plot import COLOURS

    assert set(kinds.MEANING) == set(kinds.KINDS)
    assert set(COLOURS) == set(kinds.KINDS) - {kinds.FRAGMENTATION}
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize(
    ("op_name", "backward"),
    [
        ("jit(f)/transpose(jvp())/dot_general", True),
        ("jit(f)/while/body/transpose(jvp(Block))/mul", True),
        ("jit(f)/jvp()/transpose", False),  # the primitive, not the transformation
        ("jit(f)/mlp/dot_general", False),
    ],
)
def test_the_backward_pass_is_known_by_its_scope(op_name, backward):
    assert kinds.is_backward(op_name) == backward
