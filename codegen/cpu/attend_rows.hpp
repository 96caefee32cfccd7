// What gradients of `attend` are made from: a head's keys and values in tiles, a block of query rows and their gradients.
//
// In front of this text stand BM, BN, SOFTMAX, BACK, AHEAD, SINKS, and Spec of a row (b, h, i, t) and the keys of a tile: score(s, j, n) (in powers of 2 where
// only exponentials and logarithms follow), slope(s, j, n) = d score / ds, weight(s), weight_slope(s), keep(j, n), factor(j, n), what a weight is
// multiplied by before it meets its value; learn(up, w, s, j, n), which adds to gradients of tables what d loss / d score and w . do . v are: LEARNS
// says whether there are such; ::seen of a box.

constexpr int64_t LN = (BN + VL - 1) / VL * VL;  // from one row of a tile to the next
struct Rows { float* data; int64_t b, h, n, d; };  // strides in elements
struct Call {
    Rows q, k, v, go, dq, dk, dv;
    int64_t B, H, Hk, N, M, D, Dv, shift, threads;
    const float *L, *R, *delta;  // (B, H, N)
    const int32_t* list; int64_t list_b, list_h, list_q, listed;  // key tiles of each query tile, or null
    const Table* t;
};

struct Head {  // a key head: its tiles as the products want them, and its sums
    float *kt, *vt, *k;  // D x BN and Dv x BN by tiles; keys x D
    float *dk, *dv;
};
struct Block {
    int64_t b, h, first, count;
    float *q, *go, *s, *w, *dq;
    float gone[BM], lost[BM], rest[BM];  // what runs along the keys of a row: the file of a normaliser says what
};

// Of VL keys: p their weights, gain do . v, up the gradients of their scores; where `kept` is 0 they are nothing.
template <bool WHOLE, class Row> INLINE void give(const Row& row, vf raw, vi j, int64_t n, vi kept, vf p, vf gain, vf up, float* s, float* w) {
    if (!WHOLE) p = select(kept, p, vf{}), up = select(kept, up, vf{});
    vf on = p * row.factor(j, n), back = up * row.slope(raw, j, n);
    if (!WHOLE) on = select(kept, on, vf{}), back = select(kept, back, vf{});  // a factor, a slope may be infinite there
    if (LEARNS) row.learn(up, p * gain, raw, j, n);
    store(w + n, on), store(s + n, back);
}

INLINE float* row(const Rows& x, int64_t b, int64_t h, int64_t n) { return x.data + b * x.b + h * x.h + n * x.n; }
INLINE void copy(const float* from, int64_t stride, int64_t count, int64_t wide, float* to) {
    for (int64_t d = 0; d < count; d++) to[d] = from[d * stride];
    for (int64_t d = count; d < wide; d++) to[d] = 0;
}

static void pack(const Call& c, int64_t b, int64_t h, int64_t tile, const Head& x) {
    const int64_t D = rounded(c.D, VL), first = tile * BN, count = smaller<int64_t>(BN, c.M - first);
    float *kt = x.kt + tile * c.D * LN, *vt = x.vt + tile * c.Dv * LN;
    if (count < LN) memset(kt, 0, sizeof(float) * c.D * LN), memset(vt, 0, sizeof(float) * c.Dv * LN);
    for (int64_t n = 0; n < count; n++) {
        const float *k = row(c.k, b, h, first + n), *v = row(c.v, b, h, first + n);
        for (int64_t d = 0; d < c.D; d++) kt[d * LN + n] = k[d * c.k.d];
        for (int64_t d = 0; d < c.Dv; d++) vt[d * LN + n] = v[d * c.v.d];
        copy(k, c.k.d, c.D, D, x.k + (first + n) * D);
    }
}
