/*
Tests of the training loop (llmc/train.h and what only it uses: plan.h, dryrun.h, evaluate.h, runstate.h): whole runs of
train_main() with the toy backend, each in a child process, on a token file that the test makes.
*/
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

// Failure injection: of the renames that this process does, so many fail after so many others.
static int passing_renames = 0, failing_renames = 0;
static int io_fault_of_test(const char* op);
#define IO_FAULT(op) io_fault_of_test(op)

#include "llmc/train.h"
#include "dev/test/test.h"
#include "dev/test/toy.h"

static int io_fault_of_test(const char* op) {
    return strcmp(op, "rename") == 0 && passing_renames-- <= 0 && failing_renames-- > 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// A folder to work in, and runs

static char folder[256]; // a temporary one, removed at the end

static const char* in_folder(const char* name) {
    static char paths[8][512];
    static int next = 0;
    char* path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void make_tokens(const char* name, int count, int vocab_size) {
    int32_t header[TOKEN_FILE_HEADER] = {TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION, count, vocab_size};
    uint64_t rng = (uint64_t)count;
    FILE* f = fopen(in_folder(name), "wb");
    fwrite(header, sizeof header, 1, f);
    for (int i = 0; i < count; i++) {
        uint16_t token = (uint16_t)(splitmix64(&rng) % 16);
        fwrite(&token, sizeof token, 1, f);
    }
    fclose(f);
}

static void make_tokenizer(const char* name) {
    char bytes[257];
    const char* tokens[257];
    int lengths[257];
    for (int i = 0; i < 257; i++) {
        bytes[i] = (char)i;
        tokens[i] = i < 256 ? &bytes[i] : "<|endoftext|>";
        lengths[i] = i < 256 ? 1 : 13;
    }
    OutFile f;
    char error[PATH_SIZE + 256];
    out_open(&f, in_folder(name), error, sizeof error);
    tokenizer_write(&f, 257, 256, tokens, lengths);
    CHECK(out_close(&f));
}

// Starts a run in a child process, in the temporary folder; its output goes into the pipe, or, without one, to the files stdout
// and stderr there.
static pid_t start_piped_run(BackendOpen open, const char* line, const int* pipe_ends) {
    fflush(stdout);
    remove(in_folder("stdout"));
    remove(in_folder("stderr"));
    pid_t pid = fork();
    if (pid == 0) {
        char* argv[64];
        int argc = 0;
        char* copy = copy_string(line);
        argv[argc++] = copy_string("train");
        for (char* word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) { argv[argc++] = word; }
        if (chdir(folder) != 0) { _exit(98); }
        if (pipe_ends != NULL) {
            close(pipe_ends[0]);
            if (dup2(pipe_ends[1], STDOUT_FILENO) < 0 || dup2(pipe_ends[1], STDERR_FILENO) < 0) { _exit(98); }
            close(pipe_ends[1]);
        } else if (freopen("stdout", "w", stdout) == NULL || freopen("stderr", "w", stderr) == NULL) {
            _exit(98);
        }
        int status = train_main(argc, argv, open);
        free(argv[0]);
        free(copy);
        exit(status);
    }
    return pid;
}

static pid_t start_run(BackendOpen open, const char* line) { return start_piped_run(open, line, NULL); }

// A child's exit status, or 128 + the signal that ended it.
static int exit_status(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

static int end_run(pid_t pid) {
    int status = 0;
    waitpid(pid, &status, 0);
    return exit_status(status);
}

static int run_with(BackendOpen open, const char* line) { return end_run(start_run(open, line)); }
static int run(const char* line) { return run_with(toy_open, line); }

// Does the file in the temporary folder contain the text?
static bool contains(const char* name, const char* text) {
    size_t len;
    char* content = read_whole_file(in_folder(name), &len);
    bool found = content != NULL && strstr(content, text) != NULL;
    free(content);
    return found;
}

// It should, and if not, this says what it does contain.
static bool said(const char* name, const char* text) {
    if (contains(name, text)) { return true; }
    size_t len;
    char* content = read_whole_file(in_folder(name), &len);
    printf("  '%s' is not in %s: %s\n", text, name, content ? content : "(no such file)");
    free(content);
    return false;
}

// The run must end with status 2 and one line on stderr that contains the text, and leave no folder `out`.
static bool refused(const char* line, const char* text) {
    int status = run(line);
    size_t len;
    char* error = read_whole_file(in_folder("stderr"), &len);
    bool one_line = error != NULL && len > 0 && strchr(error, '\n') == error + len - 1;
    free(error);
    return status == 2 && one_line && said("stderr", text);
}

// Waits until the run that writes the file has said the text; false after a minute.
static bool wait_for(const char* name, const char* text) {
    for (int i = 0; i < 60000; i++) {
        if (contains(name, text)) { return true; }
        usleep(1000);
    }
    return said(name, text);
}

static void remove_tree(const char* path) {
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) { printf("  cannot remove %s\n", path); }
}

// The options of a small run: the toy's shape, 8 tokens a sequence.
#define TOY "-i train.bin -j val.bin -e L=1,H=1,C=4,T=8,V=16 "

// ---------------------------------------------------------------------------------------------------------------------
// Reading log.csv

typedef struct {
    char* text;
    int rows, columns;
    char** cell; // (rows + 1, columns), the header first
} Csv;

static Csv read_log(const char* out) {
    char name[128];
    size_t len = 0;
    Csv c = {NULL, -1, 1, NULL};
    snprintf(name, sizeof name, "%s/log.csv", out);
    c.text = read_whole_file(in_folder(name), &len);
    if (c.text == NULL) {
        c.text = copy_string("\n");
        len = 1;
    }
    for (size_t i = 0; c.text[i] != '\n'; i++) { c.columns += c.text[i] == ','; }
    for (size_t i = 0; i < len; i++) { c.rows += c.text[i] == '\n'; }
    c.cell = (char**)alloc_zeroed((size_t)(c.rows + 1) * (size_t)c.columns, sizeof(char*), "cells");
    char* p = c.text;
    for (int i = 0; i < (c.rows + 1) * c.columns; i++) {
        c.cell[i] = p;
        p += strcspn(p, ",\n");
        *p++ = '\0';
    }
    return c;
}

static void free_log(Csv* c) {
    free(c->text);
    free(c->cell);
}

static const char* text_at(const Csv* c, int row, const char* column) {
    for (int i = 0; i < c->columns; i++) {
        if (strcmp(c->cell[i], column) == 0) { return c->cell[(row + 1) * c->columns + i]; }
    }
    return "no such column";
}

static double number_at(const Csv* c, int row, const char* column) {
    const char* text = text_at(c, row, column);
    char* end;
    double x = strtod(text, &end);
    return end == text ? NAN : x;
}

// Are two logs the same in every column but those that measure time (and `ignore`)?
static bool same_logs(const char* a, const char* b, const char* ignore) {
    Csv x = read_log(a), y = read_log(b);
    bool same = x.rows == y.rows && x.columns == y.columns && x.rows > 0;
    if (!same) { printf("  %s has %d rows of %d, %s %d of %d\n", a, x.rows, x.columns, b, y.rows, y.columns); }
    for (int i = 0; same && i < (x.rows + 1) * x.columns; i++) {
        const char* column = x.cell[i % x.columns];
        bool skip = i >= x.columns && (!strcmp(column, "dt") || !strcmp(column, "tokens_per_sec") ||
                                       !strcmp(column, "mfu") || !strcmp(column, ignore));
        if (!skip && strcmp(x.cell[i], y.cell[i]) != 0) {
            printf("  row %d, %s: '%s' and '%s'\n", i / x.columns, column, x.cell[i], y.cell[i]);
            same = false;
        }
    }
    free_log(&x);
    free_log(&y);
    return same;
}

static bool same_file(const char* a, const char* b) {
    size_t n = 0, m = 0;
    char *x = read_whole_file(in_folder(a), &n), *y = read_whole_file(in_folder(b), &m);
    bool same = x != NULL && y != NULL && n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

// ---------------------------------------------------------------------------------------------------------------------
// The log and the intervals

static void test_log(void) {
    CHECK(run(TOY "-b 3 -d 80 -x 40 -v 10 -u 16 --gns all --log-tensors all -o log") == 0);
    Csv c = read_log("log");
    CHECK(c.rows == 40);
    for (int i = 0; i < c.rows; i++) {
        CHECK(number_at(&c, i, "step") == i && number_at(&c, i, "iter_num") == i);
        CHECK(number_at(&c, i, "tokens_processed") == 80 * (i + 1));
        CHECK(number_at(&c, i, "batch") == 10 && number_at(&c, i, "batch_target") == 10);
        CHECK(number_at(&c, i, "gradient_accumulation_steps") == 4);
        CHECK(number_at(&c, i, "skipped") == 0);
        bool evaluated = (i + 1) % 10 == 0;
        CHECK(isnan(number_at(&c, i, "val/loss")) == !evaluated);
        CHECK(isnan(number_at(&c, i, "train/loss")) == !evaluated);
        CHECK(number_at(&c, i, "dt") > 0 && number_at(&c, i, "tokens_per_sec") > 0);
        CHECK_CLOSE(number_at(&c, i, "lr"), i < 16 ? 3e-4 * i / 16 : 3e-4, 1e-12);
        // the toy's loss is known: 1 + 4/(1 + steps/50), the mean of 10 examples' noise, and a little of the weights
        CHECK_CLOSE(number_at(&c, i, "train/lossf"), 1 + 4 / (1 + i / 50.0), 0.03);
        // the group's column from the raw columns of its tensors
        static const char* const tensors[] = {"h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.ln_2.weight",
                                              "h.0.ln_2.bias",   "ln_f.weight",   "ln_f.bias"};
        double m = 0, n2 = 0, n = 10;
        for (int k = 0; k < 6; k++) {
            char name[128];
            snprintf(name, sizeof name, "train/gns/transformer.%s/pegn", tensors[k]);
            m += pow(number_at(&c, i, name), 2);
            snprintf(name, sizeof name, "train/gns/transformer.%s/norm", tensors[k]);
            n2 += pow(number_at(&c, i, name), 2);
            snprintf(name, sizeof name, "train/gns/transformer.%s/batch_size", tensors[k]);
            CHECK(number_at(&c, i, name) == n);
        }
        CHECK_CLOSE(number_at(&c, i, "gns/ln/gtg"), (n * n2 - m) / (n - 1), 1e-8);
        CHECK_CLOSE(number_at(&c, i, "gns/ln/trsigma"), (m - n2) / (1 - 1 / n), 1e-8);
        CHECK_CLOSE(number_at(&c, i, "gns/ln/gtg") + number_at(&c, i, "gns/ln/trsigma"), m, 1e-8);
    }
    // the truth is 8 for every group, and the tracker's own error bar (tau is under one step) is honest
    CHECK(fabs(number_at(&c, 39, "gns/total") - 8) < 5 * number_at(&c, 39, "gns/total/se"));
    CHECK(said("stdout", "eval at 0 tokens | val loss 5.0"));
    CHECK(said("stdout", "348 parameters"));
    CHECK(said("stdout", "100 of 100 sequences are evaluated"));
    CHECK(said("log/config.json", "\"max-tokens\": 3200,"));
    CHECK(said("log/config.json", "\"warmup\": 1280,"));
    CHECK(said("log/config.json", "\"gns\": \"all\","));
    CHECK(said("log/config.json", "\"device\": \"toy\","));
    free_log(&c);
}

static void test_log_every_and_gns_levels(void) {
    CHECK(run(TOY "-b 4 -d 64 -x 20 -v 7 --log-every 5 --gns-all-every 5 -o thin") == 0);
    Csv c = read_log("thin");
    // steps 0, 5, 10, 15; evaluations after steps 6, 13; the last step
    static const int steps[] = {0, 5, 6, 10, 13, 15, 19};
    CHECK(c.rows == 7);
    for (int i = 0; i < 7 && i < c.rows; i++) {
        CHECK(number_at(&c, i, "step") == steps[i]);
        CHECK(isnan(number_at(&c, i, "gns/total/gtg")) == (steps[i] % 5 != 0));
        CHECK(!isnan(number_at(&c, i, "gns/ln/gtg")));
        CHECK(isnan(number_at(&c, i, "val/loss")) == !(steps[i] == 6 || steps[i] == 13 || steps[i] == 19));
    }
    free_log(&c);
    CHECK(run(TOY "-d 64 -x 5 --gns off -o off") == 0);
    c = read_log("off");
    CHECK(c.rows == 5 && isnan(number_at(&c, 4, "gns/ln/gtg")) && isnan(number_at(&c, 4, "gns/ln")));
    free_log(&c);
    CHECK(run(TOY "-t 8 -d 8 -x 5 -o one") == 0); // one example in a step: no noise scale, and no complaint
    c = read_log("one");
    CHECK(c.rows == 5 && number_at(&c, 4, "batch") == 1 && isnan(number_at(&c, 4, "gns/ln")));
    free_log(&c);
}

static Interval tokens_interval(double count) {
    Interval every = {count, UNIT_TOKENS};
    return every;
}

static void test_interval_crossed(void) {
    static const struct {
        double every;
        int64_t before, now;
        bool crossed;
    } cases[] = {
        {100, 0, 99, false},   {100, 0, 100, true},
        {100, 99, 100, true},  {100, 100, 199, false},
        {100, 100, 250, true}, {100, 150, 1000, true},
        {0, 0, 1000, false},   {0.5, 0, 1, true},
        {1e9, 0, 1000, false}, {1e9, 999999999, 1000000000, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK(interval_crossed(tokens_interval(cases[i].every), cases[i].before, cases[i].now) == cases[i].crossed);
    }
    // however the way is divided into steps, every multiple is noticed exactly once
    for (int64_t step = 1; step < 300; step += 7) {
        int64_t fired = 0, wanted = 0;
        for (int64_t now = step; now <= 10000; now += step) {
            fired += interval_crossed(tokens_interval(300), now - step, now);
            wanted = now / 300;
        }
        CHECK(fired == wanted);
    }
}

// The schedule and the data are independent of the micro-batch: every number but the count of micro-batches is the same.
static void test_micro_batch_independence(void) {
    const char* rest = "-d 128 --max-tokens 20K --batch-schedule linear:3:16 --val-tokens 300 -v 1K --gns all "
                       "--log-tensors all -n 5K";
    char line[512];
    static const int sizes[] = {1, 3, 16};
    for (int i = 0; i < 3; i++) {
        snprintf(line, sizeof line, TOY "%s -b %d -o micro%d", rest, sizes[i], sizes[i]);
        CHECK(run(line) == 0);
    }
    CHECK(same_logs("micro1", "micro3", "gradient_accumulation_steps"));
    CHECK(same_logs("micro1", "micro16", "gradient_accumulation_steps"));
    Csv a = read_log("micro1"), b = read_log("micro16");
    CHECK(number_at(&a, 0, "gradient_accumulation_steps") == 3 && number_at(&b, 0, "gradient_accumulation_steps") == 1);
    CHECK(number_at(&a, a.rows - 1, "batch") == 16 && number_at(&a, 0, "batch") == 3);
    free_log(&a);
    free_log(&b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Ranks

typedef struct {
    int first_tokens[64]; // of each sequence seen, a number made of its tokens
    int count, largest;
} Seen;

static void see_micro(void* self, const int* tokens, const int* targets, int B, int T) {
    Seen* seen = (Seen*)self;
    (void)targets;
    seen->largest = max_int(seen->largest, B);
    for (int b = 0; b < B; b++) {
        int number = 0;
        for (int t = 0; t < T; t++) { number = number * 7 + tokens[b * T + t]; }
        seen->first_tokens[seen->count++] = number;
    }
}

// The shares of all ranks, one after the other, are the sequences of the step in their order.
static void test_shares_of_ranks(void) {
    Trainer* t = (Trainer*)alloc_zeroed(1, sizeof(Trainer), "a trainer");
    int tokens[3 * 8], targets[3 * 8];
    t->plan.T = 8;
    t->plan.config = toy_config();
    t->options.micro_batch = 3;
    t->tokens = tokens;
    t->targets = targets;
    t->state.sequences = 490; // the epoch ends after 500
    t->backend.micro = see_micro;
    dataloader_open(&t->train, in_folder("train.bin"), 8, 42, true);
    for (int n = 1; n <= 20; n++) {
        Seen whole, parts;
        memset(&whole, 0, sizeof whole);
        t->backend.self = &whole;
        t->backend.rank = 0;
        t->backend.num_ranks = 1;
        CHECK(run_micro_batches(t, n) == (n + 2) / 3);
        CHECK(whole.count == n && whole.largest <= 3);
        for (int ranks = 2; ranks <= 8; ranks++) {
            memset(&parts, 0, sizeof parts);
            t->backend.self = &parts;
            t->backend.num_ranks = ranks;
            for (t->backend.rank = 0; t->backend.rank < ranks; t->backend.rank++) {
                int before = parts.count, micro = run_micro_batches(t, n);
                CHECK((parts.count == before) == (micro == 0)); // a share may be empty
            }
            CHECK(parts.count == n && memcmp(whole.first_tokens, parts.first_tokens, sizeof(int) * (size_t)n) == 0);
        }
    }
    dataloader_close(&t->train);
    free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Resuming

static void spiky_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    ((Toy*)backend->self)->spike_first = 300;
    ((Toy*)backend->self)->spike_last = 302;
}

static void slow_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    usleep(300);
    toy_step_end(self, hyper, stats);
}

static void slow_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    spiky_open(backend, config, options);
    backend->step_end = slow_step_end;
}

// Everything that has a state takes part: the closed loop with a measured calibration, the couplings, outliers.
#define LONG_RUN                                                                                                       \
    TOY "-b 4 -d 128 --max-tokens 14K --batch-schedule gns --gns-all-every 3 --gns-calibration measured --gns-tau 1K " \
        "-sg 8 -v 700tokens -n 400tokens --lr-coupling 0.5 --beta2-half-life 5K -u 1K -k linear -q 0.1 "

// Killed at random moments and resumed until it is done, a run leaves what the unbroken one leaves, bit for bit.
static void test_resume_after_kill(void) {
    uint64_t rng = 1;
    CHECK(run_with(spiky_open, LONG_RUN "-o unbroken") == 0);
    CHECK(said("stdout", "skipped 0 steps that were not finite and 3 outliers"));
    int status = 128 + SIGKILL, kills = 0;
    for (int attempt = 0; status == 128 + SIGKILL && attempt < 300; attempt++) {
        pid_t pid = start_run(slow_open, LONG_RUN "-o killed -y 1");
        usleep((useconds_t)(splitmix64_uniform(&rng) * 1000 * (20 + 4 * attempt)));
        kill(pid, SIGKILL);
        status = end_run(pid);
        kills += status == 128 + SIGKILL;
    }
    CHECK(status == 0);
    CHECK(kills >= 3);
    CHECK(same_logs("unbroken", "killed", ""));
    Csv c = read_log("unbroken");
    char a[128], b[128];
    snprintf(a, sizeof a, "unbroken/checkpoints/step_%08d", c.rows);
    snprintf(b, sizeof b, "killed/checkpoints/step_%08d", c.rows);
    free_log(&c);
    static const char* const files[] = {"model.bin", "optimizer.bin", "state.txt", "backend.bin"};
    for (int i = 0; i < 4; i++) {
        char x[160], y[160];
        snprintf(x, sizeof x, "%s/%s", a, files[i]);
        snprintf(y, sizeof y, "%s/%s", b, files[i]);
        CHECK(same_file(x, y));
    }
    // and once it is done, resuming changes nothing
    CHECK(run_with(spiky_open, LONG_RUN "-o killed -y 1") == 0);
    CHECK(same_logs("unbroken", "killed", ""));
    CHECK(said("stdout", "finished:"));
}

// A run goes on under another schedule: the closed loop takes over from a fixed batch within its own bounds.
static void test_resume_into_closed_loop(void) {
    CHECK(run_with(spiky_open, TOY "-d 64 -x 20 -v 0 -o taken") == 0);
    CHECK(run_with(spiky_open,
                   TOY "-d 64 -x 60 -v 0 -o taken -y 1 --batch-schedule gns --batch-min 4 --batch-max 16") == 0);
    Csv c = read_log("taken");
    CHECK(c.rows > 20);
    for (int i = 20; i < c.rows; i++) { CHECK(number_at(&c, i, "batch") >= 4 && number_at(&c, i, "batch") <= 16); }
    free_log(&c);
}

static void test_resume_after_signal(void) {
    CHECK(run_with(spiky_open, LONG_RUN "-o whole") == 0);
    static const int signals[] = {SIGTERM, SIGINT, SIGTERM};
    for (int i = 0; i < 3; i++) { // stops wherever it is, which need not be at an evaluation
        pid_t pid = start_run(slow_open, LONG_RUN "-o stopped -y 1");
        CHECK(wait_for("stdout", "\nstep "));
        usleep(3000);
        kill(pid, signals[i]);
        CHECK(end_run(pid) == 0);
        CHECK(access(in_folder("stopped/checkpoints/latest"), F_OK) == 0);
        CHECK(said("stderr", "stopping after this step"));
    }
    CHECK(run_with(spiky_open, LONG_RUN "-o stopped -y 1") == 0);
    CHECK(same_logs("whole", "stopped", ""));
}

static void very_slow_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    for (int i = 0; i < 100; i++) { usleep(100 * 1000); }
    toy_step_end(self, hyper, stats);
}

static void very_slow_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->step_end = very_slow_step_end;
}

// That of a run that only a signal can end; -1 if it does not within half a minute, and is killed.
static int end_soon(pid_t pid) {
    int status;
    for (int i = 0; i < 3000; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid) { return exit_status(status); }
        usleep(10 * 1000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return -1;
}

static void test_second_signal(void) {
    pid_t pid = start_run(very_slow_open, TOY "-d 64 -x 100 -o second");
    CHECK(wait_for("stdout", "eval at 0 tokens"));
    kill(pid, SIGTERM);
    kill(pid, SIGINT); // at once, as timeout's second one: does not count
    CHECK(wait_for("stderr", "stopping after this step"));
    usleep(700 * 1000);
    kill(pid, SIGHUP); // a terminal that goes away never ends it
    usleep(100 * 1000);
    CHECK(waitpid(pid, NULL, WNOHANG) == 0); // it is still at its step
    kill(pid, SIGINT);
    CHECK(end_soon(pid) == 128 + SIGINT);
}

#define ENDLESS TOY "-b 4 -d 64 -x 100000000 -v 0 "

static void slow_second_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    for (int i = 0; i < 20; i++) { usleep(100 * 1000); }
    toy_step_end(self, hyper, stats);
}

static void slow_second_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->step_end = slow_second_step_end;
}

// As under `| tee`, which Ctrl-C ends as well: nobody reads the output any more. The run stops, also by that alone, and saves its
// checkpoint, also when a long step lies between the two.
static void test_reader_goes_away(void) {
    for (int with_signal = 0; with_signal < 2; with_signal++) {
        int ends[2];
        char c;
        CHECK(pipe(ends) == 0);
        pid_t pid = start_piped_run(with_signal ? slow_second_open : slow_open, ENDLESS "-o piped", ends);
        close(ends[1]);
        CHECK(read(ends[0], &c, 1) == 1 && wait_for("piped/config.json", "seed"));
        if (with_signal) {
            usleep(300 * 1000); // into the first step
            kill(pid, SIGINT);
            usleep(700 * 1000);
        }
        close(ends[0]);
        CHECK(end_soon(pid) == 0);
        CHECK(access(in_folder("piped/checkpoints/latest"), F_OK) == 0);
        remove_tree(in_folder("piped"));
    }
}

static void test_hang_up(void) {
    for (int ignored = 0; ignored < 2; ignored++) { // as by nohup
        signal(SIGHUP, ignored ? SIG_IGN : SIG_DFL);
        pid_t pid = start_run(slow_open, ENDLESS "-o hung");
        CHECK(wait_for("stdout", "\nstep "));
        kill(pid, SIGHUP);
        if (ignored) {
            usleep(200 * 1000);
            CHECK(waitpid(pid, NULL, WNOHANG) == 0); // it goes on
            kill(pid, SIGTERM);
        }
        CHECK(end_soon(pid) == 0 && access(in_folder("hung/checkpoints/latest"), F_OK) == 0);
        remove_tree(in_folder("hung"));
    }
    signal(SIGHUP, SIG_DFL);
}

// Data that is overwritten in place while a run reads it.
static void test_data_cut_short(void) {
    make_tokens("cut.bin", 4001, 16);
    CHECK(run(ENDLESS "-i cut.bin -o cut -x 5") == 0);
    pid_t pid = start_run(slow_open, ENDLESS "-i cut.bin -o cut -y 1");
    CHECK(wait_for("stdout", "\nstep "));
    CHECK(truncate(in_folder("cut.bin"), 0) == 0);
    CHECK(end_soon(pid) == 2 && said("stderr", "error: a token file can no longer be read"));
    make_tokens("cut.bin", 4001, 16);
    CHECK(run(ENDLESS "-i cut.bin -o cut -x 9 -y 1") == 0);
}

static void test_resume_must_fit(void) {
    CHECK(run(TOY "-d 64 -x 5 -o fit") == 0);
    make_tokens("other.bin", 2001, 16);
    CHECK(refused(TOY "-d 64 -x 10 -o fit -y 1 --seed 7", "has --seed 42, this command has 7"));
    CHECK(refused(TOY "-d 64 -x 10 -o fit -y 1 -t 4", "has --seq-len (-t) 8, this command has 4"));
    CHECK(refused(TOY "-d 64 -x 10 -o fit -y 1 -i other.bin", "training data (-i) whose size in tokens is 4001"));
    CHECK(refused(TOY "-d 64 -x 10 -o fit -y 1 -e L=2,H=1,C=4,T=8,V=16", "does not fit the model"));
    CHECK(run(TOY "-d 64 -x 10 -b 2 -o fit -y 1") == 0);
    Csv c = read_log("fit");
    CHECK(c.rows == 10 && number_at(&c, 9, "tokens_processed") == 640);
    free_log(&c);
}

// Two processes never write to the same folder, be it new or not; a lock does not outlive its process, however that ends.
static void test_output_is_locked(void) {
    pid_t pid = start_run(very_slow_open, TOY "-d 64 -x 100 -o locked");
    CHECK(wait_for("stdout", "eval at 0 tokens"));
    size_t len;
    char* log = read_whole_file(in_folder("locked/log.csv"), &len);
    CHECK(refused(TOY "-d 64 -x 3 -o locked -y 1", "another process is training in 'locked'"));
    CHECK(refused(TOY "-d 64 -x 3 -o locked", "already holds a run"));
    char* again = read_whole_file(in_folder("locked/log.csv"), &len);
    CHECK_STR(again, log);
    free(log);
    free(again);
    kill(pid, SIGKILL);
    CHECK(end_run(pid) == 128 + SIGKILL);
    CHECK(run(TOY "-d 64 -x 3 -o locked -y 1") == 0);
    CHECK(run(TOY "-d 64 -x 3 -o locked --eval-only -y 1") == 0);
    int fd = -1, other = -1;
    CHECK(folder_lock(in_folder("not there"), &fd) && fd == -1);
    CHECK(folder_lock(in_folder("locked"), &fd) && fd >= 0);
    CHECK(folder_lock(in_folder("locked"), &fd)); // it is ours
    CHECK(!folder_lock(in_folder("locked"), &other) && other == -1);
    CHECK(refused(TOY "-d 64 -x 9 -o locked -y 1", "another process is training in 'locked'"));
    CHECK(!contains("stdout", "resuming")); // nothing was read before it was known whose the folder is
    CHECK(run(TOY "-d 64 -x 3 -o locked --eval-only -y 1") == 0); // only reads
    close(fd);
    CHECK(folder_lock(in_folder("locked"), &other) && other >= 0);
    close(other);
}

// While it is given its weights, another run begins and ends in the folder `raced`.
static void raced_set(void* self, int row, int layer, int what, const float* values) {
    toy_set(self, row, layer, what, values);
    if (mkdir("raced", 0777) != 0) { return; } // it has been here
    FILE* log = fopen("raced/log.csv", "w");
    CHECK(log != NULL && fclose(log) == 0);
}

static void raced_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->set = raced_set;
}

