#include "isa/generator.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "isa/sequence.h"
#include "isa/values.h"
#include "x86/state.h"

namespace anykvm::isa {

namespace flag = x86::flag;

Generator::Generator(u64 seed, u64 features, std::vector<Mode> modes) : seed_(seed), features_(features) {
  const char* only = std::getenv("ANYKVM_ISA_ONLY");  // one mnemonic, while looking for something
  for (Mode mode : modes) {
    Forms forms{.mode = mode};
    for (const Form& form : enumerate_forms(mode, features >> 5 & 1)) {
      if (only && !(form.defined && !std::strcmp(only, ZydisMnemonicGetString(form.mnemonic)))) continue;
      (form.faults ? forms.faults : forms.runs).push_back(form);
    }
    modes_.push_back(std::move(forms));
  }
  Random random(seed, ~0ull);
  base_ = {};
  for (unsigned n = 0; n < 32; ++n)
    for (unsigned at = 0; at < 16; at += 8) {
      const u64 lane = any_lane(random, Lanes::mixed);
      std::memcpy(base_.xmm(n) + at, &lane, 8);
    }
  const auto fill = [&](void* to, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += 8) {
      const u64 lane = any_lane(random, Lanes::mixed);
      std::memcpy(static_cast<u8*>(to) + at, &lane, 8);
    }
  };
  fill(base_.ymm_high, sizeof base_.ymm_high);
  if (features >> 5 & 1) {
    fill(base_.opmask, sizeof base_.opmask);
    fill(base_.zmm_high, sizeof base_.zmm_high);
    fill(base_.zmm_upper, sizeof base_.zmm_upper);
  } else {
    std::memset(base_.zmm_upper, 0, sizeof base_.zmm_upper);
  }
  fill(pattern_, sizeof pattern_);
  // The image for XRSTOR and FXRSTOR: a header that names the components that take part.
  u8* image = pattern_ + image_offset;
  const u16 fcw = 0x37f, fsw = 0;
  const u32 mxcsr = 0x1f80, mxcsr_mask = 0xffff;
  std::memcpy(image, &fcw, 2);
  std::memcpy(image + 2, &fsw, 2);
  std::memcpy(image + 24, &mxcsr, 4);
  std::memcpy(image + 28, &mxcsr_mask, 4);
  std::memset(image + 512, 0, 64);
  std::memcpy(image + 512, &features, 8);
}

Generator::Coverage Generator::coverage(Mode mode) const {
  for (const Forms& forms : modes_)
    if (forms.mode == mode) {
      std::size_t undefined = 0;
      for (const Form& form : forms.faults) undefined += !form.defined;
      return {forms.runs.size() + forms.faults.size(), undefined};
    }
  return {};
}

/// The first form of each case is the next one of the list in an order of the seed's own, so that all have their turn;
/// a case in sixteen begins with one that faults. The others are random.
const Form& Generator::choose(const Forms& forms, u64 turn, bool first, Random& random) const {
  const bool fault = forms.runs.empty() || (!forms.faults.empty() && (first ? turn % 16 == 15 : random.one_in(64)));
  const std::vector<Form>& from = fault ? forms.faults : forms.runs;
  if (!first) return from[random.below(unsigned(from.size()))];
  u64 stride = (seed_ + 1) * 7919 % from.size() | 1;
  while (std::gcd(stride, u64(from.size())) != 1) stride += 2;
  return from[(fault ? turn / 16 : turn) * stride % from.size()];
}

void Generator::begin(u64 number, Mode mode, Case& c) const {
  c.number = number;
  c.mode = mode;
  c.instructions = 0;
  c.code_length = 0;
  c.poke_count = c.ignored_count = 0;
  c.in = base_;
}

void Generator::sort_out(Worker& worker) {
  constexpr unsigned tries = 4;
  static_assert(Worker::batch % tries == 0);
  for (Forms& forms : modes_) {
    std::vector<Form> runs;
    for (std::size_t at = 0; at < forms.runs.size(); at += Worker::batch / tries) {
      const std::size_t count = std::min<std::size_t>(Worker::batch / tries, forms.runs.size() - at);
      for (unsigned n = 0; n < count * tries; ++n) {
        Case& c = worker.cases()[n];
        begin(n, forms.mode, c);
        Random random(0, (at + n / tries) * tries + n % tries);
        Sequence sequence(c, random, features_);
        (void)sequence.add(forms.runs[at + n / tries]);
        sequence.finish();
      }
      worker.run(unsigned(count * tries));
      for (unsigned n = 0; n < count; ++n) {
        unsigned refused = 0;  // #UD, or the #GP of privileged instructions
        for (unsigned k = 0; k < tries; ++k) {
          const u32 trap = worker.outcomes()[n * tries + k].trap;
          refused += trap == 6 || trap == 13;
        }
        (refused == tries ? forms.faults : runs).push_back(forms.runs[at + n]);
        if (refused == tries) forms.faults.back().faults = true;
      }
    }
    forms.runs = std::move(runs);
    std::copy_if(forms.runs.begin(), forms.runs.end(), std::back_inserter(forms.common),
                 [](const Form& form) { return form.encoding == Encoding::legacy && form.map == 0; });
  }
}

void Generator::make(u64 number, Case& c) const {
  Random random(seed_, number);
  // Half of all is 64-bit code.
  const u64 others = modes_.size() - 1;
  const bool first_mode = !others || number & 1;
  const Forms& forms = modes_[first_mode ? 0 : 1 + (number >> 1) % others];
  const u64 turn = !others ? number : first_mode ? number >> 1 : (number >> 1) / others;
  begin(number, forms.mode, c);
  Sequence sequence(c, random, features_);
  static constexpr u8 lengths[] = {1, 1, 2, 2, 3, 4, 4};
  const unsigned wanted = lengths[random.below(sizeof lengths)];
  for (unsigned n = 0; n < wanted; ++n) {
    const Form& form = choose(forms, turn, n == 0, random);
    if (sequence.add(form) && form.faults) break;
  }
  sequence.finish();
}

void Generator::make_block(u64 number, Case& c) const {
  Random random(seed_, number);
  const Forms& forms = modes_[0];
  begin(number, forms.mode, c);
  Sequence sequence(c, random, features_, Sequence::Kind::block);
  const unsigned wanted = 2 + random.below(29);
  unsigned loop_end = 0;
  for (unsigned n = 0; n < wanted; ++n) {
    if (loop_end ? n == loop_end : random.one_in(8)) {
      if (loop_end)
        sequence.end_loop(), loop_end = 0;
      else
        sequence.begin_loop(), loop_end = std::min(wanted - 1, n + 1 + random.below(8));
    }
    const bool common = !forms.common.empty() && random.one_in(2);
    const Form& form = common ? forms.common[random.below(unsigned(forms.common.size()))]
                              : choose(forms, number * 31 + n, !random.one_in(8), random);
    if (sequence.add(form) && form.faults) break;
  }
  if (loop_end) sequence.end_loop();
  sequence.finish();
}

}  // namespace anykvm::isa
