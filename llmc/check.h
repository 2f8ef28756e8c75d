/*
Errors, memory and small-file reading: what every other header stands on.

An error that a user can cause ends in one line on stderr that says what was expected, what was found and what to do,
and in exit status 2. Nothing here leaves a half-written file: writing files that must survive is checkpoint.h's work.
*/
#ifndef LLMC_CHECK_H
#define LLMC_CHECK_H

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__GNUC__)
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#define UNUSED                 __attribute__((unused))
#else
#define PRINTF_LIKE(fmt, args)
#define UNUSED
#endif

// Failure injection. A test defines IO_FAULT(op) before it includes any header; it is asked before every system call that
// changes what is on disk ("open", "write", "fsync", "rename", ...) and makes that call fail where it returns non-zero.
#ifndef IO_FAULT
#define IO_FAULT(op) 0
#endif

// Prints "error: <message>" as one line on stderr and exits with status 2.
PRINTF_LIKE(1, 2) UNUSED static void fatal(const char* fmt, ...) __attribute__((noreturn));
static void fatal(const char* fmt, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, fmt);
    fputs("error: ", stderr);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

// Prints "warning: <message>" as one line on stderr; the program goes on.
PRINTF_LIKE(1, 2) UNUSED static void warn(const char* fmt, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, fmt);
    fputs("warning: ", stderr);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
}

// Memory for count objects of size bytes, zeroed, aligned to 64 bytes (a cache line, a 512-bit vector). Never NULL; too
// little memory ends the program and names what the memory was for. Release with free(). Large blocks ask Linux for
// pages of 2 MiB: a matrix with long rows otherwise needs another entry of the processor's page cache for every row.
static inline void* alloc_zeroed(size_t count, size_t size, const char* what) {
    const size_t huge_page = (size_t)2 << 20;
    size_t bytes = count * size;
    if (size != 0 && bytes / size != count) { fatal("%s needs more memory than can be addressed", what); }
    size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
    size_t rounded = bytes == 0 ? alignment : (bytes + alignment - 1) / alignment * alignment;
    void* p = rounded < bytes ? NULL : aligned_alloc(alignment, rounded);
    if (p == NULL) {
        fatal("out of memory: %s needs %.1f MiB; use a smaller model, batch (-b) or sequence length (-t)", what,
              (double)bytes / (1 << 20));
    }
#ifdef MADV_HUGEPAGE
    if (alignment == huge_page) { madvise(p, rounded, MADV_HUGEPAGE); } // a wish: it may fail
#endif
    memset(p, 0, rounded);
    return p;
}

// Copies the string, never NULL. Release with free().
static inline char* copy_string(const char* s) {
    size_t n = strlen(s) + 1;
    return (char*)memcpy(alloc_zeroed(n, 1, "a string"), s, n);
}

// fopen(path, "rb"), but a named pipe that nobody has open for writing is an empty file, not one to wait for.
static inline FILE* open_to_read(const char* path) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) { return NULL; }
    FILE* f = fcntl(fd, F_SETFL, O_RDONLY) == 0 ? fdopen(fd, "rb") : NULL; // which waits for what a writer writes
    if (f == NULL) {
        int reason = errno;
        close(fd);
        errno = reason;
    }
    return f;
}

// The whole file as bytes followed by a NUL, its length in *len. NULL with errno set if it cannot be read.
static inline char* read_whole_file(const char* path, size_t* len) {
    FILE* f = open_to_read(path);
    if (f == NULL) { return NULL; }
    size_t capacity = 4096, used = 0;
    char* data = (char*)malloc(capacity + 1);
    while (data != NULL) {
        used += fread(data + used, 1, capacity - used, f);
        if (used < capacity) { break; }
        capacity *= 2;
        char* larger = (char*)realloc(data, capacity + 1);
        if (larger == NULL) { free(data); }
        data = larger;
    }
    int failed = ferror(f) ? (errno ? errno : EIO) : 0; // reading a directory fails here, not in fopen
    fclose(f);
    if (data == NULL || failed) {
        free(data);
        errno = failed ? failed : ENOMEM;
        return NULL;
    }
    data[used] = '\0';
    *len = used;
    return data;
}

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

#endif
