"""Generates texts and scores them.

    written(model, tokenizer, prompts, writing)   the text that the model writes after each prompt
    scored(config, model, ...)                    metrics of a split, and a record per row

Prompts are padded on the left, so that all texts of a batch continue at the same position; those of
an encoder are padded on the right, since BART's positions count the padding. Temperature 0 takes
the most probable token at each step. Above 0, a token is sampled from softmax(logits / temperature)
over the `top_k` most probable tokens, or over the fewest whose probabilities add up to `top_p`.
transformers does the decoding, with its cache and streamers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
import transformers
from rich.progress import Progress
from torch import Tensor

from lora.declared import is_number
from lora.finetune import distributed
from lora.finetune.answers import scores_of_answers
from lora.finetune.config import RunConfig
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.corpus import Corpus, Predicted
from lora.finetune.data.tokens import Encoded, sorted_batches
from lora.finetune.evaluate import Evaluation, autocast, device_of, evaluate, records_of
from lora.finetune.inputs import (
    asked_of,
    check_positions,
    decoder_start,
    prompts_of,
    thought_end,
)
from lora.finetune.metrics import leading, rouge_by_row
from lora.kernels import adapters_constant
from lora.settings import check, whole_number


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Settings of generation."""

    max_new_tokens: int = 256
    """The most tokens to generate."""
    temperature: float = 0.0
    """0 takes the most probable token. Above 0 samples; higher is more random."""
    top_k: int | None = None
    """Sample only from this many most probable tokens."""
    top_p: float | None = None
    """Sample only from the fewest tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed of the sampling."""

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
    stops: Sequence[int | str] = (),
    batch_size: int = 32,
    progress: Progress | None = None,
    streamed: Callable[[str], None] | None = None,
    sharded: bool = False,
) -> list[str]:
    """Returns the text that the model writes after each prompt's ids, without special tokens.

    It ends before the end token or one of `stops`: token ids, and texts. Sets eval mode. streamed:
    called with each piece of the text while it is generated; for a single prompt. The batches are
    divided among the ranks; if the model is `sharded`, the rows of each batch are. Every rank gets
    all texts.
    """
    device = device_of(model)
    model.eval()
    check_positions(model, prompts, writing.max_new_tokens)
    settings = _decoding(model, tokenizer, writing, stops)
    # batch_decode drops only special tokens, and a stop may not be one.
    ends = {*settings.eos_token_id}
    order = sorted_batches([len(ids) for ids in prompts], batch_size)
    rank, ranks = distributed.rank(), distributed.size()
    mine = [rows[rank::ranks] for rows in order] if sharded else order[rank::ranks]
    bar = progress.add_task("writing", total=len(mine)) if progress else None
    answers: dict[int, str] = {}
    for rows in mine:
        # A sharded forward needs all ranks: a rank without rows generates and drops one.
        used = rows or order[0][:1]
        batch = padded(model, [prompts[row] for row in used], tokenizer.pad_token_id, device)
        streamer = _Stream(tokenizer, streamed, settings) if streamed else None
        # Each batch has its own seed, so that its samples do not depend on other batches.
        with (
            random_kept(device), torch.inference_mode(), autocast(model), adapters_constant(),
            _bare(model),
        ):  # fmt: skip
            torch.manual_seed(writing.seed + used[0])
            ids = model.generate(
                **batch,
                generation_config=settings,
                tokenizer=tokenizer,  # for stop_strings
                streamer=streamer,
                synced_gpus=sharded and ranks > 1,
            )
        # Skip the prompt, or the decoder's start token.
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        kept = [[*takewhile(lambda i: i not in ends, row)] for row in ids[:, start:].tolist()]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        texts = [_before_stop(text, settings.stop_strings) for text in texts]
        answers |= dict(zip(rows, texts, strict=False))  # rows is empty if the text is to drop
        if progress and bar is not None:
            progress.advance(bar)
    if progress and bar is not None:
        progress.remove_task(bar)
    for others in distributed.gather(answers):
        answers |= others
    return [answers[row] for row in range(len(prompts))]


