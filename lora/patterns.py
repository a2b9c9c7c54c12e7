"""Regular expressions of files and flags, checked and matched in bounded time.

They mean what Python's re makes of them, as in PEFT. But re has no limit: `(a+)+b` takes hours on
one layer's name. So the regex package does the matching, which takes the same syntax and a time
limit. What the two read differently, and counts that regex would unfold into gigabytes, are
refused.
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
SECONDS = 2.0  # of processor time for all matches of one pattern, beyond FREE each
FREE = 0.001

_COUNTS = re.compile(r"\\.|\{(\d{0,6})(?:,(\d{0,6}))?\}|\{", re.DOTALL)


class Pattern:
    """A regular expression in its frame. Raises ConfigError if it is none, or takes too long."""

    def __init__(self, text: str, frame: str) -> None:
        self.text, self.left = text, SECONDS
        whole = frame.replace("{}", text)
        try:
            _check_size(text)
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of sets that re will read otherwise
                re.compile(text)
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
                f"{text[:80]!r} is no regular expression{alone}: {e}.{hint}"
            ) from None

    def match(self, name: str) -> Any:
        """The match from the name's start on, or None."""
        return self._timed(self.engine.match, name)

    def fullmatch(self, name: str) -> Any:
        """The match of the whole name, or None."""
        return self._timed(self.engine.fullmatch, name)

    def _timed(self, method: Any, name: str) -> Any:
        began = time.thread_time()
        try:
            return method(name, timeout=max(self.left, FREE))
        except TimeoutError:
            raise ConfigError(
                f"the regular expression {self.text[:80]!r} takes more than {SECONDS:g} seconds on"
                f" the names of this model's layers, {name[:80]!r} among them. Write one in which"
                " no repetition stands inside another, or list the layers' names."
            ) from None
        finally:
            self.left -= max(0.0, time.thread_time() - began - FREE)


@functools.lru_cache(maxsize=16384)
def compiled(text: str, frame: str = FULL_MATCH) -> Pattern:
    """The pattern of a text. Raises ConfigError if it is no regular expression."""
    return Pattern(text, frame)


def check_pattern(field: str, text: object, frame: str = FULL_MATCH) -> None:
    """Raise ConfigError, which names the field, unless a text is a regular expression."""
    if not isinstance(text, str):
        raise SettingError(field, f"must be a text, found {text!r}.")
    try:
        compiled(text, frame)
    except ConfigError as error:
        raise SettingError(field, f"is refused: {error}") from None


def _check_size(text: str) -> None:
    """Raise ValueError if a pattern is too long, or regex would unfold it into too much."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, at most {LONGEST:,} are read")
    product = 1
    for found in _COUNTS.finditer(text):
        if found.group() == "{":
            raise ValueError("'{' begins no count such as {1,2}: write \\{")
        product *= max(1, *(int(count or 1) for count in found.groups("")))
    if product > UNFOLDED:
        raise ValueError(f"its counts multiply to {product:,}, at most {UNFOLDED:,} are read")
