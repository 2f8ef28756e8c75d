// Tests of llmc/gns.h, on hand-made numbers and on the toy, whose true noise scale is known.
#include "llmc/gns.h"
#include "dev/test/test.h"
#include "dev/test/toy.h"

// A toy whose LayerNorm tensors have this noise scale.
static Toy* open_toy(Backend* backend, double gns, uint64_t seed, int max_B) {
    GPTConfig config = toy_config();
    const BackendOptions options = backend_options(max_B, TOY_T);
    toy_open(backend, &config, &options);
    Toy* toy = (Toy*)backend->self;
    toy->noise[GROUP_LN] = gns;
    toy->seed = seed;
    return toy;
}

// The sample of a step with fraction f of n examples: m = scale.
static GnsSample sample_of(double f, int n, double scale) {
    return gns_sample(n * scale, n * scale * ((n - 1) * f + 1), n);
}

static void update(GnsTracker* t, GnsSample ln, double tokens) {
    GnsSample samples[NUM_GNS_GROUPS];
    memset(samples, 0, sizeof samples);
    samples[GNS_GROUP_LN] = ln;
    gns_tracker_update(t, samples, tokens);
}

// ---------------------------------------------------------------------------------------------------------------------
// Samples

// Three examples with gradients (1,2), (3,0), (-1,1): m = 16/3, the mean is (1,1), n2 = 2.
static void test_sample(void) {
    GnsSample s = gns_sample(5 + 9 + 2, 9 + 9, 3);
    CHECK(s.valid && s.n == 3);
    CHECK_CLOSE(s.m, 16.0 / 3, 1e-15);
    CHECK_CLOSE(s.n2, 2, 1e-15);
    CHECK_CLOSE(s.gtg, 1.0 / 3, 1e-14);
    CHECK_CLOSE(s.trsigma, 5, 1e-15);
    // Negative components stay: two opposite gradients, and two equal ones.
    CHECK_CLOSE(gns_sample(2, 0, 2).gtg, -1, 1e-15);
    CHECK_CLOSE(gns_sample(2, 4, 2).trsigma, 0, 1e-15);
}

static void test_no_sample(void) {
    CHECK(!gns_sample(1, 1, 0).valid);
    CHECK(!gns_sample(1, 1, 1).valid); // one example says nothing of the noise
    CHECK(!gns_sample(0, 0, 4).valid);
    CHECK(!gns_sample(NAN, 1, 4).valid);
    CHECK(!gns_sample(1, NAN, 4).valid);
    CHECK(!gns_sample(INFINITY, 1, 4).valid);
    CHECK(!gns_sample(1, INFINITY, 4).valid);
    CHECK(!gns_sample(1e-320, 1e-320, 1 << 30).valid); // m underflows
    CHECK(gns_sample(1, 1, 2).valid);
}

// Groups against sums over the tensors' names; |G|^2 + tr(Sigma) = m in every group.
static void test_groups(void) {
    Backend backend;
    Toy* toy = open_toy(&backend, 20, 1, 8);
    StepStats stats = toy_stats(&toy->table);
    GnsSample s[NUM_GNS_GROUPS];
    toy_run_step(&backend, 11, GNS_ALL, &stats);
    gns_group_samples(&toy->table, &stats, s);
    const char* parts[NUM_GNS_GROUPS] = {"ln_", ".attn.", ".mlp.", ".wpe.", ".wte.", "", ""};
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        double sum_sq = 0, sq_sum = 0;
        for (int i = 0; i < toy->table.num_tensors; i++) {
            char name[80];
            int row, layer;
            tensor_at(&toy->table, i, &row, &layer);
            tensor_name(&toy->table, row, layer, name, sizeof name);
            if (strstr(name, parts[g]) != NULL && !(g == GNS_GROUP_TOTAL_NOWTE && row == WTE)) {
                sum_sq += stats.sum_sq[i];
                sq_sum += stats.sq_sum[i];
            }
        }
        CHECK(s[g].valid && s[g].n == 11);
        CHECK_CLOSE(s[g].m * 11 / sum_sq, 1, 1e-14);
        CHECK_CLOSE(s[g].n2 * 121 / sq_sum, 1, 1e-14);
        CHECK_CLOSE((s[g].gtg + s[g].trsigma) / s[g].m, 1, 1e-14);
    }
    CHECK_STR(gns_group_name(GNS_GROUP_LN), "ln");
    CHECK_STR(gns_group_name(GNS_GROUP_WPE), "wpe");
    CHECK_STR(gns_group_name(GNS_GROUP_TOTAL_NOWTE), "total_nowte");

    toy_run_step(&backend, 11, GNS_LN, &stats);
    gns_group_samples(&toy->table, &stats, s);
    for (int g = 0; g < NUM_GNS_GROUPS; g++) { CHECK(s[g].valid == (g == GNS_GROUP_LN)); }
    toy_run_step(&backend, 11, GNS_OFF, &stats);
    gns_group_samples(&toy->table, &stats, s);
    CHECK(!s[GNS_GROUP_LN].valid && !s[GNS_GROUP_TOTAL].valid);
    toy->nan_first = toy->nan_last = toy->step + 1;
    toy_run_step(&backend, 11, GNS_ALL, &stats);
    CHECK(stats.outcome == STEP_SKIPPED_NONFINITE);
    gns_group_samples(&toy->table, &stats, s);
    CHECK(!s[GNS_GROUP_LN].valid && !s[GNS_GROUP_TOTAL].valid);
    toy_stats_free(&stats);
    backend.close(toy);
}

