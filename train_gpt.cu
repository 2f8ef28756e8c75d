/*
The CUDA trainer: GPT-2 on one GPU. This file is the model; its operations are the .cuh files of llmc/, the loop around
it is llmc/train.h.

    1. Memory: what is kept where
    2. The model: forward, backward, a step
    3. The backend that the loop sees, and main()

Numbers. Weights and activations are bf16, with fp32 master weights; gradients, moments, losses and norms are fp32 or better.
Built with -DPRECISION_FP32 everything is fp32, and the products read the master weights themselves. Gradients are plain
sums over examples; the same calls give the same bits (see the numerical contract of each operation).

Time. Everything goes to one stream in the order of the formulas, and the host runs ahead of it: micro() copies its tokens
into pinned memory and returns, so the loop reads the next micro-batch's data while the GPU computes. The one wait
of a step is in step_end(), for the numbers that the loop decides on (but the first product of each shape waits while its
algorithm is chosen). Whether to update and by what factor is decided on the device.

Memory. What the backward pass of a block needs of its forward pass is kept (BlockActivations), all of it or, by --recompute, without
the outputs of GELU and LayerNorm. The head's logits, the largest array of all, exist for a part of the micro-batch at a time.
*/
#include "llmc/adamw.cuh"
#include "llmc/attention.cuh"
#include "llmc/bias.cuh"
#include "llmc/classifier.cuh"
#include "llmc/embedding.cuh"
#include "llmc/gelu.cuh"
#include "llmc/global_norm.cuh"
#include "llmc/layernorm.cuh"
#include "llmc/matmul.cuh"
#include "llmc/profile.cuh"
#include "llmc/train.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Memory

// What the backward pass needs of one block.
typedef struct {
    floatX* residual_in;                              // (B, T, C) the residual stream at the block's entrance
    floatX* norm1;                                    // (B, T, C) the first LayerNorm's output; not kept: scratch
    floatX* qkv;                                      // (B, T, 3, NH, HS)
    floatX* att;                                      // (B, T, C) attention's output before its projection
    int8_t* att_remainder;                            // (B, T, C) what rounding took from it; NULL in fp32
    floatX* residual_mid;                             // (B, T, C) the residual stream between attention and MLP
    floatX* norm2;                                    // (B, T, C) the second LayerNorm's output; not kept: scratch
    floatX* fch;                                      // (B, T, 4C) before GELU
    floatX* hidden;                                   // (B, T, 4C) after GELU; not kept: scratch
    float *ln1_mean, *ln1_rstd, *ln2_mean, *ln2_rstd; // (B, T) each
    float* lse;                                       // (B, NH, T)
} BlockActivations;

enum { MEM_WEIGHTS, MEM_GRADIENTS, MEM_MOMENTS, MEM_ACTIVATIONS, MEM_SCRATCH, NUM_MEMS };

enum {
    LOGITS_BYTES = 2000 << 20,  // of logits at a time, if a single example has no more
    EXAMPLES_BYTES = 1024 << 20 // of per-example gradients of a matrix at a time, if a single one has no more
};

// What a step brings back to the host, in one piece of pinned memory.
typedef struct {
    StepHyper hyper; // goes to the device
    StepDecision decision;
    double* norms; // (2, num_tensors): sq_sum, sum_sq
} StepReport;

typedef struct {
    GPTConfig config;
    ParamTable table;
    PieceTable pieces;
    int max_B, max_T;
    size_t max_N;       // max_B * max_T
    size_t logits_rows; // tokens whose logits fit into memory
    int recompute;      // RECOMPUTE_*
    bool fuse_gelu;     // GELU as a part of the products

    cudaStream_t stream;
    MatmulPlans mm;
    Profile profile;
    double peak_flops, bandwidth; // measured, a second
    char device[128];

    void* memory[NUM_MEMS]; // one allocation each, which holds the arrays below
    size_t bytes[NUM_MEMS];
    void* gns_memory; // likewise, at the first step that measures all tensors
    size_t gns_bytes;
    // Flat arrays in the order of the model file.
    float *master, *grads, *m, *v;
    floatX* weights; // what the operations read: master, rounded to floatX, or master itself
    // Activations.
    BlockActivations* block;    // (L), on the host
    floatX* residual_out;       // (B, T, C) the residual stream after the last block
    float *lnf_mean, *lnf_rstd; // (B, T)
    floatX* lnf;                // (B, T, C) input of the head
    float* losses;              // (B, T)
    int *tokens, *targets;      // (B, T)
    // Scratch, shared by all blocks.
    floatX* norm;      // (B, T, C) a LayerNorm's output where it is not kept
    floatX* hidden;    // (B, T, 4C) GELU's output where it is not kept
    floatX* branch;    // (B, T, C) what a branch adds to the residual stream; backward: gradient at a branch's input
    floatX* dhidden;   // (B, T, 4C) gradient at fch, or at qkv
    floatX* dresidual; // (B, T, C)
    floatX* logits;    // (logits_rows, Vp), then their gradient
    char* scratch;     // of one operation at a time
    double* norm_scratch;
    // --gns all
    float* example_grads; // (group, OC, C): gradients of single examples
    floatX* gathered;     // (logits_rows, T) logit gradients in the columns of each example's tokens
    floatX* head_rows;    // (B, T, C) the head's gradient of wte in the rows of each example's tokens
    // The step in progress.
    int gns;          // what is measured
    int micros;       // micro-batches so far: the first one overwrites the matrices' gradients, later ones add
    double* norms;    // (2, num_tensors) on the device: |sum_b g_b|^2, sum_b |g_b|^2
    double* loss_sum; // (1) sum over examples
    StepHyper* hyper;
    StepDecision* decision;
    StepReport* report; // pinned
    // Micro-batches of the step on their way to the device, (2, max_N) each: tokens, then targets. Pinned, so that copying
    // them does not stop the host.
    int** slot; // (num_slots)
    int num_slots;
} GPT;

