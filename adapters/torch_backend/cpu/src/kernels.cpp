// A step on the CPU: norm, rotary embedding with cache write, attention of single rows; and, where the CPU
// has vectors of 16 numbers, linear layers, and in bf16 the attention of prompt rows and all of a Llama-shaped model.
// The first would be half a dozen torch operators each, or attention padded to the longest row.
//
// A row's result depends on that row alone: its loops run over its own length in a fixed order, and threads
// share out whole rows or heads. Sums are fp32. Compiled by build.py with the system's compiler; written
// with the vector extension that gcc and clang share, for any CPU.

#include "model.h"

#if defined(__AVX512BW__)
#define LAB_LINEAR(T, name)                                                                                    \
    extern "C" void lab_linear_##name(                                                                         \
        const Linear* l, const T* x, int64_t rows, const T* other, T* out, int32_t epilogue                    \
    ) {                                                                                                        \
        product(*l, x, rows, other, out, Epilogue(epilogue));                                                  \
    }

LAB_LINEAR(float, float32)
LAB_LINEAR(bf16, bfloat16)

extern "C" int lab_attend_prompt_bfloat16(
    const Step* s, int64_t row, int64_t count, const bf16* q, int64_t row_stride, int64_t head_stride,
    const bf16* keys, const bf16* values, bf16* out
) {
    return attend_prompt_any(*s, row, count, q, row_stride, head_stride, keys, values, out);
}

extern "C" void lab_model_bfloat16(const Step* s, const Model* model, const Rows* rows, double* seconds) {
    run_model(*s, *model, *rows, seconds);
}
#endif

#define LAB_KERNELS(T, name)                                                                                   \
    extern "C" void lab_norm_##name(const T* x, const T* w, T* y, int64_t rows, int64_t size, float eps) {     \
        norm(x, w, y, rows, size, eps);                                                                        \
    }                                                                                                          \
    extern "C" void lab_argmax_##name(const T* x, int64_t rows, int64_t size, int64_t* found) {                \
        argmax(x, rows, size, size, found);                                                                    \
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
