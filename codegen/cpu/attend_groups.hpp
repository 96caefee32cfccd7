// Weights of two levels: one softmax over the keys that lead, each of which hands its weight to its followers by one of theirs.
//
//   m, l           of a row, as of a softmax over the leaders: about the highest score so far, the sum of weights against it
//   SIZE           keys of a group; the last of them leads it, if it is there. A tile holds whole groups: what is shared out among
//                  followers is known before the next tile
//
// Spec<S> of a row says besides: alone(j, n), a key that leads itself wherever it stands; ::alone_seen of a box, as seen.

constexpr int64_t GROUPS = BN / SIZE;
constexpr float SLACK = 8.f;  // by how many powers of 2 a weight may be above 1 before the others are made smaller
static_assert(BN % SIZE == 0, "a tile holds whole groups");

INLINE void begin_row(const Call& c, Block& x, int64_t r) {
    x.m[r] = -INF;
    store(x.l + r * VL, vf{});
    if (SINK) {  // one key more, whose value is 0
        const float s = sink((int)x.b, (int)x.h, x.i[r], x.t)[0];
        x.m[r] = s, x.l[r * VL] = s == -INF ? 0.f : 1.f;
    }
}

// The leaders' scores, -inf where there is none, become their weights; what was gathered so far is made smaller where one is
// much higher, and the row's scores are measured against m then.
INLINE float lead(Block& x, int64_t r, vf high, float* led) {
    for (int64_t g = 0; g < GROUPS; g += VL) high = most(high, load(led + g));
    if (any_above(high, x.m[r] + SLACK)) {
        const float m = highest(high), less = x.m[r] == -INF ? 0.f : exp2_(all(x.m[r] - m))[0];
        store(x.l + r * VL, load(x.l + r * VL) * less);
        for (int64_t d = 0; d < x.ldo; d += VL) store(x.o + r * x.ldo + d, load(x.o + r * x.ldo + d) * less);
        x.m[r] = m;
    }
    const float from = x.m[r] == -INF ? 0.f : x.m[r];
    vf sum{};
    for (int64_t g = 0; g < GROUPS; g += VL) {
        const vf w = exp2_(load(led + g) - from);
        store(led + g, w), sum += w;
    }
    store(x.l + r * VL, load(x.l + r * VL) + sum);
    return from;
}

// A row whose groups all have followers of scores not far from m: they are weighed against it, without a look for the highest.
// False, and nothing done, where they are not such.
template <int S, bool WHOLE> INLINE bool weigh_near(const Spec<S>& row, Block& x, int64_t r, int64_t width, int32_t j0) {
    const float* s = x.s + r * LN, near = x.m[r] == -INF ? 0.f : x.m[r];
    float share[LN + VL], led[GROUPS + VL], whole[GROUPS];
    cell* p = x.p + r * LN;
    if (width % SIZE) return false;
    for (int64_t g = 0; g < GROUPS; g += VL) store(led + g, all(-INF));
    for (int64_t first = 0; first < width; first += SIZE) {
        vf shares{}, y{};
        int64_t n = 0;
        const auto next = [&] {
            const vi j = count() + (j0 + (int32_t)(first + n));
            y = row.score(load(s + first + n), j, first + n);
            if (!WHOLE) y = select(row.keep(j, first + n), y, all(-INF));
            const vf by = y - near;
            return select(by < -126.f, vf{}, exp2_between(by));
        };
        for (; n + VL < SIZE; n += VL) {
            const vf one = next();
            store(share + first + n, one), shares += one;
        }
        const vf last = select(count() + (int32_t)n < (int32_t)SIZE - 1, next(), vf{});
        store(share + first + n, last), shares += last;
        led[first / SIZE] = y[SIZE - 1 - (SIZE - 1) / VL * VL], whole[first / SIZE] = total(shares);
        if (!(whole[first / SIZE] > 0x1p-60f && whole[first / SIZE] < 0x1p60f)) return false;
    }
    lead(x, r, all(-INF), led);
    for (int64_t first = 0; first < width; first += SIZE) {
        const float factor = led[first / SIZE] / whole[first / SIZE];
        for (int64_t n = 0; n < SIZE; n += VL) {
            vf w = load(share + first + n) * factor;
            if (AFTER) w *= row.factor(count() + (j0 + (int32_t)(first + n)), first + n);
            if (AFTER && !WHOLE) w = select(count() + (int32_t)(first + n) < (int32_t)width, w, vf{});
            store(p + first + n, SIZE % VL == 0 ? w : select(count() + (int32_t)n < (int32_t)SIZE, w, load(p + first + n)));
        }
    }
    return true;
}

