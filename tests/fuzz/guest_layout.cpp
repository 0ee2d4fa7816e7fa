#include "fuzz/guest_layout.h"

#include <cstring>
#include <initializer_list>

namespace anykvm::fuzz {
namespace {

using namespace layout;

enum Selector : u16 {
  code64 = 0x08,
  data32 = 0x10,
  code32 = 0x18,
  code16 = 0x20,
  data16 = 0x28,
  user_code32 = 0x33,
  user_data = 0x3b,
  user_code64 = 0x43,
  conforming = 0x48,
  expand_down = 0x50,
  tss_busy = 0x58,     // 64-bit form takes two
  tss_other = 0x68,    // 32-bit, available
  tss_old = 0x70,      // 16-bit, available
  local_table = 0x78,  // two
  call_gate = 0x88,    // two
  call_gate16 = 0x98,
  task_gate = 0xa0,
  absent = 0xa8,
  execute_only = 0xb0,
  read_only = 0xb8,
  user_gate = 0xc3,
};

constexpr u64 descriptor(u32 base, u32 limit, u32 type, u32 dpl, u32 flags, bool present = true) {
  return (limit & 0xffff) | u64{base & 0xffffff} << 16 | u64{type} << 40 | u64{dpl} << 45 | u64{present} << 47 |
         u64{limit >> 16 & 15} << 48 | u64{flags} << 52 | u64{base >> 24} << 56;
}
constexpr u64 gate(u16 selector, u32 offset, u32 type, u32 dpl, u32 count = 0) {
  return (offset & 0xffff) | u64{selector} << 16 | u64{count & 31} << 32 | u64{type} << 40 | u64{dpl} << 45 |
         1ull << 47 | u64{offset >> 16} << 48;
}

class Writer {
 public:
  explicit Writer(std::span<u8> ram) : ram_(ram) {}
  template <class T>
  void put(Gpa at, T value) {
    std::memcpy(ram_.data() + at, &value, sizeof value);
  }

