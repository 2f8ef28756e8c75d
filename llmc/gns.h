/*
The gradient noise scale (GNS) and its error bar, from norms that the backward pass yields on the way.

An example is one sequence of T tokens, g_b the gradient of its mean loss. Over the n examples of one optimizer step the
backend measures, tensor by tensor, sum_b |g_b|^2 and |sum_b g_b|^2. With m = mean_b |g_b|^2 and n2 = |mean_b g_b|^2,

    |G|^2     ~ gtg     = (n n2 - m) / (n - 1)          G: the true gradient
    tr(Sigma) ~ trsigma = (m - n2) / (1 - 1/n)          Sigma: the covariance of the g_b
    GNS = tr(Sigma) / |G|^2                             in examples; the "simple" noise scale B_simple

are unbiased (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1), add up to m exactly, and add over tensors: a
group's sample comes from the group's sums. On one step either may be negative; nothing is clipped.

Smoothing. Both components drift with the gradient's scale by orders of magnitude. Their ratio to m does not, so the
working quantity is the signal fraction of each step

    f_t = gtg / m,    -1/(n-1) <= f_t <= 1,    GNS = 1/f - 1

(bounded: no single step can throw the estimate far; as a ratio it is too small by 4/(n d) of itself at most, d
numbers in the group: nothing to a model). Its EMA forgets by tokens, has no seed and is bias-corrected:

    w_t = 1 - exp(-tokens/tau)         tokens: since the last sample, so that skipped or unmeasured steps age it as well
    F <- (1 - w) F + w f_t             W <- (1 - w) W + w                   f = F / W

Error bar. An f_t averages over n_t examples; its variance is taken to be v / n_t. Successive differences give v, and
a drift of f hardly enters them:

    d_t = (f_t - f_{t-1})^2 / (1/n_t + 1/n_{t-1})        v = EMA of d_t, weights GNS_VARIANCE_MEMORY times as long
    Q <- (1 - w)^2 Q + w^2 / n_t                          SE(f)^2 = v Q / W^2         SE(GNS) = SE(f) / f^2

So it is the error from the noise of single steps, of the noise scale about where the run is. Where |G|^2 itself wanders
from step to step it says too little: in runs of scripts/chinchilla.py's tiny (fixed, mean, const3), estimates four
smoothing lengths apart lie within 2 SE of the mean course of the seeds in 73 to 87% of cases.

Calibration. Where a step measured both the LayerNorm tensors and all of them, the pair's two fractions go into two
EMAs of their own (over the same steps, weights from the measured steps' own tokens, so that rare measurements average
over as many samples as the LayerNorm's own estimate does); the ratio GNS_total / GNS_ln is the measured factor from
one to the other.
*/
#ifndef LLMC_GNS_H
#define LLMC_GNS_H

#include "check.h"
#include "model.h"
#include "state.h"
#include <math.h>

// The first groups are the parameter table's; total is all tensors, total_nowte all but the tied token embedding.
enum {
    GNS_GROUP_LN = GROUP_LN,
    GNS_GROUP_ATTENTION = GROUP_ATTENTION,
    GNS_GROUP_MLP = GROUP_MLP,
    GNS_GROUP_WPE = GROUP_WPE,
    GNS_GROUP_WTE = GROUP_WTE,
    GNS_GROUP_TOTAL = NUM_PARAM_GROUPS,
    GNS_GROUP_TOTAL_NOWTE,
    NUM_GNS_GROUPS
};

enum { GNS_VARIANCE_MEMORY = 4 };

// The group's name in log.csv.
static inline const char* gns_group_name(int group) {
    static const char* const names[NUM_GNS_GROUPS] = {"ln", "attention", "mlp", "wpe", "wte", "total", "total_nowte"};
    return names[group];
}

// The raw components of one step, of one tensor or of a group; all zero where not valid.
typedef struct {
    bool valid; // two examples or more, everything finite, m > 0
    int n;      // examples
    double m;   // mean_b |g_b|^2
    double n2;  // |mean_b g_b|^2
    double gtg, trsigma;
} GnsSample;

