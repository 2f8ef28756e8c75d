/*
Matrix products through cuBLASLt, on the conventions of train_gpt.c: every matrix row-major, weights stored (OC, C).

    forward            out (N, OC)        = alpha * inp (N, C) @ weight (OC, C)^T + bias, as it is or through GELU
    backward input     dinp (N, C)        = alpha * dout (N, OC) @ weight (OC, C); times the slope of GELU
    backward weight    dweight (OC, C) (+)= alpha * dout (N, OC)^T @ inp (N, C), in fp32
    ... by examples    the same, and sum_b |dweight_b|^2, from one batched product of all of a group's dweight_b

Row-major and column-major. cuBLASLt reads memory by columns. The memory of a row-major (r, c) matrix, read by columns,
is its transpose: (c, r) with leading dimension c. So out = left @ right is asked for as out^T = right^T @ left^T: our
right matrix is the library's A, our left one its B, our columns are its m, our rows its n; what it writes by columns is
out by rows. An operand that lies in memory as it stands in the formula needs no transposition by the library; one
that lies there transposed (the weight of the forward product, dout of the weight gradient) gets CUBLAS_OP_T. A bias
along the library's m lies along our columns.

Epilogues. A bias comes at the cost of reading it. GELU is the tanh form; its input is kept, rounded to
floatX, and the backward product reads it again. Against passes of their own that saves 2 bytes a number forward and 4
backward in bf16. The FP32 build is held to tolerances that leave no room for a fast tanh: there the caller uses passes
of their own (see MATMUL_GELU).

Which algorithm. The library's heuristics name up to eight for a shape, its favourite first. At the first use of a shape
the favourite is tried twice on the call's own buffers (an output that is added to is left alone: trials write to
scratch memory) and taken if it repeats its bits, else the next one. Then all are timed, and the fastest is kept, but
only among those that give the same bits. So timing decides how fast a product is and never what it is: two runs of a
program, or a run and its continuation, agree bit for bit although their clocks do not.
Timing a shape takes as long as some seventy products and gains a few per cent. A batch that moves brings twenty new
shapes with each of its sizes, so only the first MATMUL_AT_ONCE are timed at once, later ones when they have been used
MATMUL_PATIENCE times.
Small outputs are not tried, the favourite is taken: they say too little about which algorithms add in the same order;
so would operands that are all zero, which a first use should not see. Sums split over the inner dimension are allowed
where the parts are fp32 and added by a separate step; reduction in place or in the output's type is not. Trials wait
for the stream.

Numerical contract: products of bf16 (of float in the FP32 build, without TF32 unless asked for), fp32 accumulation, one
rounding of the sum, bias included; weight gradients are fp32 in memory. Squares are exact, their sums
double. The bits follow from shapes, library version and device. Any N >= 1; C and OC are multiples of 8 where GELU is
fused, OC * C a multiple of 4 by examples; other shapes may be odd, at the library's speed for them. No operand overlaps
out.

Floor: 2 * N * C * OC operations at the peak of the tensor cores; all shapes of GPT-2 are bound by it, not by memory.
*/
#ifndef LLMC_MATMUL_CUH
#define LLMC_MATMUL_CUH

#include "cuda_common.cuh"
#include <algorithm>
#include <cublasLt.h>

// Whether GELU may be fused into products.
enum { MATMUL_GELU = sizeof(floatX) == 2 };

enum {
    MATMUL_WORKSPACE = 32 << 20, // bytes; what cuBLAS advises for Hopper
    MATMUL_PLANS = 4096,
    MATMUL_PLACES = 2 * MATMUL_PLANS, // of the table that finds them; a power of two
    MATMUL_AT_ONCE = 128,             // several sizes of a batch, with and without per-example norms
    MATMUL_PATIENCE = 2000,
    MATMUL_CANDIDATES = 8,
    MATMUL_ROUNDS = 5,
    MATMUL_BLOCK = 256, // threads
    MATMUL_MAX_BLOCKS = 1024
};

