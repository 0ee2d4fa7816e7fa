// Guest code on a CPU in any state that its client can bring about: the input is a list of steps, each of which changes
// something (registers, MSRs, CPUID, memory, pending events) or puts code somewhere and lets it run. Exits are answered
// with more of the input. What must hold: the client lives, every KVM_RUN returns with a result that the API knows, and
// the state of the vCPU can be read and set again.
#include <sys/mman.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fuzz/guest_layout.h"
#include "fuzz/host_fpu.h"
#include "fuzz/input.h"
#include "fuzz/stop_timer.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"
#include "x86/cpuid.h"
#include "x86/msr.h"

namespace anykvm::fuzz {
namespace {

constexpr unsigned max_steps = 48, max_exits = 40;
constexpr u64 run_microseconds = 1500;

[[noreturn]] void violated(const char* what, long value) {
  std::fprintf(stderr, "fuzz: %s: %ld (%#lx)\n", what, value, static_cast<unsigned long>(value));
  abort();
}

u8* map(std::size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) abort();
  return static_cast<u8*>(at);
}

/// Host memory of the guest's slots, each between pages that nobody may touch. Reused: mapping costs more than
/// clearing.
struct HostMemory {
  u8* const base = map(1 << 20, PROT_NONE);
  u8* const ram = base + 0x10000;
  u8* const rom = ram + layout::ram_size + 0x10000;
  u8* const refused = rom + 0x10000;
  kvm_run* const run = reinterpret_cast<kvm_run*>(refused + 0x10000);
  HostMemory() {
    mprotect(ram, layout::ram_size, PROT_READ | PROT_WRITE);
    mprotect(rom, 0x4000, PROT_READ | PROT_WRITE);
    mprotect(refused, 0x1000, PROT_READ);  // then 3 pages that cannot even be read
    mprotect(run, 3 * page_size, PROT_READ | PROT_WRITE);
  }
};

class GuestFuzzer {
 public:
  explicit GuestFuzzer(std::span<const u8> bytes) : input_(bytes) {
    const u8 setup = input_.byte();
    mode_ = static_cast<Mode>(setup % unsigned(Mode::count));
    chips_ = input_.byte() & 3;
    if (vm::Vm::create(0, vm_) != 0) abort();
    if (chips_ == 1) (void)vm_->create_irqchip();
    set_slot(0, 0, layout::ram_size, host_.ram);
    set_slot(1, layout::rom, 0x4000, host_.rom, KVM_MEM_READONLY);
    set_slot(2, layout::refused, 0x4000, host_.refused);
    set_slot(3, layout::high, layout::ram_size, host_.ram, chips_ & 2 ? KVM_MEM_LOG_DIRTY_PAGES : 0);
    std::memset(host_.run, 0, 3 * page_size);
    std::memset(host_.rom, 0xcc, 0x4000);
    if (vm_->create_vcpu(0, host_.run, vcpu_) != 0) abort();
    (void)vcpu_->set_cpuid2(x86::supported_cpuid());
    (void)vcpu_->get_sregs(reset_sregs_);
    load_mode();
  }

  void play() {
    for (unsigned step = 0; step < max_steps && !input_.empty(); ++step) {
      take_step();
      check_state();
    }
  }

 private:
  void set_slot(u32 id, Gpa gpa, u64 size, u8* host, u32 flags = 0) {
    const kvm_userspace_memory_region region{.slot = id,
                                             .flags = flags,
                                             .guest_phys_addr = gpa,
                                             .memory_size = size,
                                             .userspace_addr = reinterpret_cast<u64>(host)};
    if (const int error = vm_->set_user_memory_region(region)) violated("slot", error);
  }

  void load_mode() {
    write_tables({host_.ram, layout::ram_size}, mode_);
    kvm_sregs sregs = reset_sregs_;
    kvm_regs regs;
    set_mode(mode_, sregs, regs);
    const kvm_vcpu_events none{};
    (void)vcpu_->set_vcpu_events(none);
    const kvm_mp_state runnable{KVM_MP_STATE_RUNNABLE};
    (void)vcpu_->set_mp_state(runnable);
    // Refused where CPUID has been given fewer bits of a physical address than the APIC's base has, for one.
    const int error = vcpu_->set_sregs(sregs);
    if (error && mode_ != Mode::long64_la57 && !cpuid_changed_) violated("set_sregs of a mode", error);
    (void)vcpu_->set_regs(regs);
    home_rip_ = regs.rip;
  }

