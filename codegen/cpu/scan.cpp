// A causal `scan` on a processor: T rows at a time, a state between them that stays in the first cache.
//
//   B, H, N, D, Dv   batch, heads, rows, size of a key, of a value      S (D x W)   the state: W columns of all Dv
//   T                rows of a chunk       z (D)   the state of the normaliser: as a column of ones beside the values
//   o_t = sum_{s <= t} (q_t . k_s) (product of the decays in (s, t]) v_s  +  q_t (product in [0, t]) S_before
//
// In front of this text stand T, MOST (of D), DECAYS, CHANNELS (a decay for every d), LOGS, SUM, EPS, BEFORE (row t is read before its own
// update), and feature_q(x), feature_k(x).

struct Rows { float* data; int64_t b, h, n, d; };  // strides in elements
struct Call {
    Rows q, k, v, o, decay, start;           // decay, start: no data where there is none
    int64_t B, H, group, N, D, Dv, threads;  // group: query heads of one key head
    const int32_t* document; int64_t document_b;
    const int32_t* valid; int64_t valid_b;
    float *state, *norm;                     // (B, H, D, Dv + SUM), (B, H, N), or null
};

struct Chunk {  // what one thread works on
    int64_t b, h, column, width, W;
    float *S, *z, *q, *kt, *v, *p, *o;
    float factor[T], norm[T];
};

INLINE float* row(const Rows& x, int64_t b, int64_t h, int64_t n) { return x.data + b * x.b + h * x.h + n * x.n; }
INLINE bool counts(const Call& c, int64_t b, int64_t n) { return !c.valid || c.valid[b * c.valid_b + n]; }
INLINE float factor(const Call& c, int64_t b, int64_t h, int64_t n, int64_t d) {
    if (!DECAYS || !counts(c, b, n)) return 1.f;
    const float x = row(c.decay, b, h, n)[d * c.decay.d];
    return LOGS ? expf(x) : x;
}

INLINE void copy(const float* from, int64_t stride, int64_t count, float* to) {
    if (stride == 1) memcpy(to, from, sizeof(float) * count);
    else for (int64_t d = 0; d < count; d++) to[d] = from[d * stride];
}

// Rows of q, k (transposed) and v with their features; rows that do not count, and those past the end, have no key.
static void read(const Call& c, Chunk& x, int64_t first, int64_t count) {
    const int64_t D = rounded(c.D, VL);
    float line[MOST];
    for (int64_t t = 0; t < count; t++) {
        copy(row(c.q, x.b, x.h, first + t), c.q.d, c.D, x.q + t * D);
        copy(row(c.k, x.b, x.h / c.group, first + t), c.k.d, c.D, line);
        copy(row(c.v, x.b, x.h / c.group, first + t) + x.column * c.v.d, c.v.d, x.width, x.v + t * x.W);
        for (int64_t d = x.width; d < x.W; d++) x.v[t * x.W + d] = 0.f;
        for (int64_t d = 0; d < D; d += VL) {
            store(x.q + t * D + d, feature_q(load(x.q + t * D + d)));
            store(line + d, feature_k(load(line + d)));
        }
        for (int64_t d = c.D; d < D; d++) x.q[t * D + d] = 0.f;  // a product with z, which is 0 there too, stays a number
        const bool here = counts(c, x.b, first + t);
        for (int64_t d = 0; d < c.D; d++) x.kt[d * T + t] = here ? line[d] : 0.f;
        x.factor[t] = CHANNELS ? 1.f : factor(c, x.b, x.h, first + t, 0);
    }
    if (count < T) for (int64_t d = 0; d < c.D; d++) for (int64_t t = count; t < T; t++) x.kt[d * T + t] = 0.f;
}

