#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cstdint>
#include <vector>

#include "cpu/ops.h"
#include "sdtp/floats.h"
#include "sdtp/gelu.h"
#include "sdtp/portable.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
namespace stable = torch::stable;

// Keys are cut into chunks from the end of a row, where left-padded rows agree, and a key keeps its place in its chunk
// whatever stands before it: the first chunk has empty slots in front, which count as keys that no query sees. What is
// hidden adds zeros, so that no bit of a row depends on its padding.
constexpr int64_t kChunk = 256;
// Keys stand side by side in vectors. With so many queries their products fill the registers of AVX-512 and no more.
constexpr int kKeys = 32;
constexpr int kQueries = 8;
// Keys transposed at once: as many rows as compilers still turn into shuffles.
constexpr int kRows = 8;
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
    const int64_t* query_index;  // [batch, window], contiguous as all below
    const int64_t* key_index;    // [batch, num_keys]
    const float* query_weight;   // [batch, window]
    float scale;                 // of the logits, in powers of two
    int64_t batch, heads, key_heads, window, num_keys, head_dim, pooling;
    // Of each batch row, key head and chunk, for each query of that head's group:
    float* powers;   // [..., queries, kChunk] 2^(logit - highest)
    float* highest;  // [..., queries] highest logit
    float* factors;  // [..., queries] sum of the powers; then what they count in the sum over the window
    float* sums;     // [batch, heads, num_keys] the sum over the window
    float* output;   // [batch, num_keys]

    int64_t group() const { return heads / key_heads; }
    int64_t num_chunks() const { return (num_keys + kChunk - 1) / kChunk; }
    int64_t num_queries() const { return (group() * window + kQueries - 1) / kQueries * kQueries; }
    // The first key of a chunk; negative where the chunk begins with empty slots.
    int64_t chunk_start(int64_t chunk) const { return num_keys - (chunk + 1) * kChunk; }
};

// The slots of a chunk that are computed: all but whole blocks of empty ones.
SDTP_INLINE int64_t first_slot(int64_t chunk_start) { return std::max<int64_t>(-chunk_start, 0) / kKeys * kKeys; }

// Keeps `value` where `other` is NaN.
SDTP_INLINE float larger(float other, float value) { return other > value ? other : value; }

SDTP_INLINE float exp2_or_zero(float t) { return t >= 126.0f ? 0.0f : exp2_negative(t); }

// Buffers of one thread.
struct Workspace {
    std::vector<float> queries;  // [num_queries, head_dim], scaled
    std::vector<float> rows;     // [head_dim, kRows]
    std::vector<float> keys;     // [head_dim, kKeys]

    explicit Workspace(const WindowCall& call)
        : queries(call.num_queries() * call.head_dim), rows(call.head_dim * kRows), keys(call.head_dim * kKeys) {}
};

template <typename Element>
SDTP_INLINE void load_queries(const WindowCall& call, int64_t row, int64_t key_head, float* queries) {
    const auto [batch_stride, head_stride, query_stride] = call.query_strides;
    for (int64_t i = 0; i < call.group() * call.window; ++i) {
        const int64_t head = key_head * call.group() + i / call.window;
        const Element* query = static_cast<const Element*>(call.query) + row * batch_stride + head * head_stride +
                               i % call.window * query_stride;
        for (int64_t d = 0; d < call.head_dim; ++d) queries[i * call.head_dim + d] = to_float(query[d]) * call.scale;
    }
}

// keys[d, i] of the keys `first` to `first + kKeys`; empty slots hold the first key.
template <typename Element>
SDTP_INLINE void load_keys(const Element* key, int64_t stride, int64_t first, int64_t head_dim, float* rows,
                           float* keys) {
    for (int part = 0; part < kKeys; part += kRows) {
        const Element* row[kRows];
        for (int i = 0; i < kRows; ++i) row[i] = key + std::max<int64_t>(first + part + i, 0) * stride;
        for (int64_t d = 0; d < head_dim; ++d) {
            for (int i = 0; i < kRows; ++i) rows[d * kRows + i] = to_float(row[i][d]);
        }
        for (int64_t d = 0; d < head_dim; ++d) {
            for (int i = 0; i < kRows; ++i) keys[d * kKeys + part + i] = rows[d * kRows + i];
        }
    }
}

// logits[q, i] = queries[q] . keys[:, i]
SDTP_INLINE void multiply(const float* __restrict queries, const float* __restrict keys, int64_t head_dim,
                          float* __restrict logits) {
    float sums[kQueries][kKeys] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
        for (int q = 0; q < kQueries; ++q) {
            for (int i = 0; i < kKeys; ++i) sums[q][i] += queries[q * head_dim + d] * keys[d * kKeys + i];
        }
    }
    for (int q = 0; q < kQueries; ++q) {
        for (int i = 0; i < kKeys; ++i) logits[q * kChunk + i] = sums[q][i];
    }
}

