// The CUDA kernels on the CPU, through the entry points that the binding calls, against the oracle.
//
//     suite GROUP... [--small]    groups: score select gather prune window bias; --small: few threads at once, for
//     ThreadSanitizer
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "oracle.h"
#include "runtime.h"
#include "sdtp/cuda.h"
#include "sdtp/floats.h"

namespace {

using sdtp::BFloat16;
using sdtp::Half;
using sdtp::TokenRows;
using namespace sdtp::cuda;

bool is_small = false;
std::mt19937_64 generator;

int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

// ---------------------------------------------------------------------------------------------- device memory

// Exactly as large as asked for, so that an access beyond it is seen, and full of what no result looks like.
class Memory {
  public:
    void* allocate(size_t bytes) {
        blocks_.emplace_back(new (std::align_val_t{16}) unsigned char[std::max<size_t>(bytes, 1)]);
        std::memset(blocks_.back().get(), 0xcd, bytes);
        return blocks_.back().get();
    }
    template <typename T>
    T* array(int64_t count) {
        return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
    }
    template <typename T>
    T* copy(const std::vector<T>& values) {
        T* to = array<T>(static_cast<int64_t>(values.size()));
        std::copy(values.begin(), values.end(), to);
        return to;
    }
    Allocate allocator() {
        return [this](size_t bytes) { return allocate(bytes); };
    }

  private:
    struct Free {
        void operator()(unsigned char* block) const { ::operator delete[](block, std::align_val_t{16}); }
    };
    std::vector<std::unique_ptr<unsigned char[], Free>> blocks_;
};

// ----------------------------------------------------------------------------------------------------- checks

std::string what;  // the case that runs

void check(bool is_right, const std::string& message) {
    if (is_right) return;
    std::printf("WRONG %s: %s\n", what.c_str(), message.c_str());
    std::exit(1);
}

void check_launched(const char* error) { check(error == nullptr, error == nullptr ? "" : error); }

void begin(const std::string& name, uint64_t seed, int resident, int multiprocessors) {
    what = name + ", seed " + std::to_string(seed);
    generator.seed(seed + std::hash<std::string>()(name));
    cuda_on_cpu::configure(seed, is_small ? std::min(resident, 2) : resident, multiprocessors);
}

// ------------------------------------------------------------------------------------------------------ score

template <typename T>
constexpr Element kElement = Element::kFloat32;
template <>
constexpr Element kElement<BFloat16> = Element::kBFloat16;
template <>
constexpr Element kElement<Half> = Element::kFloat16;

template <typename T>
T rounded(float value);
template <>
float rounded<float>(float value) {
    return value;
}
template <>
BFloat16 rounded<BFloat16>(float value) {
    return {static_cast<uint16_t>(sdtp::to_bits(value) >> 16)};  // any bfloat16 will do
}
template <>
Half rounded<Half>(float value) {  // truncated, within the range of normal numbers
    const uint32_t bits = sdtp::to_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) return {static_cast<uint16_t>(bits >> 16 & 0x8000u)};
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude - 0x38000000u) >> 13)};
}

struct Pruner {
    int batch, tokens, hidden, units;
    bool normalise;
    bool has_terms;   // a mean of two earlier scores, and a bias
    int64_t gap = 0;  // elements between the rows of hidden states: 8 keep them aligned, 1 does not
    bool is_transposed = false;
};

// Arguments of the ops, and the exact scores.
template <typename T>
struct Model {
    Memory& memory;
    Pruner size;
    Scoring scoring{};
    std::vector<double> exact;

    Model(Memory& memory, const Pruner& size) : memory(memory), size(size) {
        const int64_t width = size.is_transposed ? 1 : size.hidden + size.gap;
        const int64_t depth = size.is_transposed ? size.tokens : 1;
        const int64_t row_elements = size.is_transposed ? int64_t{size.hidden} * size.tokens : size.tokens * width;
        T* hidden = memory.array<T>(size.batch * row_elements);
        const auto at = [&](int b, int n, int d) -> T& { return hidden[b * row_elements + n * width + d * depth]; };
        for (int b = 0; b < size.batch; ++b) {
            for (int n = 0; n < size.tokens; ++n) {
                for (int d = 0; d < size.hidden; ++d) at(b, n, d) = rounded<T>(2 * normal());
            }
        }
        const auto values = [&](int64_t count, float scale) {
            std::vector<float> numbers(count);
            for (float& number : numbers) number = scale * normal();
            return memory.copy(numbers);
        };
        T* w1 = memory.array<T>(int64_t{size.units} * size.hidden);
        for (int64_t i = 0; i < int64_t{size.units} * size.hidden; ++i) {
            w1[i] = rounded<T>(normal() / std::sqrt(static_cast<float>(size.hidden)));
        }
        scoring = {kElement<T>,
                   hidden,
                   row_elements,
                   width,
                   depth,
                   w1,
                   values(size.units, 1),
                   values(size.units, 1),
                   values(1, 1),
                   size.has_terms ? values(int64_t{size.batch} * size.tokens, 1) : nullptr,
                   size.has_terms ? 1.0f / 3 : 1.0f,
                   size.has_terms ? values(int64_t{size.batch} * size.tokens, 1) : nullptr,
                   size.batch,
                   size.tokens,
                   size.hidden,
                   size.units,
                   size.tokens,
                   size.normalise,
                   1e-6f};
        for (int b = 0; b < size.batch; ++b) {
            for (int n = 0; n < size.tokens; ++n) {
                double squares = 0, score = *scoring.b2;
                for (int d = 0; d < size.hidden; ++d) squares += std::pow(double{sdtp::to_float(at(b, n, d))}, 2);
                const double scale = size.normalise ? 1 / std::sqrt(squares / size.hidden + scoring.rms_eps) : 1;
                for (int h = 0; h < size.units; ++h) {
                    double sum = 0;
                    for (int d = 0; d < size.hidden; ++d) {
                        sum += double{sdtp::to_float(at(b, n, d))} * sdtp::to_float(w1[int64_t{h} * size.hidden + d]);
                    }
                    score += oracle::gelu(sum * scale + scoring.b1[h]) * scoring.w2[h];
                }
                const int64_t token = int64_t{b} * size.tokens + n;
                if (size.has_terms) score = (2 * scoring.mean_score[token] + score) / 3 + scoring.score_bias[token];
                exact.push_back(score);
            }
        }
    }

