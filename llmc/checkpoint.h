/*
Checkpoints: everything that a run needs to go on exactly where it was, on disk whole or not at all.

    out_dir/checkpoints/step_00001000/
        model.bin       the fp32 weights, an llm.c model file (modelfile.h)
        optimizer.bin   a header as in model.bin but with [0] 20241104, then Adam's m of all tensors, then v, fp32
        state.txt       the run's state (state.h): position, tracker, schedules, ...
        backend.bin     the backend's own state, where it has any
        manifest.txt    "checkpoint 1", a line "<name> <bytes> <CRC-32>" for each file, "end <CRC-32 of all that>"
    out_dir/checkpoints/latest      a text file: the name of the folder to resume from

Saving: all files are written into step_00001000.tmp and flushed; the folder is flushed, renamed, its parent flushed;
`latest` is replaced by a file that names the new folder; only now are older checkpoints removed. So at every moment,
whatever fails or is killed, `latest` names a complete checkpoint, the old one or the new one. What a killed save left
behind (*.tmp, *.old) is removed by the next.

Saving a step again while `latest` names that very step must not touch it: the new folder is then called
step_00001000.2 (or has the plain name, if the old one is the .2), and the old one is removed after `latest` was
switched.

Loading checks every size and checksum before the first number reaches the model. All ranks call; rank 0 writes.
*/
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H

#include "modelfile.h"
#include <dirent.h>

enum { OPTIMIZER_MAGIC = 20241104, CHECKPOINT_FILES = 4, NAME_SIZE = 64 };

static const char* const checkpoint_file_names[CHECKPOINT_FILES] = {"model.bin", "optimizer.bin", "state.txt",
                                                                    "backend.bin"};

// ---------------------------------------------------------------------------------------------------------------------
// Folders

// The step in a checkpoint folder's name, step_<8 digits or more>, perhaps followed by ".2"; -1 for any other name.
static inline int64_t step_of_name(const char* name) {
    if (strncmp(name, "step_", 5) != 0) { return -1; }
    size_t digits = strspn(name + 5, "0123456789");
    const char* rest = name + 5 + digits;
    bool valid = digits >= 8 && digits <= 18 && (*rest == '\0' || strcmp(rest, ".2") == 0);
    return valid ? strtoll(name + 5, NULL, 10) : -1;
}

static inline bool is_leftover(const char* name) {
    size_t n = strlen(name);
    return strncmp(name, "step_", 5) == 0 && n > 4 && (!strcmp(name + n - 4, ".tmp") || !strcmp(name + n - 4, ".old"));
}

typedef struct {
    char name[NAME_SIZE];
    int64_t step;
} CheckpointName;

static inline int compare_checkpoint_names(const void* a, const void* b) { // the newest step first
    const CheckpointName *x = (const CheckpointName*)a, *y = (const CheckpointName*)b;
    return x->step != y->step ? (x->step < y->step ? 1 : -1) : strcmp(x->name, y->name);
}

// All checkpoint folders in `folder`, the newest step first; free() the array. None if there is no such folder.
static inline CheckpointName* list_checkpoints(const char* folder, int* count) {
    CheckpointName* list = NULL;
    DIR* d = opendir(folder);
    *count = 0;
    for (struct dirent* e; d != NULL && (e = readdir(d)) != NULL;) {
        int64_t step = step_of_name(e->d_name);
        if (step >= 0) {
            CheckpointName* larger = (CheckpointName*)realloc(list, (size_t)(*count + 1) * sizeof *list);
            if (larger == NULL) {
                break; // too little memory for a list of names: what is not listed is not pruned
            }
            list = larger;
            print_cut(list[*count].name, NAME_SIZE, "%s", e->d_name);
            list[(*count)++].step = step;
        }
    }
    if (d != NULL) { closedir(d); }
    if (*count > 0) { qsort(list, (size_t)*count, sizeof *list, compare_checkpoint_names); }
    return list;
}

