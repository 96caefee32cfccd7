// A linear layer over stored weights for many rows on any processor: codes become panels of float32, each made once for a
// strip of rows and near to the processor while these meet it. What x was rounded to, if it was, is whole: so are products.

constexpr int64_t OUTPUTS = 64, DEPTH = 256, STRIP = 240;  // of a panel: outputs, inputs; rows that meet it

// VL codes of an output from input k on.
INLINE vi codes_at(const Call& c, const uint8_t* codes, int64_t k) {
    if constexpr (CODES != BYTES) {
        const vi both = whole(*(const packed*)(codes + k / 64 * 32 + k % 32));
        return k % 64 < 32 ? both & 15 : both >> 4;
    }
    if (k + VL <= c.K) return whole(*(const bytes*)(codes + k));
    vi x = {};
    for (int l = 0; k + l < c.K; l++) x[l] = (int8_t)codes[k + l];
    return x;
}

// What makes numbers of the codes of VL outputs in one group of inputs; times the outputs' scales they are weights, but for
// NIBBLES, whose groups have their own.
struct Group {
    vf scale, zero; vi step, offset; int64_t end = -1;

    void turn_to(const Call& c, const int64_t* n, int64_t k) {
        if (CODES == BYTES || k < end) return;
        const int64_t size = c.K / c.groups, g = smaller(k / size, c.groups - 1);
        end = g + 1 < c.groups ? (g + 1) * size : INT64_MAX;
        for (int l = 0; l < VL; l++) {
            const int64_t at = n[l] * c.groups + g;
            if constexpr (CODES == NIBBLES) scale[l] = factor(c.scale, at), zero[l] = factor(c.zero, at);
            else if constexpr (CODES == NESTED) step[l] = ((const int8_t*)c.step)[at], offset[l] = ((const int8_t*)c.zero)[at];
        }
    }
    vf numbers(vi codes) const {
        if constexpr (CODES == BYTES) return floats(codes);
        if constexpr (CODES == NIBBLES) return floats(codes) * scale - zero;
        return floats(((codes * step - offset) << 24) >> 24);  // what passes 127 on the way comes back
    }
};

static void fill(const Call& c, int64_t n0, int64_t first, int64_t last, float* panel) {
    for (int64_t side = 0; side < OUTPUTS; side += VL) {
        int64_t n[VL];
        const uint8_t* codes[VL];
        for (int l = 0; l < VL; l++) n[l] = smaller(n0 + side + l, c.N - 1), codes[l] = c.codes + n[l] * c.row;
        Group group;
        for (int64_t k = first; k < last; k += VL) {
            group.turn_to(c, n, k);
            vf x[VL];
            for (int l = 0; l < VL; l++) x[l] = (vf)codes_at(c, codes[l], k);
            turn(x);
            for (int l = 0; l < VL; l++) store(panel + (k - first + l) * OUTPUTS + side, group.numbers((vi)x[l]));
        }
    }
}

static void finish(const Call& c, int64_t m0, int64_t rows, int64_t n0, const float* sums, const float* scale) {
    for (int64_t n = 0; n < OUTPUTS && n0 + n < c.N; n++) {
        const float s = CODES == NIBBLES ? 1.f : factor(c.scale, n0 + n), bias = c.bias ? c.bias[n0 + n] : 0.f;
        for (int64_t m = 0; m < rows; m++)
            c.y[(m0 + m) * c.N + n0 + n] = sums[m * OUTPUTS + n] * s * (scale ? scale[m0 + m] : 1.f) + bias;
    }
}

extern "C" int run(const Call* given, const float* scale) {
    const Call& c = *given;
    const int64_t panels = (c.N + OUTPUTS - 1) / OUTPUTS, strips = (c.M + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(c.threads)
    {
        Workspace own((DEPTH + STRIP) * OUTPUTS);
        float *panel = own.data, *sums = panel + DEPTH * OUTPUTS;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * strips; task++) {
            const int64_t n = task / strips * OUTPUTS, m = task % strips * STRIP, rows = smaller(STRIP, c.M - m);
            for (int64_t k = 0; k < c.K; k += DEPTH) {
                const int64_t last = smaller(k + DEPTH, c.K);
                fill(c, n, k, last, panel);
                const float* x = c.x + m * c.K + k;
                if (k) product<true>(rows, OUTPUTS, last - k, x, c.K, panel, OUTPUTS, sums, OUTPUTS);
                else product<false>(rows, OUTPUTS, last - k, x, c.K, panel, OUTPUTS, sums, OUTPUTS);
            }
            finish(c, m, rows, n, sums, scale);
        }
    }
    return 0;
}
