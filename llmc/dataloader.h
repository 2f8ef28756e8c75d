/*
Token files and the order in which training reads them.

A token file (llm.c's format, little-endian) is a header of 256 int32 and then uint16 tokens:

    [0] 20240520   [1] version 1   [2] number of tokens, read as unsigned   [3] vocabulary size, 0 if unknown (llm.c)

A data set is every file ("shard") that matches a glob pattern, in sorted order. A sequence is T + 1 consecutive tokens
of one shard: the first T are the inputs, the last T the targets. Sequence j of a shard starts at its token j * T, so a
shard of n tokens holds (n - 1) / T sequences, rounded down: the last token is a target only, and what is left over at
the end of a shard is not read. Sequences are numbered through all shards.

The stream is endless, and a function of (seed, number) alone: the sequence with number k in the stream is sequence
permute(seed, k / num_sequences, num_sequences, k % num_sequences) of the data set; without shuffling it is sequence
k % num_sequences. Micro-batch size, batch schedule and number of ranks cannot change it, and a resume needs only k.

permute(seed, epoch, n, i) is a bijection of 0 .. n-1 for each (seed, epoch): a Feistel network on 2h bits, h being the
smallest number with 4^h >= n, walked until it lands below n (Black & Rogaway 2002). All arithmetic is on 64-bit
unsigned integers that wrap around; hash64 is the finaliser of SplitMix64 (rand.h):

    hash64(x): x = (x xor x >> 30) * 0xbf58476d1ce4e5b9, x = (x xor x >> 27) * 0x94d049bb133111eb, x xor x >> 31

    key = hash64(hash64(seed + 0x9e3779b97f4a7c15) + epoch)
    x = i
    repeat
        L = x div 2^h,  R = x mod 2^h
        for r = 1 .. 8:  (L, R) = (R, L xor (hash64(key + hash64(r * 2^32 + R)) mod 2^h))
        x = L * 2^h + R
    until x < n

Test vectors, permute(seed, epoch, n, i) for i = 0, 1, 2, ...:

    seed 0, epoch 0, n 10:    6 9 2 7 1 4 0 8 3 5
    seed 0, epoch 1, n 10:    4 6 9 2 1 3 5 8 0 7
    seed 1, epoch 0, n 10:    1 5 0 8 3 7 2 4 6 9
    seed 42, epoch 3, n 1000: 485 455 505 156 128 126 174 609 530 134 ...
    seed 2^64-1, epoch 7, n 10^12: 303138615449 450786713445 22682906792 22571709787 ...
*/
#ifndef LLMC_DATALOADER_H
#define LLMC_DATALOADER_H

#include "atomicfile.h"
#include "rand.h"
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TOKEN_FILE_MAGIC = 20240520, TOKEN_FILE_VERSION = 1, TOKEN_FILE_HEADER = 256 };

// ---------------------------------------------------------------------------------------------------------------------
// The order

