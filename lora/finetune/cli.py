"""The `lora` command. A subcommand's modules load when it runs, so --help does not load torch."""

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
    ExportConfig,
    FetchConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    PlotConfig,
    PredictConfig,
    PreviewConfig,
    ReportConfig,
    RunsConfig,
    ShowConfig,
    WatchConfig,
)

if TYPE_CHECKING:
    from lora.finetune.source import Source

DATA_USAGE = """\
usage: lora data preview [flags of lora train]
       lora data fetch [reviews] [smollm2] [--dry-run]
       lora data tasks

Print training examples: lora data preview --help.
Download real reviews and a small language model: lora data fetch --help.
List the data sets that this package generates (--data tasks/NAME): lora data tasks."""

VERBS = {
    "train": "fine-tune a base model on a data set with one method",
    "plan": "estimate a run's steps and memory without reading weights",
    "eval": "score a trained model, or a file of predictions",
    "predict": "label texts with a trained model",
    "generate": "answer a prompt or a file of prompts, or chat in the terminal",
    "data": "preview training examples; download reviews or a small model; list data sets",
    "compare": "train several methods on one data set, and print a verdict and tables",
    "runs": "list runs, the newest or the best first",
    "show": "show one run: settings, machine, evaluations, result",
    "watch": "draw a run's curves in the terminal while it trains",
    "report": "write a page about runs: verdict, tables, charts, examples",
    "plot": "draw loss and score curves of runs",
    "merge": "merge an adapter into its base and save an ordinary model",
    "export": "write an adapter or a merged model as GGUF, or print the vLLM command",
    "convert": "convert a loralib checkpoint into an adapter in PEFT's format",
    "methods": "list the methods, or check a method that you wrote",
}