// Products q . k of row t become what it sees of each row: the decays in (s, t], or in (s, t - 1], and nothing later.
INLINE float see(const Chunk& x, float* p, int64_t t) {
    float seen[T], between = 1.f;
    for (int64_t s = 0; s < T; s++) seen[s] = BEFORE ? s < t : s <= t;
    if (DECAYS)
        for (int64_t s = t - 1; s >= 0; s--) {
            if (!BEFORE || s + 1 < t) between *= x.factor[s + 1];
            seen[s] = between;
        }
    vf sum{};
    for (int64_t s = 0; s < T; s += VL) {
        const vf y = load(p + s) * load(seen + s);
        store(p + s, y);
        sum += y;
    }
    return total(sum);
}

// One chunk under one decay a row (or none): two products with the state, two among the rows.
static void step(const Call& c, Chunk& x, int64_t count) {
    const int64_t D = rounded(c.D, VL);
    product<false>(count, T, c.D, x.q, D, x.kt, T, x.p, T);
    float since = 1.f;  // the product of the decays in [0, t]
    for (int64_t t = 0; t < count; t++) {
        float* q = x.q + t * D;
        x.norm[t] = see(x, x.p + t * T, t);
        const float carried = BEFORE ? since : since * x.factor[t];
        if (DECAYS) for (int64_t d = 0; d < D; d += VL) store(q + d, load(q + d) * carried);
        if (SUM) {
            vf sum{};
            for (int64_t d = 0; d < c.D; d += VL) sum += load(q + d) * load(x.z + d);  // z is 0 past D
            x.norm[t] += total(sum);
        }
        since *= x.factor[t];
    }
    product<false>(count, x.W, c.D, x.q, D, x.S, x.W, x.o, x.W);
    product<true>(count, x.W, count, x.p, T, x.v, x.W, x.o, x.W);
    float left[T] = {};  // the decays behind each row
    left[count - 1] = 1.f;
    for (int64_t t = count - 2; t >= 0; t--) left[t] = left[t + 1] * x.factor[t + 1];
    for (int64_t d = 0; d < c.D; d++) {
        vf sum{};
        for (int64_t t = 0; t < T; t += VL) {
            const vf k = DECAYS ? load(x.kt + d * T + t) * load(left + t) : load(x.kt + d * T + t);
            if (DECAYS) store(x.kt + d * T + t, k);
            sum += k;
        }
        if (DECAYS) for (int64_t w = 0; w < x.W; w += VL) store(x.S + d * x.W + w, load(x.S + d * x.W + w) * since);
        if (SUM) x.z[d] = x.z[d] * since + total(sum);
    }
    product<true>(c.D, x.W, count, x.kt, T, x.v, x.W, x.S, x.W);
}

// The same under a decay for every channel, row by row.
static void walk(const Call& c, Chunk& x, int64_t first, int64_t count) {
    const int64_t D = rounded(c.D, VL);
    for (int64_t t = 0; t < count; t++) {
        float* o = x.o + t * x.W;
        const float* v = x.v + t * x.W;
        float norm = 0.f;
        memset(o, 0, sizeof(float) * x.W);
        for (int64_t d = 0; d < c.D; d++) {
            const float a = factor(c, x.b, x.h, first + t, d), q = x.q[t * D + d], k = x.kt[d * T + t];
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
        const float norm = SUM ? x.norm[t] + EPS : 1.f, divisor = SUM && norm != 0.f ? norm : 1.f;
        float* o = row(c.o, x.b, x.h, first + t) + x.column;
        for (int64_t w = 0; w < x.width; w++) o[w] = x.o[t * x.W + w] / divisor;
        if (c.norm && x.column == 0) c.norm[(x.b * c.H + x.h) * c.N + first + t] = norm;
    }
}

static void begin(const Call& c, Chunk& x) {
    memset(x.S, 0, sizeof(float) * c.D * x.W);
    memset(x.z, 0, sizeof(float) * rounded(c.D, VL));
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
        Workspace own(c.D * width + D + T * D + c.D * T + T * width + T * T + T * width);
        Chunk x;
        x.S = own.data, x.z = x.S + c.D * width, x.q = x.z + D, x.kt = x.q + T * D;
        x.v = x.kt + c.D * T, x.p = x.v + T * width, x.o = x.p + T * T, x.W = width;
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