static void test_output_is_protected_late(void) {
    static const char* const lines[] = {TOY "-d 64 -x 3 -o raced", TOY "-d 64 -x 3 -o raced -y 1"};
    for (int i = 0; i < 2; i++) {
        CHECK(run_with(raced_open, lines[i]) == 2);
        CHECK(said("stderr", "'raced' already holds a run (log.csv)"));
        remove_tree(in_folder("raced"));
    }
}

static void test_output_is_protected(void) {
    CHECK(run(TOY "-d 64 -x 3 -o safe -y 1") == 0);
    CHECK(said("stdout", "there is no checkpoint in safe yet: starting from the beginning"));
    CHECK(refused(TOY "-d 64 -x 3 -o safe", "'safe' already holds a run (log.csv); -y 1 goes on with it"));
    CHECK(refused(TOY "-d 64 -x 3 -o train.bin", "--out (-o): 'train.bin' is not a folder; choose another"));
    CHECK(refused(TOY "-d 64 -x 3 -o train.bin/a/b", "cannot use the folder 'train.bin/a/b'"));
    CHECK(symlink("nowhere", in_folder("link")) == 0);
    CHECK(refused(TOY "-d 64 -x 3 -o link", "cannot use the folder 'link'"));
    CHECK(run(TOY "-d 64 -x 3 -o in/new/folders") == 0 && run(TOY "-d 64 -x 3 -o in/others/") == 0);
    CHECK(contains("in/new/folders/log.csv", "\n2,") && contains("in/others/log.csv", "\n2,"));
    CHECK(run(TOY "-d 64 -x 3") == 0); // without --out nothing is written, and nothing is said of a checkpoint
    size_t len;
    char* text = read_whole_file(in_folder("stdout"), &len);
    CHECK(strstr(text, "checkpoint") == NULL && strstr(text, "finished: 3 steps") != NULL);
    free(text);
}

