// Registers, modes, priorities and state of one local APIC. IPIs are in apic_bus_test.cpp, the timer in
// lapic_timer_test.cpp.
#include "irqchip/lapic.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>

#include "irqchip/fake_apic_client.h"

namespace anykvm::irqchip {
namespace {

using namespace test;
using MsrResult = LocalApic::MsrResult;
constexpr u32 masked = 1 << 16;
constexpr u32 msr_base = 0x1b;

u32 x2apic_msr(u32 offset) { return 0x800 + offset / 16; }
InterruptMessage fixed(u8 vector, bool level = false) { return {.vector = vector, .level_triggered = level}; }

class LapicTest : public testing::Test {
 protected:
  FakeMachine machine{2};
  LocalApic& apic = machine[0];
  FakeApicClient& client = *machine.clients[0];
};

TEST(Lapic, PowerOnState) {
  os::TimerQueue timers;
  ApicBus bus;
  FakeApicClient client;
  for (u32 id : {0u, 3u}) {
    LocalApic apic(id, client, bus, timers, id == 0);
    EXPECT_EQ(apic.base(), 0xfee00800u | (id == 0 ? 0x100 : 0));
    EXPECT_EQ(read(apic, reg::id), id << 24);
    EXPECT_EQ(read(apic, reg::version), 0x50014u);
    EXPECT_EQ(read(apic, reg::svr), 0xffu);
    EXPECT_EQ(read(apic, reg::dfr), 0xffffffffu);
    EXPECT_EQ(read(apic, reg::ldr), 0u);
    EXPECT_EQ(read(apic, reg::lvt_timer), masked);
    EXPECT_EQ(read(apic, reg::lvt_lint1), masked);
    EXPECT_EQ(read(apic, reg::lvt_lint0), id == 0 ? 0x700u : masked);
    EXPECT_EQ(apic.takes_pic_output(), id == 0);
    EXPECT_EQ(apic.pending(), -1);
  }
}

TEST_F(LapicTest, PageMovesWithTheBase) {
  EXPECT_TRUE(apic.covers(0xfee00000));
  EXPECT_TRUE(apic.covers(0xfee00fff));
  EXPECT_FALSE(apic.covers(0xfee01000));
  EXPECT_EQ(apic.write_msr(msr_base, 0x12345000 | 0x900), MsrResult::ok);
  EXPECT_TRUE(apic.covers(0x12345080));
  EXPECT_FALSE(apic.covers(0xfee00000));
}

TEST_F(LapicTest, DisabledPageReadsOnes) {
  EXPECT_EQ(apic.write_msr(msr_base, 0xfee00100), MsrResult::ok);
  EXPECT_TRUE(apic.takes_pic_output()) << "a disabled APIC wires INTR through";
  EXPECT_EQ(read(apic, reg::version), 0xffffffffu);
  write(apic, reg::tpr, 0x50);
  EXPECT_FALSE(apic.accept(fixed(0x40)));
  EXPECT_EQ(apic.write_msr(msr_base, 0xfee00900), MsrResult::ok);
  EXPECT_EQ(read(apic, reg::tpr), 0u);
  EXPECT_EQ(read(apic, reg::id), 0u);
}

TEST_F(LapicTest, AccessesNarrowerOrUnaligned) {
  write(apic, reg::tpr, 0x37);
  u8 byte = 0xee;
  apic.mmio_read(reg::tpr, &byte, 1);
  EXPECT_EQ(byte, 0x37);
  u16 half = 0xeeee;
  apic.mmio_read(reg::version + 2, &half, 2);
  EXPECT_EQ(half, 5);
  u32 word = 0xeeeeeeee;
  apic.mmio_read(reg::version + 2, &word, 4);
  EXPECT_EQ(word, 0u);
  u64 both = ~u64{0};
  apic.mmio_read(reg::version, &both, 8);
  EXPECT_EQ(both, 0u);
  byte = 0x11;
  apic.mmio_write(reg::tpr, &byte, 1);
  word = 0x11;
  apic.mmio_write(reg::tpr + 4, &word, 4);
  EXPECT_EQ(read(apic, reg::tpr), 0x37u);
}

TEST_F(LapicTest, WritableBits) {
  write(apic, reg::id, 0xffffffff);
  EXPECT_EQ(read(apic, reg::id), 0xff000000u);
  write(apic, reg::version, 0);
  EXPECT_EQ(read(apic, reg::version), 0x50014u);
  write(apic, reg::ldr, 0xffffffff);
  EXPECT_EQ(read(apic, reg::ldr), 0xff000000u);
  write(apic, reg::dfr, 0);
  EXPECT_EQ(read(apic, reg::dfr), 0x0fffffffu);
  write(apic, reg::svr, 0xffffffff);
  EXPECT_EQ(read(apic, reg::svr), 0x3ffu) << "EOI broadcast suppression is not advertised";
  write(apic, reg::icr_high, 0xffffffff);
  EXPECT_EQ(read(apic, reg::icr_high), 0xff000000u);
  write(apic, reg::lvt_timer, 0xffffffff);
  EXPECT_EQ(read(apic, reg::lvt_timer), 0x700ffu);
  write(apic, reg::lvt_thermal, 0xffffffff);
  EXPECT_EQ(read(apic, reg::lvt_thermal), 0x107ffu);
  write(apic, reg::lvt_lint1, 0xffffffff);
  EXPECT_EQ(read(apic, reg::lvt_lint1), 0x1a7ffu);
  write(apic, reg::lvt_error, 0xffffffff);
  EXPECT_EQ(read(apic, reg::lvt_error), 0x100ffu);
  write(apic, reg::divide, 0xffffffff);
  EXPECT_EQ(read(apic, reg::divide), 0xbu);
}

TEST_F(LapicTest, TimerModeBitsFollowCpuid) {
  apic.set_features({.x2apic = true, .tsc_deadline = false, .physical_address_bits = 46});
  write(apic, reg::lvt_timer, 0x000600ff);
  EXPECT_EQ(read(apic, reg::lvt_timer), 0x200ffu);
}

TEST_F(LapicTest, CorrectedMachineChecksHaveTheirEntryOnlyWhenOffered) {
  constexpr u32 lvt_cmci = 0x2f0;
  write(apic, lvt_cmci, 0xe2);
  apic.deliver_cmci();
  EXPECT_EQ(apic.pending(), -1);
  kvm_lapic_state state;
  apic.get_state(state);
  EXPECT_EQ(state.regs[lvt_cmci], 0);

  apic.set_features({.cmci = true});
  EXPECT_EQ(read(apic, reg::version), 0x60014u);
  EXPECT_EQ(read(apic, lvt_cmci), masked);
  apic.deliver_cmci();
  EXPECT_EQ(apic.pending(), -1) << "masked";
  write(apic, lvt_cmci, 0xffff'ffff & ~masked);
  EXPECT_EQ(read(apic, lvt_cmci), 0x7ffu);
  write(apic, lvt_cmci, 0xe2);
  apic.deliver_cmci();
  EXPECT_EQ(apic.pending(), 0xe2);
  write(apic, reg::svr, 0xff);
  EXPECT_EQ(read(apic, lvt_cmci), 0xe2 | masked);
}

TEST_F(LapicTest, SoftwareDisableMasksLvtsAndRefusesInterrupts) {
  write(apic, reg::lvt_lint1, 0x400);
  write(apic, reg::svr, 0xff);
  EXPECT_EQ(read(apic, reg::lvt_lint1), 0x400 | masked);
  EXPECT_EQ(read(apic, reg::lvt_lint0), 0x700 | masked);
  EXPECT_FALSE(apic.takes_pic_output());
  write(apic, reg::lvt_error, 0x55);
  EXPECT_EQ(read(apic, reg::lvt_error), 0x55 | masked);
  EXPECT_FALSE(apic.accept(fixed(0x40)));
  EXPECT_TRUE(apic.accept({.mode = DeliveryMode::nmi}));
  EXPECT_EQ(client.nmis, 1);
  write(apic, reg::svr, 0x1ff);
  EXPECT_EQ(read(apic, reg::lvt_lint1), 0x400 | masked) << "enabling unmasks nothing";
}

// --- priorities ------------------------------------------------------------------------------------------------------

TEST_F(LapicTest, InterruptGoesFromIrrToIsrToEoi) {
  EXPECT_TRUE(apic.accept(fixed(0x41)));
  EXPECT_EQ(client.wakes.exchange(0) > 0, true);
  EXPECT_EQ(read(apic, reg::irr + 0x20), 2u);
  EXPECT_EQ(apic.pending(), 0x41);
  EXPECT_EQ(apic.acknowledge(), 0x41);
  EXPECT_EQ(read(apic, reg::irr + 0x20), 0u);
  EXPECT_EQ(read(apic, reg::isr + 0x20), 2u);
  EXPECT_EQ(read(apic, reg::ppr), 0x40u);
  EXPECT_EQ(apic.acknowledge(), -1);
  EXPECT_TRUE(apic.accept(fixed(0x41))) << "one may wait while one is in service";
  EXPECT_EQ(apic.pending(), -1);
  write(apic, reg::eoi, 0);
  EXPECT_EQ(read(apic, reg::ppr), 0u);
  EXPECT_EQ(apic.pending(), 0x41);
  EXPECT_GT(client.wakes, 0) << "the EOI has let it through";
}

TEST_F(LapicTest, HigherClassNestsAndSameClassWaits) {
  apic.accept(fixed(0x41));
  apic.acknowledge();
  apic.accept(fixed(0x4f));
  EXPECT_EQ(apic.pending(), -1);
  apic.accept(fixed(0x50));
  EXPECT_EQ(apic.acknowledge(), 0x50);
  write(apic, reg::eoi, 0);
  EXPECT_EQ(read(apic, reg::ppr), 0x40u);
  write(apic, reg::eoi, 0);
  EXPECT_EQ(apic.acknowledge(), 0x4f);
}

TEST_F(LapicTest, HighestVectorFirst) {
  for (u8 vector : {0x31, 0xf1, 0x20, 0x91, 0x93}) apic.accept(fixed(vector));
  EXPECT_EQ(take_all(apic), (std::vector<int>{0xf1, 0x93, 0x91, 0x31, 0x20}));
}

TEST_F(LapicTest, TaskPriorityHoldsBack) {
  apic.set_tpr(4);
  EXPECT_EQ(read(apic, reg::tpr), 0x40u);
  EXPECT_EQ(apic.tpr(), 4u);
  apic.accept(fixed(0x4f));
  EXPECT_EQ(apic.pending(), -1);
  client.wakes = 0;
  apic.set_tpr(3);
  EXPECT_GT(client.wakes, 0);
  EXPECT_EQ(apic.pending(), 0x4f);
  write(apic, reg::tpr, 0x4a);
  EXPECT_EQ(read(apic, reg::ppr), 0x4au);
  EXPECT_EQ(apic.pending(), -1);
  apic.accept(fixed(0x50));
  EXPECT_EQ(apic.pending(), 0x50);
}

TEST_F(LapicTest, EoiWithoutInterruptIsHarmless) {
  write(apic, reg::eoi, 0);
  EXPECT_EQ(read(apic, reg::ppr), 0u);
}

TEST_F(LapicTest, TriggerModeRegister) {
  apic.accept(fixed(0x60, true));
  EXPECT_EQ(read(apic, reg::tmr + 0x30), 1u);
  apic.accept(fixed(0x60, false));
  EXPECT_EQ(read(apic, reg::tmr + 0x30), 0u);
}

// --- errors ----------------------------------------------------------------------------------------------------------

TEST_F(LapicTest, ErrorsAreLatchedByAWrite) {
  write(apic, reg::lvt_error, 0xfe);
  EXPECT_FALSE(apic.accept(fixed(0x0f)));
  EXPECT_EQ(read(apic, reg::esr), 0u);
  EXPECT_EQ(take_all(apic), std::vector<int>{0xfe});
  write(apic, reg::icr, 0x4000 | 0x05);  // sending an illegal vector
  read(apic, 0x40);                      // a reserved register
  write(apic, reg::esr, 0);
  EXPECT_EQ(read(apic, reg::esr), 0xe0u);
  write(apic, reg::esr, 0);
  EXPECT_EQ(read(apic, reg::esr), 0u);
}

TEST_F(LapicTest, ErrorInterruptWithAnIllegalVectorIsNotEndless) {
  write(apic, reg::lvt_error, 0x05);
  EXPECT_FALSE(apic.accept(fixed(0x0f)));
  EXPECT_EQ(apic.pending(), -1);
}

// --- APIC_BASE and x2APIC --------------------------------------------------------------------------------------------

TEST_F(LapicTest, BaseRejectsReservedBitsAndBadTransitions) {
  const u64 disabled = 0xfee00100, xapic = 0xfee00900, x2apic = 0xfee00d00, invalid = 0xfee00500;
  EXPECT_EQ(apic.write_msr(msr_base, xapic | 1), MsrResult::gp);
  EXPECT_EQ(apic.write_msr(msr_base, xapic | 0x200), MsrResult::gp);
  EXPECT_EQ(apic.write_msr(msr_base, xapic | u64{1} << 46), MsrResult::gp);
  EXPECT_EQ(apic.write_msr(msr_base, invalid), MsrResult::gp);
  EXPECT_EQ(apic.write_msr(msr_base, x2apic), MsrResult::ok);
  EXPECT_EQ(apic.write_msr(msr_base, xapic), MsrResult::gp) << "only through disabled";
  EXPECT_EQ(apic.write_msr(msr_base, disabled), MsrResult::ok);
  EXPECT_EQ(apic.write_msr(msr_base, x2apic), MsrResult::gp) << "only through xAPIC";
  EXPECT_EQ(apic.write_msr(msr_base, x2apic, true), MsrResult::ok) << "the client may";
  EXPECT_EQ(apic.set_base(xapic), 0);
  EXPECT_EQ(apic.set_base(invalid), -EINVAL);
  u64 value = 0;
  EXPECT_EQ(apic.read_msr(msr_base, value), MsrResult::ok);
  EXPECT_EQ(value, xapic);
  apic.set_features({.x2apic = false, .physical_address_bits = 46});
  EXPECT_EQ(apic.write_msr(msr_base, x2apic), MsrResult::gp);
}

TEST_F(LapicTest, X2apicRegisters) {
  LocalApic& second = machine[1];
  u64 value = 0;
  EXPECT_EQ(second.read_msr(x2apic_msr(reg::id), value), MsrResult::gp) << "not in xAPIC mode";
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::tpr), 0), MsrResult::gp);
  machine.enter_x2apic();
  EXPECT_EQ(second.read_msr(x2apic_msr(reg::id), value), MsrResult::ok);
  EXPECT_EQ(value, 1u);
  EXPECT_EQ(second.read_msr(x2apic_msr(reg::ldr), value), MsrResult::ok);
  EXPECT_EQ(value, 2u);
  EXPECT_EQ(second.read_msr(x2apic_msr(reg::version), value), MsrResult::ok);
  EXPECT_EQ(value, 0x50014u);
  EXPECT_EQ(read(second, reg::version), 0xffffffffu);

