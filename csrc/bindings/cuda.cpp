// The CUDA kernels of the private ops `sdtp_native::*`, on PyTorch's stable ABI; see cpu.cpp. No CUDA header is needed
// here: the kernels take pointers.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/token_rows.h"
#include "sdtp/cuda.h"

namespace sdtp {
namespace {

using cuda::Allocate;
using cuda::Element;
using cuda::PromptBias;
using cuda::Scoring;
using cuda::Selection;
using cuda::Stream;
using cuda::Window;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;
namespace stable = torch::stable;

// The one function that libtorch_cpu does not have. A reference to it, even a weak one, would stay null: torch loads
// its CUDA library for itself alone (RTLD_LOCAL). It is loaded by then, and this asks for nothing more.
Stream current_stream(const Tensor& tensor) {
    using GetStream = AOTITorchError (*)(int32_t device, void** stream);
    static const auto get = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(get != nullptr,
                    "backend 'cuda': this torch has no CUDA streams; install a torch that is built for CUDA");
    Stream stream{nullptr, tensor.get_device_index()};
    STABLE_TORCH_ERROR_CODE_CHECK(get(stream.device, &stream.handle));
    return stream;
}

// Device memory of a call. torch hands freed memory only to later work of the same stream.
class Scratch {
  public:
    explicit Scratch(const Tensor& like) : like_(like) {}

    Allocate allocator() {
        return [this](size_t bytes) {
            const std::array<int64_t, 1> shape{static_cast<int64_t>(bytes)};
            tensors_.push_back(stable::new_empty(like_, IntHeaderOnlyArrayRef(shape), ScalarType::Byte));
            return tensors_.back().mutable_data_ptr();
        };
    }

  private:
    const Tensor& like_;
    std::vector<Tensor> tensors_;
};

void check_launched(const char* error) {
    STD_TORCH_CHECK(error == nullptr, "backend 'cuda': a launch was refused: ", error);
}

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
    const std::array<int64_t, 2> shape{rows, columns};
    return stable::new_empty(like, IntHeaderOnlyArrayRef(shape), dtype);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(stable::contiguous(*tensor)) : std::nullopt;
}

Tensor with_contiguous_heads(const Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : stable::contiguous(tensor);
}

Element element_of(const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                    ": expected float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype),
                    "; cast it, or pass backend='reference'");
    if (dtype == ScalarType::Float) return Element::kFloat32;
    return dtype == ScalarType::BFloat16 ? Element::kBFloat16 : Element::kFloat16;
}

// A Scoring and what its pointers refer to.
struct Pruner {
    Tensor hidden_states, w1, b1, w2, b2;
    std::optional<Tensor> mean_score, score_bias;
    Scoring scoring;

    Pruner(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
           const std::optional<Tensor>& mean_score, int64_t num_scores, const std::optional<Tensor>& score_bias,
           std::optional<double> rms_eps)
        : hidden_states(hidden_states),
          w1(stable::contiguous(w1)),
          b1(stable::contiguous(b1)),
          w2(stable::contiguous(w2)),
          b2(b2),
          mean_score(contiguous(mean_score)),
          score_bias(contiguous(score_bias)) {
        scoring.element = element_of("hidden_states", hidden_states);
        scoring.hidden_states = hidden_states.const_data_ptr();
        scoring.batch_stride = hidden_states.stride(0);
        scoring.token_stride = hidden_states.stride(1);
        scoring.hidden_stride = hidden_states.stride(2);
        scoring.w1 = this->w1.const_data_ptr();
        scoring.b1 = this->b1.const_data_ptr<float>();
        scoring.w2 = this->w2.const_data_ptr<float>();
        scoring.b2 = b2.const_data_ptr<float>();
        scoring.mean_score = this->mean_score ? this->mean_score->const_data_ptr<float>() : nullptr;
        scoring.share = 1.0f / static_cast<float>(num_scores + 1);
        scoring.score_bias = this->score_bias ? this->score_bias->const_data_ptr<float>() : nullptr;
        scoring.batch_size = static_cast<int>(hidden_states.size(0));
        scoring.num_tokens = static_cast<int>(hidden_states.size(1));
        scoring.hidden_size = static_cast<int>(hidden_states.size(2));
        scoring.pruner_size = static_cast<int>(w1.size(0));
        scoring.num_scored = scoring.num_tokens;
        scoring.normalise = rms_eps.has_value();
        scoring.rms_eps = static_cast<float>(rms_eps.value_or(0.0));
    }
};

// A Selection, its results, and what its pointers refer to.
struct Chosen {
    std::optional<Tensor> rows;
    Tensor indices;
    Selection selection;

