// C++ operators ask for a guard of the device of their tensors; the CPU build of torch has none for
// CUDA. Fake tensors need no device to be switched to.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
