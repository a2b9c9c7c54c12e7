"""`lora export`: writes a trained model for another program."""

from __future__ import annotations

from pathlib import Path

from lora.adapter_file import settings_in
from lora.card import FORMER_NAMES, base_in
from lora.errors import ConfigError, command
from lora.finetune.data.conversations import Conversation, from_row
from lora.finetune.data.messages import Message
from lora.finetune.demo import bases
from lora.finetune.inputs import answer_format, prompts_of, set_answer_format
from lora.finetune.merged import merge_source
from lora.finetune.models import place_of, writing_parts
from lora.finetune.record import answers_of
from lora.finetune.run_folder import config_of, run_around
from lora.finetune.screen import progress_bar, reading
from lora.finetune.source import open_source
from lora.finetune.trained import Trained
from lora.finetune.verbs import ExportConfig
from lora.interop.answers import AnswerFormat
from lora.interop.gguf_adapter import check_new, new_file, write_gguf_adapter
from lora.interop.gguf_file import gguf_in
from lora.interop.gguf_merged import (
    check_writable,
    content_of_file,
    content_of_model,
    write_gguf_model,
)
from lora.interop.llama_cpp import certificate
from lora.interop.ollama import modelfile
from lora.interop.pretrained import base_config
from lora.interop.saved_lora import folder_of
from lora.interop.vllm import vllm_command, write_beside

PROMPTS = 20  # to compare with llama.cpp
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Write a sentence about rain.",
    "What is 12 plus 30?", "Explain what a computer is.", "Who wrote Hamlet?",
    "Give me a synonym for happy.", "How many legs does a spider have?", "Tell me a short story.",
    "Translate 'good morning' into German.", "What do bees make?", "List the days of the week.",
    "Why is the sky blue?", "What is the opposite of cold?", "Describe a cat in one sentence.",
    "How do you boil an egg?", "What is water made of?", "Name a large city in Asia.",
    "Complete: once upon a time", "What should I pack for a hike?",
)  # fmt: skip


def export(config: ExportConfig) -> str:
    """Does what the flags ask, and returns what to print.

    Raises CheckpointError, ConfigError, ModelError, RunError.
    """
    _check_export_flags(config)
    if config.merged:
        return _export_merged(config)
    base = base_to_export(config.adapter, config.base)
    answer = _answer_format_of(config.adapter, base)
    if config.format == "vllm":
        if gguf_in(base) is not None:
            merge = command("lora", "merge", config.adapter, "--output", "FOLDER")
            raise ConfigError(
                f"the base {base} is a GGUF file, and vLLM serves adapters on safetensors. Run"
                f" {merge}, and serve that folder."
            )
        return vllm_command(config.adapter, base, answer) + stop_note(answer)
    return _export_adapter(config, base, answer)


def _check_export_flags(config: ExportConfig) -> None:
    """Raises ConfigError for flags that have no effect together."""
    if config.format == "vllm" and config.merged:
        merge = command("lora", "merge", config.adapter, "--output", "FOLDER")
        raise ConfigError(f"vLLM serves the folder of a merged model. Run {merge}.")
    if config.format == "vllm" and config.output is not None:
        raise ConfigError("--format vllm writes no GGUF file. Remove --output.")
    if config.dtype == "q8_0" and not config.merged:
        raise ConfigError("--dtype q8_0 needs --merged: its blocks do not fit an adapter's ranks.")
    if config.dequantize and not config.merged:
        raise ConfigError("--dequantize has no effect without --merged. Remove it.")


def base_to_export(adapter: Path, given: str | None) -> str:
    """Returns the base to export for: --base, or the one that the adapter names.

    Raises ConfigError if there is none, or if no other engine has it.
    """
    base = given or base_in(settings_in(folder_of(adapter)))
    if not base:
        raise ConfigError(f"{adapter} does not name its base. Pass --base FOLDER.")
    if base in (*bases.BUILT, *FORMER_NAMES):
        merge = command("lora", "merge", adapter, "--output", "FOLDER")
        raise ConfigError(
            f"{adapter}: the base {base} exists only in this package, so no other engine can load"
            f" it. Run {merge}, which writes the merged model for transformers, or train on another"
            " base."
        )
    return place_of(base)


def _answer_format_of(adapter: Path, base: str) -> AnswerFormat | None:
    """Returns the answer format of a run with --task text; None for an adapter without its run, or
    another task."""
    run = run_around(adapter)
    if run is None:
        return None
    config = config_of(run)
    return answer_format(config, *writing_parts(base)) if config.task == "text" else None


