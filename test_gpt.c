/*
Whole-model tests of the CPU trainer. It is built twice, with real = float and (-DREAL=double) with real = double, and both
must pass. From top to bottom:

    1. Helpers
    2. Kernels       each against its definition, written as plain loops in double, on shapes around the blocks' edges
    3. Gradients     of every tensor against central differences of the loss (double only: in float the differences are noise)
    4. GNS           per-example norms of every tensor against one backward pass an example, whatever the micro-batches
    5. Step          AdamW, guards, padding, evaluation, the same bits for any number of threads
    6. A small run   its losses frozen

Tolerances are given for both builds, bound(float, double), and come from the number of roundings, as said at each.
*/

#define TRAIN_GPT_NO_MAIN
#include "train_gpt.c"
#include "dev/test/test.h"
#include "llmc/gns.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Helpers

// The largest relative error of one rounding.
#define EPS (REAL_IS_DOUBLE ? 0x1p-53 : 0x1p-24)

static double bound(double in_float, double in_double) { return REAL_IS_DOUBLE ? in_double : in_float; }

// |found - expected| <= tolerance; NaN fails. what (a format) says where.
PRINTF_LIKE(4, 5) static bool check_near(double found, double expected, double tolerance, const char* what, ...) {
    if (fabs(found - expected) <= tolerance) { return true; }
    va_list args;
    va_start(args, what);
    checks_failed++;
    printf("  failed: ");
    vprintf(what, args);
    printf(": %.9g, expected %.9g +- %.2g\n", found, expected, tolerance);
    va_end(args);
    return false;
}

// The same for n numbers; reports the first that is wrong.
static void check_all_near(const real* found, const double* expected, size_t n, double tolerance, const char* what) {
    for (size_t i = 0; i < n; i++) {
        if (!check_near((double)found[i], expected[i], tolerance, "%s, element %zu of %zu", what, i, n)) { return; }
    }
}

static double draw(uint64_t* rng) { return 2 * splitmix64_uniform(rng) - 1; }

static real* zero_reals(size_t n) { return (real*)alloc_zeroed(n, sizeof(real), "a test"); }
static double* zero_doubles(size_t n) { return (double*)alloc_zeroed(n, sizeof(double), "a test"); }

// n numbers uniform in [-1, 1).
static real* random_reals(size_t n, uint64_t seed) {
    real* x = zero_reals(n);
    for (size_t i = 0; i < n; i++) { x[i] = (real)draw(&seed); }
    return x;
}

static double* doubles_of(const real* x, size_t n) {
    double* y = zero_doubles(n);
    for (size_t i = 0; i < n; i++) { y[i] = (double)x[i]; }
    return y;
}

static double square_norm(const real* x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) { sum += (double)x[i] * (double)x[i]; }
    return sum;
}

static double largest_magnitude(const double* x, size_t n) {
    double top = 0;
    for (size_t i = 0; i < n; i++) { top = fabs(x[i]) > top ? fabs(x[i]) : top; }
    return top;
}

static void workspace_free(Workspace* ws) {
    free(ws->a);
    free(ws->b);
    free(ws->rows);
    free(ws->heads);
    free(ws->partial);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Kernels

enum { LAYOUT_NN, LAYOUT_NT, LAYOUT_TN, NUM_LAYOUTS };

// One product of random matrices against the definition. example > 0: with per-example norms, K = a multiple of it.
// Four columns of C lie outside the product and must stay as they are.
static void check_gemm(Workspace* ws, int layout, int M, int N, int K, real alpha, bool accumulate, bool with_bias,
                       int example) {
    const size_t ldc = (size_t)N + 4, size = (size_t)M * ldc;
    real *a = random_reals((size_t)M * (size_t)K, 1), *b = random_reals((size_t)K * (size_t)N, 2);
    real *c = random_reals(size, 3), *bias = random_reals((size_t)N, 4);
    double *expected = doubles_of(c, size), sum_sq = 0.5, expected_sum_sq = 0.5;
    Gemm g = product(M, N, K, layout == LAYOUT_TN ? transposed(a, M) : row_major(a, K),
                     layout == LAYOUT_NT ? transposed(b, K) : row_major(b, N), c);
    g.ldc = ldc;
    g.alpha = alpha;
    g.accumulate = accumulate;
    g.bias = with_bias ? bias : NULL;
    g.example = example;
    g.sum_sq = example > 0 ? &sum_sq : NULL;
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            double total = 0, part = 0;
            for (int k = 0; k < K; k++) {
                part += (double)a[(size_t)m * g.a.row + (size_t)k * g.a.col] *
                        (double)b[(size_t)k * g.b.row + (size_t)n * g.b.col];
                if (k + 1 == K || (example > 0 && (k + 1) % example == 0)) { // an example ends
                    expected_sum_sq += (double)alpha * (double)alpha * part * part;
                    total += part;
                    part = 0;
                }
            }
            double* e = &expected[(size_t)m * ldc + (size_t)n];
            *e = (accumulate ? *e : 0) + (double)alpha * total + (with_bias ? (double)bias[n] : 0);
        }
    }
    gemm(ws, &g);
    char what[128];
    snprintf(what, sizeof what, "gemm layout %d, M %d, N %d, K %d, example %d", layout, M, N, K, example);
    // K roundings of partial sums of size sqrt(K)/3 that err both ways make K EPS/3; a dozen times that is the worst of millions.
    check_all_near(c, expected, size, 4 * (K + 4) * EPS, what);
    // Squares of numbers that err by up to sqrt(K) EPS of their size, summed in vectors of at most 24 numbers.
    if (example > 0) { check_near(sum_sq / expected_sum_sq, 1, bound(5e-6, 1e-13), "%s, sum_sq", what); }
    free(a);
    free(b);
    free(c);
    free(bias);
    free(expected);
}

static void test_gemm_shapes(void) {
    const int edges[] = {1,           2,       MR - 1,      MR,         MR + 1,       NR - 1,
                         NR,          NR + 1,  TASK_M,      TASK_M + 1, TASK_N - 1,   TASK_N + 1,
                         BLOCK_K - 1, BLOCK_K, BLOCK_K + 1, BLOCK_MN,   BLOCK_MN + 1, 2 * BLOCK_K + 1};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        for (int layout = 0; layout < NUM_LAYOUTS; layout++) {
            check_gemm(&ws, layout, edges[i], 5, 3, 1, false, false, 0);
            check_gemm(&ws, layout, 3, edges[i], 5, 1, false, false, 0);
            check_gemm(&ws, layout, 5, 3, edges[i], 1, false, false, 0);
        }
    }
    for (int layout = 0; layout < NUM_LAYOUTS; layout++) {
        check_gemm(&ws, layout, BLOCK_MN + MR + 1, BLOCK_MN + NR + 1, 2, 1, false, false, 0);
        check_gemm(&ws, layout, TASK_M + 1, TASK_N + 1, 17, 1, false, false, 0);
    }
    workspace_free(&ws);
}

static void test_gemm_options(void) {
    Workspace ws = {0};
    for (int layout = 0; layout < NUM_LAYOUTS; layout++) {
        for (int k = 7; k < 1000; k += 400) { // one, two and three blocks of k
            check_gemm(&ws, layout, 2 * MR + 3, NR + 5, k, (real)0.75, false, false, 0);
            check_gemm(&ws, layout, 2 * MR + 3, NR + 5, k, (real)-0.75, true, false, 0);
            check_gemm(&ws, layout, 2 * MR + 3, NR + 5, k, 1, false, true, 0);
        }
    }
    workspace_free(&ws);
}

static void test_gemm_two_accumulators(void) {
    const int lengths[] = {1, 5, 64, 191, BLOCK_K, BLOCK_K + 16};
    const int shapes[][2] = {{BLOCK_MN + 3, 3}, {3, BLOCK_MN + 3}, {TASK_M + 1, TASK_N + 1}};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (int examples = 1; examples <= 7; examples += 3) {
            const int K = examples * lengths[i];
            check_gemm(&ws, LAYOUT_TN, 1, 1, K, 1, false, false, lengths[i]);
            check_gemm(&ws, LAYOUT_TN, MR + 1, NR + 2, K, (real)0.7, examples == 4, false, lengths[i]);
        }
    }
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_gemm(&ws, LAYOUT_TN, shapes[i][0], shapes[i][1], 15, (real)0.7, false, false, 5);
    }
    check_gemm(&ws, LAYOUT_TN, TASK_M + 1, NR + 2, 3 * BLOCK_K, 1, false, false, 12); // blocks of many examples
    workspace_free(&ws);
}

