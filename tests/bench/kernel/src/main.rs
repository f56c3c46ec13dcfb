//! Programs that make packets, and the floors to compare with.
//!
//! A generator writes the header of a packet of one of many flows over the one at hand, which the last program has left as it
//! liked, and goes on to the program under test by a tail call.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("these programs are for the kernel; `cargo xtask bench` runs them");
    std::process::exit(1);
}

#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod template;
