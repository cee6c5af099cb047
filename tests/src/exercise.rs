//! What the standard guest prints: one `T name value` line per piece of work in xtask/guest/exercise.sh.
//!
//! The values were computed on the host with other programs (coreutils, Python), never taken from a guest's output.

/// Each piece of work and its only right result, in the order of the script.
pub const EXPECTED: [(&str, &str); 21] = [
    ("loop", "199990000"),
    ("fork", "100"),
    ("exec", "20"),
    ("pipe", "d29c9b2130d81144350e794f0423148c e071f707df7bbeee2a6a1eb48011ddd0"),
    ("dd", "16777216 080acf35a507ac9849cfcba47dc2ad83e01b75663a516279c8b9d243b719643e"),
    ("copy", "49972ff155d0d5fb6bb9d8f18a7a4c4a2ea9562c"),
    ("gzip", "e071f707df7bbeee2a6a1eb48011ddd0"),
    ("float", "8.178368"),
    ("signal", "usr1"),
    ("kill", "143"),
    ("sleep", "1"),
    ("i386-class", "1"),
    ("i386-uname", "i686"),
    ("i386-md5", "e071f707df7bbeee2a6a1eb48011ddd0"),
    ("i386-float", "8.178368"),
    ("i386-shell", "5"),
    ("mount", "proc /proc proc"),
    ("mount", "sysfs /sys sysfs"),
    ("mount", "devtmpfs /dev devtmpfs"),
    ("devices", "3"),
    ("done", ""),
];

/// What is wrong with a guest's console, as sentences; none if every line is there in order with the right value.
pub fn problems(console: &str) -> Vec<String> {
    let mut lines = console.lines().map(str::trim_end).filter_map(|line| {
        let rest = line.strip_prefix("T ")?;
        Some(rest.split_once(' ').unwrap_or((rest, "")))
    });
    let mut problems = Vec::new();
    for (name, value) in EXPECTED {
        match lines.next() {
            Some(line) if line == (name, value) => {}
            Some((other, found)) => problems.push(format!("expected \"{name} {value}\", found \"{other} {found}\"")),
            None => problems.push(format!("\"{name}\" is missing")),
        }
    }
    problems.extend(lines.map(|(name, value)| format!("there is a line too many: \"{name} {value}\"")));
    problems
}

/// Lines of a kernel log with which Linux complains about itself or its machine. Numbers that differ from boot to
/// boot (time stamps) are cut off, so that two logs can be compared.
pub fn complaints(console: &str) -> Vec<&str> {
    let words = ["WARNING", "BUG", "Call Trace", "Oops", "INFO: rcu", "INFO: task", "soft lockup", "Kernel panic"];
    console
        .lines()
        .map(|line| line.trim().split_once("] ").map_or(line.trim(), |(_, text)| text))
        .filter(|text| words.iter().any(|word| text.contains(word)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_console_has_no_problem_and_every_wrong_one_has() {
        let right: Vec<String> = EXPECTED.iter().map(|(name, value)| format!("T {name} {value}")).collect();
        assert_eq!(problems(&right.join("\r\n")), Vec::<String>::new());
        for index in 0..right.len() {
            let mut wrong = right.clone();
            wrong.remove(index);
            assert!(!problems(&wrong.join("\n")).is_empty(), "without {}", right[index]);
            let mut wrong = right.clone();
            wrong[index].push('x');
            assert!(!problems(&wrong.join("\n")).is_empty(), "with a wrong {}", right[index]);
        }
    }

    #[test]
    fn complaints_are_found_without_their_time() {
        let log = "[    0.1] BUG: unable to handle page fault\n[    0.2] fine\n";
        assert_eq!(complaints(log), ["BUG: unable to handle page fault"]);
    }
}
