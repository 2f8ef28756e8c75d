/*
Text files -> token files for training on bytes, and the tokenizer file to go with them.

    text_to_tokens --out data/mine *.txt          (see --help)

writes PREFIX_train.bin and PREFIX_val.bin (the format at the top of llmc/dataloader.h) and PREFIX_tokenizer.bin (that
of llmc/tokenizer.h). The vocabulary has 257 tokens: token b is the byte b, token 256 is end of text. Each document is
an end-of-text token followed by its bytes.

What goes into validation is a function of the documents and their order alone:

- --val-every N: every N-th document, whole. For many documents: no document is in both sets.
- --val-fraction F (0.1 if nothing is said): the last F of each document of at least 2048 bytes, from the start of a
  line on, and of the shorter documents every 1/F-th, whole. For few documents: one alone is split too, and of every
  kind of text there is some in validation. The part cut off counts as a document, and starts with an end-of-text token.

The input is mapped into memory and read twice, first to count and then to write, so it may be larger than memory.
Nothing gets its final name before everything is on the disk.
*/
#include "llmc/atomicfile.h"
#include "llmc/check.h"
#include "llmc/dataloader.h"
#include "llmc/tokenizer.h"
#include "llmc/units.h"

enum { NUM_BYTES = 256, EOT = NUM_BYTES, VOCAB_SIZE = NUM_BYTES + 1 };
enum { LONG_DOCUMENT = 2048 };      // bytes from which on --val-fraction cuts a document
enum { BUFFERED_TOKENS = 1 << 16 }; // tokens per write
enum { NAME_SIZE = PATH_SIZE - 8 }; // of a path that temporary_name() will lengthen
enum { SPLIT_TRAIN, SPLIT_VAL, NUM_SPLITS };

static const char* const split_names[NUM_SPLITS] = {"train", "val"};

typedef struct {
    const char* prefix;
    double val_fraction;   // used if val_every is 0
    uint64_t val_every;    // 0: by fraction
    uint64_t shard_tokens; // tokens in a file; 0: one file, without a number in its name
    bool blank_lines;      // documents within a file are separated by blank lines
    char** files;          // (num_files)
    size_t num_files;
} Job;

static void usage(void) {
    puts("usage: text_to_tokens --out PREFIX [options] FILE...\n"
         "Turns text into token files of bytes: PREFIX_train.bin, PREFIX_val.bin, PREFIX_tokenizer.bin.\n"
         "\n"
         "  --out PREFIX         what the names of the files written begin with, e.g. data/mine\n"
         "  --val-fraction F     share of the text for validation, 0 <= F < 1, default 0.1: the ends of long "
         "documents,\n"
         "                       short documents whole; 0: no validation file\n"
         "  --val-every N        instead: every N-th document, whole, N >= 2\n"
         "  --separator HOW      file (default): each file is one document;\n"
         "                       blank-line: documents within a file are separated by blank lines\n"
         "  --shard-tokens N     several files of N tokens, PREFIX_train_000000.bin, ...; K, M, B for 1e3, 1e6, 1e9\n"
         "  --files-from LIST    read the names of more files from LIST, one a line; - is the standard input\n"
         "  -h, --help           this text");
}

// ---------------------------------------------------------------------------------------------------------------------
// Options

static void add_file(Job* job, const char* path) {
    job->files = (char**)realloc(job->files, (job->num_files + 1) * sizeof(char*));
    if (job->files == NULL) { fatal("out of memory: a list of %zu file names", job->num_files); }
    job->files[job->num_files++] = copy_string(path);
}

static void add_files_from(Job* job, const char* list) {
    FILE* f = strcmp(list, "-") == 0 ? stdin : fopen(list, "r");
    if (f == NULL) { fatal("--files-from: cannot open '%s': %s", list, strerror(errno)); }
    char* line = NULL;
    size_t capacity = 0;
    for (ssize_t n; (n = getline(&line, &capacity, f)) >= 0;) {
        line[n > 0 && line[n - 1] == '\n' ? n - 1 : n] = '\0';
        if (line[0] != '\0') { add_file(job, line); }
    }
    if (ferror(f)) { fatal("--files-from: cannot read '%s': %s", list, strerror(errno)); }
    free(line);
    if (f != stdin) { fclose(f); }
}

