/*
What every GPU operation stands on: error checks, the activation type, 16-byte vectors, sums over warps and blocks.

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
// Sums and maxima

// Of the 32 lanes, in every lane; always the same order.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) { x += __shfl_xor_sync(0xffffffff, x, offset); }
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) { x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset)); }
    return x;
}

// Of all threads of a block (a multiple of 32, at most 1024), in every thread. scratch: (32) floats of shared memory,
// free for other use after the next __syncthreads().
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) { scratch[warp] = x; }
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) { scratch[warp] = x; }
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

#endif
