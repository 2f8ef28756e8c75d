/*
The forward pass of causal attention on compute capability 9.0 (sm_90a), for heads of 64 and 128. What is computed and its
numerical contract are those of attention.cuh; instructions and panels are those of hopper.cuh. The division of labour is that of
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).

A block of threads stays on its multiprocessor. One thread of its first warpgroup fetches by the copy engine: the queries of
a block of rows, then tiles of 64 keys and values around a ring of stages, far ahead of the others. Each of the other three
warpgroups owns 64 of the rows. It walks over the tiles from the diagonal, the only one that needs the mask, down to key 0, and keeps
output, running maximum and sum in registers; probabilities never pass through shared memory. While it takes the exponentials
of one tile the tensor cores multiply the one before with its values, and those of the other warpgroups go on as well:
with heads of 64 a tile's exponentials take the special function units as long as its products the tensor cores.

Blocks of rows are counted from the end of the sequence, so that what is left over when T is no multiple of 192 lies where there
are few keys. Whoever is free takes the next block, the longest of each head first: a counter in memory hands them out. What a block
computes does not depend on who does.
*/
#ifndef LLMC_ATTENTION_HOPPER_CUH
#define LLMC_ATTENTION_HOPPER_CUH

#include "attention_common.cuh"
#include "hopper.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// What the forward and the backward kernels share: tiles (64, 64) and sums (64, HS) in a warpgroup's registers

// Minus infinity where the query comes before the key, in the tile (64, 64) on the diagonal.
template <bool KEYS> __device__ __forceinline__ void mask_diagonal(float (&s)[32]) {
    const int lane = threadIdx.x % WARP, below = threadIdx.x % WARPGROUP / WARP * 16 + lane / 4 - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int distance = below + i / 2 % 2 * 8 - i / 4 * 8 - i % 2; // row minus column
        if (KEYS ? distance > 0 : distance < 0) { s[i] = -INFINITY; }
    }
}

// x (64, 64) in bf16, as left operand.
__device__ __forceinline__ void pack_operand(unsigned (&a)[4][4], const float (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) { a[i / 4][i % 4] = pack_bf16(x[2 * i], x[2 * i + 1]); }
}

// Lane i of four holds w[n] = x(i, n) and gets x(n, i).
__device__ __forceinline__ void quad_transpose(unsigned (&w)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (n & step) { continue; }
            const unsigned got = __shfl_xor_sync(0xffffffff, upper ? w[n] : w[n + step], step);
            (upper ? w[n] : w[n + step]) = got;
        }
    }
}

