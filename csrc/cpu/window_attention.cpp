#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/narrow.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"
#include "sdtp/floats.h"
#include "sdtp/gelu.h"
#include "sdtp/portable.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
namespace stable = torch::stable;

// Keys are cut into chunks from the end of a row, where left-padded rows agree. Inside a chunk every query goes through
// the keys one by one, and what is hidden adds zeros, so that no bit of a row depends on its padding.
constexpr int64_t kChunk = 256;
// Queries stand side by side in vectors, those of a head in vectors of their own.
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
// The logit of a hidden key. Not -inf, which would make NaN where a chunk holds nothing else.
constexpr float kHidden = -FLT_MAX;

// Work of about 10 us.
constexpr int64_t kGrain = 128 * 1024;

// All of a call as plain pointers: worker threads share no tensor with the caller. Strides are in elements.
struct WindowCall {
    const void* query;  // [batch, heads, window, head_dim], head_dim contiguous as in `key`
    int64_t query_strides[3];
    const void* key;  // [batch, key_heads, num_keys, head_dim]
    int64_t key_strides[3];
    const int64_t* key_index;  // [batch, num_keys], contiguous as all below
    const void* cos;           // [batch or 1, ..., head_dim], or null where the queries are rotated already
    const void* sin;
    int64_t first_rotary;   // the window's first row in them
    int64_t rotary_stride;  // from batch row to batch row, 0 where all have the same
    float scale;            // of the logits, in powers of two
    int64_t batch, heads, key_heads, window, num_keys, head_dim, pooling;
    std::vector<Lanes>* queries;  // [batch, key_heads] packed
    int32_t* last_seen;           // [batch, lanes] of the queries of one head, -1 in empty lanes
    // Of each batch row, key head and chunk, for each query of that head's group:
    float* powers;   // [..., kChunk + kSpareProducts, queries] 2^(logit - highest)
    float* highest;  // [..., queries] highest logit
    float* factors;  // [..., queries] sum of the powers; then what they count in the sum over the window
    float* sums;     // [batch, heads, num_keys] the sum over the window
    float* output;   // [batch, num_keys]

    int64_t group() const { return heads / key_heads; }
    int64_t num_chunks() const { return (num_keys + kChunk - 1) / kChunk; }
    // Lanes of a head, and of all heads that share a key head.
    int64_t head_lanes() const { return (window + kLanes - 1) / kLanes * kLanes; }
    int64_t num_queries() const { return group() * head_lanes(); }
    int64_t powers_size() const { return (kChunk + kSpareProducts) * num_queries(); }
    // Keys of a chunk.
    int64_t begin(int64_t chunk) const { return std::max<int64_t>(num_keys - (chunk + 1) * kChunk, 0); }
    int64_t end(int64_t chunk) const { return num_keys - chunk * kChunk; }
};

// Keeps `value` where `other` is NaN.
SDTP_INLINE float larger(float other, float value) { return other > value ? other : value; }

// 2^-t, or nothing where that is next to nothing: the product of two of them is still a normal number, and processors
// are slow with others.
SDTP_INLINE float exp2_or_zero(float t) { return t >= 50.0f ? 0.0f : exp2_negative(t); }

// The queries of one key head, rotated and scaled.
template <typename Element>
void load_queries(const WindowCall& call, int64_t row, int64_t key_head) {
    const auto [batch_stride, head_stride, query_stride] = call.query_strides;
    const int64_t head_dim = call.head_dim, half = head_dim / 2;
    std::vector<float> queries(call.num_queries() * head_dim);
    for (int64_t member = 0; member < call.group(); ++member) {
        for (int64_t i = 0; i < call.window; ++i) {
            const Element* query = static_cast<const Element*>(call.query) + row * batch_stride +
                                   (key_head * call.group() + member) * head_stride + i * query_stride;
            float* to = queries.data() + (member * call.head_lanes() + i) * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) to[d] = to_float(query[d]);
            if (call.cos != nullptr) {
                const int64_t rotary = row * call.rotary_stride + (call.first_rotary + i) * head_dim;
                const Element* cos = static_cast<const Element*>(call.cos) + rotary;
                const Element* sin = static_cast<const Element*>(call.sin) + rotary;
                for (int64_t d = 0; d < half; ++d) {
                    const float first = to[d], second = to[half + d];
                    to[d] = first * to_float(cos[d]) - second * to_float(sin[d]);
                    to[half + d] = second * to_float(cos[half + d]) + first * to_float(sin[half + d]);
                }
            }
            for (int64_t d = 0; d < head_dim; ++d) to[d] *= call.scale;
        }
    }
    call.queries[row * call.key_heads + key_head] = pack_units(queries.data(), call.num_queries(), head_dim);
}

