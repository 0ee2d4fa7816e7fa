// FXSAVE and XSAVE in every form, byte for byte against the host CPU's own instructions; restores' #GP rules; the
// images that clients see.
#include "x86/xsave.h"

#include <cpuid.h>
#include <gtest/gtest.h>

#include <random>

#include "anykvm/kvm.h"
#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

struct alignas(64) Area {
  u8 bytes[4096];
};

u64 host_xcr0() {
  u32 eax, edx;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax | u64(edx) << 32) & xsave_layout().supported;
}

bool host_has(unsigned bit) {
  u32 eax = 0, ebx, ecx, edx;
  __get_cpuid_count(0xd, 1, &eax, &ebx, &ecx, &edx);
  return eax >> bit & 1;
}

// Loads `in` with one of the host's restores, runs one of its saves into `out`, and puts the test's own registers back:
// all in one statement, so that the compiler's registers are never seen changed.
#define HOST_RUN(restore, save)                                                                                       \
  do {                                                                                                                \
    static Area own;                                                                                                  \
    const u32 all_low = u32(own_mask), all_high = u32(own_mask >> 32);                                                \
    asm volatile(                                                                                                     \
        "mov %[al], %%eax; mov %[ah], %%edx; xsave64 (%[own])\n\t"                                                    \
        "mov %[rl], %%eax; mov %[rh], %%edx; " restore                                                                \
        " (%[in])\n\t"                                                                                                \
        "mov %[ml], %%eax; mov %[mh], %%edx; " save                                                                   \
        " (%[out])\n\t"                                                                                               \
        "mov %[al], %%eax; mov %[ah], %%edx; xrstor64 (%[own])"                                                       \
        :                                                                                                             \
        : [own] "r"(&own), [in] "r"(&in), [out] "r"(&out), [al] "m"(all_low), [ah] "m"(all_high), [rl] "m"(load_low), \
          [rh] "m"(load_high), [ml] "m"(save_low), [mh] "m"(save_high)                                                \
        : "eax", "edx", "memory");                                                                                    \
  } while (0)

enum class Form { xsave, xsaveopt, xsavec, fxsave };

void host_run_once(const Area& in, Area& out, u64 load_mask, u64 save_mask, Form form) {
  const u64 own_mask = host_xcr0();
  const u32 load_low = u32(load_mask), load_high = u32(load_mask >> 32), save_low = u32(save_mask),
            save_high = u32(save_mask >> 32);
  switch (form) {
    case Form::xsave: HOST_RUN("xrstor64", "xsave64"); break;
    case Form::xsaveopt: HOST_RUN("xrstor64", "xsaveopt64"); break;
    case Form::xsavec: HOST_RUN("xrstor64", "xsavec64"); break;
    case Form::fxsave: HOST_RUN("fxrstor64", "fxsave64"); break;
  }
}

/// Until it gives the same twice running: when the host switches tasks between the two instructions, a component in its
/// initial state may come back as one in use.
void host_run(const Area& in, Area& out, u64 load_mask, u64 save_mask, Form form) {
  const Area before = out;
  host_run_once(in, out, load_mask, save_mask, form);
  for (unsigned attempt = 0; attempt < 100; ++attempt) {
    const Area last = out;
    out = before;
    host_run_once(in, out, load_mask, save_mask, form);
    if (!std::memcmp(out.bytes, last.bytes, sizeof out.bytes)) return;
  }
  FAIL() << "the host's XSAVE never gives the same twice";
}

class XsaveArea : public testing::Test, public LongMode {
 protected:
  static constexpr Gva in_gva = 0x40'0000'0000, out_gva = 0x40'0000'2000;
  static constexpr Gpa in_gpa = 0xa0000, out_gpa = 0xb0000;
  std::mt19937_64 random{42};
  const XsaveLayout& layout = xsave_layout();

  XsaveArea() {
    map(in_gva, in_gpa, pte::p | pte::w);
    map(out_gva, out_gpa, pte::p | pte::w);
    cpu.state.xcr0 = host_xcr0();
  }

