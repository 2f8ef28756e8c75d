/*
llm.c's model files: the weights of a GPT-2, and nothing else.

    256 words of int32, little-endian:
        [0] 20240326   [1] version: 3 (numbers are fp32) or 5 (bf16)
        [2] max T   [3] V   [4] L   [5] NH   [6] C   [7] padded V
        beyond GPT-2, where 0 means as in GPT-2, so that a GPT-2 file is llm.c's to the byte:
        [8] GELU: 0 tanh, 1 erf   [9..12] blocks with cosine attention, one bit each
        [13] embedding [14] residual [15] attention [16] logit multiplier, as the bits of a float; 0 means 1
    then all tensors in the order of the parameter table (model.h), those of all layers together, without gaps.

The rows that pad the vocabulary are zero. Versions 3 and 5 are read, version 3 is written. Any other file ends the
program with one line that says what was expected and found; nothing in a header is trusted before it was checked
against the file's size.
*/
#ifndef LLMC_MODELFILE_H
#define LLMC_MODELFILE_H

#include "atomicfile.h"
#include "model.h"

enum { HEADER_WORDS = 256, MODEL_MAGIC = 20240326, MODEL_FP32 = 3, MODEL_BF16 = 5 };

// ---------------------------------------------------------------------------------------------------------------------
// The header

static inline uint32_t multiplier_bits(float x) {
    uint32_t bits;
    x = x == 0 ? -0.0f : x; // the bits of +0 are taken; -0 multiplies alike
    memcpy(&bits, &x, sizeof bits);
    return x == 1 ? 0 : bits;
}

static inline float multiplier_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return bits == 0 ? 1 : x;
}

// Fills in all words of a header for this model.
static inline void header_from_config(int32_t* header, int magic, int version, const GPTConfig* c) {
    const int32_t words[9] = {magic,        version,     c->max_seq_len,       c->vocab_size, c->num_layers,
                              c->num_heads, c->channels, c->padded_vocab_size, c->gelu};
    const float multipliers[4] = {c->embed_mult, c->residual_mult, c->attn_mult, c->logit_mult};
    memset(header, 0, HEADER_WORDS * sizeof(int32_t));
    memcpy(header, words, sizeof words);
    for (int i = 0; i < 4; i++) {
        header[9 + i] = (int32_t)c->cosine_blocks[i];
        header[13 + i] = (int32_t)multiplier_bits(multipliers[i]);
    }
}

// The model that a header describes. NULL if the trainers can run it, else what is wrong with it.
static inline const char* config_from_header(const int32_t* header, GPTConfig* c) {
    *c = config_of_shape(header[4], header[5], header[6], header[2], 0);
    c->vocab_size = header[3]; // padded as the file says
    c->padded_vocab_size = header[7];
    c->gelu = header[8];
    float* multipliers[4] = {&c->embed_mult, &c->residual_mult, &c->attn_mult, &c->logit_mult};
    for (int i = 0; i < 4; i++) {
        c->cosine_blocks[i] = (uint32_t)header[9 + i];
        *multipliers[i] = multiplier_from_bits((uint32_t)header[13 + i]);
        if (!isfinite(*multipliers[i])) { return "the forward multipliers must be finite"; }
    }
    return config_error(c);
}

// The model in words, for messages: "L=12 NH=12 C=768 T=1024 V=50257 (padded 50304), tanh GELU, ...", into text.
static inline const char* describe_config(const GPTConfig* c, char* text, size_t size) {
    int n =
        snprintf(text, size, "L=%d NH=%d C=%d T=%d V=%d (padded %d), %s GELU", c->num_layers, c->num_heads, c->channels,
                 c->max_seq_len, c->vocab_size, c->padded_vocab_size, c->gelu == GELU_ERF ? "erf" : "tanh");
    const uint32_t* b = c->cosine_blocks;
    if (n > 0 && (size_t)n < size && (b[0] | b[1] | b[2] | b[3]) != 0) {
        n += snprintf(text + n, size - (size_t)n, ", cosine blocks %08x%08x%08x%08x", b[3], b[2], b[1], b[0]);
    }
    if (n > 0 && (size_t)n < size &&
        (c->embed_mult != 1 || c->residual_mult != 1 || c->attn_mult != 1 || c->logit_mult != 1)) {
        snprintf(text + n, size - (size_t)n, ", multipliers %.9g %.9g %.9g %.9g", (double)c->embed_mult,
                 (double)c->residual_mult, (double)c->attn_mult, (double)c->logit_mult);
    }
    return text;
}

