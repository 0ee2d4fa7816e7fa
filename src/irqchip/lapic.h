// The local APIC of one vCPU: xAPIC page and x2APIC MSRs, interrupt priorities, IPIs, LVTs and the timer.
// Reference: SDM volume 3, chapter 11 "Advanced Programmable Interrupt Controller"; api.rst 4.57 KVM_GET_LAPIC.
// What follows KVM rather than the manual: the version register (six or seven LVTs), a bus clock of 1 GHz for the
// timer, LINT0 of the boot CPU in ExtINT mode after reset, vector hashing for lowest-priority delivery.
//
// Who may call what:
//  - Unless a method says otherwise, only the vCPU's thread, or a thread that holds the vCPU's mutex in its stead.
//  - "Any thread" methods take no lock. Remote delivery is a bit set in the IRR (or a call to ApicClient) and a wake().
//  - The timer thread only sets a flag and wakes; the vCPU's thread turns the flag into an interrupt.
// Registers are relaxed atomics, since destination matching on other threads reads ID, LDR, DFR, SVR and LVT0.
#pragma once

#include <atomic>
#include <memory>

#include "anykvm/kvm.h"
#include "irqchip/interrupt_message.h"
#include "os/timer_queue.h"
#include "x86/machine.h"
#include "x86/types.h"

namespace anykvm::irqchip {

class ApicBus;

/// One vCPU as its APIC sees it. Any thread, with a chip's lock possibly held: take no lock but a leaf, and do not call
/// back into the chips.
class ApicClient {
 public:
  /// Something may be pending: leave guest mode soon and look; end a HLT.
  virtual void wake() = 0;
  virtual void signal_nmi() = 0;
  virtual void signal_smi() = 0;
  virtual void signal_init() = 0;           ///< also forgets a start-up IPI that came before
  virtual void signal_sipi(u8 vector) = 0;  ///< counts only in the wait-for-SIPI state
  virtual void signal_unhalt() = 0;         ///< KVM_HC_KICK_CPU: end a HLT although nothing is pending

  /// vCPU's thread: the guest has ended an interrupt of the I/O APIC that the client emulates (split irqchip).
  virtual void ioapic_eoi(u8 /*vector*/) {}

  /// vCPU's thread: CLOCK_MONOTONIC time at which the guest's TSC reaches this value; <= now when it has.
  virtual u64 tsc_deadline_ns(u64 guest_tsc) = 0;

 protected:
  ~ApicClient() = default;
};

/// The paravirtual EOI flag in guest memory (MSR_KVM_PV_EOI_EN), implemented by paravirt/. vCPU's thread.
class PvEoi {
 public:
  /// Sets the flag: the guest may end the interrupt by clearing it. false: it cannot be written.
  virtual bool offer() = 0;
  /// Takes the offer back. true: the guest had not used it, and must write EOI; false: it has ended the interrupt.
  virtual bool withdraw() = 0;

 protected:
  ~PvEoi() = default;
};

/// What of the guest's CPUID and MCG_CAP the APIC depends on.
struct ApicFeatures {
  bool x2apic = false;
  bool tsc_deadline = false;
  bool directed_eoi = false;  ///< SVR's EOI-broadcast suppression; KVM offers it only without an in-kernel I/O APIC
  bool cmci = false;          ///< a seventh LVT entry, for corrected machine checks
  u8 physical_address_bits = 36;
};

class LocalApic {
 public:
  using MsrResult = x86::Machine::MsrResult;
  static constexpr Gpa default_base = 0xfee00000;
  static constexpr u64 base_bsp = 1 << 8, base_x2apic = 1 << 10, base_enable = 1 << 11;

  /// In its power-on state, and on the bus. Everything passed must outlive it; until the destructor returns, other
  /// threads may call the client.
  LocalApic(u32 id, ApicClient& client, ApicBus& bus, os::TimerQueue& timers, bool is_bsp);
  ~LocalApic();
  LocalApic(const LocalApic&) = delete;
  LocalApic& operator=(const LocalApic&) = delete;

  u32 id() const { return id_; }  ///< any thread
  ApicClient& client() const { return client_; }

  void reset();  ///< power-on
  void init();   ///< INIT: keeps the base, the mode and the ID
  void set_features(const ApicFeatures& features);