// Takes arrays one after the other from a block of memory; without a block it only counts.
typedef struct {
    char* base;
    size_t used;
} Arena;

template <class T> static void arena_take(Arena* arena, T** array, size_t count) {
    *array = arena->base != NULL ? (T*)(arena->base + arena->used) : NULL;
    arena->used += div_up<size_t>(count * sizeof(T), 256) * 256;
}

static void* device_alloc(size_t bytes, const char* what) {
    void* memory = NULL;
    size_t free_bytes = 0, total = 0;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    if (cudaMalloc(&memory, bytes) == cudaErrorMemoryAllocation) {
        fatal("not enough memory on the GPU: %s need%s %.2f GiB, %.2f of %.2f GiB are free; use a smaller micro-batch "
              "(-b), a "
              "larger --recompute (-r), or a smaller model",
              what, what[strlen(what) - 1] == 's' ? "" : "s", (double)bytes / (1 << 30), (double)free_bytes / (1 << 30),
              (double)total / (1 << 30));
    }
    cuda_check(cudaGetLastError());
    return memory;
}

// Bytes that the operations need for themselves, one at a time.
static size_t scratch_bytes(const GPT* g) {
    const int B = g->max_B, T = g->max_T, C = g->config.channels, NH = g->config.num_heads;
    bool cosine = false;
    for (int l = 0; l < g->config.num_layers; l++) { cosine = cosine || config_is_cosine(&g->config, l); }
    const Attention attention = {B, T, NH, C / NH, 1, cosine};
    size_t bytes = attention_scratch_bytes(attention);
    bytes = std::max(bytes, layernorm_backward_scratch(B, C));
    bytes = std::max(bytes, bias_backward_scratch(B, T, 4 * C));
    return std::max(bytes, embedding_backward_scratch(B, T, C));
}

// Lays out all that a trainer holds on the device, in one arena for each kind.
static void gpt_layout(GPT* g, Arena arena[NUM_MEMS]) {
    const size_t N = g->max_N, C = (size_t)g->config.channels, NH = (size_t)g->config.num_heads;
    const size_t P = g->table.num_params, num_tensors = (size_t)g->table.num_tensors;
    Arena *a = &arena[MEM_ACTIVATIONS], *s = &arena[MEM_SCRATCH];
    arena_take(&arena[MEM_WEIGHTS], &g->master, P);
    arena_take(&arena[MEM_GRADIENTS], &g->grads, P);
    arena_take(&arena[MEM_MOMENTS], &g->m, P);
    arena_take(&arena[MEM_MOMENTS], &g->v, P);
    if (sizeof(floatX) == sizeof(float)) {
        g->weights = (floatX*)g->master;
    } else {
        arena_take(&arena[MEM_WEIGHTS], &g->weights, P);
    }
    const bool keep_norms = g->recompute < RECOMPUTE_LAYERNORM;
    // Without a fused GELU the backward pass computes the output again on its way: nothing is gained by keeping it.
    const bool keep_hidden = g->recompute < RECOMPUTE_GELU && g->fuse_gelu;
    if (!keep_norms) { arena_take(s, &g->norm, N * C); }
    if (!keep_hidden) { arena_take(s, &g->hidden, 4 * N * C); }
    for (int l = 0; l < g->config.num_layers; l++) {
        BlockActivations* b = &g->block[l];
        arena_take(a, &b->residual_in, N * C);
        arena_take(a, &b->residual_mid, N * C);
        arena_take(a, &b->qkv, 3 * N * C);
        arena_take(a, &b->att, N * C);
        if (sizeof(floatX) != sizeof(float)) { arena_take(a, &b->att_remainder, N * C); }
        arena_take(a, &b->fch, 4 * N * C);
        b->norm1 = b->norm2 = g->norm;
        b->hidden = g->hidden;
        if (keep_norms) {
            arena_take(a, &b->norm1, N * C);
            arena_take(a, &b->norm2, N * C);
        }
        if (keep_hidden) { arena_take(a, &b->hidden, 4 * N * C); }
        float** statistics[] = {&b->ln1_mean, &b->ln1_rstd, &b->ln2_mean, &b->ln2_rstd};
        for (float** x : statistics) { arena_take(a, x, N); }
        arena_take(a, &b->lse, N * NH);
    }
    arena_take(a, &g->residual_out, N * C);
    arena_take(a, &g->lnf, N * C);
    arena_take(a, &g->lnf_mean, N);
    arena_take(a, &g->lnf_rstd, N);
    arena_take(a, &g->losses, N);
    arena_take(a, &g->tokens, N);
    arena_take(a, &g->targets, N);
    arena_take(s, &g->branch, N * C);
    arena_take(s, &g->dhidden, 4 * N * C);
    arena_take(s, &g->dresidual, N * C);
    arena_take(s, &g->logits, g->logits_rows * (size_t)g->config.padded_vocab_size);
    arena_take(s, &g->scratch, scratch_bytes(g));
    arena_take(s, &g->norm_scratch, global_norm_scratch(&g->pieces));
    arena_take(s, &g->norms, 2 * num_tensors);
    arena_take(s, &g->loss_sum, 1);
    arena_take(s, &g->hyper, 1);
    arena_take(s, &g->decision, 1);
}

// How many examples' gradients of a (rows, cols) matrix are computed at a time.
static int examples_group(int B, size_t size) {
    const size_t most = (size_t)EXAMPLES_BYTES / (size * sizeof(float));
    return (int)std::min(std::max(most, (size_t)1), (size_t)B);
}

static void gns_all_layout(GPT* g, Arena* arena) {
    size_t largest = 0;
    for (int r = 0; r < NUM_ROWS; r++) {
        const size_t size = g->table.row[r].size;
        const bool product = g->table.row[r].cols > 1 && r != WPE;
        if (product) { largest = std::max(largest, size * (size_t)examples_group(g->max_B, size)); }
    }
    arena_take(arena, &g->example_grads, largest);
    arena_take(arena, &g->gathered, g->logits_rows * (size_t)g->max_T);
    arena_take(arena, &g->head_rows, g->max_N * (size_t)g->config.channels);
}

