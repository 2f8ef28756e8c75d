// Tests of llmc/units.h.
#include "llmc/units.h"
#include "dev/test/test.h"

static void test_numbers(void) {
    const struct {
        const char* text;
        double value;
    } good[] = {{"0", 0},
                {"250", 250},
                {"007", 7},
                {"2_000", 2000},
                {"2_219_950_080", 2219950080.0},
                {"10M", 10e6},
                {"1.5B", 1.5e9},
                {"0.25K", 250},
                {"6e-4", 6e-4},
                {"1E+3", 1000},
                {"1_0.2_5", 10.25},
                {"1e3K", 1e6},
                {"9007199254740993", 9007199254740992.0}};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        double x = -1;
        CHECK(parse_count(good[i].text, &x));
        CHECK_CLOSE(x, good[i].value, 1e-15);
    }
}

static void test_typos(void) {
    const char* bad[] = {"",      " 1", "1 ",    "-1",   "+1",   "inf", "nan",  "0x10", "1.", ".5",
                         "1..2",  "1_", "_1",    "1__0", "1_M",  "10m", "10MM", "10MB", "1e", "1e+",
                         "1e999", "M",  "1,000", "1._5", "1e_3", "1M5", "12a",  "1e5.5"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        double x = -1;
        if (parse_count(bad[i], &x)) { printf("  accepted '%s'\n", bad[i]); }
        CHECK(x == -1);
    }
}

// A number longer than any real one is refused, whichever of its parts is too long; no length does harm.
static void test_long(void) {
    char digits[256], text[300];
    memset(digits, '0', sizeof digits);
    for (int length = 1; length < 200; length++) {
        for (int i = 0; i < 3; i++) {
            double x = -1;
            snprintf(text, sizeof text, i == 0 ? "1%.*s" : i == 1 ? "1.%.*s" : "1e%.*s", length, digits);
            bool fine = parse_count(text, &x);
            CHECK(fine ? length <= 62 : length >= 55 && x == -1);
            CHECK(!fine || x == (i == 0 ? strtod(text, NULL) : 1));
        }
    }
}

static void test_rest(void) {
    double x;
    const char* rest = scan_count("100M:128,", &x);
    CHECK(rest != NULL && x == 100e6);
    CHECK_STR(rest, ":128,");
    CHECK(scan_count(":128", &x) == NULL);
}

int main(void) {
    RUN(test_numbers);
    RUN(test_typos);
    RUN(test_long);
    RUN(test_rest);
    return test_summary();
}
