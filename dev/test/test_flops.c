// Tests of llmc/flops.h.
#include "llmc/flops.h"
#include "dev/test/test.h"

// By hand for d12 (GPT-2 124M) at T 1024: 12 blocks of 12 * 768^2 = 7,077,888 weights and a head of 50257 * 768 =
// 38,597,376 make N = 123,532,032 and 6 N = 741,192,192; attention 6 * 12 * 768 * 1025 = 56,678,400.
static void test_d12(void) {
    GPTConfig c;
    CHECK(config_from_name("d12", &c));
    CHECK(flops_per_token(&c, 1024) == 741192192.0 + 56678400.0);
    CHECK(flops_per_token(&c, 64) == 741192192.0 + 6.0 * 12 * 768 * 65);
}

// The weights that take part in products are those of the table's matrices without the position embedding.
static void test_table(void) {
    GPTConfig c = config_of_shape(3, 2, 10, 16, 77);
    ParamTable t = param_table(&c);
    double n = 0;
    for (int r = 0; r < NUM_ROWS; r++) {
        if (r != WPE && t.row[r].cols > 1) { n += (double)t.row[r].used_rows * t.row[r].cols * t.row[r].count; }
    }
    // One token alone reads one key, in every layer: 2 products, C wide, 2 operations each, forward and twice backward.
    CHECK_CLOSE(flops_per_token(&c, 1), 6 * n + 3.0 * 3 * 2 * 2 * 10, 1e-15);
    // A sequence: the pairs of query and key, counted one by one.
    double pairs = 0;
    for (int t1 = 0; t1 < 16; t1++) {
        for (int t2 = 0; t2 <= t1; t2++) { pairs++; }
    }
    CHECK_CLOSE(16 * flops_per_token(&c, 16), 16 * 6 * n + pairs * 3 * 3 * 2 * 2 * 10, 1e-15);
}

int main(void) {
    RUN(test_d12);
    RUN(test_table);
    return test_summary();
}
