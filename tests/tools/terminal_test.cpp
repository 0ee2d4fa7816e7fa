// `anykvm boot` on a terminal: the escape keys, and the terminal's mode given back whatever ends the program.
#include <elf.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include <utmp.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace anykvm::tools {
namespace {

/// An ELF kernel whose PVH entry is `code`.
void write_kernel(const std::string& path, std::vector<unsigned char> code) {
  constexpr unsigned base = 0x100000, headers = sizeof(Elf64_Ehdr) + 2 * sizeof(Elf64_Phdr);
  const unsigned note[] = {4, 4, 18, 0x006e6558, base};
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_machine = EM_X86_64;
  header.e_phoff = sizeof header;
  header.e_phnum = 2;
  const Elf64_Phdr segments[] = {
      {PT_LOAD, 7, headers + sizeof note, base, base, code.size(), code.size(), 4},
      {PT_NOTE, 4, headers, 0, 0, sizeof note, sizeof note, 4},
  };
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header), sizeof header);
  file.write(reinterpret_cast<const char*>(segments), sizeof segments);
  file.write(reinterpret_cast<const char*>(note), sizeof note);
  file.write(reinterpret_cast<const char*>(code.data()), std::streamsize(code.size()));
}

struct TerminalTest : ::testing::Test {
  std::filesystem::path command = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "anykvm";
  std::string kernel = std::filesystem::temp_directory_path() / ("anykvm-terminal-" + std::to_string(getpid()));
  int terminal = -1, side = -1;
  pid_t pid = -1;
  std::string shown;

  void SetUp() override {
    if (access(command.c_str(), X_OK) != 0) GTEST_SKIP() << "the command is not built";
    // Says R by the serial port, with RTS raised, then echoes what it receives.
    write_kernel(kernel, {
                             0x66, 0xba, 0xfc, 0x03,  // mov $0x3fc, %dx
                             0xb0, 0x03,              // mov $3, %al
                             0xee,                    // out %al, (%dx)
                             0x66, 0xba, 0xf8, 0x03,  // mov $0x3f8, %dx
                             0xb0, 'R',               // mov $'R', %al
                             0xee,                    // out %al, (%dx)
                             0x66, 0xba, 0xfd, 0x03,  // 1: mov $0x3fd, %dx
                             0xec,                    // in (%dx), %al
                             0xa8, 0x01,              // test $1, %al
                             0x74, 0xf7,              // jz 1b
                             0x66, 0xba, 0xf8, 0x03,  // mov $0x3f8, %dx
                             0xec,                    // in (%dx), %al
                             0xee,                    // out %al, (%dx)
                             0xeb, 0xef,              // jmp 1b
                         });
  }
  void TearDown() override {
    if (pid > 0) kill(pid, SIGKILL);
    if (terminal >= 0) close(terminal);
    if (side >= 0) close(side);
    std::filesystem::remove(kernel);
  }

  void start() {
    char name[128];
    // The test's own descriptor of the terminal's other side keeps its mode readable after the program has gone.
    ASSERT_EQ(openpty(&terminal, &side, name, nullptr, nullptr), 0);
    pid = fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) {
      // A sanitizer would end the program in its own way.
      for (const char* name : {"ASAN_OPTIONS", "TSAN_OPTIONS"}) {
        const char* options = std::getenv(name);
        setenv(name, (std::string(options ? options : "") + ":handle_segv=0").c_str(), 1);
      }
      login_tty(open(name, O_RDWR));
      execl(command.c_str(), "anykvm", "boot", "--engine", "interpret", "--kernel", kernel.c_str(), "--timeout", "60",
            nullptr);
      _exit(127);
    }
    expect_shown("R");
  }
  void expect_shown(const std::string& text) {
    for (int tries = 0; shown.find(text) == std::string::npos && tries < 200; ++tries) {
      pollfd wait{terminal, POLLIN, 0};
      char buffer[1024];
      if (poll(&wait, 1, 100) <= 0) continue;
      const ssize_t got = read(terminal, buffer, sizeof buffer);
      if (got <= 0) break;
      shown.append(buffer, size_t(got));
    }
    EXPECT_NE(shown.find(text), std::string::npos) << shown;
  }
  void type(std::string_view keys) { ASSERT_EQ(write(terminal, keys.data(), keys.size()), ssize_t(keys.size())); }
  bool is_raw() const {
    termios mode;
    EXPECT_EQ(tcgetattr(side, &mode), 0);
    return !(mode.c_lflag & ICANON);
  }
  int wait_for_end() {
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    pid = -1;
    return status;
  }
};

TEST_F(TerminalTest, KeysGoToTheGuestAndCtrlAXLeaves) {
  start();
  EXPECT_TRUE(is_raw());
  expect_shown("Ctrl-A x leaves");
  type("q\x03");
  expect_shown("q\x03");
  type("\x01h");
  expect_shown("this help");
  type("\x01\x01z");
  expect_shown("\x01z");
  type("\x01x");
  const int status = wait_for_end();
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_FALSE(is_raw());
}

TEST_F(TerminalTest, ModeComesBackWhenASignalEndsIt) {
  for (const int number : {SIGTERM, SIGHUP, SIGSEGV, SIGABRT}) {
    shown.clear();
    start();
    EXPECT_TRUE(is_raw());
    kill(pid, number);
    const int status = wait_for_end();
    const bool asked = number == SIGTERM || number == SIGHUP;
    EXPECT_EQ(asked ? WEXITSTATUS(status) : WTERMSIG(status), asked ? 128 + number : number) << strsignal(number);
    EXPECT_FALSE(is_raw()) << strsignal(number);
    close(terminal);
    close(side);
    terminal = side = -1;
  }
}

}  // namespace
}  // namespace anykvm::tools
