// Writes the tests of long_guest.h, one at a time: each has a part that is its subject's own.
#pragma once

#include "oracle/emitter.h"
#include "oracle/generator.h"
#include "oracle/long_guest.h"
#include "oracle/long_monitor.h"

namespace anykvm::oracle {

namespace long_mode {

enum Selector : u16 {
  code64_r0 = 0x08,
  data_r0 = 0x10,
  code32_r3 = 0x1b,
  data_r3 = 0x23,
  code64_r3 = 0x2b,
  tss = 0x38,
  ldt = 0x48,
  code32_r0 = 0x58,
  code16_r3 = 0x63,
  data16_r3 = 0x6b,
  code64_r1 = 0x71,
  data_r1 = 0x79,
  gate_r0 = 0x80,
  gate_r3 = 0x90,
  gate_conforming = 0xa0,
  conforming64 = 0xb0,
  conforming32 = 0xb8,
  tss2 = 0xc0,
  ldt2 = 0xf0,
  gate_r1 = 0x100,
};
constexpr unsigned gdt_slots = (LONG_GDT_LIMIT + 1) / 8;
constexpr u64 window = 1ull << 39;
constexpr u64 entry_p = 1, entry_w = 2, entry_u = 4, entry_a = 32, entry_d = 64, entry_ps = 128, entry_g = 256,
              entry_nx = 1ull << 63;

}  // namespace long_mode

class LongGenerator : public Generator {
 public:
  LongGenerator(u64 seed, Subject subject, bool five_levels, bool intel);
  void add_test(unsigned index);

 private:
  void set(u64 address, u64 value) { put<u64>(address, value); }
  u64 pristine(u64 address) const { return get<u64>(memory_, address); }
  void tables();

  // A test's input.
  void patch(u64 address, u64 value);
  void msr(u32 index, u64 value);
  void start_mode();
  void control_bits();
  u16 selector();
  u64 strange_address();
  u64 flags_image();
  u32 landing() const { return (cpl_ == 3 ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80; }
  /// An address that code of this mode can name.
  u64 data_address();
  /// Data of the test behind its landing, where its code can read it: the address.
  u32 data_room(unsigned offset) const { return code_ + 0xb0 + offset; }
  void put_data(unsigned offset, u64 value, unsigned bytes);

  // Transfers.
  void mutate_descriptors();
  u64 random_gate();
  void test_gates();
  u16 code_selector();
  u64 target_of(u16 selector);
  void far_pointer(Emitter& code);
  void returns(Emitter& code);
  void transfer(Emitter& code);
  void segment_load(Emitter& code);

  void register_instruction(Emitter& code);

  // Paging.
  void window_tables();
  /// Where a jump may lead: 256 bytes of every page that nothing is stored to. Code made of what tests leave behind
  /// would have flags that the manuals do not define.
  static constexpr u64 only_code = 0xd00;
  u64 page_offset();
  u64 window_address();
  u64 jump_address() { return (data_address() & ~0xfffull) + only_code + below(0x100); }
  void access(Emitter& code);

  // Events.
  void breakpoints();
  void debugged(Emitter& code);
  void broken_delivery();
  void faulting(Emitter& code);

  // What happens is traced in R8. R9 is the APIC's command register, R10 the command, R11 how many NMIs handlers send.
  static constexpr u32 nmi_handler = 0x80, interrupt_handler = 0xc0, gp_handler = 0xe0;
  void trace(Emitter& code, unsigned digit) { code.bytes({0x49, 0xc1, 0xe0, 4, 0x49, 0x83, 0xc8, digit}); }
  /// TCG looks for an NMI behind a jump.
  void send_nmi(Emitter& code) { code.bytes({0x45, 0x89, 0x11, 0xeb, 0x00}); }
  void send_nmi_from_handler(Emitter& code);
  /// To the next instruction.
  void return_to_here(Emitter& code, u8 stack_selector, u8 code_selector);
  /// PUSHFQ, POPFQ with NT, IRETQ: #GP(0), behind which its handler goes on.
  void faulting_return(Emitter& code) { code.bytes({0x9c, 0x81, 0x0c, 0x24, 0x00, 0x40, 0, 0, 0x9d, 0x48, 0xcf}); }
  void nmi_handlers();
  void around_nmis(Emitter& code);

  Subject subject_;
  bool intel_;
  u64 boot_cr4_ = 0, flags_ = 0, base_ = 0;
  u32 code_ = 0;
  unsigned msrs_ = 0, bits_ = 64, cpl_ = 0;
  bool far_pointer_used_ = false, frame_used_ = false;
};

}  // namespace anykvm::oracle