int32_t to_int32(int64_t index) {
    return static_cast<int32_t>(std::clamp<int64_t>(index, -1, std::numeric_limits<int32_t>::max()));
}

// Hides the keys that a query does not see from a vector of queries.
SDTP_INLINE void hide(const int32_t* index, int64_t count, const int32_t* last_seen, float* logits, int64_t stride) {
    for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < kLanes; ++i) {
            float& logit = logits[j * stride + i];
            logit = index[j] < 0 || index[j] > last_seen[i] ? kHidden : logit;
        }
    }
}

// Logits to 2^(logit - highest), for a vector of queries.
SDTP_INLINE void exponentiate(float* logits, int64_t count, int64_t stride, float* highest, float* sums) {
    float most[kLanes], sum[kLanes];
    for (int i = 0; i < kLanes; ++i) most[i] = kHidden, sum[i] = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < kLanes; ++i) most[i] = larger(logits[j * stride + i], most[i]);
    }
    for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < kLanes; ++i) {
            const float power = exp2_or_zero(most[i] - logits[j * stride + i]);
            logits[j * stride + i] = power;
            sum[i] += power;
        }
    }
    for (int i = 0; i < kLanes; ++i) highest[i] = most[i], sums[i] = sum[i];
}

SDTP_VECTOR_CLONES void soften(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk) {
    const int64_t num_queries = call.num_queries(), count = call.end(chunk) - call.begin(chunk);
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks() + chunk;
    const int64_t* from = call.key_index + row * call.num_keys + call.begin(chunk);
    const int32_t* last_seen = call.last_seen + row * call.head_lanes();
    int32_t index[kChunk];
    int32_t lowest = 0, latest = 0;
    for (int64_t j = 0; j < count; ++j) {
        index[j] = to_int32(from[j]);
        lowest = std::min(lowest, index[j]);
        latest = std::max(latest, index[j]);
    }
    const bool is_all_seen = lowest >= 0 && latest <= *std::min_element(last_seen, last_seen + call.window);
    for (int64_t first = 0; first < num_queries; first += kLanes) {
        float* logits = call.powers + place * call.powers_size() + first;
        if (!is_all_seen) hide(index, count, last_seen + first % call.head_lanes(), logits, num_queries);
        exponentiate(logits, count, num_queries, call.highest + place * num_queries + first,
                     call.factors + place * num_queries + first);
    }
}

// The powers of a chunk of keys. `keys` is room for them as floats.
template <typename Element>
void attend(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk, std::vector<float>& keys) {
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks() + chunk;
    const int64_t begin = call.begin(chunk), count = call.end(chunk) - begin, head_dim = call.head_dim;
    const Element* key = static_cast<const Element*>(call.key) + row * call.key_strides[0] +
                         key_head * call.key_strides[1] + begin * call.key_strides[2];
    const float* rows = nullptr;
    int64_t stride = call.key_strides[2];
    if constexpr (std::is_same_v<Element, float>) {
        rows = key;
    } else {
        keys.resize(kChunk * head_dim);
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t d = 0; d < head_dim; ++d) keys[j * head_dim + d] = to_float(key[j * stride + d]);
        }
        rows = keys.data();
        stride = head_dim;
    }
    multiply_units(rows, stride, count, head_dim, call.queries[row * call.key_heads + key_head].data(),
                   call.num_queries(), call.powers + place * call.powers_size());
    soften(call, row, key_head, chunk);
}

// From the chunks' maxima and sums to the factors, for the queries of one key head: the softmax over all keys.
SDTP_VECTOR_CLONES void combine(const WindowCall& call, int64_t row, int64_t key_head) {
    const int64_t num_queries = call.num_queries();
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks();
    float* __restrict highest = call.highest + place * num_queries;
    float* __restrict factors = call.factors + place * num_queries;
    for (int64_t i = 0; i < num_queries; ++i) {
        float most = kHidden, sum = 0.0f;
        for (int64_t chunk = 0; chunk < call.num_chunks(); ++chunk) {
            most = std::max(most, highest[chunk * num_queries + i]);
        }
        for (int64_t chunk = 0; chunk < call.num_chunks(); ++chunk) {
            float& power = highest[chunk * num_queries + i];
            power = exp2_or_zero(most - power);
            sum += factors[chunk * num_queries + i] * power;
        }
        // A query that sees nothing has no say; NaN stays NaN.
        const float share = most == kHidden ? 0.0f * sum : 1.0f / sum;
        for (int64_t chunk = 0; chunk < call.num_chunks(); ++chunk) {
            factors[chunk * num_queries + i] = highest[chunk * num_queries + i] * share;
        }
    }
}

