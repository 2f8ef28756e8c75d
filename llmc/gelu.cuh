/*
GELU (Hendrycks & Gimpel 2016) in two forms:

    tanh   x/2 (1 + tanh(u)) = x sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3)
    erf    x Phi(x),  Phi(-|x|) = p(t) exp(-x^2/2),  t = 1 / (1 + 0.36 |x|), p a polynomial of degree 7

p is a least-maximum fit of Phi(-|x|) exp(x^2/2) over |x| < 13: relative error 8e-7, so that values far to the left keep their
digits. exp and 1/x are the hardware's approximations (2 ulp); in fp32 every result above 1e-20 is within 3e-5 of its own
size, and most are within 1e-6.

forward   reads 2, writes 2 bytes a number (bf16): floor at 65,536 x 3072 0.8 GB
backward  reads dout and inp, writes dinp and once more the output, which the next weight gradient needs: 1.6 GB
*/
#ifndef LLMC_GELU_CUH
#define LLMC_GELU_CUH

#include "cuda_common.cuh"
#include "model.h"

enum { GELU_THREADS = 256, GELU_VECTORS = 2 }; // a thread's vectors of 16 bytes, all loaded before any is used

// 1/x within 1 ulp. What is below the smallest normal number counts as 0; infinity and NaN are kept.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The value, and the derivative in *slope.
template <int FORM> __device__ __forceinline__ float gelu_one(float x, float* slope) {
    const float x2 = x * x;
    if (FORM == GELU_ERF) {
        const float t = reciprocal_approx(1 + 0.36f * fabsf(x));
        const float e = exp2_approx(-0.5f * LOG2E * x2);
        float p = 0.04746522630778263f;
        p = p * t - 0.18116451298875108f;
        p = p * t + 0.18285982651580512f;
        p = p * t + 0.025235961418527606f;
        p = p * t + 0.140199552530535f;
        p = p * t + 0.1416845842670594f;
        p = p * t + 0.14371930083437187f;
        // Phi(-|x|), never fused with 1 - tail, so that all kernels give the same bits.
        const float tail = __fmul_rn(p * t, e);
        const float phi = x < 0 ? tail : 1 - tail;
        *slope = phi + x * (0.39894228040143267794f * e);
        return x * phi;
    }
    const float a = 2 * 0.79788456080286535588f; // 2u = x (a + 0.044715 a x^2)
    const float s = reciprocal_approx(1 + exp2_approx(x * (-LOG2E * a - LOG2E * 0.044715f * a * x2)));
    *slope = s + x * (s - s * s) * (a + 3 * 0.044715f * a * x2);
    return x * s;
}

// out = gelu(inp), and if BACKWARD dinp = dout * gelu'(inp) in place of dout; n vectors of 16 bytes
template <int FORM, bool BACKWARD>
__global__ void __launch_bounds__(GELU_THREADS)
    gelu_kernel(floatX* __restrict__ dout_dinp, floatX* __restrict__ out, const floatX* __restrict__ inp, size_t n) {
    constexpr int W = Vec16<floatX>::size;
    const size_t first = (size_t)blockIdx.x * (GELU_THREADS * GELU_VECTORS) + threadIdx.x;
    Vec16<floatX> x[GELU_VECTORS], d[GELU_VECTORS];
#pragma unroll
    for (int j = 0; j < GELU_VECTORS; j++) {
        const size_t i = first + j * GELU_THREADS;
        if (i >= n) { break; }
        x[j] =
            BACKWARD ? load16_once(inp + i * W) : load16(inp + i * W); // the backward pass comes back to forward's inp
        if (BACKWARD) { d[j] = load16(dout_dinp + i * W); }
    }
#pragma unroll
    for (int j = 0; j < GELU_VECTORS; j++) {
        const size_t i = first + j * GELU_THREADS;
        if (i >= n) { break; }
        for (int k = 0; k < W; k++) {
            float slope;
            x[j][k] = (floatX)gelu_one<FORM>((float)x[j][k], &slope);
            if (BACKWARD) { d[j][k] = (floatX)((float)d[j][k] * slope); }
        }
        store16(out + i * W, x[j]);
        if (BACKWARD) { store16(dout_dinp + i * W, d[j]); }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// form: GELU_TANH or GELU_ERF; n: numbers, a multiple of 8; arrays aligned to 16 bytes

// dout_dinp (NULL if not BACKWARD), out, inp (n)
template <bool BACKWARD>
static inline void gelu_launch(floatX* dout_dinp, floatX* out, const floatX* inp, int form, size_t n,
                               cudaStream_t stream) {
    const size_t vectors = n / Vec16<floatX>::size;
    const unsigned blocks = (unsigned)div_up(vectors, (size_t)(GELU_THREADS * GELU_VECTORS));
    const auto kernel = form == GELU_ERF ? gelu_kernel<GELU_ERF, BACKWARD> : gelu_kernel<GELU_TANH, BACKWARD>;
    kernel<<<blocks, GELU_THREADS, 0, stream>>>(dout_dinp, out, inp, vectors);
    cuda_check_launch();
}

// out = gelu(inp)
// out, inp (n)
static inline void gelu_forward(floatX* out, const floatX* inp, int form, size_t n, cudaStream_t stream) {
    gelu_launch<false>(NULL, out, inp, form, n, stream);
}

// dinp = dout * gelu'(inp) in place of dout; out = gelu(inp) again, with the bits of gelu_forward
// dout_dinp, out, inp (n)
static inline void gelu_backward(floatX* dout_dinp, floatX* out, const floatX* inp, int form, size_t n,
                                 cudaStream_t stream) {
    gelu_launch<true>(dout_dinp, out, inp, form, n, stream);
}

#endif
