// Fibers that take turns as CUDA threads; see runtime.h. Compiled without sanitizers: what happens here is the
// machine, not the program. To ThreadSanitizer (SDTP_TSAN) a fiber is a thread, and only what orders memory on a GPU
// orders it here: barriers, and the atomics in cuda_on_cpu.h.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef SDTP_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef SDTP_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#endif

// Saves the registers that a call preserves on the stack, and continues with the stack `to`.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 1 << 20;  // touched pages only; frames grow under the sanitizers
constexpr size_t kMaxExchange = 32;      // bytes of a lane
constexpr int kMaxCopies = 64;           // of a thread under way
constexpr int kMaxIdleRounds = 1000;

void acquire([[maybe_unused]] void* tag) {
#ifdef SDTP_TSAN
    __tsan_acquire(tag);
#endif
}

void release([[maybe_unused]] void* tag) {
#ifdef SDTP_TSAN
    __tsan_release(tag);
#endif
}

struct Warp {
    uint32_t arrived = 0;
    uint32_t mask = 0;
    const char* operation = nullptr;
    const char* file = nullptr;
    int line = 0;
    // Lanes read one while the first of them write the other.
    unsigned char values[2][32][kMaxExchange];
    int generation = 0;
};

struct Fiber;

struct Cta {
    std::unique_ptr<unsigned char[]> shared;
    std::vector<Warp> warps;
    std::vector<Fiber*> threads;
    int num_waiting = 0;
    int num_done = 0;
    const char* file = nullptr;
    int line = 0;
    int generation = 0;
    // One for each of two barriers in a row: who is already at the next one must not be seen by who leaves this one.
    char tags[2];
};

enum class State { kReady, kBarrier, kExchange, kSpin, kDone };

struct Fiber {
    Index index;
    Cta* cta = nullptr;
    State state = State::kReady;
    const char* file = nullptr;
    int line = 0;
    Copy copies[kMaxCopies];
    int groups[kMaxCopies];  // of each copy
    int num_copies = 0;
    int group = 0;  // the one that is being filled
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    void* tsan = nullptr;
    void* fake_stack = nullptr;

    Warp& warp() { return cta->warps[index.thread.x / 32]; }
    int lane() const { return static_cast<int>(index.thread.x % 32); }
};

// Fibers that can go on, each at most once. Nothing is allocated while fibers run.
class Queue {
  public:
    void reserve(size_t capacity) {
        fibers_.resize(capacity);
        first_ = count_ = 0;
    }
    size_t size() const { return count_; }
    void push(Fiber* fiber) { at(count_++) = fiber; }
    Fiber* take_first() {
        Fiber* fiber = at(0);
        first_ = (first_ + 1) % fibers_.size();
        --count_;
        return fiber;
    }
    Fiber* take(size_t i) {
        std::swap(at(i), at(count_ - 1));
        return at(--count_);
    }

  private:
    Fiber*& at(size_t i) { return fibers_[(first_ + i) % fibers_.size()]; }

    std::vector<Fiber*> fibers_;
    size_t first_ = 0;
    size_t count_ = 0;
};

// The one launch that runs.
Body body;
const void* body_arguments;
char launch_tag, end_tag;
std::vector<std::unique_ptr<Fiber>> fibers;
Queue ready, spinning;
Fiber* running;
bool progress;  // since all that could go on were spinning
void* main_stack_pointer;
[[maybe_unused]] void* main_tsan;
[[maybe_unused]] void* main_fake_stack;
[[maybe_unused]] const void* main_stack;
[[maybe_unused]] size_t main_stack_bytes;

uint64_t seed = 0;
int max_resident = 1;
int multiprocessors = 1;
int launches = 0;

