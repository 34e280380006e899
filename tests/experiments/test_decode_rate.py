"""The rate of decoding: a filled cache is timed, and a ratio is judged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from experiments import decode_rate
from experiments.decode_rate import (
    POINTS,
    POLICIES,
    Point,
    Rate,
    below,
    filled,
    rates,
    settings,
)
from jmem.kvcache.cache import held
from jmem.models.decoder import Decoder

MODEL = Decoder(dataclasses.replace(TINY, layers=4, max_positions=128))
SMALL = {
    "full": POLICIES["full"],
    "snapkv": dataclasses.replace(POLICIES["snapkv"], capacity=24, window=8),
    "windowkv": dataclasses.replace(
        POLICIES["windowkv"], capacity=16, observation=8, group=2, divisor=4
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_all_slots_that_a_prompt_fills_are_attended(name):
    plan = SMALL[name].plan(MODEL, prompt=64, new_tokens=4, batch_size=2)
    cache = filled(plan, jax.random.key(0))
    assert {n: (a.shape, a.dtype) for n, a in cache._asdict().items()} == {
        n: (a.shape, a.dtype) for n, a in plan.arrays().items()
    }
    for layer, selected in enumerate(plan.selected):
        last = jnp.full((2,), plan.prompt - 1, jnp.int32)
        _, seen = held(plan, cache, last, jnp.int32(layer))
        assert (np.asarray(seen.sum(axis=-1)) == selected + plan.recent).all()


def test_every_policy_is_timed_against_the_full_cache(monkeypatch):
    monkeypatch.setattr(decode_rate, "POLICIES", SMALL)
    params = jax.tree.map(jnp.asarray, random_params(MODEL.config))
    point = Point(prompt=64, batch=2, expect=1.0)
    given = {"limit": 2**40, "steps": 4}
    found = {r.policy: r for r in rates(MODEL, params, "small", point, **given)}
    assert list(found) == list(SMALL)
    assert found["full"].ratio == 1.0
    assert found["windowkv"].cache_bytes < found["full"].cache_bytes
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for one in found.values():
        assert one.tokens_per_second is not None
        assert one.tokens_per_second > 0
        table = params["embed"]["embedding"].nbytes
        assert one.read_bytes == one.cache_bytes + everything - table
        assert decode_rate.line(one, point, 1e12).endswith(f"{one.ratio:.2f}")
    full = {r.policy: r for r in rates(MODEL, params, "small", point, limit=0, steps=4)}
    assert all(r.tokens_per_second is None and r.ratio is None for r in full.values())
    assert decode_rate.line(full["full"], point, 1e12).endswith("does not fit")


def test_a_ratio_below_what_is_expected_is_told():
    sizes = {"cache_bytes": 1, "read_bytes": 1, "tokens_per_second": 1.0}
    found = [
        Rate(point=point, policy=policy, ratio=ratio, **sizes)
        for point, policy, ratio in (
            ("8k-b32", "full", 1.0),
            ("8k-b32", "snapkv", 2.4),
            ("32k-b16", "windowkv", 3.9),
            ("128k-b6", "windowkv", None),
        )
    ]
    (words,) = below(found)
    assert "32k-b16: windowkv is 3.90 times" in words


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    out = tmp_path / "rates.json"
    assert decode_rate.main(["--out", str(out)]) == 0
    assert "Nothing was measured" in capsys.readouterr().out
    assert not out.exists()


def test_records_are_written_row_by_row(monkeypatch, capsys, tmp_path):
    class Device:
        device_kind = "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_limit": 2**40}

    monkeypatch.setattr(decode_rate, "gpu", Device)
    monkeypatch.setattr(decode_rate._bench, "copy_bandwidth", lambda: 4.3e12)
    monkeypatch.setattr(decode_rate, "build", lambda: MODEL)
    monkeypatch.setattr(decode_rate, "POLICIES", {"full": SMALL["full"]})
    small = {"8k-b32": dataclasses.replace(POINTS["8k-b32"], prompt=64, batch=1)}
    monkeypatch.setattr(decode_rate, "POINTS", small)
    monkeypatch.setattr(decode_rate, "STEPS", 2)
    out = tmp_path / "runs" / "rates.json"
    decode_rate.main(["--out", str(out)])
    records = json.loads(out.read_text())
    assert records["device"] == "NVIDIA H200"
    assert records["rates"]["8k-b32"]["full"]["ratio"] == 1
    assert (records["status"], records["config"]) == ("complete", settings())
    assert "tokens/s" in capsys.readouterr().out