// What --gns all needs besides, at the first step that measures all tensors.
static void gpt_reserve_gns_all(GPT* g) {
    Arena count = {}, arena = {};
    gns_all_layout(g, &count);
    g->gns_bytes = count.used;
    g->gns_memory = device_alloc(g->gns_bytes, "per-example norms of all tensors");
    arena.base = (char*)g->gns_memory;
    gns_all_layout(g, &arena);
    printf("memory      per-example norms of all tensors: scratch %.1f MiB more\n", (double)g->gns_bytes / (1 << 20));
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. The model

static const floatX* weight_of(const GPT* g, int row, int layer) {
    return g->weights + param_offset(&g->table, row, layer);
}
static float* grad_of(const GPT* g, int row, int layer) { return g->grads + param_offset(&g->table, row, layer); }

// Where on the device a tensor's per-example norms go; NULL if this step does not measure them.
static double* sum_sq_of(const GPT* g, int row, int layer) {
    const bool measured = gns_measures(g->gns, g->table.row[row].group);
    return measured ? g->norms + g->table.num_tensors + tensor_index(&g->table, row, layer) : NULL;
}

static void mark(GPT* g, int part, int pass, double flops, double bytes) {
    profile_mark(&g->profile, part, pass, flops, bytes, g->stream);
}
// Bytes of this many activations.
static double activation_bytes(double count) { return count * (double)sizeof(floatX); }

static Attention block_attention(const GPT* g, int l, int B, int T) {
    const int NH = g->config.num_heads, HS = g->config.channels / NH;
    const Attention a = {B, T, NH, HS, g->config.attn_mult / sqrtf((float)HS), config_is_cosine(&g->config, l)};
    return a;
}
// Operations of the forward pass: two products over the causal half of the scores.
static double attention_flops(const GPT* g, int B, int T) { return 4.0 * B * g->config.channels * T * (T + 1.0) / 2; }

// out = inp @ weight^T + bias, through GELU if pre_gelu is not NULL
// out, pre_gelu (N, OC), inp (N, C)
static void linear_forward(GPT* g, floatX* out, floatX* pre_gelu, const floatX* inp, int weight, int bias, int l,
                           int N) {
    const int OC = g->table.row[weight].rows, C = g->table.row[weight].cols;
    matmul_forward(&g->mm, out, pre_gelu, inp, weight_of(g, weight, l), weight_of(g, bias, l), 1, N, C, OC, g->stream);
    mark(g, PART_PRODUCTS, PASS_FORWARD, 2.0 * N * C * OC, 0);
}

// Gradient of a weight, and its per-example norms where they are measured.
// dout (B, T, OC), inp (B, T, C)
static void weight_backward(GPT* g, int part, int row, int l, const floatX* dout, const floatX* inp, float alpha,
                            bool accumulate, int B, int T) {
    const int OC = g->table.row[row].rows, C = g->table.row[row].cols, N = B * T;
    double* sum_sq = sum_sq_of(g, row, l);
    if (sum_sq != NULL) {
        matmul_backward_weight_examples(&g->mm, grad_of(g, row, l), sum_sq, g->example_grads,
                                        examples_group(B, g->table.row[row].size), dout, inp, alpha, accumulate, B, T,
                                        C, OC, g->stream);
    } else {
        matmul_backward_weight(&g->mm, grad_of(g, row, l), dout, inp, alpha, accumulate, N, C, OC, g->stream);
    }
    mark(g, part, PASS_BACKWARD, 2.0 * N * C * OC, 0);
}

// Gradients of a linear layer's weight and bias. dout (B, T, OC), inp (B, T, C)
static void linear_backward_weight(GPT* g, const floatX* dout, const floatX* inp, int weight, int bias, int l,
                                   float alpha, int B, int T) {
    const int OC = g->table.row[weight].rows;
    weight_backward(g, PART_PRODUCTS, weight, l, dout, inp, alpha, g->micros > 0, B, T);
    bias_backward(grad_of(g, bias, l), sum_sq_of(g, bias, l), g->scratch, dout, alpha, B, T, OC, g->stream);
    mark(g, PART_BIAS, PASS_BACKWARD, 0, activation_bytes((double)B * T * OC));
}

// Gradient at a linear layer's input, times the slope of GELU at pre_gelu if that is not NULL.
// dinp, pre_gelu (N, C), dout (N, OC)
static void linear_backward_input(GPT* g, floatX* dinp, const floatX* pre_gelu, const floatX* dout, int weight, int l,
                                  float alpha, int N) {
    const int OC = g->table.row[weight].rows, C = g->table.row[weight].cols;
    matmul_backward_input(&g->mm, dinp, pre_gelu, dout, weight_of(g, weight, l), alpha, N, C, OC, g->stream);
    mark(g, PART_PRODUCTS, PASS_BACKWARD, 2.0 * N * C * OC, 0);
}

// residual = inp + residual_mult * branch (branch NULL: residual is inp), out = its LayerNorm
// residual, out, inp, branch (N, C), mean, rstd (N)
static void norm_forward(GPT* g, floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp,
                         const floatX* branch, int weight, int bias, int l, int N) {
    const int C = g->config.channels;
    layernorm_forward(residual, out, mean, rstd, inp, branch, g->config.residual_mult, weight_of(g, weight, l),
                      weight_of(g, bias, l), N, C, g->stream);
    mark(g, PART_LAYERNORM, PASS_FORWARD, 0, activation_bytes((branch != NULL ? 4.0 : 2.0) * N * C));
}

// The LayerNorm's output again, where it was not kept. out, inp (N, C), mean, rstd (N)
static void norm_again(GPT* g, floatX* out, const floatX* inp, const float* mean, const float* rstd, int weight,
                       int bias, int l, int N) {
    const int C = g->config.channels;
    if (g->recompute < RECOMPUTE_LAYERNORM) { return; }
    layernorm_recompute(out, inp, mean, rstd, weight_of(g, weight, l), weight_of(g, bias, l), N, C, g->stream);
    mark(g, PART_LAYERNORM, PASS_BACKWARD, 0, activation_bytes(2.0 * N * C));
}

// g->dresidual += gradient at the LayerNorm's input; dout (B, T, C) is that at its output
static void norm_backward(GPT* g, const floatX* dout, const floatX* inp, const float* mean, const float* rstd,
                          int weight, int bias, int l, int B, int T) {
    const int C = g->config.channels;
    layernorm_backward(g->dresidual, grad_of(g, weight, l), grad_of(g, bias, l), sum_sq_of(g, weight, l),
                       sum_sq_of(g, bias, l), dout, inp, mean, rstd, weight_of(g, weight, l), g->scratch, B, T, C,
                       g->stream);
    mark(g, PART_LAYERNORM, PASS_BACKWARD, 0, activation_bytes(4.0 * B * T * C));
}

// One block: from a->residual_in and a->norm1 to a->residual_mid, and in g->branch what the MLP adds to it.
static void block_forward(GPT* g, int l, int B, int T) {
    const int N = B * T, C = g->config.channels;
    BlockActivations* a = &g->block[l];
    linear_forward(g, a->qkv, NULL, a->norm1, QKVW, QKVB, l, N);
    attention_forward(a->att, a->att_remainder, a->lse, a->qkv, g->scratch, block_attention(g, l, B, T), g->stream);
    mark(g, PART_ATTENTION, PASS_FORWARD, attention_flops(g, B, T), 0);
    linear_forward(g, g->branch, NULL, a->att, ATTPROJW, ATTPROJB, l, N);
    norm_forward(g, a->residual_mid, a->norm2, a->ln2_mean, a->ln2_rstd, a->residual_in, g->branch, LN2W, LN2B, l, N);
    if (g->fuse_gelu) {
        linear_forward(g, a->hidden, a->fch, a->norm2, FCW, FCB, l, N);
    } else {
        linear_forward(g, a->fch, NULL, a->norm2, FCW, FCB, l, N);
        gelu_forward(a->hidden, a->fch, g->config.gelu, (size_t)N * 4 * (size_t)C, g->stream);
        mark(g, PART_GELU, PASS_FORWARD, 0, activation_bytes(8.0 * N * C));
    }
    linear_forward(g, g->branch, NULL, a->hidden, FCPROJW, FCPROJB, l, N);
}

// Tokens to the head's input, g->lnf. g->tokens (B, T)
static void gpt_forward(GPT* g, int B, int T) {
    const int N = B * T, C = g->config.channels, L = g->config.num_layers;
    BlockActivations* first = &g->block[0];
    embedding_forward(first->residual_in, g->tokens, weight_of(g, WTE, 0), weight_of(g, WPE, 0), g->config.embed_mult,
                      B, T, C, g->stream);
    mark(g, PART_EMBEDDING, PASS_FORWARD, 0, activation_bytes(2.0 * N * C));
    norm_forward(g, NULL, first->norm1, first->ln1_mean, first->ln1_rstd, first->residual_in, NULL, LN1W, LN1B, 0, N);
    for (int l = 0; l < L; l++) {
        BlockActivations* a = &g->block[l];
        block_forward(g, l, B, T);
        if (l + 1 < L) {
            BlockActivations* next = &g->block[l + 1];
            norm_forward(g, next->residual_in, next->norm1, next->ln1_mean, next->ln1_rstd, a->residual_mid, g->branch,
                         LN1W, LN1B, l + 1, N);
        } else {
            norm_forward(g, g->residual_out, g->lnf, g->lnf_mean, g->lnf_rstd, a->residual_mid, g->branch, LNFW, LNFB,
                         0, N);
        }
    }
}

// g->logits (N, Vp) of the head's inputs x (N, C)
static void head_logits(GPT* g, const floatX* x, int N) {
    const int C = g->config.channels, Vp = g->config.padded_vocab_size;
    matmul_forward(&g->mm, g->logits, NULL, x, weight_of(g, WTE, 0), NULL, g->config.logit_mult, N, C, Vp, g->stream);
    mark(g, PART_HEAD, PASS_FORWARD, 2.0 * N * C * Vp, 0);
}

// Examples whose logits are in memory at a time: equal parts of the micro-batch, as few as the memory allows.
static int head_examples(const GPT* g, int B, int T) {
    const int most = (int)std::min((size_t)B, g->logits_rows / (size_t)T);
    return div_up(B, div_up(B, most));
}

// Loss and gradient of the tied head, some examples at a time: g->losses, the head's part of wte's gradient, and the
// gradient at g->lnf in g->branch. g->tokens, g->targets (B, T)
static void head_forward_backward(GPT* g, int B, int T) {
    const int C = g->config.channels, V = g->config.vocab_size, Vp = g->config.padded_vocab_size;
    const int step = head_examples(g, B, T);
    const float scale = g->config.logit_mult / (float)T;
    for (int b0 = 0; b0 < B; b0 += step) {
        const int examples = min_int(step, B - b0), N = examples * T;
        const size_t at = (size_t)b0 * (size_t)T;
        const floatX* x = g->lnf + at * (size_t)C;
        head_logits(g, x, N);
        classifier_forward_backward(g->logits, g->losses + at, g->targets + at, scale, N, V, Vp, g->stream);
        mark(g, PART_CLASSIFIER, PASS_FORWARD, 0, activation_bytes(2.0 * N * Vp));
        matmul_backward_input(&g->mm, g->branch + at * (size_t)C, NULL, g->logits, weight_of(g, WTE, 0), 1, N, C, Vp,
                              g->stream);
        mark(g, PART_HEAD, PASS_BACKWARD, 2.0 * N * C * Vp, 0);
        weight_backward(g, PART_HEAD, WTE, 0, g->logits, x, 1, g->micros > 0 || b0 > 0, examples, T);
        if (sum_sq_of(g, WTE, 0) != NULL) {
            classifier_gather(g->gathered, g->logits, g->tokens + at, examples, T, Vp, g->stream);
            matmul_examples_transposed(&g->mm, g->head_rows + at * (size_t)C, g->gathered, x, examples, T, T, C,
                                       g->stream);
            mark(g, PART_EMBEDDING_NORMS, PASS_BACKWARD, 2.0 * N * C * T, activation_bytes(2.0 * N * T));
        }
    }
}

// One block: g->dresidual is the gradient after it on entry, before it on return.
static void block_backward(GPT* g, int l, int B, int T) {
    const int N = B * T, C = g->config.channels;
    const float mult = g->config.residual_mult;
    BlockActivations* a = &g->block[l];
    // MLP
    const bool hidden_kept = a->hidden != g->hidden;
    linear_backward_input(g, g->dhidden, hidden_kept ? a->fch : NULL, g->dresidual, FCPROJW, l, mult, N);
    if (!hidden_kept) {
        gelu_backward(g->dhidden, a->hidden, a->fch, g->config.gelu, (size_t)N * 4 * (size_t)C, g->stream);
        mark(g, PART_GELU, PASS_BACKWARD, 0, activation_bytes(16.0 * N * C));
    }
    linear_backward_weight(g, g->dresidual, a->hidden, FCPROJW, FCPROJB, l, mult, B, T);
    norm_again(g, a->norm2, a->residual_mid, a->ln2_mean, a->ln2_rstd, LN2W, LN2B, l, N);
    linear_backward_weight(g, g->dhidden, a->norm2, FCW, FCB, l, 1, B, T);
    linear_backward_input(g, g->branch, NULL, g->dhidden, FCW, l, 1, N);
    norm_backward(g, g->branch, a->residual_mid, a->ln2_mean, a->ln2_rstd, LN2W, LN2B, l, B, T);
    // attention
    linear_backward_weight(g, g->dresidual, a->att, ATTPROJW, ATTPROJB, l, mult, B, T);
    linear_backward_input(g, g->branch, NULL, g->dresidual, ATTPROJW, l, mult, N);
    attention_backward(g->dhidden, g->branch, a->att, a->att_remainder, a->lse, a->qkv, g->scratch,
                       block_attention(g, l, B, T), g->stream);
    mark(g, PART_ATTENTION, PASS_BACKWARD, 2.5 * attention_flops(g, B, T), 0);
    norm_again(g, a->norm1, a->residual_in, a->ln1_mean, a->ln1_rstd, LN1W, LN1B, l, N);
    linear_backward_weight(g, g->dhidden, a->norm1, QKVW, QKVB, l, 1, B, T);
    linear_backward_input(g, g->branch, NULL, g->dhidden, QKVW, l, 1, N);
    norm_backward(g, g->branch, a->residual_in, a->ln1_mean, a->ln1_rstd, LN1W, LN1B, l, B, T);
}

// A step starts: what the first micro-batch does not overwrite is set to zero.
static void gpt_step_begin(GPT* g, int gns) {
    g->gns = gns;
    g->micros = 0;
    if (gns == GNS_ALL && g->gns_memory == NULL) { gpt_reserve_gns_all(g); }
    profile_step_begin(&g->profile, g->stream);
    cuda_check(cudaMemsetAsync(g->norms, 0, 2 * (size_t)g->table.num_tensors * sizeof(double), g->stream));
    cuda_check(cudaMemsetAsync(g->loss_sum, 0, sizeof(double), g->stream));
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &g->table.row[r];
        const size_t bytes = row->size * (size_t)row->count * sizeof(float);
        if (row->cols == 1 || r == WPE) { cuda_check(cudaMemsetAsync(grad_of(g, r, 0), 0, bytes, g->stream)); }
    }
    mark(g, PART_NORMS, PASS_FORWARD, 0, 0);
}

