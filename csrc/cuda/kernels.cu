// The launches: how many, and how large.
#include <algorithm>

#include "prompt_bias.cuh"
#include "prune.cuh"
#include "sdtp/cuda.h"
#include "window.cuh"

namespace sdtp::cuda {
namespace {

// CTAs that share the copies of a block.
constexpr int kMaxShares = 16;

static_assert(sizeof(PruneArguments) <= 4096, "every launch copies all of its arguments");
static_assert(sizeof(GatherArguments<kMaxTensors>) <= 32764, "a launch has room for no more arguments");
static_assert(sizeof(PruneShared) <= (102400 - 2 * 1024) / 2, "two CTAs must fit on sm_86, sm_89 and sm_120");

template <typename T>
T* allocate_array(const Allocate& allocate, int64_t count) {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
}

template <typename Call>
auto for_element(Element element, const Call& call) {
    if (element == Element::kFloat32) return call(float{});
    if (element == Element::kBFloat16) return call(BFloat16{});
    return call(Half{});
}

int element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Whether every 16 bytes that a tile is made of are one access.
bool is_aligned(const Scoring& scoring) {
    const auto address = reinterpret_cast<uintptr_t>(scoring.hidden_states) | reinterpret_cast<uintptr_t>(scoring.w1);
    const auto steps =
        (scoring.batch_stride | scoring.token_stride | scoring.hidden_size) * element_bytes(scoring.element);
    return scoring.hidden_stride == 1 && address % kChunkBytes == 0 && steps % kChunkBytes == 0;
}

// Scores of which nothing is summed yet.
Scores unsummed(const Scoring& scoring) {
    return {nullptr, 0, 0, scoring.b2, scoring.mean_score, scoring.share, scoring.score_bias};
}

// One launch: partial scores. `arrivals` is for the selection that follows, see ScoreArguments.
const char* score_parts(const Scoring& scoring, const Allocate& allocate, uint32_t* arrivals, Stream stream,
                        Scores& scores) {
    const int64_t num_parts = for_element(
        scoring.element, [&](auto element) { return ceil_divide(scoring.pruner_size, kTileUnits<decltype(element)>); });
    const int64_t part_stride = int64_t{scoring.batch_size} * scoring.num_tokens;
    auto* parts = allocate_array<float>(allocate, num_parts * part_stride);
    scores = unsummed(scoring);
    scores.parts = parts;
    scores.part_stride = part_stride;
    scores.num_parts = static_cast<int>(num_parts);
    const Grid grid{ceil_divide(scoring.num_scored, kTileTokens) * num_parts, scoring.batch_size, kThreads,
                    kScoreSharedBytes, false};
    if (grid.x * grid.y == 0) {
        return arrivals == nullptr ? nullptr : clear(arrivals, scoring.batch_size * sizeof(uint32_t), stream);
    }
    const ScoreArguments arguments{scoring, is_aligned(scoring), parts, arrivals};
    return for_element(scoring.element,
                       [&](auto element) { return launch(score_kernel<decltype(element)>, grid, stream, arguments); });
}

// Tokens before those that are always kept, as far as the host knows; padded rows have counts of their own.
int body_of(const Selection& selection) {
    return selection.num_tokens - (selection.rows == nullptr ? selection.recent : 0);
}

// CTAs for the blocks of a row, at least enough for one: those of a row share what no block fills.
int64_t ctas_of_row(const Selection& selection, int ctas_per_block) {
    const int num_blocks = selection.block_size > 0 ? body_of(selection) / selection.block_size : 1;
    return int64_t{std::max(num_blocks, 1)} * ctas_per_block;
}

// Arguments of a kernel that ranks, and its shared memory. `keys_per_cta` of them are ranked by one CTA.
size_t rank_with(SelectArguments& arguments, int keys_per_cta, const Allocate& allocate) {
    const Selection& selection = arguments.selection;
    arguments.keys_per_cta = keys_per_cta;
    if (keys_per_cta <= kSharedKeys) return sizeof(SelectShared) + keys_per_cta * sizeof(uint32_t);
    const int64_t num_ctas = ctas_of_row(selection, arguments.ctas_per_block) * selection.batch_size;
    arguments.keys = allocate_array<uint32_t>(allocate, num_ctas * keys_per_cta);
    return sizeof(SelectShared);
}

// CTAs that share the keys of a row. They wait for one another, so there may be no more than run at once: one a
// multiprocessor always fits.
int group_size(const Selection& selection, Stream stream) {
    if (selection.block_size > 0) return 1;
    const int64_t wanted = ceil_divide(body_of(selection), kSharedKeys);
    return static_cast<int>(
        std::clamp<int64_t>(wanted, 1, std::max(num_multiprocessors(stream) / selection.batch_size, 1)));
}

// One launch. A group's `arrivals` are 0 by then.
const char* select_scores(const Scores& scores, const Selection& selection, int group, uint32_t* arrivals,
                          const Allocate& allocate, Stream stream) {
    SelectArguments arguments{scores, selection, group, nullptr, arrivals, nullptr, 0};
    if (group > 1) {
        arguments.histograms =
            allocate_array<uint32_t>(allocate, int64_t{selection.batch_size} * kDigits * group * kBins);
    }
    const int longest = selection.block_size > 0 ? selection.block_size : body_of(selection);
    const size_t shared = rank_with(arguments, static_cast<int>(ceil_divide(longest, group)), allocate);
    return launch(select_kernel, {ctas_of_row(selection, group), selection.batch_size, kThreads, shared, group > 1},
                  stream, arguments);
}

bool is_empty(const Selection& selection) {
    return selection.batch_size == 0 || (selection.num_keep == 0 && selection.num_dropped == 0);
}

bool fits_one_launch(const Selection& selection, Stream stream) {
    const int64_t num_blocks = body_of(selection) / selection.block_size;
    // A short prompt would leave most of the GPU idle, where two launches spread a block over several CTAs.
    return selection.block_size <= kOneLaunchBlock && num_blocks * selection.batch_size >= num_multiprocessors(stream);
}

template <int kRoom>
TensorTable<kRoom> table_of(const TokenRows* tensors, size_t count) {
    TensorTable<kRoom> table{};
    table.count = static_cast<int>(count);
    std::copy_n(tensors, count, table.tensors);
    return table;
}

// One launch for every kRoom tensors.
template <int kRoom>
const char* gather(const std::vector<TokenRows>& tensors, const int64_t* indices, int64_t num_keep, const Grid& grid,
                   Stream stream) {
    for (size_t first = 0; first < tensors.size(); first += kRoom) {
        const size_t count = std::min<size_t>(tensors.size() - first, kRoom);
        const GatherArguments<kRoom> arguments{indices, static_cast<int>(num_keep),
                                               table_of<kRoom>(&tensors[first], count)};
        if (const char* error = launch(gather_kernel<kRoom>, grid, stream, arguments)) return error;
    }
    return nullptr;
}

bool is_aligned(const Window& window) {
    int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(window.key));
    for (const int64_t step :
         {window.key_strides[0], window.key_strides[1], window.key_strides[2], int64_t{window.head_dim}}) {
        bits |= step * element_bytes(window.element);
    }
    return bits % kChunkBytes == 0;
}

// Two launches: what each head's window sums up to for each key.
const char* sum_window(const Window& window, const Allocate& allocate, Stream stream, HeadSums& heads) {
    const int64_t num_rows = int64_t{window.batch_size} * window.num_heads,
                  num_tiles = ceil_divide(window.num_keys, kTileKeys);
    auto* sums = allocate_array<float>(allocate, num_rows * window.num_keys);
    heads = {sums, window.num_heads, window.num_keys, std::min(window.pooling / 2, window.num_keys)};
    const WindowArguments arguments{window, is_aligned(window), static_cast<int>(num_tiles),
                                    allocate_array<Softmax>(allocate, num_rows * window.num_queries * num_tiles), sums};
    const Grid grid{window.num_heads * num_tiles, window.batch_size, kThreads, sizeof(WindowShared), false};
    return for_element(window.element, [&](auto element) {
        using T = decltype(element);
        const char* error = launch(window_statistics_kernel<T>, grid, stream, arguments);
        return error != nullptr ? error : launch(window_sum_kernel<T>, grid, stream, arguments);
    });
}

// For kernels that have a thread for each token.
Grid grid_of_tokens(int num_tokens, int batch_size) {
    return {ceil_divide(num_tokens, kThreads), batch_size, kThreads, kWarps * sizeof(Moments), false};
}

}  // namespace