// sum_sq = sum_b |g_b|^2, sq_sum = |sum_b g_b|^2 over n examples.
static inline GnsSample gns_sample(double sum_sq, double sq_sum, int n) {
    GnsSample s;
    memset(&s, 0, sizeof s);
    if (n < 2 || !isfinite(sum_sq) || !isfinite(sq_sum) || !(sum_sq > 0)) { return s; }
    s.n = n;
    s.m = sum_sq / n;
    s.n2 = sq_sum / n / n;
    s.gtg = (n * s.n2 - s.m) / (n - 1);
    s.trsigma = (s.m - s.n2) / (1 - 1.0 / n);
    s.valid = s.m > 0 && isfinite(s.gtg) && isfinite(s.trsigma);
    return s;
}

// The samples of all groups in a step, from sums over each group's tensors; not valid where the step did not measure.
static inline void gns_group_samples(const ParamTable* table, const StepStats* stats, GnsSample out[NUM_GNS_GROUPS]) {
    double sum_sq[NUM_GNS_GROUPS] = {0}, sq_sum[NUM_GNS_GROUPS] = {0};
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &table->row[r];
        for (int i = row->first; i < row->first + row->count; i++) {
            sum_sq[row->group] += stats->sum_sq[i];
            sq_sum[row->group] += stats->sq_sum[i];
        }
    }
    for (int g = 0; g < NUM_PARAM_GROUPS; g++) {
        sum_sq[GNS_GROUP_TOTAL] += sum_sq[g];
        sq_sum[GNS_GROUP_TOTAL] += sq_sum[g];
        if (g != GROUP_WTE) {
            sum_sq[GNS_GROUP_TOTAL_NOWTE] += sum_sq[g];
            sq_sum[GNS_GROUP_TOTAL_NOWTE] += sq_sum[g];
        }
    }
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        bool measured = gns_measures(stats->gns, g);
        out[g] = gns_sample(sum_sq[g], sq_sum[g], measured ? stats->n : 0);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Smoothing

// The EMA of one signal fraction; the letters are those of the comment at the top.
typedef struct {
    int64_t count;            // samples so far
    double F, W, Q;           // sum of w f, of w, of w^2/n
    double V, VW;             // sum of the variance's weights times d, and of these weights: v = V / VW
    double last_f, last_n;    // the sample before
    double unmeasured_tokens; // since that sample
} FractionEma;

typedef struct {
    double tau;                        // tokens over which an estimate forgets
    FractionEma group[NUM_GNS_GROUPS]; // one a group
    FractionEma pair[2];               // LayerNorm and total from the steps that measured both: the calibration
} GnsTracker;

static inline void gns_tracker_init(GnsTracker* t, double tau_tokens) {
    memset(t, 0, sizeof *t);
    t->tau = tau_tokens;
}

static inline void fraction_add(FractionEma* e, const GnsSample* s, double tokens, double tau) {
    double f = s->gtg / s->m, n = s->n;
    double w = -expm1(-tokens / tau), keep = 1 - w;
    if (e->count > 0) {
        double wv = -expm1(-tokens / (GNS_VARIANCE_MEMORY * tau));
        double d = (f - e->last_f) * (f - e->last_f) / (1 / n + 1 / e->last_n);
        e->V = (1 - wv) * e->V + wv * d;
        e->VW = (1 - wv) * e->VW + wv;
    }
    e->F = keep * e->F + w * f;
    e->W = keep * e->W + w;
    e->Q = keep * keep * e->Q + w * w / n;
    e->last_f = f;
    e->last_n = n;
    e->count++;
}

