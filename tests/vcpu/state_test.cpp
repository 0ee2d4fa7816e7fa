// The state ioctls: what is set comes back, and what the kernel refuses is refused and changes nothing.
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

using State = TestMachine;

TEST_F(State, Registers) {
  auto& vcpu = add_vcpu();
  EXPECT_EQ(regs().rip, 0xfff0u);
  kvm_regs set;
  u64* words = reinterpret_cast<u64*>(&set);
  for (unsigned i = 0; i < sizeof set / 8; ++i) words[i] = 0x1111111111111111ull * (i + 1);
  set.rflags = 0xad7;
  ASSERT_EQ(vcpu.set_regs(set), 0);
  const kvm_regs got = regs();
  EXPECT_EQ(std::memcmp(&set, &got, sizeof set), 0);
}

TEST_F(State, SpecialRegisters) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0xf4});
  kvm_sregs set, got;
  ASSERT_EQ(vcpu.get_sregs(set), 0);
  set.fs.base = 0x7f0000001000;
  set.gs.base = 0xffff888000000000;
  set.tr = {.base = 0x5000, .limit = 0x67, .selector = 0x28, .type = 11, .present = 1};
  set.ldt.unusable = 1;
  set.ldt.present = 0;
  set.cr2 = 0xdeadbeef000;
  set.cr8 = 5;
  set.interrupt_bitmap[1] = 1ull << 3;
  ASSERT_EQ(vcpu.set_sregs(set), 0);
  ASSERT_EQ(vcpu.get_sregs(got), 0);
  EXPECT_EQ(std::memcmp(&set, &got, sizeof set), 0);
  kvm_vcpu_events events;
  ASSERT_EQ(vcpu.get_vcpu_events(events), 0);
  EXPECT_EQ(events.interrupt.injected, 1);
  EXPECT_EQ(events.interrupt.nr, 67);
}

TEST_F(State, InvalidSpecialRegisters) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0xf4});
  kvm_sregs good, got;
  ASSERT_EQ(vcpu.get_sregs(good), 0);
  const auto refused = [&](auto change, const char* why) {
    kvm_sregs bad = good;
    change(bad);
    EXPECT_EQ(vcpu.set_sregs(bad), -EINVAL) << why;
    ASSERT_EQ(vcpu.get_sregs(got), 0);
    EXPECT_EQ(std::memcmp(&good, &got, sizeof good), 0) << why;
  };
  refused([](auto& s) { s.cr4 &= ~0x20ull; }, "long mode without PAE");
  refused([](auto& s) { s.efer &= ~0x400ull; }, "LME and paging, but not LMA");
  refused([](auto& s) { s.cr0 &= ~0x80000000ull; }, "LMA without paging");
  refused([](auto& s) { s.cr0 &= ~1ull; }, "paging without protection");
  refused([](auto& s) { s.cr0 |= 1ull << 29; }, "NW without CD");
  refused([](auto& s) { s.cr0 |= 1ull << 32; }, "CR0 has 32 bits");
  refused([](auto& s) { s.cr4 |= 1ull << 31; }, "reserved in CR4");
  refused([](auto& s) { s.cr3 |= 1ull << 60; }, "reserved in CR3");
  kvm_sregs real = good;
  real.cr0 = 0x60000010;
  real.cr4 = real.efer = 0;
  EXPECT_EQ(vcpu.set_sregs(real), -EINVAL) << "64-bit code outside long mode";
}

TEST_F(State, SpecialRegisters2) {
  auto& vcpu = add_vcpu();
  kvm_sregs2 sregs;
  ASSERT_EQ(vcpu.get_sregs2(sregs), 0);
  EXPECT_EQ(sregs.flags, 0u);
  sregs.flags = 2;
  EXPECT_EQ(vcpu.set_sregs2(sregs), -EINVAL);
  sregs.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
  EXPECT_EQ(vcpu.set_sregs2(sregs), -EINVAL) << "not PAE paging";
  sregs.cr0 = 0x80000011;
  sregs.cr4 = 0x20;
  sregs.cr3 = 0x4000;
  for (u64 i = 0; i < 4; ++i) sregs.pdptrs[i] = (i + 5) << 12 | 1;
  ASSERT_EQ(vcpu.set_sregs2(sregs), 0);
  kvm_sregs2 got;
  ASSERT_EQ(vcpu.get_sregs2(got), 0);
  EXPECT_EQ(got.flags, static_cast<u64>(KVM_SREGS2_FLAGS_PDPTRS_VALID));
  EXPECT_EQ(std::memcmp(got.pdptrs, sregs.pdptrs, sizeof got.pdptrs), 0);
}

