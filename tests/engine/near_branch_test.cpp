// How wide the target of a near branch in 64-bit code is.
#include "engine/one_instruction.h"

namespace anykvm::engine {
namespace {

class NearBranch : public OneInstruction {
 protected:
  /// How many bytes a CALL to the next instruction pushes.
  u64 pushes(std::initializer_list<u8> call) {
    cpu.state.gpr[x86::rsp] = data + 0x800;
    EXPECT_EQ(execute(call), no_fault);
    return data + 0x800 - cpu.state.gpr[x86::rsp];
  }
};

TEST_F(NearBranch, RexWOutdoesTheOperandSizePrefix) {
  EXPECT_EQ(pushes({0xe8, 0, 0, 0, 0}), 8u);
  // As compilers pad a call of __tls_get_addr().
  EXPECT_EQ(pushes({0x66, 0x66, 0x48, 0xe8, 0, 0, 0, 0}), 8u);
}

}  // namespace
}  // namespace anykvm::engine