  for (u32 r : {reg::id, reg::version, reg::ppr, reg::ldr, reg::dfr, reg::isr, reg::irr, reg::icr_high, 0x400u, 0x3d0u})
    EXPECT_EQ(second.write_msr(x2apic_msr(r), 0), MsrResult::gp) << r;
  for (u32 r : {reg::eoi, reg::dfr, reg::icr_high, reg::self_ipi, 0x90u, 0x2f0u, 0x7f0u})
    EXPECT_EQ(second.read_msr(x2apic_msr(r), value), MsrResult::gp) << r;
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::eoi), 1), MsrResult::gp);
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::esr), 1), MsrResult::gp);
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::tpr), u64{1} << 32), MsrResult::gp);
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::self_ipi), 0x100), MsrResult::gp);
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::icr), 1 << 13), MsrResult::gp);
  EXPECT_EQ(second.write_msr(x2apic_msr(reg::icr), 1 << 20), MsrResult::gp);
  EXPECT_EQ(second.read_msr(0x900, value), MsrResult::not_mine);
  EXPECT_EQ(second.read_msr(0x10, value), MsrResult::not_mine);
}

TEST_F(LapicTest, X2apicInterruptRoundTrip) {
  machine.enter_x2apic();
  EXPECT_EQ(apic.write_msr(x2apic_msr(reg::self_ipi), 0x61), MsrResult::ok);
  u64 value = 0;
  EXPECT_EQ(apic.read_msr(x2apic_msr(reg::irr + 0x30), value), MsrResult::ok);
  EXPECT_EQ(value, 2u);
  EXPECT_EQ(apic.acknowledge(), 0x61);
  EXPECT_EQ(apic.write_msr(x2apic_msr(reg::eoi), 0), MsrResult::ok);
  EXPECT_EQ(apic.read_msr(x2apic_msr(reg::isr + 0x30), value), MsrResult::ok);
  EXPECT_EQ(value, 0u);
  EXPECT_EQ(apic.write_msr(x2apic_msr(reg::icr), u64{1} << 32 | 0x4055), MsrResult::ok);
  EXPECT_EQ(apic.read_msr(x2apic_msr(reg::icr), value), MsrResult::ok);
  EXPECT_EQ(value, u64{1} << 32 | 0x4055);
  EXPECT_EQ(machine[1].acknowledge(), 0x55);
}

