use super::kvm::{self, Access, KvmFacts};
use super::report::{EngineName, Fitness, KvmKind, Report};
use super::sources::{Rlimits, Sources};
use super::speed::Speeds;
use super::*;
use paravane_bt::Requirement;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// A folder that goes with its test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("paravane-host-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, path: &str, text: &str) -> PathBuf {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A CPU with these features and no others.
fn cpu(features: &'static [&str]) -> sources::Cpuid {
    Box::new(move |leaf, sub| {
        let has = |name: &str, bit: u32| if features.contains(&name) { 1 << bit } else { 0 };
        let brand = |n: usize| {
            let b =
                &b"Test CPU   @ 2 GHz\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[n * 16..n * 16 + 16];
            std::array::from_fn(|i| u32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]]))
        };
        match (leaf, sub) {
            (0, _) => [0x16, 0, 0, 0],
            (1, _) => [0, 0, has("vmx", 5) | has("hypervisor", 31) | has("xsave", 26), 0],
            (7, 0) => [0, has("bmi2", 8) | has("fsgsbase", 0), 0, 0],
            (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, has("svm", 2), 0],
            (0x8000_0002..=0x8000_0004, _) => brand((leaf - 0x8000_0002) as usize),
            _ => [0; 4],
        }
    })
}

fn open(speeds: Option<Speeds>) -> KvmFacts {
    let mut f = KvmFacts::unusable(Access::Open, None);
    (f.api_version, f.speeds) = (Some(12), speeds);
    f
}

const NATIVE: Speeds = Speeds { ring0_ns: 0.21, ring3_ns: Some(0.2), exit_ns: 1100.0, host_ns: 0.2 };
const EMULATED: Speeds = Speeds { ring0_ns: 480.0, ring3_ns: Some(0.2), exit_ns: 25_000.0, host_ns: 0.2 };

fn needs(missing: &'static [&str]) -> Vec<Requirement> {
    [("BMI2", true), ("executable memory", true), ("FSGSBASE", false)]
        .into_iter()
        .map(|(name, essential)| Requirement { name, essential, met: !missing.contains(&name), why: "because" })
        .collect()
}

/// A well-equipped host, where tests then break things.
fn host(root: &Scratch, features: &'static [&str], kvm: KvmFacts, missing: &'static [&str]) -> Sources {
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.1.0-test\n"),
        ("proc/sys/kernel/random/boot_id", "11111111-2222\n"),
        ("proc/meminfo", "MemTotal:       8000000 kB\nMemAvailable:   4000000 kB\n"),
        ("proc/self/cgroup", "0::/user/run\n"),
        ("sys/fs/cgroup/user/memory.max", "1073741824\n"),
        ("sys/fs/cgroup/user/run/memory.max", "max\n"),
        ("proc/sys/vm/max_map_count", "65530\n"),
        ("proc/sys/vm/mmap_min_addr", "65536\n"),
        ("proc/sys/vm/overcommit_memory", "0\n"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "7\n"),
        ("sys/devices/system/cpu/online", "0-3\n"),
        ("etc/group", "root:x:0:\nkvm:x:104:me\n"),
        ("sys/module/kvm/refcnt", "1"),
    ] {
        root.file(path, text);
    }
    let measured = open(kvm.speeds);
    Sources {
        root: root.0.clone(),
        cpuid: cpu(features),
        rlimits: Box::new(|| Rlimits { memlock: Some(8 << 20), nofile: Some(1024), address_space: None }),
        kvm: Box::new(move |_, measure| {
            let mut f = if kvm.access == Access::Open { measured.clone() } else { kvm.clone() };
            if measure {
                f.probe_error = kvm.probe_error.clone();
            } else {
                f.speeds = None;
            }
            f
        }),
        bt: Box::new(move || needs(missing)),
    }
}

const GOOD: &[&str] = &["bmi2", "xsave", "fsgsbase"];

fn text(r: &Report) -> String {
    let text = table::render(r);
    assert!(text.lines().count() <= 24, "too long for a screen:\n{text}");
    text
}

fn advised(r: &Report, topic: &str, words: &str) -> bool {
    r.advice.iter().any(|a| a.topic == topic && a.text.contains(words))
}

