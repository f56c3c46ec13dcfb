//! The programs that are attached on a node, as the kernel lists them.
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;

use anyhow::{Context, Result};
use svc_lab::cgroup;

use crate::state::Cluster;

const BPF_PROG_QUERY: libc::c_long = 16;
/// Of `enum bpf_attach_type`, as far as they are a cgroup's: BPF_CGROUP_INET_INGRESS to BPF_CGROUP_INET_SOCK_RELEASE.
const CGROUP: std::ops::RangeInclusive<u32> = 0..=34;
const TCX: [(&str, u32); 2] = [("ingress", 46), ("egress", 47)];

/// Of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    more: [u64; 4],
}

/// A line for each place of the node's interfaces and of its cgroup that has programs.
pub(crate) fn on(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let directory = cgroup::mount_point()?.join(cluster.cgroup(node));
    let directory = File::open(&directory).with_context(|| format!("cannot open {}", directory.display()))?;
    let mut lines = Vec::new();
    for kind in CGROUP {
        let count = count(directory.as_raw_fd().cast_unsigned(), kind);
        lines.extend((count > 0).then(|| format!("cgroup: {count} of type {kind}")));
    }
    let interfaces = cluster.namespace(node).inside(|| {
        let mut lines = Vec::new();
        // /sys is the mounting process's, but this one is the thread's own.
        for line in fs::read_to_string("/proc/thread-self/net/dev")?.lines().skip(2) {
            let name = line.split(':').next().unwrap_or_default().trim();
            let index = nix::net::if_::if_nametoindex(name)?;
            for (place, kind) in TCX {
                let count = count(index, kind);
                lines.extend((count > 0).then(|| format!("{name}: {count} at {place}")));
            }
        }
        Ok(lines)
    })?;
    lines.extend(interfaces);
    Ok(lines)
}

/// 0 as well where the kernel has nothing of this kind there.
fn count(target: u32, kind: u32) -> u32 {
    let mut query = Query { target, kind, ..Query::default() };
    // SAFETY: the kernel reads and writes as many bytes as it is told the value has; no array is given to it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result == 0 { query.count } else { 0 }
}
