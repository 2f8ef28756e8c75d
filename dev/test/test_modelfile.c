// Tests of llmc/modelfile.h and llmc/atomicfile.h: llm.c's model files, written and read, and files that are malformed.
#include "llmc/modelfile.h"
#include "dev/test/store_backend.h"
#include "dev/test/tempdir.h"
#include "dev/test/test.h"

static char folder[TEMP_PATH_SIZE];

static const char* in_folder(const char* name) {
    static char path[4][PATH_SIZE];
    static int next = 0;
    next = (next + 1) % 4;
    return path_join(path[next], folder, name);
}

static GPTConfig small_config(void) { return config_of_shape(2, 2, 4, 8, 100); }

// A model file of the small GPT-2, filled from seed 1.
static void save_small(const char* path) {
    Store s;
    char error[512] = "";
    store_open(&s, small_config(), 0);
    store_fill(&s, 1);
    CHECK(model_file_save(path, &s.config, &s.backend, error, sizeof error));
    CHECK_STR(error, "");
    store_close(&s);
}

static void test_crc32(void) {
    Crc32 c;
    crc32_init(&c);
    CHECK(crc32_add(&c, 0, "123456789", 9) == 0xcbf43926); // the check value of the CRC catalogue
    CHECK(crc32_add(&c, 0, "", 0) == 0);
    const char* text = "The quick brown fox jumps over the lazy dog";
    CHECK(crc32_add(&c, 0, text, 43) == 0x414fa339);
    for (size_t cut = 0; cut <= 43; cut++) { // any split gives the same, so any buffering does
        CHECK(crc32_add(&c, crc32_add(&c, 0, text, cut), text + cut, 43 - cut) == 0x414fa339);
    }
}

static void test_round_trip_and_layout(void) {
    save_small(in_folder("a.bin"));
    CHECK(!path_exists(in_folder("a.bin.tmp")));
    GPTConfig found;
    model_file_config(in_folder("a.bin"), &found);
    GPTConfig c = small_config();
    CHECK(memcmp(&found, &c, sizeof c) == 0);

    Store s, loaded;
    store_open(&s, c, 0);
    store_fill(&s, 1);
    store_open(&loaded, c, 0);
    model_file_load(in_folder("a.bin"), &c, &loaded.backend);
    CHECK(memcmp(loaded.values[0], s.values[0], s.table.num_params * sizeof(float)) == 0);

    // llm.c's layout, byte for byte: its eight words, zeros, then the tensors one after the other.
    size_t size;
    char* data = get_file(in_folder("a.bin"), &size);
    int32_t header[256] = {20240326, 3, 8, 100, 2, 2, 4, 128};
    CHECK(size == 1024 + 4 * s.table.num_params && memcmp(data, header, 1024) == 0);
    CHECK(memcmp(data + 1024, s.values[0], size - 1024) == 0);
    CHECK(s.table.num_params == 128 * 4 + 8 * 4 + 2 * (12 * 16 + 13 * 4) + 8);

    // bf16: the upper halves of the same floats.
    uint16_t* half = (uint16_t*)(data + 1024);
    for (size_t i = 0; i < s.table.num_params; i++) {
        uint32_t bits;
        memcpy(&bits, &s.values[0][i], 4);
        half[i] = (uint16_t)(bits >> 16);
        bits &= 0xffff0000;
        memcpy(&s.values[0][i], &bits, 4);
    }
    ((int32_t*)data)[1] = 5;
    put_file(in_folder("b.bin"), data, 1024 + 2 * s.table.num_params);
    model_file_load(in_folder("b.bin"), &c, &loaded.backend);
    CHECK(memcmp(loaded.values[0], s.values[0], s.table.num_params * sizeof(float)) == 0);
    free(data);
    store_close(&s);
    store_close(&loaded);
}

