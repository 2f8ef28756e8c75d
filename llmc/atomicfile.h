/*
Writing files so that a crash, a kill or a full disk never leaves half a file under its real name.

A file is written under a temporary name, every return value checked, flushed to the disk (fsync) and closed; only then
is it renamed, which the file system does whole or not at all; last, the folder is flushed, so that the new name
survives a power cut too. The functions that write return false and describe the failure, with the system's reason, in
`error`: a failed write is never a reason to stop a training run.

While a file is written its CRC-32 is computed on the fly (polynomial 0xedb88320, as in zlib, gzip and PNG, so that
Python's zlib.crc32 gives the same number), eight bytes a step by table ("slicing by 8", Kounavis & Berry 2005).
*/
#ifndef LLMC_ATOMICFILE_H
#define LLMC_ATOMICFILE_H

#include "check.h"
#include <inttypes.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

// Longer than any path that Linux takes (4096 bytes): one that was cut to fit is refused by the system (ENAMETOOLONG).
enum { PATH_SIZE = 4352 };

// Prints into text, cut where it does not fit; returns text.
PRINTF_LIKE(3, 4) UNUSED static char* print_cut(char* text, size_t size, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, size, fmt, args);
    va_end(args);
    return text;
}

// folder/name into path, of PATH_SIZE bytes.
static inline const char* path_join(char* path, const char* folder, const char* name) {
    return print_cut(path, PATH_SIZE, "%s/%s", folder, name);
}

// The folder that holds path, into folder, of PATH_SIZE bytes.
static inline const char* path_parent(char* folder, const char* path) {
    const char* slash = strrchr(path, '/');
    if (slash == NULL) { return print_cut(folder, PATH_SIZE, "."); }
    return print_cut(folder, PATH_SIZE, "%.*s", slash == path ? 1 : (int)(slash - path), path);
}

// ---------------------------------------------------------------------------------------------------------------------
// CRC-32

typedef struct {
    uint32_t table[8][256]; // table[k][b]: what byte b does to the checksum k bytes later
} Crc32;

static inline void crc32_init(Crc32* c) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) { crc = (crc >> 1) ^ ((crc & 1) ? UINT32_C(0xedb88320) : 0); }
        c->table[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++) {
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = c->table[k - 1][byte];
            c->table[k][byte] = (crc >> 8) ^ c->table[0][crc & 255];
        }
    }
}

// The checksum of what gave `crc` (nothing yet: 0) followed by these bytes.
static inline uint32_t crc32_add(const Crc32* c, uint32_t crc, const void* data, size_t size) {
    const unsigned char* p = (const unsigned char*)data;
    crc = ~crc;
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8); // little-endian, as every format here
        word ^= crc;
        crc = c->table[7][word & 255] ^ c->table[6][word >> 8 & 255] ^ c->table[5][word >> 16 & 255] ^
              c->table[4][word >> 24 & 255] ^ c->table[3][word >> 32 & 255] ^ c->table[2][word >> 40 & 255] ^
              c->table[1][word >> 48 & 255] ^ c->table[0][word >> 56];
    }
    for (; size > 0; size--, p++) { crc = (crc >> 8) ^ c->table[0][(crc ^ *p) & 255]; }
    return ~crc;
}

// ---------------------------------------------------------------------------------------------------------------------
// System calls that change what is on disk

// Whether a test wants this call to fail; errno is set then, as by the call.
static inline bool io_fault(const char* op) {
    (void)op;
    if (IO_FAULT(op)) {
        errno = EIO;
        return true;
    }
    return false;
}

// Puts "cannot <what> '<path>': <the system's reason>" into error; false, for the caller to return.
static inline bool io_error(char* error, size_t error_size, const char* what, const char* path) {
    print_cut(error, error_size, "cannot %s '%s': %s", what, path, strerror(errno));
    return false;
}

// Flushes the names in a folder to the disk. A file system that cannot do this for folders says EINVAL; none can do
// more.
static inline bool folder_flush(const char* folder, char* error, size_t error_size) {
    int fd = open(folder, O_RDONLY);
    bool ok = fd >= 0 && !io_fault("fsync folder") && (fsync(fd) == 0 || errno == EINVAL);
    ok = ok || io_error(error, error_size, "flush the folder", folder);
    if (fd >= 0) { close(fd); }
    return ok;
}

// Keeps every other process of this machine that asks for the folder out of it for as long as this one lives: a lock on the
// folder itself, which leaves nothing behind, however the process ends. False if another one has it. Where the file system knows
// no locks nobody is kept out. *fd: -1, or what holds the lock (which may be asked for again).
static inline bool folder_lock(const char* folder, int* fd) {
    if (*fd >= 0) { return true; }
    *fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*fd < 0 || flock(*fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) { return true; }
    close(*fd);
    *fd = -1;
    return false;
}

// Makes a folder, which must not exist yet.
static inline bool folder_make(const char* folder, char* error, size_t error_size) {
    return (!io_fault("mkdir") && mkdir(folder, 0777) == 0) || io_error(error, error_size, "make the folder", folder);
}

