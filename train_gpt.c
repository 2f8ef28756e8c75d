/*
The CPU trainer: GPT-2 forward and backward by hand, on OpenMP and the compiler's vector extensions.

Read it from top to bottom:
    1. GEMM            one packed, blocked matrix product; everything below is built on its inner kernel
    2. Kernels         op_forward and op_backward for each operation of the model
    3. The model       buffers, forward, backward, update
    4. The backend     the model as llmc/train.h's loop wants it, and main()

Notation in shape comments: B examples of T tokens, C channels, NH heads of HS = C/NH channels, V vocabulary (Vp rows in
memory), L layers, OC output channels. All matrices are row-major. Weight matrices are stored (OC, C): out = inp @ weight^T.

Numerical contract: every number is computed by one thread in an order that depends on the shapes alone, so the results
are the same bits for any number of threads. Sums that leave a kernel (norms, losses) are double. Everything else is
`real`: float, or double where a test says so before it includes this file.

Per-example norms (arXiv 2411.00999): a kernel that computes a weight gradient takes a `double* sum_sq`. Where it is not
NULL, the kernel also adds sum_b |g_b|^2 to it, g_b being example b's own contribution to that gradient.
*/

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "llmc/train.h"

#ifndef REAL
#define REAL float
#endif
typedef REAL real;
enum { REAL_IS_DOUBLE = sizeof(real) == 8 };

static inline int max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static inline int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------------------------------
// 1. GEMM
//
// C (M, N) = or += alpha * A (M, K) @ B (K, N), blocked as in Goto & van de Geijn 2008. Blocks of A and B are copied
// ("packed") into panels that the inner kernel reads front to back: A in panels of MR rows, [panel][k][MR]; B in panels of
// NR columns, [panel][k][NR]; short panels are filled up with zeros, so the inner kernel knows no edges. It keeps an
// MR x NR tile of C in registers: each step of k loads NR/lanes vectors of B and broadcasts MR numbers of A.

#if defined(__AVX512F__)
enum { VEC_BYTES = 64, MR = 8, NR_VECS = 3 }; // 24 of 32 registers hold the tile
#elif defined(__AVX__)
enum { VEC_BYTES = 32, MR = 4, NR_VECS = 3 }; // 12 of 16
#else
enum { VEC_BYTES = 16, MR = 4, NR_VECS = 4 }; // NEON: 16 of 32
#endif
_Static_assert((int)(NR_VECS* VEC_BYTES / sizeof(REAL)) % MR == 0, "attention packs NR keys into panels of MR");
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real vec_unaligned __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real))));
enum { LANES = VEC_BYTES / sizeof(real), NR = NR_VECS * LANES };

// Block sizes. A packed block of A and one of B (1.1 MiB each in float) stay in a core's second-level cache or close to it.
enum { BLOCK_MN = 768, BLOCK_K = 384, TASK_M = 96, TASK_N = 4 * NR };

// tile (MR, NR) = a^T @ b over k steps; a is a packed panel of A, b one of B.
static inline void gemm_tile(int k, const real* a, const real* b, real* tile) {
    vec c[MR][NR_VECS];
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NR_VECS; j++) { c[i][j] = (vec){0}; }
    }
    for (int p = 0; p < k; p++) {
        vec bv[NR_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < NR_VECS; j++) { bv[j] = ((const vec*)b)[j]; }
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < NR_VECS; j++) { c[i][j] += a[i] * bv[j]; }
        }
        a += MR;
        b += NR;
    }
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NR_VECS; j++) { ((vec*)tile)[i * NR_VECS + j] = c[i][j]; }
    }
}

typedef real oct __attribute__((vector_size(8 * sizeof(real))));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else // GCC's older name for it, which takes the places as a vector of integers
typedef __typeof__(_Generic((real)0, float : (int32_t)0, double : (int64_t)0)) place;
typedef place oct_places __attribute__((vector_size(8 * sizeof(real))));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (oct_places){__VA_ARGS__})
#endif
typedef real oct_unaligned __attribute__((vector_size(8 * sizeof(real)), aligned(sizeof(real))));

