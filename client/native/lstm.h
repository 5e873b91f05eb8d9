/* A layer of LSTM in one direction, for stacks of weights: lane after lane, so that a lane's
 * matrices stay in the second level of cache through all of its time.
 *
 * i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of x W_ih^T + h W_hh^T + b;  c' = f c + i g;
 * h' = o tanh(c'). A lane has rows of its own, each `length` long. Arrays are (rows, length, width),
 * rows of all lanes. */

#ifndef GATES
#define GATES 4
#define LANE_FLOATS (1 << 17) /* of gates, that one go through time works on */
#define LONGEST 87.0f
static const float EXPONENTIAL[6] = { /* (e^x - 1 - x) / x^2, |x| <= ln(2) / 2: Cephes' expf */
    1.9875691500E-4f, 1.3981999507E-3f, 8.3334519073E-3f,
    4.1665795894E-2f, 1.6666665459E-1f, 5.0000001201E-1f};
/* tanh(x) = x p(x^2) / q(x^2), |x| <= FLAT: Eigen's, within three units in the last place. */
#define FLAT 7.90531110763549805f       /* where it becomes 1, whose gradient is 0 */
#define FLAT_FUSED 7.99881172180175781f /* the same with multiplications and additions fused */
static const float ABOVE[7] = {
    -2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
    1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f};
static const float BELOW[4] = {
    1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};

typedef struct {
    int64_t lanes, rows, length, width, size, reverse;
    int64_t shared;        /* whether all lanes have the same matrices: those of one */
    const int64_t *skipped; /* (lanes,) rows that each begins with and that count for nothing, or none */
    const float *x;      /* (lanes rows, length, width) */
    const float *w_ih;   /* (lanes, 4 size, width) */
    const float *w_hh;   /* (lanes, 4 size, size) */
    const float *b_ih, *b_hh; /* (lanes, 4 size) or none */
    const float *h0, *c0;     /* (lanes rows, size) */
    float *gates;        /* (lanes rows, length, 4 size); backward: become their gradients */
    float *before;       /* (lanes rows, length, size): hidden states that each step began with */
    float *cells, *squashed; /* the same shape: after each step, and their tanh */
    float *out;          /* (lanes rows, length, `out_stride`): hidden states; or their gradients */
    int64_t out_stride;
    float *hidden, *cell; /* (lanes rows, size): after the last step; or their gradients */
    float *back;         /* (lanes rows, length, width) gradients of x, or none */
    int64_t added;       /* whether those are added to what is there */
} Layer;
#endif

static inline floats NAME(either)(ints which, floats yes, floats no) {
    ints a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    a = (a & which) | (b & ~which);
    memcpy(&yes, &a, sizeof yes);
    return yes;
}

/* e^x for |x| <= LONGEST; beyond, that of the bound; NaN for NaN. */
static inline floats NAME(exponential)(floats x) {
    x = NAME(either)(x > LONGEST, (floats){0} + LONGEST, x);
    x = NAME(either)(x < -LONGEST, (floats){0} - LONGEST, x);
    floats rounded = x * 1.44269504088896341f + 0x1.8p23f, power = rounded - 0x1.8p23f;
    floats rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    floats sum = rest * EXPONENTIAL[0] + EXPONENTIAL[1];
    for (int i = 2; i < 6; i++) sum = sum * rest + EXPONENTIAL[i];
    sum = sum * rest * rest + rest + 1.0f;
    ints bits;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits - 0x4b400000 + 127) << 23;
    memcpy(&rounded, &bits, sizeof bits);
    return sum * rounded;
}

static inline floats NAME(sigmoid)(floats x) { return 1.0f / (1.0f + NAME(exponential)(-x)); }

