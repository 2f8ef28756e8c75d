/*
Checks and times the end of a step: global_norm, loss_add, step_decide (llmc/global_norm.cuh) and adamw (llmc/adamw.cuh).
See harness.cuh for how to build and run it.
*/
#include "dev/cuda/harness.cuh"
#include "llmc/adamw.cuh"

static StepHyper some_hyper(int64_t step, int n) {
    StepHyper h;
    memset(&h, 0, sizeof h);
    h.step = step;
    h.n = n;
    h.lr = 1e-2f;
    h.beta1 = 0.9f;
    h.beta2 = 0.95f;
    h.eps = 1e-8f;
    h.weight_decay = 0.1f;
    h.loss_limit = h.grad_norm_limit = INFINITY;
    return h;
}

// One number on the device.
template <class T> static T* device_one(T value) { return device_copy(std::vector<T>(1, value)); }

// Every number of every tensor but those of padding rows, as f(row, layer, position in the flat array).
template <class F> static void for_used(const ParamTable* t, F f) {
    for (int r = 0; r < NUM_ROWS; r++) {
        const size_t used = (size_t)t->row[r].used_rows * (size_t)t->row[r].cols;
        for (int l = 0; l < t->row[r].count; l++) {
            for (size_t i = 0; i < used; i++) { f(r, l, param_offset(t, r, l) + i); }
        }
    }
}

