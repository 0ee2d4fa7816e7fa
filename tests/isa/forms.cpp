#include "isa/forms.h"

#include <cpuid.h>

#include <map>
#include <tuple>

namespace anykvm::isa {

namespace {

constexpr u8 prefix_of[4] = {0, 0x66, 0xf3, 0xf2};

/// Whether the host's XCR0 has components that are not compared.
bool host_has_more_state() {
  u32 low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low & ~compared_state || high;
}

bool is_prefix(Mode mode, u8 byte) {
  return engine::is_legacy_prefix(byte) || (mode == Mode::code64 && (byte & 0xf0) == 0x40);
}

/// What an encoding is, so that two that are the same count once.
struct Signature {
  ZydisMnemonic mnemonic = ZYDIS_MNEMONIC_INVALID;
  u64 operands = 0;
  bool has_modrm = false;
  bool defined = false, masks = false;  ///< masks: names an opmask register
  const char* excluded = nullptr;
  bool operator==(const Signature&) const = default;
};

Signature sign(Mode mode, const Form& form, const Fields& fields) {
  u8 bytes[16 + 15] = {};
  form.assemble(fields, mode, bytes);
  engine::Decoded decoded;
  if (!decode(mode, bytes, 15, decoded)) return {};
  const auto& [d, operands] = decoded;
  Signature s{.mnemonic = d.mnemonic, .has_modrm = (d.attributes & ZYDIS_ATTRIB_HAS_MODRM) != 0, .defined = true};
  s.excluded = exclusion(d, operands);
  for (unsigned n = 0; n < d.operand_count; ++n) {
    if (operands[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
        ZydisRegisterGetClass(operands[n].reg.value) == ZYDIS_REGCLASS_MASK)
      s.masks = true;
    s.operands = s.operands * 0x100000001b3 ^ (u64(operands[n].type) << 40 | u64(operands[n].size) << 16 |
                                               u64(operands[n].encoding) << 8 | u64(operands[n].element_type));
  }
  return s;
}

/// Ends in an exception whenever CPL is 3, or where Linux has the feature off.
bool always_faults(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_IN:
    case ZYDIS_MNEMONIC_OUT:
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_INSD:
    case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW:
    case ZYDIS_MNEMONIC_OUTSD:
    case ZYDIS_MNEMONIC_HLT:
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_INT:
    case ZYDIS_MNEMONIC_INT3:
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2: return true;
    default: return false;
  }
}

class Enumeration {
 public:
  Enumeration(Mode mode, bool with_evex) : mode_(mode), with_evex_(with_evex) {}

  void legacy() {
    for (u8 map = 0; map < 4; ++map)
      for (unsigned opcode = 0; opcode < 256; ++opcode) {
        if (map == 0 &&
            (is_prefix(mode_, u8(opcode)) || opcode == 0x0f || opcode == 0x62 || opcode == 0xc4 || opcode == 0xc5)) {
          // 62, C4 and C5 are BOUND, LES and LDS only where ModRM says memory.
          if (mode_ == Mode::code64 || is_prefix(mode_, u8(opcode)) || opcode == 0x0f) continue;
        }
        if (map == 1 && (opcode == 0x38 || opcode == 0x3a)) continue;
        for (u8 pp = 0; pp < 4; ++pp)
          for (unsigned w = 0; w < (mode_ == Mode::code64 ? 2u : 1u); ++w) {
            Form form{.map = map, .opcode = u8(opcode), .pp = pp, .w = w != 0};
            const bool not_vex = map == 0 && (opcode == 0x62 || opcode == 0xc4 || opcode == 0xc5);
            add(form, not_vex);
          }
      }
  }
  void vex() {
    for (u8 map = 1; map < 4; ++map)
      for (unsigned opcode = 0; opcode < 256; ++opcode)
        for (unsigned rest = 0; rest < 16; ++rest)
          add({.encoding = Encoding::vex,
               .map = map,
               .opcode = u8(opcode),
               .pp = u8(rest & 3),
               .l = u8(rest >> 3),
               .w = (rest & 4) != 0},
              false);
  }
  void evex() {
    for (u8 map : {1, 2, 3, 5, 6})
      for (unsigned opcode = 0; opcode < 256; ++opcode)
        for (unsigned rest = 0; rest < 64; ++rest)
          add({.encoding = Encoding::evex,
               .map = map,
               .opcode = u8(opcode),
               .pp = u8(rest & 3),
               .l = u8(rest >> 3 & 3),
               .w = (rest & 4) != 0,
               .broadcast = (rest & 32) != 0},
              false);
  }
  std::vector<Form> take() { return std::move(forms_); }

 private:
  void add(const Form& form, bool memory_only) {
    if (form.encoding == Encoding::legacy && form.map == 1 && (form.opcode == 0x05 || form.opcode == 0x34))
      return;  // SYSCALL, SYSENTER: also where the decoder does not know them
    if (!group(form, Form::memory) && !memory_only) (void)group(form, Form::registers);
  }

