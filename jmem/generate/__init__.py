"""Autoregressive generation with a static key-value cache.

`cache` holds the plain cache and the two ways to attend with it, `decode` the prefill
and the decoding loop, `sampling` the choice of the next token, `text` the way from text
to text.
"""
