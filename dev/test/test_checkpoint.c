// Tests of llmc/checkpoint.h: that a save which fails or is killed at any point leaves the old state or the new one, to
// the bit, and that nothing damaged is ever loaded.

// Every system call that changes the disk asks here first; see fault_mode.
static int io_fault_now(const char* op);
#define IO_FAULT(op) io_fault_now(op)

#include "llmc/checkpoint.h"
#include "dev/test/store_backend.h"
#include "dev/test/tempdir.h"
#include "dev/test/test.h"
#include <signal.h>

enum { FAULT_NONE, FAULT_ONCE, FAULT_FROM_THEN_ON, FAULT_DIE };
static int fault_mode = FAULT_NONE;
static int fault_at = 0; // the operation, counted from 1, at which it happens
static int fault_operations = 0;
static const char* fault_last = "";   // the last operation that was asked for,
static const char* fault_failed = ""; // the last one that was made to fail,
static char operations[4096];         // and all of them, each run of equal ones named once

static int io_fault_now(const char* op) {
    fault_operations++;
    size_t used = strlen(operations);
    if (strcmp(op, fault_last) != 0) {
        snprintf(operations + used, sizeof operations - used, "%s%s", used > 0 ? ", " : "", op);
    }
    fault_last = op;
    if (fault_mode == FAULT_DIE && fault_operations == fault_at) { _exit(77); }
    bool fail = (fault_mode == FAULT_ONCE && fault_operations == fault_at) ||
                (fault_mode == FAULT_FROM_THEN_ON && fault_operations >= fault_at);
    fault_failed = fail ? op : fault_failed;
    return fail;
}

static void fault_set(int mode, int at) {
    fault_mode = mode;
    fault_at = at;
    fault_operations = 0;
    fault_last = fault_failed = "";
    operations[0] = '\0';
}

static char folder[TEMP_PATH_SIZE]; // of all tests; each has an output folder of its own in it

static const char* out_folder(const char* name) {
    static char path[PATH_SIZE];
    return path_join(path, folder, name);
}

// A path below the output folder `out`.
static const char* below(const char* out, const char* rest) {
    static char path[2][PATH_SIZE];
    static int next = 0;
    next = !next;
    print_cut(path[next], PATH_SIZE, "%s/checkpoints/%s", out, rest);
    return path[next];
}

static GPTConfig tiny_config(void) { return config_of_shape(1, 1, 2, 3, 5); }

// Saves the state that `seed` makes, as this step's.
static bool save(const char* out, int64_t step, uint64_t seed, int keep, char* error, size_t error_size) {
    Store s;
    char text[64];
    store_open(&s, tiny_config(), STORE_BLOB);
    store_fill(&s, seed);
    snprintf(text, sizeof text, "seed %llu\n", (unsigned long long)seed);
    bool ok = checkpoint_save(out, step, &s.config, &s.backend, text, keep, error, error_size);
    store_close(&s);
    return ok;
}

static void save_well(const char* out, int64_t step, uint64_t seed, int keep) {
    char error[512] = "";
    if (!save(out, step, seed, keep, error, sizeof error)) { fatal("the test cannot save: %s", error); }
}

// The seed of the state that a resume finds, 0 if there is none, -1 if it is not whole. *step: its step.
static int64_t load(const char* out, int64_t* step) {
    char path[PATH_SIZE], *text = NULL;
    Store s;
    *step = -1;
    if (!checkpoint_find(out, path, sizeof path, step)) { return 0; }
    store_open(&s, tiny_config(), STORE_BLOB);
    checkpoint_load(path, &s.config, &s.backend, &text);
    unsigned long long seed = 0;
    int64_t found = sscanf(text, "seed %llu\n", &seed) == 1 && store_equals(&s, seed) ? (int64_t)seed : -1;
    free(text);
    store_close(&s);
    return found;
}

// How many names in the folder of checkpoints begin with this.
static int count_names(const char* out, const char* prefix, const char* suffix) {
    int n = 0;
    DIR* d = opendir(below(out, ""));
    for (struct dirent* e; d != NULL && (e = readdir(d)) != NULL;) {
        size_t length = strlen(e->d_name), tail = strlen(suffix);
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0 && length >= tail &&
             strcmp(e->d_name + length - tail, suffix) == 0;
    }
    if (d != NULL) { closedir(d); }
    return n;
}

static int leftovers(const char* out) { return count_names(out, "", ".tmp") + count_names(out, "", ".old"); }