def random_kept(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context that leaves the random state of the CPU and of the device as it was."""
    # Unnamed, fork_rng would start a context on every accelerator of the machine.
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """Gives the model an empty generation_config for a while.

    transformers takes settings that we do not pass from the model's config, such as a repetition
    penalty or beams. Then texts would depend on settings that the run does not record.
    """
    saved, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


def _before_stop(text: str, stops: Sequence[str] | None) -> str:
    """Returns the text up to the first of `stops` in it."""
    for stop in stops or ():
        text = text.partition(stop)[0]
    return text


def _decoding(model: Any, tokenizer: Any, writing: Writing, stops: Sequence[int | str]) -> Any:
    """Returns the GenerationConfig of transformers."""
    sampling: dict[str, Any] = {}
    if writing.temperature > 0:
        # transformers' default for top_k is 50; 0 is no limit.
        sampling = {"temperature": writing.temperature, "top_k": writing.top_k or 0}
        sampling["top_p"] = 1.0 if writing.top_p is None else writing.top_p
    return transformers.GenerationConfig(
        max_new_tokens=writing.max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=sorted({tokenizer.eos_token_id, *(s for s in stops if isinstance(s, int))}),
        stop_strings=[stop for stop in stops if isinstance(stop, str)] or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=decoder_start(model) if model.config.is_encoder_decoder else None,
        use_cache=True,
        **sampling,
    )


def padded(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask of the prompts, (prompts, longest) int64."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        # The module's docstring says why the sides differ.
        start = 0 if model.config.is_encoder_decoder else longest - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class _Stream(transformers.TextStreamer):  # type: ignore[misc]
    """Calls `receive` with each piece of text that later tokens cannot change."""

    def __init__(self, tokenizer: Any, receive: Callable[[str], None], settings: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.receive, self.ends = receive, settings.eos_token_id
        self.stops: list[str] = settings.stop_strings or []
        self.text, self.passed = "", 0  # all of the text, and how many of its characters are shown

    def put(self, value: Tensor) -> None:
        """Takes the next token, but no end token: one that is not special would be shown."""
        if self.next_tokens_are_prompt or value.flatten().tolist()[-1] not in self.ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Passes a finished piece on, without what may begin a stop; the base class would print."""
        self.text += text
        shown = _before_stop(self.text, self.stops)
        if not stream_end:
            begun = (n for stop in self.stops for n in range(len(stop)) if shown.endswith(stop[:n]))
            shown = shown[: len(shown) - max(begun, default=0)]
        self.receive(shown[self.passed :])
        self.passed = len(shown)


def scored(
    config: RunConfig[Any],
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    encoded: Encoded,
    examples: Sequence[Any],
    progress: Progress | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Returns loss and metrics of a model on a split, and a record per prediction.

    Text: the model generates an answer for the first `config.answered` prompts of each data set.
    """
    evaluation = evaluate(model, corpus, encoded, examples, progress=progress)
    evaluation = replace(evaluation, metrics=leading(evaluation.metrics, config.metric))
    if corpus.task != "text":
        return evaluation, list(records_of(corpus, examples, evaluation.logits))
    asked = asked_of(config, corpus, examples)
    if not asked:  # texts without a prompt
        return evaluation, []
    asked = [_without_end(conversation, tokenizer.eos_token) for conversation in asked]
    ids, stops = prompts_of(config, tokenizer, model, asked)
    writing = Writing(max_new_tokens=config.max_new_tokens)
    sharded = config.shard or config.offload
    texts = written(model, tokenizer, ids, writing, stops, progress=progress, sharded=sharded)
    end = thought_end(config, tokenizer)
    answers = Predicted(
        [_parts(text, end)[1] for text in texts],
        [conversation.references for conversation in asked],
        [conversation.task for conversation in asked],
    )
    scores = scores_of_answers(config.data, answers) | evaluation.metrics
    scores = leading(scores, config.metric)
    several = len(corpus.tasks) > 1
    rows = [
        row_of(conversation, text, several, end)
        for conversation, text in zip(asked, texts, strict=True)
    ]
    if next(iter(scores)) == "rougeL":  # compare needs it row by row, and it is slow to compute
        for row, value in zip(rows, rouge_by_row(*answers[:2], ["rougeL"])["rougeL"], strict=True):
            row["rougeL"] = round(value, 6)
    return replace(evaluation, metrics=scores), rows


def _without_end(conversation: Conversation, end: str) -> Conversation:
    """Removes the end token from the references, which texts rendered by the user may have.

    Generated answers never contain it.
    """
    references = (text.removesuffix(end).rstrip() for text in conversation.references)
    return replace(conversation, references=tuple(references))


def _given(conversation: Conversation) -> dict[str, Any]:
    """Returns the template's other variables under the names that a row has for them."""
    given = json.loads(conversation.given) if conversation.given else {}
    lists = {name: given.pop(name) for name in ("tools", "documents") if name in given}
    return lists | ({"chat_template_kwargs": given} if given else {})


def _parts(text: str, end: str) -> tuple[str, str]:
    """Divides a generated text into reasoning, with its end, and answer."""
    # The last one: a model may write </think> inside its reasoning. str.rpartition("") raises.
    thought, mark, answer = text.rpartition(end) if end else ("", "", text)
    return (thought + mark).strip(), answer


def row_of(
    conversation: Conversation, text: str, several: bool = False, thought_end: str = ""
) -> dict[str, Any]:
    """Returns the record of a generated text: prompt, reasoning, prediction, and references.

    The reasoning ends with `thought_end` and is not part of the prediction. several: name the task.
    """
    thought, answer = _parts(text, thought_end)
    messages = [message.fields() for message in conversation.prompt]
    # The prompt has the names that read_prompts() reads, so the file can be generated from again.
    return {
        **({"task": conversation.task} if several else {}),
        **({"prompt": messages[0]["content"]} if conversation.raw else {"messages": messages}),
        **_given(conversation),
        **({"reasoning": thought} if thought else {}),
        "prediction": answer.strip(),
        **({"references": list(conversation.references)} if conversation.references else {}),
    }
