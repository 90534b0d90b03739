// What is done row by row: norm, rotary embedding with cache write, attention of single rows, greedy choice.
#pragma once

#include "vectors.h"

// y = x / rms(x) * weight, row by row; `y` may be `x`.
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

// The index of the largest of the first `size` numbers of each row, the first of equals.
template <typename T>
static void argmax(const T* x, int64_t rows, int64_t size, int64_t stride, int64_t* found) {
    i32v lane{};
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * stride;
        f32v best = f32v{} - INFINITY;
        i32v at = lane;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            f32v v = load(in + i);
            i32v is_larger = v > best;
            best = is_larger ? v : best;
            at = is_larger ? lane + int32_t(i) : at;
        }
        float top = best[0];
        int64_t index = at[0];
        for (int k = 1; k < kLanes; k++)
            if (best[k] > top || (best[k] == top && at[k] < index)) top = best[k], index = at[k];
        for (; i < size; i++)
            if (to_float(in[i]) > top) top = to_float(in[i]), index = i;
        found[row] = index;
    }
}

// What the kernels know of a step and of one layer's cache. Mirrors `KernelStep` in kernels.py.
struct Step {
    const int64_t* slots;      // per row
    const int64_t* positions;  // per row
    const int64_t* tables;     // (slots, table_width): which block holds a slot's next kLanes positions
    const float* cosines;      // (max_len, dim / 2), or null: nothing is rotated here
    const float* sines;
    int64_t rows, decode_rows;  // the first `decode_rows` rows are one token each
    int64_t heads, kv_heads, dim, table_width;
    int64_t window;  // 0: none
    float scale;
    int32_t threads;
};

// A block is kLanes positions, each with all its key heads side by side: what the inner loops read at a time, so
// that blocks may lie anywhere. A table has an entry for every position a slot may have; one past the sequence's
// end names some block, which may be read and is never used.
static inline const int64_t* table_of(const Step& s, int64_t slot, int64_t position) {
    return s.tables + slot * s.table_width + position / kLanes;
}