static void test_exp(void) {
    double worst = 0;
    for (int i = 0; i <= 400000; i++) {
        const real x = (real)(-87 + 175 * (i / 400000.0));
        const double e = exp((double)x), error = fabs((double)exp_real(x) - e) / e;
        worst = error > worst || isnan(error) ? error : worst;
    }
    CHECK(worst <= 4 * EPS); // 2 ulp are at most 4 roundings
    CHECK(exp_real(0) == 1);
    CHECK(exp_real((real)-INFINITY) == 0);
    CHECK(exp_real(-1000) == 0);
    // Above 88 the float version stays at e^88.
    CHECK(exp_real(1000) > (real)1e38);
    CHECK(exp_real((real)INFINITY) > (real)1e38);
    CHECK(isnan(exp_real((real)NAN)));
}

static void test_erf(void) {
    double worst = 0;
    for (int i = 0; i <= 400000; i++) {
        const real x = (real)(-10 + 20 * (i / 400000.0));
        const double error = fabs((double)erf_real(x) - erf((double)x));
        worst = error > worst || isnan(error) ? error : worst;
    }
    CHECK(worst <= bound(5e-7, 1e-15)); // the error that the approximation claims
    CHECK(erf_real(0) == 0);
    CHECK_CLOSE((double)erf_real((real)INFINITY), 1, bound(5e-7, 1e-15));
    CHECK_CLOSE((double)erf_real((real)-INFINITY), -1, bound(5e-7, 1e-15));
    CHECK(isnan(erf_real((real)NAN)));
}

// GELU as its papers define it, with the C library's functions, and its derivative.
static double gelu_definition(double x, int form, double* slope) {
    if (form == GELU_ERF) {
        const double phi = 0.5 * erfc(-x / sqrt(2)), density = exp(-x * x / 2) / sqrt(2 * M_PI);
        *slope = phi + x * density;
        return x * phi;
    }
    const double a = sqrt(2 / M_PI), t = tanh(a * (x + 0.044715 * x * x * x));
    *slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 3 * 0.044715 * x * x);
    return 0.5 * x * (1 + t);
}

static void test_gelu(void) {
    enum { N = 100003 };
    real *x = zero_reals(N), *out = zero_reals(N), *again = zero_reals(N), *dout = zero_reals(N);
    for (int form = GELU_TANH; form <= GELU_ERF; form++) {
        for (int i = 0; i < N; i++) {
            const double s = -1 + 2 * (i / (N - 1.0));
            x[i] = (real)(1000 * s * s * s); // dense near 0
            dout[i] = (real)(i % 2 == 0 ? 1 : -2);
        }
        gelu_forward(out, x, form, N);
        gelu_backward(dout, again, x, form, N);
        double worst = 0, worst_slope = 0;
        for (int i = 0; i < N; i++) {
            double slope, y = gelu_definition((double)x[i], form, &slope);
            const double scale = fabs((double)x[i]) > 1 ? fabs((double)x[i]) : 1;
            double error = (fabs((double)out[i] - y) + fabs((double)again[i] - (double)out[i])) / scale;
            double slope_error = fabs((double)dout[i] / (i % 2 == 0 ? 1 : -2) - slope);
            worst = error > worst || isnan(error) ? error : worst;
            worst_slope = slope_error > worst_slope || isnan(slope_error) ? slope_error : worst_slope;
        }
        // The value, relative to |x|: half the error of erf, or that of the exponential, and a few roundings. The slope: the
        // rounding of an exponent of up to 20, times x times the exponent's own slope.
        CHECK(worst <= bound(4e-7, 1e-14));
        CHECK(worst_slope <= bound(4e-6, 1e-14));
        real slope;
        CHECK(isnan(gelu_one((real)NAN, form, &slope)) && isnan(slope));
        CHECK(isinf(gelu_one((real)INFINITY, form, &slope)));
        CHECK(!isfinite(gelu_one((real)-INFINITY, form, &slope))); // an activation that overflowed must not vanish
    }
    free(x);
    free(out);
    free(again);
    free(dout);
}

// One LayerNorm, forward and backward, against the definition.
static void check_layernorm(Workspace* ws, int B, int T, int C) {
    const size_t N = (size_t)B * (size_t)T, n = N * (size_t)C, c = (size_t)C;
    real *inp = random_reals(n, 1), *branch = random_reals(n, 2), *weight = random_reals(c, 3),
         *bias = random_reals(c, 4);
    real *dout = random_reals(n, 5), *dinp = random_reals(n, 6), *dweight = random_reals(c, 7),
         *dbias = random_reals(c, 8);
    real *residual = zero_reals(n), *out = zero_reals(n), *again = zero_reals(n), *mean = zero_reals(N),
         *rstd = zero_reals(N);
    double *x = zero_doubles(n), *y = zero_doubles(n), *dx = doubles_of(dinp, n), *dw = doubles_of(dweight, c),
           *db = doubles_of(dbias, c);
    double *dw_b = zero_doubles(c), *db_b = zero_doubles(c);
    double sums[2] = {0.5, 0.25}, found[2] = {0.5, 0.25}; // the norms gain what they have
    const double mult = 0.75;
    for (size_t i = 0; i < N; i++) {
        double m = 0, v = 0, sum = 0, dot = 0;
        for (size_t k = 0; k < c; k++) {
            m += (x[i * c + k] = (double)inp[i * c + k] + mult * (double)branch[i * c + k]) / C;
        }
        for (size_t k = 0; k < c; k++) { v += (x[i * c + k] - m) * (x[i * c + k] - m) / C; }
        const double r = 1 / sqrt(v + 1e-5);
        for (size_t k = 0; k < c; k++) {
            const double xhat = (x[i * c + k] - m) * r, d = (double)dout[i * c + k];
            y[i * c + k] = xhat * (double)weight[k] + (double)bias[k];
            sum += d * (double)weight[k] / C;
            dot += d * (double)weight[k] * xhat / C;
            dw_b[k] += d * xhat;
            db_b[k] += d;
        }
        for (size_t k = 0; k < c; k++) {
            dx[i * c + k] += r * ((double)dout[i * c + k] * (double)weight[k] - sum - (x[i * c + k] - m) * r * dot);
        }
        for (size_t k = 0; k < c && (i + 1) % (size_t)T == 0; k++) { // an example ends
            dw[k] += dw_b[k];
            db[k] += db_b[k];
            sums[0] += dw_b[k] * dw_b[k];
            sums[1] += db_b[k] * db_b[k];
            dw_b[k] = db_b[k] = 0;
        }
    }
    layernorm_forward(residual, out, mean, rstd, inp, branch, (real)mult, weight, bias, (int)N, C);
    layernorm_recompute(again, residual, mean, rstd, weight, bias, (int)N, C);
    layernorm_backward(ws, dinp, dweight, dbias, &found[0], &found[1], dout, residual, mean, rstd, weight, B, T, C);
    // A row's numbers err by a few roundings, times rstd: at most about 20 in these rows, but for C = 1, where all differences
    // are exactly 0. Sums run over B*T rows.
    check_all_near(residual, x, n, 4 * EPS, "layernorm residual");
    check_all_near(out, y, n, bound(1e-5, 2e-14), "layernorm out");
    check_all_near(again, y, n, bound(1e-5, 2e-14), "layernorm recomputed");
    check_all_near(dinp, dx, n, bound(1e-4, 2e-13), "layernorm dinp");
    check_all_near(dweight, dw, c, bound(1e-4, 2e-13), "layernorm dweight");
    check_all_near(dbias, db, c, bound(1e-4, 2e-13), "layernorm dbias");
    check_near(found[0], sums[0], bound(1e-5, 2e-14) * sums[0], "layernorm sum_b |dweight_b|^2, C %d", C);
    check_near(found[1], sums[1], bound(1e-5, 2e-14) * sums[1], "layernorm sum_b |dbias_b|^2, C %d", C);
    void* parts[] = {inp,   branch, weight, bias, dout, dinp, dweight, dbias, residual, out,
                     again, mean,   rstd,   x,    y,    dx,   dw,      db,    dw_b,     db_b};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) { free(parts[i]); }
}