// Sends tokens (B, T), and targets (B, T) if not NULL, on their way; both may be changed at once. Every micro-batch of a step has
// pinned memory of its own, so that none waits for the copy of an earlier one.
static void send_tokens(GPT* g, const int* tokens, const int* targets, int B, int T) {
    const size_t N = (size_t)B * (size_t)T;
    if (g->micros == g->num_slots) {
        int** more = (int**)alloc_zeroed((size_t)g->num_slots + 1, sizeof(int*), "micro-batches");
        for (int i = 0; i < g->num_slots; i++) { more[i] = g->slot[i]; }
        if (cudaMallocHost((void**)&more[g->num_slots], 2 * g->max_N * sizeof(int)) != cudaSuccess) {
            fatal(
                "CUDA: no pinned memory for the tokens of micro-batch %d of a step; take larger ones (-b) or a smaller "
                "batch (-d)",
                g->num_slots + 1);
        }
        free(g->slot);
        g->slot = more;
        g->num_slots++;
    }
    int *from = g->slot[g->micros], *from_targets = from + g->max_N;
    memcpy(from, tokens, N * sizeof(int));
    cuda_check(cudaMemcpyAsync(g->tokens, from, N * sizeof(int), cudaMemcpyHostToDevice, g->stream));
    if (targets != NULL) {
        memcpy(from_targets, targets, N * sizeof(int));
        cuda_check(cudaMemcpyAsync(g->targets, from_targets, N * sizeof(int), cudaMemcpyHostToDevice, g->stream));
    }
    mark(g, PART_DATA, PASS_FORWARD, 0, 0);
}

