#include "cpu/score_tile.h"

#include <cmath>
#include <cstring>

#include "sdtp/gelu.h"
#include "sdtp/portable.h"

namespace sdtp::cpu {
namespace {

// Sums run in this many independent partial sums, on every machine: strict IEEE semantics forbid the compiler to
// reorder one sum, and a fixed order keeps a token's score independent of what is computed beside it. A pruner's width
// is most often a multiple of the second.
constexpr int kLanes = 32;
constexpr int kHeadLanes = 16;

SDTP_INLINE void store(float value, float& to) { to = value; }
SDTP_INLINE void store(BFloat16 value, BFloat16& to) { to = value; }
SDTP_INLINE void store(Half value, float& to) { to = to_float(value); }

template <int kCount>
SDTP_INLINE float sum_lanes(const float (&lanes)[kCount]) {
    float sum[kCount];
    std::memcpy(sum, lanes, sizeof(sum));
    for (int width = kCount / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
    }
    return sum[0];
}

template <typename From, typename To>
SDTP_INLINE void copy_tile_impl(const From* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, To* tile) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        const From* row = rows + token * stride;
        To* to = tile + token * hidden_size;
        for (int64_t d = 0; d < hidden_size; ++d) store(row[d], to[d]);
    }
}

template <typename Element>
SDTP_INLINE void inverse_rms_impl(const Element* tile, int64_t num_tokens, int64_t hidden_size, float rms_eps,
                                  float* inv_rms) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Element* row = tile + token * hidden_size;
        float squares[kLanes] = {};
        int64_t d = 0;
        for (; d + kLanes <= hidden_size; d += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) {
                const float value = to_float(row[d + lane]);
                squares[lane] += value * value;
            }
        }
        for (int lane = 0; d < hidden_size; ++d, ++lane) squares[lane] += to_float(row[d]) * to_float(row[d]);
        inv_rms[token] = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(hidden_size) + rms_eps);
    }
}

template <typename Product>
SDTP_INLINE void finish_tile_impl(const Product* products, int64_t stride, const float* inv_rms, int64_t num_tokens,
                                  const Head& head, float* scores) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Product* row = products + token * stride;
        const float scale = inv_rms == nullptr ? 1.0f : inv_rms[token];
        float sums[kHeadLanes] = {};
        int64_t h = 0;
        for (; h + kHeadLanes <= head.pruner_size; h += kHeadLanes) {
            for (int lane = 0; lane < kHeadLanes; ++lane) {
                const float activation = gelu(to_float(row[h + lane]) * scale + head.b1[h + lane]);
                sums[lane] += activation * head.w2[h + lane];
            }
        }
        if (h < head.pruner_size) {  // the rest among zeros: GELU one by one takes longer than of all lanes
            float inputs[kHeadLanes] = {}, weights[kHeadLanes] = {};
            for (int lane = 0; h + lane < head.pruner_size; ++lane) {
                inputs[lane] = to_float(row[h + lane]) * scale + head.b1[h + lane];
                weights[lane] = head.w2[h + lane];
            }
            for (int lane = 0; lane < kHeadLanes; ++lane) sums[lane] += gelu(inputs[lane]) * weights[lane];
        }
        scores[token] = sum_lanes(sums) + head.b2;
    }
}

}  // namespace

// One non-template function for each element type: target_clones does not apply to templates.

SDTP_VECTOR_CLONES void copy_tile(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size,
                                  float* tile) {
    copy_tile_impl(rows, stride, num_tokens, hidden_size, tile);
}

SDTP_VECTOR_CLONES void copy_tile(const BFloat16* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size,
                                  BFloat16* tile) {
    copy_tile_impl(rows, stride, num_tokens, hidden_size, tile);
}

SDTP_VECTOR_CLONES void copy_tile(const Half* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size,
                                  float* tile) {
    copy_tile_impl(rows, stride, num_tokens, hidden_size, tile);
}

SDTP_VECTOR_CLONES void inverse_rms(const float* tile, int64_t num_tokens, int64_t hidden_size, float rms_eps,
                                    float* inv_rms) {
    inverse_rms_impl(tile, num_tokens, hidden_size, rms_eps, inv_rms);
}

SDTP_VECTOR_CLONES void inverse_rms(const BFloat16* tile, int64_t num_tokens, int64_t hidden_size, float rms_eps,
                                    float* inv_rms) {
    inverse_rms_impl(tile, num_tokens, hidden_size, rms_eps, inv_rms);
}

SDTP_VECTOR_CLONES void finish_tile(const float* products, int64_t stride, const float* inv_rms, int64_t num_tokens,
                                    const Head& head, float* scores) {
    finish_tile_impl(products, stride, inv_rms, num_tokens, head, scores);
}

SDTP_VECTOR_CLONES void finish_tile(const BFloat16* products, int64_t stride, const float* inv_rms, int64_t num_tokens,
                                    const Head& head, float* scores) {
    finish_tile_impl(products, stride, inv_rms, num_tokens, head, scores);
}

}  // namespace sdtp::cpu