  /// A standard-format area with random contents in the components of `features`.
  Area random_area(u64 features) {
    Area area;
    for (u8& byte : area.bytes) byte = u8(random());
    auto put = [&](unsigned offset, auto value) { std::memcpy(area.bytes + offset, &value, sizeof value); };
    std::memset(area.bytes, 0, 32);
    put(0, u16(0x37f));
    put(2, u16(random() & 0x7f00));  // TOP and condition codes; no pending exception
    put(4, u8(random()));
    // FOP, FIP and FDP stay 0: without a pending exception AMD's CPUs forget them.
    put(24, u32(0x1f80 ^ (random() & 0x603f)));
    for (unsigned i = 0; i < 8; ++i) std::memset(area.bytes + 32 + 16 * i + 10, 0, 6);
    std::memset(area.bytes + 416, 0, 96);
    std::memset(area.bytes + 512, 0, 64);
    put(512, features);
    return area;
  }
  void to_guest(Gpa gpa, const Area& area) { std::memcpy(machine.base + gpa, area.bytes, sizeof area.bytes); }
  void compare(const Area& host, const char* what) {
    for (unsigned i = 0; i < sizeof host.bytes; ++i) {
      ASSERT_EQ(machine.get<u8>(out_gpa + i), host.bytes[i]) << what << ", byte " << i;
    }
  }
};

TEST_F(XsaveArea, EveryFormMatchesTheHost) {
  const u64 all = host_xcr0();
  for (int i = 0; i < 400; ++i) {
    const u64 features = random() & all, save = random();
    const Form form = Form(random() % 3);
    if ((form == Form::xsaveopt && !host_has(0)) || (form == Form::xsavec && !host_has(1))) continue;
    const Area area = random_area(features);
    Area out;
    std::memset(out.bytes, 0xcc, sizeof out.bytes);
    std::memset(out.bytes + 512, 0, 64);
    to_guest(in_gpa, area);
    to_guest(out_gpa, out);

    ASSERT_EQ(cpu.xrstor(in_gva, all, false, true), Result::ok);
    host_run(area, out, all, save, form);
    const auto guest_form = form == Form::xsave      ? Cpu::Xsave::xsave
                            : form == Form::xsaveopt ? Cpu::Xsave::xsaveopt
                                                     : Cpu::Xsave::xsavec;
    ASSERT_EQ(cpu.xsave(out_gva, save, guest_form, true), Result::ok);
    compare(out, form == Form::xsave ? "xsave" : form == Form::xsaveopt ? "xsaveopt" : "xsavec");
    if (HasFatalFailure()) {
      FAIL() << "features " << features << " saved " << (save & all) << " round " << i;
    }
  }
}

TEST_F(XsaveArea, CompactedAreasComeBack) {
  if (!host_has(1)) GTEST_SKIP();
  const u64 all = host_xcr0();
  for (int i = 0; i < 100; ++i) {
    const Area area = random_area(random() & all);
    Area compacted = {}, again = {};
    host_run(area, compacted, all, random(), Form::xsavec);
    host_run(compacted, again, all, all, Form::xsave);
    to_guest(in_gpa, compacted);
    to_guest(out_gpa, Area{});
    ASSERT_EQ(cpu.xrstor(in_gva, all, false, true), Result::ok);
    ASSERT_EQ(cpu.xsave(out_gva, all, Cpu::Xsave::xsave, true), Result::ok);
    compare(again, "xrstor of a compacted area");
    if (HasFatalFailure()) FAIL() << i;
  }
}

TEST_F(XsaveArea, FxsaveMatchesTheHost) {
  for (int i = 0; i < 100; ++i) {
    const Area area = random_area(0);
    Area out;
    std::memset(out.bytes, 0xcc, sizeof out.bytes);
    to_guest(in_gpa, area);
    to_guest(out_gpa, out);
    host_run(area, out, 0, 0, Form::fxsave);
    ASSERT_EQ(cpu.fxrstor(in_gva, true), Result::ok);
    ASSERT_EQ(cpu.fxsave(out_gva, true), Result::ok);
    for (unsigned b = 0; b < 416; ++b) {
      ASSERT_EQ(machine.get<u8>(out_gpa + b), out.bytes[b]) << "byte " << b;
    }
    for (unsigned b = 464; b < 512; ++b) ASSERT_EQ(machine.get<u8>(out_gpa + b), 0xcc) << "software's bytes";
  }
}

