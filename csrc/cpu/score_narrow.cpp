#include "cpu/score_narrow.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "sdtp/portable.h"

// Needs vectors of at least 8 lanes, and a compiler that keeps arrays of them in registers.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define SDTP_HAS_NARROW
#endif

namespace sdtp::cpu {

#ifdef SDTP_HAS_NARROW

namespace {

constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
constexpr int64_t kMaxSize = 96;

// Lanes of the widest registers that the machine has and ATEN_CPU_CAPABILITY allows, which is torch's own switch: by it
// one machine tests every path. 0 where they are too narrow.
int register_lanes() {
    static const int lanes = [] {
        const char* value = std::getenv("ATEN_CPU_CAPABILITY");
        const std::string_view limit = value == nullptr ? "" : value;
        if (limit == "default") return 0;
        if (limit != "avx2" && __builtin_cpu_supports("x86-64-v4")) return 16;
        return __builtin_cpu_supports("x86-64-v3") ? 8 : 0;
    }();
    return lanes;
}

// So many tokens are multiplied with a group of so many `Lanes` of units at once: the sums, the weights and a value of
// x fill the 32 registers of AVX-512 or the 16 of AVX2. Fewer tokens would read the weights from the second-level cache
// faster than it gives them.
struct Avx512 {
    typedef float Vector __attribute__((vector_size(64), may_alias));
    static constexpr int kTokens = 8;
    static constexpr int kGroup = 3;
};
struct Avx2 {
    typedef float Vector __attribute__((vector_size(32), may_alias));
    static constexpr int kTokens = 6;
    static constexpr int kGroup = 1;
};

int64_t in_lanes(int64_t pruner_size) { return (pruner_size + kLanes - 1) / kLanes; }

// Products of a block of tokens with a group of units, `width` floats apart from token to token.
template <typename Machine, int kGroup>
SDTP_INLINE void multiply_block(const float* const* rows, int64_t hidden_size, const Lanes* packed, float* products,
                                int64_t width) {
    using Vector = typename Machine::Vector;
    constexpr int kTokens = Machine::kTokens;
    constexpr int kVectors = kGroup * sizeof(Lanes) / sizeof(Vector);
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

template <typename Machine>
SDTP_INLINE void score_narrow_impl(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size,
                                   const Lanes* packed, const Head& head, const double* rms_eps, float* scores) {
    constexpr int64_t kTokens = Machine::kTokens;
    alignas(sizeof(Lanes)) float products[kTokens * kMaxSize];
    const int64_t num_lanes = in_lanes(head.pruner_size);
    const int64_t width = num_lanes * kLanes;
    for (int64_t begin = 0; begin < num_tokens; begin += kTokens) {
        const int64_t count = std::min(kTokens, num_tokens - begin);
        const float* block[kTokens];
        float inv_rms[kTokens];
        // The last block takes its last token as often as it needs.
        for (int64_t i = 0; i < kTokens; ++i) block[i] = rows + (begin + std::min(i, count - 1)) * stride;
        for (int64_t i = 0; rms_eps != nullptr && i < count; ++i) {
            inverse_rms(block[i], 1, hidden_size, static_cast<float>(*rms_eps), &inv_rms[i]);
        }
        const Lanes* weights = packed;
        for (int64_t first = 0; first < num_lanes; first += Machine::kGroup) {
            const int64_t group = std::min<int64_t>(Machine::kGroup, num_lanes - first);
            float* to = products + first * kLanes;
            if (group == 1) multiply_block<Machine, 1>(block, hidden_size, weights, to, width);
            if constexpr (Machine::kGroup == 3) {
                if (group == 2) multiply_block<Machine, 2>(block, hidden_size, weights, to, width);
                if (group == 3) multiply_block<Machine, 3>(block, hidden_size, weights, to, width);
            }
            weights += group * hidden_size;
        }
        finish_tile(products, width, rms_eps == nullptr ? nullptr : inv_rms, count, head, scores + begin);
    }
}

__attribute__((target("arch=x86-64-v4"))) void score_avx512(const float* rows, int64_t stride, int64_t num_tokens,
                                                            int64_t hidden_size, const Lanes* packed, const Head& head,
                                                            const double* rms_eps, float* scores) {
    score_narrow_impl<Avx512>(rows, stride, num_tokens, hidden_size, packed, head, rms_eps, scores);
}

__attribute__((target("arch=x86-64-v3"))) void score_avx2(const float* rows, int64_t stride, int64_t num_tokens,
                                                          int64_t hidden_size, const Lanes* packed, const Head& head,
                                                          const double* rms_eps, float* scores) {
    score_narrow_impl<Avx2>(rows, stride, num_tokens, hidden_size, packed, head, rms_eps, scores);
}

}  // namespace

bool is_narrow(int64_t pruner_size) { return pruner_size <= kMaxSize && register_lanes() > 0; }

std::vector<Lanes> pack_narrow(const float* w1, int64_t pruner_size, int64_t hidden_size) {
    const int64_t group = kLanes * (register_lanes() == 16 ? Avx512::kGroup : Avx2::kGroup);
    std::vector<Lanes> packed(hidden_size * in_lanes(pruner_size));
    for (int64_t first = 0; first < pruner_size; first += group) {
        const int64_t count = std::min(group, pruner_size - first);
        const int64_t width = in_lanes(count) * kLanes;
        const float* from = w1 + first * hidden_size;
        float* to = reinterpret_cast<float*>(packed.data()) + first * hidden_size;
        // In blocks, so that a line of either side is used while it is near; no processor foresees so many rows.
        for (int64_t begin = 0; begin < hidden_size; begin += kLanes) {
            const int64_t end = std::min(begin + kLanes, hidden_size);
            for (int64_t h = 0; h < count; ++h) {
                __builtin_prefetch(from + h * hidden_size + begin + 2 * kLanes);
                for (int64_t d = begin; d < end; ++d) to[d * width + h] = from[h * hidden_size + d];
            }
        }
    }
    return packed;
}

void score_narrow(const float* rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, const Lanes* packed,
                  const Head& head, const double* rms_eps, float* scores) {
    const auto score = register_lanes() == 16 ? score_avx512 : score_avx2;
    score(rows, stride, num_tokens, hidden_size, packed, head, rms_eps, scores);
}

#else

bool is_narrow(int64_t) { return false; }
std::vector<Lanes> pack_narrow(const float*, int64_t, int64_t) { return {}; }
void score_narrow(const float*, int64_t, int64_t, int64_t, const Lanes*, const Head&, const double*, float*) {}

#endif

}  // namespace sdtp::cpu
