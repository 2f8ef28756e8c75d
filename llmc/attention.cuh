/*
Causal self-attention without a T x T buffer, forward and backward, for any B, T and NH and every head size divisible by 16
up to 128, on sm_80 and later.

    s_ij = scale * q_i . k_j,  p_ij = exp(s_ij - lse_i) for j <= i,  o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . o_i),  dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i

The forward pass keeps a running maximum and sum for each query (Milakov & Gimelshein 2018, arXiv 1805.02867), in blocks of
keys (Dao 2023, arXiv 2307.08691); the backward pass recomputes the probabilities from lse. Cosine attention divides q and k by
their norms first (at least 1e-12, as torch.nn.functional.normalize has it): both are normalised into scratch memory,
and the gradient goes back through the normalisation in place.

A block of threads holds a block of rows (queries; in the kernel for dk and dv keys, on transposed scores) and walks over the
other side in tiles that arrive by cp.async one tile ahead. A warp has 16 or 32 rows to itself, so that the scores that one
product leaves in its accumulators are at once an operand of the next: probabilities never pass through shared memory.
dq has a kernel of its own, which computes the scores once more: seven products in place of five, but no sums between blocks.

Bytes: forward reads qkv and writes out, B*T*C * 4 activations, plus lse; backward reads qkv twice, dout three times
and out once, and writes dqkv. Floor: the products, 4*B*NH*T*T*HS/2 operations forward and 2.5 times that backward (the
seven products make 3.5).

Numerical contract: products of bf16 with fp32 sums; probabilities and ds are rounded to bf16 as operands; the softmax, lse and all
sums are fp32, and every output is rounded once (under cosine attention also q^, k^ and their gradients, between kernels). The order of
every sum follows from the shapes alone, without atomics.
In a PRECISION_FP32 build everything is fp32 without tensor cores. scale must be positive.
*/
#ifndef LLMC_ATTENTION_CUH
#define LLMC_ATTENTION_CUH

#include "cuda_common.cuh"
#include <type_traits>

// One layer's attention.
typedef struct {
    int B, T, NH, HS;
    float scale; // of the scores: attn_mult / sqrt(HS)
    bool cosine;
} Attention;

// What the kernels read: head h of example b has its rows at q + (b * T * qk_stride + h * HS) and so on.
typedef struct {
    const floatX *q, *k; // (B, T, NH, HS), rows of tokens qk_stride apart
    const floatX* v;     // (B, T, NH, HS), rows of tokens v_stride apart
    size_t qk_stride, v_stride;
    int T, NH;
    float scale;
} AttentionInput;

#define ATTENTION_LOG2E 1.4426950408889634f

// The block of threads' head: q, k and v from here on are (T, HS).
template <int HS> __device__ __forceinline__ AttentionInput attention_head(AttentionInput in, int bh) {
    const size_t rows = (size_t)(bh / in.NH) * in.T;
    const int h = bh % in.NH;
    in.q += rows * in.qk_stride + h * HS;
    in.k += rows * in.qk_stride + h * HS;
    in.v += rows * in.v_stride + h * HS;
    return in;
}

#ifndef PRECISION_FP32

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, zeros if not valid.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void cp_async4(void* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 4 : 0));
}
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices; lanes 8i .. 8i+7 give the addresses of matrix i's rows. Lane l gets elements (l/4, 2(l%4) + {0, 1}).
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const floatX* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&r)[4], const floatX* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// d (16, 8) += a (16, 16) @ b (16, 8). Of d a lane holds (l/4, 2(l%4) + {0, 1}) and the same eight rows below.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as bf16 in one register, a in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory: rows of HS numbers, padded by 16 bytes: a row is an odd number of 16-byte units, so the eight rows
// of an 8 x 8 matrix lie in different banks.

template <int HS> __host__ __device__ constexpr int padded_row() { return HS + 8; }

