#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/narrow.h"
#include "cpu/ops.h"
#include "cpu/score_tile.h"
#include "cpu/tensors.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
namespace stable = torch::stable;

// Every matmul has this many rows, so that the library below takes the same path for every token. Measured on one core
// of Zen 4 against one matmul of 2048 rows, (D, H) = (896, 224) and (3584, 896): 256 rows cost 0 to 3 % more, 128 rows
// 0 to 7 %, 64 rows 0 to 24 %, as w1 is packed again for each tile. More rows would leave fewer tiles to share among
// cores.
constexpr int64_t kTileTokens = 256;

// A complete tile of dense rows is multiplied where it stands. Others are copied, to this alignment in bytes, which
// torch gives all its memory: the library below gets the same layout for every token.
constexpr uintptr_t kAlignment = 64;

// All of a call as plain pointers: worker threads share no tensor with the caller, whose autograd and inference modes
// they do not inherit.
struct ScoreCall {
    const void* hidden_states;  // rows contiguous; strides in elements
    int64_t batch_stride;
    int64_t token_stride;
    int64_t num_tokens;  // in each batch row
    int64_t hidden_size;
    const void* w1;  // [pruner_size, hidden_size], contiguous
    ScalarType matmul_dtype;
    const Lanes* packed;  // w1 for multiply_units, of narrow pruners; null otherwise
    Head head;
    std::optional<double> rms_eps;
    int64_t num_scored;       // leading tokens of a row that need a score
    const float* mean_score;  // [B, num_tokens], contiguous; may be null
    float share;              // of this score in the mean
    float* scores;            // [B, num_tokens], contiguous

    int64_t tiles_per_row() const { return (num_tokens + kTileTokens - 1) / kTileTokens; }
};

Tensor empty_tile(int64_t columns, ScalarType dtype) {
    const std::array<int64_t, 2> shape{kTileTokens, columns};
    return stable::empty(IntHeaderOnlyArrayRef(shape), dtype, std::nullopt, stable::Device(DeviceType::CPU));
}

Tensor dense_view(const void* data, int64_t rows, int64_t columns, ScalarType dtype) {
    const std::array<int64_t, 2> shape{rows, columns};
    const std::array<int64_t, 2> strides{columns, 1};
    return stable::from_blob(const_cast<void*>(data), IntHeaderOnlyArrayRef(shape), IntHeaderOnlyArrayRef(strides),
                             stable::Device(DeviceType::CPU), dtype);
}

AOTITorchError onednn_linear(const Tensor& tile, const Tensor& w1, StableIValue& product) {
    using stable::detail::from;
    std::array<StableIValue, 6> stack{from(tile),
                                      from(w1),
                                      from(std::nullopt),
                                      from(std::string("none")),
                                      from(std::vector<std::optional<int64_t>>{}),
                                      from(std::nullopt)};
    const auto error = torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION);
    product = stack[0];
    return error;
}

// A private op of torch, so it is tried once in each dtype: in bfloat16 it needs AVX-512. Only x86 gains by it.
template <typename Element>
bool try_onednn([[maybe_unused]] Element one, [[maybe_unused]] ScalarType dtype) {
#if defined(__x86_64__)
    const Tensor matrix = dense_view(&one, 1, 1, dtype);
    StableIValue product;
    if (onednn_linear(matrix, matrix, product) != 0) return false;
    const Tensor value = stable::detail::to<Tensor>(product);
    return *static_cast<const Element*>(value.const_data_ptr()) == one;
#else
    return false;
#endif
}

bool has_onednn(ScalarType dtype) {
    static const bool has_float32 = try_onednn(1.0f, ScalarType::Float);
    static const bool has_bfloat16 = try_onednn(uint16_t{0x3f80}, ScalarType::BFloat16);
    return dtype == ScalarType::BFloat16 ? has_bfloat16 : has_float32;
}

