"""Finds out once per process whether the hub answers: hub_answers()."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request


@functools.cache
def hub_answers() -> bool:
    """True if the hub answers a request within 5 seconds. The result is kept for the process.

    If it does not answer, sets HF_HUB_OFFLINE, so that no library retries for minutes.
    """
    results: list[bool] = []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        # urlopen's timeout holds for each address, and not for the DNS look-up. A thread limits
        # the whole request.
        request = threading.Thread(target=lambda: results.append(_probe()), daemon=True)
        request.start()
        request.join(5)
    answers = results == [True]
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
        # huggingface_hub read the variable when it was imported, so set its constant too.
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return answers


def _probe() -> bool:
    """True if the hub answers a HEAD request."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # an HTTP error is an answer
    except (OSError, ValueError):
        return False
