// Memory of the devices: host memory, counted for each device up to its limit. And pinned memory of the host.
#include "runtime.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <map>
#include <mutex>

namespace sim {
namespace {

using c10::CachingAllocator::Stat;
using c10::CachingAllocator::StatArray;
using c10::CachingDeviceAllocator::DeviceStats;

struct Memory {
  size_t limit = 0;
  DeviceStats stats;
};

std::mutex mutex;
std::vector<Memory> memories;

Stat& all(StatArray& stats) {
  return stats[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
}

// Nothing is cached or split: each allocation is a block and a segment of its own.
template <typename Function>
void for_each_stat(DeviceStats& stats, size_t bytes, Function function) {
  for (auto* count : {&stats.allocation, &stats.segment, &stats.active}) {
    function(all(*count), 1);
  }
  for (auto* size : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
    function(all(*size), bytes);
  }
}

std::string readable(size_t bytes) {
  return bytes < (1 << 20) ? c10::str(bytes, " bytes") : c10::str(static_cast<double>(bytes) / (1 << 20), " MiB");
}

// What a storage of a device holds: the host's memory, and where it is counted.
struct Block {
  at::DataPtr memory;
  size_t bytes;
  c10::DeviceIndex device;
};

void count(size_t bytes, c10::DeviceIndex index) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& memory = memories.at(index);
  const auto used = static_cast<size_t>(all(memory.stats.allocated_bytes).current);
  if (bytes > memory.limit - used) {
    memory.stats.num_ooms += 1;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "sim out of memory. Tried to allocate ", readable(bytes), " on device ", int(index),
        ", whose capacity is ", readable(memory.limit), ", of which ", readable(used), " are allocated.");
  }
  for_each_stat(memory.stats, bytes, [](Stat& stat, size_t amount) { stat.increase(amount); });
  memory.stats.num_device_alloc += 1;
}

void release(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  const std::lock_guard<std::mutex> lock(mutex);
  auto& stats = memories.at(block->device).stats;
  for_each_stat(stats, block->bytes, [](Stat& stat, size_t amount) { stat.decrease(amount); });
  stats.num_device_free += 1;
}

at::DataPtr block(at::DataPtr memory, size_t bytes, c10::DeviceIndex index) {
  void* pointer = memory.get();
  return {pointer, new Block{std::move(memory), bytes, index}, &release, device_of(index)};
}

// A plain c10::Allocator would do for tensors; torch.accelerator's memory functions need a DeviceAllocator.
struct Allocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t bytes) override {
    const auto index = current_device();
    if (bytes == 0) {
      return {nullptr, device_of(index)};
    }
    count(bytes, index);
    return block(c10::GetCPUAllocator()->allocate(bytes), bytes, index);
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool initialized() override {
    return !memories.empty();
  }

  void emptyCache(c10::MempoolId_t) override {}

  // Work is done when it is queued, so that memory may be used again as soon as it is freed.
  void recordStream(const at::DataPtr&, c10::Stream) override {}

  DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    const std::lock_guard<std::mutex> lock(mutex);
    return memories.at(checked(index)).stats;
  }

  void resetAccumulatedStats(c10::DeviceIndex index) override {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& stats = memories.at(checked(index)).stats;
    for_each_stat(stats, 0, [](Stat& stat, size_t) { stat.reset_accumulated(); });
    stats.num_ooms = stats.num_device_alloc = stats.num_device_free = 0;
  }

  void resetPeakStats(c10::DeviceIndex index) override {
    const std::lock_guard<std::mutex> lock(mutex);
    for_each_stat(memories.at(checked(index)).stats, 0, [](Stat& stat, size_t) { stat.reset_peak(); });
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& memory = memories.at(checked(index));
    return {memory.limit - all(memory.stats.allocated_bytes).current, memory.limit};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator)

// Pinned memory: the host's, in ranges that are looked up, since a tensor may begin anywhere in one.
struct PinnedAllocator final : at::HostAllocator {
  std::mutex ranges_mutex;
  std::map<const char*, size_t> ranges;
  size_t peak = 0, current = 0;

  at::DataPtr allocate(size_t bytes) override {
    auto* memory = new at::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    void* pointer = memory->get();
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    ranges[static_cast<const char*>(pointer)] = bytes;
    current += bytes;
    peak = std::max(peak, current);
    return {pointer, memory, &PinnedAllocator::free, c10::DeviceType::CPU};
  }

  static void free(void* context);

  bool contains(const void* pointer) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    auto next = ranges.upper_bound(static_cast<const char*>(pointer));
    return next != ranges.begin() && (--next, static_cast<const char*>(pointer) < next->first + next->second);
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool record_event(void*, void*, c10::Stream) override {
    return true;
  }

  void empty_cache() override {}

  at::HostStats get_stats() override {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    at::HostStats stats;
    stats.active_bytes.current = static_cast<int64_t>(current);
    stats.active_bytes.peak = static_cast<int64_t>(peak);
    return stats;
  }

  void reset_accumulated_stats() override {}

  void reset_peak_stats() override {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    peak = current;
  }
};

PinnedAllocator pinned;
REGISTER_HOST_ALLOCATOR(kType, &pinned)

void PinnedAllocator::free(void* context) {
  const std::unique_ptr<at::DataPtr> memory(static_cast<at::DataPtr*>(context));
  const std::lock_guard<std::mutex> lock(pinned.ranges_mutex);
  const auto range = pinned.ranges.find(static_cast<const char*>(memory->get()));
  if (range != pinned.ranges.end()) {
    pinned.current -= range->second;
    pinned.ranges.erase(range);
  }
}

} // namespace

void set_memory_limits(const std::vector<size_t>& limits) {
  const std::lock_guard<std::mutex> lock(mutex);
  memories.resize(limits.size());
  for (size_t index = 0; index < limits.size(); ++index) {
    memories[index].limit = limits[index];
  }
}

at::DataPtr adopt(at::DataPtr memory, size_t bytes, c10::DeviceIndex index) {
  if (bytes == 0) {
    return {nullptr, device_of(index)};
  }
  count(bytes, index);
  return block(std::move(memory), bytes, index);
}

c10::Allocator* pinned_allocator() {
  return &pinned;
}

bool is_pinned(const void* pointer) {
  return pinned.contains(pointer);
}

} // namespace sim