// A disk that fills up between log.csv and config.json.
static void test_output_is_whole(void) {
    passing_renames = failing_renames = 1;
    CHECK(refused(TOY "-d 64 -x 3 -o full", "config.json"));
    passing_renames = failing_renames = 0;
    CHECK(access(in_folder("full/log.csv"), F_OK) != 0 && run(TOY "-d 64 -x 3 -o full") == 0);
    size_t len;
    char* before = read_whole_file(in_folder("full/config.json"), &len);
    CHECK(run(TOY "-d 64 -x 2 -o full -y 1") == 0); // its budget is used up: nothing to do, and nothing is changed
    CHECK(contains("full/config.json", before));
    free(before);
}

// Makes checkpoints fail: config.json and log.csv are there when the backend's first step begins.
static void fail_renames_step_begin(void* self, int gns) {
    const int64_t step = ((Toy*)self)->step;
    failing_renames = step == 0 ? 1 : failing_renames;
    toy_step_begin(self, gns);
}

static void fail_once_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->step_begin = fail_renames_step_begin;
}

static void always_fail_step_begin(void* self, int gns) {
    failing_renames = 1000;
    toy_step_begin(self, gns);
}

static void fail_always_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->step_begin = always_fail_step_begin;
}

static void test_failing_checkpoints(void) {
    // one that fails on the way is said and training goes on
    CHECK(run_with(fail_once_open, TOY "-d 64 -x 4 -n 2 -o lossy") == 0);
    CHECK(said("stderr", "warning: the checkpoint at step 2 could not be saved"));
    CHECK(said("stdout", "checkpoint at step 4"));
    CHECK(access(in_folder("lossy/checkpoints/step_00000002"), F_OK) != 0);
    CHECK(access(in_folder("lossy/checkpoints/step_00000004/model.bin"), F_OK) == 0);
    // if the last one fails, the exit status says so
    CHECK(run_with(fail_always_open, TOY "-d 64 -x 4 -n 2 -o lossier") == 1);
    CHECK(said("stderr", "warning: the checkpoint at step 4 could not be saved"));
    Csv c = read_log("lossier");
    CHECK(c.rows == 4);
    free_log(&c);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bad steps

static void nan_some_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    ((Toy*)backend->self)->nan_first = 6;
    ((Toy*)backend->self)->nan_last = 8;
}

