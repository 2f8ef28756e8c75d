/*
The closed loop: a batch size that follows the gradient noise scale, for --batch-schedule gns.

What the noise scale asks for, in sequences, is

    B*(g) = k (c g)^p        g: GNS of the LayerNorm tensors; k, p: --gns-scale, --gns-power;
                             c: the factor from LayerNorm to total, --gns-calibration, a number or measured in the run

and g comes with a standard error, SE(g) (llmc/gns.h). A measured c has one as well; then SE(g)/g is the root of the
sum of the squares of both relative errors. The rule, applied after every step:

    1. There is no control before CONTROL_MIN_ESTIMATES steps have been measured (steps that measured LayerNorm and
       total, if c is measured): B stays at batch_min. None in a step without a valid estimate either, nor once
       freeze_fraction of the learning rate's decay is over (the noise scale then rises by itself): B stays where it is.
    2. At rest, a rise starts once B*(g - 2 SE) > 1.1 B has held for a whole tau of tokens without a break; a fall, if
       may_fall, once B*(g + 2 SE) < B / 1.1 has.
    3. While rising, B goes towards B*(g), the central estimate of every step anew, by at most a factor of 1.25 per tau,
       that is 1.25^(tokens of the step / tau); the rise is over as soon as B >= B*(g). A fall is the mirror image: by
       at most a factor of 1/1.25 per tau, over as soon as B <= B*(g).
    4. B never leaves [batch_min, batch_max].

Why so: only evidence that is clear and lasts longer than the estimate's own memory sets B in motion (a long run looks
at the estimate often enough to meet a four sigma accident, but accidents are short), so that noise is no ratchet. Once
there is such evidence, the best guess of the right batch is the centre, not the lower end of the error bar.
*/
#ifndef LLMC_CONTROLLER_H
#define LLMC_CONTROLLER_H

#include "gns.h"
#include "state.h"
#include <math.h>

enum { CONTROL_MIN_ESTIMATES = 50 };

typedef struct {
    // Settings, filled in by the caller before controller_init().
    double scale, power;         // k, p
    double calibration;          // c; not read if measured_calibration
    bool measured_calibration;   // c comes from the tracker
    double batch_min, batch_max; // sequences
    double tau;                  // tokens
    double freeze_fraction;      // share of the learning rate's decay after which B is frozen; 1: never
    bool may_fall;
    // State.
    double batch;    // B: the target of the next step, before rounding
    int direction;   // +1 while rising, -1 while falling, 0 at rest
    double evidence; // tokens for which the condition of a rise (or, negative, of a fall) has held
} BatchController;

static inline void controller_init(BatchController* c) {
    c->batch = c->batch_min;
    c->direction = 0;
    c->evidence = 0;
}

// Brings B within its bounds. To be called after a resume: the bounds may have changed since, or the run that saved the
// state had no closed loop and its B is 0.
static inline void controller_bound(BatchController* c) { c->batch = fmin(fmax(c->batch, c->batch_min), c->batch_max); }

// B*(gns) before bounds. A noise scale below zero (the lower end of a wide error bar) asks for nothing.
static inline double controller_asks(const BatchController* c, double calibration, double gns) {
    return c->scale * pow(fmax(0, calibration * gns), c->power);
}

// After each step: the LayerNorm estimate, the tracker's calibration (read only if measured_calibration), the tokens
// of the step, and the share of the learning rate's decay that is over (lr_decay_done). c->batch is then the next
// step's target.
static inline void controller_update(BatchController* c, const GnsEstimate* ln, GnsCalibration measured,
                                     double step_tokens, double decay_done) {
    double factor = c->calibration, se = ln->se;
    bool known = ln->valid && ln->count >= CONTROL_MIN_ESTIMATES;
    if (c->measured_calibration) {
        known = known && measured.valid && measured.count >= CONTROL_MIN_ESTIMATES;
        factor = measured.value;
        se = known ? hypot(se, ln->gns * measured.se / measured.value) : 0;
    }
    bool frozen = decay_done > 0 && decay_done >= c->freeze_fraction;
    if (!known || frozen) { return; }
    if (c->direction == 0) {
        if (controller_asks(c, factor, ln->gns - 2 * se) > 1.1 * c->batch) {
            c->evidence = fmax(c->evidence, 0) + step_tokens;
        } else if (c->may_fall && controller_asks(c, factor, ln->gns + 2 * se) < c->batch / 1.1) {
            c->evidence = fmin(c->evidence, 0) - step_tokens;
        } else {
            c->evidence = 0;
        }
        if (fabs(c->evidence) >= c->tau) {
            c->direction = c->evidence > 0 ? 1 : -1;
            c->evidence = 0;
        }
    }
    double goal = fmin(fmax(controller_asks(c, factor, ln->gns), c->batch_min), c->batch_max);
    double most = pow(1.25, step_tokens / c->tau);
    if (c->direction > 0) {
        c->batch = fmax(c->batch, fmin(goal, c->batch * most));
        c->direction = c->batch < goal;
    } else if (c->direction < 0) {
        c->batch = fmin(c->batch, fmax(goal, c->batch / most));
        c->direction = -(c->batch > goal);
    }
}

static inline void controller_state(StateFile* s, BatchController* c) {
    state_f64(s, "controller.batch", &c->batch);
    state_int(s, "controller.direction", &c->direction);
    state_f64(s, "controller.evidence", &c->evidence);
}

#endif
