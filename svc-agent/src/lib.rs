//! The agent: keeps the kernel's maps equal to what the Kubernetes API, or a folder of manifests, says.
//! `source -> store -> plan -> desired -> diff -> apply`; all between the two ends is pure and synchronous.
#[cfg(not(target_os = "linux"))]
compile_error!("svc-agent programs the Linux kernel: build it on Linux");

pub mod apply;
pub mod attach;
pub mod census;
pub mod check;
pub mod cidrs;
pub mod cli;
pub mod clsact;
pub mod dataplane;
pub mod desired;
pub mod diff;
pub mod filters;
#[cfg(test)]
mod fuzz;
pub mod go_duration;
pub mod health;
pub mod histogram;
pub mod host;
pub mod ids;
pub mod inspect;
#[cfg(feature = "kernel-log")]
pub mod kernel_log;
pub mod kube_proxy_config;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod netns;
pub mod next_hops;
pub mod notes;
pub mod object;
pub mod plan;
pub mod pods;
pub mod reconcile;
pub mod serve;
pub mod service_health;
pub mod sock_diag;
pub mod source;
pub mod stale_sockets;
pub mod status;
pub mod store;
pub mod sweep;
pub mod sys;
pub mod top;
pub mod topology;
pub mod trace;
pub mod traffic;
