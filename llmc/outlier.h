/*
Outliers in a series (losses, gradient norms): how many standard deviations a value lies from the mean of the last
OUTLIER_WINDOW accepted values. Only finite values of steps that were applied enter the window, so that neither a NaN
nor a skipped spike can poison it; and as it holds only what came before, the limit is known before the step, so that
a device can decide by itself whether to apply the update. (llm.c's detector has the same window, but none of this.)

    z = (x - mean) / std            mean, std: over the window, std with 1/OUTLIER_WINDOW

Until the window is full, and while all its values are equal, there is no z-score: no value is then an outlier.
*/
#ifndef LLMC_OUTLIER_H
#define LLMC_OUTLIER_H

#include "state.h"
#include <math.h>

enum { OUTLIER_WINDOW = 128 };

typedef struct {
    double window[OUTLIER_WINDOW]; // the last accepted values, a ring
    int count;                     // values in it
    int next;                      // where the next one goes
} OutlierDetector;

static inline void outlier_init(OutlierDetector* d) { memset(d, 0, sizeof *d); }

// Mean and standard deviation of a full window; false if there is no z-score.
static inline bool outlier_moments(const OutlierDetector* d, double* mean, double* std) {
    if (d->count < OUTLIER_WINDOW) { return false; }
    double sum = 0, squares = 0;
    for (int i = 0; i < OUTLIER_WINDOW; i++) { sum += d->window[i]; }
    *mean = sum / OUTLIER_WINDOW;
    for (int i = 0; i < OUTLIER_WINDOW; i++) { squares += (d->window[i] - *mean) * (d->window[i] - *mean); }
    *std = sqrt(squares / OUTLIER_WINDOW);
    return *std > 0 && isfinite(*std);
}

// The z-score of x; 0 while there is none. That of a NaN is NaN.
static inline double outlier_z(const OutlierDetector* d, double x) {
    double mean, std;
    return outlier_moments(d, &mean, &std) ? (x - mean) / std : 0;
}

// The value whose z-score is z: what is above it is an outlier. INFINITY if z is 0 (off) or there is no z-score.
static inline double outlier_limit(const OutlierDetector* d, double z) {
    double mean, std;
    return z > 0 && outlier_moments(d, &mean, &std) ? mean + z * std : INFINITY;
}

// Enters the value of a step that was applied; what is not finite is ignored.
static inline void outlier_accept(OutlierDetector* d, double x) {
    if (!isfinite(x)) { return; }
    d->window[d->next] = x;
    d->next = (d->next + 1) % OUTLIER_WINDOW;
    d->count = min_int(d->count + 1, OUTLIER_WINDOW);
}

// prefix: which detector, e.g. "outlier.loss".
static inline void outlier_state(StateFile* s, const char* prefix, OutlierDetector* d) {
    char field[64];
    int count = d->count, next = d->next;
    snprintf(field, sizeof field, "%s.count", prefix);
    state_int(s, field, &count);
    snprintf(field, sizeof field, "%s.next", prefix);
    state_int(s, field, &next);
    if (!s->writing && s->error[0] == '\0' &&
        (count < 0 || count > OUTLIER_WINDOW || next < 0 || next >= OUTLIER_WINDOW)) {
        snprintf(s->error, sizeof s->error, "the fields '%.40s' are out of range", prefix);
        return;
    }
    for (int i = 0; i < OUTLIER_WINDOW; i++) {
        snprintf(field, sizeof field, "%s.%d", prefix, i);
        state_f64(s, field, &d->window[i]);
    }
    d->count = count;
    d->next = next;
}

#endif
