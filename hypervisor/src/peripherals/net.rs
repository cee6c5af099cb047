//! Network cards from their configuration.

use std::hash::{BuildHasher, RandomState};

use paravane_usernet::{Config, Forward, Reach};
use virtio::devices::net::passt::Passt;
use virtio::devices::net::tap::Tap;
use virtio::devices::net::user::User;
use virtio::devices::net::{Backend, MAX_PAIRS, Net, parse_mac};

use super::PeripheralError;
use crate::config::devices::{NetConfig, NetMode};

/// Makes the card number `index` of the machine.
pub(super) fn net(cfg: &NetConfig, index: usize) -> Result<Net, PeripheralError> {
    if cfg.queues == 0 || cfg.queues > MAX_PAIRS {
        return Err(PeripheralError::Queues("network card", cfg.queues, MAX_PAIRS));
    }
    let mode = mode(cfg)?;
    let wrong = |why: String| PeripheralError::Net(why);
    let mac = match &cfg.mac {
        Some(text) => parse_mac(text).map_err(|e| wrong(e.to_string()))?,
        None => default_mac(mode, index),
    };
    let backend: Result<Box<dyn Backend>, _> = match mode {
        NetMode::User => {
            let forwards: Result<Vec<Forward>, _> = cfg.hostfwd.iter().map(|text| text.parse()).collect();
            let forwards = forwards.map_err(|e| wrong(e.to_string()))?;
            let reach = if cfg.restrict { Reach::Nothing } else { Reach::Everything };
            User::new(&Config { mac, forwards, reach, resolver: None }).map(|user| Box::new(user) as _)
        }
        NetMode::Tap => Tap::open(cfg.tap.as_deref().unwrap_or_default()).map(|tap| Box::new(tap) as _),
        NetMode::Passt => Passt::connect(&cfg.passt.clone().unwrap_or_default()).map(|passt| Box::new(passt) as _),
    };
    Ok(Net::new(backend.map_err(|e| wrong(e.to_string()))?, mac, cfg.queues))
}

/// What is at the other end. Options of one kind next to those of another are a mistake that is better reported.
fn mode(cfg: &NetConfig) -> Result<NetMode, PeripheralError> {
    let told = match (&cfg.tap, &cfg.passt) {
        (Some(_), None) => NetMode::Tap,
        (None, Some(_)) => NetMode::Passt,
        (None, None) => NetMode::User,
        (Some(_), Some(_)) => return Err(PeripheralError::Net("it has tap= and passt=; leave one out".into())),
    };
    let mode = cfg.mode.unwrap_or(told);
    if mode != told {
        let sentence = match mode {
            NetMode::User => "user networking has no tap= and no passt=; leave them out",
            NetMode::Tap => "its TAP device has no name; write tap=NAME",
            NetMode::Passt => "its socket has no path; write passt=SOCKET",
        };
        return Err(PeripheralError::Net(sentence.into()));
    }
    if mode != NetMode::User && (!cfg.hostfwd.is_empty() || cfg.restrict) {
        return Err(PeripheralError::Net("hostfwd= and restrict= belong to user networking; leave them out".into()));
    }
    Ok(mode)
}

/// A MAC address for a card that was given none. A user network is its guest's alone, so the same addresses serve everywhere;
/// others may be shared, where addresses must differ.
fn default_mac(mode: NetMode, index: usize) -> [u8; 6] {
    let tail = match mode {
        NetMode::User => 0x12_3456 + index as u64,
        NetMode::Tap | NetMode::Passt => RandomState::new().hash_one(index),
    };
    let [a, b, c, ..] = tail.to_le_bytes();
    [0x52, 0x54, 0, c, b, a]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::options::parse;

    fn make(text: &str) -> Result<NetMode, String> {
        let cfg: NetConfig = parse("--net", Some("mode"), text).map_err(|e| e.to_string())?;
        net(&cfg, 0).map_err(|e| e.to_string()).and_then(|_| mode(&cfg).map_err(|e| e.to_string()))
    }

    #[test]
    fn options_say_what_is_at_the_other_end() {
        assert_eq!(make("user"), Ok(NetMode::User));
        assert_eq!(make("user,restrict=on,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp::0-:53,queues=2"), Ok(NetMode::User));
        assert_eq!(make("user,mac=52:54:00:00:00:01"), Ok(NetMode::User));
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_a_sentence() {
        for (text, part) in [
            ("user,tap=tap0", "no tap="),
            ("tap=tap0,passt=/x", "leave one out"),
            ("tap", "tap=NAME"),
            ("tap=tap0,hostfwd=tcp::1-:2", "belong to user networking"),
            ("user,hostfwd=tcp:1", "hostfwd"),
            ("user,mac=1", "MAC"),
            ("user,queues=0", "queues"),
            ("user,queues=100", "queues"),
            ("passt=/nowhere/passt.socket", "start it first"),
            ("tap=this-name-is-too-long", "TAP device"),
        ] {
            let sentence = make(text).expect_err(text);
            assert!(sentence.contains(part), "{text}: {sentence}");
        }
    }

    #[test]
    fn cards_of_one_guest_differ() {
        assert_eq!(default_mac(NetMode::User, 0), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_ne!(default_mac(NetMode::User, 0), default_mac(NetMode::User, 1));
        assert_ne!(default_mac(NetMode::Tap, 0), default_mac(NetMode::Tap, 0));
    }
}
