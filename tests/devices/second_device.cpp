// A second device with two indices, whose memory is the host's: what runs on it is computed by the CPU's own kernels, so
// results are equal bit for bit, while tensors of different devices do not mix, as on a GPU.
//
// PyTorch reserves the key PrivateUse1 for backends from outside. Whatever is not implemented here falls back to the CPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace {
using namespace at;

constexpr DeviceIndex COUNT = 2;
thread_local DeviceIndex current = 0;
bool available = false, has_double = true;
int64_t synchronised = 0, total_memory = int64_t(1) << 30, allocated = 0;

Device on(DeviceIndex index) { return {DeviceType::PrivateUse1, index}; }
bool here(const Tensor& t) { return t.defined() && t.device().is_privateuseone(); }

// ---- memory

struct Memory final : DeviceAllocator {
  static void release(void* block) {
    allocated -= *static_cast<int64_t*>(block);
    std::free(block);
  }
  DataPtr allocate(size_t size) override {
    // the size stands in front of what is handed out
    void* block = std::aligned_alloc(64, 64 + (size + 63) / 64 * 64);
    *static_cast<int64_t*>(block) = static_cast<int64_t>(size);
    allocated += static_cast<int64_t>(size);
    return {static_cast<char*>(block) + 64, block, &release, on(current)};
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(MempoolId_t) override {}
  void recordStream(const DataPtr&, Stream) override {}
  CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex) override { return {total_memory - allocated, total_memory}; }
} memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

// ---- generators: the CPU's numbers, drawn from a state of the device's own

struct DeviceGenerator final : c10::GeneratorImpl {
  static DeviceType device_type() { return DeviceType::PrivateUse1; }
  Generator inner;
  DeviceGenerator(DeviceIndex index, Generator own)
      : GeneratorImpl(on(index), DispatchKeySet(DispatchKey::PrivateUse1)), inner(std::move(own)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(device_.index(), inner.clone()); }
};

Generator made(DeviceIndex index) {
  return make_generator<DeviceGenerator>(index < 0 ? current : index, at::detail::createCPUGenerator());
}
const Generator& default_generator(DeviceIndex index) {
  static std::array<Generator, COUNT> all{made(0), made(1)};
  return all.at(index < 0 ? current : index);
}