static inline floats NAME(tanh)(floats x) {
    const float flat = WIDTH == 4 ? FLAT : FLAT_FUSED;
    x = NAME(either)(x > flat, (floats){0} + flat, x);
    x = NAME(either)(x < -flat, (floats){0} - flat, x);
    floats square = x * x, above = square * ABOVE[0] + ABOVE[1];
    floats below = square * BELOW[0] + BELOW[1];
    for (int i = 2; i < 7; i++) above = above * square + ABOVE[i];
    for (int i = 2; i < 4; i++) below = below * square + BELOW[i];
    return x * above / below;
}

/* A vector of one row's step. What goes into the gates, `apart` from each other, becomes the gates. */
static inline void NAME(cell)(float *gates, int64_t apart, const float *cell, float *cells,
                              float *squashed, float *hidden) {
    floats i = NAME(sigmoid)(load(gates)), f = NAME(sigmoid)(load(gates + apart));
    floats g = NAME(tanh)(load(gates + 2 * apart)), o = NAME(sigmoid)(load(gates + 3 * apart));
    floats c = f * load(cell) + i * g, s = NAME(tanh)(c);
    store(gates, i);
    store(gates + apart, f);
    store(gates + 2 * apart, g);
    store(gates + 3 * apart, o);
    store(cells, c);
    store(squashed, s);
    store(hidden, o * s);
}

/* The same back: gates become their gradients; `d_cell` that of the cell before. */
static inline void NAME(cell_back)(float *gates, int64_t apart, const float *cell,
                                   const float *squashed, const float *onto, const float *d_hidden,
                                   float *d_cell) {
    floats i = load(gates), f = load(gates + apart);
    floats g = load(gates + 2 * apart), o = load(gates + 3 * apart);
    floats s = load(squashed), d = load(onto) + load(d_hidden);
    floats dc = load(d_cell) + d * o * (1.0f - s * s);
    store(gates, dc * g * (i - i * i));
    store(gates + apart, dc * load(cell) * (f - f * f));
    store(gates + 2 * apart, dc * i * (1.0f - g * g));
    store(gates + 3 * apart, d * s * (o - o * o));
    store(d_cell, dc * f);
}

/* `rest` < WIDTH numbers in each of GATES places, `apart` from each other, moved. */
static inline void NAME(move)(float *to, int64_t to_apart, const float *from, int64_t apart,
                              int64_t rest, int places) {
    for (int k = 0; k < places; k++)
        for (int64_t j = 0; j < rest; j++) to[k * to_apart + j] = from[k * apart + j];
}

/* One row's step: `gates` (4 size,) holds what goes into the gates, then the gates. */
static void NAME(row)(int64_t size, float *gates, const float *cell, float *cells, float *squashed,
                      float *hidden) {
    int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    for (int64_t j = 0; j < whole; j += WIDTH)
        NAME(cell)(gates + j, size, cell + j, cells + j, squashed + j, hidden + j);
    if (!rest) return;
    float in[5 * WIDTH] = {0}, out[3 * WIDTH];
    NAME(move)(in, WIDTH, gates + whole, size, rest, GATES);
    NAME(move)(in + 4 * WIDTH, 0, cell + whole, 0, rest, 1);
    NAME(cell)(in, WIDTH, in + 4 * WIDTH, out, out + WIDTH, out + 2 * WIDTH);
    NAME(move)(gates + whole, size, in, WIDTH, rest, GATES);
    NAME(move)(cells + whole, 0, out, 0, rest, 1);
    NAME(move)(squashed + whole, 0, out + WIDTH, 0, rest, 1);
    NAME(move)(hidden + whole, 0, out + 2 * WIDTH, 0, rest, 1);
}

