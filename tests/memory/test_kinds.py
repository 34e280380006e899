"""Labels and their kinds, in the words their users have."""

from typing import ClassVar, get_args

import jax
import jax.numpy as jnp
import pytest

from jmem.memory import kinds
from jmem.memory.measure import measure
from jmem.program import Kind, Label, Program


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
    assert kinds.classify_label(label) == kind


def register_frame(state, frame):
    """Of a mapping system: points are moved and drawn, a pose and statistics follow."""
    world, camera = state["map"], state["cameras"]
    seen = world["points"] @ camera["rotation"] + camera["shift"][None]
    depth = seen @ jnp.ones((3, frame.shape[0]), frame.dtype)
    error = (depth - frame.reshape(1, -1)).mean(axis=1)
    points = world["points"] + 1e-3 * error[:, None] * seen
    return {
        "map": {"points": points, "colours": world["colours"]},
        "cameras": camera | {"shift": camera["shift"] + error.mean()[None]},
        "statistics": 0.9 * state["statistics"] + 0.1 * error,
    }, error.mean()


POINTS, PIXELS = 2**16, 256


def frame_program(labels):
    """The step as a program: 4 MiB of state that is neither weights nor cache."""

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    state = {
        "map": {"points": spec(POINTS, 3), "colours": spec(POINTS, 3)},
        "cameras": {"rotation": spec(3, 3), "shift": spec(3)},
        "statistics": spec(POINTS),
    }
    args = (state, spec(PIXELS))
    return Program(register_frame, args, donate=(0,), labels=labels)


class TestStatedKinds:
    """A label says what its words cannot: a map is no parameter and no cache."""

    LABELS: ClassVar = {
        "map": Label((0, "map"), kind="state"),
        "cameras": Label([(0, "cameras/rotation"), (0, "cameras/shift")], kind="state"),
        "running statistics": Label((0, "statistics"), kind="state"),
        "frame": Label((1, ""), kind="batch"),
    }

    def test_a_mapping_step_s_memory_is_told_by_kind(self):
        report = measure(frame_program(self.LABELS), target="h200", bounds=False)
        state = 4 * (6 * POINTS + 12 + POINTS)
        assert report.by_label == {
            "map": 4 * 6 * POINTS,
            "cameras": 4 * 12,
            "running statistics": 4 * POINTS,
            "frame": 4 * PIXELS,
        }
        # What lives beside it for a while may be a copy of it, and of its kind.
        assert state <= report.by_kind[kinds.STATE] < 1.1 * state
        assert report.by_kind[kinds.BATCH] == 4 * PIXELS
        assert kinds.OTHER_ARGUMENTS not in report.by_kind
        assert sum(report.by_kind.values()) == report.device_bytes

    def test_words_alone_leave_them_other_arguments(self):
        where = {"map": (0, "map"), "poses": (0, "cameras"), "x": (1, "")}
        found = kinds.classify_arguments(frame_program(where))
        assert found == [kinds.OTHER_ARGUMENTS] * 5 + [kinds.BATCH]

    def test_a_stated_kind_goes_before_the_word(self):
        labels = {"model": Label((0, ""), kind="state"), "x": (1, "")}
        program = frame_program(labels)
        assert kinds.classify_arguments(program) == [kinds.STATE] * 5 + [kinds.BATCH]
        assert program.classify_leaves() == ["state"] * 5 + [None]

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("stat", r"Label: kind='stat' is none .* did you mean 'state'"),
            (kinds.WORKSPACE, "kind='workspace' is none of an argument's kinds, param"),
        ],
    )
    def test_another_kind_is_refused(self, kind, message):
        label = Label((0, ""))
        object.__setattr__(label, "kind", kind)  # the tests' type check would be first
        with pytest.raises(ValueError, match=message):
            label.__post_init__()

    def test_every_kind_that_can_be_stated_is_one(self):
        assert set(get_args(Kind)) < set(kinds.KINDS)


def test_every_kind_is_drawn():
    from jmem.memory.plot import COLOURS

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
