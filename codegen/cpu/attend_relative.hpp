// Relative terms of queries: a block's products with the rows of R that a tile can ask for, made when one first does. Scores
// look them up as they look up tables: these are the last RELATIVE of TABLES tables.
//
// In front of this text stands asked(n, b, h, i0, i1, j0, j1, last): the rows of the n-th R that a box of queries and keys asks for.

// Whatever normaliser and segment: the keys from j0 on of a tile are about to be weighed.
INLINE void ask(const Call& c, Block& x, int32_t j0) {
    for (int n = 0; n < RELATIVE; n++) {
        const Relative& r = c.relative[n];
        Asked& made = x.asked[n];
        const Span span = asked(n, (int)x.b, (int)x.h, x.i0, x.i1, j0, j0 + (int32_t)LN - 1, (int32_t)r.rows - 1);
        const int64_t low = clamped(span.low, r.rows) / PANEL, high = clamped(span.high, r.rows) / PANEL + 1;
        const float* R = r.data + x.h % r.heads * r.panels * PANEL * c.D;
        const auto fill = [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; p++)
                product<false>(x.count, PANEL, c.D, (const float*)x.q, c.D, R + p * PANEL * c.D, PANEL, made.data + p * PANEL, r.panels * PANEL);
        };
        if (made.low == made.high) made.low = made.high = low;
        fill(low, made.low), fill(made.high, high);  // one run of panels: what lies between is made as well
        made.low = smaller(made.low, low), made.high = larger(made.high, high);
    }
}

// A block's own tables, with nothing made yet.
INLINE void begin_asked(const Call& c, Block& x) {
    for (int n = 0; n < RELATIVE; n++) {
        const Relative& r = c.relative[n];
        const int64_t from_row_to_row = r.panels * PANEL;
        x.asked[n].low = x.asked[n].high = 0;
        x.own[TABLES - RELATIVE + n] = {x.asked[n].data - x.first * from_row_to_row, {c.B, c.H, c.N, r.rows}, {0, 0, from_row_to_row, 1}};
    }
}

// Numbers of all products of a block of so many rows; where a block has them, and its tables.
static int64_t asked_floats(const Call& c, int64_t rows) {
    int64_t count = 0;
    for (int n = 0; n < RELATIVE; n++) count += rows * c.relative[n].panels * PANEL;
    return count;
}
static void place_asked(const Call& c, Block& x, int64_t rows, float* at) {
    x.t = RELATIVE ? x.own : c.t;
    if (RELATIVE) memcpy(x.own, c.t, sizeof(x.own));
    for (int n = 0; n < RELATIVE; at += rows * c.relative[n].panels * PANEL, n++) x.asked[n].data = at;
}
