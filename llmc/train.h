/*
The training loop, the same for every backend: train_main() is the whole program of a trainer but its model.

    options -> plan (model, budget, schedules) -> backend -> weights, or a checkpoint -> steps until the budget is reached

A step takes the next sequences of the data stream, this rank its share of them, a micro-batch of at most -b at a time, and
then, in this order: the update (where the step was good), the noise scale, the controller of the batch; and, where an
interval was crossed or the budget reached: evaluation, sample; the row of the log; a checkpoint. So a row holds what is
true after its step, and a checkpoint holds a moment at which nothing is left to do but the next step.

Whatever the loop decides is a function of the tokens consumed before the step and of the run's state, never of time, of
the micro-batch or of the number of ranks: a resumed run equals an unbroken one to the last bit.

Exit status: 0 the budget is reached (or a signal stopped the run, with a checkpoint); 1 too many bad steps in a row, or the
last checkpoint could not be saved, or --eval-only found a loss that is no number; 2 the command line, or a file it names, is
wrong, if need be after a checkpoint.
*/
#ifndef LLMC_TRAIN_H
#define LLMC_TRAIN_H

#include "checkpoint.h"
#include "controller.h"
#include "dataloader.h"
#include "dryrun.h"
#include "evaluate.h"
#include "flops.h"
#include "gns.h"
#include "hellaswag.h"
#include "model.h"
#include "options.h"
#include "outlier.h"
#include "plan.h"
#include "runlog.h"
#include "runstate.h"
#include "tokenizer.h"
#include <signal.h>
#include <time.h>

// What config.json says of the program; the Makefile knows.
#ifndef GIT_REVISION
#define GIT_REVISION "unknown"
#endif
#ifndef BUILD_FLAGS
#define BUILD_FLAGS "unknown"
#endif

typedef struct {
    Options options;
    Plan plan;
    DataLoader train, val; // not open: num_sequences 0
    int64_t val_sequences; // to evaluate on
    HellaSwag hellaswag;   // not open: num_examples 0
    Tokenizer tokenizer;   // open if --tokenizer is given
    int* prompt;           // (prompt_len)
    int prompt_len;

    Backend backend;
    RunState state;
    RunIdentity identity;
    int out_lock; // folder_lock of --out; -1: not taken
    RunLog log;   // open if there is --out
    StepStats stats;
    int *tokens, *targets; // (micro_batch, T) each
    double last_line;      // when the last progress line was printed
} Trainer;

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline bool is_first_rank(const Trainer* t) { return t->backend.rank == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Signals: the first one (Ctrl-C, TERM, a terminal that goes away) asks the loop to stop after the step at hand, another Ctrl-C or
// TERM ends the program at once; but not within half a second, as `timeout` sends its own twice. A terminal that goes away and
// output that nobody reads any more never do more than ask: under `| tee`, Ctrl-C ends tee first.

static inline volatile sig_atomic_t* stop_flag(void) {
    static volatile sig_atomic_t flag = 0;
    return &flag;
}

static inline void stop_handler(int number) {
    static const char message[] = "\nstopping after this step; again to stop at once\n";
    static double since;
    if (*stop_flag()) {
        if (number == SIGPIPE || number == SIGHUP || seconds_now() < since + 0.5) { return; }
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    since = seconds_now();
    *stop_flag() = 1;
    ssize_t ignored = write(STDERR_FILENO, message, sizeof message - 1);
    (void)ignored;
}

static inline void stop_on_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = stop_handler;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGPIPE, &action, NULL);
    struct sigaction before;
    sigaction(SIGHUP, NULL, &before);
    if (before.sa_handler != SIG_IGN) { sigaction(SIGHUP, &action, NULL); } // nohup
}

// A token file is read through memory, so one that is cut short meanwhile is found out by a signal, at no place in particular.
static inline void lost_file_handler(int number, siginfo_t* info, void* context) {
    static const char message[] = "error: a token file can no longer be read: it was cut short during the run, or its "
                                  "disk fails; put it back; checkpoints are as they were\n";
    (void)context;
    signal(number, SIG_DFL);
    if (info->si_code != BUS_ADRERR) { return; } // not a file's missing page: it happens again, and ends the program
    ssize_t ignored = write(STDERR_FILENO, message, sizeof message - 1);
    (void)ignored;
    _exit(2);
}

