/*
Token and position embedding, and its gradient without float atomics.

    forward     out[b,t] = mult * (wte[token] + wpe[t])
    backward    dwte[token] += mult * sum over the token's positions of dout,   dwpe[t] += mult * sum_b dout[b,t]

Backward sorts the micro-batch's positions by token (CUB's radix sort, on the device: the host waits for nothing), in
which equal tokens keep the order of their positions. The sorted positions are cut into chunks of 32, whatever the tokens
are, so a frequent token costs no more than a rare one. A warp sums a chunk's positions, for 16 bytes of columns a lane; a
run of one token that lies inside the chunk goes straight into dwte, the two parts of runs that cross the chunk's
ends go to scratch, and a second kernel adds up the parts of each such run from its first chunk on.

Per-example norms (arXiv 2411.00999): sum_sq_wpe gains sum_bt |mult dout[b,t]|^2. sum_sq_wte gains
sum_b |e_b|^2 + 2 <e_b, u_b>, e_b being example b's gradient of wte through the embedding (positions of equal tokens are
summed before squaring) and u_b through the tied head, whose rows for the example's own tokens stand in head_rows, one a
position (see classifier_gather). What is missing to |e_b + u_b|^2 is |u_b|^2, the head's own norm.

Bytes: forward reads N C numbers of wte at most, T C of wpe, and writes N C. Backward reads dout twice (for wte and wpe),
reads and writes the rows of dwte that occur, and T rows of dwpe, in fp32; the sort moves 8 bytes a position, a few times.
Norms read dout once more, and head_rows.

Contract: sums in float, norms in double from the block on; every order follows from shapes and tokens: the same inputs
give the same bits. C must be a multiple of 8, tokens below 65,536; any B, T >= 1.
*/
#ifndef LLMC_EMBEDDING_CUH
#define LLMC_EMBEDDING_CUH

#include "cuda_common.cuh"
#include <cub/device/device_radix_sort.cuh>

enum { EMBEDDING_CHUNK = WARP };                       // sorted positions of one warp: one a lane
enum { EMBEDDING_LANES = WARP * Vec16<floatX>::size }; // columns of one warp
enum { EMBEDDING_ROWS = 8, EMBEDDING_THREADS = WARP * EMBEDDING_ROWS };
enum { EMBEDDING_RUN_WARPS = 4, EMBEDDING_NORM_BLOCKS = 1024 }; // the norm's blocks: a constant, for their partial sums

// A position of the micro-batch with its token in the upper half; sorted by token, then by position.
__device__ __forceinline__ int embedding_token(uint64_t key) { return (int)(key >> 32); }
__device__ __forceinline__ int embedding_position(uint64_t key) { return (int)(uint32_t)key; }

// sum += from; one lane's columns, as in all of these
__device__ __forceinline__ void embedding_add(float* sum, const float* from) {
    for (int j = 0; j < Vec16<floatX>::size; j += 4) {
        const Vec16<float> x = load16(from + j);
        for (int k = 0; k < 4; k++) { sum[j + k] += x[k]; }
    }
}
// to += scale * sum
__device__ __forceinline__ void embedding_accumulate(float* to, const float* sum, float scale) {
    for (int j = 0; j < Vec16<floatX>::size; j += 4) {
        Vec16<float> x = load16(to + j);
        for (int k = 0; k < 4; k++) { x[k] += scale * sum[j + k]; }
        store16(to + j, x);
    }
}
// to = sum
__device__ __forceinline__ void embedding_store(float* to, const float* sum) {
    for (int j = 0; j < Vec16<floatX>::size; j += 4) {
        Vec16<float> x;
        for (int k = 0; k < 4; k++) { x[k] = sum[j + k]; }
        store16(to + j, x);
    }
}

// A warp a row. out (B, T, C), tokens (B, T), wte (Vp, C), wpe (maxT, C)
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, float mult, int N,
                             int T, int C) {
    const int W = Vec16<floatX>::size, lane = threadIdx.x % WARP;
    const int row = blockIdx.x * EMBEDDING_ROWS + threadIdx.x / WARP;
    if (row >= N) { return; }
    const floatX *e = wte + (size_t)tokens[row] * C, *p = wpe + (size_t)(row % T) * C;
    floatX* o = out + (size_t)row * C;
#pragma unroll 3
    for (int c = lane * W; c < C; c += EMBEDDING_LANES) {
        const Vec16<floatX> a = load16(e + c), b = load16(p + c);
        Vec16<floatX> y;
        for (int j = 0; j < W; j++) { y[j] = (floatX)(mult * ((float)a[j] + (float)b[j])); }
        store16(o + c, y);
    }
}

