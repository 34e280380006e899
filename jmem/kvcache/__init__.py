"""Key-value caches: what of a prompt is kept for decoding, one policy a file.

`policy` holds what all share and the functions a new one fills in, `plan` the sizes,
`cache` the arrays and the two ways to attend, `scores` what attention says of a token,
`select` the choice among scores. `turn` reads more against a cache, `budget` cuts a
policy to a number of bytes, `gemfilter` shortens the prompt instead of its cache.

    plan = SnapKV(capacity=1024).plan(model, prompt=32768, new_tokens=256)
    plan.bytes()                                     # of the cache, before there is one
    generate(model, params, prompts, max_new_tokens=256, policy=SnapKV(capacity=1024))
"""
