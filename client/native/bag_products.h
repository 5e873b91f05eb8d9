/* Products of a few rows with a matrix (outputs, inputs) that lies in the processor's cache.
 *
 * Matrices have rows of `width` floats, a multiple of BAG_PAD, and a multiple of 4 of them; what
 * fills them up is 0. Batch rows come in fours, the last ones of zeros. */

#ifndef BAG_PAD
#define BAG_PAD 16 /* floats: a vector of any level */
#ifdef __clang__
#define BAG_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BAG_PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
#define BAG_INLINE static inline __attribute__((always_inline))
#endif

#if WIDTH == 16
#define BAG_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define BAG_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define BAG_TALL 4
#elif WIDTH == 8
#define BAG_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define BAG_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define BAG_TALL 2
#else
#define BAG_EVENS 0, 2, 4, 6
#define BAG_ODDS 1, 3, 5, 7
#define BAG_TALL 2
#endif

typedef float NAME(quad) __attribute__((vector_size(16)));
#define BAG_PAIR(a, b) (BAG_PICK(a, b, BAG_EVENS) + BAG_PICK(a, b, BAG_ODDS))

/* The sum of each of WIDTH vectors, in their order. */
BAG_INLINE floats NAME(bag_added)(const floats *v) {
    floats half[WIDTH / 2], quarter[WIDTH / 4];
#pragma GCC unroll 8
    for (int k = 0; k < WIDTH / 2; k++) half[k] = BAG_PAIR(v[2 * k], v[2 * k + 1]);
#pragma GCC unroll 4
    for (int k = 0; k < WIDTH / 4; k++) quarter[k] = BAG_PAIR(half[2 * k], half[2 * k + 1]);
#if WIDTH == 16
    return BAG_PAIR(BAG_PAIR(quarter[0], quarter[1]), BAG_PAIR(quarter[2], quarter[3]));
#elif WIDTH == 8
    return BAG_PAIR(quarter[0], quarter[1]);
#else
    return quarter[0];
#endif
}

/* y[r][o] = bias[o] + x[r] . m[o]: y (rows, out_width), of which `outputs` up to 4 are written. */
static void NAME(bag_ahead)(const float *x, const float *m, const float *bias, float *y,
                            int64_t rows, int64_t outputs, int64_t width, int64_t out_width) {
    const int tall = WIDTH / 4;
    for (int64_t o = 0; o < outputs; o += 4) {
        NAME(quad) start;
        memcpy(&start, bias + o, sizeof start);
        for (int64_t r = 0; r < rows; r += tall) {
            floats sum[WIDTH] = {{0}};
            for (int64_t i = 0; i < width; i += WIDTH) {
                floats w[4];
                for (int k = 0; k < 4; k++) w[k] = load(m + (o + k) * width + i);
                for (int t = 0; t < tall; t++) {
                    floats own = load(x + (r + t) * width + i);
                    for (int k = 0; k < 4; k++) sum[4 * t + k] += own * w[k];
                }
            }
            floats all = NAME(bag_added)(sum);
            NAME(quad) found[WIDTH / 4];
            memcpy(found, &all, sizeof all);
            for (int t = 0; t < tall; t++) {
                found[t] += start;
                memcpy(y + (r + t) * out_width + o, found + t, sizeof start);
            }
        }
    }
}

/* y[r] = sum_o g[r][o] m[o]: BAG_TALL rows and `wide` vectors at once. */
BAG_INLINE void NAME(bag_back_tile)(const float *g, const float *m, float *y, int64_t outputs,
                                    int64_t width, int64_t out_width, const int wide) {
    floats sum[BAG_TALL * 4] = {{0}};
    for (int64_t o = 0; o < outputs; o++) {
        floats w[4];
        for (int k = 0; k < wide; k++) w[k] = load(m + o * width + k * WIDTH);
        for (int t = 0; t < BAG_TALL; t++) {
            floats own = (floats){0} + g[t * out_width + o];
            for (int k = 0; k < wide; k++) sum[4 * t + k] += own * w[k];
        }
    }
    for (int t = 0; t < BAG_TALL; t++)
        for (int k = 0; k < wide; k++) store(y + t * width + k * WIDTH, sum[4 * t + k]);
}

