"""The plain cache: every token of prompt and answer is kept.

Idea     Nothing is selected: the recent tokens are all tokens.
Memory   2 * layers * batch * kv_heads * (prompt + new tokens) * head_dim * itemsize
         bytes.
See      tests/kvcache/test_policies.py, tests/kvcache/test_turn.py
"""

import dataclasses
import sys

from jmem.kvcache.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps everything; what the others are compared with."""

    @property
    def recent(self) -> int:
        return sys.maxsize

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        return (0,) * layers
