/*
The command line. One table (option_rows) holds, for every option, its name, the single letter of llm.c where the meaning
is the same, its type, range, default, help, and the field of Options that it sets. Parsing, --help, the errors, the echo
at start-up and the options in config.json are all read off that table.

    --name VALUE   --name=VALUE   -l VALUE        the last of several wins; a flag's value may be left out (--dry-run, -y 1)

Types: a text; a whole number; a number; a count of tokens (K, M and B are 10^3, 10^6 and 10^9); an interval; one of
several words; a flag. Some numbers may also be a word, which is stored as OPTION_WORD (--gns-calibration measured).

An interval is a number of tokens with a unit, `10M` or `300000tokens`, or `250steps`, and a step is then always
--batch-tokens tokens, whatever the batch schedule does. After a letter of llm.c a bare number means steps, as it does
there: `-v 250`. After a long name it would be ambiguous and is refused. 0 switches the thing off.

Everything wrong with a command line ends in one line on stderr that names the option and what would be accepted, with
exit status 2, before anything is written.
*/
#ifndef LLMC_OPTIONS_H
#define LLMC_OPTIONS_H

#include "check.h"
#include "model.h"
#include "schedule.h"
#include "units.h"
#include <math.h>

enum { UNIT_TOKENS, UNIT_STEPS };

typedef struct {
    double count;
    int unit;
} Interval;

enum { OPTION_WORD = -1 }; // a number that was given as a word
enum { LOG_TENSORS_MEASURED = 3 };

typedef struct {
    // model and data
    const char *train_data, *val_data, *tokenizer, *model, *init_from, *cosine_attention;
    int gelu, init; // 0: the model's own; else 1 + model.h's GELU_*, INIT_*
    int seed;
    // batch and budget
    int micro_batch, seq_len;
    double batch_tokens, max_tokens, tokens_per_param;
    int max_steps, overfit;
    // optimizer and learning rate
    double lr, final_lr_frac, weight_decay, beta1, beta2, eps, grad_clip;
    int lr_schedule; // schedule.h's LR_*
    Interval warmup;
    // noise scale and batch schedule
    int gns; // model.h's GNS_*
    int gns_all_every;
    double gns_tau;
    const char* batch_schedule;
    int batch_quantum, batch_min, batch_max, batch_may_fall;
    double gns_scale, gns_power, gns_calibration, gns_freeze;
    double lr_coupling, beta2_half_life, wd_coupling;
    // evaluation and samples
    Interval val_every, sample_every;
    int val_batches, sample_length, top_k, eval_only;
    double val_tokens, temperature;
    const char *hellaswag, *prompt;
    // output
    const char* out;
    Interval checkpoint_every;
    int keep, resume, log_every, dry_run;
    int log_tensors; // GNS_*: whose tensors; LOG_TENSORS_MEASURED until the plan is made
    // guards
    double outlier_loss_z, outlier_grad_z;
    int max_bad_steps;
    // machine
    int recompute; // model.h's RECOMPUTE_*
    int tf32, profile;

    bool given[96]; // by row of the table: was it on the command line?
} Options;

// ---------------------------------------------------------------------------------------------------------------------
// The table

enum { OPTION_TEXT, OPTION_INT, OPTION_NUMBER, OPTION_TOKENS, OPTION_INTERVAL, OPTION_CHOICE, OPTION_FLAG };

typedef struct {
    const char* group; // heading in --help; NULL: the one before
    const char* name;
    const char* letter; // of llm.c, without the dash; NULL: none
    int type;
    size_t offset; // of the field in Options
    double min, max;
    const char* words;    // OPTION_CHOICE: a|b|c, stored as 0, 1, 2; numbers: a word stored as OPTION_WORD; else NULL
    const char* fallback; // the default, as one would type it; NULL: no text
    const char* value;    // what --help calls the value
    const char* help;
} OptionRow;

