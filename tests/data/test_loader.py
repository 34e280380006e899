"""`Loader`: `batch(step)` is a function of data, seed, batch size and step alone."""

# pyright: reportOptionalSubscript=false, reportOptionalIterable=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false
# Segments are None in rows of one document.

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jmem.data.batch import Batch
from jmem.data.document import DataError
from jmem.data.loader import Joint, Loader, draw_order, in_order
from jmem.train.loop import Data

sizes = st.integers(1, 40).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, rows))
)
seeds = st.integers(0, 2**40)
FIELDS = ("tokens", "targets", "weights")
"""Of rows of one document."""


def make(rows: int, seq_len: int = 2) -> Batch:
    tokens = (np.arange(rows)[:, None] * 100 + np.arange(seq_len)).astype(np.int32)
    return Batch(tokens, tokens + 1, np.ones(tokens.shape, np.float32))


def drawn(loader: Loader, steps: int) -> np.ndarray:
    """Row numbers in the order the steps show them."""
    return np.concatenate([loader.batch(s).tokens[:, 0] // 100 for s in range(steps)])


class TestBatch:
    @settings(deadline=None)
    @given(sizes, seeds)
    def test_every_epoch_shows_every_row_once(self, size, seed):
        rows, batch_size = size
        loader = Loader(make(rows), batch_size, seed)
        line = drawn(loader, 3 * loader.steps_per_epoch)
        for epoch in range(2):
            shown = np.sort(line[epoch * rows : (epoch + 1) * rows])
            np.testing.assert_array_equal(shown, np.arange(rows))

    @settings(deadline=None)
    @given(sizes, seeds, st.integers(0, 10**12))
    def test_a_fresh_loader_resumes_anywhere(self, size, seed, step):
        rows, batch_size = size
        before = Loader(make(rows), batch_size, seed).batch(step)
        draw_order.cache_clear()
        loader = Loader(make(rows), batch_size, seed)
        loader.batch(0)
        chex.assert_trees_all_equal(before, loader.batch(step))

    @settings(deadline=None)
    @given(sizes)
    def test_steps_per_epoch_is_the_fewest_that_show_all(self, size):
        rows, batch_size = size
        loader = Loader(make(rows), batch_size)
        steps = loader.steps_per_epoch
        assert set(drawn(loader, steps)) == set(range(rows))
        assert (steps - 1) * batch_size < rows

    def test_last_batch_is_completed_from_the_next_epoch(self, numbered):
        loader = Loader(numbered(5), batch_size=3, seed=9)
        line = np.concatenate([draw_order(9, 0, 5), draw_order(9, 1, 5)])
        np.testing.assert_array_equal(loader.batch(1).tokens[:, 0], line[3:6])

    def test_shape_is_static_and_fields_stay_together(self, numbered):
        loader = Loader(numbered(7, 4), batch_size=3)
        for step in range(9):
            batch = loader.batch(step)
            assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(3, 4)}
            np.testing.assert_array_equal(batch.targets, batch.tokens + 1)

    def test_epochs_and_seeds_differ(self):
        orders = [draw_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
        assert len({tuple(o) for o in orders}) == 4

    def test_order_is_pinned(self):
        """Another NumPy must not change what a resumed run reads."""
        assert draw_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]

    def test_batches_do_not_alias_the_data(self, numbered):
        data = numbered(4)
        Loader(data, batch_size=4).batch(0).tokens[:] = -1
        assert (data.tokens >= 0).all()

    def test_step_may_be_an_array_scalar_but_no_fraction(self, numbered):
        loader = Loader(numbered(4), batch_size=2)
        np.testing.assert_array_equal(
            loader.batch(jnp.int32(3)).tokens, loader.batch(3).tokens
        )
        with pytest.raises(TypeError):
            loader.batch(1.5)  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match="step=-1 is negative"):
            loader.batch(-1)


class TestDigest:
    def test_digest_is_pinned(self, numbered):
        assert Loader(numbered(4), batch_size=1).digest == "71e0fe258cdc9eab"

    def test_digest_is_of_the_data_only(self, numbered):
        one, two = numbered(4), numbered(4)
        assert Loader(one, 2, seed=1).digest == Loader(two, 3, seed=2).digest

    @pytest.mark.parametrize("field", FIELDS)
    def test_one_changed_value_changes_it(self, numbered, field):
        data = numbered(4)
        changed = getattr(data, field).copy()
        changed[2, 1] += 1
        other = data._replace(**{field: changed})
        assert Loader(data, 1).digest != Loader(other, 1).digest

    def test_another_row_length_changes_it(self, numbered):
        data = numbered(4, 6)
        other = jax.tree.map(lambda leaf: leaf.reshape(6, 4), data)
        assert Loader(data, 1).digest != Loader(other, 1).digest


class TestOrder:
    """What a run that goes on must have as it was, beside the data."""

    def test_of_a_loader(self, numbered):
        loader = Loader(numbered(4), 2, seed=7)
        assert loader.order == {"batch_size": 2, "seed": 7}

    def test_of_several(self, numbered):
        joint = Joint((Loader(numbered(4), 2, seed=1), Loader(numbered(5), 2, seed=2)))
        assert joint.order == {
            "loaders[0].batch_size": 2,
            "loaders[0].seed": 1,
            "loaders[1].batch_size": 2,
            "loaders[1].seed": 2,
        }