static void test_layernorm(void) {
    const int shapes[][3] = {{1, 1, 1},    {2, 3, 2},   {1, 1, 5},   {2, 33, 7},   {3, 32, 48},
                             {1, 65, 100}, {2, 64, 64}, {5, 31, 65}, {2, 200, 129}};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_layernorm(&ws, shapes[i][0], shapes[i][1], shapes[i][2]);
    }
    // Without a branch the input is normalised as it stands.
    real inp[3] = {1, 2, 6}, out[3], mean, rstd, weight[3] = {1, 1, 1}, bias[3] = {0, 0, 0};
    layernorm_forward(NULL, out, &mean, &rstd, inp, NULL, 1, weight, bias, 1, 3);
    CHECK_CLOSE((double)mean, 3, 4 * EPS);
    CHECK_CLOSE((double)rstd, 1 / sqrt(14.0 / 3 + 1e-5), 4 * EPS);
    CHECK_CLOSE((double)out[2], 3 / sqrt(14.0 / 3 + 1e-5), 8 * EPS);
    workspace_free(&ws);
}

static void test_bias_backward(void) {
    const int shapes[][3] = {{1, 1, 1}, {2, 31, 63}, {2, 32, 64}, {3, 33, 65}, {5, 100, 130}};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const int B = shapes[i][0], T = shapes[i][1], OC = shapes[i][2];
        const double alpha = 0.75;
        real *dout = random_reals((size_t)(B * T * OC), 1), *dbias = random_reals((size_t)OC, 2);
        double *expected = doubles_of(dbias, (size_t)OC), sum_sq = 0.5, found_sum_sq = 0.5;
        for (int n = 0; n < OC; n++) {
            for (int b = 0; b < B; b++) {
                double part = 0;
                for (int t = 0; t < T; t++) { part += alpha * (double)dout[(b * T + t) * OC + n]; }
                expected[n] += part;
                sum_sq += part * part;
            }
        }
        bias_backward(&ws, dbias, &found_sum_sq, dout, (real)alpha, B, T, OC);
        check_all_near(dbias, expected, (size_t)OC, 4 * (B * T + 4) * EPS, "dbias"); // as for a product with K = B*T
        check_near(found_sum_sq, sum_sq, bound(1e-5, 1e-13) * sum_sq, "sum_b |dbias_b|^2, T %d", T);
        free(dout);
        free(dbias);
        free(expected);
    }
    workspace_free(&ws);
}

static void test_sum_of_squares(void) {
    const size_t lengths[] = {1, 15, 1023, 1024, 1025, 16383, 16384, 16385, 40001};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        real* x = random_reals(lengths[i], i);
        const double expected = square_norm(x, lengths[i]);
        check_near(sum_of_squares(&ws, x, lengths[i]), expected, bound(1e-6, 1e-14) * expected, "|x|^2, n %zu",
                   lengths[i]);
        x[lengths[i] - 1] = (real)NAN;
        CHECK(isnan(sum_of_squares(&ws, x, lengths[i])));
        free(x);
    }
    workspace_free(&ws);
}

// Embeddings forward and backward; the norms through the tied head's rows, which here are random.
static void test_embedding(void) {
    enum { B = 3, T = 41, C = 70, V = 7, MAX_T = 50 };
    const size_t N = B * T, n = N * C;
    int tokens[B * T], order[B * T], group[B * T], groups[B];
    uint64_t rng = 9;
    for (size_t i = 0; i < N; i++) { // the last token never occurs
        tokens[i] = (int)(splitmix64(&rng) % (V - 1));
    }
    group_tokens(order, group, groups, tokens, B, T, V);
    real *wte = random_reals(V * C, 1), *wpe = random_reals(MAX_T * C, 2), *out = zero_reals(n),
         *dout = random_reals(n, 3);
    real *dwte = random_reals(V * C, 4), *dwpe = random_reals(MAX_T * C, 5), *head_rows = random_reals(n, 6);
    double *y = zero_doubles(n), *ewte = doubles_of(dwte, V * C), *ewpe = doubles_of(dwpe, MAX_T * C);
    double sums[2] = {0.5, 0.25}, found[2] = {0.5, 0.25};
    for (int b = 0; b < B; b++) {
        double e[V][C] = {{0}}, u[V][C] = {{0}};
        for (int i = 0; i < T; i++) { // order is a permutation of the positions; a group is one token
            const int at = b * T + i, t = order[at];
            for (int c = 0; c < C; c++) { u[tokens[b * T + t]][c] = (double)head_rows[(b * T + group[at]) * C + c]; }
        }
        for (int t = 0; t < T; t++) {
            const int bt = b * T + t;
            for (int c = 0; c < C; c++) {
                y[bt * C + c] = 0.75 * ((double)wte[tokens[bt] * C + c] + (double)wpe[t * C + c]);
                const double d = (double)dout[bt * C + c];
                e[tokens[bt]][c] += d;
                ewpe[t * C + c] += d;
                sums[1] += d * d;
            }
        }
        for (int v = 0; v < V; v++) {
            for (int c = 0; c < C; c++) {
                ewte[v * C + c] += e[v][c];
                sums[0] += (e[v][c] + u[v][c]) * (e[v][c] + u[v][c]) - u[v][c] * u[v][c];
            }
        }
    }
    Workspace ws = {0};
    embedding_forward(out, tokens, wte, wpe, (real)0.75, B, T, C);
    embedding_backward(&ws, dwte, dwpe, &found[0], &found[1], dout, tokens, order, group, head_rows, B, T, C);
    check_all_near(out, y, n, 4 * EPS, "embedding");
    check_all_near(dwte, ewte, V * C, 100 * EPS, "dwte"); // about B*T/V numbers a row
    check_all_near(dwpe, ewpe, MAX_T * C, 8 * EPS, "dwpe");
    check_near(found[0], sums[0], bound(1e-5, 1e-13) * sums[0], "sum_b |e_b|^2 + 2 <e_b, u_b>");
    check_near(found[1], sums[1], bound(1e-6, 1e-13) * sums[1], "sum_b |dwpe_b|^2");
    void* parts[] = {wte, wpe, out, dout, dwte, dwpe, head_rows, y, ewte, ewpe};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) { free(parts[i]); }
    workspace_free(&ws);
}

// The positions of each example are permuted so that equal tokens are neighbours, and numbered in that order.
static void test_group_tokens(void) {
    const int tokens[] = {4, 1, 4, 4, 1, 0, 3, 3, 3, 3, 3, 3};
    int order[12], group[12], groups[2];
    group_tokens(order, group, groups, tokens, 2, 6, 5);
    const int expected_order[] = {5, 1, 4, 0, 2, 3, 0, 1, 2, 3, 4, 5},
              expected_group[] = {0, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0};
    CHECK(memcmp(order, expected_order, sizeof order) == 0);
    CHECK(memcmp(group, expected_group, sizeof group) == 0);
    CHECK(groups[0] == 3 && groups[1] == 1);
}

