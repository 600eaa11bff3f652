// Experts: the router's softmax chooses a few for each token; an expert runs once, on all tokens that chose it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder/decoder.h"

namespace fettle {
namespace {

struct Choice {
  int token;
  float share;
};

// The likeliest experts of one token with their shares; of equal ones the first.
void choose(const float* scores, int token, const Block& block, std::vector<std::vector<Choice>>& chosen) {
  const int count = static_cast<int>(block.experts.size());
  const float top = *std::max_element(scores, scores + count);
  std::vector<float> shares(static_cast<size_t>(count));
  float total = 0;
  for (int e = 0; e < count; ++e) total += shares[e] = std::exp(scores[e] - top);
  for (float& share : shares) share /= total;
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return shares[a] > shares[b]; });
  order.resize(static_cast<size_t>(std::min(block.experts_per_token, count)));
  float kept = 0;
  for (const int e : order) kept += shares[e];
  for (const int e : order) chosen[e].push_back({token, block.renormalize ? shares[e] / kept : shares[e]});
}

}  // namespace

void Decoder::mixture(const Block& block, const float* from, int tokens, float* out) {
  const int64_t hidden = arch_.hidden;
  std::vector<float> scores(static_cast<size_t>(tokens) * block.experts.size());
  inputs_.set(from, tokens);
  multiply({{block.router.matrix.get(), scores.data(), static_cast<int64_t>(block.experts.size())}}, inputs_, integer_, kernels_,
           pool_);
  std::vector<std::vector<Choice>> chosen(block.experts.size());
  for (int t = 0; t < tokens; ++t) choose(scores.data() + static_cast<size_t>(t) * block.experts.size(), t, block, chosen);
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(tokens * hidden));
  std::vector<float> gathered, given;
  for (size_t e = 0; e < chosen.size(); ++e) {
    const std::vector<Choice>& readers = chosen[e];
    if (readers.empty()) continue;
    gathered.resize(readers.size() * static_cast<size_t>(hidden));
    given.resize(gathered.size());
    for (size_t i = 0; i < readers.size(); ++i)
      std::memcpy(gathered.data() + i * hidden, from + readers[i].token * hidden, sizeof(float) * static_cast<size_t>(hidden));
    dense_mlp(block, block.experts[e], gathered.data(), static_cast<int>(readers.size()), given.data());
    for (size_t i = 0; i < readers.size(); ++i)
      for (int64_t j = 0; j < hidden; ++j)
        out[readers[i].token * hidden + j] += readers[i].share * given[i * static_cast<size_t>(hidden) + static_cast<size_t>(j)];
  }
}

}  // namespace fettle
