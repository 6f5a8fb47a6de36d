// What Python sees of it: the module sim_runtime._C.
#include "runtime.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/utils/device_lazy_init.h>

namespace py = pybind11;

namespace sim {
void bind_process_group(py::module_& module); // process_group.cpp
}

PYBIND11_MODULE(_C, m) {
  // Let PyTorch ask `_lazy_init` again in processes that are forked: like a real device, this one refuses there.
  torch::utils::register_fork_handler_for_device_init(sim::kType);
  m.def("configure", &sim::configure, "Set the memory of each device, in bytes; as many devices as numbers.");
  m.def("device_count", [] { return int(sim::device_count()); });
  m.def("current_device", [] { return int(sim::current_device()); });
  m.def("exchange_device", [](int index) { return int(sim::exchange_device(static_cast<c10::DeviceIndex>(index))); });
  m.def("default_generator", [](int index) {
    const auto& generator = sim::default_generator(static_cast<c10::DeviceIndex>(index));
    return py::reinterpret_steal<py::object>(THPGenerator_Wrap(generator));
  });
  sim::bind_process_group(m);
}
