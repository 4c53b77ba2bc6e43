// The only file that knows Python: checks every dtype, shape, stride and alias, releases the GIL, calls the kernels.
// Arguments come as arrays without conversion (a torch CPU tensor's `.numpy()` shares its memory); a wrong one raises
// ValueError with what was found and what was expected.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adamw.h"
#include "chunk_attention.h"
#include "dropout.h"
#include "embed.h"
#include "gumbel.h"
#include "linear.h"
#include "linear_bf16.h"
#include "linear_int8.h"
#include "logprob.h"
#include "philox.h"
#include "probe.h"
#include "product.h"
#include "recording.h"
#include "rms_norm.h"
#include "rms_norm_gradient.h"
#include "rope.h"
#include "rope_write.h"
#include "sample.h"
#include "swiglu.h"
#include "swiglu_gradient.h"
#include "threads.h"
#include "tree_attention.h"

namespace py = pybind11;

namespace {

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// `array` must be T and of `shape`, in which a negative size means any.
template <typename T>
void check_shape(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  if (!array.dtype().equal(py::dtype::of<T>()))
    throw py::value_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) + "; expected " +
                          std::string(py::str(py::dtype::of<T>())));
  const std::vector<py::ssize_t> found(array.shape(), array.shape() + array.ndim());
  bool same = found.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == found[i];
  if (!same)
    throw py::value_error(std::string(name) + " has shape " + shape_text(found) + "; expected " + shape_text(shape) +
                          " (-1: any)");
}

// As check_shape, and C-contiguous.
template <typename T>
void check(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  check_shape<T>(name, array, shape);
  if (!(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " has strides " +
                          shape_text({array.strides(), array.strides() + array.ndim()}) +
                          " bytes; expected a C-contiguous array");
}

// As check, for numbers that are fp32 or, as uint16, the bits of bf16: whether they are bf16.
bool check_wide(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  const bool fp32 = array.dtype().equal(py::dtype::of<float>());
  if (!fp32 && !array.dtype().equal(py::dtype::of<uint16_t>()))
    throw py::value_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) +
                          "; expected float32, or uint16 for the bits of bfloat16");
  fp32 ? check<float>(name, array, shape) : check<uint16_t>(name, array, shape);
  return !fp32;
}

// Pages of keys and values, both fp32 or both bf16: whether they are bf16.
bool check_pages(const py::array& keys, const py::array& values, py::ssize_t dim) {
  const bool bf16 = check_wide("key_pages", keys, {-1, -1, dim, -1});
  const std::vector<py::ssize_t> shape{keys.shape(0), keys.shape(1), keys.shape(3), dim};
  bf16 ? check<uint16_t>("value_pages", values, shape) : check<float>("value_pages", values, shape);
  return bf16;
}

// fp32 of `shape`, whose rows (the first index) are contiguous and may lie apart: the floats from a row to the next.
int64_t check_rows(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  check_shape<float>(name, array, shape);
  if (array.size() == 0) return 0;
  py::ssize_t floats = 1;
  bool contiguous = true;
  for (py::ssize_t i = array.ndim() - 1; i > 0; floats *= array.shape(i--))
    contiguous = contiguous && (array.shape(i) <= 1 || array.strides(i) == floats * py::ssize_t(sizeof(float)));
  const py::ssize_t stride = array.shape(0) <= 1 ? floats * py::ssize_t(sizeof(float)) : array.strides(0);
  if (!contiguous || stride < floats * py::ssize_t(sizeof(float)) || stride % py::ssize_t(sizeof(float)))
    throw py::value_error(std::string(name) + " has strides " +
                          shape_text({array.strides(), array.strides() + array.ndim()}) +
                          " bytes; expected contiguous rows, one behind the other");
  return stride / py::ssize_t(sizeof(float));
}

void check_written(const char* name, const py::array& array) {
  if (!array.writeable()) throw py::value_error(std::string(name) + " is read-only; expected a writeable array");
}

// From the first byte of an array without negative strides to behind its last.
py::ssize_t span(const py::array& array) {
  py::ssize_t last = 0;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) last += (array.shape(i) - 1) * array.strides(i);
  return array.size() ? last + array.itemsize() : 0;
}

// `out` is written while `in` is read: they must not share memory.
void check_apart(const char* in_name, const py::array& in, const char* out_name, const py::array& out) {
  const char *a = static_cast<const char*>(in.data()), *b = static_cast<const char*>(out.data());
  if (a < b + span(out) && b < a + span(in))
    throw py::value_error(std::string(out_name) + " shares memory with " + in_name + "; expected memory of its own");
}

[[noreturn]] void refuse(const std::string& name, const std::string& found, const std::string& expected) {
  throw py::value_error(name + " is " + found + "; expected " + expected);
}

std::string at(const char* name, int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected at least 1");
}

using Named = std::pair<const char*, const py::array*>;

// Every output is writeable and shares no memory with an input or another output.
void check_outputs(const std::vector<Named>& inputs, const std::vector<Named>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_written(outputs[i].first, *outputs[i].second);
    for (const auto& input : inputs) check_apart(input.first, *input.second, outputs[i].first, *outputs[i].second);
    for (size_t j = 0; j < i; ++j)
      check_apart(outputs[j].first, *outputs[j].second, outputs[i].first, *outputs[i].second);
  }
}

const float* floats(const py::array& array) { return static_cast<const float*>(array.data()); }

// The level called `name`, or the fastest for an empty one; `at(i)` is the i-th that this CPU runs, the last is
// portable.
template <typename Level>
Level find_level(Level (*at)(int), const std::string& name) {
  std::string known;
  for (int i = 0;; ++i) {
    const Level level = at(i);
    if (!*level.name) throw py::value_error("level is '" + name + "'; this CPU runs " + known);
    if (name.empty() || name == level.name) return level;
    known += (i ? ", " : "") + std::string(level.name);
  }
}

template <typename Level>
py::list level_names(Level (*at)(int)) {
  py::list names;
  for (int i = 0; *at(i).name; ++i) names.append(at(i).name);
  return names;
}

// The calls of a forward of `rows` rows; while it is entered, this thread's calls of the sampler's kernels are kept in
// it instead of being made. It holds the arrays that they read from the model, which must stay where they are; the
// caller holds the rows' memory and the pages.
class Recording {
 public:
  Recording(const py::array& tokens, const py::array& positions) : tokens_(tokens), positions_(positions) {
    check<int64_t>("tokens", tokens, {-1});
    check<int64_t>("positions", positions, {tokens.shape(0)});
    if (rows() < 1) refuse("tokens", "empty", "room for a row at least");
  }

  int64_t rows() const { return tokens_.shape(0); }

  // Memory in which the calls' rows lie.
  void own(const py::array& memory) {
    const char* begin = static_cast<const char*>(memory.data());
    owned_.push_back({begin, begin + span(memory)});
  }

  void enter() {
    if (current) throw py::value_error("this thread records already; expected one recording at a time");
    current = this;
  }
  void exit() {
    if (current == this) current = nullptr;
  }
  ~Recording() { exit(); }

  // all: rows that a call reads and writes; model: what it reads beside them.
  void add(std::initializer_list<Named> all, std::initializer_list<const py::array*> model, int64_t found,
           selfreward::Call call) {
    if (found != rows()) refuse("a recorded call's rows", std::to_string(found), std::to_string(rows()));
    for (const auto& [name, array] : all) {
      const char *begin = static_cast<const char*>(array->data()), *end = begin + span(*array);
      const auto holds = [&](const auto& range) { return range.first <= begin && end <= range.second; };
      if (std::none_of(owned_.begin(), owned_.end(), holds))
        refuse(name, "in other memory", "memory of the recording's rows: something in between was not recorded");
    }
    for (const py::array* array : model) model_.push_back(*array);
    calls_.push_back(std::move(call));
  }

  // The call that gathers rows of a table by the step's tokens or positions, whichever `ids` are.
  void add_embed(const py::array& ids, const py::array& table, const py::array& out,
                 const selfreward::EmbedArguments& arguments, selfreward::EmbedRows run) {
    const bool by_tokens = ids.data() == tokens_.data();
    if (!by_tokens && ids.data() != positions_.data())
      refuse("tokens", "another array", "the recording's tokens or positions");
    int64_t& limit = by_tokens ? vocab_ : longest_;
    limit = std::min<int64_t>(limit, table.shape(0));
    add({{"out", &out}}, {&table}, arguments.rows, [=](const selfreward::Step& step) {
      selfreward::EmbedArguments now = arguments;
      now.rows = step.rows, now.tokens = by_tokens ? step.tokens : step.positions;
      selfreward::embed(now, step.threads, run);
    });
  }

