//! What is refused and which flows are opened, told to the agent's log. For a debug build of the kernel part only.
use aya_log_ebpf::info;
use svc_common::Reason;

#[inline(always)]
pub(super) fn log(reason: Reason, bytes: u32) {
    svc_log(reason as u32, bytes);
}

/// A function of its own for the verifier, as those of `global.rs`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn svc_log(reason: u32, bytes: u32) -> u32 {
    if let Some(reason) = Reason::from_index(reason) {
        match reason {
            // What every packet of a flow is counted as.
            Reason::FlowHit | Reason::Reply | Reason::SocketConnected | Reason::SocketDatagram => {}
            _ => info!((), "{} ({} bytes)", reason.label(), bytes),
        }
    }
    0
}
