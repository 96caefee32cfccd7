// Keys and values of `attend` on a processor: laid out in tiles as the products take them, before any row meets them.
//
//   B, H, N, D     batch, query heads, query rows, their size           Hk, M, Dv   key heads, keys, size of a value
//   BM, BN         rows of a block of queries, keys of a tile           b, h, i, j  logical indices, as the spec has them
//   LN             numbers from one row of a tile's scores to the next: BN up to a whole number of vectors
//
// HALVES: q, k, v, o are bfloat16 and the products are those of units.hpp or dots.hpp; else everything is float32.

#ifdef HALVES
typedef half cell;
constexpr int64_t DEEP = 32, WIDE = 16, TALL = 16;  // what sizes of a product are multiples of: K, N, M
#else
typedef float cell;
constexpr int64_t DEEP = 1, WIDE = VL, TALL = 1;
#endif

template <class T> struct Of { T* data; int64_t b, h, n, d; };  // strides in elements
typedef Of<cell> Rows;
struct Source {
    Rows k, v;
    int64_t Hk, keys, lie;                  // key heads; how many places keys stand at; heads in a row that read the same k, v
    const int32_t *at; int64_t at_b, at_h;  // the row of k, v at each place (B|1, Hk|1, keys), -1 for none; or null: in order
    const int32_t *place; int64_t place_b, place_h;  // the position j of each row, or null: 0, 1, ...
};
struct Relative { const float* data; int64_t rows, panels, heads; };  // R (heads, panels, D, PANEL): attend_relative.hpp
struct Call {
    Rows q, o;
    int64_t B, H, N, D, Dv, shift, threads;
    const int32_t *q_place; int64_t q_place_b, q_place_h;
    const int32_t *list; int64_t list_b, list_h, list_q, listed;  // key tiles of each query tile, or null
    float* lse;
    const Table* t;
    Source source[SEGMENTS];
    Relative relative[RELATIVE ? RELATIVE : 1];
};

constexpr int64_t MOST = BM + (TALL == 1 ? 8 : 0);  // rows of the last block, which takes what is too little for one of its own
constexpr int64_t LN = (BN + WIDE - 1) / WIDE * WIDE;
constexpr float LN2 = 0.69314718055994531f;
constexpr int32_t NOWHERE = INT32_MIN;  // the position of a place at which no key stands
// Keys of one head as tiles D x BN, values as tiles BN x Dv (or as they lie in memory); positions beside them.
// With STOPS a tile is made when a row first comes to it, which `state` tells; most: the bits of the largest value's size in
// the tiles before it, or null where looking for that would cost more than it could spare.
struct Packed { cell *k, *v; int32_t *j, *state, *most; int64_t tiles; };

// Where the second factor of a product, of so many rows and columns, has a number; and its stride, as `product` takes it.
#ifdef HALVES
INLINE int64_t at(int64_t row, int64_t column, int64_t rows, int64_t) {
    return column / 16 * rows * 16 + row / 2 * 32 + column % 16 * 2 + row % 2;
}
INLINE int64_t stride(int64_t rows, int64_t) { return rows * 16; }
static bool values_as_they_are(const Call&, const Source&) { return false; }
#else
INLINE int64_t at(int64_t row, int64_t column, int64_t, int64_t columns) { return row * columns + column; }
INLINE int64_t stride(int64_t, int64_t columns) { return columns; }
static bool values_as_they_are(const Call& c, const Source& s) { return s.v.d == 1 && c.Dv % VL == 0 && !s.at; }
#endif

// VL keys as columns n, n + 1, ... of their tile, and how many numbers of each that is; the numbers of one key from d on;
// one or two rows of values, the first of them row n.
#ifdef HALVES
INLINE int64_t put_keys(const cell* key, int64_t next, int64_t D, int64_t deep, cell* k, int64_t n) {
    int64_t d = 0;  // two numbers are moved as one
    if (next % 2 == 0) for (; d + 2 * VL <= D; d += 2 * VL) transpose((const float*)(key + d), next / 2, (float*)(k + at(d, n, deep, LN)), 16);
    return d;
}
INLINE void put_key(const cell* key, int64_t step, int64_t d, int64_t D, int64_t deep, cell* k, int64_t n) {
    if (step == 1) for (; d + 2 <= D; d += 2) memcpy(k + at(d, n, deep, LN), key + d, 2 * sizeof(cell));
    for (; d < D; d++) k[at(d, n, deep, LN)] = key[d * step];
}
INLINE void put_values(const cell* const* rows, int64_t count, int64_t step, int64_t Dv, cell* v, int64_t n, int64_t wide) {
    int64_t d = 0;
    if (count == 2 && step == 1)
        for (; d + VL <= Dv; d += VL) *(vi*)(v + at(n, d, BN, wide)) = wholes(*(const vh*)(rows[0] + d)) | wholes(*(const vh*)(rows[1] + d)) << 16;
    for (; d < Dv; d++) for (int64_t r = 0; r < count; r++) v[at(n + r, d, BN, wide)] = rows[r][d * step];
}
#else
INLINE int64_t put_keys(const cell* key, int64_t next, int64_t D, int64_t deep, cell* k, int64_t n) {
    int64_t d = 0;
    for (; d + VL <= D; d += VL) transpose(key + d, next, k + at(d, n, deep, LN), LN);
    return d;
}
INLINE void put_key(const cell* key, int64_t step, int64_t d, int64_t D, int64_t deep, cell* k, int64_t n) {
    for (; d < D; d++) k[at(d, n, deep, LN)] = key[d * step];
}
INLINE void put_values(const cell* const* rows, int64_t count, int64_t step, int64_t Dv, cell* v, int64_t n, int64_t wide) {
    for (int64_t r = 0; r < count; r++) for (int64_t d = 0; d < Dv; d++) v[at(n + r, d, BN, wide)] = rows[r][d * step];
}
#endif

