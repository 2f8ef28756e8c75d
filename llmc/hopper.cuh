/*
The instructions that only compute capability 9.0 has (sm_90a), as far as attention needs them: copies of whole tiles by the
copy engine (TMA) that report to a barrier in shared memory (mbarrier), and products of a warpgroup, four warps, whose
operands lie in shared memory (wgmma). PTX ISA 8.0, sections "Tensor copy", "mbarrier" and "Asynchronous warpgroup level
matrix multiply-accumulate".

A matrix lies in shared memory as panels: 64 columns of bf16, so rows of 128 bytes, one below the other. In row r the eight
units of 16 bytes change places: unit u lies at u ^ r % 8 (the 128-byte swizzle), so that neither eight rows of one unit nor one row
meet in the same banks. A matrix of 128 columns is two panels, one after the other. A panel starts at a multiple of 1024 bytes.

Everything here is for bf16 operands and float sums. Built for sm_90 instead of sm_90a, a program does not compile.
*/
#ifndef LLMC_HOPPER_CUH
#define LLMC_HOPPER_CUH

#include "cuda_common.cuh"
#include <cuda.h>
#include <stdint.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compute capability 9.0 needs -gencode=arch=compute_90a,code=sm_90a: sm_90 lacks wgmma"
#endif

enum { WARPGROUP = 4 * WARP, PANEL_COLUMNS = 64, PANEL_ROW_BYTES = 128, PANEL_ALIGNMENT = 1024 };

// ---------------------------------------------------------------------------------------------------------------------
// On the host: may the kernels run, and the tensor maps that tell the copy engine what lies where

// Whether this program holds code for sm_90a and the current device runs it.
static inline bool hopper_available() {
    const int built_for[] = {__CUDA_ARCH_LIST__};
    bool built = false;
    for (int arch : built_for) { built = built || arch == 900; }
    int device, major, minor;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return built && major == 9 && minor == 0;
}

// The driver's cuTensorMapEncodeTiled, found through the runtime, so that nothing links with libcuda.
static inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    cuda_check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) { fatal("CUDA: the driver lacks cuTensorMapEncodeTiled; update it"); }
    return (decltype(&cuTensorMapEncodeTiled))function;
}

// Of x (B, T, heads, HS), rows of tokens row_stride numbers apart, in panels of `rows` tokens by 64 columns of one head. Outside
// of 0 .. T - 1 it reads zeros. x must be aligned to 16 bytes.
static inline CUtensorMap head_tensor_map(const __nv_bfloat16* x, int B, int T, int heads, int HS, size_t row_stride,
                                          int rows) {
    static const decltype(&cuTensorMapEncodeTiled) encode = tensor_map_encoder();
    CUtensorMap map;
    const cuuint64_t row = row_stride * sizeof(*x);
    const cuuint64_t sizes[4] = {(cuuint64_t)HS, (cuuint64_t)T, (cuuint64_t)heads, (cuuint64_t)B};
    const cuuint64_t strides[3] = {row, HS * sizeof(*x), T * row}; // of all but the first
    const cuuint32_t box[4] = {PANEL_COLUMNS, (cuuint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void*)x, sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        fatal("CUDA: no tensor map for B %d, T %d, %d heads of %d (error %d)", B, T, heads, HS, (int)result);
    }
    return map;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory. A phase ends when so many threads have arrived and the bytes that were announced have come. Its
// phases are counted from 0; parity is the lowest bit of the phase waited for.

// One thread; then mbarrier_fence(), and __syncthreads() before anybody else uses it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Once for each warp, when all its lanes have come here. A build for compute-sanitizer's racecheck (-DRACECHECK) lets every lane
// arrive: the tool does not see that __syncwarp orders what the others read before the arrival of the first.
#ifdef RACECHECK
enum { WARP_ARRIVALS = WARP };
#else
enum { WARP_ARRIVALS = 1 };
#endif
__device__ __forceinline__ void warp_arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % WARP < WARP_ARRIVALS) { mbarrier_arrive(barrier); }
}

// A place in a ring of SIZE buffers, and the parity of its round.
template <int SIZE> struct RingPlace {
    int at;
    unsigned parity;
    __device__ __forceinline__ void advance() {
        if (++at == SIZE) {
            at = 0;
            parity ^= 1;
        }
    }
};

// The place of buffer number n, counted from the beginning.
template <int SIZE> __device__ __forceinline__ RingPlace<SIZE> ring_place(int n) {
    return {n % SIZE, (unsigned)(n / SIZE) % 2};
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies of panels, each begun by one thread

// A panel from columns column on of token t on of this head of example b. It arrives at the barrier.
__device__ __forceinline__ void panel_load(void* panel, const CUtensorMap* map, uint64_t* barrier, int column, int t,
                                           int head, int b) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
                 "%6}], [%2];" ::"r"(shared_address(panel)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(t), "r"(head), "r"(b)
                 : "memory");
}
// Plain bytes, a multiple of 16, both ends aligned to 16. They arrive at the barrier.
__device__ __forceinline__ void bytes_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Registers

