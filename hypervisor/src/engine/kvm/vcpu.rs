//! One vCPU: its run loop and what each exit comes to.
//!
//! The local APIC is the machine's own (`devices::lapic`), reached through MMIO and MSR exits, so a vCPU's state is the same wherever it
//! runs. Interrupts go in through KVM_INTERRUPT: when one is deliverable and KVM says that the guest can take it, it is acknowledged and
//! injected; else KVM is asked to come back as soon as it can (the interrupt window).
//!
//! With local APICs in the kernel ([`super::split`]) halts, start-up messages, NMIs and all interrupts but the 8259A's are the kernel's business.
//!
//! The architectural state lives in the kernel while the vCPU runs. [`KvmVcpu::state_mut`] fetches it, and the next run puts it back.
#![allow(unsafe_code)] // KVM_INTERRUPT has no safe form.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;
use paravane_cpu::cpuid::CpuidPolicy;
use paravane_cpu::msr::{self, nr, shift_deadline};
use paravane_cpu::snapshot::{LapicState, StateError, VcpuSnapshot};
use paravane_cpu::state::{AWAITS_STARTUP, rflags};
use paravane_cpu::{Bus, BusOutcome, CpuState, Env, HypercallOutcome, Startup, VcpuExit};

use super::env::KvmEnv;
use super::report::{self, Cause, Report};
use super::run_page::{Exit, Io, RunPage};
use super::state::{self, MsrMap, Shape};
use super::stats::Stats;
use super::{KvmError, KvmVm, cpuid, split};
use crate::devices::control::Kick;
use crate::devices::lapic::Lapic;
use crate::engine::{Doorbells, EngineError, Profile, Vcpu};
use crate::pv::HYPERCALL_PORT;
use crate::tsc;

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;

/// Where the newest architectural state is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Newest {
    /// In the kernel; the copy here is old.
    Kernel,
    /// Here; the kernel must be given it before the guest runs.
    Here,
}

/// See the module text.
pub(super) struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    vm: Arc<KvmVm>,
    run: Arc<RunPage>,
    env: KvmEnv,
    shape: Shape,
    st: Box<CpuState>,
    /// What was in flight when the state was fetched.
    events: kvm::kvm_vcpu_events,
    newest: Newest,
    /// What the kernel's local APIC is to be given together with the state, if the kernel keeps one.
    lapic: Option<LapicState>,
    /// The guest has not been entered since the state was put into the kernel, so what the last exit said no longer holds.
    replaced: bool,
    /// Exits leave the registers in the shared page.
    synced: bool,
    /// The last exit's instruction must be completed before the state is whole.
    unfinished: bool,
    /// What the guest does while it is let go, as [`CpuState::halted`] has it.
    halted: u8,
    /// The state could not be fetched when somebody asked for it, which the next run reports.
    broken: Option<KvmError>,
    stats: Stats,
}

/// How the run loop goes on after an exit.
enum Next {
    Again,
    Leave(VcpuExit),
}

