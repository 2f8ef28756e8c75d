/*
Tests of llmc/options.h: the table itself, how values are read, and that every faulty command line ends in one clear line.
*/
#include "llmc/options.h"
#include "dev/test/test.h"

// Parses the command line in `line`, split at spaces. The texts live as long as the program.
static Options parse(const char* line) {
    static char* kept[512];
    static int num_kept = 0;
    char* copy = kept[num_kept++ % 512] = copy_string(line);
    char* argv[64];
    int argc = 0;
    argv[argc++] = copy_string("train");
    for (char* word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) { argv[argc++] = word; }
    Options o;
    options_parse(argc, argv, &o);
    free(argv[0]);
    return o;
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

static void test_rows_parse_their_defaults(void) {
    Options a, b;
    OptionText x, y;
    options_defaults(&a);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const OptionRow* row = &option_rows[i];
        bool fine = option_set(&b, row, row->fallback, false);
        if (!fine) { printf("  --%s does not take its own default\n", row->name); }
        CHECK(fine);
        const char *before = option_value(&a, row, &x), *after = option_value(&b, row, &y);
        CHECK((before == NULL) == (after == NULL));
        CHECK(before == NULL || strcmp(before, after) == 0);
        // what option_value says reads back as the same value
        Options c;
        memset(&c, 0, sizeof c);
        CHECK(option_set(&c, row, before, false));
        const char* again = option_value(&c, row, &y);
        CHECK(before == NULL || strcmp(before, again) == 0);
    }
}

static void test_table_is_consistent(void) {
    CHECK((size_t)NUM_OPTIONS <= sizeof((Options*)0)->given);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const OptionRow* row = &option_rows[i];
        CHECK(row->help[0] != '\0' && strlen(row->help) < 400);
        CHECK((row->value == NULL) == (row->type == OPTION_FLAG));
        CHECK((row->fallback == NULL) <= (row->type == OPTION_TEXT));
        CHECK(option_accepts(row).text[0] != '\0');
        for (int j = 0; j < i; j++) {
            const OptionRow* other = &option_rows[j];
            CHECK(strcmp(row->name, other->name) != 0);
            CHECK(row->offset != other->offset);
            CHECK(row->letter == NULL || other->letter == NULL || strcmp(row->letter, other->letter) != 0);
        }
    }
    CHECK(option_rows[0].group != NULL);
}

