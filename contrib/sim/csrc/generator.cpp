// Random numbers, one default generator for each device; and the hooks by which PyTorch asks for all of this.
#include "runtime.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>

namespace sim {
namespace {

std::vector<at::Generator> generators;

// A generator of a device. Operators run on the host, so the host's kind of generator draws its numbers.
struct Generator final : c10::GeneratorImpl {
  Generator(c10::DeviceIndex index, at::Generator engine)
      : GeneratorImpl(device_of(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        engine(std::move(engine)) {}

  at::Generator engine;

  void set_current_seed(uint64_t seed) override {
    engine.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return engine.current_seed();
  }
  uint64_t seed() override {
    return engine.seed();
  }
  void set_offset(uint64_t offset) override {
    engine.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return engine.get_offset();
  }
  void set_state(const c10::TensorImpl& state) override {
    engine.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return engine.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    return new Generator(device().index(), engine.clone());
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}

  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex index) const override {
    return index < device_count();
  }

  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_device();
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    exchange_device(index);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return exchange_device(index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchange_device(index);
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return new_generator(index);
  }

  bool isPinnedPtr(const void* pointer) const override {
    return is_pinned(pointer);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  c10::Device getDeviceFromPtr(void*) const override {
    return device_of(current_device()); // all memory is the host's
  }

  // Fully sharded training frees parameters by making their storage empty.
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    auto memory = storage.allocator()->allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(memory.get(), storage.data(), kept);
    }
    storage.set_data_ptr_noswap(std::move(memory));
    storage.set_nbytes(bytes);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

} // namespace

void make_default_generators(c10::DeviceIndex count) {
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    generators.push_back(at::make_generator<Generator>(index, at::detail::createCPUGenerator()));
  }
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  return generators.at(checked(index));
}

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(checked(index), at::detail::createCPUGenerator());
}

at::Generator engine_of(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kType,
      "Expected a 'sim' device type for generator but found '", generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->engine;
}

} // namespace sim