static inline void cublas_check_at(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        fatal("cuBLASLt: %s (%s, %s:%d); see whether the library fits the driver and the device has memory left",
              cublasLtGetStatusName(status), call, file, line);
    }
}
#define cublas_check(call) cublas_check_at((call), #call, __FILE__, __LINE__)

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// Adds up the examples' gradients in the order of the examples, and each block's share of their squares.
// dweight (n), partial (blocks), examples (group, n); n a multiple of 4
// Reads 4 * group * n bytes and, where it accumulates, dweight; writes dweight.
__global__ void __launch_bounds__(MATMUL_BLOCK)
    matmul_fold_kernel(float* dweight, double* partial, const float* examples, float alpha, int accumulate, int group,
                       size_t n) {
    const size_t stride = (size_t)gridDim.x * MATMUL_BLOCK * 4;
    __shared__ double scratch[WARP];
    double square = 0;
    for (size_t i = ((size_t)blockIdx.x * MATMUL_BLOCK + threadIdx.x) * 4; i < n; i += stride) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
        for (int b = 0; b < group; b++) {
            const Vec16<float> g = load16_once(examples + (size_t)b * n + i);
            for (int k = 0; k < 4; k++) {
                sum[k] += g[k];
                square += (double)g[k] * (double)g[k];
            }
        }
        Vec16<float> total = {{0, 0, 0, 0}};
        if (accumulate) { total = load16(dweight + i); }
        for (int k = 0; k < 4; k++) { total[k] += alpha * sum[k]; }
        store16(dweight + i, total);
    }
    square = block_sum(square, scratch);
    if (threadIdx.x == 0) { partial[blockIdx.x] = square; }
}

