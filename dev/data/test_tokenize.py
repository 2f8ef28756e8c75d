"""Does tokenize_data.py make the right files, however it is interrupted? `N passed, N failed` at the end.

    python3 dev/data/test_tokenize.py        after make train_gpt; about a minute, no network

Everything happens in a temporary folder with a byte-pair vocabulary learned here from a few lines, and is compared with
an encoder written here from the definition. Interruptions: the n-th write, flush or rename failing, or killing the
process, for every n; kill -9 of a run with several processes at random moments; a local server that breaks off
connections, does not know ranges, answers with errors, or serves other bytes than were published.
"""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import regex  # the module that tiktoken depends on: Python's own has no \p{L}

import documents
import storage
import tokenize_data
from storage import Remote
from vocabulary import byte_characters, read_vocabulary

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "dev/test"))
from suite import require, run_tests  # noqa: E402

PROGRAM = Path(tokenize_data.__file__)
GPT2_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
WORDS = "the ,he,in,A1,'s,'ll,!?,é,中文,٣,🙂,word".split(",")
ALPHABET = [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", *WORDS]
MERGES = 120
SHARD = 700  # tokens


# ----------------------------------------------------------------------------------------------------------------------
# What is expected: a vocabulary, documents, and their tokens by the definition


def nasty_text(seed: int, length: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(ALPHABET) for _ in range(length))


def learn_merges(text: str, count: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding (Sennrich et al. 2016): always the most frequent pair of neighbours."""
    words = [[bytes([b]) for b in piece.encode()] for piece in GPT2_PIECES.findall(text)]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [merged(word, merges[-1]) for word in words]
    return merges


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined: list[bytes] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1:] = [pair[0] + pair[1]]
        else:
            joined.append(token)
    return joined


class Reference:
    """Encodes by applying the merges in the order in which they were learned."""

    def __init__(self) -> None:
        self.merges = learn_merges(nasty_text(0, 3000), MERGES)
        self.end_of_text = 256 + MERGES
        self.characters = {byte: character for character, byte in byte_characters().items()}
        tokens = [bytes([byte]) for byte in byte_characters().values()] + [left + right for left, right in self.merges]
        self.number = {token: i for i, token in enumerate(tokens)}

    def write(self, path: Path) -> None:
        def spelled(token: bytes) -> str:
            return "".join(self.characters[byte] for byte in token)

        lines = [f"{spelled(left)} {spelled(right)}" for left, right in self.merges]
        path.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        tokens = []
        for piece in GPT2_PIECES.findall(text):
            word = [bytes([b]) for b in piece.encode()]
            for pair in self.merges:
                word = merged(word, pair)
            tokens += [self.number[token] for token in word]
        return tokens

    def split(self, texts: list[str], fraction: float) -> dict[str, list[int]]:
        """The tokens of both sets."""
        tokens: dict[str, list[int]] = {"train": [], "val": []}
        for text in texts:
            hashed = hashlib.blake2b(text.encode()[: 1 << 16], digest_size=8).digest()
            split = "val" if int.from_bytes(hashed, "little") / 2**64 < fraction else "train"
            tokens[split] += [self.end_of_text, *self.encode(text)]
        return tokens


REFERENCE = Reference()
TEXTS = [text for seed in range(1, 41) if (text := nasty_text(seed, 3 * seed).replace("\n", " \n").strip())]
PARAGRAPHS = [regex.sub(r"\n[ \t\r]*(?=\n)", "\n.", text) for text in TEXTS]  # without blank lines


def write_inputs() -> None:
    """The same documents in every layout."""
    REFERENCE.write(Path("vocab.bpe"))
    Path("blank.txt").write_text("\n \n\n".join(PARAGRAPHS) + "\n\n", newline="")
    Path("literal.txt").write_text("\n<|endoftext|>\n".join(TEXTS), newline="")
    Path("lines.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    table = pyarrow.table({"text": [*TEXTS, None, ""], "n": range(len(TEXTS) + 2)})
    pyarrow.parquet.write_table(table, "rows.parquet", row_group_size=7)


# ----------------------------------------------------------------------------------------------------------------------
# Running the program


def tokenize(*arguments: str, out: str = "set", processes: int = 1) -> tuple[int, str, str]:
    """Status, output and errors of a run with the vocabulary and the shards of these tests."""
    return call(arguments[0], "--out", out, "--processes", str(processes), "--vocab", "vocab.bpe", "--shard-tokens",
                str(SHARD), *arguments[1:])  # fmt: skip


def call(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = tokenize_data.main(list(arguments))
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def require_success(result: tuple[int, str, str]) -> str:
    status, out, err = result
    require(status == 0 and err == "", f"status {status}\n{out}{err}")
    return out


def require_fault(result: tuple[int, str, str], message: str) -> None:
    status, out, err = result
    require(status == 2, f"status {status} instead of 2\n{out}{err}")
    require(
        err.startswith("error: ") and err.count("\n") == 1 and message in err,
        f"expected one line with '{message}': {err}",
    )


def read_tokens(prefix: str, split: str) -> list[int]:
    """Of all files, each of which must be full but the last."""
    tokens: list[int] = []
    paths = sorted(Path().glob(f"{prefix}_{split}_*.bin"))
    for i, path in enumerate(paths):
        content = path.read_bytes()
        words = struct.unpack("<256I", content[:1024])
        some = np.frombuffer(content[1024:], "<u2")
        require(
            words[:4] == (20240520, 1, len(some), 257 + MERGES) and not any(words[4:]), f"{path}: header {words[:5]}"
        )
        require(path.name.endswith(f"_{i:06d}.bin"), f"{path} is file {i}")
        require(len(some) == SHARD or (i == len(paths) - 1 and 0 < len(some) < SHARD), f"{path}: {len(some)} tokens")
        tokens += some.tolist()
    return tokens


def contents(prefix: str) -> dict[str, bytes]:
    """Of all complete files but the lock, by the rest of their names."""
    files = [path for path in Path().glob(f"{prefix}_*") if path.is_file() and path.suffix != ".part"]
    return {path.name.removeprefix(prefix): path.read_bytes() for path in files}


def fresh(prefix: str) -> str:
    for path in Path().glob(f"{prefix}[_.]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return prefix


@contextlib.contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_numbers_of_gpt2() -> None:
    """The single bytes have GPT-2's numbers, which are known: '!' 0, newline 198, space 220, zero 188."""
    tokens = read_vocabulary(Path("vocab.bpe")).tokens
    require([tokens.index(b) for b in (b"!", b"\n", b" ", b"\0", b"a")] == [0, 198, 220, 188, 64], f"{tokens[:256]}")


def test_tokenizer_file() -> None:
    require_success(tokenize("files", "rows.parquet", out=fresh("set")))
    content = Path("set_tokenizer.bin").read_bytes()
    require(struct.unpack("<4i", content[:16]) == (20240328, 2, 257 + MERGES, 256 + MERGES), "header")
    tokens, at = [], 1024
    while at < len(content):
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    require(tokens == [*REFERENCE.number, b"<|endoftext|>"], "tokens")


def test_layout(file: str, texts: list[str], *options: str) -> None:
    """The tokens are those of the definition, in order, for pieces of 200 bytes as for one piece."""
    expected = REFERENCE.split(texts, 0.2)
    require(min(map(len, expected.values())) > 0, "a set is empty: the test would show nothing")
    for piece_bytes in (200, documents.PIECE_BYTES):
        with changed(documents, "PIECE_BYTES", piece_bytes):
            require_success(tokenize("files", file, "--val-fraction", "0.2", *options, out=fresh("set")))
        for split in expected:
            require(read_tokens("set", split) == expected[split], f"{split}, pieces of {piece_bytes} bytes")
    require("are as written" in require_success(call("verify", "set")), "verify")


def test_whole_file() -> None:
    """A file that is one document, cut anywhere: the tokens of the whole."""
    for seed in range(100, 110):
        text = nasty_text(seed, 1500)
        Path("whole.txt").write_text(text, newline="")
        for piece_bytes in (1, 50, 1000):
            with changed(documents, "PIECE_BYTES", piece_bytes):
                require_success(tokenize("files", "whole.txt", "--val-fraction", "0", out=fresh("set")))
            require(
                read_tokens("set", "train") == REFERENCE.split([text], 0)["train"], f"pieces of {piece_bytes} bytes"
            )


def test_validation_files() -> None:
    require_success(tokenize("files", "rows.parquet", "--val", "lines.jsonl", out=fresh("set")))
    everything = REFERENCE.split(TEXTS, 0)["train"]
    require(read_tokens("set", "train") == everything == read_tokens("set", "val"), "both files are all documents")


def test_surrogate() -> None:
    """JSON can hold half a surrogate pair, which is no text; it becomes a question mark."""
    Path("half.jsonl").write_text('{"text": "he\\ud83d in"}\n')
    require_success(tokenize("files", "half.jsonl", "--val-fraction", "0", out=fresh("set")))
    require(read_tokens("set", "train") == REFERENCE.split(["he? in"], 0)["train"], "tokens")


def test_processes() -> None:
    with changed(documents, "PIECE_BYTES", 100):
        for processes in (1, 2, 3):
            files = ("files", "literal.txt", "lines.jsonl", "rows.parquet")
            require_success(
                tokenize(*files, "--separator", "<|endoftext|>", out=fresh(f"by{processes}"), processes=processes)
            )
    one = {name: content for name, content in contents("by1").items() if name.endswith(".bin")}
    require(len(one) > 5, f"only {list(one)}")
    for prefix in ("by2", "by3"):
        other = {name: content for name, content in contents(prefix).items() if name.endswith(".bin")}
        require(other == one, f"{prefix} differs")


def test_trainer_reads_them() -> None:
    require_success(tokenize("files", "rows.parquet", "--val-fraction", "0.2", out=fresh("set")))
    data = ["-i", "set_train_*.bin", "-j", "set_val_*.bin", "--tokenizer", "set_tokenizer.bin"]
    model = ["-e", "L=1,H=1,C=16,T=16", "-b", "2", "-d", "64", "-x", "2", "-s", "1", "--prompt", "the word"]
    command = [str(ROOT / "train_gpt"), *data, *model]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    require(done.returncode == 0 and "loss 5.9" in done.stdout, f"status {done.returncode}\n{done.stdout}{done.stderr}")


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


class Trip:
    """As a context: the n-th call that changes a disk writes half, or nothing, and then does what `action` does."""

    NAMES = ("write", "fsync", "replace", "ftruncate")

    def __init__(self, n: int, action: Callable[[], None]) -> None:
        self.left, self.action = n, action
        self.real = {name: getattr(os, name) for name in self.NAMES}

    def __enter__(self) -> "Trip":
        for name in self.NAMES:
            setattr(os, name, lambda *arguments, name=name: self.call(name, *arguments))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def call(self, name: str, *arguments: object) -> object:
        self.left -= 1
        if self.left == 0:
            if name == "write":
                self.real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
            self.action()
        return self.real[name](*arguments)


def test_flushed_before_renamed() -> None:
    """What a power cut would find: when a file gets its name, everything that was written to any file is flushed, and
    the folder is, before the next one gets its name."""
    dirty: set[int] = set()  # inodes
    names: list[str] = []
    real = Trip(0, disk_full).real

    def change(name: str, fd: int, *arguments: object) -> object:
        dirty.add(os.fstat(fd).st_ino)
        return real[name](fd, *arguments)

    def replace(part: Path, path: Path) -> None:
        require(not dirty, f"{path} gets its name while {len(dirty)} files or folders are not flushed")
        real["replace"](part, path)
        names.append(path.name)
        dirty.add(path.parent.stat().st_ino)

    with contextlib.ExitStack() as stack, changed(documents, "PIECE_BYTES", 300):
        for name in ("write", "ftruncate"):
            stack.enter_context(changed(os, name, lambda *arguments, name=name: change(name, *arguments)))
        stack.enter_context(changed(os, "replace", replace))
        stack.enter_context(changed(os, "fsync", lambda fd: dirty.discard(os.fstat(fd).st_ino)))
        require_success(tokenize("files", "lines.jsonl", out=fresh("set")))
    require(not dirty and names[-1].endswith(".bin") and names.count("set_manifest.json") > 5, f"{dirty} {names}")


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted_run(n: int, action: Callable[[], None], prefix: str) -> bool:
    """Whether the n-th call was reached. A child process, so that a kill ends only it."""
    child = os.fork()
    if child == 0:
        with Trip(n, action) as trip:
            status, _, err = tokenize("files", "blank.txt", "--separator", "blank-line", out=prefix)
        one_line = err.startswith("error: cannot write ") and "No space left" in err and err.count("\n") == 1
        os._exit(1 if trip.left > 0 and status == 0 else 2 if trip.left <= 0 and status == 2 and one_line else 3)
    _, status = os.waitpid(child, 0)
    ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    require(ended in (1, 2 if action is disk_full else -signal.SIGKILL), f"call {n}: the run ended with {ended}")
    return ended != 1


def require_only_whole(prefix: str, expected: dict[str, bytes], when: str) -> None:
    for name, content in contents(prefix).items():
        require(name.endswith(".json") or content == expected[name], f"{when}: {name} is there, but not whole")


def test_every_call(action: Callable[[], None]) -> None:
    """Interrupted at the n-th call, then resumed, once without and once with a second interruption two calls later."""
    with changed(documents, "PIECE_BYTES", 300):
        require_success(tokenize("files", "blank.txt", "--separator", "blank-line", out=fresh("whole")))
        expected = contents("whole")
        n = 1
        while interrupted_run(n, action, fresh("cut")):
            require_only_whole("cut", expected, f"call {n}")
            if n % 2 == 0:
                interrupted_run(n // 2 + 2, action, "cut")
                require_only_whole("cut", expected, f"call {n}, then {n // 2 + 2}")
            require_success(tokenize("files", "blank.txt", "--separator", "blank-line", out="cut"))
            found = {name: content.replace(b"cut_", b"whole_") for name, content in contents("cut").items()}
            require(found == expected, f"call {n}: the resumed run made other files")
            n += 1
    require(n > 50, f"only {n} calls: the test would show little")


def test_work_is_kept() -> None:
    """A run that goes on does not begin again: it reads only the pieces that are not done."""
    with changed(documents, "PIECE_BYTES", 300):
        interrupted_run(60, kill_self, fresh("cut"))
        done = json.loads(Path("cut_manifest.json").read_text())["pieces_done"]
        read = []
        real = tokenize_data.documents_of
        with changed(tokenize_data, "documents_of", lambda piece: read.append(piece) or real(piece)):
            require_success(tokenize("files", "blank.txt", "--separator", "blank-line", out="cut"))
        total = len(list(documents.pieces_of(documents.open_source(Path("blank.txt"), 0.1, "blank-line"))))
    require(done > 3 and len(read) == total - done, f"{done} of {total} were done, {len(read)} were read")


def test_killed_processes() -> None:
    """kill -9 of the program with two workers, at random moments, until it comes through."""
    Path("long.jsonl").write_text("".join(json.dumps({"text": nasty_text(seed, 300)}) + "\n" for seed in range(4000)))
    arguments = ["files", "long.jsonl", "--vocab", "vocab.bpe", "--shard-tokens", "20K", "--processes"]
    change = "import documents, tokenize_data, sys; documents.PIECE_BYTES = 20000; "
    with changed(documents, "PIECE_BYTES", 20000):
        require_success(call(*arguments, "1", "--out", fresh("whole")))
    expected, draw, kills = contents("whole"), random.Random(1), 0
    fresh("cut")
    while True:
        command = [
            sys.executable,
            "-c",
            change + "sys.exit(tokenize_data.main(sys.argv[1:]))",
            *arguments,
            "2",
            "--out",
            "cut",
        ]
        process = subprocess.Popen(command, cwd=Path.cwd(), env=os.environ | {"PYTHONPATH": str(PROGRAM.parent)},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        begin, at_least = pieces_done("cut"), draw.randrange(20, 80)
        while process.poll() is None and pieces_done("cut") < begin + at_least:
            time.sleep(0.002)
        if process.poll() is not None:
            output, _ = process.communicate()
            break
        process.kill()
        process.communicate(timeout=60)  # returns when the last worker, which holds the pipe open, is gone
        kills += 1
        require_only_whole("cut", expected, f"kill {kills}")
    require(process.returncode == 0 and kills >= 3, f"status {process.returncode} after {kills} kills\n{output}")
    found = {name: content.replace(b"cut_", b"whole_") for name, content in contents("cut").items()}
    require(found == expected, "the resumed run made other files")


def pieces_done(prefix: str) -> int:
    path = Path(f"{prefix}_manifest.json")
    return json.loads(path.read_text())["pieces_done"] if path.is_file() else 0


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Hugging Face's paths for one data set, redirects to the files themselves, and the faults that a test sets."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/cdn/{name}": content for name, content in files.items()}
        self.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.repository = repository
        self.break_after = 10**9  # bytes of a connection
        self.ranges = True
        self.errors: list[int] = []  # statuses with which the next requests are answered
        self.requests: list[tuple[str, str | None]] = []  # path and range of those for files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self, folder: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(self.files[f"/cdn/{name}"]), "lfs": {"oid": sha256}}
            for name, sha256 in self.sha256.items()
            if name.rpartition("/")[0] == folder
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        api, files = f"/api/datasets/{self.server.repository}", f"/datasets/{self.server.repository}/resolve/abc/"
        if self.server.errors:
            self.send_error(self.server.errors.pop(0))
        elif self.path == f"{api}/revision/main":
            self.reply(200, json.dumps({"sha": "abc"}).encode())
        elif self.path.startswith(f"{api}/tree/abc"):
            folder = self.path.removeprefix(f"{api}/tree/abc").strip("/")
            self.reply(200, json.dumps(self.server.listing(folder)).encode())
        elif self.path.startswith(files):
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/cdn/{self.path.removeprefix(files)}")
            self.end_headers()
        elif self.path in self.server.files:
            self.file()
        else:
            self.send_error(404)

    def file(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        self.reply(206 if start else 200, self.server.files[self.path][start:], self.server.break_after)

    def reply(self, status: int, content: bytes, most: int = 10**9) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:most])

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(repository: str, files: dict[str, bytes]) -> Iterator[Server]:
    with Server(repository, files) as server, changed(tokenize_data, "HUB", server.url):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def openwebtext() -> dict[str, bytes]:
    rows = Path("rows.parquet").read_bytes()
    return {f"plain_text/train-0000{i}-of-00002.parquet": rows for i in range(2)} | {"README.md": b"no data"}


def owt_server() -> contextlib.AbstractContextManager[Server]:
    return serving("Skylion007/openwebtext", openwebtext())


def require_openwebtext() -> None:
    require_success(tokenize("openwebtext", out="owt"))
    require(read_tokens("owt", "train") == 2 * REFERENCE.split(TEXTS, 0.0005)["train"], "tokens")
    require([path.name for path in Path("owt_source").iterdir() if path.suffix == ".part"] == [], "a part is left")


def test_broken_connections() -> None:
    """Each connection gives at most 1000 bytes; what is there is not asked for again, redirects or not."""
    fresh("owt")
    with owt_server() as server:
        server.break_after = 1000
        require_openwebtext()
        size = Path("rows.parquet").stat().st_size
        ranges = [wanted for path, wanted in server.requests if "00000-of" in path]
        require(
            size > 3000 and ranges == [None, *(f"bytes={at}-" for at in range(1000, size, 1000))], f"{size}: {ranges}"
        )


def test_no_ranges() -> None:
    """A server that always sends everything, and breaks off once."""
    fresh("owt")
    with owt_server() as server:
        server.ranges, server.break_after = False, 1000
        require_fault(tokenize("openwebtext", out="owt"), "the connection ended after 1000 of")
        server.break_after = 10**9
        require_openwebtext()


def test_passing_errors() -> None:
    fresh("owt")
    with owt_server() as server:
        server.errors = [503, 500, 429]
        require_openwebtext()
        require(server.errors == [], "errors are left")


def test_lasting_errors() -> None:
    fresh("owt")
    with owt_server() as server:
        server.errors = [503] * storage.TRIES
        require_fault(tokenize("openwebtext", out="owt"), "503")
        server.errors = [403]
        require_fault(tokenize("openwebtext", out="owt"), "the server says 403")
        server.sha256 = {}
        require_fault(tokenize("openwebtext", out="owt"), "has no 'plain_text/*.parquet'")
    require_fault(tokenize("openwebtext", out="owt"), "Connection refused")


def test_wrong_content() -> None:
    """Bytes that are not those published never become the file; a part that is too long is begun anew."""
    fresh("owt")
    name = "plain_text/train-00000-of-00002.parquet"
    with owt_server() as server:
        right = server.files[f"/cdn/{name}"]
        server.files[f"/cdn/{name}"] = right[:500] + b"?" + right[501:]
        require_fault(tokenize("openwebtext", out="owt"), f"expected {server.sha256[name]}")
        require(not any(Path("owt_source").glob("*.parquet*")), "the wrong file is left")
        server.files[f"/cdn/{name}"] = right
        (Path("owt_source") / "train-00001-of-00002.parquet.part").write_bytes(bytes(len(right) + 1))
        require_openwebtext()


def test_same_revision() -> None:
    """Once listed, the files are those of the revision, whatever the data set has become. What is done needs no
    server."""
    fresh("owt")
    with owt_server() as server:
        server.break_after = 0
        require_fault(tokenize("openwebtext", out="owt"), "the connection ended after 0 of")
        server.sha256, server.break_after = {}, 10**9
        require_openwebtext()
    require_openwebtext()


def test_tinystories() -> None:
    """Which file is for validation is told by its name."""
    fresh("tiny")
    train, val = (f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid"))
    files = {train: Path("literal.txt").read_bytes(), val: b"the word\n<|endoftext|>\nhe\n", "data/x.parquet": b""}
    with serving("roneneldan/TinyStories", files):
        require_success(tokenize("tinystories", out="tiny"))
    require(read_tokens("tiny", "train") == REFERENCE.split(TEXTS, 0)["train"], "train")
    require(read_tokens("tiny", "val") == REFERENCE.split(["the word", "he"], 0)["train"], "val")


def test_tinyshakespeare() -> None:
    """A data set of one file, whose size and SHA-256 are written in the program; the vocabulary is downloaded, too."""
    fresh("data/tinyshakespeare")
    play = "\n\n".join(PARAGRAPHS).encode()
    files = {"input.txt": play, "vocab.bpe": Path("vocab.bpe").read_bytes()}
    with serving("", files) as server:
        remote = {n: Remote(f"{server.url}/cdn/{n}", len(c), hashlib.sha256(c).hexdigest()) for n, c in files.items()}
        dataset = tokenize_data.DataSet(0.1, file=remote["input.txt"], separator=documents.BLANK_LINE)
        with changed(tokenize_data, "DATA_SETS", {"tinyshakespeare": dataset}):
            with changed(tokenize_data, "GPT2", remote["vocab.bpe"]):
                require_success(call("tinyshakespeare", "--processes", "1"))
    tokens = sum(
        len(Path(f"data/tinyshakespeare_{split}_000000.bin").read_bytes()) // 2 - 512 for split in ("train", "val")
    )
    expected = sum(map(len, REFERENCE.split(PARAGRAPHS, 0.1).values()))
    require(tokens == expected, f"{tokens} tokens, expected {expected}")


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def test_other_settings() -> None:
    require_success(tokenize("files", "lines.jsonl", out=fresh("set")))
    before = contents("set")
    require_fault(tokenize("files", "lines.jsonl", "--val-fraction", "0.3", out="set"), "other settings (sources)")
    require_fault(call("files", "--out", "set", "--vocab", "vocab.bpe", "lines.jsonl"), "other settings (shard_tokens)")
    require(contents("set") == before, "the set was changed")
    require_success(tokenize("files", "lines.jsonl", out="set"))
    require(contents("set") == before, "a finished set was changed")


def test_strangers() -> None:
    """A file that the trainer would read along with the set's."""
    fresh("set")
    Path("set_train_000009.bin").write_bytes(b"")
    require_fault(tokenize("files", "lines.jsonl", out="set"), "'set_train_000009.bin' is not from this run")


def test_damage() -> None:
    require_success(tokenize("files", "lines.jsonl", out=fresh("set")))
    path = Path("set_train_000001.bin")
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    require_fault(call("verify", "set"), "'set_train_000001.bin' is missing or not what was written")
    path.unlink()
    require_fault(tokenize("files", "lines.jsonl", out="set"), "'set_train_000001.bin' was changed or removed")
    Path("set_manifest.json").write_text("{")
    require_fault(tokenize("files", "lines.jsonl", out="set"), "is no manifest")


def test_lost_part() -> None:
    with changed(documents, "PIECE_BYTES", 300):
        interrupted_run(60, kill_self, fresh("cut"))
        require_fault(call("verify", "cut"), "is not complete")
        parts = [path for path in Path().glob("cut_*.bin.part")]
        require(parts != [], "no part to lose")
        for path in parts:
            path.write_bytes(b"")
        require_fault(tokenize("files", "blank.txt", "--separator", "blank-line", out="cut"), "was changed or removed")


def test_two_at_once() -> None:
    with tokenize_data.alone(Path(fresh("set"))):
        require_fault(tokenize("files", "lines.jsonl", out="set"), "another run is writing set_*")


def test_wrong_input(name: str, content: bytes, message: str, *options: str) -> None:
    Path(name).write_bytes(content)
    require_fault(tokenize("files", name, *options, out=fresh("set"), processes=2), message)
    require(not any(Path().glob("set_*.bin")), "tokens or a tokenizer were published")


def test_wrong_vocabulary(content: bytes) -> None:
    Path("wrong.bpe").write_bytes(content)
    require_fault(call("files", "--out", fresh("set"), "--vocab", "wrong.bpe", "lines.jsonl"), "'wrong.bpe'")


def test_wrong_usage(message: str, *arguments: str) -> None:
    require_fault(call(*arguments), message)


FILES = ("files", "--out", "set", "--vocab", "vocab.bpe")
TESTS: list[tuple[Callable, ...]] = [
    (test_numbers_of_gpt2,),
    (test_tokenizer_file,),
    (test_layout, "blank.txt", PARAGRAPHS, "--separator", "blank-line"),
    (test_layout, "literal.txt", TEXTS, "--separator", "<|endoftext|>"),
    (test_layout, "lines.jsonl", TEXTS),
    (test_layout, "rows.parquet", TEXTS),
    (test_whole_file,),
    (test_validation_files,),
    (test_surrogate,),
    (test_processes,),
    (test_trainer_reads_them,),
    (test_flushed_before_renamed,),
    (test_every_call, disk_full),
    (test_every_call, kill_self),
    (test_work_is_kept,),
    (test_killed_processes,),
    (test_broken_connections,),
    (test_no_ranges,),
    (test_passing_errors,),
    (test_lasting_errors,),
    (test_wrong_content,),
    (test_same_revision,),
    (test_tinystories,),
    (test_tinyshakespeare,),
    (test_other_settings,),
    (test_strangers,),
    (test_damage,),
    (test_lost_part,),
    (test_two_at_once,),
    (test_wrong_input, "latin1.txt", b"caf\xe9", "is not UTF-8 at byte 3"),
    (test_wrong_input, "empty.txt", b"", "hold no text"),
    (test_wrong_input, "a.txt.gz", b"", "is compressed"),
    (test_wrong_input, "bad.jsonl", b'{"text": "a"}\n{"text": 3}\n', "the line at byte 14"),
    (test_wrong_input, "bad.jsonl", b'{"text": "a"}\n', "no JSON object with a text 'body'", "--field", "body"),
    (test_wrong_input, "bad.parquet", b"PAR1", "as parquet"),
    (test_wrong_vocabulary, b"#version: 0.2\na b c\n"),
    (test_wrong_vocabulary, b"#version: 0.2\na b\na b\n"),
    (test_wrong_vocabulary, b"\xff"),
    (test_wrong_usage, "cannot open 'no.txt'", *FILES, "no.txt"),
    (test_wrong_usage, "'.' is not a regular file", *FILES, "."),
    (test_wrong_usage, "with text but text (string), n (int64)", *FILES, "--field", "body", "rows.parquet"),
    (test_wrong_usage, "has no column 'n' with text", *FILES, "--field", "n", "rows.parquet"),
    (test_wrong_usage, "'1.5M' is no number of tokens", *FILES, "--shard-tokens", "1.5M", "lines.jsonl"),
    (test_wrong_usage, "'2' is no number from 0 to 1", *FILES, "--val-fraction", "2", "lines.jsonl"),
    (test_wrong_usage, "'0' is no number from 1 to 9999", *FILES, "--processes", "0", "lines.jsonl"),
    (test_wrong_usage, "the following arguments are required: --out, FILE", "files"),
    (test_wrong_usage, "invalid choice: 'wikitext'", "wikitext"),
    (test_wrong_usage, "cannot read 'none_manifest.json'", "verify", "none"),
]


def main() -> int:
    if not (ROOT / "train_gpt").is_file():
        sys.exit("error: train_gpt is not there; make train_gpt")
    storage.RETRY_SECONDS, tokenize_data.HUB = 0, "http://127.0.0.1:1"  # nobody is there
    os.fsync = lambda fd: None  # slow, and a killed process loses nothing by it; test_flushed_before_renamed watches it
    return run_tests(TESTS, write_inputs)


if __name__ == "__main__":
    sys.exit(main())
