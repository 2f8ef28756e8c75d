"""Token files of a fixed number of tokens, written so that a run which is killed at any moment goes on.

    PREFIX_train_000000.bin ...   training (format: data/README.md), each full but the last
    PREFIX_val_000000.bin ...     validation
    PREFIX_manifest.json          what they were made from, their sizes and SHA-256, and how far the work is

The manifest is the truth. Tokens are appended to a file named `.part`. A *commit* flushes these files, then writes the
manifest whole: pieces done, tokens in the unfinished files, finished files; only then do the finished ones get their
real names. Whoever opens the set again renames what is finished and not renamed yet, cuts off what was appended after
the last commit, and goes on with the first piece that is not done. So a file with its real name is complete, and the
result does not depend on where, or how often, the work was interrupted.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from storage import Fault, part_of, publish, sha256_of, write_all, write_whole, writing

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
MANIFEST_VERSION = 1
SPLITS = ("train", "val")
COMMITS_PER_SHARD = 16  # so that a kill costs little, and a commit's flush too

Settings = dict[str, Any]  # what a resumed run must have in common with the one before; as JSON


def shard_path(prefix: Path, split: str, index: int) -> Path:
    return prefix.with_name(f"{prefix.name}_{split}_{index:06d}.bin")


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}_manifest.json")


def file_bytes(tokens: int) -> int:
    return HEADER_BYTES + 2 * tokens


class Stream:
    """The files of one split, one after the other."""

    def __init__(self, prefix: Path, split: str, vocabulary_size: int, shard_tokens: int) -> None:
        self.prefix, self.split = prefix, split
        self.vocabulary_size, self.shard_tokens = vocabulary_size, shard_tokens
        self.index = 0  # of the file under way
        self.tokens = 0  # in it
        self.fd = -1  # of it; -1: not begun
        self.finished: list[dict[str, Any]] = []  # files that are complete, but not in the manifest

    @property
    def path(self) -> Path:
        return shard_path(self.prefix, self.split, self.index)

    def resume(self, index: int, tokens: int) -> None:
        """Goes on behind the first `tokens` tokens of the file with this index."""
        self.index, self.tokens = index, tokens
        if tokens == 0:
            return
        part = part_of(self.path)
        if not part.is_file() or part.stat().st_size < file_bytes(tokens):
            raise Fault(f"'{part}' was changed or removed since a run wrote it; {start_anew(self.prefix)}")
        with writing(part):
            self.fd = os.open(part, os.O_RDWR)
            os.ftruncate(self.fd, file_bytes(tokens))
            os.lseek(self.fd, 0, os.SEEK_END)

    def append(self, tokens: np.ndarray) -> None:  # uint16
        while len(tokens) > 0:
            some = tokens[: self.shard_tokens - self.tokens]
            with writing(part_of(self.path)):
                if self.fd < 0:
                    self.fd = os.open(part_of(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    write_all(self.fd, bytes(HEADER_BYTES))
                write_all(self.fd, np.ascontiguousarray(some, "<u2"))
            self.tokens += len(some)
            tokens = tokens[len(some) :]
            if self.tokens == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Completes the file under way, if there is one."""
        if self.fd < 0:
            return
        words = [MAGIC, VERSION, self.tokens, self.vocabulary_size]
        with writing(part_of(self.path)):
            os.lseek(self.fd, 0, os.SEEK_SET)
            write_all(self.fd, struct.pack(f"<{HEADER_WORDS}I", *words, *[0] * (HEADER_WORDS - len(words))))
        self.flush()
        self.close()
        sha256 = sha256_of(part_of(self.path))
        self.finished.append({"file": self.path.name, "tokens": self.tokens, "sha256": sha256})
        self.index, self.tokens = self.index + 1, 0

    def flush(self) -> None:
        if self.fd >= 0:
            with writing(part_of(self.path)):
                os.fsync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Shards:
    """Both splits and their manifest. Use it as a context: `with Shards(...) as shards`."""

    def __init__(self, prefix: Path, settings: Settings, vocabulary_size: int, shard_tokens: int) -> None:
        self.prefix = prefix
        self.manifest: dict[str, Any] = {
            "version": MANIFEST_VERSION,
            "complete": False,
            "pieces_done": 0,
            "documents": dict.fromkeys(SPLITS, 0),
            "unfinished": dict.fromkeys(SPLITS, 0),
            "shards": {split: [] for split in SPLITS},
            "settings": settings,
        }
        if manifest_path(prefix).is_file():
            self.manifest = read_manifest(prefix)
            compare_settings(prefix, self.manifest["settings"], settings)
        self.streams = {split: Stream(prefix, split, vocabulary_size, shard_tokens) for split in SPLITS}
        self.commit_tokens = shard_tokens // COMMITS_PER_SHARD
        self.uncommitted = 0  # tokens

    def __enter__(self) -> "Shards":
        for shard in all_shards(self.manifest):
            self.publish_once(shard)
        self.refuse_strangers()
        for split, stream in self.streams.items():
            stream.resume(len(self.manifest["shards"][split]), self.manifest["unfinished"][split])
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def publish_once(self, shard: dict[str, Any]) -> None:
        path = self.prefix.with_name(shard["file"])
        if not path.is_file() and part_of(path).is_file():
            publish(path)
        if not path.is_file() or path.stat().st_size != file_bytes(shard["tokens"]):
            raise Fault(f"'{path}' was changed or removed since it was written; {start_anew(self.prefix)}")

    def refuse_strangers(self) -> None:
        """Nothing that the trainer's pattern would match beside our own files."""
        ours = {shard["file"] for shard in all_shards(self.manifest)}
        for split in SPLITS:
            for path in self.prefix.parent.glob(f"{glob_literal(self.prefix.name)}_{split}*.bin"):
                if path.name not in ours:
                    raise Fault(f"'{path}' is not from this run, but would be read with it; remove it, or change --out")

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    @property
    def pieces_done(self) -> int:
        return self.manifest["pieces_done"]

    def tokens(self, split: str) -> int:
        """In all files of a split, as of the last commit."""
        return sum(shard["tokens"] for shard in self.manifest["shards"][split]) + self.manifest["unfinished"][split]

    def append(self, tokens: dict[str, np.ndarray], documents: dict[str, int]) -> None:
        """The tokens of the next piece, by split."""
        self.manifest["pieces_done"] += 1
        for split, stream in self.streams.items():
            self.manifest["documents"][split] += documents[split]
            stream.append(tokens[split])
            self.uncommitted += len(tokens[split])
        if self.uncommitted >= self.commit_tokens or any(stream.finished for stream in self.streams.values()):
            self.commit()

    def commit(self) -> None:
        finished = []
        for split, stream in self.streams.items():
            stream.flush()
            self.manifest["unfinished"][split] = stream.tokens
            self.manifest["shards"][split] += stream.finished
            finished += stream.finished
            stream.finished = []
        self.uncommitted = 0
        write_whole(manifest_path(self.prefix), json.dumps(self.manifest, indent=1).encode() + b"\n")
        for shard in finished:
            self.publish_once(shard)

    def finish(self) -> None:
        """Completes the last files."""
        for stream in self.streams.values():
            stream.finish()
        self.manifest["complete"] = True
        self.commit()


