/* The steps of a device, from its first to its sum (see bags.h). */

/* Device k at its start. */
static int64_t NAME(bag_begin)(const struct bags *b, struct bag_room *room, int64_t k) {
    int64_t touched = bag_touch(b, k, room), width = b->widths[0];
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        if (own->size != own->outputs * own->inputs) memset(own->w, 0, 4 * (size_t)own->size);
        memset(own->b, 0, 4 * (size_t)own->out_width);
        for (int64_t o = 0; o < own->outputs; o++)
            memcpy(own->w + o * own->width, b->weights[l] + o * own->inputs, 4 * (size_t)own->inputs);
        if (b->biases[l]) memcpy(own->b, b->biases[l], 4 * (size_t)own->outputs);
        if (b->clips) memset(own->sw, 0, 4 * (size_t)own->size);
        if (b->clips) memset(own->sb, 0, 4 * (size_t)own->out_width);
    }
    if (room->width != width) memset(room->rows, 0, 4 * (size_t)(touched * room->width));
    for (int64_t u = 0; !b->clips && u < touched; u++)
        memcpy(room->rows + u * room->width, b->table + room->touched[u] * width, 4 * (size_t)width);
    if (b->clips) {
        memset(room->signal, 0, 4 * (size_t)(touched * room->width));
        memset(room->noise, 0, 4 * (size_t)(touched * room->width));
    }
    memset(room->seen, 0, 4 * (size_t)touched);
    memset(room->last, 0, 8 * (size_t)touched);
    return touched;
}

/* The rows that step s reads, as they are by then; the place after the noise that was drawn. */
static const float *NAME(bag_rows)(const struct bags *b, struct bag_room *room, int64_t touched,
                                   int64_t s, const float *noise) {
    const int64_t width = room->width, words = b->widths[0];
    for (int64_t block = 0; block < touched / 64 + 1; block++)
        for (uint64_t bits = room->read[block]; bits; bits &= bits - 1) {
            int64_t u = 64 * block + __builtin_ctzll(bits);
            const float *origin = b->table + room->touched[u] * words;
            float *drift = room->noise + u * width, *signal = room->signal + u * width;
            if (noise && s > 0) {
                NAME(bag_add)(drift, noise, sqrtf((float)(s - room->last[u])), words);
                room->last[u] = s, noise += words;
            }
            for (int64_t i = 0; i < words; i++)
                room->rows[u * width + i] = origin[i] + signal[i] + drift[i];
        }
    return noise;
}

/* The gradient of a step to signal and weights: all that reads its rows do. */
static void NAME(bag_direct)(const struct bags *b, struct bag_room *room, int64_t rows, int last) {
    NAME(bag_scatter)(b, room, rows, room->signal);
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        NAME(bag_outer)(own->g, own->x, own->sw, last ? NULL : own->w, rows, own->outputs,
                        own->width, own->out_width, 1);
        if (!b->biases[l]) continue;
        NAME(bag_bias)(own, own->sb, rows);
        if (!last) NAME(bag_bias)(own, own->b, rows);
    }
}

/* The gradient of a step, laid out by itself, and its norm. */
static double NAME(bag_gradient)(const struct bags *b, struct bag_room *room, int64_t touched,
                                 int64_t rows) {
    double square = 0;
    memset(room->gradient, 0, 4 * (size_t)(touched * room->width));
    NAME(bag_scatter)(b, room, rows, room->gradient);
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        NAME(bag_outer)(own->g, own->x, own->gw, NULL, rows, own->outputs, own->width,
                        own->out_width, 0);
        memset(own->gb, 0, 4 * (size_t)own->out_width);
        if (b->biases[l]) NAME(bag_bias)(own, own->gb, rows);
        square += NAME(bag_squares)(own->gw, own->outputs * own->width);
        square += NAME(bag_squares)(own->gb, own->out_width);
    }
    return sqrt(square + NAME(bag_squares)(room->gradient, touched * room->width));
}

