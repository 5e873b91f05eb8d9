/* The key stream of ChaCha20 (Bernstein 2008; RFC 8439), 16 blocks or 32 at once.
 *
 * A superblock is 16 blocks, of counters 16 s ... 16 s + 15, nonce 0: 256 words, word i of all
 * blocks before word i + 1 of any. Streams of a key are at most 2^28 superblocks long. */

#ifndef SUPERBLOCK
#define SUPERBLOCK 256
#define ROTATED(x, n) (((x) << (n)) | ((x) >> (32 - (n))))
#define SETS (WIDTH == 16 ? 2 : 1) /* chains of operations that run side by side */
#define EACH for (int s = 0; s < SETS; s++)
#define QUARTER(a, b, c, d)                                          \
    EACH x[s][a] += x[s][b];                                         \
    EACH x[s][d] ^= x[s][a], x[s][d] = ROTATED(x[s][d], 16);         \
    EACH x[s][c] += x[s][d];                                         \
    EACH x[s][b] ^= x[s][c], x[s][b] = ROTATED(x[s][b], 12);         \
    EACH x[s][a] += x[s][b];                                         \
    EACH x[s][d] ^= x[s][a], x[s][d] = ROTATED(x[s][d], 8);          \
    EACH x[s][c] += x[s][d];                                         \
    EACH x[s][b] ^= x[s][c], x[s][b] = ROTATED(x[s][b], 7)
#endif

typedef uint32_t NAME(unsigneds) __attribute__((vector_size(4 * WIDTH)));

/* One superblock or two (`count`) from `superblock` on; `out` has room for two. */
static void NAME(chacha)(const uint32_t *key, int64_t superblock, int count, uint32_t *out) {
    static const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    for (int first = 0; first < 16 * count; first += SETS * WIDTH) {
        NAME(unsigneds) x[SETS][16], counters[SETS];
        EACH {
            for (int lane = 0; lane < WIDTH; lane++)
                counters[s][lane] = (uint32_t)(16 * superblock + first + s * WIDTH + lane);
            for (int i = 0; i < 16; i++)
                x[s][i] = (NAME(unsigneds)){0} + (i < 4 ? constants[i] : i < 12 ? key[i - 4] : 0);
            x[s][12] = counters[s];
        }
        for (int round = 0; round < 10; round++) {
            QUARTER(0, 4, 8, 12);
            QUARTER(1, 5, 9, 13);
            QUARTER(2, 6, 10, 14);
            QUARTER(3, 7, 11, 15);
            QUARTER(0, 5, 10, 15);
            QUARTER(1, 6, 11, 12);
            QUARTER(2, 7, 8, 13);
            QUARTER(3, 4, 9, 14);
        }
        EACH {
            int block = first + s * WIDTH;
            uint32_t *to = out + SUPERBLOCK * (block / 16) + block % 16;
            for (int i = 0; i < 16; i++) {
                x[s][i] += i < 4 ? constants[i] : i < 12 ? key[i - 4] : 0;
                if (i == 12) x[s][i] += counters[s];
                memcpy(to + 16 * i, &x[s][i], sizeof x[s][i]);
            }
        }
    }
}