// Rows first .. first + ROWS - 1 of x (T, HS in rows of stride) into tile (ROWS, HS), zeros past T. Arrives at cp_async_wait.
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(floatX* tile, const floatX* x, size_t stride, int first, int T) {
    constexpr int UNITS = HS / 8;
    if (THREADS % UNITS == 0 && first + ROWS <= T) { // the common case, in few instructions
        constexpr int STEP = THREADS / UNITS;
        const int r = (int)threadIdx.x / UNITS, unit = (int)threadIdx.x % UNITS * 8;
        const floatX* from = x + (size_t)(first + r) * stride + unit;
        floatX* to = tile + r * padded_row<HS>() + unit;
#pragma unroll
        for (int j = 0; j < ROWS / STEP; j++, from += STEP * stride) {
            cp_async16(to + j * STEP * padded_row<HS>(), from, true);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS) {
        const int r = i / UNITS, unit = i % UNITS * 8;
        const bool valid = first + r < T;
        cp_async16(tile + r * padded_row<HS>() + unit, x + (size_t)(valid ? first + r : 0) * stride + unit, valid);
    }
}

// A warp's MT * 16 rows of a tile as left operand of products over HS: the first KEPT * 16 columns stay in registers, the
// others are read at each use.
template <int HS, int MT, int KEPT> struct WarpRows {
    const floatX* lane_row; // what this lane gives to ldmatrix for the first 16 x 16
    unsigned kept[KEPT > 0 ? KEPT : 1][MT][4];

    __device__ __forceinline__ void read(unsigned (&a)[MT][4], int k) const {
#pragma unroll
        for (int m = 0; m < MT; m++) { ldmatrix(a[m], lane_row + m * 16 * padded_row<HS>() + k * 16); }
    }
    // rows: the warp's first row in its tile
    __device__ __forceinline__ void open(const floatX* rows) {
        const int lane = threadIdx.x % WARP;
        lane_row = rows + lane % 16 * padded_row<HS>() + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < KEPT; k++) { read(kept[k], k); }
    }
    __device__ __forceinline__ void get(unsigned (&a)[MT][4], int k) const {
        if (k < KEPT) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) { a[m][i] = kept[k < KEPT ? k : 0][m][i]; }
            }
        } else {
            read(a, k);
        }
    }
};

