/*
What a step decides before its update, all on the device: the norm of every tensor's gradient, the step's loss, whether the
update is applied, and by what factor the gradient is scaled (clipping after Pascanu et al. 2013).

The gradients are one flat fp32 array in the order of the parameter table, sums over examples. The table's tensors are cut
into pieces of at most PIECE numbers; a block takes one piece, here and in adamw.cuh, and finds its tensor in a table of
NUM_ROWS rows that travels in the kernel's arguments (constant memory). Rows that pad the vocabulary belong to no piece:
they are neither read nor written.

Reads 4 bytes a number; writes 8 bytes a piece. Floor: d12 (124 M numbers), 0.5 GB. Sums: up to 32 squares in fp32, from
there on in double, in an order that the shapes alone decide.
*/
#ifndef LLMC_GLOBAL_NORM_CUH
#define LLMC_GLOBAL_NORM_CUH

#include "cuda_common.cuh"
#include "model.h"

enum { PIECE = 8192, PIECE_THREADS = 256, DECISION_THREADS = 256, LOSS_THREADS = 1024 };

// The parameter table as kernels need it. Everything is a multiple of C, so that C % 8 == 0 makes accesses of 16 bytes of
// fp32 and of 8 bytes of bf16 aligned.
typedef struct {
    size_t offset[NUM_ROWS];     // of the row's first tensor in the flat array
    size_t size[NUM_ROWS];       // numbers in one tensor
    size_t used[NUM_ROWS];       // of which these are trained: without the rows that pad the vocabulary
    int first_tensor[NUM_ROWS];  // among all tensors
    int first_piece[NUM_ROWS];   // among all pieces
    int tensor_pieces[NUM_ROWS]; // pieces of one tensor
    float lr_mult[NUM_ROWS], wd_mult[NUM_ROWS], eps_mult[NUM_ROWS]; // wd_mult is 0 where no weight decay applies
    int num_tensors, num_pieces;
} PieceTable;

static inline PieceTable piece_table(const ParamTable* table) {
    PieceTable t;
    t.num_tensors = table->num_tensors;
    t.num_pieces = 0;
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &table->row[r];
        t.offset[r] = row->offset;
        t.size[r] = row->size;
        t.used[r] = (size_t)row->used_rows * (size_t)row->cols;
        t.first_tensor[r] = row->first;
        t.first_piece[r] = t.num_pieces;
        t.tensor_pieces[r] = (int)div_up(t.used[r], (size_t)PIECE);
        t.lr_mult[r] = row->lr_mult;
        t.wd_mult[r] = row->weight_decay ? row->wd_mult : 0;
        t.eps_mult[r] = row->eps_mult;
        t.num_pieces += t.tensor_pieces[r] * row->count;
    }
    return t;
}

// What the step decided; the update reads it, and the host once the step is over.
typedef struct {
    int outcome;                    // STEP_APPLIED or why not
    float grad_scale;               // of the summed gradients: 1/n, less where clipped
    float correction1, correction2; // Adam's 1 / (1 - beta^step)
    double loss;                    // mean over the examples of each example's mean loss
    double grad_norm;               // |mean_b g_b| over all tensors, before clipping
} StepDecision;

typedef struct {
    size_t at; // where the piece starts in the flat array
    int count; // its numbers, 1 to PIECE
    int row;
} Piece;

// first: NUM_ROWS ascending starts. The last row that starts at or before index.
__host__ __device__ __forceinline__ int find_row(const int* first, int index) {
    int row = 0;
    while (row + 1 < NUM_ROWS && index >= first[row + 1]) { row++; }
    return row;
}

__host__ __device__ __forceinline__ Piece find_piece(const PieceTable& t, int index) {
    const int row = find_row(t.first_piece, index), local = index - t.first_piece[row];
    const int layer = local / t.tensor_pieces[row];
    const size_t start = (size_t)(local - layer * t.tensor_pieces[row]) * PIECE, left = t.used[row] - start;
    Piece p;
    p.at = t.offset[row] + (size_t)layer * t.size[row] + start;
    p.count = left < PIECE ? (int)left : PIECE;
    p.row = row;
    return p;
}

// partial[piece] = sum of the piece's squares, one block a piece. partial (num_pieces), grads (num_params)
__global__ void __launch_bounds__(PIECE_THREADS)
    piece_squares_kernel(double* partial, const float* __restrict__ grads, const __grid_constant__ PieceTable table) {
    __shared__ double scratch[WARP];
    const Piece piece = find_piece(table, blockIdx.x);
    const float* g = grads + piece.at;
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < PIECE; j += 4 * PIECE_THREADS) {
        const int i = j + 4 * (int)threadIdx.x;
        if (i < piece.count) {
            const Vec16<float> x = load16(g + i);
            for (int k = 0; k < 4; k++) { sum[k] += x[k] * x[k]; }
        }
    }
    const double total = block_sum((double)((sum[0] + sum[1]) + (sum[2] + sum[3])), scratch);
    if (threadIdx.x == 0) { partial[blockIdx.x] = total; }
}