    std::vector<float> scores() const {
        Memory own;
        const int64_t count = int64_t{size.batch} * size.tokens;
        float* scores = own.array<float>(count);
        check_launched(score_tokens(scoring, scores, own.allocator(), {}));
        return {scores, scores + count};
    }
};

template <typename T>
void score(uint64_t seed, const Pruner& size) {
    begin("score " + std::to_string(sizeof(T)) + " bytes, " + std::to_string(size.tokens) + " x " +
              std::to_string(size.hidden) + " x " + std::to_string(size.units),
          seed, 2, 4);
    Memory memory;
    Model<T> model(memory, size);
    const std::vector<float> got = model.scores();
    double spread = 1;
    for (double value : model.exact) spread = std::max(spread, std::fabs(value));
    for (size_t i = 0; i < got.size(); ++i) {
        // NaN fails the comparison too.
        check(std::fabs(got[i] - model.exact[i]) <= 1e-5 * spread, "score " + std::to_string(i) + " is " +
                                                                       std::to_string(got[i]) + ", expected " +
                                                                       std::to_string(model.exact[i]));
    }
    // Rows are right-aligned: a shorter one alone has the same bits.
    Model<T> alone = model;
    const int skipped = size.tokens / 3;
    const auto* hidden = static_cast<const T*>(model.scoring.hidden_states);
    alone.size.batch = alone.scoring.batch_size = 1;
    alone.size.tokens = alone.scoring.num_tokens = alone.scoring.num_scored = size.tokens - skipped;
    alone.scoring.hidden_states =
        hidden + (size.batch - 1) * model.scoring.batch_stride + skipped * model.scoring.token_stride;
    if (size.has_terms) {
        alone.scoring.mean_score += int64_t{size.batch - 1} * size.tokens + skipped;
        alone.scoring.score_bias += int64_t{size.batch - 1} * size.tokens + skipped;
    }
    const std::vector<float> row = alone.scores();
    check(std::memcmp(row.data(), &got[got.size() - row.size()], row.size() * sizeof(float)) == 0,
          "scores depend on the rest of the batch");
    // NaN stays with its token.
    T& spoiled = const_cast<T*>(hidden)[(size.tokens - 1) * model.scoring.token_stride];
    if constexpr (sizeof(T) == 2) spoiled.bits = 0x7fff;
    if constexpr (sizeof(T) == 4) spoiled = NAN;
    const std::vector<float> with_nan = model.scores();
    for (size_t i = 0; i < got.size(); ++i) {
        const bool is_right = static_cast<int>(i) == size.tokens - 1 ? std::isnan(with_nan[i]) : with_nan[i] == got[i];
        check(is_right, "NaN of one token in the score of another");
    }
    // An infinite state, which every unit and the score take with a positive weight.
    model.scoring.normalise = false;
    if constexpr (sizeof(T) == 2) spoiled.bits = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
    if constexpr (sizeof(T) == 4) spoiled = INFINITY;
    auto* w1 = const_cast<T*>(static_cast<const T*>(model.scoring.w1));
    auto* w2 = const_cast<float*>(model.scoring.w2);
    for (int h = 0; h < size.units; ++h) {
        w1[int64_t{h} * size.hidden] = rounded<T>(0.1f + 0.001f * static_cast<float>(h));  // no tf32, most of them
        w2[h] = 1;
    }
    check(std::isinf(model.scores()[size.tokens - 1]), "the score of an infinite state is not infinite");
}

void score_group() {
    for (uint64_t seed = 0; seed < (is_small ? 1 : 2); ++seed) {
        score<BFloat16>(seed, {1, 130, 96, 16, true, true});
        score<BFloat16>(seed, {1, 40, 160, 130, false, false, 8});  // five slices, two tiles of units
        score<float>(seed, {2, 33, 64, 70, true, true, 4});
        score<Half>(seed, {1, 20, 100, 5, true, false, 1});  // nothing is aligned
        if (is_small) continue;
        score<Half>(seed, {3, 150, 200, 300, true, true});
        score<float>(seed, {1, 140, 33, 65, true, false});
        score<BFloat16>(seed, {2, 70, 72, 40, true, true, 0, true});
        score<float>(seed, {1, 1, 1, 1, false, false});
    }
}

// ----------------------------------------------------------------------------------------------------- select

const std::vector<float> kSpecial{0.0f,   -0.0f,   NAN,  -NAN,        INFINITY, -INFINITY,
                                  1e-45f, -1e-45f, 1.0f, 1.00000012f, -1.0f,    3e38f};

// A batch of padded rows full of ties and special values, and what to keep of each.
struct Rows {
    std::vector<int64_t> counts;  // [B, 3]
    int width = 0, num_keep = 0, sink = 0, block_size = 0, pooling = 1;
    std::vector<float> scores;  // [B, width]
    std::vector<int64_t> expected;

    int batch() const { return static_cast<int>(counts.size() / 3); }

    // Rows of (valid, keep, tail).
    Rows(std::vector<int64_t> counts, int sink, int block_size, int pooling, int padding, int spare)
        : counts(std::move(counts)), sink(sink), block_size(block_size), pooling(pooling) {
        for (int b = 0; b < batch(); ++b) {
            width = std::max<int>(width, this->counts[3 * b] + padding);
            num_keep = std::max<int>(num_keep, this->counts[3 * b + 1] + spare);
        }
        scores.assign(int64_t{batch()} * width, 7.0f);  // padding scores high: a row that reads it goes wrong
        for (int b = 0; b < batch(); ++b) {
            const int kind = static_cast<int>(integer(0, 3));
            for (int64_t i = width - this->counts[3 * b]; i < width; ++i) {
                const float values[] = {normal(), kSpecial[integer(0, static_cast<int64_t>(kSpecial.size()) - 1)], 0.5f,
                                        integer(0, 1) != 0 ? 0.25f : 0.5f};
                scores[int64_t{b} * width + i] = values[kind];
            }
        }
        expect(scores);
    }

