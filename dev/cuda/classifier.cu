// Checks and times llmc/classifier.cuh; see dev/cuda/harness.cuh for how to build and run.
#include "dev/cuda/harness.cuh"
#include "llmc/classifier.cuh"

static const bool IS_BF16 = sizeof(floatX) == 2;
// A bf16 result is off by 2^-9 at most, an fp32 one by the exponential's 2 ulp and the sums' rounding.
static const double TOLERANCE_GRADIENT = IS_BF16 ? 3e-3 : 5e-6, TOLERANCE_LOSS = 2e-6;

static std::vector<int> random_targets(int N, int V, uint64_t seed) {
    std::vector<int> targets(N);
    uint64_t state = seed;
    for (int i = 0; i < N; i++) { targets[i] = (int)(splitmix64(&state) % (uint64_t)V); }
    for (int i = 3; i < N; i += 7) { targets[i] = -1; }
    targets[0] = V - 1;
    if (N > 1) { targets[1] = 0; }
    return targets;
}

// Logits whose padding is NaN, which must not matter.
static std::vector<floatX> random_logits(int N, int V, int Vp, double mean, double std, uint64_t seed) {
    std::vector<floatX> logits = random_normal<floatX>((size_t)N * (size_t)Vp, mean, std, seed);
    for (int i = 0; i < N; i++) {
        for (int v = V; v < Vp; v++) { logits[(size_t)i * (size_t)Vp + (size_t)v] = (floatX)NAN; }
    }
    return logits;
}

// losses (N), dlogits (N, Vp) as defined, in double
static void reference(std::vector<double>* losses, std::vector<double>* dlogits, const std::vector<floatX>& logits,
                      const std::vector<int>& targets, double scale, int N, int V, int Vp) {
    losses->assign((size_t)N, 0);
    dlogits->assign((size_t)N * (size_t)Vp, 0);
    for (int i = 0; i < N; i++) {
        if (targets[(size_t)i] < 0) { continue; }
        const floatX* x = logits.data() + (size_t)i * (size_t)Vp;
        double* d = dlogits->data() + (size_t)i * (size_t)Vp;
        double top = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) { top = std::max(top, (double)to_float(x[v])); }
        for (int v = 0; v < V; v++) { sum += d[v] = exp((double)to_float(x[v]) - top); }
        for (int v = 0; v < V; v++) { d[v] *= scale / sum; }
        const int target = targets[(size_t)i];
        (*losses)[(size_t)i] = log(sum) - ((double)to_float(x[target]) - top);
        d[target] -= scale;
    }
}

// The targets' columns are far larger than the others and are checked apart from them.
static void check_gradient(const char* name, const std::vector<floatX>& out, const std::vector<double>& ref,
                           const std::vector<int>& targets, int N, int V, int Vp) {
    std::vector<floatX> rest = out;
    std::vector<double> rest_ref = ref;
    bool zero = true;
    for (int i = 0; i < N; i++) {
        const size_t row = (size_t)i * (size_t)Vp;
        if (targets[(size_t)i] >= 0) {
            rest[row + (size_t)targets[(size_t)i]] = (floatX)0.0f;
            rest_ref[row + (size_t)targets[(size_t)i]] = 0;
        }
        for (int v = targets[(size_t)i] < 0 ? 0 : V; v < Vp; v++) {
            zero = zero && to_float(out[row + (size_t)v]) == 0;
        }
    }
    check_close(name, out, ref, TOLERANCE_GRADIENT);
    check_close(name, rest, rest_ref, TOLERANCE_GRADIENT);
    check_that(zero, name);
}

