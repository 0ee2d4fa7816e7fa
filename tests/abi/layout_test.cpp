// <linux/kvm.h> through anykvm/kvm.h has the layout that it has in C.
#include <gtest/gtest.h>

#include <cstddef>

#include "anykvm/kvm.h"

extern "C" const unsigned long layout_in_c[];
extern "C" const unsigned long layout_in_c_count;

namespace anykvm::abi {
namespace {

struct Value {
  const char* expression;
  unsigned long in_cpp;
};

#define VALUE(expression) {#expression, static_cast<unsigned long>(expression)},
const Value values[] = {
#include "abi/layout_values.inc"
};
#undef VALUE

TEST(Layout, EveryNumberOffsetAndSizeIsThatOfC) {
  ASSERT_EQ(layout_in_c_count, std::size(values));
  for (std::size_t i = 0; i < std::size(values); ++i)
    EXPECT_EQ(layout_in_c[i], values[i].in_cpp) << values[i].expression;
}

TEST(Layout, TheOnesThatDebian12sHeaderGetsWrong) {
  EXPECT_EQ(0xc008ae05, KVM_GET_SUPPORTED_CPUID);
  EXPECT_EQ(8u, offsetof(kvm_cpuid2, entries));
  EXPECT_EQ(4096u, sizeof(kvm_xsave));
}

TEST(Layout, WhatLaterKernelsAdded) {
  EXPECT_EQ(0x40a0ae49, KVM_SET_USER_MEMORY_REGION2);
  EXPECT_EQ(160u, sizeof(kvm_userspace_memory_region2));
}

}  // namespace
}  // namespace anykvm::abi
