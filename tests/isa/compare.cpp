#include "isa/compare.h"

#include <cstdio>

#include "isa/undefined.h"
#include "x86/state.h"

namespace anykvm::isa {

namespace {

namespace flag = x86::flag;

std::string hex(const void* from, unsigned bytes) {
  std::string out;
  char digits[3];
  for (unsigned n = bytes; n-- > 0;) {
    std::snprintf(digits, sizeof digits, "%02x", static_cast<const u8*>(from)[n]);
    out += digits;
    if (n % 8 == 0 && n) out += '_';
  }
  return out;
}

/// Goes through what is compared. `visit(name, number, before, host, engine, bytes)` returns false to stop.
template <class Visit>
bool visit_all(const Case& c, const Outcome& host, const Outcome& engine, Visit&& visit) {
  const Registers &i = c.in, &h = host.out, &e = engine.out;
  const u32 none = no_trap;
  const Leniency leniency = leniency_of(c, host, engine.drops_dead_flags);
  if (leniency.several_parts && host.trap != engine.trap && is_of_access(engine.trap)) return true;
  if (leniency.too_long && engine.trap == 6) return true;
  if (!visit("exception ", -1, &none, &host.trap, &engine.trap, 4)) return false;
  if (host.trap != engine.trap) return true;  // nothing else means the same
  // Linux hides from a program whether an address behind a program's is mapped.
  constexpr u64 end_of_user_space = 0x7ffffffff000;
  const u32 present = host.trap == 14 && host.address >= end_of_user_space ? 1 : 0;
  const u32 host_error = host.error & ~present, engine_error = engine.error & ~present;
  if (!leniency.several_parts && !visit("error code", -1, &none, &host_error, &engine_error, 4)) return false;
  if (!leniency.several_parts && !visit("CR2", -1, &none, &host.address, &engine.address, 8)) return false;
  if (!visit("rip", -1, &i.rip, &h.rip, &e.rip, 8)) return false;
  const bool wide = c.mode == Mode::code64;
  static constexpr const char* names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                            "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
  for (unsigned n = 0; n < (wide ? 16u : 8u); ++n)
    if (!visit(names[n], -1, &i.gpr[n], &h.gpr[n], &e.gpr[n], wide ? 8 : 4)) return false;
  // RF is set in the frames of the exceptions that the engine side ends with.
  const u64 mask = ~(host.trap == no_trap ? flag::rf : 0) & ~leniency.flags;
  const u64 before = i.rflags & mask, left = h.rflags & mask, right = e.rflags & mask;
  if (!visit("rflags", -1, &before, &left, &right, 4)) return false;
  static constexpr const char* segments[6] = {"es", "cs", "ss", "ds", "fs", "gs"};
  for (unsigned n = 0; n < 6; ++n) {
    // The kernel gives a null selector back without its RPL: all behind an exception, FS and GS when it has let
    // somebody else run.
    const bool may_be_reloaded = host.trap != no_trap || n >= 4;
    const bool both_null = may_be_reloaded && !(h.selector[n] & ~3) && !(e.selector[n] & ~3);
    if (!both_null && !visit(segments[n], -1, &i.selector[n], &h.selector[n], &e.selector[n], 2)) return false;
  }
  if (wide && h.selector[1] == code64_selector)
    for (unsigned n = 0; n < 2; ++n)
      if (!visit(n ? "gs base" : "fs base", -1, &i.base[n], &h.base[n], &e.base[n], 8)) return false;
  for (unsigned n = 0; n < 16; ++n) {
    if (!visit("xmm", int(n), i.xmm(n), h.xmm(n), e.xmm(n), 16)) return false;
    if (!visit("ymm high ", int(n), i.ymm_high[n], h.ymm_high[n], e.ymm_high[n], 16)) return false;
    if (!visit("zmm high ", int(n), i.zmm_high[n], h.zmm_high[n], e.zmm_high[n], 32)) return false;
    if (!visit("zmm", int(n) + 16, i.zmm_upper[n], h.zmm_upper[n], e.zmm_upper[n], 64)) return false;
  }
  for (unsigned n = 0; n < 8; ++n)
    if (!visit("k", int(n), &i.opmask[n], &h.opmask[n], &e.opmask[n], 8)) return false;
  if (!visit("mxcsr", -1, i.fx + 24, h.fx + 24, e.fx + 24, 4)) return false;
  if (!visit("x87 control", -1, i.fx, h.fx, e.fx, 2)) return false;
  if (!visit("x87 status", -1, i.fx + 2, h.fx + 2, e.fx + 2, 2)) return false;
  if (!visit("x87 tags", -1, i.fx + 4, h.fx + 4, e.fx + 4, 1)) return false;
  if (!leniency.x87_pointers) {
    if (!visit("x87 opcode", -1, i.fx + 6, h.fx + 6, e.fx + 6, 2)) return false;
    if (!visit("x87 ip", -1, i.fx + 8, h.fx + 8, e.fx + 8, 8)) return false;
    if (!visit("x87 dp", -1, i.fx + 16, h.fx + 16, e.fx + 16, 8)) return false;
  }
  for (unsigned n = 0; n < 8; ++n)
    if (!visit("st", int(n), i.fx + 32 + 16 * n, h.fx + 32 + 16 * n, e.fx + 32 + 16 * n, 10)) return false;
  // A component that holds its initial values may count as used all the same.
  const u64 used = h.in_use & e.in_use;
  return host.trap != no_trap || visit("xinuse", -1, &i.in_use, &used, &e.in_use, 8);
}

/// The data as it is compared.
bool same_data(const Case& c, const Outcome& host, const Outcome& engine, unsigned at, unsigned bytes) {
  if (!std::memcmp(host.data + at, engine.data + at, bytes)) return true;
  if (!c.ignored_count) return false;
  for (unsigned n = at; n < at + bytes; ++n) {
    bool ignored = false;
    for (unsigned k = 0; k < c.ignored_count; ++k) ignored = ignored || n - c.ignored[k] < 2u;
    if (!ignored && host.data[n] != engine.data[n]) return false;
  }
  return true;
}

}  // namespace

bool same(const Case& c, const Outcome& host, const Outcome& engine) {
  return visit_all(c, host, engine,
                   [](const char*, int, const void*, const void* h, const void* e, unsigned bytes) {
                     return !std::memcmp(h, e, bytes);
                   }) &&
         same_data(c, host, engine, 0, data_bytes);
}

std::vector<Difference> differences(const Case& c, const Outcome& host, const Outcome& engine) {
  std::vector<Difference> out;
  visit_all(c, host, engine,
            [&](const char* name, int number, const void* b, const void* h, const void* e, unsigned bytes) {
              if (std::memcmp(h, e, bytes))
                out.push_back(
                    {number < 0 ? name : name + std::to_string(number), hex(b, bytes), hex(h, bytes), hex(e, bytes)});
              return true;
            });
  if (host.trap != engine.trap) return out;
  for (unsigned at = 0; at < data_bytes; at += 8)
    if (!same_data(c, host, engine, at, 8)) {
      char name[32];
      std::snprintf(name, sizeof name, "memory %llx", (unsigned long long)(data_address + at));
      out.push_back({name, "", hex(host.data + at, 8), hex(engine.data + at, 8)});
      if (out.size() > 40) break;
    }
  return out;
}

}  // namespace anykvm::isa