    void expect(const std::vector<float>& values) {
        expected.clear();
        for (int b = 0; b < batch(); ++b) {
            const int64_t length = counts[3 * b], keep = counts[3 * b + 1], tail = counts[3 * b + 2];
            const auto end = values.begin() + int64_t{b + 1} * width;
            std::vector<int64_t> row(num_keep - keep, -1);
            for (int64_t i : oracle::select({end - length, end}, keep, sink, tail, block_size, pooling)) {
                row.push_back(i + width - length);
            }
            expected.insert(expected.end(), row.begin(), row.end());
        }
    }

    // With counts on the device where rows are padded, else on the host.
    Selection selection(Memory& memory) const {
        const bool is_padded = batch() > 1 || width != counts[0] || num_keep != counts[1];
        return {is_padded ? memory.copy(counts) : nullptr,
                memory.array<int64_t>(int64_t{batch()} * num_keep),
                nullptr,
                nullptr,
                batch(),
                width,
                num_keep,
                0,
                sink,
                is_padded ? 0 : static_cast<int>(counts[2]),
                block_size,
                pooling};
    }

    int most_dropped() const {
        int64_t most = 0;
        for (int b = 0; b < batch(); ++b) most = std::max(most, counts[3 * b] - counts[3 * b + 1]);
        return static_cast<int>(most);
    }
};

void check_indices(const Rows& rows, const Selection& selection) {
    for (size_t i = 0; i < rows.expected.size(); ++i) {
        check(selection.indices[i] == rows.expected[i], "slot " + std::to_string(i) + " is " +
                                                            std::to_string(selection.indices[i]) + ", expected " +
                                                            std::to_string(rows.expected[i]));
    }
}

// What is not kept of each row, after -1 for what is missing; the first ones have no room where there is too little.
void check_dropped(const Rows& rows, const Selection& selection) {
    for (int b = 0; b < rows.batch(); ++b) {
        const auto kept = rows.expected.begin() + int64_t{b} * rows.num_keep;
        std::vector<int64_t> expected;
        for (int64_t column = rows.width - rows.counts[3 * b]; column < rows.width; ++column) {
            if (std::find(kept, kept + rows.num_keep, column) == kept + rows.num_keep) expected.push_back(column);
        }
        while (static_cast<int>(expected.size()) < selection.num_dropped) expected.insert(expected.begin(), -1);
        expected.erase(expected.begin(), expected.end() - selection.num_dropped);
        for (int i = 0; i < selection.num_dropped; ++i) {
            const int64_t got = selection.dropped[int64_t{b} * selection.num_dropped + i];
            check(got == expected[i], "dropped token " + std::to_string(i) + " of row " + std::to_string(b) + " is " +
                                          std::to_string(got) + ", expected " + std::to_string(expected[i]));
        }
    }
}

// The running means of what is kept; the tail's are those that it came with.
void check_means(const Rows& rows, const Selection& selection, const std::vector<float>& means, const float* before) {
    for (int b = 0; b < rows.batch(); ++b) {
        for (int k = 0; k < rows.num_keep; ++k) {
            const int64_t place = int64_t{b} * rows.num_keep + k, column = rows.expected[place];
            const int64_t token = int64_t{b} * rows.width + column;
            const bool is_tail = column >= rows.width - rows.counts[3 * b + 2];
            const float mean = column < 0 ? 0.0f : !is_tail ? means[token] : before == nullptr ? 0.0f : before[token];
            check(selection.kept_mean[place] == mean, "mean of slot " + std::to_string(k) + " is " +
                                                          std::to_string(selection.kept_mean[place]) + ", expected " +
                                                          std::to_string(mean));
        }
    }
}

void select_rows(const Rows& rows) {
    Memory memory;
    const Selection selection = rows.selection(memory);
    const int before = cuda_on_cpu::num_launches();
    check_launched(select_tokens(memory.copy(rows.scores), selection, memory.allocator(), {}));
    check(cuda_on_cpu::num_launches() - before == (selection.num_keep > 0), "not one launch");
    check_indices(rows, selection);
}

void select_random(uint64_t seed) {
    begin("select", seed, 3, 4);
    const int block_sizes[] = {0, 0, 1, 7, 12, 100, 300};
    const int block_size = block_sizes[integer(0, 6)];
    const int64_t sink = integer(0, 3);
    const int64_t per_block = block_size > 0 ? integer(std::min<int64_t>(sink + 1, block_size), block_size) : 0;
    std::vector<int64_t> counts;
    for (int64_t rows = integer(1, is_small ? 2 : 3); rows > 0; --rows) {
        const int64_t tail = integer(0, 12);
        const int64_t blocks = integer(0, is_small ? 2 : 3);
        const int64_t length = tail + (block_size > 0 ? blocks * block_size : integer(0, is_small ? 300 : 700));
        const int64_t keep =
            tail + (block_size > 0 ? blocks * per_block : integer(std::min(sink, length - tail), length - tail));
        counts.insert(counts.end(), {length, keep, tail});
    }
    const int poolings[] = {1, 1, 3, 7, 21, kMaxPooling};
    const int pooling = poolings[integer(0, is_small ? 3 : 5)];
    const int padding = static_cast<int>(integer(0, 2));
    select_rows({counts, static_cast<int>(sink), block_size, pooling, padding, static_cast<int>(integer(0, 1))});
}