  // All pages have the same number of blocks, and of slots in a block. lists: what a replay has its own of, so empty.
  void add_pages(int64_t blocks, int64_t size, const py::array& lists) {
    if (lists.size()) refuse("a recorded call's items or copies", shape_text({lists.shape(0)}), "none");
    if (blocks_ >= 0 && (blocks != blocks_ || size != size_))
      refuse("key_pages", std::to_string(blocks) + " blocks of " + std::to_string(size),
             std::to_string(blocks_) + " of " + std::to_string(size_) + ", as in the calls before");
    blocks_ = blocks, size_ = size;
  }

  void check_positions(const py::array& positions) const {
    if (positions.data() != positions_.data()) refuse("positions", "another array", "the recording's positions");
  }

  void replay(const py::array& tokens, const py::array& positions, const py::array& slots, const py::array& copies,
              const py::array& items, int threads) const;

  static thread_local Recording* current;

 private:
  py::array tokens_, positions_;
  std::vector<std::pair<const char*, const char*>> owned_;
  std::vector<py::array> model_;
  std::vector<selfreward::Call> calls_;
  int64_t vocab_ = INT64_MAX, longest_ = INT64_MAX, blocks_ = -1, size_ = 0;
};
thread_local Recording* Recording::current = nullptr;

// Makes the call, or keeps it if this thread records.
template <typename Arguments, typename Run>
void make(std::initializer_list<Named> rows, std::initializer_list<const py::array*> model, const Arguments& arguments,
          int threads, const Run& run) {
  if (Recording::current)
    return Recording::current->add(rows, model, arguments.rows, selfreward::call_of(arguments, run));
  py::gil_scoped_release release;
  run(arguments, threads);
}

py::list instruction_levels() { return level_names(selfreward::gumbel_level); }
py::list linear_bf16_levels() { return level_names(selfreward::linear_bf16_level); }
py::list linear_int8_levels() { return level_names(selfreward::linear_int8_level); }

void gumbel_noise(const py::array& seeds, const py::array& positions, const py::array& candidates, uint32_t stream,
                  py::array& out, const std::string& level) {
  check<float>("out", out, {-1, -1});
  check_written("out", out);
  const py::ssize_t rows = out.shape(0), vocab = out.shape(1);
  check<uint64_t>("seeds", seeds, {rows});
  check<uint32_t>("positions", positions, {rows});
  check<uint32_t>("candidates", candidates, {rows});
  check_apart("seeds", seeds, "out", out);
  check_apart("positions", positions, "out", out);
  check_apart("candidates", candidates, "out", out);
  const selfreward::GumbelRow fill = find_level(selfreward::gumbel_level, level).row;
  const auto* seed = static_cast<const uint64_t*>(seeds.data());
  const auto* position = static_cast<const uint32_t*>(positions.data());
  const auto* candidate = static_cast<const uint32_t*>(candidates.data());
  auto* noise = static_cast<float*>(out.mutable_data());
  py::gil_scoped_release release;
  for (py::ssize_t row = 0; row < rows; ++row)
    fill(seed[row], position[row], candidate[row], stream, vocab, noise + row * vocab);
}

void dropout_mask(uint64_t key, const py::array& segments, const py::array& positions, uint32_t site,
                  uint32_t threshold, py::array& out) {
  check<bool>("out", out, {-1, -1});
  check_written("out", out);
  const py::ssize_t rows = out.shape(0), units = out.shape(1);
  check<uint64_t>("segments", segments, {rows});
  check<uint32_t>("positions", positions, {rows});
  check_apart("segments", segments, "out", out);
  check_apart("positions", positions, "out", out);
  const auto* segment = static_cast<const uint64_t*>(segments.data());
  const auto* position = static_cast<const uint32_t*>(positions.data());
  auto* mask = static_cast<uint8_t*>(out.mutable_data());  // numpy's bool is one byte, 0 or 1
  py::gil_scoped_release release;
  for (py::ssize_t row = 0; row < rows; ++row)
    selfreward::dropout_row(key, segment[row], position[row], site, threshold, units, mask + row * units);
}

// The number of panels of `packed`, checked to be T, of `inner` shape and to hold `outputs` from the `first` on.
template <typename T>
int64_t check_panels(const py::array& packed, const std::vector<py::ssize_t>& inner, int64_t first, int64_t outputs) {
  std::vector<py::ssize_t> shape{-1};
  shape.insert(shape.end(), inner.begin(), inner.end());
  check<T>("packed", packed, shape);
  if (first < 0) throw py::value_error("first is " + std::to_string(first) + "; expected 0 or more");
  shape[0] = (first + outputs + selfreward::kPanel - 1) / selfreward::kPanel;
  if (packed.shape(0) < shape[0])
    throw py::value_error("packed has shape " + shape_text({packed.shape(), packed.shape() + packed.ndim()}) +
                          "; expected " + shape_text(shape) + " or more panels for the outputs " +
                          std::to_string(first) + " to " + std::to_string(first + outputs));
  return packed.shape(0);
}

