//! What a report says about the machine beyond what the binary knows: the date, the load, QEMU.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// QEMU's program for this architecture.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// The commit that this program was built from, where that was known. Changes that were not committed do not show.
pub(crate) fn commit() -> Option<String> {
    option_env!("PARAVANE_COMMIT").map(str::to_owned)
}

/// QEMU's version, `None` where it is not installed.
pub(crate) fn qemu() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    Some(line.strip_prefix("QEMU emulator version ").unwrap_or(line).to_owned())
}

/// The load averages and the number of processes, as the kernel gives them.
pub(crate) fn load() -> Option<String> {
    fs::read_to_string("/proc/loadavg").ok().map(|text| text.trim().to_owned())
}

/// Now, in UTC.
pub(crate) fn now() -> String {
    date(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs())
}

/// Seconds since 1970 as `2026-01-31T12:00:00Z` (ISO 8601). The Gregorian calendar repeats every 146,097 days; within such
/// an era, years are counted from March, so that the day that comes and goes is the last of a year.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Where the guests are: `target/guests` of this folder or one above it, or beside the program's build folder.
pub(crate) fn guests() -> Option<PathBuf> {
    let here = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let above = here.iter().flat_map(|path| path.ancestors()).map(|path| path.join("target/guests"));
    let beside = program.iter().flat_map(|path| path.ancestors()).map(|path| path.join("guests"));
    above.chain(beside).find(|path| path.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_date1() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date(951_868_799), "2000-02-29T23:59:59Z");
        assert_eq!(date(951_868_800), "2000-03-01T00:00:00Z");
        assert_eq!(date(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(date(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