    Chosen(const Tensor& like, int64_t num_keep, int64_t sink, int64_t recent, std::optional<int64_t> block_size,
           const std::optional<Tensor>& rows, int64_t pooling)
        : rows(contiguous(rows)), indices(empty(like, like.size(0), num_keep, ScalarType::Long)) {
        const int64_t num_tokens = like.size(1);
        selection = {};
        selection.rows = this->rows ? this->rows->const_data_ptr<int64_t>() : nullptr;
        selection.indices = indices.mutable_data_ptr<int64_t>();
        selection.batch_size = static_cast<int>(like.size(0));
        selection.num_tokens = static_cast<int>(num_tokens);
        selection.num_keep = static_cast<int>(num_keep);
        selection.sink = static_cast<int>(std::min(sink, num_tokens));
        selection.recent = static_cast<int>(std::min(recent, num_tokens));
        selection.block_size = static_cast<int>(std::min(block_size.value_or(0), num_tokens + 1));
        selection.pooling = static_cast<int>(pooling);
    }
};

// A Window and what its pointers refer to. cos and sin hold tokens before the window, `first_rotary` of them.
struct Attended {
    Tensor query, key, query_index, key_index;
    std::optional<Tensor> cos, sin;
    Window window;

    Attended(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
             const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t first_rotary, double scaling,
             int64_t pooling)
        : query(with_contiguous_heads(query)),
          key(with_contiguous_heads(key)),
          query_index(stable::contiguous(query_index)),
          key_index(stable::contiguous(key_index)),
          cos(contiguous(cos)),
          sin(contiguous(sin)) {
        constexpr double kLog2E = 1.4426950408889634;
        window = {};
        window.element = element_of("query", query);
        window.query = this->query.const_data_ptr();
        window.key = this->key.const_data_ptr();
        for (int i = 0; i < 3; ++i) {
            window.query_strides[i] = this->query.stride(i);
            window.key_strides[i] = this->key.stride(i);
        }
        window.query_index = this->query_index.const_data_ptr<int64_t>();
        window.query_index_stride = this->query_index.stride(0);
        window.key_index = this->key_index.const_data_ptr<int64_t>();
        if (this->cos && this->sin) {
            const int64_t head_dim = query.size(3);
            const int64_t skipped = first_rotary * head_dim * static_cast<int64_t>(query.element_size());
            window.cos = static_cast<const char*>(this->cos->const_data_ptr()) + skipped;
            window.sin = static_cast<const char*>(this->sin->const_data_ptr()) + skipped;
            window.rotary_strides[0] = this->cos->size(0) == 1 ? 0 : this->cos->size(1) * head_dim;
            window.rotary_strides[1] = head_dim;
        }
        window.scale = static_cast<float>(scaling * kLog2E);
        window.batch_size = static_cast<int>(query.size(0));
        window.num_heads = static_cast<int>(query.size(1));
        window.num_key_heads = static_cast<int>(key.size(1));
        window.num_queries = static_cast<int>(query.size(2));
        window.num_keys = static_cast<int>(key.size(2));
        window.head_dim = static_cast<int>(query.size(3));
        window.pooling = static_cast<int>(std::min<int64_t>(pooling, 2 * cuda::kMaxTokens + 1));
    }
};

Tensor score_tokens(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    const std::optional<Tensor>& mean_score, int64_t num_scores,
                    const std::optional<Tensor>& score_bias, std::optional<double> rms_eps) {
    const DeviceGuard guard(hidden_states.get_device_index());
    const Pruner pruner(hidden_states, w1, b1, w2, b2, mean_score, num_scores, score_bias, rms_eps);
    Tensor scores = empty(hidden_states, hidden_states.size(0), hidden_states.size(1), ScalarType::Float);
    Scratch scratch(hidden_states);
    check_launched(cuda::score_tokens(pruner.scoring, scores.mutable_data_ptr<float>(), scratch.allocator(),
                                      current_stream(hidden_states)));
    return scores;
}

Tensor select_tokens(const Tensor& scores, int64_t num_keep, int64_t sink, int64_t recent,
                     std::optional<int64_t> block_size, const std::optional<Tensor>& rows, int64_t pooling) {
    const DeviceGuard guard(scores.get_device_index());
    const Tensor values = stable::contiguous(scores);
    const Chosen chosen(values, num_keep, sink, recent, block_size, rows, pooling);
    Scratch scratch(values);
    check_launched(cuda::select_tokens(values.const_data_ptr<float>(), chosen.selection, scratch.allocator(),
                                       current_stream(values)));
    return chosen.indices;
}

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices) {
    const DeviceGuard guard(indices.get_device_index());
    const Tensor columns = stable::contiguous(indices);
    const Gather gather(tensors, indices.size(1));
    check_launched(cuda::gather_tokens(gather.rows, columns.const_data_ptr<int64_t>(), indices.size(0), indices.size(1),
                                       current_stream(indices)));
    return gather.outputs;
}

