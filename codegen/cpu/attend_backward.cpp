// Gradients of `attend` on a processor: weights are made again tile by tile, from what is kept of every row.
//
//   dv_j = sum_i w_ij do_i      dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i
//
// A task is a key head, or a share of its blocks of queries with sums of its own, which are added up at the end.
// In front of this text stand attend_walk.hpp, attend_rows.hpp, whose letters are used, and the file of a normaliser, which makes
// w and ds from q . k and do . v: begin_row, weigh, spent.

static void tile(const Call& c, Block& x, const Head& head, int64_t number, int32_t i0, int32_t i1) {
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), first = number * BN, width = smaller<int64_t>(BN, c.M - first);
    const int some = Spec::seen((int)x.b, (int)x.h, i0, i1, (int32_t)first, (int32_t)(first + width - 1));
    if (some == 0) return;
    const int64_t lanes = rounded(width, VL);
    product<false>(x.count, lanes, c.D, x.q, D, head.kt + number * c.D * LN, LN, x.s, LN);
    product<false>(x.count, lanes, c.Dv, x.go, Dv, head.vt + number * c.Dv * LN, LN, x.w, LN);
    if (some == 2 && width % VL == 0) weigh<true>(c, x, width, (int32_t)first); else weigh<false>(c, x, width, (int32_t)first);
    product_of_columns<true>(width, Dv, x.count, x.w, LN, x.go, Dv, head.dv + first * Dv, Dv);
    product_of_columns<true>(width, D, x.count, x.s, LN, x.q, D, head.dk + first * D, D);
    product<true>(x.count, D, width, x.s, LN, head.k + first * D, D, x.dq, D);
}

// A block of query rows against every tile that they can reach.
static void block_of(const Call& c, Block& x, const Head& head) {
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), all = (c.M + BN - 1) / BN;
    const int32_t i0 = (int32_t)(x.first + c.shift), i1 = i0 + (int32_t)x.count - 1;
    for (int64_t r = 0; r < x.count; r++) {
        copy(row(c.q, x.b, x.h, x.first + r), c.q.d, c.D, D, x.q + r * D);
        copy(row(c.go, x.b, x.h, x.first + r), c.go.d, c.Dv, Dv, x.go + r * Dv);
        begin_row(c, x, r);
    }
    memset(x.dq, 0, sizeof(float) * x.count * D);
    const int32_t* listed = c.list ? c.list + x.b * c.list_b + x.h * c.list_h + x.first / BM * c.list_q : nullptr;
    walk({listed, c.listed, all, true}, i0, i1, [&](int64_t n, int64_t) {
        tile(c, x, head, n, i0, i1);
        return spent(c, x);
    });
    for (int64_t r = 0; r < x.count; r++) {
        float* to = row(c.dq, x.b, x.h, x.first + r);
        for (int64_t d = 0; d < c.D; d++) to[d] = x.dq[r * D + d];
    }
}

extern "C" void run(const Call* call) {
    const Call& c = *call;
    const int64_t D = rounded(c.D, VL), Dv = rounded(c.Dv, VL), tiles = (c.M + BN - 1) / BN, keys = tiles * BN;
    const int64_t heads = c.B * c.Hk, group = c.H / c.Hk, blocks = (c.N + BM - 1) / BM;
    const int64_t shares = heads >= c.threads ? 1 : smaller<int64_t>((c.threads + heads - 1) / heads, larger<int64_t>(blocks, 1));
    const int64_t wide = tiles * LN;  // keys with the room that whole vectors take in each tile
    Workspace packed(heads * (wide * (c.D + c.Dv) + keys * D)), sums(heads * shares * keys * (D + Dv));
    memset(sums.data, 0, sizeof(float) * heads * shares * keys * (D + Dv));
    const auto head = [&](int64_t n, int64_t share) {
        float *at = packed.data + n * (wide * (c.D + c.Dv) + keys * D), *own = sums.data + (n * shares + share) * keys * (D + Dv);
        return Head{at, at + wide * c.D, at + wide * (c.D + c.Dv), own, own + keys * D};
    };
#pragma omp parallel num_threads(c.threads)
    {
        const NoSubnormals flushing;
        Table tables[TABLES + 1];  // gradients of tables are each thread's own, one after the other
        Call c = *call;
        for (int n = 0; n < TABLES; n++) {
            tables[n] = call->t[n];
            if (n >= LEARNED) tables[n].data = (float*)tables[n].data + tables[n].size[0] * tables[n].stride[0] * omp_get_thread_num();
        }
        c.t = tables;
        Workspace own(BM * (D + Dv + LN + LN + D));
        Block x;
        x.q = own.data, x.go = x.q + BM * D, x.s = x.go + BM * Dv, x.w = x.s + BM * LN, x.dq = x.w + BM * LN;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * tiles; n++) pack(c, n / tiles / c.Hk, n / tiles % c.Hk, n % tiles, head(n / tiles, 0));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * shares; task++) {
            const int64_t n = task / shares, share = task % shares;
            const Head mine = head(n, share);
            for (int64_t g = 0; g < group; g++)
                for (int64_t which = share; which < blocks; which += shares) {
                    x.b = n / c.Hk, x.h = n % c.Hk * group + g, x.first = which * BM;
                    x.count = smaller<int64_t>(BM, c.N - x.first);
                    block_of(c, x, mine);
                }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * c.M; n++) {
            const int64_t at = n % c.M, b = n / c.M / c.Hk, h = n / c.M % c.Hk;
            float *dk = row(c.dk, b, h, at), *dv = row(c.dv, b, h, at);
            for (int64_t d = 0; d < c.D; d++) { float x = 0; for (int64_t s = 0; s < shares; s++) x += head(n / c.M, s).dk[at * D + d]; dk[d] = x; }
            for (int64_t d = 0; d < c.Dv; d++) { float x = 0; for (int64_t s = 0; s < shares; s++) x += head(n / c.M, s).dv[at * Dv + d]; dv[d] = x; }
        }
    }
}
