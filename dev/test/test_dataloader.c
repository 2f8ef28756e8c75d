/*
Tests of llmc/dataloader.h: the keyed permutation against its test vectors and against a second, independent version;
the stream over shards of any size; the errors.
*/
#include "dev/test/tempdir.h"
#include "dev/test/test.h"
#include "llmc/dataloader.h"

// ---------------------------------------------------------------------------------------------------------------------
// Token files to test with

static void write_file(const char* name, const int32_t* header, const void* tokens, size_t bytes) {
    FILE* f = fopen(name, "wb");
    if (f == NULL || fwrite(header, sizeof(int32_t), 256, f) != 256 || fwrite(tokens, 1, bytes, f) != bytes) {
        fatal("the test cannot write '%s'", name);
    }
    fclose(f);
}

// n tokens first, first + 1, ... (modulo 60000)
static void write_shard(const char* name, int n, int first, int vocab_size) {
    uint16_t* tokens = (uint16_t*)alloc_zeroed((size_t)n, sizeof(uint16_t), "a test's tokens");
    for (int i = 0; i < n; i++) { tokens[i] = (uint16_t)((first + i) % 60000); }
    int32_t header[256] = {20240520, 1, n, vocab_size};
    write_file(name, header, tokens, (size_t)n * 2);
    free(tokens);
}

// ---------------------------------------------------------------------------------------------------------------------
// The permutation

static void test_permute_vectors(void) {
    const uint64_t a[] = {6, 9, 2, 7, 1, 4, 0, 8, 3, 5}, b[] = {4, 6, 9, 2, 1, 3, 5, 8, 0, 7};
    const uint64_t c[] = {1, 5, 0, 8, 3, 7, 2, 4, 6, 9}, d[] = {485, 455, 505, 156, 128, 126, 174, 609, 530, 134};
    const uint64_t e[] = {UINT64_C(303138615449), UINT64_C(450786713445), UINT64_C(22682906792), UINT64_C(22571709787)};
    for (uint64_t i = 0; i < 10; i++) {
        CHECK(permute(0, 0, 10, i) == a[i]);
        CHECK(permute(0, 1, 10, i) == b[i]);
        CHECK(permute(1, 0, 10, i) == c[i]);
        CHECK(permute(42, 3, 1000, i) == d[i]);
    }
    for (uint64_t i = 0; i < 4; i++) { CHECK(permute(UINT64_MAX, 7, UINT64_C(1000000000000), i) == e[i]); }
}

// The formula once more, written from the description: numbers in place of bits, recursion in place of loops.
static uint64_t mix(uint64_t x) {
    x ^= x / (UINT64_C(1) << 30);
    x *= UINT64_C(13787848793156543929);
    x ^= x / (UINT64_C(1) << 27);
    x *= UINT64_C(10723151780598845931);
    return x ^ x / (UINT64_C(1) << 31);
}

static uint64_t feistel(uint64_t key, uint64_t side, uint64_t left, uint64_t right, uint64_t round) {
    if (round == 9) { return left * side + right; }
    return feistel(key, side, right, left ^ mix(key + mix(round * UINT64_C(4294967296) + right)) % side, round + 1);
}

static uint64_t permute_again(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i) {
    uint64_t side = 1; // 2^h
    while (side * side < n) { side *= 2; }
    uint64_t x = feistel(mix(mix(seed + UINT64_C(11400714819323198485)) + epoch), side, i / side, i % side, 1);
    return x < n ? x : permute_again(seed, epoch, n, x);
}

static void test_permute_is_its_formula(void) {
    uint64_t rng = 1;
    for (int i = 0; i < 20000; i++) {
        uint64_t seed = splitmix64(&rng), epoch = splitmix64(&rng) % 1000;
        uint64_t n = 1 + splitmix64(&rng) % (UINT64_C(1) << (1 + i % 50)), j = splitmix64(&rng) % n;
        CHECK(permute(seed, epoch, n, j) == permute_again(seed, epoch, n, j));
    }
    CHECK(permute(1, 2, UINT64_MAX, 3) < UINT64_MAX); // the largest domain, 2^64, does not overflow
}

