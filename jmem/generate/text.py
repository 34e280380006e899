"""From text to text: tokenise, generate, decode, and end at a stop string."""

from collections.abc import Sequence
from typing import Any, Unpack

from jmem.data.tokens import encode_start
from jmem.generate.decode import Options, generate


def complete(
    model,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    add_special_tokens: bool = True,
    **options: Unpack[Options],
) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    Args:
      model: a decoder.
      params: its parameters.
      tokenizer: of the `tokenizers` package, as `jmem.checkpoints.load` gives it.
      prompts: texts, each of at least one token.
      add_special_tokens: begin a prompt with what the tokenizer puts before every text,
        as training does (`jmem.data.tokenise`) and transformers too. False for text
        that has it spelled out, as a chat template writes it.
      max_new_tokens: tokens decoded a prompt, in one program.
      stop: strings; a text ends before the first place where one of them begins. They
        are looked for in the text, so they may lie across tokens.
      **options: those of `generate`: `temperature`, `top_k`, `top_p` and `key`,
        `stop_tokens`, `policy`, `cache_bytes`, `prompt_chunk`, `shorten`.

    Raises:
      ValueError: an empty stop string, or what `generate` refuses.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(
            f"complete: stop={stop!r} must be a list of strings, none of them empty."
        )
    ids = [
        encode_start(tokenizer, text, add_special_tokens=add_special_tokens)
        for text in prompts
    ]
    rows = generate(model, params, ids, max_new_tokens=max_new_tokens, **options)
    written = []
    for prompt, row in zip(ids, rows, strict=True):
        # Decoded with its prompt: a tokenizer may drop a leading space.
        text = tokenizer.decode(prompt + row)[len(tokenizer.decode(prompt)) :]
        found = (place for word in stop if (place := text.find(word)) >= 0)
        written.append(text[: min(found, default=len(text))])
    return written
