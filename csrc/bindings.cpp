// The only file that knows Python: checks every dtype, shape, stride and alias, releases the GIL, calls the kernels.
// Arguments come as arrays without conversion (a torch CPU tensor's `.numpy()` shares its memory); a wrong one raises
// ValueError with what was found and what was expected.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "dropout.h"
#include "gumbel.h"
#include "linear.h"
#include "philox.h"

namespace py = pybind11;

namespace {

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// `array` must be T, C-contiguous and of `shape`, in which a negative size means any.
template <typename T>
void check(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  if (!array.dtype().equal(py::dtype::of<T>()))
    throw py::value_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) + "; expected " +
                          std::string(py::str(py::dtype::of<T>())));
  const std::vector<py::ssize_t> found(array.shape(), array.shape() + array.ndim());
  bool same = found.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == found[i];
  if (!same)
    throw py::value_error(std::string(name) + " has shape " + shape_text(found) + "; expected " + shape_text(shape) +
                          " (-1: any)");
  if (!(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " has strides " +
                          shape_text({array.strides(), array.strides() + array.ndim()}) +
                          " bytes; expected a C-contiguous array");
}

void check_written(const char* name, const py::array& array) {
  if (!array.writeable()) throw py::value_error(std::string(name) + " is read-only; expected a writeable array");
}

// `out` is written while `in` is read: they must not share memory.
void check_apart(const char* in_name, const py::array& in, const char* out_name, const py::array& out) {
  const char *a = static_cast<const char*>(in.data()), *b = static_cast<const char*>(out.data());
  if (a < b + out.nbytes() && b < a + in.nbytes())
    throw py::value_error(std::string(out_name) + " shares memory with " + in_name + "; expected memory of its own");
}

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

py::list instruction_levels() {
  py::list names;
  for (int i = 0; selfreward::gumbel_level(i).row; ++i) names.append(selfreward::gumbel_level(i).name);
  return names;
}

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

void linear_pack(const py::array& weight, py::array& packed) {
  check<float>("weight", weight, {-1, -1});
  const py::ssize_t outputs = weight.shape(0), depth = weight.shape(1);
  check<float>("packed", packed, {(outputs + selfreward::kPanel - 1) / selfreward::kPanel, depth, selfreward::kPanel});
  check_written("packed", packed);
  check_apart("weight", weight, "packed", packed);
  const auto* from = static_cast<const float*>(weight.data());
  auto* to = static_cast<float*>(packed.mutable_data());
  py::gil_scoped_release release;
  selfreward::linear_pack(from, outputs, depth, to);
}

void linear(const py::array& x, const py::array& packed, py::array& out, int threads, const std::string& level) {
  check<float>("x", x, {-1, -1});
  const py::ssize_t rows = x.shape(0), depth = x.shape(1);
  if (depth < 1) throw py::value_error("x has shape " + shape_text({rows, depth}) + "; expected at least one column");
  check<float>("out", out, {rows, -1});
  const py::ssize_t outputs = out.shape(1);
  check<float>("packed", packed, {(outputs + selfreward::kPanel - 1) / selfreward::kPanel, depth, selfreward::kPanel});
  check_written("out", out);
  check_apart("x", x, "out", out);
  check_apart("packed", packed, "out", out);
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected at least 1");
  const selfreward::LinearPanels panels = find_level(selfreward::linear_level, level).run;
  const selfreward::LinearArguments arguments{static_cast<const float*>(x.data()),
                                              static_cast<const float*>(packed.data()),
                                              static_cast<float*>(out.mutable_data()),
                                              rows,
                                              outputs,
                                              depth};
  py::gil_scoped_release release;
  selfreward::linear(arguments, threads, panels);
}

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const selfreward::Words words = selfreward::philox({{c0, c1, c2, c3}}, uint32_t(key), uint32_t(key >> 32));
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
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
  m.def("linear_pack", &linear_pack, py::arg("weight"), py::arg("packed"),
        "Fill packed [ceil(outputs / 64), depth, 64] fp32 from weight [outputs, depth] fp32, padded with zeros.");
  m.def(
      "linear", &linear, py::arg("x"), py::arg("packed"), py::arg("out"), py::arg("threads"), py::arg("level") = "",
      "Fill out [rows, outputs] fp32 with x [rows, depth] times the packed weight; kernels/linear.py has the order of\n"
      "the sums. level as in gumbel_noise; neither it nor threads nor the other rows change a row's bits.");
  m.def("philox", &philox, py::arg("key"), py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"),
        "The four 32-bit words of Philox-4x32-10.");
}