// Forward and backward of B examples: adds to gradients, norms and loss. tokens, targets (B, T)
static void gpt_micro(GPT* g, const int* tokens, const int* targets, int B, int T) {
    const int C = g->config.channels, N = B * T;
    send_tokens(g, tokens, targets, B, T);
    gpt_forward(g, B, T);
    head_forward_backward(g, B, T);
    loss_add(g->loss_sum, g->losses, B, T, g->stream);
    mark(g, PART_CLASSIFIER, PASS_FORWARD, 0, 0);
    cuda_check(cudaMemsetAsync(g->dresidual, 0, (size_t)N * (size_t)C * sizeof(floatX), g->stream));
    norm_backward(g, g->branch, g->residual_out, g->lnf_mean, g->lnf_rstd, LNFW, LNFB, 0, B, T);
    for (int l = g->config.num_layers - 1; l >= 0; l--) { block_backward(g, l, B, T); }
    embedding_backward(grad_of(g, WTE, 0), grad_of(g, WPE, 0), sum_sq_of(g, WTE, 0), sum_sq_of(g, WPE, 0), g->dresidual,
                       g->tokens, g->head_rows, g->config.embed_mult, B, T, C, g->scratch, g->stream);
    mark(g, PART_EMBEDDING, PASS_BACKWARD, 0, activation_bytes(2.0 * N * C));
    g->micros++;
}

