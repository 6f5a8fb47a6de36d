// Devices, streams and events. Work is done when it is queued: a stream is a number, an event a point in time.
#include "runtime.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>

namespace sim {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<c10::DeviceIndex> devices{0};
thread_local c10::DeviceIndex current = 0;
thread_local std::vector<c10::StreamId> streams; // of each device; 0, the default stream, beyond the end
std::atomic<c10::StreamId> last_stream{0};

c10::Stream stream(c10::StreamId id, c10::Device device) {
  return c10::Stream(c10::Stream::UNSAFE, device_of(checked(device.index())), id);
}

// Every type of device registers one of these. An index of -1 means the current device.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }

  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }

  c10::Device getDevice() const override {
    return device_of(current);
  }

  c10::Device exchangeDevice(c10::Device device) const override {
    return device_of(exchange_device(device.index()));
  }

  void setDevice(c10::Device device) const override {
    exchange_device(device.index());
  }

  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index() < 0 ? current : device.index();
  }

  void synchronizeDevice(const c10::DeviceIndex index) const override {
    checked(index);
  }

  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    return {}; // every dtype, as on the host
  }

  // --- streams ---

  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(0, device);
  }

  c10::Stream getStream(c10::Device device) const override {
    const auto index = static_cast<size_t>(checked(device.index()));
    return stream(index < streams.size() ? streams[index] : 0, device);
  }

  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream(++last_stream, device);
  }

  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream(++last_stream, device);
  }

  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = getStream(next.device());
    const auto index = static_cast<size_t>(before.device_index());
    streams.resize(std::max(streams.size(), index + 1));
    streams[index] = next.id();
    return before;
  }

  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }

  bool queryStream(const c10::Stream&) const override {
    return true;
  }

  void synchronizeStream(const c10::Stream&) const override {}

  // --- events ---

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Clock::time_point;
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }

  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }

  void block(void*, const c10::Stream&) const override {}

  bool queryEvent(void*) const override {
    return true;
  }

  void synchronizeEvent(void*) const override {}

  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    const auto elapsed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(begin);
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

} // namespace

void configure(const std::vector<size_t>& memory_limits) {
  TORCH_CHECK(devices == 0, "sim has ", int(devices), " devices already");
  set_memory_limits(memory_limits);
  make_default_generators(static_cast<c10::DeviceIndex>(memory_limits.size()));
  devices = static_cast<c10::DeviceIndex>(memory_limits.size());
}

c10::DeviceIndex device_count() noexcept {
  return devices;
}

c10::DeviceIndex current_device() noexcept {
  return current;
}

c10::DeviceIndex checked(c10::DeviceIndex index) {
  TORCH_CHECK(index < devices, "sim has no device ", int(index), ": it has ", int(devices), ", counted from 0");
  return index < 0 ? current : index;
}

c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  const auto before = current;
  current = checked(index);
  return before;
}

} // namespace sim
