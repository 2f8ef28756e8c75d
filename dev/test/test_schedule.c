// Tests of llmc/schedule.h.
#include "llmc/schedule.h"
#include "dev/test/tempdir.h"
#include "dev/test/test.h"

// ---------------------------------------------------------------------------------------------------------------------
// Learning rate

static LrSchedule lr_schedule(int kind, double final_frac, double warmup, double budget) {
    LrSchedule s = {kind, 2e-3, final_frac, warmup, budget, 0.2};
    return s;
}

static void test_lr_table(void) {
    const struct {
        int kind;
        double final_frac, tokens, lr_over_max, done;
    } rows[] = {
        // warm-up of 100, budget of 1100
        {LR_CONSTANT, 0.1, 0, 0, 0},      {LR_CONSTANT, 0.1, 50, 0.5, 0},
        {LR_CONSTANT, 0.1, 100, 1, 0},    {LR_CONSTANT, 0.1, 1100, 1, 0},
        {LR_LINEAR, 0.1, 0, 0, 0},        {LR_LINEAR, 0.1, 25, 0.25, 0},
        {LR_LINEAR, 0.1, 100, 1, 0},      {LR_LINEAR, 0.1, 600, 0.55, 0.5},
        {LR_LINEAR, 0.1, 1100, 0.1, 1},   {LR_LINEAR, 0.1, 5000, 0.1, 1},
        {LR_LINEAR, 0, 850, 0.25, 0.75},  {LR_COSINE, 0, 99, 0.99, 0},
        {LR_COSINE, 0, 100, 1, 0},        {LR_COSINE, 0, 350, 0.5 + M_SQRT1_2 / 2, 0.25},
        {LR_COSINE, 0.1, 600, 0.55, 0.5}, {LR_WSD, 0, 50, 0.5, 0},
        {LR_WSD, 0, 879, 1, 0}, // the last fifth, 220 tokens, decays
        {LR_WSD, 0, 880, 1, 0},           {LR_WSD, 0, 935, 0.5, 0.25},
        {LR_WSD, 0.1, 935, 0.55, 0.25},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        LrSchedule s = lr_schedule(rows[i].kind, rows[i].final_frac, 100, 1100);
        CHECK_CLOSE(lr_at(&s, rows[i].tokens) / s.max_lr, rows[i].lr_over_max, 1e-14);
        CHECK_CLOSE(lr_decay_done(&s, rows[i].tokens), rows[i].done, 1e-14);
    }
}

// Every decay ends exactly where it should, 0 included, at the budget and past it, whatever the warm-up.
static void test_lr_ends(void) {
    const double warmups[] = {0, 1, 0.3e9, 0.9e9, 1e9, 2e9};
    for (int kind = LR_COSINE; kind <= LR_WSD; kind++) {
        for (size_t w = 0; w < sizeof warmups / sizeof warmups[0]; w++) {
            for (int final = 0; final <= 2; final++) {
                LrSchedule s = lr_schedule(kind, final / 2.0, warmups[w], 1e9);
                CHECK(lr_at(&s, 1e9) == s.max_lr * s.final_frac);
                CHECK(lr_at(&s, 1e12) == s.max_lr * s.final_frac);
                CHECK(lr_at(&s, 0) == (warmups[w] > 0 ? 0 : s.max_lr));
                double last = -1, last_done = 0;
                for (double tokens = 0; tokens <= 1.1e9; tokens += 0.7e6) {
                    double lr = lr_at(&s, tokens), done = lr_decay_done(&s, tokens);
                    CHECK(lr >= 0 && lr <= s.max_lr && done >= last_done && done <= 1); // NaN fails
                    CHECK(tokens < warmups[w] ? lr > last || tokens >= 1e9 : lr <= s.max_lr);
                    last = lr;
                    last_done = done;
                }
            }
        }
    }
}

