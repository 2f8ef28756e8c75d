/*
Between text and tokens. A vocabulary is a list of byte strings in llm.c's tokenizer file (little-endian):

    256 int32: [0] 20240328   [1] version 2 (1: no word 3)   [2] number of tokens V   [3] id of the end-of-text token
    then per token, in order of its id, one byte with its length (1 to 255) and its bytes

Version 1 is GPT-2's: with V = 50257 the end-of-text token is 50256; with any other V there is none.

Decoding looks a token up. Encoding is GPT-2's byte-pair encoding, which needs nothing but the list:

  1. The text is cut at the literal <|endoftext|>, which becomes the end-of-text token.
  2. The rest is cut into pieces that tokens never straddle, by GPT-2's regular expression
     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
     with \p{L}, \p{N}, \s as in unicode.h. A byte that is not valid UTF-8 counts as a character of no class.
  3. A piece starts as single bytes. Of all neighbours whose joint bytes are a token, the ones with the lowest id are
     joined, from left to right; this is repeated until no neighbours make a token. (GPT-2 numbers its tokens in the
     order in which they were learned, so the lowest id is the merge of the highest rank.)

The byte-level vocabulary of dev/data/text_to_tokens (256 bytes, then end of text) is the case in which nothing can be
joined. Every byte must be a token; so every text, valid UTF-8 or not, encodes, and decodes to itself.

Sources: Sennrich, Haddow & Birch 2016 (byte-pair encoding); Radford et al. 2019 (on bytes, the regular expression).
*/
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include "atomicfile.h"
#include "check.h"
#include "unicode.h"
#include "utf8.h"
#include <limits.h>

enum { TOKENIZER_MAGIC = 20240328, TOKENIZER_VERSION = 2, TOKENIZER_HEADER = 256 };

#define END_OF_TEXT "<|endoftext|>"

typedef struct {
    int vocab_size;
    int eot;           // the end-of-text token; -1: none
    char* file;        // the whole file
    size_t* start;     // (vocab_size) where each token's bytes lie in it, the length byte one before
    int* table;        // (table_size) hash table from bytes to tokens: ids by open addressing, -1 where empty
    size_t table_size; // a power of two
} Tokenizer;

// ---------------------------------------------------------------------------------------------------------------------
// The vocabulary

// The bytes of a token, not NUL-terminated, and their number. For a number outside the vocabulary (a model may have
// more rows than its tokenizer has tokens) nothing: *len is 0.
static inline const char* tokenizer_decode(const Tokenizer* t, int token, int* len) {
    if (token < 0 || token >= t->vocab_size) {
        *len = 0;
        return "";
    }
    *len = (unsigned char)t->file[t->start[token] - 1];
    return t->file + t->start[token];
}

// The place in the table where these bytes are, or would be put. FNV-1a.
static inline int* tokenizer_slot(const Tokenizer* t, const char* bytes, size_t len) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < len; i++) { hash = (hash ^ (unsigned char)bytes[i]) * UINT64_C(0x100000001b3); }
    size_t slot = (size_t)(hash ^ hash >> 32);
    for (;; slot++) {
        int* entry = &t->table[slot & (t->table_size - 1)];
        int entry_len;
        if (*entry < 0) { return entry; }
        const char* entry_bytes = tokenizer_decode(t, *entry, &entry_len);
        if ((size_t)entry_len == len && memcmp(entry_bytes, bytes, len) == 0) { return entry; }
    }
}

// The token of these bytes (end of text is none of any), -1 if there is none.
static inline int tokenizer_lookup(const Tokenizer* t, const char* bytes, size_t len) {
    return len > 255 ? -1 : *tokenizer_slot(t, bytes, len);
}

// Fills the table; where two tokens have the same bytes, the first is kept. fatal() if a byte is no token.
static inline void tokenizer_build_table(Tokenizer* t, const char* path) {
    t->table_size = 2;
    while (t->table_size < 2 * (size_t)t->vocab_size) { t->table_size *= 2; }
    t->table = (int*)alloc_zeroed(t->table_size, sizeof(int), "the tokenizer's table");
    memset(t->table, -1, t->table_size * sizeof(int));
    for (int token = 0; token < t->vocab_size; token++) {
        int len;
        const char* bytes = tokenizer_decode(t, token, &len);
        int* slot = tokenizer_slot(t, bytes, (size_t)len);
        if (*slot < 0 && token != t->eot) { *slot = token; }
    }
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        if (tokenizer_lookup(t, &c, 1) < 0) {
            fatal(
                "the tokenizer file '%s' has no token for the byte 0x%02x; a byte-level vocabulary has one for each of "
                "the 256 bytes",
                path, byte);
        }
    }
}

