//! The lab's client: real HTTP requests, or UDP datagrams, one line of JSON for the outcome of each.
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::agent::patience;
use crate::server::{PEER, POD};

/// Send requests, and print what became of each.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// http://ADDRESS:PORT/PATH or udp://ADDRESS:PORT.
    pub target: String,
    /// How many; without it, until the standard input is closed.
    #[arg(long)]
    pub requests: Option<u32>,
    /// How many at once.
    #[arg(long, default_value_t = 1)]
    pub concurrency: u32,
    /// At most this many a second.
    #[arg(long)]
    pub rate: Option<u32>,
    #[arg(long, default_value_t = 2000)]
    pub timeout_ms: u64,
    /// All requests on one connection, or connected UDP socket, instead of one each.
    #[arg(long)]
    pub keep_alive: bool,
    /// UDP: name the target with every datagram instead of connecting the socket.
    #[arg(long)]
    pub unconnected: bool,
    /// Sockets get their ports from here, FIRST-LAST.
    #[arg(long, value_parser = parse_ports)]
    pub source_ports: Option<RangeInclusive<u16>>,
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').context("not FIRST-LAST")?;
    Ok(first.parse()?..=last.parse()?)
}

impl Options {
    pub fn to(target: impl Into<String>) -> Self {
        Options {
            target: target.into(),
            requests: None,
            concurrency: 1,
            rate: None,
            // 2 s, and more on a slower machine.
            timeout_ms: patience().as_millis() as u64 / 15,
            keep_alive: false,
            unconnected: false,
            source_ports: None,
        }
    }

    /// The arguments that mean these options.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![self.target.clone()];
        let mut value = |name: &str, value: u64| arguments.extend([format!("--{name}"), value.to_string()]);
        if let Some(requests) = self.requests {
            value("requests", requests.into());
        }
        if let Some(rate) = self.rate {
            value("rate", rate.into());
        }
        if let Some(ports) = &self.source_ports {
            arguments.extend(["--source-ports".to_owned(), format!("{}-{}", ports.start(), ports.end())]);
        }
        let mut value = |name: &str, value: u64| arguments.extend([format!("--{name}"), value.to_string()]);
        value("concurrency", self.concurrency.into());
        value("timeout-ms", self.timeout_ms);
        arguments.extend(self.keep_alive.then(|| "--keep-alive".to_owned()));
        arguments.extend(self.unconnected.then(|| "--unconnected".to_owned()));
        arguments
    }
}

/// What became of one request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The pod that answered; none where the request failed.
    pub backend: Option<String>,
    /// Who the pod believes asked.
    pub peer: Option<String>,
    pub status: Option<u16>,
    pub error: Option<String>,
    pub ms: f64,
    /// When it was known, in microseconds of CLOCK_MONOTONIC.
    pub at_us: u64,
}

/// Microseconds of CLOCK_MONOTONIC, which all processes of a machine have in common.
pub fn monotonic_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it is written to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

pub(crate) struct Answer {
    pub(crate) backend: String,
    pub(crate) peer: String,
    status: Option<u16>,
}

/// Which request comes next, and whether there is one.
struct Plan {
    left: Option<AtomicU32>,
    stop: AtomicBool,
}

impl Plan {
    fn next(&self) -> bool {
        let left = self.left.as_ref().is_none_or(|left| {
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        });
        left && !self.stop.load(Ordering::Relaxed)
    }
}

#[tokio::main(flavor = "current_thread")]
pub async fn run(options: &Options) -> Result<()> {
    let target = Target::parse(&options.target)?;
    let plan = Arc::new(Plan { left: options.requests.map(AtomicU32::new), stop: AtomicBool::new(false) });
    if options.requests.is_none() {
        stop_when_input_closes(Arc::clone(&plan));
    }
    let workers = tokio::task::LocalSet::new();
    for _ in 0..options.concurrency {
        workers.spawn_local(work(target.clone(), options.clone(), Arc::clone(&plan)));
    }
    workers.await;
    Ok(())
}

fn stop_when_input_closes(plan: Arc<Plan>) {
    thread::spawn(move || {
        // Whatever is written there, only its end means something.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        plan.stop.store(true, Ordering::Relaxed);
    });
}