// sq_sum[tensor] = sum over its pieces, one block a tensor. sq_sum (num_tensors), partial (num_pieces)
__global__ void __launch_bounds__(PIECE_THREADS)
    tensor_squares_kernel(double* sq_sum, const double* __restrict__ partial,
                          const __grid_constant__ PieceTable table) {
    __shared__ double scratch[WARP];
    const int tensor = blockIdx.x, row = find_row(table.first_tensor, tensor), pieces = table.tensor_pieces[row];
    const double* p = partial + table.first_piece[row] + (tensor - table.first_tensor[row]) * pieces;
    double sum = 0;
    for (int i = threadIdx.x; i < pieces; i += PIECE_THREADS) { sum += p[i]; }
    const double total = block_sum(sum, scratch);
    if (threadIdx.x == 0) { sq_sum[tensor] = total; }
}

// One block. loss_sum (1), losses (B*T)
__global__ void __launch_bounds__(LOSS_THREADS)
    loss_add_kernel(double* loss_sum, const float* __restrict__ losses, size_t n, int T) {
    __shared__ double scratch[WARP];
    double sum = 0;
#pragma unroll 8
    for (size_t i = threadIdx.x; i < n; i += LOSS_THREADS) { sum += (double)losses[i]; }
    const double total = block_sum(sum, scratch);
    if (threadIdx.x == 0) { *loss_sum += total / T; }
}

// One block. decision (1), sq_sum (num_tensors), loss_sum (1), hyper (1)
__global__ void __launch_bounds__(DECISION_THREADS)
    step_decide_kernel(StepDecision* decision, const double* __restrict__ sq_sum, const double* __restrict__ loss_sum,
                       const StepHyper* __restrict__ hyper, int num_tensors) {
    __shared__ double scratch[WARP];
    double sum = 0;
    for (int i = threadIdx.x; i < num_tensors; i += DECISION_THREADS) { sum += sq_sum[i]; }
    const double total = block_sum(sum, scratch);
    if (threadIdx.x != 0) { return; }
    const StepHyper h = *hyper;
    const double n = h.n;
    StepDecision d;
    d.loss = *loss_sum / n;
    d.grad_norm = sqrt(total) / n;
    d.outcome = STEP_APPLIED;
    if (!isfinite(d.loss) || !isfinite(d.grad_norm)) {
        d.outcome = STEP_SKIPPED_NONFINITE;
    } else if (d.loss > (double)h.loss_limit) {
        d.outcome = STEP_SKIPPED_LOSS;
    } else if (d.grad_norm > (double)h.grad_norm_limit) {
        d.outcome = STEP_SKIPPED_GRAD;
    }
    const bool clip = h.grad_clip > 0 && d.grad_norm > (double)h.grad_clip;
    d.grad_scale = (float)((clip ? (double)h.grad_clip / d.grad_norm : 1) / n);
    d.correction1 = (float)(1 / (1 - pow((double)h.beta1, (double)h.step)));
    d.correction2 = (float)(1 / (1 - pow((double)h.beta2, (double)h.step)));
    *decision = d;
}

// ---------------------------------------------------------------------------------------------------------------------

// Doubles of scratch memory that global_norm needs.
static inline size_t global_norm_scratch(const PieceTable* table) { return (size_t)table->num_pieces; }

// sq_sum[tensor] = |sum_b g_b|^2
// sq_sum (num_tensors), scratch (global_norm_scratch), grads (num_params)
static inline void global_norm(double* sq_sum, double* scratch, const float* grads, const PieceTable* table,
                               cudaStream_t stream) {
    piece_squares_kernel<<<table->num_pieces, PIECE_THREADS, 0, stream>>>(scratch, grads, *table);
    cuda_check_launch();
    tensor_squares_kernel<<<table->num_tensors, PIECE_THREADS, 0, stream>>>(sq_sum, scratch, *table);
    cuda_check_launch();
}

// A micro-batch's part of the step's loss: *loss_sum += sum_b (1/T) sum_t losses
// loss_sum (1), losses (B, T)
static inline void loss_add(double* loss_sum, const float* losses, int B, int T, cudaStream_t stream) {
    loss_add_kernel<<<1, LOSS_THREADS, 0, stream>>>(loss_sum, losses, (size_t)B * (size_t)T, T);
    cuda_check_launch();
}

// Guards, clipping and bias corrections, once sq_sum and loss_sum are those of the whole step; everything on the device.
// decision (1), sq_sum (num_tensors), loss_sum (1): sum over the examples of their mean losses, hyper (1)
static inline void step_decide(StepDecision* decision, const double* sq_sum, const double* loss_sum,
                               const StepHyper* hyper, int num_tensors, cudaStream_t stream) {
    step_decide_kernel<<<1, DECISION_THREADS, 0, stream>>>(decision, sq_sum, loss_sum, hyper, num_tensors);
    cuda_check_launch();
}

#endif
