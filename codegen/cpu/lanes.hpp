// Vectors of the machine's width, the functions that scores may call on them, and one block of a matrix product.
//
//   VL   floats in a vector          vf, vi   vectors of float, of int32
//   MR   rows of a block of a product          NR   vectors in a row of it

// Only C's small headers: those of the C++ library take longer to read than a kernel takes to build.

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
constexpr int VL = 16, MR = 6, NR = 4;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6, NR = 2;
#else
constexpr int VL = 4, MR = 4, NR = 2;
#endif

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));
constexpr float INF = __builtin_inff();

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))

typedef uint16_t half;  // a bfloat16: the upper half of a float
typedef half vh __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf all(float x) { return x - vf{}; }
INLINE vi all(int32_t x) { return x - vi{}; }
INLINE vf load(const float* p) { return *(const vf*)p; }
INLINE vi load(const int32_t* p) { return *(const vi*)p; }
INLINE void store(float* p, vf x) { *(vf*)p = x; }
INLINE void store(int32_t* p, vi x) { *(vi*)p = x; }
INLINE vi wholes(vh x) { return __builtin_convertvector(x, vi); }
INLINE vf load(const half* p) { return (vf)(wholes(*(const vh*)p) << 16); }
INLINE vi count() { vi x; for (int l = 0; l < VL; l++) x[l] = l; return x; }
INLINE vf floats(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi ints(vf x) { return __builtin_convertvector(x, vi); }
INLINE vf select(vi m, vf a, vf b) { return m ? a : b; }
INLINE vi select(vi m, vi a, vi b) { return m ? a : b; }
#ifdef __AVX512BF16__
INLINE vh halves(vf x) { vh y; asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x)); return y; }
#else
INLINE vh halves(vf x) {  // to the nearest, ties to even; what is not a number stays none
    const vi bits = (vi)x, round = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector(select(x == x, round >> 16, all(0x7fc0)), vh);
}
#endif
INLINE void store(half* p, vf x) { *(vh*)p = halves(x); }
#ifdef __AVX512F__  // in the middle of other code the compiler makes two instructions of each
INLINE vf least(vf a, vf b) { vf y; asm("vminps %2, %1, %0" : "=v"(y) : "v"(a), "v"(b)); return y; }
INLINE vf most(vf a, vf b) { vf y; asm("vmaxps %2, %1, %0" : "=v"(y) : "v"(a), "v"(b)); return y; }
#else
INLINE vf least(vf a, vf b) { return a < b ? a : b; }  // where one is no number: the second
INLINE vf most(vf a, vf b) { return a > b ? a : b; }
#endif
INLINE vf within(vf x, float low, float high) { return most(all(low), least(all(high), x)); }  // what is no number stays none
INLINE vf lasting(vf x, vf y) { return select(x == x, y, x); }  // what is no number stays none: y may have lost it
INLINE vf minimum_(vf a, vf b) { return lasting(a, least(a, b)); }
INLINE vf maximum_(vf a, vf b) { return lasting(a, most(a, b)); }
INLINE vi least(vi a, vi b) { return select(a < b, a, b); }
INLINE vi most(vi a, vi b) { return select(a > b, a, b); }
INLINE vi minimum_(vi a, vi b) { return least(a, b); }
INLINE vi maximum_(vi a, vi b) { return most(a, b); }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE int32_t absolute(int32_t x) { return x < 0 ? -x : x; }
INLINE vi absolute(vi x) { return select(x < 0, -x, x); }
#ifdef __clang__
template <class V> INLINE V turned(V x, int by) { V y; for (int l = 0; l < VL; l++) y[l] = x[(l + by) & (VL - 1)]; return y; }
template <class V> INLINE V backwards(V x) { V y; for (int l = 0; l < VL; l++) y[l] = x[VL - 1 - l]; return y; }
#else
template <class V> INLINE V turned(V x, int by) { return __builtin_shuffle(x, (count() + by) & (VL - 1)); }
template <class V> INLINE V backwards(V x) { return __builtin_shuffle(x, VL - 1 - count()); }
#endif
// Every number BY lanes further down, 0 from above.
#ifdef __clang__
template <int BY> INLINE vf lowered(vf x) { vf y{}; for (int l = 0; l + BY < VL; l++) y[l] = x[l + BY]; return y; }
#else
template <int BY> INLINE vf lowered(vf x) { return __builtin_shuffle(x, vf{}, count() + BY); }
#endif
// In every lane the sum of those above it.
INLINE vf sums_above(vf x) {
    x = lowered<1>(x);
    x += lowered<1>(x);
    x += lowered<2>(x);
    if constexpr (VL > 4) x += lowered<4>(x);
    if constexpr (VL > 8) x += lowered<8>(x);
    return x;
}
INLINE float highest(vf x) { for (int by = VL / 2; by; by /= 2) x = most(x, turned(x, by)); return x[0]; }
INLINE int32_t total(vi x) { for (int by = VL / 2; by; by /= 2) x += turned(x, by); return x[0]; }
INLINE float total(vf x) { for (int by = VL / 2; by; by /= 2) x += turned(x, by); return x[0]; }
// VL rows of VL numbers become columns: in registers, and of memory.
INLINE void turn(vf x[VL]) {
#ifdef __clang__
    vf y[VL];
    for (int r = 0; r < VL; r++) for (int l = 0; l < VL; l++) y[l][r] = x[r][l];
    for (int r = 0; r < VL; r++) x[r] = y[r];
#else
#pragma GCC unroll 4
    for (int by = 1; by < VL; by *= 2)
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++)
            if (!(r & by)) {
                const vi odd = (count() & by) != 0, at = count();
                const vf a = x[r], b = x[r + by];
                x[r] = __builtin_shuffle(a, b, select(odd, at + (VL - by), at));
                x[r + by] = __builtin_shuffle(a, b, select(odd, at + VL, at + by));
            }
