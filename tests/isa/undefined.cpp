#include "isa/undefined.h"

namespace anykvm::isa {

Leniency leniency_of(const Case&, const Outcome&) { return {.x87_pointers = true, .in_use = true}; }

bool ignores_alignment(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_VDPPS: return true;
    default: return false;
  }
}

}  // namespace anykvm::isa
