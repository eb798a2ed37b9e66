// Launches compiled Triton kernels again without Triton's binder: one look-up by what the arguments are, tensor maps
// from a cache, and one call of the driver. kernels/plans.py makes the plans and says when they are used.
#include "driver.h"
#include "module.h"

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastkd {
namespace {

namespace py = pybind11;

constexpr size_t kMostWords = 96, kMostMaps = 8, kMostPlans = 1024, kMostTensorMaps = 4096;

using Key = c10::SmallVector<uint64_t, 96>;

struct HashOfKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const uint64_t word : key) hash = (hash ^ word) * 0x9e3779b97f4a7c15, hash ^= hash >> 32;
    return hash;
  }
};

template <typename Value>
using ByKey = std::unordered_map<Key, Value, HashOfKey>;

// What an argument is to the kernel. kMap: a tensor that is read by blocks through a tensor map, which is followed by
// its sizes and strides. kBlocks: the same on hardware without tensor maps.
enum class Kind { kPointer, kInteger, kFloat, kMap, kBlocks };

struct Slot {
  size_t argument;
  Kind kind;
  int element_type = 0, element_size = 0, swizzle = 0;
  std::vector<uint32_t> box;  // innermost dimension first, as the driver counts
};

struct Plan {
  void* function;
  unsigned threads, shared_bytes;
  std::vector<Slot> slots;
  std::vector<py::object> alive;  // the compiled kernel, and the constants that the key knows by their address
};

// The value of an argument, borrowed. tensor: itself, or the tensor that is read by blocks; nullptr otherwise.
struct Value {
  PyObject* object = nullptr;
  const at::Tensor* tensor = nullptr;
  PyObject* block_shape = nullptr;
};

const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

// An attribute that its owner keeps alive.
PyObject* attribute_of(PyObject* owner, PyObject* name) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(owner, name));
  if (!found) throw py::error_already_set();
  return found.ptr();
}

using Values = c10::SmallVector<Value, 32>;

uint64_t address_of(const at::Tensor& x) { return reinterpret_cast<uint64_t>(x.data_ptr()); }

// What TMA asks of a tensor. Triton's own path says what is wrong with one that does not comply.
bool fits_tma(const at::Tensor& x) {
  const at::IntArrayRef sizes = x.sizes(), strides = x.strides();
  if (sizes.empty() || sizes.size() > 5 || strides.back() != 1 || address_of(x) % 16 != 0) return false;
  for (const int64_t size : sizes) {
    if (size <= 0) return false;
  }
  for (const int64_t stride : strides.slice(0, strides.size() - 1)) {
    if (stride * static_cast<int64_t>(x.element_size()) % 16 != 0) return false;
  }
  return true;
}

// Appends what a constant is. False: it cannot be told apart from others.
bool append_constant(Key& key, PyObject* value) {
  if (PyFloat_Check(value)) {
    uint64_t bits;
    const double number = PyFloat_AS_DOUBLE(value);
    std::memcpy(&bits, &number, sizeof bits);
    key.append({1, bits});
  } else if (PyLong_CheckExact(value)) {
    int overflow = 0;
    key.append({2, static_cast<uint64_t>(PyLong_AsLongLongAndOverflow(value, &overflow))});
    return overflow == 0;
  } else {
    key.append({3, reinterpret_cast<uint64_t>(value)});  // True, None, a dtype, a string: the plan keeps it alive
  }
  return true;
}

// Appends what the compiled code depends on: at least what Triton compiles for anew. False: Triton has to launch.
bool append_argument(Key& key, const Value& value, at::Device device) {
  PyObject* object = value.object;
  if (value.tensor != nullptr) {
    const at::Tensor& x = *value.tensor;
    const auto dtype = static_cast<uint64_t>(x.scalar_type());
    if (value.block_shape == nullptr) {
      key.append({4, dtype, static_cast<uint64_t>(address_of(x) % 16 == 0)});
      return x.device() == device;
    }
    key.append({5, dtype});
    if (!PyList_CheckExact(value.block_shape) || PyList_GET_SIZE(value.block_shape) != x.dim()) return false;
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (!append_constant(key, PyList_GET_ITEM(value.block_shape, i))) return false;
    }
    return x.device() == device && fits_tma(x);
  }
  if (PyFloat_Check(object)) {
    key.push_back(6);
    return true;
  }
  if (PyBool_Check(object)) {
    key.push_back(7);
    return true;
  }
  if (PyLong_CheckExact(object)) {
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(object, &overflow);
    const bool is_short = number == static_cast<int32_t>(number);
    key.push_back(8 | is_short << 8 | (number == 1) << 9 | (number % 16 == 0) << 10);
    return overflow == 0;
  }
  key.push_back(9);
  return object == Py_None;
}

