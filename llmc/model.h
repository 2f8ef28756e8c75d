/*
The contract between the training loop and a model: what the model is (GPTConfig), what its tensors are (the parameter
table), and what a backend can do (Backend, StepStats). Nobody else lists tensors: initialisation, optimizer, checkpoints,
GNS logging and export all walk the table.
*/
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include "check.h"
#include "rand.h"

// ---------------------------------------------------------------------------------------------------------------------
// What the model is

enum { GELU_TANH = 0, GELU_ERF = 1 };
enum { INIT_NORMAL = 0, INIT_TRUNCATED = 1 };
enum { MAX_COSINE_BLOCKS = 128 };

// A GPT-2: pre-LayerNorm blocks, learned positions, biases everywhere, output head tied to the token embedding.
typedef struct {
    int max_seq_len;       // maxT: rows of the position embedding
    int vocab_size;        // V: the tokens that exist
    int padded_vocab_size; // Vp: V rounded up to 128; the rows past V are zero and take no part in the softmax
    int num_layers;        // L
    int num_heads;         // NH
    int channels;          // C, a multiple of NH
    int gelu;              // GELU_TANH (GPT-2's) or GELU_ERF
    uint32_t cosine_blocks[MAX_COSINE_BLOCKS / 32]; // bit l: block l L2-normalises q and k per head
    // Multipliers of the forward pass, 1 in GPT-2.
    float embed_mult;    // of the sum of token and position embedding
    float residual_mult; // of what each attention and MLP branch adds to the residual stream
    float attn_mult;     // of q.k / sqrt(head size)
    float logit_mult;    // of the logits
    int init;            // INIT_NORMAL, or INIT_TRUNCATED: wte, wpe, c_attn and c_fc cut at two standard deviations
} GPTConfig;

static inline bool config_is_cosine(const GPTConfig* c, int layer) {
    return layer < MAX_COSINE_BLOCKS && (c->cosine_blocks[layer / 32] >> (layer % 32) & 1);
}

static inline int padded_vocab(int vocab_size) { return (vocab_size + 127) / 128 * 128; }

// A GPT-2 of this shape.
static inline GPTConfig config_of_shape(int L, int NH, int C, int max_T, int V) {
    GPTConfig c;
    memset(&c, 0, sizeof c);
    c.num_layers = L;
    c.num_heads = NH;
    c.channels = C;
    c.max_seq_len = max_T;
    c.vocab_size = V;
    c.padded_vocab_size = V > 0 ? padded_vocab(V) : 0;
    c.embed_mult = c.residual_mult = c.attn_mult = c.logit_mult = 1;
    return c;
}

// The number that stands at the start of *text, digits alone, at most 2^20; moves *text behind it. -1 if there is none.
static inline int read_size(const char** text) {
    int64_t value = -1;
    for (; **text >= '0' && **text <= '9' && value <= 1 << 20; (*text)++) {
        value = (value < 0 ? 0 : value * 10) + (**text - '0');
    }
    return value <= 1 << 20 ? (int)value : -1;
}

// L=10,H=12,C=768[,T=1024][,V=50257], in any order, each at most once; false if the text is something else.
static inline bool config_from_shape(const char* text, GPTConfig* c) {
    static const char keys[] = "LHCTV";
    int size[5] = {0, 0, 0, 1024, 0};
    bool given[5] = {false, false, false, false, false};
    for (;;) {
        const char* key = *text != '\0' ? strchr(keys, *text) : NULL;
        if (key == NULL || text[1] != '=' || given[key - keys]) { return false; }
        text += 2;
        given[key - keys] = true;
        size[key - keys] = read_size(&text);
        if (size[key - keys] < 1 || (*text != ',' && *text != '\0')) { return false; }
        if (*text++ == '\0') { break; }
    }
    *c = config_of_shape(size[0], size[1], size[2], size[3], size[4]);
    return given[0] && given[1] && given[2];
}