// Scores tensors[0], gathers all of `tensors`. Returns them, the indices, the kept means, and the indices of the
// dropped tokens.
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> prune_tokens(
    const std::vector<Tensor>& tensors, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const std::optional<Tensor>& mean_score, int64_t num_scores, const std::optional<Tensor>& score_bias,
    std::optional<double> rms_eps, int64_t num_keep, int64_t sink, int64_t recent, std::optional<int64_t> block_size,
    const std::optional<Tensor>& rows, int64_t pooling, int64_t num_dropped) {
    const Tensor& hidden_states = tensors.at(0);
    const DeviceGuard guard(hidden_states.get_device_index());
    Pruner pruner(hidden_states, w1, b1, w2, b2, mean_score, num_scores, score_bias, rms_eps);
    Chosen chosen(hidden_states, num_keep, sink, recent, block_size, rows, pooling);
    const Gather gather(tensors, num_keep);
    Tensor kept_mean = empty(hidden_states, hidden_states.size(0), num_keep, ScalarType::Float);
    Tensor dropped = empty(hidden_states, hidden_states.size(0), num_dropped, ScalarType::Long);
    chosen.selection.kept_mean = kept_mean.mutable_data_ptr<float>();
    chosen.selection.dropped = dropped.mutable_data_ptr<int64_t>();
    chosen.selection.num_dropped = static_cast<int>(num_dropped);
    // Tokens that are always kept need no score; padded rows have tails of their own, which the host does not know.
    if (!rows) pruner.scoring.num_scored -= chosen.selection.recent;
    Scratch scratch(hidden_states);
    check_launched(cuda::prune_tokens(pruner.scoring, chosen.selection, gather.rows, scratch.allocator(),
                                      current_stream(hidden_states)));
    return {gather.outputs, chosen.indices, kept_mean, dropped};
}

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double scaling,
                        int64_t pooling) {
    const DeviceGuard guard(query.get_device_index());
    const Attended attended(query, key, query_index, key_index, cos, sin, 0, scaling, pooling);
    Tensor attention = empty(query, query.size(0), key.size(2), ScalarType::Float);
    Scratch scratch(query);
    check_launched(cuda::window_attention(attended.window, attention.mutable_data_ptr<float>(), scratch.allocator(),
                                          current_stream(query)));
    return attention;
}

Tensor prompt_bias(const Tensor& token_index, const Tensor& distance_table, int64_t keep_last,
                   const std::optional<Tensor>& attention, double attention_weight, const std::optional<Tensor>& query,
                   const std::optional<Tensor>& key, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                   double scaling, int64_t pooling) {
    const DeviceGuard guard(token_index.get_device_index());
    const Tensor indices = stable::contiguous(token_index);
    const Tensor table = stable::contiguous(distance_table);
    const std::optional<Tensor> given = contiguous(attention);
    const PromptBias prompt{indices.const_data_ptr<int64_t>(),
                            table.const_data_ptr<float>(),
                            table.size(table.dim() - 1),
                            table.dim() == 2,
                            given ? given->const_data_ptr<float>() : nullptr,
                            static_cast<float>(attention_weight),
                            static_cast<int>(indices.size(0)),
                            static_cast<int>(indices.size(1)),
                            static_cast<int>(keep_last)};
    std::optional<Attended> attended;
    if (query) {
        const int64_t first = indices.size(1) - keep_last - query->size(2);
        attended.emplace(*query, *key, indices, indices, cos, sin, first, scaling, pooling);
        attended->window.query_index += first;
    }
    Tensor bias = empty(indices, indices.size(0), indices.size(1), ScalarType::Float);
    Scratch scratch(indices);
    check_launched(cuda::prompt_bias(prompt, attended ? &attended->window : nullptr, bias.mutable_data_ptr<float>(),
                                     scratch.allocator(), current_stream(indices)));
    return bias;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sdtp_native, CUDA, m) {
    m.impl("score_tokens", TORCH_BOX(&score_tokens));
    m.impl("select_tokens", TORCH_BOX(&select_tokens));
    m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
    m.impl("prune_tokens", TORCH_BOX(&prune_tokens));
    m.impl("window_attention", TORCH_BOX(&window_attention));
    m.impl("prompt_bias", TORCH_BOX(&prompt_bias));
}

}  // namespace sdtp
