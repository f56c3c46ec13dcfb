//! What the kernel part and the host share: addresses, map keys and values, the flow table, checksums, and the
//! reasons behind every verdict. Everything here is plain data and plain functions, tested on the host.
#![cfg_attr(not(any(test, feature = "std")), no_std)]
// core::sync::atomic has no compare-and-swap on the bpf target, though the machine has the instruction; and the verifier
// wants code with few branches, which the compiler would bring back.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics), allow(internal_features))]

pub mod addr;
pub mod checksum;
pub mod crc32c;
pub mod flow;
pub mod map;
pub mod reason;
pub mod select;
pub mod verifier;

pub use addr::Addr;
pub use reason::{Kind, Reason};
