// A memory operand of which a mask chooses the elements: MASKMOV, AVX's VMASKMOV and VPMASKMOV, what AVX-512 masks.
// What is masked off is not accessed and cannot fault. Which elements those are differs (some instructions read a whole
// operand whatever the mask says, compressed ones count), so that nobody is asked but the host: where the operand is
// not plainly there, the instruction runs on a copy of it whose pages fault as the guest's do.
#include <algorithm>
#include <utility>

#include "engine/interpret/handlers.h"
#include "engine/interpret/masked_operand.h"
#include "engine/interpret/operands.h"
#include "engine/interpret/x87_pointers.h"
#include "os/fault_guard.h"

namespace anykvm::engine {
namespace {

/// What lies on the operand's first and on its second page.
struct Part {
  Gva gva;
  unsigned offset, size;  ///< in the operand
  u8* host;               ///< nullptr: a device's, or nothing
  bool is_visible;        ///< accesses to it succeed; a device's page is when it has truly been accessed
};

/// operand_bytes: an element in memory.
class MaskedOperand {
 public:
  MaskedOperand(Context& c, const Instruction& i, bool may_be_unaligned)
      : c_(c),
        i_(i),
        checks_alignment_(!may_be_unaligned && c.cpu.data_privilege == x86::Privilege::user_aligned),
        offset_(effective_offset(c, i)),
        size_(i.memory_bytes),
        access_(i.use == Cpu::Use::read ? Access::read : Access::write) {
    (void)linear_address(c, i.segment, offset_, 1, access_, gva_);
  }

  Result execute() {
    if (i_.alignment && gva_ & (i_.alignment - 1u) && chosen(0, size_) < size_) return c_.cpu.gp();
    ask_segment();
    // Where nothing goes element by element, limits come first.
    if ((first_ || last_ < size_) && is_read_whole() && hidden_access(first_, last_) < size_) return segment_fault();
    if (!is_aligned_for_user())
      if (const unsigned at = hidden_access(0, 0); at < size_)
        return is_in_segment(at) ? c_.cpu.raise(x86::exception::ac, 0) : segment_fault();
    ANYKVM_TRY(find_parts());
    for (unsigned at; (at = hidden_access()) < size_;) ANYKVM_TRY(reveal(at));
    return access_ == Access::read ? load() : store();
  }

 private:
  // --- what is there ---------------------------------------------------------------------------------------------
  /// Segmentation lets a beginning of the operand through, an end, or nothing: the elements in [first_, last_).
  void ask_segment() {
    const auto allowed = [&](unsigned from, unsigned to) {
      Gva gva;
      if (c_.cpu.state.code_bits != 64 && (offset_ + from) >> 32) return false;  // it does not wrap
      return linear_address(c_, i_.segment, offset_ + from, to - from, access_, gva) == Result::ok;
    };
    const unsigned element = i_.operand_bytes;
    for (first_ = 0, last_ = size_; last_ && !allowed(0, last_);) last_ -= element;
    if (last_) return;
    for (first_ = element, last_ = size_; first_ < last_ && !allowed(first_, last_);) first_ += element;
    if (first_ == last_) first_ = last_ = 0;
  }
  Result segment_fault() { return c_.cpu.raise(i_.segment == x86::ss ? x86::exception::ss : x86::exception::gp, 0); }
  bool is_in_segment(unsigned at) const { return at >= first_ && at < last_; }
  /// The mask is of what comes out, the operand is read whole.
  bool is_read_whole() {
    if (i_.unit != Unit::avx512 || i_.alignment || !opmask_number()) return false;
    u64& mask = c_.cpu.state.fpu.opmask[opmask_number()];
    const u64 before = std::exchange(mask, 0);
    const bool reads_whole = hidden_access(0, 0) < size_;
    mask = before;
    return reads_whole;
  }
  /// Alignment checks are of an element's size, or of the operand's.
  bool is_aligned_for_user() {
    if (!checks_alignment_) return true;
    if (gva_ & (i_.operand_bytes - 1u)) return false;
    return size_ < 16 || !(gva_ & 15) || !is_read_whole();
  }

  Result find_parts() {
    const unsigned first = std::min(unsigned(page_size - (gva_ & ~page_mask)), size_);
    parts_[0] = {gva_, 0, first, nullptr, false};
    parts_[1] = {gva_ + first, first, size_ - first, nullptr, false};
    for (Part& part : parts_) {
      if (first_ >= part.offset + part.size || last_ <= part.offset) continue;
      x86::Mmu::Translation page;
      const Result result = translate(part.offset, page);
      if (result == Result::exit) return result;
      if (result == Result::ok) part.host = page.host;
      part.is_visible = part.host;
    }
    return Result::ok;
  }
  Result translate(unsigned at, x86::Mmu::Translation& page) {
    return c_.cpu.mmu.translate(c_.cpu, gva_ + at, access_, c_.cpu.data_privilege, page, i_.segment == x86::ss);
  }

