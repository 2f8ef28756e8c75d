/*
The CPU trainer's model as an object that another program links: test_gpt.cu compares the CUDA trainer with it, once in
float and once in double. The compiler is told the name of the one function that is exported, and the type:

    cc -DCPU_OPEN=cpu_open_double -DREAL=double -c dev/test/cpu_backend.c
*/
#define TRAIN_GPT_NO_MAIN
#include "train_gpt.c"

void CPU_OPEN(Backend* backend, const GPTConfig* config, const BackendOptions* options);
void CPU_OPEN(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    cpu_open(backend, config, options);
}
