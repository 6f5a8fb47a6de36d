// An operation of gloo for tensors of a device, on its way.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace sim {

// Its future holds the tensors of the device, not those of the host that gloo works on.
class Work final : public c10d::Work {
 public:
  using Ptr = c10::intrusive_ptr<c10d::Work>;
  using Future = c10::ivalue::Future;

  // `finish` runs when gloo is done. Some operations of gloo have no future: they end when somebody waits for them.
  Work(Ptr gloo, std::vector<at::Tensor> results, std::function<void()> finish, bool gloo_has_future)
      : gloo_(std::move(gloo)),
        results_(std::move(results)),
        finish_(std::move(finish)),
        waits_(!gloo_has_future),
        future_(c10::make_intrusive<Future>(c10::ListType::ofTensors())) {
    if (gloo_has_future) {
      gloo_->getFuture()->addCallback([future = future_, results = results_, finish = finish_](Future& done) {
        done.hasError() ? future->setError(done.exception_ptr()) : end(*future, results, finish);
      });
    }
  }

  bool wait(std::chrono::milliseconds timeout) override {
    if (waits_) {
      complete(timeout);
    } else if (timeout != kNoTimeout) {
      gloo_->wait(timeout); // raises after the time
    }
    future_->waitAndThrow();
    return true;
  }

  void synchronize() override {
    wait(kNoTimeout);
  }

  bool isCompleted() override {
    return getFuture()->completed();
  }

  bool isSuccess() const override {
    return future_->completed() && !future_->hasError();
  }

  std::exception_ptr exception() const override {
    return future_->hasError() ? future_->exception_ptr() : nullptr;
  }

  c10::intrusive_ptr<Future> getFuture() override {
    if (waits_) {
      complete(kNoTimeout);
    }
    return future_;
  }

  std::vector<at::Tensor> result() override {
    return results_;
  }

  int sourceRank() const override {
    return gloo_->sourceRank();
  }

  void abort() override {
    gloo_->abort();
  }

 private:
  Ptr gloo_;
  std::vector<at::Tensor> results_;
  std::function<void()> finish_;
  bool waits_;
  c10::intrusive_ptr<Future> future_;
  std::mutex mutex_;

  static void end(Future& future, const std::vector<at::Tensor>& results, const std::function<void()>& finish) {
    try {
      finish();
      future.markCompleted(c10::IValue(results));
    } catch (...) {
      future.setError(std::current_exception());
    }
  }

  void complete(std::chrono::milliseconds timeout) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!future_->completed()) {
      end(*future_, results_, [&] {
        gloo_->wait(timeout);
        finish_();
      });
    }
  }
};

} // namespace sim
