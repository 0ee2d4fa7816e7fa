// The command from the outside: exit codes, one line per error, help and version. The binary is the one built beside
// this test program.
#include <elf.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
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
  expect_usage_error("", "boot, info, run or top");
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
  expect_usage_error("boot --kernel k -- stray", "stray");
  expect_usage_error("info --jason", "--jason");
  expect_usage_error("top --interval soon", "soon");
  expect_usage_error("top --count -1", "--count");
  expect_usage_error("run", "program");
  expect_usage_error("run --", "program");
  expect_usage_error("run --fast -- true", "--fast");
  expect_usage_error("run --engine steam -- true", "steam");
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

/// `anykvm run` of files that are not to be run; the ones that are, tests/preload runs.
struct RunTest : CommandTest {
  void SetUp() override {
    CommandTest::SetUp();
    std::string name = std::filesystem::temp_directory_path() / "anykvm-run-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  std::string write(const std::string& name, const std::string& contents, mode_t mode = 0755) const {
    const std::string path = folder / name;
    std::ofstream(path) << contents;
    chmod(path.c_str(), mode);
    return path;
  }
  /// The head of a program that has no interpreter, and nothing else.
  static std::string elf(unsigned char width, Elf64_Half machine) {
    Elf64_Ehdr header{};
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = width;
    header.e_type = ET_EXEC;
    header.e_machine = machine;
    return {reinterpret_cast<const char*>(&header), sizeof header};
  }
  static void expect_refusal(const std::string& program, int status, const std::string& says) {
    const auto result = run("run --engine interpret -- " + program);
    EXPECT_EQ(result.status, status) << program;
    EXPECT_THAT(result.output, HasSubstr(says));
    EXPECT_TRUE(result.output.starts_with("anykvm: ")) << result.output;
    EXPECT_EQ(std::ranges::count(result.output, '\n'), 1) << result.output;
  }

  std::filesystem::path folder;
};

TEST_F(RunTest, HelpSaysWhatTheExitCodesMean) {
  const auto help = run("run --help");
  EXPECT_EQ(help.status, 0);
  for (const char* part : {"--engine", "--quiet", "--stats", "--trace", "-- PROGRAM", "69", "126", "127"})
    EXPECT_THAT(help.output, HasSubstr(part));
}

TEST_F(RunTest, ProgramsThatAreNotThereOrNotExecutable) {
  expect_refusal("anykvm-has-no-such-program", 127, "not found");
  expect_refusal("/no/such/program", 127, "not found");
  expect_refusal("''", 127, "not found");
  expect_refusal(write("notes", "text", 0644), 126, "Permission denied");
  expect_refusal(folder, 126, "Is a directory");
}

TEST_F(RunTest, ProgramsThatPreloadDoesNotReachEndWith69) {
  const std::string fixed = write("static", elf(ELFCLASS64, EM_X86_64));
  expect_refusal(fixed, 69, fixed + " is statically linked");
  expect_refusal(write("old", elf(ELFCLASS32, EM_386)), 69, "is not a 64-bit x86 program");
  expect_refusal(write("far", elf(ELFCLASS64, EM_AARCH64)), 69, "is not a 64-bit x86 program");
  const std::string script = write("script", "#! " + fixed + " -x\n");
  expect_refusal(script, 69, script + " is a script for " + fixed + ", which is statically linked");
  expect_refusal(write("outer", "#!" + script + "\n"), 69, "for " + fixed);
}

TEST_F(RunTest, ATraceThatCannotBeWrittenEndsWith73) {
  const auto result = run("run --engine interpret --trace /no/such/folder/trace -- true");
  EXPECT_EQ(result.status, 73);
  EXPECT_EQ(result.output, "anykvm: cannot write /no/such/folder/trace: No such file or directory\n");
}

TEST_F(RunTest, SetuidProgramsEndWith69) {
  if (getuid() != 0) GTEST_SKIP() << "needs root, to give a file away";
  const std::string program = folder / "true";
  std::filesystem::copy_file("/bin/true", program);
  ASSERT_EQ(chmod(program.c_str(), 04755), 0);
  EXPECT_EQ(run("run --engine host -- " + program).status, 0);
  ASSERT_EQ(chown(program.c_str(), 65534, 65534), 0);
  ASSERT_EQ(chmod(program.c_str(), 04755), 0);
  expect_refusal(program, 69, "is setuid");
  ASSERT_EQ(chmod(program.c_str(), 02755), 0);
  expect_refusal(program, 69, "is setgid");
}

}  // namespace
}  // namespace anykvm::tools
