// `anykvm boot`: a kernel or firmware on the machine, a console on the terminal, an exit code.
#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "vmm/machine.h"

namespace anykvm::vmm {

struct BootOptions {
  MachineOptions machine;
  std::optional<std::chrono::nanoseconds> timeout;
  bool quiet = false;  ///< no messages of ours on stderr but errors
};

/// The command line that every kernel gets before what the user appends: the console on the serial port.
inline constexpr const char* default_command_line = "console=ttyS0";

/// Runs the guest to its end and returns the exit code: 0 power-off, reset by the guest (with firmware, a reset starts
/// it again: memory is lost) or left by the user, 65 a file that cannot be used, 70 triple fault or internal error, 124
/// time-out, 128 + n ended by signal n. Says why on stderr, in one line.
int boot(const std::shared_ptr<KvmDevice>& device, const BootOptions& options);

}  // namespace anykvm::vmm
