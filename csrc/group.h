// Ranks that hold a model between them (tensor parallelism), and what they give each other.
//
// Each rank has an area of memory, all of one layout: rooms for partial sums, logits, best logits and tokens. A rank writes into its own
// area and posts: an event, which gives some of its bytes to all ranks. Events are numbered from 1 on, and every rank has the same ones in
// the same order; waiting for an event means that all ranks have posted it.
//
// No rank ever says that it has read something. At most kOpen reductions are under way, the one whose partial sums are being made included:
// so who makes those of reduction n has seen all ranks post n - kOpen, and they were done with n - 2 * kOpen before that. Hence twice as
// many buffers. Every other room is written again only after a later event of the same ranks. Where a step's rows are worked on in halves,
// this holds for each half: its events are its own, and so are its rows of a buffer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "elementwise.h"
#include "memory.h"

namespace headrace {

// What a group can hold of a step: rows and width of partial sums; rows of logits, and the columns of the rank that has most of them.
struct GroupSizes {
    int64_t ranks, rows, width, logits, columns;

    bool operator==(const GroupSizes&) const = default;
};

// Places in a rank's area, in bytes. src/headrace/parallel/group.py has the same.
struct GroupLayout {
    static constexpr int buffers = 4;
    size_t buffer_bytes, logits, best, tokens, bytes;

    explicit GroupLayout(const GroupSizes& sizes);
    size_t partial(int buffer) const { return size_t(buffer) * buffer_bytes; }
};

class Group {
  public:
    static constexpr int kOpen = GroupLayout::buffers / 2;

    Group(int rank, const GroupSizes& sizes);
    virtual ~Group() = default;
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    int ranks() const { return int(sizes.ranks); }
    virtual uint8_t* area(int rank) const = 0;
    float* partial(int rank, int buffer) const { return (float*)(area(rank) + layout.partial(buffer)); }
    float* logits(int rank, int row) const { return (float*)(area(rank) + layout.logits) + size_t(row) * size_t(sizes.columns); }
    Best* best(int rank) const { return (Best*)(area(rank) + layout.best); }
    int32_t* tokens(int rank) const { return (int32_t*)(area(rank) + layout.tokens); }

    // The next event: gives bytes [at, at + size) of this rank's area to all ranks. Of one thread at a time.
    virtual void post(size_t at, size_t size) = 0;
    // Waits for an event, this rank's part of it included, on any thread. False where the group was aborted.
    virtual bool wait(uint64_t number) = 0;
    // Whether this rank has posted anything.
    virtual bool used() const = 0;
    virtual void abort() = 0;
    virtual bool aborted() const = 0;
    // Why, where that is known.
    virtual std::string failure() const { return {}; }

    const int rank;
    const GroupSizes sizes;
    const GroupLayout layout;
    bool taken = false;  // by a program: its buffers follow that program's steps

  protected:
    // Spins, then yields, then naps until ready() or the group is aborted: the threads of all ranks may be more than the cores.
    bool until(const std::function<bool()>& ready) const;
};

// Ranks of one host, over a file in memory that group.py has made.
class SharedGroup : public Group {
  public:
    // Maps the file; throws std::invalid_argument where its header does not fit its size or the rank.
    static std::shared_ptr<SharedGroup> open(int descriptor, int rank);
    ~SharedGroup() override;

    uint8_t* area(int rank) const override { return data_ + first_area_ + size_t(rank) * layout.bytes; }
    void post(size_t at, size_t size) override;
    bool wait(uint64_t number) override;
    bool used() const override { return posted(rank).load(std::memory_order_relaxed) > 0; }
    void abort() override { word(kAbortAt).store(1, std::memory_order_release); }
    bool aborted() const override { return word(kAbortAt).load(std::memory_order_acquire) != 0; }

  private:
    static constexpr size_t kAbortAt = 64, kLine = 128;  // bytes between the words that different ranks write

    SharedGroup(int rank, const GroupSizes& sizes, uint8_t* data, size_t bytes);
    std::atomic<uint64_t>& word(size_t at) const { return *(std::atomic<uint64_t>*)(data_ + at); }
    // How many events a rank has posted.
    std::atomic<uint64_t>& posted(int rank) const { return word(kLine * size_t(rank + 1)); }

    uint8_t* const data_;
    const size_t bytes_, first_area_;
};

// Ranks anywhere: what is posted is sent to each, by functions that are called on one thread, the events in order.
class ChannelGroup : public Group {
  public:
    // Both throw std::exception where they fail, which aborts the group. `receive` fills the bytes of one other rank's event.
    using Send = std::function<void(uint64_t number, const uint8_t* bytes, size_t size)>;
    using Receive = std::function<void(int rank, uint64_t number, uint8_t* bytes, size_t size)>;

    ChannelGroup(int rank, const GroupSizes& sizes, Send send, Receive receive);

    uint8_t* area(int rank) const override { return memory_.data() + size_t(rank) * layout.bytes; }
    void post(size_t at, size_t size) override;
    bool wait(uint64_t number) override;
    bool used() const override { return posted_.load(std::memory_order_relaxed) > 0; }
    void abort() override { aborted_.store(true, std::memory_order_release); }
    bool aborted() const override { return aborted_.load(std::memory_order_acquire); }
    std::string failure() const override { return failure_; }

  private:
    void guarded(const std::function<void()>& call);

    Memory memory_;
    const Send send_;
    const Receive receive_;
    struct Event {
        size_t at, size;
    };
    Event events_[2 * GroupLayout::buffers];  // of event n at n % their number
    std::atomic<uint64_t> posted_{0}, received_{0};
    std::atomic_flag receiving_;
    std::atomic<bool> aborted_{false};
    std::string failure_;
};

}  // namespace headrace
