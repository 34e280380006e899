"""What a caller replaces in any model: how positions attend, how a map is applied.

A block computes norms, activations and residuals; the expensive things it does are
arguments. LoRA, gradient taps, quantised and sparse weights are other `linear`s, KV
caches and attention kernels other `attend`s, experts another `feed`; no module is ever
patched.

    attend(q, k, v, rope, positions, layer, carry) -> (out, carry)
        q [B,T,H,D], k and v [B,T,K,D]: queries and keys *before* rotation;
        rope(x, positions) rotates; positions int32 [B,T], or `jmem.nn.packed.Packed`
        where a row holds several documents; layer a traced int32;
        carry whatever the caller threads through the layers (a cache, or None).
        out [B,T,H,D] in q's dtype.
    linear(name, leaf, x) -> y
        name of the map, which is its path inside the block or the model ("attention/q",
        "mlp/gate", "head"; `jmem.nn.maps`), its own parameter dict, its input
        [..., in]. The dict holds whatever the caller put there: "kernel" [in, out],
        perhaps "bias", perhaps leaves that only this `linear` understands.
    feed(leaves, x, activate) -> (y, aux)
        all of an MLP, from its dicts by name ("gate", "up", "down", others); `aux` is
        what the block returns as such. None: down(activate(gate(x)) * up(x)).

None may close over values that are differentiated: they are passed in, or lost.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Attend = Callable[..., tuple[jax.Array, Any]]
LinearMap = Callable[[str, dict[str, jax.Array], jax.Array], jax.Array]
Feed = Callable[[dict[str, Any], jax.Array, Callable], tuple[jax.Array, dict]]


class Ops(NamedTuple):
    """The functions that a block is given (see the module's docstring)."""

    attend: Attend
    linear: LinearMap
    feed: Feed | None = None

    def prefix_names(self, path: str) -> "Ops":
        """The same, for a module applied by itself: its maps' names begin with `path`.

        A module knows its path only from the module that was applied.
        """

        def linear(name, leaf, x):
            return self.linear(f"{path}/{name}", leaf, x)

        return self._replace(linear=linear)