// The warpgroup's rows first .. first + 63, times the factors of rows l / 4 and l / 4 + 8, to x (T, HS in rows of stride).
template <int HS>
__device__ __forceinline__ void store_sums(floatX* x, size_t stride, const float (&sum)[HS / 2],
                                           const float (&factor)[2], int first, int T) {
    const int lane = threadIdx.x % WARP;
    first += threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = first + half * 8;
#pragma unroll
        for (int column = 0; column < HS; column += 32) {
            unsigned w[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int i = column / 2 + n * 4 + half * 2;
                w[n] = pack_bf16(sum[i] * factor[half], sum[i + 1] * factor[half]);
            }
            quad_transpose(w);
            if (t < T) {
                *reinterpret_cast<uint4*>(x + (size_t)t * stride + column + lane % 4 * 8) =
                    make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

// What store_sums takes from them by rounding, to x (T, HS in rows of stride).
template <int HS>
__device__ __forceinline__ void store_remainders(int8_t* x, size_t stride, const float (&sum)[HS / 2],
                                                 const float (&factor)[2], int first, int T) {
    const int lane = threadIdx.x % WARP;
    first += threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = first + half * 8;
#pragma unroll
        for (int column = 0; column < HS; column += 64) {
            unsigned w[4]; // of this half of the columns and, in the upper bits, of the other one
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int i = column / 2 + n * 4 + half * 2, j = i + 16;
                w[n] = pack_remainders(sum[i] * factor[half], sum[i + 1] * factor[half]) |
                       pack_remainders(sum[j] * factor[half], sum[j + 1] * factor[half]) << 16;
            }
            quad_transpose(w);
            if (t < T) {
                uint2* row = reinterpret_cast<uint2*>(x + (size_t)t * stride + column + lane % 4 * 8);
                row[0] = make_uint2(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410));
                row[4] = make_uint2(__byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Shapes

enum { FORWARD_TILE = 64 }; // keys at a time, and rows of a warpgroup

// One block of threads on a multiprocessor: its first warpgroup gives registers to the others.
template <int HS_> struct HopperForward {
    static constexpr int HS = HS_, WARPGROUPS = 3, THREADS = (WARPGROUPS + 1) * WARPGROUP, GIVE = 32, TAKE = 160;
    static constexpr int Q_BUFFERS = 2, STAGES = HS == 64 ? 6 : 4;
    static constexpr int PANELS = HS / PANEL_COLUMNS, PANEL_BYTES = FORWARD_TILE * PANEL_ROW_BYTES;
    static constexpr int TILE_BYTES = PANELS * PANEL_BYTES; // (64, HS)
};

// The tensor maps of what is read, in panels of 64 rows.
typedef struct {
    CUtensorMap q, k, v;
} ForwardMaps;

template <class Shape> struct ForwardShared {
    unsigned char q[Shape::Q_BUFFERS][Shape::WARPGROUPS][Shape::TILE_BYTES];
    unsigned char k[Shape::STAGES][Shape::TILE_BYTES], v[Shape::STAGES][Shape::TILE_BYTES];
    uint64_t q_full[Shape::Q_BUFFERS], q_empty[Shape::Q_BUFFERS];
    uint64_t k_full[Shape::STAGES], k_empty[Shape::STAGES], v_full[Shape::STAGES], v_empty[Shape::STAGES];
    int block[Shape::Q_BUFFERS]; // whose queries these are, or -1: there are no more
};

// Block number `block` of all: tiles of 64 rows first_tile .. first_tile + WARPGROUPS - 1, those below 0 empty, of this head.
typedef struct {
    int bh, first_tile;
} ForwardBlockOfRows;
template <class Shape> __device__ __forceinline__ ForwardBlockOfRows forward_block(int block, int T) {
    const int tiles = div_up(T, (int)FORWARD_TILE), blocks = div_up(tiles, Shape::WARPGROUPS);
    return {block / blocks, tiles - (block % blocks + 1) * Shape::WARPGROUPS};
}

// ---------------------------------------------------------------------------------------------------------------------
// The thread that fetches

// next: counter of the blocks given out beyond each block of threads' first
template <class Shape>
__device__ __forceinline__ void forward_fetch(ForwardShared<Shape>& shared, const ForwardMaps& maps, int* next, int T,
                                              int NH, int blocks) {
    RingPlace<Shape::Q_BUFFERS> buffer = {0, 1};
    RingPlace<Shape::STAGES> stage = {0, 1};
    int block = blockIdx.x;
    while (true) {
        mbarrier_wait(&shared.q_empty[buffer.at], buffer.parity);
        uint64_t* q_full = &shared.q_full[buffer.at];
        shared.block[buffer.at] = block < blocks ? block : -1;
        if (block >= blocks) {
            mbarrier_arrive(q_full);
            return;
        }
        const ForwardBlockOfRows rows = forward_block<Shape>(block, T);
        auto load_tile = [&](unsigned char* to, const CUtensorMap* map, uint64_t* barrier, int tile) {
#pragma unroll
            for (int i = 0; i < Shape::PANELS; i++) {
                panel_load(to + i * Shape::PANEL_BYTES, map, barrier, i * PANEL_COLUMNS, tile * FORWARD_TILE,
                           rows.bh % NH, rows.bh / NH);
            }
        };
        mbarrier_expect(q_full, Shape::WARPGROUPS * Shape::TILE_BYTES);
        for (int i = 0; i < Shape::WARPGROUPS; i++) {
            load_tile(shared.q[buffer.at][i], &maps.q, q_full, rows.first_tile + i);
        }
        buffer.advance();
        block = gridDim.x + atomicAdd(next, 1);
        for (int tile = rows.first_tile + Shape::WARPGROUPS - 1; tile >= 0; tile--) {
            mbarrier_wait(&shared.k_empty[stage.at], stage.parity);
            mbarrier_expect(&shared.k_full[stage.at], Shape::TILE_BYTES);
            load_tile(shared.k[stage.at], &maps.k, &shared.k_full[stage.at], tile);
            mbarrier_wait(&shared.v_empty[stage.at], stage.parity);
            mbarrier_expect(&shared.v_full[stage.at], Shape::TILE_BYTES);
            load_tile(shared.v[stage.at], &maps.v, &shared.v_full[stage.at], tile);
            stage.advance();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The warpgroups that compute

// Running statistics of the two rows of which a lane holds parts.
typedef struct {
    float top[2]; // maximum of the unscaled scores
    float sum[2]; // this lane's part of the sum of exponentials
} ForwardRows;

// Scores s (64, 64) to probabilities, unnormalised. shift: what the sums so far are multiplied with; c: scale * log2(e)
__device__ __forceinline__ void softmax_tile(float (&s)[32], ForwardRows& rows, float (&shift)[2], float c) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most[2] = {rows.top[half], rows.top[half]};
#pragma unroll
        for (int i = 2 * half; i < 32; i += 4) {
            most[0] = fmaxf(most[0], s[i]);
            most[1] = fmaxf(most[1], s[i + 1]);
        }
        float top = fmaxf(most[0], most[1]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        shift[half] = exp2_approx((rows.top[half] - top) * c);
        rows.top[half] = top;
        const float base = top * c;
        float sum[2] = {0, 0};
#pragma unroll
        for (int i = 2 * half; i < 32; i += 4) {
            s[i] = exp2_approx(fmaf(s[i], c, -base));
            s[i + 1] = exp2_approx(fmaf(s[i + 1], c, -base));
            sum[0] += s[i];
            sum[1] += s[i + 1];
        }
        rows.sum[half] = rows.sum[half] * shift[half] + (sum[0] + sum[1]);
    }
}

// o (64, HS) = sum of p @ v over tiles diagonal .. 0, unnormalised. q: (64, HS); k_at, v_at: where the ring holds the first of them
template <class Shape>
__device__ __forceinline__ void
forward_tiles(float (&o)[Shape::HS / 2], ForwardRows& rows, ForwardShared<Shape>& shared, const unsigned char* q,
              RingPlace<Shape::STAGES> k_at, RingPlace<Shape::STAGES> v_at, int diagonal, float c) {
    float s[32], shift[2];
    unsigned p[4][4];
    auto begin_scores = [&]() {
        mbarrier_wait(&shared.k_full[k_at.at], k_at.parity);
        wgmma_fence();
        wgmma_product<Shape::HS / 16, OPERAND_ROWS, FORWARD_TILE, OPERAND_ROWS, FORWARD_TILE>(s, q, shared.k[k_at.at],
                                                                                              false);
        wgmma_commit();
    };
    auto end_scores = [&]() {
        warp_arrive(&shared.k_empty[k_at.at]);
        k_at.advance();
    };
    auto begin_output = [&]() {
        mbarrier_wait(&shared.v_full[v_at.at], v_at.parity);
        wgmma_fence();
        wgmma_product<4, OPERAND_COLUMNS, FORWARD_TILE>(o, p, shared.v[v_at.at], true);
        wgmma_commit();
    };
    auto end_output = [&]() {
        wgmma_wait<0>(o);
        warp_arrive(&shared.v_empty[v_at.at]);
        v_at.advance();
    };
#pragma unroll
    for (int i = 0; i < Shape::HS / 2; i++) { o[i] = 0; }
    begin_scores();
    wgmma_wait<0>(s);
    end_scores();
    mask_diagonal<false>(s);
    softmax_tile(s, rows, shift, c);
    pack_operand(p, s);
#pragma unroll 1
    for (int tile = diagonal - 1; tile >= 0; tile--) {
        begin_scores(); // of this tile
        begin_output(); // of the one before
        wgmma_wait<1>(s);
        end_scores();
        softmax_tile(s, rows, shift, c);
        end_output();
#pragma unroll
        for (int i = 0; i < Shape::HS / 2; i++) { o[i] *= shift[i / 2 % 2]; }
        pack_operand(p, s);
    }
    begin_output();
    end_output();
}

// The warpgroup's rows first .. first + 63 of a head: out and remainder (B, T, NH, HS), lse (B, NH, T) from what forward_tiles
// left
template <class Shape>
__device__ __forceinline__ void forward_store(floatX* out, int8_t* remainder, float* lse,
                                              const float (&o)[Shape::HS / 2], const ForwardRows& rows, int bh,
                                              int first, int T, int NH, float scale) {
    const size_t stride = (size_t)NH * Shape::HS, at = (size_t)(bh / NH) * T * stride + bh % NH * Shape::HS;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = quad_sum(rows.sum[half]);
        const int t = first + threadIdx.x % WARPGROUP / WARP * 16 + half * 8 + threadIdx.x % WARP / 4;
        inverse[half] = 1 / sum;
        if (threadIdx.x % 4 == 0 && t < T) { lse[(size_t)bh * T + t] = rows.top[half] * scale + logf(sum); }
    }
    store_sums<Shape::HS>(out + at, stride, o, inverse, first, T);
    if (remainder != NULL) { store_remainders<Shape::HS>(remainder + at, stride, o, inverse, first, T); }
}

template <class Shape>
__device__ __forceinline__ void forward_compute(ForwardShared<Shape>& shared, floatX* out, int8_t* remainder,
                                                float* lse, int T, int NH, float scale) {
    const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
    RingPlace<Shape::Q_BUFFERS> buffer = {0, 0};
    int fetched = 0; // tiles of all blocks before
    while (true) {
        mbarrier_wait(&shared.q_full[buffer.at], buffer.parity);
        const int block = uniform(shared.block[buffer.at]);
        if (block < 0) { return; }
        const ForwardBlockOfRows rows = forward_block<Shape>(block, T);
        const int diagonal = rows.first_tile + warpgroup, tiles = rows.first_tile + Shape::WARPGROUPS;
        RingPlace<Shape::STAGES> at = ring_place<Shape::STAGES>(fetched);
        fetched += tiles;
        for (int tile = tiles - 1; tile > max(diagonal, -1); tile--) { // keys after all of this warpgroup's rows
            mbarrier_wait(&shared.k_full[at.at], at.parity);
            warp_arrive(&shared.k_empty[at.at]);
            mbarrier_wait(&shared.v_full[at.at], at.parity);
            warp_arrive(&shared.v_empty[at.at]);
            at.advance();
        }
        if (diagonal >= 0) {
            float o[Shape::HS / 2];
            ForwardRows r = {{-INFINITY, -INFINITY}, {0, 0}};
            forward_tiles<Shape>(o, r, shared, shared.q[buffer.at][warpgroup], at, at, diagonal, scale * LOG2E);
            forward_store<Shape>(out, remainder, lse, o, r, rows.bh, diagonal * FORWARD_TILE, T, NH, scale);
        }
        warp_arrive(&shared.q_empty[buffer.at]);
        buffer.advance();
    }
}

// out, remainder (B, T, NH, HS), lse (B, NH, T); next: 0
template <class Shape>
__global__ __launch_bounds__(Shape::THREADS,
                             1) void attention_forward_hopper_kernel(floatX* out, int8_t* remainder, float* lse,
                                                                     const __grid_constant__ ForwardMaps maps,
                                                                     int* next, int T, int NH, int blocks,
                                                                     float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(PANEL_ALIGNMENT) unsigned char shared_bytes[];
    ForwardShared<Shape>& shared = *reinterpret_cast<ForwardShared<Shape>*>(shared_bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::Q_BUFFERS; i++) {
            mbarrier_init(&shared.q_full[i], 1);
            mbarrier_init(&shared.q_empty[i], Shape::WARPGROUPS * 4 * WARP_ARRIVALS);
        }
        for (int i = 0; i < Shape::STAGES; i++) {
            mbarrier_init(&shared.k_full[i], 1);
            mbarrier_init(&shared.v_full[i], 1);
            mbarrier_init(&shared.k_empty[i], Shape::WARPGROUPS * 4 * WARP_ARRIVALS);
            mbarrier_init(&shared.v_empty[i], Shape::WARPGROUPS * 4 * WARP_ARRIVALS);
        }
        mbarrier_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<Shape::GIVE>();
        if (threadIdx.x == 0) { forward_fetch<Shape>(shared, maps, next, T, NH, blocks); }
    } else {
        registers_take<Shape::TAKE>();
        forward_compute<Shape>(shared, out, remainder, lse, T, NH, scale);
    }
#endif
}

template <class Shape>
static void attention_forward_hopper_launch(floatX* out, int8_t* remainder, float* lse, const AttentionInput& in,
                                            void* scratch, const Attention& a, cudaStream_t stream) {
    const auto kernel = attention_forward_hopper_kernel<Shape>;
    const int tiles = div_up(a.T, (int)FORWARD_TILE), blocks = div_up(tiles, Shape::WARPGROUPS) * a.B * a.NH;
    auto map = [&](const floatX* x, size_t stride) {
        return head_tensor_map(x, a.B, a.T, a.NH, a.HS, stride, FORWARD_TILE);
    };
    const ForwardMaps maps = {map(in.q, in.qk_stride), map(in.k, in.qk_stride), map(in.v, in.v_stride)};
    int device, processors;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const int bytes = (int)sizeof(ForwardShared<Shape>);
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cuda_check(cudaMemsetAsync(scratch, 0, sizeof(int), stream));
    kernel<<<min(blocks, processors), Shape::THREADS, bytes, stream>>>(out, remainder, lse, maps, (int*)scratch, a.T,
                                                                       a.NH, blocks, a.scale);
    cuda_check_launch();
}

// attention_forward (attention.cuh) from in on. scratch: 4 bytes
static inline void attention_forward_hopper(floatX* out, int8_t* remainder, float* lse, const AttentionInput& in,
                                            void* scratch, const Attention& a, cudaStream_t stream) {
    const auto launch = a.HS == 64 ? attention_forward_hopper_launch<HopperForward<64>>
                                   : attention_forward_hopper_launch<HopperForward<128>>;
    launch(out, remainder, lse, in, scratch, a, stream);
}

#endif
