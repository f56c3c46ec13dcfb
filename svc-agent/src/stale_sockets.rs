//! Terminates connected UDP sockets whose backend has left its Service. A socket hook has pointed them there once, and none of
//! their packets is looked at: they would go on sending to nobody. Their owner gets ECONNABORTED and connects anew.
//!
//! A search covers whatever backends have left: what one misses, the next one finds.
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use svc_common::map::{Backend, SOCKET_REVERSE, SocketKey, SocketPeer, UDP, pin};
use tracing::{debug, info, warn};

use crate::inspect::map::Map;
use crate::netns::{self, Hidden, Places};
use crate::sock_diag::{SockDiag, UdpSocket};
use crate::status::Status;
use crate::sys;

/// Backends seldom leave alone. Meanwhile a hook that still saw the backend has come to its end, too.
const GATHER: Duration = Duration::from_millis(100);
/// Of a search's own time, before the next one: a tenth of one CPU at most goes into them.
const REST: u32 = 9;

/// Tells that UDP backends have left; by default nobody.
#[derive(Debug, Default)]
pub struct Departures(Option<SyncSender<()>>);

impl Departures {
    /// And who is told.
    pub fn channel() -> (Self, Receiver<()>) {
        let (sender, receiver) = sync_channel(1);
        (Departures(Some(sender)), receiver)
    }

    /// Never waits: all that is told during a search is one search more.
    pub fn tell(&self) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(());
        }
    }
}

/// Starts the thread that searches. `bpffs`: where the maps are pinned. `places`: where the network namespaces beside this
/// thread's own are, if others are served.
///
/// # Errors
/// Where a map cannot be opened, or no thread can be had.
pub fn start(bpffs: &Path, places: Option<Places>, status: Arc<Status>) -> anyhow::Result<Departures> {
    let open = |name: &str| {
        let path = bpffs.join("maps").join(name);
        sys::open_pin(&path).with_context(|| format!("cannot open the map {name}")).map(|map| (map, path))
    };
    let (sockets, path) = open(pin::SOCKETS)?;
    let list = Map::open(&path).context("cannot open the map sockets")?;
    let (backends, _) = open(pin::BACKENDS)?;
    let places = places.filter(|_| match netns::may_enter() {
        Ok(()) => true,
        Err(error) => {
            warn!(
                "connected UDP sockets of pods keep a backend that has left; only the node's own are terminated, since \
                 entering network namespaces, which needs CAP_SYS_ADMIN, fails: {error}"
            );
            false
        }
    });
    let (departures, told) = Departures::channel();
    let mut search = Search { list, sockets, backends, places, status, told: Told::default() };
    thread::Builder::new()
        .name("stale-sockets".to_owned())
        .spawn(move || search.run(&told))
        .context("cannot start a thread")?;
    Ok(departures)
}

/// The entries of sockets whose backend has left: by the entry's key, the backend's id.
fn stale(
    entries: impl IntoIterator<Item = (SocketKey, SocketPeer)>,
    backend: impl Fn(u32) -> Option<Backend>,
) -> HashMap<SocketKey, u32> {
    let mut backends: HashMap<u32, Option<Backend>> = HashMap::new();
    let udp = entries.into_iter().filter(|(key, _)| key.protocol == UDP && key.kind == SOCKET_REVERSE);
    udp.filter(|(key, peer)| {
        let backend = backends.entry(peer.backend).or_insert_with(|| backend(peer.backend));
        backend.is_some_and(|backend| has_left(key, &backend))
    })
    .map(|(key, peer)| (key, peer.backend))
    .collect()
}

/// `backend` is what now has the id that the entry has. Where that is another one, nothing is known of the entry's.
fn has_left(key: &SocketKey, backend: &Backend) -> bool {
    backend.live == 0 && (backend.addr, backend.port, backend.protocol) == (key.addr, key.port, key.protocol)
}

/// The entry that a socket has if a hook has pointed it to where it is connected to.
fn key(socket: &UdpSocket) -> SocketKey {
    let (addr, port) = socket.peer();
    SocketKey { cookie: socket.cookie(), addr, port, protocol: UDP, kind: SOCKET_REVERSE, pad: 0 }
}

struct Search {
    /// The map `sockets`, to be read as a whole.
    list: Map,
    sockets: OwnedFd,
    backends: OwnedFd,
    places: Option<Places>,
    status: Arc<Status>,
    told: Told,
}

/// What the log has said already.
#[derive(Default)]
struct Told {
    hidden: bool,
    failed: bool,
}

/// What came of one search.
#[derive(Default)]
struct Found {
    terminated: u64,
    namespaces: usize,
    hidden: Hidden,
    /// In how many namespaces something failed, where first, and why.
    failures: usize,
    first_failure: Option<(String, io::Error)>,
}

impl Found {
    fn failed(&mut self, place: &str, error: io::Error) {
        debug!(place, "cannot terminate UDP sockets: {error}");
        self.failures += 1;
        self.first_failure.get_or_insert_with(|| (place.to_owned(), error));
    }
}

impl Search {
    fn run(&mut self, departures: &Receiver<()>) {
        while departures.recv().is_ok() {
            thread::sleep(GATHER);
            while departures.try_recv().is_ok() {}
            let started = Instant::now();
            match self.search() {
                Ok(Some(found)) => {
                    debug!(
                        terminated = found.terminated,
                        namespaces = found.namespaces,
                        took_ms = started.elapsed().as_millis(),
                        "searched for UDP sockets whose backend has left"
                    );
                    if self.tell(&found).is_break() {
                        return;
                    }
                }
                Ok(None) => {}
                Err(error) => warn!("cannot search for UDP sockets whose backend has left: {error:#}"),
            }
            thread::sleep(started.elapsed() * REST);
        }
    }