def all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in SPLITS for shard in manifest["shards"][split]]


def start_anew(prefix: Path) -> str:
    return f"to start anew remove {manifest_path(prefix)} {prefix}_train_* {prefix}_val_*"


def glob_literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def read_manifest(prefix: Path) -> dict[str, Any]:
    path = manifest_path(prefix)
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"]
    except OSError as error:
        raise Fault(f"cannot read '{path}': {error.strerror}; expected the manifest of a token set") from None
    except (ValueError, KeyError, TypeError):
        raise Fault(f"'{path}' is no manifest of a token set; {start_anew(prefix)}") from None
    if version != MANIFEST_VERSION:
        raise Fault(f"'{path}' has version {version}, expected {MANIFEST_VERSION}; {start_anew(prefix)}")
    return manifest


def compare_settings(prefix: Path, before: Settings, now: Settings) -> None:
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        raise Fault(
            f"'{manifest_path(prefix)}' was made with other settings ({', '.join(different)}); use the same, or "
            f"another --out; {start_anew(prefix)}"
        )


def verify(prefix: Path) -> dict[str, Any]:
    """The manifest of a complete set whose every file is what the manifest says."""
    manifest = read_manifest(prefix)
    if not manifest["complete"]:
        raise Fault(f"'{prefix}' is not complete: {manifest['pieces_done']} pieces are done; run its command again")
    for shard in all_shards(manifest):
        path = prefix.with_name(shard["file"])
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            raise Fault(f"'{path}' is missing or not what was written; {start_anew(prefix)}")
    return manifest
