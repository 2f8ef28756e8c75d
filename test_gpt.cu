/*
Whole-model tests of the CUDA trainer beside the CPU trainer, in float and in double. It is built twice, in bf16 and with
-DPRECISION_FP32, and both must pass. Everything goes through the contract of llmc/model.h. From top to bottom:

    1. Helpers       a model on a device, one step of it, two steps compared
    2. Gradients     losses, gradients and per-example norms against the CPU trainer in double, whatever the shape
    3. GNS           per-example norms against one backward pass an example, whatever the micro-batches
    4. Step          the same bits twice, AdamW, guards, padding, get and set
    5. Evaluation    losses and logits
    6. Runs          20 steps beside the CPU trainer; a run that goes on in another model, or in the other trainer

Tolerances are given for both builds, bound(FP32, bf16). Rounding to bf16 errs by up to 2^-9 = 0.2%, in every activation and
in the weights as the products read them; these errors are independent, so sums over many tokens err by less. Where a bound
has no reason of its own beside it, it is of that size, or a few thousand roundings of 2^-24 in FP32.

The tests themselves can be tried without a GPU, one CPU model standing in for the device:
    c++ -x c++ -std=c++17 -DDEVICE_OPEN=cpu_open_float -DPRECISION_FP32 -I. test_gpt.cu ...
*/

#ifndef DEVICE_OPEN
#define TRAIN_GPT_NO_MAIN
#include "train_gpt.cu"
#define DEVICE_OPEN      cuda_open
#define DEVICE_RECOMPUTE RECOMPUTE_NOTHING // the least that it can compute again
#else
#include "llmc/model.h"
#define DEVICE_RECOMPUTE RECOMPUTE_LAYERNORM
#endif
#include "dev/test/test.h"
#include <algorithm>
#include <vector>

// dev/test/cpu_backend.c
extern "C" void cpu_open_float(Backend* backend, const GPTConfig* config, const BackendOptions* options);
extern "C" void cpu_open_double(Backend* backend, const GPTConfig* config, const BackendOptions* options);

// ---------------------------------------------------------------------------------------------------------------------
// 1. Helpers

#ifdef PRECISION_FP32
static double bound(double in_fp32, double) { return in_fp32; }
#else
static double bound(double, double in_bf16) { return in_bf16; }
#endif

static double closest = 0; // the largest error / tolerance of a test
static char closest_what[256];

// error <= tolerance; NaN fails. what (a format) says where.
PRINTF_LIKE(3, 4) static void check_error(double error, double tolerance, const char* what, ...) {
    char where[256];
    va_list args;
    va_start(args, what);
    vsnprintf(where, sizeof where, what, args);
    va_end(args);
    if (!(error <= tolerance)) {
        checks_failed++;
        printf("  failed: %s: error %.3g, allowed %.3g\n", where, error, tolerance);
    }
    if (error > closest * tolerance) {
        closest = error / tolerance;
        memcpy(closest_what, where, sizeof where);
    }
}

