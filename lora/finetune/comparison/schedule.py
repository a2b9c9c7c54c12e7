"""Trains the runs of a comparison, each in a process of its own, several at a time.

Each run has its own process, so that its peak memory can be measured and no state leaks from the
run before. Runs that are complete are kept, and interrupted ones are resumed. A run is locked while
a process works on it: processes and machines that share the folder divide the runs among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from lora.errors import ConfigError, RunError, StoppedError, command
from lora.files import locked, writable
from lora.finetune.comparison.grid import SEARCH_SEED
from lora.finetune.comparison.standing import SUFFIX, Standing, standing
from lora.finetune.config import RunConfig, from_table, parse_run, to_table, to_toml
from lora.finetune.estimate import duration
from lora.finetune.flags import as_flag
from lora.finetune.methods import label
from lora.finetune.record import is_complete, summary_of

PROGRAM = (sys.executable, "-m", "lora", "train")
LOCKS, LOGS = ".locks", "logs"
POLL = 0.1  # seconds between two looks at the processes
STOPPED = (130, 143)
"""Exit codes of a run that a signal stopped after it saved a checkpoint."""


@dataclass
class Outcome:
    """What became of the runs."""

    complete: list[Any] = field(default_factory=list)
    failed: list[Any] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    """Runs for which no time was left."""


@dataclass
class _Process:
    run: Any
    slot: int
    process: subprocess.Popen[bytes]
    resources: ExitStack
    started: float


class Scheduler:
    """Runs of one comparison, and the processes that train them.

    jobs: runs at a time. deadline: time.monotonic() after which none may run; planned_end: that by
    which all should have ended, so that none starts which would take longer. seconds: how long a
    run will take. say: prints a line for the user.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int = 1,
        deadline: float | None = None,
        seconds: Callable[[Any], float] = lambda run: 0.0,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        planned_end: float | None = None,
    ) -> None:
        self.folder, self.jobs, self.deadline = folder, jobs, deadline
        self.planned_end = deadline if planned_end is None else planned_end
        self.seconds, self.say = seconds, say
        self.interrupted = 0  # the signal that asked to stop
        self.late = False  # the deadline has passed

    def train(self, runs: Sequence[Any]) -> Outcome:
        """Train what is not complete, in this order. Returns what became of each run.

        Raises RunError if a folder holds another run, before anything is started, and StoppedError
        if a signal stopped a run; the others are waited for.
        """
        for run in runs:
            standing(run)
        outcome, waiting, active = Outcome(), deque(enumerate(runs, 1)), list[_Process]()
        away: deque[tuple[int, Any]] = deque()  # runs that another process works on
        told, look_again = 0, 0.0  # runs that were called away; when to ask again for them
        free = set(range(self.jobs))
        while waiting or active or away:
            try:
                while waiting and free and not self.interrupted:
                    number, run = waiting.popleft()
                    begun = self._begin(run, f"[{number}/{len(runs)}] ", min(free))
                    if begun == "complete":
                        outcome.complete.append(run)
                    elif begun == "diverged":
                        outcome.failed.append(run)
                    elif begun == "late":
                        outcome.left.append(run)
                    elif begun == "locked":
                        away.append((number, run))
                    else:
                        active.append(begun)
                        free.remove(begun.slot)
                for each in [a for a in active if a.process.poll() is not None]:
                    active.remove(each)
                    free.add(each.slot)
                    self._end(each, outcome)
                self._stop_late(active)
                if self.late:  # the other process may work on them for longer
                    for _, run in away:
                        done = is_complete(run.run_dir)
                        (outcome.complete if done else outcome.left).append(run)
                    away.clear()
                if self.interrupted and not active:
                    again = "run the same command again to continue."
                    raise StoppedError(again, self.interrupted)
                # The process may have been killed: its runs are taken over while others train.
                if not waiting and away and time.monotonic() >= look_again:
                    if not active and told != len(away):
                        told = len(away)
                        self.say(f"waiting for {told} of the runs, which another process makes")
                    waiting, away = away, deque()
                    look_again = time.monotonic() + 50 * POLL
                time.sleep(POLL if active or away else 0)
            except KeyboardInterrupt:  # reaches the runs too, which save a checkpoint and end
                self.interrupted = self.interrupted or 2
        return outcome

    def too_late(self, runs: Sequence[Any]) -> bool:
        """True if runs would not end by the time that is planned. Complete ones need no time."""
        left = [run for run in runs if not is_complete(run.run_dir)]
        if self.planned_end is None or not left:
            return False
        needed = sum(map(self.seconds, left)) / min(self.jobs, len(left))
        return self.late or time.monotonic() + needed > self.planned_end

    def _stop_late(self, active: Sequence[_Process]) -> None:
        """After the deadline, ask the runs to save a checkpoint and end, and start no more."""
        if self.deadline is not None and time.monotonic() > self.deadline and not self.late:
            self.late = True
            for each in active:
                each.process.terminate()

    def _begin(self, run: Any, head: str, slot: int) -> Any:
        """Start a run. Returns its process, or "complete", or "diverged" if it did before, or
        "late" if it would not end in time, or "locked" if another process works on it."""
        with ExitStack() as stack:
            locks = self.folder / LOCKS
            with writable(self.folder, RunError, "Pass another --run-dir."):
                locks.mkdir(parents=True, exist_ok=True)
                name = str(run.run_dir.relative_to(self.folder)).replace(os.sep, "-")
                lock = stack.enter_context(locked(locks / name))
            if lock is None:
                return "locked"
            state = standing(run)
            ended = state in ("complete", "diverged")
            if not ended and self.too_late([run]):
                return "late"
            self.say(f"{head}{title(run)}{SUFFIX[state]}")
            if ended:
                return state
            process = self._spawn(run, state, lock, slot, stack)
            return _Process(run, slot, process, stack.pop_all(), time.monotonic())

    def _spawn(
        self, run: Any, state: Standing, lock: int, slot: int, stack: ExitStack
    ) -> subprocess.Popen[bytes]:
        """Start `lora train`. One run at a time prints to this terminal, several to log files."""
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "run.toml"
        file.write_text(to_toml(run), encoding="utf-8")
        arguments = list(PROGRAM)
        if state == "interrupted":
            arguments += ["--resume", str(run.run_dir)]
        else:
            arguments += ["--config", str(file), "--run-dir", str(run.run_dir)]
        # On Windows processes inherit no descriptors: only the run's own lock protects its folder.
        more: dict[str, Any] = {} if sys.platform == "win32" else {"pass_fds": [lock]}
        if self.jobs > 1:
            more |= {"stdout": self._log(run, stack), "stderr": subprocess.STDOUT}
            more["env"] = os.environ | share_of_devices(slot, self.jobs)
        process = subprocess.Popen(arguments, **more)
        if self.jobs > 1:
            _pin(process.pid, share_of_cores(slot, self.jobs))
        return process

    def _log(self, run: Any, stack: ExitStack) -> IO[bytes]:
        path = self.log_of(run)
        with writable(path, RunError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(path.open("ab"))

    def log_of(self, run: Any) -> Path:
        """Returns the file with the output of a run that does not print to the terminal."""
        return self.folder / LOGS / f"{run.run_dir.name}.log"

    def _end(self, ended: _Process, outcome: Outcome) -> None:
        ended.resources.close()
        run, code = ended.run, ended.process.returncode
        taken = duration(time.monotonic() - ended.started)
        # A signal may reach a run that is complete and about to exit.
        if code == 0 or is_complete(run.run_dir):
            outcome.complete.append(run)
            if self.jobs > 1:
                summary = summary_of(run.run_dir)
                metric, score = next(iter(summary["metrics"].items()))
                self.say(f"      {title(run)}: {summary['split']} {metric} {score:.4f}, {taken}")
        elif code in STOPPED or (self.late and code < 0):
            outcome.left.append(run)
            if not self.late:
                self.interrupted = self.interrupted or code - 128
        else:
            outcome.failed.append(run)
            where = f" See {self.log_of(run)}." if self.jobs > 1 else " Its error is printed above."
            self.say(f"      {title(run)} failed with exit code {code}.{where}")


def title(run: RunConfig[Any]) -> str:
    """Returns what messages call a run."""
    name = run.name or label(run.method)
    if run.test_limit == 0 and run.learning_rate is not None:
        further = f", seed {run.seed}" if run.seed != SEARCH_SEED else ""
        return f"{name}, rate {run.learning_rate:g}{further}"
    return f"{name}, seed {run.seed}"


def share_of_cores(slot: int, jobs: int) -> list[int]:
    """Returns the cores of one of several runs at a time; [] if this system pins no processes."""
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):  # macOS
        return []
    cores = sorted(process.cpu_affinity())
    width = max(1, len(cores) // jobs)
    first = slot * width % len(cores)
    return cores[first : first + width]


def share_of_devices(slot: int, jobs: int) -> dict[str, str]:
    """Returns the environment that gives one of several runs at a time its cores and its GPU."""
    import torch

    cores = share_of_cores(slot, jobs)
    threads = len(cores) or max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads)}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _pin(process: int, cores: Sequence[int]) -> None:
    with suppress(psutil.Error, OSError):  # it may have ended already
        if cores:
            psutil.Process(process).cpu_affinity(list(cores))


def train_command(run: RunConfig[Any], state: Standing = "new") -> str:
    """Returns the shell command that makes a run, with the flags that differ from the defaults, or
    that resumes it.

    Raises ConfigError if a setting cannot be written as a flag.
    """
    if state == "interrupted":
        return command("lora", "train", "--resume", run.run_dir)
    defaults = to_table(from_table({}, run.method))
    arguments: list[object] = ["--method", run.method]
    for key, value in to_table(run).items():
        if key == "method" or value == defaults.get(key):
            continue
        if isinstance(value, bool):
            arguments.append(as_flag(key) if value else as_flag(f"no_{key}"))
        elif isinstance(value, dict):
            arguments += [as_flag(key), *(part for pair in value.items() for part in pair)]
        else:
            arguments += [as_flag(key), *(value if isinstance(value, list) else [value])]
    words = list(map(str, arguments))
    if to_table(parse_run(words)) != to_table(run):
        raise ConfigError(
            f"the settings of {title(run)} cannot all be written as flags. Run lora compare without"
            " --dry-run."
        )
    return command("lora", "train", *words)