/* One row's step back. */
static void NAME(row_back)(int64_t size, float *gates, const float *cell, const float *squashed,
                           const float *onto, const float *d_hidden, float *d_cell) {
    int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    for (int64_t j = 0; j < whole; j += WIDTH)
        NAME(cell_back)(gates + j, size, cell + j, squashed + j, onto + j, d_hidden + j,
                        d_cell + j);
    if (!rest) return;
    float in[9 * WIDTH] = {0};
    const float *others[5] = {cell, squashed, onto, d_hidden, d_cell};
    NAME(move)(in, WIDTH, gates + whole, size, rest, GATES);
    for (int k = 0; k < 5; k++) NAME(move)(in + (4 + k) * WIDTH, 0, others[k] + whole, 0, rest, 1);
    NAME(cell_back)(in, WIDTH, in + 4 * WIDTH, in + 5 * WIDTH, in + 6 * WIDTH, in + 7 * WIDTH,
                    in + 8 * WIDTH);
    NAME(move)(gates + whole, size, in, WIDTH, rest, GATES);
    NAME(move)(d_cell + whole, 0, in + 8 * WIDTH, 0, rest, 1);
}

/* How many of `rows` go through time together: about as many each time. */
static inline int64_t NAME(flock)(const Layer *p, int64_t rows) {
    int64_t fitting = LANE_FLOATS / (p->length * GATES * p->size);
    fitting = fitting < TALL ? TALL : fitting / TALL * TALL;
    int64_t flocks = (rows + fitting - 1) / fitting;
    return (rows + flocks - 1) / flocks;
}

/* Rows `first` to `first` + `count` of all rows forward through time. */
static void NAME(ahead)(const Layer *p, int64_t first, int64_t count, const float *w_ih,
                        const float *w_hh, const float *bias) {
    int64_t size = p->size, length = p->length, wide = GATES * size, at = first * length;
    float *gates = p->gates + at * wide, *before = p->before + at * size;
    float *cells = p->cells + at * size, *squashed = p->squashed + at * size;
    NAME(packed_product)((Left){p->x + at * p->width, p->width, 1}, w_ih, gates, wide,
                         count * length, p->width, wide, bias ? BIAS : ZERO, bias, 1);
    for (int64_t step = 0; step < length; step++) {
        int64_t t = p->reverse ? length - 1 - step : step, next = p->reverse ? t - 1 : t + 1;
        int64_t last = p->reverse ? t + 1 : t - 1;
        if (!step)
            for (int64_t r = 0; r < count; r++)
                memcpy(before + (r * length + t) * size, p->h0 + (first + r) * size,
                       4 * (size_t)size);
        NAME(packed_product)((Left){before + t * size, length * size, 1}, w_hh, gates + t * wide,
                             length * wide, count, size, wide, ITSELF, 0, 1);
        for (int64_t r = 0; r < count; r++) {
            int64_t here = r * length + t;
            float *out = p->out + ((first + r) * length + t) * p->out_stride;
            NAME(row)(size, gates + here * wide,
                      step ? cells + (r * length + last) * size : p->c0 + (first + r) * size,
                      cells + here * size, squashed + here * size, out);
            memcpy(step + 1 < length ? before + (r * length + next) * size
                                     : p->hidden + (first + r) * size, out, 4 * (size_t)size);
            if (step + 1 == length)
                memcpy(p->cell + (first + r) * size, cells + here * size, 4 * (size_t)size);
        }
    }
}

/* The same rows back through time. */
static void NAME(behind)(const Layer *p, int64_t first, int64_t count, const float *w_ih,
                         const float *w_hh) {
    int64_t size = p->size, length = p->length, wide = GATES * size, at = first * length;
    float *gates = p->gates + at * wide, *cells = p->cells + at * size;
    float *squashed = p->squashed + at * size, *hidden = p->hidden + first * size;
    for (int64_t step = length - 1; step >= 0; step--) {
        int64_t t = p->reverse ? length - 1 - step : step, last = p->reverse ? t + 1 : t - 1;
        for (int64_t r = 0; r < count; r++) {
            int64_t here = r * length + t;
            NAME(row_back)(size, gates + here * wide,
                           step ? cells + (r * length + last) * size : p->c0 + (first + r) * size,
                           squashed + here * size, p->out + (at + here) * p->out_stride,
                           hidden + r * size, p->cell + (first + r) * size);
        }
        NAME(packed_product)((Left){gates + t * wide, length * wide, 1}, w_hh, hidden, size, count,
                             wide, size, ZERO, 0, 1);
    }
    if (p->back)
        NAME(packed_product)((Left){gates, wide, 1}, w_ih, p->back + at * p->width, p->width,
                             count * length, wide, p->width, p->added ? ITSELF : ZERO, 0, 1);
}