def _export_adapter(config: ExportConfig, base: str, answer: AnswerFormat | None) -> str:
    """Writes the adapter as GGUF, and for Ollama the Modelfile."""
    output = config.output or config.adapter / "adapter.gguf"
    assert config.dtype != "q8_0"
    count = write_gguf_adapter(config.adapter, base_config(base), output, config.dtype)
    file = gguf_in(base)
    model = "BASE.gguf" if file is None else str(file.resolve())
    flags: list[object] = ["--lora", output]
    if answer and answer.new_end_token is not None:
        flags += ["--override-kv", f"tokenizer.ggml.eot_token_id=int:{answer.new_end_token}"]
    if answer and answer.template:
        template = write_beside(output.with_suffix(".jinja"), answer.template)
        flags += ["--jinja", "--chat-template-file", template]
    lines = [f"written: {output}, {count} layers."]
    if config.format == "gguf":
        lines.append(f"Run {command('llama-cli', '-m', model, *flags)}{stop_note(answer)}")
    else:
        text = modelfile(model, f"./{output.name}", answer)
        lines.append(_write_modelfile(output, text, model == "BASE.gguf"))
    return " ".join(lines)


def stop_note(answer: AnswerFormat | None) -> str:
    """Returns a note for a run whose answers end with a text and not with a token: the files that
    engines read can only name tokens. "" for other runs."""
    if answer is None or not answer.stop_text:
        return ""
    return (
        f"\nnote: an answer ends with the text {answer.stop_text!r}, which is no token. Give it to"
        " the engine as a stop string, or cut the answer there."
    )


def _write_modelfile(output: Path, text: str, names_base: bool) -> str:
    """Writes the Modelfile beside a GGUF file. Returns what to do with it."""
    file = write_beside(output.with_suffix(".Modelfile"), text)
    first = f"Name the base in {file}, and run" if names_base else "Run"
    return f"{first} {command('ollama', 'create', 'NAME', '-f', file)}"


def _export_merged(config: ExportConfig) -> str:
    """Writes the merged model as GGUF, compares it with llama.cpp, and for Ollama writes the
    Modelfile."""
    source = open_source(config.adapter, config.base)
    if source.config.task != "text":
        raise ConfigError(
            f"{config.adapter} was trained on --task {source.config.task}, and llama.cpp runs"
            " language models. Run lora merge for a folder that transformers loads."
        )
    if source.config.base in bases.BUILT:
        raise ConfigError(
            f"{config.adapter}: the base {source.config.base} has no tokenizer that llama.cpp"
            " reads. Train on another base."
        )
    output = config.output or config.adapter / "merged.gguf"
    check_new(output)
    place = place_of(source.config.base)
    check_writable(base_config(place))
    file = gguf_in(place)
    with progress_bar() as progress, reading(progress):
        merged = merge_source(source, config.dequantize)
        trained, model = merged.trained, merged.trained.model
        answer = answer_format(trained.config, trained.tokenizer, model.generation_config)
        set_answer_format(trained.config, trained.tokenizer, model)
        rows = model.get_input_embeddings().weight.shape[0]
        parts = trained.tokenizer, rows, answer
        content = (
            content_of_model(model.config, *parts)
            if file is None
            else content_of_file(file, *parts)
        )
        prompts = _prompts(trained, config.adapter)
        with new_file(output) as temporary:
            write_gguf_model(model, content, temporary, config.dtype)
            ends = [*answer.end_tokens.values()]
            compared = certificate(temporary, model, trained.tokenizer, prompts, ends)
    run = f"Run {command('llama-cli', '-m', output)}{stop_note(answer)}"
    if config.format == "ollama":
        text = modelfile(f"./{output.name}", None, answer)
        run = _write_modelfile(output, text, names_base=False)
    return f"{merged.report}; written in {config.dtype}\n{compared}\nwritten: {output}. {run}"


def _prompts(trained: Trained, directory: Path) -> list[list[int]]:
    """Returns the ids of prompts to compare: the first of the run's predictions, then questions."""
    rows = answers_of(directory, "text", PROMPTS)
    talks = [talk for row in rows for talk in from_row(row, str(directory), answered=False)]
    talks += [Conversation((Message("user", text),), place="a question") for text in QUESTIONS]
    ids, _ = prompts_of(trained.config, trained.tokenizer, trained.model, talks[:PROMPTS])
    return [list(prompt) for prompt in ids]