void linear_pack(const py::array& weight, py::array& packed, int64_t first) {
  check<float>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  check_panels<float>(packed, {depth, selfreward::kPanel}, first, outputs);
  check_written("packed", packed);
  check_apart("weight", weight, "packed", packed);
  const auto* from = static_cast<const float*>(weight.data());
  auto* to = static_cast<float*>(packed.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_pack(from, outputs, depth, first, to);
}

void linear_unpack(const py::array& packed, py::array& weight, int64_t first) {
  check<float>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  check_panels<float>(packed, {depth, selfreward::kPanel}, first, outputs);
  check_written("weight", weight);
  check_apart("packed", packed, "weight", weight);
  const auto* from = static_cast<const float*>(packed.data());
  auto* to = static_cast<float*>(weight.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_unpack(from, outputs, depth, first, to);
}

// x [rows, depth] and out [rows, outputs] of a linear, and of packed all but its units: returned as far as they are
// known without them.
selfreward::LinearArguments check_linear(const py::array& x, const py::array& packed, py::array& out, int threads) {
  check<float>("x", x, {-1, -1});
  const py::ssize_t rows = x.shape(0), depth = x.shape(1);
  if (depth < 1) throw py::value_error("x has shape " + shape_text({rows, depth}) + "; expected at least one column");
  check<float>("out", out, {rows, -1});
  check_written("out", out);
  check_apart("x", x, "out", out);
  check_apart("packed", packed, "out", out);
  check_threads(threads);
  return {x.data(), packed.data(), static_cast<float*>(out.mutable_data()), rows, out.shape(1), depth};
}

// fp32 of two dimensions, one of them contiguous and the other's lines apart.
selfreward::Matrix check_matrix(const char* name, const py::array& array) {
  check_shape<float>(name, array, {-1, -1});
  const auto* data = static_cast<const float*>(array.data());
  for (const int lines : {0, 1}) {
    const py::ssize_t length = array.shape(1 - lines), line = py::ssize_t(sizeof(float));
    const py::ssize_t stride = array.shape(lines) <= 1 ? length * line : array.strides(lines);
    if ((length <= 1 || array.strides(1 - lines) == line) && stride >= length * line && stride % line == 0)
      return {data, stride / line, lines == 1};
  }
  throw py::value_error(std::string(name) + " has strides " +
                        shape_text({array.strides(), array.strides() + array.ndim()}) +
                        " bytes; expected contiguous rows or contiguous columns");
}

void product(const py::array& a, const py::array& b, py::array& out, bool add, int threads, const std::string& level) {
  const selfreward::Matrix left = check_matrix("a", a), right = check_matrix("b", b);
  const py::ssize_t rows = a.shape(0), depth = a.shape(1);
  check_shape<float>("b", b, {depth, -1});
  const int64_t stride = check_rows("out", out, {rows, b.shape(1)});
  if (depth < 1) throw py::value_error("a has shape " + shape_text({rows, depth}) + "; expected at least one column");
  check_written("out", out);
  check_apart("a", a, "out", out);
  check_apart("b", b, "out", out);
  check_threads(threads);
  const selfreward::ProductRun run = find_level(selfreward::product_level, level).run;
  auto* to = static_cast<float*>(out.mutable_data());
  const py::ssize_t columns = b.shape(1);
  py::gil_scoped_release release;
  selfreward::product(left, right, to, stride, rows, columns, depth, add, threads, run);
}

py::ssize_t panels_of(py::ssize_t outputs) { return (outputs + selfreward::kPanel - 1) / selfreward::kPanel; }

void linear(const py::array& x, const py::array& packed, py::array& out, int threads, const std::string& level) {
  const selfreward::LinearArguments arguments = check_linear(x, packed, out, threads);
  check<float>("packed", packed, {panels_of(arguments.outputs), arguments.units, selfreward::kPanel});
  const selfreward::LinearPanels panels = find_level(selfreward::linear_level, level).run;
  make({{"x", &x}, {"out", &out}}, {&packed}, arguments, threads,
       [=](const auto& a, int count) { selfreward::linear(a, count, panels); });
}

void linear_pack_bf16(const py::array& weight, py::array& packed, int64_t first) {
  check<uint16_t>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  check_panels<uint16_t>(packed, {(depth + 1) / 2, selfreward::kPanel, 2}, first, outputs);
  check_written("packed", packed);
  check_apart("weight", weight, "packed", packed);
  const auto* from = static_cast<const uint16_t*>(weight.data());
  auto* to = static_cast<uint16_t*>(packed.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_pack_bf16(from, outputs, depth, first, to);
}

void linear_unpack_bf16(const py::array& packed, py::array& weight, int64_t first) {
  check<uint16_t>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  check_panels<uint16_t>(packed, {(depth + 1) / 2, selfreward::kPanel, 2}, first, outputs);
  check_written("weight", weight);
  check_apart("packed", packed, "weight", weight);
  const auto* from = static_cast<const uint16_t*>(packed.data());
  auto* to = static_cast<uint16_t*>(weight.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_unpack_bf16(from, outputs, depth, first, to);
}

void linear_bf16(const py::array& x, const py::array& packed, py::array& out, int threads, const std::string& level) {
  selfreward::LinearArguments arguments = check_linear(x, packed, out, threads);
  const int64_t depth = arguments.units;
  arguments.units = (depth + 1) / 2;
  check<uint16_t>("packed", packed, {panels_of(arguments.outputs), arguments.units, selfreward::kPanel, 2});
  const selfreward::LinearKernel kernel = find_level(selfreward::linear_bf16_level, level).run;
  const auto* rows = static_cast<const float*>(x.data());
  make({{"x", &x}, {"out", &out}}, {&packed}, arguments, threads,
       [=](const auto& a, int count) { selfreward::linear_prepared(rows, depth, 0, a, count, kernel); });
}

py::ssize_t int8_units(py::ssize_t depth) {
  return (depth + selfreward::kInt8Group - 1) / selfreward::kInt8Group * selfreward::kInt8Group / 4;
}

void linear_pack_int8(const py::array& weight, py::array& packed, py::array& scales, int64_t first) {
  check<float>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  const int64_t panels = check_panels<uint8_t>(packed, {int8_units(depth), selfreward::kPanel, 4}, first, outputs);
  check<float>("scales", scales, {panels * selfreward::kPanel});
  check_written("packed", packed);
  check_written("scales", scales);
  check_apart("weight", weight, "packed", packed);
  check_apart("weight", weight, "scales", scales);
  check_apart("packed", packed, "scales", scales);
  const auto* from = static_cast<const float*>(weight.data());
  auto* to = static_cast<uint8_t*>(packed.mutable_data());
  auto* scale = static_cast<float*>(scales.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_pack_int8(from, outputs, depth, first, to, scale);
}

void linear_int8(const py::array& x, const py::array& packed, const py::array& scales, py::array& out, int threads,
                 const std::string& level) {
  selfreward::LinearArguments arguments = check_linear(x, packed, out, threads);
  const int64_t depth = arguments.units, panels = panels_of(arguments.outputs);
  arguments.units = int8_units(depth);
  check<uint8_t>("packed", packed, {panels, arguments.units, selfreward::kPanel, 4});
  check<float>("scales", scales, {panels * selfreward::kPanel});
  check_apart("scales", scales, "out", out);
  arguments.scales = static_cast<const float*>(scales.data());
  const selfreward::LinearKernel kernel = find_level(selfreward::linear_int8_level, level).run;
  const auto* rows = static_cast<const float*>(x.data());
  const int64_t groups = arguments.units * 4 / selfreward::kInt8Group;
  make({{"x", &x}, {"out", &out}}, {&packed, &scales}, arguments, threads,
       [=](const auto& a, int count) { selfreward::linear_prepared(rows, depth, groups, a, count, kernel); });
}

void rms_norm(const py::array& x, const py::array& weight, float eps, py::array& out, int threads,
              const std::string& level) {
  check<float>("x", x, {-1, -1});
  const py::ssize_t rows = x.shape(0), dim = x.shape(1);
  check<float>("weight", weight, {dim});
  check<float>("out", out, {rows, dim});
  check_written("out", out);
  check_apart("x", x, "out", out);
  check_apart("weight", weight, "out", out);
  check_threads(threads);
  const selfreward::RmsNormRows run = find_level(selfreward::rms_norm_level, level).run;
  const selfreward::RmsNormArguments arguments{static_cast<const float*>(x.data()),
                                               nullptr,
                                               static_cast<const float*>(weight.data()),
                                               nullptr,
                                               static_cast<float*>(out.mutable_data()),
                                               rows,
                                               dim,
                                               eps};
  make({{"x", &x}, {"out", &out}}, {&weight}, arguments, threads,
       [=](const auto& a, int count) { selfreward::rms_norm(a, count, run); });
}

void add_rms_norm(const py::array& x, const py::array& branch, const py::array& weight, float eps, py::array& out_sum,
                  py::array& out_norm, int threads, const std::string& level) {
  check<float>("x", x, {-1, -1});
  const py::ssize_t rows = x.shape(0), dim = x.shape(1);
  check<float>("branch", branch, {rows, dim});
  check<float>("weight", weight, {dim});
  check<float>("out_sum", out_sum, {rows, dim});
  check<float>("out_norm", out_norm, {rows, dim});
  const std::pair<const char*, const py::array*> outputs[] = {{"out_sum", &out_sum}, {"out_norm", &out_norm}};
  for (const auto& [name, out] : outputs) {
    check_written(name, *out);
    check_apart("x", x, name, *out);
    check_apart("branch", branch, name, *out);
    check_apart("weight", weight, name, *out);
  }
  check_apart("out_sum", out_sum, "out_norm", out_norm);
  check_threads(threads);
  const selfreward::RmsNormRows run = find_level(selfreward::rms_norm_level, level).run;
  const selfreward::RmsNormArguments arguments{static_cast<const float*>(x.data()),
                                               static_cast<const float*>(branch.data()),
                                               static_cast<const float*>(weight.data()),
                                               static_cast<float*>(out_sum.mutable_data()),
                                               static_cast<float*>(out_norm.mutable_data()),
                                               rows,
                                               dim,
                                               eps};
  make({{"x", &x}, {"branch", &branch}, {"out_sum", &out_sum}, {"out_norm", &out_norm}}, {&weight}, arguments, threads,
       [=](const auto& a, int count) { selfreward::rms_norm(a, count, run); });
}

void swiglu(const py::array& gate_up, py::array& out, int threads, const std::string& level) {
  check<float>("out", out, {-1, -1});
  const py::ssize_t rows = out.shape(0), ffn = out.shape(1);
  check<float>("gate_up", gate_up, {rows, 2 * ffn});
  check_written("out", out);
  check_apart("gate_up", gate_up, "out", out);
  check_threads(threads);
  const selfreward::SwigluRows run = find_level(selfreward::swiglu_level, level).run;
  const selfreward::SwigluArguments arguments{static_cast<const float*>(gate_up.data()),
                                              static_cast<float*>(out.mutable_data()), rows, ffn};
  make({{"gate_up", &gate_up}, {"out", &out}}, {}, arguments, threads,
       [=](const auto& a, int count) { selfreward::swiglu(a, count, run); });
}

void check_heads(py::ssize_t heads, py::ssize_t groups) {
  if (groups < 1 || heads < 1 || heads % groups)
    throw py::value_error("q has " + std::to_string(heads) + " heads; expected a multiple of key_pages' " +
                          std::to_string(groups) + " groups");
}

// Every item names a page and rows, and the items of a row are its chunks 0, 1, ... up to its position's, in this
// order.
void check_items(const selfreward::ChunkAttentionArguments& a, int64_t blocks) {
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.positions[row] < 0)
      throw py::value_error("positions[" + std::to_string(row) + "] is " + std::to_string(a.positions[row]) +
                            "; expected 0 or more");
  std::vector<int64_t> next(size_t(a.rows), 0);  // chunk of each row
  for (int64_t i = 0; i < a.item_count; ++i) {
    const int64_t *item = a.items + 4 * i, page = item[0], chunk = item[1], first = item[2], last = item[3];
    const std::string name = "items[" + std::to_string(i) + "]";
    if (page < 0 || page >= blocks)
      throw py::value_error(name + " has page " + std::to_string(page) + "; expected 0 or more and below " +
                            std::to_string(blocks) + ", the blocks of key_pages");
    if (first < 0 || first >= last || last > a.rows)
      throw py::value_error(name + " has rows " + std::to_string(first) + " to " + std::to_string(last) +
                            "; expected at least one of the " + std::to_string(a.rows) + " rows of q");
    for (int64_t row = first; row < last; ++row)
      if (next[size_t(row)]++ != chunk)
        throw py::value_error(name + " has chunk " + std::to_string(chunk) + "; expected " +
                              std::to_string(next[size_t(row)] - 1) + ", the next one of row " + std::to_string(row));
  }
  for (int64_t row = 0; row < a.rows; ++row)
    if (next[size_t(row)] != a.positions[row] / a.size + 1)
      throw py::value_error("items have " + std::to_string(next[size_t(row)]) + " chunks of row " +
                            std::to_string(row) + "; expected " + std::to_string(a.positions[row] / a.size + 1) +
                            " of " + std::to_string(a.size) + " slots for its position " +
                            std::to_string(a.positions[row]));
}

void chunk_attention(const py::array& q, const py::array& key_pages, const py::array& value_pages,
                     const py::array& items, const py::array& positions, py::array& out, int threads,
                     const std::string& level) {
  check<float>("q", q, {-1, -1, -1});
  const py::ssize_t rows = q.shape(0), heads = q.shape(1), dim = q.shape(2);
  const bool bf16 = check_pages(key_pages, value_pages, dim);
  const py::ssize_t blocks = key_pages.shape(0), groups = key_pages.shape(1), size = key_pages.shape(3);
  check<int64_t>("items", items, {-1, 4});
  check<int64_t>("positions", positions, {rows});
  check<float>("out", out, {rows, heads, dim});
  check_written("out", out);
  if (dim < 1 || size < 1)
    throw py::value_error("key_pages has shape " + shape_text({blocks, groups, dim, size}) +
                          "; expected at least one feature and one slot");
  check_heads(heads, groups);
  check_apart("q", q, "out", out);
  check_apart("key_pages", key_pages, "out", out);
  check_apart("value_pages", value_pages, "out", out);
  check_apart("items", items, "out", out);
  check_apart("positions", positions, "out", out);
  check_threads(threads);
  const selfreward::ChunkAttentionRun run = find_level(selfreward::chunk_attention_level, level).run;
  const selfreward::ChunkAttentionArguments arguments{static_cast<const float*>(q.data()),
                                                      key_pages.data(),
                                                      value_pages.data(),
                                                      bf16,
                                                      static_cast<const int64_t*>(items.data()),
                                                      static_cast<const int64_t*>(positions.data()),
                                                      static_cast<float*>(out.mutable_data()),
                                                      rows,
                                                      heads,
                                                      groups,
                                                      dim,
                                                      size,
                                                      items.shape(0)};
  if (Recording::current) {
    Recording::current->check_positions(positions);
    Recording::current->add_pages(blocks, size, items);
  } else {
    check_items(arguments, blocks);
  }
  make({{"q", &q}, {"out", &out}}, {}, arguments, threads,
       [=](const auto& a, int count) { selfreward::chunk_attention(a, count, run); });
}

void check_places(const selfreward::RopeWriteArguments& a, int64_t blocks) {
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.slots[row] < 0 || a.slots[row] >= blocks * a.size)
      throw py::value_error("slots[" + std::to_string(row) + "] is " + std::to_string(a.slots[row]) +
                            "; expected 0 or more and below " + std::to_string(blocks * a.size) + ", the " +
                            std::to_string(blocks) + " blocks of " + std::to_string(a.size) + " slots");
  for (int64_t i = 0; i < a.copy_count; ++i) {
    const int64_t *copy = a.copies + 3 * i, source = copy[0], target = copy[1], tokens = copy[2];
    const std::string name = "copies[" + std::to_string(i) + "]";
    for (const int64_t block : {source, target})
      if (block < 0 || block >= blocks)
        throw py::value_error(name + " has block " + std::to_string(block) + "; expected 0 or more and below " +
                              std::to_string(blocks) + ", the blocks of key_pages");
    if (source == target)
      throw py::value_error(name + " has source " + std::to_string(source) + " and target " + std::to_string(target) +
                            "; expected two blocks");
    if (tokens < 0 || tokens > a.size)
      throw py::value_error(name + " has " + std::to_string(tokens) + " tokens; expected 0 to " +
                            std::to_string(a.size) + ", the slots of a block");
  }
}

void rope_write(const py::array& q, const py::array& k, const py::array& v, const py::array& cos, const py::array& sin,
                py::array& key_pages, py::array& value_pages, const py::array& slots, const py::array& copies,
                py::array& out, int threads, const std::string& level) {
  check<float>("out", out, {-1, -1, -1});
  const py::ssize_t rows = out.shape(0), heads = out.shape(1), dim = out.shape(2);
  const bool bf16 = check_pages(key_pages, value_pages, dim);
  const py::ssize_t blocks = key_pages.shape(0), groups = key_pages.shape(1), size = key_pages.shape(3);
  const int64_t q_stride = check_rows("q", q, {rows, heads, dim});
  const int64_t k_stride = check_rows("k", k, {rows, groups, dim});
  const int64_t v_stride = check_rows("v", v, {rows, groups, dim});
  if (dim < 2 || dim % 2 || size < 1)
    throw py::value_error("key_pages has shape " + shape_text({blocks, groups, dim, size}) +
                          "; expected an even number of features and at least one slot");
  check<float>("cos", cos, {rows, dim / 2});
  check<float>("sin", sin, {rows, dim / 2});
  check<int64_t>("slots", slots, {rows});
  check<int64_t>("copies", copies, {-1, 3});
  check_heads(heads, groups);
  check_threads(threads);
  const std::pair<const char*, py::array*> written[] = {
      {"key_pages", &key_pages}, {"value_pages", &value_pages}, {"out", &out}};
  const std::pair<const char*, const py::array*> read[] = {
      {"q", &q}, {"k", &k}, {"v", &v}, {"cos", &cos}, {"sin", &sin}, {"slots", &slots}, {"copies", &copies}};
  for (const auto& [out_name, to] : written) {
    check_written(out_name, *to);
    for (const auto& [in_name, from] : read) check_apart(in_name, *from, out_name, *to);
  }
  check_apart("key_pages", key_pages, "value_pages", value_pages);
  check_apart("key_pages", key_pages, "out", out);
  check_apart("value_pages", value_pages, "out", out);
  const selfreward::RopeWriteRows run = find_level(selfreward::rope_write_level, level).run;
  const selfreward::RopeWriteArguments arguments{static_cast<const float*>(q.data()),
                                                 static_cast<const float*>(k.data()),
                                                 static_cast<const float*>(v.data()),
                                                 q_stride,
                                                 k_stride,
                                                 v_stride,
                                                 static_cast<const float*>(cos.data()),
                                                 static_cast<const float*>(sin.data()),
                                                 key_pages.mutable_data(),
                                                 value_pages.mutable_data(),
                                                 bf16,
                                                 static_cast<const int64_t*>(slots.data()),
                                                 static_cast<const int64_t*>(copies.data()),
                                                 static_cast<float*>(out.mutable_data()),
                                                 rows,
                                                 heads,
                                                 groups,
                                                 dim,
                                                 size,
                                                 copies.shape(0)};
  if (Recording::current)
    Recording::current->add_pages(blocks, size, copies);
  else
    check_places(arguments, blocks);
  make({{"q", &q}, {"k", &k}, {"v", &v}, {"cos", &cos}, {"sin", &sin}, {"out", &out}}, {}, arguments, threads,
       [=](const auto& a, int count) { selfreward::rope_write(a, count, run); });
}

std::string number_text(double value) { return std::string(py::str(py::float_(value))); }

// `offsets` cut the `count` entries of `values` into rows, and every entry is an id below `width`.
void check_ragged(const char* offsets_name, const int64_t* offsets, int64_t rows, const char* name,
                  const int64_t* values, int64_t count, int64_t width) {
  if (offsets[0] != 0) refuse(at(offsets_name, 0), std::to_string(offsets[0]), "0");
  for (int64_t row = 0; row < rows; ++row)
    if (offsets[row + 1] < offsets[row])
      refuse(at(offsets_name, row + 1), std::to_string(offsets[row + 1]),
             "at least " + std::to_string(offsets[row]) + ", the one before");
  if (offsets[rows] != count)
    refuse(at(offsets_name, rows), std::to_string(offsets[rows]),
           std::to_string(count) + ", the length of " + std::string(name));
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= width)
      refuse(at(name, i), std::to_string(values[i]),
             "0 or more and below " + std::to_string(width) + ", the columns of logits");
}

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit)
      refuse(at(name, i), std::to_string(ids[i]),
             "0 or more and below " + std::to_string(limit) + ", the rows of table");
}