// Where a row's own position begins in the cache of a layer.
static inline int64_t kv_of(const Step& s, int64_t row) {
    int64_t position = s.positions[row];
    return (*table_of(s, s.slots[row], position) * kLanes + position % kLanes) * s.kv_heads * s.dim;
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
        int64_t at = kv_of(s, row);
        for (int64_t h = 0; h < s.heads; h++) rotate(q + h * s.dim, q + h * s.dim, cosine, sine, half);
        for (int64_t h = 0; h < s.kv_heads; h++) {
            rotate(k + h * s.dim, keys + at + h * s.dim, cosine, sine, half);
            std::memcpy(values + at + h * s.dim, v + h * s.dim, s.dim * sizeof(T));
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

// While a position is computed, fetches one position's share of a block to come. Memory is then read in order and
// all the time; strided reads of single heads, or whole blocks asked for at once, leave it idle in between.
constexpr int64_t kBlocksAhead = 2;

template <typename T, int D>
static inline void fetch_position(const T* share, int64_t position) {
    const char* from = (const char*)(share + position * D);
    for (size_t i = 0; i < D * sizeof(T); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Scores of R query heads for the next kLanes positions of their key head. Positions past the row's end may be
// read; the caller throws their scores away.
template <typename T, int D, int R>
static inline void score_block(
    const T* query, int64_t head_stride, const T* keys, int64_t stride, float scale, float* scores, int64_t room,
    const T* next
) {
    constexpr int N = kLanes / R;  // positions at a time, so that all sums of a round fill one vector
    for (int64_t j = 0; j < kLanes; j += N) {
        f32v dots[kLanes] = {};
        for (int k = 0; k < N; k++) {
            if (next) fetch_position<T, D>(next, j + k);
            for (int i = 0; i < D; i += 2 * kLanes)
                for (int r = 0; r < R; r++)
                    dots[r * N + k] =
                        plus_products(dots[r * N + k], query + r * head_stride + i, keys + (j + k) * stride + i);
        }
        f32v done = sums(dots) * scale;
        for (int r = 0; r < R; r++) std::memcpy(scores + r * room + j, (const float*)&done + r * N, N * sizeof(float));
    }
}

// Adds the weighted values of the next `count` positions to the R sums of dimension D in `mix` (split).
template <typename T, int D, int R>
static inline void mix_block(
    const float* weights, int64_t room, const T* values, int64_t stride, int64_t count, float* mix, const T* next
) {
    constexpr int V = D / kLanes;
    f32v acc[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) acc[r][i] = load(mix + r * D + i * kLanes);
    for (int64_t k = 0; k < count; k++) {
        if (next) fetch_position<T, D>(next, k);
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

// exp(score - highest) over one head's scores `first .. length - 1`, in place, and 0 before and after them up to
// `room`; returns their sum.
static float soften(float* scores, int64_t first, int64_t length, int64_t room) {
    for (int64_t j = 0; j < first; j++) scores[j] = -INFINITY;
    for (int64_t j = length; j < room; j++) scores[j] = -INFINITY;
    f32v top = load(scores);
    for (int64_t j = kLanes; j < room; j += kLanes) top = larger(top, load(scores + j));
    float highest = top[0];
    for (int i = 1; i < kLanes; i++) highest = top[i] > highest ? top[i] : highest;
    // The highest score is taken off first, so that no exponential overflows; below -200 they are 0 anyway.
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
        int64_t r = 0;  // a constant number of heads keeps their sums in registers
        for (; r + 4 <= repeat; r += 4) step(head * repeat + r, head, Constant<4>());
        for (; r + 2 <= repeat; r += 2) step(head * repeat + r, head, Constant<2>());
        for (; r < repeat; r++) step(head * repeat + r, head, Constant<1>());
    }
}

// The first position that a decode row sees.
static inline int64_t first_seen(const Step& s, int64_t row) {
    int64_t end = s.positions[row] + 1;
    return s.window && end > s.window ? end - s.window : 0;
}

// One row and the query heads of the key heads `first .. last - 1`. Keys are read once, then values, block by
// block; they begin with the block of the first position that the row sees.
template <typename T, int D>
static void attend_row(
    const Step& s, int64_t row, int64_t first, int64_t last, const T* q, int64_t head_stride, const T* keys,
    const T* values, T* out
) {
    int64_t repeat = s.heads / s.kv_heads, stride = s.kv_heads * D, hidden = first_seen(s, row) % kLanes;
    int64_t begin = first_seen(s, row) - hidden, length = s.positions[row] + 1 - begin;
    int64_t room = (length + kLanes - 1) / kLanes * kLanes;
    const int64_t* table = table_of(s, s.slots[row], begin);
    // Threads take rows in turn, so the next row's cache is read soon: it is asked for while this one is computed.
    int64_t following = row + 1 < s.decode_rows ? row + 1 : row;
    const int64_t* next_table = table_of(s, s.slots[following], first_seen(s, following));
    auto block_of = [&](const T* cache, const int64_t* blocks, int64_t j) {
        return cache + blocks[j / kLanes] * kLanes * stride;
    };

    static thread_local std::vector<float> space;
    space.assign(s.heads * D, 0.0f);  // `mix (heads, D)` starts at 0; `scores (heads, room)` are all written
    space.resize(s.heads * (D + room));
    float *mix = space.data(), *scores = mix + s.heads * D;

    // The block to fetch while block `number` is computed, keys and values counted through.
    auto ahead = [&](int64_t number) {
        int64_t at = (number + kBlocksAhead) * kLanes;
        if (at < room) return block_of(keys, table, at);
        return at < 2 * room ? block_of(values, table, at - room) : block_of(keys, next_table, at - 2 * room);
    };
    for (int64_t j = 0; j < room; j += kLanes) {
        find_pages(block_of(keys, next_table, j), kLanes * stride);
        const T *block = block_of(keys, table, j), *next = ahead(j / kLanes);
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            score_block<T, D, r.value>(
                q + h * head_stride, head_stride, block + head * D, stride, s.scale, scores + h * room + j, room,
                h == head * repeat ? next + head * kLanes * D : nullptr
            );
        });
    }
    for (int64_t h = first * repeat; h < last * repeat; h++) {
        float total = soften(scores + h * room, hidden, length, room);
        for (int64_t j = 0; j < room; j += kLanes)
            store(scores + h * room + j, load(scores + h * room + j) * (1.0f / total));
    }
    for (int64_t j = 0; j < length; j += kLanes) {
        find_pages(block_of(values, next_table, j), kLanes * stride);
        const T *block = block_of(values, table, j), *next = ahead((room + j) / kLanes);
        int64_t count = length - j < kLanes ? length - j : kLanes;
        for_heads(first, last, repeat, [&](int64_t h, int64_t head, auto r) {
            mix_block<T, D, r.value>(
                scores + h * room + j, room, block + head * D, stride, count, mix + h * D,
                h == head * repeat ? next + head * kLanes * D : nullptr
            );
        });
    }
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
