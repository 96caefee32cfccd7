// A linear layer over stored weights as a call, and its codes as numbers, without what a processor may lack.
//
//   M, K, N   rows, inputs, outputs     CODES   how weights are stored: BYTES (c s), NIBBLES (c s - z), NESTED ((c t - z) s)

enum { BYTES, NIBBLES, NESTED };
enum { FLOAT, HALF };

struct Call {
    const float* x; const uint8_t* codes; const void *scale, *step, *zero; const float* bias; float* y;
    int64_t M, K, N, row, groups, bias_type, threads;
};

typedef uint8_t packed __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(VL), aligned(1), may_alias));

// Conversions that a compiler would take apart.
#ifdef __AVX512F__
INLINE vi whole(packed x) { vi y; asm("vpmovzxbd %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE vi whole(bytes x) { vi y; asm("vpmovsxbd %1, %0" : "=v"(y) : "v"(x)); return y; }
#elif defined(__AVX2__)
INLINE vi whole(const packed& x) { vi y; asm("vpmovzxbd %1, %0" : "=x"(y) : "m"(x)); return y; }
INLINE vi whole(const bytes& x) { vi y; asm("vpmovsxbd %1, %0" : "=x"(y) : "m"(x)); return y; }
#else
INLINE vi whole(packed x) { return __builtin_convertvector(x, vi); }
INLINE vi whole(bytes x) { return __builtin_convertvector(x, vi); }
#endif
INLINE float of_half(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, rest = h & 1023;
    if (exponent == 0) return (sign ? -1.f : 1.f) * rest * 0x1p-24f;
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | rest << 13;
    float x; memcpy(&x, &bits, 4); return x;
}
INLINE float factor(const void* from, int64_t at) { return SCALES == HALF ? of_half(((const uint16_t*)from)[at]) : ((const float*)from)[at]; }