// Logits to 2^(logit - highest), for the slots from `begin` on.
SDTP_INLINE void exponentiate(float* logits, int64_t begin, float& highest, float& sum) {
    float lanes[kKeys];
    for (int i = 0; i < kKeys; ++i) lanes[i] = kHidden;
    for (int64_t slot = begin; slot < kChunk; slot += kKeys) {
        for (int i = 0; i < kKeys; ++i) lanes[i] = larger(logits[slot + i], lanes[i]);
    }
    for (int width = kKeys / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = larger(lanes[i + width], lanes[i]);
    }
    highest = lanes[0];
    const float most = lanes[0];
    for (int i = 0; i < kKeys; ++i) lanes[i] = 0.0f;
    for (int64_t slot = begin; slot < kChunk; slot += kKeys) {
        for (int i = 0; i < kKeys; ++i) {
            const float power = exp2_or_zero(most - logits[slot + i]);
            logits[slot + i] = power;
            lanes[i] += power;
        }
    }
    for (int width = kKeys / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    sum = lanes[0];
}

template <typename Element>
SDTP_INLINE void attend_impl(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk,
                             Workspace& workspace) {
    const int64_t num_queries = call.num_queries();
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks() + chunk;
    float* logits = call.powers + place * num_queries * kChunk;
    const int64_t start = call.chunk_start(chunk);
    const int64_t begin = first_slot(start);

    float* queries = workspace.queries.data();
    float* keys = workspace.keys.data();
    load_queries<Element>(call, row, key_head, queries);
    const Element* key =
        static_cast<const Element*>(call.key) + row * call.key_strides[0] + key_head * call.key_strides[1];
    for (int64_t slot = begin; slot < kChunk; slot += kKeys) {
        load_keys(key, call.key_strides[2], start + slot, call.head_dim, workspace.rows.data(), keys);
        for (int64_t q = 0; q < num_queries; q += kQueries) {
            multiply(queries + q * call.head_dim, keys, call.head_dim, logits + q * kChunk + slot);
        }
    }

    int64_t index[kChunk];
    for (int64_t slot = begin; slot < kChunk; ++slot) {
        index[slot] = start + slot < 0 ? -1 : call.key_index[row * call.num_keys + start + slot];
    }
    const auto [lowest, latest] = std::minmax_element(index + begin, index + kChunk);
    for (int64_t i = 0; i < call.group() * call.window; ++i) {
        float* own = logits + i * kChunk;
        const int64_t in_window = row * call.window + i % call.window;
        const int64_t last_seen = call.query_weight[in_window] == 0.0f ? -1 : call.query_index[in_window];
        if (*lowest < 0 || *latest > last_seen) {
            for (int64_t slot = begin; slot < kChunk; ++slot) {
                own[slot] = index[slot] < 0 || index[slot] > last_seen ? kHidden : own[slot];
            }
        }
        exponentiate(own, begin, call.highest[place * num_queries + i], call.factors[place * num_queries + i]);
    }
}

// From the chunks' maxima and sums to the factors, for the queries of one key head: the softmax over all keys, times
// the query's weight.
SDTP_VECTOR_CLONES void combine(const WindowCall& call, int64_t row, int64_t key_head) {
    const int64_t num_queries = call.num_queries();
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks();
    float* __restrict highest = call.highest + place * num_queries;
    float* __restrict factors = call.factors + place * num_queries;
    for (int64_t i = 0; i < call.group() * call.window; ++i) {
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
        const float share = most == kHidden ? 0.0f * sum : call.query_weight[row * call.window + i % call.window] / sum;
        for (int64_t chunk = 0; chunk < call.num_chunks(); ++chunk) {
            factors[chunk * num_queries + i] = highest[chunk * num_queries + i] * share;
        }
    }
}

// The sum over the window, for the heads of one key head.
SDTP_VECTOR_CLONES void sum_window(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk) {
    const int64_t num_queries = call.num_queries();
    const int64_t place = (row * call.key_heads + key_head) * call.num_chunks() + chunk;
    const int64_t start = call.chunk_start(chunk);
    for (int64_t member = 0; member < call.group(); ++member) {
        const float* factors = call.factors + place * num_queries + member * call.window;
        const float* powers = call.powers + (place * num_queries + member * call.window) * kChunk;
        float* sums = call.sums + (row * call.heads + key_head * call.group() + member) * call.num_keys + start;
        for (int64_t slot = first_slot(start); slot < kChunk; slot += kKeys) {
            float lanes[kKeys] = {};
            for (int64_t i = 0; i < call.window; ++i) {
                for (int lane = 0; lane < kKeys; ++lane) lanes[lane] += factors[i] * powers[i * kChunk + slot + lane];
            }
            for (int lane = std::max<int64_t>(-start - slot, 0); lane < kKeys; ++lane) sums[slot + lane] = lanes[lane];
        }
    }
}

// Max-pooling, and the mean over the heads.
SDTP_VECTOR_CLONES void pool(const WindowCall& call, int64_t row, int64_t chunk) {
    const int64_t start = std::max<int64_t>(call.chunk_start(chunk), 0);
    const int64_t stop = call.num_keys - chunk * kChunk;
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

// One non-template function for each element type: target_clones does not apply to templates.

SDTP_VECTOR_CLONES void attend(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk,
                               Workspace& workspace, float) {
    attend_impl<float>(call, row, key_head, chunk, workspace);
}

SDTP_VECTOR_CLONES void attend(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk,
                               Workspace& workspace, BFloat16) {
    attend_impl<BFloat16>(call, row, key_head, chunk, workspace);
}

SDTP_VECTOR_CLONES void attend(const WindowCall& call, int64_t row, int64_t key_head, int64_t chunk,
                               Workspace& workspace, Half) {
    attend_impl<Half>(call, row, key_head, chunk, workspace);
}

// `work(i)` for `count` items of so many operations each, on all threads.
template <typename Work>
void for_each(int64_t count, int64_t operations, const Work& work) {
    stable::parallel_for(0, count, std::max<int64_t>(kGrain / std::max<int64_t>(operations, 1), 1), work);
}

template <typename Element>
void compute(const WindowCall& call) {
    const int64_t chunks = call.num_chunks(), key_heads = call.key_heads, num_queries = call.num_queries();
    for_each(call.batch * key_heads * chunks, num_queries * kChunk * call.head_dim / 16,
             [&](int64_t begin, int64_t end) {
                 Workspace workspace(call);
                 for (int64_t i = begin; i < end; ++i) {
                     attend(call, i / chunks / key_heads, i / chunks % key_heads, i % chunks, workspace, Element());
                 }
             });
    for_each(call.batch * key_heads, num_queries * chunks * 32, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) combine(call, i / key_heads, i % key_heads);
    });
    for_each(call.batch * key_heads * chunks, num_queries * kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            sum_window(call, i / chunks / key_heads, i / chunks % key_heads, i % chunks);
    });
    for_each(call.batch * chunks, call.heads * call.pooling * kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pool(call, i / chunks, i % chunks);
    });
}