const char* score_tokens(const Scoring& scoring, float* scores, const Allocate& allocate, Stream stream) {
    FinishArguments arguments{{}, scores, int64_t{scoring.batch_size} * scoring.num_tokens};
    if (arguments.size == 0) return nullptr;
    if (const char* error = score_parts(scoring, allocate, nullptr, stream, arguments.scores)) return error;
    return launch(finish_kernel, {ceil_divide(arguments.size, kThreads), 1, kThreads, 0, false}, stream, arguments);
}

const char* select_tokens(const float* scores, const Selection& selection, const Allocate& allocate, Stream stream) {
    if (is_empty(selection)) return nullptr;
    const int group = group_size(selection, stream);
    uint32_t* arrivals = nullptr;
    if (group > 1) {
        arrivals = allocate_array<uint32_t>(allocate, selection.batch_size);
        if (const char* error = clear(arrivals, selection.batch_size * sizeof(uint32_t), stream)) return error;
    }
    return select_scores({scores, 0, 1, nullptr, nullptr, 1.0f, nullptr}, selection, group, arrivals, allocate, stream);
}

const char* gather_tokens(const std::vector<TokenRows>& tensors, const int64_t* indices, int64_t batch_size,
                          int64_t num_keep, Stream stream) {
    const Grid grid{ceil_divide(num_keep, kGatherTokens), batch_size, kThreads, 0, false};
    if (grid.x * grid.y == 0) return nullptr;
    if (tensors.size() <= kFewTensors) return gather<kFewTensors>(tensors, indices, num_keep, grid, stream);
    return gather<kMaxTensors>(tensors, indices, num_keep, grid, stream);
}