// ALONE: some key of the tile may lead itself that is not the last of its group.
template <int S, bool WHOLE, bool ALONE> INLINE void weigh_row(const Spec<S>& row, Block& x, int64_t r, int64_t width, int32_t j0) {
    const int64_t lanes = WHOLE ? BN : rounded(width, VL);
    float *s = x.s + r * LN, led[GROUPS + VL];
    int32_t lone[LN + VL];
    cell* p = x.p + r * LN;
    vf high = all(-INF), sum{};
    for (int64_t n = 0; n < lanes; n += VL) {
        const vi j = count() + (j0 + (int32_t)n);
        vf y = row.score(load(s + n), j, n);
        if (!WHOLE) y = select(row.keep(j, n) & (count() + (int32_t)n < (int32_t)width), y, all(-INF));
        store(s + n, y);
        if (ALONE) {
            const vi own = row.alone(j, n);
            *(vi*)(lone + n) = own, high = most(high, select(own, y, all(-INF)));
        }
    }
    for (int64_t g = 0; g < GROUPS; g += VL) store(led + g, all(-INF));
    for (int64_t g = 0; g < GROUPS; g++) if ((g + 1) * SIZE <= width) led[g] = s[g * SIZE + SIZE - 1];
    const float from = lead(x, r, high, led);
    for (int64_t first = 0; first < width; first += SIZE) {
        const float mine = led[first / SIZE];
        const int32_t followers = (int32_t)smaller<int64_t>(SIZE - 1, width - first);
        const auto follows = [&](int64_t n) {
            const vi one = count() + (int32_t)n < followers;
            return ALONE ? one & ~*(vi*)(lone + first + n) : one;
        };
        vf top = all(-INF), shares{};
        for (int64_t n = 0; n < followers; n += VL) top = most(top, select(follows(n), load(s + first + n), all(-INF)));
        const float best = highest(top), against = best == -INF ? 0.f : best;
        for (int64_t n = 0; n < followers; n += VL) {
            const vi of = follows(n);
            const vf y = load(s + first + n), share = exp2_(select(of, y, all(-INF)) - against);
            store(s + first + n, select(of, share, y)), shares += share;
        }
        const float whole = total(shares), factor = whole == 0.f ? 0.f : mine / whole, kept = whole == 0.f ? mine : 0.f;
        for (int64_t n = 0; n < SIZE && first + n < lanes; n += VL) {
            const vi at = count() + (int32_t)n;
            const vf y = load(s + first + n);
            vf w = select(at < followers, y * factor, all(kept));
            if (ALONE) {
                const vi own = *(vi*)(lone + first + n) & (at < followers);
                const vf alone = select(own, exp2_(y - from), vf{});
                w = select(own, alone, w), sum += alone;
            }
            if (AFTER) w *= row.factor(at + (j0 + (int32_t)first), first + n);
            if (!WHOLE) w = select(at + (int32_t)first < (int32_t)width, w, vf{});
            store(p + first + n, SIZE % VL == 0 ? w : select(at < (int32_t)SIZE, w, load(p + first + n)));
        }
    }
    store(x.l + r * VL, load(x.l + r * VL) + sum);
}

// Scores of a block against one tile become weights; m, l and o follow. WHOLE: all keys of a tile, and no row leaves one out.
template <int S, bool WHOLE> INLINE void weigh(const Call& c, Block& x, const int32_t*, int64_t width, int32_t j0) {
    const bool alone = Spec<S>::alone_seen((int)x.b, (int)x.h, x.i0, x.i1, j0, j0 + (int32_t)width - 1) != 0;
    int32_t lines[Spec<S>::LINES * (LN + VL) + 1];  // groups begin anywhere in a vector
    const Keys keys{nullptr, j0, rounded(width, VL) + (SIZE % VL ? VL : 0), lines, LN + VL};
    for (int64_t r = 0; r < x.count; r++) {
        const Spec<S> row((int)x.b, (int)x.h, x.i[r], x.t, keys);
        if (alone) weigh_row<S, WHOLE, true>(row, x, r, width, j0);
        else if (!weigh_near<S, WHOLE>(row, x, r, width, j0)) weigh_row<S, WHOLE, false>(row, x, r, width, j0);
        if (!WHOLE && DEEP > 1) memset(x.p + r * LN + width, 0, sizeof(cell) * (rounded(width, DEEP) - width));
    }
}

struct Settled { float divisor, lse; };
INLINE Settled settled(const Block& x, int64_t r, bool logs) {
    const float l = total(load(x.l + r * VL));
    if (!logs) return {l, 0.f};
    const float log = l == 0.f ? -INF : logf(l);
    return {l, x.m[r] != -INF ? x.m[r] * LN2 + log : log};
}

// Whether no key of the tiles before can change the block's rows.
INLINE bool spent(const Block&, float) { return false; }