// The tensor map of a tensor, made once for each address and layout: a map holds numbers and nothing of the memory.
const driver::TensorMap& tensor_map(const at::Tensor& x, const Slot& slot) {
  static ByKey<driver::TensorMap> cache;  // guarded by the GIL
  const at::IntArrayRef sizes = x.sizes(), strides = x.strides();
  const size_t rank = sizes.size();
  Key key{address_of(x), static_cast<uint64_t>(slot.element_type) << 8 | static_cast<uint64_t>(slot.swizzle)};
  for (size_t i = 0; i < rank; ++i) {
    key.append({static_cast<uint64_t>(sizes[i]), static_cast<uint64_t>(strides[i]), slot.box[i]});
  }
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  std::array<uint64_t, 5> extents{}, byte_strides{};
  const std::array<uint32_t, 5> ones{1, 1, 1, 1, 1};
  for (size_t i = 0; i < rank; ++i) {
    extents[i] = sizes[rank - 1 - i];
    if (i > 0) byte_strides[i - 1] = strides[rank - 1 - i] * slot.element_size;
  }
  driver::TensorMap map;
  // No interleaving, promotion to 128 bytes of L2, zeros outside: as Triton encodes them.
  driver::check(driver::functions().encode_tiled(&map, slot.element_type, rank, x.data_ptr(), extents.data(),
                                                 byte_strides.data(), slot.box.data(), ones.data(), 0, slot.swizzle, 2,
                                                 0),
                "cuTensorMapEncodeTiled");
  if (cache.size() >= kMostTensorMaps) cache.clear();
  return cache.emplace(std::move(key), map).first->second;
}

// The parameters of one launch, in the order in which the compiled code expects them.
class Parameters {
 public:
  Parameters(const Plan& plan, const Values& values) {
    for (const Slot& slot : plan.slots) add(slot, values[slot.argument]);
    add(uint64_t(0));  // no scratch memory
    add(uint64_t(0));  // no profiler's scratch memory
  }
  void** pointers() { return pointers_.data(); }

 private:
  void add(const Slot& slot, const Value& value) {
    if (slot.kind == Kind::kPointer) return add(address_of(*value.tensor));
    if (slot.kind == Kind::kInteger) return add(static_cast<uint64_t>(PyLong_AsLongLong(value.object)));
    if (slot.kind == Kind::kFloat) {
      const float number = static_cast<float>(PyFloat_AS_DOUBLE(value.object));
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      return add(uint64_t(bits));
    }
    const at::Tensor& x = *value.tensor;
    if (slot.kind == Kind::kMap) {
      pointers_[count_++] = &(maps_[map_count_++] = tensor_map(x, slot));
    } else {
      add(address_of(x));
      add_layout(x);
      add(uint64_t(0));  // zeros outside, not NaN
    }
    add_layout(x);
  }
  void add_layout(const at::Tensor& x) {
    for (const int64_t size : x.sizes()) add(static_cast<uint64_t>(size));
    for (const int64_t stride : x.strides()) add(static_cast<uint64_t>(stride));
  }
  // The kernel reads as many of a word's lower bytes as its parameter has.
  void add(uint64_t word) {
    words_[count_] = word;
    pointers_[count_] = &words_[count_];
    ++count_;
  }

  size_t count_ = 0, map_count_ = 0;
  std::array<driver::TensorMap, kMostMaps> maps_;
  std::array<uint64_t, kMostWords> words_;
  std::array<void*, kMostWords> pointers_;
};