// RUN, and how much room its checks had.
#define RUN_AND_SAY(test)                                                                                              \
    do {                                                                                                               \
        closest = 0;                                                                                                   \
        RUN(test);                                                                                                     \
        if (closest > 0) { printf("%s: errors up to %.2g of what is allowed (%s)\n", #test, closest, closest_what); }  \
    } while (0)

typedef std::vector<float> Floats;

typedef struct {
    const char* name;
    int L, NH, C, max_T, V;
    int T;         // of the examples
    int micros[4]; // the examples of each micro-batch of a step, up to a 0
    int gelu;
    uint32_t cosine; // bit l: block l
    bool multipliers;
} Shape;

static int examples_of(const int* micros) {
    int sum = 0;
    for (int i = 0; micros[i] > 0; i++) { sum += micros[i]; }
    return sum;
}

typedef struct {
    ParamTable table;
    Backend backend;
    StepStats stats;                    // of the last step
    std::vector<double> sq_sum, sum_sq; // where stats points
} Model;

// Standard output goes nowhere (true) or back where it was (false): models say how much memory they take.
static void hush(bool on) {
    static int saved = -1;
    fflush(stdout);
    if (on) {
        saved = dup(1);
        if (freopen("/dev/null", "w", stdout) == NULL) { fatal("cannot write to /dev/null"); }
    } else {
        dup2(saved, 1);
        close(saved);
    }
}

// With room for all examples of a step in one micro-batch. Weights are zero.
static Model* model_open(BackendOpen open, const Shape* s, int recompute, bool tf32 = false) {
    Model* m = new Model();
    GPTConfig config = config_of_shape(s->L, s->NH, s->C, s->max_T, s->V);
    config.gelu = s->gelu;
    config.cosine_blocks[0] = s->cosine;
    if (s->multipliers) {
        config.embed_mult = 1.3f;
        config.residual_mult = 0.7f;
        config.attn_mult = 0.8f;
        config.logit_mult = 1.1f;
    }
    BackendOptions options = backend_options(examples_of(s->micros), s->max_T);
    options.recompute = recompute;
    options.tf32 = tf32;
    hush(true);
    open(&m->backend, &config, &options);
    hush(false);
    m->table = param_table(&config);
    m->sq_sum.resize((size_t)m->table.num_tensors);
    m->sum_sq.resize((size_t)m->table.num_tensors);
    m->stats.sq_sum = m->sq_sum.data();
    m->stats.sum_sq = m->sum_sq.data();
    return m;
}

static void model_close(Model* m) {
    m->backend.close(m->backend.self);
    delete m;
}

// All tensors of a kind (TENSOR_*), one after the other as in the parameter table.
static Floats get_all(const Model* m, int what) {
    Floats x(m->table.num_params);
    for (int i = 0; i < m->table.num_tensors; i++) {
        int r, layer;
        tensor_at(&m->table, i, &r, &layer);
        m->backend.get(m->backend.self, r, layer, what, x.data() + param_offset(&m->table, r, layer));
    }
    return x;
}

static void set_all(Model* m, int what, const Floats& x) {
    for (int i = 0; i < m->table.num_tensors; i++) {
        int r, layer;
        tensor_at(&m->table, i, &r, &layer);
        m->backend.set(m->backend.self, r, layer, what, x.data() + param_offset(&m->table, r, layer));
    }
}

static double draw(uint64_t* rng) { return 2 * splitmix64_uniform(rng) - 1; }

// Weights as after some training: the initial ones, the matrices twice as large, so that attention has preferences, and
// LayerNorms and biases random.
static void draw_weights(Model* m, const Shape* s) {
    const GPTConfig config = config_of_shape(s->L, s->NH, s->C, s->max_T, s->V);
    model_init_weights(&config, 42, &m->backend);
    Floats w = get_all(m, TENSOR_WEIGHT);
    uint64_t rng = 12345;
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &m->table.row[r];
        for (size_t i = row->offset; i < row->offset + row->size * (size_t)row->count; i++) {
            w[i] = row->cols == 1 ? w[i] + (float)(0.2 * draw(&rng)) : 2 * w[i];
        }
    }
    set_all(m, TENSOR_WEIGHT, w);
}

static Model* model_open_drawn(BackendOpen open, const Shape* s) {
    Model* m = model_open(open, s, RECOMPUTE_AUTO);
    draw_weights(m, s);
    return m;
}

typedef struct {
    int B, T;
    std::vector<int> tokens, targets; // (B, T) each
} Batch;

// Examples of random tokens, small ones more frequent, so that most examples have several of a kind. The last target of all
// is to be ignored, unless there is no other.
static Batch draw_batch(int B, int T, int V, uint64_t seed) {
    Batch batch;
    batch.B = B;
    batch.T = T;
    for (int b = 0; b < B; b++) {
        int token = 0;
        for (int t = 0; t <= T; t++) {
            const double u = splitmix64_uniform(&seed);
            if (t > 0) { batch.tokens.push_back(token); }
            token = (int)(V * u * u);
            if (t > 0) { batch.targets.push_back(token); }
        }
    }
    if (B * T > 1) { batch.targets.back() = -1; }
    return batch;
}

static Batch batch_of(const Shape* s) { return draw_batch(examples_of(s->micros), s->T, s->V, 7); }

static StepHyper ordinary_step(int n) {
    StepHyper h;
    memset(&h, 0, sizeof h);
    h.step = 1;
    h.n = n;
    h.lr = 0.01f;
    h.beta1 = 0.9f;
    h.beta2 = 0.95f;
    h.eps = 1e-8f;
    h.weight_decay = 0.1f;
    h.loss_limit = h.grad_norm_limit = INFINITY;
    return h;
}

// One step on the examples from `first` on. As in the training loop, each micro-batch lies where the one before lay.
static void step(Model* m, const Batch& batch, int first, const int* micros, int gns, const StepHyper& h) {
    std::vector<int> tokens, targets;
    const auto at = [&batch](const std::vector<int>& x, int example) { return x.begin() + example * batch.T; };
    hush(true); // the first step that measures everything may take more memory
    m->backend.step_begin(m->backend.self, gns);
    hush(false);
    for (int i = 0; micros[i] > 0; i++) {
        tokens.assign(at(batch.tokens, first), at(batch.tokens, first + micros[i]));
        targets.assign(at(batch.targets, first), at(batch.targets, first + micros[i]));
        m->backend.micro(m->backend.self, tokens.data(), targets.data(), micros[i], batch.T);
        first += micros[i];
        std::fill(tokens.begin(), tokens.end(), 0);
        std::fill(targets.begin(), targets.end(), 0);
    }
    m->stats.n = m->stats.gns = m->stats.outcome = -1;
    m->backend.step_end(m->backend.self, &h, &m->stats);
    CHECK(m->stats.n == h.n && m->stats.gns == gns);
}

// What a step finds.
typedef struct {
    double loss, grad_norm;
    std::vector<double> sq_sum, sum_sq;
    Floats gradient; // the sum over the examples
} Found;

// A step that changes nothing: the gradient norm is always above the limit.
static Found measure(Model* m, const Batch& batch, int first, const int* micros, int gns) {
    StepHyper h = ordinary_step(examples_of(micros));
    h.grad_norm_limit = -1;
    step(m, batch, first, micros, gns, h);
    CHECK(m->stats.outcome == STEP_SKIPPED_GRAD);
    return Found{m->stats.loss, m->stats.grad_norm, m->sq_sum, m->sum_sq, get_all(m, TENSOR_GRAD)};
}

// (B, T) losses of the first tokens of B examples, from `first` on.
static Floats losses_of(Model* m, const Batch& batch, int first, int B, int T) {
    std::vector<int> tokens, targets;
    for (int b = first; b < first + B; b++) {
        const auto begin = b * batch.T, end = begin + T;
        tokens.insert(tokens.end(), batch.tokens.begin() + begin, batch.tokens.begin() + end);
        targets.insert(targets.end(), batch.targets.begin() + begin, batch.targets.begin() + end);
    }
    Floats losses(tokens.size(), NAN);
    m->backend.eval(m->backend.self, tokens.data(), targets.data(), B, T, losses.data());
    return losses;
}

// The largest |x_i - y_i|; NaN if there is one.
static double worst_error(const Floats& x, const Floats& y) {
    double worst = x.size() == y.size() ? 0 : NAN;
    for (size_t i = 0; i < x.size() && i < y.size(); i++) {
        const double error = fabs((double)x[i] - (double)y[i]);
        worst = error > worst || isnan(error) ? error : worst;
    }
    return worst;
}

// Bounds of relative errors: of the loss, of a tensor's gradient and its direction (1 - cosine) and length, of a norm
// sum_b |g_b|^2.
typedef struct {
    double loss, gradient, cosine, length, per_example;
} Tolerance;

// ||x - y|| / ||y||; where y is zero, ||x||.
static double relative_error(const float* x, const float* y, size_t n) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        norm += (double)y[i] * (double)y[i];
    }
    return sqrt(norm > 0 ? error / norm : error);
}

static bool same_floats(const Floats& x, const Floats& y) {
    return x.size() == y.size() && memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

static double dot(const float* x, const float* y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) { sum += (double)x[i] * (double)y[i]; }
    return sum;
}

