/*
HellaSwag (Zellers et al. 2019): four ways in which a short text might go on, one of them right. The model picks the one
whose tokens have the lowest mean loss; the score is the share of right picks. Chance is 0.25.

The file is llm.c's evaluation file, little-endian:

    256 int32: [0] 20240522   [1] version 1   [2] number of examples   [3] bytes of the longest example
    then per example, uint16: 65535, bytes of the example (from the 65535 to its end), index, label (0 to 3), 4,
    n, n tokens of context, then four times n, n tokens of the completion

Context and completion make one row of a batch; only the completion's tokens are targets, the others -1. The losses of a
row are those of its completion given the context, because attention is causal and what follows is padding.
*/
#ifndef LLMC_HELLASWAG_H
#define LLMC_HELLASWAG_H

#include "check.h"
#include "model.h"

enum { HELLASWAG_MAGIC = 20240522, HELLASWAG_VERSION = 1, HELLASWAG_HEADER = 256, HELLASWAG_CHOICES = 4 };

typedef struct {
    int label;
    int context_len;
    const uint16_t* context; // (context_len)
    int completion_len[HELLASWAG_CHOICES];
    const uint16_t* completion[HELLASWAG_CHOICES]; // (completion_len) each
} HellaSwagExample;

typedef struct {
    int num_examples;
    HellaSwagExample* example; // (num_examples)
    int longest;               // positions that the longest row needs
    char* file;                // the whole file; the examples point into it
} HellaSwag;

// Reads one list, its length first, moving *at on behind it. False if it is empty or goes beyond end.
static inline bool hellaswag_list(const uint16_t** at, const uint16_t* end, int* len, const uint16_t** tokens) {
    if (*at >= end || **at == 0 || **at > end - *at - 1) { return false; }
    *len = **at;
    *tokens = *at + 1;
    *at += 1 + *len;
    return true;
}

// Reads the example that starts at data, of which size values are left. The number of its values, 0 if it is malformed.
static inline size_t hellaswag_example(HellaSwagExample* e, const uint16_t* data, size_t size) {
    if (size < 5 || data[0] != 65535 || data[1] % 2 != 0 || data[1] / 2 > size || data[3] >= HELLASWAG_CHOICES ||
        data[4] != HELLASWAG_CHOICES) {
        return 0;
    }
    const uint16_t *at = data + 5, *end = data + data[1] / 2;
    e->label = data[3];
    bool ok = hellaswag_list(&at, end, &e->context_len, &e->context);
    for (int c = 0; ok && c < HELLASWAG_CHOICES; c++) {
        ok = hellaswag_list(&at, end, &e->completion_len[c], &e->completion[c]);
    }
    return ok && at == end ? data[1] / 2 : 0;
}

// fatal() if an example has a token outside the vocabulary or a row that needs more than T positions. Returns the
// number of positions that its longest row needs.
static inline int hellaswag_check(const HellaSwagExample* e, int number, const char* path, int T, int vocab_size) {
    int longest = 0;
    for (int c = -1; c < HELLASWAG_CHOICES; c++) { // -1: the context
        const uint16_t* tokens = c < 0 ? e->context : e->completion[c];
        int len = c < 0 ? e->context_len : e->completion_len[c];
        for (int i = 0; i < len; i++) {
            if (tokens[i] >= vocab_size) {
                fatal("the evaluation file '%s', example %d: token %d is outside the model's vocabulary of %d; the "
                      "file was "
                      "made with another tokenizer",
                      path, number, tokens[i], vocab_size);
            }
        }
        // the last token of a completion is only ever a target
        longest = c < 0 ? 0 : max_int(longest, e->context_len + len - 1);
    }
    if (longest > T) {
        fatal("the evaluation file '%s', example %d needs %d positions, but the sequence length is %d; use a longer "
              "one (-t) "
              "or leave --hellaswag out",
              path, number, longest, T);
    }
    return longest;
}

