/*
Speed of the CPU trainer, each figure beside its ceiling, both measured in this run (`make bench`).

    build/bench [gemm] [memory] [step] [gns] [--llmc PROGRAM] [--python PROGRAM]      without a section: all of them

    gemm    the matrix products of GPT-2's sizes on one thread and on all, beside the FMA peak: multiply-adds on registers
    memory  kernels that only stream through memory, beside a copy
    step    a training step of d12 (GPT-2 124M) with 4 sequences of 64 and of 1024 tokens, beside its arithmetic at the
            FMA peak, and beside llm.c's train_gpt2.c (--llmc: dev/bench/llmc_step.c, built with a checkout of llm.c)
            and PyTorch, eager and compiled (--python: a Python that can import torch), on the same number of threads
    gns     what the per-example gradient norms add to a step: --gns ln and --gns all against --gns off, five rounds in
            rotating order, the mean extra time and its 95% t-interval

A figure is the best of several repetitions and its ceiling the best of measurements made in between them, because other
work on the machine only ever slows both down; the gns section compares neighbours in time and reports the spread.
*/
#define TRAIN_GPT_NO_MAIN
#include "train_gpt.c"
#include "llmc/flops.h"
#include "llmc/modelfile.h"
#include <unistd.h>

enum { STEP_B = 4, NUM_ROUNDS = 5 };

// ---------------------------------------------------------------------------------------------------------------------
// Timing

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// Mean of n values and the half-width of its 95% confidence interval (Student's t; 2 <= n <= 11).
static double mean_interval(const double* x, int n, double* half_width) {
    static const double t95[] = {0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228}; // by n - 1
    double mean = 0, squares = 0;
    for (int i = 0; i < n; i++) { mean += x[i] / n; }
    for (int i = 0; i < n; i++) { squares += (x[i] - mean) * (x[i] - mean); }
    *half_width = t95[n - 1] * sqrt(squares / (n - 1) / n);
    return mean;
}

// ---------------------------------------------------------------------------------------------------------------------
// Ceilings: measure_peak_flops() of train_gpt.c, which the trainer's MFU refers to as well, and this one

// Bytes a second that a copy of 256 MiB reads and writes. (Caches that fetch a line before they overwrite it move half as
// much again; so do the kernels below, and it is counted for neither.)
static double copy_bandwidth(void) {
    const size_t n = (size_t)64 << 20;
    static float *from = NULL, *to = NULL;
    if (from == NULL) {
        from = (float*)alloc_zeroed(n, sizeof(float), "a copy's source");
        to = (float*)alloc_zeroed(n, sizeof(float), "a copy's destination");
    }
    double start = seconds_now();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) { to[i] = from[i]; }
    return 2.0 * (double)n * sizeof(float) / (seconds_now() - start);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

static void print_heading(const char* title) {
    printf("\n%-44s %8s %16s %16s %8s\n", title, "threads", "measured", "ceiling", "share");
}

static void print_row(const char* what, double measured, double ceiling, const char* unit) {
    printf("%-44s %8d %9.1f %-6s %9.1f %-6s %6.1f%%\n", what, max_threads(), measured, unit, ceiling, unit,
           100 * measured / ceiling);
    fflush(stdout);
}