static void test_couplings(void) {
    CHECK(coupled_lr(1e-3, 64, 64, 0.5) == 1e-3);
    CHECK(coupled_lr(1e-3, 16, 64, 0) == 1e-3);
    CHECK_CLOSE(coupled_lr(1e-3, 16, 64, 0.5) / 5e-4, 1, 1e-14);
    CHECK_CLOSE(coupled_lr(1e-3, 128, 64, 1) / 2e-3, 1, 1e-14);
    CHECK_CLOSE(coupled_weight_decay(0.1, 128, 64, -1), 0.05, 1e-14);
    CHECK_CLOSE(beta2_from_half_life(1e6, 1e6), 0.5, 1e-14);
    CHECK_CLOSE(pow(beta2_from_half_life(10e6, 524288), 10e6 / 524288), 0.5, 1e-12);
}

// ---------------------------------------------------------------------------------------------------------------------
// Batch size

static void test_round(void) {
    CHECK(batch_round(57.2, 1) == 58);
    CHECK(batch_round(57, 1) == 57);
    CHECK(batch_round(57, 8) == 64);
    CHECK(batch_round(56, 8) == 56);
    CHECK(batch_round(56 * (1 + 4e-16), 8) == 56); // rounding errors of an interpolation
    CHECK(batch_round(56.001, 8) == 64);
    CHECK(batch_round(0.1, 8) == 8);
    CHECK(batch_round(0, 3) == 3);
    CHECK(batch_round(MAX_BATCH, 1) == MAX_BATCH);
}

typedef struct {
    double tokens, size;
} Row;

static void check_table(const char* spec, double fixed_size, double budget, const Row* rows, int count) {
    BatchSchedule s;
    const char* problem = batch_schedule_parse(&s, spec, fixed_size, budget);
    CHECK_STR(problem == NULL ? "" : problem, "");
    for (int i = 0; i < count && problem == NULL; i++) {
        CHECK_CLOSE(batch_schedule_at(&s, rows[i].tokens), rows[i].size, 1e-14);
    }
    batch_schedule_free(&s);
}

static void test_batch_table(void) {
    const Row fixed[] = {{0, 24}, {1e6, 24}, {1e15, 24}};
    check_table("fixed", 24, 1e6, fixed, 3);
    const Row linear[] = {{0, 16}, {250e6, 42}, {1e9 - 1, 120 - 104e-9}, {1e9, 120}, {1.5e9, 120}};
    check_table("linear:16:120", 1, 1e9, linear, 5);
    const Row falling[] = {{0, 64}, {500, 34}, {1000, 4}};
    check_table("linear:64:4", 1, 1000, falling, 3);
    const Row steps[] = {{0, 64}, {100e6 - 1, 64}, {100e6, 128}, {1.5e9 - 1, 128}, {1.5e9, 0.5}, {9e9, 0.5}};
    check_table("steps:0:64,100M:128,1.5B:0.5", 1, 1e9, steps, 6);
    check_table("steps:0:64", 1, 1e9, steps, 2);
    BatchSchedule s;
    CHECK(batch_schedule_parse(&s, "gns", 1, 1) == NULL && s.kind == BATCH_GNS);
    batch_schedule_free(&s);
}

