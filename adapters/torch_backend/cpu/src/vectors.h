// Vectors of 16 numbers in fp32, loaded from and stored to fp32 and bf16; sums in one order; the exponential.
#pragma once

#if defined(__AVX512BW__)
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

// Finding the memory page of an address can take longer than reading from it, so it is asked for well ahead.
template <typename T>
static inline void find_pages(const T* from, int64_t size) {
    for (size_t i = 0; i < size * sizeof(T); i += 4096) __builtin_prefetch((const char*)from + i, 0, 2);
}
