// `attend` on a processor: tiles of keys against blocks of query rows, scores in float32, weights of one tile at a time.
//
//   B, H, N, D     batch, query heads, query rows, their size           Hk, M, Dv   key heads, keys, size of a value
//   BM, BN         rows of a block of queries, keys of a tile           b, h, i, j  logical indices, as the spec has them
//   LN             numbers from one row of a tile's scores to the next: BN up to a whole number of vectors
//   m, l           of a row: about the highest score so far, the sum of weights against it (scores are in powers of 2)
//
// In front of this text stand BM, BN, SEGMENTS, NORMALISER, EPS, SINK, VALUES (o is asked for), AFTER (a weight meets its
// value times a factor that the sum of weights knows nothing of), BACK, AHEAD, SINKS; for every segment S
//   Spec<S> of a row (b, h, i, t): score(s, j), weight(s), factor(j), keep(j); and ::seen(b, h, i0, i1, j0, j1): 0 none, 1 some, 2 all are kept;
// and sink(b, h, i, t); t: the tables that the expressions look up. HALVES: q, k, v, o are bfloat16 and the products are those of
// units.hpp or dots.hpp; else everything is float32.

#ifdef HALVES
typedef half cell;
constexpr int64_t DEEP = 32, WIDE = 16, TALL = 16;  // what sizes of a product are multiples of: K, N, M
#else
typedef float cell;
constexpr int64_t DEEP = 1, WIDE = VL, TALL = 1;
#endif

template <class T> struct Of { T* data; int64_t b, h, n, d; };  // strides in elements
typedef Of<cell> Rows;
struct Source {
    Rows k, v;
    int64_t Hk, keys;                       // key heads; how many places keys stand at
    const int32_t *at; int64_t at_b, at_h;  // the row of k, v at each place (B|1, Hk|1, keys), -1 for none; or null: in order
    const int32_t *place; int64_t place_b, place_h;  // the position j of each row, or null: 0, 1, ...
};
struct Call {
    Rows q, o;
    int64_t B, H, N, D, Dv, shift, threads;
    const int32_t *q_place; int64_t q_place_b, q_place_h;
    const int32_t *list; int64_t list_b, list_h, list_q, listed;  // key tiles of each query tile, or null
    float* lse;
    const Table* t;
    Source source[SEGMENTS];
};

constexpr int64_t LN = (BN + WIDE - 1) / WIDE * WIDE;
constexpr float SLACK = 8.f;  // by how many powers of 2 a weight may be above 1 before the others are made smaller
constexpr int64_t BLOCKS = 8, FAR = 3 << 20;  // so many blocks meet a tile in turn where a head's keys and values have more bytes
constexpr float LN2 = 0.69314718055994531f;
constexpr int32_t NOWHERE = INT32_MIN;  // the position of a place at which no key stands
// Keys of one head as tiles D x BN, values as tiles BN x Dv (or as they lie in memory); positions beside them.
struct Packed { cell *k, *v; int32_t* j; int64_t tiles; };

// Where the second factor of a product, of so many rows and columns, has a number; and its stride, as `product` takes it.
#ifdef HALVES
INLINE int64_t at(int64_t row, int64_t column, int64_t rows, int64_t) {
    return column / 16 * rows * 16 + row / 2 * 32 + column % 16 * 2 + row % 2;
}
INLINE int64_t stride(int64_t rows, int64_t) { return rows * 16; }
static bool values_as_they_are(const Call&, const Source&) { return false; }
#else
INLINE int64_t at(int64_t row, int64_t column, int64_t, int64_t columns) { return row * columns + column; }
INLINE int64_t stride(int64_t, int64_t columns) { return columns; }
static bool values_as_they_are(const Call& c, const Source& s) { return s.v.d == 1 && c.Dv % VL == 0 && !s.at; }
#endif