#define AT(field) offsetof(Options, field)
// clang-format off
static const OptionRow option_rows[] = {
    {"Model and data", "train-data", "i", OPTION_TEXT, AT(train_data), 0, 0, NULL, NULL, "FILES",
     "token files to train on; a pattern in quotes takes several: -i 'data/x_train_*.bin'"},
    {NULL, "val-data", "j", OPTION_TEXT, AT(val_data), 0, 0, NULL, NULL, "FILES",
     "token files to evaluate on"},
    {NULL, "tokenizer", NULL, OPTION_TEXT, AT(tokenizer), 0, 0, NULL, NULL, "FILE",
     "tokenizer file, to encode --prompt and to print samples"},
    {NULL, "model", "e", OPTION_TEXT, AT(model), 0, 0, NULL, "d12", "MODEL",
     "d6 d12 d24 d36 d48 (GPT-2), gpt3:c384 ... gpt3:c12288, cgpt:111m, L=6,H=6,C=384[,T=1024][,V=50257], or an llm.c "
     "model file: FILE.bin (shape and weights)"},
    {NULL, "init-from", NULL, OPTION_TEXT, AT(init_from), 0, 0, NULL, NULL, "FILE",
     "start from the weights of this llm.c model file, with a fresh optimizer"},
    {NULL, "init", NULL, OPTION_CHOICE, AT(init), 0, 0, "model|normal|truncated", "model", "KIND",
     "how initial weights are drawn: model (as its name asks), normal, or truncated at two standard deviations"},
    {NULL, "gelu", NULL, OPTION_CHOICE, AT(gelu), 0, 0, "model|tanh|erf", "model", "KIND",
     "form of the GELU: model (as its name or file asks), tanh (GPT-2's) or erf"},
    {NULL, "cosine-attention", NULL, OPTION_TEXT, AT(cosine_attention), 0, 0, NULL, NULL, "BLOCKS",
     "normalise q and k to length 1 in these blocks, counted from 0: 1,3"},
    {NULL, "seed", NULL, OPTION_INT, AT(seed), 0, 2147483647, NULL, "42", "N",
     "of initial weights, order of the data, and samples"},

    {"Batch and budget", "micro-batch", "b", OPTION_INT, AT(micro_batch), 1, 65536, NULL, "4", "N",
     "most sequences that are in memory at once; with -d given, it never changes the result beyond rounding"},
    {NULL, "seq-len", "t", OPTION_INT, AT(seq_len), 1, 1048576, "model", "model", "N",
     "tokens in a sequence; model: the longest that the model takes, at most 1024"},
    {NULL, "batch-tokens", "d", OPTION_TOKENS, AT(batch_tokens), 1, 1e12, "micro-batch", "micro-batch", "TOKENS",
     "tokens in an optimizer step, a multiple of -t; micro-batch: -b x -t"},
    {NULL, "max-steps", "x", OPTION_INT, AT(max_steps), 0, 2e9, NULL, "0", "N",
     "budget as steps of -d tokens (0, and no other budget given: one pass over the training data)"},
    {NULL, "max-tokens", NULL, OPTION_TOKENS, AT(max_tokens), 1, 1e15, "none", "none", "TOKENS",
     "budget in tokens; the step that reaches it is the last and is not cut"},
    {NULL, "tokens-per-param", NULL, OPTION_NUMBER, AT(tokens_per_param), 1e-6, 1e6, "none", "none", "R",
     "budget as a multiple of the number of parameters (20: Chinchilla)"},
    {NULL, "overfit", "a", OPTION_FLAG, AT(overfit), 0, 0, NULL, "0", NULL,
     "take every step's sequences from the start of the data, to see a model learn them by heart"},

    {"Optimizer (AdamW) and learning rate", "lr", "l", OPTION_NUMBER, AT(lr), 0, 100, NULL, "3e-4", "X",
     "peak learning rate"},
    {NULL, "lr-schedule", "k", OPTION_CHOICE, AT(lr_schedule), 0, 0, "constant|cosine|linear|wsd", "cosine", "KIND",
     "constant, cosine, linear, or wsd (constant, falling over the last 20% of the budget)"},
    {NULL, "final-lr-frac", "q", OPTION_NUMBER, AT(final_lr_frac), 0, 1, NULL, "1", "X",
     "learning rate at the end of the budget, as a share of the peak (1: no decay)"},
    {NULL, "warmup", "u", OPTION_INTERVAL, AT(warmup), 0, 1e15, NULL, "0", "EVERY",
     "learning rate rises linearly from 0 over so many tokens, or steps: 10M, 300000tokens or 100steps"},
    {NULL, "weight-decay", "c", OPTION_NUMBER, AT(weight_decay), 0, 100, NULL, "0", "X",
     "of matrices and embeddings"},
    {NULL, "beta1", NULL, OPTION_NUMBER, AT(beta1), 0, 0.999999, NULL, "0.9", "X",
     "decay of Adam's first moment"},
    {NULL, "beta2", NULL, OPTION_NUMBER, AT(beta2), 0, 0.999999, NULL, "0.95", "X",
     "decay of Adam's second moment"},
    {NULL, "eps", NULL, OPTION_NUMBER, AT(eps), 1e-30, 1, NULL, "1e-8", "X",
     "Adam's epsilon"},
    {NULL, "grad-clip", NULL, OPTION_NUMBER, AT(grad_clip), 0, 1e30, NULL, "1", "X",
     "largest norm of the gradient; 0: no clipping"},

    {"Gradient noise scale (GNS)", "gns", NULL, OPTION_CHOICE, AT(gns), 0, 0, "off|ln|all", "ln", "WHAT",
     "per-example gradient norms: off, of the LayerNorms (costs next to nothing), or of all tensors"},
    {NULL, "gns-all-every", NULL, OPTION_INT, AT(gns_all_every), 0, 1000000000, NULL, "0", "N",
     "measure all tensors in every N-th step, which calibrates LayerNorm against total; 0: never"},
    {NULL, "gns-tau", NULL, OPTION_TOKENS, AT(gns_tau), 1, 1e15, "auto", "auto", "TOKENS",
     "smoothing length; auto: 1% of the budget"},

    {"Batch-size schedule (sizes in sequences)", "batch-schedule", NULL, OPTION_TEXT, AT(batch_schedule), 0, 0, NULL,
     "fixed", "SPEC",
     "fixed (-d tokens), linear:FROM:TO over the budget, steps:0:64,100M:128,... thresholds in tokens, file:PATH[:UNIT] "
     "knots 'tokens, size' re-read while running, or gns: set from the measured noise scale, B = k (c GNS)^p"},
    {NULL, "batch-quantum", NULL, OPTION_INT, AT(batch_quantum), 1, 1000000, NULL, "1", "N",
     "every batch is rounded up to a multiple of N sequences"},
    {NULL, "batch-min", NULL, OPTION_INT, AT(batch_min), 2, MAX_BATCH, "auto", "auto", "N",
     "gns: smallest batch, and the first; auto: 2 or the quantum"},
    {NULL, "batch-max", NULL, OPTION_INT, AT(batch_max), 2, MAX_BATCH, "auto", "auto", "N",
     "gns: largest batch; auto: that of -d"},
    {NULL, "batch-may-fall", NULL, OPTION_FLAG, AT(batch_may_fall), 0, 0, NULL, "0", NULL,
     "gns: the batch may also become smaller"},
    {NULL, "gns-scale", NULL, OPTION_NUMBER, AT(gns_scale), 1e-6, 1e6, NULL, "1", "K",
     "gns: k in k (c GNS)^p"},
    {NULL, "gns-power", NULL, OPTION_NUMBER, AT(gns_power), 0.01, 4, NULL, "1", "P",
     "gns: p in k (c GNS)^p; 0.5: the square root of McCandlish's optimum"},
    {NULL, "gns-calibration", NULL, OPTION_NUMBER, AT(gns_calibration), 1e-6, 1e6, "measured", "1", "C",
     "gns: c, the total GNS over that of the LayerNorms; a number, or measured (with --gns-all-every or --gns all)"},
    {NULL, "gns-freeze", NULL, OPTION_NUMBER, AT(gns_freeze), 0, 1, NULL, "1", "X",
     "gns: keep the batch once this share of the learning rate's decay is over, as the decay itself raises the GNS"},
    {NULL, "lr-coupling", NULL, OPTION_NUMBER, AT(lr_coupling), 0, 2, NULL, "0", "P",
     "learning rate x (batch / batch of -d)^P; 0: off"},
    {NULL, "wd-coupling", NULL, OPTION_NUMBER, AT(wd_coupling), 0, 2, NULL, "0", "P",
     "weight decay x (batch / batch of -d)^P; 0: off"},
    {NULL, "beta2-half-life", NULL, OPTION_TOKENS, AT(beta2_half_life), 0, 1e15, NULL, "0", "TOKENS",
     "beta2 of a step is 2^(-its tokens / this), in place of --beta2; 0: off"},

    {"Evaluation and samples", "val-every", "v", OPTION_INTERVAL, AT(val_every), 0, 1e15, NULL, "20steps", "EVERY",
     "evaluate at the start, in this interval, and at the end; 0: never"},
    {NULL, "val-tokens", NULL, OPTION_TOKENS, AT(val_tokens), 1, 1e15, NULL, "81920", "TOKENS",
     "tokens to evaluate on, always the same ones, from the start of -j; rounded up to whole sequences"},
    {NULL, "val-batches", "m", OPTION_INT, AT(val_batches), 1, 1000000000, "none", "none", "N",
     "the same as batches of -b x -t tokens"},
    {NULL, "hellaswag", NULL, OPTION_TEXT, AT(hellaswag), 0, 0, NULL, NULL, "FILE",
     "also measure the accuracy on this evaluation file (llm.c's HellaSwag)"},
    {NULL, "eval-only", NULL, OPTION_FLAG, AT(eval_only), 0, 0, NULL, "0", NULL,
     "evaluate a model (-e FILE.bin, --init-from FILE, or -o RUN -y 1 with the run's -e), train nothing"},
    {NULL, "sample-every", "s", OPTION_INTERVAL, AT(sample_every), 0, 1e15, NULL, "0", "EVERY",
     "print a sample in this interval and at the end; 0: never"},
    {NULL, "sample-length", "g", OPTION_INT, AT(sample_length), 1, 1048576, NULL, "64", "N",
     "tokens in a sample, after the prompt"},
    {NULL, "prompt", NULL, OPTION_TEXT, AT(prompt), 0, 0, NULL, NULL, "TEXT",
     "what samples start with; without it, the end-of-text token alone"},
    {NULL, "temperature", NULL, OPTION_NUMBER, AT(temperature), 0, 100, NULL, "1", "X",
     "of the samples; 0: always the likeliest token"},
    {NULL, "top-k", NULL, OPTION_INT, AT(top_k), 0, 65536, NULL, "0", "N",
     "sample among the N likeliest tokens; 0: all"},

    {"Output", "out", "o", OPTION_TEXT, AT(out), 0, 0, NULL, NULL, "FOLDER",
     "where log.csv, config.json and checkpoints go; without it nothing is written"},
    {NULL, "checkpoint-every", "n", OPTION_INTERVAL, AT(checkpoint_every), 0, 1e15, NULL, "0", "EVERY",
     "save a checkpoint in this interval; 0: only at the end and when stopped by a signal"},
    {NULL, "keep", NULL, OPTION_INT, AT(keep), 0, 1000000000, NULL, "2", "N",
     "checkpoints to keep, the newest; 0: all"},
    {NULL, "resume", "y", OPTION_FLAG, AT(resume), 0, 0, NULL, "0", NULL,
     "go on from the newest checkpoint in -o; -y 1"},
    {NULL, "log-every", NULL, OPTION_INT, AT(log_every), 1, 1000000000, NULL, "1", "N",
     "write every N-th step to log.csv"},
    {NULL, "log-tensors", NULL, OPTION_CHOICE, AT(log_tensors), 0, 0, "off|ln|all|measured", "measured", "WHICH",
     "which tensors have three columns in log.csv (norm, per-example norm, examples): none, those of the LayerNorms, all, "
     "or those that --gns measures"},
    {NULL, "dry-run", NULL, OPTION_FLAG, AT(dry_run), 0, 0, NULL, "0", NULL,
     "print the schedule of tokens, steps, batch and learning rate, train nothing"},

    {"Guards", "outlier-loss-z", "sl", OPTION_NUMBER, AT(outlier_loss_z), 0, 1000, NULL, "0", "Z",
     "skip the update where the loss is this many standard deviations above the last 128; 0: off"},
    {NULL, "outlier-grad-z", "sg", OPTION_NUMBER, AT(outlier_grad_z), 0, 1000, NULL, "0", "Z",
     "the same for the norm of the gradient"},
    {NULL, "max-bad-steps", NULL, OPTION_INT, AT(max_bad_steps), 1, 1000000000, NULL, "10", "N",
     "end the run, with status 1, after this many skipped steps in a row"},

    {"Machine", "recompute", "r", OPTION_INT, AT(recompute), 0, 2, "auto", "auto", "N",
     "what the backward pass computes again to save memory: 0 nothing, 1 the output of GELU, 2 also that of the "
     "LayerNorms; auto: 0 on a GPU, 2 on the CPU, which knows nothing else"},
    {NULL, "tf32", NULL, OPTION_FLAG, AT(tf32), 0, 0, NULL, "0", NULL,
     "CUDA trainer built with PRECISION=FP32: matrix products on tensor cores, with 10 bits of mantissa"},
    {NULL, "profile", NULL, OPTION_FLAG, AT(profile), 0, 0, NULL, "0", NULL,
     "CUDA trainer: print where the time of a step goes, part by part beside its floor, when the run ends"},
};
// clang-format on
#undef AT

