"""Patterns: what they mean on a decoder's tree, and the way back from a split."""

import chex
import jax
import pytest

from jmem.finetune.patterns import find_matching, join, split
from jmem.program import by_key

CASES = {
    "head": ["head/kernel"],
    "head/kernel": ["head/kernel"],
    "blocks/attention": [f"blocks/attention/{n}/kernel" for n in "qkvo"],
    "blocks/*/o": ["blocks/attention/o/kernel"],
    "*norm": [
        "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        "final_norm/scale",
    ],
}


@pytest.mark.parametrize("pattern", CASES)
def test_a_pattern_means_paths_and_what_lies_below(tiny, pattern):
    paths = by_key(tiny.abstract())
    assert sorted(find_matching(pattern, paths, "train")) == sorted(CASES[pattern])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks/atention", r"x: 'blocks/atention' .* mean 'blocks/attention'"),
        ("head/kernels", r"did you mean 'head/kernel'"),
        ("Head", r"'Head' matches no parameter"),
        ("", "'' matches no parameter"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_with_the_nearest_path(
    tiny, pattern, message
):
    with pytest.raises(ValueError, match=message):
        find_matching(pattern, by_key(tiny.abstract()), "x")


def test_a_split_is_put_together_again(tiny):
    tree = tiny.abstract()
    chosen, rest = split(tree, ("embed", "*/q"), "train")
    assert by_key(chosen).keys() == {"embed/embedding", "blocks/attention/q/kernel"}
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree)) - 2
    chex.assert_trees_all_equal_structs(join(chosen, rest), tree)
    assert by_key(join(rest, chosen)) == by_key(tree)
    everything, nothing = split(tree, (), "train")
    assert (everything, jax.tree.leaves(nothing)) == (tree, [])