// A row that several CTAs share, and one that finds no room for that.
void select_long(uint64_t seed) {
    const int64_t length = is_small ? 5000 : 3 * 4096 + 77;
    for (const int pooling : {1, 7}) {
        begin("select of a long row", seed, 2, 4);
        select_rows({{length, length * 4 / 5, length / 10}, 4, 0, pooling, 0, 0});
    }
    if (is_small) return;
    begin("select of long rows", seed, 2, 6);
    select_rows({{length, length - 5, 90, length / 2, length / 4, 3}, 4, 0, 5, 2, 1});
    begin("select of a long row by one CTA", seed, 2, 1);
    select_rows({{length, length / 3, 5}, 4, 0, 3, 0, 0});
    begin("select of long blocks", seed, 2, 4);
    select_rows({{2 * 5000 + 9, 2 * 700 + 9, 9}, 4, 5000, 7, 0, 0});
}

// The host does not see the counts of rows on a GPU: wrong ones must not reach beyond their row.
void select_wrong_counts(uint64_t seed) {
    begin("select with wrong counts", seed, 2, 4);
    const std::vector<std::vector<int64_t>> wrong{
        {99, 99, 99}, {-5, 3, 2}, {40, 60, 50}, {40, 30, 5}, {9, 30, int64_t{1} << 40}, {40, -1, -1}, {30, 20, 25}};
    for (const auto& counts : wrong) {
        for (const int block_size : {0, 8}) {
            Memory memory;
            std::vector<float> scores(40);
            for (float& value : scores) value = normal();
            const std::vector<int64_t> columns(60, -7);
            int64_t *kept = memory.copy(columns), *dropped = memory.copy(columns);
            float* means = memory.copy(std::vector<float>(60, -7.0f));
            const Selection selection{memory.copy(counts), kept + 20, means + 20, dropped + 20, 1, 40, 20, 20, 2, 0,
                                      block_size,          7};
            check_launched(select_tokens(memory.copy(scores), selection, memory.allocator(), {}));
            for (int i = 0; i < 60; ++i) {
                const bool is_ours = 20 <= i && i < 40;
                for (const int64_t column : {kept[i], dropped[i]}) {
                    check(is_ours ? -7 <= column && column < 40 : column == -7, "a slot or column outside the row");
                }
                check(is_ours || means[i] == -7.0f, "a mean outside the row");
            }
        }
    }
}

void select_group() {
    for (uint64_t seed = 0; seed < (is_small ? 6 : 40); ++seed) select_random(seed);
    for (uint64_t seed = 0; seed < (is_small ? 1 : 3); ++seed) select_long(seed);
    select_wrong_counts(0);
}

// ----------------------------------------------------------------------------------------------------- gather

// A tensor [B, heads, N, row_bytes] with gaps, full of random bytes.
TokenRows tensor(Memory& memory, int64_t batch, int64_t heads, int64_t tokens, int64_t row_bytes, int64_t num_keep,
                 int64_t gap = 0, int64_t offset = 0, bool heads_inside = false, bool shared = false) {
    const int64_t step = row_bytes + gap;
    const int64_t bytes = (shared ? 1 : batch) * heads * tokens * step + offset;
    auto* source = memory.array<unsigned char>(bytes);
    for (int64_t i = 0; i < bytes; ++i) source[i] = static_cast<unsigned char>(generator());
    return {reinterpret_cast<const char*>(source) + offset,
            memory.array<char>(batch * heads * num_keep * row_bytes),
            shared ? 0 : heads * tokens * step,
            heads_inside ? step : tokens * step,
            heads_inside ? heads * step : step,
            heads,
            row_bytes};
}

std::vector<TokenRows> tensors(Memory& memory, int64_t batch, int64_t tokens, int64_t num_keep) {
    return {
        tensor(memory, batch, 1, tokens, 48, num_keep),                    // 16 bytes at a time
        tensor(memory, batch, 3, tokens, 80, num_keep, 0, 0, true),        // keys, as attention leaves them
        tensor(memory, batch, 1, tokens, 8, num_keep, 0, 0, false, true),  // positions shared by the batch
        tensor(memory, batch, 1, tokens, 32, num_keep, 0, 8),              // an address that allows 8
        tensor(memory, batch, 1, tokens, 32, num_keep, 4),                 // a stride that allows 4
        tensor(memory, batch, 2, tokens, 6, num_keep),                     // a size that allows 2
        tensor(memory, batch, 1, tokens, 1, num_keep),
        tensor(memory, batch, 1, tokens, 2100, num_keep),  // longer than a warp's turn
    };
}

void check_rows(const std::vector<TokenRows>& tensors, int64_t batch, const int64_t* indices, int64_t num_keep) {
    for (size_t t = 0; t < tensors.size(); ++t) {
        TokenRows expected = tensors[t];
        std::vector<char> memory(batch * expected.num_heads * num_keep * expected.row_bytes);
        expected.destination = memory.data();
        for (int64_t b = 0; b < batch; ++b) {
            sdtp::gather_rows(expected, b, indices + b * num_keep, num_keep, 0, num_keep);
        }
        check(memory.empty() || std::memcmp(memory.data(), tensors[t].destination, memory.size()) == 0,
              "tensor " + std::to_string(t) + " is not the rows that its indices name");
    }
}

void gather_random(uint64_t seed, int num_tensors = 0, int num_launches = 1) {
    begin("gather", seed, 3, 4);
    Memory memory;
    const int64_t batch = integer(1, 2), tokens = integer(1, is_small ? 20 : 60), num_keep = integer(1, tokens);
    std::vector<int64_t> indices(batch * num_keep);
    for (int64_t& index : indices) index = integer(-1, tokens - 1);
    std::vector<TokenRows> all = tensors(memory, batch, tokens, num_keep);
    while (static_cast<int>(all.size()) < num_tensors) {
        all.push_back(tensor(memory, batch, 1, tokens, 4, num_keep));
    }
    const int before = cuda_on_cpu::num_launches();
    check_launched(gather_tokens(all, memory.copy(indices), batch, num_keep, {}));
    const int launches = cuda_on_cpu::num_launches() - before;
    check(launches == num_launches, std::to_string(launches) + " launches");
    check_rows(all, batch, indices.data(), num_keep);
}

