//! The kernel part's programs, run on one packet at a time by the kernel itself (BPF_PROG_TEST_RUN): the packet that goes in, the
//! packet, verdict and counters that come out.
mod agent;
mod carried;
mod ended;
mod engine;
mod errors;
mod forwarded;
mod headers;
mod hops;
mod model;
mod monitored;
mod negative;
mod pieces;
mod reasons;
mod refused;
mod services;
mod stage;
mod sums;
