#include "decoder/cache.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <stdexcept>

namespace fettle {

PagedCache::PagedCache(const Shape& shape) : shape_(shape) {
  if (shape.layers < 1 || shape.pages < 1 || shape.page_size < 1 || shape.kv_heads < 1 || shape.head_size < 1)
    throw std::invalid_argument("a cache has at least one layer, page, position, head and number");
  bytes_ = static_cast<size_t>(page_bytes()) * static_cast<size_t>(shape.pages) + sizeof(float);
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
}

PagedCache::~PagedCache() { munmap(memory_, bytes_); }

size_t PagedCache::slab_bytes() const {
  return static_cast<size_t>(shape_.kv_heads) * shape_.head_size * shape_.page_size * number_bytes(shape_.type);
}

size_t PagedCache::scale_floats() const {
  return shape_.type == Number::int8 ? static_cast<size_t>(shape_.kv_heads) * shape_.page_size : 0;
}

float* PagedCache::scales(size_t part) const {
  const size_t pages = static_cast<size_t>(shape_.pages), codes = slab_bytes() * 2 * static_cast<size_t>(shape_.layers) * pages;
  return reinterpret_cast<float*>(memory_ + (codes + 3) / 4 * 4) + part * pages * scale_floats();
}

int64_t PagedCache::page_bytes() const {
  return static_cast<int64_t>(slab_bytes() + scale_floats() * sizeof(float)) * 2 * shape_.layers;
}

CacheLayer PagedCache::layer(int index) const {
  const size_t half = slab_bytes() * static_cast<size_t>(shape_.pages);
  CacheLayer layer;
  layer.keys = memory_ + 2 * half * static_cast<size_t>(index);
  layer.values = memory_ + 2 * half * static_cast<size_t>(index) + half;
  layer.type = shape_.type;
  layer.kv_heads = shape_.kv_heads;
  layer.head_size = shape_.head_size;
  layer.page_size = shape_.page_size;
  if (shape_.type == Number::int8) {
    layer.key_scales = scales(2 * static_cast<size_t>(index));
    layer.value_scales = scales(2 * static_cast<size_t>(index) + 1);
  }
  return layer;
}

void PagedCache::copy_page(int from, int to) {
  if (from == to) return;
  const size_t slab = slab_bytes(), floats = scale_floats();
  for (size_t part = 0; part < 2 * static_cast<size_t>(shape_.layers); ++part) {
    uint8_t* pages = memory_ + part * slab * static_cast<size_t>(shape_.pages);
    std::memcpy(pages + slab * static_cast<size_t>(to), pages + slab * static_cast<size_t>(from), slab);
    if (floats == 0) continue;
    float* own = scales(part);
    std::memcpy(own + floats * static_cast<size_t>(to), own + floats * static_cast<size_t>(from), floats * sizeof(float));
  }
}

}  // namespace fettle