// After each step: what it measured and how many tokens it consumed. samples is NULL for a step that was not applied:
// its tokens pass, nothing is learned from it.
static inline void gns_tracker_update(GnsTracker* t, const GnsSample samples[NUM_GNS_GROUPS], double step_tokens) {
    for (int g = 0; g < NUM_GNS_GROUPS; g++) {
        FractionEma* e = &t->group[g];
        e->unmeasured_tokens += step_tokens;
        if (samples != NULL && samples[g].valid) {
            fraction_add(e, &samples[g], e->unmeasured_tokens, t->tau);
            e->unmeasured_tokens = 0;
        }
    }
    if (samples != NULL && samples[GNS_GROUP_LN].valid && samples[GNS_GROUP_TOTAL].valid) {
        fraction_add(&t->pair[0], &samples[GNS_GROUP_LN], step_tokens, t->tau);
        fraction_add(&t->pair[1], &samples[GNS_GROUP_TOTAL], step_tokens, t->tau);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Estimates

typedef struct {
    bool valid;         // two samples or more and a fraction above zero; otherwise gns and se are 0
    double gns, se;     // in examples; one standard error
    double fraction;    // f and its standard error: 0 before there are two samples
    double fraction_se; //
    int64_t count;      // samples so far
} GnsEstimate;

static inline GnsEstimate fraction_estimate(const FractionEma* e) {
    GnsEstimate r;
    memset(&r, 0, sizeof r);
    r.count = e->count;
    if (e->count < 2 || !(e->W > 0) || !(e->VW > 0)) { return r; }
    r.fraction = e->F / e->W;
    r.fraction_se = sqrt(e->V / e->VW * e->Q) / e->W;
    double gns = fmax(0, 1 / r.fraction - 1); // rounding alone can take f above 1
    double se = r.fraction_se / (r.fraction * r.fraction);
    if (r.fraction > 0 && isfinite(gns) && isfinite(se)) {
        r.valid = true;
        r.gns = gns;
        r.se = se;
    }
    return r;
}

// The working estimate of a group. Never NaN or Inf.
static inline GnsEstimate gns_estimate(const GnsTracker* t, int group) { return fraction_estimate(&t->group[group]); }

// GNS_total / GNS_ln as measured; value 0 while unknown.
typedef struct {
    bool valid;
    double value,
        se;        // the factor, one standard error (the two errors taken as independent, which errs on the wide side)
    int64_t count; // steps that measured both
} GnsCalibration;

static inline GnsCalibration gns_calibration(const GnsTracker* t) {
    GnsEstimate ln = fraction_estimate(&t->pair[0]), total = fraction_estimate(&t->pair[1]);
    GnsCalibration c;
    memset(&c, 0, sizeof c);
    c.count = t->pair[0].count;
    if (ln.valid && total.valid && ln.gns > 0 && total.gns > 0) {
        double value = total.gns / ln.gns, se = value * hypot(total.se / total.gns, ln.se / ln.gns);
        if (isfinite(value) && isfinite(se)) {
            c.valid = true;
            c.value = value;
            c.se = se;
        }
    }
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoint

static inline void fraction_state(StateFile* s, const char* name, FractionEma* e) {
    char field[64];
    double* const values[] = {&e->F, &e->W, &e->Q, &e->V, &e->VW, &e->last_f, &e->last_n, &e->unmeasured_tokens};
    const char* const names[] = {"F", "W", "Q", "V", "VW", "last_f", "last_n", "unmeasured_tokens"};
    snprintf(field, sizeof field, "gns.%s.count", name);
    state_i64(s, field, &e->count);
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        snprintf(field, sizeof field, "gns.%s.%s", name, names[i]);
        state_f64(s, field, values[i]);
    }
}

// The state without the settings: tau is that of gns_tracker_init().
static inline void gns_state(StateFile* s, GnsTracker* t) {
    for (int g = 0; g < NUM_GNS_GROUPS; g++) { fraction_state(s, gns_group_name(g), &t->group[g]); }
    fraction_state(s, "pair_ln", &t->pair[0]);
    fraction_state(s, "pair_total", &t->pair[1]);
}

#endif
