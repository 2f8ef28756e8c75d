// Checks attention.cuh against double, and times it: the portable kernels and, where they run, those for compute capability
// 9.0. See harness.cuh.
#include "llmc/attention.cuh"
#include "dev/cuda/harness.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Plain double attention of one head

struct Head {
    int T, HS;
    std::vector<double> q, k, v, out, lse; // (T, HS), lse (T); q and k as given
    std::vector<double> dq, dk, dv;
};

// Divides the rows of x (T, HS) by their norms; returns the inverse norms.
static std::vector<double> normalise(std::vector<double>& x, int T, int HS) {
    std::vector<double> inverse((size_t)T);
    for (int t = 0; t < T; t++) {
        double square = 0;
        for (int i = 0; i < HS; i++) { square += x[t * HS + i] * x[t * HS + i]; }
        inverse[t] = 1 / std::max(sqrt(square), 1e-12);
        for (int i = 0; i < HS; i++) { x[t * HS + i] *= inverse[t]; }
    }
    return inverse;
}

// The gradient dx (T, HS) at the unit rows x^ becomes that at the rows before their normalisation.
static void normalise_backward(std::vector<double>& dx, const std::vector<double>& unit,
                               const std::vector<double>& inverse, int T, int HS) {
    for (int t = 0; t < T; t++) {
        double dot = 0;
        for (int i = 0; i < HS; i++) { dot += dx[t * HS + i] * unit[t * HS + i]; }
        if (inverse[t] >= 1e12) { dot = 0; }
        for (int i = 0; i < HS; i++) { dx[t * HS + i] = (dx[t * HS + i] - unit[t * HS + i] * dot) * inverse[t]; }
    }
}

