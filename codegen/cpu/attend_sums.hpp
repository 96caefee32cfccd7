// Weights that are divided by their sum, or by nothing: a softmax, a sum, none.
//
//   m, l           of a row: about the highest score so far, the sum of weights against it (scores are in powers of 2),
//                  in lanes, which come together at the end
//   POWER          0, or of a softmax: a score is the number y >= 0 whose weight is y to that power. RISE: see SLACK

constexpr float SLACK = 8.f;  // by how many powers of 2 a weight may be above 1 before the others are made smaller
constexpr float NO_SCORE = POWER ? 0.f : -INF;

template <int TO> INLINE vf raised(vf x) {
    if constexpr (TO <= 1) return x;
    else if constexpr (TO % 2) return x * raised<TO - 1>(x);
    else return raised<TO / 2>(x * x);
}

INLINE void begin_row(const Call& c, Block& x, int64_t r) {
    x.m[r] = NO_SCORE;
    store(x.l + r * VL, vf{});
    if (SINK) {  // one key more, whose value is 0
        const vf s = sink((int)x.b, (int)x.h, x.i[r], x.t);
        if (NORMALISER == SOFTMAX) x.m[r] = POWER ? exp2_(s / (float)POWER)[0] : s[0], x.l[r * VL] = s[0] == -INF ? 0.f : 1.f;
        else x.l[r * VL] = Spec<0>((int)x.b, (int)x.h, x.i[r], x.t).weight(s)[0];
    }
}

// Scores of a block against one tile become weights; m, l and o follow. WHOLE: all keys of a tile, and no row leaves one out.
template <int S, bool WHOLE> INLINE void weigh(const Call& c, Block& x, const int32_t* place, int64_t width, int32_t j0) {
    const int64_t lanes = WHOLE ? BN : rounded(width, VL);
    int32_t lines[Spec<S>::LINES * LN + 1];
    const Keys keys{place, j0, lanes, lines, LN};
    for (int64_t r = 0; r < x.count; r++) {
        float* s = x.s + r * LN;
        cell* p = x.p + r * LN;
        const Spec<S> row((int)x.b, (int)x.h, x.i[r], x.t, keys);
        // A place beyond the last key has no factor: it may be infinite there, and padded values are multiplied too.
        const auto after = [&](vf w, int64_t n) {
            const vf changed = w * row.factor(keys.at(n), n);
            return WHOLE ? changed : select(count() + (int32_t)n < (int32_t)width, changed, all(0.f));
        };
        vf top = all(NO_SCORE), sum{};
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = keys.at(n);
            vf y = row.score(load(s + n), j, n);
            if (NORMALISER != SOFTMAX) y = row.weight(y);
            if (!WHOLE) {
                vi kept = row.keep(j, n) & (count() + (int32_t)n < (int32_t)width);
                if (place) kept &= j != NOWHERE;
                y = select(kept, y, all(NORMALISER == SOFTMAX ? NO_SCORE : 0.f));
            }
            if (NORMALISER == SOFTMAX) store(s + n, y), top = most(top, y);
            else {
                if (VALUES) store(p + n, AFTER ? after(y, n) : y);
                sum += y;
            }
        }
        if (NORMALISER == SOFTMAX) {
            if (any_above(top, POWER ? x.m[r] * RISE : x.m[r] + SLACK)) {  // what was gathered so far was weighed against a much lower score
                const float m = highest(top);
                const float less = x.m[r] == NO_SCORE ? 0.f : POWER ? raised<POWER>(all(x.m[r] / m))[0] : exp2_(all(x.m[r] - m))[0];
                store(x.l + r * VL, load(x.l + r * VL) * less);
                for (int64_t d = 0; d < x.ldo; d += VL) store(x.o + r * x.ldo + d, load(x.o + r * x.ldo + d) * less);
                x.m[r] = m;
            }
            const float from = x.m[r] == NO_SCORE ? 0.f : POWER ? 1.f / x.m[r] : x.m[r];
            for (int64_t n = 0; n < lanes; n += VL) {
                const vf w = POWER ? raised<POWER>(load(s + n) * from) : exp2_below(load(s + n) - from);
                store(p + n, AFTER ? after(w, n) : w);
                sum += w;
            }
        }
        for (int64_t n = lanes; n < (WHOLE ? BN : rounded(width, DEEP)); n += VL) store(p + n, vf{});
        store(x.l + r * VL, load(x.l + r * VL) + sum);
    }
}

struct Settled { float divisor, lse; };
INLINE Settled settled(const Block& x, int64_t r, bool logs) {
    const float l = NORMALISER == NONE && !logs ? 0.f : total(load(x.l + r * VL));
    const float divisor = NORMALISER == NONE ? 1.f : NORMALISER == SUM ? l + EPS : l;
    if (!logs) return {divisor, 0.f};
    const float log = l == 0.f ? -INF : logf(l);
    return {divisor, NORMALISER == SOFTMAX && x.m[r] != NO_SCORE ? (POWER ? POWER * logf(x.m[r]) : x.m[r] * LN2) + log : log};
}

// Whether no key of the tiles before can change the block's rows.
INLINE bool spent(const Block&, float) { return false; }
