/*
Random numbers: the Mersenne Twister with PyTorch's way of turning it into floats, so that a model initialised here has
the weights that torch.manual_seed(seed) gives; and SplitMix64, a stateless hash for everything that must be a function
of (seed, index) alone.

Sources: Matsumoto & Nishimura 1998 (mt19937); PyTorch aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill,
the order of draws), torch/nn/init.py (trunc_normal_); Steele, Lea & Flood 2014 (SplitMix64).
*/
#ifndef LLMC_RAND_H
#define LLMC_RAND_H

#include "check.h"
#include <math.h>

// ---------------------------------------------------------------------------------------------------------------------
// SplitMix64

// A bijective 64-bit hash: the output function of SplitMix64 applied to x.
static inline uint64_t hash64(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

// The next number of the generator whose whole state is *state.
static inline uint64_t splitmix64(uint64_t* state) { return hash64(*state += UINT64_C(0x9e3779b97f4a7c15)); }

// Uniform in [0, 1) with 53 bits.
static inline double splitmix64_uniform(uint64_t* state) { return (double)(splitmix64(state) >> 11) * 0x1p-53; }

// ---------------------------------------------------------------------------------------------------------------------
// mt19937

typedef struct {
    uint32_t word[624];
    int next;       // the next word to hand out; 624: make a new block first
    bool has_spare; // normal_() of fewer than 16 numbers draws them in pairs and keeps the second
    double spare;
} Mt19937;

static inline void mt19937_seed(Mt19937* r, uint32_t seed) {
    r->word[0] = seed;
    for (uint32_t i = 1; i < 624; i++) {
        r->word[i] = UINT32_C(1812433253) * (r->word[i - 1] ^ (r->word[i - 1] >> 30)) + i;
    }
    r->next = 624;
    r->has_spare = false;
    r->spare = 0;
}

static inline uint32_t mt19937_u32(Mt19937* r) {
    if (r->next == 624) {
        for (int i = 0; i < 624; i++) {
            uint32_t y = (r->word[i] & UINT32_C(0x80000000)) | (r->word[(i + 1) % 624] & UINT32_C(0x7fffffff));
            r->word[i] = r->word[(i + 397) % 624] ^ (y >> 1) ^ ((y & 1) ? UINT32_C(0x9908b0df) : 0);
        }
        r->next = 0;
    }
    uint32_t y = r->word[r->next++];
    y ^= y >> 11;
    y ^= (y << 7) & UINT32_C(0x9d2c5680);
    y ^= (y << 15) & UINT32_C(0xefc60000);
    return y ^ (y >> 18);
}

// Uniform in [0, 1) as torch draws a float: the low 24 bits of one word.
static inline float mt19937_float(Mt19937* r) { return (float)(mt19937_u32(r) & 0xffffff) * 0x1p-24f; }

// Uniform in [0, 1) as torch draws a double: the low 53 bits of two words, the first of them the high half.
static inline double mt19937_double(Mt19937* r) {
    uint64_t high = mt19937_u32(r), low = mt19937_u32(r);
    return (double)(((high << 32) | low) & ((UINT64_C(1) << 53) - 1)) * 0x1p-53;
}

// Box-Muller on 16 uniform numbers in place, the pairs being (x[j], x[j+8]).
static inline void normal_16(float* x, float mean, float std) {
    for (int j = 0; j < 8; j++) {
        float u1 = 1 - x[j], u2 = x[j + 8]; // 1 - u: (0, 1], so that the logarithm exists
        float radius = sqrtf(-2 * logf(u1)), theta = (float)(2 * M_PI) * u2;
        x[j] = radius * cosf(theta) * std + mean;
        x[j + 8] = radius * sinf(theta) * std + mean;
    }
}

// torch.Tensor.normal_(mean, std) on n contiguous floats.
static inline void normal_fill(Mt19937* r, float* x, size_t n, float mean, float std) {
    if (n >= 16) {
        for (size_t i = 0; i < n; i++) { x[i] = mt19937_float(r); }
        for (size_t i = 0; i + 16 <= n; i += 16) { normal_16(x + i, mean, std); }
        if (n % 16 != 0) { // the last 16 numbers are drawn anew, as torch does
            for (size_t i = n - 16; i < n; i++) { x[i] = mt19937_float(r); }
            normal_16(x + n - 16, mean, std);
        }
        return;
    }
    for (size_t i = 0; i < n; i++) {
        double z = r->spare;
        if (!r->has_spare) {
            double u1 = mt19937_double(r), u2 = mt19937_double(r);
            double radius = sqrt(-2 * log1p(-u2)), theta = 2 * M_PI * u1;
            r->spare = radius * sin(theta);
            z = radius * cos(theta);
        }
        r->has_spare = !r->has_spare;
        x[i] = (float)(z * std + mean);
    }
}

// The inverse of erf on (-1, 1), exact to the last bits of a double: Giles' approximation (2010), then two Newton steps.
static inline double erf_inverse(double y) {
    double w = -log((1 - y) * (1 + y)), x;
    if (w < 5) {
        w -= 2.5;
        const double c[] = {2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
                            -0.00125372503, -0.00417768164, 0.246640727,    1.50140941};
        x = c[0];
        for (int i = 1; i < 9; i++) { x = x * w + c[i]; }
    } else {
        w = sqrt(w) - 3;
        const double c[] = {-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
                            -0.0076224613,   0.00943887047,  1.00167406,    2.83297682};
        x = c[0];
        for (int i = 1; i < 9; i++) { x = x * w + c[i]; }
    }
    x *= y;
    for (int i = 0; i < 2; i++) { x -= (erf(x) - y) / (M_2_SQRTPI * exp(-x * x)); }
    return x;
}

// torch.nn.init.trunc_normal_(mean=0, std, a=-bound*std, b=bound*std) on n floats, as PyTorch up to 2.11 draws it (the
// versions that the peers' published runs used; 2.12 turned to rejection): the inverse distribution function of one
// uniform number each.
static inline void truncated_normal_fill(Mt19937* r, float* x, size_t n, float std, double bound) {
    double tail = (1 + erf(-bound * M_SQRT1_2)) / 2; // the mass below -bound standard deviations
    float low = (float)(2 * tail - 1), high = (float)(2 * (1 - tail) - 1);
    for (size_t i = 0; i < n; i++) {
        double u = (double)(mt19937_float(r) * (high - low) + low);
        double z = erf_inverse(u) * M_SQRT2;
        x[i] = (float)(std * (z < -bound ? -bound : z > bound ? bound : z));
    }
}

#endif