// tile w1^T. On one core of Zen 4 oneDNN reaches 95 to 101 GFLOP/s in float32, and MKL, which torch takes for it, 74 to
// 88; in bfloat16 torch takes oneDNN itself.
Tensor multiply(const Tensor& tile, const Tensor& w1) {
    if (has_onednn(tile.scalar_type())) {
        StableIValue product;
        STABLE_TORCH_ERROR_CODE_CHECK(onednn_linear(tile, w1, product));
        return stable::detail::to<Tensor>(product);
    }
    // Into `product`: autocast, which the caller's thread may be under and the others are not, leaves this form alone.
    const Tensor product = empty_tile(w1.size(0), w1.scalar_type());
    using stable::detail::from;
    std::array<StableIValue, 3> stack{from(tile), from(stable::transpose(w1, 0, 1)), from(product)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    stable::detail::to<Tensor>(stack[0]);  // a second reference to `product`, dropped here
    return product;
}

// Scores to running means.
void average(const ScoreCall& call, int64_t row, int64_t start, int64_t count, float* scores) {
    if (call.mean_score == nullptr) return;
    const float* mean = call.mean_score + row * call.num_tokens + start;
    for (int64_t token = 0; token < count; ++token)
        scores[token] = mean[token] + call.share * (scores[token] - mean[token]);
}

// A pruner of at most so many units is narrow; wider ones gain nothing.
constexpr int64_t kNarrow = 96;

// Norm, product and GELU of one block of rows after the other, while it is near.
void score_narrow(const ScoreCall& call, const float* tokens, int64_t num_tokens, float* scores) {
    constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
    const int64_t width = (call.head.pruner_size + kLanes - 1) / kLanes * kLanes;
    constexpr int64_t kMostRows = kSpareProducts + 1;
    alignas(sizeof(Lanes)) float products[kMostRows * kNarrow];
    float inv_rms[kMostRows];
    const int64_t step = block_rows();
    for (int64_t begin = 0; begin < num_tokens; begin += step) {
        const int64_t count = std::min(step, num_tokens - begin);
        const float* rows = tokens + begin * call.token_stride;
        for (int64_t i = 0; call.rms_eps && i < count; ++i) {
            inverse_rms(rows + i * call.token_stride, 1, call.hidden_size, static_cast<float>(*call.rms_eps),
                        &inv_rms[i]);
        }
        multiply_units(rows, call.token_stride, count, call.hidden_size, call.packed, width, products);
        finish_tile(products, width, call.rms_eps ? inv_rms : nullptr, count, call.head, scores + begin);
    }
}

// Scores the tiles `begin:end`, counted through all batch rows. Tiles are cut from the end of a row, where left-padded
// rows agree, and an incomplete one fills the end of its matmul: a token has the same place in the same matmul whatever
// the padding before it. Rows of a matmul without a token are computed too and dropped.
template <typename Element, typename MatmulElement>
void score_tiles(const ScoreCall& call, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t hidden_size = call.hidden_size;
    const int64_t pruner_size = call.head.pruner_size;
    const Tensor w1 = dense_view(call.w1, pruner_size, hidden_size, call.matmul_dtype);
    std::optional<Tensor> copy;
    std::array<float, kTileTokens> inv_rms;
    float* inv_rms_data = call.rms_eps ? inv_rms.data() : nullptr;

    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / call.tiles_per_row();
        const int64_t stop = call.num_tokens - i % call.tiles_per_row() * kTileTokens;
        const int64_t start = std::max<int64_t>(stop - kTileTokens, 0);
        const int64_t count = stop - start;
        const int64_t unused = kTileTokens - count;
        const auto* tokens =
            static_cast<const Element*>(call.hidden_states) + row * call.batch_stride + start * call.token_stride;
        float* scores = call.scores + row * call.num_tokens + start;
        const int64_t num_scored = std::min(count, call.num_scored - start);
        if (num_scored <= 0) continue;
        if constexpr (std::is_same_v<Element, float>) {
            if (call.packed != nullptr) {
                score_narrow(call, tokens, num_scored, scores);
                average(call, row, start, num_scored, scores);
                continue;
            }
        }
        const MatmulElement* tile = nullptr;
        if constexpr (std::is_same_v<Element, MatmulElement>) {
            const bool is_aligned = reinterpret_cast<uintptr_t>(tokens) % kAlignment == 0;
            if (unused == 0 && call.token_stride == hidden_size && is_aligned) tile = tokens;
        }
        if (tile == nullptr) {
            if (!copy) {
                copy = empty_tile(hidden_size, call.matmul_dtype);
                stable::zero_(*copy);
            }
            auto* data = static_cast<MatmulElement*>(copy->mutable_data_ptr());
            copy_tile(tokens, call.token_stride, count, hidden_size, data + unused * hidden_size);
            tile = data;
        }
        if (inv_rms_data != nullptr) {
            inverse_rms(tile + unused * hidden_size, count, hidden_size, static_cast<float>(*call.rms_eps),
                        inv_rms_data);
        }
        const Tensor products = multiply(dense_view(tile, kTileTokens, hidden_size, call.matmul_dtype), w1);
        const auto* products_data = static_cast<const MatmulElement*>(products.const_data_ptr());
        finish_tile(products_data + unused * pruner_size, pruner_size, inv_rms_data, num_scored, call.head, scores);
        average(call, row, start, num_scored, scores);
    }
}

