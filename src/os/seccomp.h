// The client's sandbox: a system call that it never makes may end the process.
#pragma once

namespace anykvm::os {

/// Whether this thread has had a seccomp filter installed since this library was loaded. What was there before belongs
/// to whoever started the program, who knows what it runs.
bool seccomp_filter_added();

}  // namespace anykvm::os
