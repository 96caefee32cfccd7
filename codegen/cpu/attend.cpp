// `attend` on a processor: tiles of keys against blocks of query rows, scores in float32, weights of one tile at a time.
//
// In front of this text stand attend_walk.hpp, attend_keys.hpp, whose letters are used, attend_relative.hpp, and the file of a normaliser: begin_row,
// weigh, settled, spent.
// In front of these BM, BN, SEGMENTS, NORMALISER, EPS, SINK, VALUES (o is asked for), AFTER (a weight meets its value times a
// factor that the sum of weights knows nothing of), STOPS (tiles may be left out once all rows are `spent`), BACK, AHEAD, SINKS;
// for every segment S
//   Spec<S> of a row (b, h, i, t) and the keys of a tile: score(s, j, n), weight(s), factor(j, n), keep(j, n); and ::seen(b, h, i0, i1, j0, j1): 0 none, 1 some, 2 all are kept;
// and sink(b, h, i, t); t: the tables that the expressions look up. RELATIVE, TABLES: attend_relative.hpp.
//
// The last segment comes first.

constexpr int64_t BLOCKS = 8, FAR = VL == 16 ? 3 << 19 : 3 << 20;  // so many blocks meet a tile in turn where a head's keys and values have more bytes

// One tile, or its first keys.
template <int S> static void tile(const Call& c, Block& x, const Packed& all, int64_t number, int64_t most) {
    const Source& s = c.source[S];
    const int64_t first = number * BN, width = smaller(s.keys - first, most);
    const bool placed = s.at || s.place || c.q_place;
    const int seen = placed ? 1 : Spec<S>::seen((int)x.b, (int)x.h, x.i0, x.i1, (int32_t)first, (int32_t)(first + width - 1));
    if (seen == 0) return;
    const int64_t deep = rounded(c.D, DEEP), rows = rounded(x.count, TALL);
    const int64_t h = x.h / (c.H / s.Hk);
    ready(c, s, x.b, h, number, all);
    const Packed keys = x.once ? tile_of_own(c, s, x.b, h, number, all, x.once) : all;
    product<false>(rows, rounded(width, WIDE), deep, x.q, deep, keys.k + number * deep * LN, stride(deep, LN), x.s, LN);
    const int32_t* place = s.at || s.place ? keys.j + first : nullptr;
    ask(c, x, (int32_t)first);
    if (seen == 2 && width == BN && BN % VL == 0) weigh<S, true>(c, x, place, width, (int32_t)first);
    else weigh<S, false>(c, x, place, width, (int32_t)first);
    if (!VALUES) return;
    const cell* v = keys.v ? keys.v + first * x.ldo : s.v.data + x.b * s.v.b + h / s.lie * s.v.h + first * s.v.n;
    product<true>(rows, x.ldo, rounded(width, DEEP), x.p, LN, v, keys.v ? stride(BN, x.ldo) : s.v.n, x.o, x.ldo);
}

INLINE bool done(const Block& x, const Packed& keys, int64_t number) {
    float most = INF;
    if (STOPS && keys.most) memcpy(&most, keys.most + number, sizeof(most));
    return STOPS && spent(x, most);
}

// The tiles that rows can reach: a tile meets all blocks before the next one does. True where no key of the segments before
// counts any more.
template <int S> static bool tiles(const Call& c, Block* x, int64_t count, const Packed& keys) {
    const bool placed = c.source[S].at || c.source[S].place || c.q_place;
    const int32_t* listed = S == 0 && c.list ? c.list + x->b * c.list_b + x->h * c.list_h + x->first / BM * c.list_q : nullptr;
    int32_t i0 = x->i0, i1 = x->i1;
    for (int64_t m = 1; m < count; m++) i0 = smaller(i0, x[m].i0), i1 = larger(i1, x[m].i1);
    return walk({listed, c.listed, keys.tiles, S == 0 && !placed}, i0, i1, [&](int64_t n, int64_t most) {
        bool all_done = true;
        for (int64_t m = 0; m < count; m++) {
            tile<S>(c, x[m], keys, n, most);
            all_done &= done(x[m], keys, n);
        }
        return all_done;
    });
}

template <int S> static void segments(const Call& c, Block* x, int64_t count, const Packed* keys) {
    const int64_t Hk = c.source[S].Hk;
    if (tiles<S>(c, x, count, keys[S * c.B * c.H + x->b * Hk + x->h / (c.H / Hk)])) return;
    if constexpr (S > 0) segments<S - 1>(c, x, count, keys);
}

static void begin(const Call& c, Block& x) {
    begin_asked(c, x);
    x.i0 = INT32_MAX, x.i1 = INT32_MIN;
    for (int64_t r = 0; r < x.count; r++) {
        const int64_t n = x.first + r;
        x.i[r] = c.q_place ? c.q_place[x.b * c.q_place_b + x.h * c.q_place_h + n] : (int32_t)(n + c.shift);
        x.i0 = smaller(x.i0, x.i[r]), x.i1 = larger(x.i1, x.i[r]);
        begin_row(c, x, r);
        const int64_t deep = rounded(c.D, DEEP);
        const cell* query = c.q.data + x.b * c.q.b + x.h * c.q.h + n * c.q.n;
        cell* to = x.q + r * deep;
        if (c.q.d == 1) copy(query, c.D, to); else for (int64_t d = 0; d < c.D; d++) to[d] = query[d * c.q.d];
        for (int64_t d = c.D; d < deep; d++) to[d] = 0;
    }
    memset(x.o, 0, sizeof(float) * x.count * x.ldo);
}

