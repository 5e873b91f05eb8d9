/* Random words to standard normals, by the inverse of their distribution function.
 *
 * A word w is a number u = (w + 1/2) / 2^31 in (-1, 1), and its normal is u f, where
 * f = sqrt(2) erfinv(u) / u is smooth in v = -ln(1 - u^2): a polynomial of degree 10 has a relative
 * error below 3e-7 for v <= 7.65. Where one instruction looks numbers up, a polynomial of its own for
 * each power of two in 1 - u^2 saves the logarithm. Words within TAIL of either end are left to
 * `streams.h` (their sign alone is written), so v stays below -ln(2^-12 (2 - 2^-12)) = 7.63. */

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
/* f for each power of two that 1 - u^2 = (1.5 + t) 2^-e may have, e = 0 ... 12: the coefficients of
 * t^0 ... t^6, each with 16 places for e; relative error below 5e-7. */
static const float OCTAVES[7][16] = {
    {1.253314137e+00f, 1.348979473e+00f, 1.587631232e+00f, 1.832307078e+00f, 2.076865828e+00f,
     2.316600912e+00f, 2.548462873e+00f, 2.770869479e+00f, 2.983323367e+00f, 3.186017624e+00f,
     3.379521231e+00f, 3.564565269e+00f, 3.741914649e+00f, 0, 0,
     0},
    {0, -2.244590267e-01f, -2.335086660e-01f, -2.361625286e-01f, -2.335219977e-01f,
     -2.271556855e-01f, -2.186149728e-01f, -2.091408591e-01f, -1.995788314e-01f, -1.904255101e-01f,
     -1.819240408e-01f, -1.741569204e-01f, -1.671163258e-01f, 0, 0,
     0},
    {0, 8.078275742e-02f, 8.059757361e-02f, 7.861207406e-02f, 7.554721915e-02f,
     7.202324551e-02f, 6.846019749e-02f, 6.508773285e-02f, 6.200184780e-02f, 5.922199361e-02f,
     5.673105595e-02f, 5.449824611e-02f, 5.249038979e-02f, 0, 0,
     0},
    {0, -3.601298791e-02f, -3.525229018e-02f, -3.391772481e-02f, -3.232722247e-02f,
     -3.070053403e-02f, -2.915740294e-02f, -2.774704376e-02f, -2.647921564e-02f, -2.534554230e-02f,
     -2.433122600e-02f, -2.342054705e-02f, -2.259906456e-02f, 0, 0,
     0},
    {0, 1.788325186e-02f, 1.732041438e-02f, 1.655570355e-02f, 1.572937340e-02f,
     1.492528561e-02f, 1.418218878e-02f, 1.351167942e-02f, 1.291208773e-02f, 1.237654507e-02f,
     1.189691526e-02f, 1.146544484e-02f, 1.107532167e-02f, 0, 0,
     0},
    {0, -1.098630120e-02f, -1.056420675e-02f, -1.006102713e-02f, -9.548414243e-03f,
     -9.064158640e-03f, -8.622971667e-03f, -8.227187145e-03f, -7.873716161e-03f, -7.557683033e-03f,
     -7.274057549e-03f, -7.018277627e-03f, -6.786418169e-03f, 0, 0,
     0},
    {0, 6.149252188e-03f, 5.898199974e-03f, 5.614691739e-03f, 5.333090107e-03f,
     5.070105868e-03f, 4.831449342e-03f, 4.617321696e-03f, 4.425672590e-03f, 4.253804919e-03f,
     4.099061041e-03f, 3.959068727e-03f, 3.831795933e-03f, 0, 0,
     0}};
#if defined(__GNUC__) && !defined(__clang__)
#define LOOKED_UP(width) ((width) == 16) /* one instruction looks 16 places up */
#else
#define LOOKED_UP(width) 0
#endif
#endif

/* 2^31 times the distance of each |u| to 1, less 1/2. */
#define REST(word) (0x7fffffff - ((word) ^ ((word) >> 31)))

static inline floats NAME(centred)(ints word) { /* u */
    return (__builtin_convertvector(word, floats) + 0.5f) * 0x1p-31f;
}

static inline floats NAME(beside)(ints word) { /* 1 - u^2 */
    floats gap = (__builtin_convertvector(REST(word), floats) + 0.5f) * 0x1p-31f;
    return gap * (2.0f - gap);
}

#if LOOKED_UP(WIDTH)
/* Normals of words, BATCH vectors at once. */
static inline void NAME(centre)(const int32_t *words, float *normals, float scale) {
    floats table[7];
    memcpy(table, OCTAVES, sizeof table);
    for (int k = 0; k < BATCH; k++) {
        ints word, bits, octave;
        memcpy(&word, words + k * WIDTH, sizeof word);
        floats t, rest = NAME(beside)(word);
        memcpy(&bits, &rest, sizeof bits);
        octave = (127 - (bits >> 23)) & 15;
        bits = (bits & 0x7fffff) | 0x3f800000;
        memcpy(&t, &bits, sizeof t);
        t -= 1.5f;
        floats sum = __builtin_shuffle(table[6], octave);
        for (int degree = 5; degree >= 0; degree--)
            sum = sum * t + __builtin_shuffle(table[degree], octave);
        sum *= NAME(centred)(word) * scale;
        memcpy(normals + k * WIDTH, &sum, sizeof sum);
    }
}
#else
/* Normals of words, BATCH vectors at once: their chains of operations run side by side. */
static inline void NAME(centre)(const int32_t *words, float *normals, float scale) {
    floats u[BATCH], x[BATCH], square[BATCH], exponent[BATCH], sum[BATCH];
    for (int k = 0; k < BATCH; k++) {
        ints word, bits, power;
        memcpy(&word, words + k * WIDTH, sizeof word);
        u[k] = NAME(centred)(word);
        floats rest = NAME(beside)(word); /* whose logarithm follows */
        memcpy(&bits, &rest, sizeof bits);
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
#endif

/* Words (count,) to float32 normals times `scale`. How many words were tails: their places go to
 * `tails` (count,), and +-1 to their places. */
static int64_t NAME(normals)(
    const int32_t *words, int64_t count, float scale, float *normals, int32_t *tails
) {
    const int block = BATCH * WIDTH;
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += block) {
        const int32_t *own = words + at;
        int here = count - at < block ? (int)(count - at) : block;
        if (here == block) {
            NAME(centre)(own, normals + at, scale);
        } else {
            int32_t last[BATCH * WIDTH] = {0};
            float out[BATCH * WIDTH];
            memcpy(last, own, 4 * (size_t)here);
            NAME(centre)(last, out, scale);
            memcpy(normals + at, out, 4 * (size_t)here);
        }
        int any = 0;
        for (int k = 0; k < here; k++) any |= REST(own[k]) < TAIL;
        for (int k = 0; any && k < here; k++)
            if (REST(own[k]) < TAIL) {
                normals[at + k] = own[k] < 0 ? -1.0f : 1.0f;
                tails[found++] = (int32_t)(at + k);
            }
    }
    return found;
}
