/*
Tests of llmc/rand.h against the published reference outputs of SplitMix64 and mt19937, and against PyTorch.

The numbers called torch's were printed by PyTorch 2.15.0 on the CPU after torch.manual_seed(42); those of
trunc_normal_ by the same operations as PyTorch 2.11's (uniform_, erfinv_, mul_, clamp_), because 2.12 changed the
method. PyTorch's vectorised logarithm, sine and cosine differ from the C library's in the last bit of a float, so the
numbers agree to 1e-6 standard deviations each and their sums to 1e-5.
*/
#include "llmc/rand.h"
#include "dev/test/test.h"

static void test_splitmix64(void) {
    // The first outputs for the seed 1234567, as published with the generator.
    const uint64_t expected[] = {UINT64_C(6457827717110365317), UINT64_C(3203168211198807973),
                                 UINT64_C(9817491932198370423), UINT64_C(4593380528125082431),
                                 UINT64_C(16408922859458223821)};
    uint64_t state = 1234567;
    for (int i = 0; i < 5; i++) { CHECK(splitmix64(&state) == expected[i]); }
}

static void test_splitmix64_uniform(void) {
    uint64_t state = 7;
    double sum = 0, smallest = 1, largest = 0;
    const int n = 100000;
    for (int i = 0; i < n; i++) {
        double u = splitmix64_uniform(&state);
        sum += u;
        smallest = fmin(smallest, u);
        largest = fmax(largest, u);
    }
    CHECK(smallest >= 0 && largest < 1);
    CHECK(smallest < 1e-3 && largest > 1 - 1e-3);
    CHECK_CLOSE(sum / n, 0.5, 5 * sqrt(1.0 / 12 / n)); // five standard errors of the mean
}

static void test_mt19937(void) {
    // The reference implementation's default seed: its first output, and the 10,000th that the C++ standard demands.
    Mt19937 r;
    mt19937_seed(&r, 5489);
    uint32_t word = mt19937_u32(&r);
    CHECK(word == UINT32_C(3499211612));
    for (int i = 2; i <= 10000; i++) { word = mt19937_u32(&r); }
    CHECK(word == UINT32_C(4123659995));
}

static void test_uniform(void) {
    // torch.manual_seed(42); torch.rand(3) and torch.rand(3, dtype=torch.float64): exact, no rounding is involved
    const float expected_float[] = {0x1.c3b8ccp-1f, 0x1.d47b66p-1f, 0x1.880d7p-2f};
    const double expected_double[] = {0x1.dc66cbea3db30p-5, 0x1.01ae177aca870p-4, 0x1.fa3563ccea238p-4};
    Mt19937 r;
    mt19937_seed(&r, 42);
    for (int i = 0; i < 3; i++) { CHECK(mt19937_float(&r) == expected_float[i]); }
    mt19937_seed(&r, 42);
    for (int i = 0; i < 3; i++) { CHECK(mt19937_double(&r) == expected_double[i]); }
}

// What PyTorch drew: the first two and the last two numbers, the sum of all and of their squares.
typedef struct {
    int n;
    double first[2], last[2], sum, sum_sq;
} Draw;

static void check_draw(const float* x, const Draw* d, double std) {
    double sum = 0, sum_sq = 0;
    for (int i = 0; i < d->n; i++) {
        sum += (double)x[i];
        sum_sq += (double)x[i] * (double)x[i];
    }
    for (int i = 0; i < 2; i++) {
        CHECK_CLOSE((double)x[i] / std, d->first[i] / std, 1e-6);
        CHECK_CLOSE((double)x[d->n - 2 + i] / std, d->last[i] / std, 1e-6);
    }
    CHECK_CLOSE(sum / std, d->sum / std, 1e-5);
    CHECK_CLOSE(sum_sq / (std * std), d->sum_sq / (std * std), 1e-5);
}

static void test_normal_against_torch(void) {
    // torch.randn(n): below 16 numbers in pairs of doubles, from 16 on in blocks with a redrawn tail
    const Draw draws[] = {
        {5,
         {0.33669036626815796, 0.12880940735340118},
         {0.23033303022384644, -1.1228563785552979},
         -0.19256120920181274,
         1.4987846186745828},
        {10,
         {0.33669036626815796, 0.12880940735340118},
         {0.46165722608566284, 0.2673508822917938},
         1.920322984457016,
         7.101300411527727},
        {16,
         {1.9269152879714966, 1.4872840642929077},
         {-0.7688388824462891, 0.7624453902244568},
         -2.1876682862639427,
         23.15404690761626},
        {20,
         {1.9269152879714966, 1.4872840642929077},
         {0.8034093379974365, -0.6215953826904297},
         4.323166638612747,
         19.415034713914274},
        {33,
         {1.9269152879714966, 1.4872840642929077},
         {-0.4879138767719269, -1.4180599451065063},
         -3.239474695175886,
         42.61579192668955},
        {1000,
         {1.9269152879714966, 1.4872840642929077},
         {-0.37975940108299255, -0.8534544110298157},
         4.23129390826216,
         1005.9452879845347},
    };
    float x[1000];
    for (size_t i = 0; i < sizeof draws / sizeof draws[0]; i++) {
        Mt19937 r;
        mt19937_seed(&r, 42);
        normal_fill(&r, x, (size_t)draws[i].n, 0, 1);
        check_draw(x, &draws[i], 1);
    }
}

