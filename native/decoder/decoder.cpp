#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fettle {
namespace {

constexpr int kQueryTokens = 8;  // neighbouring tokens that read a page of the cache together

float* sized(std::vector<float>& memory, int64_t floats) {
  if (memory.size() < static_cast<size_t>(floats)) memory.resize(static_cast<size_t>(floats));
  return memory.data();
}

int64_t bytes_of(const std::shared_ptr<Matrix>& matrix) { return matrix ? static_cast<int64_t>(matrix->bytes()) : 0; }

int64_t bytes_of(const Mlp& mlp) { return bytes_of(mlp.gate.matrix) + bytes_of(mlp.up.matrix) + bytes_of(mlp.down.matrix); }

}  // namespace

Decoder::Decoder(Architecture architecture, const PagedCache::Shape& cache, std::shared_ptr<ThreadPool> pool, bool integer,
                 const Kernels& kernels)
    : arch_(std::move(architecture)),
      cache_(cache),
      shared_pool_(std::move(pool)),
      pool_(*shared_pool_),
      integer_(integer),
      kernels_(kernels) {}

int64_t Decoder::weight_bytes() const {
  int64_t total = bytes_of(arch_.embedding);
  if (arch_.head != arch_.embedding) total += bytes_of(arch_.head);
  for (const Block& block : arch_.blocks) {
    for (const Linear* linear : {&block.query, &block.key, &block.value, &block.output, &block.router})
      total += bytes_of(linear->matrix);
    total += bytes_of(block.mlp);
    for (const Mlp& expert : block.experts) total += bytes_of(expert);
  }
  return total;
}

void Decoder::step(const Batch& batch, float* logits) {
  check(batch);
  for (int i = 0; i < batch.copies; ++i) cache_.copy_page(batch.copy_pairs[2 * i], batch.copy_pairs[2 * i + 1]);
  if (batch.tokens == 0) return;
  sequence_of_.resize(static_cast<size_t>(batch.tokens));
  for (int s = 0; s < batch.sequences; ++s)
    for (int t = batch.query_starts[s]; t < batch.query_starts[s + 1]; ++t) sequence_of_[t] = s;
  embed(batch);
  turn_table(batch);
  const int64_t floats = static_cast<int64_t>(batch.tokens) * arch_.hidden;
  for (size_t i = 0; i < arch_.blocks.size(); ++i) {
    const Block& block = arch_.blocks[i];
    float* normed = sized(normed_, 2 * floats);
    apply(block.attention_norm, residual_.data(), batch.tokens, normed);
    const float* mlp_reads = normed;
    if (block.parallel) {  // before attention changes the residual
      mlp_reads = normed + floats;
      apply(block.mlp_norm, residual_.data(), batch.tokens, normed + floats);
    }
    attention(block, static_cast<int>(i), batch, normed);
    if (!block.parallel) apply(block.mlp_norm, residual_.data(), batch.tokens, normed);
    feed_forward(block, batch.tokens, mlp_reads);
  }
  write_logits(batch, logits);
}

void Decoder::check(const Batch& batch) const {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  const PagedCache::Shape& shape = cache_.shape();
  for (int i = 0; i < 2 * batch.copies; ++i)
    if (batch.copy_pairs[i] < 0 || batch.copy_pairs[i] >= shape.pages)
      refuse("copies name page " + std::to_string(batch.copy_pairs[i]) + " of " + std::to_string(shape.pages));
  if (batch.query_starts[0] != 0 || batch.query_starts[batch.sequences] != batch.tokens)
    refuse("query_starts must go from 0 to the number of tokens");
  for (int s = 0; s < batch.sequences; ++s) {
    const int first = batch.query_starts[s], last = batch.query_starts[s + 1];
    if (first >= last) refuse("a sequence of a step has at least one token");
    for (int t = first; t < last; ++t) {
      const int position = batch.positions[t], page = position / shape.page_size;
      if (position < 0 || position != batch.positions[first] + t - first) refuse("positions must count up from 0 or more");
      if (arch_.context > 0 && position >= arch_.context)
        refuse("position " + std::to_string(position) + " is outside the context of " + std::to_string(arch_.context));
      if (page >= batch.page_columns) refuse("the page table has no column for position " + std::to_string(position));
      if (batch.token_ids[t] < 0 || batch.token_ids[t] >= arch_.vocabulary)
        refuse("token id " + std::to_string(batch.token_ids[t]) + " is outside the vocabulary");
    }
    for (int page = 0; page <= batch.positions[last - 1] / shape.page_size; ++page) {
      const int number = batch.page_table[static_cast<int64_t>(s) * batch.page_columns + page];
      if (number < 0 || number >= shape.pages)
        refuse("page " + std::to_string(number) + " is none of the " + std::to_string(shape.pages));
    }
  }
  for (int i = 0; i < batch.logits; ++i)
    if (batch.logit_rows[i] < 0 || batch.logit_rows[i] >= batch.tokens) refuse("a logit row is no token of the step");
}

