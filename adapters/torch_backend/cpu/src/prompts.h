// Attention of prompt rows in bf16, where the CPU has vectors of kLanes numbers.
//
// The queries of one key head are the rows of two products a block of kBlock positions: with the keys, and, once
// softened, with the values; both are packed into panels first. The softmax goes along with the blocks: its
// highest score and its sum are corrected as they grow (the online softmax of FlashAttention). Blocks begin at multiples of kBlock, and one in which a
// row sees nothing leaves it as it is, so that neither the chunk nor the tile a row is in changes its bits.
#pragma once

#include "products.h"
#include "rows.h"

#if defined(__AVX512BW__)

constexpr int kBlock = kPanels * kLanes;
constexpr int kTile = Math<bf16>::kTile;

// One of four rounds (W = 1, 2, 4, 8) that transpose 16 vectors of 16 lanes: squares of W lanes are exchanged. A
// lane holds a pair of bf16, so the keys' pairs of dimensions come to stand as `product_tile` reads weights.
template <int W>
static inline void exchange(__m512i* v) {
    i32v lane{}, upper{};
    for (int i = 0; i < kLanes; i++) lane[i] = i, upper[i] = i & W ? -1 : 0;
    auto low = (__m512i)(upper ? (lane - W) | kLanes : lane);
    auto high = (__m512i)(upper ? lane | kLanes : lane + W);
    for (int i = 0; i < kLanes; i++) {
        if (i & W) continue;
        __m512i a = v[i], b = v[i + W];
        v[i] = _mm512_permutex2var_epi32(a, low, b);
        v[i + W] = _mm512_permutex2var_epi32(a, high, b);
    }
}

// kBlock keys (one head, `stride` apart in each block `at` of the cache) as panels of kLanes positions.
template <int D>
static void pack_keys(const bf16* cache, const int64_t* at, int64_t stride, bf16* panels) {
    for (int64_t panel = 0; panel < kPanels; panel++) {
        const bf16* keys = cache + at[panel] * kLanes * stride;
        for (int64_t i = 0; i < D; i += 2 * kLanes) {
            __m512i pairs[kLanes];
            for (int j = 0; j < kLanes; j++) pairs[j] = _mm512_loadu_si512(keys + j * stride + i);
            exchange<1>(pairs), exchange<2>(pairs), exchange<4>(pairs), exchange<8>(pairs);
            std::memcpy(panels + (panel * D + i) * kLanes, pairs, sizeof(pairs));
        }
    }
}

