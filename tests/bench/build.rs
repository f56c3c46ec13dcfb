//! Compiles the benchmark's own programs for the kernel.
use std::path::Path;

fn main() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("a member of the workspace");
    svc_ebpf_build::compile(workspace, "svc-bench-ebpf", "tests/bench/kernel", "bench", &[]);
}