// to[p*width + r] = from[r*row_stride + p] for an 8 x 8 square: three rounds of interleaving the upper with the lower half.
static inline void transpose_8x8(real* to, int width, const real* from, size_t row_stride) {
    oct x[8], y[8];
    for (int r = 0; r < 8; r++) { x[r] = *(const oct_unaligned*)(from + (size_t)r * row_stride); }
    for (int round = 0; round < 3; round++) {
        for (int r = 0; r < 4; r++) {
            y[2 * r] = SHUFFLE(x[r], x[r + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * r + 1] = SHUFFLE(x[r], x[r + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int r = 0; r < 8; r++) { x[r] = y[r]; }
    }
    for (int r = 0; r < 8; r++) { *(oct_unaligned*)(to + r * width) = x[r]; }
}

// Packs `rows` (at most `width`) rows of k numbers, x[r*row_stride + p*k_stride], into one panel [k][width].
static void pack_panel(real* panel, const real* x, int rows, int k, size_t row_stride, size_t k_stride, int width) {
    if (rows < width) { memset(panel, 0, (size_t)k * (size_t)width * sizeof(real)); }
    if (row_stride == 1) { // the panel's rows lie side by side: copy
        for (int p = 0; p < k; p++) {
            const real* from = x + (size_t)p * k_stride;
            real* to = panel + p * width;
            int r = 0;
            for (; r + 8 <= rows; r += 8) { *(oct_unaligned*)(to + r) = *(const oct_unaligned*)(from + r); }
            for (; r < rows; r++) { to[r] = from[r]; }
        }
        return;
    }
    const int square_rows = k_stride == 1 ? rows / 8 * 8 : 0, square_k = k / 8 * 8;
    for (int p = 0; p < square_k; p += 8) {
        for (int r = 0; r < square_rows; r += 8) {
            transpose_8x8(panel + p * width + r, width, x + (size_t)r * row_stride + p, row_stride);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int p = r < square_rows ? square_k : 0; p < k; p++) {
            panel[p * width + r] = x[(size_t)r * row_stride + (size_t)p * k_stride];
        }
    }
}

// Scratch memory that kernels share; grows on demand, never shrinks.
typedef struct {
    real *a, *b;           // packed blocks of A and B
    size_t a_size, b_size; // numbers allocated
    real* rows;            // sums over chunks of rows
    size_t rows_size;
    real* heads; // attention's working memory, a part for each thread
    size_t heads_size;
    double* partial; // partial sums, one for each task
    size_t partial_size;
} Workspace;

static void reserve(real** buffer, size_t* have, size_t need, const char* what) {
    if (need > *have) {
        free(*buffer);
        *buffer = (real*)alloc_zeroed(need, sizeof(real), what);
        *have = need;
    }
}

static double* reserve_partial(Workspace* ws, size_t need) {
    if (need > ws->partial_size) {
        free(ws->partial);
        ws->partial = (double*)alloc_zeroed(need, sizeof(double), "partial sums");
        ws->partial_size = need;
    }
    memset(ws->partial, 0, need * sizeof(double));
    return ws->partial;
}

// A matrix by its strides: element (i, j) is x[i*row + j*col]. One of the strides is 1.
typedef struct {
    const real* x;
    size_t row, col;
} Matrix;

static inline Matrix row_major(const real* x, int columns) { return (Matrix){x, (size_t)columns, 1}; }
static inline Matrix transposed(const real* x, int columns) { return (Matrix){x, 1, (size_t)columns}; }

// One product: C (M, N) = or += alpha * A (M, K) @ B (K, N) (+ bias)
typedef struct {
    int M, N, K;
    Matrix a, b;
    real* c; // row-major
    size_t ldc;
    real alpha;
    bool accumulate;
    const real* bias; // (N) or NULL; not together with accumulate
    // Two accumulators: where sum_sq is not NULL, k walks over examples of `example` steps each; the tile of each example is
    // formed on its own, its squares are summed, and then it joins the total. Nothing of an example's size goes to memory.
    int example;
    double* sum_sq;
} Gemm;

// C = A @ B; the caller sets what is to be different before gemm().
static inline Gemm product(int M, int N, int K, Matrix a, Matrix b, real* c) {
    return (Gemm){M, N, K, a, b, c, (size_t)N, 1, false, NULL, 0, NULL};
}

// The tiles of one task: rows [i0, i1) and columns [j0, j1) of the packed block of C at (m0, n0); kb steps of k starting at k0.
static double gemm_task(const Gemm* g, const Workspace* ws, int m0, int n0, int k0, int kb, int i0, int i1, int j0,
                        int j1) {
    const int segment = g->sum_sq != NULL ? g->example : kb;
    _Alignas(64) real tile[MR * NR], total[MR * NR];
    double sum_sq = 0;
    for (int i = i0; i < i1; i += MR) {
        for (int j = j0; j < j1; j += NR) {
            const real *a = ws->a + (size_t)i * (size_t)kb, *b = ws->b + (size_t)j * (size_t)kb;
            for (int s = 0; s < kb; s += segment) {
                gemm_tile(segment, a + (size_t)s * MR, b + (size_t)s * NR, s == 0 ? total : tile);
                if (g->sum_sq == NULL) { break; }
                const vec* t = (const vec*)(s == 0 ? total : tile);
                vec square = {0};
                for (int v = 0; v < MR * NR_VECS; v++) { square += t[v] * t[v]; }
                for (int l = 0; l < LANES; l++) { sum_sq += (double)square[l]; }
                if (s > 0) {
                    for (int v = 0; v < MR * NR_VECS; v++) { ((vec*)total)[v] += t[v]; }
                }
            }
            const int rows = min_int(MR, i1 - i), cols = min_int(NR, j1 - j);
            const bool add = g->accumulate || k0 > 0;
            for (int r = 0; r < rows; r++) {
                real* c = g->c + (size_t)(m0 + i + r) * g->ldc + (size_t)(n0 + j);
                const real* t = total + r * NR;
                if (add) {
                    for (int n = 0; n < cols; n++) { c[n] += g->alpha * t[n]; }
                } else if (g->bias != NULL) {
                    for (int n = 0; n < cols; n++) { c[n] = g->alpha * t[n] + g->bias[n0 + j + n]; }
                } else {
                    for (int n = 0; n < cols; n++) { c[n] = g->alpha * t[n]; }
                }
            }
        }
    }
    return sum_sq;
}

static void gemm(Workspace* ws, const Gemm* g) {
    int block_k = BLOCK_K;
    if (g->sum_sq != NULL) { block_k = g->example * max_int(1, BLOCK_K / g->example); }
    const int max_k = min_int(block_k, g->K);
    const int max_m = (int)round_up((size_t)min_int(BLOCK_MN, g->M), MR),
              max_n = (int)round_up((size_t)min_int(BLOCK_MN, g->N), NR);
    reserve(&ws->a, &ws->a_size, (size_t)max_m * (size_t)max_k, "packed blocks of matrices");
    reserve(&ws->b, &ws->b_size, (size_t)max_n * (size_t)max_k, "packed blocks of matrices");
    const int tasks_m = (max_m + TASK_M - 1) / TASK_M, tasks_n = (max_n + TASK_N - 1) / TASK_N;
    double* partial = g->sum_sq != NULL ? reserve_partial(ws, (size_t)tasks_m * (size_t)tasks_n) : NULL;
    const bool worth_threads = (double)g->M * g->N * g->K > 1e5; // below, waking them costs more than they save
    (void)worth_threads;                                         // read by OpenMP alone
#pragma omp parallel if (worth_threads)
    for (int m0 = 0; m0 < g->M; m0 += BLOCK_MN) {
        const int mb = min_int(BLOCK_MN, g->M - m0);
        for (int k0 = 0; k0 < g->K; k0 += block_k) {
            const int kb = min_int(block_k, g->K - k0);
#pragma omp for schedule(static) nowait
            for (int i = 0; i < mb; i += MR) {
                pack_panel(ws->a + (size_t)i * (size_t)kb, g->a.x + (size_t)(m0 + i) * g->a.row + (size_t)k0 * g->a.col,
                           min_int(MR, mb - i), kb, g->a.row, g->a.col, MR);
            }
            for (int n0 = 0; n0 < g->N; n0 += BLOCK_MN) {
                const int nb = min_int(BLOCK_MN, g->N - n0);
#pragma omp for schedule(static)
                for (int j = 0; j < nb; j += NR) {
                    pack_panel(ws->b + (size_t)j * (size_t)kb,
                               g->b.x + (size_t)(n0 + j) * g->b.col + (size_t)k0 * g->b.row, min_int(NR, nb - j), kb,
                               g->b.col, g->b.row, NR);
                }
                const int tm = (mb + TASK_M - 1) / TASK_M, tn = (nb + TASK_N - 1) / TASK_N;
#pragma omp for schedule(dynamic)
                for (int task = 0; task < tm * tn; task++) {
                    const int i0 = task / tn * TASK_M, j0 = task % tn * TASK_N;
                    double s =
                        gemm_task(g, ws, m0, n0, k0, kb, i0, min_int(i0 + TASK_M, mb), j0, min_int(j0 + TASK_N, nb));
                    if (partial != NULL) { partial[task] += s; }
                }
            }
        }
    }
    if (g->sum_sq != NULL) {
        double s = 0;
        for (int i = 0; i < tasks_m * tasks_n; i++) { s += partial[i]; }
        *g->sum_sq += (double)g->alpha * (double)g->alpha * s;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Kernels

// exp(x): in float a polynomial that compilers vectorise, within 2 ulp of the true value; 0 below -87, e^88 above 88, NaN
// stays NaN.
static inline real exp_real(real x) {
    if (REAL_IS_DOUBLE) { return (real)exp((double)x); }
    float y = (float)x > 88.0f ? 88.0f : (float)x;
    float t = y * 1.44269504088896341f + 12582912.0f; // round to the nearest integer n: it stands in the low bits of t
    float n = t - 12582912.0f;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f; // y - n ln 2 in two steps
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits + (127u - 0x4B400000u)) << 23; // 2^n
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return (real)(y < -87.0f ? 0.0f : p * scale);
}

// erf(x): in float a rational function within 5e-7 of the true value; NaN stays NaN.
static inline real erf_real(real x) {
    if (REAL_IS_DOUBLE) { return (real)erf((double)x); }
    float y = (float)x > 4.0f ? 4.0f : (float)x < -4.0f ? -4.0f : (float)x;
    float s = y * y;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return (real)(y * p / q);
}

// out = inp @ weight^T + bias
// out (N, OC), inp (N, C), weight (OC, C), bias (OC) or NULL
static void matmul_forward(Workspace* ws, real* out, const real* inp, const real* weight, const real* bias, int N,
                           int C, int OC) {
    Gemm g = product(N, OC, C, row_major(inp, C), transposed(weight, C), out);
    g.bias = bias;
    gemm(ws, &g);
}

// dinp = alpha * dout @ weight
// dinp (N, C), dout (N, OC), weight (OC, C)
static void matmul_backward_input(Workspace* ws, real* dinp, const real* dout, const real* weight, real alpha, int N,
                                  int C, int OC) {
    Gemm g = product(N, C, OC, row_major(dout, OC), row_major(weight, C), dinp);
    g.alpha = alpha;
    gemm(ws, &g);
}

// dweight = or += alpha * dout^T @ inp, and per-example norms by two accumulators
// dweight (OC, C), dout (B, T, OC), inp (B, T, C), sum_sq: NULL, or gains sum_b |dweight_b|^2
static void matmul_backward_weight(Workspace* ws, real* dweight, double* sum_sq, const real* dout, const real* inp,
                                   real alpha, bool accumulate, int B, int T, int C, int OC) {
    Gemm g = product(OC, C, B * T, transposed(dout, OC), row_major(inp, C), dweight);
    g.alpha = alpha;
    g.accumulate = accumulate;
    g.example = T;
    g.sum_sq = sum_sq;
    gemm(ws, &g);
}

// Sums over rows are formed in chunks of this many rows of one example, whatever the number of threads.
enum { CHUNK_ROWS = 32, FOLD_COLUMNS = 64 };
static inline int chunks_of(int T) { return (T + CHUNK_ROWS - 1) / CHUNK_ROWS; }

// dout[n] += alpha * sum of partial over b and chunks; sum_sq, if not NULL, gains sum_b sum_n (example b's part of it)^2
// dout (N), partial (B, chunks, stride), of which the first N columns count
static void fold_examples(Workspace* ws, real* dout, double* sum_sq, const real* partial, real alpha, int B, int chunks,
                          size_t stride, int N) {
    const int tasks = (N + FOLD_COLUMNS - 1) / FOLD_COLUMNS;
    double* squares = reserve_partial(ws, (size_t)tasks);
#pragma omp parallel for schedule(static)
    for (int task = 0; task < tasks; task++) {
        const int n0 = task * FOLD_COLUMNS, cols = min_int(FOLD_COLUMNS, N - n0);
        real total[FOLD_COLUMNS] = {0}, example[FOLD_COLUMNS];
        double square = 0;
        for (int b = 0; b < B; b++) {
            memset(example, 0, sizeof example);
            for (int k = 0; k < chunks; k++) {
                const real* p = partial + ((size_t)b * (size_t)chunks + (size_t)k) * stride + (size_t)n0;
                for (int n = 0; n < cols; n++) { example[n] += p[n]; }
            }
            for (int n = 0; n < cols; n++) { total[n] += example[n]; }
            if (sum_sq != NULL) {
                for (int n = 0; n < cols; n++) { square += (double)example[n] * (double)example[n]; }
            }
        }
        for (int n = 0; n < cols; n++) { dout[n0 + n] += alpha * total[n]; }
        squares[task] = square;
    }
    if (sum_sq != NULL) {
        double s = 0;
        for (int task = 0; task < tasks; task++) { s += squares[task]; }
        *sum_sq += (double)alpha * (double)alpha * s;
    }
}

// dbias += alpha * sum_{b,t} dout
// dbias (OC), dout (B, T, OC), sum_sq: NULL, or gains sum_b |dbias_b|^2
static void bias_backward(Workspace* ws, real* dbias, double* sum_sq, const real* dout, real alpha, int B, int T,
                          int OC) {
    const int chunks = chunks_of(T);
    reserve(&ws->rows, &ws->rows_size, (size_t)B * (size_t)chunks * (size_t)OC, "sums over rows");
#pragma omp parallel for schedule(static) collapse(2)
    for (int b = 0; b < B; b++) {
        for (int k = 0; k < chunks; k++) {
            real* sum = ws->rows + ((size_t)b * (size_t)chunks + (size_t)k) * (size_t)OC;
            memset(sum, 0, (size_t)OC * sizeof(real));
            for (int t = k * CHUNK_ROWS; t < min_int(T, (k + 1) * CHUNK_ROWS); t++) {
                const real* row = dout + ((size_t)b * (size_t)T + (size_t)t) * (size_t)OC;
                for (int n = 0; n < OC; n++) { sum[n] += row[n]; }
            }
        }
    }
    fold_examples(ws, dbias, sum_sq, ws->rows, alpha, B, chunks, (size_t)OC, OC);
}

// out = mult * (wte[token] + wpe[t])
// out (B, T, C), tokens (B, T), wte (Vp, C), wpe (maxT, C)
static void embedding_forward(real* out, const int* tokens, const real* wte, const real* wpe, real mult, int B, int T,
                              int C) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < B * T; bt++) {
        const real *e = wte + (size_t)tokens[bt] * (size_t)C, *p = wpe + (size_t)(bt % T) * (size_t)C;
        real* o = out + (size_t)bt * (size_t)C;
        for (int c = 0; c < C; c++) { o[c] = mult * (e[c] + p[c]); }
    }
}

// The positions of each example in the order of their tokens; the positions of one token form a group.
// order (B, T): order[b*T + i] is a position; group (B, T): the number of its group, counted from 0; groups (B)
static void group_tokens(int* order, int* group, int* groups, const int* tokens, int B, int T, int V) {
    int* start = (int*)alloc_zeroed((size_t)V + 1, sizeof(int), "token counts");
    for (int b = 0; b < B; b++) {
        const int* id = tokens + (size_t)b * (size_t)T;
        int *o = order + (size_t)b * (size_t)T, *g = group + (size_t)b * (size_t)T;
        memset(start, 0, ((size_t)V + 1) * sizeof(int));
        for (int t = 0; t < T; t++) { start[id[t] + 1]++; }
        for (int v = 0; v < V; v++) { start[v + 1] += start[v]; }
        for (int t = 0; t < T; t++) { o[start[id[t]]++] = t; }
        for (int i = 0; i < T; i++) { g[i] = i == 0 ? 0 : g[i - 1] + (id[o[i]] != id[o[i - 1]]); }
        groups[b] = g[T - 1] + 1;
    }
    free(start);
}

// dwte[token] += dout, dwpe[t] += dout
// dwte (Vp, C), dwpe (maxT, C), dout (B, T, C): gradient at the sum of the embeddings; order, group from group_tokens
// Norms, where wanted: sum_sq_wpe gains sum_b |dwpe_b|^2. sum_sq_wte gains sum_b |e_b|^2 + 2 <e_b, u_b>, where e_b is
// example b's gradient of wte through the embedding and u_b through the tied head, whose rows for the example's own
// tokens stand in head_rows (B, T, C), one row a group: what is missing to |e_b + u_b|^2 is |u_b|^2, the head's own norm.
static void embedding_backward(Workspace* ws, real* dwte, real* dwpe, double* sum_sq_wte, double* sum_sq_wpe,
                               const real* dout, const int* tokens, const int* order, const int* group,
                               const real* head_rows, int B, int T, int C) {
    const int tasks = (C + FOLD_COLUMNS - 1) / FOLD_COLUMNS;
    double* squares = reserve_partial(ws, 2 * (size_t)tasks);
#pragma omp parallel for schedule(static)
    for (int task = 0; task < tasks; task++) { // a task owns some columns, so no two threads write to one row's place
        const int c0 = task * FOLD_COLUMNS, cols = min_int(FOLD_COLUMNS, C - c0);
        double wte = 0, wpe = 0;
        for (int b = 0; b < B; b++) {
            real row[FOLD_COLUMNS];
            const size_t bT = (size_t)b * (size_t)T;
            for (int i = 0; i < T; i++) {
                const int t = order[bT + (size_t)i], g = group[bT + (size_t)i];
                const bool first = i == 0 || group[bT + (size_t)i - 1] != g,
                           last = i == T - 1 || group[bT + (size_t)i + 1] != g;
                const real* d = dout + (bT + (size_t)t) * (size_t)C + (size_t)c0;
                real* p = dwpe + (size_t)t * (size_t)C + (size_t)c0;
                if (first) { memset(row, 0, sizeof row); }
                for (int c = 0; c < cols; c++) {
                    row[c] += d[c];
                    p[c] += d[c];
                }
                if (sum_sq_wpe != NULL) {
                    for (int c = 0; c < cols; c++) { wpe += (double)d[c] * (double)d[c]; }
                }
                if (!last) { continue; }
                real* e = dwte + (size_t)tokens[bT + (size_t)t] * (size_t)C + (size_t)c0;
                for (int c = 0; c < cols; c++) { e[c] += row[c]; }
                if (sum_sq_wte != NULL) {
                    const real* u = head_rows + (bT + (size_t)g) * (size_t)C + (size_t)c0;
                    for (int c = 0; c < cols; c++) { wte += (double)row[c] * ((double)row[c] + 2 * (double)u[c]); }
                }
            }
        }
        squares[2 * task] = wte;
        squares[2 * task + 1] = wpe;
    }
    for (int task = 0; task < tasks; task++) {
        if (sum_sq_wte != NULL) { *sum_sq_wte += squares[2 * task]; }
        if (sum_sq_wpe != NULL) { *sum_sq_wpe += squares[2 * task + 1]; }
    }
}

// residual = inp + mult * branch (branch NULL: inp itself, and nothing is written to residual), then
// out = (residual - mean) * rstd * weight + bias, row by row
// residual, inp, branch, out (N, C); mean, rstd (N); weight, bias (C)
static void layernorm_forward(real* residual, real* out, real* mean, real* rstd, const real* inp, const real* branch,
                              real mult, const real* weight, const real* bias, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        const size_t at = (size_t)i * (size_t)C;
        const real* x = inp + at;
        if (branch != NULL) {
            for (int c = 0; c < C; c++) { residual[at + (size_t)c] = x[c] + mult * branch[at + (size_t)c]; }
            x = residual + at;
        }
        real sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) { sum += x[c]; }
        const real m = sum / (real)C;
#pragma omp simd reduction(+ : square)
        for (int c = 0; c < C; c++) { square += (x[c] - m) * (x[c] - m); }
        const real r = 1 / (real)sqrt((double)(square / (real)C + (real)1e-5));
        for (int c = 0; c < C; c++) { out[at + (size_t)c] = (x[c] - m) * r * weight[c] + bias[c]; }
        mean[i] = m;
        rstd[i] = r;
    }
}

