"""Wilson's interval: published values, its ends, and what is no share."""

import pytest

from jmem.evaluate.interval import wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17, 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


def test_it_is_the_set_of_shares_that_are_not_refused():
    """The definition: |share - p| <= z sqrt(p (1 - p) / n), solved for p."""
    low, high = wilson(7, 30)
    for p in (low, high):
        assert (7 / 30 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 30)


def test_ends_are_exact_and_mirrored():
    for trials in (1, 7, 40):
        assert wilson(0, trials)[0] == 0.0
        assert wilson(trials, trials)[1] == 1.0
    low, high = wilson(3, 11)
    assert wilson(8, 11) == pytest.approx((1 - high, 1 - low))


def test_more_confidence_is_wider():
    inner, outer = wilson(9, 20, 0.8), wilson(9, 20, 0.99)
    assert outer[0] < inner[0] < 9 / 20 < inner[1] < outer[1]


@pytest.mark.parametrize(
    ("hits", "trials", "confidence", "message"),
    [
        (0, 0, 0.95, "at least 1"),
        (3, 2, 0.95, "hits=3 of trials=2"),
        (-1, 2, 0.95, "hits=-1"),
        (1, 2, 1.0, r"confidence=1\.0"),
        (1, 2, float("nan"), "confidence=nan"),
    ],
)
def test_refuses(hits, trials, confidence, message):
    with pytest.raises(ValueError, match=message):
        wilson(hits, trials, confidence)