// Whether the folder is there, or could be made: false, with the reason, if it or what it would lie in is something else, or
// may not be written to.
static inline bool folder_possible(const char* folder, char* error, size_t error_size) {
    struct stat info;
    char path[PATH_SIZE], parent[PATH_SIZE];
    print_cut(path, sizeof path, "%s", folder);
    while (stat(path, &info) != 0) {
        const bool is_free = errno == ENOENT && lstat(path, &info) != 0; // else it is a link that leads nowhere
        if (!is_free || !strcmp(path_parent(parent, path), path)) {
            return io_error(error, error_size, "use the folder", folder);
        }
        memcpy(path, parent, sizeof path);
    }
    if (!S_ISDIR(info.st_mode)) {
        print_cut(error, error_size, "'%s' is not a folder", path);
        return false;
    }
    return access(path, W_OK) == 0 || io_error(error, error_size, "write to the folder", path);
}

// Makes a folder, and those that it lies in, unless they exist.
static inline bool folder_ensure(const char* folder, char* error, size_t error_size) {
    char path[PATH_SIZE];
    print_cut(path, sizeof path, "%s", folder);
    for (size_t i = 1, length = strlen(path); i <= length; i++) {
        const char here = path[i];
        if (here != '/' && here != '\0') { continue; }
        path[i] = '\0';
        if (access(path, F_OK) != 0 && !folder_make(path, error, error_size) && access(path, F_OK) != 0) {
            return false;
        }
        path[i] = here;
    }
    return true;
}

static inline bool path_rename(const char* from, const char* to, char* error, size_t error_size) {
    return (!io_fault("rename") && rename(from, to) == 0) || io_error(error, error_size, "rename", from);
}

static inline bool file_remove(const char* path, char* error, size_t error_size) {
    return (!io_fault("unlink") && unlink(path) == 0) || io_error(error, error_size, "remove", path);
}

// ---------------------------------------------------------------------------------------------------------------------
// One file

// A file being written. After a failure, and where the file is not open at all, further writes do nothing, so that a
// sequence of writes needs one check, at its end.
typedef struct {
    int fd; // -1: not open
    bool failed;
    char path[PATH_SIZE];
    uint64_t size; // bytes written so far, and their checksum
    uint32_t crc;
    Crc32 tables;
    char* error; // where a failure is described; the caller's
    size_t error_size;
} OutFile;

// Creates the file, or empties the one of that name.
static inline void out_open(OutFile* f, const char* path, char* error, size_t error_size) {
    print_cut(f->path, sizeof f->path, "%s", path);
    f->size = 0;
    f->crc = 0;
    crc32_init(&f->tables);
    f->error = error;
    f->error_size = error_size;
    f->fd = io_fault("open") ? -1 : open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    f->failed = f->fd < 0 && !io_error(error, error_size, "create", path);
}

// Writes all bytes or fails.
static inline void out_write(OutFile* f, const void* data, size_t size) {
    if (f->fd < 0 || f->failed) { return; }
    const char* p = (const char*)data;
    for (size_t left = size; left > 0;) {
        ssize_t n = io_fault("write") ? -1 : write(f->fd, p, left);
        if (n < 0 && errno != EINTR) {
            f->failed = !io_error(f->error, f->error_size, "write", f->path);
            return;
        }
        if (n > 0) {
            p += n;
            left -= (size_t)n;
        }
    }
    f->crc = crc32_add(&f->tables, f->crc, data, size);
    f->size += size;
}

// Flushes the file to the disk and closes it. False if anything failed since it was opened; the file is then removed.
static inline bool out_close(OutFile* f) {
    if (f->fd >= 0) {
        if (!f->failed && (io_fault("fsync") || fsync(f->fd) != 0)) {
            f->failed = !io_error(f->error, f->error_size, "flush", f->path);
        }
        int closed = close(f->fd); // the descriptor is gone even if close reports a failure
        if (!f->failed && (io_fault("close") || closed != 0)) {
            f->failed = !io_error(f->error, f->error_size, "close", f->path);
        }
        f->fd = -1;
        if (f->failed) {
            unlink(f->path); // a remainder is overwritten by the next attempt
        }
    }
    return !f->failed;
}

// The temporary name under which the file `path` is written, into temporary, of PATH_SIZE bytes.
static inline const char* temporary_name(char* temporary, const char* path) {
    return print_cut(temporary, PATH_SIZE, "%s.tmp", path);
}

// Gives the finished temporary file (or folder) its real name, in the same folder, durably.
static inline bool publish(const char* temporary, const char* path, char* error, size_t error_size) {
    char folder[PATH_SIZE];
    if (!path_rename(temporary, path, error, error_size)) {
        unlink(temporary);
        return false;
    }
    return folder_flush(path_parent(folder, path), error, error_size);
}

// Writes a small file whole: afterwards it has these bytes, or, with false, those that it had before. (A failure to
// flush the folder, the last of the steps, is reported too, though the file is new then.)
static inline bool write_atomically(const char* path, const void* data, size_t size, char* error, size_t error_size) {
    char temporary[PATH_SIZE];
    OutFile f;
    out_open(&f, temporary_name(temporary, path), error, error_size);
    out_write(&f, data, size);
    return out_close(&f) && publish(temporary, path, error, error_size);
}

// Size and checksum of an existing file; false with errno set if it cannot be read.
static inline bool file_checksum(const char* path, uint64_t* size, uint32_t* crc) {
    FILE* f = open_to_read(path);
    if (f == NULL) { return false; }
    Crc32 tables;
    char block[1 << 16];
    crc32_init(&tables);
    *size = 0;
    *crc = 0;
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) {
        *crc = crc32_add(&tables, *crc, block, n);
        *size += n;
    }
    int failed = ferror(f) ? (errno ? errno : EIO) : 0;
    fclose(f);
    errno = failed;
    return failed == 0;
}

#endif
