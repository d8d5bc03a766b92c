// Entry points of the CUDA kernels: sizes, strides and pointers into device memory; neither CUDA headers nor torch.
//
// Each call only launches. It returns null, or why a launch was refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "sdtp/gather.h"

namespace sdtp::cuda {

// A stream of torch's. The library's own CUDA runtime does not know which device torch has made the current one.
struct Stream {
    void* handle;  // a cudaStream_t
    int device;
};

// Gives device memory, aligned to 16 bytes, that lives until the work given to the stream is done.
using Allocate = std::function<void*(size_t bytes)>;

// Batch rows are the second axis of every launch, which has a limit.
inline constexpr int64_t kMaxBatch = 65535;
// Columns are 32-bit inside the kernels; offsets are 64-bit everywhere.
inline constexpr int64_t kMaxTokens = int64_t{1} << 24;
// A tile of keys is staged together with its neighbours.
inline constexpr int kMaxPooling = 255;
// What one launch copies: the table of tensors travels with its arguments, so that a captured launch owns it. Few of
// them fit the 4 KiB that every launch has, which the fused ones stay within; a gather by itself may take 32764 bytes
// (CUDA 12.1, compute capability 7.0).
inline constexpr int kFewTensors = 64;
inline constexpr int kMaxTensors = 584;
// Queries of the last window stand in shared memory, heads of this size.
inline constexpr int kMaxHeadDim = 256;

enum class Element { kFloat32, kBFloat16, kFloat16 };

struct Scoring {
    Element element;
    const void* hidden_states;  // [B, N, D]; strides in elements
    int64_t batch_stride;
    int64_t token_stride;
    int64_t hidden_stride;
    const void* w1;           // [H, D], contiguous, as all of the following
    const float* b1;          // [H]
    const float* w2;          // [H]
    const float* b2;          // []
    const float* mean_score;  // [B, N]; may be null
    float share;              // of this score in the running mean; 1 without mean_score
    const float* score_bias;  // [B, N]; may be null
    int batch_size;
    int num_tokens;
    int hidden_size;
    int pruner_size;
    int num_scored;  // leading tokens of each row that get a score
    bool normalise;  // divide hidden states by their root mean square
    float rms_eps;
};

struct Selection {
    const int64_t* rows;  // [B, 3], contiguous; null where every row is as below
    int64_t* indices;     // [B, num_keep], contiguous
    float* kept_mean;     // [B, num_keep], contiguous; null where the scores are no running means
    int64_t* dropped;     // [B, num_dropped], contiguous
    int batch_size;
    int num_tokens;
    int num_keep;
    int num_dropped;  // 0 where nobody asks for them
    int sink;
    int recent;
    int block_size;  // 0: what stands before the recent tokens is one block
    int pooling;
};

// The last queries and all keys. Strides in elements; along the head they are 1.
struct Window {
    Element element;
    const void* query;  // [B, H, w, d]
    int64_t query_strides[3];
    const void* key;  // [B, KV, n, d]
    int64_t key_strides[3];
    const int64_t* query_index;  // [B, w]
    int64_t query_index_stride;  // from row to row
    const int64_t* key_index;    // [B, n], contiguous
    const void* cos;             // [B, w, d]; null where the queries are rotated already
    const void* sin;
    int64_t rotary_strides[2];
    float scale;  // of the logits, in powers of two
    int batch_size;
    int num_heads;
    int num_key_heads;
    int num_queries;  // of a head
    int num_keys;
    int head_dim;
    int pooling;
};

struct PromptBias {
    const int64_t* token_index;   // [B, N], contiguous, as all of the following
    const float* distance_table;  // [num_distances], or one such for every row
    int64_t num_distances;
    bool is_by_row;
    const float* attention;  // [B, N]; may be null
    float attention_weight;
    int batch_size;
    int num_tokens;
    int keep_last;  // tokens after the prompt
};

// scores: [B, N], contiguous. Two launches.
const char* score_tokens(const Scoring& scoring, float* scores, const Allocate& allocate, Stream stream);

// One launch.
const char* select_tokens(const float* scores, const Selection& selection, const Allocate& allocate, Stream stream);

// One launch, for every kMaxTensors tensors. indices: [B, num_keep], contiguous.
const char* gather_tokens(const std::vector<TokenRows>& tensors, const int64_t* indices, int64_t batch_size,
                          int64_t num_keep, Stream stream);

// One launch where blocks hold at most 256 tokens and there is one for every multiprocessor, two for other blocks,
// three under the global budget. More than kFewTensors tensors take three, and more than kMaxTensors more.
const char* prune_tokens(const Scoring& scoring, const Selection& selection, const std::vector<TokenRows>& tensors,
                         const Allocate& allocate, Stream stream);

// attention: [B, n], contiguous. Three launches.
const char* window_attention(const Window& window, float* attention, const Allocate& allocate, Stream stream);

// bias: [B, N], contiguous. One launch; two with an attention; four with a window to compute it from, null without.
const char* prompt_bias(const PromptBias& prompt, const Window* window, float* bias, const Allocate& allocate,
                        Stream stream);

}  // namespace sdtp::cuda
