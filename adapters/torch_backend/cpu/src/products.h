// Linear layers with weights in bf16 and rows X in bf16 or fp32, where the CPU has vectors of kLanes numbers.
//
// One sum per output, over the inputs in their order, however many rows there are: a row's bits are the same
// in every batch, and one row costs one pass over the weights. The weights lie in panels of kLanes outputs,
// the inputs in pairs: panel, pair, output, member of the pair.
#pragma once

#include "vectors.h"

struct Linear {  // mirrors `KernelWeight` in kernels.py
    const bf16* panels;
    const void* bias;  // of X, or null
    int64_t out_features, in_features;
    int32_t threads;
};

enum Epilogue { kNone, kSwish, kPlus, kTimes };

#if defined(__AVX512BW__)

// Intel's cores multiply pairs of bf16 at two thirds of the speed of numbers in fp32 (decision 0003): pairs are for
// AMD's. A compiler that does not know a core of theirs takes it for an older one.
#if !defined(MULTIPLIES_PAIRS)
#if defined(__AVX512BF16__) && \
    (defined(__znver3__) || defined(__znver4__) || defined(__znver5__) || defined(__znver6__))
#define MULTIPLIES_PAIRS 1
#else
#define MULTIPLIES_PAIRS 0
#endif
#endif

// Sums of kTile rows and kPanels panels fill the registers; these panels stay in the cache for all rows.
constexpr int kPanels = 4;

// What is multiplied at a time: kLanes pairs of bf16, as their even and their odd numbers in fp32.
struct InFp32 {
    static constexpr int kTile = 4;  // a panel's numbers take two registers
    using Pairs = Pair;

    static inline Pairs load_pairs(const bf16* p) { return load_pair(p); }

    static inline Pairs repeat_pair(const bf16* p) {
        u32v both = u32v{} + load_as<uint32_t>(p);
        return {(f32v)(both << 16), (f32v)(both & 0xffff0000u)};
    }

    // Not `f32v{} + p[0]`, as above: in fp32 that is an addition.
    static inline Pairs repeat_pair(const float* p) { return {(f32v)_mm512_set1_ps(p[0]), (f32v)_mm512_set1_ps(p[1])}; }

    static inline f32v plus_products(f32v sum, Pairs a, Pairs b) {
        __m512 even = _mm512_fmadd_ps((__m512)a.a, (__m512)b.a, (__m512)sum);
        return (f32v)_mm512_fmadd_ps((__m512)a.b, (__m512)b.b, even);
    }
};

template <typename X>
struct Math : InFp32 {};

#if MULTIPLIES_PAIRS

template <>
struct Math<bf16> {  // the CPU multiplies pairs: they are one register
    static constexpr int kTile = 6;
    using Pairs = __m512bh;

    static inline Pairs load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

    static inline Pairs repeat_pair(const bf16* p) { return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(p)); }

    static inline f32v plus_products(f32v sum, Pairs a, Pairs b) {
        return (f32v)_mm512_dpbf16_ps((__m512)sum, a, b);
    }
};

#endif

static inline f32v swish(f32v x) {
    f32v e = exp_of(larger(x < 0.0f ? x : -x, f32v{} - 200.0f));
    return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// Lines of the panels that are computed next: fetched, some for each pair of inputs, while these are computed.
struct Fetch {
    const bf16* panels;
    int64_t count;
};

// Adds M rows of `pairs` pairs of inputs times V neighbouring panels to `acc`.
template <int M, int V, typename X>
static inline void add_products(
    const bf16* panels, int64_t panel_size, int64_t pairs, const X* x, int64_t stride, f32v (&acc)[M][V],
    Fetch fetch = {nullptr, 0}
) {
    using Own = Math<X>;
    for (int64_t k = 0; k < pairs; k++) {
        typename Own::Pairs w[V];
        for (int v = 0; v < V; v++) w[v] = Own::load_pairs(panels + v * panel_size + k * 2 * kLanes);
        for (int64_t f = 0; f < fetch.count; f++)
            __builtin_prefetch(fetch.panels + f * panel_size + k * 2 * kLanes, 0, 2);
        for (int m = 0; m < M; m++) {
            typename Own::Pairs pair = Own::repeat_pair(x + m * stride + 2 * k);
            for (int v = 0; v < V; v++) acc[m][v] = Own::plus_products(acc[m][v], w[v], pair);
        }
    }
}

// Rows `x .. x + M - 1` times V neighbouring panels, and what follows the product.
template <int M, int V, typename In, typename X>
static void product_tile(
    const Linear& l, int64_t panel, const In* x, const X* other, X* out, Epilogue epilogue, Fetch fetch
) {
    int64_t panel_size = l.in_features * kLanes;
    f32v acc[M][V] = {};
    const bf16* panels = l.panels + panel * panel_size;
    add_products<M, V>(panels, panel_size, l.in_features / 2, x, l.in_features, acc, fetch);
    // The epilogue works on fp32 sums, so a fused addition in bf16 is rounded once, not twice.
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) {
            int64_t column = (panel + v) * kLanes, at = m * l.out_features + column;
            f32v y = acc[m][v];
            if (l.bias) y += load(static_cast<const X*>(l.bias) + column);
            if (epilogue == kSwish) y = swish(y);
            if (epilogue == kPlus) y += load(other + at);
            if (epilogue == kTimes) y *= load(other + at);
            store(out + at, y);
        }
    }
}

