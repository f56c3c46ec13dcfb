//! In front of the stack. Whatever cannot be done here passes unmodified to the tc program behind, which can do all.
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_TX};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use svc_common::checksum::Diff;
use svc_common::verifier::opaque;
use svc_common::{Addr, Reason};
use svc_ebpf::family::Family;
use svc_ebpf::forward::Hop;
use svc_ebpf::negative;
use svc_ebpf::packet::{Packet, Peer, Pod};
use svc_ebpf::parse::{From, Headers};
use svc_ebpf::tables::Tables;
use svc_ebpf::wire::{self, Next};

use super::maps::{Hook, Maps, scratch};
use super::sk_lookup::has_socket;
use super::{at, route};

struct Frame<'a>(&'a XdpContext);

impl Packet for Frame<'_> {
    const PLAIN: bool = true;

    #[inline(always)]
    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason> {
        // SAFETY: checked against the packet's end; `Pod` takes any bytes.
        Ok(unsafe { T::load(at::<T>(self.0.data(), self.0.data_end(), offset)?) })
    }

    #[inline(always)]
    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        // SAFETY: as in `get`.
        unsafe { value.store(at::<T>(self.0.data(), self.0.data_end(), offset)?) };
        Ok(())
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        // Of 32 bits, as the compiler would have it, the verifier forbids the difference of two pointers.
        opaque(opaque(self.0.data_end() as u64).wrapping_sub(opaque(self.0.data() as u64))) as u32
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.0.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn has_socket(&self, protocol: u8, remote: Peer, local: Peer) -> bool {
        has_socket(self.0.as_ptr(), protocol, remote, local)
    }

    #[inline(always)]
    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        let field: u16 = self.get(offset)?;
        if udp && field == 0 {
            return Ok(());
        }
        let patched = Diff(addresses.0 + ports.0).apply(field);
        self.set(offset, if udp && patched == 0 { 0xffff } else { patched })
    }

    /// Only what leaves by the link it came from, with a neighbour that is known.
    #[inline(always)]
    fn route<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        let length = self.size().wrapping_sub(svc_ebpf::family::ETHERNET as u32) as u16;
        let interface = self.ifindex();
        route::way(self.0.as_ptr(), tables, length, interface, headers, dst, hop)?;
        if hop.is_resolved() && hop.ifindex == interface { Ok(()) } else { Err(Reason::NoRoute) }
    }
}

/// A function of its own: see `tc.rs`.
#[inline(never)]
fn is_known(context: &XdpContext) -> bool {
    negative::is_known(&Frame(context), &Maps)
}

#[xdp]
pub fn svc_xdp(context: XdpContext) -> u32 {
    if is_known(&context) {
        return XDP_PASS;
    }
    let Some(scratch) = scratch(Hook::Xdp) else { return XDP_PASS };
    let frame = &mut Frame(&context);
    scratch.headers.from = From::Network;
    match wire::ingress(frame, &Maps, scratch).and_then(|()| wire::translate(frame, &Maps, scratch)) {
        Ok(Next::Send) => XDP_TX,
        // What was refused here is judged, and counted, by tc.
        Ok(Next::Stack | Next::Reenter) | Err(_) => XDP_PASS,
    }
}