enum { NUM_OPTIONS = sizeof option_rows / sizeof option_rows[0] };

// The field of the row in *o, as type.
#define OPTION_FIELD(type, row, o) ((type*)((char*)(o) + (row)->offset))

// The row with this name (without dashes); NULL if there is none.
static inline const OptionRow* option_find(const char* name) {
    for (int i = 0; i < NUM_OPTIONS; i++) {
        if (strcmp(option_rows[i].name, name) == 0) { return &option_rows[i]; }
    }
    return NULL;
}

// Was the option on the command line? name: as in the table.
static inline bool option_given(const Options* o, const char* name) {
    const OptionRow* row = option_find(name);
    return row != NULL && o->given[row - option_rows];
}

// ---------------------------------------------------------------------------------------------------------------------
// Values to and from text

typedef struct {
    char text[256];
} OptionText;

// What the option accepts, as a phrase for error messages.
static inline OptionText option_accepts(const OptionRow* row) {
    OptionText out;
    char* s = out.text;
    size_t size = sizeof out.text;
    switch (row->type) {
    case OPTION_TEXT: snprintf(s, size, "a text (%s)", row->value); break;
    case OPTION_INT: snprintf(s, size, "a whole number from %.0f to %.0f", row->min, row->max); break;
    case OPTION_NUMBER: snprintf(s, size, "a number from %g to %g", row->min, row->max); break;
    case OPTION_TOKENS:
        snprintf(s, size, "a number of tokens from %g to %g, such as 500K, 10M or 2B", row->min, row->max);
        break;
    case OPTION_INTERVAL:
        snprintf(s, size, "tokens (10M, 300000tokens), steps of -d tokens (250steps%s%s%s), or 0",
                 row->letter ? ", or -" : "", row->letter ? row->letter : "", row->letter ? " 250" : "");
        break;
    case OPTION_CHOICE: snprintf(s, size, "one of %s", row->words); break;
    default: snprintf(s, size, "0 or 1"); break;
    }
    if (row->words != NULL && row->type != OPTION_CHOICE) {
        snprintf(s + strlen(s), size - strlen(s), ", or %s", row->words);
    }
    return out;
}

