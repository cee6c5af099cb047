//! CPU features that matter to a hypervisor, by their manual names (SDM vol. 2, CPUID; APM vol. 3, appendix E).

use std::collections::BTreeMap;

/// Name, leaf, subleaf, register (EAX 0 to EDX 3), bit.
const FEATURES: [(&str, u32, u32, usize, u32); 22] = [
    ("vmx", 1, 0, 2, 5),
    ("svm", 0x8000_0001, 0, 2, 2),
    ("hypervisor", 1, 0, 2, 31),
    ("bmi1", 7, 0, 1, 3),
    ("bmi2", 7, 0, 1, 8),
    ("fsgsbase", 7, 0, 1, 0),
    ("xsave", 1, 0, 2, 26),
    ("osxsave", 1, 0, 2, 27),
    ("avx", 1, 0, 2, 28),
    ("avx2", 7, 0, 1, 5),
    ("avx512f", 7, 0, 1, 16),
    ("erms", 7, 0, 1, 9),
    ("pcid", 1, 0, 2, 17),
    ("invpcid", 7, 0, 1, 10),
    ("smep", 7, 0, 1, 7),
    ("smap", 7, 0, 1, 20),
    ("pku", 7, 0, 2, 3),
    ("x2apic", 1, 0, 2, 21),
    ("tsc_deadline", 1, 0, 2, 24),
    ("rdtscp", 0x8000_0001, 0, 3, 27),
    ("invariant_tsc", 0x8000_0007, 0, 3, 8),
    ("gib_pages", 0x8000_0001, 0, 3, 26),
];

/// All features by name.
pub fn find(cpuid: &dyn Fn(u32, u32) -> [u32; 4]) -> BTreeMap<String, bool> {
    let (basic, extended) = (cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]);
    FEATURES
        .iter()
        .map(|&(name, leaf, sub, register, bit)| {
            let there = leaf <= if leaf < 0x8000_0000 { basic } else { extended };
            (name.to_owned(), there && cpuid(leaf, sub)[register] >> bit & 1 != 0)
        })
        .collect()
}

/// The CPU's name (leaves 0x8000_0002 to 4), or its vendor.
pub fn brand(cpuid: &dyn Fn(u32, u32) -> [u32; 4]) -> String {
    let words: Vec<u32> = if cpuid(0x8000_0000, 0)[0] >= 0x8000_0004 {
        (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0)).collect()
    } else {
        let [_, b, c, d] = cpuid(0, 0);
        vec![b, d, c]
    };
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).take_while(|&b| b != 0).collect();
    let text: String = String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
