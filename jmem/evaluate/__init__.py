"""How good an answer from a cut cache is: tasks, contenders at equal bytes, comparison.

`task` says what is asked and how it is scored: needles in a haystack (`needle`), the
loss of a continuation (`continuation`), LongBench's files (`longbench`), made-up texts
to recall (`recall`). `contenders` cuts methods to the same bytes, `compare` asks all of
them after one prefill (`decoding`), `interval` says how sure a share is, `programs`
builds what is measured.

    haystack = Haystack(tokenizer, text)
    [task] = hide_needles(haystack, lengths=(2048,), depths=(0.0, 0.5), seeds=(0, 1))
    contenders = at_equal_bytes(
        *(model, {"snapkv": SnapKV(), "gemfilter": GemFilter(layer=13)}, (1 / 8,)),
        prompt=task.prompt,
        new_tokens=task.steps,
        batch_size=4,
    )
    found = collect(compare(model, params, contenders, task))
    task.summary(found["full"], found["snapkv 12.5 %"])        # value, interval, cases
"""
