//! The load of P5 to P8: real TCP connections between two hosts of the lab, by blocking sockets and a thread each. A loop of
//! system calls and nothing else keeps what is the kernel's the largest part of each figure. Where there is one connection, each of
//! its ends keeps to a core: whether the scheduler puts both on one makes more of a difference than what a hook costs.
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::wire::{cpus, keep_on};

/// Bytes of a request and of its answer.
const MESSAGE: usize = 64;
const BUFFER: usize = 1 << 17;
/// That a peer is there.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Who takes new connections at once.
const ACCEPTORS: usize = 4;

/// What a client does, by the first byte of what it sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Mode {
    /// Connect, ask, and see the server close, over and over.
    Connect,
    /// Ask on one connection, over and over.
    Request,
    /// Send as much as goes.
    Stream,
}

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Answer the clients' connections.
    #[command(hide = true)]
    Serve { address: SocketAddr },
    /// Load a server, and print what came of it.
    #[command(hide = true)]
    Load {
        mode: Mode,
        to: SocketAddr,
        #[arg(long)]
        connections: usize,
        #[arg(long)]
        milliseconds: u64,
    },
}

/// What a client got done.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Connections, requests or bytes, each second.
    pub(crate) rate: f64,
    pub(crate) count: u64,
    pub(crate) failed: u64,
    /// Of the client.
    pub(crate) cpu_ns: u64,
}

impl Mode {
    fn byte(self) -> u8 {
        match self {
            Mode::Connect => b'c',
            Mode::Request => b'r',
            Mode::Stream => b's',
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Connect => "connect",
            Mode::Request => "request",
            Mode::Stream => "stream",
        }
    }
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Serve { address } => serve(*address),
        Command::Load { mode, to, connections, milliseconds } => {
            let done = load(*mode, *to, *connections, Duration::from_millis(*milliseconds))?;
            println!("{}", serde_json::to_string(&done)?);
            Ok(())
        }
    }
}

fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    thread::scope(|scope| {
        for _ in 0..ACCEPTORS {
            scope.spawn(|| {
                loop {
                    // What one client does wrong is no other's business.
                    let _ = listener.accept().and_then(|(stream, _)| welcome(stream));
                }
            });
        }
    });
    Ok(())
}

fn welcome(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message)?;
    if message[0] == Mode::Connect.byte() {
        // The side that closes first keeps the port for a minute: not the client, who would run out of them.
        stream.write_all(&message)?;
        return stream.shutdown(Shutdown::Write);
    }
    thread::spawn(move || {
        keep_on(0, cpus() - 1)?;
        if message[0] == Mode::Request.byte() {
            stream.set_nodelay(true)?;
            loop {
                stream.write_all(&message)?;
                stream.read_exact(&mut message)?;
            }
        }
        let mut buffer = vec![0; BUFFER];
        while stream.read(&mut buffer)? > 0 {}
        io::Result::Ok(())
    });
    Ok(())
}

fn load(mode: Mode, to: SocketAddr, connections: usize, time: Duration) -> Result<Done> {
    let (stop, count, failed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let begin = Instant::now();
    let cpu = cpu_ns();
    thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                if mode != Mode::Connect && keep_on(0, 0).is_err() {
                    failed.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                while !stop.load(Ordering::Relaxed) {
                    if once(mode, to, &stop, &count).is_err() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    let count = count.into_inner();
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    Ok(Done { rate, count, failed: failed.into_inner(), cpu_ns: cpu_ns() - cpu })
}

/// One connection.
fn once(mode: Mode, to: SocketAddr, stop: &AtomicBool, count: &AtomicU64) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut message = [mode.byte(); MESSAGE];
    stream.write_all(&message)?;
    match mode {
        Mode::Connect => {
            stream.read_exact(&mut message)?;
            // Until the server's end has been seen, it is the client's that would come first.
            if stream.read(&mut message)? > 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            count.fetch_add(1, Ordering::Relaxed);
        }
        Mode::Request => {
            while !stop.load(Ordering::Relaxed) {
                stream.read_exact(&mut message)?;
                stream.write_all(&message)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Mode::Stream => {
            let buffer = vec![0; BUFFER];
            while !stop.load(Ordering::Relaxed) {
                let sent = stream.write(&buffer)?;
                count.fetch_add(sent as u64, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// Of this process.
fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::{Mode, load, welcome};

    #[test]
    fn every_mode_gets_something_done() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = welcome(stream.unwrap());
            }
        });
        for mode in [Mode::Connect, Mode::Request, Mode::Stream] {
            let done = load(mode, address, 2, Duration::from_millis(50)).unwrap();
            assert!(done.count > 0 && done.failed == 0, "{mode:?}: {done:?}");
        }
    }
}
