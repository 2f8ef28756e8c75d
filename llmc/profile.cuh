/*
Where the time of a step goes (--profile). Every piece of work that a step puts on its stream is followed by a mark: an
event that names the part of the step that it closes, and the least that the work needs, operations and bytes. The time
between two marks belongs to the part of the second one, so the parts add up to the whole step, and what the GPU waits
for the host inside a step counts as work of the next part; the wait between two steps is a part of its own.

A part's floor is what its products would take at the measured peak, or its bytes at the speed of a large copy: the
distance between the two columns is what there is left to gain. The first steps are left out: they choose algorithms (a
batch that moves meets new shapes later, too, and their choice counts where it happens).
*/
#ifndef LLMC_PROFILE_CUH
#define LLMC_PROFILE_CUH

#include "cuda_common.cuh"

// The parts of a step, and their pass: forward (and whatever comes once a step) or backward.
enum {
    PART_DATA,
    PART_EMBEDDING,
    PART_LAYERNORM,
    PART_PRODUCTS,
    PART_GELU,
    PART_ATTENTION,
    PART_BIAS,
    PART_HEAD,
    PART_CLASSIFIER,
    PART_EMBEDDING_NORMS,
    PART_NORMS,
    PART_UPDATE,
    PART_BETWEEN,
    NUM_PARTS
};
enum { PASS_FORWARD, PASS_BACKWARD, NUM_PASSES };

enum { PROFILE_SKIPPED_STEPS = 3 };

typedef struct {
    cudaEvent_t event;
    int part, pass;
    double flops, bytes; // the least that the work before the event needs
} ProfileMark;

typedef struct {
    bool on;
    double peak_flops, bandwidth; // operations and bytes a second that the floor assumes
    cudaEvent_t begin, end;       // of the step
    bool has_end;                 // the step before this one ended at `end`, and nothing else was done since
    ProfileMark* mark;            // (capacity), of which num_marks belong to this step
    int num_marks, capacity;
    int steps; // so far, skipped ones included
    double seconds[NUM_PARTS][NUM_PASSES], floor[NUM_PARTS][NUM_PASSES];
} Profile;

static inline void profile_open(Profile* p, double peak_flops, double bandwidth) {
    memset(p, 0, sizeof *p);
    p->on = true;
    p->peak_flops = peak_flops;
    p->bandwidth = bandwidth;
    cuda_check(cudaEventCreate(&p->begin));
    cuda_check(cudaEventCreate(&p->end));
}

static inline void profile_step_begin(Profile* p, cudaStream_t stream) {
    if (!p->on) { return; }
    p->num_marks = 0;
    cuda_check(cudaEventRecord(p->begin, stream));
}

// Closes a piece of work that needs at least so many operations of products and bytes of memory traffic.
static inline void profile_mark(Profile* p, int part, int pass, double flops, double bytes, cudaStream_t stream) {
    if (!p->on) { return; }
    if (p->num_marks == p->capacity) {
        const int capacity = p->capacity == 0 ? 1024 : 2 * p->capacity;
        ProfileMark* more = (ProfileMark*)alloc_zeroed((size_t)capacity, sizeof(ProfileMark), "the profile");
        for (int i = 0; i < capacity; i++) {
            if (i < p->capacity) {
                more[i] = p->mark[i];
            } else {
                cuda_check(cudaEventCreate(&more[i].event));
            }
        }
        free(p->mark);
        p->mark = more;
        p->capacity = capacity;
    }
    ProfileMark* m = &p->mark[p->num_marks++];
    m->part = part;
    m->pass = pass;
    m->flops = flops;
    m->bytes = bytes;
    cuda_check(cudaEventRecord(m->event, stream));
}

static inline double profile_elapsed(cudaEvent_t from, cudaEvent_t to) {
    float ms;
    cuda_check(cudaEventElapsedTime(&ms, from, to));
    return 1e-3 * (double)ms;
}

// Adds up the step's times, once the stream has been waited for.
static inline void profile_step_end(Profile* p, cudaStream_t stream) {
    if (!p->on) { return; }
    if (p->steps++ >= PROFILE_SKIPPED_STEPS) {
        if (p->has_end) { p->seconds[PART_BETWEEN][PASS_FORWARD] += profile_elapsed(p->end, p->begin); }
        for (int i = 0; i < p->num_marks; i++) {
            const ProfileMark* m = &p->mark[i];
            p->seconds[m->part][m->pass] += profile_elapsed(i > 0 ? p->mark[i - 1].event : p->begin, m->event);
            p->floor[m->part][m->pass] += m->flops / p->peak_flops + m->bytes / p->bandwidth;
        }
    }
    cuda_check(cudaEventRecord(p->end, stream));
    p->has_end = true;
}

// Something beside a step was done: the time until the next step is not the loop's.
static inline void profile_interrupt(Profile* p) {
    p->has_end = false;
    p->num_marks = 0;
}

static inline void profile_print(const Profile* p) {
    static const char* const names[NUM_PARTS] = {
        "tokens to the device", "embedding", "LayerNorm",  "products of the blocks", "GELU",          "attention",
        "bias gradients",       "head",      "classifier", "embedding's norms",      "gradient norm", "AdamW",
        "between steps"};
    const int steps = p->steps - PROFILE_SKIPPED_STEPS;
    if (steps < 1) {
        printf("profile     nothing to show: it starts after %d steps\n", PROFILE_SKIPPED_STEPS);
        return;
    }
    double total = 0, total_floor = 0;
    for (int i = 0; i < NUM_PARTS; i++) {
        for (int pass = 0; pass < NUM_PASSES; pass++) {
            total += p->seconds[i][pass];
            total_floor += p->floor[i][pass];
        }
    }
    const double ms = 1e3 / steps;
    printf("profile     mean of %d steps; the floor: products at %.0f TFLOP/s, memory at %.2f TB/s\n", steps,
           p->peak_flops * 1e-12, p->bandwidth * 1e-12);
    printf("            %-24s %10s %10s %8s %10s %8s\n", "part", "forward", "backward", "share", "floor", "reached");
    for (int i = 0; i < NUM_PARTS; i++) {
        const double forward = p->seconds[i][PASS_FORWARD], backward = p->seconds[i][PASS_BACKWARD];
        const double floor = p->floor[i][PASS_FORWARD] + p->floor[i][PASS_BACKWARD], sum = forward + backward;
        if (sum == 0) { continue; }
        printf("            %-24s %7.3f ms %7.3f ms %7.1f%% %7.3f ms %7.1f%%\n", names[i], forward * ms, backward * ms,
               100 * sum / total, floor * ms, 100 * floor / sum);
    }
    printf("            %-24s %7.3f ms %10s %8s %7.3f ms %7.1f%%\n", "step", total * ms, "", "", total_floor * ms,
           100 * total_floor / total);
}

static inline void profile_close(Profile* p) {
    if (!p->on) { return; }
    profile_print(p);
    for (int i = 0; i < p->capacity; i++) { cuda_check(cudaEventDestroy(p->mark[i].event)); }
    cuda_check(cudaEventDestroy(p->begin));
    cuda_check(cudaEventDestroy(p->end));
    free(p->mark);
}

#endif