// A thread that has not called CUDA yet has no context.
void ensure_context(int device) {
  void* context = nullptr;
  const driver::Functions& call = driver::functions();
  driver::check(call.current_context(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  driver::check(call.retain_primary_context(&context, device), "cuDevicePrimaryCtxRetain");
  driver::check(call.set_context(context), "cuCtxSetCurrent");
}

// The plans of one kernel. All methods need the GIL.
class Plans {
 public:
  Plans(const std::vector<std::pair<std::string, bool>>& parameters, const std::vector<std::string>& options,
        py::object device, py::object stream, py::object blocks, bool on_gpu)
      : parameters_(parameters.size()),
        device_(std::move(device)),
        stream_(std::move(stream)),
        blocks_(std::move(blocks)),
        on_gpu_(on_gpu) {
    for (const auto& [name, is_constant] : parameters) add_name(name, is_constant);
    for (const std::string& name : options) add_name(name, true);
  }

  // The compiled kernel that fits the arguments, and these in the order in which Triton's launcher takes them; None
  // where none is known.
  py::object find(const py::dict& arguments) const {
    Values values;
    Key key;
    if (!describe(arguments, py::cast<int>(device_()), values, key)) return py::none();
    const auto found = plans_.find(key);
    if (found == plans_.end()) return py::none();
    py::tuple ordered(parameters_);
    for (size_t i = 0; i < parameters_; ++i) {
      if (values[i].object == nullptr) return py::none();
      ordered[i] = py::reinterpret_borrow<py::object>(values[i].object);
    }
    return py::make_tuple(found->second.alive.front(), std::move(ordered));
  }

  bool launch(const py::tuple& grid, const py::dict& arguments) const {
    const int device = py::cast<int>(device_());
    Values values;
    Key key;
    if (!describe(arguments, device, values, key)) return false;
    const auto found = plans_.find(key);
    if (found == plans_.end()) return false;
    const Plan& plan = found->second;
    driver::LaunchConfig config{{1, 1, 1}, {plan.threads, 1, 1}, plan.shared_bytes, nullptr, nullptr, 0};
    for (size_t i = 0; i < grid.size() && i < 3; ++i) {
      config.grid[i] = static_cast<unsigned>(PyLong_AsUnsignedLong(PyTuple_GET_ITEM(grid.ptr(), i)));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (config.grid[0] == 0 || config.grid[1] == 0 || config.grid[2] == 0) return true;
    config.stream = reinterpret_cast<void*>(py::cast<uint64_t>(stream_(device)));
    ensure_context(device);
    Parameters parameters(plan, values);
    const auto call = driver::functions().launch;
    driver::Result result;
    {
      const py::gil_scoped_release release;  // a full queue of launches waits for the device
      result = call(&config, plan.function, parameters.pointers(), nullptr);
    }
    driver::check(result, "cuLaunchKernelEx");
    return true;
  }

  // slots: (name of the argument, kind, (element type, bytes of an element, swizzle, box) of a map).
  using Layout = std::tuple<int, int, int, std::vector<uint32_t>>;
  bool add(const py::dict& arguments, const py::object& compiled, uint64_t function, unsigned num_warps,
           unsigned shared_bytes, const std::vector<std::tuple<std::string, Kind, Layout>>& slots) {
    Values values;
    Key key;
    if (!describe(arguments, py::cast<int>(device_()), values, key)) return false;
    Plan plan{reinterpret_cast<void*>(function), 32 * num_warps, shared_bytes, {}, {compiled}};
    size_t words = 2, maps = 0;
    for (const auto& [name, kind, layout] : slots) {
      const auto is_named = [&name](const py::object& other) { return py::cast<std::string>(other) == name; };
      const size_t index = std::find_if(names_.begin(), names_.end(), is_named) - names_.begin();
      if (index == names_.size()) throw py::value_error("the kernel has no argument " + name);
      Slot slot{index, kind, std::get<0>(layout), std::get<1>(layout), std::get<2>(layout), std::get<3>(layout)};
      if (!fits(slot, values[index])) throw py::type_error("the kernel was compiled for another kind of " + name);
      std::reverse(slot.box.begin(), slot.box.end());
      words += values[index].block_shape == nullptr ? 1 : 2 + 4 * values[index].tensor->dim();
      maps += kind == Kind::kMap;
      plan.slots.push_back(std::move(slot));
    }
    if (words > kMostWords || maps > kMostMaps) return false;
    for (size_t i = 0; i < values.size(); ++i) {
      if (is_constant_[i]) plan.alive.push_back(py::reinterpret_borrow<py::object>(values[i].object));
    }
    if (plans_.size() >= kMostPlans) plans_.clear();
    plans_.insert_or_assign(key, std::move(plan));
    return true;
  }

  size_t size() const { return plans_.size(); }

 private:
  // The values in the order of the parameters, empty where one is not given, and the key of the plan that fits them.
  bool describe(const py::dict& arguments, int device, Values& values, Key& key) const {
    static PyObject* const base = PyUnicode_InternFromString("base");
    static PyObject* const block_shape = PyUnicode_InternFromString("block_shape");
    const at::Device place(on_gpu_ ? at::kCUDA : at::kCPU, static_cast<c10::DeviceIndex>(on_gpu_ ? device : -1));
    key.push_back(device);
    Py_ssize_t given = 0;
    for (size_t i = 0; i < names_.size(); ++i) {
      Value value{PyDict_GetItemWithError(arguments.ptr(), names_[i].ptr())};
      if (value.object == nullptr) {
        key.push_back(0);
      } else {
        ++given;
        if (is_constant_[i]) {
          if (!append_constant(key, value.object)) return false;
        } else {
          const bool is_in_blocks = reinterpret_cast<PyObject*>(Py_TYPE(value.object)) == blocks_.ptr();
          value.tensor = tensor_of(is_in_blocks ? attribute_of(value.object, base) : value.object);
          if (is_in_blocks) value.block_shape = attribute_of(value.object, block_shape);
          if (!append_argument(key, value, place)) return false;
        }
      }
      values.push_back(value);
    }
    return given == PyDict_GET_SIZE(arguments.ptr());
  }

  static bool fits(const Slot& slot, const Value& value) {
    const bool is_tensor = value.tensor != nullptr, is_in_blocks = is_tensor && value.block_shape != nullptr;
    switch (slot.kind) {
      case Kind::kPointer:
        return is_tensor && !is_in_blocks;
      case Kind::kInteger:
        return value.object != nullptr && PyLong_Check(value.object);
      case Kind::kFloat:
        return value.object != nullptr && PyFloat_Check(value.object);
      case Kind::kMap:
        return is_in_blocks && static_cast<int64_t>(slot.box.size()) == value.tensor->dim();
      case Kind::kBlocks:
        return is_in_blocks;
    }
    return false;
  }

  void add_name(const std::string& name, bool is_constant) {
    names_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str())));
    is_constant_.push_back(is_constant);
  }

  size_t parameters_;  // of the kernel; the options of the launch follow among the names
  std::vector<py::object> names_;
  std::vector<bool> is_constant_;
  py::object device_, stream_;  // the current device's index, and the stream of a device, as Triton asks for them
  py::object blocks_;           // the type of what is read by blocks
  bool on_gpu_;                 // false in tests: the tensors are in the host's memory
  ByKey<Plan> plans_;
};

}  // namespace

