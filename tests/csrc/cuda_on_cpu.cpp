// csrc/sampler/cuda.cu as a shared library that runs on the CPU. Compile with -DKERNEL='"path/to/cuda.cu"' -I csrc -fno-strict-aliasing.
#include "cuda_on_cpu.h"

#include KERNEL

// The same description of a batch as in bindings.cpp. 0, or 1 where threads waited for ever.
extern "C" int sample_cuda_on_cpu(const ngf::Batch* batch, int order) {
  using namespace ngf;
  try {
    for (int64_t row = 0; row < batch->rows; ++row) {
      cuda_on_cpu::run_block((uint32_t)row, THREADS, (cuda_on_cpu::Order)order, [&] {
        switch (batch->type) {
          case LogitType::fp32: sample_kernel<float>(*batch); break;
          case LogitType::bf16: sample_kernel<bf16>(*batch); break;
          case LogitType::fp16: sample_kernel<fp16>(*batch); break;
        }
      });
    }
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
