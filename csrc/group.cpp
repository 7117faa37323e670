#include "group.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include <chrono>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

constexpr uint64_t kMagic = 0x3170756f72677268;  // "hrgroup1"
constexpr size_t kPage = 4096;
constexpr int64_t kMost = int64_t(1) << 24;  // of any size
constexpr int kSpins = 512;
constexpr auto kYielding = std::chrono::milliseconds(1);
constexpr long kNap = 50'000;  // ns

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

GroupLayout::GroupLayout(const GroupSizes& sizes) : buffer_bytes(rounded(size_t(sizes.rows) * size_t(sizes.width) * 4, 64)) {
    logits = partial(buffers);
    best = logits + rounded(size_t(sizes.logits) * size_t(sizes.columns) * 4, 64);
    tokens = best + rounded(size_t(sizes.logits) * sizeof(Best), 64);
    bytes = rounded(tokens + size_t(sizes.logits) * 4, kPage);
}

Group::Group(int rank, const GroupSizes& sizes) : rank(rank), sizes(sizes), layout(sizes) {}

bool Group::until(const std::function<bool()>& ready) const {
    for (int spins = 0; spins < kSpins; ++spins) {
        if (ready()) return true;
        pause_cpu();
    }
    const timespec nap{0, kNap};
    for (auto start = std::chrono::steady_clock::now(); !ready();) {
        if (aborted()) return false;
        if (std::chrono::steady_clock::now() - start < kYielding)
            sched_yield();
        else
            nanosleep(&nap, nullptr);
    }
    return true;
}

// ---- of one host

std::shared_ptr<SharedGroup> SharedGroup::open(int descriptor, int rank) {
    struct stat status;
    if (fstat(descriptor, &status) != 0) throw std::invalid_argument("the group's descriptor " + std::to_string(descriptor) + " is not open");
    const size_t bytes = size_t(status.st_size);
    if (bytes < kPage) throw std::invalid_argument("a group's file has at least " + std::to_string(kPage) + " bytes, this one " + std::to_string(bytes));
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) throw std::invalid_argument("the group's file of " + std::to_string(bytes) + " bytes cannot be mapped");
    uint64_t magic;
    GroupSizes sizes;
    std::memcpy(&magic, data, 8);
    std::memcpy(&sizes, (uint8_t*)data + 8, sizeof(sizes));
    bool fits = magic == kMagic && sizes.ranks >= 1 && sizes.ranks <= 1024 && rank >= 0 && rank < sizes.ranks;
    for (int64_t size : {sizes.rows, sizes.width, sizes.logits, sizes.columns}) fits = fits && size >= 0 && size <= kMost;
    std::shared_ptr<SharedGroup> group(new SharedGroup(rank, fits ? sizes : GroupSizes{}, (uint8_t*)data, bytes));
    if (!fits || group->first_area_ + size_t(sizes.ranks) * group->layout.bytes != bytes)
        throw std::invalid_argument("a file of " + std::to_string(bytes) + " bytes is not that of a group with a rank " + std::to_string(rank));
    return group;
}

SharedGroup::SharedGroup(int rank, const GroupSizes& sizes, uint8_t* data, size_t bytes)
    : Group(rank, sizes), data_(data), bytes_(bytes), first_area_(rounded(kLine * size_t(sizes.ranks + 1), kPage)) {}

SharedGroup::~SharedGroup() { munmap(data_, bytes_); }

void SharedGroup::post(size_t, size_t) { posted(rank).fetch_add(1, std::memory_order_release); }

bool SharedGroup::wait(uint64_t number) {
    for (int other = 0; other < ranks(); ++other)
        if (posted(other).load(std::memory_order_acquire) < number && !until([&] { return posted(other).load(std::memory_order_acquire) >= number; })) return false;
    return true;
}

// ---- of several

ChannelGroup::ChannelGroup(int rank, const GroupSizes& sizes, Send send, Receive receive)
    : Group(rank, sizes), memory_(size_t(sizes.ranks) * layout.bytes), send_(std::move(send)), receive_(std::move(receive)) {}

void ChannelGroup::guarded(const std::function<void()>& call) {
    try {
        if (!aborted()) call();
    } catch (const std::exception& error) {
        if (failure_.empty()) failure_ = error.what();
        abort();
    }
}

void ChannelGroup::post(size_t at, size_t size) {
    const uint64_t number = posted_.load(std::memory_order_relaxed) + 1;
    events_[number % std::size(events_)] = {at, size};
    guarded([&] { send_(number, area(rank) + at, size); });
    posted_.store(number, std::memory_order_release);
}

// The first thread to come receives, event after event; the others wait for it.
bool ChannelGroup::wait(uint64_t number) {
    while (received_.load(std::memory_order_acquire) < number) {
        if (aborted() || !until([&] { return posted_.load(std::memory_order_acquire) >= number; })) return false;
        if (receiving_.test_and_set(std::memory_order_acquire)) {
            until([&] { return received_.load(std::memory_order_acquire) >= number || !receiving_.test(std::memory_order_acquire); });
            continue;
        }
        const uint64_t next = received_.load(std::memory_order_relaxed) + 1;
        const Event event = events_[next % std::size(events_)];
        if (next <= number)
            for (int other = 0; other < ranks(); ++other)
                if (other != rank) guarded([&] { receive_(other, next, area(other) + event.at, event.size); });
        if (next <= number && !aborted()) received_.store(next, std::memory_order_release);
        receiving_.clear(std::memory_order_release);
    }
    return true;
}

}  // namespace headrace