// The pieces of a table are the numbers that for_used visits, in the same order, none longer than PIECE.
static void check_pieces(const ParamTable* table) {
    const PieceTable pieces = piece_table(table);
    std::vector<size_t> ours, expected;
    bool fits = true;
    for (int p = 0; p < pieces.num_pieces; p++) {
        const Piece piece = find_piece(pieces, p);
        fits = fits && piece.count >= 1 && piece.count <= PIECE && piece.at % 4 == 0 && piece.count % 4 == 0;
        for (int i = 0; i < piece.count; i++) { ours.push_back(piece.at + (size_t)i); }
    }
    for_used(table, [&](int, int, size_t at) { expected.push_back(at); });
    check_that(fits && ours == expected, "pieces cover every trained number once");
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms

static void check_norms(const GPTConfig* config, uint64_t seed) {
    const ParamTable table = param_table(config);
    const PieceTable pieces = piece_table(&table);
    std::vector<float> grads = random_normal<float>(table.num_params, 0, 0.3, seed);
    for (size_t i = (size_t)config->vocab_size * (size_t)config->channels;
         i < (size_t)config->padded_vocab_size * (size_t)config->channels; i++) {
        grads[i] = NAN; // padding takes no part
    }
    std::vector<double> expected((size_t)table.num_tensors, 0);
    for_used(&table, [&](int r, int l, size_t at) {
        expected[(size_t)tensor_index(&table, r, l)] += (double)grads[at] * (double)grads[at];
    });
    const float* d_grads = device_copy(grads);
    double *sq_sum = device_alloc<double>(expected.size()),
           *scratch = device_alloc<double>(global_norm_scratch(&pieces));
    global_norm(sq_sum, scratch, d_grads, &pieces, 0);
    const std::vector<double> first = host_copy(sq_sum, expected.size());
    global_norm(sq_sum, scratch, d_grads, &pieces, 0);
    check_same_bits("norms: same bits twice", first, host_copy(sq_sum, expected.size()));
    bool close = true;
    for (size_t i = 0; i < expected.size(); i++) {
        close = close && fabs(first[i] - expected[i]) <= 1e-6 * expected[i];
    }
    check_that(close, "norms: every tensor within 1e-6"); // at most 32 squares are added up in fp32
    cuda_check(cudaFree((void*)d_grads));
    cuda_check(cudaFree(sq_sum));
    cuda_check(cudaFree(scratch));
}

static void check_losses(int B, int T) {
    const std::vector<float> losses = random_normal<float>((size_t)B * (size_t)T, 5, 2, (uint64_t)(B * 1000 + T));
    double expected = 1.25;
    for (size_t i = 0; i < losses.size(); i++) { expected += (double)losses[i] / T; }
    float* d_losses = device_copy(losses);
    double* sum = device_one(1.25);
    loss_add(sum, d_losses, B, T, 0);
    check_that(fabs(host_copy(sum, 1)[0] - expected) <= 1e-12 * fabs(expected), "losses: sum over examples");
    cuda_check(cudaFree(d_losses));
    cuda_check(cudaFree(sum));
}

// ---------------------------------------------------------------------------------------------------------------------
// The decision

static StepDecision decide(const std::vector<double>& sq_sum, double loss_sum, StepHyper hyper) {
    double *d_sq_sum = device_copy(sq_sum), *d_loss = device_one(loss_sum);
    StepHyper* d_hyper = device_one(hyper);
    StepDecision* d_decision = device_alloc<StepDecision>(1);
    step_decide(d_decision, d_sq_sum, d_loss, d_hyper, (int)sq_sum.size(), 0);
    const StepDecision d = host_copy(d_decision, 1)[0];
    cuda_check(cudaFree(d_sq_sum));
    cuda_check(cudaFree(d_loss));
    cuda_check(cudaFree(d_hyper));
    cuda_check(cudaFree(d_decision));
    return d;
}

static bool near(double x, double expected, double tolerance) {
    return fabs(x - expected) <= tolerance * fabs(expected);
}

static void check_decisions() {
    std::vector<double> sq_sum(700, 0.5); // norm of the sum sqrt(350), of the mean of 12 examples 1.559
    const double norm = sqrt(350.0) / 12;
    StepHyper h = some_hyper(7, 12);
    StepDecision d = decide(sq_sum, 42, h);
    check_that(d.outcome == STEP_APPLIED && near(d.loss, 42.0 / 12, 1e-15) && near(d.grad_norm, norm, 1e-14) &&
                   near(d.grad_scale, 1.0 / 12, 1e-7),
               "decision: applied, not clipped");
    check_that(near(d.correction1, 1 / (1 - pow((double)0.9f, 7)), 1e-7) &&
                   near(d.correction2, 1 / (1 - pow((double)0.95f, 7)), 1e-7),
               "decision: bias corrections");
    h.grad_clip = 1;
    check_that(near(decide(sq_sum, 42, h).grad_scale, 1 / norm / 12, 1e-7), "decision: clipped");
    h.grad_clip = 1.6f;
    check_that(near(decide(sq_sum, 42, h).grad_scale, 1.0 / 12, 1e-7), "decision: below the clip norm");
    h.loss_limit = 3.4f;
    check_that(decide(sq_sum, 42, h).outcome == STEP_SKIPPED_LOSS, "decision: loss limit");
    h.loss_limit = 3.6f;
    h.grad_norm_limit = 1.5f;
    check_that(decide(sq_sum, 42, h).outcome == STEP_SKIPPED_GRAD, "decision: gradient limit");
    h.grad_norm_limit = INFINITY;
    check_that(decide(sq_sum, NAN, h).outcome == STEP_SKIPPED_NONFINITE, "decision: NaN loss");
    check_that(decide(sq_sum, INFINITY, h).outcome == STEP_SKIPPED_NONFINITE, "decision: infinite loss");
    sq_sum[699] = NAN;
    check_that(decide(sq_sum, 42, h).outcome == STEP_SKIPPED_NONFINITE, "decision: NaN gradient");
    sq_sum[699] = INFINITY;
    check_that(decide(sq_sum, 42, h).outcome == STEP_SKIPPED_NONFINITE, "decision: infinite gradient");
    check_that(near(decide(std::vector<double>(1, 4.0), 1, some_hyper(1, 1)).grad_norm, 2, 1e-15),
               "decision: one tensor, one example");
}

// ---------------------------------------------------------------------------------------------------------------------
// The update

// The arrays of a model's weights on the device.
struct Optimizer {
    float *master, *m, *v, *grads;
    floatX* copy;
};

static Optimizer optimizer_alloc(const std::vector<float>& weights, const std::vector<float>& grads) {
    const std::vector<float> zeros(weights.size(), 0);
    return {device_copy(weights), device_copy(zeros), device_copy(zeros), device_copy(grads),
            device_alloc<floatX>(weights.size())};
}

static void optimizer_free(Optimizer* o) {
    for (void* p : {(void*)o->master, (void*)o->m, (void*)o->v, (void*)o->grads, (void*)o->copy}) {
        cuda_check(cudaFree(p));
    }
}

// One step of Adam in double on the numbers that are trained.
static void adamw_reference(const ParamTable* table, std::vector<double>& w, std::vector<double>& m,
                            std::vector<double>& v, const std::vector<float>& grads, const StepHyper& h, double scale) {
    const double c1 = 1 / (1 - pow((double)h.beta1, (double)h.step)),
                 c2 = 1 / (1 - pow((double)h.beta2, (double)h.step));
    for_used(table, [&](int r, int, size_t i) {
        const ParamRow* row = &table->row[r];
        const double g = (double)grads[i] * scale,
                     decay = row->weight_decay ? (double)h.weight_decay * row->wd_mult : 0;
        m[i] = h.beta1 * m[i] + (1 - (double)h.beta1) * g;
        v[i] = h.beta2 * v[i] + (1 - (double)h.beta2) * g * g;
        const double step = m[i] * c1 / (sqrt(v[i] * c2) + (double)h.eps * row->eps_mult);
        w[i] -= (double)h.lr * row->lr_mult * (step + decay * w[i]);
    });
}

static void check_update(const GPTConfig* config, uint64_t seed) {
    ParamTable table = param_table(config);
    for (int r = 0; r < NUM_ROWS; r++) { // every row with other multipliers, epsilon so large that it matters
        table.row[r].lr_mult = 1 + 0.1f * (float)r;
        table.row[r].wd_mult = 2 - 0.1f * (float)r;
        table.row[r].eps_mult = 1e6f * (float)(r + 1);
    }
    const PieceTable pieces = piece_table(&table);
    const size_t P = table.num_params;
    const std::vector<float> weights = random_normal<float>(P, 0, 0.5, seed),
                             grads = random_normal<float>(P, 0, 9, seed + 1);
    Optimizer o = optimizer_alloc(weights, grads), again = optimizer_alloc(weights, grads);
    std::vector<double> w(weights.begin(), weights.end()), m(P, 0), v(P, 0);
    StepDecision* decision = device_alloc<StepDecision>(1);
    StepHyper* d_hyper = device_alloc<StepHyper>(1);
    double *sq_sum = device_alloc<double>((size_t)table.num_tensors), *loss = device_one(10.0);
    double* scratch = device_alloc<double>(global_norm_scratch(&pieces));
    for (int step = 1; step <= 4; step++) { // the third is not applied
        StepHyper h = some_hyper(step, 3 + step);
        h.grad_clip = step == 2 ? 0.5f : 0;
        h.loss_limit = step == 3 ? 0.1f : INFINITY;
        cuda_check(cudaMemcpy(d_hyper, &h, sizeof h, cudaMemcpyHostToDevice));
        global_norm(sq_sum, scratch, o.grads, &pieces, 0);
        step_decide(decision, sq_sum, loss, d_hyper, table.num_tensors, 0);
        adamw(o.master, o.copy, o.m, o.v, o.grads, decision, d_hyper, &pieces, 0);
        adamw(again.master, NULL, again.m, again.v, again.grads, decision, d_hyper, &pieces, 0);
        const StepDecision d = host_copy(decision, 1)[0];
        check_that(d.outcome == (step == 3 ? STEP_SKIPPED_LOSS : STEP_APPLIED), "update: outcome");
        if (step != 3) { adamw_reference(&table, w, m, v, grads, h, (double)d.grad_scale); }
    }
    const std::vector<float> out = host_copy(o.master, P), out_m = host_copy(o.m, P), out_v = host_copy(o.v, P);
    std::vector<double> moved(P), expected(P); // the change, not the weights, which hide it
    for (size_t i = 0; i < P; i++) {
        moved[i] = (double)out[i] - (double)weights[i];
        expected[i] = w[i] - (double)weights[i];
    }
    std::vector<float> change(moved.begin(), moved.end());
    check_close("update: change of the weights", change, expected,
                1e-5); // weights of 0.5 are rounded by 3e-8, changes are 0.03
    check_close("update: first moments", out_m, m, 1e-6);
    check_close("update: second moments", out_v, v, 1e-6);
    check_same_bits("update: same bits twice, with the copy or without", out, host_copy(again.master, P));
    const std::vector<floatX> copy = host_copy(o.copy, P);
    std::vector<bool> used(P, false);
    for_used(&table, [&](int, int, size_t at) { used[at] = true; });
    bool rounded = true, untouched = true;
    const std::vector<unsigned char> nan_bits(sizeof(floatX), 0xff);
    for (size_t i = 0; i < P; i++) {
        const floatX nearest = (floatX)out[i];
        if (used[i]) {
            rounded = rounded && memcmp(&copy[i], &nearest, sizeof(floatX)) == 0;
        } else {
            untouched = untouched && out[i] == weights[i] && out_m[i] == 0 && out_v[i] == 0 &&
                        memcmp(&copy[i], nan_bits.data(), sizeof(floatX)) == 0;
        }
    }
    check_that(rounded, "update: the copy is the rounded weight");
    check_that(untouched, "update: padding rows are left alone");
    optimizer_free(&o);
    optimizer_free(&again);
    for (void* p : {(void*)decision, (void*)d_hyper, (void*)sq_sum, (void*)loss, (void*)scratch}) {
        cuda_check(cudaFree(p));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

// n numbers whose bytes are all 0x3c: 0.0115 as float.
static float* device_small_numbers(size_t n) {
    float* p = device_alloc<float>(n);
    cuda_check(cudaMemset(p, 0x3c, n * sizeof(float)));
    return p;
}

static void time_model(const char* name, double bandwidth) {
    GPTConfig config;
    if (!config_from_name(name, &config)) { fatal("no model is called %s", name); }
    const ParamTable table = param_table(&config);
    const PieceTable pieces = piece_table(&table);
    const size_t P = table.num_params;
    const int sets = buffer_sets(P * sizeof(float)); // a set's least part
    std::vector<Optimizer> o;
    for (int i = 0; i < sets; i++) {
        o.push_back({device_small_numbers(P), device_small_numbers(P), device_small_numbers(P), device_small_numbers(P),
                     device_alloc<floatX>(P)});
    }
    StepDecision* decision = device_alloc<StepDecision>(1);
    StepHyper* hyper = device_one(some_hyper(10, 8));
    double *sq_sum = device_alloc<double>((size_t)table.num_tensors), *loss = device_one(10.0);
    double* scratch = device_alloc<double>(global_norm_scratch(&pieces));
    const double trained = (double)param_count(&table);
    char what[80];
    snprintf(what, sizeof what, "%s global_norm (%d tensors, two launches)", name, table.num_tensors);
    print_row(what, median_us([&](int i) { global_norm(sq_sum, scratch, o[(size_t)(i % sets)].grads, &pieces, 0); }),
              4 * trained, bandwidth);
    const double us = median_us([&](int) { step_decide(decision, sq_sum, loss, hyper, table.num_tensors, 0); });
    printf("%s step_decide %.1f us\n", name, us);
    check_that(host_copy(decision, 1)[0].outcome == STEP_APPLIED, "timed updates are applied");
    snprintf(what, sizeof what, "%s adamw, fp32 weights and moments, copy", name);
    print_row(what, median_us([&](int i) {
                  const Optimizer& x = o[(size_t)(i % sets)];
                  adamw(x.master, x.copy, x.m, x.v, x.grads, decision, hyper, &pieces, 0);
              }),
              (28 + (double)sizeof(floatX)) * trained, bandwidth);
    for (Optimizer& x : o) { optimizer_free(&x); }
    for (void* p : {(void*)decision, (void*)hyper, (void*)sq_sum, (void*)loss, (void*)scratch}) {
        cuda_check(cudaFree(p));
    }
}

static void time_losses() {
    float* losses = device_small_numbers(65536);
    double* sum = device_one(0.0);
    printf("loss_add 65,536 tokens %.1f us\n", median_us([&](int) { loss_add(sum, losses, 64, 1024, 0); }));
    cuda_check(cudaFree(losses));
    cuda_check(cudaFree(sum));
}

int main(int argc, char** argv) {
    const GPTConfig configs[] = {
        config_of_shape(1, 1, 8, 1, 1),       // the smallest tensors
        config_of_shape(3, 2, 24, 7, 13),     // tensors shorter than a block's first step
        config_of_shape(2, 4, 96, 33, 257),   // wte and c_fc in several pieces, the last one short
        config_of_shape(2, 2, 128, 64, 128)}; // pieces that end with their tensor, no padding
    for (const GPTConfig& config : configs) {
        const ParamTable table = param_table(&config);
        check_pieces(&table);
        check_norms(&config, (uint64_t)config.channels);
        check_update(&config, (uint64_t)config.channels + 100);
    }
    check_decisions();
    for (int B : {1, 3}) {
        for (int T : {1, 37, 1024, 1500}) { check_losses(B, T); }
    }
    if (argc < 2 || strcmp(argv[1], "check") != 0) {
        const double bandwidth = copy_bandwidth();
        printf("copy %.0f GB/s\n", bandwidth / 1e9);
        for (const char* name : {"d12", "d24"}) { time_model(name, bandwidth); }
        time_losses();
    }
    return check_summary();
}
