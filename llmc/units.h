/*
Numbers as people write them: 250, 2_000, 0.6e-3, 10M, 1.5B.

    number = digits [ '.' digits ] [ 'e' [+-] digits ] [ K | M | B ]

A single underscore may stand between two digits. K, M and B are 1e3, 1e6 and 1e9 (counts of tokens, not bytes). There
is no sign, no hexadecimal, no inf and no nan, so that a typo is an error and never a number.
*/
#ifndef LLMC_UNITS_H
#define LLMC_UNITS_H

#include "check.h"
#include <math.h>

// Copies a run of digits without its underscores; returns where it ends, which is text itself if there is no digit.
static inline const char* scan_digits(const char* text, char* copy, size_t* used, size_t size) {
    const char* p = text;
    while (*used + 1 < size) {
        if (*p >= '0' && *p <= '9') {
            copy[(*used)++] = *p++;
        } else if (*p == '_' && p != text && p[-1] != '_' && p[1] >= '0' && p[1] <= '9') {
            p++;
        } else {
            break;
        }
    }
    return p;
}

// Reads the number that text begins with; returns what follows it, or NULL if there is none or it is not finite.
static inline const char* scan_count(const char* text, double* value) {
    char copy[64];
    size_t used = 0;
    const char *p = scan_digits(text, copy, &used, sizeof copy), *end = p;
    if (*p == '.' && used + 1 < sizeof copy) {
        copy[used++] = '.';
        end = scan_digits(p + 1, copy, &used, sizeof copy);
        if (end == p + 1) {
            return NULL; // "5." and "." are typos
        }
    }
    if (p == text || used + 3 >= sizeof copy) { return NULL; }
    p = end;
    if (*p == 'e' || *p == 'E') {
        copy[used++] = *p++;
        if (*p == '+' || *p == '-') { copy[used++] = *p++; }
        end = scan_digits(p, copy, &used, sizeof copy);
        if (end == p) { return NULL; }
        p = end;
    }
    copy[used] = '\0';
    double x = strtod(copy, NULL);
    switch (*p) {
    case 'K': x *= 1e3, p++; break;
    case 'M': x *= 1e6, p++; break;
    case 'B': x *= 1e9, p++; break;
    default: break;
    }
    if (!isfinite(x)) { return NULL; }
    *value = x;
    return p;
}

// The whole text as one number: "250", "10M", "2_000", "1.5B". False if it is anything else; *value is then untouched.
static inline bool parse_count(const char* text, double* value) {
    double x;
    const char* end = scan_count(text, &x);
    if (end == NULL || *end != '\0') { return false; }
    *value = x;
    return true;
}

#endif
