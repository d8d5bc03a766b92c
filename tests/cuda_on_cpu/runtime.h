// The machine under the kernels: what a fiber asks of it, and what a test sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

struct Uint3 {
    unsigned x, y, z;
};
struct Index {
    Uint3 thread, block, grid;
};
const Index& index();            // of the fiber that runs
unsigned char* shared_memory();  // of its CTA

void barrier(const char* file, int line);  // all threads of the CTA
void yield(const char* file, int line);    // in a spin: others must go on

// Each lane of `mask` gives `size` bytes; all of them stand in `all` afterwards, lane after lane. The lanes must come
// with one operation, one mask and one place in the source. Memory is not ordered by it.
void exchange(const char* operation, uint32_t mask, const void* own, void* all, size_t size, const char* file,
              int line);

struct Copy {
    void* to;
    const void* from;
    int num_bytes;
};
void push_copy(const Copy& copy, const char* file, int line);
void commit_copies();
bool pop_copy(int pending, Copy& copy);  // one more copy of the groups but the last `pending`

[[noreturn]] void fail(const char* what, const char* file, int line);

// Runs `body` in threads x CTAs fibers. A cooperative launch fails unless all its CTAs run at once.
using Body = void (*)(const void* arguments);
const char* run(Body body, const void* arguments, int64_t grid_x, int64_t grid_y, int threads, size_t shared_bytes,
                bool cooperative);

// How fibers take turns from now on, how many CTAs run at once, and how many multiprocessors the launches see.
void configure(uint64_t seed, int resident_ctas, int multiprocessors);
int num_multiprocessors();
int num_launches();  // so far

}  // namespace cuda_on_cpu
