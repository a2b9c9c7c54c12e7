"""The console command. Each verb's room loads when the verb is called: --help needs no torch."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora import __version__
from lora.errors import (
    ConfigError,
    FileError,
    LoraError,
    SettingError,
    StoppedError,
    TargetError,
    command,
)
from lora.finetune.flags import as_flag
from lora.finetune.verbs import (
    CheckConfig,
    EvalConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    PlotConfig,
    PredictConfig,
    PreviewConfig,
)

if TYPE_CHECKING:
    from lora.finetune.source import Source

VERBS = {
    "train": "train one method on one data set",
    "plan": "say what a run would take: a dry run, no weights read",
    "eval": "score a run on a split, or a file of predictions",
    "predict": "label texts with a run's model",
    "generate": "let a run's model write: a prompt, a file, or a talk in the terminal",
    "data": "show what a run would learn from, token by token; list the tasks that are made",
    "compare": "methods x seeds on one data set, one table",
    "plot": "draw the curves of runs",
    "merge": "write a run's model as a plain one, which needs no adapter",
    "export": "hand an adapter on: GGUF for llama.cpp, or the command that serves it with vLLM",
    "convert": "turn a checkpoint of loralib into an adapter in PEFT's format",
    "methods": "list the methods; check one of your own",
}


def usage() -> str:
    lines = [f"  {verb:<9} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: lora VERB [flags]",
            "",
            "LoRA from scratch: fine-tune, compare, and hand the adapter on.",
            "",
            *lines,
            "",
            "Flags of a verb: lora VERB --help. Start with: lora train",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 done, 2 asked for what cannot be, 130 and 143 stopped by SIGINT and
    SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = given[0] if given else ""
    if sys.stderr is None:  # closed: `lora ... 2>&-`; its number would be the next file's
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        _run_verb(verb, given)
        if sys.stdout is not None:  # None where it was closed: `lora ... >&-`
            sys.stdout.flush()
    except StoppedError as stop:
        if os.environ.get("RANK", "0") == "0":  # every rank stops, and one says so
            print(f"stopped: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except LoraError as error:
        rank = os.environ.get("RANK")
        where = f"[rank {rank}] " if rank else ""
        print(f"{where}{type(error).__name__}: {in_flags(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough: `lora predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"lora {verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "lora":
            raise
        extras = "lora-from-scratch[train,hub,demo,gguf,harness]"
        print(f"lora {verb} needs {name}. Run pip install '{extras}'.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted.", file=sys.stderr)
        return 130
    return 0 if given else 2


def in_flags(error: LoraError) -> str:
    """The message with flags for the fields that it names as Python does: target_modules=('a',)
    becomes --target-modules ('a',). Keys of files stay as they are."""
    if isinstance(error, SettingError):
        return error.about(as_flag(error.field))
    if isinstance(error, FileError) or not isinstance(error, ConfigError | TargetError):
        return str(error)
    config = sys.modules.get("lora.finetune.config")
    names = [name for name in config.field_names() if "_" in name] if config else []
    pattern = rf"(?<![\w.'\"/-])({'|'.join(names)})(?![\w'\"/-]|\.\w)=?"
    return re.sub(pattern, _flag_of, str(error)) if names else str(error)


def _flag_of(found: re.Match[str]) -> str:
    return as_flag(found[1]) + " " * found[0].endswith("=")


def _run_verb(verb: str, given: list[str]) -> None:
    for argument in given:
        try:
            argument.encode()
        except UnicodeEncodeError:  # what is not of the system's encoding arrives as surrogates
            raise ConfigError(
                f"argument {argument!r} is not in this system's encoding. Write it in UTF-8, and"
                " set PYTHONUTF8=1."
            ) from None
    if verb in ("", "--help", "-h", "help"):
        print(usage())
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        globals()[f"_{verb}"](given[1:])
    else:
        raise ConfigError(f"no verb {verb!r}. Found: {', '.join(VERBS)}. Run lora --help.")


def _train(arguments: list[str]) -> None:
    from lora.finetune.config import parse_run, take

    count, arguments = take(arguments, "--nproc", "N")
    directory, others = take(arguments, "--resume", "RUN")
    base = method = None
    if directory is not None:
        base, others = take(others, "--base", "FOLDER")
        method, others = take(others, "--method", "FILE.py:CLASS")
        if others:
            raise ConfigError(
                "--resume takes its settings from the run. Only --base and --method go with it, to"
                f" say where those files are now. Remove {others[0]}."
            )
    config = parse_run(arguments) if directory is None else None
    if count is not None:
        _train_on(count, arguments, config, directory, base, method)
        return
    from lora.finetune.run import resume, run
    from lora.kernels.scratch import keep_freed_memory

    keep_freed_memory()
    summary = run(config) if config is not None else resume(Path(directory or ""), base, method)
    if os.environ.get("RANK", "0") != "0":  # rank 0 says it
        return
    metrics, baseline = summary["metrics"], summary.get("baseline")
    head = f"{summary['split']} ({summary['rows']} rows)  loss {summary['loss']:.4f}"
    if any("/" in name for name in metrics) or baseline:
        from lora.finetune.compare import by_task, markdown

        print(head + "\n" + markdown(by_task(metrics)), end="")
        if baseline:
            print("the base, its adapter off\n" + markdown(by_task(baseline)), end="")
    else:
        print(head + "".join(f"  {name} {value:.4f}" for name, value in metrics.items()))
    print(f"recorded in {summary['run_dir']}")
    run = summary["run_dir"]
    asks = ("generate", run) if summary["task"] == "text" else ("predict", run, "--text", "...")
    print(f"next: {command('lora', *asks)}")


def _train_on(
    count: str,
    arguments: list[str],
    config: Any,
    directory: str | None,
    base: str | None,
    method: str | None,
) -> None:
    """Run `lora train` in `count` processes. This process has checked the flags before."""
    if not count.isdecimal() or not 1 <= int(count[:9]) <= 1024:
        raise ConfigError(
            f"--nproc must be a whole number from 1 to 1,024, found {count[:80]}. Set --nproc."
        )
    from lora.errors import TrainingError
    from lora.finetune.distributed import launch, launched

    if launched():
        raise ConfigError("--nproc starts the processes, and torchrun did. Leave --nproc out.")
    from lora.finetune.run_folder import default_directory, resumable

    if directory is not None:
        resumable(Path(directory), base, method)
    elif config.run_dir is None:
        directory = str(default_directory(config))
        arguments = [*arguments, "--run-dir", directory]
    directory = directory or str(config.run_dir)
    try:
        code = launch(int(count), ["train", *arguments])
    except TrainingError as error:
        again = command("lora", "train", "--resume", directory)
        raise TrainingError(f"{error} Go on with {again}") from None
    if code:
        raise SystemExit(code)


def _plan(arguments: list[str]) -> None:
    from lora.finetune.config import parse, parse_run

    own, rest = parse(PlanConfig, arguments, "lora plan", return_unknown_args=True)
    config = parse_run(_with_config(own.config, rest), "lora plan")
    import json

    from lora.finetune.plan import plan

    found = plan(config, own.nproc)
    print(json.dumps(found.as_dict(), indent=2) if own.json else found)


def _compare(arguments: list[str]) -> None:
    from lora.finetune.compare import compare, markdown, parse_compare, rows

    config, runs = parse_compare(arguments)
    if config.dry_run:
        for run in runs:
            print(f"{run.method}, seed {run.seed} -> {run.run_dir}")
        return
    summaries = compare(config, runs)
    assert config.run_dir is not None
    from lora.finetune.plots import draw_curves

    pictures = draw_curves([run.run_dir for run in runs if run.run_dir], config.run_dir)
    print(markdown(rows(summaries)), end="")
    drawn = ", ".join(path.name for path in pictures)
    print(f"recorded in {config.run_dir}: comparison.md, comparison.json, {drawn}")


_ABOUT_DATA = ("text_column", "pair_column", "label_column", "header", "skip_bad_lines")
"""Flags that say how to read --data."""


def _eval(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: EvalConfig = parse(EvalConfig, _leading(arguments, "--run"), "lora eval")
    if (config.run is None) == (config.predictions is None):
        raise ConfigError("one of --run DIRECTORY and --predictions FILE.jsonl is needed.")
    if config.run is not None and config.run.is_file():
        instead = command("lora", "eval", "--predictions", config.run)
        raise ConfigError(f"{config.run} is a file. Run {instead}.")
    idle = [] if config.run and config.data and not config.harness else list(_ABOUT_DATA)
    if config.harness:
        idle += ["predictions", "data", "split", "task"]
        beside = "--harness, which brings its own data"
    elif config.run is not None:
        idle += ["limit", "task"]
        beside = "--run" if config.data is not None else "--run without --data"
    else:
        idle += ["limit", "base", "method", "data", "split", "resize_embeddings"]
        beside = "--predictions"
    for name in idle:
        if getattr(config, name) not in (None, "auto", 0):
            raise ConfigError(f"{as_flag(name)} has no effect with {beside}. Remove it.")
    if config.harness:
        _harness(config)
        return
    if config.predictions is not None:
        from lora.finetune.data.corpus import read_predictions
        from lora.finetune.metrics import score
        from lora.finetune.record import summary_of

        task = config.task or "classification"
        if config.task is None and (config.predictions.parent / "summary.json").is_file():
            task = summary_of(config.predictions.parent)["task"]
        metrics = score(task, *read_predictions(config.predictions))
    else:
        from lora.finetune.inputs import asked
        from lora.finetune.trained import rescore

        parts = config.data, config.split, asked(config), config.skip_bad_lines
        metrics = rescore(_source_of(config), *parts)
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")


def _harness(config: EvalConfig) -> None:
    """Score a run's model on tasks of the LM Evaluation Harness."""
    from lora.settings import whole_number

    if config.limit is not None:
        whole_number("limit", config.limit)
    from lora.finetune.trained import reopen
    from lora.interop.harness import run_tasks

    trained = reopen(_source_of(config))
    chat = bool(trained.tokenizer.chat_template) and trained.config.template == "auto"
    parts = trained.model, trained.tokenizer, config.harness
    for task, scores in run_tasks(*parts, limit=config.limit, chat=chat).items():
        for name, value in scores.items():
            print(f"{task} {name} {value:.4f}")


