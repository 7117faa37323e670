#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <ctime>

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
// Where a thread may come late: from sleep, which takes tens of microseconds where cores are virtual, or from work apart from the others.
constexpr int kSpinsOfLate = 4096;
// Waiting between jobs: longer than the host needs between two steps, short enough not to burn an idle machine.
constexpr auto kIdle = std::chrono::microseconds(200);
// What a job gave goes on through other threads: host, server, client. For the scheduler, one of them that another preempted has had its
// share, and waits for the clock's next tick (4 ms) behind a thread that computes. So for kNews the threads that compute leave their core
// to whoever waits for it, each kTurns; less often where those keep it so long that they must be computing as well.
constexpr auto kNews = std::chrono::milliseconds(3);
constexpr auto kTurns = std::chrono::microseconds(200), kLongTurn = 10 * kTurns, kTurnsAfterLong = 100 * kTurns;

// A line from one core to another, and what a read of the clock adds, take 50 to 80 ns where a cache serves both, 220 to 280 where none does.
constexpr auto kLate = std::chrono::nanoseconds(150);
constexpr int kJobsOfDistance = 16;

// How long the first thread stays away, at most.
constexpr auto kAway = std::chrono::milliseconds(2);

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout = nullptr) {
    static_assert(sizeof word == sizeof value);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

// The cores that this thread may use; none where the system does not tell.
std::vector<int> cores() {
    cpu_set_t set;
    std::vector<int> found;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return found;
    for (int core = 0; core < CPU_SETSIZE; ++core)
        if (CPU_ISSET(core, &set)) found.push_back(core);
    return found;
}

}  // namespace

template <class F>
bool Pool::Gate::pass(int threads, int spins, F last) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        arrived_.store(0, std::memory_order_relaxed);
        last();
        // In one order with what a sleeper does: either it sees the phase, or it is seen.
        phase_.store(phase + 1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst)) futex(phase_, FUTEX_WAKE_PRIVATE, INT_MAX);
        return false;
    }
    for (; spins > 0; --spins) {
        if (phase_.load(std::memory_order_acquire) != phase) return false;
        pause_cpu();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_seq_cst) == phase) futex(phase_, FUTEX_WAIT_PRIVATE, phase);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return true;
}

Worker::Worker(Pool& pool, int index) : index(index), pool_(pool), home_(pool.homes_.empty() ? -1 : pool.homes_[size_t(index)]), first_(index) {}

int Worker::count() const { return team_ == Team::all ? pool_.threads() : team_ == Team::alone ? 1 : pool_.threads() - 1; }

int Worker::claim() {
    if (apart()) return first_++;
    if (first_ >= 0) {
        int piece = first_;
        first_ = -1;
        return piece;
    }
    return pool_.next_piece_.fetch_add(1, std::memory_order_relaxed);
}

void Worker::barrier() {
    first_ = index - first_of_team();
    if (team_ == Team::all) {
        meet();
    } else if (team_ == Team::others) {
        pool_.others_.pass(count(), kSpins, [&] {  // who sleeps here does not go home: the host may be there
            pool_.next_piece_.store(count(), std::memory_order_relaxed);
            pool_.is_back_ = pool_.away_.load(std::memory_order_relaxed) == 0;
        });
    }
    if (carried_) give_way();
}

void Worker::meet() { meet(apart() ? kSpinsOfLate : kSpins); }

void Worker::meet_woken() { meet(kSpinsOfLate); }

void Worker::meet(int spins) {
    first_ = index - first_of_team();
    if (pool_.all_.pass(pool_.threads(), spins, [&] { pool_.next_piece_.store(pool_.threads(), std::memory_order_relaxed); })) go_home();
}

void Worker::go_home() const {
    if (home_ < 0 || sched_getcpu() == home_) return;
    cpu_set_t all, home;
    CPU_ZERO(&home);
    CPU_SET(home_, &home);
    if (sched_getaffinity(0, sizeof all, &all) != 0 || !CPU_ISSET(home_, &all)) return;
    if (sched_setaffinity(0, sizeof home, &home) == 0) sched_setaffinity(0, sizeof all, &all);
}

bool Worker::first_is_away() const { return pool_.begins_away_; }

bool Worker::first_is_back() const { return pool_.is_back_; }

void Worker::call_first() { pool_.rest(); }

void Worker::stay_away() {
    const auto until = std::chrono::steady_clock::now() + kAway;
    while (pool_.away_.load(std::memory_order_acquire)) {
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - std::chrono::steady_clock::now()).count();
        if (left <= 0) break;
        const timespec timeout{0, long(left)};
        futex(pool_.away_, FUTEX_WAIT_PRIVATE, 1, &timeout);
    }
    pool_.away_.store(0, std::memory_order_relaxed);
    go_home();
}

