"""Which plan a scan in chunks gets where the table of measured choices (tuned.py) has no row; the reasons are RULES."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

from lmoe_compiler.codegen.cost import DTYPE_BYTES, device
from lmoe_compiler.codegen.plan import KEPT_SPAN, Call, Choice, Tuning
from lmoe_compiler.ir.nodes import UNARY, Decay, Program, Read, Step, topological

RULES = """\
H200, B2 T16384 H16 K = V = 128, bf16; microseconds of one kernel
scan tile 64 values, 4 warps   the least M of a wgmma with A in registers; 8 warps were slower in every kernel here
chunk 32, 3 stages, solves     forward 131 + 518 against 337 + 441 at chunk 64; backward 2280 against 2650
chunk 64, scalar decay         one dependent product a chunk: the longer chunk halves the steps
scalar decay, forward          pairs once, by 2 warps (83; 4 warps 98, 1 warp 89): scan 182 against 298, which keeps
                               all in registers without spills; at B1 T8192 H96 487 against 505
scalar decay, backward         with states of chunks, pairs once only where log decays are activations: Mamba-2 1866
                               against 2005 (its adjoint 291 against 484); simple GLA 1607 against 1559
prepare: 1 warp                the triangular inverse is latency: many small programs hide it (138; 4 warps 368)
prepare, levels                16 keys and 1 warp (289; 2 warps 381; 64 keys, 4 warps 701); with solves 421 (540); its
                               loop over keys in 3 stages: GLA 251 (1 stage 285), KDA 343 (404), RWKV-7 801 with 2
                               (899); where log decays are activations in 1: HGRN2 316 (2 stages 345). Tiles of 32
                               keys: GLA 209 (16: 246), KDA 374 (340), HGRN2 384 (315)
near and far kernels           apart 289 + 3, in one kernel 529 (prepare of GLA); gradients of KDA 1856 -> 1040
near ones without levels       and their running sums merged: gradients of KDA 812 (925), RWKV-7 1126 (1582), HGRN2
                               1022 (1202), GLA 1026 (1107); prepare of RWKV-7 557 (738)
products, solves               values contracted apart: 617 + 433 against 1496. A loop over tiles of 64 keys: delta
                               rule 543 in 2 stages (592 without), RWKV-7 973 in 1 (991; spills 16 B, 136), but KDA
                               747 (618), gated delta rule 763 (661)
gradients, solves              1 warp walks tiles of 32 keys: delta rule 392 (of 16: 393); gated delta rule of 16 in 3
                               stages, 464, spills 24 B (of 32: 426, 72 B). What is needed of pairs after the loop is
                               loaded again: kept, it spills. Numbers of tokens loaded after it: 457, 64 B; KDA 751
                               (743)
gradients, solves and levels   2 warps walk tiles of 16 keys in 3 stages: KDA 744 (2 stages 805; 4 warps, of 32: 1490;
                               1 warp 980), RWKV-7 in 2 for the spills (3 stages 1 % less of a backward; 4 warps 2742)
gradients, diagonal            tiles of 64 keys, a loop of 3 stages over tiles of 32 values: 1075 (no loop 1122)
gradients, no decay            in fp32 the same; else scans of their own that store nothing of chunks, in 2 stages:
                               whole backward 589 (as others 829; 3 stages 639; keys and values whole, 8 warps 743), B1
                               T8192 H96 793 (1189), B4 T4096 H64 1052 (1594), B1 T65536 H8 604 (886), B1 T2048 H32 88
                               (250). Reverse scans with an SM to themselves in 3 stages: B4 T2048 134 (all in 3: 149,
                               in 2: 173; others 217). K = V = 64: tiles of 64 in 3 stages, 28 (32: 50; others 47).
                               K = V = 256: pairs by prepare, tiles of 128, 8 warps, 3 stages, 1272 (2 stages 1839,
                               tiles of 64 1728; others 3584), no spills
gradients, scalar decay        of states of chunks (K = V = 64, 256): tiles of 32 keys in 3 stages: 584, RetNet 604,
                               no spills (2 stages 604, 617; of 64 keys: 520 and 521, but 92 and 116 B, over the budget;
                               tiles of values: 644, 671); Mamba-2 695. Sums over pairs taken from the products of
                               queries and keys: 569, but dg 5 times less exact