#[test]
fn a_host_with_vmx_gets_kvm() {
    let root = Scratch::new();
    let s = host(&root, &["vmx", "bmi2", "xsave", "fsgsbase"], open(Some(NATIVE)), &[]);
    let r = examine(&s, &Cache::none());
    assert_eq!((r.kvm.kind, r.engines.kvm.fitness, r.engines.bt.fitness), (KvmKind::Vmx, Fitness::Good, Fitness::Good));
    assert_eq!(r.auto.engine, EngineName::Kvm);
    assert!(r.auto.reason.contains("0.21 ns") && r.auto.reason.contains("VMX"), "{}", r.auto.reason);
    assert_eq!(r.advice, []);
    assert_eq!((r.host.memory, r.host.memory_group), (Some(8_192_000_000), Some(1 << 30)));
    assert_eq!((r.host.cpu.as_str(), r.huge_pages.free[&(2 << 20)]), ("Test CPU @ 2 GHz", 7));
    assert!(text(&r).contains("--engine auto  kvm: "));
    // The same with SVM.
    let s = host(&root, &["svm", "bmi2", "xsave", "fsgsbase"], open(Some(NATIVE)), &[]);
    assert_eq!(examine(&s, &Cache::none()).kvm.kind, KvmKind::Svm);
}

#[test]
fn emulating_kvms_are_named_and_not_picked() {
    let root = Scratch::new();
    root.file("sys/module/kvm_pvm/refcnt", "1");
    // A CPUID bit does not change what was measured.
    for features in [GOOD, &["vmx", "bmi2", "xsave", "fsgsbase", "hypervisor"]] {
        let s = host(&root, features, open(Some(EMULATED)), &[]);
        let r = examine(&s, &Cache::none());
        assert_eq!((r.kvm.kind, r.engines.kvm.fitness), (KvmKind::Emulating, Fitness::Limited));
        assert_eq!(r.auto.engine, EngineName::Bt);
        assert!(
            r.auto.reason.contains("only emulates ring 0") && r.auto.reason.contains("480 ns"),
            "{}",
            r.auto.reason
        );
        let text = text(&r);
        for words in ["emulating", "kvm_pvm", "ring 0 480 ns, ring 3 0.20 ns", "exit 25 us", "--engine auto  bt: "] {
            assert!(text.contains(words), "\"{words}\" is not in\n{text}");
        }
    }
}

#[test]
fn hosts_without_a_usable_kvm() {
    let root = Scratch::new();
    let missing = KvmFacts::unusable(Access::Absent, Some("No such file".into()));
    let r = examine(&host(&root, GOOD, missing.clone(), &[]), &Cache::none());
    assert_eq!((r.auto.engine, r.auto.reason.as_str()), (EngineName::Bt, "there is no /dev/kvm"));
    assert_eq!(r.advice, [], "nothing can be mended");
    assert!(text(&r).contains("/dev/kvm       absent"));
    let r = examine(&host(&root, &["vmx", "bmi2"], missing, &[]), &Cache::none());
    assert!(advised(&r, "/dev/kvm", "kvm_intel"));

    root.file("dev/kvm", "");
    let denied = KvmFacts::unusable(Access::Denied, Some("Permission denied".into()));
    let mut s = host(&root, GOOD, denied, &[]);
    let gid = fs::metadata(root.0.join("dev/kvm")).unwrap().gid();
    root.file("etc/group", &format!("other:x:4242:\nvirt:x:{gid}:me\n"));
    let r = examine(&s, &Cache::none());
    assert_eq!((r.auto.engine, r.auto.reason.as_str()), (EngineName::Bt, "this user may not open /dev/kvm"));
    assert!(advised(&r, "/dev/kvm", "group \"virt\""), "{:?}", r.advice);
    assert!(text(&r).contains("may not open it"));

    // The real look at a file that is no device.
    s.kvm = Box::new(kvm::look);
    let r = examine(&s, &Cache::none());
    assert_eq!((r.kvm.facts.access, r.auto.engine), (Access::Failed, EngineName::Bt));
    assert!(r.auto.reason.contains("no KVM device"), "{}", r.auto.reason);
}

#[test]
fn a_kvm_that_cannot_run_the_probe_is_not_picked() {
    let root = Scratch::new();
    let mut broken = open(None);
    broken.probe_error = Some("KVM refuses a vCPU (Cannot allocate memory)".into());
    let r = examine(&host(&root, &["vmx", "bmi2"], broken, &[]), &Cache::none());
    assert_eq!((r.auto.engine, r.engines.kvm.fitness), (EngineName::Bt, Fitness::None));
    assert!(r.auto.reason.contains("refuses a vCPU"), "{}", r.auto.reason);
    assert!(advised(&r, "/dev/kvm", "did not run"));
}