#endif
}
INLINE void transpose(const float* from, int64_t ld, float* to, int64_t ldt) {
    vf x[VL];
#pragma GCC unroll 16
    for (int r = 0; r < VL; r++) x[r] = load(from + r * ld);
    turn(x);
#pragma GCC unroll 16
    for (int r = 0; r < VL; r++) store(to + r * ldt, x[r]);
}
#ifdef __AVX512F__
INLINE bool any_above(vf x, float m) {
    uint32_t lanes;
    asm("vcmpps $30, %2, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(lanes) : "v"(x), "v"(all(m)) : "k1");
    return lanes;
}
INLINE bool same(vi a, vi b) {
    uint32_t lanes;
    asm("vpcmpeqd %2, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(lanes) : "v"(a), "v"(b) : "k1");
    return lanes == 0xffff;
}
#elif defined(__AVX2__)
INLINE bool any_above(vf x, float m) { return __builtin_ia32_movmskps256((vf)(x > all(m))); }
INLINE bool same(vi a, vi b) { return __builtin_ia32_movmskps256((vf)(a == b)) == 0xff; }
#else
INLINE bool any_above(vf x, float m) { return highest(x) > m; }
INLINE bool same(vi a, vi b) { return total((vi)(a == b)) == -VL; }
#endif

// 2 ** x for every float, 1e-7 apart at most: below -126 it is 0, from 128 on infinite.
#ifdef __AVX512F__
// Instructions that no vector type says: the nearest integer; a product with 2 to the whole number below `power`, whatever its size.
INLINE vf nearest(vf x) { vf y; asm("vrndscaleps $0, %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE vf times_power(vf x, vf power) { vf y; asm("vscalefps %2, %1, %0" : "=v"(y) : "v"(x), "v"(power)); return y; }
// x less the whole number below it; of an infinite x 0.
#ifdef __AVX512DQ__
INLINE vf above_whole(vf x) { vf y; asm("vreduceps $1, %1, %0" : "=v"(y) : "v"(x)); return y; }
#else
INLINE vf above_whole(vf x) { vf y; asm("vrndscaleps $1, %1, %0" : "=v"(y) : "v"(x)); return select(absolute(x) < INF, x - y, vf{}); }
#endif
INLINE vf exp2_fine(vf x) {
    const vf f = above_whole(x);  // in [0, 1)
    vf p = all(2.161291505e-4f);
    p = p * f + 1.246784641e-3f;
    p = p * f + 9.675451571e-3f;
    p = p * f + 5.548528062e-2f;
    p = p * f + 2.402293056e-1f;
    p = p * f + 6.931470444e-1f;
    p = p * f + 1.f;
    return times_power(p, x);
}
#ifdef HALVES  // 1e-4 apart: what becomes of it has eight bits
INLINE vf exp2_(vf x) {
    const vf f = above_whole(x);
    vf p = all(7.802452118e-2f);
    p = p * f + 2.260671575e-1f;
    p = p * f + 6.958335398e-1f;
    p = p * f + 9.999252186e-1f;
    return times_power(p, x);
}
#else
INLINE vf exp2_(vf x) { return exp2_fine(x); }
#endif
INLINE vf exp2_below(vf x) { return exp2_(x); }
#else
INLINE vf power_of_2(vf x) {  // within [-127, 128): below -126 there is nothing left of it
    const vf whole = (x + 12582912.f) - 12582912.f;  // the nearest integer, by where a float's last bit stands
    const vf f = x - whole;                         // in [-1/2, 1/2]
    vf p = all(1.5337577e-4f);
    p = p * f + 1.3399860e-3f;
    p = p * f + 9.6185198e-3f;
    p = p * f + 5.5503290e-2f;
    p = p * f + 2.4022646e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    return (vf)((vi)p + (ints(whole) << 23));
}
// For what is known to be below 127, in fewer steps, as weights against a score among the highest are.
INLINE vf exp2_below(vf x) { return power_of_2(most(all(-127.f), x)); }
INLINE vf exp2_(vf x) {
    const vf scaled = power_of_2(within(x, -126.f, 127.5f));
    return lasting(x, select(x < -126.f, all(0.f), select(x >= 128.f, all(INF), scaled)));
}
#endif
// Of -126 <= x <= 127, to 1e-7 whatever HALVES says; beyond no further than there.
#ifdef __AVX512F__
INLINE vf exp2_between(vf x) { return exp2_fine(within(x, -126.f, 127.f)); }
#else
INLINE vf exp2_between(vf x) { return power_of_2(within(x, -126.f, 127.f)); }
#endif
INLINE vf exp_(vf x) { return exp2_(x * 1.44269504088896341f); }
#ifdef __AVX512F__
INLINE vf about_one_over(vf x) { vf y; asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x)); return y; }  // to 14 bits
#endif
#if defined(__AVX512F__) && defined(HALVES)
INLINE vf over(vf a, vf b) { return a * about_one_over(b); }
INLINE vf sigmoid_(vf x) { return about_one_over(1.f + exp_(-x)); }
#elif defined(__AVX512F__)
INLINE vf over(vf a, vf b) { const vf y = about_one_over(b); return a * (y * (2.f - b * y)); }  // b far from 0 and infinity
INLINE vf sigmoid_(vf x) { return 1.f / (1.f + exp_(-x)); }
#else
INLINE vf over(vf a, vf b) { return a / b; }
// Up to 2 ** 127.5, which 1 is too small for to leave a whole float.
INLINE vf sigmoid_(vf x) { return 1.f / (1.f + power_of_2(within(-1.44269504f * x, -127.f, 127.5f))); }
#endif
INLINE vf relu_(vf x) { return select(x < 0.f, all(0.f), x); }
// A quotient of polynomials, 3e-7 apart at most relative to the value; from 9 on it is 1. For eight bits a shorter one, 5e-5 apart.
INLINE vf tanh_(vf x) {
#ifdef HALVES
    const vf y = within(x, -5.f, 5.f), z = y * y;
    const vf p = (6.7056627e-4f * z + 1.0241771e-1f) * z + 9.9994805e-1f;
    const vf q = (1.2819895e-2f * z + 4.3543251e-1f) * z + 1.f;
#else
    const vf y = within(x, -9.f, 9.f), z = y * y;
    const vf p = (((1.33546400e-8f * z + 2.06091208e-5f) * z + 3.49559309e-3f) * z + 1.33810312e-1f) * z + 1.f;
    const vf q = (((7.77656510e-7f * z + 3.28564085e-4f) * z + 2.58770026e-2f) * z + 4.67143476e-1f) * z + 1.f;
#endif
    return over(y * p, q);
}
#define LANEWISE(name, call) INLINE vf name(vf x) { vf y; for (int l = 0; l < VL; l++) y[l] = call(x[l]); return y; }
LANEWISE(sin_, sinf)
LANEWISE(cos_, cosf)
LANEWISE(sqrt_, sqrtf)
LANEWISE(floor_, floorf)
// log(1 + m) for m in [1/sqrt(2) - 1, sqrt(2) - 1], 1e-7 apart at most relative to the value.
INLINE vf log_near_1(vf m) {
    const vf z = m * m;
    vf p = all(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m + (p * m * z - 0.5f * z);
}
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
INLINE vf log_(vf x) {  // of 0 and of what is too small for a whole float: -inf
    const vi bits = (vi)x;
    const vf half = (vf)((bits & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
    const vi low = half < 0.70710678f;
    const vf e = floats((bits >> 23) - 126 - (low & 1)), m = select(low, half + half, half) - 1.f;
    const vf y = (log_near_1(m) + e * LN2_LOW) + e * LN2_HIGH;
    const vf outside = select(x < 0.f, all(__builtin_nanf("")), all(-INF));
    return lasting(x, select(x >= 1.17549435e-38f, select(x == INF, x, y), outside));
}
// log2(1 + t) for t in [0, 1], 2e-7 apart at most relative to the value.
INLINE vf log2_above_1(vf t) {
    vf p = all(7.395402138e-3f);
    p = p * t - 4.194500893e-2f;
    p = p * t + 1.118320739e-1f;
    p = p * t - 1.962389519e-1f;
    p = p * t + 2.752212123e-1f;
    p = p * t - 3.582990696e-1f;
    p = p * t + 4.806788896e-1f;
    p = p * t - 7.213395131e-1f;
    p = p * t + 1.442694992f;
    return p * t;
}
INLINE vf softplus_(vf x) { return relu_(x) + 0.69314718f * log2_above_1(exp2_below(-1.44269504f * absolute(x))); }
INLINE vf elu_(vf x) { return select(x > 0.f, x, exp_(x) - 1.f); }
INLINE vf pow_(vf x, vf y) { vf z; for (int l = 0; l < VL; l++) z[l] = powf(x[l], y[l]); return z; }
// Python's // and %, which round down.
INLINE int32_t floordiv(int32_t a, int32_t b) { const int32_t q = a / b; return q - (a % b != 0 && (a < 0) != (b < 0)); }
INLINE int32_t mod(int32_t a, int32_t b) { return a - floordiv(a, b) * b; }
INLINE vi floordiv(vi a, vi b) { const vi q = a / b; return q + ((q * b != a) & ((a < 0) ^ (b < 0))); }
INLINE vi mod(vi a, vi b) { return a - floordiv(a, b) * b; }
INLINE vf floordiv(vf a, vf b) { return floor_(a / b); }
INLINE vf mod(vf a, vf b) { return a - floordiv(a, b) * b; }

// C (R x NR VL) {=, +=} A (R x K) B (K x NR VL): the accumulators stay in registers; A has a stride of rows and of columns.
template <int R, int C, bool ADD>
INLINE void block(int64_t K, const float* A, int64_t down, int64_t along, const float* B, int64_t ldb, float* out, int64_t ldc) {
    vf sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = ADD ? load(out + r * ldc + c * VL) : vf{};
    for (int64_t k = 0; k < K; k++) {
        vf row[C];
        for (int c = 0; c < C; c++) row[c] = load(B + k * ldb + c * VL);
        for (int r = 0; r < R; r++) {
            const float a = A[r * down + k * along];
            for (int c = 0; c < C; c++) sum[r][c] += a * row[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * ldc + c * VL, sum[r][c]);
}

template <int C, bool ADD>
INLINE void rows(int64_t M, int64_t K, const float* A, int64_t down, int64_t along, const float* B, int64_t ldb, float* out, int64_t ldc) {
    int64_t r = 0;
    for (; r + MR <= M; r += MR) block<MR, C, ADD>(K, A + r * down, down, along, B, ldb, out + r * ldc, ldc);
    if (r + 4 <= M) block<4, C, ADD>(K, A + r * down, down, along, B, ldb, out + r * ldc, ldc), r += 4;
    for (; r < M; r++) block<1, C, ADD>(K, A + r * down, down, along, B, ldb, out + r * ldc, ldc);
}

// The same for any number of rows, and N a multiple of VL.
template <bool ADD>
INLINE void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t down, int64_t along, const float* B, int64_t ldb, float* out, int64_t ldc) {
    int64_t n = 0;
    for (; n + NR * VL <= N; n += NR * VL) rows<NR, ADD>(M, K, A, down, along, B + n, ldb, out + n, ldc);
    for (; n < N; n += VL) rows<1, ADD>(M, K, A, down, along, B + n, ldb, out + n, ldc);
}
template <bool ADD>  // A in rows
static void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldc) {
    product<ADD>(M, N, K, A, lda, 1, B, ldb, out, ldc);
}
template <bool ADD>  // A in columns: its transpose lies in rows
static void product_of_columns(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldc) {
    product<ADD>(M, N, K, A, 1, lda, B, ldb, out, ldc);
}

// While it lives, this thread's results that are too small for a float are 0: made, they would cost a hundred times as much.
struct NoSubnormals {
#ifdef __SSE__
    uint32_t before;
    NoSubnormals() {
        asm volatile("stmxcsr %0" : "=m"(before));
        const uint32_t flushing = before | 0x8040;
        asm volatile("ldmxcsr %0" ::"m"(flushing));
    }
    ~NoSubnormals() { asm volatile("ldmxcsr %0" ::"m"(before)); }
#endif
};

// Memory of one thread, kept between tasks.
struct Workspace {
    float* data;
    explicit Workspace(int64_t floats) : data((float*)aligned_alloc(64, (floats * 4 + 63) / 64 * 64)) {}
    ~Workspace() { free(data); }
};
// A sum of many small numbers, kept as two: what rounding takes from the first is in the second.
INLINE void add_to(float& sum, float& rest, float x) {
    const float more = x + rest, total = sum + more;
    rest = more - (total - sum), sum = total;
}
template <class T> INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T larger(T a, T b) { return a > b ? a : b; }
INLINE int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
