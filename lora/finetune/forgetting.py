"""How much a language model forgets: the perplexity of a text that the task does not touch.

read_unrelated(config, base)   the text of --unrelated-text as token ids
perplexity(model, text)        exp of the mean loss per token, in nats
base_perplexity(model, text)   the same before training

The text is cut into pieces of --max-length tokens, and every token counts once. The context of a
token is the tokens before it in its piece, and the last one of the piece before; before the first
piece it is the tokenizer's begin or end token. lm-eval's rolling log-likelihood is the same, except
that it gives the last piece as much context as fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lora.errors import ConfigError, DataError
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.included import rows_with_text
from lora.finetune.data.rows import text_of
from lora.finetune.data.tokens import Encoded
from lora.finetune.evaluate import evaluate
from lora.finetune.models import Base, check_ids
from lora.injection import disabled
from lora.inventory import injected

MANUAL = "python-docs"
"""The manual of the Python language, which every Python installation holds."""
TOKENS_USED = 2**12
"""Tokens of the text that are used. Reading them twice takes as long as training on 2,700."""
CHARACTERS_USED = 32 * TOKENS_USED
"""Characters of the text that are tokenized: more than these tokens have."""


@dataclass(frozen=True)
class UnrelatedText:
    """A text as token ids, in pieces."""

    source: str
    encoded: Encoded

    @property
    def tokens(self) -> int:
        """The tokens that are scored."""
        return len(self.encoded.targets)


def read_unrelated(config: RunConfig[Any], base: Base) -> UnrelatedText | None:
    """Returns the text of --unrelated-text, None if there is none. `config` must be resolved.

    Raises ConfigError if the base has an encoder, and DataError if the text cannot be read.
    """
    source, length = config.unrelated_text, config.max_length
    if source is None:
        return None
    assert length is not None
    if base.model.config.is_encoder_decoder:
        raise ConfigError(
            "--unrelated-text does not work with encoder-decoder models: an encoder predicts no"
            " text. Remove it."
        )
    tokenizer = base.tokenizer
    # verbose=False: no warning that the text is longer than the model's positions.
    text = _whole_text(source)[:CHARACTERS_USED]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"--unrelated-text {source} has no text. Pass another.")
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = torch.tensor([begin, *ids[:TOKENS_USED]], dtype=torch.int32)
    check_ids(base.model, tokenizer, ids, source)
    inputs, targets = ids[:-1], ids[1:]
    offsets = torch.tensor([*range(0, len(targets), length), len(targets)])
    pad = tokenizer.pad_token_id
    return UnrelatedText(source, Encoded({"input_ids": inputs}, offsets, targets, pad, offsets))


def _whole_text(source: str) -> str:
    """Returns the text of a source. A TXT file is taken as it is; texts in rows are joined by blank
    lines. Raises DataError."""
    path = Path(source)
    if source == MANUAL:
        return "\n\n".join(_manual())
    if path.suffix == ".txt" and path.is_file():
        return text_of(path)
    return "\n\n".join(_row_texts(source))


def _manual() -> Iterable[str]:
    """Returns the texts of `help("keywords")` and the like."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"--unrelated-text {MANUAL}: this Python was installed without its manual. Pass a TXT"
            " file."
        ) from None
    return topics.values()


def _row_texts(source: str) -> list[str]:
    """Returns the column text of the test split, or else of dev, of train, or of all rows."""
    splits: dict[str, list[str]] = {}
    try:
        for split, place, row in rows_with_text(source):
            if isinstance(row, DataError):
                raise row
            if not isinstance(row.get("text"), str):
                columns = ", ".join(map(str, row))
                raise DataError(f"{place} has no text in a column text, found {columns}.")
            if row["text"].strip():
                splits.setdefault(split, []).append(row["text"])
    except DataError as error:
        message = str(error).replace("--data", "--unrelated-text")
        raise DataError(f"{message} --unrelated-text takes a TXT file, or rows of texts.") from None
    return next((splits[name] for name in ("test", "dev", "train", "") if name in splits), [])


def perplexity(model: Any, text: UnrelatedText, progress: Progress | None = None) -> float:
    """Returns exp of the mean loss in nats over the tokens of the text.

    Raises TrainingError if the loss is not finite.
    """
    corpus = Corpus(text.source, "text", (), (), (), test=tuple(text.encoded.lengths))
    result = evaluate(model, corpus, text.encoded, corpus.test, progress=progress)
    return result.metrics["perplexity"]


def base_perplexity(model: Any, text: UnrelatedText, progress: Progress | None = None) -> float:
    """Returns the perplexity of the text for the base: with the adapter disabled or, if the method
    trains the base itself, of the model as it is, which must be untrained."""
    keeps_base = all(plan.method.keeps_base for plan in injected(model).values())
    with disabled(model) if keeps_base else nullcontext():
        return perplexity(model, text, progress)
