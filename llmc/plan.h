/*
What a run is going to do, worked out from its options before anything is opened for writing: the model and its sequence
length, the budget, and the schedules of batch and learning rate; and, from these, what one step does.

Tokens are the clock. plan_step() is a function of the number of tokens consumed before the step (and, in the closed loop,
of the controller's batch), never of the micro-batch or the number of ranks:

    batch  = schedule(tokens) rounded up to a multiple of --batch-quantum sequences
    lr     = schedule(tokens) (batch / B_ref)^P          P = --lr-coupling, 0: off; B_ref: sequences in --batch-tokens
    decay  = --weight-decay (batch / B_ref)^P            P = --wd-coupling
    beta2  = --beta2, or 2^(-tokens in the step / H)     H = --beta2-half-life
    GNS    = ln or all as --gns says; all in each --gns-all-every-th step

The budget is the number of tokens at which the run ends: the step that reaches it is the last, and is not cut.
*/
#ifndef LLMC_PLAN_H
#define LLMC_PLAN_H

#include "check.h"
#include "controller.h"
#include "dataloader.h"
#include "model.h"
#include "modelfile.h"
#include "options.h"
#include "schedule.h"
#include <math.h>

enum { GPT2_VOCAB = 50257 };

typedef struct {
    GPTConfig config;
    int64_t num_params;         // that are trained: without the rows that pad the vocabulary
    int T;                      // tokens in a sequence
    double batch_ref;           // sequences in --batch-tokens
    double budget;              // tokens
    bool closed_loop;           // --batch-schedule gns
    LrSchedule lr;              //
    BatchSchedule batch;        // not for the closed loop
    BatchController controller; // as it is at the start
} Plan;

// ---------------------------------------------------------------------------------------------------------------------
// Model and sequence length

