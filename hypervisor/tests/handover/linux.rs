//! A stock kernel whose vCPU is replaced again and again while it boots, works and powers off: paging, PCIDs, interrupts, timers, SYSCALL,
//! self-modifying code, lazily kept FPU state, all of it must survive.

use paravane::chipset::{Chipset, ChipsetConfig};
use paravane::devices::{control::StopCause, lapic};
use paravane::engine::{self, EngineKind, MachineInfo, Vcpu, Windows};
use paravane::loader::{self, Boot};
use paravane::memory::GuestRam;
use paravane::running::{Driven, RunningMachine, RunningVcpu};
use paravane::{acpi, memory, smbios, tsc};
use paravane_cpu::snapshot::{Activity, VcpuSnapshot};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the guest says on its serial port.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn vcpu(mem: &GuestRam, chipset: &Arc<Chipset>) -> Box<dyn Vcpu> {
    one_of(1, 0, mem, chipset)
}

fn one_of(cpus: u32, id: u32, mem: &GuestRam, chipset: &Arc<Chipset>) -> Box<dyn Vcpu> {
    let tsc_khz = tsc::tsc_khz();
    let info = MachineInfo {
        cpus,
        tsc_khz,
        apic_hz: lapic::BUS_HZ,
        windows: Windows::Auto,
        hypervisor_leaves: chipset.hypervisor_leaves(id, tsc_khz, lapic::BUS_HZ),
    };
    engine::make(EngineKind::Bt, id, mem.clone(), chipset.clone(), &info).unwrap()
}

#[test]
fn a_stock_kernel_boots_on_ever_new_vcpus() {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests");
    let file = |name: &str| std::fs::read(guests.join(name)).ok();
    let (Some(kernel), Some(initrd)) = (file("6.1/vmlinuz"), file("initramfs-script.cpio")) else {
        eprintln!("SKIPPED: the stock kernel is not fetched; run cargo xtask guests");
        return;
    };
    let mem = memory::create(512 << 20).unwrap();
    let console = Console::default();
    let cfg = ChipsetConfig { cpus: 1, debug_exit: false, serial: Box::new(console.clone()), pv: None };
    let chipset = Chipset::new(cfg).unwrap();
    let rsdp = acpi::write(&mem, 1, &[]).unwrap();
    smbios::write(&mem).unwrap();
    let mut running = {
        let mut first = vcpu(&mem, &chipset);
        let boot = Boot { kernel: &kernel, initrd: Some(&initrd), cmdline: "console=ttyS0 panic=-1", rsdp };
        loader::load(&mem, &boot, first.state_mut()).unwrap();
        RunningVcpu::start(0, first, chipset.clone()).unwrap()
    };
    let began = Instant::now();
    let (mut handed, mut user, mut kernel_mode, mut windows) = (0, 0, 0, 0);
    loop {
        assert!(began.elapsed() < Duration::from_secs(240), "the guest does not end:\n{}", console.text());
        // Ever longer, for each time all translated code is lost; and the last one goes through to the end.
        if handed == 40 {
            let (_, how) = running.wait().unwrap_or_else(|e| panic!("{e}\n{}", console.text()));
            assert_eq!(how, Driven::Stopped);
            break;
        }
        std::thread::sleep(Duration::from_millis(60 + handed * 15));
        let (mut old, how) = running.pause().unwrap_or_else(|e| panic!("{e}\n{}", console.text()));
        if how == Driven::Stopped {
            break;
        }
        let state = old.save().unwrap();
        windows += u64::from(old.counters().iter().any(|(n, v)| n.contains("window") && *v != 0));
        *if state.cpl == 3 { &mut user } else { &mut kernel_mode } += 1;
        drop(old);
        let state = VcpuSnapshot::from_json(state.to_json().as_bytes()).unwrap();
        let mut new = vcpu(&mem, &chipset);
        new.load(&state).unwrap_or_else(|e| panic!("hand-over {handed}: {e}\n{state:?}"));
        running = RunningVcpu::start(0, new, chipset.clone()).unwrap();
        handed += 1;
    }
    let text = console.text();
    println!(
        "{handed} hand-overs ({user} in user code, {kernel_mode} in the kernel, {windows} with windows) in {:?}",
        began.elapsed()
    );
    assert_eq!(chipset.stop_cause(), Some(StopCause::PowerOff), "{text}");
    assert!(text.contains("paravane-script: exit 0"), "{text}");
    for complaint in
        ["BUG:", "Oops", "WARNING:", "Call Trace", "general protection", "segfault", "INFO: rcu", "soft lockup"]
    {
        assert!(!text.contains(complaint), "\"{complaint}\" in\n{text}");
    }
    assert!(handed > 4, "{handed} hand-overs, {user} in user code");
}

