// Tests of llmc/runlog.h: config.json, the header and rows of log.csv, continuing a log after a resume, the console.
static int io_fault_now(const char* op);
#define IO_FAULT(op) io_fault_now(op)

#include "llmc/runlog.h"
#include "dev/test/tempdir.h"
#include "dev/test/test.h"

static bool fail_writes = false;
static int io_fault_now(const char* op) { return fail_writes && strcmp(op, "write") == 0; }

static char folder[TEMP_PATH_SIZE];

static const char* in_folder(const char* name) {
    static char path[2][PATH_SIZE];
    static int next = 0;
    next = !next;
    return path_join(path[next], folder, name);
}

enum { L = 2, TENSORS = 4 + 12 * L, T = 16 };

static GPTConfig small_config(void) { return config_of_shape(L, 1, 4, T, 100); }

// The numbers of a made-up step, a function of its index. Steps 0, 10, 20, ... have one example.
typedef struct {
    LogRow row;
    StepStats stats;
    double sq_sum[TENSORS], sum_sq[TENSORS];
} Step;

static void make_step(Step* s, int index, int gns) {
    const GPTConfig config = small_config();
    const ParamTable table = param_table(&config);
    uint64_t rng = (uint64_t)index;
    memset(s, 0, sizeof *s);
    s->stats.n = index % 10 == 0 ? 1 : 4 + index % 3;
    s->stats.gns = gns;
    s->stats.loss = 4 + splitmix64_uniform(&rng);
    s->stats.grad_norm = splitmix64_uniform(&rng);
    s->stats.sq_sum = s->sq_sum;
    s->stats.sum_sq = s->sum_sq;
    for (int i = 0; i < TENSORS; i++) {
        int row, layer;
        tensor_at(&table, i, &row, &layer);
        bool measured = gns == GNS_ALL || (gns == GNS_LN && table.row[row].group == GROUP_LN);
        double one = 1 + splitmix64_uniform(&rng);
        s->sq_sum[i] = one * s->stats.n * (s->stats.n == 1 ? 1 : 1.02 + 0.001 * splitmix64_uniform(&rng));
        s->sum_sq[i] = measured ? one * s->stats.n * (s->stats.n == 1 ? 1 + 1e-14 : 1) : 0;
    }
    LogRow* r = &s->row;
    r->step = index;
    r->tokens = (int64_t)(index + 1) * 100;
    r->train_loss = r->val_loss = r->hellaswag = r->mfu = NAN;
    if (index % 5 == 0) {
        r->train_loss = 4.25;
        r->val_loss = 4.5;
    }
    r->dt = 0.5;
    r->tokens_per_sec = 1234;
    r->lr = (double)0.0006f;
    r->batch_target = s->stats.n - 0.25;
    r->micro_batches = 2;
    r->stats = &s->stats;
    gns_group_samples(&table, &s->stats, r->samples);
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        r->estimates[g].valid = index >= 2;
        r->estimates[g].gns = index >= 2 ? 41.25 + g : 0;
        r->estimates[g].se = index >= 2 ? 2.125 : 0;
    }
}

// Writes the rows of steps from..to-1 to the log, opened at `tokens`. tensors: GNS_*; every third step measures
// everything, the others the LayerNorms, as with --gns-all-every 3.
static void write_log(const char* path, int tensors, int64_t tokens, int from, int to) {
    const GPTConfig config = small_config();
    RunLog log;
    Step s;
    runlog_open(&log, path, &config, tensors, tokens);
    for (int i = from; i < to; i++) {
        make_step(&s, i, i % 3 == 0 ? GNS_ALL : GNS_LN);
        runlog_row(&log, &s.row);
    }
    runlog_flush(&log);
    runlog_close(&log);
}

// Field number `column` (from 0) of line number `line`, into a static buffer; "?" if there is none.
static const char* field(const char* text, int line, int column) {
    static char buffers[8][160];
    static int next = 0;
    char* out = buffers[next = (next + 1) % 8];
    for (; line > 0 && *text != '\0'; line--) {
        text += strcspn(text, "\n");
        text += *text == '\n';
    }
    for (; column > 0; column--) {
        text += strcspn(text, ",\n");
        if (*text != ',') { return "?"; }
        text++;
    }
    return print_cut(out, sizeof buffers[0], "%.*s", (int)strcspn(text, ",\n"), text);
}