// Fills in *c from a model's name; false if there is no such name. vocab_size is 0 where the name leaves it open.
//   d6 d12 d24 d36 d48 (also gpt2:d12): GPT-2's family, T 1024, V 50257    gpt3:c768 ...: GPT-3's widths, T 2048
//   cgpt:111m: Cerebras-GPT 111M as in arXiv 2411.00999: 10 layers, erf GELU, V 50304, truncated initialisation, T 2048
//   L=10,H=12,C=768[,T=1024][,V=50257]: any shape; without V, the vocabulary is that of the data
static inline bool config_from_name(const char* name, GPTConfig* c) {
    static const struct {
        const char* name;
        int L, NH, C, T;
    } models[] = {
        {"d6", 6, 6, 384, 1024},
        {"d12", 12, 12, 768, 1024},
        {"d24", 24, 16, 1024, 1024},
        {"d36", 36, 20, 1280, 1024},
        {"d48", 48, 25, 1600, 1024},
        {"gpt3:c384", 6, 6, 384, 2048},
        {"gpt3:c768", 12, 12, 768, 2048},
        {"gpt3:c1024", 24, 16, 1024, 2048},
        {"gpt3:c1536", 24, 16, 1536, 2048},
        {"gpt3:c2048", 24, 16, 2048, 2048},
        {"gpt3:c2560", 32, 32, 2560, 2048},
        {"gpt3:c4096", 32, 32, 4096, 2048},
        {"gpt3:c12288", 96, 96, 12288, 2048},
    };
    const char* gpt2 = strncmp(name, "gpt2:d", 6) == 0 ? name + 5 : name;
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        if (strcmp(gpt2, models[i].name) == 0) {
            *c = config_of_shape(models[i].L, models[i].NH, models[i].C, models[i].T, 50257);
            return true;
        }
    }
    if (strcmp(name, "cgpt:111m") == 0) {
        *c = config_of_shape(10, 12, 768, 2048, 50304);
        c->gelu = GELU_ERF;
        c->init = INIT_TRUNCATED;
        return true;
    }
    return config_from_shape(name, c);
}

