// A linear layer over stored weights: y = x W^T + b, by products of tiles or of dots.

// Products that are whole within a group, each output's times its scale of the group, less its zero times the sum of x.
static void products_by_group(const Call& c, const Turned& t, const Patch& p, int64_t first, int64_t last, const unsigned char* a, float* sums) {
    alignas(64) int32_t whole[OUTPUTS * 32];
    if (!first) memset(sums, 0, sizeof whole);
    for (int64_t from = first, to; from < last; from = to) {
        const int64_t g = group_of(c, from), end = c.groups == 1 ? t.steps : (g + 1) * (c.K / c.groups) / PER;
        to = end < last ? end : last;
        products(c, t, p, from, to, a + (from - first) * 2 * TILE, whole, false);
        for (int64_t o = 0; o < OUTPUTS && p.n + o < c.N; o++) {
            const float s = factor(c.scale, (p.n + o) * c.groups + g), z = to == end ? factor(c.zero, (p.n + o) * c.groups + g) : 0.f;
            for (int next = 0; next <= p.two; next++) {
                vf* sum = (vf*)(sums + o * 32 + next * 16);
                *sum += floats(*(const vi*)(whole + o * 32 + next * 16)) * s - load(sum_at(c, t, p.m + next, g)) * z;
            }
        }
    }
}

// Outputs n to `end` of the rows in blocks `from` to `to`. A few inputs at a time: what they need of x stays in a cache for
// all of these outputs, 32 of which become a panel that stays in a nearer one for all of these rows.
static void part_of(const Call& c, const Turned& t, int64_t n0, int64_t end, int64_t from, int64_t to, unsigned char* panel, int32_t* sums) {
    if (t.lines) {
        for (int64_t n = n0; n < end; n += OUTPUTS) line_by_line(c, t, n, sums), finish_all(c, t, {n, from, false}, sums);
        return;
    }
    for (int64_t first = 0; first < t.steps; first += CHUNK) {
        const int64_t last = smaller(first + CHUNK, t.steps);
        int32_t* own = sums;
        for (int64_t n = n0; n < end; n += OUTPUTS) {
            const bool as_they_lie = LIE && CODES == BYTES && WHOLE && c.K % 64 == 0 && n + OUTPUTS <= c.N && to - from <= LIES;
            if (!as_they_lie)
                for (int64_t o = 0; o < OUTPUTS; o++) {
                    Reader reader(c, n + o < c.N ? n + o : c.N - 1);
                    for (int64_t k = first * PER; k < last * PER; k += 64) {
                        const int64_t later = k + CHUNK * PER;  // of this output, or of one in the next panel
                        reader.ask_for(later < c.K ? later : OUTPUTS * c.row * OF_A_BYTE + later - up(c.K, CHUNK * PER));
                        unsigned char* line = panel + ((k / PER - first) * 2 + o / 16) * TILE + o % 16 * LINE;
                        if constexpr (WHOLE) *(vi*)line = reader.whole_line(k); else reader.half_lines(k, line, line + 2 * TILE);
                    }
                }
            const unsigned char* a = as_they_lie ? c.codes + n * c.row + first * LINE : panel;
            for (int64_t m = from; m < to; m += 2, own += OUTPUTS * 32) {
                const Patch patch = {n, m, m + 1 < to, as_they_lie, m == from};
                if constexpr (GROUPED) products_by_group(c, t, patch, first, last, a, (float*)own);
                else products(c, t, patch, first, last, a, own, first > 0);
                if (last == t.steps) finish_all(c, t, patch, own);
            }
        }
    }
}

extern "C" int run(const Call* given) {
    const Call& c = *given;
    if (!units_allowed()) return 1;
    Turned t;
    t.steps = up(c.K, 64) / PER, t.lines = c.M * DIGITS <= FEW;
    const int64_t blocks = (c.M + ROWS - 1) / ROWS, strips = (blocks + STRIP - 1) / STRIP;
    const int64_t width = blocks > 4 ? SPAN * OUTPUTS : OUTPUTS, parts = (c.N + width - 1) / width;
    const int64_t block = t.steps * PARTS * TILE, panel = CHUNK * 2 * TILE;
    t.tiles = (unsigned char*)aligned_alloc(64, blocks * block + up(blocks * 16 * 4 * (1 + sums_of(c)), 64));
    if (!t.tiles) return 2;
    t.scale = (float*)(t.tiles + blocks * block), t.sum = t.scale + blocks * 16;
    if (SUMMED) memset(t.sum, 0, blocks * 16 * 4 * sums_of(c));
    if (c.M % ROWS) memset(t.tiles + (blocks - 1) * block, 0, block);
#pragma omp parallel num_threads(c.threads)
    {
        unsigned char* own = (unsigned char*)aligned_alloc(64, panel + SPAN * ((STRIP + 1) / 2) * OUTPUTS * SUMS);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < c.M; m++) {
            if constexpr (DIGITS > 1) turn_digits(c, t, m); else if constexpr (WHOLE) turn_whole(c, t, m); else turn_halves(c, t, m);
        }
        units_begin();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * parts; task++) {
            const int64_t from = task / parts * STRIP, to = from + STRIP < blocks ? from + STRIP : blocks;
            const int64_t n = task % parts * width, end = n + width < c.N ? n + width : c.N;
            part_of(c, t, n, end, from, to, own, (int32_t*)(own + panel));
        }
        units_end();
        free(own);
    }
    free(t.tiles);
    return 0;
}