static void test_softmax_cross_entropy(void) {
    enum { N = 5, EXTRA = 3 };
    const int vocabularies[] = {1, 2, 15, 16, 17, 31, 50, 1000};
    const double sizes[] = {1, 30, 1e4}; // of the logits: flat, peaked, one probability 1 and the others 0
    for (size_t i = 0; i < 3 * sizeof vocabularies / sizeof vocabularies[0]; i++) {
        const int V = vocabularies[i / 3], stride = V + EXTRA;
        const double scale = 0.25;
        real *x = random_reals((size_t)(N * stride), i), losses[N];
        int targets[N] = {0, V / 2, -1, V - 1, 0};
        for (int k = 0; k < N * stride; k++) { x[k] *= (real)sizes[i % 3]; }
        double *expected = doubles_of(x, (size_t)(N * stride)), expected_losses[N] = {0};
        for (int n = 0; n < N; n++) {
            double *e = expected + n * stride, top = -INFINITY, sum = 0, target = targets[n] >= 0 ? e[targets[n]] : 0;
            for (int v = 0; v < V; v++) { top = e[v] > top ? e[v] : top; }
            for (int v = 0; v < V; v++) { sum += exp(e[v] - top); }
            if (targets[n] >= 0) { expected_losses[n] = log(sum) + top - target; }
            for (int v = 0; v < V; v++) {
                e[v] = targets[n] < 0 ? 0 : scale * (exp(e[v] - top) / sum - (v == targets[n]));
            }
        }
        softmax_cross_entropy(x, losses, targets, (real)scale, N, V, (size_t)stride);
        // The sum of V exponentials, each within 4 roundings; a loss of 10^4 has that many times the rounding error. What
        // lies past V is untouched.
        check_all_near(x, expected, (size_t)(N * stride), 8 * EPS, "gradient of logits");
        check_all_near(losses, expected_losses, N, 20 * EPS * (1 + sizes[i % 3]), "losses");
        free(x);
        free(expected);
    }
    for (int at = 0; at < 40; at++) { // one NaN anywhere reaches the loss
        real x[40] = {0}, loss;
        const int target = 7;
        x[at] = (real)NAN;
        softmax_cross_entropy(x, &loss, &target, 1, 1, 40, 40);
        CHECK(isnan(loss) && isnan(x[0]) && isnan(x[39]));
    }
}

// The norm of x (n), not below cosine attention's floor; 1 where nothing is normalised.
static double divisor(const real* x, int n, bool cosine) {
    const double norm = sqrt(square_norm(x, (size_t)n));
    return !cosine ? 1 : norm > 1e-12 ? norm : 1e-12;
}

// The gradient g at x / |x| becomes that at x; below the floor the division is by a constant.
static void divide_backward(double* g, const real* x, int n, bool cosine) {
    const double d = divisor(x, n, cosine);
    double dot = 0;
    for (int i = 0; i < n && d > 1e-12; i++) { dot += g[i] * (double)x[i] / d; }
    for (int i = 0; i < n; i++) { g[i] = (g[i] - (cosine ? (double)x[i] / d * dot : 0)) / d; }
}

// Causal attention by its definition, one query after the other. out (B, T, C), lse (B, NH, T), dqkv like qkv, from zero.
static void attention_definition(const Attention* a, const real* dout, double* out, double* lse, double* dqkv) {
    const int T = a->T, C = a->C, HS = C / a->NH;
    double *p = zero_doubles((size_t)T), *dp = zero_doubles((size_t)T);
    for (int bht = 0; bht < a->B * a->NH * T; bht++) {
        const int b = bht / (a->NH * T), head = bht / T % a->NH * HS, t = bht % T;
        const size_t row = (size_t)(b * T + t) * (size_t)C + (size_t)head,
                     first = (size_t)(b * T) * 3 * (size_t)C + (size_t)head;
        const real* q = a->qkv + first + (size_t)t * 3 * (size_t)C;
        const double q_norm = divisor(q, HS, a->cosine);
        double top = -INFINITY, sum = 0, mean = 0, *dq = dqkv + (q - a->qkv);
        for (int u = 0; u <= t; u++) {
            const real* k = a->qkv + first + (size_t)u * 3 * (size_t)C + C;
            const double factor = (double)a->scale / q_norm / divisor(k, HS, a->cosine);
            p[u] = 0;
            for (int i = 0; i < HS; i++) { p[u] += factor * (double)q[i] * (double)k[i]; }
            top = p[u] > top ? p[u] : top;
        }
        for (int u = 0; u <= t; u++) { sum += (p[u] = exp(p[u] - top)); }
        lse[bht] = top + log(sum);
        for (int u = 0; u <= t; u++) {
            const real* v = a->qkv + first + (size_t)u * 3 * (size_t)C + 2 * C;
            double* dv = dqkv + (v - a->qkv);
            p[u] /= sum;
            dp[u] = 0;
            for (int i = 0; i < HS; i++) {
                out[row + (size_t)i] += p[u] * (double)v[i];
                dv[i] += p[u] * (double)dout[row + (size_t)i];
                dp[u] += (double)dout[row + (size_t)i] * (double)v[i];
            }
            mean += p[u] * dp[u];
        }
        for (int u = 0; u <= t; u++) {
            const real* k = a->qkv + first + (size_t)u * 3 * (size_t)C + C;
            const double k_norm = divisor(k, HS, a->cosine), ds = p[u] * (dp[u] - mean) * (double)a->scale;
            double* dk = dqkv + (k - a->qkv);
            for (int i = 0; i < HS; i++) { dq[i] += ds * (double)k[i] / k_norm; }
            for (int i = 0; i < HS; i++) { dk[i] += ds * (double)q[i] / q_norm; }
        }
    }
    for (int i = 0; i < a->B * T * 3 * a->NH; i++) { // q and k vectors one by one; v is not normalised
        divide_backward(dqkv + (size_t)i * (size_t)HS, a->qkv + (size_t)i * (size_t)HS, HS,
                        a->cosine && i / a->NH % 3 < 2);
    }
    free(p);
    free(dp);
}

static void check_attention(Workspace* ws, int B, int NH, int T, int HS, bool cosine, double size) {
    const int C = NH * HS;
    const size_t n = (size_t)(B * T * C);
    real *qkv = random_reals(3 * n, 1), *out = zero_reals(n), *lse = zero_reals((size_t)(B * NH * T));
    real *dout = random_reals(n, 2), *dqkv = random_reals(3 * n, 3); // overwritten
    double *e_out = zero_doubles(n), *e_lse = zero_doubles((size_t)(B * NH * T)), *e_dqkv = zero_doubles(3 * n);
    for (size_t i = 0; i < 3 * n; i++) { qkv[i] *= (real)size; }
    if (cosine) { // a query and a key of zeros in the first head, and in the last a query whose norm is below the floor
        memset(qkv, 0, (size_t)HS * sizeof(real));
        memset(qkv + (T > 1 ? 4 : 1) * C, 0, (size_t)HS * sizeof(real));
        real* last = qkv + 3 * n - 2 * (size_t)C - (size_t)HS;
        for (int i = 0; i < HS; i++) { last[i] *= (real)(1e-13 / size); }
    }
    const Attention a = {
        .qkv = qkv, .B = B, .T = T, .C = C, .NH = NH, .cosine = cosine, .scale = (real)(0.8 / sqrt((double)HS))};
    attention_definition(&a, dout, e_out, e_lse, e_dqkv);
    attention_forward(ws, out, lse, a);
    attention_backward(ws, dqkv, dout, out, lse, a);
    for (size_t i = 0; i < 3 * n; i++) { // gradients at vectors of norm |x| err by 1/|x|: compare them times |x|
        const double d = divisor(qkv + i / (size_t)HS * (size_t)HS, HS, cosine && i / (size_t)C % 3 < 2);
        dqkv[i] = (real)((double)dqkv[i] * d);
        e_dqkv[i] *= d;
    }
    char what[128];
    snprintf(what, sizeof what, "attention NH %d, T %d, HS %d, %s, |qkv| %g", NH, T, HS, cosine ? "cosine" : "plain",
             size);
    // Scores up to 0.8 sqrt(HS) size^2 are rounded and then exponentiated; sums over T keys and HS elements follow.
    const double tolerance = bound(2e-6, 4e-15) * (1 + size * size),
                 largest_gradient = largest_magnitude(e_dqkv, 3 * n);
    check_all_near(out, e_out, n, tolerance * size, what);
    check_all_near(lse, e_lse, (size_t)(B * NH * T), tolerance, what);
    check_all_near(dqkv, e_dqkv, 3 * n, 2 * tolerance * (1 + largest_gradient), what);
    void* parts[] = {qkv, out, lse, dout, dqkv, e_out, e_lse, e_dqkv};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) { free(parts[i]); }
}

static void test_attention(void) {
    const int lengths[] = {1, 2, NR - 1, NR, NR + 1, 130}, head_sizes[] = {1, 3, 16, 64, 80};
    Workspace ws = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (size_t j = 0; j < sizeof head_sizes / sizeof head_sizes[0]; j++) {
            for (int cosine = 0; cosine <= 1; cosine++) {
                check_attention(&ws, j % 2 == 0 ? 1 : 2, j % 2 == 0 ? 2 : 3, lengths[i], head_sizes[j], cosine, 1);
            }
        }
    }
    check_attention(&ws, 1, 2, 130, 16, false, 8); // peaked: scores to about 100, running maxima that jump
    check_attention(&ws, 2, 1, 60, 16, true, 8);
    workspace_free(&ws);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Gradients

