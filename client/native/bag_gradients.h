/* The gradients of a step's rows: forward, backward, and clipped (see bags.h). */

/* The different words of batch row r, with their shares, and their sum to `x`. What lies behind its
 * own length is nothing of its own: how much of that there is hangs on the rows beside it. */
static void NAME(bag_input)(const struct bags *b, struct bag_room *room, int64_t r, int64_t row,
                            int32_t stamp, float *x) {
    const int64_t *tokens = b->tokens + row * b->columns, width = room->width;
    int64_t columns = b->lengths[row] < b->columns ? b->lengths[row] : b->columns;
    int32_t *words = room->words + r * b->columns, found = 0;
    float *share = room->share + r * b->columns, real = 0.0f;
    for (int64_t t = 0; t < columns; t++) {
        if (tokens[t] == b->padding) continue;
        int32_t u = room->local[tokens[t]];
        if (room->seen[u] != stamp) {
            room->seen[u] = stamp, room->place[u] = found;
            words[found] = u, share[found++] = 0.0f;
        }
        share[room->place[u]] += 1.0f, real += 1.0f;
    }
    room->different[r] = found;
    memset(x, 0, 4 * (size_t)width);
    for (int32_t j = 0; j < found; j++) {
        if (b->mean) share[j] /= real;
        NAME(bag_add)(x, room->rows + words[j] * width, share[j], width);
    }
}

/* Forward through all layers; what is filled up stays 0. */
static void NAME(bag_forward)(const struct bags *b, struct bag_room *room, int64_t rows) {
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer *own = room->layers + l;
        float *y = l + 1 < b->layers ? own[1].x : room->logits;
        NAME(bag_ahead)(own->x, own->w, own->b, y, rows, own->outputs, own->width, own->out_width);
        for (int64_t r = 0; r < rows; r++) {
            float *out = y + r * own->out_width;
            for (int64_t o = own->outputs; o < own->out_width; o++) out[o] = 0.0f;
            if (l + 1 < b->layers)
                for (int64_t o = 0; o < own->outputs; o++) out[o] = out[o] <= 0.0f ? 0.0f : out[o];
        }
    }
}

/* The loss of logits y, and its gradient times `weight` to g; both (out_width,). */
static float NAME(bag_loss)(float *y, float *g, int64_t classes, int64_t out_width, int64_t label,
                            float weight) {
    float most = y[0], sum = 0.0f, own = y[label];
    for (int64_t c = 1; c < classes; c++) most = y[c] > most ? y[c] : most;
    for (int64_t c = 0; c < out_width; c += WIDTH) store(g + c, NAME(bag_exp)(load(y + c) - most));
    for (int64_t c = 0; c < classes; c++) sum += g[c];
    for (int64_t c = 0; c < classes; c++) g[c] *= weight / sum;
    for (int64_t c = classes; c < out_width; c++) g[c] = 0.0f;
    g[label] -= weight;
    return logf(sum) + most - own;
}

/* Losses of a step's rows, and gradients of their logits; rows that lose nothing have none. */
static void NAME(bag_losses)(struct bags *b, struct bag_room *room, int64_t k, int64_t rows,
                             int64_t all, float weight) {
    struct bag_layer *last = room->layers + b->layers - 1;
    for (int64_t r = 0; r < all; r++) {
        int64_t row = r < rows ? room->owners[r] : -1;
        float *g = last->g + r * last->out_width;
        if (row < 0 || b->lengths[row] <= 0 || b->labels[row] == BAG_IGNORED) {
            memset(g, 0, 4 * (size_t)last->out_width);
            continue;
        }
        float loss = NAME(bag_loss)(room->logits + r * last->out_width, g, last->outputs,
                                    last->out_width, b->labels[row], weight);
        if (loss == loss) b->losses[k] += loss > 3.4028235e38f ? 3.4028235e38f : loss;
    }
}

/* Gradients of all layers' outputs, and of the rows' inputs to `room->back`. */
static void NAME(bag_backward)(const struct bags *b, struct bag_room *room, int64_t rows) {
    for (int64_t l = b->layers - 1; l >= 0; l--) {
        struct bag_layer *own = room->layers + l;
        float *to = l ? own[-1].g : room->back;
        NAME(bag_back)(own->g, own->w, to, rows, own->outputs, own->width, own->out_width);
        if (l)
            for (int64_t i = 0; i < rows * own->width; i++)
                to[i] = own->x[i] <= 0.0f ? 0.0f : to[i];
    }
}

/* Scale each row's gradients for `pull` times a clipped sum over the expected batch; rows whose norm
 * is not finite vanish, and those whose scale float32 could not hold: a square beyond it counts as
 * infinite, as it does for torch. The norms' squares are added up in double precision. */
static void NAME(bag_clip)(struct bags *b, struct bag_room *room, int64_t rows, double pull) {
    for (int64_t r = 0; r < rows; r++) {
        double words = 0, terms = 0, square, most = 0;
        for (int32_t j = 0; j < room->different[r]; j++) {
            double share = room->share[r * b->columns + j];
            words += share * share, terms += share;
        }
        words = sqrt(words) + terms * BAG_EPS;
        square = words * words * NAME(bag_squares)(room->back + r * room->width, room->width);
        for (int64_t l = 0; l < b->layers; l++) {
            struct bag_layer *own = room->layers + l;
            double inputs = NAME(bag_squares)(own->x + r * own->width, own->width);
            double outputs = NAME(bag_squares)(own->g + r * own->out_width, own->out_width);
            square += (inputs + (b->biases[l] ? 1 : 0)) * outputs;
            most = fmax(most, fmax(inputs, outputs));
        }
        if (most > BAG_LARGEST || square > BAG_LARGEST) square = INFINITY;
        double norm = sqrt(square), factor = 1;
        b->clipped_examples += (float)norm > (float)b->clip;
        if (b->clips == 2) factor = b->clip * BAG_SAFETY / (norm + BAG_STABILITY);
        else if (norm > b->clip * BAG_SAFETY) factor = b->clip * BAG_SAFETY / norm;
        int gone = !isfinite((float)norm);
        float scale = gone ? 0.0f : (float)(factor / b->units * pull);
        for (int64_t l = 0; l < b->layers; l++) {
            struct bag_layer *own = room->layers + l;
            float *g = own->g + r * own->out_width, *x = own->x + r * own->width;
            for (int64_t o = 0; o < own->out_width; o++) g[o] = gone ? 0.0f : g[o] * scale;
            if (gone) memset(x, 0, 4 * (size_t)own->width);
        }
        float *back = room->back + r * room->width;
        for (int64_t i = 0; i < room->width; i++) back[i] = gone ? 0.0f : back[i] * scale;
    }
}

/* Add the gradient of the table, whose rows' inputs have gradients `room->back`. */
static void NAME(bag_scatter)(const struct bags *b, struct bag_room *room, int64_t rows, float *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int32_t j = 0; j < room->different[r]; j++)
            NAME(bag_add)(to + room->words[r * b->columns + j] * room->width,
                          room->back + r * room->width, room->share[r * b->columns + j],
                          room->width);
}

static void NAME(bag_bias)(const struct bag_layer *own, float *to, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < own->out_width; o++) to[o] += own->g[r * own->out_width + o];
}

