// What is known of the devices of this process, asked for once: the runtime takes about a microsecond for an answer.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "launcher.h"
#include "primitives.h"

namespace difffast::cuda {
namespace {

// Answers of the runtime, for any thread. A failure is not remembered.
template <typename Key>
class Remembered {
 public:
  template <typename Ask>
  cudaError_t get(const Key& key, int& answer, Ask ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = answers_.find(key);
    if (known != answers_.end()) {
      answer = known->second;
      return cudaSuccess;
    }
    const cudaError_t error = ask(answer);
    if (error == cudaSuccess) answers_.emplace(key, answer);
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<Key, int> answers_;
};

const char* text_of(cudaError_t error) {
  // Taken from the runtime too, so that the next call does not report it again.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <cudaDeviceAttr ATTRIBUTE>
cudaError_t device_attribute(int device, int& value) {
  static Remembered<int> of_devices;
  return of_devices.get(device, value, [&](int& answer) { return cudaDeviceGetAttribute(&answer, ATTRIBUTE, device); });
}

// Lets blocks of a kernel have all the dynamic shared memory of `device`, the current one. The limit is a state of the
// function on that device: were it set to what a call needs, a smaller call of another thread could lower it before the
// launch.
template <typename Kernel>
cudaError_t allow_all_shared_memory(Kernel kernel, int device) {
  static Remembered<std::pair<Kernel, int>> of_kernels;
  int bytes = 0;
  return of_kernels.get({kernel, device}, bytes, [&](int& answer) {
    const cudaError_t error = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device, answer);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, answer);
  });
}

}  // namespace
}  // namespace difffast::cuda
