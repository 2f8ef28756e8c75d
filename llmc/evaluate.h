/*
What a run does with its model besides training it: the loss on validation data, and samples of text.

The validation loss is the mean over all tokens of the first `count` sequences in file order: the same tokens at every
evaluation, whatever the micro-batch. Every rank evaluates all of them.
*/
#ifndef LLMC_EVALUATE_H
#define LLMC_EVALUATE_H

#include "check.h"
#include "dataloader.h"
#include "model.h"
#include "sampler.h"
#include "tokenizer.h"

// Mean loss per token over the first `count` sequences of val, in batches of at most max_B. Restores nothing in the
// backend: it may be called between steps only.
static inline double evaluate_loss(const Backend* backend, const DataLoader* val, int vocab_size, int64_t count,
                                   int max_B) {
    const int T = val->T;
    const size_t batch = (size_t)max_B * (size_t)T;
    int* tokens = (int*)alloc_zeroed(batch, sizeof(int), "validation tokens");
    int* targets = (int*)alloc_zeroed(batch, sizeof(int), "validation targets");
    float* losses = (float*)alloc_zeroed(batch, sizeof(float), "validation losses");
    double sum = 0;
    for (int64_t first = 0; first < count; first += max_B) {
        int B = (int)(count - first < max_B ? count - first : max_B);
        for (int b = 0; b < B; b++) {
            size_t row = (size_t)b * (size_t)T;
            dataloader_get(val, (uint64_t)(first + b), vocab_size, tokens + row, targets + row);
        }
        backend->eval(backend->self, tokens, targets, B, T, losses);
        for (size_t i = 0; i < (size_t)B * (size_t)T; i++) { sum += (double)losses[i]; }
    }
    free(tokens);
    free(targets);
    free(losses);
    return sum / ((double)count * T);
}

typedef struct {
    const Tokenizer* tokenizer;
    const int* prompt; // (prompt_len) tokens
    int prompt_len;
    int length; // tokens to add
    float temperature;
    int top_k;
} SampleSettings;

// Adds `length` tokens to the prompt and, on rank 0, prints both. A text longer than max_T goes on from its last max_T
// tokens. rng: the state of SplitMix64.
static inline void print_sample(const Backend* backend, const GPTConfig* config, int max_T, const SampleSettings* s,
                                uint64_t* rng) {
    const int total = s->prompt_len + s->length;
    int* text = (int*)alloc_zeroed((size_t)total, sizeof(int), "a sample's tokens");
    float* logits = (float*)alloc_zeroed((size_t)config->vocab_size, sizeof(float), "a sample's logits");
    memcpy(text, s->prompt, (size_t)s->prompt_len * sizeof(int));
    for (int n = s->prompt_len; n < total; n++) {
        int window = min_int(n, max_T);
        backend->logits(backend->self, text + n - window, window, logits);
        text[n] = sample_token(logits, config->vocab_size, s->temperature, s->top_k, rng);
    }
    if (backend->rank == 0) {
        printf("--- sample\n");
        for (int n = 0; n < total; n++) {
            int len;
            const char* bytes = tokenizer_decode(s->tokenizer, text[n], &len);
            fwrite(bytes, 1, (size_t)len, stdout);
        }
        printf("\n---\n");
        fflush(stdout);
    }
    free(text);
    free(logits);
}

#endif