static void nan_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    nan_some_open(backend, config, options);
    ((Toy*)backend->self)->nan_last = 1000000;
}

static void test_nan_steps(void) {
    CHECK(run_with(nan_some_open, TOY "-d 64 -x 20 -o nan -v 0 --gns-tau 1K") == 0);
    CHECK(said("stdout", "SKIPPED: not finite"));
    CHECK(said("stdout", "skipped 3 steps that were not finite and 0 outliers"));
    Csv c = read_log("nan");
    CHECK(c.rows == 20);
    for (int i = 0; i < c.rows; i++) {
        bool bad = i >= 5 && i <= 7;
        CHECK(number_at(&c, i, "skipped") == (bad ? STEP_SKIPPED_NONFINITE : 0));
        CHECK((strcmp(text_at(&c, i, "train/lossf"), "nan") == 0) == bad);
        CHECK(i < 2 || isfinite(number_at(&c, i, "gns/ln"))); // the tracker is not poisoned
    }
    // the toy's loss falls with the steps applied: three fewer
    CHECK_CLOSE(number_at(&c, 19, "train/lossf"), 1 + 4 / (1 + 16 / 50.0), 0.03);
    free_log(&c);
}

static void test_too_many_bad_steps(void) {
    CHECK(run_with(nan_open, TOY "-d 64 -x 50 -n 3 -o lost --max-bad-steps 4") == 1);
    CHECK(said("stderr", "error: 4 steps in a row were skipped (--max-bad-steps)"));
    CHECK(said("stderr", "the last checkpoint before them is lost/checkpoints/step_00000003"));
    Csv c = read_log("lost");
    CHECK(c.rows == 9);
    free_log(&c);
    // no checkpoint is saved during the streak, so a resume starts before it and meets all of it again
    CHECK(run_with(nan_open, TOY "-d 64 -x 50 -n 1 -o streak --max-bad-steps 4") == 1);
    CHECK(said("stderr", "the last checkpoint before them is streak/checkpoints/step_00000005"));
    CHECK(run_with(nan_open, TOY "-d 64 -x 50 -n 1 -o streak --max-bad-steps 4 -y 1") == 1);
    c = read_log("streak");
    CHECK(c.rows == 9);
    free_log(&c);
    CHECK(run_with(nan_open, TOY "-d 64 -x 50 --max-bad-steps 4") == 1);
    CHECK(said("stderr", "no checkpoint was saved"));
}

