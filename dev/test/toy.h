/*
A toy backend whose gradients have an exactly known mean G and covariance Sigma, under the contract of llmc/model.h. It
tests the noise-scale tracker, the closed loop and the whole training loop: what the loop must find is known beforehand.

The parameters are those of any GPTConfig's table (take a tiny one: toy_config()). Example number i of a step has

    g = G + sigma xi,    xi: independent, mean 0, variance 1, a hash of (seed, step, i, the example's tokens, targets)

as its gradient, whatever the micro-batches and the weights. xi is uniform over 2^16 equally spaced values. G and sigma
are constant within a group of tensors, so that over the whole group |G|^2 = signal[group], tr(Sigma) = noise[group] *
noise_factor and the true GNS is noise[group] / signal[group] * noise_factor. Rows of vocabulary padding stay zero.

The loss falls with the number of steps applied, with a little noise an example and a little dependence on the
weights, so that a resume that forgot anything shows in it. The update is AdamW. The toy also checks its caller: calls
out of order, too large batches, tokens out of range and a wrong n end the program.

To change the settings of a toy under train_main(), wrap toy_open() in a BackendOpen of your own.
*/
#ifndef DEV_TEST_TOY_H
#define DEV_TEST_TOY_H

#include "llmc/model.h"

typedef struct Toy {
    // Settings; toy_open() gives every group signal 1 and noise 8.
    uint64_t seed;
    double signal[NUM_PARAM_GROUPS];               // |G|^2 of a group
    double noise[NUM_PARAM_GROUPS];                // tr(Sigma) of a group
    double (*noise_factor)(const struct Toy* toy); // of all tr(Sigma), e.g. from toy->tokens; NULL: 1
    int64_t nan_first, nan_last;                   // steps (counted from 1) whose loss and gradients are NaN; 0: none
    int64_t spike_first, spike_last;               // steps whose loss and gradients are 1000 times too large; 0: none
    // State; saved in the blob.
    int64_t step, applied, tokens; // steps begun, steps applied, tokens seen in training before the step at hand
    // The step at hand.
    bool in_step;
    int gns, n, max_B, max_T;
    int64_t step_tokens;
    double loss;
    double* sum_sq; // (num_tensors)
    double* grad;   // (num_params) sum over examples
    float *weight, *m, *v;
    float* gradf; // (num_params) the gradient as the contract hands it out
    GPTConfig config;
    ParamTable table;
    int64_t used_size[NUM_PARAM_GROUPS]; // numbers in a group, without padding
} Toy;

enum { TOY_L = 1, TOY_HEADS = 1, TOY_C = 4, TOY_T = 8, TOY_V = 16 };

static inline GPTConfig toy_config(void) { return config_of_shape(TOY_L, TOY_HEADS, TOY_C, TOY_T, TOY_V); }

// The true noise scale of the tensors of the groups whose bit is set in groups (1 << GROUP_LN, ...; -1: all).
static inline double toy_gns(const Toy* toy, int groups) {
    double signal = 0, noise = 0, factor = toy->noise_factor != NULL ? toy->noise_factor(toy) : 1;
    for (int g = 0; g < NUM_PARAM_GROUPS; g++) {
        if (groups >> g & 1) {
            signal += toy->signal[g];
            noise += toy->noise[g] * factor;
        }
    }
    return noise / signal;
}

static inline void toy_step_begin(void* self, int gns) {
    Toy* toy = (Toy*)self;
    if (toy->in_step) { fatal("toy: step_begin before the last step's step_end"); }
    toy->in_step = true;
    toy->gns = gns;
    toy->n = 0;
    toy->loss = 0;
    toy->step_tokens = 0;
    toy->step++;
    memset(toy->grad, 0, toy->table.num_params * sizeof(double));
    memset(toy->sum_sq, 0, (size_t)toy->table.num_tensors * sizeof(double));
}

static inline double toy_base_loss(const Toy* toy) {
    return 1 + 4 / (1 + (double)toy->applied / 50) + 0.01 * tanh((double)toy->weight[0] * 100);
}