class TestSegments:
    """Rows of several documents keep the number of each token's."""

    def test_they_follow_their_rows(self, numbered):
        data = numbered(5)
        data = data._replace(segments=data.tokens + 1)
        for batch in (Loader(data, 2).batch(3), next(in_order(data, 2))):
            np.testing.assert_array_equal(batch.segments, batch.tokens + 1)
        *_, last = in_order(data, 2)
        assert not last.segments[1].any()

    def test_others_are_other_data(self, numbered):
        data = numbered(5)
        whole, parted = (
            data._replace(segments=np.full_like(data.tokens, own)) for own in (1, 2)
        )
        digests = {Loader(own, 2).digest for own in (data, whole, parted)}
        assert len(digests) == 3

    def test_beside_them_a_row_without_is_one_document(self, numbered):
        data = numbered(5)
        parted = data._replace(segments=data.tokens + 1)
        joint = Joint((Loader(data, 2), Loader(parted, 2)))
        batch = joint.batch(0)
        assert (batch.segments[:2] == 1).all()
        np.testing.assert_array_equal(batch.segments[2:], batch.tokens[2:] + 1)


class TestRefusals:
    def test_fewer_rows_than_a_batch(self, numbered):
        with pytest.raises(DataError, match=r"3 row\(s\) of 5 tokens, .* batch_size=4"):
            Loader(numbered(3, 5), batch_size=4)

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_no_batch(self, numbered, batch_size):
        with pytest.raises(DataError, match=f"batch_size={batch_size}"):
            Loader(numbered(3), batch_size)
        with pytest.raises(DataError, match=f"batch_size={batch_size}"):
            next(in_order(numbered(3), batch_size))

    def test_negative_seed(self, numbered):
        with pytest.raises(DataError, match="seed=-1 is negative"):
            Loader(numbered(3), 1, seed=-1)

    def test_nothing_counts(self, numbered):
        data = numbered(3)
        with pytest.raises(DataError, match="every weight is 0"):
            Loader(data._replace(weights=data.weights * 0), 1)

    def test_fields_of_unequal_shape(self, numbered):
        data = numbered(3)
        with pytest.raises(DataError, match=r"one \[N, T\] for all"):
            Loader(data._replace(targets=data.targets[:, 1:]), 1)


class TestInOrder:
    @settings(deadline=None)
    @given(st.integers(1, 20), st.integers(1, 25))
    def test_every_row_once_and_fill_weighs_nothing(self, rows, batch_size):
        data = make(rows)
        batches = list(in_order(data, batch_size))
        assert {b.tokens.shape for b in batches} == {(batch_size, 2)}
        for field in FIELDS:
            joined = np.concatenate([getattr(b, field) for b in batches])
            np.testing.assert_array_equal(joined[:rows], getattr(data, field))
            assert not joined[rows:].any()
            assert joined.dtype == getattr(data, field).dtype


class TestJoint:
    def test_rows_of_each_loader_stand_together_in_order(self, numbered):
        loaders = (Loader(numbered(7), 2, seed=1), Loader(numbered(5), 2, seed=2))
        joint = Joint(loaders)
        for step in range(9):
            batch, parts = joint.batch(step), [x.batch(step) for x in loaders]
            for field in FIELDS:
                joined, one, two = (getattr(b, field) for b in (batch, *parts))
                assert joined.shape == (4, 3)
                assert joined.dtype == one.dtype
                np.testing.assert_array_equal(joined[:2], one)
                np.testing.assert_array_equal(joined[2:], two)

    def test_one_loader_is_that_loader(self, numbered):
        loader = Loader(numbered(5), 2)
        chex.assert_trees_all_equal(Joint((loader,)).batch(3), loader.batch(3))

    def test_it_trains_as_a_loader_does(self, numbered):
        data: Data = Joint((Loader(numbered(5), 2),))
        assert isinstance(data, Data)

    def test_digest_is_of_every_loader_and_their_order(self, numbered):
        one, two, other = (Loader(numbered(rows), 2) for rows in (4, 5, 6))
        digests = [
            Joint(loaders).digest
            for loaders in ((one, two), (two, one), (one, other), (one,), (one, one))
        ]
        assert len(set(digests)) == 5
        assert {len(digest) for digest in digests} == {16}

    def test_digest_is_of_the_data_only(self, numbered):
        made = [
            Joint((Loader(numbered(4), size, seed=size), Loader(numbered(5), size)))
            for size in (2, 3)
        ]
        assert made[0].digest == made[1].digest

    def test_an_epoch_is_that_of_the_longest(self, numbered):
        joint = Joint((Loader(numbered(4), 2), Loader(numbered(9), 2)))
        assert joint.steps_per_epoch == 5

    def test_refuses_no_loader(self):
        with pytest.raises(DataError, match="loaders is empty; give at least one"):
            Joint(())

    def test_refuses_unequal_batch_sizes(self, numbered):
        loaders = tuple(Loader(numbered(5), size) for size in (2, 2, 3))
        message = r"loaders\[2\]\.batch_size=3 and loaders\[0\]\.batch_size=2, .* one b"
        with pytest.raises(DataError, match=message):
            Joint(loaders)

    def test_refuses_unequal_lengths_and_names_the_longest(self, numbered):
        loaders = tuple(Loader(numbered(5, length), 2) for length in (4, 3, 6))
        message = r"loaders\[1\] .* of 3 tokens and loaders\[0\] of 4, .*seq_len=6\)"
        with pytest.raises(DataError, match=message):
            Joint(loaders)
