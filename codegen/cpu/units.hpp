// Products of bfloat16 on a processor's matrix units: 16 x 16 sums in a register, 32 products deep.
//
//   A (M x K) lies in rows, C (M x N) in rows of float32; B (K x N) in panels of 16 columns, a panel in pairs of rows,
//   both numbers of a column side by side: 32 rows of a panel, what a register takes, are a kilobyte without a gap
//
// Where EMULATED is said, loops stand in for the instructions: what they compute can be tested on any machine.

#ifdef EMULATED
struct Unit { unsigned char bytes[16][64]; };
static thread_local Unit unit[8];
INLINE void units_begin() {}
INLINE void units_end() {}
static bool units_allowed() { return true; }
INLINE float single(const unsigned char* at) {
    half h; memcpy(&h, at, 2); const uint32_t bits = (uint32_t)h << 16; float x; memcpy(&x, &bits, 4); return x;
}
static void multiply(Unit& c, const Unit& a, const Unit& b) {
    for (int m = 0; m < 16; m++) for (int n = 0; n < 16; n++) {
        float x; memcpy(&x, c.bytes[m] + 4 * n, 4);
        for (int k = 0; k < 16; k++) for (int two = 0; two < 4; two += 2) x += single(a.bytes[m] + 4 * k + two) * single(b.bytes[k] + 4 * n + two);
        memcpy(c.bytes[m] + 4 * n, &x, 4);
    }
}
static void multiply_whole(Unit& c, const Unit& a, const Unit& b) {
    for (int m = 0; m < 16; m++) for (int n = 0; n < 16; n++) {
        int32_t x; memcpy(&x, c.bytes[m] + 4 * n, 4);
        for (int k = 0; k < 64; k++) x += (int)(signed char)a.bytes[m][k] * (signed char)b.bytes[k / 4][4 * n + k % 4];
        memcpy(c.bytes[m] + 4 * n, &x, 4);
    }
}
#define ZERO(t) memset(&unit[t], 0, sizeof(Unit))
#define LOAD(t, from, stride) for (int r = 0; r < 16; r++) memcpy(unit[t].bytes[r], (const char*)(from) + r * (stride), 64)
#define STORE(t, to, stride) for (int r = 0; r < 16; r++) memcpy((char*)(to) + r * (stride), unit[t].bytes[r], 64)
#define MULTIPLY(c, a, b) multiply(unit[c], unit[a], unit[b])
#define MULTIPLY_WHOLE(c, a, b) multiply_whole(unit[c], unit[a], unit[b])
#else
#include <sys/syscall.h>
#include <unistd.h>
struct Shape { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; };
INLINE void units_begin() {
    Shape shape = {};
    shape.palette = 1;
    for (int t = 0; t < 8; t++) shape.bytes[t] = 64, shape.rows[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shape));
}
INLINE void units_end() { asm volatile("tilerelease"); }
// The registers are given to a process on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static bool units_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#define ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define LOAD(t, from, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(stride) : "memory")
#define STORE(t, to, stride) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define MULTIPLY_WHOLE(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#endif

// R x C registers of sums: 0 1 / 2 3; rows of A in 4, 5, columns of B in 6, 7.
template <int R, int C, bool ADD>
static inline void patch(int64_t K, const half* A, int64_t lda, const half* B, int64_t panel, float* out, int64_t ldc) {
    const int64_t a = lda * 2, b = 64, c = ldc * 4;
    float* below = out + 16 * ldc;
    if constexpr (ADD) { LOAD(0, out, c); } else { ZERO(0); }
    if constexpr (C > 1) { if constexpr (ADD) { LOAD(1, out + 16, c); } else { ZERO(1); } }
    if constexpr (R > 1) { if constexpr (ADD) { LOAD(2, below, c); } else { ZERO(2); } }
    if constexpr (R > 1 && C > 1) { if constexpr (ADD) { LOAD(3, below + 16, c); } else { ZERO(3); } }
    for (int64_t k = 0; k < K; k += 32, A += 32, B += 512) {
        LOAD(4, A, a);
        LOAD(6, B, b);
        MULTIPLY(0, 4, 6);
        if constexpr (C > 1) { LOAD(7, B + panel, b); MULTIPLY(1, 4, 7); }
        if constexpr (R > 1) { LOAD(5, A + 16 * lda, a); MULTIPLY(2, 5, 6); }
        if constexpr (R > 1 && C > 1) { MULTIPLY(3, 5, 7); }
    }
    STORE(0, out, c);
    if constexpr (C > 1) { STORE(1, out + 16, c); }
    if constexpr (R > 1) { STORE(2, below, c); }
    if constexpr (R > 1 && C > 1) { STORE(3, below + 16, c); }
}

// M, N multiples of 16, K of 32; panel: numbers from one panel of B to the next.
template <bool ADD>
static void product(int64_t M, int64_t N, int64_t K, const half* A, int64_t lda, const half* B, int64_t panel, float* out, int64_t ldc) {
    for (int64_t n = 0; n < N; n += 32)
        for (int64_t m = 0; m < M; m += 32) {
            const half *a = A + m * lda, *b = B + n / 16 * panel;
            float* c = out + m * ldc + n;
            if (M - m > 16 && N - n > 16) patch<2, 2, ADD>(K, a, lda, b, panel, c, ldc);
            else if (M - m > 16) patch<2, 1, ADD>(K, a, lda, b, panel, c, ldc);
            else if (N - n > 16) patch<1, 2, ADD>(K, a, lda, b, panel, c, ldc);
            else patch<1, 1, ADD>(K, a, lda, b, panel, c, ldc);
        }
}