// A whole number from low to high.
static uint64_t count_option(const char* option, const char* value, double low, double high) {
    double x;
    if (!parse_count(value, &x) || x < low || x > high || x != floor(x)) {
        fatal("%s: expected a whole number from %.0f to %.0f, found '%s'", option, low, high, value);
    }
    return (uint64_t)x;
}

static void set_option(Job* job, const char* option, const char* value) {
    if (strcmp(option, "--out") == 0) {
        job->prefix = value;
    } else if (strcmp(option, "--val-fraction") == 0) {
        if (!parse_count(value, &job->val_fraction) || job->val_fraction >= 1) {
            fatal("--val-fraction: expected a number from 0 to less than 1, found '%s'", value);
        }
    } else if (strcmp(option, "--val-every") == 0) {
        job->val_every = count_option(option, value, 2, 1e15);
    } else if (strcmp(option, "--separator") == 0) {
        job->blank_lines = strcmp(value, "blank-line") == 0;
        if (!job->blank_lines && strcmp(value, "file") != 0) {
            fatal("--separator: expected file or blank-line, found '%s'", value);
        }
    } else if (strcmp(option, "--shard-tokens") == 0) {
        job->shard_tokens = count_option(option, value, 2, INT32_MAX);
    } else if (strcmp(option, "--files-from") == 0) {
        add_files_from(job, value);
    } else {
        fatal("unknown option '%s'; --help lists the options", option);
    }
}

// False if there is nothing to do but --help.
static bool parse_options(Job* job, int argc, char** argv) {
    memset(job, 0, sizeof *job);
    job->val_fraction = -1;  // not given
    bool only_files = false; // after "--"
    for (int i = 1; i < argc; i++) {
        if (only_files || argv[i][0] != '-') {
            add_file(job, argv[i]);
        } else if (strcmp(argv[i], "--") == 0) {
            only_files = true;
        } else if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            usage();
            return false;
        } else if (i + 1 == argc) {
            fatal("%s: a value is missing, or there is no such option; --help lists the options", argv[i]);
        } else {
            set_option(job, argv[i], argv[i + 1]);
            i++;
        }
    }
    if (job->prefix == NULL || job->prefix[0] == '\0') {
        fatal("--out PREFIX is missing: the names of the files written begin with it, e.g. --out data/mine");
    }
    if (job->num_files == 0) { fatal("no input: name the text files, or give a list of them with --files-from"); }
    if (job->val_every > 0 && job->val_fraction >= 0) {
        fatal("--val-every and --val-fraction exclude each other; give one of them");
    }
    job->val_fraction = job->val_fraction < 0 ? 0.1 : job->val_fraction;
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// From files to documents to the two sets

// Receives the documents in order, each a piece of memory that is gone afterwards.
typedef void (*DocumentSink)(void* context, int split, const char* text, size_t len);

typedef struct {
    const Job* job;
    uint64_t documents;       // so far
    uint64_t short_documents; // so far, for --val-fraction
    DocumentSink sink;
    void* context;
} Splitter;

// Where in the document its part for validation begins: 0 is all of it, len none.
static size_t validation_start(Splitter* s, const char* text, size_t len) {
    const double fraction = s->job->val_fraction;
    if (s->job->val_every > 0) { return s->documents % s->job->val_every == 0 ? 0 : len; }
    if (len < LONG_DOCUMENT) {
        double k = (double)++s->short_documents, noise = 1e-9; // so that 10 times 0.1 is 1, however it is rounded
        return floor(k * fraction + noise) > floor((k - 1) * fraction + noise) ? 0 : len;
    }
    size_t start = len - (size_t)(fraction * (double)len);
    const char* newline = start < len ? (const char*)memchr(text + start - 1, '\n', len - start) : NULL;
    if (newline != NULL) { return (size_t)(newline - text) + 1; }
    while (start < len &&
           ((unsigned char)text[start] & 0xc0) == 0x80) { // in the last line: at the start of a character
        start++;
    }
    return start;
}

