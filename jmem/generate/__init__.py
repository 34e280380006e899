"""Autoregressive generation with a static key-value cache (`jmem.kvcache`).

`reading` puts prompts into caches, `decode` decodes answers, at once or as a stream,
`conversation` does so turn by turn over one cache, `sampling` chooses the next token,
and `text` leads from text to text. `programs` are what is measured of them.
"""
