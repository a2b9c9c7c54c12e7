"""Texts that a model writes, and how they score.

    written(model, tokenizer, prompts, writing)   an answer for each prompt
    scored(config, model, ...)                    a model on a split: its scores, and a row for each

Prompts are padded on the left, so that all of a batch go on at the same position; those of an
encoder on the right, since BART counts positions with the padding. The most probable token at each
step (temperature 0), or one drawn from the softmax of logits / temperature, of the `top_k` most
probable, or of the fewest whose probabilities reach `top_p`. Decoding, its cache and its streams
are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
import transformers
from rich.progress import Progress
from torch import Tensor

from lora.declared import is_number
from lora.finetune import distributed
from lora.finetune.config import RunConfig
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.tokens import Encoded, sorted_batches
from lora.finetune.evaluate import Evaluation, autocast, device_of, evaluate, records_of
from lora.finetune.inputs import (
    asked_of,
    check_positions,
    decoder_start,
    made_metrics,
    prompts_of,
    thought_end,
)
from lora.finetune.metrics import score
from lora.settings import check, whole_number


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a text is gone on with."""

    max_new_tokens: int = 256
    """Tokens at most."""
    temperature: float = 0.0
    """0: the most probable token at each step; above: drawn, the more evenly the higher."""
    top_k: int | None = None
    """Draw among so many of the most probable tokens alone."""
    top_p: float | None = None
    """Draw among the fewest most probable tokens whose probabilities add up to this."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens)
        warm = self.temperature
        check("temperature", warm, "a number of at least 0", is_number(warm) and warm >= 0)
        if self.top_k is not None:
            whole_number("top_k", self.top_k)
        if self.top_p is not None:
            share = self.top_p
            check("top_p", share, "a share above 0, up to 1", is_number(share) and 0 < share <= 1)
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            check(name, value, "left out at temperature 0", value is None or warm > 0)


def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    writing: Writing,
    stops: Sequence[int] = (),
    batch_size: int = 32,
    progress: Progress | None = None,
    streamed: Callable[[str], None] | None = None,
    sharded: bool = False,
) -> list[str]:
    """What the model writes after each prompt's ids, up to its end token or one of `stops`, special
    tokens left out. Sets eval mode.

    `streamed` is told of a single prompt's answer as it is written. Batches are divided among the
    ranks; of a `sharded` model the rows of each, and a rank that has none, or is done, computes on
    for company: its pieces are wanted. Every rank has all in the end.
    """
    device = device_of(model)
    model.eval()
    check_positions(model, prompts, writing.max_new_tokens)
    how = _decoding(model, tokenizer, writing, stops)
    ends = {*how.eos_token_id}  # which decoding leaves out only where it takes them for special
    order = sorted_batches([len(ids) for ids in prompts], batch_size)
    rank, ranks = distributed.rank(), distributed.size()
    own = [rows[rank::ranks] for rows in order] if sharded else order[rank::ranks]
    bar = progress.add_task("writing", total=len(own)) if progress else None
    found: dict[int, str] = {}
    for rows in own:
        some = rows or order[0][:1]
        batch = padded(model, [prompts[row] for row in some], tokenizer.pad_token_id, device)
        streamer = _Stream(tokenizer, streamed, how.eos_token_id) if streamed else None
        # A generator of its own for each batch: none depends on what was drawn before.
        with (
            torch.random.fork_rng(), torch.inference_mode(), autocast(model), _bare(model)
        ):  # fmt: skip
            torch.manual_seed(writing.seed + some[0])
            ids = model.generate(
                **batch,
                generation_config=how,
                streamer=streamer,
                synced_gpus=sharded and ranks > 1,
            )
        begun = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        kept = [[*takewhile(lambda i: i not in ends, row)] for row in ids[:, begun:].tolist()]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        found |= dict(zip(rows, texts, strict=False))  # or it was for company
        if progress and bar is not None:
            progress.advance(bar)
    if progress and bar is not None:
        progress.remove_task(bar)
    for others in distributed.gather(found):
        found |= others
    return [found[row] for row in range(len(prompts))]


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """Within, the model has no generation_config of its own: transformers fills what it is not told
    from there, a repetition penalty or beams, which neither training nor its scores know of."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _decoding(model: Any, tokenizer: Any, writing: Writing, stops: Sequence[int]) -> Any:
    """transformers' settings."""
    drawn: dict[str, Any] = {}
    if writing.temperature > 0:
        # top_k is 50 where nothing is said.
        drawn = {"temperature": writing.temperature, "top_k": writing.top_k or 0}
        drawn["top_p"] = 1.0 if writing.top_p is None else writing.top_p
    return transformers.GenerationConfig(
        max_new_tokens=writing.max_new_tokens,
        do_sample=bool(drawn),
        eos_token_id=sorted({tokenizer.eos_token_id, *stops}),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=decoder_start(model) if model.config.is_encoder_decoder else None,
        use_cache=True,
        **drawn,
    )


