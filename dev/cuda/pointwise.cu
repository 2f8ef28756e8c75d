/*
Checks and times what works number by number or column by column: GELU (llmc/gelu.cuh) and the gradient of a bias
(llmc/bias.cuh). See harness.cuh for how to build and run it.
*/
#include "dev/cuda/harness.cuh"
#include "llmc/bias.cuh"
#include "llmc/gelu.cuh"

// The largest relative error of rounding to floatX where it is bf16: half a unit of the eighth digit.
static const bool is_float = sizeof(floatX) == sizeof(float);
static const double ROUNDING = is_float ? 0 : 1.0 / 256;

// ---------------------------------------------------------------------------------------------------------------------
// GELU

static double gelu_reference(double x, int form, double* slope) {
    if (form == GELU_ERF) {
        const double phi = 0.5 * erfc(-x * M_SQRT1_2);
        *slope = phi + x * exp(-0.5 * x * x) / sqrt(2 * M_PI);
        return x * phi;
    }
    const double a = sqrt(2 / M_PI), s = 1 / (1 + exp(-2 * a * (x + 0.044715 * x * x * x)));
    *slope = s + x * s * (1 - s) * 2 * a * (1 + 3 * 0.044715 * x * x);
    return x * s;
}

// |out - ref| <= relative * |ref| + absolute for every number; a NaN never is.
static void check_each(const char* what, const std::vector<floatX>& out, const std::vector<double>& ref,
                       double relative, double absolute) {
    for (size_t i = 0; i < ref.size(); i++) {
        if (!(fabs((double)to_float(out[i]) - ref[i]) <= relative * fabs(ref[i]) + absolute)) {
            printf("number %zu is %.9g, expected %.9g\n", i, (double)to_float(out[i]), ref[i]);
            check_that(false, what);
            return;
        }
    }
    check_that(out.size() == ref.size(), what);
}

static void check_gelu(int form, const std::vector<floatX>& inp) {
    const size_t n = inp.size();
    const std::vector<floatX> dout = random_normal<floatX>(n, 0, 1, n);
    std::vector<double> out_ref(n), dinp_ref(n);
    for (size_t i = 0; i < n; i++) {
        double slope;
        out_ref[i] = gelu_reference((double)to_float(inp[i]), form, &slope);
        dinp_ref[i] = (double)to_float(dout[i]) * slope;
    }
    floatX *d_inp = device_copy(inp), *d_out = device_alloc<floatX>(n), *d_again = device_alloc<floatX>(n);
    floatX *d_dout = device_copy(dout), *d_dout2 = device_copy(dout);
    gelu_forward(d_out, d_inp, form, n, 0);
    gelu_backward(d_dout, d_again, d_inp, form, n, 0);
    const std::vector<floatX> out = host_copy(d_out, n), dinp = host_copy(d_dout, n);
    // Relative down to where exp's argument is so large that its own rounding shows; then values are below 1e-20.
    check_each("gelu forward: every number", out, out_ref, ROUNDING + 3e-5, 1e-20);
    check_each("gelu backward: every number", dinp, dinp_ref, ROUNDING + 1e-5, 1e-5); // near the slope's zero: absolute
    check_close("gelu forward", out, out_ref, is_float ? 3e-6 : 2.5e-3);
    check_close("gelu backward", dinp, dinp_ref, is_float ? 3e-6 : 2.5e-3);
    check_same_bits("gelu backward: forward's bits", host_copy(d_again, n), out);
    gelu_backward(d_dout2, d_again, d_inp, form, n, 0);
    check_same_bits("gelu backward: same bits twice", host_copy(d_dout2, n), dinp);
    for (floatX* p : {d_inp, d_out, d_again, d_dout, d_dout2}) { cuda_check(cudaFree(p)); }
}

