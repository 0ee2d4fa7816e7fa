#!/usr/bin/env python3
"""QEMU's screen and USB keyboards, with -accel kvm under `anykvm run`: a person logs in on the guest's text console.

The machine has no PS/2 controller. A screenshot is read back into text with the font of the VGA BIOS; a keyboard is plugged
into a controller of each kind while the guest runs.
"""

import pathlib
import tempfile
import time

import qemu_machine
from qemu_machine import Machine, accelerated, harness

VGA_BIOS = pathlib.Path("/usr/share/seabios/vgabios-stdvga.bin")
GLYPH_HEIGHT, CELL_WIDTH, COLUMNS, LINES = 16, 9, 80, 25
LETTER_A = bytes.fromhex("000010386cc6c6fec6c6c6c600000000")

CONTROLLERS = {"xhci": "qemu-xhci", "ehci": "usb-ehci", "uhci": "piix3-usb-uhci"}

# Says on the serial port which input devices there are, once their driver heeds them: it ignores what they say for 50 ms.
# Keys do not repeat: on a busy host QEMU may come late to release one.
TASK = r"""
hostname guest
echo "root:$(mkpasswd Ab-7):0:0::/root:/bin/sh" > /etc/passwd
while sleep 0.1; do
  now=$(cat /sys/class/input/input*/phys 2>/dev/null)
  [ "$now" = "$seen" ] && continue
  sleep 0.2
  echo "keyboard: $now."
  seen=$now
done &
printf '\033[?8l' > /dev/tty1
getty -i 38400 tty1
kill $!
echo "== dmesg"
dmesg
echo "== end"
"""

SHIFTED = {"$": "4", "(": "9", ")": "0", "*": "8"}
NAMED = {" ": "spc", "\n": "ret", "-": "minus"}


def font():
    """{glyph: character} of the font that the VGA BIOS loads; a glyph is a string of its dots."""
    rom = VGA_BIOS.read_bytes()
    begin = rom.index(LETTER_A) - ord("A") * GLYPH_HEIGHT

    def glyph(code):
        return "".join(f"{row:08b}" for row in rom[begin + code * GLYPH_HEIGHT :][:GLYPH_HEIGHT])

    return {glyph(code): chr(code) for code in range(ord(" "), ord("~") + 1)}


class Screen:
    """The text screen and the keyboard of a running machine."""

    def __init__(self, machine, folder):
        self.machine, self.path, self.font = machine, folder / "screen.ppm", font()

    def text(self):
        """What a screenshot shows, a string for each line; '?' is what is no character of the font, such as the cursor."""
        self.machine.command("screendump", filename=str(self.path))
        form, size, _, pixels = self.path.read_bytes().split(b"\n", 3)
        width, height = CELL_WIDTH * COLUMNS, GLYPH_HEIGHT * LINES
        if (form, size) != (b"P6", b"%d %d" % (width, height)):
            return []  # not in this mode yet
        green = pixels[1::3]  # all of the text is grey
        dots = green.translate(bytes([ord("0")] + [ord("1")] * 255)).decode()
        return ["".join(self.character(dots, width, line, column) for column in range(COLUMNS)) for line in range(LINES)]

    def character(self, dots, width, line, column):
        begin = line * GLYPH_HEIGHT * width + column * CELL_WIDTH
        return self.font.get("".join(dots[at : at + 8] for at in range(begin, begin + GLYPH_HEIGHT * width, width)), "?")

    def wait_for(self, text, seconds=60):
        """Waits until a line of the screen begins with the text."""
        end = time.monotonic() + seconds
        while not any(line.startswith(text) for line in self.text()):
            self.machine.check(time.monotonic() < end, f"the screen does not show '{text}':\n" + "\n".join(self.text()))
            time.sleep(0.2)

    def press(self, text):
        """Presses keys; no more at once than the queue of QEMU's keyboard holds, which is 16 events."""
        for character in text:
            shift = character in SHIFTED or character.isupper()
            key = SHIFTED.get(character) or NAMED.get(character) or character.lower()
            keys = [{"type": "qcode", "data": name} for name in (["shift"] if shift else []) + [key]]
            self.machine.command("send-key", keys=keys, **{"hold-time": 10})

    def type(self, line, prompt):
        """Types a line, which the screen shows behind the prompt."""
        for at in range(0, len(line), 4):
            self.press(line[at : at + 4])
            self.wait_for(prompt + line[: at + 4].rstrip())
        self.press("\n")


def log_in(options, folder):
    guest = harness.Guest("6.1-generic")
    initrd = harness.write_initrd(folder, guest, TASK)
    line = [*accelerated(options, "q35,i8042=off"), "-device", "VGA", "-kernel", str(guest.vmlinuz), "-initrd", str(initrd),
            "-append", "console=ttyS0 panic=-1"]
    for name, device in CONTROLLERS.items():
        line += ["-device", f"{device},id={name}"]
    with Machine(folder, "qemu", line) as machine:
        screen = Screen(machine, folder)
        at = 0

        def plug(controller):
            nonlocal at
            # One that could not do high speed has no place behind EHCI.
            machine.command("device_add", driver="usb-kbd", id=f"at-{controller}", bus=f"{controller}.0", usb_version=2)
            at = machine.wait_for("keyboard: usb", at)

        def unplug(controller):
            nonlocal at
            machine.command("device_del", id=f"at-{controller}")
            at = machine.wait_for("keyboard: .", at)

        screen.wait_for("guest login:", 200)
        plug("xhci")
        screen.type("root", "guest login: ")
        screen.wait_for("Password:")
        screen.press("Ab-7\n")
        screen.wait_for("~ # ")
        unplug("xhci")
        plug("ehci")
        screen.type("echo $((6*7))", "~ # ")
        screen.wait_for("42 ")
        unplug("ehci")
        plug("uhci")
        screen.type("exit", "~ # ")
        machine.end()
        result = harness.Run(0, machine.console, "", time.monotonic() - machine.began)
        result.section("end")
        harness.check_kernel_log(result)


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="direct")
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    qemu_machine.require()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log_in(options, pathlib.Path(folder))
    print(f"a login on the screen: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
