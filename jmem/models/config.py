"""The dimensions of a decoder: what tells Llama from GPT-2, Phi-2 from Mistral."""

import dataclasses
from typing import Literal, get_args

from jmem.nn.mlp import Activation
from jmem.nn.norm import NormKind
from jmem.nn.rope import Rope, Scaling, YarnScaling

Positions = Literal["rotary", "learned"]
_CHOICES = {"positions": Positions, "norm": NormKind, "activation": Activation}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The published dimensions of a decoder; `jmem.models.zoo` holds many."""

    vocab_size: int
    layers: int
    hidden: int
    """Width of the residual stream, M."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP, F."""
    max_positions: int
    """Longest sequence the model was trained for, in tokens."""
    positions: Positions = "rotary"
    """Rotate queries and keys, or add a row of a learned table [P, M] (GPT-2, OPT)."""
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    rotary_dim: int | None = None
    """Leading channels of a head that are rotated (Phi-2); None: all."""
    sliding_window: int | None = None
    """Positions that one attends, itself among them (Mistral 0.1). None: all before."""
    norm: NormKind = "rms"
    """RMSNorm has a scale; LayerNorm ("layer") also centres, and has a bias."""
    rms_eps: float = 1e-5
    """Added to the mean square, or a LayerNorm's variance, before the root."""
    parallel: bool = False
    """Attention and MLP read one norm and are added at once (Phi-2)."""
    gated: bool = True
    """The MLP is down(act(gate(x)) * up(x)), else down(act(up(x)))."""
    activation: Activation = "silu"
    tied: bool = False
    """The head is the embedding, transposed."""
    qkv_bias: bool = False
    """Biases on q, k and v (Qwen2)."""
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(
                    f"DecoderConfig: {field.name}={value} must be at least 1."
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"DecoderConfig: heads={self.heads} is not a multiple of "
                f"kv_heads={self.kv_heads}; each key-value head serves as many queries."
            )
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"DecoderConfig: {name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(get_args(kind))}."
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"DecoderConfig: sliding_window={self.sliding_window} must be at least "
                "1, the position itself; None attends everything before."
            )
        if self.tied and self.head_bias:
            raise ValueError(
                "DecoderConfig: head_bias=True needs a head of its own, but tied=True "
                "makes the embedding the head. Set one of them to False."
            )
        if self.positions == "learned":
            self._check_learned()
        else:
            self._check_rotary()

    def _check_learned(self):
        if self.rotary_dim is not None or self.rope_scaling is not None:
            raise ValueError(
                f"DecoderConfig: rotary_dim={self.rotary_dim} and rope_scaling="
                f"{self.rope_scaling} mean nothing for positions='learned'; leave both "
                "at None."
            )

    def _check_rotary(self):
        if self.rotary_dim is None and self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim={self.head_dim} is odd, and rotary "
                "embedding turns pairs of channels."
            )
        turning = self.rope.channels
        if not 2 <= turning <= self.head_dim or turning % 2:
            raise ValueError(
                f"DecoderConfig: rotary_dim={turning} must be even, from 2 to "
                f"head_dim={self.head_dim}, as pairs of channels turn."
            )
        if isinstance(self.rope_scaling, YarnScaling) and (
            turning < 4 or not self.rope_theta > 1
        ):
            raise ValueError(
                f"DecoderConfig: YarnScaling slows some channel pairs and not others, "
                f"which needs two pairs and rope_theta above 1, not rope_theta="
                f"{self.rope_theta} and {turning} turning channels."
            )

    @property
    def rope(self) -> Rope:
        """What rotates queries and keys: no channel where positions are learned."""
        return Rope(
            head_dim=self.head_dim,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            rotary_dim=0 if self.positions == "learned" else self.rotary_dim,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once.

        >>> from jmem.models import zoo
        >>> zoo.get("llama2-7b").parameters
        6738415616
        """
        width, inner = self.hidden, self.intermediate
        norm = width * (2 if self.norm == "layer" else 1)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = 2 * width * (queries + keys)
        block += (queries + 2 * keys) * self.qkv_bias + width * self.o_bias
        block += (3 if self.gated else 2) * width * inner
        block += ((2 if self.gated else 1) * inner + width) * self.mlp_bias
        block += norm * (1 if self.parallel else 2)
        tables = self.vocab_size * (width * (1 if self.tied else 2) + self.head_bias)
        if self.positions == "learned":
            tables += self.max_positions * width
        return self.layers * block + tables + norm