// The sum over the window, for the heads of one key head: a product of the powers with the factors, a unit a head.
struct SumWorkspace {
    const int64_t width;         // of a row of products
    std::vector<float> factors;  // [group, num_queries], zeros where a query is of another head
    std::vector<Lanes> products;

    explicit SumWorkspace(const WindowCall& call)
        : width((call.group() + kLanes - 1) / kLanes * kLanes),
          factors(call.group() * call.num_queries()),
          products((kChunk + kSpareProducts) * width / kLanes) {}
};

void sum_window(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk, SumWorkspace& workspace) {
    const int64_t num_queries = call.num_queries(), group = call.group();
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks() + chunk;
    const int64_t begin = call.begin(chunk), count = call.end(chunk) - begin;
    for (int64_t member = 0; member < group; ++member) {
        const int64_t first = member * call.head_lanes();
        std::copy_n(call.factors + place * num_queries + first, call.window,
                    workspace.factors.data() + member * num_queries + first);
    }
    const std::vector<Lanes> packed = pack_units(workspace.factors.data(), group, num_queries);
    float* products = workspace.products.data()->values;
    multiply_units(call.powers + place * call.powers_size(), num_queries, count, num_queries, packed.data(),
                   workspace.width, products);
    for (int64_t member = 0; member < group; ++member) {
        float* sums = call.sums + (row * call.heads + key_head * group + member) * call.num_keys + begin;
        for (int64_t j = 0; j < count; ++j) sums[j] = products[j * workspace.width + member];
    }
}

// Max-pooling, and the mean over the heads.
SDTP_VECTOR_CLONES void pool(const WindowCall& call, int64_t row, int64_t chunk) {
    const int64_t start = call.begin(chunk), stop = call.end(chunk);
    const int64_t reach = std::min(call.pooling / 2, call.num_keys);
    float total[kChunk] = {};
    for (int64_t head = 0; head < call.heads; ++head) {
        const float* sums = call.sums + (row * call.heads + head) * call.num_keys;
        float best[kChunk];
        std::copy(sums + start, sums + stop, best);
        for (int64_t step = -reach; step <= reach; ++step) {
            const int64_t end = std::min(stop, call.num_keys - step);
            for (int64_t j = std::max(start, -step); j < end; ++j) {
                best[j - start] = larger(sums[j + step], best[j - start]);
            }
        }
        for (int64_t j = 0; j < stop - start; ++j) total[j] += best[j];
    }
    float* output = call.output + row * call.num_keys + start;
    for (int64_t j = 0; j < stop - start; ++j) output[j] = total[j] / static_cast<float>(call.heads);
}

// `work(i, workspace)` for `count` items of so many operations each, on all threads, with a workspace for each thread.
template <typename MakeWorkspace, typename Work>
void for_each(int64_t count, int64_t operations, const MakeWorkspace& make_workspace, const Work& work) {
    stable::parallel_for(0, count, std::max<int64_t>(kGrain / std::max<int64_t>(operations, 1), 1),
                         [&](int64_t begin, int64_t end) {
                             auto workspace = make_workspace();
                             for (int64_t i = begin; i < end; ++i) work(i, workspace);
                         });
}

template <typename Element>
void compute(const WindowCall& call) {
    const int64_t chunks = call.num_chunks(), key_heads = call.key_heads, num_queries = call.num_queries();
    const auto nothing = [] { return 0; };
    for_each(call.batch * key_heads, num_queries * call.head_dim * 4, nothing,
             [&](int64_t i, int) { load_queries<Element>(call, i / key_heads, i % key_heads); });
    for_each(
        call.batch * key_heads * chunks, num_queries * kChunk * call.head_dim / 16, [] { return std::vector<float>(); },
        [&](int64_t i, std::vector<float>& keys) {
            attend<Element>(call, i / chunks / key_heads, i / chunks % key_heads, i % chunks, keys);
        });
    for_each(call.batch * key_heads, num_queries * chunks * 32, nothing,
             [&](int64_t i, int) { combine(call, i / key_heads, i % key_heads); });
    for_each(
        call.batch * key_heads * chunks, num_queries * kChunk, [&] { return SumWorkspace(call); },
        [&](int64_t i, SumWorkspace& workspace) {
            sum_window(call, i / chunks / key_heads, i / chunks % key_heads, i % chunks, workspace);
        });
    for_each(call.batch * chunks, call.heads * call.pooling * kChunk, nothing,
             [&](int64_t i, int) { pool(call, i / chunks, i % chunks); });
}