// Where position i of an epoch of n sequences lies in the data set; the formula is at the top of this file. i < n.
static inline uint64_t permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i) {
    int h = 0;
    while (h < 32 && UINT64_C(1) << (2 * h) < n) { h++; }
    const uint64_t mask = (UINT64_C(1) << h) - 1;
    const uint64_t key = hash64(hash64(seed + UINT64_C(0x9e3779b97f4a7c15)) + epoch);
    uint64_t x = i;
    do {
        uint64_t left = x >> h, right = x & mask;
        for (uint64_t round = 1; round <= 8; round++) {
            uint64_t next = left ^ (hash64(key + hash64((round << 32) + right)) & mask);
            left = right;
            right = next;
        }
        x = left << h | right;
    } while (x >= n);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// One file

typedef struct {
    char* path;
    const int32_t* header;   // (256), the start of the mapping
    const uint16_t* tokens;  // (num_tokens), behind the header
    uint64_t num_tokens;     // at most 2^32 - 1, what the header can count
    uint64_t first_sequence; // the number of this shard's first sequence in the data set
} TokenShard;

// What a file that is no token file may be instead.
static inline const char* token_file_hint(int32_t magic) {
    switch (magic) {
    case 20240326: return "this is a model file: give it to -e";
    case 20240328: return "this is a tokenizer file";
    case 20240522: return "this is an evaluation file: give it to --hellaswag";
    case 20240801:
        return "this is a token file with 32-bit tokens, for vocabularies beyond 65536; only 16-bit ones are read";
    case 0x4d554e93: return "this is a NumPy array";
    default: return "text becomes token files with dev/data/text_to_tokens, and tokens without a header need one";
    }
}

// Maps the file into memory and checks its header against its size. fatal() on any fault.
static inline void token_shard_open(TokenShard* s, const char* path) {
    const size_t header_bytes = TOKEN_FILE_HEADER * sizeof(int32_t);
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK); // which makes no difference to a file, and does not wait for a pipe
    if (fd < 0 && errno == ENOENT) {
        fatal("no token file matches '%s'; data/README.md says how to make or get one", path);
    }
    if (fd < 0 || fstat(fd, &info) != 0) { fatal("cannot open the token file '%s': %s", path, strerror(errno)); }
    if (!S_ISREG(info.st_mode)) {
        fatal("'%s' is not a regular file; a token file, or a pattern that matches token files, was expected", path);
    }
    uint64_t bytes = (uint64_t)info.st_size;
    if (bytes < header_bytes) {
        fatal("'%s' has %" PRIu64 " bytes, less than the %zu of a token file's header; make or copy it again", path,
              bytes, header_bytes);
    }
    void* map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        fatal("cannot map the token file '%s' (%" PRIu64 " bytes) into memory: %s", path, bytes, strerror(errno));
    }
    close(fd);
    const int32_t* header = (const int32_t*)map;
    if (header[0] != TOKEN_FILE_MAGIC) {
        fatal("'%s' is not a token file: it starts with %d, not %d; %s", path, header[0], TOKEN_FILE_MAGIC,
              token_file_hint(header[0]));
    }
    if (header[1] != TOKEN_FILE_VERSION) {
        fatal("the token file '%s' has version %d; only version %d can be read", path, header[1], TOKEN_FILE_VERSION);
    }
    uint64_t count = (uint32_t)header[2];
    if (count == 0) { fatal("the token file '%s' says in its header that it holds no tokens; make it again", path); }
    if (bytes != header_bytes + 2 * count) {
        fatal("the token file '%s' is %s: its header counts %" PRIu64 " tokens, %" PRIu64
              " bytes in all, but it has %" PRIu64 "; make or copy it again",
              path, bytes < header_bytes + 2 * count ? "truncated" : "longer than it should be", count,
              header_bytes + 2 * count, bytes);
    }
    if (header[3] < 0 || header[3] > 65536) {
        fatal("the token file '%s' gives its vocabulary as %d in header word 3; expected 0 (unknown) to 65536", path,
              header[3]);
    }
    s->path = copy_string(path);
    s->header = header;
    s->tokens = (const uint16_t*)(header + TOKEN_FILE_HEADER);
    s->num_tokens = count;
    s->first_sequence = 0;
}

static inline void token_shard_close(TokenShard* s) {
    munmap((void*)(uintptr_t)s->header, TOKEN_FILE_HEADER * sizeof(int32_t) + 2 * s->num_tokens);
    free(s->path);
}

