// What expressions look up in tensors: at any indices, or of a row at those of the keys of a tile, one behind the other.

// A tensor that an expression looks up (float or int32): element strides, indices clamped to the sizes.
struct Table { const void* data; int64_t size[4], stride[4]; };
INLINE int64_t clamped(int64_t x, int64_t size) { return x < 0 ? 0 : x < size ? x : size - 1; }
INLINE vi clamped(vi x, int64_t size) { return least(most(x, all(0)), all((int32_t)(size - 1))); }
// Loaded at once where they follow one another, upwards or downwards, or all are one: what distances do, and clipped ones.
template <class V, class T> INLINE V gathered(const T* from, vi at) {
    const vi step = at - all(at[0]);
    if (same(step, count())) return load(from + at[0]);
    if (same(step, -count())) return backwards(load(from + at[VL - 1]));
    if (same(step, vi{})) return all(from[at[0]]);
    V x;
    for (int l = 0; l < VL; l++) x[l] = from[at[l]];
    return x;
}
INLINE vf gathered(const float* from, vi at) { return gathered<vf, float>(from, at); }
INLINE vi gathered(const int32_t* from, vi at) { return gathered<vi, int32_t>(from, at); }

// A tile's keys as a row meets them: key n stands at position j0 + n, or at place[n].
//
//   lanes   how many are asked about, whole vectors          lines, line   memory for what is looked up, numbers of each
struct Keys {
    const int32_t* place; int32_t j0;
    int64_t lanes;
    int32_t* lines; int64_t line;
    MEMBER vi at(int64_t n) const { return place ? *(const vi*)(place + n) : count() + (j0 + (int32_t)n); }
};
// Numbers of a table for the keys, from the first on. The index moves by at most one from a key to the next: where it has moved by
// as many as there are keys, all follow one another as they lie in the table, and are not looked at one by one. ONE_WAY: it never
// turns; where it has not moved it stood still, as clipped distances do.
template <bool ONE_WAY, class T, class One, class Index>
INLINE const T* looked_up(const T* from, const Keys& keys, int number, const One& one, const Index& index) {
    if (!keys.lanes) return from;
    T* line = (T*)keys.lines + number * keys.line;
    if (!keys.place) {
        const int32_t last = (int32_t)keys.lanes - 1;
        const int64_t begin = one(keys.j0), end = one(keys.j0 + last);
        if (end - begin == last) return from + begin;
        if (begin - end == last) {
            for (int64_t n = 0; n < keys.lanes; n += VL) store(line + n, backwards(load(from + begin - n - (VL - 1))));
            return line;
        }
        if (ONE_WAY && begin == end) {
            for (int64_t n = 0; n < keys.lanes; n += VL) store(line + n, all(from[begin]));
            return line;
        }
    }
    for (int64_t n = 0; n < keys.lanes; n += VL) store(line + n, gathered(from, index(keys.at(n))));
    return line;
}
// What was looked up learns: x added where it lay, of a vector of places or of one.
INLINE void add_at(float* to, vi at, vf x) {
    const vi step = at - all(at[0]);
    if (same(step, count())) store(to + at[0], load(to + at[0]) + x);
    else if (same(step, -count())) store(to + at[VL - 1], load(to + at[VL - 1]) + backwards(x));
    else if (same(step, vi{})) to[at[0]] += total(x);
    else for (int l = 0; l < VL; l++) to[at[l]] += x[l];
}
INLINE void add_at(float* to, vf x) { *to += total(x); }
// x times y, and nothing where there is nothing of x, however large y is.
INLINE vf some_of(vf x, vf y) { return select(x == 0.f, vf{}, x * y); }