// `count` values, and zeros up to kBlock, as panels of kLanes dimensions.
template <int D>
static void pack_values(const bf16* cache, const int64_t* at, int64_t stride, int64_t count, bf16* panels) {
    i32v lane{};
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    auto low = (__m512i)(lane | (lane + 2 * kLanes) << 16);  // a lane each of the one and of the other
    auto high = (__m512i)((lane + kLanes) | (lane + 3 * kLanes) << 16);
    for (int64_t j = 0; j < kBlock; j += 2) {
        const bf16* values = cache + (at[j / kLanes] * kLanes + j % kLanes) * stride;
        for (int64_t i = 0; i < D; i += 2 * kLanes) {
            __m512i a{}, b{};
            if (j < count) a = _mm512_loadu_si512(values + i);
            if (j + 1 < count) b = _mm512_loadu_si512(values + stride + i);
            bf16* to = panels + i * kBlock + j * kLanes;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + kLanes * kBlock, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// What the softmax of a row knows so far.
struct Softmax {
    float highest;
    f32v totals;
};

constexpr float kNothingSeen = -1e30f;  // not -INFINITY: the difference of two of those is no number

// One row's kBlock scores to weights in bf16; of the positions from `base` on it sees `first .. last`. Returns by
// what its sums so far have to be multiplied.
static inline float soften_block(
    f32v* scores, float scale, int64_t base, int64_t first, int64_t last, Softmax& softmax, bf16* weights
) {
    f32v top = f32v{} + softmax.highest;
    bool sees_all = first <= base && base + kBlock <= last + 1;
    for (int v = 0; v < kPanels; v++) {
        scores[v] *= scale;
        if (!sees_all) {
            i32v lane{};
            for (int i = 0; i < kLanes; i++) lane[i] = i;
            i32v at = lane + int32_t(base + v * kLanes - first);
            scores[v] = (at >= 0) & (at <= int32_t(last - first)) ? scores[v] : f32v{} - INFINITY;
        }
        top = larger(top, scores[v]);
    }
    // A block in which the row sees nothing has no higher score: the factor is exactly 1 and the weights are 0.
    float highest = _mm512_reduce_max_ps((__m512)top), factor = 1.0f;
    if (highest != softmax.highest) factor = exp_of(larger(f32v{} + (softmax.highest - highest), f32v{} - 200.0f))[0];
    softmax.highest = highest;
    softmax.totals *= factor;
    for (int v = 0; v < kPanels; v++) {
        f32v weight = exp_of(larger(scores[v] - highest, f32v{} - 200.0f));
        softmax.totals += weight;
        store(weights + v * kLanes, weight);
    }
    return factor;
}

// M query rows and one block of positions; `mix (M, D)` are their sums so far. Row m sees `first[m] .. last[m]`.
template <int D, int M>
static void attend_tile(
    const bf16* q, const bf16* keys, const bf16* values, float scale, int64_t base, const int64_t* first,
    const int64_t* last, Softmax* softmax, float* mix
) {
    f32v scores[M][kPanels] = {};
    add_products<M, kPanels>(keys, D * kLanes, D / 2, q, D, scores);
    alignas(64) bf16 weights[M][kBlock];
    float factors[M];
    for (int m = 0; m < M; m++)
        factors[m] = soften_block(scores[m], scale, base, first[m], last[m], softmax[m], weights[m]);
    // Registers hold M * V sums of the mix: V vectors of dimensions at a time, as many as divide D.
    constexpr int V = D % (kPanels * kLanes) ? 2 : kPanels;
    for (int i = 0; i < D; i += V * kLanes) {
        f32v acc[M][V];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) acc[m][v] = load(mix + m * D + i + v * kLanes) * factors[m];
        add_products<M, V>(values + i * kBlock, kLanes * kBlock, kBlock / 2, weights[0], kBlock, acc);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) store(mix + m * D + i + v * kLanes, acc[m][v]);
    }
}

template <int D, int M = kTile, typename... Rest>
static void attend_rest(int64_t rows, Rest... rest) {
    if constexpr (M > 0) {
        if (rows == M) return attend_tile<D, M>(rest...);
        attend_rest<D, M - 1>(rows, rest...);
    }
}

// Rows `row .. row + count - 1`, neighbouring positions of one slot, and the query heads of the key heads
// `head .. end_head - 1`, whose next kBlock positions are fetched meanwhile.
template <int D>
static void attend_prompt_heads(
    const Step& s, int64_t row, int64_t count, int64_t head, int64_t end_head, const bf16* q, int64_t row_stride,
    int64_t head_stride, const bf16* keys, const bf16* values, bf16* out
) {
    int64_t repeat = s.heads / s.kv_heads, rows = repeat * count, stride = s.kv_heads * D;
    int64_t start = s.positions[row], end = start + count, num_heads = end_head - head;
    int64_t begin = s.window && start >= s.window ? (start - s.window + 1) / kBlock * kBlock : 0;
    const int64_t* table = table_of(s, s.slots[row], 0);
    int64_t num_tiles = (rows + kTile - 1) / kTile, share = (kBlock + num_tiles - 1) / num_tiles;

    static thread_local std::vector<float> space;
    space.assign(num_heads * rows * D, 0.0f);
    float* mix = space.data();
    static thread_local std::vector<bf16> copies;
    copies.resize(num_heads * rows * D + 2 * kBlock * D);
    bf16 *query = copies.data(), *key_panels = query + num_heads * rows * D, *value_panels = key_panels + kBlock * D;
    std::vector<Softmax> softmax(num_heads * rows, Softmax{kNothingSeen, f32v{}});
    std::vector<int64_t> first(rows), last(rows);
    for (int64_t i = 0; i < rows; i++) {  // the heads of a token side by side: a tile spans few positions
        last[i] = start + i / repeat;
        first[i] = s.window && last[i] >= s.window ? last[i] - s.window + 1 : 0;
        for (int64_t h = 0; h < num_heads; h++) {
            const bf16* from = q + (row + i / repeat) * row_stride + ((head + h) * repeat + i % repeat) * head_stride;
            std::memcpy(query + (h * rows + i) * D, from, D * sizeof(bf16));
        }
    }
    for (int64_t base = begin; base < end; base += kBlock) {
        for (int64_t h = 0; h < num_heads; h++) {
            const int64_t* at = table + base / kLanes;
            const bf16 *k = keys + (head + h) * D, *v = values + (head + h) * D;
            pack_keys<D>(k, at, stride, key_panels);
            pack_values<D>(v, at, stride, end - base, value_panels);
            for (int64_t i = 0; i < rows; i += kTile) {
                for (int64_t j = i / kTile * share; j < (i / kTile + 1) * share && j < kBlock; j++) {
                    int64_t next = (at[kPanels + j / kLanes] * kLanes + j % kLanes) * stride;
                    for (int64_t d = 0; d < D; d += 2 * kLanes) {
                        __builtin_prefetch(k + next + d, 0, 2);
                        __builtin_prefetch(v + next + d, 0, 2);
                    }
                }
                int64_t tile = rows - i < kTile ? rows - i : kTile, done = h * rows + i;
                if (last[i + tile - 1] < base || first[i] >= base + kBlock) continue;  // nobody sees this block
                attend_rest<D>(
                    tile, (const bf16*)query + done * D, (const bf16*)key_panels, (const bf16*)value_panels, s.scale,
                    base, (const int64_t*)&first[i], (const int64_t*)&last[i], &softmax[done], mix + done * D
                );
            }
        }
    }
    for (int64_t h = 0; h < num_heads; h++) {
        for (int64_t i = 0; i < rows; i++) {
            float scale = 1.0f / sum(softmax[h * rows + i].totals);
            bf16* to = out + ((row + i / repeat) * s.heads + (head + h) * repeat + i % repeat) * D;
            for (int d = 0; d < D; d += kLanes) store(to + d, load(mix + (h * rows + i) * D + d) * scale);
        }
    }
}

template <int D>
static void attend_prompt(
    const Step& s, int64_t row, int64_t count, const bf16* q, int64_t row_stride, int64_t head_stride,
    const bf16* keys, const bf16* values, bf16* out
) {
    int64_t parts = s.threads < s.kv_heads ? s.threads : s.kv_heads;
#pragma omp parallel for num_threads(s.threads) schedule(static) if (s.threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part * s.kv_heads / parts, last = (part + 1) * s.kv_heads / parts;
        attend_prompt_heads<D>(s, row, count, first, last, q, row_stride, head_stride, keys, values, out);
    }
}

static int attend_prompt_any(
    const Step& s, int64_t row, int64_t count, const bf16* q, int64_t row_stride, int64_t head_stride,
    const bf16* keys, const bf16* values, bf16* out
) {
    switch (s.dim) {
        case 32: attend_prompt<32>(s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 64: attend_prompt<64>(s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 96: attend_prompt<96>(s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 128: attend_prompt<128>(s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        default: return 1;
    }
}

#endif