  /// The forms with memory or with registers; as few as tell all values of ModRM.reg (and of rm) apart. true: there is
  /// no ModRM, and this was all.
  bool group(Form form, Form::Kind kind) {
    form.kind = kind;
    Signature by_reg[8];
    bool alike = true;
    for (u8 reg = 0; reg < 8; ++reg) {
      by_reg[reg] = best(form, reg);
      alike = alike && by_reg[reg] == by_reg[0];
    }
    if (by_reg[0].defined && !by_reg[0].has_modrm && alike) {
      form.kind = Form::plain;
      keep(form, by_reg[0], -1, -1);
      return true;
    }
    if (alike && !by_rm(form, 0, by_reg[0])) {
      keep(form, by_reg[0], -1, -1);
      return false;
    }
    for (u8 reg = 0; reg < 8; ++reg) {
      if (kind == Form::registers && by_rm(form, reg, by_reg[reg])) {
        for (u8 rm = 0; rm < 8; ++rm) {
          Form one = form;
          one.rm = s8(rm);
          keep(one, sign(mode_, form, {.reg = reg, .rm = rm, .mod = 3}), s8(reg), s8(rm));
        }
      } else {
        keep(form, by_reg[reg], s8(reg), -1);
      }
    }
    return false;
  }
  bool by_rm(const Form& form, u8 reg, const Signature& first) const {
    if (form.kind != Form::registers) return false;
    for (u8 rm = 1; rm < 8; ++rm)
      if (!(sign(mode_, form, {.reg = reg, .rm = rm, .mod = 3}) == first)) return true;
    return false;
  }
  /// The signature with whatever of SIB and mask the form needs.
  Signature best(Form& form, u8 reg) const {
    const u8 mod = form.kind == Form::registers ? 3 : 0;
    Signature s = sign(mode_, form, {.reg = reg, .mod = mod});
    if (s.defined) return s;
    if (form.kind == Form::memory && mode_ != Mode::code16) {
      s = sign(mode_, form, {.reg = reg, .rm = 4, .mod = mod, .sib = 0x08});
      if (s.defined) form.needs_sib = true;
    }
    if (!s.defined && form.encoding == Encoding::evex) {
      s = sign(mode_, form, {.reg = reg, .mod = mod, .mask = 1});
      if (s.defined) form.needs_mask = true;
      if (!s.defined && form.kind == Form::memory) {
        s = sign(mode_, form, {.reg = reg, .rm = 4, .mod = mod, .sib = 0x08, .mask = 1});
        if (s.defined) form.needs_mask = form.needs_sib = true;
      }
    }
    return s;
  }

  void keep(Form form, const Signature& s, s8 reg, s8 rm) {
    if (s.excluded || (s.masks && !with_evex_)) return;
    // VMCALL and VMMCALL to the processor, with prefixes that the decoder does not know them with.
    if (!s.defined && form.encoding == Encoding::legacy && form.map == 1 && form.opcode == 1 &&
        form.kind == Form::registers)
      return;
    form.reg = reg;
    form.rm = rm;
    form.defined = s.defined;
    form.mnemonic = s.mnemonic;
    form.masks = s.masks;
    form.faults = !s.defined || always_faults(s.mnemonic);
    // What a prefix or W leaves as it was is no form of its own.
    const auto key = std::tuple(form.encoding, form.map, form.opcode, form.l, form.kind, form.reg, form.rm,
                                form.broadcast, s.mnemonic, s.operands);
    if (!seen_.emplace(key, 0).second) return;
    if (form.defined && form.encoding != Encoding::legacy) {
      Fields f{.reg = u8(reg < 0 ? 0 : reg),
               .rm = u8(rm < 0 ? 0 : rm),
               .vvvv = 5,
               .mod = u8(form.kind == Form::registers ? 3 : 0)};
      if (form.needs_sib) f.rm = 4, f.sib = 0x08;
      if (form.needs_mask) f.mask = 1;
      form.takes_vvvv = sign(mode_, form, f).defined;
      f.vvvv = 0;
      f.mask = 1;
      form.takes_mask = form.encoding == Encoding::evex && sign(mode_, form, f).defined;
      f.zeroing = true;
      form.takes_zeroing = form.encoding == Encoding::evex && sign(mode_, form, f).defined;
    }
    forms_.push_back(form);
  }

