// Random matrices and decoders of odd sizes under the sanitizers: every kernel against the portable one.
//
//   fettle_fuzz ROUNDS SEED      prints one line; exits with 1 at the first disagreement (a sanitizer with its own code)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "decoder/decoder.h"
#include "formats/half.h"
#include "ops/matmul.h"

namespace fettle {
namespace {

std::mt19937 random_source;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_source); }

std::vector<float> floats(size_t count, float size = 1) {
  std::normal_distribution<float> normal(0, size);
  std::vector<float> made(count);
  for (float& value : made) value = normal(random_source);
  return made;
}

std::shared_ptr<Matrix> random_dense(int rows, int columns, ThreadPool& pool) {
  const std::vector<float> values = floats(static_cast<size_t>(rows) * columns, 0.3f);
  return std::make_shared<Matrix>(Dense(values.data(), Number::float32, rows, columns, pool));
}

// `all`: every code of so many bits stands for one.
std::vector<float> random_levels(int bits, bool all = false) {
  const int count = bits == 1 || all ? 1 << bits : between((1 << (bits - 1)) + 1, 1 << bits);
  std::vector<float> levels(static_cast<size_t>(count));
  const bool equal = bits > 4 || between(0, 1) == 0;
  float level = -static_cast<float>(count / 2);
  for (float& value : levels) {
    value = level;
    level += equal ? 1.0f : 0.25f * static_cast<float>(between(1, 9));
  }
  return levels;
}

std::shared_ptr<Matrix> random_coded(int rows, int columns, ThreadPool& pool) {
  StoredCodes stored;
  stored.rows = rows;
  stored.columns = columns;
  stored.bits = between(1, 8);
  stored.group = between(0, 3) == 0 ? columns : between(1, columns + 5);
  stored.stream_bits = between(0, 1) == 0 ? 8 : stored.bits;
  stored.levels = random_levels(stored.bits, stored.stream_bits < 8);  // packed codes are random bytes
  stored.stream_bytes = (static_cast<size_t>(columns) * stored.stream_bits + 7) / 8;
  std::vector<uint8_t> streams(static_cast<size_t>(rows) * stored.stream_bytes);
  const int top = static_cast<int>(stored.levels.size()) - 1;
  for (uint8_t& byte : streams) byte = static_cast<uint8_t>(stored.stream_bits == 8 ? between(0, top) : between(0, 255));
  const int group = std::min(stored.group, columns), groups = (columns + group - 1) / group;
  stored.scale_rows = between(0, 4) == 0 ? 1 : rows;
  const std::vector<float> scales = floats(static_cast<size_t>(stored.scale_rows) * groups, 0.1f);
  std::vector<uint8_t> zeros(scales.size());
  for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(between(0, top));
  stored.streams = streams.data();
  stored.scales = scales.data();
  stored.zero_codes = between(0, 1) == 0 ? zeros.data() : nullptr;
  stored.gain = 0.5f;
  return std::make_shared<Matrix>(Coded(stored, pool));
}

// What stayed: few, most, or none in some rows; codes where they can skip, else numbers.
std::shared_ptr<Matrix> random_sparse(int rows, int columns, ThreadPool& pool) {
  const int share = between(0, 100);
  std::vector<uint8_t> kept(static_cast<size_t>(rows) * columns);
  for (uint8_t& keep : kept) keep = between(0, 99) < share;
  if (between(0, 2) == 0) {
    std::vector<float> values = floats(kept.size(), 0.3f);
    for (size_t i = 0; i < values.size(); ++i) values[i] = kept[i] ? values[i] : 0.0f;
    std::vector<uint16_t> halves(values.size());
    for (size_t i = 0; i < values.size(); ++i) halves[i] = to_float16(values[i]);
    if (between(0, 1) == 0) return std::make_shared<Matrix>(SparseNumbers(halves.data(), Number::float16, rows, columns, pool));
    return std::make_shared<Matrix>(SparseNumbers(values.data(), Number::float32, rows, columns, pool));
  }
  StoredCodes stored;
  stored.rows = rows;
  stored.columns = columns;
  stored.bits = between(2, 8);
  stored.stream_bits = 8;
  stored.stream_bytes = static_cast<size_t>(columns);
  stored.group = between(0, 3) == 0 ? columns : between(17, columns + 40);
  stored.levels = random_levels(stored.bits);  // zero is among them where steps are equal
  if (std::find(stored.levels.begin(), stored.levels.end(), 0.0f) == stored.levels.end()) stored.levels[0] = 0;
  std::sort(stored.levels.begin(), stored.levels.end());
  for (size_t i = 1; i < stored.levels.size(); ++i)
    if (stored.levels[i] <= stored.levels[i - 1]) stored.levels[i] = stored.levels[i - 1] + 1;
  std::vector<uint8_t> codes(kept.size());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(between(0, static_cast<int>(stored.levels.size()) - 1));
  const int group = std::min(stored.group, columns), groups = (columns + group - 1) / group;
  stored.scale_rows = between(0, 4) == 0 ? 1 : rows;
  const std::vector<float> scales = floats(static_cast<size_t>(stored.scale_rows) * groups, 0.1f);
  stored.streams = codes.data();
  stored.scales = scales.data();
  stored.gain = 0.5f;
  return std::make_shared<Matrix>(SparseCodes(stored, kept.data(), pool));
}

bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  float size = 0, worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    size = std::max(size, std::fabs(b[i]));
    worst = std::max(worst, std::fabs(a[i] - b[i]));
    if (std::isnan(a[i]) || std::isnan(b[i])) return false;
  }
  return worst <= tolerance * (size + 1);
}

bool one_matrix(ThreadPool& pool, const Kernels& best) {
  const int rows = between(1, 70), columns = between(1, 300), tokens = between(1, 13);
  const int kind = between(0, 8);
  const auto matrix = kind == 0 ? random_dense(rows, columns, pool)
                      : kind < 4 ? random_sparse(rows, columns, pool)
                                 : random_coded(rows, columns, pool);
  const std::vector<float> inputs = floats(static_cast<size_t>(tokens) * columns);
  bool fine = true;
  for (const bool integer : {false, true}) {
    std::vector<float> found(static_cast<size_t>(tokens) * rows), expected(found.size());
    Inputs read;
    read.set(inputs.data(), tokens);
    multiply({{matrix.get(), found.data(), rows}}, read, integer, best, pool);
    Inputs again;
    again.set(inputs.data(), tokens);
    multiply({{matrix.get(), expected.data(), rows}}, again, integer, portable_kernels(), pool);
    fine = fine && close(found, expected, 1e-4f);
  }
  std::vector<float> row(static_cast<size_t>(columns)), other(row.size());
  const int index = between(0, rows - 1);
  matrix->row(best, index, row.data());
  matrix->row(portable_kernels(), index, other.data());
  return fine && close(row, other, 1e-5f);
}

Norm random_norm(int size) {
  Norm norm;
  norm.kind = between(0, 1) == 0 ? Norm::Kind::rms : Norm::Kind::layer;
  norm.weight = floats(static_cast<size_t>(size), 0.5f);
  norm.bias = floats(static_cast<size_t>(size), 0.1f);
  norm.eps = 1e-5f;
  return norm;
}

Mlp random_mlp(int hidden, bool gated, ThreadPool& pool) {
  const int inner = between(1, 50);
  Mlp mlp;
  if (gated) mlp.gate.matrix = random_dense(inner, hidden, pool);
  mlp.up.matrix = random_dense(inner, hidden, pool);
  mlp.down.matrix = random_dense(hidden, inner, pool);
  return mlp;
}

Architecture random_architecture(ThreadPool& pool) {
  Architecture arch;
  arch.kv_heads = between(1, 3);
  arch.heads = arch.kv_heads * between(1, 3);
  arch.head_size = 2 * between(1, 21);
  arch.hidden = between(1, 60);
  arch.vocabulary = between(2, 40);
  arch.embedding = random_dense(arch.vocabulary, arch.hidden, pool);
  arch.head = between(0, 1) == 0 ? arch.embedding : random_dense(arch.vocabulary, arch.hidden, pool);
  arch.last_norm = random_norm(arch.hidden);
  arch.logit_cap = between(0, 1) == 0 ? 0.0f : 5.0f;
  Rotary rotary;
  rotary.frequencies = floats(static_cast<size_t>(between(1, arch.head_size / 2)));
  arch.rotaries.push_back(rotary);
  const int wide = arch.heads * arch.head_size, narrow = arch.kv_heads * arch.head_size;
  const bool gated = between(0, 1) == 0;
  for (int i = between(1, 2); i > 0; --i) {
    Block block;
    block.attention_norm = random_norm(arch.hidden);
    block.mlp_norm = random_norm(arch.hidden);
    block.query.matrix = random_dense(wide, arch.hidden, pool);
    block.key.matrix = random_dense(narrow, arch.hidden, pool);
    block.value.matrix = random_dense(narrow, arch.hidden, pool);
    block.output.matrix = random_dense(arch.hidden, wide, pool);
    block.window = between(0, 1) == 0 ? 0 : between(1, 9);
    block.attention_cap = between(0, 1) == 0 ? 0.0f : 3.0f;
    block.rotary = between(-1, 0);
    block.parallel = between(0, 1) == 0;
    block.activation = static_cast<Gate>(between(0, 3));
    if (between(0, 1) == 0) {
      block.mlp = random_mlp(arch.hidden, gated, pool);
    } else {
      for (int e = between(1, 4); e > 0; --e) block.experts.push_back(random_mlp(arch.hidden, gated, pool));
      block.router.matrix = random_dense(static_cast<int>(block.experts.size()), arch.hidden, pool);
      block.experts_per_token = between(1, 5);
    }
    arch.blocks.push_back(block);
  }
  return arch;
}