uint64_t random_number() {  // splitmix64
    uint64_t z = seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

enum class Order { kOldest, kNewest, kRandom };
Order order = Order::kRandom;

Fiber* take_ready() {
    if (order == Order::kOldest) return ready.take_first();
    return ready.take(order == Order::kNewest ? ready.size() - 1 : random_number() % ready.size());
}

void switch_to_main(bool is_last) {
    Fiber& fiber = *running;
#ifdef SDTP_TSAN
    __tsan_switch_to_fiber(main_tsan, 1);  // 1: no synchronisation
#endif
#ifdef SDTP_ASAN
    __sanitizer_start_switch_fiber(is_last ? nullptr : &fiber.fake_stack, main_stack, main_stack_bytes);
#else
    (void)is_last;
#endif
    cuda_on_cpu_switch(&fiber.stack_pointer, main_stack_pointer);
#ifdef SDTP_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_stack, &main_stack_bytes);
#endif
}

void switch_to(Fiber& fiber) {
    running = &fiber;
#ifdef SDTP_TSAN
    __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#ifdef SDTP_ASAN
    __sanitizer_start_switch_fiber(&main_fake_stack, fiber.stack, kStackBytes);
#endif
    cuda_on_cpu_switch(&main_stack_pointer, fiber.stack_pointer);
#ifdef SDTP_ASAN
    __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
    running = nullptr;
}

void wait(State state, const char* file, int line) {
    running->state = state;
    running->file = file;
    running->line = line;
    switch_to_main(false);
}

void wake(Fiber& fiber) {
    fiber.state = State::kReady;
    ready.push(&fiber);
    progress = true;
}

void enter() {
#ifdef SDTP_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
    acquire(&launch_tag);
    body(body_arguments);
    Fiber& fiber = *running;
    if (fiber.num_copies > 0) fail("a thread ended before its asynchronous copies", fiber.file, fiber.line);
    if (fiber.cta->num_waiting > 0)
        fail("a thread ended, others wait at the barrier", fiber.cta->file, fiber.cta->line);
    if (fiber.warp().arrived != 0) fail("a thread ended, its warp waits", fiber.warp().file, fiber.warp().line);
    ++fiber.cta->num_done;
    fiber.state = State::kDone;
    progress = true;
    release(&end_tag);
    switch_to_main(true);
    std::abort();  // never resumed
}

void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for a stack", __FILE__, __LINE__);
        fiber.stack = static_cast<char*>(memory);
    }
    // As after a call of enter(): the address to go to, and the six registers that cuda_on_cpu_switch restores.
    auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    top[-2] = reinterpret_cast<void*>(&enter);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    fiber.stack_pointer = &top[-8];
    fiber.num_copies = fiber.group = 0;
#ifdef SDTP_TSAN
    fiber.tsan = __tsan_create_fiber(0);
#endif
    wake(fiber);
}

void run_ready() {
    int idle_rounds = 0;
    for (;;) {
        while (ready.size() > 0) {
            switch_to(*take_ready());
            if (order == Order::kRandom && spinning.size() > 0 && random_number() % 8 == 0) {
                ready.push(spinning.take_first());
            }
        }
        if (spinning.size() == 0) return;
        idle_rounds = progress ? 0 : idle_rounds + 1;
        progress = false;
        while (spinning.size() > 0) {
            Fiber* fiber = spinning.take_first();
            if (idle_rounds > kMaxIdleRounds) fail("livelock: all wait in a spin", fiber->file, fiber->line);
            ready.push(fiber);
        }
    }
}

void run_ctas(const std::vector<int64_t>& places, int64_t grid_x, int64_t grid_y, int threads, size_t shared_bytes) {
    std::vector<Cta> ctas(places.size());
    while (fibers.size() < places.size() * threads) fibers.push_back(std::make_unique<Fiber>());
    ready.reserve(fibers.size());
    spinning.reserve(fibers.size());
    for (size_t i = 0; i < places.size(); ++i) {
        Cta& cta = ctas[i];
        cta.warps.resize((threads + 31) / 32);
        cta.shared = std::make_unique<unsigned char[]>(shared_bytes);
        std::fill_n(cta.shared.get(), shared_bytes, static_cast<unsigned char>(0xff));  // NaN
        for (int t = 0; t < threads; ++t) {
            Fiber& fiber = *fibers[i * threads + t];
            fiber.cta = &cta;
            cta.threads.push_back(&fiber);
            fiber.index = {{static_cast<unsigned>(t), 0, 0},
                           {static_cast<unsigned>(places[i] % grid_x), static_cast<unsigned>(places[i] / grid_x), 0},
                           {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1}};
            prepare(fiber);
        }
    }
    release(&launch_tag);
    run_ready();
    acquire(&end_tag);
    for (size_t i = 0; i < places.size() * threads; ++i) {
        Fiber& fiber = *fibers[i];
        if (fiber.state != State::kDone) fail("deadlock: a thread waits for others", fiber.file, fiber.line);
#ifdef SDTP_TSAN
        __tsan_destroy_fiber(fiber.tsan);
#endif
    }
}

}  // namespace

const Index& index() { return running->index; }

unsigned char* shared_memory() { return running->cta->shared.get(); }

void fail(const char* what, const char* file, int line) {
    std::fprintf(stderr, "cuda_on_cpu: %s: %s:%d", what, file != nullptr ? file : "?", line);
    if (running != nullptr)
        std::fprintf(stderr, " (thread %u of CTA %u)", running->index.thread.x, running->index.block.x);
    std::fputc('\n', stderr);
    _exit(70);
}

void barrier(const char* file, int line) {
    Cta& cta = *running->cta;
    if (cta.num_done > 0) fail("a thread waits at the barrier, others have ended", file, line);
    if (running->warp().arrived != 0) fail("a barrier while its warp waits elsewhere", file, line);
    if (cta.num_waiting == 0) {
        cta.file = file;
        cta.line = line;
    } else if (cta.file != file || cta.line != line) {
        std::fprintf(stderr, "cuda_on_cpu: others wait at %s:%d\n", cta.file, cta.line);
        fail("divergent barrier", file, line);
    }
    char* tag = &cta.tags[cta.generation % 2];
    release(tag);
    if (++cta.num_waiting < static_cast<int>(cta.threads.size())) {
        wait(State::kBarrier, file, line);
    } else {
        cta.num_waiting = 0;
        ++cta.generation;
        for (Fiber* fiber : cta.threads) {
            if (fiber->state == State::kBarrier) wake(*fiber);
        }
    }
    acquire(tag);
}

