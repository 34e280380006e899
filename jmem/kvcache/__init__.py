"""Key-value caches: what of a prompt is kept for decoding, one policy a file.

`method` is what every cache offers, `plan` its sizes. `policy` is the kind that chooses
which tokens stay, and holds the functions a new one fills in; `seen` is what it chooses
by, `cache` has its arrays and how a new token attends them, `scores` what attention
says of a token, `select` the choice among scores, `turn` how more is read against a
cache. `prefill` reads a prompt once for all that keep some of it, `shorten` is what
cuts the prompt itself (`gemfilter`), `budget` cuts a method to a number of bytes, and
`members` lists the family.

    plan = SnapKV(capacity=1024).plan(model, prompt=32768, new_tokens=256)
    plan.bytes()                                     # of the cache, before there is one
    generate(model, params, prompts, max_new_tokens=256, policy=SnapKV(capacity=1024))
"""
