// Guest memory accesses: page crossings, MMIO fragments and their replay, operands, segment checks.
#include <gtest/gtest.h>

#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

constexpr Gva ram = 0x40'0000'0000, hole = 0x40'0010'0000;

class MemoryAccess : public testing::Test, public LongMode {
 protected:
  MemoryAccess() {
    map(ram, 0x20000 + 0x80000, pte::p | pte::w | pte::u);
    map(ram + 0x1000, 0x30000 + 0x80000, pte::p | pte::w | pte::u);
    map(hole, machine.size, pte::p | pte::w | pte::u);
  }
  Gpa first = 0xa0000, second = 0xb0000;
};

TEST_F(MemoryAccess, EverySizeAndAlignment) {
  for (unsigned size : {1u, 2u, 3u, 4u, 7u, 8u, 10u, 16u, 32u, 64u}) {
    for (Gva at = ram + 0x1000 - 70; at < ram + 0x1000 + 4; ++at) {
      u8 in[64], out[64] = {};
      for (unsigned i = 0; i < size; ++i) in[i] = u8(at * 7 + i + size);
      ASSERT_EQ(cpu.write(at, in, size), Result::ok);
      ASSERT_EQ(cpu.read(at, out, size), Result::ok);
      ASSERT_EQ(std::memcmp(in, out, size), 0);
      for (unsigned i = 0; i < size; ++i) {
        const u64 offset = at - ram + i;
        ASSERT_EQ(machine.get<u8>(offset < 0x1000 ? first + offset : second + offset - 0x1000), in[i]);
      }
    }
  }
}

TEST_F(MemoryAccess, AStoreAcrossPagesIsAllOrNothing) {
  map(ram + 0x1000, 0, 0);
  cpu.mmu.flush_all();
  machine.put<u32>(first + 0xffc, 0x11111111);
  EXPECT_EQ(cpu.write(ram + 0xffc, u64{0}), Result::fault);
  EXPECT_EQ(cpu.fault.payload, ram + 0x1000);
  EXPECT_EQ(cpu.fault.error, 2u);
  EXPECT_EQ(machine.get<u32>(first + 0xffc), 0x11111111u);
  map(ram + 0x1000, second, pte::p);
  EXPECT_EQ(cpu.write(ram + 0xffc, u64{0}), Result::fault);
  EXPECT_EQ(machine.get<u32>(first + 0xffc), 0x11111111u);

  Operand operand;
  EXPECT_EQ(cpu.open_operand(ram + 0xffc, 8, Cpu::Use::read_write, operand), Result::fault);
  EXPECT_EQ(cpu.open_operand(ram + 0xffc, 8, Cpu::Use::read, operand), Result::ok);
}

TEST_F(MemoryAccess, AnOperandInRamIsRamItself) {
  Operand operand;
  ASSERT_EQ(cpu.open_operand(ram + 8, 8, Cpu::Use::read_write, operand), Result::ok);
  EXPECT_FALSE(operand.bounced);
  EXPECT_EQ(operand.host, machine.base + first + 8);
  cpu.close_operand(operand, Cpu::Use::read_write);
  ASSERT_EQ(cpu.open_operand(ram + 8, 8, Cpu::Use::read_write, operand), Result::ok);
  EXPECT_EQ(operand.host, machine.base + first + 8);
}

TEST_F(MemoryAccess, AnOperandAcrossPagesIsBouncedAndCommitted) {
  machine.put<u32>(first + 0xffc, 0x11111111);
  machine.put<u32>(second, 0x22222222);
  Operand operand;
  ASSERT_EQ(cpu.open_operand(ram + 0xffc, 8, Cpu::Use::read_write, operand), Result::ok);
  ASSERT_TRUE(operand.bounced);
  u64 value;
  std::memcpy(&value, operand.host, 8);
  EXPECT_EQ(value, 0x2222222211111111u);
  ++value;
  std::memcpy(operand.host, &value, 8);
  EXPECT_EQ(machine.get<u32>(first + 0xffc), 0x11111111u);
  cpu.close_operand(operand, Cpu::Use::read_write);
  EXPECT_EQ(machine.get<u32>(first + 0xffc), 0x11111112u);
  EXPECT_TRUE(machine.dirty.contains(first));
  EXPECT_TRUE(machine.dirty.contains(second));
}