// ---- what PyTorch asks a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device other) const override {
    Device before = on(current);
    current = other.index();
    return before;
  }
  Device getDevice() const override { return on(current); }
  void setDevice(Device other) const override { current = other.index(); }
  void uncheckedSetDevice(Device other) const noexcept override { current = other.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void synchronizeDevice(const DeviceIndex) const override { ++synchronised; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  const Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return getCPUAllocator(); }
  Generator getNewGenerator(DeviceIndex index) const override { return made(index); }
} hooks;
const bool registered = (RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- tensors

ScalarType checked(std::optional<ScalarType> type) {
  ScalarType found = dtype_or_default(type);
  TORCH_CHECK_TYPE(has_double || found != kDouble, "Cannot convert a second tensor to float64: the device has none");
  return found;
}
DeviceIndex index_of(std::optional<Device> device) {
  DeviceIndex index = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(index < COUNT, "there is no second:", static_cast<int>(index), ", there are ", static_cast<int>(COUNT));
  return index;
}
Tensor made_empty(IntArrayRef size, std::optional<ScalarType> type, std::optional<Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  c10::DeviceGuard guard(on(index_of(device)));
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::PrivateUse1), checked(type), format);
}
Tensor made_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> type, std::optional<Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(on(index_of(device)));
  DispatchKeySet keys(DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, checked(type));
}
// A tensor of the CPU over the same memory.
Tensor host(const Tensor& t) {
  if (!here(t)) return t;
  auto storage = t.storage();
  auto options = TensorOptions().dtype(t.scalar_type());
  auto whole = from_blob(storage.mutable_data(), {int64_t(storage.nbytes() / t.element_size())}, options);
  return at::as_strided(whole, t.sizes(), t.strides(), t.storage_offset());
}
Tensor copied(const Tensor& from, const Tensor& to, bool) {
  NoGradGuard guard;
  host(to).copy_(host(from));
  return to;
}
Tensor copied_and_resized(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copied(from, to, false);
}
Tensor strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(t, size, stride, offset);
}
Tensor reshaped(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::as_strided(t, size, stride, t.storage_offset());
}
Tensor viewed(const Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor unfolded(const Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}
const Tensor& resized(const Tensor& t, c10::SymIntArrayRef size, std::optional<MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor& set_storage(Tensor& t, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(t, storage, offset, size, stride);
}
Tensor& set_whole(Tensor& t, Storage storage) {
  int64_t count = storage.nbytes() / t.element_size(), one = 1;
  return at::cpu::set_(t, storage, 0, IntArrayRef(&count, 1), IntArrayRef(&one, 1));
}
Scalar number(const Tensor& t) { return host(t).item(); }

// ---- computing

void complain(const char* what, const Device& one, const Device& other) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ",
              other, "! (", what, ")");
}
void same(const Tensor& one, const Tensor& other) {
  if (other.defined() && one.device() != other.device()) complain("convolution", one.device(), other.device());
}
Tensor moved(const Tensor& result, const Tensor& like) {
  if (!result.defined()) return result;
  auto out = at::empty_strided(result.sizes(), result.strides(), result.options().device(like.device()));
  host(out).copy_(result);
  return out;
}
// PyTorch chooses a kernel of convolution by device before any fallback, and leaves other devices to these two.
Tensor convolved(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups) {
  NoGradGuard guard;
  same(x, w);
  auto bias = b && b->defined() ? std::optional<Tensor>(host(*b)) : std::nullopt;
  if (bias) same(x, *b);
  return moved(at::convolution(host(x), host(w), bias, stride, padding, dilation, transposed, more, groups), x);
}
std::tuple<Tensor, Tensor, Tensor> convolution_gradients(
    const Tensor& grad, const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups, std::array<bool, 3> wanted) {
  NoGradGuard guard;
  same(grad, x);
  same(x, w);
  int64_t channels = transposed ? w.size(1) * groups : w.size(0);
  auto [dx, dw, db] =
      at::convolution_backward(host(grad), host(x), host(w), OptionalIntArrayRef(IntArrayRef(&channels, 1)), stride,
                               padding, dilation, transposed, more, groups, wanted);
  return {moved(dx, x), moved(dw, x), moved(db, x)};
}
// It writes running statistics, which its schema does not say, so that a fallback would lose them.
std::tuple<Tensor, Tensor, Tensor> normalised(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, bool training, double momentum, double eps) {
  NoGradGuard guard;
  auto own = [&](const std::optional<Tensor>& t) {
    if (!t || !t->defined()) return std::optional<Tensor>();
    if (t->device() != x.device()) complain("batch norm", x.device(), t->device());
    return std::optional<Tensor>(host(*t));
  };
  auto [y, means, factors] = at::native_batch_norm(
      host(x), own(weight), own(bias), own(mean), own(var), training, momentum, eps);
  return {moved(y, x), moved(means, x), moved(factors, x)};
}
// Everything else, where the devices agree: numbers in tensors without dimensions go anywhere, and so do indices of the
// CPU into a tensor of this device, as on a GPU.
void on_cpu(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  bool indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
                  name == "aten::index_put" || name == "aten::_unsafe_index";
  std::optional<Device> first;
  DeviceIndex index = current;
  auto see = [&](const Tensor& t) {
    if (!t.defined() || (t.device().is_cpu() && (t.dim() == 0 || (indexing && first)))) return;
    if (first && *first != t.device()) complain(name.c_str(), *first, t.device());
    first = t.device();
    if (here(t)) index = t.device().index();
  };
  auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& value = arguments[i];
    if (value.isTensor()) see(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) see(t);
    else if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) if (t) see(*t);
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (op.schema().arguments()[i].name() != "generator") continue;
    IValue& value = (*stack)[stack->size() - arguments.size() + i];
    auto given = value.isNone() ? default_generator(index) : value.toGenerator();
    value = check_generator<DeviceGenerator>(given)->inner;
  }
  c10::DeviceGuard guard(on(index));
  at::native::cpu_fallback(op, stack);
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &made_empty);
  m.impl("empty_strided", &made_strided);
  m.impl("_copy_from", &copied);
  m.impl("_copy_from_and_resize", &copied_and_resized);
  m.impl("as_strided", &strided);
  m.impl("_reshape_alias", &reshaped);
  m.impl("view", &viewed);
  m.impl("unfold", &unfolded);
  m.impl("resize_", &resized);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_local_scalar_dense", &number);
  m.impl("native_batch_norm", &normalised);
  m.impl("convolution_overrideable", &convolved);
  m.impl("convolution_backward_overrideable", &convolution_gradients);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

// Mixed precision: the ops that the networks of the tests have, as on the CPU.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}

TORCH_LIBRARY(second_device, m) {
  m.def("set_available", [](bool value) { available = value; });
  m.def("is_available", []() { return available; });
  m.def("set_double", [](bool value) { has_double = value; });
  m.def("set_free_memory", [](int64_t value) { total_memory = allocated + value; });
  m.def("set_current", [](int64_t index) { current = static_cast<DeviceIndex>(index); });
  m.def("get_current", []() { return int64_t(current); });
  m.def("synchronised", []() { return synchronised; });
  m.def("default_generator", [](int64_t index) { return default_generator(static_cast<DeviceIndex>(index)); });
}
