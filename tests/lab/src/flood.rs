//! A SYN flood between hosts of the lab: connections that nobody wants, from addresses that nobody has.
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};
use svc_common::checksum;

use crate::topology::Lab;

/// It ends by itself after this time.
const LONGEST: Duration = Duration::from_secs(30);

pub struct Flood {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
}

impl Flood {
    /// `rate`: SYNs a second. The sources are of 198.18.0.0/15, which is for benchmarks (RFC 2544).
    ///
    /// # Errors
    /// Where a raw socket cannot be had there.
    pub fn start(lab: &Lab, host: &str, target: SocketAddrV4, rate: u32) -> Result<Self> {
        let open = || Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?);
        let socket = lab.namespace(host)?.inside(open).context("cannot open a raw socket")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let start = Instant::now();
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) && start.elapsed() < LONGEST {
                while sent < u64::from(rate) * start.elapsed().as_millis() as u64 / 1000 {
                    let to = SocketAddr::from(target).into();
                    // A full queue drops one, as a network would.
                    let _ = socket.send_to(&syn(sent as u32, target), &to);
                    sent += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        Ok(Flood { stop, sender })
    }

    /// How many were sent.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap_or_default()
    }
}

/// IPv4 and TCP headers; the kernel fills in the IPv4 one's length and checksum (raw(7)).
fn syn(n: u32, target: SocketAddrV4) -> [u8; 40] {
    let source = Ipv4Addr::from(0xc612_0000 | n & 0x1_ffff);
    let port = 1024 + (n >> 17) as u16;
    let mut packet = [0; 40];
    packet[..12].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&target.ip().octets());
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[22..24].copy_from_slice(&target.port().to_be_bytes());
    packet[24..28].copy_from_slice(&n.to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 2, 0xff, 0xff]);
    // The addresses and the segment, and of the pseudo header protocol and length.
    let sum = checksum::sum(&packet[12..]) + checksum::sum(&[0, 6, 0, 20]);
    packet[36..38].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
    packet
}
