// The pruner's MLP on tensor cores. A CTA multiplies 128 tokens by 128 units of the pruner (64 in float32), applies
// GELU and w2 in registers and leaves one number a token: its partial score. Nothing is added atomically: whoever reads
// the scores sums the parts in order.
//
// mma.sync m16n8k16 takes 32 bytes of the hidden size at a time and m16n8k8, for tf32, the same 32 bytes, in fragments
// of the same layout. So one code serves all three types; float32 operands are split into two tf32 each, three
// products.
#pragma once

#include <cstdint>

#include "cta.cuh"
#include "sdtp/cuda.h"
#include "sdtp/floats.h"
#include "sdtp/gelu.h"

namespace sdtp::cuda {

inline constexpr int kTileTokens = 128;
template <typename T>
inline constexpr int kTileUnits = sizeof(T) == 2 ? 128 : 64;  // the split operands of float32 leave registers for half
inline constexpr int kSliceBytes = 64;  // of each row in one stage: two steps of the matrix product
inline constexpr int kStages = 3;
inline constexpr int kChunkBytes = 16;
inline constexpr int kStepBytes = 32;
inline constexpr int kTokenTileBytes = kTileTokens * kSliceBytes;
inline constexpr int kStageBytes = 2 * kTokenTileBytes;  // tokens, then w1
// As much as a launch gets without asking, and two CTAs fit on a multiprocessor of any target.
inline constexpr int kScoreSharedBytes = kStages * kStageBytes;
// CTAs that share a multiprocessor's registers: those of float32 would spill.
template <typename T>
inline constexpr int kScoreCtas = sizeof(T) == 2 ? 2 : 1;

// Warps stand in a grid of 4 (tokens) by 2 (units).
inline constexpr int kWarpTokens = kTileTokens / 4;
inline constexpr int kRowTiles = kWarpTokens / 16;  // fragments of mma

// Rows of a matrix, of which a tile takes the first ones. Strides in elements.
template <typename T>
struct Matrix {
    const T* data;
    int64_t row_stride;
    int64_t stride;
    int num_rows;
    int num_columns;
};

// Where a chunk of a row stands in a tile: shifted from row to row, so that eight rows of one chunk, which is what
// ldmatrix reads, stand in different banks.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kSliceBytes + (chunk ^ (row / 2 % (kSliceBytes / kChunkBytes))) * kChunkBytes;
}

// Starts to load columns [first, first + slice) of kRows rows; what lies outside the matrix is zero. `is_aligned`:
// every chunk is one access. The values, and so all sums, are the same either way.
template <int kRows, typename T>
__device__ __forceinline__ void load_slice(const Matrix<T>& matrix, int first, bool is_aligned, unsigned char* tile) {
    constexpr int kPerChunk = kChunkBytes / sizeof(T);
    constexpr int kChunks = kSliceBytes / kChunkBytes;
    if (is_aligned) {
#pragma unroll
        for (int i = 0; i < kRows * kChunks; i += kThreads) {
            const int row = (i + thread()) / kChunks;
            const int chunk = thread() % kChunks;
            const int column = first + chunk * kPerChunk;
            const bool is_inside = row < matrix.num_rows && column < matrix.num_columns;
            const T* from = is_inside ? matrix.data + row * matrix.row_stride + column : matrix.data;
            copy_async(tile + place(row, chunk), from, is_inside ? kChunkBytes : 0);
        }
        return;
    }
    constexpr int kPerRow = kChunks * kPerChunk;
#pragma unroll 1  // the slow path must not take registers from the other one
    for (int i = thread(); i < kRows * kPerRow; i += kThreads) {
        const int row = i / kPerRow;
        const int column = i % kPerRow;
        T value{};
        if (row < matrix.num_rows && first + column < matrix.num_columns) {
            value = matrix.data[row * matrix.row_stride + (first + column) * matrix.stride];
        }
        unsigned char* chunk = tile + place(row, column / kPerChunk);
        reinterpret_cast<T*>(chunk)[column % kPerChunk] = value;
    }
}

// What a word of operands adds to the sum of squares.
template <typename T>
__device__ __forceinline__ float squares(uint32_t word) {
    if constexpr (sizeof(T) == sizeof(word)) {
        return from_bits(word) * from_bits(word);
    } else {
        const float low = to_float(T{static_cast<uint16_t>(word)});
        const float high = to_float(T{static_cast<uint16_t>(word >> 16)});
        return low * low + high * high;
    }
}

// A float32 as the sum of two tf32; exact but for the last 2 or 3 of 24 bits. Infinity has no rest, nor a part in small
// products: inf - inf and inf * 0 would make it NaN.
template <int kWords>
struct Split {
    uint32_t high[kWords];
    uint32_t finite[kWords];  // the same, 0 for infinity
    uint32_t low[kWords];

