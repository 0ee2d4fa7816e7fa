// ANYKVM_API marks what libanykvm.so shows to programs that link it; the library is built with everything else hidden.
#pragma once

#define ANYKVM_API __attribute__((visibility("default")))
