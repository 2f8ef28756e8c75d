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

// Rows first .. first + ROWS - 1 of x (T, HS in rows of stride) into tile (ROWS, HS), zeros past T. Arrives at copies_wait_all.
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
            copy16_ahead(to + j * STEP * padded_row<HS>(), from);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS) {
        const int r = i / UNITS, unit = i % UNITS * 8;
        const bool valid = first + r < T;
        copy16_ahead(tile + r * padded_row<HS>() + unit, x + (size_t)(valid ? first + r : 0) * stride + unit, valid);
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

template <int N, int MT> __device__ __forceinline__ void zero_rows(float (&acc)[MT][N / 8][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { acc[m][n][i] = 0; }
        }
    }
}

// s (MT * 16, N) = rows (MT * 16, HS) @ tile (N, HS)^T
template <int HS, int MT, int N, int KEPT>
__device__ __forceinline__ void row_products(float (&s)[MT][N / 8][4], const WarpRows<HS, MT, KEPT>& rows,
                                             const floatX* tile) {
    const int lane = threadIdx.x % WARP;
    const floatX* lane_row = tile + (lane / 16 * 8 + lane % 8) * padded_row<HS>() + lane / 8 % 2 * 8;
    zero_rows<N, MT>(s);
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

// A warp's rows, times factor[m][half] for rows m * 16 + half * 8 + lane / 4, to x (T, HS in rows of stride) from row first on;
// with bytes for Elements what rounding would take from them. stage: MT * 16 rows of shared memory that no other warp uses.
template <int HS, int MT, class Element>
__device__ __forceinline__ void store_rows(Element* x, size_t stride, const float (&acc)[MT][HS / 8][4],
                                           const float (&factor)[MT][2], floatX* stage, int first, int T) {
    constexpr int PAIR = 2 * sizeof(Element), UNITS = HS * sizeof(Element) / 16; // bytes, units of 16 bytes in a row
    const int lane = threadIdx.x % WARP;
    auto stage_row = [&](int r) { return reinterpret_cast<unsigned char*>(stage + r * padded_row<HS>()); };
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned char* row = stage_row(m * 16 + half * 8 + lane / 4) + lane % 4 * PAIR;
            const float f = factor[m][half];
#pragma unroll
            for (int n = 0; n < HS / 8; n++) {
                const float a = acc[m][n][2 * half] * f, b = acc[m][n][2 * half + 1] * f;
                if (sizeof(Element) == 1) {
                    *reinterpret_cast<unsigned short*>(row + n * 4 * PAIR) = (unsigned short)pack_remainders(a, b);
                } else {
                    *reinterpret_cast<unsigned*>(row + n * 4 * PAIR) = pack_bf16(a, b);
                }
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < MT * 16 * UNITS; i += WARP) {
        const int r = i / UNITS, unit = i % UNITS * 16;
        if (first + r < T) {
            unsigned char* row = reinterpret_cast<unsigned char*>(x + (size_t)(first + r) * stride);
            *reinterpret_cast<uint4*>(row + unit) = *reinterpret_cast<const uint4*>(stage_row(r) + unit);
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
    static constexpr int STAGE = 2 * TILE * padded_row<HS>(); // numbers in a stage of the ring: k, v
    static constexpr size_t SHARED = sizeof(floatX) * (ROWS * padded_row<HS>() + 2 * STAGE);
};
// KEYS: see attention_backward_kernel. STEP: columns of scores at a time.
template <int HS, bool KEYS> struct BackwardBlock : WarpsBlock {
    static constexpr int MT = HS <= 64 ? 2 : 1, ROWS = WARPS * MT * 16, TILE = HS <= 64 ? 64 : 32;
    static constexpr int STEP = KEYS && HS <= 64 ? 16 : 32, KEPT = !KEYS || HS < 64 ? HS / 16 : HS == 64 ? 3 : 0;
    static constexpr int STATISTICS = KEYS ? 2 * TILE * sizeof(float) / sizeof(floatX) : 0; // lse, delta
    static constexpr int STAGE = 2 * TILE * padded_row<HS>() + STATISTICS;                  // q, dout or k, v; these
    static constexpr size_t SHARED = sizeof(floatX) * (2 * ROWS * padded_row<HS>() + 2 * STAGE);
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

// What a head's queries, or its keys, put into the products: rows of two tensors.
struct RowPair {
    const floatX* a; // (T, HS) in rows of a_stride: q or k
    size_t a_stride;
    const floatX* b; // the same: dout or v
    size_t b_stride;
};

// Rows first .. first + ROWS - 1 of x.a, then of x.b, into two tiles, one behind the other.
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void load_tiles(floatX* tiles, const RowPair& x, int first, int T) {
    load_tile<HS, ROWS, THREADS>(tiles, x.a, x.a_stride, first, T);
    load_tile<HS, ROWS, THREADS>(tiles + ROWS * padded_row<HS>(), x.b, x.b_stride, first, T);
}

// The stage of a ring of two that holds the tiles of columns column ..
template <class Block> __device__ __forceinline__ floatX* ring_stage(floatX* ring, int column) {
    return ring + column / Block::TILE % 2 * Block::STAGE;
}

// Calls step(column) for each tile of columns from begin up to end, while load(column) of the next is under way; load(begin)
// is the caller's.
template <int TILE, class Load, class Step>
__device__ __forceinline__ void walk_tiles(int begin, int end, Load load, Step step) {
#pragma unroll 1
    for (int column = begin; column < end; column += TILE) {
        copies_wait_all();
        __syncthreads(); // this tile is here, and nobody reads the one before any more
        if (column + TILE < end) { load(column + TILE); }
        step(column);
    }
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

// Minus infinity where the key comes after the query: queries down from row and keys across from column, or, KEYS, keys down
// and queries across.
template <int MT, int N, bool KEYS>
__device__ __forceinline__ void mask_scores(float (&s)[MT][N / 8][4], int row, int column) {
    if (KEYS ? row + MT * 16 - 1 <= column : column + N - 1 <= row) { return; }
    const int lane = threadIdx.x % WARP, below = row + lane / 4 - column - lane % 4 * 2;
    asm volatile(""); // keeps this a branch, which most tiles jump over
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int distance = below + m * 16 + i / 2 * 8 - n * 8 - i % 2; // row minus column
                if (KEYS ? distance > 0 : distance < 0) { s[m][n][i] = -INFINITY; }
            }
        }
    }
}

// out, remainder (B, T, NH, HS), lse (B, NH, T). One block of threads for ROWS queries of a head, the longest first.
template <int HS>
__global__ __launch_bounds__(128, 2) void attention_forward_kernel(floatX* out, int8_t* remainder, float* lse,
                                                                   AttentionInput in) {
    typedef ForwardBlock<HS> Block;
    constexpr int MT = Block::MT, TILE = Block::TILE, LD = padded_row<HS>();
    extern __shared__ __align__(16) unsigned char shared[];
    floatX *q_tile = (floatX*)shared, *ring = q_tile + Block::ROWS * LD;

    const BlockRows<HS, Block> rows(in, true);
    const int T = in.T, first = rows.first, lane = threadIdx.x % WARP;
    in = attention_head<HS>(in, rows.bh);

    auto load_keys = [&](int k0) {
        load_tiles<HS, TILE, Block::THREADS>(ring_stage<Block>(ring, k0), {in.k, in.qk_stride, in.v, in.v_stride}, k0,
                                             T);
    };
    load_tile<HS, Block::ROWS, Block::THREADS>(q_tile, in.q, in.qk_stride, rows.start, T);
    load_keys(0);
    copies_wait_all();
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
    const float c = in.scale * LOG2E;
    walk_tiles<TILE>(0, min(rows.start + Block::ROWS, T), load_keys, [&](int k0) {
        if (first >= T || k0 >= first + MT * 16) { return; }
        const floatX* k_tile = ring_stage<Block>(ring, k0);
        float s[MT][TILE / 8][4];
        row_products<HS, MT, TILE>(s, q, k_tile);
        mask_scores<MT, TILE, false>(s, first, k0);
        softmax_step<HS, MT, TILE>(s, acc, top, sum, c);
        accumulate<HS, MT, TILE>(acc, s, k_tile + TILE * LD);
    });
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
    const size_t at = rows.token * rows.C + rows.h * HS;
    floatX* stage = q_tile + rows.warp_row * LD;
    store_rows<HS, MT>(out + at, rows.C, acc, inverse, stage, first, T);
    if (remainder != NULL) { store_rows<HS, MT>(remainder + at, rows.C, acc, inverse, stage, first, T); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// lse or delta of the query to which an element of a warp's scores belongs: of its column, in shared memory, or (KEYS false) of
// its row, in registers.
template <int MT, bool KEYS> struct QueryStatistic {
    float of_row[MT][2];
    const float* of_column; // this lane's first

    // x (T): that of all queries; row: the warp's first
    __device__ __forceinline__ void open_rows(const float* x, int row, int T) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = row + m * 16 + half * 8 + (int)threadIdx.x % WARP / 4;
                of_row[m][half] = t < T ? x[t] : 0;
            }
        }
    }
    __device__ __forceinline__ void open_columns(const float* x) { of_column = x + threadIdx.x % 4 * 2; }
    // Of elements 2 half and 2 half + 1 of s[m][n].
    __device__ __forceinline__ float2 get(int m, int n, int half) const {
        if (KEYS) { return *reinterpret_cast<const float2*>(of_column + n * 8); }
        return make_float2(of_row[m][half], of_row[m][half]);
    }
};

// From the scores s (rows down from row, columns across from column) and dp to the probabilities, in s, and their gradient,
// in dp. c: scale * log2(e)
template <int MT, int N, bool KEYS>
__device__ __forceinline__ void
backward_probabilities(float (&s)[MT][N / 8][4], float (&dp)[MT][N / 8][4], const QueryStatistic<MT, KEYS>& lse,
                       const QueryStatistic<MT, KEYS>& delta, float c, int row, int column) {
    mask_scores<MT, N, KEYS>(s, row, column);
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 l = lse.get(m, n, half), d = delta.get(m, n, half);
                float *p = &s[m][n][2 * half], *ds = &dp[m][n][2 * half];
                p[0] = exp2_approx(fmaf(p[0], c, -l.x * LOG2E));
                p[1] = exp2_approx(fmaf(p[1], c, -l.y * LOG2E));
                ds[0] = p[0] * (ds[0] - d.x);
                ds[1] = p[1] * (ds[1] - d.y);
            }
        }
    }
}