static void check_shape(int N, int V, int Vp, double mean, double std, uint64_t seed) {
    char name[128];
    const float scale = 1.0f / 96;
    const std::vector<floatX> logits = random_logits(N, V, Vp, mean, std, seed);
    const std::vector<int> targets = random_targets(N, V, seed + 1);
    const size_t n = logits.size();
    std::vector<double> ref_losses, ref_dlogits;
    reference(&ref_losses, &ref_dlogits, logits, targets, scale, N, V, Vp);
    int* d_targets = device_copy(targets);
    float* d_losses = device_alloc<float>((size_t)N);
    floatX* d_logits = device_copy(logits);
    classifier_forward(d_losses, d_logits, d_targets, N, V, Vp, 0);
    snprintf(name, sizeof name, "loss alone, N %d V %d", N, V);
    check_close(name, host_copy(d_losses, (size_t)N), ref_losses, TOLERANCE_LOSS);
    snprintf(name, sizeof name, "loss alone leaves the logits as they are, N %d V %d", N, V);
    check_same_bits(name, host_copy(d_logits, n), logits);
    std::vector<floatX> first;
    for (int run = 0; run < 3; run++) { // twice as the shape asks for, once without shared memory
        cuda_check(cudaMemcpy(d_logits, logits.data(), n * sizeof(floatX), cudaMemcpyHostToDevice));
        cuda_check(cudaMemset(d_losses, 0xff, (size_t)N * sizeof(float)));
        if (run < 2) {
            classifier_forward_backward(d_logits, d_losses, d_targets, scale, N, V, Vp, 0);
        } else {
            classifier_launch<false>(d_logits, d_losses, d_targets, scale, N, V, Vp, 0);
        }
        const char* how = run < 2 ? "" : " without shared memory";
        const std::vector<floatX> out = host_copy(d_logits, n);
        snprintf(name, sizeof name, "loss%s, N %d V %d", how, N, V);
        check_close(name, host_copy(d_losses, (size_t)N), ref_losses, TOLERANCE_LOSS);
        snprintf(name, sizeof name, "same bits%s, N %d V %d", how, N, V);
        if (run > 0) { check_same_bits(name, out, first); }
        snprintf(name, sizeof name, "gradient%s, N %d V %d", how, N, V);
        if (run != 1) { check_gradient(name, out, ref_dlogits, targets, N, V, Vp); }
        if (run == 0) { first = out; }
    }
    cuda_check(cudaFree(d_targets));
    cuda_check(cudaFree(d_losses));
    cuda_check(cudaFree(d_logits));
}

// A NaN or an infinity spoils its own row and no other; a row without a target does not even look.
static void check_not_finite() {
    const int N = 5, V = 300, Vp = 384;
    std::vector<floatX> logits = random_logits(N, V, Vp, 0, 1, 99);
    logits[17] = (floatX)NAN;
    logits[(size_t)Vp + 299] = (floatX)INFINITY;
    logits[(size_t)3 * Vp + 5] = (floatX)NAN;
    logits[(size_t)4 * Vp + 5] = (floatX)-INFINITY;
    floatX* d_logits = device_copy(logits);
    int* d_targets = device_copy(std::vector<int>{1, 2, 3, -1, 4});
    float* d_losses = device_alloc<float>(N);
    classifier_forward_backward(d_logits, d_losses, d_targets, 1, N, V, Vp, 0);
    const std::vector<float> losses = host_copy(d_losses, N);
    const std::vector<floatX> out = host_copy(d_logits, logits.size());
    check_that(isnan(losses[0]) && isnan(to_float(out[0])), "a NaN among the logits reaches loss and gradient");
    check_that(isnan(losses[1]), "an infinite logit makes the loss NaN");
    check_that(isfinite(losses[2]) && isfinite(to_float(out[(size_t)2 * Vp])), "other rows stay finite");
    bool zero = losses[3] == 0;
    for (int v = 0; v < Vp; v++) { zero = zero && to_float(out[(size_t)3 * Vp + (size_t)v]) == 0; }
    check_that(zero, "a row without a target is zero, whatever its logits");
    check_that(isfinite(losses[4]) && to_float(out[(size_t)4 * Vp + 5]) == 0, "a logit of minus infinity has no part");
    cuda_check(cudaFree(d_logits));
    cuda_check(cudaFree(d_targets));
    cuda_check(cudaFree(d_losses));
}

static void check_gather(int B, int T, int V, int Vp, uint64_t seed) {
    const std::vector<floatX> dlogits = random_normal<floatX>((size_t)B * T * Vp, 0, 1, seed);
    std::vector<int> tokens((size_t)B * T);
    uint64_t state = seed;
    for (int& token : tokens) { token = (int)(splitmix64(&state) % (uint64_t)V); }
    std::vector<floatX> expected((size_t)B * T * T);
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            for (int s = 0; s < T; s++) {
                expected[((size_t)b * T + t) * T + s] = dlogits[((size_t)b * T + t) * Vp + tokens[(size_t)b * T + s]];
            }
        }
    }
    floatX *d_dlogits = device_copy(dlogits), *d_gathered = device_alloc<floatX>(expected.size());
    int* d_tokens = device_copy(tokens);
    classifier_gather(d_gathered, d_dlogits, d_tokens, B, T, Vp, 0);
    char name[128];
    snprintf(name, sizeof name, "gathered columns, B %d T %d V %d", B, T, V);
    check_same_bits(name, host_copy(d_gathered, expected.size()), expected);
    cuda_check(cudaFree(d_dlogits));
    cuda_check(cudaFree(d_gathered));
    cuda_check(cudaFree(d_tokens));
}

