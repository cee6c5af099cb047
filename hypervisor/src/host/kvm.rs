//! What /dev/kvm is: whether it is there and opens, what it can do, and how fast it runs a guest.

use super::speed::{self, Speeds};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;

/// Whether /dev/kvm can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// It opens and answers.
    Open,
    /// There is none.
    Absent,
    /// There is one, and this user may not open it.
    Denied,
    /// It does not open, or is something else.
    Failed,
}

/// What the device itself says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvmFacts {
    /// Whether it can be used.
    pub access: Access,
    /// The host's reason when it cannot.
    pub error: Option<String>,
    /// KVM_GET_API_VERSION.
    pub api_version: Option<i32>,
    /// Capabilities that the KVM engine uses, by name.
    pub capabilities: BTreeMap<String, bool>,
    /// What the probe guest measured; `None` also when it was not run.
    pub speeds: Option<Speeds>,
    /// Why the probe guest could not be measured.
    pub probe_error: Option<String>,
}

impl KvmFacts {
    /// No use of KVM, for this reason.
    pub fn unusable(access: Access, error: Option<String>) -> Self {
        Self { access, error, api_version: None, capabilities: BTreeMap::new(), speeds: None, probe_error: None }
    }
}

/// Capabilities that the KVM engine uses or would.
const CAPABILITIES: [(&str, u32); 8] = [
    ("immediate_exit", kvm_bindings::KVM_CAP_IMMEDIATE_EXIT),
    ("ioeventfd", kvm_bindings::KVM_CAP_IOEVENTFD),
    ("irqchip", kvm_bindings::KVM_CAP_IRQCHIP),
    ("irqfd", kvm_bindings::KVM_CAP_IRQFD),
    ("split_irqchip", kvm_bindings::KVM_CAP_SPLIT_IRQCHIP),
    ("user_memory", kvm_bindings::KVM_CAP_USER_MEMORY),
    ("x86_disable_exits", kvm_bindings::KVM_CAP_X86_DISABLE_EXITS),
    ("xsave", kvm_bindings::KVM_CAP_XSAVE),
];

/// Opens the device, asks it and has it make a virtual machine; measures, too, if told so.
pub fn look(path: &Path, measure: bool) -> KvmFacts {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) => {
            let access = match e.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Access::Absent,
                ErrorKind::PermissionDenied => Access::Denied,
                _ => Access::Failed,
            };
            // ENXIO and ENODEV: the device node is there and no driver behind it.
            return KvmFacts::unusable(access, Some(e.to_string()));
        }
    };
    let copy = match file.try_clone() {
        Ok(copy) => copy,
        Err(e) => return KvmFacts::unusable(Access::Failed, Some(e.to_string())),
    };
    let kvm = adopt(file);
    let version = kvm.get_api_version();
    if version != 12 {
        let why =
            if version < 0 { "it is no KVM device".into() } else { format!("its API version {version} is not 12") };
        return KvmFacts::unusable(Access::Failed, Some(why));
    }
    // A device that opens may still refuse: no memory, no permission inside a container, the CPU's extension taken. The
    // probe guest finds out, too.
    if !measure && let Err(e) = kvm.create_vm().and_then(|vm| vm.create_vcpu(0)) {
        return KvmFacts::unusable(Access::Failed, Some(format!("it refuses a virtual machine: {e}")));
    }
    let mut facts = KvmFacts::unusable(Access::Open, None);
    facts.api_version = Some(version);
    facts.capabilities =
        CAPABILITIES.iter().map(|&(name, cap)| (name.to_owned(), kvm.check_extension_raw(cap.into()) > 0)).collect();
    if measure {
        match speed::measure(copy) {
            Ok(speeds) => facts.speeds = Some(speeds),
            Err(why) => facts.probe_error = Some(why),
        }
    }
    facts
}

#[allow(unsafe_code)] // A descriptor changes its type
fn adopt(file: File) -> Kvm {
    // SAFETY: the descriptor is open and ours to give.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_no_kvm() {
        let none = look(Path::new("/nowhere/kvm"), true);
        assert_eq!((none.access, none.api_version), (Access::Absent, None));
        assert_eq!(look(Path::new("/dev/null/kvm"), false).access, Access::Absent);
        let null = look(Path::new("/dev/null"), true);
        assert_eq!((null.access, null.error.as_deref()), (Access::Failed, Some("it is no KVM device")));
        assert_eq!(look(Path::new("/proc/self"), false).access, Access::Failed, "a directory");
    }

    #[test]
    fn the_probe_guest_runs_where_kvm_does() {
        let path = Path::new("/dev/kvm");
        let facts = look(path, true);
        if facts.access != Access::Open {
            eprintln!("SKIPPED: /dev/kvm cannot be used here: {:?}", facts.error);
            return;
        }
        let speeds = facts.speeds.unwrap_or_else(|| panic!("{:?}", facts.probe_error));
        println!("{speeds:?}");
        assert!(speeds.plausible(), "{speeds:?}");
        // Nothing emulates at the CPU's speed, and an exit is thousands of instructions.
        assert!(speeds.host_ns > 0.02 && speeds.ring0_ns >= 0.5 * speeds.host_ns, "{speeds:?}");
        assert!(speeds.exit_ns > 100.0, "{speeds:?}");
    }
}
