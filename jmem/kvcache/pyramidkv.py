"""PyramidKV: SnapKV with more slots in the lower layers than in the upper ones.

Paper    Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal
         Information Funneling, 2024, arXiv:2406.02069. Official code:
         Zefan-Cai/KVCache-Factory.
Idea     Lower layers attend widely and upper ones to few tokens, so the budget falls
         from layer to layer by equal steps, around the same mean.
Memory   That of SnapKV with the same capacity, give or take the rounding of the steps.
Differs  Budgets follow the plan's prompt, not each row's: rows of a batch that are
         shorter keep what fits in theirs.
See      tests/kvcache/test_snapkv.py, tests/kvcache/test_goldens.py
"""

import dataclasses

from jmem.kvcache.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """The paper's LongBench setting: window 8, max pooling over 7 tokens."""

    window: int = 8
    divisor: int = 20
    """The top layer's budget is the mean one divided by this (beta in the paper)."""

    def __post_init__(self):
        super().__post_init__()
        if self.divisor < 1:
            raise ValueError(
                f"PyramidKV: divisor={self.divisor} must be at least 1, where all "
                "layers have the same budget."
            )

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        """In the official code's integer arithmetic."""
        mean, rest = self.capacity - self.window, prompt - self.window
        if prompt < max(2 * mean, self.capacity) or layers == 1:
            return (mean,) * layers  # below capacity, that is all of the prompt
        top = mean // self.divisor
        bottom = 2 * mean - top
        if bottom >= rest:
            bottom, top = rest, 2 * mean - rest
        step = (bottom - top) // (layers - 1)
        return tuple(bottom - layer * step for layer in range(layers))
