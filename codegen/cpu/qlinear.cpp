// A linear layer over stored weights on a processor's matrix units: y = x W^T + b.
//
//   M, K, N   rows, inputs, outputs       CODES   how weights are stored: BYTES, NIBBLES (c s - z), NESTED ((c t - z) s)
//   WHOLE     products are whole, and a row of x is DIGITS rows of whole numbers of 8 bits: one that it is rounded to, or
//             three that say it to 2**-23 of its largest, which is all that bfloat16 says of what is not much smaller;
//             else products are bfloat16, and x is the sum of PARTS of them (a float32 is three)
//
// A tile of A holds 16 outputs, 64 bytes of their inputs; one of B ROWS rows of x, turned so that four bytes of a row lie
// together. Weights of 8 bits are read as they lie by few rows; else they become a panel of tiles, once for all rows of x.

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
typedef int16_t word16 __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int64_t LINE = 64, TILE = 16 * LINE, SUMS = 128;  // bytes of a line of a tile, of a tile, of a row of sums
constexpr int OUTPUTS = 32, CHUNK = 64, SPAN = 4;  // of a panel; tiles of it that are made at a time; panels that share what they read of x
constexpr int ROWS = 16 / DIGITS, OF_A_BYTE = CODES == BYTES ? 1 : 2;  // rows of x in a block; codes of a byte
constexpr int PER = WHOLE ? 64 : 32, STRIP = WHOLE ? 32 : 16 / PARTS;  // inputs of a tile; blocks of rows that stay in a cache

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

// Tiles by block of rows, step, part; sums of rows, or where GROUPED by block, group and row of whole numbers.
struct Turned { unsigned char* tiles; float *scale, *sum; int64_t steps; };

INLINE unsigned char* tile_of(const Turned& t, int64_t block, int64_t step, int part) { return t.tiles + ((block * t.steps + step) * PARTS + part) * TILE; }

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
INLINE void lay(const Turned& t, int64_t m, int64_t step, int part, const void* line, int digit = 0) {
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
            if constexpr (CODES == NIBBLES) sum += rounded;
        }
        lay(t, m, step, 0, line);
    }
    t.scale[m] = total(none) == 0.f ? scale : __builtin_nanf("");  // rows that are no numbers stay none
    t.sum[m] = 0.f;
    for (int l = 0; l < VL; l++) t.sum[m] += sum[l];
}

INLINE int64_t group_of(const Call& c, int64_t step) { return c.groups == 1 ? 0 : step * PER / (c.K / c.groups); }
INLINE float* sum_at(const Call& c, const Turned& t, int64_t block, int64_t group) { return t.sum + (block * c.groups + group) * 16; }

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
                if constexpr (GROUPED) sums[digit] += left - (next << 8);
                left = next;
            }
        }
        for (int digit = 0; digit < DIGITS; digit++) {
            lay(t, m, step, 0, line[digit], digit);
            if constexpr (GROUPED) sum_at(c, t, m / ROWS, group_of(c, step))[m % ROWS * DIGITS + digit] += total(floats(sums[digit]));
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
        for (int part = 0; part < PARTS; part++) lay(t, m, step, part, line[part]);
    }
}

// --- W ---------------------------------------------------------------------------------------------------------------

INLINE float factor(const void* from, int64_t at) { return SCALES == HALF ? of_half(((const uint16_t*)from)[at]) : ((const float*)from)[at]; }

// 64 inputs of one output, from k on, as one line of bytes or two of bfloat16.
struct Reader {
    const Call& c; const uint8_t* codes; int64_t n, size, end = -1; byte32 table; half32 numbers;

    Reader(const Call& c, int64_t n) : c(c), codes(c.codes + n * c.row), n(n), size(c.K / c.groups) {}

    void turn_to(int64_t k) {  // the table of the group that an input is in
        if (k < end) return;
        const int64_t g = c.groups == 1 ? 0 : k / size;
        end = c.groups == 1 ? INT64_MAX : (g + 1) * size;
        const int64_t at = n * c.groups + (g < c.groups ? g : c.groups - 1);
        if constexpr (CODES == NESTED) {
            const word16 w = (word16{ONCE}) * (int16_t)((const int8_t*)c.step)[at] - (int16_t)((const int8_t*)c.zero)[at];
            table = twice(bytes(w));
        } else if constexpr (!WHOLE) {
            numbers = twice(halves(floats(count()) * factor(c.scale, at) - factor(c.zero, at)));
        }
    }

