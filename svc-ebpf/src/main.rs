//! The kernel's programs: thin entry points that bind the engine to hooks, maps and helpers.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("these programs are for the kernel; `cargo xtask build` compiles them into svc-agent");
    std::process::exit(1);
}

#[cfg(target_arch = "bpf")]
mod kernel;