// Runs task(arg), which does `work` units of what ceiling() counts a second, for at least three times and half a second
// after a first time that is not counted, measuring the ceiling in between. Prints the best of both; returns the seconds.
static double bench_row(const char* what, void (*task)(void*), void* arg, double work, double (*ceiling)(void),
                        const char* unit) {
    double best = INFINITY, best_ceiling = 0, total = 0;
    task(arg);
    for (int i = 0; i < 3 || (total < 0.5 && i < 1000); i++) {
        best_ceiling = fmax(best_ceiling, ceiling());
        double start = seconds_now();
        task(arg);
        double elapsed = seconds_now() - start;
        total += elapsed;
        best = fmin(best, elapsed);
    }
    print_row(what, work / best * 1e-9, best_ceiling * 1e-9, unit);
    return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

enum { FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, NUM_FORMS };

typedef struct {
    Workspace* ws;
    int form, M, C, OC;
    real *x, *weight, *y; // (M, C), (OC, C), (M, OC)
} Product;

static void run_product(void* arg) {
    Product* p = (Product*)arg;
    switch (p->form) {
    case FORWARD: matmul_forward(p->ws, p->y, p->x, p->weight, NULL, p->M, p->C, p->OC); break;
    case BACKWARD_INPUT: matmul_backward_input(p->ws, p->x, p->y, p->weight, 1, p->M, p->C, p->OC); break;
    default: matmul_backward_weight(p->ws, p->weight, NULL, p->y, p->x, 1, false, 1, p->M, p->C, p->OC);
    }
}

static real* random_numbers(size_t n) {
    real* x = (real*)alloc_zeroed(n, sizeof(real), "a matrix");
    uint64_t state = n;
    for (size_t i = 0; i < n; i++) { x[i] = (real)(splitmix64_uniform(&state) - 0.5); }
    return x;
}

static void bench_gemm(Workspace* ws, int threads) {
    static const char* const forms[] = {"forward", "backward, input", "backward, weight"};
    const int rows[] = {256, 4096}, columns[] = {768, 3072, 50304}, C = 768;
    set_threads(threads);
    print_heading("GEMM, rows x in x out");
    for (size_t m = 0; m < 2; m++) {
        for (size_t n = 0; n < 3; n++) {
            Product p;
            memset(&p, 0, sizeof p);
            p.ws = ws;
            p.M = rows[m];
            p.C = C;
            p.OC = columns[n];
            p.x = random_numbers((size_t)p.M * (size_t)C);
            p.weight = random_numbers((size_t)p.OC * (size_t)C);
            p.y = random_numbers((size_t)p.M * (size_t)p.OC);
            for (p.form = 0; p.form < NUM_FORMS; p.form++) {
                char what[64];
                snprintf(what, sizeof what, "%d x %d x %d %s", p.M, C, p.OC, forms[p.form]);
                bench_row(what, run_product, &p, 2.0 * p.M * C * p.OC, measure_peak_flops, "GFLOP/s");
            }
            free(p.x);
            free(p.weight);
            free(p.y);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels that stream through memory

enum { LN_B = 16, LN_T = 1024, LN_C = 768 };

typedef struct {
    Workspace* ws;
    real *x, *branch, *residual, *out; // (B, T, C)
    real *mean, *rstd;                 // (B, T)
    real *weight, *bias;               // (C)
    double* sum_sq;                    // NULL, or two sums
} LayerNorm;

static void run_layernorm_forward(void* arg) {
    LayerNorm* l = (LayerNorm*)arg;
    layernorm_forward(l->residual, l->out, l->mean, l->rstd, l->x, l->branch, 1, l->weight, l->bias, LN_B * LN_T, LN_C);
}

static void run_layernorm_backward(void* arg) {
    LayerNorm* l = (LayerNorm*)arg;
    double* bias_sum_sq = l->sum_sq == NULL ? NULL : l->sum_sq + 1;
    layernorm_backward(l->ws, l->residual, l->weight, l->bias, l->sum_sq, bias_sum_sq, l->out, l->x, l->mean, l->rstd,
                       l->branch, LN_B, LN_T, LN_C);
}

static void bench_memory(Workspace* ws) {
    const size_t rows = (size_t)LN_B * LN_T, n = rows * LN_C;
    const double stream = (double)n * sizeof(real);
    double sum_sq[2] = {0, 0};
    LayerNorm l;
    memset(&l, 0, sizeof l);
    l.ws = ws;
    l.x = random_numbers(n);
    l.branch = random_numbers(n);
    l.residual = random_numbers(n);
    l.out = random_numbers(n);
    l.mean = random_numbers(rows);
    l.rstd = random_numbers(rows);
    l.weight = random_numbers(LN_C);
    l.bias = random_numbers(LN_C);
    print_heading("Memory, 16 x 1024 rows of 768");
    bench_row("residual + LayerNorm (2 reads, 2 writes)", run_layernorm_forward, &l, 4 * stream, copy_bandwidth,
              "GB/s");
    bench_row("LayerNorm backward (3 reads, 1 write)", run_layernorm_backward, &l, 4 * stream, copy_bandwidth, "GB/s");
    l.sum_sq = sum_sq;
    bench_row("the same with per-example norms", run_layernorm_backward, &l, 4 * stream, copy_bandwidth, "GB/s");
    real* all[] = {l.x, l.branch, l.residual, l.out, l.mean, l.rstd, l.weight, l.bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) { free(all[i]); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Training steps

typedef struct {
    Backend backend;
    GPTConfig config;
    int T, gns;
    int *tokens, *targets; // (STEP_B, maxT)
    StepHyper hyper;
    StepStats stats;
} Step;

static void step_open(Step* s, const char* model) {
    memset(s, 0, sizeof *s);
    if (!config_from_name(model, &s->config)) { fatal("there is no model '%s'", model); }
    const int max_T = s->config.max_seq_len;
    const BackendOptions options = backend_options(STEP_B, max_T);
    cpu_open(&s->backend, &s->config, &options);
    model_init_weights(&s->config, 42, &s->backend);
    const size_t count = (size_t)STEP_B * (size_t)max_T, tensors = (size_t)param_table(&s->config).num_tensors;
    s->tokens = (int*)alloc_zeroed(count, sizeof(int), "tokens");
    s->targets = (int*)alloc_zeroed(count, sizeof(int), "tokens");
    uint64_t state = 1;
    for (size_t i = 0; i < count; i++) {
        s->tokens[i] = (int)(splitmix64(&state) % (uint64_t)s->config.vocab_size);
        s->targets[i] = (int)(splitmix64(&state) % (uint64_t)s->config.vocab_size);
    }
    s->stats.sq_sum = (double*)alloc_zeroed(tensors, sizeof(double), "norms");
    s->stats.sum_sq = (double*)alloc_zeroed(tensors, sizeof(double), "norms");
    s->hyper.n = STEP_B;
    s->hyper.lr = 1e-4f;
    s->hyper.beta1 = 0.9f;
    s->hyper.beta2 = 0.95f;
    s->hyper.eps = 1e-8f;
    s->hyper.grad_clip = 1;
    s->hyper.loss_limit = s->hyper.grad_norm_limit = INFINITY;
}

static void step_close(Step* s) {
    s->backend.close(s->backend.self);
    free(s->tokens);
    free(s->targets);
    free(s->stats.sq_sum);
    free(s->stats.sum_sq);
}

static void run_step(void* arg) {
    Step* s = (Step*)arg;
    const Backend* b = &s->backend;
    s->hyper.step++;
    b->step_begin(b->self, s->gns);
    b->micro(b->self, s->tokens, s->targets, STEP_B, s->T);
    b->step_end(b->self, &s->hyper, &s->stats);
    if (s->stats.outcome != STEP_APPLIED) { fatal("a step of the benchmark was not applied: its loss is not finite"); }
}

// Runs a program that prints one line a step, its seconds; the least of them, 0 if it failed.
static double best_of_program(const char* command) {
    FILE* lines = popen(command, "r");
    double best = 0, step;
    while (lines != NULL && fscanf(lines, "%lf", &step) == 1) { best = best == 0 ? step : fmin(best, step); }
    return lines != NULL && pclose(lines) == 0 ? best : 0;
}

static void print_peer(const char* name, int T, double time, double ours) {
    if (time == 0) {
        printf("%-44s failed; its message is above\n", name);
    } else {
        printf("%-44s %8d %9.3f s      %9.0f tokens/s   %6.2f x our time\n", name, max_threads(), time,
               STEP_B * T / time, time / ours);
    }
    fflush(stdout);
}

// llm.c's step on a random model file of ours, written for the purpose; PyTorch's on a model of the same shape.
static void bench_peers(const char* llmc, const char* python, const char* model_file, int T, double ours) {
    char command[1024];
    if (llmc != NULL) {
        snprintf(command, sizeof command, "%s %s %d %d %d", llmc, model_file, STEP_B, T, T <= 64 ? 3 : 1);
        print_peer("  llm.c, train_gpt2.c", T, best_of_program(command), ours);
    }
    for (int i = 0; python != NULL && i < 2; i++) {
        const char* mode = i == 0 ? "eager" : "compiled";
        snprintf(command, sizeof command, "%s dev/bench/torch_step.py %s %d %d 3 %d", python, mode, STEP_B, T,
                 max_threads());
        print_peer(i == 0 ? "  PyTorch, eager" : "  PyTorch, compiled", T, best_of_program(command), ours);
    }
}

static void bench_step(const char* llmc, const char* python) {
    const int lengths[] = {64, 1024};
    double best[2];
    char directory[512], file[600], error[256];
    Step s;
    step_open(&s, "d12");
    s.gns = GNS_LN;
    print_heading("Training step of d12, 4 sequences, --gns ln");
    for (int i = 0; i < 2; i++) {
        char what[64];
        s.T = lengths[i];
        snprintf(what, sizeof what, "4 x %d tokens", s.T);
        double flops = flops_per_token(&s.config, s.T) * STEP_B * s.T;
        best[i] = bench_row(what, run_step, &s, flops, measure_peak_flops, "GFLOP/s");
    }
    snprintf(directory, sizeof directory, "%s/bench_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : "/tmp");
    if (llmc != NULL) {
        if (mkdtemp(directory) == NULL) { fatal("cannot make the folder %s: %s", directory, strerror(errno)); }
        snprintf(file, sizeof file, "%s/model.bin", directory);
        if (!model_file_save(file, &s.config, &s.backend, error, sizeof error)) { fatal("%s", error); }
    }
    step_close(&s); // llm.c needs the memory: it keeps every T x T matrix of attention
    for (int i = 0; i < 2; i++) {
        char what[64];
        snprintf(what, sizeof what, "4 x %d tokens", lengths[i]);
        print_peer(what, lengths[i], best[i], best[i]);
        bench_peers(llmc, python, file, lengths[i], best[i]);
    }
    if (llmc != NULL) {
        unlink(file);
        rmdir(directory);
    }
}

// One round: GNS_OFF, GNS_LN and GNS_ALL in turns, each first in its turn, and of each the best of `repeats` steps, because
// what disturbs a step (other work on the machine) only ever makes it longer.
static void bench_gns_round(Step* s, int repeats, int round, double time[3][NUM_ROUNDS]) {
    for (int k = 0; k < 3 * repeats; k++) {
        s->gns = (round + k + k / 3) % 3;
        double start = seconds_now();
        run_step(s);
        double elapsed = seconds_now() - start;
        if (k < 3 || elapsed < time[s->gns][round]) { time[s->gns][round] = elapsed; }
    }
}

static void bench_gns(void) {
    const int lengths[] = {64, 1024};
    static const char* const names[] = {"--gns off", "--gns ln", "--gns all"};
    Step s;
    step_open(&s, "d12");
    printf("\n%-44s %8s %16s %16s\n", "Per-example norms, d12, 4 sequences", "threads", "step", "more than off");
    for (int i = 0; i < 2; i++) {
        double time[3][NUM_ROUNDS], extra[NUM_ROUNDS], half_width;
        s.T = lengths[i];
        run_step(&s); // not counted: first touch of the memory
        for (int round = 0; round < NUM_ROUNDS; round++) { bench_gns_round(&s, lengths[i] == 64 ? 6 : 2, round, time); }
        for (int gns = GNS_OFF; gns <= GNS_ALL; gns++) {
            double mean = mean_interval(time[gns], NUM_ROUNDS, &half_width);
            printf("4 x %-4d tokens, %-27s %8d %9.3f s", s.T, names[gns], max_threads(), mean);
            for (int r = 0; r < NUM_ROUNDS; r++) { extra[r] = 100 * (time[gns][r] / time[GNS_OFF][r] - 1); }
            mean = mean_interval(extra, NUM_ROUNDS, &half_width);
            if (gns == GNS_OFF) {
                printf("\n");
            } else {
                printf("      %+6.2f%% +- %.2f%%\n", mean, half_width);
            }
        }
        fflush(stdout);
    }
    step_close(&s);
}

int main(int argc, char** argv) {
    enum { GEMM, MEMORY, STEP, GNS, NUM_SECTIONS };
    static const char* const names[NUM_SECTIONS] = {"gemm", "memory", "step", "gns"};
    bool chosen[NUM_SECTIONS] = {false}, any = false;
    const char *llmc = NULL, *python = NULL;
    for (int i = 1; i < argc; i++) {
        bool known = false;
        for (int s = 0; s < NUM_SECTIONS; s++) {
            if (strcmp(argv[i], names[s]) == 0) { chosen[s] = known = any = true; }
        }
        if (!known && i + 1 < argc && strcmp(argv[i], "--llmc") == 0) {
            llmc = argv[++i];
        } else if (!known && i + 1 < argc && strcmp(argv[i], "--python") == 0) {
            python = argv[++i];
        } else if (!known) {
            fatal("unexpected '%s'; usage: %s [gemm] [memory] [step] [gns] [--llmc PROGRAM] [--python PROGRAM]",
                  argv[i], argv[0]);
        }
    }
    const int threads = max_threads();
    Workspace ws; // grows on demand and lives as long as the program
    memset(&ws, 0, sizeof ws);
    if (!any || chosen[GEMM]) {
        bench_gemm(&ws, 1);
        if (threads > 1) { bench_gemm(&ws, threads); }
    }
    if (!any || chosen[MEMORY]) { bench_memory(&ws); }
    if (!any || chosen[STEP]) { bench_step(llmc, python); }
    if (!any || chosen[GNS]) { bench_gns(); }
    return 0;
}