// The second number of an unfinished pair waits, through a draw in blocks, for the next small draw.
static void test_normal_sequence_against_torch(void) {
    const Draw a = {5,
                    {0.33669036626815796, 0.12880940735340118},
                    {0.23033303022384644, -1.1228563785552979},
                    -0.19256120920181274,
                    1.4987846186745828};
    const Draw b = {20,
                    {-0.24825750291347504, -1.2082147598266602},
                    {-1.234653115272522, -0.4879138767719269},
                    -5.667230486869812,
                    21.1158978773945};
    const Draw c = {3,
                    {-0.18632829189300537, 0.2815195620059967},
                    {0.2815195620059967, 0.056163541972637177},
                    0.1513548120856285,
                    0.11712583959872541};
    const Draw d = {7,
                    {0.5104542970657349, 0.49523285031318665},
                    {0.5145812034606934, 0.5026628375053406},
                    3.5322898626327515,
                    1.7827534196891843}; // torch.empty(7).normal_(0.5, 0.02)
    Mt19937 r;
    float x[20];
    mt19937_seed(&r, 42);
    normal_fill(&r, x, 5, 0, 1);
    check_draw(x, &a, 1);
    normal_fill(&r, x, 20, 0, 1);
    check_draw(x, &b, 1);
    normal_fill(&r, x, 3, 0, 1);
    check_draw(x, &c, 1);
    normal_fill(&r, x, 7, 0.5f, 0.02f);
    check_draw(x, &d, 0.5); // next to the mean 0.5 a float resolves 6e-8, whatever the standard deviation
}

static void test_truncated_normal_against_torch(void) {
    // trunc_normal_(std=0.02, a=-0.04, b=0.04)
    const Draw draw = {1000,
                       {0.02204982377588749, 0.025195105001330376},
                       {-0.0014391038566827774, -0.032693661749362946},
                       -0.7732645657979447,
                       0.31549322005946523};
    static float x[1000];
    Mt19937 r;
    mt19937_seed(&r, 42);
    truncated_normal_fill(&r, x, 1000, 0.02f, 2);
    check_draw(x, &draw, 0.02);
}

static void test_truncated_normal_distribution(void) {
    enum { N = 100000 };
    float* x = (float*)alloc_zeroed(N, sizeof(float), "a test's numbers");
    Mt19937 r;
    mt19937_seed(&r, 1);
    truncated_normal_fill(&r, x, N, 0.5f, 2);
    double sum = 0, sum_sq = 0, largest = 0;
    for (int i = 0; i < N; i++) {
        sum += (double)x[i];
        sum_sq += (double)x[i] * (double)x[i];
        largest = fmax(largest, fabs((double)x[i]));
    }
    free(x);
    // The variance of a standard normal cut at +-2 is 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.774.
    double variance = 1 - 4 * exp(-2) / sqrt(2 * M_PI) / erf(M_SQRT2), std = 0.5 * sqrt(variance);
    CHECK(largest <= 1 && largest > 0.99);
    CHECK_CLOSE(sum / N, 0, 5 * std / sqrt(N));
    CHECK_CLOSE(sum_sq / N / (0.25 * variance), 1, 5 * sqrt(2.0 / N)); // flatter than a normal: less than its 2/N
}

static void test_erf_inverse(void) {
    for (int i = -999; i <= 999; i++) {
        double y = i / 1000.0;
        CHECK_CLOSE(erf(erf_inverse(y)), y, 4e-16); // two roundings of a number below 1
    }
    CHECK_CLOSE(erf_inverse(0.5), 0.47693627620446987, 1e-15); // the constant of the "probable error"
}

int main(void) {
    RUN(test_splitmix64);
    RUN(test_splitmix64_uniform);
    RUN(test_mt19937);
    RUN(test_uniform);
    RUN(test_normal_against_torch);
    RUN(test_normal_sequence_against_torch);
    RUN(test_truncated_normal_against_torch);
    RUN(test_truncated_normal_distribution);
    RUN(test_erf_inverse);
    return test_summary();
}
