// The kernels of one instruction set, as a table of functions on plain memory.
//
// Every file that defines kernels is compiled with its own flags, so nothing in it may be an inline function that
// another file defines too: the linker would keep one of the two, and perhaps the one that this processor lacks. Hence
// plain structs here, and everything else in those files in unnamed namespaces.
#pragma once

#include <cstdint>
#include <string>

#include "formats/matrix.h"
#include "formats/sparse.h"

namespace fettle {

// Rows of a matrix product: tiles first … last-1 of the weight, all tokens; out [tokens][stride].
struct Span {
  int first = 0;
  int last = 0;
};

// How a sequence's keys and values lie in one layer; see decoder/cache.h.
struct CacheLayer {
  void* keys = nullptr;    // [pages][kv_heads][head_size][page_size]
  void* values = nullptr;  // [pages][kv_heads][page_size][head_size]
  Number type = Number::float32;
  int kv_heads = 0, head_size = 0, page_size = 0;
  float *key_scales = nullptr, *value_scales = nullptr;  // of int8 [pages][kv_heads][page_size]; value = code · scale
};

// Query heads that share keys and values, of one token or several that follow each other.
struct AttentionQueries {
  const float* queries = nullptr;  // [rows], each head_size, `row_strides` apart as below
  float* out = nullptr;            // laid out as the queries
  int tokens = 0, heads = 0;       // rows are tokens × heads
  int64_t token_stride = 0;        // floats between the same head of two tokens; heads lie head_size apart
  int position = 0;                // of the first token
  const int32_t* pages = nullptr;  // of the sequence
  int kv_head = 0;
  int window = 0;                  // keys that a query sees, its own among them; 0: all
  float scale = 1, soft_cap = 0;   // soft_cap 0: none
};

// Where quantized inputs go; see QuantizedInputs.
struct InputBuffers {
  int8_t* codes = nullptr;
  float* scales = nullptr;
  float* sums = nullptr;
  int32_t* pairs = nullptr;
};

enum class Gate : int { silu, gelu_tanh, gelu_erf, relu };

// The portable kernels of pruned weights, for instruction sets that have none of their own.
void portable_sparse_integer(const SparseMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride);
void portable_sparse_float(const SparseMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride);
void portable_sparse_values(const SparseValues& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride);
void portable_sparse_row(const SparseMatrix& weight, int row, float* out);
void portable_sparse_values_row(const SparseValues& weight, int row, float* out);

struct Kernels {
  const char* name;

  // inputs [tokens][cut.columns] → what `to` points to, for tokens first … last-1
  void (*quantize_inputs)(const float* inputs, const Cut& cut, int first, int last, const InputBuffers& to);
  void (*coded_integer)(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride);
  void (*coded_float)(const CodedMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride);
  void (*dense)(const DenseMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride);
  void (*coded_row)(const CodedMatrix& weight, int row, float* out);  // one row's values [columns]
  void (*dense_row)(const DenseMatrix& weight, int row, float* out);

  // x · weight / sqrt(mean(x²) + eps), and with the mean taken off and a bias; out may be x
  void (*rms_norm)(const float* x, const float* weight, float eps, int size, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int size, float* out);
  // pairs (i, i + size/2) of each head's first `size` numbers turn by the angle whose cosine and sine [size/2] are given
  void (*rotate)(float* heads, int count, int64_t head_stride, int size, const float* cosine, const float* sine);
  void (*activate)(Gate gate, float* x, const float* times, int size);  // x = gate(x) · times; times may be null
  void (*soft_cap)(float* x, float cap, int64_t size);                  // x = cap · tanh(x / cap)
  void (*attend)(const CacheLayer& cache, const AttentionQueries& queries, float* scratch);
  // What the machine can do at best: reads `bytes` (a multiple of 256) and returns something that depends on them; does
  // `rounds` of the multiply-adds of bytes that integer products are made of and returns their number.
  uint64_t (*read_bytes)(const uint8_t* from, int64_t bytes);
  int64_t (*multiply_adds)(int64_t rounds);
  void (*store_keys_values)(const CacheLayer& cache, int page, int slot, const float* keys, const float* values);

  // As coded_integer, coded_float and dense, of pruned weights; a table that says nothing has the portable ones.
  decltype(&portable_sparse_integer) sparse_integer = portable_sparse_integer;
  decltype(&portable_sparse_float) sparse_float = portable_sparse_float;
  decltype(&portable_sparse_values) sparse_values = portable_sparse_values;
  decltype(&portable_sparse_row) sparse_row = portable_sparse_row;
  decltype(&portable_sparse_values_row) sparse_values_row = portable_sparse_values_row;
};

// How many neighbouring pages attention scores together, 1 … kSpanPages: their keys and values stay in the first-level cache.
constexpr int kSpanPages = 64;
int span_pages(const CacheLayer& cache);

// Floats of scratch that `attend` needs.
int64_t attention_scratch(const CacheLayer& cache, int tokens, int heads);

const Kernels& portable_kernels();
const Kernels& avx2_kernels();         // where FETTLE_HAS_AVX2
const Kernels& avx512_vnni_kernels();  // where FETTLE_HAS_AVX512
const Kernels& neon_dot_kernels();     // where FETTLE_HAS_NEON

// The kernels of a name of available_instructions(), or the best for "". Throws std::invalid_argument for what is not there.
const Kernels& find_kernels(const std::string& name);

}  // namespace fettle
