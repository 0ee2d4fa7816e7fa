// kvmclock, steal time, PV EOI and hypercalls on a vCPU with a fake machine.
#include "paravirt/paravirt.h"

#include <asm/kvm_para.h>
#include <gtest/gtest.h>
#include <linux/kvm_para.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>
#include <thread>

#include "irqchip/apic_bus.h"
#include "os/clock.h"
#include "os/timer_queue.h"
#include "os/tsc.h"
#include "os/wait_for_cpu.h"
#include "x86/fake_machine.h"

namespace anykvm::paravirt {
namespace {

using x86::Initiator;
using MsrResult = x86::Machine::MsrResult;

struct ClockPage {
  u32 version, pad0;
  u64 tsc_timestamp, system_time;
  u32 mul;
  s8 shift;
  u8 flags, pad[2];

  /// As guests compute it.
  u64 ns_at(u64 tsc) const {
    u64 delta = tsc - tsc_timestamp;
    delta = shift < 0 ? delta >> -shift : delta << shift;
    return system_time + u64(u128(delta) * mul >> 32);
  }
};

u64 clock_ns(clockid_t id) {
  timespec t;
  clock_gettime(id, &t);
  return u64(t.tv_sec) * 1'000'000'000 + u64(t.tv_nsec);
}

void sleep_ms(long ms) {
  const timespec pause = {ms / 1000, ms % 1000 * 1'000'000};
  nanosleep(&pause, nullptr);
}

/// One vCPU with everything around it.
struct Vcpu : irqchip::ApicClient {
  explicit Vcpu(VmClock& clock, u32 khz = 0) : pv(cpu, clock, khz) {
    EXPECT_EQ(cpu.cpuid.set(x86::supported_cpuid()), 0);
  }

  void wake() override { ++wakes; }
  void signal_nmi() override {}
  void signal_smi() override {}
  void signal_init() override {}
  void signal_sipi(u8) override {}
  void signal_unhalt() override { ++unhalts; }
  u64 tsc_deadline_ns(u64 tsc) override { return pv.monotonic_ns_of_tsc(tsc); }

  u64 hypercall(u64 number, u64 a0 = 0, u64 a1 = 0, u64 a2 = 0, u64 a3 = 0) {
    u64* gpr = cpu.state.gpr;
    gpr[x86::rax] = number, gpr[x86::rbx] = a0, gpr[x86::rcx] = a1, gpr[x86::rdx] = a2, gpr[x86::rsi] = a3;
    EXPECT_EQ(pv.hypercall(), x86::Result::ok);
    return gpr[x86::rax];
  }

  x86::FakeMachine machine;
  std::unique_ptr<x86::Cpu> owned = std::make_unique<x86::Cpu>(machine);
  x86::Cpu& cpu = *owned;
  Paravirt pv;
  int wakes = 0, unhalts = 0;
};

class Pv : public testing::Test {
 protected:
  VmClock clock;
  Vcpu v{clock};
  ClockPage page(Gpa gpa = 0x1000) { return v.machine.get<ClockPage>(gpa); }
};

TEST(TscScale, ConvertsExactly) {
  for (u64 hz : {1'000'000ull, 999'999'999ull, 1'000'000'000ull, 2'596'000'000ull, 5'000'000'000ull}) {
    const TscScale scale = tsc_scale(hz);
    EXPECT_GE(scale.multiplier, 1u << 31);
    for (u64 seconds : {1ull, 60ull, 3600ull})
      EXPECT_NEAR(double(scale.ns(hz * seconds)), double(seconds) * 1e9, double(seconds) * 2 + 1000) << hz;
  }
}

TEST_F(Pv, ClockPageShowsHostTime) {
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest), MsrResult::ok);
  const ClockPage p = page();
  EXPECT_NE(p.version, 0u);
  EXPECT_EQ(p.version & 1, 0u);
  EXPECT_EQ(p.flags, os::host_tsc_is_invariant() ? 1 : 0);
  const u64 begin = clock_ns(CLOCK_MONOTONIC_RAW), guest_begin = p.ns_at(v.cpu.tsc());
  EXPECT_NEAR(double(guest_begin), double(clock.now_ns()), 1e6);
  sleep_ms(50);
  const u64 guest_end = p.ns_at(v.cpu.tsc()), end = clock_ns(CLOCK_MONOTONIC_RAW);
  EXPECT_NEAR(double(guest_end - guest_begin), double(end - begin), 50e6 * 50e-6 + 200'000);
  u64 value = 0;
  EXPECT_EQ(v.pv.read_msr(MSR_KVM_SYSTEM_TIME, value, Initiator::guest), MsrResult::ok);
  EXPECT_EQ(value, 0x1001u);
}

TEST_F(Pv, ClockVersionGrowsByTwoWithEveryUpdate) {
  v.machine.put<u32>(0x1000, 7);  // random junk, odd
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME, 0x1001, Initiator::guest);
  const u32 first = page().version;
  EXPECT_EQ(first & 1, 0u);
  v.pv.on_enter();
  EXPECT_EQ(page().version, clock.drifts() ? first + 2 : first);
  const u32 before = page().version;
  EXPECT_EQ(v.pv.kvmclock_ctrl(), 0);
  v.pv.on_enter();
  EXPECT_EQ(page().version, before + 2);
}

TEST_F(Pv, ClockIsWrittenAtEntryForTheClient) {
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::host), MsrResult::ok);
  EXPECT_EQ(page().version, 0u);
  v.pv.on_enter();
  EXPECT_NE(page().version, 0u);
}