// N >= 64 rows of random logits on the device, the same 64 over and over: the time does not depend on their values.
static floatX* timing_logits(size_t N, int Vp) {
    const std::vector<floatX> some = random_normal<floatX>((size_t)64 * Vp, 0, 2, 5);
    floatX* logits = device_alloc<floatX>(N * (size_t)Vp);
    cuda_check(cudaMemcpy(logits, some.data(), some.size() * sizeof(floatX), cudaMemcpyHostToDevice));
    for (size_t row = 64; row < N; row += 64) {
        const size_t rows = std::min<size_t>(64, N - row);
        cuda_check(cudaMemcpy(logits + row * (size_t)Vp, logits, rows * (size_t)Vp * sizeof(floatX),
                              cudaMemcpyDeviceToDevice));
    }
    return logits;
}

static void time_shape(int B, int T, double bandwidth) {
    const int N = B * T, V = 50257, Vp = 50304;
    const size_t n = (size_t)N * Vp, bytes = n * sizeof(floatX);
    const int sets = buffer_sets(bytes);
    floatX *logits = timing_logits((size_t)N * (size_t)sets, Vp), *gathered = device_alloc<floatX>((size_t)T * T);
    std::vector<int> targets = random_targets(N, V, 11);
    for (int& target : targets) { target = std::max(target, 0); }
    int* d_targets = device_copy(targets);
    float* losses = device_alloc<float>((size_t)N);
    char name[128];
    const double forward = median_us(
        [&](int i) { classifier_forward(losses, logits + (size_t)(i % sets) * n, d_targets, N, V, Vp, 0); }, 30);
    snprintf(name, sizeof name, "loss alone             B %d T %d Vp %d", B, T, Vp);
    print_row(name, forward, (double)bytes, bandwidth);
    // One example after the other, over all sets.
    const double gather = median_us(
        [&](int i) {
            const size_t example = (size_t)(i % (B * sets));
            classifier_gather(gathered, logits + example * (size_t)T * Vp, d_targets, 1, T, Vp, 0);
        },
        30);
    snprintf(name, sizeof name, "gathered columns, 1 example T %d Vp %d", T, Vp);
    print_row(name, gather, (double)T * T * (32 + sizeof(floatX)), bandwidth);
    double both = median_us(
        [&](int i) {
            classifier_forward_backward(logits + (size_t)(i % sets) * n, losses, d_targets, 1.0f / (float)T, N, V, Vp,
                                        0);
        },
        30);
    snprintf(name, sizeof name, "loss and gradient      B %d T %d Vp %d", B, T, Vp);
    print_row(name, both, 2.0 * (double)bytes, bandwidth);
    both = median_us(
        [&](int i) {
            classifier_launch<false>(logits + (size_t)(i % sets) * n, losses, d_targets, 1.0f / (float)T, N, V, Vp, 0);
        },
        30);
    snprintf(name, sizeof name, "  without shared memory B %d T %d Vp %d", B, T, Vp);
    print_row(name, both, 2.0 * (double)bytes, bandwidth);
    cuda_check(cudaFree(logits));
    cuda_check(cudaFree(gathered));
    cuda_check(cudaFree(d_targets));
    cuda_check(cudaFree(losses));
}

int main(int argc, char** argv) {
    check_shape(1, 50257, 50304, 0, 1, 1);
    check_shape(300, 50257, 50304, -1, 3, 2); // more rows than resident blocks: the next row is fetched ahead
    check_shape(2, 50304, 50304, 0, 1, 3);
    check_shape(3, 65536, 65536, 0, 1, 4);
    check_shape(5, 1, 128, 0, 1, 5);
    check_shape(3001, 251, 256, 0, 5, 6);
    check_shape(17, 257, 384, 60, 20, 7);
    check_shape(33, 8193, 8320, -200, 30, 8);
    check_not_finite();
    check_gather(1, 1, 5, 128, 21);
    check_gather(3, 37, 300, 384, 22);
    check_gather(2, 300, 50257, 50304, 23);
    if (argc < 2 || strcmp(argv[1], "check") != 0) {
        const double bandwidth = copy_bandwidth();
        time_shape(64, 1024, bandwidth);
        time_shape(4, 2048, bandwidth);
    }
    return check_summary();
}
