/*
Attention (attention.cuh) in a PRECISION_FP32 build: everything is fp32 and without tensor cores, in tiles of 32 rows and 32
columns, eight threads to a row. It exists to check the others and the trainer, and is not tuned.
*/
#ifndef LLMC_ATTENTION_FP32_CUH
#define LLMC_ATTENTION_FP32_CUH

#include "attention_common.cuh"

template <int HS> struct Fp32Block {
    static constexpr int ROWS = 32, TILE = 32, THREADS = 8 * ROWS, LD = HS + 1;
    static constexpr size_t SHARED = sizeof(float) * (4 * TILE * LD + 2 * ROWS * (TILE + 1) + 2 * TILE);
};
template <int HS> struct ForwardBlock : Fp32Block<HS> {};
template <int HS, bool KEYS> struct BackwardBlock : Fp32Block<HS> {};

// Rows first .. first + 31 of x (T, HS in rows of stride) into tile (32, HS), zeros past T.
template <int HS>
__device__ __forceinline__ void load_tile(float* tile, const float* x, size_t stride, int first, int T) {
    for (int i = threadIdx.x; i < 32 * HS; i += Fp32Block<HS>::THREADS) {
        const int r = i / HS, column = i % HS;
        tile[r * Fp32Block<HS>::LD + column] = first + r < T ? x[(size_t)(first + r) * stride + column] : 0;
    }
}

// s[j] = row . tile[8 j + threadIdx.x % 8]
template <int HS> __device__ __forceinline__ void row_products(float (&s)[4], const float* row, const float* tile) {
    for (int j = 0; j < 4; j++) { s[j] = 0; }
    const float* column = tile + threadIdx.x % 8 * Fp32Block<HS>::LD;
    for (int i = 0; i < HS; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) { s[j] += row[i] * column[j * 8 * Fp32Block<HS>::LD + i]; }
    }
}

// acc[j] += p (32) @ tile (32, HS), columns 8 j + threadIdx.x % 8; p is written by the row's own threads: one warp
template <int HS>
__device__ __forceinline__ void accumulate(float (&acc)[HS / 8], const float (&s)[4], float* p, const float* tile) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++) { p[j * 8 + threadIdx.x % 8] = s[j]; }
    __syncwarp();
    for (int i = 0; i < 32; i++) {
#pragma unroll
        for (int j = 0; j < HS / 8; j++) { acc[j] += p[i] * tile[i * Fp32Block<HS>::LD + j * 8 + threadIdx.x % 8]; }
    }
}

template <int HS> __device__ __forceinline__ void store_row(float* row, const float (&acc)[HS / 8], float factor) {
#pragma unroll
    for (int j = 0; j < HS / 8; j++) { row[j * 8 + threadIdx.x % 8] = acc[j] * factor; }
}

// out (B, T, NH, HS), lse (B, NH, T); out is not rounded. One block of threads for 32 queries of a head, the longest first.
template <int HS>
__global__ __launch_bounds__(256, 2) void attention_forward_kernel(float* out, int8_t* /* remainder */, float* lse,
                                                                   AttentionInput in) {
    constexpr int LD = Fp32Block<HS>::LD, TILE = 32;
    extern __shared__ float shared[];
    float *q_tile = shared, *k_tile = q_tile + TILE * LD, *v_tile = k_tile + TILE * LD, *p = v_tile + TILE * LD;
    const int T = in.T, blocks = div_up(T, TILE), bh = blockIdx.x / blocks, r = threadIdx.x / 8;
    const int q0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * TILE, query = q0 + r;
    in = attention_head<HS>(in, bh);
    load_tile<HS>(q_tile, in.q, in.qk_stride, q0, T);
    float acc[HS / 8] = {}, top = -INFINITY, sum = 0;
    const float c = in.scale * LOG2E;
    for (int k0 = 0; k0 <= q0; k0 += TILE) {
        __syncthreads();
        load_tile<HS>(k_tile, in.k, in.qk_stride, k0, T);
        load_tile<HS>(v_tile, in.v, in.v_stride, k0, T);
        __syncthreads();
        float s[4], most = top;
        row_products<HS>(s, q_tile + r * LD, k_tile);
        for (int j = 0; j < 4; j++) {
            s[j] = k0 + j * 8 + (int)threadIdx.x % 8 <= query ? s[j] * c : -INFINITY;
            most = fmaxf(most, s[j]);
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) { most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes)); }
        const float shift = exp2f(top - most);
        top = most;
        sum *= shift;
        for (int j = 0; j < HS / 8; j++) { acc[j] *= shift; }
        for (int j = 0; j < 4; j++) {
            s[j] = exp2f(s[j] - most);
            sum += s[j];
        }
        accumulate<HS>(acc, s, p + r * (TILE + 1), v_tile);
    }
    for (int lanes = 1; lanes < 8; lanes *= 2) { sum += __shfl_xor_sync(0xffffffff, sum, lanes); }
    if (query >= T) { return; }
    const size_t stride = (size_t)in.NH * HS;
    store_row<HS>(out + ((size_t)(bh / in.NH) * T + query) * stride + bh % in.NH * HS, acc, 1 / sum);
    if (threadIdx.x % 8 == 0) { lse[(size_t)bh * T + query] = top / LOG2E + logf(sum); }
}