static int column_of(const char* text, const char* name) {
    for (int i = 0; i < 1000; i++) {
        if (strcmp(field(text, 0, i), name) == 0) { return i; }
    }
    return 10000;
}

// The field of that name in that line.
static const char* value(const char* text, int line, const char* name) {
    return field(text, line, column_of(text, name));
}

static void test_header(void) {
    size_t size;
    const char* path = in_folder("header.csv");
    const char* first =
        "step,train/loss,val/loss,dt,tokens_per_sec,mfu,lr,grad_norm,gradient_accumulation_steps,train/lossf";
    const char* last = ",iter_num,tokens_processed"
                       ",gns/ln,gns/ln/se,gns/ln/gtg,gns/ln/trsigma"
                       ",gns/attention,gns/attention/se,gns/attention/gtg,gns/attention/trsigma"
                       ",gns/mlp,gns/mlp/se,gns/mlp/gtg,gns/mlp/trsigma"
                       ",gns/wpe,gns/wpe/se,gns/wpe/gtg,gns/wpe/trsigma"
                       ",gns/wte,gns/wte/se,gns/wte/gtg,gns/wte/trsigma"
                       ",gns/total,gns/total/se,gns/total/gtg,gns/total/trsigma"
                       ",gns/total_nowte,gns/total_nowte/se,gns/total_nowte/gtg,gns/total_nowte/trsigma"
                       ",batch_target,batch,skipped,val/hellaswag\n";
    write_log(path, GNS_OFF, -1, 0, 0);
    char* text = get_file(path, &size);
    char expected[2048];
    snprintf(expected, sizeof expected, "%s%s", first, last);
    CHECK_STR(text, expected);
    free(text);

    write_log(path, GNS_LN, -1, 0, 0);
    text = get_file(path, &size);
    CHECK(strncmp(text, first, strlen(first)) == 0 && strcmp(text + size - strlen(last), last) == 0);
    CHECK_STR(field(text, 0, 10), "train/gns/transformer.h.0.ln_1.weight/norm");
    CHECK_STR(field(text, 0, 11), "train/gns/transformer.h.0.ln_1.weight/pegn");
    CHECK_STR(field(text, 0, 12), "train/gns/transformer.h.0.ln_1.weight/batch_size");
    CHECK_STR(field(text, 0, 13), "train/gns/transformer.h.1.ln_1.weight/norm");
    CHECK_STR(field(text, 0, 10 + 3 * (4 * L + 2)), "iter_num");
    CHECK_STR(field(text, 0, 10 + 3 * (4 * L + 1)), "train/gns/transformer.ln_f.bias/norm");
    CHECK(strstr(text, "c_attn") == NULL && strstr(text, "wte.weight") == NULL);
    free(text);

    write_log(path, GNS_ALL, -1, 0, 0);
    text = get_file(path, &size);
    CHECK_STR(field(text, 0, 10), "train/gns/transformer.wte.weight/norm");
    CHECK_STR(field(text, 0, 10 + 3 * TENSORS), "iter_num");
    CHECK(column_of(text, "train/gns/transformer.h.1.attn.c_attn.qkv.weight/pegn") < 1000);
    free(text);
}

