// Register by register, after the PC16550D data sheet, section 8.
#include "vmm/serial.h"

namespace anykvm::vmm {

namespace {

enum : u8 {
  ier_receive = 1,
  ier_transmit = 2,
  ier_line = 4,
  ier_modem = 8,
  iir_none = 1,
  iir_modem = 0,
  iir_transmit = 2,
  iir_receive = 4,
  iir_line = 6,
  iir_timeout = 0x0c,
  iir_fifos = 0xc0,
  fcr_enable = 1,
  fcr_clear_receive = 2,
  lcr_divisor = 0x80,
  mcr_dtr = 1,
  mcr_rts = 2,
  mcr_out1 = 4,
  mcr_out2 = 8,
  mcr_loop = 0x10,
  lsr_data = 1,
  lsr_overrun = 2,
  lsr_transmit_empty = 0x60,
  msr_cts = 0x10,
  msr_dsr = 0x20,
  msr_ring = 0x40,
  msr_carrier = 0x80,
};

constexpr size_t fifo_size = 16;

}  // namespace

void Serial16550::receive(std::span<const u8> bytes) {
  const std::scoped_lock lock(mutex_);
  backlog_.insert(backlog_.end(), bytes.begin(), bytes.end());
  fill_fifo();
  update_irq();
}

size_t Serial16550::backlog() const {
  const std::scoped_lock lock(mutex_);
  return backlog_.size();
}

bool Serial16550::fifo_enabled() const { return fifo_control_ & fcr_enable; }

size_t Serial16550::fifo_room() const {
  const size_t size = fifo_enabled() ? fifo_size : 1;
  return fifo_.size() < size ? size - fifo_.size() : 0;
}

void Serial16550::fill_fifo() {
  if ((modem_control_ & mcr_loop) || (flow_ == Flow::rts && !(modem_control_ & mcr_rts))) return;
  for (size_t room = fifo_room(); room > 0 && !backlog_.empty(); --room) {
    fifo_.push_back(backlog_.front());
    backlog_.pop_front();
  }
}

u8 Serial16550::interrupt_cause() const {
  if ((interrupt_enable_ & ier_line) && overrun_) return iir_line;
  if ((interrupt_enable_ & ier_receive) && !fifo_.empty()) {
    static constexpr u8 triggers[4] = {1, 4, 8, 14};
    // Below the trigger level the chip waits four characters' time before it tells; here that time has passed.
    const bool triggered = !fifo_enabled() || fifo_.size() >= triggers[fifo_control_ >> 6];
    return triggered ? iir_receive : iir_timeout;
  }
  if ((interrupt_enable_ & ier_transmit) && transmit_empty_pending_) return iir_transmit;
  if ((interrupt_enable_ & ier_modem) && modem_delta_) return iir_modem;
  return iir_none;
}

void Serial16550::update_irq() {
  // On a PC, OUT2 gates the interrupt; in loopback the gate is closed.
  const bool gate = (modem_control_ & (mcr_out2 | mcr_loop)) == mcr_out2;
  const bool level = gate && interrupt_cause() != iir_none;
  if (level == irq_level_) return;
  irq_level_ = level;
  irq_.set(level);
}

u8 Serial16550::modem_status() const {
  if (!(modem_control_ & mcr_loop)) return msr_carrier | msr_dsr | msr_cts;
  u8 status = 0;
  if (modem_control_ & mcr_rts) status |= msr_cts;
  if (modem_control_ & mcr_dtr) status |= msr_dsr;
  if (modem_control_ & mcr_out1) status |= msr_ring;
  if (modem_control_ & mcr_out2) status |= msr_carrier;
  return status;
}

void Serial16550::write_modem_control(u8 value) {
  const u8 before = modem_status();
  modem_control_ = value & 0x1f;
  const u8 after = modem_status();
  modem_delta_ |= u8(((before ^ after) >> 4) & 0x0b);
  if ((before & msr_ring) && !(after & msr_ring)) modem_delta_ |= 4;  // only the trailing edge of RI counts
  fill_fifo();
}

u8 Serial16550::read_register(u64 offset) {
  const bool divisor = line_control_ & lcr_divisor;
  switch (offset) {
    case 0: {
      if (divisor) return divisor_low_;
      if (fifo_.empty()) return 0;
      const u8 byte = fifo_.front();
      fifo_.pop_front();
      fill_fifo();
      return byte;
    }
    case 1: return divisor ? divisor_high_ : interrupt_enable_;
    case 2: {
      const u8 cause = interrupt_cause();
      if (cause == iir_transmit) transmit_empty_pending_ = false;
      return cause | (fifo_enabled() ? iir_fifos : 0);
    }
    case 3: return line_control_;
    case 4: return modem_control_;
    case 5: {
      const u8 status = lsr_transmit_empty | (fifo_.empty() ? 0 : lsr_data) | (overrun_ ? lsr_overrun : 0);
      overrun_ = false;
      return status;
    }
    case 6: {
      const u8 status = modem_status() | modem_delta_;
      modem_delta_ = 0;
      return status;
    }
    default: return scratch_;
  }
}

void Serial16550::write_register(u64 offset, u8 value) {
  const bool divisor = line_control_ & lcr_divisor;
  switch (offset) {
    case 0:
      if (divisor) {
        divisor_low_ = value;
        break;
      }
      if (modem_control_ & mcr_loop) {
        if (fifo_room())
          fifo_.push_back(value);
        else
          overrun_ = true;
      }
      transmit_empty_pending_ = true;
      break;
    case 1:
      if (divisor) {
        divisor_high_ = value;
        break;
      }
      // Enabling the transmitter's interrupt while it is empty raises it: drivers start sending by that.
      if ((value & ier_transmit) && !(interrupt_enable_ & ier_transmit)) transmit_empty_pending_ = true;
      interrupt_enable_ = value & 0x0f;
      break;
    case 2:
      if ((value ^ fifo_control_) & fcr_enable || (value & fcr_clear_receive)) fifo_.clear();
      fifo_control_ = value & 0xc9;
      fill_fifo();
      break;
    case 3: line_control_ = value; break;
    case 4: write_modem_control(value); break;
    case 7: scratch_ = value; break;
    default:  // line and modem status are read only
      break;
  }
}

void Serial16550::read(u64 offset, std::span<u8> data) {
  bool drained = false;
  {
    const std::scoped_lock lock(mutex_);
    const bool waiting = !backlog_.empty();
    for (size_t i = 0; i < data.size(); ++i)
      if (offset + i < port_count) data[i] = read_register(offset + i);
    drained = waiting && backlog_.empty();
    update_irq();
  }
  if (drained && drained_) drained_();
}

void Serial16550::write(u64 offset, std::span<const u8> data) {
  for (size_t i = 0; i < data.size() && offset + i < port_count; ++i) {
    bool sends = false, drained = false;
    {
      const std::scoped_lock lock(mutex_);
      const bool waiting = !backlog_.empty();
      sends = offset + i == 0 && !(line_control_ & lcr_divisor) && !(modem_control_ & mcr_loop);
      write_register(offset + i, data[i]);
      drained = waiting && backlog_.empty();
      update_irq();
    }
    if (sends) send_(data[i]);
    if (drained && drained_) drained_();
  }
}

}  // namespace anykvm::vmm