void embed(const py::array& tokens, const py::array& table, py::array& out, int threads, const std::string& level) {
  check<int64_t>("tokens", tokens, {-1});
  const bool bf16 = check_wide("table", table, {-1, -1});
  const py::ssize_t rows = tokens.shape(0), vocab = table.shape(0), dim = table.shape(1);
  check<float>("out", out, {rows, dim});
  check_written("out", out);
  check_apart("tokens", tokens, "out", out);
  check_apart("table", table, "out", out);
  check_threads(threads);
  const auto* ids = static_cast<const int64_t*>(tokens.data());
  const selfreward::EmbedRows run = find_level(selfreward::embed_level, level).run;
  const selfreward::EmbedArguments arguments{ids,  table.data(), bf16, static_cast<float*>(out.mutable_data()),
                                             rows, dim};
  if (Recording::current) return Recording::current->add_embed(tokens, table, out, arguments, run);
  check_ids("tokens", ids, rows, vocab);
  py::gil_scoped_release release;
  selfreward::embed(arguments, threads, run);
}

void Recording::replay(const py::array& tokens, const py::array& positions, const py::array& slots,
                       const py::array& copies, const py::array& items, int threads) const {
  check<int64_t>("tokens", tokens, {-1});
  const py::ssize_t count = tokens.shape(0);
  if (count > rows())
    refuse("tokens", shape_text({count}), "at most " + std::to_string(rows()) + ", the rows of the recording");
  check<int64_t>("positions", positions, {count});
  check<int64_t>("slots", slots, {count});
  check<int64_t>("copies", copies, {-1, 3});
  check<int64_t>("items", items, {-1, 4});
  check_threads(threads);
  selfreward::Step step{};
  step.rows = count;
  step.tokens = static_cast<const int64_t*>(tokens.data());
  step.positions = static_cast<const int64_t*>(positions.data());
  step.slots = static_cast<const int64_t*>(slots.data());
  step.items = static_cast<const int64_t*>(items.data()), step.item_count = items.shape(0);
  step.copies = static_cast<const int64_t*>(copies.data()), step.copy_count = copies.shape(0);
  step.threads = threads;
  check_ids("tokens", step.tokens, count, vocab_);
  check_ids("positions", step.positions, count, longest_);
  if (blocks_ >= 0) {
    selfreward::RopeWriteArguments written{};
    written.size = size_;
    selfreward::set_step(written, step);
    check_places(written, blocks_);
    selfreward::ChunkAttentionArguments read{};
    read.size = size_;
    selfreward::set_step(read, step);
    check_items(read, blocks_);
  }
  py::gil_scoped_release release;
  for (const selfreward::Call& call : calls_) call(step);
}