impl KvmVcpu {
    /// A vCPU in its reset state.
    pub(super) fn new(vm: Arc<KvmVm>, id: u32, bus: Arc<dyn Bus>, policy: CpuidPolicy) -> Result<Self, KvmError> {
        let fd = vm.fd.create_vcpu(id.into()).map_err(|e| KvmError::refused("a vCPU", e))?;
        fd.set_cpuid2(&cpuid::table(&policy, id)?).map_err(|e| KvmError::refused("KVM_SET_CPUID2", e))?;
        let run = RunPage::new(fd.as_raw_fd(), vm.fd.run_size()).map_err(KvmError::Host)?;
        let shape = Shape {
            tsc: !vm.emulating,
            msrs: MsrMap::probe(&fd),
            xcrs: vm.xcrs && fd.get_xcrs().is_ok_and(|x| x.nr_xcrs > 0),
        };
        // As firmware leaves it.
        let lapic = vm.split.then(|| Lapic::new(id).save(0));
        Ok(Self {
            id,
            fd,
            run,
            lapic,
            vm: vm.clone(),
            env: KvmEnv { id, ram: vm.ram.clone(), bus, cpuid: policy, stopping: false },
            shape,
            st: Box::new(CpuState::reset(id)),
            events: kvm::kvm_vcpu_events::default(),
            newest: Newest::Here,
            replaced: true,
            synced: false,
            unfinished: false,
            halted: 0,
            broken: None,
            stats: Stats::default(),
        })
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Lets KVM complete the instruction of the last exit, so that the state is that of an instruction boundary.
    fn finish(&mut self) -> Result<(), KvmError> {
        while std::mem::take(&mut self.unfinished) {
            match self.run.complete(self.raw()).map_err(KvmError::Run)? {
                Exit::Interrupted => break,
                // An instruction with several accesses (string I/O, an operand across two device registers).
                exit @ (Exit::Io(_) | Exit::Mmio { .. } | Exit::Msr { .. }) => {
                    self.serve(exit)?;
                }
                exit => return Err(KvmError::Unexpected(format!("{exit:?}"))),
            }
        }
        Ok(())
    }

    /// Fetches the state from the kernel.
    fn fetch(&mut self) -> Result<(), KvmError> {
        if self.newest == Newest::Kernel {
            self.finish()?;
            self.stats.transfers += 1;
            self.events = state::read(&self.fd, &self.shape, &mut self.st)?;
            if self.vm.split {
                self.halted = split::activity(&self.fd)?;
            }
            self.st.halted = self.halted;
        }
        Ok(())
    }

    /// Puts the state into the kernel if it is newer here.
    fn put(&mut self) -> Result<(), KvmError> {
        if self.newest == Newest::Here {
            self.stats.transfers += 1;
            let apic = self.local_apic()?;
            state::write(&self.fd, &self.shape, &self.st, &self.events, apic)?;
            if self.vm.split {
                if let Some(lapic) = &self.lapic {
                    split::write(&self.vm, &self.fd, lapic)?;
                }
                self.lapic = None;
                split::set_activity(&self.fd, self.st.halted)?;
            }
            self.halted = self.st.halted;
            self.newest = Newest::Kernel;
            self.replaced = true;
        }
        Ok(())
    }

    /// IA32_APIC_BASE and CR8 that the kernel is to be given with the state, where it keeps the local APIC.
    fn local_apic(&self) -> Result<Option<(u64, u64)>, KvmError> {
        Ok(match (&self.lapic, self.vm.split) {
            (_, false) => None,
            (Some(l), true) => Some((l.base, u64::from(l.tpr >> 4))),
            (None, true) => {
                let now = self.fd.get_sregs().map_err(|_| KvmError::Transfer("system registers"))?;
                Some((now.apic_base, now.cr8))
            }
        })
    }

    fn run_loop(&mut self) -> Result<VcpuExit, KvmError> {
        if let Some(e) = self.broken.take() {
            return Err(e);
        }
        self.run.adopt_thread();
        loop {
            self.run.acknowledge();
            if std::mem::take(&mut self.env.stopping) || self.env.bus.stopping() {
                return Ok(VcpuExit::Stopped);
            }
            if self.vm.split {
                self.put()?;
                self.inject()?;
                let exit = self.run.enter(self.raw()).map_err(KvmError::Run)?;
                (self.unfinished, self.replaced) = (false, false);
                self.stats.exits += 1;
                if let Next::Leave(exit) = self.serve(exit)? {
                    return Ok(exit);
                }
                continue;
            }
            if let Some(message) = self.env.bus.take_startup(self.id) {
                self.start_up(message)?;
            }
            self.put()?;
            if self.halted == AWAITS_STARTUP {
                return Ok(VcpuExit::AwaitsStartup);
            }
            if self.halted != 0
                && let Some(exit) = self.stays_halted()
            {
                self.stats.halts += 1;
                return Ok(exit);
            }
            self.inject()?;
            let cr8 = self.env.bus.cr8_read(self.id);
            self.run.set_cr8(cr8);
            let exit = self.run.enter(self.raw()).map_err(KvmError::Run)?;
            (self.unfinished, self.replaced) = (false, false);
            self.stats.exits += 1;
            if self.run.cr8() != cr8 {
                self.env.bus.cr8_write(self.id, self.run.cr8());
            }
            if let Next::Leave(exit) = self.serve(exit)? {
                return Ok(exit);
            }
        }
    }

    /// What to wait for, unless something ends the halt.
    fn stays_halted(&mut self) -> Option<VcpuExit> {
        let flags = self.fd.get_regs().map_or(rflags::IF, |r| r.rflags);
        let pending = self.env.bus.interrupt_pending(self.id);
        let masked = flags & rflags::IF == 0;
        let wakes = pending && !masked || self.take_nmi() || self.env.bus.wakes(self.id);
        self.halted = u8::from(!wakes);
        let exit = if pending && masked { VcpuExit::HaltMasked } else { VcpuExit::Halt };
        (!wakes).then_some(exit)
    }

    /// INIT or a start-up message has come. What was in flight is dropped with INIT (SDM vol. 3, table 10-1).
    fn start_up(&mut self, message: Startup) -> Result<(), KvmError> {
        if matches!(message, Startup::Sipi(_)) && self.halted != AWAITS_STARTUP {
            return Ok(()); // it runs already
        }
        self.fetch()?;
        match message {
            Startup::Init => {
                self.st.init();
                self.events = kvm::kvm_vcpu_events::default();
            }
            Startup::Sipi(vector) => self.st.start_up(vector),
        }
        self.newest = Newest::Here;
        Ok(())
    }

    fn take_nmi(&mut self) -> bool {
        self.env.bus.take_nmi(self.id) && self.fd.nmi().is_ok()
    }

    /// Injects what is pending and permitted.
    fn inject(&mut self) -> Result<(), KvmError> {
        let pending = self.env.bus.interrupt_pending(self.id);
        if !self.vm.split {
            self.take_nmi();
        } else if pending && self.replaced {
            // A vCPU that halts in the kernel makes no exit for a window, so ask now.
            (self.unfinished, self.replaced) = (true, false);
            self.finish()?;
            self.run.acknowledge();
        }
        if pending && !self.replaced && self.run.ready_for_interrupt() {
            if let Some(vector) = self.env.bus.interrupt_ack(self.id) {
                let arg = kvm::kvm_interrupt { irq: vector.into() };
                // SAFETY: the descriptor is a vCPU's, and the argument is what the request takes.
                if unsafe { libc::ioctl(self.raw(), KVM_INTERRUPT, &raw const arg) } != 0 {
                    return Err(KvmError::Unexpected("KVM_INTERRUPT was refused".into()));
                }
                self.stats.interrupts += 1;
            }
            self.run.request_window(self.env.bus.interrupt_pending(self.id));
        } else {
            self.run.request_window(pending);
        }
        Ok(())
    }

    /// Does what an exit asks for.
    fn serve(&mut self, exit: Exit) -> Result<Next, KvmError> {
        match exit {
            Exit::Interrupted => self.stats.interrupted += 1,
            Exit::InterruptWindow => self.stats.windows += 1,
            Exit::TaskPriority => self.stats.priorities += 1,
            Exit::Io(Io { port: HYPERCALL_PORT, write: true, size: 4, count: 1, .. }) => return self.hypercall(),
            Exit::Io(io) => self.port(&io)?,
            Exit::Mmio { gpa, len, write, data } => self.mmio(gpa, len, write, data),
            Exit::Msr { index, reason, write, data } => self.msr(index, reason, write, data)?,
            Exit::Halt => self.halted = 1,
            Exit::Shutdown => return Ok(Next::Leave(VcpuExit::TripleFault)),
            Exit::SystemEvent(kvm::KVM_SYSTEM_EVENT_CRASH | kvm::KVM_SYSTEM_EVENT_RESET) => {
                return Ok(Next::Leave(VcpuExit::TripleFault));
            }
            Exit::SystemEvent(_) => return Ok(Next::Leave(VcpuExit::Stopped)),
            Exit::InternalError(e) => return Err(self.gave_up(Cause::of(&e), &e.insn[..e.insn_len.into()])),
            Exit::EntryFailed { reason, .. } => return Err(self.gave_up(Cause::Entry(reason), &[])),
            Exit::EndOfInterrupt(vector) => {
                self.stats.ends += 1;
                self.env.bus.end_of_interrupt(vector);
            }
            Exit::Debug => return Err(KvmError::Unexpected(format!("{exit:?}"))),
            Exit::Other(n) => return Err(self.gave_up(Cause::Exit(n), &[])),
        }
        Ok(Next::Again)
    }

    fn port(&mut self, io: &Io) -> Result<(), KvmError> {
        self.unfinished = true;
        let data = self.run.io_data(io).ok_or_else(|| KvmError::Unexpected(format!("{io:?}")))?;
        let (bus, id) = (&self.env.bus, self.id);
        if io.write {
            self.stats.pio_writes += u64::from(io.count);
            for item in data.chunks_exact(io.size.into()) {
                self.env.stopping |= bus.pio_write(id, io.port, item) == BusOutcome::Stopping;
            }
        } else {
            self.stats.pio_reads += u64::from(io.count);
            for item in data.chunks_exact_mut(io.size.into()) {
                bus.pio_read(id, io.port, item);
            }
        }
        Ok(())
    }

    fn mmio(&mut self, gpa: u64, len: u8, write: bool, mut data: [u8; 8]) {
        self.unfinished = true;
        let part = &mut data[..usize::from(len)];
        if write {
            self.stats.mmio_writes += 1;
            let outcome = self.env.bus.mmio_write(self.id, gpa, part);
            self.env.note_outcome(outcome);
        } else {
            self.stats.mmio_reads += 1;
            self.env.bus.mmio_read(self.id, gpa, part);
            self.run.answer_mmio(data);
        }
    }

    /// An MSR that is the local APIC's or that KVM does not know. What KVM knows and finds wrong is #GP.
    fn msr(&mut self, index: u32, reason: u32, write: bool, data: u64) -> Result<(), KvmError> {
        self.unfinished = true;
        if write {
            self.stats.msr_writes += 1;
        } else {
            self.stats.msr_reads += 1;
        }
        let ours = reason == kvm::KVM_MSR_EXIT_REASON_FILTER || matches!(index, nr::X2APIC_FIRST..=nr::X2APIC_LAST);
        let value = if !ours && reason != kvm::KVM_MSR_EXIT_REASON_UNKNOWN {
            None
        } else if write {
            msr::write(&mut self.st, &mut self.env, index, data).ok().map(|_| 0)
        } else {
            msr::read(&self.st, &self.env, index).ok()
        };
        if write && value.is_some() && matches!(index, nr::TSC | nr::TSC_ADJUST) {
            if !self.shape.tsc {
                // RDTSC goes on as before, and so must all that is derived from it.
                self.st.tsc_offset = 0;
                self.env.bus.tsc_moved(self.id, 0);
            }
            state::move_tsc(&self.fd, &self.st)?;
        }
        self.run.answer_msr(value);
        Ok(())
    }

    /// A hypercall by way of its port. Only the registers that calls use cross.
    fn hypercall(&mut self) -> Result<Next, KvmError> {
        self.unfinished = true;
        self.stats.hypercalls += 1;
        let failed = |_| KvmError::Transfer("general registers");
        let synced = self.synced;
        let (regs, sregs) = if synced {
            self.run.registers()
        } else {
            (self.fd.get_regs().map_err(failed)?, self.fd.get_sregs().map_err(failed)?)
        };
        if self.vm.sync_regs && !synced {
            // A guest that calls once calls often: from now on the registers come with the exit.
            self.run.sync_registers();
            self.synced = true;
        }
        state::take_regs(&mut self.st, regs);
        state::take_sregs(&mut self.st, &sregs);
        let Some(outcome) = self.env.hypercall(&mut self.st) else { return Ok(Next::Again) };
        // RIP stays: KVM advances it itself when it completes the OUT, or has done so.
        let back = kvm::kvm_regs { rip: regs.rip, ..state::regs_of(&self.st) };
        if synced {
            self.run.set_registers(&back);
        } else {
            self.fd.set_regs(&back).map_err(failed)?;
        }
        match outcome {
            HypercallOutcome::Done | HypercallOutcome::Resync => {}
            HypercallOutcome::Halt => {
                self.finish()?;
                if self.vm.split {
                    split::set_activity(&self.fd, 1)?;
                }
                self.halted = 1;
            }
            HypercallOutcome::Stopping => self.env.stopping = true,
        }
        Ok(Next::Again)
    }

    /// Takes a saved state over, or fails with the vCPU unchanged.
    fn take(&mut self, s: &VcpuSnapshot) -> Result<(), EngineError> {
        if s.id != self.id {
            let what = format!("it is of vCPU {} and was given to vCPU {}", s.id, self.id);
            return Err(StateError::Invalid(what).into());
        }
        let state = s.restore(&self.env.cpuid)?;
        self.fetch()?;
        self.vm.forget_memory()?;
        let lapic = match self.lapic.clone() {
            None if self.vm.split => Some(split::read(&self.fd, self.id)?),
            not_yet_put => not_yet_put,
        };
        let before = (
            std::mem::replace(&mut *self.st, state),
            std::mem::replace(&mut self.events, state::pending(s.events.injection)),
        );
        self.newest = Newest::Here;
        let put = if self.vm.split { self.put_with_lapic(s) } else { self.put_beside_lapic(s) };
        if put.is_err() {
            (*self.st, self.events) = before;
            (self.newest, self.lapic) = (Newest::Here, lapic);
        }
        put
    }

    /// Puts a loaded state into the kernel, and its local APIC into the machine.
    fn put_beside_lapic(&mut self, s: &VcpuSnapshot) -> Result<(), EngineError> {
        self.put()?;
        let Some(mut lapic) = s.lapic.clone() else { return Ok(()) };
        lapic.tsc_deadline = shift_deadline(lapic.tsc_deadline, s.tsc.offset.wrapping_neg());
        if self.env.bus.lapic_load(self.id, &lapic) {
            return Ok(());
        }
        Err(StateError::Unsupported("it comes with a local APIC, and this machine has none").into())
    }

    /// Puts a loaded state into the kernel, with the local APIC.
    fn put_with_lapic(&mut self, s: &VcpuSnapshot) -> Result<(), EngineError> {
        if let Some(l) = &s.lapic {
            self.events.nmi.pending = l.nmi.into();
        }
        self.lapic = s.lapic.clone().or_else(|| self.lapic.take());
        Ok(self.put()?)
    }

    /// The report for a guest that KVM cannot go on with.
    fn gave_up(&mut self, cause: Cause, code: &[u8]) -> KvmError {
        if let Err(e) = self.fetch() {
            return e;
        }
        let memory = report::code_at_rip(&self.st, &mut self.env);
        let code = if memory.is_empty() { code.to_vec() } else { memory };
        KvmError::GaveUp(Box::new(Report { cause, emulating: self.vm.emulating, code, state: self.st.clone() }))
    }
}

impl Vcpu for KvmVcpu {
    fn state_mut(&mut self) -> &mut CpuState {
        if let Err(e) = self.fetch() {
            self.broken = Some(e);
        }
        self.newest = Newest::Here;
        &mut self.st
    }