static void test_rows(void) {
    size_t size;
    const char* path = in_folder("rows.csv");
    write_log(path, GNS_ALL, -1, 0, 6);
    char* text = get_file(path, &size);
    // Step 4 measured the LayerNorms only; step 3 everything; step 0 has one example and measured everything.
    CHECK_STR(value(text, 5, "step"), "4");
    CHECK_STR(value(text, 5, "iter_num"), "4");
    CHECK_STR(value(text, 5, "tokens_processed"), "500");
    CHECK_STR(value(text, 5, "train/loss"), "");
    CHECK_STR(value(text, 5, "val/loss"), "");
    CHECK_STR(value(text, 6, "train/loss"), "4.25");
    CHECK_STR(value(text, 6, "val/loss"), "4.5");
    CHECK_STR(value(text, 5, "dt"), "0.5");
    CHECK_STR(value(text, 5, "tokens_per_sec"), "1234");
    CHECK_STR(value(text, 5, "mfu"), "");
    CHECK((float)strtod(value(text, 5, "lr"), NULL) == 0.0006f);
    CHECK_STR(value(text, 5, "gradient_accumulation_steps"), "2");
    CHECK_STR(value(text, 5, "batch_target"), "4.75");
    CHECK_STR(value(text, 5, "batch"), "5");
    CHECK_STR(value(text, 5, "skipped"), "0");
    CHECK_STR(value(text, 5, "val/hellaswag"), "");

    Step s;
    make_step(&s, 4, GNS_LN);
    CHECK_CLOSE(strtod(value(text, 5, "train/lossf"), NULL), s.stats.loss, 1e-8);
    CHECK_CLOSE(strtod(value(text, 5, "grad_norm"), NULL), s.stats.grad_norm, 1e-8);
    for (int line = 1; line <= 6; line++) { // never empty, the same in all tensors of a row
        make_step(&s, line - 1, GNS_LN);
        char n[16];
        snprintf(n, sizeof n, "%d", s.stats.n);
        for (int i = 0; i < TENSORS; i++) {
            CHECK_STR(field(text, line, 10 + 3 * i + 2), n);
            CHECK_CLOSE(strtod(field(text, line, 10 + 3 * i), NULL), sqrt(s.sq_sum[i]) / s.stats.n, 1e-14);
        }
    }
    CHECK_STR(value(text, 5, "train/gns/transformer.wte.weight/pegn"), "");
    CHECK(*value(text, 5, "train/gns/transformer.wte.weight/norm") != '\0');
    CHECK_STR(value(text, 5, "gns/total"), "");
    CHECK_STR(value(text, 5, "gns/total/gtg"), "");
    CHECK_STR(value(text, 5, "gns/ln"), "41.25");
    CHECK_STR(value(text, 5, "gns/ln/se"), "2.125");
    CHECK_STR(value(text, 4, "gns/total"), "46.25");
    CHECK(*value(text, 4, "train/gns/transformer.wte.weight/pegn") != '\0');
    // One example: norm and pegn print identically, and there is no estimate.
    for (int i = 0; i < TENSORS; i++) { CHECK_STR(field(text, 1, 10 + 3 * i), field(text, 1, 10 + 3 * i + 1)); }
    CHECK_STR(value(text, 1, "gns/ln"), "");
    CHECK_STR(value(text, 1, "gns/ln/gtg"), "");
    // Every row has as many fields as the header.
    for (int line = 0; line <= 6; line++) {
        int last = 10 + 3 * TENSORS + 2 + 4 * NUM_GNS_GROUPS + 3;
        CHECK(strcmp(field(text, line, last), "?") != 0 && strcmp(field(text, line, last + 1), "?") == 0);
    }
    free(text);
}

// gtg and trsigma of a group are what its tensors' columns give.
static void test_groups_from_columns(void) {
    const GPTConfig config = small_config();
    const ParamTable table = param_table(&config);
    size_t size;
    const char* path = in_folder("recompute.csv");
    write_log(path, GNS_ALL, -1, 0, 30);
    char* text = get_file(path, &size);
    int compared = 0;
    for (int line = 1; line <= 30; line++) {
        for (int g = 0; g < NUM_GNS_GROUPS; g++) {
            double m = 0, n2 = 0, n = 0;
            bool complete = true;
            for (int i = 0; i < TENSORS; i++) {
                int row, layer, group = table.row[0].group;
                tensor_at(&table, i, &row, &layer);
                group = table.row[row].group;
                if (g == group || g == GNS_GROUP_TOTAL || (g == GNS_GROUP_TOTAL_NOWTE && group != GROUP_WTE)) {
                    const char* pegn = field(text, line, 10 + 3 * i + 1);
                    complete = complete && *pegn != '\0';
                    m += pow(strtod(pegn, NULL), 2);
                    n2 += pow(strtod(field(text, line, 10 + 3 * i), NULL), 2);
                    n = strtod(field(text, line, 10 + 3 * i + 2), NULL);
                }
            }
            int at = column_of(text, "gns/ln/gtg") + 4 * g;
            CHECK((*field(text, line, at) != '\0') == (complete && n > 1));
            if (complete && n > 1) {
                double gtg = strtod(field(text, line, at), NULL), trsigma = strtod(field(text, line, at + 1), NULL);
                CHECK(fabs((n * n2 - m) / (n - 1) - gtg) <= 1e-8 * fabs(gtg)); // nine digits are printed
                CHECK(fabs((m - n2) / (1 - 1 / n) - trsigma) <= 1e-8 * fabs(trsigma));
                CHECK(fabs(gtg) < 0.02 * m); // a small difference: the norms' digits are needed
                compared++;
            }
        }
    }
    CHECK(compared == 27 + 6 * 9); // LayerNorm in 27 of 30 steps (three have one example), the rest in 9 of 10
    free(text);
}