static void test_batch_errors(void) {
    const struct {
        const char *spec, *message;
    } rows[] = {
        {"", "expected fixed, linear"},
        {"fix", "expected fixed, linear"},
        {"fixed:3", "expected fixed, linear"},
        {"linear:16", "linear:FROM:TO"},
        {"linear:16:", "linear:FROM:TO"},
        {"linear:16:120:8", "linear:FROM:TO"},
        {"linear:16:120,1:2", "linear:FROM:TO"},
        {"linear:0:120", "a batch of 0 sequences"},
        {"linear:-1:120", "linear:FROM:TO"},
        {"linear:16:1B", "at most 16777216"},
        {"steps:", "steps:TOKENS:SIZE"},
        {"steps:0:64,", "steps:TOKENS:SIZE"},
        {"steps:0:64;1M:2", "steps:TOKENS:SIZE"},
        {"steps:0", "steps:TOKENS:SIZE"},
        {"steps:1M:64", "first threshold"},
        {"steps:0:64,1M:8,1M:9", "must increase"},
        {"steps:0:64,2M:8,1M:9", "must increase"},
        {"file:", "cannot read it"},
        {"file:/nonexistent/schedule.txt", "cannot read it: No such file"},
        {"file:/tmp", "cannot read it: Is a directory"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        BatchSchedule s;
        const char* problem = batch_schedule_parse(&s, rows[i].spec, 8, 1e9);
        if (problem == NULL || strstr(problem, rows[i].message) == NULL) {
            printf("  '%s': %s\n", rows[i].spec, problem == NULL ? "accepted" : problem);
        }
        CHECK(problem != NULL && strstr(problem, rows[i].message) != NULL);
        batch_schedule_free(&s);
    }
    BatchSchedule s;
    CHECK(batch_schedule_parse(&s, "linear:1:2", 8, 0) != NULL);
    batch_schedule_free(&s);
    CHECK(batch_schedule_parse(&s, "fixed", 0, 1e9) != NULL);
    batch_schedule_free(&s);
}

// The paper's recipe (arXiv 2411.00999): how many steps the budget makes, and of which mean size.
static void recipe(const char* spec, double fixed_size, int expected_steps, double expected_mean) {
    const double budget = 2219950080;
    BatchSchedule s;
    const char* problem = batch_schedule_parse(&s, spec, fixed_size, budget);
    CHECK_STR(problem == NULL ? "" : problem, "");
    int64_t steps = 0, sequences = 0;
    while (problem == NULL && (double)sequences * 2048 < budget) {
        sequences += batch_round(batch_schedule_at(&s, (double)sequences * 2048), 8);
        steps++;
    }
    CHECK(steps == expected_steps);
    CHECK_CLOSE(steps ? (double)sequences / (double)steps : 0, expected_mean, 0.05 / expected_mean);
    batch_schedule_free(&s);
}

// A temporary folder, and a file in it that a test will write.
static void temp_file(char dir[TEMP_PATH_SIZE], char path[TEMP_PATH_SIZE + 16]) {
    tempdir_make(dir);
    snprintf(path, TEMP_PATH_SIZE + 16, "%s/knots.txt", dir);
}

static void test_recipe(void) {
    recipe("linear:16:120", 1, 18953, 57.2);
    recipe("fixed", 120, 9033, 120);
    // The same as the reference writes it: accumulation steps of 8 sequences.
    const int knots[] = {2, 3, 4, 6, 7, 9, 10, 12, 13, 15};
    char dir[TEMP_PATH_SIZE], path[TEMP_PATH_SIZE + 16], spec[TEMP_PATH_SIZE + 32], text[1024];
    int used = 0;
    for (int i = 0; i < 10; i++) {
        used += snprintf(text + used, sizeof text - (size_t)used, "%s%.0f, %d", i ? "\n" : "",
                         floor((knots[i] - 2) / 13.0 * 2219950080), knots[i]);
    }
    temp_file(dir, path);
    put_file(path, text, (size_t)used);
    snprintf(spec, sizeof spec, "file:%s:8", path);
    recipe(spec, 1, 18953, 57.2);
    tempdir_remove(dir);
}

static void test_file_format(void) {
    char dir[TEMP_PATH_SIZE], path[TEMP_PATH_SIZE + 16], spec[TEMP_PATH_SIZE + 32];
    temp_file(dir, path);
    snprintf(spec, sizeof spec, "file:%s", path);
    const char good[] = "# tokens, size\r\n\r\n  1_000_000, 10 # the first\n3M\t20\n\n#\n  5_000_000 ,40\n7M , 40";
    const Row rows[] = {{0, 10}, {1e6, 10}, {1.5e6, 12.5}, {3e6, 20}, {4e6, 30}, {5e6, 40}, {6e6, 40}, {9e9, 40}};
    put_file(path, good, sizeof good - 1);
    check_table(spec, 1, 1e9, rows, 8);
    const struct {
        const char *text, *message;
    } bad[] = {
        {"", "no knots"},
        {"# nothing\n\n", "no knots"},
        {"0, 8\nx, 9\n", "line 2: expected 'tokens, size', found 'x, 9'"},
        {"0, 8, 9\n", "line 1"},
        {"0\n8\n", "line 1"},
        {"0,,8\n", "line 1"},
        {"0.8\n", "line 1"},
        {"0, -8\n", "line 1"},
        {"0, nan\n", "line 1"},
        {"0, 0\n", "line 1: a batch of 0"},
        {"# a\n0, 8\n5, 9\n5, 10\n", "line 4: the token counts must increase, but 5 follows 5"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        BatchSchedule s;
        put_file(path, bad[i].text, strlen(bad[i].text));
        const char* problem = batch_schedule_parse(&s, spec, 1, 1);
        if (problem == NULL || strstr(problem, bad[i].message) == NULL) {
            printf("  '%s': %s\n", bad[i].text, problem == NULL ? "accepted" : problem);
        }
        CHECK(problem != NULL && strstr(problem, bad[i].message) != NULL);
        batch_schedule_free(&s);
    }
    BatchSchedule s;
    put_file(path, "0, 8\0\n", 6);
    const char* problem = batch_schedule_parse(&s, spec, 1, 1);
    CHECK_STR(problem == NULL ? "" : problem, "not a text file");
    batch_schedule_free(&s);
    tempdir_remove(dir);
}

// What batch_schedule_at() writes on stderr, and what it returns.
static double at_with_stderr(BatchSchedule* s, double tokens, char* said, size_t size) {
    int keep = dup(2), ends[2];
    CHECK(pipe(ends) == 0);
    dup2(ends[1], 2);
    double value = batch_schedule_at(s, tokens);
    fflush(stderr);
    dup2(keep, 2);
    close(keep);
    close(ends[1]);
    ssize_t n = read(ends[0], said, size - 1);
    said[n > 0 ? n : 0] = '\0';
    close(ends[0]);
    return value;
}

// The file is edited while the run goes on, well, badly, away, and back again.
static void test_live_editing(void) {
    char dir[TEMP_PATH_SIZE], path[TEMP_PATH_SIZE + 16], spec[TEMP_PATH_SIZE + 32], said[1024];
    temp_file(dir, path);
    snprintf(spec, sizeof spec, "file:%s:2", path);
    put_file(path, "0, 8\n", 5);
    BatchSchedule s;
    CHECK(batch_schedule_parse(&s, spec, 1, 1) == NULL);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 16);
    CHECK_STR(said, "");
    put_file(path, "0, 9\n", 5); // the same length, and within the clock's resolution
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18);
    CHECK_STR(said, "");
    put_file(path, "0, 9\n7; 10\n", 11);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18);
    CHECK(strstr(said, "warning: ") == said && strstr(said, "line 2") != NULL && strstr(said, path) != NULL);
    CHECK(strchr(said, '\n') == said + strlen(said) - 1);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18); // once
    CHECK_STR(said, "");
    put_file(path, "0, 9\n7; 11\n", 11); // another bad edit
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18);
    CHECK(strstr(said, "line 2") != NULL);
    unlink(path);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18);
    CHECK(strstr(said, "cannot read it") != NULL);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 18);
    CHECK_STR(said, "");
    put_file(path, "0, 9\n10, 10\n", 12);
    CHECK(at_with_stderr(&s, 5, said, sizeof said) == 19);
    CHECK_STR(said, "");
    batch_schedule_free(&s);
    tempdir_remove(dir);
}

int main(void) {
    RUN(test_lr_table);
    RUN(test_lr_ends);
    RUN(test_couplings);
    RUN(test_round);
    RUN(test_batch_table);
    RUN(test_batch_errors);
    RUN(test_recipe);
    RUN(test_file_format);
    RUN(test_live_editing);
    return test_summary();
}