// The option as it is called in messages: "--lr (-l)".
static inline OptionText option_label(const OptionRow* row) {
    OptionText out;
    snprintf(out.text, sizeof out.text, row->letter ? "--%s (-%s)" : "--%s", row->name, row->letter);
    return out;
}

// The interval in text; bare_steps: a bare number counts steps, otherwise it needs a unit.
static inline bool parse_interval(const char* text, bool bare_steps, Interval* interval) {
    char number[64];
    size_t len = strlen(text);
    bool steps = len > 5 && strcmp(text + len - 5, "steps") == 0;
    bool tokens = len > 6 && strcmp(text + len - 6, "tokens") == 0;
    len -= steps ? 5 : tokens ? 6 : 0;
    if (len == 0 || len >= sizeof number) { return false; }
    memcpy(number, text, len);
    number[len] = '\0';
    bool suffix = strchr("KMB", number[len - 1]) != NULL;
    if (!parse_count(number, &interval->count)) { return false; }
    interval->unit = steps || (bare_steps && !tokens && !suffix) ? UNIT_STEPS : UNIT_TOKENS;
    return steps || tokens || suffix || bare_steps || interval->count == 0;
}

// The place of text in words (a|b|c), or -1.
static inline int word_index(const char* words, const char* text) {
    for (int i = 0; *words != '\0'; i++) {
        size_t len = strcspn(words, "|");
        if (strlen(text) == len && strncmp(words, text, len) == 0) { return i; }
        words += len + (words[len] == '|');
    }
    return -1;
}

