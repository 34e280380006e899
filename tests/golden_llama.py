"""The tiny Llamas of the golden files, as our decoder and its parameters."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

from jmem.models.decoder import Decoder, DecoderConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The configuration and the arrays of tests/golden/`name`.npz."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    return json.loads(str(arrays["config"])), arrays


def llama(config: dict, arrays: dict[str, np.ndarray]) -> tuple[Decoder, dict]:
    """The model, and its weights; the files hold matrices as [out, in]."""
    dims = DecoderConfig(
        vocab_size=config["vocab_size"],
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        heads=config["num_heads"],
        kv_heads=config["num_kv_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        max_positions=512,
        rope_theta=config["rope_theta"],
        rms_eps=config["rms_norm_eps"],
    )

    def kernel(name):
        return {"kernel": jnp.asarray(np.swapaxes(arrays["w_" + name], -1, -2))}

    def scale(name):
        return {"scale": jnp.asarray(arrays["w_" + name])}

    params = {
        "embed": {"embedding": jnp.asarray(arrays["w_embed"])},
        "blocks": {
            "attention_norm": scale("norm1"),
            "attention": {name: kernel("w" + name) for name in "qkvo"},
            "mlp_norm": scale("norm2"),
            "mlp": {name: kernel("w_" + name) for name in ("gate", "up", "down")},
        },
        "final_norm": scale("final_norm"),
        "head": kernel("lm_head"),
    }
    return Decoder(dims), params