// Rows so far apart that their offsets need 64 bits; what lies between them does not exist.
void gather_far() {
    begin("gather of rows far apart", 0, 1, 1);
    const int64_t step = (int64_t{1} << 31) + 16;
    void* memory = mmap(nullptr, 3 * step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "no address space");
    auto* source = static_cast<char*>(memory);
    for (int i = 0; i < 3; ++i) std::memset(source + i * step, i + 1, 16);
    const int64_t indices[] = {1, 2};
    alignas(16) char destination[32] = {};
    const TokenRows rows{source, destination, 0, 0, step, 1, 16};
    check_launched(gather_tokens({rows}, indices, 1, 2, {}));
    check_rows({rows}, 1, indices, 2);
    munmap(memory, 3 * step);
}

void gather_group() {
    for (uint64_t seed = 0; seed < (is_small ? 2 : 6); ++seed) gather_random(seed);
    gather_random(0, kFewTensors);
    gather_random(1, kFewTensors + 1);
    gather_random(2, kMaxTensors);  // more than keys and values of all layers of any model we know
    gather_random(3, kMaxTensors + 1, 2);
    gather_far();
}

// ------------------------------------------------------------------------------------------------------ prune

// prune_tokens is its own scores, the oracle's selection of them and copies of what was selected, bit for bit.
template <typename T>
void prune(uint64_t seed, const std::vector<int64_t>& counts, int block_size, int pooling, int num_launches,
           int multiprocessors, int num_tensors = 8, int units = 20, int spare_drops = 2) {
    begin("prune in " + std::to_string(num_launches) + ", blocks of " + std::to_string(block_size), seed, 3,
          multiprocessors);
    Memory memory;
    const bool is_padded = counts.size() > 3;
    Rows rows(counts, 4, block_size, pooling, is_padded ? 2 : 0, is_padded ? 1 : 0);
    Model<T> model(memory, {rows.batch(), rows.width, 48, units, true, seed % 2 == 0});
    rows.expect(model.scores());
    Model<T> without_bias = model;
    without_bias.scoring.score_bias = nullptr;
    const std::vector<float> means = without_bias.scores();
    Selection selection = rows.selection(memory);
    selection.num_dropped = std::max(rows.most_dropped() + spare_drops, 0);
    selection.dropped = memory.array<int64_t>(int64_t{rows.batch()} * selection.num_dropped);
    selection.kept_mean = memory.array<float>(int64_t{rows.batch()} * rows.num_keep);
    model.scoring.num_scored = rows.width - selection.recent;
    std::vector<TokenRows> all = tensors(memory, rows.batch(), rows.width, rows.num_keep);
    while (static_cast<int>(all.size()) < num_tensors) {
        all.push_back(tensor(memory, rows.batch(), 1, rows.width, 4, rows.num_keep));
    }
    const int before = cuda_on_cpu::num_launches();
    check_launched(prune_tokens(model.scoring, selection, all, memory.allocator(), {}));
    const int launches = cuda_on_cpu::num_launches() - before;
    check(launches == num_launches, std::to_string(launches) + " launches");
    check_indices(rows, selection);
    check_dropped(rows, selection);
    check_means(rows, selection, means, model.scoring.mean_score);
    check_rows(all, rows.batch(), selection.indices, rows.num_keep);
}

void prune_group() {
    for (uint64_t seed = 0; seed < (is_small ? 1 : 3); ++seed) {
        prune<BFloat16>(seed, {2 * 40 + 9, 2 * 20 + 9, 9}, 40, 7, 1, 2);
        prune<BFloat16>(seed, {2 * 40 + 9, 2 * 20 + 9, 9}, 40, 3, 2, 60);
        prune<BFloat16>(seed, {90, 60, 9}, 0, 1, 3, 4);
        prune<BFloat16>(seed, {130 + 9, 100 + 9, 9}, 130, 1, 2, 60);  // several CTAs share a block
        prune<float>(seed, {2 * 130 + 9, 2 * 100 + 9, 9, 130 + 5, 100 + 5, 5}, 130, 7, 1, 2, 8, 70);
        prune<BFloat16>(seed, {90, 60, 9, 50, 20, 9}, 0, 1, 3, 4, 8, 20, -5);  // too little room for what is dropped
        prune<BFloat16>(seed, {2 * 40, 0, 0}, 0, 1, 2, 4);                     // nothing is kept
        if (is_small) continue;
        prune<Half>(seed, {256 + 30, 200 + 30, 30, 256, 200, 0}, 256, 1, 1, 2);
        prune<Half>(seed, {2 * 300 + 9, 2 * 130 + 9, 9, 300, 130, 0}, 300, 5, 2, 4);
        prune<float>(seed, {300, 200, 30, 90, 60, 9}, 0, 7, 3, 4);
        prune<BFloat16>(seed, {4096 + 200, 3000, 100}, 0, 1, 3, 4);
        prune<BFloat16>(seed, {4096 + 200, 3000, 50}, 0, 1, 2, 4, 8, 0);  // a pruner without units: nothing to launch
        prune<float>(seed, {30, 30, 30}, 64, 1, 1, 4);                    // no block is complete, nothing to score
        prune<float>(seed, {2 * 16 + 3, 2 * 8 + 3, 3}, 16, 1, 3, 2, kFewTensors + 1);
    }
}

// ---------------------------------------------------------------------------------------------------- window, bias

enum class Rotary { kNone, kShared, kByRow };

struct Prompts {
    std::vector<int> lengths;  // of the rows, which are left-padded to the longest and `padding` more
    int padding, heads, key_heads, queries, head_dim, pooling;
    Rotary rotary = Rotary::kNone;
    int64_t gap = 0;  // elements between keys
    int keep_last = 0;
    int num_distances = 40;
    int64_t stretch = 1;  // of the distances between tokens

