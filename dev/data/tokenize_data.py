"""Data sets, and your own texts, as token files of GPT-2's byte-pair vocabulary.

    python3 dev/data/tokenize_data.py openwebtext           9.0 B tokens; downloads 24 GB
    python3 dev/data/tokenize_data.py fineweb               the 10 B sample; about 30 GB
    python3 dev/data/tokenize_data.py tinystories           version 2; 2.3 GB
    python3 dev/data/tokenize_data.py tinyshakespeare       0.3 M tokens; 1 MB
    python3 dev/data/tokenize_data.py files --out data/mine my/*.txt my/*.jsonl my/*.parquet
    python3 dev/data/tokenize_data.py verify data/openwebtext

writes data/openwebtext_train_000000.bin ... and data/openwebtext_val_*.bin (shards.py says how, data/README.md the
format), data/openwebtext_tokenizer.bin for samples and prompts, and data/openwebtext_manifest.json. Then:

    ./train_gpt -i 'data/openwebtext_train_*.bin' -j 'data/openwebtext_val_*.bin' \\
        --tokenizer data/openwebtext_tokenizer.bin ...

Each document is an end-of-text token (50256) followed by its text's tokens; a literal <|endoftext|> inside a text is
ordinary text. Documents stand in the order of the files; the trainer shuffles. What is a document, and which are for
validation: documents.py. The result is a function of the files and these options, but for --processes: any number of
processes gives the same bytes, and so does a run that was killed, as often as you like, and started again by the same
command. Memory: about 100 MB a process, whatever the size of the data set.

Downloads (into PREFIX_source/) are pinned to the data set's revision at the time of the first run, resumed where they
broke off, and verified against the published SHA-256. HF_ENDPOINT in the environment names another server with Hugging
Face's paths. Needs numpy and tiktoken; pyarrow for parquet.
"""

import argparse
import fcntl
import fnmatch
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tiktoken

import documents
from documents import BLANK_LINE, Piece, Source, documents_of, open_source, pieces_of
from shards import SPLITS, Shards, all_shards, shard_path, verify
from storage import Fault, Remote, download, fetch_json, write_whole
from vocabulary import GPT2, Vocabulary, encoding, read_vocabulary, write_tokenizer

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
PROGRESS_SECONDS = 5.0

# ----------------------------------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True)
class DataSet:
    """Where a data set is published, and how its documents are divided."""

    val_fraction: float
    repository: str = ""  # on Hugging Face
    pattern: str = ""  # the paths of its files there
    file: Remote | None = None  # instead: a single file
    separator: str = ""
    val_pattern: str = ""  # the names of files that are for validation; then the others are not, whatever val_fraction


