/* Products of small matrices in float32, a single thread: C = start + alpha A B.
 *
 * C is made in tiles of up to TALL rows by two vectors, whose sums stay in registers: a row of B is
 * read as vectors, one number of A after another is spread over a vector. Panels of B, two vectors
 * wide and up to DEEP rows deep, are copied (packed) into a row of memory that stays in the first
 * level of cache, with zeros beyond the last column. */

#ifndef DEEP
#define DEEP 256
#define UNROLLED _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
enum { ZERO, BIAS, ITSELF };
typedef struct {
    const float *a; /* (m, k) at a[row * rows + column * columns], one of both 1 */
    int64_t rows, columns;
} Left;
typedef struct {
    const float *b; /* (k, n) at b[row * rows + column * columns], one of both 1 */
    int64_t rows, columns;
} Right;
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
#endif

#define TALL (WIDTH == 16 ? 12 : 6)
#define WIDE (2 * WIDTH)

/* A tile's sums: A's columns lie `step` apart, its rows `stride`; either is 1 where `turned` says. */
INLINE void NAME(tile)(const int tall, const int turned, const float *a, int64_t stride,
                       int64_t depth, const float *b, int64_t b_stride, floats sums[TALL][2]) {
    floats sum[TALL][2];
    UNROLLED for (int i = 0; i < tall; i++) sum[i][0] = sum[i][1] = (floats){0};
    const float *third = a + 3 * stride, *sixth = a + 6 * stride, *ninth = a + 9 * stride;
    for (int64_t k = 0; k < depth; k++) {
        floats left = load(b), right = load(b + WIDTH);
        UNROLLED for (int i = 0; i < tall; i++) {
            const float *row = turned ? a + i
                               : (i < 3 ? a : i < 6 ? third : i < 9 ? sixth : ninth) + i % 3 * stride;
            float value = *row;
            sum[i][0] += left * value;
            sum[i][1] += right * value;
        }
        b += b_stride;
        if (turned) a += stride;
        else a++, third++, sixth++, ninth++;
    }
    UNROLLED for (int i = 0; i < tall; i++) sums[i][0] = sum[i][0], sums[i][1] = sum[i][1];
}

#define CASE(tall)                                                                     \
    case tall:                                                                         \
        NAME(tile)(tall, turned, a, stride, depth, b, b_stride, sums);                 \
        break;
/* A tile put to C: `here` columns of it count. */
INLINE void NAME(place)(const int turned, int tall, const float *a, int64_t stride, int64_t depth,
                        const float *b, int64_t b_stride, float *c, int64_t c_stride, int64_t here,
                        int start, const float *bias, float alpha) {
    floats sums[TALL][2];
    switch (tall) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if WIDTH == 16
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        default: return;
    }
    for (int i = 0; i < tall; i++, c += c_stride) {
        if (here == WIDE) {
            const float *from = start == ITSELF ? c : bias;
            floats left = sums[i][0] * alpha, right = sums[i][1] * alpha;
            if (start != ZERO) left += load(from), right += load(from + WIDTH);
            store(c, left);
            store(c + WIDTH, right);
        } else {
            float values[WIDE];
            store(values, sums[i][0]);
            store(values + WIDTH, sums[i][1]);
            for (int j = 0; j < here; j++)
                c[j] = values[j] * alpha +
                       (start == ITSELF ? c[j] : start == BIAS ? bias[j] : 0.0f);
        }
    }
}
#undef CASE

#if WIDTH == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif WIDTH == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif

/* A square of WIDTH rows of `from`, turned, to rows of `to`: shuffled like cards, half by half. */
static inline void NAME(turn)(const float *from, int64_t stride, float *to, int64_t to_stride) {
    floats now[WIDTH], next[WIDTH];
    UNROLLED for (int i = 0; i < WIDTH; i++) now[i] = load(from + i * stride);
    UNROLLED for (int done = 1; done < WIDTH; done *= 2) {
        UNROLLED for (int i = 0; i < WIDTH / 2; i++) {
            next[2 * i] = SHUFFLE(now[i], now[i + WIDTH / 2], LOW);
            next[2 * i + 1] = SHUFFLE(now[i], now[i + WIDTH / 2], HIGH);
        }
        UNROLLED for (int i = 0; i < WIDTH; i++) now[i] = next[i];
    }
    UNROLLED for (int i = 0; i < WIDTH; i++) store(to + i * to_stride, now[i]);
}
#undef LOW
#undef HIGH

/* Columns `first` to `first` + WIDE of B's rows `top` to `top` + `deep`, packed. */
static void NAME(pack)(Right b, int64_t top, int64_t deep, int64_t first, int64_t last, float *to) {
    int64_t here = least(last - first, WIDE);
    const float *from = b.b + top * b.rows + first * b.columns;
    if (b.columns == 1) {
        for (int64_t k = 0; k < deep; k++, from += b.rows, to += WIDE) {
            if (here == WIDE) {
                store(to, load(from));
                store(to + WIDTH, load(from + WIDTH));
                continue;
            }
            for (int64_t j = 0; j < WIDE; j++) to[j] = j < here ? from[j] : 0.0f;
        }
        return;
    }
    int64_t k = 0;
    if (here == WIDE)
        for (; k + WIDTH <= deep; k += WIDTH)
            for (int j = 0; j < WIDE; j += WIDTH)
                NAME(turn)(from + j * b.columns + k, b.columns, to + k * WIDE + j, WIDE);
    for (; k < deep; k++)
        for (int64_t j = 0; j < WIDE; j++)
            to[k * WIDE + j] = j < here ? from[j * b.columns + k] : 0.0f;
}

