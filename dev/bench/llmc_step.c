/*
Times training steps of llm.c's CPU trainer (github.com/karpathy/llm.c, train_gpt2.c), whose folder must be on the include
path: `make bench LLMC=path/to/llm.c` builds this with llm.c's own flags.

    build/llmc_step MODEL.bin B T STEPS      one line for each step: its seconds

A step is what llm.c's main() times: forward, zero_grad, backward, update, on random tokens. The first step allocates its
memory, so it is run once more than asked and that first one is not printed.
*/
#define TESTING // leaves out llm.c's own main()
#include "train_gpt2.c"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char** argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: %s MODEL.bin B T STEPS\n", argv[0]);
        return 2;
    }
    const int B = atoi(argv[2]), T = atoi(argv[3]), steps = atoi(argv[4]);
    FILE* lines = fdopen(dup(1), "w");
    if (lines == NULL || freopen("/dev/null", "w", stdout) == NULL) { // llm.c prints the model's shape on stdout
        return 1;
    }
    GPT2 model;
    gpt2_build_from_checkpoint(&model, argv[1]);
    int* tokens = (int*)mallocCheck((size_t)(B * T + 1) * sizeof(int));
    uint32_t state = 1;
    for (int i = 0; i <= B * T; i++) {
        state = state * 1664525u + 1013904223u;
        tokens[i] = (int)((state >> 8) % (uint32_t)model.config.vocab_size);
    }
    for (int step = 0; step <= steps; step++) {
        double start = now();
        gpt2_forward(&model, tokens, tokens + 1, B, T);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, step + 1);
        if (step > 0) {
            fprintf(lines, "%.6f\n", now() - start);
            fflush(lines);
        }
    }
    gpt2_free(&model);
    free(tokens);
    return fclose(lines) == 0 ? 0 : 1;
}