DATA_SETS = {
    # nanoGPT's share: about 4.4 M tokens of 9.04 B.
    "openwebtext": DataSet(0.0005, "Skylion007/openwebtext", "plain_text/*.parquet"),
    "fineweb": DataSet(0.001, "HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
    "tinystories": DataSet(
        0.0, "roneneldan/TinyStories", "TinyStoriesV2-GPT4-*.txt", separator="<|endoftext|>", val_pattern="*-valid.txt"
    ),
    # Its documents are the speeches, as in llm.c.
    "tinyshakespeare": DataSet(
        0.1,
        file=Remote(
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            bytes=1_115_394,
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        separator=BLANK_LINE,
    ),
}


def published_files(dataset: DataSet) -> list[dict[str, str | int]]:
    """Path, URL, size and SHA-256 of each file of a data set, at its present revision."""
    api = f"{HUB}/api/datasets/{dataset.repository}"
    try:
        revision = fetch_json(f"{api}/revision/main")["sha"]
        folder = dataset.pattern.rpartition("/")[0]
        entries = fetch_json(f"{api}/tree/{revision}/{folder}".rstrip("/"))
        matching = [entry for entry in entries if fnmatch.fnmatch(entry["path"], dataset.pattern)]
        at = f"{HUB}/datasets/{dataset.repository}/resolve/{revision}"
        files = [
            {
                "path": e["path"],
                "url": f"{at}/{urllib.parse.quote(e['path'])}",
                "bytes": e["size"],
                "sha256": e["lfs"]["oid"],
            }
            for e in matching
        ]
    except (KeyError, TypeError) as error:
        raise Fault(f"{api} did not answer as Hugging Face does ({error!r}); is HF_ENDPOINT right?") from None
    if not files:
        raise Fault(f"{dataset.repository} at revision {revision} has no '{dataset.pattern}'; was it reorganised?")
    return sorted(files, key=lambda file: file["path"])


def listing(dataset: DataSet, folder: Path) -> list[tuple[Remote, Path]]:
    """What to download, and where to. Written down in the folder, so that every run is about the same revision."""
    if dataset.file:
        return [(dataset.file, folder / dataset.file.url.rpartition("/")[2])]
    path = folder / "listing.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(published_files(dataset), indent=1).encode() + b"\n")
    try:
        files = json.loads(path.read_bytes())
        return [(Remote(f["url"], f["bytes"], f["sha256"]), folder / Path(f["path"]).name) for f in files]
    except (ValueError, KeyError, TypeError):
        raise Fault(f"'{path}' is not the list of files that this program wrote; remove it and run again") from None


def download_all(files: list[tuple[Remote, Path]]) -> None:
    total, before = sum(remote.bytes for remote, _ in files), 0
    progress = Progress("download", "B")

    def report(have: int) -> None:
        progress.report((before + have) / total, before + have)

    for remote, path in files:
        download(remote, path, report)
        before += remote.bytes
    progress.end(before)


def data_set_sources(dataset: DataSet, folder: Path) -> list[Source]:
    files = listing(dataset, folder)
    download_all(files)
    sources = []
    for remote, path in files:
        fraction = (
            float(fnmatch.fnmatch(path.name, dataset.val_pattern)) if dataset.val_pattern else dataset.val_fraction
        )
        sources.append(open_source(path, fraction, dataset.separator, sha256=remote.sha256))
    return sources


# ----------------------------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """A line now and then: how far, how fast, how long still."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.began = self.reported = time.monotonic()
        self.first: tuple[float, float] | None = None  # share and amount that were there already

    def report(self, share: float, amount: float) -> None:
        now = time.monotonic()
        self.first = self.first or (share, amount)
        if now - self.reported < PROGRESS_SECONDS or share <= self.first[0]:
            return
        self.reported = now
        seconds = now - self.began
        rate = (amount - self.first[1]) / seconds
        left = (1 - share) / (share - self.first[0]) * seconds
        print(
            f"{self.label} | {share:.1%} | {amount / 1e6:.1f} M{self.unit} | {rate / 1e6:.2f} M{self.unit}/s | "
            f"ETA {duration(left)}",
            flush=True,
        )

    def end(self, amount: float) -> None:
        print(
            f"{self.label} | done | {amount / 1e6:.1f} M{self.unit} | {duration(time.monotonic() - self.began)}",
            flush=True,
        )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


# ----------------------------------------------------------------------------------------------------------------------
# From pieces to tokens, in many processes


@dataclass(frozen=True)
class Encoded:
    """A piece's tokens and documents, by split."""

    tokens: dict[str, np.ndarray]  # uint16
    documents: dict[str, int]


class Encoder:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.encoding: tiktoken.Encoding = encoding(vocabulary)
        self.end_of_text = np.array([vocabulary.end_of_text], np.uint16)

    def __call__(self, piece: Piece) -> Encoded:
        tokens: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.uint16)] for split in SPLITS}
        count = dict.fromkeys(SPLITS, 0)
        for document in documents_of(piece):
            split = "val" if document.for_validation else "train"
            if not document.continued:
                tokens[split].append(self.end_of_text)
                count[split] += 1
            tokens[split].append(self.encode(document.text, piece))
        return Encoded({split: np.concatenate(tokens[split]) for split in SPLITS}, count)

    def encode(self, text: str, piece: Piece) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except BaseException as error:  # a panic of tiktoken's Rust code is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise Fault(f"'{piece.source.path}' has white space too long for tiktoken: '{text[:40]}...'") from None


worker_encoder: Encoder  # of this process, set once by start_worker


def start_worker(vocabulary: Vocabulary) -> None:
    global worker_encoder
    worker_encoder = Encoder(vocabulary)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(piece: Piece) -> Encoded:
    return worker_encoder(piece)


