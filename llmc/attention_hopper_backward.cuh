/*
The backward pass of causal attention on compute capability 9.0 (sm_90a), for heads of 64 and 128. What is computed and its
numerical contract are those of attention.cuh; instructions and panels are those of hopper.cuh.

Two kernels of one text. In the one for dk and dv (KEYS) the rows of the scores are keys and the columns queries, in the
one for dq the other way about:

    KEYS   s = k q^T, dp = v dout^T,  p = exp(s - lse), ds = p (dp - delta),  dv += p dout, dk += ds q
    else   s = q k^T, dp = dout v^T,  p = exp(s - lse), ds = p (dp - delta),                dq += ds k

Both compute s and dp: seven products in place of five, but no sum leaves the registers of the warpgroup that owns its rows,
so nothing is added between blocks, in whatever order, and neither p nor ds passes through shared memory.

A block of threads stays on its multiprocessor and walks over pairs of blocks of 128 rows, the n-th with the n-th last: each
pair has the same number of tiles. One thread of the first warpgroup fetches the rows and then, around a ring of stages, tiles
of 64 columns, far ahead of the others; each of the two other warpgroups owns 64 of the rows. Products run behind a
warpgroup's back: while it finds ds of tile j the tensor cores compute the scores of tile j + 1 and add p of tile j, and while
it takes the exponentials of tile j + 1 they add ds of tile j.

Bytes: qkv and dout are read by both kernels (a head's rows again for each of its blocks, but from the second-level cache), dout,
out and its remainder once more for delta, dqkv is written once. Floor: the seven products, 14*B*NH*T*T*HS/2 operations.
*/
#ifndef LLMC_ATTENTION_HOPPER_BACKWARD_CUH
#define LLMC_ATTENTION_HOPPER_BACKWARD_CUH

#include "attention_hopper.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// lse and delta of each query, as the kernels read them

enum { BACKWARD_TILE = 64, BACKWARD_RECORD = 2 * BACKWARD_TILE };

// For each head and each tile of 64 queries a record: 64 lse in units of base 2, then 64 delta.
static inline size_t attention_backward_hopper_statistics_bytes(const Attention& a) {
    return (size_t)a.B * a.NH * div_up(a.T, (int)BACKWARD_TILE) * BACKWARD_RECORD * sizeof(float);
}