template <typename Element, typename MatmulElement>
void score_all(const ScoreCall& call, int64_t batch) {
    const int64_t num_tiles = batch * call.tiles_per_row();
    // At least two iterations: a lone one would run outside a parallel region, where the matmul takes several threads
    // and may sum in another order. Inside, each tile is one thread's work.
    stable::parallel_for(0, std::max<int64_t>(num_tiles, 2), 1, [&](int64_t begin, int64_t end) {
        score_tiles<Element, MatmulElement>(call, begin, std::min(end, num_tiles));
    });
}

}  // namespace

Tensor mean_scores(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                   const std::optional<Tensor>& mean_score, int64_t num_scores, std::optional<double> rms_eps,
                   int64_t num_unscored) {
    const ScalarType dtype = hidden_states.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "hidden_states: expected float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype),
                    "; cast it, or pass backend='reference'");
    const ScalarType matmul_dtype = dtype == ScalarType::Half ? ScalarType::Float : dtype;
    const int64_t batch = hidden_states.size(0);
    const std::array<int64_t, 2> shape{batch, hidden_states.size(1)};

    // Named, so that what the pointers below refer to outlives the call.
    const Tensor tokens = hidden_states.stride(2) == 1 ? hidden_states : stable::contiguous(hidden_states);
    const Tensor weights = make_contiguous(w1.scalar_type() == matmul_dtype ? w1 : stable::to(w1, matmul_dtype));
    const Tensor b1_values = make_contiguous(b1);
    const Tensor w2_values = make_contiguous(w2);
    const std::optional<Tensor> mean = mean_score ? std::optional(make_contiguous(*mean_score)) : std::nullopt;
    Tensor scores = stable::new_empty(hidden_states, IntHeaderOnlyArrayRef(shape), ScalarType::Float);

    ScoreCall call{};
    call.hidden_states = tokens.const_data_ptr();
    call.batch_stride = tokens.stride(0);
    call.token_stride = tokens.stride(1);
    call.num_tokens = tokens.size(1);
    call.hidden_size = tokens.size(2);
    call.w1 = weights.const_data_ptr();
    call.matmul_dtype = matmul_dtype;
    call.head = {b1_values.const_data_ptr<float>(), w2_values.const_data_ptr<float>(), *b2.const_data_ptr<float>(),
                 w1.size(0)};
    std::vector<Lanes> packed;
    if (dtype == ScalarType::Float && block_rows() > 0 && w1.size(0) <= kNarrow) {
        packed = pack_units(weights.const_data_ptr<float>(), w1.size(0), call.hidden_size);
        call.packed = packed.data();
    }
    call.rms_eps = rms_eps;
    call.num_scored = call.num_tokens - num_unscored;
    call.mean_score = mean ? mean->const_data_ptr<float>() : nullptr;
    call.share = 1.0f / static_cast<float>(num_scores + 1);
    call.scores = scores.mutable_data_ptr<float>();
    if (dtype == ScalarType::Float) {
        score_all<float, float>(call, batch);
    } else if (dtype == ScalarType::BFloat16) {
        score_all<BFloat16, BFloat16>(call, batch);
    } else {
        score_all<Half, float>(call, batch);
    }
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t first = row * call.num_tokens + call.num_scored;
        if (mean) {
            std::copy_n(call.mean_score + first, num_unscored, call.scores + first);
        } else {
            std::fill_n(call.scores + first, num_unscored, 0.0f);
        }
    }
    return scores;
}

Tensor with_bias(const Tensor& means, const std::optional<Tensor>& score_bias) {
    if (!score_bias) return means;
    const Tensor bias = make_contiguous(*score_bias);
    Tensor scores = stable::new_empty(means, means.sizes());
    const auto *mean = means.const_data_ptr<float>(), *from = bias.const_data_ptr<float>();
    auto* to = scores.mutable_data_ptr<float>();
    for (int64_t i = 0; i < means.numel(); ++i) to[i] = mean[i] + from[i];
    return scores;
}

Tensor score_tokens(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    const std::optional<Tensor>& mean_score, int64_t num_scores,
                    const std::optional<Tensor>& score_bias, std::optional<double> rms_eps) {
    return with_bias(mean_scores(hidden_states, w1, b1, w2, b2, mean_score, num_scores, rms_eps, 0), score_bias);
}

}  // namespace sdtp::cpu