the same after the adjoint     scans for what systems solve, then products of pairs once, then keys. Whole backward, as
                               others in brackets: delta rule 1393 (1916), B1 T8192 H96 1915 (2821), B4 T2048 359
                               (508), B4 T4096 H64 2470 (3459), B1 T2048 H32 204 (252), K = V = 256 B8 T2048 H32 5539
                               (6359; 4003 MiB to 1875); pairs in the scans themselves: 1488, 2057, 366. Gated 1884
                               (2296), 2520 (3194), 453 (568), 3290 (4021), 283 (301), 7490 (8019). Simple GLA, chunks
                               of 32: 946 (1097), 1301 (1539), 247 (301), RetNet 1034 (1164), Mamba-2 1176 (1327). Not
                               K = V = 32, delta rule B8 T2048 H16: 384 (358); simple GLA of 64: 101 (65)
their <S, d.S>                 followed by sums of numbers from both ends of a span: gated 1884 (from its start only
                               1858), B1 T8192 H96 2520 (2484), B4 T2048 453 (447), simple GLA 946 (913), 1301 (1286),
                               247 (234). Error of dg in bf16 at B4 T2048, gates times 20, 1, 0.3, 0.1, 0.03, 0.01, 0:
                               gated 0.0015, 0.0018, 0.0041, 0.0058, 0.0056, 0.0055, 0.0039 (from its start 0.0017,
                               0.0017, -, 0.0133, -, 0.0076, 0.0049; of states 0.0023, 0.0024, -, 0.0028, -, 0.0035,
                               0.0040; the library 0.0024, -, -, 0.0034, -, 0.0095, 0.0150). The product where a span
                               ends by states_keys: no scan of d.S beside it, simple GLA 1032, 1397, 268. Summed up
                               from gradients of states, stored for each chunk: gated 2106, B1 T8192 H96 2876
their scans by keys            tiles of 64 keys, 4 warps, 3 stages: gated 2446 at B1 T8192 H96 (2 stages 2705; tiles of
                               32: 2690, of 128, 8 warps: 2770; all loads ahead 2800). Row factors on the keys, not on
                               the values: no spills (480 B; 3241). Simple GLA all loads ahead: Mamba-2 1150 (1235),
                               others the same; chunks of 64: 1001 (961), 100 B of spills. K = V = 64, tiles of 32, 2
                               warps: delta rule B8 T1024 H8 124 (64, 4 warps: 140), gated 171 (178); without products
                               149, 209, and 8 and 7 MiB less. K = V = 256, of 32 in 2 stages: 5511 (of 64, 8 warps:
                               5962), gated 7515 (8527), 136 B of spills
their products of pairs        2 warps, keys in tiles of 64: B1 T8192 H96 delta rule 339 (4 warps 388), at most 168
                               registers 265; gated 383 (552; with 168 200 B of spills)
their sums of numbers          3 stages, all loads ahead: gated B4 T2048 444 (1 stage 459); 1 warp or 2, 2 to 4 stages
                               for those from the end: 462 to 470
far chunks                     RWKV-7's gradients in two kernels: 0 and 36 B of spills (in one 192; 324 where all is
                               loaded before the sums). A kernel for each result: where all chunks are far 73 ms
                               (26.6 in one), and 4483 us in all where none is (4274)
gradients of vector decays     pairs' terms of rows as products take them, rounded: errors of dg in bf16 at B1 T2048 H4
                               0.0033 for 0.0082 (GLA), 0.0037 for 0.0084 (KDA), 0.0033 for 0.0066 (RWKV-7), 0.0025 for
                               0.0064 (HGRN2); the library's GLA 0.0018, KDA 0.0030. Backward of GLA 2034 (1993), KDA
                               2712 (2699), HGRN2 2202 (2150), RWKV-7 3948 (3826; 80 B of spills, in 2 stages 52 B,
                               3994). In scans that follow <S, d.S>: no more exact (interpreted)
contractions apart             of scalar and vector decays too: simple GLA 381 + 347 (543 in one), GLA 485 + 505
                               (1112), HGRN2 489 + 758 (1213), no spills; not done: too little, and products are
                               rounded