TEST_F(MemoryAccess, AnMmioReadExitsAndIsReplayed) {
  u32 value = 0;
  cpu.mmio.begin_instruction();
  ASSERT_EQ(cpu.read(hole + 0x10, value), Result::exit);
  EXPECT_EQ(cpu.exit.kind, ExitKind::mmio_read);
  EXPECT_EQ(cpu.mmio.wanted().gpa, machine.size + 0x10);
  EXPECT_EQ(cpu.mmio.wanted().length, 4);
  const u32 answer = 0x12345678;
  cpu.mmio.reply(&answer);
  EXPECT_TRUE(cpu.mmio.replies_pending());
  for (int again = 0; again < 2; ++again) {  // the instruction may start again more than once
    cpu.mmio.begin_instruction();
    ASSERT_EQ(cpu.read(hole + 0x10, value), Result::ok);
    EXPECT_EQ(value, answer);
  }
  cpu.mmio.retire_instruction();
  cpu.mmio.begin_instruction();
  EXPECT_EQ(cpu.read(hole + 0x10, value), Result::exit);
}

TEST_F(MemoryAccess, AWideReadIsOneFragmentOf8BytesAtATime) {
  u8 bytes[32];
  std::vector<std::pair<Gpa, unsigned>> asked;
  for (;;) {
    cpu.mmio.begin_instruction();
    const Result result = cpu.read(hole + 4, bytes, 20);
    if (result == Result::ok) break;
    ASSERT_EQ(result, Result::exit);
    asked.push_back({cpu.mmio.wanted().gpa - machine.size, cpu.mmio.wanted().length});
    u8 reply[8];
    std::memset(reply, int(asked.size()), 8);
    cpu.mmio.reply(reply);
  }
  const std::vector<std::pair<Gpa, unsigned>> expected = {{4, 8}, {12, 8}, {20, 4}};
  EXPECT_EQ(asked, expected);
  EXPECT_EQ(bytes[0], 1);
  EXPECT_EQ(bytes[8], 2);
  EXPECT_EQ(bytes[19], 3);
}

TEST_F(MemoryAccess, InKernelDevicesAnswerOnceInAnInstruction) {
  machine.mmio_values[machine.size + 0x20] = 0x55;
  u8 bytes[16];
  cpu.mmio.begin_instruction();
  ASSERT_EQ(cpu.read(hole + 0x20, bytes, 16), Result::exit) << "the second half is the client's";
  EXPECT_EQ(cpu.mmio.wanted().gpa, machine.size + 0x28);
  machine.mmio_values[machine.size + 0x20] = 0x66;  // a device with side effects
  const u64 answer = 0x77;
  cpu.mmio.reply(&answer);
  cpu.mmio.begin_instruction();
  ASSERT_EQ(cpu.read(hole + 0x20, bytes, 16), Result::ok);
  EXPECT_EQ(bytes[0], 0x55);
  EXPECT_EQ(bytes[8], 0x77);
}

TEST_F(MemoryAccess, MmioStoresAreQueuedUnlessADeviceTakesThem) {
  machine.mmio_sinks.insert(machine.size + 8);
  u8 bytes[24];
  for (unsigned i = 0; i < 24; ++i) bytes[i] = u8(i);
  ASSERT_EQ(cpu.write(hole, bytes, 24), Result::ok);
  EXPECT_EQ(machine.mmio_writes, (std::vector<FakeMachine::Access>{{machine.size + 8, 8, 0x0f0e0d0c0b0a0908}}));
  ASSERT_TRUE(cpu.mmio.has_writes());
  EXPECT_EQ(cpu.mmio.next_write().gpa, machine.size);
  EXPECT_EQ(cpu.mmio.next_write().data[7], 7);
  cpu.mmio.pop_write();
  EXPECT_EQ(cpu.mmio.next_write().gpa, machine.size + 16);
  EXPECT_EQ(cpu.mmio.next_write().length, 8);
  cpu.mmio.pop_write();
  EXPECT_FALSE(cpu.mmio.has_writes());
}

