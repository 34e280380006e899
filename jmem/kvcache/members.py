"""The family: every kind of cache and every way to shorten a prompt, by name.

A new member joins here, and with that the suites of tests/kvcache. Settings are small
enough to leave out most of 50 tokens, for a model of four layers.
"""

from collections.abc import Mapping

from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.method import CacheMethod
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.shorten import Shorten
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import WindowKV

POLICIES: Mapping[str, Policy] = {
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
    "windowkv aggregation": WindowKV.for_task(
        "aggregation", capacity=14, window=3, observation=5, group=1, divisor=3
    ),
}
"""Those that choose which tokens stay."""

CACHES: Mapping[str, CacheMethod] = {**POLICIES}
"""Every cache; one that is no policy joins here."""

SHORTENS: Mapping[str, Shorten] = {
    "gemfilter": GemFilter(layer=1, tokens=9, kernel=3),
    "gemfilter probability": GemFilter(
        layer=0, tokens=39, queries=2, score="probability"
    ),
    "gemfilter windows": GemFilter(
        layer=2, tokens=12, window=4, keep_first=2, keep_last=3
    ),
}
