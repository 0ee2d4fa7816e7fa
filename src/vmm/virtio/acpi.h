// How a guest learns of a virtio-mmio device on x86: an ACPI device LNRO0005 in the DSDT. Debian's kernels take no
// virtio_mmio.device= on their command line (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is off), so there is no other way.
#pragma once

#include <vector>

#include "x86/types.h"

namespace anykvm::vmm {

/// The AML of `Device (VRnn)` with one window of VirtioMmio::window_size at `base` and the level-triggered, active-high
/// interrupt `gsi`; to be put inside a scope such as \_SB. `index` is nn and _UID.
std::vector<u8> virtio_mmio_aml(u8 index, u32 base, u32 gsi);

}  // namespace anykvm::vmm
