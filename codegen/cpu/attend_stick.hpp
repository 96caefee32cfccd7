// Weights taken from what later keys have left: each key takes a share of it, from the last one back.
//
//   w_j = 2^(own_j - gone)     own_j = log2 of the share sigmoid(y), gone = sum of log2(1 + 2^y_t) over the keys t > j
//
//   m, l           of a row: `gone` so far, and what rounding took from it; keys that are still to come weigh at most 2^-m together
//
// A score is in powers of 2. What a key takes is never made from a difference of large numbers, whatever its score.

constexpr float GONE = 126.f;  // from here on the weights that remain are 0 in float32
constexpr float SMALL = 24.f;  // before here what is left is not worth a look at the values

INLINE void begin_row(const Call&, Block& x, int64_t r) { x.m[r] = 0.f, x.l[r * VL] = 0.f; }

// Scores of a block against one tile become weights; m follows. WHOLE: all keys of a tile, and no row leaves one out.
template <int S, bool WHOLE> INLINE void weigh(const Call& c, Block& x, const int32_t* place, int64_t width, int32_t j0) {
    const int64_t lanes = WHOLE ? BN : rounded(width, VL), end = WHOLE ? BN : rounded(width, DEEP);
    int32_t lines[Spec<S>::LINES * LN + 1];
    const Keys keys{place, j0, lanes, lines, LN};
    for (int64_t r = 0; r < x.count; r++) {
        float* s = x.s + r * LN;
        cell* p = x.p + r * LN;
        if (x.m[r] >= GONE) {
            memset(p, 0, sizeof(cell) * larger(lanes, end));
            continue;
        }
        const Spec<S> row((int)x.b, (int)x.h, x.i[r], x.t, keys);
        float taken[LN + VL];
        for (int64_t n = 0; n < lanes; n += VL) {  // apart from what follows: neither waits for the other
            const vi j = keys.at(n);
            const vf y = row.score(load(s + n), j, n), low = log2_above_1(exp2_between(-absolute(y)));
            vf own = least(y, all(0.f)) - low, all_of_it = most(y, all(0.f)) + low;
            if (!WHOLE) {
                vi kept = row.keep(j, n) & (count() + (int32_t)n < (int32_t)width);
                if (place) kept &= j != NOWHERE;
                own = select(kept, own, all(-INF)), all_of_it = select(kept, all_of_it, vf{});
            }
            store(s + n, own), store(taken + n, all_of_it);
        }
        vf here{};  // of this tile
        for (int64_t n = lanes; (n -= VL) >= 0;) {
            const vf mine = load(taken + n);
            const vf later = sums_above(mine), share = load(s + n) - (x.m[r] + (here + later));
            vf w = select(share < -GONE, vf{}, exp2_between(share));
            if (AFTER) w = WHOLE ? w * row.factor(keys.at(n), n) : select(count() + (int32_t)n < (int32_t)width, w * row.factor(keys.at(n), n), vf{});
            store(p + n, w);
            here += all(later[0] + mine[0]);
        }
        for (int64_t n = lanes; n < end; n += VL) store(p + n, vf{});
        add_to(x.m[r], x.l[r * VL], here[0]);
    }
}

struct Settled { float divisor, lse; };
INLINE Settled settled(const Block& x, int64_t r, bool) { return {1.f, -x.m[r] * LN2}; }

// Whether no key of the tiles before can change the block's rows: the values there are at most `most` in size, all weights
// together at most what is left. Where weights become others, or `most` is not known, that has to be 0 in float32.
static bool spent(const Block& x, float most_there) {
    for (int64_t r = 0; r < x.count; r++) {
        if (x.m[r] >= GONE) continue;
        if (AFTER || !(x.m[r] >= SMALL)) return false;
        vf top{};
        for (int64_t d = 0; d < x.ldo; d += VL) top = most(top, absolute(load(x.o + r * x.ldo + d)));
        if (!(exp2f(-x.m[r]) * most_there <= highest(top) * 0x1p-26f)) return false;
    }
    return true;
}
