// A stand-in for an accelerator: device tensors whose memory this process must not touch, except by copies.
//
// A device pointer is an address in pages without any access; the bytes lie elsewhere and are reached through a table.
// So code that takes a device tensor for host memory dies of SIGSEGV here, as it would be wrong or die on a GPU. All
// computing falls back to the CPU by way of copies, with the CPU's bits. As for a GPU, autograd starts a thread for each
// device in a process's first backward pass.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

constexpr auto kStandin = c10::DeviceType::PrivateUse1;

int device_count() {
  const char* text = std::getenv("STANDIN_DEVICES");
  return text ? std::atoi(text) : 1;
}

// ---------------------------------------------------------------- memory

struct Block {
  size_t size;
  char* bytes;
};

std::mutex table_lock;
std::map<char*, Block> table; // device address -> where its bytes are

thread_local c10::DeviceIndex current = 0;

void release(void* pointer) {
  std::lock_guard<std::mutex> guard(table_lock);
  auto found = table.find(static_cast<char*>(pointer));
  munmap(pointer, found->second.size);
  std::free(found->second.bytes);
  table.erase(found);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    c10::Device device(kStandin, current);
    if (size == 0) return {nullptr, device};
    void* place = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(place != MAP_FAILED, "no room for ", size, " bytes of a stand-in device");
    std::lock_guard<std::mutex> guard(table_lock);
    table[static_cast<char*>(place)] = {size, static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64))};
    return {place, place, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    TORCH_CHECK(false, "a stand-in device copies by tensors only");
  }
};

Memory memory;
REGISTER_ALLOCATOR(kStandin, &memory);

// The same tensor in the memory where its bytes are.
at::Tensor in_host_memory(const at::Tensor& tensor) {
  auto options = tensor.options().device(c10::kCPU);
  if (tensor.device().is_cpu()) return tensor;
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  char* base = static_cast<char*>(const_cast<void*>(tensor.storage().data()));
  std::lock_guard<std::mutex> guard(table_lock);
  auto found = table.find(base);
  TORCH_CHECK(found != table.end(), "the storage of a stand-in tensor is none of its device's");
  char* bytes = found->second.bytes + tensor.storage_offset() * tensor.element_size();
  return at::from_blob(bytes, tensor.sizes(), tensor.strides(), options);
}

// ---------------------------------------------------------------- operators

at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>,
                               std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kStandin)));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kStandin)));
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  at::Tensor target = in_host_memory(to);
  target.copy_(in_host_memory(self));
  return to;
}

// What was in it is lost where its storage is too small.
void grow(const at::Tensor& self, at::IntArrayRef size) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->numel() + impl->storage_offset()) * self.element_size();
  if (needed <= self.storage().nbytes()) return;
  c10::DeviceGuard guard(self.device());
  self.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(memory.allocate(needed));
  self.storage().unsafeGetStorageImpl()->set_nbytes(needed);
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) grow(to, self.sizes());
  return copy_from(self, to, false);
}

at::Tensor& set_source(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                       at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto at_offset = offset ? std::make_optional(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           at_offset);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  grow(self, C10_AS_INTARRAYREF_SLOW(size));
  return self;
}

// The fallback would not bring back the running statistics: the operator's schema does not say that it changes them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> native_batch_norm(
    const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, bool training, double momentum,
    double eps) {
  auto host = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined() ? std::make_optional(in_host_memory(*tensor)) : std::nullopt;
  };
  auto [output, saved_mean, saved_inverse] = at::native_batch_norm(
      in_host_memory(input), host(weight), host(bias), host(mean), host(variance), training, momentum, eps);
  return {output.to(input.device()), saved_mean.to(input.device()), saved_inverse.to(input.device())};
}

// As on a GPU, operands on the CPU are refused unless they are scalars, or indices.
void check_operand(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  const std::string& name = op.schema().name();
  bool by_index = name == "aten::index" || name.find("index_put") != std::string::npos;
  TORCH_CHECK(!tensor.defined() || tensor.device().type() == kStandin || tensor.dim() == 0 || by_index, name,
              ": expected all tensors to be on the same device, but found standin and ",
              tensor.device(), " of shape ", tensor.sizes());
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) check_operand(op, argument.toTensor());
    if (argument.isTensorList())
      for (const at::Tensor& tensor : argument.toTensorVector()) check_operand(op, tensor);
  }
  at::native::cpu_fallback(op, stack, true);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("as_strided", &as_strided);
  m.impl("resize_", &resize_);
  m.impl("native_batch_norm", &native_batch_norm);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

// ---------------------------------------------------------------- the device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kStandin; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kStandin, current}; }
  void setDevice(c10::Device device) const override {
    if (device.has_index()) current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::DEFAULT, stream.device()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count()); }
};

int register_hooks() {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return 0;
}

int registered = register_hooks();

} // namespace

extern "C" int standin_device() { return current; }
extern "C" void standin_set_device(int device) { current = static_cast<c10::DeviceIndex>(device); }
