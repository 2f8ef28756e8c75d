/*
Checks and times llmc/layernorm.cuh: residual addition + LayerNorm, and its backward pass with per-example norms.

    nvcc -std=c++17 -O3 -I. -gencode=arch=compute_90a,code=sm_90a dev/cuda/layernorm.cu -o build/cuda_layernorm
    build/cuda_layernorm [check]
*/
#include "dev/cuda/harness.cuh"
#include "llmc/layernorm.cuh"

// A number stored in bf16 is off by at most 2^-8 of itself; in float, by a few roundings of 2^-24.
static const double STORED = sizeof(floatX) == 2 ? 3.9e-3 : 5e-6;
// Float sums over up to 20,000 rows, in runs of a few hundred: their rounding errors stay below this.
static const double SUMMED = 1e-5;

static std::vector<double> in_double(const std::vector<floatX>& x) {
    std::vector<double> d(x.size());
    for (size_t i = 0; i < x.size(); i++) { d[i] = (double)to_float(x[i]); }
    return d;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

static void check_forward(int N, int C, bool with_branch) {
    const size_t n = (size_t)N * (size_t)C;
    const float mult = 0.75f;
    const std::vector<floatX> inp = random_normal<floatX>(n, 0.5, 2, 1), branch = random_normal<floatX>(n, 0.5, 1, 2);
    const std::vector<floatX> weight = random_normal<floatX>(C, 1, 0.3, 3), bias = random_normal<floatX>(C, 0, 1, 4);
    floatX *d_inp = device_copy(inp), *d_branch = with_branch ? device_copy(branch) : NULL;
    floatX *d_weight = device_copy(weight), *d_bias = device_copy(bias);
    std::vector<floatX> residual[2], out[2];
    std::vector<float> mean[2], rstd[2];
    for (int k = 0; k < 2; k++) {
        floatX *d_residual = with_branch ? device_alloc<floatX>(n) : NULL, *d_out = device_alloc<floatX>(n);
        float *d_mean = device_alloc<float>(N), *d_rstd = device_alloc<float>(N);
        layernorm_forward(d_residual, d_out, d_mean, d_rstd, d_inp, d_branch, mult, d_weight, d_bias, N, C, 0);
        residual[k] = with_branch ? host_copy(d_residual, n) : inp;
        out[k] = host_copy(d_out, n);
        if (k == 1) { // again from the saved statistics
            cuda_check(cudaMemset(d_out, 0xff, n * sizeof(floatX)));
            layernorm_recompute(d_out, with_branch ? d_residual : d_inp, d_mean, d_rstd, d_weight, d_bias, N, C, 0);
            check_same_bits("recompute: forward's bits", host_copy(d_out, n), out[k]);
        }
        mean[k] = host_copy(d_mean, N), rstd[k] = host_copy(d_rstd, N);
        for (void* p : {(void*)d_residual, (void*)d_out, (void*)d_mean, (void*)d_rstd}) { cuda_check(cudaFree(p)); }
    }
    std::vector<double> sum = in_double(inp), x = in_double(residual[0]), ref_out(n), ref_mean(N), ref_rstd(N);
    for (size_t i = 0; with_branch && i < n; i++) { sum[i] += (double)mult * (double)to_float(branch[i]); }
    for (int row = 0; row < N; row++) {
        const double* v = &x[(size_t)row * (size_t)C];
        double m = 0, square = 0;
        for (int c = 0; c < C; c++) { m += v[c] / C; }
        for (int c = 0; c < C; c++) { square += (v[c] - m) * (v[c] - m) / C; }
        ref_mean[row] = m;
        ref_rstd[row] = 1 / sqrt(square + 1e-5);
        for (int c = 0; c < C; c++) {
            ref_out[(size_t)row * (size_t)C + (size_t)c] =
                (v[c] - m) * ref_rstd[row] * (double)to_float(weight[c]) + (double)to_float(bias[c]);
        }
    }
    char what[100];
    snprintf(what, sizeof what, "forward N %d, C %d%s", N, C, with_branch ? "" : ", no branch");
    check_close(what, residual[0], sum, STORED);
    check_close(what, out[0], ref_out, STORED);
    check_close(what, mean[0], ref_mean, SUMMED);
    check_close(what, rstd[0], ref_rstd, SUMMED);
    check_same_bits(what, residual[0], residual[1]);
    check_same_bits(what, out[0], out[1]);
    check_same_bits(what, mean[0], mean[1]);
    check_same_bits(what, rstd[0], rstd[1]);
    for (floatX* p : {d_inp, d_branch, d_weight, d_bias}) { cuda_check(cudaFree(p)); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

struct Backward {
    int B, T, C;
    std::vector<floatX> dinp, dout, inp, weight;   // (B, T, C), weight (C)
    std::vector<float> mean, rstd, dweight, dbias; // (B, T), (C)
    double sum_sq[2];
};

// What layernorm_backward leaves behind.
struct BackwardResult {
    std::vector<floatX> dinp;
    std::vector<float> dweight, dbias;
    std::vector<double> sum_sq;
};

static Backward random_backward(int B, int T, int C) {
    const size_t N = (size_t)B * (size_t)T, n = N * (size_t)C;
    Backward p = {B, T, C, {}, {}, {}, {}, {}, {}, {}, {}, {3, 5}};
    p.dinp = random_normal<floatX>(n, 0, 1, 11);
    p.dout = random_normal<floatX>(n, 0.1, 1, 12);
    p.inp = random_normal<floatX>(n, 0.5, 2, 13);
    p.weight = random_normal<floatX>(C, 1, 0.3, 14);
    p.dweight = random_normal<float>(C, 0, 1, 15);
    p.dbias = random_normal<float>(C, 0, 1, 16);
    p.mean = random_normal<float>(N, 0.5, 0.1, 17); // the kernel takes any, whether they are inp's or not
    p.rstd = random_normal<float>(N, 0.5, 0.1, 18);
    return p;
}

// One call's arrays on the device, those of Backward.
struct BackwardCall {
    floatX *dinp, *dout, *inp, *weight;
    float *mean, *rstd, *dweight, *dbias;
    double* sum_sq;
};

static BackwardCall open_call(const Backward& p) {
    return {device_copy(p.dinp),    device_copy(p.dout),  device_copy(p.inp),
            device_copy(p.weight),  device_copy(p.mean),  device_copy(p.rstd),
            device_copy(p.dweight), device_copy(p.dbias), device_copy(std::vector<double>(p.sum_sq, p.sum_sq + 2))};
}

static void close_call(const BackwardCall& c) {
    for (void* x : {(void*)c.dinp, (void*)c.dout, (void*)c.inp, (void*)c.weight, (void*)c.mean, (void*)c.rstd,
                    (void*)c.dweight, (void*)c.dbias, (void*)c.sum_sq}) {
        cuda_check(cudaFree(x));
    }
}

// norms: bit 0 asks for the weight's, bit 1 for the bias's. scratch: layernorm_backward_scratch(p.B, p.C) bytes
static void queue_call(const BackwardCall& c, const Backward& p, int norms, char* scratch) {
    layernorm_backward(c.dinp, c.dweight, c.dbias, norms & 1 ? c.sum_sq : NULL, norms & 2 ? c.sum_sq + 1 : NULL, c.dout,
                       c.inp, c.mean, c.rstd, c.weight, scratch, p.B, p.T, p.C, 0);
}

// behind_another: a call on other numbers has the same scratch before it, and the host does not wait in between.
static BackwardResult run_backward(const Backward& p, int norms, char* scratch, bool behind_another = false) {
    const BackwardCall call = open_call(p);
    BackwardCall other = {};
    if (behind_another) {
        other = open_call(p);
        std::swap(other.dout, other.inp);
        queue_call(other, p, norms, scratch);
    }
    queue_call(call, p, norms, scratch);
    const BackwardResult r = {host_copy(call.dinp, p.dinp.size()), host_copy(call.dweight, p.C),
                              host_copy(call.dbias, p.C), host_copy(call.sum_sq, 2)};
    close_call(call);
    close_call(other);
    return r;
}

static void check_backward(int B, int T, int C) {
    const Backward p = random_backward(B, T, C);
    std::vector<double> dinp = in_double(p.dinp), dweight(p.dweight.begin(), p.dweight.end());
    std::vector<double> dbias(p.dbias.begin(), p.dbias.end()), square[2] = {{p.sum_sq[0]}, {p.sum_sq[1]}};
    for (int b = 0; b < B; b++) {
        std::vector<double> dw(C), db(C);
        for (int t = 0; t < T; t++) {
            const size_t row = (size_t)b * (size_t)T + (size_t)t, at = row * (size_t)C;
            const double m = (double)p.mean[row], r = (double)p.rstd[row];
            double sum = 0, dot = 0;
            for (int c = 0; c < C; c++) {
                const double dy = (double)to_float(p.dout[at + c]), xhat = ((double)to_float(p.inp[at + c]) - m) * r;
                sum += dy * (double)to_float(p.weight[c]) / C;
                dot += dy * (double)to_float(p.weight[c]) * xhat / C;
                dw[c] += dy * xhat;
                db[c] += dy;
            }
            for (int c = 0; c < C; c++) {
                const double dy = (double)to_float(p.dout[at + c]), xhat = ((double)to_float(p.inp[at + c]) - m) * r;
                dinp[at + c] += r * (dy * (double)to_float(p.weight[c]) - sum - xhat * dot);
            }
        }
        for (int c = 0; c < C; c++) {
            dweight[c] += dw[c], dbias[c] += db[c];
            square[0][0] += dw[c] * dw[c], square[1][0] += db[c] * db[c];
        }
    }
    // The scratch memory may hold anything: NaN, which is also what marks a square as missing, and what calls without norms,
    // with one and with both leave there, then other bytes.
    const size_t scratch_bytes = layernorm_backward_scratch(B, C);
    char* scratch = device_alloc<char>(scratch_bytes);
    const BackwardResult all = run_backward(p, 3, scratch), again = run_backward(p, 3, scratch);
    const BackwardResult none = run_backward(p, 0, scratch), one = run_backward(p, 2, scratch);
    const BackwardResult behind = run_backward(p, 3, scratch, true);
    cuda_check(cudaMemset(scratch, 0, scratch_bytes));
    const BackwardResult zeros = run_backward(p, 3, scratch);
    cuda_check(cudaMemset(scratch, 0x7f, scratch_bytes)); // 3e38 as floats, 1e306 as doubles
    const BackwardResult large = run_backward(p, 3, scratch);
    cuda_check(cudaFree(scratch));
    char what[100];
    for (const BackwardResult* r : {&all, &none}) {
        snprintf(what, sizeof what, "backward B %d, T %d, C %d%s", B, T, C, r == &all ? "" : ", no norms");
        check_close(what, r->dinp, dinp, STORED);
        check_close(what, r->dweight, dweight, SUMMED);
        check_close(what, r->dbias, dbias, SUMMED);
    }
    snprintf(what, sizeof what, "backward B %d, T %d, C %d, norms", B, T, C);
    check_close(what, std::vector<double>{all.sum_sq[0]}, square[0], SUMMED);
    check_close(what, std::vector<double>{all.sum_sq[1]}, square[1], SUMMED);
    check_that(one.sum_sq[0] == p.sum_sq[0] && one.sum_sq[1] == all.sum_sq[1], "one norm alone");
    check_that(none.sum_sq[0] == p.sum_sq[0] && none.sum_sq[1] == p.sum_sq[1], "no norms: nothing is written");
    const std::pair<const char*, const BackwardResult*> same[] = {{"scratch as the same call left it", &again},
                                                                  {"scratch behind another call", &behind},
                                                                  {"scratch of zeros", &zeros},
                                                                  {"scratch of large numbers", &large}};
    for (const auto& s : same) {
        snprintf(what, sizeof what, "backward B %d, T %d, C %d, %s: the same bits", B, T, C, s.first);
        check_same_bits(what, all.dinp, s.second->dinp);
        check_same_bits(what, all.dweight, s.second->dweight);
        check_same_bits(what, all.dbias, s.second->dbias);
        check_same_bits(what, all.sum_sq, s.second->sum_sq);
    }
    check_same_bits("dinp with norms and without", all.dinp, none.dinp);
}

static void check_all() {
    // rows and channels for each way of spreading a row over threads, full and not
    const int forward[][2] = {{1, 8},     {67, 24},   {1000, 384}, {33, 768},  {9001, 64}, {130, 1600},
                              {37, 4096}, {5, 12288}, {300, 1024}, {3, 12296}, {3, 16384}};
    for (const int* s : forward) {
        check_forward(s[0], s[1], true);
        check_forward(s[0], s[1], false);
    }
    const int backward[][3] = {{1, 1, 8},       {1, 1, 16384},  {3, 5, 24}, // fewer rows than teams
                               {2, 67, 768},    {1, 300, 768},  {7, 129, 1024},
                               {4, 33, 1600},   {3, 50, 2560}, // B*T odd, one team and many
                               {2, 37, 4096},   {2, 9, 12288},  {2, 5, 12296},
                               {1, 20, 16384},  {3, 1001, 64},  {1, 5001, 48},
                               {10, 2000, 32},  {1, 2200, 768}, // many rows to a block; segments cut anywhere
                               {2, 1100, 1024}, {16, 40, 4096}, {6, 700, 8},
                               {130, 30, 40},   {600, 3, 16},   {1100, 1, 8}, // examples within a chunk
                               {64, 64, 64},    {128, 16, 128}, {5, 13, 1280},
                               {300, 2, 2304},  {16, 512, 384}, {17, 37, 384}, // in bf16 the second of two vectors
                               {94, 64, 384},   {3, 5, 264}};                  // is half empty, or has one lane
    for (const int* s : backward) { check_backward(s[0], s[1], s[2]); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

enum { CALLS = 8, PAIRS = 5 }; // calls one after another in one measurement; measurements with and without norms

// n random numbers: a short run of them over and over.
static floatX* device_random(size_t n, uint64_t seed) {
    const std::vector<floatX> block = random_normal<floatX>(1 << 20, 0, 1, seed);
    floatX* p = device_alloc<floatX>(n);
    for (size_t at = 0; at < n; at += block.size()) {
        const size_t size = std::min(block.size(), n - at) * sizeof(floatX);
        cuda_check(cudaMemcpy(p + at, block.data(), size, cudaMemcpyHostToDevice));
    }
    return p;
}

// What both directions work on: sets of four arrays of (B, T, C), and what goes with a row and a column.
struct Buffers {
    int B, T, C, sets;
    double bytes; // that one call moves
    std::vector<floatX*> x[4];
    floatX *weight, *bias;
    float *mean, *rstd, *dweight, *dbias;
    double* sum_sq;
    char* scratch;
};

static Buffers make_buffers(int B, int T, int C) {
    const size_t N = (size_t)B * (size_t)T, n = N * (size_t)C;
    Buffers f = {B,
                 T,
                 C,
                 buffer_sets(3 * n * sizeof(floatX)),
                 4.0 * (double)n * sizeof(floatX) + 8.0 * (double)N,
                 {},
                 device_random(C, 1),
                 device_random(C, 2),
                 NULL,
                 NULL,
                 NULL,
                 NULL,
                 NULL,
                 NULL};
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < f.sets; i++) { f.x[k].push_back(device_random(n, 10 + k)); }
    }
    f.mean = device_copy(std::vector<float>(N, 0.0f)), f.rstd = device_copy(std::vector<float>(N, 1.0f));
    f.dweight = device_copy(std::vector<float>(C, 0.0f)), f.dbias = device_copy(std::vector<float>(C, 0.0f));
    f.sum_sq = device_copy(std::vector<double>(2, 0.0));
    f.scratch = device_alloc<char>(layernorm_backward_scratch(B, C));
    return f;
}

static void free_buffers(Buffers& f) {
    for (int k = 0; k < 4; k++) {
        for (floatX* p : f.x[k]) { cuda_check(cudaFree(p)); }
    }
    for (void* p : {(void*)f.weight, (void*)f.bias, (void*)f.mean, (void*)f.rstd, (void*)f.dweight, (void*)f.dbias,
                    (void*)f.sum_sq, (void*)f.scratch}) {
        cuda_check(cudaFree(p));
    }
}

// Microseconds of call(set): many in a row, so that the host's part in launching them is hidden as it is in training.
template <class Call> static double time_calls(const Buffers& f, Call call) {
    const auto run = [&](int i) {
        for (int k = i * CALLS; k < (i + 1) * CALLS; k++) { call(k % f.sets); }
    };
    return median_us(run, 20) / CALLS;
}

static double time_backward(const Buffers& f, bool norms) {
    double* sum_sq = norms ? f.sum_sq : NULL;
    return time_calls(f, [&](int set) {
        layernorm_backward(f.x[0][set], f.dweight, f.dbias, sum_sq, norms ? sum_sq + 1 : NULL, f.x[1][set], f.x[2][set],
                           f.mean, f.rstd, f.weight, f.scratch, f.B, f.T, f.C, 0);
    });
}

static double time_forward(const Buffers& f) {
    return time_calls(f, [&](int set) {
        layernorm_forward(f.x[3][set], f.x[0][set], f.mean, f.rstd, f.x[1][set], f.x[2][set], 1, f.weight, f.bias,
                          f.B * f.T, f.C, 0);
    });
}

static double time_recompute(const Buffers& f) {
    return time_calls(f, [&](int set) {
        layernorm_recompute(f.x[0][set], f.x[1][set], f.mean, f.rstd, f.weight, f.bias, f.B * f.T, f.C, 0);
    });
}

static void time_shape(int B, int T, int C, double bandwidth) {
    Buffers f = make_buffers(B, T, C);
    char what[100];
    std::vector<double> with, without;
    double mean = 0, variance = 0;
    for (int k = 0; k < PAIRS; k++) {
        with.push_back(time_backward(f, true));
        without.push_back(time_backward(f, false));
        mean += 100 * (with[k] / without[k] - 1) / PAIRS;
    }
    for (int k = 0; k < PAIRS; k++) { variance += pow(100 * (with[k] / without[k] - 1) - mean, 2) / (PAIRS - 1); }
    const double interval = 2.776 * sqrt(variance / PAIRS); // Student's t, 4 degrees of freedom
    std::sort(with.begin(), with.end());
    std::sort(without.begin(), without.end());
    snprintf(what, sizeof what, "backward with norms  B %d, T %d, C %d", B, T, C);
    print_row(what, with[PAIRS / 2], f.bytes, bandwidth);
    snprintf(what, sizeof what, "backward, no norms   B %d, T %d, C %d", B, T, C);
    print_row(what, without[PAIRS / 2], f.bytes, bandwidth);
    printf("    norms cost %+.2f%%, 95%% interval %+.2f to %+.2f (%d interleaved pairs)\n", mean, mean - interval,
           mean + interval, (int)PAIRS);
    snprintf(what, sizeof what, "forward              B %d, T %d, C %d", B, T, C);
    print_row(what, time_forward(f), f.bytes, bandwidth);
    snprintf(what, sizeof what, "recompute            B %d, T %d, C %d", B, T, C);
    print_row(what, time_recompute(f), f.bytes / 2, bandwidth);
    free_buffers(f);
}

int main(int argc, char** argv) {
    check_all();
    if (argc > 1 && strcmp(argv[1], "check") == 0) { return check_summary(); }
    const double bandwidth = copy_bandwidth();
    printf("LayerNorm, %s; copy %.0f GB/s\n", sizeof(floatX) == 2 ? "bf16" : "fp32", bandwidth / 1e9);
    time_shape(64, 1024, 768, bandwidth);
    time_shape(16, 2048, 4096, bandwidth);
    time_shape(1, 65536, 768, bandwidth);
    time_shape(1024, 64, 768, bandwidth);
    return check_summary();
}
