/*
Tests of llmc/hellaswag.h with a backend whose losses are known: what it is asked, how the answers are counted, and
malformed files.
*/
#include "dev/test/tempdir.h"
#include "dev/test/test.h"
#include "llmc/hellaswag.h"

static const char* const path = "hellaswag.bin"; // in a temporary folder

// ---------------------------------------------------------------------------------------------------------------------
// Files

typedef struct {
    uint16_t value[4096];
    size_t used;
    int examples;
} File;

static void add_list(File* f, int first, int n) {
    f->value[f->used++] = (uint16_t)n;
    for (int i = 0; i < n; i++) { f->value[f->used++] = (uint16_t)(first + i); }
}

// Adds an example: context 1, 2, ..., completion c being 100 c + 100, 100 c + 101, ...
static void add_example(File* f, int label, int context_len, int n0, int n1, int n2, int n3) {
    const int n[4] = {n0, n1, n2, n3};
    size_t start = f->used;
    f->value[f->used++] = 65535;
    f->value[f->used++] = 0;
    f->value[f->used++] = (uint16_t)f->examples++;
    f->value[f->used++] = (uint16_t)label;
    f->value[f->used++] = 4;
    add_list(f, 1, context_len);
    for (int c = 0; c < 4; c++) { add_list(f, 100 * c + 100, n[c]); }
    f->value[start + 1] = (uint16_t)((f->used - start) * 2);
}

static void write_header_and(int magic, int version, int examples, const File* f, size_t bytes) {
    int32_t header[256] = {magic, version, examples, 2000};
    FILE* out = fopen(path, "wb");
    if (out == NULL || fwrite(header, sizeof header, 1, out) != 1 || fwrite(f->value, 1, bytes, out) != bytes) {
        fatal("the test cannot write '%s'", path);
    }
    fclose(out);
}

static void write_examples(const File* f) { write_header_and(20240522, 1, f->examples, f, f->used * 2); }

// ---------------------------------------------------------------------------------------------------------------------
// A backend that loses what it is told to

typedef struct {
    float loss[5]; // per token of completion c; [4]: where there is no target, which must not count
    float first;   // added to the first token of each completion
    int calls, rows, largest_B, T;
} Fake;

static void fake_eval(void* self, const int* tokens, const int* targets, int B, int T, float* losses) {
    Fake* fake = (Fake*)self;
    (void)tokens;
    fake->calls++;
    fake->rows += B;
    fake->largest_B = max_int(fake->largest_B, B);
    fake->T = T;
    for (int i = 0; i < B * T; i++) {
        bool first = i % T == 0 || targets[i - 1] < 0;
        losses[i] = targets[i] < 0 ? fake->loss[4] : fake->loss[targets[i] / 100 - 1] + (first ? fake->first : 0);
    }
}

static Backend fake_backend(Fake* fake) {
    Backend backend;
    memset(&backend, 0, sizeof backend);
    backend.self = fake;
    backend.eval = fake_eval;
    return backend;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tests

// Rows, as the backend gets them, number by number.
static void test_row(void) {
    HellaSwag h;
    File f = {{0}, 0, 0};
    add_example(&f, 0, 2, 3, 1, 1, 1);
    write_examples(&f);
    hellaswag_open(&h, path, 4, 1000);
    CHECK(h.num_examples == 1 && h.longest == 4);
    int tokens[6], targets[6];
    const int tokens0[] = {1, 2, 100, 101, 0, 0}, targets0[] = {-1, 100, 101, 102, -1, -1};
    hellaswag_row(&h.example[0], 0, 6, tokens, targets);
    CHECK(memcmp(tokens, tokens0, sizeof tokens) == 0 && memcmp(targets, targets0, sizeof targets) == 0);
    const int tokens2[] = {1, 2, 0, 0, 0, 0}, targets2[] = {-1, 300, -1, -1, -1, -1};
    hellaswag_row(&h.example[0], 2, 6, tokens, targets);
    CHECK(memcmp(tokens, tokens2, sizeof tokens) == 0 && memcmp(targets, targets2, sizeof targets) == 0);
    hellaswag_close(&h);
}

// Labels 0 1 2 3 3: what a model that always picks c gets right, with any batch size.
static void test_accuracy(void) {
    HellaSwag h;
    File f = {{0}, 0, 0};
    const int labels[] = {0, 1, 2, 3, 3};
    for (int i = 0; i < 5; i++) { add_example(&f, labels[i], 3 + i, 4, 1 + i, 2, 7); }
    write_examples(&f);
    hellaswag_open(&h, path, 1024, 1000);
    CHECK(h.num_examples == 5 && h.longest == 13);
    for (int max_B = 1; max_B <= 23; max_B++) {
        for (int c = 0; c < 4; c++) {
            Fake fake = {{5, 5, 5, 5, -1000}, 0, 0, 0, 0, 0};
            fake.loss[c] = 4.5f;
            Backend backend = fake_backend(&fake);
            CHECK_CLOSE(hellaswag_evaluate(&h, &backend, max_B, 1024, 0), c == 3 ? 0.4 : 0.2, 1e-15);
            CHECK(fake.rows == 20 && fake.calls == (20 + max_B - 1) / max_B && fake.largest_B == min_int(max_B, 20));
            CHECK(fake.T == 64); // not 1024: the longest row needs 13
        }
    }
    Fake fake = {{5, 4, 5, 5, 0}, 0, 0, 0, 0, 0};
    Backend backend = fake_backend(&fake);
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 8, 1024, 2), 0.5, 1e-15); // the first two examples
    CHECK(fake.rows == 8);
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 8, 13, 100), 0.2, 1e-15); // more than there are: all
    CHECK(fake.T == 13);
    hellaswag_close(&h);
}