static void split_document(Splitter* s, const char* text, size_t len) {
    s->documents++;
    size_t start = validation_start(s, text, len);
    if (start > 0) { s->sink(s->context, SPLIT_TRAIN, text, start); }
    if (start < len) { s->sink(s->context, SPLIT_VAL, text + start, len - start); }
}

// The end of the line that begins at text: behind its newline, or the end of the text. *blank: nothing but white space.
static size_t line_length(const char* text, size_t len, bool* blank) {
    const char* newline = (const char*)memchr(text, '\n', len);
    size_t line = newline == NULL ? len : (size_t)(newline - text) + 1;
    *blank = true;
    for (size_t i = 0; *blank && i < line; i++) { *blank = strchr(" \t\r\n", text[i]) != NULL && text[i] != '\0'; }
    return line;
}

// Splits a text at its blank lines, which belong to no document.
static void split_at_blank_lines(Splitter* s, const char* text, size_t len) {
    size_t start = 0; // of the document
    for (size_t at = 0; at < len;) {
        bool blank;
        size_t line = line_length(text + at, len - at, &blank);
        if (blank) {
            if (at > start) { split_document(s, text + start, at - start); }
            start = at + line;
        }
        at += line;
    }
    if (len > start) { split_document(s, text + start, len - start); }
}

static void split_file(Splitter* s, const char* path) {
    struct stat info;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) { fatal("cannot open '%s': %s", path, strerror(errno)); }
    if (!S_ISREG(info.st_mode)) {
        fatal("'%s' is not a regular file; name text files (for a folder: find FOLDER -type f | text_to_tokens "
              "--files-from - "
              "...)",
              path);
    }
    size_t len = (size_t)info.st_size;
    if (len > 0) {
        char* text = (char*)mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
        if (text == MAP_FAILED) { fatal("cannot map '%s' (%zu bytes) into memory: %s", path, len, strerror(errno)); }
        if (s->job->blank_lines) {
            split_at_blank_lines(s, text, len);
        } else {
            split_document(s, text, len);
        }
        munmap(text, len);
    }
    close(fd);
}

// All documents of all files, in order, into the sink. Returns the number of documents before they were split.
static uint64_t split_all(const Job* job, DocumentSink sink, void* context) {
    Splitter s = {job, 0, 0, sink, context};
    for (size_t i = 0; i < job->num_files; i++) { split_file(&s, job->files[i]); }
    return s.documents;
}

// ---------------------------------------------------------------------------------------------------------------------
// Counting

typedef struct {
    uint64_t documents;
    uint64_t bytes;
} SplitSize;

static void count_document(void* context, int split, const char* text, size_t len) {
    (void)text;
    SplitSize* size = (SplitSize*)context + split;
    size->documents++;
    size->bytes += len;
}

static uint64_t split_tokens(const SplitSize* size) { return size->documents + size->bytes; }

// How many files a set of that many tokens takes.
static uint64_t num_shards(const Job* job, uint64_t tokens) {
    return job->shard_tokens == 0 ? tokens > 0 : (tokens + job->shard_tokens - 1) / job->shard_tokens;
}