// NULL if the trainers can run this model, else what is wrong with it (also for headers of files).
static inline const char* config_error(const GPTConfig* c) {
    if (c->num_layers < 1 || c->num_layers > 1024) { return "the number of layers must be 1 to 1024"; }
    if (c->channels < 1 || c->channels > 65536) { return "the number of channels must be 1 to 65536"; }
    if (c->num_heads < 1 || c->channels % c->num_heads != 0) { return "the heads must divide the channels evenly"; }
    if (c->max_seq_len < 1 || c->max_seq_len > (1 << 20)) { return "the sequence length must be 1 to 1048576"; }
    if (c->vocab_size < 1 || c->vocab_size > 65536) { return "the vocabulary must have 1 to 65536 tokens"; }
    if (c->padded_vocab_size < c->vocab_size || c->padded_vocab_size > 65536 + 128) {
        return "the padded vocabulary must hold the vocabulary and at most 65664 rows";
    }
    if (c->gelu != GELU_TANH && c->gelu != GELU_ERF) { return "the GELU must be 0 (tanh) or 1 (erf)"; }
    for (int l = c->num_layers; l < MAX_COSINE_BLOCKS; l++) {
        if (config_is_cosine(c, l)) { return "a block chosen for cosine attention does not exist"; }
    }
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// The parameter table

// One row for each kind of tensor, in the order of the model file.
enum {
    WTE,
    WPE,
    LN1W,
    LN1B,
    QKVW,
    QKVB,
    ATTPROJW,
    ATTPROJB,
    LN2W,
    LN2B,
    FCW,
    FCB,
    FCPROJW,
    FCPROJB,
    LNFW,
    LNFB,
    NUM_ROWS
};

// What a tensor counts towards in the noise scale.
enum { GROUP_LN, GROUP_ATTENTION, GROUP_MLP, GROUP_WPE, GROUP_WTE, NUM_PARAM_GROUPS };

typedef struct {
    const char* name; // as the ecosystem spells it; %d is the layer
    bool per_layer;   // one tensor for each layer, or one
    int rows, cols;   // shape of one tensor, row-major; vectors have cols 1
    int used_rows;    // rows that are drawn and trained; the rest (vocabulary padding) stay zero
    float init_std;   // 0: constant
    float init_const;
    bool init_truncatable; // drawn truncated at two standard deviations under INIT_TRUNCATED
    bool weight_decay;
    int group;
    float lr_mult, wd_mult, eps_mult; // of the learning rate, the weight decay and Adam's epsilon
    // Derived: where the row lies in the flat array that the model file, the weights, gradients and moments share.
    int count;     // tensors in the row: num_layers or 1
    int first;     // index of the row's first tensor among all tensors
    size_t size;   // numbers in one tensor
    size_t offset; // of the row's first tensor
} ParamRow;

typedef struct {
    ParamRow row[NUM_ROWS];
    int num_tensors;
    size_t num_params; // numbers in all tensors
} ParamTable;

static inline ParamTable param_table(const GPTConfig* config) {
    const int C = config->channels, L = config->num_layers, V = config->vocab_size, Vp = config->padded_vocab_size;
    const int maxT = config->max_seq_len;
    const float s = 0.02f, residual = 0.02f / sqrtf(2.0f * (float)L);
    // name, per layer, rows, cols, used rows, init std, const, truncatable, decay, group, multipliers, derived
    const ParamRow rows[NUM_ROWS] = {
        {"transformer.wte.weight", false, Vp, C, V, s, 0, true, true, GROUP_WTE, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.wpe.weight", false, maxT, C, maxT, s, 0, true, true, GROUP_WPE, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.ln_1.weight", true, C, 1, C, 0, 1, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.ln_1.bias", true, C, 1, C, 0, 0, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.attn.c_attn.qkv.weight", true, 3 * C, C, 3 * C, s, 0, true, true, GROUP_ATTENTION, 1, 1, 1,
         0, 0, 0, 0},
        {"transformer.h.%d.attn.c_attn.qkv.bias", true, 3 * C, 1, 3 * C, 0, 0, false, false, GROUP_ATTENTION, 1, 1, 1,
         0, 0, 0, 0},
        {"transformer.h.%d.attn.c_proj.weight", true, C, C, C, residual, 0, false, true, GROUP_ATTENTION, 1, 1, 1, 0, 0,
         0, 0},
        {"transformer.h.%d.attn.c_proj.bias", true, C, 1, C, 0, 0, false, false, GROUP_ATTENTION, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.ln_2.weight", true, C, 1, C, 0, 1, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.ln_2.bias", true, C, 1, C, 0, 0, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.mlp.c_fc.weight", true, 4 * C, C, 4 * C, s, 0, true, true, GROUP_MLP, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.mlp.c_fc.bias", true, 4 * C, 1, 4 * C, 0, 0, false, false, GROUP_MLP, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.h.%d.mlp.c_proj.weight", true, C, 4 * C, C, residual, 0, false, true, GROUP_MLP, 1, 1, 1, 0, 0, 0,
         0},
        {"transformer.h.%d.mlp.c_proj.bias", true, C, 1, C, 0, 0, false, false, GROUP_MLP, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.ln_f.weight", false, C, 1, C, 0, 1, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
        {"transformer.ln_f.bias", false, C, 1, C, 0, 0, false, false, GROUP_LN, 1, 1, 1, 0, 0, 0, 0},
    };
    ParamTable t;
    t.num_tensors = 0;
    t.num_params = 0;
    for (int i = 0; i < NUM_ROWS; i++) {
        ParamRow* r = &t.row[i];
        *r = rows[i];
        r->count = r->per_layer ? L : 1;
        r->first = t.num_tensors;
        r->size = (size_t)r->rows * (size_t)r->cols;
        r->offset = t.num_params;
        t.num_tensors += r->count;
        t.num_params += r->size * (size_t)r->count;
    }
    return t;
}

// The number of weights as the literature counts them: without the rows that pad the vocabulary.
static inline size_t param_count(const ParamTable* t) {
    size_t padding = (size_t)(t->row[WTE].rows - t->row[WTE].used_rows) * (size_t)t->row[WTE].cols;
    return t->num_params - padding;
}

// Where a tensor lies in the flat array.
static inline size_t param_offset(const ParamTable* t, int row, int layer) {
    return t->row[row].offset + t->row[row].size * (size_t)layer;
}

// The index of a tensor among all tensors: StepStats' arrays are in this order.
static inline int tensor_index(const ParamTable* t, int row, int layer) { return t->row[row].first + layer; }

// Row and layer of the tensor with this index.
static inline void tensor_at(const ParamTable* t, int index, int* row, int* layer) {
    int r = 0;
    while (index >= t->row[r].first + t->row[r].count) { r++; }
    *row = r;
    *layer = index - t->row[r].first;
}

// The tensor's name, written into name.
static inline const char* tensor_name(const ParamTable* t, int row, int layer, char* name, size_t size) {
    const char *pattern = t->row[row].name, *hole = strstr(pattern, "%d");
    if (hole == NULL) {
        snprintf(name, size, "%s", pattern);
    } else {
        snprintf(name, size, "%.*s%d%s", (int)(hole - pattern), pattern, layer, hole + 2);
    }
    return name;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a backend can do

// Which per-example norms a step measures.
enum { GNS_OFF, GNS_LN, GNS_ALL };

// Does a step that measures `gns` measure the tensors of this group (GROUP_*, or a union of groups from gns.h)?
static inline bool gns_measures(int gns, int group) { return gns == GNS_ALL || (gns == GNS_LN && group == GROUP_LN); }

// Everything the update needs to know; reaches a device as one struct in memory.
typedef struct {
    int64_t step; // counted from 1: Adam's bias correction
    int n;        // examples in the step, over all ranks
    float lr, beta1, beta2, eps, weight_decay;
    float grad_clip; // largest norm of the mean gradient; 0: no clipping
    // The update is not applied where the step's loss or gradient norm exceeds these (INFINITY: no limit), nor where either
    // is not finite.
    float loss_limit, grad_norm_limit;
} StepHyper;

enum { STEP_APPLIED, STEP_SKIPPED_NONFINITE, STEP_SKIPPED_LOSS, STEP_SKIPPED_GRAD };

// What a step found; global over ranks. The backend fills everything in but the pointers, which are the caller's.
typedef struct {
    int n;            // examples in the step
    int gns;          // what was measured: GNS_OFF, GNS_LN (tensors of GROUP_LN), GNS_ALL
    int outcome;      // STEP_APPLIED or why not
    double loss;      // mean over the examples of each example's mean loss
    double grad_norm; // |mean_b g_b| over all tensors, before clipping
    double* sq_sum;   // (num_tensors) |sum_b g_b|^2, before clipping
    double* sum_sq;   // (num_tensors) sum_b |g_b|^2; 0 for tensors that were not measured
} StepStats;

enum { TENSOR_WEIGHT, TENSOR_GRAD, TENSOR_M, TENSOR_V };

// A model on some device. The loop calls, for each step, step_begin, then micro as often as it needs (also not at all: a
// rank's share may be empty), then step_end. Gradients are plain sums over examples of each example's mean-loss gradient;
// 1/n is applied in norms and update only. The same calls with the same arguments give the same bits.
typedef struct {
    void* self;         // passed to every function
    const char* device; // one line for people: "CPU, 2 threads, AVX-512"
    double peak_flops;  // measured at start-up, floating-point operations a second over all of this rank; 0: unknown
    int rank, num_ranks;

    // Zero gradients and per-example sums; gns says what the step is to measure.
    void (*step_begin)(void* self, int gns);
    // Forward and backward of B <= Bmax examples of T <= maxT tokens: adds to gradients and per-example sums.
    void (*micro)(void* self, const int* tokens, const int* targets, int B, int T); // (B, T) each
    // Norms, guards, clipping, update, over all ranks. The only place where the host waits for the device in a step.
    void (*step_end)(void* self, const StepHyper* hyper, StepStats* stats);
    // Loss of every token into losses; where the target is -1, 0.
    void (*eval)(void* self, const int* tokens, const int* targets, int B, int T, float* losses); // (B, T) each
    // Logits after the last of T tokens.
    void (*logits)(void* self, const int* tokens, int T, float* logits); // (T), (V)
    // One tensor to or from the host, collective over ranks; what is TENSOR_*. TENSOR_GRAD is valid after step_end.
    void (*get)(void* self, int row, int layer, int what, float* values);
    void (*set)(void* self, int row, int layer, int what, const float* values);
    // Whatever else must be saved to resume exactly; state_size may be 0.
    size_t (*state_size)(void* self);
    void (*state_get)(void* self, void* blob);
    void (*state_set)(void* self, const void* blob);
    void (*close)(void* self);
} Backend;

// What the backward pass computes again instead of keeping it: nothing, the output of GELU, that of the LayerNorms as well.
enum { RECOMPUTE_AUTO = -1, RECOMPUTE_NOTHING, RECOMPUTE_GELU, RECOMPUTE_LAYERNORM };

// How a backend works. Nothing here changes what is computed beyond rounding.
typedef struct {
    int max_B, max_T; // largest micro-batch: examples, tokens in each
    int recompute;    // RECOMPUTE_*
    bool gns_all;     // steps will measure all tensors: take the memory for it at once, not in mid-run
    bool tf32;        // fp32 products on tensor cores, with 10 bits of mantissa
    bool profile;     // measure the time of each part of a step; printed by close()
} BackendOptions;

// What the trainers use unless told otherwise.
static inline BackendOptions backend_options(int max_B, int max_T) {
    BackendOptions o = {max_B, max_T, RECOMPUTE_AUTO, false, false, false};
    return o;
}

// Makes a backend; weights are zero until set(). fatal() where it has not what the options ask for.
typedef void (*BackendOpen)(Backend* backend, const GPTConfig* config, const BackendOptions* options);

// Draws all weights as PyTorch's GPT-2 recipe does: one generator, layer by layer, only the matrices, wte first.
// set receives each tensor once; buffer holds one tensor at a time.
static inline void model_init_weights(const GPTConfig* config, uint32_t seed, const Backend* backend) {
    ParamTable t = param_table(config);
    size_t largest = 0;
    for (int r = 0; r < NUM_ROWS; r++) { largest = t.row[r].size > largest ? t.row[r].size : largest; }
    float* values = (float*)alloc_zeroed(largest, sizeof(float), "one tensor's initial weights");
    Mt19937* rng = (Mt19937*)alloc_zeroed(1, sizeof(Mt19937), "a random number generator");
    mt19937_seed(rng, seed);
    for (int layer = 0; layer < config->num_layers; layer++) {
        for (int r = 0; r < NUM_ROWS; r++) {
            const ParamRow* row = &t.row[r];
            if (layer >= row->count) { continue; }
            size_t used = (size_t)row->used_rows * (size_t)row->cols;
            memset(values, 0, row->size * sizeof(float));
            if (row->init_std == 0) {
                for (size_t i = 0; i < used; i++) { values[i] = row->init_const; }
            } else if (config->init == INIT_TRUNCATED && row->init_truncatable) {
                truncated_normal_fill(rng, values, used, row->init_std, 2);
            } else {
                normal_fill(rng, values, used, 0, row->init_std);
            }
            backend->set(backend->self, r, layer, TENSOR_WEIGHT, values);
        }
    }
    free(rng);
    free(values);
}

#endif
