"""What a program's donated arguments become, told without compiling it."""

import re

import jax


def count_aliased_bytes(lowered) -> int:
    """Of the results that XLA must put where donated arguments were."""
    results = jax.tree.leaves(lowered.stage.out_info)
    numbers = re.findall(r"tf.aliasing_output = (\d+)", lowered.as_text())
    assert len(set(numbers)) == len(numbers)
    aliased = [results[int(number)] for number in numbers]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in aliased)