TEST_F(Pv, DisabledClockWritesNothing) {
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1000, Initiator::guest);
  v.pv.on_enter();
  EXPECT_EQ(page().version, 0u);
  EXPECT_EQ(v.pv.kvmclock_ctrl(), -EINVAL);
  // Neither does one outside RAM, or one that does not fit into its page.
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 1ull << 40 | 1, Initiator::guest);
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1ff1, Initiator::guest);
  EXPECT_EQ(v.machine.get<u32>(0x1ff0), 0u);
}

TEST_F(Pv, GuestStoppedStaysUntilTheGuestClearsIt) {
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_EQ(v.pv.kvmclock_ctrl(), 0);
  v.pv.on_enter();
  EXPECT_TRUE(page().flags & 2);
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_TRUE(page().flags & 2);
  v.machine.put<u8>(0x1000 + offsetof(ClockPage, flags), 0);
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_FALSE(page().flags & 2);
}

TEST_F(Pv, TscWritesDoNotMoveTheClock) {
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_EQ(v.pv.write_msr(0x10, 1ull << 50, Initiator::guest), MsrResult::ok);
  EXPECT_GE(v.cpu.tsc(), 1ull << 50);
  EXPECT_NEAR(double(page().ns_at(v.cpu.tsc())), double(clock.now_ns()), 1e6);
  EXPECT_EQ(v.pv.write_msr(0x3b, 12345, Initiator::guest), MsrResult::ok);
  EXPECT_NEAR(double(page().ns_at(v.cpu.tsc())), double(clock.now_ns()), 1e6);
}

