/*
The classifier: softmax, cross-entropy and its gradient over rows of logits.

    loss    = log(sum_v exp(x_v)) - x_target                      (one a row)
    dlogits = scale * (softmax(x) - onehot(target))               in place of the logits

The maximum and the sum come from one walk over the row (Milakov & Gimelshein 2018, arXiv 1805.02867); exponentials are
taken to base 2. Columns V..Vp pad the vocabulary: they are not read into anything, and their gradient is written as zero. A
row whose target is -1 has loss 0 and gradient 0, whatever its logits are.

Bytes: classifier_forward reads the logits once. classifier_forward_backward reads and writes them once, 2 N Vp
sizeof(floatX), which is its floor (50304 columns in bf16: 201 KB a row, 48 ns at 4.2 TB/s). For that a block keeps its row
in shared memory (101 KB in bf16: two blocks on a Hopper SM) and, as it writes the gradient of one row, fetches the next
row into the places that become free: a thread walks over the same columns in every pass, so what it fetched it alone
uses, and no barrier stands between reading and writing. Where a row does not fit (GPT-2's in fp32 on an A100), the
second pass reads it again, mostly from the L2.

Contract: logits are floatX, everything between is float, the losses too. Each sum has an order that V alone decides: the
same inputs give the same bits. A NaN, or an infinity that leaves nothing to compare, makes the row's loss NaN.
*/
#ifndef LLMC_CLASSIFIER_CUH
#define LLMC_CLASSIFIER_CUH

#include "cuda_common.cuh"
#include <float.h>

enum { CLASSIFIER_THREADS = 512, CLASSIFIER_QUARTERS = 4, CLASSIFIER_FORWARD_THREADS = 256 };
enum { CLASSIFIER_GATHER_THREADS = 256, CLASSIFIER_GATHER_ROWS = 8 };

#define CLASSIFIER_LN2 0.693147180559945309f

// Joins the columns at, at + 1, ... of a row, those below limit, to sum = sum of 2^(x log2(e) - top).
__device__ __forceinline__ void classifier_add(const Vec16<floatX>& x, int at, int limit, float& top, float& sum) {
    const int W = Vec16<floatX>::size;
    float f[W], largest;
    for (int j = 0; j < W; j++) { f[j] = (float)x[j]; }
    if (at + W > limit) {
        for (int j = 0; j < W; j++) { f[j] = at + j < limit ? f[j] : -INFINITY; }
    }
    largest = f[0];
    for (int j = 1; j < W; j++) { largest = fmaxf(largest, f[j]); }
    largest *= LOG2E;
    if (largest > top) {
        sum *= exp2_approx(top - largest);
        top = largest;
    }
    for (int j = 0; j < W; j++) { sum += exp2_approx(fmaf(f[j], LOG2E, -top)); }
}

// From each thread's top and sum to the row's, in every thread. scratch: (2, 32) in shared memory. Between two calls with
// the same scratch no further barrier is needed: each half is read before the barrier inside the sum over the other.
__device__ __forceinline__ void classifier_join(float& top, float& sum, float (*scratch)[WARP]) {
    const float row_top = block_max(top, scratch[0]);
    sum = block_sum(sum * exp2_approx(top - row_top), scratch[1]);
    top = row_top;
}

// -log softmax at the target's logit, from the row's top and sum.
__device__ __forceinline__ float classifier_loss(float at_target, float top, float sum) {
    return CLASSIFIER_LN2 * (log2f(sum) - fmaf(at_target, LOG2E, -top));
}

// The gradient of the columns at, at + 1, ...: factor is scale / sum.
__device__ __forceinline__ Vec16<floatX> classifier_gradient(const Vec16<floatX>& x, int at, int limit, int target,
                                                             float top, float factor, float scale) {
    const int W = Vec16<floatX>::size;
    Vec16<floatX> out;
    float g[W];
    for (int j = 0; j < W; j++) { g[j] = factor * exp2_approx(fmaf((float)x[j], LOG2E, -top)); }
    if (target >= at && target < at + W) {
        for (int j = 0; j < W; j++) { g[j] -= at + j == target ? scale : 0.0f; }
    }
    if (at + W > limit) {
        for (int j = 0; j < W; j++) { g[j] = at + j < limit ? g[j] : 0.0f; }
    }
    for (int j = 0; j < W; j++) { out[j] = (floatX)g[j]; }
    return out;
}