static void NAME(bag_back)(const float *g, const float *m, float *y, int64_t rows, int64_t outputs,
                           int64_t width, int64_t out_width) {
    for (int64_t r = 0; r < rows; r += BAG_TALL) {
        const float *own = g + r * out_width;
        int64_t i = 0;
        for (; i + 4 * WIDTH <= width; i += 4 * WIDTH)
            NAME(bag_back_tile)(own, m + i, y + r * width + i, outputs, width, out_width, 4);
        for (; i < width; i += WIDTH)
            NAME(bag_back_tile)(own, m + i, y + r * width + i, outputs, width, out_width, 1);
    }
}

/* m[o] (+)= sum_r g[r][o] x[r], and with `both` the same added there: BAG_TALL outputs and `wide`
 * vectors at once. */
BAG_INLINE void NAME(bag_outer_tile)(const float *g, const float *x, float *m, float *both,
                                     int64_t rows, int64_t width, int64_t out_width, int add,
                                     const int wide) {
    floats sum[BAG_TALL * 4] = {{0}};
    for (int64_t r = 0; r < rows; r++) {
        floats in[4];
        for (int k = 0; k < wide; k++) in[k] = load(x + r * width + k * WIDTH);
        for (int t = 0; t < BAG_TALL; t++) {
            floats own = (floats){0} + g[r * out_width + t];
            for (int k = 0; k < wide; k++) sum[4 * t + k] += own * in[k];
        }
    }
    for (int t = 0; t < BAG_TALL; t++)
        for (int k = 0; k < wide; k++) {
            int64_t at = t * width + k * WIDTH;
            store(m + at, add ? load(m + at) + sum[4 * t + k] : sum[4 * t + k]);
            if (both) store(both + at, load(both + at) + sum[4 * t + k]);
        }
}

static void NAME(bag_outer)(const float *g, const float *x, float *m, float *both, int64_t rows,
                            int64_t outputs, int64_t width, int64_t out_width, int add) {
    for (int64_t o = 0; o < outputs; o += BAG_TALL)
        for (int64_t i = 0; i < width;) {
            int64_t at = o * width + i;
            float *other = both ? both + at : NULL;
            if (i + 4 * WIDTH <= width) {
                NAME(bag_outer_tile)(g + o, x + i, m + at, other, rows, width, out_width, add, 4);
                i += 4 * WIDTH;
            } else {
                NAME(bag_outer_tile)(g + o, x + i, m + at, other, rows, width, out_width, add, 1);
                i += WIDTH;
            }
        }
}

/* to[i] += scale * from[i]; any count. */
static inline void NAME(bag_add)(float *restrict to, const float *restrict from, float scale,
                                 int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += scale * from[i];
}

/* The sum of squares of `count` floats, a multiple of BAG_PAD, in double precision. */
typedef float NAME(halves) __attribute__((vector_size(2 * WIDTH)));
typedef double NAME(doubles) __attribute__((vector_size(4 * WIDTH)));

static double NAME(bag_squares)(const float *x, int64_t count) {
    NAME(doubles) sums[4] = {{0}};
    for (int64_t i = 0; i < count; i += BAG_PAD)
        for (int k = 0; k < 2 * BAG_PAD / WIDTH; k++) {
            NAME(halves) part;
            memcpy(&part, x + i + k * (WIDTH / 2), sizeof part);
            NAME(doubles) own = __builtin_convertvector(part, NAME(doubles));
            sums[k % 4] += own * own;
        }
    NAME(doubles) all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int k = 0; k < WIDTH / 2; k++) total += all[k];
    return total;
}

/* exp(x) for x <= 0, to 2 roundings (Cephes); 0 below -87. */
static inline floats NAME(bag_exp)(floats x) {
    const float rounder = 0x1.8p23f;
    ints low = x < -87.0f, bits;
    floats power = (x * 1.44269504088896341f + rounder) - rounder;
    floats rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    floats sum = rest * 1.9875691500E-4f + 1.3981999507E-3f;
    sum = sum * rest + 8.3334519073E-3f;
    sum = sum * rest + 4.1665795894E-2f;
    sum = sum * rest + 1.6666665459E-1f;
    sum = sum * rest + 5.0000001201E-1f;
    sum = sum * rest * rest + rest + 1.0f;
    bits = (__builtin_convertvector(power, ints) + 127) << 23;
    floats scale;
    memcpy(&scale, &bits, sizeof scale);
    sum *= scale;
    memcpy(&bits, &sum, sizeof bits);
    bits &= ~low;
    memcpy(&sum, &bits, sizeof sum);
    return sum;
}

#undef BAG_EVENS
#undef BAG_ODDS
#undef BAG_PAIR