static void spike_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    ((Toy*)backend->self)->spike_first = ((Toy*)backend->self)->spike_last = 150;
}

static void test_outliers(void) {
    CHECK(run_with(spike_open, TOY "-d 64 -x 160 -sl 8 -v 0 -o spike") == 0);
    CHECK(said("stdout", "SKIPPED: loss outlier"));
    Csv c = read_log("spike");
    for (int i = 0; i < c.rows; i++) { CHECK(number_at(&c, i, "skipped") == (i == 149 ? STEP_SKIPPED_LOSS : 0)); }
    free_log(&c);
    CHECK(run_with(spike_open, TOY "-d 64 -x 160 -sg 8 -v 0") == 0);
    CHECK(said("stdout", "SKIPPED: gradient outlier"));
}

// ---------------------------------------------------------------------------------------------------------------------
// The closed loop

static void test_closed_loop(void) {
    // The toy's noise scale is 8: the batch must rise from 2, stay within its bounds, and end near 8.
    CHECK(run(TOY "-d 128 --max-tokens 200K --batch-schedule gns --batch-min 2 --batch-max 16 -v 0 -o loop") == 0);
    Csv c = read_log("loop");
    int sizes[17] = {0}, different = 0;
    for (int i = 0; i < c.rows; i++) {
        double batch = number_at(&c, i, "batch"), target = number_at(&c, i, "batch_target");
        CHECK(batch >= 2 && batch <= 16 && batch == ceil(target - 1e-9));
        CHECK(i >= 50 || batch == 2);
        if (batch >= 2 && batch <= 16) { different += sizes[(int)batch]++ == 0; }
    }
    CHECK(different >= 4);
    CHECK(number_at(&c, c.rows - 1, "batch") >= 6 && number_at(&c, c.rows - 1, "batch") <= 12);
    free_log(&c);
    // the bounds hold where the noise scale asks for more, and the quantum as well
    CHECK(run(TOY "-d 128 --max-tokens 100K --batch-schedule gns --batch-max 6 --batch-quantum 3 --gns-scale 4 "
                  "-v 0 -o bound") == 0);
    c = read_log("bound");
    CHECK(number_at(&c, 0, "batch") == 3 && number_at(&c, c.rows - 1, "batch") == 6);
    free_log(&c);
}

