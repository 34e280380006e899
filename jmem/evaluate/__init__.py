"""How good an answer from a cut cache is: one prefill for all policies, plain numbers.

`decoding` answers and scores from the caches of several plans, `needle` tells which
cells of a needle-in-a-haystack grid are still answered, `interval` how sure a share is.

    plans = {"full": full.plan(...), "snapkv": snapkv.plan(...)}
    produced = answers(model, params, plans, tokens, lengths, steps=8)
    found = {name: hits(tokenizer, cases, rows) for name, rows in produced.items()}
    kept = retained(found["full"], found["snapkv"])
    kept.share, kept.interval, kept.excluded
"""
