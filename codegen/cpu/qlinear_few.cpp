// A linear layer over stored weights for a few rows of x: y = x W^T + b, weights unpacked in registers, once for all rows.
// ROWS are up to 4; CODES of any kind.

// Codes of a group as whole numbers: c t - z where NESTED, and what passes 127 on the way comes back.
struct Nested {
    int step, zero;
    MEMBER vi of(vi codes) const { return CODES == NESTED ? ((codes * step - zero) << 24) >> 24 : codes; }
    MEMBER int of(int code) const { return CODES == NESTED ? (int8_t)(code * step - zero) : code; }
};

// The sum of codes times x over inputs from k to end, for each row; whole vectors, then what is left.
template <int ROWS>
INLINE void products(const Call& c, const uint8_t* codes, const Nested& nested, int64_t k, int64_t end, vf sums[ROWS][2]) {
    if constexpr (CODES == BYTES) {
        const int8_t* from = (const int8_t*)codes;
        for (; k + 2 * VL <= end; k += 2 * VL)
            for (int side = 0; side < 2; side++) {
                const vf w = floats(whole(*(const bytes*)(from + k + side * VL)));
                for (int m = 0; m < ROWS; m++) sums[m][side] += w * load(c.x + m * c.K + k + side * VL);
            }
        for (; k < end; k++) for (int m = 0; m < ROWS; m++) sums[m][0][0] += from[k] * c.x[m * c.K + k];
    } else {
        for (; k + 64 <= end && k % 64 == 0; k += 64)
            for (int at = 0; at < 32; at += VL) {
                const vi both = whole(*(const packed*)(codes + k / 2 + at));
                const vf low = floats(nested.of(both & 15)), high = floats(nested.of(both >> 4));
                for (int m = 0; m < ROWS; m++) {
                    sums[m][0] += low * load(c.x + m * c.K + k + at);
                    sums[m][1] += high * load(c.x + m * c.K + k + at + 32);
                }
            }
        for (; k < end; k++) {
            const uint8_t two = codes[k / 64 * 32 + k % 32], code = k % 64 < 32 ? two & 15 : two >> 4;
            for (int m = 0; m < ROWS; m++) sums[m][0][0] += nested.of((int)code) * c.x[m * c.K + k];
        }
    }
}

template <int ROWS>
static void output(const Call& c, const float* totals, const float* scale, int64_t n) {
    const uint8_t* codes = c.codes + n * c.row;
    float y[ROWS];
    if constexpr (CODES == BYTES) {
        vf sums[ROWS][2] = {};
        products<ROWS>(c, codes, {}, 0, c.K, sums);
        for (int m = 0; m < ROWS; m++) y[m] = total(sums[m][0] + sums[m][1]) * factor(c.scale, n);
    } else {
        const int64_t size = c.K / c.groups;
        vf whole[ROWS] = {};
        float zeros[ROWS] = {};
        for (int64_t g = 0; g < c.groups; g++) {
            const int64_t at = n * c.groups + g;
            vf sums[ROWS][2] = {};
            Nested nested = {};
            if constexpr (CODES == NESTED) nested = {((const int8_t*)c.step)[at], ((const int8_t*)c.zero)[at]};
            products<ROWS>(c, codes, nested, g * size, (g + 1) * size, sums);
            const float s = CODES == NIBBLES ? factor(c.scale, at) : 1.f, z = CODES == NIBBLES ? factor(c.zero, at) : 0.f;
            for (int m = 0; m < ROWS; m++) whole[m] += (sums[m][0] + sums[m][1]) * s, zeros[m] += totals[m * c.groups + g] * z;
        }
        const float s = CODES == NESTED ? factor(c.scale, n) : 1.f;
        for (int m = 0; m < ROWS; m++) y[m] = total(whole[m]) * s - zeros[m];
    }
    for (int m = 0; m < ROWS; m++) c.y[m * c.N + n] = y[m] * (scale ? scale[m] : 1.f) + (c.bias ? c.bias[n] : 0.f);
}

template <int ROWS>
static void outputs(const Call& c, const float* totals, const float* scale) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(c.threads)
    for (int64_t n = 0; n < c.N; n++) output<ROWS>(c, totals, scale, n);
}

extern "C" int run(const Call* given, const float* scale) {
    const Call& c = *given;
    float* totals = (float*)calloc(c.M * c.groups, sizeof(float));  // of x over each group: what a zero is multiplied with
    if (!totals) return 2;
    const int64_t size = c.K / c.groups;
    if constexpr (CODES == NIBBLES)
        for (int64_t m = 0; m < c.M; m++) for (int64_t k = 0; k < c.K; k++) totals[m * c.groups + k / size] += c.x[m * c.K + k];
    switch (c.M) {
        case 1: outputs<1>(c, totals, scale); break;
        case 2: outputs<2>(c, totals, scale); break;
        case 3: outputs<3>(c, totals, scale); break;
        case 4: outputs<4>(c, totals, scale); break;
        default: free(totals); return 1;
    }
    free(totals);
    return 0;
}
