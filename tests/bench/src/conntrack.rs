//! The kernel's connection tracking, which has one limit for all network namespaces of a machine.
use std::fs;

use anyhow::{Context as _, Result};

const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// The limit as it is; none where the kernel has no connection tracking yet.
pub(crate) fn limit() -> Option<u64> {
    fs::read_to_string(LIMIT).ok()?.trim().parse().ok()
}

pub(crate) fn set_limit(limit: u64) -> Result<()> {
    fs::write(LIMIT, limit.to_string()).with_context(|| format!("cannot write {LIMIT}"))
}

/// Room for as many flows of each contestant, and for some others. Who started this puts the limit back.
pub(crate) fn make_room(flows: u32) -> Result<()> {
    let wanted = u64::from(flows) * 5 / 4 + 65_536;
    match limit() {
        Some(limit) if limit < wanted => set_limit(wanted),
        _ => Ok(()),
    }
}
