"""`pack` and `pad`: which token is whose target, and what has weight."""

# pyright: reportOptionalSubscript=false, reportOptionalIterable=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false
# Segments are None in rows of one document.

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jmem.data.document import DataError
from jmem.data.windows import pack, pad

ids = st.lists(st.integers(0, 99), min_size=2, max_size=12)
documents = st.lists(ids, min_size=1, max_size=8).map(
    lambda lists: [np.array(ids, np.int32) for ids in lists]
)
masked = st.lists(
    ids.flatmap(
        lambda ids: st.tuples(
            st.just(ids),
            st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)),
        )
    ),
    min_size=1,
    max_size=8,
).map(
    lambda pairs: [
        np.ma.masked_array(np.array(ids, np.int32), mask=mask) for ids, mask in pairs
    ]
)
"""Sequences of which some tokens are not in the loss."""
lengths = st.integers(1, 17)


def check_static(batch, rows: int, seq_len: int) -> None:
    dtypes = [np.int32, np.int32, np.float32, np.int32]
    leaves = [leaf for leaf in batch if leaf is not None]
    assert [leaf.dtype for leaf in leaves] == dtypes[: len(leaves)]
    assert {leaf.shape for leaf in leaves} == {(rows, seq_len)}
    assert set(np.unique(batch.weights)) <= {0.0, 1.0}


