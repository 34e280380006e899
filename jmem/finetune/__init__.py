"""Fine-tuning methods, all behind one protocol (`jmem.train.finetuner.Finetuner`).

`full`, `lora` and `lisa` hold one method each; `adamw` the optimizer they share,
`patterns` the words for parts of a model, `accumulate` a batch in parts, `layerwise`
the backward pass that LISA's memory rests on, `program` the measured step, `start` a
method's first state from pretrained weights, `tuned` what it has become for other
programs, `checks` what settings are refused.
"""