TEST_F(LapicTest, InitKeepsModeAndIdResetDoesNot) {
  machine.enter_x2apic();
  LocalApic& second = machine[1];
  second.accept(fixed(0x40));
  second.write_msr(x2apic_msr(reg::tpr), 0x30);
  second.init();
  EXPECT_EQ(second.base(), 0xfee00c00u);
  u64 value = 0;
  second.read_msr(x2apic_msr(reg::id), value);
  EXPECT_EQ(value, 1u);
  second.read_msr(x2apic_msr(reg::ldr), value);
  EXPECT_EQ(value, 2u);
  EXPECT_EQ(second.tpr(), 0u);
  EXPECT_EQ(second.pending(), -1);
  second.reset();
  EXPECT_EQ(second.base(), 0xfee00800u);
  EXPECT_EQ(read(second, reg::id), 1u << 24);
  EXPECT_EQ(read(second, reg::svr), 0xffu);
}

// --- EOI -------------------------------------------------------------------------------------------------------------

struct RecordingSink : EoiSink {
  bool wants_edge_eoi(u8 vector) const override { return vector == 0x70; }
  void eoi(u8 vector, bool level, ApicClient&) override { told.emplace_back(vector, level); }
  std::vector<std::pair<u8, bool>> told;
};

TEST_F(LapicTest, EoiIsBroadcastForLevelAndForWatchedVectors) {
  RecordingSink sink;
  machine.bus.set_eoi_sink(&sink);
  for (auto [vector, level] : {std::pair{0x50, false}, {0x60, true}, {0x70, false}})
    apic.accept(fixed(static_cast<u8>(vector), level));
  take_all(apic);
  EXPECT_EQ(sink.told, (std::vector<std::pair<u8, bool>>{{0x70, false}, {0x60, true}}));
}