    __device__ explicit Split(const uint32_t (&words)[kWords]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const float value = from_bits(words[i]);
            const float rounded = round_to_tf32(value);
            const bool is_finite = std::fabs(rounded) <= 3.4028235e38f;
            high[i] = to_bits(rounded);
            finite[i] = is_finite ? high[i] : 0;
            low[i] = is_finite ? to_bits(round_to_tf32(value - rounded)) : 0;
        }
    }
};

template <typename T>
__device__ __forceinline__ void multiply_add_exactly(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 2) {  // the products are exact in float32
        multiply_add<T>(sums, a, b);
    } else {
        const Split<4> x(a);
        const Split<2> y(b);
        multiply_add<T>(sums, x.low, y.finite);  // small ones first
        multiply_add<T>(sums, x.finite, y.low);
        multiply_add<T>(sums, x.high, y.high);
    }
}

// What a tile's units from `first_unit` on add to the scores of 128 tokens: thread i returns that of token i.
// Every launch scores with this function, so a token has the same bits in all of them. The caller puts a barrier
// between two calls: the second one overwrites what the first one sums at its end.
template <typename T>
__device__ float score_tile(const Scoring& scoring, const Matrix<T>& tokens, int first_unit, bool is_aligned,
                            unsigned char* stages) {
    constexpr int kPerSlice = kSliceBytes / sizeof(T);
    constexpr int kWarpUnits = kTileUnits<T> / 2;
    constexpr int kUnitTiles = kWarpUnits / 8;
    const Matrix<T> units{static_cast<const T*>(scoring.w1) + int64_t{first_unit} * scoring.hidden_size,
                          scoring.hidden_size, 1, scoring.pruner_size - first_unit, scoring.hidden_size};
    const int num_slices = static_cast<int>(ceil_divide(scoring.hidden_size, kPerSlice));
    const auto load = [&](int slice) {
        if (slice < num_slices) {
            unsigned char* stage = stages + slice % kStages * kStageBytes;
            load_slice<kTileTokens>(tokens, slice * kPerSlice, is_aligned, stage);
            load_slice<kTileUnits<T>>(units, slice * kPerSlice, is_aligned, stage + kTokenTileBytes);
        }
        commit_copies();  // an empty group too, so that the count of pending ones means the same in every turn
    };

    const int warp_row = warp() % 4 * kWarpTokens;
    const int warp_unit = warp() / 4 * kWarpUnits;
    float sums[kRowTiles][kUnitTiles][4] = {};
    float row_squares[kRowTiles][2] = {};
#pragma unroll 1
    for (int slice = 0; slice < kStages - 1; ++slice) load(slice);
    for (int slice = 0; slice < num_slices; ++slice) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the slice is there for all, and all have used the one whose place is loaded into next
        load(slice + kStages - 1);
        const unsigned char* token_tile = stages + slice % kStages * kStageBytes;
        const unsigned char* unit_tile = token_tile + kTokenTileBytes;
#pragma unroll
        for (int step = 0; step < kSliceBytes / kStepBytes; ++step) {
            const int first_chunk = step * (kStepBytes / kChunkBytes);
            uint32_t a[kRowTiles][4];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                const int row = warp_row + i * 16 + lane() % 16;
                load_matrices(a[i], token_tile + place(row, first_chunk + lane() / 16));
                if (scoring.normalise) {  // the words of row g, and of row g + 8
                    row_squares[i][0] += squares<T>(a[i][0]) + squares<T>(a[i][2]);
                    row_squares[i][1] += squares<T>(a[i][1]) + squares<T>(a[i][3]);
                }
            }
#pragma unroll
            for (int j = 0; j < kUnitTiles; j += 2) {
                uint32_t words[4];
                const int unit = warp_unit + j * 8 + lane() % 8 + lane() / 16 * 8;
                load_matrices(words, unit_tile + place(unit, first_chunk + lane() / 8 % 2));
                const uint32_t b[2][2] = {{words[0], words[1]}, {words[2], words[3]}};
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    multiply_add_exactly<T>(sums[i][j], a[i], b[0]);
                    multiply_add_exactly<T>(sums[i][j + 1], a[i], b[1]);
                }
            }
        }
    }

    // A lane holds two units of rows g and g + 8 of each fragment, g = lane / 4. Its neighbours in g hold the others.
    __syncthreads();  // all have used the stages: their memory takes the sums over units
    auto* unit_sums = reinterpret_cast<float*>(stages);  // [2][128]
    const auto sum_of_four = [](float value) {
        value += __shfl_xor_sync(kAllLanes, value, 1);
        return value + __shfl_xor_sync(kAllLanes, value, 2);
    };
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float scale = 1.0f;
            if (scoring.normalise) {  // 1 / rms commutes with the product, so normalising takes no pass of its own
                const float mean = sum_of_four(row_squares[i][half]) / static_cast<float>(scoring.hidden_size);
                scale = 1.0f / sqrtf(mean + scoring.rms_eps);
            }
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < kUnitTiles; ++j) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int unit = first_unit + warp_unit + j * 8 + lane() % 4 * 2 + k;
                    if (unit < scoring.pruner_size) {  // masked, not multiplied by 0: that of infinity is NaN
                        sum += gelu(sums[i][j][2 * half + k] * scale + scoring.b1[unit]) * scoring.w2[unit];
                    }
                }
            }
            sum = sum_of_four(sum);
            const int row = warp_row + i * 16 + half * 8 + lane() / 4;
            if (lane() % 4 == 0) unit_sums[warp() / 4 * kTileTokens + row] = sum;
        }
    }
    __syncthreads();
    return thread() < kTileTokens ? unit_sums[thread()] + unit_sums[kTileTokens + thread()] : 0.0f;
}

