// A memory operand of which a mask chooses the elements: MASKMOV, AVX's VMASKMOV and VPMASKMOV, what AVX-512 masks.
// What is masked off is not accessed and cannot fault. Which elements those are differs (some instructions read a whole
// operand whatever the mask says, compressed ones count), so that nobody is asked but the host: where the operand is
// not plainly there, the instruction runs on a copy of it whose pages fault as the guest's do.
#include <bit>

#include "engine/interpret/handlers.h"
#include "engine/interpret/masked_operand.h"
#include "engine/interpret/operands.h"
#include "engine/interpret/x87_pointers.h"
#include "os/fault_guard.h"

namespace anykvm::engine {
namespace {

/// What the operand is made of: what lies on its first and on its second page.
struct Part {
  Gva gva;
  unsigned offset, size;  ///< in the operand
  u8* host;
  bool faults, opened;
};

class MaskedOperand {
 public:
  MaskedOperand(Context& c, const Instruction& i, Gva gva)
      : c_(c), i_(i), gva_(gva), access_(i.use == Cpu::Use::read ? Access::read : Access::write) {}

  Result execute() {
    if (c_.cpu.data_privilege == x86::Privilege::user_aligned && std::has_single_bit(unsigned(i_.memory_bytes)) &&
        i_.memory_bytes <= 8 && gva_ & (i_.memory_bytes - 1u))
      return c_.cpu.raise(x86::exception::ac, 0);
    ANYKVM_TRY(find_parts());
    if (access_ == Access::read) return load();
    return store();
  }

 private:
  Result find_parts() {
    const unsigned first = unsigned(page_size - (gva_ & ~page_mask));
    const unsigned size = i_.memory_bytes;
    parts_[0] = {gva_, 0, size < first ? size : first, nullptr, false, false};
    count_ = 1;
    if (size > first) parts_[count_++] = {gva_ + first, first, size - first, nullptr, false, false};
    for (unsigned n = 0; n < count_; ++n) {
      Part& part = parts_[n];
      x86::Mmu::Translation page;
      const Result result = c_.cpu.mmu.translate(c_.cpu, part.gva, access_, c_.cpu.data_privilege, page);
      if (result == Result::exit) return result;
      part.faults = result == Result::fault;
      if (part.faults) continue;
      part.host = page.host;
      part.opened = page.host;  // a device's only when it is truly accessed
    }
    return Result::ok;
  }

  /// Runs the instruction until it accesses nothing that is not there. ok: done, on the copy at at_.
  Result run_on_copy(const u8* contents) {
    for (;;) {
      at_ = c_.probe_pages.place(gva_, parts_[0].opened, parts_[count_ - 1].opened, count_ == 2);
      for (unsigned n = 0; n < count_; ++n)
        if (parts_[n].opened) std::memcpy(at_ + parts_[n].offset, contents + parts_[n].offset, parts_[n].size);
      if (run_guarded()) return result_;
      const unsigned offset = unsigned(accessed_ - at_);
      Part& part = parts_[count_ == 2 && offset >= parts_[1].offset];
      if (part.faults) {
        x86::Mmu::Translation page;
        ANYKVM_TRY(c_.cpu.mmu.translate(c_.cpu, gva_ + offset, access_, c_.cpu.data_privilege, page));
        return execute();  // mapped meanwhile
      }
      part.opened = true;
      if (access_ == Access::read) return load();
    }
  }

  /// false: the host faulted at accessed_.
  bool run_guarded() {
    return os::run_guarded(
        [](void* self) {
          auto& operand = *static_cast<MaskedOperand*>(self);
          operand.result_ = run_native(operand.c_, operand.i_, operand.at_);
        },
        this, os::HostFaults::memory,
        [](void* self, const void* address) {
          auto& operand = *static_cast<MaskedOperand*>(self);
          operand.accessed_ = static_cast<const u8*>(address);
          return operand.c_.probe_pages.contains(address);
        });
  }

  Result load() {
    u8 contents[64];
    for (unsigned n = 0; n < count_; ++n) {
      const Part& part = parts_[n];
      if (part.host)
        x86::copy_host(contents + part.offset, part.host, part.size);
      else if (part.opened)
        ANYKVM_TRY(c_.cpu.read(part.gva, contents + part.offset, part.size));
    }
    const Result result = run_on_copy(contents);
    if (result == Result::ok) note_access(0, i_.memory_bytes);
    return result;
  }

  /// What the instruction stores is what comes out the same whatever was there before.
  Result store() {
    u8 zeros[64] = {}, ones[64], stored[64];
    std::memset(ones, 0xff, sizeof ones);
    ANYKVM_TRY(run_on_copy(zeros));
    for (unsigned n = 0; n < count_; ++n)
      if (parts_[n].opened) std::memcpy(stored + parts_[n].offset, at_ + parts_[n].offset, parts_[n].size);
    ANYKVM_TRY(run_on_copy(ones));
    for (unsigned n = 0; n < count_; ++n) {
      const Part& part = parts_[n];
      if (!part.opened) continue;
      const unsigned end = part.offset + part.size;
      const auto same = [&](unsigned at) { return stored[at] == at_[at]; };
      for (unsigned first = part.offset; first < end;) {
        unsigned last = first;
        while (last < end && same(last)) ++last;
        if (last > first) ANYKVM_TRY(commit(part, first, stored + first, last - first));
        first = last + 1;
      }
    }
    return Result::ok;
  }

  Result commit(const Part& part, unsigned offset, const u8* data, unsigned size) {
    if (!part.host) return c_.cpu.write(gva_ + offset, data, size);
    x86::copy_host(part.host + (offset - part.offset), data, size);
    note_access(offset, size);
    return Result::ok;
  }

  void note_access(unsigned offset, unsigned size) {
    if (c_.cpu.debug_watch & x86::watch_data) c_.cpu.note_data_access(gva_ + offset, size, access_);
  }

  Context& c_;
  const Instruction& i_;
  Gva gva_;
  Access access_;
  Part parts_[2];
  unsigned count_ = 0;
  u8* at_ = nullptr;
  const u8* accessed_ = nullptr;
  Result result_ = Result::ok;
};

}  // namespace

bool is_masked(const Decoded& d) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ: return true;
    default:
      if (is_mask_move(d.mnemonic())) return true;
      return d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX &&
             d.instruction.avx.mask.reg != ZYDIS_REGISTER_NONE && d.instruction.avx.mask.reg != ZYDIS_REGISTER_K0;
  }
}

Result masked_memory(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  note_x87(c, i);
  const X87Pointers pointers(c, i);
  const Access access = i.use == Cpu::Use::read ? Access::read : Access::write;
  Gva gva;
  // In 64-bit mode the pages say what is not there; a segment's limit is checked for the whole operand.
  ANYKVM_TRY(memory_address(c, i, c.cpu.state.code_bits == 64 ? 1 : i.memory_bytes, access, gva));
  const bool aligned = !i.alignment || !(gva & (i.alignment - 1u));
  if (u8* host = c.cpu.mmu.lookup(gva, i.memory_bytes, access, c.cpu.data_privilege); host && aligned) [[likely]] {
    ANYKVM_TRY(run_native(c, i, host));
  } else {
    ANYKVM_TRY(MaskedOperand(c, i, gva).execute());
  }
  pointers.settle();
  return Result::ok;
}

}  // namespace anykvm::engine
