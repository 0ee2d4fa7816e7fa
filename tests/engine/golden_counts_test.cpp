// How many host instructions are emitted for common forms: the numbers in golden_counts.S.
//
// Counted is the hot part, from where the form's code begins to where that of the instruction behind it does, or to its
// end: what is emitted, not what runs, so both ways of a branch count. Where the translator changes on purpose,
//
//   ANYKVM_GOLDEN_COUNTS=write build/release/bin/engine_tests --gtest_filter='GoldenCounts.*'
//
// writes the new numbers into golden_counts.S, one line for each form; its diff is what the change costs and gains.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "engine/interpret/handlers.h"
#include "engine/translate/block.h"

namespace anykvm::engine::translate {
namespace {

enum Situation : u64 { user, flags, kernel, user32 };

/// As golden_counts.S has it.
struct Form {
  const u8 *begin, *end;
  const char* text;
  Situation situation;
  u64 count;
};

extern "C" const Form anykvm_golden_begin[], anykvm_golden_end[];

/// A page with the form and what reads or overwrites the flags behind it, translated.
class Translated {
 public:
  explicit Translated(const Form& form) : page_(page_size, 0xf4) {
    static constexpr u8 overwrites_flags[] = {0x39, 0xc0};  // cmp eax, eax
    static constexpr unsigned at = 0x100;
    const unsigned behind = at + unsigned(form.end - form.begin);
    std::memcpy(&page_[at], form.begin, behind - at);
    if (form.situation != flags) std::memcpy(&page_[behind], overwrites_flags, sizeof overwrites_flags);

    Assembler a(cache_.room().hot, cache_.room_end().hot);
    const Stubs stubs = emit_stubs(a, true);
    cache_.keep_code(a.here());
    const bool supervisor = form.situation == kernel;
    const BlockRequest request{.page = page_.data(),
                               .address = reinterpret_cast<u64>(page_.data()),
                               .offset = at,
                               .mode = {supervisor ? x86::Privilege::supervisor : x86::Privilege::user,
                                        supervisor ? no_vectors : all_vectors, form.situation == user32},
                               .stubs = &stubs,
                               .decoder = &decoder_,
                               .cache = &cache_};
    const u8* const code = cache_.room().hot;
    const BlockCode block = translate_block(request, cache_.room(), cache_.room_end());
    if (!block.end.hot) {
      ADD_FAILURE() << "there is no block";
      return;
    }
    const u8* end = code + block.code_bytes;
    PlaceReader places(block.places);
    for (unsigned n = 0; n < block.instructions; ++n) {
      const PlaceInBlock place = places.next();
      if (place.offset >= at && place.offset < behind) continue;
      end = code + place.code;
      break;
    }
    list(code, end);
  }

  unsigned count() const { return count_; }
  const std::string& listing() const { return listing_; }

 private:
  void list(const u8* at, const u8* end) {
    ZydisFormatter formatter;
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    while (at < end) {
      Decoded d;
      if (!ZYAN_SUCCESS(decode_instruction(at, unsigned(end - at), 64, d))) {
        listing_ += "  what is no instruction\n";
        return;
      }
      char text[128];
      ZydisFormatterFormatInstruction(&formatter, &d.instruction, d.operands, d.instruction.operand_count_visible, text,
                                      sizeof text, ZYDIS_RUNTIME_ADDRESS_NONE, nullptr);
      listing_ += "  " + std::string(text) + "\n";
      at += d.instruction.length;
      ++count_;
    }
  }

  std::vector<u8> page_;
  CodeMemory memory_;
  CodeCache cache_{memory_};
  Decoder decoder_;
  std::string listing_;
  unsigned count_ = 0;
};

/// The line of golden_counts.S.
std::string row(const Form& form, unsigned count) {
  static constexpr const char* names[] = {"user", "flags", "kernel", "user32"};
  char beginning[32];
  std::snprintf(beginning, sizeof beginning, "%-6s %3u, \"", names[form.situation], count);
  return beginning + std::string(form.text) + '"';
}

void write(const std::vector<std::string>& rows) {
  const std::string path = ANYKVM_SOURCE_DIR "/tests/engine/golden_counts.S";
  std::ifstream in(path);
  std::string text, line;
  for (auto next = rows.begin(); std::getline(in, line); text += line + '\n')
    if (line.starts_with("user ") || line.starts_with("flags ") || line.starts_with("kernel ") ||
        line.starts_with("user32 ")) {
      ASSERT_NE(next, rows.end());
      line = *next++;
    }
  in.close();
  std::ofstream(path) << text;
}

TEST(GoldenCounts, CommonFormsBecomeAsManyInstructionsAsEver) {
  const std::span<const Form> forms(anykvm_golden_begin, anykvm_golden_end);
  ASSERT_GT(forms.size(), 100u);
  std::vector<std::string> rows;
  for (const Form& form : forms) {
    const Translated translated(form);
    rows.push_back(row(form, translated.count()));
    EXPECT_EQ(translated.count(), form.count) << "golden_counts.S has\n  " << row(form, unsigned(form.count))
                                              << "\nbut now it is\n  " << rows.back() << "\nfor\n"
                                              << translated.listing();
  }
  if (const char* wish = std::getenv("ANYKVM_GOLDEN_COUNTS"); wish && !std::strcmp(wish, "write")) write(rows);
}

}  // namespace
}  // namespace anykvm::engine::translate