// Norms, guards, clipping, update; then the wait for all of the step.
static void gpt_step_end(GPT* g, const StepHyper* hyper, StepStats* stats) {
    const size_t num_tensors = (size_t)g->table.num_tensors;
    const double P = (double)g->table.num_params;
    StepReport* r = g->report;
    r->hyper = *hyper;
    if (g->micros == 0) { cuda_check(cudaMemsetAsync(g->grads, 0, g->table.num_params * sizeof(float), g->stream)); }
    cuda_check(cudaMemcpyAsync(g->hyper, &r->hyper, sizeof r->hyper, cudaMemcpyHostToDevice, g->stream));
    global_norm(g->norms, g->norm_scratch, g->grads, &g->pieces, g->stream);
    step_decide(g->decision, g->norms, g->loss_sum, g->hyper, g->table.num_tensors, g->stream);
    mark(g, PART_NORMS, PASS_FORWARD, 0, 4 * P);
    adamw(g->master, sizeof(floatX) == sizeof(float) ? NULL : g->weights, g->m, g->v, g->grads, g->decision, g->hyper,
          &g->pieces, g->stream);
    mark(g, PART_UPDATE, PASS_FORWARD, 0, (sizeof(floatX) == sizeof(float) ? 28 : 30) * P);
    cuda_check(cudaMemcpyAsync(&r->decision, g->decision, sizeof r->decision, cudaMemcpyDeviceToHost, g->stream));
    cuda_check(
        cudaMemcpyAsync(r->norms, g->norms, 2 * num_tensors * sizeof(double), cudaMemcpyDeviceToHost, g->stream));
    cuda_check(cudaStreamSynchronize(g->stream));
    profile_step_end(&g->profile, g->stream);
    memcpy(stats->sq_sum, r->norms, num_tensors * sizeof(double));
    memcpy(stats->sum_sq, r->norms + num_tensors, num_tensors * sizeof(double));
    stats->n = hyper->n;
    stats->gns = g->gns;
    stats->loss = r->decision.loss;
    stats->grad_norm = r->decision.grad_norm;
    stats->outcome = r->decision.outcome;
    g->micros = 0;
}

// The loss of every token, without gradients. losses (B, T)
static void gpt_eval(GPT* g, const int* tokens, const int* targets, int B, int T, float* losses) {
    const int V = g->config.vocab_size, Vp = g->config.padded_vocab_size, step = head_examples(g, B, T);
    send_tokens(g, tokens, targets, B, T);
    gpt_forward(g, B, T);
    for (int b0 = 0; b0 < B; b0 += step) {
        const int N = min_int(step, B - b0) * T;
        const size_t at = (size_t)b0 * (size_t)T;
        head_logits(g, g->lnf + at * (size_t)g->config.channels, N);
        classifier_forward(g->losses + at, g->logits, g->targets + at, N, V, Vp, g->stream);
    }
    const size_t bytes = (size_t)B * (size_t)T * sizeof(float);
    cuda_check(cudaMemcpyAsync(losses, g->losses, bytes, cudaMemcpyDeviceToHost, g->stream));
    cuda_check(cudaStreamSynchronize(g->stream));
    profile_interrupt(&g->profile);
}

// The logits after the last of T tokens. logits (V)
static void gpt_logits(GPT* g, const int* tokens, int T, float* logits) {
    // Samples grow by a token at a time: lengths are rounded up, since every new shape has its algorithms chosen first.
    // What is behind the last token changes nothing before it.
    const int V = g->config.vocab_size, length = min_int(div_up(T, 64) * 64, g->max_T);
    int* padded = (int*)alloc_zeroed((size_t)length, sizeof(int), "a sample's tokens");
    floatX* values = (floatX*)alloc_zeroed((size_t)V, sizeof(floatX), "a sample's logits");
    memcpy(padded, tokens, (size_t)T * sizeof(int));
    send_tokens(g, padded, NULL, 1, length);
    gpt_forward(g, 1, length);
    head_logits(g, g->lnf + (size_t)(T - 1) * (size_t)g->config.channels, 1);
    cuda_check(cudaMemcpyAsync(values, g->logits, (size_t)V * sizeof(floatX), cudaMemcpyDeviceToHost, g->stream));
    cuda_check(cudaStreamSynchronize(g->stream));
    for (int v = 0; v < V; v++) { logits[v] = (float)values[v]; }
    profile_interrupt(&g->profile);
    free(padded);
    free(values);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The backend

static __global__ void round_kernel(floatX* out, const float* inp, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = (floatX)inp[i]; }
}

