/* Products of a row's positions with each other, in double: x_t . x_s for all t, s. */

typedef double NAME(doubles) __attribute__((vector_size(4 * WIDTH)));
#define doubles NAME(doubles)

#ifndef GRAM_CHUNK
#define GRAM_CHUNK 128 /* numbers of a position that are turned into doubles at once */
#define GRAM_SIDE 4    /* a block of SIDE x SIDE products is kept in registers */
#endif

/* A block of products: SIDE positions from `a` on with SIDE from `b` on, added to `out`. */
static inline void NAME(gram_block)(
    const double *a, const double *b, int64_t chunk, double *out, int64_t length, int64_t first,
    int64_t second
) {
    const int lanes = WIDTH / 2;
    doubles sums[GRAM_SIDE][GRAM_SIDE] = {0};
    for (int64_t at = 0; at < chunk; at += lanes) {
        doubles left[GRAM_SIDE], right;
        for (int i = 0; i < GRAM_SIDE; i++)
            memcpy(&left[i], a + i * GRAM_CHUNK + at, sizeof left[i]);
        for (int j = 0; j < GRAM_SIDE; j++) {
            memcpy(&right, b + j * GRAM_CHUNK + at, sizeof right);
            for (int i = 0; i < GRAM_SIDE; i++) sums[i][j] += left[i] * right;
        }
    }
    for (int i = 0; i < GRAM_SIDE && first + i < length; i++)
        for (int j = 0; j < GRAM_SIDE && second + j < length; j++) {
            double total = 0.0;
            for (int k = 0; k < lanes; k++) total += sums[i][j][k];
            out[(first + i) * length + second + j] += total;
        }
}

/* Whether a row (length, width) is nothing but zeros. */
static int NAME(gram_nothing)(const float *x, int64_t length, int64_t width, int64_t step) {
    for (int64_t t = 0; t < length; t++)
        for (int64_t k = 0; k < width; k++)
            if (x[t * step + k] != 0) return 0;
    return 1;
}

/* x (rows, length, width), of rows and positions that many numbers apart, to products
 * (rows, length, length). `space`: doubles, (length rounded up to SIDE) x CHUNK. */
static void NAME(gram)(
    const float *x, int64_t rows, int64_t length, int64_t width, int64_t row_step,
    int64_t position_step, double *products, double *space
) {
    for (int64_t row = 0; row < rows; row++, products += length * length, x += row_step) {
        memset(products, 0, sizeof(double) * (size_t)(length * length));
        if (NAME(gram_nothing)(x, length, width, position_step)) continue; /* it fills up a step */
        for (int64_t start = 0; start < width; start += GRAM_CHUNK) {
            int64_t here = width - start < GRAM_CHUNK ? width - start : GRAM_CHUNK;
            int64_t chunk = (here + WIDTH - 1) / WIDTH * WIDTH;
            for (int64_t t = 0; t < length; t++) {
                const float *from = x + t * position_step + start;
                double *to = space + t * GRAM_CHUNK;
                for (int64_t k = 0; k < here; k++) to[k] = from[k];
                for (int64_t k = here; k < chunk; k++) to[k] = 0.0;
            }
            for (int64_t t = 0; t < length; t += GRAM_SIDE)
                for (int64_t s = t; s < length; s += GRAM_SIDE)
                    NAME(gram_block)(
                        space + t * GRAM_CHUNK, space + s * GRAM_CHUNK, chunk, products, length,
                        t, s);
        }
        for (int64_t t = 0; t < length; t++)
            for (int64_t s = 0; s < t; s++) products[t * length + s] = products[s * length + t];
    }
}
#undef doubles