// What GPT-2 does not have: words 8 to 16.
static void test_extensions(void) {
    GPTConfig c = small_config(), found;
    c.gelu = GELU_ERF;
    c.cosine_blocks[0] = 2;
    c.embed_mult = 10;
    c.residual_mult = 0.1f;
    c.attn_mult = 0; // +0 is the code of 1: written as -0
    c.logit_mult = -0.25f;
    Store s;
    char error[512];
    store_open(&s, c, 0);
    CHECK(model_file_save(in_folder("x.bin"), &c, &s.backend, error, sizeof error));
    model_file_config(in_folder("x.bin"), &found);
    CHECK(found.gelu == GELU_ERF && found.cosine_blocks[0] == 2 && found.cosine_blocks[1] == 0);
    CHECK(found.embed_mult == 10 && found.residual_mult == 0.1f && found.attn_mult == 0 && found.logit_mult == -0.25f);
    CHECK(same_model(&c, &found));
    size_t size;
    char* data = get_file(in_folder("x.bin"), &size);
    CHECK(((int32_t*)data)[8] == 1 && ((int32_t*)data)[9] == 2 && ((int32_t*)data)[13] == 0x41200000);
    free(data);

    // The same shapes, another function of the weights: refused, both named.
    GPTConfig plain = small_config();
    CHECK(!same_model(&plain, &c));
    CHECK_DIES(model_file_load(in_folder("x.bin"), &plain, &s.backend), "erf GELU, cosine blocks");
    CHECK_DIES(model_file_load(in_folder("x.bin"), &plain, &s.backend), "the model is L=2 NH=2 C=4 T=8 V=100");
    GPTConfig wider = config_of_shape(2, 2, 6, 8, 100);
    CHECK_DIES(model_file_load(in_folder("x.bin"), &wider, &s.backend), "C=6");
    store_close(&s);
}

static void test_padding_is_zeroed(void) {
    save_small(in_folder("p.bin"));
    size_t size;
    char* data = get_file(in_folder("p.bin"), &size);
    float* wte = (float*)(data + 1024);
    for (int i = 100 * 4; i < 128 * 4; i++) { wte[i] = 7; }
    put_file(in_folder("p.bin"), data, size);
    free(data);
    Store s, expected;
    store_open(&s, small_config(), 0);
    store_open(&expected, small_config(), 0);
    store_fill(&expected, 1);
    model_file_load(in_folder("p.bin"), &s.config, &s.backend);
    CHECK(memcmp(s.values[0], expected.values[0], s.table.num_params * sizeof(float)) == 0);
    store_close(&s);
    store_close(&expected);
}

// Writes the small model's file with one header word changed (word < 0: none) and the size changed by `more` bytes; what
// happens when it is opened.
static void malformed(int word, int32_t value, int more) {
    size_t size;
    save_small(in_folder("good.bin"));
    char* good = get_file(in_folder("good.bin"), &size);
    char* data = (char*)alloc_zeroed(size + 64, 1, "a test file");
    memcpy(data, good, size);
    free(good);
    if (word >= 0) { ((int32_t*)data)[word] = value; }
    put_file(in_folder("bad.bin"), data, size + (size_t)more);
    free(data);
    GPTConfig c;
    model_file_config(in_folder("bad.bin"), &c);
}