static void test_save_and_load(void) {
    const char* out = out_folder("plain");
    int64_t step;
    CHECK(load(out, &step) == 0); // not even the folder is there
    save_well(out, 100, 7, 0);
    CHECK(load(out, &step) == 7 && step == 100);
    size_t size;
    char* latest = get_file(below(out, "latest"), &size);
    CHECK_STR(latest, "step_00000100\n");
    free(latest);
    CHECK(path_exists(below(out, "step_00000100/model.bin")) && path_exists(below(out, "step_00000100/manifest.txt")));
    save_well(out, 123456789, 8, 0);
    CHECK(load(out, &step) == 8 && step == 123456789);
    CHECK(leftovers(out) == 0);

    // The model file in a checkpoint is one for itself.
    GPTConfig c = tiny_config(), found;
    model_file_config(below(out, "step_00000100/model.bin"), &found);
    CHECK(same_model(&c, &found));

    // Another rank writes nothing.
    Store s;
    char error[64] = "";
    store_open(&s, c, 0);
    s.backend.rank = 1;
    CHECK(checkpoint_save(out_folder("rank1"), 1, &c, &s.backend, "", 0, error, sizeof error));
    CHECK(!path_exists(out_folder("rank1")));

    // A backend without state of its own has no backend.bin.
    s.backend.rank = 0;
    char path[PATH_SIZE], *text;
    out = out_folder("no_blob");
    CHECK(checkpoint_save(out, 1, &c, &s.backend, "", 0, error, sizeof error));
    CHECK(!path_exists(below(out, "step_00000001/backend.bin")));
    CHECK(checkpoint_find(out, path, sizeof path, &step));
    checkpoint_load(path, &c, &s.backend, &text);
    CHECK_STR(text, "");
    free(text);
    s.blob_size = STORE_BLOB; // ... and one that has state refuses that checkpoint
    CHECK_DIES(checkpoint_load(path, &c, &s.backend, &text), "has 0 bytes of backend state");
    store_close(&s);
}

// What a power cut would show and a kill does not: every file is flushed and closed before the folder, the folder
// before it gets its name, the name before `latest` is written, `latest` before anything old is removed.
static void test_order(void) {
    const char* out = out_folder("order");
    char error[512], expected[1024] = "fsync folder, mkdir";
    save_well(out, 1, 1, 0);
    fault_set(FAULT_NONE, 0);
    CHECK(save(out, 2, 2, 1, error, sizeof error));
    for (int file = 0; file < 5; file++) { // model, optimizer, state, backend, manifest
        strcat(expected, ", open, write, fsync, close");
    }
    strcat(expected, ", fsync folder, rename, fsync folder");              // the folder
    strcat(expected, ", open, write, fsync, close, rename, fsync folder"); // latest
    strcat(expected, ", rename, unlink, rmdir");                           // the first checkpoint
    CHECK_STR(operations, expected);
}

static void test_other_model(void) {
    const char* out = out_folder("other");
    char path[PATH_SIZE], *text;
    int64_t step;
    save_well(out, 1, 1, 0);
    CHECK(checkpoint_find(out, path, sizeof path, &step));
    GPTConfig c = config_of_shape(2, 1, 2, 3, 5);
    Store s;
    store_open(&s, c, STORE_BLOB);
    CHECK_DIES(checkpoint_load(path, &c, &s.backend, &text), "holds L=1 NH=1 C=2 T=3 V=5 (padded 128), tanh GELU; the "
                                                             "model is L=2");
    store_close(&s);
}

static void test_keep(void) {
    const char* out = out_folder("keep");
    int64_t step;
    for (int i = 1; i <= 5; i++) { save_well(out, i * 10, (uint64_t)i, 0); }
    CHECK(count_names(out, "step_", "") == 5);
    save_well(out, 60, 6, 3);
    CHECK(count_names(out, "step_", "") == 3 && path_exists(below(out, "step_00000040")));
    CHECK(load(out, &step) == 6);
    save_well(out, 70, 7, 1);
    CHECK(count_names(out, "step_", "") == 1 && load(out, &step) == 7);

    // A run that was rolled back to an older checkpoint: what it saves counts as the newest, what lay ahead is not
    // touched before it is reached.
    save_well(out, 80, 8, 0);
    put_file(below(out, "latest"), "step_00000070\n", 14);
    save_well(out, 75, 9, 1);
    CHECK(load(out, &step) == 9 && step == 75);
    CHECK(!path_exists(below(out, "step_00000070")) && path_exists(below(out, "step_00000080")));
    save_well(out, 80, 10, 1);
    CHECK(load(out, &step) == 10 && count_names(out, "step_", "") == 1);
}

