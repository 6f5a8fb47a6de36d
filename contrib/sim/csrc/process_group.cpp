// simccl, the collectives: they run over gloo, on the memory of the device's tensors.
#include "runtime.h"
#include "work.h"

#include <ATen/ops/cat.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>

#include <numeric>

namespace sim {
namespace {

using WorkPtr = Work::Ptr;
using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using Sizes = std::vector<int64_t>;

Tensors on_host(const Tensors& tensors) {
  Tensors made;
  for (const auto& tensor : tensors) {
    made.push_back(sim::on_host(tensor));
  }
  return made;
}

Lists on_host(const Lists& lists) {
  Lists made;
  for (const auto& list : lists) {
    made.push_back(on_host(list));
  }
  return made;
}

Tensors flattened(const Lists& lists) {
  Tensors made;
  for (const auto& list : lists) {
    made.insert(made.end(), list.begin(), list.end());
  }
  return made;
}

WorkPtr working(
    WorkPtr gloo, Tensors results, std::function<void()> finish = [] {}, bool gloo_has_future = true) {
  return c10::make_intrusive<Work>(std::move(gloo), std::move(results), std::move(finish), gloo_has_future);
}

// gloo has no average: sum, and divide when the sum is there. Reduction `options` are changed to match.
template <typename Options>
std::function<void()> averaging(Options& options, Tensors host, int size) {
  if (!(options.reduceOp == c10d::ReduceOp::AVG)) {
    return [] {};
  }
  options.reduceOp = c10d::ReduceOp::SUM;
  return [host = std::move(host), size] {
    for (auto tensor : host) {
      tensor.div_(size);
    }
  };
}

// A process group for tensors of a device, over one of gloo for the same processes, which carries the host's too.
class ProcessGroup final : public c10d::Backend {
 public:
  explicit ProcessGroup(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = on_host(tensors);
    return working(gloo_->broadcast(host, options), tensors);
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& given) override {
    auto options = given;
    auto host = on_host(tensors);
    auto finish = averaging(options, host, getSize());
    return working(gloo_->allreduce(host, options), tensors, std::move(finish));
  }

  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& given) override {
    auto options = given;
    auto host = on_host(tensors);
    auto finish = averaging(options, host, getSize());
    return working(gloo_->allreduce_coalesced(host, options), tensors, std::move(finish));
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& given) override {
    auto options = given;
    auto host = on_host(tensors);
    auto finish = averaging(options, getRank() == given.rootRank ? host : Tensors(), getSize());
    return working(gloo_->reduce(host, options), tensors, std::move(finish));
  }

  WorkPtr allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto host_outputs = on_host(outputs);
    auto host_inputs = on_host(inputs);
    return working(gloo_->allgather(host_outputs, host_inputs, options), flattened(outputs));
  }

  WorkPtr _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto host_output = sim::on_host(output), host_input = sim::on_host(input);
    return working(gloo_->_allgather_base(host_output, host_input, options), {output});
  }

  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto host_outputs = on_host(outputs), host_inputs = on_host(inputs);
    return working(gloo_->allgather_into_tensor_coalesced(host_outputs, host_inputs, options), outputs);
  }

  WorkPtr gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto host_outputs = on_host(outputs);
    auto host_inputs = on_host(inputs);
    return working(gloo_->gather(host_outputs, host_inputs, options), flattened(outputs));
  }

  WorkPtr scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    auto host_outputs = on_host(outputs);
    auto host_inputs = on_host(inputs);
    return working(gloo_->scatter(host_outputs, host_inputs, options), outputs);
  }

  // gloo's reduce-scatter has no future.

  WorkPtr reduce_scatter(Tensors& outputs, Lists& inputs, const c10d::ReduceScatterOptions& given) override {
    auto options = given;
    auto host_outputs = on_host(outputs);
    auto host_inputs = on_host(inputs);
    auto finish = averaging(options, host_outputs, getSize());
    return working(gloo_->reduce_scatter(host_outputs, host_inputs, options), outputs, std::move(finish), false);
  }

  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& given) override {
    auto options = given;
    auto host_output = sim::on_host(output), host_input = sim::on_host(input);
    auto finish = averaging(options, {host_output}, getSize());
    return working(gloo_->_reduce_scatter_base(host_output, host_input, options), {output}, std::move(finish), false);
  }

  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& given) override {
    auto options = given;
    auto host_outputs = on_host(outputs), host_inputs = on_host(inputs);
    auto finish = averaging(options, host_outputs, getSize());
    return working(
        gloo_->reduce_scatter_tensor_coalesced(host_outputs, host_inputs, options), outputs, std::move(finish), false);
  }

  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, Sizes& output_sizes, Sizes& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto host_output = sim::on_host(output), host_input = sim::on_host(input);
    return working(gloo_->alltoall_base(host_output, host_input, output_sizes, input_sizes, options), {output});
  }

  // gloo exchanges parts of one tensor, not tensors: join them before, and part them after.
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    const auto lengths = [](const Tensors& tensors) {
      Sizes made;
      for (const auto& tensor : tensors) {
        made.push_back(tensor.numel());
      }
      return made;
    };
    auto output_sizes = lengths(outputs), input_sizes = lengths(inputs);
    Tensors flat_inputs;
    for (const auto& tensor : on_host(inputs)) {
      flat_inputs.push_back(tensor.reshape(-1));
    }
    auto input = at::cat(flat_inputs);
    auto output = input.new_empty({std::accumulate(output_sizes.begin(), output_sizes.end(), int64_t{0})});
    auto for_gloo = output_sizes; // which takes it
    auto work = gloo_->alltoall_base(output, input, for_gloo, input_sizes, options);
    return working(work, outputs, [output, output_sizes, host = on_host(outputs)] {
      const auto parts = output.split_with_sizes(output_sizes);
      for (size_t i = 0; i < host.size(); ++i) {
        host[i].copy_(parts[i].view_as(host[i]));
      }
    });
  }

  // Sending and receiving have no futures in gloo; waiting for its work is all there is to do.

  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto host = on_host(tensors);
    return gloo_->send(host, to, tag);
  }

  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto host = on_host(tensors);
    return gloo_->recv(host, from, tag);
  }

  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    auto host = on_host(tensors);
    return gloo_->recvAnysource(host, tag);
  }

  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    return gloo_->barrier(options);
  }

  const std::string getBackendName() const override {
    return "simccl";
  }
  void setSequenceNumberForGroup() override {
    gloo_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo_->getSequenceNumberForGroup();
  }
  void setTimeout(std::chrono::milliseconds timeout) override {
    gloo_->setTimeout(timeout);
  }
  void abort() override {
    gloo_->abort();
  }
  void shutdown() override {
    gloo_->shutdown();
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

// How DistributedDataParallel takes times, as on the host: work is done when it is queued.
struct Timer final : c10d::Timer {
  explicit Timer(c10::Device) {}

  std::optional<int64_t> measureDifference(Event begin, Event end) override {
    const auto from = getTimeRef(begin), to = getTimeRef(end);
    return from == c10d::kUnsetTime || to < from ? std::nullopt : std::optional<int64_t>(to - from);
  }
};

} // namespace
} // namespace sim

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, sim::kType, sim::Timer)
}

namespace sim {

void bind_process_group(pybind11::module_& module) {
  namespace py = pybind11;
  py::module_::import("torch.distributed");
  py::class_<ProcessGroup, c10::intrusive_ptr<ProcessGroup>, c10d::Backend>(module, "ProcessGroup")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>(), py::arg("gloo"), py::call_guard<py::gil_scoped_release>());
}

} // namespace sim
