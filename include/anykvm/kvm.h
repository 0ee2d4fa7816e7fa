// The one door to <linux/kvm.h>: every file that needs KVM's structures and numbers includes this.
//
// linux-libc-dev 6.1 declares flexible arrays through a macro that adds an empty struct, which has size 1 in C++:
// ioctl numbers and offsets of `entries[]` would come out wrong. The plain declaration below gives the C layout;
// tests/abi/layout_test.cpp checks every number and offset against C.
#pragma once

#include <linux/stddef.h>
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[]

#include <linux/kvm.h>

#include "anykvm/kvm_since_6_1.h"