// ---------------------------------------------------------------------------------------------------------------------
// Dry runs, evaluation, samples

#define PAPER "-e cgpt:111m -t 2048 -b 8 -d 245760 --batch-quantum 8 --max-tokens 2219950080 --dry-run "

static void test_dry_run(void) {
    CHECK(run(PAPER "--batch-schedule linear:16:120") == 0);
    CHECK(said("stdout", "\n18,953 steps, ") && said("stdout", "mean batch 57.2 sequences"));
    CHECK(run(PAPER) == 0);
    CHECK(said("stdout", "\n9,033 steps, 2,219,950,080 tokens, mean batch 120.0 sequences"));
    CHECK(run(PAPER "-b 1") == 0); // the micro-batch changes nothing
    CHECK(said("stdout", "\n9,033 steps, "));
    CHECK(run(PAPER "--batch-schedule gns") == 0);
    CHECK(said("stdout", "stays within 8 to 120") && said("stdout", "takes 9,033 to 135,495 steps"));
    CHECK(run("--dry-run -e L=1,H=1,C=4,T=8,V=16 -d 64 -x 10") == 0);
    CHECK(said("stdout", "\n10 steps, 640 tokens"));
    CHECK(run("--dry-run -e d12 -d 524288 --tokens-per-param 20") == 0);
    CHECK(said("stdout", "4,748 steps, "));    // 124,439,808 parameters x 20 / 524,288, rounded up
    CHECK(run("--dry-run " TOY "-d 64") == 0); // one epoch: 500 sequences in steps of 8
    CHECK(said("stdout", "\n63 steps, 4,032 tokens"));
    CHECK(refused("--dry-run -e d12 -o never", "needs a budget"));
    CHECK(access(in_folder("never"), F_OK) != 0);
}