async fn work(target: Target, options: Options, plan: Arc<Plan>) {
    let mut ticks = options.rate.map(|rate| {
        let mut ticks = interval(Duration::from_secs(1) * options.concurrency / rate.max(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    });
    let mut kept = None;
    while plan.next() {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let start = Instant::now();
        let limit = Duration::from_millis(options.timeout_ms);
        let result = timeout(limit, target.ask(&options, &mut kept)).await.unwrap_or_else(|_| bail!("timeout"));
        if result.is_err() {
            kept = None;
        }
        report(start, result);
    }
}

fn report(start: Instant, result: Result<Answer>) {
    let ms = start.elapsed().as_secs_f64() * 1000.0;
    let at_us = monotonic_us();
    let outcome = match result {
        Ok(Answer { backend, peer, status }) => {
            Outcome { backend: Some(backend), peer: Some(peer), status, error: None, ms, at_us }
        }
        Err(error) => Outcome { backend: None, peer: None, status: None, error: Some(format!("{error:#}")), ms, at_us },
    };
    if let Ok(line) = serde_json::to_string(&outcome) {
        // Who reads may have gone; then there is no one to tell.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

#[derive(Clone)]
pub(crate) enum Target {
    Http { address: SocketAddr, host: String, path: String },
    Udp(SocketAddr),
}

type Connection = SendRequest<Empty<Bytes>>;

/// What goes on to the next request.
enum Kept {
    Connection(Connection),
    Socket(UdpSocket),
}

impl Target {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if let Some(address) = text.strip_prefix("udp://") {
            return Ok(Target::Udp(address.parse().with_context(|| format!("no address and port: {address}"))?));
        }
        let rest = text.strip_prefix("http://").with_context(|| format!("neither http:// nor udp://: {text}"))?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let address = host.parse().or_else(|_| format!("{host}:80").parse());
        let address = address.with_context(|| format!("no address: {host}"))?;
        Ok(Target::Http { address, host: host.to_owned(), path: format!("/{path}") })
    }

    /// A request on a connection or a socket of its own, from one of these ports. A datagram is sent again and
    /// again: where many are under way, some get lost.
    pub(crate) async fn ask_once(&self, source_ports: RangeInclusive<u16>) -> Result<Answer> {
        match self {
            Target::Udp(address) => {
                let socket = connect_udp(bind(*address, source_ports)?, *address).await?;
                loop {
                    if let Ok(answer) = timeout(RESEND, exchange(&socket)).await {
                        return answer;
                    }
                }
            }
            Target::Http { address, host, path } => {
                get(&mut connect_from(&source_ports, *address).await?, host, path).await
            }
        }
    }

    async fn ask(&self, options: &Options, kept: &mut Option<Kept>) -> Result<Answer> {
        match self {
            Target::Udp(address) if options.unconnected => ask_unconnected(*address).await,
            Target::Udp(address) => {
                let socket = match kept.take() {
                    Some(Kept::Socket(socket)) => {
                        // Of what became of it since, sending would say no more than that it is not connected.
                        socket.take_error()?.map_or(Ok(()), |error| Err(named("wait", &error)))?;
                        socket
                    }
                    _ => {
                        let socket = match &options.source_ports {
                            Some(ports) => UdpSocket::from_std(bound(ports, *address, Type::DGRAM)?.into())?,
                            None => UdpSocket::bind(unspecified(*address)).await?,
                        };
                        connect_udp(socket, *address).await?
                    }
                };
                let answer = exchange(&socket).await?;
                if options.keep_alive {
                    *kept = Some(Kept::Socket(socket));
                }
                Ok(answer)
            }
            Target::Http { address, host, path } => {
                let mut connection = match kept.take() {
                    Some(Kept::Connection(connection)) => connection,
                    _ => match &options.source_ports {
                        Some(ports) => connect_bound(ports, *address).await?,
                        None => connect(*address).await?,
                    },
                };
                let answer = get(&mut connection, host, path).await?;
                if options.keep_alive {
                    *kept = Some(Kept::Connection(connection));
                }
                Ok(answer)
            }
        }
    }
}

async fn connect(address: SocketAddr) -> Result<Connection> {
    handshake(TcpStream::connect(address).await, address).await
}

/// From one of these ports.
async fn connect_from(ports: &RangeInclusive<u16>, address: SocketAddr) -> Result<Connection> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    restrict_ports(&socket, ports).context("cannot restrict a socket's port")?;
    handshake(socket.connect(address).await, address).await
}

async fn handshake(stream: std::io::Result<TcpStream>, address: SocketAddr) -> Result<Connection> {
    let stream = stream.map_err(|error| named("connect", &error))?;
    let peer = stream.peer_addr().map_err(|error| named("getpeername", &error))?;
    if peer != address {
        bail!("connected to {address}, but getpeername says {peer}");
    }
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Its errors are also the request's.
    tokio::task::spawn_local(connection);
    Ok(sender)
}

async fn get(connection: &mut Connection, host: &str, path: &str) -> Result<Answer> {
    connection.ready().await.context("connection closed")?;
    let request = hyper::Request::get(path).header(hyper::header::HOST, host).body(Empty::new())?;
    let response = connection.send_request(request).await.context("request")?;
    let status = response.status();
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (backend, peer) = (header(POD), header(PEER));
    response.into_body().collect().await.context("answer")?;
    if !status.is_success() {
        bail!("status {status}");
    }
    let backend = backend.context("the answer is from no pod of the lab")?;
    Ok(Answer { backend, peer: peer.unwrap_or_default(), status: Some(status.as_u16()) })
}

const PAYLOAD: &str = "hello";
const RESEND: Duration = Duration::from_millis(500);

async fn connect_bound(ports: &RangeInclusive<u16>, address: SocketAddr) -> Result<Connection> {
    let socket = TcpSocket::from_std_stream(bound(ports, address, Type::STREAM)?.into());
    handshake(socket.connect(address).await, address).await
}

/// A socket on a free one of these ports, which may be any: IP_LOCAL_PORT_RANGE knows only those of the host's own range.
fn bound(ports: &RangeInclusive<u16>, peer: SocketAddr, kind: Type) -> Result<Socket> {
    /// Prime, so that every port comes up.
    const STEP: u32 = 7919;
    static TURN: AtomicU32 = AtomicU32::new(0);
    let any = unspecified(peer);
    loop {
        let socket = Socket::new(Domain::for_address(peer), kind, None)?;
        socket.set_nonblocking(true)?;
        let turn = TURN.fetch_add(STEP, Ordering::Relaxed);
        let port = ports.start() + (turn % ports.len() as u32) as u16;
        match socket.bind(&SocketAddr::new(any.ip(), port).into()) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => (),
            result => {
                result?;
                return Ok(socket);
            }
        }
    }
}

/// A socket to talk to `peer` with, on one of these ports.
fn bind(peer: SocketAddr, ports: RangeInclusive<u16>) -> Result<UdpSocket> {
    let any = unspecified(peer);
    let socket = Socket::new(Domain::for_address(peer), Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    let local = if ports.start() == ports.end() {
        SocketAddr::new(any.ip(), *ports.start())
    } else {
        restrict_ports(&socket, &ports).context("cannot restrict a socket's port")?;
        any
    };
    socket.bind(&local.into())?;
    Ok(UdpSocket::from_std(socket.into())?)
}

/// See IP_LOCAL_PORT_RANGE in ip(7); Linux 6.3.
fn restrict_ports(socket: &impl AsRawFd, ports: &RangeInclusive<u16>) -> std::io::Result<()> {
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let range = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    // SAFETY: the descriptor is open, and the kernel reads as many bytes as the value has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            IP_LOCAL_PORT_RANGE,
            std::ptr::from_ref(&range).cast(),
            size_of_val(&range) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

async fn connect_udp(socket: UdpSocket, address: SocketAddr) -> Result<UdpSocket> {
    socket.connect(address).await.map_err(|error| named("connect", &error))?;
    let peer = socket.peer_addr().map_err(|error| named("getpeername", &error))?;
    if peer != address {
        bail!("connected to {address}, but getpeername says {peer}");
    }
    Ok(socket)
}

async fn exchange(socket: &UdpSocket) -> Result<Answer> {
    socket.send(PAYLOAD.as_bytes()).await.map_err(|error| named("send", &error))?;
    let mut answer = [0; 1500];
    let length = socket.recv(&mut answer).await.map_err(|error| named("receive", &error))?;
    echoed(&answer[..length])
}

async fn ask_unconnected(address: SocketAddr) -> Result<Answer> {
    let socket = UdpSocket::bind(unspecified(address)).await?;
    socket.send_to(PAYLOAD.as_bytes(), address).await.map_err(|error| named("send", &error))?;
    let mut answer = [0; 1500];
    let (length, from) = socket.recv_from(&mut answer).await.map_err(|error| named("receive", &error))?;
    if from != address {
        bail!("sent to {address}, but answered by {from}");
    }
    echoed(&answer[..length])
}

fn echoed(answer: &[u8]) -> Result<Answer> {
    let text = std::str::from_utf8(answer).context("the answer is no text")?;
    let mut words = text.split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some(backend), Some(peer), Some(PAYLOAD)) => {
            Ok(Answer { backend: backend.to_owned(), peer: peer.to_owned(), status: None })
        }
        _ => bail!("the answer is no echo: {text:?}"),
    }
}

fn unspecified(peer: SocketAddr) -> SocketAddr {
    if peer.is_ipv4() { SocketAddr::from(([0, 0, 0, 0], 0)) } else { SocketAddr::from(([0_u16; 8], 0)) }
}

/// The kind is what tests look for: unlike the kernel's text it does not depend on the libc.
fn named(step: &str, error: &std::io::Error) -> anyhow::Error {
    anyhow::anyhow!("{step}: {:?}", error.kind())
}