void rms_norm_gradient(const py::array& x, const py::array& weight, float eps, const py::array& dy,
                       const std::optional<py::array>& dsum, py::array& dx, py::array& dweight, int threads,
                       const std::string& level) {
  check<float>("x", x, {-1, -1});
  const py::ssize_t rows = x.shape(0), dim = x.shape(1);
  if (dim < 1) refuse("x", shape_text({rows, dim}), "at least one column");
  check<float>("weight", weight, {dim});
  check<float>("dy", dy, {rows, dim});
  check<float>("dx", dx, {rows, dim});
  check<float>("dweight", dweight, {dim});
  if (dsum) check<float>("dsum", *dsum, {rows, dim});
  std::vector<Named> inputs{{"x", &x}, {"weight", &weight}, {"dy", &dy}};
  if (dsum) inputs.emplace_back("dsum", &*dsum);
  check_outputs(inputs, {{"dx", &dx}, {"dweight", &dweight}});
  check_threads(threads);
  const selfreward::RmsNormGradientBlocks run = find_level(selfreward::rms_norm_gradient_level, level).run;
  std::vector<float> parts(size_t((rows + selfreward::kNormBlock - 1) / selfreward::kNormBlock * dim));
  const selfreward::RmsNormGradientArguments arguments{floats(x),
                                                       floats(weight),
                                                       floats(dy),
                                                       dsum ? floats(*dsum) : nullptr,
                                                       static_cast<float*>(dx.mutable_data()),
                                                       parts.data(),
                                                       rows,
                                                       dim,
                                                       eps};
  auto* to = static_cast<float*>(dweight.mutable_data());
  py::gil_scoped_release release;
  selfreward::rms_norm_gradient(arguments, to, threads, run);
}

void swiglu_gradient(const py::array& gate_up, const py::array& dout, py::array& dgate_up, int threads,
                     const std::string& level) {
  check<float>("dout", dout, {-1, -1});
  const py::ssize_t rows = dout.shape(0), ffn = dout.shape(1);
  check<float>("gate_up", gate_up, {rows, 2 * ffn});
  check<float>("dgate_up", dgate_up, {rows, 2 * ffn});
  check_outputs({{"gate_up", &gate_up}, {"dout", &dout}}, {{"dgate_up", &dgate_up}});
  check_threads(threads);
  const selfreward::SwigluGradientRows run = find_level(selfreward::swiglu_gradient_level, level).run;
  const selfreward::SwigluGradientArguments arguments{floats(gate_up), floats(dout),
                                                      static_cast<float*>(dgate_up.mutable_data()), rows, ffn};
  py::gil_scoped_release release;
  selfreward::swiglu_gradient(arguments, threads, run);
}

void rope(const py::array& x, const py::array& cos, const py::array& sin, py::array& out, bool back, int threads,
          const std::string& level) {
  check<float>("out", out, {-1, -1, -1});
  const py::ssize_t rows = out.shape(0), heads = out.shape(1), dim = out.shape(2);
  if (dim % 2) refuse("out", shape_text({rows, heads, dim}), "an even last dimension");
  const int64_t stride = check_rows("x", x, {rows, heads, dim});
  check<float>("cos", cos, {rows, dim / 2});
  check<float>("sin", sin, {rows, dim / 2});
  check_outputs({{"x", &x}, {"cos", &cos}, {"sin", &sin}}, {{"out", &out}});
  check_threads(threads);
  const selfreward::RopeRows run = find_level(selfreward::rope_level, level).run;
  const selfreward::RopeArguments arguments{
      floats(x), stride, floats(cos), floats(sin), static_cast<float*>(out.mutable_data()), rows, heads, dim, back};
  py::gil_scoped_release release;
  selfreward::rope(arguments, threads, run);
}

// A tile of logits, whose rows may lie apart, and what log-probs and their gradient have in common.
selfreward::LogprobArguments check_tile(const py::array& logits, const py::array& targets, int threads) {
  selfreward::LogprobArguments a{};
  a.stride = check_rows("logits", logits, {-1, -1});
  a.rows = logits.shape(0), a.columns = logits.shape(1);
  check<int64_t>("targets", targets, {a.rows});
  check_threads(threads);
  a.targets = static_cast<const int64_t*>(targets.data());
  return a;
}

void logprob(const py::array& logits, const py::array& targets, int64_t first, py::array& best, py::array& total,
             py::array& hit, int threads, const std::string& level) {
  selfreward::LogprobArguments a = check_tile(logits, targets, threads);
  check<float>("best", best, {a.rows});
  check<double>("total", total, {a.rows});
  check<float>("hit", hit, {a.rows});
  check_outputs({{"logits", &logits}, {"targets", &targets}}, {{"best", &best}, {"total", &total}, {"hit", &hit}});
  a.logits = const_cast<float*>(floats(logits));  // read only
  a.first = first;
  a.best = static_cast<float*>(best.mutable_data());
  a.total = static_cast<double*>(total.mutable_data());
  a.hit = static_cast<float*>(hit.mutable_data());
  const selfreward::LogprobRows run = find_level(selfreward::logprob_level, level).run;
  py::gil_scoped_release release;
  selfreward::logprob(a, threads, run);
}