// Whether two configs are the same function of the weights (how they were initialised does not matter).
static inline bool same_model(const GPTConfig* a, const GPTConfig* b) {
    int32_t x[HEADER_WORDS], y[HEADER_WORDS];
    header_from_config(x, 0, 0, a);
    header_from_config(y, 0, 0, b);
    return memcmp(x, y, sizeof x) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

// Room for the largest tensor of the model.
static inline float* tensor_buffer(const ParamTable* t) {
    size_t largest = 0;
    for (int r = 0; r < NUM_ROWS; r++) { largest = t->row[r].size > largest ? t->row[r].size : largest; }
    return (float*)alloc_zeroed(largest, sizeof(float), "one tensor on its way to or from a file");
}

// Writes all tensors of one kind (TENSOR_WEIGHT, TENSOR_M, TENSOR_V) as fp32. Collective: every rank fetches every
// tensor, also where its file is not open or has failed.
static inline void write_tensors(OutFile* f, const GPTConfig* config, const Backend* backend, int what) {
    ParamTable t = param_table(config);
    float* values = tensor_buffer(&t);
    for (int r = 0; r < NUM_ROWS; r++) {
        for (int layer = 0; layer < t.row[r].count; layer++) {
            backend->get(backend->self, r, layer, what, values);
            out_write(f, values, t.row[r].size * sizeof(float));
        }
    }
    free(values);
}

// Reads n numbers; bf16 ones are the upper halves of floats. path is for the message if they cannot be read.
static inline void read_floats(FILE* f, const char* path, float* values, size_t n, bool bf16) {
    unsigned char* bytes = (unsigned char*)values;
    unsigned char* halves = bytes + 2 * n; // bf16: read into the upper half of the room, spread from the front
    if (fread(bf16 ? halves : bytes, bf16 ? 2 : 4, n, f) != n) {
        fatal("cannot read '%s': %s", path, ferror(f) ? strerror(errno) : "it has become shorter meanwhile");
    }
    for (size_t i = 0; bf16 && i < n; i++) {
        uint16_t half;
        memcpy(&half, halves + 2 * i, 2);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(bytes + 4 * i, &bits, 4);
    }
}

// Reads all tensors of one kind from the file's present position into the backend, vocabulary padding as zeros.
static inline void read_tensors(FILE* f, const char* path, const GPTConfig* config, const Backend* backend, int what,
                                bool bf16) {
    ParamTable t = param_table(config);
    float* values = tensor_buffer(&t);
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &t.row[r];
        size_t used = (size_t)row->used_rows * (size_t)row->cols;
        for (int layer = 0; layer < row->count; layer++) {
            read_floats(f, path, values, row->size, bf16);
            memset(values + used, 0, (row->size - used) * sizeof(float));
            backend->set(backend->self, r, layer, what, values);
        }
    }
    free(values);
}

// ---------------------------------------------------------------------------------------------------------------------
// Model files