    int width() const { return *std::max_element(lengths.begin(), lengths.end()) + padding; }
    int batch() const { return static_cast<int>(lengths.size()); }
};

template <typename T>
T not_a_number() {
    if constexpr (sizeof(T) == 4) return NAN;
    if constexpr (sizeof(T) == 2) return {0x7fff};
}

// Arguments of both ops: padded prompts of which some tokens dropped, and queries that see all, some or none of them.
template <typename T>
struct Attended {
    Prompts size;
    Window window{};
    PromptBias bias{};
    T *query, *key;
    int64_t *index, *query_index;

    Attended(Memory& memory, const Prompts& size) : size(size) {
        const int batch = size.batch(), width = size.width();
        const int first = width - size.keep_last - size.queries;  // the window's first token
        const auto values = [&](int64_t count, float scale) {
            T* to = memory.array<T>(count);
            for (int64_t i = 0; i < count; ++i) to[i] = rounded<T>(scale * normal());
            return to;
        };
        const int64_t step = size.head_dim + size.gap;
        query = values(int64_t{batch} * size.heads * size.queries * step, 1);
        key = values(int64_t{batch} * size.key_heads * width * step, 2);
        index = memory.array<int64_t>(int64_t{batch} * width);
        for (int b = 0; b < batch; ++b) {
            int64_t next = 0;
            for (int j = 0; j < width; ++j) {
                const bool is_padding = j < width - size.lengths[b];
                index[int64_t{b} * width + j] = is_padding ? -1 : next;
                if (!is_padding) next += size.stretch * integer(1, 3);
            }
        }
        query_index = memory.array<int64_t>(int64_t{batch} * size.queries);
        for (int b = 0; b < batch; ++b) {
            for (int i = 0; i < size.queries; ++i) {
                const int64_t choices[] = {-1, 0, integer(0, 2 * width), 4 * size.stretch * width};
                query_index[int64_t{b} * size.queries + i] = choices[integer(0, 3)];
            }
        }
        const int64_t row = int64_t{width} * size.head_dim;
        const int64_t rotary = size.rotary == Rotary::kByRow ? batch * row : row;
        const T *cos = values(rotary, 1), *sin = values(rotary, 1);
        const bool is_rotated = size.rotary == Rotary::kNone;
        // Queries as a projection leaves them, [B, w, H, d]; keys as a cache does.
        window = {kElement<T>,
                  query,
                  {size.queries * size.heads * step, step, size.heads * step},
                  key,
                  {size.key_heads * width * step, width * step, step},
                  query_index,
                  size.queries,
                  index,
                  is_rotated ? nullptr : cos + int64_t{first} * size.head_dim,
                  is_rotated ? nullptr : sin + int64_t{first} * size.head_dim,
                  {size.rotary == Rotary::kByRow ? row : 0, size.head_dim},
                  static_cast<float>(0.3 * 1.4426950408889634),
                  batch,
                  size.heads,
                  size.key_heads,
                  size.queries,
                  width,
                  size.head_dim,
                  size.pooling};
        const bool is_by_row = size.rotary == Rotary::kByRow;
        std::vector<float> table((is_by_row ? batch : 1) * size.num_distances);
        for (float& value : table) value = normal();
        bias = {index, memory.copy(table), size.num_distances, is_by_row, nullptr, 0.7f, batch, width, size.keep_last};
    }

    // The window of prompt_bias: the prompt's last tokens.
    Window of_prompt() const {
        Window last = window;
        last.query_index = index + size.width() - size.keep_last - size.queries;
        last.query_index_stride = size.width();
        return last;
    }

    std::vector<int64_t> row_of_index(int b) const {
        return {index + int64_t{b} * size.width(), index + int64_t{b + 1} * size.width()};
    }

    std::vector<double> exact(int b, const Window& window) const {
        const int half = size.head_dim / 2;
        const auto rotated = [&](int head, int i, int d) {
            const T* from =
                query + b * window.query_strides[0] + head * window.query_strides[1] + i * window.query_strides[2];
            if (window.cos == nullptr) return double{sdtp::to_float(from[d])};
            const int64_t place = b * window.rotary_strides[0] + i * window.rotary_strides[1] + d;
            const double cos = sdtp::to_float(static_cast<const T*>(window.cos)[place]);
            const double sin = sdtp::to_float(static_cast<const T*>(window.sin)[place]);
            const double other = d < half ? -sdtp::to_float(from[d + half]) : sdtp::to_float(from[d - half]);
            return sdtp::to_float(from[d]) * cos + other * sin;
        };
        const auto logit = [&](int head, int i, int j) {
            const T* to = key + b * window.key_strides[0] + head * size.key_heads / size.heads * window.key_strides[1] +
                          j * window.key_strides[2];
            double sum = 0;
            for (int d = 0; d < size.head_dim; ++d) sum += rotated(head, i, d) * sdtp::to_float(to[d]);
            return 0.3 * sum;
        };
        const int64_t* indices = window.query_index + b * window.query_index_stride;
        return oracle::window_attention(size.heads, {indices, indices + size.queries}, row_of_index(b), size.pooling,
                                        logit);
    }

    // Row b alone, without its padding.
    Window alone(int b, const Window& window) const {
        Window own = window;
        const int padding = size.width() - size.lengths[b];
        own.batch_size = 1;
        own.query = query + b * window.query_strides[0];
        own.key = key + b * window.key_strides[0] + padding * window.key_strides[2];
        own.query_index += b * window.query_index_stride;
        own.key_index += int64_t{b} * size.width() + padding;
        own.num_keys = size.lengths[b];
        if (window.cos != nullptr) {
            own.cos = static_cast<const T*>(window.cos) + b * window.rotary_strides[0];
            own.sin = static_cast<const T*>(window.sin) + b * window.rotary_strides[0];
        }
        return own;
    }
    PromptBias alone(int b, const PromptBias& bias) const {
        PromptBias own = bias;
        if (bias.is_by_row) own.distance_table += b * bias.num_distances;
        const int64_t first = int64_t{b} * size.width() + size.width() - size.lengths[b];
        own.batch_size = 1;
        own.token_index += first;
        if (own.attention != nullptr) own.attention += first;
        own.num_tokens = size.lengths[b];
        return own;
    }
};

