"""The cascades of the analysis' specification, in its notation, and what must be derived for each from equations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`reads`: tensor, fiber, passes as written, fewest passes, kinds of correction."""

    name: str
    text: str
    reads: tuple[tuple[str, str, int, int, str], ...]
    keys: str = "m"
    queries: str = "p"
    category: str = ""
    soft: str = ""
    hard: str = ""
    sweeps: int = 0
    poly: bool = True
    unsafe: bool = False
    changes: tuple[tuple[str, str, str], ...] = ()  # (barrier, reduction, type)
    written: str = ""
    running: str = ""
    run: bool = True


LOGITS = "in Q[e, p], K[e, m], V[f, m]; QK[m, p] = sum[e](Q * K); "
SOFT = LOGITS + "GM[p] = max[m](QK); SN[m, p] = exp(QK - GM); SD[p] = sum[m](SN); "
SOFTMAX = SOFT + "A[m, p] = SN / SD; "
L1 = LOGITS + "S[m, p] = softplus(QK); D[p] = sum[m](S); A[m, p] = S / D; "
AGENT = (
    "SA[a, m] = sum[e](AG * K); GA[a] = max[m](SA); NA[a, m] = exp(SA - GA); DA[a] = sum[m](NA); AA[a, m] = NA / DA; "
    "AV1[a, f] = sum[m](AA * V); SB[p, a] = sum[e](Q * AG); GB[p] = max[a](SB); NB[p, a] = exp(SB - GB); "
    "DB[p] = sum[a](NB); B[p, a] = NB / DB; AV[p, f] = sum[a](B * AV1); out AV"
)
LINEAR = "in Q[e, p], K[e, m], V[f, m]; FQ[e, p] = elu(Q) + 1.0; FK[e, m] = elu(K) + 1.0; "
QUADRATIC = "1-pass quadratic"

