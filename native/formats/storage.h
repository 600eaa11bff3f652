// Memory that starts on a cache line and ends with room for a register more, set to zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fettle {

// How memory goes back.
struct FreeMemory {
  explicit FreeMemory(size_t bytes = 0) : mapped(bytes) {}
  void operator()(uint8_t* memory) const {
#if defined(__linux__)
    if (mapped > 0) {
      munmap(memory, mapped);
      return;
    }
#endif
    std::free(memory);
  }
  size_t mapped;  // bytes, of what came from the system
};

class Storage {
 public:
  Storage() = default;
  explicit Storage(size_t bytes) : size_(bytes) {
    const size_t whole = (bytes + 64 + 63) / 64 * 64;
#if defined(__linux__)
    if (whole >= kHugePage) {
      map(whole);
      return;
    }
#endif
    void* memory = std::aligned_alloc(64, whole);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, whole);
    memory_ = Memory(static_cast<uint8_t*>(memory), FreeMemory(0));
  }

  uint8_t* data() { return memory_.get(); }
  const uint8_t* data() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20, kPage = size_t{1} << 16;  // a page is at most that large

  using Memory = std::unique_ptr<uint8_t, FreeMemory>;

#if defined(__linux__)
  // Zero pages from the system, which the threads that fill them touch first; large pages where it has them, since a
  // product goes through all of the memory and each page of 4 kB costs a look-up.
  void map(size_t whole) {
    const size_t kept = (whole + kPage - 1) / kPage * kPage, mapped = kept + kHugePage;
    void* room = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = reinterpret_cast<uintptr_t>(room), aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(room, aligned - start);
    if (start + mapped > aligned + kept) munmap(reinterpret_cast<void*>(aligned + kept), start + mapped - aligned - kept);
    uint8_t* memory = reinterpret_cast<uint8_t*>(aligned);
    madvise(memory, kept, MADV_HUGEPAGE);
    memory_ = Memory(memory, FreeMemory(kept));
  }
#endif

  Memory memory_;
  size_t size_ = 0;
};

}  // namespace fettle