TEST_F(Pv, ScaledTscKeepsTheClock) {
  EXPECT_EQ(v.pv.tsc_khz(), os::host_tsc_khz());
  EXPECT_EQ(v.cpu.state.tsc_ratio, 0u);
  EXPECT_EQ(v.pv.set_tsc_khz(1'000'000), 0);
  EXPECT_EQ(v.pv.tsc_khz(), 1'000'000u);
  const u64 tsc = v.cpu.tsc(), ns = os::monotonic_ns();
  sleep_ms(20);
  EXPECT_NEAR(double(v.cpu.tsc() - tsc), double(os::monotonic_ns() - ns), 500'000);
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_NEAR(double(page().ns_at(v.cpu.tsc())), double(clock.now_ns()), 1e6);
  EXPECT_EQ(v.pv.set_tsc_khz(~0u), -EINVAL);
  EXPECT_EQ(v.pv.tsc_khz(), 1'000'000u);
  EXPECT_EQ(v.pv.set_tsc_khz(0), 0);
  EXPECT_EQ(v.cpu.state.tsc_ratio, 0u);
}

TEST_F(Pv, DeadlinesAreOnTheMonotonicClock) {
  const u64 now = os::monotonic_ns();
  EXPECT_NEAR(double(v.pv.monotonic_ns_of_tsc(v.cpu.tsc() + u64(os::host_tsc_khz()) * 1000)),
              double(now + 1'000'000'000), 2e6);
  EXPECT_NEAR(double(v.pv.monotonic_ns_of_tsc(0)), double(now), 2e6);
  EXPECT_GT(v.pv.monotonic_ns_of_tsc(~0ull), now);
}

TEST_F(Pv, WallClockIsTheTimeOfBoot) {
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_WALL_CLOCK_NEW, 0x2000, Initiator::guest), MsrResult::ok);
  EXPECT_EQ(v.machine.get<u32>(0x2000), 2u);
  const u64 boot = v.machine.get<u32>(0x2004) * 1'000'000'000ull + v.machine.get<u32>(0x2008);
  EXPECT_NEAR(double(boot + clock.now_ns()), double(clock_ns(CLOCK_REALTIME)), 5e6);
  v.pv.write_msr(MSR_KVM_WALL_CLOCK, 0x3000, Initiator::host);
  EXPECT_EQ(v.machine.get<u32>(0x3000), 0u);
  v.pv.on_enter();
  EXPECT_EQ(v.machine.get<u32>(0x3000), 2u);
}

TEST_F(Pv, VmClockIsSetAndGot) {
  kvm_clock_data data{};
  EXPECT_EQ(clock.get_clock(data), 0);
  if (os::host_tsc_is_invariant()) {
    EXPECT_EQ(data.flags, u32(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC));
    EXPECT_LE(data.host_tsc, os::host_tsc());
    EXPECT_NEAR(double(data.realtime), double(clock_ns(CLOCK_REALTIME)), 5e6);
  }
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  data = {};
  data.clock = 1'000'000'000'000;
  EXPECT_EQ(clock.set_clock(data), 0);
  EXPECT_NEAR(double(clock.now_ns()), 1e12, 5e6);
  v.pv.on_enter();
  EXPECT_NEAR(double(page().ns_at(v.cpu.tsc())), double(clock.now_ns()), 1e6);

  // A minute on the way, by the wall clock.
  data.flags = KVM_CLOCK_REALTIME;
  data.realtime = clock_ns(CLOCK_REALTIME) - 60'000'000'000;
  EXPECT_EQ(clock.set_clock(data), 0);
  EXPECT_NEAR(double(clock.now_ns()), 1.06e12, 5e6);
  // A wall clock that went back does not take guest time with it.
  data.realtime = clock_ns(CLOCK_REALTIME) + 60'000'000'000;
  EXPECT_EQ(clock.set_clock(data), 0);
  EXPECT_NEAR(double(clock.now_ns()), 1e12, 5e6);

  data.flags = 1;
  EXPECT_EQ(clock.set_clock(data), -EINVAL);
}

TEST_F(Pv, TscsOfAVmStartTogether) {
  sleep_ms(2);
  Vcpu second{clock};
  EXPECT_EQ(v.cpu.state.tsc_offset, second.cpu.state.tsc_offset);
  EXPECT_EQ(clock.stable(), os::host_tsc_is_invariant());
  EXPECT_LT(v.cpu.tsc(), u64(os::host_tsc_khz()) * 10'000);

  // The client restores both, not at the same instant.
  v.pv.write_msr(0x10, 1ull << 45, Initiator::host);
  EXPECT_FALSE(clock.stable());
  sleep_ms(2);
  second.pv.write_msr(0x10, (1ull << 45) + 1000, Initiator::host);
  EXPECT_EQ(v.cpu.state.tsc_offset, second.cpu.state.tsc_offset);
  EXPECT_EQ(clock.stable(), os::host_tsc_is_invariant());

  // Far apart is meant.
  second.pv.write_msr(0x10, 1ull << 46, Initiator::host);
  EXPECT_NE(v.cpu.state.tsc_offset, second.cpu.state.tsc_offset);
  EXPECT_FALSE(clock.stable());
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  EXPECT_EQ(page().flags, 0);
}

TEST_F(Pv, StableAgainWhenTheOddOneLeaves) {
  {
    Vcpu second{clock};
    second.pv.write_msr(0x10, 1ull << 50, Initiator::host);
    v.pv.write_msr(0x10, 1ull << 50, Initiator::host);
    EXPECT_EQ(clock.stable(), os::host_tsc_is_invariant());
  }
  EXPECT_EQ(clock.stable(), os::host_tsc_is_invariant());
}

TEST_F(Pv, StealTimeMarksABlockedVcpu) {
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_STEAL_TIME, 0x4002 | 1, Initiator::guest), MsrResult::gp);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_STEAL_TIME, 0x4041, Initiator::guest), MsrResult::ok);
  v.pv.on_enter();
  auto state = [&] { return v.machine.get<kvm_steal_time>(0x4040); };
  EXPECT_EQ(state().preempted, 0);
  v.pv.on_block();
  EXPECT_EQ(state().preempted, KVM_VCPU_PREEMPTED);
  v.machine.put<u8>(0x4040 + offsetof(kvm_steal_time, preempted), KVM_VCPU_PREEMPTED | KVM_VCPU_FLUSH_TLB);
  v.pv.on_enter();
  EXPECT_EQ(state().preempted, 0);
}

