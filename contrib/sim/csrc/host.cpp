// Operators run by the host's kernels, over the memory of the device's tensors: nothing is copied.
#include "runtime.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <unordered_set>

namespace sim {
namespace {

// Return a storage of the host over the memory of one of a device, which it keeps alive.
c10::Storage host_storage(const c10::Storage& storage) {
  auto* kept = new c10::Storage(storage);
  at::DataPtr memory(
      storage.mutable_data(), kept, [](void* context) { delete static_cast<c10::Storage*>(context); }, at::kCPU);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true};
}

at::Tensor tensor_over(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  if (like.is_conj()) {
    made._set_conj(true);
  }
  if (like.is_neg()) {
    made._set_neg(true);
  }
  return made;
}

// Operators that take tensors of the host beside those of a device: indices, and lengths of sequences.
bool takes_host_tensors(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
      "aten::_unsafe_index_put", "aten::_unsafe_masked_index", "aten::_unsafe_masked_index_put_accumulate",
      "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward", "aten::_ctc_loss",
      "aten::_ctc_loss_backward"};
  return names.count(name) > 0;
}

// One call of an operator: the tensors of its arguments, on the device and on the host.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op) {}

  void run(torch::jit::Stack* stack) {
    const auto& arguments = op_.schema().arguments();
    const auto first = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      to_host((*stack)[first + i]);
    }
    check_devices();
    device_ = checked(device_);
    bool draws = op_.hasTag(at::Tag::nondeterministic_seeded);
    for (size_t i = 0; i < arguments.size(); ++i) {
      draws = !take_generator((*stack)[first + i], arguments[i]) && draws;
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const auto on_cpu = [&] { op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack); };
      draws ? with_default_generator(on_cpu) : on_cpu();
    }
    for (const auto& pair : tensors_) {
      follow(pair.first, pair.second);
    }
    const auto returns = op_.schema().returns().size();
    for (size_t i = 0; i < returns; ++i) {
      if (i != 1 || op_.schema().name() != "aten::_pack_padded_sequence") { // the host reads the batch sizes
        to_device((*stack)[stack->size() - returns + i]);
      }
    }
  }

 private:
  const c10::OperatorHandle& op_;
  c10::DeviceIndex device_ = -1;
  bool on_device_ = false;
  at::Tensor foreign_;
  c10::SmallVector<std::pair<at::Tensor, at::Tensor>, 6> tensors_; // on the device, on the host
  c10::SmallVector<std::pair<c10::Storage, c10::Storage>, 6> storages_;

  // --- arguments ---

  void to_host(c10::IValue& value) {
    if (value.isTensor()) {
      value = host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(host(tensor));
      }
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& item : value.toOptionalTensorVector()) {
        list.push_back(item ? std::optional<at::Tensor>(host(*item)) : std::nullopt);
      }
      value = std::move(list);
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      device_ = checked(value.toDevice().index());
      value = c10::Device(at::kCPU);
    }
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kType) {
      if (tensor.defined() && tensor.dim() > 0 && !foreign_.defined()) {
        foreign_ = tensor;
      }
      return tensor;
    }
    const auto index = tensor.device().index();
    TORCH_CHECK(
        !on_device_ || index == device_, "Expected all tensors to be on the same device, but found at least two devices, ",
        device_of(device_), " and ", tensor.device(), "! (in ", op_.schema().name(), ")");
    device_ = index;
    on_device_ = true;
    tensors_.emplace_back(tensor, tensor_over(shared_storage(tensor.storage()), tensor, c10::DispatchKey::CPU));
    return tensors_.back().second;
  }

  // Tensors that share a storage on the device share one on the host.
  c10::Storage shared_storage(const c10::Storage& storage) {
    for (const auto& pair : storages_) {
      if (pair.first.is_alias_of(storage)) {
        return pair.second;
      }
    }
    storages_.emplace_back(storage, host_storage(storage));
    return storages_.back().second;
  }

  void check_devices() const {
    TORCH_CHECK(
        !on_device_ || !foreign_.defined() || takes_host_tensors(op_.schema().name()),
        "Expected all tensors to be on the same device, but found at least two devices, ", device_of(device_), " and ",
        foreign_.device(), "! (in ", op_.schema().name(), ")");
  }

  // --- random numbers ---

  // Put the host's generator in the place of the device's; return whether this is an argument for one.
  bool take_generator(c10::IValue& value, const c10::Argument& argument) const {
    if (value.isGenerator()) {
      value = engine_of(value.toGenerator());
      return true;
    }
    const auto optional = value.isNone() ? argument.type()->cast<c10::OptionalType>() : nullptr;
    if (optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType) {
      value = engine_of(default_generator(device_));
      return true;
    }
    return false;
  }

  // Operators without such an argument draw from the host's default generator: lend it the device's state.
  template <typename Function>
  void with_default_generator(Function function) const {
    auto* host = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
    auto* device = at::check_generator<at::CPUGeneratorImpl>(engine_of(default_generator(device_)));
    const auto exchange = [&] {
      const std::scoped_lock lock(host->mutex_, device->mutex_);
      const auto state = host->get_state();
      host->set_state(*device->get_state());
      device->set_state(*state);
    };
    exchange();
    try {
      function();
    } catch (...) {
      exchange();
      throw;
    }
    exchange();
  }

  // --- results ---

  // Let a tensor of the device follow what the operator did to its size, and to its memory where it had to grow.
  void follow(const at::Tensor& device, const at::Tensor& host) const {
    const auto &there = device.storage(), &here = host.storage();
    if (here.data() != there.data() || here.nbytes() != there.nbytes()) {
      const auto bytes = here.nbytes();
      there.set_data_ptr_noswap(adopt(here.set_data_ptr(at::DataPtr(nullptr, at::kCPU)), bytes, device_));
      there.set_nbytes(bytes);
    }
    if (host.sizes() != device.sizes() || host.strides() != device.strides() ||
        host.storage_offset() != device.storage_offset()) {
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  void to_device(c10::IValue& value) const {
    if (value.isTensor()) {
      value = returned(std::move(value).toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (at::Tensor tensor : std::move(value).toTensorVector()) {
        list.push_back(returned(std::move(tensor)));
      }
      value = std::move(list);
    }
  }

  at::Tensor returned(at::Tensor tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) {
      return tensor;
    }
    for (const auto& pair : tensors_) {
      if (tensor.is_same(pair.second)) {
        return pair.first;
      }
    }
    for (const auto& pair : storages_) {
      if (tensor.storage().is_alias_of(pair.second)) {
        return tensor_over(pair.first, tensor, c10::DispatchKey::PrivateUse1);
      }
    }
    if (tensor.use_count() > 1 || tensor.storage().use_count() > 1) {
      tensor = tensor.clone(); // somebody on the host goes on using it
    }
    const auto& storage = tensor.storage();
    const auto bytes = storage.nbytes();
    auto memory = adopt(storage.set_data_ptr(at::DataPtr(nullptr, at::kCPU)), bytes, device_);
    c10::Storage adopted(c10::Storage::use_byte_size_t(), bytes, std::move(memory), c10::GetAllocator(kType), true);
    return tensor_over(std::move(adopted), tensor, c10::DispatchKey::PrivateUse1);
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call(op).run(stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// PyTorch takes these apart before they come to the fallback: by type of device, or with a result of another shape.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (const auto* name : {"convolution", "convolution_backward", "mse_loss", "smooth_l1_loss"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

} // namespace

at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kType) {
    return tensor;
  }
  return tensor_over(host_storage(tensor.storage()), tensor, c10::DispatchKey::CPU);
}

} // namespace sim
