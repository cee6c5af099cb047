//! The ABI as text: the C header and the tables of the specification, made from `pv-abi`'s own description of itself.

use pv_abi::call::{Call, Error};
use pv_abi::describe::{CONSTANTS, Field, FieldType, STRUCTURES, Structure};
use pv_abi::feature::Feature;
use pv_abi::memory::Operation;
use std::fmt::Write;

/// Every number of the header with its name there: what a C program that includes it must see.
#[cfg(test)]
pub(crate) fn numbers() -> impl Iterator<Item = (String, u64)> {
    sections().into_iter().flatten().map(|(name, value, _)| (name, value))
}

/// The name of a structure in the header.
pub(crate) fn c_name(structure: &str) -> String {
    format!("struct paravane_{structure}")
}

/// The header, `pv-abi/include/paravane.h`.
pub(crate) fn header() -> String {
    let mut text = String::from(HEAD);
    for s in [
        "Numbers that belong to no list.",
        "Feature bits.",
        "Hypercall numbers.",
        "Errors, as they are before RAX negates them.",
        "Operations of an update, bits 0-2 of its target.",
    ]
    .iter()
    .zip(sections())
    {
        let _ = writeln!(text, "\n/* {} */", s.0);
        for (name, value, about) in s.1 {
            let _ = writeln!(text, "#define {name:<34} UINT64_C({value:#x}) /* {about} */");
        }
    }
    for s in STRUCTURES {
        structure(&mut text, s);
    }
    text.push_str(CALL);
    text
}

/// Name, value and meaning of what is in each section of the header.
fn sections() -> [Vec<(String, u64, String)>; 5] {
    [
        CONSTANTS.iter().map(|c| (format!("PARAVANE_{}", c.name), c.value, c.text.to_owned())).collect(),
        Feature::ALL
            .iter()
            .map(|f| (format!("PARAVANE_FEATURE_{}", f.name()), f.bit(), f.summary().to_owned()))
            .collect(),
        Call::ALL
            .iter()
            .map(|c| (format!("PARAVANE_CALL_{}", c.name()), c.number(), format!("{} arguments", c.arguments())))
            .collect(),
        Error::ALL
            .iter()
            .map(|e| (format!("PARAVANE_ERROR_{}", e.name()), *e as u64, error_text(*e).to_owned()))
            .collect(),
        Operation::ALL
            .iter()
            .map(|o| (format!("PARAVANE_UPDATE_{}", o.name()), *o as u64, operation_text(*o).to_owned()))
            .collect(),
    ]
}

fn structure(text: &mut String, s: &Structure) {
    let name = c_name(s.name);
    let _ = writeln!(text, "\n/* {}: {} bytes. */\n{name} {{", s.text, s.size);
    for f in s.fields {
        let declared = match f.kind {
            FieldType::U8(1) => format!("uint8_t {};", f.name),
            FieldType::U8(n) => format!("uint8_t {}[{n}];", f.name),
            FieldType::I8 => format!("int8_t {};", f.name),
            FieldType::U32 => format!("uint32_t {};", f.name),
            FieldType::U64 => format!("uint64_t {};", f.name),
            FieldType::Struct(inner, _) => format!("{} {};", c_name(inner), f.name),
        };
        let _ = writeln!(text, "    {declared:<30} /* {} */", f.text);
    }
    let _ = writeln!(text, "}};\n_Static_assert(sizeof({name}) == {}, \"size\");", s.size);
    for f in s.fields {
        let _ = writeln!(text, "_Static_assert(offsetof({name}, {}) == {}, \"offset\");", f.name, f.offset);
    }
}

