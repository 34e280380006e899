"""Advice keeps its word: whoever follows it saves what was promised."""

import jax
import jax.numpy as jnp
import pytest

from jmem.memory import kinds
from jmem.memory.advice import read_dimensions
from jmem.memory.measure import measure
from jmem.program import Program

bf16, MiB = jnp.bfloat16, 2**20
VOCAB, WIDTH, TOKENS = 16_384, 256, 8192


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def report(program, **more):
    return measure(program, bounds=False, **more)


def advice_of(found, rule):
    """The one piece of advice of a rule."""
    (advice,) = [a for a in found.advice if a.rule == rule]
    return advice


def head_step(loss):
    """The gradient of a bf16 head's loss over all tokens."""

    def step(params, x, targets):
        return jax.grad(lambda p, x: loss(p, x, targets), argnums=(0, 1))(params, x)

    return Program(
        step,
        (
            {"head": spec(WIDTH, VOCAB, dtype=bf16)},
            spec(TOKENS, WIDTH, dtype=bf16),
            spec(TOKENS, dtype=jnp.int32),
        ),
        labels={"weights": (0, ""), "batch": [(1, ""), (2, "")]},
    )


def plain_loss(params, x, targets):
    logits = (x @ params["head"]).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)


def chunked_loss(params, x, targets):
    """The way out the advice names, as a user would write it."""

    @jax.checkpoint
    def chunk(params, x, targets):
        return plain_loss(params, x, targets)

    def body(total, xs):
        return total + chunk(params, *xs), None

    chunks = (x.reshape(-1, 256, WIDTH), targets.reshape(-1, 256))
    return jax.lax.scan(body, 0.0, chunks)[0]


@pytest.mark.compat
class TestFollowed:
    """Three bad programs, each followed by the program the advice asks for."""

    def kept(self, rule, bad, good):
        promised = advice_of(bad, rule).saves_bytes
        saved = bad.device_bytes - good.device_bytes
        assert saved == pytest.approx(promised, rel=0.05)
        assert rule not in {advice.rule for advice in good.advice}

    def test_state_that_is_not_donated(self):
        def step(params, opt_state):
            return params - 0.1 * opt_state, 0.9 * opt_state + params

        args = (spec(1024, 4096), spec(1024, 4096))
        bad = report(Program(step, args, labels={"weights": (0, ""), "adam": (1, "")}))
        assert "donate=(0, 1)" in advice_of(bad, "not donated").text
        good = report(
            Program(
                step, args, donate=(0, 1), labels={"weights": (0, ""), "adam": (1, "")}
            )
        )
        self.kept("not donated", bad, good)

    @pytest.mark.parametrize("names", ["w,m", "batch,x", "params,opt_state"])
    def test_arguments_are_known_by_their_shapes(self, names):
        """Whatever they are called; the same dtype and shape is what counts."""
        one, other = names.split(",")
        code = f"lambda {one}, {other}, wide: ({one} * {other}, {other}.T @ wide)"
        step = eval(code)
        args = spec(1024, 2048), spec(1024, 2048), spec(1024, 2048, dtype=bf16)
        bad = report(Program(step, args))
        assert "donate=(0,)" in advice_of(bad, "not donated").text
        self.kept("not donated", bad, report(Program(step, args, donate=(0,))))

    def test_a_cache_rebuilt_by_the_scan(self, report_of):
        self.kept("rebuilt cache", report_of("deep rebuilt"), report_of("deep carried"))

    def test_logits_of_all_tokens_in_float32(self):
        bad, good = report(head_step(plain_loss)), report(head_step(chunked_loss))
        assert "8,192 tokens" in advice_of(bad, "logits").text
        assert f"{__name__.rsplit('.', 1)[-1]}.py:" in advice_of(bad, "logits").text
        self.kept("logits", bad, good)


