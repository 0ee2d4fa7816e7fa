// What one comparison is made of: a few instructions, the state that they start from, the state that they leave. The
// addresses are the same in the worker process and in the guest.
#pragma once

#include <cstring>

#include "x86/types.h"

namespace anykvm::isa {

/// Code, readable and executable, two pages; the pages around it are not there.
inline constexpr u64 code_address = 0x20000000, code_bytes = 2 * page_size;
/// Data: two pages to read and write, one to read; the pages around them are not there.
inline constexpr u64 data_address = 0x21000000, data_bytes = 2 * page_size, readonly_bytes = page_size,
                     data_total = data_bytes + readonly_bytes;
/// Where a sequence goes when it has run to its end; nowhere that a register's edge value plus an address of data is.
inline constexpr u64 exit_address = 0x2a5c3000;
/// In `data`: an XSAVE image that XRSTOR takes, followed by its header and components.
inline constexpr u64 image_offset = page_size + 0x400;

/// ESP's upper half where the stack is a 16-bit one: IRET, which begins a case, leaves it as it finds it.
inline constexpr u32 narrow_stack_high = 0x6b3d0000;

/// Selectors of Linux' GDT, which the guest's has, too; and the LDT's, see segments.h.
inline constexpr u16 code64_selector = 0x33, code32_selector = 0x23, data_selector = 0x2b, cpu_number_selector = 0x7b;

enum class Mode : u8 { code64, code32, code16 };
inline constexpr unsigned bits_of(Mode mode) { return mode == Mode::code64 ? 64 : mode == Mode::code32 ? 32 : 16; }

/// The XCR0 components that take part where the host has them: x87, SSE, AVX, AVX-512.
inline constexpr u64 compared_state = 0xe7;

struct Registers {
  u64 gpr[16];
  u64 rip, rflags;
  u64 base[2];      ///< of FS and GS, in 64-bit code
  u16 selector[6];  ///< ES CS SS DS FS GS
  u16 unused[2];
  u64 in_use;              ///< XINUSE; out only
  alignas(64) u8 fx[512];  ///< FXSAVE64 image: x87, MXCSR, xmm0-15
  u8 ymm_high[16][16];
  u64 opmask[8];
  u8 zmm_high[16][32];
  u8 zmm_upper[16][64];  ///< zmm16-31

  u32 mxcsr() const {
    u32 value;
    std::memcpy(&value, fx + 24, 4);
    return value;
  }
  void set_mxcsr(u32 value) { std::memcpy(fx + 24, &value, 4); }
  u8* xmm(unsigned n) { return n < 16 ? fx + 160 + 16 * n : zmm_upper[n - 16]; }
  const u8* xmm(unsigned n) const { return const_cast<Registers*>(this)->xmm(n); }
};

/// Eight bytes that differ from the data's pattern.
struct Poke {
  u16 at;  ///< offset in the data's writable pages
  u64 value;
};

struct Case {
  static constexpr unsigned max_code = 400, max_pokes = 64, max_ignored = 8;

  u64 number = 0;
  Mode mode = Mode::code64;
  u16 code_offset = 0;  ///< of the first byte in the code pages
  u16 code_length = 0;
  u8 instructions = 0;
  u8 poke_count = 0;
  u8 ignored_count = 0;
  u8 code[max_code];
  Poke pokes[max_pokes];
  u16 ignored[max_ignored];  ///< offsets of two bytes in the data that are not compared; see undefined.cpp
  Registers in;

  void ignore(u64 address) {
    if (address - data_address <= data_bytes - 2 && ignored_count < max_ignored)
      ignored[ignored_count++] = u16(address - data_address);
  }
  void poke(u64 address, u64 value) {
    if (address - data_address > data_bytes - 8 || poke_count == max_pokes) return;
    pokes[poke_count++] = {u16(address - data_address), value};
  }
};

inline constexpr u32 no_trap = ~0u, lost = ~0u - 1, endless = ~0u - 2;

struct Outcome {
  Registers out;
  u32 trap;               ///< exception vector; no_trap; lost: the worker died of it; endless: it did not come back
  u32 error;              ///< error code
  u64 address;            ///< CR2 of a #PF
  bool drops_dead_flags;  ///< see undefined.cpp; of an engine
  u8 data[data_bytes];
};

/// The sequence with the jump to exit_address behind it, as it lies in the code pages. Returns the bytes.
unsigned lay_out(const Case& c, u8 (&out)[Case::max_code + 32]);

}  // namespace anykvm::isa
