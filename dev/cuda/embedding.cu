// Checks and times llmc/embedding.cuh; see dev/cuda/harness.cuh for how to build and run.
#include "dev/cuda/harness.cuh"
#include "llmc/embedding.cuh"

static const bool IS_BF16 = sizeof(floatX) == 2;

enum { UNIFORM, ZIPF, ONE_TOKEN };

// Tokens as text has them (the k-th most frequent about 1/k as often as the first), or evenly, or all the same.
static std::vector<int> random_tokens(size_t N, int V, int how, uint64_t seed) {
    std::vector<int> tokens(N);
    uint64_t state = seed;
    for (int& token : tokens) {
        const double u = splitmix64_uniform(&state);
        token = how == UNIFORM ? (int)(u * V) : how == ZIPF ? (int)exp(u * log(V + 1.0)) - 1 : V - 1;
        token = std::min(token, V - 1);
    }
    return tokens;
}

typedef struct {
    std::vector<double> dwte, dwpe;
    double sum_sq_wte, sum_sq_wpe;
} Gradients;

// As defined, in double; dwte (V, C), dwpe (T, C) and the sums start from the given values.
static void reference(Gradients* g, const std::vector<floatX>& dout, const std::vector<int>& tokens,
                      const std::vector<floatX>& head_rows, double mult, int B, int T, int V, int C) {
    std::vector<double> e((size_t)V * C);
    for (int b = 0; b < B; b++) {
        std::fill(e.begin(), e.end(), 0.0);
        for (int t = 0; t < T; t++) {
            const size_t row = ((size_t)b * T + t) * C, token = (size_t)tokens[(size_t)b * T + t];
            for (int c = 0; c < C; c++) {
                const double d = mult * (double)to_float(dout[row + c]);
                e[token * C + c] += d;
                g->dwte[token * C + c] += d;
                g->dwpe[(size_t)t * C + c] += d;
                g->sum_sq_wpe += d * d;
                g->sum_sq_wte += 2 * d * (double)to_float(head_rows[row + c]);
            }
        }
        for (const double x : e) { g->sum_sq_wte += x * x; }
    }
}

static void check_forward(const char* shape, const std::vector<int>& tokens, int B, int T, int V, int C, float mult) {
    const std::vector<floatX> wte = random_normal<floatX>((size_t)V * C, 0, 1, 31);
    const std::vector<floatX> wpe = random_normal<floatX>((size_t)T * C, 0, 1, 32);
    std::vector<double> ref((size_t)B * T * C);
    for (size_t i = 0; i < ref.size(); i++) {
        const size_t row = i / C, c = i % C;
        ref[i] = mult * ((double)to_float(wte[(size_t)tokens[row] * C + c]) + (double)to_float(wpe[row % T * C + c]));
    }
    floatX *d_wte = device_copy(wte), *d_wpe = device_copy(wpe), *out = device_alloc<floatX>(ref.size());
    int* d_tokens = device_copy(tokens);
    embedding_forward(out, d_tokens, d_wte, d_wpe, mult, B, T, C, 0);
    check_close(shape, host_copy(out, ref.size()), ref, IS_BF16 ? 3e-3 : 1e-6); // bf16: rounded once
    cuda_check(cudaFree(d_wte));
    cuda_check(cudaFree(d_wpe));
    cuda_check(cudaFree(out));
    cuda_check(cudaFree(d_tokens));
}

// Rows of equal tokens within an example are equal in head_rows, as the head makes them.
static std::vector<floatX> random_head_rows(const std::vector<int>& tokens, int B, int T, int C) {
    std::vector<floatX> rows = random_normal<floatX>((size_t)B * T * C, 0.5, 1, 33);
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            int first = 0;
            while (tokens[(size_t)b * T + first] != tokens[(size_t)b * T + t]) { first++; }
            std::copy_n(rows.begin() + ((size_t)b * T + first) * C, C, rows.begin() + ((size_t)b * T + t) * C);
        }
    }
    return rows;
}