static void test_same_step_again(void) {
    const char* out = out_folder("again");
    int64_t step;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        save_well(out, 50, seed, 0);
        CHECK(load(out, &step) == (int64_t)seed && step == 50);
        CHECK(count_names(out, "step_", "") == 1);
    }
    CHECK(step_of_name("step_00000050.2") == 50 && step_of_name("step_00000050.tmp") == -1);
    CHECK(step_of_name("step_00000050.3") == -1 && step_of_name("step_50") == -1 && step_of_name("latest") == -1);
}

// After a save was cut short: the state must be the old or the new one, and the next save must work and clean up.
static void check_old_or_new(const char* out, int64_t old, int64_t new_one, int64_t new_step, bool succeeded) {
    int64_t step, found = load(out, &step);
    CHECK(found == (succeeded ? new_one : found == new_one ? new_one : old));
    save_well(out, new_step, (uint64_t)new_one + 100, 2);
    CHECK(load(out, &step) == new_one + 100 && step == new_step);
    CHECK(leftovers(out) == 0);
}

// Fails the n-th operation of a save, for every n, until a save has fewer; the state before: `before` checkpoints, the
// last one of the step that is saved (again) or not.
static void fail_everywhere(int mode, int before, bool same_step, int least_operations) {
    int n = 0, failures = 0;
    bool reached = true;
    int null_fd = open("/dev/null", O_WRONLY),
        stderr_fd = dup(2); // old checkpoints that cannot be removed are warned about
    for (n = 1; reached; n++) {
        char out[PATH_SIZE], error[512] = "";
        path_join(out, folder, "fail");
        tempdir_remove(out);
        for (int i = 1; i <= before; i++) { save_well(out, i, (uint64_t)i, 0); }
        dup2(null_fd, 2);
        fault_set(mode, n);
        bool ok = save(out, same_step ? before : before + 1, 50, 1, error, sizeof error);
        reached = fault_operations >= n;
        fault_mode = FAULT_NONE;
        dup2(stderr_fd, 2);
        // Only removing what is old may fail without the save failing (it begins with a rename).
        CHECK(!ok || fault_failed[0] == '\0' || !strcmp(fault_failed, "rename") || !strcmp(fault_failed, "unlink") ||
              !strcmp(fault_failed, "rmdir"));
        CHECK(ok || strstr(error, "Input/output error") != NULL || strstr(error, "File exists") != NULL);
        CHECK(ok || mode != FAULT_ONCE || leftovers(out) <= 1); // one: where the fault hit the cleaning up itself
        failures += !ok;
        check_old_or_new(out, before, 50, same_step ? before : before + 1, ok);
    }
    CHECK(n > least_operations);            // the injection did reach the calls
    CHECK(failures > least_operations / 2); // and made saves fail (not where only an old checkpoint was to be removed)
    close(null_fd);
    close(stderr_fd);
}

static void test_one_failure(void) {
    fail_everywhere(FAULT_ONCE, 0, false, 70);
    fail_everywhere(FAULT_ONCE, 1, false, 80);
    fail_everywhere(FAULT_ONCE, 1, true, 80);
}

static void test_disk_gone(void) {
    fail_everywhere(FAULT_FROM_THEN_ON, 0, false, 70);
    fail_everywhere(FAULT_FROM_THEN_ON, 1, false, 80);
    fail_everywhere(FAULT_FROM_THEN_ON, 1, true, 80);
}

// A failed save leaves no temporary folder behind where it can be removed.
static void test_failed_save_cleans_up(void) {
    const char* out = out_folder("clean");
    char error[512] = "";
    save_well(out, 1, 1, 0);
    fault_set(FAULT_ONCE, 10); // the write of a tensor
    CHECK(!save(out, 2, 2, 0, error, sizeof error));
    fault_set(FAULT_NONE, 0);
    CHECK(strstr(error, "cannot write '") != NULL && strstr(error, "Input/output error") != NULL);
    CHECK(leftovers(out) == 0 && count_names(out, "step_", "") == 1);
}

// Dies in the midst of a save, just before the n-th operation, for every n.
static void test_death_everywhere(void) {
    for (int same_step = 0; same_step < 2; same_step++) {
        int status = 0, n = 1;
        do {
            char out[PATH_SIZE];
            path_join(out, folder, "die");
            tempdir_remove(out);
            save_well(out, 2, 2, 0);
            pid_t child = fork();
            if (child == 0) {
                char error[512];
                fault_set(FAULT_DIE, n);
                _exit(save(out, same_step ? 2 : 3, 50, 1, error, sizeof error) ? 0 : 1);
            }
            waitpid(child, &status, 0);
            CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 77 || WEXITSTATUS(status) == 0));
            check_old_or_new(out, 2, 50, same_step ? 2 : 3, WEXITSTATUS(status) == 0);
            n++;
        } while (WIFEXITED(status) && WEXITSTATUS(status) == 77);
        CHECK(n > 80);
    }
}