// Four independent numbers of mean 0 and variance 1 from one hash.
static inline void toy_noise(uint64_t* rng, double xi[4]) {
    uint64_t bits = splitmix64(rng);
    const double scale = sqrt(12 / (65536.0 * 65536.0 - 1)); // the variance of 0..65535 is (65536^2 - 1) / 12
    for (int i = 0; i < 4; i++) { xi[i] = ((double)(bits >> (16 * i) & 0xffff) - 32767.5) * scale; }
}

static inline void toy_example(Toy* toy, uint64_t key) {
    const double factor = toy->noise_factor != NULL ? toy->noise_factor(toy) : 1;
    const bool nan = toy->step >= toy->nan_first && toy->step <= toy->nan_last;
    const bool spike = toy->step >= toy->spike_first && toy->step <= toy->spike_last;
    const double blow_up = nan ? NAN : spike ? 1000 : 1;
    double xi[4];
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &toy->table.row[r];
        const double count = (double)toy->used_size[row->group];
        const double mean = sqrt(toy->signal[row->group] / count);
        const double sigma = sqrt(toy->noise[row->group] * factor / count);
        const size_t used = (size_t)row->used_rows * (size_t)row->cols;
        const bool measured = toy->gns == GNS_ALL || (toy->gns == GNS_LN && row->group == GROUP_LN);
        for (int layer = 0; layer < row->count; layer++) {
            double* grad = toy->grad + param_offset(&toy->table, r, layer);
            double norm = 0;
            for (size_t i = 0; i < used; i++) {
                if (i % 4 == 0) { toy_noise(&key, xi); }
                double g = (mean + sigma * xi[i % 4]) * blow_up;
                grad[i] += g;
                norm += g * g;
            }
            if (measured) { toy->sum_sq[tensor_index(&toy->table, r, layer)] += norm; }
        }
    }
    toy_noise(&key, xi);
    toy->loss += (toy_base_loss(toy) + 0.01 * xi[0]) * blow_up;
}

static inline void toy_check_batch(const Toy* toy, const int* tokens, const int* targets, int B, int T) {
    if (B < 1 || B > toy->max_B || T < 1 || T > toy->max_T) {
        fatal("toy: a batch of %d x %d, at most %d x %d", B, T, toy->max_B, toy->max_T);
    }
    for (int i = 0; i < B * T; i++) {
        if (tokens[i] < 0 || tokens[i] >= toy->config.vocab_size || targets[i] < -1 ||
            targets[i] >= toy->config.vocab_size) {
            fatal("toy: token %d or target %d is not in the vocabulary", tokens[i], targets[i]);
        }
    }
}

static inline void toy_micro(void* self, const int* tokens, const int* targets, int B, int T) {
    Toy* toy = (Toy*)self;
    toy_check_batch(toy, tokens, targets, B, T);
    if (!toy->in_step) { fatal("toy: micro outside a step"); }
    for (int b = 0; b < B; b++) {
        uint64_t key = hash64(toy->seed ^ hash64((uint64_t)toy->step));
        key = hash64(key + (uint64_t)toy->n);
        for (int t = 0; t < T; t++) {
            key = hash64(key + (uint64_t)tokens[b * T + t] * 65536 + (uint64_t)targets[b * T + t]);
        }
        toy_example(toy, key);
        toy->n++;
    }
    toy->step_tokens += (int64_t)B * T;
}

// AdamW on the mean gradient times clip.
static inline void toy_update(Toy* toy, const StepHyper* h, double clip) {
    const double c1 = 1 - pow(h->beta1, (double)h->step), c2 = 1 - pow(h->beta2, (double)h->step);
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &toy->table.row[r];
        const double lr = (double)h->lr * row->lr_mult, eps = (double)h->eps * row->eps_mult;
        const double decay = row->weight_decay ? (double)h->weight_decay * row->wd_mult : 0;
        for (size_t i = row->offset; i < row->offset + row->size * (size_t)row->count; i++) {
            double g = toy->grad[i] / h->n * clip;
            toy->m[i] = (float)(h->beta1 * (double)toy->m[i] + (1 - (double)h->beta1) * g);
            toy->v[i] = (float)(h->beta2 * (double)toy->v[i] + (1 - (double)h->beta2) * g * g);
            double step = toy->m[i] / c1 / (sqrt(toy->v[i] / c2) + eps) + decay * toy->weight[i];
            toy->weight[i] -= (float)(lr * step);
        }
    }
}