void check_num_launches(int before, int expected) {
    const int launches = cuda_on_cpu::num_launches() - before;
    check(launches == expected, std::to_string(launches) + " launches, not " + std::to_string(expected));
}

std::vector<float> attention_of(const Window& window) {
    Memory own;
    const int64_t count = int64_t{window.batch_size} * window.num_keys;
    float* attention = own.array<float>(count);
    const int before = cuda_on_cpu::num_launches();
    check_launched(window_attention(window, attention, own.allocator(), {}));
    check_num_launches(before, count > 0 ? 3 : 0);
    return {attention, attention + count};
}

std::vector<float> bias_of(const PromptBias& bias, const Window* window) {
    Memory own;
    const int64_t count = int64_t{bias.batch_size} * bias.num_tokens;
    float* result = own.array<float>(count);
    const int before = cuda_on_cpu::num_launches();
    check_launched(prompt_bias(bias, window, result, own.allocator(), {}));
    check_num_launches(before, count == 0 ? 0 : window != nullptr ? 4 : bias.attention != nullptr ? 2 : 1);
    return {result, result + count};
}

void check_close(const float* got, const std::vector<double>& expected, double tolerance) {
    for (size_t i = 0; i < expected.size(); ++i) {
        // NaN fails the comparison too.
        check(std::fabs(got[i] - expected[i]) <= tolerance, "token " + std::to_string(i) + " has " +
                                                                std::to_string(got[i]) + ", expected " +
                                                                std::to_string(expected[i]));
    }
}

void check_equal(const float* got, const float* expected, size_t count, const std::string& message) {
    check(count == 0 || std::memcmp(got, expected, count * sizeof(float)) == 0, message);
}

std::string describe(const std::string& name, size_t bytes, const Prompts& size) {
    return name + " of " + std::to_string(size.batch()) + " x " + std::to_string(size.heads) + " x " +
           std::to_string(size.queries) + " queries, " + std::to_string(size.key_heads) + " x " +
           std::to_string(size.width()) + " keys of " + std::to_string(size.head_dim) + " x " + std::to_string(bytes) +
           " bytes";
}

template <typename T>
void window(uint64_t seed, const Prompts& size) {
    begin(describe("window", sizeof(T), size), seed, 2, 4);
    Memory memory;
    Attended<T> prompts(memory, size);
    const Window& window = prompts.window;
    const int width = size.width();
    const std::vector<float> got = attention_of(window);
    double most = 1;
    for (int b = 0; b < size.batch(); ++b) {
        const std::vector<double> expected = prompts.exact(b, window);
        for (double value : expected) most = std::max(most, value);
        check_close(&got[int64_t{b} * width], expected, 1e-5 * most);
        if (is_small) continue;
        const std::vector<float> alone = attention_of(prompts.alone(b, window));
        const size_t end = int64_t{b + 1} * width;
        check_equal(&got[end - alone.size()], alone.data(), alone.size(), "a row depends on the batch or on padding");
    }
    if (is_small) return;  // what follows launches the same
    cuda_on_cpu::configure(seed + 1, 1, 4);
    check_equal(attention_of(window).data(), got.data(), got.size(), "another order of threads gives other bits");

    const auto spoil = [&](T& value, bool counts) {
        const T right = value;
        value = not_a_number<T>();
        const std::vector<float> spoilt = attention_of(window);
        value = right;
        for (int j = 0; j < width; ++j) {
            check(counts ? std::isnan(spoilt[j]) : spoilt[j] == got[j], "NaN in a row is not as it should be");
        }
        check_equal(&spoilt[width], &got[width], got.size() - width, "NaN of one row in another");
    };
    int64_t* index = prompts.query_index;  // of the first row
    const bool is_seen = size.lengths[0] > 0 && *std::max_element(index, index + size.queries) >= 0;
    spoil(prompts.key[int64_t{width - 1} * window.key_strides[2]],
          is_seen && prompts.index[width - 1] <= *std::max_element(index, index + size.queries));
    if (size.lengths[0] < width) spoil(prompts.key[0], false);
    spoil(prompts.query[0], index[0] >= 0 && size.lengths[0] > 0);
}

// Keys so far apart that their offsets need 64 bits; what lies between them does not exist.
void window_far() {
    begin("window of keys far apart", 0, 1, 1);
    const int64_t step = (int64_t{1} << 31) + 8;
    const size_t bytes = 2 * step * sizeof(BFloat16);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "no address space");
    auto* key = static_cast<BFloat16*>(memory);
    const BFloat16 query[2] = {rounded<BFloat16>(1.0f), rounded<BFloat16>(2.0f)};
    key[step] = rounded<BFloat16>(1.0f);
    const int64_t query_index = 1, key_index[] = {0, 1};
    const Window window{Element::kBFloat16,
                        query,
                        {0, 0, 0},
                        key,
                        {0, 0, step},
                        &query_index,
                        1,
                        key_index,
                        nullptr,
                        nullptr,
                        {0, 0},
                        1.0f,
                        1,
                        1,
                        1,
                        1,
                        2,
                        2,
                        1};
    check_close(attention_of(window).data(), {1.0 / 3, 2.0 / 3}, 1e-6);
    munmap(memory, bytes);
}