// s (MT * 16, N) = rows (MT * 16, HS) @ tile (N, HS)^T
template <int HS, int MT, int N, int KEPT>
__device__ __forceinline__ void row_products(float (&s)[MT][N / 8][4], const WarpRows<HS, MT, KEPT>& rows,
                                             const floatX* tile) {
    const int lane = threadIdx.x % WARP;
    const floatX* lane_row = tile + (lane / 16 * 8 + lane % 8) * padded_row<HS>() + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { s[m][n][i] = 0; }
        }
    }
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        unsigned a[MT][4];
        rows.get(a, k);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned b[4];
            ldmatrix(b, lane_row + n * 16 * padded_row<HS>() + k * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(s[m][2 * n], a[m], b[0], b[1]);
                mma(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// acc (MT * 16, HS) += p (MT * 16, N) @ tile (N, HS), p rounded to bf16
template <int HS, int MT, int N>
__device__ __forceinline__ void accumulate(float (&acc)[MT][HS / 8][4], const float (&p)[MT][N / 8][4],
                                           const floatX* tile) {
    const int lane = threadIdx.x % WARP;
    const floatX* lane_row = tile + lane % 16 * padded_row<HS>() + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        unsigned a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const float(&left)[4] = p[m][2 * k], (&right)[4] = p[m][2 * k + 1];
            a[m][0] = pack_bf16(left[0], left[1]);
            a[m][1] = pack_bf16(left[2], left[3]);
            a[m][2] = pack_bf16(right[0], right[1]);
            a[m][3] = pack_bf16(right[2], right[3]);
        }
#pragma unroll
        for (int n = 0; n < HS / 16; n++) {
            unsigned b[4];
            ldmatrix_transposed(b, lane_row + k * 16 * padded_row<HS>() + n * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(acc[m][2 * n], a[m], b[0], b[1]);
                mma(acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <int HS, int MT> __device__ __forceinline__ void zero_rows(float (&acc)[MT][HS / 8][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < HS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { acc[m][n][i] = 0; }
        }
    }
}

// A warp's rows, times factor[m][half] for rows m * 16 + half * 8 + lane / 4, to x (T, HS in rows of stride) from row first on.
// stage: MT * 16 rows of shared memory that no other warp uses.
template <int HS, int MT>
__device__ __forceinline__ void store_rows(floatX* x, size_t stride, const float (&acc)[MT][HS / 8][4],
                                           const float (&factor)[MT][2], floatX* stage, int first, int T) {
    constexpr int UNITS = HS / 8;
    const int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            floatX* row = stage + (m * 16 + half * 8 + lane / 4) * padded_row<HS>() + lane % 4 * 2;
            const float f = factor[m][half];
#pragma unroll
            for (int n = 0; n < HS / 8; n++) {
                *reinterpret_cast<unsigned*>(row + n * 8) =
                    pack_bf16(acc[m][n][2 * half] * f, acc[m][n][2 * half + 1] * f);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < MT * 16 * UNITS; i += WARP) {
        const int r = i / UNITS, unit = i % UNITS * 8;
        if (first + r < T) {
            store16(x + (size_t)(first + r) * stride + unit, load16(stage + r * padded_row<HS>() + unit));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes of the kernels' blocks: four warps, two blocks on a multiprocessor, at most 255 registers a thread and, for the
// sake of devices smaller than the largest, at most 96 KiB of shared memory. 32 rows a warp halve the traffic between
// shared memory and the tensor cores where their sums fit in the registers.

struct WarpsBlock {
    static constexpr int WARPS = 4, THREADS = WARPS * WARP;
};
template <int HS> struct ForwardBlock : WarpsBlock {
    static constexpr int MT = 2, ROWS = WARPS * MT * 16, TILE = HS <= 64 ? 64 : 32, KEPT = HS <= 64 ? HS / 16 : 0;
    static constexpr size_t SHARED = sizeof(floatX) * padded_row<HS>() * (ROWS + 4 * TILE);
};
// For dq; STEP: columns of scores at a time.
template <int HS> struct BackwardQBlock : WarpsBlock {
    static constexpr int MT = HS <= 64 ? 2 : 1, ROWS = WARPS * MT * 16, TILE = HS <= 64 ? 64 : 32, STEP = 32;
    static constexpr size_t SHARED = sizeof(floatX) * padded_row<HS>() * (2 * ROWS + 4 * TILE);
};
// For dk and dv.
template <int HS> struct BackwardKVBlock : WarpsBlock {
    static constexpr int MT = HS <= 64 ? 2 : 1, ROWS = WARPS * MT * 16, TILE = HS <= 64 ? 64 : 32;
    static constexpr int STEP = HS <= 64 ? 16 : 32, KEPT = HS < 64 ? HS / 16 : HS == 64 ? 3 : 0;
    static constexpr size_t SHARED =
        sizeof(floatX) * padded_row<HS>() * (2 * ROWS + 4 * TILE) + 4 * TILE * sizeof(float);
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Probabilities of N more keys, unnormalised, from their scores s; the running maximum, sum and output of each row follow.
// top: maximum of the unscaled scores; sum: this lane's part of the row's sum; c: scale * log2(e)
template <int HS, int MT, int N>
__device__ __forceinline__ void softmax_step(float (&s)[MT][N / 8][4], float (&acc)[MT][HS / 8][4], float (&top)[MT][2],
                                             float (&sum)[MT][2], float c) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[m][half];
#pragma unroll
            for (int n = 0; n < N / 8; n++) { most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1])); }
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
            const float shift = exp2_fast((top[m][half] - most) * c), base = most * c;
            top[m][half] = most;
            float total = 0;
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[m][n][i] = exp2_fast(fmaf(s[m][n][i], c, -base));
                    total += s[m][n][i];
                }
            }
            sum[m][half] = sum[m][half] * shift + total;
#pragma unroll
            for (int n = 0; n < HS / 8; n++) {
                acc[m][n][2 * half] *= shift;
                acc[m][n][2 * half + 1] *= shift;
            }
        }
    }
}

// Minus infinity where the key comes after the query: queries down from row and keys across from column, or, KEYS_DOWN, keys
// down and queries across.
template <int MT, int N, bool KEYS_DOWN>
__device__ __forceinline__ void mask_scores(float (&s)[MT][N / 8][4], int row, int column) {
    const int lane = threadIdx.x % WARP, below = row + lane / 4 - column - lane % 4 * 2;
    asm volatile(""); // keeps this a branch, which most tiles jump over
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int distance = below + m * 16 + i / 2 * 8 - n * 8 - i % 2; // row minus column
                if (KEYS_DOWN ? distance > 0 : distance < 0) { s[m][n][i] = -INFINITY; }
            }
        }
    }
}

