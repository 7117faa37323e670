#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waiting inside a job: the others are microseconds away, unless a core was taken from one of them; then spinning would keep it away, and
// yielding again and again give up this thread's share of a core that others want too.
constexpr int kSpins = 512;
// Waiting between jobs: longer than the host needs between two steps, short enough not to burn an idle machine.
constexpr auto kIdle = std::chrono::microseconds(200);
// What a job gave goes on through other threads: host, server, client. For the scheduler, one of them that another preempted has had its
// share, and waits for the clock's next tick (4 ms) behind a thread that computes. So for kNews the threads that compute leave their core
// to whoever waits for it, each kTurns; less often where those keep it so long that they must be computing as well.
constexpr auto kNews = std::chrono::milliseconds(3);
constexpr auto kTurns = std::chrono::microseconds(200), kLongTurn = 10 * kTurns, kTurnsAfterLong = 100 * kTurns;

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof word == sizeof value);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

int Worker::count() const { return apart_ ? 1 : pool_.threads(); }

int Worker::claim() {
    if (apart_) return first_++;
    if (first_ >= 0) {
        int piece = first_;
        first_ = -1;
        return piece;
    }
    return pool_.next_piece_.fetch_add(1, std::memory_order_relaxed);
}

void Worker::barrier() {
    if (apart_)
        first_ = 0;
    else
        meet();
    if (carried_) give_way();
}

void Worker::note_done() {
    carried_ = true;
    carried_until_ = std::chrono::steady_clock::now() + kNews;
}

void Worker::give_way() {
    const auto start = std::chrono::steady_clock::now();
    if (start < next_turn_) return;
    sched_yield();
    const auto end = std::chrono::steady_clock::now();
    next_turn_ = end + (end - start < kLongTurn ? kTurns : kTurnsAfterLong);
    carried_ = start < carried_until_;
}

void Worker::meet() {
    first_ = apart_ ? 0 : index;
    const int count = pool_.threads();
    const uint32_t phase = pool_.phase_.load(std::memory_order_relaxed);
    if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        pool_.arrived_.store(0, std::memory_order_relaxed);
        pool_.next_piece_.store(count, std::memory_order_relaxed);
        // In one order with what a sleeper does: either it sees the phase, or it is seen.
        pool_.phase_.store(phase + 1, std::memory_order_seq_cst);
        if (pool_.sleepers_.load(std::memory_order_seq_cst)) futex(pool_.phase_, FUTEX_WAKE_PRIVATE, INT_MAX);
        return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
        if (pool_.phase_.load(std::memory_order_acquire) != phase) return;
        pause_cpu();
    }
    pool_.sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (pool_.phase_.load(std::memory_order_seq_cst) == phase) futex(pool_.phase_, FUTEX_WAIT_PRIVATE, phase);
    pool_.sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

Pool::Pool(int threads) : next_piece_(threads) {
    threads_.reserve(size_t(threads));
    // Workers ask for the number of threads, so none may run before all are there: the first job's ticket holds them.
    for (int index = 0; index < threads; ++index) threads_.emplace_back([this, index] { work(index); });
}

Pool::~Pool() {
    stopping_.store(true, std::memory_order_relaxed);
    {
        std::lock_guard lock(submitting_);
        published_.fetch_add(1, std::memory_order_release);
        published_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
}

uint32_t Pool::submit(Job job) {
    std::lock_guard lock(submitting_);
    const uint32_t ticket = published_.load(std::memory_order_relaxed) + 1;
    if (ticket > kQueue) wait(ticket - kQueue);
    jobs_[ticket % kQueue] = std::move(job);
    published_.store(ticket, std::memory_order_release);
    published_.notify_all();
    return ticket;
}

void Pool::wait(uint32_t ticket) const {
    for (uint32_t completed = completed_.load(std::memory_order_acquire); int32_t(completed - ticket) < 0;
         completed = completed_.load(std::memory_order_acquire))
        completed_.wait(completed, std::memory_order_acquire);
}

void Pool::wait_for_job(uint32_t ticket) {
    auto there = [&] { return int32_t(published_.load(std::memory_order_acquire) - ticket) >= 0; };
    for (int spins = 0; spins < kSpins; ++spins) {
        if (there()) return;
        pause_cpu();
    }
    for (auto start = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - start < kIdle;) {
        if (there()) return;
        sched_yield();
    }
    for (uint32_t seen = published_.load(std::memory_order_acquire); int32_t(seen - ticket) < 0;
         seen = published_.load(std::memory_order_acquire))
        published_.wait(seen, std::memory_order_acquire);
}

void Pool::work(int index) {
    Worker worker(*this, index);
    for (uint32_t ticket = 1;; ++ticket) {
        wait_for_job(ticket);
        // The destructor publishes one ticket more than there are jobs.
        if (stopping_.load(std::memory_order_relaxed) && ticket == published_.load(std::memory_order_acquire)) return;
        Job& job = jobs_[ticket % kQueue];
        job(worker);
        worker.meet();
        worker.note_done();
        if (index == 0) {
            job = nullptr;
            completed_.store(ticket, std::memory_order_release);
            completed_.notify_all();
            const uint64_t one = 1;
            const int bell = bell_.load(std::memory_order_relaxed);
            // A full counter cannot be added to, and is as good as one more.
            if (bell >= 0 && write(bell, &one, sizeof one) < 0) continue;
        }
    }
}

}  // namespace headrace