// Finds the tile function for `rows` rows, since M must be a constant for the sums to stay in registers. M does
// not enter a row's own sums: its bits are those of any other tile.
template <typename In, typename X, int M = Math<In>::kTile>
static void product_rest(
    int64_t rows, const Linear& l, int64_t panel, int64_t last, const In* x, const X* other, X* out,
    Epilogue epilogue, Fetch fetch
) {
    if constexpr (M > 0) {
        if (rows != M) return product_rest<In, X, M - 1>(rows, l, panel, last, x, other, out, epilogue, fetch);
        if (panel + kPanels == last) return product_tile<M, kPanels>(l, panel, x, other, out, epilogue, fetch);
        for (; panel < last; panel++) product_tile<M, 1>(l, panel, x, other, out, epilogue, {nullptr, 0});
    }
}

// What rows of X are multiplied as.
template <typename X>
using Multiplied = std::conditional_t<std::is_base_of_v<InFp32, Math<X>>, float, X>;

static inline const float* widened(const float* x, int64_t) { return x; }

#if MULTIPLIES_PAIRS
static inline const bf16* widened(const bf16* x, int64_t) { return x; }
#else
// Once for all panels: to widen a number takes as long as to multiply with it.
static const float* widened(const bf16* x, int64_t count) {
    static thread_local std::vector<float> wide;
    if (int64_t(wide.size()) < count) wide.resize(count);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(&wide[i], load(x + i));
    for (; i < count; i++) wide[i] = to_float(x[i]);
    return wide.data();
}
#endif

// x (rows, in_features) times all panels; other and out (rows, out_features). Threads share out panels, so each
// weight is read from memory once, by one core, for all rows.
template <typename X>
static void product(
    const Linear& l, const X* x, int64_t rows, std::common_type_t<const X*> other, X* out, Epilogue epilogue
) {
    constexpr int kTile = Math<Multiplied<X>>::kTile;
    const Multiplied<X>* wide = widened(x, rows * l.in_features);
    int64_t panels = l.out_features / kLanes;
    int64_t tiles = (rows + kTile - 1) / kTile, panel_size = l.in_features * kLanes;
#pragma omp parallel for num_threads(l.threads) schedule(static) if (l.threads > 1)
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
        int64_t last = panel + kPanels < panels ? panel + kPanels : panels;
        int64_t num_next = panels - last < kPanels ? panels - last : kPanels;
        // With one tile memory is the limit, and the CPU fetches ahead by itself as far as a page goes.
        if (tiles == 1) find_pages(l.panels + last * panel_size, num_next * panel_size), num_next = 0;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t row = tile * kTile, count = rows - row < kTile ? rows - row : kTile, at = row * l.out_features;
            int64_t from = tile * num_next / tiles, to = (tile + 1) * num_next / tiles;
            const X* rest = other ? other + at : nullptr;
            product_rest<Multiplied<X>, X>(
                count, l, panel, last, wide + row * l.in_features, rest, out + at, epilogue,
                {l.panels + (last + from) * panel_size, to - from}
            );
        }
    }
}

#endif
