//! COM1: a 16550 (vm-superio's), with a queue in front of its receive FIFO so that no input is lost.

use std::collections::VecDeque;
use std::io::Write;

use vm_superio::{Serial, Trigger, serial::NoEvents};

/// Bytes that may wait in front of the FIFO before [`SerialPort::input`] takes no more.
const QUEUE: usize = 64 << 10;

/// How the port reaches its interrupt line.
pub struct IrqTrigger(pub Box<dyn Fn() + Send>);

impl Trigger for IrqTrigger {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// The port.
pub struct SerialPort {
    uart: Serial<IrqTrigger, NoEvents, Box<dyn Write + Send>>,
    waiting: VecDeque<u8>,
}

impl SerialPort {
    /// A port that writes to `out` and interrupts through `irq`.
    pub fn new(out: Box<dyn Write + Send>, irq: IrqTrigger) -> Self {
        Self { uart: Serial::new(irq, out), waiting: VecDeque::new() }
    }

    /// Offers input; gives how many bytes were taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(QUEUE - self.waiting.len());
        self.waiting.extend(&bytes[..n]);
        self.refill();
        n
    }

    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.waiting.len());
        if room == 0 {
            return;
        }
        let (head, _) = self.waiting.as_slices();
        let head = head[..room.min(head.len())].to_vec();
        // In loopback mode the UART takes no input; it stays in the queue.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&head) {
            self.waiting.drain(..taken);
        }
    }

    /// Puts text out past the UART. A failing output loses it, as [`SerialPort::write`] does.
    pub fn print(&mut self, text: &[u8]) {
        let out = self.uart.writer_mut();
        let _ = out.write_all(text);
        let _ = out.flush();
    }

    /// Takes input past the guest's driver: first what is in the receive FIFO. Gives how many bytes there were.
    pub fn take(&mut self, buffer: &mut [u8]) -> usize {
        let mut n = 0;
        while n < buffer.len() && self.read(5) & 1 != 0 {
            buffer[n] = self.read(0);
            n += 1;
        }
        n
    }

    /// Reads a register, 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        let v = self.uart.read(register);
        if register == 0 && !self.waiting.is_empty() {
            self.refill();
        }
        v
    }

    /// Writes a register, 0 to 7. A failing output loses its byte: the guest cannot be told, as on a real line.
    pub fn write(&mut self, register: u8, v: u8) {
        let _ = self.uart.write(register, v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_input_arrives_whole_and_in_order() {
        let mut s = SerialPort::new(Box::new(std::io::sink()), IrqTrigger(Box::new(|| {})));
        let sent: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        assert_eq!(s.input(&sent), 1000);
        let mut got = Vec::new();
        while s.read(5) & 1 != 0 {
            got.push(s.read(0));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_full_queue_pushes_back() {
        let mut s = SerialPort::new(Box::new(std::io::sink()), IrqTrigger(Box::new(|| {})));
        let mut taken = 0;
        while taken < 1 << 20 {
            let n = s.input(&[7; 4096]);
            taken += n;
            if n < 4096 {
                break;
            }
        }
        assert!((QUEUE..QUEUE + 4096).contains(&taken));
    }
}
