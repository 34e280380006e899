"""Layers of every model (flax.linen, used functionally), and what a caller replaces.

`ops` says how attention and linear products are passed in as functions; `stack` runs
blocks whose parameters are stacked along axis 0 from their initialisation on.
"""