// VL keys as columns n, n + 1, ... of their tile, and how many numbers of each that is; the numbers of one key from d on;
// one or two rows of values, the first of them row n.
#ifdef HALVES
INLINE int64_t put_keys(const cell* key, int64_t next, int64_t D, int64_t deep, cell* k, int64_t n) {
    int64_t d = 0;  // two numbers are moved as one
    if (next % 2 == 0) for (; d + 2 * VL <= D; d += 2 * VL) transpose((const float*)(key + d), next / 2, (float*)(k + at(d, n, deep, LN)), 16);
    return d;
}
INLINE void put_key(const cell* key, int64_t step, int64_t d, int64_t D, int64_t deep, cell* k, int64_t n) {
    if (step == 1) for (; d + 2 <= D; d += 2) memcpy(k + at(d, n, deep, LN), key + d, 2 * sizeof(cell));
    for (; d < D; d++) k[at(d, n, deep, LN)] = key[d * step];
}
INLINE void put_values(const cell* const* rows, int64_t count, int64_t step, int64_t Dv, cell* v, int64_t n, int64_t wide) {
    int64_t d = 0;
    if (count == 2 && step == 1)
        for (; d + VL <= Dv; d += VL) *(vi*)(v + at(n, d, BN, wide)) = wholes(*(const vh*)(rows[0] + d)) | wholes(*(const vh*)(rows[1] + d)) << 16;
    for (; d < Dv; d++) for (int64_t r = 0; r < count; r++) v[at(n + r, d, BN, wide)] = rows[r][d * step];
}
#else
INLINE int64_t put_keys(const cell* key, int64_t next, int64_t D, int64_t deep, cell* k, int64_t n) {
    int64_t d = 0;
    for (; d + VL <= D; d += VL) transpose(key + d, next, k + at(d, n, deep, LN), LN);
    return d;
}
INLINE void put_key(const cell* key, int64_t step, int64_t d, int64_t D, int64_t deep, cell* k, int64_t n) {
    for (; d < D; d++) k[at(d, n, deep, LN)] = key[d * step];
}
INLINE void put_values(const cell* const* rows, int64_t count, int64_t step, int64_t Dv, cell* v, int64_t n, int64_t wide) {
    for (int64_t r = 0; r < count; r++) for (int64_t d = 0; d < Dv; d++) v[at(n + r, d, BN, wide)] = rows[r][d * step];
}
#endif

static void pack(const Call& c, const Source& s, int64_t b, int64_t h, int64_t tile, const Packed& to) {
    const int64_t deep = rounded(c.D, DEEP), wide = rounded(c.Dv, WIDE), first = tile * BN;
    const int64_t count = smaller<int64_t>(BN, s.keys - first);
    cell *k = to.k + tile * deep * LN, *v = to.v + tile * BN * wide;
    if (count < LN || deep != c.D) memset(k, 0, sizeof(cell) * deep * LN);
    if (to.v && (count < BN || wide != c.Dv)) memset(v, 0, sizeof(cell) * BN * wide);
    const cell* rows[2] = {};  // of values, one after the other
    int64_t turned = 0;        // numbers of these VL keys that have come together
    for (int64_t n = 0; n < count; n++) {
        const int64_t row = s.at ? s.at[b * s.at_b + h * s.at_h + first + n] : first + n, from = row < 0 ? 0 : row;
        to.j[first + n] = row < 0 ? NOWHERE : s.place ? s.place[b * s.place_b + h * s.place_h + row] : (int32_t)row;
        const cell* key = s.k.data + b * s.k.b + h * s.k.h + from * s.k.n;
        if (n % VL == 0) turned = s.at || s.k.d != 1 || n + VL > count ? 0 : put_keys(key, s.k.n, c.D, deep, k, n);
        put_key(key, s.k.d, turned, c.D, deep, k, n);
        if (!to.v) continue;
        rows[n % 2] = s.v.data + b * s.v.b + h * s.v.h + from * s.v.n;
        if (n % 2 || n + 1 == count) put_values(rows, 1 + n % 2, s.v.d, c.Dv, v, n / 2 * 2, wide);
    }
}

struct Block {  // one block of query rows, and what it has gathered so far
    int64_t b, h, first, count;
    int32_t i[BM], i0, i1;  // positions, the least and the greatest
    float m[BM], l[BM * VL];  // l in lanes, which come together at the end
    cell *q, *p;  // the rows, their weights
    float *s, *o;
    int64_t ldo;
};

