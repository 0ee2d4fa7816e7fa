// Which of the process's descriptors are KVM's, and what each stands for. The descriptors are real (memfds), so they
// survive dup, poll and fcntl; this table adds their meaning.
//
// Look-up takes no lock and is safe against close() on another thread: objects are type-stable (a closed one is
// recycled, its memory never freed), so a reader may touch the count of an object that has just been closed; it takes a
// reference only from a count that is not zero, then looks whether the descriptor still names the object.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "x86/types.h"

namespace anykvm::vm {
class Vm;
}
namespace anykvm::vcpu {
class Vcpu;
}

namespace anykvm::abi {

struct VmFile;

enum class FdKind : u8 { system, vm, vcpu };

/// What an open file is to the kernel: shared by the descriptors that dup(2) made of one.
struct OpenFile {
  std::atomic<u32> references{0};  ///< descriptors, and calls in flight; 0: free
  FdKind kind = FdKind::system;
  u64 process = 0;             ///< os::process_identity() of the VM's creator
  std::atomic<u64> number{0};  ///< file_number() of its descriptors
  vm::Vm* vm = nullptr;
  vcpu::Vcpu* vcpu = nullptr;
  std::shared_ptr<VmFile> keeps;  ///< the VM and its vCPUs, as long as any of their descriptors is open
  OpenFile* next_free = nullptr;
  OpenFile* next_made = nullptr;
};

/// Gives a reference back; the last one ends what the file keeps.
void drop_reference(OpenFile* file);

/// A reference to an open file for the duration of a call. Empty when the descriptor is not one of ours.
class FileReference {
 public:
  explicit FileReference(int fd);
  FileReference(const FileReference&) = delete;
  FileReference& operator=(const FileReference&) = delete;
  ~FileReference() { reset(); }
  void reset() {
    if (file_) drop_reference(std::exchange(file_, nullptr));
  }
  explicit operator bool() const { return file_ != nullptr; }
  const OpenFile& operator*() const { return *file_; }
  const OpenFile* operator->() const { return file_; }
  /// One more reference, which the caller drops.
  OpenFile* share() const {
    file_->references.fetch_add(1, std::memory_order_relaxed);
    return file_;
  }

 private:
  OpenFile* file_ = nullptr;
};

/// The meaning of a descriptor to be.
struct NewFile {
  FdKind kind;
  vm::Vm* vm = nullptr;
  vcpu::Vcpu* vcpu = nullptr;
  std::shared_ptr<VmFile> keeps;
};

/// Gives fd its meaning. 0, or -EMFILE (a number beyond the table), -ENOMEM; then fd is as before. A meaning that the
/// number had (the descriptor was closed without telling us) is gone.
int install_descriptor(int fd, NewFile file);
/// The same meaning for copy as fd has. -EBADF when fd has none: copy then loses what it may have had.
int install_duplicate(int fd, int copy);
/// Gives fd the meaning of the open file that has this file_number(). -EBADF when there is none.
int install_by_number(int fd, u64 number);
/// Takes the meaning of all descriptors in [first, last] away; they are about to be closed by somebody else.
void forget_descriptors(u32 first, u32 last);
/// Takes fd's meaning away and closes it. -EBADF when it has none.
int close_descriptor(int fd);

}  // namespace anykvm::abi
