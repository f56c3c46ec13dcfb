//! Compiles the kernel part and hands it to the agent, which carries it inside.
use std::env;
use std::path::Path;

fn main() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the agent is a member of the workspace");
    // With another feature it is another object, kept beside the usual one.
    let features: &[&str] = if env::var_os("CARGO_FEATURE_KERNEL_LOG").is_some() { &["log"] } else { &[] };
    svc_ebpf_build::compile(workspace, "svc-ebpf", "svc-ebpf", "svc", features);
}
