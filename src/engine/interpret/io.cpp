// IN, OUT, INS, OUTS: rights, in-kernel devices, and the exits to the client.
//
// A read that the client must answer exits with RIP on the instruction and starts again when the answer is there.
// A write hands its data over and is complete.
#include <algorithm>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

using x86::rax, x86::rcx, x86::rdi, x86::rdx, x86::rsi;

/// IOPL, then the task's I/O permission bitmap.
Result check_port(Context& c, u16 port, unsigned bytes) {
  const x86::CpuState& s = c.cpu.state;
  const unsigned iopl = unsigned(s.other_flags >> 12 & 3);
  if (!s.protected_mode() || (!s.v86() && s.cpl <= iopl)) return Result::ok;
  if (!s.tr.present || s.tr.limit < 0x67) return c.cpu.gp();
  u16 map = 0, bits = 0;
  ANYKVM_TRY(c.cpu.read_as(s.tr.base + 0x66, &map, 2, c.cpu.system_privilege));
  const u32 at = map + port / 8u;
  if (at + 1 > s.tr.limit) return c.cpu.gp();
  ANYKVM_TRY(c.cpu.read_as(s.tr.base + at, &bits, 2, c.cpu.system_privilege));
  return bits >> (port & 7) & ((1u << bytes) - 1) ? c.cpu.gp() : Result::ok;
}

/// IN and OUT of the immediate port, or of DX.
u16 port_of(const Context& c, const Instruction& i) {
  return i.port_in_dx ? u16(c.cpu.state.gpr[rdx]) : u16(i.immediate & 0xff);
}

Result exit_to_client(Context& c, u16 port, unsigned bytes, u32 count, bool is_in) {
  c.cpu.exit.kind = x86::ExitKind::pio;
  c.cpu.exit.is_in = is_in;
  c.cpu.exit.size = u8(bytes);
  c.cpu.exit.port = port;
  c.cpu.exit.count = count;
  return is_in ? Result::exit : Result::ok;
}

/// The answer to this instruction's port read, if the client has given one.
const u8* take_reply(Context& c) {
  const u8* reply = c.cpu.pio_reply;
  c.cpu.pio_reply = nullptr;
  return reply;
}

Result in(Context& c, const Instruction& i) {
  const u16 port = port_of(c, i);
  ANYKVM_TRY(check_port(c, port, i.operand_bytes));
  if (c.cpu.debug_watch & x86::watch_ports) c.cpu.note_port_access(port, i.operand_bytes);
  u32 value = 0;
  if (const u8* reply = take_reply(c))
    std::memcpy(&value, reply, i.operand_bytes);
  else if (!c.cpu.machine.pio_in(port, &value, i.operand_bytes))
    return exit_to_client(c, port, i.operand_bytes, 1, true);
  write_register(c, {rax, 0}, i.operand_bytes, value);
  return Result::ok;
}
Result out(Context& c, const Instruction& i) {
  const u16 port = port_of(c, i);
  ANYKVM_TRY(check_port(c, port, i.operand_bytes));
  if (c.cpu.debug_watch & x86::watch_ports) c.cpu.note_port_access(port, i.operand_bytes);
  const u32 value = u32(c.cpu.state.gpr[rax]);
  if (c.cpu.machine.pio_out(port, &value, i.operand_bytes)) return Result::ok;
  std::memcpy(c.cpu.pio_data, &value, i.operand_bytes);
  c.cpu.exit.rip = c.cpu.state.rip;
  c.cpu.exit.next_rip = c.next_rip;
  return exit_to_client(c, port, i.operand_bytes, 1, false);
}

u64 counter(const Context& c, const Instruction& i) {
  return i.repeat == Repeat::none ? 1 : c.cpu.state.gpr[rcx] & size_mask(i.address_bytes);
}

/// After `done` elements: registers advanced; RIP stays on the instruction while elements remain.
void finish_elements(Context& c, const Instruction& i, u8 pointer, u64 done) {
  const bool backwards = c.cpu.state.other_flags & x86::flag::df;
  const u64 distance = done * i.operand_bytes;
  write_register(c, {pointer, 0}, i.address_bytes, c.cpu.state.gpr[pointer] + (backwards ? -distance : distance));
  if (i.repeat == Repeat::none) return;
  const u64 left = counter(c, i) - done;
  write_register(c, {rcx, 0}, i.address_bytes, left);
  if (left) c.next_rip = c.cpu.state.rip;
}

