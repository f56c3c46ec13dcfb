//! The Dockerfile, as far as it can be tried without Docker, and what the image's init container does.
use std::fs;
use std::process::{Command, Output};

use svc_lab::binaries;
use svc_lab::pod::ENTRYPOINT;

use crate::installed::path;

/// Of the image's base: the packages libc6 and libgcc-s1 of Debian 12 among them.
const BASE: &str = "gcr.io/distroless/cc-debian12";
const LIBRARIES: [&str; 5] = ["linux-vdso.so.1", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"];

fn last_stage() -> Vec<String> {
    let text = fs::read_to_string(path("Dockerfile")).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let start = lines.iter().rposition(|line| line.starts_with("FROM ")).unwrap();
    lines[start..].to_vec()
}

#[test]
fn the_image_has_the_agent_where_the_manifests_are_tried_with_it() {
    let stage = last_stage();
    assert_eq!(stage[0], format!("FROM {BASE}"));
    assert!(stage.contains(&format!("COPY --from=build /src/target/release/svc-agent {ENTRYPOINT}")), "{stage:?}");
    assert_eq!(stage.last().unwrap(), &format!("ENTRYPOINT [\"{ENTRYPOINT}\"]"));
}

#[test]
fn the_agent_needs_only_libraries_that_the_base_image_has() {
    let output = Command::new("ldd").arg(binaries::agent().unwrap()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names = text.lines().filter_map(|line| line.split_whitespace().next()?.rsplit('/').next());
    let others: Vec<_> = names.filter(|name| !LIBRARIES.contains(name)).collect();
    assert!(others.is_empty(), "{others:?}");
}

/// In a mount namespace of its own, where `script` makes the node's directories.
fn mount(script: &str) -> Output {
    let agent = binaries::agent().unwrap();
    let script = format!("set -e; mount -t tmpfs none /mnt; mkdir -p /mnt/bpf /mnt/cgroup; {script}");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(agent).output().unwrap()
}

const MOUNT: &str = "\"$1\" mount --bpffs /mnt/bpf --cgroup /mnt/cgroup";

#[test]
fn what_a_node_has_not_mounted_is_mounted_once() {
    let output = mount(&format!("{MOUNT}; {MOUNT}; stat -f -c %T /mnt/bpf /mnt/cgroup/unified"));
    let text = String::from_utf8(output.stdout).unwrap();
    let expected = "mounted bpf at /mnt/bpf\nmounted cgroup2 at /mnt/cgroup/unified\nbpf_fs\ncgroup2fs\n";
    assert_eq!(text, expected, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_a_node_has_mounted_is_left_alone() {
    let output = mount(&format!(
        "mount -t bpf bpf /mnt/bpf; mkdir /mnt/cgroup/hybrid; mount -t cgroup2 none /mnt/cgroup/hybrid; {MOUNT}"
    ));
    assert_eq!(
        (output.status.success(), output.stdout.len()),
        (true, 0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_node_without_the_directory_is_told_by_the_flag() {
    let output = mount("\"$1\" mount --bpffs /mnt/bpf --cgroup /mnt/none");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.starts_with("svc-agent: --cgroup /mnt/none: "), "{told}");
}
