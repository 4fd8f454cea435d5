// Lets a PyTorch that was built without CUDA believe in one CUDA device that does nothing, so that fake tensors on "cuda" can be
// computed with and differentiated. fake_cuda.py compiles and loads it before torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

static const Device only(DeviceType::CUDA, 0);

struct FakeGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return only; }
  Device exchangeDevice(Device) const override { return only; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only); }
  Stream getDefaultStream(Device) const override { return getStream(only); }
  Stream getNewStream(Device, int) const override { return getStream(only); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return getStream(only); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(only); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  bool isStreamCapturing(const Stream&) const { return false; }  // virtual from PyTorch 2.13 on
};

static DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new FakeGuard());

}  // namespace c10::impl

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
