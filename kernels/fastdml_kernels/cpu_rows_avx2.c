/* The loops for x86-64 processors with AVX2, eight floats at a time. */

#include "cpu_rows.h"

#ifdef FASTDML_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define FASTDML_AVX2
#define LANES 8
#define BLOCKS fastdml_blocks_avx2
#include "cpu_variant.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
