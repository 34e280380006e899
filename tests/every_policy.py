"""The policies that the shared suite runs: a new one joins by being listed."""

from jmem.kvcache.full import Full
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import WindowKV

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "streaming_llm": StreamingLLM(capacity=20),
    "streaming_llm absolute": StreamingLLM(capacity=20, positions="absolute"),
    "snapkv": SnapKV(capacity=20, window=6, kernel=3),
    "snapkv query": SnapKV(
        capacity=20, window=6, kernel=5, pooling="average", select="query"
    ),
    "snapkv shared": SnapKV(capacity=20, window=6, reduce="max", select="shared"),
    "pyramidkv": PyramidKV(capacity=20, window=6, kernel=3, divisor=5),
    "windowkv": WindowKV(
        capacity=14, window=4, observation=6, group=2, best=2, divisor=4
    ),
    "windowkv aggregation": WindowKV.aggregation(
        capacity=14, window=3, observation=5, group=1, divisor=3
    ),
}
"""Small enough to leave out most of 50 tokens, for a model of four layers."""