void Decoder::embed(const Batch& batch) {
  float* residual = sized(residual_, static_cast<int64_t>(batch.tokens) * arch_.hidden);
  pool_.run(batch.tokens, 16, [&](int64_t first, int64_t last) {
    std::vector<float> place(arch_.positions ? static_cast<size_t>(arch_.hidden) : 0);
    for (int64_t t = first; t < last; ++t) {
      float* row = residual + t * arch_.hidden;
      arch_.embedding->row(kernels_, batch.token_ids[t], row);
      if (arch_.embedding_scale != 1)
        for (int i = 0; i < arch_.hidden; ++i) row[i] *= arch_.embedding_scale;
      if (!arch_.positions) continue;
      arch_.positions->row(kernels_, batch.positions[t], place.data());
      for (int i = 0; i < arch_.hidden; ++i) row[i] += place[static_cast<size_t>(i)];
    }
  });
}

void Decoder::turn_table(const Batch& batch) {
  turn_start_.assign(1, 0);
  for (const Rotary& rotary : arch_.rotaries)
    turn_start_.push_back(turn_start_.back() + static_cast<int64_t>(batch.tokens) * static_cast<int64_t>(rotary.frequencies.size()));
  sized(cosine_, turn_start_.back());
  sized(sine_, turn_start_.back());
  for (size_t table = 0; table < arch_.rotaries.size(); ++table) {
    const Rotary& rotary = arch_.rotaries[table];
    const size_t half = rotary.frequencies.size();
    for (int t = 0; t < batch.tokens; ++t) {
      const bool is_long = arch_.rotary_switch > 0 && batch.known_lengths[sequence_of_[t]] > arch_.rotary_switch;
      const std::vector<float>& frequencies = is_long ? rotary.long_frequencies : rotary.frequencies;
      const float factor = is_long ? rotary.long_factor : rotary.factor;
      const int64_t at = turn_start_[table] + static_cast<int64_t>(t) * static_cast<int64_t>(half);
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(batch.positions[t]) * frequencies[i];
        cosine_[at + i] = std::cos(angle) * factor;
        sine_[at + i] = std::sin(angle) * factor;
      }
    }
  }
}

void Decoder::attention(const Block& block, int index, const Batch& batch, const float* from) {
  const int64_t tokens = batch.tokens, wide = static_cast<int64_t>(arch_.heads) * arch_.head_size;
  const int64_t narrow = static_cast<int64_t>(arch_.kv_heads) * arch_.head_size;
  float* query = sized(query_, tokens * wide);
  float* key = sized(key_, tokens * narrow);
  float* value = sized(value_, tokens * narrow);
  inputs_.set(from, batch.tokens);
  multiply({{block.query.matrix.get(), query, wide}, {block.key.matrix.get(), key, narrow}, {block.value.matrix.get(), value, narrow}},
           inputs_, integer_, kernels_, pool_);
  add_bias(block.query, batch.tokens, query);
  add_bias(block.key, batch.tokens, key);
  add_bias(block.value, batch.tokens, value);
  positions_and_cache(block, index, batch);
  attend(block, index, batch);
  float* update = sized(update_, tokens * arch_.hidden);
  inputs_.set(mixed_.data(), batch.tokens);
  multiply({{block.output.matrix.get(), update, arch_.hidden}}, inputs_, integer_, kernels_, pool_);
  add_bias(block.output, batch.tokens, update);
  if (block.after_attention_norm.kind != Norm::Kind::none) apply(block.after_attention_norm, update, batch.tokens, update);
  add_to_residual(update, batch.tokens);
}