// A process that saves in a loop is killed at random moments; what is found is always one whole state, never older than
// the last one that was reported as saved.
static void test_kill_9(void) {
    const char* out = out_folder("kill");
    uint64_t rng = 1;
    int64_t step, found = 0;
    for (int kill_number = 0; kill_number < 40; kill_number++) {
        int reports[2];
        if (pipe(reports) != 0) { fatal("the test cannot make a pipe: %s", strerror(errno)); }
        pid_t child = fork();
        if (child == 0) {
            for (int64_t i = found + 1;; i++) {
                char error[512];
                if (!save(out, i, (uint64_t)i, 3, error, sizeof error) || write(reports[1], &i, sizeof i) < 0) {
                    _exit(1);
                }
            }
        }
        close(reports[1]);
        usleep((useconds_t)(splitmix64_uniform(&rng) * 20000));
        kill(child, SIGKILL);
        int status;
        waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        int64_t saved = found;
        while (read(reports[0], &saved, sizeof saved) == sizeof saved) {}
        close(reports[0]);
        found = load(out, &step);
        CHECK(found == saved || found == saved + 1);
        CHECK(found == (found == 0 ? 0 : step));
    }
    CHECK(found > 0);
    save_well(out, found + 1, 1, 3);
    CHECK(leftovers(out) == 0 && count_names(out, "step_", "") <= 3);
}

// ---------------------------------------------------------------------------------------------------------------------
// Damage

// Two checkpoints, steps 100 and 200, and in the second the file `name` with the byte at `flip` changed (if >= 0) and
// `cut` bytes taken off its end (-1: one added), or no such file at all (cut INT32_MAX). Then it is loaded.
static void damaged(const char* name, int64_t flip, int cut) {
    char file[PATH_SIZE], rest[128];
    const char* out = out_folder("damaged");
    size_t size;
    int64_t step;
    tempdir_remove(out);
    save_well(out, 100, 1, 0);
    save_well(out, 200, 2, 0);
    snprintf(rest, sizeof rest, "step_00000200/%s", name);
    print_cut(file, sizeof file, "%s", below(out, rest));
    char* data = get_file(file, &size);
    if (flip >= 0) { data[flip] ^= 4; }
    if (cut == INT32_MAX) {
        unlink(file);
    } else {
        put_file(file, data, (size_t)((int64_t)size - cut)); // one more: the NUL at the end
    }
    free(data);
    load(out, &step);
}

static void test_damaged_files(void) {
    const char* hint = "echo step_00000100 > ";
    const char* const names[] = {"model.bin", "optimizer.bin", "state.txt", "backend.bin"};
    for (int i = 0; i < 4; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s has the checksum", names[i]);
        CHECK_DIES(damaged(names[i], 0, 0), text);
        CHECK_DIES(damaged(names[i], 5, 0), text);
        CHECK_DIES(damaged(names[i], 5, 0), hint);
        snprintf(text, sizeof text, "%s is truncated", names[i]);
        CHECK_DIES(damaged(names[i], -1, 1), text);
        CHECK_DIES(damaged(names[i], -1, 5), hint);
        snprintf(text, sizeof text, "%s is too long", names[i]);
        CHECK_DIES(damaged(names[i], -1, -1), text);
        snprintf(text, sizeof text, "%s cannot be read: No such file", names[i]);
        CHECK_DIES(damaged(names[i], -1, INT32_MAX), text);
    }
    CHECK_DIES(damaged("manifest.txt", -1, INT32_MAX), "manifest.txt cannot be read: No such file");
    CHECK_DIES(damaged("manifest.txt", 0, 0), "does not start with 'checkpoint'");
    CHECK_DIES(damaged("manifest.txt", 11, 0), "it has version 5, this program reads version 1");
    size_t size;
    free(get_file(below(out_folder("again"), "step_00000050.2/manifest.txt"), &size));
    for (int64_t i = 12; i < (int64_t)size; i++) { CHECK_DIES(damaged("manifest.txt", i, 0), hint); }
    for (int cut = 1; cut <= (int)size; cut += 7) { CHECK_DIES(damaged("manifest.txt", -1, cut), hint); }
}

// Writes a manifest with a right checksum of its own over any text.
static void forge_manifest(const char* out, const char* text) {
    Crc32 tables;
    char whole[512];
    crc32_init(&tables);
    snprintf(whole, sizeof whole, "%send %08" PRIx32 "\n", text, crc32_add(&tables, 0, text, strlen(text)));
    put_file(below(out, "step_00000001/manifest.txt"), whole, strlen(whole));
}

