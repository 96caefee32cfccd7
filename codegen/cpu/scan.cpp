// A causal `scan` on a processor: T rows at a time, a state between them that stays in the first cache.
//
//   B, H, N, D, Dv   batch, heads, rows, size of a key, of a value      S (D x W)   the state: W columns of all Dv
//   T                rows of a chunk       z (D)   the state of the normaliser: as a column of ones beside the values
//   o_t = sum_{s <= t} (q_t . k_s) (product of the decays in (s, t]) v_s  +  q_t (product in [0, t]) S_before
//
// In front of this text stand T, DECAYS, CHANNELS (a decay for every d), LOGS, SUM, EPS, BEFORE (row t is read before its own
// update), and feature_q(x), feature_k(x). HALVES: q, k, v, o are bfloat16; everything is worked on in float32.

#ifdef HALVES
typedef half cell;
#else
typedef float cell;
#endif
template <class T> struct Of { T* data; int64_t b, h, n, d; };  // strides in elements
typedef Of<cell> Rows;
struct Call {
    Rows q, k, v, o;
    Of<float> decay, start;                  // no data where there is none
    int64_t B, H, group, N, D, Dv, threads;  // group: query heads of one key head
    const int32_t* document; int64_t document_b;
    const int32_t* valid; int64_t valid_b;
    float *state, *norm;                     // (B, H, D, Dv + SUM), (B, H, N), or null
};

// What one thread works on. A row of q has what it sees of the chunk's rows behind it, the state has their values behind it: one
// product of both is the output. D: up to a whole number of vectors, W: the columns of the values, L: from one row of q to the next.
struct Chunk {
    int64_t b, h, column, width, D, W, L;
    float *S, *v, *z, *q, *k, *kt, *o;
    float factor[T], norm[T];
};

template <class X> INLINE X* row(const Of<X>& x, int64_t b, int64_t h, int64_t n) { return x.data + b * x.b + h * x.h + n * x.n; }
INLINE bool counts(const Call& c, int64_t b, int64_t n) { return !c.valid || c.valid[b * c.valid_b + n]; }
INLINE float factor(const Call& c, int64_t b, int64_t h, int64_t n, int64_t d) {
    if (!DECAYS || !counts(c, b, n)) return 1.f;
    const float x = row(c.decay, b, h, n)[d * c.decay.d];
    return LOGS ? expf(x) : x;
}

// `count` numbers with a feature, and zeros up to a whole number of vectors.
template <class F> INLINE void take(const cell* from, int64_t stride, int64_t count, float* to, F feature) {
    int64_t d = 0;
    if (stride == 1) for (; d + VL <= count; d += VL) store(to + d, feature(load(from + d)));
    for (; d < count; d += VL) {
        cell line[VL] = {};
        for (int64_t l = 0; l < VL && d + l < count; l++) line[l] = from[(d + l) * stride];
        store(to + d, select(::count() < (int32_t)(count - d), feature(load(line)), vf{}));
    }
}

// Rows of q, k and v; rows that do not count, and those past the end, have no key.
static void read(const Call& c, Chunk& x, int64_t first, int64_t count) {
    const auto as_it_is = [](vf y) { return y; };
    const auto feature_of_q = [](vf y) { return feature_q(y); };
    const auto feature_of_k = [](vf y) { return feature_k(y); };
    for (int64_t t = 0; t < count; t++) {
        take(row(c.q, x.b, x.h, first + t), c.q.d, c.D, x.q + t * x.L, feature_of_q);
        if (counts(c, x.b, first + t)) take(row(c.k, x.b, x.h / c.group, first + t), c.k.d, c.D, x.k + t * x.D, feature_of_k);
        else memset(x.k + t * x.D, 0, sizeof(float) * x.D);
        take(row(c.v, x.b, x.h / c.group, first + t) + x.column * c.v.d, c.v.d, x.width, x.v + t * x.W, as_it_is);
        x.factor[t] = CHANNELS ? 1.f : factor(c, x.b, x.h, first + t, 0);
    }
    if (count < T) memset(x.k + count * x.D, 0, sizeof(float) * (T - count) * x.D);
}

