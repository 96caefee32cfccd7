// What the loops over a row call: its vectors, whole ones and the rest behind them, and the functions of steps.

struct Whole {};  // in the place of how many numbers are left
template <class T> INLINE vf take(const T* p, Whole) { return load(p); }
template <class T> INLINE vf take(const T* p, int64_t left) {
    T some[VL] = {};
    memcpy(some, p, left * sizeof(T));
    return load(some);
}
template <class T> INLINE void give(T* p, vf x, Whole) { store(p, x); }
template <class T> INLINE void give(T* p, vf x, int64_t left) {
    T some[VL];
    store(some, x);
    memcpy(p, some, left * sizeof(T));
}
INLINE void give(half* p, vh x, Whole) { *(vh*)p = x; }
INLINE void give(half* p, vh x, int64_t left) { memcpy(p, &x, left * sizeof(half)); }
INLINE vf there(vf x, Whole) { return x; }
INLINE vf there(vf x, int64_t left) { return select(count() < (int32_t)left, x, all(0.f)); }
// Four sums that take turns: one would wait for itself.
struct Sum {
    vf now = {}, next = {}, third = {}, last = {};
    MEMBER void add(vf x) { const vf done = now + x; now = next; next = third; third = last; last = done; }
    MEMBER float all_of_it() const { return total((now + next) + (third + last)); }
};
template <class F> INLINE void sweep(int64_t W, F body) {
    int64_t at = 0;
#pragma GCC unroll 4
    for (; at + VL <= W; at += VL) body(at, Whole{});
    if (at < W) body(at, W - at);
}
INLINE float number(float x) { return x; }
INLINE float number(half x) { const uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
INLINE vf of_halves(vh x) { return (vf)(wholes(x) << 16); }
INLINE vf to_half(vf x) { return of_halves(halves(x)); }

INLINE vf silu_(vf x) { return x / (1.f + exp_(-x)); }
INLINE vf root(vf x) { vf y; for (int l = 0; l < VL; l++) y[l] = __builtin_sqrtf(x[l]); return y; }
// A quotient of polynomials, 3e-7 apart at most; from 3.92 on it is 1.
INLINE vf erf_(vf x) {
    const vf y = within(x, -3.92f, 3.92f), z = y * y;
    const vf p = ((((2.03474406e-6f * z + 2.87479546e-4f) * z + 3.86831281e-3f) * z + 5.30604385e-2f) * z + 1.92763641e-1f) * z + 1.12837899f;
    const vf q = ((((3.80707461e-5f * z + 1.18811254e-3f) * z + 1.51722664e-2f) * z + 1.15084454e-1f) * z + 5.0416398e-1f) * z + 1.f;
    return within(y * p / q, -1.f, 1.f);
}
INLINE vf gelu_(vf x) { const vf half = 0.5f * x; return half * erf_(x * 0.70710678f) + half; }
INLINE vf gelu_tanh_(vf x) { return 0.5f * x * (1.f + tanh_(0.79788456f * (x + 0.044715f * x * x * x))); }

struct Call { const void** in; void** out; int64_t rows, width; const int64_t* apart; };  // of each that enters, from row to row
