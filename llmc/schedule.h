/*
Schedules by tokens: the learning rate, the batch size, and how other hyperparameters may follow the batch size. The
clock is the number of tokens consumed before the step. (A batch that follows the noise scale is controller.h's work.)

Learning rate, of a budget of D tokens with a warm-up of W: max_lr * tokens / W while tokens < W (the first step has
0), then with u = the share of the decay that is over and F = final_frac

    constant  max_lr
    cosine    max_lr * (F + (1 - F) (1 + cos(pi u)) / 2)       u from W to D
    linear    max_lr * (F + (1 - F) (1 - u))                   u from W to D
    wsd       max_lr * (F + (1 - F) (1 - sqrt(u)))             u over the last decay_frac of D; constant before

Batch size, in sequences, as the text of --batch-schedule:

    fixed                         the size of --batch-tokens throughout
    linear:FROM:TO                linear in tokens from FROM at 0 to TO at D
    steps:0:64,100M:128,...       threshold:size pairs, the first threshold 0; a size holds from its threshold on
    file:PATH[:UNIT]              a text file, looked at anew before every step: edit it while the run goes on. A line,
                                      tokens, size
                                  is a knot (a comma or blanks between them; # starts a comment; empty lines are
                                  skipped), tokens increasing; linear between the knots, constant outside. One size
                                  stands for UNIT sequences (default 1), so that a file of accumulation steps of 8
                                  sequences is read with :8.
    gns                           closed loop

Numbers are those of units.h: 100M, 2_000_000, 1.5B. A linear schedule and a file of knots are one thing, a step
function differs in what lies between two knots, and a fixed size is a single knot: one list of knots holds all of them.
*/
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include "check.h"
#include "units.h"
#include <math.h>

// ---------------------------------------------------------------------------------------------------------------------
// Learning rate

enum { LR_CONSTANT, LR_COSINE, LR_LINEAR, LR_WSD };

typedef struct {
    int kind; // LR_*
    double max_lr;
    double final_frac; // the last learning rate over max_lr; 0: decay to zero
    double warmup_tokens, budget_tokens;
    double decay_frac; // wsd: the share of the budget that decays
} LrSchedule;

// The share of the decay that is over, 0 to 1; a constant learning rate has none.
static inline double lr_decay_done(const LrSchedule* s, double tokens) {
    if (s->kind == LR_CONSTANT) { return 0; }
    double start = s->warmup_tokens;
    if (s->kind == LR_WSD) { start = fmax(start, s->budget_tokens * (1 - s->decay_frac)); }
    if (tokens >= s->budget_tokens) { return 1; }
    return tokens <= start ? 0 : (tokens - start) / (s->budget_tokens - start);
}

static inline double lr_at(const LrSchedule* s, double tokens) {
    if (tokens < s->warmup_tokens && tokens < s->budget_tokens) { return s->max_lr * tokens / s->warmup_tokens; }
    double u = lr_decay_done(s, tokens), left = 1; // left: of the way from the last learning rate up to the largest
    switch (s->kind) {
    case LR_COSINE: left = u < 1 ? (1 + cos(M_PI * u)) / 2 : 0; break;
    case LR_LINEAR: left = 1 - u; break;
    case LR_WSD: left = 1 - sqrt(u); break;
    default: break;
    }
    return s->max_lr * (s->final_frac + (1 - s->final_frac) * left);
}

// ---------------------------------------------------------------------------------------------------------------------
// Couplings to the batch size

// What lr is at this batch if it belongs to batch_ref: lr * (batch/batch_ref)^power.
static inline double coupled_lr(double lr, double batch, double batch_ref, double power) {
    return lr * pow(batch / batch_ref, power);
}

// The same for the weight decay.
static inline double coupled_weight_decay(double wd, double batch, double batch_ref, double power) {
    return wd * pow(batch / batch_ref, power);
}

// The beta2 with which Adam's second moment halves in half_life_tokens, whatever the step:
// 2^(-step_tokens/half_life_tokens).
static inline double beta2_from_half_life(double half_life_tokens, double step_tokens) {
    return exp2(-step_tokens / half_life_tokens);
}

// ---------------------------------------------------------------------------------------------------------------------
// Batch size

enum { BATCH_FIXED, BATCH_LINEAR, BATCH_STEPS, BATCH_FILE, BATCH_GNS };
enum { MAX_BATCH = 1 << 24 }; // sequences

typedef struct {
    double tokens, size;
} BatchKnot;