typedef struct {
    const char* name;
    int L, NH, C, T, V, B;
    int gelu;
    uint32_t cosine; // bit l: block l
    bool multipliers;
} Shape;

// A model and a batch of random examples, and what the last step found.
typedef struct {
    Shape shape;
    GPT* g;
    int *tokens, *targets; // (B, T)
    float* losses;         // (B, T)
    StepStats stats;
} Trial;

// All weights are random, LayerNorms and biases as well, and large enough for every tensor to matter.
static Trial trial_open(const Shape* s) {
    Trial t = {.shape = *s};
    GPTConfig config = config_of_shape(s->L, s->NH, s->C, s->T + 2, s->V); // two positions too many
    config.gelu = s->gelu;
    config.cosine_blocks[0] = s->cosine;
    if (s->multipliers) {
        config.embed_mult = 1.3f;
        config.residual_mult = 0.7f;
        config.attn_mult = 0.8f;
        config.logit_mult = 1.1f;
    }
    t.g = gpt_create(&config, s->B, s->T);
    uint64_t rng = 12345;
    for (int i = 0; i < t.g->table.num_tensors; i++) {
        int r, layer;
        tensor_at(&t.g->table, i, &r, &layer);
        const ParamRow* row = &t.g->table.row[r];
        const double center = r == LN1W || r == LN2W || r == LNFW ? 1 : 0;
        const double size = r == WTE || r == WPE || row->group == GROUP_LN ? 0.5
                            : row->cols > 1                                ? 1.5 / sqrt(row->cols)
                                                                           : 0.3;
        real* w = weight_of(t.g, r, layer);
        for (int k = 0; k < row->used_rows * row->cols; k++) { w[k] = (real)(float)(center + size * draw(&rng)); }
    }
    const size_t N = (size_t)(s->B * s->T);
    t.tokens = (int*)alloc_zeroed(2 * N, sizeof(int), "a test");
    t.targets = t.tokens + N;
    t.losses = (float*)alloc_zeroed(N, sizeof(float), "a test");
    for (size_t i = 0; i < 2 * N; i++) { t.tokens[i] = (int)(splitmix64(&rng) % (uint64_t)s->V); }
    t.stats.sq_sum = zero_doubles((size_t)t.g->table.num_tensors);
    t.stats.sum_sq = zero_doubles((size_t)t.g->table.num_tensors);
    return t;
}

static void trial_close(Trial* t) {
    gpt_free(t->g);
    free(t->tokens);
    free(t->losses);
    free(t->stats.sq_sum);
    free(t->stats.sum_sq);
}

// Ways to split a step into micro-batches.
enum { SPLIT_WHOLE, SPLIT_TWO_REST, SPLIT_ONE_ONE_REST, NUM_SPLITS };

// One step on examples [first, first + count) of the batch.
static void trial_step(Trial* t, int first, int count, int split, int gns, const StepHyper* hyper) {
    gpt_step_begin(t->g, gns);
    for (int done = 0, micro = 0; done < count; micro++) {
        const int left = count - done, wanted = split == SPLIT_TWO_REST && micro == 0      ? 2
                                                : split == SPLIT_ONE_ONE_REST && micro < 2 ? 1
                                                                                           : left;
        const int B = min_int(wanted, left);
        const size_t at = (size_t)(first + done) * (size_t)t->shape.T;
        gpt_micro(t->g, t->tokens + at, t->targets + at, B, t->shape.T);
        done += B;
    }
    gpt_step_end(t->g, hyper, &t->stats);
}

// A step that changes nothing (the gradient norm is always above the limit), to look at gradients and norms.
static void trial_measure(Trial* t, int first, int count, int split, int gns) {
    const StepHyper hyper = {.step = 1, .n = count, .loss_limit = INFINITY, .grad_norm_limit = -1};
    trial_step(t, first, count, split, gns, &hyper);
}

// Sum over the examples of the mean loss, by evaluation.
static double trial_loss(Trial* t) {
    double sum = 0;
    gpt_eval(t->g, t->tokens, t->targets, t->shape.B, t->shape.T, t->losses);
    for (int i = 0; i < t->shape.B * t->shape.T; i++) { sum += (double)t->g->losses[i] / t->shape.T; }
    return sum;
}

// The loss's derivative as weights w (n) move along direction: a central difference of fourth order.
static double loss_slope(Trial* t, real* w, const real* direction, size_t n) {
    const double h = 1e-3 / sqrt(square_norm(direction, n)), factor[] = {1, -8, 8, -1};
    const int step[] = {-2, -1, 1, 2};
    real* saved = zero_reals(n);
    memcpy(saved, w, n * sizeof(real));
    double slope = 0;
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < n; i++) { w[i] = saved[i] + (real)(step[k] * h) * direction[i]; }
        slope += factor[k] * trial_loss(t) / (12 * h);
    }
    memcpy(w, saved, n * sizeof(real));
    free(saved);
    return slope;
}

// Every tensor's gradient along random directions and in single entries.
static void check_gradients(const Shape* s) {
    enum { DIRECTIONS = 2, ENTRIES = 4 };
    Trial t = trial_open(s);
    uint64_t rng = 77;
    t.targets[s->T - 1] = -1; // an ignored token counts in the mean with loss 0
    trial_measure(&t, 0, s->B, SPLIT_WHOLE, GNS_OFF);
    check_near(t.stats.loss * s->B, trial_loss(&t), 1e-13, "%s: training loss", s->name);
    for (int i = 0; i < t.g->table.num_tensors; i++) {
        int r, layer;
        char name[128];
        tensor_at(&t.g->table, i, &r, &layer);
        tensor_name(&t.g->table, r, layer, name, sizeof name);
        const ParamRow* row = &t.g->table.row[r];
        const size_t n = row->size, used = (size_t)row->used_rows * (size_t)row->cols;
        const real* gradient = grad_of(t.g, r, layer);
        const double norm = sqrt(square_norm(gradient, n));
        for (int k = 0; k < DIRECTIONS + ENTRIES; k++) {
            real* direction = k < DIRECTIONS ? random_reals(n, splitmix64(&rng)) : zero_reals(n);
            if (k >= DIRECTIONS) { direction[splitmix64(&rng) % used] = 1; }
            double expected = 0;
            for (size_t j = 0; j < n; j++) { expected += (double)gradient[j] * (double)direction[j]; }
            // The differences err by about h^4 = 1e-12 of the loss's fifth derivative and 2e-16 of the loss over h = 1e-3.
            const double tolerance =
                1e-8 * norm * sqrt(square_norm(direction, n)) / (k < DIRECTIONS ? sqrt((double)n) : 1) + 1e-11;
            check_near(loss_slope(&t, weight_of(t.g, r, layer), direction, n), expected, tolerance, "%s: %s", s->name,
                       name);
            free(direction);
        }
    }
    trial_close(&t);
}