/* Zeros for `count` rows from `first`, which are not gone through. */
static void NAME(blank)(const Layer *p, int64_t first, int64_t count, int backward) {
    int64_t size = p->size, length = p->length, at = first * length, all = count * length;
    if (!count) return;
    memset(p->gates + at * GATES * size, 0, 4 * (size_t)(all * GATES * size));
    memset(p->hidden + first * size, 0, 4 * (size_t)(count * size));
    memset(p->cell + first * size, 0, 4 * (size_t)(count * size));
    if (backward && p->back && !p->added)
        memset(p->back + at * p->width, 0, 4 * (size_t)(all * p->width));
    if (backward) return;
    memset(p->before + at * size, 0, 4 * (size_t)(all * size));
    for (int64_t i = at; i < at + all; i++)
        memset(p->out + i * p->out_stride, 0, 4 * (size_t)size);
}

/* A lane's matrices packed, and its bias added up. */
static void NAME(prepare)(const Layer *p, int64_t lane, int backward, float *w_ih, float *w_hh,
                          float *bias) {
    int64_t size = p->size, wide = GATES * size;
    const float *own_ih = p->w_ih + lane * wide * p->width, *own_hh = p->w_hh + lane * wide * size;
    if (backward) {
        if (p->back) NAME(pack_all)((Right){own_ih, p->width, 1}, wide, p->width, w_ih);
        NAME(pack_all)((Right){own_hh, size, 1}, wide, size, w_hh);
        return;
    }
    NAME(pack_all)((Right){own_ih, 1, p->width}, p->width, wide, w_ih);
    NAME(pack_all)((Right){own_hh, 1, size}, size, wide, w_hh);
    for (int64_t j = 0; bias && j < wide; j++)
        bias[j] = p->b_ih[lane * wide + j] + p->b_hh[lane * wide + j];
}

/* All lanes, forward or back. -1 where there is no memory for the matrices, else 0. */
static int NAME(lstm)(const Layer *p, int backward) {
    int64_t wide = GATES * p->size;
    int64_t ih = backward ? NAME(packed_size)(wide, p->width) : NAME(packed_size)(p->width, wide);
    int64_t hh = backward ? NAME(packed_size)(wide, p->size) : NAME(packed_size)(p->size, wide);
    char *memory = malloc(4 * (size_t)(ih + hh + wide) + 64);
    if (!memory) return -1;
    float *w_ih = (float *)(memory + 64 - (uintptr_t)memory % 64), *w_hh = w_ih + ih;
    float *bias = p->b_ih && !backward ? w_hh + hh : 0;
    for (int64_t lane = 0; lane < p->lanes; lane++) {
        int64_t skipped = p->skipped ? p->skipped[lane] : 0, own = p->shared ? 0 : lane;
        NAME(blank)(p, lane * p->rows, skipped, backward);
        if (skipped == p->rows && !p->shared) continue;
        if (!lane || !p->shared)
            NAME(prepare)(p, own, backward, w_ih, w_hh, bias);
        for (int64_t row = skipped, count; row < p->rows; row += count) {
            count = NAME(flock)(p, p->rows - row);
            if (backward) NAME(behind)(p, lane * p->rows + row, count, w_ih, w_hh);
            else NAME(ahead)(p, lane * p->rows + row, count, w_ih, w_hh, bias);
        }
    }
    free(memory);
    return 0;
}