typedef struct {
    int kind;         // BATCH_*
    BatchKnot* knots; // (num_knots) by tokens; none for gns
    int num_knots;
    // file only
    char* path;
    double unit; // sequences that one size stands for
    char* seen;  // the file's text when it was last looked at, good or bad; NULL: it could not be read
    char error[512];
} BatchSchedule;

// Appends a knot; false, with the message in s->error, if it is out of range or out of order. line 0: not from a file.
static inline bool batch_add_knot(BatchSchedule* s, double tokens, double size, int line) {
    char where[32] = "";
    if (line > 0) { snprintf(where, sizeof where, "line %d: ", line); }
    if (!(size > 0 && size <= MAX_BATCH)) {
        snprintf(s->error, sizeof s->error, "%sa batch of %g sequences; expected more than 0 and at most %d", where,
                 size, MAX_BATCH);
        return false;
    }
    if (s->num_knots > 0 && !(tokens > s->knots[s->num_knots - 1].tokens)) {
        snprintf(s->error, sizeof s->error, "%sthe token counts must increase, but %.0f follows %.0f", where, tokens,
                 s->knots[s->num_knots - 1].tokens);
        return false;
    }
    BatchKnot* more = (BatchKnot*)realloc(s->knots, (size_t)(s->num_knots + 1) * sizeof(BatchKnot));
    if (more == NULL) { fatal("out of memory: a batch schedule of %d knots", s->num_knots + 1); }
    s->knots = more;
    s->knots[s->num_knots].tokens = tokens;
    s->knots[s->num_knots].size = size;
    s->num_knots++;
    return true;
}

static inline const char* skip_blanks(const char* p) { return p + strspn(p, " \t\r"); }

// One line of a file: a knot, or nothing (*empty). False if it is neither.
static inline bool batch_parse_line(const char* p, bool* empty, double* tokens, double* size) {
    p = skip_blanks(p);
    *empty = *p == '\0' || *p == '\n' || *p == '#';
    if (*empty) { return true; }
    const char* gap = scan_count(p, tokens);
    if (gap == NULL) { return false; }
    p = skip_blanks(gap);
    p = skip_blanks(*p == ',' ? p + 1 : p);
    if (p == gap || (p = scan_count(p, size)) == NULL) { return false; }
    p = skip_blanks(p);
    return *p == '\0' || *p == '\n' || *p == '#';
}

// The knots of a file's text; false, with the message in s->error, at the first fault.
static inline bool batch_parse_text(BatchSchedule* s, const char* text) {
    int line = 1;
    for (const char* p = text; *p != '\0'; line++) {
        const int length = (int)strcspn(p, "\n");
        double tokens, size;
        bool empty;
        if (!batch_parse_line(p, &empty, &tokens, &size)) {
            snprintf(s->error, sizeof s->error, "line %d: expected 'tokens, size', found '%.*s'", line,
                     min_int(length, 60), p);
            return false;
        }
        if (!empty && !batch_add_knot(s, tokens, size * s->unit, line)) { return false; }
        p += length + (p[length] == '\n');
    }
    if (s->num_knots == 0) { snprintf(s->error, sizeof s->error, "no knots; expected lines 'tokens, size'"); }
    return s->num_knots > 0;
}

// Looks at the file. If its text has changed since the last look: takes its knots, or, if it is bad, keeps the last
// good ones and returns false with the message in s->error. True where nothing has changed.
static inline bool batch_read_file(BatchSchedule* s, bool first) {
    size_t length = 0;
    char* text = read_whole_file(s->path, &length);
    int reason = errno;
    bool same = text == NULL ? s->seen == NULL : s->seen != NULL && strcmp(text, s->seen) == 0;
    if (same && !first) {
        free(text);
        return true;
    }
    free(s->seen);
    s->seen = text;
    if (text == NULL) {
        snprintf(s->error, sizeof s->error, "cannot read it: %s", strerror(reason));
        return false;
    }
    BatchKnot* good = s->knots;
    const int num_good = s->num_knots;
    s->knots = NULL;
    s->num_knots = 0;
    bool fine = false;
    if (strlen(text) == length) {
        fine = batch_parse_text(s, text);
    } else {
        snprintf(s->error, sizeof s->error, "not a text file");
    }
    if (!fine) {
        free(s->knots);
        s->knots = good;
        s->num_knots = num_good;
        return false;
    }
    free(good);
    return true;
}

