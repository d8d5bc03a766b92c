// Scoring in one pass over the hidden states, for pruners narrow enough that what they multiply into fits in registers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/score_tile.h"

namespace sdtp::cpu {

// Whether this machine has the registers for it, and the pruner fits into them.
bool is_narrow(int64_t pruner_size);

// A vector of neighbouring units.
struct alignas(64) Lanes {
    float values[16];
};

// w1 [pruner_size, hidden_size] as score_narrow reads it: transposed, zeros where `pruner_size` fills no vector.
std::vector<Lanes> pack_narrow(const float* w1, int64_t pruner_size, int64_t hidden_size);

// Scores of `num_tokens` rows, `stride` elements apart. Without `rms_eps` x is not divided by its root mean square. A
// score is the same whatever stands before, behind and beside its token.
void score_narrow(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, const Lanes* packed,
                  const Head& head, const double* rms_eps, float* scores);

}  // namespace sdtp::cpu