    fn save(&mut self) -> Result<VcpuSnapshot, EngineError> {
        if let Some(e) = self.broken.take() {
            return Err(e.into());
        }
        self.fetch()?;
        let mut s = VcpuSnapshot::capture(&self.st, tsc::rdtsc());
        s.events.injection = state::injection(&self.events);
        s.lapic = if self.vm.split {
            if split::uses_kvm_interface(&self.fd) {
                let what =
                    "it has parts in KVM's own paravirtual interface; run such guests with --irqchip user or --pv off";
                return Err(StateError::Unsupported(what).into());
            }
            match &self.lapic {
                Some(not_yet_put) => Some(not_yet_put.clone()),
                None => Some(split::read(&self.fd, self.id)?),
            }
        } else {
            self.env.bus.lapic_save(self.id).map(|mut l| {
                l.tsc_deadline = shift_deadline(l.tsc_deadline, self.st.tsc_offset);
                l
            })
        };
        if let Some(l) = &mut s.lapic {
            l.nmi |= self.events.nmi.pending != 0;
        }
        Ok(s)
    }

    fn load(&mut self, state: &VcpuSnapshot) -> Result<(), EngineError> {
        self.take(state)
    }

    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        Ok(self.run_loop()?)
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.run.clone()
    }

    fn counters(&self) -> Vec<(String, u64)> {
        self.stats.list()
    }

    fn write_perf_map(&mut self, _keep: bool) -> Result<(), EngineError> {
        Err(EngineError::OnlyBt("--perf-map"))
    }

    fn start_profile(&mut self) -> Result<(), EngineError> {
        Err(EngineError::OnlyBt("--profile"))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(self.vm.clone())
    }

    fn take_profile(&mut self) -> Option<Profile> {
        None
    }
}
