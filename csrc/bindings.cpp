// With tensors.h, all that knows Python. Kernels get tensors as addresses, and run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <stdexcept>
#include <vector>

#include "fast/anchored.h"
#include "fast/cross_entropy.h"
#include "fast/streams.h"
#include "tensors.h"

namespace py = pybind11;

namespace fast {
namespace {

using Addresses = std::vector<uintptr_t>;

template <class T>
T* pointer(const Addresses& addresses, size_t i) {
  return addresses.empty() ? nullptr : reinterpret_cast<T*>(addresses[i]);
}

// The tables of one list of tensors, kept between steps: only the gradients' addresses change.
class AnchoredPlan {
 public:
  AnchoredPlan(const std::vector<int64_t>& numels, const std::vector<int32_t>& groups,
               const std::string& types, const Addresses& params,
               const std::vector<Addresses>& moments, const std::vector<Addresses>& scales,
               const Addresses& steps, const Addresses& anchors, const Addresses& curvature,
               const Addresses& curvature_scales, const Addresses& remainders)
      : rows_(numels.size()) {
    for (size_t i = 0; i < rows_.size(); i++) {
      const auto type = [&](size_t k) { return static_cast<Dtype>(types.at(6 * i + k)); };
      Row& row = rows_[i];
      row = Row{};
      row.param = pointer<void>(params, i);
      for (size_t k = 0; k < moments.size(); k++) row.moment[k] = pointer<void>(moments[k], i);
      for (size_t k = 0; k < scales.size(); k++) row.scale[k] = pointer<float>(scales[k], i);
      row.step = pointer<float>(steps, i);
      row.anchor = pointer<void>(anchors, i);
      row.curvature = pointer<void>(curvature, i);
      row.curvature_scale = pointer<float>(curvature_scales, i);
      row.remainder = pointer<int16_t>(remainders, i);
      row.numel = numels[i];
      row.group = groups.at(i);
      row.param_type = type(0);
      row.grad_type = type(1);
      row.moment_type[0] = type(2);
      row.moment_type[1] = type(3);
      row.anchor_type = type(4);
      row.curvature_type = type(5);
      for (int64_t begin = 0; begin < row.numel; begin += kChunk)
        chunks_.push_back({begin, static_cast<int32_t>(i),
                           static_cast<int32_t>(std::min(kChunk, row.numel - begin))});
    }
    partial_.resize(chunks_.size() * kStats);
  }

  bool run(bool (*update)(const UpdateArgs&, bool), const Addresses& grads, uintptr_t hyper,
           uintptr_t stats, std::optional<double> grad_scale, double max_grad_norm, uint64_t seed,
           int threads) {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (grads.size() != rows_.size()) throw std::invalid_argument("one gradient per parameter");
    for (size_t i = 0; i < rows_.size(); i++) rows_[i].grad = pointer<void>(grads, i);
    UpdateArgs args{};
    args.rows = rows_.data();
    args.row_count = static_cast<int64_t>(rows_.size());
    args.chunks = chunks_.data();
    args.chunk_count = static_cast<int64_t>(chunks_.size());
    args.hyper = reinterpret_cast<const double*>(hyper);
    args.partial = partial_.data();
    args.stats = reinterpret_cast<double*>(stats);
    args.grad_scale = grad_scale.value_or(1.0);
    args.max_grad_norm = max_grad_norm;
    args.seed = seed;
    args.threads = threads;
    return update(args, grad_scale.has_value());
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
                                      const Tensors& shaped, const Tensors& others) {
  std::vector<Signature::List> lists = {{params.ptr(), true}, {grads.ptr(), true, true}};
  for (const py::list& list : shaped) lists.push_back({list.ptr(), true});
  for (const py::list& list : others) lists.push_back({list.ptr(), false});
  return lists;
}

// Binds `record` and `match`: the gradients' addresses, or None.
auto bind_signature(bool (Signature::*walk)(const std::vector<Signature::List>&, Addresses*)) {
  return [walk](Signature& self, const py::list& params, const py::list& grads,
                const Tensors& shaped, const Tensors& others) -> std::optional<Addresses> {
    Addresses addresses;
    addresses.reserve(grads.size());
    if (!(self.*walk)(lists_of(params, grads, shaped, others), &addresses)) return std::nullopt;
    return addresses;
  };
}

// The streams of a list of tensors, walked as an update would and without its arithmetic.
class StreamWalk {
 public:
  // widths[k] and written[k] hold for stream k of every tensor; bases[k][i] is its address.
  StreamWalk(const std::vector<int64_t>& numels, const std::vector<int64_t>& widths,
             const std::vector<bool>& written, const std::vector<Addresses>& bases) {
    const auto kinds = static_cast<int64_t>(widths.size());
    for (size_t i = 0; i < numels.size(); i++) {
      const auto first = static_cast<int64_t>(streams_.size());
      for (size_t k = 0; k < widths.size(); k++)
        streams_.push_back({pointer<char>(bases.at(k), i), widths[k], written.at(k)});
      for (int64_t begin = 0; begin < numels[i]; begin += kChunk)
        chunks_.push_back({first, kinds, begin, std::min(kChunk, numels[i] - begin)});
    }
  }

  uint64_t run(int threads) const {
    py::gil_scoped_release release;
    return walk_streams(streams_.data(), chunks_.data(), static_cast<int64_t>(chunks_.size()),
                        threads);
  }

 private:
  std::vector<Stream> streams_;
  std::vector<StreamChunk> chunks_;
};

}  // namespace
}  // namespace fast

PYBIND11_MODULE(_C, m) {
  using fast::AnchoredPlan;
  m.doc() = "Native kernels of fastkernels; see fastkernels/_native.py.";
  m.attr("chunk") = fast::kChunk;
  m.attr("code_block") = fast::kCodeBlock;
  m.def("cpu_instruction_set", &fast::cpu_instruction_set);
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
      return plan.run(update, grads, hyper, stats, grad_scale, max_grad_norm, seed, threads);
    };
  };
  py::class_<AnchoredPlan>(m, "AnchoredPlan")
      .def(py::init<const std::vector<int64_t>&, const std::vector<int32_t>&, const std::string&,
                    const fast::Addresses&, const std::vector<fast::Addresses>&,
                    const std::vector<fast::Addresses>&, const fast::Addresses&,
                    const fast::Addresses&, const fast::Addresses&, const fast::Addresses&,
                    const fast::Addresses&>())
      .def("adamw", bind(&fast::anchored_adamw_cpu))
      .def("sgd", bind(&fast::anchored_sgd_cpu));
  py::class_<fast::Signature>(m, "Signature")
      .def(py::init([](const py::object& capsule) { return fast::Signature(capsule.ptr()); }))
      .def("record", fast::bind_signature(&fast::Signature::record))
      .def("match", fast::bind_signature(&fast::Signature::match));
  py::class_<fast::StreamWalk>(m, "StreamWalk")
      .def(py::init<const std::vector<int64_t>&, const std::vector<int64_t>&,
                    const std::vector<bool>&, const std::vector<fast::Addresses>&>())
      .def("run", &fast::StreamWalk::run);
}