static void test_not_finite(void) {
    const GPTConfig config = small_config();
    size_t size;
    const char* path = in_folder("nan.csv");
    RunLog log;
    Step s;
    runlog_open(&log, path, &config, GNS_LN, -1);
    make_step(&s, 1, GNS_LN);
    s.stats.loss = -NAN;
    s.stats.grad_norm = INFINITY;
    s.stats.outcome = STEP_SKIPPED_NONFINITE;
    s.row.mfu = 41.5;
    s.row.hellaswag = 0.25;
    runlog_row(&log, &s.row);
    runlog_close(&log);
    char* text = get_file(path, &size);
    CHECK_STR(value(text, 1, "train/lossf"), "nan");
    CHECK_STR(value(text, 1, "grad_norm"), "inf");
    CHECK_STR(value(text, 1, "skipped"), "1");
    CHECK_STR(value(text, 1, "mfu"), "41.5");
    CHECK_STR(value(text, 1, "val/hellaswag"), "0.25");
    free(text);
}

// A log that was cut anywhere after the checkpoint's rows and then continued equals one of an unbroken run.
static void test_resume(void) {
    size_t size, cut_size;
    const char* whole_path = in_folder("whole.csv");
    write_log(whole_path, GNS_LN, -1, 0, 12);
    char* whole = get_file(whole_path, &size);
    const char* at = whole;
    for (int line = 0; line < 8; line++) { // header and seven rows: 700 tokens
        at = strchr(at, '\n') + 1;
    }
    char path[PATH_SIZE];
    path_join(path, folder, "cut.csv");
    for (size_t keep = (size_t)(at - whole); keep <= size; keep += 13) {
        put_file(path, whole, keep);
        write_log(path, GNS_LN, 700, 7, 12);
        char* cut = get_file(path, &cut_size);
        CHECK_STR(cut, whole);
        free(cut);
    }
    // Rows that are torn in the middle, or of a line too many, are dropped as well.
    size_t head = (size_t)(at - whole);
    char* mixed = (char*)alloc_zeroed(size + 200, 1, "a test log");
    memcpy(mixed, whole, head);
    size_t n = head + (size_t)sprintf(mixed + head, "7,,,0.5\n\n,,,\n8,,,%s\n", "0.");
    put_file(path, mixed, n);
    write_log(path, GNS_LN, 700, 7, 12);
    char* cut = get_file(path, &cut_size);
    CHECK_STR(cut, whole);
    free(cut);
    free(mixed);

    // From the start, and past the end.
    write_log(path, GNS_LN, 0, 0, 12);
    cut = get_file(path, &cut_size);
    CHECK_STR(cut, whole);
    free(cut);
    write_log(path, GNS_LN, 1000000, 0, 0);
    cut = get_file(path, &cut_size);
    CHECK_STR(cut, whole);
    free(cut);
    CHECK(!path_exists(in_folder("cut.csv.tmp")));
    free(whole);
}

