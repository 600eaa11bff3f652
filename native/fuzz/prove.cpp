// Every instruction set of this build against the definition of a product, at random odd sizes.
//
//   fettle_prove ROUNDS SEED [KERNELS]   prints a line for each set; exits with 1 at the first disagreement
//
// Kernels that multiply with dot products of bytes owe the definition to the bit: a block's dot is a whole number, and
// what is rounded after it is written down here. The others owe it to 1e-4. All owe that a token is the same alone, among
// others, and on one thread or two. And what a processor says of itself is read as it is meant.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/features.h"
#include "ops/matmul.h"
#include "ops/unpack.h"

namespace fettle {
namespace {

std::mt19937 random_source;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_source); }

// ---- processors

bool reads(const char* what, uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx, uint64_t saved, bool avx2, bool vnni) {
  const Features found = read_features(X86Words{leaf1_ecx, leaf7_ebx, leaf7_ecx, saved});
  if (found.avx2 == avx2 && found.avx512_vnni == vnni) return true;
  std::printf("%s: avx2 %d, avx512_vnni %d\n", what, found.avx2, found.avx512_vnni);
  return false;
}

bool processors() {
  const uint32_t ecx = (1u << 12) | (1u << 27) | (1u << 28) | (1u << 29), vnni = 1u << 11;
  const uint32_t avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, all = avx2 | f | dq | bw | vl;
  bool fine = reads("all of it", ecx, all, vnni, 0xe7, true, true);
  fine &= reads("system saves 256 bits", ecx, all, vnni, 0x07, true, false);
  fine &= reads("system saves no upper halves", ecx, all, vnni, 0x67, true, false);
  fine &= reads("system saves nothing wide", ecx, all, vnni, 0x03, false, false);
  fine &= reads("no xgetbv", ecx & ~(1u << 27), all, vnni, 0, false, false);
  fine &= reads("AVX-512 without VNNI", ecx, all, 0, 0xe7, true, false);
  for (const uint32_t missing : {f, dq, bw, vl}) fine &= reads("a part of AVX-512 missing", ecx, all & ~missing, vnni, 0xe7, true, false);
  fine &= reads("no FMA", ecx & ~(1u << 12), all, vnni, 0xe7, false, false);
  fine &= reads("no F16C", ecx & ~(1u << 29), all, vnni, 0xe7, false, false);
  fine &= reads("no AVX2", ecx, all & ~avx2, vnni, 0xe7, false, false);
  return fine;
}

// ---- products

std::vector<float> random_levels(int bits) {
  const int count = bits == 1 ? 2 : between((1 << (bits - 1)) + 1, 1 << bits);
  std::vector<float> levels(static_cast<size_t>(count));
  const bool equal = bits > 4 || between(0, 1) == 0;
  float level = -static_cast<float>(count / 2) + (between(0, 2) == 0 ? 0.5f : 0.0f);  // a zero point that is no whole number
  for (float& value : levels) {
    value = level;
    level += equal ? 1.0f : 0.25f * static_cast<float>(between(1, 9));
  }
  return levels;
}

Coded random_weight(ThreadPool& pool) {
  StoredCodes stored;
  stored.rows = between(0, 1) == 0 ? between(1, 40) : between(40, 100);
  stored.columns = between(0, 3) == 0 ? between(400, 1200) : between(1, 300);
  stored.bits = between(1, 8);
  const int usual[] = {8, 16, 24, 32, 48, 64, 96, 128, 160, 256};
  stored.group = between(0, 3) == 0 ? stored.columns : between(0, 2) == 0 ? between(1, stored.columns + 5) : usual[between(0, 9)];
  stored.levels = random_levels(stored.bits);
  stored.stream_bits = 8;
  stored.stream_bytes = static_cast<size_t>(stored.columns);
  const int top = static_cast<int>(stored.levels.size()) - 1, kind = between(0, 4);  // 0: all the highest code
  std::vector<uint8_t> streams(static_cast<size_t>(stored.rows) * stored.stream_bytes);
  for (uint8_t& byte : streams) byte = static_cast<uint8_t>(kind == 0 ? top : between(0, top));
  const int group = std::min(stored.group, stored.columns), groups = (stored.columns + group - 1) / group;
  stored.scale_rows = stored.rows;
  std::vector<float> scales(static_cast<size_t>(stored.rows) * groups);
  std::normal_distribution<float> normal(0, 0.1f);
  for (float& scale : scales) scale = normal(random_source);
  std::vector<uint8_t> zeros(scales.size());
  for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(between(0, top));
  stored.streams = streams.data();
  stored.scales = scales.data();
  stored.zero_codes = between(0, 2) == 0 ? zeros.data() : nullptr;
  stored.gain = 0.5f;
  return Coded(stored, pool);
}

std::vector<float> random_inputs(int tokens, int columns) {
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> inputs(static_cast<size_t>(tokens) * columns);
  for (int t = 0; t < tokens; ++t) {
    const int kind = between(0, 9);  // 0: nothing; 1: the largest of codes; 2: tiny
    for (int i = 0; i < columns; ++i)
      inputs[static_cast<size_t>(t) * columns + i] = kind == 0 ? 0.0f : kind == 1 ? (i % 3 ? 2.0f : -2.0f) : normal(random_source) * (kind == 2 ? 1e-30f : 1.0f);
  }
  return inputs;
}

