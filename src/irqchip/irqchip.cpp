// See irqchip.h.
#include "irqchip/irqchip.h"

#include <cerrno>
#include <cstring>

namespace anykvm::irqchip {

/// What an access has brought about, told when the lock is released.
struct IrqChips::News {
  bool pic_output_rose = false;
  u32 pic_ended = 0, pic_unmasked = 0;
  u32 ioapic_ended = 0, ioapic_unmasked = 0;
  u32 ioapic_to_resume = 0;
};

IrqChips::IrqChips(ApicBus& bus) : bus_(bus), ioapic_(bus) { bus_.set_eoi_sink(this); }

IrqChips::~IrqChips() { bus_.set_eoi_sink(nullptr); }

void IrqChips::collect(News& news) {
  const bool output = pic_.output();
  if (output != pic_output_.load(std::memory_order_relaxed)) {
    pic_output_.store(output, std::memory_order_release);
    news.pic_output_rose = output;
  }
  news.pic_ended |= pic_.take_ended();
  news.pic_unmasked |= pic_.take_unmasked();
  const u32 held = ioapic_.take_held();
  news.ioapic_ended |= held;
  news.ioapic_to_resume |= held;
  news.ioapic_unmasked |= ioapic_.take_unmasked();
}

void IrqChips::tell(const News& news) {
  if (news.pic_output_rose) bus_.wake_pic_taker();
  if (!(news.pic_ended | news.pic_unmasked | news.ioapic_ended | news.ioapic_unmasked)) return;
  if (IrqChipsListener* listener = listener_.load(std::memory_order_acquire)) {
    const auto pic_chip = [](unsigned line) -> u32 {
      return line < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
    };
    for (unsigned line = 0; line < 16; ++line) {
      if (news.pic_unmasked >> line & 1) listener->pin_unmasked(pic_chip(line), line % 8);
      if (news.pic_ended >> line & 1) listener->interrupt_ended(pic_chip(line), line % 8);
    }
    for (unsigned pin = 0; pin < IoApic::pins; ++pin) {
      if (news.ioapic_unmasked >> pin & 1) listener->pin_unmasked(KVM_IRQCHIP_IOAPIC, pin);
      if (news.ioapic_ended >> pin & 1) listener->interrupt_ended(KVM_IRQCHIP_IOAPIC, pin);
    }
  }
  if (news.ioapic_to_resume) {
    std::lock_guard lock(mutex_);
    ioapic_.resume(news.ioapic_to_resume);
  }
}

// --- lines -----------------------------------------------------------------------------------------------------------

int IrqChips::set_pic_line(unsigned line, unsigned source, bool level) {
  News news;
  int result;
  {
    std::lock_guard lock(mutex_);
    result = pic_.set_line(line, source, level);
    collect(news);
  }
  tell(news);
  return result;
}

int IrqChips::set_ioapic_pin(unsigned pin, unsigned source, bool level) {
  std::lock_guard lock(mutex_);
  return ioapic_.set_pin(pin, source, level);
}

int IrqChips::pic_acknowledge() {
  News news;
  int vector = -1;
  {
    std::lock_guard lock(mutex_);
    if (pic_output_.load(std::memory_order_relaxed)) vector = pic_.acknowledge();
    collect(news);
  }
  tell(news);
  return vector;
}

void IrqChips::set_watched_pins(u32 pins) {
  std::lock_guard lock(mutex_);
  watched_pins_ = pins;
  ioapic_.set_held_pins(pins);
  update_edge_eoi_vectors();
}

void IrqChips::update_edge_eoi_vectors() {
  u64 vectors[4] = {};
  for (unsigned pin = 0; pin < IoApic::pins; ++pin)
    if (watched_pins_ >> pin & 1) vectors[ioapic_.vector(pin) / 64] |= u64{1} << (ioapic_.vector(pin) % 64);
  for (unsigned i = 0; i < 4; ++i) edge_eoi_vectors_[i].store(vectors[i], std::memory_order_relaxed);
}

void IrqChips::eoi(u8 vector, bool level_triggered, ApicClient&) {
  News news;
  {
    std::lock_guard lock(mutex_);
    news.ioapic_ended = ioapic_.eoi(vector, level_triggered, watched_pins_);
    news.ioapic_to_resume = level_triggered ? news.ioapic_ended & watched_pins_ : 0;
    collect(news);
  }
  tell(news);
}

// --- the guest's accesses --------------------------------------------------------------------------------------------

bool IrqChips::pio_read(u16 port, void* data, unsigned size) {
  if (Pic::covers(port, size)) {
    std::memset(data, 0, size);
    if (size != 1) return true;  // the 8259 is a byte-wide device
    News news;
    {
      std::lock_guard lock(mutex_);
      *static_cast<u8*>(data) = pic_.read(port);
      collect(news);
    }
    tell(news);
    return true;
  }
  if (Pit* timer = pit(); timer && timer->covers(port, size)) {
    std::memset(data, 0, size);
    *static_cast<u8*>(data) = timer->read(port);
    return true;
  }
  return false;
}

bool IrqChips::pio_write(u16 port, const void* data, unsigned size) {
  const u8 value = *static_cast<const u8*>(data);
  if (Pic::covers(port, size)) {
    if (size != 1) return true;
    News news;
    {
      std::lock_guard lock(mutex_);
      pic_.write(port, value);
      collect(news);
    }
    tell(news);
    return true;
  }
  if (Pit* timer = pit(); timer && timer->covers(port, size)) {
    timer->write(port, value);
    return true;
  }
  return false;
}

bool IrqChips::mmio_read(Gpa gpa, void* data, unsigned length) {
  if (!ioapic_.covers(gpa)) return false;
  std::lock_guard lock(mutex_);
  const u64 value = ioapic_.read(gpa);
  std::memcpy(data, &value, length);
  return true;
}

bool IrqChips::mmio_write(Gpa gpa, const void* data, unsigned length) {
  if (!ioapic_.covers(gpa)) return false;
  News news;
  {
    std::lock_guard lock(mutex_);
    u32 value = 0;
    std::memcpy(&value, data, length < sizeof value ? length : sizeof value);
    ioapic_.write(gpa, value);
    update_edge_eoi_vectors();
    collect(news);
  }
  tell(news);
  return true;
}

// --- the PIT and state -----------------------------------------------------------------------------------------------

int IrqChips::create_pit(os::TimerQueue& timers, PitOutput& output, u32 flags) {
  std::lock_guard lock(mutex_);
  if (pit_) return -EEXIST;
  pit_ = std::make_unique<Pit>(timers, output, flags & KVM_PIT_SPEAKER_DUMMY);
  pit_published_.store(pit_.get(), std::memory_order_release);
  return 0;
}

void IrqChips::destroy_pit() {
  // Not under the lock: a tick that is just being given wants it.
  std::unique_ptr<Pit> pit;
  {
    std::lock_guard lock(mutex_);
    pit_published_.store(nullptr, std::memory_order_release);
    pit = std::move(pit_);
  }
}

int IrqChips::get_state(kvm_irqchip& chip) {
  std::lock_guard lock(mutex_);
  switch (chip.chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
    case KVM_IRQCHIP_PIC_SLAVE: chip.chip.pic = pic_.get_state(chip.chip_id); return 0;
    case KVM_IRQCHIP_IOAPIC: ioapic_.get_state(chip.chip.ioapic); return 0;
    default: return -EINVAL;
  }
}

int IrqChips::set_state(const kvm_irqchip& chip) {
  News news;
  {
    std::lock_guard lock(mutex_);
    switch (chip.chip_id) {
      case KVM_IRQCHIP_PIC_MASTER:
      case KVM_IRQCHIP_PIC_SLAVE: pic_.set_state(chip.chip_id, chip.chip.pic); break;
      case KVM_IRQCHIP_IOAPIC:
        ioapic_.set_state(chip.chip.ioapic);
        update_edge_eoi_vectors();
        break;
      default: return -EINVAL;
    }
    collect(news);
  }
  tell(news);
  return 0;
}

}  // namespace anykvm::irqchip
