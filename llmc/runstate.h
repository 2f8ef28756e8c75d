/*
Where a run is: everything that must survive in a checkpoint besides the model, the optimizer and the backend's own state.

A state is that of a moment between two steps, after everything that was due there (evaluation, sample, row of the log):
what a resumed run does next is the next step. Times are no part of it: nothing that a run computes depends on them.
*/
#ifndef LLMC_RUNSTATE_H
#define LLMC_RUNSTATE_H

#include "controller.h"
#include "gns.h"
#include "outlier.h"
#include "runlog.h"
#include "state.h"

typedef struct {
    int64_t step;                               // steps done, skipped ones included
    int64_t tokens;                             // consumed in these steps
    int64_t sequences;                          // consumed: where the data stream goes on
    int64_t applied;                            // steps whose update was applied: Adam's step count
    int64_t skipped_nonfinite, skipped_outlier; // the other ones
    int bad_streak;                             // steps skipped in a row, up to now
    Progress progress;                          // the smoothed loss in it; its times start anew
    uint64_t sampler_rng;
    GnsTracker tracker;
    BatchController controller;
    OutlierDetector loss_z, grad_z;
} RunState;

// What the checkpoint's run and this one must have in common for the stream of sequences to go on.
typedef struct {
    int64_t seed, seq_len, vocab_size, train_tokens;
} RunIdentity;

// Writes the value; reading, an error unless the same value was written.
static inline void state_same(StateFile* s, const char* name, int64_t value, const char* what) {
    int64_t found = value;
    state_i64(s, name, &found);
    if (s->error[0] == '\0' && found != value) {
        snprintf(s->error, sizeof s->error, "the run that is resumed has %s %" PRId64 ", this command has %" PRId64,
                 what, found, value);
    }
}

static inline void run_state(StateFile* s, RunState* r, const RunIdentity* id) {
    state_same(s, "seed", id->seed, "--seed");
    state_same(s, "seq_len", id->seq_len, "--seq-len (-t)");
    state_same(s, "vocab_size", id->vocab_size, "a vocabulary of");
    state_same(s, "train_tokens", id->train_tokens, "training data (-i) whose size in tokens is");
    state_i64(s, "step", &r->step);
    state_i64(s, "tokens", &r->tokens);
    state_i64(s, "sequences", &r->sequences);
    state_i64(s, "applied", &r->applied);
    state_i64(s, "skipped_nonfinite", &r->skipped_nonfinite);
    state_i64(s, "skipped_outlier", &r->skipped_outlier);
    state_int(s, "bad_streak", &r->bad_streak);
    state_f64(s, "loss_ema", &r->progress.loss);
    state_f64(s, "loss_ema_weight", &r->progress.loss_weight);
    state_u64(s, "sampler_rng", &r->sampler_rng);
    gns_state(s, &r->tracker);
    controller_state(s, &r->controller);
    outlier_state(s, "loss_z", &r->loss_z);
    outlier_state(s, "grad_z", &r->grad_z);
}

#endif
