// Autocast, by PyTorch's own lists: which operators work in 16 bits, which in 32, which in the widest that they get.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

using c10::OperatorHandle;
using torch::jit::Stack;

constexpr auto kType = c10::DeviceType::PrivateUse1;

bool castable(const at::Tensor& tensor) {
  return tensor.defined() && at::autocast::is_eligible(tensor, kType) && tensor.is_floating_point();
}

// Call `function` with each tensor among the arguments, and put what it returns in its place.
template <typename Function>
void for_each_tensor(const OperatorHandle& op, Stack* stack, Function function) {
  for (auto value = stack->end() - op.schema().arguments().size(); value != stack->end(); ++value) {
    if (value->isTensor()) {
      *value = function(value->toTensor());
    } else if (value->isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value->toTensorVector()) {
        list.push_back(function(tensor));
      }
      *value = std::move(list);
    }
  }
}

void call_in(at::ScalarType dtype, const OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  for_each_tensor(op, stack, [&](const at::Tensor& tensor) {
    return tensor.defined() ? at::autocast::cached_cast(dtype, tensor, kType) : tensor;
  });
  op.callBoxed(stack);
}

void lower_precision(const OperatorHandle& op, Stack* stack) {
  call_in(at::autocast::get_autocast_dtype(kType), op, stack);
}

void float32(const OperatorHandle& op, Stack* stack) {
  call_in(at::kFloat, op, stack);
}

// These take the dtype of their result as an argument: fill it in where it was left open.
void float32_unless_asked(const OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto first = stack->end() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == "dtype" && first[i].isNone() && castable(first->toTensor())) {
      first[i] = static_cast<int64_t>(at::kFloat);
    }
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  op.callBoxed(stack);
}

void promoted(const OperatorHandle& op, Stack* stack) {
  auto widest = at::autocast::get_lower_precision_fp_from_device_type(kType);
  for_each_tensor(op, stack, [&](const at::Tensor& tensor) {
    widest = castable(tensor) && tensor.scalar_type() == at::kFloat ? at::kFloat : widest;
    return tensor;
  });
  call_in(widest, op, stack);
}

void refused(const OperatorHandle&, Stack*) {
  TORCH_CHECK(
      false, "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast; use "
      "torch.nn.functional.binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss");
}

// PyTorch lists an operator as its name, or as its name and its overload.
std::string name_of(std::string listed) {
  const auto comma = listed.find(", ");
  return comma == std::string::npos ? listed : listed.replace(comma, 2, ".");
}

#define REGISTER(FUNCTION, ...) \
  m.impl(name_of(#__VA_ARGS__).c_str(), torch::CppFunction::makeFromBoxedFunction<&FUNCTION>());
#define LOWER_PRECISION(...) REGISTER(lower_precision, __VA_ARGS__)
#define FLOAT32(...) REGISTER(float32, __VA_ARGS__)
#define FLOAT32_UNLESS_ASKED(...) REGISTER(float32_unless_asked, __VA_ARGS__)
#define PROMOTED(...) REGISTER(promoted, __VA_ARGS__)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_UNLESS_ASKED)
  AT_FORALL_PROMOTE(PROMOTED)
  FLOAT32(norm.Scalar)
  FLOAT32(norm.ScalarOpt_dim)
  FLOAT32(norm.names_ScalarOpt_dim)
  REGISTER(refused, binary_cross_entropy)
}

} // namespace