class TestPack:
    @settings(deadline=None)
    @given(documents, lengths)
    def test_every_token_but_a_document_s_first_is_a_target_once(
        self, sequences, seq_len
    ):
        batch = pack(sequences, seq_len)
        counted = batch.weights == 1
        for leaf, part in ((batch.targets, slice(1, None)), (batch.tokens, slice(-1))):
            expected = np.concatenate([ids[part] for ids in sequences])
            np.testing.assert_array_equal(leaf[counted], expected)

    @settings(deadline=None)
    @given(documents, lengths)
    def test_segments_count_the_documents_of_each_row(self, sequences, seq_len):
        batch, joined = (pack(sequences, seq_len, how) for how in ("apart", "joined"))
        check_static(batch, len(batch.tokens), seq_len)
        numbers = np.concatenate([[n] * ids.size for n, ids in enumerate(sequences)])
        for row, own in enumerate(batch.segments):
            theirs = numbers[row * seq_len :][:seq_len]
            assert own[: theirs.size].tolist() == (theirs - theirs[0] + 1).tolist()
            assert not own[theirs.size :].any()
        np.testing.assert_array_equal(batch.tokens, joined.tokens)
        np.testing.assert_array_equal(batch.targets, joined.targets)
        assert joined.segments is None

    @settings(deadline=None)
    @given(documents, lengths)
    def test_of_one_stream_every_token_but_the_first_is_a_target_once(
        self, sequences, seq_len
    ):
        stream = np.concatenate(sequences)
        batch = pack(sequences, seq_len, "joined")
        counted = batch.weights == 1
        check_static(batch, -(-(stream.size - 1) // seq_len), seq_len)
        np.testing.assert_array_equal(batch.targets[counted], stream[1:])
        np.testing.assert_array_equal(batch.tokens[counted], stream[:-1])

    @settings(deadline=None)
    @given(documents, lengths)
    def test_only_the_tail_is_padded(self, sequences, seq_len):
        weights = pack(sequences, seq_len, "joined").weights.ravel()
        padding = int((weights == 0).sum())
        assert padding < seq_len
        assert not weights[weights.size - padding :].any()

    @settings(deadline=None)
    @given(documents, lengths)
    def test_rows_overlap_by_one_token(self, sequences, seq_len):
        """Without it the first token of each row would never be predicted."""
        batch = pack(sequences, seq_len)
        np.testing.assert_array_equal(batch.tokens[1:, 0], batch.targets[:-1, -1])

    def test_padding_is_id_zero(self):
        batch = pack([np.array([5, 6, 7], np.int32)], 4)
        assert batch.tokens.tolist() == [[5, 6, 7, 0]]
        assert batch.targets.tolist() == [[6, 7, 0, 0]]
        assert batch.weights.tolist() == [[1, 1, 0, 0]]

    def test_a_single_token_is_refused(self):
        with pytest.raises(DataError, match="one token in all"):
            pack([np.array([5], np.int32)], 4)


class TestPad:
    @settings(deadline=None)
    @given(documents, lengths)
    def test_a_row_is_the_start_of_its_document(self, sequences, seq_len):
        batch = pad(sequences, seq_len)
        check_static(batch, len(sequences), seq_len)
        for row, sequence in enumerate(sequences):
            kept = sequence[: seq_len + 1]
            counted = batch.weights[row] == 1
            assert counted.sum() == kept.size - 1
            np.testing.assert_array_equal(batch.tokens[row][counted], kept[:-1])
            np.testing.assert_array_equal(batch.targets[row][counted], kept[1:])

    @settings(deadline=None)
    @given(documents, lengths)
    def test_padding_comes_last_and_is_zero(self, sequences, seq_len):
        batch = pad(sequences, seq_len)
        assert (np.diff(batch.weights, axis=1) <= 0).all()
        padding = batch.weights == 0
        assert not batch.targets[padding].any()
        assert not batch.tokens[padding].any()

    def test_nothing_to_predict_is_refused(self):
        sequences = [np.array([5, 6], np.int32), np.array([5], np.int32)]
        with pytest.raises(DataError, match=r"sequence 1 has 1 token"):
            pad(sequences, 4)


@pytest.mark.parametrize("rows", [pack, pad])
class TestBoth:
    def test_refuses_no_length(self, rows):
        with pytest.raises(DataError, match="seq_len=0"):
            rows([np.array([5, 6], np.int32)], 0)

    def test_refuses_no_sequence(self, rows):
        with pytest.raises(DataError, match="no sequence given"):
            rows([], 4)


class TestMasked:
    """Masked tokens are read as before, and are the target of weight 0."""

    @settings(deadline=None)
    @given(masked, lengths)
    def test_pack_changes_weights_only(self, sequences, seq_len):
        plain = pack([np.ma.getdata(ids) for ids in sequences], seq_len)
        batch = pack(sequences, seq_len, "joined")
        np.testing.assert_array_equal(batch.tokens, plain.tokens)
        np.testing.assert_array_equal(batch.targets, plain.targets)
        out = np.concatenate([np.ma.getmaskarray(ids) for ids in sequences])[1:]
        weights = batch.weights.ravel()
        np.testing.assert_array_equal(weights[: out.size], ~out)
        assert not weights[out.size :].any()
        assert batch.weights.dtype == np.float32

    @settings(deadline=None)
    @given(masked, lengths)
    def test_pad_changes_weights_only(self, sequences, seq_len):
        plain = pad([np.ma.getdata(ids) for ids in sequences], seq_len)
        kept = [~np.ma.getmaskarray(ids)[1 : seq_len + 1] for ids in sequences]
        if not all(row.any() for row in kept):
            first = next(i for i, row in enumerate(kept) if not row.any())
            with pytest.raises(DataError, match=f"the first is number {first}"):
                pad(sequences, seq_len)
            return
        batch = pad(sequences, seq_len)
        np.testing.assert_array_equal(batch.tokens, plain.tokens)
        np.testing.assert_array_equal(batch.targets, plain.targets)
        for weights, row in zip(batch.weights, kept):
            np.testing.assert_array_equal(weights[: row.size], row)
            assert not weights[row.size :].any()

    def test_a_prompt_that_fills_its_row_is_refused(self):
        ids = np.ma.masked_array(np.arange(6, dtype=np.int32), np.arange(6) < 4)
        message = r"1 of 2 sequences have no counted target within seq_len=3, .* numb"
        with pytest.raises(DataError, match=message):
            pad([ids[3:], ids], 3)
        assert pad([ids], 4).weights.tolist() == [[0, 0, 0, 1]]