    void line(int64_t k, void* to, void* beside) {
        const int64_t next = k + CHUNK * PER;  // what is read a chunk later: of this output, or of one in the next block
        const uint8_t* ahead = next < c.K ? codes : codes + OUTPUTS * c.row - up(c.K, CHUNK * PER) / OF_A_BYTE;
        __builtin_prefetch(ahead + next / OF_A_BYTE, 0, 2);
        if constexpr (CODES == BYTES) {
            int8_t own[64];
            const int8_t* from = (const int8_t*)codes + k;
            if (k + 64 > c.K) { memset(own, 0, 64); if (k < c.K) memcpy(own, from, c.K - k); from = own; }
            if constexpr (WHOLE) { memcpy(to, from, 64); return; }
            for (int l = 0; l < 64; l += 16) *(half16*)((half*)(l < 32 ? to : beside) + l % 32) = halves(floats(whole(*(const byte16*)(from + l))));
        } else {
            const byte32 both = *(const byte32*)(codes + k / 2), low = both & 15, high = (both >> 4) & 15;
            if constexpr (WHOLE && CODES == NIBBLES) { *(byte32*)to = low, *(byte32*)((char*)to + 32) = high; return; }
            turn_to(k);
            if constexpr (WHOLE) *(byte32*)to = looked_up(table, low); else *(half32*)to = looked_up(numbers, words(low));
            turn_to(k + 32);
            if constexpr (WHOLE) *(byte32*)((char*)to + 32) = looked_up(table, high); else *(half32*)beside = looked_up(numbers, words(high));
        }
    }
};

// --- a block of outputs ----------------------------------------------------------------------------------------------

// 32 outputs from n on, as they lie or as a panel; block m of rows, and the next where there are two.
struct Patch { int64_t n, m; bool two, as_they_lie, first_rows; };

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
        for (int d = 0; d < DIGITS; d++) y += (WHOLE && !GROUPED ? floats((vi)x[r * DIGITS + d]) : x[r * DIGITS + d]) * (float)(1 << 8 * d);
        if constexpr (SCALED) y *= f.scale;
        if constexpr (SCALED && CODES == NIBBLES) y -= f.zero * t.sum[m0 + r];
        if constexpr (WHOLE) y *= t.scale[m0 + r];
        put(c, m0 + r, n, y + f.bias);
    }
}

static void finish_all(const Call& c, const Turned& t, const Patch& p, const int32_t* sums) {
    for (int side = 0; side < 2 && p.n + side * 16 < c.N; side++) {
        const Factors f = factors_at(c, p.n + side * 16);
        for (int next = 0; next <= p.two; next++) finish(c, t, sums + side * 512 + next * 16, (p.m + next) * ROWS, p.n + side * 16, f);
    }
}

template <int COLUMNS>
static void step_of(const unsigned char* a, int64_t a_row, int64_t a_next, const unsigned char* b, const unsigned char* b_next) {
    for (int l = 0; l < 16; l++) { __builtin_prefetch(b + PARTS * TILE + l * 64); if (COLUMNS > 1) __builtin_prefetch(b_next + PARTS * TILE + l * 64); }
    LOAD(4, a, a_row);
    LOAD(5, a + a_next, a_row);
    for (int part = 0; part < PARTS; part++, b += TILE, b_next += TILE) {
        LOAD(6, b, LINE);
        MULTIPLY_ALL(0, 4, 6);
        MULTIPLY_ALL(2, 5, 6);
        if constexpr (COLUMNS > 1) { LOAD(7, b_next, LINE); MULTIPLY_ALL(1, 4, 7); MULTIPLY_ALL(3, 5, 7); }
    }
}

static void products(const Call& c, const Turned& t, const Patch& p, int64_t first, int64_t last, const unsigned char* a, int32_t* sums, bool add) {
    if (add) { LOAD(0, sums, SUMS); LOAD(1, sums + 16, SUMS); LOAD(2, sums + 512, SUMS); LOAD(3, sums + 528, SUMS); }
    else { ZERO(0); ZERO(1); ZERO(2); ZERO(3); }
    const int64_t a_row = p.as_they_lie ? c.row : LINE, a_next = 16 * a_row, a_step = p.as_they_lie ? LINE : 2 * TILE;
    for (int64_t step = first; step < last; step++, a += a_step) {
        if (p.as_they_lie && p.first_rows) for (int o = 0; o < OUTPUTS; o++) __builtin_prefetch(a + o * c.row + 512, 0, 2);
        const unsigned char *b = tile_of(t, p.m, step, 0), *b_next = tile_of(t, p.two ? p.m + 1 : p.m, step, 0);
        if (p.two) step_of<2>(a, a_row, a_next, b, b_next); else step_of<1>(a, a_row, a_next, b, b);
    }
    STORE(0, sums, SUMS); STORE(1, sums + 16, SUMS); STORE(2, sums + 512, SUMS); STORE(3, sums + 528, SUMS);
}

