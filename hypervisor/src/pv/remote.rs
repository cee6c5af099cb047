//! Invalidations that one vCPU asks of others.
//!
//! Each vCPU drops its own cached translations, on its own thread. Who asks notes the request, makes the vCPU come out of guest code, and
//! waits until it has been carried out. Nobody waits for a vCPU that is outside guest code, halted for one: it carries out what
//! was asked before it goes in. While a vCPU waits it carries out what others ask of it, so that two that ask each other both get on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use paravane_cpu::Env;

use super::{Pv, pages};
use crate::chipset::Chipset;
use crate::devices::lock;

/// Requests that may wait; with more, everything goes.
const MAX_WAITING: usize = 64;

/// How often a vCPU that waits looks before it offers its host CPU to others.
const SPINS: u32 = 200;

/// Address and number of pages; `None`: all of the current address space.
pub(super) type Range = Option<(u64, u64)>;

/// More pages than are dropped one by one, so that all go.
const EVERYTHING: Range = Some((0, u64::MAX));

/// What others ask of one vCPU.
#[derive(Default)]
pub(super) struct Requests {
    waiting: Mutex<Vec<Range>>,
    /// How many there have been, and how many have been carried out.
    asked: AtomicU64,
    done: AtomicU64,
}

impl Requests {
    /// Notes a request; gives its number.
    fn ask(&self, what: Range) -> u64 {
        let mut waiting = lock(&self.waiting);
        if waiting.len() < MAX_WAITING {
            waiting.push(what);
        } else {
            *waiting = vec![EVERYTHING];
        }
        self.asked.fetch_add(1, SeqCst) + 1
    }

    fn pending(&self) -> bool {
        self.asked.load(SeqCst) != self.done.load(SeqCst)
    }

    fn carry_out(&self, env: &mut dyn Env, few: u64) {
        let (waiting, asked) = {
            let mut waiting = lock(&self.waiting);
            (std::mem::take(&mut *waiting), self.asked.load(SeqCst))
        };
        for what in waiting {
            pages::invalidate(env, what, few);
        }
        self.done.store(asked, SeqCst);
    }
}

impl Pv {
    /// Whether somebody asked a vCPU to drop translations.
    pub(crate) fn asked_to_flush(&self, vcpu: u32) -> bool {
        self.vcpu(vcpu).is_some_and(|v| v.requests.pending())
    }

    /// Carries out what was asked of a vCPU, on its thread.
    pub(crate) fn flush_as_asked(&self, vcpu: u32, env: &mut dyn Env) {
        if let Some(v) = self.vcpu(vcpu) {
            v.requests.carry_out(env, super::calls::FEW_PAGES);
        }
    }

    /// Lets other vCPUs drop translations, and comes back when none of them can use those any more. Called on the thread of vCPU `me`.
    pub(super) fn flush_others(&self, chipset: &Chipset, me: u32, others: &[u32], what: Range, env: &mut dyn Env) {
        let asked: Vec<_> = others
            .iter()
            .filter(|&&n| n != me)
            .filter_map(|&n| Some((n, &self.vcpu(n)?.requests)))
            .map(|(n, requests)| {
                let ticket = requests.ask(what);
                chipset.kick(n);
                (n, requests, ticket)
            })
            .collect();
        let mut looked = 0_u32;
        for (n, requests, ticket) in asked {
            while requests.done.load(SeqCst) < ticket && chipset.inside(n) && chipset.stop_cause().is_none() {
                env.attend();
                if self.asked_to_flush(me) {
                    self.flush_as_asked(me, env);
                }
                looked += 1;
                if looked < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }
}