// out (B, T, NH, HS), lse (B, NH, T). One block of threads for ROWS queries of a head, the longest first.
template <int HS>
__global__ __launch_bounds__(128, 2) void attention_forward_kernel(floatX* out, float* lse, AttentionInput in) {
    typedef ForwardBlock<HS> Block;
    constexpr int MT = Block::MT, TILE = Block::TILE, LD = padded_row<HS>();
    extern __shared__ __align__(16) unsigned char shared[];
    floatX *q_tile = (floatX*)shared, *kv_tiles = q_tile + Block::ROWS * LD; // two times k, v

    const int T = in.T, blocks = div_up(T, Block::ROWS), bh = blockIdx.x / blocks;
    const int q0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * Block::ROWS, keys = min(q0 + Block::ROWS, T);
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * MT * 16, first = q0 + warp_row;
    in = attention_head<HS>(in, bh);

    auto load_kv = [&](int k0) {
        floatX* k_tile = kv_tiles + k0 / TILE % 2 * (2 * TILE * LD);
        load_tile<HS, TILE, Block::THREADS>(k_tile, in.k, in.qk_stride, k0, T);
        load_tile<HS, TILE, Block::THREADS>(k_tile + TILE * LD, in.v, in.v_stride, k0, T);
    };
    load_tile<HS, Block::ROWS, Block::THREADS>(q_tile, in.q, in.qk_stride, q0, T);
    load_kv(0);
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, Block::KEPT> q;
    q.open(q_tile + warp_row * LD);

    float acc[MT][HS / 8][4], top[MT][2], sum[MT][2];
    zero_rows<HS, MT>(acc);
#pragma unroll
    for (int m = 0; m < MT; m++) {
        top[m][0] = top[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0;
    }
    const float c = in.scale * ATTENTION_LOG2E;
#pragma unroll 1
    for (int k0 = 0; k0 < keys; k0 += TILE) {
        cp_async_wait();
        __syncthreads(); // this tile is here, and nobody reads the one before any more
        if (k0 + TILE < keys) { load_kv(k0 + TILE); }
        if (first >= T || k0 >= first + MT * 16) { continue; }
        const floatX* k_tile = kv_tiles + k0 / TILE % 2 * (2 * TILE * LD);
        float s[MT][TILE / 8][4];
        row_products<HS, MT, TILE>(s, q, k_tile);
        if (k0 + TILE - 1 > first) { mask_scores<MT, TILE, false>(s, first, k0); }
        softmax_step<HS, MT, TILE>(s, acc, top, sum, c);
        accumulate<HS, MT, TILE>(acc, s, k_tile + TILE * LD);
    }
    float inverse[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(0xffffffff, total, 1);
            total += __shfl_xor_sync(0xffffffff, total, 2);
            inverse[m][half] = 1 / total;
            const int t = first + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && t < T) { lse[(size_t)bh * T + t] = top[m][half] * in.scale + logf(total); }
        }
    }
    const size_t stride = (size_t)in.NH * HS;
    floatX* head_out = out + (size_t)(bh / in.NH) * T * stride + bh % in.NH * HS;
    store_rows<HS, MT>(head_out, stride, acc, inverse, q_tile + warp_row * LD, first, T);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// dqkv (B, T, 3, NH, HS): writes dq. One block of threads for ROWS queries of a head, the longest first.
// dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS>
__global__ __launch_bounds__(128, 2) void attention_backward_q_kernel(floatX* dqkv, const floatX* dout,
                                                                      const float* lse, const float* delta,
                                                                      AttentionInput in) {
    typedef BackwardQBlock<HS> Block;
    constexpr int MT = Block::MT, TILE = Block::TILE, STEP = Block::STEP, LD = padded_row<HS>();
    extern __shared__ __align__(16) unsigned char shared[];
    floatX *q_tile = (floatX*)shared, *do_tile = q_tile + Block::ROWS * LD;
    floatX* kv_tiles = do_tile + Block::ROWS * LD; // two times k, v

    const int T = in.T, blocks = div_up(T, Block::ROWS), bh = blockIdx.x / blocks;
    const int q0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * Block::ROWS, keys = min(q0 + Block::ROWS, T);
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * MT * 16, first = q0 + warp_row;
    const size_t C = (size_t)in.NH * HS, token = (size_t)(bh / in.NH) * T;
    const int head = bh % in.NH * HS;
    in = attention_head<HS>(in, bh);

    auto load_kv = [&](int k0) {
        floatX* k_tile = kv_tiles + k0 / TILE % 2 * (2 * TILE * LD);
        load_tile<HS, TILE, Block::THREADS>(k_tile, in.k, in.qk_stride, k0, T);
        load_tile<HS, TILE, Block::THREADS>(k_tile + TILE * LD, in.v, in.v_stride, k0, T);
    };
    load_tile<HS, Block::ROWS, Block::THREADS>(q_tile, in.q, in.qk_stride, q0, T);
    load_tile<HS, Block::ROWS, Block::THREADS>(do_tile, dout + token * C + head, C, q0, T);
    load_kv(0);
    float row_lse[MT][2], row_delta[MT][2]; // lse in units of base 2
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + m * 16 + half * 8 + lane / 4;
            row_lse[m][half] = t < T ? lse[(size_t)bh * T + t] * ATTENTION_LOG2E : 0;
            row_delta[m][half] = t < T ? delta[(size_t)bh * T + t] : 0;
        }
    }
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, HS / 16> q, d;
    q.open(q_tile + warp_row * LD);
    d.open(do_tile + warp_row * LD);

    float dq[MT][HS / 8][4];
    zero_rows<HS, MT>(dq);
    const float c = in.scale * ATTENTION_LOG2E;
#pragma unroll 1
    for (int k0 = 0; k0 < keys; k0 += TILE) {
        cp_async_wait();
        __syncthreads(); // this tile is here, and nobody reads the one before any more
        if (k0 + TILE < keys) { load_kv(k0 + TILE); }
        if (first >= T) { continue; }
        const floatX* tile = kv_tiles + k0 / TILE % 2 * (2 * TILE * LD);
#pragma unroll 1
        for (int k = k0; k < min(k0 + TILE, first + MT * 16); k += STEP, tile += STEP * LD) {
            float s[MT][STEP / 8][4], dp[MT][STEP / 8][4];
            row_products<HS, MT, STEP>(s, q, tile);
            row_products<HS, MT, STEP>(dp, d, tile + TILE * LD);
            if (k + STEP - 1 > first) { mask_scores<MT, STEP, false>(s, first, k); }
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] =
                            exp2_fast(fmaf(s[m][n][i], c, -row_lse[m][i / 2])) * (dp[m][n][i] - row_delta[m][i / 2]);
                    }
                }
            }
            accumulate<HS, MT, STEP>(dq, s, tile);
        }
    }
    float factor[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) { factor[m][0] = factor[m][1] = in.scale; }
    store_rows<HS, MT>(dqkv + token * 3 * C + head, 3 * C, dq, factor, q_tile + warp_row * LD, first, T);
}

// From the transposed scores s (keys down from k0, queries across from q0) and dp to probabilities and their gradient.
// lse, delta (N): of these queries
template <int MT, int N>
__device__ __forceinline__ void backward_probabilities(float (&s)[MT][N / 8][4], float (&dp)[MT][N / 8][4],
                                                       const float* lse, const float* delta, float c, int k0, int q0) {
    const int column = threadIdx.x % 4 * 2;
    if (q0 < k0 + MT * 16 - 1) { mask_scores<MT, N, true>(s, k0, q0); }
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        const float2 l = *reinterpret_cast<const float2*>(lse + n * 8 + column);
        const float2 d = *reinterpret_cast<const float2*>(delta + n * 8 + column);
        const float column_lse[2] = {l.x * ATTENTION_LOG2E, l.y * ATTENTION_LOG2E}, column_delta[2] = {d.x, d.y};
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[m][n][i] = exp2_fast(fmaf(s[m][n][i], c, -column_lse[i % 2]));
                dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - column_delta[i % 2]);
            }
        }
    }
}

