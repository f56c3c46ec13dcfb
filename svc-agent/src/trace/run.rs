//! The kernel part's own programs, run on a packet over the tables in use. What they write is a copy of what is in use, or
//! new.
use std::os::fd::AsFd as _;

use anyhow::Context as _;
use aya::Ebpf;
use aya::programs::{Program, TestRun as _, TestRunOptions};
use aya::util::nr_cpus;
use svc_common::map::Counter;
use svc_common::{Addr, Reason};

use super::place::Place;
use crate::attach;
use crate::dataplane::apart;
use crate::inspect::Pins;
use crate::sys;

/// Verdicts of tc programs (linux/pkt_cls.h).
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To whoever is next.
    Next,
    Drop,
    /// Sent elsewhere than it was going.
    Redirect,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    pub frame: Vec<u8>,
    /// What was counted, each once.
    pub counted: Vec<Reason>,
}

/// Runs the place's program on `frame`. Flows, and what affinity knows of `client`, are as they are in use.
///
/// # Errors
/// Where the pins cannot be read, and what the kernel refused.
pub fn run(pins: &Pins, place: &Place, client: Addr, frame: &[u8]) -> anyhow::Result<Outcome> {
    let mut ebpf = apart::over(&pins.maps())?;
    let flows = apart::map(&ebpf, "FLOWS")?;
    pins.copy_flows(|first, sets| {
        let keys: Vec<u32> = (first..).take(sets.len()).collect();
        sys::update_batch(flows, &keys, sets).map_err(|(_, error)| error).context("copying the flow table")
    })?;
    let affinity = apart::map(&ebpf, "AFFINITY")?;
    for (key, value) in pins.affinity()?.iter().filter(|(key, _)| key.client == client) {
        sys::update(affinity, key, value).context("copying the clients' affinity")?;
    }
    let name = format!("svc_{}", place.from.program());
    let program = ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?;
    attach::load_program(program).with_context(|| format!("loading {name}"))?;
    let Program::SchedClassifier(program) = program else { anyhow::bail!("{name} is none of tc's") };

    // struct __sk_buff: ifindex.
    let mut context = [0u8; 192];
    context[40..44].copy_from_slice(&place.index.to_ne_bytes());
    // A rejection may be longer than what it is about.
    let mut output = vec![0u8; frame.len() + 256];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut output),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).with_context(|| format!("running {name} on a packet"))?;
    output.truncate(result.data_size_out as usize);
    let verdict = match result.return_value {
        SHOT => Verdict::Drop,
        REDIRECT => Verdict::Redirect,
        _ => Verdict::Next,
    };
    Ok(Outcome { verdict, frame: output, counted: counted(&ebpf)? })
}

fn counted(ebpf: &Ebpf) -> anyhow::Result<Vec<Reason>> {
    let counters = apart::map(ebpf, "COUNTERS")?;
    let cpus = nr_cpus().map_err(|(path, error)| anyhow::Error::new(error).context(format!("cannot read {path}")))?;
    let mut reasons = Vec::new();
    for reason in Reason::ALL {
        let of_cpus = sys::lookup_per_cpu::<u32, Counter>(counters.as_fd(), &(*reason as u32), cpus)?;
        if of_cpus.iter().any(|counter| counter.packets > 0) {
            reasons.push(*reason);
        }
    }
    Ok(reasons)
}