void Worker::meet_at_end(uint32_t ticket) {
    const int threads = pool_.threads();
    const bool slept = pool_.all_.pass(threads, kSpins, [&] {
        pool_.next_piece_.store(threads, std::memory_order_relaxed);
        pool_.last_ = index, pool_.last_came_ = std::chrono::steady_clock::now();
    });
    const auto seen = std::chrono::steady_clock::now(), after = std::chrono::steady_clock::now();
    first_ = index - first_of_team();
    if (slept) return go_home();
    if (threads == 1 || index != (pool_.last_ + 1 + int(ticket % uint32_t(threads - 1))) % threads) return;
    const auto took = seen - pool_.last_came_ - (after - seen);  // less one of the two reads of the clock in it
    const float late = took > kLate, before = pool_.distance_.load(std::memory_order_relaxed);
    pool_.distance_.store(before + (late - before) / kJobsOfDistance, std::memory_order_relaxed);
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

Pool::Pool(int threads) : next_piece_(threads), homes_(cores()), crowded_(threads > 1 && !homes_.empty() && size_t(threads) >= homes_.size()) {
    if (!crowded_ || size_t(threads) > homes_.size()) homes_.clear();
    threads_.reserve(size_t(threads));
    // Workers ask for the number of threads, so none may run before all are there: the first job's ticket holds them.
    for (int index = 0; index < threads; ++index) threads_.emplace_back([this, index] { work(index); });
}

void Pool::stop() {
    stopping_.store(true, std::memory_order_relaxed);
    {
        std::lock_guard lock(submitting_);
        published_.fetch_add(1, std::memory_order_release);
        published_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

uint32_t Pool::submit(Job job) {
    std::lock_guard lock(submitting_);
    const uint32_t ticket = published_.load(std::memory_order_relaxed) + 1;
    if (ticket > kQueue) wait(ticket - kQueue);
    jobs_[ticket % kQueue] = std::move(job);
    // In one order with a thread that is about to sleep: either it sees the ticket, or notify_all sees it.
    published_.store(ticket, std::memory_order_seq_cst);
    published_.notify_all();
    return ticket;
}

// After the job of this ticket the host has its hands full, if the next one is there already: with what this one gave, and then with one more.
// It hears of the job's end after this: one that says so whenever it rests never does with the first thread away.
void Pool::send_away(uint32_t ticket) {
    begins_away_ = crowded_ && published_.load(std::memory_order_relaxed) == ticket + 1;
    if (begins_away_) away_.store(1, std::memory_order_seq_cst);
}

void Pool::rest() {
    if (away_.load(std::memory_order_seq_cst) && away_.exchange(0, std::memory_order_acq_rel)) futex(away_, FUTEX_WAKE_PRIVATE, 1);
}

void Pool::wait(uint32_t ticket) {
    for (uint32_t completed = completed_.load(std::memory_order_acquire); int32_t(completed - ticket) < 0;
         completed = completed_.load(std::memory_order_acquire)) {
        rest();
        waiting_.fetch_add(1, std::memory_order_seq_cst);
        futex(completed_, FUTEX_WAIT_PRIVATE, completed);
        waiting_.fetch_sub(1, std::memory_order_relaxed);
    }
}

bool Pool::wait_for_job(uint32_t ticket) {
    auto there = [&] { return int32_t(published_.load(std::memory_order_acquire) - ticket) >= 0; };
    for (int spins = 0; spins < kSpins; ++spins) {
        if (there()) return false;
        pause_cpu();
    }
    for (auto start = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - start < kIdle;) {
        if (there()) return false;
        sched_yield();
    }
    for (uint32_t seen = published_.load(std::memory_order_acquire); int32_t(seen - ticket) < 0;
         seen = published_.load(std::memory_order_acquire))
        published_.wait(seen, std::memory_order_acquire);
    return true;
}

void Pool::work(int index) {
    Worker worker(*this, index);
    for (uint32_t ticket = 1;; ++ticket) {
        if (wait_for_job(ticket)) worker.go_home();
        // The destructor publishes one ticket more than there are jobs.
        if (stopping_.load(std::memory_order_relaxed) && ticket == published_.load(std::memory_order_acquire)) return;
        Job& job = jobs_[ticket % kQueue];
        job(worker);
        if (index == 0) send_away(ticket);
        worker.meet_at_end(ticket);
        worker.note_done();
        if (index == 0) {
            job = nullptr;
            completed_.store(ticket, std::memory_order_seq_cst);
            if (waiting_.load(std::memory_order_seq_cst)) futex(completed_, FUTEX_WAKE_PRIVATE, INT_MAX);
            const uint64_t one = 1;
            const int bell = bell_.load(std::memory_order_relaxed);
            // A full counter cannot be added to, and is as good as one more.
            if (bell >= 0 && write(bell, &one, sizeof one) < 0) continue;
        }
    }
}

}  // namespace headrace