// Sets the row's field from text; false if it is not what option_accepts() says. by_letter: it came after a single letter.
static inline bool option_set(Options* o, const OptionRow* row, const char* text, bool by_letter) {
    double x = 0;
    if (row->type == OPTION_TEXT) {
        *OPTION_FIELD(const char*, row, o) = text;
        return text == NULL || text[0] != '\0' || row->offset == offsetof(Options, prompt);
    }
    if (row->type == OPTION_CHOICE) {
        *OPTION_FIELD(int, row, o) = word_index(row->words, text);
        return *OPTION_FIELD(int, row, o) >= 0;
    }
    if (row->type == OPTION_FLAG) {
        *OPTION_FIELD(int, row, o) = strcmp(text, "1") == 0;
        return strcmp(text, "0") == 0 || strcmp(text, "1") == 0;
    }
    if (row->type == OPTION_INTERVAL) {
        Interval* interval = OPTION_FIELD(Interval, row, o);
        return parse_interval(text, by_letter, interval) && interval->count >= row->min && interval->count <= row->max;
    }
    bool is_word = row->words != NULL && strcmp(text, row->words) == 0;
    if (is_word) {
        x = OPTION_WORD;
    } else if (!parse_count(text, &x) || x < row->min || x > row->max) {
        return false;
    }
    if (row->type == OPTION_INT) {
        *OPTION_FIELD(int, row, o) = (int)x;
        return x == floor(x);
    }
    *OPTION_FIELD(double, row, o) = x;
    return true;
}

