/*
Choosing the next token: softmax of logits / temperature over the top_k largest logits, and one draw from it. The choice
is a function of the logits and the generator's state alone.
*/
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include "check.h"
#include "rand.h"

typedef struct {
    float logit;
    int token;
} SampleCandidate;

// Larger logits first, smaller token numbers first among equals.
static inline int sample_compare(const void* left, const void* right) {
    const SampleCandidate *a = (const SampleCandidate*)left, *b = (const SampleCandidate*)right;
    if (a->logit != b->logit) { return a->logit > b->logit ? -1 : 1; }
    return (a->token > b->token) - (a->token < b->token);
}

// A token in 0 .. V-1. logits: (V), V >= 1. temperature 0: the largest logit. top_k 0: all V. rng: the state of
// SplitMix64; each call moves it on by one number, whatever the other arguments, so that a sample can be repeated. A
// NaN counts as minus infinity and is never chosen; if no logit is above minus infinity (a model that has diverged) the
// result is token 0.
static inline int sample_token(const float* logits, int V, float temperature, int top_k, uint64_t* rng) {
    // logits: (V)
    double u = splitmix64_uniform(rng);
    SampleCandidate* c = (SampleCandidate*)alloc_zeroed((size_t)V, sizeof(SampleCandidate), "sampling a token");
    for (int i = 0; i < V; i++) {
        c[i].logit = isnan(logits[i]) ? -INFINITY : logits[i];
        c[i].token = i;
    }
    qsort(c, (size_t)V, sizeof(SampleCandidate), sample_compare);
    int chosen = c[0].token;
    if (temperature > 0 && isfinite(c[0].logit)) {
        int k = top_k > 0 ? min_int(top_k, V) : V;
        double sum = 0, cumulative = 0;
        for (int i = 0; i < k; i++) { // the largest exponent is 0: nothing overflows, and the sum is at least 1
            sum += exp(((double)c[i].logit - (double)c[0].logit) / (double)temperature);
        }
        for (int i = 0; i < k && cumulative <= u * sum; i++) {
            double weight = exp(((double)c[i].logit - (double)c[0].logit) / (double)temperature);
            cumulative += weight;
            chosen = weight > 0 ? c[i].token : chosen;
        }
    }
    free(c);
    return chosen;
}

#endif