static void check_shape(int B, int T, int V, int C, int how, float mult) {
    char shape[128], name[192];
    snprintf(shape, sizeof shape, "B %d T %d V %d C %d tokens %d", B, T, V, C, how);
    const std::vector<int> tokens = random_tokens((size_t)B * T, V, how, 30);
    check_forward(shape, tokens, B, T, V, C, mult);
    const std::vector<floatX> dout = random_normal<floatX>((size_t)B * T * C, 0.1, 1, 34);
    const std::vector<floatX> head_rows = random_head_rows(tokens, B, T, C);
    const std::vector<float> dwte = random_normal<float>((size_t)V * C, 0, 1, 35);
    const std::vector<float> dwpe = random_normal<float>((size_t)T * C, 0, 1, 36);
    Gradients ref = {{dwte.begin(), dwte.end()}, {dwpe.begin(), dwpe.end()}, 7, 9};
    reference(&ref, dout, tokens, head_rows, mult, B, T, V, C);
    floatX *d_dout = device_copy(dout), *d_head_rows = device_copy(head_rows);
    int* d_tokens = device_copy(tokens);
    char* scratch = device_alloc<char>(embedding_backward_scratch(B, T, C));
    std::vector<float> first_dwte, first_dwpe;
    std::vector<double> first_sums;
    for (int run = 0; run < 3; run++) { // twice with norms, once without
        float *d_dwte = device_copy(dwte), *d_dwpe = device_copy(dwpe);
        double* d_sums = device_copy(std::vector<double>{7, 9});
        embedding_backward(d_dwte, d_dwpe, run < 2 ? d_sums : NULL, run < 2 ? d_sums + 1 : NULL, d_dout, d_tokens,
                           run < 2 ? d_head_rows : NULL, mult, B, T, C, scratch, 0);
        const std::vector<float> out_dwte = host_copy(d_dwte, dwte.size()), out_dwpe = host_copy(d_dwpe, dwpe.size());
        const std::vector<double> sums = host_copy(d_sums, 2);
        if (run == 0) {
            first_dwte = out_dwte, first_dwpe = out_dwpe, first_sums = sums;
            snprintf(name, sizeof name, "dwte %s", shape); // fp32 sums of up to B T numbers
            check_close(name, out_dwte, ref.dwte, 1e-6);
            snprintf(name, sizeof name, "dwpe %s", shape);
            check_close(name, out_dwpe, ref.dwpe, 1e-6);
            snprintf(name, sizeof name, "sum_sq_wte %s", shape);
            check_that(fabs(sums[0] - ref.sum_sq_wte) <= 2e-6 * (fabs(ref.sum_sq_wte) + ref.sum_sq_wpe), name);
            snprintf(name, sizeof name, "sum_sq_wpe %s", shape);
            check_that(fabs(sums[1] - ref.sum_sq_wpe) <= 2e-6 * ref.sum_sq_wpe, name);
        } else {
            snprintf(name, sizeof name, "same bits, run %d, %s", run, shape);
            check_same_bits(name, out_dwte, first_dwte);
            check_same_bits(name, out_dwpe, first_dwpe);
            if (run == 1) { check_same_bits(name, sums, first_sums); }
        }
        cuda_check(cudaFree(d_dwte));
        cuda_check(cudaFree(d_dwpe));
        cuda_check(cudaFree(d_sums));
    }
    cuda_check(cudaFree(d_dout));
    cuda_check(cudaFree(d_head_rows));
    cuda_check(cudaFree(d_tokens));
    cuda_check(cudaFree(scratch));
}

