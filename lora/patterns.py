"""Checks and matches regular expressions from files and flags, in bounded time.

A pattern means what Python's re would match, as in PEFT. But re has no time limit: `(a+)+b` takes
hours on one layer's name. So the regex package matches, which has the same syntax and a time limit.
Patterns that the two packages read differently are refused, and so are counts that regex would
expand into gigabytes.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from typing import Any

import regex

from lora.errors import ConfigError, SettingError

FULL_MATCH = "{}"
"""The frame of target_modules and exclude_modules: matched with fullmatch."""
ENDING = r"(.*\.)?({})$"
"""The frame of a key of rank_pattern and alpha_pattern: a name, or a dotted ending of one."""
BLOCKS = r"(?:^|.*?\.)(?:{})\.(\d+)\."
"""The frame of layers_pattern: the list that a numbered block is in."""

LONGEST = 200_000  # characters of one pattern
UNFOLDED = 10_000  # the product of all counts {n} and {n,m} of a pattern
SECONDS = 2.0  # of CPU time for all matches of one pattern, beyond FREE for each match
FREE = 0.001  # so that a harmless pattern on a large model never runs out of time

_COUNTS = re.compile(r"\\.|\{(\d{0,6})(?:,(\d{0,6}))?\}|\{", re.DOTALL)


class Pattern:
    """A regular expression in its frame, with a budget of CPU time.

    Raises ConfigError if the text is not a regular expression, or if matching takes too long.
    """

    def __init__(self, text: str, frame: str) -> None:
        self.text, self.left = text, SECONDS
        whole = frame.replace("{}", text)
        try:
            _check_size(text)
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # nested sets: re and regex differ
                re.compile(text)  # alone too: `a)|(b` compiles only inside a frame
                re.compile(whole)
                self.engine: Any = regex.compile(whole)
        except (
            re.error,
            regex.error,
            ValueError,
            OverflowError,
            RecursionError,
            FutureWarning,
        ) as e:
            alone = "" if frame == FULL_MATCH else f" inside {frame.replace('{}', '...')}"
            hint = " Write (?i:...) for (?i)..." if "global flags" in str(e) else ""
            raise ConfigError(
                f"{text[:80]!r} is not a regular expression{alone}: {e}.{hint}"
            ) from None

    def match(self, name: str) -> Any:
        """Returns the match at the start of the name, or None."""
        return self._timed(self.engine.match, name)

    def fullmatch(self, name: str) -> Any:
        """Returns the match of the whole name, or None."""
        return self._timed(self.engine.fullmatch, name)

    def _timed(self, method: Any, name: str) -> Any:
        """Returns method(name) and charges its time to the budget."""
        # thread_time, since on a busy machine wall time would refuse harmless patterns.
        began = time.thread_time()
        try:
            return method(name, timeout=max(self.left, FREE))
        except TimeoutError:
            raise ConfigError(
                f"the regular expression {self.text[:80]!r} takes more than {SECONDS:g} seconds on"
                f" the names of this model's layers, {name[:80]!r} among them. Write one without"
                " a repetition inside a repetition, or list the layers' names."
            ) from None
        finally:
            self.left -= max(0.0, time.thread_time() - began - FREE)


@functools.lru_cache(maxsize=16384)
def compiled(text: str, frame: str = FULL_MATCH) -> Pattern:
    """Returns the Pattern of a text. Raises ConfigError if it is not a regular expression."""
    return Pattern(text, frame)


def check_pattern(field: str, text: object, frame: str = FULL_MATCH) -> None:
    """Raise SettingError, which names the field, unless the text is a regular expression."""
    if not isinstance(text, str):
        raise SettingError(field, f"must be a text, found {text!r}.")
    try:
        compiled(text, frame)
    except ConfigError as error:
        raise SettingError(field, f"is refused: {error}") from None


def _check_size(text: str) -> None:
    """Raise ValueError if a pattern is too long, or if regex would need too much memory for it."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, at most {LONGEST:,} are read")
    product = 1
    for match in _COUNTS.finditer(text):
        if match.group() == "{":  # a plain character to re, approximate matching to regex
            raise ValueError("'{' begins no count such as {1,2}: write \\{")
        product *= max(1, *(int(count or 1) for count in match.groups("")))
    if product > UNFOLDED:
        raise ValueError(f"its counts multiply to {product:,}, at most {UNFOLDED:,} are read")
