// Task switches: the old task into its TSS, the new one out of its own.
// Reference: Intel SDM volume 3 chapter 8 (table 8-1 for the order of the checks, 8-2 for busy, NT and the link).
//
// Everything that can fail in the old task is done first. Then the registers are the new task's, and what is wrong with
// its segments is a fault of the new task, at its first instruction.
#include "x86/task_switch.h"

#include <cstring>

#include "x86/debug.h"
#include "x86/paging.h"
#include "x86/stack.h"

namespace anykvm::x86 {

namespace {

using Cause = TaskSwitch::Cause;

/// A task's registers, from either form of TSS.
struct Task {
  u32 cr3 = 0, eip = 0, eflags = 0, gpr[8] = {};
  u16 segment[6] = {}, ldt = 0;
  bool trap = false;
};

constexpr unsigned tss32_size = 0x68, tss16_size = 0x2c;
constexpr unsigned image32_start = 0x20, image16_start = 0x0e;  // from EIP on the processor writes

template <class T>
T at(const u8* image, unsigned offset) {
  T value;
  std::memcpy(&value, image + offset, sizeof value);
  return value;
}

Task parse(const u8* image, bool wide) {
  Task task;
  if (wide) {
    task.cr3 = at<u32>(image, 0x1c);
    task.eip = at<u32>(image, 0x20);
    task.eflags = at<u32>(image, 0x24);
    for (unsigned i = 0; i < 8; ++i) task.gpr[i] = at<u32>(image, 0x28 + 4 * i);
    for (unsigned i = 0; i < 6; ++i) task.segment[i] = at<u16>(image, 0x48 + 4 * i);
    task.ldt = at<u16>(image, 0x60);
    task.trap = image[0x64] & 1;
  } else {
    task.eip = at<u16>(image, 0x0e);
    task.eflags = at<u16>(image, 0x10);
    // What the 80286 did not have: the upper halves stay, FS and GS are null.
    for (unsigned i = 0; i < 8; ++i) task.gpr[i] = at<u16>(image, 0x12 + 2 * i);
    for (unsigned i = 0; i < 4; ++i) task.segment[i] = at<u16>(image, 0x22 + 2 * i);
    task.ldt = at<u16>(image, 0x2a);
  }
  return task;
}

Result check_writable(Cpu& cpu, Gva gva, unsigned size) {
  Mmu::Translation translation;
  ANYKVM_TRY(cpu.mmu.translate(cpu, u32(gva), Access::write, cpu.system_privilege, translation));
  return cpu.mmu.translate(cpu, u32(gva + size - 1), Access::write, cpu.system_privilege, translation);
}

Result save(Cpu& cpu, u32 rip, u32 flags) {
  const CpuState& s = cpu.state;
  const u64 base = s.tr.base;
  const Privilege privilege = cpu.system_privilege;
  if (s.tr.type & 8) {
    u32 words[10] = {rip, flags};
    for (unsigned i = 0; i < 8; ++i) words[2 + i] = u32(s.gpr[i]);
    ANYKVM_TRY(cpu.write_as(u32(base + image32_start), words, sizeof words, privilege));
    for (unsigned i = 0; i < 6; ++i)
      ANYKVM_TRY(cpu.write_as(u32(base + 0x48 + 4 * i), &s.segment[i].selector, 2, privilege));
    return Result::ok;
  }
  u16 words[14] = {u16(rip), u16(flags)};
  for (unsigned i = 0; i < 8; ++i) words[2 + i] = u16(s.gpr[i]);
  for (unsigned i = 0; i < 4; ++i) words[10 + i] = s.segment[i].selector;
  return cpu.write_as(u32(base + image16_start), words, sizeof words, privilege);
}

Result set_busy(Cpu& cpu, const Descriptor& descriptor, bool busy) {
  const u8 access = u8(descriptor.low >> 40);
  const u8 byte = busy ? access | 2 : access & ~2;
  return cpu.write_as(descriptor.address + 5, &byte, 1, cpu.system_privilege);
}

// --- the new task's segments, each check a #TS unless said otherwise -------------------------------------------------

Result load_ldt(Cpu& cpu, u16 selector, u32 ext) {
  CpuState& s = cpu.state;
  s.ldtr = null_segment(selector);
  if (null_selector(selector)) return Result::ok;
  const u32 error = selector_error(selector, ext);
  if (selector & 4) return cpu.raise(exception::ts, error);
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::ts, ext, descriptor));
  if (descriptor.segment.s || descriptor.segment.type != system_type::ldt || !descriptor.segment.present)
    return cpu.raise(exception::ts, error);
  s.ldtr = descriptor.segment;
  return Result::ok;
}

