// Sizes that the API fixes outside <linux/kvm.h>.
#pragma once

#include "x86/types.h"

namespace anykvm::abi {

/// struct kvm_run, the page of port I/O data, the ring of coalesced MMIO.
inline constexpr u64 vcpu_mmap_size = 3 * page_size;
/// Behind it in a vCPU's file, and first in a VM's, lie its counters as KVM_GET_STATS_FD's file has them.
inline constexpr u64 stats_page_size = page_size;
inline constexpr u32 max_cpuid_entries = 256;
inline constexpr u32 max_irq_routes = 4096;
/// KVM_GET_MSRS and KVM_SET_MSRS take fewer than this.
inline constexpr u32 max_io_msrs = 256;
/// The kernel's sigset_t, as KVM_SET_SIGNAL_MASK wants it.
inline constexpr u32 signal_mask_bytes = 8;

}  // namespace anykvm::abi
