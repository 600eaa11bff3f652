// A decoder as a table: what each block holds, and one step of all of them for a batch of sequences.
//
// There is one path through a block, and the table says what is absent: no norm, no gate, no rotary positions. A new
// family is a new table, made in Python; nothing here asks what a model is called.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/threads.h"
#include "decoder/cache.h"
#include "ops/matmul.h"

namespace fettle {

struct Norm {
  enum class Kind : int { none, rms, layer };
  Kind kind = Kind::none;
  std::vector<float> weight, bias;
  float eps = 0;
};

struct Linear {
  std::shared_ptr<Matrix> matrix;  // null: absent
  std::vector<float> bias;         // empty: none
};

struct Mlp {
  Linear gate, up, down;  // without a gate: down(act(up(x))); with one: down(act(gate(x)) · up(x))
};

struct Block {
  Norm attention_norm, query_norm, key_norm, after_attention_norm, mlp_norm, after_mlp_norm;
  Linear query, key, value, output;
  float attention_scale = 1, attention_cap = 0;
  int window = 0;
  int rotary = -1;              // which of the decoder's tables; -1: none
  bool parallel = false;        // attention and MLP read the same residual
  Gate activation = Gate::silu;
  Mlp mlp;                      // of a block without experts
  Linear router;
  std::vector<Mlp> experts;
  int experts_per_token = 0;
  bool renormalize = false;     // the chosen experts' shares sum to 1
};

// Angles by position: position · frequencies[i], cosine and sine multiplied by `factor`.
struct Rotary {
  std::vector<float> frequencies, long_frequencies;  // long: for sequences known to be longer than the switch
  float factor = 1, long_factor = 1;
};

struct Architecture {
  int hidden = 0, heads = 0, kv_heads = 0, head_size = 0, vocabulary = 0, context = 0;
  int rotary_switch = 0;  // 0: never the long frequencies
  float embedding_scale = 1, logit_cap = 0;
  std::vector<Rotary> rotaries;
  std::shared_ptr<Matrix> embedding, positions, head;  // positions: learned ones, or null
  std::vector<float> head_bias;
  Norm last_norm;
  std::vector<Block> blocks;
};

// The tokens of a step; the same fields as Python's Batch (engine/runner.py).
struct Batch {
  int sequences = 0, tokens = 0, page_columns = 0, logits = 0, copies = 0;
  const int32_t *token_ids = nullptr, *positions = nullptr, *query_starts = nullptr, *known_lengths = nullptr;
  const int32_t *page_table = nullptr, *logit_rows = nullptr, *copy_pairs = nullptr;
};

class Decoder {
 public:
  // integer: coded matrices read their inputs in bytes; otherwise in float32.
  Decoder(Architecture architecture, const PagedCache::Shape& cache, std::shared_ptr<ThreadPool> pool, bool integer,
          const Kernels& kernels);

  // logits [batch.logits][vocabulary]. Throws std::invalid_argument for ids, positions or pages that cannot be.
  void step(const Batch& batch, float* logits);

  const PagedCache& cache() const { return cache_; }
  int64_t weight_bytes() const;
  int vocabulary() const { return arch_.vocabulary; }

 private:
  void check(const Batch& batch) const;
  void embed(const Batch& batch);
  void turn_table(const Batch& batch);
  void attention(const Block& block, int index, const Batch& batch, const float* from);
  void positions_and_cache(const Block& block, int index, const Batch& batch);
  void attend(const Block& block, int index, const Batch& batch);
  void feed_forward(const Block& block, int tokens, const float* from);
  void dense_mlp(const Block& block, const Mlp& mlp, const float* from, int tokens, float* out);
  void mixture(const Block& block, const float* from, int tokens, float* out);
  void apply(const Norm& norm, const float* from, int tokens, float* to);
  void add_bias(const Linear& linear, int tokens, float* out);
  void add_to_residual(const float* what, int tokens);
  void write_logits(const Batch& batch, float* logits);

  Architecture arch_;
  PagedCache cache_;
  std::shared_ptr<ThreadPool> shared_pool_;
  ThreadPool& pool_;
  bool integer_;
  const Kernels& kernels_;

  // Activations of a step [tokens][…], kept between steps.
  std::vector<float> residual_, normed_, query_, key_, value_, mixed_, update_, gate_, up_;
  std::vector<float> cosine_, sine_;  // [rotaries][tokens][half]
  std::vector<int64_t> turn_start_;
  std::vector<int32_t> sequence_of_;  // of a token
  Inputs inputs_;
};

}  // namespace fettle
