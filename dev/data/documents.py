"""From files to pieces of work to documents.

What is a document, by the file's layout:

    parquet   a row: its text column
    jsonl     a line: its text field
    text      what lies between two separators, without the white space around it; without a separator the whole file,
              unchanged

Empty documents are left out. A *piece* is what one process turns into tokens at a time: a row group of a parquet file,
or about PIECE_BYTES of the others, cut behind a separator or a line. A text file that is one document is cut before
white space that follows a printable ASCII character: there GPT-2's pattern always starts a new match, and looks no
further back, so the tokens are those of the whole. Pieces are a function of the files alone.

Whether a document is for validation is decided by its own text: it is, if the hash of its first HEAD_BYTES, as a
fraction of the largest, is below `val_fraction`. So the order of documents and files does not matter, and a document
that occurs twice is not in both sets.
"""

import functools
import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage import Fault

if TYPE_CHECKING:
    import pyarrow.parquet

PIECE_BYTES = 4 << 20
HEAD_BYTES = 1 << 16
BLANK_LINE = "blank-line"  # as a separator: one or more lines with nothing but white space
BATCH_ROWS = 1024
COMPRESSED = {".gz", ".xz", ".zst", ".bz2", ".zip", ".tar", ".tgz"}
TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"


@dataclass(frozen=True)
class Source:
    """A file with documents."""

    path: str
    bytes: int
    identity: str  # its SHA-256 if that was verified, else the time of its last change
    val_fraction: float  # share of its documents that is for validation
    separator: str  # between the documents of a text; BLANK_LINE; "": the file is one document
    field: str  # with the text, of parquet and jsonl

    @property
    def layout(self) -> str:
        return {".parquet": PARQUET, ".jsonl": JSONL, ".ndjson": JSONL}.get(Path(self.path).suffix.lower(), TEXT)


@dataclass(frozen=True)
class Piece:
    source: Source
    begin: int  # bytes; of parquet: row groups
    end: int
    bytes: int  # its share of the file


@dataclass(frozen=True)
class Document:
    text: str
    for_validation: bool
    continued: bool  # its beginning was in an earlier piece


def open_source(path: Path, val_fraction: float, separator: str = "", field: str = "text", sha256: str = "") -> Source:
    try:
        status = path.stat()
        if not path.is_file():
            raise Fault(f"'{path}' is not a regular file; name the files themselves")
    except OSError as error:
        raise Fault(f"cannot open '{path}': {error.strerror}") from None
    if path.suffix.lower() in COMPRESSED:
        raise Fault(f"'{path}' is compressed; expected text, .jsonl or .parquet: unpack it first")
    identity = sha256 or f"changed at {status.st_mtime_ns} ns"
    return Source(str(path), status.st_size, identity, val_fraction, separator, field)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces


def pieces_of(source: Source) -> Iterator[Piece]:
    if source.layout == PARQUET:
        groups = parquet_file(source).num_row_groups
        for group in range(groups):
            yield Piece(source, group, group + 1, source.bytes // groups)
    elif source.bytes > 0:
        with open(source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = 0
            while begin < source.bytes:
                cut = cut_pattern(source).search(content, begin + PIECE_BYTES)
                end = cut.end() if cut else source.bytes
                yield Piece(source, begin, end, end - begin)
                begin = end


def separator_pattern(source: Source) -> re.Pattern[bytes]:
    if source.layout == JSONL:
        return re.compile(rb"\n")
    return re.compile(rb"\n[ \t\r]*\n" if source.separator == BLANK_LINE else re.escape(source.separator.encode()))


def cut_pattern(source: Source) -> re.Pattern[bytes]:
    """A piece may end where this does."""
    whole = source.layout == TEXT and not source.separator
    return re.compile(rb"[!-~](?=[ \n])") if whole else separator_pattern(source)


# ----------------------------------------------------------------------------------------------------------------------
# Documents


def documents_of(piece: Piece) -> Iterator[Document]:
    source = piece.source
    if source.layout == TEXT and not source.separator:
        with open(source.path, "rb") as file:
            for_validation = is_for_validation(file.read(HEAD_BYTES), source.val_fraction)
        yield Document(decoded(content_of(piece), piece), for_validation, continued=piece.begin > 0)
        return
    texts = {PARQUET: parquet_texts, JSONL: jsonl_texts, TEXT: separated_texts}[source.layout]
    for text in texts(piece):
        if text:
            head = text[:HEAD_BYTES].encode()[:HEAD_BYTES]
            yield Document(text, is_for_validation(head, source.val_fraction), continued=False)


def is_for_validation(head: bytes, fraction: float) -> bool:
    hashed = hashlib.blake2b(head, digest_size=8).digest()
    return int.from_bytes(hashed, "little") < fraction * 2**64


def content_of(piece: Piece) -> bytes:
    with open(piece.source.path, "rb") as file:
        file.seek(piece.begin)
        content = file.read(piece.end - piece.begin)
    if len(content) != piece.end - piece.begin:
        raise Fault(f"'{piece.source.path}' became shorter while it was read; run again")
    return content


def decoded(content: bytes, piece: Piece) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = piece.begin + error.start
        raise Fault(f"'{piece.source.path}' is not UTF-8 at byte {at}; convert it (iconv -t UTF-8)") from None


def separated_texts(piece: Piece) -> Iterator[str]:
    for content in separator_pattern(piece.source).split(content_of(piece)):
        yield decoded(content, piece).strip()


def jsonl_texts(piece: Piece) -> Iterator[str]:
    source, at = piece.source, piece.begin
    for line in content_of(piece).split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line)[source.field]
                yield text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no UTF-8
            except (ValueError, LookupError, TypeError, AttributeError):
                raise Fault(
                    f"'{source.path}': the line at byte {at} is no JSON object with a text '{source.field}'; "
                    "--field names another"
                ) from None
        at += len(line) + 1


# Parquet. pyarrow is imported where it is used, because the other layouts do without it.


@contextmanager
def reading_parquet(source: Source) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise Fault(f"cannot read '{source.path}' as parquet: {str(error).splitlines()[0]}") from None


@functools.lru_cache(maxsize=1)
def parquet_file(source: Source) -> "pyarrow.parquet.ParquetFile":
    import pyarrow.parquet

    with reading_parquet(source):
        file = pyarrow.parquet.ParquetFile(source.path)
    columns = {column.name: column.type for column in file.schema_arrow}
    if columns.get(source.field) not in (pyarrow.string(), pyarrow.large_string()):
        found = ", ".join(f"{name} ({type})" for name, type in columns.items())
        raise Fault(f"'{source.path}' has no column '{source.field}' with text but {found}; choose with --field")
    return file


def parquet_texts(piece: Piece) -> Iterator[str]:
    file, groups, column = parquet_file(piece.source), range(piece.begin, piece.end), piece.source.field
    with reading_parquet(piece.source):
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
