// The product of many rows with so few units (a narrow pruner's, a window's queries) that what they multiply into fits
// in registers: one pass over the rows.
#pragma once

#include <cstdint>
#include <vector>

namespace sdtp::cpu {

// A vector of neighbouring units.
struct alignas(64) Lanes {
    float values[16];
};

// Rows that multiply_units takes at once; 0 where this machine has no vectors that make it worth while.
int64_t block_rows();

// `units` [num_units, size] as multiply_units reads them: transposed, zeros where `num_units` fills no vector.
std::vector<Lanes> pack_units(const float* units, int64_t num_units, int64_t size);

// multiply_units computes rows in blocks, the last of which may reach so far beyond the last row.
constexpr int64_t kSpareProducts = 7;

// products[row, unit] = rows[row] . units[unit], for `num_rows` rows of `size` elements, `stride` elements apart. A row
// of `products` has `num_units` elements, in whole and aligned vectors, and there is room for `kSpareProducts` rows
// more. A product is the same whatever stands before, after and beside its row.
void multiply_units(const float* rows, int64_t stride, int64_t num_rows, int64_t size, const Lanes* packed,
                    int64_t num_units, float* products);

}  // namespace sdtp::cpu