// Reads the number of tokens and the end-of-text token from the header.
static inline void tokenizer_read_header(Tokenizer* t, const char* path, size_t file_bytes) {
    int32_t header[4];
    if (file_bytes < TOKENIZER_HEADER * sizeof(int32_t)) {
        fatal("the tokenizer file '%s' has %zu bytes, less than the %zu of its header; make or copy it again", path,
              file_bytes, TOKENIZER_HEADER * sizeof(int32_t));
    }
    memcpy(header, t->file, sizeof header);
    if (header[0] != TOKENIZER_MAGIC) {
        fatal("'%s' is not a tokenizer file: it starts with %d, not %d; data/README.md says how to make or get one",
              path, header[0], TOKENIZER_MAGIC);
    }
    if (header[1] != 1 && header[1] != TOKENIZER_VERSION) {
        fatal("the tokenizer file '%s' has version %d; versions 1 and %d can be read", path, header[1],
              TOKENIZER_VERSION);
    }
    if (header[2] < 1 || header[2] > 65536) {
        fatal("the tokenizer file '%s' says that it has %d tokens; expected 1 to 65536", path, header[2]);
    }
    t->vocab_size = header[2];
    t->eot = header[1] == TOKENIZER_VERSION ? header[3] : header[2] == 50257 ? 50256 : -1;
    if (header[1] == TOKENIZER_VERSION && (t->eot < 0 || t->eot >= t->vocab_size)) {
        fatal("the tokenizer file '%s' gives token %d as end of text, but has the tokens 0 to %d", path, t->eot,
              t->vocab_size - 1);
    }
}

// Reads a tokenizer file. fatal() on any fault.
static inline void tokenizer_open(Tokenizer* t, const char* path) {
    size_t bytes, at = TOKENIZER_HEADER * sizeof(int32_t);
    t->file = read_whole_file(path, &bytes);
    if (t->file == NULL) {
        fatal("cannot read the tokenizer file '%s': %s; data/README.md says how to make or get one", path,
              strerror(errno));
    }
    tokenizer_read_header(t, path, bytes);
    t->start = (size_t*)alloc_zeroed((size_t)t->vocab_size, sizeof(size_t), "the tokenizer");
    for (int token = 0; token < t->vocab_size; token++) {
        size_t len = at < bytes ? (unsigned char)t->file[at] : 0;
        if (at >= bytes || len > bytes - at - 1) {
            fatal("the tokenizer file '%s' is truncated: it ends within token %d of %d; make or copy it again", path,
                  token, t->vocab_size);
        }
        if (len == 0) {
            fatal("the tokenizer file '%s' is damaged: token %d has no bytes; make or copy it again", path, token);
        }
        t->start[token] = at + 1;
        at += 1 + len;
    }
    if (at != bytes) {
        fatal(
            "the tokenizer file '%s' is damaged: its %d tokens end at byte %zu, the file at %zu; make or copy it again",
            path, t->vocab_size, at, bytes);
    }
    tokenizer_build_table(t, path);
}

static inline void tokenizer_close(Tokenizer* t) {
    free(t->file);
    free(t->start);
    free(t->table);
}