// fatal() unless both sets have text and fit into their files.
static void check_sizes(const Job* job, const SplitSize* sizes, uint64_t documents) {
    if (documents == 0) { fatal("the %zu input files hold no text", job->num_files); }
    if (sizes[SPLIT_VAL].documents == 0 && job->val_every > 0) {
        fatal("--val-every %" PRIu64 " leaves validation empty: there are only %" PRIu64
              " documents; give more, a smaller "
              "number, or --val-fraction",
              job->val_every, documents);
    }
    if (sizes[SPLIT_VAL].documents == 0 && job->val_fraction > 0) {
        fatal("--val-fraction %g leaves validation empty: %" PRIu64 " documents with %" PRIu64
              " bytes are too little for it "
              "(those under %d bytes are not cut); give more text, a larger fraction, or 0 for no validation",
              job->val_fraction, documents, sizes[SPLIT_TRAIN].bytes, LONG_DOCUMENT);
    }
    for (int split = 0; split < NUM_SPLITS && job->shard_tokens == 0; split++) {
        if (split_tokens(&sizes[split]) > INT32_MAX) {
            fatal("the %s set has %" PRIu64 " tokens, more than one file can count (%d); use --shard-tokens, e.g. 100M",
                  split_names[split], split_tokens(&sizes[split]), INT32_MAX);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    OutFile file;
    uint64_t total;   // tokens that this set will have
    uint64_t written; // tokens so far
    size_t buffered;
    uint16_t buffer[BUFFERED_TOKENS];
} SplitWriter;

typedef struct {
    const Job* job;
    SplitWriter split[NUM_SPLITS];
    char error[PATH_SIZE + 128];
} Writer;

// The name of a file of tokens, into path, of NAME_SIZE bytes.
static const char* token_file_name(const Job* job, int split, uint64_t shard, bool numbered, char* path) {
    if (numbered) {
        snprintf(path, NAME_SIZE, "%s_%s_%06" PRIu64 ".bin", job->prefix, split_names[split], shard);
    } else {
        snprintf(path, NAME_SIZE, "%s_%s.bin", job->prefix, split_names[split]);
    }
    return path;
}

// The name of the file number i of all that are written: the shards of both sets, then the tokenizer. NULL behind the
// last.
static const char* output_name(const Writer* w, uint64_t i, char* path) {
    for (int split = 0; split < NUM_SPLITS; split++) {
        uint64_t shards = num_shards(w->job, w->split[split].total);
        if (i < shards) { return token_file_name(w->job, split, i, w->job->shard_tokens > 0, path); }
        i -= shards;
    }
    snprintf(path, NAME_SIZE, "%s_tokenizer.bin", w->job->prefix);
    return i == 0 ? path : NULL;
}

// Removes everything temporary and ends the program with w->error.
static void give_up(const Writer* w) {
    char path[NAME_SIZE], temporary[PATH_SIZE];
    for (uint64_t i = 0; output_name(w, i, path) != NULL; i++) { unlink(temporary_name(temporary, path)); }
    fatal("%s", w->error);
}

static void flush_tokens(Writer* w, SplitWriter* s) {
    out_write(&s->file, s->buffer, s->buffered * sizeof(uint16_t));
    s->buffered = 0;
    if (s->file.failed) { give_up(w); }
}

static void finish_shard(Writer* w, SplitWriter* s) {
    if (s->written > 0) {
        flush_tokens(w, s);
        if (!out_close(&s->file)) { give_up(w); }
    }
}

static void start_shard(Writer* w, int split) {
    SplitWriter* s = &w->split[split];
    char path[NAME_SIZE], temporary[PATH_SIZE];
    uint64_t most = w->job->shard_tokens, left = s->total - s->written;
    token_file_name(w->job, split, most == 0 ? 0 : s->written / most, most > 0, path);
    int32_t header[TOKEN_FILE_HEADER] = {TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION};
    header[2] = (int32_t)(most > 0 && most < left ? most : left);
    header[3] = VOCAB_SIZE;
    out_open(&s->file, temporary_name(temporary, path), w->error, sizeof w->error);
    out_write(&s->file, header, sizeof header);
    if (s->file.failed) { give_up(w); }
}

static void write_token(Writer* w, int split, uint16_t token) {
    SplitWriter* s = &w->split[split];
    if (s->written == 0 || (w->job->shard_tokens > 0 && s->written % w->job->shard_tokens == 0)) {
        finish_shard(w, s);
        start_shard(w, split);
    }
    s->buffer[s->buffered++] = token;
    s->written++;
    if (s->buffered == BUFFERED_TOKENS) { flush_tokens(w, s); }
}

static void write_document(void* context, int split, const char* text, size_t len) {
    Writer* w = (Writer*)context;
    write_token(w, split, EOT);
    for (size_t i = 0; i < len; i++) { write_token(w, split, (unsigned char)text[i]); }
}

static void write_tokenizer(Writer* w) {
    char path[NAME_SIZE], temporary[PATH_SIZE], byte[NUM_BYTES];
    const char* bytes[VOCAB_SIZE];
    int lengths[VOCAB_SIZE];
    for (int i = 0; i < NUM_BYTES; i++) {
        byte[i] = (char)i;
        bytes[i] = &byte[i];
        lengths[i] = 1;
    }
    bytes[EOT] = END_OF_TEXT;
    lengths[EOT] = (int)strlen(END_OF_TEXT);
    OutFile f;
    snprintf(path, sizeof path, "%s_tokenizer.bin", w->job->prefix);
    out_open(&f, temporary_name(temporary, path), w->error, sizeof w->error);
    tokenizer_write(&f, VOCAB_SIZE, EOT, bytes, lengths);
    if (!out_close(&f)) { give_up(w); }
}

// fatal() if a file of an earlier run would stay beside the new ones and be read with them by a pattern like
// PREFIX_train*.
static void refuse_leftovers(const Job* job, const SplitSize* sizes) {
    for (int split = 0; split < NUM_SPLITS; split++) {
        char numbered[NAME_SIZE], plain[NAME_SIZE];
        uint64_t shards = num_shards(job, split_tokens(&sizes[split]));
        bool sharded = job->shard_tokens > 0;
        token_file_name(job, split, sharded ? shards : 0, true, numbered);
        token_file_name(job, split, 0, false, plain);
        bool plain_stays = (sharded || shards == 0) && access(plain, F_OK) == 0;
        if (plain_stays || access(numbered, F_OK) == 0) {
            fatal("'%s' is left from an earlier run and would not be replaced by this one, but be read along with it; "
                  "remove it "
                  "and its like, or choose another --out",
                  plain_stays ? plain : numbered);
        }
    }
}

static void write_all(const Job* job, const SplitSize* sizes) {
    Writer* w = (Writer*)alloc_zeroed(1, sizeof(Writer), "the write buffers");
    w->job = job;
    for (int split = 0; split < NUM_SPLITS; split++) {
        w->split[split].total = split_tokens(&sizes[split]);
        w->split[split].file.fd = -1;
    }
    split_all(job, write_document, w);
    for (int split = 0; split < NUM_SPLITS; split++) {
        finish_shard(w, &w->split[split]);
        if (w->split[split].written != w->split[split].total) {
            snprintf(w->error, sizeof w->error, "the input changed while it was read; run this again");
            give_up(w);
        }
    }
    write_tokenizer(w);
    char path[NAME_SIZE], temporary[PATH_SIZE];
    for (uint64_t i = 0; output_name(w, i, path) != NULL; i++) {
        if (!publish(temporary_name(temporary, path), path, w->error, sizeof w->error)) { give_up(w); }
    }
    free(w);
}

static void report(const Job* job, const SplitSize* sizes) {
    for (int split = 0; split < NUM_SPLITS; split++) {
        uint64_t tokens = split_tokens(&sizes[split]), files = num_shards(job, tokens);
        if (files > 0) {
            printf("%s_%s%s.bin: %" PRIu64 " documents, %" PRIu64 " bytes, %" PRIu64 " tokens", job->prefix,
                   split_names[split], job->shard_tokens > 0 ? "_*" : "", sizes[split].documents, sizes[split].bytes,
                   tokens);
            printf(job->shard_tokens > 0 ? " in %" PRIu64 " files\n" : "\n", files);
        }
    }
    printf("%s_tokenizer.bin: %d tokens\n", job->prefix, VOCAB_SIZE);
}

int main(int argc, char** argv) {
    Job job;
    if (!parse_options(&job, argc, argv)) { return 0; }
    SplitSize sizes[NUM_SPLITS] = {{0, 0}, {0, 0}};
    uint64_t documents = split_all(&job, count_document, sizes);
    check_sizes(&job, sizes, documents);
    refuse_leftovers(&job, sizes);
    write_all(&job, sizes);
    report(&job, sizes);
    for (size_t i = 0; i < job.num_files; i++) { free(job.files[i]); }
    free(job.files);
    return 0;
}