def padded(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, Tensor]:
    """What the model goes on from: ids and mask (prompts, longest)."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = 0 if model.config.is_encoder_decoder else longest - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        real[row, start : start + len(prompt)] = 1
    return {"input_ids": ids.to(device), "attention_mask": real.to(device)}


class _Stream(transformers.TextStreamer):  # type: ignore[misc]
    """Passes on each stretch of text once it is certain."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None], ends: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.told, self.ends = told, ends

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or value.flatten().tolist()[-1] not in self.ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.told(text)


def scored(
    config: RunConfig[Any],
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    encoded: Encoded,
    examples: Sequence[Any],
    progress: Progress | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Loss and metrics on a split, and a row for each answer: of texts for each prompt, at most
    `config.answered` of each data set, as the model writes them."""
    found = evaluate(model, corpus, encoded, examples, progress=progress)
    if corpus.task != "text":
        return found, list(records_of(corpus, examples, found.logits))
    asked = asked_of(config, corpus, examples)
    if not asked:  # texts without a prompt
        return found, []
    asked = [_without_end(one, tokenizer.eos_token) for one in asked]
    ids, stops = prompts_of(config, tokenizer, model, asked)
    writing = Writing(max_new_tokens=config.max_new_tokens)
    cut = config.shard or config.offload
    texts = written(model, tokenizer, ids, writing, stops, progress=progress, sharded=cut)
    end = thought_end(config, tokenizer)
    scores = _score_answers(
        corpus, made_metrics(config), asked, [_parts(text, end)[1] for text in texts]
    )
    several = len(corpus.tasks) > 1
    rows = [row_of(one, text, several, end) for one, text in zip(asked, texts, strict=True)]
    return replace(found, metrics=scores | found.metrics), rows


def _without_end(one: Conversation, end: str) -> Conversation:
    """A conversation whose references do not end in the end token, as texts that are written out
    may: it is no part of what a model writes."""
    return replace(
        one, references=tuple(text.removesuffix(end).rstrip() for text in one.references)
    )


def _given(one: Conversation) -> dict[str, Any]:
    """What the template was given beside the messages, as a row has it."""
    given = json.loads(one.given) if one.given else {}
    lists = {name: given.pop(name) for name in ("tools", "documents") if name in given}
    return lists | ({"chat_template_kwargs": given} if given else {})


def _parts(text: str, end: str) -> tuple[str, str]:
    """What a model wrote up to the end of its reasoning, and its answer."""
    thought, found, answer = text.rpartition(end) if end else ("", "", text)
    return (thought + found).strip(), answer


def row_of(
    one: Conversation, text: str, several: bool = False, thought_end: str = ""
) -> dict[str, Any]:
    """A record of an answer, with those that count as right if they are known. The reasoning before
    it, up to `thought_end`, is no part of it."""
    thought, answer = _parts(text, thought_end)
    said = [message.fields() for message in one.prompt]
    return {
        **({"task": one.task} if several else {}),
        **({"prompt": said[0]["content"]} if one.raw else {"messages": said}),
        **_given(one),
        **({"reasoning": thought} if thought else {}),
        "prediction": answer.strip(),
        **({"references": list(one.references)} if one.references else {}),
    }


def _score_answers(
    corpus: Corpus,
    own: Mapping[str, Mapping[str, Callable[[str, str], float]]],
    asked: Sequence[Conversation],
    texts: Sequence[str],
) -> dict[str, float]:
    """The metrics of all answers, then of each data set's where there are several, `metric/name`.

    A task that is made has metrics of its own: its exact match is of the text as it stands.
    """
    found: dict[str, float] = {}
    parts = [("", set(corpus.tasks))]
    parts += [(f"/{name}", {name}) for name in corpus.tasks if len(corpus.tasks) > 1]
    for end, names in parts:
        some = [(one, text) for one, text in zip(asked, texts, strict=True) if one.task in names]
        if not some:
            continue
        wanted = [list(one.references) for one, _ in some]
        scores = score("text", [text for _, text in some], wanted)
        if names <= own.keys():
            of = set.intersection(*(set(own[name]) for name in names))
            scores |= {
                metric: fmean(
                    max(own[one.task][metric](text, right) for right in one.references)
                    for one, text in some
                )
                for metric in sorted(of)
            }
        found |= {f"{metric}{end}": value for metric, value in scores.items()}
    return found