    /// None where no entry says that there is anything to look for.
    fn search(&self) -> anyhow::Result<Option<Found>> {
        let entries = self.list.entries().context("cannot read the map sockets")?;
        let stale = stale(entries, |id| self.backend(id));
        if stale.is_empty() {
            return Ok(None);
        }
        // A thread that has moved to another network namespace does nothing else any more.
        thread::scope(|scope| {
            let thread =
                thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || self.everywhere(&stale));
            let found = thread.context("cannot start a thread")?.join();
            Ok(Some(found.unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
        })
    }

    /// Moves the calling thread.
    fn everywhere(&self, stale: &HashMap<SocketKey, u32>) -> Found {
        let mut found = Found::default();
        if let Err(error) = self.here(stale, &mut found) {
            found.failed("the node's own network namespace", error);
        }
        if let Some(places) = &self.places {
            found.hidden = netns::visit(places, |path, namespace| {
                let result = match netns::enter(namespace) {
                    // A name whose namespace has gone is an empty file.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                    entered => entered.and_then(|()| self.here(stale, &mut found)),
                };
                if let Err(error) = result {
                    found.failed(&path.display().to_string(), error);
                }
            });
        }
        found
    }

    /// In the network namespace where the calling thread is.
    fn here(&self, stale: &HashMap<SocketKey, u32>, found: &mut Found) -> io::Result<()> {
        found.namespaces += 1;
        let mut diag = SockDiag::open()?;
        for socket in diag.connected_udp(|socket| stale.contains_key(&key(socket)))? {
            let key = key(&socket);
            let has_returned = || self.backend(stale[&key]).is_none_or(|backend| !has_left(&key, &backend));
            if has_returned() {
                continue;
            }
            match diag.destroy(&socket) {
                Ok(()) => found.terminated += 1,
                // Its owner was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            }
            // The owner may connect the same socket to the backend's address directly, which is none of ours then.
            sys::delete(self.sockets.as_fd(), &key)?;
        }
        Ok(())
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        sys::lookup(self.backends.as_fd(), &id).ok()
    }

    /// Breaks where another search would be in vain.
    fn tell(&mut self, found: &Found) -> std::ops::ControlFlow<()> {
        if found.terminated > 0 {
            info!(sockets = found.terminated, "terminated connected UDP sockets whose backend has left");
            self.status.sockets_terminated(found.terminated);
        }
        if let Some(first) = found.hidden.first.as_ref().filter(|_| !self.told.hidden) {
            self.told.hidden = true;
            warn!(
                processes = found.hidden.count,
                "cannot see these processes' network namespaces, where UDP sockets may keep a backend that has left \
                 (CAP_SYS_PTRACE lets one look): {first}"
            );
        }
        match &found.first_failure {
            Some((_, error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                warn!(
                    "connected UDP sockets keep a backend that has left: this kernel cannot terminate them \
                     (CONFIG_INET_DIAG_DESTROY)"
                );
                return std::ops::ControlFlow::Break(());
            }
            Some((place, error)) if !self.told.failed => {
                warn!(
                    namespaces = found.failures,
                    "cannot terminate UDP sockets whose backend has left: {place}: {error}"
                );
            }
            _ => {}
        }
        self.told.failed = found.first_failure.is_some();
        std::ops::ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use rstest::rstest;
    use svc_common::Addr;
    use svc_common::map::{SOCKET_STICKY, TCP};

    use super::*;

    const ID: u32 = 7;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn entry() -> (SocketKey, SocketPeer) {
        let port = 53u16.to_be();
        let cookie = 1;
        let key = SocketKey { cookie, addr: addr("10.244.1.2"), port, protocol: UDP, kind: SOCKET_REVERSE, pad: 0 };
        (key, SocketPeer { addr: addr("10.96.0.10"), port, pad: 0, backend: ID })
    }

    fn backend() -> Backend {
        Backend { addr: addr("10.244.1.2"), port: 53u16.to_be(), protocol: UDP, live: 0, service: 3 }
    }

    #[rstest]
    #[case::its_backend_has_left(entry(), backend(), true)]
    #[case::its_backend_lives(entry(), Backend { live: 1, ..backend() }, false)]
    #[case::its_id_is_another_addresss(entry(), Backend { addr: addr("10.244.1.3"), ..backend() }, false)]
    #[case::its_id_is_another_ports(entry(), Backend { port: 54u16.to_be(), ..backend() }, false)]
    #[case::its_id_is_another_protocols(entry(), Backend { protocol: TCP, ..backend() }, false)]
    #[case::its_id_is_nobodys(entry(), Backend::default(), false)]
    #[case::a_tcp_socket((SocketKey { protocol: TCP, ..entry().0 }, entry().1),
                         Backend { protocol: TCP, ..backend() }, false)]
    #[case::where_an_unconnected_socket_stays((SocketKey { kind: SOCKET_STICKY, ..entry().0 }, entry().1),
                                              backend(), false)]
    fn which_entries_are_of_sockets_to_terminate(
        #[case] entry: (SocketKey, SocketPeer),
        #[case] backend: Backend,
        #[case] expected: bool,
    ) {
        let stale = stale([entry], |id| (id == ID).then_some(backend));
        assert_eq!(stale, expected.then_some((entry.0, ID)).into_iter().collect());
    }

    #[test]
    fn an_id_that_the_map_does_not_have_is_nobodys() {
        assert_eq!(stale([entry()], |_| None), HashMap::new());
    }

    #[test]
    fn telling_never_waits() {
        let (departures, receiver) = Departures::channel();
        for _ in 0..3 {
            departures.tell();
        }
        assert_eq!(receiver.try_iter().count(), 1);
        drop(receiver);
        departures.tell();
        Departures::default().tell();
    }
}