static void test_malformed_files(void) {
    CHECK_DIES(malformed(0, 1234, 0), "is not a model file: it starts with the number 1234, expected 20240326");
    CHECK_DIES(malformed(1, 4, 0), "has version 4; this program reads 3 (fp32) and 5 (bf16)");
    CHECK_DIES(malformed(1, 5, 0), "is too long"); // fp32 numbers under a bf16 header
    CHECK_DIES(malformed(-1, 0, -1), "is truncated");
    CHECK_DIES(malformed(-1, 0, -1500), "is truncated");
    CHECK_DIES(malformed(-1, 0, 1), "is too long");
    // Numbers that no model has, also those whose product would overflow.
    const int32_t absurd[] = {0, -1, INT32_MAX, INT32_MIN};
    for (int word = 2; word <= 7; word++) {
        for (int i = 0; i < 4; i++) { CHECK_DIES(malformed(word, absurd[i], 0), "has a malformed header"); }
    }
    CHECK_DIES(malformed(2, 1 << 20, 0), "is truncated"); // allowed, but then the file is larger
    CHECK_DIES(malformed(6, 65536, 0), "is truncated");
    CHECK_DIES(malformed(6, 5, 0), "the heads must divide the channels");
    CHECK_DIES(malformed(7, 99, 0), "padded vocabulary");
    CHECK_DIES(malformed(8, 2, 0), "GELU");
    CHECK_DIES(malformed(9, 1 << 2, 0), "does not exist"); // cosine attention in the third of two blocks
    CHECK_DIES(malformed(12, INT32_MIN, 0), "does not exist");
    CHECK_DIES(malformed(13, 0x7fc00000, 0), "multipliers must be finite");
    CHECK_DIES(malformed(16, 0x7f800000, 0), "multipliers must be finite");

    GPTConfig c;
    put_file(in_folder("short.bin"), "", 0);
    CHECK_DIES(model_file_config(in_folder("short.bin"), &c), "is truncated");
    const int32_t magic = MODEL_MAGIC;
    put_file(in_folder("short.bin"), &magic, 4);
    CHECK_DIES(model_file_config(in_folder("short.bin"), &c), "header of 1024 bytes, this one has 4 bytes");
    CHECK_DIES(model_file_config(in_folder("none.bin"), &c), "cannot open the model file");
    CHECK_DIES(model_file_config(folder, &c), "cannot read the model file");
}

static void test_save_failures(void) {
    Store s;
    char error[512] = "";
    store_open(&s, small_config(), 0);
    CHECK(!model_file_save(in_folder("no/such/a.bin"), &s.config, &s.backend, error, sizeof error));
    CHECK(strstr(error, "No such file") != NULL);
    s.backend.rank = 1; // takes part, writes nothing
    CHECK(model_file_save(in_folder("rank1.bin"), &s.config, &s.backend, error, sizeof error));
    CHECK(!path_exists(in_folder("rank1.bin")) && !path_exists(in_folder("rank1.bin.tmp")));
    store_close(&s);
}

static void test_write_atomically(void) {
    char error[512] = "", big[100];
    size_t size;
    CHECK(write_atomically(in_folder("t.txt"), "old", 3, error, sizeof error));
    CHECK(write_atomically(in_folder("t.txt"), "new text", 8, error, sizeof error));
    char* text = get_file(in_folder("t.txt"), &size);
    CHECK_STR(text, "new text");
    free(text);
    CHECK(mkdir(in_folder("u.txt.tmp"), 0777) == 0); // in the way of the temporary file
    CHECK(!write_atomically(in_folder("u.txt"), "x", 1, error, sizeof error));
    CHECK(strstr(error, "cannot create") != NULL && strstr(error, "Is a directory") != NULL);
    memset(big, 'x', sizeof big);
    char* path = (char*)alloc_zeroed(6000, 1, "a path that is too long");
    memset(path, 'x', 5999);
    CHECK(!write_atomically(path, big, sizeof big, error, sizeof error));
    free(path);
    char parent[PATH_SIZE];
    CHECK_STR(path_parent(parent, "a/b/c"), "a/b");
    CHECK_STR(path_parent(parent, "c"), ".");
    CHECK_STR(path_parent(parent, "/c"), "/");
}

int main(void) {
    tempdir_make(folder);
    RUN(test_crc32);
    RUN(test_round_trip_and_layout);
    RUN(test_extensions);
    RUN(test_padding_is_zeroed);
    RUN(test_malformed_files);
    RUN(test_save_failures);
    RUN(test_write_atomically);
    tempdir_remove(folder);
    return test_summary();
}