// The row's value as one could type it after the long name; NULL for a text that is not set. Numbers read back exactly.
static inline const char* option_value(const Options* o, const OptionRow* row, OptionText* out) {
    char* s = out->text;
    size_t size = sizeof out->text;
    double x = 0;
    const char* unit = "";
    switch (row->type) {
    case OPTION_TEXT: return *OPTION_FIELD(const char* const, row, o);
    case OPTION_CHOICE: {
        const char* word = row->words;
        for (int i = *OPTION_FIELD(const int, row, o); i > 0; i--) { word += strcspn(word, "|") + 1; }
        snprintf(s, size, "%.*s", (int)strcspn(word, "|"), word);
        return s;
    }
    case OPTION_INTERVAL:
        x = OPTION_FIELD(const Interval, row, o)->count;
        unit = x == 0 ? "" : OPTION_FIELD(const Interval, row, o)->unit == UNIT_STEPS ? "steps" : "tokens";
        break;
    case OPTION_NUMBER:
    case OPTION_TOKENS: x = *OPTION_FIELD(const double, row, o); break;
    default: x = *OPTION_FIELD(const int, row, o); break;
    }
    if (x == OPTION_WORD && row->words != NULL) {
        snprintf(s, size, "%s", row->words);
        return s;
    }
    snprintf(s, size, "%.15g", x);
    if (strtod(s, NULL) != x) { snprintf(s, size, "%.17g", x); }
    snprintf(s + strlen(s), size - strlen(s), "%s", unit);
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Help

// Prints text broken at spaces, from column `indent` (where the cursor is) to column 116.
static inline void print_wrapped(const char* text, int indent) {
    int column = indent;
    while (*text != '\0') {
        int len = (int)strcspn(text, " ");
        if (column > indent && column + 1 + len > 116) {
            printf("\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            putchar(' ');
            column++;
        }
        printf("%.*s", len, text);
        column += len;
        text += len + (text[len] == ' ');
    }
    putchar('\n');
}

static inline void options_help(const char* program) {
    printf(
        "Trains a GPT, measures the noise scale of its gradients (GNS), and can set the batch size from it.\n\n"
        "usage: %s -i FILES [options]\n\n"
        "Tokens take K, M and B (10M is 10 million). EVERY is an interval in tokens, 10M, or in steps of -d tokens,\n"
        "250steps; after a single letter a bare number means steps: -v 250.\n",
        program);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const OptionRow* row = &option_rows[i];
        char left[64];
        char letter[8] = "";
        if (row->group != NULL) { printf("\n%s\n", row->group); }
        if (row->letter != NULL) { snprintf(letter, sizeof letter, "-%s,", row->letter); }
        snprintf(left, sizeof left, "%4s --%s %s", letter, row->name, row->value ? row->value : "");
        printf("  %-31s ", left);
        char help[512];
        bool show = row->fallback != NULL && row->type != OPTION_FLAG;
        snprintf(help, sizeof help, show ? "%s [%s]" : "%s", row->help, row->fallback);
        print_wrapped(help, 34);
    }
    printf("\nOther\n  %-31s ", "  -h, --help");
    print_wrapped("this text", 34);
}

// ---------------------------------------------------------------------------------------------------------------------
// Parsing

// Edits (insert, delete, replace one character) that turn a into b; names are shorter than 64 characters.
static inline int edit_distance(const char* a, const char* b) {
    int row[64];
    int n = (int)strlen(b);
    for (int j = 0; j <= n; j++) { row[j] = j; }
    for (int i = 1; a[i - 1] != '\0'; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = min_int(replace, min_int(row[j], row[j - 1]) + 1);
        }
    }
    return row[n];
}

static inline void option_unknown(const char* arg) __attribute__((noreturn));
static inline void option_unknown(const char* arg) {
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(arg, "="), arg);
    const char* plain = name + strspn(name, "-");
    int best = 4; // further than three edits is no typing error
    const char* nearest = NULL;
    for (int i = 0; plain - name == 2 && i < NUM_OPTIONS; i++) {
        int distance = edit_distance(plain, option_rows[i].name);
        bool begins = strlen(plain) >= 3 && strncmp(option_rows[i].name, plain, strlen(plain)) == 0;
        if (begins || distance < best) {
            best = begins ? 0 : distance;
            nearest = option_rows[i].name;
        }
    }
    if (arg[0] != '-' || arg[1] == '\0') {
        fatal("unexpected argument '%s': every value follows an option, such as -i FILES; --help lists them", arg);
    }
    if (nearest != NULL) { fatal("unknown option '%s'; did you mean --%s? --help lists all options", name, nearest); }
    fatal("unknown option '%s'; --help lists all options", name);
}

