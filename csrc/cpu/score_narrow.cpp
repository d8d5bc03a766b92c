#include "cpu/score_narrow.h"

#include <algorithm>

// Needs 32 registers of 16 lanes, and a compiler that keeps arrays of vectors in them.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define SDTP_HAS_NARROW
#endif

namespace sdtp::cpu {
namespace {

constexpr int64_t kLanes = 16;
// 8 tokens x 3 vectors of sums, the weights of the 3 vectors and a value of x fill the registers. Fewer tokens would
// read the weights from the second-level cache faster than it gives them.
constexpr int64_t kTokens = 8;
constexpr int64_t kColumns = 3 * kLanes;
constexpr int64_t kMaxSize = 96;

}  // namespace

int64_t padded_size(int64_t pruner_size) { return (pruner_size + kLanes - 1) / kLanes * kLanes; }

void pack_narrow(const float* w1, int64_t pruner_size, int64_t hidden_size, float* packed) {
    std::fill_n(packed, hidden_size * padded_size(pruner_size), 0.0f);
    for (int64_t column = 0; column < pruner_size; column += kColumns) {
        const int64_t width = padded_size(std::min(kColumns, pruner_size - column));
        const int64_t count = std::min(width, pruner_size - column);
        const float* from = w1 + column * hidden_size;
        float* to = packed + column * hidden_size;
        // In blocks, so that a line of either side is used while it is near.
        for (int64_t begin = 0; begin < hidden_size; begin += kLanes) {
            const int64_t end = std::min(begin + kLanes, hidden_size);
            for (int64_t h = 0; h < count; ++h) {
                for (int64_t d = begin; d < end; ++d) to[d * width + h] = from[h * hidden_size + d];
            }
        }
    }
}

#ifdef SDTP_HAS_NARROW

#define SDTP_AVX512 __attribute__((target("arch=x86-64-v4")))

namespace {

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

// Products of a block of tokens with kVectors vectors of columns, `width` columns apart from token to token.
template <int kVectors>
SDTP_AVX512 void multiply_block(const float* const* rows, int64_t hidden_size, const float* packed, float* products,
                                int64_t width) {
    Vector sums[kTokens][kVectors] = {};
    for (int64_t d = 0; d < hidden_size; ++d) {
        const Vector* weights = reinterpret_cast<const Vector*>(packed) + d * kVectors;
        __builtin_prefetch(rows[0] + kTokens * (hidden_size + d));  // of the block that comes next
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sums[token][v] += rows[token][d] * weights[v];
        }
    }
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
            reinterpret_cast<Vector*>(products + token * width)[v] = sums[token][v];
        }
    }
}

}  // namespace

bool is_narrow(int64_t pruner_size) { return pruner_size <= kMaxSize && __builtin_cpu_supports("x86-64-v4"); }

void score_narrow(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, const float* packed,
                  const Head& head, const double* rms_eps, float* scores) {
    constexpr decltype(&multiply_block<1>) kMultiply[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>};
    alignas(sizeof(Vector)) float products[kTokens * kMaxSize];
    const int64_t width = padded_size(head.pruner_size);
    for (int64_t begin = 0; begin < num_tokens; begin += kTokens) {
        const int64_t count = std::min(kTokens, num_tokens - begin);
        const float* block[kTokens];
        float inv_rms[kTokens];
        // The last block takes its last token as often as it needs.
        for (int64_t i = 0; i < kTokens; ++i) block[i] = rows + (begin + std::min(i, count - 1)) * stride;
        for (int64_t i = 0; rms_eps != nullptr && i < count; ++i) {
            inverse_rms(block[i], 1, hidden_size, static_cast<float>(*rms_eps), &inv_rms[i]);
        }
        for (int64_t column = 0; column < width; column += kColumns) {
            const int64_t vectors = std::min(kColumns, width - column) / kLanes;
            kMultiply[vectors - 1](block, hidden_size, packed + column * hidden_size, products + column, width);
        }
        finish_tile(products, width, rms_eps == nullptr ? nullptr : inv_rms, count, head, scores + begin);
    }
}

#else

bool is_narrow(int64_t) { return false; }
void score_narrow(const float*, int64_t, int64_t, int64_t, const float*, const Head&, const double*, float*) {}

#endif

}  // namespace sdtp::cpu