// The output of layernorm_forward once more, from what the backward pass keeps of it.
static void layernorm_recompute(real* out, const real* inp, const real* mean, const real* rstd, const real* weight,
                                const real* bias, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        const real* x = inp + (size_t)i * (size_t)C;
        real* o = out + (size_t)i * (size_t)C;
        for (int c = 0; c < C; c++) { o[c] = (x[c] - mean[i]) * rstd[i] * weight[c] + bias[c]; }
    }
}

// One pass over dout and inp: dinp += gradient at the input, dweight += sum_{b,t} dout * xhat, dbias += sum_{b,t} dout
// dinp, dout, inp (B, T, C); mean, rstd (B, T); dweight, dbias, weight (C)
// sum_sq_weight, sum_sq_bias: NULL, or gain sum_b |dweight_b|^2 and sum_b |dbias_b|^2 (arXiv 2411.00999, Algorithm 1 with
// the sum over t taken first): the chunks' sums exist anyway, so the norms cost B*2C multiplications.
static void layernorm_backward(Workspace* ws, real* dinp, real* dweight, real* dbias, double* sum_sq_weight,
                               double* sum_sq_bias, const real* dout, const real* inp, const real* mean,
                               const real* rstd, const real* weight, int B, int T, int C) {
    const int chunks = chunks_of(T);
    reserve(&ws->rows, &ws->rows_size, (size_t)B * (size_t)chunks * 2 * (size_t)C, "sums over rows");
#pragma omp parallel for schedule(static) collapse(2)
    for (int b = 0; b < B; b++) {
        for (int k = 0; k < chunks; k++) {
            real* dw = ws->rows + ((size_t)b * (size_t)chunks + (size_t)k) * 2 * (size_t)C;
            real* db = dw + C;
            memset(dw, 0, 2 * (size_t)C * sizeof(real));
            for (int t = k * CHUNK_ROWS; t < min_int(T, (k + 1) * CHUNK_ROWS); t++) {
                const size_t bt = (size_t)b * (size_t)T + (size_t)t;
                const real *dy = dout + bt * (size_t)C, *x = inp + bt * (size_t)C, m = mean[bt], r = rstd[bt];
                real* dx = dinp + bt * (size_t)C;
                real sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
                for (int c = 0; c < C; c++) {
                    const real xhat = (x[c] - m) * r, g = dy[c] * weight[c];
                    sum += g;
                    dot += g * xhat;
                    dw[c] += dy[c] * xhat;
                    db[c] += dy[c];
                }
                sum /= (real)C;
                dot /= (real)C;
                for (int c = 0; c < C; c++) { dx[c] += r * (dy[c] * weight[c] - sum - (x[c] - m) * r * dot); }
            }
        }
    }
    fold_examples(ws, dweight, sum_sq_weight, ws->rows, 1, B, chunks, 2 * (size_t)C, C);
    fold_examples(ws, dbias, sum_sq_bias, ws->rows + C, 1, B, chunks, 2 * (size_t)C, C);
}

// One number of GELU: its value, its derivative in *slope. tanh form: x/2 (1 + tanh(u)) = x sigmoid(2u) with
// u = sqrt(2/pi) (x + 0.044715 x^3); erf form: x Phi(x).
static inline real gelu_one(real x, int form, real* slope) {
    if (form == GELU_ERF) {
        const real phi = (real)0.5 * (1 + erf_real(x * (real)M_SQRT1_2));
        *slope = phi + x * (real)0.39894228040143267794 * exp_real((real)-0.5 * x * x);
        return x * phi;
    }
    const real a = (real)0.79788456080286535588, u2 = 2 * a * (x + (real)0.044715 * x * x * x);
    const real s = 1 / (1 + exp_real(-u2));
    *slope = s + x * s * (1 - s) * 2 * a * (1 + (real)(3 * 0.044715) * x * x);
    return x * s;
}

// out = gelu(inp)
// out, inp (n)
static void gelu_forward(real* out, const real* inp, int form, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        real slope;
        out[i] = gelu_one(inp[i], form, &slope);
    }
}