// statistics (B, NH, tiles, 2, 64) from lse (B, NH, T) and delta of each head; dout, out, remainder (B, T, NH, HS). A block of
// threads for each record, four lanes to a query. Queries past T get an infinite lse: their probabilities are zero.
template <int HS>
__global__ __launch_bounds__(4 * BACKWARD_TILE) void attention_backward_hopper_statistics_kernel(
    float* statistics, const floatX* dout, const floatX* out, const int8_t* remainder, const float* lse, int T,
    int NH) {
    const int tiles = div_up(T, (int)BACKWARD_TILE), row = threadIdx.x / 4;
    const int h = blockIdx.x % NH, tile = blockIdx.x / NH % tiles, b = blockIdx.x / NH / tiles;
    const int t = tile * BACKWARD_TILE + row;
    const bool valid = t < T;
    const size_t head = (size_t)b * NH + h, at = valid ? (((size_t)b * T + t) * NH + h) * HS : 0;
    const float delta = quad_delta(dout, out, remainder, at, HS, valid);
    if (threadIdx.x % 4 == 0) {
        float* record = statistics + (head * tiles + tile) * BACKWARD_RECORD + row;
        record[0] = valid ? lse[head * T + t] * LOG2E : INFINITY;
        record[BACKWARD_TILE] = delta;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Shapes

// Shared memory: ROW_BUFFERS times the rows of each warpgroup, two tiles (64, HS); STAGES times two tiles of columns; for each
// stage a record of statistics; barriers.
template <bool KEYS_, int HS_> struct HopperBackward {
    static constexpr bool KEYS = KEYS_;
    static constexpr int HS = HS_, WARPGROUPS = 2, THREADS = (WARPGROUPS + 1) * WARPGROUP;
    // Whether the scores of the next tile begin before ds of this one is found: where the registers suffice.
    static constexpr bool EARLY = !KEYS || HS == 64;
    static constexpr int ROW_BUFFERS = HS == 64 ? 2 : 1, STAGES = HS == 64 ? 6 : 4;
    static constexpr int PANELS = HS / PANEL_COLUMNS, PANEL_BYTES = BACKWARD_TILE * PANEL_ROW_BYTES;
    static constexpr int TILE_BYTES = PANELS * PANEL_BYTES, ROWS_BYTES = WARPGROUPS * 2 * TILE_BYTES;
    static constexpr int RECORD_BYTES = BACKWARD_RECORD * sizeof(float);
    static constexpr int STAGE_BYTES = 2 * TILE_BYTES + (KEYS ? RECORD_BYTES : 0); // what a stage receives
    static constexpr int GIVE = 24, TAKE = 240;                                    // registers
};

// The tensor maps of what is read, in panels of 64 rows.
typedef struct {
    CUtensorMap q, k, v, dout;
} BackwardMaps;

template <class Shape> struct BackwardShared {
    unsigned char rows[Shape::ROW_BUFFERS][Shape::WARPGROUPS][2][Shape::TILE_BYTES];
    unsigned char columns[Shape::STAGES][2][Shape::TILE_BYTES];
    float statistics[Shape::STAGES][BACKWARD_RECORD];
    uint64_t rows_full[Shape::ROW_BUFFERS], rows_empty[Shape::ROW_BUFFERS];
    uint64_t full[Shape::STAGES], empty[Shape::STAGES];
};

// Calls f(bh, block, begin, end) for each block of rows that this block of threads works on: the head b * NH + h, the number of the
// block of rows; tiles begin .. end - 1 are its columns.
template <class Shape, class F> __device__ __forceinline__ void for_each_block_of_rows(int T, int heads, F f) {
    const int tiles = div_up(T, (int)BACKWARD_TILE), blocks = div_up(tiles, Shape::WARPGROUPS);
    const int pairs = div_up(blocks, 2);
#pragma unroll 1
    for (int i = blockIdx.x; i < heads * pairs; i += gridDim.x) {
        const int first = i % pairs, last = blocks - 1 - first;
#pragma unroll 1
        for (int n = 0; n < (first == last ? 1 : 2); n++) {
            const int block = n == 0 ? first : last, diagonal = block * Shape::WARPGROUPS;
            f(i / pairs, block, Shape::KEYS ? diagonal : 0,
              Shape::KEYS ? tiles : min(diagonal + Shape::WARPGROUPS, tiles));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The thread that fetches

template <class Shape>
__device__ __forceinline__ void backward_fetch(BackwardShared<Shape>& shared, const BackwardMaps& maps,
                                               const float* statistics, int T, int NH, int heads) {
    const CUtensorMap* row_maps[2] = {Shape::KEYS ? &maps.k : &maps.q, Shape::KEYS ? &maps.v : &maps.dout};
    const CUtensorMap* column_maps[2] = {Shape::KEYS ? &maps.q : &maps.k, Shape::KEYS ? &maps.dout : &maps.v};
    RingPlace<Shape::ROW_BUFFERS> buffer = {0, 1};
    RingPlace<Shape::STAGES> stage = {0, 1};
    auto load_tile = [&](unsigned char* to, const CUtensorMap* map, uint64_t* barrier, int tile, int bh) {
#pragma unroll
        for (int i = 0; i < Shape::PANELS; i++) {
            panel_load(to + i * Shape::PANEL_BYTES, map, barrier, i * PANEL_COLUMNS, tile * BACKWARD_TILE, bh % NH,
                       bh / NH);
        }
    };
    for_each_block_of_rows<Shape>(T, heads, [&](int bh, int block, int begin, int end) {
        mbarrier_wait(&shared.rows_empty[buffer.at], buffer.parity);
        uint64_t* rows_full = &shared.rows_full[buffer.at];
        mbarrier_expect(rows_full, Shape::ROWS_BYTES);
#pragma unroll
        for (int i = 0; i < Shape::WARPGROUPS * 2; i++) {
            load_tile(shared.rows[buffer.at][i / 2][i % 2], row_maps[i % 2], rows_full,
                      block * Shape::WARPGROUPS + i / 2, bh);
        }
        buffer.advance();
#pragma unroll 1
        for (int tile = begin; tile < end; tile++) {
            mbarrier_wait(&shared.empty[stage.at], stage.parity);
            uint64_t* full = &shared.full[stage.at];
            mbarrier_expect(full, Shape::STAGE_BYTES);
            load_tile(shared.columns[stage.at][0], column_maps[0], full, tile, bh);
            load_tile(shared.columns[stage.at][1], column_maps[1], full, tile, bh);
            if (Shape::KEYS) {
                const size_t record = (size_t)bh * div_up(T, (int)BACKWARD_TILE) + tile;
                bytes_load(shared.statistics[stage.at], statistics + record * BACKWARD_RECORD, Shape::RECORD_BYTES,
                           full);
            }
            stage.advance();
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// The warpgroups that compute

// lse or delta of the query to which an element of a tile of scores belongs: of its column, in shared memory, or (KEYS
// false) of its row, in registers.
template <bool KEYS> struct ScoreStatistic {
    float of_row[2];
    const float* of_column; // this lane's first
    // Of this lane's elements i and i + 1; i is even.
    __device__ __forceinline__ float2 get(int i) const {
        if (KEYS) { return *reinterpret_cast<const float2*>(of_column + i / 4 * 8); }
        return make_float2(of_row[i / 2 % 2], of_row[i / 2 % 2]);
    }
};

// What a warpgroup knows of its rows and of the columns' ring.
template <class Shape> struct BackwardRows {
    const unsigned char (*rows)[Shape::TILE_BYTES]; // k, v or q, dout
    ScoreStatistic<Shape::KEYS> lse, delta;
    RingPlace<Shape::STAGES> stage;
    float c; // scale * log2(e)
};

// Passes over count tiles that hold nothing for this warpgroup.
template <class Shape>
__device__ __forceinline__ void backward_skip(BackwardShared<Shape>& shared, BackwardRows<Shape>& r, int count) {
#pragma unroll 1
    for (int i = 0; i < count; i++, r.stage.advance()) {
        mbarrier_wait(&shared.full[r.stage.at], r.stage.parity);
        warp_arrive(&shared.empty[r.stage.at]);
    }
}

// s (64, 64) = rows @ columns^T
template <class Shape>
__device__ __forceinline__ void score_product(float (&s)[32], const unsigned char* rows, const unsigned char* columns) {
    wgmma_fence();
    wgmma_product<Shape::HS / 16, OPERAND_ROWS, BACKWARD_TILE, OPERAND_ROWS, BACKWARD_TILE>(s, rows, columns, false);
    wgmma_commit();
}
// sum (64, HS) += a (64, 64) @ columns
template <class Shape>
__device__ __forceinline__ void gradient_product(float (&sum)[Shape::HS / 2], const unsigned (&a)[4][4],
                                                 const unsigned char* columns) {
    wgmma_fence();
    wgmma_product<4, OPERAND_COLUMNS, BACKWARD_TILE>(sum, a, columns, true);
    wgmma_commit();
}

// Begins the scores of the tile that comes next.
template <class Shape>
__device__ __forceinline__ void begin_scores(float (&s)[32], BackwardShared<Shape>& shared,
                                             const BackwardRows<Shape>& r) {
    mbarrier_wait(&shared.full[r.stage.at], r.stage.parity);
    score_product<Shape>(s, r.rows[0], shared.columns[r.stage.at][0]);
}

// p = exp(s - lse) of the tile that comes next.
template <class Shape>
__device__ __forceinline__ void probabilities(float (&p)[32], float (&s)[32], BackwardShared<Shape>& shared,
                                              BackwardRows<Shape>& r, bool diagonal) {
    r.lse.of_column = shared.statistics[r.stage.at] + threadIdx.x % 4 * 2;
    if (diagonal) { mask_diagonal<Shape::KEYS>(s); }
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const float2 lse = r.lse.get(i);
        p[i] = exp2_approx(fmaf(s[i], r.c, -lse.x));
        p[i + 1] = exp2_approx(fmaf(s[i + 1], r.c, -lse.y));
    }
}

// One tile with its probabilities p; leaves those of the next one in p, unless it is the LAST. sum1 (64, HS): dk or dq,
// unscaled; sum2 (64, HS): dv. Groups of products are waited for by their number; at the beginning, those for sum2 and sum1 may be
// under way. released: the stage that the latter read, or -1.
template <class Shape, bool LAST>
__device__ __forceinline__ void backward_tile(float (&sum1)[Shape::HS / 2], float (&sum2)[Shape::HS / 2],
                                              float (&p)[32], BackwardShared<Shape>& shared, BackwardRows<Shape>& r,
                                              bool next_diagonal, int released) {
    constexpr bool EARLY = Shape::EARLY && !LAST;
    constexpr int DV = Shape::KEYS ? 1 : 0, AFTER_DP = DV + (EARLY ? 1 : 0), AFTER_S = (EARLY ? DV : 0) + 1;
    const int at = r.stage.at;
    r.delta.of_column = shared.statistics[at] + BACKWARD_TILE + threadIdx.x % 4 * 2;
    r.stage.advance();
    float s[32], dp[32];
    unsigned a[4][4], da[4][4];
    score_product<Shape>(dp, r.rows[1], shared.columns[at][1]);
    if (EARLY) { begin_scores(s, shared, r); }
    if (Shape::KEYS) {
        pack_operand(a, p);
        gradient_product<Shape>(sum2, a, shared.columns[at][1]);
    }
    wgmma_wait<AFTER_DP>(dp);
    if (released >= 0) { warp_arrive(&shared.empty[released]); }
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const float2 delta = r.delta.get(i);
        p[i] *= dp[i] - delta.x;
        p[i + 1] *= dp[i + 1] - delta.y;
    }
    pack_operand(da, p);
    if (!EARLY && !LAST) { begin_scores(s, shared, r); }
    gradient_product<Shape>(sum1, da, shared.columns[at][0]);
    if (!LAST) {
        wgmma_wait<AFTER_S>(s);
        probabilities(p, s, shared, r, next_diagonal);
    }
}

// Tiles begin .. end - 1, at least one; diagonal: the one on the diagonal.
template <class Shape>
__device__ __forceinline__ void backward_tiles(float (&sum1)[Shape::HS / 2], float (&sum2)[Shape::HS / 2],
                                               BackwardShared<Shape>& shared, BackwardRows<Shape>& r, int begin,
                                               int end, int diagonal) {
    float s[32], p[32];
    begin_scores(s, shared, r);
    wgmma_wait<0>(s);
    probabilities(p, s, shared, r, begin == diagonal);
    int released = -1;
#pragma unroll 1
    for (int tile = begin + 1; tile < end; tile++) {
        const int at = r.stage.at;
        backward_tile<Shape, false>(sum1, sum2, p, shared, r, tile == diagonal, released);
        released = at;
    }
    const int at = r.stage.at;
    backward_tile<Shape, true>(sum1, sum2, p, shared, r, false, released);
    wgmma_wait<0>(sum1);
    if (Shape::KEYS) { pin_registers(sum2); }
    warp_arrive(&shared.empty[at]);
}

template <class Shape>
__device__ __forceinline__ void backward_compute(BackwardShared<Shape>& shared, floatX* dqkv, const float* statistics,
                                                 int T, int NH, int heads, float scale) {
    constexpr int HS = Shape::HS;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
    const int warp_row = threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
    const size_t C = (size_t)NH * HS;
    RingPlace<Shape::ROW_BUFFERS> buffer = {0, 0};
    BackwardRows<Shape> r;
    r.stage = {0, 0};
    r.c = scale * LOG2E;
    for_each_block_of_rows<Shape>(T, heads, [&](int bh, int block, int begin, int end) {
        const int tiles = div_up(T, (int)BACKWARD_TILE), diagonal = block * Shape::WARPGROUPS + warpgroup;
        const int own_begin = Shape::KEYS ? min(diagonal, end) : 0;
        const int own_end = Shape::KEYS ? end : diagonal < tiles ? diagonal + 1 : 0;
        if (!Shape::KEYS && own_end > 0) {
            const float* record = statistics + ((size_t)bh * tiles + diagonal) * BACKWARD_RECORD + warp_row;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                r.lse.of_row[half] = record[half * 8];
                r.delta.of_row[half] = record[BACKWARD_TILE + half * 8];
            }
        }
        r.rows = shared.rows[buffer.at][warpgroup];
        mbarrier_wait(&shared.rows_full[buffer.at], buffer.parity);
        backward_skip(shared, r, own_begin - begin);
        float sum1[HS / 2], sum2[HS / 2];
#pragma unroll
        for (int i = 0; i < HS / 2; i++) { sum1[i] = sum2[i] = 0; }
        pin_registers(sum1);
        if (Shape::KEYS) { pin_registers(sum2); }
        if (own_begin < own_end) { backward_tiles<Shape>(sum1, sum2, shared, r, own_begin, own_end, diagonal); }
        backward_skip(shared, r, end - own_end);
        warp_arrive(&shared.rows_empty[buffer.at]);
        buffer.advance();
        floatX* rows = dqkv + (size_t)(bh / NH) * T * 3 * C + bh % NH * HS;
        const float factor[2] = {scale, scale}, one[2] = {1, 1};
        store_sums<HS>(rows + (Shape::KEYS ? C : 0), 3 * C, sum1, factor, diagonal * BACKWARD_TILE, T);
        if (Shape::KEYS) { store_sums<HS>(rows + 2 * C, 3 * C, sum2, one, diagonal * BACKWARD_TILE, T); }
    });
}

// dqkv (B, T, 3, NH, HS): writes dk and dv, or dq. statistics (B * NH = heads, tiles, 2, 64)
template <class Shape>
__global__ __launch_bounds__(Shape::THREADS,
                             1) void attention_backward_hopper_kernel(floatX* dqkv, const float* statistics,
                                                                      const __grid_constant__ BackwardMaps maps, int T,
                                                                      int NH, int heads, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(PANEL_ALIGNMENT) unsigned char shared_bytes[];
    BackwardShared<Shape>& shared = *reinterpret_cast<BackwardShared<Shape>*>(shared_bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::ROW_BUFFERS; i++) {
            mbarrier_init(&shared.rows_full[i], 1);
            mbarrier_init(&shared.rows_empty[i], Shape::WARPGROUPS * 4 * WARP_ARRIVALS);
        }
        for (int i = 0; i < Shape::STAGES; i++) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], Shape::WARPGROUPS * 4 * WARP_ARRIVALS);
        }
        mbarrier_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<Shape::GIVE>();
        if (threadIdx.x == 0) { backward_fetch<Shape>(shared, maps, statistics, T, NH, heads); }
    } else {
        registers_take<Shape::TAKE>();
        backward_compute<Shape>(shared, dqkv, statistics, T, NH, heads, scale);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

template <class Shape>
static void attention_backward_hopper_launch(floatX* dqkv, const float* statistics, const BackwardMaps& maps,
                                             const Attention& a, cudaStream_t stream) {
    const auto kernel = attention_backward_hopper_kernel<Shape>;
    const int bytes = (int)sizeof(BackwardShared<Shape>), heads = a.B * a.NH;
    const int pairs = div_up(div_up(a.T, Shape::WARPGROUPS * (int)BACKWARD_TILE), 2);
    int device, processors;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<min(heads * pairs, processors), Shape::THREADS, bytes, stream>>>(dqkv, statistics, maps, a.T, a.NH, heads,
                                                                              a.scale);
    cuda_check_launch();
}

template <int HS>
static void attention_backward_hopper_head(floatX* dqkv, const floatX* dout, const floatX* out, const int8_t* remainder,
                                           const float* lse, const AttentionInput& in, float* statistics,
                                           const Attention& a, cudaStream_t stream) {
    const int records = a.B * a.NH * div_up(a.T, (int)BACKWARD_TILE);
    attention_backward_hopper_statistics_kernel<HS>
        <<<records, 4 * BACKWARD_TILE, 0, stream>>>(statistics, dout, out, remainder, lse, a.T, a.NH);
    cuda_check_launch();
    auto map = [&](const floatX* x, size_t stride) {
        return head_tensor_map(x, a.B, a.T, a.NH, HS, stride, BACKWARD_TILE);
    };
    const BackwardMaps maps = {map(in.q, in.qk_stride), map(in.k, in.qk_stride), map(in.v, in.v_stride),
                               map(dout, (size_t)a.NH * HS)};
    attention_backward_hopper_launch<HopperBackward<true, HS>>(dqkv, statistics, maps, a, stream);
    attention_backward_hopper_launch<HopperBackward<false, HS>>(dqkv, statistics, maps, a, stream);
}

// attention_backward (attention.cuh) up to the gradients at in.q, in.k and in.v. scratch:
// attention_backward_hopper_statistics_bytes(a), aligned to 16 bytes
static inline void attention_backward_hopper(floatX* dqkv, const floatX* dout, const floatX* out,
                                             const int8_t* remainder, const float* lse, const AttentionInput& in,
                                             void* scratch, const Attention& a, cudaStream_t stream) {
    const auto head = a.HS == 64 ? attention_backward_hopper_head<64> : attention_backward_hopper_head<128>;
    head(dqkv, dout, out, remainder, lse, in, (float*)scratch, a, stream);
}

#endif