// One text for two kernels, as on compute capability 9.0 (attention_hopper_backward.cuh has the formulas): with KEYS the rows of
// the scores are keys and the columns queries, and it writes dk and dv; otherwise the other way about, and it writes dq. One
// block of threads for ROWS rows of a head, the longest first.
// dqkv (B, T, 3, NH, HS); dout (B, T, NH, HS); lse, delta (B, NH, T)
template <int HS, bool KEYS>
__global__ __launch_bounds__(128, 2) void attention_backward_kernel(floatX* dqkv, const floatX* dout, const float* lse,
                                                                    const float* delta, AttentionInput in) {
    typedef BackwardBlock<HS, KEYS> Block;
    constexpr int MT = Block::MT, ROWS = Block::ROWS, TILE = Block::TILE, STEP = Block::STEP, LD = padded_row<HS>();
    extern __shared__ __align__(16) unsigned char shared[];
    floatX *a_tile = (floatX*)shared, *b_tile = a_tile + ROWS * LD, *ring = b_tile + ROWS * LD;

    const BlockRows<HS, Block> rows(in, !KEYS);
    const int T = in.T, first = rows.first;
    in = attention_head<HS>(in, rows.bh);
    const RowPair queries = {in.q, in.qk_stride, dout + rows.token * rows.C + rows.h * HS, rows.C};
    const RowPair keys = {in.k, in.qk_stride, in.v, in.v_stride};
    lse += (size_t)rows.bh * T;
    delta += (size_t)rows.bh * T;

    auto load_columns = [&](int column) {
        floatX* stage = ring_stage<Block>(ring, column);
        load_tiles<HS, TILE, Block::THREADS>(stage, KEYS ? queries : keys, column, T);
        if (KEYS && threadIdx.x < 2 * TILE) { // zeros past T: such a query has p = 1, but dout and ds are zero
            const int t = column + threadIdx.x % TILE;
            copy4_ahead((float*)(stage + 2 * TILE * LD) + threadIdx.x,
                        (threadIdx.x < TILE ? lse : delta) + (t < T ? t : 0), t < T);
        }
    };
    const int begin = KEYS ? rows.start : 0;
    load_tiles<HS, ROWS, Block::THREADS>(a_tile, KEYS ? keys : queries, rows.start, T);
    load_columns(begin);
    QueryStatistic<MT, KEYS> score_lse, score_delta;
    if (!KEYS) {
        score_lse.open_rows(lse, first, T);
        score_delta.open_rows(delta, first, T);
    }
    copies_wait_all();
    __syncthreads();
    WarpRows<HS, MT, Block::KEPT> a, b;
    a.open(a_tile + rows.warp_row * LD);
    b.open(b_tile + rows.warp_row * LD);

    float da[MT][HS / 8][4], db[MT][HS / 8][4]; // dk, dv or dq, nothing
    zero_rows<HS, MT>(da);
    zero_rows<HS, MT>(db);
    const float c = in.scale * LOG2E;
    walk_tiles<TILE>(begin, KEYS ? T : min(rows.start + ROWS, T), load_columns, [&](int column) {
        if (first >= T) { return; }
        // the columns of this tile that the warp's rows need
        const int from = KEYS ? max(column, first / STEP * STEP) : column;
        const int to = min(column + TILE, KEYS ? T : first + MT * 16);
        const floatX *stage = ring_stage<Block>(ring, column), *tile = stage + (from - column) * LD;
        const float* statistics = (const float*)(stage + 2 * TILE * LD) + (from - column);
#pragma unroll 1
        for (int j = from; j < to; j += STEP, tile += STEP * LD, statistics += STEP) {
            float s[MT][STEP / 8][4], dp[MT][STEP / 8][4];
            row_products<HS, MT, STEP>(s, a, tile);
            row_products<HS, MT, STEP>(dp, b, tile + TILE * LD);
            if (KEYS) {
                score_lse.open_columns(statistics);
                score_delta.open_columns(statistics + TILE);
            }
            backward_probabilities<MT, STEP, KEYS>(s, dp, score_lse, score_delta, c, first, j);
            if (KEYS) { accumulate<HS, MT, STEP>(db, s, tile + TILE * LD); }
            accumulate<HS, MT, STEP>(da, dp, tile);
        }
    });
    float one[MT][2], factor[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        one[m][0] = one[m][1] = 1;
        factor[m][0] = factor[m][1] = in.scale;
    }
    floatX* gradient = dqkv + rows.token * 3 * rows.C + rows.h * HS + (KEYS ? rows.C : 0);
    store_rows<HS, MT>(gradient, 3 * rows.C, da, factor, a_tile + rows.warp_row * LD, first, T);
    if (KEYS) { store_rows<HS, MT>(gradient + rows.C, 3 * rows.C, db, one, b_tile + rows.warp_row * LD, first, T); }
}

#endif
