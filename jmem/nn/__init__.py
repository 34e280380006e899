"""Leaves of every model (flax.linen, used functionally) and the two doors into them.

`ops` holds the contract, `stack` walks blocks whose parameters are stacked from birth.
"""