// What a run does is what its dry run said.
static void test_run_equals_dry_run(void) {
    const char* rest = TOY "-d 128 --max-tokens 5K --batch-schedule linear:2:16 --batch-quantum 2 -u 1K -q 0 ";
    char line[512];
    snprintf(line, sizeof line, "%s -o planned -v 0", rest);
    CHECK(run(line) == 0);
    Csv c = read_log("planned");
    snprintf(line, sizeof line, "%s --dry-run", rest);
    CHECK(run(line) == 0);
    snprintf(line, sizeof line, "\n%d steps, ", c.rows);
    CHECK(said("stdout", line));
    CHECK(number_at(&c, c.rows - 2, "tokens_processed") < 5000 &&
          number_at(&c, c.rows - 1, "tokens_processed") >= 5000);
    CHECK(number_at(&c, 0, "lr") == 0);
    free_log(&c);
}

static void test_eval_only_and_init_from(void) {
    CHECK(run(TOY "-d 64 -x 30 -o trained -v 30") == 0);
    Csv c = read_log("trained");
    char line[512], loss[64];
    snprintf(loss, sizeof loss, "eval | val loss %.4f", number_at(&c, c.rows - 1, "val/loss"));
    free_log(&c);
    CHECK(run("--eval-only -j val.bin -e L=1,H=1,C=4,T=8,V=16 -o trained -y 1") == 0);
    CHECK(said("stdout", loss));
    CHECK(run("--eval-only -j val.bin -e trained/checkpoints/step_00000030/model.bin") == 0);
    CHECK(said("stdout", "eval | val loss 5.0")); // the toy's loss is in its state, which a model file does not hold
    CHECK(run("-i train.bin -e trained/checkpoints/step_00000030/model.bin -d 64 -x 1") == 0);
    CHECK(run(TOY "--init-from trained/checkpoints/step_00000030/model.bin -d 64 -x 1") == 0);
    snprintf(line, sizeof line, "%s", "--eval-only -j val.bin -e L=1,H=1,C=4,T=8,V=16 -o nothing -y 1");
    CHECK(refused(line, "there is no checkpoint in 'nothing'"));
}

static void test_samples(void) {
    make_tokenizer("tokenizer.bin");
    // The toy's likeliest next token is the last one plus 1.
    CHECK(run("-i train.bin -e L=1,H=1,C=4,T=8,V=257 -d 64 -x 4 -s 2 --tokenizer tokenizer.bin --prompt abc -g 9 "
              "--temperature 0") == 0);
    CHECK(said("stdout", "--- sample\nabcdefghijkl\n---\n"));
    CHECK(run("-i train.bin -e L=1,H=1,C=4,T=8,V=257 -d 64 -x 4 -s 2 --tokenizer tokenizer.bin -g 3") == 0);
    CHECK(said("stdout", "--- sample\n<|endoftext|>"));
    CHECK(refused(TOY "-d 64 -x 4 -s 2 --tokenizer tokenizer.bin --prompt abc", "prompt's token 97"));
    CHECK(refused(TOY "-d 64 -x 4 -s 2 --tokenizer train.bin", "train.bin"));
}