// Sets the bits of the blocks in list ("1,3").
static inline void plan_cosine_blocks(GPTConfig* config, const char* list) {
    for (const char* p = list; *p != '\0';) {
        char* end;
        long block = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : -1;
        if (block < 0 || (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0')) {
            fatal("--cosine-attention '%s': expected block numbers separated by commas, such as 1,3", list);
        }
        if (block >= config->num_layers || block >= MAX_COSINE_BLOCKS) {
            fatal("--cosine-attention %s: block %ld does not exist; the model's %d blocks are counted from 0", list,
                  block, config->num_layers);
        }
        config->cosine_blocks[block / 32] |= UINT32_C(1) << (block % 32);
        p = *end == ',' ? end + 1 : end;
    }
}

// The vocabulary of a model that leaves it open: that of the data, or GPT-2's where the data does not say.
static inline int plan_vocab(const Options* o) {
    const char* data = o->train_data != NULL ? o->train_data : o->val_data;
    int vocab_size = data != NULL ? dataloader_peek_vocab(data) : 0;
    return vocab_size > 0 ? vocab_size : GPT2_VOCAB;
}

// Fills in the model, its size and T. fatal() if the options name none that exists or that fits.
static inline void plan_model(Plan* p, const Options* o) {
    GPTConfig* config = &p->config;
    if (model_is_file(o->model)) {
        model_file_config(o->model, config);
    } else if (!config_from_name(o->model, config)) {
        fatal("--model (-e) '%s' is unknown: expected %s", o->model, option_find("model")->help);
    }
    if (config->vocab_size == 0) {
        config->vocab_size = plan_vocab(o);
        config->padded_vocab_size = padded_vocab(config->vocab_size);
    }
    if (o->gelu > 0) { config->gelu = o->gelu - 1; }
    if (o->init > 0) { config->init = o->init - 1; }
    if (o->cosine_attention != NULL) { plan_cosine_blocks(config, o->cosine_attention); }
    const char* problem = config_error(config);
    if (problem != NULL) { fatal("--model (-e) '%s' cannot be trained: %s", o->model, problem); }
    if (o->seq_len != OPTION_WORD && o->seq_len > config->max_seq_len) {
        fatal("--seq-len (-t) %d is longer than the %d positions of the model %s; give a shorter -t, or a model with "
              "T=%d",
              o->seq_len, config->max_seq_len, o->model, o->seq_len);
    }
    p->T = o->seq_len != OPTION_WORD ? o->seq_len : min_int(1024, config->max_seq_len);
    const ParamTable table = param_table(config);
    p->num_params = (int64_t)param_count(&table);
}

// ---------------------------------------------------------------------------------------------------------------------
// Budget and schedules

// The closed loop's controller, within its bounds. fatal() if these leave it no room.
static inline void plan_controller(Plan* p, Options* o) {
    const int quantum = o->batch_quantum;
    if (o->batch_min == OPTION_WORD) {
        o->batch_min = batch_round(2, quantum); // one example has no noise scale
    }
    if (o->batch_max == OPTION_WORD) { o->batch_max = batch_round(p->batch_ref, quantum); }
    if (o->batch_min > o->batch_max) {
        fatal("--batch-schedule gns has no room between --batch-min %d and --batch-max %d (which is the batch of -d, "
              "%.0f "
              "sequences, unless given); give larger --batch-tokens or --batch-max",
              o->batch_min, o->batch_max, p->batch_ref);
    }
    p->controller.batch_min = o->batch_min;
    p->controller.batch_max = o->batch_max;
    p->controller.tau = o->gns_tau;
    p->controller.scale = o->gns_scale;
    p->controller.power = o->gns_power;
    p->controller.measured_calibration = o->gns_calibration == OPTION_WORD;
    p->controller.calibration = p->controller.measured_calibration ? 1 : o->gns_calibration;
    p->controller.freeze_fraction = o->gns_freeze;
    p->controller.may_fall = o->batch_may_fall;
    controller_init(&p->controller);
}

// Does the budget depend on how much data there is?
static inline bool budget_is_epoch(const Options* o) {
    return o->max_tokens == OPTION_WORD && o->max_steps == 0 && o->tokens_per_param == OPTION_WORD;
}

static inline void interval_to_tokens(Interval* interval, double batch_tokens) {
    interval->count *= interval->unit == UNIT_STEPS ? batch_tokens : 1;
    interval->unit = UNIT_TOKENS;
}

// After plan_model: fills in the rest, and writes every option that was left open as resolved back into *o. epoch_tokens:
// one pass over the training data, the budget if no other is given.
static inline void plan_schedules(Plan* p, Options* o, double epoch_tokens) {
    o->seq_len = p->T;
    if (o->batch_tokens == OPTION_WORD) { o->batch_tokens = (double)o->micro_batch * p->T; }
    p->batch_ref = o->batch_tokens / p->T;
    if (p->batch_ref != floor(p->batch_ref) || p->batch_ref > MAX_BATCH) {
        fatal("--batch-tokens (-d) %.15g must be a whole number of sequences of %d tokens (-t), at most %d; the "
              "nearest is %.15g",
              o->batch_tokens, p->T, MAX_BATCH, fmin(MAX_BATCH, fmax(1, round(p->batch_ref))) * p->T);
    }
    p->budget = o->max_tokens != OPTION_WORD         ? o->max_tokens
                : o->max_steps > 0                   ? o->max_steps * o->batch_tokens
                : o->tokens_per_param != OPTION_WORD ? o->tokens_per_param * (double)p->num_params
                                                     : epoch_tokens;
    p->budget = ceil(p->budget);
    o->max_tokens = p->budget;
    interval_to_tokens(&o->warmup, o->batch_tokens);
    interval_to_tokens(&o->val_every, o->batch_tokens);
    interval_to_tokens(&o->sample_every, o->batch_tokens);
    interval_to_tokens(&o->checkpoint_every, o->batch_tokens);
    if (o->val_batches != OPTION_WORD) { o->val_tokens = (double)o->val_batches * o->micro_batch * p->T; }
    if (o->gns_tau == OPTION_WORD) { o->gns_tau = fmax(1, 0.01 * p->budget); }
    if (o->log_tensors == LOG_TENSORS_MEASURED) { o->log_tensors = o->gns_all_every > 0 ? GNS_ALL : o->gns; }
    if (o->warmup.count > p->budget) {
        fatal("--warmup (-u) of %.15g tokens is longer than the budget of %.15g tokens", o->warmup.count, p->budget);
    }
    p->lr.kind = o->lr_schedule;
    p->lr.max_lr = o->lr;
    p->lr.final_frac = o->final_lr_frac;
    p->lr.warmup_tokens = o->warmup.count;
    p->lr.budget_tokens = p->budget;
    p->lr.decay_frac = 0.2;
    p->closed_loop = schedule_is_gns(o);
    const char* problem = batch_schedule_parse(&p->batch, o->batch_schedule, p->batch_ref, p->budget);
    if (problem != NULL) { fatal("--batch-schedule '%s': %s", o->batch_schedule, problem); }
    if (p->closed_loop) { plan_controller(p, o); }
}

// ---------------------------------------------------------------------------------------------------------------------
// One step

typedef struct {
    double target; // sequences that the schedule asks for
    int n;         // sequences that the step takes
    double lr, beta2, weight_decay;
    int gns; // what to measure: GNS_*
} StepPlan;

// Step number `step` (from 0), before which `tokens` tokens were consumed; batch: the controller's, for the closed loop.
static inline StepPlan plan_step(Plan* p, const Options* o, int64_t step, int64_t tokens, double controller_batch) {
    StepPlan s;
    s.target = p->closed_loop ? controller_batch : batch_schedule_at(&p->batch, (double)tokens);
    s.n = batch_round(s.target, o->batch_quantum);
    s.lr = coupled_lr(lr_at(&p->lr, (double)tokens), s.n, p->batch_ref, o->lr_coupling);
    s.weight_decay = coupled_weight_decay(o->weight_decay, s.n, p->batch_ref, o->wd_coupling);
    s.beta2 = o->beta2_half_life > 0 ? beta2_from_half_life(o->beta2_half_life, (double)s.n * p->T) : o->beta2;
    s.gns = o->gns == GNS_LN && o->gns_all_every > 0 && step % o->gns_all_every == 0 ? GNS_ALL : o->gns;
    return s;
}

#endif