void Decoder::positions_and_cache(const Block& block, int index, const Batch& batch) {
  const CacheLayer layer = cache_.layer(index);
  const int size = arch_.head_size, page_size = layer.page_size;
  const auto norm_heads = [&](const Norm& norm, float* heads, int count) {
    if (norm.kind == Norm::Kind::none) return;
    for (int head = 0; head < count; ++head)
      kernels_.rms_norm(heads + head * size, norm.weight.data(), norm.eps, size, heads + head * size);
  };
  pool_.run(batch.tokens, 8, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* query = query_.data() + t * arch_.heads * size;
      float* key = key_.data() + t * arch_.kv_heads * size;
      norm_heads(block.query_norm, query, arch_.heads);
      norm_heads(block.key_norm, key, arch_.kv_heads);
      if (block.rotary >= 0) {
        const int half = static_cast<int>(arch_.rotaries[block.rotary].frequencies.size());
        const int64_t at = turn_start_[block.rotary] + t * half;
        kernels_.rotate(query, arch_.heads, size, 2 * half, cosine_.data() + at, sine_.data() + at);
        kernels_.rotate(key, arch_.kv_heads, size, 2 * half, cosine_.data() + at, sine_.data() + at);
      }
      const int position = batch.positions[t];
      const int page = batch.page_table[static_cast<int64_t>(sequence_of_[t]) * batch.page_columns + position / page_size];
      kernels_.store_keys_values(layer, page, position % page_size, key, value_.data() + t * arch_.kv_heads * size);
    }
  });
}

void Decoder::attend(const Block& block, int index, const Batch& batch) {
  const CacheLayer layer = cache_.layer(index);
  const int heads = arch_.heads / arch_.kv_heads, size = arch_.head_size;
  const int64_t stride = static_cast<int64_t>(arch_.heads) * size;
  float* mixed = sized(mixed_, batch.tokens * stride);
  struct Piece {
    int sequence, first, tokens;
  };
  std::vector<Piece> pieces;
  for (int s = 0; s < batch.sequences; ++s)
    for (int t = batch.query_starts[s]; t < batch.query_starts[s + 1]; t += kQueryTokens)
      pieces.push_back({s, t, std::min(kQueryTokens, batch.query_starts[s + 1] - t)});
  std::reverse(pieces.begin(), pieces.end());  // the longest first
  const int64_t room = attention_scratch(layer, kQueryTokens, heads);
  pool_.run(static_cast<int64_t>(pieces.size()) * arch_.kv_heads, 1, [&](int64_t first, int64_t last) {
    thread_local std::vector<float> scratch;
    sized(scratch, room);
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i / arch_.kv_heads)];
      AttentionQueries q;
      q.kv_head = static_cast<int>(i % arch_.kv_heads);
      q.queries = query_.data() + piece.first * stride + static_cast<int64_t>(q.kv_head) * heads * size;
      q.out = mixed + piece.first * stride + static_cast<int64_t>(q.kv_head) * heads * size;
      q.tokens = piece.tokens;
      q.heads = heads;
      q.token_stride = stride;
      q.position = batch.positions[piece.first];
      q.pages = batch.page_table + static_cast<int64_t>(piece.sequence) * batch.page_columns;
      q.window = block.window;
      q.scale = block.attention_scale;
      q.soft_cap = block.attention_cap;
      kernels_.attend(layer, q, scratch.data());
    }
  });
}

