"""Damaged files: an error with a name or a whole result; no crash, no hang, no bomb."""

import functools
import json
import resource
import signal
import struct
import warnings
from typing import Any

import chex
import numpy as np
import pytest
from mutations import count, damage_bytes, damage_json
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.models.decoder import Decoder

from . import tiny

CASES = count(100)
SECONDS = 5
"""No tiny file takes longer, on a machine busy with other work."""
BOMB_BYTES = 256 << 20
"""Far above what tiny files need, far below what their damaged sizes may claim."""


@functools.cache
def abstract(config):
    return Decoder(config).abstract()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of each kind of checkpoint."""
    import gguf

    from .test_tokenizer import sentencepiece_metadata

    root = tmp_path_factory.mktemp("originals")
    config = tiny.VARIANTS["scaled"]
    tensors = tiny.torch_tensors(random_params(config), "huggingface")
    more: dict[str, Any] = {"tokenizer": tiny.tiny_tokenizer()}
    tiny.write_folder(root / "single", config, tensors, **more)
    tiny.write_folder(root / "sharded", config, tensors, shards=2, **more)
    for name in ("gguf", "quantised gguf"):
        (root / name).mkdir()
    tiny.write_gguf(root / "gguf" / "m.gguf", config, random_params(config))
    words = sentencepiece_metadata()
    config = tiny.DecoderConfig(**{**vars(TINY), "vocab_size": 319})
    tiny.write_gguf(
        root / "quantised gguf" / "m.gguf",
        config,
        random_params(config),
        quantise=lambda _: gguf.GGMLQuantizationType.Q4_1,
        metadata=words,
    )
    return {folder.name: bytes_of(folder) for folder in root.iterdir()}


def damaged(name: str, raw: bytes, random: np.random.Generator) -> bytes:
    if random.random() < 0.4 or name.endswith(".gguf"):
        return damage_bytes(raw, random)
    if name.endswith(".json"):
        return json.dumps(damage_json(json.loads(raw), random)).encode()
    (length,) = struct.unpack("<Q", raw[:8])
    header = damage_json(json.loads(raw[8 : 8 + length]), random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


class Hang(BaseException):
    """Not an Exception, so that no handler of the code under test can take it."""


@pytest.fixture
def deadline():
    def stop(*_):
        raise Hang(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["single", "sharded", "gguf", "quantised gguf"])
def test_damaged_files_give_an_error_or_a_whole_result(
    kind, originals, tmp_path, deadline, capfd
):
    folder = tmp_path / "m"
    folder.mkdir()
    source = folder / "m.gguf" if "gguf" in kind else folder
    for name, raw in originals[kind].items():
        (folder / name).write_bytes(raw)
    whole = checkpoints.load(source).params()  # undamaged; also compiles
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    outcomes = {"error": 0, "result": 0}
    names = sorted(originals[kind])
    for case in range(CASES):
        random = np.random.default_rng([case, sum(map(ord, kind))])
        name = names[random.integers(0, len(names))]
        (folder / name).write_bytes(damaged(name, originals[kind][name], random))
        deadline()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", checkpoints.CheckpointWarning)
                checkpoint = checkpoints.load(source)
            params = checkpoint.params()
            if kind == "quantised gguf":
                checkpoint.params(packed=True)
        except CheckpointError as error:
            if not str(error).startswith(str(tmp_path)):
                pytest.fail(f"case {case}: the message names no file: {error}")
            outcomes["error"] += 1
        except BaseException as error:
            pytest.fail(f"case {case}, {name}: {error!r}")
        else:
            chex.assert_trees_all_equal_shapes(params, abstract(checkpoint.config))
            outcomes["result"] += 1
        (folder / name).write_bytes(originals[kind][name])

    assert outcomes["error"] > CASES / 4, "the damage reached nothing"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown * 1024 < BOMB_BYTES
    chex.assert_trees_all_equal(checkpoints.load(source).params(), whole)
