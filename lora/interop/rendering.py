"""Renders chat templates in a process of their own, with limits of time and memory.

    render(template, values)    a text for each, character for character as transformers renders it

A chat template is a Jinja program that comes with a model. Jinja's sandbox keeps it from files and
from Python's internals, and not from looping for hours or asking for all memory. So this file is
also a program: it imports Jinja alone, renders what it is sent, and is ended when a text takes too
long. One process serves all templates; it ends with the process that started it.

    a request, one line of JSON      [template, [values, ...]]
    for each values a line of JSON   {"text": ...}, {"error": ...} if the template raised one,
                                     {"limit": ...} past a limit, {"missing": ...} without Jinja
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

TIME_LIMIT = 10
"""A text may take so long. The longest conversations of real templates take milliseconds."""
MEMORY = 1 << 30
"""Bytes of address space that the process may use, if the system has such a limit (Linux does)."""
ROOM = 1 << 20
"""A text may have so many characters more than ten times those of what it is made from."""


class RenderError(Exception):
    """The template raised an error."""


class LimitError(RenderError):
    """The template needed more than a text may."""


def render(template: str, values: Sequence[Mapping[str, Any]]) -> list[str | RenderError]:
    """For each values, of JSON's types, the text that a template makes of them, or what it did
    instead.

    Raises ImportError if Jinja is not installed.
    """
    return _renderer.render(template, values)


class _Renderer:
    """The process, started at the first text and again after one that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # a fork would read its parent's answers
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.process, self.lock = None, threading.Lock()

    def render(self, template: str, values: Sequence[Mapping[str, Any]]) -> list[str | RenderError]:
        texts: list[str | RenderError] = []
        with self.lock:
            while len(texts) < len(values):
                texts += self._attempt(template, values[len(texts) :])
        return texts

    def _attempt(
        self, template: str, values: Sequence[Mapping[str, Any]]
    ) -> list[str | RenderError]:
        """What the process makes of values, up to the first that it does not survive."""
        texts: list[str | RenderError] = []
        try:
            try:
                request = json.dumps([template, values]).encode()
            except RecursionError:
                if len(values) > 1:
                    return self._attempt(template, values[:1])
                return [RenderError("it is nested too deeply")]
            answers = self._ask(request + b"\n")
            for _ in values:
                line = answers.readline()
                if not line:
                    self.close()
                    return [*texts, LimitError(_beyond(f"{TIME_LIMIT} seconds"))]
                answer: dict[str, str] = json.loads(line)
                if "missing" in answer:
                    raise ImportError(answer["missing"])
                texts.append(_result(answer))
        except BaseException:  # as Ctrl-C: the next request would be given what is left of this one
            self.close()
            raise
        return texts

    def _ask(self, request: bytes) -> IO[bytes]:
        """Send a request; what the answers are read from. Starts the process if there is none."""
        if self.process is not None and self.process.poll() is not None:
            self.close()  # something else ended it
        if self.process is None:
            # -P: this file's folder, lora, is no place to import from.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), str(TIME_LIMIT), str(MEMORY)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            process.stdin.write(request)
            process.stdin.flush()
        return process.stdout

    def close(self) -> None:
        """End the process and wait until it has ended."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # of a request that was not sent whole
                process.communicate()


def _beyond(more: str = "") -> str:
    limits = f"{more} or {MEMORY >> 20} MiB of memory" if more else f"{MEMORY >> 20} MiB of memory"
    return f"it needed more than {limits} for one text"


def _result(answer: dict[str, str]) -> str | RenderError:
    if "error" in answer:
        return RenderError(answer["error"])
    return LimitError(answer["limit"]) if "limit" in answer else answer["text"]


_renderer = _Renderer()
atexit.register(_renderer.close)


def _serve() -> None:
    """Answer each line of the input until it ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal
    try:
        _environment()
    except ImportError as error:
        missing = f"chat templates need Jinja: {error}. Run pip install 'jinja2>=3.1.6'"
    else:
        missing = ""
        _limit_memory()
    for line in sys.stdin.buffer:
        template, several = json.loads(line)
        most = ROOM + 10 * len(line)
        with _watched() as at_work:
            for values in several:
                at_work()
                answer = {"missing": missing} if missing else _rendered(template, values, most)
                sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
                sys.stdout.buffer.flush()


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[], None]]:
    """Within, the process ends SECONDS after the last call of what is yielded, also in the middle
    of one long operation: the watch is a thread outside Python's lock."""
    begun = 0.0

    def at_work() -> None:
        nonlocal begun
        if time.monotonic() - begun > 0.5:  # the watch costs more than most texts
            begun = time.monotonic()
            faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=nowhere)

    with open(os.devnull, "w") as nowhere:
        yield at_work
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    """Limits this process to MEMORY bytes. Windows has no such limit; there SECONDS alone holds."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):  # macOS refuses a limit below what is mapped
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _rendered(template: str, values: dict[str, Any], most: int) -> dict[str, str]:
    """The answer for one text."""
    try:
        text = _compiled(template).render(**values)
    except MemoryError:
        return {"limit": _beyond()}
    except RecursionError:
        return {"limit": "it calls itself without end"}
    except Exception as error:  # a template raises what it likes
        return {"error": str(error) or type(error).__name__}
    if len(text) > most:
        return {"limit": f"it wrote {len(text)} characters, {most} at most are taken"}
    return {"text": text}


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


class _Dict:
    """dict, without the attributes that lead from a class to Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Returns Jinja as transformers sets it up in utils/chat_template_utils.py."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, whose body is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
            self, rest = args[0], args[1:]
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace has no attribute {name!r}, which begins with an underscore"
            )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_Dict(),
        namespace=Namespace,
    )
    return environment


if __name__ == "__main__":
    TIME_LIMIT, MEMORY = map(int, sys.argv[1:])
    _serve()
