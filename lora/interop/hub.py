"""The hub, asked once and briefly."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers one request within 5 seconds; asked once per process.

    Sets HF_HUB_OFFLINE where it does not, so that no library retries after it.
    """
    found: list[bool] = []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        # urlopen's own limit is per address and leaves out the name's look-up.
        asking = threading.Thread(target=lambda: found.append(_probe()), daemon=True)
        asking.start()
        asking.join(5)
    answers = found == [True]
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
        # Read once at import, long before this: the library's own switch.
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return answers


def _probe() -> bool:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it answered, if only to complain
    except (OSError, ValueError):
        return False
