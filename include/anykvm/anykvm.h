// The whole of the C++ client API. See examples/hello.cpp.
#pragma once

#include "anykvm/device.h"
#include "anykvm/exit.h"
#include "anykvm/kvm.h"
#include "anykvm/kvm_device.h"
#include "anykvm/system.h"
#include "anykvm/vcpu.h"
#include "anykvm/vm.h"
