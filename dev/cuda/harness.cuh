/*
What the programs in dev/cuda share: each checks one GPU operation against a plain double implementation on the CPU, then
times it beside its floor.

    nvcc -std=c++17 -O3 -I. -gencode=arch=compute_90a,code=sm_90a dev/cuda/layernorm.cu -o build/cuda_layernorm
    build/cuda_layernorm            checks, then the table of times; closes with `N passed, N failed`
    build/cuda_layernorm check      checks only (for compute-sanitizer)

A check compares by ||out - ref|| / ||ref||; NaN never passes; outputs are filled with NaN before the operation runs. A time
is the median of many runs, and every run works on other buffers, so that nothing is read from the second-level cache
that the run before left there. The floor is the time that a large copy needs for the bytes that the operation must move.
*/
#ifndef DEV_CUDA_HARNESS_CUH
#define DEV_CUDA_HARNESS_CUH

#include "llmc/cuda_common.cuh"
#include "llmc/rand.h"
#include <algorithm>
#include <math.h>
#include <vector>

static int checks_passed = 0, checks_failed = 0;

// The closing line; the exit status.
static inline int check_summary() {
    printf("%d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed == 0 && checks_passed > 0 ? 0 : 1;
}

static inline bool check_that(bool ok, const char* what) {
    ok ? checks_passed++ : checks_failed++;
    if (!ok) { printf("FAILED %s\n", what); }
    return ok;
}

static inline float to_float(float x) { return x; }
static inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// ---------------------------------------------------------------------------------------------------------------------
// Device memory

// n numbers on the device, filled with NaN bits.
template <class T> T* device_alloc(size_t n) {
    T* p;
    cuda_check(cudaMalloc((void**)&p, n * sizeof(T)));
    cuda_check(cudaMemset(p, 0xff, n * sizeof(T)));
    return p;
}

template <class T> T* device_copy(const std::vector<T>& host) {
    T* p = device_alloc<T>(host.size());
    cuda_check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <class T> std::vector<T> host_copy(const T* device, size_t n) {
    std::vector<T> host(n);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

// n random numbers, normal with this mean and standard deviation, rounded to T.
template <class T> std::vector<T> random_normal(size_t n, double mean, double std, uint64_t seed) {
    std::vector<T> x(n);
    uint64_t state = seed;
    for (size_t i = 0; i < n; i++) {
        const double u = 1 - splitmix64_uniform(&state), v = splitmix64_uniform(&state);
        x[i] = (T)(float)(mean + std * sqrt(-2 * log(u)) * cos(2 * M_PI * v));
    }
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

// ||out - ref|| / ||ref||, or ||out|| if all of ref is zero. As many numbers in both.
template <class T> double relative_error(const std::vector<T>& out, const std::vector<double>& ref) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < ref.size(); i++) {
        const double d = (double)to_float(out[i]) - ref[i];
        error += d * d;
        norm += ref[i] * ref[i];
    }
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

// As many numbers as in ref, and their relative error is at most tolerance; false and a line if not.
template <class T>
bool check_close(const char* what, const std::vector<T>& out, const std::vector<double>& ref, double tolerance) {
    if (out.size() != ref.size()) {
        checks_failed++;
        printf("FAILED %s: %zu numbers, expected %zu\n", what, out.size(), ref.size());
        return false;
    }
    const double relative = relative_error(out, ref);
    const bool ok = relative <= tolerance;
    ok ? checks_passed++ : checks_failed++;
    if (!ok) { printf("FAILED %s: relative error %.3e, allowed %.3e\n", what, relative, tolerance); }
    return ok;
}

template <class T> bool check_same_bits(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
    return check_that(a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0, what);
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

// Median microseconds of run(i), i counting the runs: the caller takes buffer set i % sets, enough sets to overflow the L2.
template <class Run> double median_us(Run run, int runs = 60) {
    cudaEvent_t start, stop;
    cuda_check(cudaEventCreate(&start));
    cuda_check(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < runs + 10; i++) {
        cuda_check(cudaEventRecord(start));
        run(i);
        cuda_check(cudaEventRecord(stop));
        cuda_check(cudaEventSynchronize(stop));
        float ms;
        cuda_check(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 10) { times.push_back(ms * 1e3f); }
    }
    cuda_check(cudaEventDestroy(start));
    cuda_check(cudaEventDestroy(stop));
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

// How many sets of `bytes` exceed four times the L2, at least 2.
static inline int buffer_sets(size_t bytes) {
    cudaDeviceProp device;
    cuda_check(cudaGetDeviceProperties(&device, 0));
    return std::max(2, (int)(4 * (size_t)device.l2CacheSize / bytes + 1));
}

// Bytes a second of a large device-to-device copy, read and written bytes together.
static inline double copy_bandwidth() {
    const size_t n = (size_t)2 << 30;
    char *a = device_alloc<char>(n), *b = device_alloc<char>(n);
    const double us = median_us([&](int) { cuda_check(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice)); }, 20);
    cuda_check(cudaFree(a));
    cuda_check(cudaFree(b));
    return 2.0 * (double)n / us * 1e6;
}

// One line of the table: a time beside the floor that `bytes` at `bandwidth` set.
static inline void print_row(const char* what, double us, double bytes, double bandwidth) {
    const double floor_us = bytes / bandwidth * 1e6;
    printf("%-56s %9.1f us  floor %8.1f us  %5.1f%%  %7.0f GB/s\n", what, us, floor_us, 100 * floor_us / us,
           bytes / us / 1e3);
}

#endif
