#include "engine/direct/direct.h"

#include <sched.h>
#include <signal.h>
#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "os/clock.h"
#include "os/seccomp.h"
#include "os/tsc.h"
#include "x86/xsave.h"

namespace anykvm::engine::direct {

namespace {

u64 ticks_of_us(u64 us) { return us * os::host_tsc_khz() / 1000; }

/// The selectors that user code has in the host.
constexpr u16 user_cs = 0x33, user_ss = 0x2b;
/// Flags that a return from the host's signal handler restores as given.
constexpr u64 own_flags = x86::flag::arithmetic | x86::flag::df | x86::flag::ac;
/// Those that user code can change without that.
constexpr u64 others_flags = x86::flag::nt | x86::flag::id;

/// Of the words at the end of an XSAVE image's legacy region, which are the kernel's.
constexpr unsigned kernel_words = 464, kernel_words_size = 48;

u64 host_xcr0() {
  static const u64 value = [] {
    u32 low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return u64(high) << 32 | low;
  }();
  return value;
}

std::atomic<const char*> in_the_way{nullptr};

/// Where in gregset_t the guest's registers are, by their numbers.
constexpr int greg_of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

}  // namespace

Direct::Direct(const KnownCode& known) : known_(known), eager_(std::getenv("ANYKVM_DIRECT_EAGER") != nullptr) {
  for (auto& space : spaces_) space = std::make_unique<Space>();
}

Direct::~Direct() { unbind(); }

const char* Direct::obstacle() { return in_the_way; }

void Direct::look_up(u64 number) {
  looked_up_ = number;
  current_ = nullptr;
  for (auto& space : spaces_)
    if (space->number == number) current_ = space.get();
  if (current_ && candidate(number).not_before > __rdtsc()) current_ = nullptr;
}

Direct::Candidate& Direct::candidate(u64 number) {
  Candidate& found = candidates_[(number >> 12) % std::size(candidates_)];
  if (found.number != number) found = {.number = number};
  return found;
}

/// What user code can see of the machine is what the host has.
bool Direct::suits(const x86::Cpu& cpu) const {
  const x86::CpuState& s = cpu.state;
  constexpr u64 needed_cr4 = x86::cr4::osfxsr | x86::cr4::osxsave | x86::cr4::fsgsbase;
  return s.segment[x86::cs].selector == user_cs && s.segment[x86::ss].selector == user_ss &&
         !s.segment[x86::fs].selector && !s.segment[x86::gs].selector &&
         (s.cr0 & (x86::cr0::em | x86::cr0::ts | x86::cr0::am)) == x86::cr0::am && !(s.cr4 & x86::cr4::pke) &&
         (s.cr4 & needed_cr4) == needed_cr4 && !(s.other_flags & others_flags);
}

void Direct::interrupted(x86::Cpu& cpu) {
  // CPU time, as in note_stop().
  const u64 now = os::thread_cpu_ns(), ns = now - std::exchange(last_seen_, now);
  const u64 entries = entries_ - std::exchange(entries_seen_, entries_);
  if (!works_ || ns < 300'000) return;
  // Some milliseconds, once: rather now than when it is to make something fast.
  if (!zygote_.running() && suits(cpu) && !prepare(cpu)) return;
  if (current_ && looked_up_ == space_of(cpu)) return;
  Candidate& seen = candidate(space_of(cpu));
  // Translated code takes some four times as long.
  constexpr u64 long_enough_ns = 30'000;
  constexpr u32 enough_hits = 2;
  if (entries * long_enough_ns > ns || !suits(cpu)) {
    seen.hits = 0;
    return;
  }
  if (++seen.hits < enough_hits || __rdtsc() < seen.not_before) return;
  take(cpu);
}

/// The current address space is wanted from now on.
void Direct::take(x86::Cpu& cpu) {
  looked_up_ = space_of(cpu);
  current_ = nullptr;
  if (!suits(cpu) || !prepare(cpu)) return;
  for (auto& space : spaces_)
    if (space->number == looked_up_) current_ = space.get();
  if (!current_) current_ = make_space(cpu, looked_up_);
}

bool Direct::prepare(x86::Cpu& cpu) {
  if (zygote_.running() && ram_.is_current(cpu.machine)) return true;
  for (auto& space : spaces_) {
    space->number = 0;
    space->process.end();
  }
  current_ = nullptr;
  unbind();  // the processes inherit where the thread may be
  zygote_.stop();
  ram_.find(cpu.machine);
  int files[GuestRam::most_parts + 1];
  const auto last = std::copy(ram_.files().begin(), ram_.files().end(), files);
  const char* why = nullptr;
  if (os::seccomp_filter_added())
    why = "a seccomp filter of the client's may forbid new processes";
  else if (last == files)
    why = "guest RAM is not in files";
  else if (*last = code_.begin() ? code_.fd() : -1; *last < 0 || !zygote_.start({files, last + 1}))
    why = "the host does not let it have its processes";
  works_ = !why;
  if (why) in_the_way = why;
  return works_;
}

Direct::Space* Direct::make_space(x86::Cpu& cpu, u64 number) {
  unsigned chosen = 0;
  for (unsigned n = 1; n < std::size(spaces_); ++n)
    if (!spaces_[n]->number || spaces_[n]->used < spaces_[chosen]->used) chosen = n;
  Space& space = *spaces_[chosen];
  space.number = 0;
  space.process.end();
  if (!space.process.start(zygote_)) {
    works_ = false;
    return nullptr;
  }
  space.number = number;
  space.placed = false;
  space.exits = space.faults = 0;
  space.judged_at = space.process.cpu_ns();
  space.mirror.begin(space.process, ram_, code_, (cpu.state.xcr0 ^ host_xcr0()) != 0);
  return &space;
}

/// For a while, and longer each time.
void Direct::give_up() {
  Candidate& known = candidate(looked_up_);
  known.hits = 0;
  known.rests = std::clamp(known.rests * 2, ticks_of_us(20'000), ticks_of_us(1'000'000));
  known.not_before = __rdtsc() + known.rests;
  current_ = nullptr;
  unbind();
}

bool Direct::load(const x86::Cpu& cpu) const {
  ucontext_t* const context = running_->process.context();
  if (!context) return false;
  const std::span<u8> image = running_->process.xsave_image(*context);
  if (image.empty()) return false;
  const x86::CpuState& s = cpu.state;
  greg_t* const registers = context->uc_mcontext.gregs;
  for (unsigned n = 0; n < 16; ++n) registers[greg_of[n]] = greg_t(s.gpr[n]);
  registers[REG_RIP] = greg_t(s.rip);
  registers[REG_EFL] = greg_t((s.rflags() & own_flags) | x86::flag::if_ | x86::flag::fixed1);
  running_->process.fs_base() = s.segment[x86::fs].base;
  running_->process.gs_base() = s.segment[x86::gs].base;
  u8 kept[kernel_words_size];
  std::memcpy(kept, image.data() + kernel_words, sizeof kept);
  u64 features;
  std::memcpy(&features, kept + 8, sizeof features);  // struct _fpx_sw_bytes: what the image has room for
  x86::fpu_to_xsave(s.fpu, features & x86::xsave_layout().supported, image);
  std::memcpy(image.data() + kernel_words, kept, sizeof kept);
  return true;
}

bool Direct::store(x86::Cpu& cpu) const {
  const ucontext_t* const context = running_->process.context();
  if (!context) return false;
  const std::span<u8> image = running_->process.xsave_image(*context);
  if (image.empty()) return false;
  x86::CpuState& s = cpu.state;
  const u64 supported = x86::xsave_layout().supported;
  u64 present;
  std::memcpy(&present, image.data() + 512, sizeof present);
  present &= supported;
  std::memcpy(image.data() + 512, &present, sizeof present);
  if (!x86::xsave_to_fpu(s.fpu, supported, image)) return false;
  const greg_t* const registers = context->uc_mcontext.gregs;
  for (unsigned n = 0; n < 16; ++n) s.gpr[n] = u64(registers[greg_of[n]]);
  s.rip = u64(registers[REG_RIP]);
  constexpr u64 changed = own_flags | others_flags;
  s.set_rflags((s.rflags() & ~changed) | (u64(registers[REG_EFL]) & changed));
  s.segment[x86::fs].base = running_->process.fs_base();
  s.segment[x86::gs].base = running_->process.gs_base();
  cpu.update_mode();
  return true;
}

void Direct::abandon(x86::Cpu& cpu) {
  if (!running_) return;
  (void)store(cpu);
  running_ = nullptr;
}

/// Only what has found the area and writes to it can lose its registers: that program goes on where it was seen last,
/// with an exception.
Direct::Next Direct::lose(x86::Cpu& cpu) {
  running_->number = 0;
  running_->process.end();
  running_ = nullptr;
  give_up();
  if (cpu.ud() == x86::Result::fault) (void)cpu.deliver_fault();
  return Next::decide;
}

void Direct::forbid_stores(u64 page) {
  for (auto& space : spaces_)
    if (space->number) space->mirror.forbid_stores(page);
}

/// CPU time is judged, not how long it took: where other work shares the CPUs, every stretch takes long.
void Direct::note_stop(Space& space, bool mapped) {
  constexpr u32 most_exits = 64, most_faults = 2048;
  constexpr u64 least_ns = 14'000;  // 6 to 9 of which are for the stop itself
  (mapped ? space.faults : space.exits) += 1;
  if (space.exits < most_exits && space.faults < most_faults) return;
  const u64 now = space.process.cpu_ns(), used = now - std::exchange(space.judged_at, now);
  const bool pays = used >= least_ns * (space.exits + space.faults);
  space.exits = space.faults = 0;
  if (pays || eager_)
    candidate(looked_up_).rests = 0;
  else
    give_up();
}

Direct::Next Direct::run(x86::Cpu& cpu) {
  if (!suits(cpu) || !ram_.is_current(cpu.machine)) {
    give_up();
    return Next::translate;
  }
  running_ = current_;
  running_->used = ++runs_;
  if (!running_->mirror.follow_changes(cpu)) {
    running_->number = 0;
    running_ = current_ = nullptr;
    candidate(looked_up_).hits = 0;
    return Next::translate;
  }
  // What the guest's kernel has mapped on a fault, before it is met again.
  if (const PendingFault fault = std::exchange(fault_, {}); fault.rip == cpu.state.rip && fault.space == looked_up_)
    (void)running_->mirror.resolve(cpu, fault.address, fault.access, known_);
  if (!load(cpu)) return lose(cpu);
  for (;;) {
    bind();
    ++stretches_;
    running_->process.go();
    if (running_->process.wait(cpu.attention, cpu.immediate_exit) == HostProcess::Stop::gone) return lose(cpu);
    const ucontext_t* const context = running_->process.context();
    if (!context) return lose(cpu);
    const greg_t* const registers = context->uc_mcontext.gregs;
    const int signal = int(running_->process.signal());
    const u64 trap = u64(registers[REG_TRAPNO]);
    Next next = Next::step;
    if (signal == HostProcess::kick_signal) {
      next = Next::decide;
    } else if (signal == SIGSEGV && trap == x86::exception::pf) {
      const u64 error = u64(registers[REG_ERR]);
      const auto access = error & x86::pf::fetch   ? x86::Access::fetch
                          : error & x86::pf::write ? x86::Access::write
                                                   : x86::Access::read;
      const Mirror::Fault fault = running_->mirror.resolve(cpu, u64(registers[REG_CR2]), access, known_);
      if (fault == Mirror::Fault::mapped) {
        note_stop(*running_, true);
        if (current_ && !cpu.attention.load(std::memory_order_relaxed)) continue;
        next = Next::decide;
      } else if (fault == Mirror::Fault::guests) {
        fault_ = {u64(registers[REG_RIP]), looked_up_, u64(registers[REG_CR2]), access};
      } else if (fault == Mirror::Fault::unwanted) {
        paused_ = true;
        next = Next::translate;
      }
    }
    if (!store(cpu)) return lose(cpu);
    if (next == Next::step) {
      note_stop(*running_, false);
      rewind(cpu, signal, trap);
    }
    running_ = nullptr;
    return next;
  }
}

/// What stopped the code behind an instruction is to be met again.
void Direct::rewind(x86::Cpu& cpu, int signal, u64 trap) const {
  constexpr u64 vsyscall_page = 0xffffffffff600000;
  x86::CpuState& s = cpu.state;
  const auto byte_before = [&](unsigned distance) {
    x86::Mmu::Translation where;
    return cpu.mmu.translate(cpu, s.rip - distance, x86::Access::fetch, x86::Privilege::user, where) ==
                       x86::Result::ok &&
                   where.host
               ? int(*where.host)
               : -1;
  };
  switch (signal) {
    case SIGSYS:
      if ((running_->process.call_address() & page_mask) == vsyscall_page) {
        s.rip = running_->process.call_address();
        s.gpr[x86::rsp] -= 8;  // the host has returned from there already
      } else {
        s.rip -= 2;
      }
      break;
    case SIGTRAP:
      if (trap == x86::exception::bp)
        s.rip -= byte_before(1) == 0xcc ? 1 : 2;
      else if (byte_before(1) == 0xf1)
        s.rip -= 1;
      break;
    case SIGSEGV:
      if (trap == x86::exception::of) s.rip -= 2;
      break;
    default: break;
  }
}

/// Two threads that take turns are quick only on the same CPU. Now and then the guest's code is let go for a turn, so
/// that the host's scheduler finds it the best one, and the vCPU's thread follows.
void Direct::bind() {
  constexpr u64 longest_us = 10'000;
  const u64 now = __rdtsc();
  if (!std::exchange(running_->placed, true) || (bound_to_ >= 0 && now - bound_since_ > ticks_of_us(longest_us))) {
    unbind();
    return;
  }
  if (bound_to_ < 0) {
    if (sched_getaffinity(0, sizeof cpus_, &cpus_) != 0) return;
    const int there = running_->process.cpu();
    bound_to_ = CPU_ISSET(std::size_t(there), &cpus_) ? there : sched_getcpu();
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(std::size_t(bound_to_), &one);
    sched_setaffinity(0, sizeof one, &one);
    bound_since_ = now;
  }
  running_->process.bind(bound_to_);
}

void Direct::unbind() {
  if (bound_to_ < 0) return;
  cpu_set_t now;
  // Somebody else's binding stays.
  if (sched_getaffinity(0, sizeof now, &now) == 0 && CPU_COUNT(&now) == 1 && CPU_ISSET(std::size_t(bound_to_), &now))
    sched_setaffinity(0, sizeof cpus_, &cpus_);
  bound_to_ = -1;
  if (running_) running_->process.unbind(cpus_);
}

}  // namespace anykvm::engine::direct
