// A 16550A serial port (National Semiconductor PC16550D): registers, both FIFOs, interrupts, loopback. Sending takes no
// time, so the transmitter is always empty.
#pragma once

#include <deque>
#include <functional>
#include <mutex>

#include "vmm/bus.h"
#include "vmm/irq_line.h"

namespace anykvm::vmm {

class Serial16550 final : public IoDevice {
 public:
  static constexpr u64 port_count = 8;

  /// Whether the other end waits for RTS. Drivers of operating systems raise it; those of firmware may not.
  enum class Flow { rts, none };

  /// `send` gets every byte the guest sends, on the vCPU's thread.
  Serial16550(IrqLine& irq, std::function<void(u8)> send, Flow flow = Flow::rts)
      : irq_(irq), send_(std::move(send)), flow_(flow) {}

  /// Bytes for the guest. They wait in a queue of the host's while the guest's FIFO is full or, by Flow::rts, its
  /// driver has not raised RTS: what is piped in before the driver is up is not lost when that clears the FIFO. Any
  /// thread.
  void receive(std::span<const u8> bytes);
  /// Bytes that wait in the host's queue.
  size_t backlog() const;
  /// Called on a vCPU's thread each time the guest has emptied the host's queue. Set before the guest runs.
  void on_drained(std::function<void()> callback) { drained_ = std::move(callback); }

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  u8 read_register(u64 offset);
  void write_register(u64 offset, u8 value);
  void write_modem_control(u8 value);
  bool fifo_enabled() const;
  size_t fifo_room() const;
  void fill_fifo();
  u8 interrupt_cause() const;
  void update_irq();
  u8 modem_status() const;

  IrqLine& irq_;
  std::function<void(u8)> send_;
  Flow flow_;
  std::function<void()> drained_;

  mutable std::mutex mutex_;
  std::deque<u8> backlog_;
  std::deque<u8> fifo_;
  bool overrun_ = false;
  bool transmit_empty_pending_ = false;
  bool irq_level_ = false;
  u8 interrupt_enable_ = 0, fifo_control_ = 0, line_control_ = 0, modem_control_ = 0, scratch_ = 0;
  u8 modem_delta_ = 0;
  u8 divisor_low_ = 12, divisor_high_ = 0;
};

}  // namespace anykvm::vmm