// Removes a folder of files.
static inline bool remove_folder(const char* folder, char* error, size_t error_size) {
    DIR* d = opendir(folder);
    if (d == NULL) { return io_error(error, error_size, "open the folder", folder); }
    bool ok = true;
    char path[PATH_SIZE];
    for (struct dirent* e; (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            ok = file_remove(path_join(path, folder, e->d_name), error, error_size) && ok;
        }
    }
    closedir(d);
    return ok && ((!io_fault("rmdir") && rmdir(folder) == 0) || io_error(error, error_size, "remove", folder));
}

// Removes a checkpoint, which is renamed first, so that no folder with a checkpoint's name is ever incomplete.
static inline bool remove_checkpoint(const char* folder, const char* name, char* error, size_t error_size) {
    char path[PATH_SIZE], old[PATH_SIZE];
    path_join(path, folder, name);
    print_cut(old, sizeof old, "%s.old", path);
    return path_rename(path, old, error, error_size) && remove_folder(old, error, error_size);
}

// Removes what killed or failed saves have left, as far as that works: the next save tries again.
static inline void remove_leftovers(const char* folder) {
    DIR* d = opendir(folder);
    char path[PATH_SIZE], ignored[256];
    for (struct dirent* e; d != NULL && (e = readdir(d)) != NULL;) {
        if (is_leftover(e->d_name)) { remove_folder(path_join(path, folder, e->d_name), ignored, sizeof ignored); }
    }
    if (d != NULL) { closedir(d); }
}