def _predict(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: PredictConfig = parse(PredictConfig, _leading(arguments, "--run"), "lora predict")
    from lora.finetune.inputs import asked
    from lora.finetune.trained import predict_texts

    parts = config.data, config.output, asked(config), config.skip_bad_lines
    predict_texts(_source_of(config), config.text, config.pair, *parts)


def _generate(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    own: GenerateConfig = parse(GenerateConfig, _leading(arguments, "--run"), "lora generate")
    from lora.finetune.generate import Writing
    from lora.finetune.trained import answer

    source = _source_of(own)
    run = source.config
    if run.task != "text":
        instead = command("lora", "predict", own.run)
        raise ConfigError(f"{own.run} labels texts and writes none. Run {instead}.")
    if own.system is not None and own.data is not None:
        raise ConfigError("--system goes with --prompt; the rows of --data have their own.")
    most = run.max_new_tokens if own.max_new_tokens is None else own.max_new_tokens
    writing = Writing(
        max_new_tokens=most, temperature=own.temperature, top_k=own.top_k, top_p=own.top_p,
        seed=own.seed,
    )  # fmt: skip
    if own.data is not None or len(own.prompt) > 1 or own.output is not None:
        prompts = source, own.prompt, own.data, own.output
        answer(*prompts, writing, own.adapter, own.system, own.skip_bad_lines)
        return
    from lora.finetune.chat import chat, once

    if own.prompt:
        once(source, own.prompt[0], writing, own.adapter, own.system)
    else:
        chat(source, writing, own.adapter, own.system)


def _data(arguments: list[str]) -> None:
    what, rest = (arguments or [""])[0], arguments[1:]
    if what == "tasks" and not rest:
        from lora.finetune.demo.tasks import MADE_TASKS

        for name, task in MADE_TASKS.items():
            print(f"tasks/{name:<12} {task.about}")
        return
    if what != "preview":
        print("usage: lora data preview [flags of lora train]\n       lora data tasks")
        if what not in ("--help", "-h"):
            raise ConfigError(f"lora data takes preview or tasks, found {what or 'nothing'}.")
        return
    from lora.finetune.config import parse, parse_run
    from lora.settings import whole_number

    own, others = parse(PreviewConfig, rest, "lora data preview", return_unknown_args=True)
    whole_number("count", own.count)
    config = parse_run(_with_config(own.config, others), "lora data preview")
    from lora.finetune.assemble import resized_for, resolve, with_tokens
    from lora.finetune.distributed import device
    from lora.finetune.inputs import corpus_to_show, show, show_labelled
    from lora.finetune.models import load_skeleton

    corpus = corpus_to_show(config)
    if corpus.task != "text":
        show_labelled(corpus, own.split, own.count)
        return
    base = load_skeleton(config.base, 1, "text")  # no weights are read
    base = with_tokens(base, config, "text", resized_for(config))
    config, _ = resolve(config, corpus, base, device())
    show(config, corpus, base, own.split, own.count)


def _merge(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: MergeConfig = parse(MergeConfig, _leading(arguments, "--run"), "lora merge")
    from lora.finetune.trained import merge_run

    how = config.dequantize, config.untie, config.dtype, config.tolerance
    print(merge_run(_source_of(config), config.output, *how))
    print(f"written: {config.output}. Load it with transformers' from_pretrained, or --base.")


def _export(arguments: list[str]) -> None:
    from lora.finetune.config import parse
    from lora.interop.export import ExportConfig, base_named, export

    config: ExportConfig = parse(ExportConfig, _leading(arguments, "--adapter"), "lora export")
    print(export(config, _ends(config.adapter, base_named(config.adapter, config.base))))


def _ends(adapter: Path, base: str) -> Any:
    """What ends an answer of a run that writes texts; None of all else."""
    from lora.finetune.inputs import export_ends
    from lora.finetune.run_folder import config_of, run_around

    run = run_around(adapter)
    if run is None:
        return None
    config = config_of(run)
    return export_ends(config, base) if config.task == "text" else None


def _plot(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: PlotConfig = parse(PlotConfig, _leading(arguments, "--runs"), "lora plot")
    from lora.finetune.plots import draw_curves

    for path in draw_curves(config.runs, config.output or (*config.runs, Path())[0]):
        print(path)


def _source_of(config: EvalConfig | PredictConfig | GenerateConfig | MergeConfig) -> Source:
    """The trained model that a verb is given, on disk."""
    from lora.finetune.source import open_source

    assert config.run is not None
    return open_source(config.run, config.base, config.resize_embeddings, config.method)


def _with_config(path: Path | None, arguments: list[str]) -> list[str]:
    """The arguments, with the file that another parser has taken."""
    return arguments if path is None else ["--config", str(path), *arguments]


def _leading(arguments: list[str], flag: str) -> list[str]:
    """`lora eval RUN` is `lora eval --run RUN`."""
    return [flag, *arguments] if arguments and not arguments[0].startswith("-") else arguments


def _convert(arguments: list[str]) -> None:
    from lora.finetune.config import parse
    from lora.interop.loralib import ConvertConfig, convert

    config: ConvertConfig = parse(
        ConvertConfig, _leading(arguments, "--checkpoint"), "lora convert"
    )
    from lora.finetune.compare import markdown

    folder, table = convert(config)
    print(markdown(table), end="")
    print(f"{'would be written' if config.dry_run else 'written'}: {folder}")


def _methods(arguments: list[str]) -> None:
    if arguments[:1] == ["check"]:
        _check_method(arguments[1:])
        return
    if arguments in (["--help"], ["-h"]):
        print(
            "usage: lora methods\n       lora methods check path/to/mine.py:MyMethod\n\nList the"
            " methods: when to choose each, its learning rate, its equation.\nOr check a method of"
            " your own against its equation: lora methods check --help."
        )
        return
    if arguments:
        raise ConfigError(
            f"lora methods takes no {arguments[0]}. Run lora methods, or lora methods check"
            " path/to/mine.py:MyMethod."
        )
    import inspect

    import lora.methods  # noqa: F401
    from lora.finetune.methods import PRESETS
    from lora.method import METHODS

    for name, method in sorted(METHODS.items()):
        first = (inspect.getdoc(method) or "").partition("\n\n")[0]
        print(f"{name:<9} {method.when}")
        print(f"{'':<9} rate {method.learning_rate:g}   {' '.join(first.split())}")
    for name, (method_name, settings) in PRESETS.items():
        given = " ".join(f"--{key} {value}" for key, value in settings.items())
        print(f"{name:<9} is --method {method_name} {given}")


def _check_method(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: CheckConfig = parse(CheckConfig, _leading(arguments, "--method"), "lora methods check")
    from lora.finetune.contract import check_named

    print(check_named(config.method), end="")
