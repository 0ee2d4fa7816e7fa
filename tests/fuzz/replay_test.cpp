// The corpus once more, in any build and on every engine: each file is an input that found something, or reaches a
// corner.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

#include "engine/engine.h"
#include "fuzz/input.h"

namespace anykvm::fuzz {
namespace {

void replay(const char* name, Target* target) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(ANYKVM_SOURCE_DIR "/tests/fuzz/corpus") / name))
    files.push_back(entry.path());
  std::ranges::sort(files);
  ASSERT_FALSE(files.empty());
  for (const auto& file : files) {
    SCOPED_TRACE(file);
    std::ifstream stream(file, std::ios::binary);
    const std::vector<char> bytes(std::istreambuf_iterator<char>(stream), {});
    target({reinterpret_cast<const u8*>(bytes.data()), bytes.size()});
  }
}

class FuzzCorpus : public testing::TestWithParam<engine::Kind> {
 protected:
  FuzzCorpus() { engine::set_default_kind(GetParam()); }
};
TEST_P(FuzzCorpus, IoctlSequences) { replay("ioctl", ioctl_sequence); }
TEST_P(FuzzCorpus, Guests) { replay("guest", guest); }
INSTANTIATE_TEST_SUITE_P(, FuzzCorpus, testing::Values(engine::Kind::interpret, engine::Kind::translate),
                         [](const auto& engine) { return engine::name_of(engine.param); });

TEST(FuzzLoader, Corpus) { replay("loader", loader); }

}  // namespace
}  // namespace anykvm::fuzz