// *hash += a fingerprint of the words and their places; a sum of integers, so in any order.
__global__ void __launch_bounds__(MATMUL_BLOCK)
    matmul_fingerprint_kernel(unsigned long long* hash, const uint16_t* words, size_t n) {
    unsigned long long sum = 0;
    for (size_t i = (size_t)blockIdx.x * MATMUL_BLOCK + threadIdx.x; i < n; i += (size_t)gridDim.x * MATMUL_BLOCK) {
        unsigned long long x = ((unsigned long long)i << 16 | words[i]) + 0x9e3779b97f4a7c15ull;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ x >> 27) * 0x94d049bb133111ebull;
        sum += x ^ x >> 31;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) { atomicAdd(hash, sum); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products and plans

// What decides the algorithm. All int: compared as bytes.
typedef struct {
    int rows, cols, inner; // out (rows, cols), summed over inner
    int batch;             // so many such products, one behind the other in memory
    int left_transposed;   // left lies in memory as (inner, rows), not (rows, inner)
    int right_transposed;  // right lies in memory as (cols, inner), not (inner, cols)
    int epilogue;          // CUBLASLT_EPILOGUE_*
    int add;               // to what out holds
    int fp32_out;          // out is float, not floatX
    int alignment;         // that all pointers have, in bytes; 16 at most
} MatmulShape;

// One call: out = or += epilogue(alpha * left @ right + bias)
typedef struct {
    MatmulShape shape;
    void* out;           // (batch, rows, cols)
    const floatX* left;  // (batch, rows, inner)
    const floatX* right; // (batch, inner, cols)
    const floatX* bias;  // (cols) or NULL
    const void* gelu;    // (rows, cols) or NULL: the input of GELU, written forward, read backward
    float alpha;
} MatmulProduct;

// How products of one shape are computed. Times are 0 where nothing was timed.
typedef struct {
    MatmulShape shape;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t left, right, out;
    cublasLtMatmulAlgo_t algo;
    int uses;                  // so far, up to MATMUL_PATIENCE
    int candidates, same_bits; // algorithms that ran; those with the bits of the first
    float first_us, us;        // of the first candidate, of the chosen one
    float any_bits_us;         // of the fastest one whatever its bits
} MatmulPlan;

// Everything that products need beside their operands; for one stream at a time.
typedef struct {
    cublasLtHandle_t handle;
    bool tf32;       // FP32 build: products of tensor cores, with 10 bits of mantissa
    char* workspace; // MATMUL_WORKSPACE bytes on the device
    double* partial; // (MATMUL_MAX_BLOCKS) on the device
    cudaEvent_t start, stop;
    MatmulPlan* plan; // (MATMUL_PLANS), in the order of their first uses
    int num_plans;
    int num_timed;                 // shapes, whether their plans are still here or not
    uint16_t place[MATMUL_PLACES]; // 1 + the number of a plan, at the hash of its shape or after that; 0: free
} MatmulPlans;

static inline void matmul_open(MatmulPlans* mm, bool tf32) {
    memset(mm, 0, sizeof *mm);
    mm->tf32 = tf32;
    cublas_check(cublasLtCreate(&mm->handle));
    cuda_check(cudaMalloc((void**)&mm->workspace, MATMUL_WORKSPACE));
    cuda_check(cudaMalloc((void**)&mm->partial, MATMUL_MAX_BLOCKS * sizeof(double)));
    cuda_check(cudaEventCreate(&mm->start));
    cuda_check(cudaEventCreate(&mm->stop));
    mm->plan = (MatmulPlan*)alloc_zeroed(MATMUL_PLANS, sizeof(MatmulPlan), "plans of matrix products");
}

static inline void matmul_close(MatmulPlans* mm) {
    cublas_check(cublasLtDestroy(mm->handle));
    cuda_check(cudaFree(mm->workspace));
    cuda_check(cudaFree(mm->partial));
    cuda_check(cudaEventDestroy(mm->start));
    cuda_check(cudaEventDestroy(mm->stop));
    free(mm->plan);
}

static inline size_t matmul_out_size(const MatmulShape* s) {
    const size_t numbers = (size_t)s->batch * (size_t)s->rows * (size_t)s->cols;
    return numbers * (s->fp32_out ? sizeof(float) : sizeof(floatX));
}

// The library's layout of a row-major (rows, cols) matrix: see the top of the file.
static inline void matmul_layout(cublasLtMatrixLayoutOpaque_t* layout, cudaDataType_t type, int rows, int cols,
                                 int batch) {
    const int64_t stride = (int64_t)rows * cols;
    cublas_check(cublasLtMatrixLayoutInit(layout, type, (uint64_t)cols, (uint64_t)rows, cols));
    cublas_check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    cublas_check(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
}

static inline void matmul_set(MatmulPlan* plan, cublasLtMatmulDescAttributes_t what, const void* value, size_t size) {
    cublas_check(cublasLtMatmulDescSetAttribute(&plan->desc, what, value, size));
}

// The part of the plan that holds pointers of one call.
static inline void matmul_set_pointers(MatmulPlan* plan, const MatmulProduct* p) {
    if (p->bias != NULL) { matmul_set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias); }
    if (p->gelu != NULL) { matmul_set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->gelu, sizeof p->gelu); }
}

