//! What is counted of each Service, and what `svc-agent monitor` is told: drops, rejects and new flows. No packet of a known
//! flow comes here.
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, PerCpuArray, RingBuf};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use svc_common::map::{
    Backend, EVENT_FROM_HOST, EVENT_FROM_NETWORK, EVENT_FROM_POD, EVENT_FROM_SOCKET, EVENTS_SIZE, Event, MAX_MONITORS,
    Monitor, NO_BACKEND, SocketPeer, Told,
};
use svc_common::select::count_one;
use svc_common::{Addr, Reason, flow};
use svc_ebpf::parse::{From, Headers};
use svc_ebpf::socket::Request;
use svc_ebpf::ticks;

use super::maps::BACKENDS;

/// Written by monitors only.
#[btf_map]
static MONITORS: Array<Monitor, MAX_MONITORS> = Array::new();
/// A monitor's own, which it puts here; empty where none is open.
#[btf_map]
static EVENTS: ArrayOfMaps<RingBuf<Event, EVENTS_SIZE>, MAX_MONITORS> = ArrayOfMaps::new();
#[btf_map]
static EVENTS_TOLD: PerCpuArray<Told, MAX_MONITORS> = PerCpuArray::new();
/// By service id: flows opened, and sockets pointed at a backend. One for all CPUs: with a copy for each, a large machine would
/// give tens of megabytes to it.
#[btf_map]
static CONNECTIONS: Array<u64, 65536> = Array::new();

#[inline(always)]
pub(super) fn opened(headers: &Headers, hit: &flow::Hit, bytes: u32, ifindex: u32) {
    svc_tell_packet(headers, hit, Reason::FlowOpened as u32, bytes, ifindex);
}

#[inline(always)]
pub(super) fn refused(headers: &Headers, reason: Reason, bytes: u32, ifindex: u32) {
    svc_tell_packet(headers, core::ptr::null(), reason as u32, bytes, ifindex);
}

#[inline(always)]
pub(super) fn pointed(request: &Request, peer: &SocketPeer, reason: Reason) {
    svc_tell_socket(request, peer, reason as u32);
}

#[inline(always)]
pub(super) fn turned_down(request: &Request, reason: Reason) {
    svc_tell_socket(request, core::ptr::null(), reason as u32);
}

#[inline(always)]
fn count_connection(backend: u32) {
    if backend == NO_BACKEND {
        return;
    }
    let Some(Backend { service, .. }) = BACKENDS.get(backend) else { return };
    if let Some(counter) = CONNECTIONS.get_ptr_mut(*service) {
        // SAFETY: the map's own value; the agent sets it back where the id gets another meaning.
        unsafe { count_one(counter) };
    }
}

/// Calls `write` with the memory of an event for each monitor that wants to be told `reason`.
///
/// The event is built there and not on the stack, which has no room for it.
#[inline(always)]
fn tell(reason: u32, write: impl Fn(*mut Event)) {
    let mut slot = 0;
    while slot < MAX_MONITORS as u32 {
        tell_one(slot, reason, &write);
        slot += 1;
    }
}

#[inline(always)]
fn tell_one(slot: u32, reason: u32, write: &impl Fn(*mut Event)) {
    let Some(monitor) = MONITORS.get(slot) else { return };
    if monitor.until == 0 || monitor.reasons >> (reason & 31) & 1 == 0 {
        return;
    }
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if monitor.until < now {
        return;
    }
    let Some(told) = EVENTS_TOLD.get_ptr_mut(slot) else { return };
    // SAFETY: this CPU's own.
    let told = unsafe { &mut *told };
    // A flood must not cost more than it does by itself.
    if !ticks::has_room(&mut told.tick, &mut told.told, now) {
        told.lost += 1;
        return;
    }
    let Some(mut entry) = EVENTS.get(slot).and_then(|ring| ring.reserve(0)) else {
        told.lost += 1;
        return;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: memory for one event, all of which is written here or by `write`.
    unsafe {
        (*event).time = now;
        (*event).reason = reason;
        (*event).pad = [0; 5];
    }
    write(event);
    entry.submit(0);
}

/// A function of its own for the verifier, as those of `global.rs`. `hit`: of a flow that was opened, else null.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_tell_packet(
    headers: *const Headers,
    hit: *const flow::Hit,
    reason: u32,
    bytes: u32,
    ifindex: u32,
) -> u32 {
    // SAFETY: null, or the caller's, which the verifier makes sure of.
    let Some(headers) = (unsafe { headers.as_ref() }) else { return 0 };
    // SAFETY: as above.
    let hit = unsafe { hit.as_ref() };
    if let Some(hit) = hit {
        count_connection(hit.backend);
    }
    tell(reason, |event| {
        // SAFETY: memory for one event.
        unsafe {
            (*event).netns = 0;
            (*event).src = headers.src;
            (*event).dst = headers.dst;
            (*event).src_port = headers.sport;
            (*event).dst_port = headers.dport;
            (*event).interface = ifindex;
            (*event).bytes = bytes;
            (*event).protocol = headers.protocol;
            (*event).from = match headers.from {
                From::Network => EVENT_FROM_NETWORK,
                From::Pod => EVENT_FROM_POD,
                From::Host => EVENT_FROM_HOST,
            };
            (*event).to = hit.map_or(Addr::ANY_V6, |hit| hit.to());
            (*event).to_port = hit.map_or(0, |hit| hit.port);
            (*event).second_port = hit.map_or(0, |hit| hit.second);
            (*event).backend = hit.map_or(NO_BACKEND, |hit| hit.backend);
            (*event).masqueraded = hit.is_some_and(|hit| hit.is_masqueraded()) as u8;
        }
    });
    0
}

/// As above. `peer`: the backend that the socket was pointed at, else null.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_tell_socket(request: *const Request, peer: *const SocketPeer, reason: u32) -> u32 {
    // SAFETY: as above.
    let (Some(request), peer) = (unsafe { (request.as_ref(), peer.as_ref()) }) else { return 0 };
    if let Some(peer) = peer {
        count_connection(peer.backend);
    }
    tell(reason, |event| {
        // SAFETY: as above.
        unsafe {
            (*event).netns = request.netns;
            (*event).src = request.addr.any();
            (*event).dst = request.addr;
            (*event).src_port = 0;
            (*event).dst_port = request.port;
            (*event).interface = 0;
            (*event).bytes = 0;
            (*event).protocol = request.protocol;
            (*event).from = EVENT_FROM_SOCKET;
            (*event).to = peer.map_or(Addr::ANY_V6, |peer| peer.addr);
            (*event).to_port = peer.map_or(0, |peer| peer.port);
            (*event).second_port = 0;
            (*event).backend = peer.map_or(NO_BACKEND, |peer| peer.backend);
            (*event).masqueraded = 0;
        }
    });
    0
}