// keys, tokens (N)
__global__ void __launch_bounds__(EMBEDDING_THREADS) embedding_keys_kernel(uint64_t* keys, const int* tokens, int N) {
    const int i = blockIdx.x * EMBEDDING_THREADS + threadIdx.x;
    if (i < N) { keys[i] = (uint64_t)tokens[i] << 32 | (uint32_t)i; }
}

// A warp takes one chunk of sorted positions and EMBEDDING_LANES columns: runs that lie inside the chunk go to dwte, the
// part of a run that began in an earlier chunk to before, that of a run that begins here and goes on to after.
// dwte (Vp, C), before, after (chunks, C), dout (N, C), sorted (N)
__global__ void __launch_bounds__(WARP* EMBEDDING_RUN_WARPS, 6)
    embedding_runs_kernel(float* dwte, float* before, float* after, const floatX* dout, const uint64_t* sorted,
                          float mult, int N, int C) {
    const int W = Vec16<floatX>::size, lane = threadIdx.x % WARP, tiles = div_up<int>(C, EMBEDDING_LANES);
    const int task = blockIdx.x * EMBEDDING_RUN_WARPS + threadIdx.x / WARP, chunk = task / tiles;
    const int begin = chunk * EMBEDDING_CHUNK, count = min(EMBEDDING_CHUNK, N - begin);
    if (count <= 0) { return; } // for the whole warp
    const int c = task % tiles * EMBEDDING_LANES + lane * W;
    const bool inside = c < C;
    const uint64_t key = sorted[begin + min(lane, count - 1)];
    const int token = embedding_token(key), position = embedding_position(key);
    int previous = __shfl_up_sync(0xffffffff, token, 1);
    if (lane == 0) { previous = begin > 0 ? embedding_token(sorted[begin - 1]) : -1; }
    const unsigned starts = __ballot_sync(0xffffffff, token != previous && lane < count); // lanes where a run begins
    const int last_token = __shfl_sync(0xffffffff, token, WARP - 1);
    const bool goes_on = begin + count < N && embedding_token(sorted[begin + count]) == last_token;
    float sum[W] = {};
    for (int i0 = 0; i0 < count; i0 += 4) {
        Vec16<floatX> d[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int row = __shfl_sync(0xffffffff, position, i0 + u);
            if (inside && i0 + u < count) { d[u] = load16(dout + (size_t)row * C + c); }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int i = i0 + u, run_token = __shfl_sync(0xffffffff, token, i);
            if (!inside || i >= count) { continue; }
            for (int j = 0; j < W; j++) { sum[j] += (float)d[u][j]; }
            if (i + 1 < count && !(starts >> (i + 1) & 1)) { continue; } // the run is not at its end
            const bool begins_here = (starts & (0xffffffffu >> (WARP - 1 - i))) != 0;
            if (!begins_here) {
                embedding_store(before + (size_t)chunk * C + c, sum);
            } else if (i + 1 == count && goes_on) {
                embedding_store(after + (size_t)chunk * C + c, sum);
            } else {
                embedding_accumulate(dwte + (size_t)run_token * C + c, sum, mult);
            }
            for (int j = 0; j < W; j++) { sum[j] = 0; }
        }
    }
}

// The same chunks and columns: where a run begins in the chunk and goes on past its end, the warp adds up its parts.
// dwte (Vp, C), before, after (chunks, C), sorted (N)
__global__ void __launch_bounds__(WARP* EMBEDDING_RUN_WARPS)
    embedding_crossing_runs_kernel(float* dwte, const float* before, const float* after, const uint64_t* sorted,
                                   float mult, int N, int C) {
    const int W = Vec16<floatX>::size, lane = threadIdx.x % WARP, tiles = div_up<int>(C, EMBEDDING_LANES);
    const int task = blockIdx.x * EMBEDDING_RUN_WARPS + threadIdx.x / WARP, chunk = task / tiles;
    const int begin = chunk * EMBEDDING_CHUNK, end = begin + EMBEDDING_CHUNK, chunks = div_up<int>(N, EMBEDDING_CHUNK);
    if (end >= N) { return; }
    const int token = embedding_token(sorted[end - 1]);
    if (embedding_token(sorted[end]) != token) { return; }
    if (begin > 0 && embedding_token(sorted[begin - 1]) == token) { return; } // it began in an earlier chunk
    const int c = task % tiles * EMBEDDING_LANES + lane * W;
    const bool inside = c < C;
    float sum[W] = {};
    if (inside) { embedding_add(sum, after + (size_t)chunk * C + c); }
    for (int k0 = chunk + 1;; k0 += WARP) {
        const int k = k0 + lane;
        const bool same = k < chunks && embedding_token(sorted[(size_t)k * EMBEDDING_CHUNK]) == token;
        const int parts = __popc(__ballot_sync(0xffffffff, same)); // sorted: the lanes that say yes come first
#pragma unroll 4
        for (int i = 0; i < parts; i++) {
            if (inside) { embedding_add(sum, before + (size_t)(k0 + i) * C + c); }
        }
        if (parts < WARP) { break; }
    }
    if (inside) { embedding_accumulate(dwte + (size_t)token * C + c, sum, mult); }
}