void define_launcher(py::module_& module) {
  py::enum_<Kind>(module, "Kind")
      .value("POINTER", Kind::kPointer)
      .value("INTEGER", Kind::kInteger)
      .value("FLOAT", Kind::kFloat)
      .value("MAP", Kind::kMap)
      .value("BLOCKS", Kind::kBlocks);
  py::class_<Plans>(module, "Plans")
      .def(py::init<const std::vector<std::pair<std::string, bool>>&, const std::vector<std::string>&, py::object,
                    py::object, py::object, bool>(),
           py::arg("parameters"), py::arg("options"), py::arg("device"), py::arg("stream"), py::arg("blocks"),
           py::arg("on_gpu"))
      .def("find", &Plans::find, py::arg("arguments"))
      .def("launch", &Plans::launch, py::arg("grid"), py::arg("arguments"))
      .def("add", &Plans::add, py::arg("arguments"), py::arg("compiled"), py::arg("function"), py::arg("num_warps"),
           py::arg("shared_bytes"), py::arg("slots"))
      .def("__len__", &Plans::size);
  module.def("use_stubs", driver::use_stubs, py::arg("wanted"));
  module.def("counts", [] { return std::make_pair(driver::counts().launches, driver::counts().encodes); });
}

}  // namespace fastkd
