// A step of a Llama-shaped model, from token ids to logits, with no way back to Python in between.
#pragma once

#include <chrono>

#include "prompts.h"

#if defined(__AVX512BW__)

struct Layer {  // mirrors `KernelLayer` in kernels.py
    const bf16 *input_norm, *mlp_norm;
    bf16 *keys, *values;
    Linear qkv, out, gate, up, down;
};

struct Model {  // mirrors `KernelModel` in kernels.py
    const bf16 *embedding, *norm;
    Linear head;  // its outputs may be padded
    const Layer* layers;
    int64_t num_layers, vocab_size;
    float eps;
};

// Neighbouring positions of one slot: `count` rows from `row` on.
struct PromptRows {
    int64_t row, count;
};

// Inputs and outputs of a step beside the cache. Mirrors `KernelRows` in kernels.py.
struct Rows {
    const int64_t* ids;  // per row
    const PromptRows* prompts;
    const int64_t* logit_rows;
    int64_t* likeliest;  // per row of logits
    bf16* logits;        // (num_logits, outputs of the head)
    int64_t num_prompts, num_logits;
};

enum Part { kNorms, kProducts, kRotation, kAttention };

// Adds the time since the last call to a part of the step, where somebody asks for it.
class PartTimes {
    using Clock = std::chrono::steady_clock;
    double* seconds_;
    Clock::time_point last_;

public:
    explicit PartTimes(double* seconds) : seconds_(seconds), last_(Clock::now()) {}
    void add(Part part) {
        if (!seconds_) return;
        auto now = Clock::now();
        seconds_[part] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }
};

// Rows `at[i]` of `from (.., size)`, side by side.
static void gather(const bf16* from, const int64_t* at, int64_t count, int64_t size, bf16* to) {
    for (int64_t i = 0; i < count; i++) std::memcpy(to + i * size, from + at[i] * size, size * sizeof(bf16));
}

// All buffers are `(rows, size)`. `x` is the residual stream; `gated` holds silu(gate) and then, in place, its
// product with up.
static void run_model(const Step& s, const Model& model, const Rows& r, double* seconds) {
    const Layer& like = model.layers[0];
    int64_t rows = s.rows, hidden = like.qkv.in_features, mixed_size = like.out.in_features;
    int64_t qkv_size = like.qkv.out_features, inner = like.gate.out_features;
    static thread_local std::vector<bf16> space;
    space.resize(rows * (2 * hidden + qkv_size + mixed_size + inner));
    bf16 *x = space.data(), *normed = x + rows * hidden, *qkv = normed + rows * hidden;
    bf16 *mixed = qkv + rows * qkv_size, *gated = mixed + rows * mixed_size;
    PartTimes times(seconds);
    gather(model.embedding, r.ids, rows, hidden, x);
    for (int64_t i = 0; i < model.num_layers; i++) {
        const Layer& l = model.layers[i];
        norm(x, l.input_norm, normed, rows, hidden, model.eps);
        times.add(kNorms);
        product(l.qkv, normed, rows, nullptr, qkv, kNone);
        times.add(kProducts);
        rotate_and_store(s, qkv, l.keys, l.values);
        times.add(kRotation);
        attend_any(s, qkv, qkv_size, s.dim, l.keys, l.values, mixed);
        for (int64_t p = 0; p < r.num_prompts; p++) {
            const PromptRows& some = r.prompts[p];
            attend_prompt_any(s, some.row, some.count, qkv, qkv_size, s.dim, l.keys, l.values, mixed);
        }
        times.add(kAttention);
        product(l.out, mixed, rows, x, x, kPlus);
        times.add(kProducts);
        norm(x, l.mlp_norm, normed, rows, hidden, model.eps);
        times.add(kNorms);
        product(l.gate, normed, rows, nullptr, gated, kSwish);
        product(l.up, normed, rows, gated, gated, kTimes);
        product(l.down, gated, rows, x, x, kPlus);
        times.add(kProducts);
    }
    gather(x, r.logit_rows, r.num_logits, hidden, normed);
    norm(normed, model.norm, normed, r.num_logits, hidden, model.eps);
    times.add(kNorms);
    product(model.head, normed, r.num_logits, nullptr, r.logits, kNone);
    times.add(kProducts);
    argmax(r.logits, r.num_logits, model.vocab_size, model.head.out_features, r.likeliest);
}

#endif