// The files that match the pattern, sorted. A pattern without a match is kept as the name of one file, which opens if
// it exists (a name may contain brackets) and otherwise is reported as missing.
static inline void token_files_find(glob_t* files, const char* pattern) {
    if (glob(pattern, GLOB_NOCHECK, NULL, files) != 0) {
        fatal("cannot look for the token files '%s': %s", pattern, strerror(errno));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// All files

typedef struct {
    int T;         // tokens in a sequence
    uint64_t seed; // of the order
    bool shuffle;  // false: file order
    int num_shards;
    TokenShard* shards;     // (num_shards)
    int64_t num_tokens;     // in all shards
    uint64_t num_sequences; // in all shards, at least 1
    int vocab_size;         // header word 3, the largest over the shards; 0 if unknown
} DataLoader;

// Opens (memory-maps) every file that matches the glob pattern, in sorted order. seed and shuffle set the order of the
// stream. fatal() on any fault, also if there is not one whole sequence in any shard.
static inline void dataloader_open(DataLoader* d, const char* pattern, int T, uint64_t seed, bool shuffle) {
    glob_t files;
    token_files_find(&files, pattern);
    d->T = T;
    d->seed = seed;
    d->shuffle = shuffle;
    d->num_shards = (int)files.gl_pathc;
    d->shards = (TokenShard*)alloc_zeroed(files.gl_pathc, sizeof(TokenShard), "the list of token files");
    d->num_tokens = 0;
    d->num_sequences = 0;
    d->vocab_size = 0;
    uint64_t longest = 0;
    for (int i = 0; i < d->num_shards; i++) {
        TokenShard* s = &d->shards[i];
        token_shard_open(s, files.gl_pathv[i]);
        s->first_sequence = d->num_sequences;
        d->num_sequences += (s->num_tokens - 1) / (uint64_t)T;
        d->num_tokens += (int64_t)s->num_tokens;
        d->vocab_size = max_int(d->vocab_size, s->header[3]);
        longest = s->num_tokens > longest ? s->num_tokens : longest;
    }
    globfree(&files);
    if (d->num_sequences == 0) {
        fatal("'%s' holds no whole sequence: one of %d tokens needs %" PRId64 " in one file, the longest has %" PRIu64
              "; give more data or a shorter sequence (-t)",
              pattern, T, (int64_t)T + 1, longest);
    }
}

// The vocabulary size in the first matching file's header, 0 if it gives none. fatal() if there is no such file or it
// is not a token file.
static inline int dataloader_peek_vocab(const char* pattern) {
    glob_t files;
    TokenShard s;
    token_files_find(&files, pattern);
    token_shard_open(&s, files.gl_pathv[0]);
    int vocab_size = s.header[3];
    token_shard_close(&s);
    globfree(&files);
    return vocab_size;
}

// The shard that holds a sequence of the data set: the last whose first sequence is not beyond it.
static inline const TokenShard* dataloader_shard(const DataLoader* d, uint64_t sequence) {
    int low = 0, high = d->num_shards - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (d->shards[middle].first_sequence <= sequence) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return &d->shards[low];
}

// Where the sequence with this number in the endless stream lies: the shard, and the position of its first token there.
static inline const TokenShard* dataloader_find(const DataLoader* d, uint64_t number, uint64_t* start) {
    uint64_t epoch = number / d->num_sequences, sequence = number % d->num_sequences;
    if (d->shuffle) { sequence = permute(d->seed, epoch, d->num_sequences, sequence); }
    const TokenShard* s = dataloader_shard(d, sequence);
    *start = (sequence - s->first_sequence) * (uint64_t)d->T;
    return s;
}

// Whether all tokens of the sequences `number` to number + count - 1 are below vocab_size; if not, a line about the first one
// that is not.
static inline bool dataloader_check(const DataLoader* d, uint64_t number, int64_t count, int vocab_size, char* error,
                                    size_t error_size) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t start;
        const TokenShard* s = dataloader_find(d, number + (uint64_t)i, &start);
        const uint16_t* tokens = s->tokens + start;
        uint16_t largest = 0; // first, as that takes no time
        for (int t = 0; t <= d->T; t++) { largest = tokens[t] > largest ? tokens[t] : largest; }
        if (largest < vocab_size) { continue; }
        int bad = 0;
        while (tokens[bad] < vocab_size) { bad++; }
        print_cut(error, error_size,
                  "'%s': token %d at position %" PRIu64 " is outside the model's vocabulary of %d (the file's header "
                  "gives %d, 0 = unknown); use the model's own tokenizer for the data, or a model with a larger "
                  "vocabulary",
                  s->path, tokens[bad], start + (uint64_t)bad, vocab_size, s->header[3]);
        return false;
    }
    return true;
}

// Asks for this sequence's pages to be read from the disk, and does not wait for them.
static inline void dataloader_prefetch(const DataLoader* d, uint64_t number) {
    uint64_t start;
    const TokenShard* s = dataloader_find(d, number, &start);
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)(s->tokens + start) / page * page;
    madvise((void*)begin, (uintptr_t)(s->tokens + start + d->T + 1) - begin, MADV_WILLNEED);
}

// The sequence with this number in the endless stream; number / num_sequences is the epoch. fatal() on a token that is
// not below vocab_size.
static inline void dataloader_get(const DataLoader* d, uint64_t number, int vocab_size, int* tokens, int* targets) {
    // tokens, targets: (T) each
    char error[PATH_SIZE + 256];
    uint64_t start;
    const TokenShard* s = dataloader_find(d, number, &start);
    if (!dataloader_check(d, number, 1, vocab_size, error, sizeof error)) { fatal("%s", error); }
    for (int t = 0; t < d->T; t++) {
        tokens[t] = s->tokens[start + (uint64_t)t];
        targets[t] = s->tokens[start + (uint64_t)t + 1];
    }
}

static inline void dataloader_close(DataLoader* d) {
    for (int i = 0; i < d->num_shards; i++) { token_shard_close(&d->shards[i]); }
    free(d->shards);
    d->shards = NULL;
    d->num_shards = 0;
}

#endif
