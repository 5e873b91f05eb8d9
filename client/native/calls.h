/* What Python calls. */

/* Normals of several streams, one after another: `counts[k]` of that with `keys[k]` (8 words), which
 * is at superblock `places[k]` and then behind it. 0, or -1 where there is no memory for it. */
int kernels_streams(const uint32_t *keys, int64_t *places, const int64_t *counts, int64_t streams,
                    float scale, float *normals) {
    int64_t most = 1;
    for (int64_t k = 0; k < streams; k++) most = counts[k] > most ? counts[k] : most;
    int32_t *tails = malloc(sizeof(int32_t) * (size_t)(most + 64));
    if (!tails) return -1;
    for (int64_t k = 0; k < streams; normals += counts[k++])
        places[k] = CALL(stream, keys + 8 * k, places[k], counts[k], scale, normals, tails);
    free(tails);
    return 0;
}

/* 0, or -1 where there is no memory for it. */
int kernels_gram(const float *x, int64_t rows, int64_t length, int64_t width, int64_t row_step,
                 int64_t position_step, double *products) {
    int64_t positions = (length + GRAM_SIDE - 1) / GRAM_SIDE * GRAM_SIDE;
    double *space = calloc((size_t)(positions * GRAM_CHUNK), sizeof(double));
    if (!space) return -1;
    CALL(gram, x, rows, length, width, row_step, position_step, products, space);
    free(space);
    return 0;
}

/* y = x W^T + b, g W, and sums of outer products (gemm.h). */
void kernels_linear(int64_t groups, int64_t n, int64_t in, int64_t out, const float *x,
                    const float *weight, const float *bias, float *y) {
    CALL(linear, groups, n, in, out, x, weight, bias, y);
}

void kernels_matmul(int64_t groups, int64_t n, int64_t in, int64_t out, const float *g,
                    const float *weight, float *x) {
    CALL(matmul, groups, n, in, out, g, weight, x);
}

void kernels_outer(int64_t groups, int64_t n, int64_t in, int64_t out, const float *g,
                   const float *x, float *to, int added, float alpha, const float *scale,
                   int64_t each) {
    CALL(outer, groups, n, in, out, g, x, to, added, alpha, scale, each);
}

/* 0, or -1 where there is no memory for it. */
int kernels_lstm(const Layer *layer, int backward) { return CALL(lstm, layer, backward); }

/* Bytes of scratch that any call needs, and of room that training needs, or -1 (bags.h). */
int64_t kernels_bags_scratch(int64_t vocabulary) { return bag_scratch_bytes(vocabulary); }

int64_t kernels_bags_plan(struct bags *bags) { return bag_plan(bags); }

/* Train all devices, after the plan. */
void kernels_bags_train(struct bags *bags) { CALL(bag_train, bags); }