  void take_step() {
    switch (input_.below(20)) {
      case 0: {
        mode_ = static_cast<Mode>(input_.below(unsigned(Mode::count)));
        load_mode();
        return;
      }
      case 1: {
        kvm_regs regs;
        (void)vcpu_->get_regs(regs);
        reinterpret_cast<u64*>(&regs)[input_.below(sizeof regs / 8)] = input_.number();
        (void)vcpu_->set_regs(regs);
        return;
      }
      case 2: return change_sregs();
      case 3: {
        const kvm_msr_entry entry{.index = msr_number(), .reserved = 0, .data = input_.number()};
        const int done = vcpu_->set_msrs({&entry, 1});
        if (done != 0 && done != 1) violated("set_msrs", done);
        return;
      }
      case 4: {
        kvm_msr_entry entry{.index = msr_number(), .reserved = 0, .data = 0};
        const int done = vcpu_->get_msrs({&entry, 1});
        if (done != 0 && done != 1) violated("get_msrs", done);
        return;
      }
      case 5: {  // memory: a few bytes anywhere
        const u64 at = input_.take<u32>() % layout::ram_size;
        const auto bytes = input_.chunk(32);
        std::memcpy(host_.ram + at, bytes.data(), std::min<u64>(bytes.size(), layout::ram_size - at));
        return;
      }
      case 6: {  // memory: one entry of a table
        const u64 tables[] = {layout::gdt, layout::ldt, layout::idt64, layout::idt32, layout::pml4,     layout::pdpt,
                              layout::pd,  layout::pt,  layout::tss64, layout::tss32, layout::legacy_pd};
        u8* const at = host_.ram + tables[input_.below(std::size(tables))] + input_.byte() * 8u;
        const u64 value = input_.number();
        std::memcpy(at, &value, sizeof value);
        return;
      }
      case 7: {
        kvm_vcpu_events events;
        (void)vcpu_->get_vcpu_events(events);
        const auto bytes = input_.chunk(sizeof events);
        std::memcpy(&events, bytes.data(), bytes.size());
        (void)vcpu_->set_vcpu_events(events);
        return;
      }
      case 8: (void)vcpu_->nmi(); return;
      case 9: {
        const kvm_interrupt interrupt{.irq = input_.byte()};
        (void)vcpu_->interrupt(interrupt);
        return;
      }
      case 10: {
        kvm_fpu fpu;
        (void)vcpu_->get_fpu(fpu);
        const auto bytes = input_.chunk(255);
        const u64 at = input_.take<u16>() % (sizeof fpu - bytes.size());
        std::memcpy(reinterpret_cast<u8*>(&fpu) + at, bytes.data(), bytes.size());
        (void)vcpu_->set_fpu(fpu);
        return;
      }
      case 11: {
        kvm_xcrs xcrs{};
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].value = input_.number();
        (void)vcpu_->set_xcrs(xcrs);
        return;
      }
      case 12: {
        kvm_debugregs regs{};
        for (unsigned i = 0; i < 4; ++i) regs.db[i] = input_.number();
        regs.dr6 = input_.number();
        regs.dr7 = input_.number();
        (void)vcpu_->set_debugregs(regs);
        return;
      }
      case 13: return change_cpuid();
      case 14: {  // kvm_run, where the client writes
        host_.run->request_interrupt_window = input_.byte();
        host_.run->cr8 = input_.byte();
        return;
      }
      case 15: {
        if (chips_ != 1) return;
        const u8 line = input_.byte();
        const kvm_irq_level level{.irq = line & 31u, .level = u32(line >> 7)};
        (void)vm_->irq_line(level);
        return;
      }
      case 16: {
        const kvm_mp_state state{u32(input_.byte() & 7)};
        (void)vcpu_->set_mp_state(state);
        return;
      }
      default: return run_code();
    }
  }

  u32 msr_number() {
    if (input_.flag()) {
      const auto list = x86::msr_index_list();
      return list[input_.take<u16>() % list.size()];
    }
    return u32(input_.number());
  }

  void change_sregs() {
    kvm_sregs sregs;
    (void)vcpu_->get_sregs(sregs);
    const unsigned which = input_.below(16);
    if (which < 8) {
      kvm_segment& segment = (&sregs.cs)[which];
      switch (input_.below(5)) {
        case 0: segment.base = input_.number(); break;
        case 1: segment.limit = u32(input_.number()); break;
        case 2: segment.selector = u16(input_.number()); break;
        case 3: segment.type = input_.byte(); break;
        case 4: {
          const u16 bits = input_.take<u16>();
          segment.present = bits & 1, segment.dpl = bits >> 1 & 3, segment.db = bits >> 3 & 1,
          segment.s = bits >> 4 & 1;
          segment.l = bits >> 5 & 1, segment.g = bits >> 6 & 1, segment.unusable = bits >> 7 & 1;
          break;
        }
      }
    } else {
      const u64 value = input_.number();
      switch (which) {
        case 8: sregs.gdt.base = value; break;
        case 9: sregs.gdt.limit = u16(value); break;
        case 10: sregs.idt.base = value; break;
        case 11: sregs.idt.limit = u16(value); break;
        case 12: sregs.cr0 ^= value; break;
        case 13: sregs.cr3 = value; break;
        case 14: sregs.cr4 ^= value; break;
        case 15: sregs.efer ^= value; break;
      }
    }
    (void)vcpu_->set_sregs(sregs);
  }

  void change_cpuid() {
    const auto supported = x86::supported_cpuid();
    std::vector<kvm_cpuid_entry2> entries(supported.begin(), supported.end());
    for (u8 changes = input_.byte() % 4; changes > 0 && !entries.empty(); --changes) {
      kvm_cpuid_entry2& entry = entries[input_.byte() % entries.size()];
      (&entry.eax)[input_.below(4)] ^= u32(input_.number());
    }
    (void)vcpu_->set_cpuid2(entries);
    cpuid_changed_ = true;
  }