// They change hands between warpgroups: all four warps call it. COUNT: what each thread has then, a multiple of 8
template <int COUNT> __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// x, the same in all lanes of the warp: now the compiler knows it too, and keeps what follows from it in uniform registers, from which
// products take their operands' addresses.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// ---------------------------------------------------------------------------------------------------------------------
// Products of a warpgroup: d (64, N) = or += a (64, 16 K) @ b (16 K, N)
//
// Of d, warp w of the four holds rows 16 w .. 16 w + 15; of these lane l holds, in d[4 n .. 4 n + 3], row l / 4, columns 8 n + 2 (l % 4) +
// {0, 1}, and the same of row l / 4 + 8. That is also how a lane gives a 16 columns wide piece of a from registers: two
// neighbouring n of an accumulator, packed to bf16, are an operand.
//
// An operand in shared memory is either as wide as the sum is long (its rows are rows of a, or columns of b: OPERAND_ROWS), or its
// rows run along the sum (OPERAND_COLUMNS, the transposed one).

enum OperandMajor { OPERAND_ROWS, OPERAND_COLUMNS };

// Describes an operand that starts at `panel`; panel_rows: rows of each of its panels.
__device__ __forceinline__ uint64_t operand(const void* panel, int panel_rows) {
    return (uint64_t)(shared_address(panel) / 16) | (uint64_t)(panel_rows * PANEL_ROW_BYTES / 16) << 16 |
           (uint64_t)(8 * PANEL_ROW_BYTES / 16) << 32 | (uint64_t)1 << 62;
}
// What to add to it for the k-th 16 of the sum.
template <OperandMajor MAJOR> __device__ __forceinline__ uint64_t operand_step(int k, int panel_rows) {
    return MAJOR == OPERAND_COLUMNS
               ? k * 16 * PANEL_ROW_BYTES / 16
               : k * 16 / PANEL_COLUMNS * panel_rows * PANEL_ROW_BYTES / 16 + k * 16 % PANEL_COLUMNS * 2 / 16;
}

// Before the first product after ordinary code wrote its accumulators or its operands in registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Ordinary code that reads or writes r stays on its side of this point.
template <int N> __device__ __forceinline__ void pin_registers(float (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) { asm volatile("" : "+f"(r[i])::"memory"); }
}
// Until at most PENDING groups are under way. d: what the finished ones wrote.
template <int PENDING, int N> __device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    pin_registers(d);
}

#define WGMMA_REGISTERS_8(d, i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define WGMMA_REGISTERS_32(d, i)                                                                                       \
    WGMMA_REGISTERS_8(d, i), WGMMA_REGISTERS_8(d, i + 8), WGMMA_REGISTERS_8(d, i + 16), WGMMA_REGISTERS_8(d, i + 24)
#define WGMMA_REGISTERS_64(d, i) WGMMA_REGISTERS_32(d, i), WGMMA_REGISTERS_32(d, i + 32)
#define WGMMA_TEXT_32                                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_64                                                                                                  \
    WGMMA_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "  \
                  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// One instruction, 16 of the sum, for N columns in COUNT = N / 2 registers. add: to d; or else d is what it gives. P0 .. P6: the
// numbers of the parameters after the registers of d.
#define WGMMA_DEFINE(N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                                             \
    template <OperandMajor A, OperandMajor B>                                                                          \
    __device__ __forceinline__ void wgmma(float(&d)[COUNT], uint64_t a, uint64_t b, bool add) {                        \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P2 ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_TEXT_##COUNT                   \
                     "}, " P0 ", " P1 ", add, 1, 1, " P3 ", " P4 ";\n}\n"                                              \
                     : WGMMA_REGISTERS_##COUNT(d, 0)                                                                   \
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)A), "n"((int)B));                                       \
    }                                                                                                                  \
    template <OperandMajor B>                                                                                          \
    __device__ __forceinline__ void wgmma(float(&d)[COUNT], const unsigned(&a)[4], uint64_t b, bool add) {             \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P5 ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_TEXT_##COUNT                   \
                     "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", add, 1, 1, " P6 ";\n}\n"                            \
                     : WGMMA_REGISTERS_##COUNT(d, 0)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B));                \
    }
WGMMA_DEFINE(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA_DEFINE(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")

// d (64, N) = or += a (64, 16 K) @ b (16 K, N), in K instructions. A_ROWS, B_ROWS: rows of the operands' panels.
template <int K, OperandMajor A, int A_ROWS, OperandMajor B, int B_ROWS, int COUNT>
__device__ __forceinline__ void wgmma_product(float (&d)[COUNT], const void* a, const void* b, bool add) {
    const uint64_t a0 = operand(a, A_ROWS), b0 = operand(b, B_ROWS);
#pragma unroll
    for (int k = 0; k < K; k++) {
        wgmma<A, B>(d, a0 + operand_step<A>(k, A_ROWS), b0 + operand_step<B>(k, B_ROWS), add || k > 0);
    }
}
// The same with a in registers.
template <int K, OperandMajor B, int B_ROWS, int COUNT>
__device__ __forceinline__ void wgmma_product(float (&d)[COUNT], const unsigned (&a)[K][4], const void* b, bool add) {
    const uint64_t b0 = operand(b, B_ROWS);
#pragma unroll
    for (int k = 0; k < K; k++) { wgmma<B>(d, a[k], b0 + operand_step<B>(k, B_ROWS), add || k > 0); }
}

#endif