// dinp = dout * gelu'(inp) in place of dout; out = gelu(inp) again, which the next weight gradient needs
// dout_dinp, out, inp (n)
static void gelu_backward(real* dout_dinp, real* out, const real* inp, int form, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        real slope;
        out[i] = gelu_one(inp[i], form, &slope);
        dout_dinp[i] *= slope;
    }
}

// The largest of x (n), n >= 1. In lanes by hand: compilers may not reorder comparisons that could meet a NaN.
static real largest(const real* x, int n) {
    real lane[16], top = x[0];
    for (int l = 0; l < 16; l++) { lane[l] = top; }
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int l = 0; l < 16; l++) { lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l]; }
    }
    for (; i < n; i++) { top = x[i] > top ? x[i] : top; }
    for (int l = 0; l < 16; l++) { top = lane[l] > top ? lane[l] : top; }
    return top;
}

// losses = -log softmax(logits)[target]; logits become their gradient times scale. target -1: loss and gradient 0.
// logits (N, V) in rows of stride, targets, losses (N)
static void softmax_cross_entropy(real* logits, real* losses, const int* targets, real scale, int N, int V,
                                  size_t stride) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        real* x = logits + (size_t)i * stride;
        const int target = targets[i];
        if (target < 0) {
            losses[i] = 0;
            memset(x, 0, (size_t)V * sizeof(real));
            continue;
        }
        real top = largest(x, V), sum = 0;
        const real at_target = x[target] - top;
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) {
            x[v] = exp_real(x[v] - top);
            sum += x[v];
        }
        losses[i] = (real)log((double)sum) - at_target;
        const real s = scale / sum;
        for (int v = 0; v < V; v++) { x[v] *= s; }
        x[target] -= scale;
    }
}

// Attention, causal, in blocks (Dao et al. 2022, arXiv 2205.14135): softmax(scale * q k^T) v for each head, with never more than
// a square of NR x NR scores in memory. The squares are kept transposed, keys down and queries across: then a vector
// holds one key's score for LANES queries, maxima and sums over keys need no horizontal steps, and a square of
// probabilities is at once a packed B panel for the next product. Every product runs on gemm_tile.
//
// Cosine attention divides q and k by their norms first (not below 1e-12, as torch.nn.functional.normalize has it).
typedef struct {
    const real* qkv; // (B, T, 3, NH, HS)
    int B, T, C, NH;
    real scale; // of the scores: attn_mult / sqrt(HS)
    bool cosine;
} Attention;

// Working memory of one thread. TP: T rounded up to whole blocks; HP: HS rounded up to whole panels.
typedef struct {
    real *q, *k;                 // (TP, HS): this head's q (scaled) and k, normalised under cosine attention
    real *q_inverse, *k_inverse; // (TP): 1 / norm, 1 without cosine attention
    real *k_rows, *v_rows;       // (TP, HS) as A panels of keys: for scores, for the gradient of probabilities
    real *k_cols, *v_cols;       // for each block of keys, (HP, NR) as A panels of head elements
    real *dk, *dv;               // for each block of keys, (HP, NR): transposed gradients
    real *q_block, *do_block;    // (HS, NR) as B panels: this block of queries
    real *q_cols, *do_cols;      // (HP, NR) as A panels
    real *scores, *dscores;      // (NR, NR), keys down
    real* packed;                // (NR, NR), queries down
    real* acc;                   // (HP, NR): the block's output, transposed
    real *top, *sum, *shift;     // (NR)
} HeadScratch;

static HeadScratch head_scratch(Workspace* ws, int thread, int T, int HS) {
    const size_t TP = round_up((size_t)T, NR), HP = round_up((size_t)HS, MR), vector = round_up(NR, LANES);
    const size_t sizes[] = {TP * HP, TP * HP, TP,      TP,      TP * HP, TP * HP, TP * HP,
                            TP * HP, TP * HP, TP * HP, HP * NR, HP * NR, HP * NR, HP * NR,
                            NR * NR, NR * NR, NR * NR, HP * NR, vector,  vector,  vector};
    HeadScratch h;
    real** parts[] = {&h.q,      &h.k,       &h.q_inverse, &h.k_inverse, &h.k_rows,   &h.v_rows, &h.k_cols,
                      &h.v_cols, &h.dk,      &h.dv,        &h.q_block,   &h.do_block, &h.q_cols, &h.do_cols,
                      &h.scores, &h.dscores, &h.packed,    &h.acc,       &h.top,      &h.sum,    &h.shift};
    enum { PARTS = sizeof parts / sizeof parts[0] };
    size_t total = 0;
    for (int i = 0; i < PARTS; i++) { total += round_up(sizes[i], 64); }
    if (thread < 0) { // the caller asks for the memory of all threads, once, outside the parallel region
        reserve(&ws->heads, &ws->heads_size, total * (size_t)max_threads(), "attention's working memory");
        thread = 0;
    }
    real* p = ws->heads + total * (size_t)thread;
    for (int i = 0; i < PARTS; i++) {
        *parts[i] = p;
        p += round_up(sizes[i], 64);
    }
    return h;
}

// Copies one head's q or k (from, rows of stride) into to (T, HS), normalised where asked, times scale.
static void load_head(real* to, real* inverse, const real* from, size_t stride, int T, int HS, real scale,
                      bool cosine) {
    for (int t = 0; t < T; t++) {
        const real* x = from + (size_t)t * stride;
        real inv = 1;
        if (cosine) {
            real square = 0;
            for (int i = 0; i < HS; i++) { square += x[i] * x[i]; }
            const real norm = (real)sqrt((double)square), floor = (real)1e-12;
            inv = 1 / (norm > floor ? norm : floor);
        }
        inverse[t] = inv;
        for (int i = 0; i < HS; i++) { to[(size_t)t * (size_t)HS + (size_t)i] = x[i] * inv * scale; }
    }
}

// Writes a head's gradient g (NR-blocks of (HP, NR), transposed) times scale to rows of stride, through the
// normalisation where there was one: x^ = x / |x| has dx = (dx^ - x^ (x^ . dx^)) / |x|; below the floor it is linear.
// unit (T, HS): x^ times unit_scale
static void store_head_gradient(real* to, size_t stride, const real* g, real scale, const real* unit, real unit_scale,
                                const real* inverse, int t0, int t1, int HS, bool cosine) {
    for (int t = t0; t < t1; t++) {
        real* out = to + (size_t)t * stride;
        const real *u = unit + (size_t)t * (size_t)HS, *column = g + (t - t0) % NR;
        real dot = 0;
        for (int i = 0; i < HS; i++) {
            out[i] = column[i * NR] * scale;
            dot += out[i] * u[i];
        }
        if (!cosine) { continue; }
        const bool floored = inverse[t] >= (real)1e12;
        dot = floored ? 0 : dot / (unit_scale * unit_scale);
        for (int i = 0; i < HS; i++) { out[i] = (out[i] - u[i] * dot) * inverse[t]; }
    }
}

// Scores of NR keys from k0 for NR queries from q0 into s (NR, NR), minus infinity where the key comes after the query.
static void attention_scores(real* s, const real* k_rows, const real* q_block, int HS, int q0, int k0) {
    for (int i = 0; i < NR; i += MR) { gemm_tile(HS, k_rows + (size_t)(k0 + i) * (size_t)HS, q_block, s + i * NR); }
    for (int i = 0; i < NR && k0 == q0; i++) {
        for (int j = 0; j < i; j++) { s[i * NR + j] = -INFINITY; }
    }
}

// acc (HP, NR) = acc * shift[query] + panels (HP, k) @ b (k, NR); shift NULL: 1
static void attention_accumulate(real* acc, const real* shift, const real* panels, const real* b, int k, int HS) {
    _Alignas(64) real tile[MR * NR];
    for (int i = 0; i < HS; i += MR) {
        real* out = acc + i * NR;
        gemm_tile(k, panels + i * k, b, tile);
        for (int r = 0; r < MR; r++) {
            for (int j = 0; j < NR; j++) {
                out[r * NR + j] = out[r * NR + j] * (shift != NULL ? shift[j] : 1) + tile[r * NR + j];
            }
        }
    }
}

// Packs x (T, HS in rows of stride) as A panels: by rows (to: (TP, HS)), or by columns for rows [t0, t1) (to: (HP, t1 - t0)).
static void pack_rows(real* to, const real* x, size_t stride, int T, int HS) {
    for (int t = 0; t < (int)round_up((size_t)T, NR); t += MR) {
        pack_panel(to + (size_t)t * (size_t)HS, t < T ? x + (size_t)t * stride : x, max_int(0, min_int(MR, T - t)), HS,
                   stride, 1, MR);
    }
}
static void pack_columns(real* to, const real* x, size_t stride, int t0, int t1, int HS) {
    for (int i = 0; i < HS; i += MR) {
        pack_panel(to + i * (t1 - t0), x + (size_t)t0 * stride + (size_t)i, min_int(MR, HS - i), t1 - t0, 1, stride,
                   MR);
    }
}

// All columns: a block of (HP, NR) for each NR rows.
static void pack_column_blocks(real* to, const real* x, size_t stride, int T, int HS) {
    const size_t HP = round_up((size_t)HS, MR);
    for (int t = 0; t < T; t += NR) { pack_columns(to + (size_t)t * HP, x, stride, t, min_int(t + NR, T), HS); }
}

// What both passes need of a head: q and k as the scores take them, and k packed for the scores.
static void load_queries_and_keys(HeadScratch* h, const Attention* a, const real* q, const real* k, int HS) {
    const size_t stride = 3 * (size_t)a->C;
    load_head(h->q, h->q_inverse, q, stride, a->T, HS, a->scale, a->cosine);
    load_head(h->k, h->k_inverse, k, stride, a->T, HS, 1, a->cosine);
    pack_rows(h->k_rows, h->k, (size_t)HS, a->T, HS);
}