// file:PATH[:UNIT], what follows the first colon. A last part that is a number is the unit.
static inline bool batch_parse_file(BatchSchedule* s, const char* rest) {
    s->path = copy_string(rest);
    char* colon = strrchr(s->path, ':');
    if (colon != NULL && parse_count(colon + 1, &s->unit)) { *colon = '\0'; }
    return batch_read_file(s, true);
}

// FROM:TO, or the pairs of a step function.
static inline bool batch_parse_pairs(BatchSchedule* s, const char* p, double budget_tokens) {
    const bool linear = s->kind == BATCH_LINEAR;
    do {
        double a, b;
        p = scan_count(p, &a);
        p = p != NULL && *p == ':' ? scan_count(p + 1, &b) : NULL;
        if (p == NULL || !(*p == '\0' || (*p == ',' && !linear))) {
            snprintf(s->error, sizeof s->error, "expected %s",
                     linear ? "'linear:FROM:TO', sizes in sequences, e.g. linear:16:120"
                            : "'steps:TOKENS:SIZE,TOKENS:SIZE,...', e.g. steps:0:64,100M:128");
            return false;
        }
        if (linear && !(budget_tokens > 0)) {
            snprintf(s->error, sizeof s->error, "a linear schedule needs a budget of tokens");
            return false;
        }
        if (!linear && s->num_knots == 0 && a != 0) {
            snprintf(s->error, sizeof s->error, "the first threshold of a step schedule must be 0, not %g", a);
            return false;
        }
        if (linear ? !batch_add_knot(s, 0, a, 0) || !batch_add_knot(s, budget_tokens, b, 0)
                   : !batch_add_knot(s, a, b, 0)) {
            return false;
        }
    } while (*p++ == ',');
    return true;
}

// Fills in *s from the text of --batch-schedule (see the top). fixed_size: sequences of --batch-tokens;
// budget_tokens: for linear. NULL if that worked, else what is wrong (lies in *s); the caller frees *s in both cases.
static inline const char* batch_schedule_parse(BatchSchedule* s, const char* spec, double fixed_size,
                                               double budget_tokens) {
    memset(s, 0, sizeof *s);
    s->unit = 1;
    bool fine;
    if (strcmp(spec, "fixed") == 0) {
        s->kind = BATCH_FIXED;
        fine = batch_add_knot(s, 0, fixed_size, 0);
    } else if (strcmp(spec, "gns") == 0) {
        s->kind = BATCH_GNS;
        fine = true;
    } else if (strncmp(spec, "linear:", 7) == 0) {
        s->kind = BATCH_LINEAR;
        fine = batch_parse_pairs(s, spec + 7, budget_tokens);
    } else if (strncmp(spec, "steps:", 6) == 0) {
        s->kind = BATCH_STEPS;
        fine = batch_parse_pairs(s, spec + 6, budget_tokens);
    } else if (strncmp(spec, "file:", 5) == 0) {
        s->kind = BATCH_FILE;
        fine = batch_parse_file(s, spec + 5);
    } else {
        fine = false;
        snprintf(s->error, sizeof s->error,
                 "expected fixed, linear:FROM:TO, steps:0:SIZE,TOKENS:SIZE,..., file:PATH[:UNIT] or gns");
    }
    return fine ? NULL : s->error;
}

// Sequences in the step that begins at this position, before rounding. A file that was changed is read anew; a bad
// edit is reported once, and the last good schedule kept. Not for BATCH_GNS, whose size is the controller's.
static inline double batch_schedule_at(BatchSchedule* s, double tokens) {
    if (s->kind == BATCH_FILE && !batch_read_file(s, false)) {
        warn("the batch schedule's file '%s': %s; going on with the last good schedule", s->path, s->error);
    }
    int i = s->num_knots - 1; // the last knot at or before tokens
    while (i > 0 && s->knots[i].tokens > tokens) { i--; }
    const BatchKnot* a = &s->knots[i];
    if (s->kind == BATCH_STEPS || i == s->num_knots - 1 || tokens <= a->tokens) { return a->size; }
    return a->size + (a[1].size - a->size) * (tokens - a->tokens) / (a[1].tokens - a->tokens);
}

// The realised batch: target rounded up to a multiple of quantum, at least one quantum. What exceeds a multiple by no
// more than the rounding errors of the interpolation does not count.
static inline int batch_round(double target, int quantum) {
    double multiples = ceil(target / quantum * (1 - 1e-12));
    return (int)fmax(multiples, 1) * quantum;
}

static inline void batch_schedule_free(BatchSchedule* s) {
    free(s->knots);
    free(s->path);
    free(s->seen);
    memset(s, 0, sizeof *s);
}

#endif
