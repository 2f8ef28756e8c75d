/*
Floating-point operations that training needs, for the model FLOP utilisation (MFU).

Counted, a multiplication and an addition as two operations:
- the matrix products: 2 operations a weight and token forward, 4 backward (gradient of the input, gradient of the
  weight), so 6 N with N = L * 12 C^2 (qkv 3 C^2, projection C^2, MLP 8 C^2) + V * C (the output head);
- causal attention, q k^T and p v: a query at position t (from 0) reads t + 1 keys, (T + 1) / 2 on average, and each of
  the two products costs 2 C operations a key forward and twice that backward: a token needs
  L * 2 * 6 C * (T + 1) / 2 = 6 L C (T + 1).

Not counted: LayerNorm, GELU, softmax, biases, embedding look-ups, the optimizer, the noise scale, the rows that pad the
vocabulary, anything masked, and whatever is computed twice to save memory. Compare with care:
llm.c has all parameters in N, nanoGPT counts attention without the mask (12 L C T).
*/
#ifndef LLMC_FLOPS_H
#define LLMC_FLOPS_H

#include "model.h"

// Operations of forward and backward for one token of a sequence of T.
static inline double flops_per_token(const GPTConfig* config, int T) {
    const double L = config->num_layers, C = config->channels, V = config->vocab_size;
    return 6 * (L * 12 * C * C + V * C) + 6 * L * C * (T + 1.0);
}

#endif
