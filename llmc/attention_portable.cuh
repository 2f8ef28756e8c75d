/*
Attention (attention.cuh) in bf16 on the tensor cores of sm_80 and every later device, for head sizes divisible by 16 up to 128.

A block of threads holds a block of rows (queries; in the kernel for dk and dv keys, on transposed scores) and walks over the
other side in tiles that arrive by cp.async one tile ahead. A warp has 16 or 32 rows to itself, so that the scores that one
product leaves in its accumulators are at once an operand of the next: probabilities never pass through shared memory.
*/
#ifndef LLMC_ATTENTION_PORTABLE_CUH
#define LLMC_ATTENTION_PORTABLE_CUH

#include "attention_common.cuh"
#include "hopper.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

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

// The rows that a block of threads has to itself, of them a warp's, and the head they belong to.
template <int HS, class Block> struct BlockRows {
    int bh, h;           // the head's number among all, and in its example
    int start, warp_row; // first row; the warp's first row, counted from there
    int first;           // start + warp_row
    size_t C, token;     // NH * HS; the example's first token
    // last_first: where later rows have more to do, they begin.
    __device__ __forceinline__ BlockRows(const AttentionInput& in, bool last_first) {
        const int blocks = div_up(in.T, Block::ROWS), block = blockIdx.x % blocks;
        bh = blockIdx.x / blocks;
        h = bh % in.NH;
        start = (last_first ? blocks - 1 - block : block) * Block::ROWS;
        warp_row = threadIdx.x / WARP * Block::MT * 16;
        first = start + warp_row;
        C = (size_t)in.NH * HS;
        token = (size_t)(bh / in.NH) * in.T;
    }
};

// Rows first .. of a, then of b, into one stage of a ring of two.
template <int HS, class Block>
__device__ __forceinline__ void load_tiles(floatX* ring, const floatX* a, size_t a_stride, const floatX* b,
                                           size_t b_stride, int first, int T) {
    constexpr int TILE = Block::TILE, SIZE = TILE * padded_row<HS>();
    floatX* stage = ring + first / TILE % 2 * (2 * SIZE);
    load_tile<HS, TILE, Block::THREADS>(stage, a, a_stride, first, T);
    load_tile<HS, TILE, Block::THREADS>(stage + SIZE, b, b_stride, first, T);
}

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
            const float shift = exp2_approx((top[m][half] - most) * c), base = most * c;
            top[m][half] = most;
            float total = 0;
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[m][n][i] = exp2_approx(fmaf(s[m][n][i], c, -base));
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

    const BlockRows<HS, Block> rows(in, true);
    const int T = in.T, first = rows.first, keys = min(rows.start + Block::ROWS, T), lane = threadIdx.x % WARP;
    in = attention_head<HS>(in, rows.bh);

    auto load_kv = [&](int k0) { load_tiles<HS, Block>(kv_tiles, in.k, in.qk_stride, in.v, in.v_stride, k0, T); };
    load_tile<HS, Block::ROWS, Block::THREADS>(q_tile, in.q, in.qk_stride, rows.start, T);
    load_kv(0);
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, Block::KEPT> q;
    q.open(q_tile + rows.warp_row * LD);

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
            if (lane % 4 == 0 && t < T) { lse[(size_t)rows.bh * T + t] = top[m][half] * in.scale + logf(total); }
        }
    }
    store_rows<HS, MT>(out + rows.token * rows.C + rows.h * HS, rows.C, acc, inverse, q_tile + rows.warp_row * LD,
                       first, T);
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

    const BlockRows<HS, Block> rows(in, true);
    const int T = in.T, first = rows.first, keys = min(rows.start + Block::ROWS, T), lane = threadIdx.x % WARP;
    in = attention_head<HS>(in, rows.bh);
    dout += rows.token * rows.C + rows.h * HS;

    auto load_kv = [&](int k0) { load_tiles<HS, Block>(kv_tiles, in.k, in.qk_stride, in.v, in.v_stride, k0, T); };
    load_tile<HS, Block::ROWS, Block::THREADS>(q_tile, in.q, in.qk_stride, rows.start, T);
    load_tile<HS, Block::ROWS, Block::THREADS>(do_tile, dout, rows.C, rows.start, T);
    load_kv(0);
    float row_lse[MT][2], row_delta[MT][2]; // lse in units of base 2
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + m * 16 + half * 8 + lane / 4;
            row_lse[m][half] = t < T ? lse[(size_t)rows.bh * T + t] * ATTENTION_LOG2E : 0;
            row_delta[m][half] = t < T ? delta[(size_t)rows.bh * T + t] : 0;
        }
    }
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, HS / 16> q, d;
    q.open(q_tile + rows.warp_row * LD);
    d.open(do_tile + rows.warp_row * LD);

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
                            exp2_approx(fmaf(s[m][n][i], c, -row_lse[m][i / 2])) * (dp[m][n][i] - row_delta[m][i / 2]);
                    }
                }
            }
            accumulate<HS, MT, STEP>(dq, s, tile);
        }
    }
    float factor[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) { factor[m][0] = factor[m][1] = in.scale; }
    store_rows<HS, MT>(dqkv + rows.token * 3 * rows.C + rows.h * HS, 3 * rows.C, dq, factor,
                       q_tile + rows.warp_row * LD, first, T);
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
                s[m][n][i] = exp2_approx(fmaf(s[m][n][i], c, -column_lse[i % 2]));
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

    const BlockRows<HS, Block> rows(in, false);
    const int T = in.T, first = rows.first;
    in = attention_head<HS>(in, rows.bh);
    dout += rows.token * rows.C + rows.h * HS;
    lse += (size_t)rows.bh * T;
    delta += (size_t)rows.bh * T;

    auto load_queries = [&](int q0) {
        const int stage = q0 / TILE % 2, row = threadIdx.x % TILE;
        load_tiles<HS, Block>(q_tiles, in.q, in.qk_stride, dout, rows.C, q0, T);
        const bool valid = q0 + row < T;
        if (threadIdx.x < 2 * TILE) { // zeros past T: such a query has p = 1, but dout and ds are zero
            cp_async4(statistics + stage * 2 * TILE + threadIdx.x,
                      (threadIdx.x < TILE ? lse : delta) + (valid ? q0 + row : 0), valid);
        }
    };
    load_tile<HS, Block::ROWS, Block::THREADS>(k_tile, in.k, in.qk_stride, rows.start, T);
    load_tile<HS, Block::ROWS, Block::THREADS>(v_tile, in.v, in.v_stride, rows.start, T);
    load_queries(rows.start);
    cp_async_wait();
    __syncthreads();
    WarpRows<HS, MT, Block::KEPT> k, v;
    k.open(k_tile + rows.warp_row * LD);
    v.open(v_tile + rows.warp_row * LD);

    float dk[MT][HS / 8][4], dv[MT][HS / 8][4];
    zero_rows<HS, MT>(dk);
    zero_rows<HS, MT>(dv);
    const float c = in.scale * ATTENTION_LOG2E;
#pragma unroll 1
    for (int q0 = rows.start; q0 < T; q0 += TILE) {
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
    floatX* dk_rows = dqkv + rows.token * 3 * rows.C + rows.C + rows.h * HS;
    store_rows<HS, MT>(dk_rows, 3 * rows.C, dk, factor, k_tile + rows.warp_row * LD, first, T);
    store_rows<HS, MT>(dk_rows + rows.C, 3 * rows.C, dv, one, v_tile + rows.warp_row * LD, first, T);
}

#endif
