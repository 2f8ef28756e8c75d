/*
Tests of dev/data/text_to_tokens.c, which is compiled into this program: what is written, the split, shards, errors, and
that a failed write leaves everything as it was.
*/
static int test_fault(const char* op);
#define IO_FAULT(op) test_fault(op)
#define main         text_to_tokens_main
#include "dev/data/text_to_tokens.c"
#undef main
#include "dev/test/tempdir.h"
#include "dev/test/test.h"
#include "llmc/dataloader.h"

// ---------------------------------------------------------------------------------------------------------------------
// Running it

static int calls_until_fault = 0; // 0: none

static int test_fault(const char* op) {
    (void)op;
    return calls_until_fault > 0 && --calls_until_fault == 0;
}

static const char* write_text(const char* name, const char* text, size_t len) {
    put_file(name, text, len);
    return name;
}

// Runs the program with these words, up to a NULL, behind --out o; what it prints is dropped.
static int run(const char* const* words) {
    char* argv[32] = {(char*)"text_to_tokens", (char*)"--out", (char*)"o"};
    int argc = 3;
    while (*words != NULL) { argv[argc++] = (char*)*words++; }
    fflush(stdout);
    int saved = dup(1);
    if (freopen("/dev/null", "w", stdout) == NULL) { fatal("the test cannot open /dev/null"); }
    int status = text_to_tokens_main(argc, argv);
    fflush(stdout);
    dup2(saved, 1);
    close(saved);
    return status;
}

#define WORDS(...) ((const char* const[]){__VA_ARGS__, NULL})

static void remove_files(const char* pattern) {
    glob_t files;
    if (glob(pattern, 0, NULL, &files) == 0) {
        for (size_t i = 0; i < files.gl_pathc; i++) { unlink(files.gl_pathv[i]); }
        globfree(&files);
    }
}