// One block of queries against the keys up to it; the running maximum and sum make the softmax (Milakov & Gimelshein 2018).
static void attention_forward_block(HeadScratch* h, const Attention* a, real* out, real* lse, int HS, int q0) {
    const size_t HP = round_up((size_t)HS, MR);
    const int q_count = min_int(NR, a->T - q0);
    pack_panel(h->q_block, h->q + (size_t)q0 * (size_t)HS, q_count, HS, (size_t)HS, 1, NR);
    memset(h->acc, 0, HP * NR * sizeof(real));
    for (int j = 0; j < NR; j++) {
        h->top[j] = -INFINITY;
        h->sum[j] = 0;
    }
    for (int k0 = 0; k0 <= q0; k0 += NR) {
        const int k_count = min_int(NR, a->T - k0);
        attention_scores(h->scores, h->k_rows, h->q_block, HS, q0, k0);
        for (int j = 0; j < NR; j++) { h->shift[j] = h->top[j]; }
        for (int i = 0; i < k_count; i++) {
            for (int j = 0; j < NR; j++) {
                h->top[j] = h->scores[i * NR + j] > h->top[j] ? h->scores[i * NR + j] : h->top[j];
            }
        }
        for (int j = 0; j < NR; j++) {
            h->shift[j] = exp_real(h->shift[j] - h->top[j]);
            h->sum[j] *= h->shift[j];
        }
        for (int i = 0; i < k_count; i++) {
            real* s = h->scores + i * NR;
            for (int j = 0; j < NR; j++) {
                s[j] = exp_real(s[j] - h->top[j]);
                h->sum[j] += s[j];
            }
        }
        attention_accumulate(h->acc, h->shift, h->v_cols + (size_t)k0 * HP, h->scores, k_count, HS);
    }
    for (int j = 0; j < q_count; j++) {
        real* o = out + (size_t)(q0 + j) * (size_t)a->C;
        for (int i = 0; i < HS; i++) { o[i] = h->acc[i * NR + j] / h->sum[j]; }
        lse[q0 + j] = h->top[j] + (real)log((double)h->sum[j]);
    }
}

// out (B, T, C), lse (B, NH, T): log of the sum of exponentials, for the backward pass
static void attention_forward(Workspace* ws, real* out, real* lse, Attention a) {
    const int HS = a.C / a.NH;
    const size_t stride = 3 * (size_t)a.C;
    head_scratch(ws, -1, a.T, HS);
#pragma omp parallel for schedule(static)
    for (int bh = 0; bh < a.B * a.NH; bh++) {
        HeadScratch h = head_scratch(ws, thread_index(), a.T, HS);
        const size_t b = (size_t)(bh / a.NH), head = (size_t)(bh % a.NH) * (size_t)HS, T = (size_t)a.T;
        const real *q = a.qkv + b * T * stride + head, *k = q + a.C, *v = k + a.C;
        load_queries_and_keys(&h, &a, q, k, HS);
        pack_column_blocks(h.v_cols, v, stride, a.T, HS);
        for (int q0 = 0; q0 < a.T; q0 += NR) {
            attention_forward_block(&h, &a, out + b * T * (size_t)a.C + head, lse + (size_t)bh * T, HS, q0);
        }
    }
}

// One block of queries: adds to the gradients of the keys and values up to it and leaves its own, transposed, in h->acc.
static void attention_backward_block(HeadScratch* h, const Attention* a, const real* dout, const real* out,
                                     const real* lse, int HS, int q0) {
    const size_t C = (size_t)a->C, HP = round_up((size_t)HS, MR);
    const int q_count = min_int(NR, a->T - q0);
    const real* dout_block = dout + (size_t)q0 * C;
    pack_panel(h->q_block, h->q + (size_t)q0 * (size_t)HS, q_count, HS, (size_t)HS, 1, NR);
    pack_panel(h->do_block, dout_block, q_count, HS, C, 1, NR);
    pack_columns(h->q_cols, h->q, (size_t)HS, q0, q0 + q_count, HS);
    pack_columns(h->do_cols, dout, C, q0, q0 + q_count, HS);
    memset(h->acc, 0, HP * NR * sizeof(real));
    for (int j = 0; j < NR; j++) { // top: log-sum-exp; sum: dout . out, the mean of dscores under the probabilities
        h->top[j] = h->sum[j] = 0;
        for (int i = 0; i < HS && j < q_count; i++) {
            h->sum[j] += dout_block[(size_t)j * C + (size_t)i] * out[(size_t)(q0 + j) * C + (size_t)i];
        }
        if (j < q_count) { h->top[j] = lse[q0 + j]; }
    }
    for (int k0 = 0; k0 <= q0; k0 += NR) {
        const int k_count = min_int(NR, a->T - k0);
        attention_scores(h->scores, h->k_rows, h->q_block, HS, q0, k0);
        attention_scores(h->dscores, h->v_rows, h->do_block, HS, -1, k0);
        for (int i = 0; i < k_count; i++) {
            real *p = h->scores + i * NR, *dp = h->dscores + i * NR;
            for (int j = 0; j < NR; j++) {
                p[j] = exp_real(p[j] - h->top[j]);
                dp[j] = p[j] * (dp[j] - h->sum[j]);
            }
        }
        pack_panel(h->packed, h->scores, k_count, q_count, NR, 1, NR);
        attention_accumulate(h->dv + (size_t)k0 * HP, NULL, h->do_cols, h->packed, q_count, HS);
        pack_panel(h->packed, h->dscores, k_count, q_count, NR, 1, NR);
        attention_accumulate(h->dk + (size_t)k0 * HP, NULL, h->q_cols, h->packed, q_count, HS);
        attention_accumulate(h->acc, NULL, h->k_cols + (size_t)k0 * HP, h->dscores, k_count, HS);
    }
}

// dqkv (B, T, 3, NH, HS) = gradient at qkv; dout, out (B, T, C); lse (B, NH, T) from the forward pass
static void attention_backward(Workspace* ws, real* dqkv, const real* dout, const real* out, const real* lse,
                               Attention a) {
    const int HS = a.C / a.NH;
    const size_t stride = 3 * (size_t)a.C, HP = round_up((size_t)HS, MR), TP = round_up((size_t)a.T, NR);
    head_scratch(ws, -1, a.T, HS);
#pragma omp parallel for schedule(static)
    for (int bh = 0; bh < a.B * a.NH; bh++) {
        HeadScratch h = head_scratch(ws, thread_index(), a.T, HS);
        const size_t b = (size_t)(bh / a.NH), head = (size_t)(bh % a.NH) * (size_t)HS, T = (size_t)a.T;
        const real *q = a.qkv + b * T * stride + head, *k = q + a.C, *v = k + a.C;
        real *dq = dqkv + b * T * stride + head, *dk = dq + a.C, *dv = dk + a.C;
        load_queries_and_keys(&h, &a, q, k, HS);
        pack_rows(h.v_rows, v, stride, a.T, HS);
        pack_column_blocks(h.k_cols, h.k, (size_t)HS, a.T, HS);
        memset(h.dk, 0, TP * HP * sizeof(real));
        memset(h.dv, 0, TP * HP * sizeof(real));
        for (int q0 = 0; q0 < a.T; q0 += NR) {
            attention_backward_block(&h, &a, dout + b * T * (size_t)a.C + head, out + b * T * (size_t)a.C + head,
                                     lse + (size_t)bh * T, HS, q0);
            store_head_gradient(dq, stride, h.acc, a.scale, h.q, a.scale, h.q_inverse, q0, min_int(q0 + NR, a.T), HS,
                                a.cosine);
        }
        for (int k0 = 0; k0 < a.T; k0 += NR) { // q carries the scale already, so k's gradient has it
            const int k1 = min_int(k0 + NR, a.T);
            store_head_gradient(dk, stride, h.dk + (size_t)k0 * HP, 1, h.k, 1, h.k_inverse, k0, k1, HS, a.cosine);
            for (int t = k0; t < k1; t++) {
                for (int i = 0; i < HS; i++) {
                    dv[(size_t)t * stride + (size_t)i] = h.dv[(size_t)k0 * HP + (size_t)(i * NR + t - k0)];
                }
            }
        }
    }
}

// Sum of the squares of x (n), in parts of fixed size, each in float lanes, the parts in double.
static double sum_of_squares(Workspace* ws, const real* x, size_t n) {
    enum { PART = 16384 };
    const size_t parts = (n + PART - 1) / PART;
    double* partial = reserve_partial(ws, parts);
#pragma omp parallel for schedule(static)
    for (size_t p = 0; p < parts; p++) {
        const real* y = x + p * PART;
        const int count = (int)(n - p * PART < PART ? n - p * PART : PART);
        double sum = 0;
        for (int i0 = 0; i0 < count; i0 += 1024) {
            real s = 0;
#pragma omp simd reduction(+ : s)
            for (int i = i0; i < min_int(i0 + 1024, count); i++) { s += y[i] * y[i]; }
            sum += (double)s;
        }
        partial[p] = sum;
    }
    double sum = 0;
    for (size_t p = 0; p < parts; p++) { sum += partial[p]; }
    return sum;
}