void logprob_gradient(py::array& logits, const py::array& targets, int64_t first, const py::array& lse,
                      const py::array& grad_logp, const py::array& grad_lse, int threads, const std::string& level) {
  selfreward::LogprobArguments a = check_tile(logits, targets, threads);
  check<float>("lse", lse, {a.rows});
  check<float>("grad_logp", grad_logp, {a.rows});
  check<float>("grad_lse", grad_lse, {a.rows});
  check_outputs({{"targets", &targets}, {"lse", &lse}, {"grad_logp", &grad_logp}, {"grad_lse", &grad_lse}},
                {{"logits", &logits}});
  a.logits = static_cast<float*>(logits.mutable_data());
  a.first = first;
  a.lse = floats(lse), a.grad_logp = floats(grad_logp), a.grad_lse = floats(grad_lse);
  const selfreward::LogprobRows run = find_level(selfreward::logprob_level, level).run;
  py::gil_scoped_release release;
  selfreward::logprob(a, threads, run);
}

// All of tree_attention's sizes, from q, k and v, and the windows.
selfreward::TreeAttentionArguments check_trees(const py::array& q, const py::array& k, const py::array& v,
                                               const py::array& end, const py::array& bounds, int threads) {
  selfreward::TreeAttentionArguments a{};
  a.q_stride = check_rows("q", q, {-1, -1, -1});
  a.tokens = q.shape(0), a.heads = q.shape(1), a.dim = q.shape(2);
  a.k_stride = check_rows("k", k, {a.tokens, -1, a.dim});
  a.groups = k.shape(1);
  a.v_stride = check_rows("v", v, {a.tokens, a.groups, a.dim});
  if (a.dim < 1 || a.groups < 1 || a.heads % a.groups)
    refuse("q", shape_text({q.shape(0), q.shape(1), q.shape(2)}),
           "heads a multiple of the " + std::to_string(a.groups) + " of k, and at least one feature");
  check<int64_t>("end", end, {a.tokens});
  check<int64_t>("bounds", bounds, {-1});
  check_threads(threads);
  a.q = floats(q), a.k = floats(k), a.v = floats(v);
  a.end = static_cast<const int64_t*>(end.data());
  a.bounds = static_cast<const int64_t*>(bounds.data());
  a.windows = bounds.shape(0) - 1;
  if (a.windows < 0 || a.bounds[0] != 0 || a.bounds[a.windows] != a.tokens)
    refuse("bounds", shape_text({bounds.shape(0)}), "from 0 to " + std::to_string(a.tokens) + ", the tokens");
  for (int64_t window = 0; window < a.windows; ++window) {
    if (a.bounds[window] >= a.bounds[window + 1])
      refuse(at("bounds", window + 1), std::to_string(a.bounds[window + 1]),
             "more than " + std::to_string(a.bounds[window]) + ", the one before");
    for (int64_t token = a.bounds[window]; token < a.bounds[window + 1]; ++token)
      if (a.end[token] <= token || a.end[token] > a.bounds[window + 1])
        refuse(at("end", token), std::to_string(a.end[token]),
               "behind the token and at most " + std::to_string(a.bounds[window + 1]) + ", the end of its window");
  }
  return a;
}

void tree_attention(const py::array& q, const py::array& k, const py::array& v, const py::array& end,
                    const py::array& bounds, py::array& out, py::array& lse, int threads, const std::string& level) {
  selfreward::TreeAttentionArguments a = check_trees(q, k, v, end, bounds, threads);
  check<float>("out", out, {a.tokens, a.heads, a.dim});
  check<float>("lse", lse, {a.heads, a.tokens});
  check_outputs({{"q", &q}, {"k", &k}, {"v", &v}, {"end", &end}, {"bounds", &bounds}}, {{"out", &out}, {"lse", &lse}});
  a.out = static_cast<float*>(out.mutable_data());
  a.lse = static_cast<float*>(lse.mutable_data());
  const selfreward::TreeAttentionTask task = find_level(selfreward::tree_attention_level, level).run;
  py::gil_scoped_release release;
  selfreward::tree_attention(a, threads, task);
}

void tree_attention_gradient(const py::array& q, const py::array& k, const py::array& v, const py::array& end,
                             const py::array& bounds, const py::array& out, const py::array& lse, const py::array& dout,
                             py::array& dq, py::array& dk, py::array& dv, int threads, const std::string& level) {
  selfreward::TreeAttentionArguments a = check_trees(q, k, v, end, bounds, threads);
  check<float>("out", out, {a.tokens, a.heads, a.dim});
  check<float>("lse", lse, {a.heads, a.tokens});
  check<float>("dout", dout, {a.tokens, a.heads, a.dim});
  check<float>("dq", dq, {a.tokens, a.heads, a.dim});
  check<float>("dk", dk, {a.tokens, a.groups, a.dim});
  check<float>("dv", dv, {a.tokens, a.groups, a.dim});
  check_outputs({{"q", &q},
                 {"k", &k},
                 {"v", &v},
                 {"end", &end},
                 {"bounds", &bounds},
                 {"out", &out},
                 {"lse", &lse},
                 {"dout", &dout}},
                {{"dq", &dq}, {"dk", &dk}, {"dv", &dv}});
  a.out = const_cast<float*>(floats(out));  // read only
  a.lse = const_cast<float*>(floats(lse));
  a.dout = floats(dout);
  a.dq = static_cast<float*>(dq.mutable_data());
  a.dk = static_cast<float*>(dk.mutable_data());
  a.dv = static_cast<float*>(dv.mutable_data());
  const selfreward::TreeAttentionTask task = find_level(selfreward::tree_attention_level, level).run;
  py::gil_scoped_release release;
  selfreward::tree_attention(a, threads, task);
}

double probe_fma(int64_t rounds, int threads, const std::string& level) {
  check_threads(threads);
  if (rounds < 1) refuse("rounds", std::to_string(rounds), "at least 1");
  const selfreward::ProbeRun run = find_level(selfreward::probe_level, level).run;
  py::gil_scoped_release release;
  return selfreward::probe({nullptr, rounds}, threads, run);
}

double probe_read(const py::array& memory, int threads, const std::string& level) {
  check<float>("memory", memory, {-1});
  check_threads(threads);
  if (memory.shape(0) < 128 * threads) refuse("memory", shape_text({memory.shape(0)}), "at least 128 floats a thread");
  const selfreward::ProbeRun run = find_level(selfreward::probe_level, level).run;
  const selfreward::ProbeArguments arguments{static_cast<const float*>(memory.data()), memory.shape(0)};
  py::gil_scoped_release release;
  return selfreward::probe(arguments, threads, run);
}

void check_rules(const selfreward::SampleArguments& a) {
  if (a.vocab < 1 || a.vocab > a.width)
    refuse("vocab", std::to_string(a.vocab), "1 to " + std::to_string(a.width) + ", the columns of logits");
  for (int64_t row = 0; row < a.rows; ++row) {
    if (!(a.temperature[row] >= 0.0f) || !std::isfinite(a.temperature[row]))
      refuse(at("temperature", row), number_text(a.temperature[row]), "0 (greedy) or a finite number above");
    if (a.top_k[row] < 0) refuse(at("top_k", row), std::to_string(a.top_k[row]), "0 (off) or more");
    if (!(a.top_p[row] > 0.0 && a.top_p[row] <= 1.0))
      refuse(at("top_p", row), number_text(a.top_p[row]), "above 0 and at most 1 (off)");
    if (!(a.min_p[row] >= 0.0 && a.min_p[row] <= 1.0))
      refuse(at("min_p", row), number_text(a.min_p[row]), "0 (off) to 1");
    if (a.positions[row] < 0 || a.positions[row] > UINT32_MAX)
      refuse(at("positions", row), std::to_string(a.positions[row]), "0 or more and below 2^32");
    if (a.candidates[row] < 0 || a.candidates[row] > UINT32_MAX)
      refuse(at("candidates", row), std::to_string(a.candidates[row]), "0 or more and below 2^32");
  }
}

