/* Kernels in C, compiled once for each vector width of this kind of processor.
 *
 * Every level includes the same sources with another NAME and WIDTH; `kernels_use` chooses one.
 * No function here allocates what it does not free, calls Python, or keeps anything between calls. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#endif

#define WIDTH 4
#define NAME(name) name##_generic
#include "level.h"

#ifdef X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define WIDTH 8
#define NAME(name) name##_avx2
#include "level.h"
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define WIDTH 16
#define NAME(name) name##_avx512
#include "level.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static int level = 0; /* 0 generic, 1 AVX2, 2 AVX-512 */

static int best_level(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Use the best level up to `most`; which one that is. */
int kernels_use(int most) {
    int best = best_level();
    level = most < best ? most : best;
    return level;
}

/* The level in use. */
int kernels_level(void) { return level; }

#ifdef X86
#define CALL(name, ...)                                                     \
    (level == 2 ? name##_avx512(__VA_ARGS__)                                \
                : level == 1 ? name##_avx2(__VA_ARGS__) : name##_generic(__VA_ARGS__))
#else
#define CALL(name, ...) name##_generic(__VA_ARGS__)
#endif

#include "calls.h"
