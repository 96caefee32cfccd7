// Gradients of `attend` on a processor: weights are made again tile by tile, from one number kept of every row.
//
//   w = W(score(s)) R           W: the weight, of a softmax exp2(score - L); R: what it was divided by, as a factor
//   dv_j = sum_i w_ij do_i      ds_ij = W'(score) R (do_i . v_j - delta_i) score'(s)
//   dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i
//
// A task is a key head, or a share of its blocks of queries with sums of its own, which are added up at the end.
// In front of this text stand BM, BN, SOFTMAX, BACK, AHEAD, SINKS, and Spec of a row (b, h, i, t): score(s, j) (in powers of 2 for
// a softmax), slope(s, j) = d score / ds, weight(s), weight_slope(s), keep(j); ::seen of a box.

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
};

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

// Of a tile: products q . k in s become ds, products do . v in w become w.
template <bool WHOLE> INLINE void weigh(const Call& c, Block& x, int64_t width, int32_t j0) {
    const int64_t lanes = rounded(width, VL), at = (x.b * c.H + x.h) * c.N + x.first;
    const int b = (int)x.b, h = (int)x.h;
    for (int64_t r = 0; r < x.count; r++) {
        float *s = x.s + r * LN, *w = x.w + r * LN;
        const Spec row(b, h, (int)(x.first + r + c.shift), c.t);
        const float L = c.L[at + r], R = c.R[at + r], delta = c.delta[at + r];
        for (int64_t n = 0; n < lanes; n += VL) {
            const vi j = count() + (j0 + (int32_t)n);
            const vf raw = load(s + n), y = row.score(raw, j);
            vf p = SOFTMAX ? exp2_(y - L) : row.weight(y) * R;
            vf up = SOFTMAX ? p : row.weight_slope(y) * R;
            up *= (load(w + n) - delta) * row.slope(raw, j);
            if (!WHOLE) {
                const vi kept = row.keep(j) & (count() + (int32_t)n < (int32_t)width);
                p = select(kept, p, vf{}), up = select(kept, up, vf{});
            }
            if (SOFTMAX && L == -INF) p = vf{}, up = vf{};  // a row that keeps no key
            store(w + n, p), store(s + n, up);
        }
    }
}

static void tile(const Call& c, Block& x, const Head& head, int64_t number, int32_t i0, int32_t i1) {
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), first = number * BN, width = smaller<int64_t>(BN, c.M - first);
    const int some = Spec::seen((int)x.b, (int)x.h, i0, i1, (int32_t)first, (int32_t)(first + width - 1));
    if (some == 0) return;
    const int64_t lanes = rounded(width, VL);
    product<false>(x.count, lanes, c.D, x.q, D, head.kt + number * c.D * LN, LN, x.s, LN);
    product<false>(x.count, lanes, c.Dv, x.go, Dv, head.vt + number * c.Dv * LN, LN, x.w, LN);
    if (some == 2 && width % VL == 0) weigh<true>(c, x, width, (int32_t)first); else weigh<false>(c, x, width, (int32_t)first);
    product_of_columns<true>(width, Dv, x.count, x.w, LN, x.go, Dv, head.dv + first * Dv, Dv);
    product_of_columns<true>(width, D, x.count, x.s, LN, x.q, D, head.dk + first * D, D);
    product<true>(x.count, D, width, x.s, LN, head.k + first * D, D, x.dq, D);
}

