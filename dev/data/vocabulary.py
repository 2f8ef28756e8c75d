"""GPT-2's byte-pair vocabulary: read from its file `vocab.bpe`, for tiktoken, and as the trainer's tokenizer file.

vocab.bpe is a heading and then one merge a line, two tokens with a space between, in the order in which they were
learned. Bytes are written as printable characters: those that are printable in Latin-1 as themselves, the others, in
ascending order, as U+0100 and on. Token numbers: the 256 bytes, the printable ones first; then the merges; then end of
text. (Radford et al. 2019; GPT-2's encoder.json lists the same numbers.)

The tokenizer file is llm.c's (data/README.md, "Formats").
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from storage import Fault, Remote, write_whole

GPT2 = Remote(
    url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    bytes=456_318,
    sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
END_OF_TEXT = "<|endoftext|>"
LARGEST = 65536  # what a token of 16 bits can number
TOKENIZER_MAGIC, TOKENIZER_VERSION, HEADER_WORDS = 20240328, 2, 256


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[bytes]  # by number, end of text excepted
    sha256: str  # of the file

    @property
    def end_of_text(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        return len(self.tokens) + 1


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte, in the order of the bytes' token numbers."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_vocabulary(path: Path) -> Vocabulary:
    try:
        content = path.read_bytes()
        heading, *merges = content.decode("utf-8").splitlines()
        if not heading.startswith("#version") or not merges:
            raise ValueError
        characters = byte_characters()
        tokens = [bytes([byte]) for byte in characters.values()]
        for merge in merges:
            left, right = merge.split(" ")
            tokens.append(bytes(characters[c] for c in left + right))
    except OSError as error:
        raise Fault(f"cannot read the vocabulary '{path}': {error.strerror}") from None
    except (ValueError, KeyError):
        raise Fault(f"'{path}' is no byte-pair vocabulary: expected GPT-2's vocab.bpe, or a file like it") from None
    if len(set(tokens)) != len(tokens) or len(tokens) >= LARGEST or max(map(len, tokens)) > 255:
        raise Fault(f"'{path}' has a token twice, one over 255 bytes, or over {LARGEST} tokens; is it damaged?")
    return Vocabulary(tokens, hashlib.sha256(content).hexdigest())


def encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    """What turns text into token numbers."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: number for number, token in enumerate(vocabulary.tokens)},
        special_tokens={END_OF_TEXT: vocabulary.end_of_text},
    )


def write_tokenizer(vocabulary: Vocabulary, path: Path) -> None:
    """The file that the trainer reads to print samples and to encode a prompt."""
    header = [TOKENIZER_MAGIC, TOKENIZER_VERSION, vocabulary.size, vocabulary.end_of_text]
    content = struct.pack(f"<{HEADER_WORDS}i", *header, *[0] * (HEADER_WORDS - len(header)))
    for token in [*vocabulary.tokens, END_OF_TEXT.encode()]:
        content += bytes([len(token)]) + token
    write_whole(path, content)
