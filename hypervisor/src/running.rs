//! A vCPU that runs: the loop around [`Vcpu::run`], and how to stop it between two instructions and take it.
//!
//! [`drive`] is what a vCPU's thread does. It ends when the machine stops, and also when the machine is paused
//! ([`Chipset::pause`]): whoever paused it owns the vCPU then, may save its state, load it into a vCPU of another engine, and
//! let that go on. [`RunningVcpu`] packs this up: a vCPU on a thread of its own, which [`RunningVcpu::pause`] gives back.

use crate::chipset::Chipset;
use crate::devices::control::StopCause;
use crate::engine::{EngineError, Vcpu};
use paravane_cpu::VcpuExit;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Why [`drive`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driven {
    /// The machine stopped; [`Chipset::stop_cause`] says why.
    Stopped,
    /// The machine is paused: the vCPU is between two instructions and can go on.
    Paused,
}

/// Runs a vCPU on the calling thread until the machine stops or is paused.
///
/// # Errors
/// When the engine's host fails; the machine is stopped, then.
pub fn drive(id: u32, vcpu: &mut dyn Vcpu, chipset: &Chipset) -> Result<Driven, EngineError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Halt) => chipset.wait_for_interrupt(id),
            Ok(VcpuExit::HaltMasked) => chipset.wait_for_others(id),
            Ok(VcpuExit::AwaitsStartup) => chipset.wait_for_startup(id),
            Ok(VcpuExit::TripleFault) => chipset.stop(StopCause::TripleFault(id)),
            Ok(VcpuExit::Stopped) => {}
            Err(e) => {
                chipset.stop(StopCause::Host);
                return Err(e);
            }
        }
        if chipset.stop_cause().is_some() {
            return Ok(Driven::Stopped);
        }
        if chipset.paused() {
            return Ok(Driven::Paused);
        }
    }
}

/// A vCPU on a thread of its own.
pub struct RunningVcpu {
    chipset: Arc<Chipset>,
    thread: JoinHandle<(Box<dyn Vcpu>, Result<Driven, EngineError>)>,
}

impl RunningVcpu {
    /// Lets a vCPU go, or go on. The machine must not be paused.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(id: u32, mut vcpu: Box<dyn Vcpu>, chipset: Arc<Chipset>) -> io::Result<Self> {
        chipset.set_kick(id, vcpu.kick());
        let its = chipset.clone();
        let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
            let end = drive(id, &mut *vcpu, &its);
            (vcpu, end)
        })?;
        Ok(Self { chipset, thread })
    }

    /// Stops the vCPU at the next instruction boundary and gives it back, with [`Driven::Stopped`] if the machine stopped first. The
    /// machine is not paused any more when this returns, so that the vCPU, or another one with its state, can be let go.
    ///
    /// # Errors
    /// When the engine's host failed.
    pub fn pause(self) -> Result<(Box<dyn Vcpu>, Driven), EngineError> {
        self.chipset.pause();
        let chipset = self.chipset.clone();
        let end = self.wait();
        chipset.resume();
        end
    }

    /// Waits until the machine stops or somebody pauses it, and gives the vCPU back.
    ///
    /// # Errors
    /// When the engine's host failed.
    pub fn wait(self) -> Result<(Box<dyn Vcpu>, Driven), EngineError> {
        let (vcpu, end) = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        end.map(|how| (vcpu, how))
    }

    /// Whether the vCPU has left its loop by itself, because the machine stopped.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

/// All vCPUs of a machine, each on a thread of its own.
pub struct RunningMachine {
    chipset: Arc<Chipset>,
    vcpus: Vec<RunningVcpu>,
}

impl RunningMachine {
    /// Lets all vCPUs go, or go on; the first one is vCPU 0. The machine must not be paused.
    ///
    /// # Errors
    /// When the host refuses a thread; the machine is stopped, then.
    pub fn start(vcpus: Vec<Box<dyn Vcpu>>, chipset: Arc<Chipset>) -> io::Result<Self> {
        let mut running = Vec::with_capacity(vcpus.len());
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            match RunningVcpu::start(id as u32, vcpu, chipset.clone()) {
                Ok(v) => running.push(v),
                Err(e) => {
                    chipset.stop(StopCause::Host);
                    for v in running {
                        let _ = v.wait();
                    }
                    return Err(e);
                }
            }
        }
        Ok(Self { chipset, vcpus: running })
    }

    /// Stops all vCPUs, each at its next instruction boundary, and gives them back, with [`Driven::Stopped`] if the machine stopped first.
    /// Devices and their timers go on. The machine is not paused any more when this returns, so that [`RunningMachine::start`] lets
    /// the vCPUs go on.
    ///
    /// # Errors
    /// When the engine's host failed.
    pub fn pause(self) -> Result<(Vec<Box<dyn Vcpu>>, Driven), EngineError> {
        self.chipset.pause();
        let mut all = Vec::with_capacity(self.vcpus.len());
        let (mut how, mut failed) = (Driven::Paused, None);
        for v in self.vcpus {
            match v.wait() {
                Ok((vcpu, Driven::Paused)) => all.push(vcpu),
                Ok((vcpu, Driven::Stopped)) => {
                    how = Driven::Stopped;
                    all.push(vcpu);
                }
                Err(e) => failed = Some(e),
            }
        }
        self.chipset.resume();
        match failed {
            Some(e) => Err(e),
            None => Ok((all, how)),
        }
    }
}