// From q, k, v and dout (T, HS) to everything else.
static void reference_head(Head& h, const std::vector<double>& dout, double scale, bool cosine) {
    const int T = h.T, HS = h.HS;
    std::vector<double> q = h.q, k = h.k, p((size_t)T), q_inverse, k_inverse;
    if (cosine) {
        q_inverse = normalise(q, T, HS);
        k_inverse = normalise(k, T, HS);
    }
    auto dot = [&](const std::vector<double>& a, int i, const std::vector<double>& b, int j) {
        double sum = 0;
        for (int c = 0; c < HS; c++) { sum += a[i * HS + c] * b[j * HS + c]; }
        return sum;
    };
    h.out.assign((size_t)(T * HS), 0);
    h.lse.assign((size_t)T, 0);
    h.dq = h.dk = h.dv = h.out;
    for (int i = 0; i < T; i++) {
        double top = -INFINITY, sum = 0;
        for (int j = 0; j <= i; j++) { top = std::max(top, p[j] = scale * dot(q, i, k, j)); }
        for (int j = 0; j <= i; j++) { sum += p[j] = exp(p[j] - top); }
        h.lse[i] = top + log(sum);
        for (int j = 0; j <= i; j++) {
            p[j] /= sum;
            for (int c = 0; c < HS; c++) { h.out[i * HS + c] += p[j] * h.v[j * HS + c]; }
        }
        const double delta = dot(dout, i, h.out, i);
        for (int j = 0; j <= i; j++) {
            const double ds = scale * p[j] * (dot(dout, i, h.v, j) - delta);
            for (int c = 0; c < HS; c++) {
                h.dv[j * HS + c] += p[j] * dout[i * HS + c];
                h.dq[i * HS + c] += ds * k[j * HS + c];
                h.dk[j * HS + c] += ds * q[i * HS + c];
            }
        }
    }
    if (cosine) {
        normalise_backward(h.dq, q, q_inverse, T, HS);
        normalise_backward(h.dk, k, k_inverse, T, HS);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

// x[first + t * stride + i] for t < T, i < HS
template <class T> std::vector<T> head_of(const std::vector<T>& x, size_t first, size_t stride, int rows, int HS) {
    std::vector<T> head;
    for (int t = 0; t < rows; t++) {
        for (int i = 0; i < HS; i++) { head.push_back(x[first + (size_t)t * stride + (size_t)i]); }
    }
    return head;
}
template <class T> std::vector<double> to_double(const std::vector<T>& x) {
    std::vector<double> y;
    for (const T& value : x) { y.push_back((double)to_float(value)); }
    return y;
}

// Example b's head n of qkv (B, T, 3, NH, HS) and dout (B, T, NH, HS), with its reference.
static Head head_with_reference(const Attention& a, const std::vector<floatX>& qkv, const std::vector<floatX>& dout,
                                int b, int n) {
    const size_t C = (size_t)a.NH * a.HS, row = (size_t)b * a.T, column = (size_t)(n * a.HS);
    auto part = [&](size_t i) { return to_double(head_of(qkv, row * 3 * C + i * C + column, 3 * C, a.T, a.HS)); };
    Head h;
    h.T = a.T;
    h.HS = a.HS;
    h.q = part(0);
    h.k = part(1);
    h.v = part(2);
    reference_head(h, to_double(head_of(dout, row * C + column, C, a.T, a.HS)), (double)a.scale, a.cosine);
    return h;
}

struct Result {
    std::vector<floatX> out;
    std::vector<int8_t> remainder;
    std::vector<floatX> dqkv;
    std::vector<float> lse;
};

static Result run_once(const Attention& a, const std::vector<floatX>& qkv, const std::vector<floatX>& dout,
                       bool keep_remainder = sizeof(floatX) == 2) {
    floatX *d_qkv = device_copy(qkv), *d_dout = device_copy(dout);
    floatX *out = device_alloc<floatX>(dout.size()), *dqkv = device_alloc<floatX>(qkv.size());
    int8_t* remainder = keep_remainder ? device_alloc<int8_t>(dout.size()) : NULL;
    float* lse = device_alloc<float>((size_t)a.B * a.NH * a.T);
    char* scratch = device_alloc<char>(attention_scratch_bytes(a));
    attention_forward(out, remainder, lse, d_qkv, scratch, a, 0);
    attention_backward(dqkv, d_dout, out, remainder, lse, d_qkv, scratch, a, 0);
    const Result r = {host_copy(out, dout.size()), host_copy(remainder, keep_remainder ? dout.size() : 0),
                      host_copy(dqkv, qkv.size()), host_copy(lse, (size_t)a.B * a.NH * a.T)};
    for (void* p :
         {(void*)d_qkv, (void*)d_dout, (void*)out, (void*)remainder, (void*)dqkv, (void*)lse, (void*)scratch}) {
        cuda_check(cudaFree(p));
    }
    return r;
}

// The worst row of HS numbers, one token of one head: ||out - ref|| relative to the root mean square of the norms of ref's rows.
// A NaN stays the worst. Where all of ref is zero the bound is absolute, as in check_close.
static void check_rows(const char* what, const std::vector<floatX>& out, const std::vector<double>& ref, int HS,
                       double tolerance) {
    if (!check_that(out.size() == ref.size() && ref.size() % (size_t)HS == 0, what)) { return; }
    double worst = 0, sum = 0;
    size_t worst_row = 0;
    for (size_t at = 0; at < ref.size(); at += (size_t)HS) {
        double square = 0;
        for (size_t i = at; i < at + (size_t)HS; i++) {
            const double d = (double)to_float(out[i]) - ref[i];
            square += d * d;
            sum += ref[i] * ref[i];
        }
        const double error = sqrt(square);
        if (error > worst || isnan(error)) {
            worst = error;
            worst_row = at / (size_t)HS;
        }
    }
    const double rms = sum > 0 ? sqrt(sum / (double)(ref.size() / (size_t)HS)) : 1;
    if (!check_that(worst / rms <= tolerance, what)) {
        printf("    row %zu is off by %.3e of the root mean square row, allowed %.3e\n", worst_row, worst / rms,
               tolerance);
    }
}

// The whole, and its worst row, which may be off by ten times as much: roundings go with a row's own norm, and the first rows,
// averages of few keys, are up to ten times the root mean square row of T = 700; a row that is wrong is off by about its norm.
static void check_output(const char* what, const std::vector<floatX>& out, const std::vector<double>& ref, int HS,
                         double tolerance) {
    char row[200];
    snprintf(row, sizeof row, "%s, worst row", what);
    check_close(what, out, ref, tolerance);
    check_rows(row, out, ref, HS, 10 * tolerance);
}

// Tolerances. fp32: sums of up to T + HS terms of rounding 6e-8. bf16: the outputs are rounded (1.7e-3 of the norm), and so are
// probabilities and ds: each a like amount, averaged over many terms. With one token dq and dk are zero but for rounding: then the
// bound is absolute, which check_close sees by itself.
static void check_version(int B, int T, int NH, int HS, bool cosine, double std, bool portable) {
    const bool fp32 = sizeof(floatX) == 4;
    const size_t C = (size_t)NH * HS, tokens = (size_t)B * T;
    const Attention a = {B, T, NH, HS, (float)((cosine ? 8.0 : 1.0) / sqrt((double)HS)), cosine, portable};
    std::vector<floatX> qkv = random_normal<floatX>(tokens * 3 * C, 0, std, 11 + (uint64_t)(T * HS));
    const std::vector<floatX> dout = random_normal<floatX>(tokens * C, 0, 1, 12 + (uint64_t)(T * HS));
    if (cosine) { // a row whose norm lies below the floor
        for (int i = 0; i < HS; i++) { qkv[(tokens - 1) * 3 * C + (size_t)i] = (floatX)0.0f; }
    }
    const Result r = run_once(a, qkv, dout), again = run_once(a, qkv, dout);
    std::vector<double> out, lse, grad[3];
    std::vector<floatX> r_out, r_grad[3];
    for (int b = 0; b < B; b++) {
        for (int n = 0; n < NH; n++) {
            const size_t at = (size_t)b * T * 3 * C + (size_t)(n * HS), o = (size_t)b * T * C + (size_t)(n * HS);
            const Head h = head_with_reference(a, qkv, dout, b, n);
            // the row below the floor has a gradient 1e12 times the others'
            const std::vector<double>* grads[3] = {&h.dq, &h.dk, &h.dv};
            for (int g = 0; g < 3; g++) {
                const std::vector<floatX> own = head_of(r.dqkv, at + (size_t)g * C, 3 * C, T, HS);
                const bool floored = cosine && g == 0 && n == 0 && b == B - 1;
                const size_t size = (size_t)(floored ? T - 1 : T) * HS;
                grad[g].insert(grad[g].end(), grads[g]->begin(), grads[g]->begin() + size);
                r_grad[g].insert(r_grad[g].end(), own.begin(), own.begin() + size);
                if (floored && T > 1) {
                    check_close("dq below the floor", std::vector<floatX>(own.begin() + size, own.end()),
                                std::vector<double>(grads[g]->begin() + size, grads[g]->end()), fp32 ? 1e-5 : 3e-2);
                }
            }
            const std::vector<floatX> own = head_of(r.out, o, C, T, HS);
            out.insert(out.end(), h.out.begin(), h.out.end());
            r_out.insert(r_out.end(), own.begin(), own.end());
            lse.insert(lse.end(), h.lse.begin(), h.lse.end());
        }
    }
    char what[128];
    snprintf(what, sizeof what, "%sB %d, T %d, NH %d, HS %d%s", portable ? "" : "Hopper, ", B, T, NH, HS,
             cosine ? ", cosine" : "");
    auto name = [&](const char* part) {
        static char text[160];
        snprintf(text, sizeof text, "%s: %s", what, part);
        return text;
    };
    check_output(name("out"), r_out, out, HS, fp32 ? 1e-5 : 5e-3);
    check_close(name("lse"), r.lse, lse, fp32 ? 1e-5 : cosine ? 2e-3 : 1e-5);
    check_output(name("dq"), r_grad[0], grad[0], HS, fp32 ? 2e-5 : 1e-2);
    check_output(name("dk"), r_grad[1], grad[1], HS, fp32 ? 2e-5 : 1e-2);
    check_output(name("dv"), r_grad[2], grad[2], HS, fp32 ? 1e-5 : 5e-3);
    check_same_bits(name("out, same bits"), r.out, again.out);
    check_same_bits(name("remainder, same bits"), r.remainder, again.remainder);
    check_same_bits(name("dqkv, same bits"), r.dqkv, again.dqkv);
    check_same_bits(name("lse, same bits"), r.lse, again.lse);
}

// Every version that this device runs.
static void check_attention(int B, int T, int NH, int HS, bool cosine, double std) {
    check_version(B, T, NH, HS, cosine, std, true);
    if (attention_on_hopper({B, T, NH, HS, 1, cosine})) { check_version(B, T, NH, HS, cosine, std, false); }
}

// unrounded() of attention_common.cuh, in plain words: the byte counts units of 2^-8 of the last place of bf16.
static float unrounded_on_host(floatX rounded, int8_t remainder) {
    const float x = to_float(rounded);
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += remainder * 256;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// Queries of zero weigh all keys alike, and 1 is exact in bf16: out and its remainder together are right to more digits than bf16
// has. 2e-5: the remainder's own rounding and sums of T numbers in fp32.
static void check_remainder_itself(const Attention& a, std::vector<floatX> qkv, const std::vector<floatX>& dout,
                                   const char* version) {
    const size_t C = (size_t)a.NH * a.HS, tokens = (size_t)a.B * a.T;
    for (size_t t = 0; t < tokens; t++) { std::fill_n(&qkv[t * 3 * C], C, (floatX)0.0f); }
    const Result r = run_once(a, qkv, dout, true);
    std::vector<float> whole(r.out.size());
    std::vector<double> ref(r.out.size());
    for (size_t i = 0; i < whole.size(); i++) {
        whole[i] = (float)((double)unrounded_on_host(r.out[i], r.remainder[i]));
        const size_t t = i / C, start = t / (size_t)a.T * (size_t)a.T; // the mean of v over this token and those before
        ref[i] = t == start ? 0 : ref[i - C] * (double)(t - start);
        ref[i] = (ref[i] + (double)to_float(qkv[t * 3 * C + 2 * C + i % C])) / (double)(t - start + 1);
    }
    char what[100];
    snprintf(what, sizeof what, "%sHS %d: out with its remainder", version, a.HS);
    check_close(what, whole, ref, 2e-5);
}

// Where few keys have most of the weight and all keys have much in common, the rounding of out is the largest error of dq and dk:
// the remainder takes away half of it and more (numbers in double, with only out, p and ds rounded: 0.45 and 0.56 are left).
static void check_remainder_gradients(const Attention& a, std::vector<floatX> qkv, const std::vector<floatX>& dout,
                                      const char* version) {
    const size_t C = (size_t)a.NH * a.HS, tokens = (size_t)a.B * a.T;
    for (size_t t = 0; t < tokens; t++) {
        floatX *q = &qkv[t * 3 * C], *k = q + C;
        for (size_t i = 0; i < C; i++) {
            q[i] = (floatX)(6 * (float)q[i]);
            k[i] = (floatX)(2 + (float)k[i]);
        }
    }
    const Result with = run_once(a, qkv, dout, true), without = run_once(a, qkv, dout, false);
    for (int head = 0; head < a.B * a.NH; head++) {
        const int b = head / a.NH, n = head % a.NH;
        const Head h = head_with_reference(a, qkv, dout, b, n);
        const std::vector<double>* grads[] = {&h.dq, &h.dk};
        for (int g = 0; g < 2; g++) {
            auto error = [&](const Result& r) {
                const size_t at = (size_t)b * a.T * 3 * C + (size_t)g * C + (size_t)(n * a.HS);
                return relative_error(head_of(r.dqkv, at, 3 * C, a.T, a.HS), *grads[g]);
            };
            char what[120];
            snprintf(what, sizeof what, "%sHS %d, head %d: error of %s %.1e with the remainder, %.1e without", version,
                     a.HS, head, g == 0 ? "dq" : "dk", error(with), error(without));
            check_that(error(with) < 0.75 * error(without), what);
        }
    }
}

static void check_remainder(int HS) {
    for (bool portable : {true, false}) {
        const Attention a = {2, 400, 3, HS, (float)(1 / sqrt((double)HS)), false, portable};
        if (!portable && !attention_on_hopper(a)) { continue; }
        const size_t C = (size_t)a.NH * HS, tokens = (size_t)a.B * a.T;
        const std::vector<floatX> qkv = random_normal<floatX>(tokens * 3 * C, 0, 1, 21);
        const std::vector<floatX> dout = random_normal<floatX>(tokens * C, 0, 1, 22);
        check_remainder_itself(a, qkv, dout, portable ? "" : "Hopper, ");
        check_remainder_gradients(a, qkv, dout, portable ? "" : "Hopper, ");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

// Operations a second of the tensor cores at the highest clock, on bf16; 0 where not known.
static double tensor_core_rate() {
    int clock_khz, processors, major, minor;
    cuda_check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
    cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    const double a_clock = major == 9 ? 4096 : major == 8 && minor == 0 ? 2048 : 0;
    return sizeof(floatX) == 2 ? a_clock * clock_khz * 1e3 * processors : 0;
}

// Microseconds of the forward and the backward pass.
static void time_version(const Attention& a, double (&us)[2]) {
    const size_t N = (size_t)a.B * a.T * a.NH * a.HS, rows = (size_t)a.B * a.NH * a.T;
    const int sets = buffer_sets(8 * N * sizeof(floatX));
    const std::vector<floatX> values = random_normal<floatX>((size_t)1 << 22, 0, 1, 5);
    std::vector<floatX*> qkv, out, dout, dqkv;
    std::vector<int8_t*> remainder;
    std::vector<float*> lse;
    auto filled = [&](size_t n) {
        floatX* p = device_alloc<floatX>(n);
        for (size_t i = 0; i < n; i += values.size()) {
            cuda_check(cudaMemcpy(p + i, values.data(), std::min(n - i, values.size()) * sizeof(floatX),
                                  cudaMemcpyHostToDevice));
        }
        return p;
    };
    for (int i = 0; i < sets; i++) {
        qkv.push_back(filled(3 * N));
        dout.push_back(filled(N));
        out.push_back(device_alloc<floatX>(N));
        remainder.push_back(device_alloc<int8_t>(N));
        dqkv.push_back(device_alloc<floatX>(3 * N));
        lse.push_back(device_alloc<float>(rows));
    }
    char* scratch = device_alloc<char>(attention_scratch_bytes(a));
    us[0] = median_us([&](int i) {
        const int s = i % sets;
        attention_forward(out[s], remainder[s], lse[s], qkv[s], scratch, a, 0);
    });
    us[1] = median_us([&](int i) {
        const int s = i % sets;
        attention_backward(dqkv[s], dout[s], out[s], remainder[s], lse[s], qkv[s], scratch, a, 0);
    });
    for (int i = 0; i < sets; i++) {
        for (floatX* p : {qkv[i], out[i], dout[i], dqkv[i]}) { cuda_check(cudaFree(p)); }
        cuda_check(cudaFree(remainder[i]));
        cuda_check(cudaFree(lse[i]));
    }
    cuda_check(cudaFree(scratch));
}

// The versions beside each other, with their shares of the tensor cores' rate.
static void time_attention(int B, int NH, int T, int HS, bool cosine, double rate) {
    const Attention portable = {B, T, NH, HS, (float)(1 / sqrt((double)HS)), cosine, true};
    const Attention best = {B, T, NH, HS, portable.scale, cosine};
    const bool hopper = attention_on_hopper(best);
    double us[2][2];
    time_version(portable, us[0]);
    if (hopper) { time_version(best, us[1]); }
    for (int pass = 0; pass < 2; pass++) {
        const double flops = (pass == 0 ? 2.0 : 5.0) * B * NH * T * (double)T * HS;
        char what[128];
        snprintf(what, sizeof what, "%s B %d, %d heads, T %d, d %d%s", pass == 0 ? "forward " : "backward", B, NH, T,
                 HS, cosine ? ", cosine" : "");
        printf("%-52s", what);
        for (int version = 0; version < (hopper ? 2 : 1); version++) {
            const double time = us[version][pass];
            printf("  %s %8.1f us %4.0f TFLOP/s", version == 0 ? "portable" : "Hopper", time, flops / time / 1e6);
            if (rate > 0) { printf(" %5.1f%%", 100 * flops / (time * 1e-6) / rate); }
        }
        printf("\n");
    }
}

static void check_all() {
    for (int HS : {16, 48, 64, 80, 128}) {
        for (int T : {1, 17, 64, 100, 257}) { check_attention(2, T, 3, HS, false, 1); }
        check_attention(1, 100, 2, HS, true, 1);
    }
    for (int HS : {64, 128}) { // on both sides of a tile and of a block of rows
        for (int T : {2, 63, 65, 127, 128, 129, 191, 193, 200, 400}) { check_attention(1, T, 1, HS, false, 1); }
        check_attention(16, 200, 12, HS, false, 1); // more blocks of rows than multiprocessors, of unlike sizes
    }
    for (int HS : {32, 96, 112}) { check_attention(1, 129, 1, HS, false, 1); }
    check_attention(1, 1, 1, 64, true, 1);
    check_attention(3, 257, 2, 64, true, 0.02);  // cosine attention does not see the size of q and k
    check_attention(3, 257, 2, 128, true, 0.02); // nor here
    check_attention(1, 257, 2, 64, false, 4);    // probabilities near 0 and 1
    check_attention(1, 257, 2, 128, false, 4);
    if (sizeof(floatX) == 2) {
        for (int HS : {16, 48, 64, 128}) { check_remainder(HS); }
    }
    check_attention(1, 700, 1, 64, false, 1); // several blocks of queries and keys
    check_attention(1, 700, 1, 128, false, 1);
}

int main(int argc, char** argv) {
    const bool checks_only = argc > 1 && strcmp(argv[1], "check") == 0;
    const bool times_only = argc > 1 && strcmp(argv[1], "time") == 0; // for dev/bench/gpu_attention.py
    if (!times_only) { check_all(); }
    const int status = times_only ? 0 : check_summary();
    if (checks_only) { return status; }
    const double rate = tensor_core_rate();
    printf("TFLOP/s count the causal half: 4*B*NH*T*T*d/2 forward, 2.5 times that backward");
    if (rate > 0) { printf("; the floor is %.0f TFLOP/s, the tensor cores at the highest clock", rate / 1e12); }
    printf("\n");
    time_attention(64, 12, 1024, 64, false, rate);
    time_attention(32, 12, 2048, 64, false, rate);
    time_attention(32, 16, 1024, 128, false, rate);
    time_attention(8, 16, 4096, 128, false, rate);
    time_attention(32, 12, 2048, 64, true, rate);
    return status;
}
