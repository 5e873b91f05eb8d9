/* WIDTH floats or ints at once, in the vector types that GCC and Clang share. */

typedef float NAME(floats) __attribute__((vector_size(4 * WIDTH)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * WIDTH)));
#define floats NAME(floats)
#define ints NAME(ints)

static inline floats NAME(load)(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void NAME(store)(float *to, floats value) { memcpy(to, &value, sizeof value); }
#define load NAME(load)
#define store NAME(store)
