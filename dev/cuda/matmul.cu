/*
Checks and times llmc/matmul.cuh: see harness.cuh for how, and link with -lcublasLt -lcublas.

Times are shares of the peak: the best of three plain cuBLAS products of 8192 x 8192 x 8192 random numbers, timed in the
same run. Beside each stands how the algorithm was chosen: candidates that ran, those with the bits of the library's
favourite, its time, and the time of the fastest candidate whatever its bits (all back to back, at the first use).
*/
#include "harness.cuh"
#include "llmc/matmul.cuh"
#include <cublas_v2.h>
#include <functional>

// Rounding to bf16 moves a number by 2^-9 = 2e-3 of it at most; a step of a sum in fp32 by 2^-24 of it, or by 2^-23 in
// tensor cores, which cut off instead of rounding.
static const double OUT_TOLERANCE = sizeof(floatX) == 4 ? 1e-5 : 3e-3;
static const double SUM_TOLERANCE = 3e-5;
// The library's tanh is good for about 11 bits.
static const double GELU_TOLERANCE = 6e-3;

typedef std::vector<double> Matrix;

// ---------------------------------------------------------------------------------------------------------------------
// References

static Matrix widened(const std::vector<floatX>& x) {
    Matrix y(x.size());
    for (size_t i = 0; i < x.size(); i++) { y[i] = to_float(x[i]); }
    return y;
}

// x (rows, cols) -> (cols, rows)
static Matrix transpose(const Matrix& x, size_t rows, size_t cols) {
    Matrix y(x.size());
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c++) { y[c * rows + r] = x[r * cols + c]; }
    }
    return y;
}

// left (rows, inner) @ right (inner, cols)
static Matrix product(const Matrix& left, const Matrix& right, size_t rows, size_t cols, size_t inner) {
    Matrix out(rows * cols, 0);
    for (size_t r = 0; r < rows; r++) {
        for (size_t k = 0; k < inner; k++) {
            const double x = left[r * inner + k];
            for (size_t c = 0; c < cols; c++) { out[r * cols + c] += x * right[k * cols + c]; }
        }
    }
    return out;
}

static const double SQRT_2_OVER_PI = 0.79788456080286535588;

static double gelu(double x) { return 0.5 * x * (1 + tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))); }

