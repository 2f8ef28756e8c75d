/*
Causal self-attention without a T x T buffer, forward and backward, for any B, T and NH and every head size divisible by 16
up to 128, on sm_80 and later.

    s_ij = scale * q_i . k_j,  p_ij = exp(s_ij - lse_i) for j <= i,  o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . o_i),  dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i

The forward pass keeps a running maximum and sum for each query (Milakov & Gimelshein 2018, arXiv 1805.02867), in blocks of
keys (Dao 2023, arXiv 2307.08691); the backward pass recomputes the probabilities from lse. Cosine attention divides q and k by
their norms first (at least 1e-12, as torch.nn.functional.normalize has it): both are normalised into scratch memory,
and the gradient goes back through the normalisation in place.

dq has a kernel of its own, which computes the scores once more: seven products in place of five, but no sums between blocks.

    attention_common.cuh           what all versions share; the kernels that work on single rows
    attention_portable.cuh         bf16 on the tensor cores of sm_80 and later, every head size
    attention_hopper.cuh           bf16 on compute capability 9.0 (sm_90a), heads of 64 and 128: forward
    attention_hopper_backward.cuh  the same: backward
    attention_fp32.cuh             a PRECISION_FP32 build: fp32 throughout, without tensor cores

This file chooses among them and launches.

In bf16 the forward pass also keeps what rounding took from out, as `remainder`, in a byte each, for do_i . o_i alone. With the
rounded o_i the rows of ds do not add up to zero: every key's score gets a wrong gradient of one sign, which does not average out
where the keys have much in common, and a run at a high learning rate can explode (Qiu & Yao 2025, arXiv 2510.04212; the README
has a measurement of ours).

Bytes: forward reads qkv and writes out and remainder, B*T*C * 4.5 activations, plus lse; backward reads qkv twice, dout three times
and out and remainder once, and writes dqkv. Floor: the products, 4*B*NH*T*T*HS/2 operations forward and 2.5 times that backward
(the seven products make 3.5).

Numerical contract: products of bf16 with fp32 sums; probabilities and ds are rounded to bf16 as operands; the softmax, lse and all
sums are fp32, and every output is rounded once (under cosine attention also q^, k^ and their gradients, between kernels). The order of
every sum follows from the shapes alone, without atomics on floats. scale must be positive.
*/
#ifndef LLMC_ATTENTION_CUH
#define LLMC_ATTENTION_CUH

#include "attention_common.cuh"
#ifdef PRECISION_FP32
#include "attention_fp32.cuh"
#else
#include "attention_hopper.cuh"
#include "attention_hopper_backward.cuh"
#include "attention_portable.cuh"
#endif
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Calls f with the head size as a compile-time constant.
template <class F> void attention_with_head_size(int HS, F f) {
    switch (HS) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 48: return f(std::integral_constant<int, 48>());
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 112: return f(std::integral_constant<int, 112>());
    case 128: return f(std::integral_constant<int, 128>());
    default: fatal("attention on the GPU needs a head size divisible by 16, at most 128, not %d; change -e", HS);
    }
}

// Launches kernel with one block of threads for each Block::ROWS rows of each head.
template <class Block, class... Kernel, class... Args>
void attention_launch(void (*kernel)(Kernel...), const Attention& a, cudaStream_t stream, Args... args) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)Block::SHARED));
    kernel<<<div_up(a.T, (int)Block::ROWS) * a.B * a.NH, Block::THREADS, Block::SHARED, stream>>>(args...);
    cuda_check_launch();
}

// Whether the kernels for compute capability 9.0 do it.
static inline bool attention_on_hopper(const Attention& a) {
#ifdef PRECISION_FP32
    (void)a;
    return false;
#else
    return !a.portable && (a.HS == 64 || a.HS == 128) && hopper_available();
#endif
}