static void test_resume_refused(void) {
    char path[PATH_SIZE];
    path_join(path, folder, "refused.csv");
    write_log(path, GNS_LN, -1, 0, 3);
    CHECK_DIES(write_log(path, GNS_ALL, 100, 0, 0),
               "its column 11 is 'train/gns/transformer.h.0.ln_1.weight/norm' where "
               "this run would write 'train/gns/transformer.wte.weight/norm'");
    CHECK_DIES(write_log(path, GNS_OFF, 100, 0, 0), "where this run would write 'iter_num'");
    put_file(path, "step,train/loss\n", 16);
    CHECK_DIES(write_log(path, GNS_LN, 100, 0, 0), "it has fewer columns");
    put_file(path, "\n", 1);
    CHECK_DIES(write_log(path, GNS_LN, 100, 0, 0), "its column 1 is ''");
    CHECK_DIES(write_log(in_folder("no/such/log.csv"), GNS_LN, -1, 0, 0), "the log cannot be started: cannot create");
    CHECK_DIES(write_log(folder, GNS_LN, 100, 0, 0), "cannot read");
}

// No log, or one whose header is torn: a new one, and a line that says so.
static void test_resume_without_log(void) {
    size_t size;
    char path[PATH_SIZE];
    int stderr_fd = dup(2), said = open(in_folder("stderr.txt"), O_RDWR | O_CREAT | O_TRUNC, 0666);
    path_join(path, folder, "missing.csv");
    dup2(said, 2);
    write_log(path, GNS_LN, 200, 2, 4);
    put_file(in_folder("torn.csv"), "step,tra", 8);
    write_log(in_folder("torn.csv"), GNS_LN, 200, 2, 4);
    dup2(stderr_fd, 2);
    close(said);
    close(stderr_fd);
    char* text = get_file(path, &size);
    CHECK_STR(value(text, 1, "step"), "2");
    CHECK_STR(value(text, 2, "step"), "3");
    char* torn = get_file(in_folder("torn.csv"), &size);
    CHECK_STR(torn, text);
    char* stderr_text = get_file(in_folder("stderr.txt"), &size);
    CHECK(strstr(stderr_text, "missing.csv' to continue: a new one starts at 200 tokens") != NULL);
    CHECK(strstr(stderr_text, "torn.csv' to continue") != NULL);
    free(stderr_text);
    free(torn);
    free(text);
}

// A full disk: said once, and again only after it worked in between; the rows that are there are whole.
static void test_write_failures(void) {
    const GPTConfig config = small_config();
    size_t size;
    RunLog log;
    Step s;
    int stderr_fd = dup(2), said = open(in_folder("stderr.txt"), O_RDWR | O_CREAT | O_TRUNC, 0666);
    dup2(said, 2);
    runlog_open(&log, in_folder("full.csv"), &config, GNS_LN, -1);
    const bool failing[] = {false, true, true, false, true, true, true, false};
    for (int i = 0; i < 8; i++) {
        fail_writes = failing[i];
        make_step(&s, i, GNS_LN);
        runlog_row(&log, &s.row);
    }
    fail_writes = false;
    runlog_close(&log);
    dup2(stderr_fd, 2);
    close(said);
    close(stderr_fd);
    char* text = get_file(in_folder("stderr.txt"), &size);
    int lines = 0;
    for (const char* p = text; *p != '\0'; p++) { lines += *p == '\n'; }
    CHECK(lines == 2);
    CHECK(strstr(text, "warning: cannot write to '") == text && strstr(text, "Input/output error") != NULL);
    free(text);
    text = get_file(in_folder("full.csv"), &size);
    CHECK_STR(field(text, 1, 0), "0");
    CHECK_STR(field(text, 2, 0), "3");
    CHECK_STR(field(text, 3, 0), "7");
    free(text);
}

