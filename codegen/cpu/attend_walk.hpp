// Which tiles of keys a block of query rows comes to, from the last key back: those listed, or those of a band and then the
// sinks'. In front of this text stand BN, BACK, AHEAD, SINKS; i0 ... i1 are the positions of the rows.

struct Tiles {
    const int32_t* list; int64_t listed;  // numbers of tiles, in any order; or null
    int64_t count;
    bool bounded;  // whether a tile's number says where its keys stand
};

// visit(number, most): the first `most` keys of a tile; true where no key before it counts any more. The nearest come first:
// there a score that falls with the distance is highest, and no later tile outweighs it.
template <class Visit> INLINE bool walk(const Tiles& t, int32_t i0, int32_t i1, const Visit& visit) {
    if (t.list) {
        for (int64_t last = t.count;;) {  // each once, however often it is listed
            int64_t next = -1;
            for (int64_t n = 0; n < t.listed; n++) if (t.list[n] < last && t.list[n] > next) next = t.list[n];
            if (next < 0) return false;
            if (visit(next, BN)) return true;
            last = next;
        }
    }
    int64_t low = 0, high = t.count, sinks = 0;
    if (t.bounded) {
        if (AHEAD != INT64_MAX) high = i1 + AHEAD < 0 ? 0 : smaller<int64_t>(high, (i1 + AHEAD) / BN + 1);
        if (BACK != INT64_MAX) low = i0 - BACK > 0 ? (i0 - BACK) / BN : 0;
        sinks = smaller<int64_t>(smaller(low, high), rounded(SINKS, BN) / BN);
    }
    for (int64_t n = high; n-- > low;) if (visit(n, BN)) return true;
    for (int64_t n = sinks; n-- > 0;) if (visit(n, smaller<int64_t>(BN, SINKS - n * BN))) return true;
    return false;
}