static void test_overfit(void) {
    CHECK(run(TOY "-a 1 -d 64 -x 3 -o overfit") == 0);
    CHECK(run(TOY "-d 64 -x 3 -o stream") == 0);
    Csv a = read_log("overfit"), b = read_log("stream");
    CHECK_STR(text_at(&a, 0, "train/lossf"), text_at(&b, 0, "train/lossf"));
    CHECK(strcmp(text_at(&a, 1, "train/lossf"), text_at(&b, 1, "train/lossf")) != 0);
    free_log(&a);
    free_log(&b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Damaged data

static void put_token(const char* name, uint64_t at, int token) {
    const uint16_t word = (uint16_t)token;
    FILE* f = fopen(in_folder(name), "r+b");
    fseek(f, (long)(TOKEN_FILE_HEADER * sizeof(int32_t) + at * sizeof word), SEEK_SET);
    fwrite(&word, sizeof word, 1, f);
    fclose(f);
}

// A token outside the vocabulary, so late in the run that it is not looked at beforehand: nothing of what was trained is lost.
static void test_bad_token_late(void) {
    const char* line = "-i long.bin -e L=1,H=1,C=4,T=8,V=16 -d 64 -x 200 --seed 3 -o ";
    char whole[200], late[200], again[200];
    snprintf(whole, sizeof whole, "%s whole_data", line);
    snprintf(late, sizeof late, "%s late", line);
    snprintf(again, sizeof again, "%s late -y 1", line);
    make_tokens("long.bin", 20001, 16);
    CHECK(run(whole) == 0);
    DataLoader d;
    uint64_t at;
    dataloader_open(&d, in_folder("long.bin"), 8, 3, true);
    dataloader_find(&d, 1203, &at); // step 150, counted from 0
    const int token = d.shards[0].tokens[at + 4];
    dataloader_close(&d);
    put_token("long.bin", at + 4, 16);
    CHECK(refused(late, "token 16 at position"));
    CHECK(said("stderr", "all steps before it are saved") && said("stdout", "checkpoint at step 150\n"));
    CHECK(refused(again, "token 16 at position")); // and again, without harm
    put_token("long.bin", at + 4, token);
    CHECK(run(again) == 0 && same_logs("whole_data", "late", ""));
}

static void nan_eval(void* self, const int* tokens, const int* targets, int B, int T, float* losses) {
    toy_eval(self, tokens, targets, B, T, losses);
    losses[0] = NAN;
}

static void nan_eval_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    toy_open(backend, config, options);
    backend->eval = nan_eval;
}

static void test_broken_model(void) {
    CHECK(run_with(nan_eval_open, TOY "-d 64 -x 3 -o broken") == 0);
    CHECK(said("stdout", "| val loss nan") || said("stdout", "| val loss -nan"));
    CHECK(said("stderr", "the validation loss is not a finite number"));
    CHECK(run_with(nan_eval_open, TOY "-d 64 -o broken -y 1 --eval-only") == 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is wrong with a command

static void test_refusals(void) {
    make_tokens("short.bin", 8, 16);
    make_tokens("wide.bin", 100, 300);
    make_tokens("bad.bin", 801, 0);
    put_token("bad.bin", 400, 16);
    make_tokens("many.bin", 20001, 0);
    put_token("many.bin", 20000, 16); // in a sequence that the first step, of all 2,500, takes somewhere
    CHECK(mkfifo(in_folder("fifo"), 0666) == 0);
    CHECK(mkfifo(in_folder("fifo.bin"), 0666) == 0);
    static const char* const cases[][2] = {
        {"-i missing.bin -e L=1,H=1,C=4,T=8,V=16", "missing.bin"},
        {"-i short.bin -e L=1,H=1,C=4,T=8,V=16", "needs 9"},
        {TOY "-j short.bin", "needs 9"},
        {"-i wide.bin -e L=1,H=1,C=4,T=8,V=16", "a vocabulary of 300 tokens"},
        {"-i train.bin -j wide.bin -e L=1,H=1,C=4,T=8", "a vocabulary of 300 tokens"},
        {"-i bad.bin -e L=1,H=1,C=4,T=8,V=16", "token 16 at position 400"},
        {"-i many.bin -e L=1,H=1,C=4,T=8,V=16 -d 20000", "token 16 at position 20000"},
        {"-i train.bin -j bad.bin -e L=1,H=1,C=4,T=8,V=16", "token 16 at position 400"},
        {"-i fifo -e L=1,H=1,C=4,T=8,V=16", "not a regular file"},
        {TOY "--batch-schedule file:fifo", "no knots"}, // nobody writes to it: all of these would wait for ever
        {TOY "--tokenizer fifo", "has 0 bytes, less than the 1024"},
        {TOY "--hellaswag fifo", "has 0 bytes, less than the 1024"},
        {"-i train.bin -e fifo.bin", "is truncated"},
        {TOY "-x 10 --max-tokens 640", "--max-tokens and --max-steps contradict each other"},
        {"-i train.bin -e d13", "--model (-e) 'd13' is unknown"},
        {"-i train.bin -e L=1,H=3,C=4", "the heads must divide the channels"},
        {"-i train.bin -e missing.bin", "missing.bin"},
        {TOY "-t 9", "--seq-len (-t) 9 is longer than the 8 positions"},
        {TOY "-d 99", "the nearest is 96"},
        {TOY "-d 4", "a whole number of sequences"},
        {TOY "--cosine-attention 1", "block 1 does not exist"},
        {TOY "--cosine-attention 0,", "such as 1,3"},
        {TOY "--cosine-attention x", "such as 1,3"},
        {TOY "-x 10 -u 11", "--warmup (-u)"},
        {TOY "--batch-schedule cubic", "--batch-schedule 'cubic'"},
        {TOY "--batch-schedule linear:1", "linear:FROM:TO"},
        {TOY "--batch-schedule file:missing", "missing"},
        {TOY "--batch-schedule gns -d 8", "no room between --batch-min 2 and --batch-max 1"},
        {TOY "--hellaswag train.bin", "not an evaluation file"},
        {TOY "--init-from train.bin", "train.bin"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char line[512];
        snprintf(line, sizeof line, "%s -o refused", cases[i][0]);
        CHECK(refused(line, cases[i][1]));
        CHECK(access(in_folder("refused"), F_OK) != 0); // nothing is written
    }
    CHECK(refused("-j val.bin", "no training data"));
    CHECK(run("--dry-run " TOY "-d 64 -x 0 --max-tokens 640 --tokens-per-param none") == 0); // 0 and none: not given
    CHECK(said("stdout", "\n10 steps, "));
    CHECK(run("-i train.bin -j wide.bin -e L=1,H=1,C=4,T=8,V=300 -d 64 -x 2") == 0);
    CHECK(said("stderr", "warning: the training data's vocabulary has 16 tokens, that of the validation data 300"));
}

static void test_vocabulary_from_data(void) {
    CHECK(run("-i train.bin -e L=1,H=1,C=4,T=8 -d 64 -x 1") == 0);
    CHECK(said("stdout", "V=16 "));
    make_tokens("unknown.bin", 100, 0);
    CHECK(run("--dry-run -i unknown.bin -e L=1,H=1,C=4,T=8 -d 64 --tokens-per-param 0.01") == 0);
    CHECK(said("stdout", "\n32 steps, ")); // V 50257: 201,312 parameters / 100 / 64
}

int main(void) {
    const char* base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/test_train_XXXXXX", base != NULL && strlen(base) < 200 ? base : "/tmp");
    if (mkdtemp(folder) == NULL) {
        printf("cannot make a temporary folder\n");
        return 1;
    }
    make_tokens("train.bin", 4001, 16);
    make_tokens("val.bin", 801, 16);
    RUN(test_log);
    RUN(test_log_every_and_gns_levels);
    RUN(test_interval_crossed);
    RUN(test_micro_batch_independence);
    RUN(test_shares_of_ranks);
    RUN(test_resume_after_kill);
    RUN(test_resume_after_signal);
    RUN(test_resume_into_closed_loop);
    RUN(test_second_signal);
    RUN(test_reader_goes_away);
    RUN(test_hang_up);
    RUN(test_data_cut_short);
    RUN(test_resume_must_fit);
    RUN(test_output_is_locked);
    RUN(test_output_is_protected);
    RUN(test_output_is_protected_late);
    RUN(test_output_is_whole);
    RUN(test_failing_checkpoints);
    RUN(test_nan_steps);
    RUN(test_too_many_bad_steps);
    RUN(test_outliers);
    RUN(test_closed_loop);
    RUN(test_dry_run);
    RUN(test_run_equals_dry_run);
    RUN(test_eval_only_and_init_from);
    RUN(test_samples);
    RUN(test_overfit);
    RUN(test_bad_token_late);
    RUN(test_broken_model);
    RUN(test_refusals);
    RUN(test_vocabulary_from_data);
    remove_tree(folder);
    return test_summary();
}
