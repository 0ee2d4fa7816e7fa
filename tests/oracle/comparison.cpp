// Two memories after the same tests: where they differ, whether TCG is known to be wrong there, and a report for
// people.
#include <Zydis/Zydis.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "oracle/guest.h"
#include "oracle/tcg_mistakes.h"

namespace anykvm::oracle {
namespace {

u64 value_at(const Memory& memory, u64 address, unsigned bytes) {
  u64 value = 0;
  std::memcpy(&value, &memory.at(address), bytes);
  return value;
}

/// Calls `visit(field, index, mine, other)` for each value of a test's log entries that differs.
template <class Visit>
void for_each_difference(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned test, Visit visit) {
  const u64 log = guest.log + u64(test) * guest.log_size;
  if (!std::memcmp(&ours.at(log), &theirs.at(log), guest.log_size)) return;
  for (const Field& field : guest.fields)
    for (unsigned i = 0; i < field.count; ++i) {
      const u64 at = log + field.offset + i * field.bytes;
      const u64 mine = value_at(ours, at, field.bytes), other = value_at(theirs, at, field.bytes);
      if (mine != other) visit(field, Difference{field.name, i, mine, other});
    }
}

Case make_case(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned test) {
  const Ending mine = guest.ending(ours, test), other = guest.ending(theirs, test);
  return {guest,
          test,
          mine,
          other,
          guest.code_at(test, mine.cs, mine.rip),
          guest.descriptor(ours, test, mine.cs),
          mine.has_error && !(mine.error & 2) ? guest.descriptor(ours, test, mine.error) : 0};
}

Mistake* explanation(const Case& c, const Difference& difference) {
  for (Mistake& mistake : tcg_mistakes())
    if (mistake.explains(c, difference)) return &mistake;
  return nullptr;
}

}  // namespace

unsigned tests_done(const Guest& guest, const Memory& memory) {
  unsigned n = 0;
  while (n < guest.tests && value_at(memory, guest.log + u64(n) * guest.log_size, 4)) ++n;
  return n;
}

int next_difference(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned from) {
  const unsigned ended = std::min(tests_done(guest, ours), tests_done(guest, theirs));
  for (unsigned test = from; test < ended; ++test) {
    bool differs = false;
    Case c = make_case(guest, ours, theirs, test);
    for_each_difference(guest, ours, theirs, test, [&](const Field&, const Difference& difference) {
      if (Mistake* mistake = explanation(c, difference))
        ++mistake->met;
      else
        differs = true;
    });
    if (differs) return int(test);
  }
  return -1;
}

std::string report(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned test) {
  if (test >= guest.tests) return {};
  std::string text = "test " + std::to_string(test) + "\n" + guest.describe(test);
  char line[160];
  const Case c = make_case(guest, ours, theirs, test);
  const auto ending = [&](const char* who, const Ending& e) {
    std::snprintf(line, sizeof line,
                  "  %-5s ends with vector %" PRIu64 " error %" PRIx64 " at %" PRIx64 ":%" PRIx64 "\n", who, e.vector,
                  e.error, e.cs, e.rip);
    text += line;
  };
  ending("ours", c.mine), ending("TCG's", c.other);
  if (test >= tests_done(guest, ours) || test >= tests_done(guest, theirs))
    return text + "  (one of them did not end it)\n";
  text += "  what differs      ours | TCG's\n";
  for_each_difference(guest, ours, theirs, test, [&](const Field& field, const Difference& difference) {
    const std::string name =
        field.count > 1 ? std::string(field.name) + " " + std::to_string(difference.index) : field.name;
    std::snprintf(line, sizeof line, "  %-12s %0*" PRIx64 " %0*" PRIx64 "%s\n", name.c_str(), 2 * field.bytes,
                  difference.mine, 2 * field.bytes, difference.other, explanation(c, difference) ? " (known)" : "");
    text += line;
  });
  return text;
}

std::string mistakes_met() {
  std::string text;
  for (const Mistake& mistake : tcg_mistakes())
    if (mistake.met) text += "  " + std::to_string(mistake.met) + " x " + mistake.rule + "\n";
  return text;
}

std::string disassemble(std::span<const u8> code, u64 address, unsigned code_bits) {
  const ZydisMachineMode mode = code_bits == 64   ? ZYDIS_MACHINE_MODE_LONG_64
                                : code_bits == 32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32
                                                  : ZYDIS_MACHINE_MODE_LONG_COMPAT_16;
  std::string text;
  ZydisDisassembledInstruction instruction;
  for (std::size_t at = 0; at < code.size() && text.size() < 2000;) {
    if (code[at] == 0xcc && at + 1 < code.size() && code[at + 1] == 0xcc) break;  // the filling
    char line[32];
    std::snprintf(line, sizeof line, "  %6" PRIx64 "  ", address + at);
    text += line;
    if (ZYAN_SUCCESS(ZydisDisassembleIntel(mode, address + at, &code[at], code.size() - at, &instruction))) {
      text += instruction.text;
      at += instruction.info.length;
    } else {
      std::snprintf(line, sizeof line, "db 0x%02x", code[at++]);
      text += line;
    }
    text += "\n";
  }
  return text;
}

}  // namespace anykvm::oracle