static inline void watch_token_files(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = lost_file_handler;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, NULL);
}

// ---------------------------------------------------------------------------------------------------------------------
// Before the backend: everything that can be wrong with a command is found here, before anything is written or computed;
// of the training data's tokens, which can be many, those of the first step or more

enum { FIRST_SEQUENCES = 1024 };

// fatal() if the data's vocabulary does not fit into the model's.
static inline void check_vocab(const Trainer* t, const DataLoader* d, const char* pattern) {
    const int V = t->plan.config.vocab_size;
    if (d->vocab_size > V) {
        fatal(
            "'%s' has a vocabulary of %d tokens, the model %s one of %d; use data of the model's tokenizer, or a model "
            "with V=%d",
            pattern, d->vocab_size, t->options.model, V, d->vocab_size);
    }
}

// fatal() if one of the first `count` sequences has a token outside the model's vocabulary.
static inline void check_tokens(const Trainer* t, const DataLoader* d, int64_t count) {
    char error[PATH_SIZE + 256];
    if (!dataloader_check(d, 0, count, t->plan.config.vocab_size, error, sizeof error)) { fatal("%s", error); }
}

static inline void open_data(Trainer* t) {
    const Options* o = &t->options;
    if (o->train_data != NULL && !o->eval_only) {
        dataloader_open(&t->train, o->train_data, t->plan.T, (uint64_t)o->seed, true);
        check_vocab(t, &t->train, o->train_data);
    }
    if (o->val_data != NULL) {
        dataloader_open(&t->val, o->val_data, t->plan.T, 0, false);
        t->val_sequences = (int64_t)fmin(ceil(o->val_tokens / t->plan.T), (double)t->val.num_sequences);
        check_vocab(t, &t->val, o->val_data);
    }
    const int a = t->train.vocab_size, b = t->val.vocab_size;
    if (a > 0 && b > 0 && a != b) {
        warn("the training data's vocabulary has %d tokens, that of the validation data %d: are they of one tokenizer?",
             a, b);
    }
    if (o->hellaswag != NULL) { hellaswag_open(&t->hellaswag, o->hellaswag, t->plan.T, t->plan.config.vocab_size); }
}

// The tokens that samples start with: those of --prompt, or end-of-text alone.
static inline void open_prompt(Trainer* t) {
    const Options* o = &t->options;
    if (o->prompt != NULL) {
        t->prompt = tokenizer_encode(&t->tokenizer, o->prompt, strlen(o->prompt), &t->prompt_len);
    }
    if (t->prompt_len == 0) {
        free(t->prompt);
        t->prompt = (int*)alloc_zeroed(1, sizeof(int), "a prompt");
        t->prompt[0] = t->tokenizer.eot;
        t->prompt_len = 1;
    }
    for (int i = 0; i < t->prompt_len; i++) {
        if (t->prompt[i] < 0 || t->prompt[i] >= t->plan.config.vocab_size) {
            fatal("the prompt's token %d, by the tokenizer '%s', is outside the model's vocabulary of %d; use the "
                  "tokenizer of the training data",
                  t->prompt[i], o->tokenizer, t->plan.config.vocab_size);
        }
    }
}

// fatal() if the output folder holds a run.
static inline void protect_output(const Options* o) {
    static const char* const names[] = {"log.csv", "config.json", "checkpoints"};
    char path[PATH_SIZE];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (access(path_join(path, o->out, names[i]), F_OK) == 0) {
            fatal("--out (-o) '%s' already holds a run (%s); -y 1 goes on with it, or choose another folder", o->out,
                  names[i]);
        }
    }
}

