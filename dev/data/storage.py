"""Files that are whole or not there: durable writing, and downloads that are verified and resumed.

A file is written under its name with `.part` added, flushed to the disk (fsync), then renamed, which a file system does
whole or not at all; last, its folder is flushed. So a file under its real name is complete, whenever the machine
stopped.

A download goes on where its `.part` ends (an HTTP request with Range), as often as the connection breaks, and becomes
the file only if its size and its SHA-256 are the published ones.
"""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

TRIES = 6  # failures in a row, without a byte received, after which a download gives up
RETRY_SECONDS = 1.0  # after the first failure; twice as long after each further one
TIMEOUT_SECONDS = 60.0  # without an answer
CHUNK_BYTES = 1 << 20
PASSING_ERRORS = {408, 425, 429, 500, 502, 503, 504}  # HTTP: worth another try

Result = TypeVar("Result")


class Fault(Exception):
    """What is wrong, in one line: what was expected, what was found, what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def part_of(path: Path) -> Path:
    """The name of the file while it is not complete."""
    return path.with_name(path.name + ".part")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file in what the system says when writing it fails."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise Fault(f"cannot write '{path}': {reason}; when this is mended, the same command goes on") from error


def write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def publish(path: Path) -> None:
    """Gives the flushed `.part` its real name, durably."""
    with writing(path):
        os.replace(part_of(path), path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file; whoever reads it meanwhile, or after a crash, finds the old one or the new one."""
    with writing(path):
        fd = os.open(part_of(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
    publish(path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


@dataclass(frozen=True)
class Remote:
    """A file to download, as it was published."""

    url: str
    bytes: int
    sha256: str


def insist(what: str, action: Callable[[], Result], received: Callable[[], int]) -> Result:
    """The action's result. It is tried again after failures that may pass, until TRIES in a row brought nothing."""
    failures, before = 0, received()
    while True:
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING_ERRORS:
                raise Fault(f"cannot download {what}: the server says {error.code} {error.reason}") from error
            reason = str(error) or type(error).__name__
        failures = 0 if received() > before else failures + 1
        before = received()
        if failures == TRIES:
            raise Fault(f"cannot download {what}: {reason}; the same command goes on where this stopped")
        time.sleep(RETRY_SECONDS * 2**failures)


def fetch_json(url: str) -> list | dict:
    def action() -> list | dict:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            return json.load(answer)

    try:
        return insist(url, action, lambda: 0)
    except ValueError as error:
        raise Fault(f"{url} did not answer with JSON ({error}); is it the right server?") from None


def receive(remote: Remote, fd: int, progress: Callable[[int], None]) -> None:
    """One connection: appends what the file lacks. Raises an OSError if it ends too early."""
    have = os.lseek(fd, 0, os.SEEK_END)
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if have and answer.status != 206:  # the server does not know Range and sends everything
            os.ftruncate(fd, 0)
            have = os.lseek(fd, 0, os.SEEK_SET)
        while have < remote.bytes and (chunk := answer.read1(min(CHUNK_BYTES, remote.bytes - have))):
            with writing(Path(f"download of {remote.url}")):
                write_all(fd, chunk)
            have += len(chunk)
            progress(have)
    if have < remote.bytes:
        raise ConnectionError(f"the connection ended after {have} of {remote.bytes} bytes")


def download(remote: Remote, path: Path, progress: Callable[[int], None]) -> None:
    """Makes `path` the published file, if it is not there already. progress() is told how many bytes are there."""
    if path.is_file():
        if path.stat().st_size != remote.bytes:
            raise Fault(f"'{path}' has {path.stat().st_size} bytes, expected {remote.bytes}; remove it and run again")
        return
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(fd).st_size > remote.bytes:
            os.ftruncate(fd, 0)
        if os.fstat(fd).st_size < remote.bytes:
            insist(remote.url, lambda: receive(remote, fd, progress), lambda: os.fstat(fd).st_size)
        with writing(part):
            os.fsync(fd)
    finally:
        os.close(fd)
    found = sha256_of(part)
    if found != remote.sha256:
        part.unlink()
        raise Fault(f"{remote.url} has SHA-256 {found}, expected {remote.sha256}; it was removed: run again")
    publish(path)