  // --- the register page ---------------------------------------------------------------------------------------------
  /// Whether a physical address lies in the page, wherever APIC_BASE has put it. While the APIC is disabled or in
  /// x2APIC mode the page still is the APIC's: reads give ones, writes vanish (KVM_X86_QUIRK_LAPIC_MMIO_HOLE).
  bool covers(Gpa gpa) const { return (gpa & page_mask) == (base() & page_mask) && has_page(); }
  void mmio_read(u32 offset, void* data, unsigned length);
  void mmio_write(u32 offset, const void* data, unsigned length);

  // --- MSRs: APIC_BASE, TSC_DEADLINE, 0x800 - 0x8ff; not_mine for others ---------------------------------------------
  /// by_client: KVM_GET/SET_MSRS, which may make transitions that the guest may not.
  MsrResult read_msr(u32 index, u64& value, bool by_client = false);
  MsrResult write_msr(u32 index, u64 value, bool by_client = false);
  u64 base() const { return base_.load(std::memory_order_relaxed); }  ///< any thread; KVM_GET_SREGS' apic_base
  /// KVM_SET_SREGS' apic_base. -EINVAL for reserved bits.
  int set_base(u64 value);

  // --- interrupts into the vCPU --------------------------------------------------------------------------------------
  /// The vector that the CPU would take now if interrupts were enabled, -1 for none: above the processor priority, APIC
  /// enabled. One atomic load when nothing is pending. Also where an expired timer becomes an interrupt and a used
  /// paravirtual EOI is noticed, so call it whenever wake() was called.
  int pending();
  /// The interrupt acknowledge cycle: the vector (of pending()) moves from IRR to ISR; -1 when there is none.
  int acknowledge();
  /// Whether LINT0 passes the 8259's INTR: then IrqChips::pic_output() and pic_acknowledge() come before pending().
  /// Any thread.
  bool takes_pic_output() const;

  u64 tpr() const { return get(Register::tpr) >> 4 & 15; }  ///< CR8
  void set_tpr(u64 cr8);                                    ///< cr8 <= 15; wakes the vCPU when something gets through

  /// The word that KVM_SET_VAPIC_ADDR's page holds: TPR, the class of the highest ISR vector << 8, the highest IRR
  /// vector
  /// << 24; and the TPR (all 8 bits) back from it.
  u32 vapic_word() const;
  void set_tpr_register(u8 tpr);

  /// An interrupt addressed to this APIC, whatever its destination says; whether it was taken. Any thread.
  bool accept(const InterruptMessage& message);
  /// Whether a message has come since the last call: unlike this APIC's own timer it may tell of what others have
  /// written. Call it after acknowledge().
  bool was_told() { return told_.load(std::memory_order_relaxed) && told_.exchange(false, std::memory_order_acquire); }

  /// A corrected machine check was recorded in a bank that signals it.
  void deliver_cmci() {
    if (features_.cmci) deliver_lvt(Register::lvt_cmci);
  }

  // --- state ---------------------------------------------------------------------------------------------------------
  void get_state(kvm_lapic_state& state);
  /// -EINVAL (x2APIC format in use, and the ID is not this APIC's). The timer goes on where the state says.
  int set_state(const kvm_lapic_state& state);
  /// The relation of the guest's TSC to the host's clock has changed: arms the TSC deadline anew.
  void tsc_changed();

  /// nullptr: none (the default). An offer made is withdrawn first, so call it before the MSR changes.
  void set_pv_eoi(PvEoi* hook);
  /// Takes back an offer, and ends the interrupt if the guest has used it. All other methods do this themselves; the
  /// run loop calls it before it leaves guest mode, so that guest memory is not touched outside.
  void sync_pv_eoi();
  bool has_offered_pv_eoi() const { return pv_eoi_offered_; }

 private:
  friend class ApicBus;