// The toy keeps its promises: the same bits for every split into micro-batches, and the true G and Sigma on average.
static void test_toy(void) {
    Backend one, many;
    Toy* a = open_toy(&one, 20, 2, 64);
    Toy* b = open_toy(&many, 20, 2, 3);
    StepStats sa = toy_stats(&a->table), sb = toy_stats(&b->table);
    for (int step = 0; step < 5; step++) {
        toy_run_step(&one, 10 + step, GNS_ALL, &sa);
        toy_run_step(&many, 10 + step, GNS_ALL, &sb);
        CHECK(sa.loss == sb.loss && sa.grad_norm == sb.grad_norm);
        CHECK(memcmp(sa.sum_sq, sb.sum_sq, (size_t)a->table.num_tensors * sizeof(double)) == 0);
        CHECK(memcmp(sa.sq_sum, sb.sq_sum, (size_t)a->table.num_tensors * sizeof(double)) == 0);
        CHECK(memcmp(a->weight, b->weight, a->table.num_params * sizeof(float)) == 0);
    }
    enum { STEPS = 4000 };
    double sum[2] = {0}, squares[2] = {0};
    for (int step = 0; step < STEPS; step++) {
        GnsSample s[NUM_GNS_GROUPS];
        toy_run_step(&one, 6, GNS_LN, &sa);
        gns_group_samples(&a->table, &sa, s);
        double x[2] = {s[GNS_GROUP_LN].gtg, s[GNS_GROUP_LN].trsigma};
        for (int i = 0; i < 2; i++) {
            sum[i] += x[i];
            squares[i] += x[i] * x[i];
        }
    }
    const double truth[2] = {1, 20};
    for (int i = 0; i < 2; i++) { // within 3.5 standard errors: one seed in a thousand would fail
        double mean = sum[i] / STEPS, se = sqrt((squares[i] / STEPS - mean * mean) / STEPS);
        CHECK(fabs(mean - truth[i]) < 3.5 * se);
        CHECK(se < 0.05 * truth[i]);
    }
    CHECK(toy_gns(a, 1 << GROUP_LN) == 20);
    CHECK(toy_gns(a, -1) == (20 + 4 * 8) / 5.0);
    toy_stats_free(&sa);
    toy_stats_free(&sb);
    one.close(a);
    many.close(b);
}

