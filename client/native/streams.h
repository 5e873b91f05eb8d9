/* Streams of normals: ChaCha20 superblocks to words, words to normals, tails from what follows. */

#ifndef TAIL_RANGE
#define TAIL_RANGE 0x1p-13 /* the share of normals beyond either end of the central ones */
/* Size of the standard normal that is exceeded with probability p <= 2^-13: Wichura 1988, AS 241. */
static double tail_size(double p) {
    double r = sqrt(-log(p));
    if (r <= 5.0) {
        r -= 1.6;
        return (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r +
                     2.41780725177450611770e-1) * r + 1.27045825245236838258) * r +
                   3.64784832476320460504) * r + 5.76949722146069140550) * r +
                 4.63033784615654529590) * r + 1.42343711074968357734) /
               (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r +
                     1.51986665636164571966e-2) * r + 1.48103976427480074590e-1) * r +
                   6.89767334985100004550e-1) * r + 1.67638483018380384940) * r +
                 2.05319162663775882187) * r + 1.0);
    }
    r -= 5.0;
    return (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r +
                 1.24266094738807843860e-3) * r + 2.65321895265761230930e-2) * r +
               2.96560571828504891230e-1) * r + 1.78482653991729133580) * r +
             5.46378491116411436990) * r + 6.65790464350110377720) /
           (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r +
                 1.84631831751005468180e-5) * r + 7.86869131145613259100e-4) * r +
               1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
             5.99832206555887937690e-1) * r + 1.0);
}
#endif

/* The next `count` normals times `scale` of the stream of `key` (8 words), which is at superblock
 * `place`: where it is then. `tails`: room for (count,). */
static int64_t NAME(stream)(
    const uint32_t *key, int64_t place, int64_t count, float scale, float *normals, int32_t *tails
) {
    int64_t found = 0;
    uint32_t words[2 * SUPERBLOCK];
    for (int64_t at = 0; at < count; at += 2 * SUPERBLOCK) {
        int64_t here = count - at < 2 * SUPERBLOCK ? count - at : 2 * SUPERBLOCK;
        int used = here > SUPERBLOCK ? 2 : 1;
        NAME(chacha)(key, place, used, words);
        int64_t far =
            NAME(normals)((const int32_t *)words, here, scale, normals + at, tails + found);
        for (int64_t k = 0; k < far; k++) tails[found++] += (int32_t)at;
        place += used;
    }
    for (int64_t k = 0; k < found; k++) {
        if (k % (SUPERBLOCK / 2) == 0) NAME(chacha)(key, place++, 1, words);
        const uint32_t *own = words + 2 * (k % (SUPERBLOCK / 2));
        uint64_t bits = (uint64_t)own[1] << 32 | own[0];
        double size = tail_size(((double)(bits >> 12) + 0.5) * (0x1p-52 * TAIL_RANGE));
        normals[tails[k]] = (float)copysign(size * scale, normals[tails[k]]);
    }
    return place;
}
