//! `cargo xtask abi`: writes the C header and the tables of the specification from `pv-abi`.
//!
//! `pv-abi` is the only source. What is generated is checked in, so that it can be read and used without building anything; `--check`, and
//! a test, say when it is out of date.

use crate::abi_text;
use crate::host::{self, Doing, Failure, Result};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing, and fail if something is out of date
    #[arg(long)]
    check: bool,
}

/// Writes what differs, or names it.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let stale = stale()?;
    for (path, text) in &stale {
        let name = path.strip_prefix(host::repo()).unwrap_or(path).display();
        if args.check {
            eprintln!("{name} is out of date: run `cargo xtask abi`");
        } else {
            fs::create_dir_all(path.parent().unwrap_or(path)).doing("cannot make the header's folder")?;
            fs::write(path, text).doing(format!("cannot write {name}"))?;
            println!("{name} written");
        }
    }
    Ok(if args.check && !stale.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Files that are not what they would be if they were generated now, and what they should be.
fn stale() -> Result<Vec<(PathBuf, String)>> {
    let mut fresh = vec![(header_path(), abi_text::header())];
    let specs = host::repo().join("specs");
    for entry in fs::read_dir(&specs).doing("cannot read specs/")?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "md") {
            let text = fs::read_to_string(&path).doing(format!("cannot read {}", path.display()))?;
            let new = abi_text::with_tables(&text).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
            fresh.push((path, new));
        }
    }
    fresh.retain(|(path, text)| fs::read_to_string(path).ok().as_ref() != Some(text));
    Ok(fresh)
}

/// The header's place.
fn header_path() -> PathBuf {
    host::repo().join("pv-abi/include/paravane.h")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pv_abi::describe::STRUCTURES;
    use std::fmt::Write;
    use std::process::Command;

    #[test]
    fn what_is_checked_in_is_what_would_be_generated() {
        let stale = stale().unwrap_or_else(|e| panic!("{e}"));
        let names: Vec<_> = stale.iter().map(|(path, _)| path).collect();
        assert!(names.is_empty(), "out of date, run `cargo xtask abi`: {names:?}");
    }

    #[test]
    fn tables_are_replaced_and_nothing_else() {
        let text = "a\n<!-- table errors -->\nold\n<!-- end -->\nb";
        let new = abi_text::with_tables(text).unwrap();
        assert!(new.starts_with("a\n<!-- table errors -->") && new.ends_with("<!-- end -->\nb"));
        assert!(new.contains("`BAD_ADDRESS`") && !new.contains("old"));
        assert_eq!(abi_text::with_tables(&new).unwrap(), new, "a second time changes nothing");
        assert!(abi_text::with_tables("<!-- table nothing -->\n<!-- end -->").is_err());
        assert!(abi_text::with_tables("<!-- table errors -->").is_err());
    }

    /// What a C compiler makes of the header: name and value of every constant, size and offset.
    fn seen_by_c() -> Option<String> {
        if !host::has_tool("cc") {
            eprintln!("SKIPPED: there is no C compiler (cc); install gcc to compare the header with Rust");
            return None;
        }
        let mut program = String::from("#include \"paravane.h\"\n#include <stdio.h>\nint main(void) {\n");
        for (name, _) in abi_text::numbers() {
            let _ = writeln!(program, "printf(\"{name} %llu\\n\", (unsigned long long){name});");
        }
        for s in STRUCTURES {
            let c = abi_text::c_name(s.name);
            let _ = writeln!(program, "printf(\"{} %zu\\n\", sizeof({c}));", s.name);
            for f in s.fields {
                let _ = writeln!(
                    program,
                    "printf(\"{}.{} %zu %zu\\n\", offsetof({c}, {1}), sizeof((({c} *)0)->{1}));",
                    s.name, f.name
                );
            }
        }
        program.push_str("return 0; }\n");
        let folder = std::env::temp_dir().join(format!("paravane-header-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (source, binary) = (folder.join("all.c"), folder.join("all"));
        fs::write(&source, program).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-mno-red-zone", "-I"]);
        cc.arg(header_path().parent().unwrap()).arg(&source).arg("-o").arg(&binary);
        let compiled = cc.output().unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let output = Command::new(&binary).output().unwrap();
        fs::remove_dir_all(&folder).unwrap();
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn c_sees_what_rust_sees() {
        let Some(seen) = seen_by_c() else { return };
        let mut expected = String::new();
        for (name, value) in abi_text::numbers() {
            let _ = writeln!(expected, "{name} {value}");
        }
        for s in STRUCTURES {
            let _ = writeln!(expected, "{} {}", s.name, s.size);
            for f in s.fields {
                let _ = writeln!(expected, "{}.{} {} {}", s.name, f.name, f.offset, f.kind.size());
            }
        }
        assert_eq!(seen, expected);
        assert!(seen.lines().count() > 80, "the description has lost entries");
    }
}