static void finish(const Call& c, const Block& x) {
    for (int64_t r = 0; r < x.count; r++) {
        const int64_t n = x.first + r;
        const Settled found = settled(x, r, c.lse);
        const float divisor = found.divisor == 0.f ? 1.f : found.divisor, size = fabsf(divisor);
        const float share = size > 1e-30f && size < 1e30f ? 1.f / divisor : 0.f;  // 0: it would not be whole
        if (c.lse) c.lse[(x.b * c.H + x.h) * c.N + n] = found.lse;
        cell *o = c.o.data + x.b * c.o.b + x.h * c.o.h + n * c.o.n, line[VL];
        for (int64_t d = 0; d < c.Dv; d += VL) {
            const int64_t count = smaller<int64_t>(VL, c.Dv - d);
            const vf y = load(x.o + r * x.ldo + d);
            store(count == VL ? o + d : line, share == 0.f ? y / divisor : y * share);
            if (count < VL) memcpy(o + d, line, sizeof(cell) * count);
        }
    }
}

// Blocks of all rows: a few rows behind the last one belong to it, but where each block has its list of tiles.
static int64_t blocks_of(const Call& c) {
    const int64_t whole = (c.N + BM - 1) / BM, rest = c.N - (whole - 1) * BM;
    return whole > 1 && !c.list && rest <= MOST - BM ? whole - 1 : whole;
}

// 0: done; 1: the processor's matrix units were not given to this process.
extern "C" int run(const Call* call) {
    const Call& c = *call;
#ifdef HALVES
    static const bool allowed = units_allowed();
    if (!allowed) return 1;
#endif
    const int64_t blocks = blocks_of(c);
    bool once = !STOPS && blocks == 1;  // no tile meets two blocks: none is kept
    for (int S = 0; S < SEGMENTS; S++) once = once && c.source[S].Hk == c.H;
    int64_t needed = 0;
    for (int S = 0; S < SEGMENTS; S++) needed += bytes(c, c.source[S]);
    if (once) needed = 0;
    Workspace memory(needed / 4), table(SEGMENTS * c.B * c.H * sizeof(Packed) / 4);
    Packed* keys = (Packed*)table.data;
    char* at = (char*)memory.data;
    for (int S = 0; S < SEGMENTS; at += bytes(c, c.source[S]), S++) prepare(c, c.source[S], keys + S * c.B * c.H, at, once);
    if (STOPS) look_ahead(c, keys);
    const int64_t rows = rounded(MOST, TALL), deep = rounded(c.D, DEEP), ldo = rounded(c.Dv, WIDE);
    const bool far = BACK == INT64_MAX && !STOPS && !c.list && c.source[0].keys * (c.D + c.Dv) * (int64_t)sizeof(cell) >= FAR;
    const bool many = c.B * c.H * c.N >= 4 * c.threads * BLOCKS * BM;  // turns enough for every thread
    const int64_t side = far && many ? BLOCKS : 1, turns = (blocks + side - 1) / side, tasks = c.B * c.H * turns;
#pragma omp parallel num_threads(c.threads)
    {
        const NoSubnormals flushing;
        const int64_t each = rows * (deep + ldo) + asked_floats(c, rows);  // floats of a block: rows, what they gather and ask for
        const int64_t all = side * each + 2 * rows * LN;
        Workspace own(rounded(all, 16) + (once ? bytes_of_tile(c) / 4 : 0));
        Block x[BLOCKS];
        for (int64_t n = 0; n < side; n++) {
            x[n].o = own.data + n * each, x[n].q = (cell*)(x[n].o + rows * ldo), x[n].ldo = ldo;
            x[n].once = once ? (char*)(own.data + rounded(all, 16)) : nullptr;
            place_asked(c, x[n], rows, own.data + n * each + rows * (deep + ldo));
            x[n].s = own.data + side * each, x[n].p = (cell*)(x[n].s + (sizeof(cell) == 4 ? 0 : rows * LN));
        }
#ifdef HALVES
        units_begin();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t turn = turns - 1 - task % turns;  // under a causal mask the last rows cost most: they begin
            int64_t count = 0;
            for (int64_t number = turn * side; count < side && number < blocks; number++, count++) {
                Block& one = x[count];
                one.b = task / turns / c.H, one.h = task / turns % c.H, one.first = number * BM;
                one.count = number + 1 == blocks ? c.N - one.first : BM;
                begin(c, one);
            }
            segments<SEGMENTS - 1>(c, x, count, keys);
            for (int64_t n = 0; n < count; n++) finish(c, x[n]);
        }
#ifdef HALVES
        units_end();
#endif
    }
    return 0;
}