/// The table with this name, as Markdown; `None` if there is no such table.
pub(crate) fn table(name: &str) -> Option<String> {
    let mut t = String::new();
    match name {
        "constants" => {
            t.push_str("| name | value | meaning |\n|---|---|---|\n");
            for c in CONSTANTS {
                let _ = writeln!(t, "| `{}` | {:#x} | {} |", c.name, c.value, c.text);
            }
        }
        "features" => {
            t.push_str("| bit | name | meaning |\n|---|---|---|\n");
            for f in Feature::ALL {
                let _ = writeln!(t, "| {} | `{}` | {} |", f as u8, f.name(), f.summary());
            }
        }
        "calls" => {
            t.push_str("| number | name | feature | arguments |\n|---|---|---|---|\n");
            for c in Call::ALL {
                let feature = c.feature().map_or("none".to_owned(), |f| format!("`{}`", f.name()));
                let _ = writeln!(t, "| {:#x} | `{}` | {feature} | {} |", c.number(), c.name(), c.arguments());
            }
        }
        "errors" => {
            t.push_str("| code | RAX | name | meaning |\n|---|---|---|---|\n");
            for e in Error::ALL {
                let _ = writeln!(t, "| {} | {:#x} | `{}` | {} |", e as u64, e.to_rax(), e.name(), error_text(e));
            }
        }
        "operations" => {
            t.push_str("| number | name | meaning |\n|---|---|---|\n");
            for o in Operation::ALL {
                let _ = writeln!(t, "| {} | `{}` | {} |", o as u64, o.name(), operation_text(o));
            }
        }
        _ => {
            let s = STRUCTURES.iter().find(|s| Some(s.name) == name.strip_prefix("struct "))?;
            t.push_str("| offset | bytes | field | meaning |\n|---|---|---|---|\n");
            for Field { name, offset, kind, text } in s.fields {
                let _ = writeln!(t, "| {offset} | {} | `{name}` | {text} |", kind.size());
            }
        }
    }
    Some(t)
}

/// A document with the contents of its tables replaced: what stands between `<!-- table NAME -->` and `<!-- end -->`.
///
/// # Errors
/// A table is unknown, or has no end; the text says which.
pub(crate) fn with_tables(document: &str) -> Result<String, String> {
    const BEGIN: &str = "<!-- table ";
    const END: &str = "<!-- end -->";
    let (mut out, mut rest) = (String::new(), document);
    while let Some(at) = rest.find(BEGIN) {
        let (before, behind) = rest.split_at(at);
        let (name, behind) = behind[BEGIN.len()..].split_once(" -->").ok_or("a table's mark is not closed")?;
        let (_, behind) = behind.split_once(END).ok_or_else(|| format!("table {name} has no `{END}`"))?;
        let table = table(name).ok_or_else(|| format!("there is no table \"{name}\""))?;
        let _ = write!(out, "{before}{BEGIN}{name} -->\n\n{table}\n{END}");
        rest = behind;
    }
    out.push_str(rest);
    Ok(out)
}

fn error_text(e: Error) -> &'static str {
    match e {
        Error::NotSupported => "no such call, or its feature is not on offer",
        Error::NotNegotiated => "the call's feature is not in force",
        Error::NotPermitted => "the caller is not in 64-bit mode at CPL 0",
        Error::InvalidArgument => "out of range, a reserved bit, or an unused argument that is not 0",
        Error::BadAddress => "misaligned, or not RAM in its whole length",
        Error::TooMany => "above the limit that CPUID gives",
        Error::NoSuchTarget => "no such vCPU or device",
        Error::BadVersion => "not a version that the hypervisor speaks",
        Error::BadFeatures => "a feature that is not on offer",
        Error::NoSharedPage => "the call needs a shared page",
    }
}

fn operation_text(o: Operation) -> &'static str {
    match o {
        Operation::SetEntry => "store value into the page-table entry at target",
        Operation::InvalidatePage => "invalidate the page at target and value pages behind it",
        Operation::InvalidateSpace => "invalidate the address space but for global pages",
        Operation::InvalidateAll => "invalidate everything",
        Operation::SetRoot => "load value into CR3",
    }
}

const HEAD: &str = "\
/* The paravirtual ABI of Paravane, for C11 and later, freestanding. SPDX-License-Identifier: Apache-2.0
 * Generated from pv-abi by `cargo xtask abi`; what the numbers mean is said in specs/. Do not edit. */
#ifndef PARAVANE_H
#define PARAVANE_H

#include <stddef.h>
#include <stdint.h>
";

const CALL: &str = r#"
/* Calls the entry sequence at `entry`, a copy of the bytes in CPUID leaf base + PARAVANE_CPUID_ENTRY in executable memory.
 * Unused arguments must be 0. Gives RAX: 0, or an error negated. The call's value goes to *value unless that is NULL.
 * The caller must not keep data below its stack pointer: compile with -mno-red-zone, as kernels are. */
#if defined(__x86_64__) && defined(__GNUC__)
static inline int64_t paravane_call(const void *entry, uint64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                    uint64_t *value)
{
    int64_t result = (int64_t)number;
    __asm__ volatile("call *%[entry]"
                     : "+a"(result), "+d"(c)
                     : [entry] "r"(entry), "D"(a), "S"(b), "c"(d)
                     : "memory", "cc");
    if (value)
        *value = c;
    return result;
}
#endif

#endif
"#;
