// Tests of llmc/controller.h: the rule on made-up estimates, the closed loop on the toy, whose right batch is known.
#include "llmc/controller.h"
#include "dev/test/test.h"
#include "dev/test/toy.h"

static BatchController controller(double batch_min, double batch_max, double tau) {
    BatchController c;
    memset(&c, 0, sizeof c);
    c.scale = c.power = c.calibration = c.freeze_fraction = 1;
    c.batch_min = batch_min;
    c.batch_max = batch_max;
    c.tau = tau;
    controller_init(&c);
    return c;
}

static GnsEstimate estimate(double gns, double se) {
    GnsEstimate e;
    memset(&e, 0, sizeof e);
    e.valid = true;
    e.gns = gns;
    e.se = se;
    e.count = 1000;
    return e;
}

static const GnsCalibration UNKNOWN = {false, 0, 0, 0};

static void update(BatchController* c, double gns, double se, int times) {
    GnsEstimate e = estimate(gns, se);
    for (int i = 0; i < times; i++) { controller_update(c, &e, UNKNOWN, 10, 0); }
}

// ---------------------------------------------------------------------------------------------------------------------
// The rule

// tau is 10 steps of 10 tokens: evidence for 10 steps, then at most a quarter in 10 steps.
static void test_rise(void) {
    BatchController c = controller(8, 1000, 100);
    CHECK(c.batch == 8);
    update(&c, 100, 5, 9);
    CHECK(c.batch == 8);
    update(&c, 100, 5, 1);
    CHECK_CLOSE(c.batch, 8 * pow(1.25, 0.1), 1e-12);
    update(&c, 100, 5, 9);
    CHECK_CLOSE(c.batch, 10, 1e-12);
    update(&c, 100, 5, 10);
    CHECK_CLOSE(c.batch, 12.5, 1e-12);
    update(&c, 14, 5, 10); // the goal moves while B rises; its lower end does not matter then
    CHECK(c.batch == 14 && c.direction == 0);
    update(&c, 14, 0.01, 100);
    CHECK(c.batch == 14);
    update(&c, 10, 0.01, 100); // and nothing falls unless it may
    CHECK(c.batch == 14);
}

// Only evidence that is clear, and lasts, counts.
static void test_evidence(void) {
    BatchController c = controller(10, 1000, 100);
    update(&c, 13, 1.01, 1000); // 13 - 2.02 < 1.1 * 10
    CHECK(c.batch == 10);
    update(&c, 10.9, 0, 1000);
    CHECK(c.batch == 10);
    update(&c, 5, 100, 1000); // GNS - 2 SE below zero
    CHECK(c.batch == 10);
    for (int i = 0; i < 100; i++) { // never ten steps without a break
        update(&c, 20, 1, 9);
        update(&c, 11, 1, 1);
    }
    CHECK(c.batch == 10);
    update(&c, 13, 0.99, 10);
    CHECK(c.batch > 10);
}

static void test_no_control(void) {
    BatchController c = controller(8, 1000, 100);
    GnsEstimate e = estimate(100, 1);
    for (e.count = 1; e.count < 50; e.count++) { controller_update(&c, &e, UNKNOWN, 1000, 0); }
    CHECK(c.batch == 8);
    e.valid = false;
    e.gns = e.se = 0;
    e.count = 1000;
    controller_update(&c, &e, UNKNOWN, 1000, 0);
    CHECK(c.batch == 8);
    e = estimate(100, 1);
    e.count = 50;
    controller_update(&c, &e, UNKNOWN, 1000, 0);
    CHECK(c.batch > 8);
}

static void test_fall(void) {
    BatchController c = controller(8, 1000, 100);
    c.may_fall = true;
    c.batch = 100;
    update(&c, 80, 5.5, 1000); // 80 + 11 > 100 / 1.1
    CHECK(c.batch == 100);
    update(&c, 70, 1, 9);
    CHECK(c.batch == 100);
    update(&c, 70, 1, 1);
    CHECK_CLOSE(c.batch, 100 / pow(1.25, 0.1), 1e-12);
    update(&c, 70, 1, 9);
    CHECK_CLOSE(c.batch, 80, 1e-12);
    update(&c, 70, 1, 90);
    CHECK(c.batch == 70 && c.direction == 0);
    // Rising and falling evidence do not add up.
    update(&c, 50, 1, 9);
    update(&c, 100, 1, 9);
    CHECK(c.batch == 70);
}

static void test_bounds(void) {
    BatchController c = controller(8, 32, 100);
    c.may_fall = true;
    update(&c, 1e6, 1, 1000);
    CHECK(c.batch == 32);
    update(&c, 1e300, 1, 1000);
    CHECK(c.batch == 32);
    update(&c, 0, 0, 1000);
    CHECK(c.batch == 8);
    c.scale = 1e300;
    c.power = 4;
    update(&c, 1e300, 1, 1000); // asks for infinity
    CHECK(c.batch == 32);
}