// Opens a file that starts with a header (a model file, or a checkpoint's optimizer file, which holds `kinds` numbers
// for each parameter), checks everything but the numbers, and leaves it at the first number. fatal() on any fault.
// kind_of_file: for messages. *version: as found, MODEL_FP32 or, for magic MODEL_MAGIC alone, MODEL_BF16.
static inline FILE* open_tensor_file(const char* path, const char* kind_of_file, int magic, int kinds,
                                     GPTConfig* config, int* version) {
    FILE* f = open_to_read(path);
    if (f == NULL) { fatal("cannot open the %s '%s': %s", kind_of_file, path, strerror(errno)); }
    int32_t header[HEADER_WORDS];
    size_t words = fread(header, sizeof(int32_t), HEADER_WORDS, f);
    struct stat info;
    if (ferror(f) || fstat(fileno(f), &info) != 0) {
        fatal("cannot read the %s '%s': %s", kind_of_file, path, strerror(errno));
    }
    if (words > 0 && header[0] != magic) {
        fatal("'%s' is not a %s: it starts with the number %d, expected %d", path, kind_of_file, header[0], magic);
    }
    if (words < HEADER_WORDS) {
        fatal("'%s' is truncated: a %s has a header of 1024 bytes, this one has %lld bytes", path, kind_of_file,
              (long long)info.st_size);
    }
    *version = header[1];
    if (*version != MODEL_FP32 && !(magic == MODEL_MAGIC && *version == MODEL_BF16)) {
        fatal("'%s' has version %d; this program reads %s", path, *version,
              magic == MODEL_MAGIC ? "3 (fp32) and 5 (bf16)" : "3");
    }
    const char* wrong = config_from_header(header, config);
    char text[256];
    if (wrong != NULL) {
        fatal("'%s' has a malformed header: %s; it says %s", path, wrong, describe_config(config, text, sizeof text));
    }
    // The limits in config_error() keep this product far below 2^63.
    ParamTable t = param_table(config);
    int64_t expected = (int64_t)sizeof header + (int64_t)t.num_params * kinds * (*version == MODEL_BF16 ? 2 : 4);
    if (info.st_size != expected) {
        fatal("'%s' %s: it has %lld bytes, its header (%s) calls for %lld", path,
              info.st_size < expected ? "is truncated" : "is too long", (long long)info.st_size,
              describe_config(config, text, sizeof text), (long long)expected);
    }
    return f;
}

// fatal() unless the file's model is the one wanted.
static inline void require_same_model(const char* path, const GPTConfig* found, const GPTConfig* wanted) {
    if (!same_model(found, wanted)) {
        char a[256], b[256];
        fatal("'%s' does not fit the model: it holds %s; the model is %s", path, describe_config(found, a, sizeof a),
              describe_config(wanted, b, sizeof b));
    }
}

// The model in the file. fatal() on a malformed file.
static inline void model_file_config(const char* path, GPTConfig* config) {
    int version;
    fclose(open_tensor_file(path, "model file", MODEL_MAGIC, 1, config, &version));
}

// Puts the file's weights into the backend, whose model is *config. fatal() on a malformed file and on one that holds
// another model. Collective.
static inline void model_file_load(const char* path, const GPTConfig* config, const Backend* backend) {
    GPTConfig found;
    int version;
    FILE* f = open_tensor_file(path, "model file", MODEL_MAGIC, 1, &found, &version);
    require_same_model(path, &found, config);
    read_tensors(f, path, config, backend, TENSOR_WEIGHT, version == MODEL_BF16);
    fclose(f);
}

// Writes header and weights to an open file. Collective.
static inline void write_model(OutFile* f, const GPTConfig* config, const Backend* backend) {
    int32_t header[HEADER_WORDS];
    header_from_config(header, MODEL_MAGIC, MODEL_FP32, config);
    out_write(f, header, sizeof header);
    write_tensors(f, config, backend, TENSOR_WEIGHT);
}

// Writes a model file, whole or not at all. False with the reason in error if it could not be written. Collective; rank
// 0 writes, and it alone learns of a failure.
static inline bool model_file_save(const char* path, const GPTConfig* config, const Backend* backend, char* error,
                                   size_t error_size) {
    char temporary[PATH_SIZE];
    OutFile f;
    memset(&f, 0, sizeof f);
    f.fd = -1;
    temporary_name(temporary, path);
    if (backend->rank == 0) { out_open(&f, temporary, error, error_size); }
    write_model(&f, config, backend);
    return out_close(&f) && (backend->rank != 0 || publish(temporary, path, error, error_size));
}

#endif