// Writes a tokenizer file of version 2 into a file that is open: token i has the bytes bytes[i], lengths[i] of them, 1
// to 255. Failures are out_close's to report.
static inline void tokenizer_write(OutFile* f, int vocab_size, int eot, const char* const* bytes, const int* lengths) {
    const int32_t header[TOKENIZER_HEADER] = {TOKENIZER_MAGIC, TOKENIZER_VERSION, vocab_size, eot};
    char* list = (char*)alloc_zeroed((size_t)vocab_size, 256, "a tokenizer file");
    size_t used = 0;
    for (int i = 0; i < vocab_size; i++) {
        list[used++] = (char)lengths[i];
        memcpy(list + used, bytes[i], (size_t)lengths[i]);
        used += (size_t)lengths[i];
    }
    out_write(f, header, sizeof header);
    out_write(f, list, used);
    free(list);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pieces

enum { CHAR_LETTER, CHAR_NUMBER, CHAR_SPACE, CHAR_OTHER };

// The class of the character at s, of which n >= 1 bytes are left, and the number of its bytes.
static inline int char_class(const char* s, size_t n, size_t* len) {
    uint32_t code;
    *len = utf8_decode(s, n, &code);
    return unicode_is_letter(code)   ? CHAR_LETTER
           : unicode_is_number(code) ? CHAR_NUMBER
           : unicode_is_space(code)  ? CHAR_SPACE
                                     : CHAR_OTHER;
}

// The length in bytes of the first piece of a text of n >= 1 bytes: the first match of the regular expression above.
static inline size_t first_piece(const char* s, size_t n) {
    const char* const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        size_t len = strlen(contractions[i]);
        if (len <= n && memcmp(s, contractions[i], len) == 0) { return len; }
    }
    size_t len;
    // One space goes with what follows it, unless that is white space too.
    size_t begin = s[0] == ' ' && n > 1 && char_class(s + 1, n - 1, &len) != CHAR_SPACE ? 1 : 0;
    int kind = char_class(s + begin, n - begin, &len);
    size_t end = begin + len, last = begin; // the run of this class, and where its last character starts
    while (end < n && char_class(s + end, n - end, &len) == kind) {
        last = end;
        end += len;
    }
    // White space before a word leaves its last character to it.
    return kind == CHAR_SPACE && end < n && last > 0 ? last : end;
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding

enum { NO_MERGE = INT_MAX, MERGED = -1 };

// The token that parts i and i + 1 would make, NO_MERGE if they make none. Part i is bytes start[i] to start[i + 1].
static inline int merge_rank(const Tokenizer* t, const char* piece, const size_t* start, int i, int num_parts) {
    if (i + 1 >= num_parts) { return NO_MERGE; }
    int token = tokenizer_lookup(t, piece + start[i], start[i + 2] - start[i]);
    return token < 0 ? NO_MERGE : token;
}

// Encodes one piece of n >= 1 bytes into ids, at most n, and returns their number. start (n + 1) and rank (n) are room
// to work in. Each round joins all pairs of the lowest rank.
static inline int encode_piece(const Tokenizer* t, const char* piece, int n, size_t* start, int* rank, int* ids) {
    for (int i = 0; i <= n; i++) { start[i] = (size_t)i; }
    for (int i = 0; i < n; i++) { rank[i] = merge_rank(t, piece, start, i, n); }
    for (;;) {
        int best = NO_MERGE, joined = 0;
        for (int i = 0; i < n; i++) { best = rank[i] < best ? rank[i] : best; }
        if (best == NO_MERGE) { break; }
        for (int i = 0; i < n; joined++) {
            bool merge = rank[i] == best;
            start[joined] = start[i];
            rank[joined] = merge ? MERGED : rank[i];
            i += merge ? 2 : 1;
        }
        start[joined] = start[n];
        n = joined;
        for (int i = 0; i < n; i++) { // only the ranks next to a new part have changed
            if (rank[i] == MERGED || (i + 1 < n && rank[i + 1] == MERGED)) {
                rank[i] = merge_rank(t, piece, start, i, n);
            }
        }
    }
    for (int i = 0; i < n; i++) { ids[i] = tokenizer_lookup(t, piece + start[i], start[i + 1] - start[i]); }
    return n;
}

// Where the literal <|endoftext|> next begins in text[from .. len), len if nowhere.
static inline size_t find_end_of_text(const char* text, size_t from, size_t len) {
    const size_t mark = strlen(END_OF_TEXT);
    for (; from + mark <= len; from++) {
        if (memcmp(text + from, END_OF_TEXT, mark) == 0) { return from; }
    }
    return len;
}

// The tokens of a text of len bytes, *count of them, at most len; release with free(). The text may hold any bytes.
static inline int* tokenizer_encode(const Tokenizer* t, const char* text, size_t len, int* count) {
    if (len >= INT_MAX) {
        fatal("a text of %zu bytes is too long to be encoded in one call; the limit is %d", len, INT_MAX - 1);
    }
    int* ids = (int*)alloc_zeroed(len, sizeof(int), "the tokens of a text");
    int* rank = (int*)alloc_zeroed(len, sizeof(int), "encoding a text");
    size_t* start = (size_t*)alloc_zeroed(len + 1, sizeof(size_t), "encoding a text");
    int n = 0;
    for (size_t at = 0; at < len;) {
        size_t end = t->eot >= 0 ? find_end_of_text(text, at, len) : len;
        while (at < end) {
            size_t piece = first_piece(text + at, end - at);
            n += encode_piece(t, text + at, (int)piece, start, rank, ids + n);
            at += piece;
        }
        if (end < len) {
            ids[n++] = t->eot;
            at += strlen(END_OF_TEXT);
        }
    }
    free(rank);
    free(start);
    *count = n;
    return ids;
}

#endif
