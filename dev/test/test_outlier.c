// Tests of llmc/outlier.h.
#include "llmc/outlier.h"
#include "llmc/rand.h"
#include "dev/test/test.h"

static void fill(OutlierDetector* d, int count, uint64_t seed) {
    for (int i = 0; i < count; i++) { outlier_accept(d, 3 + splitmix64_uniform(&seed)); }
}

// Nothing is an outlier until the window is full, to the value.
static void test_warm_up(void) {
    OutlierDetector d;
    outlier_init(&d);
    fill(&d, OUTLIER_WINDOW - 1, 1);
    CHECK(outlier_z(&d, 1e9) == 0);
    CHECK(outlier_limit(&d, 3) == INFINITY);
    fill(&d, 1, 2);
    CHECK(outlier_z(&d, 1e9) > 1e6);
    CHECK(isfinite(outlier_limit(&d, 3)));
    CHECK(outlier_limit(&d, 0) == INFINITY);
}

// Over exactly the last 128 accepted values: here 0, 1, ..., 127 in some order.
static void test_formula(void) {
    OutlierDetector d;
    outlier_init(&d);
    fill(&d, 77, 3);
    for (int i = 0; i < OUTLIER_WINDOW; i++) { outlier_accept(&d, i * 37 % OUTLIER_WINDOW); }
    double std = sqrt((128.0 * 128 - 1) / 12);
    CHECK_CLOSE(outlier_z(&d, 63.5), 0, 1e-12);
    CHECK_CLOSE(outlier_z(&d, 100), (100 - 63.5) / std, 1e-12);
    CHECK_CLOSE(outlier_z(&d, -100), (-100 - 63.5) / std, 1e-12);
    CHECK_CLOSE(outlier_limit(&d, 2.5), 63.5 + 2.5 * std, 1e-12);
    CHECK_CLOSE(outlier_z(&d, outlier_limit(&d, 2.5)), 2.5, 1e-12);
}

// Also values far from zero with a small spread: a running sum of squares would lose all digits here.
static void test_cancellation(void) {
    OutlierDetector d;
    outlier_init(&d);
    for (int i = 0; i < 10 * OUTLIER_WINDOW; i++) { outlier_accept(&d, i < 5 * OUTLIER_WINDOW ? 1e12 : 1e8 + i % 2); }
    CHECK_CLOSE(outlier_z(&d, 1e8 + 1), 1, 1e-9);
}

static void test_non_finite(void) {
    OutlierDetector d, before;
    outlier_init(&d);
    fill(&d, 200, 4);
    before = d;
    outlier_accept(&d, NAN);
    outlier_accept(&d, INFINITY);
    outlier_accept(&d, -INFINITY);
    CHECK(memcmp(&d, &before, sizeof d) == 0);
    CHECK(outlier_z(&d, INFINITY) == INFINITY);
    CHECK(isnan(outlier_z(&d, NAN)));
}

// A series that stands still has no spread to measure by.
static void test_constant(void) {
    OutlierDetector d;
    outlier_init(&d);
    for (int i = 0; i < 300; i++) { outlier_accept(&d, 2.5); }
    CHECK(outlier_z(&d, 2.6) == 0);
    CHECK(outlier_limit(&d, 3) == INFINITY);
}

static void test_state(void) {
    OutlierDetector d, e;
    outlier_init(&d);
    fill(&d, 333, 5);
    StateFile out, in;
    memset(&out, 0, sizeof out);
    out.writing = true;
    outlier_state(&out, "outlier.loss", &d);
    memset(&in, 0, sizeof in);
    in.text = out.text;
    outlier_init(&e);
    outlier_state(&in, "outlier.loss", &e);
    CHECK_STR(in.error, "");
    CHECK(memcmp(&d, &e, sizeof d) == 0);
    fill(&d, 50, 6);
    fill(&e, 50, 6);
    CHECK(outlier_z(&d, 3.9) == outlier_z(&e, 3.9));
    // Another detector's state, and one whose ring would be left.
    memset(&in, 0, sizeof in);
    in.text = out.text;
    outlier_state(&in, "outlier.grad", &e);
    CHECK(strstr(in.error, "outlier.grad.count") != NULL);
    char damaged[] = "x.count 128\nx.next 128\n";
    memset(&in, 0, sizeof in);
    in.text = damaged;
    outlier_init(&e);
    outlier_state(&in, "x", &e);
    CHECK(strstr(in.error, "out of range") != NULL);
    CHECK(e.next == 0 && e.count == 0);
    free(out.text);
}

int main(void) {
    RUN(test_warm_up);
    RUN(test_formula);
    RUN(test_cancellation);
    RUN(test_non_finite);
    RUN(test_constant);
    RUN(test_state);
    return test_summary();
}
