//! What the kernel part tells of drops, rejects and new flows, while somebody listens: each listener has a ring buffer of its
//! own, which the kernel part writes to as long as the listener says every second that it is there.
pub mod filter;
pub mod line;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use aya::maps::{Map, MapData, RingBuf};
use aya::util::nr_cpus;
use nix::fcntl::{Flock, FlockArg};
use svc_common::map::{EVENTS_SIZE, Event, MAX_MONITORS, Monitor, Told, pin};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::{host, sys};

/// How long the kernel part writes for a listener that does not renew: one that a busy machine keeps waiting is not dead.
const LEASE: Duration = Duration::from_secs(10);
/// How often to call [`Subscription::renew`].
pub const RENEW_EVERY: Duration = Duration::from_secs(1);

/// The pinned maps that listeners are known by.
struct Places {
    monitors: OwnedFd,
    events: OwnedFd,
    told: OwnedFd,
}

impl Places {
    fn open(maps: &Path) -> anyhow::Result<Self> {
        let open = |name: &str| {
            sys::open_pin(&maps.join(name)).with_context(|| {
                format!("cannot open the map {name}: an agent of this version has to have run here, as root")
            })
        };
        Ok(Places { monitors: open(pin::MONITORS)?, events: open(pin::EVENTS)?, told: open(pin::EVENTS_TOLD)? })
    }

    fn slots() -> impl Iterator<Item = u32> {
        0..MAX_MONITORS as u32
    }

    fn monitor(&self, slot: u32) -> io::Result<Monitor> {
        sys::lookup(self.monitors.as_fd(), &slot)
    }

    /// Nothing is written for this listener any more, and its buffer is given back.
    fn vacate(&self, slot: u32) -> io::Result<()> {
        sys::update(self.monitors.as_fd(), &slot, &Monitor::default())?;
        sys::delete(self.events.as_fd(), &slot)
    }
}

/// Slots are given out and taken back by one process at a time.
fn lock(maps: &Path) -> anyhow::Result<Flock<File>> {
    let directory = File::open(maps).with_context(|| format!("cannot open {}", maps.display()))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", maps.display()))
}

/// Gives back what listeners had that have died: the kernel part writes nothing for them, but their buffers are memory.
///
/// # Errors
/// Where the maps cannot be read or written.
pub fn retire_dead(maps: &Path) -> anyhow::Result<usize> {
    let places = Places::open(maps)?;
    let _lock = lock(maps)?;
    let now = host::monotonic_nanoseconds();
    let mut retired = 0;
    for slot in Places::slots() {
        let until = places.monitor(slot)?.until;
        if until != 0 && until < now {
            places.vacate(slot)?;
            retired += 1;
        }
    }
    Ok(retired)
}

/// A listener. The kernel part stops to write for it when it is dropped.
pub struct Subscription {
    places: Places,
    maps: PathBuf,
    slot: u32,
    /// Of the ring buffer.
    map_id: u32,
    reasons: u32,
    cpus: usize,
    /// As counted when it was last asked.
    lost: u64,
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Subscription {
    /// `maps`: where the maps are pinned; `reasons`: the bits of those to be told ([`svc_common::Reason::bit`]). It needs tokio's
    /// reactor.
    ///
    /// # Errors
    /// Where the maps are not there or not for us, or as many others listen as can.
    pub fn open(maps: &Path, reasons: u32) -> anyhow::Result<Self> {
        let places = Places::open(maps)?;
        let cpus = nr_cpus().map_err(|(path, error)| anyhow::Error::new(error).context(path))?;
        let ring = sys::create_ring_buffer(EVENTS_SIZE as u32).context("making a ring buffer")?;
        let map_id = sys::map_info(ring.as_fd())?.id;

        let _lock = lock(maps)?;
        let now = host::monotonic_nanoseconds();
        let mut free = None;
        for slot in Places::slots() {
            if places.monitor(slot)?.until < now {
                free = Some(slot);
                break;
            }
        }
        let Some(slot) = free else {
            bail!("{MAX_MONITORS} monitors are open on this node already, which is as many as there can be");
        };
        let lost = lost(&places, slot, cpus)?;
        sys::update(places.events.as_fd(), &slot, &(ring.as_raw_fd() as u32))
            .context("handing the ring buffer over")?;
        let ring = RingBuf::try_from(Map::RingBuf(MapData::from_fd(ring)?)).context("mapping the ring buffer")?;
        // SAFETY: the descriptor is the buffer's own, and the same as long as that lives.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)?;
        let subscription = Subscription { places, maps: maps.to_owned(), slot, map_id, reasons, cpus, lost, ring };
        subscription.extend()?;
        Ok(subscription)
    }

    fn extend(&self) -> io::Result<()> {
        let until = host::monotonic_nanoseconds() + LEASE.as_nanos() as u64;
        sys::update(self.places.monitors.as_fd(), &self.slot, &Monitor { until, reasons: self.reasons, pad: 0 })
    }

    fn is_ours(&self) -> bool {
        sys::lookup::<u32, u32>(self.places.events.as_fd(), &self.slot).is_ok_and(|id| id == self.map_id)
    }

    /// Says that somebody still listens. False where that was not said for so long that the kernel part had stopped to write.
    ///
    /// # Errors
    /// Where the place was given away meanwhile.
    pub fn renew(&self) -> anyhow::Result<bool> {
        let _lock = lock(&self.maps)?;
        ensure!(self.is_ours(), "stopped for longer than {LEASE:?}, and taken for dead: start it again");
        let in_time = self.places.monitor(self.slot)?.until >= host::monotonic_nanoseconds();
        self.extend().context("renewing")?;
        Ok(in_time)
    }

    /// How many events were left out since this was last asked.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub fn lost(&mut self) -> anyhow::Result<u64> {
        let lost = lost(&self.places, self.slot, self.cpus)?;
        Ok(lost.saturating_sub(std::mem::replace(&mut self.lost, lost)))
    }

    /// Waits until there are events, and takes `most` of them at most, oldest first. What is left is there the next time.
    ///
    /// # Errors
    /// Where the kernel does not let us wait.
    pub async fn take(&mut self, most: usize, events: &mut Vec<Event>) -> io::Result<()> {
        let mut guard = self.ring.readable_mut().await?;
        for _ in 0..most {
            let ring = guard.get_inner_mut();
            let Some(item) = ring.next() else {
                guard.clear_ready();
                break;
            };
            events.extend(event(&item));
        }
        Ok(())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let Ok(_lock) = lock(&self.maps)
            && self.is_ours()
        {
            let _ = self.places.vacate(self.slot);
        }
    }
}

fn event(bytes: &[u8]) -> Option<Event> {
    // SAFETY: as many bytes as an event has, all of whose bytes may be anything.
    (bytes.len() >= size_of::<Event>()).then(|| unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

fn lost(places: &Places, slot: u32, cpus: usize) -> io::Result<u64> {
    let told: Vec<Told> = sys::lookup_per_cpu(places.told.as_fd(), &slot, cpus)?;
    Ok(told.iter().map(|told| told.lost).sum())
}
