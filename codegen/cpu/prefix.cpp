// A `prefix` on a processor: rows one after another, what they have combined to so far in the first cache.
//
//   B, H, N, D   batch, heads, rows, channels        WIDE   channels that one task walks along the rows
//   x            the rows, of a softmax the values   a      their factors, of a softmax the logits
//   y            what the rows so far combine to, in double: sums of many rows keep what a float would lose
//   m, l         of a softmax: the highest logit so far, the sum of weights against it
//
// In front of this text stands MONOID: SUM, MAX, AFFINE or SOFTMAX. Rows in reverse are rows with a negative stride.

typedef double vd __attribute__((vector_size(VL * 8), aligned(8), may_alias));
constexpr int64_t WIDE = 256;

struct Rows { float* data; int64_t b, h, n, d; };  // strides in elements
struct Call {
    Rows x, a, o, lse;
    int64_t B, H, N, D, threads;
    const int32_t* document; int64_t document_b, document_n;  // null where all rows are of one
};
// The channels that a task walks, and for VL rows at a time of a softmax: what earlier weights become, and the row's own.
struct Walk {
    int64_t b, h, column, width;
    double y[WIDE], l;
    float m, less[VL], own[VL], top[VL];
};

INLINE float* row(const Rows& x, const Walk& w, int64_t n) { return x.data + w.b * x.b + w.h * x.h + n * x.n; }
INLINE vd load(const double* p) { return *(const vd*)p; }
INLINE void store(double* p, vd x) { *(vd*)p = x; }
INLINE vd doubles(vf x) { return __builtin_convertvector(x, vd); }
INLINE vf singles(vd x) { return __builtin_convertvector(x, vf); }

// Numbers from d on, up to VL of them; one for all channels where they have no stride.
INLINE vf take(const float* from, int64_t stride, int64_t d, int64_t count) {
    if (stride == 1 && count >= VL) return load(from + d);
    if (stride == 0) return all(*from);
    float line[VL] = {};
    for (int64_t l = 0; l < smaller<int64_t>(VL, count); l++) line[l] = from[(d + l) * stride];
    return load(line);
}

INLINE void put(float* to, int64_t count, vf x) {
    float line[VL];
    store(count >= VL ? to : line, x);
    if (count < VL) memcpy(to, line, sizeof(float) * count);
}

// Whether a row knows nothing of those before it.
INLINE bool begins(const Call& c, int64_t b, int64_t n) {
    if (n == 0 || !c.document) return n == 0;
    const int32_t* id = c.document + b * c.document_b + n * c.document_n;
    return id[0] != id[-c.document_n];
}

// Weights of up to VL rows, each against the highest logit of those up to it: none is above 1, and none is lost to a later one.
static void weigh(const Call& c, Walk& w, int64_t first, int64_t count) {
    float logit[VL] = {}, before[VL] = {};
    for (int64_t t = 0; t < count; t++) {
        if (begins(c, w.b, first + t)) w.m = -INF;
        logit[t] = *row(c.a, w, first + t), before[t] = w.m;
        if (logit[t] > w.m) w.m = logit[t];
        w.top[t] = w.m == -INF || w.m == INF ? 0.f : w.m;
    }
    for (int64_t t = count; t < VL; t++) w.top[t] = 0.f;
    store(w.less, exp_(load(before) - load(w.top)));
    store(w.own, exp_(load(logit) - load(w.top)));
}

INLINE void step(const Call& c, Walk& w, int64_t n, bool fresh) {
    const float *x = row(c.x, w, n) + w.column * c.x.d, *a = MONOID == AFFINE ? row(c.a, w, n) + w.column * c.a.d : nullptr;
    float* o = row(c.o, w, n) + w.column;
    const float own = MONOID == SOFTMAX ? w.own[n % VL] : 1.f, less = MONOID == SOFTMAX ? w.less[n % VL] : 1.f;
    if (MONOID == SOFTMAX) w.l = (fresh ? 0. : w.l * less) + own;
    const double share = MONOID == SOFTMAX && w.l > 0. ? 1. / w.l : 1.;
    for (int64_t d = 0; d < w.width; d += VL) {
        const int64_t left = w.width - d;
        const vd late = doubles(take(x, c.x.d, d, left)), early = load(w.y + d);
        vd y = late * (double)own;
        if (!fresh) {
            if (MONOID == SUM) y = early + late;
            if (MONOID == MAX) y = early > late || early != early ? early : late;
            if (MONOID == AFFINE) y = doubles(take(a, c.a.d, d, left)) * early + late;
            if (MONOID == SOFTMAX) y = (double)less * early + y;
        }
        store(w.y + d, y);
        put(o + d, left, singles(MONOID == SOFTMAX ? y * share : y));
    }
    if (MONOID == SOFTMAX && w.column == 0)
        *row(c.lse, w, n) = w.l > 0. ? (float)(w.top[n % VL] + log(w.l)) : w.l == 0. ? -INF : (float)w.l;
}

extern "C" void run(const Call* call) {
    const Call& c = *call;
    const int64_t heads = c.B * c.H, all = rounded(c.D, VL), most = smaller<int64_t>(WIDE, all);
    const int64_t wanted = c.threads == 1 || heads >= 2 * c.threads ? 1 : (2 * c.threads + heads - 1) / heads;
    const int64_t width = larger<int64_t>(2 * VL, smaller<int64_t>(most, rounded((c.D + wanted - 1) / wanted, VL)));
    const int64_t parts = (c.D + width - 1) / width;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
    for (int64_t task = 0; task < heads * parts; task++) {
        const NoSubnormals flushing;
        Walk w{};
        w.b = task / parts / c.H, w.h = task / parts % c.H, w.column = task % parts * width;
        w.width = smaller<int64_t>(width, c.D - w.column);
        for (int64_t n = 0; n < c.N; n++) {
            if (MONOID == SOFTMAX && n % VL == 0) weigh(c, w, n, smaller<int64_t>(VL, c.N - n));
            if (begins(c, w.b, n)) step(c, w, n, true);
            else step(c, w, n, false);
        }
    }
}
