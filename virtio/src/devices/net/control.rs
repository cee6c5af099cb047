//! Commands on the control queue (virtio 1.2, section 5.1.6.5).

use super::feature;
use crate::Chain;

/// VIRTIO_NET_OK.
const OK: u8 = 0;
/// VIRTIO_NET_ERR.
const ERR: u8 = 1;
/// Longest command that is looked at, in bytes; tables of MAC addresses are not kept.
const LONGEST: usize = 64;

/// What a command changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that matters here.
    Nothing,
    /// The card's MAC address.
    Mac([u8; 6]),
    /// The number of pairs in use.
    Pairs(u16),
}

/// Reads a command and answers it. `pairs` is the number there is.
pub(super) fn serve(chain: &mut Chain, features: u64, pairs: u16) -> Change {
    let mut bytes = [0; LONGEST];
    let len = chain.read(&mut bytes);
    let change = understand(&bytes[..len], features, pairs);
    let answer = if change.is_some() { OK } else { ERR };
    chain.write(&[answer]);
    change.unwrap_or(Change::Nothing)
}

/// What a command comes to; `None` if it is refused.
fn understand(command: &[u8], features: u64, pairs: u16) -> Option<Change> {
    let (&[class, command], data) = command.split_first_chunk::<2>()?;
    let has = |mask| features & mask != 0;
    match (class, command) {
        // VIRTIO_NET_CTRL_RX, PROMISC and ALLMULTI: the wire has one other end, there is nothing to filter.
        (0, 0 | 1) if has(feature::CTRL_RX) => (!data.is_empty()).then_some(Change::Nothing),
        // VIRTIO_NET_CTRL_MAC, TABLE_SET: likewise.
        (1, 0) if has(feature::CTRL_RX) => (data.len() >= 8).then_some(Change::Nothing),
        // VIRTIO_NET_CTRL_MAC, ADDR_SET.
        (1, 1) if has(feature::CTRL_MAC_ADDR) => {
            let mac: [u8; 6] = data.try_into().ok()?;
            (mac[0] & 1 == 0).then_some(Change::Mac(mac))
        }
        // VIRTIO_NET_CTRL_MQ, VQ_PAIRS_SET.
        (4, 0) if has(feature::MQ) => {
            let wanted = u16::from_le_bytes(data.try_into().ok()?);
            (1..=pairs).contains(&wanted).then_some(Change::Pairs(wanted))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_need_their_feature_and_their_data() {
        let all = u64::MAX;
        assert_eq!(understand(&[0, 0, 1], all, 2), Some(Change::Nothing));
        assert_eq!(understand(&[0, 0], all, 2), None);
        assert_eq!(understand(&[0, 0, 1], 0, 2), None);
        assert_eq!(understand(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], all, 2), Some(Change::Nothing));
        assert_eq!(understand(&[1, 1, 2, 3, 4, 5, 6, 7], all, 2), Some(Change::Mac([2, 3, 4, 5, 6, 7])));
        assert_eq!(understand(&[1, 1, 3, 3, 4, 5, 6, 7], all, 2), None, "a group's address");
        assert_eq!(understand(&[1, 1, 2, 3, 4, 5, 6], all, 2), None);
        assert_eq!(understand(&[4, 0, 2, 0], all, 2), Some(Change::Pairs(2)));
        assert_eq!(understand(&[4, 0, 3, 0], all, 2), None);
        assert_eq!(understand(&[4, 0, 0, 0], all, 2), None);
        assert_eq!(understand(&[9, 0, 0, 0], all, 2), None);
        assert_eq!(understand(&[4], all, 2), None);
    }
}
