// The tables agree with themselves, with each other and with the page made from them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "abi/capabilities.h"
#include "abi/ioctl_table.h"
#include "abi/support_table.h"
#include "anykvm/kvm.h"

namespace anykvm::abi {
namespace {

TEST(IoctlTable, FindsEveryRowAndNothingElse) {
  for (const Ioctl& row : ioctls()) EXPECT_EQ(&row, find_ioctl(row.fd, row.number)) << row.name;
  for (const FdKind fd : {FdKind::system, FdKind::vm, FdKind::vcpu}) {
    EXPECT_EQ(nullptr, find_ioctl(fd, 0));
    EXPECT_EQ(nullptr, find_ioctl(fd, ~0u));
    EXPECT_EQ(nullptr, find_ioctl(fd, KVM_GET_REGS ^ 1u << 30));
  }
  EXPECT_EQ(nullptr, find_ioctl(FdKind::system, KVM_RUN));
  EXPECT_EQ(nullptr, find_ioctl(FdKind::vm, KVM_CREATE_VM));
}

TEST(IoctlTable, RowsKnowTheirArgument) {
  const Ioctl& regs = *find_ioctl(FdKind::vcpu, KVM_SET_REGS);
  EXPECT_EQ("kvm_regs", regs.type);
  EXPECT_EQ(sizeof(kvm_regs), regs.size);
  EXPECT_EQ(Argument::in, regs.argument);
  EXPECT_EQ(Argument::out, find_ioctl(FdKind::vcpu, KVM_GET_REGS)->argument);
  EXPECT_EQ(Argument::in_out, find_ioctl(FdKind::vcpu, KVM_TRANSLATE)->argument);
  EXPECT_EQ(Argument::value, find_ioctl(FdKind::vm, KVM_SET_TSS_ADDR)->argument);
  EXPECT_EQ(Argument::in_out, find_ioctl(FdKind::vm, KVM_GET_IRQCHIP)->argument);
}

TEST(IoctlTable, DirectionsAreThoseInTheNumber) {
  for (const Ioctl& row : ioctls()) {
    const bool in = row.argument == Argument::in || row.argument == Argument::in_out;
    const bool out = row.argument == Argument::out || row.argument == Argument::in_out;
    if (_IOC_DIR(row.number) == _IOC_NONE) continue;
    EXPECT_TRUE(in || out) << row.name;
    if (_IOC_DIR(row.number) == _IOC_WRITE) {
      EXPECT_TRUE(in) << row.name;
    }
    // These two numbers have said the opposite of what they do since the beginning.
    const bool wrong_way_round = row.number == KVM_SET_IRQCHIP || row.number == KVM_SET_PIT;
    if (_IOC_DIR(row.number) == _IOC_READ && !wrong_way_round) {
      EXPECT_TRUE(out) << row.name;
    }
  }
}

TEST(IoctlTable, EveryAnnouncingExtensionIsReported) {
  std::set<std::string_view> known;
  for (const Capability& row : capabilities())
    if (row.value() != 0) known.insert(row.name);
  for (const Ioctl& row : ioctls()) {
    if (!row.capability.empty()) {
      EXPECT_TRUE(known.contains(row.capability)) << row.name << " " << row.capability;
    }
  }
}

TEST(Capabilities, UnknownOnesAreZero) {
  EXPECT_EQ(0, capability_value(~0ull));
  EXPECT_EQ(0, capability_value(100'000));
  EXPECT_EQ(0, capability_value(u64{1} << 32 | KVM_CAP_USER_MEMORY));  // the whole argument counts
  EXPECT_EQ(0, capability_value(KVM_CAP_NESTED_STATE));
  EXPECT_EQ(1, capability_value(KVM_CAP_USER_MEMORY));
  EXPECT_GE(capability_value(KVM_CAP_XSAVE2), 4096);
  EXPECT_GE(capability_value(KVM_CAP_NR_VCPUS), 1);
}

TEST(SupportTable, ThePageInDocsIsMadeFromTheTables) {
  const char* const path = ANYKVM_SOURCE_DIR "/docs/ioctls.md";
  if (std::getenv("ANYKVM_UPDATE_DOCS")) std::ofstream(path) << support_table_markdown();
  std::ifstream file(path);
  std::ostringstream page;
  page << file.rdbuf();
  EXPECT_EQ(support_table_markdown(), page.str()) << "run this test with ANYKVM_UPDATE_DOCS=1 set";
}

TEST(SupportTable, JsonNamesEveryRow) {
  const std::string json = support_table_json();
  for (const Ioctl& row : ioctls()) EXPECT_NE(std::string::npos, json.find(row.name));
  for (const Capability& row : capabilities()) EXPECT_NE(std::string::npos, json.find(row.name));
}

}  // namespace
}  // namespace anykvm::abi
