// A step on the CPU: norm, rotary embedding with cache write, attention of single rows; and, where the CPU
// multiplies pairs of bf16, linear layers and the attention of prompt rows. The first would be half a dozen
// torch operators each, or attention padded to the longest row.
//
// A row's result depends on that row alone: its loops run over its own length in a fixed order, and threads
// share out whole rows or heads. Sums are fp32. Compiled by cpu_kernels.py with the system's compiler; written
// with the vector extension that gcc and clang share, for any CPU.

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

using f32v = float __attribute__((vector_size(64)));
using u32v = uint32_t __attribute__((vector_size(64)));
using i32v = int32_t __attribute__((vector_size(64)));
using u16v = uint16_t __attribute__((vector_size(32)));

constexpr int kLanes = 16;

struct bf16 {
    uint16_t bits;
};

template <typename V, typename P>
static inline V load_as(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

static inline f32v load(const float* p) { return load_as<f32v>(p); }

static inline f32v load(const bf16* p) {
    return (f32v)(__builtin_convertvector(load_as<u16v>(p), u32v) << 16);
}

static inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof(v)); }

static inline u32v rounded(f32v v) {  // to nearest, ties to even, in the upper half
    u32v bits = (u32v)v;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

static inline void store(bf16* p, f32v v) {
    u16v half = __builtin_convertvector(rounded(v) >> 16, u16v);
    std::memcpy(p, &half, sizeof(half));
}

// 2 * kLanes numbers as two vectors: the two halves in fp32; the even and the odd ones in bf16, which costs one
// operation each. What is computed by lane comes back in order through store_pair.
struct Pair {
    f32v a, b;
};

static inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

static inline Pair load_pair(const bf16* p) {
    u32v both = load_as<u32v>(p);
    return {(f32v)(both << 16), (f32v)(both & 0xffff0000u)};
}

static inline void store_pair(float* p, f32v a, f32v b) {
    store(p, a);
    store(p + kLanes, b);
}

static inline void store_pair(bf16* p, f32v a, f32v b) {
    u32v both = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u);
    std::memcpy(p, &both, sizeof(both));
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return load_as<float>(&bits);
}