// Products q . k of row t become what it sees of each row: the decays in (s, t], or in (s, t - 1], and nothing later. Their sum in lanes.
INLINE vf see(const Chunk& x, float* p, int64_t t) {
    float seen[T], between = 1.f;
    seen[t] = 1.f;
    for (int64_t s = t - 1; DECAYS && s >= 0; s--) {
        if (!BEFORE || s + 1 < t) between *= x.factor[s + 1];
        seen[s] = between;
    }
    vf sum{};
    for (int64_t s = 0; s < T; s += VL) {
        const vf y = DECAYS ? load(p + s) * load(seen + s) : load(p + s);
        const vf kept = select(count() + (int32_t)s < (int32_t)(t + !BEFORE), y, vf{});
        store(p + s, kept);
        sum += kept;
    }
    return sum;
}

// One chunk under one decay a row (or none).
static void step(const Call& c, Chunk& x, int64_t count) {
    for (int64_t t = 0; t < T; t += VL) for (int64_t d = 0; d < x.D; d += VL) transpose(x.k + t * x.D + d, x.D, x.kt + d * T + t, T);
    product<false>(count, T, x.D, x.q, x.L, x.kt, T, x.q + x.D, x.L);
    float since = 1.f;  // the product of the decays in [0, t]
    for (int64_t t = 0; t < count; t++) {
        float* q = x.q + t * x.L;
        vf norm = see(x, q + x.D, t);
        const float carried = BEFORE ? since : since * x.factor[t];
        if (DECAYS) for (int64_t d = 0; d < x.D; d += VL) store(q + d, load(q + d) * carried);
        if (SUM) for (int64_t d = 0; d < x.D; d += VL) norm += load(q + d) * load(x.z + d);
        if (SUM) x.norm[t] = total(norm);
        since *= x.factor[t];
    }
    product<false>(count, x.W, x.D + count, x.q, x.L, x.S, x.W, x.o, x.W);
    float left[T];  // the decays behind each row
    left[count - 1] = 1.f;
    for (int64_t t = count - 2; t >= 0; t--) left[t] = left[t + 1] * x.factor[t + 1];
    if (DECAYS) {
        for (int64_t t = 0; t < count; t++) for (int64_t d = 0; d < x.D; d += VL) store(x.k + t * x.D + d, load(x.k + t * x.D + d) * left[t]);
        for (int64_t n = 0; n < c.D * x.W; n += VL) store(x.S + n, load(x.S + n) * since);
    }
    if (SUM)
        for (int64_t d = 0; d < x.D; d += VL) {
            vf sum = load(x.z + d) * since;
            for (int64_t t = 0; t < count; t++) sum += load(x.k + t * x.D + d);
            store(x.z + d, sum);
        }
    product_of_columns<true>(c.D, x.W, count, x.k, x.D, x.v, x.W, x.S, x.W);
}

// The same under a decay for every channel, row by row.
static void walk(const Call& c, Chunk& x, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        float* o = x.o + t * x.W;
        const float* v = x.v + t * x.W;
        float norm = 0.f;
        memset(o, 0, sizeof(float) * x.W);
        for (int64_t d = 0; d < c.D; d++) {
            const float a = factor(c, x.b, x.h, first + t, d), q = x.q[t * x.L + d], k = x.k[t * x.D + d];
            float* S = x.S + d * x.W;
            for (int64_t w = 0; w < x.W; w += VL) {
                const vf before = load(S + w), after = before * a + k * load(v + w);
                store(o + w, load(o + w) + q * (BEFORE ? before : after));
                store(S + w, after);
            }
            const float z = x.z[d];
            x.z[d] = z * a + k;
            norm += q * (BEFORE ? z : x.z[d]);
        }
        x.norm[t] = norm;
    }
}