Result load_task_code(Cpu& cpu, u16 selector, u32 ext) {
  const u32 error = selector_error(selector, ext);
  if (null_selector(selector)) return cpu.raise(exception::ts, error);
  Descriptor code;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::ts, ext, code));
  const u8 rpl = selector & 3;
  if (!code.code() || (code.conforming() ? code.segment.dpl > rpl : code.segment.dpl != rpl))
    return cpu.raise(exception::ts, error);
  if (!code.segment.present) return cpu.raise(exception::np, error);
  ANYKVM_TRY(mark_accessed(cpu, code));
  cpu.state.segment[cs] = code.segment;
  return Result::ok;
}

Result load_task_stack(Cpu& cpu, u16 selector, u8 cpl, u32 ext) {
  const u32 error = selector_error(selector, ext);
  if (null_selector(selector)) return cpu.raise(exception::ts, error);
  Descriptor stack;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::ts, ext, stack));
  if ((selector & 3) != cpl || stack.segment.dpl != cpl || !stack.writable()) return cpu.raise(exception::ts, error);
  if (!stack.segment.present) return cpu.raise(exception::ss, error);
  ANYKVM_TRY(mark_accessed(cpu, stack));
  cpu.state.segment[ss] = stack.segment;
  return Result::ok;
}

Result load_task_data(Cpu& cpu, SegmentName name, u16 selector, u8 cpl, u32 ext) {
  if (null_selector(selector)) return Result::ok;  // as it was left: unusable
  const u32 error = selector_error(selector, ext);
  Descriptor data;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::ts, ext, data));
  const u8 rpl = selector & 3, dpl = data.segment.dpl;
  if (!data.readable() || (!data.conforming() && (rpl > dpl || cpl > dpl))) return cpu.raise(exception::ts, error);
  if (!data.segment.present) return cpu.raise(exception::np, error);
  ANYKVM_TRY(mark_accessed(cpu, data));
  cpu.state.segment[name] = data.segment;
  return Result::ok;
}

Result load_segments(Cpu& cpu, const Task& task, u32 ext) {
  CpuState& s = cpu.state;
  ANYKVM_TRY(load_ldt(cpu, task.ldt, ext));
  if (s.v86()) return Result::ok;
  const u8 cpl = task.segment[cs] & 3;
  ANYKVM_TRY(load_task_code(cpu, task.segment[cs], ext));
  ANYKVM_TRY(load_task_stack(cpu, task.segment[ss], cpl, ext));
  for (SegmentName name : {ds, es, fs, gs}) ANYKVM_TRY(load_task_data(cpu, name, task.segment[name], cpl, ext));
  return Result::ok;
}

/// The registers of the new task. Its segments are selectors without descriptors so far.
Result commit(Cpu& cpu, const Task& task, bool wide, bool nested) {
  CpuState& s = cpu.state;
  if (wide && s.paging()) {
    if (s.cr4 & cr4::pae && !load_pdptes(cpu, task.cr3)) return cpu.gp();
    s.cr3 = task.cr3;
    cpu.enter_address_space(true);
  }
  s.rip = task.eip;
  constexpr u64 loaded = 0x3f7fd7;                                                         // the defined bits
  const u64 kept = wide ? 0 : s.rflags() & (flag::ac | flag::vif | flag::vip | flag::id);  // as of the upper halves
  s.set_rflags((task.eflags & loaded) | kept | flag::fixed1 | (nested ? flag::nt : 0));
  for (unsigned i = 0; i < 8; ++i) s.gpr[i] = wide ? task.gpr[i] : (s.gpr[i] & 0xffff0000) | task.gpr[i];
  for (unsigned i = 0; i < 6; ++i)
    s.segment[i] = s.v86() ? v86_segment(task.segment[i]) : null_segment(task.segment[i], task.segment[cs] & 3);
  if (!s.v86()) {
    // Faults from here on are delivered at the new privilege level, whatever becomes of CS and SS.
    s.segment[cs].db = wide;
  }
  s.cr0 |= cr0::ts;
  s.event.shadow = 0;
  if (s.dr7 & 0x155) {
    s.dr7 &= ~0x155ull;  // L0-L3 and LE
    cpu.update_debug();
  }
  cpu.update_mode();
  return Result::ok;
}

}  // namespace