// What get() and the state blob hand out is all that a toy needs to go on with the same bits. It refuses wrong calls.
static void test_toy_resume(void) {
    Backend from, to;
    Toy* a = open_toy(&from, 20, 3, 8);
    Toy* b = open_toy(&to, 20, 3, 8);
    StepStats sa = toy_stats(&a->table), sb = toy_stats(&b->table);
    for (int step = 0; step < 3; step++) { toy_run_step(&from, 5, GNS_ALL, &sa); }
    float values[1024];
    unsigned char blob[64];
    for (int i = 0; i < a->table.num_tensors; i++) {
        int row, layer;
        tensor_at(&a->table, i, &row, &layer);
        for (int what = TENSOR_WEIGHT; what <= TENSOR_V; what++) {
            from.get(a, row, layer, what, values);
            to.set(b, row, layer, what, values);
        }
    }
    CHECK(from.state_size(a) <= sizeof blob);
    from.state_get(a, blob);
    to.state_set(b, blob);
    for (int step = 0; step < 3; step++) {
        toy_run_step(&from, 5, GNS_ALL, &sa);
        toy_run_step(&to, 5, GNS_ALL, &sb);
        CHECK(sa.loss == sb.loss && sa.grad_norm == sb.grad_norm);
        CHECK(memcmp(a->weight, b->weight, a->table.num_params * sizeof(float)) == 0);
    }
    int tokens[TOY_T] = {0};
    StepHyper hyper;
    memset(&hyper, 0, sizeof hyper);
    hyper.n = 2;
    CHECK_DIES(from.micro(a, tokens, tokens, 1, TOY_T), "outside a step");
    CHECK_DIES((from.step_begin(a, GNS_LN), from.micro(a, tokens, tokens, 9, 1)), "at most 8 x 8");
    CHECK_DIES((from.step_begin(a, GNS_LN), from.micro(a, tokens, tokens, 1, 1), from.step_end(a, &hyper, &sa)),
               "n = 2 after 1");
    tokens[3] = TOY_V;
    CHECK_DIES((from.step_begin(a, GNS_LN), from.micro(a, tokens, tokens, 1, TOY_T)), "not in the vocabulary");
    toy_stats_free(&sa);
    toy_stats_free(&sb);
    from.close(a);
    to.close(b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Smoothing

// The recursions against the sums that they stand for, with steps and batches that change.
static void test_formula(void) {
    enum { N = 40 };
    const double tau = 1000;
    double f[N], n[N], tokens[N];
    uint64_t rng = 3;
    GnsTracker t;
    gns_tracker_init(&t, tau);
    CHECK(!gns_estimate(&t, GNS_GROUP_LN).valid);
    for (int i = 0; i < N; i++) {
        f[i] = 0.1 + 0.05 * splitmix64_uniform(&rng);
        n[i] = 2 + i % 7;
        tokens[i] = 16 * n[i];
        update(&t, sample_of(f[i], (int)n[i], exp(-0.5 * i)), tokens[i]); // the gradient's scale falls: no effect
        GnsEstimate e = gns_estimate(&t, GNS_GROUP_LN);
        CHECK(e.valid == (i >= 1) && e.count == i + 1);
        if (i == 0) { CHECK(e.gns == 0 && e.se == 0 && e.fraction == 0 && e.fraction_se == 0); }
    }
    double F = 0, W = 0, Q = 0, V = 0, VW = 0, age = 0;
    for (int i = N - 1; i >= 0; i--) { // age: tokens consumed since step i
        double w = (1 - exp(-tokens[i] / tau)) * exp(-age / tau);
        double wv = (1 - exp(-tokens[i] / (4 * tau))) * exp(-age / (4 * tau));
        F += w * f[i];
        W += w;
        Q += w * w / n[i];
        if (i > 0) {
            V += wv * (f[i] - f[i - 1]) * (f[i] - f[i - 1]) / (1 / n[i] + 1 / n[i - 1]);
            VW += wv;
        }
        age += tokens[i];
    }
    GnsEstimate e = gns_estimate(&t, GNS_GROUP_LN);
    double fraction = F / W, se = sqrt(V / VW * Q) / W;
    CHECK_CLOSE(e.fraction / fraction, 1, 1e-12);
    CHECK_CLOSE(e.fraction_se / se, 1, 1e-10);
    CHECK_CLOSE(e.gns, 1 / fraction - 1, 1e-12);
    CHECK_CLOSE(e.se, se / (fraction * fraction), 1e-10);
}

// Steps without a sample (NaN, skipped, not measured) teach nothing but age what is known.
static void test_gaps(void) {
    GnsTracker t, direct;
    gns_tracker_init(&t, 100);
    gns_tracker_init(&direct, 100);
    update(&t, sample_of(0.1, 4, 1), 10);
    update(&t, gns_sample(NAN, NAN, 4), 20);
    gns_tracker_update(&t, NULL, 30);
    update(&t, sample_of(0.2, 4, 1), 40);
    update(&direct, sample_of(0.1, 4, 1), 10);
    update(&direct, sample_of(0.2, 4, 1), 90);
    GnsEstimate a = gns_estimate(&t, GNS_GROUP_LN), b = gns_estimate(&direct, GNS_GROUP_LN);
    CHECK(a.valid && a.count == 2);
    CHECK(a.gns == b.gns && a.se == b.se);
    double w1 = (1 - exp(-0.1)) * exp(-0.9), w2 = 1 - exp(-0.9);
    CHECK_CLOSE(a.fraction, (w1 * 0.1 + w2 * 0.2) / (w1 + w2), 1e-14);
}

// Never NaN or Inf, and never a number where there is none.
static void test_always_finite(void) {
    const double fractions[] = {1, 1, 0, 1e-300, -0.3, -1, 1e-160, 1e-17, 0.5};
    uint64_t rng = 4;
    GnsTracker t;
    for (int run = 0; run < 200; run++) {
        gns_tracker_init(&t, run % 2 ? 1 : 1e12);
        for (int i = 0; i < 30; i++) {
            double f = fractions[splitmix64(&rng) % (sizeof fractions / sizeof fractions[0])];
            double scale = exp2((double)(splitmix64(&rng) % 1800) - 900);
            GnsSample s = sample_of(f, 2, scale), all[NUM_GNS_GROUPS];
            for (int g = 0; g < NUM_GNS_GROUPS; g++) { all[g] = s; }
            gns_tracker_update(&t, all, splitmix64(&rng) % 3 ? 16 : 1e15);
            GnsEstimate e = gns_estimate(&t, GNS_GROUP_LN);
            GnsCalibration c = gns_calibration(&t);
            CHECK(isfinite(e.gns) && isfinite(e.se) && isfinite(e.fraction) && isfinite(e.fraction_se));
            CHECK(e.gns >= 0 && e.se >= 0 && (!e.valid || e.fraction > 0));
            CHECK(e.valid || (e.gns == 0 && e.se == 0));
            CHECK(isfinite(c.value) && isfinite(c.se) && c.valid == (c.value > 0));
        }
    }
    gns_tracker_init(&t, 100);
    for (int i = 0; i < 10; i++) { // identical examples: no noise at all
        update(&t, gns_sample(4 * 0.1, 16 * 0.1, 4), 10);
    }
    CHECK(gns_estimate(&t, GNS_GROUP_LN).valid && gns_estimate(&t, GNS_GROUP_LN).gns < 1e-12);
    for (int i = 0; i < 1000; i++) { // opposite ones: no signal at all
        update(&t, gns_sample(2, 0, 2), 10);
    }
    CHECK(!gns_estimate(&t, GNS_GROUP_LN).valid && gns_estimate(&t, GNS_GROUP_LN).fraction < 0);
}

// Runs the toy and asks the estimate every three tau (nearly independent looks): how often does the truth lie within
// two standard errors, and is the mean of the fractions the true one? Between two looks the batch ramps from n1 to n2.
static void coverage(double gns, double steps_per_tau, int n1, int n2, int looks) {
    Backend backend;
    Toy* toy = open_toy(&backend, gns, 5, 64);
    StepStats stats = toy_stats(&toy->table);
    GnsTracker t;
    gns_tracker_init(&t, steps_per_tau * (n1 + n2) / 2 * TOY_T);
    const double truth = 1 / (1 + gns);
    double covered = 0, sum = 0, squares = 0;
    for (int look = 0; look < looks; look++) {
        const int64_t end = toy->tokens + (int64_t)(3 * t.tau);
        const int64_t start = toy->tokens;
        while (toy->tokens < end) {
            double u = (double)(toy->tokens - start) / (3 * t.tau);
            int n = (int)lrint(n1 + (n2 - n1) * u);
            GnsSample s[NUM_GNS_GROUPS];
            toy_run_step(&backend, n, GNS_LN, &stats);
            gns_group_samples(&toy->table, &stats, s);
            gns_tracker_update(&t, s, n * TOY_T);
        }
        GnsEstimate e = gns_estimate(&t, GNS_GROUP_LN);
        covered += fabs(e.fraction - truth) <= 2 * e.fraction_se;
        sum += e.fraction;
        squares += e.fraction * e.fraction;
    }
    double mean = sum / looks, se = sqrt((squares / looks - mean * mean) / looks), share = covered / looks;
    printf("  gns %g, %g steps per tau, batch %d-%d: +-2 SE covers %.3f, bias of f %+.2f%% +- %.2f%%\n", gns,
           steps_per_tau, n1, n2, share, 100 * (mean / truth - 1), 100 * se / truth);
    // 0.954 is meant; three binomial standard deviations either side, and 0.01 for what the normal law neglects.
    double tolerance = 3 * sqrt(0.954 * 0.046 / looks) + 0.01;
    CHECK(fabs(share - 0.954) < tolerance);
    // f_t is a ratio, too small by at most about 4 / (n d) of itself (gtg and m share the noise along G); the
    // LayerNorm tensors of the toy have d = 24 numbers. Beyond that, three standard errors.
    CHECK(fabs(mean / truth - 1) < 3 * se / truth + 4.0 / (n1 * 24));
    toy_stats_free(&stats);
    backend.close(toy);
}

static void test_coverage(void) {
    coverage(57, 30, 32, 32, 300);
    coverage(57, 5, 32, 32, 1000); // few steps per tau
    coverage(10, 30, 24, 24, 300);
    coverage(57, 30, 16, 48, 300); // the batch changes
}

// GNS_total / GNS_ln from the steps that measured both, here every tenth, while the LayerNorm's batch goes on.
static void test_calibration(void) {
    Backend backend;
    Toy* toy = open_toy(&backend, 20, 6, 32);
    for (int g = 0; g < NUM_PARAM_GROUPS; g++) { toy->noise[g] = g == GROUP_LN ? 20 : 35; }
    const double truth = toy_gns(toy, -1) / toy_gns(toy, 1 << GROUP_LN); // (20 + 4 * 35) / 5 / 20 = 1.6
    StepStats stats = toy_stats(&toy->table);
    GnsTracker t;
    gns_tracker_init(&t, 200.0 * 32 * TOY_T);
    CHECK(!gns_calibration(&t).valid && gns_calibration(&t).value == 0);
    int near = 0, looks = 0;
    for (int step = 0; step < 6000; step++) {
        GnsSample s[NUM_GNS_GROUPS];
        toy_run_step(&backend, 32, step % 10 == 0 ? GNS_ALL : GNS_LN, &stats);
        gns_group_samples(&toy->table, &stats, s);
        gns_tracker_update(&t, s, 32 * TOY_T);
        if (step % 500 == 499) {
            GnsCalibration c = gns_calibration(&t);
            CHECK(c.valid && c.count == step / 10 + 1);
            near += fabs(c.value - truth) < 2 * c.se;
            looks++;
        }
    }
    GnsCalibration c = gns_calibration(&t);
    printf("  calibration %.3f +- %.3f, true %.3f; %d of %d looks within 2 SE\n", c.value, c.se, truth, near, looks);
    CHECK(near >= looks - 2); // the looks hang together, so that two may miss
    CHECK(c.se < 0.1 * truth);
    CHECK(gns_estimate(&t, GNS_GROUP_LN).count == 6000 && gns_estimate(&t, GNS_GROUP_TOTAL).count == 600);
    // The total itself, from a tenth of the steps, by the clock of tokens.
    GnsEstimate total = gns_estimate(&t, GNS_GROUP_TOTAL);
    CHECK(fabs(total.gns - 32) < 3 * total.se && total.se < 5);
    toy_stats_free(&stats);
    backend.close(toy);
}

// A tracker that is written, read and goes on gives the same bits as one that was never interrupted.
static void test_state(void) {
    Backend backend;
    Toy* toy = open_toy(&backend, 20, 7, 32);
    StepStats stats = toy_stats(&toy->table);
    GnsTracker t, read;
    gns_tracker_init(&t, 50.0 * 8 * TOY_T);
    gns_tracker_init(&read, t.tau); // a setting, not state
    for (int step = 0; step < 60; step++) {
        GnsSample s[NUM_GNS_GROUPS];
        toy_run_step(&backend, 4 + step % 5, step % 7 == 0 ? GNS_ALL : GNS_LN, &stats);
        gns_group_samples(&toy->table, &stats, s);
        gns_tracker_update(&t, s, (4 + step % 5) * TOY_T);
        if (step >= 30) { gns_tracker_update(&read, s, (4 + step % 5) * TOY_T); }
        if (step == 29) {
            StateFile out, in;
            memset(&out, 0, sizeof out);
            out.writing = true;
            gns_state(&out, &t);
            memset(&in, 0, sizeof in);
            in.text = out.text;
            gns_state(&in, &read);
            CHECK_STR(in.error, "");
            CHECK(in.cursor == out.length);
            free(out.text);
        }
    }
    CHECK(memcmp(&t, &read, sizeof t) == 0);
    toy_stats_free(&stats);
    backend.close(toy);
}

int main(void) {
    RUN(test_sample);
    RUN(test_no_sample);
    RUN(test_groups);
    RUN(test_toy);
    RUN(test_toy_resume);
    RUN(test_formula);
    RUN(test_gaps);
    RUN(test_always_finite);
    RUN(test_coverage);
    RUN(test_calibration);
    RUN(test_state);
    return test_summary();
}
