//! Names for host sockets in the event loop that is shared with the network card.

use mio::Token;

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A connection.
    Flow,
    /// A forwarded TCP port.
    Listener,
    /// A UDP source of the guest.
    UdpSource,
    /// A forwarded UDP port.
    UdpForward,
}

const KINDS: [Kind; 4] = [Kind::Flow, Kind::Listener, Kind::UdpSource, Kind::UdpForward];

/// The range of tokens from some number on.
#[derive(Clone, Copy)]
pub(crate) struct Tokens(pub(crate) usize);

impl Tokens {
    pub(crate) fn token(self, kind: Kind, index: usize) -> Token {
        Token(self.0 + index * KINDS.len() + kind as usize)
    }

    /// What a token names; `None` if it is somebody else's.
    pub(crate) fn read(self, token: Token) -> Option<(Kind, usize)> {
        let number = token.0.checked_sub(self.0)?;
        Some((KINDS[number % KINDS.len()], number / KINDS.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_read_back() {
        let tokens = Tokens(10);
        for kind in KINDS {
            assert_eq!(tokens.read(tokens.token(kind, 7)), Some((kind, 7)));
        }
        assert_eq!(tokens.read(Token(9)), None);
    }
}