TEST_F(Pv, StealTimeCountsWhatTheThreadDidNotGet) {
  os::TimerQueue timers;
  os::RunDelay delay(timers);
  v.pv.set_run_delay(delay);
  v.pv.write_msr(MSR_KVM_STEAL_TIME, 0x4041, Initiator::guest);
  auto state = [&] { return v.machine.get<kvm_steal_time>(0x4040); };
  auto enter = [&] { v.pv.on_enter(); };
  u64 waited = 0;
  const u64 deadline = os::monotonic_ns() + 5'000'000'000;
  while (!delay.read(waited) && os::monotonic_ns() < deadline) sleep_ms(1);
  enter();
  sleep_ms(1);
  enter();
  const u64 before = state().steal;
  const u32 version = state().version;
  test::wait_for_cpu(20'000'000);
  enter();
  EXPECT_GE(state().steal, before + 20'000'000);
  EXPECT_EQ(state().version & 1, 0u);
  EXPECT_GT(state().version, version);

  const u64 robbed = state().steal;
  sleep_ms(100);  // by its own wish
  enter();
  EXPECT_LT(state().steal, robbed + 90'000'000);
}

TEST_F(Pv, PvEoiNeedsAlignedRam) {
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_PV_EOI_EN, 0x5003, Initiator::guest), MsrResult::gp);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_PV_EOI_EN, 1ull << 40 | 1, Initiator::guest), MsrResult::gp);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_PV_EOI_EN, 0x5005, Initiator::guest), MsrResult::ok);
  u64 value;
  EXPECT_EQ(v.pv.read_msr(MSR_KVM_PV_EOI_EN, value, Initiator::guest), MsrResult::ok);
  EXPECT_EQ(value, 0x5005u);
}

TEST_F(Pv, AsyncPageFaultsAreTakenAtTheirWord) {
  const auto write = [&](u32 index, u64 value) { return v.pv.write_msr(index, value, Initiator::guest); };
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_EN, 0), MsrResult::ok);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_EN, 0x5001), MsrResult::gp) << "without a local APIC";
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_INT, 0xf3), MsrResult::gp);
  os::TimerQueue timers;
  irqchip::ApicBus bus;
  irqchip::LocalApic apic{0, v, bus, timers, true};
  v.pv.set_local_apic(apic, bus);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_EN, 0x5011), MsrResult::gp);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_EN, 1ull << 40 | 9), MsrResult::gp) << "no RAM";
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_EN, 0x5009), MsrResult::ok);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_INT, 0x1f3), MsrResult::gp);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_INT, 0xf3), MsrResult::ok);
  EXPECT_EQ(write(MSR_KVM_ASYNC_PF_ACK, 1), MsrResult::ok);
  const auto read = [&](u32 index) {
    u64 value = ~0ull;
    EXPECT_EQ(v.pv.read_msr(index, value, Initiator::guest), MsrResult::ok);
    return value;
  };
  EXPECT_EQ(read(MSR_KVM_ASYNC_PF_EN), 0x5009u);
  EXPECT_EQ(read(MSR_KVM_ASYNC_PF_INT), 0xf3u);
  EXPECT_EQ(read(MSR_KVM_ASYNC_PF_ACK), 0u);
}

TEST_F(Pv, PollControl) {
  u64 value;
  EXPECT_EQ(v.pv.read_msr(MSR_KVM_POLL_CONTROL, value, Initiator::guest), MsrResult::ok);
  EXPECT_EQ(value, 1u);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_POLL_CONTROL, 2, Initiator::guest), MsrResult::gp);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_POLL_CONTROL, 0, Initiator::guest), MsrResult::ok);
}

TEST_F(Pv, ListedMsrsAreReadable) {
  for (u32 index : x86::msr_index_list()) {
    u64 value = 0;
    EXPECT_TRUE(v.pv.read_msr(index, value, Initiator::host) == MsrResult::ok ||
                x86::get_msr(v.cpu, index, value, Initiator::host))
        << std::hex << index;
  }
}

