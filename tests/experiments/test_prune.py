"""The command that prunes and packs a checkpoint, and what it leaves."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from experiments import prune
from experiments.harness import cli
from experiments.harness.settings import Weights
from jmem.checkpoints import CheckpointError

SIZES = dataclasses.replace(TINY, layers=2, hidden=128, head_dim=32, intermediate=192)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    params = random_params(SIZES, np.float32)
    jmem.checkpoints.save(params, SIZES, folder)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.script(prune.main, prune.Command, [str(word) for word in arguments])
    return ended.value.code


def test_a_folder_is_pruned_packed_opened_and_unpacked(model, tmp_path, capsys):
    small, plain = tmp_path / "small", tmp_path / "new" / "plain"
    given = "--criterion", "magnitude", "--sparsity", "0.7", "--values", "bfloat16"
    assert run(model, *given, "--to", small) == 0
    printed = capsys.readouterr().out
    for name in ("attention/q", "mlp/down"):
        assert re.search(rf"{name} +FragBitmap .* [34]\.\d+ .* GB/s", printed)
    assert "linear maps" in printed
    assert "on disk" in printed

    checkpoint = jmem.checkpoints.load(small)
    before = jmem.checkpoints.load(model).params()["blocks"]["mlp"]["up"]["kernel"]
    after = checkpoint.params()["blocks"]["mlp"]["up"]["kernel"]
    assert np.mean(np.asarray(after) == 0, axis=1) == pytest.approx(0.7, abs=0.005)
    kept = np.asarray(after) != 0
    rounded = np.asarray(before.astype("bfloat16").astype(after.dtype))
    np.testing.assert_array_equal(np.asarray(after)[kept], rounded[kept])
    assert "sparse" in checkpoint.params(packed=True)["blocks"]["mlp"]["up"]
    assert Weights(model=str(small)).dimensions() == SIZES

    assert run(small, "--unpack", "--to", plain) == 0
    opened = jmem.checkpoints.load(plain).params()
    jax.tree.map(np.testing.assert_array_equal, opened, checkpoint.params())


def test_a_calibrated_criterion_reads_the_text_and_keeps_its_share(
    byte_tokenizer, tmp_path, capsys
):
    sizes = dataclasses.replace(SIZES, vocab_size=264)
    model, text, found = tmp_path / "model", tmp_path / "text.txt", {}
    params = random_params(sizes, np.float32, scale=0.1)
    jmem.checkpoints.save(params, sizes, model, byte_tokenizer)
    lines = (f"Line {number} of a text that is read.\n\n" for number in range(40))
    text.write_text("".join(lines))
    for criterion in ("wanda", "magnitude"):
        given = "--criterion", criterion, "--data", text, "--seq-len", "32"
        tokens = "--calibration-tokens", "128"
        folder = tmp_path / criterion
        assert run(model, *given, *tokens, "--to", folder) == 0
        kernels = jmem.checkpoints.load(folder).params()["blocks"]
        found[criterion] = np.asarray(kernels["mlp"]["up"]["kernel"]) != 0
        np.testing.assert_array_equal(found[criterion].sum(1), 64)
    assert (found["wanda"] != found["magnitude"]).any()
    assert "mlp/up" in capsys.readouterr().out


def test_what_no_format_makes_smaller_is_told(model, tmp_path, capsys):
    assert run(model, "--sparsity", "0.0", "--to", tmp_path / "dense") == 0
    printed = capsys.readouterr().out
    assert "map 'mlp/up' keeps its kernel" in printed
    assert jmem.checkpoints.load(tmp_path / "dense").config == SIZES


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--sparsity", "1"), "sparsity=1.0 must be at least 0 and below 1"),
        (("--criterion", "wanda"), "holds no tokenizer"),
        (("--formats", "TcaBme"), "hold no float32 values; FragBitmap does"),
    ],
)
def test_refuses_before_it_reads(model, tmp_path, capsys, arguments, message):
    assert run(model, *arguments, "--to", tmp_path / "never") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_refuses_a_folder_that_is_taken(model, capsys):
    assert run(model, "--to", model) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is none of"):
        prune.main(prune.Command(model="nothing"))