void window_group() {
    for (uint64_t seed = 0; seed < (is_small ? 1 : 3); ++seed) {
        window<BFloat16>(seed, {{70, 33}, 3, 3, 1, 5, 16, 7, Rotary::kByRow});
        window<float>(seed, {{90}, 1, 2, 2, 17, 12, 3, Rotary::kShared, 4});  // two passes
        window<Half>(seed, {{1}, 0, 1, 1, 1, 7, 1});
        if (is_small) continue;
        window<BFloat16>(seed, {{38, 0, 1}, 2, 5, 5, 16, 24, 5, Rotary::kShared, 3});  // heads alone are aligned
        window<BFloat16>(seed, {{20, 9}, 0, 2, 1, 3, 8, 1000001});
    }
    if (is_small) return;
    window<Half>(0, {{700, 300}, 330, 6, 2, 8, 64, 13, Rotary::kByRow});  // three tiles
    window<float>(0, {{1025, 1020}, 0, 3, 3, 33, 10, 1});
    window<float>(0, {{90}, 0, 7, 1, 64, 256, 255});
    window<float>(0, {{17000}, 0, 1, 1, 1, 1, 3});  // more tiles than a warp has lanes
    Memory memory;
    begin("window of nothing", 0, 2, 4);
    Attended<float> prompts(memory, {{30}, 2, 2, 1, 4, 8, 3});
    Window nothing = prompts.window;
    nothing.num_queries = 0;
    for (float value : attention_of(nothing)) check(value == 0.0f, "attention of no query");
    nothing.num_keys = 0;
    attention_of(nothing);
    window_far();
}

template <typename T>
void bias(uint64_t seed, const Prompts& size) {
    begin(describe("bias", sizeof(T), size), seed, 2, 4);
    Memory memory;
    Attended<T> prompts(memory, size);
    const Window window = prompts.of_prompt();
    const int width = size.width();
    const auto table = [&](int b) {
        const float* first = prompts.bias.distance_table + (prompts.bias.is_by_row ? b * size.num_distances : 0);
        return std::vector<float>(first, first + size.num_distances);
    };
    std::vector<float> given(int64_t{size.batch()} * width);
    for (float& value : given) value = integer(0, 9) == 0 ? 0.0f : std::fabs(normal());
    for (int b = 0; b < size.batch(); ++b) {  // what stands in padding counts for nothing
        std::fill_n(&given[int64_t{b} * width], width - size.lengths[b], NAN);
    }
    PromptBias with_given = prompts.bias;
    float* attention = memory.copy(given);
    with_given.attention = attention;
    const auto check_rows = [&](const PromptBias& bias, const Window* window, const auto& attention) {
        const std::vector<float> got = bias_of(bias, window);
        for (int b = 0; b < size.batch(); ++b) {
            const int64_t first = int64_t{b} * width;
            check_close(&got[first],
                        oracle::prompt_bias(prompts.row_of_index(b), size.keep_last, table(b), attention(b), 0.7),
                        2e-4);
            if (is_small) continue;
            Window own_window;
            if (window != nullptr) own_window = prompts.alone(b, *window);
            if (window != nullptr && size.lengths[b] < size.queries + size.keep_last) continue;
            if (size.lengths[b] < size.keep_last) continue;
            const std::vector<float> alone = bias_of(prompts.alone(b, bias), window != nullptr ? &own_window : nullptr);
            check_equal(&got[first + width - alone.size()], alone.data(), alone.size(),
                        "a row depends on the batch or on padding");
        }
        return got;
    };
    check_rows(prompts.bias, &window, [&](int b) { return prompts.exact(b, window); });
    check_rows(prompts.bias, nullptr, [&](int) { return std::vector<double>(); });
    const std::vector<float> got = check_rows(with_given, nullptr, [&](int b) {
        return std::vector<double>(&given[int64_t{b} * width], &given[int64_t{b} * width] + width);
    });
    cuda_on_cpu::configure(seed + 1, 1, 4);
    check_equal(bias_of(with_given, nullptr).data(), got.data(), got.size(),
                "another order of threads gives other bits");

    const int valid = width - size.keep_last - 1;  // the last one of the first row
    if (size.lengths[0] <= size.keep_last) return;
    attention[valid] = NAN;
    const std::vector<float> spoilt = bias_of(with_given, nullptr);
    for (int i = 0; i < width; ++i) {
        const bool counts = width - size.lengths[0] <= i && i <= valid;
        check(counts ? std::isnan(spoilt[i]) : spoilt[i] == 0.0f, "NaN in a row is not as it should be");
    }
    check_equal(&spoilt[width], &got[width], got.size() - width, "NaN of one row in another");
}

void bias_group() {
    for (uint64_t seed = 0; seed < (is_small ? 1 : 3); ++seed) {
        bias<BFloat16>(seed, {{70, 33}, 3, 3, 1, 5, 16, 3, Rotary::kByRow, 0, 7});
        bias<float>(seed, {{300}, 0, 2, 1, 4, 8, 7, Rotary::kShared});
        if (is_small) continue;
        bias<Half>(seed, {{40, 0, 12}, 2, 2, 2, 3, 16, 1, Rotary::kNone, 1, 11});
        bias<BFloat16>(seed, {{20, 9}, 0, 2, 1, 0, 8, 1, Rotary::kNone, 0, 20});  // all stand after the prompt
        bias<float>(seed, {{1}, 0, 1, 1, 1, 4, 1, Rotary::kShared, 0, 0, 1});
    }
    if (is_small) return;
    bias<float>(0, {{700, 520}, 300, 4, 2, 16, 24, 5, Rotary::kByRow, 0, 1, 300, int64_t{1} << 33});  // far apart
    bias<float>(0, {{66000}, 1, 1, 1, 1, 1, 1, Rotary::kNone, 0, 5});  // more CTAs than a CTA has threads
}

}  // namespace

int main(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) is_small |= std::string(argv[i]) == "--small";
    for (int i = 1; i < argc; ++i) {
        const std::string group = argv[i];
        if (group == "score") score_group();
        if (group == "select") select_group();
        if (group == "gather") gather_group();
        if (group == "prune") prune_group();
        if (group == "window") window_group();
        if (group == "bias") bias_group();
    }
    std::printf("all right, %d launches\n", cuda_on_cpu::num_launches());
    return 0;
}
