// The two machines that run a guest: this project's engine, and QEMU with TCG.
#pragma once

#include "oracle/guest.h"

namespace anykvm::oracle {

bool qemu_is_there();

/// Runs the guest to its end and returns its memory. `end` says why, where it was not the guest's own end.
Memory run_in_engine(const Guest& guest, std::string& end);

/// QEMU with a file of this memory as its RAM. A QEMU that does not get to the end is run again, twice.
Memory run_in_qemu(const Guest& guest);

}  // namespace anykvm::oracle
