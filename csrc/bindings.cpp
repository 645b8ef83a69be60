// With tensors.h, all that knows Python. Kernels get tensors as addresses, and run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/instruction_set.h"
#include "fast/anchored.h"
#include "fast/cross_entropy.h"
#include "tensors.h"

namespace py = pybind11;

namespace fast {
namespace {

using Addresses = std::vector<uintptr_t>;

// The tables of one list of tensors, kept between steps: only the gradients' addresses change.
class AnchoredPlan {
 public:
  // `words`: int64 [count, sizeof(Row) / 8], the rows with no gradient; they are copied.
  AnchoredPlan(uintptr_t words, size_t count) : rows_(count) {
    if (count) std::memcpy(rows_.data(), reinterpret_cast<const void*>(words), count * sizeof(Row));
    for (size_t i = 0; i < count; i++)
      for (int64_t begin = 0; begin < rows_[i].numel; begin += kChunk)
        chunks_.push_back({begin, static_cast<int32_t>(i),
                           static_cast<int32_t>(std::min(kChunk, rows_[i].numel - begin))});
    partial_.resize(chunks_.size() * kStats);
  }

  void run(void (*update)(const UpdateArgs&), const Addresses& grads, uintptr_t hyper,
           uintptr_t stats, std::optional<double> grad_scale, double max_grad_norm, uint64_t seed,
           int threads) {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (grads.size() != rows_.size()) throw std::invalid_argument("one gradient per parameter");
    for (size_t i = 0; i < rows_.size(); i++)
      rows_[i].grad = reinterpret_cast<const void*>(grads[i]);
    UpdateArgs args{};
    args.rows = rows_.data();
    args.row_count = static_cast<int64_t>(rows_.size());
    args.chunks = chunks_.data();
    args.chunk_count = static_cast<int64_t>(chunks_.size());
    args.hyper = reinterpret_cast<const double*>(hyper);
    args.partial = partial_.data();
    args.stats = reinterpret_cast<double*>(stats);
    args.has_grad_scale = grad_scale.has_value();
    args.grad_scale = grad_scale.value_or(1.0);
    args.max_grad_norm = max_grad_norm;
    args.seed = seed;
    args.threads = threads;
    update(args);
  }

 private:
  std::vector<Row> rows_;
  std::vector<Chunk> chunks_;
  std::vector<double> partial_;
  std::mutex mutex_;
};

using Tensors = std::vector<py::list>;

// params, then grads, then lists of the same layouts, then others.
std::vector<Signature::List> lists_of(const py::list& params, const py::list& grads,
                                      const Tensors& like_params, const Tensors& others) {
  std::vector<Signature::List> lists = {{params.ptr(), true}, {grads.ptr(), true, true}};
  for (const py::list& list : like_params) lists.push_back({list.ptr(), true});
  for (const py::list& list : others) lists.push_back({list.ptr(), false});
  return lists;
}

// Binds `record` or `match`: the gradients' addresses, or None.
template <class Walk>
auto bind_signature(Walk walk) {
  return [walk](Signature& self, const py::list& params, const py::list& grads,
                const Tensors& like_params, const Tensors& others) -> std::optional<Addresses> {
    Addresses addresses;
    addresses.reserve(grads.size());
    if (!(self.*walk)(lists_of(params, grads, like_params, others), &addresses))
      return std::nullopt;
    return addresses;
  };
}

}  // namespace
}  // namespace fast

PYBIND11_MODULE(_C, m) {
  using fast::AnchoredPlan;
  m.doc() = "Native kernels of fastkernels; see fastkernels/backends/native.py.";
  m.def("cpu_instruction_set", [] { return fast::name_of(fast::instruction_set()); });
  m.def("cross_entropy", [](uintptr_t u, uintptr_t p, uintptr_t scale, uintptr_t quad,
                            int64_t vectors, int64_t rows, int64_t classes, bool f64, int threads) {
    py::gil_scoped_release release;
    fast::cross_entropy_cpu({reinterpret_cast<void*>(u), reinterpret_cast<const void*>(p),
                             reinterpret_cast<const void*>(scale), reinterpret_cast<double*>(quad),
                             vectors, rows, classes, f64, threads});
  });
  const auto bind = [](auto update) {
    return [update](AnchoredPlan& plan, const fast::Addresses& grads, uintptr_t hyper,
                    uintptr_t stats, std::optional<double> grad_scale, double max_grad_norm,
                    uint64_t seed, int threads) {
      plan.run(update, grads, hyper, stats, grad_scale, max_grad_norm, seed, threads);
    };
  };
  py::class_<AnchoredPlan>(m, "AnchoredPlan")
      .def(py::init<uintptr_t, size_t>())
      .def("anchored_adamw_", bind(&fast::anchored_adamw_cpu))
      .def("anchored_sgd_", bind(&fast::anchored_sgd_cpu));
  py::class_<fast::Signature>(m, "Signature")
      .def(py::init([](const py::object& capsule) { return fast::Signature(capsule.ptr()); }))
      .def("record", fast::bind_signature(&fast::Signature::record))
      .def("match", fast::bind_signature(&fast::Signature::match));
}