// Scores of a block against one tile become weights; m, l and o follow. WHOLE: all keys of a tile, and no row leaves one out.
template <int S, bool WHOLE> INLINE void weigh(const Call& c, Block& x, const int32_t* place, int64_t width, int32_t j0) {
    const int64_t lanes = WHOLE ? BN : rounded(width, VL);
    for (int64_t r = 0; r < x.count; r++) {
        float* s = x.s + r * LN;
        cell* p = x.p + r * LN;
        const Spec<S> row((int)x.b, (int)x.h, x.i[r], c.t);
        const auto key = [=](int64_t n) { return place ? *(const vi*)(place + n) : count() + (j0 + (int32_t)n); };
        // A place beyond the last key has no factor: it may be infinite there, and padded values are multiplied too.
        const auto after = [&](vf w, int64_t n) {
            const vf changed = w * row.factor(key(n));
            return WHOLE ? changed : select(count() + (int32_t)n < (int32_t)width, changed, all(0.f));
        };
        vf top = all(-INF), sum{};
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = key(n);
            vf y = row.score(load(s + n), j);
            if (NORMALISER != SOFTMAX) y = row.weight(y);
            if (!WHOLE) {
                vi kept = row.keep(j) & (count() + (int32_t)n < (int32_t)width);
                if (place) kept &= j != NOWHERE;
                y = select(kept, y, all(NORMALISER == SOFTMAX ? -INF : 0.f));
            }
            if (NORMALISER == SOFTMAX) store(s + n, y), top = most(top, y);
            else store(p + n, AFTER ? after(y, n) : y), sum += y;
        }
        if (NORMALISER == SOFTMAX) {
            if (any_above(top, x.m[r] + SLACK)) {  // what was gathered so far was weighed against a much lower score
                const float m = highest(top), less = x.m[r] == -INF ? 0.f : exp2_(all(x.m[r] - m))[0];
                store(x.l + r * VL, load(x.l + r * VL) * less);
                for (int64_t d = 0; d < x.ldo; d += VL) store(x.o + r * x.ldo + d, load(x.o + r * x.ldo + d) * less);
                x.m[r] = m;
            }
            const float from = x.m[r] == -INF ? 0.f : x.m[r];
            for (int64_t n = 0; n < lanes; n += VL) {
                const vf w = exp2_below(load(s + n) - from);
                store(p + n, AFTER ? after(w, n) : w);
                sum += w;
            }
        }
        for (int64_t n = lanes; n < (WHOLE ? BN : rounded(width, DEEP)); n += VL) store(p + n, vf{});
        store(x.l + r * VL, load(x.l + r * VL) + sum);
    }
}

// One tile, or its first keys.
template <int S> static void tile(const Call& c, Block& x, const Packed& keys, int64_t number, int64_t most = BN) {
    const Source& s = c.source[S];
    const int64_t first = number * BN, width = smaller(s.keys - first, most);
    const bool placed = s.at || s.place || c.q_place;
    const int seen = placed ? 1 : Spec<S>::seen((int)x.b, (int)x.h, x.i0, x.i1, (int32_t)first, (int32_t)(first + width - 1));
    if (seen == 0) return;
    const int64_t deep = rounded(c.D, DEEP), rows = rounded(x.count, TALL);
    product<false>(rows, rounded(width, WIDE), deep, x.q, deep, keys.k + number * deep * LN, stride(deep, LN), x.s, LN);
    const int32_t* place = s.at || s.place ? keys.j + first : nullptr;
    if (seen == 2 && width == BN && BN % VL == 0) weigh<S, true>(c, x, place, width, (int32_t)first);
    else weigh<S, false>(c, x, place, width, (int32_t)first);
    if (!VALUES) return;
    const cell* v = keys.v ? keys.v + first * x.ldo : s.v.data + x.b * s.v.b + x.h / (c.H / s.Hk) * s.v.h + first * s.v.n;
    product<true>(rows, x.ldo, rounded(width, DEEP), x.p, LN, v, keys.v ? stride(BN, x.ldo) : s.v.n, x.o, x.ldo);
}

