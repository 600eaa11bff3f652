// The paged key-value cache: every layer has `pages` pages of `page_size` positions; who uses which page is Python's
// business (engine/). Memory is reserved at once and touched page by page, so unused pages cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/kernels.h"

namespace fettle {

class PagedCache {
 public:
  struct Shape {
    int layers = 0, pages = 0, page_size = 0, kv_heads = 0, head_size = 0;
    Number type = Number::float32;
  };

  // Throws std::invalid_argument for a size below 1, std::bad_alloc where memory does not suffice.
  explicit PagedCache(const Shape& shape);
  ~PagedCache();
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  CacheLayer layer(int index) const;
  void copy_page(int from, int to);
  int64_t page_bytes() const;  // keys and values of one page, all layers
  const Shape& shape() const { return shape_; }

 private:
  size_t slab_bytes() const;     // keys or values of one page of one layer
  size_t scale_floats() const;   // of a slab: one a position and head with int8, else none
  float* scales(size_t part) const;  // of keys (even) or values (odd) of a layer, [pages][scale_floats]

  Shape shape_;
  uint8_t* memory_ = nullptr;  // [layers][keys, values][pages][slab], then scales in the same order
  size_t bytes_ = 0;
};

}  // namespace fettle
