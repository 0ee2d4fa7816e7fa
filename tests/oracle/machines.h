// The two machines that run a guest: this project's engine, and QEMU with TCG.
#pragma once

#include "oracle/guest.h"

namespace anykvm::oracle {

bool qemu_is_there();

enum class End {
  guests,    ///< the guest said so
  shutdown,  ///< a triple fault
  none,      ///< it hung, or the machine gave up
};

/// Runs the guest and returns its memory. `why`: what the engine said where the end was not the guest's own.
Memory run_in_engine(const Guest& guest, End& end, std::string& why);

/// QEMU with a file of this memory as its RAM. A QEMU that hangs or dies is run again, once. `halts_in`: the test in
/// which this one is expected to halt for good, -1: none; it is not waited for long there.
Memory run_in_qemu(const Guest& guest, int halts_in, End& end);

}  // namespace anykvm::oracle