// The words of --lr-schedule and --gns are stored as the numbers of schedule.h and model.h.
static void test_words_are_the_enums(void) {
    CHECK(parse("-i x -k constant").lr_schedule == LR_CONSTANT);
    CHECK(parse("-i x -k cosine").lr_schedule == LR_COSINE);
    CHECK(parse("-i x -k linear").lr_schedule == LR_LINEAR);
    CHECK(parse("-i x -k wsd").lr_schedule == LR_WSD);
    CHECK(parse("-i x --gns off").gns == GNS_OFF);
    CHECK(parse("-i x --gns ln").gns == GNS_LN);
    CHECK(parse("-i x --gns all").gns == GNS_ALL);
    CHECK(parse("-i x -o y --log-tensors all").log_tensors == GNS_ALL);
    CHECK(parse("-i x --gelu erf").gelu == 1 + GELU_ERF);
    CHECK(parse("-i x --gelu tanh").gelu == 1 + GELU_TANH);
    CHECK(parse("-i x --init normal").init == 1 + INIT_NORMAL);
    CHECK(parse("-i x --init truncated").init == 1 + INIT_TRUNCATED);
    CHECK(parse("-i x").gelu == 0 && parse("-i x").init == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading values

static void test_letters_of_llmc(void) {
    Options o = parse("-i a -j b -e d24 -o out -b 8 -t 512 -d 8192 -l 1e-3 -q 0.1 -c 0.1 -k linear -u 700 -x 90 "
                      "-v 250 -m 5 -n 5000 -y 1 -a 1 -sl 4 -sg 5.5");
    CHECK_STR(o.train_data, "a");
    CHECK_STR(o.val_data, "b");
    CHECK_STR(o.model, "d24");
    CHECK_STR(o.out, "out");
    CHECK(o.micro_batch == 8 && o.seq_len == 512 && o.batch_tokens == 8192);
    CHECK(o.lr == 1e-3 && o.final_lr_frac == 0.1 && o.weight_decay == 0.1 && o.lr_schedule == LR_LINEAR);
    CHECK(o.warmup.count == 700 && o.warmup.unit == UNIT_STEPS && o.max_steps == 90);
    CHECK(o.val_every.count == 250 && o.val_every.unit == UNIT_STEPS && o.val_batches == 5);
    CHECK(o.checkpoint_every.count == 5000 && o.checkpoint_every.unit == UNIT_STEPS);
    CHECK(o.resume == 1 && o.overfit == 1 && o.outlier_loss_z == 4 && o.outlier_grad_z == 5.5);
    o = parse("-i a --tokenizer t -s 20 -g 32");
    CHECK(o.sample_every.count == 20 && o.sample_every.unit == UNIT_STEPS && o.sample_length == 32);
}

static void test_forms(void) {
    CHECK(parse("-i a --lr=0.5").lr == 0.5);
    CHECK(parse("-i a --lr 0.5").lr == 0.5);
    CHECK(parse("-i a --lr 0.5 --lr 0.25").lr == 0.25);
    CHECK_STR(parse("--train-data=a=b").train_data, "a=b");
    CHECK(parse("-i a --max-tokens 2B").max_tokens == 2e9);
    CHECK(parse("-i a --max-tokens 1.5M").max_tokens == 1.5e6);
    CHECK(parse("-i a -d 512K").batch_tokens == 512000);
    CHECK(parse("-i a -d 245_760").batch_tokens == 245760);
    CHECK(parse("-i a -b 4 --overfit -t 8").overfit == 1);
    CHECK(parse("-i a --overfit 0").overfit == 0);
    CHECK(parse("--dry-run").dry_run == 1);
    CHECK(parse("-i a --gns-calibration measured --gns all --batch-schedule gns").gns_calibration == OPTION_WORD);
    CHECK(parse("-i a --max-tokens none").max_tokens == OPTION_WORD);
    CHECK(parse("-i a").lr == 3e-4 && parse("-i a").seed == 42);
    Options o = parse("-i a --lr 1");
    CHECK(option_given(&o, "lr") && option_given(&o, "train-data") && !option_given(&o, "beta1"));
}

static void test_intervals(void) {
    Interval v = parse("-i a -j b -v 10M").val_every;
    CHECK(v.count == 1e7 && v.unit == UNIT_TOKENS);
    v = parse("-i a -j b -v 300tokens").val_every;
    CHECK(v.count == 300 && v.unit == UNIT_TOKENS);
    v = parse("-i a -j b --val-every 250steps").val_every;
    CHECK(v.count == 250 && v.unit == UNIT_STEPS);
    v = parse("-i a -j b --val-every 2Ksteps").val_every;
    CHECK(v.count == 2000 && v.unit == UNIT_STEPS);
    CHECK(parse("-i a -j b --val-every 0").val_every.count == 0);
    CHECK(parse("-i a -j b -v 0").val_every.count == 0);
    CHECK(parse("-i a --warmup 374784000tokens").warmup.count == 374784000);
    CHECK_DIES(parse("-i a -j b --val-every 250"), "250steps");
    CHECK_DIES(parse("-i a -j b --val-every=250"), "--val-every (-v) '250'");
    CHECK_DIES(parse("-i a -j b -v 10X"), "-v 250");
    CHECK_DIES(parse("-i a -j b -v steps"), "or 0");
    CHECK_DIES(parse("-i a -j b -v -5"), "--val-every");
    CHECK_DIES(parse("-i a -j b -v 5step"), "--val-every");
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

static void test_bad_values(void) {
    CHECK_DIES(parse("-i a -b 8x"), "--micro-batch (-b) '8x': expected a whole number from 1 to 65536");
    CHECK_DIES(parse("-i a -b 0"), "from 1 to 65536");
    CHECK_DIES(parse("-i a -b 2.5"), "a whole number");
    CHECK_DIES(parse("-i a -b 1e9"), "65536");
    CHECK_DIES(parse("-i a -b="), "unknown option '-b'");
    CHECK_DIES(parse("-i a --lr="), "--lr (-l) '': expected a number");
    CHECK_DIES(parse("-i a -l 0x10"), "--lr (-l) '0x10'");
    CHECK_DIES(parse("-i a -l nan"), "a number from 0 to 100");
    CHECK_DIES(parse("-i a -l -1"), "--lr (-l) '-1'");
    CHECK_DIES(parse("-i a -d 1G"), "500K, 10M or 2B");
    CHECK_DIES(parse("-i a -d 0"), "or micro-batch");
    CHECK_DIES(parse("-i a -k exp"), "one of constant|cosine|linear|wsd");
    CHECK_DIES(parse("-i a -k cos"), "one of constant|cosine|linear|wsd");
    CHECK_DIES(parse("-i a -q 1.5"), "from 0 to 1");
    CHECK_DIES(parse("-i a --overfit 2"), "0 or 1");
    CHECK_DIES(parse("-i a --overfit yes"), "0 or 1");
    CHECK_DIES(parse("-i a --seed -1"), "--seed");
    CHECK_DIES(parse("-i a --gns-calibration measure --gns all --batch-schedule gns"), "or measured");
    CHECK_DIES(parse("-i a --max-bad-steps 0"), "--max-bad-steps");
    CHECK_DIES(parse("--train-data="), "--train-data");
}

static void test_unknown_options(void) {
    CHECK_DIES(parse("-i a --lrr 1"), "did you mean --lr?");
    CHECK_DIES(parse("-i a --batch-tokns=3"), "unknown option '--batch-tokns'; did you mean --batch-tokens?");
    CHECK_DIES(parse("-i a --warm 3"), "did you mean --warmup?");
    CHECK_DIES(parse("-i a --frobnicate-it 3"), "unknown option '--frobnicate-it'; --help lists all");
    CHECK_DIES(parse("-i a -z 1"), "unknown option '-z'; --help lists all");
    CHECK_DIES(parse("-i a -b8"), "unknown option '-b8'");
    CHECK_DIES(parse("-i a oops"), "unexpected argument 'oops'");
    CHECK_DIES(parse("-i a -"), "unexpected argument '-'");
    CHECK_DIES(parse("-i a --lr"), "--lr (-l) needs a value");
    CHECK_DIES(parse("--out --lr 3"), "--out (-o) needs a value");
    CHECK_DIES(parse("-i a -h 1"), "--hellaswag FILE");
    CHECK_DIES(parse("-i a -h 0"), "--hellaswag FILE");
    char* longest = (char*)alloc_zeroed(10000, 1, "a long argument");
    memset(longest, 'x', 9999);
    longest[0] = longest[1] = '-';
    CHECK_DIES(parse(longest), "unknown option '--xxx");
    free(longest);
}

static void test_missing(void) {
    CHECK_DIES(parse(""), "no training data: -i FILES");
    CHECK_DIES(parse("--eval-only -e x.bin"), "--eval-only needs something to evaluate on");
    CHECK_DIES(parse("--eval-only -j x"), "--eval-only needs weights");
    CHECK_DIES(parse("--eval-only -j x -e x.bin -o run"), "needs -y 1");
    CHECK(parse("--eval-only -j x -e x.bin").eval_only == 1);
    CHECK(parse("--eval-only -j x -o run -y 1").eval_only == 1);
}

// An option that would have no effect is refused, and its message names what it needs.
static void test_needs(void) {
    static const char* const cases[][2] = {
        {"-v 10", "--val-every needs -j FILES"},
        {"-m 10", "--val-batches needs -j FILES"},
        {"--val-tokens 10K", "--val-tokens needs -j FILES"},
        {"-s 10", "--sample-every needs --tokenizer"},
        {"-g 10", "--sample-length needs -s"},
        {"--prompt x", "--prompt needs -s"},
        {"--temperature 0", "--temperature needs -s"},
        {"--top-k 5", "--top-k needs -s"},
        {"-n 10", "--checkpoint-every needs -o FOLDER"},
        {"--keep 3", "--keep needs -o FOLDER"},
        {"-y 1", "--resume needs -o FOLDER"},
        {"--log-every 3", "--log-every needs -o FOLDER"},
        {"--log-tensors all", "--log-tensors needs -o FOLDER"},
        {"--gns off --gns-all-every 4", "--gns-all-every needs --gns ln"},
        {"--gns off --gns-tau 1M", "--gns-tau needs --gns ln"},
        {"--batch-min 4", "--batch-min needs --batch-schedule gns"},
        {"--batch-max 4", "--batch-max needs --batch-schedule gns"},
        {"--batch-may-fall", "--batch-may-fall needs --batch-schedule gns"},
        {"--gns-scale 2", "--gns-scale needs --batch-schedule gns"},
        {"--gns-power 0.5", "--gns-power needs --batch-schedule gns"},
        {"--gns-calibration 2", "--gns-calibration needs --batch-schedule gns"},
        {"--gns-freeze 0.5", "--gns-freeze needs --batch-schedule gns"},
        {"--batch-schedule gns -k constant --gns-freeze 0.5", "a learning rate that decays"},
        {"-k constant -q 0.1", "--final-lr-frac needs a learning rate that decays"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char line[256];
        snprintf(line, sizeof line, "-i x %s", cases[i][0]);
        CHECK_DIES(parse(line), cases[i][1]);
    }
    // switched off, they are no contradiction
    CHECK(parse("-i x -v 0 -s 0 -n 0 -y 0 --batch-may-fall 0 --gns-all-every 0 --gns off").gns == GNS_OFF);
}

static void test_contradictions(void) {
    CHECK_DIES(parse("-i x --max-tokens 1M -x 10"), "--max-tokens and --max-steps contradict");
    CHECK_DIES(parse("-i x --max-tokens 1M --tokens-per-param 20"), "--max-tokens and --tokens-per-param contradict");
    CHECK_DIES(parse("-i x -x 10 --tokens-per-param 20"), "--max-steps and --tokens-per-param contradict");
    CHECK_DIES(parse("-i x -j y -m 10 --val-tokens 1M"), "--val-batches and --val-tokens contradict");
    CHECK_DIES(parse("-i x --beta2 0.9 --beta2-half-life 1M"), "--beta2 and --beta2-half-life contradict");
    CHECK_DIES(parse("-i x --init normal --init-from y.bin"), "--init and --init-from contradict");
    CHECK_DIES(parse("-j x -e y.bin --eval-only --dry-run"), "--eval-only and --dry-run contradict");
    CHECK_DIES(parse("-i x -e y.bin --init-from z.bin"), "-e y.bin already names the weights");
    CHECK_DIES(parse("-i x -e y.bin --init normal"), "describe a new model");
    CHECK_DIES(parse("-i x -e y.bin --gelu erf"), "describe a new model");
    CHECK_DIES(parse("-i x -e y.bin --cosine-attention 1"), "describe a new model");
    CHECK_DIES(parse("-i x --gns all --gns-all-every 4"), "drop --gns-all-every");
    CHECK_DIES(parse("-i x --gns off --batch-schedule gns"), "needs the noise scale");
    CHECK_DIES(parse("-i x --batch-schedule gns --gns-calibration measured"), "--gns-all-every N or --gns all");
    CHECK_DIES(parse("-i x --batch-schedule gns --batch-min 9 --batch-max 8"), "--batch-min 9 is above --batch-max 8");
    CHECK_DIES(parse("-i x --batch-schedule gns --batch-min 9 --batch-quantum 8"), "not a multiple of");
    CHECK_DIES(parse("-i x --batch-schedule gns --batch-max 9 --batch-quantum 8"), "--batch-max 9 is not a multiple");
    CHECK_DIES(parse("-i x --batch-schedule gns --batch-min 1"), "--batch-min '1'");
}

// --help exits with 0 and names every option.
static void test_help(void) {
    int fd[2], status = 0;
    char* text = (char*)alloc_zeroed(65536, 1, "the help");
    size_t used = 0;
    ssize_t n;
    fflush(stdout);
    pid_t pid = pipe(fd) == 0 ? fork() : -1;
    if (pid == 0) {
        dup2(fd[1], 1);
        close(fd[0]);
        parse("-b 3 --help");
        _exit(99);
    }
    close(fd[1]);
    while ((n = read(fd[0], text + used, 65535 - used)) > 0) { used += (size_t)n; }
    close(fd[0]);
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        char name[64];
        snprintf(name, sizeof name, "--%s", option_rows[i].name);
        CHECK(strstr(text, name) != NULL);
    }
    for (char* line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) { CHECK(strlen(line) <= 120); }
    free(text);
}

static void test_edit_distance(void) {
    CHECK(edit_distance("", "abc") == 3);
    CHECK(edit_distance("abc", "abc") == 0);
    CHECK(edit_distance("kitten", "sitting") == 3);
    CHECK(edit_distance("lr", "rl") == 2);
}

int main(void) {
    RUN(test_rows_parse_their_defaults);
    RUN(test_table_is_consistent);
    RUN(test_words_are_the_enums);
    RUN(test_letters_of_llmc);
    RUN(test_forms);
    RUN(test_intervals);
    RUN(test_bad_values);
    RUN(test_unknown_options);
    RUN(test_missing);
    RUN(test_needs);
    RUN(test_contradictions);
    RUN(test_help);
    RUN(test_edit_distance);
    return test_summary();
}
