// A VM with RAM, for tests of the vCPU that run small guests: hand-assembled code, each instruction in a comment.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

#include "os/clock.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"
#include "x86/state.h"

namespace anykvm {

class TestMachine : public testing::Test {
 protected:
  static constexpr u64 ram_size = 4 << 20;
  static constexpr Gpa code_at = 0x10000, stack_top = 0x8000, idt_at = 0x3000, gdt_at = 0x3800, tables_at = 0x4000;

  TestMachine() {
    EXPECT_EQ(vm::Vm::create(0, machine), 0);
    ram = static_cast<u8*>(mmap(nullptr, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, ram_size, ram)), 0);
  }
  ~TestMachine() override {
    vcpus.clear();
    machine.reset();
    for (kvm_run* run : runs) munmap(run, 3 * page_size);
    munmap(ram, ram_size);
  }

  static kvm_userspace_memory_region slot(u32 id, Gpa gpa, u64 size, void* host, u32 flags = 0) {
    return {.slot = id,
            .flags = flags,
            .guest_phys_addr = gpa,
            .memory_size = size,
            .userspace_addr = reinterpret_cast<u64>(host)};
  }

  vcpu::Vcpu& add_vcpu() {
    auto* run =
        static_cast<kvm_run*>(mmap(nullptr, 3 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    runs.push_back(run);
    std::shared_ptr<vcpu::Vcpu> vcpu;
    EXPECT_EQ(machine->create_vcpu(static_cast<u32>(vcpus.size()), run, vcpu), 0);
    vcpus.push_back(vcpu);
    return *vcpu;
  }

  void put(Gpa gpa, std::initializer_list<u8> bytes) { std::memcpy(ram + gpa, bytes.begin(), bytes.size()); }
  template <class T>
  void store(Gpa gpa, T value) {
    std::memcpy(ram + gpa, &value, sizeof value);
  }
  template <class T>
  T load(Gpa gpa) const {
    T value;
    std::memcpy(&value, ram + gpa, sizeof value);
    return value;
  }

  /// Real mode at code_at, which is what most of these guests need.
  void start_real_mode(vcpu::Vcpu& vcpu, std::initializer_list<u8> code, Gpa at = code_at) {
    put(at, code);
    kvm_sregs sregs;
    EXPECT_EQ(vcpu.get_sregs(sregs), 0);
    sregs.cs.selector = static_cast<u16>(at >> 4);
    sregs.cs.base = at;
    EXPECT_EQ(vcpu.set_sregs(sregs), 0);
    kvm_regs regs{};
    regs.rsp = stack_top;
    regs.rflags = 2;
    EXPECT_EQ(vcpu.set_regs(regs), 0);
  }

  /// 64-bit mode, the first 2 MiB mapped onto themselves as one supervisor page, 64-bit interrupt gates on demand.
  void start_long_mode(vcpu::Vcpu& vcpu, std::initializer_list<u8> code) {
    put(code_at, code);
    store<u64>(tables_at, (tables_at + 0x1000) | 3);           // PML4
    store<u64>(tables_at + 0x1000, (tables_at + 0x2000) | 3);  // PDPT
    store<u64>(tables_at + 0x2000, 0x83);                      // PD: a 2 MiB page
    store<u64>(gdt_at + 8, 0x00209b0000000000);                // 64-bit code
    store<u64>(gdt_at + 16, 0x00cf93000000ffff);               // data
    kvm_sregs sregs;
    EXPECT_EQ(vcpu.get_sregs(sregs), 0);
    sregs.cr0 = 0x80000031;
    sregs.cr3 = tables_at;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    sregs.cs = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    sregs.ss = {.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss;
    sregs.gdt = {.base = gdt_at, .limit = 23};
    sregs.idt = {.base = idt_at, .limit = 0x7ff};
    EXPECT_EQ(vcpu.set_sregs(sregs), 0);
    kvm_regs regs{};
    regs.rip = code_at;
    regs.rsp = stack_top;
    regs.rflags = 2;
    EXPECT_EQ(vcpu.set_regs(regs), 0);
  }
  void set_gate(u8 vector, Gpa handler) {
    store<u64>(idt_at + vector * 16u, (handler & 0xffff) | 8u << 16 | 0x8e00ull << 32 | (handler >> 16) << 48);
    store<u64>(idt_at + vector * 16u + 8, 0);
  }

  kvm_regs regs(unsigned index = 0) {
    kvm_regs regs;
    EXPECT_EQ(vcpus[index]->get_regs(regs), 0);
    return regs;
  }
  kvm_run& run(unsigned index = 0) { return *runs[index]; }
  u8* pio_data(unsigned index = 0) { return reinterpret_cast<u8*>(runs[index]) + run(index).io.data_offset; }

  /// As another thread of the client does it.
  void set_immediate_exit() { __atomic_store_n(&run().immediate_exit, 1, __ATOMIC_RELAXED); }

  /// Until done() or five seconds have passed.
  template <class F>
  static bool eventually(F done) {
    for (int i = 0; i < 5000; ++i) {
      if (done()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return done();
  }

  std::shared_ptr<vm::Vm> machine;
  u8* ram;
  std::vector<std::shared_ptr<vcpu::Vcpu>> vcpus;
  std::vector<kvm_run*> runs;
};

}  // namespace anykvm
