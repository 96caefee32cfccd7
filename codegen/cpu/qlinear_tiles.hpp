// Products of tiles on a processor's matrix units. Codes of 8 bits are read as they lie by few rows.

constexpr int STRIP = WHOLE ? 32 : 16 / PARTS;  // blocks of rows that stay in a cache
constexpr int CHUNK = 64;  // tiles of a panel that are made at a time
constexpr bool LIE = true;  // few rows read codes of 8 bits as they lie
constexpr int LIES = DIGITS > 1 ? 14 : 4;  // blocks of rows up to which they do; measured

template <int COLUMNS>
static void step_of(const unsigned char* a, int64_t a_row, int64_t a_next, const unsigned char* b, const unsigned char* b_next) {
    for (int l = 0; l < 16; l++) { __builtin_prefetch(b + PARTS * TILE + l * 64); if (COLUMNS > 1) __builtin_prefetch(b_next + PARTS * TILE + l * 64); }
    LOAD(4, a, a_row);
    LOAD(5, a + a_next, a_row);
    for (int part = 0; part < PARTS; part++, b += TILE, b_next += TILE) {
        LOAD(6, b, LINE);
        MULTIPLY_ALL(0, 4, 6);
        MULTIPLY_ALL(2, 5, 6);
        if constexpr (COLUMNS > 1) { LOAD(7, b_next, LINE); MULTIPLY_ALL(1, 4, 7); MULTIPLY_ALL(3, 5, 7); }
    }
}

static void products(const Call& c, const Turned& t, const Patch& p, int64_t first, int64_t last, const unsigned char* a, int32_t* sums, bool add) {
    if (add) { LOAD(0, sums, SUMS); LOAD(1, sums + 16, SUMS); LOAD(2, sums + 512, SUMS); LOAD(3, sums + 528, SUMS); }
    else { ZERO(0); ZERO(1); ZERO(2); ZERO(3); }
    const int64_t a_row = p.as_they_lie ? c.row : LINE, a_next = 16 * a_row, a_step = p.as_they_lie ? LINE : 2 * TILE;
    for (int64_t step = first; step < last; step++, a += a_step) {
        if (p.as_they_lie && p.first_rows) for (int o = 0; o < OUTPUTS; o++) __builtin_prefetch(a + o * c.row + 512, 0, 2);
        const unsigned char *b = tile_of(t, p.m, step, 0), *b_next = tile_of(t, p.two ? p.m + 1 : p.m, step, 0);
        if (p.two) step_of<2>(a, a_row, a_next, b, b_next); else step_of<1>(a, a_row, a_next, b, b);
    }
    STORE(0, sums, SUMS); STORE(1, sums + 16, SUMS); STORE(2, sums + 512, SUMS); STORE(3, sums + 528, SUMS);
}

constexpr int FEW = 0;
INLINE void line_by_line(const Call&, const Turned&, int64_t, int32_t*) {}