// k (c g)^p, and the same for the lower end of the error bar.
static void test_what_is_asked(void) {
    BatchController c = controller(2, 1000, 100);
    c.scale = 3;
    c.power = 0.5;
    c.calibration = 1.44;
    update(&c, 100, 1, 1000);
    CHECK_CLOSE(c.batch, 3 * 12, 1e-12);
    c = controller(10, 1000, 100);
    c.power = 0.5;
    update(&c, 100 * 1.21 + 2, 1.01, 100); // sqrt(121 - 0.02) < 1.1 * 10
    CHECK(c.batch == 10);
    update(&c, 100 * 1.21 + 2, 0.99, 100);
    CHECK_CLOSE(c.batch, sqrt(123), 1e-12);
}

// A measured calibration: no control while it is unknown or young; its error widens the bar.
static void test_measured_calibration(void) {
    BatchController c = controller(8, 1000, 100);
    c.measured_calibration = true;
    c.calibration = 1;
    GnsEstimate e = estimate(10, 0.3);
    GnsCalibration m = {true, 2, 0.08, 49};
    for (int i = 0; i < 100; i++) {
        controller_update(&c, &e, UNKNOWN, 10, 0);
        controller_update(&c, &e, m, 10, 0);
    }
    CHECK(c.batch == 8);
    m.count = 50;
    for (int i = 0; i < 200; i++) { controller_update(&c, &e, m, 10, 0); }
    CHECK_CLOSE(c.batch, 20, 1e-12);
    // Relative errors of 3% and 4% make 5%: 2 * 12.3 * (1 - 0.1) > 22 > 2 * 12.2 * (1 - 0.1).
    e = estimate(12.2, 0.03 * 12.2);
    for (int i = 0; i < 200; i++) { controller_update(&c, &e, m, 10, 0); }
    CHECK_CLOSE(c.batch, 20, 1e-12);
    e = estimate(12.3, 0.03 * 12.3);
    for (int i = 0; i < 200; i++) { controller_update(&c, &e, m, 10, 0); }
    CHECK_CLOSE(c.batch, 24.6, 1e-12);
    e = estimate(0, 0);
    controller_update(&c, &e, m, 10, 0);
    CHECK_CLOSE(c.batch, 24.6, 1e-12);
}

static void test_freeze(void) {
    BatchController c = controller(8, 1000, 100);
    c.freeze_fraction = 0.5;
    GnsEstimate e = estimate(100, 1);
    for (int i = 0; i < 20; i++) { controller_update(&c, &e, UNKNOWN, 10, 0.499); }
    double batch = c.batch;
    CHECK(batch > 8 && c.direction == 1);
    for (int i = 0; i < 200; i++) { controller_update(&c, &e, UNKNOWN, 10, 0.5 + i * 0.0025); }
    CHECK(c.batch == batch);
    c = controller(8, 1000, 100); // 0: frozen as soon as the decay begins, not before
    c.freeze_fraction = 0;
    for (int i = 0; i < 10; i++) { controller_update(&c, &e, UNKNOWN, 10, 0); }
    CHECK(c.batch > 8);
}