// Whether the rows at VL places from one on lie behind each other.
INLINE void copy(const cell* from, int64_t count, cell* to) {
    int64_t d = 0;
    for (; d + VL <= count; d += VL) memcpy(to + d, from + d, VL * sizeof(cell));
    for (; d < count; d++) to[d] = from[d];
}

INLINE bool in_order(const Source& s, int64_t b, int64_t h, int64_t place) {
    if (!s.at) return true;
    const int32_t* at = s.at + b * s.at_b + h * s.at_h + place;
    for (int64_t n = 1; n < VL; n++) if (at[n] != at[0] + n) return false;
    return at[0] >= 0;
}

static void pack(const Call& c, const Source& s, int64_t b, int64_t h, int64_t tile, const Packed& to) {
    const int64_t deep = rounded(c.D, DEEP), wide = rounded(c.Dv, WIDE), first = tile * BN;
    const int64_t count = smaller<int64_t>(BN, s.keys - first);
    cell *k = to.k + tile * deep * LN, *v = to.v + tile * BN * wide;
    if (count < LN || deep != c.D) memset(k, 0, sizeof(cell) * deep * LN);
    if (to.v && (count < BN || wide != c.Dv)) memset(v, 0, sizeof(cell) * BN * wide);
    const cell* rows[2] = {};  // of values, one after the other
    int64_t turned = 0;        // numbers of these VL keys that have come together
    for (int64_t n = 0; n < count; n++) {
        const int64_t row = s.at ? s.at[b * s.at_b + h * s.at_h + first + n] : first + n, from = row < 0 ? 0 : row;
        to.j[first + n] = row < 0 ? NOWHERE : s.place ? s.place[b * s.place_b + h * s.place_h + row] : (int32_t)row;
        const cell* key = s.k.data + b * s.k.b + h / s.lie * s.k.h + from * s.k.n;
        if (n % VL == 0) turned = s.k.d != 1 || n + VL > count || !in_order(s, b, h, first + n) ? 0 : put_keys(key, s.k.n, c.D, deep, k, n);
        put_key(key, s.k.d, turned, c.D, deep, k, n);
        if (!to.v) continue;
        rows[n % 2] = s.v.data + b * s.v.b + h / s.lie * s.v.h + from * s.v.n;
        if (n % 2 || n + 1 == count) put_values(rows, 1 + n % 2, s.v.d, c.Dv, v, n / 2 * 2, wide);
    }
}

struct Asked { float* data; int64_t low, high; };  // products of a block's rows with a R, and which panels are there
struct Block {  // one block of query rows, and what it has gathered so far
    int64_t b, h, first, count;
    int32_t i[MOST], i0, i1;  // positions, the least and the greatest
    float m[MOST], l[MOST * VL];  // what is known of a row's weights: the files of the normalisers say what
    cell *q, *p;  // the rows, their weights
    float *s, *o;
    int64_t ldo;
    char* once;  // room for a tile, made for this block alone; null where all tiles are there
    const Table* t;
    Table own[RELATIVE ? TABLES : 1];
    Asked asked[RELATIVE ? RELATIVE : 1];
};

// The bits of the largest value's size in a tile: what is no number counts as the largest.
static int32_t largest(const Call& c, const Source& s, int64_t b, int64_t h, int64_t tile) {
    const int64_t first = tile * BN, count = smaller<int64_t>(BN, s.keys - first);
    vi top{};
    for (int64_t n = first; n < first + count; n++) {
        const int64_t row = s.at ? s.at[b * s.at_b + h * s.at_h + n] : n;
        const cell* v = s.v.data + b * s.v.b + h / s.lie * s.v.h + (row < 0 ? 0 : row) * s.v.n;
        int64_t d = 0;
        if (s.v.d == 1) for (; d + VL <= c.Dv; d += VL) top = most(top, (vi)absolute(load(v + d)));
        for (; d < c.Dv; d++) {
            cell one[VL] = {v[d * s.v.d]};
            top = most(top, (vi)absolute(load(one)));
        }
    }
    int32_t found = 0;
    for (int l = 0; l < VL; l++) found = larger(found, top[l]);
    return found;
}