// A block takes one t and EMBEDDING_LANES columns, warp w the examples w, w + 8, ...
// dwpe (maxT, C); partial (T * tiles) or NULL: the block's sum of squares; dout (B, T, C)
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_positions_kernel(float* dwpe, double* partial, const floatX* dout, float mult, int B, int T, int C) {
    const int W = Vec16<floatX>::size, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    alignas(16) __shared__ float sums[EMBEDDING_ROWS][EMBEDDING_LANES];
    __shared__ float scratch[WARP];
    const int tiles = div_up<int>(C, EMBEDDING_LANES), t = blockIdx.x / tiles;
    const int c0 = blockIdx.x % tiles * EMBEDDING_LANES, c = c0 + lane * W;
    float sum[W] = {}, square = 0;
#pragma unroll 4
    for (int b = warp; b < B; b += EMBEDDING_ROWS) {
        if (c >= C) { continue; }
        const Vec16<floatX> d = load16(dout + ((size_t)b * T + t) * C + c);
        for (int j = 0; j < W; j++) {
            const float x = (float)d[j];
            sum[j] += x;
            square += x * x;
        }
    }
    embedding_store(&sums[warp][lane * W], sum);
    __syncthreads();
    for (int e = threadIdx.x; e < EMBEDDING_LANES && c0 + e < C; e += EMBEDDING_THREADS) {
        float total = 0;
        for (int w = 0; w < EMBEDDING_ROWS; w++) { total += sums[w][e]; }
        dwpe[(size_t)t * C + c0 + e] += mult * total;
    }
    if (partial != NULL) {
        square = block_sum(square, scratch);
        if (threadIdx.x == 0) { partial[blockIdx.x] = (double)mult * mult * square; }
    }
}

// A warp takes a group, the sorted positions of one token in one example, and EMBEDDING_LANES columns.
// partial (EMBEDDING_NORM_BLOCKS), dout, head_rows (B, T, C), sorted (N)
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_norm_kernel(double* partial, const floatX* dout, const floatX* head_rows, const uint64_t* sorted,
                          float mult, int N, int T, int C) {
    const int W = Vec16<floatX>::size, lane = threadIdx.x % WARP, tiles = div_up<int>(C, EMBEDDING_LANES);
    __shared__ double scratch[WARP];
    double total = 0;
    const int first_task = blockIdx.x * EMBEDDING_ROWS + threadIdx.x / WARP;
    for (int task = first_task; task < N * tiles; task += EMBEDDING_NORM_BLOCKS * EMBEDDING_ROWS) {
        const int begin = task / tiles, c = task % tiles * EMBEDDING_LANES + lane * W;
        const uint64_t key = sorted[begin], previous = begin > 0 ? sorted[begin - 1] : 0;
        const int token = embedding_token(key), position = embedding_position(key), example = position / T;
        if (begin > 0 && embedding_token(previous) == token && embedding_position(previous) / T == example) {
            continue; // not the group's first position; for the whole warp
        }
        float e[W] = {};
        for (int i0 = begin;; i0 += WARP) {
            const uint64_t other = i0 + lane < N ? sorted[i0 + lane] : ~(uint64_t)0;
            const bool same =
                i0 + lane < N && embedding_token(other) == token && embedding_position(other) / T == example;
            const int count = __popc(__ballot_sync(0xffffffff, same)); // sorted: the lanes that say yes come first
#pragma unroll 4
            for (int i = 0; i < count; i++) {
                const int row = __shfl_sync(0xffffffff, embedding_position(other), i);
                if (c >= C) { continue; }
                const Vec16<floatX> d = load16(dout + (size_t)row * C + c);
                for (int j = 0; j < W; j++) { e[j] += (float)d[j]; }
            }
            if (count < WARP) { break; }
        }
        if (c >= C) { continue; }
        const Vec16<floatX> u = load16(head_rows + (size_t)position * C + c);
        float s = 0;
        for (int j = 0; j < W; j++) { s += mult * e[j] * (mult * e[j] + 2 * (float)u[j]); }
        total += (double)s;
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) { partial[blockIdx.x] = total; }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// out (B, T, C), tokens (B, T), wte (Vp, C), wpe (maxT, C)
static inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, float mult,
                                     int B, int T, int C, cudaStream_t stream) {
    embedding_forward_kernel<<<div_up<int>(B * T, EMBEDDING_ROWS), EMBEDDING_THREADS, 0, stream>>>(
        out, tokens, wte, wpe, mult, B * T, T, C);
    cuda_check_launch();
}

