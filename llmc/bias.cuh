/*
The gradient of a bias: column sums of dout (B, T, OC), and where wanted the norms of each example's own sum,

    dbias += alpha sum_{b,t} dout[b,t]        sum_sq += alpha^2 sum_b |sum_t dout[b,t]|^2

Two launches, three with norms. First, every block sums a strip of columns over at most BIAS_ROWS rows of one example into a
partial sum; then one block for every 32 columns folds the partial sums into examples and the examples into dbias; with norms, one
block adds up what those blocks found.

Reads 2 bytes a number (bf16), and writes and reads 4 bytes for each column of BIAS_ROWS rows, which stay in the L2: floor at
65,536 x 3072 0.4 GB. Sums in fp32, squares in double, in an order that the shapes alone decide; with norms or
without, the bits of dbias are the same.
*/
#ifndef LLMC_BIAS_CUH
#define LLMC_BIAS_CUH

#include "cuda_common.cuh"

enum { BIAS_ROWS = 128, BIAS_WARPS = 8, BIAS_STRIP = WARP * Vec16<floatX>::size };
enum { BIAS_LOADS = 8 }; // vectors that a thread loads before it adds them up
// A fold block's warps, and the examples that each takes at a time.
enum { BIAS_FOLD_WARPS = 32, BIAS_FOLD_EXAMPLES = 4 };

// partial[b, chunk, column] = sum of dout over the chunk's rows; block: one strip of columns of one chunk
// partial (B, chunks, OC), dout (B, T, OC)
__global__ void __launch_bounds__(WARP* BIAS_WARPS, 4)
    bias_partial_kernel(float* __restrict__ partial, const floatX* __restrict__ dout, int T, int OC, int chunks,
                        int strips) {
    constexpr int W = Vec16<floatX>::size;
    __shared__ alignas(16) float sums[BIAS_WARPS][BIAS_STRIP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int strip = blockIdx.x % strips, part = blockIdx.x / strips; // part: b * chunks + chunk
    const int b = part / chunks, t0 = (part - b * chunks) * BIAS_ROWS, rows = min(T - t0, (int)BIAS_ROWS);
    const int column = strip * BIAS_STRIP + lane * W;
    const floatX* from = dout + ((size_t)b * (size_t)T + (size_t)t0) * (size_t)OC + (size_t)column;
    float sum[W] = {0};
#pragma unroll 1
    for (int r = column < OC ? warp : rows; r < rows; r += BIAS_WARPS * BIAS_LOADS) {
        Vec16<floatX> x[BIAS_LOADS];
#pragma unroll
        for (int j = 0; j < BIAS_LOADS; j++) {
            x[j] = {};
            if (r + j * BIAS_WARPS < rows) { x[j] = load16(from + (r + j * BIAS_WARPS) * OC); }
        }
#pragma unroll
        for (int j = 0; j < BIAS_LOADS; j++) {
#pragma unroll
            for (int k = 0; k < W; k++) { sum[k] += (float)x[j][k]; }
        }
    }
#pragma unroll
    for (int k = 0; k < W; k += 4) {
        *reinterpret_cast<float4*>(&sums[warp][lane * W + k]) = make_float4(sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
    }
    __syncthreads();
    const int own = strip * BIAS_STRIP + (int)threadIdx.x;
    if (threadIdx.x < BIAS_STRIP && own < OC) {
        float total = 0;
        for (int w = 0; w < BIAS_WARPS; w++) { total += sums[w][threadIdx.x]; }
        partial[(size_t)part * (size_t)OC + (size_t)own] = total;
    }
}

// One block for 32 columns. `per` neighbouring warps share an example's chunks; 32 / per examples are in work at a time, times
// BIAS_FOLD_EXAMPLES. squares, if NORMS: the block's part of sum_b |sum_t dout|^2
// dbias (OC), squares (blocks), partial (B, chunks, OC)
template <bool NORMS>
__global__ void __launch_bounds__(WARP* BIAS_FOLD_WARPS, 1)
    bias_fold_kernel(float* dbias, double* squares, const float* __restrict__ partial, float alpha, int B, int chunks,
                     int OC, int per) {
    constexpr int E = BIAS_FOLD_EXAMPLES;
    __shared__ float sums[E][BIAS_FOLD_WARPS][WARP];
    __shared__ double scratch[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    const int group = warp / per, share = warp % per, groups = BIAS_FOLD_WARPS / per;
    float total = 0;
    double square = 0;
    for (int b0 = 0; b0 < B; b0 += E * groups) {
        float sum[E] = {0};
#pragma unroll 4
        for (int k = share; k < chunks; k += per) {
#pragma unroll
            for (int e = 0; e < E; e++) {
                const int b = b0 + e * groups + group;
                if (b < B && column < OC) {
                    sum[e] += partial[((size_t)b * (size_t)chunks + (size_t)k) * (size_t)OC + (size_t)column];
                }
            }
        }
#pragma unroll
        for (int e = 0; e < E; e++) { sums[e][warp][lane] = sum[e]; }
        __syncthreads();
        if (share == 0) {
            for (int e = 0; e < E; e++) { // examples past the last one are 0
                float example = 0;
                for (int i = 0; i < per; i++) { example += sums[e][warp + i][lane]; }
                total += example;
                if (NORMS) { square += (double)example * (double)example; }
            }
        }
        __syncthreads();
    }
    sums[0][warp][lane] = total;
    __syncthreads();
    if (warp == 0 && column < OC) {
        float all = 0;
        for (int w = 0; w < BIAS_FOLD_WARPS; w += per) { all += sums[0][w][lane]; }
        dbias[column] += alpha * all;
    }
    if (NORMS) {
        const double found = block_sum(square, scratch);
        if (threadIdx.x == 0) { squares[blockIdx.x] = found; }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Bytes of scratch memory that bias_backward needs.
static inline size_t bias_backward_scratch(int B, int T, int OC) {
    const size_t partial = (size_t)B * (size_t)div_up(T, (int)BIAS_ROWS) * (size_t)OC;
    return (size_t)div_up(OC, (int)WARP) * sizeof(double) + partial * sizeof(float);
}

// dbias += alpha * sum_{b,t} dout
// dbias (OC), dout (B, T, OC) with OC % 8 == 0, scratch (bias_backward_scratch bytes, aligned to 8)
// sum_sq (1): NULL, or gains sum_b |dbias_b|^2
static inline void bias_backward(float* dbias, double* sum_sq, void* scratch, const floatX* dout, float alpha, int B,
                                 int T, int OC, cudaStream_t stream) {
    const int chunks = div_up(T, (int)BIAS_ROWS), strips = div_up(OC, (int)BIAS_STRIP), folds = div_up(OC, (int)WARP);
    double* squares = (double*)scratch;
    float* partial = (float*)(squares + folds);
    bias_partial_kernel<<<(unsigned)strips*(unsigned)B*(unsigned)chunks, WARP * BIAS_WARPS, 0, stream>>>(
        partial, dout, T, OC, chunks, strips);
    cuda_check_launch();
    int per = 1; // warps for each example in the fold: about eight chunks each
    while (per < BIAS_FOLD_WARPS && per * 8 < chunks) { per *= 2; }
    const auto fold = sum_sq != NULL ? bias_fold_kernel<true> : bias_fold_kernel<false>;
    fold<<<folds, WARP * BIAS_FOLD_WARPS, 0, stream>>>(dbias, squares, partial, alpha, B, chunks, OC, per);
    cuda_check_launch();
    if (sum_sq != NULL) { partial_sum(sum_sq, squares, (double)alpha * (double)alpha, folds, stream); }
}

#endif
