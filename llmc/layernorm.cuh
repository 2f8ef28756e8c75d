/*
LayerNorm over rows of C channels, the residual addition in front of it, and its backward pass with per-example norms.

Forward (Ba, Kiros & Hinton, arXiv 1607.06450): residual = inp + mult * branch, xhat = (residual - mean) * rstd,
out = xhat * weight + bias. Reads inp and branch, writes residual and out: four streams of rows * C numbers (two without a
branch), plus 8 bytes of mean and rstd a row. Floor: the time to copy as many bytes. Statistics are those of the residual as
it was rounded to floatX: the backward pass reads the same numbers.

The output can be had again from mean and rstd, so that it need not be kept: two streams, and the bits of the forward pass.

Backward: with g = dout * weight,
    dinp    += rstd * (g - mean_c(g) - xhat * mean_c(g * xhat))
    dweight += sum_{b,t} dout * xhat        dbias += sum_{b,t} dout
    sum_sq_weight += sum_b |sum_t dout * xhat|^2        sum_sq_bias += sum_b |sum_t dout|^2
The last line is arXiv 2411.00999, Algorithm 1, with the sum over t taken first: the norms cost no further pass over
anything as large as (B, T, C). Reads dout, inp, dinp and writes dinp: four streams of B * T * C numbers. Floor: the time
to copy as many bytes. Beside them there is scratch memory, 8C bytes for each segment (below), written and read once.

How the backward pass runs. A team of 1 to 16 warps owns a row; a thread owns fixed columns in each of its team's rows, so
that its share of dweight and dbias stays in registers. A warp copies its rows to come into a ring in shared memory
(cp.async), each thread its own columns: there is nothing to wait for but a thread's own copies. Where a row takes several
warps, the teams of a block go from row to row together, so that __syncthreads() serves their sums. (Named barriers, one a
team, are no faster on the whole, and compute-sanitizer's racecheck does not follow them: it then reports races across
every later __syncthreads().) A block works through a chunk of consecutive rows. A segment is what one block has of one
example: at its end the block adds up its teams' shares and writes them to scratch, while the copies of the next rows go
on. Block k and example b meet in slot k + b of the scratch: unique, because from segment to segment k or b or both grow by
one. A second kernel adds the segments of each example, squares, and adds the examples.

Numerical contract: all sums in float, those of squares in double; their order follows from B, T, C and the type alone,
and from whether norms are asked for (without them, all rows are one example). No atomics.
*/
#ifndef LLMC_LAYERNORM_CUH
#define LLMC_LAYERNORM_CUH

#include "cuda_common.cuh"

enum {
    LAYERNORM_MAX_CHANNELS = 16384,
    LAYERNORM_WIDTH = 16 / sizeof(floatX),              // columns in 16 bytes
    LAYERNORM_COLUMNS = 24,                             // a thread's columns, up to C = 12288
    LAYERNORM_MAX_VECTORS = 32 / LAYERNORM_WIDTH,       // a thread's columns beyond, in units of 16 bytes
    LAYERNORM_MAX_WARPS = 16,                           // of a team
    LAYERNORM_MAX_THREADS = LAYERNORM_MAX_WARPS * WARP, // of a block
    LAYERNORM_AGAIN_THREADS = 256,                      // of layernorm_recompute
    LAYERNORM_AGAIN_VECTORS = 4,                        // of 16 bytes, that one of its threads loads at the same time
    LAYERNORM_BLOCKS = 264,                             // two for each multiprocessor of an H100 or H200
    LAYERNORM_EXCHANGE = 2 * LAYERNORM_MAX_WARPS * 2,   // floats of shared memory for sums over teams
    LAYERNORM_RING = 54 * 1024,                         // bytes of a block's rings
    LAYERNORM_FOLD_THREADS = 512,                       // of the second kernel
    LAYERNORM_FOLD_EXAMPLES = 4,                        // that one of its threads reads at the same time
};

// ---------------------------------------------------------------------------------------------------------------------
// Teams of warps

// One team of a block, as one of its threads sees it.
struct LayerNormTeam {
    int warps, threads; // of the team
    int index, count;   // which of the block's teams
    int lane;           // this thread in the team
};

__device__ __forceinline__ LayerNormTeam layernorm_team(int warps) {
    LayerNormTeam t;
    t.warps = warps;
    t.threads = warps * WARP;
    t.index = threadIdx.x / t.threads;
    t.count = blockDim.x / t.threads;
    t.lane = threadIdx.x % t.threads;
    return t;
}

// N sums over the team at once, in every thread; all of the block's threads must take part. exchange: LAYERNORM_EXCHANGE / 2
// floats of the block's shared memory; the next sum takes others (the one after that may take these again).
template <int N>
__device__ __forceinline__ void layernorm_team_sum(float (&x)[N], float* exchange, const LayerNormTeam& t) {
    for (int n = 0; n < N; n++) { x[n] = warp_sum(x[n]); }
    if (t.warps == 1) { return; }
    if (threadIdx.x % WARP == 0) {
        for (int n = 0; n < N; n++) { exchange[threadIdx.x / WARP * N + n] = x[n]; }
    }
    __syncthreads();
    for (int n = 0; n < N; n++) { x[n] = 0; }
#pragma unroll 4
    for (int w = 0; w < t.warps; w++) {
        for (int n = 0; n < N; n++) { x[n] += exchange[(t.index * t.warps + w) * N + n]; }
    }
}