// One text for two kernels (attention_hopper_backward.cuh has the formulas): with KEYS the rows of the scores are keys and the
// columns queries, and it writes dk and dv; otherwise the other way about, and it writes dq.
// dqkv (B, T, 3, NH, HS); dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS, bool KEYS>
__global__ __launch_bounds__(256, 2) void attention_backward_kernel(float* dqkv, const float* dout, const float* lse,
                                                                    const float* delta, AttentionInput in) {
    constexpr int LD = Fp32Block<HS>::LD, TILE = 32;
    extern __shared__ float shared[];
    float *q_tile = shared, *do_tile = q_tile + TILE * LD, *k_tile = do_tile + TILE * LD, *v_tile = k_tile + TILE * LD;
    float *p = v_tile + TILE * LD, *ds = p + TILE * (TILE + 1);
    float *tile_lse = ds + TILE * (TILE + 1), *tile_delta = tile_lse + TILE; // of the queries in q_tile
    const int T = in.T, blocks = div_up(T, TILE), bh = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int row0 = (KEYS ? block : blocks - 1 - block) * TILE, r = threadIdx.x / 8, head = bh % in.NH * HS;
    const size_t C = (size_t)in.NH * HS, token = (size_t)(bh / in.NH) * T;
    in = attention_head<HS>(in, bh);
    auto load = [&](bool keys, int first) {
        load_tile<HS>(keys ? k_tile : q_tile, keys ? in.k : in.q, in.qk_stride, first, T);
        if (keys) { return load_tile<HS>(v_tile, in.v, in.v_stride, first, T); }
        load_tile<HS>(do_tile, dout + token * C + head, C, first, T);
        if (threadIdx.x < TILE) {
            const int t = first + threadIdx.x;
            tile_lse[threadIdx.x] = t < T ? lse[(size_t)bh * T + t] * LOG2E : 0;
            tile_delta[threadIdx.x] = t < T ? delta[(size_t)bh * T + t] : 0;
        }
    };
    load(KEYS, row0);
    float da[HS / 8] = {}, db[HS / 8] = {}; // dk, dv or dq, nothing
    const float c = in.scale * LOG2E;
    for (int column0 = KEYS ? row0 : 0; column0 < (KEYS ? T : row0 + TILE); column0 += TILE) {
        __syncthreads();
        load(!KEYS, column0);
        __syncthreads();
        float s[4], dp[4];
        row_products<HS>(s, (KEYS ? k_tile : q_tile) + r * LD, KEYS ? q_tile : k_tile);
        row_products<HS>(dp, (KEYS ? v_tile : do_tile) + r * LD, KEYS ? do_tile : v_tile);
        for (int j = 0; j < 4; j++) {
            const int column = j * 8 + threadIdx.x % 8, i = KEYS ? column : r; // i: the query in its tile
            const int query = KEYS ? column0 + column : row0 + r, key = KEYS ? row0 + r : column0 + column;
            s[j] = key <= query && query < T ? exp2f(s[j] * c - tile_lse[i]) : 0;
            dp[j] = s[j] * (dp[j] - tile_delta[i]);
        }
        if (KEYS) { accumulate<HS>(db, s, p + r * (TILE + 1), do_tile); }
        accumulate<HS>(da, dp, ds + r * (TILE + 1), KEYS ? q_tile : k_tile);
    }
    if (row0 + r < T) {
        float* row = dqkv + (token + row0 + r) * 3 * C + (KEYS ? C : 0) + head;
        store_row<HS>(row, da, in.scale);
        if (KEYS) { store_row<HS>(row + C, db, 1); }
    }
}

#endif