// dqkv (B, T, 3, NH, HS): writes dk and dv. One block of threads for ROWS keys of a head, the longest first.
// dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS>
__global__ __launch_bounds__(128, 2) void attention_backward_kv_kernel(floatX* dqkv, const floatX* dout,
                                                                       const float* lse, const float* delta,
                                                                       AttentionInput in) {
    typedef BackwardKVBlock<HS> Block;
    constexpr int MT = Block::MT, TILE = Block::TILE, STEP = Block::STEP, LD = padded_row<HS>();
    extern __shared__ __align__(16) unsigned char shared[];
    floatX *k_tile = (floatX*)shared, *v_tile = k_tile + Block::ROWS * LD;
    floatX* q_tiles = v_tile + Block::ROWS * LD;           // two times q, dout
    float* statistics = (float*)(q_tiles + 4 * TILE * LD); // two times lse, delta

    const int T = in.T, blocks = div_up(T, Block::ROWS), bh = blockIdx.x / blocks;
    const int k0 = (int)(blockIdx.x % blocks) * Block::ROWS;
    const int warp_row = threadIdx.x / WARP * MT * 16, first = k0 + warp_row;
    const size_t C = (size_t)in.NH * HS, token = (size_t)(bh / in.NH) * T;
    const int head = bh % in.NH * HS;
    in = attention_head<HS>(in, bh);
    dout += token * C + head;
    lse += (size_t)bh * T;
    delta += (size_t)bh * T;

    auto load_queries = [&](int q0) {
        const int stage = q0 / TILE % 2, row = threadIdx.x % TILE;
        floatX* q_tile = q_tiles + stage * (2 * TILE * LD);
        load_tile<HS, TILE, Block::THREADS>(q_tile, in.q, in.qk_stride, q0, T);
        load_tile<HS, TILE, Block::THREADS>(q_tile + TILE * LD, dout, C, q0, T);
        const bool valid = q0 + row < T;
        if (threadIdx.x < 2 * TILE) { // zeros past T: such a query has p = 1, but dout and ds are zero
            cp_async4(statistics + stage * 2 * TILE + threadIdx.x,
                      (threadIdx.x < TILE ? lse : delta) + (valid ? q0 + row : 0), valid);
        }
    };
    load_tile<HS, Block::ROWS, Block::THREADS>(k_tile, in.k, in.qk_stride, k0, T);
    load_tile<HS, Block::ROWS, Block::THREADS>(v_tile, in.v, in.v_stride, k0, T);
    load_queries(k0);
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, Block::KEPT> k, v;
    k.open(k_tile + warp_row * LD);
    v.open(v_tile + warp_row * LD);

    float dk[MT][HS / 8][4], dv[MT][HS / 8][4];
    zero_rows<HS, MT>(dk);
    zero_rows<HS, MT>(dv);
    const float c = in.scale * ATTENTION_LOG2E;
#pragma unroll 1
    for (int q0 = k0; q0 < T; q0 += TILE) {
        cp_async_wait();
        __syncthreads(); // this tile is here, and nobody reads the one before any more
        if (q0 + TILE < T) { load_queries(q0 + TILE); }
        if (first >= T) { continue; }
        const int stage = q0 / TILE % 2, start = max(0, first - q0) / STEP * STEP;
        const floatX* tile = q_tiles + (stage * 2 * TILE + start) * LD;
        const float* tile_lse = statistics + stage * 2 * TILE + start;
#pragma unroll 1
        for (int q = q0 + start; q < min(q0 + TILE, T); q += STEP, tile += STEP * LD, tile_lse += STEP) {
            float s[MT][STEP / 8][4], dp[MT][STEP / 8][4];
            row_products<HS, MT, STEP>(s, k, tile);
            row_products<HS, MT, STEP>(dp, v, tile + TILE * LD);
            backward_probabilities<MT, STEP>(s, dp, tile_lse, tile_lse + TILE, c, first, q);
            accumulate<HS, MT, STEP>(dv, s, tile + TILE * LD);
            accumulate<HS, MT, STEP>(dk, dp, tile);
        }
    }
    float one[MT][2], factor[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        one[m][0] = one[m][1] = 1;
        factor[m][0] = factor[m][1] = in.scale;
    }
    floatX* dk_rows = dqkv + token * 3 * C + C + head;
    store_rows<HS, MT>(dk_rows, 3 * C, dk, factor, k_tile + warp_row * LD, first, T);
    store_rows<HS, MT>(dk_rows + C, 3 * C, dv, one, v_tile + warp_row * LD, first, T);
}

#else // PRECISION_FP32

// ---------------------------------------------------------------------------------------------------------------------
// The same in fp32, without tensor cores: tiles of 32 rows and 32 columns, eight threads to a row

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