TEST_F(LapicTest, DirectedEoiSuppressesTheBroadcast) {
  RecordingSink sink;
  machine.bus.set_eoi_sink(&sink);
  apic.set_features({.x2apic = true, .directed_eoi = true, .physical_address_bits = 46});
  EXPECT_EQ(read(apic, reg::version), 0x1050014u);
  write(apic, reg::svr, 0x11ff);
  apic.accept(fixed(0x60, true));
  take_all(apic);
  EXPECT_TRUE(sink.told.empty());
}

struct FakePvEoi : PvEoi {
  bool offer() override { return flag = true; }
  bool withdraw() override { return std::exchange(flag, false); }
  bool flag = false;
};

TEST_F(LapicTest, ParavirtualEoi) {
  FakePvEoi flag;
  apic.set_pv_eoi(&flag);
  apic.accept(fixed(0x50));
  EXPECT_EQ(apic.acknowledge(), 0x50);
  EXPECT_TRUE(flag.flag);
  flag.flag = false;  // the guest's EOI
  EXPECT_EQ(apic.pending(), -1);
  EXPECT_EQ(read(apic, reg::isr + 0x20), 0u);

  apic.accept(fixed(0x50));
  apic.acknowledge();
  write(apic, reg::eoi, 0);  // the guest did not use it
  EXPECT_FALSE(flag.flag);
  EXPECT_EQ(read(apic, reg::isr + 0x20), 0u);

  apic.accept(fixed(0x50));
  apic.acknowledge();
  apic.accept(fixed(0x60));
  EXPECT_EQ(apic.pending(), 0x60);
  EXPECT_FALSE(flag.flag) << "taken back: nested interrupts need a real EOI";
  EXPECT_EQ(read(apic, reg::isr + 0x20), 1u << 16);
  take_all(apic);
  write(apic, reg::eoi, 0);

  apic.accept(fixed(0x50, true));
  apic.acknowledge();
  EXPECT_FALSE(flag.flag) << "the I/O APIC waits for this one";
}

