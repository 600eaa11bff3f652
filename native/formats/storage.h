// Memory that starts on a cache line and ends with room for a register more, set to zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fettle {

class Storage {
 public:
  Storage() = default;
  explicit Storage(size_t bytes) : size_(bytes) {
    const size_t whole = (bytes + 64 + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, whole);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, whole);
    memory_.reset(static_cast<uint8_t*>(memory));
  }

  uint8_t* data() { return memory_.get(); }
  const uint8_t* data() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0;
};

}  // namespace fettle
