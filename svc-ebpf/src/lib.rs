//! The engine: what happens to a packet or a socket, generic over the packet's context ([`Packet`]), the address family
//! ([`family::Family`]) and the tables ([`Tables`]).
//!
//! The kernel runs it over its maps (`main.rs` and the files beside it), the host's tests over memory: it is the same code.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod family;
pub mod forward;
pub mod linkless;
pub mod negative;
pub mod open;
pub mod packet;
pub mod parse;
pub mod reject;
pub mod rewrite;
pub mod service;
pub mod socket;
pub mod tables;
pub mod ticks;
pub mod visit;
pub mod wire;

pub use packet::Packet;
pub use tables::Tables;