const char* prune_tokens(const Scoring& scoring, const Selection& selection, const std::vector<TokenRows>& tensors,
                         const Allocate& allocate, Stream stream) {
    if (is_empty(selection)) return nullptr;
    Scores scores = unsummed(scoring);
    if (selection.block_size == 0 || tensors.size() > kFewTensors) {
        const int group = group_size(selection, stream);
        uint32_t* arrivals = group > 1 ? allocate_array<uint32_t>(allocate, selection.batch_size) : nullptr;
        if (const char* error = score_parts(scoring, allocate, arrivals, stream, scores)) return error;
        if (const char* error = select_scores(scores, selection, group, arrivals, allocate, stream)) return error;
        return gather_tokens(tensors, selection.indices, selection.batch_size, selection.num_keep, stream);
    }
    const auto table = table_of<kFewTensors>(tensors.data(), tensors.size());
    if (fits_one_launch(selection, stream)) {
        const SelectArguments select{scores, selection, 1, nullptr, nullptr, nullptr, selection.block_size};
        const PruneArguments arguments{scoring, is_aligned(scoring), select, table};
        const Grid grid{ctas_of_row(selection, 1), selection.batch_size, kThreads, sizeof(PruneShared), false};
        return for_element(scoring.element, [&](auto element) {
            return launch(prune_kernel<decltype(element)>, grid, stream, arguments);
        });
    }
    if (const char* error = score_parts(scoring, allocate, nullptr, stream, scores)) return error;
    const auto shares =
        static_cast<int>(std::min<int64_t>(ceil_divide(selection.block_size, kGatherTokens), kMaxShares));
    SelectAndGatherArguments arguments{{scores, selection, shares, nullptr, nullptr, nullptr, 0}, table};
    const size_t shared = rank_with(arguments.select, selection.block_size, allocate);
    return launch(select_and_gather_kernel,
                  {ctas_of_row(selection, shares), selection.batch_size, kThreads, shared, false}, stream, arguments);
}

const char* window_attention(const Window& window, float* attention, const Allocate& allocate, Stream stream) {
    const Grid grid = grid_of_tokens(window.num_keys, window.batch_size);
    if (grid.x * grid.y == 0) return nullptr;
    PoolArguments arguments{{}, attention, nullptr, {}};
    if (const char* error = sum_window(window, allocate, stream, arguments.heads)) return error;
    return launch(pool_kernel, grid, stream, arguments);
}

const char* prompt_bias(const PromptBias& prompt, const Window* window, float* bias, const Allocate& allocate,
                        Stream stream) {
    const Grid grid = grid_of_tokens(prompt.num_tokens, prompt.batch_size);
    if (grid.x * grid.y == 0) return nullptr;
    Moments* moments = nullptr;
    if (window != nullptr || prompt.attention != nullptr) {
        moments = allocate_array<Moments>(allocate, grid.x * grid.y);
        // An attention that is given is that of one head, pooled over nothing.
        PoolArguments arguments{{prompt.attention, 1, prompt.num_tokens, 0}, bias, moments, prompt};
        if (window != nullptr) {
            if (const char* error = sum_window(*window, allocate, stream, arguments.heads)) return error;
        }
        if (const char* error = launch(pool_kernel, grid, stream, arguments)) return error;
    }
    return launch(bias_kernel, grid, stream, BiasArguments{prompt, moments, bias});
}

}  // namespace sdtp::cuda
