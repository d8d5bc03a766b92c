// Row gather of one tensor [B, heads, N, ...] whose rows are contiguous; every other stride is free, 0 included.
#pragma once

#include <cstdint>
#include <cstring>

namespace sdtp {

struct TokenRows {
    const char* source;
    char* destination;     // contiguous [B, heads, num_keep, row_bytes]
    int64_t batch_stride;  // of the source, in bytes, as the next two
    int64_t head_stride;
    int64_t token_stride;
    int64_t num_heads;
    int64_t row_bytes;
};

// Copies the tokens `indices[begin:end]` of batch row `batch`; index -1 gives zeros. `indices` is [num_keep].
inline void gather_rows(const TokenRows& rows, int64_t batch, const int64_t* indices, int64_t num_keep, int64_t begin,
                        int64_t end) {
    const bool is_dense = rows.token_stride == rows.row_bytes;
    for (int64_t head = 0; head < rows.num_heads; ++head) {
        const char* source = rows.source + batch * rows.batch_stride + head * rows.head_stride;
        char* destination = rows.destination + (batch * rows.num_heads + head) * num_keep * rows.row_bytes;
        int64_t run = 1;
        for (int64_t k = begin; k < end; k += run) {
            char* row = destination + k * rows.row_bytes;
            // Neighbours are copied together: at a keep ratio of 0.9 ten of them, and some rows are 8 bytes.
            run = 1;
            if (is_dense && indices[k] >= 0) {
                while (k + run < end && indices[k + run] == indices[k] + run) ++run;
            }
            if (indices[k] < 0) {
                std::memset(row, 0, rows.row_bytes);
            } else {
                std::memcpy(row, source + indices[k] * rows.token_stride, run * rows.row_bytes);
            }
        }
    }
}

}  // namespace sdtp