Tensor with_contiguous_rows(const Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : stable::contiguous(tensor);
}

}  // namespace

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double scaling,
                        int64_t pooling) {
    return window_attention_from(0, query, key, query_index, key_index, cos, sin, scaling, pooling);
}

Tensor window_attention_from(int64_t first, const Tensor& query, const Tensor& key, const Tensor& query_index,
                             const Tensor& key_index, const std::optional<Tensor>& cos,
                             const std::optional<Tensor>& sin, double scaling, int64_t pooling) {
    constexpr double kLog2E = 1.4426950408889634;
    // Named, so that what the pointers below refer to outlives the call.
    const Tensor queries = with_contiguous_rows(query);
    const Tensor keys = with_contiguous_rows(key);
    const Tensor query_indices = make_contiguous(query_index);
    const Tensor key_indices = make_contiguous(key_index);
    std::optional<Tensor> cosines, sines;
    if (cos.has_value() && sin.has_value()) {
        cosines = make_contiguous(*cos);
        sines = make_contiguous(*sin);
    }

    WindowCall call{};
    call.query = queries.const_data_ptr();
    call.key = keys.const_data_ptr();
    for (int i = 0; i < 3; ++i) {
        call.query_strides[i] = queries.stride(i);
        call.key_strides[i] = keys.stride(i);
    }
    call.key_index = key_indices.const_data_ptr<int64_t>();
    if (cosines.has_value()) {
        call.cos = cosines->const_data_ptr();
        call.sin = sines->const_data_ptr();
        call.first_rotary = first;
        call.rotary_stride = cosines->size(0) == 1 ? 0 : cosines->size(1) * cosines->size(2);
    }
    call.scale = static_cast<float>(scaling * kLog2E);
    call.batch = query.size(0);
    call.heads = query.size(1);
    call.key_heads = key.size(1);
    call.window = query.size(2);
    call.num_keys = key.size(2);
    call.head_dim = query.size(3);
    call.pooling = pooling;

    const int64_t places = call.batch * call.key_heads * call.num_chunks();
    std::vector<std::vector<Lanes>> packed(call.batch * call.key_heads);
    std::vector<int32_t> last_seen(call.batch * call.head_lanes(), -1);
    for (int64_t row = 0; row < call.batch; ++row) {
        for (int64_t i = 0; i < call.window; ++i) {
            const int64_t place = row * query_indices.size(1) + first + i;
            last_seen[row * call.head_lanes() + i] = to_int32(query_indices.const_data_ptr<int64_t>()[place]);
        }
    }
    const auto room = [](int64_t num_floats) {  // not zeroed, unlike that of a vector
        return std::unique_ptr<Lanes[]>(new Lanes[(num_floats + kLanes - 1) / kLanes]);
    };
    const auto powers = room(places * call.powers_size());
    const auto highest = room(places * call.num_queries());
    const auto factors = room(places * call.num_queries());
    const auto sums = room(call.batch * call.heads * call.num_keys);
    Tensor output = stable::new_empty(query, IntHeaderOnlyArrayRef({call.batch, call.num_keys}), ScalarType::Float);
    call.queries = packed.data();
    call.last_seen = last_seen.data();
    call.powers = powers[0].values;
    call.highest = highest[0].values;
    call.factors = factors[0].values;
    call.sums = sums[0].values;
    call.output = output.mutable_data_ptr<float>();
    if (call.window == 0) {
        std::fill_n(call.output, call.batch * call.num_keys, 0.0f);
    } else if (query.scalar_type() == ScalarType::Float) {
        compute<float>(call);
    } else if (query.scalar_type() == ScalarType::BFloat16) {
        compute<BFloat16>(call);
    } else {
        compute<Half>(call);
    }
    return output;
}

}  // namespace sdtp::cpu
