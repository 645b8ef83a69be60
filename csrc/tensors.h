// What a torch tensor is, read from its Python object without a torch header: DLPack's exchange
// table, a C struct behind `torch.Tensor.__dlpack_c_exchange_api__` (Array API standard,
// DLPack 1.3). 50 ns for address, dtype, device and layout, where `data_ptr()` alone takes 60.
#pragma once

#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fast {

// DLPack's DLTensor.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// DLPack's DLPackExchangeAPI; the functions that are not used here are plain addresses.
struct ExchangeTable {
  uint32_t major, minor;
  void* previous;
  void *allocate, *own, *make;
  int (*view)(void* object, TensorView* out);
  void* stream;
};

// The tensors of a call: whether the next call is of the same ones. Only the addresses of gradients
// may change; what they must share with the last ones is their alignment, which decides how they
// can be read.
class Signature {
 public:
  // A list of tensors, where an entry may be None. `like_param`: each has the layout of its
  // parameter, the entry of the first list, or is a placeholder of no elements. `moves`: its
  // addresses may change.
  struct List {
    PyObject* tensors;
    bool like_param;
    bool moves = false;
  };

  explicit Signature(PyObject* capsule)
      : table_(static_cast<const ExchangeTable*>(
            PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))) {
    if (!table_) PyErr_Clear();
    if (!table_ || table_->major != 1 || !table_->view)
      throw std::invalid_argument("no DLPack 1 exchange table that shows tensors");
  }

  // Remembers the tensors of a call. False where one has no plain memory (it is sparse, or a
  // wrapper) or another layout than its parameter. `addresses` receives those of the lists that
  // move.
  bool record(const std::vector<List>& lists, std::vector<uintptr_t>* addresses) {
    facts_.clear();
    layouts_.clear();
    starts_.clear();
    sizes_.clear();
    for (const List& list : lists) {
      sizes_.push_back(size_of(list));
      for (size_t i = 0; i < sizes_.back(); i++) {
        TensorView t;
        view(list, i, &t);  // `match` refuses one without memory
        facts_.push_back(facts_of(t, list));
        if (&list == &lists.front()) remember_layout(t);
      }
    }
    const bool fits = match(lists, addresses);
    if (!fits) sizes_.clear();
    return fits;
  }

  // Whether the tensors are those that were recorded.
  bool match(const std::vector<List>& lists, std::vector<uintptr_t>* addresses) const {
    if (sizes_.size() != lists.size()) return false;
    const Facts* facts = facts_.data();
    for (size_t l = 0; l < lists.size(); l++) {
      const List& list = lists[l];
      if (size_of(list) != sizes_[l]) return false;
      for (size_t i = 0; i < sizes_[l]; i++, facts++) {
        TensorView t;
        if (!view(list, i, &t) || !(facts_of(t, list) == *facts)) return false;
        if (list.like_param && !is_none(t) && !has_layout(t, i, list.moves)) return false;
        if (list.moves) addresses->push_back(reinterpret_cast<uintptr_t>(t.data));
      }
    }
    return true;
  }

 private:
  // What is remembered of a tensor.
  struct Facts {
    uintptr_t data;  // the address; in a list that moves, only its alignment
    uint64_t type;   // dtype and device
    int64_t size;    // elements, or -1 where not contiguous; 0 in a list that is like_param

    bool operator==(const Facts& other) const {
      return data == other.data && type == other.type && size == other.size;
    }
  };

  static size_t size_of(const List& list) {
    return static_cast<size_t>(PyList_GET_SIZE(list.tensors));
  }

  // Entry i of a list, all zeros for None; false where it has no plain memory.
  bool view(const List& list, size_t i, TensorView* t) const {
    PyObject* object = PyList_GET_ITEM(list.tensors, static_cast<Py_ssize_t>(i));
    *t = {};
    if (object == Py_None) return true;
    if (table_->view(object, t) == 0) return t->data || is_empty(*t);
    PyErr_Clear();
    *t = {};
    return false;
  }

  static bool is_none(const TensorView& t) { return t.type_bits == 0; }

  static Facts facts_of(const TensorView& t, const List& list) {
    const auto data = reinterpret_cast<uintptr_t>(t.data);
    const uint64_t device =
        uint64_t{static_cast<uint16_t>(t.device_type)} << 16 | static_cast<uint16_t>(t.device_id);
    return {list.moves ? data % 16 : data, device << 16 | uint64_t{t.type_code} << 8 | t.type_bits,
            list.like_param ? 0 : contiguous_size(t)};
  }

  static int64_t contiguous_size(const TensorView& t) {
    int64_t size = 1;
    for (int32_t k = t.ndim; k-- > 0; size *= t.shape[k])
      if (t.shape[k] != 1 && t.strides[k] != size) return -1;
    return size;
  }

  static bool is_empty(const TensorView& t) {
    for (int32_t k = 0; k < t.ndim; k++)
      if (t.shape[k] == 0) return true;
    return false;
  }

  void remember_layout(const TensorView& t) {
    starts_.push_back(layouts_.size());
    layouts_.push_back(t.ndim);
    layouts_.insert(layouts_.end(), t.shape, t.shape + t.ndim);
    layouts_.insert(layouts_.end(), t.strides, t.strides + t.ndim);
  }

  // Strides of dimensions of size 1, and of tensors without elements, mean nothing.
  bool has_layout(const TensorView& t, size_t i, bool elements) const {
    if (i >= starts_.size()) return false;
    if (!elements && t.ndim == 1 && t.shape[0] == 0) return true;
    const int64_t* layout = layouts_.data() + starts_[i];
    const int64_t *shape = layout + 1, *strides = shape + layout[0];
    if (t.ndim != layout[0]) return false;
    for (int32_t k = 0; k < t.ndim; k++)
      if (t.shape[k] != shape[k]) return false;
    if (is_empty(t)) return true;
    for (int32_t k = 0; k < t.ndim; k++)
      if (t.shape[k] != 1 && t.strides[k] != strides[k]) return false;
    return true;
  }

  const ExchangeTable* table_;
  std::vector<Facts> facts_;
  std::vector<int64_t> layouts_;  // ndim, shape and strides of each tensor of the first list
  std::vector<size_t> starts_, sizes_;
};

}  // namespace fast