 private:
  std::span<u8> ram_;
};

bool is_long(Mode mode) { return mode >= Mode::long64 && mode <= Mode::long64_la57; }

u16 handler_code(Mode mode) {
  if (is_long(mode)) return code64;
  return mode == Mode::protected16 ? u16{code16} : u16{code32};
}

void write_descriptors(Writer& to, Mode mode) {
  const auto set = [&to](u16 selector, u64 value) { to.put(gdt + (selector & 0xfff8), value); };
  constexpr u32 g = 8, db = 4, l = 2, flat = 0xfffff;
  set(code64, descriptor(0, flat, 0x1b, 0, g | l));
  set(data32, descriptor(0, flat, 0x13, 0, g | db));
  set(code32, descriptor(0, flat, 0x1b, 0, g | db));
  set(code16, descriptor(0, flat, 0x1b, 0, 0));
  set(data16, descriptor(data, 0x1fff, 0x13, 0, 0));
  set(user_code32, descriptor(0, flat, 0x1b, 3, g | db));
  set(user_data, descriptor(0, flat, 0x13, 3, g | db));
  set(user_code64, descriptor(0, flat, 0x1b, 3, g | l));
  set(conforming, descriptor(0, flat, 0x1f, 0, g | db));
  set(expand_down, descriptor(0, 0x1f, 0x17, 0, g | db));
  set(tss_busy, descriptor(is_long(mode) ? tss64 : tss32, 0x2100, 0x0b, 0, 0));
  set(tss_busy + 8, 0);
  set(tss_other, descriptor(tss32 + 0x400, 0x2100, 0x09, 3, 0));
  set(tss_old, descriptor(tss16, 0x40, 0x01, 3, 0));
  set(local_table, descriptor(ldt, 0xff, 0x02, 0, 0));
  set(local_table + 8, 0);
  set(call_gate, gate(handler_code(mode), handlers, 0x0c, 3, 2));
  set(call_gate + 8, 0);
  set(call_gate16, gate(code16, 0x0100, 0x04, 3, 1));
  set(task_gate, gate(tss_other, 0, 0x05, 3));
  set(absent, descriptor(0, flat, 0x13, 0, g, false));
  set(execute_only, descriptor(0, flat, 0x19, 0, g | db));
  set(read_only, descriptor(0, flat, 0x11, 3, g | db));
  set(user_gate & ~7, gate(user_code32, code, 0x0c, 3, 0));
  for (u16 n = 0; n < 16; ++n) to.put(ldt + n * 8u, descriptor(data, 0xfff, 0x13 + (n & 8), n & 3, n & 4));
}

void write_tss(Writer& to) {
  for (unsigned n = 0; n < 3; ++n) to.put<u64>(tss64 + 4 + n * 8, stack + 0x1000 * (n + 1));
  for (unsigned n = 0; n < 7; ++n) to.put<u64>(tss64 + 36 + n * 8, stack + 0x800);
  to.put<u16>(tss64 + 102, 0x68);
  for (const Gpa base : {tss32, tss32 + 0x400}) {
    for (unsigned n = 0; n < 3; ++n) {
      to.put<u32>(base + 4 + n * 8, u32(stack + 0x1000 * (n + 1)));
      to.put<u32>(base + 8 + n * 8, data32);
    }
    to.put<u32>(base + 0x1c, legacy_pd);
    to.put<u32>(base + 0x20, handlers);
    to.put<u32>(base + 0x24, 2);
    to.put<u32>(base + 0x38, stack + 0x2000);
    for (unsigned n = 0; n < 6; ++n) to.put<u32>(base + 0x48 + n * 4, n == 1 ? code32 : data32);
    to.put<u16>(base + 0x66, 0x68);
  }
  for (unsigned n = 0; n < 3; ++n) {
    to.put<u16>(tss16 + 2 + n * 4, 0xff0);
    to.put<u16>(tss16 + 4 + n * 4, data32);
  }
  to.put<u16>(tss16 + 14, 0x100);
  to.put<u16>(tss16 + 16, 2);
  to.put<u16>(tss16 + 26, 0xff0);
  for (unsigned n = 0; n < 4; ++n) to.put<u16>(tss16 + 34 + n * 2, n == 1 ? code16 : data32);
}

void write_idts(Writer& to, Mode mode) {
  const u16 code = handler_code(mode);
  for (u32 vector = 0; vector < 256; ++vector) {
    const u32 handler = handlers + (vector & 31) * 4;
    const u32 dpl = vector & 1 ? 3 : 0, type = vector & 2 ? 0x0f : 0x0e;
    u64 entry64 = gate(code, handler, type, dpl);
    if (vector == 2 || vector == 8 || vector == 18) entry64 |= 1ull << 32;  // IST
    to.put(idt64 + vector * 16u, entry64);
    to.put<u64>(idt64 + vector * 16u + 8, 0);
    u64 entry32 = gate(code, handler, type, dpl);
    if (vector == 0x41) entry32 = gate(tss_other, 0, 0x05, 3);
    if (vector == 0x43) entry32 = gate(code16, 0x100, 0x06, 3);
    to.put(idt32 + vector * 8u, entry32);
    to.put<u32>(vector * 4u, u32(handlers / 16) << 16 | (vector & 31) * 4);  // the real-mode table
  }
  // out trap_port, al; hlt: the same bytes in every mode.
  for (u32 n = 0; n < 32; ++n)
    for (const auto& [offset, value] : {std::pair{0, 0xe6}, {1, int(trap_port)}, {2, 0xf4}, {3, 0x90}})
      to.put<u8>(handlers + n * 4 + offset, u8(value));
  for (const auto& [offset, value] : {std::pair{0, 0xe6}, {1, int(trap_port)}, {2, 0xf4}})
    to.put<u8>(0x100 + offset, u8(value));  // where the 16-bit gates lead
}

void write_page_tables(Writer& to) {
  constexpr u64 p = 1, w = 2, u = 4, ps = 0x80, global = 0x100, nx = 1ull << 63;
  to.put(pml5, pml4 | p | w | u);
  to.put(pml5 + 511 * 8, pml4 | p | w | u);
  to.put(pml4, pdpt | p | w | u);
  to.put(pml4 + 511 * 8, pdpt | p | w | u);
  to.put(pdpt, pd | p | w | u);
  to.put(pdpt + 8, u64{0} | p | w | ps);       // 1 GiB from 0
  to.put(pdpt + 16, u64{0} | p | w | u | ps);  // the same for the user
  to.put(pdpt + 24, high | p | w | u | ps);    // RAM above 4 GiB
  to.put(pdpt + 511 * 8, pd | p | w | u);
  to.put(pd, pt | p | w | u);
  to.put(pd + 8, u64{0} | p | w | u | ps | global);
  to.put(pd + 16, u64{0xfee00000} | p | w | ps);  // the APIC and nothing else
  to.put(pd + 24, u64{0} | p | w | ps | nx);
  to.put(pae_pdpt, pd | p);
  to.put(pae_pdpt + 8, pd | p);
  to.put(pae_pdpt + 24, pd | p);
  to.put<u32>(legacy_pd, legacy_pt | p | w | u);
  to.put<u32>(legacy_pd + 4, u32(p | w | u | ps));
  to.put<u32>(legacy_pd + 8, u32(p | ps | 1u << 13));  // PSE-36: at 4 GiB
  to.put<u32>(legacy_pd + 12, u32(0xfec00000 | p | w | ps));
  to.put<u32>(legacy_pd + 1020 * 4, u32(legacy_pt | p | w | u));
  for (u64 n = 0; n < 512; ++n) {
    u64 entry = n * page_size | p | w | u;
    if (n * page_size >= data + 0x4000 && n * page_size < ram_size) {
      // The upper half of the data is of all kinds.
      entry = n * page_size;
      if (n & 1) entry |= u;
      if (n & 2) entry |= w;
      if (n % 7) entry |= p;
      if (n % 5 == 0) entry |= nx;
      if (n & 4) entry |= global;
      if (n == ram_size / page_size - 1) entry |= 1ull << 51;
    }
    to.put(pt + n * 8, entry);
    to.put<u32>(legacy_pt + n * 4, u32(entry));
  }
}

kvm_segment segment(u16 selector, u8 type, u8 dpl, bool db, bool l) {
  return {.base = 0,
          .limit = 0xffffffff,
          .selector = selector,
          .type = type,
          .present = 1,
          .dpl = dpl,
          .db = db,
          .s = 1,
          .l = l,
          .g = 1};
}

}  // namespace

void write_tables(std::span<u8> ram, Mode mode) {
  std::memset(ram.data(), 0, ram.size());
  Writer to(ram);
  write_idts(to, mode);
  write_descriptors(to, mode);
  write_tss(to);
  write_page_tables(to);
}

void set_mode(Mode mode, kvm_sregs& sregs, kvm_regs& regs) {
  regs = {};
  regs.rip = code;
  regs.rsp = stack + 0x3000;
  regs.rflags = 2;
  regs.rbx = regs.rsi = data;
  regs.rdi = regs.rbp = data + 0x1000;
  sregs.cr4 = 0x600;  // OSFXSR, OSXMMEXCPT
  sregs.efer = 0;
  sregs.gdt = {.base = gdt, .limit = 0x7ff};
  sregs.idt = {.base = idt32, .limit = 0x7ff};
  sregs.tr = {.base = tss32, .limit = 0x2100, .selector = tss_busy, .type = 11, .present = 1};
  sregs.ldt = {.base = ldt, .limit = 0xff, .selector = local_table, .type = 2, .present = 1};
  if (mode == Mode::real) {
    sregs.cr0 = 0x10;
    sregs.idt = {.base = 0, .limit = 0x3ff};
    for (kvm_segment* s : {&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss})
      *s = {.base = data, .limit = 0xffff, .selector = u16(data / 16), .type = 3, .present = 1, .s = 1};
    sregs.ss.base = stack, sregs.ss.selector = stack / 16;
    sregs.cs = {.base = code, .limit = 0xffff, .selector = u16(code / 16), .type = 11, .present = 1, .s = 1};
    regs.rip = 0;
    regs.rsp = 0xff0;
    regs.rbx = regs.rsi = regs.rdi = 0;
    regs.rbp = 0x800;
    return;
  }
  const bool user = mode == Mode::v86 || mode == Mode::long64_user || mode == Mode::compatibility32_user;
  const u8 dpl = user ? 3 : 0;
  sregs.cr0 = 0x31;
  sregs.cs = segment(user ? user_code32 : code32, 11, dpl, true, false);
  for (kvm_segment* s : {&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss})
    *s = segment(user ? user_data : data32, 3, dpl, true, false);
  switch (mode) {
    case Mode::protected16: sregs.cs = segment(code16, 11, 0, false, false); break;
    case Mode::paging32:
      sregs.cr0 = 0x80010031;
      sregs.cr3 = legacy_pd;
      sregs.cr4 |= 0x90;
      break;
    case Mode::pae:
      sregs.cr0 = 0x80010031;
      sregs.cr3 = pae_pdpt;
      sregs.cr4 |= 0x20;
      sregs.efer = 0x800;
      break;
    case Mode::v86:
      sregs.cr0 = 0x80010031;
      sregs.cr3 = legacy_pd;
      sregs.cr4 |= 0x91;
      for (kvm_segment* s : {&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss, &sregs.cs})
        *s = {.base = data, .limit = 0xffff, .selector = u16(data / 16), .type = 3, .present = 1, .dpl = 3, .s = 1};
      sregs.ss.base = stack, sregs.ss.selector = stack / 16;
      sregs.cs.base = code, sregs.cs.selector = code / 16;
      regs.rip = 0;
      regs.rsp = 0xff0;
      regs.rbx = regs.rsi = regs.rdi = 0;
      regs.rflags = 0x20002;
      break;
    default: break;
  }
  if (!is_long(mode)) return;
  sregs.cr0 = 0x80010031;
  sregs.cr3 = mode == Mode::long64_la57 ? pml5 : pml4;
  sregs.cr4 |= 0x20 | (mode == Mode::long64_la57 ? 0x1000 : 0);
  sregs.efer = 0xd01;
  sregs.idt = {.base = idt64, .limit = 0xfff};
  sregs.tr.base = tss64;
  if (mode == Mode::long64 || mode == Mode::long64_la57) sregs.cs = segment(code64, 11, 0, false, true);
  if (mode == Mode::long64_user) sregs.cs = segment(user_code64, 11, 3, false, true);
  if (mode == Mode::compatibility16) sregs.cs = segment(code16, 11, 0, false, false);
}

}  // namespace anykvm::fuzz
