//! Sockets of the node.
use std::net::IpAddr;

/// Of TCP: one that listens, or, with a peer, one that connects. Of UDP: one that is bound, or connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Socket {
    pub protocol: u8,
    /// An address of the node, or the unspecified one of its family, and a port in host byte order.
    pub local: (IpAddr, u16),
    pub peer: Option<(IpAddr, u16)>,
}

impl Socket {
    /// Whether it gets what is sent from `remote` to `local`, as the kernel looks sockets up.
    pub fn gets(&self, protocol: u8, remote: (IpAddr, u16), local: (IpAddr, u16)) -> bool {
        let (address, port) = self.local;
        let is_here = address == local.0 || address.is_unspecified() && address.is_ipv4() == local.0.is_ipv4();
        self.protocol == protocol && is_here && port == local.1 && self.peer.is_none_or(|peer| peer == remote)
    }
}
