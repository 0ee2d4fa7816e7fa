// Selector at offset 0, data at 1, DMA address at 4. Everything of DMA and of the directory is big-endian.
#include "vmm/fw_cfg.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace anykvm::vmm {

namespace {

constexpr u64 selector_offset = 0, data_offset = 1, dma_offset = 4, dma_size = 8;
constexpr u32 version_traditional = 1, version_dma = 2;
enum : u32 { dma_error = 1, dma_read = 2, dma_skip = 4, dma_select = 8, dma_write = 16 };

void append_be(std::vector<u8>& to, u64 value, unsigned bytes) {
  for (unsigned i = bytes; i-- > 0;) to.push_back(u8(value >> (8 * i)));
}

u64 read_be(std::span<const u8> from) {
  u64 value = 0;
  for (const u8 byte : from) value = value << 8 | byte;
  return value;
}

std::vector<u8> little_endian(u64 value, unsigned bytes) {
  std::vector<u8> result(bytes);
  for (unsigned i = 0; i < bytes; ++i) result[i] = u8(value >> (8 * i));
  return result;
}

}  // namespace

FwCfg::FwCfg(const GuestMemory& memory) : memory_(memory) {
  add(signature, {'Q', 'E', 'M', 'U'});
  add(id, version_traditional | version_dma, 4);
  update_directory();
}

void FwCfg::add(u16 item, u64 value, unsigned bytes) { add(item, little_endian(value, bytes)); }

void FwCfg::add_file(std::string_view name, u64 value, unsigned bytes) { add_file(name, little_endian(value, bytes)); }

void FwCfg::add_file(std::string_view name, std::vector<u8> bytes) {
  if (name.size() >= name_size) throw std::logic_error("fw_cfg file name is too long: " + std::string(name));
  const u16 item = u16(first_file + files_.size());
  files_.push_back({std::string(name), item});
  add(item, std::move(bytes));
  std::ranges::sort(files_, {}, &File::name);
  update_directory();
}

void FwCfg::update_directory() {
  std::vector<u8> entries;
  append_be(entries, files_.size(), 4);
  for (const File& file : files_) {
    append_be(entries, items_[file.item].size(), 4);
    append_be(entries, file.item, 2);
    append_be(entries, 0, 2);
    entries.insert(entries.end(), file.name.begin(), file.name.end());
    entries.insert(entries.end(), name_size - file.name.size(), 0);
  }
  add(directory, std::move(entries));
}

void FwCfg::select(u16 item) {
  const auto found = items_.find(item);
  selected_ = found == items_.end() ? nullptr : &found->second;
  position_ = 0;
}

/// Behind an item's end, and of an item that is not there, all is zero.
u8 FwCfg::next_byte() { return selected_ && position_ < selected_->size() ? (*selected_)[position_++] : u8{0}; }

u32 FwCfg::perform(u32 control, u32 length, Gpa address) {
  if (control & dma_select) select(u16(control >> 16));
  if (control & dma_write) return dma_error;  // no item can be written
  if (!(control & (dma_read | dma_skip))) return 0;
  const size_t left = selected_ ? selected_->size() - position_ : 0;
  const size_t have = std::min<size_t>(left, length);
  if (control & dma_read) {
    const auto target = memory_.at(address, length);
    if (target.size() != length) return dma_error;
    if (have) std::memcpy(target.data(), selected_->data() + position_, have);
    std::ranges::fill(target.subspan(have), u8{0});
  }
  position_ += have;
  return 0;
}

void FwCfg::transfer(Gpa descriptor) {
  const auto bytes = memory_.at(descriptor, 16);
  if (bytes.empty()) return;
  const u32 control = u32(read_be(bytes.first(4)));
  const u32 result = perform(control, u32(read_be(bytes.subspan(4, 4))), read_be(bytes.subspan(8, 8)));
  for (unsigned i = 0; i < 4; ++i) bytes[i] = u8(result >> (8 * (3 - i)));
}

void FwCfg::read(u64 offset, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset == data_offset) {
    data[0] = next_byte();
  } else if (offset >= dma_offset) {
    static constexpr u8 dma_signature[] = {'Q', 'E', 'M', 'U', ' ', 'C', 'F', 'G'};
    for (size_t i = 0; i < data.size() && offset - dma_offset + i < dma_size; ++i)
      data[i] = dma_signature[offset - dma_offset + i];
  }
}

void FwCfg::write(u64 offset, std::span<const u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset == selector_offset && data.size() == 2) return select(u16(data[0] | data[1] << 8));
  if (data.size() != 4) return;
  if (offset == dma_offset) dma_address_ = read_be(data) << 32;
  if (offset == dma_offset + 4) {  // the low half starts the transfer
    const Gpa descriptor = dma_address_ | read_be(data);
    dma_address_ = 0;
    transfer(descriptor);
  }
}

}  // namespace anykvm::vmm
