// Tests of llmc/state.h and llmc/check.h: run state as text and back to the bit; errors, memory, reading files.
#include "llmc/state.h"
#include "dev/test/tempdir.h"
#include "dev/test/test.h"

typedef struct {
    double x;
    int64_t i;
    uint64_t u;
    int n;
} Fields;

// One visitor writes and reads, as in every module.
static void visit(StateFile* s, Fields* f) {
    state_f64(s, "x", &f->x);
    state_i64(s, "i", &f->i);
    state_u64(s, "u", &f->u);
    state_int(s, "n", &f->n);
}

static char* write_fields(Fields f) {
    StateFile s;
    memset(&s, 0, sizeof s);
    s.writing = true;
    visit(&s, &f);
    return s.text;
}

// Reads the text into *f; the error, empty if there was none.
static const char* read_fields(char* text, Fields* f) {
    static char error[192];
    StateFile s;
    memset(&s, 0, sizeof s);
    s.text = text;
    visit(&s, f);
    snprintf(error, sizeof error, "%s", s.error);
    return error;
}

static void test_round_trip(void) {
    const double doubles[] = {0, -0.0, 1, 0.1, -1e300, 5e-324, 1.7976931348623157e308, INFINITY, -INFINITY};
    const int64_t wide[] = {0, -1, INT64_MAX, INT64_MIN};
    for (size_t d = 0; d < sizeof doubles / sizeof doubles[0]; d++) {
        for (int w = 0; w < 4; w++) {
            Fields out = {doubles[d], wide[w], (uint64_t)wide[w], w % 2 ? INT32_MIN : INT32_MAX}, in = {7, 7, 7, 7};
            char* text = write_fields(out);
            CHECK_STR(read_fields(text, &in), "");
            CHECK(memcmp(&in.x, &out.x, sizeof in.x) == 0); // to the bit, -0 included
            CHECK(in.i == out.i && in.u == out.u && in.n == out.n);
            free(text);
        }
    }
    Fields nan_out = {NAN, 0, 0, 0}, in = {0, 0, 0, 0};
    char* text = write_fields(nan_out);
    CHECK_STR(read_fields(text, &in), "");
    CHECK(isnan(in.x));
    free(text);
    text = write_fields((Fields){0.75, -3, 5, 6});
    CHECK_STR(text, "x 0x1.8p-1\ni -3\nu 5\nn 6\n");
    free(text);
}

// The first fault is reported, and what comes from it on stays untouched.
static void test_malformed(void) {
    const struct {
        const char *text, *error;
        int read; // fields that were read before it
    } cases[] = {
        {"x 0x1p+0\ni 2\nu 3\n", "expected the field 'n', found ''", 3},
        {"x 0x1p+0\nu 3\ni 2\nn 4\n", "expected the field 'i', found 'u 3'", 1},
        {"", "expected the field 'x', found ''", 0},
        {"x \ni 2\nu 3\nn 4\n", "the field 'x' has the malformed value ''", 0},
        {"x one\ni 2\n", "the field 'x' has the malformed value 'one'", 0},
        {"x 1 \ni 2\n", "the field 'x' has the malformed value '1 '", 0},
        {"x 1\ni 2.5\nu 3\n", "the field 'i' has the malformed value '2.5'", 1},
        {"x 1\ni 9223372036854775808\nu 3\n", "the field 'i' has the malformed value '9223372036854775808'", 1},
        {"x 1\ni 2\nu -3\nn 4\n", "the field 'u' has the malformed value '-3'", 2},
        {"x 1\ni 2\nu 3\nn 2147483648\n", "the field 'n' is out of range", 3},
        {"x 1\nii 2\n", "expected the field 'i', found 'ii 2'", 1},
        {"x 1\ni\n", "expected the field 'i', found 'i'", 1},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        Fields f = {-1, -1, 99, -1};
        char* text = copy_string(cases[c].text);
        CHECK_STR(read_fields(text, &f), cases[c].error);
        CHECK((f.x == 1) == (cases[c].read > 0) && (f.i == 2) == (cases[c].read > 1));
        CHECK((f.u == 3) == (cases[c].read > 2) && f.n == -1);
        free(text);
    }
    char digits[200]; // a value longer than any number
    memset(digits, '1', sizeof digits);
    memcpy(digits, "x ", 2);
    digits[199] = '\0';
    Fields f = {0, 0, 0, 0};
    CHECK(strncmp(read_fields(digits, &f), "expected the field 'x', found 'x 111", 36) == 0);
}