// Whether 0 .. n-1 come out once each; *fixed: how many stay where they are.
static bool is_bijection(uint64_t seed, uint64_t epoch, int n, int* fixed) {
    char* seen = (char*)alloc_zeroed((size_t)n, 1, "a test");
    bool ok = true;
    *fixed = 0;
    for (int i = 0; i < n; i++) {
        uint64_t p = permute(seed, epoch, (uint64_t)n, (uint64_t)i);
        ok = ok && p < (uint64_t)n && !seen[p];
        if (ok) { seen[p] = 1; }
        *fixed += p == (uint64_t)i;
    }
    free(seen);
    return ok;
}

static void test_permute_is_a_bijection(void) {
    int fixed;
    for (int n = 1; n <= 200; n++) {
        for (uint64_t epoch = 0; epoch < 3; epoch++) { CHECK(is_bijection(7, epoch, n, &fixed)); }
    }
    const int large[] = {1 << 16, (1 << 16) + 1, 99991, 300000};
    for (int i = 0; i < 4; i++) {
        CHECK(is_bijection(7, 0, large[i], &fixed));
        CHECK(fixed < 12); // a random permutation has 1 fixed point on average; 12 or more once in 10^9 times
    }
}

// Every position should receive every number equally often. Chi-squared of the counts over many epochs, against its
// mean plus five standard deviations.
static void test_permute_is_uniform(void) {
    enum { EPOCHS = 20000 };
    const int sizes[] = {2, 3, 5, 7, 16, 17};
    for (int s = 0; s < 6; s++) {
        int n = sizes[s], count[17][17] = {{0}};
        for (uint64_t epoch = 0; epoch < EPOCHS; epoch++) {
            for (int i = 0; i < n; i++) { count[i][permute(3, epoch, (uint64_t)n, (uint64_t)i)]++; }
        }
        double chi2 = 0, expected = (double)EPOCHS / n, freedom = (n - 1) * (n - 1);
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < n; j++) { chi2 += (count[i][j] - expected) * (count[i][j] - expected) / expected; }
        }
        CHECK(chi2 < freedom + 5 * sqrt(2 * freedom));
    }
}

// Neighbours in the stream come from unrelated places, and other epochs and seeds give other orders.
static void test_permute_shuffles(void) {
    enum { N = 100000 };
    double correlation = 0, distance = 0;
    int same_epoch = 0, same_seed = 0;
    for (uint64_t i = 0; i + 1 < N; i++) {
        double x = (double)permute(5, 0, N, i) / N, y = (double)permute(5, 0, N, i + 1) / N;
        correlation += (x - 0.5) * (y - 0.5) * 12 / N;
        distance += fabs(x - y) / N;
        same_epoch += permute(5, 0, N, i) == permute(5, 1, N, i);
        same_seed += permute(5, 0, N, i) == permute(6, 0, N, i);
    }
    CHECK_CLOSE(correlation, 0, 0.016);       // standard deviation 1/sqrt(N) = 0.0032: five of them
    CHECK_CLOSE(distance, 1.0 / 3, 0.0038);   // E|x - y| = 1/3, standard deviation sqrt(1/18/N) = 0.00075
    CHECK(same_epoch < 12 && same_seed < 12); // 1 expected
}

// ---------------------------------------------------------------------------------------------------------------------
// The stream

static void test_file_order(void) {
    DataLoader d;
    int tokens[10], targets[10];
    write_shard("order_a.bin", 31, 0, 0);      // 3 sequences exactly: the 31st token is a target only
    write_shard("order_b.bin", 10, 1000, 0);   // none: one token short
    write_shard("order_c.bin", 1, 2000, 257);  // none
    write_shard("order_d.bin", 30, 3000, 100); // 2, and 9 tokens left over
    dataloader_open(&d, "order_*.bin", 10, 1, false);
    CHECK(d.T == 10 && d.num_shards == 4 && d.num_tokens == 72 && d.num_sequences == 5 && d.vocab_size == 257);
    const int first[] = {0, 10, 20, 3000, 3010};
    for (uint64_t number = 0; number < 12; number++) { // also into the third epoch
        dataloader_get(&d, number, 60000, tokens, targets);
        for (int t = 0; t < 10; t++) {
            CHECK(tokens[t] == first[number % 5] + t && targets[t] == first[number % 5] + t + 1);
        }
    }
    dataloader_close(&d);
    CHECK(dataloader_peek_vocab("order_[cd].bin") == 257);
    CHECK(dataloader_peek_vocab("order_a.bin") == 0);
}