static float* device_tensor(const GPT* g, int row, int layer, int what) {
    float* base[] = {g->master, g->grads, g->m, g->v}; // in the order of TENSOR_*
    return base[what] + param_offset(&g->table, row, layer);
}
static void cuda_get(void* self, int row, int layer, int what, float* values) {
    GPT* g = (GPT*)self;
    const size_t bytes = g->table.row[row].size * sizeof(float);
    cuda_check(cudaMemcpyAsync(values, device_tensor(g, row, layer, what), bytes, cudaMemcpyDeviceToHost, g->stream));
    cuda_check(cudaStreamSynchronize(g->stream));
    profile_interrupt(&g->profile);
}
static void cuda_set(void* self, int row, int layer, int what, const float* values) {
    GPT* g = (GPT*)self;
    const size_t n = g->table.row[row].size, at = param_offset(&g->table, row, layer);
    float* to = device_tensor(g, row, layer, what);
    cuda_check(cudaMemcpyAsync(to, values, n * sizeof(float), cudaMemcpyHostToDevice, g->stream));
    if (what == TENSOR_WEIGHT && g->weights != (floatX*)g->master) {
        round_kernel<<<(unsigned)div_up(n, (size_t)256), 256, 0, g->stream>>>(g->weights + at, to, n);
        cuda_check_launch();
    }
    cuda_check(cudaStreamSynchronize(g->stream));
    profile_interrupt(&g->profile);
}

static void cuda_step_begin(void* self, int gns) { gpt_step_begin((GPT*)self, gns); }
static void cuda_micro(void* self, const int* tokens, const int* targets, int B, int T) {
    gpt_micro((GPT*)self, tokens, targets, B, T);
}
static void cuda_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    gpt_step_end((GPT*)self, hyper, stats);
}
static void cuda_eval(void* self, const int* tokens, const int* targets, int B, int T, float* losses) {
    gpt_eval((GPT*)self, tokens, targets, B, T, losses);
}
static void cuda_logits(void* self, const int* tokens, int T, float* logits) {
    gpt_logits((GPT*)self, tokens, T, logits);
}

// Weights and moments are the whole state of this backend, so that either trainer goes on from the other's checkpoint.
static size_t cuda_state_size(void* self) { return (void)self, 0; }
static void cuda_state_get(void* self, void* blob) { (void)self, (void)blob; }
static void cuda_state_set(void* self, const void* blob) { (void)self, (void)blob; }

static void cuda_close(void* self) {
    GPT* g = (GPT*)self;
    profile_close(&g->profile);
    matmul_close(&g->mm);
    for (void* memory : g->memory) { cuda_check(cudaFree(memory)); }
    cuda_check(cudaFree(g->gns_memory));
    for (int i = 0; i < g->num_slots; i++) { cuda_check(cudaFreeHost(g->slot[i])); }
    cuda_check(cudaFreeHost(g->report->norms));
    cuda_check(cudaFreeHost(g->report));
    cuda_check(cudaStreamDestroy(g->stream));
    free(g->slot);
    free(g->block);
    free(g);
}

// The GPU, if this program can use it.
static cudaDeviceProp open_device(void) {
    int count = 0;
    cudaDeviceProp p;
    cudaFuncAttributes unused;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        fatal("no GPU can be used: %s; see what nvidia-smi says, or train on the CPU (make train_gpt)",
              error != cudaSuccess ? cudaGetErrorString(error) : "none was found");
    }
    cuda_check(cudaSetDevice(0));
    cuda_check(cudaGetDeviceProperties(&p, 0));
    if (p.major < 8) {
        fatal("the CUDA trainer needs a GPU of compute capability 8.0 or later; %s has %d.%d", p.name, p.major,
              p.minor);
    }
    const cudaError_t loaded = cudaFuncGetAttributes(&unused, round_kernel);
    if (loaded == cudaErrorNoKernelImageForDevice) {
        fatal("this program was not built for the GPU here, %s of compute capability %d.%d; build it with make "
              "train_gptcu GPU_ARCH=sm_%d%d%s",
              p.name, p.major, p.minor, p.major, p.minor, p.major == 9 && p.minor == 0 ? "a" : "");
    }
    cuda_check(loaded);
    return p;
}

// What no kernel can do is said before anything is allocated.
static void check_config(const GPTConfig* c, const BackendOptions* options) {
    const int HS = c->channels / c->num_heads;
    if (HS % 16 != 0 || HS > 128) {
        fatal("the CUDA trainer needs heads of 16, 32, 48, ... or 128 channels, not of %d (%d channels in %d heads); "
              "choose "
              "another number of heads",
              HS, c->channels, c->num_heads);
    }
    if (c->channels > LAYERNORM_MAX_CHANNELS) {
        fatal("the CUDA trainer takes models of up to %d channels, not %d", (int)LAYERNORM_MAX_CHANNELS, c->channels);
    }
    if (sizeof(floatX) == 2 && !(c->attn_mult > 0)) {
        fatal("the CUDA trainer in bf16 needs a multiplier of the attention's scores above 0, not %g; build it with "
              "PRECISION=FP32",
              (double)c->attn_mult);
    }
    if (c->padded_vocab_size % 8 != 0) {
        fatal("the CUDA trainer needs a vocabulary padded to a multiple of 8, not to %d rows; pad the model file's wte",
              c->padded_vocab_size);
    }
    if (options->tf32 && sizeof(floatX) != sizeof(float)) {
        fatal("--tf32 is an option of the fp32 build (make train_gptcu PRECISION=FP32); this build computes in bf16");
    }
    if (options->max_B > 65535) { fatal("the CUDA trainer takes micro-batches (-b) of up to 65535 examples"); }
    if ((int64_t)options->max_B * options->max_T > 1 << 28) {
        fatal("a micro-batch of %d x %d tokens is too large; the CUDA trainer takes up to %d (-b x -t)", options->max_B,
              options->max_T, 1 << 28);
    }
}

static __global__ void noise_kernel(floatX* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] = (floatX)((float)((unsigned)i * 2654435761u >> 8) * 0x1p-23f - 1.0f); }
}

