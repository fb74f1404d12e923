// The optimizer's state in host memory, for a device that has no room for it.
#pragma once
#include "core/device.h"

namespace ag::ops {

// One update of AdamW: parameters and gradients of `a` are on `device`, the state is in host memory, as are `now` and
// `norm_squared`, and the CPU works on it (ZeRO-Offload, Ren et al. 2021). The bits are those of an update on the CPU.
void update_offloaded(Device* device, const AgAdamW& a);

}  // namespace ag::ops
