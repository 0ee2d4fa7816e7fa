// A guest of a dozen bytes that adds two numbers, prints the digit on a serial port and halts.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "anykvm/anykvm.h"

int main() try {
  // 16-bit code, as a processor starts.
  const unsigned char code[] = {
      0xba, 0xf8, 0x03,  // mov $0x3f8, %dx
      0x00, 0xd8,        // add %bl, %al
      0x04, '0',         // add $'0', %al
      0xee,              // out %al, (%dx)
      0xb0, '\n',        // mov $'\n', %al
      0xee,              // out %al, (%dx)
      0xf4,              // hlt
  };
  constexpr std::size_t memory_size = 0x1000;
  constexpr std::uint64_t code_address = 0x1000;
  void* memory = mmap(nullptr, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  std::memcpy(memory, code, sizeof code);

  anykvm::Kvm kvm(anykvm::KvmDevice::software());  // or KvmDevice::host()
  anykvm::Vm vm = kvm.create_vm();
  vm.set_up_memory_slot(vm.allocate_memory_slot(memory_size), memory, code_address);

  anykvm::Vcpu vcpu = vm.create_vcpu();
  kvm_sregs sregs = vcpu.sregs();
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  vcpu.set_sregs(sregs);
  kvm_regs regs{};
  regs.rip = code_address;
  regs.rax = 2;
  regs.rbx = 2;
  regs.rflags = 2;
  vcpu.set_regs(regs);

  for (;;) {
    const anykvm::Exit exit = vcpu.run();
    if (const auto* out = std::get_if<anykvm::exits::IoOut>(&exit)) {
      std::fwrite(out->data.data(), 1, out->data.size(), stdout);
    } else if (std::holds_alternative<anykvm::exits::Hlt>(exit)) {
      return 0;
    } else {
      std::fprintf(stderr, "unexpected exit %u\n", vcpu.run_area().exit_reason);
      return 1;
    }
  }
} catch (const std::system_error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
