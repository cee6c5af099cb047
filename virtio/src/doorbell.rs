//! What a vCPU rings to tell a device's worker that there is something in a queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd with a flag in front of it, so that ringing a bell that rings already costs no system call.
///
/// Any number of threads may ring; one waits on [`AsFd`], clears, and *then* looks at what it is there for. The descriptor may also be
/// given to KVM as an ioeventfd, which goes past the flag and works all the same.
pub struct Doorbell {
    rung: AtomicBool,
    event: EventFd,
}

impl Doorbell {
    /// A silent bell.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { rung: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Wakes the one who waits, now or when it waits next.
    pub fn ring(&self) {
        if !self.rung.swap(true, SeqCst) {
            // It fails only when the counter is full, and then the bell rings.
            let _ = self.event.write(1);
        }
    }

    /// Silences the bell; tells whether it rang. What was there to be seen before it rang is seen after this.
    pub fn clear(&self) -> bool {
        let rang = self.event.read().is_ok();
        self.rung.swap(false, SeqCst) || rang
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(self.event.as_raw_fd(), self)
    }
}

impl std::fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Doorbell({})", if self.rung.load(SeqCst) { "rung" } else { "silent" })
    }
}

/// The descriptor of something that lives as long as the result.
#[allow(unsafe_code)] // EventFd lends its descriptor only as a number.
fn borrow<T>(fd: std::os::fd::RawFd, _owner: &T) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps the descriptor open and is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bell_rings_until_it_is_cleared() {
        let bell = Doorbell::new().unwrap();
        assert!(!bell.clear());
        bell.ring();
        bell.ring();
        assert!(bell.clear());
        assert!(!bell.clear());
        bell.event.write(3).unwrap();
        assert!(bell.clear(), "a ring past the flag counts");
        bell.ring();
        assert!(bell.clear());
    }
}
