// Weights of two levels and their gradients: a tile holds whole groups, the last key of each leads it.
//
//   P            of a leader: exp2(score - L)                    w_j = P S_j, S a softmax over the followers of a group
//   ds of a follower: w_j (G_j - mean) score'(s)                 G_j = do . v_j times the factor, mean = sum of S_t G_t
//   ds of a leader: P (mean - delta) score'(s)                   of a key that leads itself: P (G_j - delta) score'(s)
//
// A leader without followers keeps its weight, and G of its own stands for the mean.

static_assert(BN % SIZE == 0, "a tile holds whole groups");

INLINE void begin_row(const Call&, Block&, int64_t) {}

// Of a tile: products q . k in s become ds, products do . v in w become w.
template <bool WHOLE> INLINE void weigh(const Call& c, Block& x, int64_t width, int32_t j0) {
    const int64_t lanes = rounded(width, VL), at = (x.b * c.H + x.h) * c.N + x.first;
    const int b = (int)x.b, h = (int)x.h, i0 = (int)(x.first + c.shift);
    const bool alone = Spec::alone_seen(b, h, i0, i0 + (int)x.count - 1, j0, j0 + (int32_t)width - 1) != 0;
    int32_t lines[Spec::LINES * LN + 1], lone[LN + VL];
    float scores[LN + VL], gains[LN + VL], shares[LN + VL];  // gains: G
    memset(lone, 0, sizeof(lone));
    const Keys keys{nullptr, j0, lanes, lines, LN};
    for (int64_t r = 0; r < x.count; r++) {
        float *s = x.s + r * LN, *w = x.w + r * LN;
        const Spec row(b, h, i0 + (int)r, c.t, keys);
        const float L = c.L[at + r], delta = c.delta[at + r];
        const auto weight = [&](vf y) { return L == -INF ? vf{} : exp2_(y - L); };
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = keys.at(n);
            vf y = row.score(load(s + n), j, n), gain = load(w + n) * row.factor(j, n);
            if (!WHOLE) {
                const vi kept = row.keep(j, n) & (count() + (int32_t)n < (int32_t)width);
                y = select(kept, y, all(-INF)), gain = select(kept, gain, vf{});
            }
            store(scores + n, y), store(gains + n, gain);
            if (alone) store(lone + n, row.alone(j, n));
        }
        for (int64_t first = 0; first < width; first += SIZE) {
            const int32_t followers = (int32_t)smaller<int64_t>(SIZE - 1, width - first);
            const bool led = first + SIZE <= width;
            const float own = led ? weight(all(scores[first + SIZE - 1]))[0] : 0.f;
            vf top = all(-INF), sum{}, had{};
            const auto follows = [&](int64_t n) { return (count() + (int32_t)n < followers) & ~load(lone + first + n); };
            for (int64_t n = 0; n < followers; n += VL) top = most(top, select(follows(n), load(scores + first + n), all(-INF)));
            const float best = highest(top), against = best == -INF ? 0.f : best;
            for (int64_t n = 0; n < followers; n += VL) {
                const vf share = exp2_(select(follows(n), load(scores + first + n), all(-INF)) - against);
                store(shares + first + n, share), sum += share;
                had += select(follows(n), share * load(gains + first + n), vf{});
            }
            const float whole = total(sum), over = whole == 0.f ? 0.f : own / whole;
            const float mean = whole == 0.f ? 0.f : total(had) / whole;
            for (int64_t n = 0; n < followers; n += VL) {
                const vi of = count() + (int32_t)n < followers, self = load(lone + first + n);
                const vf p = select(self, weight(load(scores + first + n)), load(shares + first + n) * over);
                const vf up = p * (load(gains + first + n) - select(self, all(delta), all(mean)));
                store(shares + first + n, p), store(gains + first + n, select(of, up, load(gains + first + n)));
            }
            if (led) {
                shares[first + SIZE - 1] = whole == 0.f ? own : 0.f;
                gains[first + SIZE - 1] = own * ((whole == 0.f ? gains[first + SIZE - 1] : mean) - delta);
            }
        }
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = keys.at(n);
            const vf raw = load(s + n), p = load(shares + n), gain = load(w + n);
            give<WHOLE>(row, raw, j, n, WHOLE ? all(-1) : (vi)(load(scores + n) > -INF), p, gain, load(gains + n), s, w);
        }
    }
}

INLINE bool spent(const Call&, const Block&) { return false; }
