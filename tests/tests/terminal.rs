//! The person at the terminal: keys reach the guest, every way of stopping the hypervisor stops it, the terminal is
//! as it was before, and nothing is left behind.

use paravane_tests::host::{self, Stage};
use paravane_tests::process::Process;
use paravane_tests::terminal::Terminal;
use std::process::Command;
use std::time::Duration;

/// For the guest's boot.
const BOOT: Duration = Duration::from_secs(90);

/// For an answer to a key or a signal.
const ANSWER: Duration = Duration::from_secs(20);

const GREETING: &str = "busybox shell.";

/// The interactive guest, or `None` if it was never fetched.
fn shell_guest(stage: &Stage) -> Option<Command> {
    let kernel = host::guest_file("6.1/vmlinuz")?;
    let initrd = host::guest_file("initramfs-shell.cpio")?;
    Some(stage.paravane(&kernel, &initrd, "console=ttyS0 panic=-1 quiet"))
}

/// Nothing of the program is left: no process of its group, no file in its working directory.
fn assert_gone(stage: &Stage, process: &Process) {
    assert!(!process.has_left_processes(), "a process is left");
    assert_eq!(stage.left_behind(), Vec::<String>::new(), "a file is left");
}

/// Sends a signal during the boot, which is when a guest is busiest.
fn stops_on(signal: i32) {
    let stage = Stage::new();
    let Some(mut command) = shell_guest(&stage) else { return };
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    let mut process = terminal.start(&mut command);
    terminal.wait_for_raw_mode(&mut process, &before, ANSWER);
    std::thread::sleep(Duration::from_millis(300));
    process.signal(signal);
    let status = terminal.wait_for_end(&mut process, ANSWER);
    assert_eq!(status.code(), Some(128 + signal), "ended with {status}: {}", terminal.screen());
    assert_eq!(terminal.modes(), before, "the terminal is not as it was");
    assert_gone(&stage, &process);
}

#[test]
fn sigterm_stops_the_guest_and_restores_the_terminal() {
    stops_on(libc::SIGTERM);
}

#[test]
fn sigint_stops_the_guest_and_restores_the_terminal() {
    stops_on(libc::SIGINT);
}

#[test]
fn sighup_stops_the_guest_and_restores_the_terminal() {
    stops_on(libc::SIGHUP);
}

#[test]
fn a_closed_terminal_stops_the_guest() {
    let stage = Stage::new();
    let Some(mut command) = shell_guest(&stage) else { return };
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    let mut process = terminal.start(&mut command);
    terminal.wait_for_raw_mode(&mut process, &before, ANSWER);
    terminal.close();
    let status = terminal.wait_for_end(&mut process, ANSWER);
    assert_eq!(status.code(), Some(129), "ended with {status}");
    assert_gone(&stage, &process);
}

/// One boot to the shell for everything that needs a prompt: typed commands, Ctrl-C for the guest and not for the
/// hypervisor, idle cost, the escape key.
#[test]
fn a_shell_session() {
    let stage = Stage::new();
    let Some(mut command) = shell_guest(&stage) else { return };
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    let mut process = terminal.start(&mut command);
    let at = terminal.wait_for(&mut process, GREETING, 0, BOOT);
    let at = terminal.wait_for(&mut process, "# ", at, ANSWER);

    // The shell must compute the answer; the echo of the command alone does not contain it.
    terminal.press("echo $((6 * 7))-$(uname -s)\r");
    let at = terminal.wait_for(&mut process, "42-Linux", at, ANSWER);

    // Ctrl-C ends the guest's command, not the hypervisor.
    terminal.press("sleep 1000\r");
    let at = terminal.wait_for(&mut process, "sleep 1000", at, ANSWER);
    std::thread::sleep(Duration::from_millis(500));
    terminal.press("\x03");
    terminal.press("echo interrupted: $?\r");
    let at = terminal.wait_for(&mut process, "interrupted: 130", at, ANSWER);
    let at = terminal.wait_for(&mut process, "# ", at, ANSWER);

    // A guest that waits costs next to nothing: under 2 % of one core.
    std::thread::sleep(Duration::from_secs(2));
    let used = process.cpu_time();
    std::thread::sleep(Duration::from_secs(5));
    let used = process.cpu_time() - used;
    assert!(used < Duration::from_millis(100), "an idle guest used {used:?} of CPU time in 5 s");

    // The escape key stops the guest, whatever it does.
    terminal.press("while :; do :; done\r");
    terminal.wait_for(&mut process, "done", at, ANSWER);
    std::thread::sleep(Duration::from_millis(500));
    terminal.press("\x01x");
    let status = terminal.wait_for_end(&mut process, ANSWER);
    assert_eq!(status.code(), Some(0), "ended with {status}");
    assert_eq!(terminal.modes(), before, "the terminal is not as it was");
    assert_gone(&stage, &process);
}

/// Leaving the shell powers the guest off, which ends the hypervisor with success.
#[test]
fn leaving_the_shell_powers_off() {
    let stage = Stage::new();
    let Some(mut command) = shell_guest(&stage) else { return };
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    let mut process = terminal.start(&mut command);
    let at = terminal.wait_for(&mut process, GREETING, 0, BOOT);
    terminal.wait_for(&mut process, "# ", at, ANSWER);
    terminal.press("exit\r");
    let status = terminal.wait_for_end(&mut process, ANSWER);
    assert_eq!(status.code(), Some(0), "ended with {status}: {}", terminal.screen());
    assert_eq!(terminal.modes(), before, "the terminal is not as it was");
    assert_gone(&stage, &process);
}
