"""Schedules that fall over the steps of the run, where they say no others."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments import lisa, memory, mixlora
from experiments.harness import cli
from experiments.harness import config as configs
from experiments.harness.config import ConfigError
from experiments.harness.rates import lay_out, scale_rate
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.targets import resolve

COSINE = AdamW(schedule="cosine", warmup_steps=2)


@pytest.mark.parametrize(
    "own",
    [
        Full(adamw=COSINE),
        Lora(adamw=COSINE),
        Lisa(adamw=COSINE),
        Lomo(schedule="linear", warmup_steps=2),
        MixLora(mixtures=(Mixture(adamw=COSINE), Mixture(adamw=COSINE))),
    ],
    ids=lambda own: type(own).__name__,
)
def test_a_schedule_falls_over_the_steps_of_the_run(own):
    for one in getattr(lay_out(own, 8), "mixtures", (lay_out(own, 8),)):
        peak, middle, last = (float(one.adamw.rate(jnp.int32(s))) for s in (2, 5, 8))
        assert (middle, last) == (pytest.approx(peak / 2), 0)
    assert lay_out(lay_out(own, 8), 99) == lay_out(own, 8)  # what is said stays
    with pytest.raises(ValueError, match=r"steps=2: schedule='\w+' .* warmup_steps=2"):
        lay_out(own, 2)


def test_a_constant_rate_is_left_alone():
    for own in (Lora(), Lomo(), scale_rate(Lisa(), 2.0)):
        assert lay_out(own, 8) is own or lay_out(own, 8) == own


def test_experiments_train_by_it():
    config = lisa.Config(steps=8, lora=Lora(adamw=COSINE))
    assert lisa.make_finetuners(config)["lora"].adamw.total_steps == 8
    assert lisa.make_finetuners(config)["full"] == config.full
    mixture = mixlora.Config(steps=8, mixture=Mixture(adamw=COSINE))
    own = mixlora.make_finetuners(mixture)["mixlora"]
    assert isinstance(own, MixLora)
    assert own.mixtures[0].adamw.total_steps == 8


def test_a_step_is_measured_without_knowing_how_many_there_are():
    config = memory.Config(model="smollm2-135m", full=Full(adamw=COSINE), seq_len=8)
    assert memory.programs(config, resolve("h200"))


class TestResume:
    """More steps, where they do not change those that were made."""

    def resume(self, tmp_path, saved, *flags):
        (tmp_path / "config.toml").write_text(configs.write(saved))
        given = "--resume", str(tmp_path), *flags
        return cli.parse(lisa.Config, "lisa", given)[1]

    @pytest.mark.parametrize(
        "own",
        [
            {"lora": Lora()},
            {"lora": Lora(adamw=dataclasses.replace(COSINE, total_steps=32))},
            {"lora": Lora(), "full": Full(adamw=COSINE)},  # which does not run
        ],
    )
    def test_a_run_goes_on_to_more(self, tmp_path, own):
        saved = lisa.Config(steps=16, only=("lora",), **own)
        assert self.resume(tmp_path, saved, "--steps", "32").steps == 32

    @pytest.mark.parametrize(
        ("own", "flag"),
        [
            ({"lora": Lora(adamw=COSINE)}, "--lora.adamw"),
            ({"lora_wide": Lora(adamw=COSINE)}, "--lora-wide.adamw"),
            ({"lomo": Lomo(schedule="linear")}, "--lomo"),
        ],
    )
    def test_a_rate_that_falls_until_the_end_is_another_run_s(
        self, tmp_path, own, flag
    ):
        saved = lisa.Config(steps=16, only=("lora", "lora_wide", "lomo"), **own)
        assert self.resume(tmp_path, saved) == saved
        with pytest.raises(ConfigError) as refused:
            self.resume(tmp_path, saved, "--steps", "32")
        words = str(refused.value)
        assert "steps=32 differs from the saved run's 16" in words
        assert f"{flag}.schedule falls to zero at --steps" in words
        assert f"{flag}.total-steps" in words
        with pytest.raises(ConfigError, match=r"total_steps=32 differs"):
            more = "--steps", "32", f"{flag}.total-steps", "32"
            self.resume(tmp_path, dataclasses.replace(saved, steps=32), *more)

    def test_a_run_of_an_older_version_goes_on(self, tmp_path):
        saved = lisa.Config(steps=16, only=("lora",))
        old = configs.write(saved).replace('total_steps = "None"', "total_steps = 0")
        assert "total_steps = 0" in old
        (tmp_path / "config.toml").write_text(old)
        flags = "--resume", str(tmp_path), "--steps", "32"
        assert cli.parse(lisa.Config, "lisa", flags)[1].steps == 32
