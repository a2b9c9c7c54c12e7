"""The hub: asked once, briefly; its data sets read through `datasets`."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import datasets
import pytest
from conftest import ROOT

import lora.finetune.data.rows
from lora.errors import DataError
from lora.finetune.data.corpus import read_examples

ASK = """
import json, os
from lora.interop.hub import hub_answers
answers = [hub_answers(), hub_answers()]
import huggingface_hub.constants
offline = huggingface_hub.constants.HF_HUB_OFFLINE
print(json.dumps([answers, os.environ.get("HF_HUB_OFFLINE"), offline]))
"""


def ask(endpoint: str, **extra: str) -> list[object]:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=True, cwd=ROOT,
        env=environment | {"HF_ENDPOINT": endpoint, "no_proxy": "*"} | extra,
    )  # fmt: skip
    found: list[object] = json.loads(done.stdout)
    return found


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine that complains of every request, and counts them."""
    seen: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", seen
    served.shutdown()
    thread.join()
    served.server_close()


def test_one_request_decides(server: tuple[str, list[str]]) -> None:
    address, seen = server
    assert ask(address) == [[True, True], None, False]
    assert len(seen) == 1
    assert ask(address, HF_HUB_OFFLINE="1")[0] == [False, False]
    assert len(seen) == 1


def test_a_hub_that_is_away_turns_every_retry_off() -> None:
    assert ask("http://127.0.0.1:9") == [[False, False], "1", True]
    assert ask("no address at all")[0] == [False, False]


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """glue/sst2 as the hub has it: labels are numbers, those of test are hidden."""
    asked: list[tuple[str, str | None]] = []

    def rows(label: int | None) -> datasets.Dataset:
        labels = [i % 2 if label is None else label for i in range(4)]
        return datasets.Dataset.from_dict(
            {"sentence": ["one ", "two", "three", "four"], "label": labels, "idx": range(4)}
        )

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        if name == "owner/missing":
            raise FileNotFoundError("no such data set")
        return datasets.DatasetDict(train=rows(None), validation=rows(None), test=rows(-1))

    monkeypatch.setattr(lora.finetune.data.rows, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = read_examples("glue/sst2")
    assert corpus.labels == ("0", "1")
    assert corpus.train[0].text == "one"
    assert corpus.held_out[0] == "dev"
    read_examples("owner/name")
    read_examples("owner/name/config")
    assert asked == [("nyu-mll/glue", "sst2"), ("owner/name", None), ("owner/name", "config")]
    with pytest.raises(DataError, match="owner/missing cannot be loaded from the hub: no such"):
        read_examples("owner/missing")


def test_five_seconds_are_five_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """urlopen's own limit is per address, and does not count the look-up of the name."""
    import huggingface_hub.constants

    import lora.interop.hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked: list[float | None] = []

    class Asking(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            asked.append(timeout)
            super().join(0.01)

    held = threading.Event()
    monkeypatch.setattr(lora.interop.hub.threading, "Thread", Asking)
    monkeypatch.setattr(lora.interop.hub, "_probe", lambda: held.wait(60))
    lora.interop.hub.hub_answers.cache_clear()
    try:
        assert not lora.interop.hub.hub_answers()
        assert asked == [5]
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    finally:
        held.set()
        lora.interop.hub.hub_answers.cache_clear()