// Tokens [first, last) of a batch row.
template <typename T>
__device__ __forceinline__ Matrix<T> token_matrix(const Scoring& scoring, int batch, int first, int last) {
    const T* data =
        static_cast<const T*>(scoring.hidden_states) + batch * scoring.batch_stride + first * scoring.token_stride;
    return {data, scoring.token_stride, scoring.hidden_stride, last - first, scoring.hidden_size};
}

// Scores on their way: partial sums, and what is still to be added to them.
struct Scores {
    const float* parts;  // [num_parts, B, N]
    int64_t part_stride;
    int num_parts;
    const float* b2;          // null where the scores are complete
    const float* mean_score;  // [B, N]; may be null
    float share;
    const float* bias;  // [B, N]; may be null

    // The last steps of a score, in the one order that every path uses.
    __device__ float mean(float sum, int64_t offset) const {
        if (b2 != nullptr) sum += *b2;
        if (mean_score == nullptr) return sum;
        const float before = mean_score[offset];
        return before + share * (sum - before);
    }
    __device__ float with_bias(float mean, int64_t offset) const {
        return bias != nullptr ? mean + bias[offset] : mean;
    }

    // At `offset` into [B, N]: the running mean, and the score.
    __device__ float load_mean(int64_t offset) const {
        float sum = 0.0f;
        for (int part = 0; part < num_parts; ++part) sum += parts[part * part_stride + offset];
        return mean(sum, offset);
    }
    __device__ float load(int64_t offset) const { return with_bias(load_mean(offset), offset); }
};

struct ScoreArguments {
    Scoring scoring;
    bool is_aligned;
    float* parts;        // [num_parts, B, N]
    uint32_t* arrivals;  // [B], set to 0 for the selection that follows; may be null
};

// CTA (tile of tokens and tile of units, row). Tiles of units vary fastest: CTAs that share tokens run side by side, so
// these come from HBM once and from L2 after that.
template <typename T>
__global__ void __launch_bounds__(kThreads, kScoreCtas<T>)
    score_kernel(const __grid_constant__ ScoreArguments arguments) {
    const Scoring& scoring = arguments.scoring;
    const int num_parts = static_cast<int>(ceil_divide(scoring.pruner_size, kTileUnits<T>));
    const int part = static_cast<int>(blockIdx.x) % num_parts;
    const int first = static_cast<int>(blockIdx.x) / num_parts * kTileTokens;
    const int batch = static_cast<int>(blockIdx.y);
    if (arguments.arrivals != nullptr && blockIdx.x == 0 && thread() == 0) arguments.arrivals[batch] = 0;
    const float score = score_tile<T>(scoring, token_matrix<T>(scoring, batch, first, scoring.num_scored),
                                      part * kTileUnits<T>, arguments.is_aligned, shared_memory());
    const int token = first + thread();
    if (thread() < kTileTokens && token < scoring.num_scored) {
        const int64_t row = int64_t{part} * scoring.batch_size + batch;
        arguments.parts[row * scoring.num_tokens + token] = score;
    }
}

struct FinishArguments {
    Scores scores;
    float* finished;  // [B, N]
    int64_t size;
};

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishArguments arguments) {
    const int64_t offset = int64_t{blockIdx.x} * kThreads + thread();
    if (offset < arguments.size) arguments.finished[offset] = arguments.scores.load(offset);
}

}  // namespace sdtp::cuda
