//! Whether the tables of iptables-legacy have a chain, from the kernel: those of iptables-nft are nftables'.
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// linux/netfilter_ipv4/ip_tables.h; ip6_tables.h has the same.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

#[repr(C)]
struct Info {
    table: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    entries: u32,
    size: u32,
}

/// In front of the entries: the table's name, their size, and padding.
const ENTRIES: usize = 40;

/// Whether the `nat` table of either family has a rule or a chain with this text. A table that is not there is not made.
/// `proc`: where procfs is mounted.
///
/// # Errors
/// What the kernel says.
pub fn nat_has(proc: &Path, text: &str) -> io::Result<bool> {
    for (names, address, level) in
        [("net/ip_tables_names", "127.0.0.1:0", libc::SOL_IP), ("net/ip6_tables_names", "[::1]:0", libc::IPPROTO_IPV6)]
    {
        let tables = std::fs::read_to_string(proc.join(names)).unwrap_or_default();
        if tables.lines().any(|table| table == "nat")
            && entries(address, level)?.windows(text.len()).any(|window| window == text.as_bytes())
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn entries(address: &str, level: i32) -> io::Result<Vec<u8>> {
    // The kind of socket does not matter.
    let socket = UdpSocket::bind(address)?;
    let mut table = [0; 32];
    table[..3].copy_from_slice(b"nat");
    let mut info = Info { table, valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], entries: 0, size: 0 };
    let mut length = size_of::<Info>() as libc::socklen_t;
    let fd = socket.as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes.
    if unsafe { libc::getsockopt(fd, level, GET_INFO, (&raw mut info).cast(), &raw mut length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = vec![0u8; ENTRIES + info.size as usize];
    answer[..32].copy_from_slice(&table);
    answer[32..36].copy_from_slice(&info.size.to_ne_bytes());
    let mut length = answer.len() as libc::socklen_t;
    // SAFETY: as above.
    if unsafe { libc::getsockopt(fd, level, GET_ENTRIES, answer.as_mut_ptr().cast(), &raw mut length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer.split_off(ENTRIES))
}