def usage() -> str:
    lines = [f"  {verb:<9} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: lora COMMAND [flags]",
            "       lora --version",
            "",
            "LoRA from scratch: fine-tune models, compare methods, and export adapters.",
            "",
            *lines,
            "",
            "Run lora COMMAND --help for its flags.",
            "To start: lora train, which trains a small included model on included data.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit codes: 0 success, 2 error, 130 stopped by SIGINT, 141 closed pipe, 143
    stopped by SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else ""
    if sys.stderr is None:  # closed by `2>&-`: the next opened file would take its number
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print an escape for what it cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        _run_verb(verb, arguments)
        if sys.stdout is not None:  # None if closed by `>&-`
            sys.stdout.flush()
    except StoppedError as stop:
        if os.environ.get("RANK", "0") == "0":  # every rank stops, only rank 0 prints
            print(f"stopped: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except LoraError as error:
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank else ""
        print(f"{prefix}{type(error).__name__}: {in_flags(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader closed the pipe: `lora predict ... | head`
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
    return 0 if arguments else 2


def in_flags(error: LoraError) -> str:
    """Returns the message with field names rewritten as flags: target_modules=('a',) becomes
    --target-modules ('a',). Keys of files are not rewritten."""
    if isinstance(error, SettingError):
        return error.about(as_flag(error.field))
    if isinstance(error, FileError) or not isinstance(error, ConfigError | TargetError):
        return str(error)
    config = sys.modules.get("lora.finetune.config")
    names = [name for name in config.field_names() if "_" in name] if config else []
    pattern = rf"(?<![\w.'\"/-])({'|'.join(names)})(?![\w'\"/-]|\.\w)=?"
    return re.sub(pattern, _flag_of, str(error)) if names else str(error)


def _flag_of(match: re.Match[str]) -> str:
    return as_flag(match[1]) + " " * match[0].endswith("=")


def _run_verb(verb: str, arguments: list[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python turns bytes that it cannot decode into surrogates
            raise ConfigError(
                f"argument {argument!r} is not in this system's encoding. Write it in UTF-8, and"
                " set PYTHONUTF8=1."
            ) from None
    if verb in ("", "--help", "-h", "help"):
        print(usage())
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        globals()[f"_{verb}"](arguments[1:])
    else:
        raise ConfigError(
            f"there is no command {verb!r}. Commands: {', '.join(VERBS)}. Run lora --help."
        )


def _train(arguments: list[str]) -> None:
    from lora.finetune.arguments import take
    from lora.finetune.config import parse_run

    count, arguments = take(arguments, "--nproc", "N")
    directory, others = take(arguments, "--resume", "RUN")
    base = method = device = None
    if directory is not None:
        base, others = take(others, "--base", "FOLDER")
        method, others = take(others, "--method", "FILE.py:CLASS")
        device, others = take(others, "--device", "DEVICE")
        if others:
            raise ConfigError(
                "--resume takes the settings from the run. It can be combined only with --nproc,"
                " --device and, if those files have moved, --base and --method. Remove"
                f" {others[0]}."
            )
    config = parse_run(arguments) if directory is None else None
    moved = base, method, device
    if count is not None:
        _train_on(count, arguments, config, directory, moved)
        return
    from lora.finetune.run import resume, run
    from lora.kernels.scratch import keep_freed_memory

    keep_freed_memory()
    summary = run(config) if config is not None else resume(Path(directory or ""), *moved)
    if os.environ.get("RANK", "0") == "0":
        _print_summary(summary)


def _print_summary(summary: dict[str, Any]) -> None:
    """Print a run's scores on the held-out split, its folder and the next command."""
    metrics, baseline = summary["metrics"], summary.get("baseline")
    head = f"{summary['split']} ({summary['rows']} rows)  loss {summary['loss']:.4f}"
    if any("/" in name for name in metrics) or baseline:
        from lora.finetune.comparison.tables import by_task, markdown

        print(head + "\n" + markdown(by_task(metrics)), end="")
        if baseline:
            print("with the adapter disabled\n" + markdown(by_task(baseline)), end="")
    else:
        print(head + "".join(f"  {name} {value:.4f}" for name, value in metrics.items()))
        if (floor := summary.get("majority", {}).get(summary["split"])) is not None:
            print(f"always predicting the most frequent class: accuracy {floor:.4f}")
    if "forgetting" in summary:
        from lora.finetune.listing import forgetting_line

        print(forgetting_line(summary["forgetting"]))
    print(f"recorded in {summary['run_dir']}")
    run = summary["run_dir"]
    verb = ("generate", run) if summary["task"] == "text" else ("predict", run, "--text", "...")
    print(f"next: {command('lora', *verb)}")


def _train_on(
    count: str,
    arguments: list[str],
    config: Any,
    directory: str | None,
    moved: tuple[str | None, str | None, str | None],
) -> None:
    """Run `lora train` in `count` processes. This process has already checked the flags; `moved`
    are --base, --method and --device beside --resume."""
    if not count.isdecimal() or not 1 <= int(count[:9]) <= 1024:
        raise ConfigError(
            f"--nproc must be a whole number from 1 to 1,024, found {count[:80]}. Set --nproc."
        )
    from lora.errors import TrainingError
    from lora.finetune.distributed import launch, launched

    if launched():
        raise ConfigError("torchrun has already started the processes. Remove --nproc.")
    from lora.finetune.run_folder import default_directory, resumable

    if directory is not None:
        config = resumable(Path(directory), *moved)
    elif config.run_dir is None:
        directory = str(default_directory(config))
        arguments = [*arguments, "--run-dir", directory]
    directory = directory or str(config.run_dir)
    try:
        code = launch(int(count), ["train", *arguments], config.device)
    except TrainingError as error:
        again = command("lora", "train", "--resume", directory)
        raise TrainingError(f"{error} Resume with {again}") from None
    if code:
        raise SystemExit(code)


def _plan(arguments: list[str]) -> None:
    from lora.finetune.config import parse, parse_run

    flags, rest = parse(PlanConfig, arguments, "lora plan", return_unknown_args=True)
    config = parse_run(_with_config(flags.config, rest), "lora plan")
    import json

    from lora.finetune.plan import plan

    estimate = plan(config, flags.nproc)
    print(json.dumps(estimate.as_dict(), indent=2) if flags.json else estimate)


def _compare(arguments: list[str]) -> None:
    from lora.finetune.comparison.grid import parse_compare

    config, grid = parse_compare(arguments)
    from lora.finetune.compare import compare, dry_run, report_missing

    if config.dry_run:
        print("".join(f"{line}\n" for line in dry_run(grid)), end="")
        return
    result = compare(grid)
    from lora.finetune.comparison.tables import all_tables
    from lora.finetune.plots import draw_curves

    pictures = draw_curves(result.folders, grid.folder)
    print(all_tables(result.analysis), end="")
    drawn = ", ".join(path.name for path in pictures)
    print(f"recorded in {grid.folder}: comparison.md, comparison.json, {drawn}")
    print(f"next: {command('lora', 'report', grid.folder)}")
    report_missing(result)


_DATA_FLAGS = ("text_column", "pair_column", "label_column", "header", "skip_bad_lines")
"""Flags about how to read --data."""


def _eval(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: EvalConfig = parse(EvalConfig, arguments, "lora eval")
    if (config.run is None) == (config.predictions is None):
        raise ConfigError("pass either --run DIRECTORY or --predictions FILE.jsonl.")
    if config.run is not None and config.run.is_file():
        instead = command("lora", "eval", "--predictions", config.run)
        raise ConfigError(f"{config.run} is a file, not a folder. To score it, run {instead}.")
    _check_eval_flags(config)
    if config.harness:
        _harness(config)
        return
    import json

    if config.predictions is not None:
        from lora.finetune.class_report import scores_of_file

        metrics, classes = scores_of_file(config.predictions, config.task)
    else:
        from lora.finetune.inputs import columns_in
        from lora.finetune.trained import rescore

        parts = config.data, config.split, columns_in(config), config.skip_bad_lines
        metrics, classes = rescore(_source_of(config), *parts)
    if config.json:
        print(json.dumps({**metrics, **(classes.as_dict() if classes else {})}, indent=2))
        return
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")
    if classes is not None:
        print(f"\n{classes}", end="")


def _check_eval_flags(config: EvalConfig) -> None:
    """Raise ConfigError for a flag that has no effect with what is scored."""
    unused = [] if config.run and config.data and not config.harness else list(_DATA_FLAGS)
    if config.harness:
        unused += ["predictions", "data", "split", "task"]
        source = "--harness, whose tasks have their own data"
    elif config.run is not None:
        unused += ["limit", "task"]
        source = "--run" if config.data is not None else "--run without --data"
    else:
        unused += ["limit", "base", "method", "data", "split", "resize_embeddings", "device"]
        source = "--predictions"
    for name in unused:
        if getattr(config, name) not in (None, "auto", 0):
            raise ConfigError(f"{as_flag(name)} has no effect with {source}. Remove it.")


def _harness(config: EvalConfig) -> None:
    """Score a trained model on tasks of the LM Evaluation Harness."""
    from lora.settings import whole_number

    if config.limit is not None:
        whole_number("limit", config.limit)
    from lora.finetune.trained import reopen
    from lora.interop.harness import run_tasks

    trained = reopen(_source_of(config))
    chat = bool(trained.tokenizer.chat_template) and trained.config.template == "auto"
    parts = trained.model, trained.tokenizer, config.harness
    results = run_tasks(*parts, limit=config.limit, chat=chat)
    if config.json:
        import json

        print(json.dumps(results, indent=2))
        return
    for task, scores in results.items():
        for name, value in scores.items():
            print(f"{task} {name} {value:.4f}")


def _predict(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: PredictConfig = parse(PredictConfig, arguments, "lora predict")
    from lora.finetune.inputs import columns_in
    from lora.finetune.trained import predict_texts

    parts = config.data, config.output, columns_in(config), config.skip_bad_lines
    predict_texts(_source_of(config), config.text, config.pair, *parts)


def _generate(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    flags: GenerateConfig = parse(GenerateConfig, arguments, "lora generate")
    from lora.finetune.generate import Writing
    from lora.finetune.trained import answer

    source = _source_of(flags)
    run = source.config
    if run.task != "text":
        instead = command("lora", "predict", flags.run, "--text", "...")
        raise ConfigError(
            f"{flags.run} was trained on --task {run.task}: it labels texts and cannot generate"
            f" any. Run {instead}."
        )
    if flags.system is not None and flags.data is not None:
        raise ConfigError(
            "--system has no effect with --data, whose rows have their own system prompts. Remove"
            " it."
        )
    limit = run.max_new_tokens if flags.max_new_tokens is None else flags.max_new_tokens
    writing = Writing(
        max_new_tokens=limit, temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p,
        seed=flags.seed,
    )  # fmt: skip
    if flags.data is not None or len(flags.prompt) > 1 or flags.output is not None:
        prompts = source, flags.prompt, flags.data, flags.output
        answer(*prompts, writing, flags.adapter, flags.system, flags.skip_bad_lines)
        return
    from lora.finetune.chat import chat, once

    if flags.prompt:
        once(source, flags.prompt[0], writing, flags.adapter, flags.system)
    else:
        chat(source, writing, flags.adapter, flags.system)


def _data(arguments: list[str]) -> None:
    action, rest = (arguments or [""])[0], arguments[1:]
    if action == "tasks" and rest in ([], ["--help"], ["-h"]):
        from lora.finetune.demo.tasks import MADE_TASKS

        for name, task in MADE_TASKS.items():
            print(f"tasks/{name:<12} {task.about}")
        return
    if action == "fetch":
        _fetch(rest)
        return
    if action != "preview":
        from lora.finetune.data.included import listing

        print(f"{DATA_USAGE}\n\n{listing()}")
        if action not in ("", "--help", "-h"):
            found = " ".join(arguments)
            raise ConfigError(f"lora data takes preview, fetch or tasks, found {found}.")
        return
    from lora.finetune.config import parse, parse_run
    from lora.settings import whole_number

    flags, others = parse(PreviewConfig, rest, "lora data preview", return_unknown_args=True)
    whole_number("count", flags.count)
    config = parse_run(_with_config(flags.config, others), "lora data preview")
    from lora.finetune.assemble import resized_for, resolve, with_tokens
    from lora.finetune.distributed import device
    from lora.finetune.inputs import corpus_to_show, show, show_labelled
    from lora.finetune.models import load_skeleton

    corpus = corpus_to_show(config)
    if corpus.task != "text":
        show_labelled(corpus, flags.split, flags.count)
        return
    base = load_skeleton(config.base, 1, "text")  # no weights are read
    base = with_tokens(base, config, "text", resized_for(config))
    config, _ = resolve(config, corpus, base, device(config.device))
    show(config, corpus, base, flags.split, flags.count)


def _fetch(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: FetchConfig = parse(FetchConfig, arguments, "lora data fetch")
    from lora.finetune.demo.fetch import PACKAGES, fetch

    fetch(config.names or PACKAGES, config.dry_run)


def _merge(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: MergeConfig = parse(MergeConfig, arguments, "lora merge")
    from lora.finetune.merged import merge_run

    options = config.dequantize, config.untie, config.dtype, config.tolerance
    print(merge_run(_source_of(config), config.output, *options))
    print(f"written: {config.output}. Load it with transformers' from_pretrained, or as --base.")


def _export(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: ExportConfig = parse(ExportConfig, arguments, "lora export")
    from lora.finetune.export import export

    print(export(config))


def _plot(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: PlotConfig = parse(PlotConfig, arguments, "lora plot")
    from lora.finetune.plots import draw_curves

    for path in draw_curves(config.runs, config.output or (*config.runs, Path())[0]):
        print(path)


def _report(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: ReportConfig = parse(ReportConfig, arguments, "lora report")
    from lora.finetune.report.verb import report

    print(report(config))


def _runs(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: RunsConfig = parse(RunsConfig, arguments, "lora runs")
    from lora.finetune.listing import runs
    from lora.settings import whole_number

    if config.limit is not None:
        whole_number("limit", config.limit)
    print(runs(config))


def _show(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: ShowConfig = parse(ShowConfig, arguments, "lora show")
    from lora.finetune.listing import run_description

    print(run_description(config.run))


def _watch(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: WatchConfig = parse(WatchConfig, arguments, "lora watch")
    from lora.finetune.watch import watch

    watch(config.run)


def _source_of(config: EvalConfig | PredictConfig | GenerateConfig | MergeConfig) -> Source:
    """Returns the run or adapter that a command's --run names."""
    from lora.finetune.source import open_source

    assert config.run is not None
    source = open_source(config.run, config.base, config.resize_embeddings, config.method)
    return source.on(config.device)


def _with_config(path: Path | None, arguments: list[str]) -> list[str]:
    """Returns the arguments with --config PATH put back, for the parser of the run's flags."""
    return arguments if path is None else ["--config", str(path), *arguments]


def _convert(arguments: list[str]) -> None:
    from lora.finetune.config import parse
    from lora.interop.loralib import ConvertConfig, convert

    config: ConvertConfig = parse(ConvertConfig, arguments, "lora convert")
    from lora.finetune.comparison.tables import markdown

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
            " methods: when to choose each, its default learning rate, its equation.\nOr check"
            " a method that you wrote: lora methods check --help."
        )
        return
    if arguments:
        raise ConfigError(
            f"lora methods does not take {arguments[0]}. Run lora methods, or lora methods check"
            " path/to/mine.py:MyMethod."
        )
    from lora.finetune.methods import described_methods

    print(described_methods())


def _check_method(arguments: list[str]) -> None:
    from lora.finetune.config import parse

    config: CheckConfig = parse(CheckConfig, arguments, "lora methods check")
    from lora.finetune.contract import check_named

    print(check_named(config.method), end="")
