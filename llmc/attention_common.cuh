/*
What every version of attention (attention.cuh) shares: its description, and the kernels that work on single rows of heads: delta
for the backward pass, and the normalisation of cosine attention. Those read and write each row once, so memory bounds them.
*/
#ifndef LLMC_ATTENTION_COMMON_CUH
#define LLMC_ATTENTION_COMMON_CUH

#include "cuda_common.cuh"

// One layer's attention.
struct Attention {
    int B, T, NH, HS;
    float scale; // of the scores: attn_mult / sqrt(HS)
    bool cosine;
    bool portable = false; // true: without the kernels for compute capability 9.0, to compare with them
};

// What the kernels read: head h of example b has its rows at q + (b * T * qk_stride + h * HS) and so on.
typedef struct {
    const floatX *q, *k; // (B, T, NH, HS), rows of tokens qk_stride apart
    const floatX* v;     // (B, T, NH, HS), rows of tokens v_stride apart
    size_t qk_stride, v_stride;
    int T, NH;
    float scale;
} AttentionInput;

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

// Two numbers as bf16 in one register, a in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const unsigned*>(&pair);
}
// What that takes from a and b, in units of 2^-8 of their last places, from -128 to 127 (a tie upwards, 128, too), in two bytes, a
// in the lower.
__device__ __forceinline__ unsigned pack_remainders(float a, float b) {
    const unsigned rounded = pack_bf16(a, b);
    const int of_a = (int)(__float_as_uint(a) - (rounded << 16)),
              of_b = (int)(__float_as_uint(b) - (rounded & ~0xffffu));
    return (min((of_a + 128) >> 8, 127) & 0xff) | (min((of_b + 128) >> 8, 127) & 0xff) << 8;
}
// The number before it was rounded, to 16 significant bits.
__device__ __forceinline__ float unrounded(floatX rounded, int8_t remainder) {
    return __uint_as_float(((unsigned)__bfloat16_as_ushort(rounded) << 16) + ((unsigned)(int)remainder << 8));
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Rows of single heads: four lanes to a row

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
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

// dout . (out and its remainder) of the row (HS) at `at` over its four lanes, in each of them; 0 where not valid. remainder: or
// NULL
__device__ __forceinline__ float quad_delta(const floatX* dout, const floatX* out, const int8_t* remainder, size_t at,
                                            int HS, bool valid) {
    dout += at;
    out += at;
#ifdef PRECISION_FP32
    (void)remainder;
    return quad_dot(dout, out, HS, valid);
#else
    if (remainder == NULL) { return quad_dot(dout, out, HS, valid); }
    remainder += at;
    float sum = 0;
    for (int i = threadIdx.x % 4 * 8; valid && i < HS; i += 4 * 8) {
        const Vec16<floatX> x = load16(dout + i), y = load16(out + i);
        const uint2 bytes = *reinterpret_cast<const uint2*>(remainder + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum += (float)x[j] * unrounded(y[j], (int8_t)((j < 4 ? bytes.x : bytes.y) >> j % 4 * 8));
        }
    }
    return quad_sum(sum);
#endif
}

// delta (B, NH, T) of each head; dout, out, remainder (B, T, NH, HS)
static __global__ __launch_bounds__(256) void attention_delta_kernel(float* delta, const floatX* dout,
                                                                     const floatX* out, const int8_t* remainder, int B,
                                                                     int T, int NH, int HS) {
    const size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 4;
    const bool valid = row < (size_t)B * T * NH;
    const float sum = quad_delta(dout, out, remainder, row * HS, HS, valid);
    if (valid && threadIdx.x % 4 == 0) {
        const size_t token = row / NH, b = token / T;
        delta[(b * NH + row % NH) * T + token % T] = sum;
    }
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

#endif
