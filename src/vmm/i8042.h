// The 8042 keyboard controller, with a keyboard on which nobody types: enough for a driver's probe to end at once, and
// for the reset line that software pulls through it. (IBM PC AT Technical Reference, section "Keyboard controller".)
#pragma once

#include <deque>
#include <functional>
#include <mutex>

#include "vmm/bus.h"
#include "vmm/irq_line.h"

namespace anykvm::vmm {

/// Add it twice: data() at port 0x60 and command() at 0x64, one byte each.
class I8042 {
 public:
  /// `reset` is called, on a vCPU's thread, when the guest pulls the reset line.
  I8042(IrqLine& keyboard_irq, std::function<void()> reset);

  IoDevice& data() { return data_port_; }
  IoDevice& command() { return command_port_; }

 private:
  struct Port final : IoDevice {
    Port(I8042& owner, bool is_command) : owner(owner), is_command(is_command) {}
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    I8042& owner;
    bool is_command;
  };
  struct Byte {
    u8 value;
    u8 status;  ///< extra bits of the status register while this byte is next
  };

  u8 read_data();
  u8 read_status() const;
  void write_data(u8 value);
  void write_command(u8 value);
  void to_keyboard(u8 value);
  void answer(u8 value, u8 status = 0) { output_.push_back({value, status}); }
  void update_irq();

  IrqLine& irq_;
  std::function<void()> reset_;
  Port data_port_, command_port_;

  std::mutex mutex_;
  std::deque<Byte> output_;
  u8 pending_command_ = 0;   ///< a controller command that waits for its byte
  u8 keyboard_command_ = 0;  ///< a keyboard command that waits for its byte
  u8 control_ = 0x44;        ///< system flag, translation; interrupts off
  bool wants_reset_ = false;
  bool irq_level_ = false;
};

}  // namespace anykvm::vmm