void Decoder::feed_forward(const Block& block, int tokens, const float* from) {
  float* update = sized(update_, static_cast<int64_t>(tokens) * arch_.hidden);
  if (block.experts.empty()) {
    dense_mlp(block, block.mlp, from, tokens, update);
  } else {
    mixture(block, from, tokens, update);
  }
  if (block.after_mlp_norm.kind != Norm::Kind::none) apply(block.after_mlp_norm, update, tokens, update);
  add_to_residual(update, tokens);
}

void Decoder::dense_mlp(const Block& block, const Mlp& mlp, const float* from, int tokens, float* out) {
  const int64_t inner = mlp.up.matrix->rows();
  float* up = sized(up_, tokens * inner);
  float* gate = mlp.gate.matrix ? sized(gate_, tokens * inner) : nullptr;
  std::vector<Product> products;
  if (gate != nullptr) products.push_back({mlp.gate.matrix.get(), gate, inner});
  products.push_back({mlp.up.matrix.get(), up, inner});
  inputs_.set(from, tokens);
  multiply(products, inputs_, integer_, kernels_, pool_);
  if (gate != nullptr) add_bias(mlp.gate, tokens, gate);
  add_bias(mlp.up, tokens, up);
  float* active = gate != nullptr ? gate : up;
  pool_.run(tokens * inner, std::max<int64_t>(1024, inner), [&](int64_t first, int64_t last) {
    kernels_.activate(block.activation, active + first, gate != nullptr ? up + first : nullptr, static_cast<int>(last - first));
  });
  inputs_.set(active, tokens);
  multiply({{mlp.down.matrix.get(), out, arch_.hidden}}, inputs_, integer_, kernels_, pool_);
  add_bias(mlp.down, tokens, out);
}

void Decoder::apply(const Norm& norm, const float* from, int tokens, float* to) {
  const int64_t size = arch_.hidden;
  if (norm.kind == Norm::Kind::none) {
    if (from != to) std::memcpy(to, from, sizeof(float) * static_cast<size_t>(tokens * size));
    return;
  }
  pool_.run(tokens, 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (norm.kind == Norm::Kind::rms) {
        kernels_.rms_norm(from + t * size, norm.weight.data(), norm.eps, arch_.hidden, to + t * size);
      } else {
        kernels_.layer_norm(from + t * size, norm.weight.data(), norm.bias.data(), norm.eps, arch_.hidden, to + t * size);
      }
    }
  });
}

void Decoder::add_bias(const Linear& linear, int tokens, float* out) {
  const int64_t size = static_cast<int64_t>(linear.bias.size());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < size; ++i) out[t * size + i] += linear.bias[static_cast<size_t>(i)];
}

void Decoder::add_to_residual(const float* what, int tokens) {
  pool_.run(static_cast<int64_t>(tokens) * arch_.hidden, 1 << 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) residual_[static_cast<size_t>(i)] += what[i];
  });
}

void Decoder::write_logits(const Batch& batch, float* logits) {
  if (batch.logits == 0) return;
  float* rows = sized(normed_, static_cast<int64_t>(batch.logits) * arch_.hidden);
  float* chosen = sized(update_, static_cast<int64_t>(batch.logits) * arch_.hidden);
  for (int i = 0; i < batch.logits; ++i)
    std::memcpy(chosen + static_cast<int64_t>(i) * arch_.hidden,
                residual_.data() + static_cast<int64_t>(batch.logit_rows[i]) * arch_.hidden, sizeof(float) * arch_.hidden);
  apply(arch_.last_norm, chosen, batch.logits, rows);
  inputs_.set(rows, batch.logits);
  multiply({{arch_.head.get(), logits, arch_.vocabulary}}, inputs_, integer_, kernels_, pool_);
  for (int i = 0; i < batch.logits && !arch_.head_bias.empty(); ++i)
    for (int v = 0; v < arch_.vocabulary; ++v) logits[static_cast<int64_t>(i) * arch_.vocabulary + v] += arch_.head_bias[v];
  if (arch_.logit_cap != 0)
    kernels_.soft_cap(logits, arch_.logit_cap, static_cast<int64_t>(batch.logits) * arch_.vocabulary);
}

}  // namespace fettle