#[test]
fn what_binary_translation_lacks_is_said() {
    let root = Scratch::new();
    let none = || KvmFacts::unusable(Access::Absent, None);
    let r = examine(&host(&root, GOOD, none(), &["FSGSBASE"]), &Cache::none());
    assert_eq!((r.engines.bt.fitness, r.auto.engine), (Fitness::Limited, EngineName::Bt));
    let r = examine(&host(&root, GOOD, none(), &["BMI2"]), &Cache::none());
    assert_eq!((r.engines.bt.fitness, r.engines.kvm.fitness), (Fitness::None, Fitness::None));
    assert!(r.advice.iter().any(|a| a.essential && a.topic == "engine bt" && a.text.contains("BMI2")));
    assert!(text(&r).contains("engine bt (needed)"));
    // Then even a slow KVM is better than nothing.
    let s = host(&root, GOOD, open(Some(EMULATED)), &["BMI2"]);
    assert_eq!(choose(&s, &Cache::none()).engine, EngineName::Kvm);
}

#[test]
fn tight_limits_are_mentioned() {
    let root = Scratch::new();
    let mut s = host(&root, GOOD, KvmFacts::unusable(Access::Absent, None), &[]);
    root.file("proc/sys/vm/max_map_count", "4096\n");
    root.file("proc/sys/vm/overcommit_memory", "2\n");
    root.file("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n");
    root.file("sys/fs/cgroup/user/run/memory.max", "67108864\n");
    s.rlimits = Box::new(|| Rlimits { nofile: Some(64), ..Rlimits::default() });
    let r = examine(&s, &Cache::none());
    for (topic, words) in [
        ("limits", "4096 mappings"),
        ("limits", "64 open files"),
        ("huge pages", "shmem_enabled"),
        ("memory", "overcommit"),
        ("memory", "64 MiB"),
    ] {
        assert!(advised(&r, topic, words), "{words}: {:?}", r.advice);
    }
    assert!(r.advice.iter().all(|a| !a.essential));
    text(&r);
}

#[test]
fn an_empty_root_is_a_host_too() {
    let root = Scratch::new();
    let mut s = host(&root, &[], open(None), &[]);
    s.root = root.0.join("nothing");
    s.kvm = Box::new(kvm::look);
    let r = examine(&s, &Cache::none());
    assert_eq!((r.host.kernel.as_ref(), r.host.memory, r.kvm.facts.access), (None, None, Access::Absent));
    assert!(text(&r).contains("unknown"));
}

#[test]
fn json_reads_back_and_keeps_its_names() {
    let root = Scratch::new();
    for facts in [open(Some(EMULATED)), KvmFacts::unusable(Access::Denied, Some("no".into()))] {
        let r = examine(&host(&root, GOOD, facts, &["FSGSBASE"]), &Cache::none());
        let json = serde_json::to_string(&r).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), r);
        // Scripts read these.
        let v: serde_json::Value = serde_json::from_str(&json).unwrap();
        for pointer in [
            "/format",
            "/version",
            "/host/kernel",
            "/host/cpu",
            "/host/memory_available",
            "/features/vmx",
            "/kvm/kind",
            "/kvm/access",
            "/kvm/speeds",
            "/kvm/capabilities",
            "/huge_pages/shared",
            "/limits/max_map_count",
            "/engines/kvm/fitness",
            "/engines/bt/requirements/BMI2",
            "/auto/engine",
            "/auto/reason",
            "/advice",
        ] {
            assert!(v.pointer(pointer).is_some(), "{pointer} is gone");
        }
        assert_eq!((v["format"].as_u64(), v["auto"]["engine"].as_str()), (Some(1), Some("bt")));
    }
}

/// A host whose KVM counts how often it is measured.
fn counting(root: &Scratch, speeds: Speeds) -> (Sources, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let counter = count.clone();
    let mut s = host(root, GOOD, open(Some(speeds)), &[]);
    s.kvm = Box::new(move |_: &Path, measure| {
        if measure {
            counter.fetch_add(1, SeqCst);
        }
        open(measure.then_some(speeds))
    });
    (s, count)
}

