/* Random words to standard normals, by the inverse of their distribution function.
 *
 * A word w is a number u = (w + 1/2) / 2^31 in (-1, 1). With v = -ln(1 - u^2) the normal is u f(v), and
 * f(v) = sqrt(2) erfinv(u) / u is smooth: a polynomial of degree 10 in v has a relative error below
 * 2e-7 for v <= 7.65. Words within TAIL of either end are left to the caller (their sign alone is
 * written), so v stays below -ln(2^-12 (2 - 2^-12)) = 7.63. */

#ifndef TAIL
#define TAIL (1 << 19) /* of 2^31: |u| > 1 - 2^-12 */
#define TOP 7.65f
#define BATCH 4
static const float CENTRE[11] = {
    2.571884642e+00f, 1.248808688e+00f, -1.467226274e-01f, -2.307662248e-02f, 4.013943073e-02f,
    -1.860210414e-02f, 1.091052328e-03f, 4.302789156e-03f, -2.346712280e-03f, -2.600287114e-04f,
    4.410315785e-04f};
static const float LOGARITHM[9] = { /* ln(1 + x) - x + x^2 / 2 over x^3, |x| <= 0.42: Cephes' logf */
    3.3333331174E-1f, -2.4999993993E-1f, 2.0000714765E-1f, -1.6668057665E-1f, 1.4249322787E-1f,
    -1.2420140846E-1f, 1.1676998740E-1f, -1.1514610310E-1f, 7.0376836292E-2f};
#endif

/* 2^31 times the distance of each |u| to 1, less 1/2. */
#define REST(word) (0x7fffffff - ((word) ^ ((word) >> 31)))

/* Normals of words, BATCH vectors at once: their chains of operations run side by side. */
static inline void NAME(centre)(const int32_t *words, float *normals, float scale) {
    floats u[BATCH], x[BATCH], square[BATCH], exponent[BATCH], sum[BATCH];
    for (int k = 0; k < BATCH; k++) {
        ints word, bits, power;
        memcpy(&word, words + k * WIDTH, sizeof word);
        u[k] = (__builtin_convertvector(word, floats) + 0.5f) * 0x1p-31f;
        floats gap = (__builtin_convertvector(REST(word), floats) + 0.5f) * 0x1p-31f;
        gap *= 2.0f - gap; /* 1 - u^2, whose logarithm follows */
        memcpy(&bits, &gap, sizeof bits);
        power = (bits - 0x3f3504f3) >> 23; /* for a mantissa from sqrt(1/2) to sqrt(2) */
        bits -= power << 23;
        exponent[k] = __builtin_convertvector(power, floats);
        memcpy(&x[k], &bits, sizeof bits);
        x[k] -= 1.0f;
        square[k] = x[k] * x[k];
        sum[k] = x[k] * LOGARITHM[8] + LOGARITHM[7];
    }
    for (int degree = 6; degree >= 0; degree--)
        for (int k = 0; k < BATCH; k++) sum[k] = sum[k] * x[k] + LOGARITHM[degree];
    for (int k = 0; k < BATCH; k++) {
        floats v = exponent[k] * -0.693147180559945f -
                   (x[k] + square[k] * (sum[k] * x[k] - 0.5f));
        x[k] = v * (2.0f / TOP) - 1.0f;
        sum[k] = x[k] * CENTRE[10] + CENTRE[9];
    }
    for (int degree = 8; degree >= 0; degree--)
        for (int k = 0; k < BATCH; k++) sum[k] = sum[k] * x[k] + CENTRE[degree];
    for (int k = 0; k < BATCH; k++) {
        u[k] *= sum[k] * scale;
        memcpy(normals + k * WIDTH, &u[k], sizeof u[k]);
    }
}

/* words (count,) become float32 normals times `scale`, in place. How many words were tails: their
 * places go to `tails` (count,), and +-1 to their places. */
static int64_t NAME(normals)(int32_t *words, int64_t count, float scale, int32_t *tails) {
    const int block = BATCH * WIDTH;
    int32_t last[BATCH * WIDTH] = {0};
    float out[BATCH * WIDTH];
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += block) {
        int32_t *own = words + at;
        int here = count - at < block ? (int)(count - at) : block;
        if (here < block) {
            memcpy(last, own, 4 * (size_t)here);
            own = last;
        }
        NAME(centre)(own, out, scale);
        int any = 0;
        for (int k = 0; k < block; k++) any |= REST(own[k]) < TAIL;
        for (int k = 0; any && k < here; k++)
            if (REST(own[k]) < TAIL) {
                out[k] = own[k] < 0 ? -1.0f : 1.0f;
                tails[found++] = (int32_t)(at + k);
            }
        memcpy(words + at, out, 4 * (size_t)here);
    }
    return found;
}