static inline void toy_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    Toy* toy = (Toy*)self;
    if (!toy->in_step || hyper->n != toy->n || toy->n < 1) {
        fatal("toy: step_end with n = %d after %d examples", hyper->n, toy->n);
    }
    double norm_sq = 0;
    for (int i = 0; i < toy->table.num_tensors; i++) {
        int r, layer;
        tensor_at(&toy->table, i, &r, &layer);
        const double* grad = toy->grad + param_offset(&toy->table, r, layer);
        stats->sq_sum[i] = 0;
        for (size_t k = 0; k < toy->table.row[r].size; k++) { stats->sq_sum[i] += grad[k] * grad[k]; }
        stats->sum_sq[i] = toy->sum_sq[i];
        norm_sq += stats->sq_sum[i];
    }
    for (size_t i = 0; i < toy->table.num_params; i++) { toy->gradf[i] = (float)toy->grad[i]; }
    stats->n = toy->n;
    stats->gns = toy->gns;
    stats->loss = toy->loss / toy->n;
    stats->grad_norm = sqrt(norm_sq) / toy->n;
    stats->outcome = !isfinite(stats->loss) || !isfinite(stats->grad_norm) ? STEP_SKIPPED_NONFINITE
                     : stats->loss > (double)hyper->loss_limit             ? STEP_SKIPPED_LOSS
                     : stats->grad_norm > (double)hyper->grad_norm_limit   ? STEP_SKIPPED_GRAD
                                                                           : STEP_APPLIED;
    if (stats->outcome == STEP_APPLIED) {
        bool clips = hyper->grad_clip > 0 && stats->grad_norm > (double)hyper->grad_clip;
        toy_update(toy, hyper, clips ? (double)hyper->grad_clip / stats->grad_norm : 1);
        toy->applied++;
    }
    toy->tokens += toy->step_tokens;
    toy->in_step = false;
}

static inline void toy_eval(void* self, const int* tokens, const int* targets, int B, int T, float* losses) {
    Toy* toy = (Toy*)self;
    toy_check_batch(toy, tokens, targets, B, T);
    for (int i = 0; i < B * T; i++) { // harder tokens have larger numbers
        losses[i] = targets[i] < 0 ? 0 : (float)(toy_base_loss(toy) + 0.01 * targets[i]);
    }
}

static inline void toy_logits(void* self, const int* tokens, int T, float* logits) {
    Toy* toy = (Toy*)self;
    for (int v = 0; v < toy->config.vocab_size; v++) { // most likely: the token after the last
        logits[v] = v == (tokens[T - 1] + 1) % toy->config.vocab_size ? 2.0f : 0.0f;
    }
}

static inline float* toy_array(Toy* toy, int row, int layer, int what) {
    float* const arrays[] = {toy->weight, toy->gradf, toy->m, toy->v}; // in the order of TENSOR_*
    return arrays[what] + param_offset(&toy->table, row, layer);
}

static inline void toy_get(void* self, int row, int layer, int what, float* values) {
    Toy* toy = (Toy*)self;
    memcpy(values, toy_array(toy, row, layer, what), toy->table.row[row].size * sizeof(float));
}

static inline void toy_set(void* self, int row, int layer, int what, const float* values) {
    Toy* toy = (Toy*)self;
    memcpy(toy_array(toy, row, layer, what), values, toy->table.row[row].size * sizeof(float));
}

static inline size_t toy_state_size(void* self) {
    const Toy* toy = (const Toy*)self;
    return sizeof toy->step + sizeof toy->applied + sizeof toy->tokens;
}

static inline void toy_state_get(void* self, void* blob) {
    const Toy* toy = (const Toy*)self;
    const int64_t state[3] = {toy->step, toy->applied, toy->tokens};
    memcpy(blob, state, sizeof state);
}

static inline void toy_state_set(void* self, const void* blob) {
    Toy* toy = (Toy*)self;
    int64_t state[3];
    memcpy(state, blob, sizeof state);
    toy->step = state[0];
    toy->applied = state[1];
    toy->tokens = state[2];
}