#[test]
fn measurements_are_kept_for_as_long_as_they_hold() {
    let root = Scratch::new();
    let cache = Cache::at(&root.0.join("deep/in/cache/host.json"));
    let (s, count) = counting(&root, EMULATED);
    let first = choose(&s, &cache);
    assert_eq!(count.load(SeqCst), 1);
    for _ in 0..3 {
        assert_eq!(choose(&s, &cache), first);
    }
    assert_eq!(count.load(SeqCst), 1, "the cache was asked");
    // The doctor measures always.
    assert!(!examine(&s, &cache).kvm.cached);
    assert_eq!(count.load(SeqCst), 2);
    // Another boot, another kernel, another module: measured anew, each once.
    for (n, (path, text)) in [
        ("proc/sys/kernel/random/boot_id", "other"),
        ("proc/sys/kernel/osrelease", "6.2"),
        ("sys/module/kvm_amd/x", ""),
    ]
    .into_iter()
    .enumerate()
    {
        root.file(path, text);
        choose(&s, &cache);
        choose(&s, &cache);
        assert_eq!(count.load(SeqCst), 3 + n as u32, "{path}");
    }
    // Without a boot identifier nothing can be trusted.
    root.file("proc/sys/kernel/random/boot_id", "");
    choose(&s, &cache);
    choose(&s, &cache);
    assert_eq!(count.load(SeqCst), 7);
}

#[test]
fn bad_caches_are_ignored() {
    let root = Scratch::new();
    let path = root.file("host.json", "");
    let cache = Cache::at(&path);
    let (s, _) = counting(&root, NATIVE);
    let good = choose(&s, &cache);
    assert_eq!(good.engine, EngineName::Kvm);
    let text = fs::read_to_string(&path).unwrap();
    let bad = [
        String::new(),
        "{".into(),
        text[..text.len() / 2].into(),
        text.replace("0.21", "\"fast\""),
        text.replace("0.21", "-5.0"),
        text.replace("0.21", "1e300"),
        text.replace("\"key\"", "\"clef\""),
        "\0".repeat(100),
        "[".repeat(1 << 20),
    ];
    for content in bad {
        fs::write(&path, &content).unwrap();
        let (s, count) = counting(&root, NATIVE);
        assert_eq!(choose(&s, &cache), good);
        assert_eq!(count.load(SeqCst), 1, "believed: {}", &content[..content.len().min(60)]);
        assert_eq!(choose(&s, &cache), good);
        assert_eq!(count.load(SeqCst), 1, "it was mended");
    }
    // Places where nothing can be written.
    for path in ["/proc/nowhere/host.json", "/dev/null/host.json"] {
        let (s, count) = counting(&root, NATIVE);
        for n in 1..3 {
            assert_eq!(choose(&s, &Cache::at(Path::new(path))), good);
            assert_eq!(count.load(SeqCst), n);
        }
    }
    // A folder in the file's place, and no litter beside it.
    fs::remove_file(&path).unwrap();
    fs::create_dir_all(path.join("full")).unwrap();
    let (s, _) = counting(&root, NATIVE);
    assert_eq!(choose(&s, &cache), good);
    let litter =
        fs::read_dir(&root.0).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains(".new"));
    assert_eq!(litter.count(), 0);
}

/// On this host, whatever it is: what `auto` needs is printed, and the two ways to the answer agree.
#[test]
fn this_host() {
    let root = Scratch::new();
    let (s, cache) = (Sources::host(), Cache::at(&root.0.join("host.json")));
    let timed = || {
        let began = std::time::Instant::now();
        (choose(&s, &cache), began.elapsed())
    };
    let (first, slow) = timed();
    let (second, quick) = timed();
    println!("auto: {first:?}\nmeasured in {slow:?}, cached in {quick:?}");
    assert_eq!(first.engine, second.engine);
    let r = examine(&s, &cache);
    println!("{}", text(&r));
    assert_eq!(r.auto.engine, first.engine);
    assert!(r.host.kernel.is_some() && r.host.memory.is_some_and(|n| n > 1 << 20));
    assert_eq!(r.features["bmi2"], std::arch::is_x86_feature_detected!("bmi2"));
    let names: BTreeMap<_, _> = r.features.iter().collect();
    assert_eq!(names.len(), r.features.len());
}