static void time_shape(int B, int T, int C, int how, double bandwidth) {
    const int V = 50257;
    const size_t N = (size_t)B * T, n = N * C;
    const std::vector<int> tokens = random_tokens(N, V, how, 40);
    std::vector<int> distinct = tokens;
    std::sort(distinct.begin(), distinct.end());
    const double rows = (double)(std::unique(distinct.begin(), distinct.end()) - distinct.begin());
    const int sets = buffer_sets(n * sizeof(floatX));
    floatX *wte = device_alloc<floatX>((size_t)V * C), *wpe = device_alloc<floatX>((size_t)T * C);
    floatX *x = device_alloc<floatX>(n * sets), *head_rows = device_alloc<floatX>(n);
    float *dwte = device_alloc<float>((size_t)V * C), *dwpe = device_alloc<float>((size_t)T * C);
    double* sums = device_alloc<double>(2);
    int* d_tokens = device_copy(tokens);
    char *scratch = device_alloc<char>(embedding_backward_scratch(B, T, C)), name[128];
    const double s = sizeof(floatX), gradient_bytes = (double)n * s + 8 * (rows + T) * C;
    double us =
        median_us([&](int i) { embedding_forward(x + (size_t)(i % sets) * n, d_tokens, wte, wpe, 1, B, T, C, 0); });
    snprintf(name, sizeof name, "forward             B %d T %d C %d", B, T, C);
    print_row(name, us, (double)n * s + (rows + T) * C * s, bandwidth);
    us = median_us([&](int i) {
        embedding_backward(dwte, dwpe, NULL, NULL, x + (size_t)(i % sets) * n, d_tokens, NULL, 1, B, T, C, scratch, 0);
    });
    snprintf(name, sizeof name, "backward%s B %d T %d C %d", how == ONE_TOKEN ? ", one token" : "           ", B, T, C);
    print_row(name, us, gradient_bytes, bandwidth);
    us = median_us([&](int i) {
        embedding_backward(dwte, dwpe, sums, sums + 1, x + (size_t)(i % sets) * n, d_tokens, head_rows, 1, B, T, C,
                           scratch, 0);
    });
    snprintf(name, sizeof name, "  with norms        B %d T %d C %d", B, T, C);
    print_row(name, us, gradient_bytes + (double)n * s, bandwidth);
    EmbeddingScratch layout = embedding_layout(scratch, B, T, C);
    us = median_us([&](int) { embedding_sort_keys(&layout, (int)N, 0); });
    printf("  of which the sort %66.1f us\n", us);
    for (void* p : {(void*)wte, (void*)wpe, (void*)x, (void*)head_rows, (void*)dwte, (void*)dwpe, (void*)sums,
                    (void*)d_tokens, (void*)scratch}) {
        cuda_check(cudaFree(p));
    }
}

int main(int argc, char** argv) {
    check_shape(1, 1, 1, 8, UNIFORM, 1);
    check_shape(1, 31, 3, 8, UNIFORM, 2);
    check_shape(2, 33, 5, 264, UNIFORM, 0.5f);
    check_shape(3, 64, 50, 768, ZIPF, 1);
    check_shape(7, 37, 300, 776, ZIPF, 1);
    check_shape(9, 129, 1000, 128, UNIFORM, 3);
    check_shape(33, 65, 7, 136, ZIPF, 1);       // runs over many chunks
    check_shape(5, 700, 300, 64, ONE_TOKEN, 1); // one run over more chunks than a warp has lanes
    check_shape(64, 16, 2000, 1600, ZIPF, 1);
    check_shape(2, 1024, 65536, 16, UNIFORM, 1); // tokens of 16 bits
    if (argc < 2 || strcmp(argv[1], "check") != 0) {
        const double bandwidth = copy_bandwidth();
        time_shape(64, 1024, 768, ZIPF, bandwidth);
        time_shape(32, 2048, 768, ZIPF, bandwidth);
        time_shape(32, 1024, 1024, ZIPF, bandwidth);
        time_shape(1024, 64, 768, ZIPF, bandwidth);
        time_shape(64, 1024, 768, ONE_TOKEN, bandwidth);
    }
    return check_summary();
}