// The name of the checkpoint that counts, into name: the first word of the file `latest`, empty if the file is; where
// there is no such file, as when the very first save was killed just before it was written, the newest checkpoint.
// False with errno set if there is neither (ENOENT) or `latest` cannot be read.
static inline bool read_latest(const char* folder, char* name /* (NAME_SIZE) */) {
    char path[PATH_SIZE];
    size_t length;
    char* text = read_whole_file(path_join(path, folder, "latest"), &length);
    if (text != NULL) {
        snprintf(name, NAME_SIZE, "%.*s", (int)strcspn(text, " \t\r\n"), text);
        free(text);
        return true;
    }
    if (errno != ENOENT && errno != ENOTDIR) { return false; }
    int count;
    CheckpointName* list = list_checkpoints(folder, &count);
    if (count > 0) { snprintf(name, NAME_SIZE, "%s", list[0].name); }
    free(list);
    errno = ENOENT;
    return count > 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Saving

typedef struct {
    OutFile file;
    char folder[PATH_SIZE]; // step_….tmp
    char manifest[512];
    bool writer; // rank 0; the others only take part in the collective calls
    bool ok;
    char* error;
    size_t error_size;
} CheckpointWriter;

static inline void begin_file(CheckpointWriter* w, const char* name) {
    char path[PATH_SIZE];
    w->file.fd = -1;
    w->file.failed = false;
    if (w->writer && w->ok) { out_open(&w->file, path_join(path, w->folder, name), w->error, w->error_size); }
}

static inline void end_file(CheckpointWriter* w, const char* name) {
    w->ok = out_close(&w->file) && w->ok;
    size_t used = strlen(w->manifest);
    snprintf(w->manifest + used, sizeof w->manifest - used, "%s %" PRIu64 " %08" PRIx32 "\n", name, w->file.size,
             w->file.crc);
}

// Writes all files of a checkpoint, the manifest last.
static inline void write_checkpoint_files(CheckpointWriter* w, const GPTConfig* config, const Backend* backend,
                                          const char* state_text) {
    snprintf(w->manifest, sizeof w->manifest, "checkpoint 1\n");
    begin_file(w, "model.bin");
    write_model(&w->file, config, backend);
    end_file(w, "model.bin");

    int32_t header[HEADER_WORDS];
    header_from_config(header, OPTIMIZER_MAGIC, MODEL_FP32, config);
    begin_file(w, "optimizer.bin");
    out_write(&w->file, header, sizeof header);
    write_tensors(&w->file, config, backend, TENSOR_M);
    write_tensors(&w->file, config, backend, TENSOR_V);
    end_file(w, "optimizer.bin");

    begin_file(w, "state.txt");
    out_write(&w->file, state_text, strlen(state_text));
    end_file(w, "state.txt");

    size_t blob_size = backend->state_size(backend->self);
    if (blob_size > 0) {
        void* blob = alloc_zeroed(blob_size, 1, "the backend's state");
        backend->state_get(backend->self, blob);
        begin_file(w, "backend.bin");
        out_write(&w->file, blob, blob_size);
        end_file(w, "backend.bin");
        free(blob);
    }

    Crc32 tables;
    crc32_init(&tables);
    size_t used = strlen(w->manifest);
    uint32_t crc = crc32_add(&tables, 0, w->manifest, used);
    snprintf(w->manifest + used, sizeof w->manifest - used, "end %08" PRIx32 "\n", crc);
    begin_file(w, "manifest.txt");
    out_write(&w->file, w->manifest, strlen(w->manifest));
    w->ok = out_close(&w->file) && w->ok;
}

// Gives the finished folder its name and switches `latest` to it. After a failure before `latest` is switched, the
// folder is removed again.
static inline bool switch_latest(const char* folder, const char* temporary, int64_t step, char* error,
                                 size_t error_size) {
    char latest[NAME_SIZE] = "", name[NAME_SIZE], line[NAME_SIZE + 1], path[PATH_SIZE], ignored[256];
    if (!read_latest(folder, latest) && errno != ENOENT) {
        return io_error(error, error_size, "read", path_join(path, folder, "latest"));
    }
    snprintf(name, sizeof name, "step_%08" PRId64, step);
    if (strcmp(name, latest) == 0) { strcat(name, ".2"); }
    path_join(path, folder, name);
    if (access(path, F_OK) == 0 && !remove_checkpoint(folder, name, error, error_size)) { return false; }
    if (!publish(temporary, path, error, error_size)) {
        remove_checkpoint(folder, name, ignored, sizeof ignored); // where the rename worked and the flush did not
        return false;
    }
    snprintf(line, sizeof line, "%s\n", name);
    if (!write_atomically(path_join(path, folder, "latest"), line, strlen(line), error, error_size)) {
        if (read_latest(folder, latest) && strcmp(latest, name) != 0) {
            remove_checkpoint(folder, name, ignored, sizeof ignored);
        }
        return false;
    }
    return true;
}

// Removes the step's earlier copy and, with keep > 0, all but the `keep` newest checkpoints up to this step. Those of
// later steps belong to a run that was rolled back: they stay until this run overwrites them. Failing to remove is not
// a failed save.
static inline void prune_checkpoints(const char* folder, int64_t step, int keep) {
    char latest[NAME_SIZE] = "", error[PATH_SIZE + 256];
    int count, kept = 1;
    CheckpointName* list = list_checkpoints(folder, &count);
    if (!read_latest(folder, latest)) {
        count = 0; // cannot know which one must stay
    }
    for (int i = 0; i < count; i++) {
        if (list[i].step > step || strcmp(list[i].name, latest) == 0) { continue; }
        bool superseded = list[i].step == step || (keep > 0 && kept >= keep);
        kept += !superseded;
        if (superseded && !remove_checkpoint(folder, list[i].name, error, sizeof error)) {
            warn("an old checkpoint stays: %s", error);
        }
    }
    free(list);
}

// Saves a checkpoint of the model after `step` steps in out_dir, which is made if need be; state_text: the run's state.
// Afterwards the newest `keep` checkpoints stay, 0: all. False with the reason in error if it failed: a resume then
// still finds the previous checkpoint (or the new one, whole, if only one of the last flushes failed), and the run can
// go on and try again later. Collective; rank 0 writes, and it alone learns of a failure.
static inline bool checkpoint_save(const char* out_dir, int64_t step, const GPTConfig* config, const Backend* backend,
                                   const char* state_text, int keep, char* error, size_t error_size) {
    char folder[PATH_SIZE], name[NAME_SIZE];
    CheckpointWriter w;
    memset(&w, 0, sizeof w);
    w.writer = backend->rank == 0;
    w.error = error;
    w.error_size = error_size;
    w.ok = true;
    path_join(folder, out_dir, "checkpoints");
    snprintf(name, sizeof name, "step_%08" PRId64 ".tmp", step);
    path_join(w.folder, folder, name);
    if (w.writer) {
        w.ok = folder_ensure(out_dir, error, error_size) && folder_ensure(folder, error, error_size) &&
               folder_flush(out_dir, error, error_size);
        remove_leftovers(folder);
        w.ok = w.ok && folder_make(w.folder, error, error_size);
    }
    write_checkpoint_files(&w, config, backend, state_text);
    if (!w.writer) { return true; }
    w.ok =
        w.ok && folder_flush(w.folder, error, error_size) && switch_latest(folder, w.folder, step, error, error_size);
    if (w.ok) {
        prune_checkpoints(folder, step, keep);
    } else {
        remove_leftovers(folder);
    }
    return w.ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// Loading

// Checks one line of the manifest against its file; marks the file as listed. False with what is wrong in problem.
static inline bool check_manifest_line(const char* checkpoint, const char* line, bool* listed, char* problem,
                                       size_t size) {
    char name[32], path[PATH_SIZE];
    uint64_t bytes, found_bytes;
    uint32_t crc, found_crc;
    int which = 0;
    if (sscanf(line, "%31s %" SCNu64 " %8" SCNx32, name, &bytes, &crc) != 3) {
        snprintf(problem, size, "manifest.txt has the malformed line '%.60s'", line);
        return false;
    }
    while (which < CHECKPOINT_FILES && strcmp(name, checkpoint_file_names[which]) != 0) { which++; }
    if (which == CHECKPOINT_FILES) {
        snprintf(problem, size, "manifest.txt names the unknown file '%s'", name);
        return false;
    }
    listed[which] = true;
    if (!file_checksum(path_join(path, checkpoint, name), &found_bytes, &found_crc)) {
        snprintf(problem, size, "%s cannot be read: %s", name, strerror(errno));
        return false;
    }
    if (found_bytes != bytes) {
        snprintf(problem, size, "%s %s: it has %" PRIu64 " bytes, expected %" PRIu64, name,
                 found_bytes < bytes ? "is truncated" : "is too long", found_bytes, bytes);
        return false;
    }
    if (found_crc != crc) {
        snprintf(problem, size, "%s has the checksum %08" PRIx32 ", expected %08" PRIx32, name, found_crc, crc);
        return false;
    }
    return true;
}

// Whether all files of a checkpoint are there, whole and unchanged; reads every byte. False with what is wrong in
// problem.
static inline bool checkpoint_intact(const char* checkpoint, char* problem, size_t size) {
    char path[PATH_SIZE];
    size_t length;
    char* text = read_whole_file(path_join(path, checkpoint, "manifest.txt"), &length);
    if (text == NULL) {
        snprintf(problem, size, "manifest.txt cannot be read: %s", strerror(errno));
        return false;
    }
    Crc32 tables;
    crc32_init(&tables);
    char last_line[32];
    const char* last = strstr(text, "\nend ");
    size_t covered = last == NULL ? length : (size_t)(last + 1 - text);
    snprintf(last_line, sizeof last_line, "end %08" PRIx32 "\n", crc32_add(&tables, 0, text, covered));
    bool ok = false, listed[CHECKPOINT_FILES] = {false, false, false, false};
    if (strncmp(text, "checkpoint ", 11) != 0) {
        snprintf(problem, size, "manifest.txt does not start with 'checkpoint'");
    } else if (strncmp(text, "checkpoint 1\n", 13) != 0) {
        snprintf(problem, size, "it has version %.*s, this program reads version 1", (int)strcspn(text + 11, "\n"),
                 text + 11);
    } else if (last == NULL || strcmp(text + covered, last_line) != 0 || strlen(text) != length) {
        snprintf(problem, size, "manifest.txt is truncated or was changed (its own checksum does not match)");
    } else {
        ok = true;
        text[covered] = '\0';
        for (char* line = text + 13; ok && *line != '\0';) {
            size_t n = strcspn(line, "\n");
            line[n] = '\0';
            ok = check_manifest_line(checkpoint, line, listed, problem, size);
            line += n + 1;
        }
        for (int i = 0; ok && i < 3; i++) { // backend.bin need not be there
            ok = listed[i];
            if (!ok) { snprintf(problem, size, "manifest.txt does not list %s", checkpoint_file_names[i]); }
        }
    }
    free(text);
    return ok;
}

// Ends the program: says what is wrong with the checkpoint `name` in `folder` (or with `latest`, if step is -1: it
// names none) and which older one can be used.
static inline void checkpoint_damaged(const char* folder, const char* name, int64_t step, const char* problem) {
    char path[PATH_SIZE], ignored[512], what[PATH_SIZE];
    int count;
    CheckpointName* list = list_checkpoints(folder, &count);
    path_join(what, folder, step < 0 ? "latest" : name);
    for (int i = 0; i < count; i++) {
        bool older = step < 0 || (list[i].step <= step && strcmp(list[i].name, name) != 0);
        if (older && checkpoint_intact(path_join(path, folder, list[i].name), ignored, sizeof ignored)) {
            fatal("'%s' is damaged: %s; the newest intact older checkpoint is %s; to resume from it: echo %s > "
                  "'%s/latest'",
                  what, problem, list[i].name, list[i].name, folder);
        }
    }
    fatal("'%s' is damaged: %s; there is no intact older checkpoint: start anew in another output folder", what,
          problem);
}

// Finds the checkpoint to resume from and checks all its bytes. Its folder goes into path, its step into *step. False
// if there is none. fatal() if the one that `latest` names, or `latest` itself, is damaged.
static inline bool checkpoint_find(const char* out_dir, char* path, size_t size, int64_t* step) {
    char folder[PATH_SIZE], full[PATH_SIZE], name[NAME_SIZE], problem[512];
    path_join(folder, out_dir, "checkpoints");
    if (!read_latest(folder, name)) {
        if (errno != ENOENT) { fatal("cannot read '%s/latest': %s", folder, strerror(errno)); }
        return false;
    }
    *step = step_of_name(name);
    if (*step < 0) {
        snprintf(problem, sizeof problem, "it names '%s', expected the name of a folder such as step_00001000", name);
        checkpoint_damaged(folder, name, -1, problem);
    }
    if (!checkpoint_intact(path_join(full, folder, name), problem, sizeof problem)) {
        checkpoint_damaged(folder, name, *step, problem);
    }
    if ((size_t)snprintf(path, size, "%s", full) >= size) { fatal("the path '%s' is too long", full); }
    return true;
}

// Puts a checkpoint, a step_… folder, into the backend, whose model is *config; the run's state into *state_text
// (free() it). fatal() if it is damaged or does not fit the model. Collective.
static inline void checkpoint_load(const char* path, const GPTConfig* config, const Backend* backend,
                                   char** state_text) {
    char file[PATH_SIZE], folder[PATH_SIZE], problem[512];
    const char* slash = strrchr(path, '/');
    const char* name = slash == NULL ? path : slash + 1;
    if (!checkpoint_intact(path, problem, sizeof problem)) {
        checkpoint_damaged(path_parent(folder, path), name, step_of_name(name), problem);
    }
    model_file_load(path_join(file, path, "model.bin"), config, backend);

    GPTConfig found;
    int version;
    path_join(file, path, "optimizer.bin");
    FILE* f = open_tensor_file(file, "optimizer file", OPTIMIZER_MAGIC, 2, &found, &version);
    require_same_model(file, &found, config);
    read_tensors(f, file, config, backend, TENSOR_M, false);
    read_tensors(f, file, config, backend, TENSOR_V, false);
    fclose(f);

    size_t length = 0, wanted = backend->state_size(backend->self);
    char* blob = read_whole_file(path_join(file, path, "backend.bin"), &length);
    if (blob == NULL && errno != ENOENT) { fatal("cannot read '%s': %s", file, strerror(errno)); }
    if (length != wanted) {
        fatal(
            "'%s' has %zu bytes of backend state, this backend (%s) needs %zu: it was saved by another trainer; start "
            "from its weights alone instead (--init-from)",
            file, length, backend->device, wanted);
    }
    if (wanted > 0) { backend->state_set(backend->self, blob); }
    free(blob);

    *state_text = read_whole_file(path_join(file, path, "state.txt"), &length);
    if (*state_text == NULL) { fatal("cannot read '%s': %s", file, strerror(errno)); }
}

#endif
