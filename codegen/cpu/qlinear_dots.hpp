// Products of four bytes, or of two bfloat16, in each of sixteen places at a time.

constexpr int STRIP = 32;  // blocks of rows that stay in a cache
constexpr int CHUNK = 8;  // tiles of a panel that are made at a time: with what it meets of x it stays in the nearest cache
constexpr bool LIE = false;  // panels are made for all numbers of rows
constexpr int LIES = 0;

INLINE vi dot(vi sum, vi w, vi x) {
    if constexpr (WHOLE) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); else sum = (vi)dot((vf)sum, w, x);
    return sum;
}

// N outputs of R blocks of rows: their sums stay in registers.
template <int N, int R>
static void dots(const unsigned char* a, const unsigned char* const b[2], int64_t steps, int32_t* sums, bool add) {
    vi sum[N][R] = {};
    if (add) for (int o = 0; o < N; o++) for (int r = 0; r < R; r++) sum[o][r] = line_of(sums + o * 32 + r * 16);
    for (int64_t step = 0; step < steps; step++, a += 2 * TILE) {
#pragma GCC unroll 2
        for (int k = 0; k < 16; k++) {
            vi x[R];
            for (int r = 0; r < R; r++) x[r] = line_of(b[r] + step * TILE + k * LINE);
            for (int o = 0; o < N; o++) {
                const vi w = all(*(const int32_t*)(a + o * LINE + k * 4));
                for (int r = 0; r < R; r++) sum[o][r] = dot(sum[o][r], w, x[r]);
            }
        }
    }
    for (int o = 0; o < N; o++) for (int r = 0; r < R; r++) *(vi*)(sums + o * 32 + r * 16) = sum[o][r];
}

static void products(const Call& c, const Turned& t, const Patch& p, int64_t first, int64_t last, const unsigned char* a, int32_t* sums, bool add) {
    const unsigned char* const b[2] = {tile_of(t, p.m, first, 0), tile_of(t, p.two ? p.m + 1 : p.m, first, 0)};
    for (int o = 0; o < OUTPUTS; o += 16, a += TILE, sums += 16 * 32) {
        if (!p.two) dots<16, 1>(a, b, last - first, sums, add);
        else for (int n = 0; n < 16; n += 8) dots<8, 2>(a + n * LINE, b, last - first, sums + n * 32, add);
    }
}

// --- few rows --------------------------------------------------------------------------------------------------------

constexpr int FEW = WHOLE ? (DIGITS == 1 ? 8 : 12) : 0;  // whole numbers for an input up to which codes are read line by line
constexpr int NEAR = 384;  // lines of x that stay in the nearest cache

// O outputs from n on: each line of their codes from `first` to `last` meets the same line of V rows of whole numbers.
template <int V, int O>
static void meet(const Call& c, const Turned& t, int64_t n, int64_t first, int64_t last, int32_t* sums) {
    vi sum[O][V] = {};
    vf scaled[O][V] = {};
    Reader readers[O];
#define EACH(i, N) _Pragma("GCC unroll 12") for (int i = 0; i < N; i++)
    EACH(o, O) readers[o] = Reader(c, n + o < c.N ? n + o : c.N - 1);
    const int64_t size = sums_of(c) > 1 ? c.K / c.groups / PER : t.steps;
    for (int64_t step = first, g = group_of(c, first); step < last; step++) {
        vi w[O];
        EACH(o, O) {
            readers[o].ask_for(O * c.row * OF_A_BYTE + step * PER);
            w[o] = readers[o].whole_line(step * PER);
        }
        EACH(v, V) {
            const vi x = line_of(t.tiles + (step * V + v) * LINE);
            EACH(o, O) sum[o][v] = dot(sum[o][v], w[o], x);
        }
        const bool end = step + 1 == (g + 1) * size;  // of a group
        if (!GROUPED || (!end && step + 1 < last)) continue;
        EACH(o, O) {
            const int64_t at = readers[o].n * c.groups + g;
            const float s = factor(c.scale, at), z = end ? factor(c.zero, at) : 0.f;
            EACH(v, V) {
                scaled[o][v] += floats(sum[o][v]) * s, sum[o][v] = all(0);
                scaled[o][v][0] -= sum_at(c, t, 0, g)[v] * z;
            }
        }
        g += end;
    }
    EACH(o, O) EACH(v, V) {
        if constexpr (GROUPED) ((float*)sums)[o * 32 + v] += total(scaled[o][v]); else sums[o * 32 + v] += total(sum[o][v]);
    }
#undef EACH
}

template <int V>
static void meet_all(const Call& c, const Turned& t, int64_t n, int32_t* sums) {
    constexpr int O = GROUPED ? (V <= 6 ? 2 : 1) : V <= 3 ? 4 : 2, STEPS = NEAR / V;  // sums stay in registers
    if (V == c.M * DIGITS)
        for (int64_t first = 0; first < t.steps; first += STEPS)
            for (int o = 0; o < OUTPUTS && n + o < c.N; o += O) meet<V, O>(c, t, n + o, first, smaller(first + STEPS, t.steps), sums + o * 32);
    else if constexpr (V > DIGITS) meet_all<V - DIGITS>(c, t, n, sums);
}

// The sums of 32 outputs and few rows, without a panel.
INLINE void line_by_line(const Call& c, const Turned& t, int64_t n, int32_t* sums) {
    memset(sums, 0, OUTPUTS * SUMS);
    if constexpr (FEW > 0) meet_all<FEW>(c, t, n, sums);
}