// Every sequence once an epoch, in the permutation's order; the same whatever is read before, and however often.
static void test_shuffled_order(void) {
    enum { T = 8 };
    DataLoader d, again;
    int tokens[T], targets[T], tokens2[T], targets2[T], start[47];
    write_shard("s0.bin", 201, 0, 0);     // 25 sequences
    write_shard("s1.bin", 5, 30000, 0);   // none
    write_shard("s2.bin", 180, 10000, 0); // 22
    dataloader_open(&d, "s?.bin", T, 11, true);
    dataloader_open(&again, "s*.bin", T, 11, true);
    CHECK(d.num_sequences == 47);
    for (int i = 0; i < 47; i++) { start[i] = i < 25 ? i * T : 10000 + (i - 25) * T; }
    for (uint64_t epoch = 0; epoch < 3; epoch++) {
        int times[47] = {0};
        for (uint64_t i = 0; i < 47; i++) {
            dataloader_get(&d, epoch * 47 + i, 60000, tokens, targets);
            uint64_t sequence = permute(11, epoch, 47, i);
            times[sequence]++;
            CHECK(tokens[0] == start[sequence] && targets[T - 1] == start[sequence] + T);
            uint64_t back = epoch * 47 + 46 - i; // in any order of reading
            dataloader_get(&again, back, 60000, tokens2, targets2);
            CHECK(tokens2[0] == start[permute(11, epoch, 47, 46 - i)]);
        }
        for (int i = 0; i < 47; i++) { CHECK(times[i] == 1); }
    }
    dataloader_close(&d);
    dataloader_close(&again);
}

// Micro-batches of any size take the same sequences in the same order.
static void test_micro_batches(void) {
    enum { T = 4, N = 60 };
    DataLoader d;
    write_shard("m.bin", 150, 0, 0);
    dataloader_open(&d, "m.bin", T, 2, true);
    int stream[3][N * T], targets[N * T];
    const int batch[] = {1, 7, 60};
    for (int run = 0; run < 3; run++) {
        for (int done = 0; done < N;) {
            int B = min_int(batch[run], N - done);
            for (int b = 0; b < B; b++, done++) {
                dataloader_get(&d, (uint64_t)done, 150, stream[run] + done * T, targets + done * T);
            }
        }
    }
    CHECK(memcmp(stream[0], stream[1], sizeof stream[0]) == 0 && memcmp(stream[0], stream[2], sizeof stream[0]) == 0);
    dataloader_close(&d);
}

