// A CUDA device guard that does nothing: with it a CPU build of torch runs its own code on tensors that claim to be on cuda:0.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
}
