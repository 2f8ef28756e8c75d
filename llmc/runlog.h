/*
What a run tells: config.json, log.csv and the progress line on the console.

log.csv has a header and one row a logged step; which columns there are is known from the start:

    step                            counted from 0, as iter_num
    train/loss, val/loss            evaluation steps only
    dt, tokens_per_sec, mfu         seconds of the step, tokens a second, per cent of peak
    lr, grad_norm                   of the update; norm of the mean gradient before clipping
    gradient_accumulation_steps     micro-batches
    train/lossf                     mean loss of the step's examples
    for each tracked tensor, with n examples g_b in the step:
      train/gns/<name>/norm         |mean_b g_b| = sqrt(sq_sum) / n
      train/gns/<name>/pegn         sqrt(mean_b |g_b|^2) = sqrt(sum_sq / n); empty where not measured in this step
      train/gns/<name>/batch_size   n
    iter_num, tokens_processed      tokens_processed: after the step
    for each group ln, attention, mlp, wpe, wte, total, total_nowte (gns.h), empty where not measured in this step:
      gns/<group>, .../se           the smoothed estimate and its standard error, once there is one
      gns/<group>/gtg, .../trsigma  this step's raw components, with two examples or more
    batch_target, batch             sequences: as the schedule says, as rounded (n)
    skipped                         0: the update was applied; else STEP_SKIPPED_...
    val/hellaswag                   accuracy, where measured

The columns up to tokens_processed are those of the nanoGNS reference (arXiv 2411.00999), so that its analysis reads our
logs. Numbers have 9 significant digits, which give a float back exactly; norms have 15, because gtg is a small
difference of their squares. A row is one write(), so that a reader never sees half of one.
*/
#ifndef LLMC_RUNLOG_H
#define LLMC_RUNLOG_H

#include "atomicfile.h"
#include "gns.h"
#include "model.h"
#include "utf8.h"

// ---------------------------------------------------------------------------------------------------------------------
// Text that grows

typedef struct {
    char* data; // NUL-terminated; NULL before anything was added; free() it
    size_t length, capacity;
} Text;

