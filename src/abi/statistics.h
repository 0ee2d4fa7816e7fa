// The counters of this process's VMs as a table on stderr, when the environment variable ANYKVM_STATS is set: at each
// VM's end (or the process's), and on SIGUSR2 unless the program has a handler of its own for it.
#pragma once

namespace anykvm::abi {

struct VmFile;

/// Around a VM's life. They do nothing when nobody wants statistics.
void begin_statistics(VmFile& vm);
void end_statistics(VmFile& vm);

}  // namespace anykvm::abi