static void test_long_state(void) {
    StateFile s;
    memset(&s, 0, sizeof s);
    s.writing = true;
    for (int64_t i = 0; i < 5000; i++) { state_i64(&s, "counter", &i); }
    char* text = s.text;
    CHECK(strlen(text) == s.length && s.length < s.capacity);
    memset(&s, 0, sizeof s);
    s.text = text;
    bool same = true;
    for (int64_t i = 0; i < 5000; i++) {
        int64_t found = -1;
        state_i64(&s, "counter", &found);
        same = same && found == i;
    }
    CHECK(same && s.error[0] == '\0');
    free(text);
}

static void test_memory(void) {
    for (size_t count = 0; count < 200; count += 7) {
        unsigned char* p = (unsigned char*)alloc_zeroed(count, 3, "a test");
        CHECK(p != NULL && (uintptr_t)p % 64 == 0);
        for (size_t i = 0; i < 3 * count; i++) { CHECK(p[i] == 0); }
        free(p);
    }
    CHECK_DIES(alloc_zeroed(SIZE_MAX / 2, 3, "the moon"), "the moon needs more memory than can be addressed");
    CHECK_DIES(alloc_zeroed(SIZE_MAX, 1, "the moon"), "out of memory: the moon needs");
    char* copy = copy_string("text");
    CHECK_STR(copy, "text");
    free(copy);
    CHECK(min_int(-1, 2) == -1 && min_int(2, -1) == -1 && max_int(-1, 2) == 2 && max_int(2, -1) == 2);
}

static void test_messages(void) {
    CHECK_DIES(fatal("%s must be %d", "the answer", 42), "error: the answer must be 42");
    int pipe_ends[2];
    char said[64] = "";
    CHECK(pipe(pipe_ends) == 0);
    int stderr_fd = dup(2);
    dup2(pipe_ends[1], 2);
    warn("%d is odd", 3);
    dup2(stderr_fd, 2);
    CHECK(read(pipe_ends[0], said, sizeof said - 1) > 0);
    CHECK_STR(said, "warning: 3 is odd\n");
    close(pipe_ends[0]);
    close(pipe_ends[1]);
    close(stderr_fd);
}

static void test_read_whole_file(void) {
    char folder[TEMP_PATH_SIZE], path[TEMP_PATH_SIZE + 16];
    tempdir_make(folder);
    snprintf(path, sizeof path, "%s/file", folder);
    const size_t sizes[] = {0, 1, 4095, 4096, 4097, 8192, 100000}; // around the steps in which memory grows
    char* data = (char*)alloc_zeroed(100000, 1, "a test file");
    for (int i = 0; i < 100000; i++) { data[i] = (char)(i * 31 % 251); }
    for (int i = 0; i < 7; i++) {
        size_t size = 12345;
        put_file(path, data, sizes[i]);
        char* found = read_whole_file(path, &size);
        CHECK(found != NULL && size == sizes[i] && memcmp(found, data, size) == 0 && found[size] == '\0');
        free(found);
    }
    free(data);
    size_t size;
    errno = 0;
    CHECK(read_whole_file(folder, &size) == NULL && errno == EISDIR);
    unlink(path);
    CHECK(mkfifo(path, 0666) == 0);
    char* nothing = read_whole_file(path, &size);
    CHECK(nothing != NULL && size == 0);
    free(nothing);
    tempdir_remove(folder);
    CHECK(read_whole_file(path, &size) == NULL && errno == ENOENT);
}

int main(void) {
    RUN(test_round_trip);
    RUN(test_malformed);
    RUN(test_long_state);
    RUN(test_memory);
    RUN(test_messages);
    RUN(test_read_whole_file);
    return test_summary();
}