TEST_F(MemoryAccess, RamAndMmioInOneStore) {
  map(ram + 0x1000, machine.size, pte::p | pte::w);
  cpu.mmu.flush_all();
  ASSERT_EQ(cpu.write(ram + 0xffd, 0x8877665544332211), Result::ok);
  EXPECT_EQ(machine.get<u8>(first + 0xffd), 0x11);
  ASSERT_TRUE(cpu.mmio.has_writes());
  EXPECT_EQ(cpu.mmio.next_write().gpa, machine.size);
  EXPECT_EQ(cpu.mmio.next_write().length, 5);
  EXPECT_EQ(cpu.mmio.next_write().data[0], 0x44);
}

TEST_F(MemoryAccess, AReadOnlySlotIsReadFromRamAndWrittenAsADevice) {
  machine.read_only.insert(first);
  machine.put<u64>(first + 8, 41);
  cpu.mmio.begin_instruction();
  Operand operand;
  ASSERT_EQ(cpu.open_operand(ram + 8, 8, Cpu::Use::read_write, operand), Result::ok);
  ASSERT_TRUE(operand.bounced);
  EXPECT_EQ(operand.host[0], 41);
  ++operand.host[0];
  cpu.close_operand(operand, Cpu::Use::read_write);
  ASSERT_TRUE(cpu.mmio.has_writes());
  EXPECT_EQ(cpu.mmio.next_write().gpa, first + 8);
  EXPECT_EQ(cpu.mmio.next_write().data[0], 42);
  EXPECT_EQ(machine.get<u64>(first + 8), 41u);
}

TEST_F(MemoryAccess, LongModeLinearAddresses) {
  Gva out;
  cpu.state.segment[fs].base = 0x1000;
  cpu.state.segment[ds].base = 0x5000;  // ignored
  ASSERT_EQ(cpu.linear(ds, 0x10, 8, Access::read, out), Result::ok);
  EXPECT_EQ(out, 0x10u);
  ASSERT_EQ(cpu.linear(fs, 0x10, 8, Access::read, out), Result::ok);
  EXPECT_EQ(out, 0x1010u);
  EXPECT_EQ(cpu.linear(ds, 1ull << 47, 1, Access::read, out), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  EXPECT_EQ(cpu.linear(ss, 1ull << 47, 1, Access::read, out), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ss);
}

TEST(Segmentation, LegacyLimitsAndTypes) {
  FakeMachine machine;
  Cpu cpu(machine);
  Gva out;
  // real mode
  cpu.state.segment[ds].base = 0x12340;
  ASSERT_EQ(cpu.linear(ds, 0xfffe, 2, Access::write, out), Result::ok);
  EXPECT_EQ(out, 0x2233eu);
  EXPECT_EQ(cpu.linear(ds, 0xffff, 2, Access::write, out), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  EXPECT_EQ(cpu.linear(ss, 0xffff, 2, Access::write, out), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ss);
  // protected mode
  cpu.state.cr0 |= cr0::pe;
  cpu.update_mode();
  Segment& segment = cpu.state.segment[ds];
  segment = {.base = 0x1000, .limit = 0xfff, .selector = 8, .type = 1, .present = true, .s = true, .db = true};
  EXPECT_EQ(cpu.linear(ds, 0xffc, 4, Access::read, out), Result::ok);
  EXPECT_EQ(cpu.linear(ds, 0xffd, 4, Access::read, out), Result::fault);
  EXPECT_EQ(cpu.linear(ds, 0, 4, Access::write, out), Result::fault) << "read-only";
  segment.type = 7;  // expand-down, writable
  EXPECT_EQ(cpu.linear(ds, 0xfff, 1, Access::write, out), Result::fault);
  EXPECT_EQ(cpu.linear(ds, 0x1000, 4, Access::write, out), Result::ok);
  EXPECT_EQ(cpu.linear(ds, 0xffffffff, 1, Access::write, out), Result::ok);
  segment.type = 9;  // execute-only
  EXPECT_EQ(cpu.linear(ds, 0, 1, Access::read, out), Result::fault);
  segment = {.selector = 0, .unusable = true};
  EXPECT_EQ(cpu.linear(ds, 0, 1, Access::read, out), Result::fault);
  EXPECT_EQ(cpu.fault.error, 0u);
}

}  // namespace
}  // namespace anykvm::x86
