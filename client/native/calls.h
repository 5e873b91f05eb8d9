/* What Python calls. */

int64_t kernels_normals(int32_t *words, int64_t count, float scale, int32_t *tails) {
    return CALL(normals, words, count, scale, tails);
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