// The row that argument names (--name, --name=value, -l); *value: what follows '=', else NULL. NULL if there is none.
static inline const OptionRow* option_match(const char* arg, const char** value) {
    *value = NULL;
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const OptionRow* row = &option_rows[i];
        size_t len = strlen(row->name);
        if (strncmp(arg, "--", 2) == 0 && strncmp(arg + 2, row->name, len) == 0 &&
            (arg[2 + len] == '\0' || arg[2 + len] == '=')) {
            *value = arg[2 + len] == '=' ? arg + 2 + len + 1 : NULL;
            return row;
        }
        if (arg[0] == '-' && row->letter != NULL && strcmp(arg + 1, row->letter) == 0) { return row; }
    }
    return NULL;
}

// Sets every option to its default.
static inline void options_defaults(Options* o) {
    memset(o, 0, sizeof *o);
    for (int i = 0; i < NUM_OPTIONS; i++) { option_set(o, &option_rows[i], option_rows[i].fallback, false); }
}

static inline void options_check(const Options* o); // relations, below

// The options of the command line into *o, whose texts point into argv. --help prints and exits with 0; anything wrong
// ends in fatal().
static inline void options_parse(int argc, char** argv, Options* o) {
    const char* value;
    options_defaults(o);
    for (int i = 1; i < argc; i++) {
        const char* arg = argv[i];
        const char* next = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            double number;
            if (arg[1] == 'h' && next != NULL && parse_count(next, &number)) {
                fatal("-h is the help here; what llm.c calls -h %s is --hellaswag FILE", next);
            }
            options_help(argv[0]);
            exit(0);
        }
        const OptionRow* row = option_match(arg, &value);
        if (row == NULL) { option_unknown(arg); }
        const char* unused;
        if (value == NULL && row->type == OPTION_FLAG) {
            bool has_value = next != NULL && next[0] != '-';
            value = has_value ? next : "1";
            i += has_value;
        } else if (value == NULL) {
            if (next == NULL || (option_match(next, &unused) != NULL && strncmp(next, "--", 2) == 0)) {
                fatal("%s needs a value: %s", option_label(row).text, option_accepts(row).text);
            }
            value = next;
            i++;
        }
        if (!option_set(o, row, value, arg[1] != '-')) {
            fatal("%s '%s': expected %s", option_label(row).text, value, option_accepts(row).text);
        }
        o->given[row - option_rows] = true;
    }
    options_check(o);
}

// ---------------------------------------------------------------------------------------------------------------------
// Relations between options

// Is the model option a file (rather than a name)?
static inline bool model_is_file(const char* model) {
    size_t len = strlen(model);
    return len > 4 && strcmp(model + len - 4, ".bin") == 0;
}

static inline bool schedule_is_gns(const Options* o) { return strcmp(o->batch_schedule, "gns") == 0; }