PRINTF_LIKE(2, 3) UNUSED static void text_add(Text* t, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int need = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (t->length + (size_t)need + 1 > t->capacity) {
        size_t capacity = 2 * (t->length + (size_t)need + 1);
        char* larger = (char*)realloc(t->data, capacity);
        if (larger == NULL) { fatal("out of memory: a text of %zu bytes", capacity); }
        t->data = larger;
        t->capacity = capacity;
    }
    va_start(args, fmt);
    vsnprintf(t->data + t->length, (size_t)need + 1, fmt, args);
    va_end(args);
    t->length += (size_t)need;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

typedef struct {
    const char* key;
    const char* value; // JSON: 3, true, "text" with its quotes (text_add_json), ...
} JsonField;

// Appends the string as a JSON string, with quotes. A byte b that is not valid UTF-8, as in the name of a file, becomes
// \udc<b>: Python's os.fsencode (PEP 383, "surrogateescape") makes it that byte again.
static inline void text_add_json(Text* t, const char* string) {
    text_add(t, "\"");
    for (const char *p = string, *end = string + strlen(string); p < end;) {
        const unsigned char c = (unsigned char)*p;
        uint32_t code;
        const size_t len = utf8_decode(p, (size_t)(end - p), &code);
        if (c >= 0x80 && len == 1) {
            text_add(t, "\\udc%02x", c);
        } else if (c < 0x20) {
            text_add(t, "\\u%04x", c);
        } else {
            text_add(t, "%s%.*s", c == '"' || c == '\\' ? "\\" : "", (int)len, p);
        }
        p += len;
    }
    text_add(t, "\"");
}

// Writes the fields as one JSON object, a line each; whole or not at all. False with the reason in error.
static inline bool config_json_write(const char* path, const JsonField* fields, int count, char* error,
                                     size_t error_size) {
    Text t = {NULL, 0, 0};
    text_add(&t, "{\n");
    for (int i = 0; i < count; i++) {
        text_add(&t, "  ");
        text_add_json(&t, fields[i].key);
        text_add(&t, ": %s%s\n", fields[i].value, i + 1 < count ? "," : "");
    }
    text_add(&t, "}\n");
    bool ok = write_atomically(path, t.data, t.length, error, error_size);
    free(t.data);
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// log.csv

// A step's numbers.
typedef struct {
    int64_t step;                // counted from 0
    int64_t tokens;              // consumed after the step
    double train_loss, val_loss; // NAN: not measured at this step, as the next
    double hellaswag;            // accuracy
    double dt, tokens_per_sec;   // seconds, tokens a second
    double mfu;                  // per cent; NAN: unknown
    double lr;
    double batch_target;    // sequences, before rounding
    int micro_batches;      // that the step was computed in
    const StepStats* stats; // the rest: loss, norms, n, outcome
    GnsSample samples[NUM_GNS_GROUPS];
    GnsEstimate estimates[NUM_GNS_GROUPS];
} LogRow;

typedef struct {
    int fd;
    char path[PATH_SIZE];
    ParamTable table;
    int tensors;        // which have columns of their own: GNS_OFF none, GNS_LN those of GROUP_LN, GNS_ALL all
    int columns;        // in the header
    int tokens_column;  // index of tokens_processed
    off_t size;         // of the file: where the next row goes
    bool write_failing; // the last row could not be written, and that was said
    Text row;           // the row being put together
} RunLog;

static inline bool runlog_tracks(const RunLog* log, int row) {
    return gns_measures(log->tensors, log->table.row[row].group);
}

// Starts the next field.
static inline void row_next(Text* t) {
    if (t->length > 0) { text_add(t, ","); }
}

static inline void row_number(Text* t, double x, int digits) {
    row_next(t);
    if (isnan(x)) {
        text_add(t, "nan"); // printf may say -nan
    } else {
        text_add(t, "%.*g", digits, x);
    }
}

static inline void row_integer(Text* t, int64_t x) {
    row_next(t);
    text_add(t, "%" PRId64, x);
}

// An empty field where there is no number.
static inline void row_optional(Text* t, bool present, double x, int digits) {
    if (present) {
        row_number(t, x, digits);
    } else {
        row_next(t);
    }
}

static inline int count_columns(const char* text) {
    int columns = 1;
    for (const char* p = text; *p != '\0'; p++) { columns += *p == ','; }
    return columns;
}

// Puts the header, with its newline, into log->row and counts the columns.
static inline void runlog_make_header(RunLog* log) {
    Text* t = &log->row;
    char name[128];
    t->length = 0;
    text_add(t, "step,train/loss,val/loss,dt,tokens_per_sec,mfu,lr,grad_norm,gradient_accumulation_steps,train/lossf");
    for (int i = 0; i < log->table.num_tensors; i++) {
        int row, layer;
        tensor_at(&log->table, i, &row, &layer);
        if (runlog_tracks(log, row)) {
            tensor_name(&log->table, row, layer, name, sizeof name);
            text_add(t, ",train/gns/%s/norm,train/gns/%s/pegn,train/gns/%s/batch_size", name, name, name);
        }
    }
    text_add(t, ",iter_num");
    log->tokens_column = count_columns(t->data);
    text_add(t, ",tokens_processed");
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        const char* group = gns_group_name(g);
        text_add(t, ",gns/%s,gns/%s/se,gns/%s/gtg,gns/%s/trsigma", group, group, group, group);
    }
    text_add(t, ",batch_target,batch,skipped,val/hellaswag\n");
    log->columns = count_columns(t->data);
}

// fatal(), naming the first column that differs, unless the file starts with this run's header.
static inline void runlog_require_header(const RunLog* log, const char* text) {
    const char *found = text, *ours = log->row.data;
    for (int column = 1;; column++) {
        size_t n = strcspn(found, ",\n"), m = strcspn(ours, ",\n");
        if (n != m || strncmp(found, ours, n) != 0) {
            fatal(
                "'%s' cannot be continued: its column %d is '%.*s' where this run would write '%.*s'; resume with the "
                "model and the logging options that it was started with",
                log->path, column, (int)n, found, (int)m, ours);
        }
        if (found[n] == '\n' || ours[m] == '\n') {
            if (found[n] != ours[m]) {
                fatal("'%s' cannot be continued: it has %s columns than the %d that this run would write; resume with "
                      "the model and the logging options that it was started with",
                      log->path, found[n] == '\n' ? "fewer" : "more", log->columns);
            }
            return;
        }
        found += n + 1;
        ours += m + 1;
    }
}

// Whether a line (up to its newline) is a whole row of a step that ended at these tokens or before.
static inline bool runlog_row_stays(const RunLog* log, const char* line, int64_t tokens) {
    int column = 0;
    int64_t value = INT64_MAX;
    for (const char* p = line;; p++, column++) {
        if (column == log->tokens_column && *p >= '0' && *p <= '9') { value = strtoll(p, NULL, 10); }
        p += strcspn(p, ",\n");
        if (*p != ',') { break; }
    }
    return column + 1 == log->columns && value <= tokens;
}

// Reduces the log of an interrupted run to its header and its rows up to these tokens. False if there is no log.
static inline bool runlog_rewind(RunLog* log, int64_t tokens) {
    size_t length;
    char error[512];
    char* text = read_whole_file(log->path, &length);
    if (text == NULL && errno != ENOENT) { fatal("cannot read '%s': %s", log->path, strerror(errno)); }
    if (text == NULL || strchr(text, '\n') == NULL) { // also one that was killed before its header was whole
        warn("there is no log '%s' to continue: a new one starts at %" PRId64 " tokens", log->path, tokens);
        free(text);
        return false;
    }
    runlog_require_header(log, text);
    char *to = text + strcspn(text, "\n") + 1, *end;
    for (char* line = to; (end = strchr(line, '\n')) != NULL;
         line = end + 1) { // a line without an end is torn: dropped
        if (runlog_row_stays(log, line, tokens)) {
            memmove(to, line, (size_t)(end + 1 - line));
            to += end + 1 - line;
        }
    }
    if (!write_atomically(log->path, text, (size_t)(to - text), error, sizeof error)) {
        fatal("the log cannot be continued: %s", error);
    }
    free(text);
    return true;
}

// Opens the log of a model's run. tensors: which have columns of their own. tokens: the position that the run continues
// from (rows past it are removed), or -1: a new log, which replaces one that is there. fatal() if that cannot be done.
static inline void runlog_open(RunLog* log, const char* path, const GPTConfig* config, int tensors, int64_t tokens) {
    char error[512];
    memset(log, 0, sizeof *log);
    snprintf(log->path, sizeof log->path, "%s", path);
    log->table = param_table(config);
    log->tensors = tensors;
    runlog_make_header(log);
    bool continued = tokens >= 0 && runlog_rewind(log, tokens);
    if (!continued && !write_atomically(path, log->row.data, log->row.length, error, sizeof error)) {
        fatal("the log cannot be started: %s", error);
    }
    log->fd = open(path, O_WRONLY | O_APPEND);
    log->size = log->fd < 0 ? -1 : lseek(log->fd, 0, SEEK_END);
    if (log->size < 0) { fatal("cannot open '%s' for writing: %s", path, strerror(errno)); }
}

static inline void runlog_tensor_fields(RunLog* log, const StepStats* s) {
    for (int i = 0; i < log->table.num_tensors; i++) {
        int row, layer;
        tensor_at(&log->table, i, &row, &layer);
        if (!runlog_tracks(log, row)) { continue; }
        bool measured = gns_measures(s->gns, log->table.row[row].group);
        // One example is its own mean: both are the same number, also where two ways of summing it round differently.
        double norm = sqrt(s->sq_sum[i]) / s->n, pegn = s->n == 1 ? norm : sqrt(s->sum_sq[i] / s->n);
        row_number(&log->row, norm, 15);
        row_optional(&log->row, measured, pegn, 15);
        row_integer(&log->row, s->n);
    }
}

static inline void runlog_group_fields(RunLog* log, const LogRow* r) {
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        const GnsSample* sample = &r->samples[g];
        bool measured = gns_measures(r->stats->gns, g);
        bool known = measured && r->estimates[g].valid;
        row_optional(&log->row, known, r->estimates[g].gns, 9);
        row_optional(&log->row, known, r->estimates[g].se, 9);
        row_optional(&log->row, measured && sample->valid, sample->gtg, 9);
        row_optional(&log->row, measured && sample->valid, sample->trsigma, 9);
    }
}