Tensor with_contiguous_rows(const Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : stable::contiguous(tensor);
}

}  // namespace

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
                        const Tensor& query_weight, double scaling, int64_t pooling) {
    constexpr double kLog2E = 1.4426950408889634;
    // Named, so that what the pointers below refer to outlives the call.
    const Tensor queries = with_contiguous_rows(query);
    const Tensor keys = with_contiguous_rows(key);
    const Tensor query_indices = stable::contiguous(query_index);
    const Tensor key_indices = stable::contiguous(key_index);
    const Tensor weights = stable::contiguous(query_weight);

    WindowCall call{};
    call.query = queries.const_data_ptr();
    call.key = keys.const_data_ptr();
    for (int i = 0; i < 3; ++i) {
        call.query_strides[i] = queries.stride(i);
        call.key_strides[i] = keys.stride(i);
    }
    call.query_index = query_indices.const_data_ptr<int64_t>();
    call.key_index = key_indices.const_data_ptr<int64_t>();
    call.query_weight = weights.const_data_ptr<float>();
    call.scale = static_cast<float>(scaling * kLog2E);
    call.batch = query.size(0);
    call.heads = query.size(1);
    call.key_heads = key.size(1);
    call.window = query.size(2);
    call.num_keys = key.size(2);
    call.head_dim = query.size(3);
    call.pooling = pooling;

    const auto floats = [&](std::vector<int64_t> shape) {
        return stable::new_empty(query, IntHeaderOnlyArrayRef(shape), ScalarType::Float);
    };
    const int64_t places = call.batch * call.key_heads * call.num_chunks();
    const Tensor powers = floats({places, call.num_queries(), kChunk});
    const Tensor highest = floats({places, call.num_queries()});
    const Tensor factors = floats({places, call.num_queries()});
    const Tensor sums = floats({call.batch, call.heads, call.num_keys});
    Tensor output = floats({call.batch, call.num_keys});
    call.powers = powers.mutable_data_ptr<float>();
    call.highest = highest.mutable_data_ptr<float>();
    call.factors = factors.mutable_data_ptr<float>();
    call.sums = sums.mutable_data_ptr<float>();
    call.output = output.mutable_data_ptr<float>();
    if (query.scalar_type() == ScalarType::Float) {
        compute<float>(call);
    } else if (query.scalar_type() == ScalarType::BFloat16) {
        compute<BFloat16>(call);
    } else {
        compute<Half>(call);
    }
    return output;
}

}  // namespace sdtp::cpu
