#include "cpu/narrow.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "sdtp/portable.h"

// Needs vectors of at least 8 lanes, and a compiler that keeps arrays of them in registers.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define SDTP_HAS_WIDE
#endif

namespace sdtp::cpu {
namespace {

constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

// Lanes of the widest registers that the machine has and ATEN_CPU_CAPABILITY allows, which is torch's own switch: by it
// one machine tests every path. 0 where they are too narrow.
int register_lanes() {
#ifdef SDTP_HAS_WIDE
    static const int lanes = [] {
        const char* value = std::getenv("ATEN_CPU_CAPABILITY");
        const std::string_view limit = value == nullptr ? "" : value;
        if (limit == "default") return 0;
        if (limit != "avx2" && __builtin_cpu_supports("x86-64-v4")) return 16;
        return __builtin_cpu_supports("x86-64-v3") ? 8 : 0;
    }();
    return lanes;
#else
    return 0;
#endif
}

int64_t in_lanes(int64_t num_units) { return (num_units + kLanes - 1) / kLanes; }

// So many rows are multiplied with a group of so many `Lanes` of units at once: the sums, the units and an element of a
// row fill the 32 registers of AVX-512 or the 16 of AVX2. Fewer rows would read the units from the second-level cache
// faster than it gives them.
struct Avx512 {
    typedef float Vector __attribute__((vector_size(64), may_alias));
    static constexpr int kRows = 8;
    static constexpr int kGroup = 3;
};
struct Avx2 {
    typedef float Vector __attribute__((vector_size(32), may_alias));
    static constexpr int kRows = 6;
    static constexpr int kGroup = 1;
};
static_assert(kSpareProducts >= std::max(Avx512::kRows, Avx2::kRows) - 1);

#ifdef SDTP_HAS_WIDE

// Rows are fetched from memory so many blocks before they are multiplied.
constexpr int64_t kBlocksAhead = 3;

// Products of a block of rows with a group of units, `width` floats apart from row to row. `later` is a block that is
// to come, of which `step` elements are fetched, not farther than the second-level cache, for each that is multiplied.
template <typename Machine, int kGroup>
SDTP_INLINE void multiply_block(const float* const* rows, const float* later, int64_t step, int64_t size,
                                const Lanes* packed, float* products, int64_t width) {
    using Vector = typename Machine::Vector;
    constexpr int kRows = Machine::kRows;
    constexpr int kVectors = kGroup * sizeof(Lanes) / sizeof(Vector);
    Vector sums[kRows][kVectors] = {};
    for (int64_t d = 0; d < size; ++d) {
        const Vector* units = reinterpret_cast<const Vector*>(packed) + d * kVectors;
        __builtin_prefetch(later + d * step, 0, 2);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sums[row][v] += rows[row][d] * units[v];
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(products + row * width)[v] = sums[row][v];
    }
}

template <typename Machine>
SDTP_INLINE void multiply_impl(const float* rows, int64_t stride, int64_t num_rows, int64_t size, const Lanes* packed,
                               int64_t num_units, float* products) {
    constexpr int64_t kRows = Machine::kRows;
    const int64_t num_lanes = in_lanes(num_units);
    const int64_t step = kRows * stride / std::max<int64_t>(size, 1);
    for (int64_t begin = 0; begin < num_rows; begin += kRows) {
        const float* block[kRows];
        // The last block takes its last row as often as it needs.
        for (int64_t i = 0; i < kRows; ++i) block[i] = rows + std::min(begin + i, num_rows - 1) * stride;
        const float* later = block[0] + kBlocksAhead * kRows * stride;
        const Lanes* units = packed;
        for (int64_t first = 0; first < num_lanes; first += Machine::kGroup) {
            const int64_t group = std::min<int64_t>(Machine::kGroup, num_lanes - first);
            float* to = products + begin * num_units + first * kLanes;
            if (group == 1) multiply_block<Machine, 1>(block, later, step, size, units, to, num_units);
            if constexpr (Machine::kGroup == 3) {
                if (group == 2) multiply_block<Machine, 2>(block, later, step, size, units, to, num_units);
                if (group == 3) multiply_block<Machine, 3>(block, later, step, size, units, to, num_units);
            }
            units += group * size;
        }
    }
}

__attribute__((target("arch=x86-64-v4"))) void multiply_avx512(const float* rows, int64_t stride, int64_t num_rows,
                                                               int64_t size, const Lanes* packed, int64_t num_units,
                                                               float* products) {
    multiply_impl<Avx512>(rows, stride, num_rows, size, packed, num_units, products);
}

__attribute__((target("arch=x86-64-v3"))) void multiply_avx2(const float* rows, int64_t stride, int64_t num_rows,
                                                             int64_t size, const Lanes* packed, int64_t num_units,
                                                             float* products) {
    multiply_impl<Avx2>(rows, stride, num_rows, size, packed, num_units, products);
}

#endif

void multiply_anywhere(const float* rows, int64_t stride, int64_t num_rows, int64_t size, const Lanes* packed,
                       int64_t num_units, float* products) {
    for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t first = 0; first < in_lanes(num_units); ++first) {
            float sums[kLanes] = {};
            for (int64_t d = 0; d < size; ++d) {
                const float* units = packed[first * size + d].values;
                for (int i = 0; i < kLanes; ++i) sums[i] += rows[row * stride + d] * units[i];
            }
            std::copy_n(sums, kLanes, products + row * num_units + first * kLanes);
        }
    }
}

}  // namespace

int64_t block_rows() {
    switch (register_lanes()) {
        case 16:
            return Avx512::kRows;
        case 8:
            return Avx2::kRows;
        default:
            return 0;
    }
}

std::vector<Lanes> pack_units(const float* units, int64_t num_units, int64_t size) {
    const int64_t group = kLanes * (register_lanes() == 16 ? Avx512::kGroup : Avx2::kGroup);
    std::vector<Lanes> packed(size * in_lanes(num_units));
    for (int64_t first = 0; first < num_units; first += group) {
        const int64_t count = std::min(group, num_units - first);
        const int64_t width = in_lanes(count) * kLanes;
        const float* from = units + first * size;
        float* to = reinterpret_cast<float*>(packed.data()) + first * size;
        // In blocks, so that a line of either side is used while it is near; no processor foresees so many rows.
        for (int64_t begin = 0; begin < size; begin += kLanes) {
            const int64_t end = std::min(begin + kLanes, size);
            for (int64_t h = 0; h < count; ++h) {
                __builtin_prefetch(from + h * size + begin + 2 * kLanes);
                for (int64_t d = begin; d < end; ++d) to[d * width + h] = from[h * size + d];
            }
        }
    }
    return packed;
}

void multiply_units(const float* rows, int64_t stride, int64_t num_rows, int64_t size, const Lanes* packed,
                    int64_t num_units, float* products) {
    auto multiply = multiply_anywhere;
#ifdef SDTP_HAS_WIDE
    if (register_lanes() == 16) multiply = multiply_avx512;
    if (register_lanes() == 8) multiply = multiply_avx2;
#endif
    multiply(rows, stride, num_rows, size, packed, num_units, products);
}

}  // namespace sdtp::cpu