// Everything of the plan but the algorithm.
static inline void matmul_describe(const MatmulPlans* mm, MatmulPlan* plan, const MatmulProduct* p) {
    const MatmulShape* s = &p->shape;
    const bool fp32 = sizeof(floatX) == 4;
    const cudaDataType_t type = fp32 ? CUDA_R_32F : CUDA_R_16BF, out_type = s->fp32_out ? CUDA_R_32F : type;
    const cublasOperation_t op_a = s->right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = s->left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const int64_t gelu_stride = s->cols;
    memset(plan, 0, sizeof *plan);
    plan->shape = *s;
    cublas_check(cublasLtMatmulDescInit(
        &plan->desc, fp32 && mm->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    matmul_set(plan, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    matmul_set(plan, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    matmul_set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, &s->epilogue, sizeof s->epilogue);
    if (p->gelu != NULL) { matmul_set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &gelu_stride, sizeof gelu_stride); }
    matmul_set_pointers(plan, p);
    matmul_layout(&plan->left, type, s->left_transposed ? s->inner : s->rows, s->left_transposed ? s->rows : s->inner,
                  s->batch);
    matmul_layout(&plan->right, type, s->right_transposed ? s->cols : s->inner,
                  s->right_transposed ? s->inner : s->cols, s->batch);
    matmul_layout(&plan->out, out_type, s->rows, s->cols, s->batch);
}

// Runs the product with this algorithm into out.
static inline cublasStatus_t matmul_run(const MatmulPlans* mm, MatmulPlan* plan, const cublasLtMatmulAlgo_t* algo,
                                        const MatmulProduct* p, void* out, cudaStream_t stream) {
    const float beta = p->shape.add ? 1 : 0;
    return cublasLtMatmul(mm->handle, &plan->desc, &p->alpha, p->right, &plan->right, p->left, &plan->left, &beta, out,
                          &plan->out, out, &plan->out, algo, mm->workspace, MATMUL_WORKSPACE, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// The choice of algorithms

// The library's candidates, its favourite first.
static inline int matmul_candidates(const MatmulPlans* mm, MatmulPlan* plan,
                                    cublasLtMatmulHeuristicResult_t found[MATMUL_CANDIDATES]) {
    static const cublasLtMatmulPreferenceAttributes_t pointers[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const MatmulShape* s = &plan->shape;
    const uint64_t workspace = MATMUL_WORKSPACE;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment = (uint32_t)s->alignment;
    cublasLtMatmulPreferenceOpaque_t wish;
    cublas_check(cublasLtMatmulPreferenceInit(&wish));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                      sizeof workspace));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                                                      sizeof reduction));
    for (int i = 0; i < 4; i++) {
        cublas_check(cublasLtMatmulPreferenceSetAttribute(&wish, pointers[i], &alignment, sizeof alignment));
    }
    int count = 0, usable = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(mm->handle, &plan->desc, &plan->right, &plan->left, &plan->out, &plan->out,
                                       &wish, MATMUL_CANDIDATES, found, &count);
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; i++) {
        if (found[i].state == CUBLAS_STATUS_SUCCESS) { found[usable++] = found[i]; }
    }
    if (usable == 0) {
        fatal("cuBLASLt has no algorithm for a product (%d, %d) over %d, batch %d, epilogue %d, alignment %d: %s; "
              "try another sequence length (-t) or micro-batch (-b)",
              s->rows, s->cols, s->inner, s->batch, s->epilogue, s->alignment, cublasLtGetStatusName(status));
    }
    return usable;
}

// out: size bytes
static inline uint64_t matmul_fingerprint(const MatmulPlans* mm, const void* out, size_t size, cudaStream_t stream) {
    const size_t words = size / sizeof(uint16_t);
    const int blocks = (int)std::min(div_up(words, (size_t)MATMUL_BLOCK), (size_t)MATMUL_MAX_BLOCKS);
    unsigned long long* hash = (unsigned long long*)mm->partial;
    uint64_t value;
    cuda_check(cudaMemsetAsync(hash, 0, sizeof *hash, stream));
    matmul_fingerprint_kernel<<<blocks, MATMUL_BLOCK, 0, stream>>>(hash, (const uint16_t*)out, words);
    cuda_check_launch();
    cuda_check(cudaMemcpyAsync(&value, hash, sizeof value, cudaMemcpyDeviceToHost, stream));
    cuda_check(cudaStreamSynchronize(stream));
    return value;
}

// Microseconds of one run; the candidate is known to run.
static inline float matmul_time(const MatmulPlans* mm, MatmulPlan* plan, const cublasLtMatmulAlgo_t* algo,
                                const MatmulProduct* p, void* out, cudaStream_t stream) {
    float ms;
    cuda_check(cudaEventRecord(mm->start, stream));
    cublas_check(matmul_run(mm, plan, algo, p, out, stream));
    cuda_check(cudaEventRecord(mm->stop, stream));
    cuda_check(cudaEventSynchronize(mm->stop));
    cuda_check(cudaEventElapsedTime(&ms, mm->start, mm->stop));
    return ms * 1e3f;
}