TEST_F(Pv, EnforcedFeaturesHideMsrs) {
  u64 value;
  const kvm_cpuid_entry2 leaves[] = {{0x40000000, 0, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d, {}},
                                     {0x40000001, 0, 0, 1u << KVM_FEATURE_CLOCKSOURCE2, 0, 0, 0, {}}};
  ASSERT_EQ(v.cpu.cpuid.set(leaves), 0);
  EXPECT_EQ(v.pv.read_msr(MSR_KVM_STEAL_TIME, value, Initiator::guest), MsrResult::ok);
  v.pv.enforce_features(true);
  EXPECT_EQ(v.pv.read_msr(MSR_KVM_STEAL_TIME, value, Initiator::guest), MsrResult::not_mine);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_SYSTEM_TIME, 0x1001, Initiator::guest), MsrResult::not_mine);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest), MsrResult::ok);
}

TEST_F(Pv, HypercallErrors) {
  v.cpu.state.code_bits = 64;
  EXPECT_EQ(s64(v.hypercall(999)), -KVM_ENOSYS);
  EXPECT_EQ(v.hypercall(KVM_HC_VAPIC_POLL_IRQ), 0u);
  EXPECT_EQ(s64(v.hypercall(KVM_HC_SEND_IPI, 1)), -KVM_EOPNOTSUPP);
  EXPECT_EQ(s64(v.hypercall(1ull << 32 | KVM_HC_VAPIC_POLL_IRQ)), -KVM_ENOSYS);
  v.cpu.state.cpl = 3;
  EXPECT_EQ(s64(v.hypercall(KVM_HC_VAPIC_POLL_IRQ)), -KVM_EPERM);
  // 32-bit code sees and gives 32 bits.
  v.cpu.state.cpl = 0;
  v.cpu.state.code_bits = 32;
  EXPECT_EQ(v.hypercall(1ull << 32 | KVM_HC_VAPIC_POLL_IRQ), 0u);
  EXPECT_EQ(v.hypercall(999), u64(u32(-KVM_ENOSYS)));
}

TEST_F(Pv, MapGpaRangeGoesToTheClient) {
  v.cpu.state.code_bits = 64;
  u64* gpr = v.cpu.state.gpr;
  gpr[x86::rax] = KVM_HC_MAP_GPA_RANGE, gpr[x86::rbx] = 0x1000, gpr[x86::rcx] = 1;
  EXPECT_EQ(v.pv.hypercall(), x86::Result::ok);
  EXPECT_EQ(s64(gpr[x86::rax]), -KVM_ENOSYS);
  gpr[x86::rax] = KVM_HC_MAP_GPA_RANGE;
  EXPECT_EQ(v.pv.hypercall(1u << KVM_HC_MAP_GPA_RANGE), x86::Result::exit);
  EXPECT_EQ(v.cpu.exit.kind, x86::ExitKind::hypercall);
  gpr[x86::rbx] = 0x1001;
  EXPECT_EQ(v.pv.hypercall(1u << KVM_HC_MAP_GPA_RANGE), x86::Result::ok);
  EXPECT_EQ(s64(gpr[x86::rax]), -KVM_EINVAL);
}

TEST_F(Pv, ClockPairing) {
  if (clock.drifts()) GTEST_SKIP();
  v.cpu.state.code_bits = 64;
  EXPECT_EQ(v.hypercall(KVM_HC_CLOCK_PAIRING, 0x6fe0, 0), 0u);  // across two pages
  const auto pair = v.machine.get<kvm_clock_pairing>(0x6fe0);
  EXPECT_LE(pair.tsc, v.cpu.tsc());
  EXPECT_NEAR(double(pair.sec) * 1e9 + double(pair.nsec), double(clock_ns(CLOCK_REALTIME)), 5e6);
  EXPECT_EQ(s64(v.hypercall(KVM_HC_CLOCK_PAIRING, 0x6000, 1)), -KVM_EOPNOTSUPP);
  EXPECT_EQ(s64(v.hypercall(KVM_HC_CLOCK_PAIRING, 1ull << 40, 0)), -KVM_EFAULT);
}

