// The table of a decoder, out of Python's dictionaries; engine/native_table.py makes them.

#include "bindings/arrays.h"
#include "decoder/decoder.h"

namespace fettle {
namespace {

nb::object entry(const nb::dict& table, const char* key) {
  if (!table.contains(key)) throw std::invalid_argument(std::string("the table lacks \"") + key + "\"");
  return table[key];
}

template <typename T>
T value(const nb::dict& table, const char* key) {
  return nb::cast<T>(entry(table, key));
}

std::vector<float> floats(const nb::dict& table, const char* key) {
  const nb::object found = entry(table, key);
  if (found.is_none()) return {};
  const Floats1 array = nb::cast<Floats1>(found);
  return std::vector<float>(array.data(), array.data() + array.shape(0));
}

std::shared_ptr<Matrix> matrix(const nb::dict& table, const char* key) {
  const nb::object found = entry(table, key);
  return found.is_none() ? nullptr : nb::cast<std::shared_ptr<Matrix>>(found);
}

Norm norm(const nb::dict& block, const char* key, int size) {
  Norm made;
  const nb::object found = entry(block, key);
  if (found.is_none()) return made;
  const nb::dict table = nb::cast<nb::dict>(found);
  const std::string kind = value<std::string>(table, "kind");
  if (kind != "rms" && kind != "layer") throw std::invalid_argument("a norm is rms or layer, not \"" + kind + "\"");
  made.kind = kind == "rms" ? Norm::Kind::rms : Norm::Kind::layer;
  made.weight = floats(table, "weight");
  made.bias = floats(table, "bias");
  made.eps = value<float>(table, "eps");
  const size_t wanted = static_cast<size_t>(size);
  if (made.weight.size() != wanted || (made.kind == Norm::Kind::layer && made.bias.size() != wanted))
    throw std::invalid_argument(std::string(key) + " has " + std::to_string(made.weight.size()) + " weights, not " + std::to_string(size));
  return made;
}

Linear linear(const nb::dict& holder, const char* key, int rows, int columns) {
  Linear made;
  const nb::object found = entry(holder, key);
  if (found.is_none()) return made;
  const nb::dict table = nb::cast<nb::dict>(found);
  made.matrix = matrix(table, "matrix");
  made.bias = floats(table, "bias");
  if (!made.matrix) throw std::invalid_argument(std::string(key) + " has no matrix");
  const bool fits = (rows < 0 || made.matrix->rows() == rows) && made.matrix->columns() == columns &&
                    (made.bias.empty() || static_cast<int>(made.bias.size()) == made.matrix->rows());
  if (!fits)
    throw std::invalid_argument(std::string(key) + " is [" + std::to_string(made.matrix->rows()) + ", " +
                                std::to_string(made.matrix->columns()) + "], which the architecture has no place for");
  return made;
}

Mlp mlp(const nb::dict& table, int hidden) {
  Mlp made;
  made.up = linear(table, "up", -1, hidden);
  if (!made.up.matrix) throw std::invalid_argument("an MLP has at least up and down");
  const int inner = made.up.matrix->rows();
  made.gate = linear(table, "gate", inner, hidden);
  made.down = linear(table, "down", hidden, inner);
  if (!made.down.matrix) throw std::invalid_argument("an MLP has at least up and down");
  return made;
}

Gate gate_named(const std::string& name) {
  if (name == "silu") return Gate::silu;
  if (name == "gelu_tanh") return Gate::gelu_tanh;
  if (name == "gelu_erf") return Gate::gelu_erf;
  if (name == "relu") return Gate::relu;
  throw std::invalid_argument("there is no activation \"" + name + "\"");
}

void read_mixture(const nb::dict& table, int hidden, Block& block) {
  const nb::list experts = nb::cast<nb::list>(entry(table, "experts"));
  for (nb::handle expert : experts) block.experts.push_back(mlp(nb::cast<nb::dict>(expert), hidden));
  block.router = linear(table, "router", static_cast<int>(block.experts.size()), hidden);
  block.experts_per_token = value<int>(table, "experts_per_token");
  block.renormalize = value<bool>(table, "renormalize");
  if (!block.router.matrix || block.experts.empty() || block.experts_per_token < 1)
    throw std::invalid_argument("a mixture has a router, experts, and at least one of them for a token");
}

Block read_block(const nb::dict& table, const Architecture& arch) {
  Block block;
  const int wide = arch.heads * arch.head_size, narrow = arch.kv_heads * arch.head_size;
  block.attention_norm = norm(table, "attention_norm", arch.hidden);
  block.query_norm = norm(table, "query_norm", arch.head_size);
  block.key_norm = norm(table, "key_norm", arch.head_size);
  block.after_attention_norm = norm(table, "after_attention_norm", arch.hidden);
  block.mlp_norm = norm(table, "mlp_norm", arch.hidden);
  block.after_mlp_norm = norm(table, "after_mlp_norm", arch.hidden);
  block.query = linear(table, "query", wide, arch.hidden);
  block.key = linear(table, "key", narrow, arch.hidden);
  block.value = linear(table, "value", narrow, arch.hidden);
  block.output = linear(table, "output", arch.hidden, wide);
  for (const Linear* needed : {&block.query, &block.key, &block.value, &block.output})
    if (!needed->matrix) throw std::invalid_argument("attention has query, key, value and output");
  block.attention_scale = value<float>(table, "attention_scale");
  block.attention_cap = value<float>(table, "attention_cap");
  block.window = value<int>(table, "window");
  block.rotary = value<int>(table, "rotary");
  if (block.rotary >= static_cast<int>(arch.rotaries.size())) throw std::invalid_argument("there is no such rotary table");
  block.parallel = value<bool>(table, "parallel");
  block.activation = gate_named(value<std::string>(table, "activation"));
  if (entry(table, "mlp").is_none()) {
    read_mixture(nb::cast<nb::dict>(entry(table, "mixture")), arch.hidden, block);
  } else {
    block.mlp = mlp(nb::cast<nb::dict>(entry(table, "mlp")), arch.hidden);
  }
  return block;
}

void read_outside(const nb::dict& table, Architecture& arch) {
  arch.embedding = matrix(table, "embedding");
  arch.positions = matrix(table, "positions");
  arch.head = matrix(table, "head");
  arch.head_bias = floats(table, "head_bias");
  arch.last_norm = norm(table, "last_norm", arch.hidden);
  if (!arch.embedding || !arch.head) throw std::invalid_argument("a decoder has an embedding and a head");
  for (const auto& outer : {arch.embedding, arch.head})
    if (outer->rows() != arch.vocabulary || outer->columns() != arch.hidden)
      throw std::invalid_argument("embedding and head are [vocabulary, hidden]");
  if (arch.positions && (arch.positions->columns() != arch.hidden || arch.context < 1 || arch.positions->rows() < arch.context))
    throw std::invalid_argument("learned positions are [at least context, hidden]");
  if (!arch.head_bias.empty() && static_cast<int>(arch.head_bias.size()) != arch.vocabulary)
    throw std::invalid_argument("the head's bias is [vocabulary]");
}

Architecture read_architecture(const nb::dict& table) {
  Architecture arch;
  arch.hidden = value<int>(table, "hidden");
  arch.heads = value<int>(table, "heads");
  arch.kv_heads = value<int>(table, "kv_heads");
  arch.head_size = value<int>(table, "head_size");
  arch.vocabulary = value<int>(table, "vocabulary");
  arch.context = value<int>(table, "context");
  arch.rotary_switch = value<int>(table, "rotary_switch");
  arch.embedding_scale = value<float>(table, "embedding_scale");
  arch.logit_cap = value<float>(table, "logit_cap");
  if (arch.hidden < 1 || arch.heads < 1 || arch.kv_heads < 1 || arch.head_size < 1 || arch.heads % arch.kv_heads != 0)
    throw std::invalid_argument("sizes are at least 1, and query heads a multiple of key-value heads");
  for (nb::handle item : nb::cast<nb::list>(entry(table, "rotaries"))) {
    const nb::dict rotary = nb::cast<nb::dict>(item);
    Rotary made;
    made.frequencies = floats(rotary, "frequencies");
    made.long_frequencies = floats(rotary, "long_frequencies");
    made.factor = value<float>(rotary, "factor");
    made.long_factor = value<float>(rotary, "long_factor");
    const bool fits = 2 * made.frequencies.size() <= static_cast<size_t>(arch.head_size) &&
                      (arch.rotary_switch == 0 || made.long_frequencies.size() == made.frequencies.size());
    if (!fits) throw std::invalid_argument("frequencies are at most half a head's size, and as many for long sequences");
    arch.rotaries.push_back(std::move(made));
  }
  read_outside(table, arch);
  for (nb::handle block : nb::cast<nb::list>(entry(table, "blocks")))
    arch.blocks.push_back(read_block(nb::cast<nb::dict>(block), arch));
  if (arch.blocks.empty()) throw std::invalid_argument("a decoder has at least one block");
  return arch;
}

nb::object step(Decoder& decoder, const Ints1& tokens, const Ints1& positions, const Ints1& query_starts,
                const Ints1& known_lengths, const Ints2& page_table, const Ints1& logit_rows, const Ints2& copies) {
  Batch batch;
  batch.tokens = static_cast<int>(tokens.shape(0));
  batch.sequences = static_cast<int>(known_lengths.shape(0));
  batch.page_columns = static_cast<int>(page_table.shape(1));
  batch.logits = static_cast<int>(logit_rows.shape(0));
  batch.copies = static_cast<int>(copies.shape(0));
  if (positions.shape(0) != tokens.shape(0) || query_starts.shape(0) != known_lengths.shape(0) + 1 ||
      page_table.shape(0) != known_lengths.shape(0) || copies.shape(1) != 2)
    throw std::invalid_argument("the arrays of a batch do not fit together");
  batch.token_ids = tokens.data();
  batch.positions = positions.data();
  batch.query_starts = query_starts.data();
  batch.known_lengths = known_lengths.data();
  batch.page_table = page_table.data();
  batch.logit_rows = logit_rows.data();
  batch.copy_pairs = copies.data();
  const size_t rows = logit_rows.shape(0), columns = static_cast<size_t>(decoder.vocabulary());
  std::unique_ptr<float[]> logits(new float[std::max<size_t>(rows * columns, 1)]);
  {
    nb::gil_scoped_release release;
    decoder.step(batch, logits.get());
  }
  return nb::cast(owned(logits.release(), rows, columns));
}

}  // namespace

void bind_decoders(nb::module_& module) {
  nb::class_<Decoder>(module, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, const nb::dict& table, int pages, int page_size, const std::string& cache_type,
             std::shared_ptr<ThreadPool> pool, bool integer, const std::string& kernels) {
            Architecture arch = read_architecture(table);
            PagedCache::Shape cache;
            cache.layers = static_cast<int>(arch.blocks.size());
            cache.pages = pages;
            cache.page_size = page_size;
            cache.kv_heads = arch.kv_heads;
            cache.head_size = arch.head_size;
            cache.type = cache_type == "int8" ? Number::int8 : number_named(cache_type);
            if (cache.type == Number::bfloat16) throw std::invalid_argument("the cache holds float32, float16 or int8");
            new (self) Decoder(std::move(arch), cache, std::move(pool), integer, find_kernels(kernels));
          },
          nb::arg("table"), nb::arg("pages"), nb::arg("page_size"), nb::arg("cache_type"), nb::arg("pool"),
          nb::arg("integer"), nb::arg("kernels") = "")
      .def("step", &step, nb::arg("tokens"), nb::arg("positions"), nb::arg("query_starts"), nb::arg("known_lengths"),
           nb::arg("page_table"), nb::arg("logit_rows"), nb::arg("copies"))
      .def_prop_ro("page_bytes", [](const Decoder& d) { return d.cache().page_bytes(); })
      .def_prop_ro("weight_bytes", &Decoder::weight_bytes);
}

}  // namespace fettle