// All keys of a segment, tile by tile; they are read by every block of queries. Cells of k, of v, places: of one head.
struct Room { int64_t k, v, j, tiles; };
static Room room(const Call& c, const Source& s) {
    const int64_t tiles = rounded(s.keys, BN) / BN, keys = tiles * BN;  // the last tile's places are read by whole vectors
    return {tiles * LN * rounded(c.D, DEEP), values_as_they_are(c, s) ? 0 : keys * rounded(c.Dv, WIDE), keys + LN - BN, tiles};
}
static int64_t whole_numbers(const Room& r) { return r.j + (STOPS ? 2 * r.tiles : 0); }
static int64_t bytes(const Call& c, const Source& s) {
    const Room r = room(c, s);
    return rounded(c.B * s.Hk * ((r.k + r.v) * sizeof(cell) + whole_numbers(r) * 4), 64);
}

// Where the tiles of a segment are, and what is in them, unless it is made tile by tile.
static void prepare(const Call& c, const Source& s, Packed* keys, char* at, bool later) {
    const Room r = room(c, s);
    const int64_t heads = c.B * s.Hk, tiles = r.tiles;
    for (int64_t n = 0; n < heads; n++) {
        cell* k = (cell*)at;
        int32_t* j = (int32_t*)(k + r.k + r.v);
        keys[n] = {k, r.v ? k + r.k : nullptr, j, j + r.j, j + r.j + tiles, tiles};
        if (STOPS) memset(keys[n].state, 0, sizeof(int32_t) * tiles);
        at += (r.k + r.v) * sizeof(cell) + whole_numbers(r) * 4;
    }
    if (STOPS || later) return;
#pragma omp parallel for schedule(static) num_threads(c.threads)
    for (int64_t n = 0; n < heads * tiles; n++)
        pack(c, s, n / tiles / s.Hk, n / tiles % s.Hk, n % tiles, keys[n / tiles]);
}

// A tile in a room of its own, said so that the tiles before it would lie in front of it.
static int64_t bytes_of_tile(const Call& c) {
    return rounded(sizeof(cell) * (LN * rounded(c.D, DEEP) + BN * rounded(c.Dv, WIDE)), 64) + rounded(4 * (BN + LN), 64);
}
INLINE Packed tile_of_own(const Call& c, const Source& s, int64_t b, int64_t h, int64_t tile, const Packed& all, char* at) {
    const int64_t k = LN * rounded(c.D, DEEP), v = BN * rounded(c.Dv, WIDE);
    Packed found = all;
    found.k = (cell*)at - tile * k;
    found.v = values_as_they_are(c, s) ? nullptr : (cell*)at + k - tile * v;
    found.j = (int32_t*)(at + rounded(sizeof(cell) * (k + v), 64)) - tile * BN;
    pack(c, s, b, h, tile, found);
    return found;
}

// Makes a tile, unless it is there; a thread that meets another at it waits.
INLINE void ready(const Call& c, const Source& s, int64_t b, int64_t h, int64_t tile, const Packed& keys) {
    enum { NONE_YET, IN_WORK, READY };
    int32_t* state = keys.state + tile;
    if (!STOPS || __atomic_load_n(state, __ATOMIC_ACQUIRE) == READY) return;
    int32_t none = NONE_YET;
    if (__atomic_compare_exchange_n(state, &none, IN_WORK, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
        pack(c, s, b, h, tile, keys);
        __atomic_store_n(state, READY, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(state, __ATOMIC_ACQUIRE) != READY) sched_yield();
}

// The largest value's size in the tiles before each, over the segments before included. Few rows can spare little by it; where
// what is left is asked for itself it is not known, so that all of float32's range of that is told.
static void look_ahead(const Call& c, Packed* keys) {
    int32_t before = 0;
    for (int S = 0; S < SEGMENTS; S++, keys += c.B * c.H) {
        const Source& s = c.source[S];
        const int64_t heads = c.B * s.Hk, tiles = keys->tiles;
        if (c.N * 8 < s.keys || c.lse) {
            for (int64_t n = 0; n < heads; n++) keys[n].most = nullptr;
            before = INT32_MAX;
            continue;
        }
#pragma omp parallel for schedule(static) num_threads(c.threads)
        for (int64_t n = 0; n < heads * tiles; n++)
            keys[n / tiles].most[n % tiles] = largest(c, s, n / tiles / s.Hk, n / tiles % s.Hk, n % tiles);
        int32_t all = before;
        for (int64_t n = 0; n < heads; n++) {
            int32_t so_far = before;
            for (int64_t t = 0; t < tiles; t++) {
                const int32_t own = keys[n].most[t];
                keys[n].most[t] = so_far, so_far = larger(so_far, own);
            }
            all = larger(all, so_far);
        }
        before = all;
    }
}