// Appends the text in log->row with one write(). A failure is said once, and again only after it worked in between;
// what of the row did reach the file is cut off, so that the next row starts on a line of its own.
static inline void runlog_write(RunLog* log) {
    ssize_t n;
    do { n = io_fault("write") ? -1 : write(log->fd, log->row.data, log->row.length); } while (n < 0 && errno == EINTR);
    bool ok = n == (ssize_t)log->row.length;
    if (ok) {
        log->size += n;
    } else {
        if (!log->write_failing) {
            warn("cannot write to '%s': %s; training goes on, rows are missing until it works again", log->path,
                 n < 0 ? strerror(errno) : "the disk is full");
        }
        if (n > 0 && ftruncate(log->fd, log->size) != 0) {
            log->size += n; // a resume drops the torn row
        }
    }
    log->write_failing = !ok;
}

// Appends the step's row.
static inline void runlog_row(RunLog* log, const LogRow* r) {
    const StepStats* s = r->stats;
    Text* t = &log->row;
    t->length = 0;
    row_integer(t, r->step);
    row_optional(t, !isnan(r->train_loss), r->train_loss, 9);
    row_optional(t, !isnan(r->val_loss), r->val_loss, 9);
    row_number(t, r->dt, 9);
    row_number(t, r->tokens_per_sec, 9);
    row_optional(t, !isnan(r->mfu), r->mfu, 9);
    row_number(t, r->lr, 9);
    row_number(t, s->grad_norm, 9);
    row_integer(t, r->micro_batches);
    row_number(t, s->loss, 9);
    runlog_tensor_fields(log, s);
    row_integer(t, r->step);
    row_integer(t, r->tokens);
    runlog_group_fields(log, r);
    row_number(t, r->batch_target, 9);
    row_integer(t, s->n);
    row_integer(t, s->outcome);
    row_optional(t, !isnan(r->hellaswag), r->hellaswag, 9);
    text_add(t, "\n");
    runlog_write(log);
}

