/*
Tests of llmc/sampler.h: argmax, the distribution, top_k, repeatability, and logits that are huge, infinite or not
numbers.
*/
#include "dev/test/test.h"
#include "llmc/sampler.h"

static void test_argmax(void) {
    const float logits[] = {1, 3, -2, 3, 0};
    for (uint64_t seed = 0; seed < 50; seed++) {
        uint64_t rng = seed;
        CHECK(sample_token(logits, 5, 0, 0, &rng) == 1); // the first among equals
        CHECK(sample_token(logits, 5, 1, 1, &rng) == 1);
        CHECK(sample_token(logits, 5, 1e-6f, 1, &rng) == 1);
    }
}

// How often each of V <= 8 tokens comes, of 40000 draws.
static void frequencies(const float* logits, int V, float temperature, int top_k, double* share) {
    enum { DRAWS = 40000 };
    uint64_t rng = 12345;
    memset(share, 0, sizeof(double) * (size_t)V);
    for (int i = 0; i < DRAWS; i++) {
        int token = sample_token(logits, V, temperature, top_k, &rng);
        CHECK(token >= 0 && token < V);
        share[token] += 1.0 / DRAWS;
    }
}

static void test_distribution(void) {
    const float logits[] = {0.5f, -1, 2, 0.5f, 1};
    double share[5];
    const double tolerance = 0.0125; // five standard deviations of a share of 1/2 in 40000 draws
    const float temperatures[] = {0.5f, 1, 2};
    for (int k = 0; k < 3; k++) {
        double p[5], sum = 0;
        for (int i = 0; i < 5; i++) { sum += p[i] = exp((double)logits[i] / (double)temperatures[k]); }
        frequencies(logits, 5, temperatures[k], 0, share);
        for (int i = 0; i < 5; i++) { CHECK_CLOSE(share[i], p[i] / sum, tolerance); }
    }
}

static void test_top_k(void) {
    const float logits[] = {0.5f, -1, 2, 0.5f, 1};
    double share[5], p2 = exp(2.0), p4 = exp(1.0), p0 = exp(0.5);
    frequencies(logits, 5, 1, 2, share);
    CHECK(share[0] == 0 && share[1] == 0 && share[3] == 0);
    CHECK_CLOSE(share[2], p2 / (p2 + p4), 0.0125);
    frequencies(logits, 5, 1, 3, share); // of the two equals at the edge the first is in
    CHECK(share[1] == 0 && share[3] == 0);
    CHECK_CLOSE(share[0], p0 / (p2 + p4 + p0), 0.0125);
    frequencies(logits, 5, 1, 100, share); // more than there are: all
    CHECK(share[1] > 0);
}

static void test_repeatable(void) {
    float logits[300];
    uint64_t fill = 9, a = 77, b = 77, other = 78, state = 77;
    int different = 0;
    for (int i = 0; i < 300; i++) { logits[i] = (float)splitmix64_uniform(&fill); }
    for (int i = 0; i < 100; i++) {
        int token = sample_token(logits, 300, 0.9f, 0, &a);
        CHECK(token == sample_token(logits, 300, 0.9f, 0, &b));
        different += token != sample_token(logits, 300, 0.9f, 0, &other);
    }
    CHECK(different > 80);
    // One number a call, whatever the arguments.
    for (int i = 0; i < 100; i++) { splitmix64(&state); }
    CHECK(a == state);
    sample_token(logits, 300, 0, 5, &a);
    splitmix64(&state);
    CHECK(a == state);
}

static void test_extreme_logits(void) {
    double share[4];
    const float large[] = {3e38f, 3e38f, -3e38f, 0};
    frequencies(large, 4, 1, 0, share);
    CHECK_CLOSE(share[0], 0.5, 0.0125);
    CHECK(share[2] == 0 && share[3] == 0);
    const float infinite[] = {0, INFINITY, 1, -INFINITY};
    frequencies(infinite, 4, 1, 0, share);
    CHECK_CLOSE(share[1], 1, 1e-9);
    const float holes[] = {-INFINITY, 1, NAN, 1};
    frequencies(holes, 4, 1, 0, share);
    CHECK(share[0] == 0 && share[2] == 0);
    CHECK_CLOSE(share[1], 0.5, 0.0125);
    frequencies(holes, 4, 0, 0, share);
    CHECK_CLOSE(share[1], 1, 1e-9);
    const float none[] = {NAN, -INFINITY, NAN, NAN};
    frequencies(none, 4, 1, 0, share);
    CHECK_CLOSE(share[0], 1, 1e-9);
}

int main(void) {
    RUN(test_argmax);
    RUN(test_distribution);
    RUN(test_top_k);
    RUN(test_repeatable);
    RUN(test_extreme_logits);
    return test_summary();
}