// Options that have no effect without another one.
static inline void options_check_needs(const Options* o) {
    const bool val = o->val_data != NULL, out = o->out != NULL, gns = schedule_is_gns(o);
    const bool samples = o->sample_every.count > 0, decay = o->lr_schedule != LR_CONSTANT;
    const struct {
        const char* name;
        bool met;
        const char* needs;
    } rules[] = {
        {"val-every", val || o->hellaswag != NULL || o->val_every.count == 0, "-j FILES (or --hellaswag FILE)"},
        {"val-batches", val, "-j FILES, the data to evaluate on"},
        {"val-tokens", val, "-j FILES, the data to evaluate on"},
        {"sample-every", !samples || o->tokenizer != NULL, "--tokenizer FILE, to print text"},
        {"sample-length", samples, "-s EVERY, which switches samples on"},
        {"prompt", samples, "-s EVERY, which switches samples on"},
        {"temperature", samples, "-s EVERY, which switches samples on"},
        {"top-k", samples, "-s EVERY, which switches samples on"},
        {"checkpoint-every", out || o->checkpoint_every.count == 0, "-o FOLDER, where checkpoints go"},
        {"keep", out, "-o FOLDER, where checkpoints go"},
        {"resume", out || !o->resume, "-o FOLDER, the run to go on with"},
        {"log-every", out, "-o FOLDER, where log.csv goes"},
        {"log-tensors", out || o->log_tensors == GNS_OFF, "-o FOLDER, where log.csv goes"},
        {"gns-all-every", o->gns != GNS_OFF || o->gns_all_every == 0, "--gns ln"},
        {"gns-tau", o->gns != GNS_OFF, "--gns ln or --gns all"},
        {"batch-min", gns, "--batch-schedule gns"},
        {"batch-max", gns, "--batch-schedule gns"},
        {"batch-may-fall", gns || !o->batch_may_fall, "--batch-schedule gns"},
        {"gns-scale", gns, "--batch-schedule gns"},
        {"gns-power", gns, "--batch-schedule gns"},
        {"gns-calibration", gns, "--batch-schedule gns"},
        {"gns-freeze", gns && (decay || o->gns_freeze == 1),
         "--batch-schedule gns and a learning rate that decays (-k)"},
        {"final-lr-frac", decay || o->final_lr_frac == 1, "a learning rate that decays (-k cosine, linear or wsd)"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
        if (option_given(o, rules[i].name) && !rules[i].met) { fatal("--%s needs %s", rules[i].name, rules[i].needs); }
    }
}

// Whether an option was given, and not with the word, or the 0, that says that it is off.
static inline bool option_on(const Options* o, const char* name) {
    OptionText text;
    const OptionRow* row = option_find(name);
    const char* value = option_value(o, row, &text);
    const bool off = value == NULL || !strcmp(value, "none") ||
                     (!strcmp(value, "0") && row->fallback && !strcmp(row->fallback, "0"));
    return option_given(o, name) && !off;
}

// Pairs of which only one may be given.
static inline void options_check_pairs(const Options* o) {
    static const char* const pairs[][2] = {
        {"max-tokens", "max-steps"},   {"max-tokens", "tokens-per-param"}, {"max-steps", "tokens-per-param"},
        {"val-batches", "val-tokens"}, {"beta2", "beta2-half-life"},       {"init", "init-from"},
        {"eval-only", "dry-run"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        if (option_on(o, pairs[i][0]) && option_on(o, pairs[i][1])) {
            fatal("--%s and --%s contradict each other; give one of them", pairs[i][0], pairs[i][1]);
        }
    }
}

// The noise scale and the closed loop.
static inline void options_check_gns(const Options* o) {
    if (o->gns == GNS_ALL && o->gns_all_every > 0) {
        fatal("--gns all measures every tensor in every step; drop --gns-all-every, or give --gns ln with it");
    }
    if (!schedule_is_gns(o)) { return; }
    if (o->gns == GNS_OFF) {
        fatal("--batch-schedule gns needs the noise scale: --gns ln or --gns all, not --gns off");
    }
    if (o->gns_calibration == OPTION_WORD && o->gns != GNS_ALL && o->gns_all_every == 0) {
        fatal("--gns-calibration measured needs steps that measure every tensor: --gns-all-every N or --gns all");
    }
    if (o->batch_min != OPTION_WORD && o->batch_max != OPTION_WORD && o->batch_min > o->batch_max) {
        fatal("--batch-min %d is above --batch-max %d", o->batch_min, o->batch_max);
    }
    const int bounds[2] = {o->batch_min, o->batch_max};
    for (int i = 0; i < 2; i++) {
        if (bounds[i] != OPTION_WORD && bounds[i] % o->batch_quantum != 0) {
            fatal("--batch-%s %d is not a multiple of --batch-quantum %d", i == 0 ? "min" : "max", bounds[i],
                  o->batch_quantum);
        }
    }
}

static inline void options_check(const Options* o) {
    options_check_pairs(o);
    options_check_needs(o);
    options_check_gns(o);
    bool has_file = model_is_file(o->model);
    if (has_file && o->init_from != NULL) {
        fatal("-e %s already names the weights to start from; give the model's name with --init-from", o->model);
    }
    if (has_file && (o->init != 0 || o->gelu != 0 || o->cosine_attention != NULL)) {
        fatal("--init, --gelu and --cosine-attention describe a new model, but -e %s already is one", o->model);
    }
    if (o->eval_only && o->val_data == NULL && o->hellaswag == NULL) {
        fatal("--eval-only needs something to evaluate on: -j FILES or --hellaswag FILE");
    }
    if (o->eval_only && !has_file && o->init_from == NULL && !o->resume) {
        fatal("--eval-only needs weights: -e FILE.bin, --init-from FILE, or -o RUN -y 1");
    }
    if (o->eval_only && o->out != NULL && !o->resume) {
        fatal("--eval-only with -o %s needs -y 1, to evaluate the newest checkpoint there", o->out);
    }
    if (o->train_data == NULL && !o->eval_only && !o->dry_run) {
        fatal("no training data: -i FILES names token files (data/README.md says how to make them); --help lists all "
              "options, --dry-run needs no data");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a run was started with

// Prints the options that were given, as resolved.
static inline void options_echo(const Options* o) {
    char line[4096] = "";
    OptionText text;
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const char* value = o->given[i] ? option_value(o, &option_rows[i], &text) : NULL;
        size_t used = strlen(line);
        if (value != NULL) { snprintf(line + used, sizeof line - used, "--%s=%s ", option_rows[i].name, value); }
    }
    printf("options     ");
    print_wrapped(line, 12);
}
#endif
