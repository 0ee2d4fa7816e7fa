// libFuzzer's entry into one of the targets; which one is the build's choice.
#ifdef ANYKVM_FUZZ_TARGET
#include "fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const anykvm::u8* data, std::size_t size) {
  anykvm::fuzz::ANYKVM_FUZZ_TARGET({data, size});
  return 0;
}
#endif
