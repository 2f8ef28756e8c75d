/*
What every GPU operation stands on: error checks, the activation type, 16-byte vectors, copies that run ahead, fast
exponentials, sums over warps and blocks.

floatX is the type of weights and activations: bf16, or float in a build with -DPRECISION_FP32. Everything that is summed
(gradients, norms, losses, statistics) is float, and every sum has an order that the shapes alone decide: no float atomics,
so the same inputs give the same bits.
*/
#ifndef LLMC_CUDA_COMMON_CUH
#define LLMC_CUDA_COMMON_CUH

#include "check.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#ifdef PRECISION_FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif

enum { WARP = 32 };

// Ends the program with one line if a CUDA call failed. Status 2, as for every other error.
static inline void cuda_check_at(cudaError_t error, const char* call, const char* file, int line) {
    if (error != cudaSuccess) {
        fatal("CUDA: %s (%s, %s:%d); see whether another program holds the GPU, or take a smaller batch (-b)",
              cudaGetErrorString(error), call, file, line);
    }
}
#define cuda_check(call) cuda_check_at((call), #call, __FILE__, __LINE__)
// After a launch: was it accepted?
#define cuda_check_launch() cuda_check(cudaGetLastError())

template <class T> __host__ __device__ constexpr T div_up(T a, T b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// 16 bytes at a time: the widest access of one thread

template <class T> struct alignas(16) Vec16 {
    static constexpr int size = 16 / sizeof(T);
    T x[size];
    __device__ T& operator[](int i) { return x[i]; }
    __device__ const T& operator[](int i) const { return x[i]; }
};

// p must be aligned to 16 bytes.
template <class T> __device__ __forceinline__ Vec16<T> load16(const T* p) {
    return *reinterpret_cast<const Vec16<T>*>(p);
}
// Data that is read once: does not displace what the caches hold.
template <class T> __device__ __forceinline__ Vec16<T> load16_once(const T* p) {
    const int4 bits = __ldcs(reinterpret_cast<const int4*>(p));
    return *reinterpret_cast<const Vec16<T>*>(&bits);
}
template <class T> __device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
    *reinterpret_cast<Vec16<T>*>(p) = v;
}
// Data that nobody reads soon.
template <class T> __device__ __forceinline__ void store16_once(T* p, const Vec16<T>& v) {
    __stcs(reinterpret_cast<int4*>(p), *reinterpret_cast<const int4*>(&v));
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies from device to shared memory that run beside the thread (cp.async)

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Starts to copy 16 bytes, past the first-level cache, or 4; zeros if not valid, and then nothing is read.
__device__ __forceinline__ void copy16_ahead(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy4_ahead(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups but the newest `pending`, at most 3, have arrived.
__device__ __forceinline__ void copies_wait(int pending) {
    switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    }
}
// Until all that this thread has started has arrived, in groups or not.
__device__ __forceinline__ void copies_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

#define LOG2E 1.4426950408889634f

// 2^x within 2 ulp. What is below the smallest normal number becomes 0; infinity and NaN are kept.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums and maxima

// Of the 32 lanes, in every lane; always the same order. T is any type of number.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) { x += __shfl_xor_sync(0xffffffff, x, offset); }
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) { x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset)); }
    return x;
}

// Of all threads of a block (a multiple of 32, at most 1024), in every thread. scratch: a number for each warp, in shared
// memory, free for other use after the next __syncthreads().
template <class T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) { scratch[warp] = x; }
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : (T)0);
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) { scratch[warp] = x; }
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

enum { PARTIAL_THREADS = 256 };

// One block: *sum += scale * all of partial (count), in double
__global__ void __launch_bounds__(PARTIAL_THREADS)
    partial_sum_kernel(double* sum, const double* partial, double scale, int count) {
    __shared__ double scratch[WARP];
    double x = 0;
    for (int i = threadIdx.x; i < count; i += PARTIAL_THREADS) { x += partial[i]; }
    x = block_sum(x, scratch);
    if (threadIdx.x == 0) { *sum += scale * x; }
}

// What the blocks of a kernel left, one number each, joins *sum.
static inline void partial_sum(double* sum, const double* partial, double scale, int count, cudaStream_t stream) {
    partial_sum_kernel<<<1, PARTIAL_THREADS, 0, stream>>>(sum, partial, scale, count);
    cuda_check_launch();
}

#endif