// AdamW (Loshchilov & Hutter 2019) on one tensor: grad * grad_scale is the gradient of the step.
// param, grad, m, v (n); correction1 = 1 / (1 - beta1^step), correction2 = 1 / (1 - beta2^step)
// Reads 16 bytes a number and writes 12: bound by memory.
static void adamw_update(real* param, const real* grad, real* m, real* v, size_t n, real grad_scale, real lr,
                         real beta1, real beta2, real eps, real weight_decay, real correction1, real correction2) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        const real g = grad[i] * grad_scale;
        const real m1 = m[i] = beta1 * m[i] + (1 - beta1) * g;
        const real v1 = v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        const real root =
            REAL_IS_DOUBLE ? (real)sqrt((double)(v1 * correction2)) : (real)sqrtf((float)(v1 * correction2));
        param[i] -= lr * (m1 * correction1 / (root + eps) + weight_decay * param[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The model

// What the backward pass needs of one block. LayerNorm and GELU outputs are not kept: recomputing them is a pass over
// memory that the backward pass makes anyway.
typedef struct {
    real* residual_in;  // (B, T, C) the residual stream at the block's entrance
    real* ln1_mean;     // (B, T)
    real* ln1_rstd;     // (B, T)
    real* qkv;          // (B, T, 3, NH, HS)
    real* lse;          // (B, NH, T)
    real* att;          // (B, T, C) attention's output before its projection
    real* residual_mid; // (B, T, C) the residual stream between attention and MLP
    real* ln2_mean;     // (B, T)
    real* ln2_rstd;     // (B, T)
    real* fch;          // (B, T, 4C) before GELU
} BlockActivations;

typedef struct {
    GPTConfig config;
    ParamTable table;
    int max_B, max_T;
    size_t max_N; // max_B * max_T
    // Flat arrays in the order of the model file.
    real *params, *grads, *m, *v;
    // Activations.
    BlockActivations* block;   // (L)
    real* residual_out;        // (B, T, C) the residual stream after the last block
    real *lnf_mean, *lnf_rstd; // (B, T)
    real* lnf;                 // (B, T, C) input of the head
    real* losses;              // (B, T)
    // Scratch, shared by all blocks.
    real* norm;      // (B, T, C) a LayerNorm's output
    real* branch;    // (B, T, C) what a branch adds to the residual stream; backward: gradient at a LayerNorm's output
    real* hidden;    // (B, T, 4C) GELU's output
    real* dhidden;   // (B, T, 4C) gradient at fch, or at qkv
    real* dresidual; // (B, T, C)
    real* logits;    // (head_B * T, V): a few examples' logits, then their gradient
    real* head_rows; // (B, T, C) --gns all: the head's gradient of wte in the rows of each example's tokens
    real* gathered;  // (T, T) --gns all: one example's logit gradients in the columns of its tokens
    int *order, *group, *groups; // (B, T), (B, T), (B): see group_tokens
    Workspace ws;
    // The step in progress.
    int gns;    // what is measured
    int micros; // micro-batches so far: the first one overwrites the matrices' gradients, later ones add
    int examples;
    double loss;     // sum over examples
    double* sum_sq;  // (num_tensors) sum_b |g_b|^2
    size_t bytes[5]; // allocated for weights, gradients, moments, activations, scratch
} GPT;

enum { MEM_WEIGHTS, MEM_GRADIENTS, MEM_MOMENTS, MEM_ACTIVATIONS, MEM_SCRATCH };

static real* gpt_alloc(GPT* g, int kind, size_t count, const char* what) {
    g->bytes[kind] += count * sizeof(real);
    return (real*)alloc_zeroed(count, sizeof(real), what);
}

// Reserves the working memory of the kernels for micro-batches of max_B x max_T, so that the start-up line can say all.
static void gpt_reserve_workspace(GPT* g) {
    const int C = g->config.channels;
    Workspace* ws = &g->ws;
    const size_t block = round_up(BLOCK_MN, NR) * BLOCK_K;
    reserve(&ws->a, &ws->a_size, block, "packed blocks of matrices");
    reserve(&ws->b, &ws->b_size, block, "packed blocks of matrices");
    reserve(&ws->rows, &ws->rows_size, (size_t)g->max_B * (size_t)chunks_of(g->max_T) * 4 * (size_t)C,
            "sums over rows");
    head_scratch(ws, -1, g->max_T, C / g->config.num_heads);
    g->bytes[MEM_SCRATCH] += (ws->a_size + ws->b_size + ws->rows_size + ws->heads_size) * sizeof(real);
}

// What --gns all needs besides, at the first step that measures all tensors.
static void gpt_reserve_gns_all(GPT* g) {
    const size_t rows = g->max_N * (size_t)g->config.channels, square = (size_t)g->max_T * (size_t)g->max_T;
    g->head_rows = gpt_alloc(g, MEM_SCRATCH, rows, "per-example norms of the embedding");
    g->gathered = gpt_alloc(g, MEM_SCRATCH, square, "per-example norms of the embedding");
    printf("memory      per-example norms of the tied embedding: scratch %.1f MiB more\n",
           (double)((rows + square) * sizeof(real)) / (1 << 20));
}

// Examples whose logits are in memory at once: about 256 tokens, so that the products are large enough.
static int head_examples(int T) { return max_int(1, 256 / T); }

static GPT* gpt_create(const GPTConfig* config, int max_B, int max_T) {
    GPT* g = (GPT*)alloc_zeroed(1, sizeof(GPT), "the model");
    g->config = *config;
    g->table = param_table(config);
    g->max_B = max_B;
    g->max_T = max_T;
    const size_t N = g->max_N = (size_t)max_B * (size_t)max_T, C = (size_t)config->channels, P = g->table.num_params;
    g->params = gpt_alloc(g, MEM_WEIGHTS, P, "the weights");
    g->grads = gpt_alloc(g, MEM_GRADIENTS, P, "the gradients");
    g->m = gpt_alloc(g, MEM_MOMENTS, P, "Adam's first moments");
    g->v = gpt_alloc(g, MEM_MOMENTS, P, "Adam's second moments");
    g->block =
        (BlockActivations*)alloc_zeroed((size_t)config->num_layers, sizeof(BlockActivations), "the list of blocks");
    for (int l = 0; l < config->num_layers; l++) {
        BlockActivations* a = &g->block[l];
        real** parts[] = {&a->residual_in, &a->residual_mid, &a->att,      &a->qkv,      &a->fch,
                          &a->ln1_mean,    &a->ln1_rstd,     &a->ln2_mean, &a->ln2_rstd, &a->lse};
        const size_t sizes[] = {N * C, N * C, N * C, 3 * N * C, 4 * N * C, N, N, N, N, N * (size_t)config->num_heads};
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            *parts[i] = gpt_alloc(g, MEM_ACTIVATIONS, sizes[i], "a block's activations");
        }
    }
    g->residual_out = gpt_alloc(g, MEM_ACTIVATIONS, N * C, "activations");
    g->lnf = gpt_alloc(g, MEM_ACTIVATIONS, N * C, "activations");
    g->lnf_mean = gpt_alloc(g, MEM_ACTIVATIONS, N, "activations");
    g->lnf_rstd = gpt_alloc(g, MEM_ACTIVATIONS, N, "activations");
    g->losses = gpt_alloc(g, MEM_ACTIVATIONS, N, "the losses");
    g->norm = gpt_alloc(g, MEM_SCRATCH, N * C, "scratch");
    g->branch = gpt_alloc(g, MEM_SCRATCH, N * C, "scratch");
    g->hidden = gpt_alloc(g, MEM_SCRATCH, 4 * N * C, "scratch");
    g->dhidden = gpt_alloc(g, MEM_SCRATCH, 4 * N * C, "scratch");
    g->dresidual = gpt_alloc(g, MEM_SCRATCH, N * C, "scratch");
    const size_t chunk = (size_t)max_int(256, max_T); // at least head_examples(T) * T for every T up to max_T
    g->logits = gpt_alloc(g, MEM_SCRATCH, (chunk < N ? chunk : N) * (size_t)config->vocab_size, "the logits");
    g->order = (int*)alloc_zeroed(2 * N + (size_t)max_B, sizeof(int), "the order of tokens");
    g->group = g->order + N;
    g->groups = g->group + N;
    g->sum_sq = (double*)alloc_zeroed((size_t)g->table.num_tensors, sizeof(double), "per-example norms");
    gpt_reserve_workspace(g);
    return g;
}

static void gpt_free(GPT* g) {
    for (int l = 0; l < g->config.num_layers; l++) {
        BlockActivations* a = &g->block[l];
        real* parts[] = {a->residual_in, a->residual_mid, a->att,      a->qkv,      a->fch,
                         a->ln1_mean,    a->ln1_rstd,     a->ln2_mean, a->ln2_rstd, a->lse};
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) { free(parts[i]); }
    }
    void* parts[] = {g->params,    g->grads,    g->m,         g->v,          g->block,  g->residual_out, g->lnf,
                     g->lnf_mean,  g->lnf_rstd, g->losses,    g->norm,       g->branch, g->hidden,       g->dhidden,
                     g->dresidual, g->logits,   g->head_rows, g->gathered,   g->order,  g->sum_sq,       g->ws.a,
                     g->ws.b,      g->ws.rows,  g->ws.heads,  g->ws.partial, g};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) { free(parts[i]); }
}

static real* weight_of(const GPT* g, int row, int layer) { return g->params + param_offset(&g->table, row, layer); }
static real* grad_of(const GPT* g, int row, int layer) { return g->grads + param_offset(&g->table, row, layer); }

// Where a tensor's per-example norms go; NULL if this step does not measure them.
static double* sum_sq_of(const GPT* g, int row, int layer) {
    const bool measured = gns_measures(g->gns, g->table.row[row].group);
    return measured ? &g->sum_sq[tensor_index(&g->table, row, layer)] : NULL;
}

static Attention block_attention(const GPT* g, int l, int B, int T) {
    const int C = g->config.channels, NH = g->config.num_heads;
    return (Attention){.qkv = g->block[l].qkv,
                       .B = B,
                       .T = T,
                       .C = C,
                       .NH = NH,
                       .cosine = config_is_cosine(&g->config, l),
                       .scale = (real)g->config.attn_mult / (real)sqrt((double)C / NH)};
}