/// A machine with two vCPUs is stopped between instructions and let go again, time after time, while a stock kernel boots and works on
/// both: soon each time, and the kernel does not mind.
#[test]
fn a_machine_of_two_vcpus_is_paused_within_milliseconds() {
    const CPUS: u32 = 2;
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests");
    let file = |name: &str| std::fs::read(guests.join(name)).ok();
    let (Some(kernel), Some(initrd)) = (file("6.1/vmlinuz"), file("initramfs-script.cpio")) else {
        eprintln!("SKIPPED: the stock kernel is not fetched; run cargo xtask guests");
        return;
    };
    let mem = memory::create(512 << 20).unwrap();
    let console = Console::default();
    let cfg = ChipsetConfig { cpus: CPUS, debug_exit: false, serial: Box::new(console.clone()), pv: None };
    let chipset = Chipset::new(cfg).unwrap();
    let rsdp = acpi::write(&mem, CPUS, &[]).unwrap();
    smbios::write(&mem).unwrap();
    let mut vcpus: Vec<_> = (0..CPUS).map(|id| one_of(CPUS, id, &mem, &chipset)).collect();
    let boot = Boot { kernel: &kernel, initrd: Some(&initrd), cmdline: "console=ttyS0 panic=-1", rsdp };
    loader::load(&mem, &boot, vcpus[0].state_mut()).unwrap();
    vcpus[1].state_mut().init();

    let began = Instant::now();
    let (mut times, mut both) = (Vec::new(), 0);
    loop {
        assert!(began.elapsed() < Duration::from_secs(600), "the guest does not end:\n{}", console.text());
        let running = RunningMachine::start(vcpus, chipset.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(5 + times.len() as u64 % 23));
        let asked = Instant::now();
        let (back, how) = running.pause().unwrap();
        if how == Driven::Stopped {
            break;
        }
        times.push(asked.elapsed());
        assert_eq!(back.len(), CPUS as usize);
        vcpus = back;
        both += u32::from(vcpus.iter_mut().all(|v| v.save().unwrap().activity == Activity::Running));
    }
    let text = console.text();
    assert_eq!(chipset.stop_cause(), Some(StopCause::PowerOff), "{text}");
    assert!(text.contains("paravane-script: exit 0"), "{text}");
    for complaint in ["BUG:", "Oops", "WARNING:", "Call Trace", "segfault", "INFO: rcu", "soft lockup"] {
        assert!(!text.contains(complaint), "\"{complaint}\" in\n{text}");
    }
    times.sort_unstable();
    let of_100 = |n: usize| times[(times.len() - 1) * n / 100];
    println!(
        "{} pauses, {both} with both running: median {:?}, 99 of 100 within {:?}",
        times.len(),
        of_100(50),
        of_100(99)
    );
    assert!(times.len() >= 50 && both > 0, "{} pauses, {both} with both running", times.len());
    // A vCPU that is not on a host CPU takes as long as the host wants, so a busy one decides about the rest.
    assert!(of_100(25) < Duration::from_millis(10), "{times:?}");
}