static inline void toy_close(void* self) {
    Toy* toy = (Toy*)self;
    free(toy->sum_sq);
    free(toy->grad);
    free(toy->weight);
    free(toy->m);
    free(toy->v);
    free(toy->gradf);
    free(toy);
}

// A BackendOpen.
static inline void toy_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    Toy* toy = (Toy*)alloc_zeroed(1, sizeof(Toy), "the toy");
    toy->config = *config;
    toy->table = param_table(config);
    toy->max_B = options->max_B;
    toy->max_T = options->max_T;
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &toy->table.row[r];
        toy->used_size[row->group] += (int64_t)row->used_rows * row->cols * row->count;
    }
    for (int g = 0; g < NUM_PARAM_GROUPS; g++) {
        toy->signal[g] = 1;
        toy->noise[g] = 8;
    }
    const size_t n = toy->table.num_params;
    toy->sum_sq = (double*)alloc_zeroed((size_t)toy->table.num_tensors, sizeof(double), "the toy's sums");
    toy->grad = (double*)alloc_zeroed(n, sizeof(double), "the toy's gradients");
    toy->gradf = (float*)alloc_zeroed(n, sizeof(float), "the toy's gradients");
    toy->weight = (float*)alloc_zeroed(n, sizeof(float), "the toy's weights");
    toy->m = (float*)alloc_zeroed(n, sizeof(float), "the toy's moments");
    toy->v = (float*)alloc_zeroed(n, sizeof(float), "the toy's moments");
    memset(backend, 0, sizeof *backend);
    backend->self = toy;
    backend->device = "toy";
    backend->num_ranks = 1;
    backend->step_begin = toy_step_begin;
    backend->micro = toy_micro;
    backend->step_end = toy_step_end;
    backend->eval = toy_eval;
    backend->logits = toy_logits;
    backend->get = toy_get;
    backend->set = toy_set;
    backend->state_size = toy_state_size;
    backend->state_get = toy_state_get;
    backend->state_set = toy_state_set;
    backend->close = toy_close;
}

// ---------------------------------------------------------------------------------------------------------------------
// Steps without a training loop

// Empty statistics for this model; free with toy_stats_free().
static inline StepStats toy_stats(const ParamTable* table) {
    StepStats stats;
    memset(&stats, 0, sizeof stats);
    stats.sq_sum = (double*)alloc_zeroed((size_t)table->num_tensors, sizeof(double), "the toy's statistics");
    stats.sum_sq = (double*)alloc_zeroed((size_t)table->num_tensors, sizeof(double), "the toy's statistics");
    return stats;
}

static inline void toy_stats_free(StepStats* stats) {
    free(stats->sq_sum);
    free(stats->sum_sq);
}

// One step on n examples, in micro-batches of at most max_B. The examples spell the numbers of the sequences so far.
static inline void toy_run_step(const Backend* backend, int n, int gns, StepStats* stats) {
    Toy* toy = (Toy*)backend->self;
    StepHyper hyper;
    memset(&hyper, 0, sizeof hyper);
    hyper.step = toy->step + 1;
    hyper.n = n;
    hyper.lr = 1e-3f;
    hyper.beta1 = 0.9f;
    hyper.beta2 = 0.95f;
    hyper.eps = 1e-8f;
    hyper.loss_limit = hyper.grad_norm_limit = INFINITY;
    const int T = toy->max_T;
    int* tokens = (int*)alloc_zeroed((size_t)toy->max_B * (size_t)T, sizeof(int), "the toy's tokens");
    backend->step_begin(backend->self, gns);
    for (int done = 0; done < n;) {
        const int B = min_int(toy->max_B, n - done);
        for (int b = 0; b < B; b++) {
            int64_t number = toy->tokens / T + done + b;
            for (int t = 0; t < T; t++, number /= toy->config.vocab_size) {
                tokens[b * T + t] = (int)(number % toy->config.vocab_size);
            }
        }
        backend->micro(backend->self, tokens, tokens, B, T);
        done += B;
    }
    backend->step_end(backend->self, &hyper, stats);
    free(tokens);
}

#endif