// More than 2^31 tokens, more than 4 GiB: a file that is all hole but for its end.
static void test_huge_file(void) {
    DataLoader d;
    int tokens[4], targets[4];
    const uint64_t count = (UINT64_C(1) << 31) + 9; // (count - 1) / 4: the last sequence is the last five tokens
    const uint16_t end[] = {11, 12, 13, 14, 15};
    int32_t header[256] = {20240520, 1, (int32_t)(uint32_t)count, 0};
    write_file("huge.bin", header, end, 0);
    CHECK(truncate("huge.bin", (off_t)(1024 + 2 * count)) == 0);
    FILE* f = fopen("huge.bin", "r+b");
    CHECK(fseeko(f, -(off_t)sizeof end, SEEK_END) == 0 && fwrite(end, sizeof end, 1, f) == 1);
    fclose(f);
    dataloader_open(&d, "huge.bin", 4, 0, false);
    CHECK(d.num_tokens == (int64_t)count && d.num_sequences == (count - 1) / 4);
    dataloader_get(&d, d.num_sequences - 1, 100, tokens, targets);
    CHECK(tokens[0] == 11 && tokens[3] == 14 && targets[3] == 15);
    CHECK_DIES(dataloader_get(&d, d.num_sequences - 1, 15, tokens, targets), "position 2147483656");
    dataloader_close(&d);
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

// A file of this header and so many tokens must be refused with this message.
static void refuse(int magic, int version, int count, int vocab_size, size_t tokens, const char* message) {
    DataLoader d;
    const uint16_t zeros[64] = {0};
    int32_t header[256] = {magic, version, count, vocab_size};
    write_file("bad.bin", header, zeros, tokens * 2);
    CHECK_DIES(dataloader_open(&d, "bad.bin", 4, 0, true), message);
    CHECK_DIES(dataloader_peek_vocab("bad.bin"), message);
}

static void test_bad_files(void) {
    DataLoader d;
    refuse(20240326, 1, 10, 0, 10, "not a token file: it starts with 20240326, not 20240520; this is a model file");
    refuse(20240328, 1, 10, 0, 10, "this is a tokenizer file");
    refuse(20240522, 1, 10, 0, 10, "this is an evaluation file");
    refuse(20240801, 1, 10, 0, 10, "32-bit tokens");
    refuse(0x4d554e93, 1, 10, 0, 10, "NumPy");
    refuse(0x20656854, 1, 10, 0, 10, "text_to_tokens");
    refuse(20240520, 2, 10, 0, 10, "has version 2; only version 1");
    refuse(20240520, 1, 0, 0, 0, "holds no tokens");
    refuse(20240520, 1, 10, 0, 9, "truncated: its header counts 10 tokens, 1044 bytes in all, but it has 1042");
    refuse(20240520, 1, 10, 0, 11, "longer than it should be");
    refuse(20240520, 1, -1, 0, 10, "truncated: its header counts 4294967295 tokens");
    refuse(20240520, 1, 10, -5, 10, "vocabulary as -5");
    refuse(20240520, 1, 10, 65537, 10, "vocabulary as 65537");
    CHECK(truncate("bad.bin", 1023) == 0);
    CHECK_DIES(dataloader_open(&d, "bad.bin", 4, 0, true), "1023 bytes, less than the 1024");
    CHECK(truncate("bad.bin", 0) == 0);
    CHECK_DIES(dataloader_open(&d, "bad.bin", 4, 0, true), "0 bytes");
    CHECK_DIES(dataloader_open(&d, "none_*.bin", 4, 0, true), "no token file matches");
    CHECK_DIES(dataloader_peek_vocab("none.bin"), "no token file matches");
    CHECK_DIES(dataloader_open(&d, ".", 4, 0, true), "not a regular file");
}

static void test_bad_tokens(void) {
    DataLoader d;
    int tokens[10], targets[10];
    write_shard("v0.bin", 21, 0, 0);
    write_shard("v1.bin", 21, 40, 257);
    dataloader_open(&d, "v?.bin", 10, 0, false);
    dataloader_get(&d, 2, 51, tokens, targets); // tokens 40 to 50
    CHECK(targets[9] == 50);
    CHECK_DIES(dataloader_get(&d, 2, 50, tokens, targets), "v1.bin': token 50 at position 10 is outside");
    CHECK_DIES(dataloader_get(&d, 2, 50, tokens, targets), "vocabulary of 50 (the file's header gives 257");
    dataloader_close(&d);
    CHECK_DIES(dataloader_open(&d, "v?.bin", 21, 0, false),
               "one of 21 tokens needs 22 in one file, the longest has 21");
    dataloader_open(&d, "v?.bin", 20, 0, false);
    CHECK(d.num_sequences == 2);
    dataloader_close(&d);
}

// A name may contain the characters of a pattern.
static void test_name_with_brackets(void) {
    DataLoader d;
    write_shard("x[1].bin", 11, 0, 0);
    dataloader_open(&d, "x[1].bin", 10, 0, true);
    CHECK(d.num_sequences == 1);
    dataloader_close(&d);
}

int main(void) {
    char folder[TEMP_PATH_SIZE];
    if (chdir(tempdir_make(folder)) != 0) { // all files of the tests lie there
        fatal("cannot enter the folder '%s': %s", folder, strerror(errno));
    }
    RUN(test_permute_vectors);
    RUN(test_permute_is_its_formula);
    RUN(test_permute_is_a_bijection);
    RUN(test_permute_is_uniform);
    RUN(test_permute_shuffles);
    RUN(test_file_order);
    RUN(test_shuffled_order);
    RUN(test_micro_batches);
    RUN(test_huge_file);
    RUN(test_bad_files);
    RUN(test_bad_tokens);
    RUN(test_name_with_brackets);
    tempdir_remove(folder);
    return test_summary();
}