/* A gradient that may be longer than `radius`, to the ball of that radius, then as above. */
static void NAME(bag_project)(struct bags *b, struct bag_room *room, int64_t k, int64_t touched,
                              int64_t rows, double radius, int last) {
    double norm = NAME(bag_gradient)(b, room, touched, rows), scale = -b->rate;
    if (norm > radius * BAG_SAFETY) scale *= radius * BAG_SAFETY / norm;
    if ((float)norm > (float)radius) b->clipped[k] = 1;
    float pull = (float)scale;
    NAME(bag_add)(room->signal, room->gradient, pull, touched * room->width);
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        NAME(bag_add)(own->sw, own->gw, pull, own->outputs * own->width);
        NAME(bag_add)(own->sb, own->gb, pull, own->outputs);
        if (last) continue;
        NAME(bag_add)(own->w, own->gw, pull, own->outputs * own->width);
        NAME(bag_add)(own->b, own->gb, pull, own->outputs);
    }
}

/* A clipped and noised step; the place after the noise that was used. */
static const float *NAME(bag_private)(struct bags *b, struct bag_room *room, int64_t k, int64_t s,
                                      int64_t touched, int64_t rows, const float *noise) {
    double radius = b->bound > 0 ? (float)(b->bound / (b->rate * (double)b->steps[k])) : 0;
    int may = radius > 0 && (double)rows * (b->clip / b->units) * (1 + BAG_MARGIN) > radius;
    int last = s + 1 == b->steps[k];
    NAME(bag_clip)(b, room, rows, may ? 1 : -b->rate);
    if (may) NAME(bag_project)(b, room, k, touched, rows, radius, last);
    else NAME(bag_direct)(b, room, rows, last);
    if (last || !noise) return noise;
    room->draws[s] = noise;
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        for (int64_t o = 0; o < own->outputs; o++, noise += own->inputs)
            NAME(bag_add)(own->w + o * own->width, noise, -1, own->inputs);
        if (!b->biases[l]) continue;
        NAME(bag_add)(own->b, noise, -1, own->outputs);
        noise += own->outputs;
    }
    return noise;
}

/* A step of plain SGD: gradients carry minus the learning rate over the number of rows. */
static void NAME(bag_plain)(struct bags *b, struct bag_room *room, int64_t rows) {
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        NAME(bag_outer)(own->g, own->x, own->w, NULL, rows, own->outputs, own->width,
                        own->out_width, 1);
        if (b->biases[l]) NAME(bag_bias)(own, own->b, rows);
    }
    NAME(bag_scatter)(b, room, rows, room->rows);
}

/* All steps of device k, whose draws begin at `noise`. */
static void NAME(bag_steps)(struct bags *b, struct bag_room *room, int64_t k, int64_t touched,
                            const float *noise) {
    int32_t stamp = 0;
    for (int64_t s = 0, v = b->starts[k], end; s < b->steps[k]; s++, v = end) {
        end = bag_step_end(b, k, s, v);
        int64_t rows = end - v, all = BAG_UP(rows, 4);
        for (int64_t r = 0; r < rows; r++) room->owners[r] = b->row[v + r];
        if (b->clips) {
            bag_read(b, room, touched, v, end);
            noise = NAME(bag_rows)(b, room, touched, s, noise);
        }
        float *x = room->layers->x;
        for (int64_t r = 0; r < rows; r++)
            NAME(bag_input)(b, room, r, room->owners[r], ++stamp, x + r * room->width);
        memset(x + rows * room->width, 0, 4 * (size_t)((all - rows) * room->width));
        NAME(bag_forward)(b, room, all);
        float weight = b->clips ? 1.0f : -(float)b->rate / (float)(rows > 0 ? rows : 1);
        NAME(bag_losses)(b, room, k, rows, all, weight);
        NAME(bag_backward)(b, room, all);
        b->visits[k] += rows;
        if (b->clips) noise = NAME(bag_private)(b, room, k, s, touched, rows, noise);
        else NAME(bag_plain)(b, room, rows);
    }
}

/* to += scale * part, or part + other, in double precision. */
static void NAME(bag_total)(double *restrict to, const float *restrict part,
                            const float *restrict other, double scale, int64_t count) {
    if (other)
        for (int64_t i = 0; i < count; i++) to[i] += (double)part[i] + (double)other[i];
    else
        for (int64_t i = 0; i < count; i++) to[i] += scale * (double)part[i];
}