// |x / y - 1|; where y is zero, |x|.
static double relative(double x, double y) { return y != 0 ? fabs(x / y - 1) : fabs(x); }

static void compare(const char* name, const ParamTable* table, const Found& x, const Found& y, const Tolerance& t) {
    check_error(relative(x.loss, y.loss), t.loss, "%s: loss", name);
    check_error(relative(x.grad_norm, y.grad_norm), t.length, "%s: gradient norm", name);
    for (int i = 0; i < table->num_tensors; i++) {
        int r, layer;
        char tensor[128];
        tensor_at(table, i, &r, &layer);
        tensor_name(table, r, layer, tensor, sizeof tensor);
        const size_t n = table->row[r].size, at = param_offset(table, r, layer);
        const float *gx = x.gradient.data() + at, *gy = y.gradient.data() + at;
        const double xx = dot(gx, gx, n), yy = dot(gy, gy, n);
        check_error(relative_error(gx, gy, n), t.gradient, "%s: gradient of %s", name, tensor);
        check_error(yy > 0 ? 1 - dot(gx, gy, n) / sqrt(xx * yy) : 0, t.cosine, "%s: direction of %s", name, tensor);
        check_error(relative(sqrt(xx), sqrt(yy)), t.length, "%s: length of %s", name, tensor);
        check_error(relative(x.sq_sum[(size_t)i], xx), 1e-5, "%s: |g|^2 of %s beside its gradient", name, tensor);
        const double found = x.sum_sq[(size_t)i], expected = y.sum_sq[(size_t)i];
        check_error(relative(found, expected), t.per_example, "%s: sum_b |g_b|^2 of %s", name, tensor);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Gradients

static void check_against_cpu(const Shape* s, const Tolerance& tolerance) {
    Model *device = model_open_drawn(DEVICE_OPEN, s), *cpu = model_open_drawn(cpu_open_double, s);
    const Batch batch = batch_of(s);
    const Found found = measure(device, batch, 0, s->micros, GNS_ALL),
                expected = measure(cpu, batch, 0, s->micros, GNS_ALL);
    compare(s->name, &device->table, found, expected, tolerance);
    model_close(device);
    model_close(cpu);
}

// A relative error of 1e-4 holds for direction and length as well.
static Tolerance against_cpu() {
    return Tolerance{bound(1e-5, 5e-3), bound(1e-4, INFINITY), bound(1e-4, 1e-3), bound(1e-4, 1e-2), bound(1e-4, 2e-2)};
}

// Models wide and batches large enough that bf16's errors are those of training: hundreds of tokens, and channels.
static void test_against_cpu() {
    const Shape shapes[] = {
        {"GPT-2", 4, 2, 128, 128, 1000, 128, {8}, GELU_TANH, 0, false},
        {"heads of 128", 2, 2, 256, 128, 500, 128, {4, 4}, GELU_ERF, 0, false},
        {"cosine blocks, erf, multipliers", 4, 4, 256, 128, 500, 96, {4, 1, 3}, GELU_ERF, 10, true},
        {"cosine block, tanh, multipliers", 2, 8, 256, 64, 500, 64, {8}, GELU_TANH, 1, true},
    };
    for (const Shape& s : shapes) { check_against_cpu(&s, against_cpu()); }
}

// Shapes at the edges of kernels. Where few tokens are summed, bf16's errors average less; a wrong kernel errs by much more.
static void test_odd_shapes() {
    const Shape shapes[] = {
        {"one token", 1, 1, 64, 8, 257, 1, {1}, GELU_TANH, 0, false},
        {"examples of one token", 2, 2, 128, 4, 300, 1, {5, 2}, GELU_TANH, 0, false},
        {"two tokens", 1, 1, 16, 2, 2, 2, {1}, GELU_ERF, 0, false},
        {"one example, heads of 16", 2, 3, 48, 64, 257, 37, {1}, GELU_TANH, 0, false},
        {"heads of 48", 2, 1, 48, 50, 257, 50, {3, 1}, GELU_TANH, 1, false},
        {"heads of 80, no padding", 1, 1, 80, 40, 128, 33, {2, 2}, GELU_ERF, 0, true},
        {"heads of 112", 1, 2, 224, 70, 300, 65, {2, 1}, GELU_TANH, 0, false},
        {"many rows of keys, heads of 16", 1, 5, 80, 256, 257, 200, {2, 1}, GELU_TANH, 1, false},
        {"many rows of keys, heads of 64", 1, 2, 128, 320, 300, 300, {2}, GELU_TANH, 0, false},
        {"many rows of keys, heads of 128", 1, 1, 128, 300, 300, 300, {2, 1}, GELU_ERF, 1, false},
        {"few different tokens", 2, 2, 128, 64, 3, 64, {4}, GELU_TANH, 0, true},
        {"GPT-2's vocabulary", 1, 1, 64, 64, 50257, 40, {2, 1}, GELU_TANH, 0, false},
    };
    Tolerance t = against_cpu();
    t.cosine *= bound(1, 2);
    t.length *= bound(1, 2);
    t.per_example *= bound(1, 2);
    for (const Shape& s : shapes) { check_against_cpu(&s, t); }
}

#if defined LLMC_CUDA_COMMON_CUH && defined PRECISION_FP32 // not with a CPU model in its place

// --tf32: operands of products lose up to 2^-10 = 0.1% of themselves, most of them downwards, so that the errors of the
// products that a gradient has come through add up: 1% for two blocks. A key's bias has no gradient but rounding: see below.
static void test_tf32() {
    const Shape s = {"TF32", 2, 2, 128, 128, 500, 128, {4, 4}, GELU_ERF, 0, false};
    Model *plain = model_open_drawn(DEVICE_OPEN, &s), *cpu = model_open_drawn(cpu_open_double, &s),
          *device = model_open(DEVICE_OPEN, &s, RECOMPUTE_AUTO, true);
    draw_weights(device, &s);
    const Batch batch = batch_of(&s);
    Found found = measure(device, batch, 0, s.micros, GNS_OFF), expected = measure(cpu, batch, 0, s.micros, GNS_OFF);
    CHECK(!same_floats(found.gradient, measure(plain, batch, 0, s.micros, GNS_OFF).gradient)); // else it is not on
    check_error(relative(found.loss, expected.loss), 1e-2, "TF32: loss");
    check_error(relative(found.grad_norm, expected.grad_norm), 1e-2, "TF32: gradient norm");
    for (int i = 0; i < device->table.num_tensors; i++) {
        int r, layer;
        char tensor[128];
        tensor_at(&device->table, i, &r, &layer);
        tensor_name(&device->table, r, layer, tensor, sizeof tensor);
        const size_t at = param_offset(&device->table, r, layer), C = (size_t)s.C;
        float *gx = found.gradient.data() + at, *gy = expected.gradient.data() + at;
        if (r == QKVB) {
            std::fill(gx + C, gx + 2 * C, 0.0f);
            std::fill(gy + C, gy + 2 * C, 0.0f);
        }
        check_error(relative_error(gx, gy, device->table.row[r].size), 1e-2, "TF32: gradient of %s", tensor);
    }
    for (Model* m : {plain, cpu, device}) { model_close(m); }
}

#endif

// A key's bias adds the same to all scores of a query: its gradient is zero, and what is found is rounding, small beside the
// gradients of the other two thirds.
static void test_key_bias_has_no_gradient() {
    const Shape s = {"key bias", 2, 2, 128, 64, 257, 64, {4}, GELU_TANH, 0, false};
    Model* m = model_open_drawn(DEVICE_OPEN, &s);
    const Found found = measure(m, batch_of(&s), 0, s.micros, GNS_OFF);
    for (int l = 0; l < s.L; l++) {
        const size_t C = (size_t)s.C;
        const float *query = found.gradient.data() + param_offset(&m->table, QKVB, l), *key = query + C;
        const double others = dot(query, query, C) + dot(key + C, key + C, C);
        CHECK(dot(query, query, C) > 0);
        check_error(sqrt(dot(key, key, C) / others), bound(1e-5, 1e-2), "key bias of block %d", l);
    }
    model_close(m);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. GNS

// Two ways to the same sums. Products of other shapes may add in another order; in bf16 that turns a rounding here and there,
// and a few layers on most of them, so that the two are no closer to each other than to the truth.
static Tolerance same_but_rounding() {
    return Tolerance{bound(1e-6, 1e-3), bound(2e-5, 2e-2), bound(2e-5, 2e-4), bound(2e-5, 1e-2), bound(2e-5, 1e-2)};
}

// What one backward pass an example finds.
static Found one_by_one(Model* m, const Batch& batch) {
    const int one[] = {1, 0};
    const size_t P = m->table.num_params, tensors = (size_t)m->table.num_tensors;
    std::vector<double> total(P);
    Found sum;
    sum.loss = sum.grad_norm = 0;
    sum.sum_sq.resize(tensors);
    for (int b = 0; b < batch.B; b++) {
        const Found f = measure(m, batch, b, one, GNS_OFF);
        sum.loss += f.loss / batch.B;
        for (size_t i = 0; i < P; i++) { total[i] += (double)f.gradient[i]; }
        for (size_t i = 0; i < tensors; i++) {
            sum.sum_sq[i] += f.sq_sum[i];
            CHECK(f.sum_sq[i] == 0);
        }
    }
    sum.gradient.assign(total.begin(), total.end());
    sum.grad_norm = sqrt(dot(sum.gradient.data(), sum.gradient.data(), P)) / batch.B;
    return sum;
}

// However a step is divided into micro-batches: gradients, norms and loss are those of one backward pass an example.
static void test_one_by_one() {
    const Shape shapes[] = {
        {"8 examples", 2, 2, 128, 64, 257, 64, {8}, GELU_TANH, 0, false},
        {"cosine, erf, multipliers, odd", 2, 3, 48, 64, 257, 45, {7}, GELU_ERF, 2, true},
        {"few different tokens", 1, 1, 64, 80, 3, 80, {5}, GELU_TANH, 0, true},
        {"examples of one token", 1, 2, 64, 4, 11, 1, {6}, GELU_TANH, 0, false},
    };
    for (const Shape& s : shapes) {
        const int n = s.micros[0];
        const int splits[][4] = {{n}, {4, 1, n - 5}, {1, n - 1}};
        Model* m = model_open_drawn(DEVICE_OPEN, &s);
        const Batch batch = batch_of(&s);
        const Found expected = one_by_one(m, batch);
        for (const int* split : splits) {
            char name[128];
            snprintf(name, sizeof name, "%s, first micro-batch of %d", s.name, split[0]);
            compare(name, &m->table, measure(m, batch, 0, split, GNS_ALL), expected, same_but_rounding());
        }
        model_close(m);
    }
}

// The head takes a micro-batch in parts where its logits are too many for one, and per-example gradients come in groups: no
// sum depends on it. Without the latter a part's product adds to what the one before left in wte's gradient.
static void test_parts() {
    const Shape shapes[] = {
        {"logits of 2 GiB and more", 1, 1, 16, 1024, 65536, 1024, {16}, GELU_TANH, 0, false},
        {"per-example gradients of more than 1 GiB", 1, 1, 64, 8, 50257, 4, {100}, GELU_TANH, 0, false},
    };
    const int splits[][4] = {{7, 7, 2}, {50, 50}};
    for (int i = 0; i < 2; i++) {
        const Shape* s = &shapes[i];
        Model* m = model_open_drawn(DEVICE_OPEN, s);
        const Batch batch = batch_of(s);
        for (const int gns : {GNS_ALL, GNS_LN}) {
            char name[128];
            snprintf(name, sizeof name, "%s, gns %s", s->name, gns == GNS_LN ? "ln" : "all");
            const Found expected = measure(m, batch, 0, splits[i], gns);
            compare(name, &m->table, measure(m, batch, 0, s->micros, gns), expected, same_but_rounding());
        }
        Floats whole; // of micro-batches whose logits are in memory at once
        for (int k = 0, first = 0; splits[i][k] > 0; first += splits[i][k++]) {
            const Floats losses = losses_of(m, batch, first, splits[i][k], s->T);
            whole.insert(whole.end(), losses.begin(), losses.end());
        }
        const Floats parts = losses_of(m, batch, 0, examples_of(s->micros), s->T);
        // As beside the CPU: what a token's logits err by.
        check_error(worst_error(parts, whole), bound(1e-5, 5e-2), "%s: worst loss of a token", s->name);
        model_close(m);
    }
}

// ln measures the LayerNorm tensors as all does, and nothing else; off measures nothing; the gradient is the same.
static void test_gns_modes() {
    const Shape s = {"GNS modes", 2, 2, 128, 64, 257, 64, {4, 1, 3}, GELU_TANH, 0, false};
    Model* m = model_open_drawn(DEVICE_OPEN, &s);
    const Batch batch = batch_of(&s);
    const Found all = measure(m, batch, 0, s.micros, GNS_ALL);
    for (int gns = GNS_OFF; gns <= GNS_LN; gns++) {
        Found expected = all;
        for (int i = 0; i < m->table.num_tensors; i++) {
            int r, layer;
            tensor_at(&m->table, i, &r, &layer);
            CHECK(all.sum_sq[(size_t)i] > 0);
            if (!gns_measures(gns, m->table.row[r].group)) { expected.sum_sq[(size_t)i] = 0; }
        }
        Tolerance t = same_but_rounding();
        const Found found = measure(m, batch, 0, s.micros, gns);
        compare(gns == GNS_LN ? "gns ln" : "gns off", &m->table, found, expected, t);
        for (size_t i = 0; i < found.sum_sq.size(); i++) { CHECK((found.sum_sq[i] == 0) == (expected.sum_sq[i] == 0)); }
    }
    model_close(m);
}

// What is computed again in place of being kept is what was kept.
static void test_recompute() {
    const Shape shapes[] = {
        {"recompute, tanh", 3, 2, 128, 64, 257, 60, {4, 1, 3}, GELU_TANH, 2, true},
        {"recompute, erf", 2, 3, 48, 64, 257, 45, {3, 2}, GELU_ERF, 0, false},
    };
    for (const Shape& s : shapes) {
        const Batch batch = batch_of(&s);
        Found kept;
        for (int recompute = DEVICE_RECOMPUTE; recompute <= RECOMPUTE_LAYERNORM; recompute++) {
            Model* m = model_open(DEVICE_OPEN, &s, recompute);
            draw_weights(m, &s);
            const Found found = measure(m, batch, 0, s.micros, GNS_ALL);
            if (recompute == DEVICE_RECOMPUTE) { kept = found; }
            char name[128];
            snprintf(name, sizeof name, "%s %d", s.name, recompute);
            compare(name, &m->table, found, kept, same_but_rounding());
            model_close(m);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Step

typedef struct {
    Floats tensors[3]; // weights, first and second moments
    std::vector<char> blob;
} State;

static const int state_kinds[] = {TENSOR_WEIGHT, TENSOR_M, TENSOR_V};

static State get_state(const Model* m) {
    State s;
    for (int i = 0; i < 3; i++) { s.tensors[i] = get_all(m, state_kinds[i]); }
    s.blob.resize(m->backend.state_size(m->backend.self));
    m->backend.state_get(m->backend.self, s.blob.data());
    return s;
}

static void set_tensors(Model* m, const State& s) {
    for (int i = 0; i < 3; i++) { set_all(m, state_kinds[i], s.tensors[i]); }
}

static bool same_tensors(const State& x, const State& y) {
    bool same = true;
    for (int i = 0; i < 3; i++) { same = same && same_floats(x.tensors[i], y.tensors[i]); }
    return same;
}

// Steps `from` to `to`, counted from 1, each on examples and with micro-batches of its own; all that they find is added
// to *log.
static void train(Model* m, const Shape* s, int from, int to, std::vector<double>* log) {
    const int splits[][4] = {{4, 1, 3}, {8}, {2, 6}};
    for (int i = from; i <= to; i++) {
        const Batch batch = draw_batch(8, s->T, s->V, (uint64_t)i);
        StepHyper h = ordinary_step(8);
        h.step = i;
        h.grad_clip = 1;
        step(m, batch, 0, splits[i % 3], i % 2 == 0 ? GNS_LN : GNS_ALL, h);
        log->push_back(m->stats.loss);
        log->push_back(m->stats.grad_norm);
        log->insert(log->end(), m->sq_sum.begin(), m->sq_sum.end());
        log->insert(log->end(), m->sum_sq.begin(), m->sum_sq.end());
    }
}

static const Shape small_run = {"small run", 2, 2, 128, 64, 257, 45, {8}, GELU_ERF, 2, true};
// Its products are large enough for their algorithms to be chosen by time, which must not decide a bit.
static const Shape large_run = {"large run", 1, 2, 256, 256, 1000, 256, {8}, GELU_TANH, 0, false};

// The same steps from the same weights, in the same model and in two others, leave the same bits; evaluations in between
// change nothing.
static void check_same_bits(const Shape* s) {
    Model *a = model_open(DEVICE_OPEN, s, RECOMPUTE_AUTO), *b = model_open_drawn(DEVICE_OPEN, s);
    State zero = get_state(a), first;
    std::vector<double> log;
    draw_weights(a, s);
    const State start = get_state(a);
    train(a, s, 1, 3, &log);
    first = get_state(a);
    CHECK(!same_tensors(first, start));
    for (int round = 0; round < 3; round++) {
        Model* m = round == 0 ? a : b;
        std::vector<double> again;
        Floats losses((size_t)(8 * s->T)), logits((size_t)s->V);
        const Batch batch = batch_of(s);
        set_tensors(m, zero);
        draw_weights(m, s);
        for (int i = 1; i <= 3; i++) {
            train(m, s, i, i, &again);
            if (round == 1) { continue; }
            m->backend.eval(m->backend.self, batch.tokens.data(), batch.targets.data(), 8, batch.T, losses.data());
            m->backend.logits(m->backend.self, batch.tokens.data(), 20, logits.data());
        }
        CHECK(same_tensors(get_state(m), first));
        CHECK(again == log);
    }
    model_close(a);
    model_close(b);
}

static void test_same_bits() {
    check_same_bits(&small_run);
    check_same_bits(&large_run);
}

#ifdef LLMC_CUDA_COMMON_CUH // not with a CPU model in its place

// A step reads nothing that no step has written: memory full of NaN beforehand changes no bit. (compute-sanitizer's
// initcheck cannot say it: it does not see what cuBLASLt writes.)
static void test_nothing_unwritten_is_read() {
    for (const Shape* s : {&small_run, &large_run}) {
        for (int recompute = RECOMPUTE_NOTHING; recompute <= RECOMPUTE_LAYERNORM; recompute++) {
            Model* m = model_open(DEVICE_OPEN, s, recompute);
            GPT* g = (GPT*)m->backend.self;
            const Batch batch = batch_of(s);
            draw_weights(m, s);
            const Found expected = measure(m, batch, 0, s->micros, GNS_ALL);
            for (int i : {MEM_GRADIENTS, MEM_ACTIVATIONS, MEM_SCRATCH}) {
                cuda_check(cudaMemset(g->memory[i], 0xff, g->bytes[i]));
            }
            cuda_check(cudaMemset(g->gns_memory, 0xff, g->gns_bytes));
            const Found found = measure(m, batch, 0, s->micros, GNS_ALL);
            CHECK(found.loss == expected.loss && found.grad_norm == expected.grad_norm);
            CHECK(found.sq_sum == expected.sq_sum && found.sum_sq == expected.sum_sq);
            CHECK(same_floats(found.gradient, expected.gradient));
            model_close(m);
        }
    }
}

#endif

// Five steps of AdamW beside its formulas in double on the model's own gradients: without clipping, clipped, and clipping
// that does not bite. (Beside another model's gradients the weights would tell little: where a gradient is zero but for
// rounding, Adam's first steps are +-lr by the sign of the rounding.)
static void test_update() {
    const Shape s = {"update", 2, 2, 128, 64, 257, 64, {4}, GELU_TANH, 0, false};
    Model* model = model_open_drawn(DEVICE_OPEN, &s);
    const ParamTable* table = &model->table;
    const State start = get_state(model);
    const size_t P = table->num_params;
    std::vector<double> w(start.tensors[0].begin(), start.tensors[0].end()), m(P), v(P);
    const double clips[] = {0, 0.5, 2, 0.01, 0}; // of the gradient's norm
    for (int i = 1; i <= 5; i++) {
        const Batch batch = draw_batch(4, s.T, s.V, (uint64_t)i);
        StepHyper h = ordinary_step(4);
        h.step = i;
        h.grad_clip = (float)(clips[i - 1] * measure(model, batch, 0, s.micros, GNS_OFF).grad_norm);
        step(model, batch, 0, s.micros, GNS_OFF, h);
        CHECK(model->stats.outcome == STEP_APPLIED);
        const Floats gradient = get_all(model, TENSOR_GRAD);
        const double norm = sqrt(dot(gradient.data(), gradient.data(), P)) / h.n;
        check_error(relative(model->stats.grad_norm, norm), 1e-6, "gradient norm of step %d", i);
        const double clip = h.grad_clip > 0 && norm > (double)h.grad_clip ? (double)h.grad_clip / norm : 1;
        CHECK((clip < 0.9) == (i == 2 || i == 4));
        const double b1 = (double)h.beta1, b2 = (double)h.beta2;
        for (int r = 0; r < NUM_ROWS; r++) {
            const ParamRow* row = &table->row[r];
            const double decay = row->weight_decay ? (double)h.weight_decay * (double)row->wd_mult : 0;
            for (size_t k = row->offset; k < row->offset + row->size * (size_t)row->count; k++) {
                const double g = (double)gradient[k] / h.n * clip;
                m[k] = b1 * m[k] + (1 - b1) * g;
                v[k] = b2 * v[k] + (1 - b2) * g * g;
                const double root = sqrt(v[k] / (1 - pow(b2, i))) + (double)h.eps * (double)row->eps_mult;
                w[k] -= (double)h.lr * (double)row->lr_mult * (m[k] / (1 - pow(b1, i)) / root + decay * w[k]);
            }
        }
        const std::vector<double>* expected[] = {&w, &m, &v};
        const State found = get_state(model);
        for (int j = 0; j < 3; j++) { // how far they have come, so that what stayed where it was does not count
            double error = 0, way = 0;
            for (size_t k = 0; k < P; k++) {
                const double from = (double)start.tensors[j][k], to = (*expected[j])[k];
                error += ((double)found.tensors[j][k] - to) * ((double)found.tensors[j][k] - to);
                way += (to - from) * (to - from);
            }
            const char* names[] = {"weights", "first moments", "second moments"};
            // A few roundings; weights up to 1.2 are rounded by 6e-8 while they move by 0.01.
            check_error(sqrt(error / way), j == 0 ? 1e-5 : 2e-6, "%s after step %d", names[j], i);
        }
    }
    model_close(model);
}

// The outcome is as told and, unless the step is applied, no bit of weights and moments has changed.
static bool step_ends(Model* m, const Batch& batch, const StepHyper& h, int outcome) {
    const int micros[] = {1, 1, 2, 0};
    const State before = get_state(m);
    step(m, batch, 0, micros, GNS_LN, h);
    const bool same = same_tensors(before, get_state(m));
    return m->stats.outcome == outcome && same == (outcome != STEP_APPLIED);
}

static void test_guards() {
    const Shape s = {"guards", 1, 2, 64, 32, 257, 30, {4}, GELU_TANH, 0, false};
    Model* m = model_open_drawn(DEVICE_OPEN, &s);
    Batch batch = batch_of(&s);
    StepHyper h = ordinary_step(4);
    CHECK(step_ends(m, batch, h, STEP_APPLIED));
    h.step = 2;
    const Found found = measure(m, batch, 0, s.micros, GNS_OFF);
    h.loss_limit = (float)found.loss * 0.99f;
    CHECK(step_ends(m, batch, h, STEP_SKIPPED_LOSS));
    // The statistics are those of the step all the same.
    check_error(relative(m->stats.loss, found.loss), bound(1e-5, 1e-3), "loss of a step that is not applied");
    h.loss_limit = (float)found.loss * 1.01f;
    h.grad_norm_limit = (float)found.grad_norm * 0.99f;
    CHECK(step_ends(m, batch, h, STEP_SKIPPED_GRAD));
    check_error(relative(m->stats.grad_norm, found.grad_norm), bound(1e-5, 5e-3), "norm of a step that is not applied");
    h.grad_norm_limit = (float)found.grad_norm * 1.01f;
    const float poisons[] = {NAN, INFINITY, -INFINITY};
    const int rows[] = {WTE, WPE, QKVW, QKVB, FCW, FCB, LN1W, LNFW, LNFB};
    batch.tokens[3] = 0; // so that the first row of wte is in use
    for (const int row : rows) {
        for (const float poison : poisons) {
            Floats w(m->table.row[row].size);
            m->backend.get(m->backend.self, row, 0, TENSOR_WEIGHT, w.data());
            const float healthy = w[0];
            w[0] = poison;
            m->backend.set(m->backend.self, row, 0, TENSOR_WEIGHT, w.data());
            CHECK(step_ends(m, batch, h, STEP_SKIPPED_NONFINITE));
            w[0] = healthy;
            m->backend.set(m->backend.self, row, 0, TENSOR_WEIGHT, w.data());
        }
    }
    batch.tokens[3] = batch_of(&s).tokens[3];
    CHECK(step_ends(m, batch, h, STEP_APPLIED)); // and nothing of the poison is left
    check_error(relative(m->stats.loss, found.loss), bound(1e-5, 1e-3), "loss after the poison");
    check_error(relative(m->stats.grad_norm, found.grad_norm), bound(1e-5, 5e-3), "norm after the poison");
    model_close(m);
}

// A rank may have no example of a step: its gradient is zero, not what the last step left.
static void test_step_without_examples() {
    const Shape s = {"no examples", 2, 2, 64, 32, 257, 30, {4}, GELU_TANH, 0, false};
    const int none[] = {0};
    Model* m = model_open_drawn(DEVICE_OPEN, &s);
    const Batch batch = batch_of(&s);
    for (int gns = GNS_OFF; gns <= GNS_ALL; gns++) {
        step(m, batch, 0, s.micros, gns, ordinary_step(4));
        CHECK(m->stats.grad_norm > 0);
        step(m, batch, 0, none, gns, ordinary_step(4));
        CHECK(m->stats.outcome == STEP_APPLIED && m->stats.loss == 0 && m->stats.grad_norm == 0);
        for (const double x : m->sq_sum) { CHECK(x == 0); }
        for (const double x : m->sum_sq) { CHECK(x == 0); }
        for (const float x : get_all(m, TENSOR_GRAD)) {
            if (x != 0) {
                CHECK(x == 0);
                break;
            }
        }
    }
    model_close(m);
}

// Every tensor's weights and moments have a place of their own that set writes and get reads, to the bit.
static void test_get_and_set() {
    const Shape s = {"get and set", 3, 3, 48, 10, 257, 8, {2}, GELU_TANH, 0, false};
    Model* m = model_open(DEVICE_OPEN, &s, RECOMPUTE_AUTO);
    State wanted = get_state(m);
    uint64_t rng = 5;
    for (Floats& x : wanted.tensors) {
        for (const float zero : x) { CHECK(zero == 0); }
        for (float& number : x) { number = (float)draw(&rng); }
    }
    set_tensors(m, wanted); // all is written before the first is read
    CHECK(same_tensors(get_state(m), wanted));
    model_close(m);
}

// The rows that pad the vocabulary stay zero, in weights, gradients and moments.
static void test_padding() {
    std::vector<double> log;
    Model* m = model_open_drawn(DEVICE_OPEN, &small_run);
    train(m, &small_run, 1, 3, &log);
    const ParamRow* row = &m->table.row[WTE];
    const size_t used = (size_t)row->used_rows * (size_t)row->cols;
    CHECK(used < row->size);
    for (int what = TENSOR_WEIGHT; what <= TENSOR_V; what++) {
        Floats x(row->size);
        m->backend.get(m->backend.self, WTE, 0, what, x.data());
        CHECK(dot(&x[used], &x[used], row->size - used) == 0);
        CHECK(dot(&x[used] - row->cols, &x[used] - row->cols, (size_t)row->cols) > 0);
    }
    model_close(m);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Evaluation

static void test_evaluation() {
    const Shape s = {"evaluation", 3, 2, 128, 100, 257, 90, {5}, GELU_ERF, 2, true};
    const int sizes[][2] = {{5, 90}, {3, 90}, {5, 17}, {1, 90}, {1, 1}, {2, 64}};
    Model *device = model_open_drawn(DEVICE_OPEN, &s), *cpu = model_open_drawn(cpu_open_double, &s);
    Batch batch = batch_of(&s);
    for (const int i : {0, 16, 100, 101, 180}) { batch.targets[(size_t)i] = -1; }
    double sum = 0;
    for (const float loss : losses_of(device, batch, 0, 5, 90)) { sum += (double)loss / (5 * 90); }
    const double trained = measure(device, batch, 0, s.micros, GNS_OFF).loss;
    check_error(relative(sum, trained), bound(1e-6, 1e-3), "evaluation beside training");
    for (const int* size : sizes) {
        const int B = size[0], T = size[1];
        const Floats found = losses_of(device, batch, 0, B, T), expected = losses_of(cpu, batch, 0, B, T);
        for (int i = 0; i < B * T; i++) {
            const bool ignored = batch.targets[(size_t)(i / T * 90 + i % T)] == -1;
            if (ignored != (found[(size_t)i] == 0)) { CHECK(ignored == (found[(size_t)i] == 0)); }
        }
        // A token's logits err by bf16's 2^-9, a few times over, of their size, about 1.
        check_error(worst_error(found, expected), bound(1e-5, 5e-2), "worst loss of a token, B %d, T %d", B, T);
        Floats logits((size_t)s.V), wanted((size_t)s.V);
        device->backend.logits(device->backend.self, batch.tokens.data(), T, logits.data());
        cpu->backend.logits(cpu->backend.self, batch.tokens.data(), T, wanted.data());
        check_error(relative_error(logits.data(), wanted.data(), (size_t)s.V), bound(1e-5, 2e-2),
                    "logits after %d tokens", T);
        const int target = batch.targets[(size_t)T - 1];
        double exponentials = 0;
        for (const float x : logits) { exponentials += exp((double)x); }
        const double loss = target < 0 ? 0 : log(exponentials) - (double)logits[(size_t)target];
        check_error(fabs(loss - (double)found[(size_t)T - 1]), bound(1e-5, 5e-2), "loss from logits, B %d, T %d", B, T);
    }
    model_close(device);
    model_close(cpu);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Runs

// The losses of steps `from` to `to`, counted from 1, each on examples of its own; the first five warm up.
static std::vector<double> run(Model* m, const Shape* s, int from, int to) {
    std::vector<double> losses;
    for (int i = from; i <= to; i++) {
        const int n = examples_of(s->micros);
        StepHyper h = ordinary_step(n);
        h.step = i;
        h.lr = 3e-3f * (float)min_int(i, 5) / 5;
        h.grad_clip = 1;
        step(m, draw_batch(n, s->T, s->V, (uint64_t)i), 0, s->micros, GNS_LN, h);
        CHECK(m->stats.outcome == STEP_APPLIED);
        losses.push_back(m->stats.loss);
    }
    return losses;
}

static void compare_losses(const char* what, const std::vector<double>& x, const std::vector<double>& y) {
    for (size_t i = 0; i < y.size(); i++) {
        check_error(relative(x[i], y[i]), bound(1e-5, 5e-3), "%s: loss %zu", what, i);
    }
}

// GPT-2's own initial weights, the loss from ln(V) on its way down.
static void test_twenty_steps() {
    const Shape s = {"20 steps", 4, 2, 128, 128, 1000, 128, {4, 4}, GELU_TANH, 0, false};
    const GPTConfig config = config_of_shape(s.L, s.NH, s.C, s.max_T, s.V);
    Model *device = model_open(DEVICE_OPEN, &s, RECOMPUTE_AUTO), *cpu = model_open(cpu_open_float, &s, RECOMPUTE_AUTO);
    model_init_weights(&config, 42, &device->backend);
    model_init_weights(&config, 42, &cpu->backend);
    const std::vector<double> found = run(device, &s, 1, 20), expected = run(cpu, &s, 1, 20);
    printf("20 steps: loss %.4f to %.4f, on the CPU %.4f to %.4f\n", found[0], found[19], expected[0], expected[19]);
    CHECK(expected[19] < expected[0] - 0.2);
    compare_losses("20 steps", found, expected);
    model_close(device);
    model_close(cpu);
}

// Weights, moments and blob carry the whole state: another model goes on with the same bits, whatever it did before.
static void check_resume(const Shape* s) {
    std::vector<double> unbroken, log;
    Model* m = model_open_drawn(DEVICE_OPEN, s);
    train(m, s, 1, 3, &unbroken);
    const State middle = get_state(m);
    const size_t half = unbroken.size();
    train(m, s, 4, 6, &unbroken);
    const State end = get_state(m);
    model_close(m);
    for (int used = 0; used < 2; used++) {
        m = model_open(DEVICE_OPEN, s, RECOMPUTE_AUTO);
        if (used) {
            draw_weights(m, s);
            train(m, s, 1, 2, &log);
        }
        set_tensors(m, middle);
        CHECK(m->backend.state_size(m->backend.self) == middle.blob.size());
        m->backend.state_set(m->backend.self, middle.blob.data());
        CHECK(same_tensors(get_state(m), middle));
        log.assign(unbroken.begin(), unbroken.begin() + (long)half);
        train(m, s, 4, 6, &log);
        CHECK(same_tensors(get_state(m), end) && get_state(m).blob == end.blob);
        CHECK(log == unbroken);
        model_close(m);
    }
}

static void test_resume() {
    check_resume(&small_run);
    check_resume(&large_run);
}

// A run that changes the trainer, and changes back, has the losses of one that does not.
static void test_change_of_trainer() {
    const Shape s = {"change of trainer", 2, 2, 128, 64, 257, 64, {8}, GELU_ERF, 2, true};
    Model *unbroken = model_open_drawn(cpu_open_float, &s), *cpu = model_open_drawn(cpu_open_float, &s),
          *device = model_open_drawn(DEVICE_OPEN, &s);
    const std::vector<double> expected = run(unbroken, &s, 1, 9);
    std::vector<double> losses = run(cpu, &s, 1, 3);
    set_tensors(device, get_state(cpu));
    CHECK(same_tensors(get_state(device), get_state(cpu)));
    const std::vector<double> second = run(device, &s, 4, 6);
    set_tensors(cpu, get_state(device));
    CHECK(same_tensors(get_state(cpu), get_state(device)));
    const std::vector<double> third = run(cpu, &s, 7, 9);
    losses.insert(losses.end(), second.begin(), second.end());
    losses.insert(losses.end(), third.begin(), third.end());
    compare_losses(s.name, losses, expected);
    Model* all[] = {unbroken, cpu, device};
    for (Model* m : all) { model_close(m); }
}

int main(void) {
    RUN_AND_SAY(test_against_cpu);
    RUN_AND_SAY(test_odd_shapes);
#if defined LLMC_CUDA_COMMON_CUH && defined PRECISION_FP32
    RUN_AND_SAY(test_tf32);
#endif
    RUN_AND_SAY(test_key_bias_has_no_gradient);
    RUN_AND_SAY(test_one_by_one);
    RUN_AND_SAY(test_parts);
    RUN_AND_SAY(test_gns_modes);
    RUN_AND_SAY(test_recompute);
    RUN(test_same_bits);
#ifdef LLMC_CUDA_COMMON_CUH
    RUN(test_nothing_unwritten_is_read);
#endif
    RUN_AND_SAY(test_update);
    RUN_AND_SAY(test_guards);
    RUN(test_step_without_examples);
    RUN(test_get_and_set);
    RUN(test_padding);
    RUN_AND_SAY(test_evaluation);
    RUN_AND_SAY(test_twenty_steps);
    RUN(test_resume);
    RUN_AND_SAY(test_change_of_trainer);
    return test_summary();
}
