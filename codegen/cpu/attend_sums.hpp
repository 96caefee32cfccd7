// Weights that are divided by their sum, or by nothing: a softmax, a sum, none.
//
//   m, l           of a row: about the highest score so far, the sum of weights against it (scores are in powers of 2),
//                  in lanes, which come together at the end

constexpr float SLACK = 8.f;  // by how many powers of 2 a weight may be above 1 before the others are made smaller

INLINE void begin_row(const Call& c, Block& x, int64_t r) {
    x.m[r] = -INF;
    store(x.l + r * VL, vf{});
    if (SINK) {  // one key more, whose value is 0
        const vf s = sink((int)x.b, (int)x.h, x.i[r], c.t);
        if (NORMALISER == SOFTMAX) x.m[r] = s[0], x.l[r * VL] = s[0] == -INF ? 0.f : 1.f;
        else x.l[r * VL] = Spec<0>((int)x.b, (int)x.h, x.i[r], c.t).weight(s)[0];
    }
}

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

struct Settled { float divisor, lse; };
INLINE Settled settled(const Block& x, int64_t r) {
    const float l = total(load(x.l + r * VL)), divisor = NORMALISER == NONE ? 1.f : NORMALISER == SUM ? l + EPS : l;
    const float log = l == 0.f ? -INF : logf(l);
    return {divisor, NORMALISER == SOFTMAX && x.m[r] != -INF ? x.m[r] * LN2 + log : log};
}

// Whether no key of the tiles before can change the block's rows.
INLINE bool spent(const Block&, float) { return false; }
