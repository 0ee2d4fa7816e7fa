// Decodes guest instructions, most of them without Zydis.
#pragma once

#include "engine/translate/analysis.h"

namespace anykvm::engine::translate {

/// Remembers what Zydis said of instructions that differ only in the numbers of registers, displacements and
/// immediates from one that it decoded before. Of the commonest opcodes (decoder.cpp says which) this is all that there
/// is to know.
class Decoder {
 public:
  Decoder();
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  /// The instruction at `bytes`; those behind `available` are not looked at. false: it is undefined, or goes on behind
  /// `available`; `out` may have changed then.
  bool decode(const u8* bytes, unsigned available, CodeKind code, GuestInstruction& out);

 private:
  struct alignas(64) Shape {
    u32 key;  ///< 0: none
    GuestInstruction instruction;
  };
  static constexpr unsigned shape_bits = 11, shape_count = 1u << shape_bits;

  bool decode_with_zydis(const u8* bytes, unsigned available, CodeKind code, Shape* shape, u32 key,
                         GuestInstruction& out);
  bool decode_known(const u8* bytes, unsigned available, CodeKind code, GuestInstruction& out);

  Shape* shapes_;  ///< [shape_count], mapped lazily
};

}  // namespace anykvm::engine::translate