// The tiles that rows can reach: the sinks', then those of the band. A tile meets all blocks before the next one does.
template <int S> static void tiles(const Call& c, Block* x, int64_t count, const Packed& keys) {
    if (S == 0 && c.list) {
        const int32_t* listed = c.list + x->b * c.list_b + x->h * c.list_h + x->first / BM * c.list_q;
        for (int64_t n = 0; n < c.listed; n++) {
            bool again = false;
            for (int64_t before = 0; before < n; before++) again |= listed[before] == listed[n];
            if (!again && listed[n] >= 0 && listed[n] < keys.tiles) tile<S>(c, *x, keys, listed[n]);
        }
        return;
    }
    int64_t low = 0, high = keys.tiles, sinks = 0;
    int32_t i0 = x->i0, i1 = x->i1;
    for (int64_t n = 1; n < count; n++) i0 = smaller(i0, x[n].i0), i1 = larger(i1, x[n].i1);
    const bool placed = c.source[S].at || c.source[S].place || c.q_place;
    if (S == 0 && !placed) {
        if (AHEAD != INT64_MAX) high = i1 + AHEAD < 0 ? 0 : smaller<int64_t>(high, (i1 + AHEAD) / BN + 1);
        if (BACK != INT64_MAX) low = i0 - BACK > 0 ? (i0 - BACK) / BN : 0;
        sinks = smaller<int64_t>(low, rounded(SINKS, BN) / BN);
    }
    // The nearest first: there a score that falls with the distance is highest, and no later tile outweighs it.
    for (int64_t n = high; n-- > low;) for (int64_t m = 0; m < count; m++) tile<S>(c, x[m], keys, n);
    for (int64_t n = 0; n < smaller(sinks, high); n++)
        for (int64_t m = 0; m < count; m++) tile<S>(c, x[m], keys, n, smaller<int64_t>(BN, SINKS - n * BN));
}

template <int S> static void segments(const Call& c, Block* x, int64_t count, const Packed* keys) {
    const int64_t Hk = c.source[S].Hk;
    tiles<S>(c, x, count, keys[S * c.B * c.H + x->b * Hk + x->h / (c.H / Hk)]);
    if constexpr (S + 1 < SEGMENTS) segments<S + 1>(c, x, count, keys);
}

static void begin(const Call& c, Block& x) {
    x.i0 = INT32_MAX, x.i1 = INT32_MIN;
    for (int64_t r = 0; r < x.count; r++) {
        const int64_t n = x.first + r;
        x.i[r] = c.q_place ? c.q_place[x.b * c.q_place_b + x.h * c.q_place_h + n] : (int32_t)(n + c.shift);
        x.i0 = smaller(x.i0, x.i[r]), x.i1 = larger(x.i1, x.i[r]);
        x.m[r] = -INF;
        store(x.l + r * VL, vf{});
        if (SINK) {  // one key more, whose value is 0
            const vf s = sink((int)x.b, (int)x.h, x.i[r], c.t);
            if (NORMALISER == SOFTMAX) x.m[r] = s[0], x.l[r * VL] = s[0] == -INF ? 0.f : 1.f;
            else x.l[r * VL] = Spec<0>((int)x.b, (int)x.h, x.i[r], c.t).weight(s)[0];
        }
        const int64_t deep = rounded(c.D, DEEP);
        const cell* query = c.q.data + x.b * c.q.b + x.h * c.q.h + n * c.q.n;
        cell* to = x.q + r * deep;
        if (c.q.d == 1) memcpy(to, query, sizeof(cell) * c.D); else for (int64_t d = 0; d < c.D; d++) to[d] = query[d * c.q.d];
        for (int64_t d = c.D; d < deep; d++) to[d] = 0;
    }
    memset(x.o, 0, sizeof(float) * x.count * x.ldo);
}

static void finish(const Call& c, const Block& x) {
    for (int64_t r = 0; r < x.count; r++) {
        const int64_t n = x.first + r;
        const float l = total(load(x.l + r * VL));
        float divisor = NORMALISER == NONE ? 1.f : NORMALISER == SUM ? l + EPS : l;
        if (divisor == 0.f) divisor = 1.f;
        if (c.lse) {
            const float log = l == 0.f ? -INF : logf(l);
            c.lse[(x.b * c.H + x.h) * c.N + n] = NORMALISER == SOFTMAX && x.m[r] != -INF ? x.m[r] * LN2 + log : log;
        }
        cell *o = c.o.data + x.b * c.o.b + x.h * c.o.h + n * c.o.n, line[VL];
        for (int64_t d = 0; d < c.Dv; d += VL) {
            const int64_t count = smaller<int64_t>(VL, c.Dv - d);
            store(count == VL ? o + d : line, load(x.o + r * x.ldo + d) / divisor);
            if (count < VL) memcpy(o + d, line, sizeof(cell) * count);
        }
    }
}

