// The only file that knows Python: checks every dtype, size and layout, releases the GIL, calls the kernels.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gumbel.h"
#include "philox.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // arguments are bound with noconvert(): no silent copy

void check_rows(const py::array& array, const char* name, py::ssize_t rows) {
  if (array.ndim() != 1 || array.shape(0) != rows)
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(rows) +
                                "] like the rows of out; it has " + std::to_string(array.ndim()) +
                                " dimensions and " + std::to_string(array.size()) + " elements");
}

void gumbel_noise(const Array<uint64_t>& seeds, const Array<uint32_t>& positions, const Array<uint32_t>& candidates,
                  uint32_t stream, Array<float>& out) {
  if (out.ndim() != 2) throw std::invalid_argument("out must have shape [rows, vocab]");
  const py::ssize_t rows = out.shape(0), vocab = out.shape(1);
  check_rows(seeds, "seeds", rows);
  check_rows(positions, "positions", rows);
  check_rows(candidates, "candidates", rows);
  const uint64_t* seed = seeds.data();
  const uint32_t* position = positions.data();
  const uint32_t* candidate = candidates.data();
  float* to = out.mutable_data();  // raises if out is read-only
  py::gil_scoped_release release;
  for (py::ssize_t row = 0; row < rows; ++row)
    selfreward::gumbel_row(seed[row], position[row], candidate[row], stream, vocab, to + row * vocab);
}

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const selfreward::Words w = selfreward::philox({{c0, c1, c2, c3}}, uint32_t(key), uint32_t(key >> 32));
  return py::make_tuple(w.w[0], w.w[1], w.w[2], w.w[3]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engine's CPU kernels.";
  m.def("gumbel_noise", &gumbel_noise, py::arg("seeds").noconvert(), py::arg("positions").noconvert(),
        py::arg("candidates").noconvert(), py::arg("stream"), py::arg("out").noconvert(),
        "Fill out [rows, vocab] fp32 with Gumbel noise; seeds uint64 [rows], positions and candidates uint32 [rows].");
  m.def("philox", &philox, py::arg("key"), py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"),
        "The four 32-bit words of Philox-4x32-10.");
}