// One sequence, whole and then in chunks, with two instruction sets: the same logits.
bool one_decoder(const std::shared_ptr<ThreadPool>& pool, const Kernels& best) {
  const Architecture arch = random_architecture(*pool);
  PagedCache::Shape shape;
  shape.layers = static_cast<int>(arch.blocks.size());
  shape.page_size = between(1, 20);
  shape.pages = 40;
  shape.kv_heads = arch.kv_heads;
  shape.head_size = arch.head_size;
  const Number types[] = {Number::float32, Number::float16, Number::int8};
  shape.type = types[between(0, 2)];
  const int longest = between(0, 2) == 0 ? 200 : 40;  // several spans of pages now and then
  const int tokens = between(1, std::min(longest, shape.page_size * shape.pages));
  const int page_columns = (tokens + shape.page_size - 1) / shape.page_size;
  std::vector<int32_t> ids, positions, pages, rows;
  for (int t = 0; t < tokens; ++t) {
    ids.push_back(between(0, arch.vocabulary - 1));
    positions.push_back(t);
    rows.push_back(t);
  }
  for (int p = 0; p < page_columns; ++p) pages.push_back(shape.pages - 1 - p);
  std::vector<std::vector<float>> found;
  for (const Kernels* kernels : {&best, &best, &portable_kernels()}) {
    Decoder decoder(arch, shape, pool, false, *kernels);
    std::vector<float> logits(static_cast<size_t>(tokens) * arch.vocabulary);
    for (int first = 0; first < tokens;) {
      const int count = found.size() == 1 ? between(1, tokens - first) : tokens;
      const int32_t starts[2] = {0, count}, known = tokens;
      Batch batch;
      batch.sequences = 1;
      batch.tokens = batch.logits = count;
      batch.page_columns = page_columns;
      batch.token_ids = ids.data() + first;
      batch.positions = positions.data() + first;
      batch.query_starts = starts;
      batch.known_lengths = &known;
      batch.page_table = pages.data();
      batch.logit_rows = rows.data();
      decoder.step(batch, logits.data() + static_cast<size_t>(first) * arch.vocabulary);
      first += count;
    }
    found.push_back(logits);
  }
  // Another instruction set may round a sum across a step of float16, and experts may then be chosen otherwise.
  const bool same_instructions = found[0] == found[1];
  const bool loose = shape.type != Number::float32 || !arch.blocks[0].experts.empty() || !arch.blocks.back().experts.empty();
  return same_instructions && (loose || close(found[0], found[2], 1e-3f));
}

}  // namespace
}  // namespace fettle

int main(int count, char** words) {
  using namespace fettle;
  const int rounds = count > 1 ? std::atoi(words[1]) : 200;
  const unsigned seed = count > 2 ? static_cast<unsigned>(std::atoi(words[2])) : 0;
  const auto pool = std::make_shared<ThreadPool>(2);
  const Kernels& best = find_kernels("");
  for (int round = 0; round < rounds; ++round) {
    random_source.seed(seed + static_cast<unsigned>(round));
    if (!one_matrix(*pool, best) || (round % 4 == 0 && !one_decoder(pool, best))) {
      std::printf("round %d of seed %u: %s and portable kernels disagree\n", round, seed, best.name);
      return 1;
    }
  }
  std::printf("%d rounds from seed %u: %s and portable kernels agree\n", rounds, seed, best.name);
  return 0;
}
