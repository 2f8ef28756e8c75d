/*
Tests of llmc/tokenizer.h and llmc/unicode.h: the classes of characters, the cutting into pieces, byte-pair merging with
a small vocabulary made by hand, the byte-level vocabulary, any bytes there and back, and malformed files.
*/
#include "dev/test/tempdir.h"
#include "dev/test/test.h"
#include "llmc/rand.h"
#include "llmc/tokenizer.h"

static const char* const path = "tokenizer.bin"; // in a temporary folder

// Writes a vocabulary of 256 bytes, in this order, then the given tokens, then end of text.
static void write_vocabulary(const char* const* tokens, int num_tokens) {
    char byte[256], error[PATH_SIZE + 128];
    const char* bytes[300];
    int lengths[300], n = 256;
    for (int i = 0; i < 256; i++) {
        byte[i] = (char)i;
        bytes[i] = &byte[i];
        lengths[i] = 1;
    }
    for (int i = 0; i <= num_tokens; i++, n++) {
        bytes[n] = i < num_tokens ? tokens[i] : "<|endoftext|>";
        lengths[n] = (int)strlen(bytes[n]);
    }
    OutFile f;
    out_open(&f, path, error, sizeof error);
    tokenizer_write(&f, n, n - 1, bytes, lengths);
    if (!out_close(&f)) { fatal("%s", error); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Characters and pieces

static void test_unicode_classes(void) {
    CHECK(unicode_is_letter('a') && unicode_is_letter('Z') && unicode_is_letter(0xe9) && unicode_is_letter(0x4e2d));
    CHECK(unicode_is_letter(0xaa) && unicode_is_letter(0x10400) && unicode_is_letter(0x3a9) &&
          unicode_is_letter(0xac00));
    CHECK(!unicode_is_letter('1') && !unicode_is_letter('_') && !unicode_is_letter('@') && !unicode_is_letter('['));
    CHECK(!unicode_is_letter(0x301) && !unicode_is_letter(0x1f600) && !unicode_is_letter(0xd7) &&
          !unicode_is_letter(0));
    CHECK(unicode_is_number('0') && unicode_is_number('9') && unicode_is_number(0xb2) && unicode_is_number(0x2167));
    CHECK(unicode_is_number(0x663) && unicode_is_number(0xbd) && !unicode_is_number('a') && !unicode_is_number('/'));
    CHECK(unicode_is_space(' ') && unicode_is_space('\n') && unicode_is_space(0xa0) && unicode_is_space(0x3000));
    CHECK(unicode_is_space(0x85) && !unicode_is_space(0x1c) && !unicode_is_space(0x200b) &&
          !unicode_is_space(0x10ffff));
}

// One line of the test: UTF-8 bytes, how many of them are one character, and which.
static void check_utf8(const char* bytes, size_t n, size_t expected_len, uint32_t expected) {
    uint32_t code = 0;
    size_t len = utf8_decode(bytes, n, &code);
    CHECK(len == expected_len && code == expected);
}

static void test_utf8(void) {
    check_utf8("a", 1, 1, 'a');
    check_utf8("\0", 1, 1, 0);
    check_utf8("\xc3\xa9x", 3, 2, 0xe9);
    check_utf8("\xe4\xb8\xad", 3, 3, 0x4e2d);
    check_utf8("\xf0\x9f\x98\x80", 4, 4, 0x1f600);
    check_utf8("\xf4\x8f\xbf\xbf", 4, 4, 0x10ffff);
    check_utf8("\xe4\xb8\xad", 2, 1, 0xfffd);     // cut off
    check_utf8("\xc3x", 2, 1, 0xfffd);            // not continued
    check_utf8("\x80", 1, 1, 0xfffd);             // a continuation alone
    check_utf8("\xc1\x81", 2, 1, 0xfffd);         // overlong
    check_utf8("\xe0\x81\x81", 3, 1, 0xfffd);     // overlong
    check_utf8("\xf0\x80\x81\x81", 4, 1, 0xfffd); // overlong
    check_utf8("\xed\xa0\x80", 3, 1, 0xfffd);     // a surrogate
    check_utf8("\xf4\x90\x80\x80", 4, 1, 0xfffd); // beyond Unicode
    check_utf8("\xff\xff\xff\xff", 4, 1, 0xfffd);
}

// The pieces of a text, with | between them.
static const char* pieces(const char* text) {
    static char joined[1024];
    size_t n = strlen(text), used = 0;
    for (size_t at = 0; at < n;) {
        size_t len = first_piece(text + at, n - at);
        memcpy(joined + used, text + at, len);
        used += len;
        at += len;
        joined[used++] = '|';
    }
    joined[used > 0 ? used - 1 : 0] = '\0';
    return joined;
}

static void test_pieces(void) {
    CHECK_STR(pieces("Hello world"), "Hello| world");
    CHECK_STR(pieces("a  b   c"), "a| | b|  | c"); // the last space of several goes with the word
    CHECK_STR(pieces("a\n\nb\tc"), "a|\n|\n|b|\t|c");
    CHECK_STR(pieces("end  \n "), "end|  \n ");
    CHECK_STR(pieces("x \n y"), "x| \n| y");
    CHECK_STR(pieces("it's we'll I'd they've"), "it|'s| we|'ll| I|'d| they|'ve");
    CHECK_STR(pieces("IT'S don't 'tis"), "IT|'|S| don|'t| '|tis");
    CHECK_STR(pieces("you're I'm 'rex"), "you|'re| I|'m| '|rex");
    CHECK_STR(pieces("'rex"), "'re|x");
    CHECK_STR(pieces("x1 = 23;"), "x|1| =| 23|;");
    CHECK_STR(pieces("for(int i=0;i<n;i++)"), "for|(|int| i|=|0|;|i|<|n|;|i|++)");
    CHECK_STR(pieces(" "), " ");
    CHECK_STR(pieces("\xc3\xa9t\xc3\xa9 \xe4\xb8\xad\xe6\x96\x87\xe3\x80\x82"), // letters, letters, a full stop
              "\xc3\xa9t\xc3\xa9| \xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82");
    CHECK_STR(pieces("3\xc2\xbd\xd9\xa3"), "3\xc2\xbd\xd9\xa3");                      // numbers of three kinds
    CHECK_STR(pieces("a\xe3\x80\x80\xe3\x80\x80z"), "a|\xe3\x80\x80|\xe3\x80\x80|z"); // ideographic spaces
    CHECK_STR(pieces("a\xff\xfe!b"), "a|\xff\xfe!|b");
    CHECK_STR(pieces("ab\xc3"), "ab|\xc3");
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding

// The tokens of a text as "[ab][c]", those of one byte bare; end of text as "#".
static const char* encoded(const Tokenizer* t, const char* text) {
    static char joined[2048];
    int count, used = 0;
    int* ids = tokenizer_encode(t, text, strlen(text), &count);
    for (int i = 0; i < count; i++) {
        int len;
        const char* bytes = tokenizer_decode(t, ids[i], &len);
        if (ids[i] == t->eot) {
            bytes = "#";
            len = 1;
        }
        used += snprintf(joined + used, sizeof joined - (size_t)used, len == 1 ? "%.*s" : "[%.*s]", len, bytes);
    }
    joined[used] = '\0';
    free(ids);
    return joined;
}

static void test_merges(void) {
    const char* const tokens[] = {"bc", "ab", "aa", "abc", "aaaa", " a", " abc", "abcabc", "\xc3\xa9"};
    Tokenizer t;
    write_vocabulary(tokens, 9);
    tokenizer_open(&t, path);
    CHECK(t.vocab_size == 266 && t.eot == 265);
    CHECK_STR(encoded(&t, ""), "");
    CHECK_STR(encoded(&t, "xyz"), "xyz");
    CHECK_STR(encoded(&t, "ab"), "[ab]");
    CHECK_STR(encoded(&t, "abc"), "[abc]"); // bc (256) before ab (257), then a + bc (259)
    CHECK_STR(encoded(&t, "abd"), "[ab]d");
    CHECK_STR(encoded(&t, "bcab"), "[bc][ab]");
    CHECK_STR(encoded(&t, "aaa"), "[aa]a"); // from left to right
    CHECK_STR(encoded(&t, "aaaaaaa"), "[aaaa][aa]a");
    CHECK_STR(encoded(&t, "aab"), "a[ab]"); // ab (257) before aa (258)
    CHECK_STR(encoded(&t, "abcabc"), "[abcabc]");
    CHECK_STR(encoded(&t, "abcabcabc"), "[abcabc][abc]");
    CHECK_STR(encoded(&t, "x abc abc"), "x[ abc][ abc]");
    CHECK_STR(encoded(&t, "x  abc"), "x [ abc]");
    CHECK_STR(encoded(&t, "a1bc"), "a1[bc]"); // pieces are never joined
    CHECK_STR(encoded(&t, "caf\xc3\xa9"), "caf[\xc3\xa9]");
    CHECK_STR(encoded(&t, "ab<|endoftext|>bc<|endoftext|>"), "[ab]#[bc]#");
    CHECK_STR(encoded(&t, "a<|endoftext|"), "a<|endoftext|");
    CHECK_STR(encoded(&t, "<|endoftext|><|endoftext|>"), "##");
    CHECK_STR(encoded(&t, "<<|endoftext|>>"), "<#>");
    tokenizer_close(&t);
}

// Any bytes, of every length from 0 on, in both vocabularies.
static void test_round_trip(void) {
    const char* const tokens[] = {"th", "he", "the", "\xc3\xa9", "\x80\x80", "  "};
    uint64_t rng = 3;
    for (int merges = 0; merges <= 6; merges += 6) {
        Tokenizer t;
        write_vocabulary(tokens, merges);
        tokenizer_open(&t, path);
        for (size_t n = 0; n < 400; n++) {
            char text[400], back[400];
            for (size_t i = 0; i < n; i++) {
                const char few[] = " the\xc3\xa9\x80'\xf0";
                uint64_t r = splitmix64(&rng);
                text[i] = n % 2 == 0 ? (char)r : few[r % (sizeof few - 1)];
            }
            int count;
            size_t used = 0;
            int* ids = tokenizer_encode(&t, text, n, &count);
            for (int i = 0; i < count; i++) {
                int len;
                const char* bytes = tokenizer_decode(&t, ids[i], &len);
                CHECK(used + (size_t)len <= n);
                memcpy(back + used, bytes, (size_t)len);
                used += (size_t)len;
            }
            CHECK(used == n && memcmp(text, back, n) == 0);
            CHECK(merges > 0 || count == (int)n);
            free(ids);
        }
        tokenizer_close(&t);
    }
}

static void test_byte_level(void) {
    Tokenizer t;
    int count, len;
    write_vocabulary(NULL, 0);
    tokenizer_open(&t, path);
    CHECK(t.vocab_size == 257 && t.eot == 256);
    int* ids = tokenizer_encode(&t, "h\xc3\xa9\0<|endoftext|>!", 18, &count);
    CHECK(count == 6 && ids[0] == 'h' && ids[1] == 0xc3 && ids[2] == 0xa9 && ids[3] == 0 && ids[4] == 256 &&
          ids[5] == '!');
    free(ids);
    CHECK(memcmp(tokenizer_decode(&t, 256, &len), "<|endoftext|>", 13) == 0 && len == 13);
    tokenizer_decode(&t, 257, &len);
    CHECK(len == 0);
    tokenizer_decode(&t, -1, &len);
    CHECK(len == 0);
    tokenizer_close(&t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Files

// Writes a file: a header, then n bytes.
static void write_raw(int magic, int version, int count, int eot, const void* bytes, size_t n) {
    int32_t header[256] = {magic, version, count, eot};
    FILE* f = fopen(path, "wb");
    if (f == NULL || fwrite(header, sizeof header, 1, f) != 1 || fwrite(bytes, 1, n, f) != n) {
        fatal("the test cannot write '%s'", path);
    }
    fclose(f);
}

static void test_versions(void) {
    Tokenizer t;
    char tokens[2 * 50257];
    for (int i = 0; i < 50257; i++) {
        tokens[2 * i] = 1;
        tokens[2 * i + 1] = (char)i;
    }
    write_raw(20240328, 1, 256, 99, tokens, 2 * 256); // version 1: word 3 means nothing
    tokenizer_open(&t, path);
    CHECK(t.vocab_size == 256 && t.eot == -1);
    CHECK_STR(encoded(&t, "<|endoftext|>"), "<|endoftext|>");
    tokenizer_close(&t);
    write_raw(20240328, 1, 50257, 0, tokens, 2 * 50257);
    tokenizer_open(&t, path);
    CHECK(t.eot == 50256);
    CHECK_STR(encoded(&t, "a"), "a"); // the first of many tokens with these bytes
    tokenizer_close(&t);
}

static void test_bad_files(void) {
    Tokenizer t;
    char tokens[2 * 257];
    for (int i = 0; i < 257; i++) {
        tokens[2 * i] = 1;
        tokens[2 * i + 1] = (char)i;
    }
    write_raw(20240520, 2, 257, 256, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "not a tokenizer file: it starts with 20240520, not 20240328");
    write_raw(20240328, 3, 257, 256, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "has version 3; versions 1 and 2");
    write_raw(20240328, 2, 0, 0, tokens, 0);
    CHECK_DIES(tokenizer_open(&t, path), "has 0 tokens; expected 1 to 65536");
    write_raw(20240328, 2, INT32_MAX, 0, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "has 2147483647 tokens");
    write_raw(20240328, 2, -1, 0, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "has -1 tokens");
    write_raw(20240328, 2, 257, 257, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "gives token 257 as end of text, but has the tokens 0 to 256");
    write_raw(20240328, 2, 257, -1, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "gives token -1 as end of text");
    write_raw(20240328, 2, 257, 256, tokens, sizeof tokens - 1);
    CHECK_DIES(tokenizer_open(&t, path), "ends within token 256 of 257");
    write_raw(20240328, 2, 257, 256, tokens, 100);
    CHECK_DIES(tokenizer_open(&t, path), "ends within token 50 of 257");
    write_raw(20240328, 2, 256, 255, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "its 256 tokens end at byte 1536, the file at 1538");
    write_raw(20240328, 2, 200, 199, tokens, 400);
    CHECK_DIES(tokenizer_open(&t, path), "no token for the byte 0xc7"); // 199 is end of text
    tokens[2 * 77] = 0;
    write_raw(20240328, 2, 257, 256, tokens, sizeof tokens);
    CHECK_DIES(tokenizer_open(&t, path), "token 77 has no bytes");
    CHECK(truncate(path, 1000) == 0);
    CHECK_DIES(tokenizer_open(&t, path), "1000 bytes, less than the 1024");
    unlink(path);
    CHECK_DIES(tokenizer_open(&t, path), "No such file");
}

int main(void) {
    char folder[TEMP_PATH_SIZE];
    if (chdir(tempdir_make(folder)) != 0) { // all files of the tests lie there
        fatal("cannot enter the folder '%s': %s", folder, strerror(errno));
    }
    RUN(test_unicode_classes);
    RUN(test_utf8);
    RUN(test_pieces);
    RUN(test_merges);
    RUN(test_round_trip);
    RUN(test_byte_level);
    RUN(test_versions);
    RUN(test_bad_files);
    tempdir_remove(folder);
    return test_summary();
}
