// What the files of the simulated accelerator share: devices, memory, generators, and tensors seen from the host.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <cstddef>
#include <vector>

namespace sim {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

inline c10::Device device_of(c10::DeviceIndex index) {
  return {kType, index};
}

// --- devices: guard.cpp -------------------------------------------------------------------------------------

// Set, once, how many devices there are, and the memory of each in bytes.
void configure(const std::vector<size_t>& memory_limits);

c10::DeviceIndex device_count() noexcept;
c10::DeviceIndex current_device() noexcept;

// Make a device the current one of this thread, and return the one before. An index of -1 changes nothing.
c10::DeviceIndex exchange_device(c10::DeviceIndex index);

// Return `index`, or the current device for -1. Raises if there is no such device.
c10::DeviceIndex checked(c10::DeviceIndex index);

// --- memory: allocator.cpp ----------------------------------------------------------------------------------

void set_memory_limits(const std::vector<size_t>& limits);

// Count host memory as memory of a device until it is freed. Raises c10::OutOfMemoryError above the limit.
at::DataPtr adopt(at::DataPtr memory, size_t bytes, c10::DeviceIndex index);

c10::Allocator* pinned_allocator();
bool is_pinned(const void* pointer);

// --- random numbers: generator.cpp --------------------------------------------------------------------------

void make_default_generators(c10::DeviceIndex count);
const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator new_generator(c10::DeviceIndex index);

// Return the host's generator that draws the numbers of a generator of a device.
at::Generator engine_of(const at::Generator& generator);

// --- tensors: host.cpp --------------------------------------------------------------------------------------

// Return a CPU tensor over the memory of a tensor of a device, which it keeps alive. Others are returned as they are.
at::Tensor on_host(const at::Tensor& tensor);

} // namespace sim
