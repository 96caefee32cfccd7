// A `prefix` on a processor: rows one after another, what they have combined to so far in the first cache.
//
//   B, H, N, D   batch, heads, rows, channels        WIDE   channels that one task walks along the rows
//   x            the rows, of a softmax the values   a      their factors, of a softmax the logits
//   y            what the rows so far combine to, in double: sums of many rows keep what a float would lose
//   m, l         of a softmax: the highest logit so far, the sum of weights against it
//
// In front of this text stands MONOID: SUM, MAX, AFFINE or SOFTMAX. Rows in reverse are rows with a negative stride.

constexpr int64_t WIDE = 1024, DL = VL / 2;
typedef float vs __attribute__((vector_size(DL * 4), aligned(4), may_alias));  // DL numbers, and the same in double
typedef double vd __attribute__((vector_size(DL * 8), aligned(8), may_alias));

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
INLINE vd doubles(const float* p) { return __builtin_convertvector(*(const vs*)p, vd); }
INLINE void put(float* p, vd x) { *(vs*)p = __builtin_convertvector(x, vs); }

// `width` numbers of a row that lie one behind the other: where they do, or copied.
INLINE const float* line(const float* from, int64_t stride, int64_t width, float* to) {
    if (stride == 1) return from;
    for (int64_t d = 0; d < width; d++) to[d] = from[d * stride];
    return to;
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

// What came before and a row's own number, of one channel or of several.
template <class T> INLINE T combined(T early, T late, T a, double less, double own) {
    if (MONOID == SUM) return early + late;
    if (MONOID == MAX) return early > late ? early : early == early ? late : early;
    if (MONOID == AFFINE) return a * early + late;
    return early * less + late * own;
}

// FACTOR: a row has one for all channels, or none.
template <bool FRESH, bool FACTOR> static void step(const Call& c, Walk& w, int64_t n) {
    float rows[WIDE], factors[WIDE];
    const float* x = line(row(c.x, w, n) + w.column * c.x.d, c.x.d, w.width, rows);
    const float* a = MONOID == AFFINE ? row(c.a, w, n) : x;
    if (!FACTOR) a = line(a + w.column * c.a.d, c.a.d, w.width, factors);
    float* o = row(c.o, w, n) + w.column;
    const double own = MONOID == SOFTMAX ? w.own[n % VL] : 1., less = MONOID == SOFTMAX ? w.less[n % VL] : 1.;
    if (MONOID == SOFTMAX) w.l = (FRESH ? 0. : w.l * less) + own;
    const double share = MONOID == SOFTMAX && w.l > 0. ? 1. / w.l : 1.;
    int64_t d = 0;
    for (; d + DL <= w.width; d += DL) {
        vd &y = *(vd*)(w.y + d), late = doubles(x + d);
        y = FRESH ? late * own : combined(y, late, FACTOR ? *a - vd{} : doubles(a + d), less, own);
        put(o + d, MONOID == SOFTMAX ? y * share : y);
    }
    for (; d < w.width; d++) {
        double& y = w.y[d];
        y = FRESH ? x[d] * own : combined(y, (double)x[d], (double)a[FACTOR ? 0 : d], less, own);
        o[d] = (float)(MONOID == SOFTMAX ? y * share : y);
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
            if (begins(c, w.b, n)) step<true, true>(c, w, n);
            else if (MONOID != AFFINE || c.a.d == 0) step<false, true>(c, w, n);
            else step<false, false>(c, w, n);
        }
    }
}
