//! Parts of the engine as global functions. The verifier walks each one once, for any arguments of its types, instead of
//! again for every path that leads to it. They take at most five arguments and give back one number.
use svc_common::Reason;
use svc_common::flow::{self, Added, Entry, Hit, Key, Room, Vacancy};
use svc_common::map::BackendSlot;
use svc_ebpf::open::{Opened, Outcome, SourcePort, Trial};
use svc_ebpf::parse::Headers;
use svc_ebpf::visit::Visit;

use super::maps::{Flows, Maps};

#[inline(always)]
pub(super) fn put(entry: &Entry, now: u16, room: Room) -> Added {
    match svc_flow_put(entry, now as u32, room as u32) {
        0 => Added::New,
        1 => Added::Exists,
        _ => Added::Full,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_put(entry: *const Entry, now: u32, room: u32) -> u32 {
    // SAFETY: null, or the caller's, which the verifier makes sure of; so for all pointers below.
    let Some(entry) = (unsafe { entry.as_ref() }) else { return 2 };
    let room = if room == Room::Spare as u32 { Room::Spare } else { Room::Dispensable };
    match flow::put(&Flows, entry, now as u16, room) {
        Added::New => 0,
        Added::Exists => 1,
        Added::Full => 2,
    }
}

#[inline(always)]
pub(super) fn count(key: &Key) -> u32 {
    svc_flow_count(key)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_count(key: *const Key) -> u32 {
    // SAFETY: as above.
    unsafe { key.as_ref() }.map_or(0, |key| flow::count(&Flows, key))
}

#[inline(always)]
pub(super) fn vacancy(key: &Key, now: u16) -> Vacancy {
    match svc_flow_vacancy(key, now as u32) {
        0 => Vacancy::Free,
        1 => Vacancy::Over,
        2 => Vacancy::HalfOpen,
        _ => Vacancy::Living,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_vacancy(key: *const Key, now: u32) -> u32 {
    // SAFETY: as above.
    unsafe { key.as_ref() }.map_or(Vacancy::Living, |key| flow::vacancy(&Flows, key, now as u16)) as u32
}

#[inline(always)]
pub(super) fn victim(set: *const flow::Set, now: u16) -> u32 {
    svc_flow_victim(set, now as u32)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_victim(set: *const flow::Set, now: u32) -> u32 {
    // SAFETY: as above.
    if set.is_null() { 0 } else { unsafe { flow::victim(&Flows, set, now as u16) } }
}

#[inline(always)]
pub(super) fn make_room(entry: &Entry, now: u16) {
    svc_flow_make_room(entry, now as u32);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_make_room(entry: *const Entry, now: u32) -> u32 {
    // SAFETY: as above.
    if let Some(entry) = unsafe { entry.as_ref() } {
        flow::make_room(&Flows, entry, now as u16);
    }
    0
}

#[inline(always)]
pub(super) fn sync(key: &Key, hit: &Hit, now: u16) -> bool {
    svc_flow_sync(key, hit, now as u32) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_sync(key: *const Key, hit: *const Hit, now: u32) -> u32 {
    // SAFETY: as above.
    let (Some(key), Some(hit)) = (unsafe { (key.as_ref(), hit.as_ref()) }) else { return 0 };
    flow::sync(&Flows, key, hit, now as u16) as u32
}

#[inline(always)]
pub(super) fn close(key: &Key, hit: &Hit) {
    svc_flow_close(key, hit);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_close(key: *const Key, hit: *const Hit) -> u32 {
    // SAFETY: as above.
    if let (Some(key), Some(hit)) = unsafe { (key.as_ref(), hit.as_ref()) } {
        flow::close(&Flows, key, hit);
    }
    0
}

#[inline(always)]
pub(super) fn remove(key: &Key) {
    svc_flow_remove(key);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_remove(key: *const Key) -> u32 {
    // SAFETY: as above.
    if let Some(key) = unsafe { key.as_ref() } {
        flow::remove(&Flows, key);
    }
    0
}

#[inline(always)]
pub(super) fn visit(key: &Key, headers: &Headers, hit: &mut Hit, now: u16) -> Visit {
    match svc_flow_visit(key, headers, hit, now as u32) {
        1 => Visit::Over,
        2 => Visit::Found,
        3 => Visit::Told,
        _ => Visit::None,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_visit(key: *const Key, headers: *const Headers, hit: *mut Hit, now: u32) -> u32 {
    // SAFETY: as above.
    let (Some(key), Some(headers), Some(hit)) = (unsafe { (key.as_ref(), headers.as_ref(), hit.as_mut()) }) else {
        return 0;
    };
    match svc_ebpf::visit::visit(&Maps, key, headers, hit, now as u16) {
        Visit::None => 0,
        Visit::Over => 1,
        Visit::Found => 2,
        Visit::Told => 3,
    }
}

#[inline(always)]
pub(super) fn open(headers: &Headers, key: &Key, hit: &mut Hit) -> Result<(), Reason> {
    match Reason::from_index(svc_flow_open(headers, key, hit)) {
        None => Ok(()),
        Some(reason) => Err(reason),
    }
}

/// The reason's index, or a number that is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_open(headers: *const Headers, key: *const Key, hit: *mut Hit) -> u32 {
    // SAFETY: as above.
    let (Some(headers), Some(key), Some(hit)) = (unsafe { (headers.as_ref(), key.as_ref(), hit.as_mut()) }) else {
        return Reason::HelperFailed as u32;
    };
    match svc_ebpf::open::open(&Maps, headers, key, hit) {
        Ok(()) => u32::MAX,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
pub(super) fn open_by(
    headers: &Headers,
    key: &Key,
    backend: &BackendSlot,
    hit: &mut Hit,
    source: SourcePort,
) -> Opened {
    match svc_flow_open_by(headers, key, backend, hit, pack(source)) {
        0 => Opened::Yes,
        1 => Opened::PortTaken,
        _ => Opened::TableFull,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_flow_open_by(
    headers: *const Headers,
    key: *const Key,
    backend: *const BackendSlot,
    hit: *mut Hit,
    source: u32,
) -> u32 {
    // SAFETY: as above.
    let (Some(headers), Some(key), Some(backend), Some(hit)) =
        (unsafe { (headers.as_ref(), key.as_ref(), backend.as_ref(), hit.as_mut()) })
    else {
        return Opened::TableFull as u32;
    };
    svc_ebpf::open::open_by(&Maps, headers, key, backend, hit, unpack(source)) as u32
}

#[inline(always)]
pub(super) fn source_port(headers: &Headers, backend: &BackendSlot) -> SourcePort {
    unpack(svc_source_port(headers, backend))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_source_port(headers: *const Headers, backend: *const BackendSlot) -> u32 {
    // SAFETY: as above.
    let (Some(headers), Some(backend)) = (unsafe { (headers.as_ref(), backend.as_ref()) }) else { return 0 };
    pack(svc_ebpf::open::source_port(&Maps, headers, backend))
}

const IN_USE: u32 = 1 << 16;

#[inline(always)]
fn pack(SourcePort { port, in_use }: SourcePort) -> u32 {
    port as u32 | if in_use { IN_USE } else { 0 }
}

#[inline(always)]
fn unpack(source: u32) -> SourcePort {
    SourcePort { port: source as u16, in_use: source & IN_USE != 0 }
}

#[inline(always)]
pub(super) fn try_port(headers: &Headers, backend: &BackendSlot, attempt: u32, half_open: bool) -> Trial {
    let answer = svc_try_port(headers, backend, attempt, half_open as u32);
    let outcome = match answer >> 16 {
        0 => Outcome::Free,
        1 => Outcome::Over,
        2 => Outcome::HalfOpen,
        3 => Outcome::Taken,
        _ => Outcome::Last,
    };
    Trial { port: answer as u16, outcome }
}

/// The port, and above it what came of it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_try_port(headers: *const Headers, backend: *const BackendSlot, attempt: u32, half_open: u32) -> u32 {
    // SAFETY: as above.
    let (Some(headers), Some(backend)) = (unsafe { (headers.as_ref(), backend.as_ref()) }) else {
        return (Outcome::Last as u32) << 16;
    };
    let Trial { port, outcome } = svc_ebpf::open::try_port(&Maps, headers, backend, attempt, half_open != 0);
    port as u32 | (outcome as u32) << 16
}
