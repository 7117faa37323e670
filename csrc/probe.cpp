#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "memory.h"

namespace headrace {

#define HEADRACE_DECLARE(isa)                               \
    namespace isa {                                         \
    uint64_t probe_read(const uint8_t* data, size_t bytes); \
    int probe_int8(int rounds, int32_t* out);               \
    }
HEADRACE_DECLARE(portable)
#if defined(__x86_64__)
HEADRACE_DECLARE(avx2)
HEADRACE_DECLARE(avx512)
#endif

namespace {

constexpr int kRepeats = 5;

struct Probes {
    uint64_t (*read)(const uint8_t*, size_t);
    int (*int8)(int, int32_t*);
};

Probes probes(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return {avx512::probe_read, avx512::probe_int8};
    if (isa == Isa::avx2) return {avx2::probe_read, avx2::probe_int8};
#endif
    (void)isa;
    return {portable::probe_read, portable::probe_int8};
}

// Seconds of the fastest of a few runs of a job.
double best_time(Pool& pool, const Pool::Job& job) {
    double best = 1e30;
    for (int i = 0; i < kRepeats; ++i) {
        const auto start = std::chrono::steady_clock::now();
        pool.run(job);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

}  // namespace

double read_bandwidth(Isa isa, Pool& pool, size_t bytes) {
    const size_t part = std::max<size_t>(512, bytes / size_t(pool.threads()) / 512 * 512), all = part * size_t(pool.threads());
    const Memory memory(all);
    std::memset(memory.data(), 1, all);
    const Probes loops = probes(isa);
    volatile uint64_t sink = 0;
    const double seconds = best_time(pool, [&](Worker& worker) { sink = loops.read(memory.data() + part * size_t(worker.index), part); });
    return double(all) / seconds / 1e9;
}

double int8_peak(Isa isa, Pool& pool) {
    constexpr int kRounds = 1 << 20;
    const Probes loops = probes(isa);
    std::atomic<int> operations{0};
    const double seconds = best_time(pool, [&](Worker&) {
        int32_t out;
        operations.store(loops.int8(kRounds, &out), std::memory_order_relaxed);
        volatile int32_t sink = out;
        (void)sink;
    });
    return double(operations) * kRounds * pool.threads() / seconds / 1e9;
}

}  // namespace headrace