// Flushes the rows to the disk: before a checkpoint, so that after a power cut no row is missing up to it.
static inline void runlog_flush(RunLog* log) {
    if (io_fault("fsync") || fsync(log->fd) != 0) {
        warn("cannot flush '%s': %s; training goes on", log->path, strerror(errno));
    }
}

static inline void runlog_close(RunLog* log) {
    close(log->fd);
    free(log->row.data);
    memset(log, 0, sizeof *log);
    log->fd = -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// The console

// x with three significant digits and a unit: 0.5, 12, 999, 1.23K, 45.6M, 2.22B; into text, of 16 bytes or more.
static inline const char* format_count(char* text, size_t size, double x) {
    const char* const units[] = {"", "K", "M", "B", "T"};
    int unit = 0;
    while (fabs(x) >= 999.5 && unit < 4) {
        x /= 1000;
        unit++;
    }
    int decimals = fabs(x) >= 99.95 ? 0 : fabs(x) >= 9.995 ? 1 : 2;
    if (unit == 0 && x == floor(x)) { decimals = 0; }
    snprintf(text, size, "%.*f%s", decimals, x, units[unit]);
    return text;
}

// A time in its two largest units: 45s, 3m20s, 1h02m, 2d03h; "--" if it is not known (negative, not finite).
static inline const char* format_duration(char* text, size_t size, double seconds) {
    if (!(seconds >= 0 && seconds < 1e15)) {
        snprintf(text, size, "--");
        return text;
    }
    long long s = (long long)(seconds + 0.5);
    if (s < 60) {
        snprintf(text, size, "%llds", s);
    } else if (s < 3600) {
        snprintf(text, size, "%lldm%02llds", s / 60, s % 60);
    } else if (s < 86400) {
        snprintf(text, size, "%lldh%02lldm", s / 3600, s / 60 % 60);
    } else {
        snprintf(text, size, "%lldd%02lldh", s / 86400, s / 3600 % 24);
    }
    return text;
}

// What the progress line smooths, over about 20 steps of this process. Starts as all zeros.
typedef struct {
    double loss, loss_weight; // EMA of the loss without bias: loss / loss_weight
    double tokens, seconds;   // EMAs; their ratio is the speed
} Progress;

static inline void progress_update(Progress* p, const LogRow* row) {
    const double w = 0.05;
    if (isfinite(row->stats->loss)) {
        p->loss += w * (row->stats->loss - p->loss);
        p->loss_weight += w * (1 - p->loss_weight);
    }
    p->tokens += w * (row->tokens_per_sec * row->dt - p->tokens);
    p->seconds += w * (row->dt - p->seconds);
}

// The line that the console shows for a step, without a newline. budget: tokens of the whole run; 0: unknown. MFU
// follows where it is known, and why the update was skipped where it was.
//   step 1200 | 13.3% | ETA 1h02m | loss 3.4123 (ema 3.4301) | lr 1.17e-03 | batch 64 | gns 41.3 +- 2.1 | 512K tok/s
static inline void progress_line(const Progress* p, const LogRow* row, double budget, char* line, size_t size) {
    static const char* const outcomes[] = {"", " | SKIPPED: not finite", " | SKIPPED: loss outlier",
                                           " | SKIPPED: gradient outlier"};
    char share[16] = "--", eta[32], ema[32] = "--", gns[64] = "--", speed[32], mfu[32] = "";
    double left = p->tokens > 0 && budget > 0 ? (budget - (double)row->tokens) * p->seconds / p->tokens : -1;
    if (budget > 0) { snprintf(share, sizeof share, "%.1f%%", 100 * (double)row->tokens / budget); }
    if (p->loss_weight > 0) { snprintf(ema, sizeof ema, "%.4f", p->loss / p->loss_weight); }
    const GnsEstimate* ln = &row->estimates[GNS_GROUP_LN];
    if (ln->valid) { snprintf(gns, sizeof gns, "%.1f +- %.1f", ln->gns, ln->se); }
    if (!isnan(row->mfu)) { snprintf(mfu, sizeof mfu, " | MFU %.1f%%", row->mfu); }
    snprintf(line, size,
             "step %" PRId64 " | %s | ETA %s | loss %.4f (ema %s) | lr %.2e | batch %d | gns %s | %s tok/s%s%s",
             row->step, share, format_duration(eta, sizeof eta, left), row->stats->loss, ema, row->lr, row->stats->n,
             gns, format_count(speed, sizeof speed, row->tokens_per_sec), mfu, outcomes[row->stats->outcome]);
}

#endif