// Of the scratch memory's first part: delta, for compute capability 9.0 with lse.
static inline size_t attention_delta_bytes(const Attention& a) {
    size_t bytes = (size_t)a.B * a.NH * a.T * sizeof(float);
#ifndef PRECISION_FP32
    if (attention_on_hopper(a)) { bytes = attention_backward_hopper_statistics_bytes(a); }
#endif
    return div_up(bytes, (size_t)256) * 256;
}
// Bytes of scratch memory that attention_forward and attention_backward need: that part, then the normalised q and k.
static inline size_t attention_scratch_bytes(const Attention& a) {
    return attention_delta_bytes(a) + (a.cosine ? (size_t)a.B * a.T * 2 * a.NH * a.HS * sizeof(floatX) : 0);
}

// Four lanes for each of so many rows, 256 threads a block.
static inline unsigned attention_row_blocks(size_t rows) { return (unsigned)div_up(rows, (size_t)64); }

// Where the kernels find q, k and v: in qkv, or, after normalising, in scratch.
static inline AttentionInput attention_input(const floatX* qkv, void* scratch, const Attention& a,
                                             cudaStream_t stream) {
    const size_t C = (size_t)a.NH * a.HS, tokens = (size_t)a.B * a.T;
    AttentionInput in = {qkv, qkv + C, qkv + 2 * C, 3 * C, 3 * C, a.T, a.NH, a.scale};
    if (a.cosine) {
        floatX* unit = (floatX*)((char*)scratch + attention_delta_bytes(a));
        attention_unit_kernel<<<attention_row_blocks(tokens * 2 * a.NH), 256, 0, stream>>>(unit, qkv, tokens, a.NH,
                                                                                           a.HS);
        cuda_check_launch();
        in.q = unit;
        in.k = unit + C;
        in.qk_stride = 2 * C;
    }
    return in;
}

// out (B, T, NH, HS); for the backward pass remainder (B, T, NH, HS), what rounding took from out in units of 2^-8 of its last
// place, aligned to 16 bytes, or NULL, and lse (B, NH, T), the log of the sum of exponentials; qkv (B, T, 3, NH, HS). In fp32
// remainder is not written.
static inline void attention_forward(floatX* out, int8_t* remainder, float* lse, const floatX* qkv, void* scratch,
                                     const Attention& a, cudaStream_t stream) {
    const AttentionInput in = attention_input(qkv, scratch, a, stream);
#ifndef PRECISION_FP32
    if (attention_on_hopper(a)) { return attention_forward_hopper(out, remainder, lse, in, scratch, a, stream); }
#endif
    attention_with_head_size(a.HS, [&](auto size) {
        constexpr int HS = decltype(size)::value;
        attention_launch<ForwardBlock<HS>>(attention_forward_kernel<HS>, a, stream, out, remainder, lse, in);
    });
}

// dqkv (B, T, 3, NH, HS), not over qkv: gradient at qkv (B, T, 3, NH, HS); dout, out (B, T, NH, HS); remainder (B, T, NH, HS) or
// NULL: then delta is that of the rounded out; lse (B, NH, T)
static inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const int8_t* remainder,
                                      const float* lse, const floatX* qkv, void* scratch, const Attention& a,
                                      cudaStream_t stream) {
    const size_t tokens = (size_t)a.B * a.T;
    const AttentionInput in = attention_input(qkv, scratch, a, stream);
    if (attention_on_hopper(a)) {
#ifndef PRECISION_FP32
        attention_backward_hopper(dqkv, dout, out, remainder, lse, in, scratch, a, stream);
#endif
    } else {
        float* delta = (float*)scratch;
        attention_delta_kernel<<<attention_row_blocks(tokens * a.NH), 256, 0, stream>>>(delta, dout, out, remainder,
                                                                                        a.B, a.T, a.NH, a.HS);
        cuda_check_launch();
        attention_with_head_size(a.HS, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            attention_launch<BackwardBlock<HS, true>>(attention_backward_kernel<HS, true>, a, stream, dqkv, dout, lse,
                                                      (const float*)delta, in);
            attention_launch<BackwardBlock<HS, false>>(attention_backward_kernel<HS, false>, a, stream, dqkv, dout, lse,
                                                       (const float*)delta, in);
        });
    }
    if (a.cosine) {
        attention_unit_backward_kernel<<<attention_row_blocks(tokens * 2 * a.NH), 256, 0, stream>>>(dqkv, qkv, tokens,
                                                                                                    a.NH, a.HS);
        cuda_check_launch();
    }
}

#endif