  Mode mode_;
  bool with_evex_;
  std::vector<Form> forms_;
  std::map<std::tuple<Encoding, u8, u8, u8, Form::Kind, s8, s8, bool, ZydisMnemonic, u64>, int> seen_;
};

}  // namespace

bool decode(Mode mode, const u8* bytes, unsigned available, engine::Decoded& out) {
  return ZYAN_SUCCESS(engine::decode_instruction(bytes, available, bits_of(mode), out));
}

unsigned Form::assemble(const Fields& f, Mode mode, u8* out) const {
  u8* at = out;
  const u8 reg_number = reg >= 0 ? u8((f.reg & 0x18) | reg) : f.reg;
  const u8 rm_number = rm >= 0 ? u8((f.rm & 0x18) | rm) : f.rm;
  const bool is_memory = kind == memory;
  const u8 mod = is_memory ? f.mod : 3;
  const bool has_sib = is_memory && mode != Mode::code16 && (rm_number & 7) == 4;
  // Inverted bits of VEX and EVEX; 16- and 32-bit code has eight registers, and these bits tell the prefix from BOUND,
  // LES and LDS.
  const bool wide = mode == Mode::code64;
  const unsigned r = wide ? reg_number >> 3 & 1 : 0, b = wide ? rm_number >> 3 & 1 : 0;
  const unsigned x = !wide ? 0 : is_memory ? f.index_high : rm_number >> 4 & 1;
  const unsigned vvvv = wide ? f.vvvv : f.vvvv & 7;

  switch (encoding) {
    case Encoding::legacy: {
      if (pp) *at++ = prefix_of[pp];
      const u8 rex = u8(0x40 | (w ? 8 : 0) | r << 2 | x << 1 | b);
      if (wide && (rex != 0x40 || f.rex)) *at++ = rex;
      if (map) *at++ = 0x0f;
      if (map >= 2) *at++ = map == 2 ? 0x38 : 0x3a;
      break;
    }
    case Encoding::vex:
      if (f.short_vex && map == 1 && !w && !x && !b) {
        *at++ = 0xc5;
        *at++ = u8((r ^ 1) << 7 | (~vvvv & 15) << 3 | (l & 1) << 2 | pp);
      } else {
        *at++ = 0xc4;
        *at++ = u8((r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map);
        *at++ = u8((w ? 0x80 : 0) | (~vvvv & 15) << 3 | (l & 1) << 2 | pp);
      }
      break;
    case Encoding::evex: {
      const unsigned r2 = wide ? reg_number >> 4 & 1 : 0;
      *at++ = 0x62;
      *at++ = u8((r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | (r2 ^ 1) << 4 | map);
      *at++ = u8((w ? 0x80 : 0) | (~vvvv & 15) << 3 | 4 | pp);
      *at++ = u8((f.zeroing ? 0x80 : 0) | (l & 3) << 5 | (broadcast ? 0x10 : 0) | (~vvvv >> 4 & 1) << 3 | f.mask);
      break;
    }
  }
  *at++ = opcode;
  if (kind == plain) return unsigned(at - out);
  *at++ = u8(mod << 6 | (reg_number & 7) << 3 | (rm_number & 7));
  if (has_sib) *at++ = f.sib;
  return unsigned(at - out);
}

const char* exclusion(const ZydisDecodedInstruction& d, const Operands& operands) {
  switch (d.mnemonic) {
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_SYSENTER: return "enters the kernel";
    case ZYDIS_MNEMONIC_INT: return operands[0].imm.value.u == 0x80 ? "enters the kernel" : nullptr;
    case ZYDIS_MNEMONIC_CPUID: return "the guest's CPUID is its own";
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
    case ZYDIS_MNEMONIC_RDPRU:
    case ZYDIS_MNEMONIC_RDRAND:
    case ZYDIS_MNEMONIC_RDSEED: return "differs from run to run";
    case ZYDIS_MNEMONIC_RDPID: return "tells which processor it runs on";
    case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT:
    case ZYDIS_MNEMONIC_SMSW:
    case ZYDIS_MNEMONIC_STR: return "the kernel emulates it under UMIP";
    case ZYDIS_MNEMONIC_VMCALL:
    case ZYDIS_MNEMONIC_VMMCALL: return "calls the hypervisor, who may run the host";
    case ZYDIS_MNEMONIC_VMRUN:
    case ZYDIS_MNEMONIC_VMLOAD:
    case ZYDIS_MNEMONIC_VMSAVE:
    case ZYDIS_MNEMONIC_STGI:
    case ZYDIS_MNEMONIC_CLGI:
    case ZYDIS_MNEMONIC_SKINIT:
    case ZYDIS_MNEMONIC_INVLPGA: return "#GP or #UD, as the host's EFER.SVME has it";
    case ZYDIS_MNEMONIC_MONITORX:
    case ZYDIS_MNEMONIC_MWAITX:
    case ZYDIS_MNEMONIC_PVALIDATE:
    case ZYDIS_MNEMONIC_RMPADJUST:
    case ZYDIS_MNEMONIC_PSMASH:
    case ZYDIS_MNEMONIC_RMPUPDATE:
    case ZYDIS_MNEMONIC_INVLPGB:
    case ZYDIS_MNEMONIC_TLBSYNC: return "a virtual host has it without saying so";
    case ZYDIS_MNEMONIC_XGETBV: return host_has_more_state() ? "the guest's XCR0 is its own" : nullptr;
    case ZYDIS_MNEMONIC_INT1: return "a hypervisor that intercepts it reports RIP in front of it";
    default: return nullptr;
  }
}

std::vector<Form> enumerate_forms(Mode mode, bool with_evex) {
  Enumeration all(mode, with_evex);
  all.legacy();
  all.vex();
  if (with_evex) all.evex();
  return all.take();
}

}  // namespace anykvm::isa