static void check_gelus() {
    for (int form : {GELU_TANH, GELU_ERF}) {
        for (size_t n : {(size_t)8, (size_t)24, (size_t)4096, (size_t)8 * 5003}) {
            check_gelu(form, random_normal<floatX>(n, 0, 1.5, n + 1));
        }
        std::vector<floatX> line; // from far left to far right, zeros of both signs in the middle
        for (int i = -2400; i <= 2400; i++) { line.push_back((floatX)((float)i / 200)); }
        for (float x : {-100.0f, 100.0f, -1000.0f, 1000.0f, -0.0f, 1e-30f, -1e-30f}) { line.push_back((floatX)x); }
        check_gelu(form, line);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bias

static void check_bias(int B, int T, int OC) {
    const float alpha = 0.7f;
    const uint64_t seed = (uint64_t)((B * 100 + T) * 100 + OC);
    const std::vector<floatX> dout = random_normal<floatX>((size_t)B * (size_t)T * (size_t)OC, 0.1, 1, seed);
    const std::vector<float> before = random_normal<float>((size_t)OC, 0, 1, seed + 1);
    std::vector<double> ref(before.begin(), before.end());
    double norms = 3;
    for (int b = 0; b < B; b++) {
        std::vector<double> example((size_t)OC, 0);
        for (int t = 0; t < T; t++) {
            for (int c = 0; c < OC; c++) {
                example[(size_t)c] +=
                    (double)alpha * to_float(dout[((size_t)b * (size_t)T + (size_t)t) * (size_t)OC + (size_t)c]);
            }
        }
        for (int c = 0; c < OC; c++) {
            ref[(size_t)c] += example[(size_t)c];
            norms += example[(size_t)c] * example[(size_t)c];
        }
    }
    floatX* d_dout = device_copy(dout);
    float *with = device_copy(before), *without = device_copy(before);
    double* sum_sq = device_copy(std::vector<double>(1, 3.0));
    unsigned char* scratch = device_alloc<unsigned char>(bias_backward_scratch(B, T, OC));
    bias_backward(with, sum_sq, scratch, d_dout, alpha, B, T, OC, 0);
    bias_backward(without, NULL, scratch, d_dout, alpha, B, T, OC, 0);
    char what[80];
    snprintf(what, sizeof what, "bias %d x %d x %d", B, T, OC);
    const std::vector<float> dbias = host_copy(with, (size_t)OC);
    check_close(what, dbias, ref, 1e-6);
    check_close(what, host_copy(sum_sq, 1), std::vector<double>(1, norms), 1e-6);
    check_same_bits("bias: same bits with norms or without", dbias, host_copy(without, (size_t)OC));
    for (void* p : {(void*)d_dout, (void*)with, (void*)without, (void*)sum_sq, (void*)scratch}) {
        cuda_check(cudaFree(p));
    }
}

static void check_biases() {
    check_bias(1, 1, 8);
    check_bias(3, 5, 24);
    check_bias(2, 127, 40);
    check_bias(2, 128, 256);
    check_bias(2, 129, 264);
    check_bias(5, 64, 768);
    check_bias(200, 1, 16);  // more examples than a fold block takes at once
    check_bias(1, 5000, 8);  // 40 chunks: several warps for an example
    check_bias(70, 1100, 8); // nine chunks: two warps for each of 16 examples, several rounds
    check_bias(2, 33000, 8); // more chunks than warps
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

static void time_gelu(int form, size_t n, double bandwidth) {
    const int sets = buffer_sets(n * sizeof(floatX));
    std::vector<floatX*> inp, out, dout;
    const std::vector<floatX> some = random_normal<floatX>((size_t)1 << 20, 0, 1, 1);
    for (int i = 0; i < sets; i++) {
        for (std::vector<floatX*>* list : {&inp, &out, &dout}) {
            floatX* p = device_alloc<floatX>(n);
            for (size_t at = 0; at < n; at += some.size()) {
                cuda_check(cudaMemcpy(p + at, some.data(), std::min(some.size(), n - at) * sizeof(floatX),
                                      cudaMemcpyHostToDevice));
            }
            list->push_back(p);
        }
    }
    const char* name = form == GELU_ERF ? "erf" : "tanh";
    char what[80];
    const double bytes = (double)n * sizeof(floatX);
    snprintf(what, sizeof what, "gelu forward, %s, %zu numbers", name, n);
    print_row(what, median_us([&](int i) {
                  const size_t s = (size_t)(i % sets);
                  gelu_forward(out[s], inp[s], form, n, 0);
              }),
              2 * bytes, bandwidth);
    snprintf(what, sizeof what, "gelu backward, %s, %zu numbers", name, n);
    print_row(what, median_us([&](int i) {
                  const size_t s = (size_t)(i % sets);
                  gelu_backward(dout[s], out[s], inp[s], form, n, 0);
              }),
              4 * bytes, bandwidth);
    for (const std::vector<floatX*>* list : {&inp, &out, &dout}) {
        for (floatX* p : *list) { cuda_check(cudaFree(p)); }
    }
}

static void time_bias(int B, int T, int OC, bool norms, double bandwidth) {
    const size_t n = (size_t)B * (size_t)T * (size_t)OC;
    const int sets = buffer_sets(n * sizeof(floatX));
    std::vector<floatX*> dout;
    for (int i = 0; i < sets; i++) {
        dout.push_back(device_alloc<floatX>(n));
        cuda_check(cudaMemset(dout.back(), 0x3c, n * sizeof(floatX)));
    }
    float* dbias = device_copy(std::vector<float>((size_t)OC, 0));
    double* sum_sq = device_copy(std::vector<double>(1, 0));
    unsigned char* scratch = device_alloc<unsigned char>(bias_backward_scratch(B, T, OC));
    char what[80];
    snprintf(what, sizeof what, "bias backward, B %d, T %d, OC %d%s", B, T, OC, norms ? ", norms" : "");
    print_row(what, median_us([&](int i) {
                  bias_backward(dbias, norms ? sum_sq : NULL, scratch, dout[(size_t)(i % sets)], 1, B, T, OC, 0);
              }),
              (double)n * sizeof(floatX), bandwidth);
    for (floatX* p : dout) { cuda_check(cudaFree(p)); }
    cuda_check(cudaFree(dbias));
    cuda_check(cudaFree(sum_sq));
    cuda_check(cudaFree(scratch));
}

int main(int argc, char** argv) {
    check_gelus();
    check_biases();
    if (argc < 2 || strcmp(argv[1], "check") != 0) {
        const double bandwidth = copy_bandwidth();
        printf("copy %.0f GB/s\n", bandwidth / 1e9);
        for (int form : {GELU_TANH, GELU_ERF}) { time_gelu(form, (size_t)65536 * 3072, bandwidth); }
        for (int OC : {768, 2304, 3072}) {
            for (bool norms : {false, true}) { time_bias(64, 1024, OC, norms, bandwidth); }
        }
        time_bias(1, 65536, 3072, true, bandwidth);
        time_bias(1024, 64, 3072, true, bandwidth);
    }
    return check_summary();
}
