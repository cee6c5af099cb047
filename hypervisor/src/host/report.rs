//! What `paravane doctor` reports: facts, verdicts, and the choice that follows from them.
//!
//! The structures are the JSON form, and that is stable: fields are added, never renamed or given another meaning, and
//! [`FORMAT`] is raised if that must be. docs/doctor.md describes each.

use super::kvm::KvmFacts;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the JSON form.
pub const FORMAT: u32 = 1;

/// Everything that the doctor found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Paravane's version.
    pub version: String,
    /// Kernel, CPU, memory.
    pub host: Host,
    /// CPU features by name, see [`super::features`].
    pub features: BTreeMap<String, bool>,
    /// /dev/kvm.
    pub kvm: Kvm,
    /// Huge pages.
    pub huge_pages: HugePages,
    /// Limits of this user and process.
    pub limits: Limits,
    /// What each engine can do here.
    pub engines: Engines,
    /// What `--engine auto` does here.
    pub auto: Choice,
    /// What is not as it should be, and what to do about it.
    pub advice: Vec<Advice>,
}

/// Kernel, CPU, memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Release of the kernel.
    pub kernel: Option<String>,
    /// The CPU's name.
    pub cpu: String,
    /// CPUs online, such as `0-3`.
    pub cpus_online: Option<String>,
    /// Whether the host is itself a guest (CPUID leaf 1, ECX bit 31).
    pub virtualized: bool,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Memory that is to be had without swapping, bytes.
    pub memory_available: Option<u64>,
    /// What the control group allows, bytes; `None` is no bound.
    pub memory_group: Option<u64>,
}

/// What is behind /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// Intel VMX.
    Vmx,
    /// AMD SVM.
    Svm,
    /// No hardware behind it: ring 0 is emulated (PVM and its like).
    Emulating,
    /// There is no usable KVM, or it could not be told.
    Unknown,
}

/// /dev/kvm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kvm {
    /// What is behind it.
    pub kind: KvmKind,
    /// Kernel modules whose name begins with kvm.
    pub modules: Vec<String>,
    /// The group that the device belongs to, when it has a name.
    pub group: Option<String>,
    /// What the device says.
    #[serde(flatten)]
    pub facts: KvmFacts,
    /// Whether the speeds come from an earlier measurement since the host booted.
    pub cached: bool,
}

/// Huge pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HugePages {
    /// Transparent huge pages of private memory: always, madvise or never.
    pub transparent: Option<String>,
    /// Those of shared memory, which guest RAM is: always, within_size, advise, never, deny or force.
    pub shared: Option<String>,
    /// hugetlbfs pools: page size in bytes to free pages.
    pub free: BTreeMap<u64, u64>,
}

/// Limits of this user and process; `None` is "unlimited" or unknown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// vm.max_map_count: mappings of one process.
    pub max_map_count: Option<u64>,
    /// vm.mmap_min_addr, bytes.
    pub mmap_min_addr: Option<u64>,
    /// vm.overcommit_memory.
    pub overcommit: Option<u64>,
    /// RLIMIT_MEMLOCK, bytes.
    pub memlock: Option<u64>,
    /// RLIMIT_NOFILE.
    pub nofile: Option<u64>,
    /// RLIMIT_AS, bytes.
    pub address_space: Option<u64>,
}

/// What an engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// Stock kernels, at the engine's full speed.
    Good,
    /// Guests run, with restrictions that the text names.
    Limited,
    /// No guest runs.
    None,
}

/// One engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Engine {
    /// The verdict.
    pub fitness: Fitness,
    /// What runs, or what is missing, in one clause.
    pub text: String,
    /// What the engine needs or can use, by name.
    pub requirements: BTreeMap<String, bool>,
}

/// All engines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Engines {
    /// Hardware assist.
    pub kvm: Engine,
    /// Binary translation.
    pub bt: Engine,
}

/// An engine's name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineName {
    /// KVM.
    Kvm,
    /// Binary translation.
    Bt,
}

/// What `--engine auto` does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The engine.
    pub engine: EngineName,
    /// Why.
    pub reason: String,
}

/// Something to mend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// Which line of the table, in its spelling.
    pub topic: String,
    /// Whether guests cannot run until it is mended, or only run slower.
    pub essential: bool,
    /// What is wrong and what to do.
    pub text: String,
}