// Runs the candidate into out, from what p->out holds where the product adds to it; false if the library refuses. bits:
// out's fingerprint
static inline bool matmul_try(const MatmulPlans* mm, MatmulPlan* plan, const cublasLtMatmulAlgo_t* algo,
                              const MatmulProduct* p, void* out, uint64_t* bits, cudaStream_t stream) {
    const size_t size = matmul_out_size(&p->shape);
    if (p->shape.add) { cuda_check(cudaMemcpyAsync(out, p->out, size, cudaMemcpyDeviceToDevice, stream)); }
    if (matmul_run(mm, plan, algo, p, out, stream) != CUBLAS_STATUS_SUCCESS) {
        cudaGetLastError(); // whatever it left
        return false;
    }
    *bits = matmul_fingerprint(mm, out, size, stream);
    return true;
}

// Takes the first candidate that runs and repeats its bits, the favourite as a rule; if timed, the fastest of those
// with the same bits. out takes the trials' results and is not p->out where the product adds to that.
static inline void matmul_trial(const MatmulPlans* mm, MatmulPlan* plan, const MatmulProduct* p, void* out,
                                const cublasLtMatmulHeuristicResult_t* found, int count, bool timed,
                                cudaStream_t stream) {
    uint64_t bits[MATMUL_CANDIDATES], again;
    float us[MATMUL_CANDIDATES];
    bool runs[MATMUL_CANDIDATES];
    int first = -1, best = -1;
    for (int i = 0; i < count && (timed || first < 0); i++) {
        us[i] = INFINITY;
        runs[i] = matmul_try(mm, plan, &found[i].algo, p, out, &bits[i], stream) &&
                  matmul_try(mm, plan, &found[i].algo, p, out, &again, stream) && again == bits[i];
        if (runs[i] && first < 0) { first = i; }
    }
    if (first < 0) { fatal("cuBLASLt: none of %d algorithms for a product gives the same bits twice", count); }
    plan->algo = found[first].algo;
    if (!timed) { return; }
    for (int round = 0; round < MATMUL_ROUNDS; round++) { // in turns: a change of clocks meets all
        for (int i = 0; i < count; i++) {
            if (runs[i]) { us[i] = std::min(us[i], matmul_time(mm, plan, &found[i].algo, p, out, stream)); }
        }
    }
    plan->any_bits_us = INFINITY;
    for (int i = 0; i < count; i++) {
        if (!runs[i]) { continue; }
        plan->candidates++;
        plan->any_bits_us = std::min(plan->any_bits_us, us[i]);
        if (bits[i] != bits[first]) { continue; }
        plan->same_bits++;
        if (best < 0 || us[i] < us[best]) { best = i; }
    }
    plan->first_us = us[first];
    plan->us = us[best];
    plan->algo = found[best].algo;
}

// Tries the candidates for this plan, if there is memory to do so. Whether two algorithms add in the same order shows
// in fp32 outputs by the thousand and in bf16 outputs by the million: a difference in the last bits of a sum changes
// one rounding in 2^15 or so.
static inline void matmul_choose(MatmulPlans* mm, MatmulPlan* plan, const MatmulProduct* p, bool timed,
                                 cudaStream_t stream) {
    const size_t size = matmul_out_size(&p->shape);
    const bool fp32 = p->shape.fp32_out || sizeof(floatX) == 4;
    cublasLtMatmulHeuristicResult_t found[MATMUL_CANDIDATES];
    const int count = matmul_candidates(mm, plan, found);
    if (plan->uses == 0) { plan->algo = found[0].algo; }
    if (size < (size_t)(fp32 ? 1 << 14 : 1 << 21)) { return; }
    void* scratch = NULL;
    if (p->shape.add && cudaMalloc(&scratch, size) != cudaSuccess) {
        cudaGetLastError(); // no memory for trials: costs time, changes no bit
        return;
    }
    matmul_trial(mm, plan, p, scratch != NULL ? scratch : p->out, found, count, timed, stream);
    mm->num_timed += timed;
    cuda_check(cudaFree(scratch));
}

