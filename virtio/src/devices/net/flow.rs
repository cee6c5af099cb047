//! Which queue pair a frame to the guest takes: that on which the guest last sent on the same flow (virtio 1.2,
//! section 5.1.6.5.6, automatic receive steering).

/// Slots of the table; flows share them.
const SLOTS: usize = 256;

/// The pair of each flow, by a hash that is the same in both directions.
pub(super) struct Flows([u8; SLOTS]);

impl Flows {
    pub(super) fn new() -> Self {
        Self([0; SLOTS])
    }

    /// The guest has sent `frame` on `pair`.
    pub(super) fn sent(&mut self, frame: &[u8], pair: usize) {
        self.0[slot(frame)] = u8::try_from(pair).unwrap_or(0);
    }

    /// The pair for a frame to the guest, below `active`.
    pub(super) fn pair(&self, frame: &[u8], active: usize) -> usize {
        let pair = usize::from(self.0[slot(frame)]);
        if pair < active { pair } else { 0 }
    }
}

/// A hash of addresses and ports that does not change when source and destination change places.
fn slot(frame: &[u8]) -> usize {
    let word = |at: usize| {
        let bytes = frame.get(at..at + 4).unwrap_or(&[0; 4]);
        u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    };
    let (addresses, ports_at) = match frame.get(12..14) {
        // IPv4, without options as nearly always.
        Some([0x08, 0x00]) => (word(26) ^ word(30), 34),
        Some([0x86, 0xdd]) => ((0..8).fold(0, |sum, n| sum ^ word(22 + 4 * n)), 54),
        _ => return 0,
    };
    let ports = word(ports_at);
    let ports = (ports >> 16) ^ (ports & 0xffff);
    let hash = (addresses ^ ports).wrapping_mul(0x9e37_79b1);
    (hash >> 24) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12] = 8;
        frame[26..30].copy_from_slice(&from.0);
        frame[30..34].copy_from_slice(&to.0);
        frame[34..36].copy_from_slice(&from.1.to_be_bytes());
        frame[36..38].copy_from_slice(&to.1.to_be_bytes());
        frame
    }

    #[test]
    fn answers_come_on_the_pair_of_the_question() {
        let mut flows = Flows::new();
        let (guest, host) = (([10, 0, 2, 15], 40000), ([10, 0, 2, 2], 80));
        flows.sent(&frame(guest, host), 3);
        assert_eq!(flows.pair(&frame(host, guest), 4), 3);
        assert_eq!(flows.pair(&frame(host, guest), 2), 0, "a pair that is no longer in use");
        for short in 0..60 {
            flows.sent(&frame(guest, host)[..short], 1);
        }
        let spread: std::collections::HashSet<_> = (0..100).map(|n| slot(&frame((guest.0, 40000 + n), host))).collect();
        assert!(spread.len() > 50, "{}", spread.len());
    }
}