void sample(const py::array& logits, const py::array& temperature, const py::array& top_k, const py::array& top_p,
            const py::array& min_p, const py::array& seeds, const py::array& positions, const py::array& candidates,
            int64_t vocab, const py::array& forbidden_offsets, const py::array& forbidden,
            const py::array& label_offsets, const py::array& label_ids, py::array& ids, py::array& raw,
            py::array& sampled, py::array& labels, int threads, const std::string& level) {
  check<float>("logits", logits, {-1, -1});
  const py::ssize_t rows = logits.shape(0), width = logits.shape(1);
  if (width < 1 || width > INT32_MAX - 16)
    throw py::value_error("logits has shape " + shape_text({rows, width}) + "; expected 1 to 2^31 - 17 columns");
  check<float>("temperature", temperature, {rows});
  check<int64_t>("top_k", top_k, {rows});
  check<double>("top_p", top_p, {rows});
  check<double>("min_p", min_p, {rows});
  check<int64_t>("seeds", seeds, {rows});
  check<int64_t>("positions", positions, {rows});
  check<int64_t>("candidates", candidates, {rows});
  check<int64_t>("forbidden_offsets", forbidden_offsets, {rows + 1});
  check<int64_t>("forbidden", forbidden, {-1});
  check<int64_t>("label_offsets", label_offsets, {rows + 1});
  check<int64_t>("label_ids", label_ids, {-1});
  check<int64_t>("ids", ids, {rows});
  check<float>("raw", raw, {rows});
  check<float>("sampled", sampled, {rows});
  check<float>("labels", labels, {label_ids.shape(0)});
  const std::pair<const char*, const py::array*> inputs[] = {
      {"logits", &logits},       {"temperature", &temperature},
      {"top_k", &top_k},         {"top_p", &top_p},
      {"min_p", &min_p},         {"seeds", &seeds},
      {"positions", &positions}, {"candidates", &candidates},
      {"forbidden", &forbidden}, {"forbidden_offsets", &forbidden_offsets},
      {"label_ids", &label_ids}, {"label_offsets", &label_offsets}};
  const std::pair<const char*, const py::array*> outputs[] = {
      {"ids", &ids}, {"raw", &raw}, {"sampled", &sampled}, {"labels", &labels}};
  for (size_t i = 0; i < std::size(outputs); ++i) {
    check_written(outputs[i].first, *outputs[i].second);
    for (const auto& input : inputs) check_apart(input.first, *input.second, outputs[i].first, *outputs[i].second);
    for (size_t j = 0; j < i; ++j)
      check_apart(outputs[j].first, *outputs[j].second, outputs[i].first, *outputs[i].second);
  }
  check_threads(threads);
  const selfreward::SampleRows run = find_level(selfreward::sample_level, level).run;
  const selfreward::SampleArguments arguments{static_cast<const float*>(logits.data()),
                                              static_cast<const float*>(temperature.data()),
                                              static_cast<const int64_t*>(top_k.data()),
                                              static_cast<const double*>(top_p.data()),
                                              static_cast<const double*>(min_p.data()),
                                              static_cast<const int64_t*>(seeds.data()),
                                              static_cast<const int64_t*>(positions.data()),
                                              static_cast<const int64_t*>(candidates.data()),
                                              static_cast<const int64_t*>(forbidden_offsets.data()),
                                              static_cast<const int64_t*>(forbidden.data()),
                                              static_cast<const int64_t*>(label_offsets.data()),
                                              static_cast<const int64_t*>(label_ids.data()),
                                              static_cast<int64_t*>(ids.mutable_data()),
                                              static_cast<float*>(raw.mutable_data()),
                                              static_cast<float*>(sampled.mutable_data()),
                                              static_cast<float*>(labels.mutable_data()),
                                              rows,
                                              width,
                                              vocab};
  check_rules(arguments);
  check_ragged("forbidden_offsets", arguments.forbidden_offsets, rows, "forbidden", arguments.forbidden,
               forbidden.shape(0), width);
  check_ragged("label_offsets", arguments.label_offsets, rows, "label_ids", arguments.label_ids, label_ids.shape(0),
               width);
  py::gil_scoped_release release;
  selfreward::sample(arguments, threads, run);
}

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const selfreward::Words words = selfreward::philox({{c0, c1, c2, c3}}, uint32_t(key), uint32_t(key >> 32));
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
}

