/*
AdamW (Loshchilov & Hutter 2019) on the whole parameter table in one launch. With g = grad_scale * gradient:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    w -= lr (m correction1 / (sqrt(v correction2) + eps) + weight_decay w)

Weights, moments and gradients are fp32; the weights that the matrix products read are a second array, w rounded to
the nearest (ties to even) floatX. Learning rate, weight decay and epsilon have a multiplier for each row of the table; rows
that pad the vocabulary are left alone. The factor of the gradient, the bias corrections and whether to do anything
at all come from the StepDecision in device memory (global_norm.cuh), so that the host need not wait in between.

Reads 16 bytes a number (w, m, v, gradient), writes 12 and, with bf16 weights, 2: floor at d12 (124 M numbers) 3.7 GB.
*/
#ifndef LLMC_ADAMW_CUH
#define LLMC_ADAMW_CUH

#include "global_norm.cuh"

// Four neighbours of the copy. p must be aligned to 8 bytes (bf16), 16 bytes (fp32).
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, const Vec16<float>& w) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(w[0], w[1]), high = __floats2bfloat162_rn(w[2], w[3]);
    const uint2 bits = make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
    __stcs(reinterpret_cast<uint2*>(p), bits);
}
__device__ __forceinline__ void store_rounded(float* p, const Vec16<float>& w) { store16(p, w); }

// One block a piece; master, copy, m, v, grads: (num_params), copy may be NULL
__global__ void __launch_bounds__(PIECE_THREADS)
    adamw_kernel(float* __restrict__ master, floatX* __restrict__ copy, float* __restrict__ m, float* __restrict__ v,
                 const float* __restrict__ grads, const StepDecision* __restrict__ decision,
                 const StepHyper* __restrict__ hyper, const __grid_constant__ PieceTable table) {
    const StepDecision d = *decision;
    const StepHyper h = *hyper;
    if (d.outcome != STEP_APPLIED) { return; }
    const Piece piece = find_piece(table, blockIdx.x);
    const float lr = h.lr * table.lr_mult[piece.row], eps = h.eps * table.eps_mult[piece.row];
    const float weight_decay = h.weight_decay * table.wd_mult[piece.row];
    for (int i = 4 * threadIdx.x; i < piece.count; i += 4 * PIECE_THREADS) {
        const size_t at = piece.at + (size_t)i;
        const Vec16<float> grad = load16_once(grads + at);
        Vec16<float> w = load16_once(master + at), m1 = load16_once(m + at), v1 = load16_once(v + at);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float g = grad[k] * d.grad_scale;
            m1[k] = h.beta1 * m1[k] + (1 - h.beta1) * g;
            v1[k] = h.beta2 * v1[k] + (1 - h.beta2) * g * g;
            w[k] -= lr * (m1[k] * d.correction1 / (sqrtf(v1[k] * d.correction2) + eps) + weight_decay * w[k]);
        }
        store16_once(m + at, m1);
        store16_once(v + at, v1);
        store16_once(master + at, w);
        if (copy != NULL) { store_rounded(copy + at, w); }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// One update of every weight, or none if the step is not applied.
// master, m, v, grads (num_params) fp32; copy (num_params), or NULL where the model computes on master itself;
// decision (1) and hyper (1) on the device
static inline void adamw(float* master, floatX* copy, float* m, float* v, const float* grads,
                         const StepDecision* decision, const StepHyper* hyper, const PieceTable* table,
                         cudaStream_t stream) {
    adamw_kernel<<<table->num_pieces, PIECE_THREADS, 0, stream>>>(master, copy, m, v, grads, decision, hyper, *table);
    cuda_check_launch();
}

#endif
