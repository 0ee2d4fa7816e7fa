// NMIs that wait while others are handled, until an IRET lets them in.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::send_nmi_from_handler(Emitter& code) {
  code.bytes({0x49, 0x83, 0xeb, 1, 0x78, 5});  // sub r11, 1; js
  send_nmi(code);
}

void LongGenerator::return_to_here(Emitter& code, u8 stack_selector, u8 code_selector) {
  code.bytes({0x48, 0x89, 0xe0, 0x6a, stack_selector, 0x50, 0x9c, 0x6a, code_selector});
  code.bytes({0x48, 0x8d, 0x0d, 3, 0, 0, 0, 0x51, 0x48, 0xcf});
}

void LongGenerator::nmi_handlers() {
  const auto handler = [&](u8 vector, u32 offset, unsigned bytes, u8 access, u8 ist = 0) {
    patch(LONG_IDT + 16 * vector, gate(code64_r0, LONG_SUPER_CODE + offset, access, ist));
    return Emitter({&memory_[at_ + LONG_TEST_CODE + offset], bytes}, 64);
  };
  // An IRET inside lets the next NMI in, which would have the same IST's stack.
  const bool nests = below(3) == 0, faults = below(3) == 0;
  const u8 ist = nests || faults || below(2) ? 0 : 3;
  Emitter nmi = handler(2, nmi_handler, interrupt_handler - nmi_handler, below(4) ? 0x8e : 0x8f, ist);
  trace(nmi, 0xa);
  if (below(2)) send_nmi_from_handler(nmi);
  if (nests) nmi.bytes({0xcd, 0x50});
  if (faults) faulting_return(nmi);
  trace(nmi, 0xb);
  if (below(8)) nmi.bytes({0x48, 0xcf});  // else it is where the test ends
  Emitter interrupt = handler(0x50, interrupt_handler, gp_handler - interrupt_handler, 0xee);
  trace(interrupt, 0xc);
  if (below(2)) send_nmi_from_handler(interrupt);
  interrupt.bytes({0x48, 0xcf});
  Emitter gp = handler(13, gp_handler, 0x20, 0x8e);
  trace(gp, 0xd);
  gp.bytes({0x48, 0x83, 0xc4, 8});                             // add rsp, 8
  gp.bytes({0x48, 0x83, 0x04, 0x24, 2});                       // add qword [rsp], 2
  gp.bytes({0x81, 0x64, 0x24, 0x10, 0xff, 0xbf, 0xff, 0xff});  // and dword [rsp + 16], ~NT
  gp.bytes({0x48, 0xcf});

  const u64 registers[] = {0, LONG_APIC_ICR, 0x44400 /* NMI to itself */, below(4)};
  for (unsigned i = 0; i < std::size(registers); ++i) set(at_ + LONG_TEST_GPR + 8 * (8 + i), registers[i]);
}

void LongGenerator::around_nmis(Emitter& code) {
  if (code.is_full(20)) return;
  switch (below(8)) {
    case 0:
    case 1:
    case 2:
      if (cpl_ == 0) {
        send_nmi(code);
        break;
      }
      [[fallthrough]];
    case 3: code.bytes({0xcd, 0x50}); break;
    case 4: return_to_here(code, cpl_ ? data_r3 : data_r0, cpl_ ? code64_r3 : code64_r0); break;
    case 5: faulting_return(code); break;
    case 6:  // MOV SS, whose shadow is over when the NMI that the next instruction sends is due
      code.bytes({0xb8}).value_of(cpl_ ? data_r3 : data_r0, 4).bytes({0x8e, 0xd0});
      if (cpl_ == 0) send_nmi(code);
      break;
    default: trace(code, below(8)); break;
  }
}

}  // namespace anykvm::oracle
