//! Pieces of a datagram that overtook its first one, which alone has the ports: they are kept until that one comes, and then go
//! after it.
use core::ptr::addr_of_mut;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, BPF_NOEXIST};
use aya_ebpf::btf_maps::{LruHashMap, PerCpuArray};
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use svc_common::map::FragmentKey;
use svc_common::verifier::opaque;
use svc_ebpf::Tables;
use svc_ebpf::parse::Headers;

use super::maps::Maps;

/// Bytes, with the link header where there is one: what the largest common links take.
const LARGEST: usize = 9216;
/// The least that has an IPv4 header.
const SMALLEST: usize = 20;
/// Of one datagram.
const PIECES: u32 = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct PieceKey {
    datagram: FragmentKey,
    index: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Piece {
    length: u32,
    bytes: [u8; LARGEST],
}

/// A flood of pieces evicts pieces only.
#[btf_map]
static PIECES_KEPT: LruHashMap<PieceKey, Piece, 512> = LruHashMap::new();
#[btf_map]
static PIECE: PerCpuArray<Piece, 1> = PerCpuArray::new();

/// Keeps the packet; false where it is none that a Service could have, where there is no room, or where the first piece has
/// come meanwhile.
#[inline(never)]
pub(super) fn keep(context: &TcContext, headers: &Headers) -> bool {
    let Some(length) = of_piece(context.len()) else { return false };
    if Maps.address(&headers.dst) == 0 {
        return false;
    }
    let Some(piece) = PIECE.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own; the length is within the buffer.
    let loaded = unsafe {
        (*piece).length = length;
        bpf_skb_load_bytes(context.as_ptr(), 0, addr_of_mut!((*piece).bytes).cast(), length)
    };
    if loaded != 0 {
        return false;
    }
    let mut key = PieceKey { datagram: headers.fragment_key(), index: 0 };
    let mut index = 0;
    while index < PIECES {
        key.index = index;
        index += 1;
        // SAFETY: as above; nothing writes it meanwhile.
        if PIECES_KEPT.insert(&key, unsafe { &*piece }, BPF_NOEXIST as u64).is_ok() {
            // The first piece may have come between our look for its ports and this: who takes the piece out sends it.
            return Maps.fragment(&key.datagram).is_none() || PIECES_KEPT.remove(&key).is_err();
        }
    }
    false
}

/// Sends the first piece of a datagram, which is at hand, once more up this interface, and the kept ones after it; false where
/// none was kept. The packet is none any more then.
#[inline(never)]
pub(super) fn release(context: &TcContext, headers: &Headers) -> bool {
    let mut key = PieceKey { datagram: headers.fragment_key(), index: 0 };
    let mut index = 0;
    while index < PIECES {
        key.index = index;
        let Some(piece) = PIECES_KEPT.get_ptr(&key) else { break };
        if index == 0 {
            again(context);
        }
        // SAFETY: an element lives until the program ends; where it is given to another piece meanwhile, a mix of both is sent,
        // whose checksum tells.
        unsafe { send(context, piece) };
        let _ = PIECES_KEPT.remove(&key);
        index += 1;
    }
    index != 0
}

/// # Safety
/// `piece` is one.
#[inline(never)]
unsafe fn send(context: &TcContext, piece: *const Piece) {
    // SAFETY: the caller's piece and the program's own context.
    unsafe {
        let Some(length) = of_piece((*piece).length) else { return };
        if bpf_skb_change_tail(context.skb.skb, length, 0) != 0 {
            return;
        }
        let bytes = (&raw const (*piece).bytes).cast();
        bpf_skb_store_bytes(context.skb.skb, 0, bytes, length, BPF_F_RECOMPUTE_CSUM as u64);
    }
    again(context);
}

/// The length, if it is one of a piece. One comparison for each bound: verifiers before Linux 6.10 learn nothing from two in
/// one, nor from one with 0.
#[inline(always)]
fn of_piece(length: u32) -> Option<u32> {
    let length = opaque(length as u64);
    if length < SMALLEST as u64 {
        return None;
    }
    let length = opaque(length);
    if length > LARGEST as u64 { None } else { Some(length as u32) }
}

#[inline(always)]
fn again(context: &TcContext) {
    let skb = context.skb.skb;
    // SAFETY: the program's own context.
    unsafe { bpf_clone_redirect(skb, (*skb).ifindex, BPF_F_INGRESS as u64) };
}