all loads ahead                scans with decays: spans of gated 146 (235), KDA 160 (233), GLA 84 (104), with their
                               maps 483 (583; maps not ahead 555), KDA 721 (803); scan of simple GLA 49 (62) at B4
                               T2048, 325 (357) at B1 T8192 H96, GLA 53 (61), RWKV-7 652 (697); states of gated 345
                               (383), KDA 648 (758), RWKV-7 1418 (1568), and its adjoint 1161 (1255). Not: other
                               adjoints (gated 1083, 1009; KDA 1372, 1202), states of GLA 267 (244).
                               Loops over tiles of keys: gradients of KDA 2720 (2708), RWKV-7 3787 (3810), not done
fewer registers                168 or 128 spill in nearly every kernel: whole calls take 1.1 to 4 times as long
chunk 64, solves or levels     with 4 warps in prepare and gradients, 8 in products: delta rule 2265 (2124), gated
                               3034 (2530), KDA 5186 (3269). GLA with prepare of 2 warps and 16 keys, gradients of 32:
                               1895 (2034), B4 T2048 440 (510), 733 MiB (854), as exact, but gradients of far chunks
                               spill 504 B, a chunk of 64 is far sooner, and with K = V = 64 Triton 3.7.1 reads shared
                               memory out of range (a product with a transposed block of registers): not done
adjoint, solves                tiles of 32 values where tiles of 64 leave SMs idle (867; 909), 4 stages (830; 847)
scan, no decay                 3 stages where not cut: B4 T2048 47 (2 stages 80, 4: 69), B1 T8192 H96 352 (368), B4
                               T4096 H64 348 (373); in spans 2: 189 (191)
scan, scalar decay             3 stages where an SM has one program: B4 T2048 62 (79); not else: 532 (350) at B1 T8192
                               H96
scan, diagonal                 4 stages: B4 T4096 H64 320 (3 stages 397), 165 (168), B1 T8192 H96 302 (298). Not with
                               solves: delta rule 57 (61) at B4 T2048, but gated 71 (69), KDA 74 (72)
few heads, solves              tiles of 16 values where those just fill the SMs and no spans do: B1 T65536 H8, scan 1391
                               (64: 1574), gated 1559 (1882), KDA 1587 (1861), adjoint 1864 (2390), gated 2400 (2966),
                               KDA 2236 (2713)
K = V = 64, B8 T1024 H8        tiles of 32 values and 3 stages: linear attention 17.7 (64, 2 stages: 20.1; cut in two
                               18.0), simple GLA 27.4 in one kernel (37.5 with pairs apart), delta rule of 16: 27.0
                               (29.2), gated 29.5 (35.0); adjoint of GLA 32 (49), simple GLA 30 (37; tiles of 32:
                               31.6); gradients without a loop: GLA 59.7 (113.8), delta rule 24.0 (28.0), gated in tiles
                               of 16 keys 38.5 (42.4)