// Blocks walk over rows in strides of the grid. CACHED: the row lies in dynamic shared memory, Vp numbers. The row is
// fetched in four groups of copies, so that the walk begins before its end has arrived.
// logits (N, Vp), losses, targets (N)
template <bool CACHED>
__global__ void __launch_bounds__(CLASSIFIER_THREADS, 2)
    classifier_forward_backward_kernel(floatX* logits, float* losses, const int* targets, float scale, int N, int V,
                                       int Vp) {
    extern __shared__ int4 classifier_cache[];
    __shared__ float scratch[2][WARP];
    const int W = Vec16<floatX>::size, vectors = Vp / W, thread = threadIdx.x;
    const int quarter = div_up(vectors, CLASSIFIER_THREADS * CLASSIFIER_QUARTERS) * CLASSIFIER_THREADS;
    floatX* cache = reinterpret_cast<floatX*>(classifier_cache);
    if (CACHED) {
        for (int q = 0; q < CLASSIFIER_QUARTERS; q++) {
            for (int i = q * quarter + thread; i < min(vectors, (q + 1) * quarter); i += CLASSIFIER_THREADS) {
                copy16_ahead(cache + i * W, logits + (size_t)blockIdx.x * Vp + i * W);
            }
            copies_issued();
        }
    }
    int target = targets[blockIdx.x];
    for (int row = blockIdx.x; row < N; row += gridDim.x) {
        floatX* x = logits + (size_t)row * Vp;
        const floatX* from = CACHED ? cache : x;
        const int limit = target < 0 ? 0 : V; // a row without a target counts as empty
        float top = -FLT_MAX, sum = 0;
#pragma unroll
        for (int q = 0; q < CLASSIFIER_QUARTERS; q++) {
            if (CACHED) { copies_wait(CLASSIFIER_QUARTERS - 1 - q); }
            for (int i = q * quarter + thread; i < min(vectors, (q + 1) * quarter); i += CLASSIFIER_THREADS) {
                classifier_add(load16(from + i * W), i * W, limit, top, sum);
            }
        }
        // Before the barriers: after them the target's column belongs to its thread's second pass.
        const bool owner = thread == max(target, 0) / W % CLASSIFIER_THREADS;
        const float at_target = owner ? (float)from[max(target, 0)] : 0.0f;
        classifier_join(top, sum, scratch);
        if (owner) { losses[row] = target < 0 ? 0.0f : classifier_loss(at_target, top, sum); }
        const bool more = row + (int)gridDim.x < N;
        const int next_target = more ? targets[row + gridDim.x] : -1;
        const floatX* next = x + (size_t)gridDim.x * Vp;
        const float factor = scale / sum;
#pragma unroll
        for (int q = 0; q < CLASSIFIER_QUARTERS; q++) {
            for (int i = q * quarter + thread; i < min(vectors, (q + 1) * quarter); i += CLASSIFIER_THREADS) {
                store16(x + i * W, classifier_gradient(load16(from + i * W), i * W, limit, target, top, factor, scale));
                if (CACHED && more) { copy16_ahead(cache + i * W, next + i * W); }
            }
            if (CACHED) { copies_issued(); }
        }
        target = next_target;
    }
}

// A block a row; only the losses are written. Four vectors of each thread are on their way at a time.
// losses, targets (N), logits (N, Vp)
__global__ void __launch_bounds__(CLASSIFIER_FORWARD_THREADS)
    classifier_forward_kernel(float* losses, const floatX* logits, const int* targets, int V, int Vp) {
    __shared__ float scratch[2][WARP];
    const int W = Vec16<floatX>::size, used = div_up(V, W), thread = threadIdx.x;
    const floatX* x = logits + (size_t)blockIdx.x * Vp;
    const int target = targets[blockIdx.x];
    if (target < 0) {
        if (thread == 0) { losses[blockIdx.x] = 0; }
        return;
    }
    const float at_target = thread == 0 ? (float)x[target] : 0.0f;
    float top = -FLT_MAX, sum = 0;
    for (int i = thread; i < used; i += 4 * CLASSIFIER_FORWARD_THREADS) {
        Vec16<floatX> v[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int at = i + u * CLASSIFIER_FORWARD_THREADS;
            if (at < used) { v[u] = load16_once(x + at * W); }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int at = i + u * CLASSIFIER_FORWARD_THREADS;
            if (at < used) { classifier_add(v[u], at * W, V, top, sum); }
        }
    }
    classifier_join(top, sum, scratch);
    if (thread == 0) { losses[blockIdx.x] = classifier_loss(at_target, top, sum); }
}