class TestRules:
    def test_materialised_scores(self):
        length, heads = 1024, 8

        def attend(tokens, q, k):
            scores = jnp.einsum("htd,hsd->hts", q, k)
            seen = tokens[None, :, None] >= tokens[None, None]
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
            return jnp.einsum("hts,hsd->htd", weights, k)

        qk = spec(heads, length, 64)
        tokens = spec(length, dtype=jnp.int32)
        found = measure(attend, tokens, qk, qk, bounds=False)
        advice = advice_of(found, "attention scores")
        assert advice.saves_bytes >= heads * length * length * 4
        assert "flash attention" in advice.text

    def test_a_large_square_is_no_attention(self):
        """Nor can a product be written over what it is computed from."""
        square = spec(65_536, 65_536, dtype=bf16)
        for fn in (
            lambda a, b: a @ b,
            lambda x, y: jax.nn.silu(x @ y),
            lambda tokens, y: jnp.exp(tokens @ y),
        ):
            found = measure(fn, square, square, bounds=False)
            rules = {advice.rule for advice in found.advice}
            assert not rules & {"attention scores", "not donated"}, rules
        twice = measure(lambda x, y: jnp.tanh(x @ y) @ y, square, square, bounds=False)
        rules = {advice.rule for advice in twice.advice}
        assert rules == {"not donated"}  # over `x`, which is read once
        kept = measure(
            *(lambda x, y: jnp.tanh(x @ y) @ y, square, square),
            donate=(0,),
            bounds=False,
        )
        saved = twice.device_bytes - kept.device_bytes
        assert saved == advice_of(twice, "not donated").saves_bytes

    def test_scores_are_found_under_any_name(self):
        def attend(a, b, c):
            weights = jnp.exp(a @ b.T)
            return (weights / weights.sum(axis=1, keepdims=True)) @ c

        one = spec(4096, 64)
        found = measure(attend, one, one, one, bounds=False)
        assert advice_of(found, "attention scores").saves_bytes >= 4096**2 * 4

    def test_activations_that_are_most_of_the_peak(self, report_of):
        bad, good = report_of("long"), report_of("long remat")
        promised = advice_of(bad, "saved activations").saves_bytes
        saved = bad.device_bytes - good.device_bytes
        assert 0 < saved <= promised  # "at most": a block's input must stay

    def test_float32_copies_of_what_was_computed_narrow(self):
        def forward(x, w):
            wide = jax.lax.optimization_barrier((x @ w).astype(jnp.float32))
            return jnp.tanh(wide).sum() + wide.mean()

        found = measure(
            forward, spec(2048, 2048, dtype=bf16), spec(2048, 2048, dtype=bf16)
        )
        assert advice_of(found, "widened values").saves_bytes == 2048 * 2048 * 2

    def test_moments_beside_narrow_weights(self):
        def step(params, opt_state):
            m, v = opt_state
            return params - (m / jnp.sqrt(v)).astype(bf16), (m * 0.9, v * 0.99)

        params, moment = spec(1024, 2048, dtype=bf16), spec(1024, 2048)
        found = measure(step, params, (moment, moment), donate=(0, 1), bounds=False)
        advice = advice_of(found, "optimizer state")
        exact = 2 * 1024 * 2048 * (4 - 1 - 4 / 256)
        assert advice.saves_bytes == exact

    def test_arguments_beyond_what_xla_plans_with(self):
        found = measure(
            lambda params: params * 2, spec(2**32), target="rtx4090", bounds=False
        )
        assert "must shrink" in advice_of(found, "arguments").text
        assert not found.fits()

    def test_a_good_program_gets_none(self, report_of):
        assert not report_of("deep carried").advice
        # The tiling of this toy's matmuls is nothing its author could change.
        rules = {advice.rule for advice in report_of("long remat").advice}
        assert rules <= {"split scratch"}

    def test_gradients_summed_in_float32_are_left_alone(self, report_of):
        report = report_of("handwritten")
        assert report.by_kind[kinds.GRADIENTS] > 0
        assert "widened values" not in {a.rule for a in report.advice}


def test_dimensions_of_anything_a_row_may_hold():
    assert read_dimensions("s32[]") == ()
    assert read_dimensions("pred[7]") == (7,)
    assert read_dimensions("") == ()