template <typename T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    uint32_t bits = load_as<uint32_t>(&x);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Lanes are added in pairs 8 apart, then 4, 2, 1: always the same order.
static inline float sum(f32v v) {
    float a[kLanes];
    store(a, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

// Lane j of the result is the sum of d[j]'s lanes; `d` is used up. Four rounds, each halving the number of
// vectors and doubling the sums that share one.
static inline f32v sums(f32v* d) {
#define LAB_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
    for (int j = 0; j < 8; j++)
        d[j] = LAB_PICK(d[j], d[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               LAB_PICK(d[j], d[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int j = 0; j < 4; j++)
        d[j] = LAB_PICK(d[j], d[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               LAB_PICK(d[j], d[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int j = 0; j < 2; j++)
        d[j] = LAB_PICK(d[j], d[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               LAB_PICK(d[j], d[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return LAB_PICK(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           LAB_PICK(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#undef LAB_PICK
}

static inline f32v larger(f32v a, f32v b) { return a > b ? a : b; }

// exp(x) for x <= 0: 2^n * p(r) with |r| <= ln(2)/2; the polynomial is Taylor's to the sixth power
// (relative error below 2e-7), and what is under 2^-126 becomes 0.
static inline f32v exp_of(f32v x) {
    const f32v magic = f32v{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    f32v n = (x * 1.44269504f + magic) - magic;
    f32v r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32v p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i32v power = (__builtin_convertvector(n, i32v) + 127) << 23;
    f32v value = p * (f32v)power;
    return n < -126.0f ? f32v{} : value;
}

// y = x / rms(x) * weight, row by row.
template <typename T>
static void norm(const T* x, const T* weight, T* y, int64_t rows, int64_t size, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * size;
        T* out = y + row * size;
        f32v squares{};
        for (int64_t i = 0; i < size; i += kLanes) {
            f32v v = load(in + i);
            squares += v * v;
        }
        float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += kLanes) store(out + i, load(in + i) * scale * load(weight + i));
    }
}

// What the kernels know of a step and of one layer's cache. Mirrors `KernelStep` in cpu_kernels.py.
struct Step {
    const int64_t* slots;      // per row
    const int64_t* positions;  // per row
    const float* cosines;      // (max_len, dim / 2), or null: nothing is rotated here
    const float* sines;
    int64_t rows, decode_rows;  // the first `decode_rows` rows are one token each
    int64_t heads, kv_heads, dim, max_len;
    int64_t window;  // 0: none
    float scale;
    int32_t threads;
};

template <typename T>
static inline T* place(T* cache, const Step& s, int64_t row, int64_t head) {
    return cache + ((s.slots[row] * s.max_len + s.positions[row]) * s.kv_heads + head) * s.dim;
}

// Rotates one head: the first half of its dimensions pairs with the second (Llama's layout). `y` may be `x`.
template <typename T>
static inline void rotate(const T* x, T* y, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = to_float(x[i]), b = to_float(x[i + half]);
        y[i] = from_float<T>(a * cosine[i] - b * sine[i]);
        y[i + half] = from_float<T>(b * cosine[i] + a * sine[i]);
    }
}

// qkv (rows, heads + 2 * kv_heads, dim): queries are rotated in place, keys rotated into the cache, values
// copied there.
template <typename T>
static void rotate_and_store(const Step& s, T* qkv, T* keys, T* values) {
    int64_t half = s.dim / 2, width = (s.heads + 2 * s.kv_heads) * s.dim;
    for (int64_t row = 0; row < s.rows; row++) {
        T* q = qkv + row * width;
        const T* k = q + s.heads * s.dim;
        const T* v = k + s.kv_heads * s.dim;
        const float* cosine = s.cosines + s.positions[row] * half;
        const float* sine = s.sines + s.positions[row] * half;
        for (int64_t h = 0; h < s.heads; h++) rotate(q + h * s.dim, q + h * s.dim, cosine, sine, half);
        for (int64_t h = 0; h < s.kv_heads; h++) {
            rotate(k + h * s.dim, place(keys, s, row, h), cosine, sine, half);
            std::memcpy(place(values, s, row, h), v + h * s.dim, s.dim * sizeof(T));
        }
    }
}

// The products of 2 * kLanes numbers, added to the lanes of `sum`.
static inline f32v plus_products(f32v sum, const float* a, const float* b) {
    return sum + load(a) * load(b) + load(a + kLanes) * load(b + kLanes);
}

static inline f32v plus_products(f32v sum, const bf16* a, const bf16* b) {
#if defined(__AVX512BF16__)
    auto left = (__m512bh)_mm512_loadu_si512(a), right = (__m512bh)_mm512_loadu_si512(b);
    return (f32v)_mm512_dpbf16_ps((__m512)sum, left, right);
#else
    Pair left = load_pair(a), right = load_pair(b);
    return sum + left.a * right.a + left.b * right.b;
#endif
}

// Fetches a place's share of the next block while that place is computed: memory is then read in order and all
// the time, which strided reads of single heads, or whole blocks asked for at once, are not.
template <typename T, int D>
static inline void fetch_place(const T* share, int64_t place) {
    const char* from = (const char*)(share + place * D);
    for (size_t i = 0; i < D * sizeof(T); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Scores of R query heads for the next kLanes places of their key head. Places past the row's end may be read,
// and their scores are thrown away by the caller.
template <typename T, int D, int R>
static inline void score_block(
    const T* query, int64_t head_stride, const T* keys, int64_t stride, float scale, float* scores, int64_t room,
    const T* next
) {
    constexpr int N = kLanes / R;  // places at a time, so that all sums of a round fill one vector
    for (int64_t j = 0; j < kLanes; j += N) {
        f32v dots[kLanes] = {};
        for (int k = 0; k < N; k++) {
            if (next) fetch_place<T, D>(next, j + k);
            for (int i = 0; i < D; i += 2 * kLanes)
                for (int r = 0; r < R; r++)
                    dots[r * N + k] =
                        plus_products(dots[r * N + k], query + r * head_stride + i, keys + (j + k) * stride + i);
        }
        f32v done = sums(dots) * scale;
        for (int r = 0; r < R; r++) std::memcpy(scores + r * room + j, (const float*)&done + r * N, N * sizeof(float));
    }
}

// Adds the weighted values of the next `count` places to the R sums of dimension D in `mix` (split).
template <typename T, int D, int R>
static inline void mix_block(
    const float* weights, int64_t room, const T* values, int64_t stride, int64_t count, float* mix, const T* next
) {
    constexpr int V = D / kLanes;
    f32v acc[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) acc[r][i] = load(mix + r * D + i * kLanes);
    for (int64_t k = 0; k < count; k++) {
        if (next) fetch_place<T, D>(next, k);
        for (int i = 0; i < V; i += 2) {
            Pair value = load_pair(values + k * stride + i * kLanes);
            for (int r = 0; r < R; r++) {
                acc[r][i] += value.a * weights[r * room + k];
                acc[r][i + 1] += value.b * weights[r * room + k];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) store(mix + r * D + i * kLanes, acc[r][i]);
}

// exp(score - highest) over one head's `length` scores, in place; returns their sum. Fills up to `room`.
static float soften(float* scores, int64_t length, int64_t room) {
    for (int64_t j = length; j < room; j++) scores[j] = -INFINITY;
    f32v top = load(scores);
    for (int64_t j = kLanes; j < room; j += kLanes) top = larger(top, load(scores + j));
    float highest = top[0];
    for (int i = 1; i < kLanes; i++) highest = top[i] > highest ? top[i] : highest;
    f32v totals{};
    for (int64_t j = 0; j < room; j += kLanes) {
        f32v weight = exp_of(larger(load(scores + j) - highest, f32v{} - 200.0f));
        store(scores + j, weight);
        totals += weight;
    }
    return sum(totals);
}

// `step(query head, key head, number of query heads as a constant)` for all query heads of some key heads.
template <int R>
using Constant = std::integral_constant<int, R>;

template <typename F>
static inline void for_heads(int64_t first, int64_t last, int64_t repeat, F step) {
    for (int64_t head = first; head < last; head++) {
        int64_t r = 0;
        for (; r + 4 <= repeat; r += 4) step(head * repeat + r, head, Constant<4>());
        for (; r + 2 <= repeat; r += 2) step(head * repeat + r, head, Constant<2>());
        for (; r < repeat; r++) step(head * repeat + r, head, Constant<1>());
    }
}

// One row and the query heads of the key heads `first .. last - 1`. Keys are read once, then values, each as
// one stream: a place holds all heads side by side. `following` are the keys that are read next.
template <typename T, int D>
static void attend_row(
    const Step& s, int64_t row, int64_t first, int64_t last, const T* q, int64_t head_stride, const T* keys,
    const T* values, const T* following, T* out
) {
    int64_t repeat = s.heads / s.kv_heads, stride = s.kv_heads * D;
    int64_t end = s.positions[row] + 1, begin = s.window && end > s.window ? end - s.window : 0;
    int64_t length = end - begin, room = (length + kLanes - 1) / kLanes * kLanes;
    int64_t base = (s.slots[row] * s.max_len + begin) * stride;

    static thread_local std::vector<float> space;
    space.assign(s.heads * D, 0.0f);
    space.resize(s.heads * (D + room));
    float *mix = space.data(), *scores = mix + s.heads * D;

    for (int64_t j = 0; j < room; j += kLanes)
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            const T* block = keys + base + j * stride + head * D;
            const T* next = j + kLanes < room ? keys + base + (j + kLanes) * stride : values + base;
            score_block<T, D, r.value>(
                q + h * head_stride, head_stride, block, stride, s.scale, scores + h * room + j, room,
                h == head * repeat ? next + head * kLanes * D : nullptr
            );
        });
    for (int64_t h = first * repeat; h < last * repeat; h++) {
        float total = soften(scores + h * room, length, room);
        for (int64_t j = 0; j < room; j += kLanes)
            store(scores + h * room + j, load(scores + h * room + j) * (1.0f / total));
    }
    for (int64_t j = 0; j < length; j += kLanes)
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            const T* block = values + base + j * stride + head * D;
            int64_t count = length - j < kLanes ? length - j : kLanes;
            const T* next = j + kLanes < length ? values + base + (j + kLanes) * stride : following;
            mix_block<T, D, r.value>(
                scores + h * room + j, room, block, stride, count, mix + h * D,
                h == head * repeat ? next + head * kLanes * D : nullptr
            );
        });
    for (int64_t h = first * repeat; h < last * repeat; h++)
        for (int i = 0; i < D; i += 2 * kLanes)
            store_pair(out + h * D + i, load(mix + h * D + i), load(mix + h * D + i + kLanes));
}

// q (decode_rows, heads, dim) with any row and head stride; out (decode_rows, heads, dim), contiguous.
template <typename T, int D>
static void attend(
    const Step& s, const T* q, int64_t row_stride, int64_t head_stride, const T* keys, const T* values, T* out
) {
    // Threads share rows, and the heads of a row where there are fewer rows than threads.
    int64_t parts = s.decode_rows >= s.threads ? 1 : s.threads < s.kv_heads ? s.threads : s.kv_heads;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic) if (s.threads > 1)
    for (int64_t item = 0; item < s.decode_rows * parts; item++) {
        int64_t row = item / parts, part = item % parts;
        int64_t first = part * s.kv_heads / parts, last = (part + 1) * s.kv_heads / parts;
        const T* following = keys + s.slots[row + 1 < s.decode_rows ? row + 1 : row] * s.max_len * s.kv_heads * D;
        attend_row<T, D>(
            s, row, first, last, q + row * row_stride, head_stride, keys, values, following, out + row * s.heads * D
        );
    }
}

template <typename T>
static int attend_any(
    const Step& s, const T* q, int64_t row_stride, int64_t head_stride, const T* keys, const T* values, T* out
) {
    switch (s.dim) {
        case 32: attend<T, 32>(s, q, row_stride, head_stride, keys, values, out); return 0;
        case 64: attend<T, 64>(s, q, row_stride, head_stride, keys, values, out); return 0;
        case 96: attend<T, 96>(s, q, row_stride, head_stride, keys, values, out); return 0;
        case 128: attend<T, 128>(s, q, row_stride, head_stride, keys, values, out); return 0;
        default: return 1;
    }
}

// --- Linear layers in bf16, where the CPU multiplies pairs of bf16 and has no matrix unit for it ---------------
//
// One sum per output, over the inputs in their order, however many rows there are: a row's bits are the same
// in every batch, and one row costs one pass over the weights. The weights lie in panels of kLanes outputs,
// the inputs in pairs: panel, pair, output, member of the pair.

struct Linear {  // mirrors `KernelLayer` in cpu_kernels.py
    const bf16* panels;
    const bf16* bias;  // or null
    int64_t out_features, in_features;
    int32_t threads;
};

enum Epilogue { kNone, kSwish, kPlus, kTimes };

#if defined(__AVX512BF16__)

// Sums of kTile rows and kPanels panels fill the registers; these panels stay in the cache for all rows.
constexpr int kTile = 6, kPanels = 4;

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
template <int M, int V>
static inline void add_products(
    const bf16* panels, int64_t panel_size, int64_t pairs, const bf16* x, int64_t stride, f32v (&acc)[M][V],
    Fetch fetch = {nullptr, 0}
) {
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w[V];
        for (int v = 0; v < V; v++) w[v] = (__m512bh)_mm512_loadu_si512(panels + v * panel_size + k * 2 * kLanes);
        for (int64_t f = 0; f < fetch.count; f++)
            __builtin_prefetch(fetch.panels + f * panel_size + k * 2 * kLanes, 0, 2);
        for (int m = 0; m < M; m++) {
            auto pair = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(x + m * stride + 2 * k));
            for (int v = 0; v < V; v++) acc[m][v] = (f32v)_mm512_dpbf16_ps((__m512)acc[m][v], w[v], pair);
        }
    }
}

// Rows `x .. x + M - 1` times V neighbouring panels, and what follows the product.
template <int M, int V>
static void product_tile(
    const Linear& l, int64_t panel, const bf16* x, const bf16* other, bf16* out, Epilogue epilogue, Fetch fetch
) {
    int64_t panel_size = l.in_features * kLanes;
    f32v acc[M][V] = {};
    const bf16* panels = l.panels + panel * panel_size;
    add_products<M, V>(panels, panel_size, l.in_features / 2, x, l.in_features, acc, fetch);
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) {
            int64_t column = (panel + v) * kLanes, at = m * l.out_features + column;
            f32v y = acc[m][v];
            if (l.bias) y += load(l.bias + column);
            if (epilogue == kSwish) y = swish(y);
            if (epilogue == kPlus) y += load(other + at);
            if (epilogue == kTimes) y *= load(other + at);
            store(out + at, y);
        }
    }
}

template <int M = kTile>
static void product_rest(
    int64_t rows, const Linear& l, int64_t panel, int64_t last, const bf16* x, const bf16* other, bf16* out,
    Epilogue epilogue, Fetch fetch
) {
    if constexpr (M > 0) {
        if (rows != M) return product_rest<M - 1>(rows, l, panel, last, x, other, out, epilogue, fetch);
        if (panel + kPanels == last) return product_tile<M, kPanels>(l, panel, x, other, out, epilogue, fetch);
        for (; panel < last; panel++) product_tile<M, 1>(l, panel, x, other, out, epilogue, {nullptr, 0});
    }
}

extern "C" int lab_has_linear() { return 1; }

extern "C" void lab_linear_bfloat16(
    const Linear* l, const bf16* x, int64_t rows, const bf16* other, bf16* out, int32_t epilogue
) {
    int64_t panels = l->out_features / kLanes;
    int64_t tiles = (rows + kTile - 1) / kTile, panel_size = l->in_features * kLanes;
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1)
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
        int64_t last = panel + kPanels < panels ? panel + kPanels : panels;
        // With one tile memory is the limit, and the CPU fetches ahead by itself.
        int64_t num_next = tiles == 1 ? 0 : panels - last < kPanels ? panels - last : kPanels;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t row = tile * kTile, count = rows - row < kTile ? rows - row : kTile, at = row * l->out_features;
            int64_t from = tile * num_next / tiles, to = (tile + 1) * num_next / tiles;
            const bf16* rest = other ? other + at : nullptr;
            product_rest(
                count, *l, panel, last, x + row * l->in_features, rest, out + at, (Epilogue)epilogue,
                {l->panels + (last + from) * panel_size, to - from}
            );
        }
    }
}

// --- Attention of prompt rows --------------------------------------------------------------------------------
//
// The queries of one key head are the rows of two products a block of kBlock places: with the keys, and, once
// softened, with the values; both are packed into panels first. The softmax goes along with the blocks: its
// highest score and its sum are corrected as they grow. Blocks begin at multiples of kBlock, and one in which a
// row sees nothing leaves it as it is, so that neither the chunk nor the tile a row is in changes its bits.

constexpr int kBlock = kPanels * kLanes;

// Lane i of vector j and lane j of vector i change places: in four rounds, squares of W lanes do.
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

// kBlock keys (one head, `stride` apart) as panels of kLanes places.
template <int D>
static void pack_keys(const bf16* keys, int64_t stride, bf16* panels) {
    for (int64_t panel = 0; panel < kPanels; panel++) {
        for (int64_t i = 0; i < D; i += 2 * kLanes) {
            __m512i pairs[kLanes];
            for (int j = 0; j < kLanes; j++) pairs[j] = _mm512_loadu_si512(keys + (panel * kLanes + j) * stride + i);
            exchange<1>(pairs), exchange<2>(pairs), exchange<4>(pairs), exchange<8>(pairs);
            std::memcpy(panels + (panel * D + i) * kLanes, pairs, sizeof(pairs));
        }
    }
}

// `count` values, and zeros up to kBlock, as panels of kLanes dimensions.
template <int D>
static void pack_values(const bf16* values, int64_t stride, int64_t count, bf16* panels) {
    i32v lane{};
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    auto low = (__m512i)(lane | (lane + 2 * kLanes) << 16);  // a lane each of the one and of the other
    auto high = (__m512i)((lane + kLanes) | (lane + 3 * kLanes) << 16);
    for (int64_t j = 0; j < kBlock; j += 2) {
        for (int64_t i = 0; i < D; i += 2 * kLanes) {
            __m512i a{}, b{};
            if (j < count) a = _mm512_loadu_si512(values + j * stride + i);
            if (j + 1 < count) b = _mm512_loadu_si512(values + (j + 1) * stride + i);
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

constexpr float kNothingSeen = -1e30f;

// One row's kBlock scores to weights in bf16; of the places from `base` on it sees `first .. last`. Returns by
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
    float highest = _mm512_reduce_max_ps((__m512)top), factor = 1.0f;
    if (highest != softmax.highest) factor = exp_of(larger(f32v{} + (softmax.highest - highest), f32v{} - 200.0f))[0];
    softmax.highest = highest;
    softmax.totals *= factor;
    for (int v = 0; v < kPanels; v++) {
        f32v weight = exp_of(larger(scores[v] - highest, f32v{} - 200.0f));
        softmax.totals += weight;
        auto half = _mm512_cvtneps_pbh((__m512)weight);
        std::memcpy(weights + v * kLanes, &half, sizeof(half));
    }
    return factor;
}

// M query rows and one block of places; `mix (M, D)` are their sums so far. Row m sees `first[m] .. last[m]`.
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
// `head .. end_head - 1`: a block of all of them is one stretch of memory, and the next is fetched meanwhile.
template <int D>
static void attend_prompt_heads(
    const Step& s, int64_t row, int64_t count, int64_t head, int64_t end_head, const bf16* q, int64_t row_stride,
    int64_t head_stride, const bf16* keys, const bf16* values, bf16* out
) {
    int64_t repeat = s.heads / s.kv_heads, rows = repeat * count, stride = s.kv_heads * D;
    int64_t start = s.positions[row], end = start + count, num_heads = end_head - head;
    int64_t begin = s.window && start >= s.window ? (start - s.window + 1) / kBlock * kBlock : 0;
    int64_t slot = s.slots[row] * s.max_len * stride + head * D;
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
            const bf16 *k = keys + slot + base * stride + h * D, *v = values + slot + base * stride + h * D;
            pack_keys<D>(k, stride, key_panels);
            pack_values<D>(v, stride, end - base, value_panels);
            for (int64_t i = 0; i < rows; i += kTile) {
                for (int64_t j = i / kTile * share; j < (i / kTile + 1) * share && j < kBlock; j++) {
                    for (int64_t d = 0; d < D; d += 2 * kLanes) {
                        __builtin_prefetch(k + (kBlock + j) * stride + d, 0, 2);
                        __builtin_prefetch(v + (kBlock + j) * stride + d, 0, 2);
                    }
                }
                int64_t tile = rows - i < kTile ? rows - i : kTile, at = h * rows + i;
                if (last[i + tile - 1] < base || first[i] >= base + kBlock) continue;  // nobody sees this block
                attend_rest<D>(
                    tile, (const bf16*)query + at * D, (const bf16*)key_panels, (const bf16*)value_panels, s.scale,
                    base, (const int64_t*)&first[i], (const int64_t*)&last[i], &softmax[at], mix + at * D
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

extern "C" int lab_attend_prompt_bfloat16(
    const Step* s, int64_t row, int64_t count, const bf16* q, int64_t row_stride, int64_t head_stride,
    const bf16* keys, const bf16* values, bf16* out
) {
    switch (s->dim) {
        case 32: attend_prompt<32>(*s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 64: attend_prompt<64>(*s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 96: attend_prompt<96>(*s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        case 128: attend_prompt<128>(*s, row, count, q, row_stride, head_stride, keys, values, out); return 0;
        default: return 1;
    }
}
#else
extern "C" int lab_has_linear() { return 0; }
extern "C" void lab_linear_bfloat16(const Linear*, const bf16*, int64_t, const bf16*, bf16*, int32_t) {}
extern "C" int lab_attend_prompt_bfloat16(
    const Step*, int64_t, int64_t, const bf16*, int64_t, int64_t, const bf16*, const bf16*, bf16*
) {
    return 1;
}
#endif

#define LAB_KERNELS(T, name)                                                                                   \
    extern "C" void lab_norm_##name(const T* x, const T* w, T* y, int64_t rows, int64_t size, float eps) {     \
        norm(x, w, y, rows, size, eps);                                                                        \
    }                                                                                                          \
    extern "C" void lab_rotate_and_store_##name(const Step* s, T* qkv, T* keys, T* values) {                   \
        rotate_and_store(*s, qkv, keys, values);                                                               \
    }                                                                                                          \
    extern "C" int lab_attend_##name(                                                                          \
        const Step* s, const T* q, int64_t row_stride, int64_t head_stride, const T* k, const T* v, T* out     \
    ) {                                                                                                        \
        return attend_any(*s, q, row_stride, head_stride, k, v, out);                                          \
    }

LAB_KERNELS(float, float32)
LAB_KERNELS(bf16, bfloat16)