void adamw_bf16(py::array& weight, const py::array& grad, py::array& mean, py::array& square, uint64_t key,
                uint32_t number, uint64_t first, float beta1, float rest1, float beta2, float rest2, float eps,
                float decay, float rate, float root, float scale, int threads, const std::string& level) {
  check<uint16_t>("weight", weight, {-1});
  const py::ssize_t count = weight.shape(0);
  check<uint16_t>("grad", grad, {count});
  check<float>("mean", mean, {count});
  check<float>("square", square, {count});
  check_written("weight", weight);
  check_written("mean", mean);
  check_written("square", square);
  check_apart("grad", grad, "weight", weight);
  check_apart("grad", grad, "mean", mean);
  check_apart("grad", grad, "square", square);
  check_apart("weight", weight, "mean", mean);
  check_apart("weight", weight, "square", square);
  check_apart("mean", mean, "square", square);
  check_threads(threads);
  const selfreward::AdamWChunks run = find_level(selfreward::adamw_level, level).run;
  const selfreward::AdamWArguments arguments{static_cast<uint16_t*>(weight.mutable_data()),
                                             static_cast<const uint16_t*>(grad.data()),
                                             static_cast<float*>(mean.mutable_data()),
                                             static_cast<float*>(square.mutable_data()),
                                             count,
                                             key,
                                             first,
                                             number,
                                             beta1,
                                             rest1,
                                             beta2,
                                             rest2,
                                             eps,
                                             decay,
                                             rate,
                                             root,
                                             scale};
  py::gil_scoped_release release;
  selfreward::adamw(arguments, threads, run);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engine's CPU kernels.";
  m.def("instruction_levels", &instruction_levels, "Names of the levels that this CPU can run, fastest first.");
  m.def("gumbel_noise", &gumbel_noise, py::arg("seeds"), py::arg("positions"), py::arg("candidates"), py::arg("stream"),
        py::arg("out"), py::arg("level") = "",
        "Fill out [rows, vocab] fp32 with Gumbel noise; seeds uint64 [rows], positions and candidates uint32 [rows].\n"
        "level: one of instruction_levels(), the fastest if empty; all give the same bits.");
  m.def("dropout_mask", &dropout_mask, py::arg("key"), py::arg("segments"), py::arg("positions"), py::arg("site"),
        py::arg("threshold"), py::arg("out"),
        "Fill out [rows, units] bool, True: the unit is kept; segments uint64 [rows], positions uint32 [rows].");
  m.def(
      "adamw_bf16", &adamw_bf16, py::arg("weight"), py::arg("grad"), py::arg("mean"), py::arg("square"), py::arg("key"),
      py::arg("number"), py::arg("first"), py::arg("beta1"), py::arg("rest1"), py::arg("beta2"), py::arg("rest2"),
      py::arg("eps"), py::arg("decay"), py::arg("rate"), py::arg("root"), py::arg("scale"), py::arg("threads"),
      py::arg("level") = "",
      "Update weight uint16 [n], bits of bf16, mean and square fp32 [n] in place by grad uint16 [n]; kernels/adamw.py\n"
      "has the formula and says what key, number and first are. level as in gumbel_noise.");
  m.def("linear_pack", &linear_pack, py::arg("weight"), py::arg("packed"), py::arg("first") = 0,
        "Fill the outputs first .. first + outputs of packed [panels, depth, 64] fp32 from weight [outputs, depth] "
        "fp32;\n"
        "no other output is touched. What stands behind the last one in its panel reaches no result.");
  m.def("linear_unpack", &linear_unpack, py::arg("packed"), py::arg("weight"), py::arg("first") = 0,
        "Fill weight [outputs, depth] fp32 with the outputs first .. first + outputs of packed [panels, depth, 64].");
  m.def(
      "linear", &linear, py::arg("x"), py::arg("packed"), py::arg("out"), py::arg("threads"), py::arg("level") = "",
      "Fill out [rows, outputs] fp32 with x [rows, depth] times the packed weight; kernels/linear.py has the order of\n"
      "the sums. level as in gumbel_noise; neither it nor threads nor the other rows change a row's bits.");
  m.def(
      "product", &product, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("add"), py::arg("threads"),
      py::arg("level") = "",
      "Fill out [rows, columns] fp32 with a [rows, depth] times b [depth, columns], either of them a matrix or the\n"
      "transpose of one, or add this to it; kernels/linear.py has the order of the sums. level, threads as in linear.");
  m.def("linear_bf16_levels", &linear_bf16_levels, "instruction_levels() of linear_bf16.");
  m.def("linear_pack_bf16", &linear_pack_bf16, py::arg("weight"), py::arg("packed"), py::arg("first") = 0,
        "As linear_pack, for weight uint16 [outputs, depth], bits of bf16, and packed uint16\n"
        "[panels, ceil(depth / 2), 64, 2], an odd depth padded with zeros.");
  m.def("linear_unpack_bf16", &linear_unpack_bf16, py::arg("packed"), py::arg("weight"), py::arg("first") = 0,
        "As linear_unpack, for packed and weight of linear_pack_bf16.");
  m.def("linear_bf16", &linear_bf16, py::arg("x"), py::arg("packed"), py::arg("out"), py::arg("threads"),
        py::arg("level") = "",
        "As linear, for weights packed by linear_pack_bf16; x is rounded to bf16. level: one of linear_bf16_levels().\n"
        "kernels/linear_bf16.py has the order of the sums, which all levels keep.");
  m.def("linear_int8_levels", &linear_int8_levels, "instruction_levels() of linear_int8.");
  m.def("linear_pack_int8", &linear_pack_int8, py::arg("weight"), py::arg("packed"), py::arg("scales"),
        py::arg("first") = 0,
        "As linear_pack, into packed uint8 [panels, 16 * ceil(depth / 64), 64, 4] and scales fp32 [64 * panels]; "
        "weights\n"
        "are quantised to 8 bits, one scale for each output.");
  m.def(
      "linear_int8", &linear_int8, py::arg("x"), py::arg("packed"), py::arg("scales"), py::arg("out"),
      py::arg("threads"), py::arg("level") = "",
      "As linear, for weights packed by linear_pack_int8; x is quantised to 8 bits in groups of 64. level: one of\n"
      "linear_int8_levels(). kernels/linear_int8.py has the numbers and the order of the sums, which all levels keep.\n"
      "A row of x with a NaN or an infinity gives NaN.");
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"), py::arg("threads"),
        py::arg("level") = "",
        "Fill out [rows, dim] fp32 from x [rows, dim] and weight [dim]. level as in gumbel_noise; neither it nor\n"
        "threads nor the other rows change a row's bits.");
  m.def(
      "add_rms_norm", &add_rms_norm, py::arg("x"), py::arg("branch"), py::arg("weight"), py::arg("eps"),
      py::arg("out_sum"), py::arg("out_norm"), py::arg("threads"), py::arg("level") = "",
      "Fill out_sum [rows, dim] fp32 with x + branch [rows, dim] and out_norm with what rms_norm makes of it. level,\n"
      "threads as in rms_norm.");
  m.def("embed", &embed, py::arg("tokens"), py::arg("table"), py::arg("out"), py::arg("threads"), py::arg("level") = "",
        "Fill out [rows, dim] fp32 with the rows tokens int64 [rows] of table [vocab, dim], fp32 or, as uint16, the\n"
        "bits of bf16. level, threads as in rms_norm.");
  m.def("swiglu", &swiglu, py::arg("gate_up"), py::arg("out"), py::arg("threads"), py::arg("level") = "",
        "Fill out [rows, ffn] fp32 from gate_up [rows, 2 * ffn], gate first. level, threads as in rms_norm.");
  m.def(
      "chunk_attention", &chunk_attention, py::arg("q"), py::arg("key_pages"), py::arg("value_pages"), py::arg("items"),
      py::arg("positions"), py::arg("out"), py::arg("threads"), py::arg("level") = "",
      "Fill out [rows, heads, dim] fp32 from q [rows, heads, dim], key_pages [blocks, groups, dim, size], value_pages\n"
      "[blocks, groups, size, dim], items int64 [items, 4], positions int64 [rows]. An item is a page, which chunk of\n"
      "its rows' contexts it is, their first and behind the last; a row's items are its chunks 0 .. position // size "
      "in\n"
      "this order. Slots that no row of an item sees are not read. How rows are grouped into items changes no bits;\n"
      "level, threads as in rms_norm.");
  m.def(
      "rope_write", &rope_write, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"),
      py::arg("key_pages"), py::arg("value_pages"), py::arg("slots"), py::arg("copies"), py::arg("out"),
      py::arg("threads"), py::arg("level") = "",
      "Fill out [rows, heads, dim] fp32 with q, turned by cos and sin [rows, dim / 2], and the slots int64 [rows] of\n"
      "key_pages and value_pages with k, turned, and v [rows, groups, dim]; then copy the first tokens of blocks:\n"
      "copies int64 [copies, 3] of source, target, tokens. Rows of q, k and v may lie apart. level, threads as in\n"
      "rms_norm.");
  py::class_<Recording>(m, "Recording",
                        "The calls of the sampler's kernels for one forward of [rows] tokens, kept to be made again "
                        "for\nany number of rows up to those. own(memory): rows of the recorded calls lie there.")
      .def(py::init<const py::array&, const py::array&>(), py::arg("tokens"), py::arg("positions"))
      .def("own", &Recording::own, py::arg("memory"))
      .def("__enter__", [](Recording& self) { self.enter(); })
      .def("__exit__", [](Recording& self, const py::args&) { self.exit(); })
      .def("replay", &Recording::replay, py::arg("tokens"), py::arg("positions"), py::arg("slots"), py::arg("copies"),
           py::arg("items"), py::arg("threads"));
  m.def("rms_norm_gradient", &rms_norm_gradient, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("dy"),
        py::arg("dsum"), py::arg("dx"), py::arg("dweight"), py::arg("threads"), py::arg("level") = "",
        "Fill dx [rows, dim] and dweight [dim] fp32 with the gradients of rms_norm at x [rows, dim] under dy\n"
        "[rows, dim]; dsum [rows, dim], or None, is added to dx. level, threads as in rms_norm.");
  m.def("swiglu_gradient", &swiglu_gradient, py::arg("gate_up"), py::arg("dout"), py::arg("dgate_up"),
        py::arg("threads"), py::arg("level") = "",
        "Fill dgate_up [rows, 2 * ffn] fp32 with the gradient of swiglu at gate_up under dout [rows, ffn]. level,\n"
        "threads as in rms_norm.");
  m.def(
      "rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"), py::arg("back"), py::arg("threads"),
      py::arg("level") = "",
      "Fill out [rows, heads, dim] fp32 with x, turned by cos and sin [rows, dim / 2], or turned back. Rows of x may\n"
      "lie apart. level, threads as in rms_norm.");
  m.def(
      "logprob", &logprob, py::arg("logits"), py::arg("targets"), py::arg("first"), py::arg("best"), py::arg("total"),
      py::arg("hit"), py::arg("threads"), py::arg("level") = "",
      "Fold logits [rows, columns] fp32, of the tokens from `first` on, into best fp32, total fp64 and hit fp32, all\n"
      "[rows]: the largest logit, the sum of exp(logit - best), the logit of the target int64 [rows]. They begin as\n"
      "-infinity, 0 and what a target shall have that is no token. level, threads as in rms_norm.");
  m.def("logprob_gradient", &logprob_gradient, py::arg("logits"), py::arg("targets"), py::arg("first"), py::arg("lse"),
        py::arg("grad_logp"), py::arg("grad_lse"), py::arg("threads"), py::arg("level") = "",
        "Turn such logits into their gradient, from lse and the gradients of logp and lse, all [rows] fp32. level,\n"
        "threads as in rms_norm.");
  m.def("tree_attention", &tree_attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("end"), py::arg("bounds"),
        py::arg("out"), py::arg("lse"), py::arg("threads"), py::arg("level") = "",
        "Fill out [tokens, heads, dim] and lse [heads, tokens] fp32 from q [tokens, heads, dim], k and v [tokens, "
        "groups,\n"
        "dim], end int64 [tokens] and bounds int64 [windows + 1], between which nobody sees across. Rows of q, k and v "
        "may\n"
        "lie apart. level, threads as in rms_norm; neither do other windows change a bit.");
  m.def("tree_attention_gradient", &tree_attention_gradient, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("end"),
        py::arg("bounds"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("threads"), py::arg("level") = "",
        "Fill dq, dk and dv with the gradients of q, k and v under dout, from what tree_attention was given and gave.");
  m.def("share_little", &selfreward::set_share_little, py::arg("share"),
        "Share work out to threads however little it is, or (as at first) only where it pays. For tests: no bits "
        "change.");
  m.def("probe_fma", &probe_fma, py::arg("rounds"), py::arg("threads"), py::arg("level") = "",
        "GFLOP/s of fp32 multiply-adds in registers, `rounds` times 192 of them on each thread.");
  m.def("probe_read", &probe_read, py::arg("memory"), py::arg("threads"), py::arg("level") = "",
        "GB/s at which the threads read memory [n] fp32, each its own part.");
  m.def("sample", &sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("seeds"), py::arg("positions"), py::arg("candidates"), py::arg("vocab"),
        py::arg("forbidden_offsets"), py::arg("forbidden"), py::arg("label_offsets"), py::arg("label_ids"),
        py::arg("ids"), py::arg("raw"), py::arg("sampled"), py::arg("labels"), py::arg("threads"),
        py::arg("level") = "",
        "Draw a token per row of logits [rows, width] fp32 into ids, raw and sampled [rows] and labels [label ids];\n"
        "kernels/sample.py says what the rules mean. level, threads as in rms_norm.");
  m.def("philox", &philox, py::arg("key"), py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"),
        "The four 32-bit words of Philox-4x32-10.");
}