// Products that are whole within a group, each output's times its scale of the group, less its zero times the sum of x.
static void products_by_group(const Call& c, const Turned& t, const Patch& p, int64_t first, int64_t last, const unsigned char* a, float* sums) {
    alignas(64) int32_t whole[OUTPUTS * 32];
    if (!first) memset(sums, 0, sizeof whole);
    for (int64_t from = first, to; from < last; from = to) {
        const int64_t g = group_of(c, from), end = c.groups == 1 ? t.steps : (g + 1) * (c.K / c.groups) / PER;
        to = end < last ? end : last;
        products(c, t, p, from, to, a + (from - first) * 2 * TILE, whole, false);
        for (int64_t o = 0; o < OUTPUTS && p.n + o < c.N; o++) {
            const float s = factor(c.scale, (p.n + o) * c.groups + g), z = to == end ? factor(c.zero, (p.n + o) * c.groups + g) : 0.f;
            for (int next = 0; next <= p.two; next++) {
                vf* sum = (vf*)(sums + o * 32 + next * 16);
                *sum += floats(*(const vi*)(whole + o * 32 + next * 16)) * s - load(sum_at(c, t, p.m + next, g)) * z;
            }
        }
    }
}

// Outputs n to `end` of the rows in blocks `from` to `to`. A few inputs at a time: what they need of x stays in a cache for
// all of these outputs, 32 of which become a panel that stays in a nearer one for all of these rows.
static void part_of(const Call& c, const Turned& t, int64_t n0, int64_t end, int64_t from, int64_t to, unsigned char* panel, int32_t* sums) {
    for (int64_t first = 0; first < t.steps; first += CHUNK) {
        const int64_t last = first + CHUNK < t.steps ? first + CHUNK : t.steps;
        int32_t* own = sums;
        for (int64_t n = n0; n < end; n += OUTPUTS) {
            const bool as_they_lie = CODES == BYTES && WHOLE && c.K % 64 == 0 && n + OUTPUTS <= c.N && to - from <= 4;
            if (!as_they_lie)
                for (int64_t o = 0; o < OUTPUTS; o++) {
                    Reader reader(c, n + o < c.N ? n + o : c.N - 1);
                    for (int64_t k = first * PER; k < last * PER; k += 64) {
                        unsigned char* line = panel + ((k / PER - first) * 2 + o / 16) * TILE + o % 16 * LINE;
                        reader.line(k, line, line + 2 * TILE);
                    }
                }
            const unsigned char* a = as_they_lie ? c.codes + n * c.row + first * LINE : panel;
            for (int64_t m = from; m < to; m += 2, own += OUTPUTS * 32) {
                const Patch patch = {n, m, m + 1 < to, as_they_lie, m == from};
                if constexpr (GROUPED) products_by_group(c, t, patch, first, last, a, (float*)own);
                else products(c, t, patch, first, last, a, own, first > 0);
                if (last == t.steps) finish_all(c, t, patch, own);
            }
        }
    }
}

extern "C" int run(const Call* given) {
    const Call& c = *given;
    if (!units_allowed()) return 1;
    Turned t;
    t.steps = up(c.K, 64) / PER;
    const int64_t blocks = (c.M + ROWS - 1) / ROWS, strips = (blocks + STRIP - 1) / STRIP;
    const int64_t width = blocks > 4 ? SPAN * OUTPUTS : OUTPUTS, parts = (c.N + width - 1) / width;
    const int64_t block = t.steps * PARTS * TILE, panel = CHUNK * 2 * TILE;
    t.tiles = (unsigned char*)aligned_alloc(64, blocks * block + up(blocks * 16 * (4 + 4 * (GROUPED ? c.groups : 1)), 64));
    if (!t.tiles) return 2;
    t.scale = (float*)(t.tiles + blocks * block), t.sum = t.scale + blocks * 16;
    if (GROUPED) memset(t.sum, 0, blocks * 16 * 4 * c.groups);
    if (c.M % ROWS) memset(t.tiles + (blocks - 1) * block, 0, block);
#pragma omp parallel num_threads(c.threads)
    {
        unsigned char* own = (unsigned char*)aligned_alloc(64, panel + SPAN * ((STRIP + 1) / 2) * OUTPUTS * SUMS);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < c.M; m++) {
            if constexpr (DIGITS > 1) turn_digits(c, t, m); else if constexpr (WHOLE) turn_whole(c, t, m); else turn_halves(c, t, m);
        }
        units_begin();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * parts; task++) {
            const int64_t from = task / parts * STRIP, to = from + STRIP < blocks ? from + STRIP : blocks;
            const int64_t n = task % parts * width, end = n + width < c.N ? n + width : c.N;
            part_of(c, t, n, end, from, to, own, (int32_t*)(own + panel));
        }
        units_end();
        free(own);
    }
    free(t.tiles);
    return 0;
}