// What backward keeps beside its inputs, one after the other in scratch memory.
typedef struct {
    uint64_t *keys, *sorted; // (N) each
    float *before, *after;   // (chunks, C) each: parts of runs that cross the ends of chunks
    double* partial;         // partial sums of norms
    void* sort;              // CUB's own
    size_t sort_bytes, bytes;
} EmbeddingScratch;

static inline char* embedding_take(char* scratch, size_t* used, size_t bytes) {
    char* part = scratch != NULL ? scratch + *used : NULL;
    *used += div_up<size_t>(bytes, 256) * 256;
    return part;
}

// Sorts the keys by the 16 bits of their tokens; positions stay in order because the sort is stable.
static inline void embedding_sort_keys(EmbeddingScratch* s, int N, cudaStream_t stream) {
    cuda_check(cub::DeviceRadixSort::SortKeys(s->sort, s->sort_bytes, s->keys, s->sorted, N, 32, 48, stream));
}

static inline EmbeddingScratch embedding_layout(void* scratch, int B, int T, int C) {
    const size_t N = (size_t)B * (size_t)T, chunks = div_up<size_t>(N, EMBEDDING_CHUNK);
    const size_t position_blocks = (size_t)T * div_up<size_t>((size_t)C, EMBEDDING_LANES);
    const size_t partials = position_blocks + EMBEDDING_NORM_BLOCKS; // more than either sum needs
    EmbeddingScratch s = {};
    embedding_sort_keys(&s, (int)N, 0); // no memory given: it only says how much it needs
    char* base = (char*)scratch;
    s.keys = (uint64_t*)embedding_take(base, &s.bytes, N * sizeof(uint64_t));
    s.sorted = (uint64_t*)embedding_take(base, &s.bytes, N * sizeof(uint64_t));
    s.before = (float*)embedding_take(base, &s.bytes, chunks * (size_t)C * sizeof(float));
    s.after = (float*)embedding_take(base, &s.bytes, chunks * (size_t)C * sizeof(float));
    s.partial = (double*)embedding_take(base, &s.bytes, partials * sizeof(double));
    s.sort = embedding_take(base, &s.bytes, s.sort_bytes);
    return s;
}

// Bytes of scratch memory that embedding_backward needs, aligned to 256 bytes.
static inline size_t embedding_backward_scratch(int B, int T, int C) { return embedding_layout(NULL, B, T, C).bytes; }

// dwte, dwpe += the gradient; sum_sq_wte, sum_sq_wpe, one number on the device each, += per-example norms where not NULL.
// dwte (Vp, C), dwpe (maxT, C), dout, head_rows (B, T, C), tokens (B, T); head_rows is read for sum_sq_wte alone
static inline void embedding_backward(float* dwte, float* dwpe, double* sum_sq_wte, double* sum_sq_wpe,
                                      const floatX* dout, const int* tokens, const floatX* head_rows, float mult, int B,
                                      int T, int C, void* scratch, cudaStream_t stream) {
    EmbeddingScratch s = embedding_layout(scratch, B, T, C);
    const int N = B * T, tiles = div_up<int>(C, EMBEDDING_LANES), chunks = div_up<int>(N, EMBEDDING_CHUNK);
    embedding_keys_kernel<<<div_up<int>(N, EMBEDDING_THREADS), EMBEDDING_THREADS, 0, stream>>>(s.keys, tokens, N);
    cuda_check_launch();
    embedding_sort_keys(&s, N, stream);
    const int run_blocks = div_up<int>(chunks * tiles, EMBEDDING_RUN_WARPS), run_threads = WARP * EMBEDDING_RUN_WARPS;
    embedding_runs_kernel<<<run_blocks, run_threads, 0, stream>>>(dwte, s.before, s.after, dout, s.sorted, mult, N, C);
    cuda_check_launch();
    embedding_crossing_runs_kernel<<<run_blocks, run_threads, 0, stream>>>(dwte, s.before, s.after, s.sorted, mult, N,
                                                                           C);
    cuda_check_launch();
    embedding_positions_kernel<<<T * tiles, EMBEDDING_THREADS, 0, stream>>>(dwpe, sum_sq_wpe != NULL ? s.partial : NULL,
                                                                            dout, mult, B, T, C);
    cuda_check_launch();
    if (sum_sq_wpe != NULL) { partial_sum(sum_sq_wpe, s.partial, 1, T * tiles, stream); }
    if (sum_sq_wte != NULL) {
        embedding_norm_kernel<<<EMBEDDING_NORM_BLOCKS, EMBEDDING_THREADS, 0, stream>>>(s.partial, dout, head_rows,
                                                                                       s.sorted, mult, N, T, C);
        cuda_check_launch();
        partial_sum(sum_sq_wte, s.partial, 1, EMBEDDING_NORM_BLOCKS, stream);
    }
}

#endif