TEST_F(Pv, IpisByHypercall) {
  os::TimerQueue timers;
  irqchip::ApicBus bus;
  Vcpu second{clock};
  irqchip::LocalApic apic0{0, v, bus, timers, true}, apic1{1, second, bus, timers, false};
  v.pv.set_local_apic(apic0, bus);
  v.cpu.state.code_bits = 64;
  for (irqchip::LocalApic* apic : {&apic0, &apic1}) {
    const u32 svr = 0x1ff;
    apic->mmio_write(0xf0, &svr, 4);
  }
  EXPECT_EQ(v.hypercall(KVM_HC_SEND_IPI, 3, 0, 0, 0x41), 2u);
  EXPECT_EQ(apic0.pending(), 0x41);
  EXPECT_EQ(apic1.pending(), 0x41);
  EXPECT_EQ(v.hypercall(KVM_HC_SEND_IPI, 1, 0, 1, 0x52), 1u);
  EXPECT_EQ(apic1.pending(), 0x52);
  EXPECT_EQ(apic0.pending(), 0x41);
  EXPECT_EQ(s64(v.hypercall(KVM_HC_SEND_IPI, 1, 0, 1, 0x852)), -KVM_EINVAL);
  EXPECT_EQ(v.hypercall(KVM_HC_KICK_CPU, 0, 1), 0u);
  EXPECT_EQ(second.unhalts, 1);
  EXPECT_EQ(v.unhalts, 0);
}

TEST_F(Pv, EoiByAStore) {
  os::TimerQueue timers;
  irqchip::ApicBus bus;
  irqchip::LocalApic apic{0, v, bus, timers, true};
  v.pv.set_local_apic(apic, bus);
  const u32 svr = 0x1ff;
  apic.mmio_write(0xf0, &svr, 4);
  EXPECT_EQ(v.pv.write_msr(MSR_KVM_PV_EOI_EN, 0x5001, Initiator::guest), MsrResult::ok);
  auto flag = [&] { return v.machine.get<u8>(0x5000); };
  auto in_service = [&] {
    u32 isr = 0;
    apic.mmio_read(0x120, &isr, 4);  // vectors 64 - 95
    return isr;
  };
  apic.accept({.vector = 0x41});
  EXPECT_EQ(apic.acknowledge(), 0x41);
  EXPECT_EQ(flag(), 1);
  v.machine.put<u8>(0x5000, 0);  // the guest's EOI
  EXPECT_EQ(in_service(), 0u);

  // Not used: the offer is gone once the APIC is looked at, and the guest writes EOI.
  apic.accept({.vector = 0x42});
  EXPECT_EQ(apic.acknowledge(), 0x42);
  EXPECT_EQ(flag(), 1);
  EXPECT_EQ(in_service(), 4u);
  EXPECT_EQ(flag(), 0);
  const u32 eoi = 0;
  apic.mmio_write(0xb0, &eoi, 4);
  EXPECT_EQ(in_service(), 0u);

  v.pv.write_msr(MSR_KVM_PV_EOI_EN, 0, Initiator::guest);
  apic.accept({.vector = 0x43});
  EXPECT_EQ(apic.acknowledge(), 0x43);
  EXPECT_EQ(flag(), 0);
}

TEST_F(Pv, ReadersNeverSeeHalfAnUpdate) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the protocol is a data race by design: version, data, version";
#endif
  v.pv.write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0x1001, Initiator::guest);
  const auto* shared = reinterpret_cast<const volatile ClockPage*>(v.machine.base + 0x1000);
  std::atomic<bool> done{false};
  u64 torn = 0, last_tsc = 0, last_ns = 0;
  // Another vCPU's reader: what it takes under one even version belongs together.
  std::thread reader([&] {
    while (!done) {
      const u32 before = shared->version;
      __asm__ volatile("" ::: "memory");
      const u64 tsc = shared->tsc_timestamp, ns = shared->system_time;
      __asm__ volatile("" ::: "memory");
      if (before & 1 || before != shared->version) continue;
      // set_clock below moves guest time forward, and the TSC goes forward by itself: never one without the other. The
      // clock is older than the guest's TSC: the first page is from before its 0.
      torn += ns > last_ns && s64(tsc - last_tsc) < 0;
      last_tsc = tsc, last_ns = ns;
    }
  });
  for (u64 i = 1; i < 20'000; ++i) {
    kvm_clock_data data{};
    data.clock = i * 1'000'000'000'000;
    ASSERT_EQ(clock.set_clock(data), 0);
    v.pv.on_enter();
  }
  done = true;
  reader.join();
  EXPECT_EQ(torn, 0u);
  EXPECT_EQ(page().version & 1, 0u);
}

}  // namespace
}  // namespace anykvm::paravirt
