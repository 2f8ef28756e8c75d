/*
Characters in UTF-8 (RFC 3629), of text that need not be valid.
*/
#ifndef LLMC_UTF8_H
#define LLMC_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The code point at s, of which n >= 1 bytes are left, and the number of its bytes. Bytes that are not valid UTF-8 come
// one by one, as U+FFFD.
static inline size_t utf8_decode(const char* s, size_t n, uint32_t* code) {
    const unsigned char* u = (const unsigned char*)s;
    if (u[0] < 0x80) {
        *code = u[0];
        return 1;
    }
    size_t len = u[0] >= 0xf0 ? 4 : u[0] >= 0xe0 ? 3 : 2;
    uint32_t c = u[0] & (0x7fu >> len);
    bool valid = u[0] >= 0xc2 && u[0] <= 0xf4 && len <= n;
    for (size_t i = 1; valid && i < len; i++) {
        valid = (u[i] & 0xc0) == 0x80;
        c = c << 6 | (u[i] & 0x3fu);
    }
    bool overlong = c < (len == 4 ? 0x10000u : len == 3 ? 0x800u : 0x80u);
    bool surrogate = c >= 0xd800 && c <= 0xdfff;
    if (!valid || overlong || surrogate || c > 0x10ffff) {
        *code = 0xfffd;
        return 1;
    }
    *code = c;
    return len;
}

#endif