TEST_F(State, DebugRegisters) {
  auto& vcpu = add_vcpu();
  kvm_debugregs set{.db = {1, 2, 3, 4}, .dr6 = 0xffff0ff1, .dr7 = 0x401}, got;
  ASSERT_EQ(vcpu.set_debugregs(set), 0);
  ASSERT_EQ(vcpu.get_debugregs(got), 0);
  EXPECT_EQ(std::memcmp(&set, &got, sizeof set), 0);
  set.flags = 1;
  EXPECT_EQ(vcpu.set_debugregs(set), -EINVAL);
  set.flags = 0;
  set.dr6 = 1ull << 32;
  EXPECT_EQ(vcpu.set_debugregs(set), -EINVAL);
  set.dr6 = 0;
  set.dr7 = 1ull << 32;
  EXPECT_EQ(vcpu.set_debugregs(set), -EINVAL);
}

TEST_F(State, Fpu) {
  auto& vcpu = add_vcpu();
  kvm_fpu set{}, got;
  for (unsigned i = 0; i < sizeof set.xmm; ++i) reinterpret_cast<u8*>(set.xmm)[i] = static_cast<u8>(i);
  for (auto& st : set.fpr) std::memset(st, 0x3c, 10);
  set.fcw = 0x27f;
  set.fsw = 0x3800;
  set.ftwx = 0x80;
  set.mxcsr = 0x1f80;
  ASSERT_EQ(vcpu.set_fpu(set), 0);
  ASSERT_EQ(vcpu.get_fpu(got), 0);
  EXPECT_EQ(std::memcmp(set.xmm, got.xmm, sizeof set.xmm), 0);
  EXPECT_EQ(std::memcmp(set.fpr, got.fpr, sizeof set.fpr), 0);
  EXPECT_EQ(got.fcw, set.fcw);
  EXPECT_EQ(got.fsw, set.fsw);
  EXPECT_EQ(got.ftwx, set.ftwx);
}

TEST_F(State, Xsave) {
  auto& vcpu = add_vcpu();
  std::vector<u8> area(4096), got(4096);
  ASSERT_EQ(vcpu.get_xsave2(area), 0);
  area[160] = 0x5a;  // xmm0
  area[512] |= 2;    // XSTATE_BV: SSE
  area[24] = 0x80, area[25] = 0x1f;
  ASSERT_EQ(vcpu.set_xsave(std::span<const u8>(area)), 0);
  ASSERT_EQ(vcpu.get_xsave2(got), 0);
  EXPECT_EQ(got[160], 0x5a);
  const auto refused = [&](size_t offset, u8 bits, const char* why) {
    std::vector<u8> bad = area;
    bad[offset] |= bits;
    EXPECT_EQ(vcpu.set_xsave(std::span<const u8>(bad)), -EINVAL) << why;
  };
  refused(519, 0x40, "unknown component");
  refused(527, 0x80, "compacted");
  refused(540, 1, "reserved in the header");
  refused(27, 1, "reserved in MXCSR");
}

TEST_F(State, Xcrs) {
  auto& vcpu = add_vcpu();
  ASSERT_EQ(vcpu.set_cpuid2(x86::supported_cpuid()), 0);
  kvm_xcrs xcrs;
  ASSERT_EQ(vcpu.get_xcrs(xcrs), 0);
  EXPECT_EQ(xcrs.nr_xcrs, 1u);
  EXPECT_EQ(xcrs.xcrs[0].value, 1u);
  xcrs.xcrs[0].value = 3;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), 0);
  xcrs.xcrs[0].value = 2;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), -EINVAL) << "without x87";
  xcrs.xcrs[0].value = 5;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), -EINVAL) << "AVX without SSE";
  xcrs.xcrs[0].value = 1ull << 62 | 1;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), -EINVAL);
  xcrs.xcrs[0].value = 3;
  xcrs.flags = 1;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), -EINVAL);
  xcrs.flags = 0;
  xcrs.nr_xcrs = KVM_MAX_XCRS + 1;
  EXPECT_EQ(vcpu.set_xcrs(xcrs), -EINVAL);
  ASSERT_EQ(vcpu.get_xcrs(xcrs), 0);
  EXPECT_EQ(xcrs.xcrs[0].value, 3u);
}

TEST_F(State, MsrsUpToTheFirstThatIsUnknown) {
  auto& vcpu = add_vcpu();
  ASSERT_EQ(vcpu.set_cpuid2(x86::supported_cpuid()), 0);
  kvm_msr_entry set[] = {{.index = 0xc0000082, .data = 0xffffffff81000000},  // LSTAR
                         {.index = 0x277, .data = 0x0007010600070106},       // PAT
                         {.index = 0xdeadbeef, .data = 1},
                         {.index = 0xc0000081, .data = 2}};
  EXPECT_EQ(vcpu.set_msrs(set), 2);
  kvm_msr_entry got[] = {{.index = 0x277}, {.index = 0xc0000082}, {.index = 0xc0000081}, {.index = 0xdeadbeef}};
  EXPECT_EQ(vcpu.get_msrs(got), 3);
  EXPECT_EQ(got[0].data, 0x0007010600070106u);
  EXPECT_EQ(got[1].data, 0xffffffff81000000u);
  EXPECT_EQ(got[2].data, 0u);
}

