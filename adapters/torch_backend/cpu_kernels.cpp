// A decode step on the CPU: norm, rotary embedding with cache write, attention of single rows, and linear
// layers in bf16. The first would be half a dozen torch operators each, or attention padded to the longest row.
//
// A row's result depends on that row alone: its loops run over its own length in a fixed order, and threads
// share out whole rows. Everything is computed in fp32 and rounded once. Compiled by cpu_kernels.py with the
// system's compiler; written with the vector extension that gcc and clang share, for any CPU.

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

// Scores of R query heads (fp32, scaled, split) for the next kLanes places of their key head. Places past the
// row's end may be read, and their scores are thrown away by the caller.
template <typename T, int D, int R>
static inline void score_block(const float* query, const T* keys, int64_t stride, float* scores, int64_t room) {
    constexpr int N = kLanes / R;  // places at a time, so that all sums of a round fill one vector
    for (int64_t j = 0; j < kLanes; j += N) {
        f32v dots[kLanes] = {};
        for (int k = 0; k < N; k++) {
            for (int i = 0; i < D; i += 2 * kLanes) {
                Pair key = load_pair(keys + (j + k) * stride + i);
                for (int r = 0; r < R; r++)
                    dots[r * N + k] += load(query + r * D + i) * key.a + load(query + r * D + i + kLanes) * key.b;
            }
        }
        f32v done = sums(dots);
        for (int r = 0; r < R; r++) std::memcpy(scores + r * room + j, (const float*)&done + r * N, N * sizeof(float));
    }
}

// Adds the weighted values of the next `count` places to the R sums of dimension D in `mix` (split).
template <typename T, int D, int R>
static inline void mix_block(
    const float* weights, int64_t room, const T* values, int64_t stride, int64_t count, float* mix
) {
    constexpr int V = D / kLanes;
    f32v acc[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) acc[r][i] = load(mix + r * D + i * kLanes);
    for (int64_t k = 0; k < count; k++) {
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

// Fetches, while one head of a block is computed, an equal share of the next block: memory is then read in
// order, which the strided reads of single heads are not.
template <typename T, int D>
static inline void fetch_share(const T* next_block, int64_t share) {
    const char* from = (const char*)(next_block + share * kLanes * D);
    for (size_t i = 0; i < kLanes * D * sizeof(T); i += 64) __builtin_prefetch(from + i, 0, 2);
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
// one stream: a place holds all heads side by side.
template <typename T, int D>
static void attend_row(
    const Step& s, int64_t row, int64_t first, int64_t last, const T* q, int64_t head_stride, const T* keys,
    const T* values, T* out
) {
    int64_t repeat = s.heads / s.kv_heads, stride = s.kv_heads * D;
    int64_t end = s.positions[row] + 1, begin = s.window && end > s.window ? end - s.window : 0;
    int64_t length = end - begin, room = (length + kLanes - 1) / kLanes * kLanes;
    int64_t base = (s.slots[row] * s.max_len + begin) * stride;

    static thread_local std::vector<float> space;
    space.assign(s.heads * (2 * D), 0.0f);
    space.resize(s.heads * (2 * D + room));
    float *query = space.data(), *mix = query + s.heads * D, *scores = mix + s.heads * D;
    for (int64_t h = first * repeat; h < last * repeat; h++) {
        for (int i = 0; i < D; i += 2 * kLanes) {
            Pair part = load_pair(q + h * head_stride + i);
            store_pair(query + h * D + i, part.a * s.scale, part.b * s.scale);
        }
    }

    for (int64_t j = 0; j < room; j += kLanes)
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            const T* block = keys + base + j * stride + head * D;
            const T* next = j + kLanes < room ? keys + base + (j + kLanes) * stride : values + base;
            if (h == head * repeat) fetch_share<T, D>(next, head);
            score_block<T, D, r.value>(query + h * D, block, stride, scores + h * room + j, room);
        });
    for (int64_t h = first * repeat; h < last * repeat; h++) {
        float total = soften(scores + h * room, length, room);
        for (int64_t j = 0; j < room; j += kLanes)
            store(scores + h * room + j, load(scores + h * room + j) * (1.0f / total));
    }
    for (int64_t j = 0; j < length; j += kLanes)
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            const T* block = values + base + j * stride + head * D;
            if (h == head * repeat) fetch_share<T, D>(values + base + (j + kLanes) * stride, head);
            int64_t count = length - j < kLanes ? length - j : kLanes;
            mix_block<T, D, r.value>(scores + h * room + j, room, block, stride, count, mix + h * D);
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
        attend_row<T, D>(
            s, row, first, last, q + row * row_stride, head_stride, keys, values, out + row * s.heads * D
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

// Rows `x .. x + M - 1` times V neighbouring panels, and what follows the product.
template <int M, int V>
static void product_tile(
    const Linear& l, int64_t panel, const bf16* x, const bf16* other, bf16* out, Epilogue epilogue
) {
    int64_t pairs = l.in_features / 2, panel_size = l.in_features * kLanes;
    const bf16* weights = l.panels + panel * panel_size;
    __m512 acc[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w[V];
        for (int v = 0; v < V; v++) w[v] = (__m512bh)_mm512_loadu_si512(weights + v * panel_size + k * 2 * kLanes);
        for (int m = 0; m < M; m++) {
            auto pair = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(x + m * l.in_features + 2 * k));
            for (int v = 0; v < V; v++) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], w[v], pair);
        }
    }
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) {
            int64_t column = (panel + v) * kLanes, at = m * l.out_features + column;
            f32v y = (f32v)acc[m][v];
            if (l.bias) y += load(l.bias + column);
            if (epilogue == kSwish) y = swish(y);
            if (epilogue == kPlus) y += load(other + at);
            if (epilogue == kTimes) y *= load(other + at);
            store(out + at, y);
        }
    }
}

template <int M>
static void product_rows(
    const Linear& l, int64_t panel, int64_t last, const bf16* x, const bf16* other, bf16* out, Epilogue epilogue
) {
    for (; panel + kPanels <= last; panel += kPanels) product_tile<M, kPanels>(l, panel, x, other, out, epilogue);
    for (; panel < last; panel++) product_tile<M, 1>(l, panel, x, other, out, epilogue);
}

template <int M = kTile>
static void product_rest(
    int64_t rows, const Linear& l, int64_t panel, int64_t last, const bf16* x, const bf16* other, bf16* out,
    Epilogue epilogue
) {
    if constexpr (M > 0) {
        if (rows == M) return product_rows<M>(l, panel, last, x, other, out, epilogue);
        product_rest<M - 1>(rows, l, panel, last, x, other, out, epilogue);
    }
}

extern "C" int lab_has_linear() { return 1; }

extern "C" void lab_linear_bfloat16(
    const Linear* l, const bf16* x, int64_t rows, const bf16* other, bf16* out, int32_t epilogue
) {
    int64_t panels = l->out_features / kLanes;
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1)
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
        int64_t last = panel + kPanels < panels ? panel + kPanels : panels;
        for (int64_t row = 0; row < rows; row += kTile) {
            int64_t count = rows - row < kTile ? rows - row : kTile, at = row * l->out_features;
            const bf16* rest = other ? other + at : nullptr;
            product_rest(
                count, *l, panel, last, x + row * l->in_features, rest, out + at, (Epilogue)epilogue
            );
        }
    }
}
#else
extern "C" int lab_has_linear() { return 0; }
extern "C" void lab_linear_bfloat16(const Linear*, const bf16*, int64_t, const bf16*, bf16*, int32_t) {}
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
