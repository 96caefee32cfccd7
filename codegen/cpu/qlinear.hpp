// What a linear layer over stored weights is made of: its call, x as tiles, codes as lines, what becomes of sums.
//
//   M, K, N   rows, inputs, outputs       CODES   how weights are stored: BYTES, NIBBLES (c s - z), NESTED ((c t - z) s)
//   WHOLE     products are whole, and a row of x is DIGITS rows of whole numbers of 8 bits: one that it is rounded to, or
//             three that say it to 2**-23 of its largest, which is all that bfloat16 says of what is not much smaller;
//             else products are bfloat16, and x is the sum of PARTS of them (a float32 is three)
//
// A tile of A holds 16 outputs, 64 bytes of their inputs; one of B ROWS rows of x, turned so that four bytes of a row lie
// together. DOTS: one of two bytes that are multiplied has no sign, and it is that of the codes, 128 more than they are.

enum { BYTES, NIBBLES, NESTED };
enum { FLOAT, HALF };

struct Call {
    const void* x; const uint8_t* codes; const void *scale, *step, *zero; const void* bias; void* y;
    int64_t M, K, N, row, groups, bias_type, threads;
};

typedef uint16_t half16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t half32 __attribute__((vector_size(64), aligned(2), may_alias));
typedef int8_t byte16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t byte32 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint8_t byte64 __attribute__((vector_size(64), aligned(1), may_alias));
typedef int64_t quad4 __attribute__((vector_size(32), may_alias));
typedef int16_t word16 __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int64_t LINE = 64, TILE = 16 * LINE, SUMS = 128;  // bytes of a line of a tile, of a tile, of a row of sums
constexpr int OUTPUTS = 32, SPAN = 4;  // of a panel; panels that share what they read of x
constexpr int ROWS = 16 / DIGITS, OF_A_BYTE = CODES == BYTES ? 1 : 2;  // rows of x in a block; codes of a byte
constexpr int PER = WHOLE ? 64 : 32;  // inputs of a tile

