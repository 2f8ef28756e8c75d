/*
Temporary folders and small files for tests: everything a test writes lies in one folder, which is removed at the end.
*/
#ifndef DEV_TEST_TEMPDIR_H
#define DEV_TEST_TEMPDIR_H

#include "llmc/check.h"
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEMP_PATH_SIZE = 2048 };

// Makes a new folder; its path into path, of TEMP_PATH_SIZE bytes. It lies in $TMPDIR, or in memory where the system has
// such a place (thousands of small files that are flushed need not wait for a disk), or in /tmp.
static inline const char* tempdir_make(char* path) {
    const char* base = getenv("TMPDIR");
    if (base == NULL || *base == '\0') { base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp"; }
    snprintf(path, TEMP_PATH_SIZE, "%s/llmc_test_XXXXXX", base);
    if (mkdtemp(path) == NULL) { fatal("cannot make a temporary folder '%s': %s", path, strerror(errno)); }
    return path;
}

// Removes a file, or a folder with all that is in it; it may be absent.
static inline void tempdir_remove(const char* path) {
    DIR* d = opendir(path);
    if (d == NULL) {
        unlink(path);
        return;
    }
    for (struct dirent* e; (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            size_t size = strlen(path) + strlen(e->d_name) + 2;
            char* inner = (char*)alloc_zeroed(size, 1, "a path");
            snprintf(inner, size, "%s/%s", path, e->d_name);
            tempdir_remove(inner);
            free(inner);
        }
    }
    closedir(d);
    rmdir(path);
}

// Writes a file as it is, without the care of atomicfile.h.
static inline void put_file(const char* path, const void* data, size_t size) {
    FILE* f = fopen(path, "wb");
    if (f == NULL || fwrite(data, 1, size, f) != size || fclose(f) != 0) {
        fatal("cannot write the test file '%s': %s", path, strerror(errno));
    }
}

// The file's bytes, NUL-terminated; the test ends if it cannot be read. free() them.
static inline char* get_file(const char* path, size_t* size) {
    char* data = read_whole_file(path, size);
    if (data == NULL) { fatal("cannot read the test file '%s': %s", path, strerror(errno)); }
    return data;
}

static inline bool path_exists(const char* path) { return access(path, F_OK) == 0; }

#endif