TEST_F(XsaveArea, LoadedControlAndStatusWordsAreTheHosts) {
  Area area = random_area(0);
  for (int i = 0; i < 200; ++i) {
    const u16 words[] = {u16(random()), u16(random())};
    std::memcpy(area.bytes, words, sizeof words);
    Area out;
    host_run(area, out, 0, 0, Form::fxsave);
    to_guest(in_gpa, area);
    ASSERT_EQ(cpu.fxrstor(in_gva, true), Result::ok);
    EXPECT_EQ(std::memcmp(cpu.state.fpu.x87, out.bytes, 4), 0) << std::hex << words[0] << ' ' << words[1];
    kvm_fpu legacy{};
    legacy.fcw = words[0];
    legacy.fsw = words[1];
    FpuState fpu;
    kvm_to_fpu(fpu, legacy);
    EXPECT_EQ(std::memcmp(fpu.x87, out.bytes, 4), 0) << std::hex << words[0] << ' ' << words[1];
  }
}

TEST_F(XsaveArea, RestoresRefuseBadHeaders) {
  const u64 all = cpu.state.xcr0;
  auto refused = [&](unsigned offset, u64 value, bool supervisor = false) {
    Area area = random_area(3);
    std::memcpy(area.bytes + offset, &value, 8);
    to_guest(in_gpa, area);
    const FpuState before = cpu.state.fpu;
    EXPECT_EQ(cpu.xrstor(in_gva, all, supervisor, true), Result::fault) << offset;
    EXPECT_EQ(cpu.fault.vector, exception::gp);
    EXPECT_EQ(std::memcmp(&before, &cpu.state.fpu, sizeof before), 0) << "nothing has changed";
  };
  refused(512, 1ull << 62);      // not enabled in XCR0
  refused(520, 1);               // XCOMP_BV of a standard area
  refused(528, 1);               // reserved
  refused(24, 1ull << 31);       // MXCSR
  refused(520, 1ull << 63 | 1);  // XSTATE_BV has more than XCOMP_BV
  refused(520, 1ull << 63 | 1ull << 40 | 3);
  refused(0, 0x37f, true);  // XRSTORS takes compacted areas only
}

TEST_F(XsaveArea, ASaveAcrossAnAbsentPageWritesNothing) {
  const Gva gva = out_gva + 4096 - 128;
  map(out_gva + 0x1000, 0, 0);
  std::memset(machine.base + out_gpa, 0xcc, 4096);
  EXPECT_EQ(cpu.fxsave(gva, true), Result::fault);
  EXPECT_EQ(cpu.fault.payload, out_gva + 0x1000);
  EXPECT_EQ(machine.get<u64>(out_gpa + 4096 - 128), 0xccccccccccccccccu);
}

TEST_F(XsaveArea, ClientImagesComeBack) {
  const u64 all = host_xcr0();
  for (int i = 0; i < 50; ++i) {
    const Area area = random_area(random() & all);
    FpuState fpu, again;
    ASSERT_TRUE(xsave_to_fpu(fpu, all, area.bytes));
    Area image;
    fpu_to_xsave(fpu, all, image.bytes);
    ASSERT_TRUE(xsave_to_fpu(again, all, image.bytes));
    EXPECT_EQ(std::memcmp(fpu.vector, again.vector, sizeof fpu.vector), 0);
    EXPECT_EQ(std::memcmp(fpu.x87, again.x87, sizeof fpu.x87), 0);
    EXPECT_EQ(fpu.mxcsr, again.mxcsr);
    kvm_fpu legacy;
    fpu_to_kvm(fpu, legacy);
    FpuState third = fpu;
    std::memset(third.x87, 0xff, 24);
    std::memset(third.x87 + 32, 0xff, 128);
    kvm_to_fpu(third, legacy);
    EXPECT_EQ(std::memcmp(fpu.x87, third.x87, sizeof fpu.x87), 0);
    EXPECT_EQ(third.mxcsr, fpu.mxcsr);
  }
  Area bad = random_area(1ull << 60);
  FpuState fpu;
  EXPECT_FALSE(xsave_to_fpu(fpu, all, bad.bytes));
  bad = random_area(3);
  bad.bytes[27] = 0x80;
  EXPECT_FALSE(xsave_to_fpu(fpu, all, bad.bytes));
}

TEST(XsaveLayoutTable, SizesAreTheHosts) {
  const XsaveLayout& layout = xsave_layout();
  u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(0xd, 0, &eax, &ebx, &ecx, &edx);
  if (host_xcr0() == (eax | u64(edx) << 32)) {
    EXPECT_EQ(layout.standard_size(host_xcr0()), ebx);
  }
  EXPECT_EQ(layout.standard_size(3), 576u);
  EXPECT_EQ(layout.standard_size(7), 832u);
  EXPECT_EQ(layout.compacted_size(7), 832u);
}

}  // namespace
}  // namespace anykvm::x86