TEST_F(State, Cpuid) {
  auto& vcpu = add_vcpu();
  ASSERT_EQ(vcpu.set_cpuid2(x86::supported_cpuid()), 0);
  std::vector<kvm_cpuid_entry2> entries(1);
  u32 count = 1;
  EXPECT_EQ(vcpu.get_cpuid2(entries, count), -E2BIG);
  EXPECT_EQ(count, x86::supported_cpuid().size());
  entries.resize(count);
  ASSERT_EQ(vcpu.get_cpuid2(entries, count), 0);
  std::vector<kvm_cpuid_entry2> many(257);
  EXPECT_EQ(vcpu.set_cpuid2(many), -E2BIG);

  start_real_mode(vcpu, {0xf4});  // hlt
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(vcpu.set_cpuid2(entries), 0) << "the same, after it has run";
  entries[1].eax ^= 0x10;
  EXPECT_EQ(vcpu.set_cpuid2(entries), -EINVAL) << "another CPU, after it has run";
}

TEST_F(State, MpStateAndLapicNeedChips) {
  auto& vcpu = add_vcpu();
  kvm_mp_state state{KVM_MP_STATE_HALTED};
  kvm_lapic_state lapic{};
  EXPECT_EQ(vcpu.set_mp_state(state), -EINVAL);
  EXPECT_EQ(vcpu.get_lapic(lapic), -EINVAL);
  EXPECT_EQ(vcpu.set_lapic(lapic), -EINVAL);
  state.mp_state = KVM_MP_STATE_RUNNABLE;
  EXPECT_EQ(vcpu.set_mp_state(state), 0);
}

TEST_F(State, MpStateAndLapic) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  auto& vcpu = add_vcpu();
  for (u32 value :
       {KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_RUNNABLE}) {
    kvm_mp_state state{value};
    ASSERT_EQ(vcpu.set_mp_state(state), 0);
    ASSERT_EQ(vcpu.get_mp_state(state), 0);
    EXPECT_EQ(state.mp_state, value);
  }
  kvm_mp_state bad{77};
  EXPECT_EQ(vcpu.set_mp_state(bad), -EINVAL);
  kvm_lapic_state lapic;
  ASSERT_EQ(vcpu.get_lapic(lapic), 0);
  EXPECT_EQ(lapic.regs[0x30] & 0xff, 0x14);
  EXPECT_EQ(vcpu.set_lapic(lapic), 0);
}

TEST_F(State, Events) {
  auto& vcpu = add_vcpu();
  kvm_vcpu_events set{}, got;
  set.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
  set.exception = {.injected = 1, .nr = 13, .has_error_code = 1, .error_code = 0x18};
  set.interrupt.shadow = KVM_X86_SHADOW_INT_STI;
  set.nmi.pending = 1;
  set.nmi.masked = 1;
  ASSERT_EQ(vcpu.set_vcpu_events(set), 0);
  ASSERT_EQ(vcpu.get_vcpu_events(got), 0);
  EXPECT_EQ(got.exception.injected, 1);
  EXPECT_EQ(got.exception.nr, 13);
  EXPECT_EQ(got.exception.error_code, 0x18u);
  EXPECT_EQ(got.interrupt.shadow, KVM_X86_SHADOW_INT_STI);
  EXPECT_EQ(got.nmi.pending, 1);
  EXPECT_EQ(got.nmi.masked, 1);
}

TEST_F(State, Translate) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0xf4});
  kvm_translation translation{};
  translation.linear_address = 0x12345;
  ASSERT_EQ(vcpu.translate(translation), 0);
  EXPECT_EQ(translation.valid, 1);
  EXPECT_EQ(translation.physical_address, 0x12345u);
  translation.linear_address = 0x40000000;
  ASSERT_EQ(vcpu.translate(translation), 0);
  EXPECT_EQ(translation.valid, 0);
}

TEST_F(State, TscFrequency) {
  auto& vcpu = add_vcpu();
  const int host = vcpu.get_tsc_khz();
  EXPECT_EQ(machine->get_tsc_khz(), host);
  ASSERT_EQ(vcpu.set_tsc_khz(1'000'000), 0);
  EXPECT_EQ(vcpu.get_tsc_khz(), 1'000'000);
  ASSERT_EQ(vcpu.set_tsc_khz(0), 0);
  EXPECT_EQ(vcpu.get_tsc_khz(), host);
  ASSERT_EQ(machine->set_tsc_khz(2'000'000), 0);
  EXPECT_EQ(add_vcpu().get_tsc_khz(), 2'000'000);
}

}  // namespace
}  // namespace anykvm