static double gelu_slope(double x) {
    const double t = tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

// Two sets, so that algorithms are chosen twice.
static MatmulPlans plans[2];

// Checks what run(plans, out) leaves in out, which before holds `start` or, if that is empty, NaN: against ref, and for
// the same bits with plans that are new to the shape, with the same ones again, and with others. Returns the result.
template <class T>
static std::vector<T> check_product(const char* what, const std::vector<T>& start, const Matrix& ref, double tolerance,
                                    std::function<void(MatmulPlans*, T*)> run) {
    MatmulPlans* const with[3] = {&plans[0], &plans[0], &plans[1]};
    const size_t n = ref.size();
    std::vector<T> first;
    for (int i = 0; i < 3; i++) {
        T* out = start.empty() ? device_alloc<T>(n) : device_copy(start);
        run(with[i], out);
        const std::vector<T> result = host_copy(out, n);
        if (i == 0) { check_close(what, first = result, ref, tolerance); }
        if (i > 0) { check_same_bits(what, first, result); }
        cuda_check(cudaFree(out));
    }
    return first;
}

static void check_forward(int N, int C, int OC) {
    const size_t n = (size_t)N * (size_t)OC;
    const std::vector<floatX> inp = random_normal<floatX>((size_t)N * (size_t)C, 0, 1, 1), none;
    const std::vector<floatX> weight = random_normal<floatX>((size_t)OC * (size_t)C, 0, 1 / sqrt(C), 2);
    const std::vector<floatX> bias = random_normal<floatX>((size_t)OC, 0.5, 1, 3);
    floatX *i = device_copy(inp), *w = device_copy(weight), *b = device_copy(bias);
    floatX* pre = device_alloc<floatX>(n);
    const Matrix sum = product(widened(inp), transpose(widened(weight), OC, C), N, OC, C);
    Matrix scaled(n), biased(n), through(n);
    for (size_t k = 0; k < n; k++) {
        scaled[k] = 0.7 * sum[k];
        biased[k] = sum[k] + to_float(bias[k % (size_t)OC]);
        through[k] = gelu(biased[k]);
    }
    check_product<floatX>("forward, alpha", none, scaled, OUT_TOLERANCE, [&](MatmulPlans* mm, floatX* out) {
        matmul_forward(mm, out, NULL, i, w, NULL, 0.7f, N, C, OC, 0);
    });
    check_product<floatX>("forward, bias", none, biased, OUT_TOLERANCE, [&](MatmulPlans* mm, floatX* out) {
        matmul_forward(mm, out, NULL, i, w, b, 1, N, C, OC, 0);
    });
    if (MATMUL_GELU) {
        check_product<floatX>("forward, GELU", none, through, GELU_TOLERANCE, [&](MatmulPlans* mm, floatX* out) {
            matmul_forward(mm, out, pre, i, w, b, 1, N, C, OC, 0);
        });
        check_close("forward, input of GELU", host_copy(pre, n), biased, OUT_TOLERANCE);
    }
    for (floatX* p : {i, w, b, pre}) { cuda_check(cudaFree(p)); }
}

static void check_backward_input(int N, int C, int OC) {
    const size_t n = (size_t)N * (size_t)C;
    const std::vector<floatX> dout = random_normal<floatX>((size_t)N * (size_t)OC, 0, 1, 5), none;
    const std::vector<floatX> weight = random_normal<floatX>((size_t)OC * (size_t)C, 0, 1, 6);
    const std::vector<floatX> pre = random_normal<floatX>(n, 0, 1.5, 7);
    floatX *d = device_copy(dout), *w = device_copy(weight), *g = device_copy(pre);
    Matrix ref = product(widened(dout), widened(weight), N, C, OC);
    for (double& x : ref) { x *= 0.7; }
    check_product<floatX>("backward input", none, ref, OUT_TOLERANCE, [&](MatmulPlans* mm, floatX* out) {
        matmul_backward_input(mm, out, NULL, d, w, 0.7f, N, C, OC, 0);
    });
    if (MATMUL_GELU) {
        for (size_t k = 0; k < n; k++) { ref[k] *= gelu_slope(to_float(pre[k])); }
        check_product<floatX>("backward input, GELU", none, ref, GELU_TOLERANCE, [&](MatmulPlans* mm, floatX* out) {
            matmul_backward_input(mm, out, g, d, w, 0.7f, N, C, OC, 0);
        });
        check_same_bits("backward input: the input of GELU is only read", pre, host_copy(g, n));
    }
    for (floatX* p : {d, w, g}) { cuda_check(cudaFree(p)); }
}

static void check_backward_weight(int N, int C, int OC) {
    const size_t n = (size_t)OC * (size_t)C;
    const std::vector<floatX> dout = random_normal<floatX>((size_t)N * (size_t)OC, 0, 1, 8);
    const std::vector<floatX> inp = random_normal<floatX>((size_t)N * (size_t)C, 0, 1, 9);
    const std::vector<float> before = random_normal<float>(n, 0, 3, 10), none;
    floatX *d = device_copy(dout), *i = device_copy(inp);
    Matrix ref = product(transpose(widened(dout), N, OC), widened(inp), OC, C, N);
    for (double& x : ref) { x *= 0.7; }
    check_product<float>("backward weight", none, ref, SUM_TOLERANCE, [&](MatmulPlans* mm, float* out) {
        matmul_backward_weight(mm, out, d, i, 0.7f, false, N, C, OC, 0);
    });
    for (size_t k = 0; k < n; k++) { ref[k] += (double)before[k]; }
    check_product<float>("backward weight, added", before, ref, SUM_TOLERANCE, [&](MatmulPlans* mm, float* out) {
        matmul_backward_weight(mm, out, d, i, 0.7f, true, N, C, OC, 0);
    });
    for (floatX* p : {d, i}) { cuda_check(cudaFree(p)); }
}

static void check_examples(int B, int T, int C, int OC, int group, bool accumulate) {
    const size_t t = (size_t)T, c = (size_t)C, oc = (size_t)OC, n = oc * c, N = (size_t)B * t;
    const std::vector<floatX> dout = random_normal<floatX>(N * oc, 0, 1, 11);
    const std::vector<floatX> inp = random_normal<floatX>(N * c, 0, 1, 12);
    std::vector<float> before = random_normal<float>(n, 0, 3, 13);
    const Matrix d = widened(dout), x = widened(inp);
    Matrix ref(n, 0), square(1, 0);
    for (size_t row = 0; row < N; row += t) {
        const Matrix left(d.data() + row * oc, d.data() + (row + t) * oc);
        const Matrix right(x.data() + row * c, x.data() + (row + t) * c);
        const Matrix one = product(transpose(left, t, oc), right, oc, c, t);
        for (size_t k = 0; k < n; k++) {
            ref[k] += 0.7 * one[k];
            square[0] += 0.49 * one[k] * one[k];
        }
    }
    for (size_t k = 0; k < n && accumulate; k++) { ref[k] += (double)before[k]; }
    const double earlier = 0.25 * square[0];
    square[0] += earlier;
    if (!accumulate) { before.clear(); }
    floatX *dev_d = device_copy(dout), *dev_i = device_copy(inp);
    float* scratch = device_alloc<float>((size_t)group * (size_t)OC * (size_t)C);
    std::vector<double> sums;
    check_product<float>("by examples", before, ref, SUM_TOLERANCE, [&](MatmulPlans* mm, float* dweight) {
        double* sum_sq = device_copy(std::vector<double>(1, earlier));
        matmul_backward_weight_examples(mm, dweight, sum_sq, scratch, group, dev_d, dev_i, 0.7f, accumulate, B, T, C,
                                        OC, 0);
        sums.push_back(host_copy(sum_sq, 1)[0]);
        cuda_check(cudaFree(sum_sq));
    });
    check_close("by examples: sum of squares", std::vector<double>(1, sums[0]), square, SUM_TOLERANCE);
    check_that(sums[0] == sums[1] && sums[0] == sums[2], "by examples: bits of the sum of squares");
    for (void* p : {(void*)dev_d, (void*)dev_i, (void*)scratch}) { cuda_check(cudaFree(p)); }
}

// No row is left out of a weight gradient and none is counted twice, whatever N: with operands that are all one each of its
// numbers is N, exactly, since fp32 holds every integer up to 2^24. (Versions of the library are known whose split sums
// leave out the rest of N.) Behind the rows of all but the largest operand lie further ones, so that a row too many shows.
static void check_inner_sizes(void) {
    enum { MOST_N = 99991, MOST_C = 384 };
    static const int inner[] = {1, 63, 65, 200, 1000, 1025, 4097, 8200, 16385, 33333, 65535, MOST_N};
    static const int shape[][2] = {{64, 192}, {MOST_C, MOST_C}}; // C, OC
    floatX* ones = device_copy(std::vector<floatX>((size_t)MOST_N * MOST_C, (floatX)1.0f));
    MatmulPlans mm;
    matmul_open(&mm, false);
    for (const auto& s : shape) {
        const int C = s[0], OC = s[1];
        const size_t n = (size_t)OC * (size_t)C;
        for (const int N : inner) {
            float* out = device_alloc<float>(n);
            for (int times = 1; times <= 2; times++) { // written, then added to it
                char what[100];
                snprintf(what, sizeof what, "backward weight of ones, N %d, C %d, OC %d%s", N, C, OC,
                         times == 1 ? "" : ", added");
                matmul_backward_weight(&mm, out, ones, ones, 1, times == 2, N, C, OC, 0);
                const std::vector<float> sums = host_copy(out, n);
                size_t k = 0;
                while (k < n && sums[k] == (float)(times * N)) { k++; }
                if (!check_that(k == n, what)) {
                    printf("    number %zu is %.9g, expected %d\n", k, (double)sums[k], times * N);
                }
            }
            cuda_check(cudaFree(out));
        }
    }
    matmul_close(&mm);
    cuda_check(cudaFree(ones));
}

// More shapes than the table holds, twice.
static void check_many_shapes(void) {
    enum { C = 16, OC = 8, SHAPES = MATMUL_PLANS + 44 };
    const std::vector<floatX> inp = random_normal<floatX>((size_t)SHAPES * C, 0, 1, 14);
    const std::vector<floatX> weight = random_normal<floatX>((size_t)OC * C, 0, 1, 15);
    const Matrix ref = product(widened(inp), transpose(widened(weight), OC, C), SHAPES, OC, C);
    floatX *i = device_copy(inp), *w = device_copy(weight), *out = device_alloc<floatX>((size_t)SHAPES * OC);
    static MatmulPlans mm;
    matmul_open(&mm, false);
    for (int round = 0; round < 2; round++) {
        for (int N = SHAPES; N > 0; N--) { matmul_forward(&mm, out, NULL, i, w, NULL, 1, N, C, OC, 0); }
        check_close("more shapes than plans", host_copy(out, (size_t)SHAPES * OC), ref, OUT_TOLERANCE);
        if (round == 0) { check_that(mm.num_plans == SHAPES - MATMUL_PLANS, "a full table of plans is begun anew"); }
    }
    matmul_close(&mm);
    for (floatX* p : {i, w, out}) { cuda_check(cudaFree(p)); }
}

// A shape that comes after those that are timed at once is timed later, and keeps its bits.
static void check_patience(void) {
    enum { N = 200, C = 64, OC = 64 };
    floatX* i = device_copy(random_normal<floatX>((size_t)N * C, 0, 1, 16));
    floatX* d = device_copy(random_normal<floatX>((size_t)N * OC, 0, 1, 17));
    float* dweight = device_alloc<float>((size_t)OC * C);
    std::vector<float> first;
    static MatmulPlans mm;
    matmul_open(&mm, false);
    mm.num_timed = MATMUL_AT_ONCE;
    for (int use = 1; use <= MATMUL_PATIENCE; use++) {
        matmul_backward_weight(&mm, dweight, d, i, 1, false, N, C, OC, 0);
        if (use == 1) { first = host_copy(dweight, (size_t)OC * C); }
        if (use == MATMUL_PATIENCE - 1) { check_that(mm.plan[0].candidates == 0, "not timed before its time"); }
    }
    check_that(mm.num_plans == 1 && mm.plan[0].candidates > 0, "timed in the end");
    check_same_bits("timed late", first, host_copy(dweight, (size_t)OC * C));
    matmul_close(&mm);
    for (void* p : {(void*)i, (void*)d, (void*)dweight}) { cuda_check(cudaFree(p)); }
}

static void check_all(void) {
    static const int shape[][3] = {{1, 8, 8}, {3, 8, 24}, {17, 40, 72}, {130, 64, 200}, {257, 136, 8}, {64, 264, 128}};
    for (const auto& s : shape) {
        check_forward(s[0], s[1], s[2]);
        check_backward_input(s[0], s[1], s[2]);
        check_backward_weight(s[0], s[1], s[2]);
    }
    // Large enough that algorithms are timed, one shape for each kind.
    check_forward(1030, 72, 1024);
    check_backward_input(2055, 512, 72);
    check_backward_weight(1031, 136, 200);
    check_examples(1, 1, 8, 8, 1, false);
    check_examples(5, 3, 8, 24, 2, true);
    check_examples(4, 17, 40, 72, 4, false);
    check_examples(3, 129, 136, 200, 8, true);
    check_inner_sizes();
    check_many_shapes();
    check_patience();
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

// x (n): normal, standard deviation std
static __global__ void fill_kernel(floatX* x, size_t n, float std, uint64_t seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t h = i + (seed << 40);
        h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
        h = (h ^ h >> 27) * 0x94d049bb133111ebull;
        h ^= h >> 31;
        const float u = ((float)(h >> 40) + 1) * 0x1p-24f, v = (float)(h & 0xffffff) * 0x1p-24f;
        x[i] = (floatX)(std * sqrtf(-2 * logf(u)) * cospif(2 * v));
    }
}

static floatX* device_random(size_t n, float std, uint64_t seed) {
    floatX* x = device_alloc<floatX>(n);
    fill_kernel<<<1024, 256>>>(x, n, std, seed);
    cuda_check_launch();
    return x;
}

// The same bits from algorithms that were chosen three times, at the size of a model: there are more candidates than at
// the sizes of the other checks, and long sums, which show every difference of order.
static void check_bits_at_size(void) {
    enum { N = 8192, C = 768, OC = 2304 };
    floatX *inp = device_random((size_t)N * C, 1, 1), *weight = device_random((size_t)OC * C, 0.02f, 2);
    floatX *out = device_alloc<floatX>((size_t)N * OC), *dinp = device_alloc<floatX>((size_t)N * C);
    float* dweight = device_alloc<float>((size_t)OC * C);
    std::vector<floatX> outs[3], dinps[3];
    std::vector<float> dweights[3];
    for (int i = 0; i < 3; i++) {
        MatmulPlans mm;
        matmul_open(&mm, false);
        matmul_forward(&mm, out, NULL, inp, weight, NULL, 1, N, C, OC, 0);
        matmul_backward_input(&mm, dinp, NULL, out, weight, 1, N, C, OC, 0);
        matmul_backward_weight(&mm, dweight, out, inp, 1, false, N, C, OC, 0);
        matmul_backward_weight(&mm, dweight, out, inp, 1, true, N, C, OC, 0);
        outs[i] = host_copy(out, (size_t)N * OC);
        dinps[i] = host_copy(dinp, (size_t)N * C);
        dweights[i] = host_copy(dweight, (size_t)OC * C);
        matmul_close(&mm);
    }
    for (int i = 1; i < 3; i++) {
        check_same_bits("forward at size", outs[0], outs[i]);
        check_same_bits("backward input at size", dinps[0], dinps[i]);
        check_same_bits("backward weight at size", dweights[0], dweights[i]);
    }
    for (void* p : {(void*)inp, (void*)weight, (void*)out, (void*)dinp, (void*)dweight}) { cuda_check(cudaFree(p)); }
}

// Operations a second of plain cuBLAS: the best of the three transpositions that training uses.
static double peak_flops(void) {
    enum { N = 8192 };
    const cudaDataType_t type = sizeof(floatX) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t ops[3][2] = {
        {CUBLAS_OP_T, CUBLAS_OP_N}, {CUBLAS_OP_N, CUBLAS_OP_N}, {CUBLAS_OP_N, CUBLAS_OP_T}};
    const float one = 1, zero = 0;
    floatX *a = device_random((size_t)N * N, 1, 1), *b = device_random((size_t)N * N, 1, 2);
    floatX* c = device_alloc<floatX>((size_t)N * N);
    cublasHandle_t handle;
    cublas_check(cublasCreate(&handle));
    double best = INFINITY;
    for (const auto& op : ops) {
        best = std::min(best,
                        median_us(
                            [&](int) {
                                cublas_check(cublasGemmEx(handle, op[0], op[1], N, N, N, &one, a, type, N, b, type, N,
                                                          &zero, c, type, N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
                            },
                            30));
    }
    cublas_check(cublasDestroy(handle));
    for (floatX* p : {a, b, c}) { cuda_check(cudaFree(p)); }
    return 2.0 * N * N * N / best * 1e6;
}

// One line: a time, its share of the peak, and how the algorithm was chosen.
static void print_product(const char* name, const char* what, double us, double flops, double peak,
                          const MatmulPlan* p) {
    int splits = 0;
    cublas_check(
        cublasLtMatmulAlgoConfigGetAttribute(&p->algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits, NULL));
    printf("%-8s %-26s %9.1f us %7.1f TFLOP/s %5.1f%%   %d of %d have the bits of the first (%.1f us), split %d, "
           "fastest %.1f us\n",
           name, what, us, flops / us * 1e-6, 100 * flops / us * 1e6 / peak, p->same_bits, p->candidates,
           (double)p->first_us, splits, (double)p->any_bits_us);
}

// Buffers of one layer's products, so many sets as overflow the L2: x (N, C), y (N, OC), extra (N, OC or C).
typedef struct {
    int N, C, OC, sets;
    std::vector<floatX*> x, y, extra;
    floatX *weight, *bias;
    float* dweight;
} Layer;

static Layer layer_open(int N, int C, int OC) {
    const size_t nx = (size_t)N * (size_t)C, ny = (size_t)N * (size_t)OC;
    Layer l = {N, C, OC, buffer_sets((nx + ny) * sizeof(floatX)), {}, {}, {}, NULL, NULL, NULL};
    for (int i = 0; i < l.sets; i++) {
        l.x.push_back(device_random(nx, 1, (uint64_t)i));
        l.y.push_back(device_random(ny, 1, (uint64_t)i + 100));
        l.extra.push_back(device_random(std::max(nx, ny), 1, (uint64_t)i + 200));
    }
    l.weight = device_random((size_t)OC * (size_t)C, 0.02f, 300);
    l.bias = device_random((size_t)OC, 0.02f, 301);
    l.dweight = device_alloc<float>((size_t)OC * (size_t)C);
    cuda_check(cudaMemset(l.dweight, 0, (size_t)OC * (size_t)C * sizeof(float)));
    return l;
}

static void layer_close(Layer* l) {
    for (int i = 0; i < l->sets; i++) {
        for (floatX* p : {l->x[i], l->y[i], l->extra[i]}) { cuda_check(cudaFree(p)); }
    }
    for (void* p : {(void*)l->weight, (void*)l->bias, (void*)l->dweight}) { cuda_check(cudaFree(p)); }
}

// The plan of the shape that was used last for the first time.
static const MatmulPlan* newest(const MatmulPlans* mm) { return &mm->plan[mm->num_plans - 1]; }

static void time_row(MatmulPlans* mm, const Layer* l, const char* name, const char* what, double peak,
                     std::function<void(int)> run) {
    const double us = median_us([&](int i) { run(i % l->sets); });
    print_product(name, what, us, 2.0 * l->N * l->C * l->OC, peak, newest(mm));
}

// bias: a layer of a block; if not, the head. gelu_out, gelu_in: also with these epilogues.
static void time_layer(const char* name, int N, int C, int OC, bool bias, bool gelu_out, bool gelu_in, double peak) {
    MatmulPlans mm;
    matmul_open(&mm, false);
    Layer l = layer_open(N, C, OC);
    // The products overwrite y, then x, so weight gradients, which only read them, come first.
    time_row(&mm, &l, name, "weight", peak,
             [&](int i) { matmul_backward_weight(&mm, l.dweight, l.y[i], l.x[i], 1, false, N, C, OC, 0); });
    time_row(&mm, &l, name, "weight, added", peak,
             [&](int i) { matmul_backward_weight(&mm, l.dweight, l.y[i], l.x[i], 1, true, N, C, OC, 0); });
    time_row(&mm, &l, name, bias ? "forward, bias" : "forward", peak,
             [&](int i) { matmul_forward(&mm, l.y[i], NULL, l.x[i], l.weight, bias ? l.bias : NULL, 1, N, C, OC, 0); });
    if (gelu_out && MATMUL_GELU) {
        time_row(&mm, &l, name, "forward, bias, GELU", peak,
                 [&](int i) { matmul_forward(&mm, l.y[i], l.extra[i], l.x[i], l.weight, l.bias, 1, N, C, OC, 0); });
    }
    time_row(&mm, &l, name, "input", peak,
             [&](int i) { matmul_backward_input(&mm, l.x[i], NULL, l.y[i], l.weight, 1, N, C, OC, 0); });
    if (gelu_in && MATMUL_GELU) {
        time_row(&mm, &l, name, "input, slope of GELU", peak,
                 [&](int i) { matmul_backward_input(&mm, l.x[i], l.extra[i], l.y[i], l.weight, 1, N, C, OC, 0); });
    }
    layer_close(&l);
    matmul_close(&mm);
}

static void time_examples(const char* name, int B, int T, int C, int OC, int group, double peak) {
    MatmulPlans mm;
    matmul_open(&mm, false);
    Layer l = layer_open(B * T, C, OC);
    float* scratch = device_alloc<float>((size_t)group * (size_t)OC * (size_t)C);
    double* sum_sq = device_copy(std::vector<double>(1, 0));
    char what[40];
    snprintf(what, sizeof what, "weight, %d by %d examples", B, group);
    time_row(&mm, &l, name, what, peak, [&](int i) {
        matmul_backward_weight_examples(&mm, l.dweight, sum_sq, scratch, group, l.y[i], l.x[i], 1, true, B, T, C, OC,
                                        0);
    });
    cuda_check(cudaFree(scratch));
    cuda_check(cudaFree(sum_sq));
    layer_close(&l);
    matmul_close(&mm);
}

static void time_all(void) {
    const int N = sizeof(floatX) == 4 ? 16384 : 65536, C = 768, V = 50304, chunk = 8192;
    check_bits_at_size();
    const double peak = peak_flops();
    printf("peak %.1f TFLOP/s (cuBLAS, 8192 x 8192 x 8192)\n", peak * 1e-12);
    time_layer("qkv", N, C, 3 * C, true, false, false, peak);
    time_layer("attproj", N, C, C, true, false, false, peak);
    time_layer("fc", N, C, 4 * C, true, true, false, peak);
    time_layer("fcproj", N, 4 * C, C, true, false, true, peak);
    time_layer("head", chunk, C, V, false, false, false, peak);
    time_examples("qkv", N / 1024, 1024, C, 3 * C, 8, peak);
    time_examples("attproj", N / 1024, 1024, C, C, 8, peak);
    time_examples("fc", N / 1024, 1024, C, 4 * C, 8, peak);
    time_examples("fcproj", N / 1024, 1024, 4 * C, C, 8, peak);
    time_examples("head", chunk / 1024, 1024, C, V, 2, peak);
}

int main(int argc, char** argv) {
    for (MatmulPlans& p : plans) { matmul_open(&p, false); }
    check_all();
    for (MatmulPlans& p : plans) { matmul_close(&p); }
    if (argc < 2 || strcmp(argv[1], "check") != 0) { time_all(); }
    return check_summary();
}