// A block of query rows against every tile that they can reach.
static void block_of(const Call& c, Block& x, const Head& head) {
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), all = (c.M + BN - 1) / BN;
    const int32_t i0 = (int32_t)(x.first + c.shift), i1 = i0 + (int32_t)x.count - 1;
    for (int64_t r = 0; r < x.count; r++) {
        copy(row(c.q, x.b, x.h, x.first + r), c.q.d, c.D, D, x.q + r * D);
        copy(row(c.go, x.b, x.h, x.first + r), c.go.d, c.Dv, Dv, x.go + r * Dv);
    }
    memset(x.dq, 0, sizeof(float) * x.count * D);
    if (c.list) {
        const int32_t* listed = c.list + x.b * c.list_b + x.h * c.list_h + x.first / BM * c.list_q;
        for (int64_t n = 0; n < c.listed; n++) {
            bool again = false;
            for (int64_t before = 0; before < n; before++) again |= listed[before] == listed[n];
            if (!again && listed[n] >= 0 && listed[n] < all) tile(c, x, head, listed[n], i0, i1);
        }
    } else {
        int64_t low = 0, high = all;
        if (AHEAD != INT64_MAX) high = i1 + AHEAD < 0 ? 0 : smaller<int64_t>(high, (i1 + AHEAD) / BN + 1);
        if (BACK != INT64_MAX) low = i0 - BACK > 0 ? (i0 - BACK) / BN : 0;
        const int64_t sinks = smaller<int64_t>(smaller(low, high), rounded(SINKS, BN) / BN);
        for (int64_t n = 0; n < sinks; n++) tile(c, x, head, n, i0, i1);
        for (int64_t n = low; n < high; n++) tile(c, x, head, n, i0, i1);
    }
    for (int64_t r = 0; r < x.count; r++) {
        float* to = row(c.dq, x.b, x.h, x.first + r);
        for (int64_t d = 0; d < c.D; d++) to[d] = x.dq[r * D + d];
    }
}

extern "C" void run(const Call* call) {
    const Call& c = *call;
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), tiles = (c.M + BN - 1) / BN, keys = tiles * BN;
    const int64_t heads = c.B * c.Hk, group = c.H / c.Hk, blocks = (c.N + BM - 1) / BM;
    const int64_t shares = heads >= c.threads ? 1 : smaller<int64_t>((c.threads + heads - 1) / heads, larger<int64_t>(blocks, 1));
    const int64_t wide = tiles * LN;  // keys with the room that whole vectors take in each tile
    Workspace packed(heads * (wide * (c.D + c.Dv) + keys * D)), sums(heads * shares * keys * (D + Dv));
    memset(sums.data, 0, sizeof(float) * heads * shares * keys * (D + Dv));
    const auto head = [&](int64_t n, int64_t share) {
        float *at = packed.data + n * (wide * (c.D + c.Dv) + keys * D), *own = sums.data + (n * shares + share) * keys * (D + Dv);
        return Head{at, at + wide * c.D, at + wide * (c.D + c.Dv), own, own + keys * D};
    };
#pragma omp parallel num_threads(c.threads)
    {
        const NoSubnormals flushing;
        Workspace own(BM * (D + Dv + LN + LN + D));
        Block x;
        x.q = own.data, x.go = x.q + BM * D, x.s = x.go + BM * Dv, x.w = x.s + BM * LN, x.dq = x.w + BM * LN;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * tiles; n++) pack(c, n / tiles / c.Hk, n / tiles % c.Hk, n % tiles, head(n / tiles, 0));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * shares; task++) {
            const int64_t n = task / shares, share = task % shares;
            const Head mine = head(n, share);
            for (int64_t g = 0; g < group; g++)
                for (int64_t which = share; which < blocks; which += shares) {
                    x.b = n / c.Hk, x.h = n % c.Hk * group + g, x.first = which * BM;
                    x.count = smaller<int64_t>(BM, c.N - x.first);
                    block_of(c, x, mine);
                }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * c.M; n++) {
            const int64_t at = n % c.M, b = n / c.M / c.Hk, h = n / c.M % c.Hk;
            float *dk = row(c.dk, b, h, at), *dv = row(c.dv, b, h, at);
            for (int64_t d = 0; d < c.D; d++) { float x = 0; for (int64_t s = 0; s < shares; s++) x += head(n / c.M, s).dk[at * D + d]; dk[d] = x; }
            for (int64_t d = 0; d < c.Dv; d++) { float x = 0; for (int64_t s = 0; s < shares; s++) x += head(n / c.M, s).dv[at * Dv + d]; dv[d] = x; }
        }
    }
}