// All keys of a segment, tile by tile; they are read by every block of queries. Cells of k, of v, places: of one head.
struct Room { int64_t k, v, j, tiles; };
static Room room(const Call& c, const Source& s) {
    const int64_t tiles = rounded(s.keys, BN) / BN, keys = tiles * BN;  // the last tile's places are read by whole vectors
    return {tiles * LN * rounded(c.D, DEEP), values_as_they_are(c, s) ? 0 : keys * rounded(c.Dv, WIDE), keys + LN - BN, tiles};
}
static int64_t bytes(const Call& c, const Source& s) {
    const Room r = room(c, s);
    return rounded(c.B * s.Hk * ((r.k + r.v) * sizeof(cell) + r.j * 4), 64);
}

static void prepare(const Call& c, const Source& s, Packed* keys, char* at) {
    const Room r = room(c, s);
    const int64_t heads = c.B * s.Hk, tiles = r.tiles;
    for (int64_t n = 0; n < heads; n++) {
        cell* k = (cell*)at;
        keys[n] = {k, r.v ? k + r.k : nullptr, (int32_t*)(k + r.k + r.v), tiles};
        at += (r.k + r.v) * sizeof(cell) + r.j * 4;
    }
#pragma omp parallel for schedule(static) num_threads(c.threads)
    for (int64_t n = 0; n < heads * tiles; n++)
        pack(c, s, n / tiles / s.Hk, n / tiles % s.Hk, n % tiles, keys[n / tiles]);
}

// 0: done; 1: the processor's matrix units were not given to this process.
extern "C" int run(const Call* call) {
    const Call& c = *call;
#ifdef HALVES
    static const bool allowed = units_allowed();
    if (!allowed) return 1;
#endif
    int64_t needed = 0;
    for (int S = 0; S < SEGMENTS; S++) needed += bytes(c, c.source[S]);
    Workspace memory(needed / 4), table(SEGMENTS * c.B * c.H * sizeof(Packed) / 4);
    Packed* keys = (Packed*)table.data;
    char* at = (char*)memory.data;
    for (int S = 0; S < SEGMENTS; at += bytes(c, c.source[S]), S++) prepare(c, c.source[S], keys + S * c.B * c.H, at);
    const int64_t rows = rounded(BM, TALL), deep = rounded(c.D, DEEP), ldo = rounded(c.Dv, WIDE);
    const bool far = BACK == INT64_MAX && !c.list && c.source[0].keys * (c.D + c.Dv) * (int64_t)sizeof(cell) >= FAR;
    const bool many = c.B * c.H * c.N >= 4 * c.threads * BLOCKS * BM;  // turns enough for every thread
    const int64_t side = far && many ? BLOCKS : 1, turns = (c.N + side * BM - 1) / (side * BM), tasks = c.B * c.H * turns;
#pragma omp parallel num_threads(c.threads)
    {
        const NoSubnormals flushing;
        const int64_t each = rows * (deep + ldo);  // floats of the rows of a block and of what it gathers
        Workspace own(side * each + 2 * rows * LN);
        Block x[BLOCKS];
        for (int64_t n = 0; n < side; n++) {
            x[n].o = own.data + n * each, x[n].q = (cell*)(x[n].o + rows * ldo), x[n].ldo = ldo;
            x[n].s = own.data + side * each, x[n].p = (cell*)(x[n].s + (sizeof(cell) == 4 ? 0 : rows * LN));
        }
#ifdef HALVES
        units_begin();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t turn = turns - 1 - task % turns;  // under a causal mask the last rows cost most: they begin
            int64_t count = 0;
            for (int64_t first = turn * side * BM; count < side && first < c.N; first += BM, count++) {
                Block& one = x[count];
                one.b = task / turns / c.H, one.h = task / turns % c.H, one.first = first;
                one.count = smaller<int64_t>(BM, c.N - first);
                begin(c, one);
            }
            segments<0>(c, x, count, keys);
            for (int64_t n = 0; n < count; n++) finish(c, x[n]);
        }
#ifdef HALVES
        units_end();
#endif
    }
    return 0;
}
