// CUDA's errors as C++ exceptions, and the device of a launch.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ngf {

inline void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}

// Makes `device` current while it lives, so that the launch is on the tensors' device.
struct OnDevice {
  int before = 0;
  bool changed = false;
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (device == before) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed = true;
  }
  ~OnDevice() {
    if (changed) cudaSetDevice(before);
  }
};

}  // namespace ngf
