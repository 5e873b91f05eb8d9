/* Local training of bag-of-words classifiers: all steps of one device after another, its weights in
 * the processor's cache.
 *
 * A row's input is the sum or the mean of its words' rows in a table; then come `layers` linear
 * layers with ReLU in between, and cross-entropy. Of the table a device has the rows that its words
 * touch, row 0 first. What is trained, and under which noise, is told in `client/bag_trainer.py`. */

#ifndef BAG_IGNORED
#define BAG_IGNORED (-100)
#define BAG_SAFETY (1.0 - 1e-6) /* sottovoce.privacy.gradients.clipping */
#define BAG_STABILITY 0.01
#define BAG_MARGIN 1e-4 /* sottovoce.client.descents */
#define BAG_EPS 1.1920929e-07
#define BAG_LARGEST 3.4028235e38 /* float32 */
#define BAG_UP(count, unit) (((count) + (unit) - 1) / (unit) * (unit))

/* What Python says; laid out there again (client/native/bags.py), every field has 8 bytes. */
struct bags {
    /* the model as it comes: widths (layers + 1,), of words, of hidden layers and of the classes */
    int64_t layers, vocabulary, padding, mean; /* padding: the word that counts as none, or -1 */
    const int64_t *widths;
    const float *table, *const *weights, *const *biases; /* a bias may be NULL */
    /* the group: rows of examples, and visits by device and step; k's are starts[k]:starts[k + 1] */
    int64_t devices, columns;
    const int64_t *tokens, *lengths, *labels, *starts, *step, *row, *steps;
    /* clips: 0 no examples, 1 to `clip`, 2 automatically. bound: of an update, 0 for none */
    int64_t clips;
    double rate, clip, units, bound, variance; /* variance: of a step's noise in an update */
    /* noise: of each device the key of its stream (8 words), the superblock where that is, and how
     * many draws it needs; `deviation` of a draw. Room for one device's: `noise`, NULL where there is
     * none, and `tails`. */
    const uint32_t *keys;
    int64_t *places;
    const int64_t *counts;
    double deviation;
    float *noise;
    int32_t *tails;
    /* where finite updates are added, and the variance of what was drawn for each table row */
    double *table_sum, *const *weight_sums, *const *bias_sums, *drawn;
    /* what comes out, of each device: `readings` are rows read after the first step */
    double *losses;
    int64_t *visits, *readings;
    float *norms;
    uint8_t *finite, *clipped;
    /* and of all */
    int64_t clipped_examples, most_rows, most_touched, most_steps;
    void *scratch, *room;
};

struct bag_layer {
    float *w, *b;   /* weights and biases, (outputs up to 4, inputs up to BAG_PAD) */
    float *sw, *sb, *gw, *gb; /* signal and gradient likewise, where examples are clipped */
    float *x, *g; /* inputs of a step's rows, gradients of their outputs */
    int64_t inputs, outputs, width, out_width, size;
};

struct bag_room {
    struct bag_layer *layers;
    float *rows, *signal, *noise, *gradient; /* (touched, width) of the table */
    float *logits, *back, *share;            /* share: (rows, columns), of each different word */
    int32_t *words, *different;              /* (rows, columns), (rows,) */
    int32_t *seen, *place;                   /* (touched,) */
    int64_t *touched, *last, *owners;        /* table rows; when they were drawn; batch rows */
    uint64_t *read;
    const float **draws; /* (steps,) where each step's noise begins, but for that of rows */
    int32_t *local;  /* (vocabulary,) where a table row stands among those touched */
    uint64_t *marks; /* one bit for each */
    int64_t width, bytes;
};

/* A piece of the room; where `base` is NULL only its size counts. */
static void *bag_piece(struct bag_room *room, char *base, int64_t count, int64_t size) {
    void *piece = base ? base + room->bytes : NULL;
    room->bytes += BAG_UP(count * size, 64);
    return piece;
}

static int64_t bag_scratch_bytes(int64_t vocabulary) {
    return BAG_UP(4 * vocabulary, 64) + BAG_UP(vocabulary, 512) / 8;
}