// The mean over the completion's tokens decides, not the sum, and the first of the tokens counts.
static void test_mean_per_token(void) {
    HellaSwag h;
    File f = {{0}, 0, 0};
    add_example(&f, 0, 5, 8, 2, 2, 2);
    write_examples(&f);
    hellaswag_open(&h, path, 64, 1000);
    Fake fake = {{2, 3, 3, 3, 0}, 0, 0, 0, 0, 0}; // sums 16, 6, 6, 6
    Backend backend = fake_backend(&fake);
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 4, 64, 0), 1, 1e-15);
    fake.loss[0] = 4;
    fake.first = 8; // means 5, 7, 7, 7
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 4, 64, 0), 1, 1e-15);
    fake.first = 0; // means 4, 3, 3, 3
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 4, 64, 0), 0, 1e-15);
    fake.loss[0] = NAN;
    CHECK_CLOSE(hellaswag_evaluate(&h, &backend, 4, 64, 0), 0, 1e-15);
    hellaswag_close(&h);
}

static void test_pick(void) {
    const double ties[] = {2, 1, 1, 3}, some_nan[] = {NAN, 5, NAN, 4}, all_nan[] = {NAN, NAN, NAN, NAN};
    const double infinite[] = {INFINITY, INFINITY, NAN, INFINITY};
    CHECK(hellaswag_pick(ties) == 1);
    CHECK(hellaswag_pick(some_nan) == 3);
    CHECK(hellaswag_pick(all_nan) == -1);
    CHECK(hellaswag_pick(infinite) == 0);
}

// The file with one value changed must be refused with this message.
static void refuse(const File* good, size_t at, int value, const char* message) {
    HellaSwag h;
    File f = *good;
    f.value[at] = (uint16_t)value;
    write_examples(&f);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), message);
}

static void test_bad_files(void) {
    HellaSwag h;
    File f = {{0}, 0, 0};
    add_example(&f, 1, 3, 2, 2, 2, 2);
    size_t second = f.used;
    add_example(&f, 2, 3, 2, 2, 2, 2); // context at second + 6, completions at second + 10, 13, 16, 19
    refuse(&f, second, 65534, "malformed or truncated at example 1 of 2");
    refuse(&f, second + 1, 40, "malformed or truncated at example 1"); // bytes: 42 are right
    refuse(&f, second + 1, 44, "malformed or truncated at example 1");
    refuse(&f, 1, 44, "malformed or truncated at example 0");
    refuse(&f, second + 1, 43, "malformed or truncated at example 1");
    refuse(&f, second + 1, 0, "malformed or truncated at example 1");
    refuse(&f, second + 3, 4, "malformed or truncated at example 1");     // label
    refuse(&f, second + 4, 5, "malformed or truncated at example 1");     // completions
    refuse(&f, second + 5, 0, "malformed or truncated at example 1");     // no context
    refuse(&f, second + 5, 60000, "malformed or truncated at example 1"); // context goes beyond the end
    refuse(&f, second + 9, 3, "malformed or truncated at example 1");     // a completion too long
    refuse(&f, 7, 1000, "example 0: token 1000 is outside the model's vocabulary of 1000");
    refuse(&f, second + 20, 1234, "example 1: token 1234 is outside");
    write_examples(&f);
    CHECK_DIES(hellaswag_open(&h, path, 3, 1000), "example 0 needs 4 positions, but the sequence length is 3");
    write_header_and(20240520, 1, 2, &f, f.used * 2);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "not an evaluation file: it starts with 20240520, not 20240522");
    write_header_and(20240522, 2, 2, &f, f.used * 2);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "has version 2; only version 1");
    write_header_and(20240522, 1, 0, &f, f.used * 2);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "counts 0 examples");
    write_header_and(20240522, 1, INT32_MAX, &f, f.used * 2);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "counts 2147483647 examples");
    write_header_and(20240522, 1, 1, &f, f.used * 2);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "goes on after its 1 examples");
    write_header_and(20240522, 1, 2, &f, f.used * 2 - 1);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "malformed or truncated at example 1");
    CHECK(truncate(path, 1023) == 0);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "1023 bytes, less than the 1024");
    unlink(path);
    CHECK_DIES(hellaswag_open(&h, path, 20, 1000), "No such file");
}

int main(void) {
    char folder[TEMP_PATH_SIZE];
    if (chdir(tempdir_make(folder)) != 0) { // all files of the tests lie there
        fatal("cannot enter the folder '%s': %s", folder, strerror(errno));
    }
    RUN(test_row);
    RUN(test_accuracy);
    RUN(test_mean_per_token);
    RUN(test_pick);
    RUN(test_bad_files);
    tempdir_remove(folder);
    return test_summary();
}
