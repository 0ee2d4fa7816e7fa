// The `anykvm` command: its subcommands, their options, and exit code 64 with one line for what it does not understand.
#include <fmt/format.h>
#include <sysexits.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "engine/engine.h"
#include "tools/engine_choice.h"
#include "tools/info.h"
#include "tools/options.h"
#include "tools/run.h"
#include "tools/top.h"
#include "vmm/boot.h"

namespace anykvm::tools {

namespace {

struct BootArguments {
  std::string kernel, initrd, append, firmware, firmware_log;
  std::string memory = "512M", network = "none", engine = "auto", timeout;
  std::vector<std::string> disks;
  unsigned cpus = 1;
  bool boot_menu = false, quiet = false;
};

CLI::Option* add_engine_option(CLI::App& command, std::string& wish) {
  std::vector<std::string> names = {"auto"};
  for (const engine::Kind kind : engine::every_kind) names.emplace_back(engine::name_of(kind));
  names.emplace_back("host");
  return command
      .add_option("--engine", wish,
                  "What runs guest code: auto, interpret, translate, translate-exact (keeps flags that nothing reads), "
                  "direct (translate, and user code that runs for long on the host CPU itself), lockstep (two engines, "
                  "compared), or host (the host's /dev/kvm)")
      ->type_name("NAME")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
}

void describe_boot(CLI::App& boot, BootArguments& arguments) {
  constexpr unsigned most_cpus = 255;
  boot.add_option("--kernel", arguments.kernel, "Linux kernel: a bzImage (vmlinuz) or an ELF vmlinux with a PVH entry")
      ->type_name("FILE");
  boot.add_option("--initrd", arguments.initrd, "Initial RAM disk: a cpio archive, plain or compressed")
      ->type_name("FILE");
  boot.add_option("--append", arguments.append,
                  fmt::format("Kernel command line, added behind \"{}\"", vmm::default_command_line))
      ->type_name("STRING");
  boot.add_option(
          "--firmware", arguments.firmware,
          "Firmware image such as SeaBIOS's bios.bin, which boots the first bootable --disk; instead of --kernel")
      ->type_name("FILE");
  boot.add_option("--firmware-log", arguments.firmware_log,
                  "Appends the firmware's debug output (port 0x402) to a file")
      ->type_name("FILE");
  boot.add_flag("--boot-menu", arguments.boot_menu, "The firmware waits for Esc and shows what it can boot from");
  boot.add_option("--memory", arguments.memory, "Guest memory; K, M or G behind the number, M when none")
      ->type_name("SIZE")
      ->capture_default_str();
  boot.add_option("--cpus", arguments.cpus, "Virtual CPUs")
      ->type_name("N")
      ->check(CLI::Range(1u, most_cpus))
      ->capture_default_str();
  boot.add_option("--disk", arguments.disks, "Raw disk image, ',ro' behind it for read-only; may be repeated")
      ->type_name("FILE[,ro]")
      ->expected(1)
      ->take_all();
  boot.add_option("--net", arguments.network, "Network card: user (NAT by this process) or none")
      ->type_name("user|none")
      ->check(CLI::IsMember({"user", "none"}))
      ->capture_default_str();
  add_engine_option(boot, arguments.engine);
  boot.add_option("--timeout", arguments.timeout, "End the guest after this many seconds, with exit code 124")
      ->type_name("S");
  boot.add_flag("--quiet", arguments.quiet, "No messages of our own but errors");
  boot.footer(
      "The serial console is the terminal: Ctrl-A x leaves, Ctrl-A h helps.\n"
      "Exit codes: 0 power-off, 64 usage, 65 a file that cannot be used, 70 triple fault or internal error,\n"
      "124 time-out.");
}

/// A kernel with what belongs to it, or firmware with what belongs to that.
void check_what_boots(const BootArguments& arguments) {
  if (arguments.kernel.empty() == arguments.firmware.empty())
    throw CLI::ValidationError(arguments.kernel.empty() ? "--kernel or --firmware is required"
                                                        : "--kernel excludes --firmware");
  if (arguments.kernel.empty() && !(arguments.initrd.empty() && arguments.append.empty()))
    throw CLI::ValidationError("--initrd and --append belong to --kernel: firmware finds both on a disk");
  if (arguments.firmware.empty() && (arguments.boot_menu || !arguments.firmware_log.empty()))
    throw CLI::ValidationError("--boot-menu and --firmware-log belong to --firmware");
}

int run_boot(const BootArguments& arguments) {
  vmm::BootOptions options;
  check_what_boots(arguments);
  options.machine.files = {arguments.kernel, arguments.initrd, vmm::default_command_line};
  if (!arguments.append.empty()) options.machine.files.command_line += " " + arguments.append;
  if (!arguments.firmware.empty())
    options.machine.firmware = {arguments.firmware, arguments.firmware_log, arguments.boot_menu};
  options.machine.memory_bytes = parse_memory(arguments.memory);
  options.machine.cpus = arguments.cpus;
  for (const std::string& disk : arguments.disks) options.machine.disks.push_back(parse_disk(disk));
  options.machine.network = arguments.network == "user";
  if (!arguments.timeout.empty()) options.timeout = parse_duration("--timeout", arguments.timeout);
  options.quiet = arguments.quiet;
  const EngineChoice choice = choose_engine(arguments.engine, true);
  if (choice.name == engine::name_of(engine::Kind::direct))
    options.machine.memory_backing = vmm::GuestMemory::Backing::file;
  return vmm::boot(open_engine(choice), options);
}

void describe_run(CLI::App& command, RunOptions& options) {
  add_engine_option(command, options.engine)->envname("ANYKVM_ENGINE");
  command.add_flag("--quiet", options.quiet,
                   "Say neither on a terminal which KVM the program gets nor what an internal error was about");
  command.add_flag(
      "--stats", options.statistics,
      "Print each VM's counters on stderr when it ends, and on SIGUSR2 to a program that has no handler for it");
  command
      .add_option("--trace", options.trace,
                  "Write what the vCPUs do, with time stamps, for Perfetto's UI or chrome://tracing")
      ->type_name("FILE");
  command.prefix_command();
  command.footer(
      "anykvm run [OPTIONS] -- PROGRAM ARGS... runs an unmodified KVM client, such as qemu-system-x86_64 -accel kvm,\n"
      "and all that it starts, with this KVM behind /dev/kvm.\n"
      "Exit codes: the program's; 64 usage, 69 a program that LD_PRELOAD does not reach (statically linked, setuid,\n"
      "not 64-bit), 73 a trace that cannot be written, 126 one that cannot be executed, 127 one that is not there.");
}

struct TopArguments {
  std::string interval = "1";
  TopOptions options;
};

void describe_top(CLI::App& command, TopArguments& arguments) {
  command.add_option("--interval", arguments.interval, "Time between two tables")
      ->type_name("S")
      ->capture_default_str();
  command.add_option("--count", arguments.options.tables, "End after so many tables; 0: go on until Ctrl-C")
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--vcpus", arguments.options.each_vcpu, "A line for each vCPU, too");
}

/// The command line up to the first "--" is ours to parse, unless the program's name came before it.
std::vector<std::string> program_of(const CLI::App& command, int parsed, int argc, char** argv) {
  std::vector<std::string> program = command.remaining();
  if (!program.empty() && program[0].starts_with('-')) throw CLI::ExtrasError({program[0]});
  const bool named = !program.empty();
  for (int i = parsed; i < argc; ++i)
    if (named || i != parsed) program.emplace_back(argv[i]);
  if (program.empty()) throw CLI::RequiredError("A program, as in anykvm run -- qemu-system-x86_64,");
  return program;
}

/// One line, whatever CLI11 has to say.
int usage_error(const CLI::Error& error) {
  std::string message = error.what();
  if (const auto end = message.find('\n'); end != std::string::npos) message.resize(end);
  fmt::print(stderr, "anykvm: {} (see anykvm --help)\n", message);
  return EX_USAGE;
}

int run(int argc, char** argv) {
  CLI::App app("KVM as a C++ program: runs virtual machines without hardware virtualisation", "anykvm");
  app.set_version_flag("--version", "anykvm " ANYKVM_VERSION);
  app.require_subcommand(0, 1);
  BootArguments boot_arguments;
  CLI::App& boot =
      *app.add_subcommand("boot", "Boot a Linux kernel, or firmware and a disk, to a console on this terminal");
  describe_boot(boot, boot_arguments);
  CLI::App& info_command = *app.add_subcommand("info", "Show what would run here and why, and what is supported");
  bool json = false;
  info_command.add_flag("--json", json, "As JSON");
  RunOptions run_options;
  CLI::App& run_command = *app.add_subcommand("run", "Run a KVM client, such as QEMU, with this KVM as its /dev/kvm");
  describe_run(run_command, run_options);
  TopArguments top_arguments;
  CLI::App& top_command =
      *app.add_subcommand("top", "Show what the virtual CPUs of your processes do, second by second");
  describe_top(top_command, top_arguments);
  const bool runs = argc > 1 && std::string_view(argv[1]) == "run";
  const int parsed = runs ? static_cast<int>(std::find(argv, argv + argc, std::string_view("--")) - argv) : argc;
  try {
    app.parse(parsed, argv);
    if (boot.parsed()) return run_boot(boot_arguments);
    if (info_command.parsed()) return info(json);
    if (run_command.parsed()) {
      run_options.program = program_of(run_command, parsed, argc, argv);
      return run_program(run_options);
    }
    if (top_command.parsed()) {
      top_arguments.options.interval = parse_duration("--interval", top_arguments.interval);
      return top(top_arguments.options);
    }
    throw CLI::RequiredError("A command, boot, info, run or top,");
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::Error& error) {
    return usage_error(error);
  }
}

}  // namespace

}  // namespace anykvm::tools

int main(int argc, char** argv) {
  try {
    return anykvm::tools::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "anykvm: {}\n", error.what());
    return EX_SOFTWARE;
  }
}