Result switch_task(Cpu& cpu, const TaskSwitch& request) {
  CpuState& s = cpu.state;
  const u16 selector = request.selector;
  const u32 error = selector_error(selector, request.ext);
  const bool returns = request.cause == Cause::iret;
  const bool nests = request.cause == Cause::call || request.cause == Cause::event;
  const u8 vector = returns ? exception::ts : exception::gp;

  // The new TSS.
  if (selector & 4) return cpu.raise(vector, error);
  Descriptor next;
  ANYKVM_TRY(read_descriptor(cpu, selector, vector, request.ext, next));
  const u8 type = next.segment.type;
  const bool wide = type & 8;
  const bool fits = !next.segment.s && (returns ? type == system_type::tss_busy || type == system_type::tss16_busy
                                                : type == system_type::tss || type == system_type::tss16);
  if (!fits) return cpu.raise(vector, error);
  if (!next.segment.present) return cpu.raise(exception::np, error);
  const unsigned size = wide ? tss32_size : tss16_size;
  if (next.segment.limit < size - 1) return cpu.raise(exception::ts, error);
  u8 image[tss32_size] = {};
  ANYKVM_TRY(cpu.read_as(u32(next.segment.base), image, size, cpu.system_privilege));
  const Task task = parse(image, wide);

  // What is about to be written: the old task's TSS, the busy bits, the link.
  Descriptor old;
  const u16 old_selector = s.tr.selector;
  const unsigned old_start = s.tr.type & 8 ? image32_start : image16_start;
  const unsigned old_size = s.tr.type & 8 ? 0x5e - image32_start : 0x2a - image16_start;
  if (s.tr.limit < old_start + old_size - 1) return cpu.raise(exception::ts, selector_error(old_selector, request.ext));
  ANYKVM_TRY(read_descriptor(cpu, old_selector, exception::ts, request.ext, old));
  ANYKVM_TRY(check_writable(cpu, s.tr.base + old_start, old_size));
  ANYKVM_TRY(check_writable(cpu, old.address + 5, 1));
  ANYKVM_TRY(check_writable(cpu, next.address + 5, 1));
  if (nests) ANYKVM_TRY(check_writable(cpu, next.segment.base, 2));

  u64 flags = s.rflags() | (request.resume_flag ? flag::rf : 0);
  if (returns) flags &= ~flag::nt;
  ANYKVM_TRY(save(cpu, u32(request.return_rip), u32(flags)));
  if (!nests) ANYKVM_TRY(set_busy(cpu, old, false));
  if (!returns) ANYKVM_TRY(set_busy(cpu, next, true));
  if (nests) ANYKVM_TRY(cpu.write_as(u32(next.segment.base), &old_selector, 2, cpu.system_privilege));

  s.tr = next.segment;
  s.tr.type |= 2;
  ANYKVM_TRY(commit(cpu, task, wide, nests));
  ANYKVM_TRY(load_segments(cpu, task, request.ext));
  cpu.update_mode();
  if (s.rip > s.segment[cs].limit) return cpu.raise(exception::gp, request.ext);
  if (request.has_error) {
    Stack stack(cpu);
    ANYKVM_TRY(stack.push(request.error, wide ? 4 : 2));
    s.gpr[rsp] = stack.rsp();
  }
  if (task.trap) {
    cpu.fault = {.vector = exception::db, .trap = true, .payload = dr6_bt};
    return Result::fault;
  }
  return Result::ok;
}

}  // namespace anykvm::x86