INLINE float wide(half h) { const uint32_t bits = (uint32_t)h << 16; float x; memcpy(&x, &bits, 4); return x; }
INLINE half narrow(float x) { vf y = all(x); return halves(y)[0]; }
INLINE float of_half(uint16_t h) { float x; asm("vmovd %1, %0\n\tvcvtph2ps %0, %0" : "=x"(x) : "r"((uint32_t)h)); return x; }
INLINE uint16_t to_half(float x) { uint32_t h; asm("vcvtps2ph $0, %1, %%xmm15\n\tvmovd %%xmm15, %0" : "=r"(h) : "x"(x) : "xmm15"); return h; }
#define ONCE 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
INLINE half32 twice(half16 x) { return __builtin_shufflevector(x, x, ONCE, ONCE); }
INLINE byte32 twice(byte16 x) { return (byte32)__builtin_shufflevector(x, x, ONCE, ONCE); }
INLINE half32 looked_up(half32 table, half32 at) { half32 y; asm("vpermw %2, %1, %0" : "=v"(y) : "v"(at), "v"(table)); return y; }
INLINE byte32 looked_up(byte32 table, byte32 at) { byte32 y; asm("vpshufb %2, %1, %0" : "=v"(y) : "v"(table), "v"(at)); return y; }
// Conversions that a compiler would take apart.
INLINE half32 words(byte32 x) { half32 y; asm("vpmovzxbw %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE vi whole(byte16 x) { vi y; asm("vpmovsxbd %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE vi whole(half16 x) { vi y; asm("vpmovzxwd %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE byte16 bytes(vi x) { byte16 y; asm("vpmovdb %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE byte16 bytes(word16 x) { byte16 y; asm("vpmovwb %1, %0" : "=v"(y) : "v"(x)); return y; }
INLINE int64_t up(int64_t x, int64_t by) { return (x + by - 1) / by * by; }

// --- x ---------------------------------------------------------------------------------------------------------------

constexpr bool GROUPED = CODES == NIBBLES && DIGITS > 1;           // sums are whole within a group of inputs
constexpr bool SCALED = CODES != NIBBLES || (WHOLE && !GROUPED);  // an output has one scale, met by its sum
#ifdef DOTS
constexpr bool ABOVE = WHOLE && CODES != NIBBLES;  // codes of no sign, 128 more than they are
#else
constexpr bool ABOVE = false;
#endif
constexpr bool SUMMED = CODES == NIBBLES || ABOVE;  // sums of rows are asked for

// Tiles by block of rows, step, part, or where `lines` rows of whole numbers by step; sums of rows by block, group where
// GROUPED, and row of whole numbers.
struct Turned { unsigned char* tiles; float *scale, *sum; int64_t steps; bool lines; };

INLINE unsigned char* tile_of(const Turned& t, int64_t block, int64_t step, int part) { return t.tiles + ((block * t.steps + step) * PARTS + part) * TILE; }

INLINE int64_t sums_of(const Call& c) { return GROUPED ? c.groups : 1; }
INLINE int64_t group_of(const Call& c, int64_t step) { return sums_of(c) == 1 ? 0 : step * PER / (c.K / c.groups); }
INLINE float* sum_at(const Call& c, const Turned& t, int64_t block, int64_t group) { return t.sum + (block * sums_of(c) + group) * 16; }

INLINE vf taken(const Call& c, int64_t m, int64_t k) {
    vf x;
    if (k + VL <= c.K) {
        if constexpr (INPUT == FLOAT) return load((const float*)c.x + m * c.K + k);
        return (vf)(whole(*(const half16*)((const half*)c.x + m * c.K + k)) << 16);
    }
    for (int l = 0; l < VL; l++) {
        const int64_t at = k + l;
        x[l] = at >= c.K ? 0.f : INPUT == FLOAT ? ((const float*)c.x)[m * c.K + at] : wide(((const half*)c.x)[m * c.K + at]);
    }
    return x;
}

// Four bytes of row m for each of 16 places: one column of a tile.
INLINE void lay(const Call& c, const Turned& t, int64_t m, int64_t step, int part, const void* line, int digit = 0) {
    if (t.lines) { memcpy(t.tiles + ((step * c.M + m) * DIGITS + digit) * LINE, line, LINE); return; }
    uint32_t four[16]; memcpy(four, line, LINE);
    uint32_t* to = (uint32_t*)tile_of(t, m / ROWS, step, part) + m % ROWS * DIGITS + digit;
    for (int r = 0; r < 16; r++) to[r * 16] = four[r];
}

static void turn_whole(const Call& c, const Turned& t, int64_t m) {
    vf largest = all(0.f), none = all(0.f);
    for (int64_t k = 0; k < c.K; k += VL) { const vf x = taken(c, m, k); largest = most(largest, absolute(x)); none += x - x; }
    float s = highest(largest) / 127.f;
    if (SCALES == HALF) { if (s > 65504.f) s = 65504.f; s = of_half(to_half(s)); }
    const float scale = s == 0.f ? 1.f : s, by = 1.f / scale;
    const bool tiny = !(by < 1e38f);
    vi sum = all(0);
    for (int64_t step = 0; step < t.steps; step++) {
        int8_t line[LINE];
        for (int k = 0; k < LINE; k += VL) {
            const vf x = taken(c, m, step * LINE + k);
            vf y = x * by;
            y = tiny ? x / scale : y + (x - y * scale) * by;  // as near as a division, which takes ten times as long
            const vi rounded = ints(least(most(nearest(y), all(-127.f)), all(127.f)));
            *(byte16*)(line + k) = bytes(rounded);
            if constexpr (SUMMED) sum += rounded;
        }
        lay(c, t, m, step, 0, line);
    }
    t.scale[m] = total(none) == 0.f ? scale : __builtin_nanf("");  // rows that are no numbers stay none
    *(sum_at(c, t, m / ROWS, 0) + m % ROWS) = total(floats(sum));
}

// A power of two as scale: what is taken apart is x itself.
static void turn_digits(const Call& c, const Turned& t, int64_t m) {
    vf largest = all(0.f), none = all(0.f);
    for (int64_t k = 0; k < c.K; k += VL) { const vf x = taken(c, m, k); largest = most(largest, absolute(x)); none += x - x; }
    const float top = highest(largest);
    uint32_t bits; memcpy(&bits, &top, 4);
    const int power = (int)(bits >> 23) < 22 ? 22 : (int)(bits >> 23);  // of less, the scale would be subnormal
    const uint32_t up_bits = (uint32_t)(275 - power) << 23, down_bits = (uint32_t)(power - 21) << 23;
    float by; memcpy(&by, &up_bits, 4);
    memcpy(&t.scale[m], &down_bits, 4);
    if (total(none) != 0.f) t.scale[m] = __builtin_nanf("");
    for (int64_t step = 0; step < t.steps; step++) {
        int8_t line[DIGITS][LINE];
        vi sums[DIGITS] = {};
        for (int k = 0; k < LINE; k += VL) {
            vi left = ints(nearest(taken(c, m, step * LINE + k) * by));
            for (int digit = 0; digit < DIGITS; digit++) {
                const vi next = (left + 128) >> 8;
                *(byte16*)(line[digit] + k) = bytes(left);
                if constexpr (SUMMED) sums[digit] += left - (next << 8);
                left = next;
            }
        }
        for (int digit = 0; digit < DIGITS; digit++) {
            lay(c, t, m, step, 0, line[digit], digit);
            if constexpr (SUMMED) sum_at(c, t, m / ROWS, group_of(c, step))[m % ROWS * DIGITS + digit] += total(floats(sums[digit]));
        }
    }
}

static void turn_halves(const Call& c, const Turned& t, int64_t m) {
    for (int64_t step = 0; step < t.steps; step++) {
        half line[PARTS][32];
        for (int k = 0; k < 32; k += VL) {
            vf x = taken(c, m, step * 32 + k);
            for (int part = 0; part < PARTS; part++) {
                const half16 h = halves(x);
                *(half16*)(line[part] + k) = h;
                x -= (vf)(whole(h) << 16);
            }
        }
        for (int part = 0; part < PARTS; part++) lay(c, t, m, step, part, line[part]);
    }
}

// --- W ---------------------------------------------------------------------------------------------------------------

INLINE float factor(const void* from, int64_t at) { return SCALES == HALF ? of_half(((const uint16_t*)from)[at]) : ((const float*)from)[at]; }

constexpr uint8_t SIGN = ABOVE ? 128 : 0;

// 64 inputs of one output, from k on: one line of whole numbers, or two of bfloat16.
struct Reader {
    const Call* call; const uint8_t* codes; int64_t n, size, end = -1; byte32 table; half32 numbers;

    Reader() {}
    Reader(const Call& c, int64_t n) : call(&c), codes(c.codes + n * c.row), n(n), size(c.K / c.groups) {}

    void turn_to(int64_t k) {  // the table of the group that an input is in
        if (k < end) return;
        const Call& c = *call;
        const int64_t g = c.groups == 1 ? 0 : k / size;
        end = c.groups == 1 ? INT64_MAX : (g + 1) * size;
        const int64_t at = n * c.groups + (g < c.groups ? g : c.groups - 1);
        if constexpr (CODES == NESTED) {
            const word16 w = (word16{ONCE}) * (int16_t)((const int8_t*)c.step)[at] - (int16_t)((const int8_t*)c.zero)[at];
            table = twice(bytes(w)) ^ SIGN;
        } else if constexpr (!WHOLE) {
            numbers = twice(halves(floats(count()) * factor(c.scale, at) - factor(c.zero, at)));
        }
    }

    void ask_for(int64_t k) const { __builtin_prefetch(codes + k / OF_A_BYTE, 0, 2); }

    vi whole_line(int64_t k) {
        if constexpr (CODES == BYTES) {
            byte64 x = {};
            if (k + 64 <= call->K) x = *(const byte64*)(codes + k); else if (k < call->K) memcpy(&x, codes + k, call->K - k);
            return (vi)(x ^ SIGN);
        }
        const byte32 both = *(const byte32*)(codes + k / 2);
        byte32 low = both & 15, high = (both >> 4) & 15;
        if constexpr (CODES == NESTED) {
            turn_to(k), low = looked_up(table, low);
            turn_to(k + 32), high = looked_up(table, high);
        }
        return (vi)__builtin_shufflevector((quad4)low, (quad4)high, 0, 1, 2, 3, 4, 5, 6, 7);
    }

    void half_lines(int64_t k, void* to, void* beside) {
        if constexpr (CODES == BYTES) {
            const vi line = whole_line(k);
            byte16 own[4]; memcpy(own, &line, 64);
            for (int l = 0; l < 4; l++) *(half16*)((half*)(l < 2 ? to : beside) + l % 2 * 16) = halves(floats(whole(own[l])));
        } else {
            const byte32 both = *(const byte32*)(codes + k / 2);
            turn_to(k), *(half32*)to = looked_up(numbers, words(both & 15));
            turn_to(k + 32), *(half32*)beside = looked_up(numbers, words((both >> 4) & 15));
        }
    }
};

// --- y ---------------------------------------------------------------------------------------------------------------

struct Factors { vf scale, zero, bias; };

static Factors factors_at(const Call& c, int64_t n) {
    Factors f = {all(1.f), all(0.f), all(0.f)};
    for (int l = 0; l < VL && n + l < c.N; l++) {
        if (SCALED) f.scale[l] = factor(c.scale, n + l);
        if (SCALED && CODES == NIBBLES) f.zero[l] = factor(c.zero, n + l);
        if (c.bias) f.bias[l] = c.bias_type == FLOAT ? ((const float*)c.bias)[n + l] : wide(((const half*)c.bias)[n + l]);
    }
    return f;
}

INLINE void put(const Call& c, int64_t m, int64_t n, vf y) {
    if (n + VL <= c.N) {
        if constexpr (INPUT == FLOAT) store((float*)c.y + m * c.N + n, y);
        else *(half16*)((half*)c.y + m * c.N + n) = halves(y);
        return;
    }
    for (int l = 0; l < VL && n + l < c.N; l++) {
        if constexpr (INPUT == FLOAT) ((float*)c.y)[m * c.N + n + l] = y[l]; else ((half*)c.y)[m * c.N + n + l] = narrow(y[l]);
    }
}

static void finish(const Call& c, const Turned& t, const int32_t* sums, int64_t m0, int64_t n, const Factors& f) {
    vf x[16];
    for (int r = 0; r < 16; r++) x[r] = *(const vf*)(sums + r * 32);
    turn(x);
    const int64_t rows = c.M - m0 < ROWS ? c.M - m0 : ROWS;
    for (int64_t r = 0; r < rows; r++) {
        vf y = all(0.f);
        for (int d = 0; d < DIGITS; d++) {
            const int at = r * DIGITS + d;
            const int32_t above = ABOVE ? 128 * (int32_t)sum_at(c, t, m0 / ROWS, 0)[at] : 0;
            y += (WHOLE && !GROUPED ? floats((vi)x[at] - above) : x[at]) * (float)(1 << 8 * d);
        }
        if constexpr (SCALED) y *= f.scale;
        if constexpr (SCALED && CODES == NIBBLES) y -= f.zero * sum_at(c, t, m0 / ROWS, 0)[r];
        if constexpr (WHOLE) y *= t.scale[m0 + r];
        put(c, m0 + r, n, y + f.bias);
    }
}

// 32 outputs from n on, as they lie or as a panel; block m of rows, and the next where there are two.
struct Patch { int64_t n, m; bool two, as_they_lie, first_rows; };

static void finish_all(const Call& c, const Turned& t, const Patch& p, const int32_t* sums) {
    for (int side = 0; side < 2 && p.n + side * 16 < c.N; side++) {
        const Factors f = factors_at(c, p.n + side * 16);
        for (int next = 0; next <= p.two; next++) finish(c, t, sums + side * 512 + next * 16, (p.m + next) * ROWS, p.n + side * 16, f);
    }
}