  /// Byte offsets in the register page; the x2APIC MSR is 0x800 + offset / 16.
  enum class Register : u16 {
    id = 0x20,
    version = 0x30,
    tpr = 0x80,
    apr = 0x90,
    ppr = 0xa0,
    eoi = 0xb0,
    ldr = 0xd0,
    dfr = 0xe0,
    svr = 0xf0,
    isr = 0x100,
    tmr = 0x180,
    irr = 0x200,
    esr = 0x280,
    icr = 0x300,
    icr_high = 0x310,
    lvt_cmci = 0x2f0,
    lvt_timer = 0x320,
    lvt_thermal = 0x330,
    lvt_performance = 0x340,
    lvt_lint0 = 0x350,
    lvt_lint1 = 0x360,
    lvt_error = 0x370,
    initial_count = 0x380,
    current_count = 0x390,
    divide = 0x3e0,
    self_ipi = 0x3f0,
  };
  static constexpr u64 base_bits = base_bsp | base_x2apic | base_enable;
  static constexpr u32 timer_event = 1 << 8;  ///< in events_: the timer has expired

  // Registers.
  static constexpr unsigned slot(Register r, unsigned word = 0) { return (static_cast<unsigned>(r) >> 4) + word; }
  u32 get(Register r, unsigned word = 0) const { return registers_[slot(r, word)].load(std::memory_order_relaxed); }
  void set(Register r, u32 value, unsigned word = 0) {
    registers_[slot(r, word)].store(value, std::memory_order_relaxed);
  }
  bool test_vector(Register r, u8 vector) const { return get(r, vector / 32) >> (vector % 32) & 1; }
  int highest(Register r) const;
  bool read_register(u32 offset, u32& value);
  bool write_register(u32 offset, u32 value);
  bool write_x2apic_icr(u64 value);
  void write_svr(u32 value);
  void write_lvt(Register r, u32 value);
  void reset_registers();

  // Mode.
  bool hardware_enabled() const { return base() & base_enable; }
  bool x2apic_mode() const { return base() & base_x2apic; }
  bool has_page() const;
  bool software_enabled() const { return get(Register::svr) & 0x100; }
  bool enabled() const { return hardware_enabled() && software_enabled(); }
  void change_base(u64 value);
  void set_id_register(u32 value);
  static u32 x2apic_ldr(u32 id) { return id >> 4 << 16 | 1u << (id & 15); }

  // Delivery.
  void set_irr(u8 vector, bool level_triggered);
  bool take(const InterruptMessage& message);
  bool deliver_lvt(Register lvt);
  bool lint0_in_nmi_mode() const { return (get(Register::lvt_lint0) & 0x10700) == 0x400; }
  void send_ipi(u32 icr_low, u32 destination);
  void end_of_interrupt();
  void update_ppr();
  int deliverable() const;
  void wake_if_deliverable();
  void report_error(u32 bit);
  void offer_pv_eoi(u8 vector);

  // Timer.
  enum class TimerMode : u8 { one_shot = 0, periodic = 1, tsc_deadline = 2, reserved = 3 };
  TimerMode timer_mode() const { return static_cast<TimerMode>(get(Register::lvt_timer) >> 17 & 3); }
  static void timer_expired(void* apic);
  void on_timer();
  void take_timer_event();
  void start_count(u32 initial, u32 current);
  void start_tsc_deadline(u64 deadline);
  void stop_timer();
  void timer_mode_changed(TimerMode before);
  void write_divide(u32 value);
  u32 current_count() const;
  u64 count_ns(u32 count) const;
  static u32 divisor(u32 divide_register);

  const u32 id_;
  ApicClient& client_;
  ApicBus& bus_;
  const bool is_bsp_;
  ApicFeatures features_;
  std::atomic<u64> base_;
  std::atomic<u32> registers_[64];

  /// What pending() looks at first. Bits 0 - 7: that word of the IRR may be other than 0; timer_event.
  std::atomic<u32> events_{0};
  std::atomic<bool> told_{true};  ///< set before the message's bit in the IRR
  std::atomic<u32> errors_{0};    ///< ESR bits since its last write
  u8 ppr_ = 0;
  bool id_moved_ = false;  ///< counted in the bus's moved_ids_
  bool pv_eoi_offered_ = false;
  PvEoi* pv_eoi_ = nullptr;

  u64 tsc_deadline_ = 0;
  std::atomic<u64> period_ns_{0};    ///< of initial_count; 0: not counting
  std::atomic<u64> expires_ns_{0};   ///< when the count reaches (next) 0
  std::atomic<u64> last_eoi_ns_{0};  ///< of the periodic timer's vector
  os::Timer timer_;
};

}  // namespace anykvm::irqchip