// Everything but the backend.
static inline void trainer_prepare(Trainer* t) {
    Options* o = &t->options;
    plan_model(&t->plan, o);
    if (!o->dry_run || (o->train_data != NULL && budget_is_epoch(o))) { open_data(t); }
    if (budget_is_epoch(o) && t->train.num_sequences == 0 && !o->eval_only) {
        fatal("--dry-run without data (-i) needs a budget: --max-tokens, --max-steps (-x) or --tokens-per-param");
    }
    const double epoch = (double)t->train.num_sequences * t->plan.T;
    plan_schedules(&t->plan, o, o->eval_only ? 1e15 : epoch); // an evaluation never reaches its budget
    if (o->dry_run) { return; }
    check_tokens(t, &t->val, t->val_sequences);
    if (!o->eval_only) {
        const StepPlan first = plan_step(&t->plan, o, 0, 0, t->plan.controller.batch);
        check_tokens(t, &t->train, max_int(first.n, FIRST_SEQUENCES));
    }
    if (o->tokenizer != NULL) { tokenizer_open(&t->tokenizer, o->tokenizer); }
    if (o->sample_every.count > 0) { open_prompt(t); }
    if (o->eval_only || o->out == NULL) { return; }
    char error[PATH_SIZE + 256];
    if (!folder_possible(o->out, error, sizeof error)) { fatal("--out (-o): %s; choose another folder", error); }
    if (!o->resume) { protect_output(o); }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the run says of itself at the start

static inline void echo_data(const Trainer* t) {
    char count[16];
    if (t->train.num_sequences > 0) {
        double epochs = t->plan.budget / ((double)t->train.num_sequences * t->plan.T);
        printf("train data  %s tokens in %d file%s, %" PRIu64 " sequences of %d; the budget is %.2f epochs\n",
               format_count(count, sizeof count, (double)t->train.num_tokens), t->train.num_shards,
               t->train.num_shards == 1 ? "" : "s", t->train.num_sequences, t->plan.T, epochs);
    }
    if (t->val_sequences > 0) {
        printf("val data    %s tokens, %" PRId64 " of %" PRIu64 " sequences are evaluated\n",
               format_count(count, sizeof count, (double)t->val.num_tokens), t->val_sequences, t->val.num_sequences);
    }
}

static inline void echo_schedule(const Trainer* t) {
    const Options* o = &t->options;
    char budget[16], tokens[16], tau[16];
    OptionText kind;
    printf("batch       %s", o->batch_schedule);
    if (t->plan.closed_loop) { printf(" between %d and %d sequences", o->batch_min, o->batch_max); }
    printf("; -d is %.0f sequences = %s tokens; micro-batches of at most %d\n", t->plan.batch_ref,
           format_count(tokens, sizeof tokens, o->batch_tokens), o->micro_batch);
    printf("schedule    budget %s tokens, lr %g (%s to %g%% of it), warmup %s\n",
           format_count(budget, sizeof budget, t->plan.budget), o->lr,
           option_value(o, option_find("lr-schedule"), &kind), 100 * o->final_lr_frac,
           format_count(tokens, sizeof tokens, o->warmup.count));
    printf("gns         %s, smoothed over %s tokens\n", option_value(o, option_find("gns"), &kind),
           format_count(tau, sizeof tau, o->gns_tau));
}

static inline void echo_run(const Trainer* t) {
    const GPTConfig* c = &t->plan.config;
    char params[16], shape[256];
    options_echo(&t->options);
    printf("device      %s\n", t->backend.device);
    printf("model       %s: %s, %s parameters\n", t->options.model, describe_config(c, shape, sizeof shape),
           format_count(params, sizeof params, (double)t->plan.num_params));
    echo_data(t);
    if (!t->options.eval_only) { echo_schedule(t); }
    fflush(stdout);
}

// One option as JSON.
static inline void option_json(const Options* o, const OptionRow* row, Text* out) {
    OptionText text;
    const char* value = option_value(o, row, &text);
    if (value == NULL) {
        text_add(out, "null");
    } else if (row->type == OPTION_FLAG) {
        text_add(out, "%s", value[0] == '1' ? "true" : "false");
    } else if (row->type == OPTION_TEXT || row->type == OPTION_CHOICE || (row->words && !strcmp(value, row->words))) {
        text_add_json(out, value);
    } else {
        text_add(out, "%.*s", (int)strcspn(value, "ts"), value); // an interval, in tokens by now, without its unit
    }
}

// Writes config.json: every option as resolved, and what was built and found.
static inline bool write_config(const Trainer* t, char* error, size_t error_size) {
    enum { MORE = 5 };
    char path[PATH_SIZE], shape[256];
    Text values[NUM_OPTIONS + MORE];
    JsonField fields[NUM_OPTIONS + MORE];
    memset(values, 0, sizeof values);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        fields[i].key = option_rows[i].name;
        option_json(&t->options, &option_rows[i], &values[i]);
    }
    static const char* const keys[MORE] = {"model-shape", "parameters", "device", "git-revision", "build-flags"};
    text_add_json(&values[NUM_OPTIONS], describe_config(&t->plan.config, shape, sizeof shape));
    text_add(&values[NUM_OPTIONS + 1], "%" PRId64, t->plan.num_params);
    text_add_json(&values[NUM_OPTIONS + 2], t->backend.device);
    text_add_json(&values[NUM_OPTIONS + 3], GIT_REVISION);
    text_add_json(&values[NUM_OPTIONS + 4], BUILD_FLAGS);
    for (int i = 0; i < NUM_OPTIONS + MORE; i++) {
        fields[i].key = i < NUM_OPTIONS ? fields[i].key : keys[i - NUM_OPTIONS];
        fields[i].value = values[i].data;
    }
    path_join(path, t->options.out, "config.json");
    const bool ok = config_json_write(path, fields, NUM_OPTIONS + MORE, error, error_size);
    for (int i = 0; i < NUM_OPTIONS + MORE; i++) { free(values[i].data); }
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights and state to start from

static inline void initial_weights(Trainer* t) {
    const Options* o = &t->options;
    const char* file = model_is_file(o->model) ? o->model : o->init_from;
    if (file != NULL) {
        model_file_load(file, &t->plan.config, &t->backend);
    } else {
        model_init_weights(&t->plan.config, (uint32_t)o->seed, &t->backend);
    }
}

static inline void initial_state(Trainer* t) {
    RunState* r = &t->state;
    r->sampler_rng = hash64((uint64_t)t->options.seed);
    r->controller = t->plan.controller;
    gns_tracker_init(&r->tracker, t->options.gns_tau);
    outlier_init(&r->loss_z);
    outlier_init(&r->grad_z);
}

// The run's state as text; free() it.
static inline char* state_text(Trainer* t) {
    StateFile s;
    memset(&s, 0, sizeof s);
    s.writing = true;
    run_state(&s, &t->state, &t->identity);
    return s.text;
}

// Takes weights, optimizer and state from the newest checkpoint; false if there is none. state: as well as the weights.
static inline bool resume(Trainer* t, bool with_state) {
    char path[PATH_SIZE], count[16];
    int64_t step;
    StateFile s;
    if (!checkpoint_find(t->options.out, path, sizeof path, &step)) { return false; }
    memset(&s, 0, sizeof s);
    checkpoint_load(path, &t->plan.config, &t->backend, &s.text);
    if (with_state) {
        run_state(&s, &t->state, &t->identity);
        if (s.error[0] != '\0') { fatal("cannot resume from '%s': %s", path, s.error); }
        controller_bound(&t->state.controller);
    }
    free(s.text);
    if (is_first_rank(t)) {
        printf("resuming    from %s%s%s\n", path, with_state ? ", tokens " : "",
               with_state ? format_count(count, sizeof count, (double)t->state.tokens) : "");
    }
    return true;
}

// Makes the output folder this run's own while it lives, if there is one yet; fatal() if it is another one's.
static inline void lock_output(Trainer* t) {
    if (!folder_lock(t->options.out, &t->out_lock)) {
        fatal("--out (-o): another process is training in '%s'; wait until it ends, or choose another folder",
              t->options.out);
    }
}

// Opens the backend, fills it, and opens the log.
static inline void trainer_start(Trainer* t, BackendOpen open) {
    const Options* o = &t->options;
    char path[PATH_SIZE], error[PATH_SIZE + 256];
    BackendOptions how = backend_options(o->micro_batch, t->plan.T);
    how.recompute = o->recompute;
    how.gns_all = !o->eval_only && (o->gns == GNS_ALL || o->gns_all_every > 0);
    how.tf32 = o->tf32 == 1;
    how.profile = o->profile == 1;
    open(&t->backend, &t->plan.config, &how);
    const ParamTable table = param_table(&t->plan.config);
    const size_t batch = (size_t)o->micro_batch * (size_t)t->plan.T;
    t->stats.sq_sum = (double*)alloc_zeroed((size_t)table.num_tensors, sizeof(double), "norms");
    t->stats.sum_sq = (double*)alloc_zeroed((size_t)table.num_tensors, sizeof(double), "norms");
    t->tokens = (int*)alloc_zeroed(batch, sizeof(int), "a micro-batch");
    t->targets = (int*)alloc_zeroed(batch, sizeof(int), "a micro-batch");
    t->identity.seed = o->seed;
    t->identity.seq_len = t->plan.T;
    t->identity.vocab_size = t->plan.config.vocab_size;
    t->identity.train_tokens = t->train.num_tokens;
    if (is_first_rank(t)) { echo_run(t); }
    const bool writes = o->out != NULL && !o->eval_only && is_first_rank(t);
    if (writes) { lock_output(t); }
    initial_state(t);
    bool resumed = o->resume && resume(t, !o->eval_only);
    if (!resumed) {
        if (o->resume && o->eval_only) { fatal("--eval-only -y 1: there is no checkpoint in '%s'", o->out); }
        if (o->resume && is_first_rank(t)) {
            printf("resuming    there is no checkpoint in %s yet: starting from the beginning\n", o->out);
        }
        initial_weights(t);
    }
    if (writes) {
        if (!folder_ensure(o->out, error, sizeof error)) { fatal("--out (-o): %s", error); }
        const bool was_there = t->out_lock >= 0;
        lock_output(t);
        if (!was_there || !o->resume) { protect_output(o); } // somebody may have been here in the meantime
        runlog_open(&t->log, path_join(path, o->out, "log.csv"), &t->plan.config, o->log_tensors,
                    resumed ? t->state.tokens : -1);
        // Last: a resume that was refused, or has nothing left to do, changes nothing, and a run that cannot begin leaves nothing.
        const bool begins = !resumed || (double)t->state.tokens < t->plan.budget;
        if (begins && !write_config(t, error, sizeof error)) {
            if (!resumed) { unlink(path_join(path, o->out, "log.csv")); }
            fatal("--out (-o) cannot be written: %s", error);
        }
    }
}

static inline void trainer_close(Trainer* t) {
    if (t->log.table.num_tensors > 0) { runlog_close(&t->log); }
    if (t->out_lock >= 0) { close(t->out_lock); }
    if (t->backend.self != NULL) { t->backend.close(t->backend.self); }
    tokenizer_close(&t->tokenizer);
    if (t->hellaswag.num_examples > 0) { hellaswag_close(&t->hellaswag); }
    dataloader_close(&t->train);
    dataloader_close(&t->val);
    batch_schedule_free(&t->plan.batch);
    free(t->prompt);
    free(t->stats.sq_sum);
    free(t->stats.sum_sq);
    free(t->tokens);
    free(t->targets);
    free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation, samples, checkpoints

// Evaluates, says what came out, and notes it for the log; NAN for what was not measured. False if a loss is no number.
static inline bool evaluate(Trainer* t, double* val_loss, double* accuracy) {
    const Options* o = &t->options;
    const bool has_val = t->val_sequences > 0, has_hellaswag = t->hellaswag.num_examples > 0;
    *val_loss = *accuracy = NAN;
    if (has_val) {
        *val_loss = evaluate_loss(&t->backend, &t->val, t->plan.config.vocab_size, t->val_sequences, o->micro_batch);
    }
    if (has_hellaswag) { *accuracy = hellaswag_evaluate(&t->hellaswag, &t->backend, o->micro_batch, t->plan.T, 0); }
    const bool broken = has_val && !isfinite(*val_loss);
    if (is_first_rank(t) && (has_val || has_hellaswag)) {
        char tokens[16], where[32] = "", loss[32] = "", hellaswag[48] = "";
        if (!o->eval_only) {
            format_count(tokens, sizeof tokens, (double)t->state.tokens);
            snprintf(where, sizeof where, " at %s tokens", tokens);
        }
        if (has_val) { snprintf(loss, sizeof loss, " | val loss %.4f", *val_loss); }
        if (has_hellaswag) { snprintf(hellaswag, sizeof hellaswag, " | HellaSwag %.4f", *accuracy); }
        printf("eval%s%s%s\n", where, loss, hellaswag);
        fflush(stdout);
        if (broken) { warn("the validation loss is not a finite number: the model's weights are broken"); }
    }
    return !broken;
}

static inline void sample(Trainer* t) {
    const Options* o = &t->options;
    SampleSettings s;
    s.tokenizer = &t->tokenizer;
    s.prompt = t->prompt;
    s.prompt_len = t->prompt_len;
    s.length = o->sample_length;
    s.temperature = (float)o->temperature;
    s.top_k = o->top_k;
    print_sample(&t->backend, &t->plan.config, t->plan.T, &s, &t->state.sampler_rng);
}

// Saves a checkpoint; a failure is said, and false.
static inline bool save(Trainer* t) {
    const Options* o = &t->options;
    char error[PATH_SIZE + 256];
    char* text = state_text(t);
    if (is_first_rank(t)) { runlog_flush(&t->log); }
    const int keep = t->state.bad_streak > 0 ? 0 : o->keep; // a model that may be broken pushes out no good one
    bool ok = checkpoint_save(o->out, t->state.step, &t->plan.config, &t->backend, text, keep, error, sizeof error);
    free(text);
    if (!ok) {
        warn("the checkpoint at step %" PRId64 " could not be saved: %s", t->state.step, error);
    } else if (is_first_rank(t)) {
        printf("checkpoint at step %" PRId64 "\n", t->state.step);
        fflush(stdout);
    }
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// One step

// The number of the step's first sequence in the data stream.
static inline int64_t first_sequence(const Trainer* t) { return t->options.overfit ? 0 : t->state.sequences; }

// Forward and backward of this rank's contiguous share of the step's n sequences, in as few micro-batches as -b allows and
// these as equal as can be: 17 sequences at -b 16 are 8 and 9. Returns the number of micro-batches.
static inline int run_micro_batches(Trainer* t, int n) {
    const Backend* b = &t->backend;
    const size_t T = (size_t)t->plan.T;
    const int64_t begin = (int64_t)n * b->rank / b->num_ranks,
                  share = (int64_t)n * (b->rank + 1) / b->num_ranks - begin;
    const int64_t first = begin + first_sequence(t);
    const int64_t count = (share + t->options.micro_batch - 1) / t->options.micro_batch;
    for (int64_t i = 0; i < count; i++) {
        const int64_t from = share * i / count, to = share * (i + 1) / count;
        for (int64_t k = from; k < to; k++) {
            const size_t row = (size_t)(k - from) * T;
            dataloader_get(&t->train, (uint64_t)(first + k), t->plan.config.vocab_size, t->tokens + row,
                           t->targets + row);
        }
        b->micro(b->self, t->tokens, t->targets, (int)(to - from), t->plan.T);
    }
    return (int)count;
}

static inline StepHyper step_hyper(const Trainer* t, const StepPlan* plan) {
    const Options* o = &t->options;
    StepHyper h;
    h.step = t->state.applied + 1;
    h.n = plan->n;
    h.lr = (float)plan->lr;
    h.beta1 = (float)o->beta1;
    h.beta2 = (float)plan->beta2;
    h.eps = (float)o->eps;
    h.weight_decay = (float)plan->weight_decay;
    h.grad_clip = (float)o->grad_clip;
    h.loss_limit = (float)outlier_limit(&t->state.loss_z, o->outlier_loss_z);
    h.grad_norm_limit = (float)outlier_limit(&t->state.grad_z, o->outlier_grad_z);
    return h;
}

// Moves the run's state on by the step: its position, what it teaches, and the next batch of the closed loop. From a step
// whose update was not applied nothing is learned.
static inline void learn_from_step(Trainer* t, LogRow* row) {
    RunState* r = &t->state;
    const StepStats* s = &t->stats;
    const int64_t step_tokens = (int64_t)s->n * t->plan.T;
    const bool applied = s->outcome == STEP_APPLIED;
    r->step++;
    r->tokens += step_tokens;
    r->sequences += s->n;
    r->applied += applied;
    r->skipped_nonfinite += s->outcome == STEP_SKIPPED_NONFINITE;
    r->skipped_outlier += s->outcome == STEP_SKIPPED_LOSS || s->outcome == STEP_SKIPPED_GRAD;
    r->bad_streak = applied ? 0 : r->bad_streak + 1;
    if (applied) {
        outlier_accept(&r->loss_z, s->loss);
        outlier_accept(&r->grad_z, s->grad_norm);
    }
    const ParamTable table = param_table(&t->plan.config);
    gns_group_samples(&table, s, row->samples);
    gns_tracker_update(&r->tracker, applied ? row->samples : NULL, (double)step_tokens);
    for (int g = 0; g < NUM_GNS_GROUPS; g++) { row->estimates[g] = gns_estimate(&r->tracker, g); }
    if (applied && t->plan.closed_loop) {
        controller_update(&r->controller, &row->estimates[GNS_GROUP_LN], gns_calibration(&r->tracker),
                          (double)step_tokens, lr_decay_done(&t->plan.lr, (double)r->tokens));
    }
}

// Has the disk read what the next step will want, so that it is there when its turn comes: to be called while the device is
// busy with this step of n sequences.
static inline void prefetch(const Trainer* t, int n) {
    for (int64_t i = n; i < 2 * (int64_t)n; i++) { dataloader_prefetch(&t->train, (uint64_t)(first_sequence(t) + i)); }
}

// One optimizer step; *row receives its numbers. False, with the reason in error and nothing done, if the data is damaged.
static inline bool train_step(Trainer* t, LogRow* row, char* error, size_t error_size) {
    const Backend* b = &t->backend;
    const RunState* r = &t->state;
    const double start = seconds_now();
    const StepPlan plan = plan_step(&t->plan, &t->options, r->step, r->tokens, r->controller.batch);
    memset(row, 0, sizeof *row);
    // Every rank checks all of the step's sequences, so that all agree.
    const uint64_t first = (uint64_t)first_sequence(t);
    if (!dataloader_check(&t->train, first, plan.n, t->plan.config.vocab_size, error, error_size)) { return false; }
    row->step = r->step;
    b->step_begin(b->self, plan.gns);
    row->micro_batches = run_micro_batches(t, plan.n);
    prefetch(t, plan.n);
    const StepHyper hyper = step_hyper(t, &plan);
    b->step_end(b->self, &hyper, &t->stats);
    learn_from_step(t, row);

    row->tokens = r->tokens;
    row->train_loss = row->val_loss = row->hellaswag = NAN;
    row->lr = plan.lr;
    row->batch_target = plan.target;
    row->stats = &t->stats;
    row->dt = fmax(1e-9, seconds_now() - start);
    row->tokens_per_sec = (double)plan.n * t->plan.T / row->dt;
    const double flops = row->tokens_per_sec * flops_per_token(&t->plan.config, t->plan.T);
    row->mfu = b->peak_flops > 0 ? 100 * flops / (b->peak_flops * b->num_ranks) : NAN;
    progress_update(&t->state.progress, row);
    return true;
}

// A line on the console: at the first and last step, where something was measured or went wrong, and once a second.
static inline void show_progress(Trainer* t, const LogRow* row, bool last) {
    const double now = seconds_now();
    bool due = last || row->step == 0 || t->stats.outcome != STEP_APPLIED || now - t->last_line >= 1;
    if (is_first_rank(t) && due) {
        char line[512];
        progress_line(&t->state.progress, row, t->plan.budget, line, sizeof line);
        puts(line);
        fflush(stdout);
        t->last_line = now;
    }
}

// Did the position pass a multiple of the interval when it went from `before` to `now`? An interval of 0 is off.
static inline bool interval_crossed(Interval every, int64_t before, int64_t now) {
    return every.count > 0 && floor((double)now / every.count) > floor((double)before / every.count);
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop

// Too many bad steps in a row: says so and where to go back to; the exit status.
static inline int give_up(const Trainer* t) {
    char path[PATH_SIZE] = "";
    int64_t step;
    bool found = t->options.out != NULL && checkpoint_find(t->options.out, path, sizeof path, &step);
    if (is_first_rank(t)) {
        fprintf(stderr,
                "error: %d steps in a row were skipped (--max-bad-steps), the last with loss %g and gradient norm %g; "
                "%s%s; "
                "try a lower --lr or a longer --warmup\n",
                t->state.bad_streak, t->stats.loss, t->stats.grad_norm,
                found ? "the last checkpoint before them is " : "no checkpoint was saved", path);
    }
    return 1;
}

// Damaged data: saves what there is, says so and what to do; the exit status. tried: to save it after the last step, with
// this status.
static inline int give_up_on_data(Trainer* t, const char* problem, bool tried, int status) {
    const bool has_steps = t->options.out != NULL && t->state.step > 0;
    const bool can_resume = tried ? status == 0 : has_steps && save(t);
    if (is_first_rank(t)) {
        fprintf(stderr, "error: %s%s\n", problem,
                can_resume
                    ? "; all steps before it are saved: mend the data, which must keep its length, and go on with -y 1"
                    : "");
    }
    return 2;
}

// Steps until the budget is reached, a signal comes or the run has to be given up; the exit status.
static inline int train_loop(Trainer* t) {
    const Options* o = &t->options;
    LogRow row;
    char error[PATH_SIZE + 256];
    double first_loss, first_accuracy; // only said: the log's first row is that of the first step
    int status = 0;
    bool due = false;               // a checkpoint
    bool tried = t->state.step > 0; // to save one after the last step; a resumed run has one
    if (t->state.step == 0 && o->val_every.count > 0) { evaluate(t, &first_loss, &first_accuracy); }
    for (bool last = *stop_flag(); !last && (double)t->state.tokens < t->plan.budget;) {
        const int64_t before = t->state.tokens;
        if (!train_step(t, &row, error, sizeof error)) { return give_up_on_data(t, error, tried, status); }
        const int64_t now = t->state.tokens;
        const bool done = (double)now >= t->plan.budget;
        if (o->val_every.count > 0 && (done || interval_crossed(o->val_every, before, now))) {
            evaluate(t, &row.val_loss, &row.hellaswag);
            row.train_loss = t->state.progress.loss / t->state.progress.loss_weight;
        }
        show_progress(t, &row, done);
        if (o->sample_every.count > 0 && (done || interval_crossed(o->sample_every, before, now))) { sample(t); }
        if (t->log.columns > 0 && (done || row.step % o->log_every == 0 || !isnan(row.val_loss))) {
            runlog_row(&t->log, &row);
        }
        if (t->state.bad_streak >= o->max_bad_steps) { return give_up(t); }
        last = done || *stop_flag();
        // While steps are skipped the weights may be what is broken: the checkpoint waits for the next good step.
        due = due || interval_crossed(o->checkpoint_every, before, now);
        tried = o->out != NULL && (last || (due && t->state.bad_streak == 0));
        if (tried) {
            status = save(t) ? 0 : 1;
            due = false;
        }
    }
    return status;
}

// The last words of a run.
static inline void echo_end(const Trainer* t, double seconds) {
    char tokens[16], time[32];
    const RunState* r = &t->state;
    printf("%s %" PRId64 " steps, %s tokens, %s", (double)r->tokens >= t->plan.budget ? "finished:" : "stopped at",
           r->step, format_count(tokens, sizeof tokens, (double)r->tokens),
           format_duration(time, sizeof time, seconds));
    if (r->skipped_nonfinite + r->skipped_outlier > 0) {
        printf("; skipped %" PRId64 " steps that were not finite and %" PRId64 " outliers", r->skipped_nonfinite,
               r->skipped_outlier);
    }
    printf("\n");
    fflush(stdout);
}

// The whole program of a trainer, whose model is what `open` opens; returns the exit status.
static inline int train_main(int argc, char** argv, BackendOpen open) {
    Trainer* t = (Trainer*)alloc_zeroed(1, sizeof(Trainer), "the trainer");
    t->out_lock = -1;
    const double start = seconds_now();
    int status = 0;
    options_parse(argc, argv, &t->options);
    watch_token_files();
    trainer_prepare(t);
    if (t->options.dry_run) {
        status = dry_run(&t->plan, &t->options);
        trainer_close(t);
        return status;
    }
    trainer_start(t, open);
    if (t->options.eval_only) {
        double val_loss, accuracy;
        status = evaluate(t, &val_loss, &accuracy) ? 0 : 1;
        if (t->options.sample_every.count > 0) { sample(t); }
    } else {
        stop_on_signals();
        status = train_loop(t);
        if (is_first_rank(t)) { echo_end(t, seconds_now() - start); }
    }
    trainer_close(t);
    return status;
}

#endif
