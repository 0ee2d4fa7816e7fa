// Time is computed when it is read; what the guest sets is kept as an offset to the host's clock.
#include "vmm/rtc.h"

#include <time.h>

#include <algorithm>

namespace anykvm::vmm {

namespace {
enum : u8 { reg_a = 0x0a, reg_b = 0x0b, reg_c = 0x0c, reg_d = 0x0d };
enum : u8 { a_update = 0x80, b_set = 0x80, b_binary = 0x04, b_24_hours = 0x02, d_valid = 0x80, hour_pm = 0x80 };

/// The chip announces an update of its registers 244 µs before it.
constexpr s64 update_us = 244;
constexpr s64 second_us = 1'000'000;

s64 host_time_us() {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return s64(now.tv_sec) * second_us + now.tv_nsec / 1000;
}
}  // namespace

Rtc::Rtc(u64 low_memory, u64 high_memory) {
  ram_[reg_a] = 0x26;  // 32.768 kHz crystal, 1,024 Hz
  ram_[reg_b] = b_24_hours;
  ram_[reg_d] = d_valid;
  const auto store = [&](u8 index, u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) ram_[index + i] = u8(value >> (8 * i));
  };
  constexpr u64 kib = 1024, mib = kib * kib;
  const u64 extended = low_memory > mib ? low_memory - mib : 0;
  const u64 above_16m = low_memory > 16 * mib ? low_memory - 16 * mib : 0;
  store(0x15, std::min(low_memory / kib, u64{640}), 2);
  store(0x17, std::min(extended / kib, u64{0xffff}), 2);
  store(0x30, std::min(extended / kib, u64{0xffff}), 2);
  store(0x34, std::min(above_16m / (64 * kib), u64{0xffff}), 2);
  store(0x5b, high_memory / (64 * kib), 3);
}

s64 Rtc::guest_time_us() const { return (ram_[reg_b] & b_set) ? stopped_us_ : host_time_us() + offset_us_; }

u8 Rtc::encode(int value) const { return (ram_[reg_b] & b_binary) ? u8(value) : u8((value / 10) << 4 | (value % 10)); }

int Rtc::decode(u8 value) const { return (ram_[reg_b] & b_binary) ? value : (value >> 4) * 10 + (value & 0x0f); }

bool Rtc::time_field(u8 index, int& value) const {
  const time_t seconds = guest_time_us() / second_us;
  tm time;
  gmtime_r(&seconds, &time);
  switch (index) {
    case 0: value = time.tm_sec; return true;
    case 2: value = time.tm_min; return true;
    case 4: value = time.tm_hour; return true;
    case 6: value = time.tm_wday + 1; return true;
    case 7: value = time.tm_mday; return true;
    case 8: value = time.tm_mon + 1; return true;
    case 9: value = time.tm_year % 100; return true;
    case century_register: value = 19 + time.tm_year / 100; return true;
    default: return false;
  }
}

void Rtc::set_time_field(u8 index, int value) {
  const s64 now_us = guest_time_us();
  const time_t seconds = now_us / second_us;
  tm time;
  gmtime_r(&seconds, &time);
  switch (index) {
    case 0: time.tm_sec = value; break;
    case 2: time.tm_min = value; break;
    case 4: time.tm_hour = value; break;
    case 7: time.tm_mday = value; break;
    case 8: time.tm_mon = value - 1; break;
    case 9: time.tm_year = time.tm_year / 100 * 100 + value; break;
    case century_register: time.tm_year = (value - 19) * 100 + time.tm_year % 100; break;
    default:  // the day of the week follows from the date
      return;
  }
  const s64 changed_us = s64(timegm(&time)) * second_us + now_us % second_us;
  if (ram_[reg_b] & b_set)
    stopped_us_ = changed_us;
  else
    offset_us_ += changed_us - now_us;
}

u8 Rtc::read_register(u8 index) {
  int value;
  if (time_field(index, value)) {
    if (index != 4 || (ram_[reg_b] & b_24_hours)) return encode(value);
    const int hour = value % 12 ? value % 12 : 12;
    return encode(hour) | (value >= 12 ? hour_pm : 0);
  }
  if (index == reg_a) {
    const bool updating = !(ram_[reg_b] & b_set) && guest_time_us() % second_us >= second_us - update_us;
    return (ram_[reg_a] & u8(~a_update)) | (updating ? a_update : 0);
  }
  return ram_[index];
}

void Rtc::write_register(u8 index, u8 value) {
  int current;
  if (time_field(index, current)) {
    int wanted = decode(value);
    if (index == 4 && !(ram_[reg_b] & b_24_hours))
      wanted = decode(value & u8(~hour_pm)) % 12 + ((value & hour_pm) ? 12 : 0);
    set_time_field(index, wanted);
  } else if (index == reg_b) {
    const s64 now_us = guest_time_us();
    if ((value & b_set) && !(ram_[reg_b] & b_set)) stopped_us_ = now_us;
    if (!(value & b_set) && (ram_[reg_b] & b_set)) offset_us_ = stopped_us_ - host_time_us();
    ram_[reg_b] = value;
  } else if (index != reg_c && index != reg_d) {
    ram_[index] = value;
  }
}

void Rtc::read(u64 offset, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset == 1) data[0] = read_register(index_);
}

void Rtc::write(u64 offset, std::span<const u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset == 1)
    write_register(index_, data[0]);
  else
    index_ = data[0] & 0x7f;  // bit 7 masks the NMI, which nothing here raises
}

}  // namespace anykvm::vmm
