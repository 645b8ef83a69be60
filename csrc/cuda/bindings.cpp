// Python module of the CUDA kernels, apart from fastkernels._C so that the CPU kernels need no CUDA
// library. Everything comes as an address; the stream is torch's.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fast/anchored_cuda.h"

namespace py = pybind11;

namespace fast {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// This module links its own CUDA runtime, whose device is set to that of torch.
void use_device(int device) {
  int current = -1;
  check(cudaGetDevice(&current));
  if (current != device) check(cudaSetDevice(device));
}

using Update = cudaError_t (*)(const CudaUpdateArgs&, const std::vector<CudaLaunch>&, cudaStream_t);
using Launches = std::vector<std::tuple<int32_t, int64_t, int64_t>>;  // kind, first chunk, chunks

auto bind(Update update) {
  return [update](int device, uintptr_t stream, uintptr_t rows, uintptr_t grads, uintptr_t chunks,
                  int64_t row_count, const Launches& launches, uintptr_t hyper, uintptr_t partial,
                  uintptr_t control, uintptr_t stats, uintptr_t grad_scale, uintptr_t found_inf,
                  bool wide_scale, double max_grad_norm, uint64_t seed) {
    const py::gil_scoped_release release;
    CudaUpdateArgs a{};
    std::vector<CudaLaunch> runs;
    for (const auto& [kind, first, count] : launches) {
      runs.push_back({kind, first, count});
      a.chunk_count += count;
    }
    a.rows = reinterpret_cast<const Row*>(rows);
    a.grads = reinterpret_cast<const void* const*>(grads);
    a.chunks = reinterpret_cast<const Chunk*>(chunks);
    a.row_count = row_count;
    a.hyper = reinterpret_cast<const double*>(hyper);
    a.partial = reinterpret_cast<double*>(partial);
    a.control = reinterpret_cast<double*>(control);
    a.stats = reinterpret_cast<double*>(stats);
    a.grad_scale = reinterpret_cast<const void*>(grad_scale);
    a.wide_scale = wide_scale;
    a.found_inf = reinterpret_cast<const float*>(found_inf);
    a.max_grad_norm = max_grad_norm;
    a.seed = seed;
    use_device(device);
    check(update(a, runs, reinterpret_cast<cudaStream_t>(stream)));
  };
}

// (bytes of the dtypes of parameter, gradient, moments, anchor and curvature; whether there is a
// remainder) -> kind.
py::dict kinds() {
  py::dict table;
  int kind = 0;
  for (const CudaKind& k : cuda_kinds()) {
    const char types[] = {char(k.param), char(k.grad), char(k.moment), char(k.anchor),
                          char(k.curvature)};
    table[py::make_tuple(py::bytes(types, sizeof(types)), k.remainder)] = kind++;
  }
  return table;
}

}  // namespace
}  // namespace fast

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of fastkernels; see fastkernels/backends/cuda.py.";
  m.def("anchored_adamw_", fast::bind(&fast::anchored_adamw_cuda));
  m.def("anchored_sgd_", fast::bind(&fast::anchored_sgd_cuda));
  m.def("kinds", fast::kinds);
  m.attr("ANY_FLOAT") = int{fast::kAnyFloat};
  m.attr("ANY_DOUBLE") = int{fast::kAnyDouble};
  m.def("write_addresses",
        [](int device, uintptr_t stream, uintptr_t table, const std::vector<uint64_t>& addresses) {
          const py::gil_scoped_release release;
          fast::use_device(device);
          fast::check(fast::write_addresses_cuda(
              reinterpret_cast<uint64_t*>(table), addresses.data(),
              static_cast<int64_t>(addresses.size()), reinterpret_cast<cudaStream_t>(stream)));
        });
}
