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
template <int HS> struct BackwardQBlock : Fp32Block<HS> {};
template <int HS> struct BackwardKVBlock : Fp32Block<HS> {};

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

// out (B, T, NH, HS), lse (B, NH, T). One block of threads for 32 queries of a head, the longest first.
template <int HS>
__global__ __launch_bounds__(256, 2) void attention_forward_kernel(float* out, float* lse, AttentionInput in) {
    constexpr int LD = Fp32Block<HS>::LD, TILE = 32;
    extern __shared__ float shared[];
    float *q_tile = shared, *k_tile = q_tile + TILE * LD, *v_tile = k_tile + TILE * LD, *p = v_tile + TILE * LD;
    const int T = in.T, blocks = div_up(T, TILE), bh = blockIdx.x / blocks, r = threadIdx.x / 8;
    const int q0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * TILE, query = q0 + r;
    in = attention_head<HS>(in, bh);
    load_tile<HS>(q_tile, in.q, in.qk_stride, q0, T);
    float acc[HS / 8] = {}, top = -INFINITY, sum = 0;
    const float c = in.scale * ATTENTION_LOG2E;
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
    if (threadIdx.x % 8 == 0) { lse[(size_t)bh * T + query] = top / ATTENTION_LOG2E + logf(sum); }
}

// dqkv (B, T, 3, NH, HS): writes dq. dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS>
__global__ __launch_bounds__(256, 2) void attention_backward_q_kernel(float* dqkv, const float* dout, const float* lse,
                                                                      const float* delta, AttentionInput in) {
    constexpr int LD = Fp32Block<HS>::LD, TILE = 32;
    extern __shared__ float shared[];
    float *q_tile = shared, *do_tile = q_tile + TILE * LD, *k_tile = do_tile + TILE * LD, *v_tile = k_tile + TILE * LD;
    float* p = v_tile + TILE * LD;
    const int T = in.T, blocks = div_up(T, TILE), bh = blockIdx.x / blocks, r = threadIdx.x / 8;
    const int q0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * TILE, query = q0 + r, head = bh % in.NH * HS;
    const size_t C = (size_t)in.NH * HS, token = (size_t)(bh / in.NH) * T;
    in = attention_head<HS>(in, bh);
    load_tile<HS>(q_tile, in.q, in.qk_stride, q0, T);
    load_tile<HS>(do_tile, dout + token * C + head, C, q0, T);
    const float row_lse = query < T ? lse[(size_t)bh * T + query] * ATTENTION_LOG2E : 0;
    const float row_delta = query < T ? delta[(size_t)bh * T + query] : 0;
    float dq[HS / 8] = {};
    const float c = in.scale * ATTENTION_LOG2E;
    for (int k0 = 0; k0 <= q0; k0 += TILE) {
        __syncthreads();
        load_tile<HS>(k_tile, in.k, in.qk_stride, k0, T);
        load_tile<HS>(v_tile, in.v, in.v_stride, k0, T);
        __syncthreads();
        float s[4], dp[4];
        row_products<HS>(s, q_tile + r * LD, k_tile);
        row_products<HS>(dp, do_tile + r * LD, v_tile);
        for (int j = 0; j < 4; j++) {
            const bool seen = k0 + j * 8 + (int)threadIdx.x % 8 <= query;
            s[j] = seen ? exp2f(s[j] * c - row_lse) * (dp[j] - row_delta) : 0;
        }
        accumulate<HS>(dq, s, p + r * (TILE + 1), k_tile);
    }
    if (query < T) { store_row<HS>(dqkv + (token + query) * 3 * C + head, dq, in.scale); }
}

// dqkv (B, T, 3, NH, HS): writes dk and dv. dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS>
__global__ __launch_bounds__(256, 2) void attention_backward_kv_kernel(float* dqkv, const float* dout, const float* lse,
                                                                       const float* delta, AttentionInput in) {
    constexpr int LD = Fp32Block<HS>::LD, TILE = 32;
    extern __shared__ float shared[];
    float *k_tile = shared, *v_tile = k_tile + TILE * LD, *q_tile = v_tile + TILE * LD, *do_tile = q_tile + TILE * LD;
    float *p = do_tile + TILE * LD, *ds = p + TILE * (TILE + 1);
    float *tile_lse = ds + TILE * (TILE + 1), *tile_delta = tile_lse + TILE;
    const int T = in.T, blocks = div_up(T, TILE), bh = blockIdx.x / blocks, r = threadIdx.x / 8;
    const int k0 = (int)(blockIdx.x % blocks) * TILE, key = k0 + r, head = bh % in.NH * HS;
    const size_t C = (size_t)in.NH * HS, token = (size_t)(bh / in.NH) * T;
    in = attention_head<HS>(in, bh);
    load_tile<HS>(k_tile, in.k, in.qk_stride, k0, T);
    load_tile<HS>(v_tile, in.v, in.v_stride, k0, T);
    float dk[HS / 8] = {}, dv[HS / 8] = {};
    const float c = in.scale * ATTENTION_LOG2E;
    for (int q0 = k0; q0 < T; q0 += TILE) {
        __syncthreads();
        load_tile<HS>(q_tile, in.q, in.qk_stride, q0, T);
        load_tile<HS>(do_tile, dout + token * C + head, C, q0, T);
        if (threadIdx.x < TILE) {
            const int t = q0 + threadIdx.x;
            tile_lse[threadIdx.x] = t < T ? lse[(size_t)bh * T + t] * ATTENTION_LOG2E : 0;
            tile_delta[threadIdx.x] = t < T ? delta[(size_t)bh * T + t] : 0;
        }
        __syncthreads();
        float s[4], dp[4];
        row_products<HS>(s, k_tile + r * LD, q_tile);
        row_products<HS>(dp, v_tile + r * LD, do_tile);
        for (int j = 0; j < 4; j++) {
            const int column = j * 8 + threadIdx.x % 8;
            s[j] = key <= q0 + column && q0 + column < T ? exp2f(s[j] * c - tile_lse[column]) : 0;
            dp[j] = s[j] * (dp[j] - tile_delta[column]);
        }
        accumulate<HS>(dv, s, p + r * (TILE + 1), do_tile);
        accumulate<HS>(dk, dp, ds + r * (TILE + 1), q_tile);
    }
    if (key < T) {
        float* row = dqkv + (token + key) * 3 * C + C + head;
        store_row<HS>(row, dk, in.scale);
        store_row<HS>(row + C, dv, 1);
    }
}

#endif
