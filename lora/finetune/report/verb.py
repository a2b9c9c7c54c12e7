"""`lora report`: reads runs, and writes a page on them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora.errors import RunError
from lora.files import writable, write_together, write_whole
from lora.finetune.report.contents import tables_of
from lora.finetune.report.evidence import Evidence, collect, folders_of_runs
from lora.finetune.report.formats import FORMATS
from lora.finetune.report.page import charting_library, page_of
from lora.finetune.screen import progress_bar
from lora.finetune.verbs import ReportConfig


def report(config: ReportConfig) -> str:
    """Writes the page, and the tables if that is asked for. Returns what `lora report` prints.

    Raises RunError if there is no complete run, or a file cannot be written.
    """
    runs = folders_of_runs(config.runs)
    with progress_bar() as progress, ThreadPoolExecutor() as pool:
        library = pool.submit(charting_library)  # while the runs are read
        task = progress.add_task("reading runs", total=len(runs))

        def advance(description: str) -> None:
            progress.update(task, advance=1, description=description)

        evidence = collect(runs, advance)
        progress.update(task, description="writing the page")
        library.result()
        page = page_of(evidence)
    with writable(config.output, RunError, "Pass another --output."):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config.output, page)
    lines = [*evidence.analysis.verdict]
    for row in evidence.incomplete:
        lines.append(f"note: {row.run} is not complete: {row.state}.")
    if config.tables is not None:
        lines.append(_write_tables(evidence, config.tables))
    complete = len(runs) - len(evidence.incomplete)
    lines.append(f"written: {config.output} ({len(page) / 2**20:.1f} MiB, {complete} runs)")
    return "\n".join(lines)


def _write_tables(evidence: Evidence, folder: Path) -> str:
    """Writes each table as CSV, Markdown and LaTeX. Returns what to print."""
    payloads = {
        f"{table.key}.{ending}": write(table).encode("utf-8", errors="replace")
        for table in tables_of(evidence).values()
        for ending, write in FORMATS.items()
    }
    with writable(folder, RunError, "Pass another --tables."):
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, payloads)
    return f"written: {len(payloads)} files of tables in {folder}"