// 16 bytes to floats and back (rounded to nearest).
__device__ __forceinline__ void layernorm_unpack(float* x, const Vec16<float>& v) {
    for (int i = 0; i < Vec16<float>::size; i++) { x[i] = v[i]; }
}
__device__ __forceinline__ void layernorm_unpack(float* x, const Vec16<__nv_bfloat16>& v) {
    for (int i = 0; i < Vec16<__nv_bfloat16>::size; i += 2) { // a bf16 is the upper half of the float
        const unsigned pair = *reinterpret_cast<const unsigned*>(&v.x[i]);
        x[i] = __uint_as_float(pair << 16);
        x[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}
__device__ __forceinline__ void layernorm_pack(Vec16<float>& v, const float* x) {
    for (int i = 0; i < Vec16<float>::size; i++) { v[i] = x[i]; }
}
__device__ __forceinline__ void layernorm_pack(Vec16<__nv_bfloat16>& v, const float* x) {
    for (int i = 0; i < Vec16<__nv_bfloat16>::size; i += 2) {
        *reinterpret_cast<__nv_bfloat162*>(&v.x[i]) = __floats2bfloat162_rn(x[i], x[i + 1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <int V>
__device__ __forceinline__ void layernorm_load_row(Vec16<floatX> (&x)[V], Vec16<floatX> (&y)[V], const floatX* inp,
                                                   const floatX* branch, int row, int C, const LayerNormTeam& t) {
#pragma unroll
    for (int k = 0; k < V; k++) {
        const int column = (t.lane + k * t.threads) * LAYERNORM_WIDTH;
        const size_t at = (size_t)row * C + column;
        if (column < C) {
            x[k] = load16_once(inp + at);
            if (branch != NULL) { y[k] = load16_once(branch + at); }
        }
    }
}

// The output from 16 bytes of a row as floats, its mean m and its rstd r. The fused operation is written out, so that
// every kernel gives the same bits.
__device__ __forceinline__ Vec16<floatX> layernorm_normalise(float (&x)[LAYERNORM_WIDTH], float m, float r,
                                                             const Vec16<floatX>& weight, const Vec16<floatX>& bias) {
    float w[LAYERNORM_WIDTH], b[LAYERNORM_WIDTH];
    layernorm_unpack(w, weight);
    layernorm_unpack(b, bias);
    for (int i = 0; i < LAYERNORM_WIDTH; i++) { x[i] = fmaf((x[i] - m) * r, w[i], b[i]); }
    Vec16<floatX> out;
    layernorm_pack(out, x);
    return out;
}

// residual, out, inp, branch (rows, C); mean, rstd (rows); weight, bias (C). While a team works on one row, its next is
// under way into registers.
template <int V>
__global__ void __launch_bounds__(LAYERNORM_MAX_THREADS)
    layernorm_forward_kernel(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp,
                             const floatX* branch, float mult, const floatX* weight, const floatX* bias, int rows,
                             int C, int warps) {
    __shared__ float exchange[LAYERNORM_EXCHANGE];
    const LayerNormTeam t = layernorm_team(warps);
    const int step = gridDim.x * t.count;
    Vec16<floatX> x[V], y[V];
    int row = blockIdx.x * t.count + t.index;
    if (row < rows) { layernorm_load_row(x, y, inp, branch, row, C, t); }
    for (int base = row - t.index; base < rows; base += step, row += step) {
        const int width = row < rows ? C : 0; // a team that has no row left still takes part in the sums
        float v[V][LAYERNORM_WIDTH];
        float sum[1] = {0}, square[1] = {0};
#pragma unroll
        for (int k = 0; k < V; k++) {
            const int column = (t.lane + k * t.threads) * LAYERNORM_WIDTH;
            if (column >= width) { continue; }
            layernorm_unpack(v[k], x[k]);
            if (branch != NULL) {
                float added[LAYERNORM_WIDTH];
                layernorm_unpack(added, y[k]);
                for (int i = 0; i < LAYERNORM_WIDTH; i++) { v[k][i] += mult * added[i]; }
                layernorm_pack(x[k], v[k]);
                layernorm_unpack(v[k], x[k]); // as rounded
                store16(residual + (size_t)row * C + column, x[k]);
            }
            for (int i = 0; i < LAYERNORM_WIDTH; i++) { sum[0] += v[k][i]; }
        }
        if (row + step < rows) { layernorm_load_row(x, y, inp, branch, row + step, C, t); }
        layernorm_team_sum(sum, exchange, t);
        const float m = sum[0] / (float)C;
#pragma unroll
        for (int k = 0; k < V; k++) {
            if ((t.lane + k * t.threads) * LAYERNORM_WIDTH >= width) { continue; }
            for (int i = 0; i < LAYERNORM_WIDTH; i++) { square[0] += (v[k][i] - m) * (v[k][i] - m); }
        }
        layernorm_team_sum(square, exchange + LAYERNORM_EXCHANGE / 2, t);
        const float r = rsqrtf(square[0] / (float)C + 1e-5f);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const int column = (t.lane + k * t.threads) * LAYERNORM_WIDTH;
            if (column >= width) { continue; }
            store16(out + (size_t)row * C + column,
                    layernorm_normalise(v[k], m, r, load16(weight + column), load16(bias + column)));
        }
        if (t.lane == 0 && row < rows) {
            mean[row] = m;
            rstd[row] = r;
        }
    }
}

// The output again, from the statistics that the forward pass left. `vectors` of 16 bytes make a row, n all rows.
// out, inp (rows, C); mean, rstd (rows); weight, bias (C)
__global__ void __launch_bounds__(LAYERNORM_AGAIN_THREADS)
    layernorm_recompute_kernel(floatX* out, const floatX* inp, const float* mean, const float* rstd,
                               const floatX* weight, const floatX* bias, unsigned vectors, unsigned n) {
    enum { U = LAYERNORM_AGAIN_VECTORS, W = LAYERNORM_WIDTH };
    const unsigned first = blockIdx.x * (LAYERNORM_AGAIN_THREADS * U) + threadIdx.x;
    Vec16<floatX> v[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const unsigned i = first + u * LAYERNORM_AGAIN_THREADS;
        if (i < n) { v[u] = load16(inp + (size_t)i * W); }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const unsigned i = first + u * LAYERNORM_AGAIN_THREADS, row = i / vectors, column = (i - row * vectors) * W;
        if (i >= n) { break; }
        float x[W];
        layernorm_unpack(x, v[u]);
        store16(out + (size_t)i * W,
                layernorm_normalise(x, mean[row], rstd[row], load16(weight + column), load16(bias + column)));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: copies that run ahead, and the order of the two kernels

// Programmatic dependent launch (Hopper): a kernel's blocks may take their places as those of the kernel before it leave,
// and wait there until all of that is done and visible.
__device__ __forceinline__ void layernorm_let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void layernorm_await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What stands in a block's place among the squares until it has written there; no sum gives these bits.
__device__ __forceinline__ unsigned long long layernorm_no_square() { return 0xffffffffffffffffull; }

// ---------------------------------------------------------------------------------------------------------------------
// Backward: the pass over the rows

// One stage of a warp's ring: 16 bytes of V vectors of inp, dout and dinp for each lane, then its mean and rstd.
template <int V> __host__ __device__ constexpr int layernorm_stage_bytes() { return WARP * (3 * V * 16 + 8); }

// What a thread of the backward kernel carries from row to row.
template <int V> struct LayerNormBackward {
    static constexpr bool keep_weight = V * (2 * LAYERNORM_WIDTH + 4) <= 60; // registers of the sums and the weights
    LayerNormTeam t;
    const floatX *inp, *dout, *weight;
    floatX* dinp;
    const float *mean, *rstd;
    int C;
    float one_over_C;
    Vec16<floatX> w[keep_weight ? V : 1];
    float dweight[V][LAYERNORM_WIDTH], dbias[V][LAYERNORM_WIDTH]; // of the segment so far

    // A warp's vectors lie side by side, so that the distance from one to the next is known to the compiler.
    __device__ __forceinline__ int column(int k) const {
        return (t.lane / WARP * V * WARP + t.lane % WARP + k * WARP) * LAYERNORM_WIDTH;
    }
    __device__ __forceinline__ Vec16<floatX> weights(int k) const {
        if constexpr (keep_weight) { return w[k]; }
        return fetch_weights(k);
    }
    __device__ __forceinline__ Vec16<floatX> fetch_weights(int k) const {
        Vec16<floatX> x = {};
        if (column(k) < C) { x = load16(weight + column(k)); }
        return x;
    }
    // Where this thread's vector k of a stream (0 inp, 1 dout, 2 dinp), its mean (which 0) and rstd (1) are in a stage.
    static __device__ __forceinline__ Vec16<floatX>* vector(char* stage, int stream, int k) {
        return reinterpret_cast<Vec16<floatX>*>(stage) + (stream * V + k) * WARP + threadIdx.x % WARP;
    }
    static __device__ __forceinline__ float* statistic(char* stage, int which) {
        return reinterpret_cast<float*>(stage + 3 * V * WARP * 16) + which * WARP + threadIdx.x % WARP;
    }
};

template <int V> __device__ __forceinline__ void layernorm_clear(LayerNormBackward<V>& s) {
#pragma unroll
    for (int k = 0; k < V; k++) {
        for (int i = 0; i < LAYERNORM_WIDTH; i++) { s.dweight[k][i] = s.dbias[k][i] = 0; }
    }
}

// Zeros where a stage has room for columns past the last: they add nothing to any sum.
template <int V> __device__ __forceinline__ void layernorm_clear_unused(const LayerNormBackward<V>& s, char* stage) {
    const Vec16<floatX> zero = {};
#pragma unroll
    for (int k = 0; k < V; k++) {
        for (int stream = 0; stream < 3 && s.column(k) >= s.C; stream++) { *s.vector(stage, stream, k) = zero; }
    }
}

// Starts the copies of a row into a stage; none if the row is past the block's last.
template <int V>
__device__ __forceinline__ void layernorm_fetch(const LayerNormBackward<V>& s, char* stage, int row, int last) {
    if (row < last) {
        const size_t at = (size_t)row * s.C + s.column(0);
        const floatX *inp = s.inp + at, *dout = s.dout + at, *dinp = s.dinp + at;
#pragma unroll
        for (int k = 0; k < V; k++) {
            if (s.column(k) < s.C) {
                copy16_ahead(s.vector(stage, 0, k), inp + k * WARP * LAYERNORM_WIDTH);
                copy16_ahead(s.vector(stage, 1, k), dout + k * WARP * LAYERNORM_WIDTH);
                copy16_ahead(s.vector(stage, 2, k), dinp + k * WARP * LAYERNORM_WIDTH);
            }
        }
        copy4_ahead(s.statistic(stage, 0), s.mean + row);
        copy4_ahead(s.statistic(stage, 1), s.rstd + row);
    }
    copies_issued();
}

// A row that has landed in a stage: its part of dweight and dbias. sums gains this thread's part of sum_c g, sum_c g * xhat.
template <int V>
__device__ __forceinline__ void layernorm_backward_sums(LayerNormBackward<V>& s, char* stage, float (&sums)[2]) {
    const float r = *s.statistic(stage, 1), shift = -*s.statistic(stage, 0) * r;
#pragma unroll
    for (int k = 0; k < V; k++) {
        float x[LAYERNORM_WIDTH], dy[LAYERNORM_WIDTH], w[LAYERNORM_WIDTH];
        layernorm_unpack(x, *s.vector(stage, 0, k));
        layernorm_unpack(dy, *s.vector(stage, 1, k));
        layernorm_unpack(w, s.weights(k));
        for (int i = 0; i < LAYERNORM_WIDTH; i++) {
            const float xhat = x[i] * r + shift, g = dy[i] * w[i];
            sums[0] += g;
            sums[1] += g * xhat;
            s.dweight[k][i] += dy[i] * xhat;
            s.dbias[k][i] += dy[i];
        }
    }
}

// The same row: dinp, from the sums over all of its columns.
template <int V>
__device__ __forceinline__ void layernorm_backward_dinp(LayerNormBackward<V>& s, char* stage, int row,
                                                        const float (&sums)[2]) {
    const float m = *s.statistic(stage, 0), r = *s.statistic(stage, 1), dot = r * (sums[1] * s.one_over_C);
    // dinp + r * (g - mean(g) - (x - m) * r * mean(g * xhat)) = r * (g + b) + (a * x + dinp)
    const float a = -r * dot, b = m * dot - sums[0] * s.one_over_C;
    floatX* dinp = s.dinp + ((size_t)row * s.C + s.column(0));
#pragma unroll
    for (int k = 0; k < V; k++) {
        float x[LAYERNORM_WIDTH], dy[LAYERNORM_WIDTH], w[LAYERNORM_WIDTH], dx[LAYERNORM_WIDTH];
        layernorm_unpack(x, *s.vector(stage, 0, k));
        layernorm_unpack(dy, *s.vector(stage, 1, k));
        layernorm_unpack(dx, *s.vector(stage, 2, k));
        layernorm_unpack(w, s.weights(k));
        for (int i = 0; i < LAYERNORM_WIDTH; i++) { dx[i] = r * (dy[i] * w[i] + b) + (a * x[i] + dx[i]); }
        Vec16<floatX> sum;
        layernorm_pack(sum, dx);
        if (s.column(k) < s.C) { store16(dinp + k * WARP * LAYERNORM_WIDTH, sum); }
    }
}

// A thread's columns to `to` (C)
template <int V>
__device__ __forceinline__ void layernorm_spread(const LayerNormBackward<V>& s, float* to,
                                                 const float (&share)[V][LAYERNORM_WIDTH]) {
#pragma unroll
    for (int k = 0; k < V; k++) {
        if (s.column(k) >= s.C) { continue; }
        for (int i = 0; i < LAYERNORM_WIDTH; i += 4) {
            *reinterpret_cast<float4*>(to + s.column(k) + i) =
                make_float4(share[k][i], share[k][i + 1], share[k][i + 2], share[k][i + 3]);
        }
    }
}

// Sums a share over the block's teams into `to` (C). buffer (teams, C): shared memory, not used by a team alone
template <int V>
__device__ __forceinline__ void layernorm_flush(const LayerNormBackward<V>& s, float* to, float* buffer,
                                                const float (&share)[V][LAYERNORM_WIDTH]) {
    if (s.t.count == 1) {
        layernorm_spread(s, to, share);
        return;
    }
    __syncthreads(); // the buffer's last readers are done
    layernorm_spread(s, buffer + s.t.index * s.C, share);
    __syncthreads();
    for (int c = threadIdx.x * 4; c < s.C; c += blockDim.x * 4) {
        float4 sum = *reinterpret_cast<const float4*>(buffer + c);
#pragma unroll 4
        for (int team = 1; team < s.t.count; team++) {
            const float4 x = *reinterpret_cast<const float4*>(buffer + team * s.C + c);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *reinterpret_cast<float4*>(to + c) = sum;
    }
}

// slots (blocks + B, 2, C): a segment's dweight and dbias; squares: num_squares places that the second kernel fills
// dinp, dout, inp (rows, C); mean, rstd (rows); weight (C). Block k has the rows from k * chunk, an example T rows.
template <int V>
__global__ void __launch_bounds__(LAYERNORM_MAX_THREADS, 1)
    layernorm_backward_kernel(float* slots, unsigned long long* squares, int num_squares, floatX* dinp,
                              const floatX* dout, const floatX* inp, const float* mean, const float* rstd,
                              const floatX* weight, int rows, int T, int C, float one_over_C, int chunk, int warps,
                              int stages) {
    extern __shared__ int4 layernorm_shared[]; // a ring for each warp, exchange, buffer
    constexpr int stage_bytes = layernorm_stage_bytes<V>();
    char* shared = reinterpret_cast<char*>(layernorm_shared);
    char* ring = shared + threadIdx.x / WARP * stages * stage_bytes;
    float* exchange = reinterpret_cast<float*>(shared + blockDim.x / WARP * stages * stage_bytes);
    float* buffer = exchange + LAYERNORM_EXCHANGE;
    LayerNormBackward<V> s;
    s.t = layernorm_team(warps);
    s.inp = inp, s.dout = dout, s.weight = weight, s.dinp = dinp, s.mean = mean, s.rstd = rstd, s.C = C,
    s.one_over_C = one_over_C;

    const int first = blockIdx.x * chunk, last = min(rows, first + chunk);
    int base = first, stage = 0, half = 0; // base: of the next rows, one for each team
    layernorm_await_previous();
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
        layernorm_clear_unused(s, ring + i * stage_bytes);
        layernorm_fetch(s, ring + i * stage_bytes, base + s.t.index + i * s.t.count, last);
    }
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < num_squares; i += blockDim.x) { squares[i] = layernorm_no_square(); }
    }
    layernorm_let_next_start();
    if constexpr (LayerNormBackward<V>::keep_weight) {
#pragma unroll
        for (int k = 0; k < V; k++) { s.w[k] = s.fetch_weights(k); }
    }
    for (int start = first, end; start < last; start = end) {
        const int example = start / T;
        end = min(last, (example + 1) * T);
        layernorm_clear(s);
        for (; base < end; base += s.t.count) {
            const int row = base + s.t.index;
            const bool mine = row >= start && row < end; // else another example's: the team only takes part in the sums
            char* landed = ring + stage * stage_bytes;
            float sums[2] = {0, 0};
            if (mine) {
                copies_wait(stages - 1);
                layernorm_backward_sums(s, landed, sums);
            }
            layernorm_team_sum(sums, exchange + half, s.t);
            half = LAYERNORM_EXCHANGE / 2 - half;
            if (mine) {
                layernorm_backward_dinp(s, landed, row, sums);
                layernorm_fetch(s, landed, row + stages * s.t.count, last);
                stage = stage + 1 == stages ? 0 : stage + 1;
            }
        }
        if (base > end) { base -= s.t.count; } // some of the last rows are the next example's
        float* slot = slots + (size_t)(blockIdx.x + example) * 2 * C;
        layernorm_flush(s, slot, buffer, s.dweight);
        layernorm_flush(s, slot + C, buffer, s.dbias);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: from segments to examples to totals

__device__ __forceinline__ void layernorm_add4(float4& a, const float4& b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}
__device__ __forceinline__ float4 layernorm_xor4(const float4& x, int mask) {
    return make_float4(__shfl_xor_sync(0xffffffff, x.x, mask), __shfl_xor_sync(0xffffffff, x.y, mask),
                       __shfl_xor_sync(0xffffffff, x.z, mask), __shfl_xor_sync(0xffffffff, x.w, mask));
}
// The sum of the squares that the `count` blocks of a tensor write, in thread 0, as soon as all have written.
__device__ __forceinline__ double layernorm_collect(const unsigned long long* squares, int count, double* scratch) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += LAYERNORM_FOLD_THREADS) {
        unsigned long long bits;
        do { bits = *(const volatile unsigned long long*)(squares + i); } while (bits == layernorm_no_square());
        sum += __longlong_as_double((long long)bits);
    }
    return block_sum(sum, scratch);
}

// A block has 4 * PARTS columns of dweight (blockIdx.y 0) or dbias (1). Sixteen bytes of a slot, 4 columns, are for LANES of
// its threads, of which `group` (a power of two) share an example; more than WARP_LANES only where one round has room for
// all B.
// dweight, dbias (C): gain the sums; sum_sq_weight, sum_sq_bias: NULL, or gain the examples' squares
// slots (blocks + B, 2, C), squares (2, gridDim.x): from layernorm_backward_kernel
template <int PARTS>
__global__ void __launch_bounds__(LAYERNORM_FOLD_THREADS, 2)
    layernorm_fold_kernel(float* dweight, float* dbias, double* sum_sq_weight, double* sum_sq_bias, const float* slots,
                          unsigned long long* squares, int B, int T, int C, int chunk, int group) {
    enum {
        LANES = LAYERNORM_FOLD_THREADS / PARTS,
        WARP_LANES = WARP / PARTS,
        U = LAYERNORM_FOLD_EXAMPLES,
        WARPS = LAYERNORM_FOLD_THREADS / WARP
    };
    __shared__ float4 sums[WARPS][PARTS];
    __shared__ double scratch[2][WARPS];
    const int part = threadIdx.x % PARTS, lane = threadIdx.x / PARTS, warp = threadIdx.x / WARP;
    const int column = blockIdx.x * 4 * PARTS + part * 4, groups = LANES / group;
    const int member = lane % group, steps = div_up((T - 1) / chunk + 2, group);
    const float4 zero = make_float4(0, 0, 0, 0);
    const float* from = slots + blockIdx.y * C + column;
    float4* grad = reinterpret_cast<float4*>((blockIdx.y == 0 ? dweight : dbias) + column);
    double* sum_sq = blockIdx.y == 0 ? sum_sq_weight : sum_sq_bias;
    float4 total = zero;
    double square = 0;
    layernorm_let_next_start();
    layernorm_await_previous();
    const float4 before = lane == 0 && column < C ? *grad : zero;
    for (int b0 = 0; b0 < B; b0 += U * groups) {
        float4 sum[U], x[U];
        int at[U], last[U]; // slots of this thread's examples
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int b = b0 + u * groups + lane / group;
            const bool mine = b < B && column < C;
            at[u] = mine ? b * T / chunk + b + member : 0;
            last[u] = mine ? (b * T + T - 1) / chunk + b : -1;
            sum[u] = zero;
        }
#pragma unroll 2
        for (int i = 0; i < steps; i++) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                x[u] = at[u] <= last[u] ? *reinterpret_cast<const float4*>(from + (size_t)at[u] * 2 * C) : zero;
                at[u] += group;
            }
#pragma unroll
            for (int u = 0; u < U; u++) { layernorm_add4(sum[u], x[u]); }
        }
        for (int offset = 1; offset < min(group, (int)WARP_LANES); offset *= 2) {
#pragma unroll
            for (int u = 0; u < U; u++) { layernorm_add4(sum[u], layernorm_xor4(sum[u], offset * PARTS)); }
        }
        if (group > WARP_LANES) { // the only round, and only the first of U examples exists
            if (lane % WARP_LANES == 0) { sums[warp][part] = sum[0]; }
            __syncthreads();
            for (int w = 1; member == 0 && w < group / WARP_LANES; w++) {
                layernorm_add4(sum[0], sums[warp + w][part]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const float4 g = member == 0 ? sum[u] : zero;
            layernorm_add4(total, g);
            square += (double)g.x * g.x + (double)g.y * g.y + (double)g.z * g.z + (double)g.w * g.w;
        }
    }
    if (sum_sq != NULL) {
        square = block_sum(square, scratch[0]);
        unsigned long long* place = squares + blockIdx.y * gridDim.x;
        if (threadIdx.x == 0) {
            *(volatile unsigned long long*)(place + blockIdx.x) = (unsigned long long)__double_as_longlong(square);
        }
    }
    for (int offset = PARTS; offset < WARP; offset *= 2) { layernorm_add4(total, layernorm_xor4(total, offset)); }
    if (threadIdx.x % WARP < PARTS) { sums[warp][part] = total; }
    __syncthreads();
    if (lane == 0 && column < C) {
        total = before;
        for (int w = 0; w < WARPS; w++) { layernorm_add4(total, sums[w][part]); }
        *grad = total;
    }
    if (sum_sq != NULL && blockIdx.x == 0) {
        square = layernorm_collect(squares + blockIdx.y * gridDim.x, gridDim.x, scratch[1]);
        if (threadIdx.x == 0) { *sum_sq += square; }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// How rows of C channels are spread over threads; a function of C and the type alone.
struct LayerNormShape {
    int warps;   // of a team
    int vectors; // of 16 bytes, a thread has of a row
    int threads; // of a block
    int teams;   // of a block
};

static inline LayerNormShape layernorm_shape(int C) {
    if (C < 8 || C > LAYERNORM_MAX_CHANNELS || C % 8 != 0) {
        fatal("LayerNorm on the GPU is for 8 to %d channels, in multiples of 8, not for %d: choose another model (-e)",
              LAYERNORM_MAX_CHANNELS, C);
    }
    const int vectors = C / LAYERNORM_WIDTH, most = LAYERNORM_COLUMNS / LAYERNORM_WIDTH;
    LayerNormShape s;
    s.warps = 1;
    while (s.warps < LAYERNORM_MAX_WARPS && s.warps * WARP * most < vectors) { s.warps *= 2; }
    s.vectors = div_up(vectors, s.warps * WARP);
    s.threads = s.warps < LAYERNORM_MAX_WARPS ? LAYERNORM_MAX_THREADS / 2 : LAYERNORM_MAX_THREADS;
    s.teams = s.threads / (s.warps * WARP);
    return s;
}

static inline int layernorm_device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// residual (NULL without a branch), out, inp, branch (NULL or) (rows, C); mean, rstd (rows); weight, bias (C)
struct LayerNormForwardCall {
    floatX *residual, *out;
    float *mean, *rstd;
    const floatX *inp, *branch;
    float mult;
    const floatX *weight, *bias;
    int rows, C;
    cudaStream_t stream;
};

template <int V = 1> void layernorm_forward_launch(const LayerNormForwardCall& c, const LayerNormShape& shape) {
    if constexpr (V < LAYERNORM_MAX_VECTORS) {
        if (shape.vectors > V) { return layernorm_forward_launch<V + 1>(c, shape); }
    }
    int resident;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, layernorm_forward_kernel<V>, shape.threads, 0));
    const int most = resident * layernorm_device_attribute(cudaDevAttrMultiProcessorCount);
    const int blocks = min(most, div_up(c.rows, shape.teams));
    layernorm_forward_kernel<V><<<blocks, shape.threads, 0, c.stream>>>(
        c.residual, c.out, c.mean, c.rstd, c.inp, c.branch, c.mult, c.weight, c.bias, c.rows, c.C, shape.warps);
    cuda_check_launch();
}

// residual = inp + mult * branch (branch NULL: inp itself, and nothing is written to residual), then LayerNorm of it
// residual, out, inp, branch (N, C); mean, rstd (N); weight, bias (C); all arrays of C aligned to 16 bytes
static inline void layernorm_forward(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp,
                                     const floatX* branch, float mult, const floatX* weight, const floatX* bias, int N,
                                     int C, cudaStream_t stream) {
    const LayerNormForwardCall call = {residual, out, mean, rstd, inp, branch, mult, weight, bias, N, C, stream};
    layernorm_forward_launch(call, layernorm_shape(C));
}

// The output of layernorm_forward once more, bit for bit, from what the backward pass keeps of it
// out, inp (N, C); mean, rstd (N); weight, bias (C); inp is what was normalised: layernorm_forward's residual (its inp
// where it had no branch)
static inline void layernorm_recompute(floatX* out, const floatX* inp, const float* mean, const float* rstd,
                                       const floatX* weight, const floatX* bias, int N, int C, cudaStream_t stream) {
    const unsigned vectors = (unsigned)(C / LAYERNORM_WIDTH), n = (unsigned)N * vectors;
    const unsigned blocks = div_up(n, (unsigned)(LAYERNORM_AGAIN_THREADS * LAYERNORM_AGAIN_VECTORS));
    layernorm_recompute_kernel<<<blocks, LAYERNORM_AGAIN_THREADS, 0, stream>>>(out, inp, mean, rstd, weight, bias,
                                                                               vectors, n);
    cuda_check_launch();
}

// How many times 4 columns a block of the second kernel has: many blocks where C is small, long reads where it is not.
static inline int layernorm_fold_parts(int C) { return C <= 2048 ? 4 : 8; }
static inline int layernorm_num_squares(int C) { return 2 * div_up(C, 4 * layernorm_fold_parts(C)); }

// Bytes of scratch memory that layernorm_backward needs for B examples or fewer, of any length.
static inline size_t layernorm_backward_scratch(int B, int C) {
    const size_t slots = (size_t)(LAYERNORM_BLOCKS + B) * 2 * (size_t)C * sizeof(float);
    return slots + (size_t)layernorm_num_squares(C) * sizeof(unsigned long long);
}

// As for layernorm_backward, but without norms B is 1 and T all rows.
struct LayerNormBackwardCall {
    floatX* dinp;
    float *dweight, *dbias;
    double *sum_sq_weight, *sum_sq_bias;
    const floatX *dout, *inp;
    const float *mean, *rstd;
    const floatX* weight;
    unsigned long long* squares;
    float* slots;
    int B, T, C, chunk;
    cudaStream_t stream;
};

// Launches a kernel that itself waits for the one before it, so that its blocks may take their places before that is done
// (in code compiled for Hopper or later).
template <class... Parameters, class... Arguments>
static inline void layernorm_launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes,
                                    cudaStream_t stream, Arguments... arguments) {
    cudaFuncAttributes code;
    cuda_check(cudaFuncGetAttributes(&code, kernel));
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = blocks;
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = (size_t)bytes;
    launch.stream = stream;
    launch.attrs = &early;
    launch.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
    cuda_check(cudaLaunchKernelEx(&launch, kernel, arguments...));
}

// The pass over the rows, two blocks to a multiprocessor where possible. How many stages the rings have does not touch the
// results. With two blocks, LAYERNORM_RING bytes each, one row of a team of one warp and two rows of a larger team, keep the
// memory busy; more only wait in line there, and the pass takes longer (H200: 2 to 6% with twice as much).
template <int V = 1> void layernorm_backward_launch(const LayerNormBackwardCall& c, const LayerNormShape& shape) {
    if constexpr (V < LAYERNORM_MAX_VECTORS) {
        if (shape.vectors > V) { return layernorm_backward_launch<V + 1>(c, shape); }
    }
    const int stage = shape.threads / WARP * layernorm_stage_bytes<V>();
    const int fixed = ((int)LAYERNORM_EXCHANGE + (shape.teams > 1 ? shape.teams * c.C : 0)) * (int)sizeof(float);
    const int largest = layernorm_device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int reserved = layernorm_device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    const int half = layernorm_device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - reserved;
    const bool two = shape.threads < LAYERNORM_MAX_THREADS && fixed + stage <= half;
    const int fit = min(4, ((two ? half : largest) - fixed) / stage);
    const int wanted = max(shape.warps > 1 ? 2 : 1, (int)LAYERNORM_RING / stage);
    const int stages = two ? min(fit, wanted) : fit;
    if (stages < 1) {
        fatal("LayerNorm of %d channels needs a GPU with %d bytes of shared memory for a block; this one has %d", c.C,
              fixed + stage, largest);
    }
    const int bytes = fixed + stages * stage, rows = c.B * c.T;
    cuda_check(cudaFuncSetAttribute(layernorm_backward_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    layernorm_launch(layernorm_backward_kernel<V>, dim3(div_up(rows, c.chunk)), shape.threads, bytes, c.stream, c.slots,
                     c.squares, layernorm_num_squares(c.C), c.dinp, c.dout, c.inp, c.mean, c.rstd, c.weight, rows, c.T,
                     c.C, 1 / (float)c.C, c.chunk, shape.warps, stages);
}

static inline void layernorm_fold_launch(const LayerNormBackwardCall& c) {
    const int parts = layernorm_fold_parts(c.C), lanes = LAYERNORM_FOLD_THREADS / parts;
    int group = lanes;
    while (group > 1 && (long)group * c.B > lanes) { group /= 2; }
    const auto kernel = parts == 4 ? layernorm_fold_kernel<4> : layernorm_fold_kernel<8>;
    layernorm_launch(kernel, dim3(layernorm_num_squares(c.C) / 2, 2), LAYERNORM_FOLD_THREADS, 0, c.stream, c.dweight,
                     c.dbias, c.sum_sq_weight, c.sum_sq_bias, (const float*)c.slots, c.squares, c.B, c.T, c.C, c.chunk,
                     group);
}

// dinp += gradient at the input, dweight += sum_{b,t} dout * xhat, dbias += sum_{b,t} dout
// dinp, dout, inp (B, T, C); mean, rstd (B, T); dweight, dbias, weight (C); all arrays of C aligned to 16 bytes
// sum_sq_weight, sum_sq_bias: each NULL, or on the device, and gains sum_b |dweight_b|^2, sum_b |dbias_b|^2
// scratch: layernorm_backward_scratch(B, C) bytes, aligned to 16, with any contents
static inline void layernorm_backward(floatX* dinp, float* dweight, float* dbias, double* sum_sq_weight,
                                      double* sum_sq_bias, const floatX* dout, const floatX* inp, const float* mean,
                                      const float* rstd, const floatX* weight, void* scratch, int B, int T, int C,
                                      cudaStream_t stream) {
    const LayerNormShape shape = layernorm_shape(C);
    const bool norms = sum_sq_weight != NULL || sum_sq_bias != NULL;
    const int blocks = shape.threads < LAYERNORM_MAX_THREADS ? LAYERNORM_BLOCKS : LAYERNORM_BLOCKS / 2;
    const int chunk = div_up(B * T, blocks);
    unsigned long long* squares = (unsigned long long*)scratch;
    float* slots = (float*)(squares + layernorm_num_squares(C));
    const LayerNormBackwardCall call = {
        dinp,   dweight, dbias, sum_sq_weight, sum_sq_bias,       dout, inp,   mean,  rstd,
        weight, squares, slots, norms ? B : 1, norms ? T : B * T, C,    chunk, stream};
    layernorm_backward_launch(call, shape);
    layernorm_fold_launch(call);
}

#endif