void yield(const char* file, int line) {
    spinning.push(running);
    wait(State::kSpin, file, line);
}

void exchange(const char* operation, uint32_t mask, const void* own, void* all, size_t size, const char* file,
              int line) {
    Fiber& fiber = *running;
    Warp& warp = fiber.warp();
    const uint32_t bit = 1u << fiber.lane();
    if (size > kMaxExchange) fail("an exchange of too many bytes", file, line);
    Fiber* const* lanes = &fiber.cta->threads[fiber.index.thread.x - fiber.lane()];
    for (int lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1) != 0 && lanes[lane]->state == State::kBarrier) {
            fail("a warp operation while a lane waits at a barrier", file, line);
        }
    }
    if ((mask & bit) == 0) fail("a lane that is not in its mask", file, line);
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.mask = mask;
        warp.file = file;
        warp.line = line;
    } else if (warp.operation != operation || warp.mask != mask || warp.file != file || warp.line != line) {
        std::fprintf(stderr, "cuda_on_cpu: others are in %s, mask %08x: %s:%d\n", warp.operation, warp.mask, warp.file,
                     warp.line);
        fail(warp.mask != mask ? "mask mismatch" : "lanes in different warp operations", file, line);
    }
    auto& values = warp.values[warp.generation % 2];
    const auto* from = static_cast<const unsigned char*>(own);
    for (size_t i = 0; i < size; ++i) values[fiber.lane()][i] = from[i];
    warp.arrived |= bit;
    if (warp.arrived != mask) {
        wait(State::kExchange, file, line);
    } else {
        warp.arrived = 0;
        ++warp.generation;
        for (int lane = 0; lane < 32; ++lane) {
            if ((mask >> lane & 1) != 0 && lanes[lane] != running) wake(*lanes[lane]);
        }
    }
    auto* to = static_cast<unsigned char*>(all);
    for (int lane = 0; lane < 32; ++lane) {
        for (size_t i = 0; i < size; ++i) to[lane * size + i] = values[lane][i];
    }
}

void push_copy(const Copy& copy, const char* file, int line) {
    Fiber& fiber = *running;
    if (fiber.num_copies == kMaxCopies) fail("too many asynchronous copies under way", file, line);
    fiber.groups[fiber.num_copies] = fiber.group;
    fiber.copies[fiber.num_copies++] = copy;
    fiber.file = file;
    fiber.line = line;
}

void commit_copies() { ++running->group; }

bool pop_copy(int pending, Copy& copy) {
    Fiber& fiber = *running;
    if (fiber.num_copies == 0 || fiber.groups[0] >= fiber.group - pending) return false;
    copy = fiber.copies[0];
    --fiber.num_copies;
    for (int i = 0; i < fiber.num_copies; ++i) {
        fiber.copies[i] = fiber.copies[i + 1];
        fiber.groups[i] = fiber.groups[i + 1];
    }
    return true;
}

const char* run(Body new_body, const void* arguments, int64_t grid_x, int64_t grid_y, int threads, size_t shared_bytes,
                bool cooperative) {
    ++launches;
    const int64_t num_ctas = grid_x * grid_y;
    if (grid_x < 1 || grid_y < 1 || grid_y > 65535) return "invalid configuration argument";
    if (cooperative && num_ctas > multiprocessors) return "too many blocks in cooperative launch";
    body = new_body;
    body_arguments = arguments;
#ifdef SDTP_TSAN
    main_tsan = __tsan_get_current_fiber();
#endif
    order = static_cast<Order>(random_number() % 3);
    std::vector<int64_t> places(num_ctas);
    for (int64_t i = 0; i < num_ctas; ++i) places[i] = i;
    for (int64_t i = num_ctas - 1; i > 0; --i) std::swap(places[i], places[random_number() % (i + 1)]);
    const int64_t resident = cooperative ? num_ctas : max_resident;
    for (int64_t first = 0; first < num_ctas; first += resident) {
        const auto begin = places.begin() + first;
        run_ctas({begin, begin + std::min(resident, num_ctas - first)}, grid_x, grid_y, threads, shared_bytes);
    }
    return nullptr;
}

int num_multiprocessors() { return multiprocessors; }

void configure(uint64_t new_seed, int resident_ctas, int new_multiprocessors) {
    seed = new_seed;
    max_resident = resident_ctas;
    multiprocessors = new_multiprocessors;
}

int num_launches() { return launches; }

}  // namespace cuda_on_cpu