  /// An access to a byte that is not visible: a fault, or a device from now on.
  Result reveal(unsigned at) {
    if (!is_in_segment(at)) return segment_fault();
    x86::Mmu::Translation page;
    ANYKVM_TRY(translate(at, page));
    Part& part = parts_[at >= parts_[1].offset];
    part.host = page.host ? page.host - (at - part.offset) : nullptr;
    part.is_visible = true;
    return Result::ok;
  }

  // --- what is accessed ------------------------------------------------------------------------------------------
  unsigned hidden_access() {
    unsigned first = first_, last = last_;
    if (!parts_[0].is_visible) first = std::max(first, parts_[0].size);
    if (!parts_[1].is_visible) last = std::min(last, parts_[1].offset);
    return hidden_access(first, last);
  }
  /// The first byte accessed outside [first, last); size_: none.
  unsigned hidden_access(unsigned first, unsigned last) {
    if (first >= last) first = last = 0;
    if (i_.alignment) {
      const unsigned at = chosen(0, first);
      return at < size_ ? at : chosen(last, size_);
    }
    if (last == 0) return probe(c_.probe_pages.hidden(gva_));
    unsigned at = size_;
    if (first) at = probe(c_.probe_pages.shown_from(first));
    if (at == size_ && last < size_) at = probe(c_.probe_pages.shown_up_to(last));
    return at;
  }

  /// The first byte of [from, to) that an aligned move accesses: an element for each bit of its mask, and the host
  /// would not let it run elsewhere to be asked. size_: none.
  unsigned chosen(unsigned from, unsigned to) const {
    const u64 mask = c_.cpu.state.fpu.opmask[opmask_number()];
    for (unsigned at = from; at < to; ++at)
      if (mask >> at / i_.operand_bytes & 1) return at;
    return size_;
  }
  unsigned opmask_number() const { return std::find(i_.bytes, i_.bytes + i_.length, 0x62)[3] & 7; }

  /// The byte of the operand at which the instruction faults when the operand lies at `at`; size_: it does not.
  unsigned probe(u8* at) {
    x86::FpuState& fpu = c_.cpu.state.fpu;
    const x86::FpuState before = fpu;
    fpu.mxcsr = 0x1f80;
    at_ = at;
    const bool ran = run_guarded();
    if (ran)
      fpu = before;
    else
      fpu.mxcsr = before.mxcsr;  // the rest is as it was, but for what a translator saves into it at a fault
    return ran ? size_ : unsigned(accessed_ - at);
  }
  /// false: the host faulted at accessed_.
  bool run_guarded() {
    return os::run_guarded(
        [](void* self) {
          auto& operand = *static_cast<MaskedOperand*>(self);
          (void)run_native(operand.c_, operand.i_, operand.at_);
        },
        this, os::HostFaults::memory,
        [](void* self, const void* address) {
          auto& operand = *static_cast<MaskedOperand*>(self);
          operand.accessed_ = static_cast<const u8*>(address);
          return operand.c_.probe_pages.contains(address);
        });
  }

  // --- the instruction itself, on a copy -------------------------------------------------------------------------
  Result load() {
    u8* const at = c_.probe_pages.shown(gva_);
    for (const Part& part : parts_) {
      if (part.host)
        x86::copy_host(at + part.offset, part.host, part.size);
      else if (part.is_visible)
        ANYKVM_TRY(c_.cpu.read(part.gva, at + part.offset, part.size));
    }
    ANYKVM_TRY(run_native(c_, i_, at));
    note_access(0, size_);
    return Result::ok;
  }

