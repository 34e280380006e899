"""The rate of decoding: every cache is timed, and a ratio is judged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from tiny_decoder import TINY, random_params

from experiments import decode_rate
from experiments.decode_rate import (
    Command,
    Rate,
    find_slow,
    programs,
    settings,
    time_rates,
)
from experiments.harness import timed
from experiments.harness.timed import POINTS, POLICIES, Point
from jmem.models.decoder import Decoder
from jmem.targets import resolve

MODEL = Decoder(dataclasses.replace(TINY, layers=4, max_positions=128))
SMALL = {
    "full": POLICIES["full"],
    "snapkv": dataclasses.replace(POLICIES["snapkv"], capacity=24, window=8),
    "windowkv": dataclasses.replace(
        POLICIES["windowkv"], capacity=16, observation=8, group=2, divisor=4
    ),
}


def test_every_policy_is_timed_against_the_full_cache(monkeypatch):
    monkeypatch.setattr(timed, "POLICIES", SMALL)
    params = jax.tree.map(jnp.asarray, random_params(MODEL.config))
    point = Point(prompt=64, batch=2, expect=1.0)
    given = {"limit": 2**40, "steps": 4}
    found = {r.policy: r for r in time_rates(MODEL, params, "small", point, **given)}
    assert list(found) == list(SMALL)
    assert found["full"].ratio == 1.0
    assert found["windowkv"].cache_bytes < found["full"].cache_bytes
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for one in found.values():
        assert one.tokens_per_second is not None
        assert one.tokens_per_second > 0
        assert one.first_token_seconds is not None
        assert one.first_token_seconds > 0
        table = params["embed"]["embedding"].nbytes
        assert one.read_bytes == one.cache_bytes + everything - table
        assert decode_rate.format_row(one, point, 1e12).endswith(f"{one.ratio:.2f}")
    full = {
        r.policy: r for r in time_rates(MODEL, params, "small", point, limit=0, steps=4)
    }
    assert all(r.tokens_per_second is None and r.ratio is None for r in full.values())
    assert decode_rate.format_row(full["full"], point, 1e12).endswith("does not fit")


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
    (words,) = find_slow(found)
    assert "32k-b16: windowkv is 3.90 times" in words


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    out = tmp_path / "rates.json"
    assert decode_rate.main(Command(out=out)) == 0
    assert "decode_rate: no GPU is attached" in capsys.readouterr().out
    assert not out.exists()


def test_records_are_written_point_by_point(monkeypatch, attached, capsys, tmp_path):
    """A point is measured here, on a CPU that says it were a GPU."""

    class Device:
        device_kind = "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_limit": 2**40}

    monkeypatch.setattr(decode_rate, "find_gpu", Device)
    monkeypatch.setattr(decode_rate, "copy_bandwidth", lambda: 4.3e12)
    monkeypatch.setattr(timed, "build_reader", lambda target: MODEL)
    monkeypatch.setattr(timed, "POLICIES", {"full": SMALL["full"]})
    monkeypatch.setattr(decode_rate, "measure", decode_rate.measure_here)
    monkeypatch.setattr(decode_rate, "STEPS", 2)
    for name in POINTS:
        small = dataclasses.replace(POINTS[name], prompt=64, batch=1)
        monkeypatch.setitem(POINTS, name, small)
    out = tmp_path / "runs" / "rates.json"
    decode_rate.main(Command(only=("8k-b32", "32k-b16"), out=out))
    report = json.loads(out.read_text())
    assert report["device"] == "NVIDIA H200"
    assert list(report["rates"]) == ["8k-b32", "32k-b16"]
    assert report["rates"]["8k-b32"]["full"]["ratio"] == 1
    assert report["rates"]["8k-b32"]["copy_bytes_per_second"] == 4.3e12
    assert (report["status"], report["config"]) == ("complete", settings())
    assert "tokens/s" in capsys.readouterr().out


def test_a_points_programs_are_a_decoding_step_of_every_policy(monkeypatch):
    monkeypatch.setattr(timed, "build_reader", lambda target: MODEL)
    monkeypatch.setattr(timed, "POLICIES", SMALL)
    point = dataclasses.replace(POINTS["8k-b32"], prompt=64, batch=2)
    monkeypatch.setitem(POINTS, "8k-b32", point)
    found = programs("8k-b32", resolve("h200"), {"steps": 4})
    assert list(found) == list(SMALL)
    assert {program.args[1].shape for program in found.values()} == {(2,)}
