// System registers and the instructions that read and change them.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::register_instruction(Emitter& code) {
  switch (below(20)) {
    case 0: segment_load(code); break;
    case 1:
    case 2: {  // SLDT, STR, LLDT, LTR, VERR, VERW
      const unsigned which = below(6);
      static constexpr u16 tables[] = {ldt, ldt2, tss2, ldt2 | 3, tss, 0x110, 0x178};
      u16 operand = below(3) ? any_of(tables) : selector();
      if (which == 3 && operand < 4) operand = tss2;  // TCG takes a null selector for LTR
      code.load(0, operand);
      if (below(2)) code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u}));
      code.bytes({0x0f, 0x00, 0xc0 | which << 3});
      break;
    }
    case 3:
    case 4:  // LAR, LSL
      code.load(0, selector());
      code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u})).bytes({0x0f, any_of({2u, 3u}), 0xc8});
      break;
    case 5:  // SMSW, LMSW, CLTS
      code.load(0, random_() & 0xffff000f);
      if (below(3) == 0)
        code.bytes({0x0f, 0x06});
      else
        code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u})).bytes({0x0f, 0x01, any_of({0xe0u, 0xf0u})});
      break;
    case 6: code.bytes({0x0f, 0x20, 0xc0 | any_of({0u, 2u, 3u, 4u}) << 3}); break;
    case 7:  // MOV to CR0
      code.load(0, 0x80010031 ^ (random_() & 0x5000e)).bytes({0x0f, 0x22, 0xc0});
      break;
    case 8:  // MOV to CR2, CR4
      if (below(2))
        code.load(0, random_()).bytes({0x0f, 0x22, 0xd0});
      else
        code.load(0, boot_cr4_ | (random_() & 0x71088c)).bytes({0x0f, 0x22, 0xe0});
      break;
    case 9:  // CR8, CR3
      if (bits_ == 64 && below(2)) {
        code.load(0, below(16)).bytes({0x44, 0x0f, 0x22, 0xc0});
        code.bytes({0x44, 0x0f, 0x20, 0xc1});
      } else {
        code.load(0, pristine(LONG_CR3) | (below(2) ? 0x18 : 0)).bytes({0x0f, 0x22, 0xd8});
      }
      break;
    case 10: code.bytes({0x0f, 0x21, 0xc0 | below(8) << 3}); break;
    case 11: {
      const unsigned dr = any_of({0u, 1u, 2u, 3u, 4u, 6u, 6u});
      code.load(0, dr >= 4 ? u32(random_()) & ~0x1000u : random_()).bytes({0x0f, 0x23, 0xc0 | dr << 3});
      break;
    }
    case 12: {  // LGDT, LIDT, SGDT, SIDT
      if (below(2)) {
        code.bytes({0x0f, 0x01}).at(any_of({0u, 1u}), LONG_SUPER_DATA + 0x40 - base_);
        break;
      }
      if (frame_used_) break;
      frame_used_ = true;
      const bool idt = below(2);
      put_data(0, idt ? LONG_VECTORS * 16 - 1 + below(100) : LONG_GDT_LIMIT - below(0x80), 2);
      put_data(2, idt ? LONG_IDT : LONG_GDT, 8);
      code.bytes({0x0f, 0x01}).at(idt ? 3 : 2, data_room(0));
      break;
    }
    case 13:
    case 14: {  // RDMSR, WRMSR
      static constexpr u32 list[] = {0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100, 0xc0000101,
                                     0xc0000102, 0x174,      0x175,      0x176,      0xc0000103, 0xc0000080};
      const u32 index = any_of(list);
      u64 value = below(2) ? random_() & 0x7fffffff : u64(s64(random_()) >> 17);
      if (index == 0x174) value &= 0xffff;
      if (index == 0xc0000103 || index == 0xc0000084) value &= 0x7fffffff;
      if (index == 0x176 || index == 0x175) value &= 0x7fffffff;
      if (index == 0xc0000080) value = 0x500 | (random_() & 0x801);
      code.load(1, index);
      if (below(3)) {
        code.load(0, u32(value)).load(2, value >> 32).bytes({0x0f, 0x30});
      } else {
        code.bytes({0x0f, 0x32});
      }
      break;
    }
    case 15:  // SWAPGS, RDPKRU, WRPKRU, XGETBV, STAC, CLAC
    {
      static constexpr u8 list[] = {0xf8, 0xf8, 0xee, 0xef, 0xcb, 0xca};
      const u8 which = any_of(list);
      if (which == 0xee || which == 0xef) code.load(1, below(4) ? 0 : 1).load(2, below(8) ? 0 : 1);
      code.bytes({0x0f, 0x01, which});
      break;
    }
    case 16:  // RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE
      code.load(0, below(2) ? random_() & 0x7fffffffffff : u64(s64(random_()) >> 17)).bytes({0xf3});
      if (bits_ == 64 && below(2)) code.bytes({0x48});
      code.bytes({0x0f, 0xae, 0xc0 | below(4) << 3});
      break;
    case 17: {  // by FS or GS
      code.bytes({any_of({0x64u, 0x65u}), 0xa1})
          .value_of(below(2) ? 0x100 : LONG_USER_STACK, bits_ == 64 ? 8 : bits_ / 8);
      break;
    }
    case 18: {  // port, HLT at CPL 3, INVLPG, WBINVD, RDTSC (its result is dropped), RDPMC
      switch (below(4)) {
        case 0: code.bytes({0xe6, 0x80}); break;
        case 1:
          if (cpl_) code.bytes({0xf4});
          break;
        case 2: code.bytes({0x0f, 0x01}).at(7, LONG_SUPER_DATA - base_); break;
        default: code.bytes({0x0f, 0x31}).load(0, 0).load(2, 0); break;
      }
      break;
    }
    default: code.bytes({any_of({0xfau, 0xfbu, 0x9cu, 0x9bu})}); break;
  }
}

}  // namespace anykvm::oracle