  /// What the instruction stores is what comes out the same whatever was there before.
  Result store() {
    u8* const at = c_.probe_pages.shown(gva_);
    u8 stored[64];
    std::memset(at, 0, size_);
    ANYKVM_TRY(run_native(c_, i_, at));
    std::memcpy(stored, at, size_);
    std::memset(at, 0xff, size_);
    ANYKVM_TRY(run_native(c_, i_, at));
    for (const Part& part : parts_) {
      const unsigned end = part.offset + part.size;
      for (unsigned first = part.offset; first < end;) {
        unsigned last = first;
        while (last < end && stored[last] == at[last]) ++last;
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
  const bool checks_alignment_;
  const u64 offset_;
  const unsigned size_;
  const Access access_;
  Gva gva_ = 0;
  unsigned first_ = 0, last_ = 0;
  Part parts_[2];
  u8* at_ = nullptr;
  const u8* accessed_ = nullptr;
};

bool is_masked(const Decoded& d) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ: return true;
    default:
      if (is_mask_move(d.mnemonic())) return true;
      if (d.instruction.meta.category == ZYDIS_CATEGORY_COMPRESS) return d.is_memory(0);  // by elements in any case
      return d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX &&
             d.instruction.avx.mask.reg != ZYDIS_REGISTER_NONE && d.instruction.avx.mask.reg != ZYDIS_REGISTER_K0;
  }
}

/// As MASKMOVQ has when its store faults.
void enter_mmx_mode(x86::FpuState& fpu) {
  u8* const image = fpu.x87;
  u8 registers[8][16];
  std::memcpy(registers, image + 32, sizeof registers);
  const unsigned top = image[3] >> 3 & 7;
  for (unsigned n = 0; n < 8; ++n) std::memcpy(image + 32 + 16 * ((n + top) & 7), registers[n], 16);
  image[3] &= u8(~0x38);
  image[4] = 0xff;  // nothing is empty
}

Result access_masked(Context& c, const Instruction& i, bool may_be_unaligned) {
  ANYKVM_TRY(check_unit(c, i));
  note_x87(c, i);
  const X87Pointers pointers(c, i);
  const Access access = i.use == Cpu::Use::read ? Access::read : Access::write;
  Gva gva = 0;
  u8* host = nullptr;
  if (memory_address(c, i, i.memory_bytes, access, gva) == Result::ok && !(i.alignment && gva & (i.alignment - 1u)))
    host = c.cpu.mmu.lookup(gva, i.memory_bytes, access, c.cpu.data_privilege);
  if (const Result result = host ? run_native(c, i, host) : MaskedOperand(c, i, may_be_unaligned).execute();
      result != Result::ok) {
    if (i.unit == Unit::mmx) enter_mmx_mode(c.cpu.state.fpu);
    return result;
  }
  pointers.settle();
  return Result::ok;
}

Result masked_memory(Context& c, const Instruction& i) { return access_masked(c, i, false); }

/// VMASKMOV and VPMASKMOV, whose alignment is not checked. Their elements' offsets wrap one by one where the address
/// size ends. reg: destination and mask of a load, mask and source of a store.
Result masked_move(Context& c, const Instruction& i) {
  const u64 offset = effective_offset(c, i), offsets = size_mask(i.address_bytes);
  if (i.address_bytes == 8 || offset + i.memory_bytes - 1 <= offsets) [[likely]]
    return access_masked(c, i, true);
  ANYKVM_TRY(check_unit(c, i));
  const bool loads = i.use == Cpu::Use::read;
  const unsigned bytes = i.operand_bytes;
  u8* const data = c.cpu.state.fpu.vector[i.reg[loads ? 0 : 1].index];
  const u8* const mask = c.cpu.state.fpu.vector[i.reg[loads ? 1 : 0].index];
  const x86::Privilege rights = unaligned_rights(c);
  u8 loaded[64] = {};
  for (const bool commits : {false, true}) {
    for (unsigned at = 0; at < i.memory_bytes; at += bytes) {
      if (!(mask[at + bytes - 1] & 0x80)) continue;
      Gva gva;
      if (loads) {
        ANYKVM_TRY(linear_address(c, i.segment, (offset + at) & offsets, bytes, Access::read, gva));
        ANYKVM_TRY(c.cpu.read_as(gva, loaded + at, bytes, rights));
        continue;
      }
      ANYKVM_TRY(linear_address(c, i.segment, (offset + at) & offsets, bytes, Access::write, gva));
      x86::Mmu::Translation page;
      for (const Gva byte : {gva, gva + bytes - 1})
        ANYKVM_TRY(c.cpu.mmu.translate(c.cpu, byte, Access::write, rights, page, i.segment == x86::ss));
      if (commits) ANYKVM_TRY(c.cpu.write_as(gva, data + at, bytes, rights));
    }
    if (loads) break;
  }
  if (loads) std::memcpy(data, loaded, sizeof loaded);
  return Result::ok;
}

}  // namespace

Handler select_masked(const Decoded& d, Instruction& out) {
  if (!is_masked(d)) return nullptr;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n)
    if (d.is_memory(n)) out.operand_bytes = u8(d.operands[n].element_size / 8);
  if (is_mask_move(d.mnemonic())) out.operand_bytes = 8, out.alignment = 0;
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && !is_mask_move(d.mnemonic())) return masked_move;
  return masked_memory;
}

}  // namespace anykvm::engine
