"""Renders chat templates in a separate process, with limits of time and memory.

    render(template, contexts)      one text per context, equal to transformers' to the character

A context is what Jinja calls so: the values of the template's variables, such as messages.

A chat template is a Jinja program that comes with a model. Jinja's sandbox denies it files and
Python's internals, but does not stop an endless loop or a huge allocation. A thread cannot be
stopped from outside either, so this file is also a program: it imports only Jinja, renders the
requests on its stdin, and exits if a text takes too long. One process serves all templates. It ends
when the process that started it ends, because its stdin is then closed.

    request, one line of JSON               [template, [context, ...]]
    answer, one line of JSON per context    {"text": ...}
                                            {"error": ...} if the template raised an error
                                            {"limit": ...} if the text exceeds a limit
                                            {"missing": ...} if Jinja is not installed
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
"""Seconds for one text. Real templates take milliseconds for the longest conversations."""
MEMORY = 1 << 30
"""Bytes of address space that the process may use, if the system has such a limit (Linux does)."""
EXTRA_LENGTH = 1 << 20
"""A text may be ten times as long as its request, and this many characters more."""


class RenderError(Exception):
    """The template raised an error."""


class LimitError(RenderError):
    """The template exceeded a limit of time, memory or length."""


def render(template: str, contexts: Sequence[Mapping[str, Any]]) -> list[str | RenderError]:
    """Returns a text per context, or in its place the error that the template raised.

    contexts: each maps the template's variables to JSON values. Raises ImportError if Jinja is not
    installed.
    """
    return _renderer.render(template, contexts)


class _Renderer:
    """Starts the process at the first text, and again after a text that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        # A forked child inherits the pipe, and would read answers to its parent's requests.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.process, self.lock = None, threading.Lock()

    def render(
        self, template: str, contexts: Sequence[Mapping[str, Any]]
    ) -> list[str | RenderError]:
        texts: list[str | RenderError] = []
        with self.lock:
            while len(texts) < len(contexts):
                texts += self._render_some(template, contexts[len(texts) :])
        return texts

    def _render_some(
        self, template: str, contexts: Sequence[Mapping[str, Any]]
    ) -> list[str | RenderError]:
        """Returns the texts up to and including the first one that ends the process."""
        texts: list[str | RenderError] = []
        try:
            try:
                request = json.dumps([template, contexts]).encode()
            except RecursionError:
                if len(contexts) > 1:  # find out which of them is nested too deeply
                    return self._render_some(template, contexts[:1])
                return [RenderError("it is nested too deeply")]
            answers = self._send(request + b"\n")
            for _ in contexts:
                line = answers.readline()
                if not line:
                    self.close()
                    return [*texts, LimitError(_limits(f"{TIME_LIMIT} seconds"))]
                answer: dict[str, str] = json.loads(line)
                if "missing" in answer:
                    raise ImportError(answer["missing"])
                texts.append(_result(answer))
        except BaseException:  # Ctrl-C too: the next request would read this one's answers
            self.close()
            raise
        return texts

    def _send(self, request: bytes) -> IO[bytes]:
        """Sends a request. Returns the stream of its answers. Starts the process if none runs."""
        if self.process is not None and self.process.poll() is not None:
            self.close()  # something else ended it
        if self.process is None:
            # -P: do not import from this file's folder, whose modules could hide Jinja's imports.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), str(TIME_LIMIT), str(MEMORY)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # the process has ended; reading an answer reports it
            process.stdin.write(request)
            process.stdin.flush()
        return process.stdout

    def close(self) -> None:
        """Kills the process and waits for its end."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # only a part of the request was sent
                process.communicate()


def _limits(time_limit: str = "") -> str:
    """Says which limit a text exceeded: memory, or either one if a time limit is passed."""
    memory = f"{MEMORY >> 20} MiB of memory"
    limits = f"{time_limit} or {memory}" if time_limit else memory
    return f"it needed more than {limits} for one text"


def _result(answer: dict[str, str]) -> str | RenderError:
    """Returns the text of an answer, or its error."""
    if "error" in answer:
        return RenderError(answer["error"])
    return LimitError(answer["limit"]) if "limit" in answer else answer["text"]


_renderer = _Renderer()
atexit.register(_renderer.close)


def _serve() -> None:
    """Answers each line of stdin until it ends."""
    import signal

    # Ctrl-C reaches every process of the terminal. The parent decides what to do with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _environment()
    except ImportError as error:
        missing = f"chat templates need Jinja: {error}. Run pip install 'jinja2>=3.1.6'"
    else:
        missing = ""
        _limit_memory()
    for line in sys.stdin.buffer:
        template, contexts = json.loads(line)
        max_length = EXTRA_LENGTH + 10 * len(line)
        with _watchdog() as restart:
            for context in contexts:
                restart()
                answer = (
                    {"missing": missing} if missing else _rendered(template, context, max_length)
                )
                sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
                sys.stdout.buffer.flush()


@contextlib.contextmanager
def _watchdog() -> Iterator[Callable[[], None]]:
    """Yields a function that restarts the time limit. The process exits when the time is up.

    faulthandler's thread does not need the GIL, so it also interrupts one long operation in C, such
    as 10 ** 10 ** 9.
    """
    started = 0.0

    def restart() -> None:
        nonlocal started
        if time.monotonic() - started > 0.5:  # restarting takes longer than most texts
            started = time.monotonic()
            faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=null)

    with open(os.devnull, "w") as null:
        yield restart
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    """Limits this process to MEMORY bytes. Windows has no such limit, only the limit of time."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):  # macOS refuses a limit below what is mapped
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _rendered(template: str, context: dict[str, Any], max_length: int) -> dict[str, str]:
    """Returns the answer for one text."""
    try:
        text = _compiled(template).render(**context)
    except MemoryError:
        return {"limit": _limits()}
    except RecursionError:
        return {"limit": "it calls itself endlessly"}
    except Exception as error:  # a template can raise any exception
        return {"error": str(error) or type(error).__name__}
    if len(text) > max_length:
        return {"limit": f"it wrote {len(text):,} characters, at most {max_length:,} are allowed"}
    return {"text": text}


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


class _Dict:
    """What templates call as dict. The class itself would give them Python's internals."""

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
        """{% generation %} ... {% endgeneration %} renders its body unchanged.

        Templates mark the assistant's tokens with it, for transformers. Without this extension,
        Jinja would reject such a template.
        """

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's Namespace, but names that begin with an underscore are an error."""

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
                f"a namespace cannot have {name!r}, which begins with an underscore"
            )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda pattern: datetime.now().strftime(pattern),
        dict=_Dict(),
        namespace=Namespace,
    )
    return environment


if __name__ == "__main__":
    TIME_LIMIT, MEMORY = map(int, sys.argv[1:])
    _serve()
