/* The loops for x86-64 processors with AVX-512, sixteen floats at a time. */

#include "cpu_rows.h"

#ifdef FASTDML_X86
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi,bmi2")
#endif
#define FASTDML_AVX512
#define LANES 16
#define BLOCKS fastdml_blocks_avx512
#include "cpu_variant.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
