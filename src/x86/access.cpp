// Memory accesses that the TLB's fast path does not serve: TLB misses, operands across two pages, MMIO, and the
// segment checks of modes other than 64-bit.
//
// Every page of an access is translated before the first byte moves: a fault finds nothing half done, and no device
// was read in vain.
#include "x86/descriptors.h"
#include "x86/paging.h"

namespace anykvm::x86 {

namespace {

bool power_of_two(unsigned n) { return !(n & (n - 1)); }

void announce_store(Cpu& cpu, Gva gva, const Operand::Part (&parts)[2]) {
  cpu.rehearsal.store(cpu.rehearsal.engine, parts[0].host, parts[0].size, gva);
  if (parts[1].size) cpu.rehearsal.store(cpu.rehearsal.engine, parts[1].host, parts[1].size, gva + parts[0].size);
}

/// The host or physical addresses of [gva, gva + size), size <= 4096: one part a page.
Result translate_parts(Cpu& cpu, Gva gva, unsigned size, Access access, Privilege privilege,
                       Operand::Part (&parts)[2]) {
  const unsigned first = unsigned(page_size - (gva & ~page_mask));
  // A store of which the second half faults makes no page dirty.
  if (size > first && access == Access::write && cpu.canonical(gva) && cpu.canonical(gva + first)) {
    ANYKVM_TRY(check_page(cpu, gva, access, privilege));
    ANYKVM_TRY(check_page(cpu, gva + first, access, privilege));
  }
  Mmu::Translation translation;
  ANYKVM_TRY(cpu.mmu.translate(cpu, gva, access, privilege, translation));
  parts[0] = {translation.host, translation.gpa, size < first ? size : first};
  parts[1] = {nullptr, 0, 0};
  if (size > first) {
    ANYKVM_TRY(cpu.mmu.translate(cpu, gva + first, access, privilege, translation));
    parts[1] = {translation.host, translation.gpa, size - first};
  }
  if (cpu.rehearsal && access == Access::write) [[unlikely]]
    announce_store(cpu, gva, parts);
  return Result::ok;
}

/// #AC: accesses must be aligned where the guest's user code asked for it: those of 2, 4, 8 and 16 bytes to their size,
/// wider ones to 16; the x87 unit's of 10 to 8, and its environments (14, 28) and images (94, 108) to their words.
Result check_alignment(Cpu& cpu, Gva gva, unsigned size) {
  unsigned mask = 0;
  switch (size) {
    case 2:
    case 14:
    case 94: mask = 1; break;
    case 4:
    case 28:
    case 108: mask = 3; break;
    case 8:
    case 10: mask = 7; break;
    case 16:
    case 32:
    case 64: mask = 15; break;
    default: break;
  }
  return gva & mask ? cpu.raise(exception::ac, 0) : Result::ok;
}

Result refuse_barred(Cpu& cpu) { return cpu.give_up("an instruction that KVM's emulator does not know, on a device"); }

/// Devices see at most 8 bytes at once, as KVM hands them out.
Result read_mmio(Cpu& cpu, Gpa gpa, u8* data, unsigned size) {
  while (size) {
    if (cpu.mmio.barred()) return refuse_barred(cpu);
    const unsigned length = size < 8 ? size : 8;
    if (!cpu.mmio.take_read(gpa, data, length)) {
      // Not answered yet. An in-kernel device's answer is kept too: a later fragment may need the client, and the
      // device must not be read twice then.
      u8 bytes[8];
      if (!power_of_two(length) || !cpu.machine.mmio_read(gpa, bytes, length)) {
        cpu.exit.kind = ExitKind::mmio_read;
        return Result::exit;
      }
      cpu.mmio.reply(bytes);
      if (!cpu.mmio.take_read(gpa, data, length)) return cpu.give_up("too many device reads in one instruction");
    }
    gpa += length, data += length, size -= length;
  }
  return Result::ok;
}

Result write_mmio(Cpu& cpu, Gpa gpa, const u8* data, unsigned size) {
  while (size) {
    if (cpu.mmio.barred()) return refuse_barred(cpu);
    const unsigned length = size < 8 ? size : 8;
    if (!(power_of_two(length) && cpu.machine.mmio_write(gpa, data, length)) &&
        !cpu.mmio.queue_write(gpa, data, length))
      return cpu.give_up("too many device writes in one instruction");
    gpa += length, data += length, size -= length;
  }
  return Result::ok;
}

Result read_parts(Cpu& cpu, const Operand::Part (&parts)[2], u8* data) {
  for (const Operand::Part& part : parts) {
    if (part.host) {
      copy_host(data, part.host, part.size);
    } else if (Result r = read_mmio(cpu, part.gpa, data, part.size); r != Result::ok) {
      return r;
    }
    data += part.size;
  }
  return Result::ok;
}

Result write_parts(Cpu& cpu, const Operand::Part (&parts)[2], const u8* data) {
  for (const Operand::Part& part : parts) {
    if (part.host) {
      copy_host(part.host, data, part.size);
    } else if (Result r = write_mmio(cpu, part.gpa, data, part.size); r != Result::ok) {
      return r;
    }
    data += part.size;
  }
  return Result::ok;
}

}  // namespace

Result Cpu::read_slow(Gva gva, void* data, unsigned size, Privilege privilege) {
  if (privilege == Privilege::user_aligned) ANYKVM_TRY(check_alignment(*this, gva, size));
  Operand::Part parts[2];
  ANYKVM_TRY(translate_parts(*this, gva, size, Access::read, privilege, parts));
  if (debug_watch & watch_data) [[unlikely]]
    note_data_access(gva, size, Access::read);
  return read_parts(*this, parts, static_cast<u8*>(data));
}

Result Cpu::write_slow(Gva gva, const void* data, unsigned size, Privilege privilege) {
  if (privilege == Privilege::user_aligned) ANYKVM_TRY(check_alignment(*this, gva, size));
  Operand::Part parts[2];
  ANYKVM_TRY(translate_parts(*this, gva, size, Access::write, privilege, parts));
  if (debug_watch & watch_data) [[unlikely]]
    note_data_access(gva, size, Access::write);
  return write_parts(*this, parts, static_cast<const u8*>(data));
}

Result Cpu::open_operand_slow(Use use, Operand& operand) {
  const Access access = use == Use::read ? Access::read : Access::write;
  if (data_privilege == Privilege::user_aligned) ANYKVM_TRY(check_alignment(*this, operand.gva, operand.size));
  ANYKVM_TRY(translate_parts(*this, operand.gva, operand.size, access, data_privilege, operand.parts));
  if (debug_watch & watch_data) [[unlikely]]
    note_data_access(operand.gva, operand.size, access);
  if (operand.parts[0].host && !operand.parts[1].size) {
    operand.host = operand.parts[0].host;
    return Result::ok;
  }
  if (mmio.barred() && (!operand.parts[0].host || (operand.parts[1].size && !operand.parts[1].host)))
    return refuse_barred(*this);
  operand.bounced = true;
  operand.host = operand.buffer;
  if (use == Use::write) return Result::ok;
  // A read-only slot is RAM for the load and a device for the store.
  Operand::Part readable[2];
  ANYKVM_TRY(translate_parts(*this, operand.gva, operand.size, Access::read, data_privilege, readable));
  return read_parts(*this, readable, operand.buffer);
}

void Cpu::commit_operand(Operand& operand) {
  // Only a full queue of device writes could fail, and one operand never fills it.
  (void)write_parts(*this, operand.parts, operand.buffer);
}

Result Cpu::linear_legacy(SegmentName name, u64 offset, unsigned size, Access access, Gva& out) {
  const Segment& segment = state.segment[name];
  const u8 vector = name == ss ? exception::ss : exception::gp;
  const u32 start = u32(offset);
  out = u32(segment.base + start);
  if (!state.protected_mode() || state.v86()) {
    return u64(start) + size - 1 <= segment.limit ? Result::ok : raise(vector, 0);
  }

  if (segment.unusable || !segment.present) return raise(vector, 0);
  const bool code = segment.type & 8;
  if (access == Access::write ? code || !(segment.type & 2) : code && !(segment.type & 2) && access == Access::read) {
    return raise(vector, 0);
  }
  return inside_limit(segment, start, size) ? Result::ok : raise(vector, 0);
}

}  // namespace anykvm::x86
