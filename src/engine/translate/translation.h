// One block in the making: what is known of its instructions, and how they are emitted.
#pragma once

#include "engine/translate/analysis.h"
#include "engine/translate/block.h"
#include "engine/translate/rewrite.h"

namespace anykvm::engine::translate {

struct Guest : GuestInstruction {
  u16 offset, next;  ///< in the page
  const u8* bytes;
  bool flags_live;                  ///< some flag must survive what is added before this instruction
  bool taken_flags_live;            ///< ... and what is added where a branch is taken
  s8 operand_window, stack_window;  ///< that its memory operand, its push or pop belong to; -1: none
};

/// Accesses that are checked together: they lie near each other, at distances from a register that are known.
struct Window {
  int base;       ///< guest register
  s32 low, high;  ///< [low, high) from the register's value at the check
  bool write;
  unsigned at;  ///< the instruction before which the check is
};

/// Emits one block. The cold parts, which leave or refill the TLB, lie apart from the hot ones.
class Translation {
 public:
  Translation(const BlockRequest& request, CodeRoom at, CodeRoom end)
      : request_(request), a_(at.hot, end.hot), cold_assembler_(at.cold, end.cold) {}
  BlockCode run();

 private:
  /// How a guest address is computed: again in the cold part.
  struct Address {
    int base = -1, index = -1;  ///< guest registers
    unsigned shift = 0;
    s32 displacement = 0;
    bool rip_relative = false;
    int segment = -1;       ///< FS or GS
    bool computed = false;  ///< it is in Context::target
  };
  struct Cold {
    enum class Kind : u8 { refill, window, singly, step, link, back_edge, load_x87, crossing, chain, indirect } kind;
    bool restores_rcx;  ///< from Context::temporary
    bool pops_rcx;
    u8 size;  ///< of a look into the TLB
    bool writes, flags_live;
    u8* site;  ///< the jump that comes here
    const u8* retry;
    unsigned guest;  ///< instruction
    s32 target;      ///< link, back_edge, chain: offset of the target in the page
    u32 request;     ///< indirect: the BranchRequest
  };

  /// Addresses have 64 bits, and so have the words on the stack; else 32.
  bool wide() const { return !request_.mode.narrow; }
  s32 word() const { return wide() ? 8 : 4; }
  void move_stack_pointer(s32 by) { a_.lea(guest_rsp, guest_rsp, -1, 0, by, wide()); }

  void collect();
  // windows.cpp
  void plan_windows();
  void check_window(unsigned window);
  /// The place of an access in the window. The address scratch register is part of it.
  Place in_window(int window, s32 displacement);
  void emit(unsigned n);
  void emit_native(const Guest& g, unsigned n);
  void emit_lea(const Guest& g);
  void emit_jump_if(const Guest& g, unsigned n);
  // system_code.cpp
  void emit_push_memory(const Guest& g, unsigned n);
  void emit_push_flags(const Guest& g, unsigned n);
  void emit_move_from_segment(const Guest& g);
  void emit_bit_string(const Guest& g, unsigned n);
  void emit_string(const Guest& g, unsigned n);
  void emit_clear_flag(const Guest& g);
  void emit_set_interrupt(unsigned n);
  void emit_swap_gs();
  void emit_set_access_check(const Guest& g, unsigned n);
  void emit_read_time(const Guest& g, unsigned n);
  // crossing.cpp
  void emit_crossing_guard();
  void emit_crossing_end();
  // x87_code.cpp
  void want_x87(const Guest& g, unsigned n);
  void note_x87(const Guest& g);
  void store_offset(const Guest& g);
  /// Behind a step of an instruction for the x87 unit whose block relies on the unit: loads it again, or leaves.
  void restore_x87(const Guest& g, unsigned n);
  void emit_cold(const Cold& cold);
  void emit_cold_step(unsigned n);

  // operands.cpp
  static Address address_of(const Guest& g);
  void compute(const Address& address);
  /// Leaves the host address of [address, size) in the address scratch register.
  void check(const Address& address, unsigned size, bool write, unsigned n, bool flags_live);
  void check_tag(const Address& address, unsigned size, bool write, unsigned n, bool flags_live,
                 Cold::Kind miss = Cold::Kind::refill);
  Place operand_place(const Guest& g, const Address& address, unsigned size, bool write, unsigned n, bool flags_live);
  /// The place of a word on the guest's stack.
  Place on_stack(const Guest& g, unsigned n, s32 displacement, bool write, bool flags_live);
  /// The value there to the address scratch register.
  void load_scratch(const Place& place);
  void refill(const Cold& cold);

  static bool keeps_address_scratch(Kind kind);
  void step(const Guest& g, bool leave);
  void step_at(u8* site, unsigned n, bool restores_rcx = false);
  /// Jumps to the step of instruction n, RCX restored from Context::temporary.
  void step_restoring_rcx(unsigned n) { step_at(a_.jump_later(), n, true); }
  void link(s32 target, bool flags_live, unsigned n);
  void link_to_other_page(s32 target, unsigned n);
  void emit_chain(const Cold& cold);
  void aim_or_link(u8* site, s32 target, unsigned n, Mode mode);
  void to_page_offset(Register to, s32 offset) {
    a_.load(to, offsetof(Context, page_base));
    a_.lea(to, to, -1, 0, offset, wide());
  }
  /// Continues at the guest address in the address scratch register, wherever that is: where it is not canonical,
  /// behind instruction n, with the stack pointer moved by `undo`, and with Context::replaced in the place of what it
  /// pushed.
  void indirect(unsigned n, s32 undo = 0, bool restores = false);
  void push_target(const Guest& g, unsigned n, bool flags_live);
  void push_return_address(const Guest& g, unsigned n);
  u32 tlb(unsigned field) const {
    return offsetof(Context, tlb) + unsigned(request_.mode.privilege) * sizeof(TlbEntry) * tlb_entries + field;
  }
  void add_cold(const Cold& cold) {
    if (cold_count_ < std::size(cold_))
      cold_[cold_count_++] = cold;
    else
      out_of_room_ = true;
  }
  const u8* leave() const { return request_.stubs->leave[request_.mode.vectors]; }

  const BlockRequest& request_;
  Assembler a_, cold_assembler_;
  Guest guests_[most_instructions];
  unsigned count_ = 0;
  u8 crossing_[15];                          ///< the bytes of an instruction that lies in two pages
  const u8* after_[most_instructions] = {};  ///< where the code of the next instruction begins
  Cold cold_[most_instructions * 4];
  unsigned cold_count_ = 0;
  Window windows_[window_count];
  unsigned window_total_ = 0;
  int held_ = -1;  ///< the window whose addend the address scratch register has; -1: none
  u64 lines_ = 0;  ///< of the page that the block depends on
  bool out_of_room_ = false;
  bool falls_through_ = false;
  s32 falls_to_ = 0;  ///< offset in the page
  bool exit_flags_live_ = true;
  bool x87_loaded_ = false;  ///< where code is emitted now, the unit holds the guest's registers
  bool x87_noted_ = false;   ///< ... and Context::x87_page is the block's page
};

}  // namespace anykvm::engine::translate