/* All of B (k, n), packed: panel after panel, each k rows deep. */
static void NAME(pack_all)(Right b, int64_t k, int64_t n, float *to) {
    for (int64_t first = 0; first < n; first += WIDE, to += k * WIDE)
        NAME(pack)(b, 0, k, first, n, to);
}

static int64_t NAME(packed_size)(int64_t k, int64_t n) { return (n + WIDE - 1) / WIDE * WIDE * k; }

/* One panel's columns of C: (m, `here`) from a panel (deep, WIDE). */
static void NAME(panel)(const float *a, int64_t rows, int64_t columns, int64_t m, int64_t deep,
                        const float *b, int64_t b_stride, float *c, int64_t c_stride, int64_t here,
                        int start, const float *bias, float alpha) {
    int64_t tiles = (m + TALL - 1) / TALL, tall = tiles ? (m + tiles - 1) / tiles : 0;
    for (int64_t i = 0; i < m; i += tall) {
        int own = (int)least(tall, m - i);
        if (columns == 1)
            NAME(place)(0, own, a + i * rows, rows, deep, b, b_stride, c + i * c_stride, c_stride,
                        here, start, bias, alpha);
        else
            NAME(place)(1, own, a + i, columns, deep, b, b_stride, c + i * c_stride, c_stride,
                        here, start, bias, alpha);
    }
}

/* C (m, n) = start + alpha A B with a packed B (`pack_all`); bias (n,). */
static void NAME(packed_product)(Left a, const float *b, float *c, int64_t c_stride, int64_t m,
                                 int64_t k, int64_t n, int start, const float *bias, float alpha) {
    int64_t deepest = m <= TALL ? k : DEEP;
    for (int64_t top = 0; top == 0 || top < k; top += deepest)
        for (int64_t first = 0; first < n; first += WIDE)
            NAME(panel)(a.a + top * a.columns, a.rows, a.columns, m, least(deepest, k - top),
                        b + first * k + top * WIDE, WIDE, c + first, c_stride,
                        least(WIDE, n - first), top ? ITSELF : start, bias ? bias + first : 0,
                        alpha);
}

/* The same for B as it is; `panel` (DEEP * WIDE,) is scratch. `scale` (k / each,) or none: factors
 * of the terms of the sum, each for `each` in a row. */
static void NAME(product)(Left a, Right b, float *panel, float *c, int64_t c_stride, int64_t m,
                          int64_t k, int64_t n, int start, const float *bias, float alpha,
                          const float *scale, int64_t each) {
    for (int64_t top = 0; top == 0 || top < k; top += DEEP)
        for (int64_t first = 0; first < n; first += WIDE) {
            int64_t deep = least(DEEP, k - top), here = least(WIDE, n - first);
            NAME(pack)(b, top, deep, first, n, panel);
            for (int64_t i = 0; scale && i < deep; i++) {
                float *row = panel + i * WIDE, factor = scale[(top + i) / each];
                store(row, load(row) * factor);
                store(row + WIDTH, load(row + WIDTH) * factor);
            }
            NAME(panel)(a.a + top * a.columns, a.rows, a.columns, m, deep, panel, WIDE, c + first,
                        c_stride, here, top ? ITSELF : start, bias ? bias + first : 0, alpha);
        }
}

/* y = x W^T + b in every group: x (groups, n, in), W (groups, out, in), b (groups, out) or none. */
static void NAME(linear)(int64_t groups, int64_t n, int64_t in, int64_t out, const float *x,
                         const float *weight, const float *bias, float *y) {
    float panel[DEEP * WIDE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < groups; g++)
        NAME(product)((Left){x + g * n * in, in, 1}, (Right){weight + g * out * in, 1, in}, panel,
                      y + g * n * out, out, n, in, out, bias ? BIAS : ZERO,
                      bias ? bias + g * out : 0, 1, 0, 1);
}

/* g W in every group: g (groups, n, out), W (groups, out, in). */
static void NAME(matmul)(int64_t groups, int64_t n, int64_t in, int64_t out, const float *g,
                         const float *weight, float *x) {
    float panel[DEEP * WIDE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < groups; k++)
        NAME(product)((Left){g + k * n * out, out, 1}, (Right){weight + k * out * in, in, 1}, panel,
                      x + k * n * in, in, n, out, in, ZERO, 0, 1, 0, 1);
}

/* How many of `rows` (rows, width) in the beginning are zero. */
static int64_t NAME(zeros)(const float *values, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t j = 0; j < width; j++)
            if (values[row * width + j] != 0) return row;
    return rows;
}

/* Sums of outer products in every group, g (groups, n, out) and x (groups, n, in), times `alpha`
 * and, `each` in a row, `scale` (groups, n / each) or none: they become `to` (groups, out, in), or
 * are added to it. Zeros that a group's g begins with, of rows that fill it up, are passed over. */
static void NAME(outer)(int64_t groups, int64_t n, int64_t in, int64_t out, const float *g,
                        const float *x, float *to, int added, float alpha, const float *scale,
                        int64_t each) {
    float panel[DEEP * WIDE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < groups; k++) {
        int64_t empty = NAME(zeros)(g + k * n * out, n, out) / each * each, first = k * n + empty;
        NAME(product)((Left){g + first * out, 1, out}, (Right){x + first * in, in, 1}, panel,
                      to + k * out * in, in, out, n - empty, in, added ? ITSELF : ZERO, 0, alpha,
                      scale ? scale + first / each : 0, each);
    }
}
