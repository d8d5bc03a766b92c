// The parts of token scoring around the matmul, on one tile of tokens.
#pragma once

#include <cstdint>

#include "sdtp/floats.h"

namespace sdtp::cpu {

// Copies `num_tokens` rows of `hidden_size` contiguous elements, `stride` elements apart, to the dense `tile`. Float16
// is widened: no CPU matmul library is fast in it.
void copy_tile(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, float* tile);
void copy_tile(const BFloat16* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, BFloat16* tile);
void copy_tile(const Half* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, float* tile);

// inv_rms = 1 / sqrt(mean(x^2) + rms_eps) of each of `num_tokens` rows of the dense `tile`.
void inverse_rms(const float* tile, int64_t num_tokens, int64_t hidden_size, float rms_eps, float* inv_rms);
void inverse_rms(const BFloat16* tile, int64_t num_tokens, int64_t hidden_size, float rms_eps, float* inv_rms);

// The pruner after its first matmul, float32.
struct Head {
    const float* b1;  // [pruner_size]
    const float* w2;  // [pruner_size]
    float b2;
    int64_t pruner_size;
};

// scores = w2 . GELU(products * inv_rms + b1) + b2 for `num_tokens` rows of `products`, `stride` elements apart. A null
// `inv_rms` is 1.
void finish_tile(const float* products, int64_t stride, const float* inv_rms, int64_t num_tokens, const Head& head,
                 float* scores);
void finish_tile(const BFloat16* products, int64_t stride, const float* inv_rms, int64_t num_tokens, const Head& head,
                 float* scores);

}  // namespace sdtp::cpu