CASES = (
    Case("a product that is read again", "in A[k], B[k]; Y[] = sum[k](A * B); Z[] = sum[k](Y * A); out Z",
         (("A", "k", 2, 1, "hoist"), ("B", "k", 1, 1, "none")), keys="k", queries="", soft="Y",
         changes=(("Y", "Z", "S{Y: 1}"),)),
    Case("two sums and their product", "in A[k], B[k]; Y[] = sum[k](A * B); X[] = sum[k](A); Z[] = Y * X; out Z",
         (("A", "k", 1, 1, "none"), ("B", "k", 1, 1, "none")), keys="k", queries=""),
    Case("one tensor after the other", "in A[k], B[k]; Y[] = sum[k](A); Z[] = sum[k](Y * B); out Z",
         (("A", "k", 1, 1, "none"), ("B", "k", 1, 1, "none")), keys="k", queries="", sweeps=2),
    Case("softmax", SOFTMAX + "AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 3, 1, "hoist, running"), ("V", "m", 1, 1, "none"), ("Q", "p", 1, 1, "none")),
         category=QUADRATIC, soft="GM SD",
         changes=(("GM", "SD", "S{e^GM: -1}"), ("GM", "AV", "I"), ("SD", "AV", "S{SD: -1}")),
         written="F*P0 + 2*M*P0 + M0*P0 + 2*P0", running="F*P0 + M0*P0 + 2*P0"),
    Case("deferred division", SOFT + "SNV[f, p] = sum[m](SN * V); AV[f, p] = SNV / SD; out AV",
         (("K", "m", 2, 1, "running"), ("V", "m", 1, 1, "none")), category=QUADRATIC, soft="GM",
         changes=(("GM", "SNV", "S{e^GM: -1}"),)),
    Case("softmax without a maximum",
         LOGITS + "SN[m, p] = exp(QK); SD[p] = sum[m](SN); SNV[f, p] = sum[m](SN * V); AV[f, p] = SNV / SD; out AV",
         (("K", "m", 1, 1, "none"),), category=QUADRATIC, unsafe=True),
    Case("softmax whose weights are asked for", SOFTMAX + "AV[f, p] = sum[m](A * V); out AV, A",
         (("K", "m", 3, 2, "running, hard"),), category="2-pass quadratic", soft="GM", hard="SD",
         changes=(("GM", "SD", "S{e^GM: -1}"),)),
    Case("a maximum for each tile",
         "in Q[e, p], K[e, m1, m0], V[f, m1, m0]; QK[m1, m0, p] = sum[e](Q * K); LM[m1, p] = max[m0](QK); "
         "GM[p] = max[m1](LM); SLN[m1, m0, p] = exp(QK - LM); SLD[m1, p] = sum[m0](SLN); PRM[m1, p] = exp(LM - GM); "
         "GD[p] = sum[m1](SLD * PRM); A[m1, m0, p] = SLN * PRM / GD; AV[f, p] = sum[m1, m0](A * V); out AV",
         (("K", "m1 m0", 2, 1, "hoist, running"), ("V", "m1 m0", 1, 1, "none")), keys="m1 m0", category=QUADRATIC,
         soft="GM GD"),
    Case("running maximum and sum over tiles",
         "in Q[e, p], K[e, m1, m0], V[f, m1, m0]; QK[m1, m0, p] = sum[e](Q * K); LM[m1, p] = max[m0](QK); "
         "RM[m1, p] = prefix_max[m1](LM); RB[m1, p] = prefix_max_before[m1](LM); SLN[m1, m0, p] = exp(QK - RM); "
         "SLD[m1, p] = sum[m0](SLN); PRM[m1, p] = exp(RB - RM); RD[m1, p] = prefix_sum[m1](SLD, decay=PRM); "
         "SLNV[m1, f, p] = sum[m0](SLN * V); RNV[m1, f, p] = prefix_sum[m1](SLNV, decay=PRM); "
         "LNV[f, p] = last[m1](RNV); LD[p] = last[m1](RD); AV[f, p] = LNV / LD; out AV",
         (("K", "m1 m0", 1, 1, "none"), ("V", "m1 m0", 1, 1, "none")), keys="m1 m0", category=QUADRATIC),
    Case("linear attention", LINEAR + "KV[e, f] = sum[m](FK * V); KS[e] = sum[m](FK); NUM[f, p] = sum[e](FQ * KV); "
         "DEN[p] = sum[e](FQ * KS); AV[f, p] = NUM / DEN; out AV",
         (("K", "m", 1, 1, "none"), ("V", "m", 1, 1, "none"), ("Q", "p", 1, 1, "none")), category="factored"),
    Case("causal linear attention",
         "in Q[e, m], K[e, m], V[f, m]; FQ[e, m] = elu(Q) + 1.0; FK[e, m] = elu(K) + 1.0; "
         "KV[m, e, f] = prefix_sum[m](FK * V); KS[m, e] = prefix_sum[m](FK); NUM[f, m] = sum[e](FQ * KV); "
         "DEN[m] = sum[e](FQ * KS); AV[f, m] = NUM / DEN; out AV",
         (("K", "m", 1, 1, "scan fwd"), ("V", "m", 1, 1, "scan fwd"), ("Q", "m", 1, 1, "none")), queries="m",
         category="factored, recurrent"),
    Case("sigmoid", LOGITS + "A[m, p] = sigmoid(QK - 3.0); AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 1, 1, "none"), ("V", "m", 1, 1, "none")), category=QUADRATIC, running="F*P0 + M0*P0"),
    Case("stick-breaking", LOGITS + "LB[m, p] = softplus(QK); CS[m, p] = suffix_sum[m](LB); "
         "A[m, p] = exp(QK - CS); AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 1, 1, "scan rev"), ("V", "m", 1, 1, "none")), category=QUADRATIC),
    Case("stick-breaking, the total less the forward prefix",
         LOGITS + "LB[m, p] = softplus(QK); TOT[p] = sum[m](LB); FP[m, p] = prefix_sum_before[m](LB); "
         "CS[m, p] = TOT - FP; A[m, p] = exp(QK - CS); AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 2, 1, "running, scan fwd"),), category=QUADRATIC, soft="TOT",
         changes=(("TOT", "AV", "S{e^TOT: -1}"),)),
    Case("softplus over its sum", L1 + "AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 2, 1, "hoist"),), category=QUADRATIC, soft="D"),
    Case("softplus over its sum, weighed again by relu and a power",
         L1 + "R[m, p] = relu(A * 4.0 - 0.25) ** 2; D2[p] = sum[m](R); B[m, p] = R / D2; "
         "AV[f, p] = sum[m](B * V); out AV",
         (("K", "m", 3, 2, "hoist, hard"),), category="2-pass quadratic", soft="D2", hard="D"),
    Case("weighed again by a power alone",
         L1 + "R[m, p] = (A * 4.0) ** 3; D2[p] = sum[m](R); B[m, p] = R / D2; AV[f, p] = sum[m](B * V); out AV",
         (("K", "m", 3, 1, "hoist"),), category=QUADRATIC, soft="D D2"),
    Case("weighed again by a straight line, polynomials allowed",
         L1 + "R[m, p] = A * 4.0 - 0.25; D2[p] = sum[m](R); B[m, p] = R / D2; AV[f, p] = sum[m](B * V); out AV",
         (("K", "m", 3, 1, "hoist, poly"),), category=QUADRATIC, soft="D D2"),
    Case("weighed again by a straight line, polynomials not allowed",
         L1 + "R[m, p] = A * 4.0 - 0.25; D2[p] = sum[m](R); B[m, p] = R / D2; AV[f, p] = sum[m](B * V); out AV",
         (("K", "m", 3, 2, "hoist, hard"),), category="2-pass quadratic", soft="D2", hard="D", poly=False),
    Case("softmax cut off below", SOFTMAX + "C[m, p] = relu(A - 0.1); AV[f, p] = sum[m](C * V); out AV",
         (("K", "m", 3, 2, "running, hard"),), category="2-pass quadratic", soft="GM", hard="SD"),
    Case("relu squared over its sum",
         LOGITS + "S[m, p] = relu(QK) ** 2; D[p] = sum[m](S); A[m, p] = S / D; AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 2, 1, "hoist"),), category=QUADRATIC, soft="D"),
    Case("keys rounded by the largest of each channel",
         "in Q[e, p], K[e, m], V[f, m]; SC[e] = max[m](abs(K)); KI[e, m] = floor(K / SC * 127.0 + 0.5); "
         "QK[m, p] = sum[e](Q * KI * SC); A[m, p] = sigmoid(QK * 0.01); AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 2, 2, "hard"),), category="2-pass quadratic", hard="SC"),
    Case("layer norm along d, polynomials allowed",
         "in X[d], W[d], L[]; SX[] = sum[d](X); MU[] = SX / L; VAR[] = sum[d]((X - MU) ** 2); "
         "Y[d] = (X - MU) / sqrt(VAR / L + 1e-05); O[] = sum[d](Y * W); out O",
         (("X", "d", 3, 1, "hoist, poly"),), keys="d", queries="", soft="SX VAR"),
    Case("layer norm along d, polynomials not allowed",
         "in X[d], W[d], L[]; SX[] = sum[d](X); MU[] = SX / L; VAR[] = sum[d]((X - MU) ** 2); "
         "Y[d] = (X - MU) / sqrt(VAR / L + 1e-05); O[] = sum[d](Y * W); out O",
         (("X", "d", 3, 2, "hoist, hard"),), keys="d", queries="", soft="VAR", hard="SX", poly=False),
    Case("agents made of the queries",
         "in Q[e, p], K[e, m], V[f, m], POOL[a, p]; AG[a, e] = sum[p](POOL * Q); " + AGENT,
         (("K", "m", 3, 1, "hoist, running"), ("AV1", "a", 1, 1, "none"), ("Q", "p", 2, 2, "hard")),
         category="compressed"),
    Case("learned agents", "in Q[e, p], K[e, m], V[f, m], AG[a, e]; " + AGENT,
         (("K", "m", 3, 1, "hoist, running"), ("Q", "p", 1, 1, "none")), category="compressed"),
    Case("the k best", LOGITS + "T[m, p] = topk_2[m](QK); S[m, p] = sigmoid(QK) * T; AV[f, p] = sum[m](S * V); out AV",
         (("K", "m", 2, 2, "hard"),), category="2-pass quadratic", hard="T", run=False),
    Case("scans that run against each other",
         LOGITS + "LB[m, p] = softplus(QK); C1[m, p] = prefix_sum[m](LB); C2[m, p] = suffix_sum[m](LB); "
         "A[m, p] = exp(-C1 - C2); AV[f, p] = sum[m](A * V); out AV",
         (("K", "m", 2, 2, "scan fwd, scan rev"),), category="2-pass quadratic", run=False),
)  # fmt: skip