// Where the table has the shape, or the free place for it.
static inline uint16_t* matmul_place(MatmulPlans* mm, const MatmulShape* s) {
    uint32_t parts[sizeof *s / sizeof(uint32_t)], hash = 2166136261u;
    memcpy(parts, s, sizeof parts);
    for (uint32_t part : parts) { hash = (hash ^ part) * 16777619u; }
    for (uint32_t i = hash ^ hash >> 15;; i++) {
        uint16_t* place = &mm->place[i % MATMUL_PLACES];
        if (*place == 0 || memcmp(&mm->plan[*place - 1].shape, s, sizeof *s) == 0) { return place; }
    }
}

// The plan for this product's shape, with the product's pointers. A full table is begun anew.
static inline MatmulPlan* matmul_plan(MatmulPlans* mm, const MatmulProduct* p, cudaStream_t stream) {
    uint16_t* place = matmul_place(mm, &p->shape);
    if (*place == 0 && mm->num_plans == MATMUL_PLANS) {
        mm->num_plans = 0;
        memset(mm->place, 0, sizeof mm->place);
        place = matmul_place(mm, &p->shape);
    }
    const bool first = *place == 0;
    if (first) { *place = (uint16_t)++mm->num_plans; }
    MatmulPlan* plan = &mm->plan[*place - 1];
    if (first) {
        matmul_describe(mm, plan, p);
        matmul_choose(mm, plan, p, mm->num_timed < MATMUL_AT_ONCE, stream);
    } else {
        matmul_set_pointers(plan, p);
    }
    if (plan->uses < MATMUL_PATIENCE && ++plan->uses == MATMUL_PATIENCE && plan->candidates == 0) {
        matmul_choose(mm, plan, p, true, stream);
    }
    return plan;
}

static inline void matmul(MatmulPlans* mm, MatmulProduct* p, cudaStream_t stream) {
    uintptr_t bits =
        (uintptr_t)p->out | (uintptr_t)p->left | (uintptr_t)p->right | (uintptr_t)p->bias | (uintptr_t)p->gelu | 16;
    p->shape.alignment = (int)(bits & (~bits + 1));
    MatmulPlan* plan = matmul_plan(mm, p, stream);
    cublas_check(matmul_run(mm, plan, &plan->algo, p, p->out, stream));
}

// ---------------------------------------------------------------------------------------------------------------------
// The model's products

static inline MatmulProduct matmul_product(int rows, int cols, int inner, void* out, const floatX* left,
                                           const floatX* right, float alpha) {
    MatmulProduct p;
    memset(&p, 0, sizeof p);
    p.shape.rows = rows;
    p.shape.cols = cols;
    p.shape.inner = inner;
    p.shape.batch = 1;
    p.shape.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    p.out = out;
    p.left = left;
    p.right = right;
    p.alpha = alpha;
    return p;
}

// out = alpha * inp @ weight^T + bias, or that through GELU with its input kept in pre_gelu
// out (N, OC), pre_gelu (N, OC) or NULL, inp (N, C), weight (OC, C), bias (OC) or NULL
static inline void matmul_forward(MatmulPlans* mm, floatX* out, floatX* pre_gelu, const floatX* inp,
                                  const floatX* weight, const floatX* bias, float alpha, int N, int C, int OC,
                                  cudaStream_t stream) {
    MatmulProduct p = matmul_product(N, OC, C, out, inp, weight, alpha);
    p.shape.right_transposed = 1;
    p.bias = bias;
    p.gelu = pre_gelu;
    if (pre_gelu != NULL) {
        p.shape.epilogue = bias != NULL ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    } else if (bias != NULL) {
        p.shape.epilogue = CUBLASLT_EPILOGUE_BIAS;
    }
    matmul(mm, &p, stream);
}

