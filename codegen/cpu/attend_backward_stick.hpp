// A weight taken from what later keys have left, and its gradient: both run along the keys from the last one back.
//
//   w_j = 2^(own_j - gone)                 own_j = log2 of the share a_j = sigmoid(y), gone = sum of log2(1 + 2^y_t) over t > j
//   ds_j = (w_j G_j - a_j R_j) score'(s)   G_j = do . v_j, R_j = sum of w_t G_t over the keys t <= j, and the gradient of log left
//
//   gone, lost     of a row: as above, so far, and what rounding took from it
//   rest           R = L + delta less what later keys have had, where delta = do . o, L = the gradient
//   R              as kept of a row: no G of it is larger. What keys t <= j have is at most R times what is left for them, and
//                  a difference of rounded sums is not: past that it is none of theirs
//
// Once nothing is left in float32, only L is: where that is 0 the keys before have no gradient.

constexpr float GONE = 126.f, NOTHING = 0x1p-100f;

INLINE int64_t number(const Call& c, const Block& x, int64_t r) { return (x.b * c.H + x.h) * c.N + x.first + r; }
INLINE bool spent(const Call& c, const Block& x, int64_t r) { return x.gone[r] >= GONE && fabsf(c.L[number(c, x, r)]) <= NOTHING; }
INLINE bool spent(const Call& c, const Block& x) {
    for (int64_t r = 0; r < x.count; r++) if (!spent(c, x, r)) return false;
    return true;
}

INLINE void begin_row(const Call& c, Block& x, int64_t r) {
    x.gone[r] = x.lost[r] = 0.f, x.rest[r] = c.delta[number(c, x, r)];
}

// Of a tile: products q . k in s become ds, products do . v in w become w.
template <bool WHOLE> INLINE void weigh(const Call& c, Block& x, int64_t width, int32_t j0) {
    const int64_t lanes = rounded(width, VL);
    int32_t lines[Spec::LINES * LN + 1];
    const Keys keys{nullptr, j0, lanes, lines, LN};
    for (int64_t r = 0; r < x.count; r++) {
        float *s = x.s + r * LN, *w = x.w + r * LN;
        if (spent(c, x, r)) {
            memset(s, 0, sizeof(float) * lanes), memset(w, 0, sizeof(float) * lanes);
            continue;
        }
        const Spec row((int)x.b, (int)x.h, (int)(x.first + r + c.shift), c.t, keys);
        float shares[LN], taken[LN];
        for (int64_t n = 0; n < lanes; n += VL) {  // apart from what follows: neither waits for the other
            const vf y = row.score(load(s + n), keys.at(n), n), low = log2_above_1(exp2_between(-absolute(y)));
            vf own = least(y, all(0.f)) - low, whole = most(y, all(0.f)) + low;
            if (!WHOLE) {
                const vi kept = row.keep(keys.at(n), n) & (count() + (int32_t)n < (int32_t)width);
                own = select(kept, own, all(-INF)), whole = select(kept, whole, vf{});
            }
            store(shares + n, own), store(taken + n, whole);
        }
        const float left = c.L[number(c, x, r)], largest = c.R[number(c, x, r)];
        vf here{}, rest = all(x.rest[r]);
        for (int64_t n = lanes; (n -= VL) >= 0;) {
            const vf own = load(shares + n), mine = load(taken + n), later = sums_above(mine), share = own - (x.gone[r] + (here + later));
            const vf p = select(share < -GONE, vf{}, exp2_between(share)), had = p * load(w + n);
            const vf a = select(own < -GONE, vf{}, exp2_between(own)), before = sums_above(had);
            const vf bound = p * largest, behind = most(-bound, least(bound, a * (rest - before)));
            const vf up = had - (behind + a * left);
            give<WHOLE>(row, load(s + n), keys.at(n), n, (vi)(own != -INF), p, load(w + n), up, s, w);
            here += all(later[0] + mine[0]), rest -= all(before[0] + had[0]);
        }
        add_to(x.gone[r], x.lost[r], here[0]), x.rest[r] = rest[0];
    }
}