// The units of a weight as whole numbers [rows padded to tiles][padded columns].
std::vector<int> units_of(const CodedMatrix& weight) {
  const Cut& cut = weight.cut;
  std::vector<int> units(static_cast<size_t>(weight.tiles) * kTileRows * cut.padded());
  for (int tile = 0; tile < weight.tiles; ++tile)
    for (int chunk = 0; chunk < cut.chunks; ++chunk) {
      uint8_t codes[kChunkSteps * kStepBytes];
      unpack_codes(chunk_of(weight, tile, chunk), weight.bits, codes);
      for (int i = 0; i < kChunkSteps * kStepBytes; ++i) {
        const int row = tile * kTileRows + i % kStepBytes / kStepColumns;
        const int column = chunk * kChunkColumns + i / kStepBytes * kStepColumns + i % kStepColumns;
        units[static_cast<size_t>(row) * cut.padded() + column] =
            weight.equal_steps ? codes[i] - (weight.bits == 8 ? 128 : 0) : weight.units[codes[i] & 15];
      }
    }
  return units;
}

std::vector<float> by_definition(const CodedMatrix& weight, const QuantizedInputs& inputs) {
  const Cut& cut = weight.cut;
  const std::vector<int> units = units_of(weight);
  const bool whole = weight.equal_steps && weight.zeros == nullptr && weight.zero == std::nearbyint(weight.zero);
  std::vector<float> out(static_cast<size_t>(inputs.tokens) * weight.rows);
  for (int t = 0; t < inputs.tokens; ++t)
    for (int row = 0; row < weight.rows; ++row) {
      float sum = 0;
      for (int block = 0; block < cut.blocks(); ++block) {
        int64_t dot = 0, total = 0;
        for (int k = block * cut.block; k < (block + 1) * cut.block; ++k) {
          const int64_t code = inputs.codes[static_cast<int64_t>(t) * cut.padded() + k];
          dot += units[static_cast<size_t>(row) * cut.padded() + k] * code;
          total += code;
        }
        const int group = block * cut.block / cut.padded_group;
        const float scale = group_scales(weight, row / kTileRows, group)[row % kTileRows];
        const float zero = group_zeros(weight, row / kTileRows, group)[row % kTileRows];
        const int64_t at = static_cast<int64_t>(t) * cut.blocks() + block;
        if (whole) {
          volatile float both = scale * inputs.scales[at];  // rounded before it meets the dot
          sum = std::fma(both, static_cast<float>(dot - static_cast<int64_t>(zero) * total), sum);
        } else {
          volatile float shift = zero * inputs.sums[at];
          sum = std::fma(scale, std::fma(static_cast<float>(dot), inputs.scales[at], -shift), sum);
        }
      }
      out[static_cast<size_t>(t) * weight.rows + row] = sum * (weight.gain * weight.unit_size);
    }
  return out;
}

bool agree(const std::vector<float>& found, const std::vector<float>& expected, bool to_the_bit, const char* what) {
  float size = 0;
  for (const float value : expected) size = std::max(size, std::fabs(value));
  for (size_t i = 0; i < found.size(); ++i) {
    const float error = std::fabs(found[i] - expected[i]);
    if (to_the_bit ? found[i] == expected[i] : error <= 1e-4f * size) continue;
    std::printf("%s: %zu of %zu is %.9g, not %.9g\n", what, i, found.size(), static_cast<double>(found[i]), static_cast<double>(expected[i]));
    return false;
  }
  return true;
}

std::vector<float> product(const Matrix& matrix, const float* inputs, int tokens, ThreadPool& pool, const Kernels& kernels) {
  std::vector<float> out(static_cast<size_t>(tokens) * matrix.rows());
  Inputs read;
  read.set(inputs, tokens);
  multiply({{&matrix, out.data(), matrix.rows()}}, read, true, kernels, pool);
  return out;
}

bool one_round(ThreadPool& two, ThreadPool& one, const Kernels& kernels) {
  const Matrix matrix(random_weight(two));
  const CodedMatrix& weight = *matrix.coded();
  const int tokens = between(0, 9) == 0 ? between(120, 140) : between(1, 29), columns = weight.cut.columns;
  const std::vector<float> values = random_inputs(tokens, columns);
  Inputs read;
  read.set(values.data(), tokens);
  const bool dots = kernels.name == std::string("avx512_vnni") || kernels.name == std::string("neon_dot");
  const std::vector<float> found = product(matrix, values.data(), tokens, two, kernels);
  if (!agree(found, by_definition(weight, read.quantized(weight.cut, kernels, two)), dots, "definition")) return false;
  if (!agree(product(matrix, values.data(), tokens, one, kernels), found, true, "one thread")) return false;
  std::vector<float> chunks;
  for (int first = 0; first < tokens;) {
    const int count = between(1, std::min(tokens - first, 11));
    const std::vector<float> part = product(matrix, values.data() + static_cast<size_t>(first) * columns, count, two, kernels);
    chunks.insert(chunks.end(), part.begin(), part.end());
    first += count;
  }
  return agree(chunks, found, true, "in chunks");
}

}  // namespace
}  // namespace fettle

int main(int count, char** words) {
  using namespace fettle;
  const int rounds = count > 1 ? std::atoi(words[1]) : 200;
  const unsigned seed = count > 2 ? static_cast<unsigned>(std::atoi(words[2])) : 0;
  if (!processors()) return 1;
  ThreadPool two(2), one(1);
  for (const std::string& name : available_instructions()) {
    if (count > 3 && name != words[3]) continue;
    const Kernels& kernels = find_kernels(name);
    for (int round = 0; round < rounds; ++round) {
      random_source.seed(seed + static_cast<unsigned>(round));
      if (one_round(two, one, kernels)) continue;
      std::printf("round %d of seed %u: %s kernels are wrong\n", round, seed, kernels.name);
      return 1;
    }
    std::printf("%s: %d rounds from seed %u as defined; %lld products of bytes counted\n", kernels.name, rounds, seed,
                static_cast<long long>(kernels.multiply_adds(10)));
  }
  return 0;
}