// gathered (B, T, T), dlogits (B, T, Vp), tokens (B, T)
__global__ void __launch_bounds__(CLASSIFIER_GATHER_THREADS)
    classifier_gather_kernel(floatX* gathered, const floatX* dlogits, const int* tokens, int T, int Vp) {
    const int s = blockIdx.y * CLASSIFIER_GATHER_THREADS + threadIdx.x, t0 = blockIdx.x * CLASSIFIER_GATHER_ROWS;
    if (s >= T) { return; }
    const size_t example = (size_t)blockIdx.z * T;
    const floatX* from = dlogits + (example + t0) * Vp + tokens[example + s];
    floatX* to = gathered + (example + t0) * T + s;
    floatX x[CLASSIFIER_GATHER_ROWS];
#pragma unroll
    for (int r = 0; r < CLASSIFIER_GATHER_ROWS; r++) {
        if (t0 + r < T) { x[r] = from[(size_t)r * Vp]; }
    }
#pragma unroll
    for (int r = 0; r < CLASSIFIER_GATHER_ROWS; r++) {
        if (t0 + r < T) { to[(size_t)r * T] = x[r]; }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// The loss of every row, for evaluation: the logits stay as they are. Vp must be a multiple of 8.
// losses, targets (N), logits (N, Vp)
static inline void classifier_forward(float* losses, const floatX* logits, const int* targets, int N, int V, int Vp,
                                      cudaStream_t stream) {
    classifier_forward_kernel<<<N, CLASSIFIER_FORWARD_THREADS, 0, stream>>>(losses, logits, targets, V, Vp);
    cuda_check_launch();
}

template <bool CACHED>
static inline void classifier_launch(floatX* logits, float* losses, const int* targets, float scale, int N, int V,
                                     int Vp, cudaStream_t stream) {
    const auto kernel = classifier_forward_backward_kernel<CACHED>;
    const int bytes = CACHED ? Vp * (int)sizeof(floatX) : 0;
    int device, processors, blocks;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, CLASSIFIER_THREADS, (size_t)bytes));
    const int resident = blocks * processors, grid = resident < N ? resident : N;
    kernel<<<grid, CLASSIFIER_THREADS, bytes, stream>>>(logits, losses, targets, scale, N, V, Vp);
    cuda_check_launch();
}

// The loss of every row, and in place of the logits their gradient times scale. Vp must be a multiple of 8.
// logits (N, Vp), losses, targets (N)
static inline void classifier_forward_backward(floatX* logits, float* losses, const int* targets, float scale, int N,
                                               int V, int Vp, cudaStream_t stream) {
    const size_t scratch = 2 * WARP * sizeof(float);
    int device, shared;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if ((size_t)Vp * sizeof(floatX) + scratch <= (size_t)shared) {
        classifier_launch<true>(logits, losses, targets, scale, N, V, Vp, stream);
    } else {
        classifier_launch<false>(logits, losses, targets, scale, N, V, Vp, stream);
    }
}

// gathered[b][t][s] = dlogits[b][t][token s of example b]: what the tied embedding's per-example norm needs of the
// gradient before its buffer is used again. With x (B, T, C), the head's input, head_rows_b = gathered_b^T @ x_b (T, C)
// is then the head's gradient of wte in the rows of the example's own tokens, one row a position (embedding_backward
// takes it so): equal tokens have equal rows, and the host need not know how many different tokens there are. Reads at most
// a sector of 32 bytes for each number, T of them a row against the row's Vp numbers; writes B T T numbers.
// gathered (B, T, T), dlogits (B, T, Vp), tokens (B, T)
static inline void classifier_gather(floatX* gathered, const floatX* dlogits, const int* tokens, int B, int T, int Vp,
                                     cudaStream_t stream) {
    const dim3 grid(div_up<int>(T, CLASSIFIER_GATHER_ROWS), div_up<int>(T, CLASSIFIER_GATHER_THREADS), B);
    classifier_gather_kernel<<<grid, CLASSIFIER_GATHER_THREADS, 0, stream>>>(gathered, dlogits, tokens, T, Vp);
    cuda_check_launch();
}

#endif
