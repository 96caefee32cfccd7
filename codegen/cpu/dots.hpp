// Products of bfloat16 by a processor's own instruction for them: pairs of numbers in each of sixteen columns at a time.
//
//   A (M x K) lies in rows, C (M x N) in rows of float32; B (K x N) in panels of 16 columns, a panel in pairs of rows,
//   both numbers of a column side by side: as units.hpp has them

INLINE void units_begin() {}
INLINE void units_end() {}
INLINE bool units_allowed() { return true; }

INLINE vf dot(vf sum, vi a, vi b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); return sum; }
INLINE vi line_of(const void* at) { return *(const vi*)at; }

// R rows, C panels: the sums stay in registers.
template <int R, int C, bool ADD>
static inline void patch(int64_t K, const half* A, int64_t lda, const half* B, int64_t panel, float* out, int64_t ldc) {
    vf sum[R][C];
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) sum[r][c] = ADD ? load(out + r * ldc + c * VL) : vf{};
    for (int64_t k = 0; k < K; k += 2, B += 32) {
        vi row[C];
        for (int c = 0; c < C; c++) row[c] = line_of(B + c * panel);
        for (int r = 0; r < R; r++) {
            const vi a = all(*(const int32_t*)(A + r * lda + k));
            for (int c = 0; c < C; c++) sum[r][c] = dot(sum[r][c], a, row[c]);
        }
    }
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(out + r * ldc + c * VL, sum[r][c]);
}

// M, N multiples of 16, K of 2; panel: numbers from one panel of B to the next.
template <bool ADD>
static void product(int64_t M, int64_t N, int64_t K, const half* A, int64_t lda, const half* B, int64_t panel, float* out, int64_t ldc) {
    for (int64_t n = 0; n < N; n += 64)
        for (int64_t m = 0; m < M; m += 4) {
            const half *a = A + m * lda, *b = B + n / 16 * panel;
            float* c = out + m * ldc + n;
            switch (smaller<int64_t>(N - n, 64) / 16) {
                case 4: patch<4, 4, ADD>(K, a, lda, b, panel, c, ldc); break;
                case 3: patch<4, 3, ADD>(K, a, lda, b, panel, c, ldc); break;
                case 2: patch<4, 2, ADD>(K, a, lda, b, panel, c, ldc); break;
                default: patch<4, 1, ADD>(K, a, lda, b, panel, c, ldc);
            }
        }
}
