//! Names of the chains that nftables has, from the kernel: iptables-nft's are among them.
use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// linux/netlink.h: a message's header, and the types that end an answer.
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// linux/netfilter/nfnetlink.h: the header of its own messages.
const NFGENMSG: usize = 4;
/// linux/netfilter/nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;

/// Tables and the names of their chains, of all families.
///
/// # Errors
/// What the kernel says, where it has no nftables among others.
pub fn chains() -> io::Result<Vec<(String, String)>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(HEADER + NFGENMSG);
    request.extend(((HEADER + NFGENMSG) as u32).to_ne_bytes());
    request.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN).to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8 + NFGENMSG]);
    socket.send(&request, 0)?;
    let mut chains = Vec::new();
    loop {
        let (received, _) = socket.recv_from_full()?;
        if read(&received, &mut chains)? {
            return Ok(chains);
        }
    }
}

/// True where nothing follows.
fn read(mut messages: &[u8], chains: &mut Vec<(String, String)>) -> io::Result<bool> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "an answer about nftables is cut short");
    while messages.len() >= HEADER {
        let length = u32::from_ne_bytes(messages[..4].try_into().expect("four bytes")) as usize;
        let kind = u16::from_ne_bytes(messages[4..6].try_into().expect("two bytes"));
        let message = messages.get(..length.max(HEADER)).ok_or_else(short)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message.get(HEADER..HEADER + 4).ok_or_else(short)?;
                let code = i32::from_ne_bytes(code.try_into().expect("four bytes"));
                return if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            _ if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN => {
                chains.extend(message.get(HEADER + NFGENMSG..).and_then(chain));
            }
            _ => {}
        }
        messages = messages.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The table and the chain that a message's attributes name.
fn chain(mut attributes: &[u8]) -> Option<(String, String)> {
    const NESTED_OR_ORDERED: u16 = 0xc000;
    let (mut table, mut name) = (None, None);
    while attributes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes(attributes[..2].try_into().expect("two bytes"))).max(4);
        let kind = u16::from_ne_bytes(attributes[2..4].try_into().expect("two bytes")) & !NESTED_OR_ORDERED;
        let value = attributes.get(4..length)?;
        let text = || String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
        match kind {
            NFTA_CHAIN_TABLE => table = Some(text()),
            NFTA_CHAIN_NAME => name = Some(text()),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((table?, name?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, text: &str) -> Vec<u8> {
        let value = [text.as_bytes(), &[0]].concat();
        let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn chains_are_read_until_the_answer_ends() {
        let body = |table, name| [vec![0; 4], attribute(1, table), attribute(2, "handle"), attribute(3, name)].concat();
        let chain = |table, name| message(10 << 8 | 3, &body(table, name));
        let mut chains = Vec::new();
        assert!(!read(&[chain("nat", "KUBE-SERVICES"), chain("x", "y")].concat(), &mut chains).unwrap());
        assert!(read(&message(3, &[0; 4]), &mut chains).unwrap());
        assert_eq!(chains, [("nat".into(), "KUBE-SERVICES".into()), ("x".into(), "y".into())]);
    }

    #[test]
    fn an_error_of_the_kernel_is_one_here() {
        let error = read(&message(2, &(-95i32).to_ne_bytes()), &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(95));
    }

    #[test]
    fn what_is_cut_short_is_an_error_and_no_panic() {
        let whole = message(10 << 8 | 3, &[0; 20]);
        for length in HEADER..whole.len() {
            assert!(read(&whole[..length], &mut Vec::new()).is_err(), "{length}");
        }
    }
}