def encode_all(pieces: Iterable[Piece], vocabulary: Vocabulary, processes: int) -> Iterator[Encoded]:
    """The pieces' tokens, in order; a few pieces ahead of the reader, no more, so memory does not grow."""
    if processes == 1:
        yield from map(Encoder(vocabulary), pieces)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=start_worker, initargs=(vocabulary,))
    try:
        waiting = deque()
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise Fault("a worker process was killed (out of memory?); run again with fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The run


@contextmanager
def alone(prefix: Path) -> Iterator[None]:
    """Keeps a second run away from the same files."""
    path = prefix.with_name(prefix.name + ".lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"another run is writing {prefix}_*; wait for it, or choose another --out") from None
        try:
            yield
        finally:
            path.unlink()


def tokenize(sources: list[Source], vocabulary: Vocabulary, prefix: Path, shard_tokens: int, processes: int) -> None:
    settings = {
        "vocabulary": vocabulary.sha256,
        "shard_tokens": shard_tokens,
        "piece_bytes": documents.PIECE_BYTES,
        "sources": [asdict(source) | {"path": Path(source.path).name} for source in sources],
    }
    with Shards(prefix, settings, vocabulary.size, shard_tokens) as shards:
        if any(shards.tokens(split) > 0 for split in SPLITS):
            write_tokenizer(vocabulary, tokenizer_path(prefix))
        if not shards.complete:
            encode_into(shards, [piece for source in sources for piece in pieces_of(source)], vocabulary, processes)
        summarize(shards)


def tokenizer_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + "_tokenizer.bin")


def encode_into(shards: Shards, pieces: list[Piece], vocabulary: Vocabulary, processes: int) -> None:
    """The tokenizer comes with the first tokens: none without any, and never a set that is complete but for it."""
    todo = pieces[shards.pieces_done :]
    total = sum(piece.bytes for piece in pieces)
    done = total - sum(piece.bytes for piece in todo)
    amount = sum(shards.tokens(split) for split in SPLITS)
    progress = Progress("tokens", " tokens")
    progress.report(done / max(total, 1), amount)
    for piece, encoded in zip(todo, encode_all(todo, vocabulary, processes), strict=True):
        shards.append(encoded.tokens, encoded.documents)
        done += piece.bytes
        had_any, amount = amount > 0, amount + sum(map(len, encoded.tokens.values()))
        if amount > 0 and not had_any:
            write_tokenizer(vocabulary, tokenizer_path(shards.prefix))
        progress.report(done / total, amount)
    if amount == 0:
        raise Fault("the files hold no text")
    shards.finish()
    progress.end(amount)


def summarize(shards: Shards) -> None:
    for split in SPLITS:
        files, count = len(shards.manifest["shards"][split]), shards.manifest["documents"][split]
        pattern = shard_path(shards.prefix, split, 0).name.replace("000000", "*")
        print(f"{shards.prefix.with_name(pattern)}: {shards.tokens(split)} tokens, {count} documents, {files} files")
        if files == 0:
            print(f"note: no document is for {'training' if split == 'train' else 'validation'}; see --val-fraction")


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Fault(f"{message}; {self.prog} --help explains the options")


def token_count(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMB]?)", text)
    value = int(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2]] if found else 0
    if not 1 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of tokens from 1 to 4294967295, such as 100M")
    return value


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")
    return value


def process_count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to 9999")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="tokenize_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    for name in [*DATA_SETS, "files"]:
        command = commands.add_parser(name, help=f"the data set {name}" if name in DATA_SETS else "texts of your own")
        command.add_argument(
            "--shard-tokens", type=token_count, default=100_000_000, metavar="N", help="in a file (100M)"
        )
        command.add_argument("--processes", type=process_count, default=os.cpu_count(), metavar="N", help="(all cores)")
        command.add_argument(
            "--vocab", type=Path, metavar="FILE", help="a vocab.bpe (GPT-2's, downloaded beside --out)"
        )
        if name in DATA_SETS:
            command.add_argument(
                "--out", type=Path, default=Path("data") / name, metavar="PREFIX", help=f"(data/{name})"
            )
            continue
        command.add_argument(
            "--out", type=Path, required=True, metavar="PREFIX", help="what the files' names begin with"
        )
        validation = command.add_mutually_exclusive_group()
        validation.add_argument("--val-fraction", type=fraction, default=0.1, metavar="F", help="for validation (0.1)")
        validation.add_argument("--val", type=Path, nargs="+", default=[], metavar="FILE", help="files for validation")
        separator_help = f"between documents of a text file: '{BLANK_LINE}' or a string; without, a file is a document"
        command.add_argument("--separator", default="", metavar="TEXT", help=separator_help)
        command.add_argument("--field", default="text", metavar="NAME", help="jsonl's field, parquet's column (text)")
        command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text, .jsonl or .parquet")
    command = commands.add_parser("verify", help="compares a finished set with its manifest")
    command.add_argument("prefix", type=Path, metavar="PREFIX")
    return parser.parse_args(arguments)


def own_sources(options: argparse.Namespace) -> list[Source]:
    share = 0.0 if options.val else options.val_fraction
    files = [(path, share) for path in options.files] + [(path, 1.0) for path in options.val]
    return [open_source(path, fraction, options.separator, options.field) for path, fraction in files]


def gpt2_vocabulary(folder: Path) -> Path:
    """GPT-2's vocabulary, downloaded once."""
    path = folder / "gpt2_vocab.bpe"
    if not path.is_file():
        download_all([(GPT2, path)])
    return path


def run(options: argparse.Namespace) -> None:
    if options.command == "verify":
        files = all_shards(verify(options.prefix))
        tokens = sum(file["tokens"] for file in files)
        print(f"{options.prefix}: {len(files)} files with {tokens} tokens are as written")
        return
    prefix: Path = options.out
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with alone(prefix):
        vocabulary = read_vocabulary(options.vocab or gpt2_vocabulary(prefix.parent))
        if options.command == "files":
            sources = own_sources(options)
        else:
            sources = data_set_sources(DATA_SETS[options.command], prefix.with_name(prefix.name + "_source"))
        tokenize(sources, vocabulary, prefix, options.shard_tokens, options.processes)


def main(arguments: list[str]) -> int:
    try:
        run(parse(arguments))
        return 0
    except (Fault, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