/// How many elements one exit may carry: they go up, stay in one page of guest memory and fit the data page.
u32 batch(const Context& c, const Instruction& i, Gva gva) {
  if (c.cpu.state.other_flags & x86::flag::df || c.one_iteration) return 1;
  const u64 in_page = (page_size - (gva & ~page_mask)) / i.operand_bytes;
  return u32(std::clamp<u64>(std::min(counter(c, i), in_page), 1, page_size / i.operand_bytes));
}

Result in_string(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  const u16 port = u16(c.cpu.state.gpr[rdx]);
  ANYKVM_TRY(check_port(c, port, bytes));  // also where there is nothing to do
  if (!counter(c, i)) return Result::ok;
  if (c.cpu.debug_watch & x86::watch_ports) c.cpu.note_port_access(port, bytes);
  // The destination is checked before the port is read: a fault must not lose data.
  Gva gva;
  x86::Mmu::Translation page;
  ANYKVM_TRY(linear_address(c, x86::es, c.cpu.state.gpr[rdi] & size_mask(i.address_bytes), bytes, Access::write, gva));
  ANYKVM_TRY(c.cpu.mmu.translate(c.cpu, gva, Access::write, c.cpu.data_privilege, page));
  if ((gva & ~page_mask) + bytes > page_size)
    ANYKVM_TRY(c.cpu.mmu.translate(c.cpu, (gva + bytes - 1) & page_mask, Access::write, c.cpu.data_privilege, page));
  u32 done = 1;
  if (c.cpu.pio_reply) {
    // The client may have changed the counter meanwhile; what is answered beyond it is dropped.
    done = u32(std::min<u64>(c.cpu.pio_reply_bytes / bytes, counter(c, i)));
    const u8* reply = take_reply(c);
    for (u32 n = 0; n < done; ++n) ANYKVM_TRY(c.cpu.write(gva + u64(n) * bytes, reply + n * bytes, bytes));
  } else {
    u32 value = 0;
    if (!c.cpu.machine.pio_in(port, &value, bytes)) return exit_to_client(c, port, bytes, batch(c, i, gva), true);
    ANYKVM_TRY(c.cpu.write(gva, &value, bytes));
  }
  finish_elements(c, i, rdi, done);
  return Result::ok;
}

Result out_string(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  const u16 port = u16(c.cpu.state.gpr[rdx]);
  ANYKVM_TRY(check_port(c, port, bytes));  // also where there is nothing to do
  if (!counter(c, i)) return Result::ok;
  if (c.cpu.debug_watch & x86::watch_ports) c.cpu.note_port_access(port, bytes);
  Gva gva;
  ANYKVM_TRY(linear_address(c, i.segment, c.cpu.state.gpr[rsi] & size_mask(i.address_bytes), bytes, Access::read, gva));
  u32 value = 0;
  ANYKVM_TRY(c.cpu.read(gva, &value, bytes));
  if (c.cpu.machine.pio_out(port, &value, bytes)) {
    finish_elements(c, i, rsi, 1);
    return Result::ok;
  }
  std::memcpy(c.cpu.pio_data, &value, bytes);
  const u32 count = batch(c, i, gva);
  for (u32 n = 1; n < count; ++n) ANYKVM_TRY(c.cpu.read(gva + u64(n) * bytes, c.cpu.pio_data + n * bytes, bytes));
  finish_elements(c, i, rsi, count);
  return exit_to_client(c, port, bytes, count, false);
}

}  // namespace

Handler select_io(const Decoded& d, Instruction& out_) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_IN:
      out_.operand_bytes = u8(d.bytes(0));
      out_.port_in_dx = d.is_register(1);
      return in;
    case ZYDIS_MNEMONIC_OUT:
      out_.operand_bytes = u8(d.bytes(1));
      out_.port_in_dx = d.is_register(0);
      return out;
    case ZYDIS_MNEMONIC_INSB: out_.operand_bytes = 1; return in_string;
    case ZYDIS_MNEMONIC_INSW: out_.operand_bytes = 2; return in_string;
    case ZYDIS_MNEMONIC_INSD: out_.operand_bytes = 4; return in_string;
    case ZYDIS_MNEMONIC_OUTSB: out_.operand_bytes = 1; break;
    case ZYDIS_MNEMONIC_OUTSW: out_.operand_bytes = 2; break;
    case ZYDIS_MNEMONIC_OUTSD: out_.operand_bytes = 4; break;
    default: return nullptr;
  }
  out_.segment = source_segment(d);
  return out_string;
}

}  // namespace anykvm::engine
