// Zeroed memory straight from the system: resident only where touched, in huge pages where it is large.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

namespace headrace {

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

class Memory {
  public:
    explicit Memory(size_t bytes) : bytes_(bytes ? bytes : 1) {
        void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(data);
#if defined(MADV_HUGEPAGE)
        if (bytes_ >= kHuge) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    }
    ~Memory() { munmap(data_, bytes_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    static constexpr size_t kHuge = size_t(4) << 20;
    uint8_t* data_;
    size_t bytes_;
};

// Large memories, handed out in parts of any size: one page after the other is read faster, and found faster, in huge pages. A part keeps
// its whole memory.
class Arena {
  public:
    struct Part {
        std::shared_ptr<Memory> memory;
        uint8_t* data;  // aligned to 64 bytes
    };

    Part take(size_t bytes) {
        const size_t size = aligned(bytes);
        std::lock_guard lock(taking_);
        if (!memory_ || size > memory_->bytes() - used_) memory_ = std::make_shared<Memory>(size > kBytes ? size : kBytes), used_ = 0;
        used_ += size;
        return {memory_, memory_->data() + used_ - size};
    }

  private:
    static constexpr size_t kBytes = size_t(64) << 20;
    std::mutex taking_;
    std::shared_ptr<Memory> memory_;
    size_t used_ = 0;
};

}  // namespace headrace