/* to += part - the draws of several steps, of which each begins `at` floats after its place. */
static void NAME(bag_drawn)(double *restrict to, const float *restrict part,
                            const float *const *draws, int64_t steps, int64_t at, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH / 2 <= count; i += WIDTH / 2) {
        NAME(halves) sum, draw;
        NAME(doubles) all;
        memcpy(&sum, part + i, sizeof sum);
        for (int64_t s = 0; s < steps; s++) {
            memcpy(&draw, draws[s] + at + i, sizeof draw);
            sum -= draw;
        }
        memcpy(&all, to + i, sizeof all);
        all += __builtin_convertvector(sum, NAME(doubles));
        memcpy(to + i, &all, sizeof all);
    }
    for (; i < count; i++) {
        float sum = part[i];
        for (int64_t s = 0; s < steps; s++) sum -= draws[s][at + i];
        to[i] += sum;
    }
}

/* Where nothing was clipped: weights less where they began, in place. */
static void NAME(bag_moved)(const struct bags *b, struct bag_room *room, int64_t touched) {
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        for (int64_t o = 0; o < own->outputs; o++)
            NAME(bag_add)(own->w + o * own->width, b->weights[l] + o * own->inputs, -1, own->inputs);
        if (b->biases[l]) NAME(bag_add)(own->b, b->biases[l], -1, own->outputs);
        own->sw = own->w, own->sb = own->b;
    }
    for (int64_t u = 0; u < touched; u++)
        NAME(bag_add)(room->rows + u * room->width, b->table + room->touched[u] * b->widths[0], -1,
                      b->widths[0]);
    room->signal = room->rows;
}

/* The norm of device k's signal and what it says of the device; its update into the sums. */
static void NAME(bag_finish)(struct bags *b, struct bag_room *room, int64_t k, int64_t touched) {
    double square = NAME(bag_squares)(room->signal, touched * room->width), scale = 1;
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        square += NAME(bag_squares)(own->sw, own->outputs * own->width);
        if (b->biases[l]) square += NAME(bag_squares)(own->sb, own->out_width);
    }
    double norm = sqrt(square);
    b->norms[k] = (float)norm;
    b->finite[k] = square <= BAG_LARGEST; /* as torch has it */
    if (!b->finite[k]) return;
    if (!b->clips && b->bound > 0) {
        if (norm > b->bound * BAG_SAFETY) scale = b->bound * BAG_SAFETY / norm;
        b->clipped[k] = norm > b->bound;
    }
    int64_t words = b->widths[0];
    for (int64_t u = 0; u < touched; u++) {
        int64_t id = room->touched[u], at = u * room->width;
        NAME(bag_total)(b->table_sum + id * words, room->signal + at,
                        b->noise ? room->noise + at : NULL, scale, words);
        if (b->noise) b->drawn[id] += (double)room->last[u] * b->variance;
    }
    int64_t steps = b->noise && b->steps[k] > 0 ? b->steps[k] - 1 : 0, from = 0;
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        for (int64_t o = 0; o < own->outputs; o++, from += own->inputs) {
            double *to = b->weight_sums[l] + o * own->inputs;
            const float *part = own->sw + o * own->width;
            if (steps) NAME(bag_drawn)(to, part, room->draws, steps, from, own->inputs);
            else NAME(bag_total)(to, part, NULL, scale, own->inputs);
        }
        if (!b->biases[l]) continue;
        if (steps) NAME(bag_drawn)(b->bias_sums[l], own->sb, room->draws, steps, from, own->outputs);
        else NAME(bag_total)(b->bias_sums[l], own->sb, NULL, scale, own->outputs);
        from += own->outputs;
    }
}

/* Train all devices and add them up, after `bag_plan`. */
static void NAME(bag_train)(struct bags *b) {
    struct bag_room room = {0};
    bag_lay_out(b, &room, b->room);
    memset(room.marks, 0, (size_t)((b->vocabulary + 63) / 64) * 8);
    for (int64_t k = 0; k < b->devices; k++) {
        float *signal = room.signal;
        int64_t touched = NAME(bag_begin)(b, &room, k);
        if (b->noise)
            b->places[k] = NAME(stream)(b->keys + 8 * k, b->places[k], b->counts[k],
                                        (float)b->deviation, b->noise, b->tails);
        NAME(bag_steps)(b, &room, k, touched, b->noise);
        if (!b->clips) NAME(bag_moved)(b, &room, touched);
        NAME(bag_finish)(b, &room, k, touched);
        room.signal = signal;
    }
}
#undef BAG_TALL