// The tokens of a file as text, end of text as '#'.
static const char* tokens_of(const char* name) {
    static char text[1 << 16];
    TokenShard s;
    token_shard_open(&s, name);
    CHECK(s.header[3] == 257 && s.num_tokens < sizeof text);
    for (uint64_t i = 0; i < s.num_tokens; i++) { text[i] = s.tokens[i] == 256 ? '#' : (char)s.tokens[i]; }
    text[s.num_tokens] = '\0';
    token_shard_close(&s);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// What is written

static void test_every_nth_document(void) {
    const char* a = write_text("a.txt", "alpha", 5);
    const char* b = write_text("b.txt", "beta\n", 5);
    const char* c = write_text("c.txt", "", 0); // no document
    const char* d = write_text("d.txt", "\xff\n\n\xc3\xa9", 5);
    CHECK(run(WORDS("--val-every", "2", a, b, c, d)) == 0);
    CHECK_STR(tokens_of("o_train.bin"), "#alpha#\xff\n\n\xc3\xa9");
    CHECK_STR(tokens_of("o_val.bin"), "#beta\n");
    Tokenizer t;
    int len;
    tokenizer_open(&t, "o_tokenizer.bin");
    CHECK(t.vocab_size == 257 && t.eot == 256);
    CHECK(tokenizer_decode(&t, 0xe9, &len)[0] == (char)0xe9 && len == 1);
    tokenizer_close(&t);
    // Once more with other documents: the old files are replaced.
    CHECK(run(WORDS("--val-every", "3", d, b, a)) == 0);
    CHECK_STR(tokens_of("o_train.bin"), "#\xff\n\n\xc3\xa9#beta\n");
    CHECK_STR(tokens_of("o_val.bin"), "#alpha");
    CHECK(!path_exists("o_train.bin.tmp") && !path_exists("o_val.bin.tmp") && !path_exists("o_tokenizer.bin.tmp"));
    remove_files("*");
}

static void test_blank_lines(void) {
    const char text[] = "\n\none\none\n\ntwo\r\n \t\r\nthree\n\n\n\nfour";
    const char* a = write_text("a.txt", text, sizeof text - 1);
    const char* b = write_text("b.txt", "\n \n", 3);
    const char* c = write_text("c.txt", "five\n\nsix\n\n", 11);
    CHECK(run(WORDS("--val-every", "3", "--separator", "blank-line", a, b, c)) == 0);
    CHECK_STR(tokens_of("o_train.bin"), "#one\none\n#two\r\n#four#five\n");
    CHECK_STR(tokens_of("o_val.bin"), "#three\n#six\n");
    CHECK(run(WORDS("--val-every", "3", "--separator", "file", c, b, a)) == 0);
    CHECK_STR(tokens_of("o_train.bin"), "#five\n\nsix\n\n#\n \n");
    remove_files("*");
}

static void test_files_from(void) {
    char list[9000];
    snprintf(list, sizeof list, "%s\n\n%s", write_text("a b.txt", "first", 5), write_text("-c.txt", "second", 6));
    const char* list_path = write_text("list", list, strlen(list));
    CHECK(run(WORDS("--val-every", "2", "--files-from", list_path)) == 0);
    CHECK_STR(tokens_of("o_train.bin"), "#first");
    CHECK_STR(tokens_of("o_val.bin"), "#second");
    remove_files("*");
}

// A long document gives its last tenth, from the start of a line on; nothing is lost or doubled.
static void test_end_of_long_document(void) {
    char text[5000], joined[5100];
    for (int i = 0; i < 5000; i++) { text[i] = i % 37 == 36 ? '\n' : (char)('a' + i % 23); }
    const char* a = write_text("a.txt", text, sizeof text);
    CHECK(run(WORDS(a)) == 0);
    size_t train = strlen(strcpy(joined, tokens_of("o_train.bin")));
    const char* val = tokens_of("o_val.bin");
    CHECK(joined[0] == '#' && val[0] == '#' && joined[train - 1] == '\n');
    CHECK(strlen(val) - 1 <= 500 && strlen(val) - 1 > 500 - 37);
    strcpy(joined + train, val + 1);
    CHECK(strlen(joined) == 5001 && memcmp(joined + 1, text, 5000) == 0);
    CHECK(run(WORDS("--val-fraction", "0.5", a)) == 0);
    CHECK(strlen(tokens_of("o_val.bin")) > 2500 - 37);
    remove_files("*");
}

// Where the end of the document has no line that starts, it is cut within a line, but not within a character.
static void test_end_of_long_line(void) {
    char text[4001]; // the last tenth begins at byte 3601, the second of a character
    for (int i = 0; i < 4001; i++) { text[i] = "\xe4\xb8\xad"[i % 3]; }
    text[4000] = '\n';
    CHECK(run(WORDS(write_text("a.txt", text, sizeof text))) == 0);
    const char* val = tokens_of("o_val.bin");
    CHECK(val[1] == '\xe4' && strlen(val) == 1 + 398);
    remove_files("*");
}

// Of the short documents every tenth goes to validation, of the long ones each gives its end.
static void test_fraction_of_documents(void) {
    char text[40000];
    size_t used = 0;
    for (int i = 1; i <= 40; i++) {
        used += (size_t)sprintf(text + used, "document %d\n\n", i);
        if (i % 20 == 0) { // a long one
            for (int line = 0; line < 300; line++) { used += (size_t)sprintf(text + used, "long %d\n", i); }
            text[used++] = '\n';
        }
    }
    CHECK(run(WORDS("--separator", "blank-line", write_text("a.txt", text, used))) == 0);
    const char* val = tokens_of("o_val.bin");
    const char* const wanted[] = {"#document 10\n", "#document 20\n", "#long 20\n",
                                  "#document 30\n", "#document 40\n", "#long 40\n"};
    int documents = 0;
    for (const char* p = val; *p != '\0'; p++) { documents += *p == '#'; }
    CHECK(documents == 6);
    for (int i = 0; i < 6; i++) { CHECK(strstr(val, wanted[i]) != NULL); }
    remove_files("*");
}

static void test_shards(void) {
    const char* a = write_text("a.txt", "0123456789", 10);
    const char* b = write_text("b.txt", "abcde", 5);
    const char* c = write_text("c.txt", "xyz", 3);
    CHECK(run(WORDS("--shard-tokens", "4", "--val-every", "2", a, b, c)) == 0); // train 15 tokens, val 6
    CHECK_STR(tokens_of("o_train_000000.bin"), "#012");
    CHECK_STR(tokens_of("o_train_000001.bin"), "3456");
    CHECK_STR(tokens_of("o_train_000002.bin"), "789#");
    CHECK_STR(tokens_of("o_train_000003.bin"), "xyz");
    CHECK_STR(tokens_of("o_val_000000.bin"), "#abc");
    CHECK_STR(tokens_of("o_val_000001.bin"), "de");
    CHECK(!path_exists("o_train_000004.bin") && !path_exists("o_val_000002.bin") && !path_exists("o_train.bin"));
    // The same number of shards is replaced; fewer, or one file in their place, would leave old ones behind.
    CHECK(run(WORDS("--shard-tokens", "4", "--val-every", "2", a, b, c)) == 0);
    CHECK_DIES(run(WORDS("--shard-tokens", "5", "--val-every", "2", a, b, c)), "o_train_000003.bin' is left");
    CHECK_DIES(run(WORDS("--val-every", "2", a, b, c)), "o_train_000000.bin' is left from an earlier run");
    CHECK_STR(tokens_of("o_train_000000.bin"), "#012");
    remove_files("o_*");
    CHECK(run(WORDS("--val-every", "2", a, b, c)) == 0);
    CHECK_DIES(run(WORDS("--val-fraction", "0", a, b, c)), "o_val.bin' is left from an earlier run");
    CHECK_DIES(run(WORDS("--shard-tokens", "1K", "--val-every", "2", a, b, c)), "o_train.bin' is left");
    remove_files("o_*");
    CHECK(run(WORDS("--val-fraction", "0", "--shard-tokens", "7", a, b)) == 0); // 17 tokens
    CHECK_STR(tokens_of("o_train_000002.bin"), "cde");
    CHECK(!path_exists("o_val_000000.bin") && path_exists("o_tokenizer.bin"));
    remove_files("*");
}

// ---------------------------------------------------------------------------------------------------------------------
// What goes wrong

static void test_bad_options(void) {
    const char* a = write_text("a.txt", "text", 4);
    CHECK_DIES(run(WORDS("--frob", "1", a)), "unknown option '--frob'");
    CHECK_DIES(run(WORDS(a, "--val-every")), "--val-every: a value is missing");
    CHECK_DIES(run(WORDS("--val-every", "1", a)), "--val-every: expected a whole number from 2");
    CHECK_DIES(run(WORDS("--val-every", "2.5", a)), "found '2.5'");
    CHECK_DIES(run(WORDS("--val-fraction", "1", a)),
               "--val-fraction: expected a number from 0 to less than 1, found '1'");
    CHECK_DIES(run(WORDS("--val-fraction", "10%", a)), "found '10%'");
    CHECK_DIES(run(WORDS("--val-fraction", "0.1", "--val-every", "2", a)), "exclude each other");
    CHECK_DIES(run(WORDS("--separator", "tab", a)), "--separator: expected file or blank-line, found 'tab'");
    CHECK_DIES(run(WORDS("--shard-tokens", "3B", a)), "--shard-tokens: expected a whole number from 2 to 2147483647");
    CHECK_DIES(run(WORDS("--files-from", "none")), "--files-from: cannot open");
    CHECK_DIES(run((const char* const[]){NULL}), "no input");
    char* argv[] = {(char*)"text_to_tokens", (char*)a};
    CHECK_DIES(text_to_tokens_main(2, argv), "--out PREFIX is missing");
    CHECK(run(WORDS("--help")) == 0);
    CHECK(!path_exists("o_train.bin") && !path_exists("o_tokenizer.bin"));
    remove_files("*");
}

static void test_bad_input(void) {
    const char* a = write_text("a.txt", "text", 4);
    const char* empty = write_text("empty.txt", "", 0);
    CHECK_DIES(run(WORDS(a, "none.txt")), "none.txt': No such file");
    CHECK_DIES(run(WORDS(a, ".")), "is not a regular file");
    CHECK_DIES(run(WORDS(empty, empty)), "the 2 input files hold no text");
    CHECK_DIES(run(WORDS(a)), "--val-fraction 0.1 leaves validation empty: 1 documents with 4 bytes");
    CHECK_DIES(run(WORDS("--val-every", "3", a, a)),
               "--val-every 3 leaves validation empty: there are only 2 documents");
    CHECK(!path_exists("o_train.bin") && !path_exists("o_train.bin.tmp"));
    remove_files("*");
}

// Every system call that writes fails once: the message is one line, and the files of the run before are as they were.
static void test_failed_writes(void) {
    const char* a = write_text("a.txt", "old", 3);
    const char* b = write_text("b.txt", "new", 3);
    CHECK(run(WORDS("--val-every", "2", a, a)) == 0);
    int faults = 0;
    for (bool failed = true; failed; faults++) {
        pid_t pid = fork();
        if (pid == 0) {
            calls_until_fault = faults + 1;
            if (freopen("/dev/null", "w", stderr) == NULL) { _exit(98); }
            _exit(run(WORDS("--val-every", "2", b, b)));
        }
        int status;
        waitpid(pid, &status, 0);
        failed = WEXITSTATUS(status) != 0;
        CHECK(WIFEXITED(status) && (!failed || WEXITSTATUS(status) == 2));
        CHECK(!path_exists("o_train.bin.tmp") && !path_exists("o_val.bin.tmp") && !path_exists("o_tokenizer.bin.tmp"));
        // old or new, never anything else
        CHECK(strcmp(tokens_of("o_val.bin"), "#old") == 0 || strcmp(tokens_of("o_val.bin"), "#new") == 0);
        CHECK(strcmp(tokens_of("o_train.bin"), "#old") == 0 || strcmp(tokens_of("o_train.bin"), "#new") == 0);
        if (faults == 0) { // the very first call
            CHECK_STR(tokens_of("o_train.bin"), "#old");
            calls_until_fault = 1;
            CHECK_DIES(run(WORDS("--val-every", "2", b, b)), "cannot create");
            calls_until_fault = 0;
        }
    }
    CHECK(faults > 15); // the last round had no fault left to meet
    CHECK_STR(tokens_of("o_train.bin"), "#new");
    remove_files("*");
}

int main(void) {
    char folder[TEMP_PATH_SIZE];
    if (chdir(tempdir_make(folder)) != 0) { // all files of the tests lie there
        fatal("cannot enter the folder '%s': %s", folder, strerror(errno));
    }
    RUN(test_every_nth_document);
    RUN(test_blank_lines);
    RUN(test_files_from);
    RUN(test_end_of_long_document);
    RUN(test_end_of_long_line);
    RUN(test_fraction_of_documents);
    RUN(test_shards);
    RUN(test_bad_options);
    RUN(test_bad_input);
    RUN(test_failed_writes);
    tempdir_remove(folder);
    return test_summary();
}
