//! A tunnel without link headers between two hosts: an interface of kind tun in each, and a thread that carries packets from one
//! to the other.
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// Gone, with both interfaces, when dropped.
pub struct Tunnel {
    stop: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// With an interface of this name on each host.
    pub fn new(hosts: [&Netns; 2], name: &str) -> Result<Self> {
        let [a, b] = hosts.map(|host| host.inside(|| interface(name)).with_context(|| format!("cannot make {name}")));
        let ends = [a?, b?];
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let carrier = thread::spawn(move || carry(&ends, &stopped));
        Ok(Tunnel { stop, carrier: Some(carrier) })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            // It has nothing to say.
            let _ = carrier.join();
        }
    }
}

/// Of the calling thread's network namespace; what is read and written are packets.
fn interface(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    // SAFETY: all zeros is a value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request is the kernel's own struct.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error()).context("the kernel makes no interface of kind tun");
    }
    Ok(file)
}

fn carry(ends: &[File; 2], stop: &AtomicBool) {
    const MILLISECONDS: i32 = 50;
    let mut packet = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let mut ready =
            [&ends[0], &ends[1]].map(|end| libc::pollfd { fd: end.as_raw_fd(), events: libc::POLLIN, revents: 0 });
        // SAFETY: as many as there are.
        unsafe { libc::poll(ready.as_mut_ptr(), ready.len() as libc::nfds_t, MILLISECONDS) };
        for (index, end) in ready.iter().enumerate() {
            if end.revents & libc::POLLIN == 0 {
                continue;
            }
            let (mut from, mut to) = (&ends[index], &ends[1 - index]);
            if let Ok(length) = from.read(&mut packet) {
                // An interface that is down takes none: lost, as in any network.
                let _ = to.write(&packet[..length]);
            }
        }
    }
}