static double seconds_between(cudaEvent_t start, cudaEvent_t stop) {
    float ms;
    cuda_check(cudaEventSynchronize(stop));
    cuda_check(cudaEventElapsedTime(&ms, start, stop));
    return 1e-3 * (double)ms;
}

// Operations a second of large products and bytes a second of a large copy: the ceilings for MFU and --profile. A GPU at
// work lowers its clock until its power fits, within some hundredths of a second: what counts is the last of several rounds.
static void measure_peaks(GPT* g) {
    enum { SIZE = sizeof(floatX) == 2 ? 8192 : 4096, ROUNDS = 8, PRODUCTS = 16 };
    const size_t n = (size_t)SIZE * SIZE, copied = 2 * n * sizeof(floatX);
    floatX* x = (floatX*)device_alloc(4 * n * sizeof(floatX), "the measurement of the GPU's speed");
    noise_kernel<<<(unsigned)(4 * n / 256), 256, 0, g->stream>>>(x, 4 * n);
    cuda_check_launch();
    matmul_forward(&g->mm, x + 2 * n, NULL, x, x + n, NULL, 1, SIZE, SIZE, SIZE,
                   g->stream); // chooses the algorithm
    for (int round = 0; round < ROUNDS; round++) {
        cuda_check(cudaEventRecord(g->mm.start, g->stream));
        cuda_check(cudaMemcpyAsync(x, x + 2 * n, copied, cudaMemcpyDeviceToDevice, g->stream));
        cuda_check(cudaEventRecord(g->mm.stop, g->stream));
        g->bandwidth = 2.0 * (double)copied / seconds_between(g->mm.start, g->mm.stop);
        cuda_check(cudaEventRecord(g->mm.start, g->stream));
        for (int i = 0; i < PRODUCTS; i++) {
            matmul_forward(&g->mm, x + 2 * n, NULL, x, x + n, NULL, 1, SIZE, SIZE, SIZE, g->stream);
        }
        cuda_check(cudaEventRecord(g->mm.stop, g->stream));
        g->peak_flops = PRODUCTS * 2.0 * SIZE * (double)n / seconds_between(g->mm.start, g->mm.stop);
    }
    cuda_check(cudaFree(x));
}

static GPT* gpt_create(const GPTConfig* config, const BackendOptions* options) {
    static const char* const names[NUM_MEMS] = {"weights", "gradients", "Adam moments", "activations", "scratch"};
    GPT* g = (GPT*)alloc_zeroed(1, sizeof(GPT), "the model");
    cuda_check(cudaStreamCreate(&g->stream));
    matmul_open(&g->mm, options->tf32);
    measure_peaks(g); // before the memory is taken
    g->config = *config;
    g->table = param_table(config);
    g->pieces = piece_table(&g->table);
    g->max_B = options->max_B;
    g->max_T = options->max_T;
    g->max_N = (size_t)g->max_B * (size_t)g->max_T;
    g->recompute = options->recompute == RECOMPUTE_AUTO ? RECOMPUTE_NOTHING : options->recompute;
    g->fuse_gelu = MATMUL_GELU && config->gelu == GELU_TANH;
    const size_t most = LOGITS_BYTES / ((size_t)config->padded_vocab_size * sizeof(floatX));
    g->logits_rows = std::max(std::min(most, g->max_N), (size_t)g->max_T);
    g->block =
        (BlockActivations*)alloc_zeroed((size_t)config->num_layers, sizeof(BlockActivations), "the list of blocks");
    cuda_check(cudaMallocHost((void**)&g->report, sizeof(StepReport)));
    cuda_check(cudaMallocHost((void**)&g->report->norms, 2 * (size_t)g->table.num_tensors * sizeof(double)));
    Arena arena[NUM_MEMS] = {};
    gpt_layout(g, arena);
    for (int i = 0; i < NUM_MEMS; i++) {
        g->bytes[i] = arena[i].used;
        g->memory[i] = device_alloc(g->bytes[i], names[i]);
        arena[i].base = (char*)g->memory[i];
        arena[i].used = 0;
        if (i <= MEM_MOMENTS) { cuda_check(cudaMemsetAsync(g->memory[i], 0, g->bytes[i], g->stream)); }
    }
    gpt_layout(g, arena);
    printf("memory      ");
    for (int i = 0; i < NUM_MEMS; i++) {
        printf("%s%s %.1f MiB", i > 0 ? ", " : "", names[i], (double)g->bytes[i] / (1 << 20));
    }
    printf("\n");
    if (options->gns_all) { gpt_reserve_gns_all(g); }
    return g;
}

static void cuda_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    check_config(config, options);
    const cudaDeviceProp p = open_device();
    GPT* g = gpt_create(config, options);
    if (options->profile) { profile_open(&g->profile, g->peak_flops, g->bandwidth); }
    snprintf(g->device, sizeof g->device, "%.64s, %d multiprocessors, %.1f GiB, %s", p.name, p.multiProcessorCount,
             (double)p.totalGlobalMem / (1 << 30),
             sizeof(floatX) == 2 ? "bf16" : (options->tf32 ? "fp32, products in TF32" : "fp32"));
    Backend b = {};
    b.self = g;
    b.device = g->device;
    b.peak_flops = g->peak_flops;
    b.rank = 0;
    b.num_ranks = 1;
    b.step_begin = cuda_step_begin;
    b.micro = cuda_micro;
    b.step_end = cuda_step_end;
    b.eval = cuda_eval;
    b.logits = cuda_logits;
    b.get = cuda_get;
    b.set = cuda_set;
    b.state_size = cuda_state_size;
    b.state_get = cuda_state_get;
    b.state_set = cuda_state_set;
    b.close = cuda_close;
    *backend = b;
}

#ifndef TRAIN_GPT_NO_MAIN
int main(int argc, char** argv) { return train_main(argc, argv, cuda_open); }
#endif