static void test_state(void) {
    BatchController c = controller(8, 1000, 100), read = controller(8, 1000, 100);
    for (int stage = 0; stage < 2; stage++) { // gathering evidence, and on the way up
        update(&c, 100, 1, 6);
        StateFile out, in;
        memset(&out, 0, sizeof out);
        out.writing = true;
        controller_state(&out, &c);
        memset(&in, 0, sizeof in);
        in.text = out.text;
        controller_state(&in, &read);
        CHECK_STR(in.error, "");
        CHECK(memcmp(&c, &read, sizeof c) == 0);
        free(out.text);
    }
    CHECK(c.direction == 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// The closed loop on the toy

typedef struct {
    Backend backend;
    Toy* toy;
    StepStats stats;
    GnsTracker tracker;
    BatchController c;
    int rises; // times that a rise began
} Loop;

static void loop_open(Loop* l, double gns, uint64_t seed, double batch_min, double tau) {
    GPTConfig config = toy_config();
    memset(l, 0, sizeof *l);
    const BackendOptions options = backend_options(64, TOY_T);
    toy_open(&l->backend, &config, &options);
    l->toy = (Toy*)l->backend.self;
    l->toy->seed = seed;
    for (int g = 0; g < NUM_PARAM_GROUPS; g++) { l->toy->noise[g] = gns; }
    l->stats = toy_stats(&l->toy->table);
    gns_tracker_init(&l->tracker, tau);
    l->c = controller(batch_min, 1000, tau);
}

static void loop_step(Loop* l) {
    const int n = (int)ceil(l->c.batch), before = l->c.direction;
    GnsSample s[NUM_GNS_GROUPS];
    toy_run_step(&l->backend, n, GNS_LN, &l->stats);
    gns_group_samples(&l->toy->table, &l->stats, s);
    gns_tracker_update(&l->tracker, s, n * TOY_T);
    GnsEstimate ln = gns_estimate(&l->tracker, GNS_GROUP_LN);
    const double batch = l->c.batch;
    controller_update(&l->c, &ln, gns_calibration(&l->tracker), n * TOY_T, 0);
    l->rises += before <= 0 && l->c.direction > 0;
    if (l->c.batch > batch * pow(1.25, n * TOY_T / l->c.tau) * (1 + 1e-12)) {
        CHECK(!"B rises by at most a quarter per tau");
    }
}

static void loop_close(Loop* l) {
    toy_stats_free(&l->stats);
    l->backend.close(l->toy);
}

// From 8 to the right batch, 57, and no further: within 10% at the end, whatever the seed.
static void test_finds_the_batch(void) {
    double worst = 0, mean = 0;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        Loop l;
        loop_open(&l, 57, seed, 8, 200 * 57 * TOY_T);
        while ((double)l.toy->tokens < 30 * l.c.tau) {
            if (l.tracker.group[GNS_GROUP_LN].count < CONTROL_MIN_ESTIMATES) { CHECK(l.c.batch == 8); }
            loop_step(&l);
        }
        double off = l.c.batch / 57 - 1;
        worst = fmax(worst, fabs(off));
        mean += off / 6;
        loop_close(&l);
    }
    printf("  right batch 57: off by %+.1f%% on average, %.1f%% at worst over 6 seeds\n", 100 * mean, 100 * worst);
    CHECK(worst < 0.1);
}

// 10^4 steps of constant noise with the right batch, tau 1% of them; and with fewer steps per tau, where the error
// bar is wide and the independent looks are many.
static void test_no_false_rise(void) {
    const double steps_per_tau[] = {100, 100, 100, 30, 10};
    for (int run = 0; run < 5; run++) {
        Loop l;
        loop_open(&l, 57, (uint64_t)(100 + run), 57, steps_per_tau[run] * 57 * TOY_T);
        l.c.may_fall = true;
        l.c.batch_min = 2;
        for (int step = 0; step < 10000; step++) { loop_step(&l); }
        CHECK(l.rises == 0);
        CHECK(l.c.batch == 57); // nor a fall
        loop_close(&l);
    }
}

static double growing(const Toy* toy) { return exp(2 * fmin(1, (double)toy->tokens / (60e3 * 8 * TOY_T))); }
static double shrinking(const Toy* toy) { return 1 / growing(toy); }

// The noise scale drifts by a factor of e^2 = 7.4: B follows, stepwise.
static void follow(double gns, double (*factor)(const Toy*), bool may_fall) {
    Loop l;
    loop_open(&l, gns, 9, gns, 0.01 * 60e3 * 8 * TOY_T);
    l.toy->noise_factor = factor;
    l.c.may_fall = may_fall;
    l.c.batch_min = 2;
    double lag = 0, worst = 0;
    int looks = 0;
    while ((double)l.toy->tokens < 60e3 * 8 * TOY_T) {
        loop_step(&l);
        double off = l.c.batch / toy_gns(l.toy, 1 << GROUP_LN) - 1;
        lag += off;
        worst = fmax(worst, fabs(off));
        looks++;
    }
    printf("  drift %.0f -> %.0f: B ends at %.1f; off by %+.1f%% on average over the run, %.1f%% at worst\n", gns,
           toy_gns(l.toy, 1 << GROUP_LN), l.c.batch, 100 * lag / looks, 100 * worst);
    // B waits until the centre is 10% and two standard errors (of some 8%) away, then one tau (2% of drift) more.
    CHECK(fabs(lag / looks) < 0.2);
    CHECK(worst < 0.5);
    loop_close(&l);
}

static void test_follows_drift(void) {
    follow(16, growing, false);
    follow(96, shrinking, true);
}

int main(void) {
    RUN(test_rise);
    RUN(test_evidence);
    RUN(test_no_control);
    RUN(test_fall);
    RUN(test_bounds);
    RUN(test_what_is_asked);
    RUN(test_measured_calibration);
    RUN(test_freeze);
    RUN(test_state);
    RUN(test_finds_the_batch);
    RUN(test_no_false_rise);
    RUN(test_follows_drift);
    return test_summary();
}