static void write(const Call& c, const Chunk& x, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        const float norm = SUM ? x.norm[t] + EPS : 1.f, share = SUM && norm != 0.f ? 1.f / norm : 1.f;
        cell *o = row(c.o, x.b, x.h, first + t) + x.column, line[VL];
        for (int64_t w = 0; w < x.width; w += VL) {
            const int64_t some = smaller<int64_t>(VL, x.width - w);
            const vf y = SUM ? load(x.o + t * x.W + w) * share : load(x.o + t * x.W + w);
            store(some == VL ? o + w : line, y);
            if (some < VL) memcpy(o + w, line, sizeof(cell) * some);
        }
        if (c.norm && x.column == 0) c.norm[(x.b * c.H + x.h) * c.N + first + t] = norm;
    }
}

static void begin(const Call& c, Chunk& x) {
    memset(x.S, 0, sizeof(float) * x.D * x.W);
    memset(x.z, 0, sizeof(float) * x.D);
    if (!c.start.data) return;
    for (int64_t d = 0; d < c.D; d++) {
        const float* from = row(c.start, x.b, x.h, d);
        for (int64_t w = 0; w < x.width; w++) x.S[d * x.W + w] = from[(x.column + w) * c.start.d];
        if (SUM) x.z[d] = from[c.Dv * c.start.d];
    }
}

static void keep(const Call& c, const Chunk& x) {
    for (int64_t d = 0; d < c.D; d++) {
        float* to = c.state + ((x.b * c.H + x.h) * c.D + d) * (c.Dv + SUM);
        for (int64_t w = 0; w < x.width; w++) to[x.column + w] = x.S[d * x.W + w];
        if (SUM && x.column == 0) to[c.Dv] = x.z[d];
    }
}

// How many rows from `first` on belong to one chunk: up to T, and no further than the document.
static int64_t together(const Call& c, int64_t b, int64_t first) {
    int64_t count = 1;
    const int32_t* id = c.document ? c.document + b * c.document_b + first : nullptr;
    while (count < T && first + count < c.N && (!id || id[count] == id[0])) count++;
    return count;
}

extern "C" void run(const Call* call) {
    const Call& c = *call;
    const int64_t D = rounded(c.D, VL), heads = c.B * c.H, all = rounded(c.Dv, VL);
    const int64_t splits = heads >= 2 * c.threads ? 1 : smaller<int64_t>((2 * c.threads + heads - 1) / heads, (all + NR * VL - 1) / (NR * VL));
    const int64_t width = rounded((c.Dv + splits - 1) / splits, VL), parts = (c.Dv + width - 1) / width;
#pragma omp parallel num_threads(c.threads)
    {
        const NoSubnormals flushing;
        Workspace own((D + T) * width + D + T * (D + T) + T * D + D * T + T * width);
        Chunk x;
        x.D = D, x.W = width, x.L = D + T;
        x.S = own.data, x.v = x.S + D * width, x.z = x.v + T * width, x.q = x.z + D, x.k = x.q + T * x.L;
        x.kt = x.k + T * D, x.o = x.kt + D * T;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * parts; task++) {
            x.b = task / parts / c.H, x.h = task / parts % c.H, x.column = task % parts * width;
            x.width = smaller<int64_t>(width, c.Dv - x.column);
            begin(c, x);
            for (int64_t first = 0, count; first < c.N; first += count) {
                count = together(c, x.b, first);
                if (first && c.document && c.document[x.b * c.document_b + first] != c.document[x.b * c.document_b + first - 1])
                    memset(x.S, 0, sizeof(float) * c.D * width), memset(x.z, 0, sizeof(float) * c.D);
                read(c, x, first, count);
                if (CHANNELS) walk(c, x, first, count); else step(c, x, count);
                write(c, x, first, count);
            }
            if (c.state) keep(c, x);
        }
    }
}