  void run_code() {
    const auto code = input_.chunk(64);
    std::memset(host_.ram + layout::code, 0x90, 80);
    std::memcpy(host_.ram + layout::code, code.data(), code.size());
    host_.ram[layout::code + code.size()] = 0xe6;  // out trap_port, al
    host_.ram[layout::code + code.size() + 1] = trap_port;
    kvm_regs regs;
    (void)vcpu_->get_regs(regs);
    regs.rip = home_rip_;
    (void)vcpu_->set_regs(regs);
    for (unsigned exits = 0; exits < max_exits; ++exits)
      if (!run_once()) return;
  }

  /// false: this code is done.
  bool run_once() {
    host_.run->immediate_exit = 0;
    host_.run->exit_reason = ~0u;
    int result;
    const HostFpu fpu = HostFpu::now();
    {
      StopTimer timer(host_.run, run_microseconds);
      result = vcpu_->run();
    }
    if (HostFpu::now() != fpu) violated("floating-point environment after KVM_RUN, MXCSR", HostFpu::now().mxcsr);
    host_.run->immediate_exit = 0;
    if (result == -EINTR) return false;
    if (result == -EAGAIN || result == -EFAULT || result == -EINVAL) return false;
    if (result != 0) violated("KVM_RUN", result);
    return answer_exit();
  }

  bool answer_exit() {
    kvm_run& run = *host_.run;
    switch (run.exit_reason) {
      case KVM_EXIT_IO: {
        if (run.io.port == trap_port) return false;
        const u64 bytes = u64{run.io.size} * run.io.count;
        if (run.io.data_offset < page_size || run.io.data_offset + bytes > 2 * page_size || bytes == 0)
          violated("size of a port access", long(bytes));
        if (run.io.direction == KVM_EXIT_IO_IN) {
          u8* const data = reinterpret_cast<u8*>(&run) + run.io.data_offset;
          const auto reply = input_.bytes(std::min<u64>(bytes, 8));
          std::memcpy(data, reply.data(), reply.size());
        }
        return true;
      }
      case KVM_EXIT_MMIO: {
        if (run.mmio.len < 1 || run.mmio.len > 8) violated("length of a device access", run.mmio.len);
        if (!run.mmio.is_write) {
          const auto reply = input_.bytes(run.mmio.len);
          std::memcpy(run.mmio.data, reply.data(), reply.size());
        }
        return true;
      }
      case KVM_EXIT_HYPERCALL: run.hypercall.ret = input_.byte(); return true;
      case KVM_EXIT_IRQ_WINDOW_OPEN: run.request_interrupt_window = 0; return true;
      case KVM_EXIT_SET_TPR:
      case KVM_EXIT_TPR_ACCESS:
      case KVM_EXIT_IOAPIC_EOI: return true;
      case KVM_EXIT_X86_RDMSR: run.msr.data = input_.number(); return true;
      case KVM_EXIT_X86_WRMSR: run.msr.error = input_.byte() & 1; return true;
      case KVM_EXIT_HLT:
      case KVM_EXIT_DEBUG:
      case KVM_EXIT_INTR: return false;
      case KVM_EXIT_SHUTDOWN:
      case KVM_EXIT_FAIL_ENTRY:
      case KVM_EXIT_INTERNAL_ERROR: load_mode(); return false;
      default: violated("exit reason", run.exit_reason);
    }
  }

  /// What the client reads, it can give back, unless it has taken features away in between; but KVM refuses CS.L
  /// outside long mode, where it means nothing.
  void check_state() {
    if (cpuid_changed_) return;
    kvm_sregs sregs;
    (void)vcpu_->get_sregs(sregs);
    if (!(sregs.efer & 0x400)) sregs.cs.l = 0;
    if (const int error = vcpu_->set_sregs(sregs)) {
      std::fprintf(stderr, "cr0 %llx cr3 %llx cr4 %llx efer %llx cs.l %d apic base %llx\n", sregs.cr0, sregs.cr3,
                   sregs.cr4, sregs.efer, sregs.cs.l, sregs.apic_base);
      violated("set_sregs of get_sregs", error);
    }
    kvm_vcpu_events events;
    (void)vcpu_->get_vcpu_events(events);
    if (const int error = vcpu_->set_vcpu_events(events)) violated("set_vcpu_events of get_vcpu_events", error);
  }

  static inline HostMemory host_;
  Input input_;
  Mode mode_;
  u8 chips_;
  std::shared_ptr<vm::Vm> vm_;
  std::shared_ptr<vcpu::Vcpu> vcpu_;
  kvm_sregs reset_sregs_;
  u64 home_rip_ = 0;
  bool cpuid_changed_ = false;
};

}  // namespace

void guest(std::span<const u8> bytes) { GuestFuzzer(bytes).play(); }

}  // namespace anykvm::fuzz