/* Lay everything out from `base` on. */
static void bag_lay_out(const struct bags *b, struct bag_room *room, char *base) {
    int64_t rows = BAG_UP(b->most_rows, 4), touched = b->most_touched;
    room->bytes = 0;
    room->layers = bag_piece(room, base, b->layers, sizeof(struct bag_layer));
    for (int64_t l = 0; l < b->layers; l++) {
        struct bag_layer own = {.inputs = b->widths[l], .outputs = b->widths[l + 1]};
        own.width = BAG_UP(own.inputs, BAG_PAD), own.out_width = BAG_UP(own.outputs, BAG_PAD);
        own.size = BAG_UP(own.outputs, 4) * own.width;
        float **pieces[3][2] = {{&own.w, &own.b}, {&own.sw, &own.sb}, {&own.gw, &own.gb}};
        for (int part = 0; part < (b->clips ? 3 : 1); part++) {
            *pieces[part][0] = bag_piece(room, base, own.size, 4);
            *pieces[part][1] = bag_piece(room, base, own.out_width, 4);
        }
        own.x = bag_piece(room, base, rows * own.width, 4);
        own.g = bag_piece(room, base, rows * own.out_width, 4);
        if (base) room->layers[l] = own;
    }
    room->width = BAG_UP(b->widths[0], BAG_PAD);
    room->rows = bag_piece(room, base, touched * room->width, 4);
    for (int part = 0; part < (b->clips ? 3 : 0); part++)
        *(part == 0 ? &room->signal : part == 1 ? &room->noise : &room->gradient) =
            bag_piece(room, base, touched * room->width, 4);
    room->logits = bag_piece(room, base, rows * BAG_UP(b->widths[b->layers], BAG_PAD), 4);
    room->back = bag_piece(room, base, rows * room->width, 4);
    room->share = bag_piece(room, base, rows * b->columns, 4);
    room->words = bag_piece(room, base, rows * b->columns, 4);
    room->different = bag_piece(room, base, rows, 4);
    room->seen = bag_piece(room, base, touched, 4);
    room->place = bag_piece(room, base, touched, 4);
    room->touched = bag_piece(room, base, touched, 8);
    room->last = bag_piece(room, base, touched, 8);
    room->owners = bag_piece(room, base, rows, 8);
    room->read = bag_piece(room, base, touched / 64 + 1, 8);
    room->draws = bag_piece(room, base, b->most_steps, sizeof(float *));
    room->local = b->scratch;
    room->marks = (uint64_t *)((char *)b->scratch + BAG_UP(4 * b->vocabulary, 64));
}

/* Mark the words of a visit's row, `columns` of them at most; -1 where one is not in the table. */
static int bag_mark(const struct bags *b, int64_t row, int64_t columns, uint64_t *marks) {
    const int64_t *tokens = b->tokens + row * b->columns;
    for (int64_t t = 0; t < columns; t++) {
        if (tokens[t] < 0 || tokens[t] >= b->vocabulary) return -1;
        marks[tokens[t] / 64] |= (uint64_t)1 << tokens[t] % 64;
    }
    return 0;
}

/* The rows of the table that device k touches, ascending and with row 0, to `room->local` and, if
 * that is not NULL, `room->touched`; how many, or -1. */
static int64_t bag_touch(const struct bags *b, int64_t k, struct bag_room *room) {
    int64_t found = 0, blocks = (b->vocabulary + 63) / 64;
    room->marks[0] |= 1;
    for (int64_t v = b->starts[k]; v < b->starts[k + 1]; v++)
        if (bag_mark(b, b->row[v], b->columns, room->marks)) return -1;
    for (int64_t block = 0; block < blocks; block++)
        for (uint64_t bits = room->marks[block]; bits; bits &= bits - 1) {
            int64_t id = 64 * block + __builtin_ctzll(bits);
            if (room->touched) room->touched[found] = id;
            room->local[id] = (int32_t)found++;
        }
    memset(room->marks, 0, (size_t)blocks * 8);
    return found;
}

/* Mark the touched rows that the visits first:last read, row 0 among them; how many. */
static int64_t bag_read(const struct bags *b, struct bag_room *room, int64_t touched, int64_t first,
                        int64_t last) {
    int64_t found = 0;
    memset(room->read, 0, (size_t)(touched / 64 + 1) * 8);
    room->read[0] = 1;
    for (int64_t v = first; v < last; v++)
        for (int64_t t = 0; t < b->columns; t++) {
            int32_t u = room->local[b->tokens[b->row[v] * b->columns + t]];
            room->read[u / 64] |= (uint64_t)1 << u % 64;
        }
    for (int64_t block = 0; block < touched / 64 + 1; block++)
        found += __builtin_popcountll(room->read[block]);
    return found;
}

/* The end of the visits of step s, which begin at v. */
static int64_t bag_step_end(const struct bags *b, int64_t k, int64_t s, int64_t v) {
    while (v < b->starts[k + 1] && b->step[v] == s) v++;
    return v;
}

/* Count what training will need: `readings`, `most_rows`, `most_touched`. Bytes of its room, or -1
 * where a word or a label does not exist. `room`: 8 (vocabulary / 64 + 1) bytes. */
static int64_t bag_plan(struct bags *b) {
    struct bag_room room = {0};
    bag_lay_out(b, &room, NULL);
    room.touched = NULL, room.read = b->room;
    b->most_rows = b->most_touched = b->most_steps = 1;
    memset(room.marks, 0, (size_t)((b->vocabulary + 63) / 64) * 8);
    for (int64_t v = b->starts[0]; v < b->starts[b->devices]; v++) {
        int64_t label = b->labels[b->row[v]];
        if (label != BAG_IGNORED && (label < 0 || label >= b->widths[b->layers])) return -1;
    }
    for (int64_t k = 0; k < b->devices; k++) {
        int64_t touched = bag_touch(b, k, &room);
        if (touched < 0) return -1;
        if (touched > b->most_touched) b->most_touched = touched;
        b->readings[k] = 0;
        if (b->steps[k] > b->most_steps) b->most_steps = b->steps[k];
        for (int64_t s = 0, v = b->starts[k], end; s < b->steps[k]; s++, v = end) {
            end = bag_step_end(b, k, s, v);
            if (end - v > b->most_rows) b->most_rows = end - v;
            if (s && b->clips) b->readings[k] += bag_read(b, &room, touched, v, end);
        }
    }
    bag_lay_out(b, &room, NULL);
    return room.bytes;
}
#endif
