/*
A backend that computes nothing and only keeps the tensors that it is given: what the tests of files need.
*/
#ifndef DEV_TEST_STORE_BACKEND_H
#define DEV_TEST_STORE_BACKEND_H

#include "llmc/model.h"

enum { STORE_BLOB = 24 };

typedef struct {
    GPTConfig config;
    ParamTable table;
    float* values[4]; // TENSOR_WEIGHT, (TENSOR_GRAD: none), TENSOR_M, TENSOR_V: (num_params) each
    char blob[STORE_BLOB];
    size_t blob_size;
    Backend backend;
} Store;

static inline void store_get(void* self, int row, int layer, int what, float* values) {
    Store* s = (Store*)self;
    memcpy(values, s->values[what] + param_offset(&s->table, row, layer), s->table.row[row].size * sizeof(float));
}

static inline void store_set(void* self, int row, int layer, int what, const float* values) {
    Store* s = (Store*)self;
    memcpy(s->values[what] + param_offset(&s->table, row, layer), values, s->table.row[row].size * sizeof(float));
}

static inline size_t store_state_size(void* self) { return ((Store*)self)->blob_size; }
static inline void store_state_get(void* self, void* blob) { memcpy(blob, ((Store*)self)->blob, STORE_BLOB); }
static inline void store_state_set(void* self, const void* blob) { memcpy(((Store*)self)->blob, blob, STORE_BLOB); }

// All numbers zero. blob_size: 0 or STORE_BLOB.
static inline void store_open(Store* s, GPTConfig config, size_t blob_size) {
    memset(s, 0, sizeof *s);
    s->config = config;
    s->table = param_table(&config);
    s->blob_size = blob_size;
    for (int what = 0; what < 4; what++) {
        s->values[what] = (float*)alloc_zeroed(s->table.num_params, sizeof(float), "a test model");
    }
    s->backend.self = s;
    s->backend.device = "test";
    s->backend.num_ranks = 1;
    s->backend.get = store_get;
    s->backend.set = store_set;
    s->backend.state_size = store_state_size;
    s->backend.state_get = store_state_get;
    s->backend.state_set = store_state_set;
}

static inline void store_close(Store* s) {
    for (int what = 0; what < 4; what++) { free(s->values[what]); }
}

// Fills everything with numbers that are a function of seed; the vocabulary's padding stays zero.
static inline void store_fill(Store* s, uint64_t seed) {
    size_t first = s->table.row[WTE].offset + (size_t)s->table.row[WTE].used_rows * (size_t)s->table.row[WTE].cols;
    size_t last = s->table.row[WTE].offset + s->table.row[WTE].size;
    for (int what = 0; what < 4; what++) {
        uint64_t rng = seed * 4 + (uint64_t)what;
        for (size_t i = 0; i < s->table.num_params; i++) {
            float x = (float)splitmix64_uniform(&rng) - 0.5f;
            s->values[what][i] = i >= first && i < last ? 0 : x;
        }
    }
    snprintf(s->blob, sizeof s->blob, "blob %llu", (unsigned long long)seed);
}

// Whether weights, m, v and blob are, to the bit, those that store_fill(seed) makes.
static inline bool store_equals(const Store* s, uint64_t seed) {
    Store other;
    store_open(&other, s->config, s->blob_size);
    store_fill(&other, seed);
    bool same = s->blob_size == 0 || memcmp(s->blob, other.blob, STORE_BLOB) == 0;
    for (int what = 0; what < 4; what++) {
        same = same && (what == TENSOR_GRAD ||
                        memcmp(s->values[what], other.values[what], s->table.num_params * sizeof(float)) == 0);
    }
    store_close(&other);
    return same;
}

#endif