static void test_edited_manifest(void) {
    const char* out = out_folder("edited");
    int64_t step;
    save_well(out, 1, 1, 0);
    forge_manifest(out, "checkpoint 1\n");
    CHECK_DIES(load(out, &step), "does not list model.bin");
    forge_manifest(out, "checkpoint 1\n../../secret 3 00000000\n");
    CHECK_DIES(load(out, &step), "names the unknown file '../../secret'");
    forge_manifest(out, "checkpoint 1\nmodel.bin many\n");
    CHECK_DIES(load(out, &step), "malformed line 'model.bin many'");
    forge_manifest(out, "checkpoint 1\nmodel.bin 99999999999 00000000\n");
    CHECK_DIES(load(out, &step), "model.bin is truncated");
    CHECK_DIES(load(out, &step), "there is no intact older checkpoint");
}

static void with_latest(const char* text) {
    const char* out = out_folder("latest");
    int64_t step;
    put_file(below(out, "latest"), text, strlen(text));
    load(out, &step);
}

static void test_damaged_latest(void) {
    const char* out = out_folder("latest");
    int64_t step;
    save_well(out, 100, 1, 0);
    save_well(out, 200, 2, 0);
    CHECK_DIES(with_latest(""), "/latest' is damaged: it names ''");
    CHECK_DIES(with_latest("\n"), "is step_00000200; to resume from it: echo step_00000200 > ");
    CHECK_DIES(with_latest("../checkpoints/step_00000100\n"), "expected the name of a folder");
    CHECK_DIES(with_latest("step_00000100/\n"), "expected the name of a folder");
    CHECK_DIES(with_latest("nonsense\n"), "it names 'nonsense'");
    CHECK_DIES(with_latest("step_00000150\n"), "step_00000150' is damaged: manifest.txt cannot be read");
    CHECK_DIES(with_latest("step_00000150\n"), "echo step_00000100 > ");
    with_latest("step_00000100"); // as an editor without a last newline leaves it, or echo with one
    CHECK(load(out, &step) == 1 && step == 100);
    with_latest("step_00000200  \r\n");
    CHECK(load(out, &step) == 2);
    unlink(below(out, "latest"));
    CHECK(load(out, &step) == 2 && step == 200);
    CHECK(mkdir(below(out, "latest"), 0777) == 0);
    CHECK_DIES(load(out, &step), "cannot read");

    // A checkpoint of a file's name, and damage found by checkpoint_load itself.
    Store s;
    char* text;
    store_open(&s, tiny_config(), STORE_BLOB);
    CHECK_DIES(checkpoint_load(below(out, "step_00000300"), &s.config, &s.backend, &text), "echo step_00000200 > ");
    put_file(below(out, "step_00000100/state.txt"), "edited", 6);
    CHECK_DIES(checkpoint_load(below(out, "step_00000100"), &s.config, &s.backend, &text), "state.txt");
    store_close(&s);
}

// Leftovers of a killed run, with whatever is in them, go with the next save.
static void test_stale_folders(void) {
    const char* out = out_folder("stale");
    char error[512];
    save_well(out, 1, 1, 0);
    CHECK(mkdir(below(out, "step_00000002.tmp"), 0777) == 0 && mkdir(below(out, "step_00000009.old"), 0777) == 0);
    put_file(below(out, "step_00000002.tmp/backend.bin"), "x", 1);
    put_file(below(out, "step_00000009.old/model.bin"), "x", 1);
    put_file(below(out, "notes.txt"), "mine", 4); // not ours: stays
    save_well(out, 2, 2, 0);
    CHECK(leftovers(out) == 0 && path_exists(below(out, "notes.txt")));
    put_file(out_folder("file"), "x", 1); // an output folder that is a file
    CHECK(!save(out_folder("file"), 1, 1, 0, error, sizeof error));
    CHECK(strstr(error, "Not a directory") != NULL);
}

int main(void) {
    tempdir_make(folder);
    RUN(test_save_and_load);
    RUN(test_order);
    RUN(test_other_model);
    RUN(test_keep);
    RUN(test_same_step_again);
    RUN(test_one_failure);
    RUN(test_disk_gone);
    RUN(test_failed_save_cleans_up);
    RUN(test_death_everywhere);
    RUN(test_kill_9);
    RUN(test_damaged_files);
    RUN(test_edited_manifest);
    RUN(test_damaged_latest);
    RUN(test_stale_folders);
    tempdir_remove(folder);
    return test_summary();
}
