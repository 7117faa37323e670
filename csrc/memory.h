// Zeroed memory straight from the system: page-aligned, resident only where touched, in huge pages where it is large.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace headrace {

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

}  // namespace headrace