static void test_config_json(void) {
    size_t size;
    char error[256];
    Text quoted = {NULL, 0, 0};
    text_add_json(
        &quoted,
        "a \"b\" \\ \n\x01 \xc3\xa9 \xe2\x82\xac \xff \xc3 \xed\xa0\x80 \xe2\x82"); // the last four are not UTF-8
    const JsonField fields[] = {{"n", "3"}, {"on", "true"}, {"text", quoted.data}};
    CHECK(config_json_write(in_folder("config.json"), fields, 3, error, sizeof error));
    char* text = get_file(in_folder("config.json"), &size);
    CHECK_STR(text, "{\n  \"n\": 3,\n  \"on\": true,\n  \"text\": \"a \\\"b\\\" \\\\ \\u000a\\u0001 \xc3\xa9 "
                    "\xe2\x82\xac \\udcff \\udcc3 \\udced\\udca0\\udc80 \\udce2\\udc82\"\n}\n");
    free(text);
    free(quoted.data);
    CHECK(config_json_write(in_folder("config.json"), fields, 0, error, sizeof error));
    text = get_file(in_folder("config.json"), &size);
    CHECK_STR(text, "{\n}\n");
    free(text);
    CHECK(!config_json_write(in_folder("no/config.json"), fields, 2, error, sizeof error));
    CHECK(strstr(error, "No such file") != NULL);
}

static void test_formats(void) {
    char t[32];
    const struct {
        double x;
        const char* text;
    } counts[] = {{0, "0"},         {7, "7"},         {0.5, "0.50"},    {999, "999"},      {999.6, "1.00K"},
                  {1234, "1.23K"},  {12345, "12.3K"}, {999499, "999K"}, {999999, "1.00M"}, {1234567, "1.23M"},
                  {2.2e9, "2.20B"}, {1e12, "1.00T"},  {5e15, "5000T"},  {-1500, "-1.50K"}, {99960, "100K"}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        CHECK_STR(format_count(t, sizeof t, counts[i].x), counts[i].text);
    }
    const struct {
        double x;
        const char* text;
    } times[] = {{0, "0s"},         {59.4, "59s"},   {59.6, "1m00s"},    {200, "3m20s"},
                 {3599.9, "1h00m"}, {3725, "1h02m"}, {86399.6, "1d00h"}, {183600, "2d03h"},
                 {-1, "--"},        {NAN, "--"},     {INFINITY, "--"}};
    for (size_t i = 0; i < sizeof times / sizeof times[0]; i++) {
        CHECK_STR(format_duration(t, sizeof t, times[i].x), times[i].text);
    }
}

static void test_progress(void) {
    Step s;
    Progress p;
    char line[512];
    memset(&p, 0, sizeof p);
    make_step(&s, 4, GNS_LN);
    s.stats.loss = 3.5;
    s.row.mfu = 41.24;
    s.row.dt = 2;
    s.row.tokens = 1000;
    s.row.tokens_per_sec = 50; // 100 tokens a step
    progress_update(&p, &s.row);
    progress_line(&p, &s.row, 10000, line, sizeof line); // 9000 tokens to go at 50 a second
    CHECK_STR(line, "step 4 | 10.0% | ETA 3m00s | loss 3.5000 (ema 3.5000) | lr 6.00e-04 | batch 5 | gns 41.2 +- 2.1 | "
                    "50 tok/s | MFU 41.2%");
    // Without bias: the mean of two losses whose weights are 0.95 * 0.05 and 0.05; a loss that is not finite has none.
    s.stats.loss = 2.5;
    progress_update(&p, &s.row);
    s.stats.loss = NAN;
    s.stats.outcome = STEP_SKIPPED_NONFINITE;
    progress_update(&p, &s.row);
    CHECK_CLOSE(p.loss / p.loss_weight, (0.95 * 3.5 + 2.5) / 1.95, 1e-12);
    s.row.estimates[GNS_GROUP_LN].valid = false;
    s.row.mfu = NAN;
    progress_line(&p, &s.row, 0, line, sizeof line);
    CHECK_STR(line,
              "step 4 | -- | ETA -- | loss nan (ema 2.9872) | lr 6.00e-04 | batch 5 | gns -- | 50 tok/s | SKIPPED: "
              "not finite");
}

int main(void) {
    tempdir_make(folder);
    RUN(test_header);
    RUN(test_rows);
    RUN(test_groups_from_columns);
    RUN(test_not_finite);
    RUN(test_resume);
    RUN(test_resume_refused);
    RUN(test_resume_without_log);
    RUN(test_write_failures);
    RUN(test_config_json);
    RUN(test_formats);
    RUN(test_progress);
    tempdir_remove(folder);
    return test_summary();
}