// Reads an evaluation file for a model that takes T tokens of a vocabulary of vocab_size. fatal() on any fault.
static inline void hellaswag_open(HellaSwag* h, const char* path, int T, int vocab_size) {
    const size_t header_bytes = HELLASWAG_HEADER * sizeof(int32_t);
    size_t bytes;
    h->file = read_whole_file(path, &bytes);
    if (h->file == NULL) {
        fatal("cannot read the evaluation file '%s': %s; data/README.md says what it is", path, strerror(errno));
    }
    if (bytes < header_bytes) {
        fatal("the evaluation file '%s' has %zu bytes, less than the %zu of its header; make or copy it again", path,
              bytes, header_bytes);
    }
    int32_t header[3];
    memcpy(header, h->file, sizeof header);
    if (header[0] != HELLASWAG_MAGIC) {
        fatal("'%s' is not an evaluation file: it starts with %d, not %d", path, header[0], HELLASWAG_MAGIC);
    }
    if (header[1] != HELLASWAG_VERSION) {
        fatal("the evaluation file '%s' has version %d; only version %d can be read", path, header[1],
              HELLASWAG_VERSION);
    }
    // the shortest possible example has 15 values
    size_t left = (bytes - header_bytes) / sizeof(uint16_t);
    if (header[2] < 1 || (size_t)header[2] > left / 15) {
        fatal("the evaluation file '%s' counts %d examples in its header, but its %zu bytes hold at most %zu; make or "
              "copy it "
              "again",
              path, header[2], bytes, left / 15);
    }
    h->num_examples = header[2];
    h->example = (HellaSwagExample*)alloc_zeroed((size_t)header[2], sizeof(HellaSwagExample), "HellaSwag");
    h->longest = 0;
    const uint16_t* at = (const uint16_t*)(const void*)(h->file + header_bytes);
    for (int i = 0; i < h->num_examples; i++) {
        size_t size = hellaswag_example(&h->example[i], at, left);
        if (size == 0) {
            fatal("the evaluation file '%s' is malformed or truncated at example %d of %d; make or copy it again", path,
                  i, h->num_examples);
        }
        h->longest = max_int(h->longest, hellaswag_check(&h->example[i], i, path, T, vocab_size));
        at += size;
        left -= size;
    }
    if (left != 0 || bytes % 2 != 0) {
        fatal("the evaluation file '%s' goes on after its %d examples; make or copy it again", path, h->num_examples);
    }
}

// Puts context and completion c into a row: tokens and targets (T) each.
static inline void hellaswag_row(const HellaSwagExample* e, int c, int T, int* tokens, int* targets) {
    int n = e->context_len + e->completion_len[c];
    for (int t = 0; t < T; t++) {
        tokens[t] = 0;
        targets[t] = -1;
    }
    for (int i = 0; i < n; i++) {
        int token = i < e->context_len ? e->context[i] : e->completion[c][i - e->context_len];
        if (i < n - 1) { tokens[i] = token; }
        if (i >= e->context_len) { targets[i - 1] = token; }
    }
}

// The number of the completion with the lowest mean loss, the first among equals. A NaN is never lowest; -1 if all are
// NaN.
static inline int hellaswag_pick(const double* mean_loss) { // (HELLASWAG_CHOICES)
    int pick = -1;
    for (int c = 0; c < HELLASWAG_CHOICES; c++) {
        if (!isnan(mean_loss[c]) && (pick < 0 || mean_loss[c] < mean_loss[pick])) { pick = c; }
    }
    return pick;
}

// The share of right picks, 0 to 1, over the first max_examples examples (0: all). Calls eval with at most max_B rows,
// all calls with the same number of positions: what the longest row needs, up to a multiple of 64, at most T.
static inline double hellaswag_evaluate(const HellaSwag* h, const Backend* backend, int max_B, int T,
                                        int max_examples) {
    const int rowT = min_int(T, (h->longest + 63) / 64 * 64);
    const int n = max_examples > 0 ? min_int(max_examples, h->num_examples) : h->num_examples;
    const size_t batch = (size_t)max_B * (size_t)rowT;
    int* tokens = (int*)alloc_zeroed(batch, sizeof(int), "HellaSwag's tokens");
    int* targets = (int*)alloc_zeroed(batch, sizeof(int), "HellaSwag's targets");
    float* losses = (float*)alloc_zeroed(batch, sizeof(float), "HellaSwag's losses");
    double mean_loss[HELLASWAG_CHOICES];
    int right = 0;
    for (int first = 0; first < n * HELLASWAG_CHOICES; first += max_B) {
        int B = min_int(max_B, n * HELLASWAG_CHOICES - first);
        for (int b = 0; b < B; b++) {
            const HellaSwagExample* e = &h->example[(first + b) / HELLASWAG_CHOICES];
            size_t row = (size_t)b * (size_t)rowT;
            hellaswag_row(e, (first + b) % HELLASWAG_CHOICES, rowT, tokens + row, targets + row);
        }
        backend->eval(backend->self, tokens, targets, B, rowT, losses);
        for (int b = 0; b < B; b++) {
            const HellaSwagExample* e = &h->example[(first + b) / HELLASWAG_CHOICES];
            int c = (first + b) % HELLASWAG_CHOICES;
            double sum = 0;
            for (int i = 0; i < e->completion_len[c]; i++) { sum += (double)losses[b * rowT + e->context_len - 1 + i]; }
            mean_loss[c] = sum / e->completion_len[c];
            if (c == HELLASWAG_CHOICES - 1) { right += hellaswag_pick(mean_loss) == e->label; }
        }
    }
    free(tokens);
    free(targets);
    free(losses);
    return (double)right / n;
}

static inline void hellaswag_close(HellaSwag* h) {
    free(h->example);
    free(h->file);
}

#endif