// Tokens to the head's input, g->lnf. tokens (B, T)
static void gpt_forward(GPT* g, const int* tokens, int B, int T) {
    const int N = B * T, C = g->config.channels, L = g->config.num_layers;
    const real mult = (real)g->config.residual_mult;
    Workspace* ws = &g->ws;
    embedding_forward(g->block[0].residual_in, tokens, weight_of(g, WTE, 0), weight_of(g, WPE, 0),
                      (real)g->config.embed_mult, B, T, C);
    layernorm_forward(NULL, g->norm, g->block[0].ln1_mean, g->block[0].ln1_rstd, g->block[0].residual_in, NULL, 1,
                      weight_of(g, LN1W, 0), weight_of(g, LN1B, 0), N, C);
    for (int l = 0; l < L; l++) {
        BlockActivations* a = &g->block[l];
        matmul_forward(ws, a->qkv, g->norm, weight_of(g, QKVW, l), weight_of(g, QKVB, l), N, C, 3 * C);
        attention_forward(ws, a->att, a->lse, block_attention(g, l, B, T));
        matmul_forward(ws, g->branch, a->att, weight_of(g, ATTPROJW, l), weight_of(g, ATTPROJB, l), N, C, C);
        layernorm_forward(a->residual_mid, g->norm, a->ln2_mean, a->ln2_rstd, a->residual_in, g->branch, mult,
                          weight_of(g, LN2W, l), weight_of(g, LN2B, l), N, C);
        matmul_forward(ws, a->fch, g->norm, weight_of(g, FCW, l), weight_of(g, FCB, l), N, C, 4 * C);
        gelu_forward(g->hidden, a->fch, g->config.gelu, (size_t)N * 4 * (size_t)C);
        matmul_forward(ws, g->branch, g->hidden, weight_of(g, FCPROJW, l), weight_of(g, FCPROJB, l), N, 4 * C, C);
        if (l + 1 < L) {
            BlockActivations* next = &g->block[l + 1];
            layernorm_forward(next->residual_in, g->norm, next->ln1_mean, next->ln1_rstd, a->residual_mid, g->branch,
                              mult, weight_of(g, LN1W, l + 1), weight_of(g, LN1B, l + 1), N, C);
        } else {
            layernorm_forward(g->residual_out, g->lnf, g->lnf_mean, g->lnf_rstd, a->residual_mid, g->branch, mult,
                              weight_of(g, LNFW, 0), weight_of(g, LNFB, 0), N, C);
        }
    }
}

// logits (N, V) of the head's inputs x (N, C)
static void head_logits(GPT* g, real* logits, const real* x, int N) {
    const int C = g->config.channels, V = g->config.vocab_size;
    Gemm p = product(N, V, C, row_major(x, C), transposed(weight_of(g, WTE, 0), C), logits);
    p.alpha = (real)g->config.logit_mult;
    gemm(&g->ws, &p);
}

// u_b's rows for example b's own tokens: dlogits[:, tokens]^T @ x, one row for each group of equal tokens.
static void head_token_rows(GPT* g, const real* dlogits, const int* tokens, int b, int T) {
    const int C = g->config.channels, V = g->config.vocab_size, groups = g->groups[b];
    const size_t bT = (size_t)b * (size_t)T;
    const int *order = g->order + bT, *group = g->group + bT;
#pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < T; i++) {
            g->gathered[(size_t)t * (size_t)T + (size_t)group[i]] =
                dlogits[(size_t)t * (size_t)V + (size_t)tokens[bT + (size_t)order[i]]];
        }
    }
    const size_t rows = bT * (size_t)C;
    Gemm p = product(groups, C, T, transposed(g->gathered, T), row_major(g->lnf + rows, C), g->head_rows + rows);
    gemm(&g->ws, &p);
}

// Loss and gradient of the tied head, a few examples at a time: g->losses, the head's part of wte's gradient, and the
// gradient at g->lnf in g->branch. tokens, targets (B, T)
static void head_forward_backward(GPT* g, const int* tokens, const int* targets, int B, int T) {
    const int C = g->config.channels, V = g->config.vocab_size, step = head_examples(T);
    const real *wte = weight_of(g, WTE, 0), scale = (real)g->config.logit_mult / (real)T;
    double* sum_sq = sum_sq_of(g, WTE, 0);
    for (int b0 = 0; b0 < B; b0 += step) {
        const int examples = min_int(step, B - b0), N = examples * T;
        const size_t at = (size_t)b0 * (size_t)T;
        const real* x = g->lnf + at * (size_t)C;
        head_logits(g, g->logits, x, N);
        softmax_cross_entropy(g->logits, g->losses + at, targets + at, scale, N, V, (size_t)V);
        matmul_backward_input(&g->ws, g->branch + at * (size_t)C, g->logits, wte, 1, N, C, V);
        matmul_backward_weight(&g->ws, grad_of(g, WTE, 0), sum_sq, g->logits, x, 1, g->micros > 0 || b0 > 0, examples,
                               T, C, V);
        for (int b = b0; b < b0 + examples && sum_sq != NULL; b++) {
            head_token_rows(g, g->logits + (size_t)(b - b0) * (size_t)T * (size_t)V, tokens, b, T);
        }
    }
}

// One block: g->dresidual is the gradient after it on entry, before it on return.
static void block_backward(GPT* g, int l, int B, int T) {
    const int N = B * T, C = g->config.channels;
    const real mult = (real)g->config.residual_mult;
    const bool add = g->micros > 0;
    BlockActivations* a = &g->block[l];
    Workspace* ws = &g->ws;
    // MLP
    matmul_backward_input(ws, g->dhidden, g->dresidual, weight_of(g, FCPROJW, l), mult, N, 4 * C, C);
    gelu_backward(g->dhidden, g->hidden, a->fch, g->config.gelu, (size_t)N * 4 * (size_t)C);
    matmul_backward_weight(ws, grad_of(g, FCPROJW, l), sum_sq_of(g, FCPROJW, l), g->dresidual, g->hidden, mult, add, B,
                           T, 4 * C, C);
    bias_backward(ws, grad_of(g, FCPROJB, l), sum_sq_of(g, FCPROJB, l), g->dresidual, mult, B, T, C);
    layernorm_recompute(g->norm, a->residual_mid, a->ln2_mean, a->ln2_rstd, weight_of(g, LN2W, l),
                        weight_of(g, LN2B, l), N, C);
    matmul_backward_weight(ws, grad_of(g, FCW, l), sum_sq_of(g, FCW, l), g->dhidden, g->norm, 1, add, B, T, C, 4 * C);
    bias_backward(ws, grad_of(g, FCB, l), sum_sq_of(g, FCB, l), g->dhidden, 1, B, T, 4 * C);
    matmul_backward_input(ws, g->branch, g->dhidden, weight_of(g, FCW, l), 1, N, C, 4 * C);
    layernorm_backward(ws, g->dresidual, grad_of(g, LN2W, l), grad_of(g, LN2B, l), sum_sq_of(g, LN2W, l),
                       sum_sq_of(g, LN2B, l), g->branch, a->residual_mid, a->ln2_mean, a->ln2_rstd,
                       weight_of(g, LN2W, l), B, T, C);
    // attention
    matmul_backward_input(ws, g->branch, g->dresidual, weight_of(g, ATTPROJW, l), mult, N, C, C);
    matmul_backward_weight(ws, grad_of(g, ATTPROJW, l), sum_sq_of(g, ATTPROJW, l), g->dresidual, a->att, mult, add, B,
                           T, C, C);
    bias_backward(ws, grad_of(g, ATTPROJB, l), sum_sq_of(g, ATTPROJB, l), g->dresidual, mult, B, T, C);
    attention_backward(ws, g->dhidden, g->branch, a->att, a->lse, block_attention(g, l, B, T));
    layernorm_recompute(g->norm, a->residual_in, a->ln1_mean, a->ln1_rstd, weight_of(g, LN1W, l), weight_of(g, LN1B, l),
                        N, C);
    matmul_backward_weight(ws, grad_of(g, QKVW, l), sum_sq_of(g, QKVW, l), g->dhidden, g->norm, 1, add, B, T, C, 3 * C);
    bias_backward(ws, grad_of(g, QKVB, l), sum_sq_of(g, QKVB, l), g->dhidden, 1, B, T, 3 * C);
    matmul_backward_input(ws, g->branch, g->dhidden, weight_of(g, QKVW, l), 1, N, C, 3 * C);
    layernorm_backward(ws, g->dresidual, grad_of(g, LN1W, l), grad_of(g, LN1B, l), sum_sq_of(g, LN1W, l),
                       sum_sq_of(g, LN1B, l), g->branch, a->residual_in, a->ln1_mean, a->ln1_rstd,
                       weight_of(g, LN1W, l), B, T, C);
}

// A step starts: what the first micro-batch does not overwrite is set to zero.
static void gpt_step_begin(GPT* g, int gns) {
    g->gns = gns;
    g->micros = g->examples = 0;
    g->loss = 0;
    memset(g->sum_sq, 0, (size_t)g->table.num_tensors * sizeof(double));
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &g->table.row[r];
        if (row->cols == 1 || r == WPE) { memset(grad_of(g, r, 0), 0, row->size * (size_t)row->count * sizeof(real)); }
    }
    if (gns == GNS_ALL && g->head_rows == NULL) { gpt_reserve_gns_all(g); }
}

