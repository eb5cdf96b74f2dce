/* Vectors of LANES floats: GCC's and Clang's generic ones, and where the generic form is slow the
   processor's own instructions. Included by one variant a file, which defines LANES. */

#include "cpu_rows.h"

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

enum { FLUSH = 64 }; /* vectors added up in fp32 before their sum goes to double */

INLINE vec all(float x) { return x - (vec){0}; }

/* Where `mask` has its bits set a, elsewhere b. */
INLINE vec choose(ints mask, vec a, vec b) {
    return (vec)(((ints)a & mask) | ((ints)b & ~mask));
}

INLINE vec maximum(vec a, vec b) {
#if defined(FASTDML_AVX512)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(FASTDML_AVX2)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vec minimum(vec a, vec b) { return -maximum(-a, -b); }

/* a b + c. With one rounding where the processor can: wherever a difference must be exactly 0, both
   sides of it come from the same call. */
INLINE vec muladd(vec a, vec b, vec c) {
#if defined(FASTDML_AVX512)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTDML_AVX2)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The sum of the lanes, in double. */
INLINE double total(vec x) {
#if defined(FASTDML_AVX512)
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
    return _mm512_reduce_add_pd(low + high);
#elif defined(FASTDML_AVX2)
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
    const __m256d sum = low + high;
    const __m128d half = _mm256_castpd256_pd128(sum) + _mm256_extractf128_pd(sum, 1);
    return half[0] + half[1];
#else
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* The largest lane. */
INLINE float largest(vec x) {
#if defined(FASTDML_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(FASTDML_AVX2)
    __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)x),
                             _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

/* Whether a lane is NaN. */
INLINE int any_nan(vec x) {
#if defined(FASTDML_AVX512)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q) != 0;
#elif defined(FASTDML_AVX2)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q)) != 0;
#else
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i] != x[i];
    return found;
#endif
}

/* exp's range reduction, x = power ln 2 + r, and exp(r) - 1 for the r so found: the polynomial of
   Cephes' expf (Moshier). x is at least -87 and at most 0. */
INLINE vec reduced_expm1(vec x, vec *power) {
    const vec shift = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    const vec whole = muladd(x, all(1.44269504f), shift) - shift;
    const vec r = muladd(whole, all(2.12194440e-4f), muladd(whole, all(-0.693359375f), x));
    vec p = muladd(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = muladd(p, r, all(8.3334519073e-3f));
    p = muladd(p, r, all(4.1665795894e-2f));
    p = muladd(p, r, all(1.6666665459e-1f));
    p = muladd(p, r, all(5.0000001201e-1f));
    *power = whole;
    return muladd(p, r * r, r);
}

/* 2^power for whole numbers from -126 on. */
INLINE vec power_of_two(vec power) {
    return (vec)((__builtin_convertvector(power, ints) + 127) << 23);
}

/* exp(x) for x <= 0 within about one unit in the last place; 0 from -87 down. */
INLINE vec exp_(vec x) {
    vec power;
#if defined(FASTDML_AVX512)
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
    const vec p = reduced_expm1(x, &power) + 1.0f;
    return (vec)_mm512_maskz_scalef_ps(above, (__m512)p, (__m512)power);
#else
    const ints above = x > -87.0f;
    const vec p = reduced_expm1((vec)((ints)x & above), &power) + 1.0f;
    return (vec)((ints)(p * power_of_two(power)) & above);
#endif
}

/* exp(x), and exp(x) - 1 to less_1, for x <= 0: exactly 1 and 0 at 0. As at -87 from there down. */
INLINE vec exp_and_expm1(vec x, vec *less_1) {
    vec power;
    const vec p = reduced_expm1(maximum(x, all(-87.0f)), &power), scale = power_of_two(power);
    *less_1 = muladd(scale, p, scale - 1.0f);
    return muladd(scale, p, scale);
}

INLINE vec expm1_(vec x) {
    vec less_1;
    exp_and_expm1(x, &less_1);
    return less_1;
}

/* log(1 + x) for 1 + x = u, a normal number; exactly 0 at x = 0. Near u = 1, x says more than u
   does. The polynomial is that of Cephes' logf (Moshier). */
INLINE vec log_(vec u, vec x) {
    const ints bits = (ints)u;
    const ints exponent = (bits - 0x3f3504f3) >> 23; /* of u / sqrt(1/2), rounded down */
    const vec mantissa = (vec)(bits - (exponent << 23));
    const vec power = __builtin_convertvector(exponent, vec);
    const vec f = choose(exponent == 0, x, mantissa - 1.0f);
    vec p = muladd(f, all(7.0376836292e-2f), all(-1.1514610310e-1f));
    p = muladd(p, f, all(1.1676998740e-1f));
    p = muladd(p, f, all(-1.2420140846e-1f));
    p = muladd(p, f, all(1.4249322787e-1f));
    p = muladd(p, f, all(-1.6668057665e-1f));
    p = muladd(p, f, all(2.0000714765e-1f));
    p = muladd(p, f, all(-2.4999993993e-1f));
    p = muladd(p, f, all(3.3333331174e-1f));
    const vec square = f * f;
    p = muladd(power, all(-2.12194440e-4f), p * f * square);
    p = muladd(square, all(-0.5f), p) + f;
    return muladd(power, all(0.693359375f), p);
}

/* log(1 + x) for -1 <= x <= 0; as at one rounding above -1 where x is -1. */
INLINE vec log1p_(vec x) {
    x = maximum(x, all(-0.99999994f));
    return log_(1.0f + x, x);
}

INLINE vec load(const char *row, int type, int64_t at) {
    vec x;
    if (type == FLOAT32) {
        memcpy(&x, row + 4 * at, sizeof x);
    } else {
        halves h;
        memcpy(&h, row + 2 * at, sizeof h);
        x = (vec)(__builtin_convertvector(h, words) << 16);
    }
    return x;
}

INLINE float load_one(const char *row, int type, int64_t at) {
    float x;
    if (type == FLOAT32) {
        memcpy(&x, row + 4 * at, 4);
    } else {
        uint16_t h;
        memcpy(&h, row + 2 * at, 2);
        const uint32_t bits = (uint32_t)h << 16;
        memcpy(&x, &bits, 4);
    }
    return x;
}

INLINE void store(char *row, int type, int64_t at, vec x) {
    if (type == FLOAT32) {
        memcpy(row + 4 * at, &x, sizeof x);
    } else { /* to nearest, ties to even; x is finite */
        words bits = (words)x;
        bits += 0x7fff + ((bits >> 16) & 1);
        const halves h = __builtin_convertvector(bits >> 16, halves);
        memcpy(row + 2 * at, &h, sizeof h);
    }
}

/* Vectors of scratch memory, whose rows are whole vectors. */
INLINE vec get(const float *row, int64_t at) { return load((const char *)row, FLOAT32, at); }
INLINE void put(float *row, int64_t at, vec x) { store((char *)row, FLOAT32, at, x); }

INLINE ints lane_numbers(void) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* `amount` at class `y` of the vector that begins at c, elsewhere 0. */
INLINE vec at_label(int64_t y, int64_t c, float amount) {
    return (vec)((ints)all(amount) & (lane_numbers() == (int32_t)(y - c)));
}
