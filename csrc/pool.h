// One pool of compute threads for a process. Jobs queue, and run one after the other on all of its threads at once.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

class Pool;

struct Range {
    int first = 0, past = 0;

    int count() const { return past - first; }
};

// Who shares out pieces with whom: all threads; nobody, each thread taking all pieces itself; or all but the first, which is away.
enum class Team : uint8_t { all, alone, others };

// A thread's part in a job. A job is a series of phases; in a phase a team shares out pieces, and a barrier ends it. For a while the threads
// may also work apart, waiting for nobody. Or, where no core is left for the host, the first stays away at the job's start, until the host has
// made use of what the job before gave and rests: it would take a core anyway, from a thread for which the others then wait.
class Worker {
  public:
    Worker(Pool& pool, int index);

    const int index;
    Range rows;    // of a step, that its team works on
    Range logits;  // all logit rows: on them the threads work together
    int half = 0;  // of the step's rows, where they are worked on in halves

    bool apart() const { return team_ == Team::alone; }
    // Every thread must do so at the same place, after a meeting. The others begin with a barrier.
    void join(Team team) { team_ = team, first_ = index - first_of_team(); }
    // Threads in its team, and the first of them.
    int count() const;
    int first_of_team() const { return team_ == Team::all ? 0 : team_ == Team::alone ? index : 1; }

    // The next piece of this phase that nobody in the team has taken, or a number >= pieces. Ends at the barrier.
    int claim();
    // Waits until every thread of the team is here; what they wrote before it is seen after it.
    void barrier();
    // The same for every thread of the pool.
    void meet();
    // The same where one of them may just have been woken.
    void meet_woken();

    // Whether the first thread begins this job away; the same for all.
    bool first_is_away() const;
    // The first thread: returns when the host rests, or somebody calls, or it has been away for long.
    void stay_away();
    // The others: whether the first was back when the last of them came to the barrier.
    bool first_is_back() const;
    void call_first();

  private:
    friend class Pool;
    // The meeting at a job's end. One of those that wait for the last notes whether they heard of it late.
    void meet_at_end(uint32_t ticket);
    // A job was done, of which other threads now carry the news on.
    void note_done();
    void give_way();
    void meet(int spins);
    // After a sleep: the system often wakes a thread on the core of the one that wakes it, which computes, and leaves it there for milliseconds.
    void go_home() const;

    Pool& pool_;
    const int home_;  // its own core, where there is one for each thread and no more; else -1
    // The first piece of a phase is the thread's own number in its team, so that it costs no atomic; -1 once taken. Apart, the next piece.
    int first_;
    Team team_ = Team::all;
    // While the news of the job before is on its way: until when, and when to leave the core to it next.
    bool carried_ = false;
    std::chrono::steady_clock::time_point carried_until_, next_turn_;
};

class Pool {
  public:
    using Job = std::function<void(Worker&)>;  // must not throw, and must reach the same barriers on every thread

    explicit Pool(int threads);
    ~Pool() { stop(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Ends the threads, once what is queued is done; from then on no job may be submitted.
    void stop();

    int threads() const { return int(threads_.size()); }

    // Queues a job and returns its ticket; waits where kQueue jobs are queued already.
    uint32_t submit(Job job);
    bool done(uint32_t ticket) const { return int32_t(completed_.load(std::memory_order_acquire) - ticket) >= 0; }
    void wait(uint32_t ticket);
    // The host has nothing to do until a job is done, so that the first thread may come back. wait() says so itself.
    void rest();
    void run(Job job) { wait(submit(std::move(job))); }
    // From now on adds one to this eventfd when a job is done: for hosts that wait for other things too.
    void ring(int eventfd) { bell_.store(eventfd, std::memory_order_relaxed); }
    // Of the last jobs that a thread waited for the end of, the share where it heard of it late: cores share no cache, or others want them.
    float distance() const { return given_distance_ >= 0 ? given_distance_ : distance_.load(std::memory_order_relaxed); }
    void set_distance(float share) { given_distance_ = share; }  // for tests: from now on it is this

  private:
    friend class Worker;
    static constexpr uint32_t kQueue = 64;

    // A place where a number of threads wait for each other.
    class Gate {
      public:
        // Looks `spins` times before it sleeps. The last to come calls `last`. Returns whether it slept.
        template <class F>
        bool pass(int threads, int spins, F last);

      private:
        alignas(64) std::atomic<int> arrived_{0};
        alignas(64) std::atomic<uint32_t> phase_{0};
        std::atomic<int> sleepers_{0};  // that wait without spinning
    };

    void work(int index);
    bool wait_for_job(uint32_t ticket);  // true: it may have slept
    void send_away(uint32_t ticket);

    std::mutex submitting_;
    std::array<Job, kQueue> jobs_;                   // job of ticket t at t % kQueue
    alignas(64) std::atomic<uint32_t> published_{0};  // tickets count from 1
    alignas(64) std::atomic<uint32_t> completed_{0};
    std::atomic<int> waiting_{0};  // for completed_
    Gate all_, others_;
    alignas(64) std::atomic<int> next_piece_{0};
    alignas(64) std::atomic<uint32_t> away_{0};  // 1: the first thread is, or may be in the next job
    bool begins_away_ = false;                   // of the job that runs; written before it, by the first thread
    bool is_back_ = false;                       // written by the last of the others at their gate
    int last_ = 0;                               // who came last to a job's end, and when
    std::chrono::steady_clock::time_point last_came_;
    std::atomic<float> distance_{0};
    float given_distance_ = -1;                  // the host's
    std::vector<int> homes_;                     // cores, where there is one for each thread and no more; else empty
    const bool crowded_;                         // no core is left for the host
    std::atomic<bool> stopping_{false};
    std::atomic<int> bell_{-1};
    std::vector<std::thread> threads_;
};

}  // namespace headrace