// Forward and backward of B examples: adds to gradients, norms and loss. tokens, targets (B, T)
static void gpt_micro(GPT* g, const int* tokens, const int* targets, int B, int T) {
    const int C = g->config.channels, N = B * T;
    const real embed_mult = (real)g->config.embed_mult;
    group_tokens(g->order, g->group, g->groups, tokens, B, T, g->config.vocab_size);
    gpt_forward(g, tokens, B, T);
    head_forward_backward(g, tokens, targets, B, T);
    memset(g->dresidual, 0, (size_t)N * (size_t)C * sizeof(real));
    layernorm_backward(&g->ws, g->dresidual, grad_of(g, LNFW, 0), grad_of(g, LNFB, 0), sum_sq_of(g, LNFW, 0),
                       sum_sq_of(g, LNFB, 0), g->branch, g->residual_out, g->lnf_mean, g->lnf_rstd,
                       weight_of(g, LNFW, 0), B, T, C);
    for (int l = g->config.num_layers - 1; l >= 0; l--) { block_backward(g, l, B, T); }
    for (size_t i = 0; embed_mult != 1 && i < (size_t)N * (size_t)C; i++) { g->dresidual[i] *= embed_mult; }
    embedding_backward(&g->ws, grad_of(g, WTE, 0), grad_of(g, WPE, 0), sum_sq_of(g, WTE, 0), sum_sq_of(g, WPE, 0),
                       g->dresidual, tokens, g->order, g->group, g->head_rows, B, T, C);
    for (int b = 0; b < B; b++) {
        double sum = 0;
        for (int t = 0; t < T; t++) { sum += (double)g->losses[(size_t)b * (size_t)T + (size_t)t]; }
        g->loss += sum / T;
    }
    g->micros++;
    g->examples += B;
}

// Norms, guards, clipping, update.
static void gpt_step_end(GPT* g, const StepHyper* h, StepStats* stats) {
    if (g->micros == 0) { memset(g->grads, 0, g->table.num_params * sizeof(real)); }
    const double n = h->n;
    double total = 0;
    for (int i = 0; i < g->table.num_tensors; i++) {
        int row, layer;
        tensor_at(&g->table, i, &row, &layer);
        stats->sq_sum[i] = sum_of_squares(&g->ws, grad_of(g, row, layer), g->table.row[row].size);
        stats->sum_sq[i] = g->sum_sq[i];
        total += stats->sq_sum[i];
    }
    stats->n = h->n;
    stats->gns = g->gns;
    stats->loss = g->loss / n;
    stats->grad_norm = sqrt(total) / n;
    stats->outcome = STEP_APPLIED;
    if (!isfinite(stats->loss) || !isfinite(stats->grad_norm)) {
        stats->outcome = STEP_SKIPPED_NONFINITE;
    } else if (stats->loss > (double)h->loss_limit) {
        stats->outcome = STEP_SKIPPED_LOSS;
    } else if (stats->grad_norm > (double)h->grad_norm_limit) {
        stats->outcome = STEP_SKIPPED_GRAD;
    }
    if (stats->outcome != STEP_APPLIED) { return; }
    const bool clip = h->grad_clip > 0 && stats->grad_norm > (double)h->grad_clip;
    const double scale = (clip ? (double)h->grad_clip / stats->grad_norm : 1) / n;
    const double c1 = 1 / (1 - pow((double)h->beta1, (double)h->step)),
                 c2 = 1 / (1 - pow((double)h->beta2, (double)h->step));
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &g->table.row[r];
        const size_t at = row->offset, used = (size_t)row->used_rows * (size_t)row->cols;
        const size_t count = row->count == 1 ? used : row->size * (size_t)row->count; // padding rows are left alone
        adamw_update(g->params + at, g->grads + at, g->m + at, g->v + at, count, (real)scale,
                     (real)h->lr * (real)row->lr_mult, (real)h->beta1, (real)h->beta2,
                     (real)h->eps * (real)row->eps_mult,
                     row->weight_decay ? (real)h->weight_decay * (real)row->wd_mult : 0, (real)c1, (real)c2);
    }
}

// The loss of every token, without gradients. losses (B, T)
static void gpt_eval(GPT* g, const int* tokens, const int* targets, int B, int T, float* losses) {
    const int C = g->config.channels, V = g->config.vocab_size, step = head_examples(T);
    gpt_forward(g, tokens, B, T);
    for (int b0 = 0; b0 < B; b0 += step) {
        const int N = min_int(step, B - b0) * T;
        const size_t at = (size_t)b0 * (size_t)T;
        head_logits(g, g->logits, g->lnf + at * (size_t)C, N);
        softmax_cross_entropy(g->logits, g->losses + at, targets + at, 1, N, V, (size_t)V);
    }
    for (size_t i = 0; i < (size_t)B * (size_t)T; i++) { losses[i] = (float)g->losses[i]; }
}

// The logits after the last of T tokens. logits (V)
static void gpt_logits(GPT* g, const int* tokens, int T, float* logits) {
    gpt_forward(g, tokens, 1, T);
    head_logits(g, g->logits, g->lnf + (size_t)(T - 1) * (size_t)g->config.channels, 1);
    for (int v = 0; v < g->config.vocab_size; v++) { logits[v] = (float)g->logits[v]; }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The backend

enum { PEAK_CHAINS = 12 };

// steps multiply-adds on each of PEAK_CHAINS independent vectors: enough of them to hide the latency of each.
__attribute__((noinline)) static void multiply_add_chains(vec* x, vec a, vec b, int steps) {
    vec y[PEAK_CHAINS];
    for (int i = 0; i < PEAK_CHAINS; i++) { y[i] = x[i]; }
    for (int k = 0; k < steps; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < PEAK_CHAINS; i++) { y[i] = y[i] * a + b; }
    }
    for (int i = 0; i < PEAK_CHAINS; i++) { x[i] = y[i]; }
}

// Floating-point operations a second of all threads together when nothing but arithmetic limits them: the ceiling for MFU.
static double measure_peak_flops(void) {
    enum { STEPS = 200000, ROUNDS = 8 };
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        double slowest = 0;
#pragma omp parallel reduction(max : slowest)
        {
            vec x[PEAK_CHAINS];
            for (int i = 0; i < PEAK_CHAINS; i++) { x[i] = (vec){0} + (real)i; }
            const double begin = seconds_now();
            multiply_add_chains(x, (vec){0} + (real)0.999, (vec){0} + (real)1e-3, STEPS);
            slowest = seconds_now() - begin;
            volatile real sink = x[0][0];
            (void)sink;
        }
        const double flops = 2.0 * LANES * PEAK_CHAINS * STEPS * max_threads() / slowest;
        best = flops > best ? flops : best;
    }
    return best;
}

static void cpu_step_begin(void* self, int gns) { gpt_step_begin((GPT*)self, gns); }
static void cpu_micro(void* self, const int* tokens, const int* targets, int B, int T) {
    gpt_micro((GPT*)self, tokens, targets, B, T);
}
static void cpu_step_end(void* self, const StepHyper* hyper, StepStats* stats) {
    gpt_step_end((GPT*)self, hyper, stats);
}
static void cpu_eval(void* self, const int* tokens, const int* targets, int B, int T, float* losses) {
    gpt_eval((GPT*)self, tokens, targets, B, T, losses);
}
static void cpu_logits(void* self, const int* tokens, int T, float* logits) {
    gpt_logits((GPT*)self, tokens, T, logits);
}

static real* cpu_tensor(GPT* g, int row, int layer, int what) {
    real* base[] = {g->params, g->grads, g->m, g->v}; // in the order of TENSOR_*
    return base[what] + param_offset(&g->table, row, layer);
}
static void cpu_get(void* self, int row, int layer, int what, float* values) {
    const real* x = cpu_tensor((GPT*)self, row, layer, what);
    for (size_t i = 0; i < ((GPT*)self)->table.row[row].size; i++) { values[i] = (float)x[i]; }
}
static void cpu_set(void* self, int row, int layer, int what, const float* values) {
    real* x = cpu_tensor((GPT*)self, row, layer, what);
    for (size_t i = 0; i < ((GPT*)self)->table.row[row].size; i++) { x[i] = (real)values[i]; }
}

// Weights and moments are the whole state of this backend.
static size_t cpu_state_size(void* self) { return (void)self, 0; }
static void cpu_state_get(void* self, void* blob) { (void)self, (void)blob; }
static void cpu_state_set(void* self, const void* blob) { (void)self, (void)blob; }
static void cpu_close(void* self) { gpt_free((GPT*)self); }

static void cpu_open(Backend* backend, const GPTConfig* config, const BackendOptions* options) {
    if (options->recompute != RECOMPUTE_AUTO && options->recompute != RECOMPUTE_LAYERNORM) {
        fatal("--recompute (-r) %d: the CPU trainer always computes GELU and LayerNorm again; leave it out, or give 2",
              options->recompute);
    }
    if (options->tf32 || options->profile) {
        fatal("--%s is an option of the CUDA trainer (make train_gptcu); leave it out",
              options->tf32 ? "tf32" : "profile");
    }
    static char device[96]; // lives as long as the program, like the only backend that it describes
    snprintf(device, sizeof device, "CPU, %d thread%s, %d-bit vectors", max_threads(), max_threads() == 1 ? "" : "s",
             8 * VEC_BYTES);
    GPT* g = gpt_create(config, options->max_B, options->max_T);
    *backend = (Backend){.self = g,
                         .device = device,
                         .peak_flops = measure_peak_flops(),
                         .rank = 0,
                         .num_ranks = 1,
                         .step_begin = cpu_step_begin,
                         .micro = cpu_micro,
                         .step_end = cpu_step_end,
                         .eval = cpu_eval,
                         .logits = cpu_logits,
                         .get = cpu_get,
                         .set = cpu_set,
                         .state_size = cpu_state_size,
                         .state_get = cpu_state_get,
                         .state_set = cpu_state_set,
                         .close = cpu_close};
    const char* names[] = {"weights", "gradients", "Adam moments", "activations", "scratch"};
    printf("memory      ");
    for (int i = 0; i < 5; i++) {
        printf("%s%s %.1f MiB", i > 0 ? ", " : "", names[i], (double)g->bytes[i] / (1 << 20));
    }
    printf("\n");
    if (options->gns_all) { gpt_reserve_gns_all(g); }
}

#ifndef TRAIN_GPT_NO_MAIN
int main(int argc, char** argv) { return train_main(argc, argv, cpu_open); }
#endif