// dinp = alpha * dout @ weight, times gelu'(pre_gelu) where pre_gelu is not NULL
// dinp (N, C), pre_gelu (N, C) or NULL, dout (N, OC), weight (OC, C)
static inline void matmul_backward_input(MatmulPlans* mm, floatX* dinp, const floatX* pre_gelu, const floatX* dout,
                                         const floatX* weight, float alpha, int N, int C, int OC, cudaStream_t stream) {
    MatmulProduct p = matmul_product(N, C, OC, dinp, dout, weight, alpha);
    p.gelu = pre_gelu;
    if (pre_gelu != NULL) { p.shape.epilogue = CUBLASLT_EPILOGUE_DGELU; }
    matmul(mm, &p, stream);
}

// dweight = or += alpha * dout^T @ inp
// dweight (OC, C), dout (N, OC), inp (N, C)
static inline void matmul_backward_weight(MatmulPlans* mm, float* dweight, const floatX* dout, const floatX* inp,
                                          float alpha, bool accumulate, int N, int C, int OC, cudaStream_t stream) {
    MatmulProduct p = matmul_product(OC, C, N, dweight, dout, inp, alpha);
    p.shape.left_transposed = 1;
    p.shape.fp32_out = 1;
    p.shape.add = accumulate;
    matmul(mm, &p, stream);
}

// One product for each of so many examples: left_b (T, rows)^T @ right_b (T, cols), over T.
static inline MatmulProduct matmul_examples_product(int examples, int rows, int cols, int T, void* out,
                                                    const floatX* left, const floatX* right) {
    MatmulProduct p = matmul_product(rows, cols, T, out, left, right, 1);
    p.shape.batch = examples;
    p.shape.left_transposed = 1;
    return p;
}

// out_b = left_b^T @ right_b for every example. out (B, rows, cols), left (B, T, rows), right (B, T, cols)
static inline void matmul_examples_transposed(MatmulPlans* mm, floatX* out, const floatX* left, const floatX* right,
                                              int B, int T, int rows, int cols, cudaStream_t stream) {
    MatmulProduct p = matmul_examples_product(B, rows, cols, T, out, left, right);
    matmul(mm, &p, stream);
}

// dweight = or += alpha * dout^T @ inp, and *sum_sq += sum_b |dweight_b|^2 (arXiv 2411.00999), `group` examples at a
// time: one batched product writes their gradients, one pass squares them and adds them to dweight in the order of the
// examples (so dweight's last bits are not those of matmul_backward_weight). Moves 8 bytes for each number of each
// dweight_b, written and read, and 8 for each number of dweight and each group.
// dweight (OC, C), sum_sq (1), scratch (group, OC, C), dout (B, T, OC), inp (B, T, C)
static inline void matmul_backward_weight_examples(MatmulPlans* mm, float* dweight, double* sum_sq, float* scratch,
                                                   int group, const floatX* dout, const floatX* inp, float alpha,
                                                   bool accumulate, int B, int T, int C, int OC, cudaStream_t stream) {
    const size_t n = (size_t)OC * (size_t)C;
    const int blocks = (int)std::min(div_up(n, (size_t)MATMUL_BLOCK * 4), (size_t)MATMUL_MAX_BLOCKS);
    for (int b = 0; b < B; b += group) {
        const int examples = min_int(group, B - b);
        const size_t row = (size_t)b * (size_t)T;
        MatmulProduct p =
            matmul_examples_product(examples, OC, C, T, scratch, dout + row * (size_t)OC, inp + row * (size_t)C);
        p.shape.fp32_out = 1;
        matmul(mm, &p, stream);
        matmul_fold_kernel<<<blocks, MATMUL_BLOCK, 0, stream>>>(dweight, mm->partial, scratch, alpha,
                                                                accumulate || b > 0, examples, n);
        cuda_check_launch();
        partial_sum(sum_sq, mm->partial, (double)alpha * (double)alpha, blocks, stream);
    }
}

#endif
