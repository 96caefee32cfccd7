// A weight and its gradient from its score and one number kept of the row.
//
//   w = W(score(s)) R           W: the weight, of a softmax exp2(score - L); R: what it was divided by, as a factor
//   ds_ij = W'(score) R (f_ij do_i . v_j - delta_i) score'(s)          f: the factor that w meets its value with

INLINE void begin_row(const Call&, Block&, int64_t) {}

// Of a tile: products q . k in s become ds, products do . v in w become w.
template <bool WHOLE> INLINE void weigh(const Call& c, Block& x, int64_t width, int32_t j0) {
    const int64_t lanes = rounded(width, VL), at = (x.b * c.H + x.h) * c.N + x.first;
    const int b = (int)x.b, h = (int)x.h;
    int32_t lines[Spec::LINES * LN + 1];
    const Keys keys{nullptr, j0, lanes, lines, LN};
    for (int64_t r = 0; r < x.count; r++) {
        float *s = x.s + r * LN, *w = x.w + r * LN;
        const Spec row(b, h, (int)(x.first + r + c.shift), c.t, keys);
        const float L = c.L[at + r], R = c.R[at + r], delta = c.delta[at + r];
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = keys.at(n);
            const vf raw = load(s + n), y = row.score(raw, j, n);
            const vf gain = load(w + n);
            vf p = SOFTMAX ? exp2_(y - L) : row.weight(y) * R;
            vf up = (SOFTMAX ? p : row.weight_slope(y) * R) * (gain * row.factor(j, n) - delta);
            if (SOFTMAX && L == -INF) p = vf{}, up = vf{};  // a row that keeps no key
            const vi kept = WHOLE ? all(-1) : row.keep(j, n) & (count() + (int32_t)n < (int32_t)width);
            give<WHOLE>(row, raw, j, n, kept, p, gain, up, s, w);
        }
    }
}

INLINE bool spent(const Call&, const Block&) { return false; }
