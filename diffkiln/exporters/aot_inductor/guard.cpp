// A device guard for CUDA that does nothing. A torch that is built for CPUs has none, and makes no fake tensors for a GPU
// without one. A build with CUDA puts this very guard in the place of its own where there is no GPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

extern "C" __attribute__((visibility("default"))) void diffkiln_guard(bool on) {
    // A guard is never destroyed: torch may ask for it as long as the process lives.
    static const auto* guard = new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>();
    c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(on ? guard : nullptr);
}