K = V = 256, B8 T2048 H32      scans of tiles of 128 values with 8 warps, pairs apart: linear attention 513 (1726),
                               simple GLA 989 (1216), GLA 921 (1415), delta rule 837 (1259), KDA 1685 (2117), not
                               gated: 1322 (1169); states and adjoint so too without solves or scalar decays: GLA 2183
                               (2500), states of delta rule 897 (1326), KDA 1381 (1519). Gradients of Mamba-2 with 64
                               keys 3397 (32: 7572); prepare of delta rules in tiles of 64 keys 160 (218). These spill
                               up to 132 B (RWKV-7's adjoint 368). All loads ahead where scans have decays: forward of
                               simple GLA 594 (999),
                               Mamba-2 610 (1008), RetNet 598 (987), KDA 1414 (1690), GLA 927 (938); backward of simple
                               GLA with the adjoint so too 5206 (5773), GLA 5203 (5546), states of KDA 1236 (1478),
                               states_keys of gated 2067 (2210), not its adjoint_keys 2021 (1939). Without spills:
                               forward in tiles of 64 or 32 values delta rule 1421, 1234 (841), KDA 2085, 2106;
                               gradients of simple GLA in 3 stages 3728 (3246), 8 warps 4743; states_keys of gated of
                               16 keys 2383
rows as base and offsets       in scans: spans of scalar decays 70 (87), states of GLA 235 (286), adjoint of simple
                               GLA 285 (317), of RetNet 303 (280); not: adjoint of KDA 831 (763), gradients of RetNet
                               557 (531), scan of linear attention 192 (185)
spans                          as many as just fill the SMs at 2 blocks each; one more wave costs 30 %; of 512 tokens
                               at least, if there are four: B1 T2048 H32, linear attention 41 + 113 (of 1024: 53 +
                               127), simple GLA 59 + 159 (71 + 176), GLA 81 + 267 (96 + 282)
spans, B4 T2048                128 programs fill the SMs: GLA whole 62 (two spans 31 + 45), adjoint 99 (32 + 80),
                               linear attention 47 (17 + 53), simple GLA 62 (21 + 51)
spans of matrices              forward with solves: B1 T65536 H8, delta rule 552 in 8 spans (in 16: 562; whole, tiles
                               of 16 values: 1521; tiles of 32 in spans: 847), gated 668 (1685), KDA 877 (1927), RWKV-7
                               1326 in 16 (2517); B1 T16384 H8 168 (382), KDA 257 (497); B1 T8192 H16 156 in 4 (216),
                               246 (298); four at B2 T16384 H16: 440 (547), gated 585 (616), KDA 807 (833), but RWKV-7
                               1291 (1256); two there: 530, KDA 863; B1 T2048 H32: 87 (78). Errors against float64 stay
                               the same to three digits. Of a backward that stores nothing of chunks, eight at least:
                               B1 T65536 H8 1737 in 16 (in 8: 2344, in 32: 1883, whole 3179; before 2758), tiles of 32
                               values 1911, maps in 3 stages 1752 (4: 1724); B1 T16384 H8 508 (whole 964), B1 T8192
                               H16 491 (615); B2 T16384 H16 1882 in eight (1812). Not of others: delta rule in sections
                               of 16384 2763 (two side by side 2903), KDA 3681 (3559)
states kept in bf16            every 512 tokens, so that short sequences have sections too: at B4 T2048 KDA 977 us,
                               418 MiB against 947, 645; delta rule 660, 256 against 595, 569
side by side                   in graphs, scans of whole sequences first: states and adjoint of the delta rule, backward
                               1990 (one after another 2187; states first 2645: the adjoint's few programs share SMs
                               then and take twice as long), gated 2386 (2687), KDA 3033 (3165); B4 T2048: delta rule
                               507 (589), simple GLA 300 (342). Asking for half of an SM's shared memory, and a high
                               priority, keep these programs apart
sections side by side          half as long, two in memory: KDA 2719 (2986), RWKV-7 4217 (4369); B1 T65536 H8: delta
                               rule 2899 (3338; 4161 with programs not kept apart, 3193 without priority), gated 3479
                               (4003), KDA 3449 (4555). Delta rule 2085 (1953), gated 2471 (2346), simple GLA 1146
                               (1121), GLA 1942 (2021, with 56 kernels for 28): not done. Nor forward: delta rule 586
                               (540), KDA 873 (831)
sections, recomputed           two of 4096 tokens at a time beside the adjoint where it leaves SMs idle: delta rule
                               1505 (whole 1700; of 8192 1504, of 2048 1544; one by one 1691), B2 T65536 H16 5786
                               (6706; of 16384 8660); not B1 T8192 H96: 2025, B4 T2048: 373 (370), B1 T65536 H8: 1839
                               (in spans 1737), linear attention 659 (581). Gated 1862 (whole 1975; of 8192 1841, of
                               2048 1919), B1 T65536 H8 in spans 2091 (of 8192 3474); simple GLA 914 (in four spans
                               961, in eight 950)
sections                       forward and backward of GLA 2591 us, 2000 MiB; in 4 sections 2772, 1016; in 8 3165, 847
                               delta rule 2565 us, 2403 MiB; 4 sections 2631, 1016; 8 sections 2777, 783
fp32, forward                  chunk 32: linear attention 1436 (chunk 16: 2062, 64: 1809), simple GLA 1751 (2007,
                               3164), GLA 1957 (2404); solves in tiles of 16 values: delta rule 3146 (of 32: 4204;
                               chunk 16: 4014), KDA 5391 (4921), RWKV-7 8132 (9502)
fp32, backward                 chunk 32: linear attention 3932 (16: 6280), GLA 5770 (6639). Chunk 16: delta rule 10862
                               (12667; with the adjoint in tiles of 32 values, not 16: 11259, and those were compared
                               with float64 at K = V = 128), simple GLA 9224 (contractions not apart: 9905; chunk 32:
                               10867)
fp32, products                 keys in tiles of 64, a loop of 2 stages over tiles of 32 values: delta rule 3557 (keys
                               in tiles of 32, 1 stage: 8209)"""


@dataclass(frozen=True)
class Kind:
    """What the rules tell recurrences apart by.

    solves      a state's update reads the state: chunks have triangular systems; `general`: along other keys than it
                writes along
    vector      decays differ along an axis; `scalar`: they do not
    activated   log decays are functions of their token's numbers
    normalised  an output is divided by what is read of a state
    wide        an axis is longer than 128; `narrow`: none is longer than 64; `short`: nor than 32
    """

    solves: bool
    general: bool
    vector: bool
    scalar: bool
    activated: bool
    normalised: bool
    wide: bool
    narrow: bool
    short: bool

    @property
    def decays(self) -> bool:
        return self.vector or self.scalar

    @property
    def still(self) -> bool:
        """A state changes by what is written only."""
        return not (self.solves or self.decays)

    @property
    def recomputed(self) -> bool:
        """Gradients are written by scans of their own: where states are large beside rows, if decays are numbers."""
        if self.vector or self.normalised:
            return False
        if self.solves:
            return not self.short
        return self.still or not (self.wide or self.narrow)

    @classmethod
    def of(cls, program: Program, call: Call) -> Kind:
        steps = [item for item in program.body if isinstance(item, Step)]
        decays = [d for s in steps for d in s.decays]
        vector = any(d.factor.axes for d in decays)
        longest = max((size for _, size in call.sizes), default=16)
        return cls(
            any(s.feedbacks for s in steps),
            any({f.key for f in s.feedbacks} - {w.key for w in s.writes} for s in steps),
            vector,
            bool(decays) and not vector,
            any(_activated(program, d) for d in decays),
            normalised(program),
            longest > 128,
            longest <= 64,
            longest <= 32,
        )


@dataclass(frozen=True)
class Load:
    """How full a scan leaves the device.

    cut      sequences are cut into spans
    few      with tiles of 64 values, and not cut, there are fewer programs than SMs
    fewest   the same with tiles of 16 values
    alone    with tiles of 64 values and its spans there is about one program on each SM at most
    """

    cut: bool
    few: bool
    fewest: bool
    alone: bool

    @classmethod
    def of(cls, call: Call, batch: int, length: int, span: int) -> Load:
        whole, least = (_programs(call, batch, tile) for tile in (64, 16))
        parts = -(-length // span) if span else 1
        sms = device().sms
        return cls(parts > 1, not _fills(whole), least <= sms, whole * parts <= 1.1 * sms)


def by_rule(
    program: Program,
    direction: str,
    call: Call,
    batch: int,
    length: int,
    may_recompute: bool = True,
) -> Choice:
    """The choice for a scan in chunks. If it may not recompute, a backward stores what gradients need of chunks."""
    kind, backward = Kind.of(program, call), direction == "backward"
    recompute = backward and may_recompute and kind.recomputed and not call.exact
    chunk = _chunk(kind, call, backward, recompute)
    span, section, overlap = 0, 0, False
    if recompute:
        span, section = _cut_to_recompute(kind, call, batch, length)
        overlap = section > 0
    elif backward:
        section = _section(program, kind, call, batch, length, chunk)
        overlap = _overlaps(kind, call, batch, section)
        section = -(-section // 2 // KEPT_SPAN) * KEPT_SPAN if overlap else section
    elif kind.solves:
        span = _span_of_matrices(kind, call, batch, length, backward)
    if not (kind.solves or recompute):
        span = _span(kind, call, batch, section or length)
    if call.exact:
        choice = _full_precision(kind, backward, chunk)
    else:
        load = Load.of(call, batch, section or length, span)
        choice = _half_precision(kind, backward, chunk, load)
        choice = _recomputing(choice, kind, load) if recompute else choice
    return replace(choice, section=section, overlap=overlap, span=span)


def _chunk(kind: Kind, call: Call, backward: bool, recompute: bool) -> int:
    if call.dtype == "fp32":
        return 16 if kind.normalised or (backward and (kind.solves or kind.scalar)) else 32
    if recompute and kind.scalar:
        return 32
    return 32 if kind.solves or kind.vector or kind.wide or kind.normalised else 64


def _half_precision(kind: Kind, backward: bool, chunk: int, load: Load) -> Choice:
    solves, vector, scalar = kind.solves, kind.vector, kind.scalar
    small = kind.narrow and load.few and not kind.normalised
    once = kind.activated or kind.wide or not (backward or small)
    ahead = kind.decays and not kind.wide
    spans = Tuning(32 if kind.wide else 64, 0, 4, 3, offsets=True, ahead=ahead)
    scan, states, adjoint = _scans(kind, chunk, load, small)
    return Choice(
        chunk=chunk,
        prepare=solves or vector or (kind.wide and not kind.normalised) or (scalar and once),
        prepare_rows=vector,
        products=solves,
        default=scan,
        kernels=(
            ("prepare", _prepare(kind, chunk)),
            ("spans", spans),
            ("spans_matrix", spans),
            ("adjoint_spans", spans),
            ("adjoint", adjoint),
            ("states", states),
            ("products", _products(kind)),
            ("gradients", _gradients(kind)),
        ),
    )


def _recomputing(choice: Choice, kind: Kind, load: Load) -> Choice:
    """With gradients written by scans of their own."""
    return (
        _recomputing_still(choice, kind, load)
        if kind.still
        else _recomputing_after(choice, kind, load)
    )


def _recomputing_still(choice: Choice, kind: Kind, load: Load) -> Choice:
    """Scans that wait for nothing."""
    forward = Tuning(128, 0, 8, 3) if kind.wide else Tuning(64, 0, 4, 3 if kind.narrow else 2)
    reverse = replace(forward, num_stages=3 if load.alone else forward.num_stages)
    kernels = dict(choice.kernels)
    kernels |= {"states_keys": forward, "adjoint": reverse, "adjoint_keys": reverse}
    if kind.wide:
        kernels["prepare"] = Tuning(0, 0, 4, 2, inner=64)
    return replace(choice, recompute=True, kernels=tuple(kernels.items()))


def _recomputing_after(choice: Choice, kind: Kind, load: Load) -> Choice:
    """Scans by keys after the adjoint."""
    scan, kernels = Tuning(64, 0, 4, 3, offsets=True), dict(choice.kernels)
    keys, products = scan, Tuning(0, 0, 2, 2, inner=64, registers=0 if kind.decays else 168)
    if not kind.solves:
        keys, products = replace(scan, ahead=True), Tuning(0, 0, 2, 1)
        kernels |= {"prepare": Tuning(0, 0, 1, 1), "adjoint": keys}
    elif kind.wide:
        keys = replace(scan, block=32, num_stages=2)
        products = replace(products, num_warps=4, registers=0)
    elif kind.narrow:
        keys = replace(scan, block=32, num_warps=2)
        products = Tuning(0, 0, 1, 1) if kind.scalar else products
    states_keys = replace(keys, ahead=keys.ahead or (kind.wide and kind.decays))
    kernels |= {"states_keys": states_keys, "adjoint_keys": keys, "products": products}
    numbers = Tuning(0, 0, 1, 3, ahead=True)
    kernels |= {"inner_products": numbers, "gradients": numbers}
    if kind.solves:
        maps = Tuning(64, 0, 4, 4)
        kernels |= {"adjoint_spans": maps, "adjoint_spans_matrix": maps}
        kernels |= {} if kind.wide else {"states": replace(scan, ahead=kind.decays)}
        kernels |= {"adjoint": replace(scan, offsets=False)} if load.cut else {}
    made = tuple(kernels.items())
    return replace(choice, recompute=True, prepare=True, products=True, kernels=made)


def _prepare(kind: Kind, chunk: int) -> Tuning:
    plain = kind.vector and not kind.activated
    if kind.wide and kind.solves and not kind.vector:
        return Tuning(0, 0, 1, 3, inner=64)
    inner = (32 if plain and not kind.solves else 16) if kind.vector else 0
    return Tuning(0, 0, 2 if chunk == 64 else 1, 3 if plain else 1, inner=inner)


def _scans(kind: Kind, chunk: int, load: Load, small: bool) -> tuple[Tuning, Tuning, Tuning]:
    """A forward's scan, and a backward's states and adjoint."""
    solves, vector, scalar, wide = kind.solves, kind.vector, kind.scalar, kind.wide
    stages = 3 if chunk == 32 or kind.narrow else 2
    ahead = kind.decays and not wide
    scan = Tuning(32 if wide else 64, 0, 4, stages, offsets=solves or kind.decays, ahead=ahead)
    states = replace(scan, num_stages=3 if solves or vector or kind.narrow else 2, offsets=True)
    states = replace(states, ahead=ahead and solves)
    adjoint = replace(scan, offsets=scalar, ahead=ahead and kind.general)
    if wide and not (kind.normalised or kind.general or load.few):
        large = replace(scan, block=128, num_warps=8, ahead=kind.decays)
        if not (solves and scalar):
            scan = large
        if not solves:
            adjoint = replace(large, offsets=scalar)
        if not scalar:
            states = replace(large, num_stages=2, offsets=True)
            adjoint = replace(adjoint, num_stages=2 if vector or not solves else stages)
    elif solves and (small or load.fewest) and not (wide or load.cut):
        scan = replace(scan, block=16)
        states = replace(states, block=16 if small else 64)
        adjoint = replace(adjoint, block=32 if small else 16, num_stages=4)
    elif solves and load.few and not wide:
        adjoint = replace(adjoint, block=32, num_stages=4)
    elif small:
        scan = replace(scan, block=32)
        adjoint = adjoint if scalar else replace(adjoint, block=32, num_stages=4)
    elif vector and not (solves or wide):
        scan = replace(scan, num_stages=4)
    elif (load.alone and not vector) or (kind.still and not load.cut):
        scan = replace(scan, num_stages=3)
    return scan, states, adjoint


def _products(kind: Kind) -> Tuning:
    decays = kind.vector or kind.scalar
    if kind.wide:
        return Tuning(64, 0, 4, 1 if decays else 2, inner=64)
    return Tuning(0, 0, 4, 1 if decays else 2, inner=64 if kind.general or not decays else 0)


def _gradients(kind: Kind) -> Tuning:
    """A loop over small tiles of keys where contractions over values are done; else a loop over values."""
    if kind.normalised:
        return Tuning(0, 0, 8, 1, full=True)
    if kind.solves:
        if kind.vector:
            return Tuning(0, 0, 2, 2 if kind.general else 3, inner=16)
        if kind.narrow:
            return Tuning(0, 0, 1, 1, inner=16) if kind.scalar else Tuning(0, 0, 2, 1)
        return Tuning(0, 0, 1, 3, inner=16) if kind.scalar else Tuning(0, 0, 1, 1, inner=32)
    if kind.scalar:
        large = kind.wide or (kind.narrow and not kind.activated)
        return Tuning(0, 0, 4, 2, inner=64) if large else Tuning(0, 0, 4, 3, inner=32)
    if kind.narrow:
        return Tuning(0, 0, 4, 1)
    return Tuning(64, 0, 4, 3, inner=64 if kind.wide and not kind.vector else 32)


def _full_precision(kind: Kind, backward: bool, chunk: int) -> Choice:
    """A product takes three times the registers and shared memory that it does in half precision."""
    solves, vector, scalar = kind.solves, kind.vector, kind.scalar
    products = solves or scalar
    tile = 32 if kind.wide else 64
    stages = 2 if scalar else 3
    one_warp = solves if chunk == 16 else vector and not solves
    return Choice(
        chunk=chunk,
        prepare=True,
        prepare_rows=vector,
        products=products,
        default=Tuning(16 if solves and not backward else tile, 0, 4, stages),
        kernels=(
            ("prepare", Tuning(0, 0, 1 if one_warp else 2, 1, inner=16 if vector else 0)),
            ("adjoint", Tuning(32, 0, 4, 4) if solves else Tuning(tile, 0, 4, stages)),
            ("products", Tuning(64, 0, 4, 2, inner=32)),
            (
                "gradients",
                Tuning(0, 0, 2 if vector else 1, 1, inner=16)
                if products
                else Tuning(64, 0, 4, 3, inner=32 if vector or kind.normalised else 16),
            ),
        ),
    )


def normalised(program: Program) -> bool:
    """Whether an output is divided by what is read of a state: its gradients cancel, because weights sum to one."""
    reads = {item.name for item in program.body if isinstance(item, Read)}
    quotients = [n for n in topological([program.output]) if n.op == "div"]
    return any(
        leaf.op == "input" and leaf.name in reads
        for q in quotients
        for leaf in topological([q.args[1]])
    )


def _activated(program: Program, decay: Decay) -> bool:
    """Whether a log decay is a function of its token's numbers (softplus, say), which every row then waits for."""
    tokens = {var.name for var in program.inputs if var.kind == "token"}
    nodes = topological([decay.log]) if decay.log is not None else []
    return any(
        node.op in UNARY - {"neg"}
        and any(leaf.op == "input" and leaf.name in tokens for leaf in topological([node]))
        for node in nodes
    )


SECTIONED = 32 * 2**20
"""Bytes of states from which on a backward goes section by section."""


def _section(program: Program, kind: Kind, call: Call, batch: int, length: int, chunk: int) -> int:
    """Tokens of sections: as few as keep the SMs busy. A sequence too short for that goes in halves (vector decays) or
    quarters, if its scans fill the SMs without being cut, or are too short to be cut. States that take no more than the
    inputs stay whole, but for solves, which keep much else.
    """
    sizes, programs = dict(call.sizes), _programs(call, batch, 64)
    rows = DTYPE_BYTES[call.dtype] * batch * length * call.heads
    inputs = sum(rows * prod(sizes[a] for a in v.axes) for v in program.inputs if v.kind == "token")
    states = 2 * rows // chunk * sizes.get("K", 1) * sizes.get("V", 1)
    busy = (1.4 if kind.solves else 1.9) * device().sms
    section = 1024 * ceil(busy / programs)
    if section >= length and (_fills(programs) or length < 2048):
        section = max(KEPT_SPAN, length // (2 if kind.vector else 4) // KEPT_SPAN * KEPT_SPAN)
    large = states >= SECTIONED and (kind.solves or states > inputs)
    return section if large and section < length else 0


def _overlaps(kind: Kind, call: Call, batch: int, section: int) -> bool:
    """Whether two sections of half the size are worked on side by side: where much else is to be done while a chain
    is scanned, or it leaves most SMs idle. (Not timed in fp32, or with long axes.)
    """
    timed = kind.solves and section > KEPT_SPAN and not (call.exact or kind.wide)
    return timed and (kind.vector or _programs(call, batch, 16) <= device().sms)


BESIDE = 4096
"""Tokens of sections whose gradients of keys are scanned beside the adjoint of the section before."""


def _cut_to_recompute(kind: Kind, call: Call, batch: int, length: int) -> tuple[int, int]:
    """Spans that the adjoint is cut into, eight at least of a long sequence with decays or solves; or sections where a
    sequence that is not cut has less than one program for each SM.
    """
    if kind.solves:
        span = _span_of_matrices(kind, call, batch, length, backward=True)
    else:
        span = _span(kind, call, batch, length)
        span = span if kind.still or length <= BESIDE or length >= 8 * span else 0
    room = length > BESIDE and not span and not _fills(_programs(call, batch, 64))
    return span, BESIDE if room and not kind.still else 0


def _programs(call: Call, batch: int, tile: int) -> int:
    """Programs of a scan that is not cut, with tiles of so many values."""
    return max(1, batch * call.heads * -(-dict(call.sizes).get("V", tile) // tile))


def _fills(programs: int) -> bool:
    """Whether so many programs keep the SMs busy, one on each."""
    return 1.1 * programs >= device().sms


def _span(kind: Kind, call: Call, batch: int, length: int) -> int:
    """Tokens of spans that just fill the SMs with two blocks each; 0 where the sequence stays whole.

    They have 1024 at least, or 512 where there are four of them at least (not timed in fp32).
    """
    programs = _programs(call, batch, 64)
    whole = _fills(programs) and (kind.vector or not call.exact)
    spans = 1 if whole else min(2 * device().sms // programs, length // 512)
    if spans < 4 or call.exact:
        spans = min(spans, length // 1024)
    return _tokens_of(spans, length)


def _span_of_matrices(kind: Kind, call: Call, batch: int, length: int, backward: bool) -> int:
    """Tokens of spans whose maps are matrices, which take as long to carry through them as the state does; 0 where the
    sequence stays whole.

    As many spans as fill the SMs with one block each (in a backward two), and four at least (in a backward, and where
    keys that are read are others than those that are written, eight), of 1024 tokens at least. Not timed in fp32, or
    with long axes.
    """
    programs, sms = _programs(call, batch, 64), device().sms
    least = 8 if kind.general or backward else 4
    wanted = 2 * sms // programs if backward else max(least, sms // programs)
    span = _tokens_of(min(wanted, length // 1024), length)
    spans = -(-length // span) if span else 1
    pays = spans >= least and spans * programs <= 2 * sms
    return span if pays and not (call.exact or kind.wide) else 0


def _tokens_of(spans: int, length: int) -> int:
    """A power of two; 0 where there is one span."""
    return 1 << (-(-length // spans) - 1).bit_length() if spans > 1 else 0