// ---------------------------------------------------------------------------------------------------------------------
// Rows of single heads: four lanes to a row

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// delta (B, NH, T) = dout . out for each head; dout, out (B, T, NH, HS)
static __global__ __launch_bounds__(256) void attention_delta_kernel(float* delta, const floatX* dout,
                                                                     const floatX* out, int B, int T, int NH, int HS) {
    const size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 4;
    const bool valid = row < (size_t)B * T * NH;
    float sum = 0;
    for (int i = threadIdx.x % 4 * Vec16<floatX>::size; valid && i < HS; i += 4 * Vec16<floatX>::size) {
        const Vec16<floatX> a = load16(dout + row * HS + i), b = load16(out + row * HS + i);
#pragma unroll
        for (int j = 0; j < Vec16<floatX>::size; j++) { sum += (float)a[j] * (float)b[j]; }
    }
    sum = quad_sum(sum);
    if (valid && threadIdx.x % 4 == 0) {
        const size_t token = row / NH, b = token / T;
        delta[(b * NH + row % NH) * T + token % T] = sum;
    }
}

// Sum of a (HS) * b (HS) over the row's four lanes, in each of them; 0 where not valid.
__device__ __forceinline__ float quad_dot(const floatX* a, const floatX* b, int HS, bool valid) {
    float sum = 0;
    for (int i = threadIdx.x % 4 * Vec16<floatX>::size; valid && i < HS; i += 4 * Vec16<floatX>::size) {
        const Vec16<floatX> x = load16(a + i), y = load16(b + i);
#pragma unroll
        for (int j = 0; j < Vec16<floatX>::size; j++) { sum += (float)x[j] * (float)y[j]; }
    }
    return quad_sum(sum);
}

// unit (B, T, 2, NH, HS) = q and k of qkv (B, T, 3, NH, HS), each head divided by its norm, at least 1e-12
static __global__ __launch_bounds__(256) void attention_unit_kernel(floatX* unit, const floatX* qkv, size_t tokens,
                                                                    int NH, int HS) {
    const size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 4, token = row / (2 * NH);
    const bool valid = token < tokens;
    const size_t head = row % (2 * NH) * HS, C = (size_t)NH * HS;
    const floatX* x = qkv + token * 3 * C + head;
    const float inverse = 1 / fmaxf(sqrtf(quad_dot(x, x, HS, valid)), 1e-12f);
    for (int i = threadIdx.x % 4 * Vec16<floatX>::size; valid && i < HS; i += 4 * Vec16<floatX>::size) {
        Vec16<floatX> v = load16(x + i);
#pragma unroll
        for (int j = 0; j < Vec16<floatX>::size; j++) { v[j] = (floatX)((float)v[j] * inverse); }
        store16(unit + token * 2 * C + head + i, v);
    }
}

// dqkv (B, T, 3, NH, HS): the gradients at the normalised q and k become those at q and k, in place:
// x^ = x / |x| has dx = (dx^ - x^ (x^ . dx^)) / |x|; below the floor it is linear. qkv (B, T, 3, NH, HS)
static __global__ __launch_bounds__(256) void attention_unit_backward_kernel(floatX* dqkv, const floatX* qkv,
                                                                             size_t tokens, int NH, int HS) {
    const size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 4, token = row / (2 * NH);
    const bool valid = token < tokens;
    const size_t at = token * 3 * NH * HS + row % (2 * NH) * HS;
    const floatX* x = qkv + at;
    floatX* dx = dqkv + at;
    const float norm = sqrtf(quad_dot(x, x, HS, valid)), inverse = 1 / fmaxf(norm, 1e-12f);
    const float dot = quad_dot(x, dx, HS, valid) * inverse, along = norm > 1e-12f ? dot * inverse : 0;
    for (int i = threadIdx.x % 4 * Vec16<floatX>::size; valid && i < HS; i += 4 * Vec16<floatX>::size) {
        const Vec16<floatX> v = load16(x + i);
        Vec16<floatX> d = load16(dx + i);
#pragma unroll
        for (int j = 0; j < Vec16<floatX>::size; j++) {
            d[j] = (floatX)(((float)d[j] - (float)v[j] * along) * inverse);
        }
        store16(dx + i, d);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Calls f with the head size as a compile-time constant.
template <class F> void attention_with_head_size(int HS, F f) {
    switch (HS) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 48: return f(std::integral_constant<int, 48>());
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 112: return f(std::integral_constant<int, 112>());
    case 128: return f(std::integral_constant<int, 128>());
    default: fatal("attention on the GPU needs a head size divisible by 16, at most 128, not %d; change -e", HS);
    }
}

// Launches kernel with one block of threads for each Block::ROWS rows of each head.
template <class Block, class... Kernel, class... Args>
void attention_launch(void (*kernel)(Kernel...), const Attention& a, cudaStream_t stream, Args... args) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)Block::SHARED));
    kernel<<<div_up(a.T, (int)Block::ROWS) * a.B * a.NH, Block::THREADS, Block::SHARED, stream>>>(args...);
    cuda_check_launch();
}

