/*
--dry-run: the schedule that a run would follow, as a table of tokens, steps, batch and learning rate, worked out step by
step with the function that the training loop uses, without data and without training.

The closed loop's batch depends on the gradients. What can be known of it beforehand is shown instead: its bounds, and the
numbers of steps that they mean.
*/
#ifndef LLMC_DRYRUN_H
#define LLMC_DRYRUN_H

#include "plan.h"
#include <inttypes.h>

// The whole number x with a comma before every three digits.
static inline const char* with_commas(int64_t x, char text[32]) {
    char digits[24];
    int n = snprintf(digits, sizeof digits, "%" PRId64, x), used = 0;
    for (int i = 0; i < n; i++) {
        text[used++] = digits[i];
        if ((n - 1 - i) % 3 == 0 && i < n - 1 && digits[i] != '-') { text[used++] = ','; }
    }
    text[used] = '\0';
    return text;
}

static inline void dry_run_row(const StepPlan* s, int64_t step, int64_t tokens, double budget) {
    char a[32], b[32];
    printf("%18s %10s %7.1f%% %9d %11.3e\n", with_commas(tokens, a), with_commas(step, b),
           100 * (double)tokens / budget, s->n, s->lr);
}

static inline void dry_run_total(int64_t step, int64_t tokens, int T) {
    char a[32], b[32];
    double batch = (double)tokens / (double)step / T;
    printf("\n%s steps, %s tokens, mean batch %.1f sequences = %.0f tokens\n", with_commas(step, a),
           with_commas(tokens, b), batch, batch * T);
}

// Steps of n sequences that reach the budget.
static inline int64_t steps_at(const Plan* p, int n) { return (int64_t)ceil(p->budget / ((double)n * p->T)); }

// The closed loop: the learning rate over tokens, and what its bounds mean.
static inline void dry_run_closed_loop(Plan* p, const Options* o) {
    char a[32], b[32], c[32];
    printf("%18s %8s %11s\n", "tokens", "budget", "lr");
    for (int i = 0; i <= 10; i++) {
        int64_t tokens = (int64_t)(p->budget * i / 10);
        printf("%18s %7.1f%% %11.3e\n", with_commas(tokens, a), 10.0 * i, lr_at(&p->lr, (double)tokens));
    }
    const int low = batch_round(o->batch_min, o->batch_quantum), high = batch_round(o->batch_max, o->batch_quantum);
    printf("\nThe batch follows the measured noise scale: it starts at %d sequences and stays within %d to %d, so the\n"
           "budget of %s tokens takes %s to %s steps.%s\n",
           low, low, high, with_commas((int64_t)p->budget, a), with_commas(steps_at(p, high), b),
           with_commas(steps_at(p, low), c),
           o->lr_coupling > 0 ? " The learning rate is then scaled by the batch (--lr-coupling)." : "");
}

// Prints the schedule; the exit status.
static inline int dry_run(Plan* p, const Options* o) {
    if (p->closed_loop) {
        dry_run_closed_loop(p, o);
        return 0;
    }
    printf("%18s %10s %8s %9s %11s\n", "tokens", "step", "budget", "batch", "lr");
    int64_t step = 0, tokens = 0;
    for (int row = 0; (double)tokens < p->budget; step++) {
        StepPlan s = plan_step(p, o, step, tokens, 0);
        const int64_t after = tokens + (int64_t)s.n * p->T;
        if ((double)tokens >= p->budget * row / 10 || (double)after >= p->budget) { // every tenth, and the last step
            dry_run_row(&s, step, tokens, p->budget);
            row = (int)((double)tokens * 10 / p->budget) + 1;
        }
        tokens = after;
    }
    dry_run_total(step, tokens, p->T);
    return 0;
}

#endif
