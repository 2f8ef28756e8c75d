/*
Run state as text, one "name value" line a field, exact: doubles are written as hexadecimal floats.

A module whose state must survive a resume has one function that visits its fields, and that same function writes and
reads them, so the list of fields exists once:

    static inline void gns_state(StateFile* s, GnsTracker* t) { state_i64(s, "gns.count", &t->count); ... }

Writing appends to a string in memory (checkpoint.h puts it on disk); reading takes the fields in the order in which they
were written and, at the first that is missing, named otherwise or malformed, stores a message in `error` and leaves
the rest untouched.
*/
#ifndef LLMC_STATE_H
#define LLMC_STATE_H

#include "check.h"
#include <inttypes.h>

typedef struct {
    bool writing;
    char* text;      // the whole state, NUL-terminated; owned by the caller
    size_t length;   // writing: bytes used
    size_t capacity; // writing: bytes allocated
    size_t cursor;   // reading: where the next line starts
    char error[192]; // reading: the first thing that went wrong; empty if nothing did
} StateFile;

static inline void state_append(StateFile* s, const char* name, const char* value) {
    size_t need = s->length + strlen(name) + strlen(value) + 3;
    if (need > s->capacity) {
        size_t capacity = need * 2;
        char* larger = (char*)realloc(s->text, capacity);
        if (larger == NULL) { fatal("out of memory: the run state needs %zu bytes", capacity); }
        s->text = larger;
        s->capacity = capacity;
    }
    s->length += (size_t)sprintf(s->text + s->length, "%s %s\n", name, value);
}

// The value of the next line, which must be called name; NULL (and an error) if it is not.
static inline const char* state_next(StateFile* s, const char* name, char* value, size_t size) {
    if (s->error[0] != '\0') { return NULL; }
    const char* line = s->text + s->cursor;
    size_t len = strcspn(line, "\n"), name_len = strlen(name);
    if (len <= name_len || strncmp(line, name, name_len) != 0 || line[name_len] != ' ' || len - name_len - 1 >= size) {
        snprintf(s->error, sizeof s->error, "expected the field '%s', found '%.*s'", name, (int)(len < 60 ? len : 60),
                 line);
        return NULL;
    }
    memcpy(value, line + name_len + 1, len - name_len - 1);
    value[len - name_len - 1] = '\0';
    s->cursor += len + (line[len] == '\n');
    return value;
}

static inline void state_bad(StateFile* s, const char* name, const char* value) {
    snprintf(s->error, sizeof s->error, "the field '%s' has the malformed value '%.60s'", name, value);
}

static inline void state_f64(StateFile* s, const char* name, double* x) {
    char text[64], *end;
    if (s->writing) {
        snprintf(text, sizeof text, "%a", *x);
        state_append(s, name, text);
    } else if (state_next(s, name, text, sizeof text) != NULL) {
        double value = strtod(text, &end);
        if (end == text || *end != '\0') {
            state_bad(s, name, text);
        } else {
            *x = value;
        }
    }
}

static inline void state_i64(StateFile* s, const char* name, int64_t* x) {
    char text[64], *end;
    if (s->writing) {
        snprintf(text, sizeof text, "%" PRId64, *x);
        state_append(s, name, text);
    } else if (state_next(s, name, text, sizeof text) != NULL) {
        errno = 0;
        long long value = strtoll(text, &end, 10);
        if (end == text || *end != '\0' || errno != 0) {
            state_bad(s, name, text);
        } else {
            *x = value;
        }
    }
}

static inline void state_u64(StateFile* s, const char* name, uint64_t* x) {
    char text[64], *end;
    if (s->writing) {
        snprintf(text, sizeof text, "%" PRIu64, *x);
        state_append(s, name, text);
    } else if (state_next(s, name, text, sizeof text) != NULL) {
        errno = 0;
        unsigned long long value = strtoull(text, &end, 10);
        if (end == text || *end != '\0' || errno != 0 || text[0] == '-') {
            state_bad(s, name, text);
        } else {
            *x = value;
        }
    }
}

static inline void state_int(StateFile* s, const char* name, int* x) {
    int64_t wide = *x;
    state_i64(s, name, &wide);
    if (!s->writing && s->error[0] == '\0') {
        if (wide < INT32_MIN || wide > INT32_MAX) {
            snprintf(s->error, sizeof s->error, "the field '%s' is out of range", name);
        } else {
            *x = (int)wide;
        }
    }
}

#endif