// Bytes of scratch memory that attention_forward and attention_backward need: delta, then the normalised q and k.
static inline size_t attention_delta_bytes(const Attention& a) {
    return div_up((size_t)a.B * a.NH * a.T * sizeof(float), (size_t)256) * 256;
}
static inline size_t attention_scratch_bytes(const Attention& a) {
    return attention_delta_bytes(a) + (a.cosine ? (size_t)a.B * a.T * 2 * a.NH * a.HS * sizeof(floatX) : 0);
}

// Four lanes for each of so many rows, 256 threads a block.
static inline unsigned attention_row_blocks(size_t rows) { return (unsigned)div_up(rows, (size_t)64); }

// Where the kernels find q, k and v: in qkv, or, after normalising, in scratch.
static inline AttentionInput attention_input(const floatX* qkv, void* scratch, const Attention& a,
                                             cudaStream_t stream) {
    const size_t C = (size_t)a.NH * a.HS, tokens = (size_t)a.B * a.T;
    AttentionInput in = {qkv, qkv + C, qkv + 2 * C, 3 * C, 3 * C, a.T, a.NH, a.scale};
    if (a.cosine) {
        floatX* unit = (floatX*)((char*)scratch + attention_delta_bytes(a));
        attention_unit_kernel<<<attention_row_blocks(tokens * 2 * a.NH), 256, 0, stream>>>(unit, qkv, tokens, a.NH,
                                                                                           a.HS);
        cuda_check_launch();
        in.q = unit;
        in.k = unit + C;
        in.qk_stride = 2 * C;
    }
    return in;
}

// out (B, T, NH, HS); lse (B, NH, T): log of the sum of exponentials, for the backward pass; qkv (B, T, 3, NH, HS)
static inline void attention_forward(floatX* out, float* lse, const floatX* qkv, void* scratch, const Attention& a,
                                     cudaStream_t stream) {
    const AttentionInput in = attention_input(qkv, scratch, a, stream);
    attention_with_head_size(a.HS, [&](auto size) {
        constexpr int HS = decltype(size)::value;
        attention_launch<ForwardBlock<HS>>(attention_forward_kernel<HS>, a, stream, out, lse, in);
    });
}

// dqkv (B, T, 3, NH, HS), not over qkv: gradient at qkv (B, T, 3, NH, HS); dout, out (B, T, NH, HS); lse (B, NH, T)
static inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const float* lse,
                                      const floatX* qkv, void* scratch, const Attention& a, cudaStream_t stream) {
    const size_t tokens = (size_t)a.B * a.T;
    const AttentionInput in = attention_input(qkv, scratch, a, stream);
    float* delta = (float*)scratch;
    attention_delta_kernel<<<attention_row_blocks(tokens * a.NH), 256, 0, stream>>>(delta, dout, out, a.B, a.T, a.NH,
                                                                                    a.HS);
    cuda_check_launch();
    attention_with_head_size(a.HS, [&](auto size) {
        constexpr int HS = decltype(size)::value;
        attention_launch<BackwardKVBlock<HS>>(attention_backward_kv_kernel<HS>, a, stream, dqkv, dout, lse,
                                              (const float*)delta, in);
        attention_launch<BackwardQBlock<HS>>(attention_backward_q_kernel<HS>, a, stream, dqkv, dout, lse,
                                             (const float*)delta, in);
    });
    if (a.cosine) {
        attention_unit_backward_kernel<<<attention_row_blocks(tokens * 2 * a.NH), 256, 0, stream>>>(dqkv, qkv, tokens,
                                                                                                    a.NH, a.HS);
        cuda_check_launch();
    }
}

#endif