static void test_gradients(void) {
    const Shape shapes[] = {
        {"tanh", 2, 2, 12, 9, 31, 3, GELU_TANH, 0, false},
        {"erf, cosine block 1, multipliers", 2, 2, 12, 9, 31, 3, GELU_ERF, 2, true},
        {"tanh, cosine block 0, multipliers", 1, 3, 15, 9, 31, 2, GELU_TANH, 1, true},
        {"heads of one channel", 1, 6, 6, 5, 5, 2, GELU_TANH, 0, false},
        {"one token", 1, 1, 4, 1, 5, 2, GELU_ERF, 0, false},
        {"several blocks of queries", 1, 2, 8, 2 * NR + 5, 31, 2, GELU_ERF, 0, true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) { check_gradients(&shapes[i]); }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. GNS

// What one backward pass an example finds, in double.
typedef struct {
    double* gradients; // (B, num_params) each example's gradient
    double* total;     // (num_params) their sum
    double loss;       // mean over the examples
} OneByOne;

static OneByOne one_by_one(Trial* t) {
    const size_t P = t->g->table.num_params;
    OneByOne o = {.gradients = zero_doubles((size_t)t->shape.B * P), .total = zero_doubles(P)};
    for (int b = 0; b < t->shape.B; b++) {
        trial_measure(t, b, 1, SPLIT_WHOLE, GNS_OFF);
        o.loss += t->stats.loss / t->shape.B;
        for (size_t i = 0; i < P; i++) { o.total[i] += o.gradients[(size_t)b * P + i] = (double)t->g->grads[i]; }
    }
    return o;
}

// sum_i x_i y_i over one tensor.
static double dot_tensor(const ParamTable* table, int tensor, const double* x, const double* y) {
    int r, layer;
    tensor_at(table, tensor, &r, &layer);
    const size_t at = param_offset(table, r, layer);
    double sum = 0;
    for (size_t i = at; i < at + table->row[r].size; i++) { sum += x[i] * y[i]; }
    return sum;
}

// Whatever the micro-batches: sum_b |g_b|^2 and the gradient of every tensor, and the loss, are those of one backward pass
// an example; and the estimates formed from them are what they stand for.
static void check_per_example(const Shape* s) {
    Trial t = trial_open(s);
    const ParamTable* table = &t.g->table;
    const size_t P = table->num_params;
    OneByOne o = one_by_one(&t);
    // The same numbers, summed in another order: by example and not in one go, or in other blocks.
    const double relative = bound(1e-5, 1e-10);
    for (int split = 0; split < NUM_SPLITS; split++) {
        double all_sum_sq = 0, all_pairs = 0;
        trial_measure(&t, 0, s->B, split, GNS_ALL);
        check_near(t.stats.loss, o.loss, relative, "%s, split %d: loss", s->name, split);
        for (int i = 0; i < table->num_tensors; i++) {
            int r, layer;
            char name[128];
            tensor_at(table, i, &r, &layer);
            tensor_name(table, r, layer, name, sizeof name);
            double sum_sq = 0, sq_sum = dot_tensor(table, i, o.total, o.total), error = 0;
            for (int b = 0; b < s->B; b++) {
                const double* g = o.gradients + (size_t)b * P;
                sum_sq += dot_tensor(table, i, g, g);
            }
            check_near(t.stats.sum_sq[i], sum_sq, relative * sum_sq, "%s, split %d: sum_b |g_b|^2 of %s", s->name,
                       split, name);
            const size_t at = param_offset(table, r, layer);
            for (size_t k = at; k < at + table->row[r].size; k++) {
                error += ((double)t.g->grads[k] - o.total[k]) * ((double)t.g->grads[k] - o.total[k]);
            }
            check_near(sqrt(error), 0, relative * sqrt(sum_sq), "%s, split %d: gradient of %s", s->name, split, name);
            check_near(t.stats.sq_sum[i], sq_sum, relative * sum_sq * s->B, "%s, split %d: |g|^2 of %s", s->name, split,
                       name);
            all_sum_sq += sum_sq;
            all_pairs += sq_sum - sum_sq; // the sum over pairs of different examples of <g_b, g_c>
        }
        GnsSample sample[NUM_GNS_GROUPS];
        gns_group_samples(table, &t.stats, sample);
        for (int i = 0; i < NUM_GNS_GROUPS; i++) {
            CHECK(sample[i].valid == (s->B > 1));
            check_near(sample[i].gtg + sample[i].trsigma, sample[i].m, 1e-12 * sample[i].m,
                       "|G|^2 + tr(Sigma), group %d", i);
        }
        if (s->B > 1) { // the unbiased estimate of |G|^2 is the mean of <g_b, g_c> over pairs of different examples
            const double pairs = s->B * (s->B - 1.0), m = all_sum_sq / s->B;
            check_near(sample[GNS_GROUP_TOTAL].gtg, all_pairs / pairs, 2 * relative * m, "%s: |G|^2", s->name);
        }
    }
    free(o.gradients);
    free(o.total);
    trial_close(&t);
}

static void test_per_example_norms(void) {
    const Shape shapes[] = {
        {"5 examples", 2, 2, 12, 13, 31, 5, GELU_TANH, 0, false},
        {"5 examples, cosine block 1, multipliers", 2, 4, 20, 7, 37, 5, GELU_ERF, 2, true},
        {"one example", 1, 1, 5, 6, 7, 1, GELU_TANH, 0, true},
        {"one token", 1, 2, 6, 1, 11, 5, GELU_TANH, 0, false},
        {"one example of one token", 1, 1, 3, 1, 2, 1, GELU_TANH, 0, false},
        {"few different tokens", 1, 2, 10, 40, 3, 4, GELU_TANH, 0, true},
        {"head in three rounds", 1, 1, 9, 100, 129, 5, GELU_TANH, 0, false},
        {"examples longer than a block of k", 1, 2, 4, BLOCK_K + 16, 17, 3, GELU_TANH, 0, false},
        {"several tiles", 1, 2, 2 * NR + 2, 5, 2 * NR + 1, 4, GELU_TANH, 0, false},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) { check_per_example(&shapes[i]); }
}

// ln measures the LayerNorm tensors as all does, and nothing else; off measures nothing; the gradient is the same.
static void test_gns_modes(void) {
    const Shape shape = {"modes", 2, 2, 12, 13, 31, 5, GELU_TANH, 0, false};
    Trial all = trial_open(&shape), ln = trial_open(&shape), off = trial_open(&shape);
    trial_measure(&all, 0, 5, SPLIT_TWO_REST, GNS_ALL);
    trial_measure(&ln, 0, 5, SPLIT_TWO_REST, GNS_LN);
    trial_measure(&off, 0, 5, SPLIT_TWO_REST, GNS_OFF);
    CHECK(all.stats.gns == GNS_ALL && ln.stats.gns == GNS_LN && off.stats.gns == GNS_OFF);
    for (int i = 0; i < all.g->table.num_tensors; i++) {
        int r, layer;
        tensor_at(&all.g->table, i, &r, &layer);
        CHECK(all.stats.sum_sq[i] > 0);
        CHECK(ln.stats.sum_sq[i] == (all.g->table.row[r].group == GROUP_LN ? all.stats.sum_sq[i] : 0));
        CHECK(off.stats.sum_sq[i] == 0);
        // Measured, a tile's examples are summed one by one; not measured, in one go.
        check_near(off.stats.sq_sum[i], all.stats.sq_sum[i], bound(1e-5, 1e-13) * all.stats.sum_sq[i] * 5,
                   "|g|^2 of tensor %d", i);
    }
    trial_close(&all);
    trial_close(&ln);
    trial_close(&off);
}

// A key's bias adds the same to all scores of a query: its gradient is zero, and what is found is rounding.
static void test_key_bias_has_no_gradient(void) {
    const Shape shape = {"key bias", 2, 2, 12, 13, 31, 5, GELU_TANH, 0, false};
    Trial t = trial_open(&shape);
    trial_measure(&t, 0, 5, SPLIT_WHOLE, GNS_ALL);
    for (int l = 0; l < 2; l++) {
        const real* bias = grad_of(t.g, QKVB, l);
        // Sums of 65 gradients of size 0.01, each of which errs by a few roundings.
        check_near(sqrt(square_norm(bias + 12, 12)), 0, 64 * EPS * 0.1, "key bias of block %d", l);
        CHECK(square_norm(bias, 12) > 1e-6 && square_norm(bias + 24, 12) > 1e-6); // unlike those of queries and values
    }
    trial_close(&t);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Step

static const StepHyper ordinary_step = {.step = 1,
                                        .n = 4,
                                        .lr = 0.01f,
                                        .beta1 = 0.9f,
                                        .beta2 = 0.95f,
                                        .eps = 1e-8f,
                                        .weight_decay = 0.1f,
                                        .loss_limit = INFINITY,
                                        .grad_norm_limit = INFINITY};

// Three steps of AdamW beside its formulas in double: without clipping, clipped, and clipping that does not bite.
static void test_update(void) {
    const Shape shape = {"update", 2, 2, 12, 9, 31, 4, GELU_TANH, 0, false};
    Trial t = trial_open(&shape);
    ParamTable* table = &t.g->table;
    table->row[FCW].lr_mult = 0.5f;
    table->row[QKVW].wd_mult = 3;
    table->row[LN2B].eps_mult = 1e6f;
    const size_t P = table->num_params;
    double *w = doubles_of(t.g->params, P), *m = zero_doubles(P), *v = zero_doubles(P);
    const float clips[] = {0, 0.05f, 1e6f};
    for (int step = 1; step <= 3; step++) {
        StepHyper h = ordinary_step;
        h.step = step;
        h.grad_clip = clips[step - 1];
        trial_step(&t, 0, 4, SPLIT_TWO_REST, GNS_ALL, &h);
        CHECK(t.stats.outcome == STEP_APPLIED && t.stats.n == 4);
        const double norm = sqrt(square_norm(t.g->grads, P)) / h.n;
        check_near(t.stats.grad_norm, norm, bound(1e-6, 1e-14) * norm, "gradient norm of step %d", step);
        const double clip = step == 2 ? (double)h.grad_clip / norm : 1, b1 = (double)h.beta1, b2 = (double)h.beta2;
        CHECK(step != 2 || clip < 0.5);
        for (size_t i = 0; i < P; i++) {
            int r = 0;
            while (r + 1 < NUM_ROWS && i >= table->row[r + 1].offset) { r++; }
            const bool matrix = table->row[r].cols > 1;
            const double g = (double)t.g->grads[i] / h.n * clip, lr = (double)h.lr * (r == FCW ? 0.5 : 1);
            const double decay = matrix ? (double)h.weight_decay * (r == QKVW ? 3 : 1) : 0;
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            const double root = sqrt(v[i] / (1 - pow(b2, step)));
            w[i] -= lr * (m[i] / (1 - pow(b1, step)) / (root + (double)h.eps * (r == LN2B ? 1e6 : 1)) + decay * w[i]);
        }
    }
    check_all_near(t.g->params, w, P, bound(1e-6, 1e-14), "weights"); // sizes up to 1.5, three updates of 0.01
    check_all_near(t.g->m, m, P, bound(1e-6, 1e-14), "first moments");
    check_all_near(t.g->v, v, P, bound(1e-6, 1e-14), "second moments");
    const size_t used = (size_t)(31 * 12), padding = (size_t)((128 - 31) * 12);
    const real* arrays[] = {t.g->params, t.g->grads, t.g->m, t.g->v};
    for (int i = 0; i < 4; i++) { CHECK(square_norm(arrays[i] + used, padding) == 0); } // wte comes first
    free(w);
    free(m);
    free(v);
    trial_close(&t);
}

// A copy of weights and moments.
static real* state_of(const GPT* g) {
    const size_t P = g->table.num_params;
    real* copy = zero_reals(3 * P);
    memcpy(copy, g->params, P * sizeof(real));
    memcpy(copy + P, g->m, P * sizeof(real));
    memcpy(copy + 2 * P, g->v, P * sizeof(real));
    return copy;
}

// Whether the step (hyper) ends with this outcome and, unless it is applied, changes nothing.
static bool step_ends(Trial* t, const StepHyper* hyper, int outcome) {
    real* before = state_of(t->g);
    trial_step(t, 0, 4, SPLIT_ONE_ONE_REST, GNS_LN, hyper);
    real* after = state_of(t->g);
    const bool same = memcmp(before, after, 3 * t->g->table.num_params * sizeof(real)) == 0;
    free(before);
    free(after);
    return t->stats.outcome == outcome && same == (outcome != STEP_APPLIED);
}

static void test_guards(void) {
    const Shape shape = {"guards", 1, 2, 12, 9, 31, 4, GELU_TANH, 0, false};
    Trial t = trial_open(&shape);
    StepHyper h = ordinary_step;
    CHECK(step_ends(&t, &h, STEP_APPLIED));
    h.step = 2;
    trial_measure(&t, 0, 4, SPLIT_WHOLE, GNS_OFF);
    const double loss = t.stats.loss, norm = t.stats.grad_norm;
    h.loss_limit = (float)loss * 0.99f;
    CHECK(step_ends(&t, &h, STEP_SKIPPED_LOSS));
    h.loss_limit = (float)loss * 1.01f;
    h.grad_norm_limit = (float)norm * 0.99f;
    CHECK(step_ends(&t, &h, STEP_SKIPPED_GRAD));
    CHECK_CLOSE(t.stats.grad_norm, norm, bound(1e-5, 1e-13)); // the statistics are those of the step all the same
    h.grad_norm_limit = (float)norm * 1.01f;
    const float poisons[] = {NAN, INFINITY};
    const int rows[] = {WTE, WPE, QKVW, FCB, LNFW};
    for (size_t i = 0; i < 2 * sizeof rows / sizeof rows[0]; i++) {
        real *w = weight_of(t.g, rows[i / 2], 0), healthy = *w;
        const int token = t.tokens[3];
        t.tokens[3] = 0; // so that the first row of wte is in use
        *w = (real)poisons[i % 2];
        CHECK(step_ends(&t, &h, STEP_SKIPPED_NONFINITE));
        *w = healthy;
        t.tokens[3] = token;
    }
    CHECK(step_ends(&t, &h, STEP_APPLIED)); // and nothing of the poison is left
    CHECK_CLOSE(t.stats.loss, loss, bound(1e-5, 1e-13));
    CHECK_CLOSE(t.stats.grad_norm, norm, bound(1e-5, 1e-13));
    trial_close(&t);
}

// A rank may have no example of a step: its gradient is zero, not what the last step left.
static void test_step_without_examples(void) {
    const Shape shape = {"no examples", 2, 2, 12, 9, 31, 4, GELU_TANH, 0, false};
    Trial t = trial_open(&shape);
    trial_step(&t, 0, 4, SPLIT_WHOLE, GNS_ALL, &ordinary_step);
    CHECK(square_norm(t.g->grads, t.g->table.num_params) > 0);
    trial_step(&t, 0, 0, SPLIT_WHOLE, GNS_ALL, &ordinary_step);
    CHECK(square_norm(t.g->grads, t.g->table.num_params) == 0);
    CHECK(t.stats.outcome == STEP_APPLIED && t.stats.loss == 0 && t.stats.grad_norm == 0);
    for (int i = 0; i < t.g->table.num_tensors; i++) { CHECK(t.stats.sq_sum[i] == 0 && t.stats.sum_sq[i] == 0); }
    trial_close(&t);
}

// Every tensor's weights, gradients and moments have a place of their own that set writes and get reads.
static void test_get_and_set(void) {
    const Shape shape = {"get and set", 2, 2, 12, 9, 31, 1, GELU_TANH, 0, false};
    Trial t = trial_open(&shape);
    const ParamTable* table = &t.g->table;
    float* values = (float*)alloc_zeroed(table->num_params, sizeof(float), "a test");
    for (int round = 0; round < 2; round++) { // all is written before the first is read
        for (int i = 0; i < 4 * table->num_tensors; i++) {
            int r, layer;
            tensor_at(table, i / 4, &r, &layer);
            const size_t n = table->row[r].size;
            if (round == 0) {
                for (size_t k = 0; k < n; k++) { values[k] = (float)(10000 * i) + (float)k; }
                cpu_set(t.g, r, layer, i % 4, values);
            } else {
                cpu_get(t.g, r, layer, i % 4, values);
                CHECK(values[0] == (float)(10000 * i) && values[n - 1] == (float)(10000 * i) + (float)(n - 1));
            }
        }
    }
    const size_t P = table->num_params; // and the places are those of the model file: wte first, ln_f.bias last
    CHECK(t.g->params[0] == 0 && t.g->v[P - 1] == (real)(10000 * (4 * table->num_tensors - 1) + 11));
    free(values);
    trial_close(&t);
}

// Three steps from the same start, everything measured.
static Trial trained(int threads) {
    const Shape shape = {"threads", 2, 2,        38, 53,
                         61,        5, GELU_ERF, 2,  true}; // nothing is a multiple of a vector's length
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
    Trial t = trial_open(&shape);
    for (int step = 1; step <= 3; step++) {
        StepHyper h = ordinary_step;
        h.step = step;
        h.n = 5;
        h.grad_clip = 1;
        trial_step(&t, 0, 5, SPLIT_TWO_REST, GNS_ALL, &h);
    }
    return t;
}

static void test_same_bits_for_any_number_of_threads(void) {
    const int before = max_threads();
    Trial first = trained(1);
    const size_t P = first.g->table.num_params, tensors = (size_t)first.g->table.num_tensors;
    const int threads[] = {1, 2, 3};
    for (int i = 0; i < 3; i++) {
        Trial t = trained(threads[i]);
        CHECK(memcmp(t.g->params, first.g->params, P * sizeof(real)) == 0);
        CHECK(memcmp(t.g->grads, first.g->grads, P * sizeof(real)) == 0);
        CHECK(memcmp(t.g->m, first.g->m, P * sizeof(real)) == 0);
        CHECK(memcmp(t.g->v, first.g->v, P * sizeof(real)) == 0);
        CHECK(memcmp(t.g->losses, first.g->losses, 3 * 53 * sizeof(real)) == 0); // of the last micro-batch
        CHECK(memcmp(t.stats.sum_sq, first.stats.sum_sq, tensors * sizeof(double)) == 0);
        CHECK(memcmp(t.stats.sq_sum, first.stats.sq_sum, tensors * sizeof(double)) == 0);
        CHECK(t.stats.loss == first.stats.loss && t.stats.grad_norm == first.stats.grad_norm);
        trial_close(&t);
    }
    trial_close(&first);
#ifdef _OPENMP
    omp_set_num_threads(before);
#else
    (void)before;
#endif
}

// Each token's loss is -log softmax over the V tokens that exist, of the logits that the tokens up to it give.
static void test_evaluation(void) {
    const Shape shape = {"evaluation", 2, 2, 12, NR + 3, 31, 2, GELU_TANH, 2, true};
    Trial t = trial_open(&shape);
    const int T = shape.T, N = shape.B * T, V = shape.V;
    real* padding = weight_of(t.g, WTE, 0) + V * shape.C; // must not matter
    for (int i = 0; i < (padded_vocab(V) - V) * shape.C; i++) { padding[i] = 100; }
    trial_measure(&t, 0, shape.B, SPLIT_WHOLE, GNS_OFF);
    const double training_loss = t.stats.loss;
    CHECK_CLOSE(trial_loss(&t) / shape.B, training_loss, bound(1e-6, 1e-14));
    float* losses = (float*)alloc_zeroed((size_t)N, sizeof(float), "a test");
    memcpy(losses, t.losses, (size_t)N * sizeof(float));
    double mean = 0;
    for (int i = 0; i < N; i++) {
        float logits[31];
        gpt_logits(t.g, t.tokens + i / T * T, i % T + 1, logits);
        double sum = 0;
        for (int v = 0; v < V; v++) { sum += exp((double)logits[v]); }
        // Logits of size 5 in float, through a model whose products are blocked otherwise for each length.
        check_near((double)losses[i], log(sum) - (double)logits[t.targets[i]], bound(2e-5, 2e-6), "loss of token %d",
                   i);
        mean += (double)losses[i] / N;
    }
    check_near(mean, training_loss, 1e-6, "mean of the tokens' losses"); // which are floats
    for (int i = 0; i < N; i += 3) { t.targets[i] = -1; }
    gpt_eval(t.g, t.tokens, t.targets, shape.B, T, t.losses);
    for (int i = 0; i < N; i++) { CHECK(t.losses[i] == (i % 3 == 0 ? 0 : losses[i])); }
    free(losses);
    trial_close(&t);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. A small run

enum { RUN_STEPS = 10, RUN_T = 16, RUN_B = 4, RUN_V = 37 };

// Ten steps through the backend, as the training loop makes them, on sequences in which a token all but gives the next.
static void small_run(double losses[RUN_STEPS], int micro_batch) {
    GPTConfig config = config_of_shape(2, 2, 16, RUN_T, RUN_V);
    Backend backend;
    const BackendOptions options = backend_options(RUN_B, RUN_T);
    cpu_open(&backend, &config, &options);
    model_init_weights(&config, 42, &backend);
    double sq_sum[28], sum_sq[28];
    StepStats stats = {.sq_sum = sq_sum, .sum_sq = sum_sq};
    for (int step = 1; step <= RUN_STEPS; step++) {
        int tokens[RUN_B * RUN_T], targets[RUN_B * RUN_T];
        for (int b = 0; b < RUN_B; b++) {
            int token = (step * RUN_B + b) % RUN_V;
            for (int t = 0; t < RUN_T; t++) {
                tokens[b * RUN_T + t] = token;
                targets[b * RUN_T + t] = token = (5 * token + 3 + t % 2) % RUN_V;
            }
        }
        StepHyper h = ordinary_step;
        h.step = step;
        h.n = RUN_B;
        h.grad_clip = 1;
        backend.step_begin(backend.self, GNS_LN);
        for (int b = 0; b < RUN_B; b += micro_batch) {
            const int B = min_int(micro_batch, RUN_B - b);
            backend.micro(backend.self, tokens + b * RUN_T, targets + b * RUN_T, B, RUN_T);
        }
        backend.step_end(backend.self, &h, &stats);
        CHECK(stats.outcome == STEP_APPLIED);
        losses[step - 1] = stats.loss;
    }
    backend.close(backend.self);
}

static void test_small_run(void) {
    const double frozen[RUN_STEPS] = {3.6181862, 3.5922461, 3.6112150, 3.5607885, 3.4849009,
                                      3.4102891, 3.4598110, 3.3596842, 3.3758742, 3.2529801};
    double losses[RUN_STEPS];
    small_run(losses, RUN_B);
    // In float the libraries' logarithms and cosines (of the initial weights) and the vectors' widths show; Adam's first steps,
    // which take the sign of tiny gradients, enlarge it.
    for (int i = 0; i < RUN_STEPS; i++) {
        check_near(losses[i], frozen[i], bound(1e-4, 1e-5), "loss of step %d", i + 1);
    }
    check_near(losses[0], log(RUN_V), 0.05, "loss of an untrained model");
    CHECK(losses[RUN_STEPS - 1] < losses[0] - 0.3);
}

// The losses of a run do not depend on how its steps are cut into micro-batches, but for the rounding of sums.
static void test_any_micro_batch(void) {
    double whole[RUN_STEPS], cut[RUN_STEPS];
    small_run(whole, RUN_B);
    for (int micro_batch = 1; micro_batch < RUN_B; micro_batch++) {
        small_run(cut, micro_batch);
        for (int i = 0; i < 2; i++) { // later steps enlarge the difference, see above
            check_near(cut[i], whole[i], bound(1e-6, 1e-12), "micro-batches of %d, step %d", micro_batch, i + 1);
        }
    }
}

// What only the CUDA trainer can do is refused, not ignored.
static void test_refused_options(void) {
    GPTConfig config = config_of_shape(1, 1, 8, 4, RUN_V);
    Backend backend;
    BackendOptions options = backend_options(1, 4);
    for (options.recompute = RECOMPUTE_NOTHING; options.recompute <= RECOMPUTE_GELU; options.recompute++) {
        CHECK_DIES(cpu_open(&backend, &config, &options), "the CPU trainer always computes GELU and LayerNorm again");
    }
    options.tf32 = true;
    options.recompute = RECOMPUTE_LAYERNORM;
    CHECK_DIES(cpu_open(&backend, &config, &options), "--tf32 is an option of the CUDA trainer");
    options.tf32 = false;
    options.profile = true;
    CHECK_DIES(cpu_open(&backend, &config, &options), "--profile is an option of the CUDA trainer");
}

int main(void) {
    RUN(test_refused_options); // first: it forks, and nothing has threads yet
    RUN(test_gemm_shapes);
    RUN(test_gemm_options);
    RUN(test_gemm_two_accumulators);
    RUN(test_exp);
    RUN(test_erf);
    RUN(test_gelu);
    RUN(test_layernorm);
    RUN(test_bias_backward);
    RUN(test_sum_of_squares);
    RUN(test_group_tokens);
    RUN(test_embedding);
    RUN(test_softmax_cross_entropy);
    RUN(test_attention);
    if (REAL_IS_DOUBLE) { RUN(test_gradients); }
    RUN(test_per_example_norms);
    RUN(test_gns_modes);
    RUN(test_key_bias_has_no_gradient);
    RUN(test_update);
    RUN(test_guards);
    RUN(test_step_without_examples);
    RUN(test_get_and_set);
    RUN(test_same_bits_for_any_number_of_threads);
    RUN(test_evaluation);
    RUN(test_small_run);
    RUN(test_any_micro_batch);
    return test_summary();
}
