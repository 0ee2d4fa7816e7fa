// The command from the outside: exit codes, one line per error, help and version. The binary is the one built beside
// this test program.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <string>

namespace anykvm::tools {
namespace {

using ::testing::HasSubstr;

std::string command_path() { return std::filesystem::read_symlink("/proc/self/exe").parent_path() / "anykvm"; }

struct Result {
  int status;
  std::string output;  ///< both streams
};

Result run(const std::string& arguments) {
  const std::string line = command_path() + " " + arguments + " 2>&1 < /dev/null";
  FILE* pipe = popen(line.c_str(), "r");
  std::string output;
  std::array<char, 4096> buffer;
  while (const size_t got = fread(buffer.data(), 1, buffer.size(), pipe)) output.append(buffer.data(), got);
  return {WEXITSTATUS(pclose(pipe)), output};
}

struct CommandTest : ::testing::Test {
  void SetUp() override {
    if (access(command_path().c_str(), X_OK) != 0) GTEST_SKIP() << "the command is not built";
  }
  void expect_usage_error(const std::string& arguments, const std::string& says) {
    const auto result = run(arguments);
    EXPECT_EQ(result.status, 64) << arguments;
    EXPECT_THAT(result.output, HasSubstr(says)) << arguments;
    EXPECT_EQ(std::ranges::count(result.output, '\n'), 1) << result.output;
    EXPECT_TRUE(result.output.starts_with("anykvm: ")) << result.output;
  }
};

TEST_F(CommandTest, HelpAndVersion) {
  const auto version = run("--version");
  EXPECT_EQ(version.status, 0);
  EXPECT_TRUE(version.output.starts_with("anykvm "));
  EXPECT_EQ(run("--help").status, 0);
  const auto help = run("boot --help");
  EXPECT_EQ(help.status, 0);
  for (const char* option :
       {"--kernel", "--initrd", "--append", "--firmware", "--firmware-log", "--boot-menu", "--memory", "--cpus",
        "--disk", "--net", "--engine", "--timeout", "--quiet", "Ctrl-A x", "124"})
    EXPECT_THAT(help.output, HasSubstr(option));
}

TEST_F(CommandTest, UsageErrorsAreOneLine) {
  expect_usage_error("", "boot or info");
  expect_usage_error("fly", "fly");
  expect_usage_error("boot", "--kernel");
  expect_usage_error("boot --kernel k --no-such-option", "--no-such-option");
  expect_usage_error("boot --kernel k --firmware f", "excludes");
  expect_usage_error("boot --firmware f --append quiet", "--append");
  expect_usage_error("boot --kernel k --boot-menu", "belong to --firmware");
  expect_usage_error("boot --kernel k stray", "stray");
  expect_usage_error("boot --kernel", "--kernel");
  expect_usage_error("boot --kernel k --cpus 0", "--cpus");
  expect_usage_error("boot --kernel k --cpus many", "--cpus");
  expect_usage_error("boot --kernel k --cpus 256", "--cpus");
  expect_usage_error("boot --kernel k --memory 0", "--memory");
  expect_usage_error("boot --kernel k --memory 12X", "12X");
  expect_usage_error("boot --kernel k --memory -5", "--memory");
  expect_usage_error("boot --kernel k --memory 99999999999999999999", "--memory");
  expect_usage_error("boot --kernel k --memory 2000G", "1024G");
  expect_usage_error("boot --kernel k --engine steam", "steam");
  expect_usage_error("boot --kernel k --net pigeon", "pigeon");
  expect_usage_error("boot --kernel k --timeout soon", "soon");
  expect_usage_error("boot --kernel k --timeout 0", "--timeout");
  expect_usage_error("boot --kernel k --timeout nan", "nan");
  expect_usage_error("boot --kernel k --disk file,rw", "'rw'");
  expect_usage_error("boot --kernel k --disk ,ro", "--disk");
  expect_usage_error("info --jason", "--jason");
}

TEST_F(CommandTest, FilesThatCannotBeUsedEndWith65) {
  const auto result = run("boot --engine interpret --kernel /no/such/kernel");
  EXPECT_EQ(result.status, 65);
  EXPECT_EQ(result.output, "anykvm: cannot open kernel /no/such/kernel: No such file or directory\n");
}

TEST_F(CommandTest, InfoSaysWhatWouldRun) {
  const auto text = run("info");
  EXPECT_EQ(text.status, 0);
  for (const char* part : {"Engine here:", "Because:", "KVM_CREATE_VM", "KVM_CAP_IRQCHIP"})
    EXPECT_THAT(text.output, HasSubstr(part));
  const auto json = run("info --json");
  EXPECT_EQ(json.status, 0);
  EXPECT_EQ(json.output.front(), '{');
  for (const char* part : {"\"serves_stock_guests\"", "\"ioctls\"", "\"capabilities\"", "\"features\""})
    EXPECT_THAT(json.output, HasSubstr(part));
}

}  // namespace
}  // namespace anykvm::tools
