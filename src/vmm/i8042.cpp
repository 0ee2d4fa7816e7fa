// Commands of the controller (port 0x64) and of the keyboard behind it (port 0x60).
#include "vmm/i8042.h"

namespace anykvm::vmm {

namespace {
enum : u8 {
  status_output_full = 0x01,
  status_system = 0x04,
  status_command = 0x08,
  status_unlocked = 0x10,
  status_mouse = 0x20,
  status_timeout = 0x40,
  control_keyboard_irq = 0x01,
  keyboard_ack = 0xfa,
  keyboard_resend = 0xfe,
};
}  // namespace

I8042::I8042(IrqLine& keyboard_irq, std::function<void()> reset)
    : irq_(keyboard_irq), reset_(std::move(reset)), data_port_(*this, false), command_port_(*this, true) {}

void I8042::Port::read(u64, std::span<u8> data) {
  const std::scoped_lock lock(owner.mutex_);
  data[0] = is_command ? owner.read_status() : owner.read_data();
  owner.update_irq();
}

void I8042::Port::write(u64, std::span<const u8> data) {
  bool reset;
  {
    const std::scoped_lock lock(owner.mutex_);
    is_command ? owner.write_command(data[0]) : owner.write_data(data[0]);
    owner.update_irq();
    reset = owner.wants_reset_;
    owner.wants_reset_ = false;
  }
  if (reset) owner.reset_();
}

void I8042::update_irq() {
  const bool level = !output_.empty() && !(output_.front().status & status_mouse) && (control_ & control_keyboard_irq);
  if (level != irq_level_) irq_.set(level);
  irq_level_ = level;
}

u8 I8042::read_status() const {
  u8 status = status_system | status_command | status_unlocked;
  if (!output_.empty()) status |= status_output_full | output_.front().status;
  return status;
}

u8 I8042::read_data() {
  if (output_.empty()) return 0;
  const u8 value = output_.front().value;
  output_.pop_front();
  // One byte, one edge.
  if (irq_level_) irq_.set(false);
  irq_level_ = false;
  return value;
}

void I8042::write_command(u8 command) {
  switch (command) {
    case 0x20:  // read the control byte
      return answer(control_);
    case 0x60:  // write the control byte
    case 0xd1:  // write the output port
    case 0xd2:  // loop a byte back as if from the keyboard
    case 0xd3:  // … from the mouse
    case 0xd4:  // send a byte to the mouse
      pending_command_ = command;
      return;
    case 0xa7:  // mouse off
      control_ |= 0x20;
      return;
    case 0xa8:  // mouse on
      control_ &= u8(~0x20);
      return;
    case 0xa9:  // test the mouse's port: there is none
      return answer(0x02);
    case 0xaa:  // self-test
      return answer(0x55);
    case 0xab:  // test the keyboard's port
      return answer(0x00);
    case 0xad:  // keyboard off
      control_ |= 0x10;
      return;
    case 0xae:  // keyboard on
      control_ &= u8(~0x10);
      return;
    case 0xc0:  // read the input port
      return answer(0x80);
    case 0xd0:  // read the output port: A20 on, reset line high
      return answer(0x03);
    default:
      // 0xf0 to 0xff pulse the output lines whose bit is clear; line 0 is the processor's reset.
      if (command >= 0xf0 && !(command & 1)) wants_reset_ = true;
      return;
  }
}

void I8042::write_data(u8 value) {
  const u8 command = pending_command_;
  pending_command_ = 0;
  switch (command) {
    case 0x60: control_ = value; return;
    case 0xd1:
      if (!(value & 1)) wants_reset_ = true;
      return;
    case 0xd2: return answer(value);
    case 0xd3: return answer(value, status_mouse);
    case 0xd4: return answer(keyboard_resend, status_mouse | status_timeout);
    default: return to_keyboard(value);
  }
}

void I8042::to_keyboard(u8 value) {
  if (keyboard_command_) {  // the argument of LEDs, rate, scan code set
    keyboard_command_ = 0;
    return answer(keyboard_ack);
  }
  answer(keyboard_ack);
  switch (value) {
    case 0xed:
    case 0xf0:
    case 0xf3: keyboard_command_ = value; return;
    case 0xf2:  // identify: an MF2 keyboard
      answer(0xab);
      return answer(0x83);
    case 0xff:  // reset, and its self-test's result
      return answer(0xaa);
    default: return;
  }
}

}  // namespace anykvm::vmm