// --- state -----------------------------------------------------------------------------------------------------------

u32 field(const kvm_lapic_state& state, u32 offset) {
  u32 value;
  std::memcpy(&value, state.regs + offset, 4);
  return value;
}

TEST_F(LapicTest, StateRoundTrip) {
  write(apic, reg::lvt_lint0, 0x10700);
  write(apic, reg::lvt_timer, 0x000200ef);
  apic.set_tpr(2);
  apic.accept(fixed(0x51));
  apic.acknowledge();
  apic.accept(fixed(0x45, true));
  kvm_lapic_state state, copy;
  apic.get_state(state);
  EXPECT_EQ(field(state, reg::isr + 0x20), 1u << 17);
  EXPECT_EQ(field(state, reg::irr + 0x20), 1u << 5);
  EXPECT_EQ(field(state, reg::tmr + 0x20), 1u << 5);
  EXPECT_EQ(field(state, reg::ppr), 0x50u);
  apic.reset();
  EXPECT_EQ(apic.set_state(state), 0);
  apic.get_state(copy);
  EXPECT_EQ(std::memcmp(&state, &copy, sizeof state), 0);
  EXPECT_EQ(apic.pending(), -1);
  write(apic, reg::eoi, 0);
  EXPECT_EQ(apic.pending(), 0x45);
}

TEST_F(LapicTest, StateInX2apicMode) {
  LocalApic& second = machine[1];
  machine.enter_x2apic();
  second.write_msr(x2apic_msr(reg::icr), u64{0x12345678} << 32 | 0x4055);
  kvm_lapic_state state;
  second.get_state(state);
  EXPECT_EQ(field(state, reg::id), 1u << 24) << "without KVM_CAP_X2APIC_API the ID is in xAPIC's place";
  EXPECT_EQ(field(state, reg::icr), 0x4055u);
  EXPECT_EQ(field(state, reg::icr_high), 0x12345678u);
  EXPECT_EQ(second.set_state(state), 0);
  u64 value = 0;
  second.read_msr(x2apic_msr(reg::id), value);
  EXPECT_EQ(value, 1u);

  machine.bus.set_x2apic_format(true);
  second.get_state(state);
  EXPECT_EQ(field(state, reg::id), 1u);
  EXPECT_EQ(second.set_state(state), 0);
  const u32 wrong = 2;
  std::memcpy(state.regs + reg::id, &wrong, 4);
  EXPECT_EQ(second.set_state(state), -EINVAL);
}

}  // namespace
}  // namespace anykvm::irqchip
