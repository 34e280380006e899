"""GPU memory of any JAX function: measured, explained, and checked live.

`jmem.measure` and `jmem.live` are the calls; the modules here are their parts.
"""
